"""One trace of a function on new parameters: its blocks found again, and run as they are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moecc.errors import InputError, Problem
from moecc_backends.jaxpr.blocks import same_in
from moecc_backends.jaxpr.graph import BlockPart, BlockParts
from moecc_backends.jaxpr.jaxprs import AnyArray, function_line, shape_of
from moecc_backends.jaxpr.run import (
    Execution,
    Replacement,
    RewrittenFunction,
    dtype_of,
    joined_losses,
    with_losses,
)
from moecc_backends.jaxpr.scopes import (
    ParamTree,
    TracedFunction,
    is_array,
    leaves_of,
    trace_function,
)
from moecc_backends.jaxpr.storage import ParamSlot, ParamStorage
from moecc_backends.jaxpr.survey import (
    BlockInstance,
    BlockKey,
    BlockSite,
    equations_of,
    leaf_uses,
    skipped_equations,
    survey_blocks,
)
from moecc_backends.jaxpr.views import TreeLeaf
from moecc_backends.xla.trace.host_arrays import check_keys
from moecc_backends.xla.trace.typed_jax import Function, PyTree, manual_axes

TREE, BESIDE = "params", "moe"
"""The keys of new parameters: the tree with experts in place, and what has no place there."""


@dataclass(frozen=True)
class ConversionState:
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
    leaves: Mapping[str, TreeLeaf]
    parts: BlockParts
    instances: Mapping[BlockKey, BlockInstance]
    converted: frozenset[str]
    storage: ParamStorage

    def parts_of(self, site: BlockSite) -> list[BlockPart]:
        """Return the parts of the blocks of a site; none if it is not converted."""
        instances = [self._instance(site, key) for key in site.keys]
        locs = [i.loc for i in instances if i is not None and i.loc in self.converted]
        return [self.parts.blocks[loc] for loc in locs] if len(locs) == len(instances) else []

    def _instance(self, site: BlockSite, key: BlockKey) -> BlockInstance | None:
        """Return a block of the conversion, traced in another element type perhaps."""
        if key in self.instances:
            return self.instances[key]
        dtypes = {dtype_of(site.slice.x.aval), key[1][0].type.dtype}
        for (_, weights), instance in self.instances.items():
            identities = site.identity, instance.identity
            if weights == key[1] and any(same_in(*identities, dtype) for dtype in dtypes):
                return instance
        return None


@dataclass(frozen=True)
class ConvertedParams:
    """New parameters, taken apart: what stands in the place of leaves, and what is beside."""

    leaves: Mapping[str, AnyArray]
    beside: Mapping[str, AnyArray]

    @classmethod
    def of(
        cls, tree: ParamTree, storage: ParamStorage, params: PyTree, where: str | None = None
    ) -> ConvertedParams:
        """Return `params` taken apart.

        In a `shard_map` of the user arrays are parts of those of the conversion.

        Args:
          tree: the dense parameters.
          storage: where the new ones lie.
          params: the new ones.
          where: the line of the function that takes them.

        Raises:
          InputError: they are not those of a conversion, or another tree, or an array is missing
            or has another shape.
        """
        is_pair = isinstance(params, Mapping) and set(params) == {TREE, BESIDE}
        if not is_pair or not isinstance(params[BESIDE], Mapping):
            raise InputError(
                "these are not the parameters of a conversion",
                where=where,
                expected=f"a dictionary of {TREE!r} and {BESIDE!r}, as `moe.params`",
                found=type(params).__name__,
            )
        converted = cls(tree.flatten(params[TREE], where), params[BESIDE])
        is_part = bool(manual_axes())
        problems = []
        for stored in storage.arrays:
            array = (converted.leaves if stored.in_tree else converted.beside).get(stored.key)
            expected = stored.weight.type.shape
            shape = tuple(array.shape) if array is not None and is_array(array) else None
            if shape is None or (len(shape) != len(expected) if is_part else shape != expected):
                key = f"{TREE if stored.in_tree else BESIDE} {stored.key}"
                at = f"{where}, {key}" if where else key
                actual = type(array).__name__ if shape is None else str(list(shape))
                words = "an array of the parameters has another shape than the conversion gave it"
                problems.append(Problem(words, at, str(list(expected)), actual))
        if problems:
            raise InputError(problems)
        return converted

    def array(self, slot: ParamSlot) -> AnyArray:
        """Return the array in which a parameter lies."""
        return self.leaves[slot.key] if slot.in_tree else self.beside[slot.key]

    def stacked(self, slots: Sequence[ParamSlot], lengths: tuple[int, ...]) -> AnyArray:
        """Return a parameter of blocks in loops, the loops in front; of one block as it is.

        Args:
          slots: where it lies for each block.
          lengths: how often each loop runs.
        """
        array = self.array(slots[0])
        is_stack = len({(s.key, s.in_tree) for s in slots}) == 1 and slots[0].row is not None
        if lengths and is_stack and [s.row for s in slots] == [*range(array.shape[0])]:
            return array.reshape(*lengths, *array.shape[1:])
        rows = [self.array(s) if s.row is None else self.array(s)[s.row] for s in slots]
        return jnp.stack(rows).reshape(*lengths, *rows[0].shape) if lengths else rows[0]


def call_converted(
    state: ConversionState,
    function: Function,
    execution: Execution,
    params: PyTree,
    arguments: tuple[tuple[AnyArray, ...], Mapping[str, AnyArray]],
    extra: Mapping[str, AnyArray],
    *,
    losses: bool,
) -> AnyArray:
    """Return the result of a function on new parameters.

    Args:
      state: of the conversion.
      function: the user's function of dense parameters.
      execution: how parts are run.
      params: the new parameters.
      arguments: the other arguments, by position and by name.
      extra: further inputs of the graph.
      losses: whether losses and metrics are returned, too.

    Raises:
      InputError: the parameters do not fit, or the function cannot be traced, or it uses what
        is an expert's now in another way.
    """
    storage = state.storage
    converted = ConvertedParams.of(state.tree, storage, params, function_line(function))
    avals = {}
    for name, leaf in converted.leaves.items():
        dense = state.leaves[name] if name in storage.gone else leaf
        dtype = dense.dtype.numpy if leaf is None else leaf.dtype
        avals[name] = shape_of(dense.shape, dtype)
    leaves = leaves_of(avals)
    leaves |= {n: leaf for n, leaf in state.leaves.items() if leaf.shape == avals[n].shape}
    traced = trace_function(function, state.tree, avals, leaves, arguments)
    replacements = _replacements(state, traced)
    _check_extra(extra, replacements)
    rewritten = RewrittenFunction(
        traced.scope,
        replacements,
        skipped_equations(traced.scope, equations_of(r.site for r in replacements)),
        execution,
        extra,
        side=losses,
    )
    weights = {}
    for r in replacements:
        slots = [[storage.slots[p.name] for p in part.params] for part in r.parts]
        columns = zip(*slots, strict=True)
        weights[r.number] = tuple(converted.stacked(each, r.site.lengths) for each in columns)
    arrays = [None if n in storage.gone else converted.leaves[n] for n in state.tree.array_names]
    results, side = rewritten.run([*arrays, *traced.arrays], weights)
    result = jax.tree_util.tree_unflatten(traced.treedef, results)
    if not losses:
        return result
    return with_losses(result, joined_losses(state.parts, replacements, side))


def _check_extra(extra: Mapping[str, AnyArray], replacements: Sequence[Replacement]) -> None:
    """Raise InputError where further inputs of the graph are missing or unknown."""
    needed = {v.name: v for r in replacements for v in r.parts[0].extra}
    if set(needed) != set(extra):
        raise InputError(
            "the graph of the blocks takes other inputs than were given",
            expected=f"moe_inputs={{{', '.join(f'{n!r}: …' for n in needed)}}}",
            found=", ".join(extra) or "none",
            hint="; ".join(f"{n}: {v.type}" for n, v in needed.items()) or None,
        )
    check_keys({name: extra[name] for name, v in needed.items() if v.type.dtype.kind == "key"})


def _replacements(state: ConversionState, traced: TracedFunction) -> list[Replacement]:
    """Return what stands for the blocks of a function; every expert must be of one of them."""
    survey = survey_blocks(traced.scope)
    pairs = [(site, state.parts_of(site)) for site in survey.sites]
    replacements = [Replacement(n, site, parts) for n, (site, parts) in enumerate(pairs) if parts]
    inside = equations_of(r.site for r in replacements)
    gone = state.storage.gone
    uses = [u for u in leaf_uses(traced.scope, inside) if u.view.leaf.name in gone]
    if uses:
        reasons = {n: m.reason for m in survey.misses for n in m.weights}
        raise InputError(
            Problem(
                f"`{use.view.leaf.name}` holds the weights of experts now, and is used "
                "otherwise here",
                where=str(use),
                found=reasons.get(use.view.leaf.name),
                hint="use it in its block alone, as the converted function does",
            )
            for use in uses
        )
    return replacements
