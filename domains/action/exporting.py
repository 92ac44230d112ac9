"""Policies as programs: an observation to the actions of a chunk, in their units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.domains.action.model import ActionPolicy, DecoderPolicy
from vertebra.domains.exporting import BATCH, ExportForm, Exports, Port, draw_ids, refuse_step
from vertebra.errors import ConfigError


def exports(model: ActionPolicy, steps: bool, max_length: int | None) -> Exports:
    """Return the form of a policy, and the names of what it sees and does.

    Raises:
        ConfigError: Steps are wanted, or the policy writes token after token.
    """
    if isinstance(model, DecoderPolicy) and model.decoding == "autoregressive":
        raise ConfigError(
            "export: a DecoderPolicy with decoding=autoregressive chooses token after token by a grammar in Python; "
            "train one with decoding=parallel to export it."
        )
    if steps:
        raise refuse_step(model, "a chunk of actions is one pass")
    spec, tokenizer = model.spec, model.tokenizer
    inputs = [Port("states", ("batch", spec.history, len(spec.state_names)), "the last states, the current one last")]
    if spec.past_action or model.enforces_start:
        inputs.append(Port("start", ("batch", len(spec.action_names)), "the action before"))
    if spec.tasks:
        inputs.append(Port("tasks", ("batch",), "number of the task"))
    if spec.cameras:
        shape = ("batch", len(spec.cameras), spec.image_size, spec.image_size, 3)
        inputs.append(Port("images", shape, "RGB bytes of every camera"))
    mean, std = torch.tensor(spec.state_mean), torch.tensor(spec.state_std)

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        def one(port: Port) -> Tensor:
            shape = (sizes["batch"], *(int(s) for s in port.shape[1:]))
            if port.name == "images":
                return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            if port.name == "tasks":
                return draw_ids(shape, 0, len(spec.tasks), generator)
            drawn = torch.randn(shape, generator=generator)
            return drawn * std + mean if port.name == "states" else drawn

        return tuple(one(port) for port in inputs)

    form = ExportForm(
        about=f"One chunk: the next {tokenizer.horizon} actions, in their units.",
        module=_Act(model, tuple(port.name for port in inputs)),
        inputs=tuple(inputs),
        outputs={"actions": "of the next steps, in their units"},
        axes={"batch": BATCH},
        draw=draw,
    )
    facts: dict[str, Any] = {
        "fps": spec.fps,
        "states": list(spec.state_names),
        "actions": list(spec.action_names),
        "tasks": list(spec.tasks),
        "cameras": list(spec.cameras),
        "image_size": spec.image_size,
    }
    return Exports({"forward": form}, facts)


class _Act(nn.Module):
    """An observation, its parts by place, to actions."""

    def __init__(self, model: ActionPolicy, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model.act(dict(zip(self.names, tensors, strict=True)))
