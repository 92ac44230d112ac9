"""Any backbone on patches of time series: forecasts as distributions, quantiles or means.

A window of context is scaled by its own mean and standard deviation, cut into patches, and embedded. What is read
depends on ``readout``:

- ``patch``, bidirectional backbone: the patches to forecast stand behind the context as mask tokens, and each says what
  its own time points are. ``patch``, causal backbone: each position says what the next patch is; patches are forecast
  one after the other. With a mixture these are the two models of the scaling-law paper
  (https://arxiv.org/abs/2410.12360), which also train on packed rows, see ``packed``.
- ``flatten``: one linear map from all positions to all steps, as in PatchTST (https://arxiv.org/abs/2211.14730).

Forecasts beyond the horizon of one pass go on from the quantile paths of the pass before, and join what all paths say,
so that uncertainty does not shrink. Nothing is sampled: a series has the same forecast in any batch.

Shapes: B windows, V variates, T context steps, H steps to forecast, P steps of a patch, N patches, D width, K numbers
of the head a time point, Q levels, L paths, R packed rows, S patches of a row, Cp past and Ck known covariates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.domains.adapting import Adapter, by_name, fresh, resampled
from vertebra.domains.batching import Batch
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.timeseries.heads import DENSITIES, HeadName, build_head
from vertebra.domains.timeseries.paths import KNOTS, PATHS, join_paths, spread
from vertebra.domains.timeseries.scaling import CHANNELS, packed_statistics, seasonal_channels, window_statistics
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, ShapeError

Mode = Literal["independent", "multivariate"]
Readout = Literal["patch", "flatten"]
Space = Literal["instance", "data"]
Missing = Literal["mean", "zero"]


@dataclass(frozen=True)
class Forecast:
    """Forecasts of a batch, in the units of its values.

    Args:
        mean: (B, V, H).
        quantiles: (B, V, Q, H); None from a model of means.
    """

    mean: Tensor
    quantiles: Tensor | None


class PatchForecaster(DomainModel):
    """Patches in, forecasts out.

    Args:
        backbone: Reads the patches.
        spec: Facts about the data.
        patch: Steps P of a patch.
        stride: Steps from one patch to the next; 0 for P. Another one needs ``readout=flatten`` and no covariates
            known beyond the end.
        mode: ``independent`` reads each variate by itself; ``multivariate`` reads all of them together, patch by patch,
            as a grid (N, V).
        head: ``mixture``, ``moirai``, ``quantile`` or ``point``.
        readout: ``patch`` or ``flatten``.
        error: What a ``point`` head minimises: ``mse``, ``mae`` or ``huber``.
        space: Where quantile and point losses are taken: in units of the window's scale, or in those of the data.
        tell_observed: Whether the embedding sees which values are missing.
        seasonal: Whether each step is told what was a season before it, see ``seasonal_channels``.
        shortcut: Add a linear map of the scaled context to what a quantile or point head says.
        squash: Whether scaled values are read and told through asinh, which tames outliers (Chronos-2,
            https://arxiv.org/abs/2510.15821); for a quantile head, since quantiles keep their levels.
        dropout: Share of the embedded patches, and of what is flattened, that is zeroed in training.
        missing: What a value that is not known is read as: ``mean`` of its window, or ``zero`` before scaling, as
            published models were trained.
    """

    task: ClassVar[str] = "timeseries/forecast"
    input_parts: ClassVar[tuple[str, ...]] = (
        "in_proj",
        "mask_encoding",
        "past_proj",
        "known_proj",
        "variates",
    )
    spec: SeriesSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: SeriesSpec,
        *,
        patch: int = 16,
        stride: int = 0,
        mode: Mode = "independent",
        head: HeadName = "quantile",
        readout: Readout = "patch",
        error: Literal["mse", "mae", "huber"] = "mse",
        space: Space = "instance",
        tell_observed: bool = True,
        seasonal: bool = False,
        shortcut: bool = False,
        squash: bool = False,
        dropout: float = 0.0,
        missing: Missing = "mean",
    ) -> None:
        super().__init__(
            backbone,
            spec,
            patch=patch,
            stride=stride,
            mode=mode,
            head=head,
            readout=readout,
            error=error,
            space=space,
            tell_observed=tell_observed,
            seasonal=seasonal,
            shortcut=shortcut,
            squash=squash,
            dropout=dropout,
            missing=missing,
        )
        for name, value, choices in (
            ("mode", mode, ("independent", "multivariate")),
            ("readout", readout, ("patch", "flatten")),
            ("space", space, ("instance", "data")),
            ("missing", missing, ("mean", "zero")),
        ):
            if value not in choices:
                raise ConfigError(f"PatchForecaster: {name} must be {' or '.join(choices)}, got {value!r}.")
        known = len(spec.known) + (CHANNELS if seasonal else 0)
        if patch < 1 or stride < 0:
            raise ConfigError(f"PatchForecaster: patch must be at least 1 and stride 0 or more, got {patch}, {stride}.")
        if stride not in (0, patch) and (readout != "flatten" or known):
            raise ConfigError(
                f"PatchForecaster: stride={stride} needs readout=flatten, and nothing known beyond the context; "
                "leave stride out."
            )
        if mode == "multivariate" and not spec.variates:
            raise ConfigError(
                "PatchForecaster: mode=multivariate needs series with the same named variates; set "
                "data.multivariate=true, or mode=independent."
            )
        if shortcut and (head in DENSITIES or (readout == "patch" and backbone.config.causal)):
            raise ConfigError(
                "PatchForecaster: shortcut=true is for head=quantile or point, and not for patches forecast one after "
                "the other; leave it out, or use readout=flatten."
            )
        if space == "data" and head in DENSITIES:
            raise ConfigError("PatchForecaster: a mixture's loss is a density of the data; leave space out.")
        if squash and (head != "quantile" or space == "data"):
            raise ConfigError("PatchForecaster: squash=true is for head=quantile and space=instance.")
        self.squash = squash
        self.patch, self.stride, self.mode, self.readout, self.space = patch, stride or patch, mode, readout, space
        self.tell_observed, self.seasonal, self.missing = tell_observed, seasonal, missing
        dim = backbone.config.dim
        self.stepwise = backbone.config.causal and readout == "patch"
        """Whether patches are forecast one after the other."""
        self.context_patches = -(-max(spec.context - patch, 0) // self.stride) + 1
        self.future_patches = -(-spec.horizon // patch) if readout == "patch" or known else 0
        self.in_proj = nn.Linear(patch * (1 + tell_observed), dim)
        if not self.stepwise and self.future_patches:
            self.mask_encoding = nn.Embedding(1, dim)
        self.past_proj = nn.Linear(patch * len(spec.past), dim, bias=False) if spec.past else None
        self.known_proj = nn.Linear(patch * known, dim, bias=False) if known else None
        self.variates = nn.Parameter(0.02 * torch.randn(len(spec.variates), dim)) if mode == "multivariate" else None
        self.dropout = nn.Dropout(dropout)
        if readout == "patch":
            self.param_proj = build_head(head, dim, patch, spec.quantiles, error)
        else:
            total = self.context_patches + self.future_patches
            self.param_proj = build_head(head, dim * total, spec.horizon, spec.quantiles, error)
        self.shortcut = nn.Linear(spec.context, spec.horizon) if shortcut else None
        if self.shortcut is not None:
            nn.init.constant_(self.shortcut.weight, 1 / spec.context)
            nn.init.zeros_(self.shortcut.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        names = {"mask_encoding.weight"} if hasattr(self, "mask_encoding") else set()
        return names | ({"variates"} if self.variates is not None else set())

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: another patch, other covariates, other variates."""
        saved, given = origin.spec, origin.arguments
        if not isinstance(saved, SeriesSpec):
            return {}
        found: dict[str, Adapter] = {"variates": by_name(saved.variates, self.spec.variates, "variates")}
        found |= dict.fromkeys(("in_proj.weight", "past_proj.weight", "known_proj.weight"), fresh)
        if given.get("tell_observed") == self.tell_observed:
            found["in_proj.weight"] = resampled("steps of a patch", parts=1 + self.tell_observed)
        if given.get("patch") == self.patch:
            season = tuple(f"season {i}" for i in range(CHANNELS))
            known = (saved.known + season * bool(given.get("seasonal")), self.spec.known + season * self.seasonal)
            found["past_proj.weight"] = by_name(saved.past, self.spec.past, "covariates", axis=1, group=self.patch)
            found["known_proj.weight"] = by_name(*known, "covariates", axis=1, group=self.patch)
        return found

    # ---------------------------------------------------------------- windows

    def forward(
        self,
        values: Tensor,
        observed: Tensor,
        past: Tensor | None = None,
        known: Tensor | None = None,
        season: Tensor | None = None,
        target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Say what the steps behind a context are.

        Args:
            values: Context (B, V, T), 0 where it is not observed.
            observed: Known values, bool (B, V, T); the first ones of a short series are not.
            past: Covariates (B, Cp, T).
            known: Covariates (B, Ck, T + H).
            season: Steps of a season, int (B,).
            target: The truth (B, V, H), which a causal backbone that forecasts patch by patch reads in training;
                without it, it forecasts the first patch alone.

        Returns:
            Numbers of the head (B, V, K, H) in scaled units, and location and scale (B, V, 1).
        """
        if values.ndim != 3 or values.shape[-1] != self.spec.context or observed.shape != values.shape:
            raise ShapeError(
                f"PatchForecaster: values and observed must be (B, V, {self.spec.context}), got {tuple(values.shape)} "
                f"and {tuple(observed.shape)}."
            )
        loc, scale = window_statistics(values, observed)
        blank = self._blank(loc, scale)  # (B, V, 1)
        z = torch.where(observed, self._scaled(values, loc, scale), blank)
        horizon = self.patch if self.stepwise and target is None else self.spec.horizon
        count = self.future_patches if target is not None or not self.stepwise else 1
        x, real = self._context(z, observed, blank, past)  # (B, V, N, D), (B, V, N)
        if self.stepwise and target is not None:
            ahead = F.pad(self._scaled(target, loc, scale), (0, count * self.patch - horizon))
            x = torch.cat([x, self._embed(ahead, torch.ones_like(ahead, dtype=torch.bool))[..., :-1, :]], dim=2)
        elif not self.stepwise and count:
            x = torch.cat([x, self.mask_encoding.weight.expand(*x.shape[:2], count, -1)], dim=2)
        if self.known_proj is not None:
            x = x + self._known(z, observed, known, season, count)[:, :, -x.shape[2] :]
        real = F.pad(real, (0, x.shape[2] - real.shape[2]), value=True)
        y = self._read(x, real)
        if self.readout == "flatten":
            numbers = self.param_proj(self.dropout((y * real[..., None]).flatten(2)))  # (B, V, K, H)
        else:
            numbers = self.param_proj(y[:, :, -count:])  # (B, V, n, K, P)
            numbers = numbers.movedim(2, 3).flatten(3)[..., :horizon]
        if self.shortcut is not None:
            numbers = numbers + self.shortcut(z).unsqueeze(2)
        return numbers, loc, scale

    def _scaled(self, values: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        z = ((values.double() - loc) / scale).float()  # a level far above the spread would cost digits
        return z.asinh() if self.squash else z

    def _blank(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return what is read where no value is known, in scaled units, of the shape of ``loc``."""
        raw = loc if self.missing == "mean" else torch.zeros_like(loc)
        return self._scaled(raw, loc, scale)

    def _context(self, z: Tensor, observed: Tensor, blank: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed the scaled context: features (B, V, N, D), and which patches are real, those since the first value."""
        whole = self.patch + (self.context_patches - 1) * self.stride
        pad = whole - z.shape[-1]
        z, observed = torch.cat([blank.expand(*z.shape[:-1], pad), z], -1), F.pad(observed, (pad, 0))
        x = self._embed(z, observed)
        if self.past_proj is not None:
            if past is None:
                raise ShapeError(f"PatchForecaster: needs past covariates: {', '.join(self.spec.past)}.")
            cut = F.pad(past, (pad, 0)).unfold(-1, self.patch, self.stride)  # (B, Cp, N, P)
            x = x + self.past_proj(cut.transpose(1, 2).flatten(2))[:, None]
        seen = observed.unfold(-1, self.patch, self.stride).any(-1)  # (B, V, N)
        real = seen.long().cumsum(-1) > 0
        return x, torch.cat([real[..., :-1], torch.ones_like(real[..., -1:])], dim=-1)

    def _embed(self, z: Tensor, observed: Tensor) -> Tensor:
        """Map scaled values (B, V, N P) to features (B, V, N, D)."""
        cut = z.unfold(-1, self.patch, self.stride)
        if self.tell_observed:
            cut = torch.cat([cut, observed.unfold(-1, self.patch, self.stride).to(cut.dtype)], dim=-1)
        return self.in_proj(cut.to(self.in_proj.weight.dtype))

    def _known(self, z: Tensor, observed: Tensor, known: Tensor | None, season: Tensor | None, count: int) -> Tensor:
        """Embed what is known of each patch before it comes, (B, V, N, D); of the next one where positions tell it."""
        assert self.known_proj is not None
        span = self.spec.context + count * self.patch
        parts = []
        if self.spec.known:
            if known is None:
                raise ShapeError(f"PatchForecaster: needs known covariates: {', '.join(self.spec.known)}.")
            given = known[..., :span]
            given = F.pad(given, (0, span - given.shape[-1]))
            parts.append(given[:, None].expand(-1, z.shape[1], -1, -1))
        if self.seasonal:
            if season is None:
                raise ShapeError("PatchForecaster: needs the season of every window, int (B,).")
            parts.append(seasonal_channels(z, observed, season, count * self.patch))
        channels = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]  # (B, V, C, T + n P)
        pad = self.context_patches * self.patch - self.spec.context
        cut = F.pad(channels, (pad, 0)).unfold(-1, self.patch, self.patch)  # (B, V, C, N, P)
        x: Tensor = self.known_proj(cut.movedim(2, 3).flatten(3))
        return x[:, :, 1:] if self.stepwise else x

    def _read(self, x: Tensor, real: Tensor) -> Tensor:
        """Run the backbone over features (B, V, N, D)."""
        x = self.dropout(x)
        compiling = torch.compiler.is_compiling()
        mask = None if not compiling and bool(real.all()) else real  # no mask is faster
        if self.variates is None:
            rows = self.backbone(x.flatten(0, 1), None if mask is None else mask.flatten(0, 1))  # (B V, N, D)
            return rows.view(x.shape)
        if x.shape[1] != len(self.variates):
            raise ShapeError(
                f"PatchForecaster: the model reads {len(self.variates)} variates together "
                f"({', '.join(self.spec.variates)}), got {x.shape[1]}."
            )
        grid = (x + self.variates[:, None]).transpose(1, 2)  # (B, N, V, D): later patches stand behind all variates
        return self.backbone(grid, None if mask is None else mask.transpose(1, 2)).transpose(1, 2)

    # ---------------------------------------------------------------- packed rows

    def packed(self, values: Tensor, observed: Tensor, segments: Tensor, predicted: Tensor) -> tuple[Tensor, ...]:
        """Say what marked patches of packed series are, as the scaling-law models are trained.

        Args:
            values: (R, S, P).
            observed: Known values, bool (R, S, P).
            segments: Series of each patch, int (R, S), -1 at padding; a series stands in one piece.
            predicted: Patches to predict, bool (R, S), the last ones of each series; statistics leave them out.

        Returns:
            Numbers of the head (R, S, K, P), which mean something where ``predicted``; location and scale (R, S, 1).
        """
        if self.readout != "patch" or self.mode != "independent" or self.known_proj is not None or self.spec.past:
            raise ConfigError(
                "PatchForecaster.packed: packed rows hold single variates without covariates, read patch by patch; "
                "use readout=patch, mode=independent and seasonal=false."
            )
        shown = observed & ~predicted[..., None]
        loc, scale = packed_statistics(values, shown, segments)
        z = torch.where(observed, self._scaled(values, loc, scale), self._blank(loc, scale))
        x = self._embed(z.flatten(1)[:, None], observed.flatten(1)[:, None])[:, 0]  # (R, S, D)
        if not self.stepwise:
            x = torch.where(predicted[..., None], self.mask_encoding.weight, x)
        y = self.backbone(self.dropout(x), segments >= 0, segments)
        if self.stepwise:
            y = F.pad(y[:, :-1], (0, 0, 1, 0))  # a position tells the next patch
        return self.param_proj(y), loc, scale

    def packed_loss(self, values: Tensor, observed: Tensor, segments: Tensor, predicted: Tensor) -> Tensor:
        """Return the loss of packed rows, in which every series counts the same; arguments as in ``packed``."""
        numbers, loc, scale = self.packed(values, observed, segments, predicted)
        losses = self._pointwise(numbers, values, loc, scale)  # (R, S, P)
        counted = observed & predicted[..., None]
        most = int(segments.max()) + 1
        place = (segments + most * torch.arange(len(segments), device=segments.device)[:, None]).clamp_min(0)
        zeros = losses.new_zeros(len(segments) * most)
        points = zeros.index_add(0, place.flatten(), counted.sum(-1).flatten().to(losses))
        sums = zeros.index_add(0, place.flatten(), (losses * counted).sum(-1).flatten())
        return (sums / points.clamp_min(1)).sum() / (points > 0).sum().clamp_min(1)

    # ---------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of windows or of packed rows; every series counts the same, however much of it is known."""
        if "segments" in batch:
            names = ("values", "observed", "segments", "predicted")
            return {"loss": self.packed_loss(*(batch[name] for name in names))}
        numbers, loc, scale = self(*self._inputs(batch), batch["target"] if self.stepwise else None)
        losses = self._pointwise(numbers, batch["target"], loc, scale)
        seen = batch["observed"].any(-1, keepdim=True)  # without a value there is no scale to judge by
        counted = (batch["target_observed"] & seen).to(losses)
        points = counted.sum(-1)  # (B, V)
        series = (losses * counted).sum(-1) / points.clamp_min(1)
        return {"loss": (series * (points > 0)).sum() / (points > 0).sum().clamp_min(1)}

    def _pointwise(self, numbers: Tensor, target: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        losses = self.param_proj.loss(numbers, self._scaled(target, loc, scale))
        if self.param_proj.density:
            return losses + scale.log().float()  # of the value itself
        if self.space == "instance":
            return losses
        return losses * (scale**2 if getattr(self.param_proj, "error", "") == "mse" else scale).float()

    def _inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        return batch["values"], batch["observed"], batch.get("past"), batch.get("known"), batch.get("season")

    # ---------------------------------------------------------------- forecasts

    @torch.no_grad()
    def forecast(self, batch: Batch, horizon: int | None = None, quantiles: Sequence[float] | None = None) -> Forecast:
        """Forecast a batch of windows.

        Args:
            batch: Of ``WindowItems``; its targets are not read.
            horizon: Steps H; None for the spec's. ``known`` must reach as far.
            quantiles: Levels; None for the spec's.
        """
        spec = self.spec
        horizon, levels = horizon or spec.horizon, tuple(quantiles or spec.quantiles)
        if spec.known and batch["known"].shape[-1] < spec.context + horizon:
            raise ShapeError(
                f"PatchForecaster.forecast: known covariates must reach {horizon} steps beyond the context, "
                f"got {batch['known'].shape[-1] - spec.context}."
            )
        window = self._inputs(batch)
        size = len(batch["values"])
        own = KNOTS if self.param_proj.density else spec.quantiles
        means: list[Tensor] = []
        told: list[Tensor] = []
        ahead: Tensor | None = (
            None  # what goes on behind the window, (B, L, V, h): a path for each of the levels ``PATHS``
        )
        for _ in range(0, horizon, self.patch if self.stepwise else spec.horizon):
            if ahead is not None:
                window = _go_on(window, ahead)
            numbers, loc, scale = self(*window)
            mean = (self.param_proj.mean(numbers.sinh() if self.squash else numbers) * scale + loc).unflatten(
                0, (size, -1)
            )  # (B, L, V, h)
            means.append(mean.mean(1))
            inner = self._quantiles(numbers, own, loc, scale)
            if inner is None:
                ahead = mean
                continue
            knots = spread(inner, own, KNOTS).unflatten(0, (size, -1))  # (B, L, V, K, h)
            if mean.shape[1] == 1:
                found = inner if levels == own else self._quantiles(numbers, levels, loc, scale)
                assert found is not None
                told.append(found)
                ahead = spread(knots[:, 0], KNOTS, PATHS).transpose(1, 2)
            else:
                joined = join_paths(knots, (*levels, *PATHS))  # (B, V, Q + L, h)
                told.append(joined[:, :, : len(levels)])
                ahead = joined[:, :, len(levels) :].transpose(1, 2)
        every = torch.cat(told, -1)[..., :horizon] if told else None
        return Forecast(torch.cat(means, -1)[..., :horizon], every)

    def _quantiles(self, numbers: Tensor, levels: Sequence[float], loc: Tensor, scale: Tensor) -> Tensor | None:
        found = self.param_proj.quantiles(numbers, levels)
        if found is not None and self.squash:
            found = found.sinh()
        return None if found is None else (found * scale.unsqueeze(2) + loc.unsqueeze(2)).float()


def _go_on(window: Sequence[Tensor | None], ahead: Tensor) -> tuple[Tensor | None, ...]:
    """Move windows on by the steps of their paths ahead (B, L, V, h); there become as many windows as there are paths.

    Past covariates are not known from here on, and keep their last value.
    """
    values, observed, past, known, season = window
    assert values is not None
    assert observed is not None
    repeats = ahead.shape[0] * ahead.shape[1] // len(values)
    if repeats > 1:
        values, observed = values.repeat_interleave(repeats, 0), observed.repeat_interleave(repeats, 0)
        past, known, season = (None if t is None else t.repeat_interleave(repeats, 0) for t in (past, known, season))
    step = ahead.shape[-1]
    length = values.shape[-1]
    values = torch.cat([values, ahead.flatten(0, 1)], -1)[..., -length:]
    observed = F.pad(observed, (0, step), value=True)[..., -length:]
    past = None if past is None else torch.cat([past, past[..., -1:].expand(-1, -1, step)], -1)[..., -length:]
    return values, observed, past, None if known is None else known[..., step:], season
