"""Checkpoints of MeshAnything V2 by their own names: numbers of a plain twin, sizes, back, and what is refused."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vertebra.backbones.decoding import Stop, generate
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.backbones.opt import OPTConfig
from vertebra.domains.conversion import convert, converters
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.generation import GREEDY, decoder_of
from vertebra.domains.mesh.model import BEGIN, END, PAD, MeshGenerator
from vertebra.domains.mesh.published import (
    MeshAnythingV2,
    from_published,
    is_published,
    published_v2,
    read_published,
    structure,
)
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.mesh.task import MeshGenerationTask
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, LoadError
from vertebra.tokenizers.mesh_amt import AMTTokenizer

sys.path.append(str(Path(__file__).parents[2] / "reference"))
import mesh_encoder as slow

SHAPE, DECODER = "point_encoder.model.shape_model.", "transformer.model.decoder."
ENCODER = {"width": 24, "heads": 3, "layers": 1, "latents": 5, "frequencies": 3, "bottleneck": 4, "decoder_layers": 1}
BACKBONE = OPTConfig(dim=32, depth=2, heads=4, hidden=48, norm_first=False, max_length=80)
AMT = AMTTokenizer(128, up="z").to_dict()
SEPARATOR = 128
BOX = (
    "0 0 0 127 0 0 0 127 0 127 127 0 127 127 127 127 0 127 0 0 127 127 0 0 0 0 0 128 0 0 0 0 127 0 0 127 127 127 "
    "127 127 0 0 127 128 0 0 0 0 0 127 0 127 127 128 127 0 0 127 127 0 127 0 127"
)
TETRAHEDRON = "0 0 0 127 0 0 0 127 0 0 0 127 0 0 0 127 0 0"
TETRAHEDRON, BOX = ([int(token) for token in text.split()] for text in (TETRAHEDRON, BOX))
"""What the original writes for a tetrahedron and for ``trimesh.creation.box()``."""


# ---------------------------------------------------------------- a checkpoint and its plain twin


def checkpoint(dim=32, depth=2, hidden=48, positions=80, encoder=ENCODER):
    """Draw weights by the names of the original."""
    tensors = {}

    def linear(name, inputs, outputs, bias=True):
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        if bias:
            tensors[f"{name}.bias"] = 0.3 * torch.randn(outputs)

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.3 * torch.randn(dim), 0.3 * torch.randn(dim)

    for name, rows in (
        ("embed_tokens", 132),
        ("token_embed_positions", 10),
        ("cond_embed", 2),
        ("embed_positions", positions + 2),
    ):
        tensors[f"{DECODER}{name}.weight"] = torch.randn(rows, dim)
    for i in range(depth):
        for part in ("q", "k", "v", "out"):
            linear(f"{DECODER}layers.{i}.self_attn.{part}_proj", dim, dim)
        norm(f"{DECODER}layers.{i}.self_attn_layer_norm")
        linear(f"{DECODER}layers.{i}.fc1", dim, hidden)
        linear(f"{DECODER}layers.{i}.fc2", hidden, dim)
        norm(f"{DECODER}layers.{i}.final_layer_norm")
    linear("transformer.lm_head", dim, 132, bias=False)
    linear("cond_head_proj", encoder["width"], dim)
    linear("cond_proj", 2 * encoder["width"], dim)
    width, latents, frequencies = encoder["width"], encoder["latents"], encoder["frequencies"]
    layers, bottleneck, decoder_layers = encoder["layers"], encoder["bottleneck"], encoder["decoder_layers"]
    tensors |= slow.encoder_tensors(width, latents, frequencies, layers, bottleneck, decoder_layers, SHAPE)
    tensors[f"{SHAPE}geo_decoder.output_proj.weight"] = torch.randn(1, width)
    tensors["point_encoder.model.shape_projection"] = torch.randn(width, width)
    return tensors


def twin_kinds(tokens):
    """Count as the original does when it generates: after a begin or a separator nine are of a strip's start."""
    found, start, k = [], 9, 0
    for token in tokens:
        if token == SEPARATOR:
            found.append(3)
            start, k = 9, 0
            continue
        found.append((4 if start else 7) + k % 3)
        start, k = max(start - 1, 0), k + 1
    return found


def twin_decoder(tensors, x, heads=4):
    """Map embedded tokens x (T, D) to logits (T, 132): OPT with norms behind its branches."""
    t = {k.removeprefix(DECODER): v for k, v in tensors.items()}
    length = len(x)
    x = x + t["embed_positions.weight"][2 : 2 + length]
    future = torch.ones(length, length).triu(1).bool()
    for i in range(2):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in t.items()}

        def linear(name, x, layer=layer):
            return x @ layer[f"{name}.weight"].T + layer[f"{name}.bias"]

        def norm(name, x, layer=layer):
            return F.layer_norm(x, x.shape[-1:], layer[f"{name}.weight"], layer[f"{name}.bias"])

        q, k, v = (linear(f"self_attn.{part}_proj", x).view(length, heads, -1) for part in "qkv")
        scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khc->qhc", weights, v).reshape(length, -1)
        x = norm("self_attn_layer_norm", x + linear("self_attn.out_proj", mixed))
        x = norm("final_layer_norm", x + linear("fc2", linear("fc1", x).clamp(min=0)))
    return x @ t["transformer.lm_head.weight"].T


def peer_decoder(tensors, x):
    """The same by transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=132,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=80,
        do_layer_norm_before=False,
        tie_word_embeddings=False,
        pad_token_id=2,
    )
    peer = transformers.OPTForCausalLM(config).eval()
    own = ("token_embed_positions", "cond_embed")
    names = {k.removeprefix("transformer."): v for k, v in tensors.items() if k.startswith("transformer.")}
    peer.load_state_dict({k: v for k, v in names.items() if k.split(".")[-2] not in own})
    return peer(inputs_embeds=x[None]).logits[0]


def twin_logits(tensors, points, tokens, decoder=twin_decoder, heads=3):
    """Map points (N, 6) and tokens of a mesh to the logits of begin, tokens and end (L, 132)."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def rows(name, ids):
        return tensors[f"{DECODER}{name}.weight"][torch.tensor(ids)]

    shape = {k.removeprefix(SHAPE): v for k, v in tensors.items()}
    latents = slow.encode(shape, points[None], heads, 3, 1)
    decoded = slow.decode(shape, latents, heads, 4, 1)
    body = torch.cat([latents[0, 1:], decoded[0]], dim=-1)
    condition = torch.cat([linear("cond_head_proj", latents[0, :1]), linear("cond_proj", body)])
    count = len(condition)
    written = [0, *(token + 3 for token in tokens)]
    embedded = rows("embed_tokens", written) + rows("token_embed_positions", [0, *twin_kinds(tokens)])
    x = torch.cat([condition + rows("cond_embed", [0]), embedded + rows("cond_embed", [1])])
    return decoder(tensors, x)[count - 1 :]


def spec(**changes):
    return MeshSpec(**{"tokenizer": AMT, "points": 11, "max_faces": 12, "max_tokens": 70, "place": "lower", **changes})


def build(backbone=BACKBONE, encoder=ENCODER, **arguments):
    return MeshGenerator(backbone.build(), spec(**arguments.pop("spec", {})), encoder=encoder, **arguments).eval()


def saved(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def cloud(batch=2):
    points = torch.rand(batch, 11, 6) * 2 - 1
    points[..., 3:] /= points[..., 3:].norm(dim=-1, keepdim=True)
    return points


def logits_of(model, points):
    """Return the logits (2, L, 132) of the box and of the tetrahedron, which is padded."""
    ids, kinds = torch.full((2, 2, len(BOX) + 2), PAD)
    for row, mesh in enumerate((BOX, TETRAHEDRON)):
        ids[row, : len(mesh) + 2] = torch.tensor([BEGIN, *(token + 3 for token in mesh), END])
        kinds[row, : len(mesh) + 2] = torch.tensor([BEGIN, *(model.tokenizer.kinds(mesh) + 3), END])
    return model(points, ids, kinds, ids != PAD)


@pytest.fixture
def loaded(tmp_path):
    tensors, model = checkpoint(), build()
    report = read_published(model, saved(tmp_path, tensors))
    assert set(report.matched) == set(model.state_dict())
    assert not report.missing
    assert not report.reshaped
    return model, tensors


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("decoder", [twin_decoder, pytest.param(peer_decoder, marks=pytest.mark.bench)])
@torch.no_grad()
def test_logits_of_padded_meshes_are_the_originals(loaded, decoder):
    model, tensors = loaded
    points = cloud()
    logits = logits_of(model, points)
    for row, mesh in enumerate((BOX, TETRAHEDRON)):
        expected = twin_logits(tensors, points[row], mesh, decoder)
        assert expected.shape == (len(mesh) + 2, 132)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_steps_write_with_the_originals_probabilities(loaded):
    model, tensors = loaded
    points = cloud()
    nothing = torch.empty(2, 0, dtype=torch.long)
    made = generate(decoder_of(model, model.condition(points)), nothing, Stop(max_new=40, ids=(END,)), GREEDY)
    for item, one in zip(points, made, strict=True):
        ids = one.ids.tolist()
        assert ids[0] == BEGIN  # not given, but written
        tokens = [token - 3 for token in ids if token >= 3]
        assert len(tokens) > 12  # also vertices after a strip's start
        logits = twin_logits(tensors, item, tokens)[: len(ids)]
        expected = logits.log_softmax(-1).gather(1, one.ids[:, None])[:, 0]
        torch.testing.assert_close(one.log_probs, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [TETRAHEDRON, BOX, [*range(9), SEPARATOR, *range(12), SEPARATOR, *range(9)]])
def test_kinds_are_counted_as_in_the_original(tokens):
    assert (AMTTokenizer(128, up="z").kinds(np.array(tokens)) + 3).tolist() == twin_kinds(tokens)


# ---------------------------------------------------------------- the released model


def test_the_released_model_is_what_its_checkpoint_has():
    backbone, own_spec, arguments = published_v2()
    with torch.device("meta"):
        model = MeshGenerator(backbone.build(), own_spec, **arguments)
        width = {"width": 768, "latents": 256, "frequencies": 8, "layers": 8, "bottleneck": 64, "decoder_layers": 16}
        tensors = checkpoint(1024, 24, 4096, 10_340, width)
        found = from_published(tensors, backbone, arguments["encoder"])
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 493_073_792
    assert (backbone.depth, backbone.heads, backbone.activation, backbone.dropout) == (24, 16, "relu", 0.1)
    assert (own_spec.points, own_spec.max_faces, own_spec.place) == (8192, 1600, "lower")
    assert own_spec.max_tokens == int(1600 * 9 * 0.70)
    assert model.prefix_length == 257
    assert model.prefix_length + 2 + own_spec.max_tokens <= backbone.max_length == 10_340  # begin and end
    assert DataSpec.from_dict(json.loads(json.dumps(own_spec.to_dict()))) == own_spec


# ---------------------------------------------------------------- conversion

CONVERTER = MeshAnythingV2()
WIDE = {"width": 128, "heads": 2, "layers": 1, "latents": 5, "frequencies": 3, "bottleneck": 4, "decoder_layers": 1}
GEOMETRY, PROJECTION = f"{SHAPE}geo_decoder.output_proj.weight", "point_encoder.model.shape_projection"


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(4)
    return checkpoint(128, 2, 48, 99, WIDE)


def test_a_smaller_checkpoint_is_converted(published, tmp_path):
    path = saved(tmp_path, published)
    (tmp_path / "config.json").write_text("{}")
    for source in (path, tmp_path):
        converter, found = convert(source)
        assert converter.name == "meshanything_v2"
        assert set(found.report.matched) == set(found.model.state_dict())
        assert [*found.report.missing, *found.report.unexpected, *found.report.reshaped] == []
    assert found.left_out.keys() == {GEOMETRY, PROJECTION}
    assert "occupancy" in found.left_out[GEOMETRY]
    model, points = found.model, cloud()
    assert not model.training
    assert (model.spec.max_tokens, model.spec.max_faces, model.spec.points) == (90, 14, 8192)  # 0.7 * 9 a face
    backbone, encoder = model.backbone.config, model.encoder.config
    assert (backbone.dim, backbone.depth, backbone.heads, backbone.hidden, backbone.max_length) == (128, 2, 2, 48, 99)
    assert encoder == ShapeEncoderConfig(**WIDE)
    read = load_model(save_model(model, tmp_path / "model", notes=found.notes))
    with torch.no_grad():
        logits = logits_of(model, points)
        assert torch.equal(logits_of(read, points), logits)
        for row, mesh in enumerate((BOX, TETRAHEDRON)):
            expected = twin_logits(published, points[row], mesh, partial(twin_decoder, heads=2), heads=2)
            torch.testing.assert_close(logits[row, : len(expected)], expected, atol=2e-5, rtol=1e-5)


def test_back_are_the_tensors_that_were_there(published, tmp_path):
    found, config = CONVERTER.restore(CONVERTER.convert(open_checkpoint(saved(tmp_path, published))).model)
    assert config == {}
    assert found.keys() == published.keys() - {GEOMETRY, PROJECTION}
    for name, tensor in found.items():
        assert torch.equal(tensor, published[name]), name


def test_no_other_family_takes_it(published, tmp_path):
    checkpoint = open_checkpoint(saved(tmp_path, published))
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == ["meshanything_v2"]
    assert not CONVERTER.recognises(open_checkpoint(tmp_path.parent))  # a folder without weights
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert not CONVERTER.recognises(open_checkpoint(tmp_path))


def test_sizes_are_the_released_ones():
    width = {"width": 768, "latents": 256, "frequencies": 8, "layers": 8, "bottleneck": 64, "decoder_layers": 16}
    with torch.device("meta"):
        backbone, own_spec, encoder = structure(checkpoint(1024, 24, 4096, 10_340, width))
    assert (backbone, own_spec, {"encoder": encoder}) == published_v2()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer.lm_head.weight": None}, "lacks 'transformer.lm_head.weight', 1 tensors in all"),
        ({f"{DECODER}embed_positions.weight": None}, "embed_positions.weight', which sizes are read off; is the file"),
        ({f"{DECODER}project_in.weight": (3, 3)}, "no place for '.*project_in.weight', 1 tensors in all"),
        ({f"{DECODER}embed_tokens.weight": (132, 100)}, "width of the OPT must be a multiple of 64, .* got 100"),
        ({f"{SHAPE}encoder.query": (6, 24)}, "width of Michelangelo must be a multiple of 64"),
        ({f"{SHAPE}encoder.query": (128,)}, r"must have 2 axes, got the shape \(128,\)"),
        ({f"{DECODER}embed_tokens.weight": (6, 128)}, "has sizes of no such model. .*bins must be between 4"),
        ({f"{DECODER}embed_positions.weight": (11, 128)}, "has sizes of no such model. .*max_faces must be at least 1"),
        ({f"{DECODER}token_embed_positions.weight": (9, 128)}, r"kind_embed.weight \(9, 128\) -> \(10, 128\)"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(published, tmp_path, changes, words):
    tensors = {k: v for k, v in published.items() if k not in changes}
    tensors |= {k: torch.zeros(shape) for k, shape in changes.items() if shape}
    with pytest.raises(LoadError, match=words):
        CONVERTER.convert(open_checkpoint(saved(tmp_path, tensors)))


def test_models_of_another_kind_are_not_written_back():
    hybrid = HybridConfig(dim=32, depth=1, pattern="M", hidden_dim=48)
    for model in (build(hybrid), build(tie=True), build(encoder={**ENCODER, "queries": "points"})):
        with pytest.raises(LoadError, match=r"meshanything_v2: the model is of another architecture. "):
            CONVERTER.restore(model)
    for model in (build(spec={"face_buckets": (9,)}), build(encoder={**ENCODER, "bottleneck": 0, "decoder_layers": 0})):
        with pytest.raises(LoadError, match="must have an encoder with a bottleneck and no face_buckets"):
            CONVERTER.restore(model)
    with pytest.raises(LoadError, match="must be given a MeshGenerator, got a Linear"):
        CONVERTER.restore(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- what is refused


def changed(tensors, name, other=None):
    return {other if k == name else k: v for k, v in tensors.items() if k != name or other}


@pytest.mark.parametrize(
    "name",
    [
        "transformer.lm_head.weight",
        "cond_proj.bias",
        f"{DECODER}layers.1.self_attn.k_proj.bias",
        f"{DECODER}embed_positions.weight",
        f"{SHAPE}encoder.query",
        f"{SHAPE}post_kl.weight",
    ],
)
def test_every_tensor_must_be_there(tmp_path, name):
    path = saved(tmp_path, changed(checkpoint(), name))
    with pytest.raises(LoadError, match=rf"lacks '{name}', 1 tensors in all; give that of Yiwen-ntu/MeshAnythingV2"):
        read_published(build(), path)


@pytest.mark.parametrize(
    "name",
    [
        "extra_embeds",
        f"{DECODER}layers.2.fc1.bias",
        f"{DECODER}quantize_codebooks",
        f"{SHAPE}encoder.self_attn.resblocks.1.ln_1.bias",
        f"{SHAPE}pre_kl.scale",
        f"{SHAPE}geo_decode.weight",
    ],
)
def test_every_tensor_must_have_a_place(tmp_path, name):
    path = saved(tmp_path, {**checkpoint(), name: torch.zeros(3)})
    with pytest.raises(LoadError, match=rf"no place for '{name}', 1 tensors in all; build it of published_v2"):
        read_published(build(), path)


def test_checkpoints_of_v1_are_refused(tmp_path):
    path = saved(tmp_path, {**checkpoint(), "tokenizer.pos_embedding.weight": torch.zeros(9, 2)})
    with pytest.raises(LoadError, match=r"has a VQ-VAE, so it is V1's; give that of Yiwen-ntu/MeshAnythingV2"):
        read_published(build(), path)


def test_nothing_is_loaded_of_a_checkpoint_of_other_sizes(tmp_path):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = saved(tmp_path, checkpoint(positions=60))
    with pytest.raises(LoadError, match=r"positions.weight \(62, 32\) -> \(82, 32\). Nothing was loaded"):
        read_published(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    told = build(spec={"face_buckets": (100, 200)})
    with pytest.raises(LoadError, match=r"1 missing: face_embed.weight"):
        read_published(told, saved(tmp_path, checkpoint()))


def test_models_of_another_kind_are_refused(tmp_path):
    path = saved(tmp_path, checkpoint())
    first = OPTConfig(dim=32, depth=2, heads=4, hidden=48, max_length=80)
    hybrid = HybridConfig(dim=32, depth=1, pattern="M", hidden_dim=48)
    for model in (build(first), build(hybrid), build(tie=True)):
        with pytest.raises(ConfigError, match="must have an OPT backbone with norm_first=False, and tie=False; build"):
            read_published(model, path)
    upright = build(spec={"tokenizer": AMTTokenizer(128).to_dict()})
    with pytest.raises(ConfigError, match=r"must be AMTTokenizer\(bins=128, up='z'\), got .*up='y'"):
        read_published(upright, path)


def test_points_as_queries_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Michelangelo has queries='learned', got 'points'"):
        read_published(build(encoder={**ENCODER, "queries": "points"}), saved(tmp_path, checkpoint()))


def test_files_that_hold_no_tensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(LoadError, match=r"model.safetensors: cannot be read as a safetensors file"):
        read_published(build(), path)
    path.write_bytes(b"no tensors in here")
    with pytest.raises(LoadError, match=r"model.safetensors: cannot be read as a safetensors file"):
        read_published(build(), path)
    assert is_published(str(path))
    assert not is_published(str(tmp_path))
    assert not is_published(str(tmp_path / "other.safetensors"))


# ---------------------------------------------------------------- training


def test_a_task_begins_with_a_checkpoint(tmp_path):
    tensors = checkpoint()
    path = saved(tmp_path, tensors)
    config = ShapeEncoderConfig(**ENCODER)
    task = MeshGenerationTask(BACKBONE, encoder=config, ema=0.9, init_from=str(path))
    task.build(spec())
    task.load_initial()
    assert len(task.load_report.matched) == len(task.model.state_dict())
    expected = from_published(tensors, BACKBONE, config)
    for model in (task.model, task.final_model):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
