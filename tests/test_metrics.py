"""Validation numbers by hand: the error of a chunk's first action and of its whole motion.

Run: pytest tests/test_metrics.py
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from worldvla.batch import KIND_ACTION
from worldvla.train.loss import Targets
from worldvla.train.metrics import ActionScale, greedy
from worldvla.vocab import compact


class Echo:
    """A model whose hidden states are the scores of the action codes themselves."""

    def logits(self, x_PD: Tensor, ids: range) -> Tensor:
        assert len(ids) == x_PD.shape[1]
        return x_PD


def test_errors_of_the_first_action_and_of_the_whole_chunk() -> None:
    vocab, num_codes = compact(8, 8), 256
    scale = ActionScale(torch.arange(num_codes) / 100.0, torch.full((7,), 0.10), chunk=2)
    truth_UA = torch.full((2, 7), 10)
    guess_UA = truth_UA.clone()
    guess_UA[0, 0] += 3  # x: 0.03 too far, then
    guess_UA[1, 0] -= 3  # as much back: the chunk ends in the right place
    guess_UA[:, 1] += 2  # y: 0.02 too far twice
    truth_UA[1, 2] = guess_UA[1, 2] = 15
    ids_P = truth_UA.flatten() + vocab.action.start
    values_N = guess_UA.flatten() / 100.0 + 0.01
    targets = Targets(torch.arange(14), ids_P, torch.full((14,), KIND_ACTION), values_N)
    model: Any = Echo()
    found = greedy(model, vocab, F.one_hot(guess_UA.flatten(), num_codes).float(), targets, scale)
    assert found["action_l1"].flatten().tolist() == pytest.approx([0.01] * 14, abs=1e-6)
    assert found["first_x_l1"].item() == pytest.approx(0.03)
    assert found["end_xyz_l1"].tolist()[0] == pytest.approx([0.0, 0.04, 0.0], abs=1e-6)
    assert found["still_xyz_l1"].tolist()[0] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert found["still_end_xyz_l1"].tolist()[0] == pytest.approx([0.0, 0.0, 0.05], abs=1e-6)
