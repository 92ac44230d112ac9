"""Published checkpoints of Moirai 1.0 and 1.1, read with one of their patch sizes.

Source: "Unified Training of Universal Time Series Forecasting Transformers" (https://arxiv.org/abs/2402.02592). A
checkpoint is a folder with ``model.safetensors`` and ``config.json``. Its embedding and its head exist once per patch
size, padded to the largest; a model here has one of them::

    conversion = MoiraiConverter(patch=16).convert(open_checkpoint("folder"))

The original tries all sizes on the end of each context and takes the best. It reads several variates as one sequence,
with a learned number added to attention between two variates and another within one; here each variate is read by
itself, where the latter is the same for all pairs and cancels in the softmax. Patches before the first known value are
not read; the original does read those that a caller did not mark as padding.

Heads: the logits of the mixture's four components are masked in the original as if they lay component by component in
the chosen patch size, but cut at the largest one. In a smaller patch some components' logits are therefore biases
alone. The weights that this leaves out are zeros here, and the numbers are the original's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.domains.conversion import Conversion, Converter, loaded, split_left_out
from vertebra.domains.model import DomainModel
from vertebra.domains.timeseries.heads import MoiraiHead
from vertebra.domains.timeseries.model import PatchForecaster
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
from vertebra.errors import LoadError

PATCH, CONTEXT, HORIZON = 32, 2048, 192
"""Steps of a patch, and those that forecasts are made from and reach, unless told otherwise."""

_GIVE = "a checkpoint of Moirai 1.0 or 1.1"
_BIAS = {
    r"encoder\.layers\.\d+\.self_attn\.var_attn_bias\.emb\.weight": "tells pairs within a variate from pairs of two; "
    "each variate is read by itself here, where it is one number for all pairs, which cancels in the softmax"
}
_EXPERTS = r"encoder\.layers\.\d+\.ffn\.experts\..*"
_DISTRIBUTIONS = "uni2ts.distribution."
_MIXTURE: dict[str, Any] = {
    "_target_": f"{_DISTRIBUTIONS}mixture.MixtureOutput",
    "components": [
        {"_target_": f"{_DISTRIBUTIONS}student_t.StudentTOutput"},
        {"_target_": f"{_DISTRIBUTIONS}normal.NormalFixedScaleOutput", "scale": MoiraiHead.NARROW},
        {"_target_": f"{_DISTRIBUTIONS}negative_binomial.NegativeBinomialOutput"},
        {"_target_": f"{_DISTRIBUTIONS}log_normal.LogNormalOutput"},
    ],
}
_NOTES = {
    "licence": "That of the checkpoint. Salesforce publishes the weights of Moirai 1.0 and 1.1 under CC BY-NC 4.0, "
    "which bars commercial use.",
}


class MoiraiConverter(Converter):
    """Moirai 1.x with one patch size.

    Args:
        patch: Which one: the original has 8, 16, 32, 64 and 128, smaller ones for slower frequencies.
        context: Steps that forecasts are made from, at most.
        horizon: Steps that are forecast in one pass; longer forecasts are made of several.
    """

    name = "moirai"
    summary = f"Moirai 1.0 and 1.1 (safetensors, config.json), with patches of {PATCH} and each variate by itself"

    def __init__(self, *, patch: int = PATCH, context: int = CONTEXT, horizon: int = HORIZON) -> None:
        self.patch, self.context, self.horizon = patch, context, horizon

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell by the config's patch sizes, or without a config by an embedding of several of them."""
        config = told(checkpoint)
        if config is None:
            return False
        if config:
            return "patch_sizes" in config and "d_model" in config
        tensors = tensors_of(checkpoint)
        embedding = tensors.get("in_proj.weight")
        return embedding is not None and embedding.ndim == 3 and "param_proj.proj.weights_logits.weight" in tensors

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make the model.

        Raises:
            LoadError: The checkpoint has no such patch size, takes too few patches, has another mixture or experts, or
                its tensors are not those that its config says.
        """
        who = checkpoint.source
        sizes = _patch_sizes(checkpoint, self.patch)
        self._check_config(checkpoint)
        if split_left_out(checkpoint.tensors, {_EXPERTS: ""})[1]:
            raise LoadError(f"{who}: has experts (ffn.experts), so it is Moirai-MoE; give {_GIVE}.")
        tensors, left = split_left_out(checkpoint.tensors, _BIAS)
        config = trunk_config(tensors, causal=False, who=who, give=_GIVE)
        for name, value in (("d_model", config.dim), ("num_layers", config.depth)):
            if checkpoint.config.get(name) != value:
                raise LoadError(
                    f"{who}: {name} is {checkpoint.config.get(name)!r} in config.json, but the weights beside it need "
                    f"{value!r}; both files must be of one model."
                )
        names, rows = trunk_names(config.depth), _sized_names()
        used = {name for theirs in names.values() for name in theirs} | rows.keys() | {"mask_encoding.weight"}
        check_names(tensors, used, who=who, give=_GIVE)
        weights = gathered(tensors, names) | {"mask_encoding.weight": tensors["mask_encoding.weight"]}
        index = sizes.index(self.patch)
        others = [size for size in sizes if size != self.patch]
        for name, parts in rows.items():
            weights[name] = _of_size(name, tensors[name], parts, sizes, index, config.dim, who)
            if others:
                slices = ",".join(str(i) for i in range(len(sizes)) if i != index)
                left[f"{name}[{slices}]"] = (
                    f"for patches of {', '.join(map(str, others))} steps; the model has patches of {self.patch}"
                )
        model = PatchForecaster(
            config.build(),
            SeriesSpec(context=self.context, horizon=self.horizon),
            patch=self.patch,
            head="moirai",
            readout="patch",
            tell_observed=False,
            missing="zero",
        )
        return loaded(model, weights, checkpoint, left_out=left, notes=_NOTES)

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and config of a Moirai that has the one patch size of the model, and no bias of variates.

        Raises:
            LoadError: The model is not of this architecture.
        """
        sized = _sized_names()
        names = trunk_names(model.backbone.config.depth)
        own = model.state_dict()
        if (
            not isinstance(model, PatchForecaster)
            or not plain_trunk(config := model.backbone.config)
            or config.causal
            or model.tell_observed
            or own.keys() != {*names, *sized, "mask_encoding.weight"}
        ):
            raise LoadError(
                "moirai: the model must have a bidirectional TSFM backbone, head=moirai, readout=patch and "
                "tell_observed=false, and neither covariates nor seasonal=true nor mode=multivariate."
            )
        heads = len(own["backbone.layers.0.mixer.qkv.weight"]) // 3 // len(own["backbone.layers.0.mixer.q_norm.weight"])
        hidden = len(own["backbone.layers.0.mlp.up_proj.weight"])
        if heads != config.dim // 64 or hidden != (int(4 * config.dim * 2 / 3) + 7) // 8 * 8:
            raise LoadError(
                f"moirai: a width of {config.dim} has {config.dim // 64} heads in this family and 8/3 of it between "
                f"the layers of SwiGLU, got {heads} and {hidden}."
            )
        tensors = scattered(own, names) | {"mask_encoding.weight": own["mask_encoding.weight"].clone()}
        tensors |= {name: own[name][None].clone() for name in sized}
        for layer in range(config.depth):
            key = f"encoder.layers.{layer}.self_attn.var_attn_bias.emb.weight"
            tensors[key] = torch.zeros(2, heads)
        return tensors, {
            "attn_dropout_p": 0.0,
            "d_model": config.dim,
            "distr_output": _MIXTURE,
            "dropout_p": 0.0,
            "max_seq_len": max(512, model.context_patches + model.future_patches),
            "num_layers": config.depth,
            "patch_sizes": [model.patch],
            "scaling": True,
        }

    def _check_config(self, checkpoint: Checkpoint) -> None:
        config, who = checkpoint.config, checkpoint.source
        if config.get("scaling", True) is not True:
            raise LoadError(f"{who}: scaling is {config['scaling']!r}; windows are always scaled here.")
        if (found := _distribution(config.get("distr_output"))) != _distribution(_MIXTURE):
            raise LoadError(
                f"{who}: distr_output is {found}; the head here is {_distribution(_MIXTURE)}, that of Moirai 1.0 and "
                "1.1."
            )
        most, needed = config.get("max_seq_len"), -(-self.context // self.patch) - (-self.horizon // self.patch)
        if isinstance(most, int) and needed > most:
            raise LoadError(
                f"{who}: max_seq_len is {most} patches, and {self.context} steps of context with {self.horizon} of "
                f"horizon make {needed} of {self.patch}; take fewer steps or larger patches."
            )


def _patch_sizes(checkpoint: Checkpoint, patch: int) -> list[int]:
    sizes = checkpoint.config.get("patch_sizes")
    if sizes is None:
        raise LoadError(
            f"{checkpoint.source}: config.json with patch_sizes must stand beside the weights, which do not tell them."
        )
    if not isinstance(sizes, list) or not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise LoadError(f"{checkpoint.source}: patch_sizes must be a list of numbers of steps, got {sizes!r}.")
    if patch not in sizes:
        raise LoadError(f"{checkpoint.source}: patch_sizes is {sizes}, without {patch}; take a patch of one of them.")
    return sizes


def _distribution(told: object) -> str:
    """Write a config's distribution in short: the names of its classes, and what they are given."""
    if not isinstance(told, Mapping):
        return repr(told)
    name = str(told.get("_target_")).rpartition(".")[2].removesuffix("Output")
    given = [_distribution(part) for part in parts] if isinstance(parts := told.get("components"), list) else []
    given += [f"{key}={value}" for key, value in told.items() if key not in ("_target_", "components")]
    return f"{name}({', '.join(given)})" if given else name


def _sized_names() -> dict[str, int]:
    """Return the tensors that exist for every patch size: rows of a step in the head, 0 for the embedding."""
    names = {f"in_proj.{kind}": 0 for kind in ("weight", "bias")}
    linears = {"weights_logits": MoiraiHead.components}
    linears |= {f"components.{component}.{name}": 1 for component, name in MoiraiHead.order}
    return names | {f"param_proj.proj.{n}.{kind}": rows for n, rows in linears.items() for kind in ("weight", "bias")}


def _of_size(name: str, tensor: Tensor, rows: int, sizes: list[int], index: int, dim: int, who: str) -> Tensor:
    """Cut what belongs to one patch size out of a tensor of all sizes.

    Args:
        name: What it is called.
        tensor: (sizes, D, largest) or (sizes, D) of the embedding, (sizes, rows * largest, D) or without D of the head.
        rows: Numbers of a step in the head; 0 for the embedding.
        sizes: Steps of a patch.
        index: Which one.
        dim: Width D.
        who: What to call the checkpoint in errors.

    Raises:
        LoadError: The tensor is of another shape.
    """
    patch, most, weight = sizes[index], max(sizes), name.endswith(".weight")
    inner = (rows * most,) if rows else (dim,)
    expected = (len(sizes), *inner, *(((dim,) if rows else (most,)) if weight else ()))
    if tuple(tensor.shape) != expected:
        raise LoadError(f"{who}: {name!r} must be of shape {expected} for its patch_sizes, got {tuple(tensor.shape)}.")
    own = tensor[index]
    if not rows:
        return own[:, :patch].clone() if weight else own.clone()
    if weight:  # the original masks rows behind the patch size's, as if they were laid out without padding
        own = own * (torch.arange(len(own)) < rows * patch)[:, None]
    return own.unflatten(0, (rows, most))[:, :patch].flatten(0, 1)
