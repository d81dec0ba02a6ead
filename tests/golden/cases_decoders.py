"""Decoders of further families: what each checkpoint is there for."""

from __future__ import annotations

from case import SQUARE, TWO_WIDE_HEADS, WIDE_HEADS, YARN, Case

NEIGHBOURS: dict[str, object] = {"head_dim": 8, "attention_bias": True}
"""Heads of which 4 of 8 entries are rotated, and biases that are turned with them."""

KIND_TYPED = ["sliding_attention", "full_attention", "sliding_attention"]


def by_kind(**full: object) -> dict[str, object]:
    """Return rotary parameters of either kind of layer, those with a window not scaled."""
    local = {"rope_type": "default", "rope_theta": 500.0}
    return {"full_attention": {**local, **full}, "sliding_attention": local}


DECODERS: dict[str, Case] = {
    "olmo_clipped": Case(
        "olmo",
        "norms without parameters, bounds that are in force, attention biases, tied",
        {"attention_bias": True, "clip_qkv": 0.7, "tie_word_embeddings": True},
    ),
    "olmo_square": Case("olmo", "square matrices", SQUARE),
    "olmo3_yarn": Case(
        "olmo3",
        "YaRN in layers without a window, a window of 4 in the two others",
        {
            **WIDE_HEADS,
            "num_hidden_layers": 3,
            "layer_types": KIND_TYPED,
            "sliding_window": 4,
            "rope_parameters": by_kind(**YARN),
        },
    ),
    "olmo3_square": Case(
        "olmo3",
        "square matrices, tied",
        {
            **SQUARE,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            "rope_parameters": by_kind(rope_type="default"),
        },
    ),
    "ernie4_5_biases": Case(
        "ernie4_5", "neighbours rotated, biases everywhere", {"use_bias": True, "head_dim": 6}
    ),
    "ernie4_5_square": Case(
        "ernie4_5", "square matrices, tied", {**SQUARE, "head_dim": 4, "tie_word_embeddings": True}
    ),
    "glm_biases": Case("glm", "half of each head rotated by neighbours, biases", NEIGHBOURS),
    "glm_square": Case(
        "glm",
        "square matrices, tied, no biases, a quarter of a head rotated",
        {
            **SQUARE,
            "head_dim": 8,
            "partial_rotary_factor": 0.25,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_biases": Case("glm4", "norms around each block", NEIGHBOURS),
    "glm4_square": Case(
        "glm4", "square matrices, no biases", {**SQUARE, "head_dim": 4, "attention_bias": False}
    ),
    "hunyuan_dense_alpha": Case(
        "hunyuan_v1_dense",
        "a base period by alpha, norms behind the rotation, biases",
        {
            **TWO_WIDE_HEADS,
            "head_dim": 16,
            "attention_bias": True,
            "rope_scaling": {
                "type": "dynamic",
                "alpha": 50.0,
                "factor": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "hunyuan_dense_square": Case(
        "hunyuan_v1_dense",
        "square matrices, tied",
        {**SQUARE, "head_dim": 4, "tie_word_embeddings": True},
    ),
    "exaone4_window": Case(
        "exaone4",
        "no rotary positions in the one layer without a window",
        {"num_hidden_layers": 3, "layer_types": KIND_TYPED, "sliding_window": 4},
    ),
    "exaone4_square": Case(
        "exaone4",
        "square matrices, tied, no window",
        {
            **SQUARE,
            "sliding_window": None,
            "layer_types": ["full_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
}
