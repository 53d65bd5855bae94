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
from worldvla.sim.suites import FOUR, TABLETOP

LIBERO_FRAMES = {
    "libero_spatial": 52_970,
    "libero_object": 66_984,
    "libero_goal": 52_042,
    "libero_10": 101_469,
}
"""Frames of each suite's demonstrations without no-ops, as LeRobot's libero_*_image state them (other
regenerations differ by a few percent): they turn epochs into steps."""


def tabletop() -> Config:
    """The first small model: four tabletop suites, two views. The shipped one was trained on from it."""
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
            stores=stores("store"),
            world_fraction=0.15,
            pad_chunks=True,
        ),
        train=TrainConfig(
            steps=4_800,
            batch_size=48,
            dtype="auto",
            log_every=50,
            eval_every=500,
            save_every=500,
        ),
    )


def changed(base: Config, name: str, **changes: Any) -> Config:
    """Return `base` under another name: a dict changes these fields of its section, other values replace."""
    fields = {
        key: replace(getattr(base, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return replace(base, name=name, **fields)


def stores(*kinds: str) -> tuple[str, ...]:
    """Return the stores of each kind on the four tabletop suites."""
    return tuple(f"out/tabletop/{kind}_{suite}" for kind in kinds for suite in TABLETOP)


def finetune() -> Config:
    """Your own data, on a laptop: cameras, grids and numbers of dims come from the stores that you name.

    `worldvla train-tokenizer SOURCE`, `worldvla tokenize SOURCE`, `worldvla train finetune`:
    docs/guides/data.md.
    """
    return changed(
        tabletop(),
        "finetune",
        tokenizer="out/my/image_tokenizer",
        layout={"views": (), "grids": (), "chunk": 8},
        data={"stores": ("out/my/store",)},
        train={"steps": 3_000, "batch_size": 32},
    )


def finetune_world() -> Config:
    """`finetune` with a world model of clips beside the policy, on codes of `train-tokenizer --levels`:
    docs/guides/data.md."""
    world = tabletop_world()
    return changed(
        finetune(),
        "finetune_world",
        tokenizer="out/my/levels",
        layout={"clip": 3, "anchor": True, "world_state": True, "frame_at_once": True},
        model=world.model,
        loss=world.loss,
        optim=world.optim,
        data={"world_fraction": 0.6, "corrupt": 0.05},
    )


def finetune_7b() -> Config:
    """`finetune` of a released 7B, by low-rank updates of it in 4 bits: docs/guides/data.md.

    Ids, text and layout are the release's, ranges of actions those of your data set, which is called `my`.
    """
    return changed(
        published("libero_256"),
        "finetune_7b",
        tokenizer="out/models/worldvla_256_goal/image_tokenizer",
        layout={"views": (), "grids": ()},
        data={"stores": ("out/my/store",), "datasets": ("my",), "val_fraction": 0.02},
        optim={"learning_rate": 1e-4, "min_learning_rate": 1e-4, "warmup_steps": 100},
        train={
            "steps": 5_000,
            "batch_size": 4,
            "accumulation": 4,
            "eval_every": 500,
            "save_every": 500,
            "init_from": "out/models/worldvla_256_goal",
        },
        lora={"rank": 16, "base": "int4"},
    )


def dagger(rounds: int) -> Config:
    """`tabletop`, trained on with the expert's labels on the states that its versions visited (DAgger).

    After two rounds it is the policy that the shipped model began from; `runs/tabletop.sh` has all commands.
    """
    steps, last_rate, init_from = ((1_500, 3e-4, "first"), (3_800, 1e-5, "second"))[rounds - 1]
    return changed(
        tabletop(),
        f"tabletop_dagger{rounds}",
        optim={"learning_rate": 5e-4, "min_learning_rate": last_rate, "warmup_steps": 100},
        data={"stores": stores(*("store", "dagger1", "dagger2")[: rounds + 1])},
        train={"steps": steps, "batch_size": 64, "init_from": f"out/tabletop/{init_from}"},
    )


def tabletop_world() -> Config:
    """`tabletop_dagger2` on the codes of a better image tokenizer (paper/grow.py), trained on as a world
    model of clips, beside the policy. Needs the stores of `collect --kind world`."""
    return changed(
        dagger(2),
        "tabletop_world",
        tokenizer="out/tabletop/levels",
        layout={"clip": 3},
        model={"code_levels": (8,) * 8, "previous_code": True, "dropout": 0.0},
        loss={"image_weight": 0.5, "supervise": "decoded"},
        optim=OptimConfig(
            method="muon", learning_rate=1.5e-3, min_learning_rate=2e-5, weight_decay=0.02, clip=1.0
        ),
        data={
            "stores": stores("levels_world", "levels_visited", "levels_expert"),
            "world_fraction": 0.75,
            "corrupt": 0.05,
            "sequence_length": 400,
        },
        train={
            "steps": 3_800,
            "batch_size": 32,
            "num_eval_batches": 2,
            "save_every": 100,
            "init_from": "out/tabletop/grown",
        },
    )


def tabletop_world2() -> Config:
    """`tabletop_world` with twice as many policy samples a step."""
    return changed(
        tabletop_world(),
        "tabletop_world2",
        optim={"learning_rate": 5.2e-4, "warmup_steps": 10},
        data={"world_fraction": 0.6},
        train={"steps": 1_250, "batch_size": 40, "init_from": "out/tabletop/first_world"},
    )


def tabletop_world3() -> Config:
    """A last short part with mostly policy samples."""
    return changed(
        tabletop_world2(),
        "tabletop_world3",
        optim={"learning_rate": 3e-4},
        data={"world_fraction": 0.375},
        train={"steps": 260, "batch_size": 64, "eval_every": 0, "init_from": "out/tabletop/second_world"},
    )


def tabletop_state() -> Config:
    """`tabletop_world3`, trained on to say the robot's state before it shows the next frame."""
    return changed(
        tabletop_world(),
        "tabletop_state",
        layout={"world_state": True},
        optim={"learning_rate": 1.2e-3},
        data={"sequence_length": 448},
        train={"steps": 3_600, "save_every": 200, "init_from": "out/tabletop/world_model"},
    )


def tabletop_anchor() -> Config:
    """`tabletop_state`, trained on with the frame that a clip began from in sight."""
    return changed(
        tabletop_state(),
        "tabletop_anchor",
        layout={"anchor": True},
        optim={"learning_rate": 9e-4, "warmup_steps": 30},
        data={"world_fraction": 0.6, "sequence_length": 544},
        train={
            "steps": 1_700,
            "batch_size": 36,
            "log_every": 20,
            "eval_every": 300,
            "save_every": 100,
            "init_from": "out/tabletop/state",
        },
    )


def tabletop_sampled() -> Config:
    """`tabletop_anchor`, trained on with new data while it reads some of its own codes, as in imagination."""
    return changed(
        tabletop_anchor(),
        "tabletop_sampled",
        data={"stores": stores("levels_world2", "levels_visited2", "levels_expert2")},
        train={"steps": 3_200, "scheduled_sampling": 0.5, "init_from": "out/tabletop/anchor_model"},
    )


def tabletop_at_once() -> Config:
    """`tabletop_sampled`, which learns to predict all codes of a frame at once."""
    return changed(
        tabletop_sampled(),
        "tabletop_at_once",
        layout={"frame_at_once": True},
        train={"steps": 700, "init_from": "out/tabletop/sampled_model"},
    )


def tabletop_deep() -> Config:
    """`tabletop_at_once`, trained on with six layers instead of four."""
    return changed(
        tabletop_at_once(),
        "tabletop_deep",
        model={"num_layers": 6},
        train={"steps": 4_000, "init_from": "out/tabletop/at_once_model"},
    )


def tabletop_imagined() -> Config:
    """`tabletop_deep`, trained on with new data and longer clips; of the world samples that can, half read
    what `tabletop_deep` imagined in place of the frames."""
    return changed(
        tabletop_deep(),
        "tabletop_imagined",
        layout={"clip": 5},
        optim={"warmup_steps": 20},
        data={
            "stores": stores("imagined3", "levels_visited3", "levels_expert3"),
            "world_fraction": 0.5,
            "imagined": 0.5,
            "sequence_length": 720,
        },
        train={
            "steps": 2_700,
            "batch_size": 30,
            "scheduled_sampling": 0.0,
            "init_from": "out/tabletop/deep_model",
        },
    )


def tabletop_astray() -> Config:
    """`tabletop_imagined`, trained on in the same way with data in which hands act beside the things. The
    next one starts from weights halfway between the two (paper/average.py)."""
    return changed(
        tabletop_imagined(),
        "tabletop_astray",
        data={"stores": stores("imagined4", "levels_visited4", "levels_expert4")},
        train={"steps": 2_900, "init_from": "out/tabletop/imagined_model"},
    )


def tabletop_grasps() -> Config:
    """That mean, trained on with hands that close on things and beside them. The state weighs five times as
    much: where the fingers stand says whether a grasp holds. What is shipped has weights halfway between its
    beginning and its end."""
    grasps, spatial = "out/tabletop/levels_grasps5_{}", "tabletop_spatial"
    others = [suite for suite in TABLETOP if suite != spatial]
    found = f"out/tabletop/imagined5_{spatial}", *map(grasps.format, others)
    world = (f"out/tabletop/levels_world5_{suite}" for suite in TABLETOP if suite != "tabletop_long")
    return changed(
        tabletop_astray(),
        "tabletop_grasps",
        loss={"state_weight": 1.0},
        data={"stores": (*found, *world, *stores("levels_visited5", "levels_expert4"))},
        train={"steps": 1_200, "init_from": "out/tabletop/halfway"},
    )


def tabletop_pilot() -> Config:
    """The pilot of `tabletop` on one suite: at least 70 % on unseen initial states before a longer run."""
    data = {"stores": ("out/tabletop/store_tabletop_object",)}
    return changed(tabletop(), "tabletop_pilot", data=data, train={"steps": 2_000})


def debug() -> Config:
    """Everything tiny: the whole line end to end in seconds, on the shapes of `tabletop`."""
    return changed(
        tabletop(),
        "debug",
        num_text=300,
        tokenizer="out/debug/image_tokenizer",
        model={"num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 2, "hidden": 64},
        optim={"warmup_steps": 5},
        data={"stores": ("out/debug/store_tabletop_object",), "val_fraction": 0.2},
        train={
            "steps": 20,
            "batch_size": 4,
            "dtype": "float32",
            "log_every": 5,
            "eval_every": 10,
            "num_eval_batches": 1,
            "save_every": 10,
        },
    )


def libero_object_spatial_long() -> Config:
    """libero_object and libero_spatial in one model, for a GPU: 128 and 64 pixels at 16 a code, by Muon.

    `runs/libero.sh` makes the stores; the shipped model `libero` is this one, then `.._drawer`.
    """
    root = "out/tables_libero"
    names = (f"{root}/store_libero_object", f"{root}/store_libero_spatial")
    return changed(
        tabletop(),
        "libero_object_spatial_long",
        tokenizer=f"{root}/image_tokenizer",
        model={"num_layers": 5, "num_heads": 3, "num_kv_heads": 3},
        loss={"supervise": "decoded"},
        optim={"method": "muon", "learning_rate": 3e-3},
        data={"stores": (*names, "out/libero_object_spatial/store_more"), "world_fraction": 0.2},
        train={"steps": 2_500, "batch_size": 320, "eval_every": 1_300, "save_every": 1_300},
    )


def libero_object_spatial_drawer() -> Config:
    """`libero_object_spatial_long`, trained on on two cores with more of the one task that it failed: the
    bowl in the drawer (libero_spatial, task 4), every frame of it twice. Shipped as `libero`."""
    base, root = libero_object_spatial_long(), "out/libero_object_spatial"
    return changed(
        base,
        "libero_object_spatial_drawer",
        optim={"learning_rate": 1e-3, "warmup_steps": 50},
        data={"stores": (*base.data.stores, *(f"{root}/store_drawer",) * 2)},
        train={
            "steps": 1_500,
            "batch_size": 120,
            "eval_every": 500,
            "save_every": 500,
            "init_from": f"{root}/model_long",
        },
    )


PUBLISHED = ModelConfig(num_layers=32, width=4096, num_heads=32, num_kv_heads=32, hidden=11008)
"""The published 7B."""


def libero_four() -> Config:
    """A policy of all four suites of LIBERO, grown from the shipped tabletop model; then `libero_visited`.

    `runs/libero_four.sh` makes what both need.
    """
    return changed(
        tabletop_imagined(),
        "libero_four",
        tokenizer="out/libero/levels",
        layout={"clip": 3},
        optim={"learning_rate": 2e-3, "warmup_steps": 50},
        data={
            "stores": tuple(f"out/libero/store_{suite}" for suite in FOUR),
            "world_fraction": 0.0,
            "imagined": 0.0,
            "sequence_length": 544,
        },
        train={"steps": 1_900, "batch_size": 96, "init_from": "out/libero/grown"},
    )


def libero_visited() -> Config:
    """`libero_four`, trained on with states that it visited, with images that are shifted and lit otherwise,
    and as a world model. Shipped as `libero_four`."""
    base, root = libero_four(), "out/libero"
    every = [f"{root}/{part}_{suite}" for part in ("store", "shifted_1", "shifted_2") for suite in FOUR]
    some = ("libero_spatial", "libero_object", "libero_10")
    every += [f"{root}/{part}_{suite}" for part in ("visited", "visited_shifted") for suite in some]
    return changed(
        base,
        "libero_visited",
        data={"stores": tuple(every), "world_fraction": 0.08},
        train={"steps": 2_000, "init_from": f"{root}/four"},
    )


def published(family: str, suite: str = "libero_goal") -> Config:
    """`PUBLISHED` on a LIBERO suite, with the layout and chunk of its release: 40 epochs.

    `family`: libero_256 and libero_512, WorldVLA from Chameleon (WorldVLA exps_256_all/*.sh,
    exps_512_all/*.sh, pretrain_ck.py); rynnvla_256, RynnVLA-002 with a continuous head, state and wrist
    camera, and rynnvla_world_512, its world model alone, both from released weights (pretokenised scripts).
    """
    from worldvla.published.names import RELEASES  # imports torch: not before a recipe is asked for

    name = f"{family}_{suite.removeprefix('libero_')}"
    release = RELEASES[family.replace("libero", "worldvla")]
    layout = replace(release.layout, chunk=release.chunks.get(suite, 5))
    is_world, is_rynnvla = family == "rynnvla_world_512", family.startswith("rynnvla")
    weights = "chameleon" if not is_rynnvla else family if is_world else name
    rate, decay, dropout, num_gpus = 5e-6, 0.1, 0.05, 4
    if is_rynnvla:
        special = {"libero_goal": (5e-6, 0.15, 0.08), "libero_10": (8e-6, 0.18, 0.1)}
        rate, decay, dropout = special.get("libero_goal" if is_world else suite, (rate, decay, dropout))
        num_gpus = 8
    elif name == "libero_256_goal":
        num_gpus = 2
    batch_size = 8 * num_gpus
    epoch = LIBERO_FRAMES[suite] * (1 if is_world else 2) // batch_size  # a policy and a world sample a frame
    return Config(
        name=name,
        vocab="chameleon",
        num_text=65_536,
        tokenizer=f"out/models/{weights}/image_tokenizer",
        layout=layout,
        model=replace(
            PUBLISHED, dropout=dropout, head=HeadConfig(num_layers=2 if family == "rynnvla_256" else 0)
        ),
        loss=LossConfig(reduction="published"),
        optim=OptimConfig(
            learning_rate=rate,
            min_learning_rate=rate,
            weight_decay=decay,
            clip=4.0,
            warmup_steps=max(1, epoch // 100),
        ),
        data=DataConfig(
            stores=(f"data/libero/{name}",),
            world_fraction=1.0 if is_world else 0.5,
            val_fraction=0.0,  # the results are of training on every split
            sequence_length=layout.longest,
        ),
        train=TrainConfig(
            steps=40 * epoch,
            batch_size=batch_size,
            dtype="bfloat16",
            device="cuda",
            checkpoint_layers=True,
            eval_every=2_000,
            save_every=2_000,
            init_from=f"out/models/{weights}",
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "tabletop": tabletop,
    "tabletop_dagger1": partial(dagger, 1),
    "tabletop_dagger2": partial(dagger, 2),
    "tabletop_world": tabletop_world,
    "tabletop_world2": tabletop_world2,
    "tabletop_world3": tabletop_world3,
    "tabletop_state": tabletop_state,
    "tabletop_anchor": tabletop_anchor,
    "tabletop_sampled": tabletop_sampled,
    "tabletop_at_once": tabletop_at_once,
    "tabletop_deep": tabletop_deep,
    "tabletop_imagined": tabletop_imagined,
    "tabletop_astray": tabletop_astray,
    "tabletop_grasps": tabletop_grasps,
    "tabletop_pilot": tabletop_pilot,
    "debug": debug,
    "finetune": finetune,
    "finetune_world": finetune_world,
    "finetune_7b": finetune_7b,
    "libero_four": libero_four,
    "libero_visited": libero_visited,
    "libero_object_spatial_long": libero_object_spatial_long,
    "libero_object_spatial_drawer": libero_object_spatial_drawer,
}
RECIPES |= {
    f"{family}_{suite.removeprefix('libero_')}": partial(published, family, suite)
    for family in ("libero_256", "libero_512", "rynnvla_256", "rynnvla_world_512")
    for suite in LIBERO_FRAMES
}


def recipe(name: str) -> Config:
    """Return the recipe called `name`; an unknown name raises ValueError that offers the nearest ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(near)}?")
    return RECIPES[name]()
