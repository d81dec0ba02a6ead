"""Equal layers of a block that repeats: found, lowered once, and worth the same as written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from moecc_backends.xla.backend import function
from moecc_backends.xla.lower.scan import LayerLoop, pieces_of

from moecc.ir import F32, Builder, Graph, tensor

from .models import normal

RUNS, SIZE = 2, 4


def block(kinds, skip=False):
    """Return a body of layers, one for each letter: equal letters are equal layers.

    Args:
      kinds: the letters; a layer adds something of its own weight, which depends on the letter.
      skip: whether each layer reads the block's input, too.
    """
    body = Graph("body")
    h = start = body.input("h", tensor(F32, batch="B", embed=SIZE))
    weights = [body.input(f"w{i}", tensor(F32, out=SIZE, embed=SIZE)) for i in range(len(kinds))]
    shared = body.input("shared", tensor(F32, embed=SIZE))
    metrics = []
    for number, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
        b = Builder(body, loc=f"layers.{{{number}..{number + len(kinds)}..{len(kinds)}}}.ffn")
        product = b.rename(b.contract(h, weight, over="embed"), axis="out", to="embed")
        change = b.tanh(product) if kind == "d" else b.silu(product)
        metrics.append(b.mean(b.square(change), axes=("batch", "embed")))
        h = b.add(h, b.mul(change, shared))
        h = b.add(h, start) if skip else h
    body.set_output("h", h)
    for number, metric in enumerate(metrics):
        body.set_output(f"metric{number}", metric)
    return body


def repeated(kinds, remat):
    """Return a graph that runs the block twice."""
    body, graph = block(kinds), Graph()
    h, *weights, shared = body.inputs.values()
    layer = tensor(F32, layer=RUNS).axes
    stacked = [graph.param(w.name, w.type.with_axes((*layer, *w.type.axes))) for w in weights]
    h, shared = (graph.input(v.name, v.type) for v in (h, shared))
    b = Builder(graph)
    y, *metrics = b.scan(h, *stacked, shared, over=(("layer", RUNS),), carries=1, remat=remat,
                         stacked=len(stacked), body=body)  # fmt: skip
    graph.set_output("y", y)
    for number, metric in enumerate(metrics):
        graph.set_output(f"m{number}", b.sum(metric, axes="layer"))
    return graph


@pytest.mark.parametrize(
    ("kinds", "skip", "lengths"),
    [
        ("dddr", False, [3, 1]),
        ("rddd", False, [1, 3]),
        ("ddrr", False, [2, 2]),
        ("drdr", False, [1, 1, 1, 1]),
        ("d", False, [1]),
        # The first reads one value twice, where the others read two.
        ("dddd", True, [1, 3]),
    ],
)
def test_equal_layers_that_follow_one_another_are_a_loop(kinds, skip, lengths):
    pieces = pieces_of(block(kinds, skip))
    assert [len(p.layers) if isinstance(p, LayerLoop) else 1 for p in pieces] == lengths


def test_layers_that_hang_together_otherwise_are_no_loop():
    """The third layer reads what the first made, so what flows is no chain."""
    body = block("ddd")
    first, second = ([n for n in body if n.loc.startswith(f"layers.{{{i}")][-1] for i in (0, 1))
    for node in list(body):
        if node.loc.startswith("layers.{2"):
            for number, value in enumerate(node.operands):
                if value is second.result:
                    node.set_operand(number, first.result)
    assert all(not isinstance(p, LayerLoop) for p in pieces_of(body))


def scans(jaxpr):
    """Return how often each loop of `jaxpr` runs, those within first."""
    lengths = []
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            lengths += scans(inner)
        if equation.primitive.name == "scan":
            lengths.append(equation.params["length"])
    return lengths


OPTIMISED = {"xla_backend_optimization_level": 3}
"""The bounds below are those of optimised code; without, as tests compile otherwise, gradients of
about 20 differ by 1.3e-5."""


def value_and_slopes(graph):
    rng = np.random.default_rng(0)
    params = {n: a / 2 for n, a in normal(rng, graph.params, "f4").items()}
    inputs = {"h": rng.normal(size=(3, SIZE)).astype("f4"), "shared": np.ones(SIZE, "f4") * 0.7}
    run = function(graph)

    def loss(params):
        outputs = run(params, inputs)
        y = outputs.pop("y")
        return jnp.sum(jnp.square(y)) + sum(m * (3 + i) for i, m in enumerate(outputs.values()))

    found = jax.jit(jax.value_and_grad(loss), compiler_options=OPTIMISED)(params)
    return *found, scans(jax.make_jaxpr(loss)(params).jaxpr)


@pytest.mark.parametrize(
    ("kinds", "remat", "lengths"), [("dddr", "full", [3]), ("ddrr", "save", [2, 2])]
)
def test_values_and_gradients_of_a_loop_within_a_block(kinds, remat, lengths):
    """Losses of single layers come out of the loop one by one, the metrics of each among them."""
    value, slopes, once = value_and_slopes(repeated(kinds, "none"))
    found, found_slopes, loops = value_and_slopes(repeated(kinds, remat))
    assert once == [RUNS]
    assert loops == [*lengths, RUNS]
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for name, array in slopes.items():
        np.testing.assert_allclose(found_slopes[name], array, atol=1e-5, err_msg=name)
