"""Write tests/golden/loss.txt and mask.txt anew.

python tests/golden_train.py
"""

import tempfile
from pathlib import Path

import test_mask
import test_train
from tiny_run import write_tiny


def main() -> None:
    test_mask.GOLDEN.write_text(test_mask.draw())
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_tiny(root)
        losses = test_train.golden_losses(root, root / "run")
    test_train.GOLDEN.write_text("".join(f"{step} {loss:.7f}\n" for step, loss in enumerate(losses, 1)))


if __name__ == "__main__":
    main()
