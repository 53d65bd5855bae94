"""Scripted expert of libero_object: pick a thing up and let it fall into the basket.

A function of what the simulator measures now (no phase counter), so it recovers from disturbances: each call
asks whether the thing is between the fingers, how far it is from the basket and how high the hand is. Heights
follow funnels: the nearer to the target, the lower.
"""

from dataclasses import dataclass

import numpy as np

from worldvla.sim.libero import LiberoEnv

OPEN, CLOSE = -1.0, 1.0
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
"""Metres and radians that an action of 1.0 asks of LIBERO's controller (robosuite osc_pose.json)."""
GAIN = 2.0
"""The controller covers only part of the asked way in one step."""
MAX_TURN = 0.4
TO_PALM = 0.018
"""How far below a thing's top to grip, metres: the palm is 24 mm above the point between the fingertips."""
LOWEST = 0.014
"""Lowest height of the grip point, metres: the fingertips reach 13 mm below it."""
PADS = (-0.005, 0.012)
"""Extent of the finger pads around the grip point, metres."""
ALIGNED = 0.010
OVER_EVERYTHING = 0.18
"""Height of the empty hand's way, metres: the tallest bottle is 0.146 and the fingertips hang 0.013 lower."""
CLEARANCE = 0.015
"""Between the thing's bottom and the basket's rim, metres."""
SHIFTS = np.array([0.0, -0.01, 0.01, -0.02, 0.02])
"""Ways off the thing's middle to choose from, across the finger axis, metres."""
PALM = (0.110, 0.042)
"""Half extents of the hand along and across the finger axis, with a margin, metres."""
WIDEST = 0.072
"""What fits between the fingers, metres: they open to 0.08."""
YAWS = np.deg2rad(np.arange(-85, 90, 5))
TURNED_AXES = np.stack([-np.sin(YAWS), np.cos(YAWS)], axis=1)
"""Finger axes to choose from (35, 2); yaw 0: along y, as at the start."""
SLACK = 0.012


@dataclass(frozen=True)
class Grip:
    """Where the fingers have to be to hold a thing as it lies now."""

    point: np.ndarray
    """Between the pads, metres (3,)."""
    axis: np.ndarray
    """Horizontal unit vector (3,) along which the fingers close."""
    width: float
    """Of the thing along `axis` at that height, metres."""
    narrowest: float
    """Its least width in any direction, metres: fingers that are nearer have closed on nothing."""
    bottom: float
    """Lowest point of the thing, metres."""


class LiberoExpert:
    """Expert of one environment; raises ValueError for a task it cannot do."""

    def __init__(self, env: LiberoEnv) -> None:
        if env.task.suite != "libero_object":
            raise ValueError(
                f"no scripted expert for {env.task.suite}/{env.task.name}; only for libero_object"
            )
        self.env = env
        _, self.thing, self.region = env.goals[0]
        self.basket = self.region.removesuffix("_contain_region")

    def act(self) -> np.ndarray:
        """Return the action (7,) float32 in [-1, 1] for the current state."""
        world = self.env.world
        hand = np.array(world.sim.data.site_xpos[world.robots[0].eef_site_id])
        grip = self._grip(self._hand_axis())
        basket = self.env.position(self.region)[:2]
        rim = float(self._corners(self.basket)[..., 2].max())
        over = float(np.max(np.abs(grip.point[:2] - basket)))
        if self._holds(hand, grip):
            return self._carry(hand, grip, basket, rim, over)
        if over < 0.06:  # falling into the basket, or in it
            return self._towards(np.array([*hand[:2], max(hand[2], rim + 0.06)]), OPEN)
        return self._approach(hand, self._grip())

    # -- phases ---------------------------------------------------------------------------------------------

    def _approach(self, hand: np.ndarray, grip: Grip) -> np.ndarray:
        """Go down a funnel onto the thing with open fingers, and close them there."""
        opening = self._opening()
        distance = float(np.hypot(*(grip.point - hand)[:2]))
        turned = float(abs(self._hand_axis() @ grip.axis))
        arrived = distance < 1.5 * ALIGNED and abs(hand[2] - grip.point[2]) < SLACK and turned > 0.98
        if arrived and opening > grip.narrowest - SLACK:
            return self._towards(grip.point, CLOSE, grip.axis)
        ready = opening > min(grip.width + 0.01, 0.07) and turned > 0.95
        hover = max(OVER_EVERYTHING - grip.point[2], 0.05)
        height = grip.point[2] + min(hover, 3.0 * max(0.0, distance - ALIGNED) + (0.0 if ready else 0.06))
        return self._towards(self._rise_first(hand, grip.point[:2], height), OPEN, grip.axis)

    def _carry(self, hand: np.ndarray, grip: Grip, basket: np.ndarray, rim: float, over: float) -> np.ndarray:
        """Lift the thing over the rim, bring it over the basket, lower the fingers to the rim, let go."""
        if self._closing():
            return self._towards(hand, CLOSE)
        low = rim + 0.02
        if over < 0.02 and hand[2] < low + 0.01:
            return self._towards(hand, OPEN)
        goal = hand[:2] + basket - grip.point[:2]
        high = max(low, hand[2] - grip.bottom + rim + CLEARANCE)
        height = low + (high - low) * float(np.clip((over - ALIGNED) / 0.02, 0.0, 1.0))
        return self._towards(self._rise_first(hand, goal, height), CLOSE)

    @staticmethod
    def _rise_first(hand: np.ndarray, goal: np.ndarray, height: float) -> np.ndarray:
        """Return the next target: sideways only as far as the hand is high enough for it."""
        lack = height - hand[2]
        keep = float(np.clip(1.0 - (lack - 0.01) / 0.03, 0.0, 1.0))
        return np.array([*(hand[:2] + keep * (goal - hand[:2])), height])

    def _towards(self, target: np.ndarray, gripper: float, axis: np.ndarray | None = None) -> np.ndarray:
        """Move the grip point to `target`, the hand upright, its fingers along `axis` (None: as they are)."""
        world = self.env.world
        site = world.robots[0].eef_site_id
        move = np.clip(GAIN * (target - world.sim.data.site_xpos[site]) / POSITION_SCALE, -1, 1)
        now = np.array(world.sim.data.site_xmat[site]).reshape(3, 3)
        fingers = self._hand_axis() if axis is None else axis * (1.0 if axis @ now[:, 0] >= 0 else -1.0)
        down = np.array([0.0, 0.0, -1.0])
        wanted = np.stack([fingers, np.cross(down, fingers), down], axis=1)
        turn = 0.5 * np.cross(now, wanted, axis=0).sum(axis=1)
        turn = np.clip(turn / ROTATION_SCALE, -MAX_TURN, MAX_TURN)
        return np.concatenate([move, turn, [gripper]]).astype(np.float32)

    # -- measurements ---------------------------------------------------------------------------------------

    def _holds(self, hand: np.ndarray, grip: Grip) -> bool:
        """Return whether the thing is between the fingers and both touch it."""
        beside = float(np.linalg.norm((grip.point - hand)[:2]))
        return beside < 0.03 and self._opening() > grip.narrowest - SLACK and self.env.grasps(self.thing)

    def _fingers(self) -> list[int]:
        return list(self.env.world.robots[0]._ref_gripper_joint_pos_indexes)

    def _opening(self) -> float:
        """Return the gap between the fingers, metres."""
        left, right = self.env.world.sim.data.qpos[self._fingers()]
        return float(left - right)

    def _closing(self) -> bool:
        """Return whether the fingers still move together."""
        left, right = self.env.world.sim.data.qvel[self.env.world.robots[0]._ref_gripper_joint_vel_indexes]
        return float(left - right) < -0.02

    def _hand_axis(self) -> np.ndarray:
        """Return the horizontal unit vector (3,) along which the fingers close now."""
        world = self.env.world
        x, y = world.sim.data.site_xmat[world.robots[0].eef_site_id].reshape(3, 3)[:2, 0]
        return np.array([x, y, 0.0]) / max(np.hypot(x, y), 1e-6)

    def _corners(self, name: str) -> np.ndarray:
        """Return the corners of the collision boxes of an object, metres (boxes, 8, 3)."""
        world = self.env.world
        model, data = world.sim.model, world.sim.data
        ids = [model.geom_name2id(geom) for geom in world.objects_dict[name].contact_geoms]
        signs = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, 8).T
        local = model.geom_aabb[ids][:, None, :3] + signs * model.geom_aabb[ids][:, None, 3:]
        turned = np.einsum("bij,bcj->bci", data.geom_xmat[ids].reshape(-1, 3, 3), local)
        return turned + data.geom_xpos[ids][:, None]

    def _grip(self, axis: np.ndarray | None = None) -> Grip:
        """Return how to hold the thing as it lies now, near its top; along `axis`, or (None) the best one.

        The best crosses the thing's narrow side, turns little, and keeps the palm off what is around.
        """
        corners = self._corners(self.thing)
        bottom, top = float(corners[..., 2].min()), float(corners[..., 2].max())
        height = max(top - TO_PALM, LOWEST)
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
        away = self._around(height)[:, None] - centres
        inside = np.minimum(PALM[0] - abs((away * axes).sum(-1)), PALM[1] - abs((away * across).sum(-1)))
        hit = inside.max(axis=0, initial=0.0)
        turn = np.arccos(np.clip(np.abs(axes @ self._hand_axis()[:2]), 0.0, 1.0))
        yaw = np.arccos(np.abs(axes[:, 1]))
        cost = widths + 0.005 * (yaw + turn) + 0.3 * np.abs(shifts) + 10 * hit
        cost += (widths > WIDEST) + (np.abs(shifts) + 0.012 > lengths / 2) * (shifts != 0)
        best = int(np.argmin(cost))
        point, along = np.array([*centres[best], height]), np.array([*axes[best], 0.0])
        return Grip(point, along, float(widths[best]), float(narrowest), bottom)

    def _around(self, height: float) -> np.ndarray:
        """Return where (n, 2) the other things' corners are that reach the palm of a hand at `height`."""
        others = [name for name in self.env.world.objects_dict if name != self.thing]
        corners = np.concatenate([self._corners(name).reshape(-1, 3) for name in others])
        return corners[corners[:, 2] > height + TO_PALM, :2]


def _span(values: np.ndarray) -> np.ndarray:
    """Return the length of the range of each column (n, columns) -> (columns,)."""
    return values.max(axis=0) - values.min(axis=0)


def _middle(values: np.ndarray) -> np.ndarray:
    """Return the middle of the range of each column (n, columns) -> (columns,)."""
    return (values.max(axis=0) + values.min(axis=0)) / 2
