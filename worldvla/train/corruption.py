"""Wrong image codes in what a world sample reads, while the right ones stay its targets.

In imagination a model reads its own mistakes; GameNGen (arXiv 2408.14837) trains with noise on frames.
Dims as in batch.py.
"""

import torch
from torch import Tensor

from worldvla.batch import Batch
from worldvla.model.codes import Levels
from worldvla.model.transformer import previous_ids
from worldvla.vocab import Vocab

CLEAN = 0.3
"""Share of samples that are read as they are."""
STALE = 0.5
"""Share of wrong codes that are those of one frame before, or of any place of the sample; the rest is near
the right code: some levels one up or down."""
JITTER = 0.4
"""Chance of each level of a near code to be moved."""


def corrupted(
    batch: Batch, vocab: Vocab, levels: tuple[int, ...], share: float, generator: torch.Generator
) -> Tensor:
    """Return ids (B, T) of a world batch as the model reads them: a `share` of the image codes, on average,
    is wrong. `generator` is on the CPU, so that every device reads the same."""
    ids_BT, device = batch.ids_BT, batch.ids_BT.device
    batch_size, length = ids_BT.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    rate_B1 = 2 * share / (1 - CLEAN) * draw(batch_size, 1) * (draw(batch_size, 1) > CLEAN)
    is_wrong_BT = (draw(batch_size, length) < rate_B1) & (batch.row_BT > 0)
    kind_BT = draw(batch_size, length)
    earlier_BT = previous_ids(ids_BT, batch.row_BT, batch.col_BT).roll(1, 1)
    order_T = torch.randperm(length, generator=generator).to(device)
    elsewhere_BT = ids_BT[:, order_T]
    other_BT = torch.where(kind_BT < STALE / 2, earlier_BT, elsewhere_BT)
    other_BT = torch.where(other_BT >= vocab.image.start, other_BT, ids_BT)
    if levels:
        digits = Levels(levels)
        levels_BTE = digits.split((ids_BT - vocab.image.start).clamp_min(0))
        step_BTE = torch.randint(-1, 2, levels_BTE.shape, generator=generator).to(device)
        moved_BTE = levels_BTE + step_BTE * (draw(*levels_BTE.shape) < JITTER)
        near_BT = digits.join(digits.limit(moved_BTE)) + vocab.image.start
        other_BT = torch.where(kind_BT < STALE, other_BT, near_BT)
    return torch.where(is_wrong_BT, other_BT, ids_BT)
