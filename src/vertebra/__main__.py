"""``python -m vertebra``."""

from vertebra.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
