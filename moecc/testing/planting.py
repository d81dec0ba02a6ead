"""Planting: making, in a random graph, what a pattern looks for.

Random operations alone seldom make what a pattern needs, and a law of a pass that never matches
proves nothing.  A pattern is written as the operations that it matches, so it can be made, too:
from its leaves to its root, with guesses where it leaves something open.  What no guess makes (rows
in slots, rotary tables) is copied from a random block that has it.  The matcher and the rule's
check judge what was made; what does not match is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moecc.ir.graph import Graph, Value
from moecc.rewrite.match import match
from moecc.rewrite.pattern import Pattern, roots
from moecc.rewrite.rule import Rule, accept
from moecc.testing.growth import Growth
from moecc.testing.guesses import named_axes
from moecc.testing.pattern_maker import Mark, Misfit, PatternMaker, find_type

Example = Rule | Pattern | Graph
"""What can be planted: what a rule or a pattern matches, or a copy of a graph."""

PLANTINGS = 20
"""How often a pattern is made anew until it, and the rule's check, match."""


def plant(g: Growth, example: Example) -> bool:
    """Append what `example` describes, and return whether it is there as described.

    Its root is returned by the graph, or used by something that is.  One in three of the values
    inside has another user, is returned, or may be used by later steps.
    """
    if isinstance(example, Graph):
        _expose(g, list(_copied(g, example)))
        return True
    rule = example if isinstance(example, Rule) else None
    pattern = example.pattern if isinstance(example, Rule) else example
    for _ in range(PLANTINGS):
        mark = Mark(g)
        try:
            maker = PatternMaker(g, named_axes(pattern))
            root = maker.build(g.pick(roots(pattern)), g.find_float())
        except Misfit:
            mark.restore()
            continue
        if _matches(rule, pattern, root):
            made = mark.without_waste(root)
            _expose(g, [v for n in made for v in n.results if v is not root] + [root])
            return True
        mark.restore()
    return False


def _matches(rule: Rule | None, pattern: Pattern, root: Value) -> bool:
    assert root.node is not None
    found = [m for p in roots(pattern) if (m := match(p, root.node)) is not None]
    return bool(found) and (rule.check if rule else accept)(found[0]) is None


def _expose(g: Growth, made: Sequence[Value]) -> None:
    """Let later steps use the last of `made`, and at times what is inside; return the last."""
    *inner, root = made
    for value in inner:
        if g.chance(15):
            g.taps.append(value)
        elif g.chance(20):
            g.values.append(value)
    g.values.append(root)
    is_kept = not root.type.dtype.is_float or g.chance(50)
    g.taps.append(root if is_kept else g.emit("tanh", root))


def _copied(g: Growth, example: Graph) -> Iterator[Value]:
    """Append a copy of `example`, on values that are there or new, and yield its results."""
    values: dict[Value, Value] = {}
    for value in example.inputs.values():
        found = find_type(g, value.type)
        values[value] = found if found and g.chance(50) else g.input(value.name, value.type)
    for value in example.params.values():
        name = g.graph.fresh(value.name)
        values[value] = g.graph.param(name, value.type, value.weight, loc=value.loc)
    for node in example:
        made = g.builder.clone(node, *(values[v] for v in node.operands))
        values.update(zip(node.results, made.results, strict=True))
        yield from made.results
