"""The losses of micro-batches add up to those of the batch, or they are not proved to."""

from __future__ import annotations

import moecc_check
import pytest
from tiers import few

from moecc.ir import Graph, parse, print_graph
from moecc.ir.structure import clone
from moecc.prove import prove
from moecc.prove.parts import part_count
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.translate.importing import import_checkpoint

from ..proof.cells import opened  # noqa: TID252


def with_losses(name: str, first: str, groups: int, options: str) -> Graph:
    graph = import_checkpoint(opened(name))
    passes = [first, f"specialize{{groups={groups}}}", f"add-losses{{{options}}}"]
    run_pipeline(graph, Pipeline.parse(",".join(filter(None, passes))))
    return graph


def test_a_graph_whose_losses_are_no_table_is_no_micro_batch() -> None:
    graph = with_losses("mixtral_gqa", "", 4, "")
    other = clone(graph)
    other.attrs["losses"] = "many"
    assert part_count(other, other) == 1


MODELS = (
    ("mixtral_gqa", ""),
    ("llama_gqa", "upcycle{experts=4 slots=capacity}"),
    ("switch_drops", ""),
)
LOSSES = ("balance=k-hot importance-coef=0.1", "layers=mean", "")


@pytest.mark.parametrize(
    ("name", "first", "options"),
    few([(*MODELS[n % 3], LOSSES[(n + n // 3) % 3]) for n in range(9)], 3),
)
def test_micro_batches_are_proved(name: str, first: str, options: str) -> None:
    batch = with_losses(name, first, 4, options)
    part = with_losses(name, first, 2, f"{options} parts=2")
    verdict = prove(batch, part)
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    assert moecc_check.accepted(verdict.log, print_graph(batch), print_graph(part))


@pytest.mark.parametrize(
    ("groups", "options"),
    [(4, "parts=2"), (1, "parts=2"), (2, "parts=4"), (2, "parts=2 over=sequence"),
     (2, "parts=2 z-coef=0.01"), (2, "parts=2 balance=k-hot")],
)  # fmt: skip
def test_wrong_parts_are_not_proved(groups: int, options: str) -> None:
    batch = with_losses("mixtral_gqa", "", 4, "")
    assert prove(batch, with_losses("mixtral_gqa", "", groups, options)).status != "proved"


def test_a_micro_batch_without_an_output_is_not_proved() -> None:
    batch, part = (with_losses("mixtral_gqa", "", 4 // n, f"parts={n}") for n in (1, 2))
    part.drop_output("logits")
    verdict = prove(batch, part)
    assert (verdict.status, verdict.node) == ("unknown", "outputs")


def test_a_mean_over_a_part_is_no_share() -> None:
    batch, part = (with_losses("mixtral_gqa", "", g, f"parts={p}") for g, p in ((4, 0), (2, 2)))
    share = next(n for n in part if n.op.name == "scale" and n.operands[0].node.op.name == "mean")  # type: ignore[union-attr]
    share.attrs["by"] = 1.0
    verdict = prove(batch, part)
    assert verdict.status == "unknown"
    assert "= mean" in verdict.node


POSITIONS = """moecc 1
graph g {{
  attr losses = {{"parts": {parts}}}
  input %x : i32[batch=B, seq=S]
  %p = positions %x {{axis={axis}}} : i32[{axis}={size}]
  %b = broadcast %p, %x : i32[batch=B, seq=S]
  %y = mul %x, %b : i32[batch=B, seq=S]
  output y = %y
}}
"""


@pytest.mark.parametrize(
    ("axis", "size", "status"), [("batch", "B", "unknown"), ("seq", "S", "proved")]
)
def test_places_in_the_batch_are_not_those_in_its_part(axis: str, size: str, status: str) -> None:
    batch, part = (parse(POSITIONS.format(parts=p, axis=axis, size=size)) for p in (1, 2))
    assert prove(batch, part).status == status
