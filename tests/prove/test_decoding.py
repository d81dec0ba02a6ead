"""A step with caches computes rows of the graph of whole texts, or it is not proved."""

from __future__ import annotations

from collections.abc import Callable

import moecc_check
import pytest

from moecc.ir import Builder, Graph, Node, clone
from moecc.ir.text import print_graph
from moecc.prove import prove
from moecc.prove.log import digest
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.translate.importing import import_checkpoint

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
