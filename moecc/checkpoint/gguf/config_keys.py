"""Translate config.json to the metadata of a GGUF file, or say what the format cannot state.

The reverse of `moecc.checkpoint.gguf.config`.  Beside the keys, an architecture fixes what
llama.cpp computes: full attention, SiLU, and whether gates are renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moecc.checkpoint.gguf.encode import Key, Written
from moecc.checkpoint.gguf.families import GgufExperts, GgufFamily
from moecc.checkpoint.gguf.rope import rope_keys, rope_misfits
from moecc.errors import Problem
from moecc.support.untyped import Json

Config = Json
"""The content of config.json, as a typed config wrote it."""


def config_keys(architecture: str, family: GgufFamily, config: Config) -> list[Key]:
    """Return the keys of `architecture` for a config that `misfits` does not object to."""
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    values: dict[str, Written] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": round(head_dim * config.get("partial_rotary_factor", 1)),
        "vocab_size": config["vocab_size"],
        **rope_keys(config),
        **(_experts(family.experts, config) if family.experts else {}),
        **{name: config[ours] for name, ours in family.keys},
        **{n: config[ours] for n, ours in family.optional_keys if config[ours] is not None},
        **({"rope.freq_base_swa": config["rope_local_base_freq"]} if family.local_theta else {}),
        **dict(family.fixed),
    }
    return [Key(f"{architecture}.{name}", value) for name, value in values.items()]


def _experts(experts: GgufExperts, config: Config) -> dict[str, Written]:
    values: dict[str, Written] = {
        "expert_count": config["num_experts"],
        "expert_used_count": config[experts.chosen],
    }
    if experts.width_key:
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if experts.shared_count:
        count = config[experts.shared_count]
        values["expert_shared_count"] = count
        values["expert_shared_feed_forward_length"] = count * config["moe_intermediate_size"]
    elif experts.shared:
        values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return values


def misfits(
    architecture: str, family: GgufFamily, config: Config, sparse: Sequence[bool] = ()
) -> Iterator[Problem]:
    """Yield why llama.cpp would not compute the model of `config` from such a file.

    Args:
      architecture: the name of the architecture.
      family: its row.
      config: the config.
      sparse: for each layer whether it has experts; empty for a dense model.
    """
    place = f"gguf:{architecture}"
    if config[family.act_key] != family.activation:
        does = "SiLU" if family.activation == "silu" else "GELU's tanh approximation"
        what = f"llama.cpp computes {does} in this architecture, whatever the config says"
        yield Problem(what, place, family.activation, f"the activation {config[family.act_key]}")
    if config.get("mlp_bias") and "mlp_bias" not in dict(family.flags):
        what = "llama.cpp reads no biases of feed-forward blocks in this architecture"
        yield Problem(what, place, "no bias", "biases of feed-forward blocks")
    if family.is_tied and not config["tie_word_embeddings"]:
        what = "llama.cpp takes the embedding as the output matrix in this architecture"
        yield Problem(what, place, "tied embeddings", "an output matrix of its own")
    if problem := _no_rope_misfit(place, family, config):
        yield problem
    if config.get("attention_bias") and not family.output_bias:
        what = "llama.cpp refuses a bias of the attention's output projection here"
        yield Problem(what, place, "no bias", "a bias of the output projection")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads != groups and not family.has_groups:
        what = "llama.cpp wants as many key-value heads as query heads here"
        yield Problem(what, place, f"{heads}", "grouped key-value heads")
    yield from _score_misfits(place, family, config)
    window = None if family.window_period else _window(config)
    if window is not None and window < config["max_position_embeddings"]:
        what = "llama.cpp has no sliding window in this architecture"
        hint = "texts no longer than the window are the same: lower max_position_embeddings to it"
        yield Problem(what, place, "none", f"a window of {window:,} tokens", hint)
    scaled = "scaled rotary positions"
    yield from (
        Problem(what, place, found=scaled, hint=hint) for what, hint in rope_misfits(config, family)
    )
    if family.experts is not None:
        yield from _expert_misfits(place, family.experts, config, sparse)


def _no_rope_misfit(place: str, family: GgufFamily, config: Config) -> Problem | None:
    """Return a problem if other layers lack rotary positions than in llama.cpp."""
    step, found = family.no_rope_step, config.get("no_rope_layers")
    expected = [int((layer + 1) % step != 0) for layer in range(len(found or ()))] if step else []
    if not step or found == expected:
        return None
    what = f"llama.cpp gives every {step}th layer no rotary positions, whatever the config says"
    return Problem(what, place, str(expected[:12]), str(list(found or ())[:12]))


def _score_misfits(place: str, family: GgufFamily, config: Config) -> Iterator[Problem]:
    """Yield where llama.cpp scales scores, or gives layers a window, otherwise than the config."""
    for name, ours in family.keys:
        if config[ours] is None:
            what = f"llama.cpp has a value of its own where {name} is not stated"
            yield Problem(what, place, f"{ours}, a number", "null")
    if family.window_period:
        found = [kind == "sliding_attention" for kind in config["layer_types"]]
        expected = [(layer + 1) % family.window_period != 0 for layer in range(len(found))]
        if found != expected:
            what = f"llama.cpp gives all but every {family.window_period}th layer a window"
            yield Problem(what, place, found="other layers with a window")
    if family.score_layers:
        is_wide = config["num_hidden_layers"] == family.score_layers
        width = config["hidden_size"] // config["num_attention_heads"]
        scalar = width if is_wide else config["head_dim"]
        if config["query_pre_attn_scalar"] != scalar:
            what = "llama.cpp scales the scores of attention otherwise"
            found_scalar = f"{config['query_pre_attn_scalar']}"
            yield Problem(what, place, f"query_pre_attn_scalar {scalar}", found_scalar)


def _window(config: Config) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    found = config.get("sliding_window")
    return found if isinstance(found, int) else None


def _expert_misfits(
    place: str, experts: GgufExperts, config: Config, sparse: Sequence[bool]
) -> Iterator[Problem]:
    norm = config.get("norm_topk_prob", True)
    everyone = config["num_experts"] == config[experts.chosen]
    if experts.renormalises not in (None, norm) and not everyone:
        does = "divides" if experts.renormalises else "does not divide"
        hint = "upcycle with gates=softmax router-init=zero" if norm else "upcycle with its default"
        what = f"llama.cpp {does} the chosen gates by their sum in this architecture"
        found = "renormalised gates" if norm else "gates that are not renormalised"
        yield Problem(what, place, found=found, hint=hint)
    dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]
    leading = dense == list(range(len(dense)))
    if dense and not (experts.leading_dense and leading):
        allowed = "after the first ones " if experts.leading_dense else ""
        what = f"llama.cpp refuses a dense layer {allowed}in a file with experts"
        shown = ", ".join(map(str, dense[:8])) + (" …" if len(dense) > 8 else "")
        found = f"dense layers among sparse ones: {shown}"
        yield Problem(what, place, "experts in every layer", found)
