"""Segments of rows become arrays, by the names of the inputs of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecc.train.data.objectives import IGNORED, Segment
from moecc.types.arrays import Array

PARTS = ("tokens", "segments", "positions", "mask")
"""The inputs of a sequence; those of a decoder begin with ``decoder_``."""


@dataclass(frozen=True)
class Shape:
    """What the arrays of a batch are like.

    Attributes:
      batch: rows.
      seq: tokens of the only sequence, or of the encoder's.
      decoder_seq: tokens of the decoder's; 0 without one.
      inputs: the names of the graph's inputs.
      pad: the id of padding.
    """

    batch: int
    seq: int
    decoder_seq: int
    inputs: tuple[str, ...]
    pad: int

    def arrays(self) -> dict[str, tuple[tuple[int, int], str]]:
        """Return shape and element type of each array, by name."""
        found: dict[str, tuple[tuple[int, int], str]] = {}
        for prefix, length in (("", self.seq), ("decoder_", self.decoder_seq)):
            for part in PARTS:
                if f"{prefix}{part}" in self.inputs:
                    kind = "bool" if part == "mask" else "int32"
                    found[f"{prefix}{part}"] = ((self.batch, length), kind)
        return {**found, "targets": ((self.batch, self.decoder_seq or self.seq), "int32")}


def collate(rows: Sequence[Sequence[Segment]], shape: Shape) -> dict[str, Array]:
    """Return the arrays of rows, ``[rows, seq]``; a row without segments is padding.

    ``segments`` numbers the documents of a row from 1, 0 is padding; ``positions`` counts in each
    from 0; ``mask`` is true for tokens.
    """
    decoder = shape.decoder_seq
    first = _Sequences(len(rows), shape.seq, shape.pad)
    second = _Sequences(len(rows), decoder, shape.pad)
    targets = np.full((len(rows), decoder or shape.seq), IGNORED, np.int32)
    for row, segments in enumerate(rows):
        for number, segment in enumerate(segments, 1):
            at = first.put(row, number, segment.tokens)
            if segment.decoder_tokens is not None:
                at = second.put(row, number, segment.decoder_tokens)
            targets[row, at : at + len(segment.targets)] = segment.targets
    arrays = {**first.arrays(""), **second.arrays("decoder_")}
    return {**{name: arrays[name] for name in shape.inputs if name in arrays}, "targets": targets}


class _Sequences:
    """The arrays of one sequence of each row."""

    def __init__(self, rows: int, length: int, pad: int) -> None:
        self._tokens = np.full((rows, length), pad, np.int32)
        self._segments = np.zeros((rows, length), np.int32)
        self._positions = np.zeros((rows, length), np.int32)
        self._filled = [0] * rows

    def put(self, row: int, number: int, tokens: Array) -> int:
        """Put the tokens of a document behind what is there, and return where they begin."""
        at = self._filled[row]
        end = at + len(tokens)
        self._tokens[row, at:end] = tokens
        self._segments[row, at:end] = number
        self._positions[row, at:end] = np.arange(len(tokens))
        self._filled[row] = end
        return at

    def arrays(self, prefix: str) -> dict[str, Array]:
        """Return the arrays by name."""
        return {
            f"{prefix}tokens": self._tokens,
            f"{prefix}segments": self._segments,
            f"{prefix}positions": self._positions,
            f"{prefix}mask": self._segments > 0,
        }
