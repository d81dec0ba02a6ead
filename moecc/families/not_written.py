"""Mixtures of transformers that no dense family can become, why, and what is nearest."""

from __future__ import annotations

NOT_WRITTEN = {
    "deepseek_v2": (
        "its attention compresses keys and values to a latent vector (MLA), which no dense family "
        "has", "glm4_moe has shared experts and dense first layers, too",
    ),
    "deepseek_v3": (
        "its attention compresses keys and values to a latent vector (MLA), which no dense family "
        "has", "glm4_moe has its sigmoid gates, shared experts and dense first layers",
    ),
    "llama4_text": (
        "its gates multiply the input of an expert, before an activation that is not linear",
        "mixtral takes a llama as it is",
    ),
    "nllb_moe": (
        "moecc reads no M2M100 or NLLB model that could become one",
        "switch_transformers is the encoder-decoder with experts that it writes",
    ),
    "jamba": ("half of its layers are state spaces, which no dense family has", "mixtral"),
}  # fmt: skip
"""By the name of the family: why nothing becomes one, and which target to take instead."""
