"""The data module of actions: splits, windows, what a spec tells, pictures, and what is refused."""

import dataclasses
import json
import logging
import math

import numpy as np
import pytest
import torch
from made_demonstrations import ACTION_NAMES, SPEC, STATE_NAMES, demonstrations, episode

from vertebra.domains.action.data import (
    ActionAugment,
    ActionData,
    ActionItems,
    check_names,
    even,
    fitted,
    reference_of,
    resized,
    starts_of,
)
from vertebra.domains.action.lerobot_writing import write_lerobot
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.action.tables import ColumnMap, write_csv, write_npz
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.binning import BinningTokenizer
from vertebra.tokenizers.bspline import BSplineTokenizer
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

SMALL = {"horizon": 5, "tokenizer": "bspline,num_basis=4,degree=2", "batch_size": 4}


def saved(folder, *args, **options):
    """Write demonstrations in the LeRobot layout; return the folder."""
    pytest.importorskip("pyarrow", reason="LeRobot needs the extra action")
    write_lerobot(folder, demonstrations(*args, **options))
    return str(folder)


def archives(folder, numbers, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        path = folder / f"episode_{i}.npz"
        write_npz(path, episode(i, **options), state_names=STATE_NAMES, action_names=ACTION_NAMES)
    return str(folder)


def setup(root, stage="", spec=None, **options):
    data = ActionData(root=root, **{**SMALL, **options})
    if spec is not None:
        data.use_spec(spec)
    data.setup(stage)
    return data


def names(data, split):
    try:
        return [each.name for each in data.items(split).episodes]
    except DataError:
        return []


def shares(data):
    """Numbers of the episodes of each split."""
    return {
        split: [int(name.split("_")[1].split(".")[0]) for name in names(data, split)]
        for split in ("train", "val", "test")
    }


def fetch(items, *indices, epoch=0):
    return items.fetch(np.array(indices), epoch)


def items_of(episodes, horizon=3, every=1, seed=0, augment=None, **changes):
    return ActionItems(episodes, ActionSpec(**{"tokenizer": {}, **SPEC, **changes}), horizon, seed, augment, every)


# ---------------------------------------------------------------- windows


def test_before_the_beginning_the_first_observation_is_repeated():
    a, b = episode(0, 6), episode(1, 4)
    items = items_of([a, b], history=3)
    assert len(items.lengths) == 10
    assert set(items.lengths) == {3}
    batch = fetch(items, 0, 1, 5, 6, 9)
    for row, (of, steps) in enumerate([(a, (0, 0, 0)), (a, (0, 0, 1)), (a, (3, 4, 5)), (b, (0, 0, 0)), (b, (1, 2, 3))]):
        np.testing.assert_array_equal(batch["states"][row], of.states[list(steps)])
    assert batch["names"] == ["episode_0", "episode_0", "episode_0", "episode_1", "episode_1"]
    assert batch["places"] == [0, 1, 5, 0, 3]
    assert batch["index"].tolist() == [0, 1, 5, 6, 9]
    assert batch["states"].dtype == batch["actions"].dtype == batch["start"].dtype == torch.float32
    assert not {"tasks", "images"} & batch.keys()


def test_behind_the_end_the_last_action_is_repeated_and_not_real():
    a, b = episode(0, 6), episode(1, 2)
    batch = fetch(items_of([a, b], horizon=3), 3, 4, 5, 6)
    for row, (of, steps) in enumerate([(a, (3, 4, 5)), (a, (4, 5, 5)), (a, (5, 5, 5)), (b, (0, 1, 1))]):
        np.testing.assert_array_equal(batch["actions"][row], of.actions[list(steps)])
    assert batch["real"].tolist() == [[True] * 3, [True, True, False], [True, False, False], [True, True, False]]


def test_chunks_start_at_the_action_before_or_at_the_state():
    a, b = (dataclasses.replace(e, actions=e.actions + 5) for e in (episode(0, 6), episode(1, 4)))
    start = fetch(items_of([a, b]), 0, 1, 5, 6, 7)["start"].numpy()
    np.testing.assert_array_equal(start[0], [*a.states[0, :2], 0])  # the gripper has no state
    np.testing.assert_array_equal(start[1], a.actions[0])
    np.testing.assert_array_equal(start[2], a.actions[4])
    np.testing.assert_array_equal(start[3], [*b.states[0, :2], 0])
    np.testing.assert_array_equal(start[4], b.actions[0])


def test_some_steps_may_be_left_out():
    a, b = episode(0, 6), episode(1, 4)
    items = items_of([a, b], every=4)
    batch = fetch(items, *range(len(items.lengths)))
    assert list(zip(batch["names"], batch["places"], strict=True)) == [
        ("episode_0", 0), ("episode_0", 4), ("episode_1", 0),
    ]  # fmt: skip
    np.testing.assert_array_equal(batch["start"][1], a.actions[3])
    np.testing.assert_array_equal(batch["actions"][1], a.actions[[4, 5, 5]])


def test_tasks_are_numbers():
    items = items_of([episode(0, 2, task="lift"), episode(1, 1, task="drop")], tasks=("drop", "lift"))
    assert fetch(items, 0, 1, 2)["tasks"].tolist() == [1, 1, 0]


# ---------------------------------------------------------------- pictures


def test_pictures_are_those_of_the_step():
    a, b = (episode(i, 4, cameras=("top", "wrist", "other"), size=8) for i in range(2))
    items = items_of([a, b], cameras=("wrist", "top"), image_size=8)
    images = fetch(items, 2, 5)["images"]
    assert images.shape == (2, 2, 8, 8, 3)
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images[0, 0], a.images["wrist"][2])
    np.testing.assert_array_equal(images[1, 1], b.images["top"][1])


def test_shifts_depend_on_seed_epoch_and_item_alone():
    made = [episode(i, 30, cameras=("top", "wrist"), size=8) for i in range(2)]
    options = {"cameras": ("top", "wrist"), "image_size": 8}
    items = items_of(made, augment=ActionAugment(shift=2), **options)
    every = np.arange(60)
    first = items.fetch(every, 0)["images"]
    torch.testing.assert_close(items.fetch(every[::-1].copy(), 0)["images"].flip(0), first)
    torch.testing.assert_close(fetch(items, 7)["images"][0], first[7])
    assert not torch.equal(items.fetch(every, 1)["images"], first)
    other = items_of(made, seed=1, augment=ActionAugment(shift=2), **options)
    assert not torch.equal(other.fetch(every, 0)["images"], first)
    plain = items_of(made, **options).fetch(every, 0)["images"].numpy()
    moves = set()
    for moved, image in zip(first.numpy(), plain, strict=True):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if all((moved[c] == shifted(image[c], down, right)).all() for c in range(2))  # both cameras alike
        ]
        assert len(found) == 1
        moves.update(found)
    assert len(moves) > 15
    assert {down for down, _ in moves} == {right for _, right in moves} == set(range(-2, 3))


def shifted(image, down, right):
    rows = np.clip(np.arange(8) + down, 0, 7)
    return image[rows][:, np.clip(np.arange(8) + right, 0, 7)]


def test_the_middle_of_a_picture_is_kept():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, 5:15] = 200
    assert (resized(image, 5) == 200).all()
    assert (resized(image.swapaxes(0, 1), 4) == 200).all()
    assert resized(image, 5).shape == (5, 5, 3)
    square = episode(0, 1, cameras=("top",)).images["top"][0]
    assert resized(square, 8) is square


def test_training_alone_is_augmented(tmp_path):
    root = archives(tmp_path, range(4), cameras=("top",))
    data = setup(
        root, cameras=["top"], image_size=8, augment=ActionAugment(shift=3), every=5, val_fraction=0.25, test_fraction=0
    )
    assert data.items("train").augment == ActionAugment(shift=3)
    assert data.items("val").augment is None
    assert [len(data.items(s).lengths) for s in ("train", "val")] == [3 * len(range(0, 12, 5)), 12]
    index = 2  # step 10 of the first episode
    kept = data.items("train").episodes[0].images["top"][10]
    draws = [fetch(data.items("train"), index, epoch=e)["images"][0, 0].numpy() for e in range(8)]
    assert any((draw != kept).any() for draw in draws)
    with pytest.raises(ConfigError, match=r"^augment: shift must be at least 0, got -1\.$"):
        ActionAugment(shift=-1)


def test_few_episodes_leave_one_for_validation_and_one_for_testing(tmp_path):
    data = setup(archives(tmp_path, range(3)))
    assert [len(data.items(s).episodes) for s in ("train", "val", "test")] == [1, 1, 1]
    with pytest.raises(DataError, match=r"no test data; give data\.test"):
        setup(archives(tmp_path / "two", range(2))).items("test")


def test_pictures_of_a_lerobot_set(tmp_path):
    data = setup(saved(tmp_path / "a", 3, cameras=("top",)), "fit", cameras=["top"], image_size=4, val_fraction=0)
    batch = fetch(data.items("train"), 13)
    assert batch["images"].shape == (1, 1, 4, 4, 3)
    np.testing.assert_array_equal(batch["images"][0, 0], resized(episode(1, cameras=("top",)).images["top"][1], 4))
    assert data.spec.cameras == ("top",)
    assert data.spec.image_size == 4


# ---------------------------------------------------------------- splits


def test_splits_by_ranges(tmp_path):
    root = archives(tmp_path, range(8))
    assert shares(setup(root, val_episodes="5:6", test_episodes="6:")) == {
        "train": [0, 1, 2, 3, 4], "val": [5], "test": [6, 7],
    }  # fmt: skip
    assert shares(setup(root, val_episodes=":2", test_episodes=" 7 : 8 "))["train"] == [2, 3, 4, 5, 6]
    drawn = shares(setup(root, val_episodes="2:4", test_fraction=0.5))
    assert drawn["val"] == [2, 3]
    assert len(drawn["test"]) == 4
    assert sorted(n for numbers in drawn.values() for n in numbers) == list(range(8))


def test_splits_as_the_files_say(tmp_path):
    splits = {"train": (0, 1, 2), "val": (3, 4), "test": (5,)}
    root = saved(tmp_path / "a", 6, splits=splits)
    assert shares(setup(root)) == {k: list(v) for k, v in splits.items()}
    assert shares(setup(root, test_episodes="2:4")) == {"train": [0, 1], "val": [4], "test": [2, 3]}
    other = archives(tmp_path / "other", [7])
    assert shares(setup(root, test=other)) == {"train": [0, 1, 2], "val": [3, 4], "test": [7]}
    root = saved(tmp_path / "b", 6, splits={"train": (0, 1, 2, 3), "test": (4, 5)})
    found = shares(setup(root, val_fraction=0.3))
    assert found["test"] == [4, 5]
    assert len(found["val"]) == 2
    assert sorted(found["train"] + found["val"]) == [0, 1, 2, 3]


def test_splits_are_drawn(tmp_path):
    root = archives(tmp_path, range(12), steps=3)
    options = {"val_fraction": 0.25, "test_fraction": 0.25}
    found = shares(setup(root, **options))
    assert [len(found[split]) for split in ("train", "val", "test")] == [6, 3, 3]
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(12))
    assert shares(setup(root, **options)) == found
    assert shares(setup(root, seed=1, **options)) != found
    whole = setup(root, val_fraction=0, test_fraction=0)
    assert shares(whole) == {"train": list(range(12)), "val": [], "test": []}
    assert whole.val_dataloader() == []


def test_files_of_their_own(tmp_path):
    parts = {split: archives(tmp_path / split, numbers) for split, numbers in (("a", [0, 1]), ("b", [2]), ("c", [3]))}
    found = setup([parts["a"]], val=parts["b"], test=[parts["c"]], val_fraction=0.4, test_fraction=0.4)
    assert shares(found) == {"train": [0, 1], "val": [2], "test": [3]}


def test_parts_of_an_episode_stay_in_one_split(tmp_path):
    for i in range(6):
        made = episode(i, 30)
        times = made.times + 2.0 * (np.arange(30) // 6)  # five parts
        columns = {"state_names": STATE_NAMES, "action_names": ACTION_NAMES}
        write_npz(tmp_path / f"episode_{i}.npz", dataclasses.replace(made, times=times), **columns)
    found = shares(setup(str(tmp_path), val_fraction=0.3, test_fraction=0.3))
    assert {split: len(numbers) for split, numbers in found.items()} == {"train": 10, "val": 10, "test": 10}
    assert not set(found["train"]) & set(found["val"])
    assert not set(found["test"]) & {*found["train"], *found["val"]}
    assert shares(setup(str(tmp_path), val_episodes="1:2", test_episodes="5:"))["val"] == [1] * 5


def test_numbers_of_splits_are_right_behind_a_cut():
    sets = demonstrations(3, splits={"train": (0, 2), "val": (1,)})
    first, second, third = sets.episodes
    cut = dataclasses.replace(first, times=first.times + 5.0 * (np.arange(12) >= 6))
    found, notes = even(dataclasses.replace(sets, episodes=(cut, second, third)))
    assert [each.name for each in found.episodes] == ["episode_0.0", "episode_0.1", "episode_1", "episode_2"]
    assert found.splits == {"train": (0, 1, 3), "val": (2,)}
    assert [note.rule for note in notes] == ["1 gaps are longer than 0.5 s"]


def test_what_was_mended_is_told(tmp_path, caplog):
    made = episode(0)
    times = made.times.copy()
    times[5] = times[4]
    write_npz(tmp_path / "a.npz", dataclasses.replace(made, times=times))
    write_npz(tmp_path / "b.npz", made)
    with caplog.at_level(logging.WARNING, logger="vertebra"):
        data = setup(str(tmp_path), val_fraction=0, test_fraction=0)
    assert "a: 1 frames repeat an earlier time stamp; they are left out." in caplog.text
    assert "1 frames are missing; they are put in between their neighbours." in caplog.text
    assert len(data.left_out) == 2
    assert len(data.items("train").lengths) == 24


def test_splits_that_are_missing_are_told(tmp_path):
    data = setup(archives(tmp_path, range(2)), val_fraction=0, test_fraction=0)
    with pytest.raises(
        DataError,
        match=r"^ActionData: no val data; give data\.val, data\.val_episodes such as 50:60, or a data\.val_fraction",
    ):
        data.items("val")
    with pytest.raises(DataError, match=r"no predict data; give data\.predict, files to predict chunks for\.$"):
        data.items("predict")


# ---------------------------------------------------------------- the spec


def test_what_the_spec_tells(tmp_path):
    root = archives(tmp_path, range(3))
    data = setup(root, history=3, past_action=True, val_fraction=0, test_fraction=0)
    spec, states = data.spec, np.concatenate([episode(i).states for i in range(3)])
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.state_names, spec.action_names, spec.fps, spec.history) == (STATE_NAMES, ACTION_NAMES, 10.0, 3)
    assert (spec.positions, spec.relative) == ((0, 1, -1), (-1, -1, -1))
    assert (spec.past_action, spec.cameras, spec.tasks) == (True, (), ())
    np.testing.assert_allclose(spec.state_mean, states.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spec.state_std, states.std(0), rtol=1e-5)
    changes = np.concatenate([e.states[2:] - e.states[:-2] for e in (episode(i) for i in range(3))])
    np.testing.assert_allclose(spec.change_std, np.sqrt((changes**2).mean(0)), rtol=1e-4)
    away = np.concatenate([e.actions[:-1] - starts_of(spec, e.states[1:]) for e in (episode(i) for i in range(3))])
    expected = np.sqrt((away**2).mean(0))
    assert (expected[:2] < 1e-6).all()  # an action is where the next state is
    np.testing.assert_allclose(spec.start_std, [1, 1, expected[2]], rtol=1e-5)
    tokenizer = tokenizer_from_dict(spec.tokenizer)
    assert isinstance(tokenizer, BSplineTokenizer)
    assert (tokenizer.horizon, tokenizer.dims, tokenizer.grippers, tokenizer.num_basis) == (5, 3, (2,), 4)
    assert tokenizer.is_fitted


def test_what_does_not_move_has_scale_one(tmp_path):
    made = episode(0, 4)
    write_npz(tmp_path / "a.npz", dataclasses.replace(made, states=np.full((4, 2), 7.0, np.float32)))
    spec = setup(str(tmp_path), val_fraction=0, test_fraction=0).spec
    assert spec.state_mean == (7, 7)
    assert spec.state_std == spec.change_std == (1, 1)
    one = setup(archives(tmp_path / "b", [0], steps=1), val_fraction=0, test_fraction=0, history=4, fps=10.0).spec
    assert one.change_std == one.start_std == (1, 1, 1)  # nothing to learn them from


def test_columns_are_named(tmp_path):
    root = archives(tmp_path, range(2))
    options = {"val_fraction": 0, "test_fraction": 0}
    tokenizer = setup(root, grippers=["x", "1"], angles=["gripper"], **options).spec.tokenizer
    assert (tokenizer["grippers"], tokenizer["angles"]) == ([0, 1], [2])
    assert setup(root, grippers=[], **options).spec.tokenizer["grippers"] == []
    assert setup(root, relative="all", **options).spec.relative == (0, 1, -1)
    assert setup(root, relative="all", angles=["y"], **options).spec.relative == (0, -1, -1)
    assert setup(root, relative=["y"], **options).spec.relative == (-1, 1, -1)
    with pytest.raises(ConfigError, match=r"^data\.relative: gripper has no state of the same name; states: x, y, spe"):
        setup(root, relative=["gripper"], **options)
    with pytest.raises(ConfigError, match=r"^data\.relative: y is an angle or part of a quaternion; leave it out\.$"):
        setup(root, relative=["x", "y"], angles=["y"], **options)
    with pytest.raises(ConfigError, match=r"^data\.grippers: no column 'hand'; columns: x, y, gripper \(or 0 to 2\)"):
        setup(root, grippers=["hand"], **options)


def test_other_columns_and_formats(tmp_path):
    write_csv(tmp_path / "a.csv", [episode(0), episode(1)], state_names=STATE_NAMES, action_names=ACTION_NAMES)
    header = (tmp_path / "a.csv").read_text().splitlines()[0].split(",")
    wanted = [name for name in header if name.endswith(".x")]
    data = setup(
        str(tmp_path / "a.csv"), columns=ColumnMap(state=(wanted[0],)), val_fraction=0, test_fraction=0, fps=10.0
    )
    assert len(data.spec.state_names) == 1
    np.testing.assert_allclose(data.items("train").states[:12, 0], episode(0).states[:, 0], rtol=1e-5)


def test_chunks_are_fitted_relative_and_from_their_start(tmp_path):
    root = archives(tmp_path, range(2))
    data = setup(root, relative="all", tokenizer="binning", val_fraction=0, test_fraction=0)
    tokenizer = tokenizer_from_dict(data.spec.tokenizer)
    whole = fetch(data.items("train"), *range(24))
    own = whole["actions"] - torch.from_numpy(reference_of(data.spec, whole["states"][:, -1].numpy()))[:, None]
    assert BinningTokenizer(horizon=5, dims=3, grippers=[2]).fit(own) == tokenizer
    assert tokenizer.high[0] < 0.06  # five steps of a hundredth, wherever x is
    data = setup(root, tokenizer="bspline,num_basis=4,degree=2,initial=fit", val_fraction=0, test_fraction=0)
    whole = fetch(data.items("train"), *range(24))
    fresh = BSplineTokenizer(5, 3, num_basis=4, degree=2, initial="fit", grippers=[2])
    assert tokenizer_from_dict(data.spec.tokenizer) == fresh.fit(whole["actions"], whole["start"])


def test_bounds_are_those_of_the_quantiles(tmp_path):
    options = {"root": archives(tmp_path, range(2)), "tokenizer": "binning", "val_fraction": 0, "test_fraction": 0}
    whole, most = setup(quantiles=(0.0, 1.0), **options).spec.tokenizer, setup(**options).spec.tokenizer
    assert (whole["low"][0], whole["high"][0]) == pytest.approx((0.01, 1.12))
    assert most["low"][0] > whole["low"][0]
    with pytest.raises(ConfigError, match=r"^fit: quantiles must be two numbers from 0 to 1, the lower first, got"):
        setup(quantiles=(0.5, 0.1), **options)


def test_many_chunks_are_thinned_out(monkeypatch):
    monkeypatch.setattr("vertebra.domains.action.data._FITTED", 10)
    items = items_of([episode(0, 30), episode(1, 5)], horizon=2)
    seen = []

    class Seen(BinningTokenizer):
        def fit(self, chunks, start=None, *, quantiles):
            seen.append(chunks)
            assert start is None
            return super().fit(chunks, quantiles=quantiles)

    found = fitted(Seen(horizon=2, dims=3), items.episodes, items.spec, (0.0, 1.0))
    assert found.low[0] == pytest.approx(0.01)
    assert found.high[0] == pytest.approx(1.05)
    np.testing.assert_allclose(
        seen[0][:, 0, 0], [0.01, 0.05, 0.09, 0.13, 0.17, 0.21, 0.25, 0.29, 1.01, 1.05], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (
            "bspline,num_basis=4,degree=2,initial=fit,velocity=true",
            "velocity is for tokens alone; policies enforce the",
        ),
        ("bspline,num_basis=4,degree=2,initial=fit", "an enforced first position needs a state of the same name for "),
        ("bspline,num_basis=4,degree=2,initial=overwrite", r"every action but grippers, and y has none; use initial="),
    ],
)
def test_starts_that_cannot_be_are_refused(tmp_path, tokenizer, text):
    made = episode(0)
    write_npz(tmp_path / "a.npz", made, state_names=("x", "z", "speed"), action_names=ACTION_NAMES)
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer: .*{text}"):
        setup(str(tmp_path), tokenizer=tokenizer, val_fraction=0, test_fraction=0)
    setup(str(tmp_path), tokenizer="bspline,num_basis=4,degree=2", val_fraction=0, test_fraction=0)


# ---------------------------------------------------------------- tasks, and models that exist already


def test_tasks_are_those_of_training(tmp_path):
    root = archives(tmp_path / "a", [0, 2], task="lift")
    archives(tmp_path / "a", [1], task="drop")
    options = {"tell_task": True, "test_fraction": 0}
    data = setup(root, val_fraction=0, **options)
    assert data.spec.tasks == ("lift", "drop")
    assert fetch(data.items("train"), 0, 12, 24)["tasks"].tolist() == [0, 1, 0]
    assert setup(root, tell_task=False).spec.tasks == ()
    text = r"^the model was not trained on the task 'drop'; tasks: lift\.$"
    with pytest.raises(DataError, match=text):
        setup(root, val_episodes="1:2", **options)
    with pytest.raises(DataError, match=text):
        setup(
            archives(tmp_path / "b", [0, 1], task="lift"),
            val=archives(tmp_path / "c", [2], task="drop"),
            val_fraction=0,
            **options,
        )


def test_validation_must_be_of_the_same_robot(tmp_path):
    root = archives(tmp_path / "a", range(2))
    other = tmp_path / "b.npz"
    write_npz(other, episode(0), state_names=("x", "z", "speed"), action_names=ACTION_NAMES)
    with pytest.raises(
        DataError,
        match=r"^the model has 3 state_names \(x, y, speed, \.\.\.\), the data 3 \(with z\); give data of the",
    ):
        setup(root, val=str(other))
    with pytest.raises(DataError, match=r"^the model acts at 10 steps a second, the data has 5; resample it\.$"):
        setup(root, val=archives(tmp_path / "c", [5], fps=5.0))


def test_a_model_is_only_given_what_it_knows():
    sets = demonstrations(2)
    spec = items_of(sets.episodes, tasks=("reach",)).spec
    check_names(spec, sets)
    check_names(spec, dataclasses.replace(sets, fps=10.05))
    for changes, text in (
        ({"fps": 12.0}, r"acts at 10 steps a second, the data has 12; resample it\.$"),
        (
            {"action_names": ("x", "y")},
            r"has 3 action_names \(x, y, gripper, \.\.\.\), the data 2 \(with another order\)",
        ),
        ({"action_names": ("y", "x", "gripper")}, r"the data 3 \(with another order\)"),
        (
            {"action_names": ("x", "y", "hand")},
            r"the data 3 \(with hand\); give data of the same robot, or its columns",
        ),
        ({"episodes": (episode(0, task="push"),)}, r"^the model was not trained on the task 'push'; tasks: reach\.$"),
    ):
        with pytest.raises(DataError, match=text):
            check_names(spec, dataclasses.replace(sets, **changes))


def test_a_model_s_spec_holds(tmp_path):
    root = archives(tmp_path / "a", range(4))
    spec = setup(root, relative="all", history=2).spec
    again = setup(root, "test", spec, horizon=9, history=1, test_episodes="3:", tokenizer="binning")
    assert again.spec is spec
    batch = fetch(again.items("test"), 0)
    assert batch["actions"].shape == (1, 5, 3)
    assert batch["states"].shape == (1, 2, 3)
    other = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9)
    with pytest.raises(ConfigError, match=r"^ActionData: the model is for dna, not for actions\.$"):
        setup(root, "fit", other)


def test_predicting_reads_no_training_files(tmp_path):
    spec = setup(archives(tmp_path / "a", range(3)), val_fraction=0, test_fraction=0).spec
    own = archives(tmp_path / "b", [8, 9])
    data = setup(str(tmp_path / "gone"), "predict", spec, predict=own, every=3)
    assert names(data, "predict") == ["episode_8", "episode_9"]
    assert [len(batch["index"]) for batch in data.predict_dataloader()] == [4] * 6
    write_npz(tmp_path / "c.npz", episode(0), state_names=("x", "z", "speed"), action_names=ACTION_NAMES)
    with pytest.raises(DataError, match=r"the data 3 \(with z\)"):
        setup(str(tmp_path / "gone"), "predict", spec, predict=str(tmp_path / "c.npz"))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"val_fraction": -0.1},
            r"val_fraction and test_fraction must be from 0 and below 1 together, got -0\.1 and 0\.1",
        ),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"below 1 together, got 0\.5 and 0\.5\."),
        ({"horizon": 0}, r"^ActionData: horizon must be at least 1, got 0\."),
        ({"history": 0}, r"^ActionData: history must be at least 1, got 0\."),
        ({"every": 0}, r"^ActionData: every must be at least 1, got 0\."),
        ({"image_size": 0}, r"^ActionData: image_size must be at least 1, got 0\."),
        ({"val_episodes": "5"}, r"^ActionData: a range of episodes must be like 50:60, got '5'\."),
        ({"test_episodes": "a:b"}, r"^ActionData: a range of episodes must be like 50:60, got 'a:b'\."),
        ({"test_episodes": "-2:"}, r"^ActionData: a range of episodes must be like 50:60, got '-2:'\."),
        ({"relative": "some"}, r"^ActionData: relative must be none, all or a list of columns, got 'some'\."),
        ({"batch_size": 0}, r"^data: batch_size must be at least 1, got 0\."),
    ],
)
def test_settings_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        ActionData(root="a", **options)


def test_ranges_that_cannot_be_are_refused(tmp_path):
    root = archives(tmp_path, range(3))
    with pytest.raises(DataError, match=r"^ActionData: val_episodes holds none of the 3 episodes; correct it\.$"):
        setup(root, val_episodes="3:5")
    with pytest.raises(
        ConfigError, match=r"^ActionData: val_episodes and test_episodes must differ, and both hold 1\.$"
    ):
        setup(root, val_episodes="0:2", test_episodes="1:")
    with pytest.raises(
        DataError, match=r"^ActionData: no episode of 3 is left for training; leave fewer for val and test\.$"
    ):
        setup(root, val_episodes="0:1", test_episodes="1:3")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fps": 0}, r"^ActionSpec: fps must be above 0 and history at least 1, got 0, 1\.$"),
        ({"fps": math.nan}, r"^ActionSpec: fps must be above 0"),
        ({"history": 0}, r"history at least 1, got 10\.0, 0\.$"),
        ({"state_std": (1.0,)}, r"^ActionSpec: state_std must have one number for each of state_names\.$"),
        ({"start_std": ()}, r"^ActionSpec: start_std must have one number for each of action_names\.$"),
        ({"positions": (0, 1)}, r"^ActionSpec: positions must have one number for each of action_names\.$"),
        ({"relative": (0, 1, 3)}, r"^ActionSpec: relative must name columns of the state, or be -1\.$"),
        ({"positions": (0, 1, -2)}, r"^ActionSpec: positions must name columns of the state, or be -1\.$"),
    ],
)
def test_specs_that_cannot_be_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        items_of([episode(0)], **changes)
