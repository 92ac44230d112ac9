"""Published language models, from and to ours; what each family can be is told in ``vertebra.backbones``.

A vocabulary of single nucleotides is left to the DNA domain, which reads the same families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.loading.files import read_json
from vertebra.backbones.published.base import Head, PublishedFamily, told_config
from vertebra.backbones.published.hybrid import BAMBA, HYBRIDNA, JAMBA, MAMBA
from vertebra.backbones.published.llama import LLAMA
from vertebra.domains.conversion import Conversion, Converter, loaded
from vertebra.domains.language.model import LanguageEncoder, LanguageModel
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.model import DomainModel
from vertebra.domains.vocabulary import TOKENIZER_FILES, nucleotide_ids
from vertebra.errors import LoadError


class LanguageConverter(Converter):
    """One family of language models."""

    family: ClassVar[PublishedFamily]

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by the family, and leave nucleotides to the DNA domain."""
        return self.family.recognises(checkpoint) and not nucleotide_ids(checkpoint)

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make a ``LanguageModel``, or a ``LanguageEncoder`` of a checkpoint without a head."""
        found = self.family.read(checkpoint)
        tensors = dict(found.tensors)
        spec = _spec_of(checkpoint, len(tensors["embed.weight"]))
        model: LanguageEncoder
        if found.head == "none":
            model = LanguageEncoder(found.config.build(), spec)
        else:
            model = LanguageModel(found.config.build(), spec, tie=found.head == "tied")
        if found.head == "tied":
            tensors["head.weight"] = tensors["embed.weight"]
        return loaded(
            model,
            tensors,
            checkpoint,
            left_out=found.left_out,
            files=[checkpoint.file(name) for name in TOKENIZER_FILES],
            notes=found.notes,
        )

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and config as transformers has them."""
        if not isinstance(model, LanguageEncoder):
            raise LoadError(f"{self.name}: only language models have this format, got a {type(model).__name__}.")
        head: Head = "none"
        if isinstance(model, LanguageModel):
            head = "tied" if model.tie else "own"
        tensors, config = self.family.write(model.backbone.config, model.state_dict(), head)
        spec = model.spec
        ids: dict[str, Any] = {"bos_token_id": spec.bos_id, "pad_token_id": spec.pad_id}
        if spec.eos_ids:
            ids["eos_token_id"] = spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids)
        if spec.max_length is not None:
            ids["max_position_embeddings"] = spec.max_length
        return tensors, config | {name: value for name, value in ids.items() if value is not None}


def _spec_of(checkpoint: Checkpoint, rows: int) -> LanguageSpec:
    """Read the facts that the config tells; ids outside of the vocabulary stand for none, as in many old configs."""
    config = told_config(checkpoint)

    def ids(name: str, values: Mapping[str, Any] = config) -> tuple[int, ...]:
        value = values.get(name)
        found = value if isinstance(value, list) else [value]
        return tuple(v for v in found if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < rows)

    def one(name: str) -> int | None:
        return next(iter(ids(name)), None)

    eos_ids = ids("eos_token_id")
    if (path := checkpoint.file("generation_config.json")) is not None:  # chats end in more ways than texts
        more = ids("eos_token_id", read_json(path, finite=False))
        eos_ids = more if set(eos_ids) <= set(more) else eos_ids
    length = config.get("max_position_embeddings")
    return LanguageSpec(
        vocab_size=rows,
        max_length=length if isinstance(length, int) and length > 0 else None,
        bos_id=one("bos_token_id"),
        eos_ids=eos_ids,
        pad_id=one("pad_token_id"),
    )


class LLaMAConverter(LanguageConverter):
    """LLaMA and its kin."""

    family, name, summary = LLAMA, LLAMA.name, LLAMA.summary


class MambaConverter(LanguageConverter):
    """Plain Mamba."""

    family, name, summary = MAMBA, MAMBA.name, MAMBA.summary


class BambaConverter(LanguageConverter):
    """Mamba-2 with attention."""

    family, name, summary = BAMBA, BAMBA.name, BAMBA.summary


class JambaConverter(LanguageConverter):
    """Mamba-1 with attention."""

    family, name, summary = JAMBA, JAMBA.name, JAMBA.summary


class HybriDNAConverter(LanguageConverter):
    """Other hybrids with these names."""

    family, name, summary = HYBRIDNA, HYBRIDNA.name, HYBRIDNA.summary


CONVERTERS: tuple[Converter, ...] = (
    LLaMAConverter(),
    MambaConverter(),
    BambaConverter(),
    JambaConverter(),
    HybriDNAConverter(),
)
