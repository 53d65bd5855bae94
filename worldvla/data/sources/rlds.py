"""RLDS as TensorFlow Datasets writes it -> Source, without TensorFlow: OpenVLA's LIBERO, Open X-Embodiment.

<name>/<version>/features.json and dataset_info.json say what the TFRecord shards beside them hold. A record
is an episode, a tf.train.Example whose features are flat: steps/action has T * 7 floats,
steps/observation/image T encoded pictures. Formats: tensorflow_datasets 4.9.10 core/example_serializer.py;
TensorFlow tfrecord.
"""

import contextlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from worldvla.data.episode import Episode
from worldvla.data.sources.source import Names, Plan, Source, attempt, decode_picture
from worldvla.files import read_json

NOT_OURS = ("reward", "discount", "is_first", "is_last", "is_terminal")
"""Numbers of a step that are neither action nor state."""
OPEN_X_ACTION = ("world_vector", "rotation_delta", "gripper_closedness_action", "open_gripper")
"""Parts of an action that is a dict, in OpenVLA's order (prismatic/vla/datasets/rlds/oxe/transforms.py)."""
INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction")
CRC_MASK = 0xA282EAD8


@dataclass(frozen=True)
class Shard:
    path: Path
    count: int
    """Episodes."""


def open_rlds(path: Path, names: Names) -> Source:
    """Open the folder of a version, which holds features.json and the shards of every split."""
    info, steps = read_json(path / "dataset_info.json"), _steps(path)
    if (form := info.get("fileFormat", "tfrecord")) != "tfrecord":
        raise ValueError(f"{path} is stored as {form}, expected tfrecord: write it again in that file format")
    numbers = {n: _dims(n, f) for n, f in steps.items() if _is_vector(f) and n not in NOT_OURS}
    parts = ",".join(n for n in (f"action/{part}" for part in OPEN_X_ACTION) if n in numbers)
    shards, splits = [], {}
    for split in info.get("splits", ()):
        counts = [int(n) for n in split.get("shardLengths", ())]
        splits[split["name"]] = sum(counts)
        shards += [Shard(path / _file(info, split, i, len(counts)), n) for i, n in enumerate(counts)]
    if not sum(splits.values()):
        raise ValueError(f"{path}/dataset_info.json lists no episodes: download the data set again")
    texts = [name for name in INSTRUCTIONS if name in steps]
    if not texts:
        raise ValueError(
            f"{path} has no instruction: expected the text {' or '.join(INSTRUCTIONS)} in a step"
        )
    pictures = {n: _size(n, f, shards) for n, f in steps.items() if _channels(f) == "3"}
    others = [n for n, f in steps.items() if _channels(f) not in ("", "3")]
    usual = parts if parts and "action" not in numbers else "action", "observation/state"
    units = {n: " ".join(str(steps[n].get("description", "")).split()) for n in numbers}
    plan = Plan.of(str(info["name"]), names, pictures, numbers, usual, others, units)
    reader = _Reader(path, plan, {n: len(d) for n, d in numbers.items()}, shards, texts[0])
    return plan.source(
        path,
        kind=f"RLDS {info['name']} {info.get('version', '')}: "
        + ", ".join(f"{name} {count}" for name, count in splits.items()),
        num_episodes=sum(splits.values()),
        fps=None,
        files=(path / "dataset_info.json", path / "features.json", *(shard.path for shard in shards)),
        attempts=reader.attempts,
    )


def _steps(path: Path) -> dict[str, dict[str, Any]]:
    """Return the features of a step, flat: name with slashes -> its entry of features.json."""

    def leaves(feature: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if "featuresDict" in feature:
            for key, part in feature["featuresDict"].get("features", {}).items():
                yield from leaves(part, f"{name}/{key}" if name else key)
        else:
            yield name, dict(feature)

    try:
        step = read_json(path / "features.json")["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    except KeyError as error:
        raise ValueError(f"{path}/features.json has no {error}: expected RLDS, a sequence of steps") from None
    return dict(leaves(step, ""))


def _is_vector(feature: Mapping[str, Any]) -> bool:
    tensor = feature.get("tensor", {})
    kinds = str(tensor.get("dtype")).startswith(("float", "int", "uint"))
    return kinds and len(_shape(tensor)) < 2 and tensor.get("encoding", "none") in ("none", "")


def _shape(part: Mapping[str, Any]) -> list[str]:
    return part.get("shape", {}).get("dimensions", [])


def _dims(name: str, feature: Mapping[str, Any]) -> tuple[str, ...]:
    size = int((_shape(feature["tensor"]) or ["1"])[0])
    return (name.split("/")[-1],) if size == 1 else tuple(map(str, range(size)))


def _channels(feature: Mapping[str, Any]) -> str:
    return "".join(_shape(feature.get("image", {}))[2:])


def _size(name: str, feature: Mapping[str, Any], shards: list[Shard]) -> tuple[int, int]:
    """Return rows and columns of a camera; where they may vary, those of the first sound picture."""
    rows, cols = map(int, _shape(feature["image"])[:2])
    if rows > 0 and cols > 0:
        return rows, cols
    for record in (r for shard in shards for r in records(shard) if not isinstance(r, ValueError)):
        with contextlib.suppress(ValueError, LookupError):  # reading that episode says what is wrong with it
            picture = decode_picture(name, 0, parse(record)[f"steps/{name}"][0])
            return picture.shape[0], picture.shape[1]
    raise ValueError(
        f"{shards[0].path}: no episode has a sound picture of {name}: download the data set again"
    )


def _file(info: Mapping[str, Any], split: Mapping[str, Any], index: int, count: int) -> str:
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    number = {"SHARD_INDEX": f"{index:05d}", "NUM_SHARDS": f"{count:05d}"}
    number["SHARD_X_OF_Y"] = f"{index:05d}-of-{count:05d}"
    return template.format(DATASET=info["name"], SPLIT=split["name"], FILEFORMAT="tfrecord", **number)


def records(shard: Shard) -> Iterator[bytes | ValueError]:
    """Yield each record of a shard, or what is wrong with it; after damaged lengths all others are lost."""
    if not shard.path.is_file():
        yield from [ValueError(f"no {shard.path}: download the data set again")] * shard.count
        return
    found = 0
    with shard.path.open("rb") as file:
        while head := file.read(12):
            size, check = struct.unpack("<QI", head) if len(head) == 12 else (0, None)
            if check != _masked_crc(head[:8]) or found == shard.count:
                break
            data, tail = file.read(min(size, shard.path.stat().st_size)), file.read(4)
            if len(data) < size or tail != struct.pack("<I", _masked_crc(data)):
                yield ValueError(f"{shard.path}: record {found} is damaged (CRC-32C): download it again")
            else:
                yield data
            found += 1
    if found < shard.count or head:
        what = "is damaged or goes on" if head else "ends"
        fault = f"{shard.path} {what} after {found} of {shard.count} episodes: download it again"
        yield from [ValueError(fault)] * max(1, shard.count - found)


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + CRC_MASK) & 0xFFFFFFFF


@cache
def _example() -> type[Any]:
    """Return the message tf.train.Example; its map is declared as it is on the wire, repeated entries."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="worldvla", syntax="proto3")

    def message(name: str, **fields: tuple[int, Any, bool]) -> None:
        own = file.message_type.add(name=name)
        for word, (number, kind, repeated) in fields.items():
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            one = own.field.add(name=word, number=number, label=label)
            if isinstance(kind, str):
                one.type, one.type_name = field.TYPE_MESSAGE, f".worldvla.{kind}"
            else:
                one.type = kind

    message("Bytes", value=(1, field.TYPE_BYTES, True))
    message("Floats", value=(1, field.TYPE_FLOAT, True))
    message("Ints", value=(1, field.TYPE_INT64, True))
    message("Feature", bytes=(1, "Bytes", False), floats=(2, "Floats", False), ints=(3, "Ints", False))
    message("Entry", key=(1, field.TYPE_STRING, False), value=(2, "Feature", False))
    message("Features", entry=(1, "Entry", True))
    message("Example", features=(1, "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("worldvla.Example"))


def parse(record: bytes) -> dict[str, Any]:
    """Return a record's features: float32 or int64 arrays (n,), lists of bytes."""
    try:
        example = _example().FromString(record)
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example ({error}): download the data set again") from None
    values: dict[str, Any] = {}
    for entry in example.features.entry:
        feature = entry.value
        if feature.HasField("floats"):
            values[entry.key] = np.array(feature.floats.value, dtype=np.float32)
        elif feature.HasField("ints"):
            values[entry.key] = np.array(feature.ints.value, dtype=np.int64)
        else:
            values[entry.key] = list(feature.bytes.value)
    return values


@dataclass(frozen=True)
class _Reader:
    path: Path
    plan: Plan
    sizes: dict[str, int]
    """Numbers of each feature that may be read."""
    shards: list[Shard]
    instruction: str

    def attempts(self, images: bool) -> Iterator[tuple[str, Episode | ValueError]]:
        for number, record in enumerate(record for shard in self.shards for record in records(shard)):
            yield attempt(self.path, f"episode {number}", partial(self._episode, record, images))

    def _episode(self, record: bytes | ValueError, images: bool) -> Episode:
        if isinstance(record, ValueError):
            raise record
        values = parse(record)
        cameras = [camera.feature for camera in self.plan.cameras.values()]
        wanted = [*self.plan.features, self.instruction, *cameras]
        if missing := [name for name in wanted if f"steps/{name}" not in values]:
            raise ValueError(f"frame 0: it has no {missing[0]}, which features.json declares")
        values = {name: values[f"steps/{name}"] for name in wanted}
        texts = [text.decode() for text in values[self.instruction]]
        columns = {}
        for name in self.plan.features:
            whole, size = divmod(len(values[name]), self.sizes[name])
            if size or whole != len(texts):
                raise ValueError(
                    f"frame {min(whole, len(texts))}: {name} has {len(values[name])} numbers in {len(texts)} "
                    f"steps, expected {self.sizes[name]} a step"
                )
            columns[name] = values[name].astype(np.float32).reshape(whole, -1)
        for frame in [i for i, text in enumerate(texts) if text != texts[0]]:
            raise ValueError(f"frame {frame}: the instruction changes, expected one an episode")
        if not texts or not texts[0]:
            raise ValueError(f"frame 0: {self.instruction} is empty, expected an instruction")

        def pictures(view: str) -> np.ndarray:
            name = self.plan.cameras[view].feature
            stills = (decode_picture(name, frame, data) for frame, data in enumerate(values[name]))
            return self.plan.frames(view, stills, len(texts))

        return self.plan.episode(columns, texts[0], pictures if images else None)
