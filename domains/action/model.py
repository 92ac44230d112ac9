"""Policies: an observation before any backbone, a chunk of actions behind it; plain torch.

The three ways in which BEAST's B-spline tokens enter a policy (https://arxiv.org/abs/2506.06072, section 4): continuous
tokens from a conditional VAE (ACT, https://arxiv.org/abs/2304.13705), discrete tokens from a decoder, all in one
pass or one after the other, and discrete tokens of queries that read an encoder's output.

Shapes: B items, P observation tokens, T steps of a chunk, A action dimensions, L tokens of a chunk (N groups of A, in
order of time), V levels of a token, D width, Z latent dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, Taps
from vertebra.backbones.decoding import Decoder, Stop, Strategy, generate
from vertebra.backbones.layers.cross import CrossAttention
from vertebra.domains.action.observation import Observation, ObservationEncoder
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.adapting import Adapter, by_name
from vertebra.domains.model import DomainModel, Origin
from vertebra.errors import ConfigError
from vertebra.tokenizers.action import NONE, ActionTokenizer, ContinuousTokenizer
from vertebra.tokenizers.base import tokenizer_from_dict

Batch = Mapping[str, Any]
"""An observation with ``actions`` (B, T, A), which of them are ``real``, bool (B, T), and ``start`` (B, A)."""
Readout = Literal["argmax", "mean"]

GREEDY = Strategy(method="greedy")


class ActionPolicy(DomainModel):
    """Base of the policies: what they see, and what tokens mean.

    Args:
        backbone: The shared part.
        spec: Facts about the data.
        vision: See ``ObservationEncoder``.
        patch_size: See ``ObservationEncoder``.
        observation_noise: ``noise`` of the ``ObservationEncoder``.
        dropout: Share of the numbers that enter the backbone that is zeroed in training.
        arguments: The subclass's other arguments.
    """

    task: ClassVar[str] = "action/policy"
    input_parts: ClassVar[tuple[str, ...]] = ("observe",)
    spec: ActionSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: ActionSpec,
        *,
        vision: str,
        patch_size: int,
        observation_noise: float,
        dropout: float,
        arguments: Mapping[str, Any],
    ) -> None:
        seen: dict[str, Any] = {"vision": vision, "patch_size": patch_size, "observation_noise": observation_noise}
        super().__init__(backbone, spec, **seen, dropout=dropout, **arguments)
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        if not isinstance(tokenizer, ActionTokenizer):
            raise ConfigError(f"{type(self).__name__}: the tokenizer must be one for actions, got {tokenizer!r}.")
        self.tokenizer = tokenizer
        self.observe = ObservationEncoder(
            spec, backbone.config.dim, vision=vision, patch_size=patch_size, noise=observation_noise
        )
        self.dropout = nn.Dropout(dropout)
        relative = [max(column, 0) for column in spec.relative]
        self.register_buffer("columns", torch.tensor(relative, dtype=torch.long), persistent=False)
        self.register_buffer("moved", torch.tensor([float(c >= 0) for c in spec.relative]), persistent=False)
        self.columns: Tensor
        self.moved: Tensor

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        return {f"observe.{name}" for name in self.observe.no_weight_decay()}

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: other states and actions that are observed, other tasks, other cameras."""
        saved, own = origin.spec, self.spec
        if not isinstance(saved, ActionSpec):
            return {}
        states = by_name(saved.state_names, own.state_names, "states", axis=1)
        return {
            "observe.state.0.weight": states,
            "observe.change.weight": states,
            "observe.start.weight": by_name(saved.action_names, own.action_names, "actions", axis=1),
            "observe.task_embed.weight": by_name(saved.tasks, own.tasks, "tasks"),
            "observe.camera.positions": by_name(saved.cameras, own.cameras, "cameras"),
        }

    # ---------------------------------------------------------------- what a subclass defines

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch, and further numbers to log."""

    @abstractmethod
    def decode(self, observation: Observation, start: Tensor | None, steps: int | None) -> Tensor:
        """Return chunks (B, T, A) for an observation, told as the tokenizer has them: relative where the spec says."""

    # ---------------------------------------------------------------- what they share

    @torch.no_grad()
    def act(self, observation: Observation, steps: int | None = None) -> Tensor:
        """Return the actions (B, T, A) of the next chunk, in their units.

        Args:
            observation: With ``start`` too, where the tokenizer enforces the first position.
            steps: Other number of steps over the same time, for another rate of control.
        """
        reference = self.reference(observation["states"])
        start = observation["start"] - reference if self.enforces_start else None
        return self.decode(observation, start, steps) + reference[:, None]

    @property
    def enforces_start(self) -> bool:
        """Whether chunks begin at the action before."""
        return getattr(self.tokenizer, "initial", "free") != "free"

    def reference(self, states: Tensor) -> Tensor:
        """Return what actions are relative to, (B, A), for states (B, H, S)."""
        if not states.shape[-1]:
            return self.moved.expand(states.shape[0], -1) * 0
        return states[:, -1, self.columns] * self.moved

    def target(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return chunks (B, T, A) and where they begin (B, A), as the tokenizer has them."""
        reference = self.reference(batch["states"])
        start = batch["start"] - reference if self.enforces_start else None
        return batch["actions"] - reference[:, None], start

    def token_weights(self, real: Tensor) -> Tensor:
        """Weigh tokens by whether their time is real: float (B, L) for real steps, bool (B, T)."""
        assert isinstance(self.tokenizer, ContinuousTokenizer)
        groups, steps = self.tokenizer.groups, real.shape[1]
        centres = torch.linspace(0, steps - 1, groups, device=real.device)
        inside = centres <= real.sum(1, keepdim=True) - 0.5  # (B, N)
        return inside.float().repeat_interleave(self.tokenizer.dims, dim=1)

    def _continuous(self) -> ContinuousTokenizer:
        if not isinstance(self.tokenizer, ContinuousTokenizer):
            raise ConfigError(
                f"{type(self).__name__}: needs tokens in a fixed number, as bspline and binning give; got "
                f"{type(self.tokenizer).__name__}. Choose another data.tokenizer, or decoding=autoregressive."
            )
        return self.tokenizer


class Queries(nn.Module):
    """Learned queries in a fixed number, and the head that reads tokens off them.

    Args:
        tokenizer: L = N * A tokens.
        dim: D.
        grouped: One query for a group of A tokens, instead of one for each token.
        levels: Numbers that are read off for each token.
    """

    def __init__(self, tokenizer: ContinuousTokenizer, dim: int, grouped: bool, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.embed = nn.Parameter(torch.zeros(tokenizer.groups if grouped else tokenizer.length, dim))
        self.head = nn.Linear(dim, levels * (tokenizer.dims if grouped else 1))
        nn.init.normal_(self.embed, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def __len__(self) -> int:
        return len(self.embed)

    def read(self, features: Tensor) -> Tensor:
        """Map features of the queries (B, Q, D) to (B, L, levels)."""
        return self.head(features).unflatten(-1, (-1, self.levels)).flatten(1, 2)


class LevelPolicy(ActionPolicy):
    """Base of policies whose tokens are levels, all of them predicted in one pass."""

    readout: Readout
    smoothing: float

    @abstractmethod
    def forward(self, observation: Observation) -> Tensor:
        """Map an observation to logits (B, L, V)."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the levels, and the share that is right."""
        tokenizer = self._continuous()
        chunks, start = self.target(batch)
        places = tokenizer.to_unit(chunks, start) * (tokenizer.vocab_size - 1)  # (B, L)
        return level_losses(self(batch), places, self.token_weights(batch["real"]), self.smoothing)

    def decode(self, observation: Observation, start: Tensor | None, steps: int | None) -> Tensor:
        """As in ``ActionPolicy``."""
        return self._continuous().from_unit(self.read_levels(self(observation)), steps=steps, start=start)

    def read_levels(self, logits: Tensor) -> Tensor:
        """Map logits (B, L, V) to tokens (B, L) in [0, 1]; grippers are always the most likely level."""
        top = logits.shape[-1] - 1
        best = logits.argmax(-1) / top
        if self.readout == "argmax":
            return best
        mean = logits.float().softmax(-1) @ torch.linspace(0, 1, top + 1, device=logits.device)
        grippers = torch.zeros(self.tokenizer.dims, dtype=torch.bool, device=logits.device)
        grippers[list(getattr(self.tokenizer, "grippers", ()))] = True
        return torch.where(grippers.repeat(self._continuous().groups), best, mean)


class DecoderPolicy(LevelPolicy):
    """Discrete tokens behind the observation: all in one pass by queries, or one after the other.

    Args:
        backbone: Causal for ``autoregressive``; any for ``parallel``, bidirectional as in the paper or causal.
        spec: Facts about the data.
        decoding: ``parallel`` or ``autoregressive``.
        grouped: One query for all dimensions of a control point; parallel decoding only.
        readout: ``argmax``, or ``mean`` of the levels by probability; parallel decoding only.
        smoothing: Standard deviation, in levels, of a target that is spread over neighbouring levels; 0 for none.
        vision: See ``ObservationEncoder``.
        patch_size: See ``ObservationEncoder``.
        observation_noise: ``noise`` of the ``ObservationEncoder``.
        dropout: Share of the numbers that enter the backbone that is zeroed in training.

    Raises:
        ConfigError: The decoding does not go with the backbone or the tokenizer.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: ActionSpec,
        *,
        decoding: Literal["parallel", "autoregressive"] = "parallel",
        grouped: bool = False,
        readout: Readout = "argmax",
        smoothing: float = 0.0,
        vision: str = "patch",
        patch_size: int = 8,
        observation_noise: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        arguments = {"decoding": decoding, "grouped": grouped, "readout": readout, "smoothing": smoothing}
        super().__init__(
            backbone,
            spec,
            vision=vision,
            patch_size=patch_size,
            observation_noise=observation_noise,
            dropout=dropout,
            arguments=arguments,
        )
        _check_choice("decoding", decoding, ("parallel", "autoregressive"))
        _check_levels(readout, smoothing)
        self.decoding, self.readout, self.smoothing = decoding, readout, smoothing
        dim = backbone.config.dim
        if decoding == "parallel":
            tokenizer = self._continuous()
            self.queries = Queries(tokenizer, dim, grouped, tokenizer.vocab_size)
            return
        if grouped or readout != "argmax":
            raise ConfigError("DecoderPolicy: grouped and readout=mean are for decoding=parallel; leave them out.")
        if not backbone.config.causal:
            raise ConfigError("DecoderPolicy: decoding=autoregressive needs a causal backbone; set causal=true.")
        self.begin, self.end = self.tokenizer.vocab_size, self.tokenizer.vocab_size + 1
        self.embed = nn.Embedding(self.end + 1, dim)
        self.places = nn.Embedding(self.tokenizer.length + 1, dim)
        self.head = nn.Linear(dim, self.end + 1)
        for module in (self.embed, self.places, self.head):
            nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        own = {"queries.embed"} if self.decoding == "parallel" else {"embed.weight", "places.weight"}
        return super().no_weight_decay() | own

    def forward(self, observation: Observation, ids: Tensor | None = None) -> Tensor:
        """Map an observation to logits.

        Args:
            observation: See ``Observation``.
            ids: Tokens (B, L), which each is predicted from those before; autoregressive decoding only.

        Returns:
            (B, L, V); with ``ids`` (B, L + 1, V + 2), the last of what follows them: V begins, V + 1 ends a chunk.
        """
        seen = self.observe(observation)  # (B, P, D)
        if self.decoding == "parallel":
            own = self.queries.embed.expand(seen.shape[0], -1, -1)
        else:
            assert ids is not None
            before = F.pad(ids, (1, 0), value=self.begin)
            places = torch.arange(before.shape[1], device=before.device).expand_as(before)
            own = self._embed(torch.stack([before, places], dim=-1))
        y = self.backbone(self.dropout(torch.cat([seen, own], dim=1)))[:, seen.shape[1] :]
        return self.queries.read(y) if self.decoding == "parallel" else self.head(y)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the tokens, and the share that is right."""
        if self.decoding == "parallel":
            return super().losses(batch)
        chunks, start = self.target(batch)
        ids = self.tokenizer.encode(chunks, start)  # (B, L)
        if isinstance(self.tokenizer, ContinuousTokenizer):
            logits = self(batch, ids)[:, :-1, : self.begin]
            return level_losses(logits, ids.float(), self.token_weights(batch["real"]), self.smoothing)
        logits = self(batch, ids.clamp_min(0))
        rows = torch.arange(ids.shape[1] + 1, device=ids.device)
        lengths = (ids != NONE).sum(1, keepdim=True)
        target = torch.where(rows == lengths, self.end, F.pad(ids, (0, 1), value=NONE))  # (B, L + 1)
        real = rows <= lengths
        loss = F.cross_entropy(logits.mT.float(), target.masked_fill(~real, NONE), ignore_index=NONE)
        return {"loss": loss, "token_pred_acc": (logits.argmax(-1) == target)[real].float().mean()}

    def decode(self, observation: Observation, start: Tensor | None, steps: int | None) -> Tensor:
        """As in ``ActionPolicy``."""
        if self.decoding == "parallel":
            return super().decode(observation, start, steps)
        return self.tokenizer.decode(self.write(observation), steps=steps, start=start)

    def write(self, observation: Observation, strategy: Strategy = GREEDY) -> Tensor:
        """Write the tokens (B, L) one after the other; rows that end early are filled with ``NONE``."""
        prefix = self.observe(observation)
        grammar = _Grammar(self)
        decoder = Decoder(self.backbone, self._embed, self.head, prefix.device, machine=grammar, prefix=prefix)
        prompts = torch.full((len(prefix), 1), self.begin, device=prefix.device)
        stop = Stop(max_new=self.tokenizer.length + self.tokenizer.varies, ids=(self.end,))
        rows = [made.ids for made in generate(decoder, prompts, stop, strategy)]
        kept = [row[:-1] if len(row) and int(row[-1]) == self.end else row for row in rows]
        return nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=NONE).to(prefix.device)

    def _embed(self, inputs: Tensor) -> Tensor:
        """Map ids and their places (B, T, 2) to features (B, T, D)."""
        return self.embed(inputs[..., 0]) + self.places(inputs[..., 1])


class _Grammar:
    """Which tokens may come next: a chunk has L tokens, or as many coefficients as it must have and then the end.

    A state is the place of the next token, and the coefficients still to come.
    """

    def __init__(self, policy: DecoderPolicy) -> None:
        tokenizer = policy.tokenizer
        self.end, self.varies = policy.end, tokenizer.varies
        self.total = tokenizer.length
        sizes = tokenizer.sizes
        self.sizes = torch.cat([sizes, torch.tensor([0, 0])])  # begin and end

    def begin(self, batch: int, device: torch.device) -> Tensor:
        """Before the begin."""
        return torch.tensor([0, self.total], device=device).expand(batch, 2)

    def allowed(self, states: Tensor) -> Tensor:
        """What still fits; the end, once nothing is left."""
        sizes, left = self.sizes.to(states.device), states[:, 1:]
        may = (sizes > 0) & (sizes <= left)
        if self.varies:
            may[:, self.end] = left[:, 0] == 0
        return may

    def read(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pair tokens with their places."""
        place, left = states.unbind(1)
        sizes = self.sizes.to(states.device)
        return torch.stack([ids, place], dim=1), torch.stack([place + 1, left - sizes[ids]], dim=1)


class EncoderDecoderPolicy(LevelPolicy):
    """Queries that read, after every layer, what a backbone makes of the observation (BEAST-F's form).

    The decoder is a second backbone of the same config: its queries see each other as that config says, both ways
    when it is bidirectional.

    Args:
        backbone: Encoder of the observation.
        spec: Facts about the data.
        grouped: One query for all dimensions of a control point.
        readout: See ``DecoderPolicy``.
        smoothing: See ``DecoderPolicy``.
        heads: Heads of the attention to the encoder's output.
        vision: See ``ObservationEncoder``.
        patch_size: See ``ObservationEncoder``.
        observation_noise: ``noise`` of the ``ObservationEncoder``.
        dropout: Share of the numbers that enter the backbone that is zeroed in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: ActionSpec,
        *,
        grouped: bool = False,
        readout: Readout = "argmax",
        smoothing: float = 0.0,
        heads: int = 4,
        vision: str = "patch",
        patch_size: int = 8,
        observation_noise: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        arguments = {"grouped": grouped, "readout": readout, "smoothing": smoothing, "heads": heads}
        super().__init__(
            backbone,
            spec,
            vision=vision,
            patch_size=patch_size,
            observation_noise=observation_noise,
            dropout=dropout,
            arguments=arguments,
        )
        _check_levels(readout, smoothing)
        self.readout, self.smoothing = readout, smoothing
        dim = backbone.config.dim
        if heads < 1 or dim % heads:
            raise ConfigError(f"EncoderDecoderPolicy: heads={heads} must divide the backbone's width {dim}.")
        tokenizer = self._continuous()
        self.queries = Queries(tokenizer, dim, grouped, tokenizer.vocab_size)
        self.decoder = backbone.config.build()
        self.cross = nn.ModuleList(CrossAttention(dim, heads, dropout) for _ in range(self.decoder.num_layers))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        inner = {f"decoder.{name}" for name in self.decoder.no_weight_decay()}
        return super().no_weight_decay() | {"queries.embed"} | inner

    def forward(self, observation: Observation) -> Tensor:
        """Map an observation to logits (B, L, V)."""
        memory = self.backbone(self.dropout(self.observe(observation)))  # (B, P, D)
        queries = self.queries.embed.expand(memory.shape[0], -1, -1)
        after = {i: lambda x, layer=layer: layer(x, memory) for i, layer in enumerate(self.cross)}
        return self.queries.read(self.decoder(queries, taps=Taps(after=after)))


class CVAEPolicy(ActionPolicy):
    """Continuous tokens from a conditional VAE (ACT): in training a latent tells which of several ways was taken.

    The posterior is a second backbone of the same config, which reads observation and tokens; at inference the latent
    is the prior's mean.

    Args:
        backbone: Reads the latent, the observation and the queries.
        spec: Facts about the data.
        latent: Z; 0 for no latent, which is plain regression.
        kl_weight: Weight of the divergence from the prior.
        regression: ``l1``, as in ACT, whose best guess is the median, or ``l2``, whose best guess is the mean.
        grouped: One query for all dimensions of a control point, as in the paper, or one for each.
        vision: See ``ObservationEncoder``.
        patch_size: See ``ObservationEncoder``.
        observation_noise: ``noise`` of the ``ObservationEncoder``.
        dropout: Share of the numbers that enter the backbone that is zeroed in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: ActionSpec,
        *,
        latent: int = 32,
        kl_weight: float = 10.0,
        regression: Literal["l1", "l2"] = "l1",
        grouped: bool = True,
        vision: str = "patch",
        patch_size: int = 8,
        observation_noise: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        arguments = {"latent": latent, "kl_weight": kl_weight, "regression": regression, "grouped": grouped}
        super().__init__(
            backbone,
            spec,
            vision=vision,
            patch_size=patch_size,
            observation_noise=observation_noise,
            dropout=dropout,
            arguments=arguments,
        )
        if latent < 0 or kl_weight < 0:
            raise ConfigError(f"CVAEPolicy: latent and kl_weight must be at least 0, got {latent} and {kl_weight}.")
        _check_choice("regression", regression, ("l1", "l2"))
        self.latent, self.kl_weight, self.regression = latent, kl_weight, regression
        tokenizer, dim = self._continuous(), backbone.config.dim
        self.queries = Queries(tokenizer, dim, grouped, 1)
        if latent:
            self.into = nn.Linear(latent, dim)
            self.posterior = backbone.config.build()
            self.group_embed = nn.Linear(tokenizer.dims, dim)
            self.group_places = nn.Parameter(0.02 * torch.randn(tokenizer.groups, dim))
            self.summary = nn.Parameter(0.02 * torch.randn(1, dim))
            self.moments = nn.Linear(dim, 2 * latent)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        names = super().no_weight_decay() | {"queries.embed"}
        if self.latent:
            names |= {"group_places", "summary"} | {f"posterior.{n}" for n in self.posterior.no_weight_decay()}
        return names

    def forward(self, observation: Observation, z: Tensor | None = None) -> Tensor:
        """Map an observation and a latent (B, Z), the prior's mean when None, to tokens (B, L), about in [-1, 1]."""
        parts = [self.observe(observation)]
        count = parts[0].shape[0]
        if self.latent:
            parts.insert(0, self.into(parts[0].new_zeros(count, self.latent) if z is None else z)[:, None])
        before = sum(part.shape[1] for part in parts)
        x = torch.cat([*parts, self.queries.embed.expand(count, -1, -1)], dim=1)
        tokens: Tensor = self.queries.read(self.backbone(self.dropout(x))[:, before:])
        return tokens[..., 0]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """L1 or L2 of the tokens, and the divergence of the latent from its prior."""
        tokenizer = self._continuous()
        target = tokenizer.encode_continuous(*self.target(batch))  # (B, L)
        weights = self.token_weights(batch["real"])
        z, kl = None, target.new_zeros(())
        if self.latent:
            groups = self.group_embed(target.unflatten(1, (tokenizer.groups, -1))) + self.group_places
            count = len(target)
            x = torch.cat([self.observe(batch), groups, self.summary.expand(count, 1, -1)], dim=1)
            mean, log_variance = self.moments(self.posterior.read_last(x)).chunk(2, dim=-1)
            z = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
            kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        away = self(batch, z) - target
        error = ((away.abs() if self.regression == "l1" else away**2) * weights).sum() / weights.sum()
        return {"loss": error + self.kl_weight * kl, self.regression: error, "kl": kl}

    def decode(self, observation: Observation, start: Tensor | None, steps: int | None) -> Tensor:
        """As in ``ActionPolicy``."""
        tokens = self(observation).clamp(-1, 1)
        return self._continuous().decode_continuous(tokens, steps=steps, start=start)


POLICIES = {"decoder": DecoderPolicy, "encoder-decoder": EncoderDecoderPolicy, "cvae": CVAEPolicy}
"""Policies by the word for them."""


def level_losses(logits: Tensor, places: Tensor, weights: Tensor, smoothing: float) -> dict[str, Tensor]:
    """Return the cross-entropy of levels, and the share that is right.

    Args:
        logits: (B, L, V).
        places: True levels (B, L), which need not be whole.
        weights: Of the tokens, (B, L).
        smoothing: Standard deviation, in levels, of a Gaussian over the levels that is the target; 0 for the nearest.
    """
    ids = places.round().long()
    if smoothing:
        levels = torch.arange(logits.shape[-1], device=logits.device)
        target = (-0.5 * ((levels - places[..., None]) / smoothing) ** 2).softmax(-1)
        losses = -(target * logits.float().log_softmax(-1)).sum(-1)
    else:
        losses = F.cross_entropy(logits.mT.float(), ids, reduction="none")
    right = (logits.argmax(-1) == ids).float()
    total = weights.sum()
    return {"loss": (losses * weights).sum() / total, "token_pred_acc": (right * weights).sum() / total}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, got {value!r}.")


def _check_levels(readout: str, smoothing: float) -> None:
    _check_choice("readout", readout, ("argmax", "mean"))
    if smoothing < 0:
        raise ConfigError(f"smoothing must be at least 0, got {smoothing}.")
