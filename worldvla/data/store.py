"""TokenStore: every frame's image codes beside actions and states, as memory-mapped arrays in one directory.

codes_<view>.npy   uint16, uint32 or int64 (F, N), row-major codes of a view's grid
actions.npy        float32 (F, A)        states.npy  float32 (F, S)        is_expert.npy  bool (F,)
expert_actions.npy float32 (F, U, A)     where the demonstrations hold the expert's answer to every state
imagined_*.npy     where `worldvla imagine` added them: the codes of each view as a world model imagined the
                   frames, and int64 (F,) the frame that it began from, which is as it was
episodes.json      [{start, length, instruction, suite, task, init, seed, success, key}]
manifest.json      format, digest of the image tokenizer, counts, grids, source files; `kept`, the share of a
                   view's codes that the next frame keeps: the fewer, the less a world model can copy

Observation t is the one before action t. F frames of all episodes follow one another without gaps.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from worldvla.data.episode import Episode, first_bad
from worldvla.files import check_digests, reading, whole_folder, write_digests, write_json, write_text

FORMAT = "worldvla-store-1"
EPISODES = "episodes.json"
"""What a token store has and nothing else here."""
AUGMENTED = "augmented"
"""Key of a manifest's source: the seed by which pictures were changed (data/augment.py)."""
BATCH = 64
"""Frames that are encoded together."""


class FrameTokenizer(Protocol):
    """What a store needs of `tokenizers.image.ImageTokenizer`."""

    @property
    def num_codes(self) -> int: ...
    @property
    def factor(self) -> int: ...
    @property
    def grey_levels(self) -> str: ...
    def encode(self, images: Tensor, /) -> Tensor: ...
    def digest(self) -> str: ...


@dataclass(frozen=True)
class EpisodeRow:
    """One episode: frames start .. start + length - 1 of the store."""

    start: int
    length: int
    instruction: str
    suite: str
    task: str
    init: int
    seed: int
    success: bool
    key: str
    """What the split into training and validation hashes: the same in any store and at any place in it."""


@dataclass(frozen=True)
class ImaginedFrames:
    """The frames of a store as a world model imagined them, from real frames and the actions executed."""

    codes: dict[str, np.ndarray]
    """View -> uint16, uint32 or int64 (F, N)."""
    start: np.ndarray
    """int64 (F,), the real frame from which each was imagined; its own for that frame itself."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return name -> array, as they are called on disk."""
        codes = {f"imagined_codes_{view}": array for view, array in self.codes.items()}
        return codes | {"imagined_start": self.start}


@dataclass(frozen=True)
class TokenStore:
    """An opened store. The arrays are read-only views of the files; nothing is copied until it is indexed."""

    path: Path
    manifest: dict[str, Any]
    episodes: tuple[EpisodeRow, ...]
    codes: dict[str, np.ndarray]
    """View -> uint16, uint32 or int64 (F, N), row-major codes of the view's grid."""
    actions: np.ndarray
    states: np.ndarray
    is_expert: np.ndarray
    expert_actions: np.ndarray | None = None
    """float32 (F, U, A), the expert's next U actions from each frame on; None: not in the demonstrations."""
    imagined: ImaginedFrames | None = None
    """None: no world model has imagined them."""

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """View -> code rows and columns."""
        return {view: (rows, cols) for view, (rows, cols) in self.manifest["grids"].items()}

    @property
    def is_augmented(self) -> bool:
        """Whether its pictures were changed: policies learn from them, no world model does."""
        return AUGMENTED in self.manifest["source"]

    @classmethod
    def open(cls, path: Path, tokenizer_digest: str | None = None) -> "TokenStore":
        """Open and check a store; a damaged or foreign one or another tokenizer's raises ValueError."""
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            raise ValueError(
                f"{path} is no token store (no manifest.json of {FORMAT}): write one with `worldvla tokenize`"
            )
        if tokenizer_digest is not None and manifest["tokenizer"] != tokenizer_digest:
            raise ValueError(
                f"{path} holds codes of tokenizer {manifest['tokenizer']}, this one is {tokenizer_digest}: "
                "run `worldvla tokenize` again"
            )
        check_digests(path)
        with reading(path, "token store", "run `worldvla tokenize` again"):
            return cls._open(path, manifest)

    @classmethod
    def _open(cls, path: Path, manifest: dict[str, Any]) -> "TokenStore":
        num_frames = manifest["frames"]
        codes = {
            view: _load(path, f"codes_{view}", code_type(manifest["num_codes"]), (num_frames, rows * cols))
            for view, (rows, cols) in manifest["grids"].items()
        }
        actions = _load(path, "actions", np.float32, (num_frames, manifest["action_dims"]))
        states = _load(path, "states", np.float32, (num_frames, manifest["state_dims"]))
        is_expert = _load(path, "is_expert", np.bool_, (num_frames,))
        expert_actions = None
        if label := manifest.get("expert_chunk"):
            shape = (num_frames, label, manifest["action_dims"])
            expert_actions = _load(path, "expert_actions", np.float32, shape)
        imagined, every = None, dict(codes)
        if manifest.get("imagined"):
            own = {
                view: _load(path, f"imagined_codes_{view}", a.dtype.type, a.shape)
                for view, a in codes.items()
            }
            imagined = ImaginedFrames(own, _load(path, "imagined_start", np.int64, (num_frames,)))
            every |= {f"imagined_{view}": array for view, array in own.items()}
        rows = json.loads((path / EPISODES).read_text(encoding="utf-8"))
        episodes = tuple(EpisodeRow(**row) for row in rows)
        for view, array in every.items():
            if (highest := int(array.max())) >= manifest["num_codes"]:
                raise ValueError(f"codes_{view}.npy holds {highest}, expected [0, {manifest['num_codes']})")
        for name, array in {"actions": actions, "states": states}.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name}.npy is not finite at frame {first_bad(array)}")
        stops = [e.start + e.length for e in episodes]
        if [e.start for e in episodes] != [0, *stops[:-1]] or stops[-1:] != [num_frames]:
            raise ValueError(f"episodes.json does not cover the {num_frames} frames")
        if imagined is not None:
            first_F = np.repeat([e.start for e in episodes], [e.length for e in episodes])
            frames_F = np.arange(num_frames)
            if ((imagined.start < first_F) | (imagined.start > frames_F)).any():
                raise ValueError("imagined_start.npy leaves its episode or lies ahead of its frame")
        return cls(path, manifest, episodes, codes, actions, states, is_expert, expert_actions, imagined)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete store at `path`, None where there is none."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _load(path: Path, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    file = path / f"{name}.npy"
    with reading(file, "array", "run `worldvla tokenize` again"):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.dtype != dtype or array.shape != shape:
            wanted = f"{np.dtype(dtype)} {shape} by the manifest"
            raise ValueError(f"it must be {wanted}, got {array.dtype} {array.shape}")
    return np.asarray(array)  # drops the memmap subclass, whose indexing is slow; the pages stay mapped


def write_store(
    path: Path,
    episodes: Iterable[Episode],
    tokenizer: FrameTokenizer,
    *,
    source: dict[str, Any] | None = None,
    on_episode: Callable[[Episode], None] = lambda _: None,
) -> Path:
    """Encode every frame of every view once and write the store; it appears at `path` complete or not at all.

    The views are those of the first episode. `source` goes into the manifest.
    """
    path = Path(path)
    with whole_folder(path, EPISODES) as scratch, ExitStack() as stack:
        writer = _Writer(scratch, stack, tokenizer)
        for episode in episodes:
            writer.add(episode)
            on_episode(episode)
        made_by = {"tokenizer": tokenizer.digest(), "num_codes": tokenizer.num_codes}
        writer.finish(made_by | {"grey_levels": tokenizer.grey_levels}, source or {})
        stack.close()
        write_digests(scratch)
    return path


def write_imagined(
    folder: Path, store: TokenStore, imagined: ImaginedFrames, made_by: dict[str, Any]
) -> None:
    """Write a copy of `store` that also holds `imagined` into an empty folder (`files.whole_folder`);
    `made_by` goes into its manifest."""
    for file in (store.path / EPISODES, *store.path.glob("*.npy")):
        if not file.name.startswith("imagined_"):
            shutil.copyfile(file, folder / file.name)
    for name, array in imagined.arrays().items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    write_json(folder / "manifest.json", store.manifest | {"imagined": made_by}, indent=2)
    write_digests(folder)


def encode(images: np.ndarray, tokenizer: FrameTokenizer) -> np.ndarray:
    """Return the codes (T, R, Q) of frames (T, Y, X, 3) uint8, in `code_type`."""
    parts = []
    with torch.inference_mode():
        for i in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(images[i : i + BATCH]))
            parts.append(tokenizer.encode(batch).numpy())
    codes = np.concatenate(parts)
    if codes.min() < 0 or codes.max() >= tokenizer.num_codes:
        raise ValueError(
            f"the tokenizer gave codes {codes.min()}..{codes.max()}, expected [0, {tokenizer.num_codes})"
        )
    return codes.astype(code_type(tokenizer.num_codes))


def code_type(num_codes: int) -> type[np.generic]:
    """Return the type in which a store keeps codes: uint16, of more than 2^16 codes uint32, of more than 2^32
    int64."""
    return np.uint16 if num_codes <= 2**16 else np.uint32 if num_codes <= 2**32 else np.int64


class _Writer:
    """The files of a store being written, episode after episode."""

    def __init__(self, directory: Path, stack: ExitStack, tokenizer: FrameTokenizer) -> None:
        self.directory, self.stack, self.tokenizer = directory, stack, tokenizer
        self.views: list[str] | None = None
        self.columns: dict[str, _Column] = {}
        self.grids: dict[str, tuple[int, ...]] = {}
        self.rows: list[EpisodeRow] = []
        self.num_frames = 0
        self.kept: dict[str, list[np.ndarray]] = {}

    def add(self, episode: Episode) -> None:
        self.views = list(episode.images) if self.views is None else self.views
        if set(self.views) != set(episode.images):
            raise ValueError(
                f"episode of {episode.task!r} has the views {list(episode.images)}, those before it "
                f"{self.views}: tokenize files of other cameras into a store of their own"
            )
        for view in self.views:
            codes = encode(episode.images[view], self.tokenizer)
            grid = self.grids.setdefault(view, codes.shape[1:])
            if grid != codes.shape[1:]:
                raise ValueError(f"view {view} changes grid from {grid} to {codes.shape[1:]}: use one size")
            self._append(f"codes_{view}", codes.reshape(len(codes), -1))
            self.kept.setdefault(view, []).append((codes[1:] == codes[:-1]).ravel())
        names = ("actions", "states", "is_expert")
        if episode.expert_actions is not None:
            names += ("expert_actions",)
        if self.rows and set(names) != set(self.columns) - {f"codes_{view}" for view in self.views}:
            raise ValueError(
                f"an episode of {episode.task!r} has {names}, those before it {sorted(self.columns)}: "
                "tokenize demonstrations with and without the expert's labels into stores of their own"
            )
        for name in names:
            self._append(name, getattr(episode, name))
        length, told = len(episode.actions), (episode.instruction, episode.suite, episode.task)
        self.rows.append(
            EpisodeRow(
                self.num_frames,
                length,
                *told,
                int(episode.init),
                int(episode.seed),
                episode.success,
                _key(episode),
            )
        )
        self.num_frames += length

    def finish(self, tokenizer: dict[str, Any], source: dict[str, Any]) -> None:
        if not self.rows:
            raise ValueError("there are no episodes to tokenize: collect some first")
        for column in self.columns.values():
            column.finish()
        kept = {view: np.concatenate(same) for view, same in self.kept.items()}
        episodes = ",\n".join(json.dumps(asdict(row)) for row in self.rows)
        write_text(self.directory / EPISODES, f"[\n{episodes}\n]\n")
        manifest = {
            "format": FORMAT,
            **tokenizer,
            "frames": self.num_frames,
            "episodes": len(self.rows),
            "action_dims": self.columns["actions"].shape[0],
            "state_dims": self.columns["states"].shape[0],
            "expert_chunk": self.columns["expert_actions"].shape[0]
            if "expert_actions" in self.columns
            else 0,
            "grids": self.grids,
            "kept": {view: round(float(same.mean()), 4) for view, same in kept.items() if same.size},
            "source": source,
        }
        write_json(self.directory / "manifest.json", manifest, indent=2)

    def _append(self, name: str, array: np.ndarray) -> None:
        if name not in self.columns:
            file = self.stack.enter_context((self.directory / f"{name}.npy").open("wb"))
            self.columns[name] = _Column(name, file, array)
        self.columns[name].append(array)


def _key(episode: Episode) -> str:
    """Return what an episode is: ours by where it started, so that all that starts there stays together;
    others' by their content."""
    ours = f"{episode.init}/{episode.seed}"
    content = hashlib.sha256(episode.states.tobytes() + episode.actions.tobytes()).hexdigest()[:16]
    return f"{episode.suite}/{episode.task}/{ours if episode.init >= 0 else content}"


class _Column:
    """A .npy file that grows along its first axis: numpy's header leaves room for the final count."""

    def __init__(self, name: str, file: BinaryIO, first: np.ndarray) -> None:
        self.name, self.file = name, file
        self.dtype, self.shape, self.count = first.dtype, first.shape[1:], 0
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        if array.dtype != self.dtype or array.shape[1:] != self.shape:
            expected, got = f"{self.dtype} (T, *{self.shape})", f"{array.dtype} {array.shape}"
            raise ValueError(f"{self.name} must be {expected} in every episode, got {got}")
        self.file.write(np.ascontiguousarray(array).tobytes())
        self.count += len(array)

    def finish(self) -> None:
        """Write the final count; the file stays open."""
        self.file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.count, *self.shape)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)
