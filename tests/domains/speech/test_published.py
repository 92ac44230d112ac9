"""OWSM-CTC as ESPnet has it: numbers, sizes and names."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vertebra.backbones.ebranchformer import EBranchformerConfig
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters, find_converter
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.speech.loss import recognition_loss
from vertebra.domains.speech.model import PromptConfig, SpeechCTC
from vertebra.domains.speech.published import PUBLISHED, from_espnet, load_espnet, owsm_ctc, owsm_spec, read_espnet
from vertebra.errors import LoadError, UnknownNameError
from vertebra.pipelines.base import pipeline
from vertebra.tokenizers.text import learn_pieces, make_tokenizer

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "speech" / "owsm_ctc_tiny.safetensors")
IO = {k.removeprefix("io."): v for k, v in GOLDEN.items() if k.startswith("io.")}
WEIGHTS = {k: v for k, v in GOLDEN.items() if not k.startswith("io.")}


@pytest.fixture(scope="module")
def tiny():
    tokens = ["<blank>", *(f"t{i}" for i in range(1, 36)), "<na>", "<nolang>", "<eng>", "<asr>"]
    config = EBranchformerConfig(
        dim=32,
        depth=3,
        causal=False,
        num_heads=4,
        hidden_dim=64,
        cgmlp_dim=64,
        conv_kernel=31,
        merge_kernel=31,
        mask_conv=False,
    )
    model = SpeechCTC(
        config.build(),
        owsm_spec(tokens, 80),
        subsampling=8,
        intermediate=(1, 2),
        transcript_layers=(1,),
        prompt=PromptConfig(dim=16, depth=2, num_heads=2, hidden_dim=32, every=3, cross_heads=4, dropout=0.0),
        padding="espnet",
    )
    statistics = {"normalize.mean": torch.zeros(80), "normalize.std": torch.ones(80)}
    report = read_espnet(model, {**WEIGHTS, **statistics, "encoder.embed.out.1.pe": torch.zeros(1, 9, 32)})
    assert len(report.matched) == len(model.state_dict())
    return model.eval()


def test_outputs_and_loss_are_those_of_espnet(tiny, monkeypatch):
    # The fixture goes into the encoder directly and has noise behind the end, which ESPnet's convolutions read.
    monkeypatch.setattr(tiny.normalise, "forward", lambda features, counts: features)
    prompt = IO["prev"].masked_fill(IO["prev"] < 0, 39)
    found = tiny.encode(IO["feats"], IO["feat_lens"], IO["prefix"], prompt, IO["prev_lens"])
    assert found.lengths.tolist() == IO["enc_lens"].tolist()
    real = torch.arange(found.logits.shape[1]) < found.lengths[:, None]
    torch.testing.assert_close(found.log_probs[real], IO["logp"][real], atol=1e-5, rtol=1e-5)
    for layer in (1, 2):
        expected = tiny.head(IO[f"inter{layer}"])
        torch.testing.assert_close(found.intermediate[layer][real], expected[real], atol=1e-5, rtol=1e-5)
    transcript_lengths = torch.where((IO["text_ctc"] == 36).any(1), -1, IO["text_ctc_lens"])
    loss = recognition_loss(
        found,
        IO["text"].clamp(min=0),
        IO["text_lens"],
        weight=0.8,
        transcripts=IO["text_ctc"].clamp(min=0),
        transcript_lengths=transcript_lengths,
        transcript_layers=tiny.transcript_layers,
    )
    torch.testing.assert_close(loss[None], IO["loss"], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_names(name):
    with torch.device("meta"):
        model = owsm_ctc(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name].params
    renamed = from_espnet(espnet_names(model))
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


def espnet_names(model):
    """The tensors of a published checkpoint, by its names and shapes (sheet of the recipes)."""
    mels, vocabulary, dim, made = model.spec.n_mels, 50_002, 1024, {}

    def add(name, *shape, bias=True):
        made[f"{name}.weight"] = torch.empty(*shape, device="meta")
        if bias:
            made[f"{name}.bias"] = torch.empty(shape[0], device="meta")

    for i in (0, 2, 4):
        add(f"encoder.embed.conv.{i}", dim, dim if i else 1, 3, 3)
    add("encoder.embed.out", dim, dim * {80: 9, 128: 15}[mels])
    for i in range(27):
        at = f"encoder.encoders.{i}"
        for letter in ("q", "k", "v", "out"):
            add(f"{at}.attn.linear_{letter}", dim, dim)
            if i % 3 == 2:
                add(f"{at}.cross_attn.linear_{letter}", dim, dim)
        add(f"{at}.cgmlp.channel_proj1.0", 4096, dim)
        add(f"{at}.cgmlp.channel_proj2", dim, 2048)
        add(f"{at}.cgmlp.csgu.norm", 2048)
        add(f"{at}.cgmlp.csgu.conv", 2048, 1, 31)
        for part in ("feed_forward", "feed_forward_macaron"):
            add(f"{at}.{part}.w_1", 4096, dim)
            add(f"{at}.{part}.w_2", dim, 4096)
        for norm in ("ff", "ff_macaron", "mha", "mlp", "final", *(["cross_attn"] if i % 3 == 2 else [])):
            add(f"{at}.norm_{norm}", dim)
        add(f"{at}.depthwise_conv_fusion", 2048, 1, 31)
        add(f"{at}.merge_proj", dim, 2048)
    add("encoder.after_norm", dim)
    add("encoder.conditioning_layer", dim, vocabulary)
    for i in range(4):
        at = f"prompt_encoder.encoders.{i}"
        for letter in ("q", "k", "v", "out"):
            add(f"{at}.self_attn.linear_{letter}", 512, 512)
        add(f"{at}.feed_forward.w_1", 2048, 512)
        add(f"{at}.feed_forward.w_2", 512, 2048)
        add(f"{at}.norm1", 512)
        add(f"{at}.norm2", 512)
    add("prompt_encoder.after_norm", 512)
    add("embed", vocabulary, 512, bias=False)
    add("embed_proj", dim, 512)
    add("prompt_proj", dim, 512)
    add("ctc.ctc_lo", vocabulary, dim)
    made["normalize.mean"], made["normalize.std"] = (torch.empty(mels, device="meta") for _ in range(2))
    made["frontend.logmel.melmat"] = torch.empty(257, mels, device="meta")
    return made


def test_foreign_weights_are_refused(tiny):
    with pytest.raises(LoadError, match=r"'decoder\.embed\.0\.weight' is no weight of ESPnet's OWSM-CTC"):
        from_espnet({"decoder.embed.0.weight": torch.zeros(1)})
    with pytest.raises(LoadError, match=r"attention\.qkv\.weight: ESPnet's v is missing"):
        from_espnet({k: v for k, v in WEIGHTS.items() if k != "encoder.encoders.0.attn.linear_v.weight"})
    with pytest.raises(LoadError, match=r"head\.bias"):
        read_espnet(tiny, {k: v for k, v in WEIGHTS.items() if k != "ctc.ctc_lo.bias"})
    with pytest.raises(UnknownNameError, match=r"owsm_ctc_v3\.1"):
        owsm_ctc("owsm_ctc_v3")


def test_the_layout_of_a_published_vocabulary():
    spec = owsm_spec(["<blank>", "a", "<na>", "<nolang>", "<abk>", "<zul>", "<asr>", "<st_eng>", "<notimestamps>"], 80)
    assert spec.languages == ("abk", "zul")
    assert spec.tasks == ("asr", "st_eng")
    with pytest.raises(LoadError, match="the token list must hold <nolang>"):
        owsm_spec(["<blank>", "<na>", "<asr>"], 80)


# ---------------------------------------------------------------- folders of ESPnet

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "thirty")
EXPERIMENT, STATISTICS = "exp/s2t_train", "exp/s2t_stats/train/feats_stats.npz"
PIECES = "data/token_list/bpe/bpe.model"
FRAMES = torch.randn(50, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 5
FRONTEND = load_file(Path(__file__).parents[2] / "golden" / "speech" / "espnet_frontend.safetensors")


def written(place, change=None):
    """A repository as ESPnet publishes it, with the golden weights; the statistics stand in their file alone."""
    pieces, model = learn_pieces([f"{a} {b}" for a in WORDS for b in WORDS], 28)
    units = [*pieces[1:], *(f"x{i}" for i in range(36 - len(pieces)))]
    config = {
        "token_list": ["<blank>", *units, "<na>", "<nolang>", "<eng>", "<asr>"],
        "token_type": "bpe",
        "bpemodel": PIECES,
        "frontend": "default",
        "frontend_conf": {"n_fft": 512, "win_length": 400, "hop_length": 160, "fs": "16k"},
        "normalize": "global_mvn",
        "normalize_conf": {"stats_file": STATISTICS},
        "encoder": "e_branchformer_ctc",
        "encoder_conf": {
            "output_size": 32,
            "attention_heads": 4,
            "attention_layer_type": "selfattn",
            "pos_enc_layer_type": "abs_pos",
            "cgmlp_linear_units": 64,
            "cgmlp_conv_kernel": 31,
            "num_blocks": 3,
            "input_layer": "conv2d8",
            "linear_units": 64,
            "merge_conv_kernel": 31,
            "interctc_layer_idx": [1, 2],
            "interctc_use_conditioning": True,
            "use_cross_attention": [False, False, True],
            "use_flash_attn": True,
        },
        "promptencoder": "transformer",
        "promptencoder_conf": {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 2},
        "model_conf": {"interctc_weight": 0.8, "ctc_asr_only": [True, False, False]},
    }
    weights = {**WEIGHTS, "encoder.embed.out.1.pe": torch.zeros(1, 9, 32)}
    weights["frontend.logmel.melmat"] = FRONTEND["melmat80"]
    if change is not None:
        change(config, weights)
    for name in (f"{EXPERIMENT}/config.yaml", STATISTICS, PIECES):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / EXPERIMENT / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(weights, place / EXPERIMENT / "valid.pth")
    np.savez(place / STATISTICS, count=len(FRAMES), sum=FRAMES.sum(0), sum_square=FRAMES.square().sum(0))
    (place / PIECES).write_bytes(model)
    return place


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "repository")


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


@pytest.mark.parametrize("form", ["folder", "zip", "file", "experiment beside another"])
def test_what_espnet_publishes_becomes_a_model_that_says_the_same(form, folder, tmp_path, monkeypatch):
    source = folder
    if form == "zip":
        source = zipped(folder, tmp_path / "owsm.zip")
    elif form == "file":
        source = folder / EXPERIMENT / "valid.pth"
    elif form == "experiment beside another":
        other = folder / "exp" / "lm_train"
        other.mkdir()
        (other / "config.yaml").write_text("lm: transformer\n")
    checkpoint = open_checkpoint(source)
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == ["owsm_ctc"]
    converter, found = convert(source)
    assert converter is find_converter(checkpoint)
    assert set(found.left_out) == {"encoder.embed.out.1.pe", "frontend.logmel.melmat"}
    assert "sines and cosines" in found.left_out["encoder.embed.out.1.pe"]
    model = found.model
    assert len(found.report.matched) == len(model.state_dict())
    torch.testing.assert_close(model.normalise.mean.double(), FRAMES.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.normalise.std.double(), FRAMES.std(0, unbiased=False), atol=1e-5, rtol=0)
    saved = load_model(save_model(model, tmp_path / "m", notes=found.notes, files=found.files))
    wave = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16_000, 9000])
    torch.testing.assert_close(saved(wave, lengths), model(wave, lengths), atol=0, rtol=0)
    monkeypatch.setattr(saved.normalise, "forward", lambda features, counts: features)  # as the fixture was made
    prompt = IO["prev"].masked_fill(IO["prev"] < 0, 39)
    said = saved.encode(IO["feats"], IO["feat_lens"], IO["prefix"], prompt, IO["prev_lens"])
    real = torch.arange(said.logits.shape[1]) < said.lengths[:, None]
    torch.testing.assert_close(said.log_probs[real], IO["logp"][real], atol=1e-5, rtol=1e-5)


def test_the_pipeline_says_what_the_model_does(folder, tmp_path):
    model = load_espnet(folder)
    assert (model.intermediate, model.transcript_layers, model.spec.languages) == ((1, 2), (1,), ("eng",))
    wave = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    saved = save_model(model, tmp_path / "m")
    found = pipeline("speech/transcribe", saved, language="eng")(wave.numpy())
    log_probs, _ = model(wave[None], torch.tensor([16_000]), torch.tensor([model.prefix_ids("eng")]))
    ids = [i for i in torch.unique_consecutive(log_probs[0].argmax(-1)).tolist() if i]
    tokenizer = make_tokenizer("sentencepiece", model.spec.tokens, model.spec.pieces)
    assert found.value == tokenizer.decode(ids)


def test_statistics_among_the_weights_win_over_the_file(tmp_path):
    def change(config, weights):
        weights |= {"normalize.mean": torch.full((80,), -7.0), "normalize.std": torch.full((80,), 3.0)}

    model = load_espnet(written(tmp_path / "r", change))
    torch.testing.assert_close(model.normalise.mean, torch.full((80,), -7.0))

    def without(config, weights):
        config |= {"normalize": None, "normalize_conf": {}}

    torch.testing.assert_close(load_espnet(written(tmp_path / "s", without)).normalise.std, torch.ones(80))


def test_a_packed_model_says_which_weights_are_its_own(folder):
    (folder / EXPERIMENT / "latest.pth").write_bytes(b"another")
    with pytest.raises(LoadError, match=r"must hold one \.pth, got latest\.pth, valid\.pth; name the file itself"):
        load_espnet(folder)
    (folder / "meta.yaml").write_text(yaml.safe_dump({"files": {"s2t_model_file": f"{EXPERIMENT}/valid.pth"}}))
    assert load_espnet(folder).spec.languages == ("eng",)


@pytest.mark.parametrize(("section", "name", "value", "message"), [
    (None, "encoder", "conformer", r"config\.yaml: encoder must be e_branchformer_ctc, got 'conformer'"),
    (None, "promptencoder_conf", ..., "the key 'promptencoder_conf' is missing"),
    (None, "token_list", "tokens.txt", "token_list must be the list of tokens itself"),
    (None, "token_list", ["<blank>"], "token_list has 1 tokens, but the weights have 40"),
    (None, "token_type", "char", "token_type must be bpe, got char"),
    (None, "frontend", "s3prl", "frontend must be default, got s3prl"),
    (None, "normalize", "utterance_mvn", "normalize must be global_mvn or null, got utterance_mvn"),
    (None, "model_conf", [1], "no model can be built of it"),
    ("frontend_conf", "hop_length", ..., r"config\.yaml: frontend_conf\.hop_length must be 160, got 128"),
    ("frontend_conf", "win_length", ..., r"frontend_conf\.win_length must be 400, got 512"),
    ("frontend_conf", "fs", "8k", r"frontend_conf\.fs must be 16k, got 8k"),
    ("frontend_conf", "fmax", 7600, r"frontend_conf\.fmax must be 8000, got 7600"),
    ("frontend_conf", "n_mels", 10**9, r"frontend_conf\.n_mels must be a number up to 1024"),
    ("frontend_conf", "htk", True, r"frontend_conf\.htk must be False, got True"),
    ("normalize_conf", "norm_vars", False, r"normalize_conf\.norm_vars must be True, got False"),
    ("normalize_conf", "stats_file", "gone.npz", r"the statistics are missing too: .*yaml is gone"),
    ("normalize_conf", "stats_file", "../x.npz", "the statistics are missing too"),
    ("encoder_conf", "attention_layer_type", ..., "attention_layer_type must be selfattn, got rel_selfattn"),
    ("encoder_conf", "pos_enc_layer_type", "rel_pos", "pos_enc_layer_type must be abs_pos, got rel_pos"),
    ("encoder_conf", "use_linear_after_conv", True, "use_linear_after_conv must be False, got True"),
    ("encoder_conf", "gate_activation", "relu", "gate_activation must be identity, got relu"),
    ("encoder_conf", "input_layer", "linear", "input_layer must be conv2d, conv2d1, .* got linear"),
    ("encoder_conf", "linear_units", 32, r"encoder_conf\.linear_units is 32, but the weights have 64"),
    ("encoder_conf", "linear_units", 10**12, r"encoder_conf\.linear_units is 10+, but the weights have 64"),
    ("encoder_conf", "num_blocks", 10**9, r"encoder_conf\.num_blocks is 10+, but the weights have 3"),
    ("encoder_conf", "attention_heads", 5, r"must be a multiple of num_heads \(5\)"),
    ("encoder_conf", "use_cross_attention", [1, 0, 1], r"must be read in every so-manieth layer, got layers \[0, 2\]"),
    ("encoder_conf", "interctc_use_conditioning", ..., "interctc_use_conditioning must be true"),
    ("promptencoder_conf", "normalize_before", False, "normalize_before must be True, got False"),
    ("promptencoder_conf", "num_blocks", ..., r"promptencoder_conf\.num_blocks is 6, but the weights have 2"),
    ("preprocessor_conf", "na_symbol", "<none>", "na_symbol must be <na>, got <none>"),
])  # fmt: skip
def test_what_ours_cannot_do_is_named(section, name, value, message, tmp_path):
    def change(config, weights):
        values = config if section is None else config.setdefault(section, {})
        values[name] = value
        if value is ...:
            del values[name]

    source = written(tmp_path / "r", change)
    with pytest.raises(LoadError, match=message):
        convert(source, "owsm_ctc")


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("ctc.ctc_lo.bias"), r"1 missing: head\.bias"),
    (lambda w: w.pop("ctc.ctc_lo.weight"), "token_list has 40 tokens, but the weights have 0"),
    (lambda w: w.pop("encoder.encoders.0.feed_forward.w_1.weight"), r"but the weights have no encoder\.encoders\.0\."),
    (lambda w: w.update({"decoder.embed.0.weight": torch.zeros(1)}), r"'decoder\.embed\.0\.weight' is no weight of"),
    (lambda w: w["frontend.logmel.melmat"].mul_(1.1), "melmat is another filterbank than Slaney's of 80 mel bands"),
    (lambda w: w.update({"normalize.mean": torch.zeros(80)}), r"1 missing: normalise\.std"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    def changed(config, weights):
        weights["frontend.logmel.melmat"] = weights["frontend.logmel.melmat"].clone()
        change(weights)

    source = written(tmp_path / "r", changed)
    with pytest.raises(LoadError, match=message):
        convert(source)


@pytest.mark.parametrize(("missing", "message"), [
    (f"{EXPERIMENT}/config.yaml", r"must hold one config\.yaml with an encoder, got none"),
    (f"{EXPERIMENT}/valid.pth", r"must hold one \.pth, got none; name the file itself"),
    (PIECES, r"must hold one \.model of SentencePiece, got none"),
    (STATISTICS, "has no normalize.mean, and the statistics are missing too: .*; put that file below"),
])  # fmt: skip
def test_each_thing_that_is_missing_is_named(missing, message, folder):
    (folder / missing).unlink()
    with pytest.raises(LoadError, match=message):
        convert(folder, "owsm_ctc")


@pytest.mark.parametrize(("damaged", "content", "message"), [
    (f"{EXPERIMENT}/config.yaml", b"encoder: e_branchformer_ctc\n]", r"config\.yaml: not readable as YAML"),
    (f"{EXPERIMENT}/config.yaml", b"- 1", "got none"),
    (f"{EXPERIMENT}/config.yaml", b"encoder: e_branchformer_ctc", "encoder_conf.attention_layer_type must be selfattn"),
    (f"{EXPERIMENT}/valid.pth", b"no weights", r"valid\.pth: cannot be read without running code from it"),
    (STATISTICS, b"no sums", r"feats_stats\.npz: no statistics of ESPnet"),
])  # fmt: skip
def test_damaged_files_are_named(damaged, content, message, folder):
    (folder / damaged).write_bytes(content)
    with pytest.raises(LoadError, match=message):
        convert(folder, "owsm_ctc")


def test_statistics_of_other_channels_are_refused(folder):
    np.savez(folder / STATISTICS, count=2, sum=np.ones(3), sum_square=np.ones(3))
    with pytest.raises(LoadError, match=r"must hold finite statistics of 80 channels, got \(3,\)"):
        load_espnet(folder)
    np.savez(folder / STATISTICS, count=0, sum=np.ones(80), sum_square=np.ones(80))
    with pytest.raises(LoadError, match="must hold finite statistics"):
        load_espnet(folder)


def test_weights_alone_are_recognised_and_say_what_they_lack(tmp_path):
    torch.save(WEIGHTS, tmp_path / "valid.pth")
    checkpoint = open_checkpoint(tmp_path / "valid.pth")
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == ["owsm_ctc"]
    with pytest.raises(LoadError, match=r"must hold one config\.yaml with an encoder, got none"):
        convert(tmp_path / "valid.pth")
