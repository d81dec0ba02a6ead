"""The rotary frequencies of a rope config, in double precision.

An angle is `position * frequency[i]`; the two halves of a head are rotated against one another
(element i with element i + head_dim / 2), and cosine and sine are both multiplied by the attention
factor.  transformers computes the same in float32.
"""

from __future__ import annotations

import math

from .rope import RopeConfig


def rotary_frequencies(
    rope: RopeConfig, head_dim: int, *, max_position_embeddings: int, length: int
) -> tuple[float, ...]:
    """Return the `head_dim / 2` angular frequencies for a sequence of `length` tokens.

    Only two scalings depend on the length: dynamic, beyond `max_position_embeddings`, and longrope,
    beyond the original length.
    """
    if rope.type == "dynamic":
        stretched = _dynamic_theta(
            rope, head_dim, max(length, max_position_embeddings) / max_position_embeddings
        )
        return _plain(stretched, head_dim)
    plain = _plain(rope.theta, head_dim)
    if rope.type == "linear":
        return tuple(frequency / _needed(rope.factor) for frequency in plain)
    if rope.type == "longrope":
        long = length > _needed(rope.original_max_position_embeddings)
        divisors = rope.long_factor if long else rope.short_factor
        return tuple(f / divisor for f, divisor in zip(plain, divisors, strict=True))
    if rope.type == "llama3":
        return tuple(_llama3(rope, frequency) for frequency in plain)
    return _yarn(rope, plain) if rope.type == "yarn" else plain


def attention_factor(rope: RopeConfig) -> float:
    """Return the factor on cosine and sine: 1 for every scaling but longrope and YaRN.

    A factor that is stated is that.  Else
    longrope (Ding et al. 2402.13753, §3.2): `√(1 + ln(factor) / ln(original length))`.
    YaRN (Peng et al. 2309.00071, §3.4): `0.1 ln(factor) + 1`, or the ratio of two such terms if
    `mscale` and `mscale_all_dim` are both stated.
    """
    if rope.type in ("longrope", "yarn") and rope.attention_factor is not None:
        return rope.attention_factor
    if rope.type == "longrope":
        length, growth = _needed(rope.original_max_position_embeddings), _needed(rope.factor)
        return math.sqrt(1 + math.log(growth) / math.log(length)) if growth > 1 else 1.0
    if rope.type != "yarn":
        return 1.0
    factor = _needed(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(factor, rope.mscale) / _mscale(factor, rope.mscale_all_dim)
    return _mscale(factor, 1.0)


def _plain(theta: float, head_dim: int) -> tuple[float, ...]:
    return tuple(theta ** (-i / head_dim) for i in range(0, head_dim, 2))


def _dynamic_theta(rope: RopeConfig, head_dim: int, stretch: float) -> float:
    """Return the base period for a sequence `stretch` times as long as the trained one."""
    factor = _needed(rope.factor)
    growth: float = (factor * stretch - (factor - 1)) ** (head_dim / (head_dim - 2))
    return rope.theta * growth


def _llama3(rope: RopeConfig, frequency: float) -> float:
    """Keep short waves, divide long ones by the factor, and blend between (Llama 3.1)."""
    low, high = _needed(rope.low_freq_factor), _needed(rope.high_freq_factor)
    factor = _needed(rope.factor)
    turns = _needed(rope.original_max_position_embeddings) * frequency / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - kept) * frequency / factor + kept * frequency


def _yarn(rope: RopeConfig, plain: tuple[float, ...]) -> tuple[float, ...]:
    """Interpolate the slow dimensions and keep the fast ones (Peng et al. 2309.00071, §3.2)."""
    low, high = _yarn_range(rope, 2 * len(plain))
    factor = _needed(rope.factor)
    scaled = []
    for i, frequency in enumerate(plain):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency * (interpolated / factor + (1 - interpolated)))
    return tuple(scaled)


def _yarn_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Return the dimensions that rotate `beta_fast` and `beta_slow` times within the old length."""
    length = _needed(rope.original_max_position_embeddings)

    def dimension(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32.0), dimension(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # The ramp needs a width; transformers adds the same thousandth.
    return (low, high + 0.001) if low == high else (low, high)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _needed(value: float | None) -> float:
    """Narrow a parameter that the config's own checks guarantee."""
    assert value is not None
    return value
