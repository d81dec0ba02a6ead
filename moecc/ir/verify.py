"""The verifier: invariants of every graph, checked after every pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.mesh import Mesh, mesh_of, sharding_problems
from moecc.ir.ops.repetition import repetitions
from moecc.support.ranges import lengths
from moecc.types import TensorType

MAX_PROBLEMS = 20

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./\-]*\Z")
_LOC = re.compile(r"\S+\Z")


class VerifyError(InputError):
    """A graph that violates an invariant of the IR."""


def verify(graph: Graph) -> None:
    """Check that `graph` is well-formed.

    Each value is defined once and before its uses; use lists agree with operands; attributes are
    valid for the table; types are as inferred from the operands, and shardable on the mesh; each
    parameter's axes are those of its weight expression; names and locations can be printed; there
    is at least one output.

    Raises:
      VerifyError: with all problems found, up to a limit.
    """
    problems: list[Problem] = []
    defined: set[Value] = set(graph.inputs.values()) | set(graph.params.values())
    for value in graph.params.values():
        problems.extend(check_param(value))
    count = 0
    for node in graph:
        count += 1
        _check_node(node, defined, problems)
        defined.update(node.results)
        # A cycle of links would otherwise be followed forever.
        if len(problems) >= MAX_PROBLEMS or count > graph.node_count:
            break
    _check_uses(graph.terminator, defined, problems)
    problems.extend(_check_words(graph))
    if count != graph.node_count:
        problems.append(Problem(f"the graph counts {graph.node_count} nodes and has {count}"))
    if len(graph._names) != len(defined):
        problems.append(Problem("the graph has names for values that are not in it"))
    if not graph.output_names:
        problems.append(Problem("the graph has no output"))
    mesh = _mesh(graph, problems)
    for value in defined:
        problems.extend(_check_value(value, graph, defined, mesh))
    if problems:
        raise VerifyError(problems[:MAX_PROBLEMS])


def _mesh(graph: Graph, problems: list[Problem]) -> Mesh | None:
    try:
        return mesh_of(graph)
    except InputError as error:
        problems.extend(replace(p, where="attribute mesh") for p in error.problems)
        return None


def _check_words(graph: Graph) -> Iterator[Problem]:
    """Yield the names, besides those of values and axes, that would not parse back unchanged."""
    for table in (graph.inputs, graph.params):
        wrong = [(name, value) for name, value in table.items() if name != value.name]
        yield from (Problem(f"%{v.name} is listed as %{n}") for n, v in wrong)
    named = [("graph", graph.name), *(("attribute", n) for n in graph.attrs)]
    named += [("output", n) for n in graph.output_names]
    for kind, name in named:
        if not _WORD.match(name):
            yield Problem(
                f"{name!r} is not a valid name of the {kind}", hint="letters, digits, _./-"
            )
    for value in graph.params.values():
        if value.loc and not _LOC.match(value.loc):
            yield Problem(f"the location {value.loc!r} has a space", f"param %{value.name}")


def _check_node(node: Node, defined: set[Value], problems: list[Problem]) -> None:
    _check_uses(node, defined, problems)
    if node._next._prev is not node or node._prev._next is not node:
        problems.append(Problem("the links of the list of nodes disagree", where(node)))
    if any(v.node is not node or v.index != i for i, v in enumerate(node.results)):
        problems.append(Problem("a result belongs to another node", where(node)))
    if node.loc and not _LOC.match(node.loc):
        problems.append(Problem(f"the location {node.loc!r} has a space", where(node)))
    if node.origin and not _WORD.match(node.origin):
        problems.append(Problem(f"{node.origin!r} is not a valid pass and rewrite", where(node)))
    try:
        node.op.check_arity(len(node.operands))
        full = node.op.complete(node.attrs)
        types = node.op.result_types(node.operands, full)
    except InputError as error:
        problems.extend(replace(problem, where=where(node)) for problem in error.problems)
        return
    if full != node.attrs:
        problems.append(
            Problem("the attributes are not complete", where(node), str(full), str(node.attrs))
        )
    have = tuple(v.type for v in node.results)
    if have != types:
        problems.append(
            Problem(
                "the type is not the one inferred from the operands",
                where(node),
                ", ".join(map(str, types)),
                ", ".join(map(str, have)),
                "infer it again after changing operands or attributes",
            )
        )
    if node.body is not None:
        problems.extend(_check_body(node, node.body))


def _check_body(node: Node, body: Graph) -> Iterator[Problem]:
    """Yield the problems within a node's body."""
    try:
        verify(body)
    except VerifyError as error:
        for problem in error.problems:
            yield replace(problem, where=f"{where(node)}: {problem.where or 'its body'}")
    if body.attrs.get(MESH) != node.graph.attrs.get(MESH):
        body_mesh, wanted = (str(g.attrs.get(MESH)) for g in (body, node.graph))
        yield Problem("the body has another mesh than the graph", where(node), wanted, body_mesh)
    _, runs = repetitions(node.attrs)
    for inner in body:
        if not lengths(inner.loc) <= {runs}:
            message = f"the location {inner.loc!r} is not one per iteration"
            yield Problem(message, where(node), f"ranges of {runs} numbers")


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
        if value.users.get(node, 0) != node.operands.count(value):
            problems.append(Problem(f"the use list of %{value.name} is wrong", where(node)))


def _check_value(
    value: Value, graph: Graph, defined: set[Value], mesh: Mesh | None
) -> Iterator[Problem]:
    for user, times in value.users.items():
        here = user is graph.terminator or (user.alive and user.graph is graph)
        if not here:
            yield Problem(f"%{value.name} lists a user that is not in the graph: {where(user)}")
        elif times != user.operands.count(value):
            yield Problem(f"%{value.name} lists a user that does not use it: {where(user)}")
    for extent in value.type.extents:
        if extent.value not in defined:
            setter = extent.value.name
            yield Problem(
                f"the type of %{value.name} refers to %{setter}, which is not in the graph"
            )
    for problem in sharding_problems(value.type, mesh):
        yield replace(problem, where=f"%{value.name}")
    if value.graph is not graph:
        yield Problem(f"%{value.name} belongs to another graph")
    if value.name not in graph or graph.value(value.name) is not value:
        yield Problem(f"the name %{value.name} leads to another value")


def _layout(type: TensorType) -> tuple[tuple[str, object], ...]:
    return tuple((a.name, a.size) for a in type.axes)


def check_param(value: Value) -> list[Problem]:
    """Return the problems of a parameter's weight expression: other axes, or nothing."""
    if value.weight is None:
        return []
    weight_type = value.weight.type
    if _layout(weight_type) == _layout(value.type):
        return []
    return [
        Problem(
            "the weight expression has other axes than the parameter",
            f"param %{value.name}",
            str(value.type),
            str(weight_type),
        )
    ]
