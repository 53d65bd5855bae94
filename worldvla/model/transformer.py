"""ids -> hidden states -> logits: a decoder-only transformer after Chameleon, 1 M to 7 B parameters.

RMSNorm before each branch, LayerNorm over the head dim on queries and keys before RoPE (rotate-half), SwiGLU,
no biases, untied head (WorldVLA model/chameleon/modeling_chameleon.py). Dims: B batch, T query positions, S
key positions, P kept positions, D width, H heads, G kv heads, K head dim, V vocab.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldvla.config import ModelConfig
from worldvla.model.action_head import ActionHead
from worldvla.model.codes import CodeEmbedding, CodeHead
from worldvla.model.mask import additive_mask
from worldvla.model.quantize import QuantizedLinear, compute_dtype

EMBED_STD = 0.1
"""Of every embedding table; `init_codebook` scales to it."""
HEAD_STD = 0.02
ROW_BLOCKS, LONG = 4, 256
"""Attention in training on the CPU goes by so many blocks of queries, in sequences this long or longer."""
BIN_FREQUENCIES = (1.0, 40.0)
"""Radians per unit in the Fourier features of bins: neighbouring bins (2 / 255 apart) are 98 % alike."""


class LayerCache(Protocol):
    """Keys and values of earlier positions of one layer (infer/cache.py)."""

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions; return all that their queries attend over, (B, G, S, K) each."""
        ...


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.width // config.num_heads
        self.q = nn.Linear(config.width, self.num_heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.width, self.num_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.width, self.num_kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.num_heads * self.head_dim, config.width, bias=False)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-5)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-5)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, K), keys and values (B, G, T, K)."""
        q_BTF, k_BTF, v_BTF = self.project(x_BTD)
        q_BTHK = self.q_norm(q_BTF.unflatten(-1, (self.num_heads, self.head_dim)))
        k_BTGK = self.k_norm(k_BTF.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v_BTGK = v_BTF.unflatten(-1, (self.num_kv_heads, self.head_dim))
        q_BHTK = rotate(q_BTHK, rope).to(v_BTGK.dtype).transpose(1, 2)
        k_BGSK = rotate(k_BTGK, rope).to(v_BTGK.dtype).transpose(1, 2)
        return q_BHTK, k_BGSK, v_BTGK.transpose(1, 2)

    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """Return the products of q, k and v; paper/compiled.py has them in one."""
        return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.project(x_BTD)
        return self.down(F.silu(gate_BTF) * up_BTF)

    def project(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """Return the products of gate and up; paper/compiled.py has them in one."""
        return self.gate(x_BTD), self.up(x_BTD)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rope: Tensor,
        cache: LayerCache | None,
        keep_P: Tensor | None,
        ahead: int = 0,
    ) -> Tensor:
        """Return (B, T, D), or (P, D) with `keep_P`: only those flattened positions pass through the MLP."""
        q_BHTK, k_BGSK, v_BGSK = self.attention(self.attention_norm(x), rope)
        if cache is not None:
            k_BGSK, v_BGSK = cache.update(k_BGSK, v_BGSK)
        mixed_BHTK = attend(q_BHTK, k_BGSK, v_BGSK, mask, ahead)
        x = x + self.dropout(self.attention.o(mixed_BHTK.transpose(1, 2).flatten(2)))
        if keep_P is not None:
            x = x.flatten(0, 1).index_select(0, keep_P)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """`num_rows`, `num_cols`: sizes of the place tables, index 0 (no place) included. `action_shape`: (U, A)
    of the continuous head, where the config has one; `forward` does not run it.

    With config.code_levels image codes are the last ids; `embed` and `head` end before them.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        num_rows: int = 1,
        num_cols: int = 1,
        action_shape: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.checkpoint_layers = False
        """Whether the backward pass computes each layer again instead of keeping what is inside it."""
        self.ahead = 0
        """How many positions after its own a query sees at most: those of a frame that is predicted at once
        (layout.frame_at_once). Only training on the CPU asks."""
        levels = config.code_levels
        self.first_code = vocab_size - math.prod(levels) if levels else vocab_size
        """The first id that has no row of its own in `embed` and `head`."""
        self.embed = nn.Embedding(self.first_code, config.width)
        self.code_embed = CodeEmbedding(levels, config.width) if levels else None
        self.previous_in = nn.Linear(config.width, config.width, bias=False) if config.previous_code else None
        has_places = config.place_embedding
        self.row_embed = nn.Embedding(num_rows, config.width, padding_idx=0) if has_places else None
        self.col_embed = nn.Embedding(num_cols, config.width, padding_idx=0) if has_places else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, self.first_code, bias=False)
        self.code_head = CodeHead(levels, config.width) if levels else None
        has_head = config.head.num_layers > 0
        self.action_head = ActionHead(config.head, config.width, *action_shape) if has_head else None

    def forward(
        self,
        ids_BT: Int[Tensor, "B T"],
        mask: Tensor | None,
        row_BT: Int[Tensor, "B T"] | None = None,
        col_BT: Int[Tensor, "B T"] | None = None,
        positions_BT: Int[Tensor, "b T"] | None = None,
        previous_BT: Int[Tensor, "B T"] | None = None,
        cache: Sequence[LayerCache] | None = None,
        keep_P: Int[Tensor, " P"] | None = None,
    ) -> Float[Tensor, "*any D"]:
        """Return hidden states after the final norm: (B, T, D), or (P, D) at flattened positions `keep_P`.

        `mask`: bool (True = may attend) or additive, broadcastable to (B, 1, T, S); None lets every query see
        every key. With a `cache` (one a layer), S counts the cached keys too. `positions_BT` (RoPE) defaults
        to 0..T-1. `previous_BT`: see `previous_ids`; only of a model with previous_code.
        """
        x_BTD = self.embed_ids(ids_BT, row_BT, col_BT, previous_BT)
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        dtype, head_dim = compute_dtype(x_BTD), self.config.width // self.config.num_heads
        rope = rope_table(positions_BT, head_dim, self.config.rope_theta).to(dtype)
        if mask is not None and mask.dtype == torch.bool:
            mask = additive_mask(mask, dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[index]
            args = (x_BTD, mask, rope, layer_cache, keep_P if index == last else None, self.ahead)
            is_kept = not (self.checkpoint_layers and torch.is_grad_enabled())
            x_BTD = layer(*args) if is_kept else checkpoint(layer, *args, use_reentrant=False)
        return self.norm(x_BTD)

    def embed_ids(
        self,
        ids_BT: Tensor,
        row_BT: Tensor | None,
        col_BT: Tensor | None,
        previous_BT: Tensor | None = None,
    ) -> Tensor:
        """Return (B, T, D): the vectors of ids, and of their places in an image where the model has them."""
        if self.code_embed is None:
            x_BTD = self.embed(ids_BT)
        else:
            is_code_BT1 = (ids_BT >= self.first_code)[..., None]
            other_BTD = self.embed(ids_BT.masked_fill(is_code_BT1[..., 0], 0))
            x_BTD = torch.where(is_code_BT1, self._embed_codes(ids_BT).to(other_BTD.dtype), other_BTD)
        if self.previous_in is not None and previous_BT is not None:
            old_BTD = self.previous_in(self._embed_codes(previous_BT))
            x_BTD = x_BTD + old_BTD * (previous_BT >= self.first_code)[..., None]
        if self.row_embed is None or self.col_embed is None:
            return x_BTD
        if row_BT is None or col_BT is None:
            raise ValueError("place_embedding needs row_BT and col_BT: zeros where there is no image code")
        return x_BTD + self.row_embed(row_BT) + self.col_embed(col_BT)

    def _embed_codes(self, ids_BT: Tensor) -> Tensor:
        """Return vectors (B, T, D) of image codes; of other ids those of code 0."""
        assert self.code_embed is not None
        return self.code_embed((ids_BT - self.first_code).clamp_min(0))

    def logits(self, x: Float[Tensor, "*any D"], ids: range | None = None) -> Float[Tensor, "*any V"]:
        """Return the head's scores of all ids, or only of those in `ids` (the rest is never computed)."""
        weight_VD = self.head.weight if ids is None else self.head.weight[ids.start : ids.stop]
        return F.linear(x, weight_VD)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew, the same for the same seed; normal but for norms (1 and 0).

        The last matrix of a branch is scaled so that all branches together start at unit scale; index 0 of
        the place tables stays zero; an action head has its own `init_weights`.
        """
        generator = torch.Generator().manual_seed(seed)
        branch_scale = (2 * self.config.num_layers) ** -0.5
        for module in (self.code_embed, self.code_head):
            if module is not None:
                module.init_weights(generator)
        for name, parameter in self.named_parameters():
            if name.startswith(("action_head.", "code_")):
                continue
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            if "embed" in name:
                std = EMBED_STD
            elif name.startswith("head"):
                std = HEAD_STD
            else:
                is_last = name.endswith(("o.weight", "down.weight"))
                std = parameter.shape[1] ** -0.5 * (branch_scale if is_last else 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for table in (self.row_embed, self.col_embed):
            if table is not None:
                table.weight[0] = 0.0
        if self.action_head is not None:
            self.action_head.init_weights(seed)

    @torch.no_grad()
    def init_codebook(
        self, codebook: Float[Tensor, "N E"] | None, image: range, bins: Sequence[range], seed: int = 0
    ) -> None:
        """Start like things alike, in the embedding and in the head.

        Ids of `image` get a random projection of their codebook vectors; ids of each range in `bins` get
        random Fourier features of the value of their bin, so that neighbouring bins start with nearly the
        same embedding and logit. Without a codebook image codes stay as they are.
        """
        if codebook is not None and len(codebook) != len(image):
            raise ValueError(
                f"the codebook has {len(codebook)} codes, the vocabulary {len(image)}: use one tokenizer"
            )
        generator = torch.Generator().manual_seed(seed)
        width = self.config.width
        tables = []
        if codebook is not None:
            codebook = codebook.float().cpu()
            directions_ED = torch.randn(codebook.shape[1], width, generator=generator)
            tables.append((image, (codebook - codebook.mean(0)) @ directions_ED))
        tables += [(span, _bin_features(len(span), width, generator)) for span in bins]
        for span, features_ND in tables:
            features_ND = features_ND / features_ND.std().clamp_min(1e-8)
            self.embed.weight[span.start : span.stop] = (features_ND * EMBED_STD).to(self.embed.weight)
            self.head.weight[span.start : span.stop] = (features_ND * HEAD_STD).to(self.head.weight)

    def num_parameters(self) -> int:
        packed = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, QuantizedLinear))
        return packed + sum(parameter.numel() for parameter in self.parameters())

    def flops(self, num_positions: int, num_logits: int | None = None) -> int:
        """Return the floating-point operations of one sequence's forward pass (training: 3 times), without
        those of an action head. `num_logits`: positions that reach the head (default all)."""
        num_logits = num_positions if num_logits is None else num_logits
        linear = (m for m in self.layers.modules() if isinstance(m, nn.Linear | QuantizedLinear))
        matrices = sum(m.in_features * m.out_features for m in linear)
        scores_and_values = 2 * self.config.num_layers * self.config.width * num_positions
        return 2 * (num_positions * (matrices + scores_and_values) + num_logits * self.head.weight.numel())


def previous_ids(ids_BT: Tensor, row_BT: Tensor, col_BT: Tensor) -> Tensor:
    """Return (B, T): before each image code, the id at its place one frame earlier; 0 where there is none.

    The frames of a sequence stand at equal distances, the same in every row; but for a first one, an anchor.
    """
    place_T = (row_BT[0] << 16) + col_BT[0]
    images_N = place_T.nonzero()[:, 0]
    previous_BT = torch.zeros_like(ids_BT)
    again = (place_T == place_T[images_N[0]]).nonzero()[:, 0] if len(images_N) else images_N
    if len(again) < 2:
        return previous_BT
    stride = int(again[-1] - again[-2])
    is_same_BT = (row_BT[:, stride:] == row_BT[:, :-stride]) & (col_BT[:, stride:] == col_BT[:, :-stride])
    is_same_BT &= row_BT[:, stride:] > 0
    previous_BT[:, stride - 1 : -1] = ids_BT[:, :-stride].masked_fill(~is_same_BT, 0)
    return previous_BT


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, ahead: int = 0) -> Tensor:
    """Return softmax(q k / sqrt(K) + mask) v as (B, H, T, K). The same numbers from every back end.

    In training, where no query has a cached key before it, a mask must hide from each what comes more than
    `ahead` positions after it.
    """
    is_grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if q_BHTK.is_cuda:
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, enable_gqa=is_grouped)
    if is_grouped:
        repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
        k_BGSK, v_BGSK = k_BGSK.repeat_interleave(repeats, 1), v_BGSK.repeat_interleave(repeats, 1)
    mask = None if mask is None else mask.to(q_BHTK.dtype)
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask)
    q_BHTK, length = q_BHTK * q_BHTK.shape[-1] ** -0.5, q_BHTK.shape[2]
    if mask is None or length < LONG or k_BGSK.shape[2] != length:
        return _attend_written_out(q_BHTK, k_BGSK, v_BGSK, mask)
    # A block of rows is scored against the keys up to its end and `ahead`: the rest is hidden from it.
    mixed, rows = [], -(-length // ROW_BLOCKS)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        keys = slice(0, min(stop + ahead, length))
        parts = q_BHTK[:, :, start:stop], k_BGSK[:, :, keys], v_BGSK[:, :, keys]
        mixed.append(_attend_written_out(*parts, mask[..., start:stop, keys]))
    return torch.cat(mixed, 2)


def _attend_written_out(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None) -> Tensor:
    """On the CPU the backward of SDPA with a mask makes a step 1.5 x slower (small models)."""
    scores_BHTS = q_BHTK @ k_BGSK.transpose(-1, -2)
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    return scores_BHTS.softmax(-1) @ v_BGSK


def rope_table(positions_BT: Tensor, head_dim: int, theta: float) -> Tensor:
    """Return factors of x and of x rolled by K/2, float32 (2, B, T, 1, K): the rotation of every position."""
    pairs = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    frequencies = theta ** (-pairs / head_dim)
    angles = positions_BT[..., None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))[:, :, :, None, :]


def rotate(x_BTHK: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of each head by `rope`: rotate-half, as the published weights."""
    return x_BTHK * rope[0] + x_BTHK.roll(x_BTHK.shape[-1] // 2, -1) * rope[1]


def _bin_features(num_bins: int, width: int, generator: torch.Generator) -> Tensor:
    """Return sqrt(2) cos(w v + b) of each bin value v in [-1, 1], w log-uniform over BIN_FREQUENCIES."""
    low, high = (math.log(f) for f in BIN_FREQUENCIES)
    frequencies = torch.exp(low + (high - low) * torch.rand(width, generator=generator))
    phases = 2 * math.pi * torch.rand(width, generator=generator)
    return math.sqrt(2) * torch.cos(torch.linspace(-1, 1, num_bins)[:, None] * frequencies + phases)
