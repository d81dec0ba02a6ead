"""The commands on a graph that repeats its layers."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.ir import parse
from moecc.ir.unroll import is_rolled

from .conftest import LLAMA, UPCYCLE


@pytest.fixture
def rolled(cli, dense_graph, tmp_path):
    """The graph of the small checkpoint, rolled; the checkpoint is where its weights lie."""
    path = tmp_path / "rolled.moe"
    cli("opt", dense_graph, "-p", "roll-layers", "-o", path)
    assert is_rolled(parse(path.read_text()))
    return path


def test_what_is_written_has_layers_of_its_own(cli, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    cli.convert(LLAMA, one)
    done = cli.convert(LLAMA, other, pipeline=f"{UPCYCLE},roll-layers")
    assert "were unrolled" in done.out
    expected, arrays = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_it_runs(cli, rolled, tmp_path):
    tokens, out = tmp_path / "tokens.npy", tmp_path / "out.npy"
    np.save(tokens, np.arange(6, dtype=np.int32)[None])

    def run(model, *more):
        cli("run", model, "--inputs", tokens, "--outputs", out, "--force", *more)
        return np.load(out)

    expected = run(LLAMA, "--backend", "reference")
    np.testing.assert_array_equal(run(rolled, "--backend", "reference"), expected)
    np.testing.assert_allclose(run(rolled), expected, atol=1e-4 * np.abs(expected).max())


def test_the_checkpoint_of_a_rolled_graph_is_looked_at(cli, rolled):
    text = rolled.read_text()
    name = "model.layers.{layer}.self_attn.q_proj"
    assert name in text
    rolled.write_text(text.replace(name, "model.layers.{layer}.self_attn.no_proj"))
    says = "the graph reads a tensor that the checkpoint lacks"
    cli("run", rolled, "--outputs", rolled.with_suffix(".npy"), code=1, says=says)
