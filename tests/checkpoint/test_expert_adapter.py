"""Adapters of experts, as PEFT 0.21 writes them for ``target_parameters``.

The products are those of its `ParamWrapper.get_delta_weight`, in einsum.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.errors import InputError, UsageError
from moecc.formats.adapter import AdaptedCheckpoint
from moecc.formats.open import open_checkpoint
from moecc.jobs.convert import plan, write
from moecc.model.open import add_branches
from moecc.rewrite.pipeline import Pipeline

from .folders import GOLDEN, WEIGHTS, opened_model, read_json, write_adapter

MODULE = "model.layers.1.mlp.experts"
RANK = 2


def adapter(folder, tensors):
    return write_adapter(folder, tensors, target_parameters=["mlp.experts"])


def pair(module, experts, out, into):
    rng = np.random.default_rng(len(module))
    return {
        f"{module}.lora_A.weight": rng.normal(size=(experts * RANK, into)).astype("f"),
        f"{module}.lora_B.weight": rng.normal(size=(out, RANK * experts)).astype("f"),
    }


def delta(tensors, module, experts, spelled):
    a, b = (tensors[f"{module}.lora_{letter}.weight"].astype(float) for letter in "AB")
    a, b = a.reshape(experts, RANK, -1), b.reshape(len(b), RANK, experts)
    return 3.0 * np.einsum(f"ore,eri->{spelled}", b, a)


def test_matrices_of_every_expert_are_merged(tmp_path):
    """The inner adapter is of gate and up together, the outer one of down; a router is a matrix."""
    tensors = pair(f"{MODULE}.base_layer", 4, 40, 16) | pair(MODULE, 4, 16, 20)
    router = "model.layers.1.mlp.gate"
    tensors |= pair(router, 1, 4, 16)
    up = delta(tensors, f"{MODULE}.base_layer", 4, "eoi")
    parts = {"w1": up[:, :20], "w3": up[:, 20:], "w2": delta(tensors, MODULE, 4, "eoi")}
    with (
        open_checkpoint(GOLDEN / "mixtral_gqa") as base,
        AdaptedCheckpoint(base, adapter(tmp_path / "a", tensors)) as merged,
    ):
        for name in base.tensors:
            expected = base.read(name).astype(float)
            if "layers.1.block_sparse_moe.experts." in name:
                *_, expert, word, _ = name.split(".")
                expected += parts[word][int(expert)]
            elif name == "model.layers.1.block_sparse_moe.gate.weight":
                expected += delta(tensors, router, 1, "oi")
            np.testing.assert_allclose(merged.read(name), expected, rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(merged.read(name, 1, 3), merged.read(name)[1:3])


def test_a_parameter_of_all_experts_is_merged(tmp_path):
    """Those of gpt_oss have their inputs first, which their shapes, all square, do not show."""
    tensors = pair(f"{MODULE}.base_layer", 8, 8, 8)
    name = f"{MODULE}.gate_up_proj"
    with (
        open_checkpoint(GOLDEN / "gpt_oss_square_v4") as base,
        AdaptedCheckpoint(base, adapter(tmp_path / "a", tensors)) as merged,
    ):
        expected = base.read(name) + delta(tensors, f"{MODULE}.base_layer", 8, "eio")
        np.testing.assert_allclose(merged.read(name), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(merged.read(name, 2, 5), merged.read(name)[2:5])


@pytest.mark.parametrize(
    ("source", "tensors", "message"),
    [
        ("mixtral_gqa", pair(MODULE, 4, 12, 16), "does not suit the experts' shapes"),
        ("mixtral_gqa", pair(MODULE, 3, 40, 16), "does not suit the experts' shapes"),
        ("mixtral_square", pair(MODULE, 4, 8, 8), "do not tell which parameter"),
        ("mixtral_gqa", pair(MODULE, 4, 40, 16) | pair(f"{MODULE}.base_layer", 4, 40, 16), "two"),
        ("llama_gqa", pair(MODULE, 4, 40, 16), "does not have"),
    ],
)
def test_adapters_that_do_not_suit(source, tensors, message, tmp_path):
    folder = adapter(tmp_path / "a", tensors)
    with (
        open_checkpoint(GOLDEN / source) as base,
        pytest.raises(InputError, match=message),
    ):
        AdaptedCheckpoint(base, folder)


def test_the_adapter_is_in_the_receipt_of_the_merged_model(tmp_path):
    tensors = pair(MODULE, 4, 16, 20)
    folder = adapter(tmp_path / "a", tensors)
    with opened_model("mixtral_gqa") as model:
        add_branches(model, {"a": str(folder)})
        planned = plan(model, Pipeline.parse("merge-adapter{source=a}"), "mixtral")
        write(planned, tmp_path / "out")
    manifest = read_json(tmp_path / "out" / "moecc_manifest.json")
    assert "a/adapter_model.safetensors" in manifest["source_files"]
    before = load_file(GOLDEN / "mixtral_gqa" / WEIGHTS)
    after = load_file(tmp_path / "out" / WEIGHTS)
    added = delta(tensors, MODULE, 4, "eoi")
    for name, array in after.items():
        expected = before[name].astype(float)
        if "layers.1" in name and name.endswith("w2.weight"):
            expected += added[int(name.split(".")[-3])]
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)


def test_a_model_is_no_adapter_of_itself():
    with pytest.raises(UsageError, match="its own weights"):
        Pipeline.parse("merge-adapter{source=base}")
    with (
        opened_model("mixtral_gqa") as model,
        pytest.raises(InputError, match="no model of this name"),
    ):
        plan(model, Pipeline.parse("merge-adapter{source=a}"), "mixtral")
