"""Moments of copies: what training on copies would have left, on a quadratic."""

import numpy as np
import pytest

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.state import CarriedMoments
from moecc.types import F32, I32, tensor
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Full, Source

EXPERTS, TOP_K = 4, 2
B1, B2, STEPS, TOKENS = 0.9, 0.95, 80, 48


def dense(mlp=16, embed=8):
    """Return a model of one feed-forward block, whose weights are tensors of their own names."""
    graph = Graph("dense")
    b = Builder(graph)
    tokens = graph.input("tokens", tensor(I32, batch="B", seq="S"))

    def param(name, loc, **axes):
        type = tensor(F32, **axes)
        return graph.param(name, type, Source(name, type), loc=loc)

    with b.at("embed"):
        table = param("table", "embed", vocab=12, embed=embed)
        hidden = b.embedding(table, tokens, axis="vocab")
    with b.at("layers.0.ffn"):
        up = param("up", b.loc, mlp=mlp, embed=embed)
        down = param("down", b.loc, embed=embed, mlp=mlp)
        inner = b.silu(b.contract(hidden, up, over="embed"))
        hidden = b.add(hidden, b.contract(inner, down, over="mlp"))
    with b.at("head"):
        head = param("head", "head", vocab=12, embed=embed)
        graph.set_output("logits", b.contract(hidden, head, over="embed"))
    return graph


def upcycled(graph, options):
    run_pipeline(graph, Pipeline.parse(f"upcycle{{{options}}}"))
    return graph


def types_of(graph, *kinds):
    return {kind: {n: p.type for n, p in graph.params.items()} for kind in kinds}


def read(arrays):
    def rows(name, start=0, stop=None):
        return arrays[name][start:stop]

    return rows


@pytest.mark.parametrize(("mean", "noise"), [(0.0, 1.0), (3.0, 0.2), (0.3, 1.0)])
def test_what_training_on_copies_would_have_left(mean, noise):
    """Scalar weights w of losses ½ (w x − y)² a token, which go to 2 of 4 copies at random."""
    rng, count = np.random.default_rng(0), 16 * 8
    w = np.full(count, 1.0)
    m, v, copies_m, copies_v = (np.zeros(count) for _ in range(4))
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
    graph = dense()
    known = types_of(graph, "m", "v")
    made = upcycled(graph, f"experts={EXPERTS} top-k={TOP_K}")
    carried = CarriedMoments(made, known, STEPS, B1, B2)
    saved = {"moments.m.up": m.reshape(16, 8).astype("f"), "moments.v.up": v.reshape(16, 8)}
    saved["moments.v.up"] = saved["moments.v.up"].astype("f")
    found = {
        k: evaluate(carried.moment("up", k, made.params["up"].type), read(saved)) for k in "mv"
    }
    assert found["m"].shape == (EXPERTS, 16, 8)
    assert (found["v"] == found["v"][:1]).all()
    np.testing.assert_allclose(found["m"][0].ravel(), m / EXPERTS, rtol=1e-6)
    scale = np.sqrt(copies_v.mean())
    assert abs(copies_m.mean() - m.mean() / EXPERTS) < 0.05 * scale
    assert found["v"].mean() == pytest.approx(copies_v.mean(), rel=0.08)


def moment(graph, known, arrays, name, kind):
    carried = CarriedMoments(graph, known, 10, B1, B2)
    return evaluate(carried.moment(name, kind, graph.params[name].type), read(arrays))


def random_moments(graph, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for name, param in graph.params.items():
        first = rng.normal(size=param.type.shape)
        made[f"moments.m.{name}"] = first.astype("f")
        made[f"moments.v.{name}"] = (first**2 * 3).astype("f")
    return made


def test_what_is_not_copied_keeps_its_moments_and_what_is_new_has_none():
    graph = dense()
    known, saved = types_of(graph, "m", "v"), random_moments(graph)
    made = upcycled(graph, "experts=4 top-k=2")
    for kind in "mv":
        for name in ("table", "head"):
            assert (moment(made, known, saved, name, kind) == saved[f"moments.{kind}.{name}"]).all()
        router = next(n for n in made.params if "router" in n)
        assert (moment(made, known, saved, router, kind) == 0).all()


def test_slices_and_scaled_weights_have_the_moments_of_their_parts():
    graph = dense()
    known, saved = types_of(graph, "m", "v"), random_moments(graph)
    made = upcycled(graph, "experts=4 granularity=2 top-k=4 gates=softmax scale-placement=down")
    factor = max(e.factor for e in _scales(made))
    # Two copies of each half; a token goes to both, so that shares are one half and do not vary.
    up, down = (moment(made, known, saved, n, "m") for n in ("up", "down"))
    whole = saved["moments.m.up"]
    for expert in range(4):
        half = slice(8 * (expert % 2), 8 * (expert % 2) + 8)
        np.testing.assert_allclose(up[expert], whole[half] / 2, rtol=1e-6)
        part = saved["moments.m.down"][:, half]
        np.testing.assert_allclose(down[expert], part / 2 / factor, rtol=1e-6)
    second = moment(made, known, saved, "down", "v")
    np.testing.assert_allclose(second[0], saved["moments.v.down"][:, :8] / 4 / factor**2, rtol=1e-5)


def _scales(graph):
    from moecc.weights.arithmetic import Scale
    from moecc.weights.expr import walk

    weights = [p.weight for p in graph.params.values() if p.weight is not None]
    return [e for w in weights for e in walk(w) if isinstance(e, Scale)]


def test_redrawn_neurons_have_no_first_moment_and_keep_the_second():
    graph = dense()
    known, saved = types_of(graph, "m", "v"), random_moments(graph)
    made = upcycled(graph, "experts=4 top-k=4 init=drop drop-ratio=0.5")
    first, second = (moment(made, known, saved, "up", kind) for kind in "mv")
    gone = (first == 0).all(axis=2)
    assert (gone.sum(axis=1) == 8).all()
    np.testing.assert_allclose(second, np.broadcast_to(saved["moments.v.up"] / 16, second.shape))
    kept = np.broadcast_to(saved["moments.m.up"] / 4, first.shape)
    np.testing.assert_allclose(first[~gone], kept[~gone], rtol=1e-6)
    noisy = upcycled(dense(), "experts=4 top-k=4 init=noise noise-std=0.5")
    np.testing.assert_allclose(moment(noisy, known, saved, "up", "m"), kept, rtol=1e-6)


def test_the_factors_of_adafactor_follow_their_axes():
    graph = dense()
    by_embed, by_mlp = tensor(F32, embed=8), tensor(F32, mlp=16)
    known = {"v_row": {"up": by_mlp}, "v_col": {"up": by_embed}}
    rng = np.random.default_rng(0)
    saved = {
        "moments.v_row.up": rng.random(16).astype("f"),
        "moments.v_col.up": rng.random(8).astype("f"),
    }
    made = upcycled(graph, "experts=4 granularity=2 top-k=4")
    carried = CarriedMoments(made, known, 10)
    rows = carried.moment("up", "v_row", tensor(F32, expert=4, mlp=8))
    columns = carried.moment("up", "v_col", tensor(F32, expert=4, embed=8))
    found = evaluate(rows, read(saved)), evaluate(columns, read(saved))
    for expert in range(4):
        half = slice(8 * (expert % 2), 8 * (expert % 2) + 8)
        np.testing.assert_allclose(found[0][expert], saved["moments.v_row.up"][half] / 4)
        np.testing.assert_allclose(found[1][expert], saved["moments.v_col.up"] / 4)
    # What was not factored before cannot be told from factors.
    assert isinstance(carried.moment("up", "v", made.params["up"].type), Full)
