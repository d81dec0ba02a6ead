"""Moments of copies: what training on copies would have left, on a quadratic."""

import numpy as np
import pytest

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.train.state import CarriedMoments
from moecc.types import F32, I32, tensor
from moecc.weights.arithmetic import Scale
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Full, Source, walk

from .tiny import piped

EXPERTS, TOP_K = 4, 2
B1, B2, STEPS, TOKENS = 0.9, 0.95, 80, 48


def dense():
    """Return a model of one feed-forward block, whose weights are tensors of their own names."""
    graph = Graph("dense")
    b = Builder(graph)
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))

    def param(name, **axes):
        type = tensor(F32, **axes)
        return graph.param(name, type, Source(name, type), loc=b.loc)

    with b.at("embed"):
        hidden = b.embedding(param("table", vocab=12, embed=8), tokens, axis="vocab")
    with b.at("layers.0.ffn"):
        inner = b.silu(b.contract(hidden, param("up", mlp=16, embed=8), over="embed"))
        outer = b.contract(inner, param("down", embed=8, mlp=16), over="mlp")
        hidden = b.add(hidden, outer)
    with b.at("head"):
        logits = b.contract(hidden, param("head", vocab=12, embed=8), over="embed")
        graph.set_output("logits", logits)
    return graph


def random_moments():
    """Return moments of every parameter of the dense model."""
    rng = np.random.default_rng(0)
    moments = {}
    for name, param in dense().params.items():
        first = rng.normal(size=param.type.shape).astype("f")
        moments |= {f"moments.m.{name}": first, f"moments.v.{name}": first**2 * 3}
    return moments


def reader(arrays):
    return lambda name, start=0, stop=None: arrays[name][start:stop]


def upcycled(options, moments, steps=10):
    """Return the dense model upcycled, and a function to its carried moments by name and kind."""
    graph = dense()
    types = {name: param.type for name, param in graph.params.items()}
    piped(graph, f"upcycle{{{options}}}")
    carried = CarriedMoments(graph, {"m": types, "v": types}, steps, B1, B2)

    def moment(name, kind):
        expr = carried.moment(name, kind, graph.params[name].type)
        return evaluate(expr, reader(moments))

    return graph, moment


def halves(array, axis=0):
    """Return the halves of the neurons that experts of half the width have, by expert."""
    return np.split(array, 2, axis) * 2


@pytest.mark.parametrize(("mean", "noise"), [(0.0, 1.0), (3.0, 0.2), (0.3, 1.0)])
def test_what_training_on_copies_would_have_left(mean, noise):
    """Scalar weights w of losses ½ (w x − y)² a token, which go to 2 of 4 copies at random."""
    rng, count = np.random.default_rng(0), 16 * 8
    w = np.ones(count)
    m, v, copies_m, copies_v = np.zeros((4, count))
    for step in range(1, STEPS + 1):
        x = 1 + noise * rng.normal(size=(TOKENS, count))
        y = w * x - mean - noise * rng.normal(size=x.shape)
        slopes = (w * x - y) * x
        # A copy's share of a token: a gate of one half where the token goes there, 2 times of 4.
        share = (rng.random((TOKENS, count)) < TOP_K / EXPERTS) / TOP_K
        g, own = slopes.mean(0), (share * slopes).mean(0)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        copies_m = B1 * copies_m + (1 - B1) * own
        copies_v = B2 * copies_v + (1 - B2) * own**2
        w = w - 0.01 * (m / (1 - B1**step)) / (np.sqrt(v / (1 - B2**step)) + 1e-8)
    saved = {f"moments.{kind}.up": x.reshape(16, 8).astype("f") for kind, x in (("m", m), ("v", v))}
    _, moment = upcycled(f"experts={EXPERTS} top-k={TOP_K}", saved, STEPS)
    first, second = moment("up", "m"), moment("up", "v")
    assert first.shape == (EXPERTS, 16, 8)
    assert (second == second[:1]).all()
    np.testing.assert_allclose(first[0].ravel(), m / EXPERTS, rtol=1e-6)
    assert abs(copies_m.mean() - m.mean() / EXPERTS) < 0.05 * np.sqrt(copies_v.mean())
    assert second.mean() == pytest.approx(copies_v.mean(), rel=0.08)


def test_what_is_not_copied_keeps_its_moments_and_what_is_new_has_none():
    saved = random_moments()
    graph, moment = upcycled("experts=4 top-k=2", saved)
    router = next(n for n in graph.params if "router" in n)
    for kind in "mv":
        for name in ("table", "head"):
            assert (moment(name, kind) == saved[f"moments.{kind}.{name}"]).all()
        assert (moment(router, kind) == 0).all()


def test_slices_and_scaled_weights_have_the_moments_of_their_parts():
    saved = random_moments()
    graph, moment = upcycled(
        "experts=4 granularity=2 top-k=4 gates=softmax scale-placement=down", saved
    )
    weights = [param.weight for param in graph.params.values() if param.weight is not None]
    factor = max(e.factor for w in weights for e in walk(w) if isinstance(e, Scale))
    # Two copies of each half; a token goes to both, so that shares are one half and do not vary.
    ups, downs = halves(saved["moments.m.up"]), halves(saved["moments.m.down"], 1)
    np.testing.assert_allclose(moment("up", "m"), np.divide(ups, 2), rtol=1e-6)
    np.testing.assert_allclose(moment("down", "m"), np.divide(downs, 2 * factor), rtol=1e-6)
    downs = halves(saved["moments.v.down"], 1)
    np.testing.assert_allclose(moment("down", "v"), np.divide(downs, 4 * factor**2), rtol=1e-5)


def test_redrawn_neurons_have_no_first_moment_and_keep_the_second():
    saved = random_moments()
    _, moment = upcycled("experts=4 top-k=4 init=drop drop-ratio=0.5", saved)
    first, second = moment("up", "m"), moment("up", "v")
    gone = (first == 0).all(axis=2)
    assert (gone.sum(axis=1) == 8).all()
    np.testing.assert_allclose(second, np.broadcast_to(saved["moments.v.up"] / 16, second.shape))
    kept = np.broadcast_to(saved["moments.m.up"] / 4, first.shape)
    np.testing.assert_allclose(first[~gone], kept[~gone], rtol=1e-6)
    _, moment = upcycled("experts=4 top-k=4 init=noise noise-std=0.5", saved)
    np.testing.assert_allclose(moment("up", "m"), kept, rtol=1e-6)


def test_the_factors_of_adafactor_follow_their_axes():
    types = {"v_row": {"up": tensor(F32, mlp=16)}, "v_col": {"up": tensor(F32, embed=8)}}
    row, column = np.split(np.random.default_rng(0).random(24).astype("f"), [16])
    graph = piped(dense(), "upcycle{experts=4 granularity=2 top-k=4}")
    carried = CarriedMoments(graph, types, 10)
    rows = carried.moment("up", "v_row", tensor(F32, expert=4, mlp=8))
    columns = carried.moment("up", "v_col", tensor(F32, expert=4, embed=8))
    read = reader({"moments.v_row.up": row, "moments.v_col.up": column})
    np.testing.assert_allclose(evaluate(rows, read), np.divide(halves(row), 4))
    np.testing.assert_allclose(evaluate(columns, read), np.stack([column / 4] * 4))
    # What was not factored before cannot be told from factors.
    assert isinstance(carried.moment("up", "v", graph.params["up"].type), Full)
