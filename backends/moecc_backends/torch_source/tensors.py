"""The text of operations on tensors: element by element, axes, products, norms, reductions.

A function takes the attributes of its operation as keywords, all of them, so that an attribute
which it does not know is an error and never ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import inf

from moecc.errors import InputError
from moecc.ir.formula import FormulaStep, parse_formula
from moecc.ir.operation import OPS
from moecc_backends.torch_source.program import ROW, Item, ProgramValue
from moecc_backends.torch_source.text import ATOM, COMPARISON, PRODUCT, SUM, PythonExpr, literal
from moecc_backends.torch_source.writer import BlockWriter, is_losses

Emission = Callable[..., PythonExpr | None]

OPERATIONS: dict[str, Emission] = {}
"""The functions by the names of operations and idioms."""


def emission(*names: str) -> Callable[[Emission], Emission]:
    """Register the function that writes the operations `names`.

    Raises:
      ValueError: it does not take the attributes of an operation by their names.
    """

    def declare(function: Emission) -> Emission:
        parameters = inspect.signature(function).parameters
        # What has a default is an attribute of an idiom, which an operation never has.
        required = {
            n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty
        }
        for name in names:
            if name in OPS and required != set(OPS[name].attrs):
                raise ValueError(f"{function.__name__} does not take the attributes of {name}")
            OPERATIONS[name] = function
        return function

    return declare


def refuse(item: Item, name: str, value: object) -> InputError:
    """Return the error about an attribute that no text is written for."""
    return InputError(f"{item.op} with {name}={value} cannot be written", where=item.loc)


# Element by element.


def _together(w: BlockWriter, operands: Sequence[ProgramValue]) -> list[PythonExpr]:
    """Return the operands, each so that it broadcasts against the widest."""
    exprs = [w.expr(v) for v in operands]
    if any(ROW in e.axes for e in exprs):
        exprs = [_per_row(w, e) for e in exprs]
    widest = max(exprs, key=lambda e: len([n for a in e.axes for n in a.split("+")]))
    return [w.aligned(e, widest.axes) for e in exprs]


def _per_row(w: BlockWriter, expr: PythonExpr) -> PythonExpr:
    """Return the vectors of experts as those of their rows."""
    if ROW in expr.axes or "expert" not in expr.axes:
        return expr
    names = ("expert", *(a for a in expr.axes if a != "expert"))
    return PythonExpr(f"rows.each({w.permuted(expr, names).text})", (ROW, *names[1:]))


def _axes_of(exprs: Sequence[PythonExpr]) -> tuple[str, ...]:
    return max((e.axes for e in exprs), key=len)


BINARY = {
    "add": ("+", SUM),
    "sub": ("-", SUM),
    "mul": ("*", PRODUCT),
    "div": ("/", PRODUCT),
    "less": ("<", COMPARISON),
    "equal": ("==", COMPARISON),
}


@emission(*BINARY)
def _binary(w: BlockWriter, item: Item) -> PythonExpr:
    a, b = _together(w, item.operands)
    sign, level = BINARY[item.op]
    right = level if sign in ("+", "*") else level + 1
    if sign == "+" and b.text.startswith("-"):
        right = ATOM
    return PythonExpr(
        f"{a.at(max(level, SUM))} {sign} {b.at(max(right, SUM))}", _axes_of([a, b]), level
    )


def _clamped(function: str, tensor: str, bound: str) -> str:
    """Return a maximum or minimum with a number: the maximum is never below it."""
    side = {"maximum": "min", "minimum": "max"}[function]
    return f"{tensor}.clamp({side}={bound})"


@emission("maximum", "minimum")
def _extremum(w: BlockWriter, item: Item) -> PythonExpr:
    for x, bound in (item.operands, item.operands[::-1]):
        if bound.item is not None and bound.item.op == "constant":
            expr = w.expr(x)
            return PythonExpr(_clamped(item.op, expr.atom, w.expr(bound).text), expr.axes)
    a, b = _together(w, item.operands)
    return PythonExpr(f"torch.{item.op}({a.text}, {b.text})", _axes_of([a, b]))


UNARY = {
    "silu": "F.silu({})",
    "gelu": "F.gelu({})",
    "gelu_tanh": 'F.gelu({}, approximate="tanh")',
    "relu": "F.relu({})",
    "sigmoid": "torch.sigmoid({})",
    "tanh": "torch.tanh({})",
    "exp": "torch.exp({})",
    "log": "torch.log({})",
    "square": "torch.square({})",
    "rsqrt": "torch.rsqrt({})",
    "normal_cdf": "torch.special.ndtr({})",
}


@emission(*UNARY)
def _unary(w: BlockWriter, item: Item) -> PythonExpr:
    x = w.expr(item.operands[0])
    return PythonExpr(UNARY[item.op].format(x.text), x.axes)


@emission("stop_gradient")
def _stop_gradient(w: BlockWriter, item: Item) -> PythonExpr:
    x = w.expr(item.operands[0])
    return PythonExpr(f"{x.atom}.detach()", x.axes)


@emission("neg")
def _neg(w: BlockWriter, item: Item) -> PythonExpr:
    x = w.expr(item.operands[0])
    return PythonExpr(f"-{x.atom}", x.axes, PRODUCT)


@emission("scale")
def _scale(w: BlockWriter, item: Item, *, by: float) -> PythonExpr:
    x = w.expr(item.operands[0])
    return PythonExpr(f"{x.at(PRODUCT)} * {w.literal(by, 'scale')}", x.axes, PRODUCT)


TYPES = {
    "f32": "torch.float32",
    "f64": "torch.float64",
    "bf16": "torch.bfloat16",
    "f16": "torch.float16",
    "i32": "torch.long",
    "i64": "torch.long",
    "pred": "torch.bool",
}


@emission("cast")
def _cast(w: BlockWriter, item: Item, *, dtype: str) -> PythonExpr:
    x = w.expr(item.operands[0])
    kind = item.operands[0].kind
    if kind == item.result.kind == "float":
        return x  # the type of the computation is that of the weights
    if dtype not in TYPES:
        raise refuse(item, "dtype", dtype)
    if item.result.kind == "float":
        w.helper("float_type")
        return PythonExpr(f"{x.atom}.to(float_type({device_like(w)}))", x.axes)
    return PythonExpr(f"{x.atom}.to({TYPES[dtype]})", x.axes)


def device_like(w: BlockWriter) -> str:
    """Return a tensor or parameter whose type is that of the computation."""
    for var in w.block.inputs:
        if var.kind == "float" and var in w.values:
            return w.values[var].text
    return w.tree.access(w.block.params[0].name) if w.block.params else ""


@emission("constant")
def _constant(w: BlockWriter, item: Item, *, value: float, dtype: str) -> PythonExpr:
    del dtype  # Python's numbers take the type of what they meet
    number: float = int(value) if item.result.kind == "int" else value
    return PythonExpr(w.literal(number, "constant"), (), ATOM if value >= 0 else SUM)


@emission("select")
def _select(w: BlockWriter, item: Item) -> PythonExpr:
    condition, a, b = _together(w, item.operands)
    return PythonExpr(
        f"torch.where({condition.text}, {a.text}, {b.text})", _axes_of([condition, a, b])
    )


@emission("mask")
def _mask(w: BlockWriter, item: Item, *, fill: float) -> PythonExpr:
    x, keep = (w.expr(v) for v in item.operands)
    keep = w.aligned(keep, x.axes)
    return PythonExpr(f"{x.atom}.masked_fill(~{keep.atom}, {w.literal(fill, 'fill')})", x.axes)


FUNCTIONS = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "neg": "(-{})",
    "pow": "({} ** {})",
    "less": "({} < {})",
    "less_equal": "({} <= {})",
    "greater": "({} > {})",
    "greater_equal": "({} >= {})",
    "equal": "({} == {})",
    "not_equal": "({} != {})",
    "and": "({} & {})",
    "or": "({} | {})",
    "xor": "({} ^ {})",
    "not": "(~{})",
    "relu": "F.relu({})",
    "relu6": "F.relu6({})",
    "clamp": "torch.clamp({1}, {0}, {2})",
    "cbrt": "({0}.sign() * {0}.abs() ** (1 / 3))",
    "stop_gradient": "{}.detach()",
    "wide": "widened({})",
}
"""Functions of formulas in PyTorch, where torch has them not by the same name."""


@emission("pointwise")
def _pointwise(w: BlockWriter, item: Item, *, function: str) -> PythonExpr:
    formula = parse_formula(function)
    x = w.expr(item.operands[0])
    if not x.text.isidentifier():
        x = w.assign(item.operands[0], x)
    numbers = [n for step in formula.steps for n in step.arguments if isinstance(n, int)]
    texts, parts = [x.text], list[ProgramValue]()
    for number, step in enumerate(formula.steps, 1):
        arguments = [texts[n] if isinstance(n, int) else literal(n) for n in step.arguments]
        text = _function(w, step, arguments, x.text)
        if numbers.count(number) > 1:
            parts.append(ProgramValue("part", x.axes))
            w.remaining[parts[-1]] = 1
            text = w.assign(parts[-1], PythonExpr(text, x.axes)).text
        texts.append(text)
    for part in parts:
        w.remaining[part] = 0
    return PythonExpr(texts[formula.result], x.axes)


def _function(w: BlockWriter, step: FormulaStep, arguments: list[str], operand: str) -> str:
    """Return a step of a formula; numbers in it are literals."""
    name, count = step.function, sum(isinstance(n, int) for n in step.arguments)
    if name in ("maximum", "minimum") and count == 1:
        tensor, bound = arguments if isinstance(step.arguments[0], int) else arguments[::-1]
        return _clamped(name, tensor, bound)
    if name in ("atan2", "logaddexp"):  # of tensors alone
        arguments = [
            text if isinstance(n, int) else f"torch.full_like({operand}, {text})"
            for text, n in zip(arguments, step.arguments, strict=True)
        ]
    if name == "wide":
        w.helper("widened")
    if name == "narrow":
        return f"{arguments[0]}.to({operand}.dtype)"
    return FUNCTIONS.get(name, f"torch.{name}({', '.join(['{}'] * len(arguments))})").format(
        *arguments
    )


# Axes.


@emission("rename")
def _rename(w: BlockWriter, item: Item, *, axis: str, to: str) -> PythonExpr:
    x = w.expr(item.operands[0])
    axes = tuple("+".join(to if name == axis else name for name in a.split("+")) for a in x.axes)
    return PythonExpr(x.text, axes, x.level)


HEADS = ("kv_head", "query_group")


@emission("split")
def _split(
    w: BlockWriter, item: Item, *, axis: str, into: tuple[tuple[str, int], ...]
) -> PythonExpr:
    x = w.with_axes(item.operands[0], axis)
    at = x.axes.index(axis)
    names = [name for name, _ in into]
    groups = [into]
    if tuple(names[:2]) == HEADS:
        # Both are heads of queries, and few operations tell them apart.
        groups = [((f"{HEADS[0]}+{HEADS[1]}", into[0][1] * into[1][1]), *into[2:])]
    (pairs,) = groups
    if len(pairs) == 1:
        return PythonExpr(x.text, (*x.axes[:at], pairs[0][0], *x.axes[at + 1 :]), x.level)
    texts = [w.literal(size, _size_hint(name)) for name, size in pairs]
    if _size_hint(pairs[0][0]).endswith("heads"):
        texts[0] = "-1"  # a device may have a part of the heads
    sizes = ", ".join(texts)
    where = at if at < len(x.axes) - 1 else -1
    axes = (*x.axes[:at], *(name for name, _ in pairs), *x.axes[at + 1 :])
    return PythonExpr(f"{x.atom}.unflatten({where}, ({sizes}))", axes)


def _size_hint(name: str) -> str:
    return "heads" if "+" in name else {"kv_head": "kv_heads", "head": "heads"}.get(name, name)


@emission("merge")
def _merge(w: BlockWriter, item: Item, *, axes: tuple[str, ...], into: str) -> PythonExpr:
    x = w.expr(item.operands[0])
    plain = [name for a in x.axes for name in a.split("+")]
    if not _consecutive(plain, axes):
        x = w.expanded(x)
        outer = [a for a in x.axes if a not in axes]
        first = len([a for a in x.axes[: x.axes.index(axes[0])] if a not in axes])
        x = w.permuted(x, [*outer[:first], *axes, *outer[first:]])
    merged = [i for i, a in enumerate(x.axes) if set(a.split("+")) & set(axes)]
    start, stop = merged[0], merged[-1]
    if {n for i in merged for n in x.axes[i].split("+")} != set(axes):
        x = w.expanded(x)
        return _merge_plain(x, axes, into)
    names = (*x.axes[:start], into, *x.axes[stop + 1 :])
    if start == stop:
        return PythonExpr(x.text, names, x.level)
    end = "" if stop == len(x.axes) - 1 else f", {stop}"
    return PythonExpr(f"{x.atom}.flatten({start}{end})", names)


def _merge_plain(x: PythonExpr, axes: tuple[str, ...], into: str) -> PythonExpr:
    start = x.axes.index(axes[0])
    stop = start + len(axes) - 1
    end = "" if stop == len(x.axes) - 1 else f", {stop}"
    names = (*x.axes[:start], into, *x.axes[stop + 1 :])
    return PythonExpr(f"{x.atom}.flatten({start}{end})", names)


def _consecutive(names: list[str], axes: tuple[str, ...]) -> bool:
    start = names.index(axes[0])
    return tuple(names[start : start + len(axes)]) == axes


@emission("broadcast")
def _broadcast(w: BlockWriter, item: Item) -> PythonExpr:
    x, like = (w.expr(v) for v in item.operands)
    if not x.axes:
        typed = item.operands[1].kind == item.operands[0].kind
        if not typed or not _is_number(item.operands[0]):
            new = f"torch.full({like.atom}.shape, {x.text}, device={like.atom}.device"
            if not (like_text := device_like(w)):
                return PythonExpr(f"{new}, dtype=torch.float64)", like.axes)
            w.helper("float_type")
            return PythonExpr(f"{new}, dtype=float_type({like_text}))", like.axes)
        return PythonExpr(f"torch.full_like({like.text}, {x.text})", like.axes)
    x = w.aligned(x, like.axes)
    return PythonExpr(f"{x.atom}.expand_as({like.text})", like.axes)


def _is_number(var: ProgramValue) -> bool:
    return var.item is not None and var.item.op == "constant"


@emission("slice")
def _slice(w: BlockWriter, item: Item, *, axis: str, start: int, stop: int) -> PythonExpr:
    x = w.with_axes(item.operands[0], axis)
    at = x.axes.index(axis)
    size = item.operands[0].size(axis)
    begin = w.literal(start, "start") if start else ""
    end = w.literal(stop, "stop") if stop != size else ""
    cut = f"{begin}:{end}"
    if at == len(x.axes) - 1 and at > 0:
        return PythonExpr(f"{x.atom}[..., {cut}]", x.axes)
    return PythonExpr(f"{x.atom}[{', '.join([':'] * at + [cut])}]", x.axes)


@emission("positions")
def _positions(w: BlockWriter, item: Item, *, axis: str) -> PythonExpr:
    x = w.with_axes(item.operands[0], axis)
    size = f"{x.atom}.shape[{x.axes.index(axis)}]"
    return PythonExpr(f"torch.arange({size}, device={x.atom}.device)", (axis,))


@emission("embedding", "embedding_module")
def _embedding(w: BlockWriter, item: Item, *, axis: str, module: str = "") -> PythonExpr:
    table, ids = item.operands
    index = w.expr(ids)
    if module and w.tree.is_module(item) and _is_tensor(ids):
        return PythonExpr(f"{w.tree.access(module)}({index.text})", (*index.axes, *table.axes[1:]))
    rows = w.expr(table)
    if not table.param and not _is_tensor(ids):
        at = rows.axes.index(axis)
        row = f"{rows.atom}[{', '.join([':'] * at + [index.text])}]"
        return PythonExpr(row, (*rows.axes[:at], *rows.axes[at + 1 :]))
    names = [axis, *(a for a in rows.axes if a != axis)]
    rows = w.permuted(rows, names)
    return PythonExpr(f"{rows.atom}[{index.text}]", (*index.axes, *names[1:]))


def _is_tensor(var: ProgramValue) -> bool:
    return not (var.item is not None and var.item.op == "constant")


def route_of(var: ProgramValue) -> Item | None:
    """Return what chooses the experts that indices name, none of which is then negative."""
    item = var.item
    if item is not None and item.op in ("slice", "rename"):
        return route_of(item.operands[0])
    return item if item is not None and item.op == "route" else None


@emission("one_hot")
def _one_hot(w: BlockWriter, item: Item, *, into: tuple[tuple[str, int], ...]) -> PythonExpr:
    ids = w.expr(item.operands[0])
    ((name, size),) = into
    route = route_of(item.operands[0])
    scores = w.values.get(route.operands[0]) if route is not None else None
    if scores is not None and scores.text.isidentifier():
        # Counted in the type of the scores: bfloat16 has no whole numbers above 256.
        ones = f"F.one_hot({ids.text}, {w.literal(size, name)}).to({scores.text}.dtype)"
        return PythonExpr(ones, (*ids.axes, name))
    w.helper("one_hot")
    text = f"one_hot({ids.text}, {w.literal(size, name)}, {device_like(w)})"
    return PythonExpr(text, (*ids.axes, name))


@emission("stack")
def _stack(w: BlockWriter, item: Item, *, axis: str) -> PythonExpr:
    exprs = [w.expr(v) for v in item.operands]
    first = exprs[0].axes
    texts = [w.permuted(e, first).text for e in exprs]
    lists = [text.rpartition("[")[0] for text in texts if text.endswith("]")]
    if len(lists) == len(texts) and all(name.endswith("_losses") for name in lists):
        text = " + ".join(dict.fromkeys(lists))
        if [user.op for user in item.result.users] == ["sum"]:
            return PythonExpr(f"filter(torch.is_tensor, {text})", (axis, *first))
        w.helper("stacked")
        return PythonExpr(f"stacked({text})", (axis, *first))
    return PythonExpr(f"torch.stack([{', '.join(texts)}])", (axis, *first))


@emission("join")
def _join(w: BlockWriter, item: Item, *, axis: str, parts: int) -> PythonExpr:
    if parts != 1:
        raise refuse(item, "parts", parts)
    exprs = [w.with_axes(v, axis) for v in item.operands]
    first = exprs[0].axes
    texts = [w.permuted(e, first).text for e in exprs]
    at = first.index(axis)
    where = at if at < len(first) - 1 else -1
    return PythonExpr(f"torch.cat([{', '.join(texts)}], dim={where})", first)


@emission("chunk")
def _chunk(w: BlockWriter, item: Item, *, axis: str, of: int, at: int, parts: int) -> PythonExpr:
    x = w.with_axes(item.operands[0], axis)
    dim = x.axes.index(axis)
    if parts == 1:
        return PythonExpr(f"{x.atom}.chunk({of}, dim={dim})[{at}]", x.axes)
    size = item.operands[0].size(axis) // (parts * of)
    index = ", ".join([":"] * (dim + 1) + [str(at)])
    cells = f"{x.atom}.unflatten({dim}, ({parts}, {of}, {size}))[{index}]"
    return PythonExpr(f"{cells}.flatten({dim}, {dim + 1})", x.axes)


# Products, norms and reductions.


@emission("linear")
def _linear(w: BlockWriter, item: Item, *, module: str, bias: bool) -> PythonExpr:
    x, weight = (w.expr(v) for v in item.operands[:2])
    over = item.operands[1].axes[1]
    x = with_last(w, x, over)
    axes = (*x.axes[:-1], item.operands[1].axes[0])
    if w.tree.is_module(item):
        return PythonExpr(f"{w.tree.access(module)}({x.text})", axes)
    further = f", {w.expr(item.operands[2]).text}" if bias else ""
    return PythonExpr(f"F.linear({x.text}, {weight.text}{further})", axes)


def with_last(w: BlockWriter, x: PythonExpr, axis: str) -> PythonExpr:
    """Return `x` with an axis in the last place."""
    if x.axes[-1] == axis:
        return x
    if axis not in x.axes:
        x = w.expanded(x)
    return w.permuted(x, [*(a for a in x.axes if a != axis), axis])


@emission("contract")
def _contract(w: BlockWriter, item: Item, *, over: tuple[str, ...], precision: str) -> PythonExpr:
    x, weight = (w.expr(v) for v in item.operands)
    if ROW in x.axes:
        return _contract_rows(w, item, over)
    wide = precision == "f32"
    if wide:
        w.helper("widened")

    def widened(expr: PythonExpr) -> str:
        return f"widened({expr.text})" if wide else expr.text

    if (
        len(over) == 1
        and set(weight.axes) - set(over)
        and not set(weight.axes) - set(over) & set(x.axes)
    ):
        x = with_last(w, x, over[0])
        out = [a for a in weight.axes if a not in over]
        axes = (*x.axes[:-1], *out)
        if len(out) == 1 and weight.axes[-1] == over[0]:
            return PythonExpr(f"F.linear({widened(x)}, {widened(weight)})", axes)
        if len(out) == 1:
            left, right = _operand(widened(x), x), _operand(widened(weight), weight)
            return PythonExpr(f"{left} @ {right}", axes, PRODUCT)
    if len(over) == 1 and weight.axes == over:
        x = with_last(w, x, over[0])
        text = f"{_operand(widened(x), x)} @ {_operand(widened(weight), weight)}"
        return PythonExpr(text, x.axes[:-1], PRODUCT)
    return _einsum(w, x, weight, over, widened)


def _operand(text: str, expr: PythonExpr) -> str:
    return text if text != expr.text else expr.at(PRODUCT + 1)


def _einsum(
    w: BlockWriter,
    x: PythonExpr,
    y: PythonExpr,
    over: tuple[str, ...],
    widened: Callable[[PythonExpr], str],
) -> PythonExpr:
    """Return a product as einsum has it, a letter an axis."""
    x, y = w.expanded(x), w.expanded(y)
    letters: dict[str, str] = {}
    for axis in (*x.axes, *y.axes):
        if axis not in letters:
            wanted = [c for c in axis.lower() if c.isascii() and c.isalpha()]
            every = [*wanted, *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
            letters[axis] = next(c for c in every if c not in letters.values())
    axes = tuple(a for a in dict.fromkeys((*x.axes, *y.axes)) if a not in over)
    left, right, result = ("".join(letters[a] for a in names) for names in (x.axes, y.axes, axes))
    formula = f"{left},{right}->{result}"
    return PythonExpr(f'torch.einsum("{formula}", {widened(x)}, {widened(y)})', axes)


def _contract_rows(w: BlockWriter, item: Item, over: tuple[str, ...]) -> PythonExpr:
    x, weight = (w.expr(v) for v in item.operands)
    if len(over) != 1:
        raise refuse(item, "over", over)
    if "expert" not in weight.axes:
        x = with_last(w, x, over[0])
        (out,) = (a for a in weight.axes if a not in over)
        weight = w.permuted(weight, [out, over[0]])
        return PythonExpr(f"F.linear({x.text}, {weight.text})", (*x.axes[:-1], out))
    outer = [a for a in weight.axes if a not in (*over, "expert")]
    if len(outer) != 1 or len(x.axes) != 2:
        raise refuse(item, "axes", weight.axes)
    weight = w.permuted(weight, ["expert", *outer, *over])
    return PythonExpr(f"rows.linear({x.text}, {weight.text})", (ROW, *outer))


def _reduced(x: PythonExpr, axes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    dims = [i for i, a in enumerate(x.axes) if a in axes]
    last = len(x.axes) - 1
    if len(dims) == len(x.axes):
        return "", ()
    text = str(-1 if dims == [last] else dims[0]) if len(dims) == 1 else str(tuple(dims))
    return text, tuple(a for a in x.axes if a not in axes)


@emission("sum", "mean")
def _sum(w: BlockWriter, item: Item, *, axes: tuple[str, ...]) -> PythonExpr:
    x = w.expr(item.operands[0])
    if is_losses(x.text):
        return PythonExpr(f"sum({x.text})")
    if not set(axes) <= set(x.axes):
        x = w.expanded(x)
    if (
        x.axes == axes
        and item.op == "sum"
        and len(axes) == 1
        and item.operands[0].size(axes[0]) == 1
    ):
        return PythonExpr(f"{x.atom}.squeeze(-1)", ())
    dims, names = _reduced(x, axes)
    return PythonExpr(f"{x.atom}.{item.op}({dims})", names)


@emission("max")
def _max(w: BlockWriter, item: Item, *, axes: tuple[str, ...]) -> PythonExpr:
    x = w.with_axes(item.operands[0], *axes)
    dims, names = _reduced(x, axes)
    return PythonExpr(f"{x.atom}.amax({dims})", names)


@emission("logsumexp")
def _logsumexp(w: BlockWriter, item: Item, *, axes: tuple[str, ...]) -> PythonExpr:
    x = w.with_axes(item.operands[0], *axes)
    dims, names = _reduced(x, axes)
    return PythonExpr(f"{x.atom}.logsumexp({dims or tuple(range(len(x.axes)))})", names)


@emission("softmax")
def _softmax(w: BlockWriter, item: Item, *, axis: str) -> PythonExpr:
    x = w.with_axes(item.operands[0], axis)
    at = x.axes.index(axis)
    dim = at if at < len(x.axes) - 1 else -1
    if _can_hide_all(item.operands[0]):
        return PythonExpr(f"{w.helper('masked_softmax')}({x.text}, {dim})", x.axes)
    return PythonExpr(f"{x.atom}.softmax({dim})", x.axes)


def _can_hide_all(scores: ProgramValue) -> bool:
    """Whether all scores of a query may be −∞: other masks than a causal one hide keys."""
    masks, visited, pending = set[ProgramValue](), {scores}, [scores]
    while pending:
        item = pending.pop().item
        if item is None:
            continue
        if item.op == "mask" and item.attrs["fill"] == -inf:
            masks.add(item.operands[1])
        if item.op == "constant" and item.attrs["value"] == -inf:
            return True
        if item.op in ("mask", "select", "add", "scale", "rename", "split", "merge", "broadcast"):
            pending += {*item.operands} - visited
            visited |= {*item.operands}
    return len(masks) > 1 or any(m.item is None or m.item.op != "causal" for m in masks)


@emission("rms_norm", "layer_norm", "rms_norm_module", "layer_norm_module")
def _norm(w: BlockWriter, item: Item, *, axis: str, eps: float, module: str = "") -> PythonExpr:
    x = with_last(w, w.expr(item.operands[0]), axis)
    if module and w.tree.is_module(item):
        return PythonExpr(f"{w.tree.access(module)}({x.text})", x.axes)
    vectors = ", ".join(w.expr(v).text for v in item.operands[1:])
    name = "rms_norm" if "rms" in item.op else "layer_norm"
    size = w.literal(item.operands[0].size(axis), axis)
    return PythonExpr(
        f"F.{name}({x.text}, ({size},), {vectors}, eps={w.literal(eps, 'eps')})", x.axes
    )


@emission("convolve")
def _convolve(
    w: BlockWriter,
    item: Item,
    *,
    over: tuple[str, ...],
    along: tuple[str, ...],
    taps: tuple[str, ...],
    stride: int,
    padding: int,
) -> PythonExpr:
    x, weight = (w.expr(v) for v in item.operands)
    outer = [a for a in x.axes if a not in (*over, *along)]
    out = [a for a in weight.axes if a not in (*over, *taps)]
    if len(over) != 1 or len(outer) != 1 or len(out) != 1 or len(along) > 3:
        raise refuse(item, "over", over)
    x = w.permuted(x, [*outer, *over, *along])
    weight = w.permuted(weight, [*out, *over, *taps])
    steps = f", stride={w.literal(stride, 'stride')}" if stride != 1 else ""
    zeros = f", padding={w.literal(padding, 'padding')}" if padding else ""
    text = f"F.conv{len(along)}d({x.text}, {weight.text}{steps}{zeros})"
    return w.permuted(PythonExpr(text, (*outer, *out, *along)), [*outer, *along, *out])
