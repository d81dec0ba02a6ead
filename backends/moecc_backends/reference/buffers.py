"""The meaning of bounded receive buffers."""

from __future__ import annotations

import numpy as np

from moecc.errors import InputError
from moecc.ir.operand import Attrs
from moecc.ir.table.routing import buffer_rows
from moecc_backends.reference.arrays import Array, Data, meaning


@meaning("within_buffer")
def within_buffer(
    experts: Array, slots: Array, counts: Array, *, tokens: tuple[str, ...], **attrs: object
) -> Array:
    """Return which choices have a slot and room at the device of their expert.

    Raises:
      InputError: blocks do not divide the groups, or groups the tokens.
    """
    total = counts.size("group")
    return kept_from(experts, slots, counts, tokens, attrs, first=0, groups=total)


def kept_from(
    experts: Array,
    slots: Array,
    counts: Array,
    tokens: tuple[str, ...],
    attrs: Attrs,
    *,
    first: int,
    groups: int,
) -> Array:
    """Return the result for tokens of `groups` groups, the first of which is number `first`."""
    (choice,) = (a for a in experts.axes if a not in tokens)
    layout = (*tokens, choice)
    shape = [experts.size(a) for a in layout]
    chosen, taken = (x.to(layout).reshape(-1, shape[-1]) for x in (experts, slots))
    every = counts.size("group")
    if every % attrs["blocks"] or len(chosen) % groups:
        raise InputError(
            "the groups do not divide the tokens, or blocks the groups",
            expected=f"a multiple of {groups} tokens and of {attrs['blocks']} groups",
            found=f"{len(chosen)} tokens, {every} groups",
        )
    each = len(chosen) // groups
    rows = buffer_rows(attrs, each * every // attrs["blocks"], shape[-1])
    room = _room(counts.to(("group", "expert")), attrs, rows)
    group = first + np.arange(len(chosen)) // max(each, 1)
    there = (taken >= 0) & (chosen >= 0) & (chosen < counts.size("expert"))
    limit = room[group[:, None], np.where(there, chosen, 0)]
    keep = there & (taken < limit)
    return Array(Array(keep.reshape(shape), layout).to(experts.axes), experts.axes)


def _room(counts: Data, attrs: Attrs, rows: int) -> Data:
    """Return how many slots of each group and expert fit, ``[group, expert]``."""
    groups, experts = counts.shape
    blocks, parts = attrs["blocks"], attrs["parts"]
    cells = counts.reshape(blocks, groups // blocks, parts, experts // parts)
    # In the order of arrival: group, then expert, for each block and device.
    line = cells.transpose(0, 2, 1, 3).reshape(blocks, parts, -1)
    before = np.cumsum(line, -1) - line
    room = np.clip(rows - before, 0, line)
    back = room.reshape(blocks, parts, groups // blocks, experts // parts)
    return np.asarray(back.transpose(0, 2, 1, 3).reshape(groups, experts))
