"""Jaxprs as the versions of jax have them: their parts, their lines in the user's program, names.

What jax calls an equation, a variable and a jaxpr has no public type, so they are `Any` here; this
module alone knows how versions differ, and calls what has no annotations (pyproject.toml).
"""

from __future__ import annotations

import re
import traceback as tracebacks
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import unwrap
from itertools import takewhile
from math import prod
from os import sep
from pathlib import Path
from sysconfig import get_paths
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from moecc.types import Axis, DType, TensorType
from moecc.weights.expr import Box, Expr, Source
from moecc.weights.movement import Index, Merge, Permute, Slice, Split

Jaxpr = Any
JaxEquation = Any
Atom = Any
Aval = Any
AnyArray = Any
"""An array, of jax or NumPy, or the tracer of one."""

AnyArrays = Mapping[str, AnyArray]
"""Arrays by name."""

CALLS = frozenset(("jit", "pjit", "closed_call", "core_call"))
"""Primitives whose jaxpr stands for itself, called."""


def trace(function: Callable[..., Any], avals: Sequence[Aval]) -> tuple[Jaxpr, Any]:
    """Return the jaxpr of `function`, whose arguments are arrays, and the shapes of its result."""
    return jax.make_jaxpr(function, return_shape=True)(*avals)


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """Return a jaxpr with variables for its constants, and these."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def shape_of(shape: Sequence[int], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Return an array without its elements."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def is_literal(atom: Atom) -> bool:
    """Return whether `atom` is a value written into its equation."""
    return isinstance(atom, core.Literal)


def float_bits(dtype: Any) -> tuple[int, int]:
    """Return the bits of the fraction and of the exponent of a floating-point type."""
    info = jnp.finfo(dtype)
    return int(info.nmant), int(info.nexp)


def callee(eqn: JaxEquation) -> Jaxpr | None:
    """Return the jaxpr of a plain call; None for every other equation."""
    if eqn.primitive.name not in CALLS:
        return None
    return eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")


def inner_jaxprs(eqn: JaxEquation) -> list[Jaxpr]:
    """Return the jaxprs among the parameters of an equation."""
    values = (v if isinstance(v, tuple | list) else (v,) for v in eqn.params.values())
    return [p for parts in values for p in parts if hasattr(p, "eqns") or hasattr(p, "jaxpr")]


def run_jaxprs(eqn: JaxEquation) -> list[Jaxpr]:
    """Return the jaxprs that an equation runs: branches, the condition and the body of a loop."""
    if "branches" in eqn.params:
        return list(eqn.params["branches"])
    names = ("jaxpr", "call_jaxpr", "cond_jaxpr", "body_jaxpr")
    return [eqn.params[n] for n in names if n in eqn.params]


def contains(jaxpr: Jaxpr, primitive: str, memo: dict[int, bool] | None = None) -> bool:
    """Return whether an equation of `primitive` is in a jaxpr, at any depth."""
    memo = {} if memo is None else memo
    inner, _ = opened(jaxpr)
    if id(inner) not in memo:
        memo[id(inner)] = any(
            e.primitive.name == primitive
            or any(contains(sub, primitive, memo) for sub in inner_jaxprs(e))
            for e in inner.eqns
        )
    return memo[id(inner)]


def has_inside(eqn: JaxEquation, primitive: str) -> bool:
    """Return whether an equation of `primitive` is in the jaxprs of an equation."""
    return any(contains(jaxpr, primitive) for jaxpr in inner_jaxprs(eqn))


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a ``scan`` are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()
    return len(consts), len(carried)


def evaluate(
    eqns: Sequence[JaxEquation],
    values: Mapping[Any, AnyArray],
    results: Sequence[Any],
    like: Jaxpr,
) -> list[AnyArray]:
    """Evaluate equations as they are; return the values of the variables `results`.

    Args:
      eqns: the equations, in order.
      values: values of the variables that they use and do not define, by variable.
      results: variables that they define.
      like: the jaxpr that they are of.
    """
    part = like.replace(
        constvars=[],
        invars=list(values),
        outvars=list(results),
        eqns=list(eqns),
        effects=frozenset().union(*(e.effects for e in eqns)),
        debug_info=like.debug_info.with_unknown_names(),
    )
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*values.values()))


# Where an equation comes from in the user's program.


_FRAMEWORKS = (
    "jax", "jaxlib", "flax", "haiku", "equinox", "haliax", "penzai", "keras", "optax", "chex",
    "torch", "numpy", "einops", "jaxtyping", "beartype", "typeguard", "moecc", "moecc_backends",
)  # fmt: skip
"""Installed packages whose lines say nothing of a model; an installed model is in others."""


@cache
def _is_library(file: str) -> bool:
    paths = get_paths()
    for folder in (paths["purelib"], paths["platlib"]):
        if file.startswith(f"{folder}{sep}"):
            return file.removeprefix(folder).split(sep)[1] in _FRAMEWORKS
    return file.startswith((paths["stdlib"], str(Path(__file__).parents[1]), "<"))


def _line(file: str, number: int | None, function: str) -> str:
    return f"{Path(file).name}:{number} in {function}"


LINE_MARK = "\x1f"
"""Between a name and a line in the scope of an equation that stands for another program's."""


def scope_of(eqn: JaxEquation) -> tuple[str, str]:
    """Return the name and the line of the operation of another program that an equation is of."""
    name, _, line = str(eqn.source_info.name_stack).partition(LINE_MARK)
    return name, line


def user_line(eqn: JaxEquation) -> str:
    """Return ``file.py:12 in block`` for the innermost line outside of libraries, or nothing."""
    if LINE_MARK in str(eqn.source_info.name_stack):
        return scope_of(eqn)[1]
    traceback = eqn.source_info.traceback
    for frame in [] if traceback is None else traceback.frames:
        if not _is_library(frame.file_name):
            return _line(frame.file_name, frame.line_num, frame.function_name)
    return ""


def function_line(function: Callable[..., object]) -> str:
    """Return ``file.py:12 in block`` for a function, or its name where it has no file."""
    inner: object = unwrap(function)
    while isinstance(inner, partial):
        inner = inner.func
    name = str(getattr(inner, "__qualname__", "function"))
    code = getattr(inner, "__code__", None)
    return name if code is None else _line(code.co_filename, code.co_firstlineno, name)


def line_of(traceback: TracebackType | None) -> str | None:
    """Return the innermost line of an exception outside of libraries, or None."""
    frames = [] if traceback is None else tracebacks.extract_tb(traceback)
    lines = [_line(f.filename, f.lineno, f.name) for f in frames if not _is_library(f.filename)]
    return lines[-1] if lines else None


# Names: of leaves from their paths, of parameters of one layer of a stack, of blocks.

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-]+")
_STACK = re.compile(r"(?:layers?|blocks?|stack|h|encoder|decoder|groups?)\Z")
_NUMBER = re.compile(r"(\d+)")


def path_name(path: Sequence[Any]) -> str:
    """Return ``layers.0.mlp.up`` for a path of jax's; characters beyond names become ``_``.

    A key with slashes is a path of its own, such as the names of modules in haiku and gemma.
    """
    keys = (
        next((getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)), entry)
        for entry in path
    )
    parts = [
        _NOT_IN_NAMES.sub("_", part).strip("_")
        for key in keys
        for part in str(key).replace("/~/", "/").split("/")
    ]
    return ".".join(part or "_" for part in parts) or "params"


def unique(names: Iterable[str]) -> list[str]:
    """Return `names`, a repeated one with a number."""
    result: dict[str, None] = {}
    for name in names:
        number, candidate = 2, name
        while candidate in result:
            candidate, number = f"{name}_{number}", number + 1
        result[candidate] = None
    return list(result)


def indexed_name(name: str, index: int) -> str:
    """Return the name of part `index` of a stacked leaf: ``layers.up`` to ``layers.3.up``."""
    parts = name.split(".")
    stacks = [i for i, part in enumerate(parts[:-1]) if _STACK.search(part)]
    # A name that a number follows is of a list, or of a stack that is cut already.
    uncut = [i for i in stacks if not parts[i + 1].isdigit()]
    at = (uncut or stacks or [0 if len(parts) > 1 else -1])[-1] + 1
    while 0 < at < len(parts) and parts[at].isdigit():
        at += 1
    return ".".join([*parts[:at], str(index), *parts[at:]])


def block_location(names: Sequence[str]) -> str:
    """Return the location of a block from the names of its parameters: what they share."""
    shared = _shared([n.split(".")[:-1] for n in names])
    if shared:
        return ".".join(shared)
    prefix = "".join(_shared(names))
    return prefix.rstrip("._-") if prefix.endswith(("_", "-")) else "ffn"


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the first parts that all `names` have."""
    columns = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return [parts[0] for parts in columns]


def ranged_name(names: Sequence[str]) -> str:
    """Return one name for names that differ in one number: ``layers.{0..5}.mlp.up``.

    Names that differ otherwise have the first one.
    """
    pieces = [[int(p) if i % 2 else p for i, p in enumerate(_NUMBER.split(n))] for n in names]
    columns = list(zip(*pieces, strict=False))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(set(map(len, pieces))) > 1 or len(differing) != 1 or not differing[0] % 2:
        return names[0]
    numbers = [int(n) for n in columns[differing[0]]]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return names[0]
    texts = [str(column[0]) for column in columns]
    texts[differing[0]] = f"{{{numbers[0]}..{numbers[-1]}}}"
    return "".join(texts)


# A leaf of the parameters as an equation sees it: sliced, reshaped, cut from a stack.
#
# A view is a chain of moves on a leaf.  Orders of axes, casts and repetitions along new axes are
# not among them: axes have names here, so these change only which dimension of the array is which
# axis.

Iteration = Mapping[Hashable, int]
"""The number of the iteration of each loop."""


class NotABlock(Exception):
    """Why a part of a program is not a block: the reason of a near miss."""


@dataclass(frozen=True)
class TreeLeaf:
    """A leaf of the parameters: its name from the path in the tree, and its type.

    Attributes:
      name: ``layers.0.mlp.up``.
      shape: its shape.
      dtype: its element type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of its axes."""
        return tuple(f"d{i}" for i in range(len(self.shape)))

    @property
    def source(self) -> Source:
        """The leaf as a weight expression."""
        return Source(self.name, TensorType(self.dtype, tuple(map(Axis, self.axes, self.shape))))


class Move(NamedTuple):
    """One step from a leaf to a view of it.

    Attributes:
      kind: ``slice``, ``index``, ``each`` (a loop counts the index), ``split`` or ``merge``.
      axis: the axis it is about; of ``merge`` the new one.
      args: start and stop; the index; the loop; the parts; the merged axes.
    """

    kind: str
    axis: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class LeafView:
    """A leaf seen through moves.

    Attributes:
      leaf: the leaf.
      dims: the axis of each dimension of the array; None where it does not vary along it.
      sizes: the size of each remaining axis.
      moves: the moves on the leaf, in order.
      casts: the element types that it was cast to, in order.
    """

    leaf: TreeLeaf
    dims: tuple[str | None, ...]
    sizes: tuple[tuple[str, int], ...]
    moves: tuple[Move, ...] = ()
    casts: tuple[str, ...] = ()

    @classmethod
    def of(cls, leaf: TreeLeaf) -> LeafView:
        """Return the view of all of `leaf`."""
        return cls(leaf, leaf.axes, tuple(zip(leaf.axes, leaf.shape, strict=True)))

    @property
    def loops(self) -> tuple[Hashable, ...]:
        """The loops that pick a part of the leaf, outermost first."""
        return tuple(move.args[0] for move in self.moves if move.kind == "each")

    def with_dims(self, dims: Sequence[str | None]) -> LeafView:
        """Return this view with its axes along other dimensions."""
        return replace(self, dims=tuple(dims))

    def each(self, loop: Hashable) -> LeafView:
        """Return the view that iteration by iteration `loop` has of the first dimension."""
        axis, *dims = self.dims
        view = self if axis is None else self._moved(Move("each", axis, (loop,)), {axis: ()})
        return view.with_dims(dims)

    # The methods below change axes, and leave `dims` to the caller (`scopes.rearranged`).

    def sliced(self, axis: str, start: int, stop: int) -> tuple[LeafView, str]:
        """Return the part ``[start, stop)`` of an axis, which keeps its name."""
        parts = ((axis, stop - start),)
        return self._moved(Move("slice", axis, (start, stop)), {axis: parts}), axis

    def indexed(self, axis: str, index: int) -> LeafView:
        """Return one element of an axis, without the axis."""
        return self._moved(Move("index", axis, (index,)), {axis: ()})

    def regrouped(
        self, axes: Sequence[str | None], parts: Sequence[int]
    ) -> tuple[LeafView, tuple[str, ...]]:
        """Return the view with neighbouring axes joined and cut again, and the new names.

        Raises:
          NotABlock: it does not vary along one of them.
        """
        names = tuple(axis for axis in axes if axis is not None)
        if len(names) < len(axes):
            raise NotABlock("a reshape joins an axis with one that is repeated")
        view, axis = self, names[0]
        if len(names) > 1:
            axis = "x".join(names)
            merged = ((axis, prod(dict(self.sizes)[n] for n in names)),)
            replaced = {n: merged if n == names[0] else () for n in names}
            view = self._moved(Move("merge", axis, names), replaced)
        if len(parts) == 1:
            return view, (axis,)
        names = tuple(f"{axis}_{i}" for i in range(len(parts)))
        into = tuple(zip(names, parts, strict=True))
        return view._moved(Move("split", axis, into), {axis: into}), names

    def _moved(self, move: Move, replaced: Mapping[str, tuple[tuple[str, int], ...]]) -> LeafView:
        """Return the view after `move`, with some axes replaced by others."""
        sizes = (part for axis in self.sizes for part in replaced.get(axis[0], (axis,)))
        return replace(self, sizes=tuple(sizes), moves=(*self.moves, move))

    def box(self, iteration: Iteration | None = None) -> Box:
        """Return the part of the leaf that the view sees, or a box around it.

        Without an iteration it is the part that all iterations of loops see.
        """
        ends = {axis: (0, size) for axis, size in zip(self.leaf.axes, self.leaf.shape, strict=True)}
        uncut = set(ends)
        for kind, axis, args in self.moves:
            if kind == "merge" or axis not in uncut:
                uncut.difference_update(args)
                continue
            start, _ = ends[axis]
            if kind == "slice":
                ends[axis] = (start + args[0], start + args[1])
                continue
            uncut.discard(axis)
            index = args[0] if kind == "index" else (iteration or {}).get(args[0])
            if kind != "split" and index is not None:
                ends[axis] = (start + index, start + index + 1)
        return tuple(ends.values())

    def expression(self, iteration: Iteration) -> Expr:
        """Return the view as a weight expression, in one iteration of each loop."""
        expr: Expr = self.leaf.source
        for kind, axis, args in self.moves:
            if kind == "slice":
                expr = Slice(expr, axis, *args)
            elif kind == "split":
                expr = Split(expr, axis, args)
            elif kind == "merge":
                names = expr.type.names
                remaining = [n for n in names if n not in args]
                before = len([n for n in names[: names.index(args[0])] if n not in args])
                order = (*remaining[:before], *args, *remaining[before:])
                expr = Merge(expr if order == names else Permute(expr, order), args, axis)
            else:
                expr = Index(expr, axis, args[0] if kind == "index" else iteration[args[0]])
        return expr


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions become which in a reshape: the smallest groups of equal products.

    Raises:
      NotABlock: a dimension is zero, so that products say nothing.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        if i < len(old):
            before, i = [i], i + 1
        if j < len(new) and (not before or old[before[0]] != 1 or new[j] == 1):
            after, j = [j], j + 1
        while (p := prod(old[n] for n in before)) != (q := prod(new[n] for n in after)):
            if i == len(old) and j == len(new):
                raise NotABlock("an array without elements is reshaped")
            if (p < q and i < len(old)) or j == len(new):
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        groups.append((before, after))
    return groups
