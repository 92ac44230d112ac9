"""What a language model of DNA is asked: the next token, or the masked ones."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.domains.targets import IGNORED
from vertebra.errors import ConfigError

Objective = Literal["auto", "causal", "masked"]


def choose_objective(objective: Objective, causal: bool) -> Literal["causal", "masked"]:
    """Follow the backbone with ``auto``.

    Raises:
        ConfigError: The objective does not go with the backbone.
    """
    fitting: Literal["causal", "masked"] = "causal" if causal else "masked"
    if objective not in ("auto", fitting):
        raise ConfigError(
            f"DNALanguageTask: objective {objective!r} does not go with a backbone of causal={str(causal).lower()}; "
            f"use objective '{fitting}' or 'auto', or a backbone of causal={str(not causal).lower()}."
        )
    return fitting


def mask_tokens(
    ids: Tensor, counted: Tensor, draw: Tensor, *, mask_id: int, base_ids: Tensor, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict; of them 80 % become ``[MASK]``, 10 % a random base, 10 % stay.

    Random bases come from A, C, G and T alone, never from special tokens.

    Args:
        ids: Token ids, int (B, L).
        counted: Tokens that may be chosen, bool (B, L).
        draw: Uniform numbers in [0, 1), (B, L).
        mask_id: Id of ``[MASK]``.
        base_ids: Ids of the bases.
        share: Share of ``counted`` to choose.

    Returns:
        The changed ids (B, L) and the targets (B, L), -100 where nothing was chosen.
    """
    chosen = counted & (draw < share)
    within = draw / share  # uniform in [0, 1) among the chosen
    other = ((within - 0.8) / 0.1 * len(base_ids)).long().clamp(0, len(base_ids) - 1)
    changed = torch.where(within < 0.8, mask_id, torch.where(within < 0.9, base_ids[other].to(ids.dtype), ids))
    return torch.where(chosen, changed, ids), torch.where(chosen, ids.long(), IGNORED)


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood (nats a token) and the number of targets, as scalars.

    Args:
        logits: (B, L, V).
        targets: (B, L), -100 where nothing is asked.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum()
    return total / count.clamp(min=1), count
