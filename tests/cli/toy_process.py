"""The command line in a process of its own, with the toys importable."""

import sys

from vertebra.cli import main

if __name__ == "__main__":
    sys.exit(main())
