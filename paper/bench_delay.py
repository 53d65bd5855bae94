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

These cells charge nothing for the passes themselves. With --real-time they do: the episodes run by the wall
clock, with AsyncClient and `worldvla serve` in another process, and each request is held back by the delay.
The machine must be quiet: steps that came too late are counted. There is no naive client: it has no row.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import tyro

from paper.bench_serve import server
from worldvla.eval.stats import Pairs, mcnemar, paired_interval, wilson
from worldvla.files import write_json
from worldvla.infer.ahead import look_ahead
from worldvla.infer.model import load
from worldvla.infer.policy import Policy
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.serve.client import AsyncClient, Client, Plan
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


OPTIONS: dict[str, dict[str, Any]] = {
    "blocking": {"execute": EXECUTE},
    "latest": {"ahead": False},
    "blend": {"ahead": False, "blend": BLEND},
    "imagined": {"ahead": True},
}


class Naive(Plan):
    """Asks when EXECUTE actions are done; an answer starts at its first action."""

    begun = -EXECUTE

    def question(self) -> np.ndarray | None:
        return super().question() if self._step - self.begun >= EXECUTE else None

    def answer(self, actions: np.ndarray) -> None:
        super().answer(actions)
        self.begun, self._chunks = self._step, [(self._step, actions)]


@dataclass
class Robot:
    """One episode. `delay` in steps."""

    env: Any
    plan: Plan
    delay: int
    step: int = 0
    due: int = 0
    chunk: np.ndarray | None = None
    """What is answered in step `due`."""

    def question(self) -> dict[str, Any] | None:
        """Return what is sent in this step, if anything is."""
        if self.chunk is not None and self.step >= self.due:
            self.plan.answer(self.chunk)
            self.chunk = None
        committed = self.plan.question()
        if committed is None:
            return None
        seen = self.env.observe() | {"instruction": self.env.task.instruction}
        return seen | {"committed": committed}

    def act(self) -> Any:
        if self.chunk is not None and not self.delay:
            self.plan.answer(self.chunk)
            self.chunk = None
        self.step += 1
        return self.env.step(self.plan.act())


def run(policy: Policy, method: str, delay: int, episodes: list[tuple[Task, int]], width: int) -> list[bool]:
    """Return whether each episode succeeds; `width` of them at a time, answered together."""
    outcomes: dict[int, bool] = {}
    waiting = list(enumerate(episodes))
    busy: dict[int, Robot] = {}
    while waiting or busy:
        while waiting and len(busy) < width:
            number, (task, init) = waiting.pop(0)
            env: Any = suites.make(task, policy.model.view_sizes)
            env.rendering = False
            env.reset(options={"init": init})
            plan = Naive(STILL) if method == "naive" else Plan(STILL, **OPTIONS[method])
            busy[number] = Robot(env, plan, delay)
        questions = [(robot, seen) for robot in busy.values() if (seen := robot.question()) is not None]
        if questions:
            expected = [look_ahead(policy.model, seen) for _, seen in questions]
            for (robot, _), chunk in zip(questions, policy.act(expected), strict=True):
                robot.chunk, robot.due = chunk, robot.step + delay
        for number, robot in list(busy.items()):
            _, _, succeeded, is_over, _ = robot.act()
            if succeeded or is_over:
                outcomes[number] = bool(succeeded)
                robot.env.close()
                del busy[number]
    return [outcomes[i] for i in range(len(episodes))]


class FarClient(Client):
    """A client whose requests take `delay_s` to arrive."""

    delay_s = 0.0

    def infer(self, observation: Mapping[str, Any], *, deadline_ms: float | None = None) -> dict[str, Any]:
        time.sleep(self.delay_s)
        return super().infer(observation, deadline_ms=deadline_ms)


@dataclass
class Clock:
    """Episodes of one method by the wall clock."""

    client: FarClient
    method: str
    latencies: list[int] = field(default_factory=list)
    """Steps that the last answer took, in each step."""
    is_late: list[bool] = field(default_factory=list)
    """Whether each step took longer than it may."""

    def run(self, env: Any) -> bool:
        """Return whether an episode succeeds."""
        robot = AsyncClient(self.client, still=STILL, **OPTIONS[self.method])
        tick = time.monotonic()
        while True:
            _, _, succeeded, is_over, _ = env.step(
                robot.act(env.observe() | {"prompt": env.task.instruction})
            )
            self.latencies.append(robot.latency)
            if succeeded or is_over:
                robot.reset()
                return bool(succeeded)
            tick += STEP_MS / 1000
            self.is_late.append(time.monotonic() > tick)
            time.sleep(max(0.0, tick - time.monotonic()))


def in_real_time(
    checkpoint: str, methods: tuple[Method, ...], delays: tuple[int, ...], episodes: list[tuple[Task, int]]
) -> list[dict[str, Any]]:
    """Return a row for each method and delay, against a server in another process."""
    rows = []
    with server(checkpoint, 1, Path(os.devnull)) as (address, _), FarClient(f"ws://{address}") as near:
        client = cast(FarClient, near)
        cells = [(method, delay) for delay in delays for method in methods if method != "naive"]
        for method, delay in cells:
            client.delay_s, clock, won = delay / 1000, Clock(client, method), []
            for task, init in episodes:
                env: Any = suites.make(task, load(checkpoint).view_sizes)
                env.rendering = False
                env.reset(options={"init": init})
                won.append(clock.run(env))
                env.close()
            row = {"method": method, "delay_ms": delay, "successes": sum(won), "episodes": len(won)}
            row |= {"latency_steps": float(np.mean(clock.latencies)), "late": float(np.mean(clock.is_late))}
            rows.append(row | {"outcomes": won})
            print(row, flush=True)
    return rows


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
    real_time: bool = False,
    out: Path | None = None,
) -> None:
    """Measure success by delay, in ms; `width`: episodes at a time; `out`: JSON with each outcome too."""
    torch.set_num_threads(1)
    policy = Policy(load(checkpoint))
    tasks = [task for suite in suites.TABLETOP for task in suites.tasks(suite)]
    chosen = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(episodes)]
    if real_time:
        rows = in_real_time(checkpoint, methods, delays, chosen)
        record = {"bench": "delay_real_time", "model": policy.model.identity(), "rows": rows, **provenance()}
        if out:
            write_json(out, record)
        print(json.dumps(record))
        return
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
