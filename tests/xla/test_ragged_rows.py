"""What experts compute on ragged rows, beyond what a feed-forward block needs."""

import numpy as np
import pytest
from tiers import few

from moecc.ir import Graph
from moecc.ir.builder import Builder
from moecc.testing import run_reference
from moecc.types import F32, F64, I32, tensor

from .models import compiled, relative

jax = pytest.importorskip("jax")


SIZES = {
    "batch": 2, "seq": 6, "embed": 4, "mlp": 6, "wide": 10, "expert": 3, "group": 2, "head": 2,
    "vocab": 5,
}  # fmt: skip


def route_tokens(graph, groups, slots="ragged"):
    """Route an input ``x``; return what combines what a body makes of the rows.

    The function takes the body, the axes of its parameters, and a prefix of their names.  With
    ``slots=capacity`` some choices are dropped.
    """
    bound = {"capacity_factor": 1.2} if slots == "capacity" else {}
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", tensor(F32, batch=2, seq=6, head=2, embed=4))
    chosen = graph.input("chosen", tensor(I32, batch=2, seq=6, choice=2))
    gates = graph.input("gates", tensor(F32, batch=2, seq=6, choice=2))
    place = b.assign_slots(chosen, tokens=("batch", "seq"), experts=3, groups=groups, slots=slots,
                    **bound)  # fmt: skip
    rows = b.dispatch(x, chosen, place)
    graph.set_output("assign_slots", place)

    def combined(body, axes, prefix):
        params = {
            n: graph.param(prefix + n, tensor(F32, **{a: SIZES[a] for a in names.split()}))
            for n, names in axes.items()
        }
        return b.combine(body(b, rows, **params), chosen, place, gates)

    return combined


def data(graph, seed=0):
    rng = np.random.default_rng(seed)
    params = {n: rng.normal(size=p.type.shape) for n, p in graph.params.items()}
    experts = np.argsort(rng.random((2, 6, 3)), -1)[..., :2].astype(np.int32)
    x, gates = rng.normal(size=(2, 6, 2, 4)), rng.random((2, 6, 2))
    return params, {"x": x, "chosen": experts, "gates": gates}


BODIES = {
    "a value for each row": (lambda b, x: b.square(x), {}),
    "norms": (
        lambda b, x, g, c: b.layer_norm(b.rms_norm(x, g, axis="embed"), g, c, axis="embed"),
        {"g": "embed", "c": "embed"},
    ),
    "softmax": (lambda b, x: b.softmax(x, axis="embed"), {}),
    "reductions": (
        lambda b, x: b.add(b.add(b.sum(x, axes=("embed",)), b.max(x, axes=("embed",))),
                           b.add(b.mean(x, axes=("embed",)), b.logsumexp(x, axes=("embed",)))),
        {},
    ),
    "all inner axes reduced": (lambda b, x: b.sum(x, axes=("head", "embed")), {}),
    "split, merge, rename, slice": (
        lambda b, x: b.slice(
            b.rename(
                b.merge(b.split(x, axis="embed", into=(("a", 2), ("c", 2))), axes=("c", "head"),
                        into="d"),
                axis="a", to="e"),
            axis="d", start=1, stop=3),
        {},
    ),
    "merge across": (lambda b, x: b.merge(x, axes=("embed", "head"), into="embed"), {}),
    "comparisons": (
        lambda b, x: b.select(b.less(x, b.constant(value=0.3)), x, b.mask(x, b.equal(x, x),
                                                                         fill=-1.0)),
        {},
    ),
    "a bias of each expert": (lambda b, x, p: b.add(x, p), {"p": "expert embed"}),
    "a bias of each group": (lambda b, x, p: b.mul(x, p), {"p": "group embed"}),
    "a bias of each group and expert": (
        lambda b, x, p: b.add(p, x), {"p": "embed group expert"},
    ),
    "a scalar of each expert": (lambda b, x, p: b.mul(x, p), {"p": "expert"}),
    "a broadcast bias": (lambda b, x, p: b.sub(b.broadcast(p, x), x), {"p": "expert head"}),
    "numbers of experts": (
        lambda b, x: b.add(x, b.cast(b.positions(x, axis="expert"), dtype="f32")), {},
    ),
    "numbers of groups and entries": (
        lambda b, x: b.mul(b.add(x, b.cast(b.positions(x, axis="group"), dtype="f32")),
                           b.cast(b.positions(x, axis="embed"), dtype="f32")),
        {},
    ),
    "rotation": (
        lambda b, x: b.rotate(x, *b.rope(b.positions(x, axis="head"), axis="embed", size=4),
                              axis="embed"),
        {},
    ),
    "rotation by numbers of rows": (
        lambda b, x: b.rotate(x, *b.rope(b.cast(b.sum(x, axes=("embed", "head")), dtype="i32"),
                                         axis="embed", size=4, scaling="linear", factor=2.0),
                              axis="embed"),
        {},
    ),
    "a mask of rows and entries": (
        lambda b, x: b.mask(x, b.causal(b.cast(b.sum(x, axes=("embed", "head")), dtype="i32"),
                                        b.positions(x, axis="embed")), fill=0.5),
        {},
    ),
    "a mask of entries and rows": (
        lambda b, x: b.mask(x, b.causal(b.positions(x, axis="embed"),
                                        b.cast(b.sum(x, axes=("embed", "head")), dtype="i32"),
                                        window=3), fill=0.5),
        {},
    ),
    "a choice among entries": (
        lambda b, x: b.sum(b.mul(*(lambda e, g: (b.cast(e, dtype="f32"), g))(
            *b.route(x, top_k=2, axis="embed"))), axes=("choice",)),
        {},
    ),
    "rows as tables": (
        lambda b, x: b.embedding(
            x, b.rename(b.positions(x, axis="head"), axis="head", to="pick"), axis="embed"),
        {},
    ),
    "lookup": (
        lambda b, x, t: b.embedding(t, b.cast(b.minimum(b.square(x), b.constant(value=4.0)),
                                              dtype="i32"), axis="vocab"),
        {"t": "vocab wide"},
    ),
    "one-hot": (
        lambda b, x: b.one_hot(b.cast(b.square(x), dtype="i32"), into=(("vocab", 5),)), {},
    ),
    "a weight of all experts": (lambda b, x, w: b.contract(x, w, over="embed"), {"w": "mlp embed"}),
    "one weight over two axes": (
        lambda b, x, w: b.contract(x, w, over=("embed", "head")), {"w": "expert mlp head embed"},
    ),
    "over two axes, sums last": (
        lambda b, x, w: b.contract(x, w, over=("head", "embed")), {"w": "head expert embed mlp"},
    ),
    "an axis that is kept": (
        lambda b, x, w: b.contract(x, w, over="embed"), {"w": "expert mlp embed"},
    ),
    "a weight with two new axes": (
        lambda b, x, w: b.contract(x, w, over="embed"), {"w": "expert embed mlp wide"},
    ),
    "a weight without new axes": (
        lambda b, x, w: b.contract(x, w, over="embed"), {"w": "expert embed"},
    ),
    "a weight that shares an axis": (
        lambda b, x, w: b.contract(x, w, over="embed"), {"w": "expert head mlp embed"},
    ),
    "a weight of each group": (
        lambda b, x, w: b.contract(x, w, over="embed"), {"w": "group mlp embed"},
    ),
    "the weight first": (
        lambda b, x, w: b.contract(w, x, over="embed"), {"w": "expert mlp embed"},
    ),
    "rows with rows": (
        lambda b, x: b.contract(b.rename(x, axis="head", to="other"), x, over="embed"), {},
    ),
    "weights of two widths": (
        lambda b, x, u, v: b.mul(
            b.sum(b.contract(x, u, over="embed"), axes=("wide",)),
            b.sum(b.rename(b.slice(b.contract(x, v, over="embed"), axis="mlp", start=0, stop=4),
                           axis="mlp", to="wide"), axes=("wide",))),
        {"u": "expert wide embed", "v": "expert mlp embed"},
    ),
    "weights in two orders": (
        lambda b, x, u, v: b.mul(b.contract(x, u, over="embed"), b.contract(x, v, over="embed")),
        {"u": "expert mlp embed", "v": "expert embed mlp"},
    ),
    "a weight made of a parameter": (
        lambda b, x, u, v: b.add(b.contract(x, b.exp(u), over="embed"),
                                 b.contract(x, v, over="embed")),
        {"u": "expert mlp embed", "v": "expert mlp embed"},
    ),
    "a gated block": (
        lambda b, x, g, u, p, d: b.contract(
            b.mul(b.silu(b.add(b.contract(x, g, over="embed"), p)), b.contract(x, u, over="embed")),
            d, over="mlp"),
        {"g": "expert mlp embed", "u": "expert mlp embed", "p": "expert mlp",
         "d": "expert embed mlp"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("slots", few(["ragged", "capacity"]))
def test_rows_give_what_the_reference_gives(slots, grouped):
    """All bodies in one graph, which is compiled once."""
    graph = Graph("all")
    route = route_tokens(graph, 2 if grouped else 1, slots)
    for number, (name, (body, axes)) in enumerate(BODIES.items()):
        if ("group" in name) == grouped:
            graph.set_output(f"y{number}", route(body, axes, f"w{number}."))
    params, inputs = data(graph)
    expected = run_reference(graph, params=params, inputs=inputs)
    found = compiled(graph, F64).run(params, inputs)
    np.testing.assert_array_equal(found["assign_slots"], expected["assign_slots"])
    assert (found["assign_slots"] < 0).any() == (slots == "capacity")
    for number, name in enumerate(BODIES):
        if f"y{number}" in expected:
            assert relative(found[f"y{number}"], expected[f"y{number}"]) <= 1e-12, name


# --- placement


@pytest.mark.parametrize("gates", ["renormalised", "softmax", "sigmoid", "sparsemixer", "ones",
                                   "sigmoid-renormalised"])  # fmt: skip
@pytest.mark.parametrize("top_k", [1, 2])
def test_routes_with_ties_and_dead_experts(gates, top_k):
    graph = Graph("route")
    b = Builder(graph)
    logits = graph.input("logits", tensor(F32, expert=4, batch="B"))
    experts, weights = b.route(logits, top_k=top_k, gates=gates, scale=2.5)
    graph.set_output("experts", experts)
    graph.set_output("gates", weights)
    rng = np.random.default_rng(0)
    columns = [*rng.normal(size=(6, 4)), [0, 0, 0, 0], [1, 1, 2, 2], [3, 1, 3, 3],
               [0, -np.inf, 1, 0], [-np.inf, -np.inf, -2, -np.inf], [1e4, 9990, -1e4, 0],
               [-5, -5.05, -5.2, -9]]  # fmt: skip
    inputs = {"logits": np.array(columns).T}
    expected = run_reference(graph, params={}, inputs=inputs)
    found = compiled(graph, F64).run({}, inputs)
    np.testing.assert_array_equal(found["experts"], expected["experts"])
    np.testing.assert_allclose(found["gates"], expected["gates"], rtol=1e-12)
