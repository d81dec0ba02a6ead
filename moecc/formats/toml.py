"""TOML that people write: strict keys, typed values, every problem with its line."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moecc.errors import InputError, Problem, nearest, printable
from moecc.support.problems import describe
from moecc.support.untyped import Hint, JsonDict

# The line of every key of a TOML text, which Python's own parser does not say.

Path = tuple[str | int, ...]
"""The keys and indices that lead to a value: ``("data", "train", 0, "weight")``."""

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*)|(?P<string>\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}"""
    r"""|"(?:[^"\\]|\\.)*"|'[^']*')|(?P<mark>[\[\]{}=,.\n])|(?P<bare>[^\s\[\]{}=,.\#"']+)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class _Token:
    text: str
    line: int

    @property
    def key(self) -> str:
        """The key that it spells, without its quotes."""
        quoted = self.text[:1] in "\"'"
        return self.text[1:-1] if quoted else self.text


def toml_places(text: str) -> dict[Path, int]:
    """Return the line of each key, table and element of a valid TOML `text`, counted from 1."""
    return _Places(text).found


def shown_place(path: Path, places: Mapping[Path, int], name: str) -> str:
    """Return ``name:line`` of a path, or of the nearest table above it that has a line."""
    above = (places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places)
    line = next(above, None)
    return name if line is None else f"{name}:{line}"


class _Places:
    """Walks over the tokens of a text and notes where each value begins."""

    def __init__(self, text: str) -> None:
        self.found: dict[Path, int] = {}
        self._tokens = [*_tokens(text), _Token("\n", text.count("\n") + 1)]
        self._at = 0
        self._arrays: dict[Path, int] = {}
        table: Path = ()
        while self._at < len(self._tokens):
            if self._peek() == "\n":
                self._at += 1
            elif self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _peek(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else "\n"

    def _next(self) -> _Token:
        token = self._tokens[self._at]
        self._at += 1
        return token

    def _header(self) -> Path:
        """Read ``[a.b]`` or ``[[a.b]]`` and return its path."""
        line = self._next().line
        is_array = self._peek() == "["
        if is_array:
            self._at += 1
        path = self._resolve(self._keys("]"))
        self._at += 2 if is_array else 1
        if is_array:
            self.found.setdefault(path, line)
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = (*path, self._arrays[path])
        self.found.setdefault(path, line)
        return path

    def _resolve(self, keys: tuple[str, ...]) -> Path:
        """Return the path of `keys`, an array of tables standing for its last one."""
        path: Path = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            if path in self._arrays and number < len(keys) - 1:
                path = (*path, self._arrays[path])
        return path

    def _keys(self, end: str) -> tuple[str, ...]:
        keys = []
        while self._peek() != end:
            token = self._next()
            if token.text != ".":
                keys.append(token.key)
        return tuple(keys)

    def _pair(self, table: Path) -> None:
        line = self._tokens[self._at].line
        path = (*table, *self._keys("="))
        self._at += 1
        for length in range(len(table) + 1, len(path) + 1):
            self.found.setdefault(path[:length], line)
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._peek() == "{":
            self._inline(path)
        elif self._peek() == "[":
            self._elements(path)
        else:
            # Numbers and dates have dots, and dates a space.
            while self._peek() not in (",", "]", "}", "\n"):
                self._at += 1

    def _inline(self, path: Path) -> None:
        self._at += 1
        while self._peek() != "}":
            if self._peek() in (",", "\n"):
                self._at += 1
            else:
                self._pair(path)
        self._at += 1

    def _elements(self, path: Path) -> None:
        self._at += 1
        index = 0
        while self._peek() != "]":
            if self._peek() in (",", "\n"):
                self._at += 1
                continue
            self.found[(*path, index)] = self._tokens[self._at].line
            self._value((*path, index))
            index += 1
        self._at += 1


def _tokens(text: str) -> Iterator[_Token]:
    line, counted = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if match.lastgroup != "skip":
            yield _Token(match.group(), line)


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


# TOML parsed by Python's own parser, with moecc's errors.


def parse_toml(text: str, name: str) -> JsonDict:
    """Return the table of a TOML `text`.

    Args:
      text: the TOML.
      name: of its file, in messages.

    Raises:
      InputError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not TOML: {error}", where=name) from None
    except ValueError:  # a number with more digits than Python reads
        raise InputError("not TOML: a number is too long", where=name) from None
    except RecursionError:
        raise InputError("the TOML is nested too deeply", where=name) from None
