"""Every dispatch lowering is the dense one, in values and gradients, and reads nothing unused."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moecc_backends.xla.backend import function
from moecc_backends.xla.dispatch.choose import LAYOUTS, choose, why_not
from moecc_backends.xla.trace.context import Options
from moecc_backends.xla.trace.values import Routing
from tiers import examples, some

from moecc.errors import InputError
from moecc.ir import BF16, F32, F64, I32, PRED, Builder, Graph, tensor
from moecc.testing import run_reference

from .models import compiled, normal

BATCH, SEQ, EMBED, MLP, EXPERTS = 2, 6, 4, 5, 3
ORACLE = "used"
"""All tokens at each expert: it moves no row, and its gradients are compared with differences."""
CLOSE = {F32: 1e-5, F64: 1e-12}


class Layer:
    """A layer of gated experts with biases and a norm, routed in some way."""

    def __init__(self, groups=1):
        self.graph = Graph("layer")
        self.b = Builder(self.graph, loc="layers.0.ffn")
        self.x = self.graph.input("x", tensor(F32, batch=BATCH, seq=SEQ, embed=EMBED))
        self.groups = groups

    def logits(self):
        router = self.graph.param("router", tensor(F32, expert=EXPERTS, embed=EMBED))
        return self.b.contract(self.x, router, over="embed")

    def assign(self, experts, *operands, **attrs):
        return self.b.assign_slots(
            experts, *operands, tokens=("batch", "seq"), experts=EXPERTS, **attrs
        )

    def finish(self, experts, place, gates):
        """Put the experts between dispatch and combine."""

        def p(name, **axes):
            return self.graph.param(name, tensor(F32, **axes))

        b = self.b
        rows = b.rms_norm(b.dispatch(self.x, experts, place), p("norm", embed=EMBED), axis="embed")
        gate = b.contract(rows, p("gate", expert=EXPERTS, mlp=MLP, embed=EMBED), over="embed")
        up = b.contract(rows, p("up", expert=EXPERTS, mlp=MLP, embed=EMBED), over="embed")
        gate = b.add(gate, p("bias", expert=EXPERTS, mlp=MLP))
        if self.groups > 1:
            gate = b.add(gate, p("of_group", group=self.groups, mlp=MLP))
        shared = b.contract(up, p("shared", mlp=MLP, wide=MLP), over="mlp")
        middle = b.mul(b.silu(gate), b.rename(shared, axis="wide", to="mlp"))
        out = b.contract(middle, p("down", expert=EXPERTS, embed=EMBED, mlp=MLP), over="mlp")
        self.graph.set_output("y", b.combine(out, experts, place, gates))
        return self.graph


def chosen(top_k, gates="softmax", is_masked=True, **attrs):
    """Tokens choose; a mask leaves some out."""
    layer = Layer(attrs.get("groups", 1))
    mask_type = tensor(PRED, batch=BATCH, seq=SEQ)
    masks = {"mask": layer.graph.input("mask", mask_type)} if is_masked else {}
    experts, weights = layer.b.route(layer.logits(), top_k=top_k, gates=gates)
    place = layer.assign(experts, *masks.values(), using=tuple(masks), **attrs)
    return layer.finish(experts, place, weights)


dropless = partial(chosen, 2, "renormalised", is_masked=False)


def expert_choice():
    """Experts choose."""
    layer = Layer(2)
    scores = layer.b.softmax(layer.logits(), axis="expert")
    experts, gates, place = layer.b.expert_choice(
        scores, tokens=("batch", "seq"), experts=EXPERTS, groups=2, capacity_factor=1.0, minimum=1
    )
    return layer.finish(experts, place, gates)


def hashed():
    """A hash of token ids chooses."""
    layer = Layer()
    ids = layer.graph.input("ids", tensor(I32, batch=BATCH, seq=SEQ))
    gates = layer.graph.input("gates", tensor(F32, batch=BATCH, seq=SEQ, choice=2))
    experts = layer.b.hash_experts(ids, experts=EXPERTS, top_k=2)
    place = layer.assign(experts, slots="capacity", capacity_factor=0.8, minimum=1)
    return layer.finish(experts, place, gates)


bound = partial(chosen, slots="capacity", capacity_factor=0.8, minimum=1, convention="assignments")
ROUTINGS = {
    "dropless": dropless,
    "dropless, masked, top-1": partial(chosen, 1),
    "capacity, top-2, groups": partial(bound, 2, groups=2),
    "capacity, top-3, token-major": partial(bound, 3, order="token"),
    "expert choice": expert_choice,
    "hash": hashed,
}


def legal(graph):
    return [n for n in LAYOUTS if all(why_not(n, p) is None for p in _places(graph))]


def _places(graph):
    return [n.results[-1] for n in graph if n.op.name in ("assign_slots", "expert_choice")]


def draw(graph, seed, skew):
    """Draw experts that differ, tokens, and a mask; `skew` sends more and more to one expert."""
    rng = np.random.default_rng(seed)
    params = normal(rng, graph.params)
    if "router" in params:
        params["router"][0] *= skew
    draws = {
        "float": rng.normal,
        "int": lambda size: rng.integers(0, 50, size).astype(np.int32),
        "bool": lambda size: rng.random(size) < 0.8,
    }
    return params, {n: draws[v.type.dtype.kind](size=v.type.shape) for n, v in graph.inputs.items()}


@cache
def step(name, dispatch, dtype, poison):
    """Compile values and gradients of a routing, lowered in one way."""
    graph = ROUTINGS[name]()
    run = function(graph, dtype=dtype, options=Options(dispatch, poison=poison))

    def loss(params, floats, rest, weights):
        y = run(params, {**floats, **rest})["y"]
        return (y * weights).sum(), y

    with jax.enable_x64(dtype == F64):
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def results(name, dispatch, dtype, data, *, poison):
    """Return the values, and the gradients by name."""
    params, inputs = data
    floats = {n: a for n, a in inputs.items() if a.dtype.kind == "f"}
    rest = {n: a for n, a in inputs.items() if n not in floats}
    weights = np.random.default_rng(1).normal(size=(BATCH, SEQ, EMBED))
    with jax.enable_x64(dtype == F64):
        (_, y), (d_params, d_inputs) = step(name, dispatch, dtype, poison)(
            params, floats, rest, weights
        )
    return np.asarray(y), {n: np.asarray(a) for n, a in (d_params | d_inputs).items()}


def assert_near(found, expected, dtype, name):
    size = max(1.0, float(np.abs(expected).max()))
    assert np.abs(found - expected).max() <= CLOSE[dtype] * size, name


@pytest.mark.parametrize("dtype", [F64, pytest.param(F32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", some(ROUTINGS, "capacity, top-2, groups"))
@given(seed=st.integers(0, 2**31), skew=st.sampled_from((0.0, 1.0, 30.0)))
@settings(max_examples=examples(6, 20))
def test_every_lowering_is_the_dense_one(name, dtype, seed, skew):
    """Values are those of the reference, gradients those of the oracle; NaN in unused rows too."""
    # In float32 the probabilities of several tokens are then 1, and which come first is another.
    assume(not (name == "expert choice" and dtype == F32 and skew == 30.0))
    graph = ROUTINGS[name]()
    params, inputs = data = draw(graph, seed, skew)
    expected = run_reference(graph, params=params, inputs=inputs)["y"]
    _, gradients = results(name, ORACLE, dtype, data, poison=False)
    assert gradients.keys() >= {"x", "gate", "up", "down", "norm", "shared", "bias"}
    for dispatch in legal(graph):
        y, found = results(name, dispatch, dtype, data, poison=True)
        assert_near(y, expected, dtype, dispatch)
        for parameter, gradient in gradients.items():
            assert_near(found[parameter], gradient, dtype, f"{dispatch}: {parameter}")


# --- what is chosen, and refused


def routing(tokens, experts, capacity):
    names = jnp.zeros((tokens, 2), jnp.int32)
    return Routing(names, names, None, experts, 1, capacity, ("token",), (tokens,))


@pytest.mark.parametrize(
    ("platform", "tokens", "experts", "capacity", "strategy"),
    [
        ("cpu", 64, 8, None, "grouped"),
        ("tpu", 64, 8, None, "ragged_dot"),
        ("gpu", 64, 8, None, "grouped"),
        ("tpu", 1, 8, None, "gathered"),
        ("cpu", 4, 8, None, "grouped"),
        ("cpu", 5, 8, None, "grouped"),
        ("cpu", 1, 64, None, "grouped"),
        ("cpu", 64, 8, 20, "gather"),
        ("cpu", 256, 8, None, "blocks"),
        ("gpu", 256, 8, None, "grouped"),
        ("cpu", 64, 8, 64, "grouped"),
        ("cpu", 256, 8, 256, "blocks"),
        ("tpu", 64, 8, 64, "ragged_dot"),
        # Where experts are read in place.
        ("session", 4, 8, None, "used"),
        ("session", 5, 8, None, "grouped"),
        ("session", 1, 64, None, "grouped"),
    ],
)
def test_the_choice_by_platform_and_shape(platform, tokens, experts, capacity, strategy):
    (place,) = _places(dropless() if capacity is None else bound(3, order="token"))
    options = (
        Options(platform="cpu", in_place=True)
        if platform == "session"
        else Options(platform=platform)
    )
    assert choose(place, routing(tokens, experts, capacity), options, jnp.float32) == strategy


def ragged_products(platform):
    """The types that ragged products are asked for in, forward and backward."""
    graph = dropless()
    run = function(graph, dtype=BF16, options=Options("ragged_dot", platform=platform))
    ones = (
        {n: jnp.ones(v.type.shape) for n, v in values.items()}
        for values in (graph.params, graph.inputs)
    )
    traced = jax.make_jaxpr(jax.grad(lambda w, x: run(w, x)["y"].sum()))(*ones)
    return re.findall(r":(\w+)\[[\d,]*\] = ragged_dot_general", str(traced))


def test_ragged_products_for_accelerators_are_narrow_forward_and_backward():
    """A kernel writes what it is asked for: float32 rows would take twice the memory."""
    # Three products, and the gradients of their rows; those of weights are loops.
    assert ragged_products("tpu") == ["bf16"] * 6
    # A CPU would sum in the type of the result.
    assert ragged_products("cpu") == ["f32"] * 6


def test_where_rows_meet_they_lie_in_slots():
    layer = Layer()
    experts, gates = layer.b.route(layer.logits(), top_k=2)
    place = layer.assign(experts, slots="capacity", capacity_factor=4.0)
    rows = layer.b.dispatch(layer.x, experts, place)
    layer.graph.set_output("sums", layer.b.sum(rows, axes=("slot",)))
    layer.graph.set_output("y", layer.b.combine(rows, experts, place, gates))
    assert choose(place, routing(12, EXPERTS, 12), Options(platform="cpu"), jnp.float32) == "gather"
    assert legal(layer.graph) == ["gather"]
    with pytest.raises(InputError) as error:
        compiled(layer.graph, F64, options=Options("grouped"))
    (problem,) = error.value.problems
    assert "mixes the rows along slot" in str(problem.found)
    assert problem.expected == "auto, gather"
    params, inputs = draw(layer.graph, 0, 1.0)
    expected = run_reference(layer.graph, params=params, inputs=inputs)
    for dispatch in ("auto", "gather"):
        program = compiled(layer.graph, F64, options=Options(dispatch, poison=True))
        found = program.run(params, inputs)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-12, atol=1e-12)
