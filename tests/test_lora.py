"""Low-rank fine-tuning: only updates move and are stored, resuming is exact, merged equals unmerged; layers
computed again give the same gradients.

pytest tests/test_lora.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import tiny_config, train_in_parts

from worldvla.config import Config, HeadConfig, LoraConfig
from worldvla.files import write_digests
from worldvla.infer.model import export, load
from worldvla.model.transformer import Transformer
from worldvla.published.convert import convert_back
from worldvla.train import loop
from worldvla.train.build import build
from worldvla.train.loop import Trainer, train
from worldvla.train.loss import Targets

LORA = LoraConfig(rank=4, alpha=8.0, full=("head",), base="float32")


def lora_config(root: Path, lora: LoraConfig = LORA, **settings: object) -> Config:
    return replace(tiny_config(root, init_from=str(root / "run/ckpt/step_7"), **settings), lora=lora)


def logits(model: Transformer, trainer: Trainer) -> torch.Tensor:
    """Return logits (P, V) of the first batch at its targets."""
    batch = trainer.pieces.loader.batch(0)[0]
    with torch.no_grad():
        x_PD, _ = loop.make_forward(model.eval(), "float32", None)(batch, Targets.of(batch))
        return model.logits(x_PD)


@pytest.mark.parametrize("base", ["float32", "int8", "int4"])
def test_updates_are_trained_alone_stored_alone_and_merged(root: Path, tmp_path: Path, base: str) -> None:
    config = lora_config(root, replace(LORA, base=base))
    trainer = Trainer(build(config), tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    untrained = load(root / "run").transformer
    if base == "float32":  # B is zero
        assert torch.equal(logits(trainer.model, trainer), logits(untrained, trainer))
    path = trainer.run().checkpoint

    stored = load_file(path / "model.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"a", "b", "weight"}
    assert [name for name in stored if name.endswith("weight")] == ["head.weight"]
    assert len(stored) == 2 * 7 * 2 + 1
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in stored), name
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert len(optimised) == len(stored)

    whole = load(path)  # merged while it is read
    expected = logits(trainer.model, trainer)
    assert whole.transformer.state_dict().keys() == untrained.state_dict().keys()
    torch.testing.assert_close(logits(whole.transformer, trainer), expected, atol=1e-5, rtol=0)
    assert (expected - logits(untrained, trainer)).abs().max() > 0.01

    plain = load(export(tmp_path / "run", tmp_path / "plain"))
    assert "base" not in plain.manifest
    for name, tensor in plain.transformer.state_dict().items():
        assert torch.equal(tensor, whole.transformer.state_dict()[name].bfloat16().float()), name


def test_a_stopped_run_goes_on_as_if_it_had_not(root: Path, tmp_path: Path) -> None:
    config = lora_config(root)
    config = replace(config, model=replace(config.model, dropout=0.1))
    whole = train(config, tmp_path / "whole").checkpoint
    parts = train_in_parts(config, tmp_path / "parts", killed_at=6)
    left, right = (load_file(path / "model.safetensors") for path in (whole, parts))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_action_head_is_trained_whole_on_a_base_without_one(root: Path, tmp_path: Path) -> None:
    config = lora_config(root, steps=1)
    head = HeadConfig(num_layers=1, width=16, num_heads=2, hidden=16)
    config = replace(config, model=replace(config.model, head=head))
    trainer = Trainer(build(config), tmp_path / "run")
    path = trainer.run().checkpoint
    assert any(name.startswith("action_head.") for name in load_file(path / "model.safetensors"))
    state = load(path).transformer.state_dict()
    again = Trainer(build(config), tmp_path / "run").model.state_dict()
    for name in [name for name in state if name.startswith("action_head.")]:
        assert torch.equal(state[name], trainer.model.state_dict()[name]), name
        assert torch.equal(state[name], again[name]), name


def test_updates_belong_to_one_base(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run/ckpt/step_7", tmp_path / "base")
    config = lora_config(root)
    config = replace(config, train=replace(config.train, init_from=str(tmp_path / "base"), steps=1))
    path = train(config, tmp_path / "run").checkpoint
    with pytest.raises(ValueError, match=r"updates alone: `worldvla export"):
        build(replace(config, train=replace(config.train, init_from=str(path))))
    with pytest.raises(ValueError, match=r"updates alone"):
        convert_back(path, tmp_path / "back", like=root / "run")
    weights = {k: v + 1 for k, v in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(weights, tmp_path / "base/model.safetensors")
    write_digests(tmp_path / "base")
    with pytest.raises(ValueError, match="restore that checkpoint"):
        load(path)
    with pytest.raises(ValueError, match=r"cannot resume .* its base is"):
        train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="which is not there"):
        load(path)


def test_a_base_is_where_it_was_seen_from_the_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any working directory, and after both have moved together."""
    shutil.copytree(root / "run/ckpt/step_7", tmp_path / "old/base")
    monkeypatch.chdir(tmp_path / "old")
    config = lora_config(root, steps=1)
    config = replace(config, train=replace(config.train, init_from="base"))
    path = train(config, Path("run")).checkpoint.absolute()
    monkeypatch.chdir("/")
    assert load(path).transformer.num_parameters()
    shutil.move(tmp_path / "old", tmp_path / "new")
    path = tmp_path / "new/run/ckpt/step_1"
    assert load(path).transformer.num_parameters()
    shutil.move(tmp_path / "new/base", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="updates of base, which is not there"):
        load(path)
    manifest = json.loads((path / "manifest.json").read_text()) | {"base_path": "../../../../elsewhere"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    write_digests(path)
    exported = load(export(path, tmp_path / "plain"))
    assert not {"base", "base_path"} & exported.manifest.keys()


def test_updates_need_a_base_and_bfloat16_autocast(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name it by train\.init_from"):
        build(replace(tiny_config(root), lora=LORA))
    with pytest.raises(ValueError, match=r"needs train\.dtype bfloat16, got float32"):
        build(lora_config(root, replace(LORA, base="bfloat16")))
    config = lora_config(root, replace(LORA, base="bfloat16"), dtype="bfloat16", steps=1)
    assert train(config, tmp_path / "half").is_finished
    deeper = replace(config, model=replace(config.model, num_layers=config.model.num_layers + 1))
    with pytest.raises(ValueError, match=r"fewer than model\.num_layers 3"):
        train(deeper, tmp_path / "deeper")


@pytest.mark.parametrize("lora", [LoraConfig(), replace(LORA, base="int4")])
def test_layers_computed_again_give_the_same_gradients(root: Path, tmp_path: Path, lora: LoraConfig) -> None:
    found = []
    for again in (False, True):
        config = lora_config(root, lora, checkpoint_layers=again)
        config = replace(config, model=replace(config.model, dropout=0.1))
        trainer = Trainer(build(config), tmp_path / str(again))
        trainer.model.train()
        torch.manual_seed(3)
        values = trainer.backward(trainer._batches(0))
        found.append((values, {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}))
    (left, gradients), (right, computed_again) = found
    assert left == right
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, computed_again[name]), name
