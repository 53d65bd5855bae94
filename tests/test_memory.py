"""paper/memory.py counts, without memory, what a run and a loaded model really hold.

pytest tests/test_memory.py
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config

from paper import memory
from worldvla.config import LoraConfig
from worldvla.infer.model import Quantize, load
from worldvla.train.build import build
from worldvla.train.loop import Trainer


def allocated(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes of the storages, each once."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if t is not None and (s := t.untyped_storage())}
    return sum(storages.values())


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(rank=4),
        LoraConfig(rank=4, base="int8", full=("embed", "head")),
        LoraConfig(rank=4, base="int4"),
    ],
)
def test_a_training_step_holds_what_is_counted(root: Path, tmp_path: Path, lora: LoraConfig) -> None:
    base = str(root / "run/ckpt/step_7")
    config = replace(tiny_config(root, init_from=base, dtype="bfloat16"), lora=lora)
    trainer = Trainer(build(config), tmp_path)
    trainer.step(trainer._batches(0))
    trainer.backward(trainer._batches(1))
    model, counted = trainer.model, memory.training(config, trainer.pieces.vocab.size)
    moments = [v for state in trainer.optimizers[0].state.values() for k, v in state.items() if k != "step"]
    real = {
        "weights": allocated([*model.parameters(), *model.buffers()]),
        "gradients": allocated(p.grad for p in model.parameters()),
        "moments": allocated(moments),
    }
    for part, num_bytes in real.items():
        assert num_bytes == pytest.approx(counted[part], rel=0.05), part


@pytest.mark.parametrize("quantize", ["", "int8", "int4"])
def test_a_loaded_model_holds_what_is_counted(root: Path, quantize: Quantize) -> None:
    model = load(root / "run", dtype=torch.bfloat16, quantize=quantize)
    counted = memory.inference(model.config, model.vocab.size, torch.bfloat16, quantize or None)
    real = allocated([*model.transformer.parameters(), *model.transformer.buffers()])
    assert real == pytest.approx(counted["total"], rel=0.05)


def test_the_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/MODELS.md states: 7,013,158,912 parameters, of them 6,476,005,376 in large matrices."""
    memory.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["memory"]
    assert rows["infer bfloat16"]["total"] == 2 * 7_013_158_912
    assert rows["train all"]["gradients"] == 4 * 7_013_158_912
    assert rows["infer int8"]["total"] == pytest.approx(7.56e9, rel=0.01)
    assert rows["infer int4"]["total"] == pytest.approx(4.72e9, rel=0.01)
