"""The line of every key of a TOML text, which Python's own parser does not say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
