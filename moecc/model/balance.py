"""Routing rules outside a graph: token groups, and the bias of loss-free balancing.

They work on numbers, and on arrays of NumPy, jax or torch alike.
"""

from __future__ import annotations

from typing import Any

from moecc.errors import InputError


def split_into_groups(tokens: int, max_group_size: int, multiple_of: int = 1) -> tuple[int, int]:
    """Return number and size of the groups that mesh-tensorflow 0.1.21 cuts `tokens` into.

    The number is the smallest valid one from ``tokens // max_group_size`` upwards; that division
    is a floor, so a group may be larger than `max_group_size`.

    Args:
      tokens: all tokens of the batch.
      max_group_size: the target size of a group.
      multiple_of: a divisor of the number of groups: the devices that share them.

    Raises:
      InputError: there is no valid number of groups.
    """
    count = max(1, tokens // max_group_size)
    while count <= tokens:
        if count % multiple_of == 0 and tokens % count == 0:
            return count, tokens // count
        count += 1
    raise InputError(
        "no number of groups divides the tokens",
        expected=f"a multiple of {multiple_of} that divides them",
        found=f"{tokens} tokens",
        hint="pad the batch",
    )


def flaxformer_groups(tokens: int, max_group_size: int, experts: int, replicas: int = 1) -> int:
    """Return the number of groups that flaxformer cuts `tokens` into.

    It is the least multiple of ``replicas · experts`` that divides the tokens and is not below
    ``tokens // max_group_size``.

    Raises:
      InputError: no such number exists; flaxformer then pads.
    """
    unit = experts * replicas
    least = max(tokens // max_group_size, unit)
    for count in range(-(-least // unit) * unit, tokens + 1, unit):
        if tokens % count == 0:
            return count
    raise InputError(
        "no number of groups divides the tokens",
        expected=f"a multiple of {unit}, at least {least}",
        found=f"{tokens} tokens",
        hint="pad the batch",
    )


def updated_bias(bias: Any, load: Any, rate: float = 1e-3) -> Any:
    """Return the bias of loss-free balancing after a step (Wang et al. 2024, DeepSeek-V3).

    ``b + rate · sign(mean load − load)``: raises the bias of an expert with less than its share.
    Called once a step, outside the gradient, on the loads of the whole batch.

    Args:
      bias: ``[expert]``, or ``[layer, expert]``.
      load: the number of choices of each expert, of the same shape.
      rate: the step, γ.
    """
    missing = load.mean(-1)[..., None] - load
    return bias + rate * ((missing > 0) * 1.0 - (missing < 0) * 1.0)
