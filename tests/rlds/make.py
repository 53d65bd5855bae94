"""Write the two data sets beside this file with tensorflow-datasets 4.9's own builder, in an environment of
its own: one in OpenVLA's LIBERO layout (JPEG, two splits), one in RT-1's of Open X-Embodiment (PNG, a dict of
actions). What TFDS reads back is written beside them, expected.npz, to compare with.

Run: python make.py OUT
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]

F = tfds.features
FLAGS = {name: np.bool_ for name in ("is_first", "is_last", "is_terminal")}


def scalar(dtype: Any) -> Any:
    return F.Scalar(dtype=dtype)


def picture(seed: int, t: int) -> np.ndarray:
    base = np.random.default_rng(seed).integers(40, 200, (4, 4, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    base[12:20, t : t + 8] = (220, 30, 30)
    return base


def steps(length: int, seed: int, make: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    flags = [(t == 0, t == length - 1, t == length - 1) for t in range(length)]
    common = [dict(zip(FLAGS, f, strict=True)) | {"reward": float(f[1])} for f in flags]
    return [common[t] | make(rng, t) for t in range(length)]


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    EPISODES: dict[str, list[int]]
    """Split -> length of each episode."""
    STEP: dict[str, Any]

    def _info(self) -> Any:
        step = (
            self.STEP
            | {name: scalar(dtype) for name, dtype in FLAGS.items()}
            | {"reward": scalar(np.float32)}
        )
        features = {"steps": F.Dataset(step), "episode_metadata": {"file_path": F.Text()}}
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return {split: self._episodes(split) for split in self.EPISODES}

    def _generate_examples(self) -> Any:
        raise NotImplementedError

    def _episodes(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for i, length in enumerate(self.EPISODES[split]):
            seed = i + (100 if split == "val" else 0)
            yield (
                f"{split}{i}",
                {
                    "steps": steps(length, seed, lambda rng, t, s=seed: self.step(rng, t, s)),
                    "episode_metadata": {"file_path": f"{split}/{i}.hdf5"},
                },
            )

    def step(self, rng: np.random.Generator, t: int, seed: int) -> dict[str, Any]:
        raise NotImplementedError


class TinyLibero(Tiny):
    EPISODES = {"train": [12, 9], "val": [7]}  # noqa: RUF012
    STEP = {  # noqa: RUF012
        "observation": {
            "image": F.Image(shape=(32, 32, 3), encoding_format="jpeg"),
            "wrist_image": F.Image(shape=(32, 32, 3), encoding_format="jpeg"),
            "state": F.Tensor(shape=(8,), dtype=np.float32),
            "joint_state": F.Tensor(shape=(7,), dtype=np.float32),
        },
        "action": F.Tensor(shape=(7,), dtype=np.float32),
        "discount": scalar(np.float32),
        "language_instruction": F.Text(),
    }

    def step(self, rng: np.random.Generator, t: int, seed: int) -> dict[str, Any]:
        return {
            "observation": {
                "image": picture(seed, t),
                "wrist_image": picture(seed, t)[::-1].copy(),
                "state": rng.normal(size=8).astype(np.float32),
                "joint_state": rng.normal(size=7).astype(np.float32),
            },
            "action": rng.uniform(-1, 1, 7).astype(np.float32),
            "discount": 1.0,
            "language_instruction": f"put the bowl on plate {seed % 2}",
        }


class TinyRt1(Tiny):
    EPISODES = {"train": [6, 8]}  # noqa: RUF012
    STEP = {  # noqa: RUF012
        "observation": {
            "image": F.Image(shape=(None, None, 3), encoding_format="png"),
            "natural_language_instruction": F.Text(),
            "base_pose_tool_reached": F.Tensor(shape=(7,), dtype=np.float32),
            "gripper_closed": F.Tensor(shape=(1,), dtype=np.float32),
        },
        "action": {
            "base_displacement_vector": F.Tensor(shape=(2,), dtype=np.float32),
            "gripper_closedness_action": F.Tensor(shape=(1,), dtype=np.float32),
            "rotation_delta": F.Tensor(shape=(3,), dtype=np.float32),
            "terminate_episode": F.Tensor(shape=(3,), dtype=np.int32),
            "world_vector": F.Tensor(shape=(3,), dtype=np.float32),
        },
    }

    def step(self, rng: np.random.Generator, t: int, seed: int) -> dict[str, Any]:
        return {
            "observation": {
                "image": picture(seed, t),
                "natural_language_instruction": "pick coke can",
                "base_pose_tool_reached": rng.normal(size=7).astype(np.float32),
                "gripper_closed": np.array([t % 2], np.float32),
            },
            "action": {
                "base_displacement_vector": np.zeros(2, np.float32),
                "gripper_closedness_action": np.array([-1.0], np.float32),
                "rotation_delta": rng.normal(size=3).astype(np.float32),
                "terminate_episode": np.array([0, 1, 0], np.int32),
                "world_vector": rng.normal(size=3).astype(np.float32),
            },
        }


def flat(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{name}/{key}")
    else:
        yield name, value


if __name__ == "__main__":
    out = Path(sys.argv[1])
    expected: dict[str, np.ndarray] = {}
    for kind in (TinyLibero, TinyRt1):
        builder = kind(data_dir=str(out))
        builder.download_and_prepare()
        number = 0
        for split in kind.EPISODES:  # in the order of the files, as RLDS users read them
            read = tfds.ReadConfig(interleave_cycle_length=1)
            for episode in tfds.as_numpy(builder.as_dataset(split=split, read_config=read)):
                rows = list(episode["steps"])
                for name, _ in flat(rows[0], f"{builder.name}/{number}"):
                    cells: list[Any] = [dict(flat(row, f"{builder.name}/{number}"))[name] for row in rows]
                    is_text = isinstance(cells[0], bytes)
                    expected[name] = np.array([c.decode() for c in cells] if is_text else cells)
                number += 1
    np.savez_compressed(out / "expected.npz", **expected)  # pyright: ignore[reportArgumentType]
