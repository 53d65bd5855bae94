"""Do policies rank in imagination as they do in the simulator? (eval/judge.py)

`worldvla rank CHECKPOINT ... --world WORLD --demos DEMOS --suites tabletop_goal`
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldvla.eval.judge import (
    CONFIRM,
    STEPS,
    ImaginedBody,
    Judge,
    SimulatedBody,
    check_policy,
    drive,
    ingredients,
    judge_of,
    replays,
)
from worldvla.eval.record import Journal, placeless
from worldvla.eval.stats import rank_agreement
from worldvla.files import write_json
from worldvla.infer.model import Model, load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.protocol import NUM_INITS

POLICIES, STATES = 8, 60
"""With fewer of them a rank correlation says little."""
WRONG = 0.1
"""Share of held-out episodes that a judge or a world model may get wrong before it is said."""


def doubts(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a record says little, each in a line with what to do."""
    policies, states = len(record["policies"]), len(record["policies"][0]["outcomes"][0])
    if policies < POLICIES or states < STATES:
        yield (
            f"{policies} policies on {states} initial states say little about ranks: give {POLICIES} or "
            f"more, and {STATES} states in all (--episodes)"
        )
    right, of = record["judge"]["episodes_agree"]
    if of - right > WRONG * of:
        yield f"the judge is wrong about {of - right} of {of} held-out episodes: give more --demos"
    blamed = {
        "judge_on_real_frames": "the judge calls {} of {} failures a success: give --demos more that fail",
        "imagined": "imagination makes successes of {} of {} failures: train the world model on failures "
        "(`worldvla collect --kind world`)",
    }
    for name, words in blamed.items():
        right, wrong = record["replays"][name]["table"][0] if "replays" in record else (0, 0)
        if wrong > WRONG * (right + wrong):
            yield words.format(wrong, right + wrong)


def rank_policies(
    checkpoints: Sequence[Path | str],
    world: Path | str,
    demos: Sequence[Path],
    suites: Sequence[str],
    out: Path,
    *,
    episodes: int = 2,
    first: int = 0,
    execute: Sequence[int] = (),
    judged: int = 30,
    judge_steps: int = STEPS,
    held_out: Sequence[Path] = (),
    dtype: str = "float32",
    seed: int = 0,
) -> dict[str, Any]:
    """Let every checkpoint act in the simulator and in `world`; write record.json; return the record.

    `episodes` of each task from initial state `first` on, in parallel; `execute`: replan intervals, several:
    each a policy of its own, none: the whole chunk; `judged`: episodes of each file of `demos` for the judge;
    `held_out`: files of other episodes, whose actions are imagined (`replays`); `dtype` of the world model's
    transformer. The same call again goes on where it stopped: judge.safetensors and policies.jsonl hold what
    is done.
    """
    _check_arguments(checkpoints, suites, episodes, first, execute, judged)
    model = load(world, dtype=getattr(torch, dtype))
    policies = _with_intervals(checkpoints, model, execute)
    horizons = {suite: sim.suite(suite).horizon for suite in suites}
    protocol: dict[str, Any] = {"episodes": episodes, "first": first, "confirm": CONFIRM, "seed": seed}
    protocol |= {"dtype": dtype, "horizons": horizons}
    identity = {
        "world": model.identity(),
        "suites": list(suites),
        "protocol": protocol,
        "judge": {"demonstrations": judged, "steps": judge_steps},
    }
    made_of = demos, suites, model, judged, judge_steps, seed
    origin = provenance()
    same = placeless({**identity, "judge": ingredients(*made_of)})
    same |= {name: origin[name] for name in ("commit", "versions")}
    with Journal(out / "policies.jsonl", same) as journal:
        judge, errors = judge_of(out / "judge.safetensors", *made_of)
        again = {"replays": replays(judge, model, held_out, judged, out)} if held_out else {}
        rows = list(_act_all(policies, judge, model, range(first, first + episodes), journal))
    record = {
        **identity,
        "judge": {**identity["judge"], **errors},
        "columns": "of each initial state: the simulator's word, the judge's there, the judge's imagined",
        "policies": rows,
        **again,
        **rank_agreement(rows),
        **origin,
    }
    write_json(out / "record.json", record)
    return record


def _with_intervals(
    checkpoints: Sequence[Path | str], world: Model, execute: Sequence[int]
) -> list[tuple[Model, int]]:
    """Return every policy with each replan interval of `execute`, at most its chunk; by default that."""
    policies = []
    for policy in map(load, checkpoints):
        check_policy(policy, world)
        chunk = policy.config.layout.chunk
        policies += [(policy, n) for n in dict.fromkeys(min(n, chunk) for n in execute or [chunk])]
    return policies


def _act_all(
    policies: Sequence[tuple[Model, int]], judge: Judge, world: Model, inits: Sequence[int], journal: Journal
) -> Iterator[dict[str, Any]]:
    """Yield a row of each policy and replan interval, `inits` of every task; add to `journal` those it
    lacks."""
    numbers = np.repeat(np.arange(len(judge.tasks)), len(inits))
    with ExitStack() as stack:
        envs = [stack.enter_context(closing(sim.make(judge.tasks[n], world.view_sizes))) for n in numbers]
        bar = stack.enter_context(progress_bar())
        for policy, n in bar.track(policies, description="policies"):
            row = {"name": policy.config.name, "seed": policy.config.train.seed, "execute": n}
            row = json.loads(json.dumps(row | {"checkpoint": policy.identity(), "status": "done"}))
            same = [o for o in journal.outcomes if placeless({k: o[k] for k in row}) == placeless(row)]
            if not same:
                every = [*inits] * len(judge.tasks)
                journal.add(row | {"outcomes": _act_twice(policy, n, judge, world, envs, numbers, every)})
            yield row | {"outcomes": (same or journal.outcomes[-1:])[0]["outcomes"]}


def _act_twice(
    policy: Model,
    execute: int,
    judge: Judge,
    world: Model,
    envs: Sequence[Any],
    numbers: np.ndarray,
    inits: Sequence[int],
) -> list[list[int]]:
    """Return success of each episode (N): the simulator's word, the judge's there, the judge's imagined."""
    start = [env.reset(options={"init": init})[0] for env, init in zip(envs, inits, strict=True)]
    tasks, act = [judge.tasks[n] for n in numbers], Policy(policy).act
    frames = {view: np.stack([o[view] for o in start]) for view in world.view_sizes}
    real, control = drive(act, execute, SimulatedBody(judge, world, envs, frames, numbers), tasks, start)
    states = np.stack([o["state"] for o in start])
    dream = ImaginedBody(judge, World(world), frames, states, numbers)
    _, imagined = drive(act, execute, dream, tasks, start)
    return np.array([real, control, imagined], dtype=int).tolist()


def _check_arguments(
    checkpoints: Sequence[Path | str],
    suites: Sequence[str],
    episodes: int,
    first: int,
    execute: Sequence[int],
    judged: int,
) -> None:
    if judged < 1:
        raise ValueError(f"--judged must be at least 1 episode of each file, got {judged}")
    if not checkpoints or len(set(map(str, checkpoints))) < len(checkpoints):
        raise ValueError(f"give every policy once, and at least one, got {[str(c) for c in checkpoints]}")
    if not suites or len(set(suites)) < len(suites) or any(n < 1 for n in execute):
        raise ValueError(f"give every suite once, and execute at least 1, got {suites} and {execute}")
    if episodes < 1 or first < 0 or first + episodes > NUM_INITS:
        raise ValueError(
            f"initial states 0..{NUM_INITS - 1} are for evaluation: got {episodes} from {first} on"
        )
