"""The whole way from logits to weights of slots, against other descriptions of the same.

mesh-tensorflow and flaxformer say it with one-hot tensors and running sums (ST-MoE, Appendix G, and
Switch, Appendix); here it is ``route``, ``keep_choices``, ``assign_slots`` and the gates of
``combine``. What is compared is the tensor of combine weights, ``[group, token, expert, slot]``.
"""

from functools import cache

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import F64, PRED, Builder, Graph, tensor
from moecc.ir.moe import emit_priority
from moecc.testing import run_reference

from .layers import normal, softmax

SEEDS = st.integers(0, 2**32 - 1)
GROUPS, SIZE, EXPERTS = 2, 12, 4


@cache
def gating(top_k, gates, policy="all", *, mask=False, priority=False, **placement):
    """Return a graph from logits ``[token, expert]`` to experts, gates and slots."""
    graph = Graph()
    b = Builder(graph)
    logits = graph.input("logits", tensor(F64, token="T", expert=EXPERTS))
    experts, weights = b.route(logits, top_k=top_k, gates=gates)
    given = {}
    if policy != "all":
        options = {"threshold": 0.45} if policy == "threshold" else {}
        given["keep"] = b.keep_choices(weights, policy=policy, **options)
    if priority:
        given["priority"] = emit_priority(b, logits)
    if mask:
        given["mask"] = graph.input("mask", tensor(PRED, token="T"))
    slots = b.assign_slots(
        experts, *given.values(), tokens="token", experts=EXPERTS, using=tuple(given),
        slots="capacity", groups=GROUPS, **placement,
    )  # fmt: skip
    for name, value in {"experts": experts, "gates": weights, "slots": slots}.items():
        graph.set_output(name, value)
    return graph


def combine_weights(graph, slots, **inputs):
    """Return the combine weights that the graph gives."""
    outputs = run_reference(graph, inputs=inputs)
    weights = np.zeros((GROUPS * SIZE, EXPERTS, slots))
    for token, choice in np.argwhere(outputs["slots"] >= 0):
        expert, slot, gate = (outputs[n][token, choice] for n in ("experts", "slots", "gates"))
        weights[token, expert, slot] += gate
    return weights.reshape(GROUPS, SIZE, EXPERTS, slots)


def one_hot(index, size):
    return (index[..., None] == np.arange(size)).astype(float)


def before(counted):
    """Return for each token how many of those before it there are, ``[group, token, expert]``."""
    return np.cumsum(counted, 1) - counted


def filled(mine, position, gate, slots):
    """Return the combine weights of one choice; beyond the last slot there is none."""
    return gate[..., None, None] * mine[..., None] * one_hot(position.astype(int), slots)


# --- mesh-tensorflow: two choices, normalised, with a policy for the second


def as_mesh_tensorflow(logits, slots, policy, mask):
    p = softmax(logits)
    first = one_hot(p.argmax(-1), EXPERTS)
    second = one_hot((p * (1 - first)).argmax(-1), EXPERTS)
    gates = [(p * mine).sum(-1) for mine in (first, second)]
    total = gates[0] + gates[1] + 1e-9
    gates = [g / total for g in gates]
    first, second = (mine * mask[..., None] for mine in (first, second))
    second = second * {"all": 1, "none": 0, "threshold": (gates[1] > 0.45)[..., None]}[policy]
    position = before(first)
    kept = (first * (position < slots)).sum(1, keepdims=True)
    weights = filled(first, position, gates[0], slots)
    return weights + filled(second, before(second) + kept, gates[1], slots)


@given(
    SEEDS,
    st.sampled_from([0.5, 1.25, 2.0]),
    st.sampled_from(["all", "none", "threshold"]),
    st.booleans(),
)
def test_the_gating_of_mesh_tensorflow(seed, factor, policy, mask):
    """Equal but for the 1e-9 that it adds to the sum of the gates."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(GROUPS * SIZE, EXPERTS))
    padding = rng.random(GROUPS * SIZE) < 0.7 if mask else np.ones(GROUPS * SIZE, bool)
    rule = {"capacity_factor": factor, "minimum": 1}
    slots = min(SIZE, int(factor * SIZE / EXPERTS))
    graph = gating(2, "renormalised", policy, mask=mask, **rule)
    found = combine_weights(graph, slots, logits=logits, **({"mask": padding} if mask else {}))
    expected = as_mesh_tensorflow(
        logits.reshape(GROUPS, SIZE, EXPERTS), slots, policy, padding.reshape(GROUPS, SIZE)
    )
    np.testing.assert_allclose(found, expected, rtol=3e-9, atol=0)


# --- flaxformer: any number of choices, not normalised, by priority


def as_flaxformer(logits, top_k, slots, prioritised):
    p = softmax(logits)
    turns = np.tile(np.arange(SIZE), (GROUPS, 1))
    if prioritised:
        turns = np.argsort(-p.max(-1), axis=1, kind="stable")
    sorted_p = np.take_along_axis(p, turns[..., None], 1)
    best = np.argsort(-sorted_p, axis=-1, kind="stable")[..., :top_k]
    # All first choices of a group, then all second ones.
    line = one_hot(best.swapaxes(1, 2).reshape(GROUPS, top_k * SIZE), EXPERTS)
    position = before(line).reshape(GROUPS, top_k, SIZE, EXPERTS)
    line = line.reshape(position.shape)
    gates = np.take_along_axis(sorted_p, best, 2)
    weights = sum(
        filled(line[:, choice], position[:, choice], gates[..., choice], slots)
        for choice in range(top_k)
    )
    restored = np.zeros_like(weights)
    np.put_along_axis(restored, turns[..., None, None], weights, 1)
    return restored


@given(SEEDS, st.sampled_from([0.5, 1.0, 1.5]), st.integers(1, 3), st.booleans())
def test_the_gating_of_flaxformer(seed, factor, top_k, prioritised):
    logits = normal(seed, GROUPS * SIZE, EXPERTS)
    rule = {"capacity_factor": factor, "rounding": "round", "cap": False, "minimum": 1}
    slots = round(factor * SIZE / EXPERTS)
    graph = gating(top_k, "softmax", priority=prioritised, **rule)
    found = combine_weights(graph, slots, logits=logits)
    expected = as_flaxformer(logits.reshape(GROUPS, SIZE, EXPERTS), top_k, slots, prioritised)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
