"""Tensors that a GGUF file holds in other parts or orders than Hugging Face, as expressions.

Each whole is cut into the parts of a file, and joined again, by expressions that undo one another;
`GgufFamily.rearranged` names the wholes and their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from moecc.families.decoder import DecoderConfig, DeltaLayers
from moecc.weights.expr import Expr
from moecc.weights.movement import Concat, Index, Merge, Permute, Rename, Slice, Split, Stack

Parts = tuple[Expr, ...]


def cut(joined: str, expr: Expr, config: DecoderConfig) -> Parts:
    """Return the parts of a file that the tensor `expr` is stored as.

    Args:
      joined: the end of the name in Hugging Face of the tensor that the parts are joined to.
      expr: the tensor.
      config: the config of the model.
    """
    rows, *columns = expr.type.names
    if config.names.inputs_first:
        # Inputs come first in Hugging Face, and gate and up are halves, or alternate.
        halves: Parts = (expr,)
        if config.names.expert_gate_up in joined:
            *_, outputs = columns
            count = expr.type[outputs].fixed_size
            if config.names.in_turns:
                turns = Split(expr, outputs, ((outputs, count // 2), ("turn", 2)))
                halves = (Index(turns, "turn", 0), Index(turns, "turn", 1))
            else:
                ends = ((0, count // 2), (count // 2, count))
                halves = tuple(Slice(expr, outputs, start, stop) for start, stop in ends)
        return tuple(Permute(half, (rows, *reversed(columns))) for half in halves)
    if config.latent is not None:
        width = config.head_dim - config.rotated_dim
        keys, values = _cut_groups(
            expr, config.num_attention_heads, (width, config.latent.value_dim)
        )
        return Permute(keys, ("group", *columns, "entry")), values
    delta = config.delta
    assert delta is not None, "no other family is rearranged"
    if config.names.delta_by_group:
        each = delta.value_heads // delta.key_heads * delta.value_dim
        sizes = (delta.key_dim, delta.key_dim, each, each)
        parts = [
            Merge(p, ("group", "entry"), rows) for p in _cut_groups(expr, delta.key_heads, sizes)
        ]
        return Concat(tuple(parts[:3]), rows), parts[3]
    if joined.endswith("conv1d.weight"):
        expr = Index(expr, columns[0], 0)
    return (_reordered(joined, expr, delta, (delta.key_heads, _values_of(delta))),)


def join(joined: str, parts: Sequence[Expr], config: DecoderConfig) -> Expr:
    """Return the tensor whose `parts` are stored; the reverse of `cut`."""
    rows = parts[0].type.names[0]
    if config.names.inputs_first:
        expert, outputs, *inputs = parts[0].type.names
        named = tuple(_named(part, (expert, outputs, *inputs)) for part in parts)
        if config.names.in_turns and len(named) > 1:
            tensor: Expr = Merge(Stack(named, "turn", 2), (outputs, "turn"), outputs)
        else:
            tensor = Concat(named, outputs)
        return Permute(tensor, (expert, *inputs, outputs))
    if config.latent is not None:
        group, latent, entry = parts[0].type.names
        values = _named(parts[1], (group, entry, latent))
        keys = Permute(parts[0], (group, entry, latent))
        return Merge(Concat((keys, values), entry), (group, entry), entry)
    delta = config.delta
    assert delta is not None, "no other family is rearranged"
    if config.names.delta_by_group:
        each, keys_width = _values_of(delta) * delta.value_dim, delta.key_heads * delta.key_dim
        ends = (0, keys_width, 2 * keys_width, 2 * keys_width + delta.key_heads * each)
        by_kind = (Slice(parts[0], rows, start, stop) for start, stop in pairwise(ends))
        gates = _named(parts[1], parts[0].type.names)
        grouped = [_grouped(part, rows, delta.key_heads) for part in (*by_kind, gates)]
        return Merge(Concat(tuple(grouped), "entry"), ("group", "entry"), rows)
    expr = _reordered(joined, parts[0], delta, (_values_of(delta), delta.key_heads))
    return Stack((expr,), "unit", 1) if joined.endswith("conv1d.weight") else expr


def _values_of(delta: DeltaLayers) -> int:
    """Return the value heads of a key head."""
    return delta.value_heads // delta.key_heads


def _cut_groups(expr: Expr, groups: int, sizes: Sequence[int]) -> Parts:
    """Return ranges of the rows of each group, ``[group, entry, …]``."""
    grouped, start, parts = _grouped(expr, expr.type.names[0], groups), 0, []
    for size in sizes:
        parts.append(Slice(grouped, "entry", start, start + size))
        start += size
    return tuple(parts)


def _grouped(expr: Expr, rows: str, groups: int) -> Expr:
    entries = expr.type[rows].fixed_size // groups
    return Split(expr, rows, (("group", groups), ("entry", entries)))


def _named(expr: Expr, names: Sequence[str]) -> Expr:
    for old, new in zip(expr.type.names, names, strict=True):
        expr = expr if old == new else Rename(expr, old, new)
    return expr


def _reordered(joined: str, expr: Expr, delta: DeltaLayers, sizes: tuple[int, int]) -> Expr:
    """Return a tensor with the two axes that count value heads, of `sizes`, exchanged.

    Value heads of a key head are neighbours in Hugging Face; in a file the key head is the inner
    axis, so that llama.cpp repeats keys as they lie.
    """
    axis = expr.type.names[-1 if joined.endswith("out_proj.weight") else 0]
    count = expr.type[axis].fixed_size
    # Queries and keys lie before values in the matrices of all three.
    before = 2 * delta.key_heads * delta.key_dim if ("qkv" in joined or "conv1d" in joined) else 0
    values = Slice(expr, axis, before, count) if before else expr
    width = (count - before) // (sizes[0] * sizes[1])
    split = Split(values, axis, (("outer", sizes[0]), ("inner", sizes[1]), ("entry", width)))
    order = {"outer": "inner", "inner": "outer"}
    exchanged = Permute(split, tuple(order.get(name, name) for name in split.type.names))
    values = Merge(exchanged, ("inner", "outer", "entry"), axis)
    return Concat((Slice(expr, axis, 0, before), values), axis) if before else values
