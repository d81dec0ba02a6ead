"""falcon and gptj: attention and feed-forward block side by side, or a falcon one by one."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.families.config import TensorNames, config_class, size
from moecc.families.decoder import BIASES, DEFAULTS, DecoderConfig
from moecc.families.gpt import SYNONYMS
from moecc.families.reader import (
    COUNT,
    EXTRA_DEFAULTS,
    NEURONS,
    KeyProblem,
    Reader,
    key_problem,
)
from moecc.families.rope import RopeConfig
from moecc.support.untyped import JsonDict

NORM_COUNT = "num_ln_in_parallel_attn"
GROUPS = ("new_decoder_architecture", "multi_query", "num_kv_heads")


@config_class
class FalconConfig(DecoderConfig):
    """A falcon with rotary positions.

    The first models have one key head (7B) or one for each query head, later ones (40B, 180B, 11B)
    any number; only these have a norm for either block.
    """

    model_type = "falcon"
    architecture = "FalconForCausalLM"
    base_prefix = "transformer."
    fixed = {"norm_kind": "layer", "gated_mlp": False}
    options = BIASES | {"parallel", "norms_apart"}
    keys = {
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation",
        "parallel": "parallel_attn",
        "num_key_value_heads": "",
        "head_dim": "",
        **dict.fromkeys(BIASES, "bias"),
    }
    only = {
        "alibi": (False, "positions by ALiBi are not supported here, but by --via torch"),
    }
    synonyms = {"n_embed": "hidden_size"}
    plain_heads = "falcon has heads of hidden_size / num_attention_heads"
    own_code = True
    names = TensorNames(
        embedding="transformer.word_embeddings.weight",
        final_norm="transformer.ln_f.weight",
        layer="transformer.h.{layer}.",
        attention="self_attention.",
        attention_output="dense",
        qkv="query_key_value",
        qkv_by_group=True,
        dense_up="dense_h_to_4h",
        dense_down="dense_4h_to_h",
    )
    defaults = {
        **DEFAULTS,
        "vocab_size": 65_024,
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "ffn_hidden_size": None,
        "layer_norm_epsilon": 1e-5,
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_kv_heads": None,
        NORM_COUNT: None,
        "parallel_attn": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 11,
        "eos_token_id": 11,
    }

    intermediate_size: int = size(NEURONS, null=lambda values: 4 * values["hidden_size"])

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms of a layer before the attention, and before the feed-forward block."""
        return ("ln_attn", "", "ln_mlp", "") if self.norms_apart else super().layer_norms

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if not self.parallel and self.num_key_value_heads not in (1, self.num_attention_heads):
            fault = "such a falcon has one key head, or one for each query head"
            yield key_problem(fault, "1", f"{self.num_key_value_heads}", "num_kv_heads", *GROUPS)
        if self.norms_apart and not self.parallel:
            fault = "two norms belong to blocks side by side"
            yield key_problem(fault, "parallel_attn true", "false", "parallel_attn", NORM_COUNT)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        is_new, shares = (reader.flag(key) for key in GROUPS[:2])
        heads = reader.size("num_attention_heads", COUNT)
        stated = reader.optional_size("num_kv_heads", COUNT)
        groups = (stated or heads) if is_new else 1 if shares else heads
        count = reader.optional_size(NORM_COUNT, 2)
        apart = is_new and count in (None, 2)
        if is_new and not reader.flag("parallel_attn"):
            reader.refuse("parallel_attn", "transformers computes no such falcon", expected="true")
        if not is_new and count == 2:
            reader.refuse(NORM_COUNT, "transformers computes no such falcon", expected="1, or null")
        values = super()._read(reader)
        width = max(values["hidden_size"] // values["num_attention_heads"], 1)
        further = {"num_key_value_heads": groups, "head_dim": width, "norms_apart": apart}
        return {**values, **further}

    def _write(self) -> JsonDict:
        groups, heads = self.num_key_value_heads, self.num_attention_heads
        is_new = self.norms_apart or groups not in (1, heads)
        return {
            **super()._write(),
            "new_decoder_architecture": is_new,
            "multi_query": groups == 1,
            "num_kv_heads": groups,
            NORM_COUNT: (2 if self.norms_apart else 1) if is_new else None,
        }


ROPE = RopeConfig(theta=10_000.0)
"""The rotary positions, of which the config states nothing."""


@config_class
class GptJConfig(DecoderConfig):
    """A gptj: keys of its own for each head, no biases in the attention, one of the logits."""

    model_type = "gptj"
    architecture = "GPTJForCausalLM"
    aliases = ("GPTJModel",)
    base_prefix = "transformer."
    synonyms = SYNONYMS
    fixed = {
        "norm_kind": "layer",
        "parallel": True,
        "gated_mlp": False,
        "mlp_bias": True,
        "head_bias": True,
    }
    options = frozenset({"rotary_dim"})
    keys = {
        **SYNONYMS,
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    rope_types = ("default",)
    shares_keys = False
    plain_heads = "gptj has heads of n_embd / n_head"
    names = TensorNames(
        embedding="transformer.wte.weight",
        final_norm="transformer.ln_f.weight",
        layer="transformer.h.{layer}.",
        attention="attn.",
        attention_output="out_proj",
        dense_up="fc_in",
        dense_down="fc_out",
        layer_norms=("ln_1", "", "", ""),
        pairs_neighbours=True,
    )
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_400,
        "n_embd": 4096,
        "n_inner": None,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.rope != ROPE:
            yield key_problem("gptj has one base period", f"{ROPE}", f"{self.rope}", "rotary_dim")

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        size = reader.size("rotary_dim", COUNT)
        return {"rope": ROPE, "rotary_dim": None if size == values["head_dim"] else size}

    def _write_rope(self) -> JsonDict:
        return {"rotary_dim": self.rotated_dim}

    intermediate_size: int = size(NEURONS, null=lambda values: 4 * values["hidden_size"])
