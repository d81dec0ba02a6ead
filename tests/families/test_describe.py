"""Counts of parameters and FLOPs, against published numbers and the formulas."""

import pytest
from family_configs import random_checkpoint, small_configs
from hypothesis import given, settings

from moecc.families import build
from moecc.families.describe import describe, sequence_flops
from moecc.families.mixture import MoeConfig
from moecc.families.registry import parse_config
from moecc.model.open import open_model
from moecc.plan.workload import Batch, workload
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

from .small_config import GOLDEN, OF_EACH_FAMILY

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
QWEN2_MOE = {"model_type": "qwen2_moe"}
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("keys", "total", "active"),
    [
        # Mixtral-8x7B: 46.7 and 12.9 billion.
        (MIXTRAL, 46_702_792_704, 12_879_925_248),
        # Qwen3-30B-A3B: 30.5 and 3.3 billion.
        (QWEN3_MOE, 30_532_122_624, 3_353_032_704),
        # Qwen1.5-MoE-A2.7B: 14.3 and 2.7 billion.
        (QWEN2_MOE, 14_315_784_192, 2_689_173_504),
        (SMOLLM2, 134_515_008, 134_515_008),
    ],
)
def test_counts_are_the_published_ones(keys, total, active):
    counted = describe(build(parse_config(keys))).parameters
    assert (counted.total, counted.active) == (total, active)
    assert sum(counted.groups.values()) == total


EXPERTS = (".experts.", ".input_linear.", ".output_linear.")


@given(small_configs())
@settings(max_examples=40)
def test_the_total_is_what_lies_on_disk(config):
    counted = describe(build(config)).parameters
    arrays = random_checkpoint(config).arrays
    assert counted.total == sum(array.size for array in arrays.values())
    assert counted.groups.get("experts", 0) == sum(
        a.size for n, a in arrays.items()
        if isinstance(config, MoeConfig) and any(word in n for word in EXPERTS)
    )  # fmt: skip
    # Scales of norms of each head count as the attention's.
    norms = [a.size for n, a in arrays.items() if "norm" in n or ".ln_" in n
             if not (config.qk_norm_each and "self_attn" in n)]  # fmt: skip
    assert counted.groups.get("norm", 0) == sum(norms)


@given(small_configs())
@settings(max_examples=40)
def test_flops_are_two_for_each_weight_of_a_matrix(config):
    facts = describe(build(config))
    attention = 2 * config.num_attention_heads * config.head_dim
    ffn = 0
    for layer in range(config.num_hidden_layers):
        if isinstance(config, MoeConfig) and config.sparse_layers[layer]:
            width = config.experts_per_token * config.expert_intermediate_size
            width += config.shared_expert_intermediate_size or 0
            ffn += 3 * config.hidden_size * width + config.hidden_size * config.num_experts
            if config.shared_gate and config.shared_expert_intermediate_size:
                ffn += config.hidden_size
        else:
            ffn += (2 + config.gated_mlp) * config.hidden_size * config.intermediate_size
    heads = config.num_attention_heads + config.num_key_value_heads
    heads += config.attention_gate * config.num_attention_heads / 2
    taps = config.conv_taps or (0,) * config.num_hidden_layers
    delta, rules = config.delta, sum(config.delta.layers) if config.delta else 0
    attending = taps.count(0) - rules
    projections = 2 * config.hidden_size * heads * config.head_dim * attending
    if (latent := config.latent) is not None:
        count, nope = config.num_attention_heads, config.head_dim - config.rotated_dim
        attention = count * (config.head_dim + latent.value_dim)
        projections = attending * (
            config.hidden_size * (latent.query_rank or 0)
            + (latent.query_rank or config.hidden_size) * count * config.head_dim
            + config.hidden_size * (latent.key_rank + config.rotated_dim)
            + latent.key_rank * count * (nope + latent.value_dim)
            + config.hidden_size * count * latent.value_dim
        )
    projections += 4 * config.hidden_size**2 * (len(taps) - taps.count(0))
    # A convolution of k taps is k - 1 products with a shifted sequence.
    shifts, states = config.hidden_size * sum(count - 1 for count in taps if count), 0
    if delta is not None:
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        projections += rules * config.hidden_size * (2 * keys + 3 * values + 2 * delta.value_heads)
        shifts += rules * (2 * keys + values) * (delta.taps - 1)
        # A state is multiplied with a key twice, and with a query.
        states = rules * 3 * values * delta.key_dim
    head = config.vocab_size * config.hidden_size
    assert facts.sequence.weights == 2 * (ffn + projections + head) * 512
    squares = (attention * attending + shifts) * 512**2
    assert facts.sequence.attention == 2 * (squares + states * 512)
    assert facts.sequence.per_token * 512 == facts.sequence.executed


OF_TOKENS = [case for case in OF_EACH_FAMILY.values() if "whisper" not in case]


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        *((name, "") for name in OF_TOKENS),
        *((name, "upcycle{experts=4}") for name in OF_TOKENS[::8]),
        *((name, "fuse-attention") for name in OF_TOKENS[1::8]),
    ],
)
def test_a_plan_counts_the_flops_of_a_sequence(name, pipeline):
    with open_model(str(GOLDEN / name)) as model:
        graph = model.graph
        context = Context(allow_unmatched=True)
        if pipeline != "upcycle{experts=4}" or not describe(graph).expert_layers:
            run_pipeline(graph, Pipeline.parse(pipeline), context=context)
    counted = sequence_flops(graph, {"S": 12, "T": 12})
    work = workload(graph, Batch(1, tuple((name, 12) for name in counted.lengths)))
    assert sum(p.count * s.flops for p in work.parts for s in p.steps) == counted.executed
