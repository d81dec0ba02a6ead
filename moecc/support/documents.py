"""Parse JSON and TOML from untrusted text: bounded, unambiguous, with the line of each problem.

Python's own JSON parser lets the last of two equal keys win and accepts NaN.  Here both are
problems, and each is reported with its line and column.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moecc.errors import InputError, Problem, Problems, describe, quoted
from moecc.support.untyped import JsonDict

KeyPath = tuple[str | int, ...]
"""The keys and indices that lead to a value: ``("data", "train", 0, "weight")``."""

MAX_DEPTH = 64
MAX_VALUES = 1 << 20
# Locating problems takes a hundred times as long as parsing.
_LOCATED_CHARACTERS = 1 << 20
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


def parse_json_object(data: bytes, where: str) -> JsonDict:
    """Parse an object of strict JSON in UTF-8. Raises InputError as `parse_json`."""
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise InputError(
            "the file is not a JSON object",
            where=where,
            expected="an object in braces",
            found=describe(value),
        )
    return value


def parse_json(data: bytes | bytearray, where: str, *, max_values: int = MAX_VALUES) -> object:
    """Parse strict JSON in UTF-8, at most MAX_DEPTH levels deep.

    Raises:
      InputError: the first syntax error, or else every duplicate key and non-finite number; or
        more than about `max_values` values, whose objects would fill the memory.
    """
    values = sum(data.count(mark) for mark in (b"{", b"[", b","))
    if values > max_values:
        raise InputError(
            "too many JSON values",
            where=where,
            expected=f"at most about {max_values:,}",
            found=f"{values:,}",
        )
    text = _decode_utf8(data, where)
    hooks = _ParserHooks()
    try:
        value = hooks.parse(text)
    except json.JSONDecodeError as error:
        line = f"{where}:{error.lineno}:{error.colno}"
        raise InputError(f"not JSON: {error.msg}", where=line) from None
    except RecursionError:
        value = None
        is_too_deep = True
    else:
        is_too_deep = False
        if hooks.faults:
            _raise_faults(text, where, hooks.faults)
    if is_too_deep or _is_deeper(value, MAX_DEPTH):
        raise InputError(f"the JSON is nested more than {MAX_DEPTH} levels deep", where=where)
    return value


class _ParserHooks:
    """Detects duplicate keys and unusable numbers while the C parser runs."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def parse(self, text: str) -> object:
        """Return the value of `text`; errors besides syntax go to `faults`.

        Raises:
          JSONDecodeError: it is not JSON.
          RecursionError: it is nested too deeply for the parser.
        """
        try:
            return self._loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            # Python refuses to parse so long an integer, and stops there. Only in this case
            # is a function called for each integer: headers have hundreds of thousands.
            self.faults.clear()
            return self._loads(text, parse_int=self._integer)

    def _loads(self, text: str, parse_int: Callable[[str], int] | None = None) -> object:
        return json.loads(
            text,
            object_pairs_hook=self._object,
            parse_float=self._float,
            parse_constant=self._float,
            parse_int=parse_int,
        )

    def _object(self, pairs: list[tuple[str, object]]) -> JsonDict:
        value = dict(pairs)
        if len(value) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.faults += [_duplicate_text(key) for key, count in counts.items() if count > 1]
        return value

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self.faults += filter(None, [_number_fault(digits)])
        return value

    def _integer(self, digits: str) -> int:
        if fault := _number_fault(digits):
            self.faults.append(fault)
            return 0
        return int(digits)


def _duplicate_text(key: str) -> str:
    return f"the key {quoted(key)} appears twice in one object"


def _number_fault(token: str) -> str | None:
    """Return what is wrong with a token that is no string: a number, or true, false, null."""
    if token in ("NaN", "Infinity", "-Infinity"):
        return f"{token} is not a JSON number"
    if token in ("true", "false", "null"):
        return None
    digits = token.lstrip("-")
    if digits.isdigit():
        # Zero stands for no limit in Python; here there always is one.
        limit = sys.get_int_max_str_digits() or sys.int_info.default_max_str_digits
        return f"a number of {len(digits):,} digits" if len(digits) > limit else None
    return f"the number {describe(token)} is not finite" if math.isinf(float(token)) else None


def _decode_utf8(data: bytes | bytearray, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InputError(
            "the text is not UTF-8",
            where=f"{where}:{line}:{column}",
            found=f"byte 0x{data[error.start]:02x}",
        ) from None


def _raise_faults(text: str, where: str, faults: list[str]) -> None:
    """Raise with every duplicate key and unusable number, located unless the text is long."""
    problems = Problems()
    if len(text) > _LOCATED_CHARACTERS:
        problems.extend(Problem(fault, where) for fault in faults)
        problems.raise_if_any()
    line, counted = 1, 0
    for position, fault in _locate_faults(text):
        line += text.count("\n", counted, position)
        counted = position
        column = position - text.rfind("\n", 0, position)
        problems.add(fault, where=f"{where}:{line}:{column}")
    problems.raise_if_any()


def _locate_faults(text: str) -> Iterator[tuple[int, str]]:
    """Yield the position of each duplicate key and unusable number of a well-formed text."""
    open_keys: list[set[str] | None] = []  # None stands for an open list
    previous = ""
    for match in _JSON_TOKEN.finditer(text):
        token = match.group()
        if token in "{[":
            open_keys.append(set() if token == "{" else None)
        elif token in "}]":
            open_keys.pop()
        elif token[0] == '"':
            keys = open_keys[-1] if open_keys else None
            if keys is not None and previous in ("{", ","):
                key = json.loads(token, strict=False)
                if key in keys:
                    yield match.start(), _duplicate_text(key)
                keys.add(key)
        elif token not in ",:" and (fault := _number_fault(token)):
            yield match.start(), fault
        previous = token


def _is_deeper(value: object, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
    return bool(level)


def parse_toml(text: str, name: str) -> JsonDict:
    """Return the table of a TOML `text`.

    Args:
      text: the TOML.
      name: the name of its file, for messages.

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


def toml_lines(text: str) -> dict[KeyPath, int]:
    """Return the line of each key, table and element of a valid TOML `text`, counted from 1.

    Python's own parser does not tell them.
    """
    return _TomlWalk(text).lines


_TOML_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*)|(?P<string>\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}"""
    r"""|"(?:[^"\\]|\\.)*"|'[^']*')|(?P<mark>[\[\]{}=,.\n])|(?P<bare>[^\s\[\]{}=,.\#"']+)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class _TomlToken:
    text: str
    line: int


class _TomlWalk:
    """Walks over the tokens of a valid text and notes the line where each value begins."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._tokens = [*_toml_tokens(text), _TomlToken("\n", text.count("\n") + 1)]
        self._at = 0
        self._array_indices: dict[KeyPath, int] = {}
        table: KeyPath = ()
        while self._at < len(self._tokens):
            if self._peek() == "\n":
                self._at += 1
            elif self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _peek(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else "\n"

    def _header(self) -> KeyPath:
        """Read ``[a.b]`` or ``[[a.b]]`` and return its path."""
        line = self._tokens[self._at].line
        self._at += 1
        is_array = self._peek() == "["
        self._at += is_array
        path: KeyPath = ()
        keys = self._keys("]")
        for number, key in enumerate(keys):
            path = (*path, key)
            # Within a longer path, an array of tables stands for its last table.
            if path in self._array_indices and number < len(keys) - 1:
                path = (*path, self._array_indices[path])
        self._at += 1 + is_array
        self.lines.setdefault(path, line)
        if is_array:
            self._array_indices[path] = self._array_indices.get(path, -1) + 1
            path = (*path, self._array_indices[path])
            self.lines.setdefault(path, line)
        return path

    def _keys(self, end: str) -> tuple[str, ...]:
        keys = []
        while (text := self._peek()) != end:
            self._at += 1
            if text != ".":
                keys.append(text[1:-1] if text[0] in "\"'" else text)
        return tuple(keys)

    def _pair(self, table: KeyPath) -> None:
        line = self._tokens[self._at].line
        path = (*table, *self._keys("="))
        self._at += 1
        for length in range(len(table) + 1, len(path) + 1):
            self.lines.setdefault(path[:length], line)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        opening = self._peek()
        if opening not in ("{", "["):
            # Numbers and dates have dots, and dates a space.
            while self._peek() not in (",", "]", "}", "\n"):
                self._at += 1
            return
        self._at += 1
        index = 0
        while (text := self._peek()) != {"{": "}", "[": "]"}[opening]:
            if text in (",", "\n"):
                self._at += 1
            elif opening == "{":
                self._pair(path)
            else:
                self.lines[(*path, index)] = self._tokens[self._at].line
                self._value((*path, index))
                index += 1
        self._at += 1


def _toml_tokens(text: str) -> Iterator[_TomlToken]:
    line, counted = 1, 0
    for match in _TOML_TOKEN.finditer(text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if match.lastgroup != "skip":
            yield _TomlToken(match.group(), line)
