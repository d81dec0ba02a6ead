"""Records: frozen dataclasses whose fields say what a JSON or TOML file holds.

From the fields of a record follow a strict reader, which reports every problem at once with its
place, and a writer.  A field has one of these types::

    str  int  float  bool  None  Any       a value (a whole number is a float, too)
    an Enum, Literal                       one of its values
    tuple[T, ...]                          a list
    Mapping[str, T]                        an object, or a table
    a dataclass                            an object with these keys and no others
    T | None                               perhaps null
    Annotated[T, Check(...)]               a value that fulfils a condition

A key may be absent where its field has a default.  A record with a version has a field ``schema``,
whose default is the version that is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from moecc.errors import SHOWN_PROBLEMS, InputError, Problem, describe, nearest, printable
from moecc.support.documents import KeyPath, parse_toml, toml_lines
from moecc.support.untyped import Hint, JsonDict

T = TypeVar("T")

_WORDS: Mapping[Hint, str] = {
    str: "a text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}
_LARGEST = 1 << 63
_PLAIN = {str, int, float, bool, NoneType}


@dataclass(frozen=True, slots=True)
class Check:
    """A condition on the value of a field.

    Attributes:
      is_valid: tells whether a value of the right type fulfils it.
      expected: what is expected instead, for messages.
    """

    is_valid: Callable[[Any], object]
    expected: str


Positive = Annotated[int, Check(lambda number: number > 0, "a whole number above 0")]
Count = Annotated[int, Check(lambda number: number >= 0, "a whole number, 0 or more")]
Sha256 = Annotated[str, Check(re.compile("[0-9a-f]{64}").fullmatch, "64 hexadecimal digits")]


def stored(
    *, key: str | None = None, omit_default: bool = False, required: bool = False
) -> dict[str, Any]:
    """Return metadata of a field.

    Args:
      key: its key in a file, if it is not the field's name.
      omit_default: whether its default is not written.
      required: whether its key must be in a file although it has a default.
    """
    return {"key": key, "omit_default": omit_default, "required": required}


def dotted(path: KeyPath) -> str:
    """Return a path as users write it: ``data.train.0.weight``."""
    return printable(".".join(map(str, path)))


class RecordReader:
    """Reads records from parsed JSON or TOML, and collects every problem.

    Args:
      where: returns the place of a value, of which a message adds the keys: ``recipe.toml:12``.

    Attributes:
      problems: what is wrong, with the path of the value.
      count: how many problems there are, those beyond the first few hundred included.
    """

    def __init__(self, where: Callable[[KeyPath], str]) -> None:
        self.where = where
        self.problems: list[tuple[KeyPath, Problem]] = []
        self.count = 0

    def section(
        self, cls: Callable[..., T], table: object, path: KeyPath = (), *, is_open: bool = False
    ) -> T:
        """Return a record from its table; a field that is wrong has its default.

        A field without a default has an arbitrary value then, and a problem was noted.  In an open
        table, of another project, keys without a field are ignored, and null stands for no value.
        """
        if not isinstance(table, Mapping):
            expected = f"a table with {', '.join(_fields_of(cls))}"
            self.reject(path, "not a table", expected, table)
            return RecordReader(self.where).section(cls, {}, path)
        keys = _fields_of(cls)
        if is_open:
            table = {key: value for key, value in table.items() if value is not None}
        elif not table.keys() <= keys.keys():
            for name in (name for name in table if name not in keys):
                hint = nearest(str(name), keys) or f"keys: {', '.join(keys)}"
                self.add((*path, name), Problem("no such key", hint=hint))
        values = {
            field.name: self._field(field, hint, table, (*path, key))
            for key, (field, hint) in keys.items()
        }
        return cls(**values)

    def value(self, hint: Hint, value: object, path: KeyPath) -> Any:
        """Return a value of the type `hint`; an arbitrary one where a problem was noted."""
        return _reader_of(hint)(self, value, path)

    def add(self, path: KeyPath, problem: Problem) -> None:
        """Note a problem of the value at `path`, where its text gets its place."""
        self.count += 1
        if self.count <= SHOWN_PROBLEMS:
            where = f"{self.where(path)}: {dotted(path)}" if path else self.where(path)
            self.problems.append((path, replace(problem, where=where)))

    def reject(
        self, path: KeyPath, fault: str, expected: str, value: object, hint: str | None = None
    ) -> None:
        """Note that a value is not as expected."""
        self.add(path, Problem(fault, None, expected, describe(value), hint))

    def raise_if_any(self) -> None:
        """Raise InputError with all problems, if there are any."""
        if self.problems:
            more = self.count - len(self.problems)
            last = [Problem(f"and {more:,} more problems like these")] if more else []
            raise InputError([*(problem for _, problem in self.problems), *last])

    def _field(
        self, field: Field[Any], hint: Hint, table: Mapping[str, object], path: KeyPath
    ) -> object:
        is_record = is_dataclass(hint)
        if path[-1] in table:
            before = self.count
            value = self.value(hint, table[cast(str, path[-1])], path)
            return value if is_record or self.count == before else _default(field, hint)
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if not has_default or field.metadata.get("required"):
            if is_record:  # the keys that its table must have are missing, too
                return self.value(hint, {}, path)
            self.add(path, Problem("a key is missing", expected=_expected(hint)))
        return _default(field, hint)


def read_record(
    cls: Callable[..., T],
    document: object,
    where: str,
    *,
    versions: Collection[object] = (),
    is_open: bool = False,
) -> T:
    """Return a record from parsed JSON.

    Args:
      cls: its class.
      document: the JSON value.
      where: the file, for messages.
      versions: the schemas that are read; by default the one that is written.
      is_open: whether keys without a field are ignored, see `RecordReader.section`.

    Raises:
      InputError: another version, or else everything that is wrong.
    """
    schema = _fields_of(cls).get("schema")
    if schema is not None:
        readable = versions or (schema[0].default,)
        version = document.get("schema") if isinstance(document, Mapping) else None
        if not any(
            type(version) is type(accepted) and version == accepted for accepted in readable
        ):
            raise InputError(
                "the file is of a version that this moecc does not read",
                where=where,
                expected=f'"schema": {" or ".join(describe(accepted) for accepted in readable)}',
                found=describe(version),
            )
    reader = RecordReader(lambda path: where)
    record = reader.section(cls, document, is_open=is_open)
    reader.raise_if_any()
    return record


def toml_reader(text: str, name: str) -> tuple[JsonDict, RecordReader]:
    """Return the table of a TOML `text`, and a reader that reports the lines of its values.

    Raises:
      InputError: it is not TOML.
    """
    table, lines = parse_toml(text, name), toml_lines(text)
    return table, RecordReader(lambda path: line_of(path, lines, name))


def line_of(path: KeyPath, lines: Mapping[KeyPath, int], name: str) -> str:
    """Return ``name:line`` of a path, or of the nearest table above it that has a line."""
    above = (lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines)
    line = next(above, None)
    return name if line is None else f"{name}:{line}"


def to_json(record: Any) -> JsonDict:
    """Return a record as JSON values, its keys in the order of its fields."""
    document = {}
    for key, (field, hint) in _fields_of(cast(Hint, type(record))).items():
        value = getattr(record, field.name)
        if not field.metadata.get("omit_default") or value != _default(field, hint):
            document[key] = plain_json(value)
    return document


def plain_json(value: Any) -> Any:
    """Return a value of a field as JSON: records, mappings, tuples and enums included."""
    if type(value) in _PLAIN:  # first, for files of 100,000 records
        return value
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain_json(item) for item in value]
    return value


@cache
def _fields_of(cls: Hint) -> dict[str, tuple[Field[Any], Hint]]:
    """Return the fields of a record and their types, by their keys in a file."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.metadata.get("key") or f.name: (f, hints[f.name]) for f in fields(cls) if f.init}


_Read = Callable[[RecordReader, Any, KeyPath], Any]


@cache
def _reader_of(hint: Hint) -> _Read:
    """Return what reads values of a type: made once a type, for files of 100,000 records."""
    origin, args = _parts(hint)
    if hint in (Any, object):
        return lambda reader, value, path: value
    if isinstance(hint, type) and is_dataclass(hint):
        return lambda reader, value, path: reader.section(hint, value, path)
    if origin is Annotated:
        return _checked(_reader_of(args[0]), args[1:])
    if origin in (Union, UnionType):
        return _optional(hint, args)
    if origin is tuple:
        return _list(hint, _reader_of(args[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*map(_reader_of, args))
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return _choice(hint)
    return _scalar(hint)


def _checked(read_value: _Read, checks: tuple[Check, ...]) -> _Read:
    def read(reader: RecordReader, value: Any, path: KeyPath) -> Any:
        before = reader.count
        result = read_value(reader, value, path)
        for check in checks if reader.count == before else ():
            if not check.is_valid(result):
                return reader.reject(path, "a wrong value", check.expected, value)
        return result

    return read


def _optional(hint: Hint, args: tuple[Hint, ...]) -> _Read:
    (inner,) = (arg for arg in args if arg is not NoneType)
    read_value = _reader_of(inner)
    return lambda reader, value, path: None if value is None else read_value(reader, value, path)


def _list(hint: Hint, read_element: _Read) -> _Read:
    def read(reader: RecordReader, value: Any, path: KeyPath) -> Any:
        if isinstance(value, list):
            return tuple(read_element(reader, each, (*path, n)) for n, each in enumerate(value))
        return reader.reject(path, "not a list", _expected(hint), value)

    return read


def _mapping(read_key: _Read, read_item: _Read) -> _Read:
    def read(reader: RecordReader, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, Mapping):
            return reader.reject(path, "not an object", "an object", value)
        return {
            read_key(reader, key, (*path, key)): read_item(reader, item, (*path, key))
            for key, item in value.items()
        }

    return read


def _choice(hint: Hint) -> _Read:
    values = get_args(hint) or [each.value for each in hint]

    def read(reader: RecordReader, value: Any, path: KeyPath) -> Any:
        for choice in values:
            if type(value) is type(choice) and value == choice:
                return hint(choice) if isinstance(hint, type) else choice
        near = nearest(value, map(str, values)) if isinstance(value, str) else None
        return reader.reject(path, "no such choice", _expected(hint), value, near)

    return read


def _scalar(hint: type) -> _Read:
    def read(reader: RecordReader, value: Any, path: KeyPath) -> Any:
        if hint is float and type(value) is int and abs(value) < _LARGEST:
            value = float(value)
        if type(value) is not hint:
            return reader.reject(path, "a value of another type", _expected(hint), value)
        if isinstance(value, float) and not math.isfinite(value):
            return reader.reject(path, "not a finite number", "a number", value)
        if type(value) is int and abs(value) >= _LARGEST:
            return reader.reject(path, "too large a number", f"less than {_LARGEST}", value)
        return value

    return read


def _parts(hint: Hint) -> tuple[Hint, tuple[Hint, ...]]:
    return get_origin(hint), get_args(hint)


def _expected(hint: Hint) -> str:
    origin, args = _parts(hint)
    if origin is Annotated:
        return next((each.expected for each in reversed(args) if isinstance(each, Check)), "")
    if origin is tuple:
        return f"a list of {_expected(args[0])}"
    if origin in (Union, UnionType):
        return " or ".join(map(_expected, args))
    if origin is Literal:
        return " | ".join(map(str, args))
    if is_dataclass(hint):
        return f"tables with {', '.join(_fields_of(cast(Hint, hint)))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(each.value) for each in hint)
    return _WORDS.get(hint, "an object")


def _default(field: Field[Any], hint: Hint) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    return _zero(hint)


def _zero(hint: Hint) -> Any:
    """Return what stands for a value that could not be read: empty, zero, or the first choice."""
    origin, args = _parts(hint)
    if origin is Annotated:
        return _zero(args[0])
    if origin in (Union, UnionType) or hint in (Any, object):
        return None
    if origin is Literal:
        return args[0]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {}
    return () if origin is tuple else hint()
