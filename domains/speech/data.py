"""The data module of transcribed recordings."""

from __future__ import annotations

import base64
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.backbones.random import item_uniform
from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.buckets import (
    BucketSampler,
    TryStep,
    estimate_bins,
    estimate_bins_2d,
    largest_batches,
    padding_of,
)
from vertebra.domains.spec import DataSpec
from vertebra.domains.speech.audio import AudioError, audio_info
from vertebra.domains.speech.augment import Augment, WaveAugment
from vertebra.domains.speech.frontend import LogMel
from vertebra.domains.speech.items import Concatenate, Ints, Recordings, SpeechItems, damaged, target_text
from vertebra.domains.speech.sources import read_source, read_unlabelled
from vertebra.domains.speech.sources_base import BadLine, read_bytes
from vertebra.domains.speech.spec import NO_LANGUAGE, NO_PROMPT, Normalisation, SpeechSpec, Vocabulary
from vertebra.domains.speech.text import normalise
from vertebra.domains.speech.utterance import Utterance
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.text import (
    TextTokenizer,
    learn_characters,
    learn_pieces,
    learn_words,
    make_tokenizer,
    piece_tokens,
)

log = logging.getLogger("vertebra")

_MEASURED = 400  # training recordings that give mean and std
_SPLIT, _MEASURE = 301, 302  # salts of the draws


class SpeechData(BaseData):
    """Transcribed recordings.

    Args:
        root: A folder or a manifest: audio with .txt beside it, JSONL of NeMo or ESPnet, a Kaldi directory, the layouts
            of LibriSpeech, Common Voice, Speech Commands, FSDD and AN4, or a table with the columns ``path`` and
            ``text``. Splits that it has are kept; those that it lacks are drawn.
        val: Another such source for validation.
        test: Another such source for testing.
        predict: Folder or files to predict, without transcripts.
        layout: Layout of the sources, where it cannot be told from the files.
        sample_rate: Samples a second that the model reads; files are resampled to it.
        n_mels: Log-mel channels.
        vocabulary: ``characters``, ``words``, or ``sentencepiece``.
        vocabulary_size: Pieces of a SentencePiece model that is trained on the transcripts.
        piece_model: A SentencePiece model to take instead.
        normalisation: ``raw``, ``basic`` or ``english``, see ``text.normalise``.
        prefix: Whether a prefix says language and task; ``auto`` where there are several languages or a translation.
        val_fraction: Share of the training utterances for validation, where the source has none; one at least.
        test_fraction: Share for testing, taken before, likewise.
        val_speakers: Speakers who are used for validation alone.
        test_speakers: Speakers who are used for testing alone; the source's own splits are then not used.
        concatenate: Make rows of recordings.
        augment: What training does to waves at random.
        no_language: Share of training items whose prefix hides the language; evaluation always hides it.
        no_prompt: Share of training items whose prompt is left away. What the vocabulary lacks of a prompt is not read.
        no_speech: Share of training items in whose place there is noise, so that the model learns to say nothing of it.
        bad: Whether a damaged or silent recording is an error when it is reached, or all are tried first and it is left
            out and reported.
        min_seconds: Shorter recordings are left out and reported.
        max_seconds: Longer recordings are left out and reported.
        buckets: Length buckets of the batches.
        target_buckets: Buckets by number of tokens in each of them; 1 for none.
        batch_size: Recordings in a batch.
        batch_seconds: Seconds in a batch, padding included, and also what augmentation adds at most.
        batch_memory: GiB that a training step may take: the largest batch of every length bucket that fits is searched
            before training, and the two limits above hold in evaluation alone. None for no search.
        quadratic_seconds: Length at which a recording counts twice, for attention's sake; None for never.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of splits, order and augmentation.
    """

    def __init__(
        self,
        *,
        root: str | list[str] | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | list[str] | None = None,
        layout: str = "auto",
        sample_rate: int = 16_000,
        n_mels: int = 80,
        vocabulary: Vocabulary = "characters",
        vocabulary_size: int = 500,
        piece_model: str | None = None,
        normalisation: Normalisation = "basic",
        prefix: bool | Literal["auto"] = "auto",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        val_speakers: list[str] | None = None,
        test_speakers: list[str] | None = None,
        concatenate: Concatenate | None = None,
        augment: Augment | None = None,
        no_language: float = 0.5,
        no_prompt: float = 0.5,
        no_speech: float = 0.0,
        bad: Literal["error", "skip"] = "error",
        min_seconds: float = 0.02,
        max_seconds: float = 30.0,
        buckets: int = 10,
        target_buckets: int = 1,
        batch_size: int = 64,
        batch_seconds: float | None = 120.0,
        batch_memory: float | None = None,
        quadratic_seconds: float | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, seed=seed)
        if root is None and not predict:
            raise ConfigError("SpeechData: give root, a folder or a manifest of transcribed recordings, or predict.")
        if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ConfigError(
                "SpeechData: val_fraction and test_fraction must be from 0 and below 1 together, got "
                f"{val_fraction} and {test_fraction}."
            )
        if not 0 <= min_seconds < max_seconds:
            raise ConfigError(f"SpeechData: min_seconds ({min_seconds}) must be below max_seconds ({max_seconds}).")
        if bad not in ("error", "skip"):
            raise ConfigError(f"SpeechData: bad must be error or skip, got {bad!r}.")
        for name, share in (("no_language", no_language), ("no_prompt", no_prompt), ("no_speech", no_speech)):
            if not 0 <= share <= 1:
                raise ConfigError(f"SpeechData: {name} must be from 0 to 1, got {share}.")
        for name, seconds in (("batch_seconds", batch_seconds), ("quadratic_seconds", quadratic_seconds)):
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"SpeechData: {name} must be above 0, got {seconds}.")
        if batch_memory is not None and not batch_memory > 0:
            raise ConfigError(f"SpeechData: batch_memory must be above 0 GiB, got {batch_memory}.")
        if piece_model is not None and vocabulary != "sentencepiece":
            raise ConfigError(f"SpeechData: piece_model needs vocabulary=sentencepiece, got {vocabulary}.")
        self.roots = [] if root is None else [root] if isinstance(root, str) else list(root)
        self.val, self.test, self.predict, self.layout = val, test, predict, layout
        self.sample_rate, self.n_mels = sample_rate, n_mels
        self.vocabulary, self.vocabulary_size, self.piece_model = vocabulary, vocabulary_size, piece_model
        self.normalisation, self.prefix = normalisation, prefix
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.val_speakers, self.test_speakers = val_speakers or [], test_speakers or []
        self.concatenate = concatenate
        self.augment = augment
        self.no_language, self.no_prompt, self.no_speech = no_language, no_prompt, no_speech
        self.bad, self.min_seconds, self.max_seconds = bad, min_seconds, max_seconds
        self.buckets, self.target_buckets = buckets, target_buckets
        self.batch_seconds, self.quadratic_seconds = batch_seconds, quadratic_seconds
        self.batch_memory = batch_memory
        self._found: dict[str, Any] = {}
        self.rejected: list[BadLine] = []
        """Recordings that were left out, and why; after ``setup``."""
        self._noted: set[BadLine] = set()
        self._reported = 0
        self._sources: dict[str, list[Utterance]] | None = None
        self._durations: dict[Path, float] = {}

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        if split == "predict":
            return "give predict, a folder or files."
        if split == "train":
            return "give root, a folder or a manifest of transcribed recordings."
        return f"give {split}, another folder or manifest, or {split}_fraction above 0."

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """List the recordings, split them, and learn vocabulary and statistics from the training split."""
        known = spec if isinstance(spec, SpeechSpec) else None
        tables: dict[str, list[Utterance]] = {}
        if splits - {"predict"} or known is None:
            if self._sources is None:
                self._sources = self._tables()
            wanted = splits if known is not None else splits | {"train"}
            tables = {name: table for name, table in self._sources.items() if name in wanted}
        if "predict" in splits and self.predict:
            tables["predict"] = read_unlabelled(self.predict)
        durations: dict[str, NDArray[np.float64]] = {}
        for name, table in tables.items():
            tables[name], durations[name] = self._readable(table, transcribed=name != "predict")
        if known is None:
            if not tables.get("train"):
                self._report()
                raise DataError(f"SpeechData: no train data to learn the vocabulary from; {self.hint('train')}")
            known = self._make_spec(tables["train"])
        tokenizer = make_tokenizer(known.vocabulary, known.tokens, known.pieces)
        items: dict[str, Items] = {}
        for name, table in tables.items():
            kept = self._learnable(table, known, tokenizer, name) if name != "predict" else np.arange(len(table))
            chosen = [table[i] for i in kept.tolist()]
            items[name] = self._items(name, chosen, durations[name][kept], known, tokenizer)
        self._report()
        return known, {name: split for name, split in items.items() if len(split.lengths)}

    def sampler(self, split: Split, items: Items, *, shuffle: bool, rank: int, world_size: int) -> BucketSampler:
        """Batches by length, and by number of tokens where ``target_buckets`` asks for it."""
        assert isinstance(items, SpeechItems)
        rate = self.spec_rate
        if split == "train" and self.batch_memory is not None and self._found:
            return BucketSampler(
                items.lengths,
                targets=items.target_lengths,
                edges=[(length, target) for length, target in self._found["edges"]],
                batch_sizes=self._found["sizes"],
                shuffle=shuffle,
                seed=self.seed,
                rank=rank,
                world_size=world_size,
            )
        return BucketSampler(
            items.lengths,
            targets=items.target_lengths if self.target_buckets > 1 else None,
            bins=self.buckets,
            sub_bins=self.target_buckets,
            batch_size=self.batch_size,
            max_total=None if self.batch_seconds is None else self.batch_seconds * rate,
            quadratic_length=None if self.quadratic_seconds is None else self.quadratic_seconds * rate,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def find_batches(self, try_step: TryStep, agree: Callable[[list[int]], list[int]]) -> None:
        """Search the largest training batch of every bucket, unless a checkpoint says what was found.

        Args:
            try_step: Whether a step on (items, samples, tokens) fits into ``batch_memory``.
            agree: Takes the sizes that this process found, and returns those that all can take.

        Raises:
            ConfigError: Not even one recording fits.
        """
        items = self.items("train")
        assert isinstance(items, SpeechItems)
        assert self.batch_memory is not None
        edges = [list(edge) for edge in self._edges(items)]
        if self._found.get("memory") == self.batch_memory and self._found["edges"] == edges:
            return
        longest = 0.0

        def watched(count: int, length: float, target: float) -> bool:
            nonlocal longest
            longest = length
            return try_step(count, length, target)

        try:
            sizes = largest_batches(watched, [(length, target) for length, target in edges], limit=len(items))
        except ConfigError:
            raise ConfigError(
                f"SpeechData: batch_memory must hold a step on one recording of {longest / self.spec_rate:.3g} s, "
                f"{self.batch_memory:g} GiB do not; raise it, lower max_seconds, or choose a smaller backbone."
            ) from None
        self._found = {"memory": self.batch_memory, "edges": edges, "sizes": agree(sizes)}
        rows = [f"{e[0] / self.spec_rate:>10.2f} {n:>11}" for e, n in zip(edges, self._found["sizes"], strict=True)]
        log.info("batches for %g GiB:\n%s", self.batch_memory, "\n".join([" seconds to  recordings", *rows]))

    def _edges(self, items: SpeechItems) -> list[tuple[float, float]]:
        """Most samples and tokens of each bucket; every item has one that holds it."""
        lengths, targets = items.lengths, items.target_lengths
        if self.target_buckets > 1:
            edges = estimate_bins_2d(lengths, targets, self.buckets, self.target_buckets)
            return [*edges[:-1], (edges[-1][0], float(targets.max()))]
        bounds = estimate_bins(lengths, self.buckets)
        bucket = np.searchsorted(bounds, lengths)
        return [(bound, float(targets[bucket == i].max())) for i, bound in enumerate(bounds)]

    def state_dict(self) -> dict[str, Any]:
        """Sizes of batches that were searched."""
        return dict(self._found)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the sizes of a checkpoint."""
        self._found = dict(state)

    @property
    def spec_rate(self) -> int:
        """Samples a second of the spec."""
        assert isinstance(self.spec, SpeechSpec)
        return self.spec.sample_rate

    # ------------------------------------------------------------ tables and splits

    def _tables(self) -> dict[str, list[Utterance]]:
        utterances: list[Utterance] = []
        for root in self.roots:
            utterances += self._read_source(root)
        tables: dict[str, list[Utterance]] = {"train": [], "val": [], "test": []}
        for u in utterances:
            if u.speaker in self.test_speakers:
                tables["test"].append(u)
            elif u.speaker in self.val_speakers:
                tables["val"].append(u)
            else:
                tables["train" if self.test_speakers or not u.split else u.split].append(u)
        for name, speakers in (("test", self.test_speakers), ("val", self.val_speakers)):
            if missing := sorted(set(speakers) - {u.speaker for u in utterances}):
                there = ", ".join(sorted({u.speaker for u in utterances if u.speaker})[:10]) or "none"
                raise ConfigError(f"SpeechData: {name}_speakers must be in the data ({there}), got {missing[0]!r}.")
        for name, source in (("val", self.val), ("test", self.test)):
            if source is not None:
                tables[name] = self._read_source(source)
        for name, share in (("test", self.test_fraction), ("val", self.val_fraction)):
            if not tables[name] and share and len(tables["train"]) > 1:
                draws = item_uniform(self.seed, 0, np.arange(len(tables["train"])), _SPLIT)
                count = max(1, round(share * len(draws)))
                chosen = set(np.argsort(draws, kind="stable")[:count].tolist())
                tables[name] = [u for i, u in enumerate(tables["train"]) if i in chosen]
                tables["train"] = [u for i, u in enumerate(tables["train"]) if i not in chosen]
        return {name: table for name, table in tables.items() if table}

    def _read_source(self, path: str) -> list[Utterance]:
        source = read_source(path, self.layout, measure=False)  # ``_readable`` does
        for bad in source.bad:
            self._note(bad)
        return source.utterances

    def _readable(
        self, utterances: list[Utterance], *, transcribed: bool
    ) -> tuple[list[Utterance], NDArray[np.float64]]:
        """Keep what has a transcript and a length in range, with the lengths in seconds."""
        kept, seconds = [], []
        for u in utterances:
            try:
                length = self._length(u)
                if transcribed and not target_text(u).strip():
                    self._reject(u, "the transcript is empty", "add one, or take the recording out")
                elif length <= 0:
                    self._reject(u, f"start must be before the end, got {u.start:g} s", "correct the times")
                elif transcribed and not self.min_seconds <= length <= self.max_seconds:
                    limits = f"from {self.min_seconds:g} to {self.max_seconds:g} seconds"
                    self._reject(u, f"its length must be {limits}, got {length:.3g}", "cut it, or move the limits")
                else:
                    if self.bad == "skip":
                        Recordings([u], self.sample_rate, spoken=transcribed).wave(0)
                    kept.append(u)
                    seconds.append(length)
            except AudioError as e:
                if self.bad == "error":
                    raise damaged(e) from None
                self._reject(u, e.rule, e.advice)
        return kept, np.array(seconds, dtype=np.float64)

    def _length(self, u: Utterance) -> float:
        """Seconds of an utterance; of a whole file, from its header."""
        if u.duration is not None:
            return u.duration
        if u.path not in self._durations:
            self._durations[u.path] = audio_info(u.path).duration
        return self._durations[u.path] - u.start

    def _learnable(self, table: list[Utterance], spec: SpeechSpec, tokenizer: TextTokenizer, split: str) -> Ints:
        """Rows whose text the vocabulary can write; in validation and test what it cannot is counted as an error."""
        kept = []
        for row, u in enumerate(table):
            text = normalise(target_text(u), spec.normalisation)
            spoken = normalise(u.text or "", spec.normalisation)
            unknown = tokenizer.unknown(text) or tokenizer.unknown(spoken)
            if not text:
                self._reject(u, f"nothing is left of the transcript {target_text(u)!r}", "use normalisation=raw")
            elif spec.languages and (u.language not in spec.languages or u.task not in spec.tasks):
                self._reject(u, f"language {u.language!r} and task {u.task!r} are not the model's", "correct them")
            elif unknown and split == "train":
                listed = " ".join(map(repr, unknown[:5]))
                self._reject(u, f"the vocabulary lacks {listed}", "correct the transcript")
            else:
                kept.append(row)
        return np.array(kept, dtype=np.int64)

    def keep_feasible(self, fits: Any) -> None:
        """Leave out training items whose tokens do not fit into their positions.

        Args:
            fits: Takes samples (N,) and, for each, the ids of the target; returns bool (N,).
        """
        items = self._splits.get("train")
        if not isinstance(items, SpeechItems) or not len(items):
            return
        fastest = self.augment.fastest if self.augment is not None else 1.0
        samples = np.floor(items.durations * self.spec_rate / fastest).astype(np.int64)
        between = [-1] if self.concatenate is not None else []  # a space, or a blank between two that are the same
        texts = [items.texts]
        if items.translates:
            texts.append([items.transcript([row]) for row in range(len(items))])
        ids = [[items.encode(t) + between for t in column] for column in texts]
        good = np.all([fits(samples, column) for column in ids], axis=0)
        for row in np.flatnonzero(~good).tolist():
            tokens, seconds = max(len(column[row]) - len(between) for column in ids), items.durations[row]
            self._reject(
                items.recordings.utterances[row],
                f"its {seconds:.3g} seconds have too few positions for {tokens} tokens",
                "choose a lower subsampling, or words or sentencepiece as vocabulary",
            )
        if not good.all():
            if not good.any():
                raise DataError(f"SpeechData: no target fits its recording; {self.rejected[-1].advice}.")
            self._splits["train"] = items.take(np.flatnonzero(good))
        self._report()

    def _reject(self, u: Utterance, rule: str, advice: str) -> None:
        self._note(BadLine(file=str(u.path), line=u.line, rule=rule, advice=advice))

    def _note(self, bad: BadLine) -> None:
        if bad not in self._noted:  # a split may be read again, for another stage
            self._noted.add(bad)
            self.rejected.append(bad)

    def _report(self) -> None:
        fresh = self.rejected[self._reported :]
        self._reported = len(self.rejected)
        if fresh:
            reasons = Counter(b.rule.partition(" (")[0] for b in fresh)
            told = "; ".join(f"{n} because {r}" for r, n in reasons.most_common(3))
            log.warning("%d recordings are left out: %s; the first is %s", len(fresh), told, fresh[0].file)

    # ------------------------------------------------------------ the spec, and items

    def _make_spec(self, train: list[Utterance]) -> SpeechSpec:
        texts = [normalise(target_text(u), self.normalisation) for u in train]
        texts += [normalise(u.text, self.normalisation) for u in train if u.task != "asr" and u.text]
        languages = sorted({u.language for u in train if u.language})
        tasks = sorted({u.task for u in train})
        wanted = len(languages) > 1 or tasks != ["asr"] if self.prefix == "auto" else self.prefix
        if wanted and not languages:
            raise DataError(
                "SpeechData: prefix=true needs a language for every recording; add the column or key 'lang'."
            )
        specials: list[str] = []
        if any(u.previous for u in train):
            specials.append(NO_PROMPT)
        if wanted:
            specials += [NO_LANGUAGE, *(f"<{name}>" for name in (*languages, *tasks))]
        pieces = b""
        if self.vocabulary == "sentencepiece":
            if self.piece_model is not None:
                pieces = read_bytes(Path(self.piece_model))
                tokens = piece_tokens(pieces, specials)
            else:
                tokens, pieces = learn_pieces(texts, self.vocabulary_size, specials, seed=self.seed)
        else:
            if self.concatenate is not None and self.vocabulary == "characters":
                texts.append(" ")  # isolated words have none, rows of them do
            learn = learn_characters if self.vocabulary == "characters" else learn_words
            tokens = learn(texts, specials)
        spec = SpeechSpec(
            sample_rate=self.sample_rate,
            n_mels=self.n_mels,
            tokens=tuple(tokens),
            vocabulary=self.vocabulary,
            pieces=base64.b64encode(pieces).decode(),
            normalisation=self.normalisation,
            languages=tuple(languages) if wanted else (),
            tasks=tuple(tasks) if wanted else (),
        )
        mean, std = self._statistics(train, spec)
        return dataclasses.replace(spec, mean=mean, std=std)

    def _statistics(self, train: list[Utterance], spec: SpeechSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the log-mel channels over some training recordings."""
        draws = item_uniform(self.seed, 0, np.arange(len(train)), _MEASURE)
        chosen = [train[i] for i in np.argsort(draws, kind="stable")[:_MEASURED].tolist()]
        recordings, logmel = Recordings(chosen, spec.sample_rate), LogMel(spec.sample_rate, spec.n_mels)
        frames = []
        for row in range(len(chosen)):
            try:
                wave = torch.from_numpy(recordings.wave(row))
            except AudioError as e:
                raise damaged(e) from None
            if len(wave) > logmel.n_fft:
                frames.append(logmel(wave[None], torch.tensor([len(wave)]))[0][0])
        if not frames:
            return (), ()
        every = torch.cat(frames).double()
        return _rounded(every.mean(0)), _rounded(every.std(0).clamp(min=1e-3))

    def _items(
        self,
        name: str,
        utterances: list[Utterance],
        durations: NDArray[np.float64],
        spec: SpeechSpec,
        tokenizer: TextTokenizer,
    ) -> SpeechItems:
        rules, train = self.concatenate, name == "train"
        rows = None
        if rules is not None and name != "predict":
            rows = rules.items if train or rules.eval_items is None else rules.eval_items
            if spec.vocabulary == "characters" and " " not in spec.tokens and rows[1] > 1:
                raise ConfigError(
                    "SpeechData: concatenate needs a space among the model's characters, got none; train a new model."
                )
        augment = WaveAugment(self.augment, spec.sample_rate, self.seed) if train and self.augment is not None else None
        return SpeechItems(
            Recordings(utterances, spec.sample_rate, spoken=name != "predict"),
            spec,
            tokenizer,
            durations,
            augment=augment,
            concatenate=rows,
            rules=rules,
            no_language=self.no_language if train else 1.0,
            no_prompt=self.no_prompt if train else 0.0,
            no_speech=self.no_speech if train else 0.0,
            seed=self.seed,
        )


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values.tolist())


def padding_line(sampler: BucketSampler) -> str:
    """Say how much of the batches of an epoch is padding, and how much of random ones of the same sizes would be."""
    world = sampler.world_size
    plan = [batch[rank::world] for batch in sampler.global_batches(sampler.epoch) for rank in range(world)]
    ends = np.cumsum([len(batch) for batch in plan])
    order = np.random.default_rng(sampler.seed).permutation(sampler.lengths.size)
    drawn = np.split(np.resize(order, ends[-1]), ends[:-1])
    shares = (padding_of(batches, sampler.lengths) for batches in (plan, drawn))
    return "padding {:.1f} % of samples, {:.1f} % in random order".format(*(100 * share for share in shares))
