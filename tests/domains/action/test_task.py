"""The task of policies: training, metrics, files, checkpoints, rows of predictions, and what is refused."""

import csv
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from made_demonstrations import ACTION_NAMES, STATE_NAMES, demonstrations, episode

from vertebra.domains.action.data import ActionData
from vertebra.domains.action.lerobot_writing import write_lerobot
from vertebra.domains.action.model import CVAEPolicy, DecoderPolicy, EncoderDecoderPolicy
from vertebra.domains.action.tables import write_npz
from vertebra.domains.action.task import ActionPolicyTask, hold
from vertebra.domains.base import PredictionWriter, load_task
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the average of the weights is
LOGGED = ("loss", "reconstruct_mse", "rmse", "hold_rmse")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    for i in range(6):
        write_npz(folder / f"{i}.npz", episode(i), state_names=STATE_NAMES, action_names=ACTION_NAMES)
    return folder


def data(root, **options):
    return ActionData(
        **{
            "root": str(root),
            "val_episodes": "4:5",
            "test_episodes": "5:6",
            "horizon": 4,
            "tokenizer": "bspline,num_basis=3,degree=2,vocab_size=16",
            "batch_size": 16,
            **options,
        }
    )


def task(backbone="illama_test,causal=false", **options):
    return ActionPolicyTask(backbone, **options)


def trainer(folder, **options):
    settings = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "logger": False,
        "accelerator": "cpu",
        **options,
    }
    return Trainer(default_root_dir=folder, enable_model_summary=False, **settings)


def built(root, policy=None, **options):
    """A task in evaluation mode, its data and the items of the test episode."""
    made, demos = task(**(policy or {})), data(root, **options)
    demos.setup("")
    made.build(demos.spec)
    items = demos.items("test")
    return made.eval(), demos, items.fetch(np.arange(len(items.steps)), 0)


def rows(path):
    with path.open() as f:
        return list(csv.DictReader(f))


# ---------------------------------------------------------------- training and testing


def test_fit_test_and_what_is_left(root, tmp_path):
    made, demos = task(ema=0.5, policy="encoder-decoder", heads=2, grouped=True), data(root)
    fit = trainer(tmp_path)
    fit.fit(made, demos)
    assert fit.global_step == 3
    wanted = {f"val/{n}" for n in (*LOGGED, "token_pred_acc")} | {"train/loss", "train/token_pred_acc"}
    assert set(fit.callback_metrics) >= wanted
    (found,) = fit.test(made, demos, verbose=False)
    assert set(found) == {f"test/{n}" for n in (*LOGGED, "token_pred_acc")}
    assert all(math.isfinite(value) for value in found.values())
    assert found["test/rmse"] == pytest.approx(math.sqrt(found["test/reconstruct_mse"]))

    assert made.write_results(tmp_path) == ["joints.csv", "horizon.csv"]
    joints, horizon = rows(tmp_path / "joints.csv"), rows(tmp_path / "horizon.csv")
    assert [row["action"] for row in joints] == list(ACTION_NAMES)
    assert [row["seconds"] for row in horizon] == ["0.1", "0.2", "0.3", "0.4"]
    for column, name in (("rmse", "test/rmse"), ("hold_rmse", "test/hold_rmse")):
        squares = [float(row[column]) ** 2 for row in joints]
        assert math.sqrt(sum(squares) / 3) == pytest.approx(found[name], rel=1e-4)
        weighed = sum(float(row[column]) ** 2 * (12 - i) for i, row in enumerate(horizon))  # 12 - i chunks have step i
        assert math.sqrt(weighed / (12 + 11 + 10 + 9)) == pytest.approx(found[name], rel=1e-4)

    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    assert isinstance(again.model, EncoderDecoderPolicy)
    assert again.final_model is again.ema.module
    assert not torch.equal(made.model.queries.embed, made.final_model.queries.embed)
    batch = demos.items("test").fetch(np.arange(5), 0)
    for model in ("model", "final_model"):
        own = getattr(made.eval(), model)
        torch.testing.assert_close(getattr(again, model).act(batch), own.act(batch), atol=0, rtol=0)
    loaded = load_model(save_model(made.final_model, tmp_path / "model", metrics=found))
    torch.testing.assert_close(loaded.act(batch), made.final_model.act(batch), atol=0, rtol=0)
    (repeated,) = trainer(tmp_path).test(again, data(root), verbose=False)
    assert repeated == pytest.approx(found)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"policy": "cvae", "latent": 2}, {"l1", "kl"}),
        ({"policy": "cvae", "latent": 0, "regression": "l2"}, {"l2", "kl"}),
        ({"backbone": "illama_test", "decoding": "autoregressive"}, {"token_pred_acc"}),
    ],
)
def test_other_policies_are_fitted(root, tmp_path, options, names):
    made, demos = task(**options), data(root)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(made, demos)
    (found,) = fit.test(made, demos, verbose=False)
    assert set(found) == {f"test/{name}" for name in {*LOGGED, *names}}
    assert all(math.isfinite(value) for value in found.values())


def test_a_policy_that_sees_is_fitted(tmp_path):
    pytest.importorskip("pyarrow", reason="LeRobot needs the extra action")
    splits = {"train": (0, 1), "val": (2,), "test": (3,)}
    write_lerobot(tmp_path / "set", demonstrations(4, cameras=("top",), tasks=("reach", "push"), splits=splits))
    made = task(patch_size=4)
    demos = data(tmp_path / "set", val_episodes=None, test_episodes=None, cameras=["top"], image_size=8, tell_task=True)
    trainer(tmp_path, max_steps=1).fit(made, demos)
    assert made.spec.tasks == ("reach", "push")
    assert made.model.observe.camera is not None


# ---------------------------------------------------------------- metrics


def test_metrics_are_means_over_what_is_real(root):
    made, _, batch = built(root)
    metrics = made.metrics_of("test")
    parts = [slice(0, 5), slice(5, 12)]
    for part in parts:
        made.evaluate(metrics, {k: v[part] for k, v in batch.items()})
    found = made.summarise(metrics)
    away, real = made.model.act(batch) - batch["actions"], batch["real"]
    torch.testing.assert_close(found["reconstruct_mse"], (away[real] ** 2).mean())
    losses = [made.model.losses({k: v[part] for k, v in batch.items()}) for part in parts]
    for name in ("loss", "token_pred_acc"):
        torch.testing.assert_close(found[name], (5 * losses[0][name] + 7 * losses[1][name]) / 12)


def test_holding_is_by_hand(root):
    made, _, batch = built(root)
    own = episode(5)
    squares, count = np.zeros(3), 0
    for step in range(12):
        held = [*own.states[step, :2], own.actions[step - 1, 2] if step else 0.0]
        for i in range(step, min(step + 4, 12)):
            squares += (own.actions[i] - held) ** 2
            count += 1
    metrics = made.metrics_of("test")
    made.evaluate(metrics, batch)
    found = made.summarise(metrics)["hold_rmse"]
    assert found == pytest.approx(math.sqrt(squares.sum() / count / 3), rel=1e-5)
    by_hand = torch.tensor(np.sqrt(squares / count))
    torch.testing.assert_close(metrics["hold"].by_dimension(), by_hand, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hold(made.model.spec, batch)[3], torch.tensor([*own.states[3, :2], own.actions[2, 2]]))


def test_turns_are_no_errors(root):
    made, _, batch = built(root, angles=["x"])
    metrics = made.metrics_of("val")
    made.model.act = lambda batch: batch["actions"] + torch.tensor([2 * math.pi, 0, 0])
    made.evaluate(metrics, batch)
    assert made.summarise(metrics)["rmse"] < 1e-5


def test_the_average_is_what_is_evaluated(root):
    made, _, batch = built(root, {"ema": 0.9})
    with torch.no_grad():
        made.model.queries.head.bias.add_(torch.randn(16))
    metrics = made.metrics_of("test")
    made.evaluate(metrics, batch)
    expected = made.final_model.losses(batch)["loss"]
    torch.testing.assert_close(made.summarise(metrics)["loss"], expected)
    assert made.model.losses(batch)["loss"] != expected


def test_nothing_is_written_without_a_test(root, tmp_path):
    made, _, _ = built(root)
    out = tmp_path / "out"
    out.mkdir()
    assert made.write_results(out) == []
    assert list(out.iterdir()) == []


# ---------------------------------------------------------------- predictions


def test_rows_of_predictions(root, tmp_path):
    made, demos, _ = built(root, predict=str(root / "2.npz"))
    path = tmp_path / "out.csv"
    trainer(tmp_path, callbacks=[PredictionWriter(path)]).predict(made, demos, return_predictions=False)
    found = rows(path)
    columns = [f"{name}[{i}]" for i in range(4) for name in ACTION_NAMES]
    assert list(found[0]) == ["episode", "step", *columns]
    assert [row["step"] for row in found] == [str(i) for i in range(12)]
    assert {row["episode"] for row in found} == {"2"}
    chunks = made.model.act(demos.items("predict").fetch(np.arange(12), 0)).flatten(1)
    written = torch.tensor([[float(row[name]) for name in columns] for row in found])
    torch.testing.assert_close(written, chunks, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- settings


def test_settings_reach_the_policy(root):
    made, _, _ = built(root, {"grouped": True, "readout": "mean", "smoothing": 1.5, "dropout": 0.25})
    assert isinstance(made.model, DecoderPolicy)
    assert len(made.model.queries) == 3
    assert (made.model.readout, made.model.smoothing, made.model.dropout.p) == ("mean", 1.5, 0.25)
    made, _, _ = built(root, {"policy": "cvae", "latent": 5, "kl_weight": 2.0, "observation_noise": 0.5})
    assert isinstance(made.model, CVAEPolicy)
    assert (made.model.latent, made.model.kl_weight, made.model.observe.noise) == (5, 2.0, 0.5)
    assert len(made.model.queries) == 3  # grouped as in the paper
    made, _, _ = built(root, {"policy": "cvae", "grouped": False})
    assert len(made.model.queries) == 9


def test_what_is_best_depends_on_what_is_watched():
    assert (task().monitor, task().monitor_mode) == ("val/reconstruct_mse", "min")
    assert task(monitor="val/token_pred_acc").monitor_mode == "max"
    assert task(monitor="val/loss").monitor_mode == "min"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "dagger"}, r"^policy must be decoder, encoder-decoder, cvae, got 'dagger'\.$"),
        (
            {"policy": "cvae", "decoding": "autoregressive"},
            r"^decoding=autoregressive is for policy=decoder, got policy=cvae\.$",
        ),
        (
            {"policy": "encoder-decoder", "decoding": "autoregressive"},
            r"^decoding=autoregressive is for policy=decoder, got policy=encoder-decoder\.$",
        ),
        (
            {"policy": "cvae", "readout": "mean"},
            r"^readout=mean is for policy=decoder or encoder-decoder, got policy=cvae\.$",
        ),
        (
            {"policy": "cvae", "smoothing": 1.0},
            r"^smoothing=1\.0 is for policy=decoder or encoder-decoder, got policy=cvae\.$",
        ),
        ({"latent": 8}, r"^latent=8 is for policy=cvae, got policy=decoder\.$"),
        ({"kl_weight": 1.0}, r"^kl_weight=1\.0 is for policy=cvae, got policy=decoder\.$"),
        (
            {"policy": "encoder-decoder", "regression": "l2"},
            r"^regression=l2 is for policy=cvae, got policy=encoder-deco",
        ),
        ({"heads": 2}, r"^heads=2 is for policy=encoder-decoder, got policy=decoder\.$"),
        ({"ema": 1.0}, r"^ActionPolicyTask: ema must be from 0 \(none\) and below 1, got 1\.0\.$"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        task(**options)


def test_policies_that_do_not_fit_the_data_are_refused(root):
    demos = data(root)
    demos.setup("fit")
    with pytest.raises(ConfigError, match=r"decoding=autoregressive needs a causal backbone; set causal=true\.$"):
        task(decoding="autoregressive").build(demos.spec)
    with pytest.raises(ConfigError, match=r"heads=4 must divide the backbone's width 18\.$"):
        task("illama_test,dim=18,num_heads=3,causal=false", policy="encoder-decoder").build(demos.spec)
    other = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9)
    with pytest.raises(
        ConfigError, match=r"^ActionPolicyTask needs demonstrations, but the data is for the domain dna\.$"
    ):
        task().build(other)
