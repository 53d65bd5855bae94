"""Episodes in parallel simulators, actions from one batched actor: `success | fail | error`, counted apart.

    record = run(ModelActor("out/train/tabletop"), "tabletop_object", out_dir=Path("out/eval/object"))

Where simulation is cheap all environments are answered at once, in lockstep; where it is dear (LIBERO), each
as soon as it asks. In both the record is a function of the arguments. An actor's chunk is executed open loop,
then it is asked again; with a history the frames just before go along (WorldVLA
eval_solver_libero_256.py:136-312).
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.data.collect import choose
from worldvla.eval.actors import Actor, ActorError, ModelActor, Query
from worldvla.eval.record import Journal
from worldvla.eval.stats import count
from worldvla.eval.video import FPS, views_side_by_side, write_mp4
from worldvla.eval.workers import PATIENCE_S, Job, MakeEnv, Report, Settings, Worker, open_workers
from worldvla.files import write_json, write_text
from worldvla.machine import cores, provenance
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.libero.doctor import verdict
from worldvla.sim.protocol import NUM_INITS, Task

MOST_AT_ONCE = 1
"""Queries answered together out of lockstep. One: the record is then a function of the arguments, as it is in
lockstep, because no answer depends on who else was waiting."""


def roll_out(
    actor: Actor,
    jobs: Sequence[Job],
    settings: Settings,
    workers: int,
    on_end: Callable[[Job, Report, float, list[dict[str, np.ndarray]]], None],
    patience_s: float = PATIENCE_S,
    lockstep: bool = True,
) -> None:
    """Run every job to its end; `on_end(job, last report, seconds, film)` is called once for each.

    `lockstep`: the actor answers once all environments wait: the largest batches, for simulators that are
    quick. Else it answers whoever waits, MOST_AT_ONCE of them, and nobody waits for another one's reset.
    """
    waiting = list(jobs)
    arrived: dict[Worker, Report] = {}
    workers = min(workers, len(waiting))
    with open_workers(workers, settings, patience_s) as pool, _spared_cores(0 if lockstep else workers):

        def begin() -> None:
            for worker in pool:
                if worker.job is None and waiting:
                    worker.begin(_next(waiting, worker.task, {w.task for w in pool}))

        begin()
        while busy := [w for w in pool if w.job is not None]:
            silent = [w for w in busy if w not in arrived]
            if silent and (lockstep or not arrived):
                left = min(w.deadline for w in silent) - time.monotonic()
                wait([w.connection for w in silent], max(0.0, left))
            arrived |= {w: report for w in silent if (report := w.poll()) is not None}
            if lockstep and len(arrived) < len(busy):
                continue
            for worker in [w for w in pool if w in arrived and arrived[w].status != "running"]:
                report, job, worker.job = arrived.pop(worker), worker.job, None
                assert job is not None
                on_end(job, report, time.monotonic() - worker.started, worker.film)
            begin()  # before the actor computes: the others' simulators go on meanwhile
            asking = [w for w in pool if w in arrived] if lockstep else list(arrived)[:MOST_AT_ONCE]
            if not asking:
                continue
            queries = [_query(w, arrived.pop(w)) for w in asking]
            asked = time.monotonic()
            try:
                answers = actor.act(queries)
            except ActorError as error:  # nobody else can go on either
                steps = dict(zip(asking, (q.step for q in queries), strict=True))
                steps |= {w: report.steps for w, report in arrived.items()}
                for worker in pool:
                    if worker.job is not None:
                        report = Report("error", reason=str(error), steps=steps.get(worker, 0))
                        on_end(worker.job, report, time.monotonic() - worker.started, worker.film)
                raise
            for worker, actions in zip(asking, answers, strict=True):
                worker.policy_s += (time.monotonic() - asked) / len(asking)
                worker.send(actor.execute if actions is None else actions)


@contextmanager
def _spared_cores(busy: int) -> Iterator[None]:
    """Leave `busy` cores to the workers: threads of torch that wait for one another spin, and a small model's
    query costs eight times the processor time where they do so beside busy workers.
    """
    torch = sys.modules.get("torch")  # absent where the actor needs none
    before = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(min(before, max(1, cores() - busy)))
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


def _query(worker: Worker, report: Report) -> Query:
    assert worker.job is not None
    return Query(worker.job.task, worker.job.init, report.steps, report.observation)


def _next(waiting: list[Job], task: Task | None, taken: set[Task | None]) -> Job:
    """Take one of the same task, else one of a task that no worker has: an environment is dear to make."""
    same = (i for i, job in enumerate(waiting) if job.task == task)
    free = (i for i, job in enumerate(waiting) if job.task not in taken)
    return waiting.pop(next(same, next(free, 0)))


def run(
    actor: Actor,
    suite: str,
    episodes: int = 10,
    *,
    out_dir: Path,
    seed: int = 0,
    workers: int = 0,
    first: int = 0,
    tasks: Sequence[int] = (),
    fast_render: bool = False,
    scene_prefix: bool = False,
    videos: int = 1,
    film_all: bool | None = None,
    page: bool = True,
    make: MakeEnv = sim.make,
    table: Sequence[Task] | None = None,
    patience_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """Roll `actor` out from initial states first..first+episodes-1 of each task; write record.json, videos/
    and index.html; return the record.

    The same command again goes on where it stopped. `workers`: processes that step environments; 0: one a
    core that this process may use, and the record says how many. `tasks`: indices, empty for all. `videos`:
    filmed episodes a task. `scene_prefix`: LIBERO-10's instructions begin with their scene. `film_all`: film
    every step; default: where rendering is cheap (tabletop). `make`, `table`: another simulator, for tests.
    """
    inits = range(first, first + episodes)
    if not inits or first < 0 or first < NUM_INITS < inits.stop:
        raise ValueError(
            f"initial states 0..{NUM_INITS - 1} are for evaluation, those after them for demonstrations; "
            f"ask for at least one and all of one kind, got {episodes} from {first} on"
        )
    if workers < 0:
        raise ValueError(f"expected at least one worker, or 0 for one a core, got {workers}")
    workers = workers or cores()
    listed = choose(suite, sim.tasks(suite) if table is None else table, tasks)
    if scene_prefix:
        plain = listed
        listed = [replace(task, instruction=sim.with_scene(task.instruction, task.name)) for task in plain]
        if listed == plain:
            raise ValueError(f"scene_prefix: the tasks of {suite} name no scene, those of libero_10 do")
    kind = sim.suite(suite)
    is_cheap = kind.simulator == "tabletop"
    side = 64 if is_cheap else 128
    views = actor.views or ({"agentview": (side, side)} if videos else {})
    settings = Settings(
        partial(make, fast_render=True) if fast_render else make,
        views,
        bool(actor.views),
        actor.history,
        is_cheap if film_all is None else film_all,
        seed,
    )
    if make is sim.make:
        sim.check_drawing(suite, views)
    protocol = {
        "initial_states": f"{first}..{inits[-1]} of each task",
        "executed": actor.execute,
        "history": actor.history,
        "workers": workers,
    } | sim.protocol(suite, actor.views, fast_render)
    who = actor.identity()
    fixed = {"suite": suite, "checkpoint": {k: v for k, v in who.items() if k != "path"}, "seed": seed}
    fixed |= {"executed": actor.execute, "fast_render": fast_render}
    if scene_prefix:
        fixed["scene_prefix"] = protocol["scene_prefix"] = True
    if isinstance(actor, ModelActor):
        protocol |= {"head": actor.head, "decoding": actor.decoding}
        # Journals of before there were two do not name the discrete one.
        fixed |= {"head": actor.head} if actor.head != "discrete" else {}
    start = time.monotonic()
    with Journal(Path(out_dir) / "episodes.jsonl", fixed) as journal, progress_bar() as progress:
        earlier = journal.seconds
        done = {(o["task"], o["init"]): o for o in journal.outcomes}
        jobs = [
            Job(task, init, init < first + videos)
            for task in listed
            for init in inits
            if (task.index, init) not in done
        ]
        name = f"{suite} by {who['name']}"
        bar = progress.add_task(
            name, total=len(listed) * episodes, completed=len(listed) * episodes - len(jobs)
        )

        def on_end(job: Job, report: Report, seconds: float, film: list[dict[str, np.ndarray]]) -> None:
            outcome: dict[str, Any] = {"task": job.task.index, "init": job.init}
            outcome |= {name: getattr(report, name) for name in ("status", "grasped", "steps", "reason")}
            outcome["seconds"] = round(seconds, 2)
            outcome["simulation_seconds"] = round(report.simulation_s, 2)
            outcome |= {"policy_seconds": round(report.policy_s, 2), "video": ""}
            if report.trace:
                outcome["trace"] = f"errors/{job.task.index:02d}_{job.init:02d}.txt"
                write_text(Path(out_dir) / outcome["trace"], report.trace)
            if film:
                outcome["video"] = f"videos/{job.task.index:02d}_{job.init:02d}.mp4"
                fps = FPS[kind.simulator] / (1 if settings.film_all else actor.execute)
                write_mp4(Path(out_dir) / outcome["video"], views_side_by_side(film), fps)
            journal.add({**outcome, "elapsed": round(earlier + time.monotonic() - start, 1)})
            counts = count(journal.outcomes)
            label = f"{name}  {counts['successes']} succeeded" + (
                f", {counts['errors']} errors" if counts["errors"] else ""
            )
            progress.update(bar, advance=1, description=label)

        stopped: ActorError | None = None
        try:
            if jobs:
                roll_out(actor, jobs, settings, workers, on_end, patience_s, lockstep=is_cheap)
        except ActorError as error:  # what is done is written first
            stopped = error
        chosen = {task.index for task in listed}
        outcomes = [o for o in journal.outcomes if o["task"] in chosen and o["init"] in inits]
    outcomes.sort(key=lambda o: (o["task"], o["init"]))
    record = {"suite": suite, "checkpoint": who, **count(outcomes), "seed": seed, "protocol": protocol}
    record["seconds"] = round(earlier + time.monotonic() - start, 1)
    for name in ("simulation_seconds", "policy_seconds"):
        record[name] = round(sum(o.get(name, 0.0) for o in outcomes), 1)
    record |= {**provenance(), "doctor": verdict()}
    record["tasks"] = [
        {
            "index": t.index,
            "name": t.name,
            "instruction": t.instruction,
            **count(o for o in outcomes if o["task"] == t.index),
        }
        for t in listed
    ]
    record["outcomes"] = [{k: v for k, v in o.items() if k != "elapsed"} for o in outcomes]
    write_json(Path(out_dir) / "record.json", record)
    if stopped is not None:
        raise stopped
    if isinstance(actor, ModelActor) and actor.example is not None:
        from worldvla.eval.tokens import write_example

        write_example(Path(out_dir), actor.model, actor.example, actor.head)
    if page:
        from worldvla.eval.report import write_page

        write_page(Path(out_dir) / "index.html", f"{who['name']} on {suite}", evaluations=[Path(out_dir)])
    return record
