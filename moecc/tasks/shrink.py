"""A graph at reduced sizes, on which the reference interpreter can check promises of passes.

A graph as imported is built again from a smaller config.  Any other graph is
shrunk by its size constraints: equal numbers stay equal, the parts of a split or merge still make
up the whole, slices still cut at the same fractions, and experts and top-k stay.  Its parameters
become source tensors, which are drawn at random; parameters themselves cannot be drawn, since those
that a pass copies from each other would then differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import gcd, prod
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.operand import Attrs
from moecc.ir.structure import without_opaque
from moecc.ir.traits import Cut, Product
from moecc.support.untyped import JsonDict
from moecc.types import Axis, TensorType

if TYPE_CHECKING:
    from moecc.weights.expr import Expr

KEPT = 8
"""Sizes up to this are not reduced."""

MAX_SIZE = 24
"""The largest value of an unconstrained size."""

MAX_ELEMENTS = 4_000_000
"""The limit on the elements of all parameters together, for the interpreter."""

Form = tuple[int, tuple[int, ...]]
"""A size as a product: a fixed factor, and other sizes to be reduced."""


def reduced(graph: Graph) -> Graph:
    """Return `graph` at reduced sizes, its parameters made from sources.

    Raises:
      InputError: the graph is not reducible, with the reason.
    """
    graph = without_opaque(graph)
    again = _from_config(graph)
    if again is not None:
        return again
    sizes = reduce_sizes(graph)
    try:
        small = resized(graph, sizes)
    except InputError as error:
        raise not_reducible(error.problems[0].what, error.problems[0].where) from None
    count = sum(prod(s for s in v.type.sizes if isinstance(s, int)) for v in small.params.values())
    if count > MAX_ELEMENTS:
        largest = max((s for v in small.params.values() for s in v.type.sizes), key=_number)
        raise not_reducible(f"{count:,} elements are left, and the size {largest} cannot shrink")
    return small


def small_if_possible(graph: Graph) -> Graph:
    """Return `graph` at reduced sizes, or as it is if it cannot be reduced."""
    try:
        return reduced(graph)
    except InputError:
        return graph


def not_reducible(why: str, where: str | None = None) -> InputError:
    """Return the error for a graph that cannot be reduced."""
    return InputError(
        f"the graph is not reducible, so it cannot be checked: {why}",
        where=where,
        hint="check the graph as `moecc import` writes it, before other passes",
    )


def _number(size: object) -> int:
    return size if isinstance(size, int) else 0


def _from_config(graph: Graph) -> Graph | None:
    """Return the graph built from a reduced config, or None if the graph was changed since."""
    if not {"family", "config"} <= set(graph.attrs):
        return None
    from moecc.families import rebuild

    try:
        whole = rebuild(graph.attrs, shrink=False)
        small = rebuild(graph.attrs, shrink=True)
    except InputError:
        return None
    # A rewritten graph keeps its config, but differs from what the config builds.
    return small if _skeleton(whole) == _skeleton(graph) else None


def _skeleton(graph: Graph) -> list[tuple[str, str, int]]:
    return [(n.op.name, n.loc, len(n.operands)) for n in graph]


def _source(value: Value) -> Expr | None:
    from moecc.weights.expr import Source

    if not value.type.is_static or not value.type.dtype.is_float:
        return None
    plain = TensorType(value.type.dtype, tuple(Axis(a.name, a.size) for a in value.type))
    return Source(value.name, plain)


def reduce_sizes(graph: Graph) -> dict[int, int]:
    """Return a reduced size for each fixed size of `graph`.

    Sizes for which the constraints leave no other value are not reduced.
    """
    pinned, forms = _constraints(graph)
    numbers = {s for v in _values(graph) for s in v.type.sizes if isinstance(s, int)}
    numbers |= {part for some in forms.values() for _, parts in some for part in parts}
    while True:
        sizes = _settle(sorted(numbers | set(forms)), pinned, forms)
        if isinstance(sizes, dict):
            return sizes
        # Two products disagree: the size and its parts are kept.
        pinned.add(sizes)
        pinned.update(part for _, parts in forms[sizes] for part in parts)


def _settle(
    numbers: Iterable[int], pinned: set[int], forms: Mapping[int, set[Form]]
) -> dict[int, int] | int:
    """Return reduced sizes, or the first number with two contradicting sizes."""
    from moecc.families.shrinking import shrink_size

    sizes: dict[int, int] = {}
    # The parts of a number are smaller, so they are settled before it.
    for number in numbers:
        made = {factor * prod(sizes[p] for p in parts) for factor, parts in forms.get(number, ())}
        if number in pinned or number <= KEPT:
            made.add(number)
        if len(made) > 1:
            return number
        sizes[number] = made.pop() if made else shrink_size(number, MAX_SIZE)
    return sizes


def _values(graph: Graph) -> Iterable[Value]:
    yield from graph.inputs.values()
    yield from graph.params.values()
    for node in graph.every_node():
        yield from node.results
        if node.body is not None:
            yield from node.body.inputs.values()


def _constraints(graph: Graph) -> tuple[set[int], dict[int, set[Form]]]:
    """Return the sizes to keep, and the products that sizes must equal."""
    pinned: set[int] = set()
    forms: dict[int, set[Form]] = {}
    cuts: dict[int, int] = {}
    for node in graph.every_node():
        rule = None if node.op.sizes is None else node.op.sizes(node)
        if isinstance(rule, Product):
            # A part of size 1 makes the whole equal to another part, which then is the same number.
            parts = tuple(p for p in map(_number, rule.parts) if p > 1)
            if len(parts) > 1:
                forms.setdefault(_number(rule.whole), set()).add((1, parts))
        elif isinstance(rule, Cut):
            size = _number(rule.whole)
            cuts[size] = gcd(cuts.get(size, size), *rule.ends)
        pinned.update(_pinned(node))
    for size, unit in cuts.items():
        for count in range(1, size // unit + 1):
            forms.setdefault(count * unit, set()).add((count, (unit,)))
        forms[unit].discard((1, (unit,)))
    return pinned, {n: some for n, some in forms.items() if some}


def _pinned(node: Node) -> Iterator[int]:
    """Yield the sizes kept because of `node`: layers, experts, and how many are chosen."""
    attrs: Attrs = node.attrs
    for name, spec in node.op.attrs.items():
        if not spec.pins:
            continue
        value = attrs[name]
        if spec.kind == "axis":
            yield _number(node.operands[0].type[value].size)
        elif spec.kind == "sizes":
            yield from (_number(size) for _, size in value)
        else:
            yield value


def resized(graph: Graph, sizes: Mapping[int, int]) -> Graph:
    """Return `graph` with other sizes, its parameters made from sources.

    Raises:
      InputError: the sizes do not fit together.
    """
    small = Graph(graph.name, graph.attrs)
    image: dict[Value, Value] = {}
    for name, value in graph.inputs.items():
        image[value] = small.input(name, _map_type(value.type, sizes))
    for name, value in graph.params.items():
        image[value] = small.param(name, _map_type(value.type, sizes), loc=value.loc)
        image[value].weight = _source(image[value])
    for node in graph:
        made = small.append(
            node.op,
            [image[v] for v in node.operands],
            _map_attrs(node, sizes),
            names=[v.name for v in node.results],
            loc=node.loc,
            origin=node.origin,
        )
        image.update(zip(node.results, made.results, strict=True))
    for name, value in graph.outputs.items():
        small.set_output(name, image[value])
    return small


def _map_type(type: TensorType, sizes: Mapping[int, int]) -> TensorType:
    return type.with_axes(
        Axis(a.name, sizes[a.size], a.mesh) if isinstance(a.size, int) else a for a in type.axes
    )


def _map_attrs(node: Node, sizes: Mapping[int, int]) -> dict[str, object]:
    attrs: JsonDict = dict(node.attrs)
    if node.body is not None:
        return {**attrs, "body": resized(node.body, sizes)}
    for name, spec in node.op.attrs.items():
        if spec.kind == "sizes":
            attrs[name] = tuple((n, sizes.get(s, s)) for n, s in attrs[name])
        elif spec.shrinks and attrs[name]:
            attrs[name] = sizes.get(attrs[name], attrs[name])
    return attrs
