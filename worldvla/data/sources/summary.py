"""What a data set holds, in lines of text: sizes, ranges, idle steps, what does not look like our actions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from worldvla.data.episode import Episode
from worldvla.data.sources.source import Source, Vector

FOLLOWS = 0.99
"""Correlation of an action with the next state from which on it is called absolute."""
STILL = 1e-3
"""Share of a dim's range that it may move in an idle step."""
HAND_FOLLOWS = 0.5
"""Correlation of a gripper's command with the opening of its fingers, from which on it has a direction."""
POINTS = 20
"""Of a route, evenly spaced along it."""


def summary(source: Source, on_episode: Callable[[str, Episode], None] = lambda *_: None) -> Iterator[str]:
    """Read every episode, pictures included, hand it to `on_episode` with its name, and yield the lines."""
    episodes: list[Episode] = []
    faults: list[str] = []
    for name, episode in source.attempts(True):
        if isinstance(episode, Episode):
            on_episode(name, episode)
            episode.images.clear()
            episodes.append(episode)
        else:
            faults.append(str(episode))
    steps = sum(map(len, episodes))
    rate = f"{source.fps or 'unknown'} steps a second"
    yield f"{source.kind}: {source.num_episodes} episodes, {steps} steps, {rate}"
    for view, camera in source.cameras.items():
        yield f"camera {view} = {camera.feature}, {camera.rows} x {camera.cols} pixels"
        if any(camera.stored):
            yield f"  resized from {camera.stored[0]} x {camera.stored[1]}"
    if episodes:
        actions, states = ([getattr(e, name) for e in episodes] for name in ("actions", "states"))
        yield from _ranges("action", source.action, np.concatenate(actions))
        yield from _ranges("state", source.state, np.concatenate(states))
        yield f"idle: {_idle(states):.1%} of the steps move no state by {STILL:.1%} of its range"
        for dim in _absolute(actions, states):
            fix = "If it is absolute, --delta turns it into a difference"
            yield f"action {source.action.names[dim]} follows the state of the next step. {fix}"
        yield from _grippers(source, actions, states)
    for text, count in Counter(e.instruction for e in episodes).items():
        alike = consistency([e for e in episodes if e.instruction == text])
        yield f"instruction {text!r}: {count} episodes" + (f", {alike}" if alike else "")
    yield from (f"broken: {fault}" for fault in faults)


def _ranges(title: str, vector: Vector, values: np.ndarray) -> Iterator[str]:
    units = f", units: {vector.units}" if vector.units else ""
    yield f"{title} = {vector}, {len(vector.names)} numbers{units}"
    for name, column in zip(vector.names, values.T, strict=True):
        yield f"  {name:<16} {column.min():+.3f} to {column.max():+.3f}"


def _grippers(source: Source, actions: list[np.ndarray], states: list[np.ndarray]) -> Iterator[str]:
    """Say of each gripper which end of its command is open, by how far its fingers are apart a step later."""
    names = source.action.names
    hands = _hands(source.state.names)
    if not hands and (len(names), len(source.state.names)) == (7, 8):  # as LIBERO's
        hands = {6: 1, 7: 1}
    for dim in _hands(names) or {len(names) - 1: 1}:
        own = {i: sign for i, sign in hands.items() if source.state.names[i] == names[dim]} or hands
        command = np.concatenate([a[:-1, dim] for a in actions])
        after = np.concatenate([s[1:] for s in states])
        width = np.abs(after[:, list(own)]) @ np.array(list(own.values()), dtype=np.float64)
        low, high = command.min(), command.max()
        ends = next((e for e in ((0, 1), (-1, 1)) if np.allclose((low, high), e, atol=0.1)), (low, high))
        varies = min(np.std(command), np.std(width)) > 0
        follows = np.corrcoef(command, width)[0, 1] if varies else 0.0
        words = ("closed", "open") if follows > 0 else ("open", "closed")
        verdict = ", ".join(f"{end:.3g} {word}" for end, word in zip(ends, words, strict=True))
        if abs(follows) < HAND_FOLLOWS:
            verdict = f"{ends[0]:.3g} to {ends[1]:.3g}, no state shows which is open"
        libero = "as LIBERO's" if verdict == "-1 open, 1 closed" else "LIBERO's is -1 open, 1 closed"
        guess = "" if dim in _hands(names) else " (a guess: the last action)"
        yield f"gripper = {names[dim]}{guess}: {verdict}; {libero}"


def _hands(names: Sequence[str]) -> dict[int, int]:
    """Return the dims that are named after a gripper -> 1, or -1 where they grow as it closes."""
    words = ((i, name.lower()) for i, name in enumerate(names))
    return {i: -1 if "clos" in word else 1 for i, word in words if "grip" in word or "finger" in word}


def consistency(episodes: Sequence[Episode]) -> str:
    """Say how far the demonstrations of one task differ where the gripper first closes: in the yaw of the
    hand, and in the way there, as far as it is not straight. Where two ways of doing it are mixed, a policy
    may learn neither.

    Of actions and states as LIBERO's (7 and 8 numbers); of others, and without two grasps, the empty string.
    """
    yaws, routes = [], []
    for episode in episodes:
        if episode.actions.shape[1] != 7 or episode.states.shape[1] != 8:
            return ""
        closing = np.flatnonzero(episode.actions[:, 6] > 0)
        if len(closing) and closing[0] > 1:
            positions, turns = episode.states[: closing[0] + 1, :3], episode.states[closing[0], 3:6]
            x, y, _ = Rotation.from_rotvec(turns).apply([1.0, 0.0, 0.0])
            yaws.append(np.arctan2(y, x))
            routes.append(_bend(positions.astype(np.float64)))
    if len(yaws) < 2:
        return ""
    agreement = abs(np.exp(2j * np.array(yaws)).mean())  # of axes: half a turn changes nothing
    yaw = np.rad2deg(np.sqrt(abs(2 * np.log(np.clip(agreement, 1e-9, 1.0))))) / 2
    off = np.linalg.norm(np.array(routes) - np.mean(routes, 0), axis=2)
    return f"yaw at the first grasp +-{yaw:.0f} degrees, way there +-{100 * np.sqrt((off**2).mean()):.1f} cm"


def _bend(route: np.ndarray) -> np.ndarray:
    """Return how far a route (T, 3) is off the straight line between its ends, at POINTS of it, (P, 3)."""
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(route, axis=0), axis=1))])
    share = np.linspace(0.0, 1.0, POINTS)
    points = np.stack([np.interp(share * along[-1], along, column) for column in route.T], axis=1)
    return points - (route[0] + share[:, None] * (route[-1] - route[0]))


def _idle(states: list[np.ndarray]) -> float:
    """Return the share of steps between two states in which nothing moves."""
    slack = STILL * np.ptp(np.concatenate(states), 0)
    moves = np.concatenate([(np.abs(np.diff(s, axis=0)) > slack).any(1) for s in states])
    return float(1 - moves.mean()) if moves.size else 0.0


def _absolute(actions: list[np.ndarray], states: list[np.ndarray]) -> Iterator[int]:
    """Yield the dims whose action is about the state of the same dim after it."""
    act, after = np.concatenate([a[:-1] for a in actions]), np.concatenate([s[1:] for s in states])
    for dim in range(min(act.shape[1], after.shape[1])):
        pair = act[:, dim], after[:, dim]
        if len(act) > 2 and min(map(np.std, pair)) > 0 and np.corrcoef(*pair)[0, 1] > FOLLOWS:
            yield dim
