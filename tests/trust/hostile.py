"""Changes to descriptions of models that nobody means well with."""

import copy
import json

import torch


def change(folder, **changes):
    """Change values of a folder's config.json; ``part__key`` for those one level down."""
    path = folder / "config.json"
    path.write_text(json.dumps(_changed(json.loads(path.read_text()), changes)))


def saved(lightning, path, **changes):
    """Write what a checkpoint holds, with such changes."""
    torch.save(_changed(copy.deepcopy(lightning), changes), path)
    return path


def _changed(values, changes):
    for name, value in changes.items():
        part, _, key = name.partition("__")
        (values[part] if key else values)[key or part] = value
    return values
