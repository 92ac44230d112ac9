"""Teachers of other domains than DNA: what they are asked for, and students of them."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import create_backbone
from vertebra.domains.base import BaseData
from vertebra.domains.distillation import MmMambaTask, MohawkTask
from vertebra.domains.language.model import LanguageEncoder, LanguageModel
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.mesh.codes import MeshCodeGenerator
from vertebra.domains.mesh.data import MeshData
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.mesh.task import token_losses
from vertebra.domains.saving import save_model
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import CoordinateTokenizer

STUDENT = "hybrid_test,depth=3,hidden_dim=32,pattern=MMA"
ENCODER = {"heads": 2, "layers": 1, "latents": 3, "frequencies": 2}
SPEC = LanguageSpec(vocab_size=23, max_length=64, bos_id=1, eos_ids=(2,), pad_id=0)


def trained(model):
    """As if it were: attention that looks somewhere, logits that differ."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "qkv" in name else 0.2) * torch.randn_like(parameter))
    return model.eval()


class TextItems:
    """Texts of several lengths: begin, tokens, end; padding on the left of every second one."""

    def __init__(self, count):
        rng = np.random.default_rng(0)
        self.texts = [np.array([1, *rng.integers(3, 23, n), 2]) for n in rng.integers(3, 12, count)]

    @property
    def lengths(self):
        return np.array([len(text) for text in self.texts])

    def fetch(self, indices, epoch):
        longest = max(len(self.texts[i]) for i in indices)
        ids, mask = np.zeros((len(indices), longest), np.int64), np.zeros((len(indices), longest), bool)
        for row, i in enumerate(indices):
            text = self.texts[i]
            place = slice(longest - len(text), None) if i % 2 else slice(len(text))
            ids[row, place], mask[row, place] = text, True
        return {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask), "index": torch.from_numpy(indices)}


class TextData(BaseData):
    """What anybody may write to distil a model of text."""

    def load(self, splits: set, spec: DataSpec | None):
        return SPEC, {"train": TextItems(12), "val": TextItems(4)}


def mesh_data():
    return MeshData(procedural=(6, 2, 2), points=32, bins=16, max_tokens=300, face_buckets=(30, 60), batch_size=3)


@pytest.fixture(params=["language", "mesh"])
def lesson(request, tmp_path):
    """A teacher's folder, and data of its kind."""
    data = TextData(batch_size=4) if request.param == "language" else mesh_data()
    data.setup("fit")
    backbone = create_backbone("illama_test,depth=3")
    model = LanguageModel(backbone, SPEC) if request.param == "language" else MeshGenerator(
        backbone, data.spec, encoder=ENCODER, dropout=0.2
    )  # fmt: skip
    return save_model(trained(model), tmp_path / "teacher"), data, model


def test_every_real_token_that_has_one_before_it_is_asked_for():
    model = trained(LanguageModel(create_backbone("illama_test"), SPEC))
    ids = torch.tensor([[1, 5, 9, 2, 0], [0, 0, 1, 7, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    with torch.no_grad():
        logits, targets = model.token_logits({"ids": ids, "mask": mask})
        assert targets.tolist() == [[5, 9, 2, -100, -100], [-100, -100, 7, 2, -100]]
        torch.testing.assert_close(logits, model(ids, mask), atol=0, rtol=0)
        whole, every = model.token_logits({"ids": ids[:1, :4]})
        assert every.tolist() == [[5, 9, 2, -100]]
        torch.testing.assert_close(whole, logits[:1, :4])
        segments = torch.tensor([[0, 0, 1, 1]])
        packed, inside = model.token_logits({"ids": ids[:1, :4], "segments": segments})
        assert inside.tolist() == [[5, -100, 2, -100]]
        torch.testing.assert_close(packed, model(ids[:1, :4], segments=segments), atol=0, rtol=0)


def test_a_mesh_is_asked_for_all_of_its_tokens_and_for_no_padding():
    data = mesh_data()
    data.setup("fit")
    batch = data.items("train").fetch(np.arange(3), 0)
    model = trained(MeshGenerator(create_backbone("illama_test"), data.spec, encoder=ENCODER))
    logits, targets = model.token_logits(batch)
    assert torch.equal(targets >= 0, batch["mask"])
    assert not batch["mask"].all()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    losses, mask = token_losses(model, batch)
    torch.testing.assert_close(loss, losses.sum() / mask.sum())


@pytest.mark.parametrize("method", [MohawkTask, MmMambaTask])
@pytest.mark.filterwarnings("ignore")  # Lightning's, of a trainer without logger and workers
def test_a_student_of_it_goes_through_all_stages(lesson, method):
    folder, data, teacher = lesson
    torch.manual_seed(0)
    task = method(str(folder), STUDENT, stages=[1, 1, 1])
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    stages = []
    original = task._begin

    def begin(stage):
        stages.append(stage)
        original(stage)

    task._begin = begin
    trainer.fit(task, datamodule=data)
    assert stages == [0, 1, 2]
    assert type(task.model) is type(teacher)
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert all(np.isfinite(value) for value in numbers.values())
    assert numbers["val/kl"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_student_comes_nearer_to_its_teacher(lesson):
    """In every stage, by what learns in it."""
    folder, data, _ = lesson
    batch = data.items("train").fetch(np.arange(3), 0)
    for stage in range(3):
        torch.manual_seed(0)
        task = MohawkTask(str(folder), STUDENT)
        task.build(data.spec)
        task.load_initial()
        task.eval()
        learning = [p for n, p in task.model.named_parameters() if task.learns(stage, n)]
        optimizer = torch.optim.Adam(learning, lr=1e-2)

        def loss(task=task, stage=stage):
            if stage < 2:
                return task.combine(task.layer_losses(stage, batch))
            student, teacher, _ = task._asked(batch)
            return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")

        first = loss().item()
        for _ in range(12):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < 0.9 * first


def test_models_without_tokens_of_their_data_are_no_teachers():
    with pytest.raises(ConfigError, match="LanguageEncoder gives no logits of tokens one by one"):
        LanguageEncoder(create_backbone("illama_test"), SPEC).token_logits({"ids": torch.zeros(1, 2).long()})
    spec = MeshSpec(tokenizer=CoordinateTokenizer(16).to_dict(), points=32, max_faces=4, max_tokens=36)
    decoder = create_backbone("illama_test,causal=false").config
    codes = MeshCodeGenerator(
        create_backbone("illama_test"), spec, decoder=decoder, encoder=ENCODER, codebook_size=8, code_dim=4
    )
    with pytest.raises(ConfigError, match="MeshCodeGenerator gives no logits of tokens one by one"):
        codes.token_logits({})
