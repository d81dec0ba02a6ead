"""LoRA adapters of PEFT are read as the model that they are merged into."""

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.formats.adapter import AdaptedCheckpoint, is_adapter
from moecc.formats.open import open_checkpoint

from .folders import GOLDEN, write_adapter

SOURCE = GOLDEN / "llama_gqa"
GATE = "model.layers.1.mlp.gate_proj"
EMBEDDING = "model.embed_tokens"
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj"


def pair(module, out, into, rank=2, table=False):
    rng = np.random.default_rng(5)
    word, end = ("embedding_", "") if table else ("", ".weight")
    return {
        f"{module}.lora_{word}A{end}": rng.normal(size=(rank, into)),
        f"{module}.lora_{word}B{end}": rng.normal(size=(out, rank)),
    }


@pytest.fixture
def base():
    with open_checkpoint(SOURCE) as opened:
        yield opened


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"gate_proj": 8}}, 4.0),
        ({"alpha_pattern": {"up_proj": 8}}, 3.0),
        ({"alpha_pattern": {r"^model\.layers\.\d+\.mlp\.(gate|up)_proj": 8}}, 4.0),
        ({"alpha_pattern": {"ate_proj": 8}}, 3.0),
        ({"alpha_pattern": {r".*\.gate_proj": 10, "gate_proj": 8}}, 5.0),
    ],
)
def test_a_matrix_is_merged(base, tmp_path, settings, scale):
    made = pair(GATE, 24, 16)
    folder = write_adapter(tmp_path / "a", made, **settings)
    assert is_adapter(folder)
    assert not is_adapter(SOURCE)
    first, second = made.values()
    expected = base.read(f"{GATE}.weight") + scale * second @ first
    with AdaptedCheckpoint(base, folder) as merged:
        np.testing.assert_allclose(merged.read(f"{GATE}.weight"), expected, rtol=1e-6, atol=1e-7)
        rows = merged.read(f"{GATE}.weight", 3, 7)
        np.testing.assert_array_equal(rows, merged.read(f"{GATE}.weight")[3:7])
        np.testing.assert_array_equal(merged.read(NORM), base.read(NORM))
        assert "1 tensor differs" in merged.remarks()[0]


@pytest.mark.parametrize("turned", [True, False])
def test_matrices_of_gpt2_have_their_inputs_first(tmp_path, turned):
    """PEFT decides by the class of the module, and corrects the config."""
    module = "transformer.h.1.attn.c_proj"
    made = pair(module, 12, 12) | pair(f"{module[:-6]}c_attn", 36, 12)
    first, second, *_ = made.values()
    folder = write_adapter(tmp_path / "a", made, fan_in_fan_out=turned)
    with (
        open_checkpoint(GOLDEN / "gpt2_plain") as base,
        AdaptedCheckpoint(base, folder) as merged,
    ):
        expected = base.read(f"{module}.weight") + 3 * (second @ first).T
        found = merged.read(f"{module}.weight")
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_tables_and_whole_tensors(base, tmp_path):
    made = pair(EMBEDDING, 16, 37, table=True)
    whole = {"model.norm.modules_to_save.weight": np.arange(16.0)}
    folder = write_adapter(tmp_path / "a", made | whole)
    first, second = made.values()
    with AdaptedCheckpoint(base, folder) as merged:
        expected = base.read(f"{EMBEDDING}.weight") + 3 * (second @ first).T
        found = merged.read(f"{EMBEDDING}.weight")
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(merged.read(f"{EMBEDDING}.weight", 5, 9), found[5:9])
        np.testing.assert_array_equal(merged.read(NORM), np.arange(16))


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (pair("model.layers.9.mlp.gate_proj", 24, 16), {}, "a module that the model does not have"),
        (pair(GATE, 24, 17), {}, "does not suit the model's shapes"),
        (pair(GATE, 24, 16), {"peft_type": "IA3"}, "peft_type: no such choice"),
        (pair(GATE, 24, 16), {"use_dora": True}, "DoRA"),
        (pair(GATE, 24, 16), {"kasa_config": {"beta": 1}}, "singular values"),
        (pair(GATE, 24, 16), {"lora_alpha": 10**400}, "not a usable number"),
        (
            pair(GATE, 24, 16),
            {"alpha_pattern": {"gate_proj": 10**400}},
            "alpha_pattern.gate_proj: a value of another type",
        ),
        (pair(GATE, 24, 16), {"alpha_pattern": {"(.+)+x": 8}}, "does not match the pattern"),
        (pair(GATE, 24, 16), {"alpha_pattern": {"(" * 3000: 8}}, "does not match the pattern"),
        (pair(GATE, 24, 16), {"alpha_pattern": ["gate_proj"]}, "not an object"),
        ({f"{GATE}.lora_A.weight": np.ones((2, 16))}, {}, "lacks its partner"),
        *(
            (pair(GATE, 24, 16), {"init_lora_weights": start}, "path_initial_model_for_weight")
            for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", ["x"])
        ),
        (pair(GATE, 24, 16), {"use_rslora": "true"}, "use_rslora: a value of another type"),
        (pair(QUERY, 16, 16), {"fan_in_fan_out": True}, "the matrix is square"),
    ],
)
def test_adapters_that_do_not_suit(base, tmp_path, tensors, settings, message):
    with pytest.raises(InputError, match=message):
        AdaptedCheckpoint(base, write_adapter(tmp_path / "a", tensors, **settings))


@pytest.mark.parametrize(
    ("of", "other"),
    [
        ("somebody/Llama_GQA", None),
        ("google/gemma-2b", "google/gemma-2b"),
        ("C:\\models\\Llama_GQA", None),
        ("unsloth/llama_gqa-unsloth-bnb-4bit", None),
        ("/cache/models--somebody--llama_gqa/snapshots/0123abcd", None),
        ("/cache/models--somebody--llama/snapshots/0123abcd", "/cache/models--somebody--llama/"),
        (None, None),
    ],
)
def test_an_adapter_that_names_another_model(base, tmp_path, of, other):
    """Its shapes fit all the same: it is merged if the user says that the model was renamed."""
    folder = write_adapter(tmp_path / "a", pair(GATE, 24, 16), base_model_name_or_path=of)
    with AdaptedCheckpoint(base, folder, allow_other_base=True) as adapted:
        assert adapted.other_base() == (of if other else None)
    if other is None:
        AdaptedCheckpoint(base, folder).close()
        return
    with pytest.raises(InputError, match=f"another model(.|\n)*{other}(.|\n)*--allow-other-base"):
        AdaptedCheckpoint(base, folder)
