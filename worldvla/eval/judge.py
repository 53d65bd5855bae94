"""A judge of success, and the bodies in which `rank` and `improve` let a policy act before it.

Every policy acts from the same observations twice: in the simulator, and in a world model, which after that
never asks the simulator again. A judge, a small network trained on recorded episodes, reads success off the
codes of imagined frames, how near it is, and proprioception for worlds that do not say it. It reads the
simulator's frames too, encoded, up to the same step, so that its own errors can be told from the world's.
Dims: N episodes (behind P: codes of a frame), P pictures, M policies, S state dims, Y X pixels.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvla.data.episode import Episode, fingerprint, read_episodes
from worldvla.eval.world import Clip, film, imagine
from worldvla.files import check_shapes, load_network, reading, save_network
from worldvla.infer.model import Model
from worldvla.infer.world import World
from worldvla.progress import progress_bar
from worldvla.sim import suites as sim
from worldvla.sim.protocol import NUM_ACTION_DIMS, NUM_INITS, Task
from worldvla.video import write_mp4

AFTER = 4
"""Pictures of each demonstration from its success on, which HDF5 files do not hold: the simulator goes on."""
MIMES = 2
"""How often the judge sees the actions of a successful episode from another initial state, where the hand
does the same and mostly holds nothing. Else it learns success from what the hand does, not from the thing."""
CONFIRM = 2
"""Pictures in a row that must be a success, by the judge's word or, where episodes are compared with it, the
simulator's: what lands and rolls on is none."""
STEPS, BATCH, RATE, WIDTH = 3_000, 192, 2e-3, 32
DISCOUNT = 0.95
"""Of the value, for each step that success is away."""
DONE, WRONG = 1 / 3, 0.05
"""Share of successes in a batch, and of codes that are another picture's: imagination has wrong ones."""
FILMS = 8
"""Of replays that imagination ends otherwise, at most, of each task in turn."""
HELD_OUT = 0.1
"""Share of the episodes that the judge is not trained on: its errors are measured there."""

Frame = dict[str, np.ndarray]
"""view -> uint8 (P, Y, X, 3)."""
Act = Callable[[Sequence[Mapping[str, Any]]], np.ndarray]
"""Observations of N episodes -> their chunks of actions, (N, U, 7)."""


@dataclass(frozen=True)
class Pictures:
    """What the judge learns from."""

    codes: np.ndarray
    """(P, N), of all views in order."""
    first: np.ndarray
    """(P, N), of the episode's first frame."""
    states: np.ndarray
    """(P, S)."""
    tasks: np.ndarray
    """(P,), index among the judge's tasks."""
    success: np.ndarray
    """(P,) bool: the simulator's word."""
    value: np.ndarray
    """(P,): DISCOUNT to the power of the steps up to the next success, 0 before none."""
    episodes: np.ndarray
    """(P,), which episode."""


class Judge(nn.Module):
    """Image codes of a known task, and those of the episode's first frame -> proprioception, the logit of
    success and that of its value. It never sees a pixel, so imagination need not be drawn for it, nor what
    the robot feels: a hand that opens above the goal says nothing of what was in it."""

    mean: Tensor
    std: Tensor
    threshold: Tensor
    """Logit above which a picture is a success: of held-out pictures it calls as many so as there are."""

    def __init__(self, model: Model, tasks: Sequence[Task], mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.tasks, layout = list(tasks), model.config.layout
        self.grids, self.sizes = layout.grids, layout.codes_per_view
        self.vectors = model.image.quantize.vectors
        channels = 3 * model.image.config.embed_dim
        self.towers = nn.ModuleList(self._tower(channels) for _ in self.grids)
        num_features = WIDTH * sum(self.sizes)
        self.head = nn.Sequential(
            nn.Linear(num_features, 256), nn.ReLU(), nn.Linear(256, len(mean) + 2 * len(tasks))
        )
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.register_buffer("threshold", torch.zeros(()))

    @staticmethod
    def _tower(channels: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(channels, 2 * WIDTH, 1), nn.BatchNorm2d(2 * WIDTH), nn.ReLU()]
        for i, o in ((2 * WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)):
            layers += [nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten())

    def forward(
        self, codes_PN: np.ndarray, first_PN: np.ndarray, tasks: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return states (P, S), standardised, and for task indices (P,) logits (P,) of success, as in
        training, and of value."""
        parts = []
        now, first = (self.vectors(torch.from_numpy(c.astype(np.int64))) for c in (codes_PN, first_PN))
        looks = torch.cat((now, first, now - first), -1).float().split(self.sizes, 1)
        for look, grid, tower in zip(looks, self.grids, self.towers, strict=True):
            parts.append(tower(look.unflatten(1, grid).permute(0, 3, 1, 2)))
        out, num_dims = self.head(torch.cat(parts, 1)), len(self.mean)
        rows, column = torch.arange(len(out)), num_dims + torch.from_numpy(tasks)
        return out[:, :num_dims], out[rows, column], out[rows, column + len(self.tasks)]

    @torch.inference_mode()
    def read(
        self, codes_PN: np.ndarray, first_PN: np.ndarray, tasks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return states (P, S) in their units, float32, and whether the task is done (P,)."""
        states, logits, _ = self(codes_PN, first_PN, tasks)
        return (states * self.std + self.mean).numpy().astype(np.float32), (logits > self.threshold).numpy()

    @torch.inference_mode()
    def value(self, codes_PN: np.ndarray, first_PN: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return how near success is, (P,): see `Pictures.value`."""
        return self(codes_PN, first_PN, tasks)[2].sigmoid().numpy()

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the weights, and beside them as JSON the tasks and `facts`."""
        save_network(path, self.state_dict(), {"tasks": [asdict(task) for task in self.tasks], **facts})

    @classmethod
    def load(cls, path: Path, model: Model) -> tuple["Judge", dict[str, Any]]:
        """Read what `save` wrote: the judge of codes of `model`, and all that stands beside it. One of
        another image tokenizer raises ValueError."""
        told, state = load_network(path, "`worldvla rank` leaves a judge in its folder")
        with reading(path.with_suffix(".json"), "facts of a judge", "train it again by `worldvla rank`"):
            tokenizer, tasks = told["made_of"]["tokenizer"], [Task(**task) for task in told["tasks"]]
        if tokenizer != model.image.digest():
            raise ValueError(
                f"{path} learnt from frames of another image tokenizer: give a judge of {model.path}"
            )
        zeros = np.zeros(len(state.get("mean", ())), dtype=np.float32)
        judge = cls(model, tasks, zeros, zeros)
        there, own = ({n: t.shape for n, t in table.items()} for table in (state, judge.state_dict()))
        check_shapes(path, there, own, "train it again")
        judge.load_state_dict(state)
        return judge.eval(), told


def check_policy(policy: Model, world: Model) -> None:
    """Raise ValueError unless a policy can act in a world model: on one frame, of the same views."""
    if policy.config.layout.history > 1:
        raise ValueError(
            f"{policy.path} looks at {policy.config.layout.history} frames: give a policy of one"
        )
    if policy.view_sizes != world.view_sizes:
        raise ValueError(
            f"{policy.path} sees {policy.view_sizes}, {world.path} shows {world.view_sizes}: take "
            "another world"
        )


def encoded(model: Model, images: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the codes (P, N) of frames, uint8 (P, Y, X, 3) a view."""
    parts = (model.image.encode(torch.from_numpy(images[view])).flatten(1) for view in model.view_sizes)
    return torch.cat(tuple(parts), 1).numpy()


def judge_of(
    path: Path,
    paths: Sequence[Path],
    suites: Sequence[str],
    model: Model,
    episodes: int,
    steps: int,
    seed: int,
) -> tuple[Judge, dict[str, Any]]:
    """Return the judge that stands in `path` and its errors; trained first, unless it is of the same files
    and settings."""
    made_of = ingredients(paths, suites, model, episodes, steps, seed)
    if path.is_file():
        judge, told = Judge.load(path, model)
        if told["made_of"] == made_of:
            return judge, told["errors"]
    judge, errors = train_judge(model, *gather(paths, suites, model, episodes), steps, seed)
    judge.save(path, {"made_of": made_of, "errors": errors})
    return judge, errors


def ingredients(
    paths: Sequence[Path], suites: Sequence[str], model: Model, episodes: int, steps: int, seed: int
) -> dict[str, Any]:
    """Return what a judge depends on; the files as one digest."""
    files = json.dumps([fingerprint(file) for file in paths], sort_keys=True).encode()
    return {
        "demos": hashlib.sha256(files).hexdigest()[:16],
        "suites": list(suites),
        "seed": seed,
        "tokenizer": model.image.digest(),
        "episodes": episodes,
        "mimes": MIMES,
        "steps": steps,
    }


def gather(
    paths: Sequence[Path], suites: Sequence[str], model: Model, episodes: int
) -> tuple[list[Task], Pictures]:
    """Return the tasks of `suites` and the pictures of at most `episodes` episodes of each file, and MIMES of
    each that succeeds; a task without one, or without a success, raises ValueError.
    """
    tasks = [task for suite in suites for task in sim.tasks(suite)]
    shown = _shown(paths, tasks, model, episodes, MIMES, "episodes for the judge")
    parts = [pictures for _, pictures in shown]
    success = {n for p in parts for n in p.tasks[p.success].tolist()}
    for what, of in {
        "demonstration": {n for p in parts for n in p.tasks.tolist()},
        "success when it is replayed": success,
    }.items():
        if missing := sorted(set(range(len(tasks))) - of):
            where = f"{tasks[missing[0]].suite}/{tasks[missing[0]].name}"
            raise ValueError(f"no {what} of {where} for the judge: collect it anew, give --demos")
    columns = (np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Pictures))
    return tasks, Pictures(*columns)


def _shown(
    paths: Sequence[Path], tasks: Sequence[Task], model: Model, episodes: int, mimes: int, title: str
) -> Iterator[tuple[Episode, Pictures]]:
    """Yield at most `episodes` episodes of each file of `tasks`, and their pictures; after each that succeeds
    `mimes` times it again with the pictures of the same actions from another initial state."""
    numbers, count = {(task.suite, task.name): i for i, task in enumerate(tasks)}, 0
    with progress_bar() as progress:
        for path in progress.track(paths, description=title):
            with ExitStack() as stack:
                env: Any = None
                for episode in islice(read_episodes(path), episodes):
                    number = numbers.get((episode.suite, episode.task))
                    if number is None:
                        break
                    model.check_views({v: f.shape[1:3] for v, f in episode.images.items()}, path)
                    if env is None:
                        env = stack.enter_context(closing(sim.make(tasks[number], model.view_sizes)))
                    yield episode, _pictures(model, number, count, *_seen(env, episode))
                    count += 1
                    for _ in range(mimes if episode.success else 0):
                        mimed = _mimed(env, episode, NUM_INITS + count)
                        yield episode, _pictures(model, number, count, *mimed)
                        count += 1


Shown = tuple[Frame, np.ndarray, list[bool]]
"""Frames of an episode, its states (P, S), and whether the task is done in each."""


def _seen(env: Any, episode: Episode) -> Shown:
    """Return an episode's own frames and, after its last action, AFTER more of the simulator's, which says of
    each whether the task is done."""
    env.reset(options={"init": max(episode.init, 0)})  # fixtures are not in every state
    success = []
    for state in episode.sim_states:
        env.set_state(state)
        success.append(env.info()["success"])
    frames, states, more = _acted(env, last_actions(episode))
    frames = {view: np.concatenate([episode.images[view], seen]) for view, seen in frames.items()}
    return frames, np.concatenate([episode.states, states]), success + more


def _mimed(env: Any, episode: Episode, init: int) -> Shown:
    """Return the same of an episode's actions from the initial state `init`."""
    first, info = env.reset(options={"init": init})
    frames, states, more = _acted(env, [*episode.actions[:-1], *last_actions(episode)])
    frames = {view: np.concatenate([first[view][None], seen]) for view, seen in frames.items()}
    return frames, np.concatenate([first["state"][None], states]), [info["success"], *more]


def _acted(env: Any, actions: Sequence[np.ndarray]) -> Shown:
    """Return what each of `actions` leads to."""
    steps = [env.step(action) for action in actions]
    frames = {view: np.stack([step[0][view] for step in steps]) for view in steps[0][0] if view != "state"}
    return frames, np.stack([step[0]["state"] for step in steps]), [step[4]["success"] for step in steps]


def _pictures(
    model: Model, task: int, number: int, frames: Frame, states: np.ndarray, success: list[bool]
) -> Pictures:
    codes = encoded(model, frames)
    later, value = np.flatnonzero(success), np.zeros(len(codes), dtype=np.float32)
    if len(later):
        wait = later[np.searchsorted(later, np.arange(later[-1] + 1))] - np.arange(later[-1] + 1)
        value[: later[-1] + 1] = DISCOUNT**wait
    return Pictures(
        codes,
        np.broadcast_to(codes[0], codes.shape),
        states,
        np.full(len(codes), task),
        np.array(success, dtype=bool),
        value,
        np.full(len(codes), number),
    )


def last_actions(episode: Episode) -> list[np.ndarray]:
    """Return the last action, and AFTER - 1 in which the hand rests as it is."""
    rest = episode.actions[-1] * (np.arange(NUM_ACTION_DIMS) == NUM_ACTION_DIMS - 1)
    return [episode.actions[-1], *[rest] * (AFTER - 1)]


def train_judge(
    model: Model, tasks: Sequence[Task], seen: Pictures, steps: int = STEPS, seed: int = 0
) -> tuple[Judge, dict[str, Any]]:
    """Return the judge of codes of `model`, and its errors on held-out episodes, on which its threshold is
    set: of pictures, and in how many episodes it says that the task was done exactly where it was."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(seen.episodes))
    held = np.isin(seen.episodes, names[: max(1, int(HELD_OUT * len(names)))])
    kinds = [np.flatnonzero(~held & (seen.success == kind)) for kind in (False, True)]
    if lacking := sorted(set(range(len(tasks))) - set(seen.tasks[kinds[1]])):
        where = f"{tasks[lacking[0]].suite}/{tasks[lacking[0]].name}"
        raise ValueError(f"too few demonstrations of {where} to hold some out: collect more of it")
    num_done = round(DONE * BATCH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train = seen.states[~held]
        judge = Judge(model, tasks, train.mean(0), train.std(0) + 1e-4)
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        with progress_bar() as progress:
            for _ in progress.track(range(steps), description="train the judge"):
                rows = np.concatenate(
                    [rng.choice(k, n) for k, n in zip(kinds, (BATCH - num_done, num_done), strict=True)]
                )
                codes = seen.codes[rows]
                codes = np.where(rng.random(codes.shape) < WRONG, rng.permutation(codes), codes)
                states, logits, values = judge(codes, seen.first[rows], seen.tasks[rows])
                truth = (torch.from_numpy(seen.states[rows]) - judge.mean) / judge.std
                success = torch.from_numpy(seen.success[rows]).float()
                loss = F.smooth_l1_loss(states, truth)
                loss = loss + F.binary_cross_entropy_with_logits(logits, success)
                loss = loss + F.binary_cross_entropy_with_logits(values, torch.from_numpy(seen.value[rows]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    judge.eval()
    off, logits_P = np.zeros(seen.states.shape), np.full(len(held), np.nan)
    with torch.inference_mode():
        for rows in np.split(np.flatnonzero(held), range(512, int(held.sum()), 512)):
            read, logits, _ = judge(seen.codes[rows], seen.first[rows], seen.tasks[rows])
            off[rows] = np.abs((read * judge.std + judge.mean).numpy() - seen.states[rows])
            logits_P[rows] = logits.numpy()
    judge.threshold.fill_(np.quantile(logits_P[held], 1 - seen.success[held].mean()))
    said, good, bad = logits_P > judge.threshold.item(), held & seen.success, held & ~seen.success
    each = [np.flatnonzero(held & (seen.episodes == n)) for n in np.unique(seen.episodes[held])]
    agree = [_confirmed(said[rows]) == _confirmed(seen.success[rows]) for rows in each]
    return judge, {
        "episodes_agree": [int(sum(agree)), len(agree)],
        "position_error_mm": round(1000 * float(off[held, :3].mean()), 2),
        "successes_seen": [int(said[good].sum()), int(good.sum())],
        "false_alarms": [int(said[bad].sum()), int(bad.sum())],
    }


@dataclass(frozen=True)
class Seen:
    """What parallel episodes show after a step; one row an episode."""

    frame: Frame
    """What the policy sees; empty where nobody looks."""
    states: np.ndarray
    """(N, 8), what the policy feels."""
    said: np.ndarray
    """(N,) bool: the judge's word."""
    success: np.ndarray
    """(N,) bool: the simulator's word; the judge's where there is no simulator."""


class SimulatedBody:
    """Episodes in the simulator."""

    def __init__(
        self, judge: Judge, model: Model, envs: Sequence[Any], first: Frame, numbers: np.ndarray
    ) -> None:
        self.judge, self.model, self.envs, self.numbers = judge, model, list(envs), numbers
        self.first = encoded(model, first)

    def keep(self, rows: np.ndarray) -> None:
        self.envs = [env for env, kept in zip(self.envs, rows, strict=True) if kept]
        self.first, self.numbers = self.first[rows], self.numbers[rows]

    def step(self, actions: np.ndarray, look: bool = True) -> Seen:  # noqa: ARG002 - the judge looks anyway
        done = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        frame = {view: np.stack([step[0][view] for step in done]) for view in self.model.view_sizes}
        states, success = (
            np.stack([step[0]["state"] for step in done]),
            np.array([step[4]["success"] for step in done]),
        )
        said = self.judge.read(encoded(self.model, frame), self.first, self.numbers)[1]
        return Seen(frame, states, said, success)


class ImaginedBody:
    """The same in a world model; the judge is asked for what neither frame nor world says."""

    def __init__(
        self, judge: Judge, world: World, first: Frame, states: np.ndarray, numbers: np.ndarray
    ) -> None:
        self.judge, self.world, self.numbers = judge, world, numbers
        world.reset({**first, "state": states})
        self.first = world.image_codes

    def keep(self, rows: np.ndarray) -> None:
        self.world.keep(rows)
        self.first, self.numbers = self.first[rows], self.numbers[rows]

    def step(self, actions: np.ndarray, look: bool = True) -> Seen:
        self.world.advance(actions)
        frame: Any = self.world.frame() if look else {}
        states, said = self.judge.read(self.world.image_codes, self.first, self.numbers)
        return Seen(frame, states if self.world.state is None else self.world.state, said, said)


def drive(
    act: Act,
    execute: int,
    body: SimulatedBody | ImaginedBody,
    tasks: Sequence[Task],
    first: Sequence[Mapping[str, Any]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each of N episodes succeeded by the simulator's word and by the judge's, (N,) bool each.
    An episode ends when both say so, or at its suite's horizon.

    `tasks` (N), and what each is seen to be at `first` (N).
    """
    views = [view for view in first[0] if view != "state"]
    horizons = np.array([sim.suite(task.suite).horizon for task in tasks])
    frame, states = {v: np.stack([o[v] for o in first]) for v in views}, np.stack([o["state"] for o in first])
    alive, chunks = np.arange(len(tasks)), np.empty(0)
    streak, success, judged = (np.zeros(len(tasks), dtype=t) for t in (int, bool, bool))
    for t in range(int(horizons.max())):
        if t % execute == 0 or (t >= horizons[alive]).any():
            going = ~(success & judged)[alive] & (t < horizons[alive])
            if not going.all():
                body.keep(going)
            frame, states, alive = {v: f[going] for v, f in frame.items()}, states[going], alive[going]
            if t % execute:
                chunks = chunks[going]
            if not len(alive):
                break
        if t % execute == 0:
            seen = [{**{v: frame[v][i] for v in views}, "state": states[i]} for i in range(len(alive))]
            texts = [{"instruction": tasks[n].instruction} for n in alive.tolist()]
            chunks = act([{**o, **text} for o, text in zip(seen, texts, strict=True)])
        now = body.step(chunks[:, t % execute], look=(t + 1) % execute == 0)
        frame, states = now.frame, now.states
        streak[alive] = np.where(now.said, streak[alive] + 1, 0)
        judged[alive] |= streak[alive] >= CONFIRM
        success[alive] |= now.success
    return success, judged


def replays(
    judge: Judge, world: Model, paths: Sequence[Path], episodes: int, out: Path, batch: int = 32
) -> dict[str, Any]:
    """Return how often episodes that nothing was trained on end as they did in the simulator: by the judge's
    word on real frames, and when their actions are imagined from the first frame. `table`: of failures and of
    successes, how many the judge calls failures and successes. `passing`: failures that were a success for
    fewer than CONFIRM pictures.

    At most `episodes` of each file of `paths`. `films`: some that imagination ends otherwise, in `out`/films.
    """
    shown = list(_shown(paths, judge.tasks, world, episodes, 0, "held-out episodes"))
    if not shown:
        raise ValueError("no held-out episode of the judge's tasks: give --held-out files of the same suites")
    truth, real, dreamt, passing = [], [], [], 0
    with progress_bar() as progress:
        parts = [shown[i : i + batch] for i in range(0, len(shown), batch)]
        for part in progress.track(parts, description="replay in imagination"):
            numbers = np.array([pictures.tasks[0] for _, pictures in part])
            plans = [[*episode.actions[:-1], *last_actions(episode)] for episode, _ in part]
            first = {v: np.stack([e.images[v][0] for e, _ in part]) for v in world.view_sizes}
            states = np.stack([e.states[0] for e, _ in part])
            body, said = ImaginedBody(judge, World(world), first, states, numbers), []
            for t in range(max(map(len, plans))):
                actions = np.stack([plan[min(t, len(plan) - 1)] for plan in plans])
                said.append(body.step(actions, look=False).said)
            said_NT = np.stack(said, 1)
            for row, (plan, (_, pictures)) in enumerate(zip(plans, part, strict=True)):
                truth.append(_confirmed(pictures.success))
                passing += bool(pictures.success.any()) and not truth[-1]
                real.append(_confirmed(judge.read(pictures.codes, pictures.first, pictures.tasks)[1]))
                dreamt.append(_confirmed(said_NT[row, : len(plan)]))
    report: dict[str, Any] = {"episodes": len(truth), "successes": sum(truth), "passing": passing}
    for name, found in {"judge_on_real_frames": real, "imagined": dreamt}.items():
        table = np.zeros((2, 2), dtype=int)
        np.add.at(table, (np.array(truth, dtype=int), np.array(found, dtype=int)), 1)
        report[name] = {"agree": int(np.trace(table)), "table": table.tolist()}
    pairs = zip([episode for episode, _ in shown], truth, dreamt, strict=True)
    of_task: dict[str, list[tuple[Episode, bool]]] = {}
    for episode, end, imagined in pairs:
        if end != imagined:
            of_task.setdefault(episode.task, []).append((episode, end))
    by_turns = [one for some in zip_longest(*of_task.values()) for one in some if one is not None]
    return report | {"films": _filmed(world, by_turns[:FILMS], out)}


def _filmed(world: Model, wrong: Sequence[tuple[Episode, bool]], out: Path) -> list[dict[str, Any]]:
    """Write a film of each episode and of what is imagined of it; return what it shows, with its success in
    the simulator."""
    clips, films = [Clip(episode, 0, len(episode) - 1) for episode, _ in wrong], []
    frames = imagine(world, clips, title="films")[0] if clips else []
    for i, (clip, (episode, success)) in enumerate(zip(clips, wrong, strict=True)):
        video = f"films/{i:02d}.mp4"
        write_mp4(out / video, film(clip, frames[i]), clip.fps)
        what = {"suite": episode.suite, "task": episode.task, "instruction": episode.instruction}
        films.append({**what, "success": success, "video": video})
    return films


def _confirmed(said: np.ndarray) -> bool:
    """Return whether CONFIRM pictures in a row are called a success."""
    return any(said[i : i + CONFIRM].all() for i in range(len(said) - CONFIRM + 1))
