"""Micro-batches: parts of a batch that hold whole token groups."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from moecc.errors import InputError, Problem
from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Graph, Node


def rows_together(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Return how many sequences a micro-batch cannot part: those of a token group, one at least.

    Args:
      graph: of a micro-batch.
      sizes: what its variables stand for.

    Raises:
      InputError: a token group ends within a sequence of another.
    """
    nodes = [n for n in graph.every_node() if n.op.assigns_slots]
    found = [_rows(node, sizes) for node in nodes]
    problems = [problem for _, problem in found if problem is not None]
    if problems:
        raise InputError(problems)
    rows = sorted({number for number, _ in found} | {1})
    odd = [n for n in rows if rows[-1] % n]
    if odd:
        raise InputError(
            "the token groups of layers do not fit into one another",
            expected=f"divisors of {rows[-1]} sequences",
            found=", ".join(map(str, odd)),
        )
    return rows[-1]


def _rows(node: Node, sizes: Mapping[str, int]) -> tuple[int, Problem | None]:
    attrs, type = SlotAttrs.of_node(node), node.results[-1].type
    batch, *lengths = (_size(type[n].size, sizes) for n in attrs.tokens)
    sequence = prod(lengths)
    tokens = attrs.group_size or batch * sequence // max(attrs.groups, 1)
    rows = max(ceil(tokens / max(sequence, 1)), 1)
    if tokens % max(sequence, 1) == 0 or (rows == 1 and sequence % max(tokens, 1) == 0):
        return rows, None
    return rows, Problem(
        "token groups do not end with a sequence",
        node.loc,
        f"a divisor or a multiple of {sequence} tokens",
        f"{tokens} tokens",
    )


def _size(size: object, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[str(size)]
