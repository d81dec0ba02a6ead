"""What lies between blocks: where each takes its input from, and how much of the program is there.

A function is followed with the names of what its values depend on: its arguments, and blocks.
Loops that pick the weights of blocks are followed iteration by iteration, as the blocks are.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from moecc_backends.islands.jaxprs import scan_sizes
from moecc_backends.islands.places import user_line
from moecc_backends.islands.scopes import Scope, Step, Val
from moecc_backends.islands.sites import Instance, Key, Site

Sources = frozenset[str]
"""Names of arguments, and locations of blocks."""

NOTHING: Sources = frozenset()


@dataclass(frozen=True)
class Region:
    """A part of a function before a block, or before a result.

    Attributes:
      takes: the arguments and the blocks that it depends on, not through other blocks.
      equations: how many equations are between it and the block before.
      lines: the first and the last of them in the user's program.
    """

    takes: Sources
    equations: int = 0
    lines: str = ""


@dataclass
class Walk:
    """Follows a function.

    Args:
      sites: where blocks run.
      instances: the blocks.
    """

    sites: Sequence[Site]
    instances: Mapping[Key, Instance]
    regions: dict[str, Region] = field(default_factory=dict)
    _passed: list[Step] = field(default_factory=list)
    _ends: dict[Step, Site] = field(default_factory=dict)
    _inside: set[Step] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ends = {site.island.steps[-1]: site for site in self.sites}
        self._inside = {step for site in self.sites for step in site.island.steps}

    def run(self, scope: Scope, arguments: Mapping[Val, str]) -> list[Region]:
        """Find the regions before blocks, in `regions`; return those before the results."""
        given = [frozenset((arguments[v],)) if v in arguments else NOTHING for v in scope.inputs]
        takes = self._scope(scope, given, {})
        last = self._region(NOTHING)
        return [Region(one, last.equations, last.lines) for one in takes]

    def _region(self, takes: Sources) -> Region:
        """Return the region since the last one."""
        lines = [line for step in self._passed if (line := user_line(step.equation))]
        ends = dict.fromkeys((lines[0], lines[-1])) if lines else {}
        made = Region(takes, len(self._passed), " to ".join(ends))
        self._passed = []
        return made

    def _scope(
        self, scope: Scope, given: Sequence[Sources], at: Mapping[Hashable, int]
    ) -> list[Sources]:
        known = dict(zip(scope.inputs, given, strict=True))
        for step in scope.steps:
            if step in self._ends:
                site = self._ends[step]
                known[site.island.output] = self._block(site, known.get(site.island.x, NOTHING), at)
            elif step not in self._inside:
                taken = [known.get(v, NOTHING) for v in step.inputs]
                known.update(zip(step.outputs, self._step(step, taken, at), strict=True))
        return [known.get(v, NOTHING) for v in scope.outputs]

    def _block(self, site: Site, takes: Sources, at: Mapping[Hashable, int]) -> Sources:
        number = 0
        for loop, length in zip(site.loops, site.lengths, strict=True):
            number = number * length + at[loop]
        loc = self.instances[site.keys[number]].loc
        # A block that runs again takes more than what its first run shows.
        if loc not in self.regions:
            self.regions[loc] = self._region(takes)
        return frozenset((loc,))

    def _step(
        self, step: Step, taken: list[Sources], at: Mapping[Hashable, int]
    ) -> Sequence[Sources]:
        if not step.bodies or not any(step in s.island.scope.owners for s in self.sites):
            self._passed.append(step)
            every = NOTHING.union(*taken)
            return [every for _ in step.outputs]
        if step.name == "scan":
            return self._scan(step, taken, at)
        if step.name == "cond":
            index, *rest = taken
            branches = [self._scope(body, rest, at) for body in step.bodies]
            return [index.union(*each) for each in zip(*branches, strict=True)]
        if step.name == "while":
            fixed = step.params["cond_nconsts"], step.params["body_nconsts"]
            return self._scope(step.bodies[1], taken[fixed[0] :], at)
        return self._scope(step.bodies[0], taken, at)

    def _scan(self, step: Step, taken: list[Sources], at: Mapping[Hashable, int]) -> list[Sources]:
        consts, carried = scan_sizes(step.params)
        fixed, carry, stacked = (
            taken[:consts],
            taken[consts : consts + carried],
            taken[consts + carried :],
        )
        is_each = any(step in site.loops for site in self.sites)
        made = [NOTHING for _ in step.outputs[carried:]]
        turns = range(int(step.params["length"]) if is_each else 1)
        for turn in reversed(turns) if step.params["reverse"] else turns:
            found = self._scope(step.bodies[0], [*fixed, *carry, *stacked], {**at, step: turn})
            carry = found[:carried]
            made = [a | b for a, b in zip(made, found[carried:], strict=True)]
        return [*carry, *made]
