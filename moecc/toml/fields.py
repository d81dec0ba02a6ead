"""Read tables of TOML into dataclasses, and collect every problem on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moecc.checkpoint.problems import describe
from moecc.errors import Problem, nearest, printable
from moecc.support.untyped import Hint
from moecc.toml.places import Path

S = TypeVar("S")

_WORDS = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
_LARGEST = 1 << 63


def dotted(path: Path) -> str:
    """Return a path as users write it: ``data.train.0.weight``."""
    return printable(".".join(map(str, path)))


@dataclass
class FieldReader:
    """Reads values by the types of fields.

    Attributes:
      where: returns the place of a path in the file or among the options.
      problems: what was found wrong, with the path.
    """

    where: Callable[[Path], str]
    problems: list[tuple[Path, Problem]] = field(default_factory=list)

    def section(self, cls: type[S], table: object, path: Path) -> S:
        """Return a section from its table; a field that is wrong has its default.

        A field without a default has an arbitrary value then, and a problem was noted.
        """
        if not isinstance(table, Mapping):
            self._reject(path, "not a table", f"[{dotted(path)}]", table)
            table = {}
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        for name in table:
            if name not in known:
                hint = nearest(name, known) or f"keys: {', '.join(known)}"
                self._note((*path, name), "no such key", hint=hint)
        types = get_type_hints(cls)
        found = {
            name: self._field(one, types[name], table, (*path, name)) for name, one in known.items()
        }
        return cls(**found)

    def _field(
        self, one: Field[Any], type_: Hint, table: Mapping[str, object], path: Path
    ) -> object:
        if one.name in table:
            before = len(self.problems)
            value = self._value(type_, table[one.name], path)
            return value if len(self.problems) == before else _placeholder(one, type_, value)
        if not _is_required(one):
            return _default(one, type_)
        if is_dataclass(type_) and isinstance(type_, type):
            # What its table must have is missing, too.
            return self.section(type_, {}, path)
        self._note(path, "a key is missing", expected=_expected(type_))
        return _default(one, type_)

    def _value(self, type_: Hint, value: object, path: Path) -> object:
        if is_dataclass(type_) and isinstance(type_, type):
            return self.section(type_, value, path)
        if _is_list(type_):
            return self._items(get_args(type_)[0], value, path)
        if isinstance(type_, type) and issubclass(type_, Enum):
            return self._choice(type_, value, path)
        return self._scalar(type_, value, path)

    def _items(self, type_: Hint, value: object, path: Path) -> object:
        if isinstance(value, list):
            return tuple(self._value(type_, each, (*path, n)) for n, each in enumerate(value))
        return self._reject(path, "not a list", f"a list of {_expected(type_)}", value)

    def _choice(self, type_: type[Enum], value: object, path: Path) -> object:
        choices = [str(each.value) for each in type_]
        if isinstance(value, str) and value in choices:
            return type_(value)
        hint = nearest(value, choices) if isinstance(value, str) else None
        return self._reject(path, "no such choice", " | ".join(choices), value, hint)

    def _scalar(self, type_: type, value: object, path: Path) -> object:
        if type_ is float and type(value) is int and abs(value) < _LARGEST:
            value = float(value)
        if type(value) is not type_:
            return self._reject(path, "a value of another type", _expected(type_), value)
        if isinstance(value, float) and not math.isfinite(value):
            return self._reject(path, "not a finite number", "a number", value)
        if type(value) is int and abs(value) >= _LARGEST:
            return self._reject(path, "too large a number", f"less than {_LARGEST}", value)
        return value

    def _reject(
        self, path: Path, what: str, expected: str, value: object, hint: str | None = None
    ) -> object:
        """Note a problem, and return what stands for the value: None."""
        self._note(path, what, expected=expected, found=describe(value), hint=hint)
        return None

    def _note(
        self,
        path: Path,
        what: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        place = f"{self.where(path)}: {dotted(path)}"
        self.problems.append((path, Problem(what, place, expected, found, hint)))


def _is_list(type_: Hint) -> bool:
    origin: object = get_origin(type_)
    return origin is tuple


def _expected(type_: Hint) -> str:
    if _is_list(type_):
        return f"a list of {_expected(get_args(type_)[0])}"
    if is_dataclass(type_):
        return "tables"
    if isinstance(type_, type) and issubclass(type_, Enum):
        return " | ".join(str(each.value) for each in type_)
    return _WORDS[type_]


def _is_required(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _placeholder(one: Field[Any], type_: Hint, value: object) -> object:
    """Return what stands for a value with problems: a section keeps its fields that are right."""
    return value if is_dataclass(type_) else _default(one, type_)


def _default(one: Field[Any], type_: Hint) -> object:
    if one.default is not MISSING:
        return one.default
    if one.default_factory is not MISSING:
        return one.default_factory()
    return () if _is_list(type_) else type_()
