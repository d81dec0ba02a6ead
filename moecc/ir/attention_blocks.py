"""Blocks of queries and the keys that each of them meets, where attention runs block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 128
"""Queries of a block.  Measured on a CPU (``benchmarks/attention.py``)."""

TPU_BLOCKS = (512, 256, 128)
"""Rows of a block of splash attention: the largest that divides a sequence."""

MOST_SPANS = 8
"""Spans of queries with keys of their own, each written out; more take long to compile."""


class Span(NamedTuple):
    """A run of equal blocks of queries, and the keys that some query of it sees."""

    start: int
    blocks: int
    size: int
    first_key: int
    last_key: int


def spans(queries: int, keys: int, *, causal: bool, window: int = 0) -> Iterator[Span]:
    """Yield runs of blocks, in order; what is left is a smaller block in a span of its own.

    Args:
      queries: how many there are in a sequence.
      keys: how many keys there are.
      causal: whether a query sees only keys up to its own index.
      window: how many of them; 0 for all.
    """
    whole, rest = divmod(queries, BLOCK)
    count = min(whole, MOST_SPANS) if causal or whole <= MOST_SPANS else 1
    seen = keys if not causal else 0
    for number in range(count):
        first, last = whole * number // count, whole * (number + 1) // count
        yield _span(first * BLOCK, last - first, BLOCK, keys, seen, window)
    if rest:
        yield _span(whole * BLOCK, 1, rest, keys, seen, window)


def _span(start: int, blocks: int, size: int, keys: int, seen: int, window: int) -> Span:
    last = seen or min(start + blocks * size, keys)
    first = max(start - window + 1, 0) if window else 0
    # A query that sees nothing has one key all the same, which the rule hides.
    return Span(start, blocks, size, min(first, last - 1), last)


def share_of_scores(queries: int, keys: int, *, causal: bool, window: int = 0) -> float:
    """Return which share of all pairs of queries and keys the blocks compute."""
    runs = spans(queries, keys, causal=causal, window=window)
    met = sum(run.blocks * run.size * (run.last_key - run.first_key) for run in runs)
    return met / max(queries * keys, 1)


def are_written_out(queries: int, *, causal: bool) -> bool:
    """Whether no block is in a loop, so that what two of them compute alike is computed once."""
    return all(run.blocks == 1 for run in spans(queries, queries, causal=causal))


def tpu_block(size: int) -> int:
    """Return the rows of a block of splash attention; `size` is a multiple of the smallest."""
    return next(block for block in TPU_BLOCKS if size % block == 0)


def share_of_tpu_blocks(queries: int, keys: int, *, causal: bool, window: int = 0) -> float:
    """Return which share of all pairs of queries and keys splash attention computes.

    It computes each block of which some query sees some key, and skips the others.
    """
    if not causal:
        return 1.0
    high, wide = tpu_block(queries), tpu_block(keys)
    met = sum(
        (min(start + high, keys) - 1) // wide
        - (max(start - window + 1, 0) // wide if window else 0)
        + 1
        for start in range(0, queries, high)
    )
    return met * high * wide / (queries * keys)
