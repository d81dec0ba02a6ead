"""Policies, priorities, masks, groups, expert choice and random numbers: xla against the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

jax = pytest.importorskip("jax")

from moecc_backends.xla.backend import function  # noqa: E402

from moecc.backend import get_backend  # noqa: E402
from moecc.ir import F32, F64, I32, PRED, Builder, Graph, tensor  # noqa: E402
from moecc.ir.moe import (  # noqa: E402
    emit_dropout,
    emit_expert_choice,
    emit_jitter,
    emit_noise,
    emit_priority,
    emit_prototypes,
    emit_rescaled,
    emit_soft_slots,
)
from moecc.types import KEY  # noqa: E402

TOKENS = ("batch", "seq")
SEEDS = st.integers(0, 2**32 - 1)
EXPERTS, EMBED, MLP = 4, 6, 5


class Layer:
    """A layer to be built: its inputs, and a gated block that is lifted over ``expert``."""

    def __init__(self):
        self.graph = Graph()
        self.b = Builder(self.graph)
        self.x = self.graph.input("x", tensor(F32, batch="B", seq="S", embed=EMBED))
        self.key = self.graph.input("key", tensor(KEY))
        self.mask = self.graph.input("mask", tensor(PRED, batch="B", seq="S"))
        self.ids = self.graph.input("ids", tensor(I32, batch="B", seq="S"))
        shapes = {
            "router": {"expert": EXPERTS, "embed": EMBED},
            "bias": {"expert": EXPERTS},
            "up": {"expert": EXPERTS, "mlp": MLP, "embed": EMBED},
            "down": {"expert": EXPERTS, "embed": EMBED, "mlp": MLP},
            "phi": {"expert": EXPERTS, "slot": 3, "embed": EMBED},
        }
        self.w = {n: self.graph.param(n, tensor(F32, **s)) for n, s in shapes.items()}

    def logits(self, x):
        return self.b.contract(x, self.w["router"], over="embed")

    def block(self, rows):
        hidden = self.b.silu(self.b.contract(rows, self.w["up"], over="embed"))
        return self.b.contract(hidden, self.w["down"], over="mlp")

    def mixture(self, experts, gates, place):
        out = self.block(self.b.dispatch(self.x, experts, place))
        self.returns(y=self.b.combine(out, experts, place, gates), gates=gates, place=place)

    def returns(self, **outputs):
        for name, value in outputs.items():
            self.graph.set_output(name, value)


def policy(layer, slots):
    b = layer.b
    experts, gates = b.route(layer.logits(layer.x), top_k=2)
    keep = b.keep_choices(gates, b.random_uniform(layer.key, gates), threshold=0.4)
    place = b.assign_slots(experts, keep, tokens=TOKENS, experts=EXPERTS, using="keep", **slots)
    layer.mixture(experts, emit_rescaled(b, gates, place), place)


def prioritised(layer, slots):
    b = layer.b
    logits = layer.logits(layer.x)
    experts, gates = b.route(logits, top_k=2, gates="softmax")
    given = (emit_priority(b, logits), layer.mask)
    using = ("priority", "mask")
    place = b.assign_slots(experts, *given, tokens=TOKENS, experts=EXPERTS, using=using, **slots)
    layer.mixture(experts, gates, place)


def biased(layer, slots):
    b = layer.b
    noisy = emit_noise(b, layer.logits(emit_jitter(b, layer.x, layer.key, 0.1)), layer.key, 0.5)
    experts, gates = b.route(
        noisy, layer.w["bias"], top_k=2, gates="sigmoid-renormalised", using="bias"
    )
    place = b.assign_slots(experts, tokens=TOKENS, experts=EXPERTS, **slots)
    layer.mixture(experts, gates, place)


def prototypes(layer, slots):
    b = layer.b
    experts, gates = emit_prototypes(b, layer.logits(emit_dropout(b, layer.x, layer.key, 0.3)), 2)
    place = b.assign_slots(
        experts, layer.mask, tokens=TOKENS, experts=EXPERTS, using="mask", **slots
    )
    layer.mixture(experts, gates, place)


def hashed(layer, slots):
    b = layer.b
    experts = b.hash_experts(layer.ids, experts=EXPERTS, top_k=2, seed=5)
    gates = b.broadcast(b.constant(value=0.5), experts)
    place = b.assign_slots(experts, tokens=TOKENS, experts=EXPERTS, **slots)
    layer.mixture(experts, gates, place)


def chosen(layer, slots):
    attrs = {n: v for n, v in slots.items() if n not in ("slots", "order")}
    attrs = {"capacity_factor": 1.5, "minimum": 1, **attrs}
    layer.mixture(*emit_expert_choice(layer.b, layer.x, layer.w["router"], tokens=TOKENS, **attrs))


def soft(layer, slots):
    rows, weights = emit_soft_slots(layer.b, layer.x, layer.w["phi"])
    layer.returns(y=layer.b.contract(weights, layer.block(rows), over=("expert", "slot")))


SLOTS = (
    {},
    {"slots": "capacity", "capacity_factor": 1.0, "minimum": 1},
    {
        "slots": "capacity",
        "capacity_factor": 0.75,
        "minimum": 1,
        "group_size": 4,
        "order": "token",
        "multiple": 2,
    },
)


def arrays(layer, seed):
    rng = np.random.default_rng(seed)
    params = {
        n: rng.normal(size=v.type.shape).astype(np.float32) for n, v in layer.graph.params.items()
    }
    inputs = {
        "x": rng.normal(size=(2, 6, EMBED)).astype(np.float32),
        "key": np.uint64(rng.integers(0, 2**63)),
        "mask": rng.random((2, 6)) < 0.8,
        "ids": rng.integers(0, 1000, (2, 6)).astype(np.int32),
    }
    return params, inputs


CASES = (
    (policy, 0),
    (policy, 2),
    (prioritised, 1),
    (biased, 0),
    (prototypes, 2),
    (hashed, 1),
    (chosen, 2),
    (soft, 0),
)
"""Each routing with some kind of slots: every program has to be compiled."""

PROGRAMS = {}


def programs(case):
    """Return a layer and its programs, made once."""
    if case not in PROGRAMS:
        layer = Layer()
        build, slots = CASES[case]
        build(layer, SLOTS[slots])
        oracle = get_backend("reference").compile(layer.graph)
        PROGRAMS[case] = layer, oracle, get_backend("xla").compile(layer.graph, dtype=F64)
    return PROGRAMS[case]


@pytest.mark.parametrize("case", range(len(CASES)))
@given(seed=SEEDS)
@settings(max_examples=10)
def test_every_routing_agrees_with_the_oracle(case, seed):
    layer, oracle, xla = programs(case)
    params, inputs = arrays(layer, seed)
    expected, found = (p.run(params, inputs) for p in (oracle, xla))
    for name, value in expected.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12)
        else:
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(("build", "slots"), [CASES[1], CASES[2], CASES[6]])
def test_gradients_are_those_of_finite_differences(build, slots):
    """Along one random direction of all parameters and inputs at once, in float64."""
    layer = Layer()
    build(layer, SLOTS[slots])
    params, inputs = arrays(layer, 3)
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        run = function(layer.graph, dtype=F64)
        floats = {n: np.asarray(a, np.float64) for n, a in {**params, "x": inputs["x"]}.items()}
        key = jax.random.key(9)
        weights = rng.normal(size=inputs["x"].shape)

        def loss(values):
            given = {**inputs, "key": key, "x": values["x"]}
            outputs = run({n: values[n] for n in params}, given)
            return (outputs["y"] * weights).sum()

        ways = {n: rng.normal(size=a.shape) for n, a in floats.items()}
        both = jax.jit(jax.value_and_grad(loss))
        _, gradients = both(floats)
        slope = sum(np.vdot(gradients[n], ways[n]) for n in floats)
        h = 1e-6
        ahead, behind = (
            float(both({n: floats[n] + s * h * ways[n] for n in floats})[0]) for s in (1, -1)
        )
    assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-6, abs=1e-7)


def test_masked_rows_are_not_worked_on():
    """What stands in padding, NaN even, reaches no other token."""
    layer = Layer()
    prioritised(layer, SLOTS[1])
    params, inputs = arrays(layer, 1)
    x = inputs["x"].copy()
    program = get_backend("xla").compile(layer.graph)
    expected = program.run(params, inputs)["y"]
    x[~inputs["mask"]] = np.nan
    found = program.run(params, {**inputs, "x": x})["y"]
    np.testing.assert_array_equal(found[inputs["mask"]], expected[inputs["mask"]])
