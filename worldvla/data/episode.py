"""Episode and its file format: LIBERO's own HDF5 (robomimic), one file a task, `<task>_demo.hdf5`.

data/ attrs: problem_info and env_args (JSON), num_demos, total;  data/demo_i attrs: num_samples, init_state;  datasets: actions,
states (simulator), robot_states, rewards, dones, obs/{agentview_rgb, eye_in_hand_rgb, ee_pos, ee_ori, ee_states, gripper_states}.
Ours beside them: is_expert, and attrs init, seed, suite, task. Observation t is the one before action t.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

VIEW_KEYS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
"""Our name of a camera -> LIBERO's dataset under obs/."""


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps. Shapes and units are those of sim/env.py."""

    instruction: str
    suite: str
    task: str
    actions: np.ndarray
    """(T, 7) float32 in [-1, 1], as executed."""
    states: np.ndarray
    """(T, 8) float32: position (m), axis-angle (rad), finger joints (m)."""
    images: dict[str, np.ndarray]
    """view -> (T, Y, X, 3) uint8."""
    sim_states: np.ndarray
    """(T, S) float64."""
    is_expert: np.ndarray
    """(T,) bool. False: a perturbation was executed; context and world-model data, never a policy target."""
    init: int
    seed: int

    def __post_init__(self) -> None:
        length = len(self.actions)
        shapes = {"actions": (self.actions, np.float32, 2), "states": (self.states, np.float32, 2)}
        shapes |= {"sim_states": (self.sim_states, np.float64, 2), "is_expert": (self.is_expert, np.bool_, 1)}
        shapes |= {f"images[{view}]": (images, np.uint8, 4) for view, images in self.images.items()}
        for name, (array, dtype, dims) in shapes.items():
            if array.dtype != dtype or array.ndim != dims or len(array) != length:
                raise ValueError(
                    f"episode of {self.task}: {name} must be {np.dtype(dtype).name} with {dims} dims and {length} steps, "
                    f"got {array.dtype} {array.shape}"
                )

    def __len__(self) -> int:
        return len(self.actions)


def write_episodes(path: Path, episodes: Sequence[Episode], env_args: dict[str, Any]) -> None:
    """Write one task's episodes atomically. `env_args` says what made them (simulator, views, versions)."""
    if not episodes:
        raise ValueError(f"{path}: no episodes to write")
    scratch = path.with_suffix(".tmp")
    with h5py.File(scratch, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": episodes[0].instruction})
        data.attrs["env_args"] = json.dumps(env_args)
        data.attrs["num_demos"] = len(episodes)
        data.attrs["total"] = sum(len(e) for e in episodes)
        for i, episode in enumerate(episodes):
            _write_demo(data.create_group(f"demo_{i}"), episode)
    os.replace(scratch, path)


def _write_demo(group: h5py.Group, episode: Episode) -> None:
    length = len(episode)
    group.attrs.update(
        num_samples=length,
        init_state=episode.sim_states[0],
        init=episode.init,
        seed=episode.seed,
        suite=episode.suite,
        task=episode.task,
        instruction=episode.instruction,
    )
    done = np.zeros(length, dtype=np.uint8)
    done[-1] = 1
    states = episode.states
    columns = {
        "actions": episode.actions.astype(np.float64),
        "states": episode.sim_states,
        "robot_states": states.astype(np.float64),
        "rewards": done,
        "dones": done,
        "is_expert": episode.is_expert,
        "obs/ee_pos": states[:, :3].astype(np.float64),
        "obs/ee_ori": states[:, 3:6].astype(np.float64),
        "obs/ee_states": states[:, :6].astype(np.float64),
        "obs/gripper_states": states[:, 6:].astype(np.float64),
    }
    for name, array in columns.items():
        group.create_dataset(name, data=array)
    for view, images in episode.images.items():
        group.create_dataset(f"obs/{VIEW_KEYS.get(view, view + '_rgb')}", data=images, compression="gzip", compression_opts=1)


def read_episodes(path: Path, images: bool = True) -> Iterator[Episode]:
    """Yield the episodes of a file, ours or a published LIBERO one, in numeric order of their demos.

    A file that is truncated, foreign or incomplete raises a one-line ValueError. `images=False` skips the cameras.
    """
    path = Path(path)
    try:
        file = h5py.File(path)
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file ({error}): truncated, or something else? collect it again") from None
    with file:
        if "data" not in file:
            raise ValueError(f"{path} has no group 'data', it has {sorted(file)}: expected LIBERO's HDF5 layout")
        data = file["data"]
        assert isinstance(data, h5py.Group)
        instruction = _instruction(path, data)
        names = sorted((n for n in data if n.startswith("demo_")), key=lambda n: int(n.removeprefix("demo_")))
        if not names:
            raise ValueError(f"{path} holds no demonstrations (data/demo_0, ...): collect it again")
        for name in names:
            try:
                yield _read_demo(path, data[name], instruction, images)  # pyright: ignore[reportArgumentType]
            except (KeyError, OSError) as error:
                raise ValueError(f"{path}: data/{name} is incomplete ({error}): collect it again") from None


def _instruction(path: Path, data: h5py.Group) -> str:
    try:
        info = json.loads(str(data.attrs["problem_info"]))
        text = info["language_instruction"]
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path}: data has no problem_info with a language_instruction: expected LIBERO's HDF5 layout") from None
    return "".join(text).strip('"') if isinstance(text, list) else str(text)


def _read_demo(path: Path, group: h5py.Group, instruction: str, images: bool) -> Episode:
    obs = group["obs"]
    assert isinstance(obs, h5py.Group)
    actions = group["actions"][()].astype(np.float32)  # pyright: ignore
    states = np.concatenate([obs[k][()] for k in ("ee_pos", "ee_ori", "gripper_states")], axis=1)  # pyright: ignore
    frames = {view: obs[key][()] for view, key in VIEW_KEYS.items() if images and key in obs}  # pyright: ignore
    if images and not frames:
        raise ValueError(f"{path}: {group.name} has no images; expected obs/{' or obs/'.join(VIEW_KEYS.values())}")
    stem = path.stem.removesuffix("_demo")
    return Episode(
        instruction=str(group.attrs.get("instruction", instruction)),
        suite=str(group.attrs.get("suite", path.parent.name)),
        task=str(group.attrs.get("task", stem)),
        actions=actions,
        states=states.astype(np.float32),
        images=frames,
        sim_states=group["states"][()].astype(np.float64),  # pyright: ignore
        is_expert=group["is_expert"][()] if "is_expert" in group else np.ones(len(actions), dtype=np.bool_),  # pyright: ignore
        init=int(group.attrs.get("init", -1)),
        seed=int(group.attrs.get("seed", -1)),
    )
