"""Describe a model: parameters by group, in total and active, and FLOPs per token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod

from moecc.analysis import scales_norms
from moecc.families.experts import (
    ExpertLayer,
    choices_kept,
    choices_per_token,
    expert_layers,
    rows_of,
    rows_per_token,
)
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.ops.slots import SlotsOp, assigner
from moecc.ir.structure import length_bounds, uses_of, worked_on
from moecc.ir.traits import Cost
from moecc.ir.unroll import unrolled
from moecc.support.text import brief, count_text, facts_table

# FLOPs of one sequence, counted from the graph, and by the convention of papers.

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

    @property
    def executed(self) -> int:
        """The FLOPs of all products: what plans, training and experiments count."""
        return self.weights + self.attention

    @property
    def per_token(self) -> int:
        """The executed FLOPs over the tokens of the sequence, or of one input of fixed size."""
        return round(self.executed / max(sum(self.lengths.values()), 1))

    def __str__(self) -> str:
        lengths = " and ".join(map(str, self.lengths.values()))
        unit = f"token of a sequence of {lengths}" if lengths else "input"
        return f"{count_text(self.per_token)} per {unit}"


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


def _lengths(graph: Graph, asked_lengths: Mapping[str, int]) -> dict[str, int]:
    lengths: dict[str, int] = {}
    most = length_bounds(graph)
    for value in graph.inputs.values():
        for axis in value.type:
            if isinstance(axis.size, str) and axis.name != "batch":
                asked = asked_lengths.get(axis.size, 512)
                lengths[axis.size] = min(asked, most.get(axis.size, asked))
    return lengths


def _work(node: Node, lengths: Mapping[str, int]) -> float:
    """Return two for each multiplication of a contraction, of one sequence."""
    rows = rows_of(node.operands)
    sizes = {axis.name: axis.size for v in worked_on(node) for axis in v.type}
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
    tokens = SlotsOp.of_node(assigner(slots)).tokens
    return prod(_size(n, slots.type[n].size, lengths) for n in tokens)


def _as_in_papers(node: Node, lengths: Mapping[str, int]) -> float:
    """Return by what a paper's count of a product differs from the graph's."""
    rows = rows_of(node.operands)
    if rows is not None:
        return choices_per_token(rows) / rows_per_token(rows)
    values = [*node.results, *(node.operands if node.op.attends else ())]
    keys = next((v.type["kv_seq"] for v in values if "kv_seq" in v.type), None)
    if "cross_attention" not in node.loc or keys is None:
        return 1.0
    memory = _size("kv_seq", keys.size, lengths)
    # Of the two products of an attention it is that of the scores.
    return (lengths.get("T", memory) / memory + node.op.products - 1) / node.op.products


PAPER_GROUPS = ("All", "Non-MoE", "MoE", "Attention", "FFN")

_LAYER = re.compile(r"(.*?\.)?layers\.(\d{1,9})(?:\.|$)")

GROUPS = ("embedding", "attention", "ffn", "experts", "router", "norm", "head", "other")


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Counts of parameters.

    Attributes:
      total: all stored parameters.
      active: those used for one token: only the chosen experts.
      groups: the total by group, for the groups of `GROUPS` present.
    """

    total: int
    active: int
    groups: dict[str, int]


@dataclass(frozen=True, slots=True)
class Description:
    """A model in numbers.

    Attributes:
      family: the family that it was imported from, or empty.
      layers: the number of layers.
      stacks: the number of layers of encoder and decoder, if there are both.
      parameters: the parameter counts.
      sequence: the FLOPs of one sequence, at the lengths of ST-MoE's pre-training.
      expert_layers: the mixtures of experts.
    """

    family: str
    layers: int
    stacks: dict[str, int]
    parameters: ParameterCounts
    sequence: SequenceFlops
    expert_layers: tuple[ExpertLayer, ...]

    def __repr__(self) -> str:
        return brief("moecc.Description", self._rows())

    def _repr_html_(self) -> str:
        return facts_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        groups = ", ".join(
            f"{name} {count_text(n)}" for name, n in self.parameters.groups.items() if n
        )
        return [
            ("family", self.family), ("layers", str(self.layers)),
            ("parameters", f"{count_text(self.parameters.total)} ({groups})"),
            ("active", f"{count_text(self.parameters.active)} per token"),
            ("FLOPs", str(self.sequence)),
            ("expert layers", str(len(self.expert_layers) or "")),
        ]  # fmt: skip

    def to_json(self) -> dict[str, object]:
        """Return the description as JSON values."""
        return {**asdict(self), "expert_layers": [asdict(layer) for layer in self.expert_layers]}


def describe(graph: Graph) -> Description:
    """Count the parameters and FLOPs of `graph`; nothing is read or run."""
    graph = unrolled(graph)
    matches = (_LAYER.match(node.loc) for node in graph)
    layers = dict.fromkeys((m[1] or "", int(m[2])) for m in matches if m is not None)
    stacks = dict(Counter(stack.rstrip(".") for stack, _ in layers))
    return Description(
        family=graph.family,
        layers=sum(stacks.values()),
        stacks=stacks if len(stacks) > 1 else {},
        parameters=count_parameters(graph),
        sequence=sequence_flops(graph),
        expert_layers=tuple(expert_layers(graph)),
    )


def paper_groups(groups: Mapping[str, int]) -> dict[str, int]:
    """Return the parameter groups of ST-MoE's fine-tuning study (§4.2), which overlap.

    Args:
      groups: the groups of `count_parameters`, which do not overlap.
    """
    total = sum(groups.values())
    moe = groups.get("experts", 0) + groups.get("router", 0)
    return {
        "All": total,
        "Non-MoE": total - moe,
        "MoE": moe,
        "Attention": groups.get("attention", 0),
        "FFN": groups.get("ffn", 0),
    }


def count_parameters(graph: Graph) -> ParameterCounts:
    """Count the parameters of `graph`; a tied one counts once."""
    groups = dict.fromkeys(GROUPS, 0)
    total = active = 0
    for value in graph.params.values():
        size = prod(size for size in value.type.sizes if isinstance(size, int))
        total += size
        active += round(size * _active_share(value))
        groups[_group(value)] += size
    return ParameterCounts(total, active, {name: count for name, count in groups.items() if count})


def _active_share(value: Value) -> float:
    """Return the share of a parameter used for a token: k of E experts, or all of it."""
    shares = [min(1.0, choices_kept(rows) / experts) for rows, experts in _expert_uses(value)]
    return max(shares) if shares and len(shares) == len(value.users) else 1.0


def _expert_uses(value: Value) -> Iterator[tuple[Value, int]]:
    """Yield the rows multiplied with an experts' parameter, and the number of experts."""
    experts = value.type["expert"].size if "expert" in value.type else None
    for node in value.users:
        rows = rows_of(node.operands)
        if rows is not None and isinstance(experts, int):
            yield rows, experts


def _group(value: Value) -> str:
    """Return the group of a parameter, by its use."""
    uses = {_use(node, value) for node, _ in uses_of(value)}
    return next((group for group in GROUPS if group in uses), "other")


def _use(node: Node, value: Value) -> str:
    if node.op.cost is Cost.LOOK_UP:
        return "attention" if node.attrs["axis"] == "bucket" else "embedding"
    if node.op.is_norm or scales_norms(node):
        return "norm"
    if any("slot" in v.type for v in node.operands):
        return "experts"
    if any(user.op.routes for result in node.results for user in result.users):
        return "router"
    # A graph that was written by hand need not place its parameters.
    part = (value.loc or node.loc).rpartition(".")[2]
    if part == "embed":
        return "embedding"
    return next((group for group in ("attention", "ffn", "head") if group in part), "other")
