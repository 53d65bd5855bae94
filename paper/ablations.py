"""The rows of the paper's tables at small size, and the models tried beside the shipped ones.

    python -m paper.ablations chunk                     print a row's config
    python -m paper.ablations chunk --seed 1 --out RUN  train it (under torchrun: every process)

A row differs from `full` in nothing but what it states: the same data, steps, optimiser and samples a step.
`paper.run` makes the data, trains and evaluates.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from worldvla.config import Config, HeadConfig, to_json
from worldvla.recipes import changed, libero_object_spatial_drawer, libero_object_spatial_long, tabletop
from worldvla.sim.suites import TABLETOP
from worldvla.train.loop import train

Suites = Literal["tabletop", "libero"]
"""The four tabletop suites, or libero_object and libero_spatial together: one model of all."""
HEAD = HeadConfig(num_layers=2, width=128, hidden=512)
POLICY_BATCH = 96
WORLD_BATCH: dict[Suites, int] = {"tabletop": 64, "libero": 24}
"""Samples a step of each kind, in every row that has the kind."""
ROOT: dict[Suites, str] = {"tabletop": "out/tables", "libero": "out/tables_libero"}
STORES: dict[Suites, tuple[str, ...]] = {"tabletop": TABLETOP, "libero": ("libero_object", "libero_spatial")}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row has; the defaults are those of `full`."""

    chunk: int = 5
    history: int = 1
    selective_mask: bool = True
    policy: bool = True
    """Policy samples in the batch."""
    world: bool = True
    """World samples in the batch."""
    action_conditioning: bool = True
    """The world model is given the action."""
    image_weight: float = 0.04
    """Weight of image tokens; the paper's starves the world model of a small policy from nothing."""
    has_head: bool = False
    """A continuous action head beside the discrete one."""
    after: str = ""
    """Row on whose finished model the head alone is trained."""
    steps: int = 2_000
    is_low: bool = False
    """Half the resolution, from demonstrations and an image tokenizer of its own."""


ROWS = {
    # Table 3, in its order. `action` is the OpenVLA-style baseline too: one frame, one action, no world.
    "action": Row(chunk=1, world=False),
    "action_world": Row(chunk=1),
    "chunk_causal": Row(selective_mask=False, world=False),
    "chunk": Row(world=False),
    "full": Row(),
    "full_even": Row(image_weight=1.0),
    # Table 2, the world model alone.
    "world": Row(policy=False),
    "world_long": Row(policy=False, steps=5_000),
    "world_no_action": Row(policy=False, action_conditioning=False),
    # History and resolution.
    "history2": Row(history=2),
    "history4": Row(history=4),
    "action_history2": Row(history=2, chunk=1),
    "action_history4": Row(history=4, chunk=1),
    "low": Row(is_low=True),
    # A continuous head, trained beside the discrete one or alone on the finished model.
    "head": Row(has_head=True, world=False),
    "head_after": Row(has_head=True, world=False, after="chunk"),
    # Chunk length, beside action (1), chunk and chunk_causal (5).
    "chunk10_causal": Row(chunk=10, selective_mask=False, world=False),
    "chunk10": Row(chunk=10, world=False),
    "chunk2_causal": Row(chunk=2, selective_mask=False, world=False),
    "chunk2": Row(chunk=2, world=False),
    "full2": Row(chunk=2),
    "full2_even": Row(chunk=2, image_weight=1.0),
}


def config_of(name: str, suites: Suites = "tabletop", seed: int = 0) -> Config:
    """Return the config of a row: 3.7 M parameters on tabletop, 8.8 M on LIBERO, by Muon; minutes on a GPU,
    half an hour to an hour on two cores."""
    row, root = ROWS[name], ROOT[suites] + ("_low" if ROWS[name].is_low else "")
    policy, world = POLICY_BATCH * row.policy, WORLD_BATCH[suites] * row.world
    layout = {key: getattr(row, key) for key in ("chunk", "history", "selective_mask", "action_conditioning")}
    model = {"num_layers": 4 if suites == "tabletop" else 5, "num_heads": 3, "num_kv_heads": 3}
    return changed(
        tabletop(),
        f"pilot_{name}" if suites == "tabletop" else f"libero_pilot_{name}",
        tokenizer=f"{root}/image_tokenizer",
        layout=layout | ({"grids": ((4, 4), (2, 2))} if row.is_low else {}),
        model=model | ({"head": HEAD} if row.has_head else {}),
        loss={"supervise": "decoded", "image_weight": row.image_weight},
        optim={"method": "muon", "learning_rate": 3e-3},
        data={
            "stores": tuple(f"{root}/store_{suite}" for suite in STORES[suites]),
            "world_fraction": world / (policy + world),
            "sequence_length": {2: 320, 4: 480}.get(row.history, 256),
        },
        train={
            "seed": seed,
            "steps": row.steps,
            "batch_size": policy + world,
            "eval_every": 500,
            "save_every": 1_000,
            "init_from": f"{root}/{row.after}_{seed}" if row.after else "",
            "only_head": bool(row.after),
        },
    )


def libero_object() -> Config:
    """libero_object alone, by AdamW: the first LIBERO model."""
    return changed(
        tabletop(),
        "libero_object",
        tokenizer="out/libero_object/image_tokenizer",
        model={"num_layers": 5},
        loss={"supervise": "decoded"},
        optim={"min_learning_rate": 1e-4},
        data={"stores": ("out/libero_object/store",)},
        train={"steps": 2_200, "batch_size": 64, "eval_every": 550, "save_every": 550},
    )


def front(base: Config) -> Config:
    """Return `base` as the paper sees it: the front view alone (there: two frames), no state."""
    layout = {"views": ("agentview",), "grids": ((8, 8),), "state": False}
    return changed(base, f"{base.name}_front", layout=layout)


def libero_object_front() -> Config:
    base = front(libero_object())
    return changed(base, base.name, train={"steps": 1_100})


def libero_object_spatial() -> Config:
    """One model for both suites on two cores: `full` on LIBERO, shorter, with a continuous head."""
    base, train = config_of("full", "libero"), {"steps": 1_500, "save_every": 500}
    return changed(base, "libero_object_spatial", model={"head": HEAD}, train=train)


def libero_all() -> Config:
    """The four suites, for a GPU, with a tokenizer of all their frames; libero_10 without the microwave."""
    root, names = "out/libero_all", ("object", "spatial", "more", "drawer", "goal", "10")
    return changed(
        libero_object_spatial_long(),
        "libero_all",
        tokenizer=f"{root}/image_tokenizer",
        data={"stores": tuple(f"{root}/store_{name}" for name in names)},
        train={"steps": 4_000, "eval_every": 2_000, "save_every": 2_000},
    )


def libero_all_front() -> Config:
    return front(libero_all())


def libero_goal() -> Config:
    """libero_goal alone on two cores: `full` on LIBERO, shorter, with the tokenizer of `libero_all`."""
    return changed(
        config_of("full", "libero"),
        "libero_goal",
        tokenizer=libero_all().tokenizer,
        data={"stores": ("out/libero_all/store_goal",)},
        train={"steps": 1_500, "save_every": 500},
    )


def libero_10() -> Config:
    """`libero_goal`, trained on with libero_10 alone (nine tasks, eight demonstrations each)."""
    return changed(
        libero_goal(),
        "libero_10",
        optim={"learning_rate": 1e-3, "warmup_steps": 50},
        data={"stores": ("out/libero_all/store_10",)},
        train={"steps": 800, "save_every": 400, "init_from": "out/libero_object_spatial/model_goal"},
    )


def libero_object_spatial_head() -> Config:
    """A continuous head alone, on the shipped LIBERO model and its data."""
    row = config_of("head_after", "libero")
    return changed(
        libero_object_spatial_drawer(),
        "libero_object_spatial_head",
        model=row.model,
        optim=row.optim,
        data={"world_fraction": 0.0},
        train=replace(row.train, init_from="out/libero_object_spatial/model_drawer"),
    )


MODELS = {
    f.__name__: f
    for f in (
        *(libero_object, libero_object_front, libero_object_spatial, libero_object_spatial_long),
        *(libero_object_spatial_drawer, libero_object_spatial_head),
        *(libero_goal, libero_10, libero_all, libero_all_front),
    )
}
"""Models of LIBERO beside the rows."""


SCALES = {"1m": (3, 80, 2, 216), "3m": (4, 160, 4, 432), "10m": (7, 288, 6, 768), "30m": (10, 448, 7, 1200)}
"""Layers, width, heads and hidden width of the scaling law's models, which are named by their parameters."""
DEMONSTRATIONS = {10: "10_", 32: "32_", 100: ""}
"""Demonstrations of a task that they are trained on, each as often -> how names of stores begin."""


def scaled(size: str, episodes: int, seed: int = 0) -> Config:
    """Return `full_even` on tabletop with another size and amount of data; steps grow with the data."""
    layers, width, heads, hidden = SCALES[size]
    model = {
        "num_layers": layers,
        "width": width,
        "num_heads": heads,
        "num_kv_heads": heads,
        "hidden": hidden,
    }
    stores = tuple(f"{ROOT['tabletop']}/store_{DEMONSTRATIONS[episodes]}{suite}" for suite in TABLETOP)
    return changed(
        config_of("full_even", "tabletop", seed),
        f"scaled_{size}_{episodes}",
        model=model,
        data={"stores": stores},
        train={"steps": 20 * episodes, "eval_every": 0, "save_every": 200},
    )


SCALED = {f"scaled_{size}_{n}": partial(scaled, size, n) for n in DEMONSTRATIONS for size in SCALES}


def main(
    name: tyro.conf.Positional[str],
    suites: Suites = "tabletop",
    seed: int = 0,
    out: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    steps: int | None = None,
    method: Literal["muon", "adamw"] | None = None,
    rate: float | None = None,
) -> None:
    """Print the config of a row or model, or train it into `out`, with `steps`, `method`, `rate` if given."""
    others = MODELS | SCALED
    if name not in ROWS | others:
        raise SystemExit(f"no row {name!r}: expected one of {', '.join([*ROWS, *others])}")
    config = config_of(name, suites, seed) if name in ROWS else others[name]()
    optim = replace(config.optim, method=method or config.optim.method)
    if rate:
        optim = replace(optim, learning_rate=rate, warmup_steps=50)
    settings = replace(config.train, seed=seed, device=device, steps=steps or config.train.steps)
    settings = replace(settings, compile=True, num_threads=1 if device == "cpu" else settings.num_threads)
    if out is None:
        print(json.dumps(to_json(config), indent=2))
    elif not train(replace(config, optim=optim, train=settings), out).is_finished:
        raise KeyboardInterrupt


if __name__ == "__main__":
    tyro.cli(main)
