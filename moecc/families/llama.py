"""llama, mistral, mixtral, seed_oss, helium, smollm3, hunyuan, llama4: plain decoders, and more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.config import EngineReading, GgufFacts, MaxTextFacts, TensorNames, config_class
from moecc.families.decoder import (
    ATTENTION_BIASES,
    BIASES,
    DEFAULTS,
    DecoderConfig,
    read_rope_layers,
)
from moecc.families.mixture import (
    FIXED_GATES_DEFAULTS,
    MOE_DEFAULTS,
    ONE_WIDTH,
    SHARED,
    TRANSFORMERS,
    UNEXAMINED,
    MoeConfig,
)
from moecc.families.reader import LENGTH, KeyProblem, Reader, key_problem
from moecc.families.rope import ROPE_KEYS, RopeConfig
from moecc.families.shrinking import SMALL_WINDOW
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
    gguf = GgufFacts("seed_oss", ffn_norm="post_attention_norm")
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
    gguf = GgufFacts("smollm3", pairs_neighbours=True, unread_ropes=("llama3",), no_rope_step=4)
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
        return super()._read(reader.without("sliding_window", "layer_types"))

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


CHUNK, LAYER_TYPES, ROPE_LAYERS = "attention_chunk_size", "layer_types", "no_rope_layers"
IN_CHUNKS = {"chunked_attention": True, "full_attention": False}
TUNING, FLOOR, STRENGTH = "attn_temperature_tuning", "floor_scale", "attn_scale"


@config_class
class Llama4TextConfig(MoeConfig):
    """A llama4_text: a shared expert as wide as the others in each sparse layer.

    The width of dense blocks is another one.  Layers with rotary positions normalise queries and
    keys after the rotation; in the others, queries may grow with the position.
    """

    model_type = "llama4_text"
    architecture = "Llama4ForCausalLM"
    fixed = {"norm_topk_prob": False, "qk_norm_last": True, "qk_norm_plain": True}
    options = frozenset({"qk_norm", "rope_layers", "attention_chunks", "growing_queries"})
    keys = {
        "intermediate_size": "intermediate_size_mlp",
        "expert_intermediate_size": "intermediate_size",
        SHARED: "intermediate_size",
        "qk_norm": "use_qk_norm",
        "router_jitter_noise": "router_jitter_noise",
        # transformers has no balance loss for the family.
        "router_aux_loss_coef": "",
    }
    only = {"attention_bias": (False, "transformers 5 alone has these biases")}
    strict = ("num_key_value_heads", "head_dim")
    rope_types = ("default", "llama3")
    experts_keys = ("num_local_experts",)
    sparse_style = "listed"
    score = "sigmoid"
    has_shared_expert = True
    shared_gate = False
    weighs_inputs = True
    names = TensorNames(
        dense="feed_forward.",
        sparse="feed_forward.",
        router="router.weight",
        expert_gate_up="experts.gate_up_proj",
        expert_down="experts.down_proj",
        inputs_first=True,
        pairs_neighbours=True,
    )
    gguf = GgufFacts(
        "llama4",
        reads_divisors=True,
        no_rope_step=4,
        keys=(("interleave_moe_layer_step", "interleave_moe_layer_step"),),
        renormalises=None,
        states=((CHUNK, 8192), (TUNING, True), (FLOOR, 8192), (STRENGTH, 0.1)),
    )
    engines = {
        **TRANSFORMERS,
        **UNEXAMINED,
        "vLLM": EngineReading(silent=("silu",)),
        "mlx-lm": EngineReading(never="it reads the family in its wrapper alone"),
    }
    defaults = {
        **{
            key: value
            for key, value in FIXED_GATES_DEFAULTS.items()
            if key not in ("mlp_bias", "router_aux_loss_coef")
        },
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "router_jitter_noise": 0.0,
        ROPE_LAYERS: None,
        "no_rope_layer_interval": 4,
        CHUNK: 8192,
        LAYER_TYPES: None,
        TUNING: True,
        FLOOR: 8192,
        STRENGTH: 0.1,
    }

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        chunks, growth = self.attention_chunks, self.growing_queries
        return {
            **sizes,
            SHARED: sizes["expert_intermediate_size"],
            "attention_chunks": chunks and tuple(c and min(c, SMALL_WINDOW) for c in chunks),
            "growing_queries": growth and (min(growth[0], SMALL_WINDOW), growth[1]),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        shared, width = self.shared_expert_intermediate_size, self.expert_intermediate_size
        if shared != width:
            fault = "the shared expert of a llama4_text is as wide as the others"
            yield key_problem(fault, f"{width}", f"{shared}", "intermediate_size")
        if len(sizes := sorted({size for size in self.attention_chunks or () if size})) > 1:
            yield key_problem("chunks of several lengths", "one length", f"{sizes}", CHUNK)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        if not reader.items(ROPE_LAYERS):
            # An empty list is none to transformers.
            reader = reader.without(ROPE_LAYERS)
        values = super()._read(reader.without(LAYER_TYPES))
        layers = values["num_hidden_layers"]
        has_rope = read_rope_layers(reader, layers)
        chunk = reader.optional_size(CHUNK, LENGTH)
        in_chunks = reader.layer_kinds(LAYER_TYPES, IN_CHUNKS, layers)
        if in_chunks is None:
            in_chunks = tuple(chunk is not None and rope for rope in has_rope)
        if chunk is None and any(in_chunks):
            reader.refuse(LAYER_TYPES, "chunks without a length", expected="attention_chunk_size")
        tuning = reader.value(TUNING)
        # The first checkpoints say 4, which transformers 4 takes for true.
        is_tuned = tuning != 0 if type(tuning) is int else reader.flag(TUNING)
        interval, strength = reader.size(FLOOR, LENGTH), reader.number(STRENGTH)
        return {
            **values,
            "rope_layers": None if all(has_rope) else has_rope,
            "attention_chunks": tuple(chunk if n else None for n in in_chunks)
            if any(in_chunks)
            else None,
            "growing_queries": (float(interval), strength) if is_tuned else None,
        }

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        fields = super()._read_rope(reader, values)
        scaling = reader.data.get("rope_scaling")
        if isinstance(scaling, Mapping) and scaling and fields["rope"].type == "default":
            fault = "transformers 4 takes whatever stands here for llama3"
            reader.refuse("rope_scaling", fault, expected="null, or the parameters of llama3")
        return fields

    def _write(self) -> JsonDict:
        chunks = self.attention_chunks or (None,) * self.num_hidden_layers
        kinds = {in_chunks: kind for kind, in_chunks in IN_CHUNKS.items()}
        interval, strength = self.growing_queries or (8192, 0.1)
        return {
            **super()._write(),
            ROPE_LAYERS: [
                int(self.rope_of(layer) is not None) for layer in range(self.num_hidden_layers)
            ],
            CHUNK: next((size for size in chunks if size is not None), self.defaults[CHUNK]),
            LAYER_TYPES: [kinds[size is not None] for size in chunks],
            TUNING: self.growing_queries is not None,
            FLOOR: int(interval),
            STRENGTH: strength,
        }


ALPHA_KEYS = frozenset(
    {"alpha", "type", "rope_type", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor"}
)
"""What rotary parameters of a hunyuan state with `alpha`, which is all that transformers reads."""


@config_class
class HunYuanDenseV1Config(DecoderConfig):
    """A hunyuan_v1_dense: a llama with norms of each head, behind the rotation.

    A ``dynamic`` scaling with `alpha` is another base period, θ · alpha^(d / (d − 2)) for heads of
    width d; up to `max_position_embeddings` tokens that is what both releases compute.
    """

    model_type = "hunyuan_v1_dense"
    architecture = "HunYuanDenseV1ForCausalLM"
    fixed = {"qk_norm": True, "qk_norm_last": True}
    options = ATTENTION_BIASES
    # Its checkpoints state these, and transformers reads neither.
    only = {
        "num_experts": (1, "a hunyuan_v1_dense has no experts"),
        "use_qk_norm": (True, "transformers normalises queries and keys whatever this says"),
    }
    gguf = GgufFacts("hunyuan-dense")
    names = TensorNames(query_norm="query_layernorm", key_norm="key_layernorm")
    defaults = {
        **DEFAULTS,
        "vocab_size": 290_943,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        head_dim, data = values["head_dim"], dict(reader.data)
        alphas: dict[str, float] = {}
        for key in ROPE_KEYS[1:]:
            part = data.get(key)
            if not isinstance(part, Mapping) or "alpha" not in part:
                continue
            inner = Reader(part, {}, f"{reader.where}: {key}")
            alphas[key] = inner.number("alpha", above=0)
            reader.problems.extend(inner.problems)
            kinds = [part[name] for name in ("type", "rope_type") if name in part]
            if not kinds or any(kind != "dynamic" for kind in kinds) or head_dim <= 2:
                reader.refuse(key, "alpha belongs to the type dynamic, and heads wider than 2")
            kept_parameters = {name: part[name] for name in part if name not in ALPHA_KEYS}
            data[key] = {"rope_type": "default", **kept_parameters}
        if len(set(alphas.values())) > 1:
            reader.conflict(tuple(alphas), "alpha is stated twice and differs")
        rope = super()._read_rope(reader.with_data(data), values)["rope"]
        if alphas and head_dim > 2:
            growth = next(iter(alphas.values())) ** (head_dim / (head_dim - 2))
            rope = RopeConfig(theta=rope.theta * growth)
        return {"rope": rope}
