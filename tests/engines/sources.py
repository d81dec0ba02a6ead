"""Dense checkpoints with random weights, as wide as the kernels of engines ask for."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moecc.backend import get_backend
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.model.open import open_model
from moecc.types import F64
from moecc.weights.expr import sources

WIDE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_source(folder: Path, family: str, *, routing_bias: float = 0.0, **keys) -> Path:
    """Write a checkpoint, its tokens and its logits in float64; return the folder.

    Args:
      folder: where it goes.
      family: its model type.
      routing_bias: the mean of biases in the choice of experts.
      keys: of its config, besides `WIDE`.
    """
    folder.mkdir(parents=True)
    config = parse_config({"model_type": family, **WIDE, **keys})
    tensors = {}
    for value in build(config).params.values():
        assert value.weight is not None
        for source in sources(value.weight):
            drawn = _drawn(source.name, source.type.shape)
            is_routing = source.name.endswith("e_score_correction_bias")
            tensors[source.name] = drawn + np.float32(routing_bias * is_routing)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    tokens = np.random.default_rng(0).integers(0, WIDE["vocab_size"], (2, 16))
    np.save(folder / "tokens.npy", tokens)
    with open_model(str(folder)) as model:
        program = get_backend("reference").compile(model.graph)
        logits = program.run(model.params(dtype=F64), {"tokens": tokens})["logits"]
    np.save(folder / "logits.npy", logits)
    return folder


def _drawn(name: str, shape: tuple[int, ...]):
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        drawn = 1 + 0.3 * drawn
    elif name.endswith("bias"):
        drawn *= 0.3
    elif "embed" not in name:
        drawn /= np.sqrt(shape[-1])
    return drawn.astype(np.float32)
