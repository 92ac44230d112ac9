"""What a policy sees: which tokens there are, what they depend on, and what is refused."""

import pytest
import torch
from made_demonstrations import made_batch, made_items, shaken

from vertebra.domains.action.observation import CameraEncoder, ObservationEncoder, starts
from vertebra.errors import ConfigError, ShapeError, UnknownNameError

EVERYTHING = {"history": 3, "past_action": True, "tasks": ("reach", "push"), "cameras": ("top", "wrist")}


def made(dim=16, seen=None, **spec):
    items = made_items(**spec)
    return shaken(ObservationEncoder(items.spec, dim, **{"patch_size": 4, **(seen or {})})), made_batch(items)


def changed_tokens(encoder, batch, **changes):
    """Numbers of the tokens that another observation changes."""
    away = (encoder(batch | changes) - encoder(batch)).abs().amax((0, 2))
    return (away > 1e-5).nonzero()[:, 0].tolist()


def unused(encoder, batch):
    encoder.train()(batch).square().sum().backward()
    return [n for n, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


# ---------------------------------------------------------------- tokens


def test_every_token_tells_its_own():
    encoder, batch = made(**EVERYTHING)
    assert encoder(batch).shape == (6, 13, 16)  # 3 states, the action before, the task, and 2 pictures of 4 patches
    assert encoder.plain_tokens == 5
    states = batch["states"]
    earlier = states.clone()
    earlier[:, 0] += 1
    assert changed_tokens(encoder, batch, states=earlier) == [1]
    earlier = states.clone()
    earlier[:, 1] += 1
    assert changed_tokens(encoder, batch, states=earlier) == [2]
    assert changed_tokens(encoder, batch, start=batch["start"] + 1) == [3]
    assert changed_tokens(encoder, batch, tasks=1 - batch["tasks"]) == [4]
    images = batch["images"].clone()
    images[:, 0, :4, 4:] += 50
    assert changed_tokens(encoder, batch, images=images) == [6]
    images = batch["images"].clone()
    images[:, 1, 4:] += 50
    assert changed_tokens(encoder, batch, images=images) == [11, 12]
    assert unused(encoder, batch) == []


def test_earlier_states_and_the_action_before_are_told_relative_to_the_current_state():
    encoder, batch = made(history=2, past_action=True)
    moved = batch["states"] + 0.7
    assert changed_tokens(encoder, batch, states=moved) == [0, 2]
    both = batch["start"] + torch.tensor([0.7, 0.7, 0.0])  # the gripper has no state
    assert changed_tokens(encoder, batch, states=moved, start=both) == [0]


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        ({}, 1),
        ({"past_action": True}, 2),
        ({"history": 4}, 4),
        ({"tasks": ("reach",)}, 2),
        ({"cameras": ("top",)}, 5),
    ],
)
def test_only_what_the_spec_has_is_seen(spec, tokens):
    encoder, batch = made(**spec)
    assert encoder(batch).shape == (6, tokens, 16)
    assert unused(encoder, batch) == []


def test_numbers_are_scaled():
    encoder, batch = made(history=2, past_action=True)
    fed = {}
    for name in ("state", "change", "start"):
        part = getattr(encoder, name)
        part.register_forward_pre_hook(lambda _, args, name=name: fed.update({name: args[0]}))
    encoder(batch)
    spec, states = encoder.spec, batch["states"]
    scale = {name: torch.tensor(getattr(spec, name)) for name in ("state_mean", "state_std", "change_std", "start_std")}
    torch.testing.assert_close(fed["state"][:, 0], (states[:, 1] - scale["state_mean"]) / scale["state_std"])
    torch.testing.assert_close(fed["change"][:, 0], (states[:, 0] - states[:, 1]) / scale["change_std"])
    here = torch.stack([states[:, 1, 0], states[:, 1, 1], torch.zeros(6)], 1)
    torch.testing.assert_close(fed["start"], (batch["start"] - here) / scale["start_std"])
    torch.testing.assert_close(starts(spec, states), here)


def test_noise_is_for_training_alone():
    encoder, batch = made(seen={"noise": 0.5}, history=2, past_action=True, cameras=("top",))
    assert torch.equal(encoder(batch), encoder(batch))
    encoder.train()
    away = (encoder(batch) - encoder(batch)).abs().amax((0, 2))
    assert (away[:3] > 0.01).all()
    assert (away[3:] == 0).all()  # pictures
    quiet, _ = made(history=2)
    assert torch.equal(quiet.train()(batch), quiet(batch))


def test_pictures_alone_are_enough():
    nothing = {"state_names": (), "state_mean": (), "state_std": (), "change_std": (), "positions": (-1,) * 3}
    items = made_items(cameras=("top",), past_action=True)
    spec = type(items.spec)(**{**vars(items.spec), **nothing})
    batch = made_batch(items) | {"states": torch.zeros(6, 1, 0)}
    encoder = ObservationEncoder(spec, 16, patch_size=4)
    assert encoder(batch).shape == (6, 5, 16)
    assert torch.equal(starts(spec, batch["states"]), torch.zeros(6, 3))
    encoder = ObservationEncoder(type(spec)(**{**vars(spec), "past_action": False}), 16, patch_size=4)
    assert encoder(batch).shape == (6, 4, 16)
    assert unused(encoder, batch) == []
    assert encoder.no_weight_decay() == {"camera.positions"}
    with pytest.raises(ConfigError, match=r"^ObservationEncoder: the data has neither states nor cameras; a policy mu"):
        ObservationEncoder(type(spec)(**{**vars(spec), "cameras": ()}), 16)


def test_what_weight_decay_leaves_alone_exists():
    encoder, _ = made(**EVERYTHING)
    assert encoder.no_weight_decay() == {"positions", "task_embed.weight", "camera.positions"}
    encoder, _ = made(seen={"vision": "timm:test_vit"}, cameras=("top",), image_size=32)
    assert encoder.no_weight_decay() >= {"positions", "camera.positions", "camera.model.pos_embed"}
    assert "camera.model.pos_embed" in dict(encoder.named_parameters())


# ---------------------------------------------------------------- pictures by models of timm


@pytest.mark.parametrize(
    ("name", "size", "places"),
    [
        ("test_vit", 32, 5),  # with a class token
        ("test_resnet", 64, 4),  # channels first
        ("test_convnext", 64, 4),  # with a norm that only its classifier uses
        ("swin_tiny_patch4_window7_224,embed_dim=12,depths=[1,1,1,1],num_heads=[1,1,1,1]", 56, 4),  # channels last
    ],
)
def test_features_of_timm_models_are_tokens(name, size, places):
    encoder, batch = made(seen={"vision": f"timm:{name}"}, cameras=("top", "wrist"), image_size=size)
    assert encoder(batch).shape == (6, 1 + 2 * places, 16)
    images = batch["images"].clone()
    images[:, 1] = 255 - images[:, 1]
    assert changed_tokens(encoder, batch, images=images) == list(range(1 + places, 1 + 2 * places))
    torch.manual_seed(0)
    assert unused(encoder, batch | {"images": torch.randint(256, images.shape, dtype=torch.uint8)}) == []


def test_other_forms_of_vision_are_refused():
    spec = made_items(cameras=("top",)).spec
    with pytest.raises(ConfigError, match=r"^vision must be patch or timm:NAME, got 'clip'\.$"):
        CameraEncoder(spec, 16, "clip", 4)
    for size in (3, 0, 16):
        with pytest.raises(ConfigError, match=rf"^patch_size={size} must divide data\.image_size=8\.$"):
            CameraEncoder(spec, 16, "patch", size)
    with pytest.raises(UnknownNameError, match=r"timm model 'resnet0'"):
        CameraEncoder(spec, 16, "timm:resnet0", 4)


# ---------------------------------------------------------------- what is refused


def test_states_of_another_shape_are_refused():
    encoder, batch = made(history=2)
    states = batch["states"]
    for wrong in (states[:, :1], states[:, :, :2], states[:, 0]):
        with pytest.raises(ShapeError, match=r"^states must be \(B, 2, 3\), got \(6, "):
            encoder(batch | {"states": wrong})
    with pytest.raises(ConfigError, match=r"^observation_noise must be at least 0, got -0\.1\.$"):
        made(seen={"noise": -0.1})
