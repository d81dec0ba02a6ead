"""Weights drawn in place of a checkpoint: their spread, and what the model makes of them."""

import numpy as np
import pytest
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.backend import get_backend
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.model.initialise import initialise
from moecc.model.inputs import default_inputs
from moecc.model.open import OpenedModel, open_model
from moecc.rewrite.passes import Context

from .small_config import GOLDEN, OF_EACH_FAMILY

WIDE = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "attention_bias": True,
}  # fmt: skip


def drawn(seed=0, scale=1.0):
    graph = build(parse_config(WIDE))
    UpcyclePass(experts=4, top_k=2, layers="1").apply(graph, Context())
    initialise(graph, seed=seed, scale=scale)
    return OpenedModel(graph, "drawn")


def test_a_matrix_has_variance_scale_over_fan_in():
    params = drawn(scale=0.5).params()
    for name, fan_in in {
        "model.layers.0.mlp.up_proj.weight": 64,
        "model.layers.0.mlp.down_proj.weight": 160,
        "model.layers.1.mlp.down_proj.weight": 160,
        "model.layers.0.self_attn.k_proj.weight": 64,
        "model.embed_tokens.weight": 64,
        "lm_head.weight": 64,
    }.items():
        matrix = params[name]
        # The standard deviation of n normal numbers is uncertain by 1/√(2n) of itself.
        rounding = 5 / (2 * matrix.size) ** 0.5
        assert matrix.std() == pytest.approx((0.5 / fan_in) ** 0.5, rel=rounding)
        assert abs(matrix.mean()) < 5 * matrix.std() / matrix.size**0.5


def test_gains_are_one_and_biases_nothing():
    params = drawn().params()
    assert (params["model.norm.weight"] == 1).all()
    assert (params["model.layers.0.self_attn.q_proj.bias"] == 0).all()


def test_experts_are_drawn_apart_and_what_a_pass_drew_stays():
    first, other = drawn(seed=0), drawn(seed=1)
    up = first.params()["model.layers.1.mlp.up_proj.weight"]
    assert up.shape == (4, 160, 64)
    assert abs(np.corrcoef(up[0].ravel(), up[1].ravel())[0, 1]) < 0.05
    for name, value in first.graph.params.items():
        is_read = name.startswith(("model.", "lm_head."))
        is_drawn = is_read and not name.endswith(("norm.weight", "bias"))
        assert (value.weight != other.graph.params[name].weight) == is_drawn, name


@pytest.mark.parametrize("case", OF_EACH_FAMILY.values())
def test_every_family_gives_outputs_of_order_one(case):
    """No parameter is zero that should not be, and none is far too large."""
    with open_model(str(GOLDEN / case)) as model:
        initialise(model.graph)
        params = OpenedModel(model.graph, case).params()
        program = get_backend("reference").compile(model.graph)
        outputs = program.run(params, default_inputs(model.graph, seq=6))
    for output in outputs.values():
        assert 0.02 < np.sqrt(np.mean(np.square(output))) < 50
