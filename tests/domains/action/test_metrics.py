import math

import pytest
import torch

from vertebra.domains.action.metrics import ChunkErrors

TRUTH = torch.zeros(3, 2, 2)
ACTIONS = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [99.0, 99.0]], [[0.0, 2.0], [1.0, 0.0]]])
REAL = torch.tensor([[True, True], [True, False], [True, True]])


def test_errors_by_step_and_by_dimension():
    metric = ChunkErrors(2, 2)
    metric.update(ACTIONS, TRUTH, REAL)
    by_hand = {"x": 1 + 9 + 25 + 0 + 1, "y": 4 + 16 + 36 + 4 + 0}
    assert metric.compute() == pytest.approx(sum(by_hand.values()) / 10)
    assert metric.by_dimension().tolist() == pytest.approx([math.sqrt(n / 5) for n in by_hand.values()])
    first, second = (1 + 4 + 25 + 36 + 0 + 4) / 6, (9 + 16 + 1 + 0) / 4
    assert metric.by_step().tolist() == pytest.approx([math.sqrt(first), math.sqrt(second)])
    assert metric.compute().dtype == torch.float32


def test_parts_of_a_batch_come_together():
    whole, parts = ChunkErrors(2, 2), ChunkErrors(2, 2)
    whole.update(ACTIONS, TRUTH, REAL)
    for row in range(3):
        parts.update(ACTIONS[row : row + 1], TRUTH[row : row + 1], REAL[row : row + 1])
    assert parts.compute() == whole.compute()
    assert torch.equal(parts.by_step(), whole.by_step())
    parts.reset()
    assert parts.steps.tolist() == [0, 0]
    assert parts.by_step().tolist() == [0, 0]


def test_one_action_stands_for_all_steps():
    metric = ChunkErrors(2, 2)
    metric.update(torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 2, 2), torch.tensor([[True, True]]))
    assert metric.by_dimension().tolist() == [1, 0]


def test_a_step_that_never_exists_has_no_error():
    metric = ChunkErrors(2, 2)
    metric.update(ACTIONS[1:2], TRUTH[1:2], REAL[1:2])
    assert metric.by_step().tolist() == pytest.approx([math.sqrt(61 / 2), 0])


def test_angles_and_quaternions_are_compared_as_such():
    metric = ChunkErrors(1, 6, angles=[5], quaternions=[1])
    turned = torch.tensor([0.5, 0.5, 0.5, 0.5])
    actions = torch.cat([torch.tensor([7.0]), -turned, torch.tensor([math.pi - 0.1])])[None, None]
    truth = torch.cat([torch.tensor([1.0]), turned + 0.1, torch.tensor([0.1 - math.pi])])[None, None]
    kept = actions.clone(), truth.clone()
    metric.update(actions, truth, torch.tensor([[True]]))
    assert metric.by_dimension().tolist() == pytest.approx([6, 0.1, 0.1, 0.1, 0.1, 0.2], abs=1e-5)
    assert torch.equal(actions, kept[0])
    assert torch.equal(truth, kept[1])
