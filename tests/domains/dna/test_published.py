"""Published models of nucleotides: rows in our order, outputs as the original's."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters
from vertebra.domains.dna.generation import bases_of, decoder_of, prompt_ids
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.published import TOKENS
from vertebra.domains.language.model import LanguageModel
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import LoadError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

HYENA = {token: i for i, token in enumerate(TOKENS)}
OTHER = {"<pad>": 0, "T": 1, "G": 2, "C": 3, "A": 4, "<unk>": 5, "N": 6, "<s>": 7, "</s>": 8, "a": 9, "<mask>": 10}
STACKS = {
    "hybridna": {"family": "hybrid", "dim": 32, "depth": 3, "pattern": "MAM", "hidden_dim": 40, "mamba_head_dim": 8,
                 "state_dim": 6, "num_heads": 4, "num_kv_heads": 2},
    "bamba": {"family": "hybrid", "dim": 32, "depth": 3, "pattern": "MAM", "hidden_dim": 40, "mamba_head_dim": 8,
              "state_dim": 6, "num_heads": 4, "num_kv_heads": 2, "rope_fraction": 0.5},
    "mamba": {"family": "hybrid", "dim": 32, "depth": 2, "pattern": "S", "hidden_dim": 0},
    "llama": {"family": "illama", "dim": 32, "depth": 2, "num_heads": 4, "hidden_dim": 40, "bias": False},
}  # fmt: skip


def published(folder, vocabulary, kind="hybridna", tie=False, rows=None, **settings):
    """Write a checkpoint with a vocabulary beside it; return it and the language model that it is of."""
    torch.manual_seed(0)
    backbone = BackboneConfig.from_dict(STACKS[kind]).build()
    model = LanguageModel(backbone, LanguageSpec(vocab_size=rows or len(vocabulary)), tie=tie).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if kind == "hybridna":  # Bamba's names under another model_type, without rotary embedding
        twin = LanguageModel(BackboneConfig.from_dict(STACKS["bamba"]).build(), model.spec, tie=tie)
        twin.load_state_dict(model.state_dict())
        tensors, config = converters()["bamba"].restore(twin)
        config = {name: value for name, value in config.items() if name != "rope_theta"} | {"model_type": "hybridna"}
    else:
        tensors, config = converters()[kind].restore(model)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    if vocabulary:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder, model


def recognised(folder):
    checkpoint = open_checkpoint(folder)
    return [name for name, converter in converters().items() if converter.recognises(checkpoint)]


@torch.no_grad()
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("tie", [False, True])
def test_logits_of_tokens_are_the_originals(kind, tie, tmp_path):
    folder, model = published(tmp_path / "a", OTHER, kind, tie, rows=12, max_position_embeddings=77)
    assert recognised(folder) == ["nucleotides"]
    found = convert(folder)[1]
    ours = found.model
    assert isinstance(ours, DNALanguageModel)
    assert ours.spec.max_length == 77
    assert (ours.head.weight is ours.embed.weight) == tie
    text = "ACGTNNTGCAATTGGCCACGT"
    theirs = model(torch.tensor([[OTHER[letter] for letter in text]]))
    logits = ours(torch.from_numpy(NucleotideTokenizer().encode(text))[None])
    names = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[BOS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
    for i, token in enumerate(TOKENS):
        if token not in ("[CLS]", "[RESERVED]"):
            row = OTHER[names.get(token, token)]
            torch.testing.assert_close(logits[..., i], theirs[..., row], atol=1e-6, rtol=1e-5)
    assert found.left_out == {
        "row 9 of embedding and head (a)": "our tokenizer has no such token",
        "row 11 of embedding and head (no token)": "our tokenizer has no such token",
    }
    assert found.notes["tokens"] == (
        "Tokens that the original lacks have the rows of others: [CLS] those of [PAD], [RESERVED] those of [PAD]."
    )
    again = load_model(save_model(ours, tmp_path / "model"))
    ids = torch.from_numpy(NucleotideTokenizer().encode(text))[None]
    torch.testing.assert_close(again(ids), logits, atol=0, rtol=0)


@torch.no_grad()
def test_the_vocabulary_of_hyenadna_is_ours(tmp_path):
    folder, model = published(tmp_path / "a", HYENA)
    found = convert(folder)[1]
    assert torch.equal(found.model.embed.weight, model.embed.weight)
    assert found.left_out == {}
    assert "tokens" not in found.notes
    assert "layers MAM; attention has no positions" in found.notes["structure"]


def test_a_converted_model_generates_bases(tmp_path):
    from vertebra.backbones.decoding import Stop, Strategy, generate
    from vertebra.domains.dna.generation import grammar

    model = convert(published(tmp_path / "a", OTHER)[0])[1].model
    prompt = prompt_ids(model, bases="ACGT")
    allowed = grammar(model, [prompt], 8, 8)
    made = generate(decoder_of(model), [prompt], Stop(max_new=8), Strategy(method="greedy"), allowed=allowed)
    letters = bases_of(model, prompt, made[0].ids)
    assert len(letters) == 12
    assert set(letters) <= set("ACGT")


@torch.no_grad()
def test_a_vocabulary_without_n_reads_it_as_unknown(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["A", "C", "G", "T", "[UNK]"])}
    folder, model = published(tmp_path / "a", vocabulary)
    found = convert(folder)[1]
    assert "N those of [UNK]" in found.notes["tokens"]
    assert torch.equal(found.model.embed.weight[11], model.embed.weight[4])


def test_without_a_tokenizer_it_is_a_language_model(tmp_path):
    folder, _ = published(tmp_path / "a", {}, rows=12)
    assert recognised(folder) == ["hybridna"]
    assert isinstance(convert(folder)[1].model, LanguageModel)
    with pytest.raises(LoadError, match=r"no tokenizer\.json, vocab\.json or vocab\.txt beside the weights"):
        convert(folder, "nucleotides")


@pytest.mark.parametrize(
    ("vocabulary", "rows", "words"),
    [
        ({**HYENA, "[SPECIES]": 12}, 12, "the tokenizer has the id 12, but the embedding 12 rows"),
        ({"A": 0, "C": 1, "G": 2, "T": 3}, 4, r"the vocabulary has no row for \[CLS\], \[SEP\], .*, N, and no special"),
        ({"A": 0, "C": 1, "G": 2, "T": 3, "[PAD]": 4}, 5, r"the vocabulary has no row for N, and no special token"),
    ],
    ids=str,
)
def test_vocabularies_that_lack_too_much_are_named(vocabulary, rows, words, tmp_path):
    folder, _ = published(tmp_path / "a", vocabulary, rows=rows)
    with pytest.raises(LoadError, match=words):
        convert(folder)


def test_a_checkpoint_without_head_or_of_no_family_is_refused(tmp_path):
    folder, model = published(tmp_path / "a", HYENA)
    backbone = {
        name.removeprefix("model."): tensor
        for name, tensor in open_checkpoint(folder).tensors.items()
        if name != "lm_head.weight"
    }
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.clone() for name, tensor in backbone.items()}, folder / "model.safetensors")
    with pytest.raises(LoadError, match="the checkpoint has no head, so it is no language model"):
        convert(folder)
    (folder / "config.json").unlink()
    with pytest.raises(LoadError, match="of no known family"):
        convert(folder, "nucleotides")
    assert model.spec.vocab_size == 12
