"""Language models as programs: ids to logits or features, and the step of a causal one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vertebra.backbones.fixed import FixedSteps
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
from vertebra.domains.language.model import LanguageEncoder, LanguageModel
from vertebra.domains.stepping import StepModule, step_form


def exports(model: LanguageEncoder, steps: bool, max_length: int | None) -> Exports:
    """Return the forms of a model, and its special tokens; the tokenizer is not the model's.

    Raises:
        ConfigError: Steps are wanted of a model that does not write.
    """
    spec, writes = model.spec, isinstance(model, LanguageModel)

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        return (draw_ids((sizes["batch"], sizes["length"]), 0, spec.vocab_size, generator),)

    said = ("logits", "of the next token at every position") if writes else ("features", "of every position")
    forms = {
        "forward": ExportForm(
            about="One pass over whole texts without padding; behind a causal model padding may stand on the right.",
            module=model,
            inputs=(Port("ids", ("batch", "length"), "token ids"),),
            outputs=dict([said]),
            axes={"batch": BATCH, "length": lengths(longest(model.backbone, spec.max_length))},
            draw=draw,
        )
    }
    if steps:
        if not isinstance(model, LanguageModel) or not model.backbone.config.causal:
            raise refuse_step(model, "it writes nothing token after token")
        fixed = FixedSteps(model.backbone, max_length or longest(model.backbone, spec.max_length or 1024))
        module = StepModule(
            {"embed": model.embed, "head": model.head}, lambda ids, position: model.embed(ids), model.head, fixed
        )
        forms["step"] = step_form(
            module,
            [Port("ids", ("batch", "length"), "the next token ids, without padding")],
            ("logits", "of the token that follows each of the new ones"),
            lambda batch, length, generator: (draw_ids((batch, length), 0, spec.vocab_size, generator),),
        )
    facts = {"bos_id": spec.bos_id, "eos_ids": list(spec.eos_ids), "pad_id": spec.pad_id}
    return Exports(forms, facts)
