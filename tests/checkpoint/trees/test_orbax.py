"""Checkpoints of MaxText, written by Orbax from what MaxText's own conversion makes.

The arrays are made by ``make_maxtext.py`` from golden models, which must come out again.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiers import few

from moecc.cli.main import main
from moecc.errors import InputError
from moecc.formats.open import open_checkpoint
from tests.checkpoint.folders import GOLDEN, WEIGHTS, read_json, write_json

ocp = pytest.importorskip("orbax.checkpoint")

HERE = Path(__file__).parent
CASES = sorted(path.stem for path in HERE.glob("*.safetensors"))
# Orbax warns of what its own next version changes.
pytestmark = pytest.mark.filterwarnings("ignore")


def nested(arrays):
    """Return arrays with keys like ``params-decoder-layers`` as a tree."""
    tree = {}
    for key, array in arrays.items():
        *outer, last = key.split("-")
        place = tree
        for word in outer:
            place = place.setdefault(word, {})
        place[last] = array
    return tree


def write(case, folder, *, database=True, zarr3=False, nnx=False):
    """Write a whole training state, whose moments have the names of the parameters.

    Programs on NNX keep each array below its variable, as ``value``.
    """
    import jax.numpy as jnp

    arrays = {k: jnp.asarray(v) for k, v in load_file(HERE / f"{case}.safetensors").items()}
    arrays = {f"{k}-value" if nnx else k: a for k, a in arrays.items()}
    moments = {k: jnp.zeros_like(v) for k, v in arrays.items()}
    state = {"params": nested(arrays), "opt_state": nested(moments), "step": jnp.int32(9)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=database, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(folder, state)


LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("number", "case"), few(enumerate(CASES), 3))
def test_the_tensors_are_those_of_hugging_face(number, case, tmp_path):
    database, zarr3 = LAYOUTS[number % 4]
    place = tmp_path / "run" / "0" / "items"
    write(case, place, database=database, zarr3=zarr3, nnx=number % 2 == 1)
    source = tmp_path / "run"
    shutil.copy(GOLDEN / case / "config.json", source)
    golden = load_file(GOLDEN / case / WEIGHTS)
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.format == "orbax"
        assert checkpoint.tensors.keys() == golden.keys()
        for name, expected in golden.items():
            info = checkpoint.tensors[name]
            assert (info.shape, info.dtype.numpy) == (expected.shape, expected.dtype)
            # Query heads are divided by the root of their width, a power of two here.
            np.testing.assert_array_equal(checkpoint.read(name), expected)
            rows = slice(len(expected) // 3, len(expected) - 1)
            part = checkpoint.read(name, rows.start, rows.stop)
            np.testing.assert_array_equal(part, expected[rows])


def test_it_is_converted_and_runs(tmp_path):
    write("llama_llama3", tmp_path / "ckpt")
    shutil.copy(GOLDEN / "llama_llama3" / "config.json", tmp_path / "ckpt")
    out = tmp_path / "out.npy"
    given = ("--inputs", str(GOLDEN / "llama_llama3" / "tokens.npy"), "--outputs", str(out))
    assert main(["run", str(tmp_path / "ckpt"), "--backend", "reference", *given]) == 0
    golden = np.load(GOLDEN / "llama_llama3" / "logits.npy")
    assert np.abs(np.load(out) - golden).max() <= 1e-6 * np.abs(golden).max()
    to = ("-p", "upcycle{experts=2 top-k=1}", "--to", "mixtral", "--no-check")
    assert main(["convert", str(tmp_path / "ckpt"), str(tmp_path / "sparse"), *to]) == 0


@pytest.mark.parametrize("zarr3", [False, True])
def test_a_missing_chunk_is_told(zarr3, tmp_path):
    folder = tmp_path / "items"
    write("qwen2_square", folder, database=False, zarr3=zarr3)
    key = "params.params.decoder.decoder_norm.scale"
    chunks = [p for p in (folder / key).rglob("*") if p.is_file() and p.name == "0"]
    chunks[0].unlink()
    with open_checkpoint(tmp_path, needs_config=False) as checkpoint:
        with pytest.raises(InputError, match=f"the chunk 0 of the array '{key}' is missing"):
            checkpoint.read(key)
        # Zeros are stored, and no chunk of them is missing.
        assert not checkpoint.read(f"opt_state.{key.removeprefix('params.')}").any()


def test_chunks_that_are_larger_than_their_array_are_never_read(tmp_path):
    folder = tmp_path / "items"
    write("qwen2_square", folder, database=False, zarr3=False)
    key = "params.params.decoder.decoder_norm.scale"
    stated = folder / key / ".zarray"
    write_json(stated, read_json(stated) | {"chunks": [2**40]})
    with pytest.raises(InputError, match=f"the chunks of the array '{key}' are larger"):
        open_checkpoint(tmp_path, needs_config=False)


@pytest.mark.parametrize("zarr3", [False, True])
def test_zeros_that_a_database_of_earlier_versions_omits(zarr3, tmp_path, monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    monkeypatch.setattr(tensorstore_utils, "STORE_ARRAY_DATA_EQUAL_TO_FILL_VALUE", False)
    write("qwen2_square", tmp_path / "items", zarr3=zarr3)
    with open_checkpoint(tmp_path, needs_config=False) as checkpoint:
        assert not checkpoint.read("opt_state.params.decoder.decoder_norm.scale").any()


def test_metadata_lead_nowhere_else(tmp_path):
    write("qwen2_square", tmp_path / "items", database=False)
    file = tmp_path / "items" / "_METADATA"
    file.write_text(file.read_text().replace('"key": "decoder"', '"key": "../decoder"'))
    with pytest.raises(InputError, match="leaves its folder"):
        open_checkpoint(tmp_path, needs_config=False)
    file.write_text("{}")
    with pytest.raises(InputError, match="not the metadata of a tree"):
        open_checkpoint(tmp_path, needs_config=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma2"}, "other families of MaxText"),
        ({"model_type": "mistral"}, "does not know this array of a mistral"),
    ],
)
def test_what_is_not_known_is_reported(change, words, tmp_path):
    write("qwen2_square", tmp_path / "items")
    config = read_json(GOLDEN / "qwen2_square" / "config.json")
    write_json(tmp_path / "config.json", config | change)
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path)


def test_without_a_config_it_has_the_names_of_its_arrays(tmp_path):
    write("qwen3_square", tmp_path / "items")
    with pytest.raises(InputError, match=r"says no architecture(.|\n)*\.moe graph"):
        open_checkpoint(tmp_path)
    with open_checkpoint(tmp_path, needs_config=False) as checkpoint:
        name = "params.params.decoder.layers_0.mlp.wi_0.kernel"
        stored = load_file(HERE / "qwen3_square.safetensors")
        expected = stored["params-decoder-layers_0-mlp-wi_0-kernel"]
        np.testing.assert_array_equal(checkpoint.read(name, 1, 3), expected[1:3])
        assert checkpoint.read("step") == 9


SCANNED = ("llama_llama3", "mixtral_bfloat16", "qwen2_square")


@pytest.mark.parametrize("case", SCANNED)
def test_the_arrays_of_maxtext_are_those_of_its_own_conversion(case, tmp_path):
    out = tmp_path / "out"
    assert main(["emit", "maxtext", str(GOLDEN / case), "-o", str(out)]) == 0
    state = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(out / "0" / "items")
    expected = nested(load_file(HERE / f"{case}.safetensors"))["params"]
    assert_same_tree(state["params"]["params"], expected)
    again = ["verify", str(out), "--against", str(GOLDEN / case), "--tolerance", "0"]
    assert main(again) == 0


def assert_same_tree(tree, expected):
    assert tree.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same_tree(tree[key], value)
        else:
            assert tree[key].dtype == value.dtype
            np.testing.assert_array_equal(np.asarray(tree[key]), value)


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("mistral_window", ["sliding_window", "5"]),
        ("llama_gelu_mqa", ["hidden_act", "silu", "gelu"]),
        ("llama_yarn", ["rope_scaling", "llama3", "yarn"]),
        ("llama_biases_head_dim", ["no array", "o_proj.bias"]),
        ("qwen3_moe_step", ["stacks these tensors", "mlp"]),
        ("olmoe_norm", ["model_type", "mixtral", "olmoe"]),
    ],
)
def test_what_maxtext_does_not_compute_is_rejected(case, texts, tmp_path, capsys):
    assert main(["emit", "maxtext", str(GOLDEN / case), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert all(text in error for text in texts), error
    assert not (tmp_path / "out").exists()
