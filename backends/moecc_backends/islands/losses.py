"""Losses and metrics of converted functions: joined over where blocks run, added to a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from moecc.ir.graph import Value
from moecc.types import F32
from moecc_backends.islands.jaxprs import AnyArray
from moecc_backends.islands.parts import Part, Parts
from moecc_backends.islands.run import Replacement, Side
from moecc_backends.islands.scopes import Step
from moecc_backends.islands.sites import Site
from moecc_backends.xla.trace.typed_jax import PyTree

AUXILIARY = "loss.auxiliary"
"""The output that `add-losses` makes of all losses of routers."""

MODEL = "loss.model"
"""The result of the user's loss alone."""


def joined(
    parts: Parts,
    of_sites: Mapping[int, Sequence[Part]],
    replaced: Sequence[Replacement],
    side: Side,
) -> dict[str, AnyArray]:
    """Return the losses and metrics of what parts returned besides their outputs.

    A block that runs several times has the mean of what it returned; one that does not run, zero.

    Args:
      parts: all blocks.
      of_sites: the blocks of each site, by its number.
      replaced: the sites.
      side: what their parts returned, loops in front.
    """
    values: dict[Value, list[AnyArray]] = {}
    for one in replaced:
        scans = [s for s in one.site.island.scope.owners if s.name == "scan"]
        for at, array in enumerate(side.get(one.number, ())):
            rows = _rows(array, scans, one.site)
            for row, part in zip(rows, of_sites[one.number], strict=True):
                values.setdefault(part.side[at], []).append(row)
    means: dict[Value, AnyArray] = {
        v: rows[0] if len(rows) == 1 else sum(rows) / len(rows) for v, rows in values.items()
    }
    for part in parts.blocks.values():
        for value in part.side:
            if value not in means:
                means[value] = _zero(value)
    return parts.finish(means, F32)


def _rows(array: AnyArray, scans: Sequence[Step], site: Site) -> list[AnyArray]:
    """Return what each block of a site returned: the mean over loops that run the same block."""
    others = tuple(i for i, s in enumerate(scans) if s not in site.loops)
    mean = jnp.mean(array, axis=others) if others else array
    if not site.loops:
        return [mean]
    flat = mean.reshape(site.count, *mean.shape[len(site.loops) :])
    return [flat[i] for i in range(site.count)]


def _zero(value: Value) -> AnyArray:
    return jnp.zeros([s if isinstance(s, int) else 1 for s in value.type.sizes], jnp.float32)


def with_losses(result: PyTree, found: dict[str, AnyArray]) -> AnyArray:
    """Return a result and the losses and metrics `found`.

    A scalar, or the first of a tuple if it is one, is the model's loss: `AUXILIARY` is added to it.
    """
    auxiliary = found.get(AUXILIARY)
    if isinstance(result, tuple) and result and _is_loss(result[0]):
        loss, *rest = result
        more = rest[0] if len(rest) == 1 else tuple(rest)
        return _total(loss, auxiliary), (more, {MODEL: loss, **found})
    if _is_loss(result):
        return _total(result, auxiliary), {MODEL: result, **found}
    return result, found


def _is_loss(result: PyTree) -> bool:
    is_number = hasattr(result, "shape") and result.shape == ()
    return is_number and bool(jnp.issubdtype(result.dtype, jnp.floating))


def _total(loss: AnyArray, auxiliary: AnyArray) -> AnyArray:
    return loss if auxiliary is None else loss + auxiliary.astype(loss.dtype)
