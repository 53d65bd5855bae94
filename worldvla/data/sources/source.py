"""Source: the episodes of a data set of any format, one in memory at a time, and what the set says of itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from worldvla.data.episode import Episode

WRIST = ("wrist", "hand", "gripper")
"""What the name of a camera that moves with the hand contains."""


@dataclass(frozen=True)
class Names:
    """Which features of a data set become an Episode's views, actions and states; empty: a guess."""

    cameras: Mapping[str, str] = field(default_factory=dict)
    """View -> feature."""
    action: str = ""
    state: str = ""


@dataclass(frozen=True)
class Camera:
    """A view as the data set holds it, size in pixels."""

    feature: str
    rows: int
    cols: int


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
    action: str
    """The feature that actions are read from."""
    state: str
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    revision: str
    """Commit of a download from the hub, otherwise empty."""
    guesses: tuple[str, ...]
    """What was not asked for by name but chosen, as the options that would ask for it."""
    files: tuple[Path, ...]
    """What the data are read from."""
    attempts: Callable[[bool], Iterator[tuple[str, Episode | ValueError]]]
    """Read, with images or without, episode after episode: its name, and itself or what is wrong with it."""

    def episodes(self, images: bool = True) -> Iterator[Episode]:
        """Yield the episodes; the first broken one raises ValueError, which names it and the frame."""
        for _, episode in self.attempts(images):
            if isinstance(episode, ValueError):
                raise episode
            yield episode

    def present(self) -> list[Path]:
        """Return the files that are there: an episode whose file is missing is broken, not the data set."""
        return [file for file in self.files if file.is_file()]

    def facts(self) -> dict[str, Any]:
        """Return what a store's manifest tells of the data."""
        names = ("kind", "fps", "action", "state", "action_names", "state_names", "revision", "guesses")
        facts = {name: getattr(self, name) for name in names}
        cameras = {view: asdict(camera) for view, camera in self.cameras.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()} | {"cameras": cameras}


def choose(features: Sequence[str], asked: str, usual: str, what: str) -> tuple[str, list[str]]:
    """Return the feature for `what` (action, state) and, where it has another name than usual, the guess."""
    if asked:
        if asked not in features:
            raise ValueError(f"no feature {asked!r} for --{what}: the data set has {', '.join(features)}")
        return asked, []
    if usual in features:
        return usual, []
    near = [name for name in features if name.split(".")[-1].split("/")[-1] == what]
    if len(near) != 1:
        raise ValueError(
            f"no feature {usual!r}: choose one of {', '.join(features) or 'none'} with --{what} NAME"
        )
    return near[0], [f"--{what} {near[0]}"]


def choose_cameras(features: Sequence[str], asked: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
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
