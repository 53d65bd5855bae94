"""The continuous action head: what it sees, what it learns from, that it learns, and that it travels with its
model.

Run: pytest tests/test_action_head.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_policy import observe
from tiny_run import joined, tiny_config, train_in_parts
from torch import nn

from worldvla.batch import KIND_ACTION
from worldvla.config import Config, HeadConfig
from worldvla.infer.model import export, load
from worldvla.infer.policy import Policy
from worldvla.model.action_head import ActionHead
from worldvla.tokenizers.action import dequantize, normalize
from worldvla.train.build import build, build_model
from worldvla.train.loop import Trainer, train
from worldvla.train.loss import Targets

HEAD = HeadConfig(num_layers=2, width=16, num_heads=2, hidden=32, dropout=0.0)
K, A = 3, 7


def with_head(config: Config, head: HeadConfig = HEAD) -> Config:
    return replace(config, model=replace(config.model, head=head))


def new_head(width: int = 8) -> ActionHead:
    head = ActionHead(HEAD, width, K, A)
    head.init_weights(0)
    return head


def last(run_dir: Path, event: str) -> dict[str, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event][-1]


def test_it_is_the_published_arrangement_of_torch_modules() -> None:
    head = new_head()
    layer = nn.TransformerEncoderLayer(HEAD.width, HEAD.num_heads, HEAD.hidden, 0.0, batch_first=True)
    whole = nn.TransformerEncoder(layer, 2, nn.LayerNorm(HEAD.width), enable_nested_tensor=False)
    whole.load_state_dict(head.transformer_encoder.state_dict())
    x_BNW = torch.randn(2, 30, HEAD.width)
    mine = head.transformer_encoder(x_BNW, torch.zeros(2, 30, dtype=torch.bool), 21)
    assert torch.allclose(mine, whole(x_BNW)[:, -21:], atol=1e-6)


def test_padding_changes_nothing() -> None:
    head, x_BSD, lengths_B = new_head(), torch.randn(2, 9, 8), torch.tensor([9, 4])
    expected = head(x_BSD, lengths_B)
    garbage = 100 * torch.randn(2, 5, 8)
    assert torch.allclose(head(torch.cat((x_BSD, garbage), 1), lengths_B), expected, atol=1e-6)
    assert torch.allclose(head(x_BSD[1:, :4], lengths_B[1:]), expected[1:], atol=1e-6)
    assert not torch.allclose(head(x_BSD, torch.tensor([9, 5])), expected, atol=1e-4)


def test_it_sees_the_prompt_alone_and_all_of_it(root: Path, tmp_path: Path) -> None:
    trainer = Trainer(build(with_head(tiny_config(root))), tmp_path / "run")
    trainer.model.eval()
    batch = trainer.pieces.loader.val_batch(0, "policy")

    def answer(is_changed_BT: torch.Tensor) -> torch.Tensor:
        ids_BT = torch.where(is_changed_BT, trainer.pieces.vocab.eoa, batch.ids_BT)
        changed = replace(batch, ids_BT=ids_BT)
        actions_BUA = trainer.forward(changed, Targets.of(changed))[1]
        assert actions_BUA is not None
        return actions_BUA

    is_action_BT = batch.kind_BT == KIND_ACTION
    expected = answer(torch.zeros_like(is_action_BT))
    assert expected.shape == (4, K, A)
    assert torch.allclose(answer(is_action_BT), expected, atol=1e-6)
    is_end_BT = is_action_BT.roll(-1, 1) & ~is_action_BT & (batch.ids_BT == trainer.pieces.vocab.sep)
    for row in range(4):  # the last token of a prompt changes that row's actions and no other's
        is_row_B1 = torch.arange(4)[:, None] == row
        differs_B = (answer(is_end_BT & is_row_B1) - expected).abs().amax((1, 2)) > 1e-6
        assert differs_B.tolist() == is_row_B1[:, 0].tolist()


def test_targets_are_not_quantised(root: Path) -> None:
    pieces = build(tiny_config(root))
    batch, vocab = joined(pieces.loader.batch(0), pieces.vocab.pad), pieces.vocab
    is_policy_B = (batch.kind_BT == KIND_ACTION).any(1)
    assert (~batch.value_BT.isnan()).sum(1).tolist() == (is_policy_B * K * A).tolist()
    values = batch.value_BT[~batch.value_BT.isnan()]
    codes = (batch.ids_BT[~batch.value_BT.isnan()] - vocab.action.start).numpy()
    off = np.abs(values.numpy() - dequantize(codes))
    assert 1e-4 < off.mean() < off.max() <= 1 / 255 + 1e-6  # within their bins, not at the centres
    stored = np.load(root / "store/actions.npy")
    low, high = pieces.builder.statistics.action_low, pieces.builder.statistics.action_high
    rows = normalize(stored, low, high).astype(np.float32)
    chunk_UA = values[: K * A].view(K, A).numpy()
    assert any(np.array_equal(rows[i : i + K], chunk_UA) for i in range(len(rows)))


def test_the_transformer_starts_alike_with_and_without(root: Path, tmp_path: Path) -> None:
    plain = build_model(build(tiny_config(root))).state_dict()
    joint = build_model(build(with_head(tiny_config(root)))).state_dict()
    assert all(torch.equal(joint[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[0] for name in joint.keys() - plain.keys()} == {"action_head"}
    first = train(tiny_config(root, steps=2), tmp_path / "first").checkpoint
    added = Trainer(build(with_head(tiny_config(root, init_from=str(first)))), tmp_path / "second")
    assert torch.equal(added.model.embed.weight, load(first).transformer.embed.weight)


@pytest.mark.parametrize("supervise", ["all", "decoded"])
def test_accumulation_divides_by_all_actions(root: Path, tmp_path: Path, supervise: Any) -> None:
    config = with_head(tiny_config(root))
    config = replace(config, loss=replace(config.loss, supervise=supervise))
    trainer = Trainer(build(config), tmp_path / "run")
    whole = joined(trainer.pieces.loader.batch(0), trainer.pieces.vocab.pad)
    rows = (slice(0, 1), slice(1, 4))
    uneven = [whole.map(lambda t, part=part: t[part]) for part in rows]
    results = []
    for batches in ([whole], uneven):
        values = trainer.backward(batches)
        results.append((values, [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]))
        trainer.optimizers[0].zero_grad()
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_one_batch_is_memorised_and_acts_from_the_checkpoint(root: Path, tmp_path: Path) -> None:
    config = with_head(
        tiny_config(root, steps=100, log_every=10, eval_every=100, save_every=1000, overfit=True)
    )
    path = train(config, tmp_path / "run").checkpoint
    val = last(tmp_path / "run", "val")
    assert val["head_l1"] < 0.1  # 0.49 is what the best constant has
    assert val["head_gripper_accuracy"] == 1.0
    assert {"action_l1", "head_first_xyz_l1", "head_end_xyz_l1", "first_xyz_l1"} <= val.keys()

    model = load(path)
    observations = [observe(0), observe(1, 1)]  # prompts of two lengths
    policy = Policy(model, "continuous")
    decision = policy.decide(observations)
    assert decision.actions.shape == (2, K, A)
    assert decision.actions.dtype == np.float32
    assert np.isnan(decision.entropy).all()
    assert np.isnan(decision.margin).all()
    for observation, expected in zip(observations, decision.actions, strict=True):
        np.testing.assert_allclose(
            policy.act(observation), expected, atol=4e-6
        )  # SDPA adds up otherwise alone: 1.5e-6 seen
    assert policy.decoding == "at once"
    discrete = Policy(model).act(observations)
    assert np.abs(discrete - decision.actions).max() > 0
    shipped = load(export(path, tmp_path / "shipped"))
    np.testing.assert_allclose(Policy(shipped, "continuous").act(observations), decision.actions, atol=0.1)
    with pytest.raises(ValueError, match="temperature must be 0, got 1"):
        policy.act(observations, temperature=1.0)
    with pytest.raises(ValueError, match="discrete, continuous, got 'both'"):
        Policy(model, "both")


def beside(first: Path, root: Path, **settings: Any) -> Config:
    """Return a config that trains a head alone on the checkpoint `first`."""
    config = tiny_config(root, init_from=str(first), **settings)
    config = replace(config, data=replace(config.data, world_fraction=0.0))
    head = replace(HEAD, dropout=0.1)
    return replace(
        config, model=replace(config.model, head=head), train=replace(config.train, only_head=True)
    )


def test_a_head_can_be_trained_alone_beside_bins_that_stay(root: Path, tmp_path: Path) -> None:
    first = train(tiny_config(root, steps=2), tmp_path / "first").checkpoint
    config = beside(first, root, steps=100, log_every=10, eval_every=100, save_every=1000, overfit=True)
    config = replace(config, model=replace(config.model, dropout=0.5))  # of the rest: not felt
    path = train(config, tmp_path / "run").checkpoint
    before, after = load(first), load(path)
    own, now = before.transformer.state_dict(), after.transformer.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in own.items())
    assert {name.split(".")[0] for name in now.keys() - own.keys()} == {"action_head"}
    assert last(tmp_path / "run", "val")["head_l1"] < 0.25  # 0.49 is what the best constant has
    observations = [observe(0), observe(1, 1)]
    assert np.array_equal(Policy(after).act(observations), Policy(before).act(observations))


def test_what_a_head_alone_cannot_be_trained_with_is_one_line(root: Path, tmp_path: Path) -> None:
    config = beside(tmp_path, root)
    with pytest.raises(
        ValueError, match=r"only_head needs .* data\.world_fraction 0 .* got 2, '.*', 0\.3 and"
    ):
        replace(config, data=replace(config.data, world_fraction=0.3))
    with pytest.raises(ValueError, match=r"only_head needs .* got 2, '', "):
        replace(config, train=replace(config.train, init_from=""))


@pytest.mark.parametrize("only_head", [False, True])
def test_resuming_is_bit_identical(root: Path, tmp_path: Path, only_head: bool) -> None:
    config = with_head(tiny_config(root, steps=4, save_every=2, dtype="bfloat16"), replace(HEAD, dropout=0.1))
    if only_head:
        first = train(tiny_config(root, steps=1), tmp_path / "first").checkpoint
        config = beside(first, root, steps=4, save_every=2)
    whole = train(config, tmp_path / "whole").checkpoint
    parts = train_in_parts(config, tmp_path / "parts", killed_at=3)
    for name in ("model.safetensors", "trainer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert "head_l1" in last(tmp_path / "whole", "train")


def test_asking_for_a_head_that_is_not_there_is_one_line(root: Path, tmp_path: Path) -> None:
    plain: Any = load(train(tiny_config(root, steps=1), tmp_path / "run").checkpoint)
    with pytest.raises(ValueError, match=r"has no continuous action head: use head 'discrete'") as error:
        Policy(plain, "continuous")
    assert "\n" not in str(error.value)
    config = tiny_config(root)
    with pytest.raises(ValueError, match="world_fraction 1 never trains the action head"):
        with_head(replace(config, data=replace(config.data, world_fraction=1.0)))
    with pytest.raises(ValueError, match="head width 10 must divide by its num_heads 4"):
        HeadConfig(width=10)
