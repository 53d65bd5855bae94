"""Stand-ins for tests of the data side: codes that are pixel sums, random episodes."""

import numpy as np
import torch
from torch import Tensor

from worldvla.data.episode import Episode


class PixelSums:
    """The code of a patch is the sum of its first pixel modulo `num_codes`; `seen` counts frames."""

    grey_levels = "float32"

    def __init__(self, factor: int = 2, num_codes: int = 64, name: str = "stub") -> None:
        self.factor, self.num_codes, self.name, self.seen = factor, num_codes, name, 0

    def encode(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[:, :: self.factor, :: self.factor].to(torch.int64).sum(-1) % self.num_codes

    def digest(self) -> str:
        return self.name


def random_episode(seed: int, length: int = 9, views: tuple[str, ...] = ("agentview", "wrist")) -> Episode:
    """Return an episode of noise; the instruction is one of three, the side of the views is 6, 4, ..."""
    rng = np.random.default_rng(seed)
    sides = {view: 6 - 2 * i for i, view in enumerate(views)}
    return Episode(
        instruction=("pick up the cube", "open the drawer", "press it")[seed % 3],
        suite="stub",
        task=f"task_{seed % 3}",
        actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        states=rng.normal(size=(length, 8)).astype(np.float32),
        images={
            v: rng.integers(0, 256, (length, side, side, 3), dtype=np.uint8) for v, side in sides.items()
        },
        sim_states=np.zeros((length, 2)),
        is_expert=rng.random(length) > 0.1,
        init=seed,
        seed=0,
    )
