"""Layouts: which mesh axes shard which named axes, as TOML that users can write.

    rules = [                      # a rule nearer to the top takes a mesh axis first
      { axis = "batch", mesh = ["data"] },
      { axis = "kv_head", mesh = ["model"], optional = true },     # not where it does not divide
      { axis = "expert", mesh = ["data"], with = "slot" },         # only beside slots
      { axis = "embed", mesh = ["data", "fsdp"], stored = true },  # parameters, while stored
    ]

A layout is a file of such rules, or one of those that moecc ships, by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.formats.files import read_bounded
from moecc.support.record import Check, toml_reader
from moecc.types import is_name

SUFFIXES = (".toml", ".rules")
MAX_FILE_BYTES = 1 << 20

# A line of the format before TOML; its time grows with the square of the length.
_LINE = re.compile(
    r"(?:(param)\s+)?(\w+)(?:\s+with\s+(\w+))?\s*=\s*([\w\s*]+?)\s*(\?)?\Z", re.ASCII
)
_LONGEST_LINE = 200

AxisName = Annotated[str, Check(is_name, "a name: letters, digits and _")]


@dataclass(frozen=True)
class LayoutRule:
    """A rule of a layout.

    Attributes:
      axis: the named axis.
      mesh: the mesh axes that shard it, outermost first, as far as the mesh has them.
      stored: whether only parameters are sharded so, and are gathered for use.
      optional: whether it is left out where it does not divide.
      beside: an axis that the operation must run along, too; empty: none.
      source: the layout and line that it stands in.
    """

    axis: AxisName
    mesh: Annotated[tuple[AxisName, ...], Check(bool, "a mesh axis or more")]
    stored: bool = False
    optional: bool = False
    beside: str = field(default="", metadata={"key": "with"})
    source: str = field(default="", init=False)

    def __str__(self) -> str:
        kind = "param " if self.stored else ""
        beside = f" with {self.beside}" if self.beside else ""
        return f"{kind}{self.axis}{beside} = {'*'.join(self.mesh)}{' ?' if self.optional else ''}"

    @property
    def toml(self) -> str:
        """The rule as a line of a layout."""
        mesh = ", ".join(f'"{name}"' for name in self.mesh)
        beside = f', with = "{self.beside}"' if self.beside else ""
        flags = "".join(f", {n} = true" for n in ("stored", "optional") if getattr(self, n))
        return f'{{ axis = "{self.axis}", mesh = [{mesh}]{beside}{flags} }}'


@dataclass(frozen=True)
class LayoutFile:
    """The keys of a layout's file."""

    rules: tuple[LayoutRule, ...]


def parse_layout(text: str, name: str) -> list[LayoutRule]:
    """Return the rules that the TOML `text` of a layout called `name` states.

    Raises:
      InputError: with every rule that is wrong; or how a file in the earlier format is spelled now.
    """
    try:
        table, reader = toml_reader(text, name)
        rules = reader.section(LayoutFile, table).rules
        reader.raise_if_any()
    except InputError:
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        first = next(filter(None, lines), "")
        if match := _LINE.match(first) if len(first) <= _LONGEST_LINE else None:
            kind, axis, beside, mesh, optional = match.groups()
            axes = tuple(re.findall(r"\w+", mesh))
            rule = LayoutRule(axis, axes, bool(kind), bool(optional), beside or "")
            raise InputError(
                "layouts are TOML",
                where=name,
                expected=f"rules = [{rule.toml}, …]",
                found=first,
            ) from None
        raise
    for number, rule in enumerate(rules):
        object.__setattr__(rule, "source", reader.where(("rules", number)))
    return list(rules)


@cache
def builtin_layouts() -> dict[str, str]:
    """Return the layouts that moecc ships, by name, as text."""
    paths = [
        path for path in files("moecc").joinpath("layouts").iterdir() if path.name.endswith(".toml")
    ]
    texts = {path.name.removesuffix(".toml"): path.read_text("utf-8") for path in paths}
    return dict(sorted(texts.items()))


@cache
def read_builtin(name: str) -> tuple[LayoutRule, ...]:
    """Return the rules of a layout that moecc ships."""
    return tuple(parse_layout(builtin_layouts()[name], name))


def read_layout(name: str) -> list[LayoutRule]:
    """Return the rules of a layout: one that moecc ships, or a file.

    Raises:
      UsageError: there is neither.
      InputError: there is no such regular file, it is too large or not UTF-8, or its rules are
        wrong.
      MachineError: the file cannot be read.
    """
    builtin = builtin_layouts()
    if name in builtin:
        return list(read_builtin(name))
    if not name.endswith(SUFFIXES) and "/" not in name:
        hint = nearest(name, builtin) or f"layouts: {', '.join(builtin)}; or a file, my.toml"
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
    """Return the mesh axes that the rules of several layouts name, in their order."""
    return tuple(dict.fromkeys(m for rule in read_layouts(names) for m in rule.mesh))


@cache
def shipped_axes() -> frozenset[str]:
    """Return the axes that layouts of moecc name, which not every model has."""
    rules = read_layouts(builtin_layouts())
    return frozenset(name for rule in rules for name in (rule.axis, rule.beside) if name)


def axis_problems(rules: Iterable[LayoutRule], axes: Collection[str]) -> Iterator[Problem]:
    """Yield the rules, optional ones excepted, that name an axis of no model or layout.

    Args:
      rules: the rules.
      axes: the axes of the model.
    """
    names = shipped_axes().union(axes)
    for rule in rules:
        for axis in () if rule.optional else (rule.axis, rule.beside):
            if axis and axis not in names:
                yield Problem(
                    f"the model has no axis {axis!r}", where=rule.source, found=str(rule),
                    hint=nearest(axis, names) or "optional = true for models that lack it",
                )  # fmt: skip


def remark_on_groups(rules: Iterable[LayoutRule], mesh: Mapping[str, int]) -> str:
    """Return that rules shard the batch over mesh axes and not its token groups, or nothing."""
    sharded: dict[str, dict[str, None]] = {"batch": {}, "group": {}}
    for rule in rules:
        if not rule.stored and rule.axis in sharded:
            sharded[rule.axis].update(dict.fromkeys(m for m in rule.mesh if mesh.get(m, 1) > 1))
    if sharded["batch"].keys() <= sharded["group"].keys():
        return ""
    listed = ", ".join(f'"{name}"' for name in sharded["batch"])
    return (
        "rules shard the batch and not its token groups, so tokens are gathered before they are "
        f'routed; after the rule for expert: {{ axis = "group", mesh = [{listed}] }}'
    )
