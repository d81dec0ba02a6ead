"""A step with caches computes rows of the graph of whole texts, or it is not proved."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import moecc_check
import pytest

from moecc.ir import OPS, Builder, Graph, Node, clone
from moecc.ir.arrays import Array
from moecc.ir.operand import Operand
from moecc.ir.operation import Op, operation
from moecc.ir.ops.rules import by_name
from moecc.ir.text import print_graph
from moecc.prove import prove
from moecc.prove.log import digest
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.translate.importing import import_checkpoint
from moecc.types import TensorType

from ..proof.cells import opened  # noqa: TID252


def steps_of(name: str, pipeline: str = "") -> tuple[Graph, Graph]:
    """Return the graph of whole texts, and that of a step."""
    whole = import_checkpoint(opened(name))
    if pipeline:
        run_pipeline(whole, Pipeline.parse(pipeline))
    step = clone(whole)
    run_pipeline(step, Pipeline.parse("decode"))
    return whole, step


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("llama_gqa", ""),
        ("gemma2_caps", ""),
        ("gpt2_plain", ""),
        ("bloom_plain", ""),
        ("qwen3_5_text_square", ""),
        ("mixtral_window_tied", ""),
        ("qwen3_moe_norm", "weight-rows"),
    ],
)
def test_a_step_is_proved(name: str, pipeline: str) -> None:
    whole, step = steps_of(name, pipeline)
    verdict = prove(whole, step)
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    assert any("caches hold" in a for a in verdict.assumptions)
    assert moecc_check.accepted(verdict.log, print_graph(whole), print_graph(step)) == [[], []]


def change_scores(graph: Graph, of: str, op: str, number: int = 0, **attrs: object) -> None:
    """Insert an operation behind all results of another one."""
    for node in [n for n in graph if n.op.name == of]:
        users = list(node.result.users)
        changed = Builder(graph, before=users[0]).node(op, node.result, **attrs)
        for user in users:
            user.set_operand(user.operands.index(node.result), changed.results[number])


@pytest.mark.parametrize(
    ("op", "attrs"),
    [("neg", {}), ("scale", {"by": -1.0}), ("scale", {"by": 0.0}), ("square", {})],
)
def test_a_score_that_a_mask_hides_stays_hidden(op: str, attrs: dict[str, float]) -> None:
    whole, step = steps_of("llama_gqa")
    log = prove(whole, step).log
    for graph in (whole, step):
        change_scores(graph, "mask", op, **attrs)
    verdict = prove(whole, step)
    assert (verdict.status, verdict.terms[1]) == ("unknown", f"{op} of what a mask hides")
    digests = {"before": digest(whole), "after": digest(step)}
    with pytest.raises(moecc_check.Rejected):
        moecc_check.accepted(log | digests, *map(print_graph, (whole, step)))


@pytest.mark.parametrize(
    ("of", "number", "reason"),
    [
        ("silu", 0, ""),
        ("silu", 1, ""),
        ("contract", 1, ""),
        ("mask", 0, "own-pair of what a mask hides"),
        ("softmax", 0, "contract reads keys that come after a token"),
    ],
)
def test_a_step_with_an_operation_of_ones_own(of: str, number: int, reason: str) -> None:
    whole, step = steps_of("llama_gqa")
    with patch.dict(OPS):

        @operation("own-pair", "x", elementwise=True, sharding=by_name)
        class PairOp(Op):
            """x + 1 and x − 1."""

            def infer(self, x: Operand) -> tuple[TensorType, ...]:
                return x.type, x.type

            def meaning(self, x: Array) -> tuple[Array, ...]:
                return x.map(lambda data: data + 1), x.map(lambda data: data - 1)

        for graph in (whole, step):
            change_scores(graph, of, "own-pair", number)
        verdict = prove(whole, step)
        texts = print_graph(whole), print_graph(step)
        if reason:
            assert (verdict.status, verdict.terms[1]) == ("unknown", reason)
            return
        assert verdict.status == "proved", (verdict.node, verdict.terms)
        assert verdict.assumptions[-1].startswith("own-pair (test_decoding.py) is a function")
        moecc_check.accepted(verdict.log, *texts)
        with pytest.raises(moecc_check.Rejected):
            moecc_check.accepted(verdict.log | {"elementwise": []}, *texts)


def test_axes_that_an_operation_of_ones_own_leaves_out_of_mixes_are_not_believed() -> None:
    whole, step = steps_of("llama_gqa")
    with patch.dict(OPS):

        @operation("own", "x")
        class OwnOp(Op):
            """A sum along the last axis, and whatever else: it has no meaning."""

            def infer(self, x: Operand) -> TensorType:
                return x.type

            def mixes(self, x: Operand) -> tuple[str, ...]:
                return x.type.names[-1:]

        for graph in (whole, step):
            change_scores(graph, "silu", "own")
        verdict = prove(whole, step)
    assert (verdict.status, "and not elementwise" in verdict.terms[1]) == ("unknown", True)


def test_frequencies_that_grow_with_the_text_are_open() -> None:
    verdict = prove(*steps_of("llama_dynamic"))
    assert (verdict.status, verdict.node.split()[2]) == ("unknown", "rope")


def test_a_step_of_caches_alone_is_open() -> None:
    whole, step = steps_of("llama_gqa")
    for name in [n for n in step.output_names if not n.startswith("cache.")]:
        step.drop_output(name)
    verdict = prove(whole, step)
    assert (verdict.status, verdict.node) == ("unknown", "outputs")


def test_a_state_of_other_keys_is_open() -> None:
    whole, step = steps_of("qwen3_5_text_square")
    rule, recent = first(step, "delta_rule"), first(step, "cast").operands[0]
    assert recent.type == rule.operands[5].type
    rule.set_operand(5, recent)
    verdict = prove(whole, step)
    assert (verdict.status, verdict.node.split()[2]) == ("unknown", "delta_rule")


def first(graph: Graph, op: str) -> Node:
    return next(n for n in graph if n.op.name == op)


def show_what_is_hidden(step: Graph) -> None:
    scores = first(step, "softmax")
    masked = scores.operands[0].node
    assert masked is not None
    scores.set_operand(0, masked.operands[0])


def hide_by_a_number(step: Graph) -> None:
    first(step, "mask").attrs["fill"] = -1e4


def look_less_far(step: Graph) -> None:
    first(step, "causal").attrs["window"] = 2


def see_what_follows(step: Graph) -> None:
    causal = first(step, "causal")
    renamed = Builder(step, before=causal).rename(step.inputs["positions"], axis="seq", to="kv_seq")
    causal.set_operand(1, renamed)


def exchange_caches(step: Graph) -> None:
    keys, values = (f"cache.layers.0.attention.{n}" for n in ("keys", "values"))
    a, b = step.outputs[keys], step.outputs[values]
    step.set_output(keys, b)
    step.set_output(values, a)


def keep_a_cache(step: Graph) -> None:
    name = "cache.layers.1.attention.keys"
    step.set_output(name, step.inputs[name])


def write_into_another_cache(step: Graph) -> None:
    first(step, "update_slice").set_operand(0, step.inputs["cache.layers.1.attention.keys"])


def forget_the_cache(step: Graph) -> None:
    keys = first(step, "update_slice")
    for user in list(keys.result.users):
        if user.op.name == "contract":
            user.set_operand(user.operands.index(keys.result), keys.operands[1])
            return


def rotate_twice(step: Graph) -> None:
    rotated = first(step, "rotate")
    again = Builder(step, before=rotated).rotate(*rotated.operands, **rotated.attrs)
    rotated.set_operand(0, again)


MUTANTS = (
    show_what_is_hidden,
    hide_by_a_number,
    look_less_far,
    exchange_caches,
    keep_a_cache,
    write_into_another_cache,
    forget_the_cache,
    rotate_twice,
    see_what_follows,
)


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda m: m.__name__)
def test_a_wrong_step_is_not_proved(mutate: Callable[[Graph], None]) -> None:
    whole, step = steps_of("llama_gqa")
    log = prove(whole, step).log
    mutate(step)
    assert prove(whole, step).status != "proved"
    with pytest.raises(moecc_check.Rejected):
        moecc_check.accepted({**log, "after": digest(step)}, *map(print_graph, (whole, step)))


def test_layers_of_a_step_may_be_rolled() -> None:
    whole, step = steps_of("llama_gqa")
    run_pipeline(step, Pipeline.parse("roll-layers"))
    verdict = prove(whole, step)
    assert (verdict.status, verdict.log) == ("proved", {})


def test_a_step_of_dropped_choices_is_not_proved() -> None:
    whole, step = steps_of("mixtral_gqa")
    for graph in (whole, step):
        for node in (n for n in graph if n.op.assigns_slots):
            node.attrs |= {"slots": "capacity", "capacity_factor": 1.0}
    verdict = prove(whole, step)
    assert (verdict.status, verdict.node.split()[2]) == ("unknown", "assign_slots")
