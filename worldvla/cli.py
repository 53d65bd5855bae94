"""The command line: verbs are functions, options are their arguments, the help is their docstring.

Nothing heavy is imported before a verb runs, so that `worldvla --help` answers at once. Exit codes: 0 done,
2 bad input (one line on stderr), 3 a replay that failed, an evaluation with more errors than allowed or a
red line of the doctor, 130 interrupted.
"""

import difflib
import io
import json
import math
import os
import re
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import tyro
from tyro.conf import Positional

from worldvla.config import Config, ImageTokenizerConfig, TokenizerTraining, to_json
from worldvla.files import one_line, only_writer, read_json, write_json
from worldvla.machine import version

if TYPE_CHECKING:
    from worldvla.data.sources.source import Source
    from worldvla.eval.rollout import Protocol

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 3, 130
Demos = Annotated[tuple[Path, ...], tyro.conf.arg(help="HDF5 files, or directories of them.")]
Data = Annotated[
    tuple[Path, ...],
    tyro.conf.arg(
        help="HDF5 files, directories, or one LeRobot (v3.0, v2.1; also ORG/NAME@REVISION on the hub) "
        "or RLDS data set."
    ),
]
CameraNames = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="VIEW=FEATURE of each camera of a LeRobot or RLDS data set, VIEW=FEATURE:ROWSxCOLUMNS to resize "
        "it. Default: a guess, which is printed."
    ),
]
Feature = Annotated[
    str,
    tyro.conf.arg(help="Feature with the vector, or several, comma-separated. Default: the usual name."),
]
Delta = Annotated[
    bool, tyro.conf.arg(help="Actions are targets: subtract the state of the same step, except for grippers.")
]
WorldType = Annotated[
    Literal["float32", "bfloat16", "auto"],
    tyro.conf.arg(
        help="Of the world model, on the CPU. bfloat16 is faster with AMX or AVX-512 for it, and up to fifty "
        "times slower without; auto measures."
    ),
]
HELD_OUT = "Files of other episodes, good and bad: do they end in imagination as they did?"
Checkpoint = Annotated[Path, tyro.conf.arg(help="A checkpoint, or a run directory (its newest checkpoint).")]
Recipe = Annotated[Config, tyro.conf.arg(name="")]
Tasks = Annotated[tuple[int, ...], tyro.conf.arg(help="Indices of the tasks; empty: all.")]
Views = Annotated[tuple[str, ...], tyro.conf.arg(help="Cameras as NAME=ROWSxCOLUMNS in pixels.")]
Workers = Annotated[
    int,
    tyro.conf.arg(help="Processes that simulate; 0: one a core (a LIBERO worker takes 1.7 GiB of memory)."),
]
ClusterAddress = Annotated[
    str,
    tyro.conf.arg(
        help="HOST:PORT of a Ray cluster that this machine is part of, or local: work on all its nodes; "
        "--workers are those of each."
    ),
]
Track = Annotated[
    Literal["", "trackio", "wandb"],
    tyro.conf.arg(help="Also record there: on this machine, unless its own settings say otherwise."),
]
UnnormKey = Annotated[
    str,
    tyro.conf.arg(help="Of a model of several datasets, the name of the one whose ranges are used."),
]
Quantize = Annotated[
    Literal["", "int8", "int4"],
    tyro.conf.arg(help="Hold a checkpoint's large matrices in 8 or 4 bits: less memory, not less time."),
]


def say(text: str) -> None:
    """Write one line to stdout, at once."""
    print(text, flush=True)


def _warn_of_versions(*suites: str) -> None:
    """Write to stderr which versions are not those that numbers on a LIBERO suite hold for."""
    from worldvla.sim.libero import doctor
    from worldvla.sim.suites import suite

    is_libero = any([suite(name).simulator == "libero" for name in suites])
    for check in doctor.check_versions() if is_libero else ():
        if check.status == "warning":
            print(f"warning: {check.name} {check.detail}   fix: {check.fix}", file=sys.stderr)


def _demonstrations(paths: Sequence[Path]) -> list[Path]:
    """Return the HDF5 files of `paths`, after a warning where versions are not those of their suites."""
    from worldvla.data.episode import demonstration_files, read_episodes

    files = demonstration_files(paths)
    _warn_of_versions(*{next(read_episodes(path, images=False)).suite for path in files})
    return files


def _other_format(
    paths: Sequence[Path], camera: Sequence[str] = (), action: str = "", state: str = "", delta: bool = False
) -> "Source | None":
    """Open a data set of another format than LIBERO's HDF5; None: it is HDF5, whose cameras are all read."""
    from worldvla.data.episode import demonstration_files, unused_pictures
    from worldvla.data.sources import is_hdf5
    from worldvla.data.sources.hdf5 import FIXED

    if is_hdf5(paths):
        if camera or action or state or delta:
            raise ValueError(FIXED)
        _say_unused(unused_pictures(demonstration_files(paths)))
        return None
    return _source(paths[0], camera, action, state, delta)


def _source(path: Path, camera: Sequence[str], action: str, state: str, delta: bool) -> "Source":
    """Open a data set of any format and say what is guessed, and which pictures are not used."""
    from worldvla.data.sources import open_source
    from worldvla.data.sources.source import Names

    source = open_source(path, Names(*_cameras(camera), action, state, delta))
    for guess in source.guesses:
        say(f"guess: {guess}")
    _say_unused(source.unused)
    return source


def _say_unused(pictures: Sequence[str]) -> None:
    if pictures:
        say(f"not used: {', '.join(pictures)}")


def _cameras(texts: Sequence[str]) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Parse 'agentview=observation.images.top:96x128': return the feature and the size of each view."""
    features, sizes = {}, {}
    for text in texts:
        view, _, rest = text.partition("=")
        feature, _, size = rest.partition(":")
        if not (view and (feature or size)):
            raise ValueError(
                f"bad camera {text!r}: expected VIEW=FEATURE, such as agentview=observation.images.top, "
                "VIEW=FEATURE:ROWSxCOLUMNS or VIEW=:ROWSxCOLUMNS"
            )
        features |= {view: feature} if feature else {}
        sizes |= _views([f"{view}={size}"]) if size else {}
    return features, sizes


def _views(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Parse 'agentview=64x64' (rows x columns in pixels)."""
    views = {}
    for text in texts:
        name, _, size = text.partition("=")
        rows, _, cols = size.partition("x")
        if not (name and rows.isdigit() and cols.isdigit()):
            raise ValueError(f"bad view {text!r}: expected NAME=ROWSxCOLUMNS, such as agentview=64x64")
        if name in views:
            raise ValueError(f"two sizes of view {name}, the second {size}: give one")
        views[name] = (int(rows), int(cols))
    return views


@cache
def _act(checkpoint: str) -> Callable[[Any], Any]:
    """Return observation -> actions (U, A) of a checkpoint, for a worker with one core to itself."""
    import torch

    from worldvla.infer.model import load
    from worldvla.infer.policy import Policy

    torch.set_num_threads(1)
    model = load(checkpoint)
    if (history := model.config.layout.history) > 1:
        raise ValueError(f"{checkpoint} looks at {history} frames: give one that looks at a single frame")
    return Policy(model).act


def _open_cluster(address: str, unit: Literal["core", "node", "gpu"], per_node: int = 0) -> Any:
    """Open a cluster for a block; without an address the block gets None."""
    from worldvla.cluster import open_cluster

    return open_cluster(address, unit, per_node) if address else nullcontext()


def demo(
    suite: Literal["tabletop", "libero_object", "libero_spatial", "libero_goal", "libero_10"] = "tabletop",
    *,
    out: Path | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Roll the shipped model out, let it imagine, and write one HTML page.

    Args:
        suite: All four tabletop suites, or a real Franka's (needs the libero extra).
        out: Directory of the page. Default: out/demo_SUITE.
        checkpoint: Default: the model that is shipped inside the package.
    """
    from worldvla.demo import demo

    if suite != "tabletop":  # all four
        _warn_of_versions(suite)
    out = out or Path(f"out/demo_{suite}")
    with only_writer(out):
        page = demo(out, suite, checkpoint)
    say(f"demo: open {page.resolve()}")


def collect(
    suite: Positional[str],
    *,
    kind: Literal["demonstrations", "world", "grasps"] = "demonstrations",
    out: Path | None = None,
    episodes: int = 50,
    tasks: Tasks = (),
    views: Views = (),
    seed: int = 0,
    workers: Workers = 0,
    noise: float | None = None,
    label: int = 0,
    policy: Path | None = None,
    execute: int = 3,
    cluster: ClusterAddress = "",
) -> None:
    """Write successful episodes of the scripted expert as HDF5, one file a task; keep what exists.

    Args:
        suite: For example tabletop_object; `worldvla --help` lists all.
        kind: world: gross noise, grasps beside the things, aimless play and, with --policy, its rollouts;
            failures are kept, no step is a policy's target. grasps: world data of hands that
            close on things and beside them, again and again.
        out: Directory of the files. Default: out/demos/SUITE.
        episodes: Episodes of each task: successful ones, of world data of any end.
        views: Cameras as NAME=ROWSxCOLUMNS in pixels. Default: agentview=64x64 wrist=32x32 of tabletop;
            128x128 both of LIBERO, as its own files (the shipped model: agentview=128x128 wrist=64x64).
        noise: Share of perturbed steps, about, from which the expert recovers. Default: 0.15.
        label: U: also store the expert's next U actions at every visited state. With it, every frame is a
            clean policy target.
        policy: A checkpoint that drives, the expert taking over for stretches and at last (DAgger);
            needs --label.
        execute: Actions of each of its chunks that are executed.
    """
    _warn_of_versions(suite)
    if policy is not None and not label and kind == "demonstrations":
        raise ValueError("--policy without --label U teaches nothing: its own actions are no targets")
    if noise is not None and (policy is not None or kind != "demonstrations"):
        raise ValueError("--noise is only for demonstrations of the expert: leave it out")
    out = out or Path("out/demos") / suite
    with only_writer(out):
        from worldvla.data.collect import collect
        from worldvla.sim.suites import suite as find_suite

        sizes = _views(views) or dict(find_suite(suite).rules.demonstrations)
        options: dict[str, Any] = {"kind": kind, "episodes": episodes, "tasks": tasks, "views": sizes}
        options |= {"seed": seed, "workers": workers, "label": label, "execute": execute}
        options |= {} if noise is None else {"noise": noise}
        if policy is not None:
            from worldvla.model.weights import find_checkpoint, weights_digest
            from worldvla.published.hub import locate

            name = weights_digest(find_checkpoint(locate(policy)))
            options |= {"policy": partial(_act, str(policy)), "policy_name": name}
        with _open_cluster(cluster, "core", workers) as pool:
            results = collect(suite, out, cluster=pool, **options)
    for name, counts in results.items():
        if shares := ", ".join(f"{what} {share:.0%}" for what, share in counts.get("shares", {}).items()):
            say(f"{name}: {counts['episodes']} episodes, {counts['steps']} frames: {shares}")
    say(f"demonstrations: {out}   next: worldvla replay {out}")


def replay(paths: Positional[Demos], *, bins: bool = False) -> int:
    """Execute stored actions again and count the episodes that succeed; name files with wrong pictures.

    Args:
        bins: Pass the actions through the policy's 256 bins first: what a perfect policy would lose by them.
    """
    from worldvla.data.rerun import inverted_gripper, rerun, through_bins, wrong_pictures
    from worldvla.progress import progress_bar

    files = _demonstrations(paths)
    transform = through_bins(files) if bins else (lambda actions: actions)
    outcomes: list[bool] = []
    faults: list[str] = []
    with progress_bar() as progress:
        for path in progress.track(files, description="replay"):
            successes = list(rerun(path, transform))
            outcomes += successes
            faults += wrong_pictures(path)
            if not (all(successes) or bins):
                faults += inverted_gripper(path)
    for line in faults:
        say(line)
    k, n = sum(outcomes), len(outcomes)
    say(f"replayed: {k}/{n} episodes succeed again   next: worldvla train-tokenizer {paths[0]}")
    return 0 if not faults and (k == n or bins) else EXIT_FAILED


def regenerate(
    paths: Positional[Demos],
    *,
    out: Path,
    views: Views = ("agentview=256x256", "wrist=256x256"),
    workers: Workers = 0,
) -> None:
    """Execute published demonstrations again: drop no-ops and what fails, render at any size.

    Args:
        paths: HDF5 files in LIBERO's layout, or directories of them.
        out: Directory of the new files, one for each.
    """
    from worldvla.data.rerun import regenerate

    files, sizes = _demonstrations(paths), _views(views)
    counts = regenerate(files, out, sizes, workers=workers)
    for name, told in counts.items():
        kept, lost, steps, no_ops = (told[key] for key in ("num_demos", "lost", "total", "no_ops"))
        say(f"{name}: {kept} kept, {lost} fail now; {steps} steps, {no_ops} no-ops dropped")
    say(f"demonstrations: {out}   next: worldvla tokenize {out} --tokenizer DIR --out DIR")


def inspect(
    path: Positional[Path],
    *,
    camera: CameraNames = (),
    action: Feature = "",
    state: Feature = "",
    delta: Delta = False,
    out: Path | None = None,
) -> None:
    """Print what a data set holds: episodes, cameras, ranges, idle steps, instructions, broken episodes.

    Args:
        path: A LeRobot or RLDS data set, ORG/NAME@REVISION on the hub, an HDF5 file, or a directory of them.
        out: HTML file to write, with the same text and a film strip of each episode.
    """
    from worldvla.data.sources.summary import summary

    source = _source(path, camera, action, state, delta)
    if out is None:
        for line in summary(source):
            say(line)
        return
    from worldvla.eval.page import Strip, strip, write_inspection

    strips: list[Strip] = []
    lines: list[str] = []
    for line in summary(source, lambda name, episode: strips.append(strip(name, episode))):
        say(line)
        lines.append(line)
    say(f"film strips: {write_inspection(out, str(path), lines, strips)}")


def train_tokenizer(
    paths: Positional[Data],
    *,
    out: Path,
    camera: CameraNames = (),
    config: ImageTokenizerConfig,
    skip_bad: bool = False,
    levels: bool = False,
    minutes: float = 12.0,
    steps: int = 0,
    seed: int = 0,
    init_from: Path | None = None,
    learning_rate: float = 2e-3,
) -> None:
    """Train the image tokenizer on the frames of demonstrations; report originals beside reconstructions.

    Args:
        out: Directory of the tokenizer.
        skip_bad: Go on without broken episodes; each is told.
        levels: Codes for a model that predicts them level by level, and a decoder that copies what stands
            still from a frame of the clip, in place of --config; of it --config.patch 8 counts, for frames of
            128 pixels.
        minutes: Budget; steps, if given, replace it.
        steps: With a number of steps the result is a function of the seed, whatever the machine's speed.
        init_from: Directory of an image tokenizer of the same --config to go on from: its codes keep about
            what they mean, so that a model of it can be trained on too (train.init_from).
        learning_rate: At its highest; a fifth of it or less beside --init-from.
    """
    from worldvla.data.episode import demonstration_files
    from worldvla.data.sources import open_source
    from worldvla.train.image_tokenizer import LEVELS, LEVELS_16, train_tokenizer

    training = TokenizerTraining(minutes=minutes, steps=steps, seed=seed, learning_rate=learning_rate)
    if levels:
        shapes = {shape.patch: shape for shape in (LEVELS, LEVELS_16)}
        if config.patch not in shapes:
            raise ValueError(f"--levels with --config.patch {config.patch}: expected one of {[*shapes]}")
        config, training = shapes[config.patch], replace(training, nested=0.3, crop=8 * config.patch)
    source = _other_format(paths, camera)
    sources = [open_source(path) for path in demonstration_files(paths)] if source is None else [source]
    with only_writer(out):
        sources = [source.sound() for source in sources] if skip_bad else sources
        train_tokenizer(sources, config, out, training, init_from)
    say(f"image tokenizer: {out}   next: worldvla tokenize {paths[0]} --tokenizer {out} --out DIR")


def train_reader(
    paths: Positional[Demos],
    *,
    tokenizer: Path,
    out: Path,
    frames: int = 15_000,
    steps: int = 2_000,
    seed: int = 0,
) -> None:
    """Train the reader of frames by which eval-world says where the imagined hand is; minutes on one core.

    Args:
        tokenizer: Directory of the image tokenizer: half of the frames are seen through it.
        out: File of its weights, reader.safetensors beside a checkpoint say; its errors stand beside it.
        frames: Frames to train on and to hold out, about.
    """
    from worldvla.data.episode import demonstration_files
    from worldvla.eval.reader import train_reader
    from worldvla.tokenizers.image import ImageTokenizer

    files, image = demonstration_files(paths), ImageTokenizer.load(tokenizer)
    with only_writer(out):
        errors = train_reader(files, image, out, frames=frames, steps=steps, seed=seed)
    for kind, name in {"real": "real frames", "shown": "through the tokenizer"}.items():
        e = errors[kind]
        say(
            f"{name}: hand {e['hand_median_cm']:.2f} cm (90th percentile {e['hand_p90_cm']:.2f}), opening "
            f"{e['opening_median_mm']:.1f} mm, holding read rightly in {e['holds_right']:.1%}"
        )
    say(f"reader: {out}   next: worldvla eval-world CHECKPOINT --demos DIR --reader {out}")


def tokenize(
    paths: Positional[Data],
    *,
    tokenizer: Path,
    out: Path,
    camera: CameraNames = (),
    action: Feature = "",
    state: Feature = "",
    delta: Delta = False,
    fps: float = 0.0,
    regenerate: tuple[str, ...] = (),
    workers: Workers = 0,
    skip_bad: bool = False,
    augment: int = 0,
) -> None:
    """Encode every frame once into a TokenStore. HDF5 files are checked before anything is encoded.

    Args:
        paths: HDF5 files, directories of them, or one LeRobot (v3.0, v2.1) or RLDS data set, LeRobot's also
            as ORG/NAME@REVISION on the hub. `worldvla replay` says whether pictures are upright; this command
            takes them as they are.
        tokenizer: Directory of the image tokenizer.
        out: Directory of the store.
        fps: Steps per second, if the data set does not say: a robot's client reads it from the checkpoint.
        regenerate: Cameras as NAME=ROWSxCOLUMNS: first execute and render the demonstrations again at these
            sizes, into OUT.demos (see `worldvla regenerate`).
        skip_bad: Go on without demonstrations that are damaged, have no steps or, in HDF5 files, no actions
            of LIBERO's controller; the store's manifest names them.
        augment: Shift, light and colour the pictures by this seed, as other cameras would show them: a store
            for policies to learn from beside the one without; no world model does. 0: leave them as they are.
    """
    with only_writer(out):
        from worldvla.data.episode import demonstration_files
        from worldvla.data.tokenize import tokenize, tokenize_source
        from worldvla.tokenizers.image import ImageTokenizer

        source = _other_format(paths, camera, action, state, delta)
        if regenerate:
            if source is not None:
                raise ValueError(f"--regenerate: {source.kind} holds no simulator states: leave it out")
            demos = out.with_name(out.name + ".demos")
            VERBS["regenerate"](paths, out=demos, views=regenerate, workers=workers)
            paths = (demos,)
        encoder = ImageTokenizer.load(tokenizer)
        if source is None:
            files = demonstration_files(paths)
            store = tokenize(files, encoder, out, skip_bad=skip_bad, fps=fps, augment=augment)
        else:
            store = tokenize_source(source.at(fps), encoder, out, skip_bad=skip_bad, augment=augment)
    if store.manifest["source"].get("fps") is None:
        say("steps per second: unknown; --fps N says it, to the client of a robot too")
    if skipped := store.manifest["source"].get("skipped"):
        say(f"left out: {skipped['count']} with faults, named in {out}/manifest.json")
    kept = (f"{share:.0%} of the codes of {view}" for view, share in store.manifest.get("kept", {}).items())
    say(f"the next frame keeps {', '.join(kept)}")
    say(f"tokens: {out}   next: worldvla train RECIPE --data.stores {out}")


def imagine(
    store: Positional[Path], *, world: Path, out: Path, dtype: WorldType = "float32", seed: int = 0
) -> None:
    """Copy a token store and add what a world model imagines of its episodes, for it to learn from.

    Args:
        store: A token store of the world model's image tokenizer.
        world: The world model: it starts from a real frame every 12 to 30 frames.
        out: Directory of the store that holds both. With `--data.imagined 0.5` half of its world samples read
            what was imagined and learn what happened.
        seed: Of the pieces' lengths.
    """
    import torch

    from worldvla.data.store import TokenStore
    from worldvla.imagine import imagine_store
    from worldvla.infer.model import load
    from worldvla.progress import progress_bar

    with only_writer(out):
        model = load(world, dtype=getattr(torch, _decided(dtype)))
        opened = TokenStore.open(store, model.image.digest())
        with progress_bar(transient=True) as progress:
            bar = progress.add_task("imagine frames", total=len(opened))
            imagine_store(opened, model, out, seed=seed, on_frames=lambda n: progress.advance(bar, n))
    say(
        f"tokens: {out}   next: worldvla train {model.config.name} --data.stores {out} --data.imagined 0.5 "
        f"--train.init-from {world} --tokenizer {model.path}/image_tokenizer --out DIR"
    )


def export_dataset(
    path: Positional[Path],
    *,
    out: Path,
    format: Literal["lerobot"] = "lerobot",  # noqa: ARG001 the one so far
    pictures: Literal["video", "png"] = "video",
    fps: float = 0.0,
    camera: CameraNames = (),
    action: Feature = "",
    state: Feature = "",
    delta: Delta = False,
    skip_bad: bool = False,
) -> None:
    """Write demonstrations, recordings or a data set of another format as a LeRobotDataset v3.0.

    Args:
        path: An HDF5 file, a directory of them, or a LeRobot or RLDS data set.
        out: Directory of the data set.
        format: lerobot: LeRobotDataset v3.0.
        pictures: video: H.264, small and lossy; png: lossless, in the parquet files.
        fps: Steps per second, if the data set does not say.
        skip_bad: Go on without broken episodes; each is told.
    """
    from worldvla.data.export import export_lerobot

    source = _source(path, camera, action, state, delta)
    count = export_lerobot(source.sound() if skip_bad else source, out, pictures, fps)
    if (rate := source.fps or fps) % 1:
        text = f"warning: {rate:g} steps per second: lerobot 0.6.1 reads {out} and trains on it"
        print(f"{text}, but writes videos of whole rates only: do not append or edit there", file=sys.stderr)
    say(f"data set: {out}, {count} episodes   next: worldvla inspect {out}")


def train(config: Recipe, *, out: Path | None = None, overfit: bool = False, track: Track = "") -> None:
    """Train RECIPE; every field of it is an option. The same command goes on after a stop.

    Args:
        out: Run directory. Default: out/train/NAME; of --overfit out/train/NAME_overfit.
        overfit: As --train.overfit: see batch 0 at every step. A sound model brings action_accuracy to 1.
    """
    if overfit or config.train.overfit:
        config = replace(config, train=replace(config.train, overfit=True))
        out = out or Path("out/train") / f"{config.name}_overfit"
    out, is_first = out or Path("out/train") / config.name, os.environ.get("RANK", "0") == "0"
    with only_writer(out) if is_first else nullcontext():  # before the seconds that it takes to load torch
        from worldvla.train.loop import train

        if (name := config.train.init_from) and not (Path(name) / "manifest.json").is_file():
            config = replace(config, train=replace(config.train, init_from=_checkpoint_of(name)))
        outcome = train(config, out, track)
    if not outcome.is_finished:
        raise KeyboardInterrupt
    if is_first:  # torchrun's other processes stay silent
        say(f"checkpoint: {outcome.checkpoint}   next: worldvla eval {outcome.checkpoint} --suite SUITE")


def _checkpoint_of(name: str) -> str:
    """Return the folder of a checkpoint to start from: a shipped one, one on the hub, the newest of a run."""
    from worldvla.model.weights import find_checkpoint
    from worldvla.published.hub import locate

    try:
        return str(find_checkpoint(locate(name)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"train.init_from: {error}") from None


def plan(config: Recipe, *, gpus: int = 1, memory: str = "80GB") -> int:
    """Print which settings of RECIPE, its own train.shard among them, fit on the GPUs, and how many samples
    at a time; needs no files unless RECIPE takes its cameras from its stores.

    Args:
        gpus: Processes that train together, one per GPU.
        memory: Memory of one GPU, such as 80GB or 24GiB.
    """
    from rich.console import Console
    from rich.table import Table

    from worldvla.train.plan import parse_bytes, plan

    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: expected at least 1")
    config = _fitted(config)
    if not config.layout.views:
        raise ValueError(
            f"{config.name} takes its cameras from its stores, which are not there: tokenize the data first, "
            "or say --layout.views agentview --layout.grids ROWS COLUMNS, in codes"
        )
    rows = plan(config, gpus, parse_bytes(memory))
    parts = ("weights", "gradients", "moments", "copies", "gathered", "loss", "fixed", "row")
    table = Table("GB (10^9 bytes) per GPU", *parts, "rows at a time")
    for found in rows:
        fits = str(found["max_rows"]) if found["max_rows"] else "does not fit"
        table.add_row(found["options"], *(f"{found[part] / 1e9:.3g}" for part in parts), fits)
    Console(width=140).print(table)
    wanted = -(-config.train.batch_size // gpus)
    most = max(rows, key=lambda found: found["max_rows"])
    best = next((found for found in rows if found["max_rows"] >= wanted), most)
    if best["max_rows"]:
        room = f"{best['max_rows']} rows a GPU fit, train.batch_size asks for {wanted}"
        command = f"torchrun --nproc-per-node {gpus} -m worldvla" if gpus > 1 else "worldvla"
        say(f"next: {command} train {config.name} {best['options']}   {room}")
    else:
        say(f"nothing fits: use more GPUs, more memory than {memory}, or a shorter data.sequence_length")
    say(json.dumps({"plan": rows, "recipe": config.name, "gpus": gpus, "memory": memory}))
    return 0 if best["max_rows"] else EXIT_FAILED


def show_config(config: Recipe) -> None:
    """Print RECIPE, with overrides, as JSON."""
    say(json.dumps(to_json(_fitted(config)), indent=2))


def _fitted(config: Config) -> Config:
    """Return the config with the cameras of its stores, if it leaves them open and the stores are there."""
    if config.layout.views or not all((Path(s) / "manifest.json").is_file() for s in config.data.stores):
        return config
    from worldvla.train.build import fit

    return fit(config)


@dataclass(frozen=True, kw_only=True)
class Planning:
    """A checkpoint plans in imagination."""

    plan: int = 0
    """Draw so many chunks, imagine each in --world, and execute the one whose end --judge finds nearest to
    success."""
    world: str = ""
    """Checkpoint of the world model to plan in."""
    judge: Path | None = None
    """judge.safetensors that `worldvla rank` or `improve` left, of the same world model."""
    temperature: float | None = None
    """Of the chunks that are drawn, all but the likeliest. Default: 1."""
    spread: float | None = None
    """Lead each drawn chunk elsewhere: one random vector of this size, in the units of actions, is added to
    the first three dims of all its actions. Default: 0."""
    ahead: int | None = None
    """Chunks to imagine: the drawn one, and then what the policy would do next. Default: 1."""
    dtype: WorldType | None = None

    def options(self) -> dict[str, Any]:
        """Return those of `open_actor`, which refuses what an actor would ignore."""
        return vars(self) | {"plan": self.plan or None, "dtype": self.dtype and _decided(self.dtype)}


def evaluate(
    checkpoint: Positional[str],
    *,
    suite: str,
    out: Path | None = None,
    episodes: int = 10,
    first: int = 0,
    tasks: Tasks = (),
    execute: int | None = None,
    demos: Path | None = None,
    scene_prefix: bool = False,
    head: Literal["", "discrete", "continuous"] = "",
    planning: Annotated[Planning, tyro.conf.arg(name="")],
    videos: int = 1,
    seed: int = 0,
    workers: Workers = 0,
    device: str = "",
    quantize: Quantize = "",
    unnorm_key: UnnormKey = "",
    save_dataset: Path | None = None,
    shard: str = "",
    cluster: ClusterAddress = "",
    allow_errors: int = 0,
    track: Track = "",
) -> int:
    """Roll a checkpoint out on a suite: success with intervals, videos, one HTML page, a JSON record.

    Args:
        checkpoint: A checkpoint, a run directory (its newest checkpoint), random, expert, open-loop (with
            --demos), or the websocket://HOST:PORT of any policy server that speaks openpi's protocol.
        suite: For example tabletop_object; `worldvla --help` lists all. tabletop, libero: all four, each in a
            directory of its own, with one record and one page for all.
        out: Directory of the record, videos and page. Default: out/eval/NAME/SUITE.
        episodes: Episodes of each task, from its fixed initial states.
        first: Initial state of the first episode. From 50 on: states that demonstrations start from, to
            tell a policy that has learnt too little from one that does not generalise.
        execute: Replan interval: actions of each chunk that are executed. Default: all; of a server: 5.
        demos: Directory of demonstrations whose mean trajectory is executed open-loop.
        scene_prefix: Begin instructions of libero_10 by their scene, as released checkpoints were trained
            ("KITCHEN SCENE3 turn on ..."); published evaluations leave it out.
        head: Head of a checkpoint that acts. Default: discrete.
        videos: Filmed episodes of each task.
        device: Where a checkpoint computes. Default: cpu.
        save_dataset: Directory for the episodes as HDF5 demonstrations, successes and failures, with images
            of every step, which are then all rendered. States 0 to 49 are for evaluation: add --first 50 to
            train on them.
        shard: I/N: the I-th (from 0) of N equal parts of the episodes; `worldvla merge` joins their records.
        allow_errors: More errors than this make the exit code 3.
    """
    out = out or _results(checkpoint, suite)
    with only_writer(out), _open_cluster(cluster, "gpu" if device.startswith("cuda") else "node") as pool:
        from worldvla.eval.rollout import Protocol, open_actor
        from worldvla.track import find_tracker, track_evaluations

        find_tracker(track)
        how = {"execute": execute, "head": head, "device": device, "quantize": quantize, "demos": demos}
        act = partial(open_actor, checkpoint, seed=seed, unnorm_key=unnorm_key, **how, **planning.options())
        whole = Protocol(suite, tasks, episodes, first, seed, videos, scene_prefix, _shard(shard))
        records, folders = _evaluate_members(whole, act, out, workers, pool, save_dataset)
        track_evaluations(track, out, records, folders)
        return _report(suite, records, out, allow_errors)


def _results(checkpoint: str, suite: str) -> Path:
    """Return the default folder of results; a wrong suite, which may lead out of it, raises ValueError."""
    from worldvla.sim.suites import members

    members(suite)
    return Path("out/eval") / _short(Path(checkpoint)) / suite


def _evaluate_members(
    whole: "Protocol", act: Callable[..., Any], out: Path, workers: int, pool: Any, save: Path | None
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Evaluate the suites that `whole` is of, each in a folder of its own where they are several; return
    their records and folders."""
    from worldvla.eval.rollout import evaluate
    from worldvla.sim.suites import members

    records, folders = [], {name: name if name != whole.suite else "." for name in members(whole.suite)}
    _warn_of_versions(*folders)
    for name, folder in folders.items():
        there = partial(act, name)
        actor, protocol = there(device="") if pool else there(), replace(whole, suite=name)
        how = {"cluster": pool, "open_there": there, "save": save and save / folder}
        records += [evaluate(actor, protocol, out / folder, workers, **how)]
    if save:
        say(f"data set: {save}   next: worldvla export-dataset {save} --out DIR")
    return records, [out / folder for folder in folders.values()]


def _shard(text: str) -> tuple[int, int]:
    """Return I and N of I/N; of nothing (0, 1)."""
    index, _, number = (text or "0/1").partition("/")
    if not (index.isdecimal() and number.isdecimal()):
        raise ValueError(f"bad shard {text!r}: expected I/N, such as 0/4")
    return int(index), int(number)


def _report(suite: str, records: Sequence[dict[str, Any]], out: Path, allow_errors: int) -> int:
    """Write the page of evaluations, and the record of several; say how they went; return the exit code."""
    from worldvla.eval.page import write_page
    from worldvla.eval.record import of_suites

    several = [record["suite"] for record in records] != [suite]
    folders = [out / record["suite"] if several else out for record in records]
    page = write_page(
        out / "index.html", f"{records[0]['checkpoint']['name']} on {suite}", evaluations=folders
    )
    whole = of_suites(suite, records) if several else records[0]
    if several:
        write_json(out / "record.json", whole)
    for record in [*records, whole] if several else records:
        low, high = record["wilson_95"]
        counts = f"{record['successes']}/{record['episodes']} (95% {low:.2f} to {high:.2f})"
        say(f"{record['suite']}: {counts}, grasped {record['grasped']}, errors {record['errors']}")
    for record in records:
        if (decoding := record["protocol"].get("decoding", "")).startswith("sequential"):
            say(f"  decoded {decoding}")
        reasons = Counter(o["reason"] for o in record["outcomes"] if o["status"] == "error")
        for reason, times in reasons.most_common(3):
            say(f"  {times} x {reason}")
    say(f"evaluation: {page}")
    return 0 if whole["errors"] <= allow_errors else EXIT_FAILED


def merge(shards: Positional[tuple[Path, ...]], *, out: Path, allow_errors: int = 0) -> int:
    """Join the results of `worldvla eval --shard I/N` into those of one evaluation.

    Args:
        shards: The result directories of all N shards.
        out: Directory of the record, videos and page.
        allow_errors: More errors than this make the exit code 3.
    """
    from worldvla.eval.record import merge, suites_of

    named = {path: suites_of(path) for path in shards}
    suite, parts = next(iter(named.values()))
    if others := [str(path) for path in named if named[path] != (suite, parts)]:
        raise ValueError(f"{others[0]} has other suites than {shards[0]}: expected shards of one evaluation")
    with only_writer(out):
        records = [merge([path / part for path in shards], out / part) for part in parts]
        return _report(suite, records, out, allow_errors)


def _decided(dtype: str) -> str:
    """Return the number type that is meant, "auto" measured on this machine."""
    from worldvla.machine import faster_dtype

    if dtype != "auto":
        return dtype
    dtype, remark = faster_dtype("cpu")
    print(f"--dtype auto is {dtype}: {remark}", file=sys.stderr)
    return dtype


def _short(checkpoint: Path) -> str:
    """Return a directory name for results of `checkpoint`: out/train/NAME/ckpt/step_N becomes NAME_step_N."""
    left_out = ("out", "train", "ckpt", "/", "..", "websocket:", "ws:", "wss:")
    return "_".join(part for part in checkpoint.parts[-3:] if part not in left_out).replace(":", "_")


def eval_world(
    checkpoint: Positional[Checkpoint],
    *,
    demos: Data,
    out: Path = Path("out/eval_world"),
    clips: int = 8,
    horizons: tuple[int, ...] = (10,),
    shorter: bool = False,
    seed: int = 0,
    temperature: float = 0.0,
    reader: Path | None = None,
    device: str = "cpu",
) -> None:
    """Let a checkpoint imagine held-out clips: PSNR and the hand's error by step, beside copy and ceiling.

    Args:
        demos: What it was not trained on: HDF5 files, directories of them, or one LeRobot or RLDS data set
            with the features of the training data.
        out: Directory of the record, videos and page.
        horizons: Steps of a clip; several: one set of clips each. The paper: 10 50.
        shorter: One clip an episode, from its first frame, of at most that many steps.
        temperature: 0 takes the likeliest codes; more draws them.
        reader: What reads the hand off frames. Default: reader.safetensors beside the checkpoint, if there.
    """
    from worldvla.eval.page import write_page
    from worldvla.eval.world import evaluate_world

    options: dict[str, Any] = {"clips": clips, "horizons": horizons, "shorter": shorter, "seed": seed}
    options |= {"temperature": temperature, "reader": reader, "device": device}
    with only_writer(out):
        record = evaluate_world(checkpoint, demos, out, **options)
        page = write_page(out / "index.html", f"What {record['checkpoint']['name']} imagines", worlds=[out])
    for guess in record["protocol"].get("guesses", ()):
        say(f"guess: {guess}")
    for section in record["horizons"]:
        for view, kinds in section["views"].items():
            last = ", ".join(f"{kind} {scores['psnr'][-1]:.1f}" for kind, scores in kinds.items())
            say(f"{view}, PSNR at step {section['steps'][-1]}: {last} dB")
        if "hand" in section:
            last = ", ".join(
                f"{kind} {error['median_cm'][-1]:.1f}" for kind, error in section["hand"].items()
            )
            say(f"the hand's error at step {section['steps'][-1]}, median: {last} cm")
    say(f"imagined videos: {page}")


def rank(
    checkpoints: Positional[tuple[Path, ...]],
    *,
    world: Path,
    demos: Demos,
    suites: tuple[str, ...],
    out: Path = Path("out/rank"),
    episodes: int = 2,
    first: int = 0,
    execute: tuple[int, ...] = (),
    judged: int = 30,
    held_out: Annotated[tuple[Path, ...], tyro.conf.arg(help=HELD_OUT)] = (),
    dtype: WorldType = "float32",
    seed: int = 0,
) -> None:
    """Do policies rank in imagination as they do in the simulator? Each acts in both from the same frames.

    Args:
        checkpoints: The policies: checkpoints, or run directories (their newest one).
        world: The world model that they act in.
        demos: HDF5 files, or directories of them, of every task: a judge of success is trained on them.
        out: Directory of the record and film.
        episodes: Initial states of each task.
        first: The first of them.
        execute: Replan intervals; several: each a policy of its own. Default: the whole chunk.
        judged: Episodes of each file that the judge learns from.
    """
    from worldvla.data.episode import demonstration_files
    from worldvla.eval.page import write_ranking
    from worldvla.rank import doubts, rank_policies

    files, counts = demonstration_files(demos), {"episodes": episodes, "first": first}
    with only_writer(out):
        record = rank_policies(
            checkpoints,
            world,
            files,
            suites,
            out,
            **counts,
            execute=execute,
            judged=judged,
            held_out=demonstration_files(held_out) if held_out else (),
            dtype=_decided(dtype),
            seed=seed,
        )
    for row in record["policies"]:
        real, there, imagined = (f"{sum(o)}/{len(o)}" for o in row["outcomes"])
        words = f"simulator {real}, judge there {there}, imagined {imagined}"
        say(f"{row['name']} seed {row['seed']} execute {row['execute']}: {words}")
    if again := record.get("replays"):
        right, dreamt = (again[name]["agree"] for name in ("judge_on_real_frames", "imagined"))
        of = f"of {again['episodes']} held-out episodes"
        say(f"{of} the judge is right about {right} on real frames, {dreamt} end so in imagination")
    for n, group in record["by_execute"].items():
        spearman = group["imagined"]["spearman"]
        say(f"executing {n} actions: rank correlation {spearman['value']} (95 % {spearman['interval_95']})")
    for doubt in doubts(record):
        print(f"warning: {doubt}", file=sys.stderr)
    spearman = record["imagined"]["spearman"]
    say(f"rank correlation {spearman['value']} (95 % {spearman['interval_95']})   {write_ranking(out)}")


def improve(
    checkpoint: Positional[Checkpoint],
    *,
    world: Path,
    demos: Demos,
    suites: tuple[str, ...],
    judge: Path | None = None,
    stores: tuple[Path, ...] = (),
    out: Path = Path("out/improve"),
    episodes: int = 10,
    rounds: int = 1,
    execute: int = 0,
    temperature: float = 1.0,
    steps: int = 300,
    kind: Literal["imagination", "simulator"] = "imagination",
    keep_all: bool = False,
    dtype: WorldType = "float32",
    seed: int = 0,
) -> None:
    """Train a policy on what succeeds when it acts in a world model; the simulator only counts what holds.

    Args:
        world: The world model that it acts in.
        demos: HDF5 files, or directories of them, of every task: their first frames start the episodes.
        judge: judge.safetensors in the folder of a `rank`. Default: one is trained on --demos.
        stores: Token stores of real demonstrations, learnt beside what is imagined.
        out: Directory of the record and, for each round, of demonstrations, their store and the training run.
        episodes: Episodes of each task a round.
        rounds: Times that the policy acts and learns.
        execute: Replan interval. Default: the whole chunk.
        temperature: Of the actions; 0 takes the likeliest.
        steps: Training steps a round.
        kind: Where it acts. simulator: the upper bound of what imagination can give.
        keep_all: Learn from failures too: the control of what the judge gives.
    """
    from worldvla.data.episode import demonstration_files
    from worldvla.eval.page import write_improvement
    from worldvla.improve import improve

    options: dict[str, Any] = {"episodes": episodes, "rounds": rounds, "execute": execute, "steps": steps}
    options |= {
        "temperature": temperature,
        "kind": kind,
        "keep_all": keep_all,
        "dtype": _decided(dtype),
        "seed": seed,
        "judge": judge,
        "stores": stores,
    }
    with only_writer(out):
        record = improve(checkpoint, world, demonstration_files(demos), suites, out, **options)
    for number, row in enumerate(record["rounds"]):
        done, total = row["successes"], row["episodes"]
        checked = row.get("in_simulator")
        more = "" if checked is None else f"; in {checked} the same actions succeed in the simulator"
        say(f"round {number}: {done} of {total} succeeded in {kind}{more}; {row['kept']} kept")
    say(f"new policy: {record['checkpoint']}   page: {write_improvement(out)}")
    say(f"next: worldvla eval {record['checkpoint']} --suite {suites[0]}, then worldvla compare")


def export(checkpoint: Positional[Checkpoint], *, out: Path, unnorm_key: UnnormKey = "") -> None:
    """Copy a checkpoint without its training state, weights in bfloat16: what is shipped and served.

    Args:
        unnorm_key: Of a model of several datasets, keep the ranges of this one alone.
    """
    from worldvla.infer.model import export

    with only_writer(out):
        model = export(checkpoint, out, unnorm_key=unnorm_key)
    say(f"model: {model}   next: worldvla eval {out} --suite SUITE")


def push(
    checkpoint: Positional[str],
    name: Positional[str],
    *,
    results: tuple[Path, ...] = (),
    license: str = "",
    dry_run: Path | None = None,
    private: bool = False,
) -> None:
    """Export a checkpoint and upload it to the Hugging Face hub, with a model card and without local paths.

    Args:
        checkpoint: A checkpoint, or a run directory (its newest checkpoint).
        name: ORG/NAME of the repository; `worldvla.load("ORG/NAME")` reads it.
        results: Directories of `worldvla eval` of this checkpoint, for the table of the card.
        license: Of the weights, as the hub calls it: apache-2.0, mit, cc-by-nc-4.0. The default is printed:
            apache-2.0; other, if the weights go back to a release.
        dry_run: Write the folder here instead of uploading it.
    """
    import tempfile

    from huggingface_hub.utils import validate_repo_id

    from worldvla.eval.record import read_record, suites_of
    from worldvla.infer.model import export
    from worldvla.published import hub

    validate_repo_id(name)
    if "/" not in name:
        raise ValueError(f"{name} names no owner: expected ORG/NAME")
    records = [read_record(path / part) for path in results for part in suites_of(path)[1]]
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(checkpoint, dry_run or Path(scratch) / "model", name, records, license=license)
        line = next(line for line in (folder / "README.md").read_text().splitlines() if "license:" in line)
        say(line if license else f"{line} (the default; --license names another)")
        if dry_run is not None:
            say(f"nothing is uploaded: look at {folder / 'README.md'}, then leave out --dry-run")
            return
        address = hub.push(folder, name, private)
    say(f'model: {address}   next: worldvla.load("{name}")')


def convert(
    source: Positional[str],
    *,
    out: Path,
    release: str = "",
    suite: str = "",
    tokenizer: str = "",
    without_action_head: bool = False,
    back: bool = False,
    like: Path | None = None,
) -> None:
    """Make one of our checkpoints of a published one, or the published layout of ours; see docs/MODELS.md.

    Args:
        source: A folder, or hf://ORG/NAME/FOLDER on the hub; with --back one of our checkpoints.
        out: Directory of the result.
        release: chameleon, worldvla_256, worldvla_512, rynnvla_256, rynnvla_world_512 or
            rynnvla_action_world_512.
        suite: Of a policy: the LIBERO suite it was trained on, which decides the length of its chunks.
        tokenizer: Folder, or hf://ORG/NAME/FOLDER, of text_tokenizer.json and vqgan.ckpt. Default: SOURCE.
        without_action_head: Leave out the continuous head of a RynnVLA-002 policy.
        back: Write the published layout of SOURCE.
        like: With --back, of a checkpoint that was trained on: the converted one that it came from.
    """
    from worldvla.published.convert import convert, convert_back
    from worldvla.recipes import published

    if back:
        convert_back(Path(source), out, like)
        say(f"published layout: {out}")
        return
    for remark in convert(
        source, out, release, published("libero_256"), suite, tokenizer, without_action_head
    ):
        say(remark)
    say(f"model: {out}   next: worldvla eval {out} --suite {suite or 'SUITE'}")


def serve(
    checkpoint: Positional[Checkpoint],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    certificate: Path | None = None,
    key_file: Path | None = None,
    max_batch: int = 16,
    max_connections: int = 1000,
    resize: bool = False,
    head: Literal["discrete", "continuous"] = "discrete",
    device: str = "cpu",
    quantize: Quantize = "",
    unnorm_key: UnnormKey = "",
) -> None:
    """Serve a checkpoint to any openpi client; clients must send the key WORLDVLA_API_KEY, where that is set.

    Args:
        host: Address to listen at; 0.0.0.0: every network, which needs WORLDVLA_API_KEY.
        port: 0: any free port.
        insecure: Let other machines in without a key.
        certificate: PEM file of a TLS certificate: clients then say wss://.
        key_file: PEM file of the certificate's private key.
        max_batch: Requests of different clients that are answered together.
        max_connections: Clients at a time; further ones are told to come again later.
        resize: Resize pictures of another size, with black borders, instead of refusing them.
        head: Head that acts: the continuous one only of a model that has it.
    """
    from worldvla.serve.server import Limits, serve_checkpoint

    serve_checkpoint(
        checkpoint,
        head=head,
        resize=resize,
        device=device,
        quantize=quantize,
        unnorm_key=unnorm_key,
        host=host,
        port=port,
        insecure=insecure,
        certificate=certificate,
        key_file=key_file,
        limits=Limits(max_batch=max_batch, max_connections=max_connections),
        api_key=os.environ.get("WORLDVLA_API_KEY", ""),
        on_start=lambda at: say(f"serving at {at}   next: worldvla eval websocket://{at} --suite SUITE"),
    )


def play(
    checkpoint: Positional[str] = "tabletop",
    *,
    task: str = "",
    init: int = 0,
    temperature: float = 0.0,
    host: str = "127.0.0.1",
    port: int = 8010,
    threads: int = 1,
    device: str = "cpu",
    out: Path = Path("out/play"),
    save_dataset: Path | None = None,
    bench: int = 0,
) -> None:
    """Drive the hand through a world model's imagination in the browser, beside the simulator.

    Args:
        checkpoint: A shipped model (tabletop, libero, libero_four), or a checkpoint or run directory.
        task: SUITE:INDEX to begin with, such as tabletop_goal:3; the page can change it.
        init: Index of the initial state to begin with.
        temperature: Sampling temperature of the imagined codes; 0: the likeliest ones.
        host: Address to listen on; any but this machine's own needs WORLDVLA_API_KEY and ?key=KEY.
        port: Port to listen on; 0: any free port.
        threads: CPU threads for inference; a small model is fastest on one.
        out: Directory of recordings.
        save_dataset: Directory for every episode that is played, as HDF5 demonstrations of the simulator's
            frames, without pressing C.
        bench: Measure this many frames driven by a person and by the policy, print a line of JSON and stop.
    """
    from worldvla import load
    from worldvla.serve.play import session

    suite, index = _task(task)
    _check_play(port, threads, temperature, bench, init)
    playable = session.open_playable(load(checkpoint, device), suite=suite, temperature=temperature)
    suite = suite or ("libero_object" if playable.simulator == "libero" else "tabletop_object")
    playable.task(suite, index)
    if bench:
        import torch

        torch.set_num_threads(threads)
        say(json.dumps({**session.bench(playable, suite, index, init, bench), "threads": threads}))
        return
    import asyncio

    from worldvla.serve.play.server import Start, serve

    asyncio.run(
        serve(
            playable,
            Start(suite, index, init),
            host=host,
            port=port,
            api_key=os.environ.get("WORLDVLA_API_KEY", ""),
            threads=threads,
            out=out,
            save_dataset=save_dataset,
            on_start=lambda at: say(f"play at {at}   recordings: {save_dataset or out}"),
        )
    )


def _check_play(port: int, threads: int, temperature: float, bench: int, init: int) -> None:
    from worldvla.sim.protocol import NUM_INITS

    if (
        bench < 0
        or not 0 <= init < NUM_INITS
        or not (0 <= port < 2**16 and 1 <= threads <= 1024 and 0 <= temperature < math.inf)
    ):
        raise ValueError(
            "expected --port 0 to 65535, --threads 1 to 1024, --temperature and --bench from 0 on, --init 0 "
            f"to {NUM_INITS - 1}, got {port}, {threads}, {temperature}, {bench} and {init}"
        )


def _task(text: str) -> tuple[str, int]:
    """Return suite and index of SUITE:INDEX; of nothing ("", 0)."""
    suite, _, index = text.partition(":")
    if text and not index.isdecimal():
        raise ValueError(f"bad task {text!r}: expected SUITE:INDEX, such as tabletop_goal:3")
    return suite, int(index or 0)


def compare(a: Positional[Path], b: Positional[Path], *, force: bool = False) -> None:
    """Compare two evaluations episode by episode; the last line of the output is JSON.

    Args:
        a: A record.json, or the directory of an evaluation.
        b: The other one.
        force: Compare though suite, seed or protocol differ.
    """
    from rich.console import Console

    from worldvla.eval.compare import compare, table
    from worldvla.eval.record import read_record

    comparison = compare(read_record(a), read_record(b), force)
    Console().print(table(comparison))
    low, high = comparison["interval_95"]
    left_out = f"{comparison['left_out_errors']} left out for errors, {sum(comparison['unpaired'])} unpaired"
    say(
        f"{comparison['pairs']} pairs ({left_out}); A - B {comparison['difference']:+.3f} "
        f"(95 % {low:+.3f} to {high:+.3f}), McNemar exact p = {comparison['p']:.4g}"
    )
    say(json.dumps(comparison))


def doctor(*, quick: bool = False, json: Path | None = None) -> int:
    """Check versions, OpenGL and how the simulators behave, and say what to do; a red line: exit code 3.

    Args:
        quick: Versions, machine and OpenGL alone: seconds.
        json: File for the result. Default: one in the user's cache; with --quick: none.
    """
    from rich.console import Console
    from rich.text import Text

    from worldvla.sim.libero import doctor

    colours = {"ok": "green", "warning": "yellow", "bad": "red", "skipped": "dim"}
    console = Console(highlight=False, soft_wrap=True)
    checks: list[doctor.Check] = []
    with console.status("versions") as status:
        for check in doctor.examine(quick, status.update):
            checks.append(check)
            line = Text.assemble(
                (f"{check.status:<8}", colours[check.status]), f"{check.name:<28}{check.detail}"
            )
            console.print(line.append(f"   fix: {check.fix}" if check.fix else "", "bold"))
    report = doctor.report(checks, quick)
    path = json or (None if quick else doctor.last_run())
    if path is not None:
        write_json(path, report)
        console.print(f"written: {path}")
    return 0 if report["ok"] else EXIT_FAILED


def show_sample(
    config: Positional[str],
    *,
    mode: Literal["policy", "world"] = "policy",
    frame: int = 0,
    fake: bool = False,
    width: int | None = None,
) -> None:
    """Print one training sample in colour: look at one before every run.

    Args:
        config: A recipe, or a directory with config.json (a run, a checkpoint).
        frame: Frame of the stores at which the sample starts; with --fake the seed.
        fake: Random codes, states and actions in the recipe's layout: needs no files.
        width: Columns of the output. Default: the terminal's.
    """
    from rich.console import Console

    from worldvla.config import from_json
    from worldvla.data import show
    from worldvla.recipes import recipe
    from worldvla.train.build import build

    path = Path(config) / "config.json"
    complete = from_json(Config, read_json(path), str(path)) if path.exists() else recipe(config)
    if frame < 0:
        raise ValueError(f"--frame must be at least 0, got {frame}")
    if fake:
        builder, sample = show.fake(complete, mode, frame)
    else:
        pieces, names = build(complete), complete.data.datasets
        if not 0 <= frame < (number := len(pieces.loader.frames.stores_F)):
            raise ValueError(f"--frame {frame}: the stores hold frames 0 to {number - 1}")
        builder = pieces.builder.only(names[pieces.loader.frames.stores_F[frame]] if names else "")
        sample = pieces.loader.sample(frame, mode)
    Console(width=width).print(show.show(sample, builder, f"{complete.name} {mode}"))


VERBS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "collect": collect,
    "replay": replay,
    "regenerate": regenerate,
    "inspect": inspect,
    "train-tokenizer": train_tokenizer,
    "train-reader": train_reader,
    "tokenize": tokenize,
    "imagine": imagine,
    "export-dataset": export_dataset,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "eval-world": eval_world,
    "merge": merge,
    "rank": rank,
    "improve": improve,
    "compare": compare,
    "export": export,
    "push": push,
    "convert": convert,
    "serve": serve,
    "play": play,
    "doctor": doctor,
    "config": show_config,
    "show-sample": show_sample,
}


def _overview() -> str:
    from worldvla.recipes import RECIPES
    from worldvla.sim.suites import SUITES

    lines = ["usage: worldvla VERB ...      worldvla VERB --help explains one", ""]
    lines += [f"  {verb:<16} {(run.__doc__ or '').splitlines()[0]}" for verb, run in VERBS.items()]
    lines += ["", *textwrap.wrap("recipes: " + " ".join(RECIPES), 100, subsequent_indent=" " * 9)]
    lines += textwrap.wrap("suites:  " + " ".join(SUITES), 100, subsequent_indent=" " * 9)
    return "\n".join(lines)


def _run(verb: str, args: list[str]) -> int:
    """Run a verb and return the exit code; bad arguments raise ValueError."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=3, cutoff=0.4) or VERBS
        raise ValueError(f"unknown verb {verb!r}; did you mean {', '.join(near)}? See `worldvla --help`")
    run, prog = _later(VERBS[verb]), f"worldvla {verb}"
    if verb == "train-tokenizer":
        from worldvla.train.image_tokenizer import TABLETOP

        run = partial(run, config=TABLETOP)
    elif verb in ("train", "config", "plan"):
        from worldvla.recipes import RECIPES, recipe

        if not args or args[0].startswith("-"):
            if not {"-h", "--help"} & set(args):
                raise ValueError(f"{prog} needs a recipe first, one of {', '.join(RECIPES)}")
            args = ["debug", "--help"]
        name, *args = args
        run, prog = partial(run, config=recipe(name)), f"{prog} {name}"
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            call = tyro.cli(run, prog=prog, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
        line = _line_of(box.getvalue()).replace(f"Missing from {prog}:", "missing")
        raise ValueError(f"{line}; see `{prog} --help`") from None
    for name, most in {"seed": 2**32 - 1, "augment": 2**32 - 1, "label": 1024, "allow_errors": 10**9}.items():
        if not 0 <= (value := call.keywords.get(name, 0)) <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from 0 to {most:,}, got {value}")
    return call() or 0


def _later(run: Callable[..., int | None]) -> Callable[..., "partial[int | None]"]:
    """Return a function of the same arguments that returns the call; those without a name on the command line
    are called in help and errors as they are in the function."""
    hints = get_type_hints(run, include_extras=True)
    for name, hint in hints.items():
        if Positional in get_args(hint)[1:]:
            hints[name] = Annotated[hint, tyro.conf.arg(metavar=name.upper())]

    @wraps(run)
    def bound(*args: Any, **options: Any) -> "partial[int | None]":
        return partial(run, *args, **options)

    own = signature(run)
    parameters = [p.replace(annotation=hints[p.name]) for p in own.parameters.values()]
    bound.__annotations__, bound.__signature__ = hints, own.replace(parameters=parameters)  # pyright: ignore
    del bound.__wrapped__  # tyro would look at it instead
    return bound


def _line_of(box: str) -> str:
    """Return tyro's box of an error as one line: what is wrong, and which options come near.

    Its sections stand between lines; options in it are indented by 4, their help by 8.
    """
    rows = [
        re.sub(r"[\u2500-\u257f]|^ +-{3,}$|\x1b\[[\d;]*m", "", r.rstrip()).rstrip() for r in box.splitlines()
    ]
    text = textwrap.dedent("\n".join(rows[1:])).strip("\n")
    wrong, *others = text.split("\n\n")
    options = [re.findall(r"^ {4}(?! )(\S.*)", section, re.M) for section in (wrong, *others)]
    line = " ".join((wrong.splitlines()[0] if options[0] else wrong).split()).rstrip(".")
    line += f" {', '.join(options[0])}" if options[0] else ""
    for section, named in zip(others, options[1:], strict=True):
        flags = [name for name in named if name.startswith("-")]
        if flags:
            line += f"; {'did you mean' if 'Perhaps' in section else 'expected'} {' or '.join(flags)}"
    return line


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. `--traceback` before the verb shows where an error came from."""
    # Before torch is loaded: threads that wait by spinning starve the workers on a machine with few cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in words[:1]
    words = words[show_traceback:]
    if not words or words[0] in ("-h", "--help", "help"):
        say(_overview())
        return 0 if words else EXIT_BAD_INPUT
    if words[0] == "--version":
        say(f"worldvla {version('worldvla')}")
        return 0
    try:
        return _run(words[0], words[1:])
    except BrokenPipeError:  # the reader of a pipe has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on", EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        from worldvla.sim.protocol import LIBERO

        is_libero = (error.name or "").split(".")[0] in ("libero", "robosuite")
        fix = f"pip install {LIBERO}" if is_libero else "install worldvla again, with what it depends on"
        message, code = f"{error}: a package is missing; {fix}", EXIT_BAD_INPUT
    except ImportError as error:  # such as pyarrow 26 beside numpy 1.26, which pip lets one install
        if (error.name or "").startswith("worldvla"):
            raise
        fix = "two packages do not fit; install another version of one (docs/start.md lists some)"
        message, code = f"{error}: {fix}", EXIT_BAD_INPUT
    except (ValueError, OSError, FloatingPointError) as error:
        message, code = str(error) or type(error).__name__, EXIT_BAD_INPUT
    except (RuntimeError, MemoryError) as error:  # torch has no type of its own for the CPU's
        is_full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not is_full and type(error).__name__ != "OutOfMemoryError":
            raise
        fix = "a smaller --train.batch-size, fewer bits (--quantize), or a device with more memory"
        message, code = f"{(str(error) or 'out of memory').splitlines()[0]}: {fix}", EXIT_BAD_INPUT
    if show_traceback:
        traceback.print_exc()
    print(one_line(f"worldvla {words[0]}: {message}", 2000), file=sys.stderr)
    return code
