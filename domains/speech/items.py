"""Transcribed recordings as a training reads them: waves from files, rows of recordings, batches.

Shapes: B items, N samples, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.backbones.random import item_uniform
from vertebra.domains.batching import Batch, pad_batch
from vertebra.domains.speech.audio import AudioError, read_audio
from vertebra.domains.speech.augment import Colour, WaveAugment, coloured_noise
from vertebra.domains.speech.spec import NO_LANGUAGE, NO_PROMPT, SpeechSpec
from vertebra.domains.speech.text import normalise
from vertebra.domains.speech.utterance import Utterance
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.text import TextTokenizer

Ints = NDArray[np.int64]
Wave = NDArray[np.float32]

CACHE_BYTES = 512 * 2**20
"""Decoded bytes that one split keeps in memory, in one process."""
SILENCE = 10 ** (-70 / 20)
"""Largest amplitude of a recording that counts as silence: 70 dB below full scale."""
NOISE_DB = (-70.0, -10.0)
"""Levels of noise without speech, below full scale."""
DIGITAL_SILENCE = 0.2
"""Share of items without speech that have no noise either."""
_MEMBER, _GAP, _NO_LANGUAGE, _NO_PROMPT, _NO_SPEECH = range(304, 309)  # salts of the draws


@dataclass(frozen=True, kw_only=True)
class Concatenate:
    """Recordings of a split put one behind the other, with silence between: connected words from isolated ones.

    Those of a row have one language and one task, and are drawn anew in every epoch; so the limits of a batch hold for
    rows on average.

    Args:
        items: Fewest and most recordings in a row.
        gap: Shortest and longest silence between two, in seconds.
        eval_items: The same as ``items`` for validation and test; None for the same numbers.
        same_speaker: Whether all of a row are of one speaker.
    """

    items: tuple[int, int] = (1, 6)
    gap: tuple[float, float] = (0.0, 0.4)
    eval_items: tuple[int, int] | None = None
    same_speaker: bool = True

    def __post_init__(self) -> None:
        for name in ("items", "eval_items"):
            if (pair := getattr(self, name)) is not None and not 1 <= pair[0] <= pair[1]:
                raise ConfigError(f"Concatenate: {name} must be two rising numbers from 1, got {pair}.")
        if not 0 <= self.gap[0] <= self.gap[1]:
            raise ConfigError(f"Concatenate: gap must be two rising numbers from 0, got {self.gap}.")


class Recordings:
    """Decoded waves of utterances, kept in memory until they take ``CACHE_BYTES``.

    Args:
        utterances: What to read.
        sample_rate: Samples a second that are wanted.
        spoken: Whether something must be heard in all of them.
    """

    def __init__(self, utterances: Sequence[Utterance], sample_rate: int, *, spoken: bool = True) -> None:
        self.utterances, self.sample_rate, self.spoken = list(utterances), sample_rate, spoken
        self._cache: dict[int, Wave] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.utterances)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_room": CACHE_BYTES}

    def wave(self, row: int) -> Wave:
        """Samples (N,) of an utterance.

        Raises:
            AudioError: It cannot be read, or is silent.
        """
        if row not in self._cache:
            found = self.utterances[row]
            wave = read_audio(found.path, self.sample_rate, start=found.start, duration=found.duration)
            if self.spoken and np.abs(wave).max(initial=0.0) < SILENCE:
                raise AudioError(str(found.path), "there is nothing but silence", "take the recording out")
            if self._room < wave.nbytes:
                return wave
            self._cache[row] = wave
            self._room -= wave.nbytes
        return self._cache[row]


class SpeechItems:
    """Utterances of one split.

    Args:
        recordings: Their waves.
        spec: What the model reads.
        tokenizer: Of the spec.
        durations: Seconds of every utterance, (N,).
        augment: What training does to waves at random; None for nothing.
        concatenate: How many of them make an item, fewest and most; None for one.
        rules: Gaps and speakers of such rows.
        no_language: Share of items whose prefix says that the language is unknown.
        no_prompt: Share of items whose prompt is left away.
        no_speech: Share of items in whose place there is noise, and nothing to say.
        seed: Seed of all draws.
    """

    def __init__(
        self,
        recordings: Recordings,
        spec: SpeechSpec,
        tokenizer: TextTokenizer,
        durations: NDArray[np.float64],
        *,
        augment: WaveAugment | None = None,
        concatenate: tuple[int, int] | None = None,
        rules: Concatenate | None = None,
        no_language: float = 1.0,
        no_prompt: float = 0.0,
        no_speech: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.recordings, self.spec, self.tokenizer, self.augment = recordings, spec, tokenizer, augment
        self.durations, self.seed = durations, seed
        self.no_language, self.no_prompt, self.no_speech = no_language, no_prompt, no_speech
        self.concatenate, self.rules = concatenate, rules or Concatenate()
        utterances = recordings.utterances
        self.texts = [normalise(target_text(u), spec.normalisation) for u in utterances]
        self.translates = any(u.task != "asr" for u in utterances)
        peers: dict[tuple[str, str, str], list[int]] = {}
        for row, u in enumerate(utterances) if concatenate is not None else ():
            peers.setdefault(self._kind(u), []).append(row)
        self._peers = {kind: np.array(rows, dtype=np.int64) for kind, rows in peers.items()}

    def __len__(self) -> int:
        return len(self.recordings)

    @property
    def names(self) -> list[str]:
        """Name of every utterance."""
        return [u.id for u in self.recordings.utterances]

    @property
    def lengths(self) -> Ints:
        """Most samples that every item can have: played as slowly and padded as much as augmentation does at most.

        Of a row of utterances, the others count as much as they have on average, since they change with the epoch.
        """
        seconds, stretch, padding = self.durations, 1.0, 0.0
        if self.augment is not None:
            stretch, padding = 1 / self.augment.augment.speeds[0], 2 * self.augment.augment.pad_seconds
        if self.concatenate is not None:
            means = {kind: float(self.durations[rows].mean()) for kind, rows in self._peers.items()}
            others = np.array([means[self._kind(u)] for u in self.recordings.utterances]) + sum(self.rules.gap) / 2
            seconds = seconds + (self._counts() - 1) * others
        samples = np.ceil((seconds * stretch + padding) * self.spec.sample_rate - 1e-6)
        return np.maximum(samples, 1).astype(np.int64)

    @property
    def target_lengths(self) -> Ints:
        """Tokens of every item, or about as many."""
        counts = np.array([max(len(self.encode(t)), 1) for t in self.texts], dtype=np.int64)
        if self.concatenate is not None:
            return np.ceil(self._counts() * (counts.mean() + 1)).astype(np.int64)
        return counts

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt, 1 where there is none."""
        before = {u.previous for u in self.recordings.utterances}
        return max(1, *(len(self.encode(normalise(text, self.spec.normalisation))) for text in before))

    def take(self, rows: Ints) -> SpeechItems:
        """Return the items of some rows."""
        utterances = [self.recordings.utterances[i] for i in rows.tolist()]
        kept = Recordings(utterances, self.spec.sample_rate, spoken=self.recordings.spoken)
        return SpeechItems(
            kept,
            self.spec,
            self.tokenizer,
            self.durations[rows],
            augment=self.augment,
            concatenate=self.concatenate,
            rules=self.rules,
            no_language=self.no_language,
            no_prompt=self.no_prompt,
            no_speech=self.no_speech,
            seed=self.seed,
        )

    def fetch(self, indices: Ints, epoch: int) -> Batch:
        """Make a batch.

        Returns:
            ``waves`` float32 (B, N), ``lengths`` (B,), ``targets`` (B, L), ``target_lengths`` (B,), ``texts``,
            ``names``, ``index`` (B,), ``epoch``; with a prefix ``prefix`` (B, 2) and ``language`` (B,), the token
            of the true language; where there are translations ``transcripts`` and ``transcript_lengths``, below 0;
            with prompts ``prompt`` and ``prompt_lengths``.

        Raises:
            DataError: A recording is damaged or silent.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = [self._row(i, epoch) for i in indices.tolist()]
        waves = [self._wave(members, i, epoch) for members, i in zip(rows, indices.tolist(), strict=True)]
        texts = [" ".join(filter(None, (self.texts[m] for m in members))) for members in rows]
        for at in np.flatnonzero(item_uniform(self.seed, epoch, indices, _NO_SPEECH) < self.no_speech).tolist():
            waves[at], texts[at] = self._noise(len(waves[at]), int(indices[at]), epoch), ""
        padded = np.zeros((len(waves), max(map(len, waves))), dtype=np.float32)
        for place, wave in zip(padded, waves, strict=True):
            place[: len(wave)] = wave
        first = [self.recordings.utterances[members[0]] for members in rows]
        batch: Batch = {
            "index": torch.from_numpy(indices.copy()),
            "epoch": epoch,
            "names": [u.id for u in first],
            "texts": texts,
            "waves": torch.from_numpy(padded),
            "lengths": torch.tensor([len(wave) for wave in waves]),
        }
        prefixes = [self._prefix(u) for u in first]
        batch |= _padded("target", [p + self.encode(t) if t else [] for p, t in zip(prefixes, texts, strict=True)])
        if self.spec.languages:
            hidden = item_uniform(self.seed, epoch, indices, _NO_LANGUAGE) < self.no_language
            batch["language"] = torch.tensor([p[0] for p in prefixes])
            unknown = self.tokenizer.id_of(NO_LANGUAGE)
            batch["prefix"] = torch.tensor(
                [[unknown if h else p[0], p[1]] for p, h in zip(prefixes, hidden.tolist(), strict=True)]
            )
            if self.translates:
                spoken = [self.transcript(m) if t else "" for m, t in zip(rows, texts, strict=True)]
                batch |= _padded(
                    "transcript", [p + self.encode(s) if s else None for p, s in zip(prefixes, spoken, strict=True)]
                )
        if NO_PROMPT in self.spec.tokens:
            dropped = item_uniform(self.seed, epoch, indices, _NO_PROMPT) < self.no_prompt
            none = [self.tokenizer.id_of(NO_PROMPT)]
            before = [normalise(u.previous, self.spec.normalisation) for u in first]
            ids = [none if d else self.encode(t) or none for t, d in zip(before, dropped.tolist(), strict=True)]
            batch |= {k.replace("prompts", "prompt"): v for k, v in _padded("prompt", ids).items()}
        return batch

    def _row(self, item: int, epoch: int) -> list[int]:
        """Utterances that an item is made of: itself, then others, drawn anew in every epoch."""
        if self.concatenate is None:
            return [item]
        low, high = self.concatenate
        count = low + item % (high - low + 1)
        peers = self._peers[self._kind(self.recordings.utterances[item])]
        draws = item_uniform(self.seed, epoch, item * 1000 + np.arange(1, count), _MEMBER)
        return [item, *peers[(draws * len(peers)).astype(np.int64)].tolist()]

    def _kind(self, u: Utterance) -> tuple[str, str, str]:
        """What the utterances of a row have in common."""
        return u.speaker if self.rules.same_speaker else "", u.language, u.task

    def _counts(self) -> Ints:
        low, high = self.concatenate or (1, 1)
        return low + np.arange(len(self)) % (high - low + 1)

    def _wave(self, members: list[int], item: int, epoch: int) -> Wave:
        try:
            parts = [self.recordings.wave(m) for m in members]
        except AudioError as e:
            raise damaged(e) from None
        if len(parts) > 1:
            low, high = self.rules.gap
            gaps = item_uniform(self.seed, epoch, item * 1000 + np.arange(1, len(parts)), _GAP)
            samples = ((low + (high - low) * gaps) * self.spec.sample_rate).astype(np.int64)
            spaced: list[Wave] = [parts[0]]
            for gap, part in zip(samples.tolist(), parts[1:], strict=True):
                spaced += [np.zeros(gap, np.float32), part]
            parts = [np.concatenate(spaced)]
        return parts[0] if self.augment is None else self.augment(parts[0], epoch, item)

    def _noise(self, samples: int, item: int, epoch: int) -> Wave:
        rng = np.random.default_rng([self.seed, epoch, item, _NO_SPEECH])
        colours: tuple[Colour, ...] = ("white", "pink", "brown")
        noise = coloured_noise(colours[rng.integers(len(colours))], samples, self.spec.sample_rate, rng)
        if rng.random() < DIGITAL_SILENCE:
            return np.zeros_like(noise)
        return noise * np.float32(10 ** (rng.uniform(*NOISE_DB) / 20))

    def transcript(self, members: Sequence[int]) -> str:
        """Return what is said in a row of utterances; empty where the transcript of one is missing."""
        texts = [normalise(self.recordings.utterances[m].text or "", self.spec.normalisation) for m in members]
        return " ".join(texts) if all(texts) else ""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without what the vocabulary lacks."""
        unknown = set(self.tokenizer.unknown(text))
        if unknown:  # of an evaluation, where it is an error, or of a prompt; training leaves such targets out
            if self.spec.vocabulary == "words":
                text = " ".join(w for w in text.split() if w not in unknown)
            else:
                text = "".join(c for c in text if c not in unknown)
        return self.tokenizer.encode(text)

    def _prefix(self, utterance: Utterance) -> list[int]:
        if not self.spec.languages:
            return []
        known, tasks = self.spec.languages, self.spec.tasks  # recordings to predict say neither
        language = f"<{utterance.language}>" if utterance.language in known else NO_LANGUAGE
        return [
            self.tokenizer.id_of(t) for t in (language, f"<{utterance.task if utterance.task in tasks else tasks[0]}>")
        ]


def damaged(error: AudioError) -> DataError:
    """Return the error of a recording that stops a training, with what can be done about it."""
    return DataError(f"{error} To leave such recordings out, set data.bad=skip.")


def target_text(u: Utterance) -> str:
    """Return what an utterance's task wants said; empty where the source does not tell."""
    return (u.text or "") if u.task == "asr" else u.translation


def _padded(name: str, ids: Iterable[list[int] | None]) -> Batch:
    rows = list(ids)
    padded, mask = pad_batch([torch.tensor(row or [], dtype=torch.int64) for row in rows], 0)
    missing = torch.tensor([row is None for row in rows])
    return {f"{name}s": padded, f"{name}_lengths": mask.sum(1).masked_fill(missing, -1)}
