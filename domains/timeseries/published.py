"""Published checkpoints of the scaling-law models for time series: what they are of, and their names.

Source: "Towards Neural Scaling Laws for Time Series Foundation Models" (https://arxiv.org/abs/2410.12360). A checkpoint
is a folder with ``model.safetensors``, as the hub's mixin for torch modules writes it::

    model = load_published("folder", context=1000, horizon=192)

Encoder or decoder, sizes and heads are read off the tensors. The authors' data have a raw 0 where a value is missing;
here it is the mean of its series, so that forecasts differ where much of a context is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vertebra.backbones.pretrained import load_state
from vertebra.backbones.tsfm import TSFMConfig
from vertebra.domains.conversion import Converter
from vertebra.domains.timeseries.heads import COMPONENTS, MixtureHead
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, LoadError

CONTEXT, HORIZON = 1000, 192
"""Steps of the paper's evaluation on long horizons."""

_WHO = "published TSFM"
_LAYER = {
    "norm1": ("norm1",),
    "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.q_norm": ("self_attn.q_norm",),
    "mixer.k_norm": ("self_attn.k_norm",),
    "mixer.proj": ("self_attn.out_proj",),
    "norm2": ("norm2",),
    "mlp.gate_proj": ("ffn.fc_gate",),
    "mlp.up_proj": ("ffn.fc1",),
    "mlp.down_proj": ("ffn.fc2",),
}
"""Parts of a layer by their names here and there; several are put together along their outputs."""


def published_names(depth: int, causal: bool) -> dict[str, tuple[str, ...]]:
    """Return what each parameter of a ``PatchForecaster`` is called in a checkpoint.

    Args:
        depth: Number of layers.
        causal: Whether it is a decoder, which has no mask token.

    Returns:
        ``{ours: (theirs, ...)}``; several are one of ours, put together along axis 0.
    """
    linears = ["in_proj", "param_proj.proj.weights_logits"]
    for component in range(COMPONENTS):
        linears += [f"param_proj.proj.components.{component}.{name}" for name in ("df", "loc", "scale")]
    names: dict[str, tuple[str, ...]]
    names = {f"{name}.{kind}": (f"{name}.{kind}",) for name in linears for kind in ("weight", "bias")}
    if not causal:
        names["mask_encoding.weight"] = ("mask_encoding.weight",)
    for layer in range(depth):
        for ours, theirs in _LAYER.items():
            parts = tuple(f"encoder.layers.{layer}.{name}.weight" for name in theirs)
            names[f"backbone.layers.{layer}.{ours}.weight"] = parts
    return names | {"backbone.norm.weight": ("encoder.norm.weight",)}


def published_config(tensors: Mapping[str, Tensor]) -> tuple[TSFMConfig, int]:
    """Work out the structure of a checkpoint from its tensors.

    Returns:
        The backbone, and the steps of a patch.

    Raises:
        LoadError: The tensors are not those of a scaling-law model.
    """
    if any("var_attn_bias" in name for name in tensors):
        raise LoadError(
            f"{_WHO}: the checkpoint has attention biases of variates (var_attn_bias), so it is Moirai's; give one of "
            "the scaling-law models."
        )
    first = "encoder.layers.0."
    keys = ("in_proj.weight", f"{first}self_attn.q_norm.weight", f"{first}ffn.fc1.weight")
    if missing := [name for name in keys if name not in tensors]:
        raise LoadError(f"{_WHO}: the checkpoint lacks {missing[0]!r}; give one of the scaling-law models.")
    embedding, norm, inner = (tensors[name] for name in keys)
    for name, tensor, axes in zip(keys, (embedding, norm, inner), (2, 1, 2), strict=True):
        if tensor.ndim != axes:
            raise LoadError(
                f"{_WHO}: {name!r} must have {axes} axes, got {tuple(tensor.shape)}; give one of the scaling-law "
                "models."
            )
    (dim, patch), (width,) = embedding.shape, norm.shape
    if dim % width or width % 4:
        raise LoadError(f"{_WHO}: a width of {dim} must be that of whole heads, each a multiple of 4; got {width}.")
    layers = [int(m[1]) for name in tensors if (m := re.match(r"encoder\.layers\.(\d+)\.", name))]
    config = TSFMConfig(
        dim=dim,
        depth=max(layers) + 1,
        causal="mask_encoding.weight" not in tensors,
        num_heads=dim // width,
        hidden_dim=inner.shape[0],
    )
    return config, patch


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint to those of a ``PatchForecaster``.

    Raises:
        LoadError: A tensor is missing, or there is one without a place.
    """
    config, _ = published_config(tensors)
    names = published_names(config.depth, config.causal)
    used = {name for theirs in names.values() for name in theirs}
    if missing := sorted(used - tensors.keys()):
        raise LoadError(
            f"{_WHO}: the checkpoint lacks {missing[0]!r}, {len(missing)} tensors in all; is the file whole?"
        )
    if extra := sorted(tensors.keys() - used):
        raise LoadError(
            f"{_WHO}: the model has no place for {extra[0]!r}, {len(extra)} tensors in all; give one of the "
            "scaling-law models."
        )
    return {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names.items()}


def to_published(model: PatchForecaster) -> dict[str, Tensor]:
    """Return copies of a model's weights by the names of the checkpoints, the inverse of ``from_published``.

    Raises:
        ConfigError: The model has parts that the published ones have not, or other ones.
    """
    config, own = model.backbone.config, model.state_dict()
    plain = isinstance(config, TSFMConfig) and isinstance(model.param_proj, MixtureHead) and model.readout == "patch"
    names = published_names(config.depth, config.causal)
    if not plain or model.tell_observed or own.keys() != names.keys():
        raise ConfigError(
            "to_published: the model must have a TSFM backbone, head=mixture, readout=patch and tell_observed=false, "
            "and neither covariates nor seasonal=true nor mode=multivariate."
        )
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        parts = own[ours].chunk(len(theirs))
        found |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return found


def load_published(path: str | Path, *, context: int = CONTEXT, horizon: int = HORIZON) -> PatchForecaster:
    """Build a model from a published checkpoint, with its weights, in evaluation mode.

    Args:
        path: The folder with ``model.safetensors``, and ``config.json`` if it is there; or the safetensors file.
        context: Steps that forecasts are made from, at most.
        horizon: Steps that an encoder forecasts in one pass; longer forecasts are made of several.

    Raises:
        LoadError: There is no such file, it cannot be read, or its tensors are not those of a scaling-law model.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise LoadError(
            f"{file}: no such safetensors file; give a folder that holds model.safetensors, or the file itself."
        )
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{file}: cannot be read as a safetensors file ({error}).") from error
    try:
        weights = from_published(tensors)
    except LoadError as error:
        raise LoadError(f"{file}: {error}") from error
    config, patch = published_config(tensors)
    _check_config(file.with_name("config.json"), config, patch)
    model = PatchForecaster(
        config.build(),
        SeriesSpec(context=context, horizon=horizon),
        patch=patch,
        head="mixture",
        readout="patch",
        tell_observed=False,
    )
    load_state(model, weights, source=f"the weights of {file}")
    return model.eval()


def _check_config(path: Path, config: TSFMConfig, patch: int) -> None:
    """Refuse a ``config.json`` that is of another model than the tensors beside it; what it does not say is not asked.

    Raises:
        LoadError: It cannot be read, or says otherwise.
    """
    if not path.is_file():
        return
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(told, dict):
        raise LoadError(f"{path}: must hold a JSON object; it is no configuration of a model.")
    expected = {"d_model": config.dim, "num_layers": config.depth, "patch_size": patch, "scaling": True}
    for name, value in expected.items():
        if told.get(name, value) != value:
            raise LoadError(
                f"{path}: {name} is {told[name]!r}, but the weights beside it need {value!r}; both files must be of "
                "one scaling-law model."
            )


CONVERTERS: tuple[Converter, ...] = ()
