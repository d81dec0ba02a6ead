"""deepseek_v3 and kimi_k2: one model by two names, eight bits, further layers, groups."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moecc
from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.model.open import open_model
from moecc.translate.propose import propose
from moecc.types import F32, F64

from .small_config import GOLDEN, golden_arrays, golden_config, relative_error

GROUPS = "deepseek_v3_groups"
EIGHT_BITS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def changed(case, folder, tensors, **keys):
    """Write a golden checkpoint with further tensors and other keys in its config."""
    shutil.copytree(GOLDEN / case, folder)
    (folder / "config.json").write_text(json.dumps(golden_config(case, **keys)))
    save_file({**tensors_of(folder), **tensors}, folder / "model.safetensors")
    return folder


def logits(folder, case=GROUPS, backend="reference", dtype=F64):
    """Return the logits of the tokens of a golden checkpoint."""
    with open_model(str(folder)) as model:
        program = get_backend(backend).compile(model.graph)
        tokens = golden_arrays(case, "tokens")
        return np.asarray(program.run(dict(model.params(dtype=dtype)), tokens)["logits"])


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(
    "name",
    ["deepseek_v2_groups", "deepseek_v2_square", "deepseek_v3_groups", "deepseek_v3_square_v4"],
)
def test_logits_are_those_of_transformers(name, backend):
    dtype, bound = (F64, 1e-7) if backend == "reference" else (F32, 1e-5)
    found = logits(GOLDEN / name, name, backend, dtype)
    assert relative_error(found, np.load(GOLDEN / name / "logits.npy")) <= bound


def test_a_kimi_k2_is_a_deepseek_v3_by_another_name(tmp_path):
    kimi = changed(GROUPS, tmp_path / "kimi", {}, model_type="kimi_k2")
    np.testing.assert_array_equal(logits(kimi), logits(GOLDEN / GROUPS))
    moecc.convert(str(kimi), str(tmp_path / "back"), to="deepseek_v3")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == parse_config(golden_config(GROUPS)).to_json()
    before, after = tensors_of(GOLDEN / GROUPS), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("name", ["deepseek_v3_groups", "glm4_moe_square"])
def test_a_layer_that_predicts_further_tokens_is_left_out_and_no_other(name, tmp_path):
    ones = np.ones((16, 32), np.float32)
    further = {f"model.layers.2.{part}.weight": ones for part in ("eh_proj", "self_attn.q_proj")}
    folder = changed(name, tmp_path / "further", further)
    with open_model(str(folder)) as model:
        assert len(model.graph.params) == len(open_model(str(GOLDEN / name)).graph.params)
        assert any("eh_proj" in remark for remark in model.remarks()), "what is left out is told"
    del further["model.layers.2.eh_proj.weight"]
    with pytest.raises(InputError, match="tensors of the layers 2"):
        open_model(str(changed(name, tmp_path / "more", further)))


def test_weights_in_blocks_of_eight_bits_are_read(tmp_path):
    rounded, stored = {}, {}
    for name, value in tensors_of(GOLDEN / GROUPS).items():
        if not name.endswith("_proj.weight"):
            continue
        scale = np.full((1, 1), np.abs(value).max() / 448, np.float32)
        small = (value / scale).astype(ml_dtypes.float8_e4m3fn)
        rounded[name] = small.astype(np.float32) * scale
        stored |= {name: small, f"{name}_scale_inv": scale}
    assert len(stored) > 100, "experts and attention"
    eight = changed(GROUPS, tmp_path / "eight", stored, quantization_config=EIGHT_BITS)
    plain = changed(GROUPS, tmp_path / "plain", rounded)
    np.testing.assert_array_equal(logits(eight), logits(plain))


def test_a_change_of_the_experts_of_groups_is_rejected(tmp_path):
    with pytest.raises(InputError, match="in some groups alone"):
        moecc.convert(str(GOLDEN / GROUPS), str(tmp_path / "grown"), pipeline="grow")


def test_groups_are_of_the_graph_and_no_other_family_has_them():
    config = parse_config(golden_config(GROUPS))
    graph = build(config)
    assert propose(graph, "deepseek_v3") == config
    assert propose(graph, "kimi_k2").expert_groups == 2
    problems = "\n".join(map(str, propose(graph, "glm4_moe")))
    assert "does not restrict a token to some groups" in problems
    assert "latent attention" in problems
    llama = build(parse_config(golden_config("llama_gqa")))
    problems = propose(llama, "deepseek_v3")
    assert "no other model becomes a deepseek_v3" in problems[-1].message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"n_group": 3}, "do not divide the experts"),
        ({"topk_group": 3}, "that many groups"),
        ({"num_experts_per_tok": 5}, "fewer experts than it chooses"),
        ({"n_group": 8, "topk_group": 8}, "two best experts"),
        ({"head_dim": 14}, "head_dim: transformers makes this of qk_rope_head_dim"),
        ({"scoring_func": "softmax"}, "scoring_func: transformers chooses by sigmoids"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0,
                              "rope_theta": 1e4}}, "mscale_all_dim under every rope type"),
        ({"num_key_value_heads": 2}, "keys and values for each head"),
    ],
)  # fmt: skip
def test_what_the_family_cannot_compute_is_rejected_by_key(keys, words):
    with pytest.raises(InputError, match=words):
        parse_config(golden_config(GROUPS, **keys))
