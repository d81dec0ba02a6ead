"""Checkpoints of T5X: its file is flax's msgpack, its large arrays are zarr of tensorstore.

T5X itself runs with no jax of today; the test writes what its ``checkpoints.py`` writes, with
msgpack and tensorstore, and ``flax.msgpack`` is flax's own (``make_flax.py``).
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.errors import InputError
from moecc.formats.open import open_checkpoint
from moecc.formats.safetensors import natural
from moecc.ir import print_graph
from moecc.translate.importing import import_checkpoint
from tests.checkpoint.folders import GOLDEN, WEIGHTS, read_json, write_json

ts = pytest.importorskip("tensorstore")
msgpack = pytest.importorskip("msgpack")

HERE = Path(__file__).parent
PARTS = {"q": "query", "k": "key", "v": "value", "o": "out"}
NORMS = {
    "encoder": ["pre_attention_layer_norm", "pre_mlp_layer_norm"],
    "decoder": [
        "pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm",
    ],
}  # fmt: skip


def path_of(name):
    """Return the path in T5X of a tensor of Hugging Face; experts of one matrix share one."""
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
    if words[6] == "router":
        return (stack, layer, "mlp", "router", "router_weights", "w", "kernel")
    if words[6] == "experts":
        return (stack, layer, "mlp", "expert", words[8], "kernel")
    return (stack, layer, "mlp", words[6], "kernel")


def arrays_of(golden):
    """Return the arrays of T5X of a golden model: kernels are turned, experts along axis 0."""
    found = {}
    for name, tensor in golden.items():
        path = path_of(name)
        matrix = path[-1] in ("kernel", "rel_embedding")
        found.setdefault(path, []).append(np.ascontiguousarray(tensor.T if matrix else tensor))
    return {p: np.stack(a) if "expert" in p else a[0] for p, a in found.items()}


def scanned(arrays, stack, size):
    """Return the arrays with the layers of a stack along axis 1, in blocks of `size`."""
    made = {}
    layers = {}
    for path, array in arrays.items():
        if path[0] != stack or not path[1].startswith("layers_"):
            made[path] = array
            continue
        block, inside = divmod(int(path[1].removeprefix("layers_")), size)
        words = (f"subblock_{inside}",) if size > 1 else ()
        layers.setdefault((stack, stack, *words, *path[2:]), {})[block] = array
    return made | {p: np.stack([a for _, a in sorted(of.items())], 1) for p, of in layers.items()}


def packed(array):
    """Return an array as flax packs it."""
    content = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def write(case, folder, *, version=3, scan=None, state=None):
    """Write a golden model as a step of T5X, and return its tensors."""
    golden = load_file(GOLDEN / case / WEIGHTS)
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    golden = {k: golden[k] for k in sorted(golden, key=natural) if k not in copies}
    if np.array_equal(golden.get("lm_head.weight", ()), golden["shared.weight"]):
        del golden["lm_head.weight"]
    folder.mkdir(parents=True)
    arrays = arrays_of(golden)
    for stack, size in (scan or {}).items():
        arrays = scanned(arrays, stack, size)
    target = {}
    for path, array in arrays.items():
        put(target, path, stored(folder, ("target", *path), array, version))
    state = state or {"step": 3, "param_states": {"encoder": {"encoder_norm": {"scale": {"v": 0}}}}}
    tree = {"version": version, "optimizer": {"target": target, "state": state}}
    (folder / "checkpoint").write_bytes(msgpack.packb(tree, use_bin_type=True))
    return golden


def put(tree, path, value):
    for word in path[:-1]:
        tree = tree.setdefault(word, {})
    tree[path[-1]] = value


def stored(folder, path, array, version):
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
    ("case", "options"),
    [
        ("t5_relu_tied", {}),
        ("t5_square", {}),
        ("t5_gated_untied", {}),
        ("t5_bfloat16", {"version": 2}),
        # Experts, and layers that are scanned.
        ("switch_half", {}),
        ("switch_square_v4", {}),
        ("switch_half", {"scan": {"encoder": 2}}),
        ("t5_square", {"scan": {"encoder": 1, "decoder": 1}}),
        ("t5_gated_untied", {"scan": {"decoder": 1}}),
    ],
)
def test_the_tensors_are_those_of_hugging_face(case, options, tmp_path):
    golden = write(case, tmp_path / "checkpoint_300", **options)
    (tmp_path / "checkpoint_20").mkdir()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "t5x"
        assert checkpoint.tensors.keys() == golden.keys()
        for name, expected in golden.items():
            assert checkpoint.tensors[name].dtype.numpy == expected.dtype
            np.testing.assert_array_equal(checkpoint.read(name), expected)
            np.testing.assert_array_equal(checkpoint.read(name, 1, 3), expected[1:3])


@pytest.mark.parametrize(
    ("path", "shape", "words"),
    [
        (("encoder", "layers_1", "mlp", "router", "router_weights", "w", "bias"), (4,),
         "a router with a bias"),
        (("encoder", "layers_1", "mlp", "expert", "wi_0", "kernel"), (4, 16, 20), "are not gated"),
        (("encoder", "layers_1", "extra_mlp", "wi", "kernel"), (16, 20), "the extra sublayer"),
        (("encoder", "layers_0", "mlp", "router", "router_weights", "w", "kernel"), (16, 4),
         "experts in other layers"),
    ],
)  # fmt: skip
def test_mixtures_that_transformers_has_not(path, shape, words, tmp_path):
    step = tmp_path / "checkpoint_1"
    write("switch_half", step)
    file = step / "checkpoint"
    tree = msgpack.unpackb(file.read_bytes(), strict_map_key=False)
    array = stored(step, ("target", *path), np.zeros(shape, np.float32), 3)
    put(tree["optimizer"]["target"], path, array)
    file.write_bytes(msgpack.packb(tree, use_bin_type=True))
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("case", ["t5_relu_tied", "t5_gated_untied"])
def test_the_config_is_inferred(case, tmp_path):
    write(case, tmp_path / "checkpoint_300")
    golden = read_json(GOLDEN / case / "config.json")
    with open_checkpoint(tmp_path) as checkpoint:
        found, inferred = checkpoint.config, import_checkpoint(checkpoint)
        assert "the config is inferred from the sizes of the arrays" in checkpoint.remarks()
    # The golden models have another furthest distance than every T5 that was published.
    assert found.pop("relative_attention_max_distance") == 128
    tied = found.pop("tie_word_embeddings")
    assert tied == (case == "t5_relu_tied")
    assert golden | found == golden | {"decoder_start_token_id": 0}
    write_json(tmp_path / "config.json", {**golden, "tie_word_embeddings": tied})
    with open_checkpoint(tmp_path) as checkpoint:
        stated = import_checkpoint(checkpoint)
    texts = (print_graph(inferred), print_graph(stated).replace(", max_distance=12}", "}"))
    lines = [text.split("input", 1)[1] for text in texts]
    assert lines[0] == lines[1]


def test_the_file_is_read_as_flax_writes_it(tmp_path):
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
def test_hostile_files_are_messages(content, words, tmp_path):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path, needs_config=False)
