"""A function as a graph: blocks as operations, all else as regions of JAX, read by the commands."""

import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.errors import InputError

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.cli.main import main  # noqa: E402
from moecc.ir import parse, print_graph  # noqa: E402
from moecc.ir.verify import verify  # noqa: E402

from . import decoder  # noqa: E402

BLOCK = ["contract", "silu", "contract", "mul", "contract"]


def operations(graph):
    return [n.op.name for n in graph]


def takes(graph):
    """Return what each region takes, by its result: arguments, and the locations of blocks."""
    return {
        n.result.name: [v.name if v.node is None else v.node.loc for v in n.operands]
        for n in graph
        if n.op.opaque
    }


@pytest.fixture(scope="module")
def graph():
    axes = {"tokens": ("batch", "seq")}
    return mx.graph(decoder.loss, decoder.init(), decoder.tokens(), tokens=axes)


def test_blocks_are_operations_and_the_rest_are_regions(graph):
    assert operations(graph) == ["jax", *BLOCK, "jax", *BLOCK, "jax"]
    assert takes(graph) == {
        "x.layers.0.mlp": ["tokens"],
        "x.layers.1.mlp": ["tokens", "layers.0.mlp"],
        "result": ["tokens", "layers.0.mlp", "layers.1.mlp"],
    }
    (first, *_) = [n for n in graph if n.op.opaque]
    assert str(first.result.type) == "f32[batch=B, seq=S, embed=16]"
    assert first.attrs["equations"] > 20
    assert "decoder.py:" in first.attrs["lines"]
    assert str(graph.inputs["tokens"].type) == "i32[batch=2, seq=7]"
    verify(graph)
    assert print_graph(parse(print_graph(graph))) == print_graph(graph)


def ffn(p, x):
    return jax.nn.silu(x @ p["a"]) @ p["b"]


def looped(p, x, y):
    """Blocks in a scan, in a branch, and in a loop of unknown length, and results of each kind."""
    made, each = jax.lax.scan(lambda x, q: (x + ffn(q, x), x.sum()), x, p["layers"], reverse=True)
    one = jax.lax.cond(y[0] > 0, lambda x: ffn(p["yes"], x), jnp.sin, x)
    turns = jax.lax.while_loop(lambda x: x.sum() > 9, lambda x: ffn(p["last"], x), one)
    return {"made": made, "each": each, "turns": turns, "plain": jnp.cos(y), "ok": y > 0}


def test_loops_and_branches_show_on_what_blocks_depend():
    shape = jax.ShapeDtypeStruct
    block = {"a": shape((8, 12), jnp.float32), "b": shape((12, 8), jnp.float32)}
    stack = jax.tree.map(lambda s: shape((3, *s.shape), s.dtype), block)
    params = {"layers": stack, "yes": block, "last": block}
    x, y = shape((5, 8), jnp.float32), shape((5,), jnp.float32)
    made = mx.graph(looped, params, x, y)
    found = takes(made)
    assert found == {
        "x.layers.2": ["x"],
        "x.layers.1": ["x", "layers.2"],
        "x.layers.0": ["x", "layers.2", "layers.1"],
        "x.yes": ["x"],
        "x.last": ["x", "y", "yes"],
        "result.each": ["x", "layers.2", "layers.1"],
        "result.made": ["x", "layers.2", "layers.1", "layers.0"],
        "result.turns": ["last"],
    }
    assert operations(made).count("jax") == 8


def test_the_commands_read_it(graph, tmp_path, capsys):
    dense, sparse = tmp_path / "dense.moe", tmp_path / "sparse.moe"
    dense.write_text(print_graph(graph))
    passes = "upcycle{experts=4 top-k=2},add-losses"
    assert main(["opt", str(dense), "-p", passes, "--check", "-o", str(sparse)]) == 0
    assert "promised reassociation" in capsys.readouterr().err
    made = parse(sparse.read_text())
    assert operations(made).count("dispatch") == 2
    assert takes(made).keys() == takes(graph).keys()
    assert main(["inspect", str(sparse)]) == 0
    assert "the blocks of a JAX function, `loss`" in capsys.readouterr().out
    step = ["--machine", "cpu:2", "--batch-tokens", "64", "--sequence", "8"]
    assert main(["plan", str(sparse), *step]) == 0
    assert "layers.mlp" in capsys.readouterr().out
    assert main(["opt", str(dense), "-p", "upcycle{experts=4 routing=expert-choice}"]) == 1
    assert "by later ones" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_no_backend_runs_it(graph, name):
    params = {n: np.zeros(v.type.shape, np.float32) for n, v in graph.params.items()}
    program = get_backend(name).compile(graph)
    with pytest.raises(InputError, match="computed by its function alone"):
        program.run(params, {"tokens": np.zeros((2, 7), np.int32)})
