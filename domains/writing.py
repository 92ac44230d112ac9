"""Files written whole: they appear under their name when they are finished, or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vertebra.errors import DataError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears as ``path`` only when the block ends well.

    Raises:
        DataError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as e:
        raise DataError(f"{path}: cannot be written ({e.strerror or e}); choose another folder.") from None
    finally:
        part.unlink(missing_ok=True)
