"""Manifests with a record a line: JSONL, CSV, TSV, JSON, Common Voice, Lhotse."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from vertebra.domains.speech.sources_base import Collector, read_lines, read_text, split_of
from vertebra.errors import DataError

# What a field of a record may be called.
_NAMES = {
    "path": ("path", "audio_filepath", "file_name", "audio", "file"),
    "id": ("id", "utt_id", "key"),
    "text": ("text", "transcript", "transcription", "sentence"),
    "start": ("start", "offset"),
    "end": ("end",),
    "duration": ("duration",),
    "language": ("language", "lang"),
    "speaker": ("speaker", "speaker_id"),
    "split": ("split",),
    "task": ("task",),
    "translation": ("translation",),
    "previous": ("previous", "prev_text"),
}
_TIMES = ("start", "end", "duration")


def add_record(record: Any, file: Path, line: int, into: Collector, split: str = "") -> None:
    """Make an utterance of one record of a manifest; paths are relative to its folder."""
    if not isinstance(record, dict):
        return into.refuse(file, line, f"a line must be a JSON object, got {type(record).__name__}", "mend the line")
    values: dict[str, Any] = {}
    for field, names in _NAMES.items():
        found = next((record[n] for n in names if record.get(n) is not None), None)
        if found is None:
            continue
        if field not in _TIMES and not isinstance(found, str):
            if field not in ("id", "speaker", "text") or not isinstance(found, int) or isinstance(found, bool):
                return into.refuse(file, line, f"{field} must be text, got {found!r}", "mend the line")
            found = str(found)
        values[field] = found
    name = values.pop("path", "").strip()
    if not name:
        found = ", ".join(map(str, record)) or "nothing"
        return into.refuse(file, line, f"there must be a path (or audio_filepath), got {found}", "add it")
    path = Path(file.parent, name)
    task = values.pop("task", "").strip() or "asr"
    start = values.get("start")
    made = name if start in (None, "", 0) else f"{name}@{start}"
    return into.add(
        file,
        line,
        name=values.pop("id", "") or made,
        path=path,
        split=(values.pop("split", "").strip() or split),
        task=task,
        **{k: v.strip() if isinstance(v, str) else v for k, v in values.items()},
    )


# ---------------------------------------------------------------- JSON lines


def read_manifest(file: Path, into: Collector) -> None:
    """A JSON object a line, as NeMo and ESPnet write them; or one list of objects in a ``.json``."""
    split = split_of(file.name)
    for line, record in records(file, into):
        add_record(record, file, line, into, split)


def records(file: Path, into: Collector) -> Iterator[tuple[int, Any]]:
    """JSON values of a file, with their lines (with their places in a list)."""
    if ".json" in file.suffixes and (text := read_text(file)).lstrip()[:1] == "[":
        try:
            yield from enumerate(json.loads(text), 1)
        except ValueError as e:
            raise DataError(f"{file}: this must be a list of JSON objects ({e}); mend it.") from None
        return
    for line, text in read_lines(file, into):
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError) as e:
            into.refuse(file, line, f"the line must be JSON ({e})", "mend the line")


# ---------------------------------------------------------------- tables


def rows(file: Path, into: Collector, *, quoted: bool = True) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV or TSV with a header, with their lines; rows with other columns than the header are refused."""
    text = read_text(file)
    tabs = "\t" in text.partition("\n")[0]
    if quoted:
        reader = csv.DictReader(StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    else:
        reader = csv.DictReader(StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            into.refuse(file, reader.line_num, f"this is not a row of a table ({e})", "mend the line")
            continue
        if None in row or None in row.values():
            into.refuse(
                file,
                reader.line_num,
                f"a row must have the {len(reader.fieldnames or ())} columns of the header, got another number",
                "mend the line",
            )
            continue
        yield reader.line_num, {str(k).strip(): v for k, v in row.items()}


def names_audio(file: Path) -> bool:
    """Whether a table has a column with the audio files."""
    return bool(set(_NAMES["path"]) & set(columns(file)))


def columns(file: Path) -> list[str]:
    """Names in the first line of a CSV or TSV."""
    first = read_text(file).partition("\n")[0]
    return [c.strip().strip('"') for c in first.split("\t" if "\t" in first else ",")]


def read_table(file: Path, into: Collector) -> None:
    """A CSV or TSV with the columns ``path`` and, as they are there, the other fields of an utterance."""
    if not names_audio(file):
        raise DataError(f"{file}: there must be a column 'path', got {', '.join(columns(file))}; rename the column.")
    split = split_of(file.name)
    for line, row in rows(file, into):
        add_record({k: v for k, v in row.items() if v.strip()} | _texts(row), file, line, into, split)


def _texts(row: dict[str, str]) -> dict[str, str]:
    """Transcripts also where they are empty: silence is said by that."""
    return {k: row[k] for k in _NAMES["text"] if k in row}


# ---------------------------------------------------------------- Common Voice


def read_commonvoice(path: Path, into: Collector) -> None:
    """Common Voice: ``train.tsv``, ``dev.tsv``, ``test.tsv`` (or one of others), and ``clips/`` beside it."""
    files = [path]
    if path.is_dir():
        files = [f for n in ("train", "dev", "test") if (f := path / f"{n}.tsv").is_file()]
        files = files or [f for n in ("validated", "other") if (f := path / f"{n}.tsv").is_file()][:1]
        if not files:
            raise DataError(f"{path}: Common Voice must have train.tsv, dev.tsv, test.tsv or validated.tsv, got none.")
    root = files[0].parent
    lengths: dict[str, float] = {}
    if (table := root / "clip_durations.tsv").is_file():
        for line, row in rows(table, into, quoted=False):
            clip, value = row.get("clip", ""), row.get("duration[ms]", "")
            if value.isdecimal():
                lengths[clip] = int(value) / 1000
            else:
                into.refuse(table, line, f"duration[ms] must be a whole number, got {value!r}", "download it again")
    for file in files:
        found = columns(file)
        if not {"path", "sentence"} <= set(found):
            raise DataError(f"{file}: Common Voice must have the columns path and sentence, got {', '.join(found)}.")
        for line, row in rows(file, into, quoted=False):
            name = row["path"].strip()
            name = name if Path(name).suffix else name + ".mp3"  # early releases leave the ending out
            into.add(
                file,
                line,
                name=Path(name).stem,
                path=root / "clips" / name,
                duration=lengths.get(name),
                text=row["sentence"].strip(),
                language=row.get("locale", ""),
                speaker=row.get("client_id", ""),
                split=file.stem if file.stem in ("train", "dev", "test") else "",
            )


# ---------------------------------------------------------------- Lhotse


def lhotse_pairs(path: Path) -> list[tuple[Path, Path]]:
    """Files of recordings, each with that of its supervisions."""
    files = sorted(path.glob("*supervisions*.jsonl*")) if path.is_dir() else [path]
    pairs = []
    for file in files:
        name = file.name.replace("recordings", "supervisions")
        recordings = file.with_name(name.replace("supervisions", "recordings"))
        if name != recordings.name and recordings.is_file() and file.with_name(name).is_file():
            pairs.append((recordings, file.with_name(name)))
    return pairs


def cuts_files(path: Path) -> list[Path]:
    """Files of cuts in a folder, or the file itself where it is called as one."""
    if path.is_dir():
        return sorted(path.glob("*cuts*.jsonl*"))
    return [path] if "cuts" in path.name else []


def read_lhotse(path: Path, into: Collector) -> None:
    """Lhotse: ``*recordings*.jsonl[.gz]`` with ``*supervisions*.jsonl[.gz]``, or ``*cuts*.jsonl[.gz]``.

    Each supervision is an utterance. Sources that run commands are refused, and so are recordings that are transformed.
    """
    pairs = lhotse_pairs(path)
    cuts = [] if pairs else cuts_files(path)
    if not pairs and not cuts:
        raise DataError(
            f"{path}: Lhotse must have a file of recordings and one of supervisions of the same name, or one of cuts, "
            "got none."
        )
    for first, second in pairs:
        known: dict[Any, tuple[Path, Any]] = {}
        for line, record in records(first, into):
            if found := _recording(record, first, line, into):
                known[record["id"]] = found
        for line, record in records(second, into):
            recording = record.get("recording_id") if isinstance(record, dict) else None
            if not isinstance(recording, str):
                into.refuse(second, line, "a supervision must have an id and a recording_id", "mend it")
            elif recording not in known:
                into.refuse(second, line, f"there must be a recording {recording!r}, got none", "add it, or mend it")
            else:
                _add_supervision(record, known[recording], 0.0, second, line, into)
    for file in cuts:
        for line, cut in records(file, into):
            recorded = cut.get("recording") if isinstance(cut, dict) else None
            if not isinstance(recorded, dict) or not isinstance(start := cut.get("start", 0), int | float):
                into.refuse(file, line, "a cut must have a recording and a start", "save the cuts with recordings")
                continue
            if found := _recording(recorded, file, line, into):
                parts = cut.get("supervisions") or [{k: cut.get(k) for k in ("id", "duration", "channel")}]
                for part in parts if isinstance(parts, list) else [parts]:
                    _add_supervision(part, found, start, file, line, into)


def _recording(record: Any, file: Path, line: int, into: Collector) -> tuple[Path, Any] | None:
    """File and duration of a recording; None where it was refused."""
    try:
        (source,) = record["sources"]
        kind, name = source["type"], str(source["source"])
        str(record["id"])
    except (KeyError, TypeError, ValueError):
        into.refuse(file, line, "a recording must have an id and one source with type and source", "mend it")
        return None
    if kind != "file":
        into.refuse(file, line, f"a source must be a file, got {kind!r}", "save it to one")
        return None
    if record.get("transforms"):
        into.refuse(file, line, "a recording must have no transforms, got some", "save the audio as it sounds")
        return None
    return Path(file.parent, name), record.get("duration")


def _add_supervision(
    record: Any, recording: tuple[Path, Any], offset: float, file: Path, line: int, into: Collector
) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        return into.refuse(file, line, "a supervision must have an id and a recording_id", "mend it")
    channel = record.get("channel") or 0
    if channel not in (0, [0]):
        return into.refuse(file, line, f"channel must be 0, got {channel}", "split the channels into files")
    path, whole = recording
    start, duration = record.get("start") or 0, record.get("duration")
    text = record.get("text")
    return into.add(
        file,
        line,
        name=record["id"],
        path=path,
        start=start + offset if isinstance(start, int | float) else start,
        duration=whole if duration is None and start == offset == 0 else duration,
        text=text if text is None else str(text),
        language=str(record.get("language") or ""),
        speaker=str(record.get("speaker") or ""),
        split=split_of(file.name),
    )
