"""The graphs of families: golden logits, structure, and names, axes and places of parameters."""

import numpy as np
import pytest
from family_configs import MemoryCheckpoint, random_checkpoint, run_checkpoint, small_configs
from hypothesis import given, settings
from tiers import some

from moecc.backend import get_backend
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.open import open_checkpoint
from moecc.ir import equal, parse, print_graph, verify
from moecc.translate.importing import import_checkpoint
from moecc.weights.evaluate import evaluate

from .small_config import CASES, GOLDEN, OF_EACH_FAMILY, golden_arrays, relative_error, small

QUICK = {*OF_EACH_FAMILY.values(), *CASES[::3]}


@pytest.mark.parametrize("case", some(CASES, *QUICK))
def test_the_imported_graph_gives_the_golden_logits(case):
    with open_checkpoint(GOLDEN / case) as checkpoint:
        graph = import_checkpoint(checkpoint)
        verify(graph)
        (output,) = graph.outputs
        inputs = golden_arrays(case, *graph.inputs)
        params = {n: evaluate(v.weight, checkpoint.read) for n, v in graph.params.items()}
    golden = np.load(GOLDEN / case / f"{output}.npy")
    found = get_backend("reference").compile(graph).run(params, inputs)[output]
    # The file holds float32, rounded once; the reference computes in float64.
    assert relative_error(found, golden) <= 2.0**-24 * 1.01
    if not case.startswith(("t5", "switch", "bert", "vit_plain", "whisper_plain", "mpnet_gelu")):
        return
    # The decoders run through xla in other tests.
    single = get_backend("xla").compile(graph).run(params, inputs)[output]
    assert relative_error(single, golden) <= 2e-6


@given(small_configs())
@settings(max_examples=40)
def test_every_config_builds_a_graph_that_prints_and_parses(config):
    graph = build(config, checkpoint="some/folder")
    verify(graph)
    assert equal(parse(print_graph(graph)), graph)
    assert graph.attrs == {
        "family": config.model_type,
        "config": config.to_json(),
        "checkpoint": "some/folder",
    }
    assert str(graph.inputs["tokens"].type) == "i32[batch=B, seq=S]"
    expected = f"f32[batch=B, seq=S, vocab={config.vocab_size}]"
    assert str(graph.outputs["logits"].type) == expected


def test_parameters_are_named_after_tensors_with_axes_as_on_disk():
    graph = build(parse_config(small("llama", attention_bias=True, mlp_bias=True)))
    layer = "model.layers.3."
    types = {
        "model.embed_tokens.weight": "f32[vocab=40, embed=16]",
        f"{layer}input_layernorm.weight": "f32[embed=16]",
        f"{layer}self_attn.q_proj.weight": "f32[q=16, embed=16]",
        f"{layer}self_attn.k_proj.weight": "f32[kv=8, embed=16]",
        f"{layer}self_attn.v_proj.bias": "f32[kv=8]",
        f"{layer}self_attn.o_proj.weight": "f32[embed=16, q=16]",
        f"{layer}self_attn.o_proj.bias": "f32[embed=16]",
        f"{layer}mlp.gate_proj.weight": "f32[mlp=24, embed=16]",
        f"{layer}mlp.up_proj.bias": "f32[mlp=24]",
        f"{layer}mlp.down_proj.weight": "f32[embed=16, mlp=24]",
        f"{layer}mlp.down_proj.bias": "f32[embed=16]",
        "model.norm.weight": "f32[embed=16]",
        "lm_head.weight": "f32[vocab=40, embed=16]",
    }
    assert {name: str(graph.params[name].type) for name in types} == types
    assert all(str(graph.params[n].weight).startswith(f'source("{n}" : ') for n in types)


@given(small_configs(["mixtral", "qwen2_moe", "qwen3_moe"], most_layers=2))
@settings(max_examples=15)
def test_fused_experts_are_the_same_model(config):
    apart = random_checkpoint(config, seed=3)
    fused = MemoryCheckpoint(apart.config, _fused(apart.arrays))
    tokens = {"tokens": np.arange(6).reshape(2, 3) % config.vocab_size}
    outputs, texts = [], []
    for checkpoint in (apart, fused):
        graph = import_checkpoint(checkpoint)
        outputs.append(run_checkpoint(graph, checkpoint, tokens))
        for value in graph.params.values():
            value.weight = None
        texts.append(print_graph(graph))
    np.testing.assert_array_equal(*outputs)
    assert texts[0] == texts[1]


def _fused(arrays):
    """Return `arrays` as transformers 5 holds them: written here from its documentation."""
    fused, experts = {}, {}
    for name, array in arrays.items():
        prefix, is_expert, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if is_expert:
            number, matrix, _ = rest.split(".")
            experts.setdefault((prefix, matrix), {})[int(number)] = array
        else:
            fused[prefix] = array
    stacks = {key: np.stack([rows[n] for n in sorted(rows)]) for key, rows in experts.items()}
    for prefix in {prefix for prefix, _ in stacks}:
        gate, up, down = (
            next(stacks[prefix, name] for name in names if (prefix, name) in stacks)
            for names in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        both = np.concatenate([gate, up], axis=1)
        fused |= {f"{prefix}.experts.gate_up_proj": both, f"{prefix}.experts.down_proj": down}
    return fused
