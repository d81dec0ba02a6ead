"""Where the parameters of a converted graph lie: in place of leaves, or beside the tree.

A leaf whose use is all converted is replaced by what became of it, stacked as it was; what has no
place in the tree, routers and parts of fused leaves, is beside it under the name of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from moecc.ir.graph import Graph
from moecc.weights.expr import Expr, sources
from moecc.weights.movement import Index, Rename, Stack
from moecc_backends.islands.naming import ranged
from moecc_backends.islands.sites import Instance, Key, Site
from moecc_backends.islands.views import Leaf


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies.

    Attributes:
      key: the leaf that it replaces, or its name beside the tree.
      in_tree: which of the two.
      row: which part of a stack it is; None where it is not stacked.
    """

    key: str
    in_tree: bool
    row: int | None = None


@dataclass(frozen=True)
class Stored:
    """An array of the new parameters.

    Attributes:
      key: the leaf that it replaces, or its name beside the tree.
      in_tree: which of the two.
      weight: what it is of the leaves.
      like: the leaf whose element type and placement it has.
    """

    key: str
    in_tree: bool
    weight: Expr
    like: str


@dataclass
class Storage:
    """Where the parameters of converted blocks lie.

    Attributes:
      slots: by the name of the parameter in the graph.
      arrays: the arrays to make.
      gone: the leaves that nothing uses any more.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    arrays: list[Stored] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)


def plan_storage(
    graph: Graph,
    leaves: Mapping[str, Leaf],
    converted: Sequence[Instance],
    sites: Iterable[Site],
    by_key: Mapping[Key, Instance],
    still_used: set[str],
    params_of: Mapping[str, Sequence[str]],
) -> Storage:
    """Return where the parameters of converted blocks lie.

    Args:
      graph: the converted graph.
      leaves: the leaves by name.
      converted: the blocks that were converted.
      sites: where blocks run.
      by_key: blocks by their keys.
      still_used: leaves that something else uses.
      params_of: the names of the parameters of each block in the graph, by location, in order.
    """
    storage = Storage()
    dense: dict[str, dict[str, Expr]] = {}
    for instance in converted:
        for name, weight in zip(instance.params, instance.weights, strict=True):
            (source,) = sources(weight)
            dense.setdefault(source.name, {})[name] = weight
    for leaf, parts in dense.items():
        if leaf in still_used:
            continue
        storage.gone.add(leaf)
        _in_place(storage, graph, leaves[leaf], parts)
    for site in sites:
        blocks = [by_key[key] for key in site.keys]
        if all(b.loc in params_of for b in blocks):
            names = [params_of[b.loc] for b in blocks]
            _beside(storage, graph, names, _like(blocks[0]), is_stack=bool(site.loops))
    return storage


def _like(instance: Instance) -> str:
    (source, *_) = sources(instance.weights[0])
    return source.name


def _in_place(storage: Storage, graph: Graph, leaf: Leaf, parts: Mapping[str, Expr]) -> None:
    """Put what became of a leaf in its place, where that is one array."""
    if not all(name in graph.params for name in parts):
        return
    weights = {name: graph.params[name].weight for name in parts}
    made = [w for w in weights.values() if w is not None]
    whole = [_bare(w) for w in parts.values()]
    if len(made) < len(parts) or len({w.type for w in made}) != 1:
        return
    rows = {_row(w, leaf): name for w, name in zip(whole, parts, strict=True)}
    if leaf.shape and sorted(rows, key=str) == sorted(range(leaf.shape[0]), key=str):
        ordered = [weights[rows[i]] for i in range(leaf.shape[0])]
        stack = Stack(tuple(w for w in ordered if w is not None), "layer")
        for i in range(leaf.shape[0]):
            storage.slots[rows[i]] = Slot(leaf.name, in_tree=True, row=i)
        storage.arrays.append(Stored(leaf.name, True, stack, leaf.name))
    elif len(parts) == 1 and prod(whole[0].type.shape) == prod(leaf.shape):
        (name,) = parts
        storage.slots[name] = Slot(leaf.name, in_tree=True)
        storage.arrays.append(Stored(leaf.name, True, made[0], leaf.name))


def _bare(weight: Expr) -> Expr:
    """Return a weight without the names that blocks give to its axes."""
    while isinstance(weight, Rename):
        weight = weight.x
    return weight


def _row(weight: Expr, leaf: Leaf) -> int | None:
    """Return which part along the first axis of `leaf` a weight is; None if it is none."""
    is_row = isinstance(weight, Index) and weight.x is leaf.source and weight.axis == leaf.axes[0]
    return weight.at if is_row and isinstance(weight, Index) else None


def _beside(
    storage: Storage,
    graph: Graph,
    params: Sequence[Sequence[str]],
    like: str,
    *,
    is_stack: bool,
) -> None:
    """Put what has no place yet beside the tree: of a loop, one stack for each parameter."""
    for names in zip(*params, strict=True):
        missing = [n for n in names if n not in storage.slots]
        if not missing:
            continue
        weights = [graph.params[n].weight for n in names]
        made = tuple(w for w in weights if w is not None)
        assert len(made) == len(names), "parameters of blocks have weights"
        if not is_stack:
            storage.slots[names[0]] = Slot(names[0], in_tree=False)
            storage.arrays.append(Stored(names[0], False, made[0], like))
            continue
        key = ranged(names)
        for row, name in enumerate(names):
            storage.slots.setdefault(name, Slot(key, in_tree=False, row=row))
        storage.arrays.append(Stored(key, False, Stack(made, "layer"), like))
