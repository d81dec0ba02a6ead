"""The operation table: one row an operation, from which everything else is derived.

A row states how result types are inferred from the operands (`infer`), which axes the
operation *mixes* (an element of the result needs other elements along them), in which operands it
is linear, and its further traits (`moecc.ir.traits`).  Lifting over an expert axis, raggedness,
sharding, unreduced sums, the finding of FFN blocks, scaling, shrinking and the planner all read
these, and none of them knows an operation by name.  The reference backend defines the meaning of
each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import ClassVar, NoReturn, Self, dataclass_transform

from moecc.errors import InputError, Problem, nearest
from moecc.ir.operand import Attrs as Attrs
from moecc.ir.operand import Definition, Operand, Region
from moecc.ir.sharding_rules import Rule, propagate_sharding
from moecc.ir.traits import (
    NOTHING,
    Collective,
    Cost,
    Domain,
    Homogeneity,
    Index,
    LocalRule,
    Residual,
    Role,
    RowMove,
    SizeRule,
)
from moecc.types import Size, TensorType, is_name, is_size, is_whole

REQUIRED = object()
"""Marks an attribute without a default."""


@dataclass(frozen=True)
class Attr:
    """An attribute of an operation.

    Attributes:
      kind: ``int``, ``float``, ``bool``, ``str``, ``words`` (a tuple of words), ``axis`` (a name),
        ``axes`` (a tuple of names), ``sizes`` (a tuple of (name, size) pairs), ``numbers`` (a
        tuple of numbers) or ``region`` (a graph, printed in braces after the line).
      default: its value where the text omits it, or REQUIRED.
      choices: the only values allowed, for ``str``, or the only words, for ``words``.
      doc: its meaning, in half a line.
      shrinks: whether the number is a size, or a bound within one, that shrinking a graph reduces.
      pins: whether the size it states, or the size of the axis it names, is kept when a graph is
        shrunk.
    """

    kind: str
    default: object = REQUIRED
    choices: tuple[str, ...] = ()
    doc: str = ""
    shrinks: bool = False
    pins: bool = False


Infer = Callable[[Sequence[Operand], Attrs], tuple[TensorType, ...]]
Mixes = Callable[[Sequence[Operand], Attrs], tuple[str, ...]]


def mixes_none(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    """Return no axes: the operation works element by element."""
    return ()


@dataclass(frozen=True, eq=False)
class OpDef:
    """A row of the operation table.

    Attributes:
      name: the name in the text format.
      doc: what the operation computes; the first line is the summary in ``docs/ir.md``.
      operands: the names of the operands; with `variadic`, of the mandatory ones.
      infer: result types from operands and attributes; raises InputError.
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
      roles: the role of a parameter in each operand; operands not listed expect no parameter.
      opaque: whether only another program can compute it, so that no backend runs it.
    """

    name: str
    doc: str
    operands: tuple[str, ...]
    infer: Infer
    attrs: Mapping[str, Attr] = field(default_factory=dict)
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
    collective: Collective | None = None
    sharding: Rule | None = None
    local: LocalRule | None = None
    sizes: SizeRule | None = None
    index: Index | None = None
    chooses: bool = False
    assigns_slots: bool = False
    moves: RowMove | None = None
    attends: bool = False
    roles: tuple[Role, ...] = ()
    opaque: bool = False

    @property
    def liftable(self) -> bool:
        """Whether it may be used inside an expert: an expert axis passes through it unchanged."""
        return self.elementwise and not self.logical and not self.variadic

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
                continue
            full[name] = value
            if value is not spec.default:
                reason = _mismatch(spec, value)
                if reason is None and spec.kind == "float":
                    # −0.0 equals 0.0, so graphs that differ in it alone would be equal.
                    full[name] = float(value) + 0.0
                elif reason is None and spec.kind == "numbers":
                    full[name] = tuple(float(v) + 0.0 for v in value)
                elif reason is not None:
                    what = f"attribute {name!r} of {self.name} is wrong"
                    problems.append(Problem(what, expected=reason, found=repr(value)))
        if problems:
            raise InputError(problems)
        return full

    def result_types(self, operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
        """Return the types of the results, as `infer` returns them, with their sharding.

        Raises:
          InputError: operands or attributes are invalid for the operation.
        """
        types = self.infer(operands, attrs)
        if self.places or not any(v.type.is_sharded for v in operands):
            return types
        return propagate_sharding(self, operands, attrs, types)

    def _unknown(self, name: str) -> Problem:
        hint = nearest(name, self.attrs) or f"attributes: {', '.join(self.attrs) or 'none'}"
        return Problem(f"{self.name} has no attribute {name!r}", hint=hint)

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


def _is_pairs(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(p, tuple) and len(p) == 2 and is_name(p[0]) and is_size(p[1]) for p in value
    )


def _is_words(value: object) -> bool:
    return isinstance(value, tuple) and all(map(is_name, value)) and len(set(value)) == len(value)


def _is_numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and isfinite(v) for v in value
    )


def _is_graph(value: object) -> bool:
    return isinstance(value, Region)


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "int": ("a whole number", is_whole),
    "float": (
        "a number",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v == v,
    ),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a word", lambda v: isinstance(v, str)),
    "axis": ("the name of an axis", is_name),
    "axes": (
        "names of axes in parentheses, each once",
        lambda v: isinstance(v, tuple) and all(map(is_name, v)) and len(set(v)) == len(v),
    ),
    "words": ("words in parentheses", _is_words),
    "numbers": ("finite numbers in parentheses", _is_numbers),
    "region": ("a graph, in braces after the line", _is_graph),
    "sizes": ("axes with sizes, (head=9, head_dim=64)", _is_pairs),
}


def _mismatch(spec: Attr, value: object) -> str | None:
    """Return what was expected of `value`, or None if it is valid."""
    expected, fits = _KINDS[spec.kind]
    if not fits(value):
        return expected
    if spec.choices and isinstance(value, tuple) and not set(value) <= set(spec.choices):
        return f"words among {', '.join(spec.choices)}"
    if spec.choices and spec.kind == "str" and value not in spec.choices:
        return f"one of {', '.join(spec.choices)}"
    return None


OPS: dict[str, OpDef] = {}


RENAMED = {"place": "assign_slots"}
"""Former names of operations, for messages about graphs that were written before."""


def register(entry: OpDef) -> OpDef:
    """Add `entry` to the table; a duplicate name is a bug of the caller."""
    if entry.name in OPS:
        raise ValueError(f"operation {entry.name!r} is defined twice")
    OPS[entry.name] = entry
    return entry


def op(name: str) -> OpDef:
    """Return the row `name` of the table.

    Raises:
      InputError: there is no such operation; the nearest name is suggested.
    """
    entry = OPS.get(name)
    if entry is None:
        now = RENAMED.get(name)
        hint = nearest(name, OPS) if now is None else f"`{name}` is now `{now}`"
        raise InputError(f"unknown operation {name!r}", hint=hint)
    return entry


# Typed views of the attributes of a node; `moecc.ir.attributes` has one for each operation.
#
#     ContractAttrs.of_node(node).over
#
# is a tuple of names to mypy, where ``node.attrs["over"]`` could be anything.

Names = str | tuple[str, ...]
"""Names of axes, or words; a single one needs no parentheses."""

Sizes = tuple[tuple[str, Size], ...]
"""Axes with their sizes."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class View:
    """The attributes of a node as they were when it was looked at; a base class.

    A checker reads the annotations of a subclass as the fields of a frozen dataclass.  Making sixty
    real ones would cost each start of the command line some 20 ms.

    Attributes:
      operations: the names of the operations that have these attributes.
    """

    operations: ClassVar[frozenset[str]]

    @classmethod
    def of_node(cls, node: Definition) -> Self:
        """Return the attributes of `node`.

        Raises:
          TypeError: it is another operation.
        """
        if node.op.name not in cls.operations:
            names = ", ".join(sorted(cls.operations))
            raise TypeError(f"{cls.__name__} views {names}, not {node.op.name}")
        return cls.of_attrs(node.attrs)

    @classmethod
    def of_attrs(cls, attrs: Attrs) -> Self:
        """Return `attrs`, the complete ones of such a node."""
        view = cls.__new__(cls)
        view.__dict__.update(attrs)
        return view

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a view is for reading; attributes are set in node.attrs")
