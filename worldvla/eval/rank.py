"""Do policies rank in imagination as they do in the simulator?

Every policy acts from the same first frames twice: in the simulator, and in a world model, which after that
frame never asks the simulator again. A judge, a small network trained on demonstrations, reads the
proprioception and the success off imagined frames. It reads the simulator's too, so that its own errors can
be told from the world's. Dims: N episodes, P pictures, M policies, Y X pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvla.data.episode import read_episodes
from worldvla.eval.inverse import Towers
from worldvla.eval.record import provenance
from worldvla.eval.video import FPS, views_side_by_side, write_mp4
from worldvla.files import write_json
from worldvla.infer.imagine import World
from worldvla.infer.load import Model, load
from worldvla.infer.policy import Policy
from worldvla.progress import progress_bar
from worldvla.sim import env as sim

AFTER = 4
"""Pictures of each demonstration from its success on, which HDF5 files do not hold: the simulator goes on."""
CONFIRM = 2
"""Pictures in a row that the judge must call a success."""
STEPS, BATCH, RATE = 2_000, 64, 2e-3
HELD_OUT = 0.1
"""Share of the demonstrations that the judge is not trained on: its errors are measured there."""

Frame = dict[str, np.ndarray]
"""view -> uint8 (Y, X, 3); of several pictures (P, Y, X, 3)."""


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

    def __getitem__(self, rows: np.ndarray) -> "Pictures":
        images = {v: a[rows] for v, a in self.images.items()}
        return Pictures(images, self.states[rows], self.tasks[rows], self.success[rows], self.episodes[rows])


class Judge(nn.Module):
    """Pictures of a known task -> proprioception and the logit of success."""

    def __init__(self, views: Sequence[str], tasks: Sequence[sim.Task], mean: np.ndarray, std: np.ndarray):
        super().__init__()
        self.tasks = list(tasks)
        self.towers = Towers(views, 3, sim.NUM_STATE_DIMS + len(tasks))
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(std)

    def forward(self, images: Mapping[str, np.ndarray], tasks: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return states (P, 8), standardised, and logits (P,) for task indices (P,)."""
        views = self.towers.views
        x = {v: torch.from_numpy(images[v]).permute(0, 3, 1, 2).float() / 127.5 - 1 for v in views}
        out = self.towers(x)
        rows = torch.arange(len(out))
        return out[:, : sim.NUM_STATE_DIMS], out[rows, sim.NUM_STATE_DIMS + torch.from_numpy(tasks)]

    @torch.inference_mode()
    def read(self, images: Mapping[str, np.ndarray], tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return states (P, 8) in their units, float32, and whether the task is done (P,)."""
        states, logits = self(images, tasks)
        return (states * self.std + self.mean).numpy().astype(np.float32), logits.numpy() > 0


def gather(
    paths: Sequence[Path], suites: Sequence[str], views: Mapping[str, tuple[int, int]], episodes: int
) -> tuple[list[sim.Task], Pictures]:
    """Return the tasks of `suites` and the pictures of at most `episodes` demonstrations of each."""
    tasks = [task for suite in suites for task in sim.tasks(suite)]
    numbers = {(task.suite, task.name): i for i, task in enumerate(tasks)}
    images: dict[str, list[np.ndarray]] = {view: [] for view in views}
    states, of, success, which = [], [], [], []
    with progress_bar() as progress:
        for path in progress.track(paths, description="demonstrations for the judge"):
            env: Any = None
            for count, episode in enumerate(read_episodes(path)):
                number = numbers.get((episode.suite, episode.task))
                if number is None or count == episodes:
                    break
                if env is None:
                    env = sim.make(tasks[number], dict(views))
                    env.reset(options={"init": 0})
                env.set_state(episode.sim_states[-1])
                more = [env.step(action) for action in [episode.actions[-1]] * AFTER]
                for view, size in views.items():
                    if (found := episode.images.get(view, np.empty(0)).shape[1:3]) != tuple(size):
                        raise ValueError(
                            f"{path}: view {view} is {found} pixels, the models see {size}: collect it so"
                        )
                    images[view] += [episode.images[view], np.stack([step[0][view] for step in more])]
                states += [episode.states, np.stack([step[0]["state"] for step in more])]
                success += [False] * len(episode) + [step[4]["success"] for step in more]
                of += [number] * (len(episode) + AFTER)
                which += [len(states)] * (len(episode) + AFTER)
            if env is not None:
                env.close()
    if missing := sorted(set(range(len(tasks))) - set(of)):
        task = tasks[missing[0]]
        raise ValueError(
            f"no demonstration of {task.suite}/{task.name} for the judge: collect it, give --demos"
        )
    joined = {view: np.concatenate(parts) for view, parts in images.items()}
    arrays = (np.concatenate(states), np.array(of), np.array(success), np.array(which))
    return tasks, Pictures(joined, *arrays)


def train_judge(
    tasks: Sequence[sim.Task], seen: Pictures, steps: int = STEPS, seed: int = 0
) -> tuple[Judge, dict[str, Any]]:
    """Return the judge, half of whose batches are successes, and its errors on held-out demonstrations."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(seen.episodes))
    held = np.isin(seen.episodes, names[: max(1, int(HELD_OUT * len(names)))])
    train, test = seen[~held], seen[held]
    kinds = [np.flatnonzero(train.success == kind) for kind in (False, True)]
    if not all(map(len, kinds)):
        raise ValueError("the judge needs demonstrations that end in success, and more than one")
    std = train.states.std(0) + 1e-4
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(list(seen.images), tasks, train.states.mean(0), std)
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        with progress_bar() as progress:
            for _ in progress.track(range(steps), description="train the judge"):
                batch = train[np.concatenate([rng.choice(kind, BATCH // 2) for kind in kinds])]
                states, logits = judge(batch.images, batch.tasks)
                truth = (torch.from_numpy(batch.states) - judge.mean) / judge.std
                loss = F.smooth_l1_loss(states, truth)
                loss = loss + F.binary_cross_entropy_with_logits(
                    logits, torch.from_numpy(batch.success).float()
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    judge.eval()
    parts = [
        test[rows] for rows in np.array_split(np.arange(len(test.tasks)), max(1, len(test.tasks) // 512))
    ]
    read = [judge.read(part.images, part.tasks) for part in parts]
    off, said = (
        np.abs(np.concatenate([r[0] for r in read]) - test.states),
        np.concatenate([r[1] for r in read]),
    )
    return judge, {
        "pictures": len(test.tasks),
        "position_error_mm": round(1000 * float(off[:, :3].mean()), 2),
        "successes_seen": [int(said[test.success].sum()), int(test.success.sum())],
        "false_alarms": [int(said[~test.success].sum()), int((~test.success).sum())],
    }


def confirmed(said: np.ndarray) -> np.ndarray:
    """Return for each time whether the last CONFIRM of `said` (T, ...) are all true; (T, ...)."""
    padded = np.concatenate([np.zeros((CONFIRM - 1, *said.shape[1:]), dtype=bool), said])
    return np.all([padded[i : i + len(said)] for i in range(CONFIRM)], axis=0)


def simulate(
    policy: Policy, execute: int, judge: Judge, number: int, init: int, env: Any
) -> tuple[bool, bool]:
    """Return what the simulator and what the judge say of one episode of task `number` in the simulator."""
    observation, _ = env.reset(options={"init": init})
    task, frames, done, left, chunk = judge.tasks[number], [], False, CONFIRM, np.empty(0)
    for t in range(env.horizon):
        if t % execute == 0:
            chunk = policy.act({**observation, "instruction": task.instruction})
        observation, _, success, _, _ = env.step(chunk[t % execute])
        frames.append({view: observation[view] for view in judge.towers.views})
        done = done or success
        left -= done
        if not left:
            break
    images = {view: np.stack([frame[view] for frame in frames]) for view in judge.towers.views}
    return done, bool(confirmed(judge.read(images, np.full(len(frames), number))[1]).any())


def imagine(
    policy: Policy,
    execute: int,
    judge: Judge,
    world: World,
    numbers: np.ndarray,
    first: Sequence[Mapping[str, Any]],
    films: int = 0,
) -> tuple[np.ndarray, list[list[Frame]]]:
    """Return what the judge says (N,) of episodes that `world` imagines from the observations `first` on, and
    the frames of the first `films` of them. Task `numbers` (N,)."""
    views, alive = judge.towers.views, np.arange(len(numbers))
    horizons = np.array([sim.suite(judge.tasks[n].suite).horizon for n in numbers])
    done, states = np.zeros(len(numbers), dtype=bool), np.stack([o["state"] for o in first])
    frame: Any = world.reset({view: np.stack([o[view] for o in first]) for view in views})
    said, chunks = np.zeros((CONFIRM, len(numbers)), dtype=bool), np.empty(0)
    filmed: list[list[Frame]] = [[] for _ in range(films)]
    for t in range(horizons.max()):
        if t % execute == 0:
            going = ~done[alive] & (t < horizons[alive])
            world.keep(going)
            frame, alive = {v: f[going] for v, f in frame.items()}, alive[going]
            if not len(alive):
                break
            chunks = policy.act(
                [
                    {**{v: frame[v][i] for v in views}, "state": states[n], "instruction": text}
                    for i, n in enumerate(alive)
                    for text in [judge.tasks[numbers[n]].instruction]
                ]
            )
        frame = world.step(chunks[:, t % execute])
        states[alive], now = judge.read(frame, numbers[alive])
        said = np.concatenate([said[1:], said[-1:]])
        said[-1, alive] = now
        done[alive] |= said[:, alive].all(0) & (t < horizons[alive])
        for i, n in enumerate(alive):
            if n < films:
                filmed[n].append({v: frame[v][i] for v in views})
    return done, filmed


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the last axis, those of ties their mean."""
    less = (values[..., None, :] < values[..., :, None]).sum(-1)
    same = (values[..., None, :] == values[..., :, None]).sum(-1)
    return less + (same - 1) / 2


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation along the last axis; nan where one of them is constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    spread = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), spread, out=np.full(spread.shape, np.nan), where=spread > 1e-12)


def agreement(a_MN: np.ndarray, b_MN: np.ndarray, draws: int = 2_000, seed: int = 0) -> dict[str, Any]:
    """Return Spearman's and Pearson's correlation of the success rates of M policies, with intervals.

    Bootstrap over the N initial states, which all policies share; draws in which no policy differs are left
    out.
    """
    rows = np.random.default_rng(seed).integers(0, a_MN.shape[1], (draws, a_MN.shape[1]))
    drawn = [m[:, rows].mean(-1).T for m in (a_MN, b_MN)]  # (draws, M)
    whole = [m.mean(1) for m in (a_MN, b_MN)]
    out: dict[str, Any] = {"same_episodes": [int((a_MN == b_MN).sum()), int(a_MN.size)]}
    for name, of in {"spearman": ranks, "pearson": np.asarray}.items():
        value, spread = correlation(*map(of, whole)), correlation(*map(of, drawn))
        spread = spread[np.isfinite(spread)]
        interval = [round(float(q), 3) for q in np.quantile(spread, (0.025, 0.975))] if len(spread) else None
        out[name] = {"value": round(float(value), 3) if np.isfinite(value) else None, "interval_95": interval}
    return out


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

    `episodes` of each task from initial state `first` on; `execute`: actions of a chunk before the next look,
    several: each a policy of its own, none: all; `judged`: demonstrations of each task for the judge.
    """
    model, policies = load(world), []
    for policy in map(load, checkpoints):
        _check(policy, model)
        chunk = policy.config.layout.chunk
        policies += [(policy, n) for n in dict.fromkeys(min(n, chunk) for n in execute or [chunk])]
    views = model.view_sizes
    tasks, seen = gather(demos, suites, views, judged)
    judge, errors = train_judge(tasks, seen, judge_steps, seed)
    starts = [(number, first + i) for number in range(len(tasks)) for i in range(episodes)]
    numbers = np.array([number for number, _ in starts])
    envs: list[Any] = [sim.make(task, views) for task in tasks]
    observations = [envs[n].reset(options={"init": init})[0] for n, init in starts]
    rows, imagination = [], model.world()
    with progress_bar() as progress:
        bar = progress.add_task("policies", total=len(policies))
        for policy, n in policies:
            act = policy.policy()
            real = [simulate(act, n, judge, number, init, envs[number]) for number, init in starts]
            wanted = 0 if rows else films
            done, filmed = imagine(act, n, judge, imagination, numbers, observations, wanted)
            if filmed:
                pictures = [picture for film in filmed for picture in views_side_by_side(film)]
                write_mp4(out_dir / "imagined.mp4", pictures, FPS[sim.suite(suites[0]).simulator])
            outcomes = np.array([*np.array(real).T, done], dtype=int)
            identity = {"name": policy.config.name, "seed": policy.config.train.seed, "execute": n}
            rows.append(identity | {"checkpoint": policy.identity(), "outcomes": outcomes.tolist()})
            progress.advance(bar)
    for env in envs:
        env.close()
    sim_MN, judge_MN, imagined_MN = np.array([row["outcomes"] for row in rows]).transpose(1, 0, 2)
    record = {
        "world": model.identity(),
        "suites": list(suites),
        "protocol": {
            "episodes": episodes,
            "first": first,
            "horizons": {suite: sim.suite(suite).horizon for suite in suites},
            "confirm": CONFIRM,
            "seed": seed,
        },
        "judge": {"demonstrations": judged, **errors},
        "columns": "of each initial state: the simulator's word, the judge's there, the judge's imagined",
        "policies": rows,
        "imagined": agreement(sim_MN, imagined_MN),
        "judge_on_real_frames": agreement(sim_MN, judge_MN),
        **provenance(),
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
