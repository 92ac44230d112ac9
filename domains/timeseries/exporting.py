"""Forecasters as programs: a context to the mean and quantiles of one horizon, in the units of the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.domains.exporting import BATCH, Axis, ExportForm, Exports, Port, draw_ids, refuse_step
from vertebra.domains.timeseries.model import PatchForecaster

MOST_VARIATES = 4096


def exports(model: PatchForecaster, steps: bool, max_length: int | None) -> Exports:
    """Return the form of a model, and the levels of its quantiles.

    Raises:
        ConfigError: Steps are wanted.
    """
    if steps:
        raise refuse_step(model, "a forecast is one pass; a longer one goes on from its quantiles, see the model")
    spec = model.spec
    horizon = model.patch if model.stepwise else spec.horizon
    variates: int | str = len(spec.variates) if model.mode == "multivariate" else "variates"
    axes = {"batch": BATCH}
    if isinstance(variates, str):
        axes["variates"] = Axis(1, MOST_VARIATES, (3, 1, 2))
    inputs = [
        Port("values", ("batch", variates, spec.context), "the last steps, oldest first; 0 where not observed"),
        Port("observed", ("batch", variates, spec.context), "which of them are known; the first of a short series "
             "are not"),
    ]  # fmt: skip
    if spec.past:
        inputs.append(Port("past", ("batch", len(spec.past), spec.context), "covariates: " + ", ".join(spec.past)))
    if spec.known:
        shape = ("batch", len(spec.known), spec.context + horizon)
        inputs.append(Port("known", shape, "covariates that reach beyond the end: " + ", ".join(spec.known)))
    if model.seasonal:
        inputs.append(Port("season", ("batch",), "steps of a season; 1 for none"))

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        batch = sizes["batch"]
        shape = (batch, sizes.get("variates", len(spec.variates)), spec.context)
        observed = torch.rand(shape, generator=generator) > 0.1
        observed[-1, 0, : spec.context // 3] = False
        walk = torch.randn(shape, generator=generator).cumsum(-1) / spec.context**0.5
        drawn = [walk.masked_fill(~observed, 0), observed]
        more = [(batch, *(int(size) for size in port.shape[1:])) for port in inputs if port.name in MORE]
        drawn += [torch.randn(wanted, generator=generator) for wanted in more]
        return (*drawn, draw_ids((batch,), 1, 25, generator)) if model.seasonal else tuple(drawn)

    told = not model.param_proj.density and model.param_proj.quantiles(torch.zeros(1, model.param_proj.numbers, 1),
                                                                       spec.quantiles) is not None  # fmt: skip
    outputs = {"mean": "expected value of each step ahead"}
    if told:
        outputs["quantiles"] = "of each step ahead, by level"
    if model.param_proj.density:
        outputs |= {
            "numbers": "of a mixture of four Student-t: four log weights, df, loc and scale, in scaled units",
            "loc": "a value is loc + scale times a scaled one",
            "scale": "see loc",
        }
    form = ExportForm(
        about=f"One pass: the next {horizon} steps. Values must be as the facts' center and scale say, where they do.",
        module=_Forecast(model, tuple(port.name for port in inputs), told),
        inputs=tuple(inputs),
        outputs=outputs,
        axes=axes,
        draw=draw,
    )
    facts: dict[str, Any] = {
        "context": spec.context,
        "horizon": horizon,
        "quantiles": list(spec.quantiles) if told else [],
        "center": list(spec.center),
        "scale": list(spec.scale),
    }
    return Exports({"forward": form}, facts)


MORE = ("past", "known")


class _Forecast(nn.Module):
    """A context to what is forecast, in the units of its values."""

    def __init__(self, model: PatchForecaster, names: tuple[str, ...], told: bool) -> None:
        super().__init__()
        self.model, self.names, self.told = model, names, told

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        numbers, loc, scale = model(**dict(zip(self.names, tensors, strict=True)))
        plain = numbers.sinh() if model.squash else numbers
        mean = (model.param_proj.mean(plain) * scale + loc).float()  # (B, V, H)
        if model.param_proj.density:
            return mean, numbers, loc.float(), scale.float()
        if not self.told:
            return (mean,)
        quantiles = model._quantiles(numbers, model.spec.quantiles, loc, scale)
        assert quantiles is not None
        return mean, quantiles
