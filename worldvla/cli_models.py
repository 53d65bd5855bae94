"""The verbs on models and records: serve, compare, convert, eval-world, rank, doctor.

Nothing heavy is imported before one runs.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from worldvla.cli_data import EXIT_EPISODE_ERRORS, demonstration_files, say


def key(given: str) -> str:
    """Return the key of a server: the one given, else that of the environment."""
    return given or os.environ.get("WORLDVLA_API_KEY", "")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a checkpoint to any openpi client; `worldvla eval websocket://...` is one."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run directory (its newest checkpoint)."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: every network, set --api-key then."""
    port: int = 8000
    """0: any free port."""
    api_key: str = ""
    """Key that clients must send. Default: the environment variable WORLDVLA_API_KEY; none: let all in."""
    resize: bool = False
    """Resize pictures of another size, with black borders, instead of refusing them."""
    head: Literal["discrete", "continuous"] = "discrete"
    """Which head acts: bins, or the continuous one of a model that has one."""
    device: str = "cpu"
    quantize: Literal["", "int8", "int4"] = ""
    """Hold the model's large matrices in 8 or 4 bits: less memory, not less time (docs/MODELS.md)."""

    def run(self) -> int:
        from worldvla.serve.server import serve_checkpoint

        options: dict[str, Any] = vars(self) | {"api_key": key(self.api_key)}
        serve_checkpoint(
            **options,
            on_start=lambda at: say(f"serving at {at}   next: worldvla eval websocket://{at} --suite SUITE"),
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare two evaluations episode by episode; the last line of the output is JSON."""

    a: tyro.conf.Positional[Path]
    """A record.json, or the directory of an evaluation."""
    b: tyro.conf.Positional[Path]
    force: bool = False
    """Compare though suite, seed or protocol differ."""

    def run(self) -> int:
        from rich.console import Console

        from worldvla.eval.compare import compare, read_record, table

        comparison = compare(read_record(self.a), read_record(self.b), self.force)
        Console().print(table(comparison))
        low, high = comparison["interval_95"]
        left_out = (
            f"{comparison['left_out_errors']} left out for errors, {sum(comparison['unpaired'])} unpaired"
        )
        say(
            f"{comparison['pairs']} pairs ({left_out}); A - B {comparison['difference']:+.3f} "
            f"(95 % {low:+.3f} to {high:+.3f}), McNemar exact p = {comparison['p']:.4g}"
        )
        say(json.dumps(comparison))
        return 0


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Make one of our checkpoints of a published one, or the published layout of ours; see docs/MODELS.md."""

    source: tyro.conf.Positional[str]
    """A folder, or hf://ORG/NAME/FOLDER on the hub; with --back a checkpoint or run directory of ours."""
    out: Path
    """Directory of the result."""
    release: str = ""
    """chameleon, worldvla_256, worldvla_512, rynnvla_256, rynnvla_world_512 or rynnvla_action_world_512."""
    suite: str = ""
    """Of a policy: the LIBERO suite it was trained on, which decides the length of its chunks."""
    tokenizer: str = ""
    """Folder, or hf://ORG/NAME/FOLDER, of text_tokenizer.json and vqgan.ckpt. Default: SOURCE."""
    without_action_head: bool = False
    """Do not read the continuous head of a RynnVLA-002 policy; its discrete actions remain."""
    back: bool = False
    """Write the published layout of SOURCE."""
    like: Path | None = None
    """With --back, of a checkpoint that was trained on: the converted one that it came from."""

    def run(self) -> int:
        from worldvla.published.convert import convert, convert_back
        from worldvla.recipes import libero

        if self.back:
            convert_back(Path(self.source), self.out, self.like)
            say(f"published layout: {self.out}")
            return 0
        options = (self.suite, self.tokenizer, self.without_action_head)
        for remark in convert(self.source, self.out, self.release, libero(), *options):
            say(remark)
        say(f"model: {self.out}   next: worldvla eval {self.out} --suite {self.suite or 'SUITE'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class EvalWorld:
    """Let checkpoints imagine held-out clips: PSNR, SSIM and more a step, beside ceiling, copy and truth."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints, or run directories (their newest one), side by side."""
    demos: tuple[Path, ...]
    """HDF5 files with first frames, actions and the truth, or directories of them; not trained on."""
    out: Path = Path("out/eval_world")
    """Directory of the record, videos and page."""
    clips: int = 8
    horizons: tuple[int, ...] = (10,)
    """Steps of a clip; several: one set of clips each. The paper: 10 50."""
    shorter: bool = False
    """One clip an episode, from its first frame, of at most that many steps."""
    features: bool = False
    """Distances of EfficientNet-Lite0's features too (the `features` extra); never called FVD or LPIPS."""
    lpips: tuple[Path, Path] | None = None
    """Weight files of LPIPS: torchvision's AlexNet or VGG-16, and the linear heads v0.1 of the same."""
    i3d: Path | None = None
    """Weight file of FVD's network: i3d_torchscript.pt."""
    probe: tuple[Path, ...] = ()
    """Other demonstrations: train a probe on them and ask it how the imagined hand moves."""
    videos: int = 4
    """Filmed clips of each horizon: real, imagined, difference."""
    seed: int = 0
    batch_size: int = 32
    device: str = "cpu"
    drafts: bool = True
    """Guess each frame and check it in a few passes: the same codes, sooner. Off: one code a pass."""

    def run(self) -> int:
        from worldvla.eval.world import Extras, evaluate_world
        from worldvla.infer.draft import in_words

        probe = demonstration_files(self.probe) if self.probe else ()
        record = evaluate_world(
            self.checkpoints,
            demonstration_files(self.demos),
            self.out,
            self.clips,
            self.horizons,
            self.seed,
            shorter=self.shorter,
            extras=Extras(self.features, self.lpips, self.i3d, probe),
            batch_size=self.batch_size,
            videos=self.videos,
            device=self.device,
            drafts=self.drafts,
        )
        for section in record["horizons"]:
            for view, models in section["views"].items():
                for name, kinds in models.items():
                    last = ", ".join(f"{kind} {scores['psnr'][-1]:.1f}" for kind, scores in kinds.items())
                    say(f"{name}, {view}, PSNR at step {section['steps'][-1]}: {last} dB")
            for name, found in section["decoding"].items():
                say(f"{name}, {in_words(found)}")
        for remark in record["remarks"]:
            say(f"note: {remark}")
        say(f"imagined videos: {self.out / 'index.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Do policies rank in imagination as they do in the simulator? Each acts in both from the same frames."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """The policies: checkpoints, or run directories (their newest one)."""
    world: Path
    """The world model that they act in."""
    demos: tuple[Path, ...]
    """HDF5 files, or directories of them, of every task: a judge of success is trained on them."""
    suites: tuple[str, ...]
    out: Path = Path("out/rank")
    """Directory of the record, picture and film."""
    episodes: int = 2
    """Initial states of each task."""
    first: int = 0
    """The first of them."""
    execute: tuple[int, ...] = ()
    """Actions of a chunk before the next look; several: each a policy of its own. Default: all."""
    seed: int = 0

    def run(self) -> int:
        from worldvla.eval.rank import rank_policies

        options = {"episodes": self.episodes, "first": self.first, "execute": self.execute, "seed": self.seed}
        record = rank_policies(
            self.checkpoints, self.world, demonstration_files(self.demos), self.suites, self.out, **options
        )
        for row in record["policies"]:
            real, judged, imagined = (f"{sum(o)}/{len(o)}" for o in row["outcomes"])
            words = f"simulator {real}, judge there {judged}, imagined {imagined}"
            say(f"{row['name']} seed {row['seed']} execute {row['execute']}: {words}")
        for n, of in record["by_execute"].items():
            found = of["imagined"]["spearman"]
            say(f"among those that execute {n}: {found['value']} (95 % {found['interval_95']})")
        found = record["imagined"]["spearman"]
        say(f"rank correlation {found['value']} (95 % {found['interval_95']})   picture: {self.out}/rank.png")
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check versions, OpenGL and how the simulators behave, and say what to do; a red line: exit code 3."""

    quick: bool = False
    """Versions, machine and OpenGL alone: seconds."""
    json: Path | None = None
    """File for the result. Default: one in the user's cache, which records then cite; with --quick: none."""

    def run(self) -> int:
        from rich.console import Console
        from rich.text import Text

        from worldvla.files import write_json
        from worldvla.sim.libero import doctor

        colours = {"ok": "green", "warning": "yellow", "bad": "red", "skipped": "dim"}
        console = Console(highlight=False, soft_wrap=True)
        checks: list[doctor.Check] = []
        with console.status("versions") as status:
            for check in doctor.examine(self.quick, status.update):
                checks.append(check)
                line = Text.assemble(
                    (f"{check.status:<8}", colours[check.status]), f"{check.name:<28}{check.found}"
                )
                console.print(line.append(f"   fix: {check.fix}" if check.fix else "", "bold"))
        report = doctor.report(checks, self.quick)
        path = self.json or (None if self.quick else doctor.last_run())
        if path is not None:
            write_json(path, report)
            console.print(f"written: {path}")
        return 0 if report["ok"] else EXIT_EPISODE_ERRORS
