"""Weights in 8 and 4 bits: errors of half a step, products and gradients of the dense weight, and what a
random model and the shipped one then decide.

pytest -s tests/test_quantize.py   (-s prints the agreement that docs/MODELS.md states)
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import worldvla
from worldvla.config import ModelConfig
from worldvla.infer.model import Model, Quantize, load
from worldvla.infer.policy import Policy
from worldvla.model.mask import dense_mask
from worldvla.model.quantize import Form, QuantizedLinear, num_bytes
from worldvla.model.transformer import Transformer
from worldvla.model.weights import assign, empty_model
from worldvla.sim.suites import make, tasks
from worldvla.tokenizers.action import normalize
from worldvla.tokenizers.action import quantize as to_codes

SHIPPED = Path(worldvla.__file__).parent / "assets/tabletop"
FORMS = ("int8", "int4")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 64), (7, 48)])
def test_a_weight_is_half_a_step_off(form: Form, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0.0
    layer = QuantizedLinear(weight, form)
    step = layer.scale.float().abs().repeat_interleave(shape[1] // layer.scale.shape[1], 1).squeeze(-1)
    error = (layer.dense(torch.float32) - weight).abs()
    # int4: the codes end at 7, the values opposite to the largest at 8, and its scale is in bfloat16.
    limit = (0.5 if form == "int8" else 1.04) * step
    assert bool((error <= limit + 1e-6).all())
    assert torch.equal(layer.dense(torch.float32)[0], weight[0])
    assert sum(b.nbytes for b in layer.buffers()) == num_bytes(shape, form)
    again = QuantizedLinear(layer.dense(torch.float32), form)
    assert torch.equal(again.codes, layer.codes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [False, True])
def test_products_and_gradients_are_those_of_the_dense_weight(form: Form, half: bool) -> None:
    layer = QuantizedLinear(torch.randn(6, 64), form)
    dense = layer.dense(torch.float32)
    left, right = (torch.linspace(-1, 1, 192).view(3, 64).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        ours, theirs = layer(left), F.linear(right, dense)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    tolerance = 0.02 if half else 1e-5
    torch.testing.assert_close(left.grad, right.grad, atol=tolerance, rtol=tolerance)


def test_a_quantised_model_counts_as_the_whole_one() -> None:
    config = ModelConfig(num_layers=2, width=64, num_heads=2, num_kv_heads=1, hidden=96)
    model = Transformer(config, 50)
    model.init_weights(0)
    packed = assign(empty_model(config, 50), model.state_dict().items(), form="int4")
    assert packed.num_parameters() == model.num_parameters()
    assert packed.flops(10) == model.flops(10)


@pytest.mark.parametrize(("form", "limit"), [("int8", 0.2), ("int4", 2.5)])
def test_logits_of_random_weights_stay_close(form: Form, limit: float) -> None:
    """Largest difference over the standard deviation of the logits."""
    config = ModelConfig(num_layers=4, width=128, num_heads=4, num_kv_heads=4, hidden=352)
    model = Transformer(config, 500).eval()
    model.init_weights(0)
    packed = assign(empty_model(config, 500), model.state_dict().items(), form=form)
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        whole, other = (m.logits(m(ids, None)) for m in (model, packed))
    difference = float((whole - other).abs().max() / whole.std())
    same = float((whole.argmax(-1) == other.argmax(-1)).float().mean())
    print(f"random weights, {form}: largest logit difference {difference:.3f}, {same:.3f} equal")  # noqa: T201
    assert 0 < difference < limit


@pytest.fixture(scope="module")
def shipped() -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    model = load(SHIPPED)
    observations = []
    for suite in ("tabletop_spatial", "tabletop_object", "tabletop_goal", "tabletop_long"):
        for task in tasks(suite)[::3]:
            first = make(task, model.view_sizes).reset(options={"init": 10})[0]
            observations.append({**first, "instruction": task.instruction})
    return observations, *decisions(model, observations)


def decisions(model: Model, observations: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bins (B, U, 7) of the greedy actions, and the logits (B, 256) where a prompt ends."""
    statistics, logits = model.builder.statistics, []
    actions = normalize(Policy(model).act(observations), statistics.action_low, statistics.action_high)
    for prompt in Policy(model).prompts(observations):
        ids, row, col, chunk = (
            torch.from_numpy(v)[None].long() for v in (prompt.ids, prompt.row, prompt.col, prompt.chunk)
        )
        with torch.no_grad():
            x_BTD = model.transformer(ids, dense_mask(chunk), row, col)
        logits.append(model.transformer.logits(x_BTD[0, -1], model.vocab.action))
    return torch.from_numpy(to_codes(actions)).int(), torch.stack(logits)


@pytest.mark.parametrize(("quantize", "equal", "near"), [("int8", 0.95, 0.99), ("int4", 0.8, 0.95)])
def test_the_shipped_model_decides_alike(
    shipped: tuple[list[dict], torch.Tensor, torch.Tensor], quantize: Quantize, equal: float, near: float
) -> None:
    """Shares of greedy action tokens that are the same, and at most 2 of 255 bins away."""
    observations, expected, logits = shipped
    codes, other = decisions(load(SHIPPED, quantize=quantize), observations)
    away, off = (codes - expected).abs(), float((other - logits).abs().max() / logits.std())
    same, close = (float((away <= n).double().mean()) for n in (0, 2))
    print(f"{quantize}: {same:.3f} of {away.numel()} equal, {close:.3f} within 2, logits {off:.3f}")  # noqa: T201
    assert same > equal
    assert close > near
