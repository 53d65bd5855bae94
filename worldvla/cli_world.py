"""The verbs that compare models: eval-world, chunk-error, tables; nothing heavy is imported before."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from worldvla.cli_data import EXIT_EPISODE_ERRORS, hdf5_files, say


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

        probe = hdf5_files(self.probe) if self.probe else ()
        record = evaluate_world(
            self.checkpoints,
            hdf5_files(self.demos),
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
        for remark in record["remarks"]:
            say(f"note: {remark}")
        say(f"imagined videos: {self.out / 'index.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class ChunkError:
    """Error of the k-th action of a chunk on held-out episodes, with teacher forcing and without."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoints, or run directories (their newest one)."""
    out: Path
    """The JSON record."""
    stores: tuple[Path, ...] = ()
    """TokenStores. Default: those that each model was trained on; its held-out episodes are used."""
    batches: int = 8
    """Batches of 64 chunks."""

    def run(self) -> int:
        from worldvla.eval.record import provenance
        from worldvla.files import write_json
        from worldvla.infer.chunk import chunk_error

        rows = [chunk_error(path, self.stores, self.batches) for path in self.checkpoints]
        for row in rows:
            say(f"{row['name']}: forced {row['forced']}, free {row['free']}, no motion {row['still']}")
        write_json(self.out, {"chunks": rows, **provenance()})
        say(f"record: {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Collect results/ into docs/RESULTS.md and one HTML page, the paper's numbers beside ours."""

    check: bool = False
    """Write nothing; fail when RESULTS.md is not what the records say, or a number has no record."""
    page: Path = Path("out/tables/index.html")

    def run(self) -> int:
        from worldvla.eval.tables import check, write_tables

        root = Path(__file__).parents[1]
        if not (root / "results").is_dir():
            raise FileNotFoundError(f"no {root / 'results'}: `worldvla tables` runs in a checkout")
        if self.check:
            faults = check(root)
            for fault in faults:
                say(fault)
            say(f"tables: {len(faults)} faults" if faults else "tables: every number has its record")
            return EXIT_EPISODE_ERRORS if faults else 0
        say(f"tables: {write_tables(root, self.page)} and {self.page}")
        return 0
