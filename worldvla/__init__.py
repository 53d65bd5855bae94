"""WorldVLA: one transformer that acts as a policy and imagines as a world model; most need `load` alone.

model = worldvla.load("out/train/tabletop")
actions = model.policy().act(observation)
world = model.world(); world.reset(observation); frame = world.step(actions[0])
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch is imported by what is called, not with the package
    import torch

    from worldvla.infer.model import Model
    from worldvla.infer.policy import Policy
    from worldvla.infer.world import World


@dataclass(frozen=True)
class WorldVLA:
    """A loaded checkpoint and its two uses; `model` has the weights, the vocabulary and the tokenizers."""

    model: "Model"

    def policy(self, head: Literal["discrete", "continuous"] = "discrete") -> "Policy":
        """Return what acts: by action tokens, or by the continuous head of a model that has one."""
        from worldvla.infer.policy import Policy

        return Policy(self.model, head)

    def world(self, speculative: bool = True) -> "World":
        """Return what imagines; without `speculative` decoding it takes one model pass a code."""
        from worldvla.infer.world import World

        return World(self.model, speculative)

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """View -> (rows, columns) in pixels of the images that the model reads."""
        return self.model.view_sizes


def load(
    path: Path | str,
    device: str = "cpu",
    dtype: "torch.dtype | None" = None,
    quantize: Literal["", "int8", "int4"] = "",
) -> WorldVLA:
    """Return a checkpoint directory, the newest of a run, or one on the hub (`ORG/NAME/FOLDER`).

    `quantize` holds its large matrices in 8 or 4 bits.
    """
    from worldvla.infer.model import load as load_model

    return WorldVLA(load_model(path, device, dtype, quantize))
