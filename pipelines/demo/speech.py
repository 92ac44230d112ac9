"""Speech: recordings of every format, a minute of dialogue, words over the spectrogram, languages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from vertebra.pipelines.demo.base import Demo

HEARD = 4
"""Recordings to listen to."""


def show(demo: Demo) -> None:
    """Run the pipelines of the domain and show what they write."""
    samples, report = demo.samples, demo.report
    folder = _with_damaged(samples / "strings", demo.results / "recordings")
    report.section("speech/transcribe: recordings of every format")
    said = demo.run("speech/transcribe", [folder], "strings.jsonl")
    rows, heard = [], []
    for line in said.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        path = Path(found["file"])
        known = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        rows.append((path.name, known, found["text"]))
        if path.suffix in (".wav", ".flac", ".mp3"):
            heard.append((path, f"{path.name}: {found['text']}"))
    report.table(rows, ("recording", "what is said", "what the model hears"))
    report.sounds(heard[:HEARD])
    demo.damaged(said.with_name("strings.jsonl.errors.jsonl"), "files cannot be read")

    report.section("speech/transcribe: a minute of dialogue, as subtitles")
    subtitles = demo.run("speech/transcribe", [samples / "long.flac"], "long.srt", "--window 10 --context 2")
    report.details("The first of them", "\n".join(subtitles.read_text(encoding="utf-8").splitlines()[:19]))

    report.section("speech/align: words over the spectrogram")
    demo.run("speech/align", [samples / "strings"], "words.ctm", "--figures 1")
    report.image(next(demo.results.glob("words.ctm.1.*.png")), "When each word of a known text is said.")
    _show_languages(demo)


def _show_languages(demo: Demo) -> None:
    """Which language is spoken, and translations, by one model that is told what to do."""
    samples, report = demo.samples, demo.report
    known = {
        str(samples / entry["audio_filepath"]): entry
        for line in (samples / "languages.jsonl").read_text(encoding="utf-8").splitlines()
        if (entry := json.loads(line))
    }
    report.section("speech/identify")
    table = demo.run("speech/identify", [samples / "languages"], "languages.csv")
    with table.open(newline="", encoding="utf-8") as stream:
        found = [(known[row["file"]]["lang"], row["language"]) for row in csv.DictReader(stream)]
    languages = sorted({true for true, _ in found})
    rows = [(true, *(sum(pair == (true, name) for pair in found) for name in languages)) for true in languages]
    report.table(rows, ("spoken", *(f"said to be {name}" for name in languages)))

    report.section("speech/transcribe: into English")
    words = "--model speech_languages --task st_eng"
    english = demo.run("speech/transcribe", [samples / "languages"], "english.jsonl", words)
    lines = [json.loads(line) for line in english.read_text(encoding="utf-8").splitlines()]
    foreign = [(e["lang"], e["text"], line["text"]) for line in lines if (e := known[line["file"]])["lang"] != "eng"]
    report.table(foreign[:: max(len(foreign) // 8, 1)], ("spoken", "what is said", "what the model says in English"))


def _with_damaged(source: Path, folder: Path) -> Path:
    """Copy recordings, with a truncated one and a text called .wav among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    whole = next(f for f in sorted(source.iterdir()) if f.suffix == ".flac")
    (folder / "truncated.flac").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "notes.wav").write_text("This is no recording.\n", encoding="ascii")
    return folder
