"""What tests of data sets that are wrong in some way have in common."""

from pathlib import Path

import pytest

from worldvla.data.sources import open_source


def check_fault(root: Path, expected: str) -> None:
    """Check that reading the data set raises one line that the pattern `expected` is in."""
    with pytest.raises(ValueError, match=expected) as error:
        list(open_source(root).episodes())
    assert "\n" not in str(error.value)
