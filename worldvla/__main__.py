"""`python -m worldvla VERB` is the console script `worldvla VERB`."""

import sys

from worldvla.cli import main

if __name__ == "__main__":
    sys.exit(main())
