"""Growing a random graph: append-only, operands are earlier values, well typed by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any, TypeVar

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.operation import Attr, OpDef
from moecc.ir.ops.rules import EXTENT_AXES
from moecc.rewrite.pattern import AttrPattern, OneOf, OpPattern, Pattern
from moecc.testing.weights import Choices, chance, grow_weight, pick
from moecc.types import I32, KEY, PRED, Axis, DType, TensorType

T = TypeVar("T")

SIZES = (2, 1, 3, 4, 6)
"""Sizes of fixed axes, the ones to shrink to first."""

MANY = (17, 32)
"""Sizes that one axis of a graph has at times: beyond a block or a vector, and a power of two."""

LOCATIONS = ("", "layers.0.ffn", "layers.1.attn", "layers.11.mlp", "embed", "encoder.blocks.3")


class Growth:
    """A graph that grows by steps.

    A step takes the growth, appends what it can, and may append nothing.

    Attributes:
      graph: the graph so far.
      builder: appends to it.
      values: what later steps may use, in order of definition.
      taps: interior values that the graph returns beside its sinks.
      is_square: whether all sizes are equal, so that a wrong orientation is well typed.
    """

    def __init__(self, choices: Choices, dtype: DType) -> None:
        self.choices = choices
        self.dtype = dtype
        self.graph = Graph()
        self.builder = Builder(self.graph)
        self.values: list[Value] = []
        self.taps: list[Value] = []
        self._sizes: dict[str, int] = {}
        self.is_square = self.chance(30)

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`, which are ordered from simple to complex."""
        return pick(self.choices, items)

    def chance(self, percent: int) -> bool:
        """Return whether something happens that happens in `percent` of all cases."""
        return chance(self.choices, percent)

    def relocate(self) -> None:
        """Give the nodes that follow another location."""
        self.builder.loc = self.pick(LOCATIONS)

    def emit(self, op: str, *operands: Value, **attrs: object) -> Value:
        """Append an operation and return its first result; later steps may use all results."""
        node = self.builder.node(op, *operands, names=(), **attrs)
        self.values += node.results
        return node.results[0]

    def input(self, hint: str, type: TensorType) -> Value:
        """Add an input."""
        value = self.graph.input(self.graph.fresh(hint), type)
        self.values.append(value)
        return value

    def param(self, hint: str, axes: Iterable[Axis], dtype: DType) -> Value:
        """Add a parameter, or return one of that type that is there already.

        A quarter of them is made by a weight expression.
        """
        type = TensorType(dtype, tuple(axes))
        same = [v for v in self.graph.params.values() if v.type == type]
        if same and self.chance(15):
            return self.pick(same)
        weight = grow_weight(self.choices, type) if self.chance(25) else None
        return self.graph.param(self.graph.fresh(hint), type, weight, loc=self.builder.loc)

    def constant(self, value: float, dtype: DType) -> Value:
        """Append a scalar constant."""
        return self.emit("constant", value=value, dtype=dtype.name)

    def size_of(self, name: str) -> int:
        """Return the usual size of the axis `name` in this graph."""
        key = "" if self.is_square else name
        if key not in self._sizes:
            # One draw for both, so that a seed makes the same graph but for this size.
            number, share = divmod(self.choices.below(8 * len(SIZES)), 8)
            has_many = self.is_square or not {*MANY}.isdisjoint(self._sizes.values())
            is_many = share >= 6 and not has_many
            self._sizes[key] = MANY[number % len(MANY)] if is_many else SIZES[number]
        return self._sizes[key]

    @property
    def tokens(self) -> tuple[Axis, Axis]:
        """The axes that number the tokens of an input."""
        return Axis("batch", "S" if self.is_square else "B"), Axis("seq", "S")

    @property
    def embed(self) -> Axis:
        """The axis of the model's width."""
        return Axis("embed", self.size_of("embed"))

    def new_axis(self, hint: str, *types: TensorType) -> Axis:
        """Return an axis of fixed size that none of `types` has."""
        name, number = hint, 2
        while any(name in t for t in types):
            name, number = f"{hint}{number}", number + 1
        return Axis(name, self.size_of(name))

    def find(self, fits: Callable[[Value], bool]) -> Value | None:
        """Return an earlier value that fits, if there is one."""
        candidates = [v for v in self.values if fits(v)]
        if not candidates:
            return None
        # Patterns are made of what follows one another.
        return self.pick(candidates[-3:] if self.chance(50) else candidates)

    def find_float(self, fits: Callable[[TensorType], bool] = lambda _: True) -> Value | None:
        """Return an earlier floating-point value whose type fits, if there is one."""
        return self.find(lambda v: v.type.dtype.is_float and fits(v.type))

    def find_within(self, wide: TensorType) -> Value | None:
        """Return an earlier value of the element type of `wide`, with axes of `wide` only."""
        return self.find(lambda v: v.type.dtype == wide.dtype and is_within(v.type, wide))

    def tap(self, since: int, percent: int = 30) -> None:
        """At a chance, use a value defined since `since` once more, or return it.

        Rewrites go wrong where something inside the pattern has another user.
        """
        if since >= len(self.values) or not self.chance(percent):
            return
        value = self.pick(self.values[since:])
        if value.type.dtype.is_float and self.chance(50):
            value = self.emit("relu", value)
        self.taps.append(value)


Step = Callable[[Growth], None]


def is_within(narrow: TensorType, wide: TensorType) -> bool:
    """Return whether each axis of `narrow` is one of `wide`."""
    return all(wide.by_name.get(a.name) == a for a in narrow.axes)


def fixed(type: TensorType) -> list[Axis]:
    """Return the axes whose size is a number."""
    return [a for a in type.axes if isinstance(a.size, int)]


def symbolic(type: TensorType) -> list[Axis]:
    """Return the axes whose size is a variable."""
    return [a for a in type.axes if isinstance(a.size, str)]


def mixable(type: TensorType) -> list[Axis]:
    """Return the axes along which elements may be mixed: none that tells rows apart."""
    if type.ragged is None:
        return list(type.axes)
    return [a for a in type.axes if not a.is_ragged and a.name not in EXTENT_AXES]


def mixable_fixed(type: TensorType) -> list[Axis]:
    """Return the axes of fixed size along which elements may be mixed."""
    return [a for a in mixable(type) if isinstance(a.size, int)]


def token_width(type: TensorType) -> Axis | None:
    """Return the one fixed axis of a stream of tokens, ``[batch, seq, embed]``."""
    axes = fixed(type)
    is_stream = len(axes) == 1 and symbolic(type) and len(type.axes) == len(symbolic(type)) + 1
    return axes[0] if is_stream else None


# Guesses at what an operation could take: types of operands, values of attributes.
#
# They are cheap to make and cheap to try, since `infer` rejects what does not fit; nothing
# here decides what an operation means.

NEW_NAMES = ("mlp", "embed", "head", "vocab")
"""What axes that a weight adds may be called, beside what the pattern names."""

_NUMBERS: dict[str, tuple[object, ...]] = {
    "int": (1, 2, 3, 0, 4, 8),
    "float": (2.0, 0.5, 1.0, -1.0, 0.0, 3.0, 1e-5, 1e-6),
    "bool": (False, True),
    "str": ("f32", "bf16", "f64", "i32"),
}


def named_axes(pattern: Pattern) -> list[str]:
    """Return the axes that a pattern names in its attributes."""
    names: list[str] = []
    left = [pattern]
    while left:
        item = left.pop()
        if isinstance(item, OneOf):
            left += item.choices
        if isinstance(item, OpPattern):
            left += item.operands
            for name, value in item.attrs:
                kinds = {entry.attrs[name].kind for entry in item.ops if name in entry.attrs}
                if kinds & {"axis", "axes"} and not isinstance(value, AttrPattern):
                    names += value if isinstance(value, tuple) else [str(value)]
    return list(dict.fromkeys(names))


def axis_called(g: Growth, name: str) -> Axis:
    """Return the axis `name` as this graph has it: tokens by a variable, others by a number."""
    return {a.name: a for a in g.tokens}.get(name) or Axis(name, g.size_of(name))


def stream_type(g: Growth, names: Iterable[str]) -> TensorType:
    """Return a type of tokens that has the axes `names`, or the width of the model."""
    wanted = [axis_called(g, n) for n in names] or [g.embed]
    if g.chance(20) and "head" not in names:
        wanted.append(axis_called(g, "head"))
    tokens = [a for a in g.tokens if a not in wanted]
    return TensorType(g.dtype, (*tokens[: 1 + g.choices.below(2)], *wanted))


def operand_type(g: Growth, anchor: TensorType, names: Sequence[str], is_param: bool) -> TensorType:
    """Guess the type of an operand, a parameter or not, that stands beside one of type `anchor`."""
    kind = 2 + g.choices.below(6) if is_param else g.choices.below(8)
    if kind == 0:
        return anchor
    if kind == 1:
        others = (I32, PRED) if anchor.dtype.is_float else (g.dtype,)
        return g.pick((*map(anchor.with_dtype, others), TensorType(KEY)))
    axes = [a for a in fixed(anchor) if g.chance(50)]
    if kind <= 4:
        # What is broadcast: a bias, a scale.
        return TensorType(anchor.dtype, tuple(axes))
    # What is contracted: one axis of the operand, and mostly another in its place.
    inner = [g.pick(mixable_fixed(anchor))] if mixable_fixed(anchor) else []
    new = g.pick((*names, *names, *NEW_NAMES))
    outer = [] if new in anchor or g.chance(10) else [axis_called(g, new)]
    axes = [*outer, *inner] if g.chance(70) else [*inner, *outer]
    return TensorType(anchor.dtype, tuple(a for a in axes if isinstance(a.size, int)))


def attribute(
    g: Growth, spec: Attr[Any], wanted: object, types: Sequence[TensorType], names: Sequence[str]
) -> object:
    """Guess the value of an attribute.

    Args:
      g: makes the decisions.
      spec: the attribute in the table.
      wanted: the `AttrPattern` of the pattern, or None.
      types: the types of the operands, then those of what the pattern's names stand for.
      names: the axes that the pattern names.
    """
    options = _options(g, spec, types, names)
    where = wanted.where if isinstance(wanted, AttrPattern) else None
    if where is None:
        has_default = spec.default in options
        return spec.default if has_default and wanted is None and g.chance(60) else g.pick(options)
    # A predicate that compares with a number has that number among its constants.
    options = [v for v in (*options, *_constants(where, spec)) if where(v)]
    return g.pick(options) if options else spec.default


def _options(
    g: Growth, spec: Attr[Any], types: Sequence[TensorType], names: Sequence[str]
) -> Sequence[object]:
    anchor = types[0]
    defaults = [spec.default] if isinstance(spec.default, int | float | str | tuple) else []
    axis_names = [*anchor.names, *names, g.new_axis("head", anchor).name]
    if spec.choices:
        return [*defaults, *(spec.choices if spec.kind == "str" else [(c,) for c in spec.choices])]
    if spec.kind == "axis":
        return axis_names
    if spec.kind == "axes":
        # What two operands share is what they are contracted over.
        shared = [(n,) for n in anchor.names if any(n in t for t in types[1:2])]
        return [*((n,) for n in axis_names), *shared * 3, tuple(anchor.names[-2:]), (), *defaults]
    if spec.kind == "sizes":
        return [*_splits(g, anchor), *(p for t in types[1:] for p in _runs(t))]
    if spec.kind == "int":
        return [*defaults, *_NUMBERS["int"], *(a.size for a in fixed(anchor))]
    return [*defaults, *_NUMBERS.get(spec.kind, ())] or [None]


def _splits(g: Growth, anchor: TensorType) -> list[object]:
    names = g.new_axis("head", anchor).name, g.new_axis("head_dim", anchor).name
    sizes = {int(str(a.size)) for a in mixable_fixed(anchor)} or {2}
    pairs = [
        ((names[0], d), (names[1], s // d)) for s in sizes for d in range(1, s + 1) if s % d == 0
    ]
    return [*pairs, *(((names[0], s),) for s in sorted(sizes))]


def _runs(type: TensorType) -> list[object]:
    """Return neighbouring axes with their sizes, two or three of them."""
    pairs = [(a.name, a.size) for a in fixed(type)]
    return [tuple(pairs[i : i + n]) for n in (2, 3) for i in range(len(pairs) - n + 1)]


def _constants(where: object, spec: Attr[Any]) -> list[object]:
    code = getattr(where, "__code__", None)
    types = {"int": int, "float": (int, float), "str": str, "axis": str}.get(spec.kind, tuple)
    constants = code.co_consts if isinstance(code, CodeType) else ()
    return [v for v in constants if isinstance(v, types) and not isinstance(v, bool)]  # type: ignore[arg-type]


def operands_of(pattern: OpPattern, entry: OpDef) -> list[Pattern | None]:
    """Return the patterns of the operands of `entry`; None where the pattern leaves one open."""
    missing = len(entry.operands) - len(pattern.operands)
    return [*pattern.operands, *[None] * max(0, missing)]
