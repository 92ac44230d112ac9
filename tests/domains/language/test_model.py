"""Models of text: shapes, padding, generation, and what is refused."""

import json

import pytest
import torch
from made_checkpoints import STACKS, left_padded, made, outputs_after_saving, published

import vertebra
from vertebra.backbones.base import create_backbone
from vertebra.backbones.decoding import Strategy, generate
from vertebra.cli import main
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.dna.task import DNALanguageTask
from vertebra.domains.language.generation import decoder_of, stop_of
from vertebra.domains.language.model import LanguageModel
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.saving import save_model
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, ShapeError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer


@pytest.mark.parametrize("kind", STACKS)
def test_padding_and_packing_change_nothing(kind):
    model = made(kind)
    ids, mask = left_padded(23)
    with torch.no_grad():
        logits = model(ids, mask)
        alone = model(ids[1:, 5:])
        segments = torch.arange(19)[None] // 8
        packed = model(ids[:1], segments=segments)
        last = model(ids[:1, 16:])
    assert logits.shape == (2, 19, 23)
    torch.testing.assert_close(logits[1:, 5:], alone, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(packed[:, 16:], last, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bamba", "jamba"])
def test_generation_is_the_argmax_of_whole_passes_and_stops_at_the_end_tokens(kind):
    model = made(kind, seed=3)
    prompts = [torch.tensor([1, 7, 9, 4]), torch.tensor([1, 8])]
    stop, greedy = stop_of(model, max_new=12), Strategy(method="greedy")
    assert stop.ids == (2, 5)
    for prompt, found in zip(prompts, generate(decoder_of(model), prompts, stop, greedy), strict=True):
        ids = prompt
        while len(ids) < len(prompt) + 12 and not (len(ids) > len(prompt) and int(ids[-1]) in (2, 5)):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids[None])[0, -1:].argmax(-1)])
        assert found.ids.tolist() == ids[len(prompt) :].tolist()


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_is_saved_and_loaded(tmp_path, tie):
    before, after = outputs_after_saving(made("bamba", tie=tie), tmp_path / "model")
    torch.testing.assert_close(after, before, atol=0, rtol=0)


def test_a_tied_head_is_the_embedding():
    model = made("llama", tie=True)
    assert model.head.weight is model.embed.weight
    assert made("llama").head.weight is not made("llama").embed.weight


def test_the_spec_goes_through_json():
    spec = LanguageSpec(vocab_size=9, max_length=4, bos_id=0, eos_ids=(1, 8), pad_id=None)
    assert DataSpec.from_dict(spec.to_dict()) == spec
    assert DataSpec.from_dict(LanguageSpec(vocab_size=9).to_dict()).eos_ids == ()


def test_wrong_ids_masks_and_specs_are_named():
    model = made("llama")
    with pytest.raises(ShapeError, match=r"LanguageModel: ids must be integers \(B, L\), got torch\.float32 \(1, 4\)"):
        model(torch.zeros(1, 4))
    with pytest.raises(ShapeError, match=r"mask must be bool \(1, 4\) \(True = real position\), got torch\.int64"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"eos_ids must lie in 0 \.\. 8, got 9"):
        LanguageSpec(vocab_size=9, eos_ids=(1, 9))
    with pytest.raises(ConfigError, match="vocab_size must be at least 1, got 0"):
        LanguageSpec(vocab_size=0)
    encoder = LanguageModel(create_backbone("illama_test,causal=false"), LanguageSpec(vocab_size=9))
    with pytest.raises(ConfigError, match="needs a causal backbone"):
        decoder_of(encoder)


def test_info_says_what_a_model_of_text_serves_and_that_is_so(tmp_path, capsys):
    model = made("llama")
    folder = save_model(model, tmp_path / "model")
    assert main(["info", str(folder), "--json"]) == 0
    use = json.loads(capsys.readouterr().out)["use"]
    assert use == [
        f"vertebra fit RECIPE --model.backbone local-dir:{folder}",
        f"vertebra export {folder} -o FILE.pt2",
        f'in Python: vertebra.load("{folder}"), vertebra.load_backbone("{folder}")',
    ]
    task = DNALanguageTask(use[0].rpartition(" ")[2])
    task.build(DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=16))
    task.load_initial()
    for backbone in (task.model.backbone, vertebra.load(folder).backbone, vertebra.load_backbone(folder)):
        found, wanted = backbone.state_dict(), model.backbone.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tokenizer_files_go_back_too(tmp_path, capsys):
    folder, ours, back = published("llama", tmp_path / "a"), str(tmp_path / "ours"), tmp_path / "back"
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"the": 0}}}')
    (folder / "tokenizer.model").write_bytes(b"pieces")
    assert main(["convert", str(folder), "-o", ours]) == 0
    assert main(["convert", ours, "-o", str(back), "--to", "llama"]) == 0
    assert capsys.readouterr().out.endswith(" tensors by the names of llama, tokenizer.json, tokenizer.model\n")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    straight = tmp_path / "straight"
    assert main(["convert", str(folder), "-o", str(straight), "--to", "llama"]) == 0  # converted on the way
    assert (straight / "tokenizer.model").read_bytes() == b"pieces"
