"""Read JSON from untrusted files: bounded and unambiguous.

Python's own parser lets the last of two equal keys win and accepts NaN.  Here both are problems,
and each is reported with its line and column.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from moecc.errors import InputError, Problem
from moecc.formats.files import read_bounded
from moecc.support.problems import Problems, describe, quoted

MAX_DEPTH = 64
MAX_VALUES = 1 << 20
# Locating problems takes a hundred times as long as parsing.
_LOCATED_CHARACTERS = 1 << 20
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


def read_json_object(path: Path, *, limit_bytes: int) -> dict[str, object]:
    """Read a JSON object from a regular file of at most `limit_bytes`.

    Raises:
      InputError: missing, not a regular file, too large, or not strict JSON; all problems at once.
      MachineError: the file cannot be read.
    """
    return parse_json_object(read_bounded(path, limit_bytes), str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, object]:
    """Parse an object of strict JSON in UTF-8. Raises InputError as `read_json_object`."""
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
        expected, found = f"at most about {max_values:,}", f"{values:,}"
        raise InputError("too many JSON values", where=where, expected=expected, found=found)
    text = _decode(data, where)
    hooks = _Hooks()
    try:
        value = hooks.parse(text)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}:{error.colno}"
        raise InputError(f"not JSON: {error.msg}", where=place) from None
    except RecursionError:
        raise _too_deep(where) from None
    if hooks.faults:
        _report(text, where, hooks.faults)
    if _deeper_than(value, MAX_DEPTH):
        raise _too_deep(where)
    return value


class _Hooks:
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
            return self._loads(text, parse_int=self.integer)

    def _loads(self, text: str, parse_int: Callable[[str], int] | None = None) -> object:
        return json.loads(
            text,
            object_pairs_hook=self.pairs,
            parse_float=self.number,
            parse_constant=self.constant,
            parse_int=parse_int,
        )

    def integer(self, digits: str) -> int:
        if fault := _integer_fault(digits):
            self.faults.append(fault)
            return 0
        return int(digits)

    def pairs(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(pairs)
        if len(made) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.faults += [_twice(key) for key, count in counts.items() if count > 1]
        return made

    def number(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self.faults.append(_not_finite(digits))
        return value

    def constant(self, name: str) -> float:
        self.faults.append(_no_number(name))
        return float(name)


def _twice(key: str) -> str:
    return f"the key {quoted(key)} appears twice in one object"


def _not_finite(digits: str) -> str:
    return f"the number {describe(digits)} is not finite"


def _integer_fault(text: str) -> str | None:
    digits = len(text.lstrip("-"))
    # Zero stands for no limit in Python; here there always is one.
    limit = sys.get_int_max_str_digits() or sys.int_info.default_max_str_digits
    return f"a number of {digits:,} digits" if digits > limit else None


def _no_number(name: str) -> str:
    return f"{name} is not a JSON number"


def _decode(data: bytes | bytearray, where: str) -> str:
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


def _report(text: str, where: str, faults: list[str]) -> None:
    """Raise with every duplicate key and unusable number, located unless the text is long."""
    problems = Problems()
    if len(text) > _LOCATED_CHARACTERS:
        problems.extend(Problem(fault, where) for fault in faults)
        problems.raise_if_any()
    line, counted = 1, 0
    for position, what in _oddities(text):
        line += text.count("\n", counted, position)
        counted = position
        column = position - text.rfind("\n", 0, position)
        problems.add(what, where=f"{where}:{line}:{column}")
    problems.raise_if_any()


def _oddities(text: str) -> Iterator[tuple[int, str]]:
    """Yield the position of each duplicate key and unusable number of a well-formed text."""
    open_keys: list[set[str] | None] = []  # None stands for an open list
    previous = ""
    for match in _TOKEN.finditer(text):
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
                    yield match.start(), _twice(key)
                keys.add(key)
        elif token not in ",:" and (fault := _number_fault(token)):
            yield match.start(), fault
        previous = token


def _number_fault(token: str) -> str | None:
    if token in ("NaN", "Infinity", "-Infinity"):
        return _no_number(token)
    if token in ("true", "false", "null"):
        return None
    if token.lstrip("-").isdigit():
        return _integer_fault(token)
    return _not_finite(token) if math.isinf(float(token)) else None


def _deeper_than(value: object, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
    return bool(level)


def _too_deep(where: str) -> InputError:
    return InputError(f"the JSON is nested more than {MAX_DEPTH} levels deep", where=where)
