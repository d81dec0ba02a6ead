"""A batch of texts that is continued: prompts in one go, then a token of each at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moecc.analysis.head import LOGITS
from moecc.backend import Backend
from moecc.decoding.graphs import CAPACITY, DecodeGraphs
from moecc.decoding.session import open_session
from moecc.ir.graph import Graph, Value
from moecc.types.arrays import Array, Arrays
from moecc.types.dtypes import DType

BUCKET = 32
"""Prompts are padded to a multiple of this, to compile few shapes."""

LEAST_CAPACITY = 64
"""The places of the smallest cache; the others have twice as many as the next smaller one."""

NOWHERE = 1 << 30
"""The position of a place without a token: no token is so far on, so none sees it."""


class Batch:
    """Texts that grow by a token at a time.

    All texts of a batch write to the same place of their caches.  Prompts are padded on the right
    up to the longest; a padded place has the position `NOWHERE`, and what comes next is written
    behind it, with the position that it has in its text.
    """

    def __init__(
        self, graphs: DecodeGraphs, params: Arrays, *, backend: Backend, dtype: DType
    ) -> None:
        self.graphs = graphs
        self._session = open_session(backend, params, dtype)
        self._lengths = np.zeros(0, np.int32)
        self._positions = np.zeros((0, 0), np.int32)
        self._end = 0

    def begin(self, prompts: Sequence[Sequence[int]], memory: Arrays | None = None) -> Array:
        """Read `prompts`, none of which is empty; return the logits after each, ``[text, vocab]``.

        Args:
          prompts: the tokens of each text.
          memory: for an encoder-decoder, the inputs of the encoder.

        Raises:
          InputError: an input of the encoder does not fit.
        """
        longest = max(map(len, prompts))
        width = -(-(longest - 1) // BUCKET) * BUCKET
        self._lengths = np.zeros(len(prompts), np.int32)
        self._positions = np.full((len(prompts), _capacity(width + 1)), NOWHERE, np.int32)
        self._end = 0
        self._session.keep({n: self._empty(v) for n, v in self.graphs.caches.items()})
        if self.graphs.encode is not None:
            self._session.keep(self._session.run(self.graphs.encode, memory or {}))
        if width:
            self._fill(prompts, width)
        return self.step([prompt[-1] for prompt in prompts])

    def step(self, tokens: Sequence[int]) -> Array:
        """Append a token to each text; return the logits after it, ``[text, vocab]``."""
        if self._end == self._positions.shape[1]:
            self._grow()
        given = np.asarray(tokens, np.int32)[:, None]
        positions = self._lengths[:, None]
        made = self._run(self.graphs.step, given, positions, positions)
        self._lengths = self._lengths + 1
        return made[LOGITS][:, 0]

    def _fill(self, prompts: Sequence[Sequence[int]], width: int) -> None:
        """Write all tokens but the last of each prompt into the caches."""
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt) - 1] = prompt[:-1]
        self._lengths = np.array([len(p) - 1 for p in prompts], np.int32)
        places = np.arange(width, dtype=np.int32)[None, :]
        is_token = places < self._lengths[:, None]
        self._run(
            self.graphs.fill, tokens,
            np.where(is_token, places, 0), np.where(is_token, places, NOWHERE),
        )  # fmt: skip

    def _run(self, graph: Graph, tokens: Array, positions: Array, kept: Array) -> dict[str, Array]:
        start, self._end = self._end, self._end + tokens.shape[1]
        self._positions[:, start : self._end] = kept
        inputs: dict[str, Array] = {
            self.graphs.tokens: tokens,
            "positions": positions.astype(np.int32),
            "key_positions": self._positions,
            "start": np.array(start, np.int32),
        }
        given = {n: a for n, a in inputs.items() if n in graph.inputs}
        return self._session.run(graph, given)

    def _grow(self) -> None:
        """Double the places of the caches."""
        more = self._positions.shape[1]
        at = {n: v.type.sizes.index(CAPACITY) for n, v in self.graphs.caches.items()}
        kept = self._session.kept()
        self._session.keep({n: _padded(kept[n], axis, more) for n, axis in at.items()})
        rest = np.full_like(self._positions, NOWHERE)
        self._positions = np.concatenate([self._positions, rest], axis=1)

    def _empty(self, cache: Value) -> Array:
        texts, places = self._positions.shape
        sizes = {cache.type.sizes[0]: texts, CAPACITY: places}
        shape = [s if isinstance(s, int) else sizes[s] for s in cache.type.sizes]
        return np.zeros(shape, cache.type.dtype.numpy)


def _capacity(least: int) -> int:
    places = LEAST_CAPACITY
    while places < least:
        places *= 2
    return places


def _padded(array: Array, axis: int, more: int) -> Array:
    return np.pad(array, [(0, more if n == axis else 0) for n in range(array.ndim)])
