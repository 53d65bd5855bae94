"""Token stores -> the same with every frame as a world model imagines it, for a world model to train on.

In imagination a model reads its own frames, dozens of steps after the last real one. Where it has lost a
thing or put the hand elsewhere, training on real frames never told it what to do. Here each episode is cut
into pieces of 12 to 30 frames; the first frame of a piece is real, the others are imagined from it and from
the actions that were executed. States stay real: the model says them better than it shows them, and the
right state beside a wrong frame teaches it to mend the frame. To learn from what one's own mistakes lead to
is DAgger (arXiv 1011.0686); of sequence models it is called data as demonstrator (Venkatraman et al. 2015).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from worldvla.data.loader import check_stores
from worldvla.data.store import EPISODES, ImaginedFrames, TokenStore, write_imagined
from worldvla.files import whole_folder
from worldvla.infer.model import Model
from worldvla.infer.world import World

SHORTEST, LONGEST = 12, 30
"""Frames of a piece, but for the last one of an episode."""


def imagine_store(
    store: TokenStore,
    model: Model,
    out: Path,
    batch: int = 64,
    seed: int = 0,
    on_frames: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write `store` with what `model` imagines to `out`; `on_frames` gets the number of frames just done.

    The greedy choice of every code, as in an evaluation. `seed` is that of the lengths of pieces. A model
    without a world model, or of other views than the store's, raises ValueError.
    """
    model.check_world()
    check_stores([store], model.config.layout, model.vocab)
    with whole_folder(out, EPISODES) as scratch:
        imagined = _imagined(store, model, batch, np.random.default_rng(seed), on_frames)
        write_imagined(scratch, store, imagined, {"model": model.identity(), "seed": seed})
    return out


def _imagined(
    store: TokenStore, model: Model, batch: int, rng: np.random.Generator, on_frames: Callable[[int], None]
) -> ImaginedFrames:
    world, layout = World(model), model.config.layout
    pieces = _pieces(store, rng)
    codes = {view: array.copy() for view, array in store.codes.items()}
    start = np.empty(len(store), dtype=np.int64)
    for begin, length in pieces:
        start[begin : begin + length] = begin
    pieces.sort(key=lambda piece: piece[1])
    for first in range(0, len(pieces), batch):
        begins_B, lengths_B = np.array(pieces[first : first + batch]).T
        frames_BN = np.concatenate([store.codes[view][begins_B] for view in layout.views], 1).astype(np.int64)
        states_BS = np.zeros((len(begins_B), 0), dtype=np.int64)
        if layout.world_state:
            states_BS = model.builder.statistics.encode_states(store.states[begins_B]).astype(np.int64)
        world.begin(frames_BN, states_BS)
        on_frames(len(begins_B))
        for step in range(1, int(lengths_B.max())):
            last_B = begins_B + lengths_B - 1  # a shorter piece goes on, and nothing of it is kept
            world.advance(store.actions[np.minimum(begins_B + step - 1, last_B)])
            is_open_B = step < lengths_B
            rows_B = (begins_B + step)[is_open_B]
            for view, grid in world.codes.items():
                codes[view][rows_B] = grid.reshape(len(grid), -1)[is_open_B]
            on_frames(len(rows_B))
    return ImaginedFrames(codes, start)


def _pieces(store: TokenStore, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return first frame and number of frames of every piece."""
    pieces = []
    for episode in store.episodes:
        done = 0
        while done < episode.length:
            length = min(int(rng.integers(SHORTEST, LONGEST + 1)), episode.length - done)
            pieces.append((episode.start + done, length))
            done += length
    return pieces
