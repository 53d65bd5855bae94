"""The loss against numbers worked out by hand, both meanings of alpha; its chunked form against the plain.

pytest tests/test_loss.py
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_PROMPT, Batch
from worldvla.config import LossConfig
from worldvla.train import loss as loss_module
from worldvla.train.loss import Loss, Smooth, Targets, head_loss, smoothing_matrix
from worldvla.vocab import chameleon, compact

VOCAB = compact(num_image_codes=8, num_text=6)
IMAGE, ACTION, SEP = VOCAB.image.start + 2, VOCAB.action.start + 5, VOCAB.sep
NO_Z = LossConfig(z_weight=0.0)


def batch_of(*rows: list[tuple[int, int]]) -> Batch:
    """Build a batch from rows of (id, kind)."""
    ids_BT, kind_BT = torch.tensor(rows).unbind(-1)
    zeros = torch.zeros_like(ids_BT)
    return Batch(ids_BT, zeros, kind_BT, zeros, zeros, torch.full(ids_BT.shape, torch.nan))


POLICY_ROW = [(VOCAB.bos, KIND_PROMPT), (IMAGE, KIND_PROMPT), (ACTION, KIND_ACTION), (SEP, KIND_ACTION)]
WORLD_ROW = [(VOCAB.bos, KIND_PROMPT), (VOCAB.boi, KIND_LAYOUT), (IMAGE, KIND_IMAGE), (IMAGE, KIND_IMAGE)]


def scored(batch: Batch, probability: dict[int, float], config: LossConfig) -> float:
    """Return the loss where every position gives each id its `probability`, the rest split evenly."""
    rest = (1 - sum(probability.values())) / (VOCAB.size - len(probability))
    logits_V = torch.full((VOCAB.size,), math.log(rest))
    for id_, p in probability.items():
        logits_V[id_] = math.log(p)
    targets = Targets.of(batch)
    loss = Loss(config, VOCAB)
    value, _ = loss(torch.ones(len(targets), 1), logits_V[:, None], targets, loss.totals([targets]))
    return float(value)


def test_targets_are_predicted_from_the_position_before() -> None:
    targets = Targets.of(batch_of(POLICY_ROW, WORLD_ROW))
    assert targets.positions_P.tolist() == [1, 2, 4, 5, 6]
    assert targets.ids_P.tolist() == [ACTION, SEP, VOCAB.boi, IMAGE, IMAGE]
    assert targets.kind_P.tolist() == [KIND_ACTION, KIND_ACTION, KIND_LAYOUT, KIND_IMAGE, KIND_IMAGE]
    with pytest.raises(ValueError, match="first token"):
        Targets.of(batch_of([(ACTION, KIND_ACTION), (SEP, KIND_ACTION)]))


def test_paper_loss_by_hand() -> None:
    """-ln of 1/2, 1/4, 1/8 is 1, 2, 3 times ln 2: action (1 + 2) / 2, world (2 + 3 + 3) / 3, alpha 0.04."""
    chances = {ACTION: 1 / 2, SEP: 1 / 4, IMAGE: 1 / 8, VOCAB.boi: 1 / 16}
    whole = scored(batch_of(POLICY_ROW, WORLD_ROW), chances, NO_Z)
    assert whole == pytest.approx(math.log(2) * (3 / 2 + 0.04 * (4 + 3 + 3) / 3), rel=1e-5)
    assert scored(batch_of(POLICY_ROW), chances, NO_Z) == pytest.approx(math.log(2) * 3 / 2, rel=1e-5)
    world = scored(batch_of(WORLD_ROW), chances, NO_Z)  # alpha stays on an image-only batch
    assert world == pytest.approx(math.log(2) * 0.04 * 10 / 3, rel=1e-5)


def test_published_loss_by_hand() -> None:
    """One weighted mean: (1 + 2 + 4 + 0.04 * (3 + 3)) ln 2 / (1 + 1 + 1 + 0.04 * 2)."""
    chances = {ACTION: 1 / 2, SEP: 1 / 4, IMAGE: 1 / 8, VOCAB.boi: 1 / 16}
    config = replace(NO_Z, reduction="published")
    whole = scored(batch_of(POLICY_ROW, WORLD_ROW), chances, config)
    assert whole == pytest.approx(math.log(2) * (1 + 2 + 4 + 0.04 * 6) / 3.08, rel=1e-5)
    codes_only = [(VOCAB.bos, KIND_PROMPT), (IMAGE, KIND_IMAGE), (IMAGE, KIND_IMAGE)]
    assert scored(batch_of(codes_only), chances, config) == pytest.approx(
        math.log(2) * 3, rel=1e-5
    )  # alpha cancels


def test_published_slice_is_off_by_one() -> None:
    vocab = chameleon()
    ids_P = torch.tensor([2, 3, 4, 8194, 8195, 8196, 8710, 10006])
    weight_P = Loss(LossConfig(reduction="published"), vocab).class_weight(ids_P)
    assert weight_P.tolist() == pytest.approx([1, 0.04, 0.04, 0.04, 1, 1, 1, 1])
    weight_P = Loss(LossConfig(reduction="published"), VOCAB).class_weight(torch.arange(VOCAB.size))
    light = (weight_P < 1).nonzero()[:, 0].tolist()
    assert light == list(range(VOCAB.image.start - 1, VOCAB.image.stop - 1))


@pytest.mark.parametrize("reduction", ["paper", "published"])
def test_z_loss_is_the_mean_square_of_logsumexp(reduction: str) -> None:
    batch = batch_of(POLICY_ROW, WORLD_ROW)
    targets = Targets.of(batch)
    values = []
    for z_weight in (0.0, 0.1):
        config = LossConfig(z_weight=z_weight, reduction=reduction)  # pyright: ignore[reportArgumentType]
        loss = Loss(config, VOCAB)
        logits_V = torch.full((VOCAB.size, 1), 2.0)
        value, _ = loss(torch.ones(len(targets), 1), logits_V, targets, loss.totals([targets]))
        values.append(float(value))
    assert values[1] - values[0] == pytest.approx(0.1 * (2 + math.log(VOCAB.size)) ** 2, rel=1e-5)


def test_smoothing_by_hand() -> None:
    """Standard deviation 1: neighbours weigh exp(-1/2), the next ones exp(-2); rows sum to 1."""
    smooth_CC = smoothing_matrix(4, 1.0)
    assert smooth_CC is not None
    tail = [1.0, math.exp(-0.5), math.exp(-2.0), math.exp(-4.5)]
    assert smooth_CC[0].tolist() == pytest.approx([w / sum(tail) for w in tail])
    near = [math.exp(-0.5), 1.0, math.exp(-0.5), math.exp(-2.0)]
    assert smooth_CC[1].tolist() == pytest.approx([w / sum(near) for w in near])
    assert smoothing_matrix(4, 0.0) is None


def test_only_action_dims_are_smoothed() -> None:
    targets = Targets.of(batch_of(POLICY_ROW, WORLD_ROW))
    head_VD = torch.randn(VOCAB.size, 4)
    x_PD = torch.randn(len(targets), 4)
    plain, smooth = (Loss(replace(NO_Z, action_smoothing=std), VOCAB) for std in (0.0, 2.0))
    totals = plain.totals([targets])
    one_hot_P, smooth_P = (loss(x_PD, head_VD, targets, totals)[1] for loss in (plain, smooth))
    assert torch.equal(one_hot_P != smooth_P, targets.ids_P == ACTION)
    logp_V = F.log_softmax(x_PD[0] @ head_VD.T, -1)[VOCAB.action.start : VOCAB.action.stop]
    weight_C = torch.exp(-((torch.arange(256) - 5.0) ** 2) / 8)
    assert float(smooth_P[0]) == pytest.approx(float(-(weight_C / weight_C.sum() * logp_V).sum()), rel=1e-5)


def plain_loss(
    logits_PV: Tensor, ids_P: Tensor, weight_P: Tensor, z_weight: float, smooth: Smooth | None
) -> tuple[Tensor, Tensor]:
    """Return what `head_loss` does, by autograd over all logits."""
    target_PV = F.one_hot(ids_P, logits_PV.shape[1]).float()
    if smooth is not None:
        is_smooth_P = (ids_P >= smooth.start) & (ids_P < smooth.columns.stop)
        target_PV[is_smooth_P] = 0.0
        target_PV[is_smooth_P, smooth.columns] = smooth.matrix_CC[ids_P[is_smooth_P] - smooth.start]
    lse_P = logits_PV.logsumexp(-1)
    cross_entropy_P = lse_P - (logits_PV * target_PV).sum(-1)
    return (weight_P * cross_entropy_P).sum() + z_weight * lse_P.square().sum(), cross_entropy_P.detach()


@pytest.mark.parametrize("std", [0.0, 1.5])
def test_chunked_loss_equals_the_plain_one(std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_at_a_time = 3  # the last chunk is shorter
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", rows_at_a_time * VOCAB.size)
    ids_P = torch.cat([torch.randint(0, VOCAB.size, (5,)), torch.randint(ACTION, VOCAB.action.stop, (5,))])
    weight_P, smooth_CC = torch.rand(10), smoothing_matrix(len(VOCAB.action), std)
    smooth = None if smooth_CC is None else Smooth(VOCAB.action.start, smooth_CC)
    results = []
    for is_chunked in (False, True):
        torch.manual_seed(1)
        x_PD, head_VD = torch.randn(10, 6, requires_grad=True), torch.randn(VOCAB.size, 6, requires_grad=True)
        if is_chunked:
            value, each_P = head_loss(x_PD, head_VD, ids_P, weight_P, 0.01, smooth)
        else:
            value, each_P = plain_loss(x_PD @ head_VD.T, ids_P, weight_P, 0.01, smooth)
        (3 * value).backward()
        assert isinstance(x_PD.grad, Tensor)
        assert isinstance(head_VD.grad, Tensor)
        results.append((value.detach(), each_P, x_PD.grad, head_VD.grad))
    for plain, fused in zip(*results, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-4, atol=1e-5)


def test_validation_computes_no_gradients() -> None:
    """Without gradients one product of matrices is left of three, and the value is the same bit for bit."""
    x_PD, head_VD = torch.randn(10, 6), torch.randn(VOCAB.size, 6, requires_grad=True)
    arguments = x_PD, head_VD, torch.randint(0, VOCAB.size, (10,)), torch.rand(10), 0.01
    products, values = [], []
    for is_training in (True, False):
        with torch.set_grad_enabled(is_training), FlopCounterMode(display=False) as counter:
            value, each_P = head_loss(*arguments)
        products.append(counter.get_total_flops() / (2 * 10 * 6 * VOCAB.size))
        values.append((float(value.detach()), each_P.tolist()))
    assert products == [3, 1]
    assert values[0] == values[1]


def test_micro_batches_share_one_normaliser() -> None:
    """One action target and three world targets apart weigh as much as together."""
    rows = [POLICY_ROW, WORLD_ROW, WORLD_ROW]
    together = Targets.of(batch_of(*rows))
    apart = [Targets.of(batch_of(row)) for row in rows]
    head_VD, x_PD = torch.randn(VOCAB.size, 4), torch.randn(len(together), 4)
    for reduction in ("paper", "published"):
        loss = Loss(LossConfig(reduction=reduction), VOCAB)
        totals = loss.totals(apart)
        assert totals == loss.totals([together])
        chunks = x_PD.split([len(t) for t in apart])
        shares = [float(loss(x, head_VD, t, totals)[0]) for x, t in zip(chunks, apart, strict=True)]
        assert sum(shares) == pytest.approx(float(loss(x_PD, head_VD, together, totals)[0]), rel=1e-5)


def test_what_decoding_forces_need_not_be_supervised() -> None:
    """Action dims and image codes alone, each against its own ids; a forced token has no part in it."""
    batch = batch_of(POLICY_ROW, WORLD_ROW)
    everything, loss = Loss(NO_Z, VOCAB), Loss(replace(NO_Z, supervise="decoded"), VOCAB)
    every, targets = everything.targets(batch), loss.targets(batch)
    is_dim_P = (every.ids_P >= ACTION) & (every.ids_P < VOCAB.action.stop)
    is_code_P = (every.ids_P >= VOCAB.image.start) & (every.ids_P < VOCAB.image.stop)
    assert 0 < int(is_dim_P.sum()) + int(is_code_P.sum()) < len(every)
    assert torch.equal(targets.positions_P, every.positions_P[is_dim_P | is_code_P])
    x_PD = torch.randn(len(targets), 4, requires_grad=True)
    head_VD = torch.randn(VOCAB.size, 4, requires_grad=True)
    totals = loss.totals([targets])
    value, each_P = loss(x_PD, head_VD, targets, totals)
    by_hand = []
    for row, id_ in enumerate(targets.ids_P.tolist()):
        span = VOCAB.action if id_ in VOCAB.action else VOCAB.image
        logits = (x_PD[row] @ head_VD.T)[span.start : span.stop]
        by_hand.append(F.cross_entropy(logits[None], torch.tensor([id_ - span.start])))
    assert isinstance(value, Tensor)
    assert torch.allclose(each_P, torch.stack(by_hand), atol=1e-5)
    expected = (torch.stack(by_hand) * loss.weights(targets, totals)).sum()
    assert torch.allclose(value, expected, atol=1e-6)
    gradients = torch.autograd.grad(value, [x_PD, head_VD], retain_graph=True)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [x_PD, head_VD]), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
