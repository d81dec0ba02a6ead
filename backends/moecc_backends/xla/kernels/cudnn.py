"""Attention of GPUs: cuDNN's fused kernel, as ``jax.nn`` calls it."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from moecc_backends.xla.kernels.attention_operands import AttentionArrays, AttentionRule


def cudnn_attention(
    rule: AttentionRule,
    arrays: AttentionArrays,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Return the averaged values, ``[batch, head, group, seq, wide]``.

    Args:
      rule: what is no array, without a soft cap.
      arrays: the operands; of the further ones the bias alone.
      implementation: ``xla`` is the same function for other platforms.
    """
    batch, head, group, seq, width = arrays.query.shape
    rows = arrays.query.reshape(batch, head * group, seq, width)
    query, key, value = (jnp.swapaxes(a, 1, 2) for a in (rows, arrays.key, arrays.value))
    bias = None
    if arrays.bias is not None:
        shape = (head, group, seq, key.shape[1])
        bias = jnp.broadcast_to(arrays.bias, (arrays.bias.shape[0], *shape))
        bias = bias.reshape(-1, head * group, *shape[2:])
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
