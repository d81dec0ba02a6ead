"""Inputs for a model: arrays for the inputs of its graph, checked or drawn."""

from __future__ import annotations

import os
import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO

from moecc.errors import InputError, MachineError, Problem, nearest, printable, raise_problems
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import clone, index_bound, length_bounds
from moecc.support.lazy import np
from moecc.types import Array

ANY_INDEX = 2
"""Integers are below this where nothing says what they index."""


def longest(graph: Graph) -> int | None:
    """Return the longest sequence that learned positions allow, or None where nothing bounds it."""
    return min(length_bounds(graph).values(), default=None)


def stated_context(graph: Graph) -> int | None:
    """Return the longest sequence that the config of a model states or its positions allow."""
    limits = (graph.stated_config.get("max_position_embeddings"), longest(graph))
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)


def context_remarks(name: str, context: int | None, tokens: int) -> Iterator[str]:
    """Yield a remark where sequences of a model are longer than the context that it states.

    Rotary positions go on beyond it, to angles that no training has seen.
    """
    if context is not None and tokens > context:
        yield (
            f"{name}: sequences of up to {tokens:,} tokens are longer than the context that its "
            f"config states, max_position_embeddings = {context:,}"
        )


def default_inputs(
    *graphs: Graph, batch: int = 2, seq: int = 128, seed: int = 1
) -> dict[str, Array]:
    """Return random inputs that suit all of `graphs`, which take the same ones.

    Token ids are drawn, masks are true everywhere, random keys are the seed.  The second and later
    lengths of a graph, such as the decoder's, are an eighth shorter each, so that they differ.

    Raises:
      InputError: the graphs have inputs of other names, or caches, which only their own steps fill.
    """
    first = graphs[0]
    caches = [name for name in first.inputs if name in first.outputs]
    if caches:
        raise InputError(
            "the graph goes on from its caches, which nothing has filled", found=caches[0],
            hint="give all inputs in one .npz file, by name",
        )  # fmt: skip
    for second in graphs[1:]:
        if second.inputs.keys() != first.inputs.keys():
            raise InputError(
                "the two models take different inputs",
                expected=", ".join(first.inputs), found=", ".join(second.inputs),
            )  # fmt: skip
    # Under the default seed SmolLM2 has no token that becomes an attention sink late: at such a
    # token (one of 256 under seed 0) rounding alone moves the float32 logits by 7e-5.
    bounds = [bound for graph in graphs if (bound := longest(graph)) is not None]
    lengths = _Lengths(batch, min(seq, *bounds) if bounds else seq)
    arrays: dict[str, Array] = {}
    for number, name in enumerate(first.inputs):
        shape = lengths.shape(first.inputs[name])
        limits = (index_bound(graph.inputs[name]) for graph in graphs)
        limit = min((b for b in limits if b is not None), default=ANY_INDEX)
        arrays[name] = _draw(first.inputs[name], shape, limit, seed + number)
    return arrays


class _Lengths:
    """Sizes for the variables of input types, in the order in which they are met."""

    def __init__(self, batch: int, seq: int) -> None:
        self._batch = batch
        self._next = seq
        self._sizes: dict[str, int] = {}

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(self._size(axis.name, axis.size) for axis in value.type)

    def _size(self, name: str, size: object) -> int:
        if isinstance(size, int):
            return size
        key = str(size)
        if key not in self._sizes:
            self._sizes[key] = self._batch if name == "batch" else self._next
            if name != "batch":
                self._next = max(self._next - self._next // 8, 1)
        return self._sizes[key]


def _draw(value: Value, shape: tuple[int, ...], limit: int, seed: int) -> Array:
    dtype, rng = value.type.dtype, np.random.default_rng(seed)
    if dtype.kind == "bool":
        return np.ones(shape, bool)
    if dtype.kind == "key":
        return np.full(shape, seed, np.uint64)
    if dtype.kind == "int":
        return rng.integers(0, limit, shape).astype(np.int32)
    return rng.standard_normal(shape).astype(dtype.numpy)


def check_inputs(graph: Graph, arrays: Mapping[str, Array], where: str) -> dict[str, Array]:
    """Return arrays for the inputs of `graph`; a batch axis is added where one sequence is given.

    Raises:
      InputError: one is missing, unknown or of another kind, an id is not in its table, or a
        sequence is longer than the model has positions.
    """
    problems = [
        Problem(
            "the model has no such input",
            f"{where}: {name}",
            ", ".join(graph.inputs),
            hint=nearest(name, graph.inputs),
        )
        for name in arrays
        if name not in graph.inputs
    ]
    checked: dict[str, Array] = {}
    bounds = length_bounds(graph)
    for name, value in graph.inputs.items():
        if name not in arrays:
            hint = "give all inputs in one .npz file, by name" if len(graph.inputs) > 1 else None
            problem = f"the model also takes {name}"
            problems.append(Problem(problem, where, str(value.type), ", ".join(arrays), hint))
            continue
        array = arrays[name][None] if arrays[name].ndim == value.type.rank - 1 else arrays[name]
        location = where if len(graph.inputs) == 1 else f"{where}: {name}"
        wrong = list(_misfits(value, array, location))
        problems.extend(wrong or length_problems(value, array, location, bounds))
        checked[name] = array
    raise_problems(problems)
    ids = {n: v.type.dtype.numpy for n, v in graph.inputs.items() if v.type.dtype.kind == "int"}
    return {name: a.astype(ids[name]) if name in ids else a for name, a in checked.items()}


def length_problems(
    value: Value, array: Array, where: str, bounds: Mapping[str, int]
) -> Iterator[Problem]:
    """Yield the axes of an input that are longer than `bounds`, as `length_bounds` returns them."""
    for axis, size in zip(value.type, array.shape, strict=True):
        most = bounds.get(axis.size, size) if isinstance(axis.size, str) else size
        if size > most:
            problem = "a sequence is longer than the model has positions"
            yield Problem(problem, where, f"at most {most} tokens", str(size))


def _misfits(value: Value, array: Array, where: str) -> Iterator[Problem]:
    shown = f"{array.dtype}{list(array.shape)}"
    if value.type.dtype.kind == "int":
        if array.dtype.kind not in "iu" or array.ndim != value.type.rank or not array.size:
            yield Problem("not token ids", where, "whole numbers, [batch, seq] or [seq]", shown)
            return
        limit, low, high = index_bound(value), int(array.min()), int(array.max())
        if limit is not None and (low < 0 or high >= limit):
            problem, token = "a token id is outside the vocabulary", low if low < 0 else high
            yield Problem(problem, where, f"0 <= id < {limit}", str(token))
        return
    kinds = {"bool": "b", "float": "f", "key": "u"}
    if array.dtype.kind not in kinds[value.type.dtype.kind] or array.ndim != value.type.rank:
        yield Problem("the array does not fit the input", where, str(value.type), shown)
        return
    sizes = zip(value.type, array.shape, strict=True)
    if any(isinstance(axis.size, int) and axis.size != size for axis, size in sizes):
        yield Problem("the array has other sizes than the input", where, str(value.type), shown)


# The first layers of a deep model, with its embedding and its output: a smaller model to run.

_LAYER = re.compile(r"layers\.([0-9]{1,6})(?:\.|\Z)")


def layer_count(graph: Graph) -> int:
    """Return the number of layers of a decoder or encoder alone; 0 for other models."""
    numbers = {n for node in graph if (n := _number(node)) is not None}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def first_layers(graph: Graph, count: int) -> Graph:
    """Return a copy of `graph` without the layers from `count` on.

    What the last of them gives is replaced by what layer `count` takes: the stream that all layers
    add to.

    Raises:
      InputError: the layers do not pass on one value alone.
    """
    copy = clone(graph)
    total = layer_count(copy)
    if not 0 < count < total:
        return copy
    stream, end = _stream_into(copy, count), _stream_into(copy, total)
    if stream.type != end.type:
        raise InputError("the layers do not pass on a value of one type", where=f"layers.{count}")
    users = [user for user in end.users if _number(user) is None]
    for user in users:
        user.replace_operand(end, stream)
    copy.erase_dead()
    copy.erase_unused_params()
    return copy


def _number(node: Node) -> int | None:
    match = _LAYER.match(node.loc)
    return int(match[1]) if match else None


def _stream_into(graph: Graph, layer: int) -> Value:
    """Return the value of the layer before that later nodes use.

    Raises:
      InputError: there are several.
    """
    values: dict[Value, None] = {}
    for node in graph:
        number = _number(node)
        if number is not None and number < layer:
            continue
        if number is None and layer != layer_count(graph):
            continue
        for value in node.operands:
            if value.node is not None and _number(value.node) == layer - 1:
                values[value] = None
    for value in graph.outputs.values() if layer == layer_count(graph) else ():
        if value.node is not None and _number(value.node) == layer - 1:
            values[value] = None
    if len(values) != 1:
        names = ", ".join(f"%{value.name}" for value in values) or "nothing"
        raise InputError("a layer passes on several values", where=f"layers.{layer}", found=names)
    return next(iter(values))


# Files with the inputs of a model: arrays as NumPy writes them.


def read_inputs(path: str, graph: Graph) -> dict[str, Array]:
    """Return the inputs of `graph` from a file.

    A ``.npy`` file holds the token ids of a model with no other input, ``[batch, seq]`` or
    ``[seq]``; a ``.npz`` file holds an array for each input, by name.

    Raises:
      InputError: it is no such file, or its content does not match the graph.
    """
    if path.endswith(".npz"):
        return check_inputs(graph, read_named_arrays(path), path)
    require_file(path)
    with open(path, "rb") as file:
        return check_inputs(graph, {next(iter(graph.inputs)): _load(file, path)}, path)


def require_file(path: str) -> None:
    """Raise InputError unless there is a file."""
    if not os.path.isfile(path):
        raise InputError("no such file", where=path)


_FOREIGN = (
    ValueError, EOFError, OSError, SyntaxError, TypeError, OverflowError, RecursionError,
    NotImplementedError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What NumPy, zipfile and the parser of headers raise for files that are none."""


def read_named_arrays(path: str) -> dict[str, Array]:
    """Return the arrays of a ``.npz`` file, by name. Raises InputError."""
    require_file(path)
    # Pickled objects are code; NumPy rejects them by default.
    try:
        with open(path, "rb") as file, _quiet(), np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _FOREIGN as error:
        raise InputError(f"not a .npz file: {printable(str(error))}", where=path) from None
    except MemoryError:
        raise MachineError("the arrays do not fit into memory", where=path) from None
    # A member that is no .npy file comes as bytes.
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise InputError("a member is not an array", where=path, found=printable(strange[0]))
    return arrays


def _quiet() -> warnings.catch_warnings[None]:
    """Silence what NumPy says of headers of Python 2, which it reads all the same."""
    return warnings.catch_warnings(action="ignore")


def _load(file: IO[bytes], path: str) -> Array:
    # Pickled objects are code; NumPy rejects them by default.
    try:
        with _quiet():
            loaded = np.lib.format.read_array(file, allow_pickle=False)
    except _FOREIGN as error:
        raise InputError(f"not a .npy file: {printable(str(error))}", where=path) from None
    except MemoryError:
        raise MachineError("the array does not fit into memory", where=path) from None
    return loaded
