"""Speech: when each word of a known text is said."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Bad, Item, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.speech import SpeechPipeline, TranscriptPrediction, add_formats
from vertebra.pipelines.transcripts import FORMATS, TranscriptWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vertebra.domains.model import DomainModel
    from vertebra.domains.speech.windows import Window

FIGURES = 10
"""Recordings whose alignment is drawn."""


@verb(
    "speech/align",
    inputs="recordings with a text of the same name (a.wav and a.txt) beside, and folders of them",
    outputs=".jsonl, .ctm, .srt, .vtt, .TextGrid, .txt; OUT.N.NAME.png (words over the spectrogram)",
    model="speech_digits",
    tasks=("speech/ctc",),
)
class Align(SpeechPipeline):
    """Times and confidence of the words of a known text.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most windows in a batch.
        batch_tokens: Most positions in a batch.
        language: What is spoken, for models with a prefix; empty for unknown.
        window: Seconds of a window.
        context: Seconds at either side of a window that only help its middle.
        channel: Channel of the files, from 0; None for the mean of all.
        text: What is said, for all recordings; None to read it from the file of the same name that ends in .txt.
        formats: Further formats to write beside the output, by their endings.
        figures: Recordings, from the first, whose words are drawn over the spectrogram; those of one window.
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
        window: float = 30.0,
        context: float = 4.0,
        channel: int | None = None,
        text: str | None = None,
        formats: list[str] | tuple[str, ...] = (),
        figures: int = FIGURES,
    ) -> None:
        super().__init__(
            model,
            device=device,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            language=language,
            window=window,
            context=context,
            channel=channel,
        )
        self.text, self.formats, self.figures = text, self.check_formats(formats), figures
        self._texts: dict[str, str] = {}
        self._parts: list[Tensor] = []
        self._levels_heard: list[NDArray[np.float32]] = []
        self._bad = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of the text and of what is written."""
        super().add_arguments(parser)
        group = parser.add_argument_group("alignment")
        group.add_argument("--text", help="what is said in all recordings (default: a .txt of the same name)")
        add_formats(group)
        group.add_argument(
            "--figures", type=int, default=FIGURES, metavar="N", help=f"recordings to draw (default: {FIGURES})"
        )

    def __call__(self, value: Any, text: str | None = None) -> Prediction | list[Prediction]:
        """Align recordings.

        Args:
            value: As in ``Pipeline``.
            text: What is said in it; None for the pipeline's own ``text``, or the file of the same name.
        """
        before = self.text
        self.text = before if text is None else text
        try:
            return super().__call__(value)
        finally:
            self.text = before

    def input_files(self, inputs: list[Path], target: Path) -> list[Path]:
        """List the recordings; refuse an output that would replace one of their texts."""
        files = super().input_files(inputs, target)
        if self.text is None and ".txt" in (target.suffix, *self.formats):
            written = target.with_suffix(".txt").resolve()
            for file in files:
                if file.with_suffix(".txt").resolve() == written:
                    raise ConfigError(
                        f"{self.name}: {written.name} is the text of {file.name} and would be replaced; choose another "
                        "output."
                    )
        return files

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the windows of a file, if its text can be aligned."""
        text = self.text
        if text is None:
            beside = path.with_suffix(".txt")
            if not beside.is_file():
                rule = f"there is no text beside it ({beside.name})"
                bad(BadRecord(file=str(path), record="", line=None, rule=rule, advice="add it, or pass --text"))
                return
            text = beside.read_text(encoding="utf-8", errors="replace")
        self._texts[str(path)] = self._normalised(text, str(path))
        yield from super().read(path, bad)

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the windows of samples."""
        if self.text is None:
            raise DataError(f"{self.name}: samples need their text; pass text='...'.")
        name = f"recording_{index}"
        self._texts[name] = self._normalised(self.text, name)
        yield from super().parse(value, index, bad)

    def _normalised(self, text: str, who: str) -> str:
        from vertebra.domains.speech.text import normalise

        text = normalise(text, self.spec.normalisation)
        if not text:
            raise DataError(f"{who}: the text is empty; write down what is said.")
        if unknown := self.tokenizer.unknown(text):
            listed = " ".join(map(repr, unknown[:5]))
            raise DataError(
                f"{who}: the model's vocabulary lacks {listed} of the text; correct it, or use another model."
            )
        return text

    def join(self, item: Item, part: Prediction | None) -> Prediction | None:
        """Collect the windows of a recording; its words once the last one is in."""
        import torch

        from vertebra.domains.speech.loudness import grow
        from vertebra.domains.speech.recognition import position_offset, timed_words

        window: Window = item.data
        if item.first:
            self._parts, self._levels_heard, self._bad = [], [], False
        if part is None:
            self._bad = True
            return None
        self._parts.append(part.value)
        self._levels_heard.append(part.details["levels"])
        if self._bad or not window.last:
            return None
        log_probs, self._parts = torch.cat(self._parts), []
        text = self._texts.pop(item.file or item.record)
        step, offset = self.recogniser.seconds_per_position, position_offset(self.recogniser)
        ids = self.tokenizer.encode(text)
        words = timed_words(log_probs[self.recogniser.prefix_length :], ids, self.tokenizer, step, offset)
        return self.transcribed(
            item, grow(words, np.concatenate(self._levels_heard)), self.duration(window), self.language
        )

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the transcripts and the figures."""
        return _AlignWriter(self, outputs, several_files)


class _AlignWriter(Writer):
    """What ``TranscriptWriter`` writes, and OUT.N.NAME.png of the first recordings."""

    def __init__(self, pipeline: Align, outputs: Outputs, several: bool) -> None:
        self.transcripts = TranscriptWriter(outputs, pipeline.formats, several=several)
        self.outputs, self.left, self.number = outputs, pipeline.figures, 0

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one recording."""
        assert isinstance(prediction, TranscriptPrediction)
        self.transcripts.write(item, prediction)
        self.number += 1
        if self.number <= self.left and prediction.wave is not None:
            path = self.outputs.side(f".{self.number}.{Path(item.record).stem}.png")
            self.outputs.write(path, figures.png_bytes(prediction.figure()))

    def finish(self) -> None:
        """Write what is left."""
        self.transcripts.finish()
