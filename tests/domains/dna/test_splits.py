"""Groups of similar sequences, and the leakage check."""

import numpy as np
import pytest

from vertebra.domains.dna.splits import canonical_kmers, identity_groups, leakage
from vertebra.tokenizers.nucleotide import reverse_complement_string


def random_sequences(count, length, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), length)) for _ in range(count)]


def test_unrelated_sequences_stay_apart():
    assert len(set(identity_groups(random_sequences(300, 100)).tolist())) == 300


def test_overlaps_and_other_strands_are_grouped():
    genome = random_sequences(1, 400)[0]
    windows = [genome[i : i + 80] for i in range(0, 321, 40)]  # each shares 40 bases with the next
    windows[2] = reverse_complement_string(windows[2])
    other = random_sequences(5, 80, seed=1)
    groups = identity_groups([*windows, *other]).tolist()
    assert len(set(groups[: len(windows)])) == 1
    assert len(set(groups)) == 6


def test_short_and_soft_masked_sequences_are_grouped_when_equal():
    groups = identity_groups(["ACGTT", "aacgt", "ACGTA", "ACGTT"]).tolist()
    assert groups[0] == groups[1] == groups[3] != groups[2]


def test_repeats_do_not_join_everything():
    tails = random_sequences(400, 200)
    assert len(set(identity_groups([s + "A" * 40 for s in tails]).tolist())) == 400


def test_large_families_hang_together_and_are_seen_to_leak():
    rng = np.random.default_rng(2)
    family = np.tile(rng.choice(list("ACGT"), 200), (1000, 1))
    for row in family:
        row[rng.choice(200, 3, replace=False)] = rng.choice(list("ACGT"), 3)
    members = ["".join(row) for row in family]
    other = random_sequences(20, 200, seed=3)
    groups = identity_groups([*members, *other]).tolist()
    assert len(set(groups[:1000])) == 1
    assert len(set(groups)) == 21
    assert leakage(members[:700], members[700:] + other).similar == 300


def test_leakage_counts_equal_and_similar_ones():
    train, fresh = random_sequences(50, 100), random_sequences(10, 100, seed=1)
    other = [reverse_complement_string(train[0]), train[1][30:] + fresh[0][:30], *fresh[1:]]
    found = leakage(train, other)
    assert (found.sequences, found.exact, found.similar) == (11, 1, 2)
    assert found.share == pytest.approx(2 / 11)


def test_kmers_do_not_cross_sequences_or_ambiguous_letters():
    codes, owner = canonical_kmers(["ACGTN", "ACGT", "AC"], k=4)
    assert owner.tolist() == [0, 1]
    assert codes[0] == codes[1] == 0b00011011
