"""Sequences laid out in rows and groups, against loops over single positions."""

import pytest
import torch

from vertebra.backbones.layers.groups import Cursor, TensorState, align, cut
from vertebra.errors import LoadError


def test_padded_sequences_are_laid_at_the_start_of_their_rows():
    x = torch.randn(3, 6, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    rows, real, back = align(x, mask, None)
    for i in range(3):
        torch.testing.assert_close(rows[i][real[i]], x[i][mask[i]], atol=0, rtol=0)
        assert real[i].tolist() == sorted(real[i].tolist(), reverse=True)
    torch.testing.assert_close(back(rows)[mask], x[mask], atol=0, rtol=0)
    rows, real, back = align(x, None, None)
    assert (rows is x, real, back(x) is x) == (True, None, True)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences_become_rows(padded):
    x = torch.randn(2, 7, 3, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5]])
    mask = torch.ones(2, 7, dtype=torch.bool)
    if padded:
        mask[0, 2], mask[0, 5:], mask[1, 0] = False, False, False
    rows, real, back = align(x, mask if padded else None, segments)
    expected = [x[b][(segments[b] == s) & mask[b]] for b, s in ((0, 0), (0, 1), (0, 2), (1, 5))]
    assert len(rows) == 4
    for i, part in enumerate(expected):
        torch.testing.assert_close(rows[i, : len(part)], part, atol=0, rtol=0)
        assert real is None or real[i].sum() == len(part)
    torch.testing.assert_close(back(rows)[mask], x[mask], atol=0, rtol=0)
    back(rows)[mask].sum().backward()
    torch.testing.assert_close(x.grad, mask[..., None].expand(-1, -1, 3).float(), atol=0, rtol=0)


def test_the_last_group_is_filled_up():
    x = torch.arange(1.0, 8.0).reshape(1, 7, 1)
    assert cut(x, 3)[0, ..., 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert cut(x[:, :6], 3).shape == (1, 2, 3, 1)


@pytest.mark.parametrize("calls", [(1,) * 11, (5, 1, 1, 4), (11,), (2, 6, 3)])
def test_a_cursor_puts_every_item_where_it_stands(calls):
    """Items that began at different positions, step after step, against a list for each."""
    size, starts = 4, torch.tensor([0, 3, 6])
    stream = torch.randn(3, 20, 2)
    held = torch.zeros(3, size, 2)
    for i, start in enumerate(starts.tolist()):
        inside = start % size
        held[i, :inside] = stream[i, start - inside : start]
    position = starts.clone()
    for count in calls:
        new = torch.stack([stream[i, p : p + count] for i, p in enumerate(position.tolist())])
        cursor = Cursor(position, count, size)
        window = cursor.place(new, held)
        torch.testing.assert_close(cursor.take(window), new, atol=0, rtol=0)
        for i, p in enumerate(position.tolist()):
            first = p - p % size
            torch.testing.assert_close(window[i][cursor.filled[i]], stream[i, first : p + count], atol=0, rtol=0)
            assert cursor.number[i].tolist() == list(range(first // size, first // size + cursor.groups))
            assert cursor.finished[i].tolist() == [(g + 1) * size <= p + count for g in cursor.number[i].tolist()]
        held, position = cursor.rest(window), cursor.advanced
        for i, p in enumerate(position.tolist()):
            inside = p % size
            torch.testing.assert_close(held[i, :inside], stream[i, p - inside : p], atol=0, rtol=0)


def test_padding_of_a_first_call_moves_no_item():
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    cursor = Cursor(torch.zeros(2, dtype=torch.long), 5, 3, real)
    assert cursor.advanced.tolist() == [5, 2]
    assert cursor.filled.sum((1, 2)).tolist() == [5, 2]
    assert cursor.finished.tolist() == [[True, False], [False, False]]


def test_a_state_of_tensors_selects_and_loads():
    state = TensorState({"position": torch.tensor([3, 5]), "keys": torch.randn(2, 4, 6)}, "rows", {"keys": 1})
    picked = state.select(torch.tensor([1, 1, 0]))
    assert (picked.batch_size, picked.growth) == (3, "rows")
    assert state.nbytes == 2 * 8 + 48 * 4
    fresh = TensorState(
        {"position": torch.zeros(3, dtype=torch.long), "keys": torch.zeros(3, 0, 6)}, "rows", {"keys": 1}
    )
    fresh.load_state_dict(picked.state_dict())
    torch.testing.assert_close(fresh.tensors, picked.tensors, atol=0, rtol=0)
    with pytest.raises(LoadError, match=r"position must be \(2,\), got \(3,\)"):
        state.load_state_dict(picked.state_dict())
