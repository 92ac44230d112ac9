"""Speech: recordings to text with times, and which language is spoken."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.transcripts import FORMATS, TranscriptWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from vertebra.domains.model import DomainModel
    from vertebra.domains.speech.decoding import Hypothesis, Scorer
    from vertebra.domains.speech.model import SpeechCTC
    from vertebra.domains.speech.recognition import RecordingDecoder
    from vertebra.domains.speech.streaming import StreamingRecogniser
    from vertebra.domains.speech.transcript import Transcript, Word
    from vertebra.domains.speech.windows import Window

Decoding = Literal["greedy", "beam"]
Blocks = Callable[[], "Iterator[NDArray[np.float32]]"]
"""Reads a recording from its beginning, block by block."""

TASKS = ("speech/ctc",)
BLOCK_SECONDS = 30.0


class SpeechPipeline(Pipeline):
    """Base of the pipelines of recordings: reads files of any length in windows, runs the model on them.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most windows in a batch.
        batch_tokens: Most positions in a batch.
        language: What is spoken, for models with a prefix; empty for unknown.
        task: What is wanted of such a model: ``asr``, or a translation such as ``st_deu``.
        prompt: Text that came before, for models that read one.
        window: Seconds of a window.
        context: Seconds at either side of a window that only help its middle.
        channel: Channel of the files, from 0; None for the mean of all.
    """

    reads_folders = True
    unit = "audio-hours"
    hourly = True
    pool_batches = 4

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 16,
        batch_tokens: int = 32_768,
        language: str = "",
        task: str = "asr",
        prompt: str = "",
        window: float = 30.0,
        context: float = 4.0,
        channel: int | None = None,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.domains.speech.windows import Windows
        from vertebra.tokenizers.text import make_tokenizer

        self.recogniser: SpeechCTC = self.model  # type: ignore[assignment]
        spec = self.spec = self.recogniser.spec
        self.tokenizer = make_tokenizer(spec.vocabulary, spec.tokens, spec.pieces)
        self.windows = Windows(self.recogniser, window, context)
        self.language, self.task, self.channel = language, task, channel
        if (language or task != "asr") and not spec.languages:
            raise ConfigError(
                f"{self.name}: the model knows one language and one task only; leave language and task away."
            )
        if prompt and self.recogniser.prompt_encoder is None:
            raise ConfigError(f"{self.name}: the model reads no prompt; leave it away.")
        self.prefix = self.recogniser.prefix_ids(language, task) if spec.languages else None
        self.prompt = self.tokenizer.encode(prompt) if prompt else None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of the model and of reading."""
        super().add_arguments(parser)
        parser.set_defaults(batch_size=16)
        group = parser.add_argument_group("recordings")
        group.add_argument("--language", default="", metavar="ISO", help="what is spoken, as in eng (default: unknown)")
        group.add_argument("--task", default="asr", help="asr, or a translation such as st_deu (default: asr)")
        group.add_argument(
            "--prompt", default="", metavar="TEXT", help="text that came before, where the model reads it"
        )
        group.add_argument("--window", type=float, default=30.0, metavar="S", help="seconds of a window (default: 30)")
        group.add_argument(
            "--context", type=float, default=4.0, metavar="S", help="seconds at its sides that only help (default: 4)"
        )
        group.add_argument("--channel", type=int, metavar="N", help="channel from 0 (default: the mean of all)")

    # ---------------------------------------------------------------- recordings in

    def folder_files(self, folder: Path) -> list[Path]:
        """List the audio files of a folder and of those in it, in order."""
        from vertebra.domains.speech.audio import AUDIO_ENDINGS

        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in AUDIO_ENDINGS and f.is_file())
        if not files:
            raise DataError(f"{folder}: must hold audio files ({', '.join(sorted(AUDIO_ENDINGS))}), found none.")
        return files

    def amount(self, path: Path) -> float | None:
        """Hours of a file, as its header says."""
        from vertebra.domains.speech.audio import audio_info

        try:
            return audio_info(path).duration / 3600
        except DataError:
            return 0.0

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the windows of a file."""
        from vertebra.domains.speech.audio import stream_audio

        rate = self.spec.sample_rate
        blocks = partial(stream_audio, path, rate, block_seconds=BLOCK_SECONDS, channel=self.channel)
        yield from self._items(str(path), path.name, blocks)

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the windows of samples (N,) at the model's sample rate, or of the bytes of a file."""
        from vertebra.domains.speech.audio import AudioError, read_audio

        name = f"recording_{index}"
        if isinstance(value, str | Path):
            raise DataError(f"{value}: no such file; check the name.")
        if isinstance(value, bytes):
            try:
                wave = read_audio(value, self.spec.sample_rate, channel=self.channel, name=name)
            except AudioError as error:
                bad(BadRecord(file="", record=name, line=None, rule=error.rule, advice=error.advice))
                return
        else:
            wave = np.asarray(value, dtype=np.float32)
            if wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
                raise DataError(
                    f"{self.name}: samples must be finite numbers (N,) at {self.spec.sample_rate} a second, got shape "
                    f"{wave.shape}."
                )
        yield from self._items("", name, lambda: iter([wave]))

    def _items(self, file: str, name: str, blocks: Blocks) -> Iterator[Item]:
        before = 0
        for number, window in enumerate(self.windows.cut(blocks())):
            end = window.start + len(window.wave)
            hours = (end - before) / self.spec.sample_rate / 3600
            before = end
            size = len(window.wave) // self.recogniser.samples_per_position + 1
            yield Item(file=file, record=name, data=window, size=size, weight=hours, first=number == 0)

    # ---------------------------------------------------------------- the model

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Log-probabilities (T, V) of the positions that each window answers for, and the levels of their sound."""
        windows: list[Window] = [item.data for item in items]
        parts = self.log_probs(windows, self.prefix)
        return [Prediction(part, details={"levels": self._levels(w)}) for part, w in zip(parts, windows, strict=True)]

    def _levels(self, window: Window) -> NDArray[np.float32]:
        from vertebra.domains.speech.loudness import levels

        step = self.recogniser.samples_per_position
        end = None if window.keep is None else (window.skip + window.keep) * step
        return levels(window.wave[window.skip * step : end], self.spec.sample_rate)

    def log_probs(self, windows: list[Window], prefix: list[int] | None) -> list[Tensor]:
        """Return log-probabilities of each window's own positions (T, V); a first window begins with the prefix's."""
        import torch

        lengths = torch.tensor([len(w.wave) for w in windows])
        waves = torch.zeros(len(windows), int(lengths.max()))
        for row, window in zip(waves, windows, strict=True):
            row[: len(window.wave)] = torch.from_numpy(window.wave)
        given: dict[str, Tensor] = {}
        if prefix is not None:
            given["prefix"] = torch.tensor([prefix], device=self.device).expand(len(windows), -1)
        if self.prompt is not None:
            given["prompt"] = torch.tensor([self.prompt], device=self.device).expand(len(windows), -1)
        with torch.inference_mode():
            found, counts = self.recogniser(waves.to(self.device), lengths.to(self.device), **given)
        extra = self.recogniser.prefix_length
        parts = []
        for row, count, window in zip(found.cpu(), counts.tolist(), windows, strict=True):
            begin = extra + window.skip
            end = count if window.keep is None else min(begin + window.keep, count)
            part = row[begin:end]
            parts.append(torch.cat([row[:extra], part]) if window.start == 0 and extra else part.clone())
        return parts

    # ---------------------------------------------------------------- transcripts

    def duration(self, window: Window) -> float:
        """Seconds of a recording, of its last window."""
        return (window.start + len(window.wave)) / self.spec.sample_rate

    def transcribed(self, item: Item, words: list[Word], duration: float, language: str) -> TranscriptPrediction:
        """Make the prediction of a recording from its words; ``item`` is its last window."""
        from vertebra.domains.speech.transcript import Transcript, cut_segments

        transcript = Transcript(
            item.file or item.record, duration, cut_segments(words, language=language, task=self.task)
        )
        window = None if callable(item.data) else item.data
        return TranscriptPrediction(
            transcript.text,
            {"confidence": float(np.mean([w.confidence for w in words])) if words else 0.0},
            item.record,
            {"duration": round(duration, 3), **({"language": language} if language else {})},
            transcript=transcript,
            wave=window.wave if window is not None and window.start == 0 else None,
            sample_rate=self.spec.sample_rate,
        )

    def check_formats(self, formats: Iterable[str]) -> tuple[str, ...]:
        """Return the endings of further transcripts; refuse unknown ones."""
        for ending in formats:
            if ending not in FORMATS:
                raise ConfigError(f"{self.name}: formats must be among {', '.join(FORMATS)}, got {ending!r}.")
        return tuple(formats)


@verb(
    "speech/transcribe",
    inputs="recordings (WAV, FLAC, OGG, MP3, SPHERE, ...) of any length, and folders of them",
    outputs=".jsonl (words and times), .txt, .ctm, .srt, .vtt, .TextGrid (of several recordings: in OUT.files)",
    model="speech_digits",
    tasks=("speech/ctc",),
)
class Transcribe(SpeechPipeline):
    """Text of recordings with the time and the confidence of every word.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most windows in a batch.
        batch_tokens: Most positions in a batch.
        language: What is spoken, for models with a prefix; empty for unknown.
        task: What is wanted of such a model: ``asr``, or a translation such as ``st_deu``.
        prompt: Text that came before, for models that read one.
        window: Seconds of a window.
        context: Seconds at either side of a window that only help its middle.
        channel: Channel of the files, from 0; None for the mean of all.
        formats: Further formats to write beside the output, by their endings.
        stream: Read recordings as if they came from a microphone, in chunks of so many milliseconds, with a causal
            model whose state is all that is remembered; 0 for windows.
        decode: ``greedy``, or ``beam`` for prefix beam search, which hot words and language models need.
        beam: Prefixes that a beam search keeps.
        hotwords: File with a word or phrase a line that are likely, or a list of them.
        hotword_bonus: What each token of a hot word adds to the logarithm of the probability, 10 at most for all.
        lm: Word n-gram model, ARPA (also gzipped) or KenLM's binary.
        lm_weight: Weight of its logarithm.
        word_bonus: What every word adds.
        lm_words: File with the words that a binary language model knows.
    """

    endings = tuple(FORMATS)

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 16,
        batch_tokens: int = 32_768,
        language: str = "",
        task: str = "asr",
        prompt: str = "",
        window: float = 30.0,
        context: float = 4.0,
        channel: int | None = None,
        formats: list[str] | tuple[str, ...] = (),
        stream: int = 0,
        decode: Decoding | None = None,
        beam: int = 16,
        hotwords: str | Path | list[str] | None = None,
        hotword_bonus: float = 2.0,
        lm: str | Path | None = None,
        lm_weight: float = 0.5,
        word_bonus: float = 1.0,
        lm_words: str | Path | None = None,
    ) -> None:
        super().__init__(
            model,
            device=device,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            language=language,
            task=task,
            prompt=prompt,
            window=window,
            context=context,
            channel=channel,
        )
        helped = hotwords is not None or lm is not None
        if decode == "greedy" and helped:
            raise ConfigError(f"{self.name}: hot words and language models need decode=beam, got greedy.")
        if decode not in (None, "greedy", "beam") or beam < 1:
            raise ConfigError(
                f"{self.name}: decode must be greedy or beam, and beam at least 1, got {decode} and {beam}."
            )
        if stream < 0 or (stream and (helped or decode == "beam")):
            raise ConfigError(f"{self.name}: stream={stream} must be at least 0, and goes with greedy decoding alone.")
        self.formats, self.beam, self.stream = self.check_formats(formats), beam, stream
        if stream:
            self._stream()  # so that a model that cannot says so before any file is read
        self.decode_with: Decoding = decode or ("beam" if helped else "greedy")
        self.scorer = self._scorer(hotwords, hotword_bonus, lm, lm_weight, word_bonus, lm_words)
        self._decoder: RecordingDecoder | None = None
        self._bad = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of decoding."""
        super().add_arguments(parser)
        group = parser.add_argument_group("decoding")
        add_formats(group)
        group.add_argument(
            "--stream", type=int, default=0, metavar="MS", help="read as from a microphone, in chunks of so many ms"
        )
        group.add_argument("--decode", choices=("greedy", "beam"), help="default: greedy, or beam where help is given")
        group.add_argument("--beam", type=int, default=16, metavar="N", help="prefixes that are kept (default: 16)")
        group.add_argument("--hotwords", metavar="FILE", help="words and phrases that are likely, one a line")
        group.add_argument(
            "--hotword-bonus", type=float, default=2.0, metavar="X", help="what a token of one adds (default: 2)"
        )
        group.add_argument("--lm", metavar="FILE", help="word n-gram model: ARPA, or KenLM's binary")
        group.add_argument("--lm-weight", type=float, default=0.5, metavar="X", help="its weight (default: 0.5)")
        group.add_argument("--word-bonus", type=float, default=1.0, metavar="X", help="what a word adds (default: 1)")
        group.add_argument("--lm-words", metavar="FILE", help="the words that a binary language model knows")

    def _items(self, file: str, name: str, blocks: Blocks) -> Iterator[Item]:
        if not self.stream:
            yield from super()._items(file, name, blocks)
            return
        hours = (self.amount(Path(file)) or 0.0) if file else 0.0
        yield Item(file=file, record=name, data=blocks, size=1, weight=hours)

    def predict(self, items: list[Item]) -> list[Prediction]:
        """What the model says of each window; in streaming, of each recording."""
        return [self._streamed(item) for item in items] if self.stream else super().predict(items)

    def _stream(self) -> StreamingRecogniser:
        from vertebra.domains.speech.streaming import StreamingRecogniser

        return StreamingRecogniser(self.recogniser, language=self.language, task=self.task)

    def _streamed(self, item: Item) -> Prediction:
        recogniser, chunk = self._stream(), max(round(self.stream * self.spec.sample_rate / 1000), 1)
        samples = 0
        for block in item.data():
            samples += len(block)
            for start in range(0, len(block), chunk):
                recogniser.feed(block[start : start + chunk])
        recogniser.finish()
        duration = samples / self.spec.sample_rate
        found = self.transcribed(item, recogniser.words(duration), duration, self._language_said(recogniser.ids))
        found.details |= {"delay": round(recogniser.delay, 3), "state_bytes": recogniser.state_bytes}
        return found

    def join(self, item: Item, part: Prediction | None) -> Prediction | None:
        """Collect the windows of a recording; its transcript once the last one is in."""
        from vertebra.domains.speech.recognition import RecordingDecoder

        if self.stream:
            return part
        window: Window = item.data
        if item.first:
            self._decoder, self._bad = RecordingDecoder(self.recogniser, self.tokenizer, self._decode), False
        if part is None:
            self._bad = True
        if self._bad or self._decoder is None:
            return None
        assert part is not None
        self._decoder.add(part.value, part.details["levels"])
        if not window.last:
            return None
        words = self._decoder.finish()
        return self.transcribed(item, words, self.duration(window), self._language_said(self._decoder.ids))

    def _language_said(self, ids: list[int]) -> str:
        known = {f"<{name}>": name for name in self.spec.languages}
        said = (known[token] for i in ids if (token := self.spec.tokens[i]) in known)
        return self.language or next(said, "")

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the transcripts."""
        return TranscriptWriter(outputs, self.formats, several=several_files)

    def _decode(self, log_probs: Tensor) -> Hypothesis:
        import torch

        from vertebra.domains.speech.decoding import greedy, prefix_beam_search

        if self.decode_with == "greedy":
            return greedy(log_probs[None], torch.tensor([len(log_probs)]))[0]
        return prefix_beam_search(log_probs, beam=self.beam, scorer=self.scorer)[0]

    def _scorer(
        self,
        hotwords: str | Path | list[str] | None,
        hotword_bonus: float,
        lm: str | Path | None,
        lm_weight: float,
        word_bonus: float,
        lm_words: str | Path | None,
    ) -> Scorer | None:
        from vertebra.domains.speech.decoding import combine

        scorers: list[Scorer] = []
        if hotwords is not None:
            scorers.append(self._hotwords(hotwords, hotword_bonus))
        if lm is not None:
            scorers.append(self._language_model(Path(lm), lm_weight, word_bonus, lm_words))
        return combine(scorers) if scorers else None

    def _language_model(self, path: Path, weight: float, bonus: float, words: str | Path | None) -> Scorer:
        from vertebra.domains.speech.language_model import KenLMModel, LanguageModelScorer, read_arpa

        spec = self.spec
        if path.name.endswith((".arpa", ".arpa.gz")):
            model: Any = read_arpa(path)
        elif words is not None or spec.vocabulary == "words":
            known = spec.tokens if words is None else Path(words).read_text(encoding="utf-8").split()
            model = KenLMModel(path, known)
        else:
            raise ConfigError(
                f"{self.name}: a binary language model needs lm_words, a file of the words it knows; or give its ARPA."
            )
        space = spec.tokens.index(" ") if spec.vocabulary == "characters" and " " in spec.tokens else None
        if spec.vocabulary == "characters" and space is None:
            raise ConfigError(f"{self.name}: the model's texts are single words, a language model cannot help.")
        return LanguageModelScorer(
            model, spec.tokens, vocabulary=spec.vocabulary, alpha=weight, beta=bonus, space=space
        )

    def _hotwords(self, given: str | Path | list[str], bonus: float) -> Scorer:
        from vertebra.domains.speech.hotwords import Hotwords
        from vertebra.domains.speech.text import normalise

        if isinstance(given, list):
            lines = given
        else:
            path = Path(given)
            if not path.is_file():
                raise ConfigError(f"{self.name}: hotwords must be a file with a phrase a line, {path} is none.")
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        phrases = [text for line in lines if (text := normalise(line, self.spec.normalisation))]
        for text in phrases:
            if unknown := self.tokenizer.unknown(text):
                raise ConfigError(f"{self.name}: the model's vocabulary lacks {unknown[0]!r} of the hot word {text!r}.")
        if not phrases:
            raise ConfigError(f"{self.name}: hotwords must hold at least one phrase, got none.")
        ids = [self.tokenizer.encode(text) for text in phrases]
        if self.spec.vocabulary == "characters":
            space = self.spec.tokens.index(" ") if " " in self.spec.tokens else None
            return Hotwords(ids, bonus, space=space)
        starts = [i for i, token in enumerate(self.spec.tokens) if token.startswith("\u2581")]
        return Hotwords(ids, bonus, starts=starts)


def add_formats(group: argparse._ArgumentGroup) -> None:
    """Add the option of further transcripts."""
    group.add_argument(
        "--formats", nargs="+", default=(), metavar="ENDING", help="further formats to write, as in .srt .TextGrid"
    )


@dataclass(eq=False, repr=False)
class TranscriptPrediction(Prediction):
    """The text of a recording.

    Args:
        transcript: With words and times.
        wave: The samples, where they are few enough to be drawn.
        sample_rate: Of those.
    """

    transcript: Transcript | None = None
    wave: NDArray[np.float32] | None = None
    sample_rate: int = 16_000

    def figure(self) -> Figure:
        """Draw the words over the spectrogram."""
        from vertebra.pipelines.speech_figures import spectrogram_figure

        if self.wave is None or self.transcript is None:
            return super().figure()
        return spectrogram_figure(self.wave, self.sample_rate, self.transcript.words, title=self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return name, text, confidence and words with times as plain Python values."""
        words = () if self.transcript is None else self.transcript.words
        return {**super().to_dict(), "words": [vars(w) for w in words]}
