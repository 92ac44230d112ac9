"""Speech models as programs: samples to log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.domains.exporting import BATCH, Axis, ExportForm, Exports, Port, refuse_step
from vertebra.domains.speech.model import SpeechCTC

LONGEST_SECONDS = 60


def exports(model: SpeechCTC, steps: bool, max_length: int | None) -> Exports:
    """Return the form of a model, and its tokens.

    A model that reads a text prompt is exported without one: it is then told that there is none.

    Raises:
        ConfigError: Steps are wanted.
    """
    if steps:
        raise refuse_step(model, "it hears a recording whole")
    spec, rate = model.spec, model.spec.sample_rate
    shortest = model.min_samples
    while int(model.position_count(torch.tensor(shortest))) < 2:
        shortest += model.logmel.hop
    inputs = [
        Port("waves", ("batch", "samples"), f"samples from -1 to 1, {rate} a second, one channel"),
        Port("lengths", ("batch",), "samples of each recording; what stands behind is not read"),
    ]
    if spec.languages:
        inputs.append(Port("prefix", ("batch", 2), "ids of a language and of a task"))

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        batch, samples = sizes["batch"], sizes["samples"]
        waves = 0.1 * torch.randn(batch, samples, generator=generator)
        lengths = torch.linspace(samples, max(samples // 2, shortest), batch).long()
        if not spec.languages:
            return waves, lengths
        prefix = torch.tensor([model.prefix_ids(spec.languages[0], spec.tasks[0])]).expand(batch, -1)
        return waves, lengths, prefix.contiguous()

    form = ExportForm(
        about="One pass over whole recordings.",
        module=model,
        inputs=tuple(inputs),
        outputs={
            "log_probs": f"of the tokens at every position; the first {model.prefix_length} are the prefix",
            "counts": "positions of each recording that are real, with the prefix",
        },
        axes={
            "batch": BATCH,
            "samples": Axis(shortest, LONGEST_SECONDS * rate, (rate + 3, shortest, 2 * rate + 117)),
        },
        draw=draw,
    )
    facts: dict[str, Any] = {
        "tokens": list(spec.tokens),
        "blank_id": 0,
        "sample_rate": rate,
        "seconds_per_position": model.seconds_per_position,
        "prefix_positions": model.prefix_length,
        "languages": {name: model.ids[f"<{name}>"] for name in spec.languages},
        "tasks": {name: model.ids[f"<{name}>"] for name in spec.tasks},
    }
    return Exports({"forward": form}, facts)
