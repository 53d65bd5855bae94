"""Demonstration files (LIBERO/robomimic HDF5) -> TokenStore: every frame once through the image tokenizer.

`worldvla tokenize data/tabletop_object --tokenizer out/tokenizer --out out/store`
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from worldvla.data.episode import Episode, count_episodes, read_episodes
from worldvla.data.store import FrameTokenizer, TokenStore, read_manifest, write_store
from worldvla.progress import progress_bar
from worldvla.tokenizers.image import ImageTokenizer

PATTERN = "*_demo.hdf5"


def tokenize(
    paths: Sequence[Path],
    tokenizer_dir: Path,
    out_dir: Path,
    *,
    views: Sequence[str] | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> TokenStore:
    """Write the store of all episodes in `paths` (files, or directories of *_demo.hdf5) and return it.

    Idempotent: a store of the same files by the same tokenizer is opened as it is.
    """
    tokenizer = ImageTokenizer.load(Path(tokenizer_dir)).to(device).eval()
    return tokenize_files(
        find_files(paths), tokenizer, Path(out_dir), views=views, batch_size=batch_size, device=device
    )


def tokenize_files(
    files: Sequence[Path],
    tokenizer: FrameTokenizer,
    out_dir: Path,
    *,
    views: Sequence[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> TokenStore:
    """`tokenize` with the tokenizer at hand."""
    source = {"files": [fingerprint(path) for path in files], "views": None if views is None else list(views)}
    manifest = read_manifest(out_dir)
    if manifest is not None and (manifest["tokenizer"], manifest["source"]) == (tokenizer.digest(), source):
        return TokenStore.open(out_dir, tokenizer.digest())
    with progress_bar(transient=True) as progress:
        bar = progress.add_task("tokenize episodes", total=sum(count_episodes(path) for path in files))
        write_store(
            out_dir,
            _episodes(files),
            tokenizer,
            views=views,
            batch_size=batch_size,
            device=device,
            source=source,
            on_episode=lambda _: progress.advance(bar),
        )
    return TokenStore.open(out_dir, tokenizer.digest())


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the demonstration files of files and directories, sorted; none at all raises ValueError."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise ValueError(
                f"{path} is no file and no directory with {PATTERN} in it: collect demonstrations first"
            )
        files += found
    return sorted(set(files), key=lambda file: (file.name, str(file)))


def fingerprint(path: Path) -> dict[str, str | int]:
    """Return name, bytes and the start of the SHA-256 of a file (about 1 GB a second)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest[:16]}


def _episodes(files: Iterable[Path]) -> Iterator[Episode]:
    for path in files:
        yield from read_episodes(path)
