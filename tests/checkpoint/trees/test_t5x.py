"""Checkpoints of T5X: its file is flax's msgpack, its large arrays are zarr of tensorstore.

T5X itself runs with no jax of today; the test writes what its ``checkpoints.py`` writes, with
msgpack and tensorstore, and ``flax.msgpack`` is flax's own (``make_flax.py``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.checkpoint.open import open_checkpoint
from moecc.errors import InputError
from moecc.families import import_checkpoint
from moecc.ir import print_graph
from moecc.types.arrays import Array

ts = pytest.importorskip("tensorstore")
msgpack = pytest.importorskip("msgpack")

HERE = Path(__file__).parent
GOLDEN = HERE.parents[1] / "golden"
PARTS = {"q": "query", "k": "key", "v": "value", "o": "out"}
NORMS = {
    "encoder": ["pre_attention_layer_norm", "pre_mlp_layer_norm"],
    "decoder": [
        "pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm",
    ],
}  # fmt: skip


def path_of(name: str) -> tuple[str, ...]:
    """Return the path in T5X of a tensor of Hugging Face."""
    words = name.split(".")
    if words[0] == "shared":
        return ("token_embedder", "embedding")
    if words[0] == "lm_head":
        return ("decoder", "logits_dense", "kernel")
    if words[1] == "final_layer_norm":
        return (words[0], f"{words[0]}_norm", "scale")
    if "relative_attention_bias" in name:
        return (words[0], "relpos_bias", "rel_embedding")
    stack, layer, sub = words[0], f"layers_{words[2]}", int(words[4])
    if words[5] == "layer_norm":
        return (stack, layer, NORMS[stack][sub], "scale")
    own = "attention" if stack == "encoder" else "self_attention"
    block = {"SelfAttention": own, "EncDecAttention": "encoder_decoder_attention"}
    if words[5] in block:
        return (stack, layer, block[words[5]], PARTS[words[6]], "kernel")
    return (stack, layer, "mlp", words[6], "kernel")


def packed(array: Array) -> Any:
    """Return an array as flax packs it."""
    content = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def write(case: str, folder: Path, *, version: int = 3) -> dict[str, Array]:
    """Write a golden model as a step of T5X, and return its tensors."""
    golden = load_file(GOLDEN / case / "model.safetensors")
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    golden = {k: v for k, v in golden.items() if k not in copies}
    if np.array_equal(golden.get("lm_head.weight", ()), golden["shared.weight"]):
        del golden["lm_head.weight"]
    folder.mkdir(parents=True)
    target: dict[str, Any] = {}
    for name, tensor in golden.items():
        path = path_of(name)
        matrix = path[-1] in ("kernel", "rel_embedding")
        array = np.ascontiguousarray(tensor.T if matrix else tensor)
        place = target
        for word in path[:-1]:
            place = place.setdefault(word, {})
        place[path[-1]] = stored(folder, ("target", *path), array, version)
    state = {"step": 3, "param_states": {"encoder": {"encoder_norm": {"scale": {"v": 0}}}}}
    tree = {"version": version, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(msgpack.packb(tree, use_bin_type=True))
    return golden


def stored(folder: Path, path: tuple[str, ...], array: Array, version: int) -> Any:
    """Return what the file has of an array: itself, or where it is."""
    if array.ndim < 2:
        return packed(array)
    if version < 3 and array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    name = ".".join(path)
    spec = {
        "driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / name)},
        "metadata": {
            "shape": array.shape, "chunks": [max(1, array.shape[0] // 2), *array.shape[1:]],
            "dtype": "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str,
            "compressor": {"id": "gzip", "level": 1},
        },
    }  # fmt: skip
    ts.open(spec, create=True, open=True).result().write(array).result()
    return {"driver": "zarr", "kvstore": {"driver": "gfile", "path": name}, "metadata": {}}


@pytest.mark.parametrize(
    ("case", "version"),
    [("t5_relu_tied", 3), ("t5_square", 3), ("t5_gated_untied", 3), ("t5_bfloat16", 2)],
)
def test_the_tensors_are_those_of_hugging_face(case: str, version: int, tmp_path: Path) -> None:
    golden = write(case, tmp_path / "checkpoint_300", version=version)
    (tmp_path / "checkpoint_20").mkdir()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "t5x"
        assert checkpoint.tensors.keys() == golden.keys()
        for name, expected in golden.items():
            assert checkpoint.tensors[name].dtype.numpy == expected.dtype
            np.testing.assert_array_equal(checkpoint.read(name), expected)
            np.testing.assert_array_equal(checkpoint.read(name, 1, 3), expected[1:3])


@pytest.mark.parametrize("case", ["t5_relu_tied", "t5_gated_untied"])
def test_the_config_is_inferred(case: str, tmp_path: Path) -> None:
    write(case, tmp_path / "checkpoint_300")
    golden = json.loads((GOLDEN / case / "config.json").read_text())
    with open_checkpoint(tmp_path) as checkpoint:
        found, inferred = checkpoint.config, import_checkpoint(checkpoint)
        assert "the config is inferred from the sizes of the arrays" in checkpoint.remarks()
    # The golden models have another furthest distance than every T5 that was published.
    assert found.pop("relative_attention_max_distance") == 128
    tied = found.pop("tie_word_embeddings")
    assert tied == (case == "t5_relu_tied")
    assert golden | found == golden | {"decoder_start_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps({**golden, "tie_word_embeddings": tied}))
    with open_checkpoint(tmp_path) as checkpoint:
        stated = import_checkpoint(checkpoint)
    texts = (print_graph(inferred), print_graph(stated).replace(", max_distance=12}", "}"))
    lines = [text.split("input", 1)[1] for text in texts]
    assert lines[0] == lines[1]


def test_the_file_is_read_as_flax_writes_it(tmp_path: Path) -> None:
    shutil.copy(HERE / "flax.msgpack", tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"'target\.stored'"):
        open_checkpoint(tmp_path, needs_config=False)
    spec = {"shape": (2,), "chunks": (2,), "dtype": "<f4"}
    place = {"driver": "file", "path": str(tmp_path / "target.stored")}
    opened = ts.open({"driver": "zarr", "kvstore": place, "metadata": spec}, create=True)
    opened.result().write(np.float32([1, 2])).result()
    expected = np.load(HERE / "flax.npz")
    with open_checkpoint(tmp_path, needs_config=False) as checkpoint:
        assert checkpoint.tensors["target.half"].dtype.name == "bf16"
        half, large = (checkpoint.read(f"target.{name}") for name in ("half", "large"))
        np.testing.assert_array_equal(half.astype(np.float32), expected["half"])
        np.testing.assert_array_equal(large, expected["large"])
        # Where the file says that it is, /etc, does not matter.
        np.testing.assert_array_equal(checkpoint.read("target.stored"), [1, 2])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a msgpack file"),
        (b"\xc1", "not a msgpack file"),
        (b"\x93\x01\x02\x03", "not a checkpoint of T5X"),
        (msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb(([-1], "float32", b"1234")))}),
         "does not have its size"),
        (msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}),
         "does not have its size"),
        (msgpack.packb({"x": {"__msgpack_chunked_array__": True}}), "not a msgpack file"),
        (msgpack.packb({"../x": {"driver": 1, "kvstore": 2, "metadata": 3}}), "is missing"),
    ],
)  # fmt: skip
def test_hostile_files_are_messages(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path, needs_config=False)
