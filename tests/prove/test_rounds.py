"""Rounds of an exchange: what experts compute of all rows is the sum of the rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import moecc_check
import pytest

from moecc.ir import Graph, clone, parse, print_graph
from moecc.prove import prove
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.vias import Rounds
from moecc.translate.importing import import_checkpoint

from ..proof.cells import opened  # noqa: TID252

EXPERT = (
    ("gate", "contract {rows}, %w_gate {{over=embed}}", "row={count}, mlp=6"),
    ("up", "contract {rows}, %w_up {{over=embed}}", "row={count}, mlp=6"),
    ("active", "silu %gate{turn}", "row={count}, mlp=6"),
    ("product", "mul %active{turn}, %up{turn}", "row={count}, mlp=6"),
    ("down", "contract %product{turn}, %w_down {{over=mlp}}", "row={count}, embed=4"),
    ("sum", "contract %down{turn}, {gates} {{over=row}}", "embed=4, token=3"),
)
"""Rows of tokens through an expert, weighted and added up for each token."""


def expert(spans: Sequence[tuple[int, int]], count: int) -> Graph:
    """Return the graph of an expert that gets its rows in spans, one after the other."""
    lines = [
        f"input %rows : f32[row={count}, embed=4]", f"input %gates : f32[row={count}, token=3]",
        "param %w_gate : f32[mlp=6, embed=4]", "param %w_up : f32[mlp=6, embed=4]",
        "param %w_down : f32[embed=4, mlp=6]",
    ]  # fmt: skip
    for turn, (start, stop) in enumerate(spans):
        for name, axis in (("rows", "embed=4"), ("gates", "token=3")):
            span = f"slice %{name} {{axis=row, start={start}, stop={stop}}}"
            lines.append(f"%{name}{turn} = {span} : f32[row={stop - start}, {axis}]")
        words = {"turn": turn, "rows": f"%rows{turn}", "gates": f"%gates{turn}"}
        for name, node, axes in EXPERT:
            type = f"f32[{axes.format(count=stop - start)}]"
            lines.append(f"%{name}{turn} = {node.format(**words)} : {type}")
    total = "%sum0"
    for turn in range(1, len(spans)):
        lines.append(f"%total{turn} = add {total}, %sum{turn} : f32[embed=4, token=3]")
        total = f"%total{turn}"
    body = "".join(f"  {line}\n" for line in (*lines, f"output y = {total}"))
    return parse(f"moecc 1\ngraph g {{\n{body}}}\n")


def spans(rounds: Rounds, count: int) -> Iterator[tuple[int, int]]:
    """Yield the rows of each round that `count` rows take."""
    for turn in range(rounds.turns(count)):
        first = rounds.first(turn)
        yield max(first, 0), min(first + rounds.rows, count)


def in_rounds(rounds: Rounds, count: int) -> Graph:
    return expert([*spans(rounds, count)], count)


@pytest.mark.parametrize("devices", [2, 4])
def test_rounds_are_proved_to_be_the_exchange_of_all_rows(devices: int) -> None:
    rounds = Rounds.of(tokens=6, choices=2, experts=8, devices=devices)
    assert rounds.most > 1
    assert rounds.most == rounds.turns(12), "the worst routing"
    for count in (1, rounds.rows, rounds.rows + 1, 12):
        verdict = prove(expert([(0, count)], count), in_rounds(rounds, count))
        assert verdict.status == "proved", verdict.terms


class Late(Rounds):
    def first(self, turn: int) -> int:
        return super().first(turn) + 1


class Overlapping(Rounds):
    def first(self, turn: int) -> int:
        return turn * (self.rows - 1)


class Repeated(Rounds):
    def first(self, turn: int) -> int:
        return super().first(max(turn - 1, 0))


@dataclass(frozen=True)
class Short(Rounds):
    def turns(self, rows: int) -> int:
        return rows // self.rows


@pytest.mark.parametrize("wrong", [Late, Overlapping, Repeated, Short])
def test_wrong_rounds_are_refuted(wrong: type[Rounds]) -> None:
    verdict = prove(expert([(0, 11)], 11), in_rounds(wrong(4, 3), 11))
    assert verdict.status == "refuted"


# Experts that work on one chunk of rows while the next is on its way.

LAYOUTS = (
    ("data:2,expert:2 rules=expert-parallel", "capacity"),
    ("far:2,near:2 rules=expert-hierarchical", "hierarchical"),
)


@pytest.mark.parametrize(("mesh", "via"), LAYOUTS)
def test_a_model_that_exchanges_rows_in_chunks_is_proved(mesh: str, via: str) -> None:
    whole = import_checkpoint(opened("llama_gqa"))
    run_pipeline(whole, Pipeline.parse("upcycle{experts=4 slots=capacity},specialize{groups=8}"))
    chunks = clone(whole)
    exchange = f"expert-parallel{{via={via} chunks=2}}"
    passes = f"annotate-sharding{{mesh={mesh}}},{exchange},lower-collectives"
    run_pipeline(chunks, Pipeline.parse(passes))
    verdict = prove(whole, chunks)
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    assert moecc_check.accepted(verdict.log, print_graph(whole), print_graph(chunks))
    joined = next(n for n in chunks if n.op.name == "join")
    first, second = joined.operands
    joined.set_operand(0, second)
    joined.set_operand(1, first)
    verdict = prove(whole, chunks)
    assert (verdict.status, verdict.node.split()[2]) == ("refuted", "join")
