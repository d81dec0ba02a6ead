"""llama.cpp computes of a GGUF file that moecc wrote what the source computes.

``make proof-engines`` runs this where ``MOECC_LLAMA_CPP_PYTHON`` names an interpreter that has
llama-cpp-py-sync (tried with 0.11739).
"""

import os
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from derived_models import DERIVED, derive
from shapes_in_gguf import CASES, write_gemma3n
from shapes_in_gguf import write as write_shape

from moecc.backend import get_backend
from moecc.formats.gguf.families import mixture_architectures
from moecc.jobs.convert import plan, write
from moecc.jobs.generate import Continuer, Continuing, load_tokenizer
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.types import F64
from tests.checkpoint.gguf.conftest import GgufBuilder, add_model
from tests.checkpoint.gguf.test_gguf_tokenizer import byte_alphabet, byte_level

from .engine import ask, interpreter, needs
from .sources import write_source

VARIABLE, MODULE, PROBE = "MOECC_LLAMA_CPP_PYTHON", "llama_cpp_py_sync", "logits_of_llama_cpp.py"
GOLDEN = Path(__file__).parents[1] / "golden"
SINGLE = 1e-6
"""The bound on max |Δ logit| / max |logit| in float32, cache included."""

BOUNDS = {
    # XLA in float32 is 1e-6 to 5e-6 off with gated delta rules.
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), 5e-6),
    # ggml looks GELU up in a table of half precision.
    **dict.fromkeys(("starcoder2", "phi2", "gemma4"), 3e-4),
}
"""Those of other architectures."""

SIGMOID = "upcycle{experts=4 gates=sigmoid-renormalised shared=0.5 shared-gate=none router-std=1}"
EXACT = [
    ("llama_biases_head_dim", "llama", ""),
    ("mistral_full_head_dim", "llama", ""),
    ("qwen2_gqa_tied", "qwen2", ""),
    ("qwen3_head_dim_tied", "qwen3", ""),
    ("mixtral_top1_head_dim", "llama", ""),
    ("qwen2_moe_plain", "qwen2moe", ""),
    ("qwen3_moe_norm", "qwen3moe", ""),
    ("llama_gqa", "llama", "upcycle{experts=6 top-k=2 router-std=1}"),
    ("llama_square_tied", "llama", "upcycle{experts=8 top-k=4 granularity=2 router-std=1}"),
    ("llama_yarn", "llama", "upcycle{experts=4}"),
    ("llama_linear", "llama", "upcycle{experts=4 router-init=zero}"),
    ("qwen3_head_dim_tied", "qwen3moe", "upcycle{experts=3 top-k=3}"),
    (
        "qwen2_square",
        "qwen2moe",
        "upcycle{experts=8 top-k=2 shared=0.5 gates=softmax router-init=zero}",
    ),
    ("qwen2_gqa_tied", "qwen2moe", "upcycle{experts=4 top-k=4 shared=0.5 router-std=1}"),
    ("granite_multipliers", "granite", ""),
    ("olmo2_square_tied", "olmo2", ""),
    ("phi3_square", "phi3", ""),
    ("ernie4_5_square", "ernie4_5", ""),
    ("seed_oss_biases", "seed_oss", ""),
    ("hunyuan_dense_square", "hunyuan-dense", ""),
    ("exaone4_square", "exaone4", ""),
    ("glm4_biases", "glm4", ""),
    ("arcee_square", "arcee", ""),
    ("cohere_square", "command-r", ""),
    ("nemotron_square", "nemotron", ""),
    ("stablelm_square", "stablelm", ""),
    ("olmo_square", "olmo", ""),
    ("granitemoe_multipliers", "granitemoe", ""),
    ("glm4_moe_dense_first", "glm4moe", ""),
    ("glm4_moe_plain_v4", "glm4moe", ""),
    ("ernie4_5_moe_square_v4", "ernie4_5-moe", ""),
    ("olmoe_heads", "olmoe", ""),
    ("llama_llama3", "granitemoe", "upcycle{experts=4 router-std=1}"),
    ("qwen2_square", "glm4moe", SIGMOID),
    ("llama_gqa", "glm4moe", SIGMOID.replace("router-std=1", "layers=last:2")),
    ("llama_gqa", "ernie4_5-moe", "upcycle{shared=0.5 shared-gate=none layers=last:2}"),
    ("llama_gqa", "llama", "upcycle{experts=4 granularity=2 pad=7 router-std=1}"),
    ("glm4_moe_square", "glm4moe", "zero-experts{count=2}"),
    ("glm4_moe_plain_v4", "glm4moe", "grow{chosen=same}"),
    ("llama_gqa", "ernie4_5-moe", "upcycle{experts=4 router-std=1},zero-experts{count=2}"),
]
"""Golden checkpoints, the architecture to write, and what is done first."""

CONVOLVED = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
LFM2 = {**CONVOLVED, "block_auto_adjust_ff_dim": False, "conv_L_cache": 4}
LFM2_MOE = {
    **CONVOLVED, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "num_dense_layers": 1,
}  # fmt: skip
MLA = {
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 32,
    "kv_lora_rank": 64, "q_lora_rank": 96, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
LITE = {"q_lora_rank": None, "num_hidden_layers": 26, "routed_scaling_factor": 1.0}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
DELTA = {
    "num_hidden_layers": 3, "full_attention_interval": 2, "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
DELTA_MOE = DELTA | {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
COHERE2 = {"num_hidden_layers": 4, "sliding_window": 6, "tie_word_embeddings": True}
GPT_OSS = {
    "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6,
    "intermediate_size": 64, "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
LLAMA4 = {
    "num_hidden_layers": 4, "intermediate_size": 64, "intermediate_size_mlp": 96,
    "num_local_experts": 5, "num_experts_per_tok": 1,
}  # fmt: skip
SCOUT = {
    "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MAVERICK = {"num_local_experts": 128, "use_qk_norm": False, "interleave_moe_layer_step": 2}
WINDOW, FULL = "sliding_attention", "full_attention"
GEMMA4 = {
    "num_hidden_layers": 6, "global_head_dim": 64, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 64, "sliding_window": 6, "layer_types": [WINDOW, FULL] * 3,
    "tie_word_embeddings": True, "rope_theta": None,
}  # fmt: skip
SHARED_KEYS = {
    "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 70,
}  # fmt: skip
VALUES_ARE_KEYS = {
    "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        FULL: {
            "rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 900.0,
            "factor": 2.0,
        },
        WINDOW: {"rope_type": "default", "rope_theta": 500.0},
    },
}  # fmt: skip
GEMMA4_MOE = {
    "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
GEMMA3N = {
    "num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": 16384,
    "activation_sparsity_pattern": [0.95] * 5, "sliding_window": 6, "tie_word_embeddings": True,
    "vocab_size_per_layer_input": 64, "rope_local_base_freq": 90.0,
}  # fmt: skip
DRAWN = [
    ("gemma4_text", GEMMA4, "gemma4", ""),
    ("gemma4_text", GEMMA4 | SHARED_KEYS, "gemma4", ""),
    ("gemma4_text", GEMMA4 | VALUES_ARE_KEYS, "gemma4", ""),
    ("gemma4_text", GEMMA4 | GEMMA4_MOE, "gemma4", ""),
    ("lfm2", LFM2, "lfm2", ""),
    ("lfm2", LFM2 | {"tie_word_embeddings": True, "conv_L_cache": 2}, "lfm2", ""),
    ("lfm2_moe", LFM2_MOE, "lfm2moe", ""),
    ("lfm2_moe", LFM2_MOE | {"use_expert_bias": False, "num_dense_layers": 0}, "lfm2moe", ""),
    ("lfm2", LFM2, "lfm2moe", "upcycle{experts=4 gates=sigmoid-renormalised router-std=1}"),
    ("deepseek_v2", MLA | LITE, "deepseek2", ""),
    ("deepseek_v2", MLA | {"rope_scaling": YARN}, "deepseek2", ""),
    ("deepseek_v3", MLA | {"n_group": 4, "topk_group": 2}, "deepseek2", ""),
    ("deepseek_v3", MLA | {"norm_topk_prob": False, "rope_scaling": YARN}, "deepseek2", ""),
    ("kimi_k2", MLA | {"first_k_dense_replace": 0}, "deepseek2", ""),
    ("cohere2", COHERE2, "cohere2", ""),
    ("olmo", {"clip_qkv": 0.7}, "olmo", ""),
    ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}, "stablelm", ""),
    ("starcoder2", {"use_bias": True}, "starcoder2", ""),
    ("phi", {"partial_rotary_factor": 0.5}, "phi2", ""),
    ("gpt_oss", GPT_OSS, "gpt-oss", ""),
    ("gpt_oss", GPT_OSS | {"rope_scaling": None, "tie_word_embeddings": True}, "gpt-oss", ""),
    ("llama4_text", LLAMA4 | {"rope_scaling": SCOUT, "num_experts_per_tok": 2}, "llama4", ""),
    ("llama4_text", LLAMA4 | MAVERICK, "llama4", ""),
    ("qwen3_next", DELTA_MOE, "qwen3next", ""),
    ("qwen3_5_text", DELTA, "qwen35", ""),
    ("qwen3_5_moe_text", DELTA_MOE, "qwen35moe", ""),
    ("qwen3_5_text", DELTA, "qwen35moe", "upcycle{experts=4 top-k=2 shared=0.5 router-std=1}"),
]
"""Families with changes of a config, whose weights are drawn, as `EXACT`."""

pytestmark = [pytest.mark.parity, needs(VARIABLE, MODULE)]


def python():
    found = interpreter(VARIABLE, MODULE)
    assert found is not None
    return found


def written(cases, folder):
    """Convert each case; return the jobs for the engine."""
    jobs = []
    for number, (source, architecture, passes) in enumerate(cases):
        file = folder / f"{number}.gguf"
        with open_model(str(GOLDEN / source)) as model:
            write(plan(model, Pipeline.parse(passes), f"gguf:{architecture}", seed=1), file)
        jobs.append({"file": str(file), "tokens": str(GOLDEN / source / "tokens.npy")})
    return jobs


def off(job, source):
    """Return max |Δ logit| / max |logit| of the engine against those beside the source."""
    found = np.load(job["file"] + ".logits.npy").astype(np.float64)
    golden = np.load(GOLDEN / source / "logits.npy").astype(np.float64)
    return float(np.abs(found - golden).max() / np.abs(golden).max())


def test_logits(tmp_path):
    jobs = written(EXACT, tmp_path)
    wrong = [
        f"{case}: {report or off(job, case[0])}"
        for case, job, report in zip(EXACT, jobs, ask(python(), PROBE, jobs), strict=True)
        if report or not off(job, case[0]) <= SINGLE
    ]
    assert not wrong, "\n".join(wrong)


def test_logits_of_drawn_weights(tmp_path):
    jobs = []
    for number, (family, keys, architecture, passes) in enumerate(DRAWN):
        source = write_source(tmp_path / f"{number}", family, **keys)
        file = tmp_path / f"{number}.gguf"
        with open_model(str(source)) as model:
            write(plan(model, Pipeline.parse(passes), f"gguf:{architecture}", seed=1), file)
        jobs.append({"file": str(file), "tokens": str(source / "tokens.npy")})
    wrong = [
        f"{case}: {report or off(job, Path(job['tokens']).parent)}"
        for case, job, report in zip(DRAWN, jobs, ask(python(), PROBE, jobs), strict=True)
        if report or not off(job, Path(job["tokens"]).parent) <= BOUNDS.get(case[2], SINGLE)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("architecture", "bound"),
    # ggml looks GELU up in a table of half precision.
    [("smollm3", SINGLE), ("gemma", 2e-4), ("gemma2", 2e-3), ("gemma3", 2e-3)],
)
def test_what_an_architecture_fixes(architecture, bound, tmp_path):
    """Models that no golden one is: the engine agrees with the reference interpreter."""
    source, file = GOLDEN / "gemma_mqa", tmp_path / "m.gguf"
    if architecture in DERIVED:
        source = derive(architecture, tmp_path / "source")
    tokens = {"tokens": np.load(source / "tokens.npy")}
    with open_model(str(source)) as model:
        write(plan(model, Pipeline.parse(""), f"gguf:{architecture}"), file)
        program = get_backend("reference").compile(model.graph)
        expected = program.run(model.params(dtype=F64), tokens)["logits"]
    job = {"file": str(file), "tokens": str(source / "tokens.npy")}
    assert ask(python(), PROBE, [job]) == [{}]
    found = np.load(f"{file}.logits.npy")
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize(("source", "architecture"), [c for c in CASES if c[1] != "bert"])
def test_what_is_read_of_other_shapes(source, architecture, tmp_path):
    """Files that moecc reads and does not write: the engine computes what moecc reads of them."""
    _, file = write_shape(source, architecture, tmp_path)
    job = {"file": str(file), "tokens": str(GOLDEN / source / "tokens.npy")}
    assert ask(python(), PROBE, [job]) == [{}]
    with open_model(str(file)) as model:
        program = get_backend("reference").compile(model.graph)
        tokens = {"tokens": np.load(job["tokens"])}
        expected = program.run(model.params(dtype=F64), tokens)["logits"]
    found = np.load(f"{file}.logits.npy")
    # ggml looks GELU up in a table of half precision.
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_what_is_read_of_gemma3n(tmp_path):
    """llama.cpp is 1.6e-4 off, since it divides a variance of 16,384 neurons by one less."""
    source, file = write_source(tmp_path / "source", "gemma3n_text", **GEMMA3N), tmp_path / "m.gguf"
    write_gemma3n(source, file)
    job = {"file": str(file), "tokens": str(source / "tokens.npy")}
    assert ask(python(), PROBE, [job]) == [{}]
    with open_model(str(file)) as model:
        program = get_backend("reference").compile(model.graph)
        tokens = {"tokens": np.load(job["tokens"])}
        logits = program.run(model.params(dtype=F64), tokens)["logits"]
    np.testing.assert_array_equal(logits, np.load(source / "logits.npy"))
    assert off(job, source) <= 1e-3


def test_experts_that_differ(tmp_path):
    """Among copies it would not show if experts or router rows were mixed up."""
    cases = [
        ("llama_gqa", "llama", "upcycle{experts=8 top-k=2 init=drop drop-ratio=0.9 router-std=1}"),
        ("qwen3_square", "qwen3moe", "upcycle{experts=6 init=noise noise-std=1 router-std=1}"),
    ]
    jobs = written(cases, tmp_path)
    assert ask(python(), PROBE, jobs) == [{}, {}]
    for job, (source, _, _) in zip(jobs, cases, strict=True):
        assert off(job, source) > 0.1
        with open_model(job["file"]) as model:
            program = get_backend("reference").compile(model.graph)
            tokens = {"tokens": np.load(job["tokens"])}
            logits = program.run(model.params(dtype=F64), tokens)["logits"]
        found = np.load(job["file"] + ".logits.npy")
        assert np.abs(found - logits).max() / np.abs(logits).max() <= SINGLE


def test_what_llama_cpp_refuses(tmp_path, monkeypatch):
    """The engine refuses a tied qwen2moe without the head that moecc writes."""
    row = mixture_architectures()["qwen2moe"]
    monkeypatch.setattr(row.config, "gguf", replace(row.facts, needs_head=False))
    case = ("qwen2_gqa_tied", "qwen2moe", "upcycle{experts=4 top-k=4 shared=0.5}")
    (report,) = ask(python(), PROBE, written([case], tmp_path))
    assert "'output.weight' not found" in report["refused"]


WORDS = "It's 12345 o'clock!\r\n\n  naïve café — 日本語 12, x+=y; __init__(self)  \t don'T #bar ༽つ"


@pytest.mark.parametrize("pre", ["lfm2", "qwen35", "deepseek-v3"])
def test_words_are_cut_alike(pre, tmp_path):
    alphabet = byte_alphabet()
    text = [alphabet[byte] for byte in WORDS.encode()]
    pairs = list(dict.fromkeys(f"{a} {b}" for a, b in pairwise(text)))
    model = partial(add_model, GgufBuilder())
    builder = byte_level(model, pre, merges=pairs, rows=258 + len(pairs))
    file = builder.key("tokenizer.ggml.add_bos_token", "bool", 0).write(tmp_path / "m.gguf")
    (report,) = ask(python(), PROBE, [{"file": str(file), "prompt": WORDS, "count": 0}])
    with open_model(str(file)) as model, load_tokenizer(model) as tokenizer:
        assert report["prompt"] == tokenizer.encode(WORDS)


def test_smollm2_continues_a_sentence_with_the_same_tokens(tmp_path):
    cache = Path(os.environ.get("MOECC_CACHE", Path.home() / ".cache" / "moecc"))
    source = next(iter(sorted(cache.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))), None)
    if source is None:
        pytest.skip("SmolLM2 is not in MOECC_CACHE or ~/.cache/moecc; make demo fetches it")
    file, prompt = tmp_path / "smollm2-8x.gguf", "It is a truth universally acknowledged, that"
    with open_model(str(source)) as model:
        write(plan(model, Pipeline.parse("upcycle{experts=8 top-k=2}"), "gguf:llama"), file)
    (report,) = ask(python(), PROBE, [{"file": str(file), "prompt": prompt, "count": 16}])
    with open_model(str(file)) as model:
        with load_tokenizer(model) as tokenizer:
            assert report["prompt"] == tokenizer.encode(prompt)
        assert report["added"] == [
            token for (token,) in Continuer(model).texts([report["prompt"]], Continuing(16))
        ]
