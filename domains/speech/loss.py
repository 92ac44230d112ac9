"""The loss of connectionist temporal classification, behind the last layer and behind intermediate ones.

Sources: CTC (Graves et al. 2006), OWSM-CTC (https://arxiv.org/abs/2402.12654), equation 6.

Shapes: B recordings, T positions, V tokens, L tokens of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.domains.speech.model import Emissions


def ctc_losses(logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Return -log P(target) of every recording, (B,), in float32.

    A target that cannot fit (more tokens and repeats than positions) gives 0 and no gradient, never infinity.

    Args:
        logits: (B, T, V); token 0 is the blank.
        lengths: Real positions, (B,).
        targets: (B, L).
        target_lengths: Real tokens, (B,).
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # (T, B, V)
    return F.ctc_loss(log_probs, targets, lengths, target_lengths, blank=0, reduction="none", zero_infinity=True)


def recognition_loss(
    found: Emissions,
    targets: Tensor,
    target_lengths: Tensor,
    *,
    weight: float,
    transcripts: Tensor | None = None,
    transcript_lengths: Tensor | None = None,
    transcript_layers: Sequence[int] = (),
) -> Tensor:
    """Return (1 - weight) * last + weight * mean(intermediate), each the mean over recordings.

    Args:
        found: What the model says.
        targets: What each recording's task wants said, (B, L).
        target_lengths: (B,); below 0 for a recording without target, which a layer that learns it leaves out.
        weight: Share of the intermediate layers.
        transcripts: What was said, (B, L), for ``transcript_layers``; None where it is the target.
        transcript_lengths: (B,); below 0 for a recording without transcript.
        transcript_layers: Intermediate layers that are trained on ``transcripts``.
    """

    def layer_loss(logits: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        given = counts >= 0
        losses = ctc_losses(logits, found.lengths, ids, counts.clamp(min=0))
        return torch.where(given, losses, 0).sum() / given.sum().clamp(min=1)

    last = layer_loss(found.logits, targets, target_lengths)
    if not found.intermediate:
        return last
    if transcripts is None or transcript_lengths is None:
        transcripts, transcript_lengths = targets, target_lengths
    inner = [
        layer_loss(logits, transcripts, transcript_lengths)
        if layer in transcript_layers
        else layer_loss(logits, targets, target_lengths)
        for layer, logits in found.intermediate.items()
    ]
    return (1 - weight) * last + weight * torch.stack(inner).mean()
