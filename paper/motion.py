"""Pairs of frames -> the motion between them: a probe of whether imagined frames obey the action.

A small network reads x, y, z of the executed action off two real frames, in units of an action. On imagined
frames it is then asked the same. Trained on demonstrations that are not among the clips.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldvla.data.episode import Episode
from worldvla.progress import progress_bar

NUM_DIMS = 3
"""Leading action dims that are read: x, y, z."""
STEPS, BATCH, RATE, WIDTH = 600, 64, 2e-3, 24


class Inverse(nn.Module):
    """Both frames of every view -> (B, 3)."""

    def __init__(self, views: Sequence[str]) -> None:
        super().__init__()
        self.views = list(views)
        self.towers = nn.ModuleList(self._tower() for _ in self.views)
        self.head = nn.Sequential(
            nn.Linear(64 * WIDTH * len(self.views), 128), nn.ReLU(), nn.Linear(128, NUM_DIMS)
        )

    @staticmethod
    def _tower() -> nn.Sequential:
        layers: list[nn.Module] = []
        for i, o in pairwise([9, WIDTH, 2 * WIDTH, 4 * WIDTH]):
            layers += [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def forward(self, pairs: dict[str, Tensor]) -> Tensor:
        """`pairs`: view -> uint8 (B, 2, Y, X, 3)."""
        parts = []
        for view, tower in zip(self.views, self.towers, strict=True):
            x = pairs[view].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            parts.append(tower(torch.cat((x[:, 0], x[:, 1], x[:, 1] - x[:, 0]), 1)))
        return self.head(torch.cat(parts, 1))


def train_inverse(episodes: Sequence[Episode], views: Sequence[str], seed: int = 0) -> Inverse:
    """Return the probe after STEPS batches of neighbouring frames; about a minute on one core."""
    spans = [(i, t) for i, e in enumerate(episodes) for t in range(len(e) - 1)]
    if len(spans) < BATCH:
        raise ValueError(f"the probe needs at least {BATCH} pairs of frames, got {len(spans)}: give it more")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Inverse(views)
        optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
        rng = np.random.default_rng(seed)
        with progress_bar() as progress:
            for _ in progress.track(range(STEPS), description="train the inverse-dynamics probe"):
                chosen = [spans[k] for k in rng.integers(0, len(spans), BATCH)]
                pairs = {
                    v: torch.from_numpy(np.stack([episodes[i].images[v][t : t + 2] for i, t in chosen]))
                    for v in views
                }
                truth = torch.from_numpy(np.stack([episodes[i].actions[t, :NUM_DIMS] for i, t in chosen]))
                loss = F.smooth_l1_loss(net(pairs), truth.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()


@torch.inference_mode()
def read_motion(net: Inverse, frames: dict[str, np.ndarray]) -> np.ndarray:
    """Return the motion (T, 3) that the probe reads off frames (T + 1, Y, X, 3) a view."""
    pairs = {}
    for view in net.views:
        images = torch.from_numpy(np.ascontiguousarray(frames[view]))
        pairs[view] = torch.stack((images[:-1], images[1:]), 1)
    return net(pairs).double().numpy()
