"""``vertebra demo``: every pipeline on its sample data with the bundled models, in one report."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vertebra.errors import UnknownNameError
from vertebra.pipelines import figures
from vertebra.pipelines.base import pipeline
from vertebra.pipelines.report import Report


def run_demo(domains: list[str], out: Path) -> Path:
    """Write samples, run the pipelines of each domain on them, and write ``report.html``.

    Args:
        domains: Names of domains.
        out: Folder for samples, results and report.

    Returns:
        The report's path.

    Raises:
        UnknownNameError: A domain has no demo.
        ConfigError: Nothing can be written there.
    """
    for domain in domains:
        if domain not in _DEMOS:
            raise UnknownNameError("domain", domain, _DEMOS)
    report = Report("vertebra demo")
    report.text("Fabricated samples, read by every pipeline with the bundled models. Nothing here is real data.")
    for domain in domains:
        samples, results = out / domain / "sample", out / domain / "results"
        import_module(f"vertebra.domains.{domain}.sample").write_sample(samples, seed=0)
        _DEMOS[domain](samples, results, report)
    return report.write(out / "report.html")


def demo_dna(samples: Path, results: Path, report: Report) -> None:
    """Promoters against background, a genome scanned in windows, embeddings; then elements generated and scored."""
    classify = pipeline("dna/classify")
    inputs = [_head(samples / f"{name}.fa", results) for name in ("promoters", "background")]
    table = results / "classes.csv"
    classify.run(inputs, table)
    truth, scores = _labels_and_scores(table, inputs[0])
    report.section("dna/classify: promoters").code(f"vertebra run dna/classify {inputs[0]} {inputs[1]} -o {table}")
    report.table(_binary_metrics(truth, scores), ("metric", "model", "always the larger class"))
    report.figure(_histogram(truth, scores), "Score of every sample sequence, by what it is.")

    genome, scan = samples / "genome.fa", results / "genome.csv"
    pipeline("dna/classify", stride=8).run([genome], scan)
    sites = _bed_middles(samples / "genome.bed")
    report.section("dna/classify: a genome in windows").code(f"vertebra run dna/classify {genome} -o {scan} --stride 8")
    starts, curve, width, name = _windows(results / "genome.csv.windows.csv")
    caption = f"Promoter score along {name}; triangles are the promoters that the sample planted."
    report.figure(figures.track(starts, {"promoter": curve}, width=width, marks=sites, mark_label="planted"), caption)

    vectors = results / "embeddings.npz"
    pipeline("dna/embed").run(inputs, vectors)
    report.section("dna/embed").code(f"vertebra run dna/embed {inputs[0]} {inputs[1]} -o {vectors}")
    with np.load(vectors) as archive:
        caption = "First two principal components of the language model's embeddings; it has seen no label."
        report.figure(_components(archive["embeddings"], truth), caption)
    _demo_elements(samples, results, report)


def _demo_elements(samples: Path, results: Path, report: Report) -> None:
    """Generated promoters beside real ones, and what every substitution of a planted promoter costs."""
    elements, made = samples / "elements.csv", results / "generated.fa"
    pipeline(
        "dna/generate",
        labels=["bacterial", "background"],
        count=60,
        reference=elements,
        motifs=["minus10=TATAAT", "minus35=TTGACA"],
    ).run([], made)
    words = f"--label bacterial --label background --count 60 --reference {elements} "
    words += "--motif minus10=TATAAT --motif minus35=TTGACA"
    report.section("dna/generate").code(f"vertebra run dna/generate -o {made} {words}")
    summary = json.loads((results / "generated.fa.json").read_text(encoding="utf-8"))
    rows = [
        (
            group,
            facts["gc_mean"],
            facts["motifs"]["minus10"],
            facts["motifs"]["minus35"],
            facts.get("share_new", float("nan")),
        )
        for group, facts in summary.items()
    ]
    report.table(rows, ("sequences", "GC", "share with TATAAT", "share with TTGACA", "share new"))
    report.image(
        results / "generated.fa.png", "4-mers, GC and lengths of what was generated, beside the sample's elements."
    )

    genome, scored = samples / "genome.fa", results / "scores.csv"
    one = results / "one.bed"
    one.write_text((samples / "genome.bed").read_text(encoding="ascii").splitlines()[0] + "\n", encoding="ascii")
    score = pipeline(
        "dna/score", "dna_elements", label="bacterial", reference=genome, window=81, strands="forward", figures=1
    )
    score.run([one], scored)
    words = f"--reference {genome} --model dna_elements --label bacterial --window 81 --strands forward"
    report.section("dna/score").code(f"vertebra run dna/score {one} -o {scored} {words}")
    caption = "What every substitution of a planted promoter costs, in nats: its -35 and -10 boxes stand out."
    report.image(next(results.glob("scores.csv.1.*.png")), caption)


def _head(source: Path, folder: Path, count: int = 300) -> Path:
    """Copy the first records of a FASTA file: enough to show, and quick."""
    folder.mkdir(parents=True, exist_ok=True)
    records = source.read_text(encoding="ascii").split("\n>")[:count]
    target = folder / source.name
    target.write_text("\n>".join(records).rstrip("\n") + "\n", encoding="ascii")
    return target


def demo_vision(samples: Path, results: Path, report: Report) -> None:
    """Images of every kind and damaged ones, an evaluation with attention ranks; then images made and completed."""
    classify = pipeline("vision/classify")
    folders, table = [samples / "unsorted", samples / "damaged"], results / "classes.csv"
    classify.run(folders, table)
    report.section("vision/classify: images of every kind")
    report.code(f"vertebra run vision/classify {folders[0]} {folders[1]} -o {table}")
    caption = (
        "Grey, CMYK, 16 bits, transparent, turned, tiny, large: what the model says below, the file's name in grey."
    )
    report.image(results / "classes.csv.png", caption)
    _report_damaged(results / "classes.csv.errors.jsonl", report, "files cannot be read")

    fresh, table = _fresh_shapes(results / "fresh"), results / "evaluation.csv"
    pipeline("vision/classify", labels="folder", ranks=True).run([fresh], table)
    summary = json.loads((results / "evaluation.csv.json").read_text(encoding="utf-8"))
    report.section("vision/classify: how good")
    report.code(f"vertebra run vision/classify {fresh} -o {table} --labels folder --ranks")
    chance = 1 / len(summary["confusion"])
    rows = [
        ("accuracy", summary["accuracy"], chance),
        ("top-5 accuracy", summary["top5_accuracy"], min(1.0, 5 * chance)),
        ("calibration error", summary["calibration_error"], None),
    ]
    report.table(rows, ("metric", "model", "by chance"))
    report.image(
        results / "evaluation.csv.png",
        f"Some of {summary['labelled']} shapes, drawn for this report; folders are classes.",
    )
    report.image(results / "evaluation.csv.confusion.png", "True and predicted classes.")
    report.image(
        results / "evaluation.csv.ranks.png",
        "How many directions the attention of every head has; iLLaMA, section 3.7.",
    )
    _demo_generator(samples, results, report)


def _demo_generator(samples: Path, results: Path, report: Report) -> None:
    """Images of every class, and lower halves for a given upper one."""
    made = results / "made.png"
    pipeline("vision/generate", count=4).run([], made)
    report.section("vision/generate").code(f"vertebra run vision/generate -o {made} --count 4")
    report.image(made, "Four images of every class.")
    half, completed = samples / "top_half.png", results / "completed.png"
    pipeline("vision/generate", count=2, complete=half).run([], completed)
    report.code(f"vertebra run vision/generate -o {completed} --count 2 --complete {half}")
    report.image(completed, "The upper half of an image is kept, and the model draws the lower one, for every class.")


def _fresh_shapes(folder: Path, count: int = 20) -> Path:
    """Draw shapes that no model was trained on, in a folder for each class."""
    from vertebra.domains.vision.sample import CLASSES, draw_shape

    for number, kind in enumerate(CLASSES):
        rng = np.random.default_rng([2024, number])
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw_shape(rng, kind).save(folder / kind / f"{i:02}.png")
    return folder


def demo_speech(samples: Path, results: Path, report: Report) -> None:
    """Recordings of every format and damaged ones, a minute of dialogue, words over the spectrogram, languages."""
    folder, said = _with_damaged(samples / "strings", results / "recordings"), results / "strings.jsonl"
    pipeline("speech/transcribe").run([folder], said)
    report.section("speech/transcribe: recordings of every format").code(
        f"vertebra run speech/transcribe {folder} -o {said}"
    )
    rows = []
    for line in said.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        known = Path(found["file"]).with_suffix(".txt").read_text(encoding="utf-8").strip()
        rows.append((Path(found["file"]).name, known, found["text"]))
    report.table(rows, ("recording", "what is said", "what the model hears"))
    _report_damaged(results / "strings.jsonl.errors.jsonl", report, "files cannot be read")

    subtitles = results / "long.srt"
    transcribe = pipeline("speech/transcribe", window=10.0, context=2.0)
    transcribe.run([samples / "long.flac"], subtitles)
    report.section("speech/transcribe: a minute of dialogue, as subtitles")
    report.code(
        f"vertebra run speech/transcribe {samples / 'long.flac'} -o {subtitles} --window 10 --context 2\n\n"
        + "\n".join(subtitles.read_text(encoding="utf-8").splitlines()[:11])
    )
    aligned = results / "words.ctm"
    pipeline("speech/align", figures=1).run([samples / "strings"], aligned)
    report.section("speech/align").code(f"vertebra run speech/align {samples / 'strings'} -o {aligned} --figures 1")
    report.image(next(results.glob("words.ctm.1.*.png")), "When each word of a known text is said.")
    _demo_languages(samples, results, report)


def _demo_languages(samples: Path, results: Path, report: Report) -> None:
    """Which language is spoken, and translations, by one model that is told what to do."""
    known = {
        str(samples / entry["audio_filepath"]): entry
        for line in (samples / "languages.jsonl").read_text(encoding="utf-8").splitlines()
        if (entry := json.loads(line))
    }
    table = results / "languages.csv"
    pipeline("speech/identify").run([samples / "languages"], table)
    report.section("speech/identify").code(f"vertebra run speech/identify {samples / 'languages'} -o {table}")
    with table.open(newline="", encoding="utf-8") as stream:
        found = [(known[row["file"]]["lang"], row["language"]) for row in csv.DictReader(stream)]
    languages = sorted({true for true, _ in found})
    rows = [(true, *(sum(pair == (true, name) for pair in found) for name in languages)) for true in languages]
    report.table(rows, ("spoken", *(f"said to be {name}" for name in languages)))

    english = results / "english.jsonl"
    pipeline("speech/transcribe", "speech_languages", task="st_eng").run([samples / "languages"], english)
    report.section("speech/transcribe: into English").code(
        f"vertebra run speech/transcribe {samples / 'languages'} -o {english} --model speech_languages --task st_eng"
    )
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


def demo_mesh(samples: Path, results: Path, report: Report) -> None:
    """Clean meshes for scans and clouds; then meshes to tokens and back."""
    from vertebra.pipelines.mesh_figures import Panel
    from vertebra.pipelines.mesh_viewer import viewer

    scans = results / "meshes.json"
    pipeline("mesh/generate").run([samples / "clouds", samples / "scans"], scans)
    report.section("mesh/generate: scans and clouds of points")
    report.code(f"vertebra run mesh/generate {samples / 'clouds'} {samples / 'scans'} -o {scans}")
    report.text("These shapes have parameters that training never saw; meshes.json.html has all of them to turn.")
    report.image(results / "meshes.json.png", "Inputs and the meshes that were written for them.")
    made = json.loads(scans.read_text(encoding="utf-8"))["meshes"]
    names = ("faces", "input_faces", "chamfer", "watertight", "self_intersection_share")
    rows = [(facts["name"], *(facts.get(name) for name in names)) for facts in made]
    report.table(rows, ("shape", "faces", "faces of the input", "Chamfer", "watertight", "self-intersecting"))

    from vertebra.domains.mesh.files import read_mesh

    first = made[0]
    truth = read_mesh(next((samples / "truth").glob(f"{first['name']}.*")))
    output = read_mesh(results / first["file"])
    panels = [Panel(m.vertices, m.faces, label) for m, label in ((output, "output"), (truth, "truth"))]
    report.html(viewer(first["name"], panels))

    tokens, back = results / "tokens.npz", results / "back.json"
    pipeline("mesh/tokenize").run([samples / "shapes"], tokens)
    pipeline("mesh/tokenize").run([tokens], back)
    report.section("mesh/tokenize").code(
        f"vertebra run mesh/tokenize {samples / 'shapes'} -o {tokens}\nvertebra run mesh/tokenize {tokens} -o {back}"
    )
    facts = json.loads((results / "tokens.npz.json").read_text(encoding="utf-8"))
    report.facts({"meshes": len(facts["meshes"]), "tokens": facts["tokens"], "of nine a face": facts["ratio"]})

    damaged = results / "damaged.json"
    pipeline("mesh/generate", candidates=1).run([samples / "damaged"], damaged)
    _report_damaged(results / "damaged.json.errors.jsonl", report, "damaged files are listed")


def demo_action(samples: Path, results: Path, report: Report) -> None:
    """Demonstrations to tokens and back, chunks for recorded observations, and the policy at work in a simulator."""
    tokens, back = results / "tokens.npz", results / "back.csv"
    pipeline("action/tokenize", tokenizer="bspline,num_basis=8", gripper="gripper").run([samples / "arm"], tokens)
    report.section("action/tokenize: demonstrations of a seven-joint arm")
    report.code(
        f"vertebra run action/tokenize {samples / 'arm'} -o {tokens} --tokenizer bspline,num_basis=8 --gripper gripper"
    )
    facts = json.loads((results / "tokens.npz.json").read_text(encoding="utf-8"))
    rows = [(joint["name"], joint["rmse"], joint["largest"]) for joint in facts["joints"]]
    report.table(rows, ("column", "RMSE", "largest error"))
    per_chunk = facts["tokens_per_chunk"]
    report.facts({"chunks": facts["chunks"], "tokens a chunk": per_chunk["mean"], "by binning": per_chunk["binning"]})
    report.image(results / "tokens.npz.png", "What was demonstrated, and what the tokens say.")
    pipeline("action/tokenize", steps_per_second=50).run([tokens], back)
    report.text("Tokens say actions at any rate of control; here at 50 a second instead of 20.")
    report.code(f"vertebra run action/tokenize {tokens} -o {back} --steps-per-second 50")

    chunks = results / "chunks.csv"
    pipeline("action/predict").run([samples / "held_out"], chunks)
    report.section("action/predict: recorded observations")
    report.code(f"vertebra run action/predict {samples / 'held_out'} -o {chunks}")
    facts = json.loads((results / "chunks.csv.json").read_text(encoding="utf-8"))
    found = [("policy", facts["rmse_all"]), ("staying where it is", facts["hold_rmse_all"])]
    report.table(found, ("", "RMSE of the next second (rad; gripper 0 to 1)"))
    report.facts({"decisions": facts["decisions"], "ms a decision": facts["decision_ms"]})
    report.image(
        results / "chunks.csv.png", "What was done, and what the policy would have done from each decision on."
    )

    rollouts = results / "rollouts.csv"
    pipeline("action/predict", sim="ArmPick", episodes=24, execute=10).run([], rollouts)
    report.section("action/predict: closed loop")
    report.code(f"vertebra run action/predict --sim ArmPick --episodes 24 --execute 10 -o {rollouts}")
    facts = json.loads((results / "rollouts.csv.json").read_text(encoding="utf-8"))
    names = ("episodes", "success", "success_low", "success_high", "steps_to_success", "jerk", "decision_ms")
    report.facts({name: facts[name] for name in names})
    report.image(
        results / "rollouts.csv.film.png", "The first episode, on places of the table that training never saw."
    )
    report.image(results / "rollouts.csv.png", "All episodes.")

    damaged = results / "damaged.npz"
    pipeline("action/tokenize", gripper="gripper").run([samples / "damaged"], damaged)
    _report_damaged(results / "damaged.npz.errors.jsonl", report, "damaged files are listed")


def demo_timeseries(samples: Path, results: Path, report: Report) -> None:
    """A substation with a backtest, one run over files of five formats, and a file with bad series."""
    power, hours = results / "power.csv", samples / "power.csv"
    pipeline("timeseries/forecast", horizon=48, backtest=5, figures=2).run([hours], power)
    report.section("timeseries/forecast: a substation, hourly")
    report.code(f"vertebra run timeseries/forecast {hours} -o {power} --horizon 48 --backtest 5 --figures 2")
    facts = json.loads((results / "power.csv.backtest.json").read_text(encoding="utf-8"))
    names = {"mase": "MASE", "crps": "CRPS", "mse": "MSE", "smape": "sMAPE", "coverage_80": "in the 80 % band"}
    parts = [facts[who] for who in ("model", "seasonal_naive", "ratio")]
    rows = [(label, *(part.get(name) for part in parts)) for name, label in names.items()]
    report.table(rows, ("metric", "model", "seasonal naive", "ratio"))
    report.text("The model has never seen this series. A ratio below 1 is better than repeating the day before.")
    for path, caption in (
        (results / "power.csv.png", "Days that were forecast as if they were not known, and the next two."),
        (next(results.glob("power.csv.2.*.png")), "The same of another column."),
    ):
        report.image(path, caption)

    files = [samples / name for name in ("visitors.csv", "monthly.tsf", "traffic", "sensors.parquet", "machines.npz")]
    table = results / "forecasts.parquet"
    pipeline("timeseries/forecast", horizon=24, figures=3).run(files, table)
    report.section("timeseries/forecast: files of every format")
    report.code(f"vertebra run timeseries/forecast {' '.join(map(str, files))} -o {table} --horizon 24 --figures 3")
    report.text("Days, months, hours, quarters of an hour, and no stamps at all: frequency and season are found.")
    for path in (results / "forecasts.parquet.png", next(results.glob("forecasts.parquet.3.*.png"))):
        report.image(path, "What was, and what may come: the median, and how sure it is.")

    damaged = results / "damaged.csv"
    pipeline("timeseries/forecast", horizon=24, figures=0).run([samples / "bad.csv"], damaged)
    _report_damaged(results / "damaged.csv.errors.jsonl", report, "series cannot be used", by="record")


def _report_damaged(path: Path, report: Report, what: str, *, by: str = "file") -> None:
    """Tell what was wrong with the bad records of a run, each called by its file or its name."""
    bad = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    report.text(f"{len(bad)} {what}; the others are done all the same, and the exit status is 3.")
    rows = [(Path(e["file"]).name if by == "file" else e[by], e["rule"], e["advice"]) for e in bad]
    report.table(rows, ("file" if by == "file" else "series", "what is wrong", "what to do"))


_DEMOS: dict[str, Callable[[Path, Path, Report], None]] = {
    "action": demo_action,
    "dna": demo_dna,
    "mesh": demo_mesh,
    "speech": demo_speech,
    "timeseries": demo_timeseries,
    "vision": demo_vision,
}


def _labels_and_scores(table: Path, positives: Path) -> tuple[np.ndarray, np.ndarray]:
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    truth = np.array([row["file"] == str(positives) for row in rows])
    return truth, np.array([float(row["positive"]) for row in rows])


def _binary_metrics(truth: np.ndarray, scores: np.ndarray) -> list[tuple[str, float, float]]:
    """Accuracy, MCC and AUROC at a threshold of one half, and of a constant answer."""
    from scipy.stats import rankdata

    said = scores >= 0.5
    tp, tn = float((said & truth).sum()), float((~said & ~truth).sum())
    fp, fn = float((said & ~truth).sum()), float((~said & truth).sum())
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    ranks = rankdata(scores)  # ties share their mean rank
    positives = truth.sum()
    auroc = (ranks[truth].sum() - positives * (positives + 1) / 2) / max(positives * (~truth).sum(), 1)
    return [
        ("accuracy", (tp + tn) / len(truth), max(truth.mean(), 1 - truth.mean())),
        ("MCC", (tp * tn - fp * fn) / root if root else 0.0, 0.0),
        ("AUROC", float(auroc), 0.5),
    ]


def _bed_middles(path: Path) -> list[int]:
    """Middles of the intervals of a BED file, where the scores of windows are drawn too."""
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", ""))
    return [(int(fields[1]) + int(fields[2])) // 2 for fields in lines]


def _windows(path: Path) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Starts, scores of the class ``positive``, and the width of the windows of the first record."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows = [row for row in rows if row["name"] == rows[0]["name"]]
    starts = np.array([int(row["start"]) for row in rows])
    return starts, np.array([float(r["positive"]) for r in rows]), int(rows[0]["end"]) - int(starts[0]), rows[0]["name"]


def _histogram(truth: np.ndarray, scores: np.ndarray) -> Any:
    figure, (axes,) = figures.new_figure(width=7.0, height=2.8)
    bins = np.linspace(0, 1, 41).tolist()
    for keep, name, color in ((truth, "promoters", figures.PALETTE[1]), (~truth, "background", figures.PALETTE[0])):
        axes.hist(scores[keep], bins=bins, histtype="stepfilled", alpha=0.55, label=name, color=color)
    axes.set_xlabel("score of the class promoter (probability)")
    axes.set_ylabel("sequences")
    axes.legend(frameon=False, loc="upper center")
    return figure


def _components(vectors: np.ndarray, truth: np.ndarray) -> Any:
    centred = vectors - vectors.mean(0)
    _, _, axes_of_change = np.linalg.svd(centred, full_matrices=False)
    places = centred @ axes_of_change[:2].T
    figure, (axes,) = figures.new_figure(width=5.2, height=4.0)
    for keep, name, color in ((~truth, "background", figures.PALETTE[0]), (truth, "promoters", figures.PALETTE[1])):
        axes.scatter(places[keep, 0], places[keep, 1], s=5, alpha=0.5, linewidths=0, label=name, color=color)
    axes.set_xlabel("component 1")
    axes.set_ylabel("component 2")
    axes.legend(frameon=False, markerscale=3)
    return figure
