"""Checkpoints of JAX programs: trees of arrays in zarr, as Orbax and T5X write them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes

from moecc.errors import InputError, MachineError, Problems, describe_error, quoted
from moecc.formats.arrays import (
    FILE,
    METADATA,
    ArrayPiece,
    NamedPieces,
    Tree,
    TreePath,
    ZarrArrays,
    open_orbax,
)
from moecc.formats.files import files_below, identify, read_json_object
from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES, find_companions, rows_of
from moecc.formats.maxtext import MARKS, maxtext_pieces
from moecc.formats.source import (
    COLUMN,
    FIRST,
    ROW,
    SECOND,
    Checkpoint,
    SavedMoments,
    TensorInfo,
    element_type,
    tensor_info,
)
from moecc.formats.store import fetch
from moecc.support.extras import install_hint
from moecc.support.lazy import np
from moecc.support.untyped import JsonDict
from moecc.types import Array, Arrays, DType, Shape, TensorType

# A checkpoint of a JAX program: by its arrays' own names, or as Hugging Face has the model.

# The moments of an optimiser in a tree of arrays, by the tensors of the model that they are of.
#
# optax keeps a tree of the model's shape for each kind of moment (``mu``, ``nu``, and Adafactor's
# ``v_row``, ``v_col``, ``v``), T5X the kinds below each array (``m``, ``v``, ``v_row``, ``v_col``,
# and ``grad_ema``, ``grad_sq_ema`` of Adam).  Factors lack one axis of their array: of two, the
# row factor lacks the larger, the second of equal ones (``adafactor.py`` of t5x,
# ``factorized.py`` of optax); of arrays with experts or layers besides, T5X averages rows over all
# but the model's width.

_TREES = {"mu": FIRST, "nu": SECOND, "v": SECOND, "v_row": ROW, "v_col": COLUMN}
"""Trees of optax, by kind."""
_LEAVES = {
    "m": FIRST, "v": SECOND, "v_row": ROW, "v_col": COLUMN,
    "grad_ema": FIRST, "grad_sq_ema": SECOND,
}  # fmt: skip
"""Kinds of moments by the names that T5X stores below an array."""


@dataclass(frozen=True)
class SavedMoment:
    """A moment of a tensor.

    Attributes:
      piece: where it is.
      axes: which axes of the tensor it has, 0 for its rows, 1 for its columns.
    """

    piece: ArrayPiece
    axes: tuple[int, ...]


def find_moments(
    tree: Tree, arrays: Mapping[TreePath, str], pieces: Mapping[str, ArrayPiece]
) -> SavedMoments[SavedMoment] | None:
    """Return the moments in a tree, or None if there are none.

    Args:
      tree: the tree.
      arrays: the arrays of the model, by their paths within it.
      pieces: the tensors of the model.
    """
    keys: dict[str, dict[str, str]] = {}
    prefixes: set[TreePath] = set()
    for path, key in tree.variables.items():
        for kind, inside, before in _readings(path):
            if inside in arrays and key != arrays[inside]:
                keys.setdefault(kind, {})[arrays[inside]] = key
                prefixes.add(before)
    moments = {
        kind: {n: m for n, p in pieces.items() if (m := _moment(tree, kind, p, of))}
        for kind, of in keys.items()
    }
    moments = {kind: of for kind, of in moments.items() if of}
    if not moments:
        return None
    optimizer = "adafactor" if FIRST not in moments or ROW in moments else "adamw"
    return SavedMoments(optimizer, _count(tree, prefixes), moments)


def _readings(path: TreePath) -> Iterator[tuple[str, TreePath, TreePath]]:
    """Yield the kinds of moment that a path may be of: kind, array, and what is before it."""
    last = path[-1]
    if last in _LEAVES and "param_states" in path:
        at = path.index("param_states")
        yield _LEAVES[last], path[at + 1 : -1], path[:at]
    for at, word in enumerate(path[:-1]):
        if word in _TREES:
            inside = path[at + 1 :]
            while inside[0] == "params" and len(inside) > 1:
                inside = inside[1:]
            yield _TREES[word], inside, path[:at]


def _count(tree: Tree, prefixes: set[TreePath]) -> int:
    """Return the number of updates, which is beside the moments; else that of steps."""
    beside = [(*prefix, word) for prefix in sorted(prefixes) for word in ("count", "step")]
    for path in (*beside, ("state", "step"), ("step",)):
        key = tree.variables.get(path)
        if key is not None and not tree.arrays.shape(key):
            return int(np.asarray(tree.arrays.read_box(key, ())))
    return 0


def _moment(tree: Tree, kind: str, piece: ArrayPiece, of: Mapping[str, str]) -> SavedMoment | None:
    """Return the moment of a tensor; None where a zero keeps its place, or nothing does."""
    key = of.get(piece.key)
    if key is None:
        return None
    shape, moment_shape = tree.arrays.shape(piece.key), tree.arrays.shape(key)
    if moment_shape == shape and kind in (FIRST, SECOND):
        # A gradient is divided by what its weight is multiplied by.
        scale = piece.scale ** (-1 if kind == FIRST else -2)
        return SavedMoment(replace(piece, key=key, scale=scale), (0, 1) if piece.columns else (0,))
    if kind not in (ROW, COLUMN) or len(piece.rows) != 1 or len(piece.columns) != 1:
        return None
    missing = _missing_axis(kind, piece, shape, moment_shape)
    if missing is None or piece.limit is not None:
        return None
    left = next(axis for axis in (*piece.rows, *piece.columns) if axis != missing)
    at = {axis - (axis > missing): index for axis, index in (piece.at or {}).items()}
    factor = ArrayPiece(key, (left - (left > missing),), at=at or None)
    return SavedMoment(factor, (0,) if left == piece.rows[0] else (1,))


def _missing_axis(
    kind: str, piece: ArrayPiece, shape: tuple[int, ...], factor_shape: tuple[int, ...]
) -> int | None:
    """Return the axis of an array that a factor of its second moment lacks."""
    fits = [
        axis
        for axis in sorted((*piece.rows, *piece.columns))
        if shape[:axis] + shape[axis + 1 :] == factor_shape
    ]
    if len(fits) < 2:
        return fits[0] if fits else None
    if len(shape) == 2:
        return fits[1] if kind == ROW else fits[0]
    words = piece.key.split(".")
    is_last = any(word in ("wo", "out") for word in words)
    width = piece.rows[0] if is_last else piece.columns[0]
    return next(axis for axis in fits if (axis != width) == (kind == ROW))


MAX_CACHED_BYTES = 1 << 30
"""The size of the largest matrix that is read as a whole."""


class TreeCheckpoint(Checkpoint):
    """Tensors that are pieces of a tree's arrays; see `moecc.formats.source.Checkpoint`."""

    def __init__(
        self,
        path: Path,
        tree: Tree,
        config: JsonDict,
        pieces: Mapping[str, ArrayPiece],
    ) -> None:
        self.path, self.format, self.config = path, tree.format, config
        self._tree, self._pieces = tree, pieces
        self._cache, self._reading = threading.local(), threading.Lock()
        infos = {name: _info(name, piece, tree) for name, piece in pieces.items()}
        self.tensors = MappingProxyType(infos)
        problems = Problems()
        self._companions = find_companions(path, problems)
        problems.raise_if_any()
        self._config = path / CONFIG_NAME
        files = [*self.files(), *self._companions.values()]
        self._identities = {file: identify(file) for file in files}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: there is no such tensor, or its array cannot be read.
        """
        info = tensor_info(self.tensors, name, self.path)
        if not info.shape:
            return self._tree.arrays.read_box(self._pieces[name].key, ())
        shape, _ = rows_of(info, start, stop)
        piece = self._pieces[name]
        if piece.columns and info.nbytes <= MAX_CACHED_BYTES:
            return self._matrix(name, info.shape[0])[start : start + shape[0]]
        if piece.rows:
            return piece.read(self._tree.arrays, start, start + shape[0])
        sizes = [(0, size) for size in info.shape[1:]]
        return self._tree.arrays.read_box(piece.key, [(start, start + shape[0]), *sizes])

    def _matrix(self, name: str, rows: int) -> Array:
        """Return a matrix, which a thread keeps until it reads another one.

        Its rows lie across the chunks of its array, so every block of rows decodes all of them.
        """
        cached: tuple[str, Array] | None = getattr(self._cache, "matrix", None)
        if cached is None or cached[0] != name:
            self._cache.matrix = None
            # One at a time: a chunk may hold all layers, and is decoded in memory.
            with self._reading:
                matrix = self._pieces[name].read(self._tree.arrays, 0, rows)
            cached = self._cache.matrix = name, matrix
        return cached[1]

    @cached_property
    def moments(self) -> SavedMoments[SavedMoment] | None:
        """The moments of the optimiser, if the tree has some of this model."""
        return find_moments(self._tree, self._tree.below((*T5_MARKS, *MARKS)), self._pieces)

    def moment_type(self, kind: str, name: str, type: TensorType) -> TensorType:
        """Return the type of a moment of a tensor, whose own is `type`."""
        assert self.moments is not None, "there are moments"
        moment = self.moments.of[kind][name]
        axes = [type.axes[axis] for axis in moment.axes]
        return type.with_axes(axes).with_dtype(_dtype(self._tree, moment.piece.key))

    def read_moment(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a moment of a tensor.

        Raises:
          InputError: its array cannot be read.
          KeyError: there is no such moment.
        """
        assert self.moments is not None, "there are moments"
        piece = self.moments.of[kind][name].piece
        rows = piece.shape(self._tree.arrays.shape(piece.key))[0]
        return piece.read(self._tree.arrays, start, rows if stop is None else stop)

    def remarks(self) -> list[str]:
        """Return which arrays are read, and whether the config was found or inferred."""
        words = [f"read from the {self.format} checkpoint in {self._tree.folder}"]
        if self.config and not self._config.exists():
            words.append("the config is inferred from the sizes of the arrays")
        cut = [p for p in self._pieces.values() if p.limit and self._padding(p)]
        if cut:
            words.append(f"{len(cut)} arrays have rows beyond the vocabulary, which are left out")
        return words

    def _padding(self, piece: ArrayPiece) -> bool:
        sizes = self._tree.arrays.shape(piece.key)
        return prod(sizes[axis] for axis in piece.rows) > (piece.limit or 0)

    def files(self) -> list[Path]:
        """Return all files of the tree, and the config."""
        return [*self._tree.files, *([self._config] if self._config.exists() else [])]


def open_tree(path: Path, folder: Path, *, needs_config: bool) -> TreeCheckpoint:
    """Open the tree in `folder`, which is `path` or in it; `path` may hold the model's config.

    Without a config, and where none is inferred, tensors have the names of the arrays.

    Raises:
      InputError: a faulty tree, or one without a config that is needed; all problems.
      MachineError: tensorstore or msgpack is missing.
    """
    tree = open_orbax(folder) if (folder / METADATA).is_file() else open_t5x(folder)
    config: JsonDict = {}
    if (path / CONFIG_NAME).exists():
        config = read_json_object(path / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
    problems = Problems()
    is_t5 = bool(tree.below(T5_MARKS))
    if is_t5 and config.get("model_type", "t5") in ("t5", "switch_transformers"):
        pieces = t5_pieces(tree, problems)
        shapes = {n: p.shape(tree.arrays.shape(p.key)) for n, p in pieces.items()}
        config = config or t5_config(shapes, problems)
    elif config and tree.below(MARKS):
        pieces = maxtext_pieces(tree, config, problems)
    else:
        pieces = {".".join(keys): ArrayPiece(key, ()) for keys, key in tree.keys.items()}
    if needs_config and not config:
        problems.add(
            f"the {tree.format} checkpoint says no architecture",
            where=path,
            expected=f"{CONFIG_NAME} of the model as transformers has it",
            hint="put it into the folder; or write a .moe graph over the arrays: "
            "docs/adding-a-family.md",
        )
    problems.raise_if_any()
    return TreeCheckpoint(path, tree, config, pieces)


def _info(name: str, piece: ArrayPiece, tree: Tree) -> TensorInfo:
    array = tree.arrays.shape(piece.key)
    shape = piece.shape(array) if piece.rows else array
    dtype = _dtype(tree, piece.key)
    nbytes = prod(shape) * dtype.itemsize_bytes
    return TensorInfo(name, dtype, shape, nbytes, tree.folder, 0)


def _dtype(tree: Tree, key: str) -> DType:
    return element_type(tree.arrays.dtype(key), f"{tree.folder}, array {quoted(key)}")


# Open a checkpoint of T5X: one msgpack file, and a zarr array in a folder for each large one.
#
# The file may state where an array is; that is never followed, because it may lead anywhere.  The
# folder of an array has the name of its path in the tree (``checkpoints.py`` of t5x, version 3).

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
    keys: dict[TreePath, str] = {}
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


def _leaves(tree: object, path: TreePath) -> Iterator[tuple[TreePath, Any]]:
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
        raise InputError(
            "not a msgpack file of T5X", where=path, found=describe_error(error)
        ) from None


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

T5_MARKS = (("encoder", "encoder_norm", "scale"),)
"""An array that every T5 has."""

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
    arrays = tree.below(T5_MARKS)
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
        "num_layers": _layer_count(shapes, "encoder"),
        "num_decoder_layers": _layer_count(shapes, "decoder"),
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
        layers = _layer_count(shapes, stack)
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


def _layer_count(shapes: Mapping[str, Shape], stack: str) -> int:
    return len({n.split(".")[2] for n in shapes if n.startswith(f"{stack}.block.")})
