"""OWSM-CTC as ESPnet has it: numbers, sizes and names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vertebra.backbones.ebranchformer import EBranchformerConfig
from vertebra.domains.speech.loss import recognition_loss
from vertebra.domains.speech.model import PromptConfig, SpeechCTC
from vertebra.domains.speech.published import PUBLISHED, from_espnet, owsm_ctc, owsm_spec, read_espnet
from vertebra.errors import LoadError, UnknownNameError

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
