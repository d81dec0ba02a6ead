"""What is exported is what the graph computes, and reads back as the same graph."""

from collections import Counter

import numpy as np
import pytest
from family_configs import (
    exported_checkpoint,
    random_checkpoint,
    run_checkpoint,
    small_configs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.open import open_checkpoint
from moecc.ir import Builder, verify
from moecc.rewrite.passes import Context
from moecc.translate.export import export_graph
from moecc.translate.importing import import_checkpoint
from moecc.translate.propose import propose
from moecc.weights.expr import Full, Source

from .small_config import GOLDEN, OF_EACH_FAMILY, SMALL, relative_error, small

DENSE = ("llama", "mistral", "qwen2", "qwen3")
LLAMA = parse_config(small("llama"))

# Each dense family with the targets that can hold it, and the keys that they need.
PAIRS = [
    ("llama", "mixtral", {}),
    ("llama", "qwen2_moe", {}),
    ("mistral", "mixtral", {"sliding_window": 3}),
    ("mistral", "qwen2_moe", {"sliding_window": 3}),
    ("qwen2", "qwen2_moe", {"tie_word_embeddings": True}),
    ("qwen3", "qwen3_moe", {"head_dim": 6}),
    ("llama", "glm4_moe", {}),
    ("qwen3", "glm4_moe", {"head_dim": 6}),
    ("llama", "granitemoe", {}),
    ("granite", "granitemoe", {"residual_multiplier": 0.22}),
    ("olmo2", "flex_olmo", {}),
    ("llama", "ernie4_5_moe", {}),
]
OPTIONS = {
    "qwen2_moe": {"shared": 0.5},
    "glm4_moe": {"shared": 0.5, "shared_gate": "none", "gates": "sigmoid-renormalised"},
}
# What a target cannot hold of the options of the tests.
REFUSED = {
    "mixtral": r"at every depth|softmax gates",
    "granitemoe": r"at every depth|softmax gates",
    "flex_olmo": r"at every depth",
    "glm4_moe": r"dense layers only before|softmax gates",
    "ernie4_5_moe": r"every n-th layer of a range|softmax gates",
}


def upcycled(graph, target, **options):
    options = {"experts": 4, "top_k": 2, **OPTIONS.get(target, {}), **options}
    UpcyclePass(**options).apply(graph, Context())
    verify(graph)
    return graph


def run(graph, checkpoint):
    vocab = graph.outputs["logits"].type["vocab"].size
    tokens = (np.arange(10).reshape(2, 5) * 7 + 3) % vocab
    return run_checkpoint(graph, checkpoint, {"tokens": tokens})


@pytest.mark.parametrize("case", OF_EACH_FAMILY.values())
def test_a_checkpoint_is_exported_as_it_is(case):
    with open_checkpoint(GOLDEN / case) as checkpoint:
        graph = import_checkpoint(checkpoint)
        made = export_graph(graph, graph.attrs["family"])
        # Hidden states are what an encoder is for; its pooler is left out.
        beside = ("pooler.", "embeddings.mask_token", "masked_spec_embed")
        if graph.attrs["family"] == "clip_vision_model":
            beside += ("vision_model.post_layernorm.",)
        kept = {name for name in checkpoint.tensors if not name.startswith(beside)}
        assert dict(made.tensors).keys() == kept
        for name, expr in made.tensors:
            tensor = checkpoint.tensors[name]
            assert isinstance(expr, Source)
            assert (expr.name, expr.type.shape) == (name, tensor.shape)
            assert expr.type.dtype is tensor.dtype
        assert made.config == parse_config(graph.attrs["config"])
        assert made.config_json == graph.attrs["config"]


VARIANTS = [
    {}, {"router_std": 1.0}, {"granularity": 2}, {"layers": "every:2"}, {"layers": "0,3"},
    {"gates": "softmax", "router_init": "zero"}, {"init": "drop"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target", "keys", "options"),
    [*((*pair, {}) for pair in PAIRS), *((*PAIRS[n], o) for n, o in enumerate(VARIANTS) if o)],
    ids=str,
)
def test_an_upcycled_model_reads_back_as_the_same_model(source, target, keys, options):
    checkpoint = random_checkpoint(parse_config(small(source, **keys)), seed=5)
    graph = upcycled(import_checkpoint(checkpoint), target, **options)
    if isinstance(propose(graph, target), list):
        # Some have experts in every layer, or renormalised gates.
        assert {"layers", "gates"} & set(options)
        with pytest.raises(InputError, match=REFUSED[target]):
            export_graph(graph, target)
        return
    made = export_graph(graph, target)
    written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
    again = import_checkpoint(written)
    # Weights are rounded to float32 when they are written.
    assert relative_error(run(again, written), run(graph, checkpoint)) <= 1e-6
    # Biases of zeros, which engines want to find, are added once the file is read.
    biases = 3 * SMALL["num_hidden_layers"] if target == "qwen2_moe" and source != "qwen2" else 0
    before, after = (Counter(node.op.name for node in g) for g in (graph, again))
    assert after == before + Counter(add=biases)


@pytest.mark.parametrize(
    ("target", "module", "shape"),
    [("glm4_moe", "gate", (4,)), ("ernie4_5_moe", "moe_statics", (1, 4))],
)
def test_a_bias_that_chooses_experts_is_written_as_zeros(target, module, shape):
    tensors = dict(export_graph(upcycled(build(LLAMA), target), target).tensors)
    bias = tensors[f"model.layers.1.mlp.{module}.e_score_correction_bias"]
    assert isinstance(bias, Full)
    assert bias.type.shape == shape


def test_a_balanced_choice_is_written_where_a_target_has_a_bias():
    graph = upcycled(build(LLAMA), "glm4_moe", balance_bias=True)
    assert export_graph(graph, "glm4_moe").config.routing_bias
    with pytest.raises(InputError, match="no bias in the choice of experts"):
        export_graph(upcycled(build(LLAMA), "mixtral", balance_bias=True), "mixtral")


def test_a_tied_target_takes_no_untied_weights():
    graph = upcycled(build(LLAMA), "mixtral")
    graph.attrs["config"]["tie_word_embeddings"] = True
    with pytest.raises(InputError, match="one tensor where the graph has two different ones"):
        export_graph(graph, "mixtral")
    # Two parameters that are one tensor on disk are no contradiction.
    graph.params["lm_head.weight"].weight = graph.params["model.embed_tokens.weight"].weight
    assert "lm_head.weight" not in dict(export_graph(graph, "mixtral").tensors)


@given(small_configs(DENSE, most_layers=2), st.data())
@settings(max_examples=30)
def test_the_order_of_commutative_operands_does_not_matter(config, data):
    graph = build(config)
    expected = export_graph(graph, config.model_type).tensors
    for node in graph:
        if node.op.commutative and data.draw(st.booleans()):
            first, second = node.operands
            node.set_operand(0, second)
            node.set_operand(1, first)
    assert export_graph(graph, config.model_type).tensors == expected


def test_a_value_may_be_computed_twice():
    graph = build(LLAMA)
    expected = export_graph(graph, "llama").tensors
    norm = next(n for n in graph if n.op.name == "rms_norm")
    user = next(n for n in norm.result.users if n.op.name == "contract")
    twin = graph.append(norm.op, norm.operands, norm.attrs, loc=norm.loc, before=user)
    user.set_operand(0, twin.result)
    verify(graph)
    assert export_graph(graph, "llama").tensors == expected


def problem_of(graph):
    """Return the one problem of exporting a graph as a llama."""
    with pytest.raises(InputError) as caught:
        export_graph(graph, "llama")
    (problem,) = caught.value.problems
    return problem


def test_where_graph_and_target_part_both_lines_are_shown():
    graph = build(LLAMA)
    node = next(n for n in graph if n.op.name == "silu" and n.loc == "layers.2.ffn")
    node.replace_by(Builder(graph, loc=node.loc, before=node).gelu(node.operands[0]))
    problem = problem_of(graph)
    assert problem.message == "the graph is not a llama: first difference"
    assert problem.where == "layers.2.ffn"
    assert " = silu %gate" in problem.expected
    assert " = gelu %gate" in problem.found


def test_an_extra_output_is_not_lost_in_silence():
    graph = build(LLAMA)
    graph.set_output("hidden", graph.outputs["logits"].node.operands[0])
    problem = problem_of(graph)
    assert (problem.expected, problem.found) == ("logits", "logits, hidden")


def test_a_parameter_without_a_weight_cannot_be_written():
    graph = build(LLAMA)
    graph.params["model.norm.weight"].weight = None
    assert problem_of(graph).where == "%model.norm.weight"
