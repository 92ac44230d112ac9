"""Folders of corpora: Kaldi, LibriSpeech, Speech Commands, spoken digits, AN4, and plain ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vertebra.domains.speech.sources_base import SPLIT_NAMES, Collector, list_audio, read_lines, read_text, split_of
from vertebra.domains.speech.spec import NO_LANGUAGE, NO_PROMPT
from vertebra.errors import DataError

# ---------------------------------------------------------------- Kaldi

_PREFIX = re.compile(r"<([^<>\s]+)>\s*<(asr|st_[^<>\s]+)>\s*")
_TIMES = re.compile(r"<(?:\d+\.\d+|notimestamps)>")


def read_kaldi(root: Path, into: Collector) -> None:
    """A Kaldi directory: ``wav.scp``, and the other files of one as they are there.

    A text may begin with ``<eng><asr>`` or ``<eng><st_deu>``, as OWSM has it: in the latter case it is the translation,
    and ``text.ctc`` the transcript; ``text.prev`` is the prompt. ``segments``, ``utt2spk``,
    ``utt2lang`` and ``utt2dur`` are read. Commands in ``wav.scp`` are never run.
    """
    listed = _pairs(root / "wav.scp", into)
    audio = {}
    for key, (line, value) in listed.items():
        if value.endswith("|") or value.startswith("|"):
            into.refuse(
                root / "wav.scp", line, f"a path must be a file, got a command for {key}", "run it, and name its output"
            )
        else:
            audio[key] = line, value
    has_text = (root / "text").is_file()
    text, plain, prompt, speaker, language, length = (
        _pairs(root / name, into) if (root / name).is_file() else {}
        for name in ("text", "text.ctc", "text.prev", "utt2spk", "utt2lang", "utt2dur")
    )
    parts: dict[str, tuple[Path, int, str, str | None, str | None]] = {}  # file and line, recording, start, end
    if (file := root / "segments").is_file():
        for key, (line, value) in _pairs(file, into).items():
            fields = value.split()
            if len(fields) != 3:
                into.refuse(file, line, "a segment must be: utterance recording start end", "mend the line")
                continue
            parts[key] = file, line, fields[0], fields[1], None if fields[2] == "-1" else fields[2]
    else:
        parts = {key: (root / "wav.scp", line, key, None, None) for key, (line, _) in audio.items()}
    for key, (source, line, recording, start, end) in parts.items():
        if recording not in audio:
            into.refuse(source, line, f"wav.scp must name a file for {recording}, got none", "add it there")
            continue
        if has_text and key not in text:
            into.refuse(source, line, f"text must have a line for {key}, got none", "add it, or leave both out")
            continue
        words = text[key][1] if key in text else None
        spoken, task = language.get(key, (0, ""))[1], "asr"
        translation = ""
        if words is not None and (found := _PREFIX.match(words)):
            spoken, task = found[1], found[2]
            words = words[found.end() :]
        if words is not None:
            words = " ".join(_TIMES.sub(" ", words).split())
        if task != "asr":
            translation, words = words or "", plain[key][1] if key in plain else None
            if words is not None and (found := _PREFIX.match(words)):
                words = words[found.end() :]
        into.add(
            source,
            line,
            name=key,
            path=Path(root, audio[recording][1]),
            start=start,
            end=end,
            duration=length.get(key, (0, None))[1],
            text=None if words == NO_PROMPT else words,
            language="" if f"<{spoken}>" == NO_LANGUAGE else spoken,
            task=task,
            translation=translation,
            speaker=speaker.get(key, (0, ""))[1],
            previous=prompt[key][1] if key in prompt and prompt[key][1] != NO_PROMPT else "",
            split=split_of(root.name),
        )
    for key, (line, _) in text.items():
        if key not in parts and key not in listed:
            into.refuse(root / "text", line, f"there must be audio for {key}, got none", "add it to wav.scp")


def _pairs(file: Path, into: Collector) -> dict[str, tuple[int, str]]:
    """``key value`` lines: the line and value of each key."""
    found: dict[str, tuple[int, str]] = {}
    for line, text in read_lines(file, into):
        key, _, value = text.partition(" ") if "\t" not in text else text.replace("\t", " ", 1).partition(" ")
        if key in found:
            into.refuse(file, line, f"ids must differ, got {key!r} again (first in line {found[key][0]})", "remove one")
        else:
            found[key] = line, value.strip()
    return found


# ---------------------------------------------------------------- LibriSpeech


def read_librispeech(root: Path, into: Collector) -> None:
    """LibriSpeech: ``split/speaker/chapter/speaker-chapter.trans.txt`` beside its FLAC files; also from below."""
    for file in sorted(root.rglob("*.trans.txt")):
        speaker = file.name.partition("-")[0]
        folders = (root.name, *file.relative_to(root).parts)
        split = next((s for part in reversed(folders[:-1]) if (s := split_of(part))), "")
        for line, text in read_lines(file, into):
            name, _, words = text.partition(" ")
            path = file.parent / f"{name}.flac"
            if not path.is_file() and (wave := path.with_suffix(".wav")).is_file():
                path = wave
            into.add(file, line, name=name, path=path, text=words.strip(), language="eng", speaker=speaker, split=split)


# ---------------------------------------------------------------- Speech Commands


def read_commands(root: Path, into: Collector) -> None:
    """Speech Commands: ``word/speaker_nohash_take.wav``, and lists of what is for validation and for testing."""
    splits: dict[str, str] = {}
    for name, split in (("validation_list.txt", "val"), ("testing_list.txt", "test")):
        if not (root / name).is_file():
            continue
        for line, text in read_lines(root / name, into):
            if not os.path.isfile(root / text):
                into.refuse(root / name, line, f"the list must name files, got {text!r}", "download the data again")
            splits[text] = split
    for path in list_audio(root):
        name = path.relative_to(root).as_posix()
        word, _, rest = name.partition("/")
        if not rest or word.startswith("_"):  # _background_noise_
            continue
        into.add(
            path,
            None,
            name=name,
            path=path,
            text=word,
            language="eng",
            speaker=path.stem.partition("_nohash_")[0] if "_nohash_" in path.stem else "",
            split=splits.get(name, "train"),
        )


# ---------------------------------------------------------------- spoken digits

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_NAME = re.compile(r"([0-9])_([^_]+)_([0-9]+)")
_TEST_TAKES = 5


def digits_folder(root: Path) -> Path | None:
    """The folder with files as ``7_jackson_32.wav``: ``root``, or ``recordings`` in it."""
    for folder in (root / "recordings", root):
        if folder.is_dir():
            files = [p for p in folder.iterdir() if p.suffix.lower() == ".wav"]
            if files and all(DIGIT_NAME.fullmatch(p.stem) for p in files):
                return folder
    return None


def read_digits(root: Path, into: Collector) -> None:
    """Free Spoken Digit Dataset: ``digit_speaker_take.wav``; takes 0 to 4 are for testing, as its authors say."""
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    for path in list_audio(folder):
        found = DIGIT_NAME.fullmatch(path.stem)
        if not found:
            into.refuse(path, None, "a name must be digit_speaker_take.wav", "rename the file")
            continue
        into.add(
            path,
            None,
            name=path.stem,
            path=path,
            text=_DIGITS[int(found[1])],
            language="eng",
            speaker=found[2],
            split="test" if int(found[3]) < _TEST_TAKES else "train",
        )


# ---------------------------------------------------------------- AN4

_SPHINX_LINE = re.compile(r"(.*?)\s*\(([^()\s]+)\)")
_SPHINX_TAG = re.compile(r"</?s>|<sil>")


def read_an4(root: Path, into: Collector) -> None:
    """AN4 and its kind, as CMU Sphinx has them: ``etc/*.fileids``, ``etc/*.transcription``, audio in ``wav/``."""
    lists = sorted((root / "etc").glob("*.fileids"))
    if not lists:
        raise DataError(f"{root}: AN4 must have etc/*.fileids, got none.")
    for file in lists:
        words: dict[str, str] = {}
        script = file.with_suffix(".transcription")
        for line, text in read_lines(script, into):
            if found := _SPHINX_LINE.fullmatch(text):
                words[found[2]] = " ".join(_SPHINX_TAG.sub(" ", found[1]).split())
            else:
                into.refuse(script, line, "a line must be: words (id)", "mend the line")
        for line, name in read_lines(file, into):
            stem = Path(root, "wav", name)
            path = next(
                (p for e in (".sph", ".wav", ".flac") if os.path.isfile(p := Path(f"{stem}{e}"))), Path(f"{stem}.sph")
            )
            key = name if name in words else stem.name
            if key not in words:
                into.refuse(file, line, f"{script.name} must have a line for {key}, got none", "add it there")
                continue
            into.add(
                file,
                line,
                name=name,
                path=path,
                text=words[key],
                language="eng",
                speaker=stem.parent.name,
                split=split_of(file.stem),
            )


# ---------------------------------------------------------------- plain folders


def read_pairs(root: Path, into: Collector) -> None:
    """Audio files, each with its transcript in a ``.txt`` of the same name; a first folder may be called as a split."""
    for path in list_audio(root):
        text = path.with_suffix(".txt")
        if not text.is_file():
            into.refuse(path, None, f"there must be a transcript {text.name} beside it, got none", "add it")
            continue
        try:
            words = " ".join(read_text(text).split())
        except DataError:
            into.refuse(text, None, "a transcript must be text in UTF-8, got other bytes", "save it as that")
            continue
        name = path.relative_to(root).with_suffix("").as_posix()
        into.add(path, None, name=name, path=path, text=words, split=_folder_split(name))


def read_audio_files(root: Path, into: Collector) -> None:
    """Audio files without transcripts; a first folder may be called as a split."""
    for path in list_audio(root) if root.is_dir() else [root]:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        into.add(path, None, name=name, path=path, split=_folder_split(name))


def _folder_split(name: str) -> str:
    first, _, rest = name.partition("/")
    return first if rest and first.lower() in SPLIT_NAMES else ""
