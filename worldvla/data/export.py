"""Episodes of any data set -> LeRobotDataset v3.0: parquet by pyarrow, video by PyAV; lerobot is not needed.

`worldvla export-dataset out/demos/tabletop_object --out out/lerobot/tabletop_object`

Layout: lerobot 0.6.1 datasets/dataset_writer.py and utils.py. An episode never straddles two files, and its
first frame stands at frames_before / fps in its video, exactly: lerobot's own sum of durations drifts.
"""

import io
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from worldvla.data.episode import Episode
from worldvla.data.sources.source import Source
from worldvla.files import only_writer, whole_folder, write_json
from worldvla.progress import progress_bar
from worldvla.video import Film

DATA_MB, VIDEO_MB = 100, 200
"""Size from which on the next episode begins a new file."""
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
INDICES = ("frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
CHECKED: Any = {"write_page_checksum": True}
EVERY = 10
"""Every how many-th frame counts in the statistics of pictures."""
Pictures = Literal["video", "png"]


def export_lerobot(source: Source, out: Path, pictures: Pictures = "video", fps: float = 0.0) -> int:
    """Write the data set, which appears at `out` complete or not at all; return its number of episodes.

    `pictures`: video is H.264, small and lossy; png keeps every bit, in the parquet files. `fps`: steps a
    second, where the source does not say. A broken episode raises ValueError.
    """
    if (rate := source.at(fps).fps) is None:
        raise ValueError(f"{source.path} does not say how many steps per second it has: give --fps")
    for view, camera in source.cameras.items():
        if pictures == "video" and (camera.rows % 2 or camera.cols % 2):
            size = f"{camera.rows} x {camera.cols}"
            raise ValueError(f"{view} of {size} pixels: video needs even sides, use --pictures png")
    with only_writer(out), whole_folder(out, "") as scratch, progress_bar(transient=True) as progress:
        bar = progress.add_task("write episodes", total=source.num_episodes)
        with ExitStack() as stack:
            writer = _Writer(scratch, source, pictures, rate, stack)
            for episode in source.episodes():
                writer.add(episode)
                progress.advance(bar)
        writer.finish()
    return len(writer.rows)


class _Writer:
    """The files of a data set being written, episode after episode."""

    def __init__(self, root: Path, source: Source, pictures: Pictures, fps: float, stack: ExitStack) -> None:
        self.root, self.source, self.pictures, self.stack = root, source, pictures, stack
        self.fps = int(fps) if fps == int(fps) else fps
        self.views = {f"observation.images.{view}": view for view in source.cameras}
        self.features = _features(source, pictures, self.fps)
        self.schema = _schema(self.features)
        self.data = _Parts(root / "data", ".parquet", DATA_MB)
        self.videos = {name: _Parts(root / f"videos/{name}", ".mp4", VIDEO_MB) for name in self.views}
        self.parquet: pq.ParquetWriter | None = None
        self.films: dict[str, Film] = {}
        self.rows: list[dict[str, Any]] = []
        self.tasks: dict[str, int] = {}
        self.numbers: dict[str, list[np.ndarray]] = {n: [] for n in self.features if n not in self.views}
        self.levels = {name: np.zeros((3, 256), dtype=np.int64) for name in self.views}
        """Of each camera, how often each level of each channel was seen."""

    def add(self, episode: Episode) -> None:
        given = {view: images.shape[1:3] for view, images in episode.images.items()}
        wanted = {view: (camera.rows, camera.cols) for view, camera in self.source.cameras.items()}
        if given != wanted:
            name = f"episode {len(self.rows)} ({episode.suite}, {episode.task})"
            raise ValueError(f"{name} has pictures {given}, the first one {wanted}: export them apart")
        start, length = sum(row["length"] for row in self.rows), len(episode)
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        steps = np.arange(length)
        columns: dict[str, Any] = {
            "action": episode.actions,
            "observation.state": episode.states,
            "next.done": steps == length - 1,
            "next.success": (steps == length - 1) & episode.success,
            "is_expert": episode.is_expert,
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, len(self.rows)),
            "index": start + steps,
            "task_index": np.full(length, task),
        }
        row: dict[str, Any] = {
            "episode_index": len(self.rows),
            "tasks": [episode.instruction],
            "length": length,
        }
        row |= {"dataset_from_index": start, "dataset_to_index": start + length}
        for name, kept in self.numbers.items():
            kept.append(np.asarray(columns[name]))
        stats = {name: _number_stats(kept[-1]) for name, kept in self.numbers.items()}
        for name, view in self.views.items():
            frames = episode.images[view]
            seen = frames[::EVERY]
            levels = np.stack([np.bincount(seen[..., c].ravel(), minlength=256) for c in range(3)])
            self.levels[name] += levels
            stats[name] = _picture_stats(levels) | {"count": [len(seen)]}
            if self.pictures == "png":
                columns[name] = [{"bytes": _png(frame), "path": None} for frame in frames]
            else:
                row |= self._film(name, frames)
        row |= {f"stats/{name}/{key}": value for name, found in stats.items() for key, value in found.items()}
        row |= self._write(columns)
        self.rows.append(row)

    def _film(self, name: str, frames: np.ndarray) -> dict[str, Any]:
        """Write the frames to the camera's video; return where they stand."""
        if self.videos[name].is_full() and name in self.films:
            self.films.pop(name).close()
        if name not in self.films:
            film = Film(self.videos[name].next(), self.fps, frames.shape[1:3], {"crf": "18", "g": "2"})
            self.films[name] = film
            self.stack.callback(film.close)
        film = self.films[name]
        begin = film.count
        film.add(frames)
        place = {"from_timestamp": begin / self.fps, "to_timestamp": film.count / self.fps}
        return {f"videos/{name}/{key}": v for key, v in (self.videos[name].place() | place).items()}

    def _write(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Write the rows of an episode as a row group; return where they stand."""
        if self.data.is_full() and self.parquet is not None:
            self.parquet.close()
            self.parquet = None
        if self.parquet is None:
            self.parquet = pq.ParquetWriter(self.data.next(), self.schema, compression="snappy", **CHECKED)
            self.stack.callback(self.parquet.close)
        self.parquet.write_table(_table(columns, self.schema))
        return {f"data/{key}": value for key, value in self.data.place().items()}

    def finish(self) -> None:
        """Write what is known at the end; the other files are closed."""
        if not self.rows:
            raise ValueError(f"{self.source.path} holds no episodes")
        total = self.rows[-1]["dataset_to_index"]
        meta = self.root / "meta"
        episodes = meta / f"episodes/{FILE.format(chunk_index=0, file_index=0)}.parquet"
        episodes.parent.mkdir(parents=True)
        own = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        pq.write_table(pa.Table.from_pylist([row | own for row in self.rows]), episodes, **CHECKED)
        pq.write_table(_tasks(list(self.tasks)), meta / "tasks.parquet", **CHECKED)
        write_json(meta / "stats.json", self._stats(), indent=4)
        info = {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": len(self.rows),
            "total_frames": total,
            "total_tasks": len(self.tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": f"data/{FILE}.parquet",
            "video_path": f"videos/{{video_key}}/{FILE}.mp4" if self.pictures == "video" else None,
            "features": self.features,
        }
        write_json(meta / "info.json", info, indent=4)

    def _stats(self) -> dict[str, Any]:
        stats = {name: _number_stats(np.concatenate(parts)) for name, parts in self.numbers.items()}
        for name, levels in self.levels.items():
            stats[name] = _picture_stats(levels) | {
                "count": [sum(-(-r["length"] // EVERY) for r in self.rows)]
            }
        return stats


class _Parts:
    """The numbered files of one kind: 1000 a chunk."""

    def __init__(self, folder: Path, suffix: str, megabytes: int) -> None:
        self.folder, self.suffix, self.limit, self.number = folder, suffix, megabytes * 2**20, -1

    def place(self) -> dict[str, int]:
        return {"chunk_index": self.number // 1000, "file_index": self.number % 1000}

    def path(self) -> Path:
        return self.folder / f"{FILE.format(**self.place())}{self.suffix}"

    def is_full(self) -> bool:
        return self.number >= 0 and self.path().stat().st_size >= self.limit

    def next(self) -> Path:
        self.number += 1
        self.path().parent.mkdir(parents=True, exist_ok=True)
        return self.path()


def _features(source: Source, pictures: Pictures, fps: float) -> dict[str, Any]:
    """Return the entry `features` of info.json."""
    features: dict[str, Any] = {}
    for view, camera in source.cameras.items():
        feature: dict[str, Any] = {"dtype": "video" if pictures == "video" else "image"}
        feature |= {"shape": [camera.rows, camera.cols, 3], "names": ["height", "width", "channels"]}
        if pictures == "video":
            facts = {"height": camera.rows, "width": camera.cols, "codec": "h264", "pix_fmt": "yuv420p"}
            facts |= {"is_depth_map": False, "fps": fps, "channels": 3}
            feature["info"] = {f"video.{key}": value for key, value in facts.items()} | {"has_audio": False}
        features[f"observation.images.{view}"] = feature
    for name, vector in {"observation.state": source.state, "action": source.action}.items():
        features[name] = {"dtype": "float32", "shape": [len(vector.names)], "names": list(vector.names)}
    kinds = dict.fromkeys(("next.done", "next.success", "is_expert"), "bool") | {"timestamp": "float32"}
    kinds |= dict.fromkeys(INDICES, "int64")
    return features | {n: {"dtype": kind, "shape": [1], "names": None} for n, kind in kinds.items()}


def _schema(features: dict[str, Any]) -> pa.Schema:
    kinds = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = []
    for name, feature in features.items():
        if feature["dtype"] == "image":
            fields.append((name, picture))
        elif feature["dtype"] != "video":
            kind, size = kinds[feature["dtype"]], feature["shape"][0]
            fields.append((name, pa.list_(kind, size) if name in ("action", "observation.state") else kind))
    return pa.schema(fields)


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    arrays = []
    for field in schema:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(np.ascontiguousarray(values).ravel(), field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.table(arrays, schema=schema)


def _tasks(texts: list[str]) -> pa.Table:
    """Return tasks.parquet as pandas writes it: lerobot wants the texts as the index of a frame."""

    def column(name: str, kind: str, numpy: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}

    columns = [column("task_index", "int64", "int64"), column("task", "unicode", "object")]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table(
        {"task_index": pa.array(range(len(texts)), pa.int64()), "task": pa.array(texts, pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _number_stats(values: np.ndarray) -> dict[str, Any]:
    """Return the statistics of a feature (T, n) or (T,), one by number."""
    values = values.astype(np.float64).reshape(len(values), -1)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {q: np.quantile(values, share, axis=0) for q, share in QUANTILES.items()}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def _picture_stats(levels: np.ndarray) -> dict[str, Any]:
    """Return the statistics of a camera, (3, 1, 1) each, of levels counted by channel (3, 256)."""
    share = levels / levels.sum(1, keepdims=True)
    grey = np.arange(256) / 255
    mean = share @ grey
    found = {"mean": mean, "std": np.sqrt(np.maximum(0, share @ grey**2 - mean**2))}
    found |= {"min": grey[(levels > 0).argmax(1)], "max": grey[255 - (levels[:, ::-1] > 0).argmax(1)]}
    found |= {q: grey[(share.cumsum(1) >= part - 1e-12).argmax(1)] for q, part in QUANTILES.items()}
    return {name: values.reshape(3, 1, 1).tolist() for name, values in found.items()}


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="png")
    return buffer.getvalue()
