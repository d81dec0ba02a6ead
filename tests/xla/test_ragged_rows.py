"""What experts compute on ragged rows, beyond what a feed-forward block needs."""

import re

import numpy as np
import pytest
from tiers import few

from moecc.ir import F32, I32, Builder, Graph, tensor

from .models import normal, relative, run_both

SIZES = {
    "batch": 2, "seq": 6, "embed": 4, "mlp": 6, "wide": 10, "expert": 3, "group": 2, "head": 2,
    "vocab": 5, "choice": 2,
}  # fmt: skip


def typed(names, dtype=F32):
    return tensor(dtype, **{name: SIZES[name] for name in names.split()})


def numbers(b, x, axis):
    """Return the positions along an axis as floats."""
    return b.cast(b.positions(x, axis=axis), dtype="f32")


def row_numbers(b, x):
    """Return an integer for each row."""
    return b.cast(b.sum(x, axes=("embed", "head")), dtype="i32")


def product(b, x, weight, over="embed"):
    return b.contract(x, weight, over=over)


def chosen_entries(b, x):
    entries, gates = b.route(x, top_k=2, axis="embed")
    return b.sum(b.mul(b.cast(entries, dtype="f32"), gates), axes=("choice",))


def reductions(b, x):
    total, largest, mean, log = (
        reduce(x, axes=("embed",)) for reduce in (b.sum, b.max, b.mean, b.logsumexp)
    )
    return b.add(b.add(total, largest), b.add(mean, log))


def reshaped(b, x):
    split = b.split(x, axis="embed", into=(("a", 2), ("c", 2)))
    merged = b.merge(split, axes=("c", "head"), into="d")
    return b.slice(b.rename(merged, axis="a", to="e"), axis="d", start=1, stop=3)


def compared(b, x):
    masked = b.mask(x, b.equal(x, x), fill=-1.0)
    return b.select(b.less(x, b.constant(value=0.3)), x, masked)


def rotated(b, x, positions, **scaling):
    return b.rotate(x, *b.rope(positions, axis="embed", size=4, **scaling), axis="embed")


def two_widths(b, x, u, v):
    narrow = b.rename(b.slice(product(b, x, v), axis="mlp", start=0, stop=4), axis="mlp", to="wide")
    return b.mul(b.sum(product(b, x, u), axes=("wide",)), b.sum(narrow, axes=("wide",)))


def gated(b, x, gate, up, bias, down):
    hidden = b.mul(b.silu(b.add(product(b, x, gate), bias)), product(b, x, up))
    return product(b, hidden, down, "mlp")


ROWS = {
    "a value for each row": lambda b, x: b.square(x),
    "softmax": lambda b, x: b.softmax(x, axis="embed"),
    "reductions": reductions,
    "all inner axes reduced": lambda b, x: b.sum(x, axes=("head", "embed")),
    "split, merge, rename, slice": reshaped,
    "merge across": lambda b, x: b.merge(x, axes=("embed", "head"), into="embed"),
    "comparisons": compared,
    "numbers of experts": lambda b, x: b.add(x, numbers(b, x, "expert")),
    "numbers of groups and entries": lambda b, x: b.mul(
        b.add(x, numbers(b, x, "group")), numbers(b, x, "embed")
    ),
    "rotation": lambda b, x: rotated(b, x, b.positions(x, axis="head")),
    "rotation by numbers of rows": lambda b, x: rotated(
        b, x, row_numbers(b, x), scaling="linear", factor=2.0
    ),
    "a mask of rows and entries": lambda b, x: b.mask(
        x, b.causal(row_numbers(b, x), b.positions(x, axis="embed")), fill=0.5
    ),
    "a mask of entries and rows": lambda b, x: b.mask(
        x, b.causal(b.positions(x, axis="embed"), row_numbers(b, x), window=3), fill=0.5
    ),
    "a choice among entries": chosen_entries,
    "rows as tables": lambda b, x: b.embedding(
        x, b.rename(b.positions(x, axis="head"), axis="head", to="pick"), axis="embed"
    ),
    "one-hot": lambda b, x: b.one_hot(b.cast(b.square(x), dtype="i32"), into=(("vocab", 5),)),
    "rows with rows": lambda b, x: product(b, b.rename(x, axis="head", to="other"), x),
}
PARAMETERS = {
    "norms": (
        lambda b, x, g, c: b.layer_norm(b.rms_norm(x, g, axis="embed"), g, c, axis="embed"),
        "embed", "embed",
    ),
    "a bias of each expert": (lambda b, x, p: b.add(x, p), "expert embed"),
    "a bias of each group": (lambda b, x, p: b.mul(x, p), "group embed"),
    "a bias of each group and expert": (lambda b, x, p: b.add(p, x), "embed group expert"),
    "a scalar of each expert": (lambda b, x, p: b.mul(x, p), "expert"),
    "a broadcast bias": (lambda b, x, p: b.sub(b.broadcast(p, x), x), "expert head"),
    "lookup": (
        lambda b, x, t: b.embedding(
            t, b.cast(b.minimum(b.square(x), b.constant(value=4.0)), dtype="i32"), axis="vocab"
        ),
        "vocab wide",
    ),
    "a weight of all experts": (product, "mlp embed"),
    "one weight over two axes": (
        lambda b, x, w: product(b, x, w, ("embed", "head")), "expert mlp head embed",
    ),
    "over two axes, sums last": (
        lambda b, x, w: product(b, x, w, ("head", "embed")), "head expert embed mlp",
    ),
    "an axis that is kept": (product, "expert mlp embed"),
    "a weight with two new axes": (product, "expert embed mlp wide"),
    "a weight without new axes": (product, "expert embed"),
    "a weight that shares an axis": (product, "expert head mlp embed"),
    "a weight of each group": (product, "group mlp embed"),
    "the weight first": (lambda b, x, w: product(b, w, x), "expert mlp embed"),
    "weights of two widths": (two_widths, "expert wide embed", "expert mlp embed"),
    "weights in two orders": (
        lambda b, x, u, v: b.mul(product(b, x, u), product(b, x, v)),
        "expert mlp embed", "expert embed mlp",
    ),
    "a weight made of a parameter": (
        lambda b, x, u, v: b.add(product(b, x, b.exp(u)), product(b, x, v)),
        "expert mlp embed", "expert mlp embed",
    ),
    "a gated block": (
        gated, "expert mlp embed", "expert mlp embed", "expert mlp", "expert embed mlp",
    ),
}  # fmt: skip
"""What is computed of rows and parameters, and the axes of these."""


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("slots", few(["ragged", "capacity"]))
def test_rows_give_what_the_reference_gives(slots, grouped):
    """All bodies in one graph, compiled once; under a capacity some choices are dropped."""
    graph = Graph("all")
    b = Builder(graph, loc="layers.0.ffn")
    x = graph.input("x", typed("batch seq head embed"))
    chosen = graph.input("chosen", typed("batch seq choice", I32))
    gates = graph.input("gates", typed("batch seq choice"))
    bound = {"capacity_factor": 1.2} if slots == "capacity" else {}
    place = b.assign_slots(
        chosen, tokens=("batch", "seq"), experts=3, groups=1 + grouped, slots=slots, **bound
    )
    rows = b.dispatch(x, chosen, place)
    graph.set_output("assign_slots", place)
    bodies = {name: (body,) for name, body in ROWS.items()} | PARAMETERS
    for name, (body, *axes) in bodies.items():
        if ("group" in name) == grouped:
            word = re.sub(r"\W+", "_", name)
            params = [graph.param(f"{word}{n}", typed(names)) for n, names in enumerate(axes)]
            graph.set_output(word, b.combine(body(b, rows, *params), chosen, place, gates))
    rng = np.random.default_rng(0)
    params = normal(rng, graph.params)
    experts = np.argsort(rng.random((2, 6, 3)), -1)[..., :2].astype(np.int32)
    inputs = {"x": rng.normal(size=x.type.shape), "gates": rng.random(gates.type.shape)}
    found, expected = run_both(graph, params, {**inputs, "chosen": experts})
    places = expected.pop("assign_slots")
    np.testing.assert_array_equal(found["assign_slots"], places)
    assert (places < 0).any() == (slots == "capacity")
    for name, array in expected.items():
        assert relative(found[name], array) <= 1e-12, name


# --- placement


@pytest.mark.parametrize("gates", ["renormalised", "softmax", "sigmoid", "sparsemixer", "ones",
                                   "sigmoid-renormalised"])  # fmt: skip
@pytest.mark.parametrize("top_k", [1, 2])
def test_routes_with_ties_and_dead_experts(gates, top_k):
    graph = Graph("route")
    logits = graph.input("logits", tensor(F32, expert=4, batch="B"))
    experts, weights = Builder(graph).route(logits, top_k=top_k, gates=gates, scale=2.5)
    graph.set_output("experts", experts)
    graph.set_output("gates", weights)
    rng = np.random.default_rng(0)
    columns = [*rng.normal(size=(6, 4)), [0, 0, 0, 0], [1, 1, 2, 2], [3, 1, 3, 3],
               [0, -np.inf, 1, 0], [-np.inf, -np.inf, -2, -np.inf], [1e4, 9990, -1e4, 0],
               [-5, -5.05, -5.2, -9]]  # fmt: skip
    found, expected = run_both(graph, {}, {"logits": np.array(columns).T})
    np.testing.assert_array_equal(found["experts"], expected["experts"])
    np.testing.assert_allclose(found["gates"], expected["gates"], rtol=1e-12)
