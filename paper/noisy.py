"""A checkpoint -> weaker ones, for `worldvla rank`: noise on the weights of its blocks.

    python -m paper.noisy CHECKPOINT --levels 0.2 0.4 --out out/noisy

Level 0.2 adds normal noise of 0.2 times each matrix's spread; out/noisy/noise_0.2 is the checkpoint.
"""

import shutil
from pathlib import Path

import torch
import tyro

from worldvla.files import load_tensors, read_json, save_tensors, whole_folder, write_digests, write_json
from worldvla.model.weights import find_checkpoint, is_block_matrix
from worldvla.published.hub import locate


def main(checkpoint: tyro.conf.Positional[Path], levels: tuple[float, ...], out: Path, seed: int = 0) -> None:
    """Write a weaker checkpoint for each level."""
    source = find_checkpoint(locate(checkpoint))
    for level in levels:
        generator = torch.Generator().manual_seed(seed)
        tensors = load_tensors(source / "model.safetensors")
        for name, tensor in sorted(tensors.items()):
            if is_block_matrix(name, tensor.shape):
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
                tensors[name] = (tensor.float() + level * noise).to(tensor.dtype)
        with whole_folder(out / f"noise_{level:g}", "model.safetensors") as scratch:
            shutil.copytree(source, scratch, dirs_exist_ok=True)
            save_tensors(scratch / "model.safetensors", tensors)
            config = read_json(scratch / "config.json")
            write_json(scratch / "config.json", config | {"name": f"{config['name']}_noise_{level:g}"})
            write_digests(scratch)


if __name__ == "__main__":
    tyro.cli(main)
