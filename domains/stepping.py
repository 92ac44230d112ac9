"""Steps as programs: a causal model that reads its next positions and carries its state as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vertebra.backbones.fixed import FixedSteps
from vertebra.domains.exporting import BATCH, ExportForm, Port, lengths, longest


class StepModule(nn.Module):
    """One step as a function of tensors: new inputs, then the state; what is said of them, then the next state.

    Args:
        parts: What holds the weights, besides the backbone.
        read: Maps the new inputs, and the position of each item (B,), to features (B, T, D).
        say: Maps features (B, T, D) to what is said.
        steps: Of the backbone.
        inputs: Number of new inputs.
        kept: State tensors of the model's own that every step reads and none changes.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        read: Callable[..., Tensor],
        say: Callable[[Tensor], Tensor],
        steps: FixedSteps,
        inputs: int = 1,
        kept: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.backbone = steps.backbone
        self.read, self.say, self.steps, self.inputs, self.kept = read, say, steps, inputs, kept
        self.names = (*kept, *steps.empty(1))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map new inputs and state tensors, in the order of ``names``, to what is said and those that change."""
        state = dict(zip(self.names, tensors[self.inputs :], strict=True))
        own = {name: state.pop(name) for name in self.kept}
        x = self.read(*tensors[: self.inputs], state["position"], *own.values())
        y, state = self.steps(x, state)
        return (self.say(y), *(state[name] for name in self.names[len(own) :]))


def state_ports(state: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> tuple[Port, ...]:
    """Return the ports of state tensors (B, ...)."""
    known = {"position": "positions each item has read; 0 at the beginning", **(about or {})}
    return tuple(
        Port(name, ("batch", *t.shape[1:]), known.get(name, "state; 0 at the beginning")) for name, t in state.items()
    )


def step_form(
    module: StepModule,
    inputs: Sequence[Port],
    said: tuple[str, str],
    draw: Callable[[int, int, torch.Generator], tuple[Tensor, ...]],
    *,
    begin: Callable[[int, torch.Generator], tuple[Tensor, ...]] | None = None,
    state_about: Mapping[str, str] | None = None,
) -> ExportForm:
    """Return the form of a step.

    Args:
        module: The step.
        inputs: Its new inputs, whose second axis is ``length``.
        said: Name of what it says, and what that is.
        draw: Makes new inputs for B items of T positions.
        begin: Makes the state of B items before the first step; None for zeros.
        state_about: What the model's own state tensors hold.
    """
    steps, kept = module.steps, len(module.kept)
    start = begin or (lambda batch, _: tuple(steps.empty(batch).values()))
    shapes = dict(zip(module.names, start(1, torch.Generator().manual_seed(0)), strict=True))
    ports = state_ports(shapes, state_about)
    one = steps.most == 1
    axes = {"batch": BATCH} if one else {"batch": BATCH, "length": lengths(longest(steps.backbone, steps.max_len), 1)}

    def sample(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        batch, state = sizes["batch"], start(sizes["batch"], generator)
        for _ in range(3):  # so that the state holds something
            state = (*state[:kept], *module(*draw(batch, 1, generator), *state)[1:])
        return (*draw(batch, sizes.get("length", 1), generator), *(t.clone() for t in state))

    fixed = tuple(Port(p.name, tuple(1 if one and s == "length" else s for s in p.shape), p.about) for p in inputs)
    return ExportForm(
        about="Reads the next positions of each item and returns what is said of them and the next state. Every state "
        f"tensor has the item first; attention keeps {steps.max_len} positions and forgets earlier ones.",
        module=module,
        inputs=(*fixed, *ports),
        outputs={said[0]: said[1], **{f"next.{p.name}": f"{p.name} of the next call" for p in ports[kept:]}},
        axes=axes,
        draw=sample,
        state={f"next.{p.name}": p.name for p in ports[kept:]},
    )
