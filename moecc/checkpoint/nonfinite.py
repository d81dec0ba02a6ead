"""Detect NaN and infinity in the tensors of a source while they are read."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Set
from dataclasses import dataclass

import numpy as np

from moecc.checkpoint.problems import quoted
from moecc.errors import Problem
from moecc.types.arrays import Array
from moecc.weights.evaluate import Reader
from moecc.weights.rounding import first_nonfinite


@dataclass(frozen=True)
class Nonfinite:
    """A source tensor that holds NaN or infinity.

    Attributes:
      tensor: its name.
      index: the index of the first such element.
      value: ``nan``, ``inf`` or ``-inf``.
    """

    tensor: str
    index: tuple[int, ...]
    value: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.value} at {list(self.index)}"

    def problem(self) -> Problem:
        """Return the problem to report."""
        return Problem(
            "a weight is not finite",
            f"tensor {quoted(self.tensor)}",
            found=f"{self.value} at {list(self.index)}",
            hint="--allow-nonfinite converts it all the same, and records it",
        )


class ScanningReader:
    """A reader that wraps another one and records values that are not finite; thread-safe.

    Args:
      reader: the wrapped reader.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._scanned: set[tuple[str, int, int | None]] = set()
        self._found: dict[str, Nonfinite] = {}
        self._zero: dict[str, bool] = {}

    @property
    def found(self) -> tuple[Nonfinite, ...]:
        """The tensors found so far, sorted by name."""
        with self._lock:
            return tuple(self._found[name] for name in sorted(self._found))

    @property
    def zeros(self) -> tuple[str, ...]:
        """The matrices of which nothing but zeros was read, sorted by name."""
        with self._lock:
            return tuple(sorted(name for name, is_zero in self._zero.items() if is_zero))

    def recall(self, read: Iterable[str], found: Iterable[Nonfinite], zeros: Set[str]) -> None:
        """Add what an earlier run found in the tensors that it read."""
        for one in found:
            self._add(one)
        for name in read:
            self._note_zero(name, name in zeros)

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of a tensor."""
        values = self._reader(name, start, stop)
        with self._lock:
            known = (name, start, stop) in self._scanned
            self._scanned.add((name, start, stop))
        if not known:
            self._scan(name, start, values)
            if values.ndim > 1:
                self._note_zero(name, _is_zero(values))
        return values

    def _scan(self, name: str, start: int, values: Array) -> None:
        at = first_nonfinite(values)
        if at is None:
            return
        place = np.unravel_index(at, values.shape)
        index = tuple(int(i) for i in place)
        if index:
            index = (index[0] + start, *index[1:])
        self._add(Nonfinite(name, index, str(float(values[place]))))

    def _note_zero(self, name: str, is_zero: bool) -> None:
        with self._lock:
            self._zero[name] = is_zero and self._zero.get(name, True)

    def _add(self, found: Nonfinite) -> None:
        """Keep the first element of each tensor; indices are in the order of the elements."""
        with self._lock:
            first = self._found.get(found.tensor)
            if first is None or found.index < first.index:
                self._found[found.tensor] = found


def _is_zero(values: Array) -> bool:
    """Whether all bytes are 0; of most tensors the first few already say no."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return not raw[:64].any() and not raw.any()
