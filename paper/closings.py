"""When a hand closes, does the world model know whether it holds something?

    worldvla eval POLICY --suite tabletop_object --first 50 --save-dataset out/rolled
    python -m paper.closings tabletop out/rolled

Wherever a hand begins to close, the world model is given the real frame so many steps before and imagines up
to AFTER steps later: are the fingers then apart, as in the simulator? Of a table, rows are what happened and
columns what is imagined, empty and held.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional

from worldvla.data.episode import Episode, demonstration_files, read_episodes
from worldvla.files import write_json
from worldvla.infer.model import Model, load
from worldvla.infer.world import World
from worldvla.machine import provenance

AFTER = 3
"""Steps from the first that closes, after which fingers have met or hold something."""
OPEN_WIDTH, HELD_WIDTH = 0.08, 0.015
"""Metres between the fingers, at least: of a hand that can begin to close; of one that holds something."""
BEFORE = (0, 1, 3, 5)


def closings(episodes: Sequence[Episode]) -> list[tuple[Episode, int]]:
    """Return episode and step wherever an open hand is told to close, for AFTER steps at least."""
    found = []
    for episode in episodes:
        closes, is_open = episode.actions[:, 6] > 0, _width(episode.states) > OPEN_WIDTH
        for t in range(len(episode) - AFTER):
            if closes[t : t + AFTER].all() and is_open[t] and not closes[max(t - 1, 0) : t].any():
                found.append((episode, t))
    return found


def judged(model: Model, found: Sequence[tuple[Episode, int]], before: int) -> np.ndarray:
    """Return the table (2, 2) of closings that have `before` frames before them."""
    some = [(episode, t) for episode, t in found if t >= before]
    world = World(model)
    first = {v: np.stack([e.images[v][t - before] for e, t in some]) for v in model.view_sizes}
    world.reset({**first, "state": np.stack([e.states[t - before] for e, t in some])})
    for step in range(before + AFTER):
        world.advance(np.stack([e.actions[t - before + step] for e, t in some]))
    if world.state is None:
        raise ValueError(f"{model.path} does not say the robot's state: give one with layout.world_state")
    real = _width(np.stack([e.states[t + AFTER] for e, t in some])) > HELD_WIDTH
    table = np.zeros((2, 2), dtype=int)
    np.add.at(table, (real.astype(int), (_width(world.state) > HELD_WIDTH).astype(int)), 1)
    return table


def _width(states: np.ndarray) -> np.ndarray:
    return np.abs(states[..., 6:8]).sum(-1)


def main(world: Positional[Path], demos: Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Print a table for each number of steps that are imagined before the hand closes."""
    model = load(world)
    found = closings([e for file in demonstration_files(demos) for e in read_episodes(file)])
    tables = {str(before): judged(model, found, before) for before in BEFORE}
    record = {
        "world": model.identity(),
        "closings": len(found),
        "tables": {before: table.tolist() for before, table in tables.items()},
        "right": {before: round(float(np.trace(t) / t.sum()), 3) for before, t in tables.items()},
    }
    if out:
        write_json(out, record | provenance())
    print(json.dumps(record))


if __name__ == "__main__":
    tyro.cli(main)
