"""A policy made better without the simulator: imagine, keep what succeeds, learn it.

From real first frames the policy acts in a world model, drawing its actions. A judge of success
(eval/judge.py) reads the imagined frames; what it calls done becomes demonstrations, on which the policy is
trained on. How many of them succeed in the simulator, too, is counted and not used. Kind "simulator" acts in
the simulator and takes its word, which is the upper bound; `keep_all` learns from failures too, which is the
control. Dims: N episodes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from worldvla.config import Config
from worldvla.data.collect import guard
from worldvla.data.episode import Episode, read_episodes, write_episodes
from worldvla.data.tokenize import tokenize
from worldvla.eval.judge import (
    CONFIRM,
    STEPS,
    Act,
    ImaginedBody,
    Judge,
    Seen,
    SimulatedBody,
    check_policy,
    drive,
    ingredients,
    judge_of,
    last_actions,
)
from worldvla.eval.record import placeless
from worldvla.files import read_json, sha256, write_json
from worldvla.infer.model import Model, load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.protocol import Task
from worldvla.train.loop import train

BATCH = 60
"""Episodes that are imagined in parallel."""
Kind = Literal["imagination", "simulator"]


@dataclass(frozen=True)
class Start:
    """A real first frame."""

    task: int
    """Index among the judge's tasks."""
    observation: dict[str, Any]
    sim_state: np.ndarray
    init: int


def _sampler(model: Model, temperature: float, seed: Sequence[int]) -> Act:
    """Return the policy of `model`, which draws its actions, each time by other seeds."""
    policy, rng = Policy(model), np.random.default_rng(seed)
    return lambda seen: policy.act(seen, temperature, rng.integers(0, 2**31, len(seen)).tolist())


class EpisodeRecorder:
    """`body`, which also notes what N episodes saw, felt and did until done."""

    def __init__(
        self, body: SimulatedBody | ImaginedBody, first: Sequence[Mapping[str, Any]], in_simulator: bool
    ):
        self.body, self.in_simulator = body, in_simulator
        self.now = [dict(o) for o in first]
        self.rows, self.streaks = np.arange(len(first)), np.zeros(len(first), dtype=int)
        self.steps: list[list[tuple[dict[str, Any], np.ndarray]]] = [[] for _ in first]
        self.done = np.zeros(len(first), dtype=bool)

    def keep(self, rows: np.ndarray) -> None:
        self.body.keep(rows)
        self.rows = self.rows[rows]

    def step(self, actions: np.ndarray, look: bool = True) -> Seen:  # noqa: ARG002 - all is recorded
        seen = self.body.step(actions)
        for i, row in enumerate(self.rows):
            if self.done[row]:
                continue
            self.steps[row].append((self.now[row], actions[i]))
            self.now[row] = {**{v: f[i] for v, f in seen.frame.items()}, "state": seen.states[i]}
            self.streaks[row] = self.streaks[row] + 1 if seen.said[i] else 0
            self.done[row] = seen.success[i] if self.in_simulator else self.streaks[row] >= CONFIRM
        return seen


def improve(
    checkpoint: Path | str,
    world: Path | str,
    demos: Sequence[Path],
    suites: Sequence[str],
    out: Path,
    *,
    judge: Path | None = None,
    stores: Sequence[Path] = (),
    episodes: int = 10,
    rounds: int = 1,
    execute: int = 0,
    temperature: float = 1.0,
    steps: int = 300,
    kind: Kind = "imagination",
    keep_all: bool = False,
    judge_steps: int = STEPS,
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Improve the policy `checkpoint` in `world`; write record.json, and round_N/{demos,store,run}; return
    the record, whose `checkpoint` is the new policy. The same call again goes on where it stopped.

    `demos` give the first frames, and teach a judge where no `judge` of rank's is given. `stores`: token
    stores of real demonstrations, learnt beside what is imagined. `episodes` of each task a round; `execute`:
    replan interval, 0: the whole chunk; `temperature` of the actions; `steps` of training a round; `dtype` of
    the world model's transformer.
    """
    _check_numbers(suites, episodes, rounds, steps, execute, seed, temperature)
    first, worlds = load(checkpoint), load(world, dtype=getattr(torch, dtype))
    _check_models(first, worlds, execute)
    made_of = demos, suites, worlds, 30, judge_steps, seed
    protocol = {"episodes": episodes, "execute": execute, "temperature": temperature, "steps": steps}
    settings = {
        "policy": placeless(first.identity()),
        "world": placeless(worlds.identity()),
        "judge": ingredients(*made_of) if judge is None else sha256(judge)[:16],
        "demos": ingredients(*made_of)["demos"],
    }
    settings |= {"suites": list(suites), "kind": kind, "keep_all": keep_all, "protocol": protocol}
    settings |= {"dtype": dtype, "seed": seed}
    with guard(out / "settings.json", settings):
        if judge is None:
            critic, errors = judge_of(out / "judge.safetensors", *made_of)
        else:
            critic, errors = _known_judge(judge, suites, worlds)
        path, report = first.path, []
        for number in range(rounds):
            folder, policy = out / f"round_{number}", load(path)
            if not (folder / "round.json").is_file():
                act = _sampler(policy, temperature, [seed, number])
                views = list(worlds.view_sizes)
                starts = list(starts_of(demos, critic.tasks, suites, episodes, number * episodes, views))
                interval = execute or policy.config.layout.chunk
                _demonstrate(folder, act, interval, critic, worlds, starts, kind, keep_all)
            path = _learn(folder, policy, stores, steps)
            report.append(read_json(folder / "round.json"))
        record = {**settings, "judge": errors, "rounds": report, "checkpoint": str(path), **provenance()}
        write_json(out / "record.json", record)
    return record


def _check_numbers(
    suites: Sequence[str],
    episodes: int,
    rounds: int,
    steps: int,
    execute: int,
    seed: int,
    temperature: float,
) -> None:
    if min(episodes, rounds, steps) < 1 or min(execute, seed) < 0 or not 0 <= temperature < math.inf:
        raise ValueError(
            "expected episodes, rounds and steps >= 1, execute, seed and a finite temperature >= 0, got "
            f"{episodes}, {rounds}, {steps}, {execute}, {seed} and {temperature}"
        )
    for suite in suites:
        sim.suite(suite)  # a wrong name ends here


def _check_models(policy: Model, world: Model, execute: int) -> None:
    """Raise ValueError for what would fail only after the policy has acted."""
    world.check_world()
    check_policy(policy, world)
    chunk, names = policy.config.layout.chunk, policy.config.data.datasets
    if execute > chunk:
        raise ValueError(f"{policy.path} gives {chunk} actions at a time, asked to execute {execute}")
    if names:
        raise ValueError(f"{policy.path} has learnt from {len(set(names))} datasets: give a policy of one")


def _demonstrate(
    folder: Path,
    act: Act,
    execute: int,
    judge: Judge,
    world: Model,
    starts: Sequence[Start],
    kind: Kind,
    keep_all: bool,
) -> None:
    """Let the policy act from `starts`; write what is to be learnt to demos/, and counts to round.json, with
    in how many of the imagined successes the same actions succeed in the simulator: nothing is done with it.
    """
    made: list[Episode] = []
    with progress_bar() as progress:
        batches = [starts[i : i + BATCH] for i in range(0, len(starts), BATCH)]
        for batch in progress.track(batches, description=f"{folder.name}: act in {kind}"):
            made += _episodes(_roll(act, execute, judge, world, batch, kind), batch, judge.tasks)
        pairs = [(s, e) for s, e in zip(starts, made, strict=True) if e.success and kind == "imagination"]
        replays = progress.track(pairs, description=f"{folder.name}: the same actions in the simulator")
        confirmed = sum(_replayed(replays, judge.tasks, world))
    kept = [episode for episode in made if episode.success or keep_all]
    if not kept:
        raise ValueError(
            f"{folder.name}: none of {len(made)} episodes succeeded in {kind}: start from a better policy, "
            "or give more --episodes"
        )
    _write(kept, folder / "demos", {"kind": kind, "world": world.identity()})
    done = sum(episode.success for episode in made)
    counts = {"episodes": len(made), "successes": done, "kept": len(kept)}
    counts |= {"in_simulator": confirmed} if kind == "imagination" else {}
    write_json(folder / "round.json", counts)


def _learn(folder: Path, policy: Model, stores: Sequence[Path], steps: int) -> Path:
    """Train the policy on with the demonstrations of a round and `stores`; return the new checkpoint."""
    tokenize((folder / "demos").rglob("*.hdf5"), policy.image, folder / "store")
    outcome = train(_recipe(policy, [folder / "store", *stores], steps), folder / "run")
    if not outcome.is_finished:
        raise KeyboardInterrupt
    return outcome.checkpoint


def _replayed(pairs: Iterable[tuple[Start, Episode]], tasks: Sequence[Task], world: Model) -> Iterator[bool]:
    """Yield whether the actions of each episode, and AFTER steps of rest, succeed in the simulator; those of
    a task in a row."""
    for task, of_task in groupby(pairs, key=lambda pair: pair[0].task):
        env: Any = sim.make(tasks[task], world.view_sizes)
        with closing(env):
            for start, episode in of_task:
                env.reset(options={"init": start.init})  # fixtures are not in every state
                env.set_state(start.sim_state)
                steps = (env.step(action) for action in [*episode.actions[:-1], *last_actions(episode)])
                yield any(step[4]["success"] for step in steps)


def _known_judge(path: Path, suites: Sequence[str], world: Model) -> tuple[Judge, dict[str, Any]]:
    judge, told = Judge.load(path, world)
    if unknown := set(suites) - {task.suite for task in judge.tasks}:
        raise ValueError(f"{path} knows no {', '.join(sorted(unknown))}: give a judge of these suites")
    return judge, told["errors"]


def starts_of(
    paths: Sequence[Path],
    tasks: Sequence[Task],
    suites: Sequence[str],
    number: int,
    skip: int,
    views: Sequence[str],
) -> Iterator[Start]:
    """Yield `number` first frames of each task of `suites` after the first `skip`, in `views`; where there
    are fewer, over again."""
    found: dict[int, list[Start]] = {i: [] for i, task in enumerate(tasks) if task.suite in suites}
    numbers = {(tasks[i].suite, tasks[i].name): i for i in found}
    for path in paths:
        for episode in read_episodes(path):
            index = numbers.get((episode.suite, episode.task))
            if index is None or len(found[index]) >= skip + number:
                break
            observation: dict[str, Any] = {view: episode.images[view][0].copy() for view in views}
            observation["state"] = episode.states[0]
            found[index].append(Start(index, observation, episode.sim_states[0], max(episode.init, 0)))
    for index, of_task in found.items():
        if not of_task:
            raise ValueError(
                f"no first frame of {tasks[index].suite}/{tasks[index].name}: give --demos with it"
            )
        yield from (of_task[(skip + i) % len(of_task)] for i in range(number))


def _roll(
    act: Act, execute: int, judge: Judge, world: Model, starts: Sequence[Start], kind: Kind
) -> EpisodeRecorder:
    """Let the policy act from `starts`, in parallel."""
    numbers, first = np.array([start.task for start in starts]), [start.observation for start in starts]
    tasks = [judge.tasks[n] for n in numbers]
    frames = {view: np.stack([o[view] for o in first]) for view in world.view_sizes}
    with ExitStack() as stack:
        if kind == "simulator":
            envs: list[Any] = [stack.enter_context(closing(sim.make(t, world.view_sizes))) for t in tasks]
            for env, start in zip(envs, starts, strict=True):
                env.reset(options={"init": start.init})  # fixtures are not in every state
                env.set_state(start.sim_state)
            body: SimulatedBody | ImaginedBody = SimulatedBody(judge, world, envs, frames, numbers)
        else:
            states = np.stack([o["state"] for o in first])
            body = ImaginedBody(judge, World(world), frames, states, numbers)
        recorded = EpisodeRecorder(body, first, kind == "simulator")
        drive(act, execute, recorded, tasks, first)  # pyright: ignore[reportArgumentType]
    return recorded


def _episodes(roll: EpisodeRecorder, starts: Sequence[Start], tasks: Sequence[Task]) -> Iterator[Episode]:
    for start, steps, done in zip(starts, roll.steps, roll.done, strict=True):
        task, length = tasks[start.task], len(steps)
        yield Episode(
            instruction=task.instruction,
            suite=task.suite,
            task=task.name,
            actions=np.stack([action for _, action in steps]).astype(np.float32),
            states=np.stack([seen["state"] for seen, _ in steps]).astype(np.float32),
            images={v: np.stack([seen[v] for seen, _ in steps]) for v in start.observation if v != "state"},
            sim_states=np.zeros((length, 0)),
            is_expert=np.ones(length, dtype=bool),
            init=start.init,
            seed=-1,
            success=bool(done),
        )


def _write(episodes: Sequence[Episode], folder: Path, made_by: Mapping[str, Any]) -> None:
    """Write one file of demonstrations a task."""
    for suite, name in sorted({(e.suite, e.task) for e in episodes}):
        path = folder / suite / f"{name}_demo.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_episodes(path, (e for e in episodes if (e.suite, e.task) == (suite, name)), dict(made_by))


def _recipe(policy: Model, stores: Sequence[Path], steps: int) -> Config:
    """Return how the policy is trained on: as it was, as a policy alone, at a fifth of the learning rate."""
    config = policy.config
    rate = config.optim.learning_rate / 5
    return replace(
        config,
        tokenizer=str(policy.path / "image_tokenizer"),
        optim=replace(
            config.optim, learning_rate=rate, min_learning_rate=rate / 10, warmup_steps=min(20, steps // 10)
        ),
        data=replace(
            config.data, stores=tuple(map(str, stores)), weights=(), world_fraction=0.0, val_fraction=0.0
        ),
        train=replace(
            config.train,
            steps=steps,
            init_from=str(policy.path),
            compile=False,  # which takes minutes
            eval_every=0,
            save_every=0,
        ),
    )
