"""The interpreter: evaluates a graph, node by node, in NumPy and float64.

It is the oracle: the plainest code that defines the operations.  Values are computed in
float64 whatever their declared type, so that two graphs that are equal in real arithmetic agree
to 1e-12 or so; only a cast to a narrower type rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moecc.errors import InputError, OwnOperationError, Problem, nearest, raise_problems
from moecc.ir.arrays import Array, Data, SlotAssignment, poisoned, stored
from moecc.ir.graph import Graph, Node, Value, setter_of, where
from moecc.support.lazy import np
from moecc.types import Arrays, Extent

Disturbance = Callable[[Node, Data], Data]
"""Returns a float result of a node with errors."""


@dataclass(frozen=True)
class ReferenceProgram:
    """A graph run by the interpreter, in one process.

    Attributes:
      graph: the graph.
      disturb: changes each float result of a node before it is read, as rounding would.
    """

    graph: Graph
    disturb: Disturbance | None = None
    writes = True

    def run(self, params: Arrays, inputs: Arrays) -> dict[str, Data]:
        """Return the outputs by name: floats as float64, others in their types.

        Raises:
          InputError: an array is missing or does not match its type, or an index is out of range.
        """
        outputs = self.graph.outputs
        returned = set(outputs.values())
        values = {v: a.data for v, a in self.trace(params, inputs) if v in returned}
        return {
            name: data if data.dtype == np.float64 else data.astype(value.type.dtype.numpy)
            for name, value in outputs.items()
            for data in (values[value],)
        }

    def trace(self, params: Arrays, inputs: Arrays) -> Iterator[tuple[Value, Array]]:
        """Yield every input, used parameter and result with its array, in order of computation.

        Raises:
          InputError: as `run`.
        """
        bound = bind(self.graph, params, inputs)
        state = _State({}, {}, {v: sum(v.users.values()) for v in bound}, self.disturb)
        for value in bound:
            if value.is_output:
                yield value, state.load(value, bound)
        for node in self.graph:
            for operand in node.operands:
                if operand in bound and operand not in state.arrays:
                    yield operand, state.load(operand, bound)
            yield from state.step(node)


@dataclass
class _State:
    """Arrays of the values that are still needed, and the slot assignments, which are small."""

    arrays: dict[Value, Array]
    assignments: dict[Value, SlotAssignment]
    left: dict[Value, int]
    disturb: Disturbance | None = None

    def load(self, value: Value, bound: Mapping[Value, Data]) -> Array:
        """Return the array of `value` in the interpreter's representation."""
        dtype = value.type.dtype
        data = np.asarray(stored(bound[value], dtype), order="C")
        self.arrays[value] = Array(data, value.type.names, dtype)
        return self.arrays[value]

    def step(self, node: Node) -> list[tuple[Value, Array]]:
        """Return the results of `node`, and drop the operands that have no further use."""
        operands = [self.arrays[v] for v in node.operands]
        try:
            with np.errstate(all="ignore"):
                results = node.op.evaluate(operands, node.attrs)
        except InputError as error:
            raise type(error)(
                replace(p, where=p.where or where(node)) for p in error.problems
            ) from None
        if node.op.source is not None:
            raise_problems(_of_other_shapes(node, operands, results), OwnOperationError)
        arrays = [*map(self.finish, results, node.results)]
        if self.disturb is not None:
            arrays = [
                replace(a, data=self.disturb(node, a.data)) if v.type.dtype.is_float else a
                for v, a in zip(node.results, arrays, strict=True)
            ]
        pairs = list(zip(node.results, arrays, strict=True))
        for value, array in pairs:
            self.left[value] = sum(value.users.values())
            self.arrays[value] = array
        for value in node.operands:
            self.left[value] -= 1
        for value in {*node.operands, *node.results}:
            if not self.left[value]:
                del self.arrays[value]
        return pairs

    def finish(self, array: Array, value: Value) -> Array:
        """Return a result with its declared type, and with nothing beyond ragged extents."""
        if array.assignment is not None:
            self.assignments[value] = array.assignment
        ragged = value.type.ragged
        if ragged is not None and isinstance(ragged.size, Extent):
            array = poisoned(array, ragged.name, self.assignments[setter_of(ragged.size)])
        # NumPy adds in the order of memory: in another one the last bit of a sum differs, and what
        # only copies its operand (a slice of all of it) would not be the identity.
        return replace(array, data=np.asarray(array.data, order="C"), dtype=value.type.dtype)


def _of_other_shapes(
    node: Node, operands: Sequence[Array], results: Sequence[Array]
) -> Iterator[Problem]:
    """Yield the results of a meaning that have not the axes and sizes of their types."""
    if len(results) != len(node.results):
        yield Problem(f"the meaning of {node.op} returns other results than its type rule",
                      where(node), str(len(node.results)), str(len(results)))  # fmt: skip
        return
    pairs = zip(node.operands, operands, strict=True)
    sizes: dict[object, int] = {a.size: x.size(a.name) for v, x in pairs for a in v.type.axes}
    for value, array in zip(node.results, results, strict=True):
        axes, shape = value.type.axes, np.shape(array.data)
        fits = array.axes == value.type.names and len(shape) == len(axes)
        stated = [sizes.get(a.size, a.size) for a in axes]
        # The slots of an assignment, and what only the result has, may have any size.
        if not fits or any(
            isinstance(s, int) and s != n for s, n in zip(stated, shape, strict=True)
        ):
            yield Problem(f"the meaning of {node.op} returns another shape than its type rule",
                          where(node), f"{value.type}, here {tuple(stated)}",
                          f"axes ({', '.join(array.axes)}) of shape {shape}",
                          f"mend one of them in {node.op.source}")  # fmt: skip


def run_body(body: Graph, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Return the outputs, in order, of a body.

    Args:
      body: the graph.
      arrays: its inputs in this iteration, in order.

    Raises:
      InputError: a node is not defined for the data.
    """
    inputs = dict(zip(body.inputs.values(), arrays, strict=True))
    # Outputs are uses too, so results are never dropped before the end.
    state = _State(inputs, {}, {v: sum(v.users.values()) for v in inputs})
    for node in body:
        state.step(node)
    return tuple(state.arrays[v] for v in body.terminator.operands)


def bind(graph: Graph, params: Arrays, inputs: Arrays) -> dict[Value, Data]:
    """Return the given arrays by value, checked against the types.

    Raises:
      InputError: with every array that is missing or does not match.
    """
    problems: list[Problem] = []
    sizes: dict[str, tuple[int, str]] = {}
    bound: dict[Value, Data] = {}
    for kind, values, arrays in (("input", graph.inputs, inputs), ("param", graph.params, params)):
        for name, value in values.items():
            here = f"{kind} %{name}"
            if name not in arrays:
                hint = nearest(name, arrays)
                problems.append(Problem("the array is missing", here, str(value.type), None, hint))
                continue
            bound[value] = np.asarray(arrays[name])
            problems.extend(_misfits(value, bound[value], here, sizes))
    raise_problems(problems)
    return bound


def _misfits(
    value: Value, data: Data, here: str, sizes: dict[str, tuple[int, str]]
) -> Iterator[Problem]:
    actual = f"{data.dtype}[{', '.join(map(str, data.shape))}]"
    # Keys are stored as unsigned integers, which NumPy cannot distinguish from numbers.
    if _kind(data.dtype) != value.type.dtype.kind.replace("key", "int"):
        yield Problem("the array has elements of another kind", here, str(value.type), actual)
    if data.ndim != value.type.rank:
        yield Problem("the array has another number of axes", here, str(value.type), actual)
        return
    for axis, size in zip(value.type.axes, data.shape, strict=True):
        if isinstance(axis.size, int) and axis.size != size:
            message = f"the axis {axis.name!r} has another size"
            yield Problem(message, here, str(value.type), actual)
        if isinstance(axis.size, str):
            expected_size, first = sizes.setdefault(axis.size, (size, here))
            if expected_size != size:
                message = f"the size {axis.size} is {expected_size} in {first}"
                yield Problem(message, here, str(value.type), actual)


def _kind(dtype: np.dtype[Any]) -> str:
    """Return the kind, as in `DType`, of a NumPy or ml_dtypes type."""
    if dtype.kind == "V" and dtype.names is None and "float" in dtype.name:
        return "float"
    return {"f": "float", "i": "int", "u": "int", "b": "bool"}.get(dtype.kind, dtype.name)
