"""The commands on a graph that repeats its layers."""

import numpy as np
import pytest

from moecc.ir import parse
from moecc.ir.unroll import is_rolled


@pytest.fixture
def rolled(moecc, dense, tmp_path):
    """The graph of the small checkpoint, rolled; the checkpoint is where its weights lie."""
    graph, out = tmp_path / "dense.moe", tmp_path / "rolled.moe"
    graph.write_text(moecc("import", dense).out)
    done = moecc("opt", graph, "-p", "roll-layers")
    assert done.code == 0
    out.write_text(done.out)
    assert is_rolled(parse(done.out))
    return out


def test_what_is_written_has_layers_of_its_own(moecc, dense, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    pipeline = "upcycle{experts=4 top-k=2}"
    assert moecc("convert", dense, one, "-p", pipeline, "--to", "mixtral").code == 0
    done = moecc("convert", dense, other, "-p", f"{pipeline},roll-layers", "--to", "mixtral")
    assert done.code == 0
    assert "were unrolled" in done.out
    assert (one / "model.safetensors").read_bytes() != b""
    from safetensors.numpy import load_file

    expected, found = (load_file(p / "model.safetensors") for p in (one, other))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_it_runs(moecc, dense, rolled, tmp_path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(6, dtype=np.int32)[None])
    for number, model in enumerate((dense, rolled)):
        out = tmp_path / f"{number}.npy"
        done = moecc("run", model, "--inputs", tokens, "--outputs", out, "--backend", "reference")
        assert done.code == 0, done.err
    one, other = (np.load(tmp_path / f"{n}.npy") for n in (0, 1))
    np.testing.assert_array_equal(one, other)
    out = tmp_path / "xla.npy"
    assert moecc("run", rolled, "--inputs", tokens, "--outputs", out).code == 0
    np.testing.assert_allclose(np.load(out), one, atol=1e-4 * np.abs(one).max())


def test_the_checkpoint_of_a_rolled_graph_is_looked_at(moecc, rolled):
    text = rolled.read_text()
    name = "model.layers.{layer}.self_attn.q_proj"
    assert name in text
    rolled.write_text(text.replace(name, "model.layers.{layer}.self_attn.no_proj"))
    done = moecc("run", rolled, "--outputs", rolled.with_suffix(".npy"))
    assert done.code == 1
    assert "the graph reads a tensor that the checkpoint lacks" in done.err
