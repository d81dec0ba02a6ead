"""The lowering of the gated delta rule against the reference, its two ways and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moecc_backends.xla.backend import XlaBackend
from moecc_backends.xla.lower import scan

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import F32, F64, PRED, Builder, Graph, tensor
from moecc.ir.ops.recurrence import reads_as_it_goes
from moecc.testing import inputs_for, params_for

from .models import apply_passes, open_golden, run_both

KEYS = {"batch": "B", "kv_seq": "S", "head": 2}
FLOATS = {
    "query": {"batch": "B", "seq": "S", "head": 2, "head_dim": 3},
    "key": {**KEYS, "head_dim": 3},
    "value": {**KEYS, "group": 2, "value_dim": 4},
    "decay": {**KEYS, "group": 2},
    "rate": {**KEYS, "group": 2},
}
TEXTS, TOKENS = 2, 5


def rule_graph(*, is_causal):
    """Return a graph of the rule, whose queries see the keys up to their own, or what is given."""
    graph = Graph("rule")
    values = [graph.input(n, tensor(F32, **axes)) for n, axes in FLOATS.items()]
    builder = Builder(graph)
    if is_causal:
        positions = builder.positions(values[0], axis="seq")
        seen = builder.causal(positions, builder.rename(positions, axis="seq", to="kv_seq"))
    else:
        seen = graph.input("seen", tensor(PRED, batch="B", seq="S", kv_seq="S"))
    read = builder.delta_rule(*values, seen, over="head_dim", along="kv_seq")
    assert reads_as_it_goes(seen, "kv_seq") == ("seq" if is_causal else None)
    graph.set_output("read", read)
    return graph


def drawn():
    rng, sizes = np.random.default_rng(3), {"B": TEXTS, "S": TOKENS}
    arrays = {}
    for name, axes in FLOATS.items():
        shape = [sizes[s] if isinstance(s, str) else s for s in axes.values()]
        arrays[name] = (
            rng.uniform(0.1, 1, shape) if name in ("decay", "rate") else rng.normal(size=shape)
        )
    return arrays


def test_either_way_has_the_values_of_the_reference():
    rng, arrays = np.random.default_rng(4), drawn()
    some = {**arrays, "seen": rng.random((TEXTS, TOKENS, TOKENS)) < 0.6}
    below = np.tril(np.ones((TOKENS, TOKENS), bool))
    upto = {**arrays, "seen": np.broadcast_to(below, (TEXTS, TOKENS, TOKENS))}
    reads = []
    for is_causal, inputs in ((True, arrays), (False, upto), (False, some)):
        found, expected = run_both(rule_graph(is_causal=is_causal), {}, inputs)
        np.testing.assert_allclose(found["read"], expected["read"], rtol=1e-12)
        reads.append(expected["read"])
    np.testing.assert_array_equal(reads[0], reads[1])
    assert np.abs(reads[0] - reads[2]).max() > 0.1


def test_layers_of_a_loop_have_one_state(monkeypatch):
    ways = []

    def spied(seen, along):
        ways.append(reads_as_it_goes(seen, along))
        return ways[-1]

    monkeypatch.setattr(scan, "reads_as_it_goes", spied)
    with open_golden("qwen3_5_text_square") as model:
        keys = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 4}
        graph = build(parse_config({**model.checkpoint.config, **keys}))
    apply_passes(graph, "roll-layers")
    found, expected = run_both(graph, params_for(graph), inputs_for(graph))
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-9, atol=1e-12)
    assert set(ways) == {"seq"}


def test_gradients_are_those_of_small_steps():
    arrays = drawn()
    with jax.enable_x64():
        run = XlaBackend().function(rule_graph(is_causal=True), dtype=F64)
        total = jax.jit(lambda inputs: jnp.sum(jnp.sin(run({}, inputs)["read"])))
        for name, gradient in jax.grad(total)(arrays).items():
            step = 1e-5 * np.random.default_rng(5).normal(size=gradient.shape)
            ahead, behind = (total({**arrays, name: arrays[name] + s * step}) for s in (1, -1))
            moved = float(ahead - behind) / 2
            assert float(jnp.sum(gradient * step)) == pytest.approx(moved, rel=1e-6), name
