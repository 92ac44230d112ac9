import gzip
import json
import tarfile

import numpy as np
import pytest
import soundfile as sf

from vertebra.domains.speech.audio import read_audio
from vertebra.domains.speech.sources import LAYOUTS, find_layout, read_source, read_unlabelled
from vertebra.errors import DataError, UnknownNameError


def audio(*paths, seconds=0.5, rate=8000, **options):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, np.full(round(seconds * rate), 0.1), rate, **options)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def facts(source, *names):
    return [tuple(getattr(u, n) for n in names) for u in source.utterances]


def complaints(source):
    return [f"{b.line}: {b.rule}" for b in source.bad]


# ---------------------------------------------------------------- manifests


def test_manifest(tmp_path):
    audio(tmp_path / "a.wav", tmp_path / "sub" / "b.flac")
    records = [
        {"audio_filepath": "a.wav", "duration": 0.4, "text": " Hello ", "lang": "eng", "speaker": 7},
        {"audio_filepath": "sub/b.flac", "text": "part", "offset": 0.1, "duration": 0.2},
        {"audio_filepath": "sub/b.flac", "text": "rest", "offset": 0.3},
        {"audio_filepath": str(tmp_path / "a.wav"), "text": ""},
        {"audio_filepath": "sub/../a.wav", "id": "x", "task": "st_deu", "text": "one", "translation": "eins"},
        {"audio_filepath": "a.wav", "id": 3, "prev_text": "before", "split": "dev"},
    ]
    file = write(tmp_path / "data.jsonl", *(json.dumps(r) for r in records), "")
    got = read_source(file)
    assert got.layout == "manifest"
    assert got.bad == []
    assert len(got) == 6
    assert facts(got, "id", "start", "text", "line") == [
        ("a.wav", 0.0, "Hello", 1),
        ("sub/b.flac@0.1", 0.1, "part", 2),
        ("sub/b.flac@0.3", 0.3, "rest", 3),
        (str(tmp_path / "a.wav"), 0.0, "", 4),
        ("x", 0.0, "one", 5),
        ("3", 0.0, None, 6),
    ]
    assert [u.duration for u in got.utterances] == pytest.approx([0.4, 0.2, 0.2, 0.5, 0.5, 0.5])
    assert facts(got, "language", "speaker")[0] == ("eng", "7")
    assert facts(got, "task", "translation", "previous", "split")[4:] == [
        ("st_deu", "eins", "", ""),
        ("asr", "", "before", "val"),
    ]
    unmeasured = read_source(file, measure=False)
    assert [u.duration for u in unmeasured.utterances] == [0.4, 0.2, None, None, None, None]


def test_bad_lines_lose_no_others(tmp_path):
    audio(tmp_path / "a.wav")
    write(tmp_path / "text.wav", "no sound")
    file = tmp_path / "train.jsonl"
    lines = [
        '{"path": "a.wav", "text": "good", "id": "1"}',
        '{"path": "a.wav", "text": ',
        '{"path": "missing.wav"}',
        '{"path": "a.wav", "id": "1"}',
        '{"path": "a.wav", "id": "2", "start": 0.3, "end": 0.2}',
        '{"path": "a.wav", "id": "3", "start": -1}',
        '{"path": "a.wav", "id": "4", "duration": "long"}',
        '{"path": "a.wav", "id": "5", "duration": 0}',
        '{"path": "a.wav", "id": "6", "duration": NaN}',
        '{"path": "text.wav"}',
        '{"text": "no path"}',
        "[1]",
        '{"path": "a.wav", "id": "7", "split": "training set"}',
        '{"path": "a.wav", "id": "8", "text": ["a"]}',
        '{"path": "a.wav", "id": "9", "task": "translate"}',
        '{"path": "a.wav", "id": "10", "task": "st_deu"}',
        '{"path": "a.wav", "id": "11", "start": 0.5}',
        '{"path": "a.wav", "id": "12", "text": "good too"}',
        '{"path": "' + "x" * 5000 + '"}',
        "[" * 100_000,
    ]
    file.write_bytes("\n".join(lines).encode() + b'\n{"path": "\xff"}\n')
    got = read_source(file)
    assert facts(got, "id", "text", "split") == [("1", "good", "train"), ("12", "good too", "train")]
    rules = complaints(got)
    assert [int(r.partition(":")[0]) for r in rules] == [*range(2, 18), 19, 20, 21]
    for rule, want in zip(
        rules,
        [
            "the line must be JSON",
            "the audio must be a file, got ",
            f"ids must differ, got '1' again (first in {file}, line 1)",
            "end must be after start, got 0.3 to 0.2",
            "start must be 0 or more, got -1",
            "duration must be a number of seconds, got 'long'",
            "duration must be above 0, got 0",
            "duration must be a number of seconds, got nan",
            "text.wav: this is not audio of a format that libsndfile reads",
            "there must be a path (or audio_filepath), got text",
            "a line must be a JSON object, got list",
            "split must be train, val or test, got 'training set'",
            "text must be text, got ['a']",
            "task must be asr, or such as st_deu, got 'translate'",
            "task st_deu needs a translation, got none",
            "start must be before the end at 0.500 s, got 0.5",
            "the audio must be a file",
            "the line must be JSON",
            "the line must be text in UTF-8",
        ],
        strict=True,
    ):
        assert want in rule
    assert str(got.bad[3]) == f"{file}, line 5: end must be after start, got 0.3 to 0.2; correct the times."


def test_nothing_that_can_be_used(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"path": "b.wav"}', '{"path": "c.wav"}')
    with pytest.raises(DataError, match=r"none of 2 lines can be used. The first: .*a\.jsonl, line 1: the audio must"):
        read_source(file)
    with pytest.raises(DataError, match=r"there must be an utterance, got none; is this the layout manifest\?"):
        read_source(write(tmp_path / "b.jsonl"))


def test_json_and_gzip(tmp_path):
    audio(tmp_path / "a.wav")
    (tmp_path / "a.json").write_text('[{"path": "a.wav", "text": "x"}, {"path": "b.wav"}]')
    got = read_source(tmp_path / "a.json")
    assert facts(got, "text", "line") == [("x", 1)]
    assert complaints(got)[0].startswith("2: the audio must be a file")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"path": "a.wav", "text": "y"}\n'))
    assert facts(read_source(tmp_path / "a.jsonl.gz"), "text") == [("y",)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"path": "a.wav"}\n' * 100)[:-9])
    with pytest.raises(DataError, match="the gzip file is truncated or damaged"):
        read_source(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.json").write_text('[{"path": "a.wav"},')
    with pytest.raises(DataError, match="this must be a list of JSON objects"):
        read_source(tmp_path / "b.json")


def test_a_folder_of_manifests(tmp_path):
    audio(*(tmp_path / f"{n}.wav" for n in "abc"))
    for name, split in zip("abc", ("train", "dev", "test"), strict=True):
        write(tmp_path / f"{split}_manifest.jsonl", json.dumps({"audio_filepath": f"{name}.wav", "text": name}))
    got = read_source(tmp_path)
    assert got.layout == "manifest"
    assert sorted(facts(got, "text", "split")) == [("a", "train"), ("b", "val"), ("c", "test")]


# ---------------------------------------------------------------- tables


def test_tables(tmp_path):
    audio(tmp_path / "a.wav", tmp_path / "b.wav")
    file = write(
        tmp_path / "data.csv",
        "\ufeffpath,text,start,end,language,speaker,split",
        'a.wav,"well, yes",,,eng,ann,train',
        "b.wav,,0.1,0.4,deu,bob,test",
        "b.wav,no,0.2,0.1,deu,bob,test",
        "b.wav,short",
        "c.wav,no,,,,,",
    )
    got = read_source(file)
    assert got.layout == "table"
    assert facts(got, "id", "text", "start", "language", "speaker", "split", "line") == [
        ("a.wav", "well, yes", 0.0, "eng", "ann", "train", 2),
        ("b.wav@0.1", "", 0.1, "deu", "bob", "test", 3),
    ]
    assert got.utterances[1].duration == pytest.approx(0.3)
    assert [c[:24] for c in complaints(got)] == [
        "4: end must be after sta",
        "5: a row must have the 7",
        "6: the audio must be a f",
    ]
    tabs = write(tmp_path / "data.tsv", "file_name\ttranscript\tduration", "a.wav\tyes\t0.25")
    assert facts(read_source(tabs), "text", "duration") == [("yes", 0.25)]
    (tmp_path / "other.csv").write_text("name,number\nx,1\n")
    assert complaints(read_source(tmp_path))[-1].startswith("2: ids must differ, got 'a.wav' again (first in ")
    with pytest.raises(DataError, match=r"other\.csv: there must be a column 'path', got name, number"):
        read_source(tmp_path / "other.csv")
    (tmp_path / "latin.csv").write_bytes("path,text\na.wav,\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv, line 2: this must be text in UTF-8"):
        read_source(tmp_path / "latin.csv")


def test_commonvoice(tmp_path):
    audio(*(tmp_path / "clips" / f"c{i}.mp3" for i in range(3)), rate=48000)
    head = "client_id\tpath\tsentence\tup_votes\tlocale"
    write(tmp_path / "train.tsv", head, 'u1\tc0.mp3\t"Yes," he said.\t2\tde', "u1\tc9.mp3\tGone.\t2\tde")
    write(tmp_path / "dev.tsv", head, "u2\tc1\tNo.\t2\tde")
    write(tmp_path / "test.tsv", head, "u3\tc2.mp3\tPerhaps.\t2\tde")
    write(tmp_path / "validated.tsv", head, "u3\tc2.mp3\tPerhaps.\t2\tde")
    got = read_source(tmp_path)
    assert got.layout == "commonvoice"
    assert facts(got, "id", "text", "language", "speaker", "split") == [
        ("c0", '"Yes," he said.', "de", "u1", "train"),
        ("c1", "No.", "de", "u2", "val"),
        ("c2", "Perhaps.", "de", "u3", "test"),
    ]
    assert all(u.duration == pytest.approx(0.5, abs=0.05) for u in got.utterances)
    assert complaints(got)[0].startswith("3: the audio must be a file")
    write(tmp_path / "clip_durations.tsv", "clip\tduration[ms]", "c2.mp3\t432", "c0.mp3\tlong")
    got = read_source(tmp_path / "test.tsv")
    assert facts(got, "id", "duration", "split") == [("c2", 0.432, "test")]
    assert complaints(got) == ["3: duration[ms] must be a whole number, got 'long'"]
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").unlink()
    assert facts(read_source(tmp_path), "id", "split") == [("c2", "")]
    (tmp_path / "validated.tsv").unlink()
    with pytest.raises(DataError, match=r"Common Voice must have train\.tsv, dev\.tsv"):
        read_source(tmp_path)


def test_lhotse(tmp_path):
    audio(tmp_path / "a.wav", tmp_path / "b.wav")
    recordings = [
        {"id": "ra", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "duration": 0.5},
        {"id": "rb", "sources": [{"type": "command", "channels": [0], "source": "sox b.wav -t wav -"}]},
        {"id": "rc", "sources": []},
        {"id": "rd", "sources": [{"type": "file", "source": "a.wav"}], "transforms": [{"name": "Speed"}]},
    ]
    supervisions = [
        {"id": "s1", "recording_id": "ra", "start": 0.0, "duration": 0.5, "text": "yes", "speaker": "ann"},
        {"id": "s2", "recording_id": "ra", "start": 0.2, "duration": 0.1, "text": "no", "language": "English"},
        {"id": "s3", "recording_id": "rb", "start": 0.2, "duration": 0.1},
        {"id": "s4", "recording_id": "ra", "start": 0.2, "duration": 0.1, "channel": 1},
        {"recording_id": "ra"},
    ]
    write(tmp_path / "x_recordings_dev.jsonl", *map(json.dumps, recordings))
    file = write(tmp_path / "x_supervisions_dev.jsonl", *map(json.dumps, supervisions))
    for path in (tmp_path, file):
        got = read_source(path)
        assert got.layout == "lhotse"
        assert facts(got, "id", "text", "start", "duration", "speaker", "language", "split") == [
            ("s1", "yes", 0.0, 0.5, "ann", "", "val"),
            ("s2", "no", 0.2, 0.1, "", "English", "val"),
        ]
        assert complaints(got) == [
            "2: a source must be a file, got 'command'",
            "3: a recording must have an id and one source with type and source",
            "4: a recording must have no transforms, got some",
            "3: there must be a recording 'rb', got none",
            "4: channel must be 0, got 1",
            "5: a supervision must have an id and a recording_id",
        ]


def test_lhotse_cuts(tmp_path):
    audio(tmp_path / "a.wav", seconds=3)
    recording = {"id": "ra", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "duration": 3.0}
    cuts = [
        {
            "id": "c1",
            "start": 1.0,
            "duration": 1.5,
            "supervisions": [
                {"id": "s1", "recording_id": "ra", "start": 0.25, "duration": 0.5, "text": "yes"},
                {"id": "s2", "recording_id": "ra", "start": 1.0, "duration": 0.5, "text": "no"},
            ],
            "recording": recording,
        },
        {"id": "c2", "start": 0.5, "duration": 1.0, "channel": 0, "recording": recording},
        {"id": "c3", "start": 0.5, "duration": 1.0},
        {"id": "c4", "start": 0.5, "duration": 1.0, "recording": recording, "supervisions": [7]},
        {"id": "c5", "start": 2.0, "recording": recording},
    ]
    (tmp_path / "cuts_train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    for path in (tmp_path, tmp_path / "cuts_train.jsonl.gz"):
        got = read_source(path)
        assert got.layout == "lhotse"
        assert facts(got, "id", "text", "start", "duration", "split") == [
            ("s1", "yes", 1.25, 0.5, "train"),
            ("s2", "no", 2.0, 0.5, "train"),
            ("c2", None, 0.5, 1.0, "train"),
            ("c5", None, 2.0, 1.0, "train"),
        ]
        assert complaints(got) == [
            "3: a cut must have a recording and a start",
            "4: a supervision must have an id and a recording_id",
        ]


# ---------------------------------------------------------------- Kaldi


def test_kaldi(tmp_path):
    root = tmp_path / "train"
    audio(root / "a.wav", root / "b c.wav", tmp_path / "d.wav")
    write(root / "wav.scp", "u1 a.wav", "u2\tb c.wav", f"u3 {tmp_path}/d.wav", "u4 sox a.wav -t wav - |", "u5 z.wav")
    write(root / "text", "u1 hello  there", "u2", "u3 <eng><asr> fine", "u4 a", "u5 b", "u6 c", "u1 twice")
    write(root / "utt2spk", "u1 ann", "u2 bob")
    write(root / "utt2lang", "u1 deu")
    write(root / "utt2dur", "u1 0.49")
    got = read_source(root)
    assert got.layout == "kaldi"
    assert facts(got, "id", "text", "speaker", "language", "split") == [
        ("u1", "hello there", "ann", "deu", "train"),
        ("u2", "", "bob", "", "train"),
        ("u3", "fine", "", "eng", "train"),
    ]
    assert [u.duration for u in got.utterances] == [0.49, 0.5, 0.5]
    rules = complaints(got)
    assert len(rules) == 4
    assert "4: a path must be a file, got a command for u4" in rules
    assert "6: there must be audio for u6, got none" in rules
    assert "7: ids must differ, got 'u1' again (first in line 1)" in rules
    assert rules[2].startswith("5: the audio must be a file, got ")
    assert len(read_source(root / "wav.scp")) == 3


def test_kaldi_segments(tmp_path):
    audio(tmp_path / "a.wav", seconds=2)
    write(tmp_path / "wav.scp", "r1 a.wav")
    lines = ["s1 r1 0.5 1.25", "s2 r1 1.5 -1", "s3 r1 1.0 0.5", "s4 r2 0 1", "s5 r1 0", "s6 r1 0 1", "s7 r1 x 1"]
    write(tmp_path / "segments", *lines)
    write(tmp_path / "text", *(f"s{i} word" for i in (1, 2, 3, 4, 5, 7)))
    got = read_source(tmp_path)
    assert facts(got, "id", "start", "duration", "text") == [("s1", 0.5, 0.75, "word"), ("s2", 1.5, 0.5, "word")]
    assert sorted(complaints(got)) == [
        "3: end must be after start, got 1 to 0.5",
        "4: wav.scp must name a file for r2, got none",
        "5: a segment must be: utterance recording start end",
        "5: there must be audio for s5, got none",
        "6: text must have a line for s6, got none",
        "7: start must be a number of seconds, got 'x'",
    ]
    (tmp_path / "text").unlink()
    assert facts(read_source(tmp_path), "id", "text") == [("s1", None), ("s2", None), ("s6", None)]


def test_kaldi_of_owsm(tmp_path):
    audio(*(tmp_path / f"{n}.wav" for n in "abcd"))
    write(tmp_path / "wav.scp", *(f"{n} {n}.wav" for n in "abcd"))
    write(
        tmp_path / "text",
        "a <eng><asr><0.00> hello there<1.28>",
        "b <eng><st_deu><notimestamps> guten Tag",
        "c <nolang><asr> what",
        "d <eng><st_deu> ja",
    )
    write(tmp_path / "text.ctc", "a hello there", "b good day", "c what", "d <na>")
    write(tmp_path / "text.prev", "a <na>", "b before that", "c <na>", "d <na>")
    got = read_source(tmp_path)
    assert got.bad == []
    assert facts(got, "id", "text", "language", "task", "translation", "previous") == [
        ("a", "hello there", "eng", "asr", "", ""),
        ("b", "good day", "eng", "st_deu", "guten Tag", "before that"),
        ("c", "what", "", "asr", "", ""),
        ("d", None, "eng", "st_deu", "ja", ""),
    ]


# ---------------------------------------------------------------- corpora


def test_librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    for split, speaker in (("train-clean-100", 19), ("dev-other", 84), ("test-clean", 61)):
        folder = root / split / str(speaker) / "198"
        audio(folder / f"{speaker}-198-0000.flac")
        write(folder / f"{speaker}-198.trans.txt", f"{speaker}-198-0000 HELLO WORLD", f"{speaker}-198-0001 GONE")
    got = read_source(root)
    assert got.layout == "librispeech"
    assert facts(got, "id", "text", "speaker", "split", "language", "duration") == [
        ("84-198-0000", "HELLO WORLD", "84", "val", "eng", 0.5),
        ("61-198-0000", "HELLO WORLD", "61", "test", "eng", 0.5),
        ("19-198-0000", "HELLO WORLD", "19", "train", "eng", 0.5),
    ]
    assert len(got.bad) == 3
    assert facts(read_source(root / "dev-other"), "split") == [("val",)]


def test_commands(tmp_path):
    names = ["yes/0a7c_nohash_0.wav", "yes/0a7c_nohash_1.wav", "no/1b_nohash_0.wav", "no/1b_nohash_1.wav"]
    audio(*(tmp_path / n for n in names), tmp_path / "_background_noise_" / "hum.wav", seconds=0.1)
    write(tmp_path / "validation_list.txt", names[1])
    write(tmp_path / "testing_list.txt", names[2], "no/gone.wav")
    got = read_source(tmp_path)
    assert got.layout == "commands"
    assert facts(got, "id", "text", "speaker", "split") == [
        (names[2], "no", "1b", "test"),
        (names[3], "no", "1b", "train"),
        (names[0], "yes", "0a7c", "train"),
        (names[1], "yes", "0a7c", "val"),
    ]
    assert complaints(got) == ["2: the list must name files, got 'no/gone.wav'"]


def test_digits(tmp_path):
    audio(*(tmp_path / "recordings" / n for n in ("7_ann_4.wav", "0_bob_5.wav", "9_ann_10.wav")), seconds=0.02)
    for path in (tmp_path, tmp_path / "recordings"):
        got = read_source(path)
        assert got.layout == "digits"
        assert facts(got, "id", "text", "speaker", "split") == [
            ("0_bob_5", "zero", "bob", "train"),
            ("7_ann_4", "seven", "ann", "test"),
            ("9_ann_10", "nine", "ann", "train"),
        ]
    audio(tmp_path / "recordings" / "noise.wav")
    assert complaints(read_source(tmp_path, "digits")) == ["None: a name must be digit_speaker_take.wav"]
    assert find_layout(tmp_path) == "audio"


def test_an4(tmp_path):
    audio(tmp_path / "wav" / "train" / "ann" / "a-1.sph", format="NIST", subtype="PCM_16")
    audio(tmp_path / "wav" / "test" / "bob" / "b-1.wav")
    write(tmp_path / "etc" / "an4_train.fileids", "train/ann/a-1", "train/ann/a-2", "train/ann/a-3")
    write(tmp_path / "etc" / "an4_train.transcription", "<s> YES SIR </s> (a-1)", "<s> NO </s> (a-2)", "broken")
    write(tmp_path / "etc" / "an4_test.fileids", "test/bob/b-1")
    write(tmp_path / "etc" / "an4_test.transcription", "GO (test/bob/b-1)")
    got = read_source(tmp_path)
    assert got.layout == "an4"
    assert facts(got, "id", "text", "speaker", "split", "duration") == [
        ("test/bob/b-1", "GO", "bob", "test", 0.5),
        ("train/ann/a-1", "YES SIR", "ann", "train", 0.5),
    ]
    rules = complaints(got)
    assert rules[0] == "3: a line must be: words (id)"
    assert rules[1].startswith("2: the audio must be a file")
    assert rules[2] == "3: an4_train.transcription must have a line for a-3, got none"


def test_pairs(tmp_path):
    audio(tmp_path / "train" / "a.wav", tmp_path / "dev" / "b.flac", tmp_path / "c.wav", tmp_path / "d.wav")
    write(tmp_path / "train" / "a.txt", "hello", "there")
    write(tmp_path / "dev" / "b.txt", "yes")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    write(tmp_path / "README.txt", "words")
    got = read_source(tmp_path)
    assert got.layout == "pairs"
    assert facts(got, "id", "text", "split") == [("dev/b", "yes", "val"), ("train/a", "hello there", "train")]
    assert [b.rule for b in got.bad] == [
        "there must be a transcript c.txt beside it, got none",
        "a transcript must be text in UTF-8, got other bytes",
    ]


def test_audio_alone(tmp_path):
    audio(tmp_path / "a.wav", tmp_path / "test" / "b.flac", tmp_path / ".hidden.wav")
    write(tmp_path / "c.wav", "no sound")
    got = read_source(tmp_path)
    assert got.layout == "audio"
    assert facts(got, "id", "text", "split", "duration") == [
        ("a.wav", None, "", 0.5),
        ("test/b.flac", None, "test", 0.5),
    ]
    assert got.bad[0].rule.startswith("c.wav: this is not audio")
    assert facts(read_source(tmp_path / "a.wav"), "id") == [("a.wav",)]


def test_unlabelled(tmp_path):
    audio(tmp_path / "x" / "take 10.wav", tmp_path / "x" / "take 2.wav", tmp_path / "b.wav")
    (tmp_path / "none").mkdir()
    got = read_unlabelled([tmp_path / "b.wav", str(tmp_path / "x"), tmp_path / "b.wav", "missing.wav"])
    assert [u.path.name for u in got] == ["b.wav", "take 2.wav", "take 10.wav", "missing.wav"]
    assert {(u.text, u.duration, u.start) for u in got} == {(None, None, 0.0)}
    assert len({u.id for u in got}) == 4
    assert [u.path for u in read_unlabelled(tmp_path / "b.wav")] == [tmp_path / "b.wav"]
    with pytest.raises(DataError, match=r"none: there must be audio files \(\.aif, "):
        read_unlabelled(tmp_path / "none")


def test_what_is_no_source(tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_source(tmp_path / "gone")
    with pytest.raises(DataError, match=r"got none of: a Kaldi directory \(wav\.scp\), AN4"):
        read_source(tmp_path)
    write(tmp_path / "a.md", "x")
    with pytest.raises(DataError, match=r"or end in \.jsonl, \.json, \.csv, \.tsv, got 'a\.md'"):
        read_source(tmp_path / "a.md")
    with pytest.raises(UnknownNameError, match=r"unknown layout of recordings 'kaldy'\. Did you mean 'kaldi'"):
        read_source(tmp_path, "kaldy")
    for layout in LAYOUTS:  # asked for, and not there: never another kind of error
        with pytest.raises(DataError):
            read_source(tmp_path, layout)
        with pytest.raises(DataError):
            read_source(tmp_path / "a.md", layout)


# ---------------------------------------------------------------- real data


@pytest.mark.realdata
def test_real_digits(shared_data):
    got = read_source(shared_data / "speech" / "fsdd")
    assert got.layout == "digits"
    assert got.bad == []
    assert len(got) == 2000
    assert sum(u.split == "test" for u in got.utterances) == 200
    assert {u.speaker for u in got.utterances} == {"jackson", "nicolas", "theo", "yweweler"}
    assert sum(u.duration for u in got.utterances) == pytest.approx(804.3, abs=0.1)


@pytest.mark.realdata
def test_real_an4(shared_data, tmp_path):
    with tarfile.open(shared_data / "speech" / "mini_an4" / "downloads.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    got = read_source(tmp_path / "downloads" / "an4")
    assert got.layout == "an4"
    assert facts(got, "text", "split", "speaker")[0] == ("ELEVEN TWENTY SEVEN FIFTY SEVEN", "test", "fcaw")
    assert [u.split for u in got.utterances].count("train") == 5
    for utterance in got.utterances:
        assert len(read_audio(utterance.path, 16000)) == round(utterance.duration * 16000)
