"""Facts about recordings and their transcripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError

Vocabulary = Literal["characters", "words", "sentencepiece"]
Normalisation = Literal["raw", "basic", "english"]

BLANK = "<blank>"
NO_PROMPT = "<na>"
NO_LANGUAGE = "<nolang>"


@dataclass(frozen=True, kw_only=True)
class SpeechSpec(DataSpec):
    """Facts about recordings and their transcripts.

    Args:
        sample_rate: Samples a second that the model reads; whatever a file has is resampled to it.
        n_mels: Log-mel channels M.
        tokens: All tokens in the order of the logits; the first is the blank. Those in <> stand for no text.
        vocabulary: What a token is.
        pieces: The SentencePiece model, base64; empty for other vocabularies.
        normalisation: How transcripts are made comparable before they are cut into tokens; see ``text.normalise``.
        languages: Languages the prefix can name, ISO 639-3; the token of ``eng`` is ``<eng>``. Empty for a model
            without prefix.
        tasks: Tasks the prefix can name: ``asr``, and ``st_deu`` for translation into German; their tokens are
            ``<asr>`` and ``<st_deu>``.
        mean: Mean of each log-mel channel over the training data, (M,); empty for 0.
        std: Its standard deviation, (M,); empty for 1.
    """

    sample_rate: int = 16_000
    n_mels: int = 80
    tokens: tuple[str, ...]
    vocabulary: Vocabulary = "characters"
    pieces: str = ""
    normalisation: Normalisation = "basic"
    languages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    domain: ClassVar[str] = "speech"

    def __post_init__(self) -> None:
        if self.sample_rate < 1000:
            raise ConfigError(f"SpeechSpec: sample_rate must be at least 1000, got {self.sample_rate}.")
        if not self.tokens or self.tokens[0] != BLANK:
            raise ConfigError(f"SpeechSpec: the first token must be {BLANK}, got {self.tokens[:1]}.")
        for name in ("mean", "std"):
            if (count := len(getattr(self, name))) not in (0, self.n_mels):
                raise ConfigError(f"SpeechSpec: {name} must have n_mels={self.n_mels} numbers or none, got {count}.")
        if bool(self.languages) != bool(self.tasks):
            raise ConfigError("SpeechSpec: languages and tasks go together; give both or none.")
        for token in self.prefix_tokens:
            if token not in self.tokens:
                raise ConfigError(f"SpeechSpec: the token {token} of the prefix is missing among the tokens.")

    @property
    def prefix_tokens(self) -> tuple[str, ...]:
        """Tokens that the prefix is made of: languages, then tasks; none for a model without prefix."""
        return tuple(f"<{name}>" for name in (*self.languages, *self.tasks))
