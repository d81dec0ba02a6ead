"""Every parameter that is trained gets a gradient, in every family; a frozen one gets none."""

from pathlib import Path

import numpy as np
import pytest

from moecc.ir.conventions import LOGITS
from moecc.ir.structure import clone
from moecc.model.inputs import default_inputs
from moecc.model.open import open_model
from moecc.plan.step import StepConfig
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.train.graphs import StepPasses, step_graph
from moecc.train.recipe import OptimizerSection, ParameterGroup
from moecc.train.settings import StepSpec
from tests.support.tiers import few

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.train.step import make_train_step  # noqa: E402

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ("mixtral_square", "glm4_moe_square", "t5_gated_untied", "bert_square")
BATCH, SEQ = 4, 8


def step_of(graph, groups=()):
    routed = any(node.op.assigns_slots for node in graph)
    losses = {"parts": 1, "replace": True} if routed else None
    # An encoder that is stored without a head makes its logits by its embedding.
    passes = StepPasses(tied=LOGITS not in graph.output_names, routed=routed,
                        groups=BATCH if routed else None, losses=losses, rolled=False)  # fmt: skip
    made = step_graph(graph, passes)
    inputs = default_inputs(graph, batch=BATCH, seq=SEQ)
    sizes = {
        str(axis.size): size
        for n, value in graph.inputs.items()
        for axis, size in zip(value.type, inputs[n].shape, strict=True)
    }
    spec = StepSpec(sizes, StepConfig(dtype="f32"), OptimizerSection("sgd", groups=groups))
    return make_train_step(made, spec, jax.devices()[:1])


def gradients_of(step, graph):
    """Return gradients at random parameters, so that experts differ."""
    rng = np.random.default_rng(3)
    params = {
        n: (rng.normal(size=p.type.shape) * 0.3 + ("norm" in n)).astype("f")
        for n, p in step.graph.params.items()
    }
    inputs = default_inputs(graph, batch=BATCH, seq=SEQ)
    targets = inputs["decoder_tokens" if "decoder_tokens" in inputs else "tokens"]
    batch = {**inputs, "targets": np.roll(targets, -1, 1)}
    fixed = {n: a for n, a in params.items() if n not in step.trained}
    trained = {n: params[n] for n in step.trained}
    slopes, _ = jax.jit(step.gradients)(trained, fixed, batch, jax.random.key(0))
    return {n: np.asarray(a) for n, a in slopes.items()}


def assert_all_flow(graph):
    step = step_of(graph)
    slopes = gradients_of(step, graph)
    used = {n for n, p in graph.params.items() if p.users}
    # A balance bias is moved by what was chosen, outside of the optimiser.
    assert slopes.keys() == used - step.biases.keys()
    assert [n for n, a in slopes.items() if not np.isfinite(a).all()] == []
    # A bias that takes part in a choice alone decides no value, and has a gradient of zero.
    still = {n for n, a in slopes.items() if not np.abs(a).max() > 0}
    assert still == {n for n in slopes if _only_chooses(graph.params[n])}


def _only_chooses(param):
    return all(node.op.chooses and node.operands[0] is not param for node in param.users)


@pytest.mark.parametrize("case", few(CASES))
def test_every_parameter_of_a_family_is_trained(case):
    with open_model(str(GOLDEN / case)) as model:
        graph = clone(model.graph)
    assert_all_flow(graph)


def test_what_is_frozen_has_no_gradient_no_moments_and_stays():
    with open_model(str(GOLDEN / "llama_gqa")) as model:
        graph = clone(model.graph)
    run_pipeline(graph, Pipeline.parse("freeze{groups=attention}", installed()))
    groups = (
        ParameterGroup("embedding", freeze=True),
        ParameterGroup("*.layers.0.mlp.*", rate=0.5),
        ParameterGroup("norm", decay=0.2),
    )
    step = step_of(graph, groups)
    frozen = {n for n in step.settings if "attn" in n or "embed" in n or "lm_head" in n}
    assert frozen
    assert set(step.trained) == step.settings.keys() - frozen
    text = str(jax.make_jaxpr(step.pure)(*step.arguments))
    assert text
    section = OptimizerSection("adamw", groups=groups)
    adam = make_train_step(
        step.graph, StepSpec(step.spec.sizes, StepConfig(dtype="f32"), section), jax.devices()[:1]
    )
    assert adam.abstract_state["moments"]["m"].keys() == set(adam.trained)
    rates = {n: s.rate for n, s in step.settings.items() if s.rate != 1}
    assert set(rates.values()) == {0.5}
    assert all(".layers.0.mlp." in n for n in rates)
    assert {s.decay for n, s in step.settings.items() if "norm" in n} == {0.2}


def test_decay_goes_by_what_reads_a_parameter_and_not_by_its_axes():
    """A rolled norm has two axes, and so have the vectors of experts."""
    with open_model(str(GOLDEN / "llama_biases_head_dim")) as model:
        graph = clone(model.graph)
    text = "upcycle{experts=4 expert-bias=multiplicative balance-bias=true}"
    run_pipeline(graph, Pipeline.parse(text, installed()))
    rolled = step_graph(graph, StepPasses(groups=BATCH, losses={"parts": 1}))
    spec = StepSpec(
        {"B": BATCH, "S": SEQ}, StepConfig(dtype="f32"), OptimizerSection("adamw", decay=0.1)
    )
    step = make_train_step(rolled, spec, jax.devices()[:1])
    axes = {n: rolled.params[n].type.names for n in step.settings}
    decayed = {n for n, s in step.settings.items() if s.decay}
    assert any(len(axes[n]) == 2 for n in step.settings.keys() - decayed)
    for name in step.settings:
        is_vector = any(word in name for word in ("norm", "bias"))
        is_table = name.endswith("embed_tokens.weight")
        assert (name in decayed) == (not is_vector and not is_table), name
    assert not any("balance_bias" in n for n in step.settings)
    assert any("balance_bias" in n for n in step.abstract_state["bias"])
