"""What recognition must do with every backbone; a new preset named *_test is covered by being registered."""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch import Trainer

from vertebra.backbones.catalog import presets
from vertebra.domains.base import load_task
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.speech.data import SpeechData
from vertebra.domains.speech.model import GRID_FAMILIES, PromptConfig
from vertebra.domains.speech.task import SpeechRecognitionTask

TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
FORMS = [(name, causal, rich) for name in TEST_PRESETS for causal in (True, False) for rich in (False, True)]
every_form = pytest.mark.parametrize(("name", "causal", "rich"), FORMS)
RICH = {
    "intermediate": [1],
    "transcript_layers": [1],
    "prompt": PromptConfig(dim=8, depth=1, num_heads=2, hidden_dim=16, every=1, cross_heads=2, dropout=0.0),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A manifest of 12 recordings in two languages, with translations and prompts."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        sf.write(folder / f"{i}.wav", rng.standard_normal(1600 + 200 * i) / 10, 8000)
        record = {"path": f"{i}.wav", "text": ("ab", "ba")[i % 2], "lang": ("eng", "deu")[i % 3 == 0]}
        if i % 4 == 1:
            record |= {"task": "st_deu", "translation": "bab", "previous": "ab"}
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")


def data(root, rich):
    return SpeechData(
        root=root,
        sample_rate=8000,
        n_mels=20,
        batch_size=4,
        prefix=rich,
        val_fraction=0.3,
        test_fraction=0.0,
        no_prompt=0.2,
    )


def task(name, causal, rich):
    return SpeechRecognitionTask(f"{name},causal={str(causal).lower()}", channels=3, **(RICH if rich else {}))


@every_form
def test_one_step_then_validation_a_checkpoint_and_a_saved_model(name, causal, rich, root, tmp_path):
    fit = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    recordings, model = data(root, rich), task(name, causal, rich)
    fit.fit(model, recordings)
    assert fit.global_step == 1
    assert model.model.grid == (model.backbone_config.family in GRID_FAMILIES)
    (found,) = fit.validate(model, recordings, verbose=False)
    assert {"val/loss", "val/wer", "val/blank"} <= set(found)
    assert all(np.isfinite(v) for v in found.values())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    batch = recordings.items("val").fetch(np.arange(3), 0)
    with torch.no_grad():
        expected = model.eval()._encode(batch).logits
        again = load_task(tmp_path / "a.ckpt")
        torch.testing.assert_close(again._encode(batch).logits, expected, atol=0, rtol=0)
        again.model = load_model(save_model(model.model, tmp_path / "m")).eval()
        torch.testing.assert_close(again._encode(batch).logits, expected, atol=0, rtol=0)


@every_form
def test_all_parameters_learn(name, causal, rich, root):
    recordings, model = data(root, rich), task(name, causal, rich)
    recordings.setup("fit")
    model.build(recordings.spec)
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    items = recordings.items("train")
    batch = items.fetch(np.arange(len(items)), 0)
    model._loss(model._encode(batch), batch).backward()
    assert [n for n, p in model.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(torch.isfinite(p.grad).all() for p in model.model.parameters())


@every_form
def test_a_batch_is_learned(name, causal, rich, root):
    recordings, model = data(root, rich), task(name, causal, rich)
    recordings.setup("fit")
    model.build(recordings.spec)
    batch = recordings.items("train").fetch(np.arange(3), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        losses.append(model._loss(model._encode(batch), batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        if losses[-1] < losses[0] / 3:
            return
    pytest.fail(f"loss went from {losses[0]:.3f} to {losses[-1]:.3f} only")
