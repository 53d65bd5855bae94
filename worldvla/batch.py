"""Sample and Batch: the contract between the data side and the model. The model sees nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

KIND_PROMPT = 0
"""Not a target: text, state, prompt images, the conditioning action."""
KIND_ACTION = 1
"""A target of the policy: action dims, their begin and end, the closing separator."""
KIND_IMAGE = 2
"""A target of the world model that is an image code."""
KIND_LAYOUT = 3
"""A target of the world model that is structure: begin, grid, newline, end, the closing separator."""
KIND_STATE = 4
"""A target of the world model that is a state dim (layout.world_state)."""


@dataclass(frozen=True)
class Sample:
    """One training sequence. All arrays are 1-D with the same length T.

    ids: int64, joint-vocabulary ids.
    chunk: int16, k >= 1 on every token of the k-th action block of a chunk under the selective mask; -t
    on the positions from which the t-th frame asked for is predicted, with layout.frame_at_once; else 0.
    kind: uint8, what ids[i] is as a target (predicted from position i - 1).
    row, col: int16, 1-based place of an image code in the grids of all views stacked, 0 elsewhere.
    """

    ids: np.ndarray
    chunk: np.ndarray
    kind: np.ndarray
    row: np.ndarray
    col: np.ndarray

    def __post_init__(self) -> None:
        lengths = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        assert len(set(lengths.values())) == 1, lengths

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Right-padded samples, int64 (B, T) each; padding has kind 0 and the pad id, so causality alone keeps
    it harmless.

    value_BT: float32, of an action dim that is a target its value in [-1, 1] before it became a bin; NaN
    elsewhere, and everywhere in a batch that was stacked from samples. wrong_BT: ids as the model reads them,
    some of them wrong (train/corruption.py); None: the right ones.
    """

    ids_BT: Tensor
    chunk_BT: Tensor
    kind_BT: Tensor
    row_BT: Tensor
    col_BT: Tensor
    value_BT: Tensor
    wrong_BT: Tensor | None = None

    @property
    def read_BT(self) -> Tensor:
        """Ids as the model reads them."""
        return self.ids_BT if self.wrong_BT is None else self.wrong_BT

    @classmethod
    def stack(cls, samples: Sequence[Sample], pad: int) -> Self:
        """Pad to the longest."""
        out = {}
        for f in fields(Sample):
            rows = [torch.from_numpy(getattr(sample, f.name).astype(np.int64)) for sample in samples]
            out[f.name + "_BT"] = pad_sequence(rows, True, pad if f.name == "ids" else 0)
        return cls(**out, value_BT=torch.full(out["ids_BT"].shape, torch.nan))

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a batch of the changed tensors, such as some of the rows: `batch.map(lambda t: t[rows])`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: change(t) for name, t in tensors.items() if t is not None})
