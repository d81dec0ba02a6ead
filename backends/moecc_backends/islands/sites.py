"""Where blocks run, and which they are: a block in the body of a scan is one for each iteration."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod

from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Slice
from moecc.weights.simplify import simplify
from moecc_backends.islands.blocks import Block, block_of
from moecc_backends.islands.dag import Misfit
from moecc_backends.islands.find import Island, Miss, find_islands
from moecc_backends.islands.identity import identity
from moecc_backends.islands.naming import indexed, location, unique
from moecc_backends.islands.near import unseen
from moecc_backends.islands.scopes import Scope, Step

Key = tuple[str, tuple[Expr, ...]]
"""What identifies a block: its text, and what its parameters are of the leaves."""


@dataclass(frozen=True)
class Site:
    """A block where it runs.

    Attributes:
      island: its steps.
      block: its operations; its parameters as the iterations of loops see them.
    """

    island: Island
    block: Block

    @cached_property
    def loops(self) -> tuple[Step, ...]:
        """The loops that pick a part of a parameter, outermost first."""
        used = {loop for p in self.block.params for loop in p.view.loops}
        return tuple(s for s in self.island.scope.owners if s in used)

    @cached_property
    def identity(self) -> str:
        """What it computes in any element type."""
        return identity(self.island)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How often each of the loops runs."""
        return tuple(int(loop.params["length"]) for loop in self.loops)

    @property
    def count(self) -> int:
        """How many blocks it is."""
        return prod(self.lengths)

    @cached_property
    def keys(self) -> list[Key]:
        """The blocks that it is, the last loop fastest."""
        return [(self.block.text, self.expressions(at)) for at in self.iterations()]

    def iterations(self) -> list[dict[Hashable, int]]:
        """Return the iterations of the loops, in order."""
        every = product(*map(range, self.lengths))
        return [dict(zip(self.loops, at, strict=True)) for at in every]

    def expressions(self, at: Mapping[Hashable, int]) -> tuple[Expr, ...]:
        """Return the weights of the parameters in one iteration."""
        return tuple(simplify(p.expression(at)) for p in self.block.params)


@dataclass(frozen=True)
class Instance:
    """A block of the model.

    Attributes:
      loc: its location, ``layers.0.mlp``.
      params: the names of its parameters.
      weights: what they are of the leaves.
      summary: the names of its operations.
      line: where it is in the user's program.
      identity: what it computes in any element type.
    """

    loc: str
    params: tuple[str, ...]
    weights: tuple[Expr, ...]
    summary: str
    line: str
    identity: str


@dataclass
class Survey:
    """The blocks of a function: where they run, and why others are none.

    Attributes:
      scope: the function.
      sites: where blocks run, in order.
      misses: what is nearly a block.
    """

    scope: Scope
    sites: list[Site] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that weights are read from, in order."""
        return tuple(v.view.leaf.name for v in self.scope.inputs if v.view is not None)

    @property
    def unused(self) -> tuple[str, ...]:
        """The names of those that the function does not use."""
        idle = (v.view for v in self.scope.inputs if not v.users and not v.is_returned)
        return tuple(view.leaf.name for view in idle if view is not None)

    def refuse(self, site: Site, reason: str) -> None:
        """Note that `site` is no block after all, and why."""
        leaves = tuple(sorted({p.view.leaf.name for p in site.block.params}))
        self.sites = [s for s in self.sites if s is not site]
        self.misses.append(Miss(leaves, reason, site.island.line))

    def instances(self) -> dict[Key, Instance]:
        """Return the blocks of the model, each once, in order."""
        found = self.first_sites()
        names = _param_names(found)
        locations = unique(location(names[key]) for key in found)
        return {
            key: Instance(
                loc, names[key], key[1], site.block.summary, site.island.line, site.identity
            )
            for (key, site), loc in zip(found.items(), locations, strict=True)
        }

    def first_sites(self) -> dict[Key, Site]:
        """Return where each block runs first, in order."""
        found: dict[Key, Site] = {}
        for site in self.sites:
            for key in site.keys:
                found.setdefault(key, site)
        return found


def survey(scope: Scope) -> Survey:
    """Return the blocks of a traced function."""
    search = find_islands(scope)
    made = Survey(scope, misses=list(search.misses))
    for island in search.islands:
        try:
            made.sites.append(Site(island, block_of(island)))
        except Misfit as misfit:
            made.misses.append(Miss(island.leaves, str(misfit), island.line))
    made.misses += unseen(scope)
    return made


def _param_names(found: Iterable[Key]) -> dict[Key, tuple[str, ...]]:
    """Return the names of the parameters of each block; one weight has one name."""
    weights = dict.fromkeys(w for _, ws in found for w in ws)
    single = dict(zip(weights, unique(map(_weight_name, weights)), strict=True))
    return {key: tuple(single[w] for w in key[1]) for key in found}


def _weight_name(weight: Expr) -> str:
    """Return a name for a part of a leaf."""
    if isinstance(weight, Source):
        return weight.name
    name = _weight_name(weight.operands[0])
    if isinstance(weight, Index):
        return indexed(name, weight.at)
    if isinstance(weight, Slice):
        return f"{name}.{weight.start}_{weight.stop}"
    return name
