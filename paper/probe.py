"""What can be read off an image tokenizer's codes: the gate before any policy is trained on them.

    python -m paper.probe out/tabletop/image_tokenizer out/demos/tabletop_object
    python -m paper.probe libero_four --task libero_10 0    # every thing of one task, moved about

A small network regresses the positions of the gripper and of the task's target from the codes, and one of the
same family from the raw pixels; both know the task, since each has its own layout. Errors are medians over
held-out episodes. The gate: no axis of the target worse than 1.2 cm, the distance at most 1.3 times that of
the pixels. The third row answers its task's median: codes must beat it. Of one task of LIBERO all things are
moved about, without demonstrations, and there is no gate.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Positional

from worldvla.data.episode import demonstration_files
from worldvla.files import write_json
from worldvla.machine import provenance
from worldvla.progress import progress_bar
from worldvla.sim.protocol import NUM_INITS
from worldvla.tokenizers.image import ImageTokenizer, folder_of, to_pixels

GATE_CM = 1.2
GATE_RATIO = 1.3
REACH = 0.03
"""Metres, along x and y."""
SIZES = {"agentview": (128, 128), "wrist": (64, 64)}
"""What the shipped models of LIBERO see."""
_CM = 100.0


@dataclass(frozen=True)
class ProbeData:
    """Frames and the truth about them, from any simulator; N frames."""

    images: dict[str, np.ndarray]
    """View to uint8 (N, Y, X, 3)."""
    tasks: np.ndarray
    """Index of the task, (N,), from 0."""
    episodes: np.ndarray
    """Episode of each frame, (N,); whole episodes are held out."""
    places: dict[str, np.ndarray]
    """What is looked for, "gripper" and "target" or things by name -> metres (N, 3)."""


class PositionNet(nn.Module):
    """Maps of about 8x8 of every view -> convolutions -> one vector, with the task -> numbers."""

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        num_tasks: int,
        num_out: int,
        *,
        shrink: int,
        width: int = 48,
    ) -> None:
        """`shapes`: (C, Y, X) of each view; `shrink`: halvings first (3 for pixels)."""
        super().__init__()
        self.trunks = nn.ModuleList()
        flat = 0
        for channels, rows, cols in shapes:
            before = channels + 2  # and the place of each pixel or code
            layers: list[nn.Module] = []
            if shrink:
                layers.append(nn.PixelUnshuffle(2))
                before *= 4
            for _ in range(shrink - 1):
                layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.ReLU()]
                before = width
            layers += [
                nn.Conv2d(before, 2 * width, 1),
                nn.ReLU(),
                nn.Conv2d(2 * width, width, 3, padding=1),
                nn.ReLU(),
            ]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten()]
            self.trunks.append(nn.Sequential(*layers))
            flat += width * (rows // 2**shrink) * (cols // 2**shrink)
        self.head = nn.Sequential(
            nn.Dropout(0.1),
            nn.Linear(flat + num_tasks, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, num_out),
        )

    def forward(self, maps: list[Tensor], task_BG: Tensor) -> Tensor:
        features = [trunk(_with_places(x)) for trunk, x in zip(self.trunks, maps, strict=True)]
        return self.head(torch.cat([*features, task_BG], dim=1))


def _with_places(x: Tensor) -> Tensor:
    batch, _, rows, cols = x.shape
    y = torch.linspace(-1, 1, rows)[None, None, :, None].expand(batch, 1, rows, cols)
    z = torch.linspace(-1, 1, cols)[None, None, None, :].expand(batch, 1, rows, cols)
    return torch.cat([x, y, z], dim=1)


def held_out(episodes: np.ndarray, share: float = 0.15, seed: int = 0) -> np.ndarray:
    """Return a mask (N,) of the frames of `share` of the episodes."""
    names = np.unique(episodes)
    chosen = np.random.default_rng(seed).permutation(names)[: max(1, round(share * len(names)))]
    return np.isin(episodes, chosen)


def _errors(guess: np.ndarray, places: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return median errors in cm of positions in metres, `guess` (N, 3 * P) of P: each axis, the distance."""
    result = {}
    for (name, truth), part in zip(places.items(), np.split(guess, len(places), axis=1), strict=True):
        error = np.abs(part - truth) * _CM
        axes = np.median(error, axis=0)
        result[name] = {axis: round(float(v), 3) for axis, v in zip("xyz", axes, strict=True)}
        result[name]["distance"] = round(float(np.median(np.linalg.norm(error, axis=1))), 3)
    return result


def _fit(
    inputs: list[Tensor],
    lookup: Any,
    data: ProbeData,
    *,
    shrink: int,
    steps: int,
    batch_size: int,
    seed: int,
    name: str,
) -> dict[str, Any]:
    """Train a PositionNet on maps `lookup(inputs[view][rows])`; return its errors on held-out episodes."""
    torch.manual_seed(seed)
    val = held_out(data.episodes, seed=seed)
    truth = torch.from_numpy(np.concatenate(list(data.places.values()), axis=1)).float()
    mean, std = truth[~val].mean(dim=0), truth[~val].std(dim=0).clamp(min=0.005)
    task = F.one_hot(torch.from_numpy(np.asarray(data.tasks)).long()).float()
    net = PositionNet(
        [tuple(lookup(x[:1]).shape[1:]) for x in inputs], *(t.shape[1] for t in (task, truth)), shrink=shrink
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    train_rows = torch.from_numpy(np.flatnonzero(~val))
    with progress_bar() as progress:
        for _ in progress.track(range(steps), description=f"probe of {name}"):
            rows = train_rows[torch.randint(len(train_rows), (batch_size,))]
            with torch.autocast("cpu", torch.bfloat16):
                guess = net([lookup(x[rows]) for x in inputs], task[rows]).float()
            loss = F.smooth_l1_loss(guess, (truth[rows] - mean) / std, beta=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        parts = torch.from_numpy(np.flatnonzero(val)).split(256)
        guess = torch.cat([net([lookup(x[rows]) for x in inputs], task[rows]) for rows in parts]) * std + mean
    return _errors(guess.numpy(), {name: at[val] for name, at in data.places.items()})


def _task_median(data: ProbeData, seed: int) -> dict[str, Any]:
    val = held_out(data.episodes, seed=seed)
    truth = np.concatenate(list(data.places.values()), axis=1)
    guess = truth.copy()
    for task in np.unique(data.tasks):
        of_task = data.tasks == task
        known = truth[of_task & ~val]
        guess[of_task] = np.median(known if len(known) else truth[~val], axis=0)
    return _errors(guess[val], {name: at[val] for name, at in data.places.items()})


def probe(
    data: ProbeData,
    tokenizer: ImageTokenizer,
    views: Sequence[str] = ("agentview",),
    *,
    steps: int = 1500,
    batch_size: int = 128,
    seed: int = 0,
    pixels: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return errors of `pixels`, `codes` and `task median`, and the `gate` of a target.

    `pixels`: what a former call on the same data returned for them, to save time.
    """
    fit = {"data": data, "steps": steps, "batch_size": batch_size, "seed": seed}
    if missing := [v for v in views if v not in data.images]:
        raise ValueError(f"views {missing} are not in the data, which has {sorted(data.images)}")
    images = [torch.from_numpy(data.images[v]) for v in views]
    if pixels is None:
        pixels = _fit(images, to_pixels, shrink=3, name="pixels", **fit)
    codes = [torch.cat([tokenizer.encode(part) for part in view.split(64)]) for view in images]
    some = tokenizer.quantize.vectors(codes[0][:: max(1, len(codes[0]) // 500)].flatten())
    mean, std = some.mean(dim=0), some.std(dim=0).clamp(min=1e-6)

    def vectors(ids: Tensor) -> Tensor:
        return ((tokenizer.quantize.vectors(ids) - mean) / std).permute(0, 3, 1, 2)

    found = _fit(codes, vectors, shrink=0, name="codes", **fit)
    record = {"views": list(views), "pixels": pixels, "codes": found, "task median": _task_median(data, seed)}
    if "target" in found:
        worst = max(found["target"][axis] for axis in "xyz")
        ratio = found["target"]["distance"] / max(1e-6, pixels["target"]["distance"])
        passed = worst < GATE_CM and ratio <= GATE_RATIO
        record["gate"] = {"worst_axis_cm": worst, "ratio": round(ratio, 3), "passed": passed}
    return record


def from_episodes(files: Sequence[Path], stride: int = 4) -> ProbeData:
    """Read every `stride`-th frame; the truth comes from the simulator, set to each recorded state."""
    from worldvla.data.episode import read_episodes
    from worldvla.sim import suites as sim

    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("tasks", "episodes", "gripper", "target")}
    images: dict[str, list[np.ndarray]] = {}
    number = 0
    with progress_bar() as progress:
        for index, path in enumerate(progress.track(files, description="states to positions")):
            env: Any = None
            for episode in read_episodes(path):
                if env is None:
                    env = sim.make(next(t for t in sim.tasks(episode.suite) if t.name == episode.task), {})
                rows = slice(number % stride, None, stride)
                targets = []
                for state in episode.sim_states[rows]:
                    env.set_state(state)
                    targets.append(env.target_position())
                if targets:
                    parts["target"].append(np.stack(targets))
                    parts["gripper"].append(episode.states[rows, :3])
                    parts["tasks"].append(np.full(len(targets), index))
                    parts["episodes"].append(np.full(len(targets), number))
                    for view, frames in episode.images.items():
                        images.setdefault(view, []).append(frames[rows])
                number += 1
    joined = {name: np.concatenate(part) for name, part in parts.items()}
    places = {name: joined.pop(name) for name in ("gripper", "target")}
    return ProbeData({view: np.concatenate(part) for view, part in images.items()}, places=places, **joined)


def from_moves(suite: str, index: int, layouts: int = 5, moves: int = 160) -> ProbeData:
    """Draw `layouts` initial states of a task of LIBERO that are not for evaluation, and in each, `moves`
    times, its things up to REACH beside their places; the hand stays."""
    from worldvla.sim import suites as sim

    env: Any = sim.make(sim.tasks(suite)[index], dict(SIZES))
    rng, frames, places = np.random.default_rng(index), [], []
    with closing(env), progress_bar() as progress:
        for init in progress.track(range(NUM_INITS, NUM_INITS + layouts), description=f"{suite} {index}"):
            env.reset(options={"init": init})
            start, world = env.get_state(), env.world
            firsts = [
                world.sim.model.get_joint_qpos_addr(t.joints[0])[0] for t in world.objects_dict.values()
            ]
            for _ in range(moves):
                state = start.copy()
                for first in firsts:
                    state[1 + first : 3 + first] += rng.uniform(-REACH, REACH, 2)  # behind the time
                env.set_state(state)
                frames.append(env.observe())
                places.append({name: env.position(name) for name in world.objects_dict})
    return ProbeData(
        images={view: np.stack([frame[view] for frame in frames]) for view in SIZES},
        tasks=np.zeros(len(frames), dtype=int),
        episodes=np.arange(len(frames)),
        places={name: np.stack([row[name] for row in places]) for name in places[0]},
    )


def table(record: dict[str, Any]) -> Table:
    """Return the record as a table for a terminal."""
    title = f"median error in cm, {' + '.join(record['views'])}"
    if "gate" in record:
        gate = record["gate"]
        title += f"; gate {'passed' if gate['passed'] else 'FAILED'} (ratio {gate['ratio']})"
    inputs, axes = ("pixels", "codes", "task median"), ("x", "y", "z", "distance")
    out = Table("x, y, z; distance", *inputs, title=title)
    for thing in record["codes"]:
        cells = ([f"{record[name][thing][axis]:.2f}" for axis in axes] for name in inputs)
        out.add_row(thing, *(f"{' '.join(each[:3])};  {each[3]}" for each in cells))
    return out


def main(
    tokenizer: Positional[str],
    demos: Positional[tuple[Path, ...]] = (),
    views: tuple[str, ...] = ("agentview", "wrist"),
    task: tuple[str, int] | None = None,
    steps: int = 1500,
    threads: int = 2,
    out: Path | None = None,
) -> None:
    """Probe the codes of `demos`: HDF5 files of one suite, or directories; write the record to `out`.

    `task`: SUITE INDEX, one of LIBERO, in place of demonstrations.
    """
    torch.set_num_threads(threads)
    of = ImageTokenizer.load(folder_of(tokenizer))
    data = from_moves(*task) if task else from_episodes(demonstration_files(demos))
    record = probe(data, of, views, steps=steps) | provenance()
    Console().print(table(record))
    if out:
        write_json(out, record)
    print(json.dumps(record.get("gate", record["codes"])))
    raise SystemExit(0 if record.get("gate", {}).get("passed", True) else 1)


if __name__ == "__main__":
    tyro.cli(main)
