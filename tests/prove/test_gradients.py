"""Gradients: equal functions of sources and of their stopped twins have equal gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import moecc_check
import pytest

from moecc.ir import Builder, Graph, parse, print_graph
from moecc.ir.mesh import parse_mesh, set_mesh
from moecc.prove import prove
from moecc.prove.prover import FROZEN
from moecc.sharding.assign import sites_of
from moecc.sharding.collectives import Step, dependence, gradients, steps
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import propagate
from moecc.types import TensorType

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


# Gradients of embedding tables and of stacks of experts, which may be sharded themselves.

TABLE = """
  input %x : i32[batch=B]
  param %w : f32[vocab=8, embed=4]
  %y = embedding %w, %x {axis=vocab} : f32[batch=B, embed=4]
  output y = %y
"""
EXPERTS = """
  input %x : f32[batch=B, embed=4]
  input %c : i32[batch=B, choice=2]
  input %k : f32[batch=B, choice=2]
  param %w : f32[expert=4, embed=4, out=4]
  %s = assign_slots %c {tokens=batch, experts=4, groups=4, slots=capacity, capacity_factor=2.0} \
: i32[batch=B, choice=2]
  %r = dispatch %x, %c, %s : f32[group=4, expert=4, slot=capacity(%s), embed=4]
  %h = contract %r, %w {over=embed} : f32[group=4, expert=4, slot=capacity(%s), out=4]
  %y = combine %h, %c, %s, %k : f32[batch=B, out=4]
  output y = %y
"""
COLLECTIVES = {
    ("table", "data:2,other:2", "data-parallel"): ["all_reduce data"],
    ("table", "data:2,model:2", "data-parallel,tensor-parallel"): ["all_reduce data"],
    ("table", "other:2,model:2", "tensor-parallel"): [],
    ("table", "data:2,fsdp:2", "data-parallel,fsdp"): ["all_reduce data"],
    ("experts", "data:2,other:2", "data-parallel"): ["all_reduce data"],
    ("experts", "data:2,expert:2", "expert-parallel"): ["all_reduce data"],
    ("experts", "data:2,fsdp:2", "data-parallel,fsdp"): ["reduce_scatter fsdp", "all_reduce data"],
}
"""The collectives of a gradient: what is sharded is summed by nobody, or scattered."""


@dataclass
class WeightGradient:
    """The gradient of a weight on a mesh, by the gradient of the result.

    Attributes:
      weight: `table`, or `experts`.
      mesh: the mesh.
      rules: the layout.
    """

    weight: str
    mesh: str
    rules: str

    def __post_init__(self) -> None:
        text = TABLE if self.weight == "table" else EXPERTS
        layer = parse(f"moecc 1\ngraph g {{{text}}}\n")
        sites, inputs = sites_of(layer), layer.inputs.values()
        rules = tuple(self.rules.split(","))
        assigner = Layout.ruled(parse_mesh(self.mesh), 4, rules).assigner
        propagation = propagate(sites, inputs, layer.params.values(), assigner)
        sums = gradients(sites, propagation, dependence(sites, inputs)).params
        weight = layer.params["w"]
        self.summed: set[str] = sums.get(weight, set())
        self.stored: TensorType = propagation.types[weight]
        result = propagation.types[layer.outputs["y"]]
        # As they are used: ids may be gathered for a table whose columns are sharded.
        self.types = {
            v.name: type
            for site in sites
            for v, type in zip(site.operands, propagation.used(site.node), strict=True)
            if v in inputs
        }
        self.types["g"] = replace(result, unreduced=())

    def graph(self, *, on_mesh: bool) -> Graph:
        """Return the graph of the gradient, up to its collectives, as %p."""
        lines = (f"  input %{n} : {t if on_mesh else t.bare}" for n, t in self.types.items())
        graph = parse("\n".join(["moecc 1", "graph g {", *lines, "  output p = %g", "}", ""]))
        if on_mesh:
            set_mesh(graph, parse_mesh(self.mesh))
        b, (x, g) = Builder(graph), (graph.inputs[n] for n in "xg")
        if self.weight == "table":
            hot = b.one_hot(x, into=(("vocab", 8),))
            if on_mesh and (rows := self.stored["vocab"].mesh):
                hot = b.shard(hot, axis="vocab", mesh=rows)
            partial = b.contract(hot, g, over=("batch",))
        else:
            tokens = {"tokens": ("batch",), "experts": 4, "groups": 4}
            c = graph.inputs["c"]
            slots = b.assign_slots(c, slots="capacity", capacity_factor=2.0, **tokens)
            rows, grads = (b.dispatch(v, c, slots) for v in (x, g))
            if on_mesh and (mesh := self.stored["expert"].mesh):
                rows, grads = (
                    b.all_to_all(v, mesh=mesh, split="expert", gather="group")
                    for v in (rows, grads)
                )
            partial = b.contract(rows, grads, over=("group", "slot"))
        graph.set_output("p", partial)
        return graph

    def collectives(self) -> list[Step]:
        """Return the collectives that the core has for the gradient."""
        partial = self.graph(on_mesh=True).outputs["p"].type
        assert set(partial.unreduced) == self.summed
        return [*steps(partial, self.stored)]

    def reduced(self, collectives: list[Step]) -> Graph:
        """Return the graph with collectives, whatever its types say of them."""
        graph = self.graph(on_mesh=True)
        value, b = graph.outputs["p"], Builder(graph)
        for op, attrs in collectives:
            type = value.type
            value.type = replace(type, unreduced=tuple({*type.unreduced, *attrs["mesh"]}))
            result = getattr(b, op)(value, **attrs)
            value.type, value = type, result
        value.type = replace(value.type, unreduced=())
        graph.set_output("p", value)
        return graph

    def wrong_collectives(self) -> Iterator[tuple[str, list[Step]]]:
        """Yield the collectives with one left out, doubled, or over another mesh axis."""
        right, names = self.collectives(), parse_mesh(self.mesh).sizes
        for name in names:
            yield f"all_reduce over {name}, too", [*right, ("all_reduce", {"mesh": (name,)})]
        for at, (op, attrs) in enumerate(right):
            before, after = right[:at], right[at + 1 :]
            yield f"no {op}", [*before, *after]
            mesh = tuple(names.keys() - {*attrs["mesh"]})
            yield f"{op} over {mesh}", [*before, (op, {**attrs, "mesh": mesh}), *after]


@pytest.mark.parametrize("case", COLLECTIVES, ids=" ".join)
def test_gradients_of_tables_and_experts_are_summed_by_the_right_devices(
    case: tuple[str, str, str],
) -> None:
    gradient = WeightGradient(*case)
    whole, collectives = gradient.graph(on_mesh=False), gradient.collectives()
    assert [f"{op} {','.join(a['mesh'])}" for op, a in collectives] == COLLECTIVES[case]
    right = gradient.reduced(collectives)
    verdict = prove(whole, right)
    assert verdict.status == "proved", (verdict.node, verdict.terms)
    assert moecc_check.accepted(verdict.log, print_graph(whole), print_graph(right))
    for name, wrong in gradient.wrong_collectives():
        assert prove(whole, gradient.reduced(wrong)).status == "refuted", name
