"""Episodes in parallel simulators, actions from one batched actor: `success | fail | error`, counted apart.

    record = evaluate(ModelActor("out/train/tabletop"), Protocol("tabletop_object"), Path("out/eval/object"))

The first `execute` actions of an actor's chunk are executed (its replan interval), then it is asked again;
with a history the frames just before go along (WorldVLA eval_solver_libero_256.py:136-312).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from worldvla.cluster import Cluster
from worldvla.data.collect import choose, guard
from worldvla.eval.actors import Actor, ActorError, ExpertActor, ModelActor, OpenLoopActor, RandomActor
from worldvla.eval.crew import Crew, roll_out
from worldvla.eval.record import Journal, counted, placeless
from worldvla.eval.stats import count
from worldvla.eval.workers import PATIENCE_S, Job, MakeEnv, Report, Settings, saved
from worldvla.files import only_writer, write_json, write_text
from worldvla.machine import cores, provenance
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.libero.doctor import verdict
from worldvla.sim.protocol import FPS, NUM_INITS, Task
from worldvla.video import views_side_by_side, write_mp4


@dataclass(frozen=True)
class Protocol:
    """Which episodes are run: states first .. first + episodes - 1 of each task of a suite."""

    suite: str
    tasks: tuple[int, ...] = ()
    """Indices; empty: all."""
    episodes: int = 10
    """Of each task."""
    first: int = 0
    """Initial state of the first episode."""
    seed: int = 0
    videos: int = 1
    """Filmed episodes of each task, the first ones."""
    scene_prefix: bool = False
    """Instructions of LIBERO-10 begin with their scene, as its released checkpoints were trained."""
    shard: tuple[int, int] = (0, 1)
    """(i, n): the i-th of n equal parts of the episodes, in the order of tasks and states."""

    def __post_init__(self) -> None:
        states = self.states
        if not states or self.first < 0 or self.first < NUM_INITS < states.stop:
            raise ValueError(
                f"initial states 0..{NUM_INITS - 1} are for evaluation, those after them for demonstrations; "
                f"ask for at least one and all of one kind, got {self.episodes} from {self.first} on"
            )
        if not 0 <= self.seed < 2**32 or self.videos < 0:
            raise ValueError(
                f"expected a seed from 0 to 2^32 - 1 and videos >= 0, got {self.seed} and {self.videos}"
            )

    @property
    def states(self) -> range:
        return range(self.first, self.first + self.episodes)

    def jobs(self, tasks: Sequence[Task]) -> list[Job]:
        """Return the episodes of this shard; a number that does not divide them raises ValueError."""
        every = [Job(task, init, init < self.first + self.videos) for task in tasks for init in self.states]
        index, number = self.shard
        if not 0 <= index < number or len(every) % number:
            raise ValueError(
                f"shard {index}/{number}: {self.suite} has {len(every)} episodes here; expected i/n with i "
                "from 0 to n - 1 and n a divisor of that number"
            )
        size = len(every) // number
        return every[index * size : (index + 1) * size]

    @property
    def simulator(self) -> str:
        return sim.suite(self.suite).simulator

    def choose(self, table: Sequence[Task]) -> list[Task]:
        """Return the tasks of `table` that are run, with the instructions that the policy reads."""
        tasks = choose(self.suite, table, self.tasks)
        if not self.scene_prefix:
            return tasks
        prefixed = [replace(t, instruction=sim.with_scene(t.instruction, t.name)) for t in tasks]
        if prefixed == tasks:
            raise ValueError(f"scene_prefix: the tasks of {self.suite} name no scene, those of libero_10 do")
        return prefixed

    def settings(self, actor: Actor, make: MakeEnv, save: Path | None = None) -> Settings:
        """Return what the workers need to know: `actor` may see nothing, films and what is saved in `save`
        need pictures all the same."""
        lockstep = self.simulator == "tabletop"
        side = 64 if lockstep else 128
        views = {"agentview": (side, side)} if self.videos else {}
        if save is not None:
            views = dict(sim.suite(self.suite).rules.demonstrations)
        views = dict(actor.views) or views
        return Settings(make, views, bool(actor.views), actor.history, lockstep, self.seed, save)

    def describe(self, actor: Actor, workers: int) -> dict[str, Any]:
        """Return what a record says of how its episodes were run."""
        return {
            "initial_states": f"{self.first}..{self.states[-1]} of each task",
            "executed": actor.execute,
            "history": actor.history,
            "workers": workers,
            **sim.protocol(self.suite, actor.views),
            "scene_prefix": self.scene_prefix,
            **({"shard": list(self.shard)} if self.shard[1] > 1 else {}),
            **actor.describe(),
        }

    def identity(self, actor: Actor) -> dict[str, Any]:
        """Return what episodes must share to be counted together: a journal holds those of one identity."""
        origin = provenance()
        return {
            "suite": self.suite,
            "seed": self.seed,
            "checkpoint": placeless(actor.identity()),
            "executed": actor.execute,
            **({"scene_prefix": True} if self.scene_prefix else {}),
            **{k: v for k, v in actor.describe().items() if k == "head"},
            "commit": origin["commit"],
            "versions": origin["versions"],
        }


def evaluate(
    actor: Actor,
    protocol: Protocol,
    out: Path,
    workers: int = 0,
    *,
    make: MakeEnv = sim.make,
    table: Sequence[Task] | None = None,
    patience_s: float = PATIENCE_S,
    cluster: Cluster | None = None,
    open_there: Callable[[], Actor] | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Roll `actor` out; write record.json, videos/ and tokens.npz to `out`; return the record.

    The same call again goes on where it stopped. `workers`: processes that step environments; 0: one a core
    that this process may use, and the record says how many. `make`, `table`: another simulator, for tests.
    With a `cluster`, each of its processes does this with the actor that `open_there` returns. `save`: folder
    for the episodes as demonstrations, one file each; on a file system that all of a cluster's nodes see.
    """
    if workers < 0:
        raise ValueError(f"expected at least one worker, or 0 for one a core, got {workers}")
    workers = workers or (cluster.cores if cluster else cores())
    tasks = protocol.choose(sim.tasks(protocol.suite) if table is None else table)
    jobs = protocol.jobs(tasks)
    settings, name = protocol.settings(actor, make, save), f"{protocol.suite} by {actor.identity()['name']}"
    if make is sim.make:
        sim.check_drawing(protocol.suite, settings.views)
    stopped: ActorError | None = None
    with (
        only_writer(out),
        Journal(out / "episodes.jsonl", protocol.identity(actor)) as journal,
        guard(save / "eval.json", protocol.identity(actor)) if save else nullcontext(),
        progress_bar() as progress,
    ):
        left = _left(jobs, journal, out, save)
        bar = progress.add_task(name, total=len(jobs), completed=len(jobs) - len(left))
        every_step = settings.lockstep or save is not None
        fps = FPS[protocol.simulator] / (1 if every_step else actor.execute)

        def on_end(job: Job, report: Report, seconds: float, film: list[dict[str, np.ndarray]]) -> None:
            journal.add(_outcome(out, job, report, seconds, film, fps))
            counts = count(journal.outcomes)
            errors = f", {counts['errors']} errors" if counts["errors"] else ""
            progress.update(bar, advance=1, description=f"{name}  {counts['successes']} succeeded{errors}")

        try:
            if left and cluster and open_there:
                crew = Crew(open_there, actor.identity(), settings, workers, patience_s)
                actor.example = crew.roll_out(cluster, left, on_end)
            elif left:
                roll_out(actor, left, settings, workers, on_end, patience_s)
        except ActorError as error:  # what is done is written first
            stopped = error
    record = counted(_record(actor, protocol, tasks, journal, workers))
    write_json(out / "record.json", record)
    if stopped is not None:
        raise stopped
    actor.write_example(out)
    return record


def _left(jobs: Sequence[Job], journal: Journal, out: Path, save: Path | None) -> list[Job]:
    """Return the jobs that are not done; done ones must be saved, where episodes are to be."""
    done = {(o["task"], o["init"]) for o in journal.outcomes}
    left = [job for job in jobs if (job.task.index, job.init) not in done]
    if save is not None and not all(saved(save, job).exists() for job in jobs if job not in left):
        raise ValueError(f"{out} holds episodes that are not in {save}: give another --out")
    return left


def _outcome(
    out: Path, job: Job, report: Report, seconds: float, film: list[dict[str, np.ndarray]], fps: float
) -> dict[str, Any]:
    """Write the film and the traceback of an episode, if it has them; return its line of the journal."""
    place = f"{job.task.index:02d}_{job.init:02d}"
    outcome: dict[str, Any] = {"task": job.task.index, "init": job.init}
    outcome |= {name: getattr(report, name) for name in ("status", "grasped", "steps", "reason")}
    outcome |= {"seconds": round(seconds, 2), "simulation_seconds": round(report.simulation_s, 2)}
    outcome |= {"policy_seconds": round(report.policy_s, 2), "video": ""}
    if report.trace:
        outcome["trace"] = f"errors/{place}.txt"
        write_text(out / outcome["trace"], report.trace)
    if film:
        outcome["video"] = f"videos/{place}.mp4"
        write_mp4(out / outcome["video"], views_side_by_side(film), fps)
    return outcome


def _record(
    actor: Actor, protocol: Protocol, tasks: Sequence[Task], journal: Journal, workers: int
) -> dict[str, Any]:
    """Return the record of the journal's episodes that `protocol` asks for."""
    asked = {(job.task.index, job.init) for job in protocol.jobs(tasks)}
    return {
        "suite": protocol.suite,
        "checkpoint": actor.identity(),
        "seed": protocol.seed,
        "protocol": protocol.describe(actor, workers),
        "seconds": round(journal.seconds, 1),
        **actor.timing(),
        **provenance(),
        "doctor": verdict(),
        "tasks": [{"index": t.index, "name": t.name, "instruction": t.instruction} for t in tasks],
        "outcomes": [
            {name: value for name, value in outcome.items() if name != "elapsed"}
            for outcome in journal.outcomes
            if (outcome["task"], outcome["init"]) in asked
        ],
    }


PLANNING = ("plan", "world", "judge", "temperature", "spread", "ahead", "dtype")
TAKES: dict[str, set[str]] = {
    "random": set(),
    "expert": set(),
    "open-loop": {"demos"},
    "a policy server": {"execute", "unnorm_key"},
    "a checkpoint": {"execute", "head", "device", "quantize", "unnorm_key", *PLANNING},
}
"""Who acts -> the options that are about it."""


def open_actor(name: str, suite: str, seed: int = 0, **options: Any) -> Actor:
    """Return the actor that `worldvla eval NAME` means: random, expert, open-loop, an address, a checkpoint.

    `options`: those of TAKES, None or empty where not asked for; one that the actor would ignore raises
    ValueError.
    """
    kind = name if name in TAKES else "a policy server" if "://" in name else "a checkpoint"
    used = {option: value for option, value in options.items() if value not in (None, "")}
    for option in sorted(used.keys() - TAKES[kind]):
        takers = " or ".join(who for who, options in TAKES.items() if option in options)
        is_serves = "://" in name and option in ("head", "device", "quantize")
        fix = f"give it to `worldvla serve` as --{option}" if is_serves else "leave it out"
        raise ValueError(f"--{option.replace('_', '-')} is for {takers}, not for {kind}: {fix}")
    if kind == "random":
        return RandomActor(seed)
    if kind == "expert":
        return ExpertActor()
    if kind == "open-loop":
        if "demos" not in used:
            raise ValueError("open-loop needs --demos DIRECTORY; `worldvla collect` makes one")
        return OpenLoopActor.from_demos(used["demos"])
    if kind == "a policy server":
        from worldvla.eval.remote import RemoteActor

        return RemoteActor(name, suite, **used)
    planning = {option: used.pop(option) for option in PLANNING if option in used}
    if not planning:
        return ModelActor(name, **used)
    if not planning.keys() >= {"plan", "world", "judge"}:
        raise ValueError("planning needs --plan CHUNKS, --world CHECKPOINT and --judge FILE: give all three")
    if used.get("device", "cpu") != "cpu":
        raise ValueError(f"planning imagines on the CPU, got --device {used['device']}: leave it out")
    from worldvla.eval.planning import PlanningActor

    required = (planning.pop(option) for option in ("world", "judge", "plan"))
    return PlanningActor(name, *required, seed=seed, **planning, **used)
