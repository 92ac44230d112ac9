"""What a language model is asked for."""

import torch

from vertebra.domains.targets import next_targets


def test_next_targets_stay_inside_their_sequence():
    ids = torch.tensor([[2, 7, 8, 2, 9, 11, 10]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    counted = (ids >= 7) & (ids < 11)
    assert next_targets(ids, counted, segments).tolist() == [[7, 8, -100, 9, -100, 10, -100]]
    assert next_targets(ids, counted).tolist() == [[7, 8, -100, 9, -100, 10, -100]]
    everything = torch.ones_like(counted)
    assert next_targets(ids, everything, segments)[0, 2] == -100
