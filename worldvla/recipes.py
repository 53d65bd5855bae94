"""Named complete configs, as functions: `worldvla train NAME`, overridden by `--section.field value`.

A run worth a row in the README is a recipe here; overrides are for sweeps. `worldvla config NAME` prints one.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from worldvla.config import (
    Config,
    DataConfig,
    HeadConfig,
    LayoutConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

TABLETOP_SUITES = ("tabletop_spatial", "tabletop_object", "tabletop_goal", "tabletop_long")
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def tabletop() -> Config:
    """The shipped small model: four tabletop suites, two views, two to three million parameters."""
    return Config(
        name="tabletop",
        vocab="compact",
        num_text=512,
        tokenizer="out/tabletop/image_tokenizer",
        layout=LayoutConfig(
            views=("agentview", "wrist"),
            grids=((8, 8), (4, 4)),
            history=1,
            chunk=5,
            state=True,
            policy_prompt="{task}",  # the published prompts cost 9 and 13 tokens of about 170
            world_prompt="imagine",
        ),
        model=ModelConfig(
            num_layers=4,
            width=192,
            num_heads=6,
            num_kv_heads=6,
            hidden=512,
            place_embedding=True,
            codebook_init=True,
            dropout=0.05,
        ),
        loss=LossConfig(action_smoothing=2.0),
        optim=OptimConfig(
            learning_rate=1.2e-3,
            min_learning_rate=5e-5,
            warmup_steps=200,
            weight_decay=0.05,
            clip=1.0,
        ),
        data=DataConfig(
            stores=tuple(f"out/tabletop/store_{suite}" for suite in TABLETOP_SUITES),
            world_fraction=0.15,
            pad_chunks=True,
        ),
        train=TrainConfig(
            steps=4_800,
            batch_size=48,
            dtype="bfloat16",
            log_every=50,
            eval_every=500,
            save_every=500,
        ),
    )


def tabletop_head() -> Config:
    """`tabletop` with a continuous action head beside its bins; the transformer starts alike.

    `runs/action_head.sh` trains both and compares them.
    """
    base = tabletop()
    head = HeadConfig(num_layers=2, width=128, num_heads=4, hidden=512)
    return replace(base, name="tabletop_head", model=replace(base.model, head=head))


def _dagger(rounds: int, init_from: str, steps: int, learning_rate: float, last_rate: float) -> Config:
    """`tabletop` trained on, from `init_from`, with the states that its predecessors visited."""
    base = tabletop()
    names = [
        f"{d}_{suite}" for d in ["store", "dagger1", "dagger2"][: rounds + 1] for suite in TABLETOP_SUITES
    ]
    return replace(
        base,
        name=f"tabletop_dagger{rounds}",
        optim=replace(base.optim, learning_rate=learning_rate, min_learning_rate=last_rate, warmup_steps=100),
        data=replace(base.data, stores=tuple(f"out/tabletop/{name}" for name in names)),
        train=replace(base.train, steps=steps, batch_size=64, init_from=init_from),
    )


def tabletop_dagger1() -> Config:
    """`tabletop` with the expert's labels on the states that its first version visited."""
    return _dagger(1, "out/tabletop/first", 1_500, 5e-4, 3e-4)


def tabletop_dagger2() -> Config:
    """`tabletop_dagger1` with the states that it visited: the shipped small model."""
    return _dagger(2, "out/tabletop/second", 3_800, 5e-4, 1e-5)


def tabletop_pilot() -> Config:
    """The pilot of `tabletop` on one suite: at least 70 % on unseen initial states before a longer run."""
    base = tabletop()
    return replace(
        base,
        name="tabletop_pilot",
        data=replace(base.data, stores=("out/tabletop/store_tabletop_object",)),
        train=replace(base.train, steps=2_000),
    )


def debug() -> Config:
    """Everything tiny: the whole line end to end in seconds, on the shapes of `tabletop`."""
    base = tabletop()
    return replace(
        base,
        name="debug",
        num_text=300,
        tokenizer="out/debug/image_tokenizer",
        model=replace(base.model, num_layers=2, width=32, num_heads=2, num_kv_heads=2, hidden=64),
        optim=replace(base.optim, warmup_steps=5),
        data=replace(base.data, stores=("out/debug/store_tabletop_object",), val_fraction=0.2),
        train=replace(
            base.train,
            steps=20,
            batch_size=4,
            dtype="float32",
            log_every=5,
            eval_every=10,
            num_eval_batches=1,
            save_every=10,
        ),
    )


def libero_object_small() -> Config:
    """The small model of `tabletop` on real LIBERO, at its 64 and 32 pixels: shows that the line carries,
    no more."""
    base = tabletop()
    return replace(
        base,
        name="libero_object_small",
        tokenizer="out/libero/image_tokenizer",
        data=replace(base.data, stores=("out/libero/store_libero_object",)),
        train=replace(base.train, steps=300, eval_every=100, save_every=100),
    )


def libero_object() -> Config:
    """libero_object from scripted demonstrations: 128 and 64 pixels at 16 a code, wrist and state.

    `runs/libero_object.sh` makes the stores. For a GPU: --train.device cuda --train.batch-size 256.
    """
    base = tabletop()
    return replace(
        base,
        name="libero_object",
        tokenizer="out/libero_object/image_tokenizer",
        model=replace(base.model, num_layers=5),
        loss=replace(base.loss, supervise="decoded"),
        optim=replace(base.optim, min_learning_rate=1e-4),
        data=replace(base.data, stores=("out/libero_object/store",)),
        train=replace(base.train, steps=2_200, batch_size=64, eval_every=550, save_every=550),
    )


def libero_object_dagger1() -> Config:
    """`libero_object` with the expert's labels on the states that its first version visited."""
    base = libero_object()
    return replace(
        base,
        name="libero_object_dagger1",
        optim=replace(base.optim, learning_rate=5e-4, min_learning_rate=1e-5, warmup_steps=50),
        data=replace(base.data, stores=("out/libero_object/store", "out/libero_object/dagger1_store")),
        train=replace(base.train, steps=1_600, init_from="out/libero_object/first"),
    )


def worldvla_256() -> Config:
    """The published 7B at 256 pixels on LIBERO-Goal (WorldVLA exps_256_all/*.sh, pretrain_ck.py)."""
    return Config(
        name="worldvla_256",
        vocab="chameleon",
        num_text=65_536,
        tokenizer="data/chameleon/tokenizer",
        layout=LayoutConfig(views=("agentview",), grids=((16, 16),), history=2, chunk=5, state=False),
        model=ModelConfig(
            num_layers=32,
            width=4096,
            num_heads=32,
            num_kv_heads=32,
            hidden=11008,
            dropout=0.05,
        ),
        loss=LossConfig(reduction="published"),
        optim=OptimConfig(
            learning_rate=5e-6,
            min_learning_rate=5e-6,
            warmup_steps=33,  # 0.01 epoch; about 104,000 samples at 4 x 8 a step
            weight_decay=0.1,
            clip=4.0,
        ),
        data=DataConfig(
            stores=("data/libero/store_libero_goal",),
            world_fraction=0.5,
            val_fraction=0.0,  # 256_all trains on every split
            sequence_length=640,
        ),
        train=TrainConfig(
            steps=130_000,  # 40 epochs
            batch_size=32,
            dtype="bfloat16",
            device="cuda",
            compile=True,
            log_every=20,
            eval_every=2_000,
            save_every=2_000,
        ),
    )


PILOT_SUITES = ("tabletop_object", "tabletop_goal")
POLICY_BATCH, WORLD_BATCH = 48, 16
"""Samples a step of each kind in every row below that has the kind: rows differ in nothing else."""
ABLATIONS: dict[str, dict[str, Any]] = {
    # Table 3, in its order. `action` is the OpenVLA-style baseline too: one frame, one action, no world.
    "action": {"chunk": 1, "world": False},
    "action_world": {"chunk": 1},
    "chunk_causal": {"selective_mask": False, "world": False},
    "chunk": {"world": False},
    "full": {},
    # History, resolution.
    "history2": {"history": 2},
    "history4": {"history": 4},
    "low": {"grids": ((4, 4), (2, 2))},
    # Table 2, the world model alone.
    "world": {"policy": False},
    "world_no_action": {"policy": False, "action_conditioning": False},
    # Chunk length, beside action (1), chunk and chunk_causal (5).
    "chunk2": {"chunk": 2, "world": False},
    "chunk2_causal": {"chunk": 2, "selective_mask": False, "world": False},
    "chunk10": {"chunk": 10, "world": False},
    "chunk10_causal": {"chunk": 10, "selective_mask": False, "world": False},
}
"""Row -> what differs from `full`: a field of the layout, or which kind of samples is left out."""


def pilot(row: str) -> Config:
    """A row of the paper's tables at pilot size: `tabletop`'s model, two suites, half an hour on two cores.

    1,800 steps of 48 policy samples (about 86 thousand) and, where the row has them, 16 world samples.
    `runs/tables.sh` makes the stores, whose labels hold ten actions, and trains seeds 0 and 1.
    """
    base, layout = tabletop(), dict(ABLATIONS[row])
    policy = POLICY_BATCH * layout.pop("policy", True)
    world = WORLD_BATCH * layout.pop("world", True)
    root = "out/tables_low" if row == "low" else "out/tables"
    tokenizer = f"{root}/image_tokenizer" if row == "low" else "worldvla/assets/tabletop/image_tokenizer"
    stores = tuple(f"{root}/store_{suite}" for suite in PILOT_SUITES)
    length = {"history2": 320, "history4": 480}.get(row, 256)
    share = world / (policy + world)
    return replace(
        base,
        name=f"pilot_{row}",
        tokenizer=tokenizer,
        layout=replace(base.layout, **layout),
        data=replace(base.data, stores=stores, world_fraction=share, sequence_length=length),
        train=replace(base.train, steps=1_800, batch_size=policy + world, eval_every=600, save_every=600),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        tabletop,
        tabletop_head,
        tabletop_dagger1,
        tabletop_dagger2,
        tabletop_pilot,
        debug,
        libero_object_small,
        libero_object,
        libero_object_dagger1,
        worldvla_256,
    )
} | {f"pilot_{row}": partial(pilot, row) for row in ABLATIONS}


def recipe(name: str) -> Config:
    """Return the recipe called `name`; an unknown name raises ValueError that offers the nearest ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(near)}?")
    return RECIPES[name]()
