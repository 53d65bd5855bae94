"""Frames -> H.264 files that every browser plays. Small pictures are enlarged in whole steps."""

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from worldvla.files import whole_file

HEIGHT = 256
"""Pixel rows of a video, at most; a larger picture keeps its size."""
GAP = 8


def enlarge(image: np.ndarray, rows: int = HEIGHT) -> np.ndarray:
    """Return (rows, *, 3), every pixel a square of the same whole size, white below where `rows` is no
    multiple.
    """
    times = max(1, rows // image.shape[0])
    big = image.repeat(times, 0).repeat(times, 1)
    missing = max(0, rows - big.shape[0])
    return np.pad(big, ((0, missing), (0, 0), (0, 0)), constant_values=255)


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return one picture: all of the same height, white gaps between, even sides (as H.264 needs)."""
    rows = max([HEIGHT, *(image.shape[0] for image in images)])
    parts: list[np.ndarray] = []
    for image in images:
        parts += [enlarge(image, rows), np.full((rows, GAP, 3), 255, dtype=np.uint8)]
    picture = np.concatenate(parts[:-1], axis=1)
    return np.pad(picture, ((0, rows % 2), (0, picture.shape[1] % 2), (0, 0)), constant_values=255)


def views_side_by_side(frames: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """Return one picture a frame, its views in their order."""
    return [side_by_side(list(frame.values())) for frame in frames]


def encode_mp4(pictures: Sequence[np.ndarray], fps: float) -> bytes:
    """Return an MP4 of uint8 (Y, X, 3) pictures with even sides. The last one stays for a second."""
    import av

    rows, cols = pictures[0].shape[:2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = cols, rows, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", "tune": "animation", "threads": "1"}
        for picture in [*pictures, *[pictures[-1]] * round(fps)]:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
            )
        container.mux(stream.encode())
    return buffer.getvalue()


def film_strip(films: Sequence[Mapping[str, np.ndarray]], every: int = 3) -> np.ndarray:
    """Return one picture: a row a film of each view, a column every `every`-th frame; the films of a view
    above each other. `films`: view -> uint8 (T, Y, X, 3)."""
    rows = max(HEIGHT // 2, *(frames.shape[1] for frames in films[0].values()))
    strips: list[np.ndarray] = []
    for view in films[0]:
        for film in films:
            cells = [
                np.pad(enlarge(image, rows), ((0, 2), (0, 2), (0, 0)), constant_values=255)
                for image in film[view][::every]
            ]
            strips.append(np.concatenate(cells, axis=1))
    width = max(strip.shape[1] for strip in strips)
    pads = [((0, 0), (0, width - strip.shape[1]), (0, 0)) for strip in strips]
    return np.concatenate([np.pad(s, p, constant_values=255) for s, p in zip(strips, pads, strict=True)])


def write_png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    with whole_file(path) as scratch:
        Image.fromarray(image).save(scratch, format="png", optimize=True)


def write_mp4(path: Path, pictures: Sequence[np.ndarray], fps: float) -> None:
    with whole_file(path) as scratch:
        scratch.write_bytes(encode_mp4(pictures, fps))
