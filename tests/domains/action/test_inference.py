"""Policies as functions of what sensors say."""

import numpy as np
import pytest
from made_demonstrations import made_batch, made_items, shaken

from vertebra.backbones.base import create_backbone
from vertebra.domains.action.control import Controller
from vertebra.domains.action.inference import PolicyRunner
from vertebra.domains.action.model import DecoderPolicy
from vertebra.errors import DataError

BSPLINE = "bspline,num_basis=4,degree=2,vocab_size=16"


def made(tokenizer=BSPLINE, **spec):
    items = made_items(tokenizer, **{"history": 2, **spec})
    backbone = create_backbone("illama_test", causal=False)
    return shaken(DecoderPolicy(backbone, items.spec, patch_size=4)), items


def test_chunks_are_the_policy_s():
    model, items = made(f"{BSPLINE},initial=fit", past_action=True, tasks=("reach", "push"), relative=(0, 1, -1))
    batch = made_batch(items)
    runner = PolicyRunner(model.train())  # it is not trained any more
    tasks = [items.spec.tasks[i] for i in batch["tasks"]]
    chunks = runner(batch["states"].numpy(), {}, tasks, batch["start"].numpy())
    assert chunks.shape == (6, 6, 3)
    assert chunks.dtype == np.float32
    np.testing.assert_array_equal(chunks, model.eval().act(batch).numpy())
    np.testing.assert_allclose(chunks[:, 0, :2], batch["start"].numpy()[:, :2], atol=1e-6)
    other = runner(batch["states"].numpy(), {}, tasks[::-1], batch["start"].numpy())
    assert not np.array_equal(other, chunks)
    assert (runner.history, runner.horizon) == (2, 6)


def test_the_first_chunk_begins_at_the_state():
    model, items = made(f"{BSPLINE},initial=fit", past_action=True)
    batch = items.fetch(np.array([0, 12, 24]), 0)  # first steps
    states = batch["states"].numpy()
    chunks = PolicyRunner(model)(states.astype(np.float64), {}, [""] * 3, None)
    np.testing.assert_array_equal(chunks, model.act(batch).numpy())
    np.testing.assert_allclose(chunks[:, 0, :2], states[:, -1, :2], atol=1e-6)


def test_other_rates():
    model, items = made()
    batch = made_batch(items)
    runner = PolicyRunner(model, steps=11)
    assert runner.horizon == 11
    chunks = runner(batch["states"].numpy(), {}, [""] * 6, batch["start"].numpy())
    np.testing.assert_array_equal(chunks, model.act(batch, steps=11).numpy())


def test_the_last_pictures_of_its_cameras_are_seen_in_its_order():
    model, items = made(cameras=("wrist", "top"))
    assert items.spec.image_size == 8
    batch = made_batch(items)
    now = {camera: batch["images"][:, i].numpy() for i, camera in enumerate(("wrist", "top"))}
    images = {camera: np.stack([np.zeros_like(frames), frames], 1) for camera, frames in now.items()}
    images = {"top": images["top"], "other": images["top"][:, :, :2], "wrist": images["wrist"]}
    runner = PolicyRunner(model)
    chunks = runner(batch["states"].numpy(), images, [""] * 6, batch["start"].numpy())
    np.testing.assert_array_equal(chunks, model.act(batch).numpy())
    larger = images | {"top": images["top"].repeat(2, axis=2).repeat(2, axis=3)}
    resized = runner(batch["states"].numpy(), larger, [""] * 6, batch["start"].numpy())
    assert resized.shape == (6, 6, 3)
    with pytest.raises(DataError, match=r"^images: the camera 'wrist' is missing; the policy sees wrist, top\.$"):
        runner(batch["states"].numpy(), {"top": images["top"]}, [""] * 6, None)


def test_unknown_tasks_are_refused():
    model, items = made(tasks=("reach", "push"))
    states = made_batch(items)["states"].numpy()
    with pytest.raises(DataError, match=r"^task: the policy does not know 'fly'; it knows reach, push\.$"):
        PolicyRunner(model)(states[:2], {}, ["reach", "fly"], None)
    untold, _ = made()
    assert PolicyRunner(untold)(states[:2], {}, ["reach", "fly"], None).shape == (2, 6, 3)


def test_a_controller_carries_it_out():
    model, items = made(f"{BSPLINE},initial=fit")
    first, second = (e.states for e in items.episodes[:2])
    controller = Controller(PolicyRunner(model), 2, execute=5)
    said = np.stack([controller.act(np.stack([first[step], second[step]])) for step in range(6)])
    assert said.shape == (6, 2, 3)
    np.testing.assert_allclose(said[0, :, :2], np.stack([first[0], second[0]])[:, :2], atol=1e-6)
    np.testing.assert_allclose(said[5, :, :2], said[4, :, :2], atol=1e-6)  # the next chunk goes on from there
    assert len(controller.timings) == 2
