"""Where to hold a thing of LIBERO: across its narrow side, or by a wall (the rim of a bowl, a mug, a plate).

Grips are computed from the collision boxes as the thing lies now; the best one is narrow, near, turns the
hand little, and keeps fingers and palm off what is around.
"""

from dataclasses import dataclass

import numpy as np

from worldvla.sim.libero.motion import Hand

LOWEST = 0.014
"""Lowest height of the grip point above the thing's bottom, metres."""
PADS = (-0.005, 0.012)
"""Extent of the finger pads around the grip point, metres."""
SHIFTS = np.array([0.0, -0.01, 0.01, -0.02, 0.02])
"""Ways off the thing's middle to choose from, across the finger axis, metres."""
PALM = (0.110, 0.042)
"""Half extents of the hand along and across the finger axis, with a margin, metres."""
TO_PALM = 0.029
"""The palm's height above the grip point, metres; it is 0.031 of a hand that is upright."""
FINGERS = (0.039, 0.029, 0.016)
"""Of an open finger at its tip and its way in: its middle along the finger axis, half extents along
and across, metres (no less than half the spacing of the points around)."""
WIDEST = 0.072
"""What fits between the fingers, metres: they open to 0.08."""
YAWS = np.deg2rad(np.arange(-85, 90, 5))
TURNED_AXES = np.stack([-np.sin(YAWS), np.cos(YAWS)], axis=1)
"""Finger axes to choose from (35, 2); yaw 0: along y, as at the start."""
WALL = 0.013
"""Half of the thickest wall that counts as one, metres."""
RAISED = (0.0, 0.01)
"""Heights above a kind's own depth to choose from, metres: the palm passes over more."""
HIT, TOUCH, YIELD = 10.0, 40.0, 0.008
"""Cost of a metre that the palm, and that a finger by a wall, is inside what is around. A finger costs more:
a grip that is free and one that nearly is must not tie, or demonstrations differ where scenes do not. The
last: metres that cost a finger nothing, because the arm and the thing give way."""


@dataclass(frozen=True)
class Way:
    """How things of a kind are held."""

    depth: float = 0.018
    """How far below the thing's top to grip, metres."""
    by_wall: bool = False


WAYS = {
    "akita_black_bowl": Way(0.022, by_wall=True),
    "porcelain_mug": Way(0.022, by_wall=True),
    "red_coffee_mug": Way(0.022, by_wall=True),
    "white_yellow_mug": Way(0.022, by_wall=True),
    "plate": Way(0.006, by_wall=True),
    "moka_pot": Way(0.006),
    "wine_bottle": Way(0.025),
}
"""Kind -> how to hold it; any other kind: across its narrow side, near its top."""


@dataclass(frozen=True)
class Grip:
    """Where the fingers have to be to hold a thing as it lies now."""

    point: np.ndarray
    """Between the pads, metres (3,)."""
    axis: np.ndarray
    """Horizontal unit vector (3,) along which the fingers close."""
    room: float
    """What the open fingers must span, metres."""
    narrowest: float
    """The least gap, metres, between fingers that hold it: nearer ones have closed on nothing."""
    bottom: float
    """Lowest point of the thing, metres."""


def way_of(thing: str) -> Way:
    """Return how `thing` (`plate_1`) is held."""
    return WAYS.get(thing.rpartition("_")[0], Way())


def best_grip(hand: Hand, thing: str, avoid: np.ndarray | None = None) -> Grip:
    """Return the best grip of `thing` as it lies now; fingers that close along `avoid` (3,) are worse."""
    if way_of(thing).by_wall:
        return _by_wall(hand, thing, held=False, avoid=avoid)
    return _across(hand, thing, None)


def present_grip(hand: Hand, thing: str) -> Grip:
    """Return the grip of `thing` that is nearest to what the hand does now."""
    return _by_wall(hand, thing, held=True) if way_of(thing).by_wall else _across(hand, thing, hand.axis)


def _across(hand: Hand, thing: str, axis: np.ndarray | None) -> Grip:
    """Hold across `axis`, or (None) across the best one."""
    corners = hand.corners(thing)
    bottom, top = float(corners[..., 2].min()), float(corners[..., 2].max())
    height = max(top - way_of(thing).depth, bottom + LOWEST)
    lows, highs = corners[..., 2].min(axis=1), corners[..., 2].max(axis=1)
    reached = (lows < height + PADS[1]) & (highs > height + PADS[0])
    flat = (corners[reached] if reached.any() else corners).reshape(-1, 3)[:, :2]
    narrowest = _span(flat @ TURNED_AXES.T).min()
    if axis is None:
        axes, shifts = np.repeat(TURNED_AXES, len(SHIFTS), axis=0), np.tile(SHIFTS, len(TURNED_AXES))
    else:
        axes, shifts = axis[None, :2], np.zeros(1)
    across = axes[:, ::-1] * (1.0, -1.0)
    u, v = flat @ axes.T, flat @ across.T
    widths, lengths = _span(u), _span(v)
    centres = axes * _middle(u)[:, None] + across * (_middle(v) + shifts)[:, None]
    best = 0
    if axis is None:
        cost = widths + 0.005 * _turns(hand, axes) + 0.3 * np.abs(shifts)
        cost += HIT * _hits(hand.around(thing, height + TO_PALM)[:, :2], centres, axes, (0.0, *PALM))
        cost += (widths > WIDEST) + (np.abs(shifts) + 0.012 > lengths / 2) * (shifts != 0)
        best = int(np.argmin(cost))
    room = min(float(widths[best]) + 0.01, 0.07)
    return Grip(_lift(centres[best], height), _lift(axes[best]), room, float(narrowest), bottom)


def _by_wall(hand: Hand, thing: str, *, held: bool, avoid: np.ndarray | None = None) -> Grip:
    """Hold a wall that reaches the thing's top, one finger on each side; `held`: the one nearest the hand."""
    corners = hand.corners(thing)
    bottom, top = float(corners[..., 2].min()), float(corners[..., 2].max())
    height = max(top - way_of(thing).depth, bottom + LOWEST)
    middles, normals, halves = hand.normals(thing)
    level = np.hypot(normals[:, 0], normals[:, 1])
    walls = (corners[..., 2].max(axis=1) > top - 0.015) & (halves < WALL) & (level > 0.6)
    if not walls.any():  # it lies on its side
        return _across(hand, thing, hand.axis if held else None)
    axes = normals[walls, :2] / level[walls, None]
    lean = (height - middles[walls, 2]) * normals[walls, 2] / level[walls]
    centres = middles[walls, :2] - lean[:, None] * axes
    near = np.hypot(*(centres - hand.position[:2]).T)
    if held:
        best = int(np.argmin(near))
        return Grip(_lift(centres[best], height), _lift(axes[best]), 0.05, 0.0, bottom)
    cost = 0.2 * near + 0.02 * _turns(hand, axes)
    if avoid is not None:
        cost += 0.2 * np.abs(axes @ avoid[:2])
    points = np.concatenate([hand.around(thing, height - 0.01), corners[~walls].reshape(-1, 3)])
    costs = [cost + raised + _obstructed(points, centres, axes, height + raised) for raised in RAISED]
    raise_, best = divmod(int(np.argmin(costs)), len(axes))
    return Grip(_lift(centres[best], height + RAISED[raise_]), _lift(axes[best]), 0.05, 0.0, bottom)


def _obstructed(points: np.ndarray, centres: np.ndarray, axes: np.ndarray, height: float) -> np.ndarray:
    """Return what `points` (m, 3) around cost open hands at `centres` (n, 2) and `height`, (n,)."""
    high, low = (points[points[:, 2] > height + above, :2] for above in (TO_PALM, -0.01))
    cost = HIT * _hits(high, centres, axes, (0.0, *PALM))
    for side in (-1, 1):
        depth = _hits(low, centres, axes, (side * FINGERS[0], *FINGERS[1:]))
        cost += TOUCH * np.maximum(depth - YIELD, 0.0)
    return cost


def _turns(hand: Hand, axes: np.ndarray) -> np.ndarray:
    """Return how far axes (n, 2) are from the start's and from the present one, together, radians (n,)."""
    turn = np.arccos(np.clip(np.abs(axes @ hand.axis[:2]), 0.0, 1.0))
    return np.arccos(np.clip(np.abs(axes[:, 1]), 0.0, 1.0)) + turn


def _hits(
    points: np.ndarray, centres: np.ndarray, axes: np.ndarray, block: tuple[float, float, float]
) -> np.ndarray:
    """Return how deep the deepest of `points` (m, 2) is inside a block of each hand (n,), metres.

    `block`: its middle along the finger axis, its half extents along and across it.
    """
    reach = abs(block[0]) + block[1] + block[2]
    near = (points > centres.min(axis=0) - reach) & (points < centres.max(axis=0) + reach)
    points, sides = points[near.all(axis=1)], axes[:, ::-1] * (1.0, -1.0)
    along = points @ axes.T - (centres * axes).sum(axis=1) - block[0]
    across = points @ sides.T - (centres * sides).sum(axis=1)
    return np.minimum(block[1] - abs(along), block[2] - abs(across)).max(axis=0, initial=0.0)


def _lift(flat: np.ndarray, height: float = 0.0) -> np.ndarray:
    return np.array([*flat, height])


def _span(values: np.ndarray) -> np.ndarray:
    """Return the length of the range of each column (n, columns) -> (columns,)."""
    return values.max(axis=0) - values.min(axis=0)


def _middle(values: np.ndarray) -> np.ndarray:
    """Return the middle of the range of each column (n, columns) -> (columns,)."""
    return (values.max(axis=0) + values.min(axis=0)) / 2
