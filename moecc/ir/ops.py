"""The operation table: one entry an operation, from which everything else is read.

An entry says how the types of the results follow from the operands (`infer`), which axes the
operation *mixes* (an element of the result needs other elements along them), in which operands it
is linear, and what else holds of it (`moecc.ir.traits`).  Lifting over an expert axis, raggedness,
sharding, unreduced sums, the finding of FFN blocks, scaling, shrinking and the planner all read
these, and none of them knows an operation by name.  The meaning of an operation stands in the
reference backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moecc.errors import InputError, Problem, nearest
from moecc.ir.flow import Rule, propagate_sharding
from moecc.ir.operand import Attrs as Attrs
from moecc.ir.operand import Operand, Region
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
from moecc.types.tensor import TensorType, is_name, is_size, is_whole

REQUIRED = object()
"""Marks an attribute that has no default."""


@dataclass(frozen=True)
class Attr:
    """An attribute of an operation.

    Attributes:
      kind: ``int``, ``float``, ``bool``, ``str``, ``words`` (a tuple of words), ``axis`` (a name),
        ``axes`` (a tuple of names), ``sizes`` (a tuple of (name, size) pairs) or ``region`` (a
        graph, which the text shows in braces after the line).
      default: its value where the text says nothing, or REQUIRED.
      choices: the only values allowed, for ``str``, or the only words, for ``words``.
      doc: what it means, in half a line.
      shrinks: whether the number is a size, or an end within one, and smaller in a smaller graph.
      pins: whether the size that it says, or that of the axis that it names, stays in a smaller
        graph.
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
      name: what the IR prints.
      doc: what the operation computes; the first line is the summary in ``docs/ir.md``.
      operands: the names of the operands; with `variadic`, of those that must be there.
      infer: result types from operands and attributes; raises InputError.
      attrs: the attributes by name, in printing order.
      results: hints for the names of the results.
      mixes: the operand axes that the operation mixes.
      linear: positions of the operands in which it is linear, the others held fixed.
      jointly: whether it is linear only in all of `linear` together, as a sum is.
      commutative: whether the operands may be exchanged.
      variadic: whether more operands may follow.
      places: whether `infer` says itself where the results lie on a mesh, as of a collective.
      elementwise: whether an element of the result is a function of one element of each operand.
      logical: whether truth values are among its operands or results.
      alias: whether the result is the first operand in another form, remade from it at no cost.
      blocks_gradient: whether the result is the first operand, and no gradient flows through.
      residual: what its derivative reads, and a gradient therefore keeps.
      homogeneous: what factors on operands do to the result, where `linear` does not say it.
      normalises: whether a row along the mixed axis is made independent of its magnitude.
      domain: where it is defined.
      collective: of an operation that changes only where a value lies, what it does.
      sharding: by which dimensions it shares a mesh; without a rule all operands lie whole.
      local: the attributes with which one device runs it, where they differ.
      sizes: what holds between its sizes beyond those that are equal.
      index: the operand whose integers pick something.
      chooses: whether it chooses experts by the scores in its first operand.
      assigns_slots: whether its last result is the slot of each choice.
      moves: whether it takes tokens to the slots of experts, or back.
      roles: what a parameter is in each operand; it is a plain value in those not said.
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
    roles: tuple[Role, ...] = ()

    @property
    def liftable(self) -> bool:
        """Whether it may stand inside an expert: an expert axis passes through it as it is."""
        return self.elementwise and not self.logical and not self.variadic

    @property
    def carries(self) -> bool:
        """Whether the result has the elements of the first operand: a parameter is still one."""
        return self.alias or self.blocks_gradient

    @property
    def gradient_in_place(self) -> bool:
        """Whether a gradient takes the place of that of the result, as on a TPU.

        Activations, products and masks do so.  What is not defined everywhere (a quotient, a root)
        and what chooses between operands was seen to have an array of its own.
        """
        chooses, everywhere = self.homogeneity.alike, self.domain is not Domain.POSITIVE
        return self.elementwise and bool(self.residual) and everywhere and not chooses

    @property
    def fusable(self) -> bool:
        """Whether the compiler of a TPU makes it a part of the product that reads its result."""
        return self.gradient_in_place or self.normalises

    @property
    def cost(self) -> Cost:
        """What it costs: products, look-ups, norms and rows pass through memory, others do not."""
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
    def is_sum(self) -> bool:
        """Whether it adds operands element by element."""
        return self.elementwise and self.jointly and self.commutative

    @property
    def is_scaling(self) -> bool:
        """Whether it multiplies operands element by element."""
        return self.elementwise and self.linear == (0, 1) and not self.jointly

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
        """What positive factors on the operands do to the result; what is linear has degree 1."""
        if self.homogeneous is not None:
            return self.homogeneous
        count = len(self.operands)
        return Homogeneity(
            tuple(1.0 if i in self.linear else None for i in range(count)), self.jointly
        )

    def role(self, operand: int) -> Role:
        """Return what a parameter is as operand number `operand`."""
        return self.roles[operand] if operand < len(self.roles) else Role.VALUE

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], OpDef], tuple[str]]:
        # Table entries are compared by identity, so a copied graph must find the same one.
        return op, (self.name,)

    def complete(self, given: Attrs) -> dict[str, object]:
        """Return `given` checked against the table and completed with the defaults.

        Raises:
          InputError: an attribute is unknown, missing, or of the wrong kind.
        """
        if not given and not self.attrs:
            return {}
        problems = [self._unknown(name) for name in given if name not in self.attrs]
        full: dict[str, object] = {}
        for name, spec in self.attrs.items():
            value = given.get(name, spec.default)
            if value is REQUIRED:
                problems.append(Problem(f"{self.name} needs the attribute {name!r}"))
                continue
            full[name] = value
            if name in given:
                reason = _mismatch(spec, value)
                if reason is None and spec.kind == "float":
                    # −0.0 equals 0.0, so graphs that differ in it alone would be equal.
                    full[name] = float(value) + 0.0
                elif reason is not None:
                    what = f"attribute {name!r} of {self.name} is wrong"
                    problems.append(Problem(what, expected=reason, found=repr(value)))
        if problems:
            raise InputError(problems)
        return full

    def result_types(self, operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
        """Return the types of the results: what `infer` says, and where they lie on a mesh.

        Raises:
          InputError: operands or attributes do not suit the operation.
        """
        types = self.infer(operands, attrs)
        if self.places or not any(v.type.is_sharded for v in operands):
            return types
        return propagate_sharding(self, operands, attrs, types)

    def _unknown(self, name: str) -> Problem:
        hint = nearest(name, self.attrs) or f"attributes: {', '.join(self.attrs) or 'none'}"
        return Problem(f"{self.name} has no attribute {name!r}", hint=hint)

    def check_arity(self, count: int) -> None:
        """Raise InputError unless `count` operands suit this operation."""
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
    "region": ("a graph, in braces after the line", _is_graph),
    "sizes": ("axes with sizes, (head=9, head_dim=64)", _is_pairs),
}


def _mismatch(spec: Attr, value: object) -> str | None:
    """Return what was expected of `value`, or None if it fits."""
    expected, fits = _KINDS[spec.kind]
    if not fits(value):
        return expected
    if spec.choices and isinstance(value, tuple) and not set(value) <= set(spec.choices):
        return f"words among {', '.join(spec.choices)}"
    if spec.choices and spec.kind == "str" and value not in spec.choices:
        return f"one of {', '.join(spec.choices)}"
    return None


OPS: dict[str, OpDef] = {}


def register(entry: OpDef) -> OpDef:
    """Add `entry` to the table; two entries of one name are a bug in the caller."""
    if entry.name in OPS:
        raise ValueError(f"operation {entry.name!r} is defined twice")
    OPS[entry.name] = entry
    return entry


def op(name: str) -> OpDef:
    """Return the table entry `name`.

    Raises:
      InputError: there is no such operation; the nearest name is suggested.
    """
    entry = OPS.get(name)
    if entry is None:
        raise InputError(f"unknown operation {name!r}", hint=nearest(name, OPS))
    return entry
