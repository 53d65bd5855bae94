"""Scripted expert of every tabletop task: a function of the measured state alone, so it recovers from any
disturbance.

Heights follow funnels (the nearer above the target, the lower), which keeps the action a smooth function of
what is seen.
"""

import numpy as np

from worldvla.sim.protocol import CLOSE, OPEN, POSITION_SCALE, ROTATION_SCALE
from worldvla.sim.tabletop import world
from worldvla.sim.tabletop.env import TabletopEnv
from worldvla.sim.tabletop.tasks import Goal

ALIGNED = 0.010
"""Metres between hand and target below which the hand may go all the way down."""
HOVER = 0.085
CARRY = 0.135
"""Height of the hand while it carries, metres: the thing clears the basket's rim."""


class TabletopExpert:
    def __init__(self, env: TabletopEnv) -> None:
        self.env = env

    def act(self) -> np.ndarray:
        """Return the action (7,) float32 in [-1, 1] for the current state."""
        env = self.env
        goal = next((g for g in env.scene.goals if not env.holds(g)), None)
        if goal is None or self._beside_placed():
            return self._towards(env.grip_position() + (0, 0, 0.05), OPEN)
        if goal.verb == "pressed":
            return self._press(env.goal_position(goal))
        if goal.verb == "open":
            return self._open_drawer()
        if goal.verb == "closed":
            return self._close_drawer()
        if goal.verb == "push":
            return self._push(goal)
        return self._pick_and_place(goal)

    def _beside_placed(self) -> bool:
        """Return whether the hand still stands around a thing that is where it belongs: rise first, or it
        falls over."""
        env = self.env
        for goal in env.scene.goals:
            if goal.thing and goal.verb != "push" and env.holds(goal):
                away = env.grip_position() - env.position(goal.thing)
                if float(np.hypot(*away[:2])) < 0.05 and away[2] < 0.065:
                    return True
        return False

    def _towards(self, target: np.ndarray, gripper: float) -> np.ndarray:
        """Move to `target` in a dead beat, each axis at most 1; turn the hand upright."""
        env = self.env
        move = np.clip((np.asarray(target) - env.grip_position()) / POSITION_SCALE, -1.0, 1.0)
        state = env.proprioception()
        turn = np.clip(-state[3:6] / ROTATION_SCALE, -1, 1)
        return np.concatenate([move, turn, [gripper]]).astype(np.float32)

    def _descend(
        self, target: np.ndarray, gripper: float, hover: float = HOVER, slope: float = 3.0
    ) -> tuple[np.ndarray, bool]:
        """Approach `target` through a funnel above it; also tell whether the hand has arrived."""
        hand = self.env.grip_position()
        distance = float(np.hypot(*(target - hand)[:2]))
        height = target[2] + min(hover, slope * max(0.0, distance - ALIGNED))
        lack = height - hand[2]  # too low beside the target: rise before moving on
        keep = float(np.clip(1.0 - (lack - 0.01) / 0.03, 0.0, 1.0))
        way = hand[:2] + keep * (target - hand)[:2]
        arrived = distance < 1.5 * ALIGNED and hand[2] - target[2] < 0.008
        return self._towards(np.array([*way, height]), gripper), arrived

    def _pick_and_place(self, goal: Goal) -> np.ndarray:
        env = self.env
        thing = env.position(goal.thing)
        hand = env.grip_position()
        grip = thing + (0, 0, world.grasp_offset(goal.thing))
        grip[2] = max(grip[2], world.LOW[2] + 0.003)
        place, rest = self._destination(goal)
        above_rest = thing[2] - world.half_height(goal.thing) - rest
        at_place = float(np.max(np.abs(hand[:2] - place))) < 0.016
        if env.touching(goal.thing) == 3:
            offset = hand[2] - thing[2]
            release = (
                rest + world.half_height(goal.thing) + offset + (0.03 if goal.where == "basket" else 0.012)
            )
            if at_place and hand[2] < release + 0.012:
                return self._towards(hand, OPEN)
            target = np.array([*place, release])
            action, _ = self._descend(
                target, CLOSE, hover=CARRY - release if release < CARRY else 0.03, slope=4.0
            )
            return action
        if (
            at_place
            and above_rest < 0.045
            and abs(thing[0] - place[0]) < 0.03
            and abs(thing[1] - place[1]) < 0.03
        ):
            return self._towards(hand + (0, 0, 0.05), OPEN)  # let go, one finger still touching
        action, arrived = self._descend(grip, OPEN)
        if arrived:
            action[6] = CLOSE
            action[:3] *= 0.3
        return action

    def _destination(self, goal: Goal) -> tuple[np.ndarray, float]:
        """Return where (x, y) the hand lets go and the height of the surface there, metres."""
        env = self.env
        where = env.position(goal.where)[:2]
        if goal.where == "basket":
            others = [
                g.thing
                for g in env.scene.goals
                if g.thing != goal.thing and g.where == "basket" and env.holds(g)
            ]
            if others:  # beside what lies there already
                taken = env.position(others[0])[:2] - where
                side = -1.0 if taken[1] > 0 else 1.0
                where = where + (0.0, 0.040 * side)
            elif sum(g.where == "basket" for g in env.scene.goals) > 1:
                where = where + (0.0, -0.040)
            return where, 0.006
        if goal.where == "cabinet" and goal.verb == "in":
            return where + (0.0, -env.drawer()), 0.012
        return where, 2 * world.CABINET_HALF[2] if goal.where == "cabinet" else 0.006

    def _press(self, cap: np.ndarray) -> np.ndarray:
        action, _ = self._descend(cap + (0, 0, 0.012), CLOSE, slope=2.5)
        return action

    def _open_drawer(self) -> np.ndarray:
        env = self.env
        handle = env.data.geom("handle").xpos
        if env.touching("drawer") == 3:
            return self._towards(env.grip_position() + (0, -0.05, 0), CLOSE)
        action, arrived = self._descend(handle.copy(), OPEN)
        if arrived:
            action[6] = CLOSE
        return action

    def _close_drawer(self) -> np.ndarray:
        """Push with closed fingers against the handle from the front."""
        env = self.env
        handle = env.data.geom("handle").xpos
        hand = env.grip_position()
        front = handle + (0, -0.035, 0.0)
        behind = handle[1] - hand[1]
        if abs(handle[0] - hand[0]) < 0.015 and abs(hand[2] - handle[2]) < 0.02 and 0.0 < behind < 0.06:
            return self._towards(np.array([handle[0], hand[1] + 0.05, handle[2]]), CLOSE)
        action, _ = self._descend(front, CLOSE)
        return action

    def _push(self, goal: Goal) -> np.ndarray:
        """Push the thing with closed fingers along x, from the far side of where it has to go."""
        env = self.env
        thing, zone, hand = env.position(goal.thing), env.position(goal.where), env.grip_position()
        side = 1.0 if zone[0] > thing[0] else -1.0
        start = np.array([thing[0] - side * 0.050, thing[1], 0.028])
        gap = side * (thing[0] - hand[0])
        if abs(hand[1] - thing[1]) < 0.02 and hand[2] < 0.04 and 0.02 < gap < 0.065:
            ahead = min(0.05, abs(zone[0] - thing[0]) + 0.01)
            return self._towards(np.array([hand[0] + side * ahead, thing[1], 0.028]), CLOSE)
        action, _ = self._descend(start, CLOSE, slope=2.5)
        return action
