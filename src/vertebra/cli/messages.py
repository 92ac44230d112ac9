"""From the parser's nested error texts to one or two sentences in the words that the user typed."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any

from vertebra.cli.parsing import suggestion
from vertebra.cli.trust import denied_name

SECTIONS = {"model": "LightningModule", "data": "LightningDataModule"}


def explain(text: str, verb: str, typed: list[str]) -> str:
    """Turn the text of a parser's error into one for the user.

    Args:
        text: Text of the ``ArgumentError``.
        verb: The verb that was called.
        typed: The words after it.
    """
    keys = re.findall(r'(?:Parser key|Configuration key) "([\w.]+)"', text)
    section = keys[0].partition(".")[0] if keys else ""
    classes = re.findall(r"Problem with given class_path '([\w.]+)'", text)
    owner = _imported(classes[-1]) if classes else None
    prefix = ".".join(k for k in keys if k) or section
    if "is not accepted" not in text and "backbone" in text:
        for option, field, value in _backbone_fields(typed):
            rule = "fields of a backbone chosen by name are changed in its name"
            return f"{option}: {rule}: --model.backbone NAME,{field}={value}"
    for pattern, answer in _ANSWERS:
        if match := re.search(pattern, text):
            return answer(match, _Place(verb, section, prefix, owner, classes, typed))
    return _plain(text, prefix)


@dataclasses.dataclass
class _Place:
    """Where an error happened: the keys around it, and the innermost class whose arguments were read."""

    verb: str
    section: str
    prefix: str
    owner: Any
    classes: list[str]
    typed: list[str]

    def unknown(self, name: str) -> str:
        """Text for an option that does not exist, ``name`` relative to the owner."""
        name = name.removeprefix("init_args.").removeprefix("dict_kwargs.")
        if self.owner is None:
            return unknown_option(name, self.verb, self.typed)
        known = options_of(self.owner)
        wrong = f"--{self.prefix}.{name}"
        near = suggestion(name, known) or suggestion(name, [k.rpartition(".")[2] for k in known])
        full = near.replace("mean ", f"mean --{self.prefix}.").replace(" or ", f" or --{self.prefix}.") if near else ""
        listed = f" Its options: {', '.join(known)}." if not near else ""
        return f"{self.owner.__name__} has no option {wrong}.{full}{listed}"


def _required(m: re.Match[str], at: _Place) -> str:
    names = [n.strip() for n in m[1].split(",")]
    if at.owner is not None:
        options = ", ".join(f"--{at.prefix}.{n}" for n in names)
        return f"{at.owner.__name__} needs {options}."
    if any(n.endswith("model") for n in names):
        return f"{at.verb}: no model is named; give a recipe (see: vertebra list recipes), -c FILE, --model CLASS" + (
            " or --ckpt_path X." if at.verb != "config" else "."
        )
    return f"{at.verb}: {', '.join(n.partition('.')[2] or n for n in names)} must be given."


def _unrecognized(m: re.Match[str], at: _Place) -> str:
    name = m[1].partition("=")[0]
    if not name.startswith("-"):
        return f"{at.verb}: {name!r} is not understood here; RECIPE comes first and options begin with --."
    return at.unknown(name.lstrip("-"))


def _no_class(m: re.Match[str], at: _Place) -> str:
    name = m[1]
    if at.owner is not None or at.section not in SECTIONS:
        return f"--{at.prefix}: {name!r} is no class path."
    known = known_classes(at.section)
    near = suggestion(name, known)
    return f"--{at.section}: unknown class {name!r}.{near or f' Known: {chr(44).join(known)}.'.replace(',', ', ')}"


def _not_importable(m: re.Match[str], at: _Place) -> str:
    path = at.classes[-1] if at.classes else at.section
    module, _, name = path.rpartition(".")
    near = ""
    if module in sys.modules:
        near = suggestion(name, [n for n, v in vars(sys.modules[module]).items() if isinstance(v, type)])
    elif at.section in SECTIONS:
        near = suggestion(name, known_classes(at.section))
    return f"--{at.section}: the class {path!r} cannot be imported ({m[0]}).{near}"


def _wrong_type(m: re.Match[str], at: _Place) -> str:
    if "Literal[" in m[1]:
        return _wrong_choice(m, at)
    kind = re.sub(r"<class '([\w.]+)'>", r"\1", m[1]).removeprefix("typing.")
    return f"--{at.prefix}: must be {kind}, got {m[2].strip()!r}."


def _backbone_fields(typed: list[str]) -> Iterable[tuple[str, str, str]]:
    for word, following in zip(typed, [*typed[1:], ""], strict=False):
        if found := re.fullmatch(r"(--model\.(?:init_args\.)?backbone\.(?:init_args\.)?(\w+))(?:=(.*))?", word):
            yield found[1], found[2], following if found[3] is None else found[3]


def _wrong_choice(m: re.Match[str], at: _Place) -> str:
    listed = re.findall(r"Literal\[(.*?)\]", m[0])
    choices = [c.strip().strip("'") for part in listed for c in part.split(",")]
    given = re.search(r"(?:Given value|Got value): (?:NestedArg\(key='[\w.]+', val=)?'?([^'\n)]*)", m[0])
    got = f", got {given[1]!r}" if given else ""
    return f"--{at.prefix}: must be one of {', '.join(dict.fromkeys(choices))}{got}."


def _no_file(m: re.Match[str], at: _Place) -> str:
    return f"no such file {m[1]!r}."


def _denied(m: re.Match[str], at: _Place) -> str:
    return str(denied_name(m[0]))


_ANSWERS: list[tuple[str, Callable[[re.Match[str], _Place], str]]] = [
    (r"Importing '[\w.]{1,300}' is not allowed", _denied),
    (r"Option '([\w.]+)' is not accepted", lambda m, at: at.unknown(m[1])),
    (r"does not accept option '([\w.]+)'", lambda m, at: at.unknown(m[1])),
    (r"unrecognized arguments: (\S+)", _unrecognized),
    (r"the following arguments are required: (.*)", _required),
    (r"Expected a (.*?)\. Got value: (.*)", _wrong_type),
    (r"Expected a typing\.Literal\[(?:.|\n)*", _wrong_choice),
    (r"module '[\w.]+' has no attribute '\w+'|No module named '[\w.]+'", _not_importable),
    (r"Expected a dot import path string: (\S+)", _no_class),
    (r"File does not exist: '([^']+)'", _no_file),
]


def unknown_option(name: str, verb: str, typed: list[str]) -> str:
    """Text for an option outside of any class, with the nearest of all that there are."""
    from lightning.pytorch import Trainer

    section, _, inner = name.partition(".")
    trainer = list(inspect.signature(Trainer).parameters)
    if section == "trainer" and inner:
        near = suggestion(inner, trainer).replace("mean ", "mean --trainer.").replace(" or ", " or --trainer.")
        wrong = f"--{name}" if any(word.partition("=")[0] == f"--{name}" for word in typed) else f"{name} (in a file)"
        return f"the trainer has no option {wrong}.{near}"
    known = ["model", "data", "trainer", "seed_everything", "ckpt_path", "config", "output", "root", "help", "help-all"]
    near = suggestion(section, known).replace("mean ", "mean --").replace(" or ", " or --")
    if inner and near and "." not in near:
        near = near.replace("?", f".{inner}?")
    wrong = f"--{name}" if any(word.partition("=")[0] == f"--{name}" for word in typed) else f"{name} (in a file)"
    return f"{verb}: there is no option {wrong}.{near} See: vertebra {verb} --help"


def options_of(cls: type) -> list[str]:
    """Names of a class's constructor arguments, those of nested dataclasses dotted."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        try:
            hints = typing.get_type_hints(init)
        except Exception:  # a hint that cannot be resolved here only costs its nested names
            hints = {}
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                names[p.name] = None
                names.update(dict.fromkeys(f"{p.name}.{f}" for f in _fields(hints.get(p.name))))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _fields(hint: Any) -> Iterable[str]:
    for kind in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and "family" not in kind.__annotations__:
            yield from (f.name for f in dataclasses.fields(kind))


def known_classes(section: str) -> list[str]:
    """Names of the imported task or data module classes that are not Lightning's own."""
    import lightning.pytorch as pl

    found, todo = set(), [pl.LightningModule if section == "model" else pl.LightningDataModule]
    while todo:
        for cls in todo.pop().__subclasses__():
            todo.append(cls)
            if not cls.__module__.startswith("lightning") and not inspect.isabstract(cls):
                found.add(cls.__name__)
    return sorted(found)


def _imported(path: str) -> Any:
    """Return a class that the parser has imported; nothing is imported here, where a text may quote anything."""
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def _plain(text: str, prefix: str) -> str:
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Parser key", "Problem with given class_path")
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    kept = [n for n in lines if n and not n.startswith(noise) and "NoneType" not in n]
    return (f"--{prefix}: " if prefix else "") + (" ".join(dict.fromkeys(kept)) or text.strip())
