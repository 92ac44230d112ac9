import math

import pytest
import torch

from vertebra.domains.dna.objectives import choose_objective, mask_tokens, token_loss
from vertebra.errors import ConfigError

BASES = torch.tensor([7, 8, 9, 10])


def test_masking_statistics():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 12, (200, 1000), generator=generator)
    draw = torch.rand(ids.shape, generator=generator)
    counted = ids < 11  # not N
    changed, targets = mask_tokens(ids, counted, draw, mask_id=3, base_ids=BASES)
    chosen = targets >= 0
    n = int(chosen.sum())
    assert not (chosen & ~counted).any()
    assert (targets[chosen] == ids[chosen]).all()
    assert (changed[~chosen] == ids[~chosen]).all()
    assert n / int(counted.sum()) == pytest.approx(0.15, abs=0.004)
    masked = changed == 3
    assert int(masked.sum()) / n == pytest.approx(0.8, abs=0.01)
    replaced = chosen & ~masked & (changed != ids)
    assert int(replaced.sum()) / n == pytest.approx(0.1 * 3 / 4, abs=0.01)  # one in four keeps its base
    assert set(changed[replaced].tolist()) == {7, 8, 9, 10}
    kept = chosen & (changed == ids)
    assert int(kept.sum()) / n == pytest.approx(0.1 + 0.1 / 4, abs=0.01)


def test_token_loss_of_even_odds():
    logits = torch.full((1, 4, 12), -1e9)
    logits[..., 7:11] = 0
    loss, count = token_loss(logits, torch.tensor([[7, -100, 10, 8]]))
    assert count == 3
    assert loss.item() == pytest.approx(math.log(4))
    assert token_loss(logits, torch.full((1, 4), -100))[0] == 0


def test_objective_follows_the_backbone():
    assert choose_objective("auto", True) == "causal"
    assert choose_objective("auto", False) == "masked"
    with pytest.raises(
        ConfigError, match="objective 'masked' does not go with a backbone of causal=true; use objective"
    ):
        choose_objective("masked", True)
