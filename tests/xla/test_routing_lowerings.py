"""Policies, priorities, masks, groups, expert choice and random numbers: xla against the oracle."""

from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_backends.xla.backend import function

from moecc.backend import get_backend
from moecc.ir import F32, F64, I32, PRED, Builder, Graph, TensorType, tensor
from moecc.ir.moe import (
    emit_dropout,
    emit_expert_choice,
    emit_jitter,
    emit_noise,
    emit_priority,
    emit_prototypes,
    emit_rescaled,
    emit_soft_slots,
)
from moecc.types import KEY

from .models import compiled, normal

TOKENS = ("batch", "seq")
EXPERTS, EMBED, MLP = 4, 6, 5


class Layer:
    """A layer to be built: its inputs, and a gated block that is lifted over ``expert``."""

    def __init__(self, slots):
        self.slots = slots
        self.graph = Graph()
        self.b = Builder(self.graph)
        each = {"batch": "B", "seq": "S"}
        self.x = self.graph.input("x", tensor(F32, **each, embed=EMBED))
        self.key = self.graph.input("key", TensorType(KEY))
        self.mask = self.graph.input("mask", tensor(PRED, **each))
        self.ids = self.graph.input("ids", tensor(I32, **each))
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

    def assign(self, experts, *operands, using=()):
        return self.b.assign_slots(
            experts, *operands, tokens=TOKENS, experts=EXPERTS, using=using, **self.slots
        )

    def block(self, rows):
        hidden = self.b.silu(self.b.contract(rows, self.w["up"], over="embed"))
        return self.b.contract(hidden, self.w["down"], over="mlp")

    def mixture(self, experts, gates, place):
        out = self.block(self.b.dispatch(self.x, experts, place))
        outputs = {"y": self.b.combine(out, experts, place, gates), "gates": gates, "place": place}
        for name, value in outputs.items():
            self.graph.set_output(name, value)


def policy(layer):
    b = layer.b
    experts, gates = b.route(layer.logits(layer.x), top_k=2)
    keep = b.keep_choices(gates, b.random_uniform(layer.key, gates), threshold=0.4)
    place = layer.assign(experts, keep, using="keep")
    layer.mixture(experts, emit_rescaled(b, gates, place), place)


def prioritised(layer):
    logits = layer.logits(layer.x)
    experts, gates = layer.b.route(logits, top_k=2, gates="softmax")
    priority = emit_priority(layer.b, logits)
    place = layer.assign(experts, priority, layer.mask, using=("priority", "mask"))
    layer.mixture(experts, gates, place)


def biased(layer):
    b = layer.b
    noisy = emit_noise(b, layer.logits(emit_jitter(b, layer.x, layer.key, 0.1)), layer.key, 0.5)
    experts, gates = b.route(
        noisy, layer.w["bias"], top_k=2, gates="sigmoid-renormalised", using="bias"
    )
    layer.mixture(experts, gates, layer.assign(experts))


def prototypes(layer):
    logits = layer.logits(emit_dropout(layer.b, layer.x, layer.key, 0.3))
    experts, gates = emit_prototypes(layer.b, logits, 2)
    layer.mixture(experts, gates, layer.assign(experts, layer.mask, using="mask"))


def hashed(layer):
    b = layer.b
    experts = b.hash_experts(layer.ids, experts=EXPERTS, top_k=2, seed=5)
    gates = b.broadcast(b.constant(value=0.5), experts)
    layer.mixture(experts, gates, layer.assign(experts))


def chosen(layer):
    bound = {"capacity_factor": 0.75, "minimum": 1, "group_size": 4, "multiple": 2}
    layer.mixture(*emit_expert_choice(layer.b, layer.x, layer.w["router"], tokens=TOKENS, **bound))


def soft(layer):
    rows, weights = emit_soft_slots(layer.b, layer.x, layer.w["phi"])
    y = layer.b.contract(weights, layer.block(rows), over=("expert", "slot"))
    layer.graph.set_output("y", y)


RAGGED = {}
CAPACITY = {"slots": "capacity", "capacity_factor": 1.0, "minimum": 1}
TIGHT = {
    "slots": "capacity", "capacity_factor": 0.75, "minimum": 1, "group_size": 4, "order": "token",
    "multiple": 2,
}  # fmt: skip
CASES = {
    "policy": (policy, RAGGED),
    "policy, few slots": (policy, TIGHT),
    "priorities": (prioritised, CAPACITY),
    "bias": (biased, RAGGED),
    "prototypes": (prototypes, TIGHT),
    "hash": (hashed, CAPACITY),
    "expert choice": (chosen, RAGGED),
    "soft": (soft, RAGGED),
}
"""Each routing with some kind of slots: every program has to be compiled."""


@cache
def layer_of(case):
    build, slots = CASES[case]
    layer = Layer(slots)
    build(layer)
    return layer.graph


def arrays(graph, seed):
    rng = np.random.default_rng(seed)
    params = normal(rng, graph.params, "f4")
    inputs = {
        "x": rng.normal(size=(2, 6, EMBED)).astype(np.float32),
        "key": np.uint64(rng.integers(0, 2**63)),
        "mask": rng.random((2, 6)) < 0.8,
        "ids": rng.integers(0, 1000, (2, 6)).astype(np.int32),
    }
    return params, inputs


@cache
def programs(case):
    return get_backend("reference").compile(layer_of(case)), compiled(layer_of(case), F64)


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_every_routing_agrees_with_the_oracle(case, seed):
    expected, found = (p.run(*arrays(layer_of(case), seed)) for p in programs(case))
    for name, value in expected.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12)
        else:
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("case", ["policy, few slots", "priorities", "expert choice"])
def test_gradients_are_those_of_finite_differences(case):
    """Along one random direction of all parameters and inputs at once, in float64."""
    graph = layer_of(case)
    params, inputs = arrays(graph, 3)
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        run = function(graph, dtype=F64)
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
    params, inputs = arrays(layer_of("priorities"), 1)
    program = get_backend("xla").compile(layer_of("priorities"))
    x, mask = inputs["x"].copy(), inputs["mask"]
    x[~mask] = np.nan
    found, expected = (program.run(params, {**inputs, "x": a})["y"] for a in (x, inputs["x"]))
    np.testing.assert_array_equal(found[mask], expected[mask])
