"""opt: a decoder of the GPT line whose norms come before the sublayers, or after the sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from .extras import EXTRA_DEFAULTS
from .gpt import GptConfig
from .model import config_class
from .reader import LARGEST_SIZES, KeyProblem, Reader, key_problem


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
