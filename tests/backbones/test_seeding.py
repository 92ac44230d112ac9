"""Mamba-2 that takes over from attention: its two forms, its seeds, and configs that fit a teacher."""

import math

import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import resolve
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.illama import ILLaMAConfig
from vertebra.backbones.layers.attention import Attention, Rope
from vertebra.backbones.layers.mamba2 import OPEN_GATE, Mamba2, Mamba2Shape
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.seeding import new_layers, replaced, seed_mamba2, student_config
from vertebra.errors import ConfigError

FORMS = ("mohawk", "mmmamba")
every_form = pytest.mark.parametrize("form", FORMS)
DIM, HEADS, LENGTH = 16, 4, 21


def layout(batch=2, length=LENGTH, **facts):
    return Layout(batch, length, torch.device("cpu"), causal=True, **facts)


def mamba(form, **changes):
    """A mixer whose weights are none of those it begins with."""
    shape = {"inner_dim": DIM, "head_dim": 4, "groups": HEADS, "state_dim": 4, "kernel": 3, "form": form}
    mixer = Mamba2(DIM, Mamba2Shape(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def backbone(form, **changes):
    fields = {"pattern": "MAM", "mamba_form": form, "mamba_bias": form == "mmmamba", "attention_bias": True}
    built = resolve("hybrid_test", **{**fields, **changes}).build().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def packed():
    return (torch.arange(LENGTH) > torch.tensor([[6], [13]])).long()


def padding():
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :5] = mask[1, 17:] = False
    return mask


# ---------------------------------------------------------------- the two forms as backbones


@every_form
def test_steps_equal_forward(form):
    built = backbone(form)
    x = torch.randn(2, LENGTH, DIM)
    state = built.init_state(2, LENGTH)
    y = [built.step(x[:, :9], state), *(built.step(x[:, i : i + 1], state) for i in range(9, 17))]
    y.append(built.step(x[:, 17:], state))
    torch.testing.assert_close(torch.cat(y, 1), built(x), atol=1e-5, rtol=1e-5)


@every_form
@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_packing_change_nothing(form, causal):
    built, x, mask = backbone(form, causal=causal), torch.randn(2, LENGTH, DIM), padding()
    y = built(torch.where(mask[..., None], x, 100 * torch.randn_like(x)), mask)
    for i in range(2):
        torch.testing.assert_close(y[i, mask[i]], built(x[i : i + 1, mask[i]])[0], atol=1e-5, rtol=1e-5)
    y = built(x, segments=packed())
    parts = [built(x[:1, :7]), built(x[:1, 7:])]
    torch.testing.assert_close(y[:1], torch.cat(parts, 1), atol=1e-5, rtol=1e-5)


@every_form
def test_gradient_reaches_every_parameter_and_pieces_change_none(form):
    built, x = backbone(form), torch.randn(2, 50, DIM)

    def gradients():
        built.zero_grad()
        built(x).pow(2).sum().backward()
        return {name: p.grad.clone() for name, p in built.named_parameters()}

    whole = gradients()
    assert [name for name, grad in whole.items() if not grad.abs().sum() > 0] == []
    built.set_recompute(True, piece=17)
    torch.testing.assert_close(gradients(), whole, atol=2e-4, rtol=1e-4)


@every_form
def test_export_equals_eager(form):
    built, x = backbone(form), torch.randn(2, 40, DIM)
    program = torch.export.export(built, (x,))
    torch.testing.assert_close(program.module()(x), built(x), atol=1e-5, rtol=1e-5)


@every_form
def test_config_survives_json(form):
    config = backbone(form, attention_bias=True, rope_fraction=1.0, rope_interleaved=True).config
    assert type(config).from_dict(config.to_dict()) == config


def test_stock_mamba2_has_the_names_it_had():
    assert sorted(dict(mamba("mamba2").named_parameters())) == [
        "A_log", "D", "conv1d.bias", "conv1d.weight", "dt_bias", "in_proj.weight", "norm.weight", "out_proj.weight",
    ]  # fmt: skip


# ---------------------------------------------------------------- what they compute


def test_the_discrete_form_is_its_recurrence():
    """h = sigmoid(-a) h + B x, y = C h + D x, no convolution, no norm; values and gradients."""
    mixer = mamba("mohawk")
    x = torch.randn(2, LENGTH, DIM, requires_grad=True)

    def recurrence():
        z, xbc, a = mixer._project(x, None)
        xbc = F.pad(xbc, (0, 0, 2, 0))
        xbc = sum(xbc[:, k : k + LENGTH] * mixer.conv1d.weight[:, 0, k] for k in range(3)) + mixer.conv1d.bias
        values, b, c = mixer._split(xbc)
        state, outputs = torch.zeros(2, HEADS, 4, 4), []
        for t in range(LENGTH):
            state = state * torch.sigmoid(-a[:, t])[..., None, None]
            state = state + values[:, t, :, :, None] * b[:, t, :, None]
            outputs.append((state @ c[:, t, :, :, None])[..., 0] + mixer.D[:, None] * values[:, t])
        y = torch.stack(outputs, 1).flatten(2)
        return mixer.out_proj(y * F.silu(z + mixer.z_bias))

    wanted = recurrence()
    found = mixer(x, layout())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(found)
    inputs = [x, *mixer.parameters()]
    expected = torch.autograd.grad((wanted * weight).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [-200.0, -12.0, 30.0])
def test_the_discrete_form_stays_finite_where_it_forgets_nothing_or_all(value):
    mixer = mamba("mohawk")
    with torch.no_grad():
        mixer.in_proj.weight[-HEADS:, 0] = value
    x = torch.randn(2, LENGTH, DIM)
    x[..., 0] = 1
    y = mixer(x, layout())
    y.pow(2).sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
    state = mixer.init_state(2, LENGTH, torch.float32, torch.device("cpu"))
    steps = [mixer.step(x[:, i : i + 1], state) for i in range(LENGTH)]
    torch.testing.assert_close(torch.cat(steps, 1), y, atol=1e-4, rtol=1e-4)


def test_mmmamba_norms_each_head_before_its_gate():
    mixer, x = mamba("mmmamba"), torch.randn(2, LENGTH, DIM)
    z, xbc, dt = mixer.z_proj(x), mixer.in_proj(x), mixer.dt_proj(x)
    columns = F.pad(xbc, (0, 0, 2, 0))
    xbc = F.silu(sum(columns[:, k : k + LENGTH] * mixer.conv1d.weight[:, 0, k] for k in range(3)) + mixer.conv1d.bias)
    values, b, c = mixer._split(xbc)
    dt = F.softplus(dt + mixer.dt_bias)
    state, outputs = torch.zeros(2, HEADS, 4, 4), []
    for t in range(LENGTH):
        state = state * (-dt[:, t] * mixer.A_log.exp()).exp()[..., None, None]
        state = state + dt[:, t, :, None, None] * values[:, t, :, :, None] * b[:, t, :, None]
        outputs.append((state @ c[:, t, :, :, None])[..., 0])
    y = torch.stack(outputs, 1)  # (B, T, H, P)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer.inner(x, layout()), y.flatten(2) * F.silu(z), atol=1e-5, rtol=1e-4)


@every_form
def test_how_a_form_begins(form):
    built = resolve("hybrid_test", mamba_form=form, pattern="M").build()
    for mixer in (block.mixer for block in built.layers):
        conv = mixer.conv1d.weight
        assert (conv[..., -1] == 1).all()
        assert (conv[..., :-1] == 0).all()
        assert (mixer.conv1d.bias == 0).all()
        if form == "mohawk":
            z, _, _ = mixer._project(torch.randn(1, 5, DIM), None)
            torch.testing.assert_close(F.silu(z + mixer.z_bias), torch.ones_like(z))
            assert (mixer.z_bias == OPEN_GATE).all()
            assert (mixer.D == 1).all()
        else:
            assert (mixer.A_log == 1).all()
            assert (mixer.dt_proj.weight == 0).all()
            steps = F.softplus(mixer.dt_bias)
            assert ((steps > 0.9e-3) & (steps < 0.11)).all()
            assert mixer.z_proj.weight.abs().max() <= 2**-2.5 * math.sqrt(6 / (DIM + mixer.shape.inner_dim))


# ---------------------------------------------------------------- mixing matrices


@pytest.mark.parametrize("form", ["mamba2", *FORMS])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_a_matrix_holds_the_outputs_of_impulses(form, kind):
    """Column j of the matrix is what the scan makes of a 1 at j, with B, C and the decays of x."""
    mixer, x = mamba(form, groups=2), torch.randn(2, LENGTH, DIM)
    facts = {"padded": {"mask": padding()}, "packed": {"segments": packed()}}.get(kind, {})
    mask, segments = facts.get("mask"), facts.get("segments")
    matrix = mixer.mixing_matrix(x, layout(**facts))
    _, xbc, dt = mixer._project(x, mask)
    ids = None if segments is None else torch.cat([segments[:, :1].expand(-1, 2), segments], 1)
    _, *bc = mixer._convolve(F.pad(xbc, (0, 0, 2, 0)), ids).split([DIM, 8, 8], dim=-1)
    for j in range(LENGTH):
        impulse = torch.zeros(2, LENGTH, DIM)
        impulse[:, j] = 1
        y, _ = mixer._scan(torch.cat([impulse, *bc], -1), dt, mask, None, segments)
        column = y.unflatten(-1, (HEADS, -1))[..., 0].transpose(1, 2)  # (B, H, T)
        if mask is not None:
            column = column * mask[:, None]
        torch.testing.assert_close(matrix[..., j], column, atol=1e-5, rtol=1e-4)
    assert (matrix.triu(1) == 0).all()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_the_matrix_of_attention_makes_its_heads(window, kind):
    attention = Attention(DIM, HEADS, 2, 4, window=window, bias=True, rope=Rope(4))
    x = torch.randn(2, LENGTH, DIM)
    here = layout(**{"padded": {"mask": padding()}, "packed": {"segments": packed()}}.get(kind, {}))
    matrix = attention.mixing_matrix(x, here)
    v = attention.qkv(x)[..., -2 * 4 :].unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1)
    y = (matrix @ v).transpose(1, 2).flatten(2)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if here.mask is None else here.mask
    torch.testing.assert_close(y[real], attention.inner(x, here)[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix.sum(-1)[:, 0][real], torch.ones(int(real.sum())))


def test_the_matrix_of_a_soft_mask():
    attention = Attention(DIM, HEADS, HEADS, 4, soft_mask=True)
    attention.soft_mask_rate = 0.3
    x, here = torch.randn(2, LENGTH, DIM), Layout(2, LENGTH, torch.device("cpu"))
    v = attention.qkv(x)[..., -DIM:].unflatten(-1, (HEADS, 4)).transpose(1, 2)
    y = (attention.mixing_matrix(x, here) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, attention.inner(x, here), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- seeds


def attention_of(groups=HEADS, bias=False, **changes):
    attention = Attention(DIM, HEADS, groups, 4, bias=bias, **changes)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return attention


def linear_attention(attention, x, feature):
    """The causal matrix of linear attention (B, H, T, T): products of queries and keys, without soft-max."""
    q, k, _ = attention.qkv(x).split([DIM, attention.num_kv_heads * 4, attention.num_kv_heads * 4], dim=-1)
    q, k = (feature(t).unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k))
    return (q @ k.repeat_interleave(HEADS // attention.num_kv_heads, 1).transpose(-1, -2)).tril()


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_seeded_without_forgetting_the_discrete_form_is_linear_attention(groups):
    attention, mixer = attention_of(groups, rope=Rope(4)), Mamba2(DIM, mamba("mohawk").shape)
    seed_mamba2(attention, mixer)
    x = torch.randn(2, LENGTH, DIM)
    x[..., 0] = 1
    with torch.no_grad():
        mixer.in_proj.weight[-HEADS:] = 0
        mixer.in_proj.weight[-HEADS:, 0] = -60  # a -> -inf
        mixer.D.zero_()
    wanted = linear_attention(attention, x, lambda t: t)
    torch.testing.assert_close(mixer.mixing_matrix(x), wanted, atol=1e-4, rtol=1e-5)
    v = attention.qkv(x)[..., -4 * groups :].unflatten(-1, (-1, 4)).transpose(1, 2)
    y = attention.proj((wanted @ v.repeat_interleave(HEADS // groups, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, layout()), y, atol=1e-3, rtol=1e-4)


def test_seeded_without_forgetting_mmmamba_is_linear_attention_behind_silu():
    attention = attention_of(2, bias=True, rope=Rope(4))
    mixer = Mamba2(DIM, Mamba2Shape(**{**vars(mamba("mmmamba").shape), "bias": True}))
    seed_mamba2(attention, mixer)
    with torch.no_grad():
        mixer.A_log.fill_(-40)  # A -> 0
        mixer.dt_bias.fill_(math.log(math.e - 1))  # steps of 1
    x = torch.randn(2, LENGTH, DIM)
    torch.testing.assert_close(mixer.mixing_matrix(x), linear_attention(attention, x, F.silu), atol=1e-4, rtol=1e-5)


def test_a_seed_leaves_what_attention_does_not_have():
    attention, mixer = attention_of(2, bias=True), mamba("mamba2", bias=True)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    seed_mamba2(attention, mixer)
    rows = slice(DIM, 4 * DIM)
    z, bcx, dt = mixer.in_proj.weight[:DIM], mixer.in_proj.weight[rows], mixer.in_proj.weight[4 * DIM :]
    torch.testing.assert_close(torch.cat([z, dt]), before["in_proj.weight"][[*range(DIM), *range(4 * DIM, 68)]])
    q, k, v = attention.qkv.weight.split([16, 8, 8])
    order = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]  # head 0 twice, then head 1 twice
    torch.testing.assert_close(bcx, torch.cat([v[order], k[order], q]))
    torch.testing.assert_close(mixer.out_proj.weight, attention.proj.weight)
    torch.testing.assert_close(mixer.out_proj.bias, attention.proj.bias)
    for name in ("A_log", "dt_bias", "D", "conv1d.weight", "norm.weight"):
        torch.testing.assert_close(dict(mixer.named_parameters())[name], before[name])


def test_what_cannot_be_seeded_is_refused():
    for changes, text in (
        ({"state_dim": 8}, r"heads 4, groups 4, head width 4, state width 4, as attention has, got .* state width 8; "),
        ({"groups": 1}, "write expand=1,mamba_head_dim=4,mamba_groups=4,state_dim=4"),
    ):
        with pytest.raises(ConfigError, match=text):
            seed_mamba2(attention_of(), mamba("mohawk", **changes))
    with pytest.raises(ConfigError, match="projections have biases, so Mamba-2's must too; write mamba_bias=true"):
        seed_mamba2(attention_of(bias=True), mamba("mohawk"))
    with pytest.raises(ConfigError, match="norms of its queries and keys cannot become Mamba-2"):
        seed_mamba2(attention_of(qk_norm=1e-6), mamba("mohawk"))


# ---------------------------------------------------------------- configs


TEACHER = ILLaMAConfig(dim=32, depth=4, num_heads=4, num_kv_heads=2, hidden_dim=48, rope_theta=500.0)
STUDENT = "hybrid_test,dim=32,depth=4,hidden_dim=48,pattern=MMAM"


def test_a_student_that_keeps_all_layers_is_its_teacher():
    for teacher in (TEACHER, TEACHER.replace(window=(0, 3)), TEACHER.replace(proj_bias=False)):
        config = student_config(teacher, f"{STUDENT},pattern=A", "mohawk")
        old, new = teacher.build(), config.build()
        new.load_state_dict(old.state_dict())
        x = torch.randn(2, LENGTH, 32)
        torch.testing.assert_close(new(x), old(x), atol=0, rtol=0)
        assert new_layers(old, new) == []


@every_form
def test_a_name_is_filled_in_from_teacher_and_method(form):
    config = student_config(TEACHER, STUDENT, form)
    assert (config.mamba_form, config.expand, config.mamba_head_dim, config.mamba_groups) == (form, 1, 8, 4)
    assert config.state_dim == (8 if form == "mmmamba" else 4)
    assert config.conv_kernel == (2 if form == "mmmamba" else 4)
    assert config.mamba_bias == (form == "mmmamba")
    assert (config.attention_bias, config.rope_interleaved, config.rope_theta) == (True, True, 500.0)
    teacher, student = TEACHER.build(), config.build()
    assert new_layers(teacher, student) == [0, 1, 3]
    assert [(type(a), type(b)) for a, b in replaced(teacher, student)] == [(Attention, Mamba2)] * 3
    assert student_config(TEACHER, config, form) == config  # as a checkpoint brings it


def test_what_is_typed_wins_over_the_method():
    config = student_config(TEACHER, f"{STUDENT},expand=2,state_dim=6", "mohawk")
    assert (config.expand, config.mamba_head_dim, config.state_dim, config.mamba_form) == (2, 8, 6, "mohawk")
    stock = student_config(TEACHER, f"{STUDENT},mamba_form=mamba2", "mohawk")
    assert (stock.mamba_form, stock.expand, stock.mamba_groups) == ("mamba2", 2, 2)


def test_a_hybrid_teacher_lends_its_mamba_layers_too():
    teacher = resolve("hybrid_test,conv_kernel=3")
    config = student_config(teacher, "hybrid_test,pattern=M", "mohawk")
    assert config == teacher.replace(pattern="M")
    assert new_layers(teacher.build(), config.build()) == [1]
    with pytest.raises(ConfigError, match="layer 0 must be as in the teacher, or Mamba-2 in place of attention, got "):
        new_layers(teacher.build(), config.replace(state_dim=8).build())
    with pytest.raises(ConfigError, match="got Attention for Mamba2"):
        new_layers(teacher.build(), config.replace(pattern="A").build())


def test_students_that_do_not_fit_are_told_what_to_write():
    for student, text in (
        ("hybrid_test", "got dim 16, depth 3, hidden_dim 24; write dim=32,depth=4,hidden_dim=48"),
        (f"{STUDENT},num_heads=2", "got num_heads 2; write num_heads=4"),
        (f"{STUDENT},rope_interleaved=false", "write rope_interleaved=true"),
        ("illama_test", "student: must be a hybrid, such as hybrid_nano,pattern=MMMA, got one of the family illama"),
        (HybridConfig(dim=32, depth=4, hidden_dim=48), "got num_heads 8, num_kv_heads 0, attention_bias False, "),
    ):
        with pytest.raises(ConfigError, match=text):
            student_config(TEACHER, student, "mohawk")
    with pytest.raises(
        ConfigError, match=r"must be built of RMSNorm, attention and SwiGLU.* got one of the family opt"
    ):
        student_config(resolve("opt_test"), "hybrid_test", "mohawk")
    with pytest.raises(ConfigError, match=r"teacher: must be causal.* got causal=false"):
        student_config(TEACHER.encoder(), STUDENT, "mohawk")


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match="mamba_form must be one of mamba2, mohawk, mmmamba, got 'mamba3'"):
        resolve("hybrid_test", mamba_form="mamba3")
    with pytest.raises(ConfigError, match="dt_limit has no meaning with mamba_form 'mohawk'"):
        resolve("hybrid_test", mamba_form="mohawk", dt_limit=(0.0, 1.0))
