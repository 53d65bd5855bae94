"""Scripted experts of LIBERO: one table from goals to skills, each a function of what is measured now.

No phase counter and no memory, so an expert recovers from disturbances and can label any visited state: each
call asks which goal is unmet, whether its thing is between the fingers, how far it is from its place and how
high the hand is. Heights follow funnels: the nearer to the target, the lower.
"""

from dataclasses import dataclass

import numpy as np

from worldvla.sim.libero.env import LiberoEnv
from worldvla.sim.libero.fixtures import FIXTURE_SKILLS, drawer_in_the_way, microwave, reaches_in
from worldvla.sim.libero.grasp import Grip, best_grip, present_grip
from worldvla.sim.libero.motion import ALIGNED, Hand
from worldvla.sim.protocol import CLOSE, OPEN

SLACK = 0.012
"""How far off a measured height or gap may be, metres."""
CLEARANCE = 0.015
"""Between what is carried and what lies on the way, metres."""
BESIDE = 0.03
"""The hand is at a grip when it is nearer than this, metres."""
LEAD = 0.05
"""Metres ahead of the hand that it is sent while it pushes."""
PRESSED = 0.03
"""Below this height above a plate's own position, metres, fingertips that aim at it press on it."""
SIDE = np.array([0.0, 1.0, 0.0])
"""Along which the fingers close at the start."""
ORDER = {"turnon": 0, "open": 0, "on": 1, "in": 1, "close": 2}
"""Predicate -> when its turn comes."""
HEATED = "heating_region"
"""End of the name of the place inside a microwave."""


@dataclass(frozen=True)
class Place:
    """Where a thing is let go, by what its goal says."""

    rest: float = 0.0
    """Height of the thing's bottom above the place's own position when it is let go, metres."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Off the place's position, metres x, y."""
    outward: tuple[float, float] = (0.0, 0.0)
    """Off the place's position towards where its drawer opens, metres: on arrival, clear of the handles
    above; and at rest, clear of the drawer's front."""
    aside: float = 0.0
    """Off the place's position along x where two things share it, metres."""
    sideways: bool = False
    """Hold it by a wall to the side of where the drawer opens: no finger then meets the drawer's front."""
    axis: tuple[float, float, float] | None = None
    """Direction the fingers close along when it is let go: its slot is no wider than it has to be."""
    push: bool = False
    """It slides there on the table."""
    first: bool = False
    """Before other things: later there is no room for the hand between them."""
    drop: bool = False
    """Let go at the rim of what contains it."""


PLACES = {
    "basket_1_contain_region": Place(drop=True),
    "plate_1": Place(0.008),
    "plate_2": Place(0.008),
    "akita_black_bowl_1": Place(0.02),
    "cook_region": Place(0.028, aside=0.045),
    "top_side": Place(0.004),
    "cabinet_1_top_region": Place(-0.02, outward=(0.02, 0.01)),
    "cabinet_1_bottom_region": Place(-0.02, outward=(0.033, 0.01), sideways=True),
    "rack_1_top_region": Place(0.01, (0.0, -0.02)),
    "stove_front_region": Place(push=True),
    "back_contain_region": Place(0.0, axis=(1.0, 0.0, 0.0)),
    "plate_right_region": Place(0.028, first=True),
}
"""End of a place's name -> how a thing is put there."""


class LiberoExpert:
    """Expert of one environment; raises ValueError for a task it cannot do."""

    def __init__(self, env: LiberoEnv) -> None:
        goals = sorted(env.goals, key=_turn)
        if unable := [" ".join(goal) for goal in goals if not _can(goal)]:
            raise ValueError(
                f"no scripted expert for {env.task.suite}/{env.task.name}: no skill for goal {unable[0]!r}; "
                "leave the task out, or add a row to PLACES or FIXTURE_SKILLS"
            )
        self.env, self.goals = env, goals
        self.hand = Hand(env)

    def act(self) -> np.ndarray:
        """Return the action (7,) float32 in [-1, 1] for the current state."""
        self.hand.look()
        goal = None
        for each in self.goals:
            if not self.env.world._eval_predicate(each):
                goal = goal or each
            elif each[-1].endswith(HEATED):
                if reaches_in(self.hand, each):
                    return microwave(self.hand, each)
            elif each[0] in ("on", "in") and self._stands_around(each[1]):
                if self._holds(each[1], present_grip(self.hand, each[1])):
                    return self._put(each[1], each[2])  # counts already, and yet not at rest
                return self.hand.towards(self.hand.position, OPEN)
        if goal is None:
            return self.hand.towards(self.hand.position + (0.0, 0.0, 0.05), OPEN)
        if goal[0] not in ("on", "in"):
            return FIXTURE_SKILLS[goal[0]](self.hand, goal)
        if goal[-1].endswith(HEATED):
            return microwave(self.hand, goal)
        if goal[0] == "in" and drawer_in_the_way(self.hand, goal):
            return FIXTURE_SKILLS["open"](self.hand, ("open", goal[2]))
        return self._put(goal[1], goal[2])

    def _put(self, thing: str, where: str) -> np.ndarray:
        """Pick `thing` up and put it where its goal says."""
        hand, place = self.hand, _place(where) or Place()
        if place.push:
            return self._push(thing, where)
        grip = present_grip(hand, thing)
        target = self._target(thing, where, place, grip.bottom)
        if self._holds(thing, grip):
            return self._carry(thing, grip, where, target, place)
        if place.drop and float(np.max(np.abs(grip.point - target)[:2])) < 0.06:  # falling into it, or in it
            rim = float(hand.corners(where.removesuffix("_contain_region"))[..., 2].max())
            return hand.towards(np.array([*hand.position[:2], max(hand.position[2], rim + 0.06)]), OPEN)
        avoid = hand.joint(where).axis if place.sideways else None
        return self._approach(thing, best_grip(hand, thing, avoid))

    def _approach(self, thing: str, grip: Grip) -> np.ndarray:
        """Go down a funnel onto the thing with open fingers, and close them there."""
        hand = self.hand
        distance = float(np.hypot(*(grip.point - hand.position)[:2]))
        turned = min(float(abs(hand.axis @ grip.axis)), hand.upright)
        level = abs(hand.position[2] - grip.point[2]) < SLACK
        if (
            level
            and distance < 1.5 * ALIGNED
            and turned > 0.98
            and hand.opening > max(grip.narrowest - SLACK, 0.001)
        ):
            return hand.towards(grip.point, CLOSE, grip.axis)
        ready = hand.opening > grip.room and turned > 0.95
        return hand.descend(grip.point, OPEN, grip.axis, thing=thing, extra=0.0 if ready else 0.06)

    def _carry(self, thing: str, grip: Grip, where: str, target: np.ndarray, place: Place) -> np.ndarray:
        """Lift the thing over what lies on the way, bring it over its place, lower it, let go."""
        hand = self.hand
        if hand.closing:
            return hand.towards(hand.position, CLOSE)
        way_out = self._from_below(thing)
        if way_out is not None:
            return hand.towards(way_out, CLOSE)
        at = grip.point if place.drop or place.axis else self.env.position(thing)
        goal = hand.position[:2] + (target - at)[:2]
        over = float(np.max(np.abs(at - target)[:2]))
        axis = None if place.axis is None else np.array(place.axis)
        if axis is not None:
            over = max(over, 0.1 * float(np.arccos(np.clip(abs(hand.axis @ axis), 0.0, 1.0))))
        hang = hand.position[2] - grip.bottom
        if place.drop:
            rim = float(hand.corners(where.removesuffix("_contain_region"))[..., 2].max())
            low, high = rim + 0.02, hang + rim + CLEARANCE
        else:
            low = target[2] + hang
            high = hand.highest_on_way(goal, thing, 0.10) + hang + CLEARANCE
        tight = 0.4 if any(place.outward) else 1.0  # a drawer has no room to spare
        if over < 2 * tight * ALIGNED and hand.position[2] < low + 0.01:
            return hand.towards(hand.position, OPEN)
        high = max(low, high)
        height = low + (high - low) * float(np.clip((over - tight * ALIGNED) / 0.02, 0.0, 1.0))
        return hand.towards(hand.rise_first(goal, height), CLOSE, axis)

    def _from_below(self, thing: str) -> np.ndarray | None:
        """Return where the hand takes a held thing that is below something, an open drawer say; else None."""
        corners = self.hand.corners(thing).reshape(-1, 3)
        low, high = corners.min(axis=0), corners.max(axis=0)
        above = self.hand.around(thing, high[2] - 0.005)
        within = ((2 * above - low - high) / (high - low))[:, :2]
        lid = above[(within**2).sum(axis=1) < 1.0]  # walls beside the thing do not count
        if not len(lid):
            return None
        away = (corners.mean(axis=0) - lid.mean(axis=0)) * (1.0, 1.0, 0.0)
        away *= 0.05 / max(float(np.linalg.norm(away)), 1e-6)
        return self.hand.position + away + (0.0, 0.0, 0.2 * (lid[:, 2].min() - high[2]))

    def _push(self, thing: str, where: str) -> np.ndarray:
        """Press closed fingers on the thing, inside its rim, and lead it over the table."""
        hand, at = self.hand, self.env.position(thing)
        way = (self.env.position(where) - at) * (1.0, 1.0, 0.0)
        left = max(float(np.linalg.norm(way)), 0.02)
        inside = at + 0.02 * way / left
        off = hand.position - at
        if float(np.hypot(*off[:2])) < 0.05 and off[2] < PRESSED:
            ahead = hand.position + LEAD * way / left
            return hand.towards(np.array([*ahead[:2], inside[2]]), CLOSE, SIDE)
        return hand.descend(inside, CLOSE, SIDE, thing=thing)

    def _target(self, thing: str, where: str, place: Place, bottom: float) -> np.ndarray:
        """Return where the thing's own position (x, y) and its bottom (z) have to be, metres (3,)."""
        target = self.env.position(where) + (*place.shift, place.rest)
        if any(place.outward):
            outward = np.interp(bottom - target[2], (0.005, 0.025), place.outward[::-1])
            target -= outward * self.hand.joint(where).axis
        others = [goal[1] for goal in self.goals if goal[2:] == (where,) and goal[1] != thing]
        if place.aside and others:
            first, second = self.env.position(thing), self.env.position(others[0])
            if self.env.world._eval_predicate(("on", others[0], where)):  # beside what stands there already
                first = target
            target[0] += place.aside if first[0] > second[0] else -place.aside
        return target

    def _holds(self, thing: str, grip: Grip) -> bool:
        """Return whether the thing is between the fingers and both touch it."""
        hand = self.hand
        beside = float(np.linalg.norm((grip.point - hand.position)[:2]))
        return beside < BESIDE and hand.opening > grip.narrowest - SLACK and self.env.grasps(thing)

    def _stands_around(self, thing: str) -> bool:
        """Return whether fingers that are not open yet are at a grip of `thing`."""
        if self.hand.opening > 0.07:
            return False
        return float(np.linalg.norm(present_grip(self.hand, thing).point - self.hand.position)) < BESIDE


def _place(where: str) -> Place | None:
    return next((place for end, place in PLACES.items() if where.endswith(end)), None)


def _turn(goal: tuple[str, ...]) -> tuple[int, bool]:
    """Return what goals are sorted by."""
    place = _place(goal[-1])
    return ORDER.get(goal[0], 9), place is None or not place.first


def _can(goal: tuple[str, ...]) -> bool:
    if goal[0] in ("on", "in"):
        return goal[2].endswith(HEATED) or _place(goal[2]) is not None
    return goal[0] in FIXTURE_SKILLS
