"""Success by delay of inference: a robot that waits, one that does not, and ours, on the tabletop world.

    python -m paper.bench_delay                                   # 200 episodes a cell; the last line is JSON
    python -m paper.bench_delay --episodes 40 --delays 0 200      # smaller

The control rate is 10 Hz. An answer to the observation of step t is there at step t + delay, and the world
goes on meanwhile. Methods, all with the same policy, episodes and horizon:
  blocking  the robot stands still until the answer, then executes EXECUTE actions of it
  naive     the robot asks when EXECUTE actions are done, goes on with the rest of the chunk, and starts the
            answer at its first action when it comes
  latest    `worldvla.serve.client.Plan`: always one request under way, and an answer starts at
            the action of the present step
  blend     the same, actions of overlapping chunks averaged
  imagined  as latest, but the world model first imagines the actions that are executed meanwhile, and
            the policy answers for the step in which its answer comes
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro

from worldvla.eval.stats import Pairs, mcnemar, paired_interval, wilson
from worldvla.files import write_json
from worldvla.infer.model import load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.serve.client import Plan, keep_still
from worldvla.sim import suites
from worldvla.sim.protocol import Task

STEP_MS = 100
BLEND = 0.5
"""Weight of an older chunk's action beside that of the next newer one."""
EXECUTE = 3
"""Actions of a chunk that the shipped model's evaluations execute."""
STILL = [0.0] * 6 + [float("nan")]
Method = Literal["blocking", "naive", "latest", "blend", "imagined"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass
class Robot:
    """One episode under one method. `delay` in steps."""

    env: Any
    method: str
    delay: int
    plan: Plan = field(init=False)
    step: int = 0
    asked: int | None = None
    """The step whose observation is being answered."""
    answer: np.ndarray | None = None
    begin: int = 0
    """Step at which the first action of the present chunk is executed."""
    chunk: np.ndarray | None = None
    last: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.plan = Plan(BLEND if self.method == "blend" else 0.0)

    def wants(self) -> bool:
        """Return whether this step's observation is sent."""
        self._take()
        if self.asked is not None:
            return False
        if self.is_planned:
            return True
        return self.chunk is None or self.step - self.begin >= EXECUTE

    def act(self) -> np.ndarray:
        """Return the action of this step."""
        self._take()
        if self.is_planned:
            action = self.plan.action(self.step)
        else:
            last = EXECUTE if self.method == "blocking" else len(self.chunk) if self.chunk is not None else 0
            index = self.step - self.begin
            action = self.chunk[index] if self.chunk is not None and index < last else None
        self.step += 1
        self.last = self._still_or(action)
        return self.last

    @property
    def is_planned(self) -> bool:
        return self.method in ("latest", "blend", "imagined")

    def committed(self) -> np.ndarray:
        """Return the actions that are executed before the answer to this step's question, (delay, A)."""
        return np.array([self._still_or(self.plan.action(self.step + ahead)) for ahead in range(self.delay)])

    def _still_or(self, action: np.ndarray | None) -> np.ndarray:
        moving = keep_still(STILL, self.last) if action is None else action
        assert moving is not None
        return moving

    def _take(self) -> None:
        """Take an answer that is there."""
        if self.asked is not None and self.step - self.asked >= self.delay:
            assert self.answer is not None
            ahead = self.delay if self.method == "imagined" else 0
            self.plan.add(self.asked + ahead, self.answer)
            self.chunk, self.begin, self.asked = self.answer, self.step, None


def imagine(world: World, robots: list[Robot], seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what each robot is expected to see when its answer comes."""
    names = [name for name in seen[0] if name != "instruction"]
    frames = world.reset({name: np.stack([observation[name] for observation in seen]) for name in names})
    for actions in np.stack([robot.committed() for robot in robots], axis=1):
        frames = world.step(actions)
    assert isinstance(frames, dict)
    assert world.state is not None
    frames["state"] = world.state
    return [seen[i] | {name: frames[name][i] for name in names} for i in range(len(seen))]


def run(policy: Policy, method: str, delay: int, episodes: list[tuple[Task, int]], width: int) -> list[bool]:
    """Return whether each episode succeeds; `width` of them go in parallel, answered together."""
    outcomes: dict[int, bool] = {}
    waiting = list(enumerate(episodes))
    busy: dict[int, Robot] = {}
    while waiting or busy:
        while waiting and len(busy) < width:
            number, (task, init) = waiting.pop(0)
            env: Any = suites.make(task, policy.model.view_sizes)
            env.rendering = False
            env.reset(options={"init": init})
            busy[number] = Robot(env, method, delay)
        asking = [robot for robot in busy.values() if robot.wants()]
        if asking:
            seen = [r.env.observe() | {"instruction": r.env.task.instruction} for r in asking]
            if method == "imagined" and delay:
                seen = imagine(World(policy.model), asking, seen)
            for robot, actions in zip(asking, policy.act(seen), strict=True):
                robot.asked, robot.answer = robot.step, actions
        for number, robot in list(busy.items()):
            _, _, succeeded, is_over, _ = robot.env.step(robot.act())
            if succeeded or is_over:
                outcomes[number] = bool(succeeded)
                robot.env.close()
                del busy[number]
    return [outcomes[i] for i in range(len(episodes))]


def paired(before: list[bool], after: list[bool]) -> dict[str, Any]:
    """Return the difference after - before in points, with interval and McNemar's p."""
    both = sum(a and b for a, b in zip(after, before, strict=True))
    only_a, only_b = sum(after) - both, sum(before) - both
    pairs = Pairs(both, only_a, only_b, len(after) - both - only_a - only_b)
    low, high = paired_interval(pairs)
    points = {"points": 100 * pairs.difference, "interval_95": [100 * low, 100 * high]}
    return points | {"p": mcnemar(only_a, only_b)}


def main(
    checkpoint: str = "tabletop",
    episodes: int = 200,
    delays: tuple[int, ...] = (0, 100, 200, 300, 400, 500),
    methods: tuple[Method, ...] = METHODS,
    width: int = 20,
    out: Path | None = None,
) -> None:
    """Measure success by delay, in ms; `width`: episodes in parallel; `out`: JSON with each outcome too."""
    torch.set_num_threads(1)
    policy = Policy(load(checkpoint))
    tasks = [task for suite in suites.TABLETOP for task in suites.tasks(suite)]
    chosen = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(episodes)]
    outcomes: dict[str, dict[int, list[bool]]] = {method: {} for method in methods}
    with progress_bar() as progress:
        cells = [(method, delay) for delay in delays for method in methods]
        for method, delay in progress.track(cells, description="method and delay"):
            outcomes[method][delay] = run(policy, method, delay // STEP_MS, chosen, width)
    rows = []
    for method, by_delay in outcomes.items():
        for delay, won in by_delay.items():
            row = {"method": method, "delay_ms": delay, "successes": sum(won), "episodes": len(won)}
            row |= {"wilson_95": wilson(sum(won), len(won))}
            if 0 in by_delay and delay:
                row["against_no_delay"] = paired(by_delay[0], won)
            rows.append(row)
            against = row.get("against_no_delay")
            text = f"{against['points']:+.1f} points against no delay" if against else ""
            print(f"{method:<9}{delay:>4} ms  {sum(won):>3}/{len(won)}  {text}")
    record = {"bench": "delay", "model": policy.model.identity(), "rows": rows, **provenance()}
    record |= {"outcomes": {m: {str(d): won for d, won in by.items()} for m, by in outcomes.items()}}
    if out:
        write_json(out, record)
    print(json.dumps({k: v for k, v in record.items() if k != "outcomes"}))


if __name__ == "__main__":
    tyro.cli(main)
