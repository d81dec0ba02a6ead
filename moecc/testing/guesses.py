"""Guesses at what an operation could take: types of operands, values of attributes.

They are cheap to make and cheap to try, since `infer` rejects what does not fit; nothing
here decides what an operation means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import CodeType

from moecc.ir.ops import Attr, OpDef
from moecc.rewrite.pattern import AttrPattern, OneOf, OpPattern, Pattern
from moecc.testing.growth import Growth, fixed, mixable_fixed
from moecc.types.dtypes import I32, KEY, PRED
from moecc.types.tensor import Axis, TensorType

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
    found: list[str] = []
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
                    found += value if isinstance(value, tuple) else [str(value)]
    return list(dict.fromkeys(found))


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
    g: Growth, spec: Attr, wanted: object, types: Sequence[TensorType], names: Sequence[str]
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
    g: Growth, spec: Attr, types: Sequence[TensorType], names: Sequence[str]
) -> Sequence[object]:
    anchor = types[0]
    given = [spec.default] if isinstance(spec.default, int | float | str | tuple) else []
    own = [*anchor.names, *names, g.new_axis("head", anchor).name]
    if spec.choices:
        return [*given, *(spec.choices if spec.kind == "str" else [(c,) for c in spec.choices])]
    if spec.kind == "axis":
        return own
    if spec.kind == "axes":
        # What two operands share is what they are contracted over.
        shared = [(n,) for n in anchor.names if any(n in t for t in types[1:2])]
        return [*((n,) for n in own), *shared * 3, tuple(anchor.names[-2:]), (), *given]
    if spec.kind == "sizes":
        return [*_splits(g, anchor), *(p for t in types[1:] for p in _runs(t))]
    if spec.kind == "int":
        return [*given, *_NUMBERS["int"], *(a.size for a in fixed(anchor))]
    return [*given, *_NUMBERS.get(spec.kind, ())] or [None]


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


def _constants(where: object, spec: Attr) -> list[object]:
    code = getattr(where, "__code__", None)
    types = {"int": int, "float": (int, float), "str": str, "axis": str}.get(spec.kind, tuple)
    found = code.co_consts if isinstance(code, CodeType) else ()
    return [v for v in found if isinstance(v, types) and not isinstance(v, bool)]  # type: ignore[arg-type]


def operands_of(pattern: OpPattern, entry: OpDef) -> list[Pattern | None]:
    """Return the patterns of the operands of `entry`; None where the pattern leaves one open."""
    missing = len(entry.operands) - len(pattern.operands)
    return [*pattern.operands, *[None] * max(0, missing)]
