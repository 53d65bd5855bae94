"""Every test runs with a fixed seed, deterministic kernels and one thread, whatever its neighbours did; and
with the annotations of shapes enforced (shapes.py).
"""

from pathlib import Path

import numpy as np
import pytest
import shapes
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shapes", action="store_true", help="do not check annotations of shapes")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--no-shapes"):
        shapes.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all tests read: image tokenizer, store, a run's untrained checkpoint."""
    from tiny_run import tiny_config, write_checkpoint, write_tiny  # after shapes.install()

    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    write_checkpoint(tiny_config(path), path / "run/ckpt/step_7", 7)
    return path


@pytest.fixture(scope="session")
def checkpoint(root: Path) -> Path:
    return root / "run/ckpt/step_7"


@pytest.fixture(autouse=True)
def _deterministic():
    """Fix the global random states and ask torch for deterministic kernels."""
    torch.manual_seed(0)
    np.random.seed(0)
    torch.use_deterministic_algorithms(True)
