"""Typed weight expressions: the base of all nodes, and the leaves.

An expression states how a tensor is computed from the tensors of a checkpoint.  It is immutable and
interned: equal expressions are the same object, so comparing and hashing them costs nothing,
whatever their depth.  Its type, with fixed sizes only, is inferred and checked on construction.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast, dataclass_transform
from weakref import WeakValueDictionary

from moecc.errors import InputError, printable
from moecc.support.lazy import np
from moecc.support.user_files import is_own
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head, Var
from moecc.types import F32, F64, Array, DType, TensorType

MAX_DEPTH = 100
"""The depth limit of expressions, which recursive traversals rely on."""

MAX_NODES = 1_000_000
"""The limit on nodes of an expression, counting shared parts at each use."""

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z_]\w*")

_table: WeakValueDictionary[tuple[object, ...], Expr] = WeakValueDictionary()
_lock = threading.Lock()


class _Interned(type):
    """Makes a class return the existing object for an equal expression."""

    if not TYPE_CHECKING:  # mypy takes the signature of the dataclass

        def __call__(cls, *args, **kwargs):
            expr = super().__call__(*args, **kwargs)
            with _lock:
                return _table.setdefault(expr._key(), expr)


class Expr(metaclass=_Interned):
    """A node of a weight expression.

    Attributes:
      type: the element type and the axes, in the order of the bytes, of the value.
      operands: the operand expressions, in the order of its fields.
      depth: the nesting depth; a leaf has depth 1.
      nodes: the number of nodes, shared parts counted at each use.
    """

    syntax: ClassVar[str]
    """The text: ``{field}`` stands for a field, and brackets enclose one that may be omitted."""

    rearranges: ClassVar[bool] = False
    """Whether its term only moves elements, so that it is exact."""

    parsed_syntax: ClassVar[tuple[SyntaxGroup, ...]]
    """The syntax, parsed."""

    type: TensorType
    operands: tuple[Expr, ...]
    depth: int
    nodes: int

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]
    _coerced: ClassVar[tuple[tuple[str, Callable[[Any], object]], ...]] = ()

    def __init_subclass__(cls) -> None:
        if is_own(cls.__module__):
            raise TypeError(
                f"{cls.__name__} is a weight expression of its own, which nothing evaluates: "
                "compose those of moecc.weights, which docs/formats.md lists"
            )

    def __post_init__(self) -> None:
        for name, convert in self._coerced:
            self._set(name, convert(getattr(self, name)))
        self._normalise()
        operands = tuple(_operands(self))
        self._set("operands", operands)
        self._set("depth", 1 + max((x.depth for x in operands), default=0))
        self._set("nodes", 1 + sum(x.nodes for x in operands))
        if self.depth > MAX_DEPTH:
            # The text of this node is as deep as the node, so show its operand.
            raise operands[0].error(f"the expression nests deeper than {MAX_DEPTH}")
        if self.nodes > MAX_NODES:
            raise operands[0].error(f"the expression has more than {MAX_NODES:,} nodes")
        self._set("type", self._infer())

    def _normalise(self) -> None:
        """Normalise the fields so that equal expressions are the same object."""

    def term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        """Return the value in index notation, from that of the operands."""
        return dataclasses.replace(self._term(algebra, *operands), dtype=self.type.dtype)

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        """Return the value in index notation; a class that knows nothing better leaves it."""
        return self.uninterpreted(algebra, *operands)

    def axes_in(self, algebra: Algebra) -> tuple[Var, ...]:
        """Return the axes of the value in index notation."""
        return tuple(algebra.axis(a.name, a.fixed_size) for a in self.type.axes)

    def uninterpreted(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        """Return an unknown function of the operands, which the text of this node identifies."""
        axes = self.axes_in(algebra)
        indices = [algebra.index(v) for v in axes]
        functions = [x.closed() for x in operands]
        # The text may name axes of operands, so which function it is depends on their layout.
        layout = tuple((x.names, str(x.dtype)) for x in operands)
        body = algebra.apply(Head("weight", (self.outline, layout)), functions, indices)
        return Tensor(algebra, axes, body, dtype=self.type.dtype)

    def _infer(self) -> TensorType:
        """Check the fields and return the type. Raises: InputError."""
        raise TypeError(f"{self.__class__.__name__} is an abstract node")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _fields(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in self.__dataclass_fields__])

    def _key(self) -> tuple[object, ...]:
        # As `_identity`, which would be called a million times for a large model.
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        return (self.__class__, *[v.hex() if isinstance(v, float) else v for v in values])

    def with_operands(self, *operands: Expr) -> Expr:
        """Return this node with other operands, in the order of `operands`."""
        if operands == self.operands:
            return self
        remaining = iter(operands)
        values = (
            next(remaining)
            if isinstance(value, Expr)
            else tuple(next(remaining) for _ in value)
            if isinstance(value, tuple) and value and isinstance(value[0], Expr)
            else value
            for value in self._fields()
        )
        return self.__class__(*values)

    def replace(self, **fields: object) -> Expr:
        """Return this node with other values of some fields."""
        values = dict(zip(self.__dataclass_fields__, self._fields(), strict=True))
        return self.__class__(**values | fields)

    def error(self, message: str, **more: str | None) -> InputError:
        """Return an error that names this expression; `more` as of a `Problem`."""
        return InputError(message, where=f"weight expression {printable(str(self), 200)}", **more)

    def __str__(self) -> str:
        """Return the text, on one line; `moecc.weights.text` parses it."""
        return self._spelled(None)

    @property
    def outline(self) -> str:
        """The text with ``_`` in place of every operand."""
        return self._spelled("_")

    def _spelled(self, operand: str | None) -> str:
        """Return the text, with `operand`, if there is one, in place of every operand."""
        pieces: list[str] = []
        for group in self.parsed_syntax:
            if group.defaults and _identity(getattr(self, group.parts[0][1])) in group.defaults:
                continue
            for literal, name, form in group.parts:
                pieces.append(literal)
                if not name:
                    continue
                value = getattr(self, name)
                if operand is not None and isinstance(value, Expr):
                    value, form = operand, ""
                elif operand is not None and form == "tuple[Expr, ...]":
                    value = (operand,) * len(value)
                pieces.append(FORMS.get(form, str)(value))
        return "".join(pieces)

    def __repr__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[object, ...]:
        return (self.__class__, self._fields())

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self


class SyntaxGroup(NamedTuple):
    """A part of a syntax: triples of a literal, the field after it or "", and the field's form.

    Attributes:
      parts: the triples.
      defaults: the value of its first field that omits the group; () where it is always present.
    """

    parts: tuple[tuple[str, str, str], ...]
    defaults: tuple[object, ...]


_FIELD = re.compile(r"\{(\w+)(?::(\w+))?\}")

NODES: dict[str, type[Expr]] = {}
"""The classes of nodes by the word that their text begins with."""

FORMS: dict[str, Callable[[Any], str]] = {
    "string": json.dumps,
    "key": "{:#x}".format,
    "float": repr,
    "tuple[Expr, ...]": lambda xs: "".join([f"{x}, " for x in xs]),
    "tuple[str, ...]": lambda names: f"({', '.join(names)})",
    "Sizes": lambda sizes: f"({', '.join(f'{name}={size}' for name, size in sizes)})",
}
"""Printers of fields by their form: the annotation, or the form that the syntax names."""

_COERCIONS: dict[str, Callable[[Any], object]] = {
    "float": float,
    "tuple[Expr, ...]": tuple,
    "tuple[str, ...]": tuple,
    "Sizes": lambda sizes: tuple((name, size) for name, size in sizes),
}


def _identity(value: object) -> object:
    """Return a stand-in for the value of a field: 0.0 equals -0.0, yet their bytes differ."""
    return value.hex() if isinstance(value, float) else value


@dataclass_transform(frozen_default=True, eq_default=False)
def node(cls: type[T]) -> type[T]:
    """Make `cls`, an `Expr`, a node class: fields, equality by identity, the text as its repr."""
    decorated: Any = dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = {f.name: f for f in dataclasses.fields(decorated)}
    decorated._coerced = tuple(
        (name, _COERCIONS[str(f.type)]) for name, f in fields.items() if str(f.type) in _COERCIONS
    )
    groups = []
    for at, text in enumerate(re.split(r"[\[\]]", decorated.syntax)):
        pieces = [*_FIELD.split(text), "", ""]
        parts = tuple(
            (literal, name, form or (str(fields[name].type) if name else ""))
            for literal, name, form in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
        )
        # The pieces between brackets have odd numbers.
        defaults = (_identity(fields[parts[0][1]].default),) if at % 2 else ()
        groups.append(SyntaxGroup(parts, defaults))
    decorated.parsed_syntax = tuple(groups)
    NODES[decorated.syntax.partition("(")[0]] = decorated
    return cast("type[T]", decorated)


def _operands(expr: Expr) -> Iterator[Expr]:
    for name in expr.__dataclass_fields__:
        value = getattr(expr, name)
        if isinstance(value, Expr):
            yield value
        elif isinstance(value, tuple):
            yield from (v for v in value if isinstance(v, Expr))


@node
class Source(Expr):
    """A tensor of the checkpoint, as stored.

    Attributes:
      name: its name in the checkpoint.
      type: its element type on disk, its sizes, and names for its axes.
    """

    syntax = "source({name:string} : {type})"
    rearranges = True
    name: str
    type: TensorType

    def _infer(self) -> TensorType:
        if not self.name:
            raise self.error("a source needs a name")
        check_type(self, self.type)
        return self.type

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        axes = self.axes_in(algebra)
        # The names of the axes are the reader's, the sizes and the element type the file's.
        head = Head("source", (self.name, str(self.type.dtype), self.type.shape))
        return Tensor(algebra, axes, algebra.apply(head, (), [algebra.index(v) for v in axes]))


@node
class Full(Expr):
    """A constant tensor.

    Attributes:
      value: the value; it is rounded to the element type.
      type: the type of the tensor.
    """

    syntax = "full({value} : {type})"
    rearranges = True
    value: float
    type: TensorType

    def _infer(self) -> TensorType:
        check_type(self, self.type)
        check_finite(self, "the value", self.value)
        low, high = self.type.dtype.limits
        if self.type.dtype.kind != "float" and not self.value.is_integer():
            raise self.error(f"{self.type.dtype} cannot hold fractions", found=str(self.value))
        if not low <= self.value <= high:
            raise self.error(
                f"{self.type.dtype} cannot hold the value",
                expected=f"{low} to {high}",
                found=str(self.value),
            )
        return self.type

    def _term(self, algebra: Algebra, *operands: Tensor) -> Tensor:
        axes = self.axes_in(algebra)
        stored = float(np.asarray(self.value).astype(self.type.dtype.numpy))
        is_rounded = stored != self.value and self.type.dtype not in (F32, F64)
        if is_rounded or self.value.hex() == (-0.0).hex():
            # Rounding to a narrow type has one place, `moecc.weights.arithmetic`.
            head = Head("constant", (self.value, str(self.type.dtype)))
            return Tensor(algebra, axes, algebra.apply(head))
        return Tensor(algebra, axes, algebra.number(self.value if algebra.fractions else stored))


def check_type(expr: Expr, type: TensorType) -> None:
    """Check that a leaf's `type` has fixed sizes, distinct names, and no mesh axes.

    Raises:
      InputError: it does not.
    """
    if (problem := _problem_of(type)) is not None:
        raise expr.error(problem[0], found=problem[1])


@functools.lru_cache(maxsize=4096)  # A hundred thousand experts share a type.
def _problem_of(type: TensorType) -> tuple[str, str | None] | None:
    if type.dtype.kind == "key":
        return "a weight cannot be a random key", None
    if type.unreduced or any(a.mesh for a in type.axes):
        return "a weight expression has no mesh axes", str(type)
    for axis in type.axes:
        if not _NAME.fullmatch(axis.name):
            return "not a valid axis name", repr(printable(axis.name, 40))
        if not isinstance(axis.size, int) or axis.size < 0:
            return f"axis {axis.name!r} has no fixed size", str(axis.size)
    if len(set(type.names)) != len(type.names):
        return "two axes have the same name", str(type)
    return None


def check_name(expr: Expr, name: str) -> None:
    """Check that `name` is a valid axis name. Raises: InputError."""
    if not _NAME.fullmatch(name):
        raise expr.error("not a valid axis name", found=repr(printable(name, 40)))


def check_finite(expr: Expr, name: str, value: float) -> None:
    """Check that a number of `expr` is finite. Raises: InputError."""
    if not math.isfinite(value):
        raise expr.error(f"{name} is not finite", found=str(value))


def computed_dtype(expr: Expr, *operands: Expr) -> DType:
    """Return the type of arithmetic on `operands`: f32, or f64 if one is f64.

    Raises:
      InputError: an operand is not floating-point.
    """
    for x in operands:
        if not x.type.dtype.is_float:
            raise expr.error("arithmetic needs floats", found=str(x.type))
    return F64 if any(x.type.dtype is F64 for x in operands) else F32


def axis_of(expr: Expr, x: Expr, name: str) -> int:
    """Return the position of axis `name` of `x`. Raises: InputError if there is none."""
    try:
        return x.type.names.index(name)
    except ValueError:
        raise expr.error(
            f"the operand has no axis {printable(name)!r}", found=str(x.type)
        ) from None


def sources(expr: Expr) -> tuple[Source, ...]:
    """Return the checkpoint tensors that `expr` reads, without duplicates, in order."""
    return tuple(x for x in walk(expr) if isinstance(x, Source))


def source_types(exprs: Iterable[Expr]) -> dict[str, TensorType]:
    """Return the types of the checkpoint tensors that expressions read, by name."""
    return {source.name: source.type for expr in exprs for source in sources(expr)}


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield the distinct nodes of `expr`, each after its operands."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(expr, False)]
    while stack:
        x, done = stack.pop()
        if done:
            yield x
        elif x not in seen:
            seen.add(x)
            stack.append((x, True))
            stack.extend((y, False) for y in reversed(x.operands))


def transform(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """Return `expr` with `change` applied to each node, operands first.

    Args:
      expr: the expression to transform.
      change: receives a node whose operands are transformed; returns it, or a replacement.
    """
    changed: dict[Expr, Expr] = {}
    for x in walk(expr):
        changed[x] = change(x.with_operands(*(changed[y] for y in x.operands)))
    return changed[expr]


# Boxes: a range of each axis of a type, and mappings between them.

Box = tuple[tuple[int, int], ...]
"""A range [start, stop) for each axis, in order."""


def whole(type: TensorType) -> Box:
    """Return the box of all elements."""
    return tuple((0, size) for size in type.shape)


def extents(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(stop - start for start, stop in box)


def project(box: Box, large: TensorType, small: TensorType) -> Box:
    """Return the box of `small`, whose axes are among those of `large`, within a box of `large`."""
    by_name = dict(zip(large.names, box, strict=True))
    return tuple(by_name[name] for name in small.names)


def align(values: Array, names: tuple[str, ...], order: tuple[str, ...]) -> Array:
    """Return `values`, whose axes are `names`, with the axes `order`, new ones of size 1."""
    axes = [names.index(name) for name in order if name in names]
    absent = tuple(at for at, name in enumerate(order) if name not in names)
    return np.expand_dims(values.transpose(axes), absent)


def flat_boxes(sizes: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return boxes that together hold elements [start, stop), counted in row-major order."""
    if start == stop:
        return [((0, 0), *((0, size) for size in sizes[1:]))]
    if len(sizes) == 1:
        return [((start, stop),)]
    inner = prod(sizes[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        offset = first * inner
        inside = flat_boxes(sizes[1:], start - offset, stop - offset)
        return [((first, first + 1), *box) for box in inside]
    boxes: list[Box] = []
    if start % inner:
        boxes += flat_boxes(sizes, start, (first + 1) * inner)
        first += 1
    end = stop // inner
    if first < end:
        boxes.append(((first, end), *((0, size) for size in sizes[1:])))
    if stop % inner:
        boxes += flat_boxes(sizes, end * inner, stop)
    return boxes


def row_blocks(type: TensorType, block_bytes: int) -> Iterator[Box]:
    """Yield boxes, contiguous and in row-major order, of at most about `block_bytes` each.

    A block has at least one element.
    """
    sizes = type.shape
    limit = max(1, block_bytes // type.dtype.itemsize_bytes)
    if prod(sizes) <= limit:
        yield whole(type)
        return
    # The axis to cut: everything within one of its positions fits.
    at = next(i for i in range(len(sizes)) if prod(sizes[i + 1 :]) <= limit)
    step = max(1, limit // prod(sizes[at + 1 :]))
    inner = tuple((0, size) for size in sizes[at + 1 :])
    for position in product(*map(range, sizes[:at])):
        for start in range(0, sizes[at], step):
            ends = (start, min(start + step, sizes[at]))
            yield (*((i, i + 1) for i in position), ends, *inner)


def runs(order: Array) -> Iterator[tuple[int, int, Array]]:
    """Yield the runs [start, stop) of consecutive positions in `order`, and where each is put."""
    places = np.argsort(order, kind="stable")
    positions = order[places]
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for part, into in zip(np.split(positions, breaks), np.split(places, breaks), strict=True):
        yield int(part[0]), int(part[-1]) + 1, into
