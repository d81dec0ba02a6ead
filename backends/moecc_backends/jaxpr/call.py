"""One trace of a function on new parameters: its blocks found again, and run as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moecc.errors import InputError, Problem
from moecc_backends.jaxpr.blocks import same_in
from moecc_backends.jaxpr.graph import Part, Parts
from moecc_backends.jaxpr.jaxprs import AnyArray, function_line, shape_of
from moecc_backends.jaxpr.run import Execution, Program, Replacement, dtype_of, joined, with_losses
from moecc_backends.jaxpr.scopes import ParamTree, Traced, is_array, leaves_of, trace_function
from moecc_backends.jaxpr.storage import Slot, Storage
from moecc_backends.jaxpr.survey import Instance, Key, Site, skipped, steps_of, survey, uses
from moecc_backends.jaxpr.views import Leaf
from moecc_backends.xla.trace.host_arrays import check_keys
from moecc_backends.xla.trace.typed_jax import Function, PyTree, manual_axes

TREE, BESIDE = "params", "moe"
"""The keys of new parameters: the tree with experts in place, and what has no place there."""


@dataclass(frozen=True)
class State:
    """What every function of the same parameters needs to know of a conversion.

    Attributes:
      tree: the dense parameters.
      leaves: their leaves, those that weights can be read from.
      parts: the converted graph, block by block.
      instances: the blocks, converted or not.
      converted: the locations of those that the pipeline changed.
      storage: where their parameters lie.
    """

    tree: ParamTree
    leaves: Mapping[str, Leaf]
    parts: Parts
    instances: Mapping[Key, Instance]
    converted: frozenset[str]
    storage: Storage

    def parts_of(self, site: Site) -> list[Part]:
        """Return the parts of the blocks of a site; none if it is not converted."""
        found = [self._instance(site, key) for key in site.keys]
        locs = [i.loc for i in found if i is not None and i.loc in self.converted]
        return [self.parts.blocks[loc] for loc in locs] if len(locs) == len(found) else []

    def _instance(self, site: Site, key: Key) -> Instance | None:
        """Return a block of the conversion, traced in another element type perhaps."""
        if key in self.instances:
            return self.instances[key]
        _, weights = key
        dtype = dtype_of(site.island.x.aval)
        alike = (i for (_, ws), i in self.instances.items() if ws == weights)
        return next(
            (i for i in alike if any(
                same_in(site.identity, i.identity, one) for one in {dtype, weights[0].type.dtype}
            )),
            None,
        )  # fmt: skip


@dataclass(frozen=True)
class Given:
    """New parameters, taken apart: what stands in the place of leaves, and what is beside."""

    leaves: Mapping[str, AnyArray]
    beside: Mapping[str, AnyArray]

    def check(self, storage: Storage, where: str | None = None) -> None:
        """Raise InputError unless every array of a conversion is here in its shape.

        In a `shard_map` of the user arrays are parts of them.
        """
        arrays = {True: self.leaves, False: self.beside}
        is_part = bool(manual_axes())
        problems = []
        for one in storage.arrays:
            array, shape = arrays[one.in_tree].get(one.key), one.weight.type.shape
            found = tuple(array.shape) if array is not None and is_array(array) else None
            if found is None or (len(found) != len(shape) if is_part else found != shape):
                key = f"{TREE if one.in_tree else BESIDE} {one.key}"
                kind = type(array).__name__ if found is None else str(list(found))
                what = "an array of the parameters has another shape than the conversion gave it"
                place = f"{where}, {key}" if where else key
                problems.append(Problem(what, place, str(list(shape)), kind))
        if problems:
            raise InputError(problems)

    @classmethod
    def of(cls, tree: ParamTree, params: PyTree, where: str | None = None) -> Given:
        """Return `params` taken apart.

        Args:
          tree: the dense parameters.
          params: the new ones.
          where: the line of the function that takes them.

        Raises:
          InputError: they are not those of a conversion, or another tree.
        """
        is_pair = isinstance(params, Mapping) and set(params) == {TREE, BESIDE}
        if not is_pair or not isinstance(params[BESIDE], Mapping):
            raise InputError(
                "these are not the parameters of a conversion",
                where=where,
                expected=f"a dictionary of {TREE!r} and {BESIDE!r}, as `moe.params`",
                found=type(params).__name__,
            )
        return cls(tree.flatten(params[TREE], where), params[BESIDE])

    def array(self, slot: Slot) -> AnyArray:
        """Return the array in which a parameter lies."""
        return self.leaves[slot.key] if slot.in_tree else self.beside[slot.key]

    def stacked(self, slots: Sequence[Slot], lengths: tuple[int, ...]) -> AnyArray:
        """Return a parameter of blocks in loops, the loops in front; of one block as it is.

        Args:
          slots: where it lies for each block.
          lengths: how often each loop runs.
        """
        array = self.array(slots[0])
        is_stack = len({(s.key, s.in_tree) for s in slots}) == 1 and slots[0].row is not None
        if lengths and is_stack and [s.row for s in slots] == [*range(array.shape[0])]:
            return array.reshape(*lengths, *array.shape[1:])
        every = [self.array(s) if s.row is None else self.array(s)[s.row] for s in slots]
        return jnp.stack(every).reshape(*lengths, *every[0].shape) if lengths else every[0]


@dataclass(frozen=True)
class Call:
    """A function of new parameters.

    Attributes:
      state: of the conversion.
      function: the user's function of dense parameters.
      losses: whether losses and metrics are returned.
      execution: how parts are run.
    """

    state: State
    function: Function
    losses: bool
    execution: Execution

    def run(
        self,
        params: PyTree,
        args: tuple[AnyArray, ...],
        kwargs: Mapping[str, AnyArray],
        extra: Mapping[str, AnyArray],
    ) -> AnyArray:
        """Return the result of the function.

        Args:
          params: the new parameters.
          args: the other arguments.
          kwargs: those by name.
          extra: further inputs of the graph.

        Raises:
          InputError: the parameters do not fit, or the function cannot be traced, or it uses what
            is an expert's now in another way.
        """
        state = self.state
        line = function_line(self.function)
        given = Given.of(state.tree, params, line)
        given.check(state.storage, line)
        avals = {n: self._dense(n, leaf) for n, leaf in given.leaves.items()}
        leaves = leaves_of(avals)
        leaves |= {n: leaf for n, leaf in state.leaves.items() if leaf.shape == avals[n].shape}
        traced, rest = trace_function(self.function, state.tree, avals, leaves, (args, kwargs))
        replaced = self._replacements(traced)
        program = Program(
            traced.scope,
            {r.site.island.steps[-1]: r for r in replaced},
            skipped(traced.scope, steps_of([r.site for r in replaced])),
            self.execution,
            self._checked(extra, replaced),
            side=self.losses,
        )
        names = state.tree.array_names
        arrays = [None if n in state.storage.gone else given.leaves[n] for n in names]
        weights = {r.number: self._weights(r.site, given) for r in replaced}
        made, side = program.run([*arrays, *rest], weights)
        result = jax.tree_util.tree_unflatten(traced.treedef, made)
        if not self.losses:
            return result
        of_sites = {r.number: state.parts_of(r.site) for r in replaced}
        return with_losses(result, joined(state.parts, of_sites, replaced, side))

    def _checked(
        self, extra: Mapping[str, AnyArray], replaced: Sequence[Replacement]
    ) -> Mapping[str, AnyArray]:
        """Return further inputs. Raises InputError where some are missing or unknown."""
        needed = {v.name: v for r in replaced for v in r.part.extra}
        if set(needed) != set(extra):
            raise InputError(
                "the graph of the blocks takes other inputs than were given",
                expected=f"moe_inputs={{{', '.join(f'{n!r}: …' for n in needed)}}}",
                found=", ".join(extra) or "none",
                hint="; ".join(f"{n}: {v.type}" for n, v in needed.items()) or None,
            )
        check_keys({name: extra[name] for name, v in needed.items() if v.type.dtype.kind == "key"})
        return extra

    def _dense(self, name: str, leaf: AnyArray) -> jax.ShapeDtypeStruct:
        """Return the dense shape of a leaf, in the element type that it has now."""
        if name not in self.state.storage.gone:
            return shape_of(leaf.shape, leaf.dtype)
        dense = self.state.leaves[name]
        return shape_of(dense.shape, dense.dtype.numpy if leaf is None else leaf.dtype)

    def _replacements(self, traced: Traced) -> list[Replacement]:
        found = survey(traced.scope)
        made = []
        for number, site in enumerate(found.sites):
            parts = self.state.parts_of(site)
            if parts:
                made.append(Replacement(number, site, parts[0]))
        inside = steps_of([r.site for r in made])
        left = [
            u for u in uses(traced.scope, inside) if u.view.leaf.name in self.state.storage.gone
        ]
        if left:
            reasons = {n: m.reason for m in found.misses for n in m.weights}
            raise InputError(
                Problem(
                    f"`{use.view.leaf.name}` holds the weights of experts now, and is used "
                    "otherwise here",
                    where=str(use),
                    found=reasons.get(use.view.leaf.name),
                    hint="use it in its block alone, as the converted function does",
                )
                for use in left
            )
        return made

    def _weights(self, site: Site, given: Given) -> tuple[AnyArray, ...]:
        slots = self.state.storage.slots
        params = [[slots[p.name] for p in part.params] for part in self.state.parts_of(site)]
        return tuple(given.stacked(each, site.lengths) for each in zip(*params, strict=True))
