"""The verbs: `worldvla VERB ...` parses, calls one function of the library, and says where the result is.

Nothing heavy is imported before a verb runs, so that `worldvla --help` answers at once. Exit codes: 0 done,
2 bad input (one line on stderr), 3 a replay that failed, an evaluation with more errors than allowed or a
red line of the doctor, 130 interrupted.
"""

import difflib
import json
import os
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from worldvla.cli_data import (
    EXIT_EPISODE_ERRORS,
    Collect,
    Regenerate,
    Replay,
    Tokenize,
    TrainTokenizer,
    say,
    warn_of_versions,
)
from worldvla.cli_models import Compare, Convert, Doctor, EvalWorld, Rank, Serve, key
from worldvla.config import Config, to_json

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def _short(checkpoint: Path) -> str:
    """Return a directory name for results of `checkpoint`: out/train/NAME/ckpt/step_N becomes NAME_step_N."""
    left_out = ("out", "train", "ckpt", "/", "websocket:", "ws:", "wss:")
    return "_".join(part for part in checkpoint.parts[-3:] if part not in left_out).replace(":", "_")


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
            say(f"checkpoint: {outcome.checkpoint}   next: worldvla eval {outcome.checkpoint} --suite SUITE")
        return 0


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Roll a checkpoint out on a suite: success with intervals, videos, one HTML page, a JSON record."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, a run directory (its newest checkpoint), random, expert, blind (with --demos), or the
    websocket://HOST:PORT of any policy server that speaks openpi's protocol."""
    suite: str
    out: Path | None = None
    """Directory of the record, videos and page. Default: out/eval/NAME/SUITE."""
    episodes: int = 10
    """Episodes of each task, from its fixed initial states."""
    first: int = 0
    """Initial state of the first episode. From 50 on: states that demonstrations start from, to tell a policy
    that has learnt too little from one that does not generalise."""
    tasks: tuple[int, ...] = ()
    """Indices of the tasks; empty: all."""
    execute: int | None = None
    """Actions of each chunk that are executed before the next look. Default: all; of a server: 5."""
    demos: Path | None = None
    """Directory of demonstrations whose mean trajectory the blind replay executes."""
    head: Literal["discrete", "continuous"] = "discrete"
    """Which head of a checkpoint acts: bins, or the continuous one of a model that has one."""
    remote_size: int | None = None
    """Pixels a side of pictures sent to a server. Default: what it asks for; else 224 (tabletop: 64, 32)."""
    api_key: str = ""
    """Key for a server. Default: the environment variable WORLDVLA_API_KEY."""
    fast_render: bool = False
    """LIBERO without multisampling, reflections and shadows: quicker, but not the published pictures."""
    scene_prefix: bool = False
    """Start instructions of libero_10 by their scene, as the released LIBERO-10 checkpoints were trained
    ("KITCHEN SCENE3 turn on ..."); published evaluations leave it out."""
    videos: int = 1
    """Filmed episodes of each task."""
    seed: int = 0
    workers: int = 0
    """Processes that step environments; 0: one a core (a LIBERO worker takes 1.7 GiB of memory)."""
    device: str = "cpu"
    quantize: Literal["", "int8", "int4"] = ""
    """Hold the model's large matrices in 8 or 4 bits: less memory, not less time (docs/MODELS.md)."""
    allow_errors: int = 0
    """More errors than this make the exit code 3."""

    def run(self) -> int:
        warn_of_versions(self.suite)
        from worldvla.eval.rollout import run

        out = self.out or Path("out/eval") / _short(Path(self.checkpoint)) / self.suite
        record = run(
            self._actor(),
            self.suite,
            self.episodes,
            out_dir=out,
            seed=self.seed,
            workers=self.workers,
            first=self.first,
            tasks=self.tasks,
            fast_render=self.fast_render,
            scene_prefix=self.scene_prefix,
            videos=self.videos,
        )
        low, high = record["wilson_95"]
        counts = f"{record['successes']}/{record['episodes']} (95% {low:.2f} to {high:.2f})"
        say(f"{self.suite}: {counts}, grasped {record['grasped']}, errors {record['errors']}")
        if (decoding := record["protocol"].get("decoding", "")).startswith("one by one"):
            say(f"  decoded {decoding}")
        reasons = Counter(o["reason"] for o in record["outcomes"] if o["status"] == "error")
        for reason, times in reasons.most_common(3):
            say(f"  {times} x {reason}")
        say(f"evaluation: {out / 'index.html'}")
        return 0 if record["errors"] <= self.allow_errors else EXIT_EPISODE_ERRORS

    def _actor(self) -> Any:
        from worldvla.eval.actors import BlindActor, ExpertActor, ModelActor, RandomActor

        if self.head != "discrete" and (
            self.checkpoint in ("random", "expert", "blind") or "://" in self.checkpoint
        ):
            raise ValueError(
                f"--head is for a checkpoint, not for {self.checkpoint}; of a server: serve --head"
            )
        if self.checkpoint == "random":
            return RandomActor(self.seed)
        if self.checkpoint == "expert":
            return ExpertActor()
        if self.checkpoint == "blind":
            if self.demos is None:
                raise ValueError("the blind replay needs --demos DIRECTORY; `worldvla collect` makes one")
            return BlindActor.from_demos(self.demos)
        if "://" in self.checkpoint:
            from worldvla.eval.remote import RemoteActor

            return RemoteActor(self.checkpoint, self.suite, self.execute, self.remote_size, key(self.api_key))
        return ModelActor(self.checkpoint, self.execute, self.device, self.head, self.quantize)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Copy a checkpoint without its training state, weights in bfloat16: what is shipped and served."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run directory (its newest checkpoint)."""
    out: Path

    def run(self) -> int:
        from worldvla.infer.model import export

        say(f"model: {export(self.checkpoint, self.out)}   next: worldvla eval {self.out} --suite SUITE")
        return 0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Roll the shipped model out, imagine, and write one HTML page."""

    suite: Literal["tabletop", "libero_object", "libero_spatial"] = "tabletop"
    """All four tabletop suites, or a real Franka's (needs the libero extra)."""
    out: Path | None = None
    """Default: out/demo_SUITE."""
    checkpoint: Path | None = None
    """Default: the model that is shipped inside the package."""
    episodes: int = 1
    """Episodes of each task."""
    seed: int = 0
    workers: int = 4

    def run(self) -> int:
        from worldvla.demo import demo

        if self.suite != "tabletop":  # all four
            warn_of_versions(self.suite)
        out = self.out or Path(f"out/demo_{self.suite}")
        page = demo(out, self.suite, self.checkpoint, self.episodes, self.seed, self.workers)
        say(f"demo: open {page.resolve()}")
        return 0


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Print RECIPE, with overrides, as JSON."""

    config: Annotated[Config, tyro.conf.arg(name="")]

    def run(self) -> int:
        say(json.dumps(to_json(self.config), indent=2))
        return 0


@dataclass(frozen=True, kw_only=True)
class ShowSample:
    """Print one training sample in colour: look at one before every run."""

    config: tyro.conf.Positional[str]
    """A recipe, or a directory with config.json (a run, a checkpoint)."""
    mode: Literal["policy", "world"] = "policy"
    frame: int = 0
    """Frame of the stores at which the sample starts; with --fake the seed."""
    fake: bool = False
    """Random codes, states and actions in the recipe's layout: needs no files."""
    width: int | None = None
    """Columns of the output. Default: the terminal's."""

    def run(self) -> int:
        from rich.console import Console

        from worldvla.config import from_json
        from worldvla.data.show import fake, show
        from worldvla.recipes import recipe
        from worldvla.train.build import build

        path = Path(self.config) / "config.json"
        config = from_json(Config, json.loads(path.read_text())) if path.exists() else recipe(self.config)
        if self.fake:
            builder, sample = fake(config, self.mode, self.frame)
        else:
            pieces = build(config)
            builder, sample = pieces.builder, pieces.loader.sample(self.frame, self.mode)
        Console(width=self.width).print(show(sample, builder, f"{config.name} {self.mode}"))
        return 0


VERBS: dict[str, type[Any]] = {
    "collect": Collect,
    "replay": Replay,
    "regenerate": Regenerate,
    "train-tokenizer": TrainTokenizer,
    "tokenize": Tokenize,
    "train": Train,
    "eval": Eval,
    "eval-world": EvalWorld,
    "rank": Rank,
    "export": Export,
    "convert": Convert,
    "serve": Serve,
    "compare": Compare,
    "demo": Demo,
    "doctor": Doctor,
    "config": ShowConfig,
    "show-sample": ShowSample,
}
TAKE_RECIPE = ("train", "config")


def _overview() -> str:
    from worldvla.recipes import RECIPES
    from worldvla.sim.suites import SUITES

    lines = ["usage: worldvla VERB ...      worldvla VERB --help explains one", ""]
    help_of = {verb: (cls.__doc__ or "").splitlines()[0] for verb, cls in VERBS.items()}
    lines += [f"  {verb:<16} {text}" for verb, text in help_of.items()]
    lines += ["", *textwrap.wrap("recipes: " + " ".join(RECIPES), 100, subsequent_indent=" " * 9)]
    lines += textwrap.wrap("suites:  " + " ".join(SUITES), 100, subsequent_indent=" " * 9)
    return "\n".join(lines)


def _parse(verb: str, args: list[str]) -> Any:
    """Return the arguments of a verb; bad ones exit with code 2 and their own message."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=3, cutoff=0.4) or list(VERBS)
        raise ValueError(f"unknown verb {verb!r}; did you mean {', '.join(near)}? See `worldvla --help`")
    cls = VERBS[verb]
    if verb == "train-tokenizer":
        from worldvla.train.tokenizer import TABLETOP

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
        say(_overview())
        return 0 if words else EXIT_BAD_INPUT
    try:
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
    except RuntimeError as error:  # torch.OutOfMemoryError, and torch is not loaded for every verb
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fix = "a smaller --train.batch-size or --batch, fewer bits (--quantize), or a device with more memory"
        message, code = f"{str(error).splitlines()[0]}: {fix}", EXIT_BAD_INPUT
    if show_traceback:
        traceback.print_exc()
    print(f"worldvla {words[0]}: " + " ".join(message.split()), file=sys.stderr)
    return code
