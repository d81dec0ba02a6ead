"""Names: of leaves from their paths, of parameters of one layer of a stack, of blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-]+")
_STACK = re.compile(r"(?:layers?|blocks?|stack|h|encoder|decoder|groups?)\Z")
_NUMBER = re.compile(r"\d+")


def path_name(path: Sequence[Any]) -> str:
    """Return ``layers.0.mlp.up`` for a path of jax's; characters beyond names become ``_``."""
    parts = (_NOT_IN_NAMES.sub("_", _key(entry)).strip("_") for entry in path)
    return ".".join(part or "_" for part in parts) or "params"


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def unique(names: Iterable[str]) -> list[str]:
    """Return `names`, those that are taken already with a number."""
    taken: set[str] = set()
    made = []
    for name in names:
        number, one = 2, name
        while one in taken:
            one, number = f"{name}_{number}", number + 1
        taken.add(one)
        made.append(one)
    return made


def indexed(name: str, at: int) -> str:
    """Return the name of part `at` of a stacked leaf: ``layers.mlp.up`` to ``layers.3.mlp.up``."""
    parts = name.split(".")
    stacks = [i for i, part in enumerate(parts[:-1]) if _STACK.search(part)]
    # A name that a number follows is of a list, or of a stack that is cut already.
    whole = [i for i in stacks if not parts[i + 1].isdigit()]
    where = (whole or stacks or [0 if len(parts) > 1 else -1])[-1] + 1
    while 0 < where < len(parts) and parts[where].isdigit():
        where += 1
    return ".".join([*parts[:where], str(at), *parts[where:]])


def location(names: Sequence[str]) -> str:
    """Return the location of a block from the names of its parameters: what they share."""
    shared = _shared([n.split(".")[:-1] for n in names])
    if shared:
        return ".".join(shared)
    rest = "".join(_shared(names))
    return rest.rstrip("._-") if rest.endswith(("_", "-")) else "ffn"


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the first parts that all `names` have."""
    columns = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return [parts[0] for parts in columns]


def ranged(names: Sequence[str]) -> str:
    """Return one name for names that differ in one number: ``layers.{0..5}.mlp.up``."""
    pieces = [_NUMBER.split(n) for n in names]
    numbers = [[int(k) for k in _NUMBER.findall(n)] for n in names]
    first = numbers[0]
    differing = [i for i in range(len(first)) if any(n[i : i + 1] != [first[i]] for n in numbers)]
    alike = all(p == pieces[0] for p in pieces) and len(differing) == 1
    if not alike:
        return names[0]
    (at,) = differing
    counts = [n[at] for n in numbers]
    if counts != list(range(counts[0], counts[0] + len(counts))):
        return names[0]
    texts = [str(n) for n in first]
    texts[at] = f"{{{counts[0]}..{counts[-1]}}}"
    made = pieces[0][0]
    for text, piece in zip(texts, pieces[0][1:], strict=True):
        made += text + piece
    return made
