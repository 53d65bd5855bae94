"""The verbs: `worldvla VERB ...` parses, calls one function of the library, and says where the result is.

Nothing heavy is imported before a verb runs, so that `worldvla --help` answers at once. Exit codes: 0 done,
2 bad input (one line on stderr), 3 a replay that failed or an evaluation with more errors than allowed,
130 interrupted.
"""

import difflib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from worldvla.config import Config, ImageTokenizerConfig, to_json

EXIT_BAD_INPUT = 2
EXIT_EPISODE_ERRORS = 3
EXIT_INTERRUPTED = 130


def _say(text: str) -> None:
    print(text, flush=True)


def _views(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Parse 'agentview=64x64' (rows x columns in pixels)."""
    views = {}
    for text in texts:
        name, _, size = text.partition("=")
        rows, _, cols = size.partition("x")
        if not (name and rows.isdigit() and cols.isdigit()):
            raise ValueError(
                f"bad view {text!r}: expected NAME=ROWSxCOLUMNS in pixels, for example agentview=64x64"
            )
        views[name] = (int(rows), int(cols))
    return views


def _hdf5_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and the *.hdf5 files of the directories among them, sorted."""
    files: list[Path] = []
    if not paths:
        raise ValueError("no demonstrations given: expected HDF5 files or directories of them")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"no {path}: expected an HDF5 file or a directory of them; `worldvla collect` makes one"
            )
        found = sorted(path.glob("**/*.hdf5")) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path} holds no *.hdf5 files; `worldvla collect` makes them")
        files += found
    return files


def _through_bins(files: Sequence[Path]) -> Callable[[Any], Any]:
    """Return actions -> the actions that a policy trained on `files` would execute, were it perfect."""
    import numpy as np

    from worldvla.data.episode import read_episodes
    from worldvla.tokenizers.action import compute_statistics

    episodes = [episode for path in files for episode in read_episodes(path, images=False)]
    actions, states = (np.concatenate([getattr(e, name) for e in episodes]) for name in ("actions", "states"))
    statistics = compute_statistics(actions, states, "minmax")
    return lambda actions: statistics.decode_actions(statistics.encode_actions(actions))


@cache
def _act(checkpoint: str) -> Callable[[Any], Any]:
    """Return observation -> actions (K, 7) of a checkpoint, for a worker with one core to itself."""
    import torch

    from worldvla.infer.load import load

    torch.set_num_threads(1)
    return load(checkpoint).policy().act


def _weights(checkpoint: Path) -> str:
    from worldvla.infer.load import find_checkpoint, weights_digest

    return weights_digest(find_checkpoint(checkpoint))


def _short(checkpoint: Path) -> str:
    """Return a directory name for results of `checkpoint`: out/train/NAME/ckpt/step_N becomes NAME_step_N."""
    return "_".join(part for part in checkpoint.parts[-3:] if part not in ("out", "train", "ckpt", "/"))


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Write successful episodes of the scripted expert as HDF5, one file a task; keep what exists."""

    suite: tyro.conf.Positional[str]
    """For example tabletop_object; `worldvla --help` lists all."""
    out: Path | None = None
    """Directory of the files. Default: out/demos/SUITE."""
    episodes: int = 50
    """Successful episodes of each task."""
    tasks: tuple[int, ...] = ()
    """Indices of the tasks; empty: all."""
    views: tuple[str, ...] = ("agentview=64x64", "wrist=32x32")
    """Cameras as NAME=ROWSxCOLUMNS in pixels."""
    seed: int = 0
    workers: int = 2
    noise: float = 0.15
    """Expected share of perturbed steps, from which the expert recovers."""
    label: int = 0
    """K: also store what the expert would do in the K steps from every visited state on. With it, every frame
    is a clean policy target."""
    policy: Path | None = None
    """A checkpoint that drives, the expert taking over for stretches and at last (DAgger). Needs --label."""
    execute: int = 3
    """Actions of each of its chunks that are executed."""

    def run(self) -> int:
        from worldvla.sim.env import suite

        suite(self.suite)
        if self.policy is not None and not self.label:
            raise ValueError("--policy without --label K teaches nothing: its own actions are no targets")
        from worldvla.data.collect import collect

        out = self.out or Path("out/demos") / self.suite
        collect(
            self.suite,
            out,
            episodes=self.episodes,
            views=_views(self.views),
            seed=self.seed,
            workers=self.workers,
            noise=self.noise,
            label=self.label,
            policy=partial(_act, str(self.policy)) if self.policy else None,
            policy_name=_weights(self.policy) if self.policy else "",
            execute=self.execute,
            tasks=self.tasks,
        )
        _say(f"demonstrations: {out}   next: worldvla replay {out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Re-run stored actions in the simulator and count the episodes that succeed again."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files, or directories of them."""
    bins: bool = False
    """Pass the actions through the policy's 256 bins first: what a perfect policy would lose by them."""

    def run(self) -> int:
        from rich.console import Console
        from rich.progress import track

        from worldvla.data.collect import replay

        files = _hdf5_files(self.paths)
        transform = _through_bins(files) if self.bins else (lambda actions: actions)
        outcomes = []
        for path in track(files, "replay", console=Console(stderr=True), disable=not sys.stderr.isatty()):
            outcomes += [success for _, success in replay(path, transform)]
        k, n = sum(outcomes), len(outcomes)
        _say(f"replayed: {k}/{n} episodes succeed again   next: worldvla train-tokenizer {self.paths[0]}")
        return 0 if k == n or self.bins else EXIT_EPISODE_ERRORS


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

    def run(self) -> int:
        from worldvla.tokenizers.image_train import train_tokenizer

        minutes, steps = (None, self.steps) if self.steps else (self.minutes, None)
        files = _hdf5_files(self.paths)
        train_tokenizer(files, self.config, self.out, minutes=minutes, steps=steps, seed=self.seed)
        _say(
            f"image tokenizer: {self.out}/report/index.html   next: worldvla probe {self.out} {self.paths[0]}"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Encode every frame once into a TokenStore."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files, or directories of them."""
    tokenizer: Path
    """Directory of the image tokenizer."""
    out: Path
    """Directory of the store."""

    def run(self) -> int:
        from worldvla.data.tokenize import tokenize

        tokenize(_hdf5_files(self.paths), self.tokenizer, self.out)
        _say(f"tokens: {self.out}   next: worldvla train RECIPE --data.stores {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train RECIPE; every field of it is an option. The same command goes on after a stop."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Run directory. Default: out/train/NAME."""
    overfit: bool = False
    """See batch 0 at every step: a sound model takes its loss to nearly zero."""

    def run(self) -> int:
        from worldvla.train.loop import train

        out = self.out or Path("out/train") / self.config.name
        outcome = train(self.config, out, overfit=self.overfit)
        if not outcome.is_finished:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":  # torchrun's other processes stay silent
            _say(f"checkpoint: {outcome.checkpoint}   next: worldvla eval {outcome.checkpoint} --suite SUITE")
        return 0


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Roll a checkpoint out on a suite: success with intervals, videos, one HTML page, a JSON record."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, a run directory (its newest checkpoint), or random, expert, blind (with --demos)."""
    suite: str
    out: Path | None = None
    """Directory of the record, videos and page. Default: out/eval/NAME/SUITE."""
    episodes: int = 10
    """Episodes of each task, from its fixed initial states."""
    tasks: tuple[int, ...] = ()
    """Indices of the tasks; empty: all."""
    execute: int | None = None
    """Actions of each chunk that are executed before the next look. Default: all."""
    demos: Path | None = None
    """Directory of demonstrations whose mean trajectory the blind replay executes."""
    videos: int = 1
    """Filmed episodes of each task."""
    seed: int = 0
    workers: int = 2
    """Processes that step environments."""
    device: str = "cpu"
    allow_errors: int = 0
    """More errors than this make the exit code 3."""

    def run(self) -> int:
        from worldvla.sim.env import suite

        suite(self.suite)
        from worldvla.eval.rollout import run

        out = self.out or Path("out/eval") / _short(Path(self.checkpoint)) / self.suite
        record = run(
            self._actor(),
            self.suite,
            self.episodes,
            out_dir=out,
            seed=self.seed,
            workers=self.workers,
            tasks=self.tasks,
            videos=self.videos,
        )
        low, high = record["wilson_95"]
        counts = f"{record['successes']}/{record['episodes']} (95% {low:.2f} to {high:.2f})"
        _say(f"{self.suite}: {counts}, grasped {record['grasped']}, errors {record['errors']}")
        _say(f"evaluation: {out / 'index.html'}")
        return 0 if record["errors"] <= self.allow_errors else EXIT_EPISODE_ERRORS

    def _actor(self) -> Any:
        from worldvla.eval.actors import BlindActor, ExpertActor, ModelActor, RandomActor

        if self.checkpoint == "random":
            return RandomActor(self.seed)
        if self.checkpoint == "expert":
            return ExpertActor()
        if self.checkpoint == "blind":
            if self.demos is None:
                raise ValueError("the blind replay needs --demos DIRECTORY; `worldvla collect` makes one")
            return BlindActor.from_demos(self.demos)
        return ModelActor(self.checkpoint, self.execute, self.device)


@dataclass(frozen=True, kw_only=True)
class Imagine:
    """Let a checkpoint imagine the video of stored actions, beside the truth."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run directory (its newest checkpoint)."""
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """HDF5 files with first frames, actions and the truth, or directories of them."""
    out: Path | None = None
    """Directory of the record, videos and page. Default: out/imagine/NAME."""
    episodes: int = 4
    horizon: int = 30
    """Steps to imagine."""
    seed: int = 0
    device: str = "cpu"

    def run(self) -> int:
        from worldvla.eval.world import evaluate_world

        files = _hdf5_files(self.paths)
        out = self.out or Path("out/imagine") / _short(self.checkpoint)
        evaluate_world(
            self.checkpoint, files, out, self.episodes, self.horizon, self.seed, device=self.device
        )
        _say(f"imagined videos: {out / 'index.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Copy a checkpoint without its training state, weights in bfloat16: what is shipped and served."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run directory (its newest checkpoint)."""
    out: Path

    def run(self) -> int:
        from worldvla.infer.load import export

        _say(f"model: {export(self.checkpoint, self.out)}   next: worldvla eval {self.out} --suite SUITE")
        return 0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Roll the shipped model out on the four tabletop suites, imagine, and write one HTML page."""

    out: Path = Path("out/demo")
    checkpoint: Path | None = None
    """Default: the model that is shipped inside the package."""
    episodes: int = 1
    """Episodes of each of the 40 tasks."""
    seed: int = 0
    workers: int = 4

    def run(self) -> int:
        from worldvla.demo import demo

        page = demo(self.out, self.checkpoint, self.episodes, self.seed, self.workers)
        _say(f"demo: open {page.resolve()}")
        return 0


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Print RECIPE, with overrides, as JSON."""

    config: Annotated[Config, tyro.conf.arg(name="")]

    def run(self) -> int:
        _say(json.dumps(to_json(self.config), indent=2))
        return 0


def _run_tool(name: str, args: list[str]) -> int:
    """Run a script of tools/ as if by `python tools/NAME.py`; they live beside the package, in a checkout."""
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: this verb is a script of the repository; run it in a checkout")
    sys.argv = [f"worldvla {name}", *args]
    runpy.run_path(str(path), run_name="__main__")
    return 0


VERBS: dict[str, type[Any]] = {
    "collect": Collect,
    "replay": Replay,
    "train-tokenizer": TrainTokenizer,
    "tokenize": Tokenize,
    "train": Train,
    "eval": Eval,
    "imagine": Imagine,
    "export": Export,
    "demo": Demo,
    "config": ShowConfig,
}
TAKE_RECIPE = ("train", "config")
TOOLS = {
    "probe": "Read positions off the codes of an image tokenizer: the gate before training on them.",
    "show-sample": "Print one training sample in colour.",
}


def _overview() -> str:
    from worldvla.recipes import LIBERO_SUITES, RECIPES, TABLETOP_SUITES

    lines = ["usage: worldvla VERB ...      worldvla VERB --help explains one", ""]
    help_of = {verb: (cls.__doc__ or "").splitlines()[0] for verb, cls in VERBS.items()} | TOOLS
    lines += [f"  {verb:<16} {text}" for verb, text in help_of.items()]
    lines += ["", "recipes: " + " ".join(RECIPES), "suites:  " + " ".join(TABLETOP_SUITES + LIBERO_SUITES)]
    return "\n".join(lines)


def _parse(verb: str, args: list[str]) -> Any:
    """Return the arguments of a verb; bad ones exit with code 2 and their own message."""
    if verb not in VERBS:
        known = [*VERBS, *TOOLS]
        near = difflib.get_close_matches(verb, known, n=3, cutoff=0.4) or known
        raise ValueError(
            f"unknown verb {verb!r}; did you mean {', '.join(near)}? `worldvla --help` lists them"
        )
    cls = VERBS[verb]
    if verb == "train-tokenizer":
        from worldvla.tokenizers.image_train import TABLETOP

        default = TrainTokenizer(paths=tyro.MISSING, out=tyro.MISSING, config=TABLETOP)
        return tyro.cli(cls, prog=f"worldvla {verb}", args=args, default=default)
    if verb not in TAKE_RECIPE:
        return tyro.cli(cls, prog=f"worldvla {verb}", args=args)
    from worldvla.recipes import RECIPES, recipe

    if not args or args[0].startswith("-"):
        if {"-h", "--help"} & set(args):
            args = ["debug", "--help"]
        else:
            raise ValueError(f"worldvla {verb} needs a recipe first, one of {', '.join(RECIPES)}")
    name, *rest = args
    return tyro.cli(cls, prog=f"worldvla {verb} {name}", args=rest, default=cls(config=recipe(name)))


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. `--traceback` before the verb shows where an error came from."""
    # Before torch is loaded: threads that wait by spinning starve the workers on a machine with few cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in words[:1]
    words = words[show_traceback:]
    if not words or words[0] in ("-h", "--help", "help"):
        _say(_overview())
        return 0 if words else EXIT_BAD_INPUT
    try:
        if words[0] in TOOLS:
            return _run_tool(words[0].replace("-", "_"), words[1:])
        return _parse(words[0], words[1:]).run()
    except BrokenPipeError:  # the reader of a pipe has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on", EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        extra = "libero" if (error.name or "").split(".")[0] in ("libero", "robosuite") else ""
        fix = f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
        message, code = f"{error}: a package is missing; {fix}", EXIT_BAD_INPUT
    except (ValueError, OSError, FloatingPointError) as error:
        message, code = str(error) or type(error).__name__, EXIT_BAD_INPUT
    if show_traceback:
        traceback.print_exc()
    print(f"worldvla {words[0]}: " + " ".join(message.split()), file=sys.stderr)
    return code
