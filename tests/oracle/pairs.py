"""Pairs of graphs: a drawn graph, and its edited copy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from moecc.errors import MoeccError
from moecc.ir import Graph, Node, clone, print_graph
from moecc.ir.mesh import mesh_of
from moecc.ir.structure import equal, infer_again
from moecc.ir.verify import VerifyError, verify
from moecc.testing.generate import remove_dead

from . import sound_weights  # noqa: F401 (its edits are among those of SOUND)
from .sound_edits import SOUND, Edit, Rng, pick
from .wrong_edits import WRONG


@dataclass
class Pair:
    """Two graphs and how the second was made.

    Attributes:
      before: the drawn graph.
      after: the edited one.
      edits: the names of the edits.
      is_sound: whether all edits keep the function.
      right: `after` before the wrong edit, if there is one.
      seed: of the pair.
    """

    before: Graph
    after: Graph
    edits: list[str] = field(default_factory=list)
    is_sound: bool = True
    right: Graph | None = None
    seed: int = 0


REFUSALS = (
    MoeccError,
    VerifyError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
)
"""How the builder, the types and the edits themselves refuse an edit at a place."""


def apply_edit(graph: Graph, edit: Edit, rng: Rng, tries: int = 6) -> tuple[Graph, Node] | None:
    """Return an edited copy of `graph`, and the node in `graph`, or None where nothing suits."""
    top = list(graph)
    places = [(None, n) for n in top] + [(s, n) for s in top if s.body is not None for n in s.body]
    places = [(s, n) for s, n in places if not edit.ops or n.op.name in edit.ops]
    if not places:
        return None
    copy = clone(graph)
    for at in rng.permutation(len(places))[:tries]:
        scan, node = places[int(at)]
        target = _twin(graph, copy, scan, node)
        types = [v.type for v in target.graph.outputs.values()]
        try:
            if not edit.apply(target, rng):
                continue
            if scan is not None:
                if [v.type for v in target.graph.outputs.values()] != types:
                    copy = clone(graph)
                    continue
                infer_again(copy, [copy.value(scan.results[0].name).node])  # type: ignore[list-item]
            verify(copy)
        except REFUSALS:
            # It may have changed something already.
            copy = clone(graph)
            continue
        return copy, node
    return None


def _twin(graph: Graph, copy: Graph, scan: Node | None, node: Node) -> Node:
    """Return the node of `copy` that is `node` of `graph`, in the body of `scan` if any."""
    source, target = graph, copy
    if scan is not None:
        twin = copy.value(scan.results[0].name).node
        assert twin is not None
        assert scan.body is not None
        assert twin.body is not None
        source, target = scan.body, twin.body
    position = next(i for i, n in enumerate(source) if n is node)
    return next(n for i, n in enumerate(target) if i == position)


def draw_pair(seed: int, graph: Graph) -> Pair | None:
    """Return a pair of `graph` and a copy with one to four edits, or None where none suits.

    The last edit may be a wrong one in half of the pairs.
    """
    rng = np.random.default_rng(seed)
    is_wrong = bool(rng.random() < 0.5)
    return _edited(Pair(graph, graph, seed=seed), int(rng.integers(not is_wrong, 4)), is_wrong, rng)


def edited(before: Graph, after: Graph, seed: int, name: str) -> Pair | None:
    """Return a pair of a graph and the result of a pass, with edits of the result.

    Args:
      before: the graph that is right.
      after: the graph to compare.
      seed: chooses the edits: none in a quarter of the pairs, a wrong one in half of them.
      name: what made `after` of `before`.
    """
    rng = np.random.default_rng(seed)
    pair = Pair(before, after, [name], seed=seed)
    way = rng.random()
    return _edited(pair, 0 if way < 0.25 else int(rng.integers(0, 3)), way > 0.5, rng)


def _edited(pair: Pair, sound: int, is_wrong: bool, rng: Rng) -> Pair | None:
    for _ in range(sound):
        _edit(pair, SOUND, rng)
    if is_wrong and _edit(pair, WRONG, rng):
        pair.is_sound = False
    if not pair.edits or equal(pair.before, pair.after):
        return None
    if rng.random() < 0.5 and pair.after is not pair.before:
        pair.after = clone(pair.after)
        remove_dead_nodes(pair.after)
    return pair


def _edit(pair: Pair, edits: dict[str, Edit], rng: Rng) -> bool:
    present = {n.op.name for n in pair.after.every_node()}
    suitable = [e for e in edits.values() if not e.ops or present & set(e.ops)]
    for _ in range(4):
        edit = pick(rng, suitable)
        edited = apply_edit(pair.after, edit, rng)
        if edited is None:
            continue
        if not edit.is_sound:
            pair.right = pair.after
        pair.after = edited[0]
        pair.edits.append(edit.name)
        return True
    return False


def remove_dead_nodes(graph: Graph) -> None:
    """Remove nodes that no output needs; inputs stay, as parts of the interface."""
    inputs = {n: v.type for n, v in graph.inputs.items()}
    remove_dead(graph)
    order = list(inputs)
    for name, type in inputs.items():
        if name not in graph.inputs:
            graph.input(name, type)
    graph.inputs.update({n: graph.inputs.pop(n) for n in order})


_LINE = re.compile(r"\s*(?:param )?((?:%[^ ,]+, )*%[^ ,]+) [:=] ")


def _definitions(graph: Graph) -> dict[str, str]:
    """Return each line of a graph's text by the names that it defines."""
    lines: dict[str, str] = {}
    for line in print_graph(graph).splitlines():
        match = _LINE.match(line)
        if match:
            lines |= dict.fromkeys(re.findall(r"%([^ ,]+)", match.group(1)), line.strip())
    return lines


def parted(right: Graph, wrong: Graph) -> set[str]:
    """Return names of values, and locations, at which two graphs may be said to part.

    Those that are defined otherwise, and the users of parameters that are.
    """
    old, new = _definitions(right), _definitions(wrong)
    names = {n for n in old.keys() | new.keys() if old.get(n) != new.get(n)}
    names |= {"mesh"} if mesh_of(right) != mesh_of(wrong) else set()
    for graph in (right, wrong):
        for param in graph.params.values():
            if param.name in names:
                names |= {v.name for user in param.users for v in user.results}
        names |= {n for n, v in graph.outputs.items() if v.name in names}
        names |= {
            n for n, v in graph.outputs.items()
            if n not in right.outputs or n not in wrong.outputs
            or right.outputs[n].name != wrong.outputs[n].name
        }  # fmt: skip
    return names
