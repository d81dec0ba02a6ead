"""Kernels of attention: blocks of queries with a gradient of their own, splash attention, cuDNN."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from moecc.ir.attention import Span, share_of_tpu_blocks, spans, tpu_block
from moecc_backends.xla.kernels.grouped_matmul import zeros_after
from moecc_backends.xla.trace.context import VALUE, DeviceView
from moecc_backends.xla.trace.values import Arrays, PyTree, accumulator, unchecked, varies

# What an attention is made of, as arrays without names of axes.


class AttentionArrays(NamedTuple):
    """The operands of an attention.

    What follows the values is laid out as scores are, ``[batch, head, group, seq, kv_seq]``, with
    axes of size 1 that stand for any.

    Attributes:
      query: ``[batch, head, group, seq, width]``.
      key: ``[batch, head, kv_seq, width]``.
      value: ``[batch, head, kv_seq, wide]``.
      bias: what is added to scores.
      sinks: scores that no value belongs to.
      keep: which scores count.
      query_segments: the segment of each query, 0 for padding.
      key_segments: the segment of each key.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None = None
    sinks: Array | None = None
    keep: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None


@dataclass(frozen=True)
class AttentionRule:
    """The attributes of an attention, see the operation of that name.

    Attributes:
      scale: the factor on the products.
      cap: the soft cap of scores; 0 for none.
      causal: whether a query sees only keys up to its own index.
      window: how many of them; 0 for all.
      by_key: whether gradients that are computed block by block have scores with the key first.
    """

    scale: float = 1.0
    cap: float = 0.0
    causal: bool = False
    window: int = 0
    by_key: bool = False


Block = Callable[[Span, Arrays, "Array | int"], tuple[Arrays, Arrays]]
"""Takes a span, sums so far and the first query; returns the sums, and arrays of its queries."""

_QUERIES, _KEYS = 3, 4
"""The dimensions of scores, and of arrays that are laid out like them."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_attention(rule: AttentionRule, arrays: AttentionArrays) -> Array:
    """Return the averaged values, ``[batch, head, group, seq, wide]``, in the type of the queries.

    Sums run in float32 at least.
    """
    return _blocks(rule, arrays)[0]


def _blocks(rule: AttentionRule, arrays: AttentionArrays) -> Arrays:
    """Return the averaged values, and the denominator of each query, see `_averaged`."""

    def block(span: Span, sums: Arrays, start: Array | int) -> tuple[Arrays, Arrays]:
        part = _block(arrays, span, start)
        scores, _ = _scores(rule, part, (start, span.first_key), BY_QUERY)
        return sums, _averaged(part, scores)

    return _walk(rule, arrays, block, ())[1]


def _forward(
    rule: AttentionRule, arrays: AttentionArrays
) -> tuple[Array, tuple[AttentionArrays, Array, Array]]:
    # Named here, so that the gradient reads the very arrays that are kept.
    mixed, denominators = (checkpoint_name(a, VALUE) for a in _blocks(rule, arrays))
    return mixed, (arrays, mixed, denominators)


def _backward(
    rule: AttentionRule,
    residuals: tuple[AttentionArrays, Array, Array],
    d_mixed: Array,
) -> tuple[AttentionArrays]:
    arrays, mixed, denominators = residuals
    wide = denominators.dtype
    spread = jnp.sum(d_mixed.astype(wide) * mixed.astype(wide), -1, keepdims=True)
    summed = tuple(a for a in arrays[1:5] if a is not None)

    def block(span: Span, sums: Arrays, start: Array | int) -> tuple[Arrays, Arrays]:
        part = _block(arrays, span, start)
        ends = (_part(a, _QUERIES, start, span.size) for a in (d_mixed, denominators, spread))
        d_query, *more = _block_gradient(rule, part, (start, span.first_key), *ends)
        places = {4: (0, 0, span.first_key, 0), 5: (0, 0, 0, start, span.first_key)}

        def added(total: Array, new: Array) -> Array:
            """Return `total` with `new` added, which begins further on where it is smaller."""
            at = zip(places[new.ndim], total.shape, new.shape, strict=True)
            first = [0 if full == size else index for index, full, size in at]
            before = lax.dynamic_slice(total, first, new.shape)
            return lax.dynamic_update_slice(total, before + new, first)

        return tuple(map(added, sums, more)), (d_query,)

    zeros = (zeros_after(d_mixed, a.shape, wide, i) for i, a in enumerate(summed))
    sums, (d_query,) = _walk(rule, arrays, block, tuple(zeros))
    gradients = iter(a.astype(a_.dtype) for a, a_ in zip(sums, summed, strict=True))
    d_key, d_value = next(gradients), next(gradients)
    more = (None if a is None else next(gradients) for a in arrays[3:5])
    return (AttentionArrays(d_query, d_key, d_value, *more),)


block_attention.defvjp(_forward, _backward)


def _walk(
    rule: AttentionRule, arrays: AttentionArrays, block: Block, sums: Arrays
) -> tuple[Arrays, Arrays]:
    """Call `block` for each block of queries; return the sums, and its arrays along all queries."""
    queries, keys = arrays.query.shape[_QUERIES], arrays.key.shape[2]
    spanned: list[Arrays] = []
    for span in spans(queries, keys, causal=rule.causal, window=rule.window):
        if span.blocks == 1:
            sums, arrays_of_span = block(span, sums, span.start)
        else:
            starts = span.start + span.size * jnp.arange(span.blocks)
            sums, stacked = lax.scan(partial(block, span), sums, starts)
            # The queries of all blocks in a row.
            rows = (jnp.moveaxis(a, 0, _QUERIES) for a in stacked)
            arrays_of_span = tuple(a.reshape(*a.shape[:3], -1, *a.shape[5:]) for a in rows)
        spanned.append(arrays_of_span)
    return sums, tuple(jnp.concatenate(parts, _QUERIES) for parts in zip(*spanned, strict=True))


def _part(array: Array, axis: int, start: Array | int, size: int) -> Array:
    """Return a slice of `array`, whose axis may have size 1 in place of any."""
    if array.shape[axis] == 1:
        return array
    return lax.dynamic_slice_in_dim(array, start, size, axis)


def _block(arrays: AttentionArrays, span: Span, start: Array | int) -> AttentionArrays:
    """Return the operands of a block of queries, and of the keys of its span."""
    keys = span.last_key - span.first_key
    query = _part(arrays.query, _QUERIES, start, span.size)
    key, value = (_part(a, 2, span.first_key, keys) for a in arrays[1:3])
    more = (
        None
        if a is None
        else _part(_part(a, _QUERIES, start, span.size), _KEYS, span.first_key, keys)
        for a in arrays[3:]
    )
    return AttentionArrays(query, key, value, *more)


def _rows(array: Array) -> Array:
    """Return ``[batch, head, group, query, …]`` with the queries of a group as rows."""
    batch, head, group, query, *sizes = array.shape
    return array.reshape(batch, head, group * query, *sizes)


@dataclass(frozen=True)
class _Form:
    """An order of the dimensions of what there is for each query and key.

    For the gradient of keys and values, scores with the key first are what a product of matrices
    takes as it lies in memory; the other way round, XLA for CPUs takes twice the time for these
    two.  For the averages the query is first, and XLA finds the same scores in the gradient of an
    attention that is rematerialised right before it only where the query is first there, too.

    Attributes:
      is_by_key: whether it is ``[batch, head, key, group, query]``, and not ``[batch, head, group,
        query, key]``.
    """

    is_by_key: bool

    def of(self, array: Array) -> Array:
        """Return an array for ``[batch, head, group, query, key]`` in this order."""
        return jnp.moveaxis(array, _KEYS, 2) if self.is_by_key else array

    def pairs(self, rows: Array, keys: Array, block: AttentionArrays) -> Array:
        """Return the products of ``[…, row, entry]`` with ``[…, key, entry]``."""
        batch, head, *query = block.query.shape[:-1]
        if self.is_by_key:
            products = _product("bhtd,bhrd->bhtr", keys, rows)
            return products.reshape(batch, head, -1, *query)
        return _product("bhrd,bhtd->bhrt", rows, keys).reshape(batch, head, *query, -1)

    def flat(self, pairs: Array) -> Array:
        """Return pairs with the queries of a group as rows."""
        if self.is_by_key:
            return pairs.reshape(*pairs.shape[:3], -1)
        return _rows(pairs)

    def to_rows(self, pairs: Array, keys: Array) -> Array:
        """Return the sums over keys, ``[…, row, entry]``."""
        return _product("bhtr,bhtd->bhrd" if self.is_by_key else "bhrt,bhtd->bhrd", pairs, keys)

    def to_keys(self, pairs: Array, rows: Array) -> Array:
        """Return the sums over queries, ``[…, key, entry]``."""
        return _product("bhtr,bhrd->bhtd" if self.is_by_key else "bhrt,bhrd->bhtd", pairs, rows)


BY_QUERY, BY_KEY = _Form(is_by_key=False), _Form(is_by_key=True)


def _product(spelling: str, a: Array, b: Array) -> Array:
    wide = accumulator(b.dtype)
    return jnp.einsum(spelling, a, b, preferred_element_type=wide)


def _scores(
    rule: AttentionRule, block: AttentionArrays, first: tuple[Array | int, int], form: _Form
) -> tuple[Array, Array | None]:
    """Return the scores of a block in a form, −∞ where hidden, and the slope of the soft cap.

    Args:
      rule: what is no array.
      block: the operands.
      first: the first query and the first key of the block.
      form: the order of dimensions.
    """
    scores = form.pairs(_rows(block.query), block.key, block) * rule.scale
    slope = None
    if rule.cap:
        bounded = jnp.tanh(scores / rule.cap)
        scores, slope = rule.cap * bounded, 1 - bounded * bounded
    if block.bias is not None:
        scores = scores + form.of(block.bias).astype(scores.dtype)
    for seen in _seen(rule, block, *first):
        scores = jnp.where(form.of(seen), scores, -jnp.inf)
    return scores, slope


def _seen(
    rule: AttentionRule, block: AttentionArrays, first_query: Array | int, first_key: int
) -> Iterator[Array]:
    """Yield what hides keys from queries, each to be broadcast over ``[…, query, key]``."""
    if rule.causal:
        queries, keys = block.query.shape[_QUERIES], block.key.shape[2]
        behind = first_query + jnp.arange(queries)[:, None] - (first_key + jnp.arange(keys))
        seen = (behind >= 0)[None, None, None]
        yield seen & (behind < rule.window) if rule.window else seen
    if block.keep is not None:
        yield block.keep
    if block.query_segments is not None:
        yield (block.query_segments == block.key_segments) | (block.query_segments == 0)


def _averaged(block: AttentionArrays, scores: Array) -> Arrays:
    """Return the averaged values, zeros if nothing is seen, and the denominators.

    Of them the largest score, and the logarithm of the sum of exponentials beside it: added up,
    they would lose in float32 what large scores leave of the digits.
    """
    top = jnp.max(scores, -1, keepdims=True)
    sinks = None if block.sinks is None else block.sinks.astype(scores.dtype)
    top = top if sinks is None else jnp.maximum(top, sinks)
    top = jnp.where(jnp.isneginf(top), 0, top)
    parts = jnp.exp(scores - top)
    total = jnp.sum(parts, -1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - top)
    total = jnp.where(total == 0, 1, total)
    product = _product("bhrt,bhte->bhre", _rows(parts.astype(block.value.dtype)), block.value)
    mixed = product.reshape(*scores.shape[:-1], -1) / total
    return mixed.astype(block.query.dtype), jnp.concatenate([top, jnp.log(total)], -1)


def _block_gradient(
    rule: AttentionRule,
    block: AttentionArrays,
    first: tuple[Array | int, int],
    d_mixed: Array,
    denominators: Array,
    spread: Array,
) -> Iterator[Array]:
    """Yield the gradients of the queries, keys and values of a block, then of bias and sinks.

    Args:
      rule: what is no array.
      block: the operands.
      first: the first query and the first key of the block.
      d_mixed: the gradient of the averaged values.
      denominators: what `_averaged` returned of them.
      spread: for each query the sum of averaged values times their gradient.
    """
    # A bias is as large as the scores: it would be transposed, and its gradient back.
    form = BY_KEY if rule.by_key and block.bias is None else BY_QUERY
    rows, kind = _rows(d_mixed), block.query.dtype
    scores, slope = _scores(rule, block, first, form)
    top, log_total = jnp.split(denominators, 2, -1)
    weights = jnp.exp(scores - form.of(top) - form.of(log_total))
    d_scores = weights * (form.pairs(rows, block.value, block) - form.of(spread))
    d_products = d_scores * rule.scale if slope is None else d_scores * slope * rule.scale
    d_rows = form.flat(d_products.astype(kind))
    yield form.to_rows(d_rows, block.key).reshape(block.query.shape).astype(kind)
    yield form.to_keys(d_rows, _rows(block.query))
    yield form.to_keys(form.flat(weights.astype(kind)), rows)
    if block.bias is not None:
        yield _summed_to(d_scores, block.bias)
    if block.sinks is not None:
        sunk = jnp.exp(block.sinks.astype(scores.dtype) - top - log_total)
        yield _summed_to(-sunk * spread, block.sinks)


def _summed_to(array: Array, like: Array) -> Array:
    """Return `array` summed along the axes that have size 1 in `like`."""
    axes = [i for i, size in enumerate(like.shape) if size == 1 < array.shape[i]]
    return jnp.sum(array, axes, keepdims=True)


# Attention of GPUs: cuDNN's fused kernel, as ``jax.nn`` calls it.

CUDNN_VARIES = jax.__version_info__ >= (0, 10, 2)
"""Whether jax knows how results of cuDNN vary within a ``shard_map`` (jax-ml/jax#36008)."""


def cudnn_attention(
    rule: AttentionRule,
    arrays: AttentionArrays,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Return the averaged values, ``[batch, head, group, seq, wide]``.

    Args:
      rule: what is no array, without a soft cap.
      arrays: the operands; of the further ones the bias alone.
      implementation: ``xla`` is the same function for other platforms.
    """
    # jax types each gradient like its operand: one that is the same on devices whose queries differ
    # would have a part of its gradient on each, which nothing adds up.
    axes = varies(*jax.tree.leaves(arrays))
    arrays = jax.tree.map(lambda a: DeviceView().varying(a, axes), arrays)
    batch, head, group, seq, width = arrays.query.shape
    rows = arrays.query.reshape(batch, head * group, seq, width)
    query, key, value = (jnp.swapaxes(a, 1, 2) for a in (rows, arrays.key, arrays.value))
    bias = None
    if arrays.bias is not None:
        shape = (head, group, seq, key.shape[1])
        bias = jnp.broadcast_to(arrays.bias, (arrays.bias.shape[0], *shape))
        bias = bias.reshape(-1, head * group, *shape[2:])
    with score_pairs_scope(seq * key.shape[1]):
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            scale=rule.scale,
            is_causal=rule.causal,
            local_window_size=(rule.window - 1, 0) if rule.window else None,
            implementation=implementation,
        )
    return jnp.swapaxes(mixed, 1, 2).reshape(batch, head, group, seq, -1)


# How many scores a kernel computes, written into the program beside it.
#
# HLO says nothing of what a kernel of Pallas does. The scope in which it is traced does: XLA keeps
# the names of scopes in the metadata of its instructions.

_MARK = "score_pairs_"


def score_pairs_scope(pairs: int) -> AbstractContextManager[object]:
    """Return a scope of kernels that compute, for each head, the scores of `pairs`.

    Args:
      pairs: the number of pairs of a query and a key, skipped blocks left out.
    """
    return jax.named_scope(f"{_MARK}{pairs}")


def score_pairs_of(op_name: str) -> int | None:
    """Return the pairs that the scopes of an instruction say; None where they say nothing.

    Args:
      op_name: the name in its metadata.
    """
    match = re.search(rf"{_MARK}(\d+)", op_name)
    return int(match[1]) if match else None


# Attention of TPUs: JAX's splash attention, whose blocks of scores stay in VMEM.
#
# Inside a ``shard_map`` that tracks what varies over the mesh, kernels of Pallas say nothing of
# their results. So they are called where nothing is tracked, forward and backward each by
# themselves, and the gradient is put together here.


def splash_attention(
    rule: AttentionRule, arrays: AttentionArrays, *, interpret: bool = False
) -> Array:
    """Return the averaged values, ``[batch, head, group, seq, wide]``.

    Args:
      rule: what is no array.
      arrays: the operands; further ones are sinks alone.
      interpret: whether the kernel runs in Pallas' interpreter, on any platform.
    """
    batch, head, group, seq, width = arrays.query.shape
    # The kernel has no factor of its own.
    query = (arrays.query * rule.scale).astype(arrays.query.dtype)
    rows = query.reshape(batch, head * group, seq, width)
    operands: Arrays = (rows, arrays.key, arrays.value)
    if arrays.sinks is not None:
        wide = jnp.broadcast_to(arrays.sinks[:1, :, :, 0, 0], (1, head, group))
        operands = (*operands, wide.reshape(head * group))
    return _splash(rule, interpret, operands).reshape(batch, head, group, seq, -1)


@cache
def splash_kernel(
    rule: AttentionRule, heads: int, queries: int, keys: int, interpret: bool
) -> PyTree:
    """Return the kernel of one sequence, which also returns logarithms of denominators."""
    # Pallas takes a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    shape = (queries, keys)
    mask: splash_attention_mask.Mask = splash_attention_mask.FullMask(shape)
    if rule.window:
        mask = splash_attention_mask.LocalMask(shape, (rule.window - 1, 0), 0)
    elif rule.causal:
        mask = splash_attention_mask.CausalMask(shape)
    names = ("", "_dkv", "_dq")
    blocks: dict[str, Any] = {f"block_q{n}": tpu_block(queries) for n in names}
    blocks |= {f"block_kv{n}": tpu_block(keys) for n in (*names, "_compute", "_dkv_compute")}
    # What is traced while a kernel is made must not stay in the cache.
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=splash_attention_kernel.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=rule.cap or None,
            save_residuals=True,
            interpret=interpret,
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _splash(rule: AttentionRule, interpret: bool, operands: Arrays) -> Array:
    """Return averages, of queries, keys, values ``[batch, head, seq, …]`` and sinks ``[head]``."""
    return _splash_forward(rule, interpret, operands)[0]


def _splash_forward(
    rule: AttentionRule, interpret: bool, operands: Arrays
) -> tuple[Array, tuple[Arrays, Array, Array]]:
    def averaged(kernel: PyTree, query: Array, key: Array, value: Array, *sinks: Array) -> Arrays:
        mixed, (denominators,) = kernel(query, key, value, None, *sinks)
        return mixed, denominators

    results = _by_sequence(rule, interpret, averaged, operands)
    # Named, so that a policy of rematerialisation keeps them and the kernel runs once.
    mixed, denominators = (checkpoint_name(a, VALUE) for a in results)
    return mixed, (operands, mixed, denominators)


def _splash_backward(
    rule: AttentionRule,
    interpret: bool,
    residuals: tuple[Arrays, Array, Array],
    d_mixed: Array,
) -> tuple[Arrays]:
    operands, *more = residuals

    def gradient(kernel: PyTree, *arrays: Array) -> Arrays:
        query, key, value, mixed, denominators, d_mixed, *sinks = arrays
        residuals = (query, key, value, None, *(sinks or (None,)), mixed, denominators)
        return _gradient(kernel, residuals, d_mixed)

    gradients = _by_sequence(rule, interpret, gradient, operands, *more, d_mixed)
    # All sequences share the sinks.
    summed = [jnp.sum(d, 0) if x.ndim == 1 else d for d, x in zip(gradients, operands, strict=True)]
    return (tuple(d.astype(x.dtype) for d, x in zip(summed, operands, strict=True)),)


def _by_sequence(
    rule: AttentionRule,
    interpret: bool,
    call: Callable[..., Arrays],
    operands: Arrays,
    *more: Array,
) -> Arrays:
    """Return what `call` makes with a kernel of each sequence; it varies as queries do.

    jax does not track there what varies.
    """
    query, key, value, *sinks = operands
    queries, keys = query.shape[2], key.shape[2]
    kernel = splash_kernel(rule, query.shape[1], queries, keys, interpret)
    share = share_of_tpu_blocks(queries, keys, causal=rule.causal, window=rule.window)
    sequences = (query, key, value, *more)
    axes = (*(0 for _ in sequences), *(None for _ in sinks))
    with score_pairs_scope(round(share * queries * keys)):
        results = unchecked(jax.vmap(partial(call, kernel), axes), *sequences, *sinks)
    return tuple(DeviceView().varying(a, varies(query)) for a in results)


_splash.defvjp(_splash_forward, _splash_backward)


def _gradient(kernel: PyTree, residuals: PyTree, d_mixed: Array) -> Arrays:
    """Return the gradients of the operands of a splash attention.

    Args:
      kernel: made with residuals.
      residuals: queries, keys, values, segments, sinks, averages, logarithms of denominators.
      d_mixed: the gradient of the averaged values.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    options = kernel.kwargs
    # The public function differentiates itself, which a program that tracks what varies rejects.
    gradients = splash_attention_kernel._splash_attention_bwd(
        False,
        options["mask_value"],
        options["is_mqa"],
        options["block_sizes"],
        None,
        options["mask_function"],
        options["attn_logits_soft_cap"],
        options["interpret"],
        (*residuals, kernel.dq_mask_info, kernel.dkv_mask_info),
        d_mixed,
    )
    return tuple(d for d in (*gradients[3:6], gradients[7]) if d is not None)
