"""Detect NaN and infinity in the tensors of a source while they are read."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import prod

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
        self._found: dict[str, tuple[int, Nonfinite]] = {}

    @property
    def found(self) -> tuple[Nonfinite, ...]:
        """The tensors found so far, sorted by name."""
        with self._lock:
            return tuple(self._found[name][1] for name in sorted(self._found))

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of a tensor."""
        values = self._reader(name, start, stop)
        with self._lock:
            known = (name, start, stop) in self._scanned
            self._scanned.add((name, start, stop))
        if not known:
            self._scan(name, start, values)
        return values

    def _scan(self, name: str, start: int, values: Array) -> None:
        at = first_nonfinite(values)
        if at is None:
            return
        flat = start * prod(values.shape[1:]) + at
        place = np.unravel_index(at, values.shape)
        index = tuple(int(i) for i in place)
        if index:
            index = (index[0] + start, *index[1:])
        found = Nonfinite(name, index, str(float(values[place])))
        with self._lock:
            first, _ = self._found.get(name, (flat, None))
            if flat <= first:
                self._found[name] = (flat, found)
