"""Two checkpoints of one shape -> one with weights between theirs (model soups, arXiv 2203.05482).

    python -m paper.average BEFORE AFTER --out out/average --share 0.5

AFTER was trained on from BEFORE; all but the weights is AFTER's. `share`: how much of AFTER.
"""

import shutil
from pathlib import Path

import tyro

from worldvla.files import load_tensors, read_json, save_tensors, whole_folder, write_digests, write_json
from worldvla.infer.model import FILES, IMAGE_FILES, WEIGHTS
from worldvla.model.weights import find_checkpoint, weights_digest
from worldvla.published.hub import locate


def main(
    before: tyro.conf.Positional[Path], after: tyro.conf.Positional[Path], out: Path, share: float = 0.5
) -> None:
    """Write the checkpoint between two; others than of one shape raise ValueError."""
    sources = [find_checkpoint(locate(path)) for path in (before, after)]
    old, new = (load_tensors(source / WEIGHTS) for source in sources)
    if {name: t.shape for name, t in old.items()} != {name: t.shape for name, t in new.items()}:
        raise ValueError(f"{before} and {after} are of other shapes: give one trained on from the other")
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share from 0 to 1, got {share}")
    with whole_folder(out, WEIGHTS) as scratch:
        (scratch / "image_tokenizer").mkdir()
        for name in (*FILES, *IMAGE_FILES):
            shutil.copyfile(sources[1] / name, scratch / name)
        mean = {name: ((1 - share) * old[name].float() + share * new[name].float()) for name in new}
        save_tensors(scratch / WEIGHTS, {name: t.to(new[name].dtype) for name, t in mean.items()})
        average = {"of": [weights_digest(source) for source in sources], "share": share}
        manifest = read_json(scratch / "manifest.json") | {"average": average}
        write_json(scratch / "manifest.json", manifest)
        write_digests(scratch)


if __name__ == "__main__":
    tyro.cli(main)
