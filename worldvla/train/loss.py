"""Hidden states + Batch -> loss: actions + alpha x world tokens + beta x world states + z-loss, at supervised
positions only; and, with a continuous head, its mean absolute error.

Dims: B batch, T positions, P supervised positions of a batch, N action dims among them, D width, V vocab, U
actions of a chunk, A action dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from worldvla.batch import KIND_ACTION, KIND_PROMPT, KIND_STATE, Batch
from worldvla.config import LossConfig
from worldvla.model.codes import CodeHead
from worldvla.model.quantize import compute_dtype
from worldvla.vocab import Vocab

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}
"""Logits held at a time: 8 MB of float32 stay in a CPU's cache (a step is 1.25 x faster); 1 GB on a GPU."""


@dataclass(frozen=True)
class Targets:
    """The supervised positions of one batch, in row-major order.

    positions_P: index into the flattened (B * T) hidden states from which the target is predicted (one before
    it). values_N: what the action dims were before they became bins, in [-1, 1]; empty if unknown.
    """

    positions_P: Tensor
    ids_P: Tensor
    kind_P: Tensor
    values_N: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Self:
        if (batch.kind_BT[:, 0] != KIND_PROMPT).any():
            raise ValueError(
                "the first token of a sample is a target and nothing precedes it: give it KIND_PROMPT"
            )
        shifted_BT = torch.zeros_like(batch.kind_BT)
        shifted_BT[:, :-1] = batch.kind_BT[:, 1:]
        positions_P = shifted_BT.flatten().nonzero().squeeze(1)
        ids_P, kind_P = batch.ids_BT.flatten()[positions_P + 1], shifted_BT.flatten()[positions_P]
        return cls(positions_P, ids_P, kind_P, batch.value_BT[~batch.value_BT.isnan()])

    def __len__(self) -> int:
        return len(self.ids_P)


@dataclass(frozen=True)
class Totals:
    """What the means of a loss divide by, over all micro-batches of one optimiser step."""

    action: int
    world: int
    """Of the world model, but for state dims."""
    state: int
    class_weight: float
    """Sum of the published class weights."""
    values: int
    """Action dims that the continuous head answers."""

    @property
    def supervised(self) -> int:
        return self.action + self.world + self.state


class Loss:
    """The training objective as LossConfig describes it; also the reference for hand-computed tests."""

    def __init__(self, config: LossConfig, vocab: Vocab) -> None:
        self.config = config
        self.vocab = vocab
        self.smooth_CC = smoothing_matrix(len(vocab.action), config.action_smoothing)

    def targets(self, batch: Batch) -> Targets:
        """Return what of `batch` is supervised."""
        every = Targets.of(batch)
        if self.config.supervise == "all":
            return every
        is_chosen_P = self._is_in(every, self.vocab.action) | self._is_in(every, self.vocab.image)
        is_chosen_P |= self._is_in(every, self.vocab.state)
        columns = ("positions_P", "ids_P", "kind_P")
        return replace(every, **{name: getattr(every, name)[is_chosen_P] for name in columns})

    @staticmethod
    def _is_in(targets: Targets, span: range) -> Tensor:
        return (targets.ids_P >= span.start) & (targets.ids_P < span.stop)

    def totals(self, targets: Sequence[Targets]) -> Totals:
        num_action, num_state = (
            sum(int((t.kind_P == kind).sum()) for t in targets) for kind in (KIND_ACTION, KIND_STATE)
        )
        class_weight = sum(float(self.class_weight(t.ids_P).sum()) for t in targets)
        num_values = sum(len(t.values_N) for t in targets)
        num_world = sum(len(t) for t in targets) - num_action - num_state
        return Totals(num_action, num_world, num_state, class_weight, num_values)

    def class_weight(self, ids_P: Tensor) -> Tensor:
        """Return the published weight of each id: alpha in a slice one id too early (pretrain_ck.py:931)."""
        image = self.vocab.image
        is_light_P = (ids_P >= image.start - 1) & (ids_P < image.stop - 1)
        return torch.where(is_light_P, self.config.image_weight, 1.0)

    def weights(self, targets: Targets, totals: Totals) -> Float[Tensor, " P"]:
        """Return the factor of each target's cross-entropy in the loss, normalisation included."""
        if self.config.reduction == "published":
            return self.class_weight(targets.ids_P) / max(totals.class_weight, 1e-8)
        is_action_P, is_state_P = targets.kind_P == KIND_ACTION, targets.kind_P == KIND_STATE
        world_weight = self.config.image_weight / max(totals.world, 1)
        weight_P = torch.where(is_action_P, 1.0 / max(totals.action, 1), world_weight)
        return torch.where(is_state_P, self.config.state_weight / max(totals.state, 1), weight_P)

    def __call__(
        self,
        x_PD: Float[Tensor, "P D"],
        head_VD: Float[Tensor, "V D"],
        targets: Targets,
        totals: Totals,
        code_head: CodeHead | None = None,
    ) -> tuple[Tensor, Float[Tensor, " P"]]:
        """Return this micro-batch's share of the loss, and the cross-entropy of each target (no gradient).

        `x_PD`: the hidden states at `targets.positions_P`. `code_head`: what predicts image codes level by
        level, in place of rows of `head_VD`.
        """
        weight_P = self.weights(targets, totals)
        z_weight, smooth_CC = self.config.z_weight / max(totals.supervised, 1), self.smooth_CC
        action, image, state = self.vocab.action, self.vocab.image, self.vocab.state
        if self.config.supervise == "all":
            smooth = None if smooth_CC is None else Smooth(action.start, smooth_CC)
            return head_loss(x_PD, head_VD, targets.ids_P, weight_P, z_weight, smooth)
        total, cross_entropy_P = x_PD.new_zeros(()), torch.empty(len(targets), device=x_PD.device)
        smooth = None if smooth_CC is None else Smooth(0, smooth_CC)
        for span, smooth_of_span in ((action, smooth), (image, None), (state, smooth)):
            rows = self._is_in(targets, span).nonzero().squeeze(1)
            if span == state and not totals.state:
                continue
            if code_head is not None and span == image:
                nats_R = code_head.cross_entropy(x_PD[rows], targets.ids_P[rows] - span.start)
                total, cross_entropy_P[rows] = total + (weight_P[rows] * nats_R).sum(), nats_R.detach()
                continue
            ids_R, head_SD = targets.ids_P[rows] - span.start, head_VD[span.start : span.stop]
            share, cross_entropy_P[rows] = head_loss(
                x_PD[rows], head_SD, ids_R, weight_P[rows], z_weight, smooth_of_span
            )
            total = total + share
        return total, cross_entropy_P

    def of_actions(
        self, actions_BUA: Float[Tensor, "B U A"], targets: Targets, totals: Totals
    ) -> tuple[Tensor, Float[Tensor, "B U A"]]:
        """Return the continuous head's share of the loss, and its absolute errors (no gradient).

        Both heads have the same targets: where data.pad_chunks repeats an action, it counts here too.
        """
        error_BUA = (actions_BUA - targets.values_N.view_as(actions_BUA)).abs()
        return self.config.head_weight * error_BUA.sum() / max(totals.values, 1), error_BUA.detach()


def smoothing_matrix(num_codes: int, std: float) -> Tensor | None:
    """Return the target distribution of each code, a Gaussian of `std` bins; None: one-hot."""
    if std == 0.0:
        return None
    code_C = torch.arange(num_codes, dtype=torch.float32)
    return torch.softmax(-((code_C[:, None] - code_C) ** 2) / (2 * std**2), -1)


class Smooth(NamedTuple):
    """Target distributions, (C, C), of the ids start .. start + C - 1; all other ids are one-hot."""

    start: int
    matrix_CC: Tensor

    def rows(self, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows (R, 1) have such a target, and its distribution (R, C)."""
        code_R, num_codes = ids_R - self.start, len(self.matrix_CC)
        is_smooth_R = (code_R >= 0) & (code_R < num_codes)
        return is_smooth_R[:, None], self.matrix_CC.to(ids_R.device)[code_R.clamp(0, num_codes - 1)]

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + len(self.matrix_CC))


def head_loss(
    x_PD: Float[Tensor, "P D"],
    head_VD: Float[Tensor, "V D"],
    ids_P: Int[Tensor, " P"],
    weight_P: Float[Tensor, " P"],
    z_weight: float,
    smooth: Smooth | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
    """Return sum(weight * cross-entropy) + z_weight * sum(logsumexp^2), and each cross-entropy (no gradient).

    Logits are made for a few rows at a time, and where a gradient is wanted it is taken at once: (P, V) never
    exists.
    """
    has_gradient = torch.is_grad_enabled() and (x_PD.requires_grad or head_VD.requires_grad)
    return _HeadLoss.apply(  # pyright: ignore[reportReturnType]
        x_PD, head_VD, ids_P, weight_P, z_weight, smooth, has_gradient
    )


class _HeadLoss(torch.autograd.Function):
    """The gradient of a row's logits is softmax * (weight + 2 z_weight logsumexp) - weight * target
    distribution. The products run in autocast's type, softmax and sums in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        head_VD: Tensor,
        ids_P: Tensor,
        weight_P: Tensor,
        z_weight: float,
        smooth: Smooth | None,
        has_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        device = x_PD.device.type
        dtype = compute_dtype(x_PD)
        with torch.autocast(device, enabled=False):
            x_low_PD, head_low_VD = x_PD.to(dtype), head_VD.to(dtype)
            grads = None
            if has_gradient:
                grads = torch.empty_like(x_low_PD), torch.zeros_like(head_VD, dtype=torch.float32)
            cross_entropy_P, lse_P = torch.empty(2, len(ids_P), device=x_PD.device)
            num_rows = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // head_VD.shape[0])
            for start in range(0, len(ids_P), num_rows):
                rows = slice(start, start + num_rows)
                logits_RV = (x_low_PD[rows] @ head_low_VD.T).float()
                target_R = _target_logits(logits_RV, ids_P[rows], smooth)
                top_R1 = logits_RV.amax(1, keepdim=True)
                exp_RV = logits_RV.sub_(top_R1).exp_()
                sum_R1 = exp_RV.sum(1, keepdim=True)
                lse_R1 = top_R1 + sum_R1.log()
                lse_P[rows] = lse_R1[:, 0]
                cross_entropy_P[rows] = lse_R1[:, 0] - target_R
                if grads is not None:
                    grad_RV = exp_RV.mul_((weight_P[rows, None] + 2 * z_weight * lse_R1) / sum_R1)
                    _subtract_targets(grad_RV, ids_P[rows], weight_P[rows, None].float(), smooth)
                    grad_low_RV = grad_RV.to(dtype)
                    grads[0][rows] = grad_low_RV @ head_low_VD
                    grads[1].add_(grad_low_RV.T @ x_low_PD[rows])
        if grads is not None:
            ctx.save_for_backward(grads[0].to(x_PD.dtype), grads[1].to(head_VD.dtype))
        ctx.mark_non_differentiable(cross_entropy_P)
        return (weight_P * cross_entropy_P).sum() + z_weight * lse_P.square().sum(), cross_entropy_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_PD, grad_head_VD = ctx.saved_tensors
        return grad_x_PD * grads[0], grad_head_VD * grads[0], None, None, None, None, None


def _target_logits(logits_RV: Tensor, ids_R: Tensor, smooth: Smooth | None) -> Tensor:
    """Return the mean logit of each row under its target distribution."""
    one_hot_R = logits_RV.gather(1, ids_R[:, None])[:, 0]
    if smooth is None:
        return one_hot_R
    is_smooth_R1, target_RC = smooth.rows(ids_R)
    return torch.where(is_smooth_R1[:, 0], (logits_RV[:, smooth.columns] * target_RC).sum(-1), one_hot_R)


def _subtract_targets(grad_RV: Tensor, ids_R: Tensor, weight_R1: Tensor, smooth: Smooth | None) -> None:
    """Take weight * target distribution off each row, in place."""
    if smooth is not None:
        is_smooth_R1, target_RC = smooth.rows(ids_R)
        grad_RV[:, smooth.columns] -= target_RC * (weight_R1 * is_smooth_R1)
        weight_R1 = weight_R1 * ~is_smooth_R1
    grad_RV.scatter_add_(1, ids_R[:, None], -weight_R1)
