"""Edits that may change the function: slips of one place, drawn from the whole table of operations.

Many are harmless in some graphs.  Whether one is, the reference decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import isfinite

from moecc.errors import InputError
from moecc.ir import Node, Value
from moecc.ir.structure import infer_again, replace_value
from moecc.types import BF16, DType
from moecc.weights.arithmetic import Add, Cast, Mul, Scale, Select
from moecc.weights.draws import Draw, Normal, TruncatedNormal, Uniform
from moecc.weights.expr import Expr, Full, Source, transform, walk
from moecc.weights.movement import Concat, Index, Permute, Rename, Slice, Split, Stack, Tile

from .sound_edits import (
    Edit,
    NodeEdit,
    Rng,
    before,
    fixed,
    insert,
    is_float,
    pick,
    replace,
)
from .sound_weights import weights_of

WRONG: dict[str, Edit] = {}


def wrong(*ops: str) -> Callable[[NodeEdit], NodeEdit]:
    """Register a slip in nodes of the operations `ops`; none: in every node."""

    def register(edit: NodeEdit) -> NodeEdit:
        WRONG[edit.__name__] = Edit(edit.__name__, ops, edit, is_sound=False)
        return edit

    return register


@wrong("sub", "div", "less", "equal", "select", "rotate", "same_segment", "causal")
def exchange_operands(node: Node, rng: Rng) -> bool:
    """Two operands of one type are exchanged."""
    pairs = [
        (i, j)
        for i in range(len(node.operands))
        for j in range(i)
        if node.operands[i].type == node.operands[j].type
        and node.operands[i] is not node.operands[j]
    ]
    if not pairs:
        if node.op.name not in ("sub", "div"):
            return False
        return replace(node, before(node).node(node.op.name, *node.operands[::-1]).result)
    i, j = pick(rng, pairs)
    a, b = node.operands[i], node.operands[j]
    node.set_operand(i, b)
    node.set_operand(j, a)
    return True


ALIKE = (
    ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "normal_cdf"),
    ("add", "sub", "mul", "maximum", "minimum"),
    ("sum", "mean", "max", "logsumexp"),
    ("exp", "square", "silu", "neg"),
    ("less", "equal"),
)


@wrong(*{op for group in ALIKE for op in group})
def mistake_the_operation(node: Node, rng: Rng) -> bool:
    """One operation becomes another of the same kind."""
    others = {op for group in ALIKE if node.op.name in group for op in group} - {node.op.name}
    b = before(node)
    return replace(
        node, b.node(pick(rng, sorted(others)), *node.operands, **dict(node.attrs)).result
    )


def _other_value(node: Node, name: str, rng: Rng) -> object:
    spec, value = node.op.attrs[name], node.attrs[name]
    if spec.choices and spec.kind == "str":
        return pick(rng, [c for c in spec.choices if c != value])
    names = [n for v in node.operands for n in v.type.names]
    match value:
        case bool():
            return not value
        case int():
            return value + pick(rng, (-1, 1, 2))
        case float():
            near = (value * 1.01, value * (1 + 1e-6), value / 10, -value, value + 1e-3, value * 2)
            return pick(rng, [v for v in near if v != value and isfinite(v)] or [0.0])
        case str() if spec.kind == "axis":
            return pick(rng, [n for n in names if n != value])
        case tuple() if spec.kind == "axes" and value:
            at = int(rng.integers(len(value)))
            if rng.random() < 0.4 and len(value) > 1:
                return value[::-1] if rng.random() < 0.5 else value[:at] + value[at + 1 :]
            return (*value[:at], pick(rng, [n for n in names if n not in value]), *value[at + 1 :])
        case tuple() if spec.kind == "sizes" and len(value) > 1:
            (first, a), (second, b), *others = value
            return ((second, b), (first, a), *others)
    raise InputError("nothing else to say")


@wrong()
def mistake_an_attribute(node: Node, rng: Rng) -> bool:
    """An attribute has another value: a constant, an axis, a bound, a policy, an order."""
    names = [n for n, v in node.attrs.items() if n not in ("body", "mesh") and not callable(v)]
    if not names:
        return False
    name = pick(rng, names)
    types = [v.type for v in node.results]
    node.attrs[name] = _other_value(node, name, rng)
    node.op.complete(node.attrs)
    infer_again(node.graph, [node], start=node)
    if [v.type for v in node.results] != types and any(v.is_output for v in node.results):
        raise InputError("another interface")
    return True


@wrong()
def mistake_an_operand(node: Node, rng: Rng) -> bool:
    """An operand is another value of its type, defined before."""
    at = int(rng.integers(len(node.operands))) if node.operands else 0
    if not node.operands:
        return False
    operand = node.operands[at]
    graph = node.graph
    values = [*graph.inputs.values(), *graph.params.values()]
    for earlier in graph:
        if earlier is node:
            break
        values += earlier.results
    others = [v for v in values if v is not operand and v.type == operand.type]
    if not others:
        return False
    node.set_operand(at, pick(rng, others))
    infer_again(graph, [node], start=node)
    return True


@wrong()
def leave_out(node: Node, rng: Rng) -> bool:
    """A node is left out: its users read one of its operands."""
    if len(node.results) > 1:
        return False
    operands = [v for v in node.operands if v.type == node.result.type]
    if not operands or node.op.assigns_slots:
        return False
    return replace(node, pick(rng, operands))


@wrong("stop_gradient")
def let_a_gradient_through(node: Node, rng: Rng) -> bool:
    """A stop_gradient is lost."""
    return replace(node, node.operands[0])


@wrong()
def stop_a_gradient(node: Node, rng: Rng) -> bool:
    """A value's gradient is stopped, for all its users or for one operand of a node."""
    if rng.random() < 0.5:
        return is_float(node.results[0]) and insert(node, lambda b, v: b.stop_gradient(v))
    floats = [i for i, v in enumerate(node.operands) if is_float(v)]
    if not floats:
        return False
    at = pick(rng, floats)
    node.set_operand(at, before(node).stop_gradient(node.operands[at]))
    return True


@wrong()
def change_a_little(node: Node, rng: Rng) -> bool:
    """A value is off by a factor or a summand."""
    result = node.results[0]
    if not is_float(result):
        return False
    dtype = result.type.dtype.name
    ways = (
        lambda b, v: b.scale(v, by=pick(rng, (1.01, 1 + 1e-6, 0.5, -1.0))),
        lambda b, v: b.add(v, b.constant(value=pick(rng, (1e-6, 1.0)), dtype=dtype)),
        lambda b, v: b.relu(v),
        lambda b, v: b.cast(b.cast(v, dtype="bf16"), dtype=dtype),
        lambda b, v: b.minimum(v, b.constant(value=1.0, dtype=dtype)),
    )
    return insert(node, pick(rng, ways))


def _wrong_movement(b, v: Value, rng: Rng) -> Value:  # type: ignore[no-untyped-def]
    axes = fixed(v.type)
    if not axes:
        raise InputError("no axis")
    axis = pick(rng, axes)
    size = int(axis.size)
    way = pick(rng, ("roll", "reverse", "swap", "chunk", "merge"))
    if way in ("roll", "reverse"):
        order = [*range(1, size), 0] if way == "roll" else [*range(size)][::-1]
        pieces = [b.slice(v, axis=axis.name, start=i, stop=i + 1) for i in order]
        return b.join(*pieces, axis=axis.name)
    if way == "swap":
        twins = [a for a in v.type.axes if a.size == axis.size and a is not axis]
        twin = pick(rng, twins).name
        swapped = b.rename(v, axis=axis.name, to="swap_")
        swapped = b.rename(swapped, axis=twin, to=axis.name)
        swapped = b.rename(swapped, axis="swap_", to=twin)
        return b.broadcast(swapped, v)
    part = pick(rng, [d for d in range(1, size + 1) if size % d == 0])
    cut = b.split(v, axis=axis.name, into=(("a_", part), ("b_", size // part)))
    if way == "merge":
        # Inner and outer axes are exchanged.
        return b.merge(cut, axes=("b_", "a_"), into=axis.name)
    chunks = [b.chunk(v, axis=axis.name, at=i, of=part, parts=1) for i in range(part)]
    return b.join(*chunks, axis=axis.name, parts=size // part)


@wrong()
def move_wrongly(node: Node, rng: Rng) -> bool:
    """Elements of a value are exchanged along an axis, or two axes of one size are."""
    at = int(rng.integers(len(node.results)))
    value = node.results[at]
    if value.type.extents or value.type.is_sharded or value.type.dtype.kind == "key":
        return False
    return insert(node, lambda b, v: _wrong_movement(b, v, rng), at)


@wrong("route")
def break_ties_the_other_way(node: Node, rng: Rng) -> bool:
    """Logits are reversed, and so are the numbers of the experts that were chosen: but for ties."""
    logits, axis = node.operands[0], node.attrs["axis"]
    size = logits.type[axis].size
    if not isinstance(size, int) or size < 2 or node.attrs["using"]:
        return False
    b = before(node)
    pieces = [b.slice(logits, axis=axis, start=i, stop=i + 1) for i in reversed(range(size))]
    node.set_operand(0, b.join(*pieces, axis=axis))

    def mirrored(b, v: Value) -> Value:  # type: ignore[no-untyped-def]
        return b.sub(b.constant(value=float(size - 1), dtype=v.type.dtype.name), v)

    return insert(node, mirrored) if node.results[0].users else True


@wrong("causal", "mask", "attention")
def mistake_a_mask(node: Node, rng: Rng) -> bool:
    """A mask keeps other positions: as of another window, or it fills in another number."""
    if node.op.name == "attention" and not node.attrs["causal"]:
        return False
    name, values = ("fill", [-1.0, 0.0]) if node.op.name == "mask" else ("window", [1, 2])
    node.attrs[name] = pick(rng, [v for v in values if v != node.attrs[name]])
    return True


@wrong("route")
def exchange_experts(node: Node, rng: Rng) -> bool:
    """The numbers of the chosen experts are mirrored, and the experts are not."""
    size = node.operands[0].type[node.attrs["axis"]].size
    if not isinstance(size, int) or not node.results[0].users:
        return False

    def mirrored(b, v: Value) -> Value:  # type: ignore[no-untyped-def]
        return b.sub(b.constant(value=float(size - 1), dtype=v.type.dtype.name), v)

    return insert(node, mirrored)


@wrong("combine")
def forget_the_gates(node: Node, rng: Rng) -> bool:
    """Rows are added without weights, or with the gates of other choices."""
    rows, experts, slots, gates = node.operands
    b = before(node)
    if rng.random() < 0.5:
        none = b.scale(gates, by=0.0)
        one = b.constant(value=1.0, dtype=gates.type.dtype.name)
        return replace(node, b.combine(rows, experts, slots, b.add(none, one)))
    choice = gates.type.axes[-1]
    size = int(choice.size)
    order = reversed(range(size))
    pieces = [b.slice(gates, axis=choice.name, start=i, stop=i + 1) for i in order]
    return replace(node, b.combine(rows, experts, slots, b.join(*pieces, axis=choice.name)))


@wrong("combine")
def renormalise_again(node: Node, rng: Rng) -> bool:
    """Gates are divided by their sum."""
    rows, experts, slots, gates = node.operands
    b = before(node)
    total = b.sum(gates, axes=gates.type.names[-1])
    return replace(node, b.combine(rows, experts, slots, b.div(gates, total)))


@wrong("contract", "sum", "mean", "max")
def leave_out_an_element(node: Node, rng: Rng) -> bool:
    """A sum stops one element before its end."""
    axes = node.attrs["over" if node.op.name == "contract" else "axes"]
    x = node.operands[0]
    named = [a for a in fixed(x.type) if a.name in axes and a.size > 1]  # type: ignore[operator]
    if not named:
        return False
    axis, b = pick(rng, named), before(node)
    start, stop = pick(rng, ((0, int(axis.size) - 1), (1, int(axis.size))))
    parts = [
        b.slice(v, axis=axis.name, start=start, stop=stop) if axis.name in v.type else v
        for v in node.operands
    ]
    return replace(node, b.node(node.op.name, *parts, **dict(node.attrs)).result)


# Weights.


def with_slip(part: Expr, rng: Rng) -> Expr:
    """Return another expression of the type of `part`."""
    match part:
        case Source() if part.type.dtype.is_float and rng.random() < 0.3:
            return Cast(Source(part.name, part.type.with_dtype(BF16)), part.type.dtype)
        case Source():
            return Source(part.name + ".other", part.type)
        case Scale():
            return Scale(
                part.x, pick(rng, (part.factor * 2, part.factor * (1 + 1e-6), -part.factor, 1.0))
            )
        case Full():
            return Full(pick(rng, (1 - part.value, part.value + 1e-6)), part.type)
        case Normal() | TruncatedNormal() | Uniform() if isinstance(part, Draw):
            return dataclasses.replace(part, key=part.key + 1)
        case Slice():
            size = int(part.x.type[part.axis].size)  # type: ignore[arg-type]
            shift = pick(rng, (-1, 1))
            if part.start + shift >= 0 and part.stop + shift <= size:
                return Slice(part.x, part.axis, part.start + shift, part.stop + shift)
        case Index():
            size = int(part.x.type[part.axis].size)  # type: ignore[arg-type]
            return Index(part.x, part.axis, pick(rng, [i for i in range(size) if i != part.at]))
        case Stack() | Concat() if len(part.xs) > 1:
            return part.with_operands(*part.xs[::-1])
        case Add():
            return Mul(*part.operands)
        case Mul():
            return Add(*part.operands)
        case Select():
            c, a, b = part.operands
            return part.with_operands(c, b, a)
        case Split() if len(part.into) > 1:
            sizes = tuple(s for _, s in part.into)[::-1]
            return Split(
                part.x, part.axis, tuple(zip([n for n, _ in part.into], sizes, strict=True))
            )
        case Tile():
            inner = Tile(part.x, part.axis, part.size, part.position)
            return Scale(inner, 1.01)
        case Permute():
            return part
    return part


def swapped_axes(weight: Expr, rng: Rng) -> Expr:
    """Two axes of one size are taken for one another."""
    type = weight.type
    pairs = [
        (i, j) for i in range(len(type.axes)) for j in range(i)
        if type.axes[i].size == type.axes[j].size and type.axes[i].size != 1
    ]  # fmt: skip
    i, j = pick(rng, pairs) if pairs else (0, 0)
    if not pairs:
        raise InputError("no twins")
    order = list(type.names)
    order[i], order[j] = order[j], order[i]
    swapped = Permute(weight, tuple(order))
    first, second = type.names[i], type.names[j]
    between = Rename(Rename(swapped, first, "swap_"), second, first)
    return Rename(between, "swap_", second)


@wrong()
def mistake_a_weight(node: Node, rng: Rng) -> bool:
    """A weight expression is wrong in one place: a name, a factor, a range or an order."""
    params = weights_of(node)
    if not params:
        return False
    param = pick(rng, params)
    weight = param.weight
    assert weight is not None
    way = rng.random()
    if way < 0.2:
        wrong_weight = swapped_axes(weight, rng)
    elif way < 0.3 and weight.type.dtype.is_float:
        wrong_weight = _rounded(weight, BF16)
    else:
        parts = list(walk(weight))
        part = pick(rng, parts)
        slip = with_slip(part, rng)
        if slip is part or slip.type != part.type:
            return False
        wrong_weight = transform(weight, lambda x: slip if x is part else x)
    if wrong_weight is weight or wrong_weight.type != weight.type:
        return False
    param.weight = wrong_weight
    return True


def _rounded(weight: Expr, dtype: DType) -> Expr:
    return Cast(Cast(weight, dtype), weight.type.dtype)


@wrong()
def exchange_weights(node: Node, rng: Rng) -> bool:
    """A parameter is another one of its type: of another layer, or up for gate."""
    params = [v for v in node.operands if v.is_param]
    if not params:
        return False
    param = pick(rng, params)
    others = [p for p in node.graph.params.values() if p is not param and p.type == param.type]
    if not others:
        return False
    wrong_param = pick(rng, others)
    if rng.random() < 0.5 and param.weight is not None and wrong_param.weight is not None:
        param.weight, wrong_param.weight = wrong_param.weight, param.weight
        return param.weight is not wrong_param.weight
    for number, operand in enumerate(node.operands):
        if operand is param:
            node.set_operand(number, wrong_param)
    return True


@wrong()
def exchange_outputs(node: Node, rng: Rng) -> bool:
    """Two outputs of one type are exchanged."""
    graph = node.graph
    outputs = list(graph.outputs.items())
    pairs = [
        (a, b) for a in outputs for b in outputs
        if a[0] < b[0] and a[1].type == b[1].type and a[1] is not b[1]
    ]  # fmt: skip
    if not pairs:
        return False
    (a, x), (b, y) = pick(rng, pairs)
    graph.set_output(a, y)
    graph.set_output(b, x)
    return True


@wrong()
def share_what_differs(node: Node, rng: Rng) -> bool:
    """Two nodes of one operation on other operands, or with other attributes, are taken for one."""
    twins = []
    for earlier in node.graph:
        if earlier is node:
            break
        if earlier.op is node.op and [v.type for v in earlier.results] == [
            v.type for v in node.results
        ]:
            twins.append(earlier)
    if not twins:
        return False
    twin = pick(rng, twins)
    for old, new in zip(node.results, twin.results, strict=True):
        replace_value(old, new)
    if node.is_dead:
        node.erase()
    return True


@wrong("dispatch", "combine", "assign_slots")
def lose_rows(node: Node, rng: Rng) -> bool:
    """Rows of one token are lost, or gates of dropped tokens are kept."""
    if node.op.name == "assign_slots":
        return False
    x = node.operands[0]
    if not is_float(x):
        return False
    b = before(node)
    node.set_operand(0, b.relu(x) if rng.random() < 0.5 else b.scale(x, by=0.5))
    return True
