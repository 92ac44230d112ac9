"""Steps of causal backbones as functions of tensors whose shapes never change.

What ``torch.export`` needs, and what another runtime can decode with: ``step`` of a backbone takes an object and
changes it, these steps take the state as tensors by name and return the next ones. The first axis of every tensor is
the item, so that beams are chosen by taking rows, and items that have read differently many positions go together.

Attention keeps the last ``max_len`` positions, or as many as its window sees; earlier ones are forgotten without a
word. Mamba keeps what it keeps elsewhere, the Axial Transformer the columns of ``max_len`` positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vertebra.backbones.axial import Axial
from vertebra.backbones.base import Backbone, State
from vertebra.backbones.ebranchformer import EBranchformerState, LayerState
from vertebra.backbones.layers.attention import AttentionState, FixedKeys
from vertebra.backbones.layers.axial import AxialState
from vertebra.backbones.layers.mamba1 import Mamba1
from vertebra.backbones.layers.mixer import MixerState
from vertebra.backbones.layers.recurrent import RecurrentState
from vertebra.backbones.opt import OPTState
from vertebra.backbones.stack import StackState
from vertebra.errors import ConfigError


class FixedSteps:
    """The steps of one backbone.

    Args:
        backbone: A causal one.
        max_len: Most positions.
        row: Width of the rows of a grid that an ``Axial`` reads; None for its own.

    Attributes:
        most: Most positions of one step; None for any number.

    Raises:
        ConfigError: The backbone is not causal, or its state has no fixed shape.
    """

    def __init__(self, backbone: Backbone, max_len: int, row: int | None = None) -> None:
        if max_len < 1:
            raise ConfigError(f"FixedSteps: max_len must be at least 1, got {max_len}.")
        self.backbone, self.max_len = backbone, max_len
        self.most: int | None = None
        if isinstance(backbone, Axial):
            self.most = 1
            self._made: State = backbone.init_state(1, max_len, row=row)
        else:
            self._made = backbone.init_state(1, max_len)
            if not isinstance(self._made, StackState):
                raise ConfigError(
                    f"{type(backbone).__name__} has no steps of a fixed shape: what it keeps grows with every group. "
                    "Use its `step` in Python."
                )
            if any(isinstance(module, Mamba1) for module in backbone.modules()):
                self.most = 1  # a program of more would have to be written for one number of them

    def empty(self, batch: int) -> dict[str, Tensor]:
        """Return the state of ``batch`` items that have read nothing, tensors (B, ...) by name."""
        found = {"position": torch.zeros(batch, dtype=torch.long)}
        if isinstance(self._made, AxialState):
            rows = -(-self.max_len // self._made.row)
            for name, tensor in self._made.tensors.items():
                shape = list(tensor.shape)
                if name in self._made.free:
                    shape[self._made.free[name]] = rows
                found[name] = tensor.new_zeros(batch, *shape[1:])
            return found
        for index, layer in enumerate(self._layers()):
            found |= {f"layers.{index}.{name}": t.new_zeros(batch, *t.shape[1:]) for name, t in _held(layer).items()}
        return found

    def __call__(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Map the next positions x (B, T, D) to (B, T, D), and return the state after them.

        Args:
            x: Features of the next positions.
            tensors: Of ``empty``, or returned by an earlier call; they are not changed.
        """
        state, position = self.state_of(tensors), tensors["position"]
        y = self.backbone.step(x, state)
        if isinstance(state, AxialState):
            return y, dict(state.tensors)
        found = {"position": position + x.shape[1]}
        assert isinstance(state, StackState)
        for index, layer in enumerate(state.layers):
            found |= {f"layers.{index}.{name}": tensor for name, tensor in _tensors(layer).items()}
        return y, found

    def state_of(self, tensors: Mapping[str, Tensor]) -> State:
        """Return an object for ``step`` of the backbone that holds the tensors, or copies of what it changes."""
        position = tensors["position"]
        batch = position.shape[0]
        if isinstance(self._made, AxialState):
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            state = AxialState(copies, self._made.growth, self._made.free, self.max_len)
            state.column, state.fixed = None, True  # items stand where they stand
            return state
        layers = []
        for index, layer in enumerate(self._layers()):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layers.append(_filled(layer, own, position))
        if isinstance(self._made, EBranchformerState):
            return EBranchformerState(layers, position)
        if isinstance(self._made, OPTState):
            opt = OPTState(layers, batch)
            opt.real = position
            return opt
        return StackState(layers, batch)

    def _layers(self) -> list[MixerState]:
        assert isinstance(self._made, StackState)
        return self._made.layers


def _held(layer: MixerState) -> dict[str, Tensor]:
    """Return what is kept for a layer, in its final shape but for the batch."""
    if isinstance(layer, AttentionState):
        shape = (1, layer.keys.shape[1], layer.capacity, layer.keys.shape[3])
        return {"keys": layer.keys.new_zeros(shape), "values": layer.values.new_zeros(shape)}
    if isinstance(layer, LayerState):
        inner = {f"attention.{name}": tensor for name, tensor in _held(layer.attention).items()}
        return {**inner, **layer.columns}
    if isinstance(layer, RecurrentState):
        return {"conv": layer.conv, "ssm": layer.ssm}
    raise ConfigError(f"{type(layer).__name__} has no fixed shape.")


def _filled(layer: MixerState, own: dict[str, Tensor], position: Tensor) -> MixerState:
    """Return a state like ``layer`` that holds the tensors ``own``."""
    if isinstance(layer, LayerState):
        inner = FixedKeys(own["attention.keys"], own["attention.values"], position)
        return LayerState(inner, {name: own[name] for name in layer.columns})
    if isinstance(layer, RecurrentState):
        return RecurrentState(own["conv"], own["ssm"].clone())  # a single step changes it in place
    return FixedKeys(own["keys"], own["values"], position)


def _tensors(layer: MixerState) -> dict[str, Tensor]:
    if isinstance(layer, LayerState):
        inner = {f"attention.{name}": tensor for name, tensor in _tensors(layer.attention).items()}
        return {**inner, **layer.columns}
    if isinstance(layer, RecurrentState):
        return {"conv": layer.conv, "ssm": layer.ssm}
    assert isinstance(layer, FixedKeys)
    return {"keys": layer.keys, "values": layer.values}
