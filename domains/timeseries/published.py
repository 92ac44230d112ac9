"""Published checkpoints of the scaling-law models for time series: what they are of, and their names.

Source: "Towards Neural Scaling Laws for Time Series Foundation Models" (https://arxiv.org/abs/2410.12360). A checkpoint
is a folder with ``model.safetensors``, as the hub's mixin for torch modules writes it::

    model = load_published("folder", context=1000, horizon=192)

Encoder or decoder, sizes and heads are read off the tensors. The authors' data have a raw 0 where a value is missing.
``TSFMConverter`` keeps that; ``load_published`` reads the mean of the series there, unless told ``missing="zero"``, so
that its forecasts differ where much of a context is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.tsfm import TSFMConfig
from vertebra.domains.conversion import Conversion, Converter, loaded
from vertebra.domains.model import DomainModel
from vertebra.domains.timeseries.heads import COMPONENTS, MixtureHead
from vertebra.domains.timeseries.model import Missing, PatchForecaster
from vertebra.domains.timeseries.published_chronos import ChronosBoltConverter
from vertebra.domains.timeseries.published_moirai import MoiraiConverter
from vertebra.domains.timeseries.published_trunk import (
    check_names,
    gathered,
    plain_trunk,
    scattered,
    tensors_of,
    told,
    trunk_config,
    trunk_names,
)
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, LoadError

CONTEXT, HORIZON = 1000, 192
"""Steps of the paper's evaluation on long horizons."""

_WHO = "published TSFM"
_GIVE = "one of the scaling-law models"


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
    return names | trunk_names(depth)


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
    if "in_proj.weight" not in tensors:
        raise LoadError(f"{_WHO}: the checkpoint lacks 'in_proj.weight'; give {_GIVE}.")
    embedding = tensors["in_proj.weight"]
    if embedding.ndim != 2:
        raise LoadError(f"{_WHO}: 'in_proj.weight' must have 2 axes, got {tuple(embedding.shape)}; give {_GIVE}.")
    causal = "mask_encoding.weight" not in tensors
    return trunk_config(tensors, causal=causal, who=_WHO, give=_GIVE), embedding.shape[1]


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint to those of a ``PatchForecaster``.

    Raises:
        LoadError: A tensor is missing, or there is one without a place.
    """
    config, _ = published_config(tensors)
    names = published_names(config.depth, config.causal)
    check_names(tensors, {name for theirs in names.values() for name in theirs}, who=_WHO, give=_GIVE)
    return gathered(tensors, names)


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
    return scattered(own, names)


def load_published(
    path: str | Path, *, context: int = CONTEXT, horizon: int = HORIZON, missing: Missing = "mean"
) -> PatchForecaster:
    """Build a model from a published checkpoint, with its weights, in evaluation mode.

    Args:
        path: The folder with ``model.safetensors``, and ``config.json`` if it is there; or the safetensors file.
        context: Steps that forecasts are made from, at most.
        horizon: Steps that an encoder forecasts in one pass; longer forecasts are made of several.
        missing: What a value that is not known is read as, see ``PatchForecaster``.

    Raises:
        LoadError: There is no such file, it cannot be read, or its tensors are not those of a scaling-law model.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise LoadError(
            f"{file}: no such safetensors file; give a folder that holds model.safetensors, or the file itself."
        )
    model = TSFMConverter(context=context, horizon=horizon, missing=missing).convert(Checkpoint(str(file), file)).model
    assert isinstance(model, PatchForecaster)
    return model


class TSFMConverter(Converter):
    """The scaling-law models.

    Args:
        context: Steps that forecasts are made from, at most.
        horizon: Steps that an encoder forecasts in one pass.
        missing: What a value that is not known is read as: ``zero`` as the original does, or ``mean``.
    """

    name = "tsfm"
    summary = "encoders and decoders of the scaling laws for time series (safetensors)"

    def __init__(self, *, context: int = CONTEXT, horizon: int = HORIZON, missing: Missing = "zero") -> None:
        self.context, self.horizon, self.missing = context, horizon, missing

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell by the names of embedding, trunk and head; Moirai has several sizes of patches instead of one."""
        config = told(checkpoint)
        if config is None or "patch_sizes" in config or (config and "d_model" not in config):
            return False
        tensors = tensors_of(checkpoint)
        keys = ("in_proj.weight", "encoder.layers.0.self_attn.q_norm.weight", "param_proj.proj.weights_logits.weight")
        if any(name not in tensors for name in keys):
            return False
        return tensors[keys[0]].ndim == 2 and not any("var_attn_bias" in name for name in tensors)

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make the model; what the tensors do not say is ``context`` and ``horizon``.

        Raises:
            LoadError: The tensors, or the settings beside them, are not those of a scaling-law model.
        """
        tensors = checkpoint.tensors
        try:
            weights = from_published(tensors)
            config, patch = published_config(tensors)
        except LoadError as error:
            raise LoadError(f"{checkpoint.source}: {error}") from error
        _check_config(checkpoint, config, patch)
        model = PatchForecaster(
            config.build(),
            SeriesSpec(context=self.context, horizon=self.horizon),
            patch=patch,
            head="mixture",
            readout="patch",
            tell_observed=False,
            missing=self.missing,
        )
        return loaded(model, weights, checkpoint)

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and the sizes that say what they are of.

        Raises:
            LoadError: The model is not of this architecture.
        """
        if not isinstance(model, PatchForecaster) or not plain_trunk(model.backbone.config):
            raise LoadError("tsfm: the model must be a forecaster with a TSFM backbone of the published constants.")
        try:
            tensors = to_published(model)
        except ConfigError as error:
            raise LoadError(f"tsfm: {error}") from error
        config = model.backbone.config
        sizes = {"d_model": config.dim, "num_layers": config.depth, "patch_size": model.patch, "scaling": True}
        return tensors, sizes


def _check_config(checkpoint: Checkpoint, config: TSFMConfig, patch: int) -> None:
    """Refuse a ``config.json`` that is of another model than the tensors beside it; what it does not say is not asked.

    Raises:
        LoadError: It cannot be read, or says otherwise.
    """
    expected = {"d_model": config.dim, "num_layers": config.depth, "patch_size": patch, "scaling": True}
    for name, value in expected.items():
        if checkpoint.config.get(name, value) != value:
            raise LoadError(
                f"{checkpoint.folder / 'config.json'}: {name} is {checkpoint.config[name]!r}, but the weights beside "
                f"it need {value!r}; both files must be of one scaling-law model."
            )


CONVERTERS: tuple[Converter, ...] = (TSFMConverter(), MoiraiConverter(), ChronosBoltConverter())
