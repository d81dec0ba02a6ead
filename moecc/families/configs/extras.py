"""Keys that do not affect the function: those an export keeps, drops or rejects.

Every key that a family does not read ends here.  A key with a meaning in another family
is rejected rather than copied, because it would take effect after an export.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

from .reader import Reader, shown

EXTRA_DEFAULTS: Mapping[str, object] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "use_cache": True,
}
"""Kept with their default if absent, because the defaults of two families may differ."""

DROPPED = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "experts_implementation",
        "max_window_layers",
        "router_aux_loss_coef",
        "transformers_version",
    }
)
"""Provenance and runtime keys, and settings whose meaning depends on another key."""

OTHER_FAMILIES = frozenset(
    {
        # Keys that some family here reads.
        "attn_logit_softcapping",
        "attention_multiplier",
        "embedding_multiplier",
        "final_logit_softcapping",
        "logits_scaling",
        "no_rope_layers",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "attention_bias",
        "decoder_sparse_step",
        "expert_capacity",
        "mlp_bias",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "num_local_experts",
        "output_router_logits",
        "qkv_bias",
        "router_jitter_noise",
        "shared_expert_intermediate_size",
        "sliding_window",
        "use_sliding_window",
        # Keys that change the function in families that moecc does not support.
        "clip_qkv",
        "first_k_dense_replace",
        "layer_norm_eps",
        "n_routed_experts",
        "n_shared_experts",
        "per_layer_config",
        "rope_interleaved",
        "use_qk_norm",
        "moe_k",
        "moe_layer_end_index",
        "moe_layer_interval",
        "moe_layer_start_index",
        "moe_num_experts",
        "moe_num_shared_experts",
        "n_group",
        "routed_scaling_factor",
        "topk_group",
    }
)

MOST_EXTRA_VALUES = 200_000
DEEPEST_EXTRA = 16


TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

KEPT_NUMBERS = ("initializer_range", "attention_dropout")
"""Numbers that the decoder families keep; those of other shapes of model have other names."""


def refuse_what_needs_other_code(
    reader: Reader, architecture: str, is_own: Callable[[str], bool], *, own_code: bool = False
) -> None:
    """Reject remote code, quantised weights and models with another head.

    With `own_code` the code of the family itself, which transformers took over, is not remote.
    """
    family = reader.value("model_type")
    if not (own_code and _is_own_code(reader.value("auto_map"), str(family))) and (
        reader.value("auto_map") not in (None, {})
    ):
        what = "the checkpoint brings its own Python code, which moecc never runs"
        hint = f"if the model is a plain {architecture}, remove auto_map"
        reader.refuse("auto_map", what, expected="nothing", hint=hint)
    if reader.value("quantization_config") is not None:
        what = "the weights are quantised"
        hint = (
            "dequantise first: load with transformers, call model.dequantize(), save as bfloat16; "
            "or take the unquantised checkpoint"
        )
        reader.refuse("quantization_config", what, expected="nothing", hint=hint)
    named = reader.items("architectures")
    if "architectures" not in reader.bad and not all(is_own(str(name)) for name in named):
        what = "another model class than this family's language model"
        reader.refuse("architectures", what, expected=f"[{architecture!r}]")


def refuse_attention_to_later_tokens(reader: Reader) -> None:
    """Reject a decoder that `is_causal` makes attend to later tokens, as transformers 5 reads it.

    Any value that Python takes for false, null included, switches the mask off there.
    """
    if reader.has("is_causal") and reader.value("is_causal") is not True:
        what = "every token of such a decoder attends to later ones, too"
        hint = "remove the key if the model ran with a causal mask"
        reader.refuse("is_causal", what, expected="true", hint=hint)


def _is_own_code(found: object, family: str) -> bool:
    """Whether an ``auto_map`` names nothing but the family's own modules."""
    own = (f"configuration_{family}.", f"modeling_{family}.")
    values = found.values() if isinstance(found, Mapping) else ()
    return all(isinstance(value, str) and value.startswith(own) for value in values)


def read_extra(reader: Reader, numbers: tuple[str, ...] = KEPT_NUMBERS) -> dict[str, object]:
    """Return the keys that an export keeps: everything not yet read, checked and copied."""
    extra = _known_extra(reader, numbers)
    for key in reader.data:
        if key in OTHER_FAMILIES and key not in reader.used:
            _refuse_unless_idle(reader, key)
        elif key not in DROPPED and key not in reader.used:
            extra[key] = reader.data[key]
    unfit = {key: what for key, value in extra.items() if (what := unfit_for_json(value))}
    for key, what in unfit.items():
        reader.refuse(key, what, expected="a plain JSON value")
    return {key: copy.deepcopy(value) for key, value in extra.items() if key not in unfit}


def unfit_for_json(value: object) -> str | None:
    """Return why `value` cannot be written back as JSON, or None; without recursion."""
    level, seen = [value], 0
    for _ in range(DEEPEST_EXTRA):
        seen += len(level)
        if seen > MOST_EXTRA_VALUES:
            return f"more than {MOST_EXTRA_VALUES:,} values"
        wrong = next((found for found in level if not _is_json(found)), level)
        if wrong is not level:
            return f"not a JSON value: {shown(wrong)}"
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return None
    return f"nested more than {DEEPEST_EXTRA} deep"


def _known_extra(reader: Reader, numbers: tuple[str, ...]) -> dict[str, object]:
    extra: dict[str, object] = {"use_cache": reader.flag("use_cache")}
    for key in numbers:
        # transformers accepts null for a dropout and then drops nothing.
        absent = key.endswith("dropout") and reader.value(key) is None
        extra[key] = 0.0 if absent else reader.number(key, least=0)
    for key in TOKEN_KEYS:
        extra[key] = _token_ids(reader, key)
    return extra


def _token_ids(reader: Reader, key: str) -> object:
    value = reader.value(key)
    several = isinstance(value, list) and key == "eos_token_id"
    ids = value if isinstance(value, list) and several else [value]
    if value is not None and not all(type(one) is int for one in ids):
        expected = "a whole number" + (", a list of them" if key == "eos_token_id" else "")
        reader.refuse(key, "not a token id", expected=f"{expected} or null")
    return value


def _refuse_unless_idle(reader: Reader, key: str) -> None:
    value = reader.data[key]
    switched_off = key == "sliding_window" and reader.data.get("use_sliding_window") is False
    if value in (None, False, 0, [], {}) or switched_off:
        return
    what = "this family has no such key; transformers ignores it, other families would read it"
    hint = "remove it if the model ran with transformers, or correct model_type"
    reader.refuse(key, what, expected="nothing", hint=hint)


def _is_json(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value)
    return value is None or isinstance(value, str | bool | int | list)


def _members(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []
