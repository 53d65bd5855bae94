"""Do policies rank in imagination as they do in the simulator?

Every policy acts from the same observations twice: in the simulator, and in a world model, which after that
never asks the simulator again. A judge, a small network trained on demonstrations, reads proprioception and
success off imagined frames. It reads the simulator's too, through the same image tokenizer and up to the
same step, so that its own errors can be told from the world's. Dims: N episodes, P pictures, M policies, Y X
pixels.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvla.data.episode import read_episodes
from worldvla.eval.inverse import Towers
from worldvla.eval.record import Journal
from worldvla.eval.stats import rank_agreement
from worldvla.eval.video import FPS, views_side_by_side, write_mp4
from worldvla.eval.world import reconstruct
from worldvla.files import write_json
from worldvla.infer.model import Model, load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.libero.doctor import verdict
from worldvla.sim.protocol import NUM_ACTION_DIMS, NUM_INITS, NUM_STATE_DIMS, Task

AFTER = 4
"""Pictures of each demonstration from its success on, which HDF5 files do not hold: the simulator goes on."""
CONFIRM = 2
"""Pictures in a row that the judge must call a success."""
STEPS, BATCH, RATE = 2_000, 64, 2e-3
HELD_OUT = 0.1
"""Share of the demonstrations that the judge is not trained on: its errors are measured there."""

Frame = dict[str, np.ndarray]
"""view -> uint8 (P, Y, X, 3)."""


@dataclass(frozen=True)
class Pictures:
    """What the judge learns from."""

    images: Frame
    states: np.ndarray
    """(P, 8)."""
    tasks: np.ndarray
    """(P,), index among the judge's tasks."""
    success: np.ndarray
    """(P,) bool: the simulator's word."""
    episodes: np.ndarray
    """(P,), which demonstration."""


class Judge(nn.Module):
    """Pictures of a known task -> proprioception and the logit of success."""

    def __init__(self, views: Sequence[str], tasks: Sequence[Task], mean: np.ndarray, std: np.ndarray):
        super().__init__()
        self.tasks = list(tasks)
        self.towers = Towers(views, 3, NUM_STATE_DIMS + len(tasks))
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(std)

    def forward(self, images: Mapping[str, np.ndarray], tasks: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return states (P, 8), standardised, and logits (P,) for task indices (P,)."""
        views = self.towers.views
        x = {v: torch.from_numpy(images[v]).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in views}
        out = self.towers(x)
        rows = torch.arange(len(out))
        return out[:, :NUM_STATE_DIMS], out[rows, NUM_STATE_DIMS + torch.from_numpy(tasks)]

    @torch.inference_mode()
    def read(self, images: Mapping[str, np.ndarray], tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return states (P, 8) in their units, float32, and whether the task is done (P,)."""
        states, logits = self(images, tasks)
        return (states * self.std + self.mean).numpy().astype(np.float32), logits.numpy() > 0


def gather(
    paths: Sequence[Path], suites: Sequence[str], model: Model, episodes: int
) -> tuple[list[Task], Pictures]:
    """Return the tasks of `suites` and the pictures of at most `episodes` demonstrations of each.

    The pictures are as the image tokenizer of `model` shows them.
    """
    tasks = [task for suite in suites for task in sim.tasks(suite)]
    numbers = {(task.suite, task.name): i for i, task in enumerate(tasks)}
    images: dict[str, list[np.ndarray]] = {view: [] for view in model.view_sizes}
    states, of, success, which = [], [], [], []
    with progress_bar() as progress:
        for path in progress.track(paths, description="demonstrations for the judge"):
            with ExitStack() as stack:
                env: Any = None
                for count, episode in enumerate(read_episodes(path)):
                    number = numbers.get((episode.suite, episode.task))
                    if number is None or count == episodes:
                        break
                    sizes = {view: found.shape[1:3] for view, found in episode.images.items()}
                    for view, size in model.view_sizes.items():
                        if sizes.get(view) != tuple(size):
                            raise ValueError(
                                f"{path}: view {view} is {sizes.get(view, 'missing')}, "
                                f"the models see {size}: collect it so"
                            )
                    if env is None:
                        env = sim.make(tasks[number], model.view_sizes)
                        stack.enter_context(closing(env))
                    env.reset(options={"init": max(episode.init, 0)})  # fixtures are not in every state
                    env.set_state(episode.sim_states[-1])
                    rest = episode.actions[-1] * (np.arange(NUM_ACTION_DIMS) == NUM_ACTION_DIMS - 1)
                    more = [env.step(action) for action in [episode.actions[-1], *[rest] * (AFTER - 1)]]
                    for view, found in images.items():
                        after = np.stack([step[0][view] for step in more])
                        found.append(reconstruct(model, np.concatenate([episode.images[view], after])))
                    states += [episode.states, np.stack([step[0]["state"] for step in more])]
                    success += [False] * len(episode) + [step[4]["success"] for step in more]
                    of += [number] * (len(episode) + AFTER)
                    which += [len(states)] * (len(episode) + AFTER)
    seen = {
        "demonstration": set(of),
        "success when it is replayed": set(np.array(of)[np.array(success, bool)]),
    }
    for what, found in seen.items():
        if missing := sorted(set(range(len(tasks))) - found):
            where = f"{tasks[missing[0]].suite}/{tasks[missing[0]].name}"
            raise ValueError(f"no {what} of {where} for the judge: collect it anew, give --demos")
    joined = {view: np.concatenate(parts) for view, parts in images.items()}
    arrays = (np.concatenate(states), np.array(of), np.array(success), np.array(which))
    return tasks, Pictures(joined, *arrays)


def train_judge(
    tasks: Sequence[Task], seen: Pictures, steps: int = STEPS, seed: int = 0
) -> tuple[Judge, dict[str, Any]]:
    """Return the judge, half of whose batches are successes, and its errors on held-out demonstrations."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(seen.episodes))
    held = np.isin(seen.episodes, names[: max(1, int(HELD_OUT * len(names)))])
    kinds = [np.flatnonzero(~held & (seen.success == kind)) for kind in (False, True)]
    if lacking := sorted(set(range(len(tasks))) - set(seen.tasks[kinds[1]])):
        where = f"{tasks[lacking[0]].suite}/{tasks[lacking[0]].name}"
        raise ValueError(f"too few demonstrations of {where} to hold some out: collect more of it")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train = seen.states[~held]
        judge = Judge(list(seen.images), tasks, train.mean(0), train.std(0) + 1e-4)
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        with progress_bar() as progress:
            for _ in progress.track(range(steps), description="train the judge"):
                rows = np.concatenate([rng.choice(kind, BATCH // 2) for kind in kinds])
                states, logits = judge({v: a[rows] for v, a in seen.images.items()}, seen.tasks[rows])
                truth = (torch.from_numpy(seen.states[rows]) - judge.mean) / judge.std
                success = torch.from_numpy(seen.success[rows]).float()
                loss = F.smooth_l1_loss(states, truth)
                loss = loss + F.binary_cross_entropy_with_logits(logits, success)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    judge.eval()
    off, said = np.empty(seen.states.shape), np.empty(len(held), dtype=bool)
    for rows in np.split(np.flatnonzero(held), range(512, int(held.sum()), 512)):
        read, said[rows] = judge.read({v: a[rows] for v, a in seen.images.items()}, seen.tasks[rows])
        off[rows] = np.abs(read - seen.states[rows])
    good, bad = held & seen.success, held & ~seen.success
    return judge, {
        "position_error_mm": round(1000 * float(off[held, :3].mean()), 2),
        "successes_seen": [int(said[good].sum()), int(good.sum())],
        "false_alarms": [int(said[bad].sum()), int(bad.sum())],
    }


@dataclass(frozen=True)
class Seen:
    """What episodes side by side show after a step; one row an episode."""

    frame: Frame
    """What the policy sees."""
    states: np.ndarray
    """(N, 8), what the policy feels."""
    said: np.ndarray
    """(N,) bool: the judge's word."""
    success: np.ndarray
    """(N,) bool: the simulator's word; the judge's where there is no simulator."""


class Simulated:
    """Episodes in the simulator."""

    def __init__(self, judge: Judge, model: Model, envs: Sequence[Any], numbers: np.ndarray) -> None:
        self.judge, self.model, self.envs, self.numbers = judge, model, list(envs), numbers

    def keep(self, rows: np.ndarray) -> None:
        self.envs = [env for env, kept in zip(self.envs, rows, strict=True) if kept]
        self.numbers = self.numbers[rows]

    def step(self, actions: np.ndarray) -> Seen:
        done = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        frame = {view: np.stack([step[0][view] for step in done]) for view in self.model.view_sizes}
        shown = {view: reconstruct(self.model, images) for view, images in frame.items()}
        states, success = (
            np.stack([step[0]["state"] for step in done]),
            np.array([step[4]["success"] for step in done]),
        )
        return Seen(frame, states, self.judge.read(shown, self.numbers)[1], success)


class Imagined:
    """The same in a world model; the judge is asked for what no frame says."""

    def __init__(self, judge: Judge, world: World, first: Frame, numbers: np.ndarray) -> None:
        self.judge, self.world, self.numbers = judge, world, numbers
        world.reset(first)

    def keep(self, rows: np.ndarray) -> None:
        self.world.keep(rows)
        self.numbers = self.numbers[rows]

    def step(self, actions: np.ndarray) -> Seen:
        frame: Any = self.world.step(actions)
        states, said = self.judge.read(frame, self.numbers)
        return Seen(frame, states, said, said)


def drive(
    policy: Policy,
    execute: int,
    body: Simulated | Imagined,
    tasks: Sequence[Task],
    first: Sequence[Mapping[str, Any]],
    films: int = 0,
) -> tuple[np.ndarray, np.ndarray, list[list[Frame]]]:
    """Return whether each of N episodes succeeded by the simulator's word and by the judge's, (N,) bool each,
    and the frames of the first `films`. An episode ends when both say so, or at its suite's horizon.

    `tasks` (N), and what each is seen to be at `first` (N).
    """
    views = [view for view in first[0] if view != "state"]
    horizons = np.array([sim.suite(task.suite).horizon for task in tasks])
    frame, states = {v: np.stack([o[v] for o in first]) for v in views}, np.stack([o["state"] for o in first])
    alive, chunks = np.arange(len(tasks)), np.empty(0)
    streak, success, judged = (np.zeros(len(tasks), dtype=t) for t in (int, bool, bool))
    filmed: list[list[Frame]] = [[] for _ in range(films)]
    for t in range(int(horizons.max())):
        if t % execute == 0 or (t >= horizons[alive]).any():
            going = ~(success & judged)[alive] & (t < horizons[alive])
            body.keep(going)
            frame, states, alive = {v: f[going] for v, f in frame.items()}, states[going], alive[going]
            if t % execute:
                chunks = chunks[going]
            if not len(alive):
                break
        if t % execute == 0:
            seen = [{**{v: frame[v][i] for v in views}, "state": states[i]} for i in range(len(alive))]
            texts = [{"instruction": tasks[n].instruction} for n in alive.tolist()]
            chunks = policy.act([{**o, **text} for o, text in zip(seen, texts, strict=True)])
        now = body.step(chunks[:, t % execute])
        frame, states = now.frame, now.states
        streak[alive] = np.where(now.said, streak[alive] + 1, 0)
        judged[alive] |= streak[alive] >= CONFIRM
        success[alive] |= now.success
        for i, n in enumerate(alive.tolist()):
            if n < films:
                filmed[n].append({v: frame[v][i] for v in views})
    return success, judged, filmed


def rank_policies(
    checkpoints: Sequence[Path | str],
    world: Path | str,
    demos: Sequence[Path],
    suites: Sequence[str],
    out_dir: Path,
    *,
    episodes: int = 2,
    first: int = 0,
    execute: Sequence[int] = (),
    judged: int = 30,
    judge_steps: int = STEPS,
    films: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Let every checkpoint act in the simulator and in `world`; write record.json, rank.png and imagined.mp4.

    `episodes` of each task from initial state `first` on, side by side; `execute`: actions of a chunk before
    the next look, several: each a policy of its own, none: all; `judged`: demonstrations of each task for the
    judge. The same call again goes on where it stopped: policies that are done stand in policies.jsonl.
    """
    if not checkpoints or len(set(map(str, checkpoints))) < len(checkpoints):
        raise ValueError(f"give every policy once, and at least one, got {[str(c) for c in checkpoints]}")
    if not suites or len(set(suites)) < len(suites) or any(n < 1 for n in execute):
        raise ValueError(f"give every suite once, and execute at least 1, got {suites} and {execute}")
    if episodes < 1 or first < 0 or first + episodes > NUM_INITS:
        raise ValueError(
            f"initial states 0..{NUM_INITS - 1} are for evaluation: got {episodes} from {first} on"
        )
    model, policies = load(world), []
    for policy in map(load, checkpoints):
        _check(policy, model)
        chunk = policy.config.layout.chunk
        policies += [(policy, n) for n in dict.fromkeys(min(n, chunk) for n in execute or [chunk])]
    tasks, seen = gather(demos, suites, model, judged)
    judge, errors = train_judge(tasks, seen, judge_steps, seed)
    numbers = np.repeat(np.arange(len(tasks)), episodes)
    listed = [tasks[n] for n in numbers]
    inits = [first + i for _ in tasks for i in range(episodes)]
    identity = {
        "world": model.identity(),
        "suites": list(suites),
        "protocol": {
            "episodes": episodes,
            "first": first,
            "horizons": {suite: sim.suite(suite).horizon for suite in suites},
            "confirm": CONFIRM,
            "seed": seed,
        },
        "judge": {"demonstrations": judged, "steps": judge_steps},
    }
    with ExitStack() as stack:
        envs: list[Any] = [stack.enter_context(closing(sim.make(task, model.view_sizes))) for task in listed]
        journal = stack.enter_context(Journal(out_dir / "policies.jsonl", identity))
        progress = stack.enter_context(progress_bar())
        imagination = World(model)
        for policy, n in progress.track(policies, description="policies"):
            row = {"name": policy.config.name, "seed": policy.config.train.seed, "execute": n}
            row |= {"checkpoint": policy.identity(), "status": "done"}
            row = json.loads(json.dumps(row))
            if any({key: done[key] for key in row} == row for done in journal.outcomes):
                continue
            start = [env.reset(options={"init": i})[0] for env, i in zip(envs, inits, strict=True)]
            act, frames = Policy(policy), {v: np.stack([o[v] for o in start]) for v in model.view_sizes}
            real, control, _ = drive(act, n, Simulated(judge, model, envs, numbers), listed, start)
            body = Imagined(judge, imagination, frames, numbers)
            _, imagined, filmed = drive(act, n, body, listed, start, 0 if journal.outcomes else films)
            if filmed:
                pictures = [picture for film in filmed for picture in views_side_by_side(film)]
                write_mp4(out_dir / "imagined.mp4", pictures, FPS[sim.suite(suites[0]).simulator])
            journal.add(row | {"outcomes": np.array([real, control, imagined], dtype=int).tolist()})
        rows = journal.outcomes
    record = {
        **identity,
        "judge": {**identity["judge"], **errors},
        "columns": "of each initial state: the simulator's word, the judge's there, the judge's imagined",
        "policies": rows,
        **rank_agreement(rows),
        **provenance(),
        "doctor": verdict(),
    }
    write_json(out_dir / "record.json", record)
    _draw(rows, out_dir / "rank.png")
    return record


def _check(policy: Model, world: Model) -> None:
    if policy.config.layout.history > 1:
        raise ValueError(
            f"{policy.path} looks at {policy.config.layout.history} frames: only policies of one are ranked"
        )
    if policy.view_sizes != world.view_sizes:
        raise ValueError(
            f"{policy.path} sees {policy.view_sizes}, the world shows {world.view_sizes}: take another world"
        )


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one point a policy: its success rate in the simulator and in imagination."""
    from matplotlib.figure import Figure

    figure = Figure((4.5, 4.2), layout="constrained")
    axes = figure.subplots()
    rates = np.array([row["outcomes"] for row in rows]).mean(2).T
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    axes.scatter(rates[0], rates[1], marker="x", color="0.6", label="the judge on the simulator's frames")
    axes.scatter(rates[0], rates[2], label="imagined")
    axes.set(xlabel="success in the simulator", ylabel="success by the judge", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
