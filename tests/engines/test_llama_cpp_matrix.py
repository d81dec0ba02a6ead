"""llama.cpp computes every GGUF that moecc agrees to write, over rotary positions, windows, heads.

Each family that has an architecture is drawn with each kind of rotary positions, of windows and of
heads, two of the three at a time.  What moecc rejects is not measured; what it writes is.
"""

import json
from itertools import product
from pathlib import Path

import pytest

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.gguf.families import layer_input_architectures
from moecc.jobs.convert import plan, write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.translate.gguf import architectures, export_gguf

from .engine import ask, needs
from .sources import WIDE, write_source
from .test_llama_cpp import (
    COHERE2,
    DELTA,
    DELTA_MOE,
    FULL,
    GEMMA4,
    GPT_OSS,
    LFM2,
    LFM2_MOE,
    LLAMA4,
    MLA,
    MODULE,
    PROBE,
    VARIABLE,
    WINDOW,
    off,
    python,
)

pytestmark = [pytest.mark.parity, needs(VARIABLE, MODULE)]

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
MIXTURE = {"num_local_experts": 5, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TIED = {"tie_word_embeddings": True}
NO_PADDING = {"pad_token_id": None}
GEMMA2 = {
    "query_pre_attn_scalar": 16, "sliding_window": 6, "layer_types": [WINDOW, FULL], **TIED,
}  # fmt: skip
GEMMA3 = {
    "query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 6,
    "layer_types": [*[WINDOW] * 5, FULL], "rope_local_base_freq": 90.0, **TIED,
}  # fmt: skip
ERNIE = {
    "moe_intermediate_size": 32, "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 1,
    "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1,
}  # fmt: skip
GLM = EXPERTS | {
    "n_routed_experts": 5, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
FAMILIES = {
    "llama": ({}, "llama"),
    "mistral": ({}, "llama"),
    "qwen2": ({}, "qwen2"),
    "qwen3": ({}, "qwen3"),
    "granite": ({}, "granite"),
    "olmo2": ({}, "olmo2"),
    "phi3": (NO_PADDING, "phi3"),
    "smollm3": ({"num_hidden_layers": 4, **NO_PADDING}, "smollm3"),
    "gemma": (TIED, "gemma"),
    "gemma2": (GEMMA2, "gemma2"),
    "gemma3_text": (GEMMA3, "gemma3"),
    "gemma4_text": (GEMMA4, "gemma4"),
    "glm4": (NO_PADDING, "glm4"),
    "ernie4_5": ({}, "ernie4_5"),
    "seed_oss": ({}, "seed_oss"),
    "hunyuan_v1_dense": ({}, "hunyuan-dense"),
    "exaone4": ({"sliding_window": None, "layer_types": [FULL, FULL]}, "exaone4"),
    "arcee": ({}, "arcee"),
    "cohere": (TIED, "command-r"),
    "cohere2": (COHERE2, "cohere2"),
    "nemotron": ({}, "nemotron"),
    "starcoder2": ({}, "starcoder2"),
    "stablelm": ({}, "stablelm"),
    "phi": ({}, "phi2"),
    "olmo": ({}, "olmo"),
    "lfm2": (LFM2, "lfm2"),
    "qwen3_5_text": (DELTA, "qwen35"),
    "mixtral": (MIXTURE, "llama"),
    "qwen2_moe": (
        EXPERTS | {"norm_topk_prob": False, "shared_expert_intermediate_size": 32}, "qwen2moe",
    ),
    "qwen3_moe": (EXPERTS | {"norm_topk_prob": True}, "qwen3moe"),
    "olmoe": (
        {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False,
         "num_key_value_heads": 4}, "olmoe",
    ),
    "granitemoe": (MIXTURE, "granitemoe"),
    "glm4_moe": (GLM, "glm4moe"),
    "ernie4_5_moe": (ERNIE, "ernie4_5-moe"),
    "lfm2_moe": (LFM2_MOE, "lfm2moe"),
    "qwen3_next": (DELTA_MOE, "qwen3next"),
    "qwen3_5_moe_text": (DELTA_MOE, "qwen35moe"),
    "llama4_text": (LLAMA4, "llama4"),
    "gpt_oss": (GPT_OSS | {"rope_scaling": None}, "gpt-oss"),
    "deepseek_v2": (MLA, "deepseek2"),
    "deepseek_v3": (MLA, "deepseek2"),
    "kimi_k2": (MLA, "deepseek2"),
}  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn, other bounds": {"rope_scaling": YARN | {"beta_fast": 2.0, "beta_slow": 0.5}},
    "yarn, factors": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "dynamic": {
        "rope_scaling": {
            "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8,
        },
        "max_position_embeddings": 8,
    },
    "half": {"partial_rotary_factor": 0.5},
}  # fmt: skip
SEEN = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0}
WINDOWS = {"usual": {}, "all": SEEN, "every second": SEEN}
HEADS = {
    "usual": {},
    "tied": TIED,
    "wide": {"head_dim": 32},
    "one of keys": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "use_bias": True, "use_qkv_bias": True},
}


def configs(usual, ropes=ROPES):
    """Yield what differs from the usual config of a family, and that config."""
    for rope, window, head in product(ropes, WINDOWS, HEADS):
        if "usual" not in (window, head) and rope != "default":
            continue
        keys = usual | ropes[rope] | WINDOWS[window] | HEADS[head]
        if window == "every second":
            layers = usual.get("num_hidden_layers", WIDE["num_hidden_layers"])
            keys["layer_types"] = [(WINDOW, FULL)[layer % 2] for layer in range(layers)]
        yield f"{rope} positions, {window} windows, {head} heads", keys


def test_every_architecture_is_in_the_table():
    assert {architecture for _, architecture in FAMILIES.values()} == {*architectures()}
    assert {*layer_input_architectures()} - {*architectures()} == {"gemma3n"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_computed(family, tmp_path):
    usual, architecture = FAMILIES[family]
    jobs = {}
    drawn = set()
    for name, keys in configs(SIZES | usual):
        try:
            config = parse_config({"model_type": family, **WIDE, **keys})
            if (text := json.dumps(config.to_json())) in drawn:
                continue
            drawn.add(text)
            export_gguf(build(config), architecture)
        except InputError:
            continue
        folder = tmp_path / f"{len(jobs)}"
        source, file = write_source(folder, family, **keys), tmp_path / f"{len(jobs)}.gguf"
        with open_model(str(source)) as model:
            write(plan(model, Pipeline.parse(""), f"gguf:{architecture}", check=False), file)
        jobs[name] = {"file": str(file), "tokens": str(folder / "tokens.npy")}
    assert len(jobs) >= 2
    # Each rotation that was wrong before it was rejected was at least 3e-2 off.
    bound = 1e-3 if architecture.startswith(("gemma", "starcoder2", "phi2")) else 1e-5
    reports = ask(python(), PROBE, list(jobs.values()))
    wrong = {
        name: report or off(job, Path(job["tokens"]).parent)
        for (name, job), report in zip(jobs.items(), reports, strict=True)
        if report or not off(job, Path(job["tokens"]).parent) <= bound
    }
    assert not wrong, f"{wrong} of {len(jobs)}"
