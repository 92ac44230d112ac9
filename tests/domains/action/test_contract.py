"""What every policy must do with every backbone; a new preset named *_test is covered by being registered."""

import dataclasses

import pytest
import torch
from made_demonstrations import made_batch, made_items, shaken

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.domains.action.model import CVAEPolicy, DecoderPolicy, EncoderDecoderPolicy
from vertebra.domains.saving import load_model, save_model
from vertebra.tokenizers.action import NONE

TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
BSPLINE = "bspline,num_basis=4,degree=2,vocab_size=16"


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of policy: its class and arguments, what it needs of the backbone, and its tokens."""

    cls: type
    arguments: dict = dataclasses.field(default_factory=dict)
    causal: bool = False
    tokenizer: str = BSPLINE


FORMS = {
    "parallel": Form(DecoderPolicy),
    "causal parallel": Form(DecoderPolicy, causal=True),
    "grouped": Form(DecoderPolicy, {"grouped": True, "readout": "mean", "smoothing": 1.5}),
    "autoregressive": Form(DecoderPolicy, {"decoding": "autoregressive"}, causal=True),
    "autoregressive FAST": Form(
        DecoderPolicy, {"decoding": "autoregressive"}, causal=True, tokenizer="fast,vocab_size=128"
    ),
    "encoder-decoder": Form(EncoderDecoderPolicy, {"heads": 2}),
    "cvae": Form(CVAEPolicy, {"latent": 4}),
    "regression": Form(CVAEPolicy, {"latent": 0, "grouped": False, "regression": "l2"}),
}
ONE_PASS = [form for form in FORMS if not form.startswith("autoregressive")]
WRITING = ["autoregressive", "autoregressive FAST"]
every_backbone = pytest.mark.parametrize("name", TEST_PRESETS)
every_form = pytest.mark.parametrize("form", FORMS)


def made(name, form, tokenizer=None, **spec):
    """A policy in evaluation mode, and a batch of six."""
    kind = FORMS[form]
    tokenizer = tokenizer or kind.tokenizer
    if tokenizer.startswith("fast"):
        pytest.importorskip("tokenizers", reason="FAST needs the extra action")
    items = made_items(tokenizer, **{"history": 2, "past_action": True, **spec})
    model = kind.cls(create_backbone(name, causal=kind.causal), items.spec, **kind.arguments)
    return shaken(model), made_batch(items)


def part_of(batch, rows):
    return {k: v[rows] for k, v in batch.items() if isinstance(v, torch.Tensor)}


def plain_loss(model, batch):
    """The loss but for a CVAE's divergence, which does not depend on what is real."""
    losses = model.losses(batch)
    return losses.get("l1", losses.get("l2", losses["loss"]))


# ---------------------------------------------------------------- gradients, files


@every_backbone
@every_form
def test_the_loss_reaches_all_parameters(name, form):
    model, batch = made(name, form, tasks=("reach", "push"), cameras=("top",))
    torch.manual_seed(1)
    losses = model.train().losses(batch)
    losses["loss"].backward()
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # at the last position a backward scan has read one token only
    assert [n for n in unused if not (name == "hybrid_test" and n.startswith("posterior."))] == []


@every_backbone
@every_form
def test_chunks_are_the_same_after_saving(name, form, tmp_path):
    model, batch = made(name, form, relative=(0, 1, -1))
    chunks = model.act(batch)
    assert chunks.shape == (6, 6, 3)
    assert chunks.isfinite().all()
    assert chunks.dtype == torch.float32
    loaded = load_model(save_model(model, tmp_path / "m"))
    assert isinstance(loaded, type(model))
    assert loaded.spec == model.spec
    torch.testing.assert_close(loaded.act(batch), chunks, atol=0, rtol=0)
    torch.testing.assert_close(loaded.losses(batch)["loss"], model.losses(batch)["loss"], atol=0, rtol=0)
    for row in (0, 5):  # one of a batch is what it is alone
        torch.testing.assert_close(model.act(part_of(batch, slice(row, row + 1)))[0], chunks[row], atol=1e-4, rtol=0)


EXPORTED = [(name, "parallel") for name in TEST_PRESETS]
EXPORTED += [("illama_test", form) for form in ONE_PASS if form != "parallel"]


@pytest.mark.parametrize(("name", "form"), EXPORTED)
def test_a_policy_of_one_pass_is_exported(name, form):
    model, batch = made(name, form)
    seen = {key: batch[key] for key in ("states", "start")}
    program = torch.export.export(model, (seen,))
    torch.testing.assert_close(program.module()(seen), model(seen), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("illama_test", "parallel"),
        ("fit_test", "causal parallel"),
        ("illama_test", "autoregressive"),
        ("hybrid_test", "autoregressive FAST"),
        ("axial_test", "encoder-decoder"),
        ("illama_test", "cvae"),
        ("ebranchformer_test", "regression"),
    ],
)
def test_a_batch_is_learnt_by_heart(name, form):
    model, batch = made(name, form)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = None
    for _ in range(150):
        loss = plain_loss(model, batch)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < first / 4:
            return
    pytest.fail(f"loss went from {first:.3f} to {loss.item():.3f} only")


# ---------------------------------------------------------------- padding


@every_form
def test_a_row_s_loss_does_not_depend_on_the_others(form):
    """The loss of a batch is the mean of its rows', each weighed by its real tokens."""
    model, batch = made("illama_test", form)
    assert batch["real"].sum(1).tolist()[-1] == 1
    found, weights = [], []
    for row in range(6):
        part = part_of(batch, slice(row, row + 1))
        found.append(plain_loss(model, part))
        if model.tokenizer.varies:
            weights.append((model.tokenizer.encode(part["actions"]) != NONE).sum() + 1)
        else:
            weights.append(model.token_weights(part["real"]).sum())
    weights = torch.stack(weights)
    assert len(set(weights.tolist())) > 1
    torch.testing.assert_close(plain_loss(model, batch), (torch.stack(found) * weights).sum() / weights.sum())


@pytest.mark.parametrize("form", ["parallel", "grouped", "autoregressive", "encoder-decoder", "regression"])
def test_actions_that_are_not_real_do_not_count(form):
    model, batch = made("illama_test", form, tokenizer="binning,vocab_size=16")
    noise = torch.randn_like(batch["actions"])
    changed = batch | {"actions": torch.where(batch["real"][:, :, None], batch["actions"], noise)}
    for name, value in model.losses(batch).items():
        torch.testing.assert_close(model.losses(changed)[name], value, atol=0, rtol=0)
    worse = batch | {"actions": torch.where(batch["real"][:, :, None], noise, batch["actions"])}
    assert model.losses(worse)["loss"] != model.losses(batch)["loss"]


# ---------------------------------------------------------------- one token after the other


@every_backbone
@pytest.mark.parametrize("form", WRITING)
def test_tokens_are_written_as_they_are_learnt(name, form):
    """Each token is the most likely one, of those that fit, of a pass over all those before."""
    model, batch = made(name, form)
    ids = model.write(batch)
    assert model.tokenizer.is_valid(ids).all()
    logits = model(batch, ids.clamp_min(0))  # (B, L + 1, V + 2)
    assert logits.shape == (6, ids.shape[1] + 1, model.tokenizer.vocab_size + 2)
    sizes = model.tokenizer.sizes
    for row, made_ids in enumerate(ids.tolist()):
        left = model.tokenizer.length
        for place, token in enumerate(made_ids):
            if token == NONE:
                assert set(made_ids[place:]) == {NONE}
                break
            may = ((sizes > 0) & (sizes <= left)).nonzero()[:, 0]
            assert token == may[logits[row, place, may].argmax()]
            left -= int(sizes[token])
        assert left == 0


@pytest.mark.parametrize("form", WRITING)
def test_an_untrained_policy_writes_chunks(form):
    lengths = set()
    for seed in range(3):
        torch.manual_seed(seed)
        model, batch = made("illama_test", form)
        ids = model.write(batch)
        assert model.tokenizer.is_valid(ids).all()
        assert model.act(batch, steps=3).shape == (6, 3, 3)
        lengths |= set((ids != NONE).sum(1).tolist())
    assert max(lengths) <= model.tokenizer.length
    assert (len(lengths) > 1) == model.tokenizer.varies


# ---------------------------------------------------------------- where chunks begin, other rates


@pytest.mark.parametrize("form", [form for form in FORMS if "FAST" not in form])
@pytest.mark.parametrize("relative", [(-1, -1, -1), (0, -1, -1), (0, 1, -1)])
def test_chunks_begin_where_they_must(form, relative):
    for initial in ("fit", "overwrite"):
        model, batch = made("illama_test", form, tokenizer=f"{BSPLINE},initial={initial}", relative=relative)
        for start in (batch["start"], batch["start"] + 0.3):
            chunks = model.act(batch | {"start": start})
            torch.testing.assert_close(chunks[:, 0, :2], start[:, :2], atol=1e-6, rtol=1e-6)
    model, batch = made("illama_test", form, relative=relative)
    assert not torch.isclose(model.act(batch)[:, 0, :2], batch["start"][:, :2], atol=1e-4).all()


@pytest.mark.parametrize("form", [form for form in FORMS if "FAST" not in form])
def test_chunks_at_other_rates_are_the_same_curves(form):
    for tokenizer in (BSPLINE, f"{BSPLINE},initial=fit", "binning,vocab_size=16"):
        model, batch = made("illama_test", form, tokenizer=tokenizer, relative=(0, 1, -1))
        chunks = model.act(batch)
        finer = model.act(batch, steps=11)
        assert finer.shape == (6, 11, 3)
        torch.testing.assert_close(finer[:, ::2, :2], chunks[:, :, :2], atol=1e-5, rtol=1e-5)
