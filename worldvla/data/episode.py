"""Episode and its file format: LIBERO's own HDF5 (robomimic), one file a task, `<task>_demo.hdf5`.

data/ attrs: problem_info and env_args (JSON), num_demos, total.  data/demo_i attrs: num_samples, init_state;
datasets: actions, states (of the simulator), robot_states, rewards, dones, obs/{agentview_rgb,
eye_in_hand_rgb, ee_pos, ee_ori, ee_states, gripper_states}.  Ours beside them: is_expert, and attrs init,
seed, suite, task, instruction. Observation t is the one before action t, row 0 of a picture is its top.

Files that others made differ from that, without saying so. `read_episodes` knows the two kinds that exist:
- made by LIBERO's scripts/create_dataset.py: pictures upside down, observation t is the one *after* action t;
- replayed by OpenVLA's and WorldVLA's regenerate_libero_dataset*.py: pictures upside down, observation before
  action, no attributes at all.
"""

import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from worldvla.files import DamagedFileError, reading, sha256, whole_file
from worldvla.sim.protocol import FPS, NUM_ACTION_DIMS, NUM_STATE_DIMS
from worldvla.sim.suites import SUITES

VIEW_KEYS = {"agentview": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
"""Our name of a camera -> LIBERO's dataset under obs/; any other camera is VIEW_rgb there."""
SUFFIXES = (".hdf5", ".h5")
CHUNK = 16
"""Frames compressed together. Fewer make the files larger and slower to read."""
MAX_BYTES = 2**32
"""Bytes of a dataset, at most: an episode of 10,000 steps with pictures of 256 x 256 pixels has half."""
MAX_COMPRESSION = 1100
"""Bytes that one byte in the file can stand for, at most; deflate's limit is 1032."""
MAX_LINKS = 16
"""Links within the file that lead to one thing, at most."""
OPTIONAL = ("expert_actions", "contact", "moving")
"""Datasets that some episodes have."""
_STATE_KEYS = {"obs/ee_pos": 3, "obs/ee_ori": 3, "obs/gripper_states": 2}
"""The parts of the state vector and their sizes."""


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps. Units are those of sim/protocol.py."""

    instruction: str
    suite: str
    task: str
    actions: np.ndarray
    """(T, A) float32, as executed; of our simulators A = 7, in [-1, 1]."""
    states: np.ndarray
    """(T, S) float32; of our simulators S = 8: position (m), axis-angle (rad), finger joints (m)."""
    images: dict[str, np.ndarray]
    """view -> (T, Y, X, 3) uint8. Empty when read without images."""
    sim_states: np.ndarray
    """(T, any) float64: the simulator before each action; of a real robot (T, 0)."""
    is_expert: np.ndarray
    """(T,) bool. False: a perturbation was executed; context and world-model data, never a policy target."""
    init: int
    """Index of the initial state; -1: unknown."""
    seed: int
    """Seed of the collection; -1: unknown."""
    expert_actions: np.ndarray | None = None
    """(T, U, A) float32: what the expert does in the U steps from each visited state on, whoever drove. None:
    not asked."""
    success: bool = True
    """Whether the task was done at some step."""
    contact: np.ndarray | None = None
    """(T,) bool: the hand touches a thing after the step. None: not noted."""
    moving: np.ndarray | None = None
    """(T,) bool: a thing moves by a millimetre or more in the step. None: not noted."""

    def __post_init__(self) -> None:
        length = len(self.actions)
        if not length:
            raise ValueError(f"episode of {self.task} has no steps")
        shapes: dict[str, tuple[np.ndarray, Any, tuple[int | None, ...]]] = {
            "actions": (self.actions, np.float32, (length, None)),
            "states": (self.states, np.float32, (length, None)),
            "sim_states": (self.sim_states, np.float64, (length, None)),
            "is_expert": (self.is_expert, np.bool_, (length,)),
        }
        if self.expert_actions is not None:
            shapes["expert_actions"] = (
                self.expert_actions,
                np.float32,
                (length, None, self.actions.shape[-1]),
            )
        flags = {"contact": self.contact, "moving": self.moving}
        shapes |= {name: (array, np.bool_, (length,)) for name, array in flags.items() if array is not None}
        shapes |= {f"images[{v}]": (a, np.uint8, (length, None, None, 3)) for v, a in self.images.items()}
        for name, (array, dtype, shape) in shapes.items():
            fits = array.ndim == len(shape) and all(
                s in (None, n) for s, n in zip(shape, array.shape, strict=True)
            )
            if array.dtype != dtype or not fits or (name.startswith("images") and not array.size):
                wanted = " x ".join("any" if s is None else str(s) for s in shape)
                raise ValueError(
                    f"episode of {self.task}: {name} must be {np.dtype(dtype).name} {wanted}, "
                    f"got {array.dtype} {' x '.join(map(str, array.shape))}"
                )
            if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
                raise ValueError(f"episode of {self.task}: {name} is not finite at step {first_bad(array)}")

    def __len__(self) -> int:
        return len(self.actions)


def _check_dims(episode: Episode) -> Episode:
    """Return the episode if it has the sizes of LIBERO's layout, which are those of our simulators."""
    sizes = {"actions": (episode.actions, NUM_ACTION_DIMS), "states": (episode.states, NUM_STATE_DIMS)}
    for name, (array, dims) in sizes.items():
        if array.shape[1] != dims:
            shape = " x ".join(map(str, array.shape))
            wanted = f"{name} must be float32 {len(array)} x {dims}"
            raise ValueError(
                f"episode of {episode.task}: {wanted}, got float32 {shape}: LIBERO's HDF5 layout"
            )
    return episode


def first_bad(array: np.ndarray) -> int:
    return int(np.argwhere(~np.isfinite(array))[0, 0])


class _Disk(io.FileIO):
    """A file for HDF5 to write, which ends in a segmentation fault when a write fails; so it is not told."""

    failure: OSError | None = None
    """The first failed write; nothing is written after it."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.failure is None and done < len(view):
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.failure = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


def write_episodes(path: Path, episodes: Iterable[Episode], env_args: dict[str, Any]) -> None:
    """Write one task's episodes atomically, one in memory at a time. `env_args` says what made them."""
    with whole_file(path) as scratch, _Disk(scratch, "w+") as disk:
        with h5py.File(disk, "w") as file:
            data = file.create_group("data")
            count, total, instruction, flags = 0, 0, "", Counter()
            for count, episode in enumerate(episodes, start=1):
                _write_demo(data.create_group(f"demo_{count - 1}"), episode)
                total += len(episode)
                instruction = episode.instruction
                flags += _count_flags(episode)
                if disk.failure:
                    break
            data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
            data.attrs["env_args"] = json.dumps(env_args)
            data.attrs["num_demos"] = count
            data.attrs["sha256"] = _digest([f"demo_{i}" for i in range(count)])
            data.attrs["total"] = total
            data.attrs.update(flags)
        if disk.failure:
            raise OSError(disk.failure.errno, disk.failure.strerror)
        if not count:
            raise ValueError(f"{path}: no episodes to write")


def _count_flags(episode: Episode) -> Counter[str]:
    """Return in how many frames the hand touches a thing, things move, the episode fails; {} if not noted."""
    if episode.contact is None or episode.moving is None:
        return Counter()
    counts = {"contact": int(episode.contact.sum()), "moving": int(episode.moving.sum())}
    return Counter(counts | {"failure": 0 if episode.success else len(episode)})


def _write_demo(group: h5py.Group, episode: Episode) -> None:
    _check_dims(episode)
    length = len(episode)
    group.attrs.update(
        num_samples=length,
        init_state=episode.sim_states[0],
        init=episode.init,
        seed=episode.seed,
        suite=episode.suite,
        task=episode.task,
        instruction=episode.instruction,
        success=episode.success,
    )
    done = np.zeros(length, dtype=np.uint8)
    done[-1] = 1
    states = episode.states.astype(np.float64)  # LIBERO's type
    columns = {
        "actions": episode.actions.astype(np.float64),
        "states": episode.sim_states,
        "robot_states": states,
        "rewards": done * np.uint8(episode.success),
        "dones": done,
        "is_expert": episode.is_expert,
        "obs/ee_pos": states[:, :3],
        "obs/ee_ori": states[:, 3:6],
        "obs/ee_states": states[:, :6],
        "obs/gripper_states": states[:, 6:],
    }
    columns |= {n: a for n in OPTIONAL if (a := getattr(episode, n)) is not None}
    for name, array in columns.items():
        group.create_dataset(name, data=array)
    for view, images in episode.images.items():
        name = f"obs/{view_key(view)}"
        chunks = (min(length, CHUNK), *images.shape[1:])
        group.create_dataset(name, data=images, chunks=chunks, compression="gzip", compression_opts=1)
        columns[name] = images
    digests = {name: _digest(array) for name, array in columns.items()}
    digests[""] = _digest(_facts(group, {"instruction": "", "suite": "", "task": ""}))
    group.attrs["sha256"] = json.dumps(digests)


def read_episodes(path: Path, images: bool = True) -> Iterator[Episode]:
    """Yield the episodes of a file, ours or a published LIBERO one, in numeric order of their demos.

    Whatever the file, observation t is the one before action t and pictures are upright. A file that is
    truncated, foreign or incomplete raises a one-line ValueError. `images=False` skips the cameras.
    """
    for _, episode in read_demos(path, images):
        if isinstance(episode, DamagedFileError):
            raise episode
        yield episode


def read_demos(path: Path, images: bool = True) -> Iterator[tuple[str, Episode | DamagedFileError]]:
    """Yield name and episode of every demo, as `read_episodes` does; of a damaged one what is wrong."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no {path}: expected an HDF5 file of demonstrations")
    with reading(path, "HDF5 file; is it truncated?"):
        file = h5py.File(path)
    with file:
        with reading(path, "file in LIBERO's layout"):
            data = _at(file, "data")
            if not isinstance(data, h5py.Group):
                raise ValueError(f"it has no group 'data', only {sorted(file)[:10]}")
            names = _demos(data)
            names.sort(key=lambda name: int(name.removeprefix("demo_")))
            if not names:
                raise ValueError("it holds no demonstrations (data/demo_0, ...)")
            if data.attrs.get("sha256", _digest(names)) != _digest(names):
                raise ValueError(f"of its {data.attrs['num_demos']} demonstrations {len(names)} are there")
            told = _provenance(path, data)
        for name in names:
            try:
                with reading(f"{path}: data/{name}", "demonstration"), np.errstate(over="ignore"):
                    demo = _at(data, name)
                    if ("sha256" in demo.attrs) != ("sha256" in data.attrs):
                        raise ValueError("the digests of the file or of the demonstration are lost")
                    episode = _read_demo(demo, told, images)
            except DamagedFileError as damaged:
                episode = damaged
            yield name, episode


def count_episodes(path: Path) -> int:
    """Return the number of episodes in a file without reading them."""
    with reading(path, "robomimic file"), h5py.File(path) as file:
        return len(_demos(_at(file, "data")))


def _demos(data: Any) -> list[str]:
    return [str(name) for name in data if re.fullmatch(r"demo_\d+", str(name))]


def control_rate(path: Path) -> float | None:
    """Return steps a second, by robomimic's attribute env_args or the suite's simulator; None: unknown."""
    with suppress(DamagedFileError, OSError), reading(path, "robomimic file"), h5py.File(path) as file:
        args = json.loads(_text(_at(file, "data"), "env_args", "{}"))
        if 0 < (rate := float(args["env_kwargs"]["control_freq"])) < math.inf:
            return rate
    with suppress(DamagedFileError):
        suites = (e.suite for _, e in read_demos(path, images=False) if isinstance(e, Episode))
        if suite := SUITES.get(next(suites, "")):
            return FPS[suite.simulator]
    return None


def facts(path: Path) -> dict[str, Any]:
    """Return the `env_args` that a file of ours was written with, its num_demos and its total of steps; of
    world data also `shares`: of the frames with contact, with a moving thing, of an episode that fails."""
    with reading(path, "file of ours"), h5py.File(path) as file:
        attrs: Any = file["data"].attrs
        counts: dict[str, Any] = {name: int(attrs[name]) for name in ("num_demos", "total")}
        noted = {name: int(attrs[name]) for name in ("contact", "moving", "failure") if name in attrs}
        counts |= {"shares": {name: n / counts["total"] for name, n in noted.items()}} if noted else {}
        return {**json.loads(attrs["env_args"]), **counts}


def fingerprint(path: Path) -> dict[str, str | int]:
    """Return name, bytes and the start of the SHA-256 of a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)[:16]}


def demonstration_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and the HDF5 files of the directories among them, sorted in each.

    What lies in a hidden folder is not taken: parts of a collection that was stopped.
    """
    files: list[Path] = []
    if not paths:
        raise ValueError("no demonstrations given: expected HDF5 files or directories of them")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"no {path}: expected an HDF5 file or a directory of them (`worldvla collect` makes one), or "
                "a data set on the hub as ORG/NAME@REVISION"
            )
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and _is_shown(p, path))
        if path.is_dir() and not inside:
            raise FileNotFoundError(f"{path} holds no *.hdf5 or *.h5 files; `worldvla collect` makes them")
        files += inside if path.is_dir() else [path]
    counts = Counter(path.resolve() for path in files)
    if twice := [str(path) for path, times in counts.items() if times > 1]:
        raise ValueError(f"{twice[0]} is given {counts[Path(twice[0])]} times: give every file once")
    return files


def _is_shown(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _provenance(path: Path, data: h5py.Group) -> dict[str, str]:
    """Return instruction, suite and task from a file's attributes or, without them, its name and folder."""
    task = path.stem.removesuffix("_demo")
    suite = next((s for s in SUITES if path.parent.name.startswith(s)), path.parent.name)
    if "bddl_file_name" in data.attrs:
        bddl = Path(_text(data, "bddl_file_name"))
        suite, task = bddl.parent.name, bddl.stem
    instruction = re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")
    if "problem_info" in data.attrs:
        with reading(f"{path}: attribute problem_info of data", "JSON with a language_instruction"):
            told = json.loads(_text(data, "problem_info"))["language_instruction"]
            instruction = "".join(told).strip('"')  # LIBERO's are quoted, and some are lists of letters
    return {"instruction": instruction, "suite": suite, "task": task}


def _at(group: Any, name: str, most: int = MAX_LINKS) -> Any:
    """Return what stands at `name` below `group`, None for nothing. What another file holds is refused, and
    more than `most` links in a row."""
    for part in name.split("/"):
        links = group.id.links if isinstance(group, h5py.Group) else None
        if links is None or not part or not links.exists(part.encode()):
            return None
        kind = links.get_info(part.encode()).type
        if kind == h5py.h5l.TYPE_SOFT:  # pyright: ignore[reportAttributeAccessIssue]
            if not most:
                raise ValueError(f"{name} is a link to links without end: expected the data themselves")
            target = links.get_val(part.encode()).decode()
            group = _at(group.file if target.startswith("/") else group, target.strip("/"), most - 1)
        elif kind == h5py.h5l.TYPE_HARD:  # pyright: ignore[reportAttributeAccessIssue]
            group = group[part]
        else:
            raise ValueError(f"{name} is a link to another file: expected the data themselves")
    return group


def _text(group: h5py.Group, name: str, default: str = "") -> str:
    """Return an attribute that is a text; some writers store its bytes."""
    value: Any = group.attrs.get(name, default)
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise ValueError(f"attribute {name} is {type(value).__name__}, expected a text")
    return text


def _array(group: h5py.Group, name: str) -> np.ndarray:
    """Read a dataset that is in the file itself and about as large as it says it is."""
    dataset = _at(group, name)
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} is no dataset of this file: expected the data themselves")
    stored = min(dataset.id.get_storage_size(), Path(group.file.filename).stat().st_size)
    if dataset.nbytes > min(MAX_BYTES, MAX_COMPRESSION * stored):
        raise ValueError(
            f"{name} of shape {dataset.shape} takes {dataset.nbytes / 1e9:.3g} GB, {stored} bytes are stored "
            f"of it: expected at most {MAX_BYTES / 1e9:.1f} GB, and them in the file"
        )
    if dataset.dtype.kind not in "fiub":
        raise ValueError(f"{name} holds {dataset.dtype}, expected real numbers")
    array = np.asarray(dataset)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name.removeprefix('obs/')} is not finite at step {first_bad(array)}")
    return array


def _digest(*parts: Any) -> str:
    """Return the start of the SHA-256 of arrays, with their types and shapes, and JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def cameras(demo: Any) -> dict[str, str]:
    """Return view -> dataset under obs/ of the cameras of a demonstration, LIBERO's two first."""
    obs = _at(demo, "obs")
    names = {str(name) for name in obs} if isinstance(obs, h5py.Group) else set()
    views = {view: key for view, key in VIEW_KEYS.items() if key in names}
    for key in sorted(names - set(VIEW_KEYS.values())):
        if view := re.fullmatch(r"(.+)_rgb", key):
            views[key if view[1] in VIEW_KEYS else view[1]] = key
    return views


def view_key(view: str) -> str:
    """Return the dataset under obs/ of a camera."""
    return VIEW_KEYS.get(view, view if view.removesuffix("_rgb") in VIEW_KEYS else f"{view}_rgb")


def unused_pictures(files: Iterable[Path]) -> list[str]:
    """Return the pictures of each file's first demonstration that no view shows, such as obs/front_depth.

    A damaged file is passed over: reading its demonstrations says what is wrong with it.
    """
    names: set[str] = set()
    for path in files:
        with suppress(DamagedFileError, OSError), reading(path, "HDF5 file"), h5py.File(path) as file:
            data: Any = _at(file, "data")
            obs = _at(demo := _at(data, next(iter(data))), "obs")
            rest = set(map(str, obs)) - set(cameras(demo).values())
            sets = {name: _at(obs, name) for name in rest}
            names |= {f"obs/{n}" for n, s in sets.items() if isinstance(s, h5py.Dataset) and s.ndim > 2}
    return sorted(names)


def _read_demo(group: h5py.Group, told: dict[str, str], images: bool) -> Episode:
    if not isinstance(group, h5py.Group):
        raise ValueError("no group")
    views = {view: f"obs/{key}" for view, key in cameras(group).items() if images}
    wanted = ["actions", "states", *_STATE_KEYS, *views.values()]
    wanted += [name for name in ("is_expert", *OPTIONAL) if _at(group, name)]
    digests: dict[str, str] = json.loads(group.attrs.get("sha256", "{}"))
    written = digests.keys() - set(wanted) - {""}
    wanted += [name for name in written if images or not re.fullmatch(r"obs/.+_rgb", name)]
    if missing := [name for name in wanted if _at(group, name) is None]:
        raise ValueError(f"missing {missing}; expected LIBERO's HDF5 layout")
    if images and not views:
        raise ValueError(f"no pictures; expected obs/{' or obs/'.join(VIEW_KEYS.values())}, or obs/VIEW_rgb")
    read = {name: _array(group, name) for name in wanted}
    if changed := [name for name in read if name in digests and digests[name] != _digest(read[name])]:
        raise ValueError(f"{', '.join(changed)} not as they were written (SHA-256)")
    lengths = {name: len(array) for name, array in read.items() if array.ndim}
    if len(lengths) < len(read) or len(set(lengths.values())) > 1:
        raise ValueError(f"datasets of different lengths: {lengths}")
    facts = _facts(group, told)
    if digests and digests.get("") != _digest(facts):
        raise ValueError("attributes not as they were written (SHA-256)")
    ours = bool(digests) or "suite" in group.attrs
    after = not ours and "init_state" in group.attrs  # only create_dataset.py writes it
    acts, sees = (slice(1, None), slice(None, -1)) if after else (slice(None), slice(None))
    is_expert = read.get("is_expert", np.ones(lengths["actions"], dtype=np.bool_))
    frames = {view: read[name][sees] for view, name in views.items()}
    del facts["demo"]
    episode = Episode(
        **facts,  # pyright: ignore[reportArgumentType]
        actions=read["actions"][acts].astype(np.float32),
        states=np.concatenate([read[name][sees] for name in _STATE_KEYS], axis=1).astype(np.float32),
        images=frames if ours else {view: a[:, ::-1, ::-1].copy() for view, a in frames.items()},
        sim_states=read["states"][acts].astype(np.float64),
        is_expert=is_expert[acts],
        **{name: read[name][acts] for name in OPTIONAL if name in read},
    )
    return _check_dims(episode)


def _facts(group: h5py.Group, told: dict[str, str]) -> dict[str, Any]:
    """Return what the attributes of a demo say of it; what they leave out, `told` does."""
    texts = {name: _text(group, name, text) for name, text in told.items()}
    numbers = {name: int(group.attrs.get(name, -1)) for name in ("init", "seed")}
    success = bool(group.attrs.get("success", True))
    return {"demo": str(group.name).rpartition("/")[2], **texts, **numbers, "success": success}
