"""Axes of robustness: one thing about a LIBERO task changes, such as the view, the light or the words.

A change is a function of (axis, task, initial state) alone, so every policy meets the same ones. The ranges
are in AXES of worldvla/sim/protocol.py. LIBERO-Plus has such axes too, with assets and ranges of its own,
so results on the two cannot be compared.
"""

import re
from typing import Any

import numpy as np

from worldvla.sim.protocol import AXES

CHANGED = ("cam_pos", "cam_quat", "light_diffuse", "light_ambient", "light_pos", "mat_rgba", "geom_rgba")
"""Fields of MuJoCo's model that an axis may change."""
WORDS = (
    (r"^pick up (.+?) and (?:place|put) it ", r"grab \1 and set it down "),
    (r"^pick the (.+?) and (?:place|put) it ", r"grab the \1 and set it down "),
    (r"^put both ", "place both "),
    (r"^put ", "place "),
    (r"^turn on ", "switch on "),
    (r"^open ", "pull open "),
    (r"^push ", "slide "),
    (r" and put ", " and then place "),
    (r" and close it", " and then shut it"),
)
"""Beginning or part of an instruction -> other words for it."""


def split(suite: str) -> tuple[str, str]:
    """Return the suite that `suite` perturbs and the axis; itself and "" where it is none of AXES."""
    base, _, axis = suite.rpartition("_")
    return (base, axis) if axis in AXES else (suite, "")


def paraphrase(instruction: str) -> str:
    """Return the same request in other words."""
    said = instruction
    for pattern, words in WORDS:
        said = re.sub(pattern, words, said)
    return f"please {said}"


def draw(axis: str, task: int, init: int, step: int = 0) -> np.random.Generator:
    """Return the random numbers of an axis in one episode, or in one step of it."""
    return np.random.default_rng([[*AXES, ""].index(axis), task, init, step])


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a picture, uint8, with the noise of a camera."""
    spread = rng.uniform(10.0, 30.0)
    return np.clip(picture + rng.normal(0.0, spread, picture.shape), 0, 255).astype(np.uint8)


def bent_arm(world: Any, state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a state (1 + nq + nv,) with the seven joints of the arm elsewhere."""
    state, indices = state.copy(), np.array(world.robots[0]._ref_joint_pos_indexes)
    state[1 + indices] += rng.uniform(-0.1, 0.1, len(indices))
    return state


class Looks:
    """What a compiled model looks like, as it is and changed."""

    def __init__(self, world: Any) -> None:
        self.world, self.model = world, world.sim.model._model
        self._original = {name: getattr(self.model, name).copy() for name in CHANGED}

    def change(self, axis: str, rng: np.random.Generator) -> None:
        """Undo the change before and make the next one; those of other things than looks change nothing."""
        for name, values in self._original.items():
            getattr(self.model, name)[:] = values
        changes = {"camera": self._move_camera, "light": self._relight, "background": self._repaint}
        if axis in changes:
            changes[axis](rng)

    def _move_camera(self, rng: np.random.Generator) -> None:
        """Swing the front camera about what it looks at, and bring it nearer or farther."""
        camera = self.world.sim.model.camera_name2id("agentview")
        place, turn = self.model.cam_pos[camera].copy(), self.model.cam_quat[camera].copy()
        ahead = _rotated(turn, np.array([0.0, 0.0, -1.0]))
        aim = place + ahead * np.hypot(*place[:2]) / np.hypot(*ahead[:2])  # above the middle of the scene
        half = np.deg2rad(rng.uniform(-15.0, 15.0)) / 2
        swing = np.array([np.cos(half), 0.0, 0.0, np.sin(half)])
        scale = rng.uniform(0.9, 1.1)
        self.model.cam_pos[camera] = aim + scale * _rotated(swing, place - aim)
        self.model.cam_quat[camera] = _product(swing, turn)

    def _relight(self, rng: np.random.Generator) -> None:
        """Make each lamp brighter or darker, tint it, and move it."""
        number = self.model.nlight
        power = rng.uniform(0.3, 1.4) * rng.uniform(0.8, 1.2, 3)
        self.model.light_diffuse[:] *= power
        self.model.light_ambient[:] *= power
        self.model.light_pos[:] += rng.uniform(-1.0, 1.0, (number, 3))

    def _repaint(self, rng: np.random.Generator) -> None:
        """Give table, floor and walls another colour; what can be touched or moved keeps its own."""
        model, sim = self.model, self.world.sim.model
        things = {**self.world.objects_dict, **self.world.fixtures_dict}.values()
        kept = {model.body_rootid[sim.body_name2id(thing.root_body)] for thing in things}
        kept |= {
            model.body_rootid[body]
            for body in range(1, model.nbody)
            if sim.body_id2name(body).startswith(("robot0", "gripper0", "mount0"))
        }
        scene = [g for g in range(model.ngeom) if model.body_rootid[model.geom_bodyid[g]] not in kept]
        for material in sorted({int(model.geom_matid[g]) for g in scene}):
            colour = rng.uniform(0.3, 1.0, 3)
            if material >= 0:
                model.mat_rgba[material, :3] *= colour


def _rotated(turn: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Return `vector` (3,) turned by a unit quaternion (w, x, y, z)."""
    w, axis = turn[0], turn[1:]
    return vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the quaternion that turns by `b`, then by `a`."""
    w = a[0] * b[0] - a[1:] @ b[1:]
    return np.array([w, *(a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:]))])
