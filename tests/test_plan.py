"""`worldvla plan` counts what a training step of a small model really keeps, and says what fits.

pytest tests/test_plan.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config

from worldvla.batch import Batch
from worldvla.cli import main
from worldvla.config import Config
from worldvla.data.show import fake
from worldvla.model.weights import empty_model
from worldvla.recipes import recipe
from worldvla.train.build import build
from worldvla.train.loop import Trainer
from worldvla.train.plan import kept, need, parse_bytes, settings


def really_kept(trainer: Trainer, batch: Batch) -> int:
    """Return the bytes of what autograd saves in one forward pass, parameters left out."""
    found: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer._autocast():
        x_PD, _ = trainer.forward(batch, trainer.loss.targets(batch))
    assert x_PD.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{}, {"num_layers": 5, "width": 64, "num_kv_heads": 2, "dropout": 0.1}])
def test_a_forward_pass_keeps_what_is_counted(
    root: Path, tmp_path: Path, dtype: str, shape: dict[str, float]
) -> None:
    config = tiny_config(root, dtype=dtype)
    config = replace(config, model=replace(config.model, **shape))
    trainer = Trainer(build(config), tmp_path)
    trainer.model.train()
    batch = trainer.pieces.loader.batch(0)[-1]  # world samples: all as long, with as many targets
    one, two = (batch.map(lambda t, n=n: t[:n]) for n in (1, 2))
    real = [really_kept(trainer, part) for part in (one, two)]
    copies, row = kept(config, batch, trainer.pieces.vocab)
    assert real[1] - real[0] == pytest.approx(row, rel=0.02)
    assert real[0] == pytest.approx(copies + row, rel=0.03)


def large(**train: object) -> Config:
    config = recipe("libero_256_goal")
    return replace(config, train=replace(config.train, **train))


def test_the_published_size_fits_eight_cards_and_not_one() -> None:
    one, eight = need(large(shard=1)), need(large(shard=8), gpus=8)
    assert one.rows(80 * 10**9) == 0
    assert eight.rows(80 * 10**9) > 8
    assert one.gradients == 4 * 7_013_158_912
    for name in ("weights", "gradients", "moments"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, rel=1e-3)
    kept_whole = need(large(shard=8, checkpoint_layers=False), gpus=8)
    assert kept_whole.row > 10 * eight.row


def test_plan_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "debug", "--gpus", "2", "--memory", "1GB"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = json.loads(out[-1])["plan"]
    assert [row["options"] for row in rows] == [
        "--train.shard 1",
        "--train.shard 1 --train.checkpoint-layers",
        "--train.shard 2",
        "--train.shard 2 --train.checkpoint-layers",
    ]
    assert all(row["fixed"] + row["row"] * row["max_rows"] <= 1e9 for row in rows)
    room = f"{rows[0]['max_rows']} rows a GPU fit, train.batch_size asks for 2"
    assert out[-2] == f"next: torchrun --nproc-per-node 2 -m worldvla train debug --train.shard 1   {room}"
    assert main(["plan", "debug", "--memory", "1MB"]) == 3
    assert "nothing fits" in capsys.readouterr().out


def test_codes_by_levels_are_planned_and_what_needs_whole_models_is_not_sharded() -> None:
    levels = recipe("tabletop_world")
    assert need(levels).weights == 4 * build_size(levels)
    sampled = replace(levels, train=replace(levels.train, scheduled_sampling=0.5))
    assert not any("--train.shard 2" in words for words in settings(sampled, 2))
    assert any("--train.shard 2" in words for words in settings(levels, 2))


def test_the_shards_that_are_asked_for_are_planned() -> None:
    wide = large(batch_size=16, shard=8)
    words = [w for w in settings(wide, 16) if "checkpoint" not in w]
    assert words == ["--train.shard 1", "--train.shard 8", "--train.shard 16"]


def build_size(config: Config) -> int:
    vocab_size = fake(config, "world", 0)[0].vocab.size
    return empty_model(config.model, vocab_size, *config.layout.sizes).num_parameters()


def test_bad_sizes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    for words, line in (
        (("--memory", "80"), "expected a size such as 80GB"),
        (("--gpus", "0"), "at least 1"),
        (("--gpus", "4", "--train.shard", "3"), "train.shard 3 and train.replicate 0 do not fit 4 processes"),
        (("--gpus", "8"), "8 processes share the 4 samples of a step"),
    ):
        assert main(["plan", "debug", *words]) == 2
        assert line in capsys.readouterr().err


def test_cameras_that_stores_would_say_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample without pictures would be planned otherwise."""
    assert main(["plan", "finetune_7b", "--data.stores", "nowhere"]) == 2
    assert "takes its cameras from its stores, which are not there" in capsys.readouterr().err
    assert main(["plan", "finetune_7b", "--layout.views", "agentview", "--layout.grids", "32", "32"]) == 0
