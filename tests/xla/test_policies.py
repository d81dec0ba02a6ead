"""In which type what is computed, and with which operations."""

import ml_dtypes
import numpy as np
import pytest

from moecc.ir import Graph
from moecc.ir.builder import Builder
from moecc.testing import run_reference
from moecc.types import BF16, F32, tensor

from .models import compiled, decoder, relative

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402


def products(jaxpr):
    """Yield the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("options", [{}, {"slots": "capacity"}], ids=["ragged", "capacity"])
def test_the_router_computes_in_float32_and_nothing_else_does(options):
    graph, params, inputs = decoder("llama_gqa", experts=7, **options)
    jaxpr = jax.make_jaxpr(function(graph, dtype=BF16))(params, inputs)
    equations = list(products(jaxpr.jaxpr))
    names = {e.primitive.name for e in equations}
    assert not {n for n in names if "ragged_dot" in n}
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
    only = Graph("router")
    x = only.input("x", tensor(F32, batch="B", seq="S", embed=16))
    router = only.param("router", tensor(F32, expert=4, embed=16))
    bias = only.param("bias", tensor(F32, expert=4))
    b = Builder(only)
    logits = b.add(b.contract(x, router, over="embed"), bias)
    only.set_output("gates", b.route(logits, top_k=1, gates="softmax")[1])
    data = {"x": np.ones((1, 1, 16), np.float32)}
    weights = np.full((4, 16), 1 + 2**-10) * np.arange(4)[:, None]
    assert (weights.astype(ml_dtypes.bfloat16).astype(float) != weights).any()
    arrays = {"router": weights, "bias": np.zeros(4)}
    expected = run_reference(only, params=arrays, inputs=data)["gates"]
    found = compiled(only, BF16).run(arrays, data)["gates"]
    assert relative(found, expected) <= 1e-6
