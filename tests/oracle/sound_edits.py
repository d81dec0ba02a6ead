"""Edits that keep the function: each changes one place of a graph, chosen by the caller.

An edit takes a node and random numbers, changes the graph in place and returns whether it did.  It
is right in real arithmetic, for all data and sizes of at least one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moecc.errors import InputError
from moecc.ir import Builder, Node, Value
from moecc.ir.structure import replace_value
from moecc.types import Axis, TensorType

Rng = np.random.Generator
NodeEdit = Callable[[Node, Rng], bool]


@dataclass(frozen=True)
class Edit:
    """A change of one node of a graph.

    Attributes:
      name: the function's name.
      ops: the operations it applies to; empty: all.
      apply: changes the graph and returns whether it did.
      is_sound: whether it keeps the function.
    """

    name: str
    ops: tuple[str, ...]
    apply: NodeEdit
    is_sound: bool


SOUND: dict[str, Edit] = {}


def sound(*ops: str) -> Callable[[NodeEdit], NodeEdit]:
    """Register an edit of nodes of the operations `ops`; none: of every node."""

    def register(edit: NodeEdit) -> NodeEdit:
        SOUND[edit.__name__] = Edit(edit.__name__, ops, edit, is_sound=True)
        return edit

    return register


def before(node: Node) -> Builder:
    """Return a builder that inserts in front of `node`."""
    return Builder(node.graph, loc=node.loc, origin="edit", before=node)


def behind(node: Node) -> Builder:
    """Return a builder that inserts behind `node`."""
    following = node._next
    end = following is node.graph.terminator
    return Builder(node.graph, loc=node.loc, origin="edit", before=None if end else following)


def maker(value: Value, *ops: str) -> Node | None:
    """Return the node that defines `value`, if it is one of the operations `ops`."""
    node = value.node
    return node if node is not None and node.op.name in ops else None


def pick(rng: Rng, items):  # type: ignore[no-untyped-def]
    """Return one of `items`."""
    items = list(items)
    return items[int(rng.integers(len(items)))]


def replace(node: Node, value: Value) -> bool:
    """Replace the result of `node` by `value`, brought into the order of its axes."""
    type = node.result.type
    if value.type != type:
        if value.type.dtype != type.dtype or set(value.type.axes) != set(type.axes):
            raise InputError("another type")
        like = next((v for v in node.operands if v.type == type), None)
        if like is None:
            raise InputError("nothing has the axes in this order")
        value = before(node).broadcast(value, like)
    replace_value(node.result, value)
    if node.alive and node.is_dead:
        node.erase()
    return True


def insert(node: Node, build: Callable[[Builder, Value], Value], at: int = 0) -> bool:
    """Replace a result of `node` in its users by the value that `build` returns."""
    value = node.results[at]
    users = list(value.users)
    if not users:
        return False
    replacement = build(behind(node), value)
    if replacement.type != value.type:
        raise InputError("another type")
    for user in users:
        if user.alive and user is not replacement.node:
            for number, operand in enumerate(user.operands):
                if operand is value:
                    user.set_operand(number, replacement)
    return True


def fixed(type: TensorType) -> list[Axis]:
    """Return the axes of a fixed size that are not sharded."""
    return [a for a in type.axes if isinstance(a.size, int) and not a.mesh]


def new_name(type: TensorType, hint: str = "new") -> str:
    """Return a name that no axis of `type` has."""
    number = 0
    while f"{hint}{number}" in type:
        number += 1
    return f"{hint}{number}"


def is_float(value: Value) -> bool:
    """Return whether elements are floats."""
    return value.type.dtype.is_float


def is_plain(value: Value) -> bool:
    """Return whether a value is a float without rows in slots and without sharding."""
    return is_float(value) and not value.type.extents and not value.type.is_sharded


# Arithmetic of elements.


@sound("add", "mul", "maximum", "minimum", "equal")
def commute(node: Node, rng: Rng) -> bool:
    """a + b becomes b + a."""
    a, b = node.operands
    return a is not b and replace(node, before(node).node(node.op.name, b, a).result)


@sound("add", "mul", "maximum", "minimum")
def reassociate(node: Node, rng: Rng) -> bool:
    """(a + b) + c becomes a + (b + c)."""
    at = int(rng.integers(2))
    inner, c = maker(node.operands[at], node.op.name), node.operands[1 - at]
    if inner is None:
        return False
    a, b = inner.operands if rng.random() < 0.5 else inner.operands[::-1]
    build, op = before(node), node.op.name
    return replace(node, build.node(op, a, build.node(op, b, c).result).result)


@sound("mul")
def distribute(node: Node, rng: Rng) -> bool:
    """a · (b ± c) becomes a · b ± a · c."""
    at = int(rng.integers(2))
    inner, a = maker(node.operands[at], "add", "sub"), node.operands[1 - at]
    if inner is None:
        return False
    build = before(node)
    left, right = (build.mul(a, v) for v in inner.operands)
    return replace(node, build.node(inner.op.name, left, right).result)


@sound("add", "sub")
def factor(node: Node, rng: Rng) -> bool:
    """a · b ± a · c becomes a · (b ± c)."""
    left, right = (maker(v, "mul") for v in node.operands)
    if left is None or right is None:
        return False
    for a in left.operands:
        if a in right.operands:
            b = next((v for v in left.operands if v is not a), a)
            c = next((v for v in right.operands if v is not a), a)
            build = before(node)
            return replace(node, build.mul(a, build.node(node.op.name, b, c).result))
    return False


@sound("sub")
def subtract_by_adding(node: Node, rng: Rng) -> bool:
    """a − b becomes a + (−b)."""
    a, b = node.operands
    build = before(node)
    return replace(node, build.add(a, build.neg(b)))


@sound("div")
def divide_by_multiplying(node: Node, rng: Rng) -> bool:
    """a / b becomes a · (1 / b)."""
    a, b = node.operands
    build = before(node)
    one = build.constant(value=1.0, dtype=b.type.dtype.name)
    return replace(node, build.mul(a, build.div(one, b)))


@sound()
def add_and_subtract(node: Node, rng: Rng) -> bool:
    """x becomes (x + y) − y."""
    x = node.results[0]
    if not is_plain(x):
        return False
    y = pick(rng, [v for v in (*node.operands, x) if v.type == x.type])
    return insert(node, lambda b, v: b.sub(b.add(v, y), y))


@sound()
def times_one(node: Node, rng: Rng) -> bool:
    """x becomes x · 1, x + 0, c⁻¹ · (c · x) or −(−x)."""
    if not is_float(node.results[0]):
        return False
    dtype = node.results[0].type.dtype.name
    ways = (
        lambda b, v: b.mul(v, b.constant(value=1.0, dtype=dtype)),
        lambda b, v: b.add(v, b.constant(value=0.0, dtype=dtype)),
        lambda b, v: b.scale(b.scale(v, by=4.0), by=0.25),
        lambda b, v: b.neg(b.neg(v)),
        lambda b, v: b.sub(v, b.constant(value=0.0, dtype=dtype)),
        lambda b, v: b.div(v, b.constant(value=1.0, dtype=dtype)),
    )
    return insert(node, pick(rng, ways))


@sound("scale", "neg")
def scale_by_multiplying(node: Node, rng: Rng) -> bool:
    """c · x becomes x · constant(c)."""
    x, build = node.operands[0], before(node)
    by = -1.0 if node.op.name == "neg" else node.attrs["by"]
    return replace(node, build.mul(x, build.constant(value=by, dtype=x.type.dtype.name)))


@sound("scale", "neg")
def scale_inside(node: Node, rng: Rng) -> bool:
    """c · (a ± b) becomes c · a ± c · b; c · (a · b) becomes (c · a) · b."""
    inner = maker(node.operands[0], "add", "sub", "mul", "contract")
    if inner is None:
        return False
    build = before(node)
    attrs = dict(node.attrs)
    if inner.op.name in ("add", "sub"):
        parts = [build.node(node.op.name, v, **attrs).result for v in inner.operands]
        return replace(node, build.node(inner.op.name, *parts).result)
    at = int(rng.integers(2))
    operands = list(inner.operands)
    operands[at] = build.node(node.op.name, operands[at], **attrs).result
    return replace(node, build.node(inner.op.name, *operands, **dict(inner.attrs)).result)


@sound("square")
def square_by_multiplying(node: Node, rng: Rng) -> bool:
    """x² becomes x · x."""
    (x,) = node.operands
    return replace(node, before(node).mul(x, x))


@sound("mul")
def multiply_by_squaring(node: Node, rng: Rng) -> bool:
    """x · x becomes x²."""
    a, b = node.operands
    return a is b and replace(node, before(node).square(a))


@sound("silu", "tanh", "gelu", "relu", "maximum", "minimum", "sigmoid")
def write_out(node: Node, rng: Rng) -> bool:
    """An activation becomes its formula."""
    x, b = node.operands[0], before(node)
    dtype = x.type.dtype.name
    if x.type.ragged is not None and node.op.name == "relu":
        return False
    match node.op.name:
        case "silu":
            return replace(node, b.mul(x, b.sigmoid(x)))
        case "gelu":
            return replace(node, b.mul(x, b.normal_cdf(x)))
        case "relu":
            zero = b.constant(value=0.0, dtype=dtype)
            if rng.random() < 0.5:
                return replace(node, b.maximum(x, zero))
            return replace(node, b.select(b.less(zero, x), x, b.scale(x, by=0.0)))
        case "maximum" if node.operands[0].type == node.operands[1].type:
            y = node.operands[1]
            return replace(node, b.add(x, b.relu(b.sub(y, x))))
        case "minimum" if node.operands[0].type == node.operands[1].type:
            y = node.operands[1]
            return replace(node, b.neg(b.maximum(b.neg(x), b.neg(y))))
        case "tanh":
            one = b.constant(value=1.0, dtype=dtype)
            return replace(node, b.sub(b.scale(b.sigmoid(b.scale(x, by=2.0)), by=2.0), one))
        case "sigmoid":
            one = b.constant(value=1.0, dtype=dtype)
            return replace(node, b.sub(one, b.sigmoid(b.neg(x))))
    return False


@sound("softmax", "logsumexp", "mean", "rms_norm", "layer_norm")
def write_out_along_an_axis(node: Node, rng: Rng) -> bool:
    """A softmax, a mean or a norm becomes its formula."""
    x, b = node.operands[0], before(node)
    if maker(x, "mask") is not None or x.type.extents:
        return False
    dtype = x.type.dtype.name
    match node.op.name:
        case "softmax":
            axis = node.attrs["axis"]
            if rng.random() < 0.5:
                return replace(node, b.exp(b.sub(x, b.logsumexp(x, axes=axis))))
            e = b.exp(x)
            return replace(node, b.div(e, b.sum(e, axes=axis)))
        case "logsumexp":
            return replace(node, b.log(b.sum(b.exp(x), axes=node.attrs["axes"])))
        case "mean":
            sizes = [x.type[n].size for n in node.attrs["axes"]]
            if not all(isinstance(s, int) for s in sizes):
                return False
            total = int(np.prod(sizes))
            if total & (total - 1):
                return False  # 1/3 is no float.
            return replace(node, b.scale(b.sum(x, axes=node.attrs["axes"]), by=1 / total))
        case "rms_norm":
            axis, eps = node.attrs["axis"], b.constant(value=node.attrs["eps"], dtype=dtype)
            root = b.rsqrt(b.add(b.mean(b.square(x), axes=axis), eps))
            return replace(node, b.mul(b.mul(x, root), node.operands[1]))
        case "layer_norm":
            axis, eps = node.attrs["axis"], b.constant(value=node.attrs["eps"], dtype=dtype)
            centred = b.sub(x, b.mean(x, axes=axis))
            root = b.rsqrt(b.add(b.mean(b.square(centred), axes=axis), eps))
            product = b.mul(b.mul(centred, root), node.operands[1])
            return replace(node, b.add(product, node.operands[2]))
    return False


@sound()
def identity_of_a_choice(node: Node, rng: Rng) -> bool:
    """x becomes max(x, x), min(x, x) or select(c, x, x)."""
    x = node.results[0]
    if not is_plain(x):
        return False
    zero = lambda b: b.constant(value=0.0, dtype=x.type.dtype.name)  # noqa: E731
    ways = (
        lambda b, v: b.maximum(v, v),
        lambda b, v: b.minimum(v, v),
        lambda b, v: b.select(b.less(v, zero(b)), v, v),
    )
    return insert(node, pick(rng, ways))


@sound("select")
def select_the_other_way(node: Node, rng: Rng) -> bool:
    """select(c, a, b) becomes select(c, a, 0) + select(c, 0, b)."""
    c, a, d = node.operands
    if not (is_plain(a) and a.type == d.type == node.result.type):
        return False
    b = before(node)
    none = b.scale(a, by=0.0)
    return replace(node, b.add(b.select(c, a, none), b.select(c, none, d)))


@sound("exp")
def exp_of_a_sum(node: Node, rng: Rng) -> bool:
    """exp(a + b) becomes exp(a) · exp(b)."""
    inner = maker(node.operands[0], "add", "sub")
    if inner is None or maker(inner.operands[0], "mask") or maker(inner.operands[1], "mask"):
        return False
    b = before(node)
    left, right = (b.exp(v) for v in inner.operands)
    op = "mul" if inner.op.name == "add" else "div"
    return replace(node, b.node(op, left, right).result)


@sound("sum")
def sum_in_parts(node: Node, rng: Rng) -> bool:
    """A sum over an axis becomes the sum of its halves, or a sum over its axes one by one."""
    (x,), axes = node.operands, node.attrs["axes"]
    b = before(node)
    if len(axes) > 1:
        last = b.sum(x, axes=axes[int(rng.integers(len(axes)))])
        remaining = tuple(a for a in axes if a in last.type)
        return replace(node, b.sum(last, axes=remaining))
    size = x.type[axes[0]].size
    if not isinstance(size, int) or size < 2 or x.type.extents:
        return False
    cut = int(rng.integers(1, size))
    parts = [
        b.sum(b.slice(x, axis=axes[0], start=i, stop=j), axes=axes)
        for i, j in ((0, cut), (cut, size))
    ]
    return replace(node, b.add(*parts))


@sound("sum")
def sum_of_a_product_by_contracting(node: Node, rng: Rng) -> bool:
    """Σ a · b becomes a contraction."""
    inner = maker(node.operands[0], "mul")
    axes = node.attrs["axes"]
    if inner is None or not all(a in v.type for a in axes for v in inner.operands):
        return False
    return replace(node, before(node).contract(*inner.operands, over=axes))


# Contractions.


@sound("contract")
def contract_the_other_way(node: Node, rng: Rng) -> bool:
    """contract(x, w) becomes contract(w, x)."""
    x, w = node.operands
    return replace(node, before(node).contract(w, x, **dict(node.attrs)))


@sound("contract")
def contract_in_parts(node: Node, rng: Rng) -> bool:
    """A contraction becomes the sum of those over two parts of its axis."""
    x, w = node.operands
    over = pick(rng, node.attrs["over"]) if node.attrs["over"] else None
    size = x.type[over].size if over else None
    if not isinstance(size, int) or size < 2 or x.type[over].mesh or w.type[over].mesh:
        return False
    cut, b = int(rng.integers(1, size)), before(node)
    parts = []
    for start, stop in ((0, cut), (cut, size)):
        halves = [b.slice(v, axis=over, start=start, stop=stop) for v in (x, w)]
        parts.append(b.contract(*halves, **dict(node.attrs)))
    return replace(node, b.add(*(parts if rng.random() < 0.5 else parts[::-1])))


@sound("contract")
def contract_a_sum(node: Node, rng: Rng) -> bool:
    """contract(a ± b, w) becomes contract(a, w) ± contract(b, w)."""
    at = int(rng.integers(2))
    inner = maker(node.operands[at], "add", "sub")
    if inner is None or inner.operands[0].type != inner.operands[1].type:
        return False
    b, parts = before(node), []
    for value in inner.operands:
        operands = list(node.operands)
        operands[at] = value
        parts.append(b.contract(*operands, **dict(node.attrs)))
    return replace(node, b.node(inner.op.name, *parts).result)


@sound("contract")
def contract_by_multiplying(node: Node, rng: Rng) -> bool:
    """contract(x, w) becomes Σ x · w, written with broadcasts."""
    x, w = node.operands
    over = node.attrs["over"]
    if not over or x.type.extents or w.type.extents or not is_plain(x):
        return False
    b = before(node)
    if set(w.type.axes) <= set(x.type.axes):
        return replace(node, b.sum(b.mul(x, w), axes=over))
    if set(x.type.axes) <= set(w.type.axes):
        return replace(node, b.sum(b.mul(w, x), axes=over))
    # An outer product: a contraction over nothing.
    return replace(node, b.sum(b.contract(x, w, over=()), axes=over))


@sound("contract")
def contract_a_contraction(node: Node, rng: Rng) -> bool:
    """contract(contract(x, a), b) becomes contract(x, contract(a, b))."""
    at = int(rng.integers(2))
    inner, outer = maker(node.operands[at], "contract"), node.operands[1 - at]
    if inner is None:
        return False
    x, a = inner.operands if rng.random() < 0.5 else inner.operands[::-1]
    over, inside = set(node.attrs["over"]), set(inner.attrs["over"])
    # The axes summed outside belong to a alone, those inside are none of the outer factor's.
    if over & set(x.type.names) or inside & set(outer.type.names):
        return False
    b = before(node)
    product = b.contract(a, outer, over=tuple(sorted(over)))
    return replace(node, b.contract(x, product, over=tuple(sorted(inside))))


@sound("contract")
def contract_a_merged_axis(node: Node, rng: Rng) -> bool:
    """The axis of a contraction is split in both operands."""
    x, w = node.operands
    over = node.attrs["over"]
    axes = [a for a in fixed(x.type) if a.name in over and a.size > 1]  # type: ignore[operator]
    if not axes:
        return False
    axis = pick(rng, axes)
    size = int(axis.size)
    part = pick(rng, [d for d in range(1, size + 1) if size % d == 0])
    names = (new_name(x.type, "outer"), new_name(w.type, "inner"))
    if any(n in t for n in names for t in (x.type, w.type)):
        return False
    into = ((names[0], part), (names[1], size // part))
    b = before(node)
    cut = [b.split(v, axis=axis.name, into=into) for v in (x, w)]
    unsplit = tuple(n for n in over if n != axis.name)
    return replace(node, b.contract(*cut, **{**node.attrs, "over": (*unsplit, *names)}))


@sound("embedding")
def look_up_by_contracting(node: Node, rng: Rng) -> bool:
    """A lookup becomes the product with one-hot rows."""
    table, ids = node.operands
    axis = node.attrs["axis"]
    size = table.type[axis].size
    if not isinstance(size, int):
        return False
    b = before(node)
    hot = b.one_hot(ids, into=((axis, size),))
    if hot.type.dtype != table.type.dtype:
        hot = b.cast(hot, dtype=table.type.dtype.name)
    return replace(node, b.contract(hot, table, over=axis))


# Movement.


def _identity_movement(b: Builder, v: Value, rng: Rng) -> Value:
    type = v.type
    axes = fixed(type)
    way = pick(rng, ("rename", "split", "merge", "join", "stack", "index", "mean", "chunk"))
    if way == "rename" and type.axes:
        axis = pick(rng, type.axes).name
        name = new_name(type)
        return b.rename(b.rename(v, axis=axis, to=name), axis=name, to=axis)
    if way == "merge" and len(axes) > 1:
        start = int(rng.integers(len(type.axes) - 1))
        pair = type.axes[start : start + 2]
        if not all(a in axes for a in pair):
            raise InputError("no neighbours")
        name = new_name(type)
        merged = b.merge(v, axes=tuple(a.name for a in pair), into=name)
        return b.split(merged, axis=name, into=tuple((a.name, int(a.size)) for a in pair))
    if way == "stack":
        name, count = new_name(type), int(rng.integers(1, 4))
        return b.index(b.stack(*[v] * count, axis=name), axis=name, at=int(rng.integers(count)))
    if not axes:
        raise InputError("no axis")
    axis = pick(rng, axes)
    size = int(axis.size)
    if way == "split":
        part = pick(rng, [d for d in range(1, size + 1) if size % d == 0])
        first, second = new_name(type, "outer"), new_name(type, "inner")
        cut = b.split(v, axis=axis.name, into=((first, part), (second, size // part)))
        return b.merge(cut, axes=(first, second), into=axis.name)
    if way == "join":
        cut = int(rng.integers(0, size + 1))
        pieces = [(i, j) for i, j in ((0, cut), (cut, size)) if i < j]
        parts = [b.slice(v, axis=axis.name, start=i, stop=j) for i, j in pieces]
        return b.join(*parts, axis=axis.name)
    if way == "chunk":
        of = pick(rng, [d for d in range(1, size + 1) if size % d == 0])
        parts_of = pick(rng, [d for d in range(1, size // of + 1) if size // of % d == 0])
        chunks = [b.chunk(v, axis=axis.name, at=i, of=of, parts=parts_of) for i in range(of)]
        return b.join(*chunks, axis=axis.name, parts=parts_of)
    if way == "index":
        pieces = [b.index(v, axis=axis.name, at=i) for i in range(size)]
        return _ordered(b, b.stack(*pieces, axis=axis.name), v)
    name, count = new_name(type), pick(rng, (1, 2, 4))
    copies = b.stack(*[v] * count, axis=name)
    return b.mean(copies, axes=name)


def _ordered(b: Builder, value: Value, like: Value) -> Value:
    return value if value.type == like.type else b.broadcast(value, like)


@sound()
def move_to_and_fro(node: Node, rng: Rng) -> bool:
    """A value is renamed, split, merged, sliced, stacked or averaged, and put together again."""
    at = int(rng.integers(len(node.results)))
    value = node.results[at]
    if value.type.extents or value.type.is_sharded or value.type.dtype.kind == "key":
        return False
    if node.op.assigns_slots and value.type.dtype.kind != "float":
        return False
    return insert(node, lambda b, v: _identity_movement(b, v, rng), at)


UNARY = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "square", "neg", "scale", "exp")


@sound(*UNARY, "log", "rsqrt", "normal_cdf", "stop_gradient", "pointwise")
def apply_before_moving(node: Node, rng: Rng) -> bool:
    """f(move(x)) becomes move(f(x))."""
    moved = maker(
        node.operands[0], "rename", "split", "merge", "slice", "index", "broadcast", "stack",
        "join", "dispatch", "reshard", "shard", "all_gather", "all_to_all",
    )  # fmt: skip
    if moved is None:
        return False
    b, op, attrs = before(node), node.op.name, dict(node.attrs)
    if moved.op.name in ("stack", "join"):
        parts = [b.node(op, v, **attrs).result for v in moved.operands]
        return replace(node, b.node(moved.op.name, *parts, **dict(moved.attrs)).result)
    x, *others = moved.operands
    inner = b.node(op, x, **attrs).result
    return replace(node, b.node(moved.op.name, inner, *others, **dict(moved.attrs)).result)


@sound("rename", "split", "merge", "slice", "index")
def move_before_applying(node: Node, rng: Rng) -> bool:
    """move(f(x)) becomes f(move(x)), and move(a + b) becomes move(a) + move(b)."""
    inner = maker(node.operands[0], *UNARY, "stop_gradient", "add", "sub", "mul", "maximum")
    if inner is None or any(v.type.names != inner.result.type.names for v in inner.operands):
        return False
    b = before(node)
    parts = [b.node(node.op.name, v, **dict(node.attrs)).result for v in inner.operands]
    return replace(node, b.node(inner.op.name, *parts, **dict(inner.attrs)).result)


@sound("broadcast")
def broadcast_by_adding_zero(node: Node, rng: Rng) -> bool:
    """broadcast(x, like) becomes x + 0 · like."""
    x, like = node.operands
    if not (is_plain(x) and is_plain(like) and x.type.dtype == like.type.dtype):
        return False
    b = before(node)
    return replace(node, b.add(b.scale(like, by=0.0), x))


@sound("mask")
def mask_by_selecting(node: Node, rng: Rng) -> bool:
    """mask(x, keep) becomes select(keep, x, fill)."""
    x, keep = node.operands
    if keep.type.names != x.type.names:
        return False
    b = before(node)
    fill = b.broadcast(b.constant(value=node.attrs["fill"], dtype=x.type.dtype.name), x)
    return replace(node, b.select(keep, x, fill))


@sound()
def compute_again(node: Node, rng: Rng) -> bool:
    """One user of a value uses a copy of its node."""
    users = [u for u in node.results[0].users if not u.op.assigns_slots]
    if not users or node.body is not None or node.op.assigns_slots:
        return False
    user = pick(rng, users)
    if user is node.graph.terminator or any(v.type.extents for v in node.results):
        return False
    copy = before(user).node(node.op.name, *node.operands, **dict(node.attrs))
    for number, operand in enumerate(user.operands):
        if operand in node.results:
            user.set_operand(number, copy.results[node.results.index(operand)])
    return True


# Gradients.


@sound("stop_gradient")
def stop_again(node: Node, rng: Rng) -> bool:
    """sg(x) becomes sg(sg(x)), or sg(f(x)) becomes f(sg(x))."""
    inner = maker(node.operands[0], *UNARY, "add", "mul", "sub", "contract")
    if inner is not None and rng.random() < 0.7:
        b = before(node)
        parts = [b.stop_gradient(v) for v in inner.operands]
        return replace(node, b.node(inner.op.name, *parts, **dict(inner.attrs)).result)
    return insert(node, lambda b, v: b.stop_gradient(v))


@sound()
def stop_what_has_no_gradient(node: Node, rng: Rng) -> bool:
    """A stop behind a float that comes from whole numbers or constants."""
    result = node.results[0]
    if not is_float(result) or any(is_float(v) for v in node.operands) or len(node.results) > 1:
        return False
    return insert(node, lambda b, v: b.stop_gradient(v))


@sound("route", "one_hot", "causal")
def stop_before_a_comparison(node: Node, rng: Rng) -> bool:
    """What only decides has no gradient."""
    at = int(rng.integers(len(node.operands)))
    if node.op.name == "route" and node.results[1].users:
        return False
    if not is_float(node.operands[at]):
        return False
    node.set_operand(at, before(node).stop_gradient(node.operands[at]))
    return True


# Rows in slots.


@sound("dispatch")
def dispatch_parts(node: Node, rng: Rng) -> bool:
    """dispatch(a ± b) becomes dispatch(a) ± dispatch(b)."""
    x, experts, slots = node.operands
    inner = maker(x, "add", "sub", "mul", *UNARY)
    if inner is None or any(v.type.names != x.type.names for v in inner.operands):
        return False
    b = before(node)
    parts = [b.dispatch(v, experts, slots) for v in inner.operands]
    return replace(node, b.node(inner.op.name, *parts, **dict(inner.attrs)).result)


@sound("combine")
def combine_parts(node: Node, rng: Rng) -> bool:
    """combine(a + b) becomes combine(a) + combine(b); a factor of rows becomes one of gates."""
    rows, experts, slots, gates = node.operands
    b = before(node)
    inner = maker(rows, "add", "sub")
    if inner is not None and inner.operands[0].type == inner.operands[1].type:
        parts = [b.combine(v, experts, slots, gates) for v in inner.operands]
        return replace(node, b.node(inner.op.name, *parts).result)
    scaled = b.scale(rows, by=0.5)
    return replace(node, b.combine(scaled, experts, slots, b.scale(gates, by=2.0)))


@sound("combine")
def combine_each_choice(node: Node, rng: Rng) -> bool:
    """The gates of the first choices, and those of the last, in two combinations."""
    rows, experts, slots, gates = node.operands
    choice = gates.type.axes[-1]
    size = choice.size
    if not isinstance(size, int) or size < 2:
        return False
    b, parts = before(node), []
    cut = int(rng.integers(1, size))
    for is_first in (True, False):
        hot = b.positions(gates, axis=choice.name)
        low = b.less(hot, b.constant(value=float(cut), dtype=hot.type.dtype.name))
        zero = b.scale(gates, by=0.0)
        part = b.select(low, gates, zero) if is_first else b.select(low, zero, gates)
        parts.append(b.combine(rows, experts, slots, part))
    return replace(node, b.add(*parts))


@sound("route")
def shift_logits(node: Node, rng: Rng) -> bool:
    """Softmax gates do not see a number added to all logits of a token."""
    if node.attrs["gates"] not in ("softmax", "renormalised") or node.attrs["using"]:
        return False
    logits, b = node.operands[0], before(node)
    if not is_plain(logits) or logits.type.extents:
        return False
    shift = b.max(logits, axes=node.attrs["axis"])
    node.set_operand(0, b.sub(logits, b.stop_gradient(shift) if rng.random() < 0.3 else shift))
    return True


@sound("route")
def route_scaled(node: Node, rng: Rng) -> bool:
    """The factor of the gates is applied behind the routing."""
    scale = node.attrs["scale"]
    if scale == 1.0:
        return False
    node.attrs["scale"] = 1.0
    return insert(node, lambda b, v: b.scale(v, by=scale), 1)
