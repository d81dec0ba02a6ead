"""Layouts: which mesh axes shard which named axes, as lines that users can write.

    # one rule a line; what is nearer to the top takes a mesh axis first
    batch = data
    mlp = model
    kv_head = model ?          # not where it does not divide
    expert with slot = data    # only in operations that run along slots, too
    param embed = data*fsdp    # parameters alone, while they are stored

A layout is a file of such lines, or one of those that moecc ships, by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from moecc.errors import InputError, UsageError, nearest, printable
from moecc.formats.files import read_bounded
from moecc.support.problems import Problems
from moecc.types import is_name

SUFFIX = ".rules"

GRAMMAR = "[param] axis [with axis] = mesh*axes [?]"

MAX_FILE_BYTES = 1 << 20
_LONGEST_RULE = 1000  # characters; the time of matching grows with their square

_LINE = re.compile(
    r"(?:(param)\s+)?(\w+)(?:\s+with\s+(\w+))?\s*=\s*([\w\s*]+?)\s*(\?)?\Z", re.ASCII
)


@dataclass(frozen=True)
class LayoutRule:
    """One line of a layout.

    Attributes:
      axis: the named axis.
      mesh: the mesh axes that shard it, outermost first, as far as the mesh has them.
      stored: whether only parameters are sharded so, and are gathered for use.
      beside: an axis that the operation must run along, too; empty: none.
      optional: whether it is left out where it does not divide.
      source: the layout and line that it stands in.
    """

    axis: str
    mesh: tuple[str, ...]
    stored: bool = False
    optional: bool = False
    beside: str = ""
    source: str = ""

    def __str__(self) -> str:
        kind = "param " if self.stored else ""
        beside = f" with {self.beside}" if self.beside else ""
        return f"{kind}{self.axis}{beside} = {'*'.join(self.mesh)}{' ?' if self.optional else ''}"


def parse_layout(text: str, name: str) -> list[LayoutRule]:
    """Return the rules that `text` writes.

    Args:
      text: a rule a line; ``#`` starts a comment.
      name: what messages call it.

    Raises:
      InputError: with every line that is no rule.
    """
    rules: list[LayoutRule] = []
    problems = Problems()
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.match(content) if len(content) <= _LONGEST_RULE else None
        mesh = tuple(p.strip() for p in match.group(4).split("*")) if match else ()
        if match is None or not is_name(match.group(2)) or not all(map(is_name, mesh)):
            found = printable(content)
            problems.add("not a rule", where=f"{name}:{number}", expected=GRAMMAR, found=found)
            continue
        stored, axis, beside, _, optional = match.groups()
        rules.append(
            LayoutRule(axis, mesh, bool(stored), bool(optional), beside or "", f"{name}:{number}")
        )
    problems.raise_if_any()
    return rules


@cache
def builtin_layouts() -> dict[str, str]:
    """Return the layouts that moecc ships, by name, as text."""
    folder = files("moecc.layouts")
    found = sorted(f.name for f in folder.iterdir() if f.name.endswith(SUFFIX))
    return {n.removesuffix(SUFFIX): (folder / n).read_text("utf-8") for n in found}


@cache
def _shipped(name: str) -> tuple[LayoutRule, ...]:
    return tuple(parse_layout(builtin_layouts()[name], name))


def read_layout(name: str) -> list[LayoutRule]:
    """Return the rules of a layout: one that moecc ships, or a file.

    Raises:
      UsageError: there is neither.
      InputError: there is no such regular file, it is too large or not UTF-8, or a line of it is
        no rule.
      MachineError: the file cannot be read.
    """
    shipped = builtin_layouts()
    if name in shipped:
        return list(_shipped(name))
    if not name.endswith(SUFFIX) and "/" not in name:
        hint = nearest(name, shipped) or f"layouts: {', '.join(shipped)}; or a file, my{SUFFIX}"
        raise UsageError(f"unknown layout {name!r}", hint=hint)
    try:
        text = read_bounded(Path(name), MAX_FILE_BYTES).decode("utf-8")
    except (InputError, UnicodeDecodeError) as error:
        raise InputError("the layout cannot be read", where=name, found=str(error)) from None
    return parse_layout(text, name)


def read_layouts(names: Iterable[str]) -> list[LayoutRule]:
    """Return the rules of several layouts, those of the first first."""
    return [rule for name in names for rule in read_layout(name)]


def mesh_axes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the mesh axes that the rules of several layouts speak of, in their order."""
    return tuple(dict.fromkeys(m for rule in read_layouts(names) for m in rule.mesh))
