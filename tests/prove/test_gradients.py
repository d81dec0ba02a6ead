"""Gradients: equal functions of sources and of their stopped twins have equal gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecc.ir import Graph, parse
from moecc.ir.mesh import parse_mesh
from moecc.prove import prove
from moecc.prove.prover import FROZEN
from moecc.sharding.assign import sites_of
from moecc.sharding.collectives import dependence, gradients
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import propagate

HEAD = ("input %x : f32[batch=B, embed=4]", "param %w : f32[embed=4, out=4]")


def graph(*lines: str, attr: str = "") -> Graph:
    body = "".join(f"  {line}\n" for line in (*filter(None, [attr]), *HEAD, *lines))
    return parse(f"moecc 1\ngraph g {{\n{body}}}\n")


EMBED, OUT = "f32[batch=B, embed=4]", "f32[batch=B, out=4]"
PRODUCT = f"%y = contract %x, %w {{over=embed}} : {OUT}"
STOPPED_PRODUCT = (PRODUCT, f"%s = stop_gradient %y : {OUT}", "output y = %s")
ONE_SUMMAND = (
    f"%y = contract %x, %w {{over=embed}} : {OUT}",
    f"%s = stop_gradient %y : {OUT}",
    f"%d = sub %y, %s : {OUT}",
)
"""%d: 0, with the gradient of the product."""

EQUAL = {
    "a product of twins is the twin of the product": (
        STOPPED_PRODUCT,
        (f"%a = stop_gradient %x : {EMBED}", "%b = stop_gradient %w : f32[embed=4, out=4]",
         f"%s = contract %a, %b {{over=embed}} : {OUT}", "output y = %s"),
    ),
    "a twin of a twin is the twin": (
        STOPPED_PRODUCT,
        (*STOPPED_PRODUCT[:2], f"%t = stop_gradient %s : {OUT}", "output y = %t"),
    ),
    "a straight-through value has the gradient of the other": (
        (*ONE_SUMMAND, f"%r = relu %s : {OUT}", f"%z = add %d, %r : {OUT}", "output y = %z"),
        (*ONE_SUMMAND, f"%q = relu %y : {OUT}", f"%r = stop_gradient %q : {OUT}",
         f"%z = sub %r, %s : {OUT}", f"%v = add %z, %y : {OUT}", "output y = %v"),
    ),
    "copies of a weight have the sum of its gradients": (
        (f"%y = contract %x, %w {{over=embed}} : {OUT}", f"%z = add %y, %y : {OUT}",
         "output y = %z"),
        ("%c = stack %w, %w {axis=copy} : f32[copy=2, embed=4, out=4]",
         "%y = contract %x, %c {over=embed} : f32[batch=B, copy=2, out=4]",
         f"%z = sum %y {{axes=copy}} : {OUT}", "output y = %z"),
    ),
}  # fmt: skip
WRONG = {
    "one factor of a product": (
        STOPPED_PRODUCT,
        (f"%a = stop_gradient %x : {EMBED}", f"%s = contract %a, %w {{over=embed}} : {OUT}",
         "output y = %s"),
    ),
    "a twin that is left out": (STOPPED_PRODUCT, (PRODUCT, "output y = %y")),
    "the gradient of one copy alone": (
        (PRODUCT, f"%z = add %y, %y : {OUT}", "output y = %z"),
        (PRODUCT, f"%s = stop_gradient %y : {OUT}", f"%z = add %y, %s : {OUT}", "output y = %z"),
    ),
    "a gradient that is added twice": (
        (PRODUCT, "output y = %y"), (*ONE_SUMMAND, f"%z = add %y, %d : {OUT}", "output y = %z"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EQUAL)
def test_equal_gradients_are_proved(case: str) -> None:
    before, after = (graph(*lines) for lines in EQUAL[case])
    verdict = prove(before, after)
    assert verdict.status == "proved", verdict.terms


@pytest.mark.parametrize("case", WRONG)
def test_other_gradients_of_equal_values_are_refuted(case: str) -> None:
    verdict = prove(*(graph(*lines) for lines in WRONG[case]))
    assert verdict.counterexample is not None
    assert verdict.counterexample.output == "the gradient"


ALL_FROZEN = 'attr frozen = {"groups": ["all"], "only": []}'
STOPPED_WEIGHT = (
    "%s = stop_gradient %w : f32[embed=4, out=4]",
    f"%y = contract %x, %s {{over=embed}} : {OUT}",
    "output y = %y",
)


@pytest.mark.parametrize(
    ("frozen", "status"),
    [((True, True), "proved"), ((True, False), "refuted"), ((False, False), "refuted")],
)
def test_a_frozen_parameter_has_no_gradient(frozen: tuple[bool, bool], status: str) -> None:
    attrs = [ALL_FROZEN if is_frozen else "" for is_frozen in frozen]
    before = graph(PRODUCT, "output y = %y", attr=attrs[0])
    verdict = prove(before, graph(*STOPPED_WEIGHT, attr=attrs[1]))
    assert verdict.status == status
    assert (FROZEN in verdict.assumptions) == (status == "proved")


def test_the_gradient_of_an_input_is_not_frozen() -> None:
    before = graph(PRODUCT, "output y = %y", attr=ALL_FROZEN)
    after = graph(
        f"%a = stop_gradient %x : {EMBED}", f"%y = contract %a, %w {{over=embed}} : {OUT}",
        "output y = %y", attr=ALL_FROZEN,
    )  # fmt: skip
    assert prove(before, after).status == "refuted"


# Gradients on a mesh: devices add what each has of its part of the batch.

FORWARD = {
    "matrix": ("%y = contract %x, %w {over=embed} : f32[batch=B, out=4]", "embed=4, out=4",
               ("%p = contract %x, %g {over=batch}",), "out=4"),
    "bias": ("%y = add %x, %w : f32[batch=B, embed=4]", "embed=4",
             ("%p = sum %g {axes=batch}",), "embed=4"),
    "gain": ("%y = mul %x, %w : f32[batch=B, embed=4]", "embed=4",
             ("%v = mul %x, %g : f32[batch@data=B, embed=4]", "%p = sum %v {axes=batch}"),
             "embed=4"),
}  # fmt: skip
"""The use of a weight, its axes, its gradient by that of the result, and the axes of the result."""


def on_mesh(*lines: str, is_cut: bool = True) -> Graph:
    body = "".join(f"  {line}\n" for line in lines)
    text = f'moecc 1\ngraph g {{\n  attr mesh = {{"data": 2, "other": 2}}\n{body}}}\n'
    if not is_cut:
        text = text.replace('  attr mesh = {"data": 2, "other": 2}\n', "")
        text = text.replace("@data", "").replace(" unreduced(data)", "")
    return parse(text)


def axes_to_sum(use: str, weight: str) -> set[str]:
    """Return the mesh axes over which the core says that the gradient of a weight is summed."""
    layer = parse(
        "moecc 1\ngraph g {\n  input %x : f32[batch=B, embed=4]\n"
        f"  param %w : f32[{weight}]\n  {use}\n  output y = %y\n}}\n"
    )
    sites, inputs = sites_of(layer), layer.inputs.values()
    assigner = Layout.ruled(parse_mesh("data:2,other:2"), 0, ("data-parallel",)).assigner
    propagation = propagate(sites, inputs, layer.params.values(), assigner)
    return gradients(sites, propagation, dependence(sites, inputs)).params[layer.params["w"]]


@pytest.mark.parametrize("kind", FORWARD)
def test_devices_add_the_gradients_of_their_parts(kind: str) -> None:
    use, weight, gradient, result = FORWARD[kind]
    (axis,) = axes_to_sum(use, weight)
    lines = (
        "input %x : f32[batch@data=B, embed=4]",
        f"input %g : f32[batch@data=B, {result}]",
        *gradient[:-1],
        f"{gradient[-1]} : f32[{weight}] unreduced(data)",
    )
    added = f"%d = all_reduce %p {{mesh={axis}}} : f32[{weight}]"
    whole = on_mesh(*lines, "output d = %p", is_cut=False)
    assert prove(whole, on_mesh(*lines, added, "output d = %d")).status == "proved"
    alone = on_mesh(*lines, "output d = %p")
    alone.value("p").type = replace(alone.value("p").type, unreduced=())
    verdict = prove(whole, alone)
    assert verdict.status == "refuted"
    assert verdict.node.startswith("%p = ")
