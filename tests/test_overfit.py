"""A tiny model memorises one batch, actions and images: the smoke alarm for all between a store and the loss.

pytest tests/test_overfit.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import tiny_config

from worldvla.train.loop import train


def test_one_batch_is_memorised(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root, steps=120, log_every=120, eval_every=120, save_every=1000, overfit=True)
    config = replace(
        config,
        model=replace(config.model, width=64, hidden=128),
        loss=replace(config.loss, image_weight=1.0),
        optim=replace(config.optim, learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=10, clip=10.0),
        data=replace(config.data, world_fraction=0.5),
    )
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    val = next(line for line in lines if line["event"] == "val")
    assert val["action_loss"] < 0.05
    assert val["image_loss"] < 0.05
    assert val["action_accuracy"] == val["image_accuracy"] == val["gripper_accuracy"] == 1.0
    assert val["first_xyz_l1"] == 0.0 < val["still_xyz_l1"]
    config = replace(config, train=replace(config.train, overfit=False))
    with pytest.raises(ValueError, match=r"train\.overfit: True there, False now"):
        train(config, tmp_path / "run")
