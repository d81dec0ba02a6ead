"""llama4_text: chunks of attention, layers without rotary positions, gates on experts' inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.config import EngineReading, TensorNames, config_class
from moecc.families.decoder import read_rope_layers
from moecc.families.mixture import FIXED_GATES_DEFAULTS, SHARED, TRANSFORMERS, MoeConfig
from moecc.families.reader import LENGTH, KeyProblem, Reader, key_problem
from moecc.families.shrinking import SMALL_WINDOW
from moecc.support.untyped import JsonDict

CHUNK, LAYER_TYPES, ROPE_LAYERS = "attention_chunk_size", "layer_types", "no_rope_layers"
IN_CHUNKS = {"chunked_attention": True, "full_attention": False}
TUNING, FLOOR, STRENGTH = "attn_temperature_tuning", "floor_scale", "attn_scale"
NOT_EXAMINED = ("vLLM", "SGLang", "llama.cpp", "mlx-lm")


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
    engines = {
        **TRANSFORMERS,
        **{name: EngineReading(never="not examined with this family") for name in NOT_EXAMINED},
    }
    defaults = {
        **{key: value for key, value in FIXED_GATES_DEFAULTS.items() if key != "mlp_bias"},
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
            reader = reader.with_data({k: v for k, v in reader.data.items() if k != ROPE_LAYERS})
        chunks_of = reader.items(LAYER_TYPES)
        data = {k: v for k, v in reader.data.items() if k != LAYER_TYPES}
        values = super()._read(reader.with_data(data))
        layers = values["num_hidden_layers"]
        has_rope = read_rope_layers(reader, layers)
        chunk = reader.optional_size(CHUNK, LENGTH)
        in_chunks = tuple(chunk is not None and rope for rope in has_rope)
        if reader.value(LAYER_TYPES) is not None:
            expected = " or ".join(IN_CHUNKS)
            if not all(isinstance(kind, str) and kind in IN_CHUNKS for kind in chunks_of):
                reader.refuse(LAYER_TYPES, "unknown kind of layer", expected=expected)
            elif len(chunks_of) != layers:
                fault = f"{len(chunks_of)} entries for {layers} layers"
                reader.refuse(LAYER_TYPES, fault, expected="an entry for each layer")
            in_chunks = tuple(IN_CHUNKS.get(str(kind), False) for kind in chunks_of)
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
