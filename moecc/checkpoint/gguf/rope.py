"""Translate the rotary embedding between a GGUF file and config.json.

GGUF states the base period and a scaling by name, except for Llama 3's, of which only the
resulting divisor of each frequency is stored, as the tensor ``rope_freqs.weight``.
"""

from __future__ import annotations

import math

import numpy as np

from moecc.checkpoint.gguf.families import LLAMA3_HIGH, LLAMA3_LOW
from moecc.checkpoint.gguf.keys import Keys
from moecc.support.untyped import Json
from moecc.types.arrays import Array, Doubles

# The length that Llama 3.1 to 3.3 were trained with comes first.
_OLD_LENGTHS = (8192, *(1 << power for power in range(4, 21) if power != 13))
_TOLERANCE = 1e-5
_YARN_DEFAULTS = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
_BETAS = ("beta_fast", "beta_slow")
_TYPES = ("none", "linear", "yarn")


def read_rope(keys: Keys, context_length: int, divisors: Array | None) -> dict[str, object]:
    """Return ``rope_theta`` and ``rope_scaling``; what config.json cannot express is a problem.

    `divisors` [head_dim / 2] is the content of ``rope_freqs.weight`` if there is one.
    """
    theta = keys.number("rope.freq_base", 10_000.0)
    scaling = _stated(keys, context_length)
    if divisors is not None and not np.all(divisors == 1):
        if scaling is not None:
            keys.refuse("rope.scaling.type", "the file also has the divisors of Llama 3's scaling")
        scaling = _llama3(keys, theta, divisors)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _stated(keys: Keys, context_length: int) -> dict[str, object] | None:
    older = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", 0.0) or older
    kind = keys.text("rope.scaling.type", "linear")
    original = keys.size("rope.scaling.original_context_length", context_length)
    yarn = {name: keys.number(f"rope.scaling.yarn_{name}", None) for name in _BETAS}
    for name, neutral in _YARN_DEFAULTS.items():
        if keys.number(name, neutral) != neutral:
            keys.refuse(name, "moecc does not know this scaling", expected=f"{neutral}")
    if kind not in _TYPES:
        keys.refuse("rope.scaling.type", "not supported", expected=f"one of {', '.join(_TYPES)}")
    if kind == "yarn":
        stated = {name: beta for name, beta in yarn.items() if beta is not None}
        return {
            "rope_type": "yarn",
            "factor": factor or 1.0,
            "original_max_position_embeddings": original,
            **stated,
        }
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return None


def _llama3(keys: Keys, theta: float, divisors: Array) -> dict[str, object] | None:
    """Find the parameters that yield these divisors.

    Only the ratios of the old length to the two wavelength factors determine them, so with the
    published factors 1 and 4 only the length is unknown, and a solution is exact.
    """
    factor = float(divisors.max())
    usable = bool(np.all(np.isfinite(divisors)) and divisors.min() >= 1 and theta > 0)
    for length in _OLD_LENGTHS if usable else ():
        expected = _llama3_divisors(theta, len(divisors), factor, length)
        if np.allclose(divisors, expected, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(factor))),
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    keys.problems.add(
        "config.json cannot express the divisors of the rotary frequencies",
        where=f"{keys.where}, tensor 'rope_freqs.weight'",
        expected="those of Llama 3, with low_freq_factor 1 and high_freq_factor 4",
        found=f"divisors from {divisors.min():g} to {divisors.max():g}",
    )
    return None


def _llama3_divisors(theta: float, count: int, factor: float, length: int) -> Doubles:
    """Return the divisors that Llama 3.1 applies to each of `count` frequencies."""
    frequencies = theta ** (-np.arange(count) / count)
    turns = length * frequencies / (2 * math.pi)
    kept = np.clip((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    divisors: Doubles = 1 / ((1 - kept) / factor + kept)
    return divisors


def rope_keys(config: Json) -> dict[str, int | float | str]:
    """Return the keys, without the architecture's name, of the rotary embedding of a config."""
    keys: dict[str, int | float | str] = {"rope.freq_base": float(config["rope_theta"])}
    scaling: Json = config["rope_scaling"] or {}
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return keys
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        stated = {name: scaling[name] for name in _BETAS if scaling.get(name) is not None}
        keys |= {f"rope.scaling.yarn_{name}": float(beta) for name, beta in stated.items()}
    return keys


def rotary_divisors(config: Json) -> list[float] | None:
    """Return the content of ``rope_freqs.weight`` for a config, or None if it needs none."""
    scaling: Json = config["rope_scaling"] or {}
    if scaling.get("rope_type") != "llama3":
        return None
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    divisors = _llama3_divisors(config["rope_theta"], config["head_dim"] // 2, factor, length)
    found: list[float] = divisors.tolist()
    return found
