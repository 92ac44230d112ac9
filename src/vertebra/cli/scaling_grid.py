"""What a scaling study is: its settings, its grid of cells, and the backbones of asked sizes.

A study lies in a folder: ``study.json`` holds the settings that all cells share, ``cells/<name>/cell.json`` what is a
cell's own. Both are written by whoever comes first, so that processes on several machines work on the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vertebra.errors import ConfigError

if TYPE_CHECKING:
    from vertebra.backbones.base import BackboneConfig

OWN = {
    "--trainer.max_steps": "--budget",
    "--trainer.max_epochs": "--budget",
    "--trainer.val_check_interval": "--evaluations",
    "--trainer.check_val_every_n_epoch": "--evaluations",
    "--trainer.fast_dev_run": "--budget",
    "--trainer.limit_train_batches": "--data",
    "--trainer.overfit_batches": "--data",
}
"""Options of ``fit`` that the command sets, and by which of its own."""
_SUFFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d+)?([KMGBT]?)", re.IGNORECASE)

CLOSE = 0.1
"""Share by which a size may miss the asked count, so that the shape nearest to the recipe's own is taken."""
FAR = 2.0
"""Factor by which the nearest size may miss the asked count before that is an error."""
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
HEADS = ("num_heads", "heads")
WIDTHS = ("hidden_dim", "hidden", "cgmlp_dim", "latent_dim")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings that all cells of a study share.

    Args:
        recipe: Name of the packaged recipe; None where ``-c`` files say all.
        words: Options of ``fit`` for every run, as typed.
        budget: Steps of each run (``2000``), or floating point operations (``1e14F``).
        evaluations: Validations in the course of a run.
        ood: Options of ``test`` by name of the other data.
        tokens: Positions of an optimizer step; None for measured ones.
        callbacks: The recipe's own.
        accumulate: Batches of an optimizer step.
    """

    recipe: str | None
    words: list[str] = field(default_factory=list)
    budget: str = ""
    evaluations: int = 10
    ood: dict[str, list[str]] = field(default_factory=dict)
    tokens: int | None = None
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    accumulate: int = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid.

    Args:
        name: Name of its folder.
        size: What ``--params`` said.
        backbone: Value of ``--model.backbone``.
        data: What ``--data`` said.
        seed: Of initial weights and dropout.
    """

    name: str
    size: str
    backbone: str
    data: str
    seed: int


@dataclass(frozen=True)
class Size:
    """A backbone of the grid.

    Args:
        word: What ``--params`` said.
        backbone: Value of ``--model.backbone``.
        params: Its parameters.
        text: What it is, in words.
    """

    word: str
    backbone: str
    params: int
    text: str


# ---------------------------------------------------------------- words and numbers


def split_words(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into those of the command itself and those that go on to every ``fit``.

    Raises:
        ConfigError: An option lacks its value, or is one that the command sets by itself.
    """
    own: list[str] = []
    passed: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, _ = word.partition("=")
        if not option.startswith(("--model", "--data.", "--trainer.")) and option not in ("-c", "--config"):
            own.append(word)
            continue
        if option in OWN:
            raise ConfigError(f"scaling: {option} is set by the command itself; use {OWN[option]} instead.")
        if option.endswith(".dict_kwargs"):
            raise ConfigError(f"scaling: {option} is not passed on; write --model.NAME VALUE.")
        passed.append(word)
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"scaling: {option} needs a value.")
            passed.append(value)
    return own, passed


def parse_number(text: str) -> float | None:
    """Return the number that ``10``, ``1e6``, ``10K`` or ``2.5M`` means, or None."""
    match = _NUMBER.fullmatch(text)
    return float(match[1] + (match[2] or "")) * _SUFFIX[match[3].upper()] if match else None


def parse_budget(text: str) -> tuple[int | None, float | None]:
    """Return (steps, None), or (None, operations) where the text ends with F.

    Raises:
        ConfigError: It is neither.
    """
    per_run = parse_number(text[:-1]) if text[-1:] in ("F", "f") else None
    if per_run is not None and per_run > 0:
        return None, per_run
    steps = parse_number(text)
    if steps is None or steps < 1 or steps != int(steps):
        raise ConfigError(f"scaling: --budget must be steps, as 2000, or operations, as 1e14F, got {text!r}.")
    return int(steps), None


def parse_data(text: str) -> tuple[float | None, int | None]:
    """Return (share, None) for a number up to 1, else (None, items).

    Raises:
        ConfigError: It is neither.
    """
    value = parse_number(text)
    if value is None or value <= 0 or (value > 1 and value != int(value)):
        raise ConfigError(f"scaling: --data must be items, as 10K, or shares up to 1, as 0.1, got {text!r}.")
    return (value, None) if value <= 1 else (None, int(value))


def parse_ood(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the options of ``test`` by name.

    Args:
        texts: Such as ``monash:data.path=a.tsf,data.horizon=24``.

    Raises:
        ConfigError: A text is of another form, or a name is there twice.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        name, colon, options = text.partition(":")
        words = re.split(r",(?=(?:data|trainer)\.)", options)
        if not (colon and re.fullmatch(r"[\w.-]+", name)) or not all(re.match(r"data\.[\w.]+=", w) for w in words):
            raise ConfigError(f"scaling: --ood must be NAME:data.KEY=VALUE[,data.KEY=VALUE...], got {text!r}.")
        if name in found or name in ("validation", "test"):
            raise ConfigError(f"scaling: --ood {name}: the name is taken; choose another.")
        found[name] = [f"--{w}" for w in words]
    return found


def parse_share(text: str) -> tuple[int, int]:
    """Return (I, N) of ``--only I/N``, I from 1.

    Raises:
        ConfigError: It is of another form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"scaling: --only must be I/N with I from 1 to N, as 1/4, got {text!r}.")
    return int(match[1]), int(match[2])


def plan_steps(steps: int, evaluations: int) -> tuple[int, int]:
    """Return (steps, steps between two evaluations), such that the last one is at the end.

    As many evaluations as asked, or up to twice as many where only those share the steps evenly; where none do, a few
    steps fewer.
    """
    count = min(evaluations, steps)
    for number in range(count, min(2 * count, steps) + 1):
        if steps % number == 0:
            return steps, steps // number
    return steps - steps % count, steps // count


# ---------------------------------------------------------------- settings


def resolved_config(recipe: str | None, words: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that ``fit`` would use, after it was checked."""
    from vertebra.cli import training

    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        try:
            training.run("config", [*([recipe] if recipe else []), *words])
        except SystemExit as e:  # how the parser leaves when it has printed
            if e.code:
                raise
    config = yaml.safe_load(captured.getvalue())
    assert isinstance(config, dict)
    return config


def make_grid(sizes: Sequence[Size], data: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells, small sizes first."""
    cells = [
        Cell(name=f"{_slug(s.word)}-d{_slug(d)}-s{seed}", size=s.word, backbone=s.backbone, data=d, seed=seed)
        for s in sizes
        for d in data
        for seed in seeds
    ]
    if len({c.name for c in cells}) < len(cells):
        raise ConfigError("scaling: the sizes, data or seeds name the same thing twice; leave one out.")
    return cells


def open_study(folder: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Write the settings, where they are not there; they must be the same where they are.

    Raises:
        ConfigError: The folder holds a study of other settings, or a cell of another backbone.
    """
    file = folder / "study.json"
    if file.is_file():
        held = read_study(folder)
        for f in fields(Study):
            mine, theirs = getattr(study, f.name), getattr(held, f.name)
            if mine != theirs:
                raise ConfigError(
                    f"scaling: {folder} holds a study of another {f.name} ({_shown(theirs)}, now {_shown(mine)}); "
                    "choose another folder with -o, or give the options it was begun with."
                )
    else:
        _write_json(file, asdict(study))
    for cell in cells:
        place = folder / "cells" / cell.name / "cell.json"
        if not place.is_file():
            _write_json(place, asdict(cell))
        elif (held_cell := read_cell(place.parent)) != cell:
            raise ConfigError(
                f"scaling: {place} was made for the backbone {held_cell.backbone}, now {cell.backbone}; choose another "
                "folder with -o."
            )


def read_study(folder: Path) -> Study:
    """Read the settings of a study.

    Raises:
        ConfigError: There are none, or none of this version.
    """
    values = _read_json(folder / "study.json", "a folder of `vertebra scaling` holds study.json")
    try:
        return Study(**values)
    except TypeError as e:
        raise ConfigError(f"{folder / 'study.json'}: is of another version of vertebra ({e}); begin anew.") from e


def read_cell(folder: Path) -> Cell:
    """Read what a cell is."""
    return Cell(**_read_json(folder / "cell.json", "a cell of `vertebra scaling` holds cell.json"))


def results(folder: Path) -> list[dict[str, Any]]:
    """Results of all finished cells of a study."""
    return [
        _read_json(p, "delete it, and the cell is evaluated again") for p in sorted(folder.glob("cells/*/result.json"))
    ]


def _read_json(path: Path, rule: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(f"{path}: no such file; {rule}.") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not JSON ({e}); {rule}.") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got a {type(values).__name__}; {rule}.")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # others may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        raise ConfigError(f"scaling: {path} cannot be written ({e.strerror}); choose another folder with -o.") from e


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", text)


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value)


# ---------------------------------------------------------------- sizes


def choose_sizes(words: Sequence[str], config: dict[str, Any]) -> list[Size]:
    """Return the backbones that ``--params`` asks for, by rising number of parameters.

    Args:
        words: Names of backbones, or counts of parameters.
        config: The configuration of the recipe, whose own family is resized.

    Raises:
        ConfigError: A count cannot be met, or two words mean the same number of parameters.
        UnknownNameError: No backbone of that name.
    """
    from vertebra.backbones.base import resolve

    sizes = []
    for word in words:
        count = parse_number(word)
        if count is None:
            found = resolve(word)
            sizes.append(_size(word, word, found, count_params(found)))
            continue
        found, params = resize(recipe_backbone(config), count)
        fields_of = {k: v for k, v in found.to_dict().items() if k != "family"}
        path = f"{type(found).__module__}.{type(found).__qualname__}"
        backbone = json.dumps({"class_path": path, "init_args": fields_of})
        sizes.append(_size(word, backbone, found, params))
    return sorted(sizes, key=lambda s: s.params)


def _size(word: str, backbone: str, config: BackboneConfig, params: int) -> Size:
    direction = "causal" if config.causal else "bidirectional"
    return Size(word, backbone, params, f"{config.family}, dim {config.dim}, depth {config.depth}, {direction}")


def recipe_backbone(config: dict[str, Any]) -> BackboneConfig:
    """Return the backbone of a recipe's configuration.

    Raises:
        ConfigError: Its model takes none, or one that cannot be resized.
    """
    from importlib import import_module

    from vertebra.backbones.base import BackboneConfig, is_pretrained, resolve, split_name
    from vertebra.backbones.catalog import ADAPTERS

    value = config["model"]["init_args"].get("backbone")
    if value is None:
        raise ConfigError(f"scaling: {config['model']['class_path']} takes no backbone, so there is nothing to resize.")
    if isinstance(value, str):
        name = split_name(value)[0]
        if is_pretrained(name) or name.partition(":")[0] in ADAPTERS:
            raise ConfigError(f"scaling: {name} is of one size; name backbones after --params instead of counts.")
        return resolve(value)
    module, _, name = value["class_path"].rpartition(".")
    family = getattr(import_module(module), name).family
    return BackboneConfig.from_dict({"family": family, **value["init_args"]})


def count_params(config: BackboneConfig) -> int:
    """Number of parameters, without making them."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


def resize(base: BackboneConfig, target: float) -> tuple[BackboneConfig, int]:
    """Return the backbone of a family nearest to a number of parameters, and its number.

    All dims that the heads allow and depths up to 64 are tried; heads keep their width and inner widths their ratio to
    dim. Of the shapes within a tenth of the target that with the ratio of dim to depth nearest to the base's is
    taken, else the nearest count.

    Args:
        base: A backbone of the family.
        target: Asked number of parameters.

    Raises:
        ConfigError: No shape comes within a factor of two.
    """
    found: list[tuple[BackboneConfig, int]] = []
    for depth in DEPTHS if _has_free_depth(base) else (base.depth,):
        shapes = [c for dim in _dims(base) if (c := _scaled(base, dim, depth)) is not None]
        low, high = 0, len(shapes)  # the first shape of at least the target
        counts: dict[int, int] = {}
        while low < high:
            middle = (low + high) // 2
            counts[middle] = count_params(shapes[middle])
            low, high = (low, middle) if counts[middle] >= target else (middle + 1, high)
        for index in {low - 1, low} & set(range(len(shapes))):
            found.append((shapes[index], counts.get(index) or count_params(shapes[index])))

    def miss(shape: tuple[BackboneConfig, int]) -> float:
        return abs(math.log(shape[1] / target))

    ratio = base.dim / base.depth
    close = [s for s in found if miss(s) < CLOSE]
    if close:
        return min(close, key=lambda s: abs(math.log(s[0].dim / s[0].depth / ratio)))
    best = min(found, key=miss, default=None)
    if best is None or miss(best) > math.log(FAR):
        nearest = f", the nearest has {best[1]:,}" if best else ""
        raise ConfigError(
            f"scaling: no {base.family} of about {target:,.0f} parameters can be made{nearest}; ask for another count, "
            "or name backbones."
        )
    return best


def _has_free_depth(base: BackboneConfig) -> bool:
    return base.family != "fit"  # its layers are written out


def _dims(base: BackboneConfig) -> Iterator[int]:
    """Dims that may be tried: narrower than a head by fours, from there on whole heads."""
    heads = next((int(getattr(base, n)) for n in HEADS if hasattr(base, n)), 1)
    width = base.dim // heads if heads > 1 else min(base.dim, 64)
    yield from range(4, width, 4)
    yield from (width * k for k in range(1, 257) if k <= 32 or (k % 4 == 0 and k <= 96) or k % 16 == 0)


def _scaled(base: BackboneConfig, dim: int, depth: int) -> BackboneConfig | None:
    """Return ``base`` at another width and depth, or None where its family has no such shape."""
    have = {f.name: getattr(base, f.name) for f in fields(base)}
    changes: dict[str, Any] = {"dim": dim} | ({"depth": depth} if depth != base.depth else {})
    for name in WIDTHS:
        if have.get(name):
            changes[name] = max(8, 8 * round(have[name] * dim / base.dim / 8))
    for name in HEADS:
        if name in have:
            changes[name] = max(1, dim * have[name] // base.dim)
    if have.get("num_kv_heads"):
        changes["num_kv_heads"] = max(1, changes["num_heads"] * have["num_kv_heads"] // have["num_heads"])
    if "latent_heads" in have:
        changes["latent_heads"] = max(1, changes["latent_dim"] * have["latent_heads"] // have["latent_dim"])
    if "mamba_head_dim" in have:
        changes["mamba_head_dim"] = math.gcd(have["mamba_head_dim"], have["expand"] * dim // have["mamba_groups"])
    try:
        return base.replace(**changes)
    except ConfigError:
        return None
