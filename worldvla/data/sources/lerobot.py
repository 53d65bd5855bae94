"""LeRobotDataset v3.0 and v2.x on disk -> Source. Parquet by pyarrow, video by PyAV; lerobot is not needed.

v3.0 packs many episodes into a parquet file and an MP4 file, v2.x has one of each for an episode. An image
feature lies in the parquet itself, as PNG. Layouts: lerobot 0.6.1 and 0.3.3, datasets/utils.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from worldvla.data.episode import Episode
from worldvla.data.sources.source import Names, Plan, Source, attempt, decode_picture, dim_names
from worldvla.files import read_json, reading
from worldvla.published.hub import origin

DEFAULTS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Features that every data set has beside its own."""
COMPUTE: Any = pc
"""Its functions are made at run time: no stubs name them."""
VERIFIED: Any = {"page_checksum_verification": True}
"""Of parquet files whose writer left checksums, as ours does and lerobot's does not."""
TOLERANCE = 1e-4
"""Seconds by which a timestamp may be off, as in lerobot."""
FRAME_TOLERANCE = 0.25
"""Share of a frame's time by which a video's frame may be off: lerobot's writer drifts (its issue 3177)."""


@dataclass(frozen=True)
class Video:
    """Where an episode's frames of a camera are: from `start` seconds on in the file, in v2.x alone in it."""

    path: Path
    start: float
    is_last: bool
    """No other episode follows in the file."""


@dataclass(frozen=True)
class Row:
    """One episode, by the tables of the data set."""

    index: int
    length: int
    data: Path
    videos: dict[str, Video]


@dataclass(frozen=True)
class Table:
    """A parquet file without its pictures, for as long as its episodes are read."""

    path: Path
    columns: pa.Table
    episodes: np.ndarray

    @classmethod
    def read(cls, path: Path, columns: list[str]) -> "Table":
        try:
            table = pq.read_table(path, columns=columns, **VERIFIED)
            episodes = table.column("episode_index").to_numpy()
        except FileNotFoundError:
            raise ValueError(f"no {path}: download the data set again") from None
        except (OSError, KeyError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is damaged or lacks columns ({reason}): download it again") from None
        if missing := sorted(set(columns) - set(table.column_names)):
            raise ValueError(f"{path} lacks {', '.join(missing)}, which meta/info.json declares")
        return cls(path, table, episodes)


def open_lerobot(path: Path, names: Names) -> Source:
    """Open the folder of a data set, which holds meta/info.json."""
    info = read_json(path / "meta/info.json")
    version = str(info.get("codebase_version"))
    fps, features = info.get("fps"), info.get("features")
    if not isinstance(fps, (int, float)) or fps <= 0 or not isinstance(features, dict):
        raise ValueError(f"{path}/meta/info.json: expected fps above 0 and features, got fps {fps!r}")
    sizes = {n: _size(f) for n, f in features.items() if f["dtype"] in ("video", "image")}
    pictures = {name: size[:2] for name, size in sizes.items() if size[2] == 3}
    numbers = {
        n: dim_names(f.get("names"), f["shape"][0])
        for n, f in features.items()
        if f["dtype"].startswith(("float", "int")) and len(f["shape"]) == 1 and n not in DEFAULTS
    }
    suite = (origin(path)[0] or str(path.resolve())).split("/")[-1]
    others = [name for name in sizes if name not in pictures]
    units = {n: _units(features[n]) for n in numbers}
    plan = Plan.of(suite, names, pictures, numbers, ("action", "observation.state"), others, units)
    views = [camera.feature for camera in plan.cameras.values()]
    if version.startswith("v3."):
        rows, tasks = _rows_v3(path, info, views)
    elif version.startswith("v2."):
        rows, tasks = _rows_v2(path, info, views)
    else:
        raise ValueError(
            f"{path} is LeRobotDataset {version}, v3.0 and v2.x are read: convert it with lerobot"
        )
    _check_counts(path, info, rows)
    reader = _Reader(path, float(fps), features, plan, rows, tasks)
    words = [
        *path.glob("meta/tasks.*"),
        *path.glob("meta/episodes*"),
        *path.glob("meta/episodes/*/*.parquet"),
    ]
    files = dict.fromkeys([path / "meta/info.json", *sorted(filter(Path.is_file, words))])
    files |= dict.fromkeys(row.data for row in rows)
    files |= dict.fromkeys(video.path for row in rows for video in row.videos.values())
    return plan.source(
        path,
        kind=f"LeRobotDataset {version}",
        num_episodes=len(rows),
        fps=float(fps),
        files=tuple(files),
        attempts=reader.attempts,
    )


def _units(feature: dict[str, Any]) -> str:
    """Return what a feature says of its numbers; the format has no place of its own for it."""
    words = feature | (feature.get("info") or {})
    return ", ".join(str(words[key]) for key in ("unit", "units", "description") if words.get(key))


def _size(feature: dict[str, Any]) -> tuple[int, int, int]:
    """Return rows, columns and channels of a camera, whose axes are in any order."""
    shape, names = feature["shape"], feature.get("names") or ()
    first, last = (shape[i] in (1, 3) for i in (0, -1))
    channels_first = str(names[0]).startswith("channel") if names else first and not last
    channels, rows, cols = shape if channels_first else (shape[2], *shape[:2])
    return rows, cols, channels


def _rows_v3(path: Path, info: dict[str, Any], cameras: list[str]) -> tuple[list[Row], dict[int, str]]:
    """Read meta/episodes and meta/tasks.parquet."""
    videos = [name for name in cameras if info["features"][name]["dtype"] == "video"]
    files = sorted((path / "meta/episodes").glob("*/*.parquet"))
    places = ("chunk_index", "file_index", "from_timestamp")
    wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    wanted += [f"videos/{name}/{place}" for name in videos for place in places]
    table = [row for file in files for row in Table.read(file, wanted).columns.to_pylist()]
    table.sort(key=lambda row: row["episode_index"])

    def place(row: dict[str, Any], prefix: str, template: str) -> Path:
        numbers = {name: row[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}
        return path / template.format(**numbers, video_key=prefix.removeprefix("videos/"))

    last: dict[Path, float] = {}
    for row in table:
        for name in videos:
            file = place(row, f"videos/{name}", info["video_path"])
            last[file] = max(last.get(file, 0.0), row[f"videos/{name}/from_timestamp"])
    rows = []
    for row in table:
        where = {name: place(row, f"videos/{name}", info["video_path"]) for name in videos}
        starts = {name: row[f"videos/{name}/from_timestamp"] for name in videos}
        shown = {name: Video(file, starts[name], starts[name] == last[file]) for name, file in where.items()}
        rows.append(Row(row["episode_index"], row["length"], place(row, "data", info["data_path"]), shown))
    if not (path / "meta/tasks.parquet").is_file():
        raise ValueError(f"no {path / 'meta/tasks.parquet'}: download the data set again")
    with reading(path / "meta/tasks.parquet", "parquet file", "download the data set again"):
        tasks = pq.read_table(path / "meta/tasks.parquet", **VERIFIED).to_pylist()
    texts = {row["task_index"]: next(v for v in row.values() if isinstance(v, str)) for row in tasks}
    return rows, texts


def _rows_v2(path: Path, info: dict[str, Any], cameras: list[str]) -> tuple[list[Row], dict[int, str]]:
    """Read meta/episodes.jsonl and meta/tasks.jsonl."""

    def lines(name: str) -> list[dict[str, Any]]:
        with reading(path / "meta" / name, "JSON", "download the data set again"):
            text = (path / "meta" / name).read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines() if line.strip()]

    rows = []
    for row in sorted(lines("episodes.jsonl"), key=lambda row: row["episode_index"]):
        number = {"episode_index": row["episode_index"]}
        number["episode_chunk"] = row["episode_index"] // info.get("chunks_size", 1000)
        videos = {
            name: Video(path / info["video_path"].format(**number, video_key=name), 0.0, is_last=True)
            for name in cameras
            if info["features"][name]["dtype"] == "video"
        }
        rows.append(
            Row(row["episode_index"], row["length"], path / info["data_path"].format(**number), videos)
        )
    return rows, {row["task_index"]: row["task"] for row in lines("tasks.jsonl")}


def _check_counts(path: Path, info: dict[str, Any], rows: list[Row]) -> None:
    if not rows:
        raise ValueError(f"{path} has no episodes in meta/: download it again")
    for number, row in enumerate(rows):
        if row.index != number:
            raise ValueError(f"{path}: episode {number} is missing in meta/, the next is {row.index}")
    for name, count in {"total_episodes": len(rows), "total_frames": sum(row.length for row in rows)}.items():
        if info.get(name, count) != count:
            raise ValueError(f"{path}: meta/info.json says {name} {info[name]}, its episodes have {count}")


@dataclass
class _Reader:
    path: Path
    fps: float
    features: dict[str, Any]
    plan: Plan
    rows: list[Row]
    tasks: dict[int, str]
    table: Table | None = None
    """The file that was read last."""

    def attempts(self, images: bool) -> Iterator[tuple[str, Episode | ValueError]]:
        for row in self.rows:
            yield attempt(self.path, f"episode {row.index}", partial(self._episode, row, images))

    def _episode(self, row: Row, images: bool) -> Episode:
        names = [*self.plan.features, "timestamp", "frame_index", "episode_index", "task_index"]
        if self.table is None or self.table.path != row.data:
            self.table = Table.read(row.data, names)
        frames = self.table.columns.take(np.flatnonzero(self.table.episodes == row.index))
        if len(frames) != row.length:
            raise ValueError(f"{row.data} holds {len(frames)} frames, meta/ says {row.length}")
        times = frames.column("timestamp").to_numpy().astype(np.float64)
        self._check_times(times, frames.column("frame_index").to_numpy())
        columns = {name: self._vectors(frames, name) for name in self.plan.features}
        instruction = self._instruction(frames.column("task_index").to_numpy())
        pictures = (lambda view: self._pictures(row, view, times)) if images else None
        return self.plan.episode(columns, instruction, pictures)

    def _instruction(self, tasks: np.ndarray) -> str:
        if len(changes := np.flatnonzero(np.diff(tasks))):
            raise ValueError(f"frame {changes[0] + 1}: the instruction changes, expected one per episode")
        if tasks[0] not in self.tasks:
            raise ValueError(f"frame 0: no instruction of number {tasks[0]} in meta/tasks")
        return self.tasks[int(tasks[0])]

    def _vectors(self, frames: pa.Table, name: str) -> np.ndarray:
        """Return a feature as float32 (T, n)."""
        column, size = frames.column(name).combine_chunks(), self.features[name]["shape"][0]
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            lengths = COMPUTE.fill_null(COMPUTE.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            for frame in np.flatnonzero(lengths != size):
                raise ValueError(f"frame {frame}: {name} has {lengths[frame]} numbers, expected {size}")
            column = COMPUTE.list_flatten(column)
        values = column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(frames), -1)
        if values.shape[1] != size:
            raise ValueError(f"frame 0: {name} has {values.shape[1]} numbers, expected {size}")
        return values

    def _check_times(self, times: np.ndarray, numbers: np.ndarray) -> None:
        """Check that frames are in order and follow one another at the rate that the data set declares."""
        for frame in np.flatnonzero(numbers != np.arange(len(numbers))):
            raise ValueError(f"frame {frame}: frame_index is {numbers[frame]}, expected {frame}")
        steps = np.diff(times)
        for frame in np.flatnonzero(~(steps > 0)):
            raise ValueError(
                f"frame {frame + 1}: timestamp {times[frame + 1]:.4f} s follows {times[frame]:.4f} s"
            )
        slack = TOLERANCE + 2 * np.spacing(np.float32(times[-1]))  # stored as float32
        for frame in np.flatnonzero(np.abs(steps - 1 / self.fps) > slack):
            raise ValueError(
                f"frame {frame + 1}: it is {steps[frame]:.4f} s after the one before, {1 / steps[frame]:.4g} "
                f"frames a second; meta/info.json declares {self.fps:.4g}"
            )

    def _pictures(self, row: Row, view: str, times: np.ndarray) -> np.ndarray:
        name = self.plan.cameras[view].feature
        video = row.videos.get(name)
        frames = decode(video, times, self.fps) if video else self._stills(row, name)
        return self.plan.frames(view, frames, len(times))

    def _stills(self, row: Row, name: str) -> Iterator[np.ndarray]:
        """Yield the pictures that lie in the parquet file or, where only their path does, beside it."""
        chosen = [("episode_index", "=", row.index)]
        table = pq.read_table(row.data, columns=[name], filters=chosen, **VERIFIED)
        for frame, cell in enumerate(table.column(name)):
            still = cell.as_py() or {}
            yield decode_picture(name, frame, still.get("bytes") or self.path / (still.get("path") or ""))


def decode(video: Video, times: np.ndarray, fps: float) -> Iterator[np.ndarray]:
    """Yield the frames (Y, X, 3) uint8 that are shown `times` seconds after the episode's start, as PyAV
    decodes them. The caller counts them: a file that ends or has a gap stops early."""
    if not video.path.is_file():
        raise ValueError(f"frame 0: no {video.path}: download the data set again")
    slack, packet = FRAME_TOLERANCE / fps, None
    try:
        with av.open(str(video.path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}  # H.264's decoder paints over damage
            if stream.average_rate is not None and abs(float(stream.average_rate) - fps) > 0.01 * fps:
                rate = float(stream.average_rate)
                raise ValueError(f"frame 0: {video.path} has {rate:.4g} frames a second, expected {fps:.4g}")
            container.seek(int((video.start + slack) / (stream.time_base or 1)), stream=stream)
            number = 0
            for packet in container.demux(stream):
                for frame in packet.decode():
                    if frame.time < video.start - slack:
                        continue
                    if number == len(times):
                        raise ValueError(
                            f"frame {number}: {video.path} goes on after the episode's {number} frames"
                        )
                    if abs(frame.time - video.start - times[number]) > slack:
                        return
                    yield frame.to_ndarray(format="rgb24")
                    number += 1
                    if number == len(times) and not video.is_last:
                        return
    except (av.error.FFmpegError, IndexError) as error:
        at = float(packet.pts * packet.time_base) - video.start if packet and packet.pts else 0.0
        number = min(max(0, round(at * fps)), len(times) - 1)
        raise ValueError(f"frame {number}: {video.path} is damaged ({error}): download it again") from None
