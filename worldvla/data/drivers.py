"""Who moves the hand while an episode is collected: the expert under bursts of noise, a policy, aimless play.

A driver takes each observation in turn; it returns the action to execute and whether a policy may imitate it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from worldvla.sim.protocol import CLOSE, OPEN, POSITION_SCALE, ROTATION_SCALE, Environment, Expert

Observation = dict[str, Any]
Driver = Callable[[Observation], tuple[np.ndarray, bool]]
Act = Callable[[Observation], np.ndarray]
"""Observation, as `Policy.act` takes it -> actions (U, 7)."""

BURST = (2, 5)
"""Steps of a perturbation: at least, less than."""
BURST_STD = 0.8
"""Standard deviation of a perturbation's direction, in units of an action."""
FLIP = 0.1
"""Chance that a perturbed step also flips the gripper."""


def expert_action(expert: Expert) -> np.ndarray:
    """Return the expert's action (7,) float32 in [-1, 1] for the present state."""
    return np.clip(expert.act(), -1, 1).astype(np.float32)


@dataclass
class DaggerDriver:
    """Drive by a policy, by stretches and at last by the expert: the policy's own errors are visited (DAgger,
    Ross et al. 2011; the expert ends each episode, so that one that is stuck still succeeds)."""

    act: Act
    expert: Expert
    instruction: str
    rng: np.random.Generator
    until: int
    """Steps after which the expert drives alone."""
    execute: int
    """Actions of each chunk that are executed."""
    share: float = 0.8
    """Chance that the next stretch is the policy's."""
    steps: int = 0
    ahead: list[np.ndarray] = field(default_factory=list)
    """Actions of the policy that are still to be executed."""
    expert_left: int = 0

    def __call__(self, observation: Observation) -> tuple[np.ndarray, bool]:
        if not self.ahead and not self.expert_left:
            if self.steps < self.until and self.rng.random() < self.share:
                chunk = self.act({**observation, "instruction": self.instruction})
                self.ahead = list(chunk[: self.execute])
            else:
                self.expert_left = self.execute
        self.steps += 1
        if self.ahead:
            return np.clip(self.ahead.pop(0), -1, 1).astype(np.float32), False
        self.expert_left -= 1
        return expert_action(self.expert), True


@dataclass
class Labeller:
    """Ask the expert what it does in the next `chunk` steps, in a second simulator set to that state."""

    scout: Environment
    """An environment of the same task that renders nothing."""
    expert: Expert
    chunk: int

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """Return its actions from simulator state `state` on, (U, 7)."""
        self.scout.set_state(state)
        actions = []
        for _ in range(self.chunk):
            actions.append(expert_action(self.expert))
            self.scout.step(actions[-1])
        return np.array(actions)

    def label(self, actions: list[np.ndarray], is_expert: list[bool], states: list[np.ndarray]) -> np.ndarray:
        """Return its next U actions from every state of an episode, (T, U, 7); it is asked only where the U
        actions that were executed are not its own."""
        labels = []
        for t, state in enumerate(states):
            ahead = slice(t, t + self.chunk)
            own = all(is_expert[ahead]) and len(actions[ahead]) == self.chunk
            labels.append(np.array(actions[ahead]) if own else self(state))
        return np.array(labels)


@dataclass
class PerturbedExpert:
    """Drive by the expert, with bursts of strong noise from which it then recovers.

    Only the steps without noise may be imitated: their action is exactly the expert's.
    """

    expert: Expert
    rng: np.random.Generator
    fraction: float
    """Share of perturbed steps, about: 0.15 gives 0.158."""
    left: int = 0
    """Steps left of the present burst."""
    drift: np.ndarray = field(default_factory=lambda: np.zeros(4))
    """x, y, z and rotation that the burst adds to each action."""

    def __call__(self, observation: Observation) -> tuple[np.ndarray, bool]:  # noqa: ARG002 it looks at the state
        action = expert_action(self.expert)
        mean = (BURST[0] + BURST[1] - 1) / 2
        if not self.left and self.rng.random() < self.fraction / (mean * (1 - self.fraction)):
            self.left = int(self.rng.integers(*BURST))
            self.drift = self.rng.normal(0.0, BURST_STD, 4)
        if not self.left:
            return action, True
        self.left -= 1
        action[:3] += self.drift[:3]
        action[5] += 0.5 * self.drift[3]
        if self.rng.random() < FLIP:
            action[6] = -action[6]
        return np.clip(action, -1, 1), False


# -- for a world model: what goes wrong, too -----------------------------------------------------------------


class Stage(NamedTuple):
    """A stretch of play. It ends as the hand arrives, or after as many steps as the way should take."""

    target: np.ndarray | None
    """Metres (3,); None: stay for `steps`."""
    gripper: float
    steps: int = 0


@dataclass
class Play:
    """Move smoothly and aimlessly about the things: grasp off-centre, carry, drop, push, press, wander."""

    env: Environment
    rng: np.random.Generator
    stages: list[Stage] = field(default_factory=list)
    left: int = 0
    """Steps left of the present stage."""
    drift: np.ndarray = field(default_factory=lambda: np.zeros(4))
    """Smooth noise on x, y, z and the turn about z, in units of an action."""
    upright: Rotation | None = None
    """Orientation of the hand as play began, which it turns back to."""
    grasps: bool = False
    """Close on things and beside them, again and again, and do nothing else."""

    def __call__(self, observation: Observation) -> tuple[np.ndarray, bool]:
        rng, hand = self.rng, np.asarray(observation["state"][:3], dtype=np.float64)
        turn = Rotation.from_rotvec(observation["state"][3:6])
        self.upright = self.upright or turn
        if not self.stages:
            self.stages = self._plan()
            self._begin(hand)
        target, gripper, _ = self.stages[0]
        way = np.zeros(3) if target is None else target - hand
        self.drift = 0.7 * self.drift + rng.normal(0.0, 0.12, 4)
        move = np.clip(way / POSITION_SCALE, -1, 1) * rng.uniform(0.6, 1.0) + self.drift[:3]
        back = 0.5 * np.clip((self.upright * turn.inv()).as_rotvec() / ROTATION_SCALE, -1, 1)
        back[2] += 0.5 * self.drift[3]
        self.left -= 1
        near = 0.015 if self.grasps else 0.008  # metres
        if self.left <= 0 or (target is not None and float(np.linalg.norm(way)) < near):
            self.stages.pop(0)
            self._begin(hand)
        return np.clip([*move, *back, gripper], -1, 1).astype(np.float32), False

    def _begin(self, hand: np.ndarray) -> None:
        """Count the steps of the stage that comes next, a few more than the way takes at full speed."""
        if self.stages:
            target, _, steps = self.stages[0]
            far = 0.0 if target is None else float(np.abs(target - hand).max())
            self.left = steps or 4 + 3 * int(far / POSITION_SCALE)

    def _plan(self) -> list[Stage]:
        points = self.env.points_of_interest()
        if self.grasps:
            return self._grasp(points[self.rng.integers(len(points))])
        kinds = {self._pick: 0.5, self._push: 0.2, self._wander: 0.2, self._touch: 0.1}
        plan = list(kinds)[self.rng.choice(len(kinds), p=list(kinds.values()))]
        return plan(points, points[self.rng.integers(len(points))])

    def _pick(self, points: np.ndarray, thing: np.ndarray) -> list[Stage]:
        """Grasp, well or badly; carry to another thing or anywhere; let go, from a height or not."""
        rng = self.rng
        spread = rng.choice([0.004, 0.02])
        grip = thing + [*rng.normal(0.0, spread, 2), rng.normal(0.0, 0.008)]
        place = self._anywhere(points) if rng.random() < 0.5 else points[rng.integers(len(points))]
        low = np.array([*(place[:2] + rng.normal(0.0, 0.02, 2)), self._height(points, 0.03, 0.14)])
        return [
            Stage(_up(grip, 0.08), OPEN),
            Stage(grip, OPEN),
            Stage(None, CLOSE, int(rng.integers(1, 4))),
            Stage(_up(grip, rng.uniform(0.06, 0.15)), CLOSE),
            Stage(_up(low, 0.05), CLOSE),
            Stage(low, CLOSE),
            Stage(None, OPEN, 2),
            Stage(_up(low, 0.08), OPEN),
        ]

    def _grasp(self, thing: np.ndarray) -> list[Stage]:
        """Close up to MISS beside a thing, lift a little, let go."""
        rng, angle = self.rng, self.rng.uniform(0, 2 * np.pi)
        aside = rng.uniform(0.0, MISS) * np.array([np.cos(angle), np.sin(angle), 0.0])
        grip = _up(thing + aside, rng.normal(0.0, 0.01))
        return [
            Stage(_up(grip, 0.07), OPEN),
            Stage(grip, OPEN),
            Stage(None, CLOSE, 3),
            Stage(_up(grip, rng.uniform(0.02, 0.08)), CLOSE),
            Stage(None, OPEN, 2),
        ]

    def _push(self, points: np.ndarray, thing: np.ndarray) -> list[Stage]:
        """Come down beside a thing and sweep through it."""
        rng, angle = self.rng, self.rng.uniform(0, 2 * np.pi)
        along = np.array([np.cos(angle), np.sin(angle), 0.0])
        gripper, height = rng.choice([OPEN, CLOSE], p=[0.3, 0.7]), self._height(points, 0.0, 0.01)
        start, end = thing - 0.08 * along, thing + rng.uniform(0.02, 0.15) * along
        start[2] = end[2] = height
        stages = (_up(start, 0.09), start, end, _up(end, 0.09))
        return [Stage(target, gripper) for target in stages]

    def _touch(self, points: np.ndarray, thing: np.ndarray) -> list[Stage]:  # noqa: ARG002 as the others
        """Press on a thing with closed fingers, then pull: buttons, handles."""
        rng = self.rng
        at = thing + [*rng.normal(0.0, 0.01, 2), rng.uniform(0.0, 0.03)]
        pull = Stage(at + [0.0, rng.uniform(-0.12, 0.05), 0.0], rng.choice([OPEN, CLOSE]))
        return [Stage(_up(at, 0.08), CLOSE), Stage(at, CLOSE), pull, Stage(_up(at, 0.1), OPEN)]

    def _wander(self, points: np.ndarray, thing: np.ndarray) -> list[Stage]:  # noqa: ARG002 as the others
        return [Stage(self._anywhere(points), self.rng.choice([OPEN, CLOSE])) for _ in range(3)]

    def _anywhere(self, points: np.ndarray) -> np.ndarray:
        low, high = points.min(axis=0)[:2] - 0.06, points.max(axis=0)[:2] + 0.06
        return np.array([*self.rng.uniform(low, high), self._height(points, 0.03, 0.22)])

    def _height(self, points: np.ndarray, low: float, high: float) -> float:
        """Draw a height, metres above the lowest point."""
        return float(points[:, 2].min()) + self.rng.uniform(low, high)


def _up(point: np.ndarray, height: float) -> np.ndarray:
    return point + [0.0, 0.0, height]


@dataclass
class Turns:
    """Let drivers take turns of 8 to 29 steps, drawn anew each time."""

    drivers: Sequence[Driver]
    rng: np.random.Generator
    left: int = 0
    current: int = 0

    def __call__(self, observation: Observation) -> tuple[np.ndarray, bool]:
        if not self.left:
            self.current = int(self.rng.integers(len(self.drivers)))
            self.left = int(self.rng.integers(8, 30))
        self.left -= 1
        return self.drivers[self.current](observation)


@dataclass
class Astray:
    """Drive as the expert would if the hand stood elsewhere: approach, close, carry and let go, all beside
    the things, as a weak policy does.

    The hand is moved aside; from then on it executes what the expert does in a second simulator that began in
    the same state. After its success there, or after `lost` steps, `then` drives.
    """

    env: Environment
    scout: Environment
    """An environment of the same task that renders nothing."""
    expert: Expert
    """The scout's."""
    then: Driver
    aside: np.ndarray
    """Metres (2,), level."""
    lost: int
    moves: list[np.ndarray] | None = None
    """Actions that move the hand aside, still to be executed; None before the first step."""

    def __call__(self, observation: Observation) -> tuple[np.ndarray, bool]:
        if self.moves is None:
            self.scout.set_state(self.env.get_state())
            steps = math.ceil(np.abs(self.aside).max() / POSITION_SCALE)
            move = [*self.aside / steps / POSITION_SCALE, 0, 0, 0, 0, OPEN]
            self.moves = steps * [np.array(move, dtype=np.float32)]
        if self.moves:
            return self.moves.pop(), False
        if self.lost <= 0:
            return self.then(observation)
        action, self.lost = expert_action(self.expert), self.lost - 1
        if self.scout.step(action)[2]:
            self.lost = 0
        return action, False


WORLD_MIX = {"expert": 0.1, "gross": 0.15, "astray": 0.25, "policy": 0.2, "play": 0.2, "mixed": 0.1}
"""Kind of episode -> its share. Without a policy the others keep their proportions."""
ASTRAY = (0.015, 0.08)
"""How far beside the things an astray hand acts, metres: at least, at most."""
MISS = 0.05
"""How far beside a thing a hand closes that tries grasps, metres, at most."""
AFTER_SUCCESS = 4
"""Steps that an episode of an expert or a policy goes on after its success."""


def world_driver(
    env: Environment,
    expert: Expert,
    scout: tuple[Environment, Expert],
    rng: np.random.Generator,
    act: Act | None,
    execute: int,
    grasps: bool,
) -> tuple[Driver, int, int]:
    """Draw the driver of an episode of world data, or return the one that tries `grasps`; with it the most
    steps of the episode, and how many it goes on from its success. `scout`: see `Astray`."""
    if grasps:
        return Play(env, rng, grasps=True), int(env.horizon), int(env.horizon)
    mix = {kind: share for kind, share in WORLD_MIX.items() if kind != "policy" or act is not None}
    shares = np.array(list(mix.values()))
    kind = list(mix)[rng.choice(len(mix), p=shares / shares.sum())]
    horizon = int(env.horizon)
    if kind in ("play", "mixed"):
        play = Play(env, rng)
        driver = Turns([PerturbedExpert(expert, rng, 0.3), play], rng) if kind == "mixed" else play
        length = int(rng.integers(horizon // 2, horizon + 1))
        return driver, length, length
    if kind == "policy" and act is not None:
        driver = DaggerDriver(
            _noisy(act, rng), expert, env.task.instruction, rng, horizon, execute, share=1.0
        )
    elif kind == "astray":
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(*ASTRAY)
        aside = far * np.array([np.cos(angle), np.sin(angle)])
        driver = Astray(env, *scout, PerturbedExpert(expert, rng, 0.15), aside, horizon)
    else:
        driver = PerturbedExpert(expert, rng, 0.5 if kind == "gross" else 0.15)
    return driver, horizon, AFTER_SUCCESS


def _noisy(act: Act, rng: np.random.Generator) -> Act:
    """Return `act`, for half of the episodes with noise on the motion: a weak policy's errors."""
    scale = rng.choice([0.0, 0.3]) * np.array([1, 1, 1, 0.3, 0.3, 0.3, 0])
    return lambda observation: (actions := act(observation)) + rng.normal(size=np.shape(actions)) * scale
