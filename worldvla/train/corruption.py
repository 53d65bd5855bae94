"""Wrong image codes in what a world sample reads, while the right ones stay its targets.

In imagination a model reads its own mistakes; GameNGen (arXiv 2408.14837) trains with noise on frames, and
scheduled sampling with what the model chooses itself.
Dims as in batch.py.
"""

import torch
from torch import Tensor

from worldvla.batch import Batch
from worldvla.model.codes import Levels
from worldvla.model.transformer import Transformer, previous_ids
from worldvla.vocab import Vocab

CLEAN = 0.3
"""Share of samples that are read as they are."""
STALE = 0.5
"""Share of wrong codes that are those of one frame before, or of any place of the sample; the rest is near
the right code: some levels one up or down."""
JITTER = 0.4
"""Chance of each level of a near code to be moved."""
ERASED = 0.3
"""Share of samples with an anchor in which a block of cells, 1 to 3 a side, reads as one other cell from some
frame on: what vanished is to be brought back."""


def corrupted(
    batch: Batch,
    vocab: Vocab,
    levels: tuple[int, ...],
    share: float,
    generator: torch.Generator,
    has_anchor: bool = False,
) -> Tensor:
    """Return ids (B, T) of a world batch as the model reads them: a `share` of the image codes, on average,
    is wrong, and where samples have an anchor, some blocks are lost. `generator` is on the CPU, so that every
    device reads the same."""
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
    is_image_BT = (other_BT >= vocab.image.start) & (other_BT < vocab.image.stop)
    other_BT = torch.where(is_image_BT, other_BT, ids_BT)
    if levels:
        digits = Levels(levels)
        levels_BTE = digits.split((ids_BT - vocab.image.start).clamp_min(0))
        step_BTE = torch.randint(-1, 2, levels_BTE.shape, generator=generator).to(device)
        moved_BTE = levels_BTE + step_BTE * (draw(*levels_BTE.shape) < JITTER)
        near_BT = digits.join(digits.limit(moved_BTE)) + vocab.image.start
        other_BT = torch.where(kind_BT < STALE, other_BT, near_BT)
    read_BT = torch.where(is_wrong_BT, other_BT, batch.read_BT)
    return _erased(batch, read_BT, generator) if has_anchor else read_BT


def _erased(batch: Batch, read_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Return `read_BT` with blocks of cells lost, in some samples, from some frame after the anchor on."""
    row_BT, col_BT, size = batch.row_BT, batch.col_BT, len(read_BT)
    place_T = (row_BT[0] << 16) + col_BT[0]
    images_N = place_T.nonzero()[:, 0]
    frame_T = (place_T == place_T[images_N[0]]).cumsum(0) - 1  # 0: the anchor

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (size, 1), generator=generator).to(read_BT.device)

    centre_B1, other_B1 = (images_N[draw(0, len(images_N))] for _ in range(2))
    above_BT = (row_BT - row_BT.gather(1, centre_B1)).abs() <= draw(0, 2)
    beside_BT = (col_BT - col_BT.gather(1, centre_B1)).abs() <= draw(0, 2)
    is_lost_BT = above_BT & beside_BT & (frame_T >= draw(1, int(frame_T[-1]) + 1)) & (row_BT > 0)
    is_lost_BT &= torch.rand(size, 1, generator=generator).to(read_BT.device) < ERASED
    return torch.where(is_lost_BT, read_BT.gather(1, other_B1), read_BT)


def own_codes(
    batch: Batch, model: Transformer, image: range, x_PD: Tensor, positions_P: Tensor, share: float
) -> Tensor:
    """Return ids (B, T) of a world batch as the model reads them: up to twice the `share` of the codes of
    each sample, `share` on average, are those that the model chooses.

    `x_PD`: hidden states that predict the codes at `positions_P` of the flattened batch. Each sample draws
    its temperature from 0 (greedy) to 1.
    """
    size, length = batch.ids_BT.shape
    sample_P = positions_P // length
    shape = (
        (len(model.code_head.levels.sizes), max(model.code_head.levels.sizes))
        if model.code_head
        else (len(image),)
    )
    noise = -torch.empty(len(x_PD), *shape, device=x_PD.device).exponential_().log()
    noise = noise * torch.rand(size, device=x_PD.device)[sample_P].view(-1, *[1] * len(shape))
    if model.code_head is not None:
        codes_P, _ = model.code_head.choose(x_PD, 1.0, noise)
    else:
        codes_P = (model.logits(x_PD, image).float() + noise).argmax(-1)
    rate_P = 2 * share * torch.rand(size, device=x_PD.device)[sample_P]
    is_own_P = torch.rand(len(x_PD), device=x_PD.device) < rate_P
    read = batch.read_BT.flatten().clone()
    read[positions_P[is_own_P]] = codes_P[is_own_P] + image.start
    return read.view(size, length)
