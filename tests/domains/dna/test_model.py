"""Models of DNA: echoes, strands, n-grams and the aligned read-out."""

import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel, masked_mean
from vertebra.domains.dna.ngrams import NGramEmbedding
from vertebra.domains.dna.spec import DNASpec
from vertebra.errors import ConfigError, ShapeError
from vertebra.tokenizers.nucleotide import KmerTokenizer, NucleotideTokenizer

TOKENIZER = NucleotideTokenizer()
PAD, N = TOKENIZER.pad_id, TOKENIZER.n_id
LENGTH = 12


def spec(**changes):
    facts = {"task": "classification", "classes": ("a", "b"), "max_length": LENGTH}
    return DNASpec(**{"tokenizer": TOKENIZER.to_dict(), **facts, **changes})


def classifier(causal=True, backbone="illama_test", facts=None, **arguments):
    model = DNAClassifier(create_backbone(backbone, causal=causal), facts or spec(), **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bases(*shape):
    return torch.randint(7, 11, shape)


def changes_at(model, ids, position):
    """Positions whose features change with the token at ``position``."""
    other = ids.clone()
    other[:, position] = 7 + (other[:, position] - 6) % 4
    before, after = model.embed_positions(ids)[0], model.embed_positions(other)[0]
    return ((before - after).abs() > 1e-6).any(-1).any(0).tolist()


# ---------------------------------------------------------------- echoes


@pytest.mark.parametrize("backbone", ["illama_test", "hybrid_test"])
def test_the_second_copy_has_read_the_whole_sequence(backbone):
    ids = bases(2, LENGTH)
    assert changes_at(classifier(backbone=backbone, pooling="mean"), ids, 7) == [False] * 7 + [True] * 5
    assert all(changes_at(classifier(backbone=backbone, pooling="echo"), ids, 7))
    assert all(changes_at(classifier(backbone=backbone, pooling="rc_echo"), ids, 7))


@pytest.mark.parametrize("pooling", ["echo", "rc_echo"])
def test_an_echo_is_the_backbone_over_two_copies(pooling):
    model = classifier(pooling=pooling)
    ids = bases(1, 9)
    second = ids if pooling == "echo" else TOKENIZER.reverse_complement(ids)
    whole = model.backbone(model.embed(torch.cat([ids, second], 1)))
    torch.testing.assert_close(model.embed_positions(ids)[0], whole[:, 9:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.embed_sequences(ids), whole[:, 9:].mean(1), atol=1e-6, rtol=1e-5)


def test_the_first_copy_of_an_echo_reads_as_without():
    model = classifier(pooling="mean")
    ids = bases(1, 9)
    whole = model.backbone(model.embed(torch.cat([ids, ids], 1)))
    torch.testing.assert_close(model.embed_positions(ids)[0], whole[:, :9], atol=1e-5, rtol=1e-5)


def test_last_is_the_last_real_position():
    model = classifier(pooling="last")
    ids = bases(2, LENGTH)
    ids[0, 8:] = PAD
    features, _ = model.embed_positions(ids)
    expected = torch.stack([features[0, 7], features[1, -1]])
    torch.testing.assert_close(model.embed_sequences(ids), expected)


# ---------------------------------------------------------------- strands


@pytest.mark.parametrize("more", [{}, {"ngrams": (2, 3)}, {"aligned": 2, "positions": "learned"}, {"head": "cnn"}])
def test_rc_average_makes_both_strands_equal(more):
    ids = bases(3, LENGTH)
    other = TOKENIZER.reverse_complement(ids)
    single = classifier(pooling="mean", **more)
    assert not torch.allclose(single(ids), single(other), atol=1e-4)
    both = DNAClassifier(single.backbone, single.spec, **{**single.arguments, "rc_average": True}).eval()
    both.load_state_dict(single.state_dict())
    torch.testing.assert_close(both(ids), both(other), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both(ids), (single(ids) + single(other)) / 2, atol=1e-6, rtol=1e-5)


def test_reverse_complement_leaves_padding_where_it_is():
    model = classifier()
    ids = torch.tensor([[PAD, 7, 7, 8, N, PAD]])
    expected = torch.tensor([[PAD, N, 9, 10, 10, PAD]])
    assert torch.equal(model.reverse_complement(ids, ids != PAD), expected)


def test_rc_average_and_dropout_are_off_and_on_with_the_mode():
    model = classifier(rc_average=True, dropout=0.5)
    ids = bases(2, LENGTH)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# ---------------------------------------------------------------- n-grams


def slow_ngrams(module, ids):
    out = torch.zeros(*ids.shape, module.tables[0].embedding_dim)
    for b, row in enumerate(ids.tolist()):
        for n, table in zip(module.orders, module.tables, strict=True):
            for i in range(len(row)):
                begin = i - n // 2
                if begin < 0 or begin + n > len(row) or any(t not in (7, 8, 9, 10) for t in row[begin : begin + n]):
                    continue
                number = 0
                for token in row[begin : begin + n]:
                    number = 4 * number + token - 7
                out[b, i] += table.weight[number]
    return out


def test_ngrams_equal_a_slow_loop():
    module = NGramEmbedding((2, 3, 5), 4, TOKENIZER.base_ids, TOKENIZER.vocab_size, dropout=0.3, skip=0.5).eval()
    ids = torch.randint(7, 12, (3, 17))
    ids[1, 11:] = PAD
    torch.testing.assert_close(module(ids), slow_ngrams(module, ids))
    short = bases(1, 3)
    torch.testing.assert_close(module(short), slow_ngrams(module, short))


def test_windows_over_an_edge_n_or_padding_are_zeros():
    module = NGramEmbedding((3,), 4, TOKENIZER.base_ids, TOKENIZER.vocab_size)
    ids = torch.tensor([[7, 8, 9, N, 8, 9, 10, 7, PAD]])
    filled = (module.eval()(ids) != 0).all(-1)
    assert filled[0].tolist() == [False, True, False, False, False, True, True, False, False]


def test_ngrams_are_left_out_in_training_and_keep_their_mean():
    ids = bases(400, 20)
    module = NGramEmbedding((3,), 1, TOKENIZER.base_ids, TOKENIZER.vocab_size, dropout=0.5, skip=1.0)
    torch.nn.init.ones_(module.tables[0].weight)
    inner = module.train()(ids)[:, 1:-1]
    assert inner.unique().tolist() == [0.0, 2.0]  # short orders are never skipped whole
    assert inner.mean().item() == pytest.approx(1, abs=0.05)
    module = NGramEmbedding((4,), 1, TOKENIZER.base_ids, TOKENIZER.vocab_size, skip=0.5)
    torch.nn.init.ones_(module.tables[0].weight)
    sums = module.train()(ids).sum((1, 2))
    assert sums.unique().tolist() == [0.0, 17.0]  # a sequence has all of them or none
    assert (sums > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_ngrams_join_features_and_head():
    model = classifier(causal=False, ngrams=(2, 3))
    ids = bases(2, LENGTH)
    inputs = model.embed(ids) + model.ngrams(ids)
    expected = torch.cat([model.backbone(inputs).mean(1), model.bag_norm(inputs.mean(1))], 1)
    torch.testing.assert_close(model.embed_sequences(ids), expected)


@pytest.mark.parametrize("orders", [(1,), (11,), (3, 3)])
def test_wrong_orders_are_named(orders):
    with pytest.raises(ConfigError, match=r"ngrams: orders must be different numbers from 2 to 10, got \["):
        classifier(ngrams=orders)


# ---------------------------------------------------------------- aligned read-out


def test_aligned_readout_equals_a_slow_loop():
    facts = spec(max_length=8)  # 8 positions in 3 pools of 3
    model = classifier(causal=False, facts=facts, aligned=2, aligned_pool=3)
    ids = bases(2, 8)
    ids[1, 5:] = PAD
    mask = ids != PAD
    inputs, readout = model.embed(ids), model.aligned
    features = model.backbone(inputs, mask)
    expected = torch.zeros(2, 4, 3)
    for b, i in mask.nonzero().tolist():
        left = torch.nn.functional.gelu(readout.features(features[b, i]))
        expected[b, :, i // 3] += torch.cat([left, readout.inputs(readout.norm(inputs[b, i]))]) / 3
    dim = model.backbone.config.dim
    whole = model.embed_sequences(ids)
    torch.testing.assert_close(whole[:, :dim], masked_mean(features, mask))
    torch.testing.assert_close(whole[:, dim:], expected.flatten(1))


def test_shorter_batches_give_the_same_aligned_result():
    model = classifier(causal=False, aligned=2, positions="learned")
    ids = bases(1, 7)
    padded = torch.cat([ids, torch.full((1, 5), PAD)], 1)
    torch.testing.assert_close(model(padded), model(ids), atol=1e-6, rtol=1e-5)


def test_learned_positions_tell_where_a_base_stands():
    model = classifier(causal=False, positions="learned")
    ids = torch.full((1, LENGTH), 7)
    assert not torch.allclose(model.embed_positions(ids)[0][0, 0], model.embed_positions(ids)[0][0, 5], atol=1e-4)


# ---------------------------------------------------------------- language model and errors


def test_a_tied_head_is_the_embedding():
    facts = spec(task="lm", classes=())
    model = DNALanguageModel(create_backbone("illama_test"), facts, tie=True)
    assert model.head.weight is model.embed.weight
    ids = bases(2, 6)
    ids[0, 4:] = PAD
    states = model.embed_positions(ids)
    torch.testing.assert_close(model(ids), states @ model.embed.weight.T)
    expected = torch.stack([states[0, :4].mean(0), states[1].mean(0)])
    torch.testing.assert_close(model.embed_sequences(ids), expected)


def test_packed_sequences_do_not_see_each_other():
    model = DNALanguageModel(create_backbone("illama_test"), spec(task="lm", classes=())).eval()
    a, b = bases(1, 5), bases(1, 4)
    both = model(torch.cat([a, b], 1), segments=torch.tensor([[0] * 5 + [1] * 4]))
    torch.testing.assert_close(both, torch.cat([model(a), model(b)], 1), atol=1e-6, rtol=1e-5)


def test_wrong_arguments_are_named():
    for arguments, text in (
        ({"pooling": "max"}, "DNAClassifier: pooling must be one of echo, rc_echo, mean, last, got 'max'"),
        ({"head": "deep"}, "DNAClassifier: head must be one of linear, mlp, cnn, got 'deep'"),
        ({"positions": "rope"}, "DNAClassifier: positions must be one of none, learned, got 'rope'"),
        ({"head": "cnn", "pooling": "last"}, "head 'cnn' reads all positions; use pooling 'mean' or 'echo'"),
        ({"facts": spec(classes=())}, "the data must name classes or targets, got none"),
    ):
        with pytest.raises(ConfigError, match=text):
            classifier(**arguments)


def test_ngrams_of_kmers_are_refused():
    facts = spec(tokenizer=KmerTokenizer(3).to_dict())
    with pytest.raises(ConfigError, match=r"ngrams needs single nucleotides \(k=1\); leave ngrams out, or set k to 1"):
        classifier(facts=facts, ngrams=(3,))


def test_wrong_inputs_are_named():
    too_long = bases(1, LENGTH + 1)
    with pytest.raises(ShapeError, match=r"at most 12 tokens \(learned positions\), got 13; cut them, or train with"):
        classifier(positions="learned")(too_long)
    with pytest.raises(ShapeError, match=r"at most 12 tokens \(aligned read-out\), got 13; cut them, or train with"):
        classifier(aligned=2)(too_long)
    with pytest.raises(ShapeError, match=r"ids must be integers \(B, L\), got torch.float32 \(1, 5\)"):
        classifier()(torch.randn(1, 5))
    with pytest.raises(ShapeError, match=r"mask must be bool \(1, 5\) \(True = real position\), got torch.int64"):
        classifier()(bases(1, 5), torch.ones(1, 5, dtype=torch.long))
