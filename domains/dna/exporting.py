"""DNA models as programs: ids to logits, and the step of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.backbones.fixed import FixedSteps
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.exporting import (
    BATCH,
    ExportForm,
    Exports,
    Port,
    draw_ids,
    lengths,
    longest,
    refuse_step,
)
from vertebra.domains.stepping import StepModule, step_form

IDS = "token ids; [PAD] at padding, which changes nothing"


def exports(model: DNALanguageModel | DNAClassifier, steps: bool, max_length: int | None) -> Exports:
    """Return the forms of a model, and the tokens.

    Raises:
        ConfigError: Steps are wanted of a model that does not write.
    """
    tokenizer, spec = model.tokenizer, model.spec
    low, high = min(tokenizer.base_ids), max(tokenizer.base_ids) + 1
    writes = isinstance(model, DNALanguageModel)
    most = longest(model.backbone, spec.max_length)
    if isinstance(model, DNAClassifier) and model.pooling in ("echo", "rc_echo"):  # reads everything twice
        most = min(most, longest(model.backbone, 2 * spec.max_length) // 2)

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        ids = draw_ids((sizes["batch"], sizes["length"]), low, high, generator)
        if sizes["length"] > 5:
            ids[-1, -3:] = model.pad_id
        return (ids,)

    outputs = {"logits": "of the next token at every position" if writes else "of the classes, or standardised numbers"}
    if writes and not model.backbone.config.causal:
        outputs = {"logits": "of the token at every position"}
    forms = {
        "forward": ExportForm(
            about="One pass over whole sequences.",
            module=model,
            inputs=(Port("ids", ("batch", "length"), IDS),),
            outputs=outputs,
            axes={"batch": BATCH, "length": lengths(most)},
            draw=draw,
        )
    }
    if steps:
        if not isinstance(model, DNALanguageModel) or not model.backbone.config.causal:
            raise refuse_step(model, "it writes nothing token after token")
        fixed = FixedSteps(model.backbone, max_length or longest(model.backbone, max(spec.max_length, 64)))
        module = StepModule(
            {"embed": model.embed, "head": model.head}, lambda ids, position: model.embed(ids), model.head, fixed
        )
        forms["step"] = step_form(
            module,
            [Port("ids", ("batch", "length"), "the next token ids, without padding")],
            ("logits", "of the token that follows each of the new ones"),
            lambda batch, length, generator: (draw_ids((batch, length), low, high, generator),),
        )
    facts: dict[str, Any] = {
        "tokens": list(tokenizer.tokens),
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "begins_with_bos": spec.bos,
        "labels": {name: tokenizer.vocab_size + i for i, name in enumerate(spec.classes)} if spec.task == "lm" else {},
        "classes": list(spec.classes) if spec.task != "lm" else [],
        "targets": list(spec.targets),
        "target_mean": list(spec.target_mean),
        "target_std": list(spec.target_std),
    }
    return Exports(forms, facts)
