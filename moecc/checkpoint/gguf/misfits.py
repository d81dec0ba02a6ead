"""What of a config llama.cpp would not compute of a GGUF file, or the format cannot state.

An architecture fixes what llama.cpp computes beside the keys: full attention, SiLU, and whether
gates are renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moecc.checkpoint.gguf.families import LLAMA3_HIGH, LLAMA3_LOW, GgufExperts, GgufFamily
from moecc.errors import Problem
from moecc.support.untyped import Json


def misfits(
    architecture: str, family: GgufFamily, config: Json, sparse: Sequence[bool] = ()
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
    for fault, way_out in _rope_misfits(config, family):
        yield Problem(fault, place, found=scaled, hint=way_out)
    if family.experts is not None:
        yield from _expert_misfits(place, family.experts, config, sparse)


def _no_rope_misfit(place: str, family: GgufFamily, config: Json) -> Problem | None:
    """Return a problem if other layers lack rotary positions than in llama.cpp."""
    step, found = family.no_rope_step, config.get("no_rope_layers")
    expected = [int((layer + 1) % step != 0) for layer in range(len(found or ()))] if step else []
    if not step or found == expected:
        return None
    what = f"llama.cpp gives every {step}th layer no rotary positions, whatever the config says"
    return Problem(what, place, str(expected[:12]), str(list(found or ())[:12]))


def _score_misfits(place: str, family: GgufFamily, config: Json) -> Iterator[Problem]:
    """Yield where llama.cpp scales scores, or gives layers a window, otherwise than the config."""
    for name, ours in family.keys:
        if config[ours] is None:
            what = f"llama.cpp has a value of its own where {name} is not stated"
            yield Problem(what, place, f"{ours}, a number", "null")
    if family.window_period:
        found = [kind == "sliding_attention" for kind in config["layer_types"]]
        expected = [(layer + 1) % family.window_period != 0 for layer in range(len(found))]
        if found != expected:
            period = family.window_period
            what = f"llama.cpp gives a window to all layers but one in {period}, the last of each"
            yield Problem(what, place, found="other layers with a window")
    if family.score_layers:
        is_wide = config["num_hidden_layers"] == family.score_layers
        width = config["hidden_size"] // config["num_attention_heads"]
        scalar = width if is_wide else config["head_dim"]
        if config["query_pre_attn_scalar"] != scalar:
            what = "llama.cpp scales the scores of attention otherwise"
            found_scalar = f"{config['query_pre_attn_scalar']}"
            yield Problem(what, place, f"query_pre_attn_scalar {scalar}", found_scalar)


def _rope_misfits(config: Json, family: GgufFamily) -> Iterator[tuple[str, str | None]]:
    """Yield why llama.cpp would rotate otherwise than a config says, and a way out."""
    scaling: Json = config["rope_scaling"] or {}
    # Both spellings of config.json are written: phi3's longrope is named by `type`.
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "yarn", "llama3", "dynamic", "longrope"):
        yield f"a GGUF file cannot state rotary positions of type {kind}", None
    if kind == "dynamic":
        yield "llama.cpp has no dynamic scaling of rotary positions", "write a folder instead"
    if kind == "longrope":
        yield "moecc does not write the factors of longrope", "write a folder instead"
    if kind == "llama3" and not family.pairs_neighbours:
        yield "llama.cpp reads the divisors of Llama 3's scaling in llama files alone", None
    elif kind == "llama3" and (
        scaling["low_freq_factor"] != LLAMA3_LOW or scaling["high_freq_factor"] != LLAMA3_HIGH
    ):
        yield "only Llama 3's own low and high frequency factors, 1 and 4, can be read back", None
    unusual = {"truncate", "attention_factor", "mscale", "mscale_all_dim"} & scaling.keys()
    if kind == "yarn" and unusual:
        yield f"a GGUF file cannot state {', '.join(sorted(unusual))} of YaRN", None


def _window(config: Json) -> int | None:
    if config.get("use_sliding_window") is False:
        return None
    found = config.get("sliding_window")
    return found if isinstance(found, int) else None


def _expert_misfits(
    place: str, experts: GgufExperts, config: Json, sparse: Sequence[bool]
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
