"""gpt2, gpt_neox and opt: decoders with layer norms, biases and a block of two matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from moecc.families.config import (
    CAUSAL,
    FILLED,
    BlockNames,
    EqualHeadsConfig,
    GgufFacts,
    Only,
    activation,
    config_class,
    flag,
    number,
    size,
)
from moecc.families.reader import (
    EXTRA_DEFAULTS,
    LENGTH,
    NEURONS,
    WIDTH,
    KeyProblem,
    Reader,
    key_problem,
)
from moecc.families.rope import RopeConfig, partial_rotary_factor, read_partial_rotary, read_rope
from moecc.families.shrinking import (
    SMALL_VOCAB,
    shrink_rotated,
    shrink_size,
)
from moecc.support.untyped import JsonDict

SYNONYMS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
"""The names that most families have for sizes, and gpt2's and gptj's own."""


@config_class
class GptConfig(EqualHeadsConfig):
    """A decoder of the GPT line; all heads have keys of their own and fill the model's width.

    `parallel_residual` says whether the feed-forward block reads what the attention reads,
    `norms_first` whether norms come before the sublayers and at the end, or after each sum.
    """

    graphs = "gpt"
    kind = "a decoder with layer norms"
    mask_hint = "padding after a text changes nothing: no earlier token attends to it"
    only: ClassVar[Only] = CAUSAL
    keys = {"attention_bias": "", "parallel_residual": "", "norms_first": "", "word_width": ""}
    # The rows of the table of positions before that of the first token.
    position_offset: ClassVar[int] = 0
    # Whether scores have a bias by distance, a slope for each head.
    has_alibi: ClassVar[bool] = False
    # Whether norms and feed-forward blocks have biases.
    has_block_biases: ClassVar[bool] = True

    max_position_embeddings: int = size(LENGTH)
    layer_norm_eps: float = number(least=0, default=1e-5)
    hidden_act: str = activation(default="gelu")
    tie_word_embeddings: bool = flag(default=False)
    attention_bias: bool = flag(default=True)
    parallel_residual: bool = flag(default=False)
    norms_first: bool = flag(default=True)
    word_width: int = size(WIDTH, null=lambda values: values["hidden_size"], default=0)
    # The bound of queries, keys and values on either side of 0.
    qkv_clip: float | None = None

    @property
    def embedding_width(self) -> int:
        """The width of the token embedding, which a projection widens if it is not the model's."""
        return self.word_width or self.hidden_size

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        """The rotary positions and the entries of a head that they rotate; None if learned."""
        return None

    def score_scale(self, layer: int) -> float:
        """Return the factor on the attention scores of a layer."""
        return float(self.head_dim**-0.5)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        width = sizes["hidden_size"]
        words = self.word_width and width
        if self.embedding_width != self.hidden_size:
            words = width + 1  # so that the two stay different
        return {
            **self.small_vocabulary(),
            **sizes,
            "word_width": words,
            "max_position_embeddings": shrink_size(self.max_position_embeddings, SMALL_VOCAB),
        }


@config_class
class Gpt2Config(GptConfig):
    """A gpt2: learned positions, matrices with their inputs first, tied embeddings."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    aliases = ("GPT2Model",)
    base_prefix = "transformer."
    synonyms = SYNONYMS
    kept_numbers = ("initializer_range", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    keys = {
        **SYNONYMS,
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    only = {"add_cross_attention": (False, "a gpt2 that reads an encoder is not supported")}
    # Only the order in which the scores are scaled depends on it.
    idle = ("reorder_and_upcast_attn",)
    names = BlockNames(
        embedding="transformer.wte.weight",
        positions="transformer.wpe.weight",
        layer="transformer.h.{layer}.",
        norms=("ln_1", "ln_2"),
        final_norm="transformer.ln_f",
        qkv="attn.c_attn",
        output="attn.c_proj",
        fc_in="mlp.c_fc",
        fc_out="mlp.c_proj",
        inputs_first=True,
    )
    gguf = GgufFacts(
        "gpt2", states=(("activation_function", "gelu_new"), ("tie_word_embeddings", True))
    )
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_257,
        "n_embd": 768,
        "n_inner": None,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }

    intermediate_size: int = size(NEURONS, null=lambda values: 4 * values["hidden_size"])
    tie_word_embeddings: bool = flag(default=True)
    scale_attn_weights: bool = flag(default=True)
    scale_attn_by_inverse_layer_idx: bool = flag(default=False)

    def score_scale(self, layer: int) -> float:
        """Return the factor on the attention scores of a layer."""
        scale = float(self.head_dim**-0.5) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


@config_class
class GptNeoXConfig(GptConfig):
    """A gpt_neox (Pythia): rotary positions in part of each head, blocks side by side."""

    model_type = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    kept_numbers = (
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
    )
    keys = {"parallel_residual": "use_parallel_residual", "attention_bias": "attention_bias"}
    only = FILLED
    idle = ("is_decoder", "rope_theta")
    names = BlockNames(
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        layer="gpt_neox.layers.{layer}.",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="gpt_neox.final_layer_norm",
        qkv="attention.query_key_value",
        output="attention.dense",
        fc_in="mlp.dense_h_to_4h",
        fc_out="mlp.dense_4h_to_h",
        by_head=True,
    )
    gguf = GgufFacts("gptneox", states=(("hidden_act", "gelu"), ("tie_word_embeddings", False)))
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_432,
        "hidden_size": 6144,
        "intermediate_size": 24_576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
        "is_decoder": False,
        "hidden_dropout": 0.0,
        "classifier_dropout": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }

    rope: RopeConfig
    rotary_dim: int
    parallel_residual: bool = flag(default=True)

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        """The rotary positions and the entries of a head that they rotate."""
        return self.rope, self.rotary_dim

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
        return {**sizes, "rotary_dim": shrink_rotated(self.rotary_dim, self.head_dim, head_dim)}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self.rope.checks(self.rotary_dim)
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            fault = "the rotary embedding needs an even number of entries of a head"
            keys = ("rotary_pct", "rope_parameters", "hidden_size", "num_attention_heads")
            yield key_problem(fault, "an even number", f"{self.rotary_dim}", *keys)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        head_dim = max(values["hidden_size"] // values["num_attention_heads"], 1)
        rotated = read_partial_rotary(reader, head_dim, "rotary_pct", 0.25)
        # transformers takes no other key than this one outside the rope parameters.
        data = dict(reader.without("rope_theta").data)
        if reader.has("rotary_emb_base"):
            data["rope_theta"] = reader.data["rotary_emb_base"]
        length = values["max_position_embeddings"]
        return {
            **values,
            "rope": read_rope(reader.with_data(data), length, partial=True),
            "rotary_dim": head_dim if rotated is None else rotated,
        }

    def _write(self) -> JsonDict:
        share = partial_rotary_factor(self.rotary_dim, self.head_dim)
        keys: JsonDict = self.rope.to_json()
        keys["rope_parameters"] = {**keys["rope_parameters"], "partial_rotary_factor": share}
        base = {"rotary_emb_base": self.rope.theta, "rotary_pct": share}
        return {**super()._write(), **keys, **base}


@config_class
class OptConfig(GptConfig):
    """An opt: learned positions behind two unused rows, a projection each of queries, keys, values.

    Norms come after the sums, and embeddings are narrower than the model, in the one of 350
    million parameters.
    """

    model_type = "opt"
    architecture = "OPTForCausalLM"
    aliases = ("OPTModel",)
    base_prefix = "model."
    position_offset = 2
    kept_numbers = ("init_std", "dropout", "attention_dropout", "layerdrop")
    keys = {
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "layer_norm_eps": "",
        "norms_first": "do_layer_norm_before",
        "word_width": "word_embed_proj_dim",
    }
    only: ClassVar[Only] = {
        "enable_bias": (True, "an opt without biases is not supported"),
        "layer_norm_elementwise_affine": (True, "norms without parameters are not supported"),
        "_remove_final_layer_norm": (False, "an opt without its last norm is not supported"),
        "layer_norm_eps": (1e-5, "transformers computes with 1e-5 whatever the config says"),
    }
    # Of the code that trained it; transformers does not read them.
    idle = ("activation_dropout", "output_projection", "share_decoder_input_output_embed")
    names = BlockNames(
        embedding="model.decoder.embed_tokens.weight",
        positions="model.decoder.embed_positions.weight",
        layer="model.decoder.layers.{layer}.",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        final_norm="model.decoder.final_layer_norm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        fc_in="fc1",
        fc_out="fc2",
        narrow=("model.decoder.project_in", "model.decoder.project_out"),
    )
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "init_std": 0.02,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }

    hidden_act: str = activation(default="relu")
    tie_word_embeddings: bool = flag(default=True)
    word_width: int = size(WIDTH, null=lambda values: values["hidden_size"])
