"""Speech: which language is spoken."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vertebra.errors import ConfigError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Item, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.speech import SpeechPipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vertebra.domains.model import DomainModel
    from vertebra.domains.speech.windows import Window


@verb(
    "speech/identify",
    inputs="recordings (WAV, FLAC, OGG, MP3, SPHERE, ...) and folders of them",
    outputs=".csv: a row a recording; OUT.csv.png (how many of which language)",
    model="speech_languages",
    tasks=("speech/ctc",),
)
class Identify(SpeechPipeline):
    """Which language is spoken in recordings.

    Args:
        model: See ``Pipeline``; one that was trained with a prefix.
        device: See ``Pipeline``.
        batch_size: Most windows in a batch.
        batch_tokens: Most positions in a batch.
        window: Seconds of a window; of longer recordings all windows are averaged.
        context: Seconds that windows overlap at either side.
        channel: Channel of the files, from 0; None for the mean of all.
    """

    endings = (".csv",)

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 16,
        batch_tokens: int = 32_768,
        window: float = 30.0,
        context: float = 4.0,
        channel: int | None = None,
    ) -> None:
        super().__init__(
            model,
            device=device,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            window=window,
            context=context,
            channel=channel,
        )
        if not self.spec.languages:
            raise ConfigError(
                f"{self.name}: the model knows no languages; use one that was trained with data.prefix=true."
            )
        self._sums: list[NDArray[np.float64]] = []
        self._bad = False

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Score of every language in each window."""
        parts = self.log_probs([item.data for item in items], None)
        numbers = [self.recogniser.ids[f"<{name}>"] for name in self.spec.languages]
        return [Prediction(language_scores(part.numpy()[:, numbers])) for part in parts]

    def join(self, item: Item, part: Prediction | None) -> Prediction | None:
        """Average the windows of a recording, weighted by their length."""
        window: Window = item.data
        if item.first:
            self._sums, self._bad = [], False
        if part is None:
            self._bad = True
            return None
        self._sums.append(part.value * len(window.wave))
        if self._bad or not window.last:
            return None
        total = np.sum(self._sums, axis=0)
        scores = dict(zip(self.spec.languages, (total / total.sum()).tolist(), strict=True))
        duration = (window.start + len(window.wave)) / self.spec.sample_rate
        best = max(scores, key=scores.__getitem__)
        return Prediction(best, scores, item.record, {"duration": round(duration, 3)}, "score (probability)")

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the table of recordings."""
        return _IdentifyWriter(self, outputs)


def language_scores(log_probs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probability of each language, from those of its token at every position (T, languages).

    The language is said once, where its token is most probable; there the languages are compared.
    """
    at = int(log_probs.max(1).argmax())
    scores = np.exp(log_probs[at].astype(np.float64) - log_probs[at].max())
    return scores / scores.sum()


class _IdentifyWriter(Writer):
    """OUT.csv, and OUT.csv.png with the recordings that were read first."""

    def __init__(self, pipeline: Identify, outputs: Outputs) -> None:
        self.languages, self.outputs = pipeline.spec.languages, outputs
        self.table = csv.writer(outputs.open(outputs.target), lineterminator="\n")
        self.table.writerow(["file", "language", "score", "duration", *(f"score_{n}" for n in self.languages)])
        self.found: Counter[str] = Counter()

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one recording."""
        scores, best = prediction.scores, str(prediction.value)
        row = [item.file or item.record, best, f"{scores[best]:.6g}", prediction.details["duration"]]
        self.table.writerow([*row, *(f"{scores[n]:.6g}" for n in self.languages)])
        self.found[best] += 1

    def finish(self) -> None:
        """Draw how many recordings are of which language."""
        counts = {name: float(self.found[name]) for name in self.languages}
        figure = figures.bars(counts, title="Language of the recordings", label="recordings")
        self.outputs.open(self.outputs.side(".png"), "wb").write(figures.png_bytes(figure))
