"""GGUF files of gemma3n and gemma4, whose layers read embeddings of their own."""

import numpy as np
import pytest
from shapes_in_gguf import write_gemma3n

from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.formats.gguf import layer_inputs
from moecc.formats.gguf.families import layer_input_architectures
from moecc.formats.gguf.header import read_gguf_header
from moecc.jobs.convert import plan, write
from moecc.rewrite.pipeline import Pipeline
from moecc.types import F64
from tests.checkpoint.folders import GOLDEN, needs_gguf, opened_model
from tests.engines.sources import write_source

GEMMA3N = {
    "num_hidden_layers": 21, "num_kv_shared_layers": 1, "hidden_size": 32, "intermediate_size": 64,
    "sliding_window": 6, "vocab_size_per_layer_input": 64, "tie_word_embeddings": True,
}  # fmt: skip


def convert(source, architecture, file):
    with opened_model(source) as model:
        planned = plan(model, Pipeline.parse(""), f"gguf:{architecture}")
        write(planned, file)
    return planned


def logits(path, tokens):
    with opened_model(path) as model:
        program = get_backend("reference").compile(model.graph)
        return program.run(model.params(dtype=F64), {"tokens": tokens})["logits"]


@pytest.mark.parametrize("source", ["gemma4_inputs", "gemma4_experts"])
def test_a_gemma4_that_is_read_back_computes_the_source(source, tmp_path):
    """One shares keys and has more rows of inputs than tokens, the other has experts."""
    planned = convert(GOLDEN / source, "gemma4", tmp_path / "m.gguf")
    assert planned.proved == "the same function as the source"
    tokens = np.load(GOLDEN / source / "tokens.npy")
    expected = logits(GOLDEN / source, tokens)
    np.testing.assert_array_equal(logits(tmp_path / "m.gguf", tokens), expected)


@needs_gguf
def test_a_gemma3n_computes_what_its_file_was_made_of(tmp_path):
    """Its last layer shares keys and values, and the file has matrices of its own for them."""
    source = write_source(tmp_path / "source", "gemma3n_text", **GEMMA3N)
    write_gemma3n(source, tmp_path / "m.gguf")
    computed = logits(tmp_path / "m.gguf", np.load(source / "tokens.npy"))
    np.testing.assert_array_equal(computed, np.load(source / "logits.npy"))


@needs_gguf
def test_a_gemma3n_that_llama_cpp_computes_otherwise(tmp_path):
    source = write_source(tmp_path / "source", "gemma3n_text", **GEMMA3N)
    changes = {
        "activation_sparsity_scale": [1.0] * 21,
        "attention.sliding_window_pattern": [True, False] * 10 + [False],
        "altup.num_inputs": 3,
        "final_logit_softcapping": 20.0,
        "attention.shared_kv_layers": 2,
    }
    for key, value in changes.items():
        file = tmp_path / f"{key}.gguf"
        write_gemma3n(source, file, **{key: value})
        with pytest.raises(InputError, match="whatever the file says") as raised:
            opened_model(file)
        assert f"'gemma3n.{key}'" in str(raised.value)
    write_gemma3n(source, tmp_path / "m.gguf", block_count=(1 << 32) - 1)
    with pytest.raises(InputError, match="shared_kv_layers"):
        opened_model(tmp_path / "m.gguf")


def test_a_gemma4_without_a_cap_says_so(tmp_path):
    """llama.cpp caps logits at 30 where no key says otherwise; measured with b11739."""
    convert(GOLDEN / "gemma4_experts", "gemma4", tmp_path / "m.gguf")
    assert read_gguf_header(tmp_path / "m.gguf").metadata["gemma4.final_logit_softcapping"] == 0


@needs_gguf
@pytest.mark.parametrize("architecture", ["gemma3n", "gemma4"])
def test_names_are_those_of_the_package(architecture):
    import gguf as package

    arch = {name: key for key, name in package.MODEL_ARCH_NAMES.items()}[architecture]
    names = package.get_tensor_name_map(arch, 3)
    family = layer_input_architectures()[architecture]
    for old, new in layer_inputs.layer_tensors(family).items():
        stem, _, part = old.rpartition(".")
        if part == "weight":
            assert (
                names.get_name(f"model.layers.2.{new.removesuffix('.weight')}") == f"blk.2.{stem}"
            )
