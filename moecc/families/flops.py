"""FLOPs of one sequence, counted from the graph, and by the convention of papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moecc.families.experts import choices_per_token, rows_of, rows_per_token
from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.indices import length_bounds
from moecc.ir.table.slots import assigner

PAPER_LENGTHS = {"S": 512, "T": 114}
"""Tokens of the encoder and of the decoder in the pre-training of ST-MoE (§6)."""

CONVENTION = "paper"


@dataclass(frozen=True, slots=True)
class SequenceFlops:
    """FLOPs of the forward pass of one sequence, a multiplication and an addition each.

    Attributes:
      paper: 2 · parameters · tokens, as in papers: every matrix used for a token counts
        once, experts once per choice of a token, keys and values of cross-attention as if they
        were computed from the decoder's tokens, and attention scores not at all.
      weights: of all products with parameters, as the graph computes them.
      attention: of all other products.
      lengths: the tokens of a sequence, by variable.
    """

    paper: int
    weights: int
    attention: int
    lengths: dict[str, int]


def sequence_flops(graph: Graph, lengths: Mapping[str, int] | None = None) -> SequenceFlops:
    """Count the FLOPs of one sequence whose lengths are `lengths`, by variable.

    A variable that is not named counts as 512, or as many as there are learned positions; the
    batch has one sequence.
    """
    used = _lengths(graph, PAPER_LENGTHS if lengths is None else lengths)
    paper = weights = attention = 0.0
    for node in graph:
        if not node.op.products:
            continue
        work = _work(node, used)
        if not any(v.is_param for v in node.operands):
            attention += work
            continue
        weights += work
        paper += work * _as_in_papers(node, used)
    return SequenceFlops(round(paper), round(weights), round(attention), used)


def _lengths(graph: Graph, given: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    most = length_bounds(graph)
    for value in graph.inputs.values():
        for axis in value.type:
            if isinstance(axis.size, str) and axis.name != "batch":
                asked = given.get(axis.size, 512)
                found[axis.size] = min(asked, most.get(axis.size, asked))
    return found


def _work(node: Node, lengths: Mapping[str, int]) -> float:
    """Return two for each multiplication of a contraction, of one sequence."""
    rows = rows_of(node.operands)
    # Along an axis that windows run along, the places of the result count.
    values = (*node.operands, node.result)
    sizes = {axis.name: axis.size for v in values for axis in v.type}
    if rows is None:
        each = prod(_size(name, size, lengths) for name, size in sizes.items())
        return 2.0 * node.op.products * each
    inner = (s for n, s in sizes.items() if n not in ("group", "expert", "slot"))
    each = prod(s for s in inner if isinstance(s, int))
    return 2.0 * each * dispatched_tokens(rows, lengths) * rows_per_token(rows)


def _size(name: str, size: object, lengths: Mapping[str, int]) -> int:
    if name == "batch":
        return 1
    return size if isinstance(size, int) else lengths.get(str(size), 1)


def dispatched_tokens(rows: Value, lengths: Mapping[str, int]) -> int:
    """Return the tokens of a sequence that were dispatched to `rows`."""
    slots = setter_of(rows.type.extents[0])
    tokens = SlotAttrs.of_node(assigner(slots)).tokens
    return prod(_size(n, slots.type[n].size, lengths) for n in tokens)


def _as_in_papers(node: Node, lengths: Mapping[str, int]) -> float:
    """Return by what a paper's count of a product differs from the graph's."""
    rows = rows_of(node.operands)
    if rows is not None:
        return choices_per_token(rows) / rows_per_token(rows)
    made = [*node.results, *(node.operands if node.op.attends else ())]
    keys = next((v.type["kv_seq"] for v in made if "kv_seq" in v.type), None)
    if "cross_attention" not in node.loc or keys is None:
        return 1.0
    memory = _size("kv_seq", keys.size, lengths)
    # Of the two products of an attention it is that of the scores.
    return (lengths.get("T", memory) / memory + node.op.products - 1) / node.op.products
