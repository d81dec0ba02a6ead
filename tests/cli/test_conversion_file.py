"""Conversions that a TOML file, or the YAML of mergekit-moe, describes."""

import shutil

import pytest

from moecc.errors import InputError
from moecc.jobs.conversion_file import read_conversion_file
from tests.train.tiny import draw_weights, make_model

from .conftest import GOLDEN

SOURCE = GOLDEN / "llama_gqa"
MIXED = """
base_model: {0}
gate_mode: uniform_random
dtype: float32
experts:
  - source_model: {0}
  - source_model: {1}
"""


def test_a_toml_file_is_the_options(tmp_path, moecc):
    shutil.copytree(SOURCE, tmp_path / "dense")
    file = tmp_path / "sparse.toml"
    file.write_text(
        'source = "dense"\npipeline = "upcycle{experts=2 top-k=2 sources=base,other}"\n'
        'to = "mixtral"\nseed = 3\n[experts]\nother = "dense"\n'
    )
    assert moecc("convert", file, tmp_path / "a").code == 0
    words = ("-p", "upcycle{experts=2 top-k=2 sources=base,other}", "--to", "mixtral")
    more = ("--experts", f"other={tmp_path / 'dense'}", "--seed", "3")
    assert moecc("convert", tmp_path / "dense", tmp_path / "b", *words, *more).code == 0
    assert moecc("convert", file, tmp_path / "c", "--seed", "4").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]  # what the command line says has precedence


def test_every_wrong_key_is_named_with_its_line(tmp_path, moecc):
    file = tmp_path / "sparse.toml"
    file.write_text('source = "dense"\nseed = "one"\npipelin = ""\n[experts]\nbase = "x"\n')
    done = moecc("convert", file, tmp_path / "out")
    assert done.code == 1
    for line in ("sparse.toml:2: seed", "sparse.toml:3: pipelin", "sparse.toml:4: experts"):
        assert line in done.err


def test_models_of_mergekit_become_experts(tmp_path, moecc):
    shutil.copytree(SOURCE, tmp_path / "other")
    file = tmp_path / "merge.yaml"
    file.write_text(MIXED.format(SOURCE, tmp_path / "other"))
    assert moecc("convert", file, tmp_path / "out").code == 0
    assert moecc("prove", SOURCE, tmp_path / "out").code == 0


def test_prompts_make_the_routers(tmp_path, moecc):
    dense = draw_weights(make_model(tmp_path / "dense"))
    file = tmp_path / "merge.yml"
    file.write_text(
        f"base_model: {dense}\nexperts_per_token: 1\nexperts:\n"
        f"  - source_model: {dense}\n    positive_prompts: ['def main():', 'import numpy']\n"
        f"  - source_model: {dense}\n    positive_prompts: [Once upon a time]\n"
    )
    done = moecc("convert", file, tmp_path / "out")
    assert done.code == 2
    assert "moecc capture" in done.err
    captured = tmp_path / "captured"
    assert moecc("capture", file, "--out", captured, "--sequence", "16").code == 0
    assert moecc("convert", file, tmp_path / "out", "--capture", captured).code == 0
    assert moecc("prove", dense, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("gate_mode: cheap_embed", "hidden"),
        ("gate_mode: hidden", "positive_prompts"),
        ("experts_per_token: 3", "at most 2"),
        ("shared_experts: [{source_model: a}]", "shared"),
        ("dtype: int8", "bfloat16"),
        ("gate_mode: !!python/name:os.system", ":6"),
        ("architecture: deepseek", "mixtral"),
        ("experts: []", "appears twice"),
        ("other: &a [1]\nmore: *a", "aliases"),
        ("gate_mode: [", ":7"),
        (f"deep: {'[' * 40}{']' * 40}", "nested"),
        (f"deep: {'[' * 4000}{']' * 4000}", "nested"),
        ("date: 2026-99-99", "not a value"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_rejected(tmp_path, line, word):
    file = tmp_path / "merge.yaml"
    file.write_text(
        "base_model: a\ndtype: bfloat16\nexperts:\n  - source_model: a\n  - source_model: b\n"
        .replace("dtype: bfloat16\n", "" if line.startswith("dtype") else "dtype: bfloat16\n")
        + line + "\n"
    )  # fmt: skip
    with pytest.raises(InputError, match=word):
        read_conversion_file(str(file))
