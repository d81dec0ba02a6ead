"""A checkpoint of a JAX program: by its arrays' own names, or as Hugging Face has the model."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType

from moecc.checkpoint.companions import find_companions
from moecc.checkpoint.files import Identity, identify, require_unchanged
from moecc.checkpoint.folder import CONFIG_NAME, MAX_CONFIG_BYTES, rows_of
from moecc.checkpoint.frontmatter import read_card
from moecc.checkpoint.jsonfile import read_json_object
from moecc.checkpoint.problems import Problems, quoted
from moecc.checkpoint.source import TensorInfo
from moecc.checkpoint.trees.find import METADATA
from moecc.checkpoint.trees.maxtext import MARKS as MAXTEXT_MARKS
from moecc.checkpoint.trees.maxtext import maxtext_pieces
from moecc.checkpoint.trees.moments import SavedMoments, find_moments
from moecc.checkpoint.trees.orbax import open_orbax
from moecc.checkpoint.trees.t5 import MARKS as T5_MARKS
from moecc.checkpoint.trees.t5 import t5_config, t5_pieces
from moecc.checkpoint.trees.t5x import open_t5x
from moecc.checkpoint.trees.tree import Piece, Tree
from moecc.errors import InputError, nearest
from moecc.support.closing import Closing
from moecc.types.arrays import Array
from moecc.types.dtypes import DTYPES, DType
from moecc.types.tensor import TensorType

MOST_KEPT_BYTES = 1 << 30
"""The size of the largest matrix that is read as a whole."""


class TreeCheckpoint(Closing):
    """Tensors that are pieces of a tree's arrays; see `moecc.checkpoint.source.Checkpoint`."""

    def __init__(
        self, path: Path, tree: Tree, config: dict[str, object], pieces: Mapping[str, Piece]
    ) -> None:
        self.path, self.format, self.config = path, tree.format, config
        self._tree, self._pieces = tree, pieces
        self._kept, self._reading = threading.local(), threading.Lock()
        infos = {name: _info(name, piece, tree) for name, piece in pieces.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(infos)
        problems = Problems()
        self._companions = find_companions(path, problems)
        problems.raise_if_any()
        self._config = path / CONFIG_NAME
        files = [*self.files(), *self._companions.values()]
        self._identities: dict[Path, Identity] = {file: identify(file) for file in files}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor; thread-safe.

        Raises:
          InputError: there is no such tensor, or its array cannot be read.
        """
        info = self.tensors.get(name)
        if info is None:
            hint = nearest(name, list(self.tensors)[:2000])
            raise InputError(f"there is no tensor {quoted(name)}", where=str(self.path), hint=hint)
        if not info.shape:
            return self._tree.arrays.read_box(self._pieces[name].key, ())
        shape, _ = rows_of(info, start, stop)
        piece = self._pieces[name]
        if piece.columns and info.nbytes <= MOST_KEPT_BYTES:
            return self._whole(name, info.shape[0])[start : start + shape[0]]
        if piece.rows:
            return piece.read(self._tree.arrays, start, start + shape[0])
        sizes = [(0, size) for size in info.shape[1:]]
        return self._tree.arrays.read_box(piece.key, [(start, start + shape[0]), *sizes])

    def _whole(self, name: str, rows: int) -> Array:
        """Return a matrix, which a thread keeps until it reads another one.

        Its rows lie across the chunks of its array, so every block of rows decodes all of them.
        """
        kept: tuple[str, Array] | None = getattr(self._kept, "matrix", None)
        if kept is None or kept[0] != name:
            self._kept.matrix = None
            # One at a time: a chunk may hold all layers, and is decoded in memory.
            with self._reading:
                matrix = self._pieces[name].read(self._tree.arrays, 0, rows)
            kept = self._kept.matrix = name, matrix
        return kept[1]

    @cached_property
    def moments(self) -> SavedMoments | None:
        """The moments of the optimiser, if the tree has some of this model."""
        below = self._tree.below((*T5_MARKS, *MAXTEXT_MARKS))
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

    def companions(self) -> dict[str, Path | bytes]:
        """Return the files beside the config that an export copies."""
        return dict(self._companions)

    def remarks(self) -> list[str]:
        """Return which arrays are read, and whether the config was found or inferred."""
        words = [f"read from the {self.format} checkpoint in {self._tree.folder}"]
        if self.config and not self._config.exists():
            words.append("the config is inferred from the sizes of the arrays")
        cut = [p for p in self._pieces.values() if p.limit and self._padding(p)]
        if cut:
            words.append(f"{len(cut)} arrays have rows beyond the vocabulary, which are left out")
        return words

    def _padding(self, piece: Piece) -> bool:
        sizes = self._tree.arrays.shape(piece.key)
        return prod(sizes[axis] for axis in piece.rows) > (piece.limit or 0)

    def card(self) -> dict[str, tuple[str, ...]]:
        """Return what is kept of a card in the folder."""
        return read_card(self.path)

    def files(self) -> list[Path]:
        """Return all files of the tree, and the config."""
        return [*self._tree.files, *([self._config] if self._config.exists() else [])]

    def require_unchanged(self) -> None:
        """Raise InputError if a file, companions included, changed since it was opened."""
        require_unchanged(self._identities)

    def close(self) -> None:
        """Close the files."""


def open_tree(path: Path, place: Path, *, needs_config: bool) -> TreeCheckpoint:
    """Open the tree in `place`, a folder in `path`, which may hold the model's config.

    Without a config, and where none is inferred, tensors have the names of the arrays.

    Raises:
      InputError: a faulty tree, or one without a config that is needed; all problems.
      MachineError: tensorstore or msgpack is missing.
    """
    tree = open_orbax(place) if (place / METADATA).is_file() else open_t5x(place)
    config: dict[str, object] = {}
    if (path / CONFIG_NAME).exists():
        config = read_json_object(path / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
    problems = Problems()
    is_t5 = bool(tree.below(T5_MARKS))
    if is_t5 and config.get("model_type", "t5") in ("t5", "switch_transformers"):
        pieces = t5_pieces(tree, problems)
        shapes = {n: p.shape(tree.arrays.shape(p.key)) for n, p in pieces.items()}
        config = config or t5_config(shapes, problems)
    elif config and tree.below(MAXTEXT_MARKS):
        pieces = maxtext_pieces(tree, config, problems)
    else:
        pieces = {".".join(keys): Piece(key, ()) for keys, key in tree.keys.items()}
    if needs_config and not config:
        problems.add(
            f"the {tree.format} checkpoint says no architecture", where=str(path),
            expected=f"{CONFIG_NAME} of the model as transformers has it",
            hint="put it into the folder; or write a .moe graph over the arrays: "
            "docs/adding-a-family.md",
        )  # fmt: skip
    problems.raise_if_any()
    return TreeCheckpoint(path, tree, config, pieces)


def _info(name: str, piece: Piece, tree: Tree) -> TensorInfo:
    array = tree.arrays.shape(piece.key)
    shape = piece.shape(array) if piece.rows else array
    dtype = _dtype(tree, piece.key)
    nbytes = prod(shape) * dtype.itemsize_bytes
    return TensorInfo(name, dtype, shape, nbytes, tree.folder, 0)


def _dtype(tree: Tree, key: str) -> DType:
    found = tree.arrays.dtype(key)
    known = [d for d in DTYPES.values() if d.kind != "key" and d.numpy == found]
    if not known:
        raise InputError(
            "moecc does not know this type of elements",
            where=f"{tree.folder}, array {quoted(key)}", found=str(found),
        )  # fmt: skip
    return known[0]
