"""Transcripts in every format, read back."""

import csv
import html
import itertools
import json
import re
from types import SimpleNamespace

import pytest

from vertebra.domains.speech.transcript import Segment, Transcript, Word, cut_segments
from vertebra.errors import ConfigError
from vertebra.pipelines import transcripts
from vertebra.pipelines.base import Item
from vertebra.pipelines.files import Outputs

WORDS = (
    Word('"No",', 0.25, 0.6, 0.91),
    Word("she", 0.6, 0.7499, 1.0),
    Word("said", 0.7499, 1.2, 0.5),
    Word("-->", 2.9, 3.0, 1.5),
    Word("R&D<b>", 3.0, 3.4, 0.25),
)
SPOKEN = Transcript("some folder/talk one.wav", 4.0, cut_segments(WORDS))


def clock(text):
    hours, minutes, seconds = text.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def read_cues(text):
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        at = next(i for i, line in enumerate(lines) if " --> " in line)
        start, end = lines[at].split(" --> ")
        found.append((clock(start), clock(end), "\n".join(lines[at + 1 :])))
    return found


def read_textgrid(text):
    """Name of each tier to its rows of (begin, end, text)."""
    tiers = {}
    for part in re.split(r"\n {4}item \[\d+\]:\n", text)[1:]:
        assert 'class = "IntervalTier"' in part
        name = re.search(r'name = "(.*)"', part)[1]
        rows = re.findall(
            r' {8}intervals \[\d+\]:\n {12}xmin = (\S+) \n {12}xmax = (\S+) \n {12}text = "(.*)" \n', part + "\n"
        )
        assert int(re.search(r"intervals: size = (\d+)", part)[1]) == len(rows)
        tiers[name] = [(float(a), float(b), t.replace('""', '"')) for a, b, t in rows]
    return tiers


def spread(*spans, duration):
    words = tuple(Word(f"w{i}", start, end, 0.5) for i, (start, end) in enumerate(spans))
    return Transcript("a.wav", duration, tuple(Segment(w.text, w.start, w.end, 0.5, (w,)) for w in words))


def test_json_lines_hold_everything():
    text = transcripts.to_jsonl(SPOKEN)
    assert text.count("\n") == 1
    record = json.loads(text)
    assert record["text"] == SPOKEN.text == '"No", she said --> R&D<b>'
    assert (record["file"], record["duration"]) == (SPOKEN.file, 4.0)
    words = [word for segment in record["segments"] for word in segment["words"]]
    assert words[1] == {"text": "she", "start": 0.6, "end": 0.75, "confidence": 1.0}
    assert [s["text"] for s in record["segments"]] == ['"No", she said', "--> R&D<b>"]
    assert record["segments"][0]["task"] == "asr"
    assert json.loads(transcripts.to_json(SPOKEN)) == [record]


def test_subtitles_are_escaped():
    srt, vtt = transcripts.to_srt(SPOKEN), transcripts.to_vtt(SPOKEN)
    assert read_cues(srt) == [(0.25, 1.2, '"No", she said'), (2.9, 3.4, "-> R&D<b>")]
    assert srt.startswith("1\n00:00:00,250 --> 00:00:01,200\n")
    assert "\n\n2\n00:00:02,900 -->" in srt
    assert vtt.startswith("WEBVTT\n\n00:00:00.250 --> 00:00:01.200\n")
    cues = [(a, b, html.unescape(t)) for a, b, t in read_cues(vtt.removeprefix("WEBVTT\n\n"))]
    assert cues == [(0.25, 1.2, '"No", she said'), (2.9, 3.4, "--> R&D<b>")]
    assert vtt.count("-->") == 2


def test_subtitles_have_two_lines_and_no_blank_one():
    text = "a long sentence\n\nthat takes more than the one line of a subtitle"
    long = Transcript("a.wav", 5.0, (Segment(text, 0.0, 5.0, 1.0, ()),))
    ((_, _, shown),) = read_cues(transcripts.to_srt(long))
    assert shown == "a long sentence that takes more\nthan the one line of a subtitle"
    assert transcripts.to_txt(long).count("\n") == 1


def test_hours_beyond_99():
    late = spread((360_000.0, 360_001.5), duration=360_002.0)
    assert "100:00:00,000 --> 100:00:01,500" in transcripts.to_srt(late)
    assert "100:00:00.000 --> 100:00:01.500" in transcripts.to_vtt(late)
    assert " 360000.000 1.500 " in transcripts.to_ctm(late)


@pytest.mark.parametrize(
    ("spans", "duration"),
    [
        ([(0.0004, 0.0004), (0.0004, 0.0006)], 1.0),
        ([(-0.2, 0.1), (0.05, 0.4), (0.3, 0.2)], 1.0),
        ([(0.5, 0.9995), (0.9995, 1.0005), (1.0, 1.3)], 1.0),
        ([(2.0, 2.5), (1.0, 1.5)], 3.0),
        ([(0.0, 0.0)] * 5, 0.001),
        ([], 2.5),
        ([], 0.0),
    ],
)
def test_times_are_in_order_whatever_the_words_say(spans, duration):
    found = spread(*spans, duration=duration)
    for name, rows in read_textgrid(transcripts.to_textgrid(found)).items():
        assert name in ("words", "segments")
        assert rows[0][0] == 0
        assert rows[-1][1] == pytest.approx(max(duration, 0.001 * max(len(spans), 1)))
        assert all(a < b for a, b, _ in rows)
        assert all(one[1] == two[0] for one, two in itertools.pairwise(rows))
        assert [t for _, _, t in rows if t] == [w.text for w in found.words]
    if spans:
        for text in (transcripts.to_srt(found), transcripts.to_vtt(found).removeprefix("WEBVTT\n\n")):
            cues = read_cues(text)
            assert len(cues) == len(spans)
            assert all(a < b for a, b, _ in cues)
            assert all(one[1] <= two[0] for one, two in itertools.pairwise(cues))
    assert all(float(line.split()[3]) >= 0 for line in transcripts.to_ctm(found).splitlines())


def test_ctm():
    lines = [line.split(" ") for line in transcripts.to_ctm(SPOKEN).splitlines()]
    assert lines[0] == ["talk_one", "1", "0.250", "0.350", '"No",', "0.9100"]
    assert lines[1][2:4] == ["0.600", "0.150"]
    assert lines[3][5] == "1.0000"
    assert transcripts.to_ctm(SPOKEN, ";;x").startswith("_;;x 1 ")


def test_textgrid():
    text = transcripts.to_textgrid(SPOKEN)
    assert text.startswith('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0 \nxmax = 4 \n')
    tiers = read_textgrid(text)
    assert tiers["words"][:3] == [(0, 0.25, ""), (0.25, 0.6, '"No",'), (0.6, 0.75, "she")]
    assert tiers["segments"] == [
        (0, 0.25, ""), (0.25, 1.2, '"No", she said'), (1.2, 2.9, ""), (2.9, 3.4, "--> R&D<b>"), (3.4, 4, ""),
    ]  # fmt: skip


def test_every_ending_has_a_function():
    nothing = Transcript("a.wav", 1.0, ())
    assert {e: f(nothing) for e, f in transcripts.FORMATS.items() if e in (".txt", ".ctm", ".srt", ".vtt")} == {
        ".txt": "\n", ".ctm": "", ".srt": "", ".vtt": "WEBVTT\n",
    }  # fmt: skip
    assert set(transcripts.PER_RECORDING) < set(transcripts.FORMATS)


def write(target, files, formats=(), several=None):
    several = len(files) > 1 if several is None else several
    with Outputs(target) as outputs:
        writer = transcripts.TranscriptWriter(outputs, formats, several=several)
        for file in files:
            words = [Word(file, 0.1, 0.2, 0.5)]
            prediction = SimpleNamespace(transcript=Transcript(file, 1.0, cut_segments(words)))
            writer.write(Item(file=file, record=file, data=None, size=1), prediction)
        writer.finish()
        return [str(p.relative_to(target.parent)) for p in outputs.commit()]


def test_one_recording(tmp_path):
    paths = write(tmp_path / "out.srt", ["d/a.wav"], (".txt", ".TextGrid", ".srt"))
    assert sorted(paths) == ["out.TextGrid", "out.srt", "out.txt"]
    assert (tmp_path / "out.txt").read_text() == "d/a.wav\n"
    assert read_cues((tmp_path / "out.srt").read_text()) == [(0.1, 0.2, "d/a.wav")]
    with pytest.raises(ConfigError, match=r"\.srt holds one recording"):
        write(tmp_path / "out.srt", ["a.wav", "b.wav"], several=False)


def test_several_recordings(tmp_path):
    files = ["d/a.wav", "e/a.wav", "e/A.flac", "e/a-2.wav"]
    paths = write(tmp_path / "out.jsonl", files, (".json", ".ctm", ".txt", ".vtt", ".TextGrid"))
    assert paths[:5] == ["out.jsonl", "out.json", "out.ctm", "out.txt", "out.files.csv"]
    assert sorted(paths[5:]) == sorted(
        f"out.files/{name}{ending}" for name in ("a", "a-2", "A-3", "a-2-2") for ending in (".vtt", ".TextGrid")
    )
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["file"] for r in records] == files
    assert json.loads((tmp_path / "out.json").read_text()) == records
    assert (tmp_path / "out.txt").read_text().splitlines() == [f"{f}\t{f}" for f in files]
    assert [line.split()[0] for line in (tmp_path / "out.ctm").read_text().splitlines()] == ["a", "a-2", "A-3", "a-2-2"]
    table = list(csv.DictReader((tmp_path / "out.files.csv").read_text().splitlines()))
    assert len(table) == 8
    for row in table:
        assert row["recording"] in (tmp_path / row["file"]).read_text()


def test_a_second_run_replaces_the_first(tmp_path):
    write(tmp_path / "out.srt", ["a.wav", "b.wav"])
    assert write(tmp_path / "out.srt", ["b.wav", "c.wav"])[0] == "out.files.csv"
    assert sorted(p.name for p in (tmp_path / "out.files").iterdir()) == ["b.srt", "c.srt"]
    (tmp_path / "out.files" / "mine.srt").write_text("")
    with pytest.raises(ConfigError, match=r"'mine\.srt'; choose another name"):
        write(tmp_path / "out.srt", ["b.wav", "c.wav"])


def test_an_empty_list_is_json(tmp_path):
    write(tmp_path / "out.json", [], several=True)
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"formats must be among \.jsonl, .* got '\.doc'"):
        write(tmp_path / "out.txt", ["a.wav"], (".doc",))
