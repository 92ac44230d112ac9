"""Published image models against their originals: iLLaMA's own numbers, and timm's vision transformers."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from vertebra.backbones.base import create_backbone
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.base import load_task
from vertebra.domains.conversion import convert, converters, find_converter
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.vision.data import ImageData
from vertebra.domains.vision.model import ImageClassifier, resize_positions
from vertebra.domains.vision.published import read_published
from vertebra.domains.vision.published_vit import imagenet_names
from vertebra.domains.vision.sample import write_sample
from vertebra.domains.vision.spec import VisionSpec
from vertebra.domains.vision.task import ImageClassificationTask
from vertebra.errors import ConfigError, LoadError
from vertebra.pipelines.base import pipeline


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


def family(source):
    """The one family that claims a checkpoint."""
    checkpoint = open_checkpoint(source)
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == [find_converter(checkpoint).name]
    return find_converter(checkpoint).name


# ---------------------------------------------------------------- iLLaMA


@pytest.fixture(scope="module")
def illama():
    """The released names with random weights, input, and logits of the original code."""
    archive = np.load(Path(__file__).parents[2] / "golden" / "illama_small_random.npz")
    found = {k: torch.from_numpy(archive[k]) for k in archive.files if k != "config"}
    return {k.removeprefix("w/"): v for k, v in found.items() if k.startswith("w/")}, found


def illama_file(folder, state, config=None):
    torch.save({"model": state, "args": argparse.Namespace(lr=4e-3)}, folder / "w.pth")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "w.pth"


def test_illama_gives_the_logits_of_the_original(illama, tmp_path):
    state, golden = illama
    file = illama_file(tmp_path, state, {"num_heads": 3})
    assert family(file) == family(tmp_path) == "illama"
    converter, found = convert(file)
    model = found.model
    assert (model.patch_size, model.pooling, model.backbone.config.soft_mask) == (8, "cls", True)
    assert (model.spec.height, model.spec.classes[-1], model.spec.crop_fraction) == (32, "6", 0.875)
    assert len(found.report.matched) == len(state)
    assert found.left_out == {}
    close(model(golden["in/x"]), golden["out/logits_alpha0.0"])
    saved = load_model(save_model(model, tmp_path / "m", notes=found.notes))
    close(saved(golden["in/x"]), model(golden["in/x"]), atol=0)
    tensors, config = converter.restore(saved)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[k], state[k]) for k in state)
    again = tmp_path / "again"
    again.mkdir()
    other = convert(illama_file(again, tensors, config))[1].model
    assert (other.spec, other.backbone.config) == (model.spec, model.backbone.config)
    close(other(golden["in/x"]), model(golden["in/x"]), atol=0)


def small_illama(size=32, **changes):
    spec = VisionSpec(task="classification", channels=3, height=size, width=size, classes=("a", "b"))
    word = "illama_test,dim=64,num_heads=1,num_kv_heads=0,causal=false,soft_mask=true"
    return ImageClassifier(create_backbone(word, **changes), spec, patch_size=16).eval()


@pytest.mark.parametrize(("size", "crop"), [(32, ("centre", 0.875)), (384, ("squash", 1.0))])
def test_illama_without_a_config_has_heads_of_64_and_the_papers_preparation(tmp_path, size, crop):
    original = small_illama(size)
    tensors, _ = converters()["illama"].restore(original)
    model = convert(illama_file(tmp_path, tensors))[1].model
    assert (model.backbone.config.num_heads, model.spec.mean) == (1, (0.485, 0.456, 0.406))
    assert (model.spec.crop, model.spec.crop_fraction) == crop
    images = torch.randn(1, 3, size, size)
    close(model(images), original(images), atol=0)


def test_illama_that_does_not_fit_is_refused(illama, tmp_path):
    state, _ = illama
    heads = {"num_heads": 3}
    for changed, config, message in (
        (state, {}, r"a width of 48 is that of no whole number of heads of 64.*put a config\.json"),
        (state, {"num_heads": 5}, "a width of 48 is that of no whole number"),
        (state, {"num_heads": 48}, "must be an even multiple of num_heads"),
        ({**state, "blocks.0.attn.extra": torch.zeros(1)}, heads, r"1 unexpected: blocks\.0\.attn\.extra"),
        ({k: v for k, v in state.items() if k != "norm.weight"}, heads, r"1 missing: backbone\.norm\.weight"),
        ({k: v for k, v in state.items() if k != "pos_embed"}, heads, "pos_embed with 3 axes is missing"),
        ({**state, "pos_embed": state["pos_embed"][:, 1:]}, heads, r"pos_embed must have a row for \[cls\]"),
        ({**state, "pos_embed": state["pos_embed"][:, 2:]}, heads, "is of no square image"),
        ({**state, "blocks.7.norm1.weight": torch.ones(48)}, heads, r"blocks\.2\.\* is missing; is the file whole"),
        (state, {**heads, "model_args": 3}, r"model_args in config\.json must be an object, got 3"),
    ):
        with pytest.raises(LoadError, match=message):
            convert(illama_file(tmp_path, changed, config), "illama")


@pytest.mark.parametrize(("changes", "message"), [
    ({"soft_mask": False}, "must have soft_mask=True, got False"),
    ({"rope_theta": 500.0}, r"must have rope_theta=10000\.0, got 500\.0"),
])  # fmt: skip
def test_what_is_no_illama_of_the_paper_is_not_written_as_one(changes, message):
    with pytest.raises(LoadError, match=message):
        converters()["illama"].restore(small_illama(**changes))


def test_a_rate_that_the_format_does_not_keep_is_named():
    model = small_illama()
    model.set_soft_mask(0.5)
    with pytest.raises(LoadError, match=r"must have soft_mask_rate=0\.0, got 0\.5"):
        converters()["illama"].restore(model)


# ---------------------------------------------------------------- vision transformers of timm


def original(name="vit_tiny_patch16_224", **changes):
    """A model of timm whose weights are all random: fresh ones hide mistakes behind zeros and ones."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"img_size": 32, "depth": 2, "num_classes": 5, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


FORMS = {
    "token": {},
    "average": {"global_pool": "avg"},
    "average of normed": {"global_pool": "avg", "fc_norm": False},
    "token, normed late": {"fc_norm": True},
    "no token": {"global_pool": "avg", "class_token": False},
    "no biases": {"global_pool": "avg", "class_token": False, "fc_norm": False, "qkv_bias": False, "init_values": 0.1},
    "nothing biased": {"proj_bias": False, "qkv_bias": False, "init_values": 0.1},
    "no place of the token": {"no_embed_class": True, "init_values": 1e-2},
    "no head": {"num_classes": 0},
    "no positions": {"pos_embed": "none"},
    "wide image": {"img_size": (32, 64)},
    "grey": {"in_chans": 1},
    "other heads": {"num_heads": 6, "mlp_ratio": 2.5},
}
FOLDED = ("no biases", "nothing biased", "no place of the token")


@pytest.mark.parametrize("form", FORMS)
def test_a_vision_transformer_gives_timms_logits(form, tmp_path):
    theirs = original(**FORMS[form])
    save_for_hf(theirs, tmp_path / "hub", safe_serialization=True)
    images = torch.randn(2, theirs.in_chans, *theirs.patch_embed.img_size)
    assert family(tmp_path / "hub") == "timm_vit"
    converter, found = convert(tmp_path / "hub")
    model, state = found.model, theirs.state_dict()
    close(model(images), theirs(images))
    saved = load_model(save_model(model, tmp_path / "m", notes=found.notes))
    close(saved(images), model(images), atol=0)
    tensors, config = converter.restore(saved)
    assert ("zeros" in found.notes.get("conversion", "")) == ("bias" in form)
    if form not in FOLDED and form != "token, normed late":  # of a token, both norms are one
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[k], state[k]) for k in state)
    back = tmp_path / "back"
    back.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, back / "model.safetensors")
    (back / "config.json").write_text(json.dumps(config))
    close(timm.create_model(f"local-dir:{back}", pretrained=True).eval()(images), theirs(images))
    again = convert(back)[1].model
    assert (again.spec, again.backbone.config, again.arguments) == (model.spec, model.backbone.config, model.arguments)


@pytest.mark.parametrize(("name", "size", "suffix"), [
    ("vit_tiny_patch16_384", 48, "pth"), ("vit_small_patch8_224", 16, "safetensors"),
    ("vit_base_patch32_224", 64, "pth"), ("vit_large_patch14_224", 28, "safetensors"),
    ("deit3_small_patch16_224", 32, "pth"), ("vit_small_patch14_dinov2", 42, "safetensors"),
    ("vit_huge_patch14_224", 28, "safetensors"),
])  # fmt: skip
def test_weights_alone_are_enough_for_the_sizes_of_timm(name, size, suffix, tmp_path):
    theirs = original(name, img_size=size, depth=1)
    file = tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pth" else save_file)(theirs.state_dict(), file)
    assert family(file) == "timm_vit"
    found = convert(file)[1]
    assert found.model.backbone.config.heads == theirs.blocks[0].attn.num_heads
    assert "No config stood beside the weights" in found.notes["conversion"]
    images = torch.randn(1, 3, size, size)
    close(found.model(images), theirs(images))


def test_images_are_prepared_as_timm_does(tmp_path):
    theirs = original(img_size=64)
    theirs.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8}
    save_for_hf(theirs, tmp_path / "hub", safe_serialization=True)
    model = convert(tmp_path / "hub")[1].model
    assert (model.spec.mean, model.spec.crop_fraction) == ((0.1, 0.2, 0.3), 0.8)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]
    prepared = create_transform(**resolve_data_config(config))(Image.open(tmp_path / "a.png"))
    expected = theirs(prepared[None]).softmax(-1)[0]
    found = pipeline("vision/classify", save_model(model, tmp_path / "m"))(tmp_path / "a.png")
    close(torch.tensor([found.scores[name] for name in model.spec.classes]), expected, atol=1e-4)


def test_classes_have_the_names_that_are_known(tmp_path):
    names = imagenet_names()
    assert (len(names), len(set(names)), names[0]) == (1000, 1000, "tench, Tinca tinca")
    theirs = original(num_classes=1000, depth=1)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    assert convert(tmp_path / "w.pth")[1].model.spec.classes == names
    theirs = original(depth=1)
    save_for_hf(theirs, tmp_path / "hub", model_config={"label_names": list("vwxyz")}, safe_serialization=True)
    assert convert(tmp_path / "hub")[1].model.spec.classes == tuple("vwxyz")


@pytest.mark.parametrize(("changes", "message"), [
    ({"reg_tokens": 2}, "reg_token is of register tokens, which our vision transformer has not"),
    ({"qk_norm": True}, r"blocks\.0\.attn\.[qk]_norm\.(weight|bias) is of norms of queries and keys \(qk_norm\)"),
    ({"pre_norm": True}, r"norm_pre\.(weight|bias) is of a norm before the blocks \(pre_norm\)"),
    ({"global_pool": "map"}, r"attn_pool\.\S+ is of pooling by attention \(global_pool=map\)"),
    ({"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm\.(weight|bias) is of norms inside of the branches"),
    ({"final_norm": False}, r"one of norm\.weight and fc_norm\.weight must stand behind the blocks, got neither"),
    ({"global_pool": "avgmax"}, "global_pool must be token or avg, got 'avgmax'"),
    ({"global_pool": "avg", "pool_include_prefix": True}, "the pooling of 'vit_tiny_patch16_224' with these"),
    ({"act_layer": "quick_gelu"}, "the activation of 'vit_tiny_patch16_224' with these model_args is none"),
])  # fmt: skip
def test_forms_that_ours_has_not_are_refused_by_name(changes, message, tmp_path):
    save_for_hf(original(**changes), tmp_path / "hub", safe_serialization=True)
    assert family(tmp_path / "hub") == "timm_vit"
    with pytest.raises(LoadError, match=message):
        convert(tmp_path / "hub")


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("deit_tiny_distilled_patch16_224", {}, "dist_token is of a distillation token"),
    ("vit_giant_patch14_dinov2", {"embed_dim": 128, "num_heads": 2, "img_size": 28}, "fc2 takes 341: that is SwiGLU"),
    ("vit_base_patch16_rpn_224", {}, "the block of 'vit_base_patch16_rpn_224' with these model_args is none"),
    ("eva02_tiny_patch14_224", {"img_size": 28}, "is of separate queries, keys and values|is of SwiGLU"),
    ("beit_base_patch16_224", {}, "is of separate queries, keys and values|relative positions"),
    ("vit_base_patch32_siglip_gap_256", {}, "the activation of 'vit_base_patch32_siglip_gap_256'"),
])  # fmt: skip
def test_relatives_of_the_vision_transformer_are_refused_by_name(name, changes, message, tmp_path):
    save_for_hf(original(name, depth=1, **changes), tmp_path / "hub")
    with pytest.raises(LoadError, match=message):
        convert(tmp_path / "hub", "timm_vit")


def test_damaged_vision_transformers_are_refused(tmp_path):
    state = original(depth=1, init_values=0.1).state_dict()
    without = {k: v for k, v in state.items() if k != "blocks.0.attn.proj.weight"}
    for changed, message in (
        ({**state, "blocks.0.attn.extra": torch.zeros(1)}, r"1 unexpected: blocks\.0\.attn\.extra"),
        ({**state, "blocks.0.ls1.gamma": torch.zeros(7)}, r"1 unexpected: blocks\.0\.ls1\.gamma"),
        (without, r"1 missing: backbone\.layers\.0\.mixer\.proj\.weight; 1 unexpected: blocks\.0\.ls1\.gamma"),
        ({**state, "fc_norm.weight": torch.ones(192)}, r"must stand behind the blocks, got norm\.weight and fc_norm"),
        ({**state, "pos_embed": state["pos_embed"][:, :3]}, r"pos_embed \(1, 3, 192\) is of no square image"),
        ({**state, "patch_embed.proj.weight": torch.zeros(192, 3, 16, 8)}, "must be .* for squares of grey or RGB"),
        ({**state, "patch_embed.proj.weight": torch.zeros(192, 4, 16, 16)}, r"got \(192, 4, 16, 16\)"),
        ({**state, "blocks.0.mlp.fc1.weight": torch.zeros(3)}, r"blocks\.0\.mlp\.fc1\.weight must be a matrix"),
        ({k: v for k, v in state.items() if k != "cls_token"}, "how many heads a width of 192 has is not known"),
    ):
        torch.save(changed, tmp_path / "w.pth")
        with pytest.raises(LoadError, match=message):
            convert(tmp_path / "w.pth", "timm_vit")


@pytest.mark.parametrize(("config", "message"), [
    ({"architecture": "vit_of_tomorrow"}, "the architecture 'vit_of_tomorrow' is no model of the timm"),
    ({"architecture": "resnet10t"}, "timm cannot build 'resnet10t'|is a ResNet, not a plain vision transformer"),
    ({"model_args": {"checkpoint_path": "w.pth"}}, r"model_args\.checkpoint_path in config\.json is no argument"),
    ({"model_args": {"pretrained": True}}, r"model_args\.pretrained in config\.json is no argument"),
    ({"model_args": {"block_fn": "os.system"}}, "timm cannot build 'vit_tiny_patch16_224' with the model_args"),
    ({"model_args": {"img_size": 10**12}}, "timm cannot build 'vit_tiny_patch16_224' with the model_args"),
    ({"model_args": {"num_heads": 5}}, "timm cannot build 'vit_tiny_patch16_224' with the model_args"),
    ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode must be center or squash, got 'border'"),
    ({"pretrained_cfg": {"interpolation": "lanczos"}}, "interpolation must be bilinear or bicubic, got 'lanczos'"),
    ({"pretrained_cfg": {"mean": ["x"]}}, r"config\.json has a mean, std or crop_pct of no numbers"),
    ({"pretrained_cfg": [1]}, r"pretrained_cfg in config\.json must be an object, got \[1\]"),
])  # fmt: skip
def test_configs_that_cannot_be_followed_are_refused(config, message, tmp_path):
    torch.save(original(depth=1).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", **config}))
    with pytest.raises(LoadError, match=message):
        convert(tmp_path)


def test_what_is_of_the_pretraining_alone_is_left_out_with_its_reason(tmp_path):
    state = original(depth=1).state_dict()
    torch.save({**state, "mask_token": torch.zeros(1, 192)}, tmp_path / "w.pth")
    found = convert(tmp_path / "w.pth")[1]
    assert list(found.left_out) == ["mask_token"]
    assert "nothing is hidden from a classifier" in found.left_out["mask_token"]


@pytest.mark.parametrize("word", ["illama_test", "opt_test", "opt_test,causal=false,activation=gelu,positions=none"])
def test_what_is_no_vision_transformer_is_not_written_as_one(word):
    spec = VisionSpec(task="classification", channels=3, height=32, width=32, classes=("a",))
    model = ImageClassifier(create_backbone(word), spec)
    with pytest.raises(LoadError, match=r"timm_vit: the (model must be an image classifier with an OPT|backbone must)"):
        converters()["timm_vit"].restore(model)


def test_initial_weights_of_a_training_may_be_a_vision_transformers(tmp_path):
    theirs = original()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    word = "opt_test,dim=192,depth=2,heads=3,hidden=768,causal=false,norm_first=true,positions=none"
    spec = VisionSpec(task="classification", channels=3, height=48, width=48, classes=("a", "b"))
    backbone = create_backbone(f"{word},activation=gelu,norm_eps=1e-6")
    model = ImageClassifier(backbone, spec, pooling="cls").eval()
    report = read_published(model, str(tmp_path / "w.safetensors"))
    assert set(report.missing) == {"head.weight", "head.bias"}
    grown = original(img_size=48)
    rows = resize_positions(theirs.pos_embed.detach().roll(-1, 1), (2, 2), (3, 3)).roll(1, 1)
    grown.load_state_dict({**theirs.state_dict(), "pos_embed": rows})
    images = torch.randn(2, 3, 48, 48)
    close(model.embed_images(images), grown.forward_head(grown.forward_features(images), pre_logits=True))


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_sample(folder)
    return ImageData(root=str(folder / "shapes"), size=32, limit=20, batch_size=8)


def saved(folder, form):
    """A model directory of a converted vision transformer, and the file that it is of."""
    theirs = original(**FORMS[form])
    save_file(theirs.state_dict(), folder / "w.safetensors")
    save_for_hf(theirs, folder / "hub", safe_serialization=True)
    found = convert(folder / "hub")[1]
    save_model(found.model, folder / "m", notes=found.notes)
    return found.model


def tuning(folder, source, **options):
    """A training from a source that changes nothing: only what it begins with is of interest."""
    task = ImageClassificationTask(f"local-dir:{folder / 'm'}", init_from=str(source), **options)
    fit = Trainer(
        default_root_dir=folder, max_steps=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, logger=False,
    )  # fmt: skip
    return task, fit


@pytest.mark.parametrize(("kind", "form"), [
    *((kind, form) for kind in ("m", "hub") for form in ("token", "average", "average of normed", "no token")),
    ("w.safetensors", "token"), ("w.safetensors", "average"),  # of the others, weights do not tell all
])  # fmt: skip
def test_a_converted_vision_transformer_is_fine_tuned_as_it_is(kind, form, pictures, tmp_path, monkeypatch):
    original_model = saved(tmp_path, form)
    before, images = {}, torch.randn(2, 3, 32, 32)

    def keep(task):
        task.eval()
        before.update({k: v.clone() for k, v in task.model.state_dict().items()})
        before["features"] = task.model.embed_images(images)
        task.train()

    monkeypatch.setattr(ImageClassificationTask, "on_train_start", keep)
    task, fit = tuning(tmp_path, tmp_path / kind)
    fit.fit(task, pictures)
    theirs, own = original_model.state_dict(), task.model.state_dict()
    assert own["head.weight"].shape[0] == len(pictures.spec.classes) == 6
    for name in own.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(before[name], theirs[name]), name
    assert own.keys() == theirs.keys()
    close(before["features"], original_model.embed_images(images), atol=0)
    assert not torch.equal(own["backbone.layers.0.mixer.qkv.weight"], theirs["backbone.layers.0.mixer.qkv.weight"])
    names = ("pooling", "with_cls", "pooled_norm")
    assert [task.hparams[n] for n in names] == [original_model.arguments[n] for n in names]


def test_what_initial_weights_told_is_not_asked_of_them_again(pictures, tmp_path):
    model = saved(tmp_path, "average")
    task, fit = tuning(tmp_path, tmp_path / "m")
    fit.fit(task, pictures)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "m" / "config.json").unlink()
    again = load_task(tmp_path / "a.ckpt").model
    assert (again.arguments["with_cls"], again.arguments["pooled_norm"]) == (True, 1e-6)
    images = torch.randn(2, 3, 32, 32)
    close(again(images), task.eval().model(images), atol=0)
    assert again.pooled_norm.weight.shape == model.pooled_norm.weight.shape


def test_a_file_that_a_checkpoint_names_is_not_read(pictures, tmp_path, monkeypatch):
    saved(tmp_path, "average")
    task, fit = tuning(tmp_path, tmp_path / "m", with_cls=False, pooled_norm=0.0, pooling="mean")
    pictures.setup("fit")
    task.build(pictures.spec)
    fit.strategy.connect(task)
    task.hparams.update(with_cls=None, pooled_norm=None, pooling="auto")  # as if written by somebody else
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt").model
    assert (again.arguments["with_cls"], again.arguments["pooled_norm"]) == (False, 0.0)


@pytest.mark.parametrize(("form", "typed", "message"), [
    ("average", {"pooled_norm": 1e-5}, r"pooled_norm=1e-05 .* has pooled_norm=1e-06"),
    ("average", {"pooled_norm": 0.0}, r"pooled_norm=0\.0 .* has pooled_norm=1e-06"),
    ("average", {"with_cls": False}, r"with_cls=False .* has with_cls=True"),
    ("no token", {"with_cls": True}, r"with_cls=True .* has with_cls=False"),
    ("average of normed", {"pooled_norm": 1e-6}, r"pooled_norm=1e-06 .* has pooled_norm=0\.0"),
])  # fmt: skip
def test_arguments_that_contradict_the_initial_weights_are_refused(form, typed, message, pictures, tmp_path):
    saved(tmp_path, form)
    task, fit = tuning(tmp_path, tmp_path / "m", **typed)
    text = rf"^ImageClassificationTask: {message}; leave the argument out, .*, or leave init_from out\.$"
    with pytest.raises(ConfigError, match=text):
        fit.fit(task, pictures)


def test_pooling_may_be_another_than_that_of_the_initial_weights(pictures, tmp_path):
    saved(tmp_path, "token")
    task, fit = tuning(tmp_path, tmp_path / "m", pooling="mean")
    fit.fit(task, pictures)
    assert (task.model.pooling, task.model.arguments["with_cls"]) == ("mean", True)
