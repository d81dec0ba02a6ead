"""In which type what is computed, and with which operations."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from moecc_backends.xla.backend import function

from moecc.ir import BF16, F32, Builder, Graph, tensor

from .models import decoder, relative, run_both


def every_equation(jaxpr):
    """Yield the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from every_equation(inner)


@pytest.mark.parametrize("options", [{}, {"slots": "capacity"}], ids=["ragged", "capacity"])
def test_the_router_computes_in_float32_and_nothing_else_does(options):
    graph, params, inputs = decoder("llama_gqa", experts=7, **options)
    jaxpr = jax.make_jaxpr(function(graph, dtype=BF16))(params, inputs)
    equations = list(every_equation(jaxpr.jaxpr))
    names = {e.primitive.name for e in equations}
    assert not any("ragged_dot" in n for n in names)
    assert "top_k" in names
    dots = [e for e in equations if e.primitive.name == "dot_general"]
    routers = [e for e in dots if e.outvars[0].aval.shape[-1] == 7]
    assert len(routers) == 3
    # Cosines and sines, twice each by a product with zeros and ones, are no values of the model.
    (size,) = {node.attrs["size"] for node in graph if node.op.name == "rope"}
    tables = [e for e in dots if e.invars[1].aval.shape == (size // 2, size)]
    assert len(tables) == 2
    for equation in dots:
        kinds = {v.aval.dtype.name for v in equation.invars}
        is_precise = any(equation is e for e in (*routers, *tables))
        assert kinds == ({"float32"} if is_precise else {"bfloat16"})
        assert equation.outvars[0].aval.dtype == np.float32
    for equation in equations:
        if equation.primitive.name in ("top_k", "rsqrt"):
            assert equation.invars[0].aval.dtype == np.float32
        if equation.primitive.name == "logistic":
            assert equation.invars[0].aval.dtype == ml_dtypes.bfloat16


def test_the_weights_of_a_router_are_not_rounded():
    graph = Graph("router")
    x = graph.input("x", tensor(F32, batch="B", seq="S", embed=16))
    router = graph.param("router", tensor(F32, expert=4, embed=16))
    bias = graph.param("bias", tensor(F32, expert=4))
    b = Builder(graph)
    logits = b.add(b.contract(x, router, over="embed"), bias)
    graph.set_output("gates", b.route(logits, top_k=1, gates="softmax")[1])
    weights = np.full((4, 16), 1 + 2**-10) * np.arange(4)[:, None]
    assert (weights.astype(ml_dtypes.bfloat16).astype(float) != weights).any()
    params = {"router": weights, "bias": np.zeros(4)}
    found, expected = run_both(graph, params, {"x": np.ones((1, 1, 16), np.float32)}, BF16)
    assert relative(found["gates"], expected["gates"]) <= 1e-6
