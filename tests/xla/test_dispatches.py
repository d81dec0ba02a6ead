"""Every dispatch lowering is the dense one, in values and gradients, and reads nothing unused."""

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiers import examples

from moecc.errors import InputError
from moecc.ir import BF16, F32, F64, I32, PRED, Builder, Graph, tensor
from moecc.testing import run_reference

from .models import compiled

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from moecc_backends.xla.backend import function  # noqa: E402
from moecc_backends.xla.dispatch.choose import LAYOUTS, choose, why_not  # noqa: E402
from moecc_backends.xla.trace.context import Options  # noqa: E402
from moecc_backends.xla.trace.values import Routing  # noqa: E402

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

    def finish(self, experts, place, gates):
        """Put the experts between dispatch and combine."""
        b, p = self.b, self._param
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

    def _param(self, name, **axes):
        return self.graph.param(name, tensor(F32, **axes))


def chosen(top_k, slots, **attrs):
    """Tokens choose; a mask leaves some out."""
    groups = attrs.get("groups", 1)
    layer = Layer(groups)
    mask = layer.graph.input("mask", tensor(PRED, batch=BATCH, seq=SEQ))
    experts, gates = layer.b.route(layer.logits(), top_k=top_k, gates="softmax")
    place = layer.b.assign_slots(
        experts, mask, using=("mask",), tokens=("batch", "seq"), experts=EXPERTS, slots=slots,
        **attrs,
    )  # fmt: skip
    return layer.finish(experts, place, gates)


def unmasked(top_k):
    """Tokens choose, and nothing is ever dropped."""
    layer = Layer()
    experts, gates = layer.b.route(layer.logits(), top_k=top_k)
    place = layer.b.assign_slots(experts, tokens=("batch", "seq"), experts=EXPERTS)
    return layer.finish(experts, place, gates)


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
    place = layer.b.assign_slots(
        experts, tokens=("batch", "seq"), experts=EXPERTS, slots="capacity", capacity_factor=0.8,
        minimum=1,
    )  # fmt: skip
    return layer.finish(experts, place, gates)


BOUND = {"capacity_factor": 0.8, "minimum": 1, "convention": "assignments"}
ROUTINGS = {
    "dropless": lambda: unmasked(2),
    "dropless, masked, top-1": lambda: chosen(1, "ragged"),
    "capacity, top-2, groups": lambda: chosen(2, "capacity", groups=2, **BOUND),
    "capacity, top-3, token-major": lambda: chosen(3, "capacity", order="token", **BOUND),
    "expert choice": expert_choice,
    "hash": hashed,
}
QUICK = ("capacity, top-2, groups",)


def legal(graph):
    return [n for n in LAYOUTS if all(why_not(n, p) is None for p in _places(graph))]


def _places(graph):
    return [n.results[-1] for n in graph if n.op.name in ("assign_slots", "expert_choice")]


def draw(graph, seed, skew):
    """Draw experts that differ, tokens, and a mask; `skew` sends more and more to one expert."""
    rng = np.random.default_rng(seed)
    params = {n: rng.normal(size=p.type.shape) for n, p in graph.params.items()}
    if "router" in params:
        params["router"][0] *= skew
    inputs = {}
    for name, value in graph.inputs.items():
        shape, kind = value.type.shape, value.type.dtype.kind
        inputs[name] = {
            "float": lambda s=shape: rng.normal(size=s),
            "int": lambda s=shape: rng.integers(0, 50, s).astype(np.int32),
            "bool": lambda s=shape: rng.random(s) < 0.8,
        }[kind]()
    return params, inputs


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


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ROUTINGS if n not in QUICK]


@pytest.mark.parametrize("dtype", [F64, pytest.param(F32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
@given(seed=st.integers(0, 2**31), skew=st.sampled_from((0.0, 1.0, 30.0)))
@settings(max_examples=examples(6, 20))
def test_every_lowering_is_the_dense_one(name, dtype, seed, skew):
    """Values are those of the reference, gradients those of the oracle; NaN in unused rows too."""
    # In float32 the probabilities of several tokens are then 1, and which come first is another.
    assume(not (name == "expert choice" and dtype == F32 and skew == 30.0))
    graph = ROUTINGS[name]()
    data = draw(graph, seed, skew)
    expected = run_reference(graph, params=data[0], inputs=data[1])["y"]
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


def test_the_choice_by_platform_and_shape():
    (ragged,) = _places(ROUTINGS["dropless"]())
    (bound,) = _places(ROUTINGS["capacity, top-3, token-major"]())
    cases = [
        (ragged, routing(64, 8, None), "cpu", "grouped"),
        (ragged, routing(64, 8, None), "tpu", "ragged_dot"),
        (ragged, routing(64, 8, None), "gpu", "grouped"),
        (ragged, routing(1, 8, None), "tpu", "gathered"),
        (ragged, routing(4, 8, None), "cpu", "grouped"),
        (ragged, routing(5, 8, None), "cpu", "grouped"),
        (ragged, routing(1, 64, None), "cpu", "grouped"),
        (bound, routing(64, 8, 20), "cpu", "gather"),
        (ragged, routing(256, 8, None), "cpu", "blocks"),
        (ragged, routing(256, 8, None), "gpu", "grouped"),
        (bound, routing(64, 8, 64), "cpu", "grouped"),
        (bound, routing(256, 8, 256), "cpu", "blocks"),
        (bound, routing(64, 8, 64), "tpu", "ragged_dot"),
    ]
    for place, routed, platform, expected in cases:
        assert choose(place, routed, Options(platform=platform), jnp.float32) == expected
    session = Options(platform="cpu", in_place=True)
    listed = [(4, 8, "used"), (5, 8, "grouped"), (1, 64, "grouped")]
    for tokens, experts, expected in listed:
        found = choose(ragged, routing(tokens, experts, None), session, jnp.float32)
        assert found == expected, "experts are read in place"


def ragged_products(platform):
    """The types that ragged products are asked for in, forward and backward."""
    graph = unmasked(2)
    run = function(graph, dtype=BF16, options=Options("ragged_dot", platform=platform))
    params = {n: jnp.ones(p.type.shape) for n, p in graph.params.items()}
    inputs = {n: jnp.ones(v.type.shape) for n, v in graph.inputs.items()}
    traced = jax.make_jaxpr(jax.grad(lambda w, x: run(w, x)["y"].sum()))(params, inputs)
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
    place = layer.b.assign_slots(
        experts, tokens=("batch", "seq"), experts=EXPERTS, slots="capacity", capacity_factor=4.0
    )
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
        for name in ("sums", "y"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-12)
