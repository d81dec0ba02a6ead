"""The options of a pass: its fields, and parsing and printing of their values."""

from __future__ import annotations

import json
import re
import types
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from moecc.pipeline.passes import Pass

_BARE = re.compile(r'[^\s{}",]+\Z')
_INT = re.compile(r"[+-]?[0-9]{1,19}\Z")
_FLOAT = re.compile(r"[+-]?(?:inf|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\Z")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a value between commas: its text, and whether it was quoted."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a pass.

    Attributes:
      name: the name in the text, ``top-k``.
      field: the name of the Python field, ``top_k``.
      type: its annotation.
      doc: its meaning, in a line.
      default: its value where the text omits it, or `dataclasses.MISSING`.
    """

    name: str
    field: str
    type: object
    doc: str
    default: object

    @property
    def required(self) -> bool:
        """Whether the text must state it."""
        return self.default is MISSING


@cache
def options(cls: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, Option] = {}
    for field in fields(cls):
        hint, doc = hints[field.name], ""
        if get_origin(hint) is Annotated:
            hint, doc = get_args(hint)[:2]
        name = field.name.replace("_", "-")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[name] = Option(name, field.name, hint, doc, default)
    return found


def unreadable(cls: type[Pass]) -> list[str]:
    """Return the annotations of a pass that cannot be resolved or have no text form."""
    try:
        found = options(cls)
    except NameError as error:
        return [f"an annotation cannot be resolved: {error}"]
    return [
        f"option {o.name!r} has a type without a text form: {o.type}"
        for o in found.values()
        if not _is_spelled(o.type)
    ]


def _is_spelled(type: object) -> bool:
    if type in (int, float, bool, str, types.NoneType) or get_origin(type) is Literal:
        return True
    if get_origin(type) is tuple or _is_union(type):
        inner = [t for t in get_args(type) if t is not ...]
        return bool(inner) and all(map(_is_spelled, inner))
    return False


class _NoFit(ValueError):
    """The text is not a value of the type."""


def read(type: object, pieces: tuple[Piece, ...]) -> object:
    """Return the value of `type` parsed from `pieces`.

    Raises:
      ValueError: they are not a value of the type.
    """
    if get_origin(type) is tuple:
        return _read_tuple(get_args(type), pieces)
    if _is_union(type):
        return _read_union(type, pieces)
    if type is str and not any(p.quoted for p in pieces):
        return ",".join(p.text for p in pieces)
    if len(pieces) != 1:
        raise _NoFit
    return _read_one(type, pieces[0])


def _read_one(type: object, piece: Piece) -> object:
    text = piece.text
    if get_origin(type) is Literal:
        for choice in get_args(type):
            if str(choice) == text:
                return choice
        raise _NoFit
    if type is str:
        return text
    if piece.quoted:
        raise _NoFit
    if type is types.NoneType and text == "none":
        return None
    if type is bool and text in ("true", "false"):
        return text == "true"
    if type is int and _INT.match(text):
        return int(text)
    if type is float and _FLOAT.match(text):
        return float(text)
    raise _NoFit


def _read_tuple(elements: tuple[object, ...], pieces: tuple[Piece, ...]) -> tuple[object, ...]:
    if pieces == (Piece("()"),):
        pieces = ()
    each = elements[:1] * len(pieces) if elements[-1] is ... else elements
    if len(each) != len(pieces):
        raise _NoFit
    return tuple(read(t, (p,)) for t, p in zip(each, pieces, strict=True))


def _read_union(type: object, pieces: tuple[Piece, ...]) -> object:
    for member in _members(type):
        try:
            return read(member, pieces)
        except _NoFit:
            continue
    raise _NoFit


def _is_union(type: object) -> bool:
    return get_origin(type) in (Union, types.UnionType)


def _members(type: object) -> list[object]:
    """Return the members of a union, the most restrictive first."""
    order = [types.NoneType, bool, int, float]

    def rank(member: object) -> int:
        if member in order:
            return order.index(member)
        if get_origin(member) is Literal:
            return -1
        return 9 if member is str else 8

    return sorted(get_args(type), key=rank)


def write(type: object, value: object) -> str:
    """Return the text that `read` parses back to `value`.

    Raises:
      ValueError: `value` is not of `type`.
    """
    if isinstance(value, tuple) and (get_origin(type) is tuple or _is_union(type)):
        text = _write_tuple(type, value)
    else:
        text = _write_one(type, value)
    if not _spells(type, split(text), value):
        raise ValueError(f"{value!r} is not {describe(type)}")
    return text


def _write_tuple(type: object, value: tuple[object, ...]) -> str:
    if not value:
        return "()"
    if _is_union(type):
        type = next((t for t in _members(type) if get_origin(t) is tuple), tuple[str, ...])
    args = get_args(type)
    each = args[:1] * len(value) if args[-1] is ... else args
    parts = [_write_element(t, v) for t, v in zip(each, value, strict=True)]
    return ",".join(parts) if parts != ["()"] else '"()"'


def _write_element(type: object, value: object) -> str:
    text = _write_one(type, value)
    return json.dumps(value) if "," in text and text[0] != '"' else text


def _write_one(type: object, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    parts = value.split(",")
    if all(_BARE.match(p) for p in parts):
        bare = tuple(Piece(p) for p in parts)
        if _spells(type, bare, value):
            return value
    return json.dumps(value)


def _spells(type: object, pieces: tuple[Piece, ...], value: object) -> bool:
    try:
        back = read(type, pieces)
    except _NoFit:
        return False
    # A float may be an int in Python, but True is not 1.
    return bool(back == value) and isinstance(back, bool) == isinstance(value, bool)


_PIECE = re.compile(r'"((?:[^"\\]|\\.)*)"|([^\s{}",]+)')


def split(text: str) -> tuple[Piece, ...]:
    """Return the pieces of a value's text.

    Raises:
      ValueError: it is not a value.
    """
    pieces: list[Piece] = []
    at = 0
    while True:
        match = _PIECE.match(text, at)
        if match is None:
            raise ValueError(at)
        pieces.append(_piece(match.group()))
        at = match.end()
        if at == len(text):
            return tuple(pieces)
        if text[at] != ",":
            raise ValueError(at)
        at += 1


def _piece(text: str) -> Piece:
    if text[0] != '"':
        return Piece(text)
    # json rejects control characters inside quotes, which a shell may well pass on.
    return Piece(json.loads(text, strict=False), quoted=True)


def choices(type: object) -> list[str]:
    """Return the words that the literals in `type` allow."""
    if get_origin(type) is Literal:
        return list(map(str, get_args(type)))
    return [word for inner in get_args(type) for word in choices(inner)]


def describe(type: object) -> str:
    """Return a description of the values of `type`, for messages and the documentation."""
    if get_origin(type) is Literal:
        return f"one of {', '.join(map(str, get_args(type)))}"
    if get_origin(type) is tuple:
        inner = get_args(type)
        if inner[-1] is ...:
            return f"a list, separated by commas, each {describe(inner[0])}"
        return f"{len(inner)} values separated by commas: {', '.join(map(describe, inner))}"
    if _is_union(type):
        return " or ".join(describe(t) for t in get_args(type))
    words: dict[object, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    return "none" if type is types.NoneType else words[type]
