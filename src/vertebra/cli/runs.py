"""Run folders ``ROOT/<recipe>/<number>``, their ``latest`` link, and the checkpoints in them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vertebra.errors import ConfigError, LoadError

log = logging.getLogger("vertebra")
LAST, BEST = "last.ckpt", "best.ckpt"
INITIAL = "initial.txt"
"""What became of the weights that a training began with."""


def next_folder(parent: Path) -> Path:
    """Path of the run folder after the highest number in ``parent``; makes nothing."""
    numbers = [int(p.name) for p in parent.iterdir() if p.name.isdecimal()] if parent.is_dir() else []
    return parent / str(max(numbers, default=0) + 1)


def create_folder(folder: Path) -> Path:
    """Make a run folder, or the next free one where another run was faster, and point ``latest`` at it.

    Raises:
        ConfigError: The place cannot be written.
    """
    try:
        while True:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                if not folder.parent.is_dir():
                    raise
                folder = next_folder(folder.parent)
        point_latest(folder)
    except OSError as e:
        raise ConfigError(
            f"run folder {folder} cannot be made ({e.strerror}); choose another place with --root DIR."
        ) from e
    return folder


def point_latest(folder: Path) -> None:
    """Let the link ``latest`` beside ``folder`` point at it, where the file system has links."""
    fresh = folder.parent / f".latest.{os.getpid()}"
    try:
        fresh.symlink_to(folder.name, target_is_directory=True)
        fresh.replace(folder.parent / "latest")
    except OSError as e:
        fresh.unlink(missing_ok=True)
        log.info("no link %s was made (%s)", folder.parent / "latest", e.strerror)


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder a checkpoint file lies in, or None."""
    folder = checkpoint.parent.parent
    if folder.is_symlink():  # `latest`
        folder = folder.parent / os.readlink(folder)
    inside = checkpoint.parent.name == "checkpoints" and (folder / "config.yaml").is_file()
    return folder if inside else None


def find_checkpoint(place: str, verb: str) -> Path:
    """Return the file that ``--ckpt_path PLACE`` means: itself, or the fitting one of a run folder.

    Args:
        place: A checkpoint file or a run folder.
        verb: ``fit`` goes on with the last checkpoint, the others take the best.

    Raises:
        LoadError: There is no checkpoint.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise LoadError(f"--ckpt_path: no file or run folder {place!r}.")
    if path.name == "checkpoints":
        path = path.parent
    for name in (LAST, BEST) if verb == "fit" else (BEST, LAST):
        if (found := path / "checkpoints" / name).is_file():
            return found
    if (path / "config.json").is_file():
        raise LoadError(
            f"--ckpt_path: {place!r} is a model directory, which holds weights only; use it with `vertebra run`, or "
            f"start training from it with --model.init_from {place}."
        )
    raise LoadError(f"--ckpt_path: the folder {place!r} holds no checkpoint; a run folder has checkpoints/{LAST}.")


def whole_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
