"""What of a model learns: all of it, the head, one layer after the other, or low-rank adapters.

Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) are those of ``peft``: beside a frozen projection W stands
B A * alpha / rank, of which A and B learn. Before a model is saved, they are added to W. Gradual unfreezing is that of
ULMFiT (https://arxiv.org/abs/1801.06146, section 3.3).
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.errors import ConfigError, MissingExtraError

M = TypeVar("M", bound=nn.Module)

_ADAPTER = "default"  # peft's name for the one set of adapters there is


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What learns.

    Args:
        train: ``all``; ``head``: the backbone keeps its weights, what stands before and behind it learns; ``gradual``:
            so at first, then the backbone's layers join in from the last to the first.
        every: Of ``gradual``: when the next layer joins in, after so many epochs, or a fraction of all steps when
            below 1.
        lora_rank: Rank of the adapters beside the backbone's projections; all else in the backbone keeps its weights.
            0 for none.
        lora_alpha: Adapters count ``lora_alpha / lora_rank``.
        lora_dropout: Share of an adapter's inputs that is zeroed in training.
        lora_targets: Names of the projections that have adapters, such as ``qkv``, or patterns of whole names, such as
            ``layers.[0-3].*``; one, or a list; none for all of them.
    """

    train: Literal["all", "head", "gradual"] = "all"
    every: float = 1.0
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", self.targets)  # a list where it comes from JSON
        if self.train not in ("all", "head", "gradual"):
            raise ConfigError(f"tune.train must be all, head or gradual, got {self.train!r}.")
        if not self.every > 0:
            raise ConfigError(f"tune.every must be above 0, got {self.every}.")
        if self.lora_rank < 0 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                "tune: lora_rank must be at least 0, lora_alpha at least 1 and lora_dropout from 0 and below 1, got "
                f"{self.lora_rank}, {self.lora_alpha} and {self.lora_dropout}."
            )
        if self.lora_rank and self.train != "all":
            raise ConfigError(
                f"tune.train={self.train} and tune.lora_rank={self.lora_rank} do not go together: with adapters all "
                "else in the backbone is frozen; leave one of them out."
            )
        if self.lora_targets and not self.lora_rank:
            raise ConfigError("tune.lora_targets needs adapters; set tune.lora_rank, such as 8.")

    @property
    def targets(self) -> tuple[str, ...]:
        """``lora_targets``, also where one word was given."""
        return (self.lora_targets,) if isinstance(self.lora_targets, str) else tuple(self.lora_targets)

    @property
    def lora_scale(self) -> float:
        """What the adapters' product is multiplied by."""
        return self.lora_alpha / self.lora_rank

    def open_layers(self, layers: int, epoch: int, step: int, steps: float) -> int:
        """Return how many of a backbone's layers learn, counted from the last.

        Args:
            layers: How many there are.
            epoch: The current one, from 0.
            step: Optimizer steps taken.
            steps: Optimizer steps of the whole run.

        Raises:
            ConfigError: A share of a run without end.
        """
        if self.train != "gradual":
            return 0 if self.train == "head" else layers
        if self.every >= 1:
            return min(layers, math.floor(epoch / self.every))
        if not math.isfinite(steps):
            raise ConfigError(
                f"tune.every={self.every} is a share of the run, which has no end; set trainer.max_steps or "
                "trainer.max_epochs, or count epochs with tune.every=1."
            )
        return min(layers, step // max(1, round(self.every * steps)))

    def never_open(self, layers: int, epochs: int, steps: float) -> str:
        """Say that gradual unfreezing does not reach all layers in a run, and what would; nothing where it does.

        Args:
            layers: How many the backbone has.
            epochs: Of the run.
            steps: Optimizer steps of the run.
        """
        if self.train != "gradual" or epochs < 1 or not 1 <= steps < math.inf:
            return ""
        opened = self.open_layers(layers, epochs - 1, int(steps) - 1, steps)
        if opened >= layers:
            return ""
        share = math.floor(1000 / (layers + 1)) / 1000
        longer = f", or train {math.ceil(self.every * layers) + 1} epochs" if self.every >= 1 else ""
        return (
            f"tune.train=gradual with tune.every={self.every:g} opens {opened} of {layers} layers in {epochs} "
            f"epoch{'s' * (epochs != 1)}, and the others keep their weights; to open all, set tune.every={share:g} (a "
            f"share of the run){longer}."
        )


def check_initial(tune: TuneConfig, given: bool) -> None:
    """Refuse to keep the weights of a backbone that has none from elsewhere.

    Args:
        tune: What learns.
        given: Whether there are initial weights.

    Raises:
        ConfigError: There are none.
    """
    if tune.train != "all" and not given:
        raise ConfigError(
            f"tune.train={tune.train} keeps the backbone's weights, which are random here; name a trained model with "
            "--init_from MODEL, or leave tune.train out."
        )


# ---------------------------------------------------------------- layers that learn


def is_open(backbone: Backbone, name: str, open_layers: int) -> bool:
    """Whether the parameter ``name`` of a backbone learns, when so many of its layers do.

    What follows the last layer learns with it.
    """
    return open_layers > 0 and backbone.layer_of(name) >= backbone.num_layers - open_layers


def set_modes(backbone: Backbone, open_layers: int) -> None:
    """Let the layers that keep their weights run without dropout."""
    backbone.train(open_layers > 0)
    if 0 < open_layers < backbone.num_layers:
        for name, module in backbone.named_modules():
            own = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
            if name and own and not any(is_open(backbone, inner, open_layers) for inner in own):
                module.eval()


def drop_gradients(backbone: Backbone, open_layers: int) -> None:
    """Drop the gradients of the layers that keep their weights for now.

    Their parameters keep ``requires_grad``: DDP only synchronises those that had it at the start.
    """
    if open_layers < backbone.num_layers:
        for name, parameter in backbone.named_parameters():
            if not is_open(backbone, name, open_layers):
                parameter.grad = None


# ---------------------------------------------------------------- low-rank adapters


def add_adapters(backbone: Backbone, tune: TuneConfig) -> list[str]:
    """Put an adapter beside the projections of a backbone, and freeze the rest of it.

    Returns:
        Names of the projections.

    Raises:
        ConfigError: A target is no projection of the backbone.
        MissingExtraError: The package ``peft`` is not installed.
    """
    targets = find_targets(backbone, tune.targets)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("peft", "lora", f"tune.lora_rank={tune.lora_rank}") from None
    config = LoraConfig(
        r=tune.lora_rank, lora_alpha=tune.lora_alpha, lora_dropout=tune.lora_dropout, target_modules=targets
    )
    inject_adapter_in_model(config, backbone, adapter_name=_ADAPTER)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return targets


def find_targets(backbone: Backbone, wanted: tuple[str, ...]) -> list[str]:
    """Return the full names of the projections that are meant, all of them when none is named.

    Raises:
        ConfigError: A name or pattern fits none.
    """
    known = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    found = set() if wanted else set(known)
    for word in wanted:
        fits = {n for n in known if n.rpartition(".")[2] == word or fnmatch.fnmatchcase(n, word)}
        if not fits:
            names = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in known))
            raise ConfigError(
                f"tune.lora_targets: {word!r} is no projection of {type(backbone).__name__}; there are {names}, or "
                f"patterns of whole names such as {known[0]!r}."
            )
        found |= fits
    return [name for name in known if name in found]


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Return the adapted projections of a model by name; their ``base_layer`` is the projection itself."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def idle_adapters(backbone: Backbone) -> list[str]:
    """Return the adapted projections that got no gradient in a backward pass."""
    found = _adapted(backbone).items()
    return [name for name, module in found if module.lora_B[_ADAPTER].weight.grad is None]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Take the adapters out, so that tensors have their ordinary names, and put them back."""
    held = _adapted(model)
    for name, module in held.items():
        model.set_submodule(name, module.base_layer)
    try:
        yield
    finally:
        for name, module in held.items():
            model.set_submodule(name, module)


def merged(model: M) -> M:
    """Return the model with its adapters added to the projections: a copy with ordinary names, all of which learn."""
    if not _adapted(model):
        return model
    whole = copy.deepcopy(model)
    for name, module in _adapted(whole).items():
        module.merge(safe_merge=True)  # refuses what is not finite
        whole.set_submodule(name, module.base_layer)
    return whole.requires_grad_(True)


def merge_tensors(tensors: Mapping[str, Tensor], tune: TuneConfig) -> dict[str, Tensor]:
    """Return the tensors of a model with adapters, as a checkpoint has them, as those of the merged model."""
    found = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        part, base, leaf = name.rpartition(".base_layer.")
        if base and leaf == "weight":
            a, b = (tensors[f"{part}.lora_{side}.{_ADAPTER}.weight"] for side in "AB")
            tensor = tensor + (b @ a) * tune.lora_scale
        found[f"{part}.{leaf}" if base else name] = tensor
    return found
