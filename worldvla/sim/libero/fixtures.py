"""Skills for what is fixed in LIBERO's scenes: drawers, the stove's knob, the microwave and its door."""

from collections.abc import Callable

import numpy as np

from worldvla.sim.libero.motion import ALIGNED, DOWN, Hand, Joint
from worldvla.sim.protocol import CLOSE, OPEN

Goal = tuple[str, ...]
UP = -DOWN
TILT = np.deg2rad(15)
"""How far below the horizontal the fingers point at a handle, radians."""
PUSH_TILT = np.deg2rad(40)
"""How far from straight down the fingers point while they push, radians: the palm stays off what is above."""
STANDOFF = 0.08
"""In front of a handle, metres, until the hand is aligned with it."""
PULL = 0.05
"""Metres ahead of the hand that it is sent while it pulls or pushes."""
OPENED, SHUT = -0.15, -0.08
"""A drawer is pulled up to the first, metres; one beyond the second has to be opened before it is filled."""
WRAPPED = (0.008, 0.032)
"""Gap of fingers that have closed around a handle or a knob, metres."""
INWARDS = np.array([0.0, 1.0, 0.0])
"""Into a microwave; LIBERO's stand unturned."""
REACH = np.deg2rad(50)
"""How far from straight down the fingers point while they put a mug in: the palm stays below the ceiling."""
TURNED_IN = ((0.30, 0.40), np.deg2rad((0, 35)))
"""Metres before a mug is in -> how far to the right of `INWARDS` the fingers point, radians: where the mug
stands at first, a hand that points straight in is out of the arm's reach."""
INSIDE = np.array([-0.055, -0.034, -0.072])
"""From a microwave's heating region to where a mug's own x, y and its bottom belong, metres."""
DOOR = (0.26, 0.128)
"""Length of its door; how far beside it the middle of a hand passes: half of each and a margin, metres."""
MOUTH = -0.098
"""From its heating region to its front, metres along `INWARDS`."""
ALONG = np.array([-0.3, 1.0, 0.0]) / np.hypot(0.3, 1.0)
"""Along which the fingers close at a door: as at the start, but so that a hand that comes from the microwave
turns back, and not on to the end of its last joint."""


def drawer_in_the_way(hand: Hand, goal: Goal) -> bool:
    """Return whether the thing of `goal` belongs in a drawer that is not open yet."""
    region = hand.env.world.object_sites_dict[goal[2]]
    if not region.joints:
        return False
    joint = hand.joint(goal[2])
    return joint.value > (OPENED if _wraps(hand, _handle(joint, -joint.axis)) else SHUT)


def open_drawer(hand: Hand, goal: Goal) -> np.ndarray:
    """Take the handle from the front, one finger above and one below, and pull."""
    joint = hand.joint(goal[1])
    out = -joint.axis
    handle = _handle(joint, out)
    point = -out * np.cos(TILT) + DOWN * np.sin(TILT)
    fingers = np.cross(np.cross(UP, out), point)
    if _wraps(hand, handle):
        goal_point = hand.position + out * PULL
        goal_point += 0.5 * ((handle - hand.position) - ((handle - hand.position) @ out) * out)
        return hand.towards(goal_point, CLOSE, fingers, point)
    aim, arrived = _line_up(hand, handle, -out, fingers)
    return hand.towards(aim, CLOSE if arrived else OPEN, fingers, point)


def turn_on(hand: Hand, goal: Goal) -> np.ndarray:
    """Take the knob's bar from above and turn the hand."""
    joint = hand.joint(goal[1])
    tops = joint.corners[..., 2].max(axis=1)
    bar = joint.corners[tops > tops.max() - 0.015].mean(axis=1)
    along = bar[np.argmax(bar @ (bar[0] - bar[-1]))] - bar[np.argmin(bar @ (bar[0] - bar[-1]))]
    axis = np.cross(UP, along * (1, 1, 0))
    axis /= max(float(np.linalg.norm(axis)), 1e-6)
    target = np.array([*joint.anchor[:2], tops.max() - 0.008])
    turned = min(abs(float(hand.axis @ axis)), hand.upright)
    if turned > 0.9 and _wraps(hand, target):
        now = hand.axis
        ahead = now + 0.4 * np.cross(joint.axis, now)
        return hand.towards(target, CLOSE, ahead / np.linalg.norm(ahead))
    if (
        turned > 0.97
        and float(np.linalg.norm(target - hand.position)) < 1.5 * ALIGNED
        and hand.opening > WRAPPED[0]
    ):
        return hand.towards(target, CLOSE, axis)
    return hand.descend(target, OPEN, axis, thing=goal[1], extra=0.0 if turned > 0.95 else 0.06)


def microwave(hand: Hand, goal: Goal) -> np.ndarray:
    """Take a mug by its handle with a tilted hand, put it in, and come out the way the hand went in."""
    thing, place = goal[1], hand.env.position(goal[2]) + INSIDE
    before = place[1] - hand.position[1]
    turn = np.interp(before, *TURNED_IN)
    ahead = INWARDS * np.cos(turn) + np.cross(INWARDS, UP) * np.sin(turn)
    point = ahead * np.sin(REACH) + DOWN * np.cos(REACH)
    fingers = np.cross(UP, ahead)
    corners = hand.corners(thing)
    middles = corners.mean(axis=1)
    handle = middles[np.argmax(np.linalg.norm((middles - middles.mean(axis=0))[:, :2], axis=1))]
    if _wraps(hand, handle) and hand.env.grasps(thing):
        bottom = float(corners[..., 2].min())
        off = place - [*hand.env.position(thing)[:2], bottom]
        door = hand.joint(goal[2].removesuffix("_heating_region"))
        along = np.clip(door.anchor[1] - hand.position[1] + 0.10, 0.0, DOOR[0])
        beside = door.anchor[0] - along / np.tan(min(door.value, -1.0)) + DOOR[1]
        off[0] = max(off[0], beside - hand.position[0])
        is_in = off[1] < ALIGNED
        if is_in and off[2] > -0.004:
            return hand.towards(hand.position, OPEN, fingers, point)
        goal_point = hand.position + off + (0.0, 0.0, -0.003 if is_in else 0.016)
        return hand.towards(hand.rise_first(goal_point[:2], goal_point[2]), CLOSE, fingers, point)
    if reaches_in(hand, goal) and hand.env.world._eval_predicate(goal):
        return hand.towards(hand.position - PULL * INWARDS, OPEN, fingers, point)
    aim, arrived = _line_up(hand, handle, point, fingers)
    return hand.towards(aim, CLOSE if arrived else OPEN, fingers, point)


def reaches_in(hand: Hand, goal: Goal) -> bool:
    """Return whether the hand is in a microwave's mouth, or was just there: it still points inwards."""
    off = hand.position - hand.env.position(goal[2])
    return float(off @ INWARDS) > MOUTH - 0.12 and abs(off[0]) < 0.2 and hand.rotation[1, 2] > 0.4


def close_door(hand: Hand, goal: Goal) -> np.ndarray:
    """Push a microwave's door by its handle with closed fingers, from outside."""
    joint = hand.joint(goal[1])
    out = np.array([np.sin(joint.value), -np.cos(joint.value), 0.0])
    handle = _handle(joint, out) + 0.02 * out + 0.07 * UP
    off = handle - hand.position
    ahead = -float(off @ out)
    aside = float(np.linalg.norm(off + ahead * out))
    if ahead < (0.03 if aside > 0.03 else -0.015):  # the door is between
        return hand.descend(handle + 0.5 * STANDOFF * out, CLOSE, ALONG)
    aim, arrived = _line_up(hand, handle, -out, ALONG)
    return hand.towards(aim - out * PULL if arrived else aim, CLOSE, ALONG)


def close(hand: Hand, goal: Goal) -> np.ndarray:
    """Close a drawer, or a microwave's door."""
    return (close_door if goal[1].startswith("microwave") else close_drawer)(hand, goal)


def close_drawer(hand: Hand, goal: Goal) -> np.ndarray:
    """Push the handle with closed fingers from the front."""
    joint = hand.joint(goal[1])
    out = -joint.axis
    handle = _handle(joint, out) + 0.012 * out
    point = -out * np.sin(PUSH_TILT) + DOWN * np.cos(PUSH_TILT)
    fingers = np.cross(UP, out)
    aim, arrived = _line_up(hand, handle, -out, fingers)
    if arrived:
        aim = aim - out * PULL
    return hand.towards(aim, CLOSE, fingers, point)


def _wraps(hand: Hand, bar: np.ndarray) -> bool:
    """Return whether the fingers have closed around a bar, metres (3,)."""
    near = float(np.linalg.norm(bar - hand.position)) < 0.025
    return near and WRAPPED[0] < hand.opening < WRAPPED[1] and not hand.closing


def _handle(joint: Joint, out: np.ndarray) -> np.ndarray:
    """Return the middle (3,) of what sticks out farthest, metres."""
    middles = joint.corners.mean(axis=1)
    return middles[np.argmax(middles @ out)]


def _line_up(hand: Hand, target: np.ndarray, way: np.ndarray, fingers: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return where to go (3,) to reach `target` along `way` (3,), and whether the hand is there.

    The farther off the line or the less turned the hand is, the farther before the target it stays.
    """
    off = target - hand.position
    ahead = float(off @ way)
    aside = off - ahead * way
    turn = float(np.arccos(np.clip(abs(hand.rotation[:, 0] @ fingers) / np.linalg.norm(fingers), 0, 1)))
    wrong = float(np.linalg.norm(aside)) + 0.1 * max(turn - 0.1, 0.0)
    before = min(STANDOFF, 3.0 * max(0.0, wrong - ALIGNED))
    keep = float(np.clip(1.0 - (before - ahead - 0.01) / 0.03, 0.0, 1.0))
    aim = hand.position + keep * aside + (ahead - before) * way
    return aim, wrong < 1.5 * ALIGNED and ahead < ALIGNED


FIXTURE_SKILLS: dict[str, Callable[[Hand, Goal], np.ndarray]] = {
    "open": open_drawer,
    "close": close,
    "turnon": turn_on,
}
"""Predicate of a goal -> its skill."""
