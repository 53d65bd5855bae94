"""Frames -> H.264 files that every browser plays. Small pictures are enlarged in whole steps."""

import io
from collections.abc import Iterable, Mapping, Sequence
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
    buffer = io.BytesIO()
    film = Film(buffer, fps, pictures[0].shape[:2], {"crf": "23", "tune": "animation"})
    film.add([*pictures, *[pictures[-1]] * round(fps)])
    film.close()
    return buffer.getvalue()


class Film:
    """An MP4 of H.264 that grows, in a file or in memory; frame k stands at k / fps. `options`: libx264's."""

    def __init__(
        self, target: Path | io.BytesIO, fps: float, size: tuple[int, ...], options: dict[str, str]
    ) -> None:
        import av

        self.container = av.open(target if isinstance(target, io.BytesIO) else str(target), "w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, "yuv420p"
        self.stream.options = {"preset": "veryfast", "threads": "1", **options}
        self.count, self.is_open = 0, True

    def add(self, pictures: Iterable[np.ndarray]) -> None:
        """Append uint8 (Y, X, 3) pictures of the film's size."""
        import av

        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = self.count, 1 / Fraction(self.stream.average_rate or 1)
            self.container.mux(self.stream.encode(frame))
            self.count += 1

    def close(self) -> None:
        """Write what is still to be written; a second time does nothing."""
        if self.is_open:
            self.container.mux(self.stream.encode())
            self.container.close()
            self.is_open = False


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
