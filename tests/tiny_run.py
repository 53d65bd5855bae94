"""A run small enough for tests: frames whose brightness decides the actions, a tokenizer, a store, config."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from worldvla.batch import Batch
from worldvla.config import (
    Config,
    DataConfig,
    ImageTokenizerConfig,
    LayoutConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from worldvla.data.episode import Episode
from worldvla.data.store import write_store
from worldvla.files import write_digests
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train.build import build, build_model
from worldvla.train.checkpoint import latest, save
from worldvla.train.loop import Trainer, train
from worldvla.train.optim import build_optimizers

MODEL = ModelConfig(
    num_layers=2, width=32, num_heads=2, num_kv_heads=1, hidden=64, place_embedding=True, codebook_init=True
)
LAYOUT = LayoutConfig(
    views=("agentview", "wrist"),
    grids=((3, 3), (2, 2)),
    history=2,
    chunk=3,
    state=True,
    policy_prompt="{task}",
)


def tiny_config(root: Path, **train: object) -> Config:
    """Return a config over the files that `write_tiny` writes under `root`; `train` overrides TrainConfig."""
    settings = {
        "steps": 8,
        "batch_size": 4,
        "num_threads": 1,
        "log_every": 2,
        "eval_every": 4,
        "num_eval_batches": 1,
    }
    return Config(
        name="tiny",
        vocab="compact",
        num_text=260,
        tokenizer=str(root / "image_tokenizer"),
        layout=replace(LAYOUT, world_prompt="go"),
        model=MODEL,
        loss=LossConfig(),
        optim=OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=2, clip=1.0),
        data=DataConfig(stores=(str(root / "store"),), val_fraction=0.2, sequence_length=80),
        train=TrainConfig(**{**settings, "save_every": 4, **train}),  # pyright: ignore[reportArgumentType]
    )


TOKENIZER = ImageTokenizerConfig(
    channels=4, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, embed_dim=4, num_codes=16
)


def write_tiny(root: Path, shape: ImageTokenizerConfig = TOKENIZER) -> None:
    """Write image_tokenizer/ and store/ under `root`, the same bytes every time.

    The keys of the episodes are those by which the golden losses were split.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = ImageTokenizer(shape)
    tokenizer.save(root / "image_tokenizer")
    rng = np.random.default_rng(0)
    write_store(root / "store", [_episode(rng, i) for i in range(6)], tokenizer)
    rows = json.loads((root / "store/episodes.json").read_text())
    for i, row in enumerate(rows):
        row["key"] = f"{row['suite']}/{row['task']}/{row['init']}/{row['seed']}/{i}"
    (root / "store/episodes.json").write_text(json.dumps(rows))
    write_digests(root / "store")


def write_checkpoint(config: Config, path: Path, step: int = 0) -> Path:
    """Write a checkpoint with its initial weights; return its path."""
    pieces = build(config)
    model = build_model(pieces)
    save(path, pieces, model, build_optimizers(model, config.optim), {"step": step})
    return path


def train_in_parts(config: Config, run_dir: Path, killed_at: int) -> Path:
    """Train, killed at a step, then again from the checkpoint before; return the last checkpoint."""
    step = Trainer.step

    def killed(self: Trainer, batches: list[Batch]) -> dict[str, float]:
        if self.state.step == killed_at:
            raise RuntimeError("killed")
        return step(self, batches)

    with patch.object(Trainer, "step", killed), pytest.raises(RuntimeError, match="killed"):
        train(config, run_dir)
    assert latest(run_dir) is not None
    torch.manual_seed(99)  # a new process would not have this one's random state
    return train(config, run_dir).checkpoint


def _episode(rng: np.random.Generator, index: int, length: int = 8) -> Episode:
    light = rng.uniform(0, 1, (length, 1))
    images = {
        view: (rng.uniform(0, 0.2, (length, side, side, 3)) * 255 + light[..., None, None] * 200).astype(
            np.uint8
        )
        for view, side in (("agentview", 6), ("wrist", 4))
    }
    actions = np.concatenate([light * 2 - 1 + 0.1 * k for k in range(6)] + [np.sign(light - 0.5)], 1).clip(
        -1, 1
    )
    return Episode(
        instruction=f"do {index % 2}",
        suite="tiny",
        task=f"task_{index % 2}",
        actions=actions.astype(np.float32),
        states=rng.uniform(-1, 1, (length, 8)).astype(np.float32),
        images=images,
        sim_states=np.zeros((length, 1)),
        is_expert=np.ones(length, dtype=np.bool_),
        init=index,
        seed=0,
    )


def joined(parts: list[Batch], pad: int) -> Batch:
    """Return the samples of all parts as one batch, padded to the longest."""
    length = max(part.ids_BT.shape[1] for part in parts)
    fill = {"ids_BT": pad, "value_BT": float("nan")}
    return Batch(
        **{
            name: torch.cat(
                [
                    F.pad(t := getattr(p, name), (0, length - t.shape[1]), value=fill.get(name, 0))
                    for p in parts
                ]
            )
            for name, tensor in vars(parts[0]).items()
            if tensor is not None
        }
    )
