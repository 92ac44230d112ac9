"""What a reader of transcribed recordings makes of each line or file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A recording, or a part of one, with what is known about it.

    Args:
        id: Name, unique in its source.
        path: The audio file.
        start: Where the utterance begins, in seconds.
        duration: How long it is, in seconds; None for up to the end of the file.
        text: The transcript as it is written in the source; None where there is none.
        language: ISO 639-3, or whatever the source says; empty when unknown.
        task: ``asr``, or ``st_deu`` for translation into German.
        translation: The target of a translation; empty otherwise.
        speaker: Who speaks; empty when unknown.
        previous: Text that came before, as a prompt; empty for none.
        split: ``train``, ``val`` or ``test`` where the source says so; empty otherwise.
        line: Line of the manifest, counted from 1; None where there is no manifest.
    """

    id: str
    path: Path
    start: float = 0.0
    duration: float | None = None
    text: str | None = None
    language: str = ""
    task: str = "asr"
    translation: str = ""
    speaker: str = ""
    previous: str = ""
    split: str = ""
    line: int | None = None
