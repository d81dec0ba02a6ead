"""Which slots, meshes and ways of ``expert-parallel`` go together: tried, not listed by hand.

``make docs`` writes the table into docs/sharding.md; the tests run every case of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.ir.moe import SlotOptions, emit_expert_choice, emit_routing
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.types import F32, tensor

Bound = Literal["capacity", "ragged", "expert-choice"]
SLOTS: tuple[Bound, ...] = get_args(Bound)
"""What bounds the rows of an expert: a factor of 1, nothing, or the experts' own choice."""

MESHES = (
    ("data:8", "st-moe"),
    ("data:2,model:4", "st-moe"),
    ("data:4,model:2", "st-moe"),
    ("data:2,expert:4", "expert-parallel"),
    ("data:4,expert:2", "expert-parallel"),
    ("outer:2,inner:4", "st-moe-outer"),
    ("outer:4,inner:2", "st-moe-outer"),
    ("far:2,near:4", "expert-hierarchical"),
    ("far:4,near:2", "expert-hierarchical"),
    ("data:2,expert:4", "expert-replicated"),
    ("data:4,expert:2", "expert-replicated"),
    ("fsdp:2,data:2,model:2", "fsdp,st-moe"),
    ("data:2,expert:2,model:2", "expert-parallel,tensor-parallel"),
    ("outer:2,inner:2,model:2", "st-moe-outer"),
    ("far:2,near:2,model:2", "expert-hierarchical,tensor-parallel"),
    ("data:2,expert:2,model:2", "expert-replicated,tensor-parallel"),
)
"""Meshes of eight devices, (8), (2, 4), (4, 2) and (2, 2, 2), with the layouts that suit them."""

SPREAD = (*MESHES[::3], *(mesh for number, mesh in enumerate(MESHES) if number % 3))
"""The same meshes; the first six have every kind of layout."""

WAYS = (
    "via=capacity",
    "via=capacity slice=model",
    "via=capacity chunks=2",
    "via=ragged",
    "via=ragged slice=model",
    "via=hierarchical",
    "via=ring",
    "via=replicated",
)
"""Options of ``expert-parallel``."""


@dataclass(frozen=True)
class Case:
    """One combination."""

    slots: Bound
    mesh: str
    rules: str
    way: str

    @property
    def pipeline(self) -> str:
        """The passes that shard a graph so."""
        return (
            f"annotate-sharding{{mesh={self.mesh} rules={self.rules}}},"
            f"expert-parallel{{{self.way}}},lower-collectives"
        )


def cases() -> Iterator[Case]:
    """Yield every combination, legal or not."""
    for mesh, rules in MESHES:
        for slots in SLOTS:
            for way in WAYS:
                yield Case(slots, mesh, rules, way)


def layer(slots: Bound, *, embed: int = 8, mlp: int = 16, experts: int = 8) -> Graph:
    """Return one gated mixture of experts with a residual, its tokens in sixteen groups."""
    graph = Graph("layer")
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F32, batch="B", seq="S", embed=embed))
    router = graph.param("router", tensor(F32, expert=experts, embed=embed))
    gate = graph.param("gate", tensor(F32, expert=experts, mlp=mlp, embed=embed))
    up = graph.param("up", tensor(F32, expert=experts, mlp=mlp, embed=embed))
    bias = graph.param("bias", tensor(F32, expert=experts, mlp=mlp))
    down = graph.param("down", tensor(F32, expert=experts, embed=embed, mlp=mlp))
    if slots == "expert-choice":
        tokens = ("batch", "seq")
        chosen, gates, assigned = emit_expert_choice(
            b, x, router, tokens=tokens, capacity_factor=2.0, groups=16, minimum=1
        )
        rows = b.dispatch(x, chosen, assigned)
    else:
        bound: SlotOptions = {"slots": slots, "groups": 16}
        if slots == "capacity":
            bound |= {"capacity_factor": 1.0, "minimum": 1}
        rows, finish = emit_routing(b, x, router, experts=experts, top_k=2, **bound)
    act = b.silu(b.add(b.contract(rows, gate, over="embed"), bias))
    hidden = b.mul(act, b.contract(rows, up, over="embed"))
    outputs = b.contract(hidden, down, over="mlp")
    y = b.combine(outputs, chosen, assigned, gates) if slots == "expert-choice" else finish(outputs)
    graph.set_output("y", b.add(x, y))
    return graph


@cache
def outcome(case: Case) -> tuple[Graph | None, str]:
    """Return the sharded graph of a case and its collectives, or None and why there is none.

    The graph is everybody's: clone it before you change it.
    """
    graph = layer(case.slots)
    try:
        run_pipeline(graph, Pipeline.parse(case.pipeline))
    except InputError as error:
        return None, error.problems[0].message
    counts = Counter(n.op.name for n in graph if n.op.places and n.op.name != "shard")
    return graph, ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))


def legal_cases(mesh: str, rules: str) -> list[tuple[Case, Graph]]:
    """Return the legal cases of a mesh with their sharded graphs, which callers clone to change."""
    of_mesh = [case for case in cases() if (case.mesh, case.rules) == (mesh, rules)]
    return [(case, graph) for case in of_mesh if (graph := outcome(case)[0]) is not None]


def render() -> str:
    """Return what is legal as Markdown: layouts and meshes by row, a column for each way.

    A cell has the slots that go together with both, by their initials.  The reasons that are told
    for the others stand below.
    """
    refused: dict[str, set[str]] = {}
    cells: dict[tuple[str, str, str], list[str]] = {}
    sent: dict[str, str] = {}
    for case in cases():
        graph, text = outcome(case)
        key = (case.mesh, case.rules, case.way)
        if graph is None:
            refused.setdefault(text, set()).add(f"`{case.way}`")
            continue
        cells.setdefault(key, []).append(case.slots[0].upper())
        sent.setdefault(case.way, f"{text} (`{case.mesh}`)")
    head = ["rules and mesh", *(f"`{way}`" for way in WAYS)]
    lines = [_row(head), _row(["---"] * len(head))]
    groups: dict[tuple[str, ...], list[str]] = {}
    for mesh, rules in MESHES:
        texts = tuple(" ".join(cells.get((mesh, rules, way), ["–"])) for way in WAYS)
        groups.setdefault(texts, []).append(f"`{rules}` on `{mesh}`")
    lines += [_row(["; ".join(layouts), *texts]) for texts, layouts in groups.items()]
    lines.append(_row(["collectives of one layer", *(sent[way] for way in WAYS)]))
    lines += ["", "C: slots under a capacity; R: ragged; E: experts that choose."]
    lines += ["", "What is rejected, with the reason that is reported:", ""]
    lines += [
        f"* {reason}: {', '.join(sorted(which))}." for reason, which in sorted(refused.items())
    ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
