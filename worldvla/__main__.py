"""`python -m worldvla VERB` is the console script `worldvla VERB`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is being imported is one line, too."""
    try:
        from worldvla.cli import main
    except KeyboardInterrupt:
        print("worldvla: interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(main())
