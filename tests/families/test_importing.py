"""What import says of tensors that do not fit their config, before it reads any."""

import time

import numpy as np
import pytest
from family_configs import random_checkpoint, small_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.families.registry import parse_config
from moecc.ir import verify
from moecc.translate.importing import import_checkpoint

from .small_config import small

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def checkpoint(family="llama", layout="experts", **keys):
    config = parse_config(small(family, num_hidden_layers=3, **keys))
    return random_checkpoint(config, layout=layout)


def refusal(made):
    with pytest.raises(InputError) as caught:
        import_checkpoint(made)
    assert made.reads == []
    return caught.value


def problems(made):
    return [p.message for p in refusal(made).problems]


def test_a_missing_tensor_is_named_with_its_type_and_the_nearest_name():
    made = checkpoint()
    name = "model.layers.1.mlp.up_proj.weight"
    made.arrays["model.layers.1.mlp.upp_proj.weight"] = made.arrays.pop(name)
    assert str(refusal(made)).splitlines() == [
        f"memory: {name}: this tensor is missing",
        "  expected: f32[mlp=24, embed=16]",
        "  hint: did you mean 'model.layers.1.mlp.upp_proj.weight'?",
        "memory: model.layers.1.mlp.upp_proj.weight: llama has no such tensor",
        f"  hint: did you mean {name!r}?",
    ]


def test_all_problems_are_told_at_once():
    made = checkpoint()
    del made.arrays["model.norm.weight"]
    made.arrays["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 16), np.float32)
    made.arrays["model.layers.0.self_attn.v_proj.weight"] = np.zeros((8, 16), np.int8)
    made.arrays["stranger"] = np.zeros(1, np.float32)
    assert problems(made) == [
        "this tensor is missing",
        "llama has no such tensor",
        "the tensor has another shape than config.json says",
        "the tensor cannot be a weight",
    ]


def test_missing_layers_are_one_problem():
    made = checkpoint()
    made.config["num_hidden_layers"] = 9
    assert problems(made) == ["no tensor of the layers 3-8"]
    made = checkpoint()
    made.arrays = {n: a for n, a in made.arrays.items() if "layers.1." not in n}
    assert problems(made) == ["no tensor of the layers 1"]


def test_an_unexpected_bias_points_to_the_key_of_the_config():
    made = checkpoint()
    made.arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    made.arrays["model.layers.0.mlp.up_proj.bias"] = np.zeros(24, np.float32)
    assert [p.hint for p in refusal(made).problems] == [
        "config.json says that there is no bias: attention_bias (qkv_bias in qwen2_moe)",
        "config.json says that there is no bias: mlp_bias",
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_without_the_prefix_is_recognised(tied):
    made = checkpoint(tie_word_embeddings=tied)
    made.arrays = {
        n.removeprefix("model."): a for n, a in made.arrays.items() if n != "lm_head.weight"
    }
    found = problems(made)
    assert found[0] == "the tensors are those of a base model: their names lack 'model.'"
    assert len(found) == (1 if tied else 2)


def test_rotary_buffers_are_ignored():
    made = checkpoint()
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        made.arrays[name] = np.zeros(2, np.float32)
    verify(import_checkpoint(made))
    made.arrays["model.layers.0.self_attn.rotary_emb.inv_freq.x"] = np.zeros(2, np.float32)
    assert problems(made) == ["llama has no such tensor"]


@pytest.mark.parametrize("row", [0, 39])
def test_a_tied_model_with_another_output_matrix_is_refused(row):
    made = checkpoint(tie_word_embeddings=True)
    made.arrays["lm_head.weight"] = made.arrays["model.embed_tokens.weight"].copy()
    made.arrays["lm_head.weight"][row, 3] += 1
    with pytest.raises(InputError, match="ties the output matrix") as caught:
        import_checkpoint(made)
    (problem,) = caught.value.problems
    assert problem.where == "memory: lm_head.weight"
    assert '"tie_word_embeddings": false' in problem.hint


def test_a_tied_output_matrix_of_another_shape_or_type_is_not_even_read():
    made = checkpoint(tie_word_embeddings=True)
    table = made.arrays["model.embed_tokens.weight"]
    for other in (table[:-1], table.astype(np.float64)):
        made.arrays["lm_head.weight"] = other
        assert "the two differ" in problems(made)[0]


@pytest.mark.parametrize(("experts", "wrong"), [(5, 4), (3, 3)], ids=["missing", "extra"])
def test_a_wrong_number_of_experts_is_told(experts, wrong):
    made = checkpoint("mixtral", **MOE)
    made.config["num_local_experts"] = made.config["num_experts"] = experts
    assert {p.where for p in refusal(made).problems if "experts." in p.where} == {
        f"memory: model.layers.{layer}.block_sparse_moe.experts.{wrong}.{matrix}.weight"
        for layer in range(3)
        for matrix in ("w1", "w2", "w3")
    }


def test_fused_experts_of_a_wrong_width_are_told():
    made = checkpoint("mixtral", layout="fused", **MOE)
    verify(import_checkpoint(made))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    made.arrays[name] = made.arrays[name][:, :-1]
    (problem,) = refusal(made).problems
    assert (problem.expected, problem.found) == ("[expert=4, mlp=48, embed=16]", "[4, 47, 16]")


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10_000},
        {"num_local_experts": 65_536, "num_experts": 65_536},
        {"num_hidden_layers": 10_000, "num_local_experts": 65_536, "num_experts": 65_536},
    ],
)
def test_a_config_that_speaks_of_another_model_is_refused_at_once(keys):
    made = checkpoint("mixtral", **MOE)
    made.config |= keys
    start = time.process_time()
    assert problems(made) == ["config.json and the tensors cannot belong together"]
    assert time.process_time() - start < 1


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_experts_of_a_layer_in_one_tensor_are_not_taken_for_too_few(family):
    """Two layers of 128 experts have 24 tensors and more, as gpt-oss-120b and Maverick do."""
    experts = {"num_local_experts": 128, "num_experts": 128, "num_experts_per_tok": 1}
    verify(import_checkpoint(checkpoint(family, **experts)))


@given(st.data())
@settings(max_examples=60)
def test_any_damage_to_the_tensors_is_told_as_a_problem(data):
    made = random_checkpoint(data.draw(small_configs(most_layers=2)))
    name = data.draw(st.sampled_from(sorted(made.arrays)))
    kind = data.draw(st.sampled_from(["drop", "rename", "grow", "flatten", "integers"]))
    array = made.arrays.pop(name)
    if kind == "rename":
        made.arrays[data.draw(st.text(min_size=1)) + name] = array
    elif kind == "grow":
        made.arrays[name] = np.concatenate([np.atleast_1d(array)] * 2)
    elif kind == "flatten":
        made.arrays[name] = array.reshape(*array.shape, 1)
    elif kind == "integers":
        made.arrays[name] = array.astype(np.int32)
    text = str(refusal(made))
    assert name in text
    assert text.isprintable() or "\n" in text
