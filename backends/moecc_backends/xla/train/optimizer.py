"""The optimisers: from gradients and moments to directions, by the transformations of optax.

The step multiplies a direction by the learning rate, which is an input of the compiled program, and
by what a parameter's group says.  Moments are arrays by kind and parameter
(`moecc.train.settings`), whatever the library's own types are, so that checkpoints and formulas
know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt

import jax
import jax.numpy as jnp
from jax import Array

from moecc.errors import MachineError, UsageError, unknown_name
from moecc.formats.source import FIRST, SECOND
from moecc.support.extras import install_hint
from moecc.train.recipe import OptimizerSection
from moecc.train.settings import (
    COUNT,
    ParamSettings,
    count_of,
    moment_types,
    uses_muon,
)
from moecc.types import TensorType
from moecc_backends.xla.trace.values import Arrays, NamedArrays, Outputs, PyTree

Moments = dict[str, PyTree]
"""``{kind: {parameter: array}}``, and the counts of updates."""

Settle = Callable[[PyTree, PyTree], PyTree]
"""Takes moments after an update and those before it, and returns the ones that stay."""

MUON_RMS = 0.2
"""Muon's updates are scaled to the root mean square of AdamW's (Liu et al. 2025, §2.2)."""


@dataclass(frozen=True)
class Optimizer:
    """An optimiser of the parameters that are trained.

    Attributes:
      section: its name and numbers.
      types: the types of the parameters.
      settings: how each of them is trained.
    """

    section: OptimizerSection
    types: Mapping[str, TensorType]
    settings: Mapping[str, ParamSettings]

    def __post_init__(self) -> None:
        name = self.section.name
        if name not in DIRECTIONS:
            raise UsageError([unknown_name("optimizer", name, DIRECTIONS)])
        try:
            import optax as optax
        except ImportError:
            raise MachineError("training needs optax", hint=install_hint("train")) from None

    @property
    def moment_types(self) -> dict[str, dict[str, TensorType]]:
        """The types of the moments, by kind and parameter."""
        return moment_types(self.section.name, self.types, self.settings)

    def init(self, params: NamedArrays) -> Moments:
        """Return the moments before the first update: zeros."""
        zeros = {
            kind: {n: jnp.zeros(t.shape, params[n].dtype) for n, t in types.items()}
            for kind, types in self.moment_types.items()
        }
        counts = (COUNT, *map(count_of, self._parts))
        return {**zeros, **{count: jnp.zeros((), jnp.int32) for count in counts}}

    def directions(
        self,
        gradients: NamedArrays,
        moments: Moments,
        params: NamedArrays,
        settle: Settle = lambda after, before: after,
    ) -> tuple[Outputs, Moments]:
        """Return the directions in which parameters go, to be subtracted, and the moments after.

        Parameters that are trained from a later step on have a count of updates of their own.

        Args:
          gradients: the gradients of the parameters.
          moments: before the update.
          params: the parameters.
          settle: says which moments stay; AdamW's directions are those of the moments that do.
        """
        directions: Outputs = {}
        after: Moments = {kind: {} for kind in self.moment_types}
        for first, names in self._parts.items():
            count = count_of(first)
            all_moments = ((k, moments[k]) for k in self.moment_types)
            parts = {
                k: {n: a for n, a in arrays.items() if n in names} for k, arrays in all_moments
            }
            part: Moments = {kind: arrays for kind, arrays in parts.items() if arrays}
            update = Update(
                self, _some(gradients, names), {**part, COUNT: moments[count]}, params, settle
            )
            updates, moved = DIRECTIONS[self.section.name](update)
            directions |= updates
            after[count] = settle(moved.pop(COUNT), moments[count])
            for kind, arrays in moved.items():
                after[kind] |= arrays
        return directions, {COUNT: settle(moments[COUNT] + 1, moments[COUNT]), **after}

    @property
    def _parts(self) -> dict[int, list[str]]:
        """The parameters by the step from which they are trained."""
        firsts = sorted({settings.first_step for settings in self.settings.values()})
        return {
            first: [n for n in self.types if self.settings[n].first_step == first]
            for first in firsts
        }


@dataclass(frozen=True)
class Update:
    """What an update is made of.

    Attributes:
      optimizer: the optimiser.
      gradients: the gradients of the parameters.
      moments: before the update.
      params: the parameters.
      settle: says which moments stay.
    """

    optimizer: Optimizer
    gradients: NamedArrays
    moments: Moments
    params: NamedArrays
    settle: Settle


Direction = tuple[Outputs, Moments]
"""Directions by parameter, and the moments after; their count is the caller's to settle."""


def _sgd(update: Update) -> Direction:
    return dict(update.gradients), {COUNT: update.moments[COUNT] + 1}


def _adamw(update: Update) -> Direction:
    import optax

    section, moments = update.optimizer.section, update.moments
    state = optax.ScaleByAdamState(moments[COUNT], moments[FIRST], moments[SECOND])
    adam = optax.scale_by_adam(section.b1, section.b2, section.eps)
    _, after = adam.update(update.gradients, state)
    moved = {FIRST: after.mu, SECOND: after.nu}
    moved = update.settle(moved, {kind: moments[kind] for kind in moved})
    first = optax.tree.bias_correction(moved[FIRST], section.b1, after.count)
    second = optax.tree.bias_correction(moved[SECOND], section.b2, after.count)
    # As optax has it, of the moments that stay.
    directions = {n: m / (jnp.sqrt(second[n]) + section.eps) for n, m in first.items()}
    return directions, {**moved, COUNT: after.count}


def _muon(update: Update) -> Direction:
    """Muon for matrices (Jordan et al. 2024), AdamW's direction for all else, tables and the head.

    The count and the momentum of both are one.
    """
    from optax.contrib import MuonDimensionNumbers, scale_by_muon

    section, settings = update.optimizer.section, update.optimizer.settings
    gradients, moments, params = update.gradients, update.moments, update.params
    mine = [n for n in gradients if uses_muon(settings[n])]
    plain = [n for n in gradients if n not in mine]
    # The dimensions that a matrix sums over, and those that it makes.
    sides = {}
    for name in mine:
        over, blocks = settings[name].over, settings[name].blocks
        columns = (d for d in range(params[name].ndim) if d not in (*blocks, *over))
        sides[name] = over, tuple(columns)
    numbers = {n: MuonDimensionNumbers(*pair) for n, pair in sides.items()}
    muon = scale_by_muon(beta=section.b1, eps=section.eps, weight_dimension_numbers=numbers)
    start = muon.init({})
    before = start._replace(count=moments[COUNT], mu=_some(moments[FIRST], mine))
    directions, after = muon.update(_some(gradients, mine), before)
    for name, direction in directions.items():
        # An orthogonal matrix becomes as large as an update of AdamW's.
        shape = update.optimizer.types[name].shape
        largest = max(prod(shape[d] for d in side) for side in sides[name])
        directions[name] = direction * (MUON_RMS * sqrt(largest))
    of_plain = {FIRST: _some(moments[FIRST], plain), SECOND: moments.get(SECOND, {})}
    others, moved = _adamw(
        replace(update, gradients=_some(gradients, plain), moments={**moments, **of_plain})
    )
    first = {**update.settle(after.mu, before.mu), **moved[FIRST]}
    return {**directions, **others}, {
        **({FIRST: first} if first else {}),
        **({SECOND: moved[SECOND]} if plain else {}),
        COUNT: moved[COUNT],
    }


def _some(arrays: NamedArrays, names: Iterable[str]) -> Outputs:
    return {n: arrays[n] for n in names}


def _adafactor(update: Update) -> Direction:
    """Adafactor, factored and without momentum (Shazeer and Stern 2018).

    A block is clipped and scaled by itself: a layer of a rolled parameter, an expert.
    """
    optimizer, moments = update.optimizer, update.moments
    types_of_moments = optimizer.moment_types
    directions: Outputs = {}
    after: Moments = {kind: {} for kind in moments if kind != COUNT}
    for name, gradient in update.gradients.items():
        kinds = tuple(kind for kind in after if name in moments[kind])
        types = (optimizer.types[name], *(types_of_moments[kind][name] for kind in kinds))
        blocks, clip = optimizer.settings[name].blocks, optimizer.section.update_clip
        moment_arrays = (moments[kind][name] for kind in kinds)
        directions[name], *updated = _by_block(
            _Factored(types, kinds, blocks, clip),
            moments[COUNT],
            gradient,
            update.params[name],
            *moment_arrays,
        )
        for kind, array in zip(kinds, updated, strict=True):
            after[kind][name] = array
    stay = {kind: update.settle(arrays, moments[kind]) for kind, arrays in after.items()}
    return directions, {**stay, COUNT: moments[COUNT] + 1}


@dataclass(frozen=True)
class _Factored:
    """What Adafactor's update of a parameter depends on.  Those that are alike share one function.

    Attributes:
      types: the type of the parameter, and of its moments.
      kinds: the kinds of the moments.
      blocks: the dimensions along which each slice is a parameter by itself.
      clip: the largest root mean square of an update.
    """

    types: tuple[TensorType, ...]
    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    clip: float


@partial(jax.jit, static_argnums=0)
def _by_block(
    like: _Factored, count: Array, gradient: Array, param: Array, *moments: Array
) -> Arrays:
    """Return the direction of one parameter by Adafactor, and its moments after."""
    import optax

    parts = (
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(like.clip),
        optax.scale_by_param_block_rms(),
    )
    chain = optax.chain(*parts)

    def of_block(gradient: Array, param: Array, *moments: Array) -> PyTree:
        by_kind = dict(zip(like.kinds, moments, strict=True))
        initial = chain.init(param)
        # optax has the same names of kinds.
        state = initial[0]._replace(count=count, **by_kind)
        direction, after = chain.update(gradient, (state, *initial[1:]), param)
        return direction, *(getattr(after[0], kind) for kind in like.kinds)

    function, type = of_block, like.types[0]
    arguments = [type.names, *(t.names for t in like.types)]
    left = [type.names[dimension] for dimension in like.blocks]
    while left:
        axis = left.pop(0)
        at = tuple([n for n in names if n not in left].index(axis) for names in arguments)
        function = jax.vmap(function, in_axes=at, out_axes=(at[0], *at[2:]))
    updated: Arrays = function(gradient, param, *moments)
    return updated


DIRECTIONS: dict[str, Callable[[Update], Direction]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
}
"""How an optimiser makes directions, by its name."""
