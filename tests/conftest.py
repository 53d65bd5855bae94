"""Every test runs with a fixed seed, deterministic kernels and one thread, whatever its neighbours did."""

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _deterministic():
    """Fix the global random states and ask torch for deterministic kernels."""
    torch.manual_seed(0)
    np.random.seed(0)
    torch.use_deterministic_algorithms(True)
