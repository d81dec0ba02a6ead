"""Attention of TPUs: JAX's splash attention, whose blocks of scores stay in VMEM.

Inside a ``shard_map`` that tracks what varies over the mesh, kernels of Pallas say nothing of their
results.  So they are called where nothing is tracked, forward and backward each by themselves, and
the gradient is put together here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    make_splash_mha,
)

from moecc.ir.attention_blocks import share_of_tpu_blocks, tpu_block
from moecc_backends.xla.kernels.attention_operands import AttentionArrays, AttentionRule
from moecc_backends.xla.kernels.score_pairs import score_pairs_scope
from moecc_backends.xla.trace.context import VALUE
from moecc_backends.xla.trace.device_view import DeviceView, varies
from moecc_backends.xla.trace.typed_jax import PyTree, named, unchecked

Arrays = tuple[jax.Array, ...]


def splash_attention(
    rule: AttentionRule, arrays: AttentionArrays, *, interpret: bool = False
) -> jax.Array:
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
    sinks = None
    if arrays.sinks is not None:
        wide = jnp.broadcast_to(arrays.sinks[:1, :, :, 0, 0], (1, head, group))
        sinks = wide.reshape(head * group)
    mixed = _splash(rule, interpret, rows, arrays.key, arrays.value, sinks)
    return mixed.reshape(batch, head, group, seq, -1)


@cache
def splash_kernel(
    rule: AttentionRule, heads: int, queries: int, keys: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """Return the kernel of one sequence, which also returns logarithms of denominators."""
    shape = (queries, keys)
    mask: splash_attention_mask.Mask = splash_attention_mask.FullMask(shape)
    if rule.window:
        mask = splash_attention_mask.LocalMask(shape, (rule.window - 1, 0), 0)
    elif rule.causal:
        mask = splash_attention_mask.CausalMask(shape)
    q, kv = map(tpu_block, shape)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    # What is traced while a kernel is made must not stay in the cache.
    with jax.ensure_compile_time_eval():
        kernel: splash_attention_kernel.SplashAttentionKernel = make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=rule.cap or None,
            save_residuals=True,
            interpret=interpret,
        )
    return kernel


def _pairs(rule: AttentionRule, queries: int, keys: int) -> int:
    share = share_of_tpu_blocks(queries, keys, causal=rule.causal, window=rule.window)
    return round(share * queries * keys)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _splash(
    rule: AttentionRule,
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
) -> jax.Array:
    return _forward(rule, interpret, query, key, value, sinks)[0]


def _forward(
    rule: AttentionRule,
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    kernel = splash_kernel(rule, query.shape[1], query.shape[2], key.shape[2], interpret)

    def one(query: jax.Array, key: jax.Array, value: jax.Array, *sinks: jax.Array) -> Arrays:
        mixed, (denominators,) = kernel(query, key, value, None, *sinks)
        return mixed, denominators

    more = () if sinks is None else (sinks,)
    run = jax.vmap(one, (0, 0, 0, *(None for _ in more)))
    with score_pairs_scope(_pairs(rule, query.shape[2], key.shape[2])):
        mixed, denominators = _untracked(run, query, key, value, *more)
    # Named, so that a policy of rematerialisation keeps them and the kernel runs once.
    mixed, denominators = named(mixed, VALUE), named(denominators, VALUE)
    return mixed, (query, key, value, sinks, mixed, denominators)


def _backward(
    rule: AttentionRule,
    interpret: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array],
    d_mixed: jax.Array,
) -> tuple[jax.Array | None, ...]:
    query, key, value, sinks, mixed, denominators = residuals
    kernel = splash_kernel(rule, query.shape[1], query.shape[2], key.shape[2], interpret)
    more = () if sinks is None else (sinks,)

    def one(
        query: jax.Array, key: jax.Array, value: jax.Array, mixed: jax.Array,
        denominators: jax.Array, d_mixed: jax.Array, *sinks: jax.Array,
    ) -> Arrays:  # fmt: skip
        kept = (query, key, value, None, *(sinks or (None,)), mixed, denominators)
        return _gradient(kernel, kept, d_mixed)

    run = jax.vmap(one, (*(0 for _ in range(6)), *(None for _ in more)))
    with score_pairs_scope(_pairs(rule, query.shape[2], key.shape[2])):
        made = _untracked(run, query, key, value, mixed, denominators, d_mixed, *more)
    d_sinks = None if sinks is None else jnp.sum(made[3], 0).astype(sinks.dtype)
    pairs = zip(made, (query, key, value), strict=False)
    return (*(d.astype(x.dtype) for d, x in pairs), d_sinks)


_splash.defvjp(_forward, _backward)


def _untracked(run: Callable[..., Arrays], *arrays: jax.Array) -> Arrays:
    """Call `run` where jax does not track what varies; its results vary as the first array does."""
    axes = varies(arrays[0])
    return tuple(DeviceView().varying(a, axes) for a in unchecked(run, *arrays))


def _gradient(
    kernel: splash_attention_kernel.SplashAttentionKernel, kept: PyTree, d_mixed: jax.Array
) -> Arrays:
    """Return the gradients of the operands of a splash attention.

    Args:
      kernel: made with residuals.
      kept: queries, keys, values, segments, sinks, averaged values, logarithms of denominators.
      d_mixed: the gradient of the averaged values.
    """
    told = kernel.kwargs
    # The public function differentiates itself, which a program that tracks what varies rejects.
    made = splash_attention_kernel._splash_attention_bwd(
        False,
        told["mask_value"],
        told["is_mqa"],
        told["block_sizes"],
        None,
        told["mask_function"],
        told["attn_logits_soft_cap"],
        told["interpret"],
        (*kept, kernel.dq_mask_info, kernel.dkv_mask_info),
        d_mixed,
    )
    return tuple(d for d in (*made[3:6], made[7]) if d is not None)
