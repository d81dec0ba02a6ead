"""Every parameter that is trained gets a gradient, in every family; a frozen one gets none."""

import jax
import numpy as np
import pytest
from tiers import few

from moecc.ir import clone
from moecc.ir.conventions import LOGITS
from moecc.model.inputs import default_inputs
from moecc.train.graphs import StepPasses, step_graph
from moecc.train.recipe import OptimizerSection, ParameterGroup
from tests.xla.models import apply_passes, open_golden, random_params

from .small import make_step

CASES = ("mixtral_square", "glm4_moe_square", "t5_gated_untied", "bert_square")
BATCH, SEQ = 4, 8


def golden_graph(case):
    with open_golden(case) as model:
        return clone(model.graph)


def step_of(graph, groups=()):
    routed = any(node.op.assigns_slots for node in graph)
    losses = {"parts": 1, "replace": True} if routed else None
    # An encoder that is stored without a head makes its logits by its embedding.
    passes = StepPasses(tied=LOGITS not in graph.output_names, routed=routed,
                        groups=BATCH if routed else None, losses=losses, rolled=False)  # fmt: skip
    inputs = default_inputs(graph, batch=BATCH, seq=SEQ)
    sizes = {
        str(axis.size): size
        for n, value in graph.inputs.items()
        for axis, size in zip(value.type, inputs[n].shape, strict=True)
    }
    return make_step(step_graph(graph, passes), sizes, OptimizerSection("sgd", groups=groups))


def gradients_of(step, graph):
    """Return gradients at random parameters, so that experts differ."""
    params = random_params(step.graph, 3)
    inputs = default_inputs(graph, batch=BATCH, seq=SEQ)
    targets = inputs["decoder_tokens" if "decoder_tokens" in inputs else "tokens"]
    batch = {**inputs, "targets": np.roll(targets, -1, 1)}
    trained = {n: params.pop(n) for n in step.trained}
    slopes, _ = jax.jit(step.gradients)(trained, params, batch, jax.random.key(0))
    return {n: np.asarray(a) for n, a in slopes.items()}


def _only_chooses(param):
    return all(node.op.chooses and node.operands[0] is not param for node in param.users)


@pytest.mark.parametrize("case", few(CASES))
def test_every_parameter_of_a_family_is_trained(case):
    graph = golden_graph(case)
    step = step_of(graph)
    slopes = gradients_of(step, graph)
    used = {n for n, p in graph.params.items() if p.users}
    # A balance bias is moved by what was chosen, outside of the optimiser.
    assert slopes.keys() == used - step.biases.keys()
    assert [n for n, a in slopes.items() if not np.isfinite(a).all()] == []
    # A bias that takes part in a choice alone decides no value, and has a gradient of zero.
    still = {n for n, a in slopes.items() if not np.abs(a).max() > 0}
    assert still == {n for n in slopes if _only_chooses(graph.params[n])}


def test_what_is_frozen_has_no_gradient_no_moments_and_stays():
    graph = apply_passes(golden_graph("llama_gqa"), "freeze{groups=attention}")
    groups = (
        ParameterGroup("embedding", freeze=True),
        ParameterGroup("*.layers.0.mlp.*", rate_factor=0.5),
        ParameterGroup("norm", decay=0.2),
    )
    step = step_of(graph, groups)
    frozen = {n for n in step.settings if "attn" in n or "embed" in n or "lm_head" in n}
    assert frozen
    assert set(step.trained) == step.settings.keys() - frozen
    jax.make_jaxpr(step.pure)(*step.arguments)
    adam = make_step(step.graph, step.spec.sizes, OptimizerSection("adamw", groups=groups))
    assert adam.abstract_state["moments"]["m"].keys() == set(adam.trained)
    rates = {n: s.rate_factor for n, s in step.settings.items() if s.rate_factor != 1}
    assert set(rates.values()) == {0.5}
    assert all(".layers.0.mlp." in n for n in rates)
    assert {s.decay for n, s in step.settings.items() if "norm" in n} == {0.2}


def test_decay_goes_by_what_reads_a_parameter_and_not_by_its_axes():
    """A rolled norm has two axes, and so have the vectors of experts."""
    graph = apply_passes(
        golden_graph("llama_biases_head_dim"),
        "upcycle{experts=4 expert-bias=multiplicative balance-bias=true}",
    )
    rolled = step_graph(graph, StepPasses(groups=BATCH, losses={"parts": 1}))
    step = make_step(rolled, {"B": BATCH, "S": SEQ}, OptimizerSection("adamw", decay=0.1))
    axes = {n: rolled.params[n].type.names for n in step.settings}
    decayed = {n for n, s in step.settings.items() if s.decay}
    assert any(len(axes[n]) == 2 for n in step.settings.keys() - decayed)
    for name in step.settings:
        is_vector = any(word in name for word in ("norm", "bias"))
        is_table = name.endswith("embed_tokens.weight")
        assert (name in decayed) == (not is_vector and not is_table), name
    assert not any("balance_bias" in n for n in step.settings)
    assert any("balance_bias" in n for n in step.abstract_state["bias"])
