"""The golden files are what their manifest says, and every family has some."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from family_configs import read_config

from moecc.families.registry import CONFIGS, decoders

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
CASES = sorted(MANIFEST["cases"])
DECODER_CASES = [name for name in CASES if MANIFEST["cases"][name]["family"] in decoders()]


def test_every_family_has_a_checkpoint_and_no_folder_is_left_over():
    # transformers has no kimi_k2, which is a deepseek_v3: tests/families/test_deepseek.py
    without = {"st_moe", "kimi_k2"}
    assert {MANIFEST["cases"][name]["family"] for name in CASES} == CONFIGS.keys() - without
    folders = {path.name for path in HERE.iterdir() if (path / "config.json").exists()}
    assert folders == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_the_manifest(name):
    recorded = MANIFEST["cases"][name]["sha256"]
    paths = {path.name: path for path in (HERE / name).iterdir()}
    assert set(paths) == set(recorded)
    assert sum(path.stat().st_size for path in paths.values()) < 150_000
    for file, digest in recorded.items():
        assert hashlib.sha256(paths[file].read_bytes()).hexdigest() == digest, file


@pytest.mark.parametrize("name", DECODER_CASES)
def test_tokens_and_logits_fit(name):
    config = read_config(HERE / name)
    tokens, logits = golden(name)
    assert tokens.dtype == np.int64
    assert tokens.shape == (2, 16)
    assert tokens.min() >= 0
    assert tokens.max() < config.vocab_size
    assert logits.dtype == np.float32
    assert logits.shape == (*tokens.shape, config.vocab_size)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def golden(name):
    return np.load(HERE / name / "tokens.npy"), np.load(HERE / name / "logits.npy")
