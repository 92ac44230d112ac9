"""Windows and packed rows: what a slow way finds, what never leaks, and that batches do not matter."""

import dataclasses

import numpy as np
import pytest
import torch
from made_series import made

from vertebra.domains.batching import padding_share
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.domains.timeseries.windows import (
    PackedItems,
    SeriesAugment,
    WindowItems,
    check_form,
    crop,
    pack_crops,
    window_places,
)
from vertebra.errors import ConfigError, DataError

CONTEXT, HORIZON = 8, 3
SPEC = SeriesSpec(context=CONTEXT, horizon=HORIZON)
COVARIATES = {
    "past": ("p0", "p1"),
    "past_center": (0.5, -1.0),
    "past_scale": (2.0, 0.25),
    "known": ("k0",),
    "known_center": (0.1,),
    "known_scale": (3.0,),
}


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


def unequal(count=4, width=1, ahead=HORIZON, **options):
    """Series of unequal length with holes; what they know of the future reaches differently far."""
    return [
        made(f"s{i}", steps=5 + 7 * i, seed=i, width=width, holes=(1, 3 + i), ahead=ahead + 11 * i, **options)
        for i in range(count)
    ]


def everywhere(series, own):
    return window_places(series, own, [0] * len(series), [len(s) for s in series])


def fetch(items, indices, epoch=0):
    return items.fetch(np.array(indices), epoch)


def slow(values, begin, count):
    """Rows ``begin`` to ``begin + count`` of values (T, C) as (C, count), NaN beyond both ends."""
    out = np.full((values.shape[1], count), np.nan)
    for at in range(count):
        if 0 <= begin + at < len(values):
            out[:, at] = values[begin + at]
    return out


def shifted(one, by=1e6):
    return dataclasses.replace(one, values=one.values + by, past=one.past + by, known=one.known + by)


def same(batch, other, rows=slice(None)):
    assert batch.keys() == other.keys()
    for name, values in batch.items():
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(values, other[name][rows], atol=0, rtol=0)
        else:
            assert values == other[name][rows]


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("width", [1, 3])
def test_windows_are_what_a_slow_way_finds(width):
    series = unequal(width=width, past=2, known=1)
    center, scale = (3.0, -2.0, 0.5)[:width], (2.0, 5.0, 0.1)[:width]
    own = spec(**COVARIATES, center=center, scale=scale)
    places = everywhere(series, own)
    items = WindowItems(series, own, places)
    assert len(items.lengths) == len(places) > 20
    assert set(items.lengths) == {CONTEXT}
    batch = fetch(items, range(len(places)))
    assert batch["values"].dtype == batch["target"].dtype == batch["past"].dtype == batch["known"].dtype
    assert batch["values"].dtype == torch.float32
    for row, (number, origin) in enumerate(places):
        one = series[number]
        scaled = (one.values - np.array(center)) / np.array(scale)
        for name, begin, count in (("values", origin - CONTEXT, CONTEXT), ("target", origin, HORIZON)):
            wanted = slow(scaled, begin, count)
            there = batch["observed" if name == "values" else "target_observed"][row].numpy()
            np.testing.assert_array_equal(there, np.isfinite(wanted))
            np.testing.assert_allclose(batch[name][row], np.nan_to_num(wanted), rtol=1e-6, atol=1e-6)
        past = (one.past - np.array(own.past_center)) / np.array(own.past_scale)
        known = (one.known - np.array(own.known_center)) / np.array(own.known_scale)
        for found, wanted in (
            (batch["past"][row], slow(past, origin - CONTEXT, CONTEXT)),
            (batch["known"][row], slow(known, origin - CONTEXT, CONTEXT + HORIZON)),
        ):
            np.testing.assert_allclose(found, np.nan_to_num(wanted), rtol=1e-6, atol=1e-6)
    assert batch["names"] == [series[number].name for number, _ in places]
    assert batch["places"] == [int(origin) for _, origin in places]
    assert batch["index"].tolist() == list(range(len(places)))
    assert set(batch["season"].tolist()) == {24}


def test_a_window_behind_the_end_knows_covariates_alone():
    series = unequal(3, past=1, known=1)
    own = spec(
        past=("p0",), past_center=(0.0,), past_scale=(1.0,), known=("k0",), known_center=(0.0,), known_scale=(1.0,)
    )
    batch = fetch(WindowItems(series, own, np.array([[i, len(s)] for i, s in enumerate(series)])), range(3))
    assert not batch["target_observed"].any()
    assert batch["target"].abs().max() == 0
    for row, one in enumerate(series):
        wanted = one.known[len(one) : len(one) + HORIZON, 0]
        np.testing.assert_allclose(batch["known"][row, 0, CONTEXT:], wanted, rtol=1e-6)


def test_no_window_reads_a_neighbour():
    own = spec(**COVARIATES)
    series = unequal(5, past=2, known=1)
    places = everywhere(series, own)
    batch = fetch(WindowItems(series, own, places), range(len(places)))
    for number, one in enumerate(series):
        mine = np.flatnonzero(places[:, 0] == number)
        others = [s if s is one else shifted(s) for s in series]
        found = fetch(WindowItems(others, own, places), mine)
        same(found, {k: v[mine] if isinstance(v, torch.Tensor) else [v[i] for i in mine] for k, v in batch.items()})


def test_covariates_are_taken_by_name():
    own = spec(**COVARIATES)
    one = made("a", steps=20, past=2, known=1, ahead=HORIZON)
    swapped = dataclasses.replace(
        one,
        past=np.column_stack([one.past[:, 1], np.full(20, 9.0), one.past[:, 0]]),
        past_names=("p1", "more", "p0"),
        known=np.column_stack([np.full(23, 9.0), one.known]),
        known_names=("more", "k0"),
    )
    places = everywhere([one], own)
    wanted = fetch(WindowItems([one], own, places), range(len(places)))
    same(fetch(WindowItems([swapped], own, places), range(len(places))), wanted)


@pytest.mark.parametrize("augment", [None, SeriesAugment(crop=0.5, missing=0.5)])
def test_one_at_a_time_or_together(augment):
    own = spec(**COVARIATES)
    series = unequal(past=2, known=1)
    places = everywhere(series, own)
    items = WindowItems(series, own, places, seed=3, augment=augment)
    together = fetch(items, range(len(places)), epoch=2)
    for i in range(len(places)):
        same(fetch(items, [i], epoch=2), together, slice(i, i + 1))
    back = np.arange(len(places))[::-1].copy()
    assert fetch(items, back, epoch=2)["index"].tolist() == back.tolist()
    torch.testing.assert_close(fetch(items, back, epoch=2)["observed"].flip(0), together["observed"])


def test_seasons_are_those_of_the_series_unless_told():
    series = [made("a", frequency="h"), made("b", frequency="MS"), made("c", start=None)]
    places = np.array([[0, 5], [1, 5], [2, 5]])
    assert fetch(WindowItems(series, SPEC, places), range(3))["season"].tolist() == [24, 12, 1]
    assert fetch(WindowItems(series, spec(season=6), places), range(3))["season"].tolist() == [6, 6, 6]


# ---------------------------------------------------------------- places


def test_etth1_has_as_many_windows_as_the_benchmark():
    one = made("etth1", steps=17420, width=2)
    own = SeriesSpec(context=512, horizon=96)
    test = window_places([one], own, [11520], [14400])
    assert len(test) == 2785
    assert (test[0].tolist(), test[-1].tolist()) == ([0, 11520], [0, 14400 - 96])
    train = window_places([one], own, [0], [8640], full=True)
    assert len(train) == 8640 - 512 - 96 + 1
    assert (train[0, 1], train[-1, 1]) == (512, 8640 - 96)
    assert len(window_places([one], own, [8640], [11520])) == 2785
    assert len(window_places([one], own, [11520], [14400], 96)) == 30


def test_a_series_shorter_than_the_context_has_a_window():
    series = [made("a", steps=4), made("b", steps=3), made("c", steps=CONTEXT + HORIZON), made("d", steps=9)]
    found = window_places(series, SPEC, [0] * 4, [len(s) for s in series], full=True)
    assert found.tolist() == [[0, 1], [2, CONTEXT], [3, 6]]
    batch = fetch(WindowItems(series, SPEC, found), range(3))
    assert batch["observed"].sum(-1).flatten().tolist() == [1, 8, 6]
    assert batch["target_observed"].all()


def test_windows_without_a_known_value_are_left_out():
    one = made("a", steps=60, holes=[*range(10, 30), *range(40, 49)])
    found = everywhere([one], SPEC)[:, 1].tolist()
    known = np.isfinite(one.values[:, 0])
    wanted = [r for r in range(1, 58) if known[max(0, r - CONTEXT) : r].any() and known[r : r + HORIZON].any()]
    assert found == wanted
    assert not {*range(18, 31), 48, 49} & set(found)  # nothing is seen of the context, or nothing comes
    batch = fetch(WindowItems([one], SPEC, everywhere([one], SPEC)), range(len(found)))
    assert batch["observed"].any(-1).all()
    assert batch["target_observed"].any(-1).all()


def test_training_windows_stay_in_their_part():
    series = unequal(5)
    ends = [3 * len(s) // 4 for s in series]
    places = window_places(series, SPEC, [0] * 5, ends, full=True)
    later = [dataclasses.replace(s, values=np.where(np.arange(len(s))[:, None] < e, s.values, 1e9))
             for s, e in zip(series, ends, strict=True)]  # fmt: skip
    assert (window_places(later, SPEC, [0] * 5, ends, full=True) == places).all()
    every = range(len(places))
    same(fetch(WindowItems(later, SPEC, places), every), fetch(WindowItems(series, SPEC, places), every))
    begins = window_places(series, SPEC, ends, [len(s) for s in series])
    assert all(origin >= ends[number] for number, origin in begins)


# ---------------------------------------------------------------- augmentation


def hidden(augment, indices, seed=0, epoch=0, length=64, variates=2, observed=None):
    found = np.ones((len(indices), variates, length), bool) if observed is None else observed.copy()
    augment.hide(found, np.array(indices), seed, epoch)
    return found


def test_what_is_hidden_depends_on_seed_epoch_and_item_alone():
    augment = SeriesAugment(crop=0.5, missing=0.5)
    every = np.arange(300)
    first = hidden(augment, every)
    np.testing.assert_array_equal(hidden(augment, every[::-1])[::-1], first)
    np.testing.assert_array_equal(hidden(augment, [17])[0], first[17])
    assert not (hidden(augment, every, epoch=1) == first).all()
    assert not (hidden(augment, every, seed=1) == first).all()
    assert (first[:, 0] == first[:, 1]).all()  # variates are hidden together
    assert hidden(SeriesAugment(), every).all()


def test_shares_of_what_is_hidden():
    every = np.arange(4000)
    cut = hidden(SeriesAugment(crop=0.25), every)[:, 0]
    touched = ~cut.all(1)
    assert touched.mean() == pytest.approx(0.25, abs=0.03)
    assert (np.diff(cut.astype(int), axis=1) >= 0).all()  # a context that begins later
    lengths = cut[touched].sum(1)
    assert lengths.min() >= 2
    assert np.median(lengths) == pytest.approx(8, abs=1)  # log-uniform up to 64
    some = hidden(SeriesAugment(missing=0.25), every)[:, 0]
    shares = 1 - some.mean(1)
    assert (shares > 0).mean() == pytest.approx(0.25, abs=0.03)
    assert shares.max() < 0.75
    assert shares[shares > 0].mean() == pytest.approx(0.25, abs=0.03)  # uniform up to half of them


def test_two_values_are_left_at_least():
    augment = SeriesAugment(crop=1.0, missing=1.0)
    assert hidden(augment, np.arange(2000)).sum(-1).min() == 2
    sparse = np.zeros((2000, 2, 64), bool)
    sparse[:, 0, :20] = True  # known long ago alone
    sparse[:, 1, 5] = True
    found = hidden(augment, np.arange(2000), observed=sparse)
    assert not (found & ~sparse).any()
    assert found[:, 0].sum(-1).min() == 2
    assert found[:, 1].sum(-1).min() == 1


def test_augmentation_leaves_the_target_alone():
    series = unequal(4)
    places = everywhere(series, SPEC)
    every = range(len(places))
    plain = fetch(WindowItems(series, SPEC, places), every)
    found = fetch(WindowItems(series, SPEC, places, augment=SeriesAugment(crop=1.0, missing=1.0)), every)
    for name in ("target", "target_observed"):
        torch.testing.assert_close(found[name], plain[name])
    assert (found["observed"] <= plain["observed"]).all()
    assert found["observed"].sum() < plain["observed"].sum()
    torch.testing.assert_close(found["values"], plain["values"] * found["observed"])


@pytest.mark.parametrize(("name", "value"), [("crop", 1.5), ("missing", -0.1)])
def test_shares_beyond_0_and_1_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^augment: {name} must be from 0 to 1, got {value}\.$"):
        SeriesAugment(**{name: value})


# ---------------------------------------------------------------- packed rows


def row(steps, seed=0, holes=0.0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=steps).astype(np.float32)
    values[rng.random(steps) < holes] = np.nan
    return values


def test_packing_loses_nothing():
    patch, patches = 4, 6
    crops = [
        (row(4 * n, seed=i, holes=0.1), ahead) for i, (n, ahead) in enumerate([(6, 3), (2, 1), (3, 1), (4, 2), (2, 1)])
    ]
    batch = pack_crops(crops, patch, patches)
    assert batch["values"].shape == (3, 6, 4)
    assert batch["segments"].tolist() == [[0] * 6, [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, -1]]
    assert batch["predicted"].tolist() == [
        [False] * 3 + [True] * 3,
        [False, False, True, True, False, True],
        [False, False, True, False, True, False],
    ]
    found = []
    for values, observed, segments, predicted in zip(*(batch[k].numpy() for k in batch), strict=True):
        for number in range(segments.max() + 1):
            mine = segments == number
            (places,) = mine.nonzero()
            assert (np.diff(places) == 1).all()  # in one piece
            ahead = int(predicted[mine].sum())
            assert predicted[mine].tolist() == [False] * (len(places) - ahead) + [True] * ahead
            found.append((np.where(observed, values, np.nan)[mine].ravel(), ahead))
    key = lambda pair: (len(pair[0]), np.nan_to_num(pair[0]).tolist())  # noqa: E731
    for (values, ahead), (wanted, own) in zip(sorted(found, key=key), sorted(crops, key=key), strict=True):
        np.testing.assert_array_equal(values, wanted)
        assert ahead == own
    padding = batch["segments"] < 0
    assert not batch["observed"][padding].any()
    assert not batch["predicted"][padding].any()
    assert (batch["values"][~batch["observed"]] == 0).all()


def test_rows_end_where_no_crop_reaches():
    batch = pack_crops([(row(8), 1), (row(12), 1)], 4, 100)
    assert batch["values"].shape == (1, 5, 4)
    assert padding_share(batch["segments"]) == 0


def test_bounds_of_crops():
    patch, total = 4, 10
    values = np.arange(patch * total + 3, dtype=np.float32)
    found = [crop(values, patch, 0, 0, i) for i in range(3000)]
    lengths = np.array([len(own) for own, _ in found]) // patch
    assert all(len(own) % patch == 0 and (np.diff(own) == 1).all() for own, _ in found)
    assert set(lengths) == set(range(5, 11))  # half to all of the patches
    shares = np.array([ahead for _, ahead in found]) / lengths
    assert shares.min() >= 0.15 - 0.5 / 5  # a share of whole patches
    assert shares.max() <= 0.5 + 0.5 / 5
    assert shares.mean() == pytest.approx((0.15 + 0.5) / 2, abs=0.02)
    assert {int(own[0]) % patch for own, _ in found} == set(range(4))  # grids begin at any step
    assert max(own[-1] for own, _ in found) == len(values) - 1
    for steps in (8, 11, 12):
        assert all(0 < ahead < len(own) // 4 for own, ahead in (crop(row(steps), 4, 0, 0, i) for i in range(200)))


def test_crops_depend_on_seed_epoch_and_item_alone():
    rows = [row(50 + 40 * i, seed=i) for i in range(6)]
    items = PackedItems(rows, 4, 16)
    every = np.arange(len(items.lengths))
    first = items.fetch(every, 0)
    same(items.fetch(every, 0), first)
    assert not torch.equal(items.fetch(every, 1)["values"][:1], first["values"][:1])
    assert not torch.equal(PackedItems(rows, 4, 16, seed=1).fetch(every, 0)["values"][:1], first["values"][:1])
    still = PackedItems(rows, 4, 16, varied=False)
    same(still.fetch(every, 5), first)
    for i in every:  # a crop is the same alone
        alone = items.fetch(np.array([i]), 0)
        assert alone["values"].shape[0] == 1
        own = alone["values"][0].flatten()
        text = own.numpy().tobytes()
        assert any(text in one.numpy().tobytes() for one in first["values"])


def test_long_series_are_cut_into_pieces():
    values = np.arange(150, dtype=np.float32)
    items = PackedItems([values, np.full(30, np.nan, np.float32), row(7)], 4, 16)
    assert items.lengths.tolist() == [16, 16, 5]
    np.testing.assert_array_equal(np.concatenate(items.pieces), values)


def test_series_without_two_patches_are_refused():
    with pytest.raises(DataError, match=r"^packed rows: no series has two patches of 4 steps; lower data\.patch\.$"):
        PackedItems([row(7), row(3)], 4, 16)


def test_forms_have_names():
    check_form("windows")
    check_form("packed")
    with pytest.raises(ConfigError, match=r"^form must be windows or packed, got 'rows'\.$"):
        check_form("rows")
