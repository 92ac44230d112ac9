"""Demonstrations as records of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vertebra.pipelines.base import Bad
from vertebra.pipelines.files import BadRecord

if TYPE_CHECKING:
    from vertebra.domains.action.episodes import Demonstrations


def read_even(
    path: Path,
    bad: Bad,
    notes: list[str],
    *,
    fps: float | None,
    state: str | Sequence[str] | None,
    action: str | None,
    cameras: Sequence[str],
    unknown_actions: Sequence[str] = (),
) -> Demonstrations:
    """Read the episodes of a file or folder, each on an even grid of time.

    Args:
        path: What ``read_demonstrations`` reads.
        bad: Told of each episode and file that is lost.
        notes: What was mended is added here.
        fps: Steps a second, for files that do not say.
        state: Where files keep the states.
        action: Where files keep the actions.
        cameras: Whose pictures are wanted.
        unknown_actions: As of ``read_demonstrations``.

    Raises:
        DataError: Nothing can be read.
    """
    from vertebra.domains.action.data import even
    from vertebra.domains.action.sources import read_demonstrations

    found = read_demonstrations(
        [path], fps=fps, state=state, action=action, cameras=cameras, unknown_actions=unknown_actions
    )
    kept = {f"{episode.source or 'episode'}: {episode.name}" for episode in found.episodes}
    kept |= {str(path), str(path / "meta" / "info.json")}
    whole, told = even(found)
    for left in told:
        if left.source in kept:
            notes.append(str(left))
        else:
            file, _, name = left.source.partition(": ")
            bad(BadRecord(file=file, record=name, line=None, rule=left.rule, advice=left.advice))
    return whole
