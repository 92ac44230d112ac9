"""Initial weights: where they are found, across domains, and what declared adapters make fit."""

import json
import logging

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.action.model import DecoderPolicy
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.dna.data import DNASequenceData
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.dna.task import DNAClassificationTask
from vertebra.domains.initial import init_weights, read_source
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.model import Origin
from vertebra.domains.saving import save_model
from vertebra.domains.speech.model import SpeechCTC
from vertebra.domains.speech.spec import SpeechSpec
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import LoadError, UnknownNameError
from vertebra.tokenizers.bspline import BSplineTokenizer
from vertebra.tokenizers.mesh_amt import AMTTokenizer
from vertebra.tokenizers.nucleotide import KmerTokenizer, NucleotideTokenizer

LETTERS = NucleotideTokenizer().to_dict()


def dna(*, tokenizer=LETTERS, classes=("no", "yes"), max_length=12, backbone="illama_test", **options):
    spec = DNASpec(tokenizer=tokenizer, task="classification", max_length=max_length, classes=classes)
    return DNAClassifier(create_backbone(backbone), spec, **options)


def language(*, tokenizer=LETTERS, classes=(), **options):
    spec = DNASpec(tokenizer=tokenizer, task="lm", max_length=12, classes=classes)
    return DNALanguageModel(create_backbone("illama_test"), spec, **options)


def series(*, patch=4, past=(), known=(), seasonal=False, **options):
    named = {"past": past, "known": known}
    scales = {f"{name}_{part}": (1.0,) * len(of) for name, of in named.items() for part in ("center", "scale")}
    spec = SeriesSpec(context=16, horizon=8, **named, **scales)
    return PatchForecaster(create_backbone("illama_test"), spec, patch=patch, seasonal=seasonal, **options)


def speech(*, tokens=("<blank>", "a", "b"), n_mels=20, **options):
    spec = SpeechSpec(sample_rate=8000, n_mels=n_mels, tokens=tokens)
    return SpeechCTC(create_backbone("illama_test"), spec, channels=6, **options)


def image(*, channels=3, size=16, classes=("cat", "dog"), **options):
    spec = VisionSpec(task="classification", channels=channels, height=size, width=size, classes=classes)
    return ImageClassifier(create_backbone("illama_test"), spec, patch_size=4, **options)


def policy(*, states=("x", "y"), tasks=("push", "pull")):
    tokenizer = BSplineTokenizer(
        horizon=8, dims=2, vocab_size=16, num_basis=4, degree=3, low=[[-1.0] * 2] * 4, high=[[1.0] * 2] * 4
    )
    count = len(states)
    spec = ActionSpec(
        tokenizer=tokenizer.to_dict(), fps=10, state_names=states, state_mean=(0.0,) * count, state_std=(1.0,) * count,
        change_std=(1.0,) * count, action_names=("x", "y"), start_std=(1.0, 1.0), positions=(-1, -1), relative=(-1, -1),
        tasks=tasks,
    )  # fmt: skip
    return DecoderPolicy(create_backbone("illama_test"), spec)


def mesh(buckets):
    tokenizer = AMTTokenizer(bins=8).to_dict()
    spec = MeshSpec(tokenizer=tokenizer, points=32, max_faces=9, max_tokens=99, face_buckets=buckets)
    return MeshGenerator(create_backbone("illama_test"), spec, encoder={"heads": 2, "layers": 1, "latents": 2})


def pictures(size, classes=("cat",)):
    spec = VisionSpec(task="generation", channels=1, height=size, width=size, classes=classes)
    return ImageGenerator(create_backbone("illama_test"), spec, levels=4)


def moved(source, target, tmp_path, parts="all"):
    """Initialise ``target`` from a model directory of ``source``; return the report and the old values."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = init_weights(target, str(save_model(source, tmp_path / "m")), parts)
    return report, before


# ---------------------------------------------------------------- adapters


def test_tokens_of_another_vocabulary_are_found_by_name(tmp_path):
    source, target = language(), language(tokenizer=KmerTokenizer(2).to_dict())
    report, before = moved(source, target, tmp_path)
    assert report.reshaped == [
        "embed.weight (12, 16) -> (23, 16): 7 of 23 tokens by name, 16 fresh",
        "head.weight (12, 16) -> (23, 16): 7 of 23 tokens by name, 16 fresh",
    ]
    for name in ("embed", "head"):
        now = getattr(target, name).weight
        assert torch.equal(now[:7], getattr(source, name).weight[:7])
        assert torch.equal(now[7:], before[f"{name}.weight"][7:])


def test_a_tied_head_follows_its_embedding(tmp_path):
    source, target = language(tie=True), language(tokenizer=KmerTokenizer(2).to_dict(), tie=True)
    moved(source, target, tmp_path)
    assert target.head.weight is target.embed.weight
    assert torch.equal(target.embed.weight[:7], source.embed.weight[:7])


def test_a_vocabulary_of_the_same_size_is_put_into_order(tmp_path):
    source, target = language(classes=("old", "new")), language(classes=("new", "other"))
    report, before = moved(source, target, tmp_path)
    assert report.reshaped == ["embed.weight (14, 16): 13 of 14 tokens by name, 1 fresh"]
    assert torch.equal(target.embed.weight[12], source.embed.weight[13])
    assert torch.equal(target.embed.weight[13], before["embed.weight"][13])
    assert torch.equal(target.head.weight, source.head.weight)


def test_heads_of_other_classes_keep_the_rows_that_are_known(tmp_path):
    source, target = dna(classes=("a", "b", "c")), dna(classes=("c", "d", "a", "e"))
    report, before = moved(source, target, tmp_path)
    assert report.reshaped == [
        "head.1.weight (3, 16) -> (4, 16): 2 of 4 outputs by name, 2 fresh",
        "head.1.bias (3,) -> (4,): 2 of 4 outputs by name, 2 fresh",
    ]
    assert torch.equal(target.head[1].weight[[0, 2]], source.head[1].weight[[2, 0]])
    assert torch.equal(target.head[1].bias[[1, 3]], before["head.1.bias"][[1, 3]])
    report, before = moved(source, dna(classes=("x", "y", "z")), tmp_path)
    assert report.missing == ["head.1.weight", "head.1.bias"]


def test_more_learned_positions(tmp_path):
    source, target = (dna(max_length=n, positions="learned") for n in (12, 20))
    report, before = moved(source, target, tmp_path, "backbone")
    assert report.reshaped == ["positions.weight (12, 16) -> (20, 16): the first 12 rows as saved, 8 fresh"]
    assert torch.equal(target.positions.weight[:12], source.positions.weight)
    assert torch.equal(target.positions.weight[12:], before["positions.weight"][12:])


@pytest.mark.parametrize("length", [24, 60])
def test_a_longer_context_of_the_backbone(length, tmp_path):
    source, target = dna(backbone="opt_test,max_length=40"), dna(backbone=f"opt_test,max_length={length}")
    report, before = moved(source, target, tmp_path)
    kept = min(42, length + 2)
    assert len(report.reshaped) == 1
    assert torch.equal(target.backbone.positions.weight[:kept], source.backbone.positions.weight[:kept])
    assert torch.equal(target.backbone.positions.weight[kept:], before["backbone.positions.weight"][kept:])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [(3, 1, "the sum of 3 channels"), (1, 3, "the sum of 1 channels, shared out over 3")],
)
def test_other_channels_of_images(old, new, said, tmp_path):
    source, target = image(channels=old).eval(), image(channels=new).eval()
    report, _ = moved(source, target, tmp_path)
    assert report.reshaped == [f"patch_embed.proj.weight (16, {old}, 4, 4) -> (16, {new}, 4, 4): {said}"]
    grey = torch.randn(2, 1, 16, 16)
    one, two = source(grey.expand(-1, old, -1, -1)), target(grey.expand(-1, new, -1, -1))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_another_image_size_and_classes(tmp_path):
    source, target = image(), image(size=24, classes=("dog", "cat", "cow"))
    report, _ = moved(source, target, tmp_path)
    assert report.reshaped == [
        "pos_embed (1, 17, 16) -> (1, 37, 16): interpolated from 4 x 4 patches to 6 x 6",
        "head.weight (2, 16) -> (3, 16): 2 of 3 classes by name, 1 fresh",
        "head.bias (2,) -> (3,): 2 of 3 classes by name, 1 fresh",
    ]
    assert torch.equal(target.head.weight[:2], source.head.weight.flip(0))
    assert torch.equal(target.pos_embed[:, -1], source.pos_embed[:, -1])


def test_another_size_of_generated_images(tmp_path):
    source, target = pictures(6, ("cat", "dog")), pictures(9, ("dog",))
    report, _ = moved(source, target, tmp_path)
    assert [line.partition(": ")[2] for line in report.reshaped] == [
        "places interpolated", "places interpolated", "1 of 1 classes by name",
    ]  # fmt: skip
    torch.testing.assert_close(target.positions.height[4], source.positions.height[2:4].mean(0))


def test_another_patch_of_series(tmp_path):
    source, target = series(), series(patch=8)
    report, _ = moved(source, target, tmp_path)
    assert report.reshaped == ["in_proj.weight (16, 8) -> (16, 16): steps of a patch resampled"]
    sums = (m.in_proj.weight.unflatten(1, (2, -1)).sum(-1) for m in (source, target))
    torch.testing.assert_close(*sums)  # a constant patch is the same feature
    assert {name.partition(".")[0] for name in report.missing} == {"param_proj"}


def test_covariates_are_found_by_name(tmp_path):
    source = series(past=("wind", "rain"), known=("holiday",), seasonal=True)
    target = series(past=("rain", "sun"), known=("price", "holiday"), seasonal=True)
    report, before = moved(source, target, tmp_path, "backbone")
    assert report.reshaped == [
        "past_proj.weight (16, 8): 1 of 2 covariates by name, 1 fresh",
        "known_proj.weight (16, 16) -> (16, 20): 4 of 5 covariates by name, 1 fresh",
    ]
    assert torch.equal(target.past_proj.weight[:, :4], source.past_proj.weight[:, 4:])
    assert torch.equal(target.known_proj.weight[:, :4], before["known_proj.weight"][:, :4])
    assert torch.equal(target.known_proj.weight[:, 4:], source.known_proj.weight)
    report, _ = moved(source, series(patch=8, past=("rain",), known=("price",)), tmp_path, "backbone")
    assert {"past_proj.weight", "known_proj.weight"} <= set(report.missing)


def test_other_tokens_and_bands_of_speech(tmp_path):
    source, target = speech(), speech(tokens=("<blank>", "b", "c"), n_mels=32)
    report, before = moved(source, target, tmp_path)
    assert report.reshaped == [
        "subsample.out.weight (16, 24) -> (16, 42): log-mel channels resampled",
        "head.weight (3, 16): 2 of 3 tokens by name, 1 fresh",
        "head.bias (3,): 2 of 3 tokens by name, 1 fresh",
    ]
    assert torch.equal(target.head.weight[:2], source.head.weight[[0, 2]])
    assert torch.equal(target.head.weight[2], before["head.weight"][2])
    assert torch.equal(target.normalise.mean, before["normalise.mean"])
    sums = (m.subsample.out.weight.unflatten(1, (6, -1)).sum(-1) for m in (source, target))
    torch.testing.assert_close(*sums)
    report, _ = moved(source, speech(n_mels=32, subsampling=2), tmp_path)
    assert "subsample.out.weight" in report.missing


def test_states_and_tasks_of_a_robot(tmp_path):
    source, target = policy(), policy(states=("z", "y"), tasks=("pull", "lift", "push"))
    report, before = moved(source, target, tmp_path, "backbone")
    assert report.reshaped == [
        "observe.state.0.weight (16, 2): 1 of 2 states by name, 1 fresh",
        "observe.task_embed.weight (2, 16) -> (3, 16): 2 of 3 tasks by name, 1 fresh",
    ]
    assert torch.equal(target.observe.state[0].weight[:, 1], source.observe.state[0].weight[:, 1])
    assert torch.equal(target.observe.state[0].weight[:, 0], before["observe.state.0.weight"][:, 0])
    assert torch.equal(target.observe.task_embed.weight[[2, 0]], source.observe.task_embed.weight)


def test_ranges_of_face_counts(tmp_path):
    source, target = mesh((10, 20)), mesh((20, 40))
    report, _ = moved(source, target, tmp_path, "backbone")
    assert report.reshaped == ["face_embed.weight (4, 16): 3 of 4 ranges of faces by name, 1 fresh"]
    assert torch.equal(target.face_embed.weight[[0, 1, 3]], source.face_embed.weight[[0, 2, 3]])


def test_adapters_of_a_model_of_which_only_the_weights_are_known():
    source, target = image(), image(size=24)
    changed = target.adapt(source.state_dict(), Origin())
    assert changed["pos_embed"].shape == target.pos_embed.shape
    assert changed["head.weight"] is not None
    assert language().adapters(Origin()).keys() == {"positions.weight"}


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("backbone", ["illama_test", "hybrid_test"])
@pytest.mark.parametrize("parts", ["backbone", "all"])
def test_a_backbone_goes_from_one_domain_to_another(backbone, parts, tmp_path):
    source = dna(backbone=backbone)
    spec = SeriesSpec(context=16, horizon=8)
    target = PatchForecaster(create_backbone(backbone), spec, patch=4)
    report, before = moved(source, target, tmp_path, parts)
    for name, value in target.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, source.state_dict()[name]), name
        else:
            assert torch.equal(value, before[name]), name
    assert set(report.missing) == {name for name in before if not name.startswith("backbone.")}
    assert set(report.unexpected) == {name for name in source.state_dict() if not name.startswith("backbone.")}


def test_the_backbone_of_another_structure_is_refused_whole(tmp_path):
    target = series()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    folder = save_model(dna(backbone="hybrid_test"), tmp_path / "m")
    with pytest.raises(LoadError, match=r"its backbone \(hybrid, .*\) is another than this model's: family ") as e:
        init_weights(target, str(folder))
    assert "do not fit PatchForecaster" in str(e.value.__cause__)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_run_folder_means_its_model_directory(tmp_path):
    source = dna()
    run = tmp_path / "runs" / "dna" / "1"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(LoadError, match=r"this run has no model yet, .* name a checkpoint of it, such as .*last\.ckpt"):
        read_source(str(run))
    save_model(source, run / "model")
    (run.parent / "latest").symlink_to("1", target_is_directory=True)
    for place in (run, run.parent / "latest", run / "model", f"local-dir:{run}"):
        tensors, origin = read_source(str(place))
        assert origin == Origin(source.spec, source.arguments, source.backbone.config)
        assert all(torch.equal(tensors[name], value) for name, value in source.state_dict().items())


def test_places_without_weights_are_named(tmp_path):
    with pytest.raises(LoadError, match=r"gone\.ckpt: no such checkpoint file"):
        read_source(str(tmp_path / "gone.ckpt"))
    with pytest.raises(UnknownNameError, match="dna_promotr"):
        read_source("dna_promotr")


def test_bundled_models_are_sources():
    tensors, origin = read_source("dna_lm")
    assert origin.spec.domain == "dna"
    assert "embed.weight" in tensors


# ---------------------------------------------------------------- runs


def write_table(path, classes):
    rng = np.random.default_rng(0)
    rows = [f"s{i},{''.join(rng.choice(list('ACGT'), 20))},{classes[i % len(classes)]}" for i in range(24)]
    path.write_text("name,sequence,label\n" + "\n".join(rows) + "\n")
    return str(path)


def test_a_pretrained_backbone_and_initial_weights_are_both_told(tmp_path, caplog):
    folder = save_model(dna(), tmp_path / "m")
    data = DNASequenceData(file=write_table(tmp_path / "a.csv", ("x", "y")), val_fraction=0.2)
    data.setup("fit")
    task = DNAClassificationTask(f"local-dir:{folder}", init_from=str(folder))
    task.build(data.spec)
    with caplog.at_level(logging.INFO, logger="vertebra"):
        task.load_initial()
    assert list(task.load_reports) == [f"local-dir:{folder}", str(folder)]
    assert task.load_report is task.load_reports[str(folder)]
    assert len([m for m in caplog.messages if "matched" in m]) == 2


def test_fit_takes_a_run_of_another_domain_and_leaves_the_report_in_the_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "a.csv", ("x", "y"))
    common = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    dna_run = ["fit", "--model", "DNAClassificationTask", "--model.backbone", "illama_test",
               "--data", "DNASequenceData", "--data.file", table, "--data.val_fraction", "0.2", *common]  # fmt: skip
    assert main(dna_run) == 0
    capsys.readouterr()
    rows = [f"2020-01-{day:02d} {hour:02d}:00,{hour}.{day}" for day in range(1, 20) for hour in range(24)]
    (tmp_path / "s.csv").write_text("\n".join(["time,a", *rows]) + "\n")
    words = ["fit", "--model", "ForecastTask", "--model.backbone", "illama_test", "--model.patch", "4",
             "--model.init_from", "runs/DNAClassificationTask/latest", "--model.init_parts", "backbone",
             "--data", "SeriesData", "--data.path", "s.csv", "--data.context", "16", "--data.horizon", "8",
             *common]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    layers = len(create_backbone("illama_test").state_dict())
    assert f"runs/DNAClassificationTask/latest: {layers} matched" in printed
    run = tmp_path / "runs" / "ForecastTask" / "1"
    report = (run / "initial.txt").read_text()
    assert report.startswith(f"runs/DNAClassificationTask/latest: {layers} matched, 0 reshaped")
    assert "  fresh       param_proj.proj.weight\n" in report
    assert "  not taken   embed.weight\n" in report
    assert "initial.txt" in printed
    assert "Initial weights" in (run / "report.html").read_text()
    assert json.loads((run / "model" / "config.json").read_text())["task"] == "timeseries/forecast"
    assert not (tmp_path / "runs" / "DNAClassificationTask" / "1" / "initial.txt").exists()


def test_the_command_line_sets_adapters_and_a_checkpoint_with_them_is_tested_and_resumed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "a.csv", ("x", "y"))
    words = ["fit", "--model", "DNAClassificationTask", "--model.backbone", "illama_test", "--data", "DNASequenceData",
             "--data.file", table, "--data.val_fraction", "0.2", "--data.predict_file", table,
             "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]  # fmt: skip
    lora = ["--model.tune.lora_rank", "2", "--model.tune.lora_targets", "qkv"]
    assert main([*words, "--trainer.max_steps", "2", *lora]) == 0
    run = tmp_path / "runs" / "DNAClassificationTask" / "1"
    assert not any("lora" in name for name in read_source(str(run))[0])
    config = (run / "config.yaml").read_text()
    assert "lora_rank: 2" in config
    assert main(["validate", "--ckpt_path", str(run), "-o", "numbers.json"]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == pytest.approx(json.loads((run / "metrics.json").read_text())["validation"], nan_ok=True)
    assert main(["predict", "--ckpt_path", str(run), "-o", "p.csv"]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 25
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_steps", "3"]) == 0
    assert json.loads((run / "metrics.json").read_text())["steps"] == 3
    assert main([*words, "--trainer.max_steps", "1", "--model.tune.train", "head", "--model.tune.lora_rank", "2"]) == 2
    assert "do not go together" in capsys.readouterr().err


# ---------------------------------------------------------------- backbones that differ without a tensor that shows it


def test_what_tensors_do_not_show_is_told(tmp_path):
    source = save_model(dna(), tmp_path / "source")
    told = ["causal false, was true", "rope_theta 100, was 10000.0", "norm_eps 0.1, was 1e-06"]
    report = init_weights(dna(backbone="illama_test,causal=false,rope_theta=100,norm_eps=0.1"), str(source))
    assert report.unlike == told
    assert str(report).endswith(f"; but with {'; '.join(told)}")
    own = dna().backbone.config
    assert init_weights(dna(backbone=own.replace(dropout=0.3)), str(source)).unlike == []


def test_heads_that_differ_are_told_though_all_tensors_fit(tmp_path):
    config = create_backbone("illama_test,num_kv_heads=2").config
    source = save_model(dna(backbone=config), tmp_path / "source")
    assert init_weights(dna(backbone=config.replace(num_kv_heads=0)), str(source)).unlike == []
    other = config.replace(num_heads=4, num_kv_heads=4)
    assert init_weights(dna(backbone=other), str(source)).unlike == ["num_heads 4, was 2", "num_kv_heads 4, was 2"]


@pytest.mark.parametrize(
    ("backbone", "differs"),
    [
        ("hybrid_test", 'family "illama" (here "hybrid")'),
        ("illama_test,depth=1", "depth 2 (here 1)"),
    ],
)
def test_another_backbone_is_named_with_the_way_out(tmp_path, backbone, differs):
    source = save_model(dna(), tmp_path / "source")
    config = dna().backbone.config
    text = (
        f"{source}: its backbone (illama, dim {config.dim}, depth {config.depth}) is another than this model's: "
        f"{differs}. Give the model the same one with --model.backbone local-dir:{source}."
    )
    for parts in ("backbone", "all"):
        with pytest.raises(LoadError) as error:
            init_weights(dna(backbone=backbone), str(source), parts)
        assert str(error.value) == text


def test_a_causal_mamba_has_no_weights_for_the_other_direction(tmp_path):
    source = save_model(dna(backbone="hybrid_test"), tmp_path / "source")
    with pytest.raises(LoadError, match=r"is another than this model's: causal true \(here false\)\. Give the model"):
        init_weights(dna(backbone="hybrid_test,causal=false"), str(source))
