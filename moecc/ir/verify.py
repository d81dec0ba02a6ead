"""The verifier: what must hold of every graph, checked after every pass."""

from __future__ import annotations

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.types import TensorType

MAX_PROBLEMS = 20


class VerifyError(InputError):
    """A graph that breaks a rule of the IR."""


def verify(graph: Graph) -> None:
    """Check that `graph` is well-formed.

    Each value is defined once and before its uses; use lists agree with operands; attributes suit
    the table; types are those that follow from the operands; each parameter's axes are those of
    its weight expression; at least one output.

    Raises:
      VerifyError: with all problems found, up to a limit.
    """
    problems: list[Problem] = []
    defined: set[Value] = set(graph.inputs.values()) | set(graph.params.values())
    for value in graph.params.values():
        problems.extend(_check_param(value))
    count = 0
    for node in graph:
        count += 1
        _check_node(node, defined, problems)
        defined.update(node.results)
        if len(problems) >= MAX_PROBLEMS:
            raise VerifyError(problems)
    _check_uses(graph.terminator, defined, problems)
    if count != graph.node_count:
        problems.append(Problem(f"the graph counts {graph.node_count} nodes and has {count}"))
    if not graph.output_names:
        problems.append(Problem("the graph has no output"))
    for value in defined:
        problems.extend(_check_users(value, defined))
    if problems:
        raise VerifyError(problems[:MAX_PROBLEMS])


def where(node: Node) -> str:
    """Return how messages call a node: its first result, operation and location."""
    name = f"%{node.results[0].name} = " if node.results else ""
    loc = f" @{node.loc}" if node.loc else ""
    origin = f" by {node.origin}" if node.origin else ""
    return f"{name}{node.op.name}{loc}{origin}"


def _check_node(node: Node, defined: set[Value], problems: list[Problem]) -> None:
    _check_uses(node, defined, problems)
    try:
        node.op.check_arity(len(node.operands))
        full = node.op.complete(node.attrs)
        types = node.op.infer(node.operands, full)
    except InputError as error:
        problems.extend(
            Problem(p.what, where(node), p.expected, p.found, p.hint) for p in error.problems
        )
        return
    have = tuple(v.type for v in node.results)
    if have != types:
        problems.append(
            Problem(
                "the type does not follow from the operands",
                where(node),
                ", ".join(map(str, types)),
                ", ".join(map(str, have)),
                "infer it again after changing operands or attributes",
            )
        )


def _check_uses(node: Node, defined: set[Value], problems: list[Problem]) -> None:
    for value in node.operands:
        if value not in defined:
            problems.append(
                Problem(
                    f"%{value.name} is used before it is defined",
                    where(node),
                    hint="insert the new node before its users",
                )
            )
        if value.users.get(node, 0) != sum(v is value for v in node.operands):
            problems.append(Problem(f"the use list of %{value.name} is wrong", where(node)))


def _check_users(value: Value, defined: set[Value]) -> list[Problem]:
    graph = value.graph
    bad = [
        Problem(f"%{value.name} lists a user that is not in the graph: {where(user)}")
        for user in value.users
        if user is not graph.terminator and not (user.alive and user.graph is graph)
    ]
    bad += [
        Problem(f"the type of %{value.name} refers to %{e.value.name}, which is not in the graph")
        for e in value.type.extents
        if e.value not in defined
    ]
    if value.name not in graph or graph.value(value.name) is not value:
        bad.append(Problem(f"the name %{value.name} leads to another value"))
    return bad


def _layout(type: TensorType) -> tuple[tuple[str, object], ...]:
    return tuple((a.name, a.size) for a in type.axes)


def _check_param(value: Value) -> list[Problem]:
    if value.weight is None:
        return []
    made = value.weight.type
    if _layout(made) == _layout(value.type):
        return []
    return [
        Problem(
            "the weight expression makes other axes than the parameter has",
            f"param %{value.name}",
            str(value.type),
            str(made),
        )
    ]
