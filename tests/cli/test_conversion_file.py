"""Conversions that a TOML file, or the YAML of mergekit-moe, describes."""

import pytest

from moecc.errors import InputError
from moecc.jobs.conversion_file import read_conversion_file
from tests.train.tiny import draw_weights, make_model

from .conftest import LLAMA

MIXED = """
base_model: {0}
gate_mode: uniform_random
dtype: float32
experts:
  - source_model: {0}
  - source_model: {1}
"""


def test_a_toml_file_is_the_options(tmp_path, dense, cli):
    file, pipeline = tmp_path / "sparse.toml", "upcycle{experts=2 top-k=2 sources=base,other}"
    file.write_text(
        f'source = "dense"\npipeline = "{pipeline}"\n'
        'to = "mixtral"\nseed = 3\n[experts]\nother = "dense"\n'
    )
    cli("convert", file, tmp_path / "a")
    more = ("--experts", f"other={dense}", "--seed", "3")
    cli.convert(dense, tmp_path / "b", *more, pipeline=pipeline)
    cli("convert", file, tmp_path / "c", "--seed", "4")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]  # what the command line says has precedence


def test_every_wrong_key_is_named_with_its_line(tmp_path, out, cli):
    file = tmp_path / "sparse.toml"
    file.write_text('source = "dense"\nseed = "one"\npipelin = ""\n[experts]\nbase = "x"\n')
    lines = ("sparse.toml:2: seed", "sparse.toml:3: pipelin", "sparse.toml:4: experts")
    cli("convert", file, out, code=1, says=lines)


def test_models_of_mergekit_become_experts(tmp_path, out, dense, cli):
    file = tmp_path / "merge.yaml"
    file.write_text(MIXED.format(LLAMA, dense))
    cli("convert", file, out)
    cli("prove", LLAMA, out)


def test_prompts_make_the_routers(tmp_path, out, cli):
    dense = draw_weights(make_model(tmp_path / "dense"))
    file = tmp_path / "merge.yml"
    file.write_text(
        f"base_model: {dense}\nexperts_per_token: 1\nexperts:\n"
        f"  - source_model: {dense}\n    positive_prompts: ['def main():', 'import numpy']\n"
        f"  - source_model: {dense}\n    positive_prompts: [Once upon a time]\n"
    )
    cli("convert", file, out, code=2, says="moecc capture")
    captured = tmp_path / "captured"
    cli("capture", file, "--out", captured, "--sequence", "16")
    cli("convert", file, out, "--capture", captured)
    cli("prove", dense, out)


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
    dtype = "" if line.startswith("dtype") else "dtype: bfloat16\n"
    experts = "experts:\n  - source_model: a\n  - source_model: b\n"
    file.write_text(f"base_model: a\n{dtype}{experts}{line}\n")
    with pytest.raises(InputError, match=word):
        read_conversion_file(str(file))
