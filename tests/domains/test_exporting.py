"""Models as programs: other forms than the bundled models', and steps that write what one pass says."""

import json

import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains import exporting
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.exporting import Axis, ExportForm, Port, exports_of, write_form
from vertebra.domains.language.model import LanguageEncoder, LanguageModel
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.model import DomainModel
from vertebra.domains.spec import DataSpec
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.domains.vision.diffusion import ImageDiffusion
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh_amt import AMTTokenizer
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

TOKENS = NucleotideTokenizer().to_dict()
SMALL_IMAGES = VisionSpec(task="generation", channels=3, height=4, width=5, classes=("a", "b"))


def shaken(model):
    """A model in evaluation mode whose norms are not 1 and biases not 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def dna(name="illama_test", **arguments):
    spec = DNASpec(tokenizer=TOKENS, task="classification", max_length=24, classes=("a", "b", "c"))
    return shaken(DNAClassifier(create_backbone(name), spec, **arguments))


def series(name, causal=False, spec=None, **arguments):
    spec = spec or SeriesSpec(context=32, horizon=8)
    return shaken(PatchForecaster(create_backbone(name, causal=causal), spec, patch=4, **arguments))


def text(cls=LanguageModel, name="opt_test", **changes):
    return shaken(cls(create_backbone(name, **changes), LanguageSpec(vocab_size=19)))


def mesh(name="hybrid_test"):
    spec = MeshSpec(tokenizer=AMTTokenizer().to_dict(), points=32, max_tokens=30)
    config = {"layers": 1, "heads": 2, "latents": 6, "queries": "points", "frequencies": 2}
    return shaken(MeshGenerator(create_backbone(name), spec, encoder=config))


FORMS = {
    "echo": lambda: dna(pooling="echo"),
    "strands": lambda: dna(pooling="mean", rc_average=True),
    "last": lambda: dna("hybrid_test", pooling="last"),
    "masked tokens": lambda: shaken(
        DNALanguageModel(
            create_backbone("illama_test", causal=False), DNASpec(tokenizer=TOKENS, task="lm", max_length=24)
        )
    ),
    "text": lambda: text(),
    "features of text": lambda: text(LanguageEncoder, "opt_test", causal=False),
    "mixture": lambda: series("illama_test", head="mixture"),
    "causal mixture": lambda: series("tsfm_test", causal=True, head="mixture"),
    "means": lambda: series("hybrid_test", head="point", readout="flatten", shortcut=True),
    "covariates": lambda: series(
        "illama_test",
        spec=SeriesSpec(
            context=32, horizon=8, variates=("u", "v"), past=("p",), past_center=(0.0,), past_scale=(1.0,),
            known=("k",), known_center=(0.0,), known_scale=(1.0,),
        ),
        mode="multivariate",
    ),
    "denoiser": lambda: shaken(
        ImageDiffusion(create_backbone("illama_test", causal=False), SMALL_IMAGES, patch_size=1)
    ),
    "causal image": lambda: shaken(
        ImageClassifier(create_backbone("illama_test"), SMALL_IMAGES, patch_size=1, pooling="cls")
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_other_models_are_programs_of_any_size(form, tmp_path):
    exports = exports_of(FORMS[form]())
    written = write_form("forward", exports.forms["forward"], tmp_path / "m.pt2")
    assert written.difference <= 1e-4
    assert len(written.sizes) == 3
    assert {sizes["batch"] for sizes, _ in written.sizes} == {1, 2, 3}
    json.dumps({**exports.facts, **written.facts})


# ---------------------------------------------------------------- steps


def program_of(model, name, tmp_path, max_length=None):
    """A form of a model, and its program as it is read back."""
    form = exports_of(model, steps=True, max_length=max_length).forms[name]
    write_form(name, form, tmp_path / f"{name}.pt2")
    return form, torch.export.load(tmp_path / f"{name}.pt2").module()


def zeros(form, batch, skip):
    """An empty state."""
    return [
        torch.zeros(batch, *p.shape[1:], dtype=torch.long if p.name == "position" else torch.float32)
        for p in form.inputs[skip:]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["illama_test", "hybrid_test", "opt_test", "ebranchformer_test", "axial_test"])
@torch.no_grad()
def test_eight_positions_one_by_one_are_one_pass(name, tmp_path):
    model, ids = text(name=name), torch.randint(0, 19, (3, 8))
    form, step = program_of(model, "step", tmp_path, max_length=12)
    state, said = zeros(form, 3, 1), []
    for at in range(8):
        logits, *state = step(ids[:, at : at + 1], *state)
        said.append(logits)
    torch.testing.assert_close(torch.cat(said, 1), model(ids), atol=1e-4, rtol=1e-4)
    if "length" in form.axes:  # a prompt in one call, then on from there
        logits, *state = step(ids[:, :5], *zeros(form, 3, 1))
        more, *_ = step(ids[:, 5:], *state)
        torch.testing.assert_close(torch.cat([logits, more], 1), model(ids), atol=1e-4, rtol=1e-4)


def test_mamba_1_steps_one_by_one_and_has_no_pass_of_any_length(tmp_path):
    model = text(name="hybrid_test", pattern="SA")
    with pytest.raises(ConfigError, match="a program of any length cannot be written for Mamba-1 layers"):
        write_form("forward", exports_of(model).forms["forward"], tmp_path / "m.pt2")
    form = exports_of(model, steps=True).forms["step"]
    assert form.inputs[0].shape == ("batch", 1)
    assert write_form("step", form, tmp_path / "s.pt2").difference <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["axial_test", "hybrid_test"])
@torch.no_grad()
def test_an_image_pixel_by_pixel_is_one_pass(name, tmp_path):
    model = shaken(ImageGenerator(create_backbone(name), SMALL_IMAGES, levels=8))
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    labels, ids = torch.tensor([1, 0]), model.quantise(images).flatten(2)
    wanted = model(images, labels).flatten(2, 3)  # (B, C, H * W, V)
    _, begin = program_of(model, "begin", tmp_path)
    _, step = program_of(model, "step", tmp_path)
    for channel in (0, 2):
        base, *state = begin(images, torch.full((2,), channel), labels)
        before = torch.full((2, 1), 3)  # of no account
        for at in range(20):
            logits, *state = step(before, base, *state)
            torch.testing.assert_close(logits[:, 0], wanted[:, channel, at], atol=1e-4, rtol=1e-4)
            before = ids[:, channel, at : at + 1]


@pytest.mark.slow
@torch.no_grad()
def test_a_mesh_token_by_token_is_one_pass(tmp_path):
    model = mesh()
    form = exports_of(model).forms["forward"]
    ids, kinds, points = form.draw({"batch": 2, "length": 9, "points": 20}, torch.Generator().manual_seed(3))
    wanted = form.module(ids, kinds, points)
    mask = torch.ones(2, 10, dtype=torch.bool)
    whole = model(points, torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(kinds, (0, 1)), mask)
    torch.testing.assert_close(wanted, whole, atol=1e-5, rtol=1e-5)  # the form is the model's pass
    _, begin = program_of(model, "begin", tmp_path)
    _, step = program_of(model, "step", tmp_path)
    first, *state = begin(points)
    said = [first[:, None]]
    for at in range(9):
        logits, *state = step(ids[:, at : at + 1], kinds[:, at : at + 1], *state)
        said.append(logits)
    torch.testing.assert_close(torch.cat(said, 1), wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- words


class Silent(DomainModel):
    """A model from elsewhere that says nothing of programs."""

    task = "toy/silent"


class Twice(torch.nn.Module):
    """A module that would need another program for another length."""

    def forward(self, x):
        return x * 2 if x.shape[1] == 4 else x


def toy_form(module, draw=None):
    return ExportForm(
        about="A toy.",
        module=module,
        inputs=(Port("x", ("batch", "length"), "numbers"),),
        outputs={"y": "numbers"},
        axes={"batch": exporting.BATCH, "length": Axis(1, 9, (4, 1, 9))},
        draw=draw or (lambda sizes, generator: (torch.randn(sizes["batch"], sizes["length"], generator=generator),)),
    )


def test_words_of_models_that_are_no_programs(tmp_path):
    backbone = create_backbone("illama_test")
    with pytest.raises(ConfigError, match="Silent says nothing of how it runs outside of Python; give it a method"):
        exports_of(Silent(backbone, DataSpec()))
    with pytest.raises(ConfigError, match="DNAClassifier has no step, it writes nothing token after token; leave"):
        exports_of(dna(), steps=True)
    with pytest.raises(ConfigError, match="FIT has no steps of a fixed shape"):
        exports_of(text(name="fit_test"), steps=True)
    with pytest.raises(ConfigError, match="forward is no program for any batch and length: "):
        write_form("forward", toy_form(Twice()), tmp_path / "m.pt2")
    with pytest.raises(ConfigError, match=r"forward\.x must be \(2, 4\), got \(2, 5\)"):
        write_form("forward", toy_form(torch.nn.Identity(), lambda *_: (torch.zeros(2, 5),)), tmp_path / "m.pt2")


def test_a_model_from_elsewhere_may_say_itself_what_it_is(tmp_path):
    class Told(Silent):
        def exports(self, steps, max_length):
            return exporting.Exports({"forward": toy_form(torch.nn.ReLU())}, {"steps": steps, "most": max_length})

    model = Told(create_backbone("illama_test"), DataSpec())
    exports = exports_of(model, steps=True, max_length=7)
    assert exports.facts == {"steps": True, "most": 7}
    written = write_form("forward", exports.forms["forward"], tmp_path / "m.pt2")
    assert written.difference == 0
    assert written.facts["outputs"] == [
        {"name": "y", "dtype": "float32", "shape": ["batch", "length"], "about": "numbers"}
    ]
    assert written.facts["axes"] == {
        "batch": {"min": 1, "max": 4096, "enforced": True},
        "length": {"min": 1, "max": 9, "enforced": True},
    }


@pytest.mark.parametrize(
    ("made", "context", "most"),
    [
        ("illama_test", 2048, 2048),  # rotary positions set no limit: the context does, be it short or long
        ("illama_test", 9000, 9000),
        ("illama_test", None, exporting.LONGEST),  # nobody stated one
        ("opt_test", None, 128),  # a table of positions
        ("opt_test", 9000, 128),
        ("opt_test", 16, 16),
    ],
)
def test_the_longest_input_is_the_models_context_or_its_table_of_positions(made, context, most):
    backbone = create_backbone(made, **({"max_length": 128} if made == "opt_test" else {}))
    model = LanguageModel(backbone, LanguageSpec(vocab_size=19, max_length=context))
    assert exports_of(model).forms["forward"].axes["length"].high == most


def test_the_longest_input_of_dna_and_meshes():
    spec = DNASpec(tokenizer=TOKENS, task="classification", max_length=100, classes=("a", "b"))
    plain, twice = (
        DNAClassifier(create_backbone("opt_test", max_length=128), spec, pooling=p) for p in ("last", "echo")
    )
    assert exports_of(plain).forms["forward"].axes["length"].high == 100
    assert exports_of(twice).forms["forward"].axes["length"].high == 64  # positions are read twice
    assert exports_of(mesh()).forms["forward"].axes["length"].high == 30 + 2


def test_a_pt2_refuses_what_is_out_of_range_and_onnx_does_not(tmp_path):
    form, longer = toy_form(torch.nn.ReLU()), torch.ones(2, 10)
    written = write_form("forward", form, tmp_path / "m.pt2")
    assert written.facts["axes"]["length"] == {"min": 1, "max": 9, "enforced": True}
    with pytest.raises(Exception, match="<= 9"):
        torch.export.load(tmp_path / "m.pt2").module()(longer)
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    written = write_form("forward", form, tmp_path / "m.onnx")
    assert written.facts["axes"]["length"] == {"min": 1, "max": 9, "enforced": False}
    said = runtime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": longer.numpy()})
    assert said[0].shape == (2, 10)


def test_weights_beyond_a_file_of_onnx_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(exporting, "PROTOBUF_BYTES", 1)
    with pytest.raises(ConfigError, match=r"0\.0 GiB of weights, and a file of ONNX holds less than 2; write \.pt2"):
        write_form("forward", toy_form(torch.nn.PReLU()), tmp_path / "m.onnx")
