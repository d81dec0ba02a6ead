"""What is no converted block stays as it was written: the same equations, loops and checkpoints.

Blocks are replaced by one equation that no model has, in the converted function and by hand in the
user's; then both have the same equations in the same order.
"""

from functools import partial

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.jaxpr.run import Execution  # noqa: E402

from moecc import jax as mx  # noqa: E402

from . import decoder  # noqa: E402

TOKENS = decoder.tokens()
LAYERS = 3


def marker(p, x):
    return jax.lax.erf_inv(x)


def unrolled(params, tokens, ffns):
    x = params["embed"][tokens]
    for p, ffn in zip(params["layers"], ffns, strict=True):
        x = decoder.layer(p, x, ffn)
    return x @ params["head"]


def scanned(params, tokens, ffns):
    policy = jax.checkpoint_policies.dots_saveable

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def step(x, p):
        return decoder.layer(p, x, ffns[0]), jnp.mean(x)

    x, means = jax.lax.scan(step, params["embed"][tokens], params["layers"], unroll=2)
    y = jax.lax.cond(means[0] > 0, lambda x: jnp.sort(x, 1), lambda x: x, x)
    return y @ params["head"]


def equations(jaxpr):
    """Return the equations of a jaxpr as text, calls inlined, inner jaxprs as such lists."""
    found = []
    for equation in jaxpr.eqns:
        inner = {n: _lists(v) for n, v in equation.params.items() if _jaxprs(v)}
        if equation.primitive.name in ("jit", "pjit", "closed_call"):
            found += inner["jaxpr"][0]
            continue
        kept = {n: str(v) for n, v in equation.params.items() if n in KEPT}
        shapes = [str(v.aval) for v in (*equation.invars, *equation.outvars)]
        # What a loop or a checkpoint takes are other arrays: those of experts are not of the user.
        found.append((equation.primitive.name, kept, inner or shapes))
    return found


KEPT = (
    "dimension_numbers", "precision", "axes", "axis", "permutation", "new_sizes", "shape",
    "broadcast_dimensions", "new_dtype", "length", "reverse", "unroll", "policy", "prevent_cse",
    "mode", "slice_sizes", "start_indices", "limit_indices",
)  # fmt: skip


def _jaxprs(value):
    parts = value if isinstance(value, tuple | list) else [value]
    return [getattr(p, "jaxpr", p) for p in parts if hasattr(p, "eqns") or hasattr(p, "jaxpr")]


def _lists(value):
    return [equations(jaxpr) for jaxpr in _jaxprs(value)]


def converted_and_by_hand(model, params, pipeline, ffns, monkeypatch):
    dense = partial(model, ffns=[decoder.swiglu] * LAYERS)
    moe = mx.convert(dense, params, TOKENS, pipeline)

    def run(self, part, arrays, dtype, *, side):
        return marker(None, arrays[part.x]), ()

    monkeypatch.setattr(Execution, "run", run)
    found = jax.make_jaxpr(moe(dense))(moe.params, TOKENS)
    expected = jax.make_jaxpr(partial(model, ffns=ffns))(params, TOKENS)
    return equations(found.jaxpr), equations(expected.jaxpr)


def test_a_model_layer_by_layer(monkeypatch):
    """A block that is left alone has its equations, and so the same bits."""
    ffns = [decoder.swiglu, marker, decoder.swiglu]
    pipeline = "upcycle{experts=4 layers=1}"
    found, expected = converted_and_by_hand(
        unrolled, decoder.init(LAYERS), pipeline, ffns, monkeypatch
    )
    assert found == expected
    assert sum(name == "erf_inv" for name, *_ in found) == 1


def test_a_scan_of_checkpoints(monkeypatch):
    params = decoder.init(LAYERS)
    params["layers"] = jax.tree.map(lambda *each: jnp.stack(each), *params["layers"])
    found, expected = converted_and_by_hand(
        scanned, params, "upcycle{experts=4}", [marker] * LAYERS, monkeypatch
    )
    assert found == expected
    (scan,) = [one for one in found if one[0] == "scan"]
    assert "erf_inv" in str(scan)
    assert "remat" in str(scan) or "checkpoint" in str(scan)
