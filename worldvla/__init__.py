"""WorldVLA: one transformer that acts as a policy and imagines as a world model. `load` is all that most
users need.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worldvla.infer.load import Model


def load(path: Path | str, device: str = "cpu") -> "Model":
    """Return the model of a checkpoint directory, or the newest of a run: `.policy().act(...)`,
    `.world().reset(...)`.
    """
    from worldvla.infer.load import load as load_model  # torch is imported here, not with the package

    return load_model(path, device)
