"""The built-in world as a gymnasium environment: LIBERO's actions and observations, MuJoCo physics, a
ray-cast camera.

env = make(tasks("tabletop_object")[0])
observation, _ = env.reset(options={"init": 0})
"""

import zlib
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from worldvla.sim.protocol import (
    FPS,
    NUM_ACTION_DIMS,
    POSITION_SCALE,
    ROTATION_SCALE,
    RULES,
    VIEWS,
    Task,
    init_index,
    spaces,
)
from worldvla.sim.tabletop import world
from worldvla.sim.tabletop.camera import RayCamera
from worldvla.sim.tabletop.tasks import FIXTURE_JITTER, JITTER, SPECS, Goal

DEFAULT_VIEWS = RULES["tabletop"].views
SETTLE_STEPS = 25
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_FOOTPRINT = {"basket": world.BASKET_HALF, "cabinet": world.CABINET_HALF[:2], "button": (0.034, 0.034)}


class TabletopEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One task. Deterministic: the same init and actions give the same bytes. `options={"init": i}`: 0 to 49
    are the fixed evaluation states, any larger i another state of the same distribution (demonstrations use
    those)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS["tabletop"]}  # noqa: RUF012

    def __init__(self, task: Task, horizon: int, views: dict[str, tuple[int, int]] | None = None) -> None:
        self.task = task
        self.scene = SPECS[task.suite][task.index]
        self.horizon = horizon
        self.rendering = True
        self.model = world.build(self.scene)
        self.data = mujoco.MjData(self.model)
        self.views = dict(DEFAULT_VIEWS if views is None else views)
        if unknown := set(self.views) - set(VIEWS):
            raise ValueError(f"unknown views {sorted(unknown)}; tabletop has {VIEWS}")
        self._cameras = {name: RayCamera(self.model, name, *size) for name, size in self.views.items()}
        self._joint = {self.model.joint(i).name: self.model.joint(i) for i in range(self.model.njnt)}
        self._grip = self.model.site("grip").id
        self._hand = [
            int(self._joint[f"hand_{a}"].qposadr[0]) for a in ("x", "y", "z", "yaw", "pitch", "roll")
        ]
        self._fingers = [int(self._joint[f"{side}_finger"].qposadr[0]) for side in ("left", "right")]
        self._tips = {self.model.geom(f"{side}_tip").id: bit for bit, side in ((1, "left"), (2, "right"))}
        self._cap_rgba = (
            self.model.geom("button_cap").rgba.copy() if "button" in self.scene.fixtures else None
        )
        self._steps = 0
        self.observation_space, self.action_space = spaces(self.views)

    # -- gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        index = init_index(options, self.np_random)
        rng = np.random.default_rng([zlib.crc32(f"{self.task.suite}/{self.task.name}".encode()), index])
        mujoco.mj_resetData(self.model, self.data)
        self._steps = 0
        self._place(rng)
        hand = np.array([*world.HOME, 0.0, 0.0, 0.0])
        hand[:3] += rng.uniform(-1, 1, 3) * (0.06, 0.06, 0.04)
        hand[3] = rng.uniform(-0.2, 0.2)
        self.data.qpos[self._hand] = hand
        self.data.qpos[self._fingers] = world.FINGER_OPEN
        self.data.ctrl[:6] = hand
        self.data.ctrl[6:] = world.FINGER_OPEN
        if self.scene.drawer_open:
            self.data.qpos[self._joint["drawer"].qposadr] = world.DRAWER_TRAVEL
        mujoco.mj_step(self.model, self.data, SETTLE_STEPS)
        self._refresh()
        return self.observe_if(), self.info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (NUM_ACTION_DIMS,) or not np.all(np.isfinite(action)):
            raise ValueError(
                f"action must be {NUM_ACTION_DIMS} finite numbers, got shape {action.shape}: {action}"
            )
        action = np.clip(action, -1.0, 1.0)
        pose = self.data.qpos[self._hand]
        goal = pose.copy()
        goal[:3] = np.clip(pose[:3] + POSITION_SCALE * action[:3], world.LOW, world.HIGH)
        goal[3:] = np.clip(pose[3:] + ROTATION_SCALE * action[[5, 4, 3]], -0.8, 0.8)
        self.data.ctrl[:6] = goal
        self.data.ctrl[6:] = -0.02 if action[6] > 0 else world.FINGER_OPEN
        mujoco.mj_step(self.model, self.data, world.SUBSTEPS)
        self._steps += 1
        self._refresh()
        info = self.info()
        success = info["success"]
        return self.observe_if(), float(success), success, self._steps >= self.horizon and not success, info

    def close(self) -> None:
        self._cameras = {}

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._cameras["agentview"].render(self.data)

    # -- the simulator protocol -----------------------------------------------------------------------------

    def observe(self) -> dict[str, Any]:
        """Return images (uint8) and state (8,) float32: position (m), axis-angle (rad), finger joints (m)."""
        return {
            **{name: camera.render(self.data) for name, camera in self._cameras.items()},
            "state": self.proprioception(),
        }

    def observe_if(self) -> dict[str, Any]:
        return self.observe() if self.rendering else {"state": self.proprioception()}

    def proprioception(self) -> np.ndarray:
        quat, axis_angle = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quat, self.data.site_xmat[self._grip])
        mujoco.mju_quat2Vel(axis_angle, quat, 1.0)
        fingers = self.data.qpos[self._fingers] * (1.0, -1.0)  # the right one is negative, as in robosuite
        return np.concatenate([self.data.site_xpos[self._grip], axis_angle, fingers]).astype(np.float32)

    def get_state(self) -> np.ndarray:
        state = np.zeros(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, state, _STATE)
        return state

    def set_state(self, state: np.ndarray) -> None:
        size = mujoco.mj_stateSize(self.model, _STATE)
        if np.shape(state) != (size,):
            raise ValueError(
                f"simulator state of {self.task.name} has {size} numbers, got shape {np.shape(state)}"
            )
        mujoco.mj_setState(self.model, self.data, np.asarray(state, dtype=np.float64), _STATE)
        self._refresh()

    def target_position(self) -> np.ndarray:
        """Return where the hand has to go first for the first unmet goal, metres (3,)."""
        return self.goal_position(
            next((g for g in self.scene.goals if not self.holds(g)), self.scene.goals[-1])
        )

    # -- state, goals ---------------------------------------------------------------------------------------

    def grip_position(self) -> np.ndarray:
        return self.data.site_xpos[self._grip].copy()

    def position(self, body: str) -> np.ndarray:
        return self.data.body(body).xpos.copy()

    def goal_position(self, goal: Goal) -> np.ndarray:
        if goal.verb in ("open", "closed"):
            return self.data.geom("handle").xpos.copy()
        if goal.verb == "pressed":
            return self.data.geom("button_cap").xpos.copy()
        return self.position(goal.thing)

    def points_of_interest(self) -> np.ndarray:
        """Return where things and fixtures (the cabinet's handle, the button's cap) are, metres (P, 3)."""
        parts = {"cabinet": "handle", "button": "button_cap"}
        fixtures = [
            self.data.geom(parts[name]).xpos if name in parts else self.position(name)
            for name in self.scene.fixtures
        ]
        return np.array([*map(self.position, self.scene.things), *fixtures])

    def in_contact(self) -> bool:
        """Return whether fingers or palm touch anything but the table."""
        pairs = self.data.contact.geom[: self.data.ncon]  # (contacts, 2)
        is_hand = np.isin(pairs, [*self._tips, self.model.geom("palm").id]).any(axis=1)
        return bool(np.any(is_hand & (pairs != self.model.geom("table").id).all(axis=1)))

    def drawer(self) -> float:
        """Return how far the drawer stands open, metres."""
        return float(self.data.qpos[self._joint["drawer"].qposadr[0]])

    def touching(self, body: str) -> int:
        """Return the fingers in contact with `body`: 0 none, 1 left, 2 right, 3 both."""
        pairs = self.data.contact.geom[: self.data.ncon]  # (contacts, 2)
        bodies = self.model.geom_bodyid[pairs] == self.model.body(body).id
        found = 0
        for geom, bit in self._tips.items():
            found |= bit * bool(np.any((pairs == geom) & bodies[:, ::-1]))
        return found

    def holds(self, goal: Goal) -> bool:
        """Return whether `goal` is satisfied now."""
        if goal.verb == "open":
            return self.drawer() > 0.8 * world.DRAWER_TRAVEL
        if goal.verb == "closed":
            return self.drawer() < 0.01
        if goal.verb == "pressed":
            return bool(self.data.userdata[0])
        thing = self.position(goal.thing)
        if goal.verb != "push" and self.touching(goal.thing):
            return False
        x, y = thing[:2] - self.position(goal.where)[:2]
        bottom = thing[2] - world.half_height(goal.thing)
        if goal.verb == "push":
            return max(abs(x), abs(y)) < world.ZONE_HALF - 0.005 and bottom < 0.02
        if goal.verb == "in" and goal.where == "basket":
            return abs(x) < world.BASKET_HALF[0] and abs(y) < world.BASKET_HALF[1] and bottom < 0.03
        if goal.verb == "in":  # the drawer slides with the cabinet's -y
            return (
                abs(x) < world.CABINET_HALF[0]
                and abs(y + self.drawer()) < world.CABINET_HALF[1]
                and 0.0 < bottom < 0.04
            )
        if goal.where == "cabinet":
            top = 2 * world.CABINET_HALF[2]
            return (
                abs(x) < world.CABINET_HALF[0] and abs(y) < world.CABINET_HALF[1] and abs(bottom - top) < 0.02
            )
        return bool(np.hypot(x, y) < world.PLATE_RADIUS and bottom < 0.02)

    def info(self) -> dict[str, Any]:
        """Return whether the task is done (`success`) and a thing of it is in the hand (`grasped`)."""
        held = any(g.thing and self.touching(g.thing) == 3 for g in self.scene.goals)
        held = held or any(
            g.verb in ("open", "closed") and self.touching("drawer") == 3 for g in self.scene.goals
        )
        return {"success": all(self.holds(g) for g in self.scene.goals), "grasped": held}

    # -- internals ------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        mujoco.mj_forward(self.model, self.data)
        if self._cap_rgba is not None:
            if self.data.qpos[self._joint["button"].qposadr[0]] > 0.6 * world.BUTTON_TRAVEL:
                self.data.userdata[0] = 1.0
            lit = bool(self.data.userdata[0])
            self.model.geom("button_cap").rgba = (0.2, 0.95, 0.3, 1.0) if lit else self._cap_rgba

    def _place(self, rng: np.random.Generator) -> None:
        """Draw places until no two footprints touch; a scene that cannot be drawn is a bug in the table."""
        for _ in range(200):
            things = {n: np.add(p, rng.uniform(-JITTER, JITTER, 2)) for n, p in self.scene.things.items()}
            fixtures = {
                n: np.add(p, rng.uniform(-FIXTURE_JITTER, FIXTURE_JITTER, 2))
                for n, p in self.scene.fixtures.items()
            }
            if self._clear(things, fixtures):
                break
        else:
            raise RuntimeError(
                f"{self.task.name}: no collision-free placement in 200 draws; its slots overlap"
            )
        for name, xy in fixtures.items():
            self.data.mocap_pos[self.model.body(name).mocapid[0]] = (*xy, 0.0)
        for name, xy in things.items():
            start = int(self._joint[name].qposadr[0])
            yaw = rng.uniform(-0.2, 0.2)
            height = world.half_height(name) + 0.001
            self.data.qpos[start : start + 7] = (*xy, height, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))

    @staticmethod
    def _clear(things: dict[str, np.ndarray], fixtures: dict[str, np.ndarray]) -> bool:
        names = list(things)
        for i, a in enumerate(names):
            if any(np.all(np.abs(things[a] - things[b]) < (0.095, 0.07)) for b in names[i + 1 :]):
                return False
            for fixture in fixtures.keys() & _FOOTPRINT.keys():
                reach = np.add(_FOOTPRINT[fixture], (0.072, 0.042))  # room for an open gripper
                if np.all(np.abs(things[a] - fixtures[fixture]) < reach):
                    return False
        return True
