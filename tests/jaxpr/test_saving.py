"""A conversion saved and loaded: bit for bit, read by the commands, and by Orbax."""

import json
import shutil
from contextlib import suppress

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from moecc import jax as mx  # noqa: E402
from moecc.errors import InputError  # noqa: E402

from .mixtures import drawn  # noqa: E402

X = jnp.ones((2, 3, 8), jnp.bfloat16)
PIPELINE = "upcycle{experts=4 top-k=2},add-losses"


def function(params, x):
    """A scan of blocks whose gate and up are one matrix, then one block more."""

    def layer(x, p):
        gate, up = jnp.split(x @ p["in"], 2, -1)
        return x + (jax.nn.silu(gate) * up) @ p["out"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x + jax.nn.relu(x @ params["last"][0]) @ params["last"][1] + params["bias"]


def dense():
    shapes = {"layers": {"in": (2, 8, 24), "out": (2, 12, 8)}, "last": ((8, 12), (12, 8)),
              "bias": (8,)}  # fmt: skip
    is_shape = lambda node: isinstance(node, tuple) and isinstance(node[0], int)  # noqa: E731
    params = jax.tree.map(lambda s: jnp.zeros(s, jnp.bfloat16), shapes, is_leaf=is_shape)
    return drawn(params) | {"steps": np.int32(7)}


@pytest.fixture(scope="module")
def moe():
    return mx.convert(function, dense(), X, PIPELINE)


@pytest.fixture(scope="module")
def folder(moe, tmp_path_factory):
    return moe.save(tmp_path_factory.mktemp("saved") / "sparse")


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def test_what_is_loaded_is_what_was_saved(moe, folder):
    back = mx.load(folder)
    assert same_bits(back.params, moe.params)
    assert str(back.report) == str(moe.report)
    assert back.preserves == moe.preserves
    before, after = (jax.make_jaxpr(m(function))(moe.params, X) for m in (moe, back))
    assert str(before) == str(after)


def test_any_damage_to_the_config_is_an_input_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    stated = json.loads(path.read_text())
    for key in stated:
        for value in (None, "text", {}, [[]], {"a": [1]}):
            if value == stated[key] or key in ("quantization_config", "moecc"):
                continue
            path.write_text(json.dumps({**stated, key: value}))
            with suppress(InputError):
                mx.load(tmp_path / "a")


def test_the_commands_read_the_folder(folder, capsys):
    from moecc.cli.main import main

    assert main(["inspect", str(folder), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["function"]) == ("jax_function", "function")
    assert found["ffn_blocks"]["found"] == 3
    assert found["targets"] == {}
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "the blocks of a JAX function, `function`" in text
    assert "outside of the blocks: steps, bias" in text
    assert "None" not in text
    assert main(["verify", str(folder)]) == 0
    assert "match the manifest" in capsys.readouterr().out
    assert main(["opt", str(folder / "graph.moe"), "-p", "canonicalize"]) == 0
    assert "dispatch" in capsys.readouterr().out


def test_a_changed_byte_is_found_and_another_folder_rejected(moe, tmp_path):
    from moecc.cli.main import main

    path = moe.save(tmp_path / "a") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(tmp_path / "a")]) == 3
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="does not hold a converted function"):
        mx.load(tmp_path / "a")


def test_orbax_keeps_every_bit(moe, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", moe.params)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: moe.params))
    assert same_bits(back, moe.params)


def test_a_tree_of_other_containers_is_given_again(tmp_path):
    class Layer(dict):
        """A container that no file holds."""

    jax.tree_util.register_pytree_node(
        Layer,
        lambda p: (tuple(p.values()), tuple(p)),
        lambda names, v: Layer(zip(names, v, strict=True)),
    )
    params = Layer(dense())
    moe = mx.convert(function, params, X, PIPELINE)
    moe.save(tmp_path / "a")
    with pytest.raises(InputError, match="containers that a file cannot hold"):
        mx.load(tmp_path / "a")
    assert same_bits(mx.load(tmp_path / "a", like=params).params, moe.params)
    with pytest.raises(InputError, match="another tree"):
        mx.load(tmp_path / "a", like={"w": X})


def test_trained_parameters_are_saved_and_those_of_shapes_are_not(moe, tmp_path):
    trained = drawn(moe.params)
    moe.save(tmp_path / "trained", trained)
    assert same_bits(mx.load(tmp_path / "trained").params, trained)
    shapes = jax.eval_shape(lambda: moe.params)
    with pytest.raises(InputError, match="an array cannot be stored"):
        moe.save(tmp_path / "shapes", shapes)
    assert not (tmp_path / "shapes").exists()


def test_passes_are_proved_on_demand(tmp_path):
    folder = mx.convert(function, dense(), X, PIPELINE, check=True).save(tmp_path / "checked")
    checked = json.loads((folder / "moecc_receipt.json").read_text())["checked"]
    assert [done["proved"] for done in checked] == [True, True]


def test_every_block_is_compared(moe, folder, tmp_path, capsys):
    from moecc.cli.main import main

    changed = dense()
    changed["last"] = tuple(2 * weight for weight in changed["last"])
    other = mx.convert(function, changed, X, PIPELINE).save(tmp_path / "other")
    assert main(["verify", str(other), "--against", str(folder)]) == 3
    outputs = [name for name in moe.graph.output_names if name.startswith("y.")]
    assert len(outputs) > 1
    assert f"max |Δ{outputs[-1]}|" in capsys.readouterr().out
