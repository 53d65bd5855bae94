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
from worldvla.sim.suites import TABLETOP

LIBERO_FRAMES = {
    "libero_spatial": 52_970,
    "libero_object": 66_984,
    "libero_goal": 52_042,
    "libero_10": 101_469,
}
"""Frames of each suite's demonstrations without no-ops, as LeRobot's libero_*_image state them (other
regenerations differ by a few percent): they turn epochs into steps."""
LIBERO_SUITES = tuple(LIBERO_FRAMES)


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
            stores=tuple(f"out/tabletop/store_{suite}" for suite in TABLETOP),
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


def _dagger(rounds: int, init_from: str, steps: int, learning_rate: float, last_rate: float) -> Config:
    """`tabletop` trained on, from `init_from`, with the states that its predecessors visited."""
    base = tabletop()
    names = [f"{d}_{suite}" for d in ["store", "dagger1", "dagger2"][: rounds + 1] for suite in TABLETOP]
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


def libero_object_front() -> Config:
    """`libero_object` as the paper sees it: the front view alone, no state; the same data, half the steps."""
    base = libero_object()
    layout = replace(base.layout, views=("agentview",), grids=((8, 8),), state=False)
    train = replace(base.train, steps=1_100)
    return replace(base, name="libero_object_front", layout=layout, train=train)


def _published(name: str, release: str, suite: str, init_from: str) -> Config:
    """The published 7B on a LIBERO suite: what all scripts share; layout and K are the release's."""
    from worldvla.published.names import RELEASES  # imports torch: not before a recipe is asked for

    layout = replace(RELEASES[release].layout, chunk=RELEASES[release].chunks.get(suite, 5))
    return Config(
        name=f"{name}_{suite.removeprefix('libero_')}",
        vocab="chameleon",
        num_text=65_536,
        tokenizer=f"{init_from}/image_tokenizer",
        layout=layout,
        model=ModelConfig(
            num_layers=32, width=4096, num_heads=32, num_kv_heads=32, hidden=11008, dropout=0.05
        ),
        loss=LossConfig(reduction="published"),
        optim=OptimConfig(learning_rate=5e-6, min_learning_rate=5e-6, weight_decay=0.1, clip=4.0),
        data=DataConfig(
            stores=(f"data/libero/{name}_{suite.removeprefix('libero_')}",),
            world_fraction=0.5,
            val_fraction=0.0,  # the results are of training on every split
            sequence_length=layout.longest,
        ),
        train=TrainConfig(
            steps=1,
            batch_size=1,
            dtype="bfloat16",
            device="cuda",
            checkpoint_layers=True,
            eval_every=2_000,
            save_every=2_000,
            init_from=init_from,
        ),
    )


def _epochs(config: Config, suite: str, batch_size: int) -> Config:
    """40 epochs, 0.01 of one for warm-up, as published; a frame is a policy sample and a world sample."""
    num_samples = LIBERO_FRAMES[suite] * (1 if config.data.world_fraction == 1 else 2)
    epoch = num_samples // batch_size
    return replace(
        config,
        optim=replace(config.optim, warmup_steps=max(1, epoch // 100)),
        train=replace(config.train, steps=40 * epoch, batch_size=batch_size),
    )


def libero(suite: str = "libero_goal", pixels: int = 256) -> Config:
    """WorldVLA from Chameleon (WorldVLA exps_256_all/*.sh, exps_512_all/*.sh, pretrain_ck.py)."""
    config = _published(f"libero_{pixels}", f"worldvla_{pixels}", suite, "out/models/chameleon")
    num_gpus = 2 if (suite, pixels) == ("libero_goal", 256) else 4
    return _epochs(config, suite, 8 * num_gpus)


def rynnvla(suite: str = "libero_goal", is_world: bool = False) -> Config:
    """RynnVLA-002 (its pretokenised training scripts), on from the released weights: discrete actions and a
    continuous head, with state and wrist camera, at 256 pixels, or the world model alone at 512."""
    name = "rynnvla_world_512" if is_world else "rynnvla_256"
    weights = name if is_world else f"{name}_{suite.removeprefix('libero_')}"
    config = _published(name, name, suite, f"out/models/{weights}")
    special = {"libero_goal": (5e-6, 0.15, 0.08), "libero_10": (8e-6, 0.18, 0.1)}
    rate, decay, dropout = special["libero_goal"] if is_world else special.get(suite, (5e-6, 0.1, 0.05))
    config = replace(
        config,
        data=replace(config.data, world_fraction=1.0 if is_world else 0.5),
        model=replace(config.model, dropout=dropout, head=HeadConfig(num_layers=0 if is_world else 2)),
        optim=replace(config.optim, learning_rate=rate, min_learning_rate=rate, weight_decay=decay),
    )
    return _epochs(config, suite, 8 * 8)


POLICY_BATCH, WORLD_BATCH, LIBERO_WORLD_BATCH = 96, 64, 24
"""Samples a step of each kind in every row below that has the kind: rows differ in nothing else."""
ABLATIONS: dict[str, dict[str, Any]] = {
    # Table 3, in its order. `action` is the OpenVLA-style baseline too: one frame, one action, no world.
    "action": {"chunk": 1, "world": False},
    "action_world": {"chunk": 1},
    "chunk_causal": {"selective_mask": False, "world": False},
    "chunk": {"world": False},
    "full": {},
    # The paper's weight of the image tokens, 0.04, starves the world model of a small policy from nothing.
    "full_even": {"image_weight": 1.0},
    # History, resolution.
    "history2": {"history": 2},
    "history4": {"history": 4},
    "action_history2": {"history": 2, "chunk": 1},
    "action_history4": {"history": 4, "chunk": 1},
    "low": {"grids": ((4, 4), (2, 2))},
    # Table 2, the world model alone.
    "world": {"policy": False},
    "world_long": {"policy": False, "steps": 5_000},
    "world_no_action": {"policy": False, "action_conditioning": False},
    # Chunk length, beside action (1), chunk and chunk_causal (5).
    "chunk2": {"chunk": 2, "world": False},
    "chunk2_causal": {"chunk": 2, "selective_mask": False, "world": False},
    "full2": {"chunk": 2},
    "full2_even": {"chunk": 2, "image_weight": 1.0},
    "chunk10": {"chunk": 10, "world": False},
    "chunk10_causal": {"chunk": 10, "selective_mask": False, "world": False},
    # Beside chunk: a continuous action head next to the bins.
    "head": {"head": HeadConfig(num_layers=2, width=128, hidden=512), "world": False},
    # The same head, trained alone on the trunk of chunk.
    "head_after": {"head": HeadConfig(num_layers=2, width=128, hidden=512), "world": False, "after": "chunk"},
}
"""Row -> what differs from `full`: a field of the layout, the head, the weight of image tokens, the steps,
the row whose weights it leaves as they are, or which kind of samples is left out."""


def pilot(row: str, libero: bool = False) -> Config:
    """A row of the paper's tables at small size: 3.7 M parameters on the four tabletop suites; or, on
    libero_object and libero_spatial together, 8.8 M.

    2,000 steps of 96 policy samples and, where the row has them, 64 world samples (LIBERO: 24), by Muon:
    minutes on a GPU, half an hour to an hour on two cores. `runs/tables.sh` makes the stores,
    whose labels hold ten actions (LIBERO: five), and trains the seeds.
    """
    base, layout = libero_object() if libero else tabletop(), dict(ABLATIONS[row])
    policy = POLICY_BATCH * layout.pop("policy", True)
    world = (LIBERO_WORLD_BATCH if libero else WORLD_BATCH) * layout.pop("world", True)
    head, alpha = layout.pop("head", HeadConfig()), layout.pop("image_weight", base.loss.image_weight)
    steps, after = layout.pop("steps", 2_000), layout.pop("after", "")
    root = "out/tables_libero" if libero else "out/tables_low" if row == "low" else "out/tables"
    suites = ("libero_object", "libero_spatial") if libero else TABLETOP
    length = {2: 320, 4: 480}.get(layout.get("history", 1), 256)
    share, batch_size = world / (policy + world), policy + world
    train = replace(base.train, steps=steps, batch_size=batch_size, eval_every=500, save_every=1_000)
    if after:
        train = replace(train, init_from=f"{root}/{after}_0", only_head=True)
    return replace(
        base,
        name=f"libero_pilot_{row}" if libero else f"pilot_{row}",
        tokenizer=f"{root}/image_tokenizer",
        layout=replace(base.layout, **layout),
        model=replace(base.model, num_heads=3, num_kv_heads=3, head=head),
        loss=replace(base.loss, supervise="decoded", image_weight=alpha),
        optim=replace(base.optim, method="muon", learning_rate=3e-3, min_learning_rate=5e-5),
        data=replace(
            base.data,
            stores=tuple(f"{root}/store_{suite}" for suite in suites),
            world_fraction=share,
            sequence_length=length,
        ),
        train=train,
    )


def libero_object_spatial() -> Config:
    """One model for both suites on two cores: `libero_pilot_full`, shorter, with a continuous head.

    `runs/libero_object_spatial.sh`; the stores are those of the tables.
    """
    base = pilot("full", libero=True)
    return replace(
        base,
        name="libero_object_spatial",
        model=replace(base.model, head=ABLATIONS["head"]["head"]),
        train=replace(base.train, steps=1_500, save_every=500),
    )


def libero_object_spatial_long() -> Config:
    """The shipped LIBERO model: for a GPU, bins alone, 4.4 times the samples, 240 more demonstrations."""
    base = pilot("full", libero=True)
    stores = (*base.data.stores, "out/libero_object_spatial/store_more")
    return replace(
        base,
        name="libero_object_spatial_long",
        data=replace(base.data, stores=stores),
        train=replace(
            base.train, steps=2_500, batch_size=320, eval_every=1_300, save_every=1_300, dtype="bfloat16"
        ),
    )


def libero_object_spatial_drawer() -> Config:
    """`libero_object_spatial_long`, on, on two cores, with more of the one task that it failed: the bowl in
    the drawer (libero_spatial, task 4), whose expert has since found an easier grip; every frame of it twice.
    """
    base, root = libero_object_spatial_long(), "out/libero_object_spatial"
    return replace(
        base,
        name="libero_object_spatial_drawer",
        optim=replace(base.optim, learning_rate=1e-3, warmup_steps=50),
        data=replace(base.data, stores=(*base.data.stores, *(f"{root}/store_drawer",) * 2)),
        train=replace(
            pilot("full", libero=True).train, steps=1_500, save_every=500, init_from=f"{root}/model_long"
        ),
    )


def libero_all() -> Config:
    """The four suites, for a GPU: `libero_object_spatial_long`, more steps, a tokenizer of all suites'
    frames, libero_goal and libero_10 in its data (nine tasks of it: no expert does the microwave's)."""
    base, root = libero_object_spatial_long(), "out/libero_all"
    names = ("object", "spatial", "more", "drawer", "goal", "10")
    return replace(
        base,
        name="libero_all",
        tokenizer=f"{root}/image_tokenizer",
        data=replace(base.data, stores=tuple(f"{root}/store_{name}" for name in names)),
        train=replace(base.train, steps=4_000, eval_every=2_000, save_every=2_000),
    )


def libero_goal() -> Config:
    """libero_goal alone on two cores: `libero_pilot_full`, shorter, with the tokenizer of `libero_all`."""
    base, every = pilot("full", libero=True), libero_all()
    return replace(
        base,
        name="libero_goal",
        tokenizer=every.tokenizer,
        data=replace(base.data, stores=("out/libero_all/store_goal",)),
        train=replace(base.train, steps=1_500, save_every=500),
    )


def libero_10() -> Config:
    """`libero_goal`, on with libero_10 alone (nine of its tasks, eight demonstrations each), on two cores."""
    base, init_from = libero_goal(), "out/libero_object_spatial/model_goal"
    return replace(
        base,
        name="libero_10",
        optim=replace(base.optim, learning_rate=1e-3, warmup_steps=50),
        data=replace(base.data, stores=("out/libero_all/store_10",)),
        train=replace(base.train, steps=800, save_every=400, init_from=init_from),
    )


def libero_all_front() -> Config:
    """`libero_all` as the paper sees it: the front view alone (there: two frames), no state."""
    base = libero_all()
    layout = replace(base.layout, views=("agentview",), grids=((8, 8),), state=False)
    return replace(base, name="libero_all_front", layout=layout)


def libero_object_spatial_head() -> Config:
    """A continuous head alone, on `libero_object_spatial_drawer` and its data; the bins stay as they are."""
    base, row = libero_object_spatial_drawer(), pilot("head_after", libero=True)
    init_from = "out/libero_object_spatial/model_drawer"
    return replace(
        base,
        name="libero_object_spatial_head",
        model=row.model,
        optim=row.optim,
        data=replace(base.data, world_fraction=0.0),
        train=replace(row.train, init_from=init_from),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        tabletop,
        tabletop_dagger1,
        tabletop_dagger2,
        tabletop_pilot,
        debug,
        libero_object,
        libero_object_front,
        libero_object_spatial,
        libero_object_spatial_long,
        libero_object_spatial_drawer,
        libero_all,
        libero_all_front,
        libero_goal,
        libero_10,
        libero_object_spatial_head,
    )
}
for _suite in LIBERO_SUITES:
    _name = _suite.removeprefix("libero_")
    RECIPES[f"libero_256_{_name}"] = partial(libero, _suite, 256)
    RECIPES[f"libero_512_{_name}"] = partial(libero, _suite, 512)
    RECIPES[f"rynnvla_256_{_name}"] = partial(rynnvla, _suite)
    RECIPES[f"rynnvla_world_512_{_name}"] = partial(rynnvla, _suite, True)
RECIPES |= {f"pilot_{row}": partial(pilot, row) for row in ABLATIONS}
RECIPES |= {f"libero_pilot_{row}": partial(pilot, row, True) for row in ABLATIONS}


def recipe(name: str) -> Config:
    """Return the recipe called `name`; an unknown name raises ValueError that offers the nearest ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(near)}?")
    return RECIPES[name]()
