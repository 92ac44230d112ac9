"""Checkpoints of MeshAnything V1 by their own names: numbers of a plain twin and of transformers, and back."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vertebra.backbones.decoding import Strategy
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.loading.checkpoints import open_checkpoint, read_weights
from vertebra.domains.conversion import convert, converters, find_converter
from vertebra.domains.mesh.codes import MeshCodeGenerator
from vertebra.domains.mesh.generation import decoder_of, write_ids
from vertebra.domains.mesh.model import BEGIN, END
from vertebra.domains.mesh.published_v1 import (
    CODEBOOK,
    MeshAnythingV1,
    from_published_v1,
    published_v1,
    structure,
)
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import LoadError

sys.path.append(str(Path(__file__).parents[2] / "reference"))
import mesh_codes as slow

CONVERTER = MeshAnythingV1()
LEFT_OUT = {
    "transformer.model.decoder.embed_tokens.weight",
    "point_encoder.model.shape_projection",
    "point_encoder.model.shape_model.geo_decoder.output_proj.weight",
}
MOST = 6
"""Faces that the small checkpoint has positions for."""


def file_of(folder, tensors, name="MeshAnything_350m.pth"):
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
    return folder / name


def converted(folder, tensors):
    return CONVERTER.convert(open_checkpoint(file_of(folder, tensors)))


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(3)
    return slow.checkpoint()


@pytest.fixture(scope="module")
def model(tensors, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("v1"), tensors).model


def cloud(seed=0, batch=2):
    points = torch.rand(batch, 11, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    points[..., 3:] /= points[..., 3:].norm(dim=-1, keepdim=True)
    return points


def meshes(seed=0):
    """Make codes of a mesh of five faces and of one of two."""
    drawn = torch.randint(slow.SIZES["codes"], (2, 5 * 9), generator=torch.Generator().manual_seed(seed))
    return drawn[0].tolist(), drawn[1, :18].tolist()


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def peer_opt(tensors, x):
    """The stack of the generator by transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = slow.SIZES
    config = transformers.OPTConfig(
        vocab_size=sizes["codes"] + 3,
        hidden_size=sizes["width"],
        word_embed_proj_dim=sizes["width"],
        num_hidden_layers=sizes["depth"],
        ffn_dim=sizes["hidden"],
        num_attention_heads=sizes["width"] // 64,
        max_position_embeddings=sizes["positions"],
        do_layer_norm_before=False,
        pad_token_id=2,
    )
    peer = transformers.OPTModel(config).eval().decoder
    own = ("layers.", "embed_positions.")
    names = {k.removeprefix(slow.DECODER): v for k, v in tensors.items() if k.startswith(slow.DECODER)}
    result = peer.load_state_dict({k: v for k, v in names.items() if k.startswith(own)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["embed_tokens.weight"], [])
    return peer(inputs_embeds=x[None]).last_hidden_state[0]


def peer_bert(tensors, x):
    """The stack of the decoder by transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = slow.SIZES
    config = transformers.BertConfig(
        hidden_size=sizes["decoder"],
        num_hidden_layers=sizes["decoder_depth"],
        num_attention_heads=sizes["decoder"] // 64,
        intermediate_size=sizes["decoder_hidden"],
        vocab_size=5,
    )
    peer = transformers.BertModel(config, add_pooling_layer=False).eval().encoder
    prefix = "tokenizer.decoder."
    peer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return peer(x[None]).last_hidden_state[0]


by_peer = pytest.mark.bench


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("stack", [slow.opt, pytest.param(peer_opt, marks=by_peer)], ids=["twin", "transformers"])
@torch.no_grad()
def test_logits_of_padded_meshes_are_the_originals(model, tensors, stack):
    points = cloud()
    rows = [[BEGIN, *(code + 3 for code in mesh), END] for mesh in meshes()]
    ids = padded(rows, 2)
    logits = model(points, ids, model.kinds_of(ids), ids != 2)
    for item, row in enumerate(rows):
        expected = slow.logits(tensors, points[item], row, stack)
        assert expected.shape == (len(row), 43)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[item, : len(row)], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", [slow.bert, pytest.param(peer_bert, marks=by_peer)], ids=["twin", "transformers"])
@torch.no_grad()
def test_coordinates_of_codes_are_the_originals(model, tensors, stack):
    points, rows, own = cloud(), meshes(1), slow.plain(tensors)
    ids = padded(rows, -1)
    ids[0, 13] = -1  # a hole in the second face, which is none then; those behind it stay where they are
    logits, corners = model.decode_ids(ids, points), model.decode_faces(ids, points)
    for item in range(2):
        codes = ids[item].tolist()
        expected = slow.coordinate_logits(own, points[item], codes, MOST, stack)
        whole = (ids[item].view(-1, 9) >= 0).all(-1)
        assert whole.sum() == (4, 2)[item]
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[item].flatten(1, 2)[whole], expected[whole], atol=2e-5, rtol=1e-5)
        told = slow.triangles(own, points[item], codes, MOST, stack)
        torch.testing.assert_close(corners[item].float(), told, atol=0, rtol=0, equal_nan=True)
        assert corners[item, whole].isfinite().all()
        assert corners[item, ~whole].isnan().all()


@torch.no_grad()
def test_padded_faces_are_seen_as_in_the_original(model):
    ids = torch.tensor(meshes()[0][:9])[None]
    fewer = model.decode_ids(ids, cloud(batch=1))
    model.decoder.sees_padding = False
    try:
        assert (model.decode_ids(ids, cloud(batch=1)) - fewer).abs().max() > 1e-3
    finally:
        model.decoder.sees_padding = True


@pytest.mark.parametrize(
    "strategy", [Strategy(method="greedy"), Strategy(method="sample", top_k=50, top_p=0.95)], ids=lambda s: s.method
)
def test_what_is_written_is_what_the_original_would_write(model, tensors, strategy):
    points, own = cloud(2), slow.plain(tensors)
    limit = model.spec.max_tokens
    with torch.inference_mode():
        written = write_ids(decoder_of(model, model.condition(points)), 2, limit, strategy)
        made = model.generate(points, strategy)
    for item, (one, triangles) in enumerate(zip(written, made, strict=True)):
        ids = one.ids
        assert ids[0] == BEGIN  # not given, but written
        logits = slow.logits(tensors, points[item], ids)  # those of the last are the originals too
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=5e-5, rtol=1e-5)
        if strategy.method == "greedy":
            for place, token in enumerate(ids[1 : 1 + limit]):
                may = torch.ones(43, dtype=torch.bool)
                may[[0, 2]] = False
                may[END] = place % 9 == 0 and place > 0  # behind whole faces
                assert token == logits[place + 1].masked_fill(~may, -torch.inf).argmax()
        codes = [i - 3 for i in ids if i >= 3][:limit]
        assert len(codes) % 9 == 0
        expected = slow.triangles(own, points[item], codes, MOST)
        torch.testing.assert_close(triangles.float(), expected, atol=0, rtol=0)


# ---------------------------------------------------------------- conversion


def test_a_safetensors_file_called_pth_is_converted(tensors, tmp_path):
    path = file_of(tmp_path, tensors)
    assert path.suffix == ".pth"
    read = read_weights(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    for source in (path, tmp_path):  # the file, or the folder that it is alone in
        converter, found = convert(source)
        assert converter.name == "meshanything_v1"
        assert [*found.report.missing, *found.report.unexpected, *found.report.reshaped] == []
        assert set(found.report.matched) == set(found.model.state_dict())
        assert found.left_out.keys() == LEFT_OUT
        assert len(found.report.matched) > 60
        assert not found.model.training
        assert "S-Lab" in found.notes["licence"]
    spec, backbone = found.model.spec, found.model.backbone.config
    assert (spec.max_faces, spec.max_tokens, spec.points, spec.place) == (MOST, 9 * MOST, 4096, "lower")
    assert (backbone.dim, backbone.depth, backbone.heads, backbone.hidden, backbone.max_length) == (192, 2, 3, 48, 62)
    assert found.model.tokenizer.bins == 16


def test_plain_names_of_the_decoder_are_the_same(model, tensors, tmp_path):
    renamed = slow.plain(tensors)
    assert sum("attention.self.query" in name for name in renamed) == 4
    found = converted(tmp_path, renamed)
    assert found.left_out.keys() == LEFT_OUT
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)


@torch.no_grad()
def test_a_model_directory_keeps_it(model, tmp_path):
    read = load_model(save_model(model, tmp_path / "model"))
    assert isinstance(read, MeshCodeGenerator)
    assert read.spec == model.spec
    assert read.arguments == model.arguments
    points, ids = cloud(), padded([[0, *(code + 3 for code in mesh), 1] for mesh in meshes()], 2)
    own = [m(points, ids, m.kinds_of(ids), ids != 2) for m in (read, model)]
    assert torch.equal(*own)
    codes = torch.tensor(meshes()[0])[None]
    assert torch.equal(*(m.decode_ids(codes, points[:1]) for m in (read, model)))


def test_back_are_the_tensors_that_were_there(model, tensors):
    found, config = CONVERTER.restore(model)
    assert config == {}
    assert found.keys() == tensors.keys() - LEFT_OUT
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name]), name


def test_the_released_model_is_what_its_checkpoint_has():
    with torch.device("meta"):
        tensors = slow.checkpoint(slow.RELEASED)
        backbone, spec, arguments = structure(tensors)
        assert (backbone, spec, arguments) == published_v1()
        model = MeshCodeGenerator(backbone.build(), spec, **arguments)
        tensors = {k: v for k, v in tensors.items() if k not in LEFT_OUT}
        found = from_published_v1(tensors, backbone, arguments["encoder"], arguments["decoder"])
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert (spec.max_faces, spec.max_tokens, spec.points, model.prefix_length) == (800, 7200, 4096, 257)
    assert model.prefix_length + 2 + spec.max_tokens == 7459 <= backbone.max_length == 18_259
    assert sum(p.numel() for p in model.parameters()) == 571_337_728


# ---------------------------------------------------------------- whose it is


def test_no_other_family_takes_it(tensors, tmp_path):
    checkpoint = open_checkpoint(file_of(tmp_path, tensors))
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == ["meshanything_v1"]
    assert isinstance(find_converter(checkpoint), MeshAnythingV1)
    assert not CONVERTER.recognises(open_checkpoint(tmp_path.parent))  # a folder without weights
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert not CONVERTER.recognises(open_checkpoint(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    file_of(other, {"model.decoder.embed_tokens.weight": torch.zeros(3, 2)})
    assert not CONVERTER.recognises(open_checkpoint(other))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.lm_head.weight",
        "cond_proj.bias",
        "tokenizer.point_pe.weight",
        "tokenizer.decoder.layer.1.linear2_bias",
        "transformer.model.decoder.extra_embeds.weight",
        "transformer.model.decoder.layers.1.self_attn.k_proj.bias",
        "point_encoder.model.shape_model.post_kl.bias",
    ],
)
def test_every_tensor_must_be_there(tensors, tmp_path, name):
    with pytest.raises(LoadError, match=rf"lacks '{name}', 1 tensors in all; give that of Yiwen-ntu/MeshAnything"):
        converted(tmp_path, {k: v for k, v in tensors.items() if k != name})


@pytest.mark.parametrize(
    "name",
    [
        "extra_embeds",
        "tokenizer.encoder.weight",
        "tokenizer.decoder.layer.1.attention.self.query.weight",  # both namings at once
        "transformer.model.decoder.project_in.weight",
        "transformer.model.decoder.final_layer_norm.weight",
        "point_encoder.model.shape_model.geo_decode.weight",
    ],
)
def test_every_tensor_must_have_a_place(tensors, tmp_path, name):
    with pytest.raises(LoadError, match=rf"V1: the model has no place for '{name}', 1 tensors in all"):
        converted(tmp_path, {**tensors, name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (CODEBOOK, (2, 40, 24), "must be one codebook for all levels, got 2"),
        (CODEBOOK, (40, 24), r"must have 3 axes, got the shape \(40, 24\)"),
        ("transformer.model.decoder.token_embed_positions.weight", (11, 192), "got 11 rows"),
        ("transformer.model.decoder.embed_positions.weight", (64, 100), "width of the OPT must be a multiple of 64"),
        ("tokenizer.to_coor_logits.0.weight", (18, 128), "has sizes of no such model. .*bins must be between 4"),
        ("transformer.model.decoder.embed_positions.weight", (10, 192), "has sizes of no such model. .*max_faces"),
        ("transformer.lm_head.weight", (42, 192), r"head.weight \(42, 192\) -> \(43, 192\). Nothing was loaded"),
        ("tokenizer.point_pe.weight", (7, 128), r"decoder.condition.positions.weight \(7, 128\) -> \(6, 128\)"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(tensors, tmp_path, name, shape, words):
    with pytest.raises(LoadError, match=words):
        converted(tmp_path, {**tensors, name: torch.zeros(shape)})


def test_a_checkpoint_without_the_tensors_of_sizes_is_refused(tensors, tmp_path):
    name = "tokenizer.decoder.layer.0.linear1_weight"
    with pytest.raises(LoadError, match=f"lacks '{name}', which sizes are read off; is the file whole"):
        converted(tmp_path, {k: v for k, v in tensors.items() if k != name})


def test_models_of_another_kind_are_not_written_back(model):
    backbone, spec = HybridConfig(dim=64, depth=1, pattern="M", hidden_dim=48).build(), model.spec
    sizes = {"codebook_size": 8, "code_dim": 4, "decoder": model.arguments["decoder"]}
    other = MeshCodeGenerator(backbone, spec, encoder={"heads": 2, "layers": 0, "bottleneck": 4}, **sizes)
    with pytest.raises(LoadError, match=r"meshanything_v1: the model is of another architecture; it must be an OPT"):
        CONVERTER.restore(other)
    with pytest.raises(LoadError, match="meshanything_v1: must be given a MeshCodeGenerator, got a Linear"):
        CONVERTER.restore(torch.nn.Linear(1, 1))
