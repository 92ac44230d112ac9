"""Published checkpoints to models of ours, and back: what a converter is, and which ones there are.

Each domain's ``published.py`` holds its converters as ``CONVERTERS``. A converter recognises its family by keys and
config, builds the model that the checkpoint is of, and loads it strictly: every tensor is either a weight of ours or
named in ``left_out`` with the reason.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import metadata_load
from torch import Tensor

from vertebra.backbones.catalog import bundled_models
from vertebra.backbones.loading.checkpoints import Checkpoint, open_checkpoint
from vertebra.backbones.loading.places import config_of, family_of, local_path, told_kind
from vertebra.backbones.loading.pretrained import LoadReport, load_state
from vertebra.domains.loading import saved_folder
from vertebra.domains.model import DomainModel
from vertebra.domains.vocabulary import tokenizer_files
from vertebra.errors import LoadError, UnknownNameError

MODULES = (
    "vertebra.domains.vision.published",
    "vertebra.domains.speech.published",
    "vertebra.domains.mesh.published",
    "vertebra.domains.timeseries.published",
    "vertebra.domains.language.published",
    "vertebra.domains.dna.published",
)
"""Where converters are; each module has a tuple ``CONVERTERS``."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A checkpoint as a model of ours.

    Args:
        model: With its weights, in evaluation mode.
        report: What was loaded.
        left_out: Names of the checkpoint's tensors that the model has no place for, each with the reason.
        files: Files to keep beside the model, such as a tokenizer's.
        notes: Sections of the model card: ``data``, ``licence``, ``source``.
        checkpoint: Where it is from; files that were unpacked for it stay as long as this does.
    """

    model: DomainModel
    report: LoadReport
    left_out: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


class Converter(ABC):
    """One family of published checkpoints."""

    name: ClassVar[str]
    """For the command line, such as ``llama``."""
    summary: ClassVar[str]
    """What it reads, and what of: a line."""

    @abstractmethod
    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell from config, files or names of tensors whether the checkpoint is of this family."""

    @abstractmethod
    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make the model.

        Raises:
            LoadError: Something that the checkpoint does cannot be done by ours; the text says what.
        """

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and ``config.json`` of a model of ours as the family has them.

        Raises:
            LoadError: The family's format is not written, or the model is not of its architecture.
        """
        raise LoadError(f"{self.name}: models of ours are not written in this family's format.")


def converters() -> dict[str, Converter]:
    """All converters by name, in the order in which they are asked."""
    return {c.name: c for module in MODULES for c in import_module(module).CONVERTERS}


def find_converter(checkpoint: Checkpoint) -> Converter:
    """Return the converter that recognises a checkpoint.

    Raises:
        LoadError: None does; the text shows names of tensors, so that one can see what the file is. Or ``config.json``
            is damaged.
    """
    for converter in converters().values():
        if converter.recognises(checkpoint):
            return converter
    checkpoint.config  # noqa: B018  # no converter minds a damaged one; the user should
    if told := told_kind(checkpoint.config):
        raise LoadError(
            f"{checkpoint.source}: its config.json says {told}, which is of no family that is known "
            f"({', '.join(converters())})."
        )
    names = list(checkpoint.tensors)
    raise LoadError(
        f"{checkpoint.source}: of no family that is known ({', '.join(converters())}); its {len(names)} tensors begin "
        f"with {', '.join(names[:3])}. If it is of one of these, name it with --family."
    )


def convert(source: str | Path, family: str | None = None) -> tuple[Converter, Conversion]:
    """Make a model of ours of a published checkpoint.

    Args:
        source: As ``open_checkpoint`` takes it.
        family: Name of the converter; None to find it.

    Raises:
        LoadError: The checkpoint cannot be read, is of no known family, or does what ours cannot.
        UnknownNameError: There is no such family.
    """
    known = converters()
    if family is not None and family not in known:
        raise UnknownNameError("family", family, known)
    if _is_ours(source):
        raise LoadError(
            f"{source}: already a model of vertebra, so there is nothing to convert; to write it in a published format "
            f"of its kind: vertebra convert {source} -o DIR --to FAMILY"
        )
    checkpoint = open_checkpoint(source)
    told = _family_told(checkpoint) if family not in (None, "nucleotides") else ""  # which are of all families
    if family is not None and told and _GROUPS.get(told, told) != _GROUPS.get(family, family):
        raise LoadError(
            f"{checkpoint.source}: config.json tells a model of the family {told} ({told_kind(checkpoint.config)}), "
            f"not {family}; leave --family out, or say --family {told}."
        )
    converter = known[family] if family is not None else find_converter(checkpoint)
    return converter, dataclasses.replace(converter.convert(checkpoint), checkpoint=checkpoint)


_GROUPS = dict.fromkeys(("bamba", "jamba", "hybridna"), "hybrids")  # which read each other's names


def _family_told(checkpoint: Checkpoint) -> str:
    try:
        return family_of(checkpoint.config)
    except LoadError:
        return ""


def _is_ours(source: str | Path) -> bool:
    """Whether a source is a model directory of ours, a run folder with one, or a bundled model."""
    if str(source) in bundled_models():
        return True
    folder = local_path(source)
    for place in (folder, folder / "model"):
        try:
            config = config_of(place)
        except (LoadError, OSError):
            continue
        if config:
            return isinstance(config.get("backbone"), dict) and "spec" in config
    return False


def copy_tokenizer(source: str | Path, folder: Path) -> list[str]:
    """Copy the files of a model's tokenizer, where it has any, into the folder of the converted one.

    Args:
        source: The model, as ``vertebra.load`` takes it.
        folder: Where to.

    Returns:
        Names of the files.

    Raises:
        LoadError: One is a link out of the model's folder.
    """
    saved = saved_folder(source)
    origin = open_checkpoint(source).path if saved is None else saved
    files = tokenizer_files(origin) if origin.is_dir() else []  # what stands beside a single file may be another's
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in files]


def loaded(
    model: DomainModel,
    tensors: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    *,
    left_out: Mapping[str, str] | None = None,
    files: Iterable[Path | None] = (),
    notes: Mapping[str, str] | None = None,
) -> Conversion:
    """Load renamed tensors into a model, strictly, and make the conversion of it.

    Args:
        model: What the checkpoint is of.
        tensors: By names of ours; a name that was not translated is an error that lists it.
        checkpoint: Where they are from.
        left_out: As in ``Conversion``.
        files: As in ``Conversion``; None for what is not there.
        notes: As in ``Conversion``.

    Raises:
        LoadError: Tensors are missing, unexpected or of another shape.
    """
    try:
        report = load_state(model, tensors, source=f"the weights of {checkpoint.source}")
    except LoadError as error:
        raise LoadError(
            f"{error} Names of missing tensors are those of the {type(model).__name__}; unexpected ones are as in the "
            "checkpoint where they have no name of ours."
        ) from error
    found = {"source": f"Converted from `{checkpoint.source.rpartition('/')[2]}`.", **(notes or {})}
    if licence := _licence_told(checkpoint):
        own = found.get("licence", "").strip()
        found["licence"] = (
            f"{own} The source's README says: {licence}."
            if own
            else (f"{licence}, as the source's README says; vertebra has not checked it.")
        )
    return Conversion(
        model=model.eval(),
        report=report,
        left_out=dict(left_out or {}),
        files=[file for file in files if file is not None],
        notes=found,
    )


_MOST_README = 1 << 20  # bytes


def _licence_told(checkpoint: Checkpoint) -> str:
    """Return the licence that the front matter of a checkpoint's ``README.md`` states; nothing where it does not."""
    path = checkpoint.file("README.md")
    if path is None or path.stat().st_size > _MOST_README:
        return ""
    try:
        front = metadata_load(path) or {}
    except Exception:  # of YAML, of its values, of text: a card that cannot be read says nothing
        return ""
    told = [front.get("license"), front.get("license_name")]
    listed = [word for value in told for word in (value if isinstance(value, list) else [value])]
    words = [word for word in listed if isinstance(word, str) and re.fullmatch(r"[\w.+ -]{1,100}", word)]
    return f"{words[0]} ({', '.join(words[1:])})" if words[1:] else words[0] if words else ""


def split_left_out(
    tensors: Mapping[str, Tensor], reasons: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Part tensors into those to load and those without a place in our model.

    Args:
        tensors: The checkpoint's.
        reasons: By regular expression that a whole name must match, why such a tensor is left out.

    Returns:
        Tensors to load, and names left out with their reasons.
    """
    kept: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            kept[name] = tensor
        else:
            left[name] = reason
    return kept, left
