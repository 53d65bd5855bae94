"""(position, chunk index) of queries and keys -> who may attend to whom. The only place that knows the rule.

Dims: B batch, T query positions, S key positions.

`chunk` is k >= 1 on every token of the k-th action of a chunk (its begin and end included) and 0 elsewhere;
`data/sample.py` and the decoder write it. Source: WorldVLA model/modeling_xllmx_chameleon_ck.py:216-299
(generate_att_mask_3).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def visible(q_pos: Any, k_pos: Any, q_chunk: Any, k_chunk: Any) -> Any:
    """True where a query may attend to a key: causal, and never from one action of a chunk to another one.

    Text, state and images (chunk 0) are seen by all that follows them, and see all that precedes them. Where
    a frame is predicted at once (chunk below 0), each of its positions sees all of them.
    """
    is_causal = (k_pos <= q_pos) & ((k_chunk <= 0) | (q_chunk <= 0) | (k_chunk == q_chunk))
    return is_causal | ((k_chunk == q_chunk) & (q_chunk < 0))


def read_ids(ids: Tensor, chunk: Tensor, row: Tensor, pad: int) -> Tensor:
    """Return ids as the model reads them: `pad` in place of the codes of a frame that is predicted at once,
    which it reads where the next one is predicted, each at its place (`previous_ids`)."""
    return ids.masked_fill((chunk < 0) & (row > 0), pad)


def dense_mask(
    q_chunk_BT: Int[Tensor, "B T"],
    k_chunk_BS: Int[Tensor, "B S"] | None = None,
    q_positions_BT: Int[Tensor, "B T"] | None = None,
    k_positions_BS: Int[Tensor, "B S"] | None = None,
) -> Bool[Tensor, "B 1 T S"]:
    """Return the predicate over all pairs; keys default to the queries, positions to 0, 1, 2, ..."""
    k_chunk_BS = q_chunk_BT if k_chunk_BS is None else k_chunk_BS
    q_positions_BT = _counting(q_chunk_BT) if q_positions_BT is None else q_positions_BT
    k_positions_BS = _counting(k_chunk_BS) if k_positions_BS is None else k_positions_BS
    mask_BTS = visible(
        q_positions_BT[:, :, None], k_positions_BS[:, None, :], q_chunk_BT[:, :, None], k_chunk_BS[:, None, :]
    )
    return mask_BTS[:, None]


def additive_mask(mask: Bool[Tensor, "B 1 T S"], dtype: torch.dtype) -> Float[Tensor, "B 1 T S"]:
    """Return 0 where `mask` is True, a large negative number elsewhere: to be added to attention scores."""
    # Half of the lowest finite value: adding a score cannot overflow to -inf (a row of which is NaN).
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min / 2)


def _counting(chunk_BT: Tensor) -> Tensor:
    return torch.arange(chunk_BT.shape[1], device=chunk_BT.device).expand_as(chunk_BT)
