"""Demonstration files (LIBERO/robomimic HDF5) -> TokenStore: every frame once through the image tokenizer.

`worldvla tokenize data/tabletop_object --tokenizer out/tokenizer --out out/store`
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from worldvla.data.episode import count_episodes, fingerprint, read_episodes
from worldvla.data.store import FrameTokenizer, TokenStore, read_manifest, write_store
from worldvla.progress import progress_bar


def tokenize(
    files: Iterable[Path], tokenizer: FrameTokenizer, out_dir: Path, device: torch.device | str = "cpu"
) -> TokenStore:
    """Write the store of all episodes in `files` and return it.

    Idempotent: a store of the same files by the same tokenizer is opened as it is.
    """
    files = sorted(set(files), key=lambda file: (file.name, str(file)))
    prints, manifest = [fingerprint(path) for path in files], read_manifest(out_dir)
    made_of, earlier = (tokenizer.digest(), tokenizer.grey_levels, prints), None
    if manifest is not None:  # before stores named the rule of grey levels, it was float32
        rule = manifest.get("grey_levels", "float32")
        earlier = manifest["tokenizer"], rule, manifest["source"].get("files")
    if earlier != made_of:
        with progress_bar(transient=True) as progress:
            bar = progress.add_task("tokenize episodes", total=sum(count_episodes(path) for path in files))
            write_store(
                out_dir,
                (episode for path in files for episode in read_episodes(path)),
                tokenizer,
                device=device,
                source={"files": prints},
                on_episode=lambda _: progress.advance(bar),
            )
    return TokenStore.open(out_dir, tokenizer.digest())
