"""llama, mistral, mixtral, seed_oss, helium and smollm3: the plain decoder and its variants."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.families.config import EngineReading, GgufFacts, MaxTextFacts, TensorNames, config_class
from moecc.families.decoder import BIASES, DEFAULTS, DecoderConfig, read_rope_layers
from moecc.families.mixture import MOE_DEFAULTS, ONE_WIDTH, TRANSFORMERS, MoeConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.support.untyped import JsonDict


@config_class
class LlamaConfig(DecoderConfig):
    """A llama: optional biases on all four attention projections and in the feed-forward block."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    options = BIASES
    gguf = GgufFacts("llama", pairs_neighbours=True, output_bias=True, mlp_bias=True)
    maxtext = MaxTextFacts(folds_scale=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            fault = "transformers 5 rejects such a llama, whatever its head_dim, but not a mistral"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads", "head_dim")
            yield key_problem(fault, expected, f"{self.hidden_size}", *keys)


@config_class
class MistralConfig(DecoderConfig):
    """A mistral: no biases, and one sliding window in every layer or in none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    window_style = "uniform"
    gguf = LlamaConfig.gguf
    maxtext = MaxTextFacts(folds_scale=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@config_class
class MixtralConfig(MoeConfig):
    """A mixtral: a mistral with experts in every layer, gates always renormalised.

    `intermediate_size` is the width of an expert; both size fields hold it.
    """

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    fixed = {"norm_topk_prob": True}
    keys = {**ONE_WIDTH, "router_jitter_noise": "router_jitter_noise"}
    window_style = "uniform"
    experts_keys = ("num_local_experts",)
    sparse_style = "all"
    names = TensorNames(sparse="block_sparse_moe.", gate="w1", up="w3", down="w2")
    gguf = GgufFacts("llama", pairs_neighbours=True)
    maxtext = MaxTextFacts(folds_scale=True)
    engines = {
        **TRANSFORMERS,
        "vLLM": EngineReading(silent=("silu",)),
        "SGLang": EngineReading(
            ("plain heads",), ("untied", "full attention", "plain rope", "silu")
        ),
        "mlx-lm": EngineReading(("plain heads",), ("full attention", "plain rope", "silu")),
    }
    defaults = {
        **MOE_DEFAULTS,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "norm_topk_prob": True,
        "router_jitter_noise": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@config_class
class SeedOssConfig(DecoderConfig):
    """A seed_oss: a llama with a key of its own for the bias of the attention's output."""

    model_type = "seed_oss"
    architecture = "SeedOssForCausalLM"
    options = BIASES
    keys = {"output_bias": "attention_out_bias"}
    gguf = GgufFacts(
        "seed_oss",
        norms=(
            ("attn_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
        ),
    )
    defaults = {
        **DEFAULTS,
        "vocab_size": 155_136,
        "hidden_size": 4096,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524_288,
        "attention_bias": True,
        "attention_out_bias": False,
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


@config_class
class HeliumConfig(DecoderConfig):
    """A helium: a llama of which neighbours are rotated, without a bias of the output."""

    model_type = "helium"
    architecture = "HeliumForCausalLM"
    options = frozenset({"qkv_bias", "mlp_bias"})
    plain_heads = "the last matrix of a helium's attention is square"
    names = TensorNames(pairs_neighbours=True)
    defaults = {
        **DEFAULTS,
        "vocab_size": 48_000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


# smollm3: a llama some of whose layers have no rotary positions.


@config_class
class SmolLM3Config(DecoderConfig):
    """A smollm3; every fourth layer has no rotary positions unless `no_rope_layers` says other."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    options = BIASES | {"rope_layers"}
    window_style = "typed"
    gguf = GgufFacts("smollm3", pairs_neighbours=True, no_rope_step=4)
    defaults = {
        **DEFAULTS,
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "pad_token_id": 128_004,
    }

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        if reader.flag("use_sliding_window"):
            return super()._read(reader)
        if "sliding_attention" in reader.items("layer_types"):
            fault = "transformers gives these layers a window in spite of use_sliding_window"
            hint = "set use_sliding_window to true, or make every layer full_attention"
            reader.refuse("layer_types", fault, expected="full_attention", hint=hint)
        reader.used.update(("sliding_window", "layer_types"))
        hidden = {
            k: v for k, v in reader.data.items() if k not in ("sliding_window", "layer_types")
        }
        return super()._read(reader.with_data(hidden))

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        layers = read_rope_layers(reader, values["num_hidden_layers"])
        rope = super()._read_rope(reader, values)
        return {**rope, "rope_layers": None if all(layers) else layers}

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        return tuple(not rope for rope in read_rope_layers(reader, layers))

    def _write(self) -> JsonDict:
        layers = self.rope_layers or (True,) * self.num_hidden_layers
        return {
            **super()._write(),
            "no_rope_layers": [int(rope) for rope in layers],
            "use_sliding_window": any(self.sliding_windows),
        }
