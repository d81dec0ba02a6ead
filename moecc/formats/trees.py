"""Checkpoints of JAX programs: trees of arrays in zarr, as Orbax and T5X write them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

from moecc.errors import InputError
from moecc.formats.arrays import METADATA, ArrayPiece, Tree, open_orbax
from moecc.formats.files import identify, read_json_object
from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES, find_companions, rows_of
from moecc.formats.maxtext import MARKS, maxtext_pieces
from moecc.formats.source import (
    FIRST,
    SECOND,
    Checkpoint,
    SavedMoments,
    TensorInfo,
    tensor_info,
)
from moecc.formats.t5x import MARKS as T5_MARKS
from moecc.formats.t5x import open_t5x, t5_config, t5_pieces
from moecc.support.lazy import np
from moecc.support.problems import Problems, quoted
from moecc.support.untyped import JsonDict
from moecc.types import DTYPES, Array, DType, TensorType

# A checkpoint of a JAX program: by its arrays' own names, or as Hugging Face has the model.

# The moments of an optimiser in a tree of arrays, by the tensors of the model that they are of.
#
# optax keeps a tree of the model's shape for each kind of moment (``mu``, ``nu``, and Adafactor's
# ``v_row``, ``v_col``, ``v``), T5X the kinds below each array (``m``, ``v``, ``v_row``, ``v_col``,
# and ``grad_ema``, ``grad_sq_ema`` of Adam).  Factors lack one axis of their array: of two, the
# row factor lacks the larger, the second of equal ones (``adafactor.py`` of t5x,
# ``factorized.py`` of optax); of arrays with experts or layers besides, T5X averages rows over all
# but the model's width.

ROW, COLUMN = "v_row", "v_col"

_TREES = {"mu": FIRST, "nu": SECOND, "v": SECOND, "v_row": ROW, "v_col": COLUMN}
"""Trees of optax, by kind."""
_LEAVES = {
    "m": FIRST, "v": SECOND, "v_row": ROW, "v_col": COLUMN,
    "grad_ema": FIRST, "grad_sq_ema": SECOND,
}  # fmt: skip
"""Kinds of moments by the names that T5X stores below an array."""

TreePath = tuple[str, ...]


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
    for path, key in tree.keys.items():
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
    # Programs on NNX keep an array below its variable.
    path = path[:-1] if path[-1] == "value" else path
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
        if path in tree.keys and not tree.arrays.shape(tree.keys[path]):
            return int(np.asarray(tree.arrays.read_box(tree.keys[path], ())))
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
        below = self._tree.below((*T5_MARKS, *MARKS))
        arrays = {p[:-1] if p[-1] == "value" else p: key for p, key in below.items()}
        return find_moments(self._tree, arrays, self._pieces)

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
    """Open the tree in `place`, a folder in `path`, which may hold the model's config.

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
    element_type = tree.arrays.dtype(key)
    matches = [d for d in DTYPES.values() if d.kind != "key" and d.numpy == element_type]
    if not matches:
        raise InputError(
            "moecc does not know this type of elements",
            where=f"{tree.folder}, array {quoted(key)}",
            found=str(element_type),
        )
    return matches[0]
