"""Remake the records behind the paper's tables: data, training, evaluation, one name after the other.

    python -m paper.run chunk --seed 0                    a row of paper/ablations.py
    python -m paper.run action full --suites libero       the same on libero_object and libero_spatial
    python -m paper.run chunk full --device cuda --jobs 8 --only train
    python -m paper.run libero_goal libero_10             models of LIBERO beside the rows
    python -m paper.run experts optimizer worlds bench    everything else
    python -m paper.run scaling_small                     the scaling law at 1 M and 3 M; `scaling`: to 30 M

Run it again after a stop: finished steps are skipped, the others go on. Records are folders under `out`, and
`python -m paper.records pack OUT` adds them to paper/records. On two cores the stores take ten minutes
(LIBERO: an hour), a row half an hour (on a GPU a minute), its evaluation three to fifteen minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from paper.ablations import DEMONSTRATIONS, MODELS, ROOT, ROWS, SCALES, STORES, Suites
from worldvla.files import read_json, write_json
from worldvla.machine import cores, provenance

CODES = "--config.patch 8 --config.channels 64 --config.num-codes 16384 --config.embed-dim 5"
CODES += " --config.fsq-levels 8 8 8 8 4"
VIEWS = {"tabletop": "agentview=64x64 wrist=32x32", "libero": "agentview=128x128 wrist=64x64"}
DEMOS = {"tabletop": "--episodes 100 --label 10", "libero": "--episodes 24 --label 5"}
STATES = {"tabletop": "--first 10 --episodes 10 --workers 2", "libero": "--episodes 5 --workers 2"}
"""Initial states that no demonstration starts from."""
EXECUTED_SINGLY = ("chunk", "full", "full2")
"""Rows that are evaluated again with one action of a chunk executed."""


def call(command: Sequence[str], threads: int | None = None) -> None:
    """Run a command; one that fails raises CalledProcessError."""
    settings = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(list(command), check=True, env=os.environ | settings)


def worldvla(*words: str) -> None:
    """Run `worldvla WORDS`, each split at its spaces."""
    call([sys.executable, "-m", "worldvla", *(part for word in words for part in word.split())])


def tool(name: str, *words: str) -> None:
    call([sys.executable, "-m", f"paper.{name}", *(part for word in words for part in word.split())])


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every step needs."""

    suites: Suites
    device: Literal["cpu", "cuda"]
    out: Path

    @property
    def root(self) -> Path:
        return Path(ROOT[self.suites])

    @property
    def results(self) -> Path:
        return self.out / ("tables" if self.suites == "tabletop" else "libero/tables")

    def train(self, name: str, run: Path, model: Path, seed: int = 0, more: str = "") -> None:
        """Train a row or model into `run`, export it, and write how it was made beside the weights."""
        if (model / "train.json").exists():
            return
        row = f"{name} --suites {self.suites} --seed {seed} --out {run} --device {self.device} {more}".split()
        if self.device == "cuda":
            call([sys.executable, "-m", "paper.ablations", *row])
        else:
            spread = [
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "paper.ablations",
            ]
            call([sys.executable, "-m", *spread, *row], threads=1)
        worldvla(f"export {run} --out {model}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = {line["event"]: line for line in lines}
        made = {"config": read_json(run / "config.json"), "validation": last["val"]}
        hours = round(last["train"]["train_seconds"] / 3600, 3)
        write_json(model / "train.json", {**made, "hours": hours, **provenance()})


def collect(suite: str, out: Path, more: str) -> None:
    worldvla(f"collect {suite} --out {out} --workers {cores()}", more)


def make_stores(run: Run, *, is_low: bool = False) -> None:
    """Make demonstrations whose labels hold the longest chunk, an image tokenizer and the tokens."""
    root = run.root.with_name(run.root.name + "_low") if is_low else run.root
    views = "agentview=32x32 wrist=16x16" if is_low else VIEWS[run.suites]
    for suite in STORES[run.suites]:
        collect(suite, root / "demos" / suite, f"{DEMOS[run.suites]} --views {views}")
    train_tokenizer(root, [root / "demos"], 1500, CODES if run.suites == "libero" else "")
    for suite in STORES[run.suites]:
        tokenize(root / "demos" / suite, root, root / f"store_{suite}")


def train_tokenizer(root: Path, demos: Sequence[Path], steps: int, codes: str) -> None:
    if not (root / "image_tokenizer/report/report.json").exists():
        paths = " ".join(map(str, demos))
        worldvla(
            f"train-tokenizer {paths} --out {root}/image_tokenizer --steps {steps}",
            f"--config.encoder cell {codes}",
        )


def tokenize(demos: Path, root: Path, out: Path) -> None:
    worldvla(f"tokenize {demos} --tokenizer {root}/image_tokenizer --out {out}")


def train_row(run: Run, row: str, seed: int) -> None:
    """Train a row, and first the one whose finished model it needs."""
    if ROWS[row].after:
        train_row(run, ROWS[row].after, seed)
    run.train(row, run.root / f"run_{row}_{seed}", run.root / f"{row}_{seed}", seed)


def evaluate_row(run: Run, row: str, seed: int) -> None:
    """Evaluate a trained row; its train.json is written last and says that the row is whole."""
    model, result = run.root / f"{row}_{seed}", run.results / f"{row}_{seed}"
    if (result / "train.json").exists():
        return
    heads = {"head": ("discrete", "continuous"), "head_after": ("continuous",)}.get(row, ("discrete",))
    for head in heads if ROWS[row].policy else ():
        name = f"head_continuous_{seed}" if row == "head" and head == "continuous" else result.name
        evaluate(run, model, run.results / name, f"--head {head}")
    if row in EXECUTED_SINGLY:
        evaluate(run, model, run.results / f"{row}_execute1_{seed}", "--execute 1")
    result.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "train.json", result / "train.json")


def evaluate(run: Run, model: Path, out: Path, more: str) -> None:
    for suite in STORES[run.suites]:
        worldvla(f"eval {model} --suite {suite} {STATES[run.suites]} --videos 0 --out {out}/{suite}", more)


def rows(run: Run, names: Sequence[str], seeds: Sequence[int], jobs: int, only: str) -> None:
    if only != "train":
        make_stores(run)
        if any(ROWS[name].is_low for name in names):
            make_stores(run, is_low=True)
    if only == "stores":
        return
    chosen = [(name, seed) for seed in seeds for name in names]
    # Rows on which others are trained come first.
    first = [pair for pair in chosen if not ROWS[pair[0]].after]
    with ThreadPoolExecutor(jobs if run.device == "cuda" else 1) as pool:
        for part in (first, [pair for pair in chosen if pair not in first]):
            list(pool.map(lambda pair: train_row(run, *pair), part))
    for i, (name, seed) in enumerate(chosen if only != "train" else (), 1):
        print(f"== row {i} of {len(chosen)}: {name}, seed {seed} ==", flush=True)
        evaluate_row(run, name, seed)


@dataclass(frozen=True)
class Model:
    """How a model of LIBERO is evaluated: suites, episodes of a task, record folder, the one before it."""

    suites: tuple[str, ...]
    episodes: int
    record: str
    after: str = ""
    head: Literal["discrete", "continuous"] = "discrete"


BOTH = ("libero_object", "libero_spatial")
ALL = ("libero_goal", "libero_10", *BOTH)
EVALUATED = {
    "libero_object": Model(("libero_object",), 20, ""),
    "libero_object_front": Model(("libero_object",), 10, ""),
    "libero_object_spatial": Model(BOTH, 20, "object_spatial"),
    "libero_object_spatial_long": Model(BOTH, 20, "object_spatial_long"),
    "libero_object_spatial_drawer": Model(BOTH, 20, "object_spatial_drawer", "libero_object_spatial_long"),
    "libero_object_spatial_head": Model(
        BOTH, 20, "object_spatial_head", "libero_object_spatial_drawer", "continuous"
    ),
    "libero_goal": Model(("libero_goal",), 20, "goal"),
    "libero_10": Model(("libero_10",), 5, "10", "libero_goal"),
    "libero_all": Model(ALL, 10, "all"),
    "libero_all_front": Model(ALL, 5, "all_front"),
}


def exported(name: str) -> Path:
    """Return where a model of LIBERO is exported to; configs name it as `init_from`."""
    if name.startswith("libero_object_spatial"):
        return Path("out/libero_object_spatial") / ("model" + name.removeprefix("libero_object_spatial"))
    return Path("out/libero_object_spatial") / ("model" + name.removeprefix("libero"))


def libero_data(name: str) -> None:
    """Make the demonstrations and stores of a model of LIBERO."""
    views, labelled = f"--views {VIEWS['libero']}", "--label 5"
    if name.startswith("libero_object") and "spatial" not in name:
        root = Path("out/libero_object")
        collect("libero_object", root / "demos", f"--episodes 26 {labelled} {views}")
        worldvla(f"train-tokenizer {root}/demos --out {root}/image_tokenizer --steps 1500 {CODES}")
        tokenize(root / "demos", root, root / "store")
        return
    make_stores(Run(suites="libero", device="cpu", out=Path()))
    root, old, every = Path("out/libero_object_spatial"), Path(ROOT["libero"]), Path("out/libero_all")
    collect("libero_spatial", root / "more", f"--episodes 24 --seed 1 {labelled} {views}")
    collect("libero_spatial", root / "drawer", f"--tasks 4 --episodes 48 --seed 3 {labelled} {views}")
    for part in ("more", "drawer"):
        tokenize(root / part, old, root / f"store_{part}")
    if name.startswith("libero_object_spatial"):
        return
    collect("libero_goal", every / "goal", f"--episodes 20 --seed 1 {labelled} {views}")
    nine = "--tasks 0 1 2 3 4 5 6 7 8"  # the model is older than the expert of the microwave, task 9
    collect("libero_10", every / "10", f"{nine} --episodes 8 --seed 1 {labelled} {views}")
    demos = [old / "demos/libero_object", old / "demos/libero_spatial", every / "goal", every / "10"]
    train_tokenizer(every, demos, 3000, CODES)
    for path in [*demos, root / "more", root / "drawer"]:
        tokenize(path, every, every / f"store_{path.name.removeprefix('libero_')}")


def libero_model(run: Run, name: str) -> None:
    """Make the data of a model of LIBERO, train and evaluate it."""
    model, how = exported(name), EVALUATED[name]
    if how.after and not (exported(how.after) / "train.json").exists():
        libero_model(run, how.after)
    libero_data(name)
    run.train(name, model.with_name(model.name.replace("model", "run")), model)
    worldvla("doctor")  # numbers are of a healthy installation alone, and their records say so
    record = run.out / "libero" / how.record
    for suite in how.suites:
        at = record / f"{suite}_{how.head}" if how.record else record / name
        more = f"--episodes {how.episodes} --head {how.head} --execute 3 --videos 0"
        worldvla(f"eval {model} --suite {suite} --out {at} {more}")
        if how.head == "discrete" and not name.endswith("front"):
            at = record / f"{suite}_training_states"
            more = "--first 50 --episodes 5 --execute 3 --videos 0"
            worldvla(f"eval {model} --suite {suite} --out {at} {more}")
    if how.record:
        shutil.copy(model / "train.json", record / "train.json")


def experts(run: Run) -> None:
    """Evaluate the scripted experts of LIBERO on all stored states."""
    worldvla("doctor")
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        out = run.out / "libero" / f"{suite}_expert"
        worldvla(f"eval expert --suite {suite} --episodes 50 --videos 0 --out {out}")


def optimizer(run: Run) -> None:
    """AdamW against Muon: 250 steps of `chunk` each, errors on held-out episodes; seven minutes."""
    rows_of, rates = [], {"adamw": (1.2e-3, 2.4e-3), "muon": (1.2e-3, 3e-3, 6e-3)}
    for method, rate in ((method, rate) for method, of in rates.items() for rate in of):
        at = Path(f"out/optimizer/{method}_{rate}")
        run.train("chunk", at, at / "model", more=f"--steps 250 --method {method} --rate {rate}")
        validation = read_json(at / "model/train.json")["validation"]
        rows_of.append({"method": method, "learning_rate": rate, **validation})
    write_json(run.out / "tables/optimizer.json", {"rows": rows_of, **provenance()})


def worlds(run: Run) -> None:
    """What the rows of the world model imagine of held-out clips, ranks of policies there, chunk errors."""
    root, results = run.root, run.results
    names = ("world", "world_long", "full", "full_even", "world_no_action")
    models = " ".join(str(root / f"{row}_0") for row in names if (root / f"{row}_0").is_dir())
    for suite in STORES["tabletop"]:  # seed 0 was trained on
        collect(suite, root / "held_out" / suite, "--episodes 5 --seed 9")
    collect("tabletop_long", root / "held_out_long", "--episodes 15 --seed 9")  # some last 50 steps
    for demos, clips, frames in (("held_out", 64, 10), ("held_out_long", 16, 50)):
        clip = f"--demos {root}/{demos} --clips {clips} --horizon {frames} --probe {root}/demos"
        tool("world", f"{models} {clip} --out {results}/world{frames}")
    policies = [root / f"{row}_{s}" for s in (0, 1) for row in ("action", "chunk_causal", "chunk", "full")]
    acting = " ".join(map(str, policies))
    worldvla(
        f"rank {acting} --world {root}/world_0 --demos {root}/demos --episodes 2 --first 10 --execute 5 1",
        f"--suites tabletop_spatial tabletop_object tabletop_goal --out {results}/rank",
    )
    for names, seed, record in (
        (("action", "chunk_causal", "chunk"), 0, "chunk_error"),
        (("chunk2_causal", "chunk2", "chunk10_causal", "chunk10"), 1, "chunk_error_lengths"),
    ):
        of = " ".join(str(root / f"{row}_{seed}") for row in names)
        tool("chunk_error", f"{of} --out {results}/{record}.json")


def scaling(run: Run, sizes: Sequence[str] = tuple(SCALES)) -> None:
    """Train models of several sizes on several amounts of data, cheapest first; the losses are of
    demonstrations from another seed."""
    make_stores(run)
    root, results = run.root, run.out / "scaling"
    fewer = {name: f"--episodes {n} --label 10" for n, name in DEMONSTRATIONS.items() if name}
    for name, more in (fewer | {"held_out_": "--episodes 5 --seed 9"}).items():
        for suite in STORES["tabletop"]:
            collect(suite, root / f"{name}demos" / suite, f"{more} --views {VIEWS['tabletop']}")
            tokenize(root / f"{name}demos" / suite, root, root / f"store_{name}{suite}")
    held_out = " ".join(str(root / f"store_held_out_{suite}") for suite in STORES["tabletop"])
    for name in (f"scaled_{size}_{n}" for size in sizes for n in DEMONSTRATIONS):
        model, result = root / name, results / name
        run.train(name, root / f"run_{name}", model)
        if not (result / "row.json").exists():
            evaluate(run, model, result, "")
            tool("scaling", f"measure {model} --out {result}/row.json --stores {held_out}")
    tool("scaling", f"fit {results} --out {results}/scaling.svg")


BENCHES = {
    "decoding": "bench --sizes 3m 25m 92m",
    "decoding_bfloat16": "bench --sizes 25m 92m --dtype bfloat16",
    "decoding_two_cores": "bench --sizes 25m --seconds 3 --threads 2",
    "decoding_two_cores_compiled": "bench --sizes 25m --seconds 3 --threads 2 --compile",
    "decoding_two_cores_92m": "bench --sizes 92m --dtype bfloat16 --seconds 3 --threads 2",
    "drafts_tabletop": "drafts tabletop out/drafts/tabletop",
    "drafts_libero": "drafts libero out/drafts/libero",
    "libero_eval": "bench_libero --task 0 --episodes 10 --workers 2",
    "libero_eval_model": "bench_libero --task 0 --episodes 10 --checkpoint worldvla/assets/libero",
}
BENCHES_CUDA = {
    "cuda": "bench --device cuda --dtype bfloat16 --sizes 7b --seconds 0.3 --batch 4",
    "cuda_compiled": "bench --device cuda --dtype bfloat16 --sizes 7b --seconds 0.3 --batch 4 --compile",
    "cuda_3m": "bench --device cuda --sizes 3m --seconds 0.3",
    "cuda_3m_bfloat16": "bench --device cuda --dtype bfloat16 --sizes 3m --seconds 0.3",
    "memory_7b": "memory --measure",
}
"""Record -> module and options; its last line printed is the record."""


def bench(run: Run) -> None:
    """Measure speed; alone on the machine, or the numbers are of its neighbours."""
    if run.device == "cpu":
        collect("tabletop_object", Path("out/drafts/tabletop"), "--episodes 3 --seed 77 --tasks 0 3")
        more = f"--episodes 3 --seed 77 --tasks 0 5 --views {VIEWS['libero']}"
        collect("libero_spatial", Path("out/drafts/libero"), more)
    for name, words in (BENCHES if run.device == "cpu" else BENCHES_CUDA).items():
        command = [sys.executable, "-m", f"paper.{words.split()[0]}", *words.split()[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        write_json(run.out / f"bench/{name}.json", json.loads(done.stdout.splitlines()[-1]))


PARTS: dict[str, Callable[[Run], None]] = {
    "experts": experts,
    "optimizer": optimizer,
    "worlds": worlds,
    "bench": bench,
    "scaling": scaling,
    "scaling_small": partial(scaling, sizes=("1m", "3m")),
}


def main(
    names: tyro.conf.Positional[tuple[str, ...]],
    suites: Suites = "tabletop",
    seed: tuple[int, ...] = (0,),
    device: Literal["cpu", "cuda"] = "cpu",
    jobs: int = 1,
    only: Literal["all", "stores", "train"] = "all",
    out: Path = Path("out/paper"),
) -> None:
    """Remake the records of rows, LIBERO models and parts.

    Args:
        names: Rows and models of paper/ablations.py; experts, optimizer, worlds, bench, scaling.
        suites: Of rows: the four tabletop suites, or libero_object and libero_spatial.
        seed: Seeds of the rows.
        device: Where training runs. On cpu two processes of one thread share a batch.
        jobs: Rows that train at a time on one GPU.
        only: Stop after the stores (which want cores), or train alone (which wants a GPU).
        out: Folder of the records.
    """
    known = [*ROWS, *MODELS, *PARTS]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown {', '.join(unknown)}: expected {', '.join(known)}")
    run = Run(suites=suites, device=device, out=out)
    if chosen := [name for name in names if name in ROWS]:
        rows(run, chosen, seed, jobs, only)
    for name in names:
        if name in MODELS:
            libero_model(run, name)
        elif name in PARTS:
            PARTS[name](run)


if __name__ == "__main__":
    tyro.cli(main)
