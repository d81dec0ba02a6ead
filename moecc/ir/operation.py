"""The operation table: one row an operation, from which everything else is derived.

An operation is declared in one place (`moecc.ir.ops`): a class `Op` with its attributes, its typing
and its meaning in NumPy, registered with its traits.  Its row, an `OpDef`, states how result types
are inferred from the operands (`infer`), which axes the operation *mixes* (an element of the result
needs other elements along them), in which operands it is linear, and its further traits
(`moecc.ir.traits`).  Lifting over an expert axis, raggedness, sharding, unreduced sums, the finding
of FFN blocks, scaling, shrinking and the planner all read these, and none of them knows an
operation by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import getsourcefile, getsourcelines
from math import inf, isfinite, isinf
from types import ModuleType
from typing import Any, ClassVar, Generic, NoReturn, Self, TypeVar, overload

from moecc.errors import (
    InputError,
    MoeccError,
    OwnOperationError,
    Problem,
    describe_error,
    nearest,
    or_own,
    raise_problems,
)
from moecc.ir.arrays import Array
from moecc.ir.mesh import Rule, propagate_sharding
from moecc.ir.operand import Attrs as Attrs
from moecc.ir.operand import Definition, Operand, Region
from moecc.ir.traits import (
    NOTHING,
    CollectiveKind,
    Cost,
    Domain,
    Homogeneity,
    IndexOperand,
    LocalRule,
    Residual,
    Role,
    RowMove,
    SizeRule,
)
from moecc.support.lazy import np
from moecc.support.user_files import is_own, last_line_in
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra
from moecc.types import Size, TensorType, is_name, is_size, is_whole

T = TypeVar("T")
W = TypeVar("W", bound=str)
D = TypeVar("D", bound="type[Op]")
REQUIRED: Any = object()
"""Marks an attribute without a default."""


@dataclass(eq=False)
class Attr(Generic[T]):
    """An attribute of an operation, declared in its class; of an instance it is the value.

    Attributes:
      kind: the kind of its values, as the documentation names it.
      expected: what a message expects of a value.
      doc: its meaning, in half a line.
      default: its value where the text omits it, or REQUIRED.
      choices: the only values allowed, for a word, or the only words, for words.
      shrinks: whether the number is a size, or a bound within one, that shrinking a graph reduces.
      pins: whether the size it states, or the size of the axis it names, is kept when a graph is
        shrunk.
    """

    kind: ClassVar[str]
    expected: ClassVar[str]

    doc: str
    default: T = REQUIRED
    choices: tuple[str, ...] = ()
    shrinks: bool = False
    pins: bool = False

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: Op, owner: type) -> T: ...
    def __get__(self, instance: Op | None, owner: type) -> Self | T:
        if instance is None:
            return self
        value: T = instance.attrs[self.name]
        return value

    def __set__(self, instance: Op, value: NoReturn) -> None:
        raise TypeError("an instance is for reading; attributes are set in node.attrs")

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is of the kind."""
        raise NotImplementedError

    def normalised(self, value: Any) -> object:
        """Return a value that fits, as graphs store it."""
        return value

    def mismatch(self, value: object) -> str | None:
        """Return what was expected of `value`, or None if it is valid."""
        if not self.fits(value):
            return self.expected
        if self.choices and isinstance(value, tuple) and not set(value) <= set(self.choices):
            return f"words among {', '.join(self.choices)}"
        if self.choices and self.kind == "str" and value not in self.choices:
            return f"one of {', '.join(self.choices)}"
        return None


class Int(Attr[int]):
    """A whole number."""

    kind, expected = "int", "a whole number"
    fits = staticmethod(is_whole)


class Float(Attr[float]):
    """A number, which may be infinite."""

    kind, expected = "float", "a number"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a number, and not NaN."""
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value

    def normalised(self, value: Any) -> float:
        """Return a float; −0.0 equals 0.0, so graphs that differ in it alone would be equal."""
        return float(value) + 0.0


class Bool(Attr[bool]):
    """True or false."""

    kind, expected = "bool", "true or false"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a truth value."""
        return isinstance(value, bool)


class Word(Attr[W]):
    """A word, or a text."""

    kind, expected = "str", "a word"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a text."""
        return isinstance(value, str)


class AxisName(Attr[str]):
    """The name of an axis."""

    kind, expected = "axis", "the name of an axis"
    fits = staticmethod(is_name)


class Words(Attr[tuple[str, ...]]):
    """Different words."""

    kind, expected = "words", "words in parentheses"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a tuple of different names."""
        if not isinstance(value, tuple) or not all(map(is_name, value)):
            return False
        return len(set(value)) == len(value)


class AxisNames(Words):
    """The names of different axes."""

    kind, expected = "axes", "names of axes in parentheses, each once"


class Numbers(Attr[tuple[float, ...]]):
    """Finite numbers."""

    kind, expected = "numbers", "finite numbers in parentheses"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a tuple of finite numbers."""
        return isinstance(value, tuple) and all(Float.fits(v) and isfinite(v) for v in value)

    def normalised(self, value: Any) -> tuple[float, ...]:
        """Return floats, without −0.0."""
        return tuple(float(v) + 0.0 for v in value)


class AxisSizes(Attr[tuple[tuple[str, Size], ...]]):
    """Axes with their sizes."""

    kind, expected = "sizes", "axes with sizes, (head=9, head_dim=64)"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a tuple of pairs of a name and a size."""
        return isinstance(value, tuple) and all(
            isinstance(p, tuple) and len(p) == 2 and is_name(p[0]) and is_size(p[1]) for p in value
        )


class Body(Attr[Any]):
    """A graph, printed in braces after the line."""

    kind, expected = "region", "a graph, in braces after the line"

    @staticmethod
    def fits(value: object) -> bool:
        """Return whether `value` is a graph."""
        return isinstance(value, Region)


Types = TensorType | tuple[TensorType, ...]
Results = Array | tuple[Array, ...]
Infer = Callable[[Sequence[Operand], Attrs], Types]
Mixes = Callable[[Sequence[Operand], Attrs], tuple[str, ...]]
Meaning = Callable[[Sequence[Array], Attrs], Results]
"""The results of an operation for the arrays of its operands: what it means, in float64."""
TermMeaning = Callable[[Algebra, Sequence[Tensor], Attrs], Tensor | tuple[Tensor, ...]]
"""The results of an operation for the terms of its operands: what it means, in index notation."""


_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*\Z")
_WORDS = ("true", "false", "inf", "nan")


def format_word(text: str) -> str:
    """Return `text` bare where it reads back as a word, and quoted otherwise."""
    if _BARE.match(text) and text not in _WORDS:
        return text
    return json.dumps(text)


def format_number(value: float) -> str:
    """Return the shortest text that reads back as `value`."""
    if isinf(value):
        return "-inf" if value < 0 else "inf"
    return repr(value)


def format_attr(spec: Attr[Any], value: Any) -> str:
    """Return the text of an attribute's value."""
    if spec.kind == "bool":
        return "true" if value else "false"
    if spec.kind == "float":
        return format_number(value)
    if spec.kind in ("str", "axis"):
        return format_word(value)
    if spec.kind in ("axes", "words"):
        return str(value[0]) if len(value) == 1 else f"({', '.join(value)})"
    if spec.kind == "sizes":
        return f"({', '.join(f'{n}={s}' for n, s in value)})"
    return str(value)


class Op:
    """The class of an operation: its attributes, its typing and its meaning; a base class.

    A class attribute that is an `Attr` is an attribute of the operation.  An instance reads the
    attributes of a node, typed: ``ContractOp.of_node(node).over`` is a tuple of names.

    Attributes:
      attrs: the complete attributes.
    """

    def __init__(self, attrs: Attrs) -> None:
        self.attrs = attrs

    @classmethod
    def of_node(cls, node: Definition) -> Self:
        """Return the attributes of `node`.

        Raises:
          TypeError: it is an operation of another class.
        """
        declared = op(node.op.name).declared
        if declared is None or not issubclass(declared, cls):
            raise TypeError(f"{node.op.name} has not the attributes of {cls.__name__}")
        return cls(node.attrs)

    def written(self, *but: str) -> tuple[str, ...]:
        """Return the attributes but for some as texts of graphs have them: without defaults."""
        table = {name: getattr(type(self), name) for name in self.attrs if name not in but}
        return tuple(
            f"{name}={format_attr(spec, self.attrs[name])}"
            for name, spec in table.items()
            if self.attrs[name] != spec.default
        )

    infer: Any
    """Types of the results from the operands; raises InputError."""

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        """Return the operand axes that it mixes: none if it works element by element."""
        return ()

    meaning: Any = None
    """The results from the arrays of the operands, in float64."""

    term: Any = None
    """The results in index notation, from an algebra and the terms of the operands."""


def mixes_none(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    """Return no axes: the operation works element by element."""
    return ()


def mixes_all(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    """Return all axes: nothing is known of the operation, one of the user's own."""
    return tuple(dict.fromkeys(name for v in operands for name in v.type.names))


@dataclass(frozen=True, eq=False)
class OpDef:
    """A row of the operation table.

    Attributes:
      name: the name in the text format.
      doc: what the operation computes; the first line is the summary in ``docs/ir.md``.
      operands: the names of the operands; with `variadic`, of the mandatory ones.
      infer: result types from operands and attributes; raises InputError.
      meaning: what it computes, in NumPy and float64; None: the reference backend cannot run it.
      term: what it computes, in index notation, for proofs; None: an uninterpreted function.
      rearranges: whether it only moves elements, so that its term is exact for any elements.
      declared: the class that declares it, if one does.
      attrs: the attributes by name, in printing order.
      results: hints for the names of the results.
      mixes: the operand axes that the operation mixes.
      linear: positions of the operands in which it is linear, the others held fixed.
      jointly: whether it is linear only in all of `linear` together, as a sum is.
      commutative: whether the operands may be exchanged.
      variadic: whether more operands may follow.
      places: whether `infer` also infers the sharding of the results, as for collectives.
      elementwise: whether an element of the result is a function of one element of each operand.
      logical: whether operands or results are booleans.
      alias: whether the result is a view of the first operand, recomputed from it at no cost.
      blocks_gradient: whether the result is the first operand and no gradient flows through it.
      residual: the values that its derivative reads and a gradient therefore keeps.
      homogeneous: the effect of factors on operands, where `linear` does not imply it.
      normalises: whether a row along the mixed axis becomes independent of its magnitude.
      domain: where it is defined.
      collective: for an operation that changes only sharding, its kind.
      sharding: the dimensions by which it can be sharded; without a rule all operands are whole.
      local: the attributes with which one device runs it, where they differ.
      sizes: constraints between its sizes besides equality.
      index: the operand whose integers are indices.
      chooses: whether it chooses experts by the scores in its first operand.
      assigns_slots: whether its last result holds the slot of each choice.
      moves: whether it moves tokens to the slots of experts, or back.
      attends: whether it averages rows of the third operand, by weights from the first two.
      recurs: whether it reads a state that it changes from place to place.
      roles: the role of a parameter in each operand; operands not listed expect no parameter.
      opaque: whether only another program can compute it, so that no backend runs it.
    """

    name: str
    doc: str
    operands: tuple[str, ...]
    infer: Infer
    meaning: Meaning | None = None
    term: TermMeaning | None = None
    rearranges: bool = False
    declared: type[Op] | None = None
    attrs: Mapping[str, Attr[Any]] = field(default_factory=dict)
    results: tuple[str, ...] = ("v",)
    mixes: Mixes = mixes_none
    linear: tuple[int, ...] = ()
    jointly: bool = False
    commutative: bool = False
    variadic: bool = False
    places: bool = False
    elementwise: bool = False
    logical: bool = False
    alias: bool = False
    blocks_gradient: bool = False
    residual: Residual = NOTHING
    homogeneous: Homogeneity | None = None
    normalises: bool = False
    domain: Domain = Domain.REAL
    collective: CollectiveKind | None = None
    sharding: Rule | None = None
    local: LocalRule | None = None
    sizes: SizeRule | None = None
    index: IndexOperand | None = None
    chooses: bool = False
    assigns_slots: bool = False
    moves: RowMove | None = None
    attends: bool = False
    recurs: bool = False
    roles: tuple[Role, ...] = ()
    opaque: bool = False

    @cached_property
    def source(self) -> str | None:
        """File and line of an operation of the user's own; None for one of moecc's."""
        code = self.declared or self.infer
        if not is_own(code.__module__):
            return None
        try:
            return f"{getsourcefile(code)}:{getsourcelines(code)[1]}"
        except (OSError, TypeError):  # declared in an interactive session
            return code.__module__

    @contextmanager
    def blamed(self, part: str) -> Iterator[None]:
        """Turn an unexpected exception of a user's operation into an error with its line."""
        try:
            yield
        except (MoeccError, MemoryError):
            raise
        except Exception as error:
            if self.source is None:
                raise
            module = (self.declared or self.infer).__module__
            line = last_line_in(module, error) or self.source
            raise OwnOperationError(
                f"the {part} of {self.name} fails at {line}: {describe_error(error)}"
            ) from error

    @property
    def liftable(self) -> bool:
        """Whether it may be used inside an expert: an expert axis passes through it unchanged."""
        return self.elementwise and not self.logical and not self.variadic

    @property
    def has_body(self) -> bool:
        """Whether it repeats a graph, which says how many results it has."""
        return any(isinstance(spec, Body) for spec in self.attrs.values())

    @property
    def carries(self) -> bool:
        """Whether the result has the elements of the first operand: a parameter stays one."""
        return self.alias or self.blocks_gradient

    @property
    def gradient_in_place(self) -> bool:
        """Whether the gradient reuses the buffer of the result's gradient, as on a TPU.

        Activations, products and masks do so.  Operations not defined everywhere (a quotient, a
        root) and selections between operands were observed to allocate an array of their own.
        """
        chooses, everywhere = self.homogeneity.alike, self.domain is not Domain.POSITIVE
        return self.elementwise and bool(self.residual) and everywhere and not chooses

    @property
    def fusable(self) -> bool:
        """Whether XLA on a TPU fuses it into the product that reads its result."""
        return self.gradient_in_place or self.normalises

    @property
    def cost(self) -> Cost:
        """Its cost class: products, look-ups, norms and row moves use memory, others fuse."""
        if self.attends:
            return Cost.ATTENTION
        if self.recurs:
            return Cost.RECURRENCE
        if self.moves is not None or self.normalises:
            return Cost.READ_WRITE
        if self.index is not None and self.linear:
            return Cost.LOOK_UP
        multiplies = self.linear == (0, 1) and not self.jointly and not self.elementwise
        return Cost.PRODUCT if multiplies else Cost.FUSED

    @property
    def is_product(self) -> bool:
        """Whether it multiplies and sums, as a matrix product does."""
        return self.cost is Cost.PRODUCT

    @property
    def products(self) -> int:
        """How many products of matrices it is."""
        return self.cost.products

    @property
    def is_sum(self) -> bool:
        """Whether it adds operands element by element."""
        return self.elementwise and self.jointly and self.commutative

    @property
    def is_scaling(self) -> bool:
        """Whether it multiplies operands element by element."""
        return self.elementwise and self.linear == (0, 1) and not self.jointly

    @property
    def is_weighting(self) -> bool:
        """Whether it multiplies rows by a number each: a gradient multiplies them again."""
        return self.is_scaling and not self.commutative

    @property
    def routes(self) -> bool:
        """Whether tokens choose their experts by it."""
        return self.chooses and not self.assigns_slots

    @property
    def is_distribution(self) -> bool:
        """Whether it turns scores into shares of a whole."""
        return self.normalises and not self.is_norm

    @property
    def is_norm(self) -> bool:
        """Whether it normalises with parameters, as layers do."""
        return self.normalises and Role.GAIN in self.roles

    @property
    def homogeneity(self) -> Homogeneity:
        """The effect of positive factors on the operands; a linear operation has degree 1."""
        if self.homogeneous is not None:
            return self.homogeneous
        count = len(self.operands)
        return Homogeneity(
            tuple(1.0 if i in self.linear else None for i in range(count)), self.jointly
        )

    def role(self, operand: int) -> Role:
        """Return the role of a parameter as operand number `operand`."""
        return self.roles[operand] if operand < len(self.roles) else Role.VALUE

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], OpDef], tuple[str]]:
        # Table entries are compared by identity, so a copied graph must find the same one.
        return op, (self.name,)

    def complete(self, attrs: Attrs) -> dict[str, object]:
        """Return `attrs` checked against the table and completed with the defaults.

        Raises:
          InputError: an attribute is unknown, missing, or of the wrong kind.
        """
        if not attrs and not self.attrs:
            return {}
        problems = [self._unknown(name) for name in attrs if name not in self.attrs]
        full: dict[str, object] = {}
        for name, spec in self.attrs.items():
            value = attrs.get(name, spec.default)
            if value is REQUIRED:
                problems.append(Problem(f"{self.name} needs the attribute {name!r}"))
            elif value is spec.default:
                full[name] = value
            elif (expected := spec.mismatch(value)) is None:
                full[name] = spec.normalised(value)
            else:
                message = f"attribute {name!r} of {self.name} is wrong"
                problems.append(Problem(message, expected=expected, found=repr(value)))
        raise_problems(problems)
        return full

    def result_types(self, operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
        """Return the types of the results, as `infer` returns them, with their sharding.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        with self.blamed("type rule"):
            types = self.infer(operands, attrs)
        if not isinstance(types, tuple):
            types = (types,)
        if wrong := [t for t in types if not isinstance(t, TensorType)]:
            raise OwnOperationError(
                f"the type rule of {self.name} returns no type",
                expected="a TensorType, or a tuple of them",
                found=repr(wrong[0]),
                hint=f"mend infer in {self.source}",
            )
        if self.elementwise and self.source is not None:
            self._check_axes(operands, types)
        if self.places or not any(v.type.is_sharded for v in operands):
            return types
        return propagate_sharding(self, operands, attrs, types)

    def _check_axes(self, operands: Sequence[Operand], types: Sequence[TensorType]) -> None:
        """Raise OwnOperationError unless each result has the axes of all operands, and no others.

        It is sampled, too, but only of an operation with a meaning.
        """
        axes = {(a.name, a.size) for v in operands for a in v.type.axes}
        for wrong in (t for t in types if {(a.name, a.size) for a in t.axes} != axes):
            raise OwnOperationError(
                f"{self.name} declares elementwise, which its type rule refutes",
                expected=f"a result with the axes {', '.join(f'{n}={s}' for n, s in sorted(axes))}",
                found=str(wrong),
                hint=f"leave elementwise out, or mend infer in {self.source}",
            )

    def _unknown(self, name: str) -> Problem:
        hint = nearest(name, self.attrs) or f"attributes: {', '.join(self.attrs) or 'none'}"
        return Problem(f"{self.name} has no attribute {name!r}", hint=hint)

    def evaluate(self, arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
        """Return the arrays of the results, as `meaning` defines them.

        Raises:
          InputError: the operation has no meaning, or none for these data.
        """
        if self.meaning is None:
            raise InputError(f"{self.name} has no meaning in NumPy")
        with self.blamed("meaning"):
            results = self.meaning(arrays, attrs)
        if not isinstance(results, tuple):
            results = (results,)
        if wrong := [a for a in results if not isinstance(a, Array)]:
            raise OwnOperationError(
                f"the meaning of {self.name} returns no array with named axes",
                expected="a moecc.ir.arrays.Array, or a tuple of them",
                found=type(wrong[0]).__name__,
                hint=f"mend meaning in {self.source}",
            )
        return results

    def keeps_hidden(self, attrs: Attrs) -> bool:
        """Return whether −∞, which hides a score, stays −∞; of the user's operations unknown."""
        if not self.carries or self.source is not None:
            return False
        if not self.elementwise:
            return True
        with np.errstate(invalid="ignore"):
            (result,) = self.evaluate([Array(np.array(-inf), ())], attrs)
        return bool(result.data == -inf)

    def check_arity(self, count: int) -> None:
        """Raise InputError unless the operation accepts `count` operands."""
        enough = count >= len(self.operands) if self.variadic else count == len(self.operands)
        if not enough:
            names = ", ".join(self.operands) + (", …" if self.variadic else "")
            raise InputError(
                f"{self.name} takes other operands",
                expected=f"{len(self.operands)} ({names})",
                found=str(count),
            )


OPS: dict[str, OpDef] = {}


RENAMED = {"place": "assign_slots"}
"""Former names of operations, for messages about graphs that were written before."""


_RESERVED = (
    "collective", "assigns_slots", "moves", "chooses", "attends", "recurs", "opaque",
)  # fmt: skip
"""Traits whose readers know the classes of moecc's operations that have them."""


def register(entry: OpDef) -> OpDef:
    """Add `entry` to the table; a duplicate name is a bug of the caller.

    Raises:
      TypeError: an operation of the user's own has a trait that only moecc's may have.
    """
    reserved = [trait for trait in _RESERVED if getattr(entry, trait)]
    if reserved and entry.source is not None:
        raise TypeError(
            f"the operation {entry.name!r} has a trait of moecc's own operations alone: "
            f"leave out {', '.join(reserved)}"
        )
    if entry.name in OPS:
        first = OPS[entry.name].source
        message = f"operation {entry.name!r} is defined twice"
        if first is None or first != entry.source:
            raise ValueError(f"{message}, the first time in {first or 'moecc'}")
        file = first.rpartition(":")[0]
        raise ValueError(
            f"{message}, since {file} is loaded and imported: leave out --load {file} or the import"
        )
    OPS[entry.name] = entry
    return entry


def operation(name: str, operands: str = "", **traits: Any) -> Callable[[D], D]:
    """Register a class as the operation `name`, whose docstring says what it computes.

    Args:
      name: the name in the text format.
      operands: the names of the operands, separated by spaces.
      traits: further columns of the row.

    Raises:
      TypeError: the class is no `Op` or has no `infer`, or a trait is unknown or of another kind.
    """

    def declare(declared: D) -> D:
        _check_declaration(name, operands, declared, traits)
        # Texts print attributes in this order: one declared again stays where it was.
        attrs: dict[str, Attr[Any]] = {}
        for cls in reversed(declared.__mro__):
            for key, member in vars(cls).items():
                if isinstance(member, Attr):
                    attrs[key] = member
                else:
                    attrs.pop(key, None)
        columns: dict[str, Any] = {
            "doc": declared.__doc__,
            "infer": lambda values, attrs: declared(attrs).infer(*values),
            "declared": declared,
            "attrs": attrs,
        }
        if declared.mixes is not Op.mixes:
            columns["mixes"] = lambda values, attrs: _names(declared(attrs).mixes(*values))
        elif is_own(declared.__module__) and not traits.get("elementwise"):
            columns["mixes"] = mixes_all
        if declared.meaning is not None:
            columns["meaning"] = lambda arrays, attrs: declared(attrs).meaning(*arrays)
        if declared.term is not None:
            columns["term"] = lambda algebra, terms, attrs: declared(attrs).term(algebra, *terms)
        register(OpDef(name, operands=tuple(operands.split()), **columns | traits))
        return declared

    return declare


def _names(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return names of axes; one alone is easily written without a comma."""
    return (axes,) if isinstance(axes, str) else axes


def _check_declaration(
    name: str, operands: str, declared: type[object], traits: Mapping[str, object]
) -> None:
    """Raise TypeError for what cannot be a row of the table."""
    if not issubclass(declared, Op):
        raise TypeError(f"{declared.__name__} of the operation {name!r} is no subclass of Op")
    if not hasattr(declared, "infer"):
        raise TypeError(f"the operation {name!r} has no type rule: def infer(self, …)")
    if not isinstance(operands, str):
        raise TypeError(f"the operands of {name!r} are no text such as 'x y': {operands!r}")
    for trait in traits.keys() - OpDef.__dataclass_fields__.keys():
        hint = nearest(trait, OpDef.__dataclass_fields__) or "docs/ir.md lists them"
        raise TypeError(f"the operation {name!r} has no trait {trait!r}; {hint}")
    linear, count = traits.get("linear", ()), len(operands.split())
    if traits.get("elementwise") and not count:
        raise TypeError(f"the operation {name!r} is elementwise, but has no operands")
    if traits.get("elementwise") and ("mixes" in traits or declared.mixes is not Op.mixes):
        raise TypeError(f"the operation {name!r} is elementwise, but has mixes")
    if not isinstance(linear, tuple) or not set(linear) <= set(range(count)):
        raise TypeError(
            f"linear of {name!r} has the positions of operands, (0,) of the first: {linear!r}"
        )


def has_operations(module: ModuleType) -> bool:
    """Return whether a module declares operations itself."""
    return any(
        isinstance(item, type) and issubclass(item, Op) and item.__module__ == module.__name__
        for item in vars(module).values()
    )


def op(name: str) -> OpDef:
    """Return the row `name` of the table.

    Raises:
      InputError: there is no such operation; the nearest name is suggested.
    """
    entry = OPS.get(name)
    if entry is None:
        now = RENAMED.get(name)
        hint = nearest(name, OPS) if now is None else f"`{name}` is now `{now}`"
        raise InputError(f"unknown operation {name!r}", hint=or_own(hint))
    return entry
