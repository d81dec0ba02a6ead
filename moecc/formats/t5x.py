"""Open a checkpoint of T5X: one msgpack file, and a zarr array in a folder for each large one.

The file may state where an array is; that is never followed, because it may lead anywhere.  The
folder of an array has the name of its path in the tree (``checkpoints.py`` of t5x, version 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes

from moecc.errors import InputError, MachineError, described
from moecc.formats.arrays import FILE, ArrayPiece, NamedPieces, Tree, ZarrArrays, files_below
from moecc.formats.store import fetch
from moecc.support.extras import install_hint
from moecc.support.lazy import np
from moecc.support.problems import Problems, quoted
from moecc.support.untyped import JsonDict
from moecc.types import Array, Arrays, Shape

_LARGEST_BYTES = 4 << 30
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_STORED = {"driver", "kvstore", "metadata"}
"""The keys of an entry whose array is in a folder of its own."""
_TYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
        "uint16", "uint32", "uint64", "bool",
    )
}  # fmt: skip


def open_t5x(folder: Path) -> Tree:
    """Open a step; arrays that have folders of their own are not read.

    Raises:
      InputError: the file is not one of T5X; all problems.
      MachineError: msgpack or tensorstore is missing.
    """
    path, problems = folder / FILE, Problems()
    tree = _unpacked(path)
    root = tree.get("optimizer", tree) if isinstance(tree, dict) else None
    if not isinstance(root, dict):
        raise InputError("not a checkpoint of T5X", where=path, expected="a tree of arrays")
    inside: dict[str, Array] = {}
    keys: dict[tuple[str, ...], str] = {}
    for steps, leaf in _leaves(root, ()):
        name = ".".join(steps)
        if isinstance(leaf, dict):
            if not (folder / name / ".zarray").is_file() or "/" in name or name.startswith("."):
                where, hint = f"{folder}, {quoted(name)}", "fetch the whole folder again"
                problems.add("the folder of an array is missing", where=where, hint=hint)
        else:
            inside[name] = leaf
        keys[steps] = name
    problems.raise_if_any()
    stored = ZarrArrays(folder, "zarr", is_database=False)
    return Tree("t5x", folder, keys, T5xArrays(inside, stored), tuple(files_below(folder)))


class T5xArrays:
    """Reads arrays of the file, and those in folders; bfloat16 that is stored as integers too."""

    def __init__(self, inside: Arrays, stored: ZarrArrays) -> None:
        self._inside, self._stored = inside, stored

    def shape(self, key: str) -> Shape:
        """Return the sizes of an array."""
        return self._inside[key].shape if key in self._inside else self._stored.shape(key)

    def dtype(self, key: str) -> np.dtype[Any]:
        """Return the element type of an array."""
        dtype = self._inside[key].dtype if key in self._inside else self._stored.dtype(key)
        return _as_float(dtype)

    def read_box(self, key: str, box: Sequence[tuple[int, int]]) -> Array:
        """Return a box of an array, a range of each axis."""
        if key not in self._inside:
            values = self._stored.read_box(key, box)
        else:
            values = self._inside[key][tuple(slice(*bounds) for bounds in box)]
        return values.view(_as_float(values.dtype))


def _as_float(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return bfloat16 for uint16, as which version 2 and before stored it."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.uint16 else dtype


def _leaves(tree: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the arrays of the tree, and the descriptions of those that are elsewhere."""
    if type(tree) is int and -(1 << 63) <= tree < 1 << 63:
        yield path, np.asarray(tree)
    elif isinstance(tree, np.ndarray) or (isinstance(tree, dict) and tree.keys() >= _STORED):
        yield path, tree
    elif isinstance(tree, dict) and len(path) < 64:
        for name, inner in tree.items():
            yield from _leaves(inner, (*path, str(name)))


def _unpacked(path: Path) -> Any:
    try:
        import msgpack
    except ImportError:
        raise MachineError(
            "a checkpoint of T5X needs msgpack", where=path, hint=install_hint("train")
        ) from None
    fetch(path)
    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError("the file is too large for one of T5X", where=path)
    try:
        return msgpack.unpackb(
            path.read_bytes(),
            ext_hook=_extension,
            raw=False,
            strict_map_key=False,
            object_hook=_whole,
        )
    except InputError:
        raise
    except Exception as error:  # msgpack raises kinds of its own, and those of Python
        raise InputError("not a msgpack file of T5X", where=path, found=described(error)) from None


def _extension(code: int, data: bytes) -> object:
    """Return the array of an extension of flax; others are not read."""
    import msgpack

    if code not in (_ARRAY, _SCALAR):
        return None
    shape, name, raw = msgpack.unpackb(data, raw=False)
    dtype = _TYPES.get(name)
    sizes = [n for n in shape if type(n) is int and n >= 0]
    if dtype is None or len(sizes) != len(shape) or prod(sizes) * dtype.itemsize != len(raw):
        raise InputError("an array of the file does not have its size", found=f"{name} {shape}")
    return np.frombuffer(raw, dtype).reshape(sizes)


def _whole(entry: dict[str, Any]) -> object:
    """Join an array that was too large for one entry."""
    if not entry.get(_CHUNKED):
        return entry
    shape, chunks = entry["shape"], entry["chunks"]
    order = sorted(chunks, key=int)
    sizes = [shape[k] for k in sorted(shape, key=int)]
    return np.concatenate([chunks[k] for k in order]).reshape(sizes)


# The T5 of T5X as Hugging Face has it, dense or with experts; its config follows from the arrays.
#
# Names are those of ``examples/t5/network.py`` of t5x, and for experts those of flaxformer
# (``architectures/moe``): kernels of experts are ``[expert, in, out]``, layers that are scanned are
# along axis 1, in blocks of a few.  Neither scales the scores of attention.

MARKS = (("encoder", "encoder_norm", "scale"),)
"""An array that every T5 has."""

TreePath = tuple[str, ...]

_LAYER = re.compile(r"layers_(\d{1,5})", re.ASCII)
_SUBBLOCK = re.compile(r"subblock_(\d{1,3})", re.ASCII)
_PARTS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_SELF = {"encoder": "attention", "decoder": "self_attention"}
_NORMS = {
    "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    "decoder": (
        "pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm",
    ),
}  # fmt: skip
_ROUTER = ("mlp", "router", "router_weights", "w")
_UP = re.compile(r"\.wi(?:_0)?\.weight$")
_EXPERT = re.compile(r"\.expert_(\d+)\.")
_UNBOUNDED = 1 << 30
"""A capacity that drops nothing: T5X has a factor, which no file states."""

_WHY: Mapping[str, str] = {
    "bias": "no family of transformers has a router with a bias",
    "wi_0": "the experts of switch_transformers are not gated",
    "extra_mlp": "no family of transformers has the extra sublayer of ST-MoE",
}
"""Why arrays of a mixture have no name there, by a word of their path."""


def t5_pieces(tree: Tree, problems: Problems) -> dict[str, ArrayPiece]:
    """Return the tensors of the model by their Hugging Face names; what is unknown is reported."""
    arrays = tree.below(MARKS)
    names = _Names(
        any("expert" in path for path in arrays),
        {stack: _block_size(arrays, stack) for stack in _SELF},
    )
    pieces: dict[str, ArrayPiece] = {}
    for path, key in arrays.items():
        named = dict(names.pieces(path, key, tree.arrays.shape(key)))
        if not named:
            why = next((text for word, text in _WHY.items() if word in path), None)
            unknown = "moecc does not know this array of a dense T5"
            problems.add(
                why if why is not None and names.is_sparse else unknown,
                where=f"{tree.folder}, array {quoted('.'.join(path))}",
                hint="write a .moe graph over the arrays: docs/adding-a-family.md",
            )
        pieces.update(named)
    return pieces


def _block_size(arrays: Iterable[TreePath], stack: str) -> int:
    """Return how many layers of a stack are scanned as one block."""
    words = (path[2] for path in arrays if path[:2] == (stack, stack) and len(path) > 2)
    numbers = [int(match[1]) for word in words if (match := _SUBBLOCK.fullmatch(word))]
    return max(numbers, default=0) + 1


@dataclass(frozen=True)
class _Names:
    """The names of a T5 with experts in some layers, or in none.

    Attributes:
      is_sparse: whether some layers have experts.
      block_size: the layers of each stack that are scanned as one block.
    """

    is_sparse: bool
    block_size: Mapping[str, int]

    def pieces(self, path: TreePath, key: str, shape: Sequence[int]) -> NamedPieces:
        """Yield the tensors that an array has, by name."""
        match path:
            case ("token_embedder", "embedding"):
                yield "shared.weight", ArrayPiece(key, (0,), (1,))
            case ("decoder", "logits_dense", "kernel"):
                yield "lm_head.weight", ArrayPiece(key, (1,), (0,))
            case (("encoder" | "decoder") as stack, norm, "scale") if norm == f"{stack}_norm":
                yield f"{stack}.final_layer_norm.weight", ArrayPiece(key, (0,))
            case (("encoder" | "decoder") as stack, "relpos_bias", "rel_embedding"):
                inside = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
                yield f"{stack}.{inside}", ArrayPiece(key, (1,), (0,))
            case (("encoder" | "decoder") as stack, layer, *rest) if number := _LAYER.fullmatch(
                layer
            ):
                for name, piece in self._layer(stack, tuple(rest), key, shape):
                    yield f"{stack}.block.{int(number[1])}.layer.{name}", piece
            case (("encoder" | "decoder") as stack, block, *rest) if block == stack:
                yield from self._scanned(stack, tuple(rest), key, shape)

    def _scanned(self, stack: str, path: TreePath, key: str, shape: Sequence[int]) -> NamedPieces:
        match = _SUBBLOCK.fullmatch(path[0]) if path else None
        inside = path[1:] if match else path
        if len(shape) < 2:
            return
        layer_shape = (shape[0], *shape[2:])
        for name, piece in self._layer(stack, inside, key, layer_shape):
            for block in range(shape[1]):
                layer = block * self.block_size[stack] + (int(match[1]) if match else 0)
                yield f"{stack}.block.{layer}.layer.{name}", piece.of_layer(block)

    def _layer(self, stack: str, path: TreePath, key: str, shape: Sequence[int]) -> NamedPieces:
        """Yield the tensors of an array of a layer; names begin with the number of the sublayer."""
        last = len(_NORMS[stack]) - 1
        dense = "mlp" if self.is_sparse else "DenseReluDense"
        matrix = ArrayPiece(key, (1,), (0,))
        match path:
            case (norm, "scale") if norm in _NORMS[stack]:
                yield f"{_NORMS[stack].index(norm)}.layer_norm.weight", ArrayPiece(key, (0,))
            case (block, part, "kernel") if block == _SELF[stack] and part in _PARTS:
                yield f"0.SelfAttention.{_PARTS[part]}.weight", matrix
            case ("encoder_decoder_attention", part, "kernel") if part in _PARTS and last == 2:
                yield f"1.EncDecAttention.{_PARTS[part]}.weight", matrix
            case ("mlp", ("wi" | "wo") as word, "kernel"):
                yield f"{last}.{dense}.{word}.weight", matrix
            case ("mlp", ("wi_0" | "wi_1") as word, "kernel") if not self.is_sparse:
                yield f"{last}.{dense}.{word}.weight", matrix
            case (*router, "kernel") if tuple(router) == _ROUTER:
                yield f"{last}.mlp.router.classifier.weight", matrix
            case ("mlp", "expert", ("wi" | "wo") as word, "kernel") if len(shape) == 3:
                for expert in range(shape[0]):
                    name = f"{last}.mlp.experts.expert_{expert}.{word}.weight"
                    yield name, ArrayPiece(key, (2,), (1,), at={0: expert})


def t5_config(shapes: Mapping[str, Shape], problems: Problems) -> JsonDict:
    """Return the config that the sizes of the tensors imply, with what T5 fixes.

    T5X keeps none.  Version 1.0 has one matrix before the ReLU and a tied embedding, 1.1 a gated
    GELU; both have 128 as the furthest distance, and 1e-6 in their norms.  A mixture is a Switch
    Transformer, whose experts are taken to drop nothing: it has a factor for its capacity.
    """
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    ups = sorted(n for n in shapes if n.startswith("encoder.") and _UP.search(n))
    if not {"shared.weight", bias, query} <= shapes.keys() or not ups:
        return {}
    buckets, heads = shapes[bias]
    vocab, width = shapes["shared.weight"]
    config: JsonDict = {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shapes[query][0] // max(heads, 1),
        "d_ff": shapes[ups[0]][0],
        "num_layers": _count(shapes, "encoder"),
        "num_decoder_layers": _count(shapes, "decoder"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    experts = {int(n[1]) for name in shapes if (n := _EXPERT.search(name))}
    if experts:
        return {**config, **_sparse(shapes, len(experts), problems)}
    is_gated = "wi_0" in ups[0]
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        **config,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


def _sparse(shapes: Mapping[str, Shape], experts: int, problems: Problems) -> JsonDict:
    """Return what the config of a mixture has beyond that of a dense T5.

    Of n layers, those that are 1 modulo a step are sparse in transformers, those before a multiple
    of it in flaxformer: the same for a step of 2.
    """
    config: JsonDict = {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "num_experts": experts,
        "expert_capacity": _UNBOUNDED,
        "dense_act_fn": "relu",
        "router_bias": False,
        "router_jitter_noise": 0.0,
    }
    for stack in _SELF:
        layers = _count(shapes, stack)
        routers = re.compile(rf"{stack}\.block\.(\d+)\..*\.mlp\.router\.classifier\.weight")
        sparse = sorted(int(match[1]) for name in shapes if (match := routers.fullmatch(name)))
        step = layers // len(sparse) if sparse else 0
        usual = list(range(layers)) if step == 1 else list(range(1, layers, step or layers))
        if sparse != usual:
            problems.add(
                "transformers has experts in other layers",
                where=stack,
                expected=", ".join(map(str, usual)),
                found=", ".join(map(str, sparse)) or "none",
                hint="write a .moe graph over the arrays: docs/adding-a-family.md",
            )
        config[f"num_sparse_{stack}_layers"] = len(sparse)
    return config


def _count(shapes: Mapping[str, Shape], stack: str) -> int:
    return len({n.split(".")[2] for n in shapes if n.startswith(f"{stack}.block.")})
