"""Where recordings and their transcripts come from: find out how a folder or file is laid out, and read it.

No reader decodes audio. What cannot be used of a source is named in ``Source.bad``; the rest is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vertebra.domains.speech.audio import AUDIO_ENDINGS
from vertebra.domains.speech.sources_base import BadLine, Collector, Source, list_audio
from vertebra.domains.speech.sources_corpora import (
    digits_folder,
    read_an4,
    read_audio_files,
    read_commands,
    read_digits,
    read_kaldi,
    read_librispeech,
    read_pairs,
)
from vertebra.domains.speech.sources_tables import (
    columns,
    cuts_files,
    lhotse_pairs,
    names_audio,
    read_commonvoice,
    read_lhotse,
    read_manifest,
    read_table,
)
from vertebra.domains.speech.utterance import Utterance
from vertebra.errors import DataError, UnknownNameError

__all__ = ["LAYOUTS", "BadLine", "Source", "find_layout", "read_source", "read_unlabelled"]

_READERS: dict[str, Callable[[Path, Collector], None]] = {
    "kaldi": read_kaldi,
    "an4": read_an4,
    "lhotse": read_lhotse,
    "commonvoice": read_commonvoice,
    "commands": read_commands,
    "librispeech": read_librispeech,
    "manifest": read_manifest,
    "table": read_table,
    "digits": read_digits,
    "pairs": read_pairs,
    "audio": read_audio_files,
}
LAYOUTS = tuple(_READERS)
"""Names of what can be read."""

_LOOKED_FOR = (
    "a Kaldi directory (wav.scp), AN4 (etc/*.fileids), Lhotse (*supervisions*.jsonl, *cuts*.jsonl), Common Voice "
    "(*.tsv and clips/), Speech Commands (testing_list.txt), LibriSpeech (*.trans.txt), manifests (*.jsonl), tables "
    "(*.csv, *.tsv with a column path), spoken digits (7_jackson_32.wav), and audio with or without .txt beside it"
)
_FILE_ENDINGS = {".jsonl": "manifest", ".json": "manifest", ".csv": "table", ".tsv": "table"}


def read_source(path: str | Path, layout: str = "auto", *, measure: bool = True) -> Source:
    """Read the utterances of a folder or file.

    Args:
        path: Folder or file. Paths in a manifest are relative to its folder.
        layout: One of ``LAYOUTS``, or ``auto`` to find out.
        measure: Whether to take durations that the source does not say from the headers of the audio files.

    Returns:
        Utterances, and the lines that were refused.

    Raises:
        UnknownNameError: No such layout.
        DataError: Nothing there, no layout fits, or no utterance can be used.
    """
    path = Path(path)
    if layout != "auto" and layout not in _READERS:
        raise UnknownNameError("layout of recordings", layout, ("auto", *LAYOUTS))
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder; correct the path.")
    layout = find_layout(path) if layout == "auto" else layout
    into = Collector(path, layout, measure)
    for part in _parts(path, layout):
        _READERS[layout](part, into)
    return into.done()


def read_unlabelled(paths: str | Path | Iterable[str | Path]) -> list[Utterance]:
    """List audio files without transcripts, each once.

    Files are taken as they are, and not opened; of folders, all audio files in them and below.

    Raises:
        DataError: A folder without audio.
    """
    found: dict[str, Utterance] = {}
    for each in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(each)
        files = list_audio(path) if os.path.isdir(path) else [path]
        if not files:
            raise DataError(f"{path}: there must be audio files ({_endings()}), got none; correct the path.")
        for file in files:
            found.setdefault(str(file), Utterance(id=str(file), path=file))
    return list(found.values())


def find_layout(path: Path) -> str:
    """Find out how a folder or file is laid out.

    Raises:
        DataError: In none of the ways that are known.
    """
    if not path.is_dir():
        return _file_layout(path)
    names = sorted(os.listdir(path))
    if "wav.scp" in names:
        return "kaldi"
    if "etc" in names and any((path / "etc").glob("*.fileids")):
        return "an4"
    if lhotse_pairs(path) or cuts_files(path):
        return "lhotse"
    if "clips" in names and any(n.endswith(".tsv") for n in names):
        return "commonvoice"
    if "testing_list.txt" in names or "validation_list.txt" in names:
        return "commands"
    if next(path.rglob("*.trans.txt"), None):
        return "librispeech"
    for layout in ("manifest", "table"):
        if _parts(path, layout) != [path]:
            return layout
    if digits_folder(path):
        return "digits"
    files = list_audio(path)
    if any(f.with_suffix(".txt").is_file() for f in files):
        return "pairs"
    if files:
        return "audio"
    raise DataError(f"{path}: there must be recordings, got none of: {_LOOKED_FOR}.")


def _file_layout(path: Path) -> str:
    bare = path.with_suffix("") if path.suffix == ".gz" else path
    if path.name == "wav.scp":
        return "kaldi"
    if bare.suffix.lower() in AUDIO_ENDINGS:
        return "audio"
    layout = _FILE_ENDINGS.get(bare.suffix.lower())
    if layout == "manifest" and (lhotse_pairs(path) or cuts_files(path)):
        return "lhotse"
    if layout == "table" and {"client_id", "sentence"} <= set(columns(path)):
        return "commonvoice"
    if layout is None:
        raise DataError(
            f"{path}: a source must be a folder, an audio file, wav.scp, or end in {', '.join(_FILE_ENDINGS)}, got "
            f"{path.name!r}; name another."
        )
    return layout


def _parts(path: Path, layout: str) -> list[Path]:
    """What a reader is given: of a folder of manifests or tables, each of them."""
    if layout == "kaldi" and path.name == "wav.scp":
        return [path.parent]
    if layout not in ("manifest", "table") or not path.is_dir():
        return [path]
    endings = [e for e, kind in _FILE_ENDINGS.items() if kind == layout and e != ".json"]
    files = [p for p in sorted(path.iterdir()) if p.name.removesuffix(".gz").lower().endswith(tuple(endings))]
    if layout == "table":
        files = [p for p in files if names_audio(p)]
    return files or [path]


def _endings() -> str:
    return ", ".join(sorted(AUDIO_ENDINGS))
