"""The robot's hand in LIBERO: what is measured of it and around it, and how it moves to where it should be.

Positions are metres in robosuite's world frame; the hand is the point between the fingertips.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldvla.sim.libero.env import LiberoEnv
from worldvla.sim.protocol import POSITION_SCALE, ROTATION_SCALE

GAIN = 2.0
"""The controller covers only part of the asked way in one step."""
MAX_TURN = 0.4
ALIGNED = 0.010
SPACING = 0.015
"""Of the points that stand for what is around, metres."""
FINGERTIP = 0.013
"""How far the fingertips reach below the hand's point, metres."""
DOWN = np.array([0.0, 0.0, -1.0])
SIGNS = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, 8).T


@dataclass(frozen=True)
class Joint:
    """A hinge or a slide of a fixture, as it stands now."""

    value: float
    """Radians or metres."""
    axis: np.ndarray
    """Unit vector (3,) along or about which it moves."""
    anchor: np.ndarray
    """A point on the axis, metres (3,)."""
    corners: np.ndarray
    """Of the collision boxes that it moves, metres (boxes, 8, 3)."""


class Hand:
    """Measurements and motions of one environment. Ids are looked up once for each compiled model."""

    def __init__(self, env: LiberoEnv) -> None:
        self.env = env
        self._model: Any = None

    # -- measurements ---------------------------------------------------------------------------------------

    @property
    def position(self) -> np.ndarray:
        """Where the hand is, metres (3,)."""
        return np.array(self.env.world.sim.data.site_xpos[self.env.world.robots[0].eef_site_id])

    @property
    def rotation(self) -> np.ndarray:
        """Columns: the way the fingers close, across it, the way they point; (3, 3)."""
        return self.env.world.sim.data.site_xmat[self.env.world.robots[0].eef_site_id].reshape(3, 3)

    @property
    def axis(self) -> np.ndarray:
        """Horizontal unit vector (3,) along which the fingers close now."""
        x, y = self.rotation[:2, 0]
        return np.array([x, y, 0.0]) / max(np.hypot(x, y), 1e-6)

    @property
    def upright(self) -> float:
        """Cosine of the angle between where the fingers point and straight down."""
        return -float(self.rotation[2, 2])

    @property
    def opening(self) -> float:
        """The gap between the fingers, metres."""
        left, right = self.env.world.sim.data.qpos[self.env.world.robots[0]._ref_gripper_joint_pos_indexes]
        return float(left - right)

    @property
    def closing(self) -> bool:
        """Whether the fingers still move together."""
        left, right = self.env.world.sim.data.qvel[self.env.world.robots[0]._ref_gripper_joint_vel_indexes]
        return float(left - right) < -0.02

    def corners(self, name: str) -> np.ndarray:
        """Return the corners of the collision boxes of an object or a fixture, metres (boxes, 8, 3)."""
        return self._world_corners(self._shapes()[name])

    def normals(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of each collision box its middle (boxes, 3), its thinnest direction (boxes, 3) and half its
        thickness there (boxes,)."""
        ids = self._shapes()[name]
        world = self.env.world
        halves = world.sim.model.geom_aabb[ids][:, 3:]
        thin = np.argmin(halves, axis=1)
        rows = np.arange(len(ids))
        turned = world.sim.data.geom_xmat[ids].reshape(-1, 3, 3)
        return world.sim.data.geom_xpos[ids], turned[rows, :, thin], halves[rows, thin]

    def look(self) -> None:
        """Measure where everything is now; `around` and `highest_on_way` speak of this moment."""
        self._shapes()
        data = self.env.world.sim.data
        turned = data.geom_xmat[self._owners].reshape(-1, 3, 3) @ self._points[:, :, None]
        self._seen = turned[:, :, 0] + data.geom_xpos[self._owners]

    def around(self, thing: str, lowest: float) -> np.ndarray:
        """Return points (n, 3) of everything but `thing` that is higher than `lowest`, metres."""
        wanted = self._seen[:, 2] > lowest
        if thing in self._spans:
            wanted[self._spans[thing]] = False
        return self._seen[wanted]

    def highest_on_way(self, goal: np.ndarray, thing: str, radius: float) -> float:
        """Return how high what lies within `radius` of the straight way to `goal` (2,) is, metres."""
        start = self.position[:2]
        way = goal - start
        points = self.around(thing, -np.inf)
        along = np.clip((points[:, :2] - start) @ way / max(float(way @ way), 1e-9), 0.0, 1.0)
        away = points[:, :2] - start - along[:, None] * way
        near = (away**2).sum(axis=1) < radius**2
        return float(points[near, 2].max(initial=-np.inf))

    def joint(self, name: str) -> Joint:
        """Return the joint of a region (a drawer's) or of a fixture (a stove's knob, a microwave's door)."""
        world = self.env.world
        owner = world.object_sites_dict.get(name) or world.get_object(name)
        model, data = world.sim.model, world.sim.data
        index = model.joint_name2id(owner.joints[0])
        body = model.jnt_bodyid[index]
        collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        geoms = np.flatnonzero((model.geom_bodyid == body) & collides)
        return Joint(
            float(data.qpos[model.jnt_qposadr[index]]),
            np.array(data.xaxis[index]),
            np.array(data.xanchor[index]),
            np.array([np.zeros(3)]) if not len(geoms) else self._world_corners(geoms),
        )

    def _world_corners(self, ids: np.ndarray) -> np.ndarray:
        world = self.env.world
        boxes = world.sim.model.geom_aabb[ids]
        local = boxes[:, None, :3] + SIGNS * boxes[:, None, 3:]
        turned = np.einsum("bij,bcj->bci", world.sim.data.geom_xmat[ids].reshape(-1, 3, 3), local)
        return turned + world.sim.data.geom_xpos[ids][:, None]

    def _shapes(self) -> dict[str, np.ndarray]:
        """Return the ids of the collision boxes of each object and fixture; spread points over them."""
        world = self.env.world
        if self._model is not world.sim.model:
            self._model = model = world.sim.model
            self._ids, self._spans, owners, points = {}, {}, [], []
            for name, thing in {**world.objects_dict, **world.fixtures_dict}.items():
                start = len(owners)
                for geom in [model.geom_name2id(geom) for geom in getattr(thing, "contact_geoms", ())]:
                    box = model.geom_aabb[geom]
                    steps = [np.linspace(-1, 1, 2 + int(2 * half / SPACING)) for half in box[3:]]
                    grid = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 3)
                    points.extend(box[:3] + grid * box[3:])
                    owners.extend([geom] * len(grid))
                if len(owners) > start:
                    self._spans[name] = slice(start, len(owners))
                    self._ids[name] = np.unique(owners[start:])
            self._owners, self._points = np.array(owners), np.array(points)
        return self._ids

    # -- motions --------------------------------------------------------------------------------------------

    def towards(
        self, target: np.ndarray, gripper: float, axis: np.ndarray | None = None, point: np.ndarray = DOWN
    ) -> np.ndarray:
        """Return the action (7,) to `target`: fingers closing along `axis` (None: as now), pointing along
        `point`."""
        move = np.clip(GAIN * (target - self.position) / POSITION_SCALE, -1, 1)
        now = self.rotation
        fingers = now[:, 0] - (now[:, 0] @ point) * point if axis is None else axis
        fingers = fingers / max(float(np.linalg.norm(fingers)), 1e-6)
        fingers = fingers * (1.0 if fingers @ now[:, 0] >= 0 else -1.0)
        wanted = np.stack([fingers, np.cross(point, fingers), point], axis=1)
        turn = 0.5 * np.cross(now, wanted, axis=0).sum(axis=1)
        turn = np.clip(turn / ROTATION_SCALE, -MAX_TURN, MAX_TURN)
        return np.concatenate([move, turn, [gripper]]).astype(np.float32)

    def rise_first(self, goal: np.ndarray, height: float) -> np.ndarray:
        """Return the next target (3,): sideways only as far as the hand is high enough for it."""
        hand = self.position
        keep = float(np.clip(1.0 - (height - hand[2] - 0.01) / 0.03, 0.0, 1.0))
        return np.array([*(hand[:2] + keep * (goal - hand[:2])), height])

    def descend(
        self,
        target: np.ndarray,
        gripper: float,
        axis: np.ndarray | None = None,
        *,
        thing: str = "",
        extra: float = 0.0,
    ) -> np.ndarray:
        """Move to `target` (3,) down a funnel and over all but `thing` on the way; stay `extra` above."""
        distance = float(np.hypot(*(target - self.position)[:2]))
        clear = self.highest_on_way(target[:2], thing, 0.09) + FINGERTIP + 0.02
        hover = max(clear - target[2], 0.06)
        height = target[2] + extra + min(hover, 3.0 * max(0.0, distance - ALIGNED))
        return self.towards(self.rise_first(target[:2], height), gripper, axis)
