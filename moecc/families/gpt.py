"""gpt2 and gpt_neox: decoders with layer norms, biases everywhere and a block of two matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ModelConfig, activation_problem, config_class
from moecc.families.encdec import read_activation
from moecc.families.reader import (
    EXTRA_DEFAULTS,
    LARGEST_SIZES,
    KeyProblem,
    Reader,
    key_problem,
    refuse_attention_to_later_tokens,
)
from moecc.families.rope import RopeConfig, partial_rotary_factor, read_partial_rotary, read_rope

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@config_class
class GptConfig(ModelConfig):
    """A decoder of the GPT line; all heads have keys of their own and fill the model's width.

    `parallel_residual` says whether the feed-forward block reads what the attention reads,
    `norms_first` whether norms come before the sublayers and at the end, or after each sum.
    """

    kind: ClassVar[str] = "a decoder with layer norms"
    mask_hint: ClassVar[str | None] = (
        "padding after a text changes nothing: no earlier token attends to it"
    )
    # The rows of the table of positions before that of the first token.
    position_offset: ClassVar[int] = 0

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    parallel_residual: bool = False
    norms_first: bool = True
    word_width: int = 0

    @property
    def embedding_width(self) -> int:
        """The width of the token embedding, which a projection widens if it is not the model's."""
        return self.word_width or self.hidden_size

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        """The rotary positions and the entries of a head that they rotate; None if learned."""
        return None

    def score_scale(self, layer: int) -> float:
        """Return the factor on the attention scores of a layer."""
        return float(self.head_dim**-0.5)

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name in SIZES:
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[name]:
                expected = f"1 to {LARGEST_SIZES[name]:,}"
                yield key_problem("not a usable size", expected, f"{value}", self.key(name))
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            what = "the heads do not divide the width"
            expected = f"a multiple of {self.num_attention_heads}"
            between = (self.key("hidden_size"), self.key("num_attention_heads"))
            yield key_problem(what, expected, f"{self.hidden_size}", *between)
        yield from activation_problem(self.hidden_act, self.key("hidden_act"))
        yield from super().checks()

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        refuse_attention_to_later_tokens(reader)
        values = {name: reader.size(cls.key(name)) for name in SIZES if name != SIZES[1]}
        return {
            **super()._read(reader),
            **values,
            "intermediate_size": cls._read_width(reader, values["hidden_size"]),
            "layer_norm_eps": reader.number(cls.key("layer_norm_eps"), least=0),
            "hidden_act": read_activation(reader, cls.key("hidden_act")),
            "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        }

    @classmethod
    def _read_width(cls, reader: Reader, hidden: int) -> int:
        return reader.size(cls.key("intermediate_size"))

    def _write(self) -> dict[str, object]:
        names = (*SIZES, "layer_norm_eps", "hidden_act", "tie_word_embeddings")
        return {self.key(name): getattr(self, name) for name in names}


@config_class
class Gpt2Config(GptConfig):
    """A gpt2: learned positions, matrices with their inputs first, tied embeddings."""

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    aliases: ClassVar[tuple[str, ...]] = ("GPT2Model",)
    base_prefix: ClassVar[str] = "transformer."
    synonyms: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    }
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "initializer_range",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
    )
    keys: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    defaults: ClassVar[Mapping[str, object]] = {
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

    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def score_scale(self, layer: int) -> float:
        """Return the factor on the attention scores of a layer."""
        scale = float(self.head_dim**-0.5) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        if reader.flag("add_cross_attention"):
            what = "a gpt2 that reads an encoder is not supported"
            reader.refuse("add_cross_attention", what, expected="false")
        # Only the order in which the scores are scaled depends on it.
        reader.value("reorder_and_upcast_attn")
        flags = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")
        return {**super()._read(reader), **{name: reader.flag(name) for name in flags}}

    @classmethod
    def _read_width(cls, reader: Reader, hidden: int) -> int:
        return 4 * hidden if reader.value("n_inner") is None else reader.size("n_inner")

    def _write(self) -> dict[str, object]:
        return {
            **super()._write(),
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
        }


@config_class
class GptNeoXConfig(GptConfig):
    """A gpt_neox (Pythia): rotary positions in part of each head, blocks side by side."""

    model_type: ClassVar[str] = "gpt_neox"
    architecture: ClassVar[str] = "GPTNeoXForCausalLM"
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
    )
    keys: ClassVar[Mapping[str, str]] = {"parallel_residual": "use_parallel_residual"}
    defaults: ClassVar[Mapping[str, object]] = {
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
    parallel_residual: bool = True

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        """The rotary positions and the entries of a head that they rotate."""
        return self.rope, self.rotary_dim

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self.rope.checks(self.rotary_dim)
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            what = "the rotary embedding needs an even number of entries of a head"
            keys = ("rotary_pct", "hidden_size", "num_attention_heads")
            yield key_problem(what, "an even number", f"{self.rotary_dim}", *keys)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        reader.value("is_decoder")
        hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
        head_dim, length = max(hidden // heads, 1), reader.size("max_position_embeddings")
        rotated = read_partial_rotary(reader, head_dim, "rotary_pct", 0.25)
        return {
            **values,
            "rope": read_rope(_with_usual_theta(reader), length, partial=True),
            "rotary_dim": head_dim if rotated is None else rotated,
            "attention_bias": reader.flag("attention_bias"),
            "parallel_residual": reader.flag("use_parallel_residual"),
        }

    def _write(self) -> dict[str, object]:
        share = partial_rotary_factor(self.rotary_dim, self.head_dim)
        keys = self.rope.to_json()
        parameters = keys["rope_parameters"]
        assert isinstance(parameters, dict), "as the rope writes them"
        return {
            **super()._write(),
            **keys,
            "rope_parameters": {**parameters, "partial_rotary_factor": share},
            "rotary_emb_base": self.rope.theta,
            "rotary_pct": share,
            "attention_bias": self.attention_bias,
            "use_parallel_residual": self.parallel_residual,
        }


def _with_usual_theta(reader: Reader) -> Reader:
    """Return `reader` with the family's own key of the base period under the usual name.

    transformers takes no other key than ``rotary_emb_base`` outside the rope parameters.
    """
    reader.value("rope_theta")
    data = {key: value for key, value in reader.data.items() if key != "rope_theta"}
    if reader.has("rotary_emb_base"):
        data["rope_theta"] = reader.data["rotary_emb_base"]
    return reader.with_data(data)


# opt: a decoder of the GPT line whose norms come before the sublayers, or after the sums.


@config_class
class OptConfig(GptConfig):
    """An opt: learned positions behind two unused rows, a projection each of queries, keys, values.

    Norms come after the sums, and embeddings are narrower than the model, in the one of 350
    million parameters.
    """

    model_type: ClassVar[str] = "opt"
    architecture: ClassVar[str] = "OPTForCausalLM"
    aliases: ClassVar[tuple[str, ...]] = ("OPTModel",)
    base_prefix: ClassVar[str] = "model."
    position_offset: ClassVar[int] = 2
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "init_std",
        "dropout",
        "attention_dropout",
        "layerdrop",
    )
    keys: ClassVar[Mapping[str, str]] = {
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
    }
    defaults: ClassVar[Mapping[str, object]] = {
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

    hidden_act: str = "relu"
    tie_word_embeddings: bool = True
    norms_first: bool = True
    word_width: int

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if not 1 <= self.word_width <= LARGEST_SIZES["hidden_size"]:
            expected = f"1 to {LARGEST_SIZES['hidden_size']:,}"
            found, key = f"{self.word_width}", "word_embed_proj_dim"
            yield key_problem("not a usable size", expected, found, key)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        for key in ("activation_dropout", "output_projection", "share_decoder_input_output_embed"):
            reader.value(key)  # of the code that trained it; transformers does not read them
        for key, usual in (
            ("enable_bias", True),
            ("layer_norm_elementwise_affine", True),
            ("_remove_final_layer_norm", False),
        ):
            if reader.flag(key) != usual:
                what = "an opt without biases, or without parameters of norms, is not supported"
                reader.refuse(key, what, expected=str(usual).lower())
        if reader.value("layer_norm_eps") != cls.defaults["layer_norm_eps"]:
            what = "transformers computes with 1e-5 whatever the config says"
            reader.refuse("layer_norm_eps", what, expected="1e-5")
        narrow, width = "word_embed_proj_dim", reader.size("hidden_size")
        return {
            **super()._read(reader),
            "norms_first": reader.flag("do_layer_norm_before"),
            "word_width": width if reader.value(narrow) is None else reader.size(narrow),
        }

    def _write(self) -> dict[str, object]:
        written = {k: v for k, v in super()._write().items() if k != "layer_norm_eps"}
        return {
            **written,
            "do_layer_norm_before": self.norms_first,
            "word_embed_proj_dim": self.word_width,
        }
