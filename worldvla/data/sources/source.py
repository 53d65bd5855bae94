"""Source: the episodes of a data set of any format, one in memory at a time, and what it says of itself."""

import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from worldvla.data.episode import Episode
from worldvla.files import DamagedFileError, one_line, reading
from worldvla.image import resize_with_pad
from worldvla.published.hub import origin
from worldvla.robot import delta_dims

WRIST = ("wrist", "hand", "gripper")
"""What the name of a camera that moves with the hand contains."""


@dataclass(frozen=True)
class Names:
    """Which features of a data set become an Episode's views, actions and states; empty: a guess."""

    cameras: Mapping[str, str] = field(default_factory=dict)
    """View -> feature."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """View -> rows, columns in pixels that its frames are resized to, as by `worldvla serve --resize`."""
    action: str = ""
    """A feature, or several with commas between."""
    state: str = ""
    delta: bool = False
    """Actions are targets: make each the difference to the state at its step."""


@dataclass(frozen=True)
class Camera:
    """A view, size in pixels."""

    feature: str
    rows: int
    cols: int
    stored: tuple[int, int] = (0, 0)
    """Rows and columns in the data set, where frames are resized."""


@dataclass(frozen=True)
class Vector:
    """Actions or states: the numbers of one feature of the data set, or of several, one after another."""

    features: tuple[str, ...]
    names: tuple[str, ...]
    """Of each number."""
    units: str = ""
    """In the words of the data set; empty: it does not say."""

    def __str__(self) -> str:
        return ",".join(self.features)


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    path: Path
    kind: str
    """Format and version, such as LeRobotDataset v3.0."""
    num_episodes: int
    fps: float | None
    """Steps a second; None: the data set does not say."""
    cameras: dict[str, Camera]
    action: Vector
    state: Vector
    guesses: tuple[str, ...]
    """What was not asked for by name but chosen, as the options that would ask for it."""
    files: tuple[Path, ...]
    """What the data are read from."""
    attempts: Callable[[bool], Iterator[tuple[str, Episode | ValueError]]]
    """Read, with images or without, episode after episode: its name, and itself or what is wrong with it."""
    delta: tuple[str, ...] = ()
    """Names of the action dims that are differences to the state at their step, where files hold targets."""
    unused: tuple[str, ...] = ()
    """Its pictures, such as depth, that no view shows."""
    repo: str = ""
    """ORG/NAME of a download from the hub, otherwise empty."""
    revision: str = ""
    """Its commit."""

    def episodes(self, images: bool = True) -> Iterator[Episode]:
        """Yield the episodes; the first broken one raises ValueError, which names it and the frame."""
        for _, episode in self.attempts(images):
            if isinstance(episode, ValueError):
                raise episode
            yield episode

    def at(self, fps: float) -> "Source":
        """Return the same data with `fps` steps a second, if they do not say how many; 0: unknown as before.
        Another number than theirs raises ValueError."""
        if not 0 <= fps < math.inf:
            raise ValueError(f"--fps {fps:g}: expected steps per second, above 0")
        if fps and self.fps and fps != self.fps:
            own = f"{self.path} has {self.fps:g} steps per second"
            raise ValueError(f"--fps {fps:g}: {own}: leave --fps out")
        return replace(self, fps=self.fps or fps or None)

    def sound(self) -> "Source":
        """Return the same data without the broken episodes; each is told once, on stderr."""
        told: set[str] = set()

        def attempts(_images: bool) -> Iterator[tuple[str, Episode | ValueError]]:
            for name, episode in self.attempts(True):  # some faults are in the pictures
                if not isinstance(episode, ValueError):
                    yield name, episode
                elif name not in told:
                    told.add(name)
                    sys.stderr.write(f"left out: {episode}\n")

        return replace(self, attempts=attempts)

    def present(self) -> list[Path]:
        """Return the files that are there: an episode whose file is missing is broken, not the data set."""
        return [file for file in self.files if file.is_file()]

    def facts(self) -> dict[str, Any]:
        """Return what a store's manifest tells of the data."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in ("kind", "fps", "repo", "revision")}
        facts |= {"action": str(self.action), "state": str(self.state)}
        facts |= {"action_names": list(self.action.names), "state_names": list(self.state.names)}
        facts |= {"delta": list(self.delta), "guesses": list(self.guesses)}
        cameras = {view: asdict(camera) for view, camera in self.cameras.items()}
        return facts | {"cameras": {v: c | {"stored": list(c["stored"])} for v, c in cameras.items()}}


def attempt(path: Path, name: str, read: Callable[[], Episode]) -> tuple[str, Episode | ValueError]:
    """Return the name of an episode of `path`, and it or what is wrong with it, in one line."""
    try:
        with reading(f"{path}: {name}", "episode", "download it again"):
            try:
                return name, read()
            except ValueError as error:
                raise DamagedFileError(f"{path}: {name}: {one_line(error)}") from None
    except DamagedFileError as damaged:
        return name, damaged


@dataclass(frozen=True)
class Plan:
    """How the features of a data set of other people's become Episodes."""

    suite: str
    cameras: dict[str, Camera]
    action: Vector
    state: Vector
    delta: dict[int, int]
    """Action dim -> state dim that is subtracted from it."""
    guesses: tuple[str, ...]
    unused: tuple[str, ...]
    """Pictures that no view shows."""

    @classmethod
    def of(
        cls,
        suite: str,
        names: Names,
        pictures: Mapping[str, tuple[int, int]],
        numbers: Mapping[str, tuple[str, ...]],
        usual: tuple[str, str],
        others: Iterable[str] = (),
        units: Mapping[str, str] | None = None,
    ) -> "Plan":
        """Choose among `pictures` (feature -> rows, columns) and `numbers` (feature -> names of its numbers).

        `usual`: the features that actions and states are read from where nothing else is asked for. `others`:
        pictures that are not of three channels. `units`: feature -> what the data set says of its numbers.
        """
        views, guesses = _choose_cameras(list(pictures), names.cameras)
        action, guess = _choose(numbers, names.action, usual[0], "action")
        state, other = _choose(numbers, names.state, usual[1], "state")
        guesses += guess + other
        texts = {f: text for f, text in (units or {}).items() if text}
        action, state = (
            replace(v, units="; ".join(texts[f] for f in v.features if f in texts)) for v in (action, state)
        )
        delta = _delta_dims(action, state) if names.delta else {}
        if names.delta:
            guesses.append(
                "--delta: the state is subtracted from " + ", ".join(action.names[i] for i in delta)
            )
        if unknown := sorted(set(names.sizes) - set(views)):
            raise ValueError(f"no view {unknown[0]!r} to resize: the views are {', '.join(views)}")
        cameras = {v: Camera(n, *pictures[n]) for v, n in views.items()}
        cameras |= {v: Camera(views[v], *size, pictures[views[v]]) for v, size in names.sizes.items()}
        unused = [name for name in (*pictures, *others) if name not in views.values()]
        return cls(suite, cameras, action, state, delta, tuple(guesses), tuple(unused))

    @property
    def features(self) -> list[str]:
        """The numeric features that are read."""
        return [*self.action.features, *self.state.features]

    def episode(
        self,
        columns: Mapping[str, np.ndarray],
        instruction: str,
        pictures: Callable[[str], np.ndarray] | None,
    ) -> Episode:
        """Return an Episode of `columns`, feature -> float32 (T, n); what is wrong raises ValueError.

        `pictures` returns the frames of a view, uint8 (T, Y, X, 3); it is asked last, since it costs most.
        """
        for name in self.features:
            for frame in np.flatnonzero(~np.isfinite(columns[name]).all(1)):
                raise ValueError(f"frame {frame}: {name} is not finite")
        actions, states = (
            np.concatenate([columns[name] for name in v.features], 1) for v in (self.action, self.state)
        )
        if len(actions) < 2:
            raise ValueError("it has one step (frame 0), so no action's effect is seen: remove the episode")
        dims = list(self.delta)
        actions[:, dims] -= states[:, [self.delta[i] for i in dims]]
        return Episode(
            instruction=instruction,
            suite=self.suite,
            task="_".join(instruction.lower().split()),
            actions=actions,
            states=states,
            images={view: pictures(view) for view in self.cameras} if pictures else {},
            sim_states=np.zeros((len(actions), 0)),
            is_expert=np.ones(len(actions), dtype=np.bool_),
            init=-1,
            seed=-1,
        )

    def frames(self, view: str, pictures: Iterable[np.ndarray], length: int) -> np.ndarray:
        """Return the `length` frames of a view, uint8 (T, Y, X, 3), from decoded ones; another count or size
        raises ValueError."""
        camera, count, frames = self.cameras[view], 0, np.empty(0, dtype=np.uint8)
        rows, cols = camera.stored if any(camera.stored) else (camera.rows, camera.cols)
        for picture in pictures:
            if count == length:
                raise ValueError(f"frame {count}: {view} has more frames than the {length} steps")
            if picture.shape != (rows, cols, 3):
                raise ValueError(
                    f"frame {count}: {view} is {picture.shape}, the data set declares {(rows, cols, 3)}"
                )
            if not count:  # of a size that a picture has, not only the data set's word
                frames = np.empty((length, camera.rows, camera.cols, 3), dtype=np.uint8)
            frames[count] = resize_with_pad(picture, camera.rows, camera.cols)
            count += 1
        if count < length:
            raise ValueError(f"frame {count}: {view} has {count} frames, expected {length}")
        return frames

    def source(self, path: Path, **facts: Any) -> Source:
        """Return the opened data set; `facts` are the other fields of Source."""
        repo, revision = origin(path)
        delta = tuple(self.action.names[i] for i in self.delta)
        parts = {name: getattr(self, name) for name in ("cameras", "action", "state", "guesses", "unused")}
        return Source(path=path, repo=repo, revision=revision, delta=delta, **facts, **parts)


def _choose(
    numbers: Mapping[str, tuple[str, ...]], asked: str, usual: str, what: str
) -> tuple[Vector, list[str]]:
    """Return the numbers for `what` (action, state) and, where they are no usual features, the guess."""
    if missing := [name for name in asked.split(",") if asked and name not in numbers]:
        raise ValueError(f"no feature {missing[0]!r} for --{what}: the data set has {', '.join(numbers)}")
    chosen, guess = asked or usual, []
    if any(name not in numbers for name in chosen.split(",")):
        near = [name for name in numbers if name.split(".")[-1].split("/")[-1] == what]
        if len(near) != 1:
            raise ValueError(
                f"no feature {usual!r}: choose one of {', '.join(numbers) or 'none'} with --{what} NAME"
            )
        chosen = near[0]
    if not asked and chosen not in (what, f"observation.{what}", f"observation/{what}"):
        guess = [f"--{what} {chosen}"]
    features = tuple(chosen.split(","))
    if len(features) == 1:
        return Vector(features, numbers[chosen]), guess
    words = {name: name.replace("/", ".").split(".")[-1] for name in features}
    names = [f"{words[f]} {n}" if len(numbers[f]) > 1 else words[f] for f in features for n in numbers[f]]
    return Vector(features, tuple(names)), guess


def _choose_cameras(features: Sequence[str], asked: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return view -> feature and the guesses among them.

    Without a wish the first camera that is not on the hand is our `agentview`, the first that is on it our
    `wrist`, any other has the last word of its own name.
    """
    if not features:
        raise ValueError("no cameras: expected features of type video or image")
    if wrong := [f"{view}={name}" for view, name in asked.items() if name not in features]:
        raise ValueError(f"no camera for --camera {wrong[0]}: the data set has {', '.join(features)}")
    if asked:
        return dict(asked), []
    views: dict[str, str] = {}
    for name in features:
        word = name.replace("/", ".").split(".")[-1]
        view = "wrist" if any(part in word for part in WRIST) else "agentview"
        views[word if view in views else view] = name
    return views, ["--camera " + " ".join(f"{view}={name}" for view, name in views.items())]


def _delta_dims(action: Vector, state: Vector) -> dict[int, int]:
    """Return action dim -> state dim that is subtracted from it; no pair raises ValueError."""
    if not (pairs := delta_dims(action.names, state.names)):
        raise ValueError(
            f"--delta: no action dim ({', '.join(action.names)}) matches a state "
            f"({', '.join(state.names)}): leave it out"
        )
    return pairs


def dim_names(names: Any, size: int) -> tuple[str, ...]:
    """Return a name for each of `size` numbers: those that a data set gives, however nested, or 0, 1, ..."""

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                yield from leaves(item)
        elif isinstance(value, str):
            yield value

    flat = tuple(leaves(names))
    return flat if len(flat) == size else tuple(map(str, range(size)))


def decode_picture(name: str, frame: int, data: bytes | Path) -> np.ndarray:
    """Return an encoded picture, or one in a file, as uint8 (Y, X, 3); a broken one raises ValueError."""
    try:
        return np.asarray(Image.open(data if isinstance(data, Path) else io.BytesIO(data)).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
        raise ValueError(f"frame {frame}: {name} is no picture ({error})") from None
