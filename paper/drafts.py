"""Passes a frame by kind of guess and by the codes that a pass checks, and milliseconds with and without
guesses: the table of docs/DECODING.md; ends with one JSON line.

Run: worldvla collect tabletop_object --tasks 0 3 --episodes 3 --seed 77 --out DEMOS
     python -m paper.drafts worldvla/assets/tabletop DEMOS
The model imagines the first steps of every episode, one frame at a time. Guesses that stay as they are made
are counted on the frames of one code a pass; the used one, which the model's own choices replace, is run.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from tyro.conf import Positional

from worldvla.data.episode import Episode, demonstration_files, read_episodes
from worldvla.infer.draft import Window
from worldvla.infer.model import Model, load
from worldvla.infer.world import World
from worldvla.machine import provenance

WIDTHS = (4, 16, 80)


def roll_out(model: Model, episode: Episode, steps: int, window: int | None, drafts: bool = True) -> tuple:
    """Return the codes (steps + 1, N) of an imagined episode, and the passes and seconds of each step."""
    world = World(model, drafts)
    world.reset({v: images[0] for v, images in episode.images.items()} | {"state": episode.states[0]})
    world._window = Window(model.device, window)
    codes, seconds = [world.image_codes[0]], []
    for action in episode.actions[:steps]:
        start = time.perf_counter()
        world.step(action)
        seconds.append(time.perf_counter() - start)
        codes.append(world.image_codes[0])
    return np.stack(codes), [stats.passes for stats in world.stats], seconds


def count(guess_N: np.ndarray, frame_N: np.ndarray, width: int) -> int:
    """Return the passes that a guess takes which keeps its values: each ends at its first wrong code."""
    done = passes = 0
    while done < len(frame_N):
        wrong = np.flatnonzero(guess_N[done : done + width] != frame_N[done : done + width])
        done += int(wrong[0]) + 1 if len(wrong) else width
        passes += 1
    return passes


def main(checkpoint: Positional[str], demos: Positional[Path], steps: int = 10, threads: int = 1) -> None:
    """Imagine the first steps of the episodes in `demos`."""
    torch.set_num_threads(threads)
    model = load(checkpoint)
    episodes = [e for path in demonstration_files([demos]) for e in read_episodes(path)]
    roll_out(model, episodes[0], 2, None)  # warm
    alone = [roll_out(model, e, steps, None, drafts=False) for e in episodes]
    plain = [codes for codes, _, _ in alone]
    print(f"| guess | {' | '.join(map(str, WIDTHS))} | as above |")
    for back, name in ((1, "the current frame"), (2, "the frame before it")):
        pairs = [(c[max(0, t - back)], c[t]) for c in plain for t in range(1, len(c))]
        means = [np.mean([count(*pair, width) for pair in pairs]) for width in WIDTHS]
        print(f"| {name} | {' | '.join(f'{m:.1f}' for m in means)} | |")
    used = {width: [roll_out(model, e, steps, width) for e in episodes] for width in (*WIDTHS, None)}
    same = all(
        np.array_equal(c, p) for rows in used.values() for (c, _, _), p in zip(rows, plain, strict=True)
    )
    passes = {width: np.array([p for _, p, _ in rows]) for width, rows in used.items()}
    print(f"| the model's own choices after it | {' | '.join(f'{p.mean():.1f}' for p in passes.values())} |")
    by_step = ", ".join(f"{n:.1f}" for n in passes[None].mean(0))
    print(f"by step, as above: {by_step}; {'the same codes as' if same else 'NOT the codes of'} one a pass")
    ways = {"one code a pass": alone, "by drafts": used[None]}
    numbers = {
        name: {
            "passes": round(float(np.mean([p for _, p, _ in rows])), 2),
            "ms_frame": round(1e3 * float(np.median([s for _, _, s in rows])), 2),
        }
        for name, rows in ways.items()
    }
    before, after = (of["ms_frame"] for of in numbers.values())
    told = {"faster": round(before / after, 2), "same_codes": same, "frames": len(episodes) * steps}
    what = {"model": model.identity(), "steps": steps, "threads": threads}
    print(json.dumps({"drafts": numbers | told, **what, **provenance()}))


if __name__ == "__main__":
    tyro.cli(main)
