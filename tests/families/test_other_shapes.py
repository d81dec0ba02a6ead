"""Families of a shape of their own: read as written, exported as they are, shrunk, upcycled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.checkpoint.open import open_checkpoint
from moecc.errors import InputError
from moecc.families import build, import_checkpoint, rebuild
from moecc.families.configs import ModelConfig, parse_config
from moecc.families.export import export_graph
from moecc.families.importing import unread_tensors
from moecc.ir import equal, parse, print_graph, verify
from moecc.pipeline.text import Pipeline
from moecc.tasks.check import check_pipeline
from moecc.testing.checkpoints import MemoryCheckpoint, exported_checkpoint, random_checkpoint
from moecc.testing.data import inputs_for
from moecc.weights.evaluate import materialise
from moecc.weights.expr import Source

GOLDEN = Path(__file__).parent.parent / "golden"
GPT2 = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9}
NEOX = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip

CONFIGS: list[dict[str, Any]] = [
    {"model_type": "gpt2", **GPT2},
    {"model_type": "gpt2", **GPT2, "n_inner": 12, "tie_word_embeddings": False},
    {"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.5},
    {"model_type": "gpt_neox", **NEOX, "rotary_pct": 1.0, "use_parallel_residual": False},
    {"model_type": "gpt_neox", **NEOX, "attention_bias": False, "tie_word_embeddings": True},
]
NAMES = [f"{number}-{config['model_type']}" for number, config in enumerate(CONFIGS)]
each = pytest.mark.parametrize("keys", CONFIGS, ids=NAMES)


def run(checkpoint: MemoryCheckpoint) -> np.ndarray:
    graph = import_checkpoint(checkpoint)
    params = {n: materialise(v.weight, checkpoint.read) for n, v in graph.params.items()}
    inputs = inputs_for(graph, 3, {"B": 2, "S": 6, "T": 5})
    return next(iter(get_backend("reference").compile(graph).run(params, inputs).values()))


@each
def test_a_config_is_read_as_it_is_written(keys: dict[str, Any]) -> None:
    config = parse_config(keys)
    written = config.to_json()
    assert parse_config(written) == config
    assert parse_config(written).to_json() == written
    for spelling in (("rope_parameters", "dtype"), ("rope_scaling", "rotary_pct", "torch_dtype")):
        half = {key: value for key, value in written.items() if key not in spelling}
        assert parse_config(half) == config


@each
def test_a_model_is_exported_as_it_is_and_as_st_moe(keys: dict[str, Any]) -> None:
    config = parse_config(keys)
    checkpoint = random_checkpoint(config, seed=2)
    graph = import_checkpoint(checkpoint)
    verify(graph)
    assert equal(parse(print_graph(graph)), graph)
    expected = run(checkpoint)
    own = export_graph(graph, config.model_type)
    assert own.config == config
    assert all(isinstance(expr, Source) and expr.name == name for name, expr in own.tensors)
    for made in (own, export_graph(graph, "st_moe")):
        written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
        np.testing.assert_array_equal(run(written), expected)


@each
def test_a_model_is_shrunk_by_its_config(keys: dict[str, Any]) -> None:
    graph = build(parse_config(keys))
    small = rebuild(graph.attrs)
    assert [(n.op, n.loc) for n in small] == [(n.op, n.loc) for n in graph]
    assert check_pipeline(graph, Pipeline.parse("upcycle{experts=4 top-k=2}"))


def without(config: ModelConfig, prefix: str) -> MemoryCheckpoint:
    """Return a random checkpoint as its base model would be saved alone."""
    made = random_checkpoint(config, seed=4)
    arrays = {name.removeprefix(prefix): array for name, array in made.arrays.items()}
    return MemoryCheckpoint(config.to_json(), arrays)


def test_a_gpt2_saved_without_its_head_is_read_as_with_it() -> None:
    """The first checkpoints are so, and hold the causal masks as tensors."""
    config = parse_config({"model_type": "gpt2", **GPT2})
    bare = without(config, "transformer.")
    bare.arrays["h.0.attn.bias"] = np.ones((1, 1, 9, 9), np.float32)
    np.testing.assert_array_equal(run(bare), run(random_checkpoint(config, seed=4)))
    graph = import_checkpoint(bare)
    assert unread_tensors(graph, bare) == []
    assert {expr.name for _, expr in export_graph(graph, "gpt2").tensors} < set(bare.arrays)
    del bare.arrays["h.1.ln_2.bias"]
    with pytest.raises(InputError, match=r"h\.1\.ln_2\.bias: this tensor is missing"):
        import_checkpoint(bare)


def test_what_a_gpt_cannot_say_is_refused() -> None:
    for keys, words in (
        ({"model_type": "gpt2", "n_head": 7}, "heads do not divide"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "reads an encoder"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "activation_function"),
        ({"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.9}, "even number"),
        ({"model_type": "gpt_neox", **NEOX, "rope_scaling": {"type": "su"}}, "rope_scaling"),
    ):
        with pytest.raises(InputError, match=words):
            parse_config(keys)
    config = parse_config({"model_type": "gpt_neox", **NEOX})
    with pytest.raises(InputError, match="even number"):
        replace(config, rotary_dim=3)
    with pytest.raises(InputError, match="takes no mask"):
        build(config, padding=True)


def test_the_tensors_of_a_golden_gpt2_are_those_of_the_hub() -> None:
    with open_checkpoint(GOLDEN / "gpt2_plain") as checkpoint:
        assert "transformer.h.0.attn.c_attn.weight" in checkpoint.tensors
        assert checkpoint.tensors["transformer.h.0.attn.c_attn.weight"].shape == (12, 36)
