"""Demonstration files (LIBERO/robomimic HDF5) -> TokenStore: every frame once through the image tokenizer.

`worldvla tokenize data/tabletop_object --tokenizer out/tokenizer --out out/store`
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from worldvla.data.episode import Episode, count_episodes, fingerprint, read_episodes
from worldvla.data.sources.source import Source
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


def tokenize_source(
    source: Source,
    tokenizer: FrameTokenizer,
    out_dir: Path,
    device: torch.device | str = "cpu",
    skip_bad: bool = False,
) -> TokenStore:
    """Write the store of a data set of another format and return it; its facts go into the manifest.

    A broken episode raises ValueError; with `skip_bad` it is left out, and the manifest tells so. Idempotent
    as `tokenize`.
    """
    root, facts = source.path, source.facts()
    prints = [fingerprint(file) | {"name": file.relative_to(root).as_posix()} for file in source.present()]
    facts, manifest = facts | {"files": prints}, read_manifest(out_dir)
    made_of, earlier = (tokenizer.digest(), tokenizer.grey_levels, facts), None
    if manifest is not None:
        origin = dict(manifest["source"])
        skipped = origin.pop("skipped", None)
        earlier = (manifest["tokenizer"], manifest.get("grey_levels"), origin)
        earlier = None if skipped and not skip_bad else earlier
    if earlier != made_of:
        faults: list[str] = []
        with progress_bar(transient=True) as progress:
            bar = progress.add_task("tokenize episodes", total=source.num_episodes)

            def sound() -> Iterator[Episode]:
                for _, episode in source.attempts(True):
                    if isinstance(episode, Episode):
                        yield episode
                    elif skip_bad:
                        faults.append(str(episode))
                        facts["skipped"] = {"count": len(faults), "faults": faults}
                    else:
                        raise episode
                    progress.advance(bar)

            write_store(out_dir, sound(), tokenizer, device=device, source=facts)
    return TokenStore.open(out_dir, tokenizer.digest())
