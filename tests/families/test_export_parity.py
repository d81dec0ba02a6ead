"""transformers loads what is exported, completely, and computes what the graph computes.

Runs where transformers is installed beside the tests, and in every interpreter that the environment
variable MOECC_PARITY_PYTHON lists (separated as in PATH), say one with version 4 and one with 5.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moecc_passes.upcycle.upcycle import UpcyclePass
from safetensors.numpy import save_file

from moecc.backend import get_backend
from moecc.families import import_checkpoint
from moecc.families.configs import parse_config
from moecc.families.export import export_graph
from moecc.pipeline.passes import Context
from moecc.testing.checkpoints import exported_checkpoint, random_checkpoint
from moecc.weights.evaluate import materialise

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
Case = tuple[dict[str, Any], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "llama-mixtral": ({"model_type": "llama", "rope_theta": 5e5}, "mixtral", {}),
    "llama-mixtral-granular": (
        {"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True},
        "mixtral",
        {"granularity": 2, "top_k": 4, "experts": 8},
    ),
    "mistral-mixtral-drop": (
        {"model_type": "mistral", "sliding_window": 5}, "mixtral", {"init": "drop"},
    ),
    "llama-qwen2_moe": (
        {"model_type": "llama", "rms_norm_eps": 1e-5}, "qwen2_moe",
        {"shared": 0.5, "layers": "every:2"},
    ),
    "qwen2-qwen2_moe": (
        {"model_type": "qwen2", "tie_word_embeddings": True}, "qwen2_moe",
        {"shared": 0.25, "gates": "softmax"},
    ),
    "qwen3-qwen3_moe": (
        {"model_type": "qwen3", "head_dim": 12}, "qwen3_moe", {"layers": "0,3", "top_k": 3},
    ),
    "qwen3-qwen3_moe-softmax": (
        {"model_type": "qwen3", "head_dim": 8}, "qwen3_moe", {"gates": "softmax", "init": "noise"},
    ),
    "llama-llama": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, "llama", {}),
}  # fmt: skip


def interpreters() -> list[str]:
    listed = [path for path in os.environ.get("MOECC_PARITY_PYTHON", "").split(os.pathsep) if path]
    beside = [sys.executable] if importlib.util.find_spec("transformers") else []
    return [*listed, *beside]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if not interpreters():
        pytest.skip("transformers is not installed here, and MOECC_PARITY_PYTHON names no other")
    place = tmp_path_factory.mktemp("exports")
    return [write(place / name, *case) for name, case in CASES.items()]


def write(folder: Path, keys: dict[str, Any], target: str, options: dict[str, Any]) -> Path:
    """Write an upcycled model of random weights, tokens, and the logits of the rewritten graph."""
    checkpoint = random_checkpoint(parse_config({**SIZES, "dtype": "float32", **keys}), seed=8)
    graph = import_checkpoint(checkpoint)
    if target != keys["model_type"]:
        options = {"experts": 4, "top_k": 2, "router_std": 0.5, **options}
        UpcyclePass(**options).apply(graph, Context())
    made = export_graph(graph, target)
    folder.mkdir()
    written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
    (folder / "config.json").write_text(json.dumps(made.config_json))
    save_file(written.arrays, folder / "model.safetensors", {"format": "pt"})
    tokens = np.random.default_rng(1).integers(0, 40, (2, 12))
    params = {n: materialise(v.weight, checkpoint.read) for n, v in graph.params.items()}
    logits = get_backend("reference").compile(graph).run(params, {"tokens": tokens})["logits"]
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "logits.npy", logits)
    return folder


@pytest.mark.parametrize("python", interpreters() or [sys.executable])
def test_transformers_computes_what_the_graph_does(python: str, folders: list[Path]) -> None:
    script = Path(__file__).parent / "load_exports.py"
    command = [python, "-W", "ignore", str(script), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    models = json.loads(done.stdout.splitlines()[-1])["models"]
    assert set(models) == set(CASES)
    for name, found in models.items():
        assert found["missing"] == found["unexpected"] == found["mismatched"] == [], name
        assert found["class"].lower().startswith(CASES[name][1].replace("_", "")), name
        assert found["difference"] <= 2e-6, (name, found)
