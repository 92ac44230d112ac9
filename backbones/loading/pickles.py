"""Pickles of ``torch.save``, looked through before torch reads them.

``weights_only`` runs no code, but lets a file of some bytes take all memory (a ``bytearray`` of any length) or all time
(a tuple of the same tuple twice, and so on, as a key: its hash visits every copy). Without torch.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

from vertebra.errors import LoadError

_PICKLES = 5  # in a file of the old format: magic number, protocol, system, objects, keys of storages
_MOST_BYTES = 1 << 28  # of the pickle of a zip, which holds names and shapes
_MOST_LEAVES = 100_000
_MARK = -1
_GETS = ("GET", "BINGET", "LONG_BINGET")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_TO_MARK = ("LIST", "DICT", "FROZENSET", "OBJ", "INST")
_INTO = ("APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK")


def check_pickle(path: Path) -> None:
    """Refuse a file of ``torch.save`` whose pickle would take more than it is worth.

    Raises:
        LoadError: It asks for memory by a number, its values hold themselves again and again, or it is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith("data.pkl"):
                        if info.file_size > _MOST_BYTES:
                            raise LoadError(f"{path}: its pickle has {info.file_size:,} bytes, which is too long.")
                        with archive.open(info) as file:
                            _check(file, path)
            return
        with path.open("rb") as file:
            for _ in range(_PICKLES):
                _check(file, path)
    except LoadError:
        raise
    except Exception as e:  # pickletools and zipfile raise many kinds
        raise LoadError(
            f"{path}: cannot be read without running code from it, or is damaged ({str(e)[:100] or type(e).__name__}); "
            "get it again."
        ) from e


def _check(file: IO[bytes], path: Path) -> None:
    """Go through one pickle with a stack of how many values each value holds, copies counted."""
    stack: list[int] = []
    memo: dict[int, int] = {}
    for opcode, given, _ in pickletools.genops(file):
        argument: Any = given
        name = opcode.name
        if name in ("GLOBAL", "BYTEARRAY8") and (name != "GLOBAL" or str(argument).endswith(" bytearray")):
            raise LoadError(f"{path}: asks for memory by a number (bytearray), as no checkpoint does; it was not read.")
        if name in _GETS:
            stack.append(memo.get(int(argument), 1))
        elif name in _PUTS:
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "TUPLE":
            stack.append(1 + sum(_to_mark(stack)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(1 + sum(stack.pop() for _ in range(int(name[-1]))))
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [stack[-1]]
        elif name in _TO_MARK:
            _to_mark(stack)
            stack.append(1)
        elif name in _INTO:
            _to_mark(stack)
        else:
            _other(stack, opcode)
        if stack and stack[-1] > _MOST_LEAVES:
            raise LoadError(f"{path}: holds values that hold themselves again and again, as no checkpoint does.")


def _to_mark(stack: list[int]) -> list[int]:
    found = []
    while (value := stack.pop()) != _MARK:
        found.append(value)
    return found


def _other(stack: list[int], opcode: Any) -> None:
    before, after = len(opcode.stack_before), len(opcode.stack_after)
    kept = stack[-before] if before and after else 1  # of SETITEM, APPEND and BUILD, what they change
    del stack[len(stack) - before :]
    stack.extend([kept if before else 1] * after)
