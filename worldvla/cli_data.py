"""The verbs that make data: collect, replay, regenerate, train-tokenizer, tokenize."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import tyro

from worldvla.config import ImageTokenizerConfig

EXIT_EPISODE_ERRORS = 3
"""A replay that failed or found turned pictures, or an evaluation with more errors than allowed."""


def say(text: str) -> None:
    """Write one line to stdout, at once."""
    print(text, flush=True)


def warn_of_versions(suite: str) -> None:
    """Write to stderr which versions are not those that numbers on a LIBERO suite hold for.

    An unknown suite raises ValueError.
    """
    from worldvla.sim import suites as sim
    from worldvla.sim.libero import doctor

    for check in doctor.check_versions() if sim.suite(suite).simulator == "libero" else ():
        if check.status == "warning":
            print(f"warning: {check.name} {check.found}   fix: {check.fix}", file=sys.stderr)


def _warn_of_files(files: Sequence[Path]) -> None:
    from worldvla.data.episode import read_episodes

    for suite in dict.fromkeys(next(read_episodes(path, images=False)).suite for path in files):
        warn_of_versions(suite)


def _views(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Parse 'agentview=64x64' (rows x columns in pixels)."""
    views = {}
    for text in texts:
        name, _, size = text.partition("=")
        rows, _, cols = size.partition("x")
        if not (name and rows.isdigit() and cols.isdigit()):
            raise ValueError(f"bad view {text!r}: expected NAME=ROWSxCOLUMNS, such as agentview=64x64")
        views[name] = (int(rows), int(cols))
    return views


def demonstration_files(paths: Sequence[Path]) -> list[Path]:
    from worldvla.data import episode  # here, as it takes time to import

    return episode.demonstration_files(paths)


@cache
def _act(checkpoint: str) -> Callable[[Any], Any]:
    """Return observation -> actions (K, 7) of a checkpoint, for a worker with one core to itself."""
    import torch

    from worldvla.infer.model import load
    from worldvla.infer.policy import Policy

    torch.set_num_threads(1)
    return Policy(load(checkpoint)).act


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Write successful episodes of the scripted expert as HDF5, one file a task; keep what exists."""

    suite: tyro.conf.Positional[str]
    """For example tabletop_object; `worldvla --help` lists all."""
    out: Path | None = None
    """Directory of the files. Default: out/demos/SUITE."""
    kind: Literal["demonstrations", "world"] = "demonstrations"
    """world: gross noise, aimless play and, with --policy, its rollouts; failures are kept, and no step is a
    policy's target."""
    episodes: int = 50
    """Episodes of each task: successful ones, of world data of any end."""
    tasks: tuple[int, ...] = ()
    """Indices of the tasks; empty: all."""
    views: tuple[str, ...] = ()
    """Cameras as NAME=ROWSxCOLUMNS in pixels. Default: agentview=64x64 wrist=32x32 of tabletop; 128x128 both
    of LIBERO, as in its own files (its recipes and shipped model here read agentview=128x128 wrist=64x64)."""
    seed: int = 0
    workers: int = 0
    """Processes that simulate; 0: one a core (a LIBERO worker takes 1.7 GiB of memory)."""
    noise: float = 0.15
    """Expected share of perturbed steps, from which the expert recovers."""
    label: int = 0
    """K: also store what the expert would do in the K steps from every visited state on. With it, every frame
    is a clean policy target."""
    policy: Path | None = None
    """A checkpoint that drives, the expert taking over for stretches and at last (DAgger). Needs --label."""
    execute: int = 3
    """Actions of each of its chunks that are executed."""
    fast_render: bool = False
    """LIBERO without multisampling, reflections and shadows: quicker, but not the published pictures."""

    def run(self) -> int:
        from worldvla.sim.suites import suite

        rules = suite(self.suite).rules
        warn_of_versions(self.suite)
        if self.policy is not None and not self.label and self.kind == "demonstrations":
            raise ValueError("--policy without --label K teaches nothing: its own actions are no targets")
        from worldvla.data.collect import collect

        out = self.out or Path("out/demos") / self.suite
        options = {name: value for name, value in vars(self).items() if name not in ("suite", "out")}
        options["views"] = _views(self.views) or dict(rules.demonstrations)
        if self.policy is not None:
            from worldvla.infer.model import weights_digest
            from worldvla.model.weights import find_checkpoint

            options["policy"] = partial(_act, str(self.policy))
            options["policy_name"] = weights_digest(find_checkpoint(self.policy))
        for name, counts in collect(self.suite, out, **options).items():
            shares = ", ".join(f"{what} {share:.0%}" for what, share in counts.get("shares", {}).items())
            if shares:
                say(f"{name}: {counts['episodes']} episodes, {counts['steps']} frames: {shares}")
        say(f"demonstrations: {out}   next: worldvla replay {out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Re-run stored actions in the simulator and count the episodes that succeed again; name the files whose
    pictures are not upright."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files, or directories of them."""
    bins: bool = False
    """Pass the actions through the policy's 256 bins first: what a perfect policy would lose by them."""

    def run(self) -> int:
        from rich.console import Console
        from rich.progress import track

        from worldvla.data.rerun import inverted_gripper, rerun, through_bins, wrong_pictures

        files = demonstration_files(self.paths)
        _warn_of_files(files)
        transform = through_bins(files) if self.bins else (lambda actions: actions)
        outcomes: list[bool] = []
        faults: list[str] = []
        for path in track(files, "replay", console=Console(stderr=True), disable=not sys.stderr.isatty()):
            found = [done.success for done in rerun(path, transform)]
            outcomes += found
            faults += wrong_pictures(path)
            if not (all(found) or self.bins):
                faults += inverted_gripper(path)
        for line in faults:
            say(line)
        k, n = sum(outcomes), len(outcomes)
        say(f"replayed: {k}/{n} episodes succeed again   next: worldvla train-tokenizer {self.paths[0]}")
        return 0 if not faults and (k == n or self.bins) else EXIT_EPISODE_ERRORS


@dataclass(frozen=True, kw_only=True)
class Regenerate:
    """Execute published demonstrations again: drop no-ops and what fails, render at any size."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files in LIBERO's layout, or directories of them."""
    out: Path
    """Directory of the new files, one for each."""
    views: tuple[str, ...] = ("agentview=256x256", "wrist=256x256")
    """Cameras as NAME=ROWSxCOLUMNS in pixels."""
    keep_no_ops: bool = False
    """Keep steps that neither move nor change the gripper (the published filter drops them)."""
    workers: int = 0
    """Processes that simulate; 0: one a core (a LIBERO worker takes 1.7 GiB of memory)."""

    def run(self) -> int:
        from worldvla.data.rerun import regenerate

        files = demonstration_files(self.paths)
        _warn_of_files(files)
        counts = regenerate(
            files,
            self.out,
            _views(self.views),
            drop_no_ops=not self.keep_no_ops,
            workers=self.workers,
        )
        for name, c in counts.items():
            say(f"{name}: {c.kept} kept, {c.lost} fail now; {c.steps} steps, {c.no_ops} no-ops dropped")
        say(f"demonstrations: {self.out}   next: worldvla tokenize {self.out} --tokenizer DIR --out DIR")
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train the image tokenizer on the frames of demonstrations; report originals beside reconstructions."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files, or directories of them."""
    out: Path
    """Directory of the tokenizer."""
    config: ImageTokenizerConfig
    minutes: float = 12.0
    """Budget; steps, if given, replace it."""
    steps: int = 0
    """With a number of steps the result is a function of the seed, whatever the machine's speed."""
    seed: int = 0
    init_from: Path | None = None
    """Directory of an image tokenizer, of the same --config, to train on from: its codes keep about what they
    mean, so that a model of it can be trained on too (train.init_from)."""
    learning_rate: float = 2e-3
    """At its highest; a fifth of it or less beside --init-from."""

    def run(self) -> int:
        from worldvla.train.tokenizer import train_tokenizer

        minutes, steps = (None, self.steps) if self.steps else (self.minutes, None)
        train_tokenizer(
            demonstration_files(self.paths),
            self.config,
            self.out,
            minutes=minutes,
            steps=steps,
            seed=self.seed,
            learning_rate=self.learning_rate,
            init_from=self.init_from,
        )
        following = f"worldvla tokenize {self.paths[0]} --tokenizer {self.out} --out DIR"
        say(f"image tokenizer: {self.out}/report/index.html   next: {following}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Encode every frame once into a TokenStore."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files, or directories of them. Of files that others made, `worldvla replay` says first whether the
    pictures are upright; here they are taken as they are."""
    tokenizer: Path
    """Directory of the image tokenizer."""
    out: Path
    """Directory of the store."""
    regenerate: tuple[str, ...] = ()
    """Cameras as NAME=ROWSxCOLUMNS: first execute and render the demonstrations again at these sizes, into
    OUT.demos (see `worldvla regenerate`)."""
    workers: int = 0
    """Processes that simulate; 0: one a core (a LIBERO worker takes 1.7 GiB of memory)."""

    def run(self) -> int:
        from worldvla.data.tokenize import tokenize
        from worldvla.tokenizers.image import ImageTokenizer

        files = demonstration_files(self.paths)
        if self.regenerate:
            demos = self.out.with_name(self.out.name + ".demos")
            Regenerate(paths=tuple(files), out=demos, views=self.regenerate, workers=self.workers).run()
            files = demonstration_files([demos])
        store = tokenize(files, ImageTokenizer.load(self.tokenizer), self.out)
        kept = (f"{share:.0%} of the codes of {v}" for v, share in store.manifest.get("kept", {}).items())
        say(f"the next frame keeps {', '.join(kept)}")
        say(f"tokens: {self.out}   next: worldvla train RECIPE --data.stores {self.out}")
        return 0
