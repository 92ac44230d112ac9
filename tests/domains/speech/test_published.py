"""OWSM-CTC as ESPnet has it: numbers, sizes and names."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vertebra.backbones.ebranchformer import EBranchformerConfig
from vertebra.domains.saving import save_model
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


@pytest.fixture
def folder(tmp_path):
    """A repository as ESPnet publishes it, with the tiny weights."""
    words = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "twenty",
        "thirty",
    ]
    pieces, model = learn_pieces([f"{a} {b}" for a in words for b in words], 28)
    units = [*pieces[1:], *(f"x{i}" for i in range(36 - len(pieces)))]
    tokens = ["<blank>", *units, "<na>", "<nolang>", "<eng>", "<asr>"]
    config = {
        "token_list": tokens,
        "encoder": "e_branchformer_ctc",
        "encoder_conf": {
            "output_size": 32,
            "attention_heads": 4,
            "cgmlp_linear_units": 64,
            "cgmlp_conv_kernel": 31,
            "num_blocks": 3,
            "input_layer": "conv2d8",
            "linear_units": 64,
            "merge_conv_kernel": 31,
            "interctc_layer_idx": [1, 2],
            "use_cross_attention": [0, 0, 1],
        },
        "promptencoder_conf": {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 2},
        "model_conf": {"interctc_weight": 0.8, "ctc_asr_only": [True, False, False]},
    }
    place = tmp_path / "repository" / "exp" / "s2t"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    statistics = {"normalize.mean": torch.full((80,), -5.0), "normalize.std": torch.full((80,), 2.0)}
    torch.save({**WEIGHTS, **statistics}, place / "valid.pth")
    (tmp_path / "repository" / "bpe.model").write_bytes(model)
    return tmp_path / "repository"


def test_a_folder_of_espnet_becomes_a_model_that_every_pipeline_takes(folder, tmp_path):
    model = load_espnet(folder)
    assert (model.intermediate, model.transcript_layers, model.spec.languages) == ((1, 2), (1,), ("eng",))
    torch.testing.assert_close(model.normalise.mean, torch.full((80,), -5.0))
    wave = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    saved = save_model(model, tmp_path / "m")
    found = pipeline("speech/transcribe", saved, language="eng")(wave.numpy())
    log_probs, _ = model(wave[None], torch.tensor([16_000]), torch.tensor([model.prefix_ids("eng")]))
    ids = [i for i in torch.unique_consecutive(log_probs[0].argmax(-1)).tolist() if i]
    tokenizer = make_tokenizer("sentencepiece", model.spec.tokens, model.spec.pieces)
    assert found.value == tokenizer.decode(ids)


def test_folders_that_hold_no_owsm_ctc_are_refused(folder, tmp_path):
    with pytest.raises(LoadError, match=r"must hold one config\.yaml with an encoder, got none"):
        load_espnet(tmp_path / "nowhere")
    config = next(folder.rglob("config.yaml"))
    text = config.read_text()
    for old, new, message in (
        ("e_branchformer_ctc", "conformer", "encoder must be e_branchformer_ctc, got 'conformer'"),
        ("promptencoder_conf", "other_conf", "the key 'promptencoder_conf' is missing"),
        ("linear_units: 64", "linear_units: 32", "39 misshapen"),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(LoadError, match=message):
            load_espnet(folder)
    config.write_text(text)
    next(folder.rglob("*.pth")).write_bytes(b"no weights")
    with pytest.raises(LoadError, match="cannot be read as weights"):
        load_espnet(folder)
    (config.parent / "other.pth").touch()
    with pytest.raises(LoadError, match=r"must hold one \.pth, got other\.pth, valid\.pth"):
        load_espnet(folder)
