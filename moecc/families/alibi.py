"""bloom and mpt: decoders of the GPT line whose scores have biases by distance (ALiBi)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

from moecc.families.config import BlockNames, GgufFacts, config_class, flag, size
from moecc.families.gpt import GptConfig
from moecc.families.reader import EXTRA_DEFAULTS, NEURONS, KeyProblem, Reader, key_problem
from moecc.support.untyped import JsonDict


@config_class
class AlibiConfig(GptConfig):
    """A decoder with ALiBi, whose blocks are four times as wide as the model."""

    keys = {"intermediate_size": "", "layer_norm_eps": "layer_norm_epsilon"}
    has_alibi = True

    tie_word_embeddings: bool = flag(default=True)
    intermediate_size: int = size(NEURONS)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        return {**sizes, "intermediate_size": 4 * sizes["hidden_size"]}

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        return {**values, "intermediate_size": 4 * values["hidden_size"]}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.intermediate_size != 4 * self.hidden_size:
            fault = f"a {self.model_type} has blocks of four times its width"
            keys = (self.key("hidden_size"),)
            yield key_problem(fault, f"{4 * self.hidden_size}", f"{self.intermediate_size}", *keys)


@config_class
class BloomConfig(AlibiConfig):
    """A bloom: embeddings with a norm of their own, queries, keys and values by head."""

    model_type = "bloom"
    architecture = "BloomForCausalLM"
    aliases = ("BloomModel",)
    base_prefix = "transformer."
    synonyms = {
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    kept_numbers = ("initializer_range", "attention_dropout", "hidden_dropout")
    keys = {
        "hidden_act": "",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        # Only the code that trained it reads this one.
        "max_position_embeddings": "seq_length",
    }
    fixed = {"hidden_act": "gelu_pytorch_tanh"}
    only = {
        "apply_residual_connection_post_layernorm": (
            False,
            "a bloom that adds what its norms return is not supported",
        ),
    }
    # Only the order of sums depends on them.
    idle = ("pretraining_tp", "slow_but_exact")
    names = BlockNames(
        embedding="transformer.word_embeddings.weight",
        around=("transformer.word_embeddings_layernorm", ""),
        layer="transformer.h.{layer}.",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="transformer.ln_f",
        qkv="self_attention.query_key_value",
        output="self_attention.dense",
        fc_in="mlp.dense_h_to_4h",
        fc_out="mlp.dense_4h_to_h",
        by_head=True,
    )
    gguf = GgufFacts("bloom", states=(("tie_word_embeddings", True),))
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 250_880,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 8,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @classmethod
    def from_json(cls, data: Mapping[str, object], where: str = "config.json") -> Self:
        """Read a config.json of this family; published ones state sizes by synonyms alone."""
        sizes = {usual: data[key] for key, usual in cls.synonyms.items() if key in data}
        return super().from_json({**sizes, **data}, where)


ATTENTION: Mapping[str, tuple[object, str]] = {
    "attn_type": ("multihead_attention", "only keys and values for each head are supported"),
    "prefix_lm": (False, "a prefix that sees all of itself is not supported"),
    "qk_ln": (False, "norms of queries and keys are not supported"),
    "alibi": (True, "transformers computes with ALiBi whatever the config says"),
    "alibi_bias_max": (8, "transformers computes with 8 whatever the config says"),
}
"""The keys of `attn_config` with one supported value, and why others are rejected.

The others that are not read, as a dropout, are not kept.
"""


@config_class
class MptConfig(AlibiConfig):
    """An mpt without biases; queries, keys and values may be clipped."""

    model_type = "mpt"
    architecture = "MptForCausalLM"
    aliases = ("MptModel", "MPTForCausalLM")
    base_prefix = "transformer."
    own_code = True
    synonyms = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    kept_numbers = ("initializer_range", "resid_pdrop", "emb_pdrop")
    keys = {
        "hidden_size": "d_model",
        "hidden_act": "",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    }
    fixed = {"attention_bias": False}
    only = {
        "no_bias": (True, "transformers computes without biases whatever the config says"),
        "expansion_ratio": (4, "transformers computes with 4 whatever the config says"),
        "logit_scale": (None, "transformers does not scale logits whatever the config says"),
    }
    # Beside ALiBi there are no other positions, whatever the config says.
    idle = ("learned_pos_emb", "init_device", "embedding_fraction", "norm_type", "verbose")
    has_block_biases = False
    names = BlockNames(
        embedding="transformer.wte.weight",
        layer="transformer.blocks.{layer}.",
        norms=("norm_1", "norm_2"),
        final_norm="transformer.norm_f",
        qkv="attn.Wqkv",
        output="attn.out_proj",
        fc_in="ffn.up_proj",
        fc_out="ffn.down_proj",
    )
    gguf = GgufFacts("mpt", states=(("tie_word_embeddings", True),))
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_368,
        "d_model": 2048,
        "n_layers": 24,
        "n_heads": 16,
        "max_seq_len": 2048,
        "layer_norm_epsilon": 1e-5,
        "no_bias": True,
        "expansion_ratio": 4,
        "logit_scale": None,
        "tie_word_embeddings": True,
        "use_cache": False,
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
    }

    softmax_scale: float | None = None

    def score_scale(self, layer: int) -> float:
        """Return the factor on the attention scores of a layer."""
        return super().score_scale(layer) if self.softmax_scale is None else self.softmax_scale

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        stated = reader.mapping("attn_config") or {}
        usual = {key: value for key, (value, _) in ATTENTION.items()}
        inner = Reader(stated, usual, f"{reader.where}: attn_config")
        inner.require(ATTENTION)
        read = {"qkv_clip": "clip_qkv", "softmax_scale": "softmax_scale"}
        fields = {name: inner.optional_number(key) for name, key in read.items()}
        reader.problems.extend(inner.problems)
        return {**super()._read(reader), **fields}

    def _write(self) -> JsonDict:
        attention = {key: value for key, (value, _) in ATTENTION.items()}
        further = {"clip_qkv": self.qkv_clip, "softmax_scale": self.softmax_scale}
        return {**super()._write(), "attn_config": {**attention, **further}}
