"""Functions that differ where a lemma lacks a condition, or a term a part of its key."""

from __future__ import annotations

from moecc.ir.text import parse
from moecc.prove import prove
from moecc.terms.term import Algebra, Head

MOMENT = """moecc 1
graph g {{
  input %x : f32[batch=B, expert=8]
  param %w : f32[expert=8] = mean(source("w" : f32[{axes}]), keep=(expert))
  %y = mul %x, %w : f32[batch=B, expert=8]
  output y = %y
}}
"""

ROUTED = """moecc 1
graph g {{
  input %x : f32[batch=B, embed=8]
  param %w : f32[expert={n}, embed=8] = {w}
  param %b : f32[expert={n}] = {b}
  param %v : f32[expert={n}, embed=8] = {v}
  %l = contract %x, %w {{over=embed}} : f32[batch=B, expert={n}]
  %e, %g = route %l, %b {{top_k={k}, using=bias, gates={gates}}} : i32[batch=B, choice={k}], \
f32[batch=B, choice={k}]
  %s = assign_slots %e {{tokens=batch, experts={n}}} : i32[batch=B, choice={k}]
  %r = dispatch %x, %e, %s : f32[group=1, expert={n}, slot=ragged(%s), embed=8]
  %h = mul %r, %v : f32[group=1, expert={n}, slot=ragged(%s), embed=8]
  %y = combine %h, %e, %s, %g : f32[batch=B, embed=8]
  output y = %y
}}
"""


def _routed(gates: str, copies: int) -> str:
    def weight(name: str, axes: str) -> str:
        source = f'source("{name}" : f32[{axes}])'
        if copies == 1:
            return source
        return f"merge(tile({source}, copy={copies}, position=1), (expert, copy)=expert)"

    w, v = (weight(name, "expert=4, embed=8") for name in "wv")
    return ROUTED.format(n=4 * copies, k=copies, gates=gates, w=w, v=v, b=weight("b", "expert=4"))


def test_moments_of_axes_in_two_orders_are_not_one_function() -> None:
    rows, columns = (MOMENT.format(axes=a) for a in ("expert=8, mlp=8", "mlp=8, expert=8"))
    assert prove(parse(rows), parse(columns)).status == "refuted"


def test_copies_of_experts_share_a_softmax_but_not_its_bias() -> None:
    assert prove(parse(_routed("softmax", 1)), parse(_routed("softmax", 2))).status == "refuted"


def test_a_closed_function_is_not_captured_by_the_variable_around_it() -> None:
    algebra = Algebra()
    i, j, k = (algebra.axis(name, 8) for name in "ijk")
    element = algebra.apply(Head("source", ("p",)), (), [algebra.index(i)])
    named = algebra.abstract([i], element)

    def applied(at: object) -> object:
        shifted = algebra.add(algebra.index(at), algebra.number(2))  # type: ignore[arg-type]
        return algebra.apply(Head("let"), [named], [shifted])

    function = algebra.abstract([j], applied(j))  # type: ignore[arg-type]
    assert algebra.enter(function, [k]) is applied(k)
