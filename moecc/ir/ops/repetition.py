"""Repetition: ``scan`` and its body, stacking values, and picking from a stack.

``scan`` is the only operation with a region.  The body is a closed graph: what it uses of the
enclosing graph is an operand of the scan, so use lists, rewrites and dead-code elimination see
every use without looking inside.  Values of a layer have names that rematerialisation may save for
the gradient: a backend tags the result of a node with its name, and ``scan {remat=save, save=(…)}``
lists those that are saved.  ``jax`` stands for a part of a program that is no graph.
"""

from __future__ import annotations

from collections.abc import Iterator

from moecc.errors import InputError, Problem, raise_problems
from moecc.ir.arrays import Array
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.operand import Attrs, Operand
from moecc.ir.operation import AxisName, AxisSizes, Body, Int, Op, OpDef, Word, Words, operation
from moecc.ir.ops.contraction import AlongAxisOp
from moecc.ir.ops.elementwise import dtype_of
from moecc.ir.ops.rules import axis_of, by_name, no_duplicates, no_ragged
from moecc.ir.traits import CollectiveKind, RowMove
from moecc.support.lazy import np
from moecc.terms import tensor as terms
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra
from moecc.types import Axis, TensorType

REMATERIALISATION = ("none", "block", "full", "save")
"""What a repetition keeps for the gradient: everything, its operands (of each of its layers under
``full``), or named values."""


def stacked(type: TensorType, axis: Axis) -> TensorType:
    """Return `type` with `axis` in front. Raises: InputError where that name is taken."""
    if axis.name in type:
        raise InputError(f"there is an axis {axis.name!r} already", found=str(type))
    return type.with_axes((axis, *type.axes))


def stacked_along(axis: str, *xs: Array) -> Array:
    """Return arrays stacked along a new first axis."""
    axes = xs[0].axes
    return Array(np.stack([x.to(axes) for x in xs]), (axis, *axes), xs[0].dtype)


def picked(x: Array, axis: str, at: int) -> Array:
    """Return the data at one position of an axis."""
    axes = tuple(a for a in x.axes if a != axis)
    # Made contiguous, as if it had never been part of a stack, so that it rounds the same.
    return Array(np.array(x.to((axis, *axes))[at], order="C"), axes, x.dtype)


@operation("stack", "x", results=("stacked",), sharding=by_name, variadic=True, rearranges=True)
class StackOp(Op):
    """The operands, one after the other along a new axis, which is the first."""

    axis = AxisName("the new axis")

    def infer(self, *values: Operand) -> TensorType:
        first = values[0].type
        for value in values:
            if value.type != first:
                raise InputError(
                    "stacked values must have one type", expected=str(first), found=str(value.type)
                )
        if first.extents:
            raise InputError("values with extents cannot be stacked", found=str(first))
        return stacked(first, Axis(self.axis, len(values)))

    def meaning(self, *xs: Array) -> Array:
        return stacked_along(self.axis, *xs)

    def term(self, algebra: Algebra, *xs: Tensor) -> Tensor:
        return terms.stacked(xs, self.axis)


@operation("index", "x", linear=(0,), sharding=by_name, rearranges=True)
class IndexOp(AlongAxisOp):
    """x at one position of an axis, which is gone then."""

    at = Int("the position")

    def infer(self, x: Operand) -> TensorType:
        axis = axis_of(x.type, self.axis)
        no_ragged(x.type, (axis.name,), "cannot pick")
        if not isinstance(axis.size, int) or not 0 <= self.at < axis.size:
            raise InputError(
                f"there is no position {self.at} on the axis {axis.name!r}",
                found=str(x.type),
                expected="0 <= at < size, and a known size",
            )
        return x.type.without(axis.name)

    def meaning(self, x: Array) -> Array:
        return picked(x, self.axis, self.at)

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return x.moved(x.without(self.axis), {self.axis: algebra.number(self.at)})


def stacked_parts(value: Value, axis: str) -> list[Value] | None:
    """Return the values that `value` stacks along `axis`, or None if it is no stack."""
    node = value.node
    if node is None or node.op.name != "stack" or node.attrs["axis"] != axis:
        return None
    return list(node.operands)


def picked_at(node: Node, axis: str) -> int | None:
    """Return the position of `axis` that `node` picks from its operand, or None."""
    if node.op.name != "index" or node.attrs["axis"] != axis:
        return None
    return IndexOp.of_node(node).at


def repetitions(attrs: Attrs) -> tuple[str, int]:
    """Return the name of the axis that a ``scan`` runs along, and how often the body runs."""
    (over,) = attrs["over"]
    return over  # type: ignore[no-any-return]


def _all_axes(operands: tuple[Operand, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for v in operands for name in v.type.names))


@operation("scan", "x", results=("y",), variadic=True, places=True)
class ScanOp(Op):
    """The body, run once for each position of an axis, one after the other.

    Operands are the carries, then the stacked ones, then the captured ones; the body has an
    input for each. A carry goes in as it came out of the run before. A stacked operand goes in
    at the position of the run, without the axis. A captured one goes in as it is. The body
    returns the carries, then what is stacked: results are the last carries, and the others of
    all runs along the axis, which comes first.

    remat is what is kept of a run for the gradient. none: all values that the gradient needs,
    but for parameters, which are gathered again. full: the operands of the run alone; the rest
    is computed again, and within a run of several layers, layer by layer once more where they
    are alike. block: the same, but a run is computed again once, as a whole. save: the values
    of the names in `save`, which a backend gives, and the rest is computed again. It never
    changes a value.
    """

    over = AxisSizes("the axis, and how often the body runs", pins=True)
    carries = Int("how many of the operands are carries", 0)
    stacked = Int("how many of them are stacked", 0)
    remat = Word("what is kept for the gradient", "none", choices=REMATERIALISATION)
    save = Words("remat=save: the names of what is kept", ())
    body = Body("what is repeated, in braces after the line")

    def infer(self, *operands: Operand) -> tuple[TensorType, ...]:
        over, carries = self.over, self.carries
        if len(over) != 1 or not isinstance(over[0][1], int) or over[0][1] < 1:
            raise InputError("a scan runs along one axis of known size", found=str(over))
        if carries < 0 or self.stacked < 0 or carries + self.stacked > len(operands):
            raise InputError(
                "a scan has carries, then stacked operands, then captured ones",
                expected=f"carries + stacked <= {len(operands)}, the operands",
                found=f"{carries} + {self.stacked}",
            )
        if self.save and self.remat != "save":
            raise InputError("names are saved under remat=save alone", found=f"remat={self.remat}")
        axis = Axis(*over[0])
        problems = [*self._body_problems(), *self._operand_problems(operands, axis)]
        raise_problems(problems)
        types = [v.type for v in self.body.terminator.operands]
        return (*types[:carries], *(stacked(t, axis) for t in types[carries:]))

    def _body_problems(self) -> Iterator[Problem]:
        body: Graph = self.body
        further = [*(f"param %{n}" for n in body.params), *(n for n in body.attrs if n != MESH)]
        if further:
            message = "a body contains only inputs, nodes and outputs"
            yield Problem(message, found=", ".join(further))
        if len(body.output_names) < max(self.carries, 1):
            yield Problem(
                "a body returns its carries, and at least one value",
                expected=f"{max(self.carries, 1)} outputs",
                found=str(len(body.output_names)),
            )
        if any(node.body is not None for node in body):
            yield Problem("a scan within a scan", hint="unroll the inner one")
        boundary = (*body.inputs.values(), *body.terminator.operands)
        if ragged := [f"{value!r}" for value in boundary if value.type.extents]:
            message = "values with extents cannot enter or leave a body"
            yield Problem(message, found=", ".join(ragged))

    def _operand_problems(self, operands: tuple[Operand, ...], axis: Axis) -> Iterator[Problem]:
        body: Graph = self.body
        types = [v.type for v in operands]
        for at in range(self.carries, self.carries + self.stacked):
            if axis.name not in types[at] or types[at][axis.name].size != axis.size:
                message = f"operand {at} is stacked and has no axis {axis}"
                yield Problem(message, found=repr(operands[at]))
                return
            types[at] = types[at].without(axis.name)
        inputs = [v.type for v in body.inputs.values()]
        yield from _difference("the inputs of the body are not its operands", types, inputs)
        results = [v.type for v in body.terminator.operands[: self.carries]]
        message = "a carry leaves the body with another type than it enters with"
        yield from _difference(message, types[: len(results)], results)

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        # The body may contain anything, so a scan counts as mixing all axes of its operands.
        return _all_axes(operands)

    def meaning(self, *operands: Array) -> tuple[Array, ...]:
        """Run the body once for each position; rematerialisation has no effect here."""
        from moecc.ir.interpreter import run_body

        axis, runs = repetitions(self.attrs)
        carries, end = self.carries, self.carries + self.stacked
        carried, collected = operands[:carries], []
        for at in range(runs):
            slices = (picked(x, axis, at) for x in operands[carries:end])
            results = run_body(self.body, (*carried, *slices, *operands[end:]))
            carried = results[:carries]
            collected.append(results[carries:])
        return (*carried, *(stacked_along(axis, *xs) for xs in zip(*collected, strict=True)))


def _difference(
    message: str, expected: list[TensorType], actual: list[TensorType]
) -> Iterator[Problem]:
    """Yield the first difference of two lists of types."""
    if expected == actual:
        return
    for at, (a, b) in enumerate(zip(expected, actual, strict=False)):
        if a != b:
            yield Problem(f"{message}: number {at}", expected=str(a), found=str(b))
            return
    yield Problem(message, expected=f"{len(expected)}", found=f"{len(actual)}")


@operation("jax", "x", results=("x",), variadic=True, opaque=True)
class JaxOp(Op):
    """A part of a function of JAX, which only the function itself can compute.

    It shows what blocks depend on: where each takes its input from, and how much of the
    program is around them.  No backend runs it; counts of FLOPs and memory leave it out.
    """

    into = AxisSizes("the axes of the result and their sizes")
    dtype = Word("the element type of the result", "f32")
    equations = Int("how many equations it has", 0)
    lines = Word("its first and its last line in the program", "")

    def infer(self, *operands: Operand) -> TensorType:
        dtype = dtype_of(self.dtype)
        return TensorType(dtype, no_duplicates(Axis(n, s) for n, s in self.into))

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return _all_axes(operands)

    def meaning(self, *operands: Array) -> Array:
        raise InputError(
            "a region of JAX is computed by its function alone",
            where=self.lines or None,
            hint="moe(function) of `moecc.jax` runs the blocks in it",
        )


KEPT = ("router", "rows", "experts", "combine", "attention")
"""A router's logits, dispatched rows, the experts' results, and the outputs of sublayers."""

DEFAULT = KEPT[-2:]
"""The names saved by default: what the sublayers add to the residual stream."""

_MOVED = {RowMove.TO_SLOTS: "rows", RowMove.TO_TOKENS: "combine"}

_STEPS_TO_ROUTE = 4
"""How many nodes to look ahead for the choice: a residual stream is an endless chain of sums."""

_STEPS_TO_ATTENTION = 3
"""How many nodes a projection may be away from the product with the attention weights."""


def remat_name(node: Node) -> str | None:
    """Return the name of the result of `node`, by its producer or users; None for most nodes.

    The result of a collective on a value that is saved by default has the same name, so that it is
    not sent again.
    """
    if node.op.collective is CollectiveKind.BRINGS and node.operands[0].node is not None:
        before = remat_name(node.operands[0].node)
        return before if before in DEFAULT else None
    if node.op.moves in _MOVED:
        return _MOVED[node.op.moves]
    if any(
        user.op.moves is RowMove.TO_TOKENS and user.operands[0] is value
        for value in node.results
        for user in value.users
    ):
        return "experts"
    if _feeds_route(node):
        return "router"
    return "attention" if _projects_attention(node) else None


def _feeds_route(node: Node) -> bool:
    """Whether `node` makes the logits of a router, bare or after a few steps.

    This names a value; its precision is an attribute of ``contract``.
    """
    if not node.op.is_product:
        return False
    users = list(node.result.users)
    for _ in range(_STEPS_TO_ROUTE):
        if any(user.op.chooses for user in users):
            return True
        between = [user for user in users if _passes_scores(user.op)]
        users = [later for user in between for later in user.result.users]
    return False


def _passes_scores(entry: OpDef) -> bool:
    """Whether scores remain scores after `entry`: a bias, noise, a mask, slices, shares."""
    within = entry.elementwise and (bool(entry.linear) or entry.logical)
    return within or entry.carries or entry.is_distribution


def _projects_attention(node: Node) -> bool:
    """Whether `node` projects the product of the values with the attention weights."""
    source = node.operands[0].node if node.op.is_product else None
    for _ in range(_STEPS_TO_ATTENTION):
        if source is None or source.op.is_product or source.op.attends:
            break
        source = source.operands[0].node if source.operands else None
    if source is None or not source.op.is_product:
        return source is not None and source.op.attends
    return _is_softmax(source.operands[0])


def _is_softmax(weights: Value) -> bool:
    # Dropout may be applied between the softmax and its use.
    near = [weights, *(weights.node.operands if weights.node is not None else ())]
    return any(v.node is not None and v.node.op.is_distribution for v in near)
