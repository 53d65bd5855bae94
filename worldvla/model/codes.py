"""Image codes as the levels of their FSQ dims: embedded as a sum, predicted one dim after the other.

A tokenizer of 8 dims with 8 levels has 2^24 codes: too many for a table or a softmax, few as eight choices of
one in eight. Each choice sees those before it, so the codes of a cell are still a joint distribution; and as
the tokenizer puts what matters most into its first dims, a cell that is uncertain between many hands and one
table decides "hand" first. Dims: P positions, E dims of a code, L levels of a dim, D width, F features.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

EMBED_FEATURES = 256
HEAD_FEATURES = 192
EMBED_STD, HEAD_STD = 0.1, 0.02
"""As of the other ids (model/transformer.py)."""


@dataclass(frozen=True)
class Levels:
    """codes <-> levels: the first dim is the lowest digit, as in FiniteScalarQuantizer."""

    sizes: tuple[int, ...]

    @property
    def places(self) -> list[int]:
        """Place value of each dim's level in a code."""
        return [math.prod(self.sizes[:dim]) for dim in range(len(self.sizes))]

    @property
    def rows(self) -> list[int]:
        """Row of each dim's level 0 in a table of all levels of all dims."""
        return [sum(self.sizes[:dim]) for dim in range(len(self.sizes))]

    def split(self, codes: Int[Tensor, "*any"]) -> Int[Tensor, "*any E"]:
        dims = zip(self.places, self.sizes, strict=True)
        return torch.stack([codes // place % size for place, size in dims], -1)

    def table_rows(self, codes: Int[Tensor, "*any"]) -> Int[Tensor, "*any E"]:
        dims = zip(self.places, self.sizes, self.rows, strict=True)
        return torch.stack([codes // place % size + row for place, size, row in dims], -1)

    def join(self, levels: Int[Tensor, "*any E"]) -> Int[Tensor, "*any"]:
        return sum((levels[..., dim] * p for dim, p in enumerate(self.places)), levels.new_zeros(()))

    def limit(self, levels: Int[Tensor, "*any E"]) -> Int[Tensor, "*any E"]:
        """Return the nearest levels that exist."""
        dims = zip(levels.unbind(-1), self.sizes, strict=True)
        return torch.stack([level.clamp(0, size - 1) for level, size in dims], -1)

    def absent(self, device: torch.device) -> Bool[Tensor, "E L"]:
        """Return where a table of scores has no level."""
        level_L = torch.arange(max(self.sizes), device=device)
        return torch.stack([level_L >= size for size in self.sizes])


class CodeEmbedding(nn.Module):
    """A small MLP over the sum of a code's level vectors: codes of like pictures start alike."""

    def __init__(self, levels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.levels = Levels(levels)
        self.table = nn.Embedding(sum(levels), EMBED_FEATURES)
        self.skip = nn.Linear(EMBED_FEATURES, width, bias=False)
        self.out = nn.Linear(EMBED_FEATURES, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights: a code starts with the length of other ids' vectors (EMBED_STD in each dim)."""
        num_dims = len(self.levels.sizes)
        for weight, std in (
            (self.table.weight, num_dims**-0.5),
            (self.skip.weight, EMBED_STD * EMBED_FEATURES**-0.5),
            (self.out.weight, EMBED_STD * EMBED_FEATURES**-0.5),
        ):
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def forward(self, codes: Int[Tensor, "*any"]) -> Float[Tensor, "*any D"]:
        features = self.table(self.levels.table_rows(codes)).sum(-2)
        return self.skip(features) + self.out(F.silu(features))


class CodeHead(nn.Module):
    """Hidden states -> the levels of an image code, each given the levels before it."""

    def __init__(self, levels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.levels, num_dims, num_levels = Levels(levels), len(levels), max(levels)
        self.inp = nn.Linear(width, num_dims * HEAD_FEATURES)
        self.table = nn.Embedding(sum(levels), HEAD_FEATURES)
        self.mix = nn.Parameter(torch.zeros(num_dims, HEAD_FEATURES, HEAD_FEATURES))
        self.out = nn.Parameter(torch.zeros(num_dims, HEAD_FEATURES, num_levels))
        self.bias = nn.Parameter(torch.zeros(num_dims, num_levels))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights; all levels start nearly equally likely."""
        for weight, std in (
            (self.inp.weight, self.inp.in_features**-0.5),
            (self.table.weight, 0.5),
            (self.out, HEAD_STD),
        ):
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        for zeros in (self.inp.bias, self.mix, self.bias):
            zeros.zero_()

    def scores(self, x_PD: Float[Tensor, "P D"], codes_P: Int[Tensor, " P"]) -> Float[Tensor, "P E L"]:
        """Return float32 scores of every dim's levels, given the true levels before it (teacher forcing)."""
        rows_PE, seen_PF, scores = self.levels.table_rows(codes_P), None, []
        weights = self.inp.weight.unflatten(0, (-1, HEAD_FEATURES))
        biases = self.inp.bias.unflatten(0, (-1, HEAD_FEATURES))
        for dim in range(len(self.levels.sizes)):  # one plain product a dim: three times one einsum's speed
            hidden_PF = F.linear(x_PD, weights[dim], biases[dim])
            hidden_PF = F.silu(hidden_PF if seen_PF is None else hidden_PF + seen_PF)
            hidden_PF = hidden_PF + hidden_PF @ self.mix[dim].to(hidden_PF.dtype)
            scores.append(hidden_PF @ self.out[dim].to(hidden_PF.dtype))
            level_PF = self.table(rows_PE[:, dim]).to(hidden_PF.dtype)
            seen_PF = level_PF if seen_PF is None else seen_PF + level_PF
        scores_PEL = torch.stack(scores, 1).float() + self.bias
        return scores_PEL.masked_fill(self.levels.absent(x_PD.device), float("-inf"))

    def cross_entropy(self, x_PD: Float[Tensor, "P D"], codes_P: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
        """Return the negative log-likelihood of each code, nats."""
        levels_PE = self.levels.split(codes_P)
        log_p_PEL = self.scores(x_PD, codes_P).log_softmax(-1)
        return -log_p_PEL.gather(-1, levels_PE[..., None])[..., 0].sum(-1)

    def choose(
        self, x_PD: Float[Tensor, "P D"], temperature: float = 0.0, noise_PEL: Tensor | None = None
    ) -> tuple[Int[Tensor, " P"], Float[Tensor, " P"]]:
        """Return the chosen codes, and by how little a level was chosen at the least.

        Each level is the median of its distribution: levels are ordered, and among one and two the median is
        nearer to what comes than the likeliest. With `noise_PEL` (Gumbel) it is the best of scores /
        temperature + noise: a draw.
        """
        inputs_PEF = self.inp(x_PD).unflatten(-1, (len(self.levels.sizes), HEAD_FEATURES))
        absent_EL = self.levels.absent(x_PD.device)
        seen_PF, chosen, lead_P = torch.zeros_like(inputs_PEF[:, 0]), [], None
        for dim in range(len(self.levels.sizes)):
            hidden_PF = F.silu(inputs_PEF[:, dim] + seen_PF)
            hidden_PF = hidden_PF + hidden_PF @ self.mix[dim].to(hidden_PF.dtype)
            scores_PL = (hidden_PF @ self.out[dim].to(hidden_PF.dtype)).float() + self.bias[dim]
            scores_PL = scores_PL.masked_fill(absent_EL[dim], float("-inf"))
            level_P, own_P = (
                _median(scores_PL)
                if noise_PEL is None
                else _best(scores_PL / temperature + noise_PEL[:, dim])
            )
            lead_P = own_P if lead_P is None else torch.minimum(lead_P, own_P)
            chosen.append(level_P)
            seen_PF = seen_PF + self.table(chosen[-1] + self.levels.rows[dim])
        assert lead_P is not None
        return self.levels.join(torch.stack(chosen, -1)), lead_P


def _median(scores_PL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first level that, with those before it, has half of the probability, and by how much of it
    another one was missed."""
    up_to_PL = scores_PL.softmax(-1).cumsum(-1)
    level_P = (up_to_PL < 0.5).sum(-1)
    around_PL = F.pad(up_to_PL, (1, 0))
    below_P, above_P = (around_PL.gather(1, (level_P + i)[:, None])[:, 0] for i in (0, 1))
    return level_P, torch.minimum(0.5 - below_P, above_P - 0.5)


def _best(scores_PL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the level of the best score, and its lead."""
    best_P2 = scores_PL.topk(2)
    return best_P2.indices[:, 0], best_P2.values[:, 0] - best_P2.values[:, 1]
