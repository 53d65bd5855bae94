"""WorldVLA: one transformer that acts as a policy and imagines as a world model; most need `load` alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from worldvla.infer.load import Model


def load(
    path: Path | str,
    device: str = "cpu",
    dtype: "torch.dtype | None" = None,
    quantize: Literal["", "int8", "int4"] = "",
) -> "Model":
    """Return the model of a checkpoint directory, the newest of a run, or one on the hub (`ORG/NAME/FOLDER`):
    `.policy().act(...)`, `.world().reset(...)`. `quantize` holds its large matrices in 8 or 4 bits.
    """
    from worldvla.infer.load import load as load_model  # torch is imported here, not with the package

    return load_model(path, device, dtype, quantize)
