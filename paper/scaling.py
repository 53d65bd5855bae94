"""The scaling law at small size: losses and success of models of several sizes on several amounts of data.

    python -m paper.run scaling_small       stores, trainings, evaluations of 1 M and 3 M; `scaling`: all four
    python -m paper.scaling fit out/paper/scaling --out out/scaling.svg

`measure` writes one model's row.json, with its losses on demonstrations that no model was trained on. `fit`
prints a table with a letter for rows of equal compute, draws a picture, and ends with a JSON line: the
exponents of loss = c N^-a D^-b with 95 % intervals, N parameters of the blocks, D frames. The law has no
floor: its exponents hold between the sizes that were trained.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import tyro
from matplotlib import pyplot as plt
from numpy.typing import ArrayLike
from scipy.stats import t

from worldvla.batch import KIND_PROMPT
from worldvla.config import Config, from_json
from worldvla.data.store import TokenStore
from worldvla.eval.stats import wilson
from worldvla.files import read_json, write_json
from worldvla.train.build import action_scale, build
from worldvla.train.loop import Trainer
from worldvla.train.metrics import validate

NUM_BATCHES = 16
EQUAL = 1.6
"""Rows whose operations differ by no larger factor count as of equal compute."""
LOSSES = {"action_loss": "policy", "image_loss": "world model"}


def measure(model: tyro.conf.Positional[Path], stores: tuple[str, ...], out: Path) -> None:
    """Write the losses (nats a token) of an exported model on all samples of `stores`, drawn at random, its
    size and what its training cost."""
    made = read_json(model / "train.json")
    trained = from_json(Config, made["config"], str(model / "train.json"))
    data = replace(trained.data, stores=stores, val_fraction=0.0)
    settings = replace(trained.train, init_from=str(model), dtype="float32", device="cpu", compile=False)
    pieces = build(replace(trained, data=data, train=settings))
    trainer = Trainer(pieces, out.parent / "nothing")
    torch.set_num_threads(settings.num_threads)
    network, batches = trainer.model.eval(), [pieces.loader.batch(i) for i in range(NUM_BATCHES)]
    every = [batch for step in batches for batch in step]
    values = validate(trainer.forward, network, trainer.loss, every, action_scale(pieces))
    flops = 0
    for batch in every:
        rows, num_targets = len(batch.ids_BT), int((batch.kind_BT != KIND_PROMPT).sum())
        flops += 3 * rows * network.flops(batch.ids_BT.shape[1], num_targets // rows)
    steps = trained.train.steps
    row = {
        "parameters": network.num_parameters(),
        "block_parameters": sum(p.numel() for p in network.layers.parameters()),
        "frames": sum(len(TokenStore.open(Path(path))) for path in trained.data.stores),
        "samples": steps * trained.train.batch_size * trained.train.accumulation,
        "flops": flops / NUM_BATCHES * steps,
        "hours": made["hours"],
    }
    write_json(out, row | {name: values[name] for name in LOSSES if name in values})


def exponents(sizes: ArrayLike, frames: ArrayLike, losses: ArrayLike) -> dict[str, Any]:
    """Return {"size", "data"} -> [exponent, low, high], 95 % intervals of a least-squares fit of logarithms,
    and "residual", the standard deviation of what the law leaves of log(loss)."""
    sizes, frames, losses = (np.asarray(column, dtype=float) for column in (sizes, frames, losses))
    x = np.stack([np.ones(len(sizes)), -np.log(sizes), -np.log(frames)], axis=1)
    y, dof = np.log(losses), len(losses) - 3
    if dof < 1 or np.linalg.matrix_rank(x) < 3:
        raise ValueError(
            f"{len(losses)} runs of {len(np.unique(sizes))} sizes and {len(np.unique(frames))} amounts of "
            "data do not determine a law: expected four runs, two sizes and two amounts at least"
        )
    found, *_ = np.linalg.lstsq(x, y, rcond=None)
    variance = float(((y - x @ found) ** 2).sum() / dof)
    half = t.ppf(0.975, dof) * np.sqrt(variance * np.linalg.inv(x.T @ x).diagonal())
    fitted = {
        name: [float(v) for v in (found[i], found[i] - half[i], found[i] + half[i])]
        for i, name in ((1, "size"), (2, "data"))
    }
    return {**fitted, "residual": variance**0.5}


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Return the rows of a folder of results, cheapest first, with successes and a mark for equal compute."""
    rows = []
    for path in sorted(results.glob("*/row.json")):
        records = [read_json(p) for p in sorted(path.parent.glob("*/record.json"))]
        outcomes = [o for record in records for o in record["outcomes"] if o["status"] != "error"]
        k = sum(outcome["status"] == "success" for outcome in outcomes)
        rows.append({"name": path.parent.name, **read_json(path), "successes": k, "episodes": len(outcomes)})
    if not rows:
        raise ValueError(f"{results} holds no NAME/row.json: run `python -m paper.run scaling_small` first")
    rows.sort(key=lambda row: row["flops"])
    marks, mark, cheapest = iter(string.ascii_lowercase), "", 0.0
    for row in rows:
        if row["flops"] > EQUAL * cheapest:
            mark, cheapest = next(marks), row["flops"]
        row["compute"] = mark
    return rows


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw losses and success by the parameters of the blocks, one line an amount of data; letters mark equal
    compute."""
    mpl.rcParams.update({"svg.hashsalt": "worldvla", "font.size": 8})
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.0))
    for amount in sorted({row["frames"] for row in rows}):
        own = sorted((r for r in rows if r["frames"] == amount), key=lambda row: row["block_parameters"])
        sizes = [row["block_parameters"] for row in own]
        for axes, name in zip(panels, LOSSES, strict=False):
            axes.plot(sizes, [row[name] for row in own], "o-", label=f"{amount:,} frames")
            for row in own:
                place = (row["block_parameters"], row[name])
                axes.annotate(row["compute"], place, (3, 3), textcoords="offset points")
        rated = [row for row in own if row["episodes"]]
        shares = np.array([row["successes"] / row["episodes"] for row in rated])
        spans = np.array([wilson(row["successes"], row["episodes"]) for row in rated]).reshape(-1, 2)
        errors = np.abs(spans.T - shares)
        panels[2].errorbar([row["block_parameters"] for row in rated], shares, errors, fmt="o-", capsize=2)
    for axes, title in zip(panels, [*(f"{name} loss" for name in LOSSES.values()), "success"], strict=True):
        axes.set(xscale="log", xlabel="parameters of the blocks", title=title)
    for axes in panels[:2]:
        axes.set_yscale("log")
    panels[2].set_ylim(0, 1)
    panels[0].legend(frameon=False)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, facecolor="white")
    plt.close(figure)


def fit(results: tyro.conf.Positional[Path], out: Path) -> None:
    """Print the table of rows and the exponents of both losses; draw the picture."""
    rows = read_rows(results)
    print("| model | parameters | frames | compute | TFLOP | policy | world model | success |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = wilson(row["successes"], row["episodes"]) if row["episodes"] else (0.0, 1.0)
        success = f"{row['successes']}/{row['episodes']} ({100 * low:.0f} to {100 * high:.0f} %)"
        print(
            f"| {row['name']} | {row['parameters']:,} | {row['frames']:,} | {row['compute']} "
            f"| {row['flops'] / 1e12:.3g} | {row['action_loss']:.3f} | {row['image_loss']:.3f} | {success} |"
        )
    sizes, frames = ([row[name] for row in rows] for name in ("block_parameters", "frames"))
    laws = {name: exponents(sizes, frames, [row[name] for row in rows]) for name in LOSSES}
    draw(rows, out)
    print(json.dumps({"scaling": laws, "rows": rows}))


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"measure": measure, "fit": fit})
    except ValueError as error:
        raise SystemExit(f"paper.scaling: {error}") from None
