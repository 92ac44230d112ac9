"""Transcripts in the formats of subtitles, of scoring tools and of Praat, and the writer of the speech pipelines."""

from __future__ import annotations

import csv
import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vertebra.errors import ConfigError
from vertebra.pipelines.base import Item, Writer
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from vertebra.domains.speech.transcript import Segment, Transcript, Word

LINE = 42
"""Characters of a subtitle's line that are read at a glance; longer text takes two."""


def to_txt(transcript: Transcript) -> str:
    """Return the text in one line."""
    return _one_line(transcript.text) + "\n"


def to_dict(transcript: Transcript) -> dict[str, Any]:
    """Return file, duration, text, and segments with their words; times in seconds, to the millisecond."""
    return {
        "file": transcript.file,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "segments": [
            {**_timed(s), "language": s.language, "task": s.task, "words": [_timed(w) for w in s.words]}
            for s in transcript.segments
        ],
    }


def to_jsonl(transcript: Transcript) -> str:
    """Return ``to_dict`` as one line of JSON."""
    return json.dumps(to_dict(transcript), ensure_ascii=False) + "\n"


def to_json(transcript: Transcript) -> str:
    """Return a list that holds ``to_dict``, as indented JSON."""
    return json.dumps([to_dict(transcript)], ensure_ascii=False, indent=2) + "\n"


def to_srt(transcript: Transcript) -> str:
    """Return SubRip subtitles, one a segment, none of which overlap."""
    spans = _apart(transcript.segments)
    cues = (
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{_two_lines(segment.text).replace('-->', '->')}\n"
        for number, (segment, (start, end)) in enumerate(zip(transcript.segments, spans, strict=True), 1)
    )
    return "\n".join(cues)


def to_vtt(transcript: Transcript) -> str:
    """Return WebVTT subtitles, one a segment, none of which overlap."""
    spans = _apart(transcript.segments)
    cues = (
        # Escaping leaves no arrow, which a cue must not contain.
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{html.escape(_two_lines(segment.text), quote=False)}\n"
        for segment, (start, end) in zip(transcript.segments, spans, strict=True)
    )
    return "\n".join(["WEBVTT\n", *cues])


def to_ctm(transcript: Transcript, name: str | None = None) -> str:
    """Return NIST CTM: a line a word of file, channel (1), start, duration, word and confidence.

    Args:
        transcript: The transcript.
        name: First field; None for the file's name without folder and ending. White space in it becomes ``_``.
    """
    file = "_".join((name or recording_name(transcript)).split())
    if file.startswith(";;"):  # would be a comment
        file = "_" + file
    lines = []
    for word in transcript.words:
        start = _milliseconds(word.start)
        length = max(_milliseconds(word.end) - start, 0)
        confidence = min(max(word.confidence, 0.0), 1.0)
        text = "_".join(word.text.split())
        lines.append(f"{file} 1 {start / 1000:.3f} {length / 1000:.3f} {text} {confidence:.4f}\n")
    return "".join(lines)


def to_textgrid(transcript: Transcript) -> str:
    """Return a TextGrid of Praat, long format, with the interval tiers ``words`` and ``segments``.

    Intervals without text fill what lies between. Where words overlap, the earlier one ends with the later one's begin.
    """
    count = max(len(transcript.words), 1)  # a millisecond each, at the least
    end = max(_milliseconds(transcript.duration), count)
    tiers = [_tier("words", transcript.words, end), _tier("segments", transcript.segments, end)]
    lines = [
        'File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0 ", f"xmax = {_seconds(end)} ",
        "tiers? <exists> ", f"size = {len(tiers)} ", "item []: ",
    ]  # fmt: skip
    for number, tier in enumerate(tiers, 1):
        lines += [f"    item [{number}]:", *tier]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Transcript], str]] = {
    ".jsonl": to_jsonl,
    ".txt": to_txt,
    ".json": to_json,
    ".ctm": to_ctm,
    ".srt": to_srt,
    ".vtt": to_vtt,
    ".TextGrid": to_textgrid,
}
"""Ending of a file to the function that writes a transcript in its format."""

PER_RECORDING = (".srt", ".vtt", ".TextGrid")
"""Formats that hold one recording a file."""


class TranscriptWriter(Writer):
    """Writes transcripts in one or several formats.

    ``OUT`` is the output without its ending. ``OUT.jsonl``, ``OUT.json`` (a list), ``OUT.ctm`` and ``OUT.txt`` hold all
    recordings; in the last, lines begin with the file and a tab where there are several. One recording gives
    ``OUT.srt``, ``OUT.vtt`` and ``OUT.TextGrid``; of several, each gets its own in a folder, as in
    ``OUT.files/NAME.srt``, and the table ``OUT.files.csv`` says which file is whose. Names are those of the recordings;
    of two ``x.wav`` in different folders, the second is called ``x-2`` there and in CTM.

    Args:
        outputs: Where to write; the ending of the target is the first format.
        formats: Further endings.
        several: Whether there are several recordings.

    Raises:
        ConfigError: No such format, or the folder holds files of someone else.
    """

    def __init__(self, outputs: Outputs, formats: tuple[str, ...] = (), *, several: bool = False) -> None:
        self.outputs, self.several = outputs, several
        endings = tuple(dict.fromkeys((outputs.target.suffix, *formats)))
        for ending in endings:
            if ending not in FORMATS:
                raise ConfigError(f"transcripts: formats must be among {', '.join(FORMATS)}, got {ending!r}.")
        self.single = tuple(e for e in endings if e in PER_RECORDING)
        self.names: set[str] = set()
        self.count = 0
        self.index: Any = None
        if several and self.single:
            table = outputs.target.with_suffix(".files.csv")
            earlier = _written_before(table)
            self.folder = outputs.folder(outputs.target.with_suffix(".files"), earlier)
        self.streams: dict[str, IO[str]] = {
            e: outputs.open(outputs.target.with_suffix(e)) for e in endings if e not in PER_RECORDING
        }
        if several and self.single:
            self.index = csv.writer(outputs.open(table), lineterminator="\n")
            self.index.writerow(["recording", "file"])

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write the ``transcript`` of one recording."""
        transcript: Transcript = prediction.transcript  # type: ignore[attr-defined]
        self.count += 1
        if self.count > 1 and not self.several and self.single:
            raise ConfigError(
                f"transcripts: {self.single[0]} holds one recording and there are more; write .jsonl instead."
            )
        name = self._name(transcript)
        for ending, stream in self.streams.items():
            stream.write(self._text(ending, transcript, name))
        for ending in self.single:
            data = FORMATS[ending](transcript).encode()
            if self.index is None:
                self.outputs.write(self.outputs.target.with_suffix(ending), data)
            else:
                self.outputs.write(self.folder / (name + ending), data)
                self.index.writerow([transcript.file, f"{self.folder.name}/{name}{ending}"])

    def finish(self) -> None:
        """Close the list of ``OUT.json``."""
        if (stream := self.streams.get(".json")) is not None:
            stream.write("\n]\n" if self.count else "[]\n")

    def _name(self, transcript: Transcript) -> str:
        """Name of a recording that no other one of this run has, whatever its case."""
        stem = recording_name(transcript)
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = next(n for n in names if n.casefold() not in self.names)
        self.names.add(name.casefold())
        return name

    def _text(self, ending: str, transcript: Transcript, name: str) -> str:
        if ending == ".json":
            return ("[\n" if self.count == 1 else ",\n") + json.dumps(to_dict(transcript), ensure_ascii=False)
        if ending == ".ctm":
            return to_ctm(transcript, name)
        if ending == ".txt" and self.several:
            return f"{_one_line(transcript.file)}\t{to_txt(transcript)}"
        return FORMATS[ending](transcript)


def recording_name(transcript: Transcript) -> str:
    """Name of the file without folder and ending."""
    return Path(transcript.file).stem or "recording"


def _timed(part: Word | Segment) -> dict[str, Any]:
    start, end = round(part.start, 3), round(part.end, 3)
    return {"text": part.text, "start": start, "end": max(start, end), "confidence": round(part.confidence, 4)}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _two_lines(text: str) -> str:
    """Break a text that is longer than a line at the space that is nearest to its middle."""
    text = _one_line(text)
    spaces = [i for i, c in enumerate(text) if c == " "]
    if len(text) <= LINE or not spaces:
        return text
    at = min(spaces, key=lambda i: abs(2 * i + 1 - len(text)))
    return f"{text[:at]}\n{text[at + 1 :]}"


def _milliseconds(seconds: float) -> int:
    return max(math.floor(seconds * 1000 + 0.5), 0)


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"


def _apart(parts: Sequence[Word | Segment], limit: int | None = None) -> list[tuple[int, int]]:
    """Begin and end of each part in milliseconds: in order, without overlap, none empty, up to ``limit``."""
    starts = [_milliseconds(part.start) for part in parts]
    ends = [_milliseconds(part.end) for part in parts]
    for i, (here, following) in enumerate(itertools.pairwise(starts)):
        if following > here:
            ends[i] = min(ends[i], following)
    before = 0
    for i in range(len(parts)):
        starts[i] = max(starts[i], before)
        before = ends[i] = max(ends[i], starts[i] + 1)
    for i in reversed(range(len(parts))) if limit is not None else ():
        assert limit is not None
        ends[i] = min(ends[i], limit)
        limit = starts[i] = min(starts[i], ends[i] - 1)
    return list(zip(starts, ends, strict=True))


def _tier(name: str, parts: Sequence[Word | Segment], end: int) -> list[str]:
    rows, before = [], 0
    for part, (start, stop) in zip(parts, _apart(parts, end), strict=True):
        if start > before:
            rows.append((before, start, ""))
        rows.append((start, stop, _one_line(part.text).replace('"', '""')))
        before = stop
    if before < end:
        rows.append((before, end, ""))
    lines = [
        '        class = "IntervalTier" ', f'        name = "{name}" ', "        xmin = 0 ",
        f"        xmax = {_seconds(end)} ", f"        intervals: size = {len(rows)} ",
    ]  # fmt: skip
    for number, (start, stop, text) in enumerate(rows, 1):
        lines += [
            f"        intervals [{number}]:", f"            xmin = {_seconds(start)} ",
            f"            xmax = {_seconds(stop)} ", f'            text = "{text}" ',
        ]  # fmt: skip
    return lines


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".")


def _written_before(table: Path) -> list[str]:
    """Names in the folder that an earlier run to the same output wrote, by its table."""
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    return [Path(row[1]).name for row in rows[1:] if len(row) == 2]
