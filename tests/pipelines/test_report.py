"""Reports: one file that loads nothing, text that stays text; and the demo, which is one."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import bundled_models
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, UnknownNameError
from vertebra.pipelines import base, dark, figures
from vertebra.pipelines.demo.base import run_demo
from vertebra.pipelines.dna import Classify
from vertebra.pipelines.dna_embed import Embed
from vertebra.pipelines.dna_generate import Generate
from vertebra.pipelines.report import Report
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

NASTY = "<script>alert('&')</script>"
VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page(path):
    """Parse a report, after seeing that it loads nothing."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?://|url\(|@import", text)
    found = Page(text)
    assert found.tags.count("script") == 1  # the page's own
    assert not set(found.tags) & {"link", "iframe", "object"}
    sources = [value for name, value in found.attributes if name in ("src", "href", "srcset")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    return found


def test_everything_is_in_one_file_and_text_is_escaped(tmp_path):
    figure = figures.bars({NASTY: 0.5, "b": 0.25}, title=NASTY)
    report = Report(NASTY).section(NASTY).text(NASTY).code(NASTY).table([(NASTY, 1)], (NASTY, "n"))
    report.facts({NASTY: NASTY}).figure(figure, f'a "quoted" {NASTY}')
    found = page(report.write(tmp_path / "new" / "report.html"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]
    assert sum(word == NASTY for word in found.words) == 9
    assert ("alt", f'a "quoted" {NASTY}') in found.attributes
    assert [value for name, value in found.attributes if name == "class" and value in ("day", "night", "paper")] == [
        "day",
        "night",
    ]


def test_the_menu_names_chapters_or_else_sections(tmp_path):
    def menu(report):
        found = page(report.write(tmp_path / "report.html"))
        ids = [f"#{value}" for name, value in found.attributes if name == "id"]
        links = [value for name, value in found.attributes if name == "href"]
        assert set(links) <= set(ids)
        return links

    assert menu(Report("t").section("a").section("b")) == ["#section-1", "#section-2"]
    assert menu(Report("t").chapter("a").section("b").section("c").chapter("d")) == ["#chapter-1", "#chapter-2"]
    assert menu(Report("t").section("alone")) == []


def test_a_figure_file_shows_its_dark_twin_where_twins_are_kept(tmp_path):
    def images(report):
        return [value for name, value in page(report.write(tmp_path / "r.html")).attributes if name == "class"]

    path = tmp_path / "a.png"
    path.write_bytes(figures.png_bytes(figures.bars({"a": 0.5})))
    plain = path.read_bytes()
    assert images(Report("t").image(path, "c"))[-2:] == ["wide", "paper"]
    with dark.dark_twins():
        path.write_bytes(figures.png_bytes(figures.bars({"a": 0.5})))
        assert path.read_bytes() == plain
        assert images(Report("t").image(path, "c"))[-3:] == ["wide", "day", "night"]
    assert images(Report("t").image(path, "c"))[-2:] == ["wide", "paper"]


def test_recordings_are_in_the_page(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF")
    text = Report("t").sounds([(path, "a & b")]).write(tmp_path / "r.html").read_text()
    assert 'src="data:audio/wav;base64,UklGRg=="' in text
    assert "<figcaption>a &amp; b</figcaption>" in text


def test_tables_put_numbers_on_the_right_with_four_digits(tmp_path):
    nothing = Report("t").table([(float("nan"),)]).write(tmp_path / "r.html").read_text()
    assert '<td class="number"></td>' in nothing
    rows = [("name", 1234567, 0.123456, np.float64(2.0)), (None, True, "x", 1e-9)]
    text = Report("t").table(rows, ("a", "b", "c", "d")).write(tmp_path / "r.html").read_text()
    assert '<tr><th>a</th><th>b</th><th>c</th><th class="number">d</th></tr>' in text
    number = '<td class="number">{}</td>'.format
    assert f"<tr><td>name</td>{number('1,234,567')}{number('0.1235')}{number('2')}</tr>" in text
    assert f"<tr><td></td><td>True</td><td>x</td>{number('1e-09')}</tr>" in text


def test_html_is_kept_as_it_is_in_its_place(tmp_path):
    fragment = "<figure><script>1 < 2 && '\\n'</script></figure>"
    text = Report("t").text("before").html(fragment).text("after").write(tmp_path / "r.html").read_text()
    assert f"<p>before</p>\n{fragment}\n<p>after</p>" in text


def test_a_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^output: '.*report\.html' cannot be written \(.*\); choose another folder"):
        Report("t").write(tmp_path / "file" / "report.html")


@pytest.fixture
def tiny_models(tmp_path, monkeypatch):
    """Tiny models in the place of the bundled ones, whose demo takes a minute."""
    facts = {"tokenizer": NucleotideTokenizer().to_dict(), "max_length": 81}
    known = {}
    for cls, kind, spec in (
        (Classify, DNAClassifier, DNASpec(task="classification", classes=("negative", "positive"), **facts)),
        (Embed, DNALanguageModel, DNASpec(task="lm", **facts)),
        (
            Generate,
            DNALanguageModel,
            DNASpec(task="lm", classes=("background", "bacterial"), bos=True, eos=True, **{**facts, "max_length": 84}),
        ),
    ):
        folder = save_model(kind(create_backbone("hybrid_test"), spec), tmp_path / "models" / cls.__name__)
        monkeypatch.setattr(cls, "default_model", str(folder))
        known[str(folder)] = folder
    monkeypatch.setattr(base, "bundled_models", lambda: known)


@pytest.mark.parametrize("verb", ["dna/classify", "dna/embed"])
def test_the_models_that_the_demo_takes_fit_it(verb):
    cls = base.pipeline_class(verb)
    if cls.default_model not in bundled_models():
        pytest.skip(f"{cls.default_model} is not bundled")
    sequence = "ACGT" * 20 + "A"
    found = base.pipeline(verb, device="cpu")
    assert found.window >= len(sequence)
    if verb == "dna/classify":
        assert "positive" in found(sequence).scores
    else:
        assert np.isfinite(found(sequence).value).all()


@pytest.mark.slow
def test_demo_runs_every_pipeline_into_one_report(tiny_models, tmp_path):
    out = tmp_path / "demo"
    told = []
    done = run_demo(["dna"], out, told.append)
    assert done.report == out / "report.html"
    verbs = ["dna/classify", "dna/classify", "dna/embed", "dna/generate", "dna/score"]
    assert told == [stage.pipeline for stage in done.stages] == verbs
    assert 0 < sum(stage.seconds for stage in done.stages) < done.seconds
    found = page(done.report)
    assert found.tags.count("section") == 2 + len(verbs) + 1  # chapters, commands, and what ran
    text = " ".join(found.words)
    for expected in (
        "vertebra run dna/classify",
        "vertebra run dna/embed",
        "vertebra run dna/generate",
        "vertebra run dna/score",
        "accuracy",
        "MCC",
        "AUROC",
    ):
        assert expected in text
    results = {p.name for p in (out / "dna" / "results").iterdir()}
    assert {"classes.csv", "genome.csv", "genome.csv.windows.csv", "embeddings.npz"} <= results
    assert {"generated.fa", "generated.fa.json", "scores.csv", "scores.csv.1.promoter_0.png"} <= results
    assert not list(out.rglob(".*"))


def test_demo_of_an_unknown_domain_writes_nothing(tmp_path):
    known = r"^unknown domain 'dns'\. Did you mean 'dna'\? Known: action, dna, mesh, speech, timeseries, vision\.$"
    with pytest.raises(UnknownNameError, match=known):
        run_demo(["dns"], tmp_path / "demo")
    assert not list(tmp_path.iterdir())
