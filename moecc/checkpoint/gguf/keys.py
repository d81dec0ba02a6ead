"""Typed metadata values of a GGUF file; every problem is collected, not only the first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, overload

from moecc.checkpoint.gguf.metadata import GgufArray, Value
from moecc.checkpoint.problems import Problems, describe
from moecc.errors import InputError

MAX_LAYERS = 1 << 16
"""The longest array that is read for a key with one value per layer."""

Default = TypeVar("Default")


class Keys:
    """Reads the keys of one architecture, ``llama.block_count`` as ``block_count``."""

    def __init__(
        self, metadata: Mapping[str, Value], architecture: str, path: Path, problems: Problems
    ) -> None:
        self.where = str(path)
        self.problems = problems
        self.used: set[str] = set()
        self._metadata = metadata
        self._prefix = f"{architecture}."

    def refuse(
        self, key: str, what: str, *, expected: str | None = None, hint: str | None = None
    ) -> None:
        """Record that the value of a key is rejected."""
        where = f"{self.where}, metadata key {self._prefix + key!r}"
        value = self._metadata.get(self._prefix + key)
        self.problems.add(what, where=where, expected=expected, found=shown(value), hint=hint)

    def unused(self) -> list[str]:
        """Return the keys of the architecture that were never read."""
        own = (key for key in self._metadata if key.startswith(self._prefix))
        return [name for key in own if (name := key[len(self._prefix) :]) not in self.used]

    def value(self, key: str) -> Value | None:
        """Return a value, or None if it is missing; an array with equal layers is unwrapped."""
        self.used.add(key)
        value = self._metadata.get(self._prefix + key)
        return self._unwrapped(key, value) if isinstance(value, GgufArray) else value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; without a default it is required."""
        value = default if (found := self.value(key)) is None else found
        if type(value) is int and value >= 1:
            return value
        missing = found is None
        what = "the file does not state this size" if missing else "not a usable size"
        self.refuse(key, what, expected="a whole number above 0")
        return default or 1

    @overload
    def number(self, key: str, default: float) -> float: ...

    @overload
    def number(self, key: str, default: None) -> float | None: ...

    def number(self, key: str, default: float | None) -> float | None:
        """Return a finite number of at least 0."""
        value = self.value(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and number >= 0:
                return number
        self.refuse(key, "not a usable number", expected="a finite number, 0 or above")
        return default

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.value(key)
        if value is None or isinstance(value, str):
            return default if value is None else value
        self.refuse(key, "not a string", expected="a string")
        return default

    def _unwrapped(self, key: str, array: GgufArray) -> Value | None:
        if array.letter and 1 <= array.count <= MAX_LAYERS:
            values = set(array.numbers().tolist())
            if len(values) == 1:
                found: Value = values.pop()
                return found
        self.refuse(key, "the layers differ", expected="the same value in each layer")
        return None


def shown(value: Value | None) -> str:
    """Describe a value of the metadata for a message."""
    if isinstance(value, GgufArray):
        return f"an array of {value.count:,} elements ({value.kind})"
    return "nothing" if value is None else describe(value)


def token_id(metadata: Mapping[str, Value], name: str, count: int) -> int | None:
    """Return the id of a special token below `count`, or None if the file has none.

    Raises:
      InputError: the value is not such an id.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    # The converter writes -1, as 2^32 - 1, if a tokenizer has no such token.
    if value is None or (type(value) is int and value in (-1, (1 << 32) - 1)):
        return None
    if type(value) is int and 0 <= value < count:
        return value
    expected = f"a token id below {count:,}"
    raise InputError("not a token id", where=key, expected=expected, found=shown(value))
