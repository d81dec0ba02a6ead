"""Equal layers of a block that repeats: found, lowered once, and worth the same as written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from moecc_backends.xla.backend import function
from moecc_backends.xla.lower.scan import LayerLoop, pieces_of

from moecc.ir import F32, Builder, Graph, tensor

RUNS, SIZE = 2, 4


def block(kinds, skip=False):
    """Return a body of layers, one for each letter: equal letters are equal layers.

    Args:
      kinds: the letters; a layer adds something of its own weight, which depends on the letter.
      skip: whether each layer reads the block's input, too.
    """
    body = Graph("body")
    h = body.input("h", tensor(F32, batch="B", embed=SIZE))
    start = h
    weights = [body.input(f"w{i}", tensor(F32, out=SIZE, embed=SIZE)) for i in range(len(kinds))]
    shared = body.input("shared", tensor(F32, embed=SIZE))
    metrics = []
    for number, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
        b = Builder(body, loc=f"layers.{{{number}..{number + len(kinds)}..{len(kinds)}}}.ffn")
        made = b.rename(b.contract(h, weight, over="embed"), axis="out", to="embed")
        made = b.tanh(made) if kind == "d" else b.silu(made)
        metrics.append(b.mean(b.square(made), axes=("batch", "embed")))
        h = b.add(b.add(h, b.mul(made, shared)), start) if skip else b.add(h, b.mul(made, shared))
    body.set_output("h", h)
    for number, metric in enumerate(metrics):
        body.set_output(f"metric{number}", metric)
    return body


def repeated(kinds, remat, skip=False):
    """Return a graph that runs the block twice."""
    body, graph = block(kinds, skip), Graph()
    h, shared = (graph.input(n, body.inputs[n].type) for n in ("h", "shared"))
    layer = tensor(F32, layer=RUNS).axes
    stacked = [
        graph.param(n, v.type.with_axes((*layer, *v.type.axes)))
        for n, v in body.inputs.items()
        if n.startswith("w")
    ]
    b = Builder(graph)
    results = b.scan(h, *stacked, shared, over=(("layer", RUNS),), carries=1, remat=remat,
                     stacked=len(stacked), body=body)  # fmt: skip
    graph.set_output("y", results[0])
    for number, metric in enumerate(results[1:]):
        graph.set_output(f"m{number}", b.sum(metric, axes="layer"))
    return graph


@pytest.mark.parametrize(
    ("kinds", "skip", "found"),
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
def test_equal_layers_that_follow_one_another_are_a_loop(kinds, skip, found):
    pieces = pieces_of(block(kinds, skip))
    assert [len(p.layers) if isinstance(p, LayerLoop) else 1 for p in pieces] == found


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
    found = []
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += scans(inner)
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
    return found


OPTIMISED = {"xla_backend_optimization_level": 3}
"""The bounds below are those of optimised code; without, as tests compile otherwise, gradients of
about 20 differ by 1.3e-5."""


def value_and_slopes(graph):
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=v.type.shape).astype("f4") / 2 for n, v in graph.params.items()}
    inputs = {"h": rng.normal(size=(3, SIZE)).astype("f4"), "shared": np.ones(SIZE, "f4") * 0.7}
    run = function(graph)

    def loss(params):
        made = run(params, inputs)
        return jnp.sum(jnp.square(made["y"])) + sum(
            made[n] * (2 + i) for i, n in enumerate(made) if n != "y"
        )

    found = jax.jit(jax.value_and_grad(loss), compiler_options=OPTIMISED)(params)
    return *found, scans(jax.make_jaxpr(loss)(params).jaxpr)


@pytest.mark.parametrize(("kinds", "remat"), [("dddr", "full"), ("ddrr", "save")])
def test_values_and_gradients_of_a_loop_within_a_block(kinds, remat):
    """Losses of single layers come out of the loop one by one, the metrics of each among them."""
    value, slopes, once = value_and_slopes(repeated(kinds, "none"))
    found, found_slopes, loops = value_and_slopes(repeated(kinds, remat))
    assert once == [RUNS]
    assert loops == [*{"dddr": (3,), "ddrr": (2, 2)}[kinds], RUNS]
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for name, array in slopes.items():
        np.testing.assert_allclose(found_slopes[name], array, atol=1e-5, err_msg=name)
