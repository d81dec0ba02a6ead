"""Hypothesis strategies for configs of model families, small enough to build and to run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypothesis import strategies as st

from moecc.families.bert import BertConfig
from moecc.families.config import ModelConfig
from moecc.families.decoder import (
    ATTENTION_BIASES,
    DecoderConfig,
    DeltaLayers,
    LatentAttention,
)
from moecc.families.encdec import EncDecConfig
from moecc.families.mixture import SHARED, MoeConfig
from moecc.families.registry import decoders, parse_config
from moecc.families.rope import RopeConfig
from moecc.families.st_moe import StMoeConfig
from moecc.families.t5 import SwitchTransformersConfig, T5Config
from moecc.formats.files import read_json_object
from moecc.formats.source import Checkpoint, TensorInfo
from moecc.ir.graph import Graph
from moecc.support.lazy import np
from moecc.support.process import Closing
from moecc.support.untyped import Json, JsonDict
from moecc.types import DTYPES, F32, Array, DType
from moecc.weights.expr import Expr, sources

_ROPES = (
    RopeConfig(theta=10_000.0),
    RopeConfig(theta=5e5, type="linear", factor=2.0),
    RopeConfig(
        theta=5e5,
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    RopeConfig(theta=1e4, type="yarn", factor=4.0, original_max_position_embeddings=16),
)


@st.composite
def small_configs(
    draw: st.DrawFn, families: Collection[str] = tuple(decoders()), most_layers: int = 3
) -> DecoderConfig:
    """Draw a config of one of `families`, decoders, with every feature that the family has."""
    family = decoders()[draw(st.sampled_from(sorted(families)))]
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 1 + family.shares_keys))
    layers, head_dim = draw(st.integers(1, most_layers)), draw(st.sampled_from([4, 6]))
    heads = kv_heads * group
    values: JsonDict = {
        "vocab_size": draw(st.integers(3, 12)),
        "hidden_size": heads * (head_dim if fills_width(family) else draw(st.sampled_from([4, 7]))),
        "intermediate_size": draw(st.integers(1, 4)) * 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rope": draw(st.sampled_from([r for r in _ROPES if r.type in family.rope_types])),
        "hidden_act": draw(activations(family)),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_windows": draw(_windows(family.window_style, layers)),
        "dtype": "float32",
        # The usual padding token of some families is beyond so small a vocabulary.
        "extra": {"pad_token_id": None},
        **family.fixed,
    }
    values |= draw(feature_values(family, values))
    if issubclass(family, MoeConfig):
        values |= draw(_experts(family, layers, values["intermediate_size"]))
    return family(**values)


def activations(family: type[DecoderConfig]) -> st.SearchStrategy[str]:
    """Return the activations that a family has; gelu means another one in gemma."""
    if family.model_type in ("gpt_oss", "apertus", "lfm2", "lfm2_moe", "qwen3_next"):
        return st.just(str(family.defaults.get("hidden_act", "silu")))
    exact = [] if family.model_type == "gemma" else ["gelu"]
    return st.sampled_from(["silu", "relu", "gelu_pytorch_tanh", *exact])


def fills_width(family: type[DecoderConfig]) -> bool:
    """Whether the heads of a family together have the model's width."""
    return bool(family.plain_heads)


@st.composite
def feature_values(draw: st.DrawFn, family: type[DecoderConfig], values: Json) -> JsonDict:
    """Draw what a family leaves open of `FEATURES`.

    Args:
      draw: of Hypothesis.
      family: the class of config.
      values: the fields drawn before.
    """
    layers, rope = values["num_hidden_layers"], values["rope"]
    local = st.just(RopeConfig(theta=30.0))
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "mlp_bias": st.booleans(),
        "qk_norm": st.booleans(),
        "embedding_multiplier": st.sampled_from([1.0, 3.0]),
        "residual_multiplier": st.sampled_from([1.0, 0.22]),
        "attention_scale": st.sampled_from([None, 11**-0.5]),
        "attention_softcap": st.sampled_from([None, 2.0]),
        "logits_divisor": st.sampled_from([1.0, 6.0]),
        "logit_softcap": st.sampled_from([None, 3.0]),
        "rotary_dim": st.sampled_from([None, 2]) if rope.type != "dynamic" else st.none(),
        "head_bias": st.booleans(),
        "qkv_clip": st.sampled_from([None, 0.5]),
        "parallel": st.booleans(),
        "norms_apart": st.booleans(),
        "rope_layers": st.none() | st.tuples(*[st.booleans()] * layers),
        "conv_taps": st.none() | st.tuples(*[st.sampled_from([0, 3])] * layers),
        "conv_bias": st.booleans(),
        "attention_chunks": st.none() | st.tuples(*[st.sampled_from([None, 3])] * layers),
        "growing_queries": st.sampled_from([None, (2.0, 0.5)]),
        "delta": st.none() | _delta_layers(layers),
        "local_rope": local if rope.type != "default" else st.none() | local,
    }
    if "latent" in family.options:
        kinds["rotary_dim"] = st.just(2)
        has_halves = "rope_interleave" in family.defaults
        sizes = (st.none() | st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
        interleaved = st.booleans() if has_halves else st.just(True)
        kinds["latent"] = st.builds(LatentAttention, *sizes, interleaved)
    if family.model_type == "granitemoehybrid":
        kinds["rope_layers"] = st.sampled_from([None, (False,) * layers])
    # That all layers have rotary positions is not stated by listing them.
    drawn = {name: draw(kinds[name]) for name in sorted(family.options - ATTENTION_BIASES)}
    drawn |= dict.fromkeys(ATTENTION_BIASES & family.options, draw(st.booleans()))
    if family.key("mlp_bias") == family.key("qkv_bias"):
        drawn["mlp_bias"] = drawn["qkv_bias"]
    if family.model_type == "falcon":
        one_each = values["num_key_value_heads"] in (1, values["num_attention_heads"])
        drawn["parallel"] |= drawn["norms_apart"] or not one_each
    if "conv_taps" in drawn and not any(drawn["conv_taps"] or ()):
        drawn |= {"conv_taps": None, "conv_bias": False}
    if not any(drawn.get("attention_chunks") or ()):
        drawn |= {name: None for name in drawn if name == "attention_chunks"}
    listed = drawn.get("rope_layers")
    return {**drawn, "rope_layers": None} if listed and all(listed) else drawn


@st.composite
def _delta_layers(draw: st.DrawFn, layers: int) -> DeltaLayers:
    kinds = draw(st.tuples(*[st.booleans()] * layers).filter(any))
    heads, each, key, value, taps = (draw(st.integers(1, most)) for most in (2, 2, 3, 3, 3))
    return DeltaLayers(kinds, heads, heads * each, key, value, taps)


@st.composite
def _windows(draw: st.DrawFn, style: str, layers: int) -> tuple[int | None, ...]:
    window = st.none() | st.integers(1, 4)
    if style == "none":
        return (None,) * layers
    if style not in ("top", "typed"):
        return (draw(window),) * layers
    size = draw(st.integers(1, 4))
    return tuple(draw(st.sampled_from([None, size])) for _ in range(layers))


@st.composite
def _experts(draw: st.DrawFn, family: type[MoeConfig], layers: int, width: int) -> JsonDict:
    count = draw(st.integers(2, 4))
    expert_width = draw(st.integers(1, 8)) if family.has_expert_width() else width
    return {
        "num_experts": count,
        "experts_per_token": draw(choices(family, count)),
        "expert_intermediate_size": expert_width,
        **draw(gate_values(family)),
        "shared_expert_intermediate_size": draw(shared_widths(family, expert_width)),
        "mlp_only_layers": draw(_dense_layers(family.sparse_style, layers)),
        **(draw(_groups(count)) if family.limits_groups else {}),
    }


@st.composite
def _groups(draw: st.DrawFn, experts: int) -> JsonDict:
    """Draw whether a token chooses in one of two groups of the experts, one of them then."""
    if experts < 4 or draw(st.booleans()):
        return {}
    return {"expert_groups": 2, "open_groups": 1, "experts_per_token": draw(st.integers(1, 2))}


def choices(family: type[MoeConfig], experts: int) -> st.SearchStrategy[int]:
    """Return the numbers of experts that a token may choose; two or more experts are there."""
    return st.just(2) if family.model_type == "phimoe" else st.integers(1, experts)


@st.composite
def gate_values(draw: st.DrawFn, family: type[MoeConfig]) -> JsonDict:
    """Draw the fields of the gates, as a family has them.

    Args:
      draw: of Hypothesis.
      family: the class of config.
    """
    always = family.renormalises()
    divides = st.booleans() if always is None else st.just(always)
    return {
        "norm_topk_prob": draw(divides),
        "gate_scale": draw(st.sampled_from([1.0, 1.5])) if family.key("gate_scale") else 1.0,
        # A checkpoint of such a family has the bias.
        "routing_bias": family.has_routing_bias,
    }


@st.composite
def shared_widths(draw: st.DrawFn, family: type[MoeConfig], width: int) -> int | None:
    """Draw the width of the shared expert of a family.

    Args:
      draw: of Hypothesis.
      family: the class of config.
      width: the width of one expert.
    """
    if not family.has_shared_expert:
        return None
    count = draw(st.integers(0 if family.shared_is_optional else 1, 3))
    if family.shared_count_key:
        return count * width or None
    if family.key(SHARED) == family.key("expert_intermediate_size"):
        return width
    return draw(st.integers(1, 6))


@st.composite
def _dense_layers(draw: st.DrawFn, style: str, layers: int) -> tuple[int, ...]:
    if style == "all":
        return ()
    if style in ("leading", "counted"):
        return tuple(range(draw(st.integers(0, layers - 1))))
    if style == "interval":
        first = draw(st.integers(0, layers - 1))
        last = draw(st.integers(first, layers - 1))
        return tuple(n for n in range(layers) if not first <= n <= last)
    sparse = draw(st.sets(st.integers(0, layers - 1), min_size=1))
    return tuple(n for n in range(layers) if n not in sparse)


@st.composite
def small_encdec_configs(draw: st.DrawFn, most_layers: int = 3) -> EncDecConfig:
    """Draw a config of an encoder-decoder family: t5, switch_transformers or st_moe."""
    kind = draw(st.sampled_from([T5Config, SwitchTransformersConfig, StMoeConfig]))
    tied = draw(st.booleans())
    values: JsonDict = {
        "vocab_size": draw(st.integers(3, 12)),
        "hidden_size": draw(st.sampled_from([4, 7, 12])),
        "head_dim": draw(st.sampled_from([3, 4])),
        "intermediate_size": draw(st.integers(1, 4)) * 4,
        "num_hidden_layers": draw(st.integers(1, most_layers)),
        "num_decoder_layers": draw(st.integers(1, most_layers)),
        "num_attention_heads": draw(st.integers(1, 3)),
        "relative_attention_num_buckets": draw(st.sampled_from([4, 6, 32])),
        "relative_attention_max_distance": draw(st.sampled_from([20, 128])),
        "hidden_act": draw(st.sampled_from(["silu", "relu", "gelu_pytorch_tanh"])),
        "tie_word_embeddings": tied,
        "scale_outputs": tied,
        "dtype": "float32",
    }
    if kind is SwitchTransformersConfig:
        return SwitchTransformersConfig(**values, **draw(_switch_experts(values)))
    values["gated"] = draw(st.booleans())
    return (
        StMoeConfig(**values, **draw(_st_moe_experts(values)))
        if kind is StMoeConfig
        else (T5Config(**values))
    )


@st.composite
def _switch_experts(draw: st.DrawFn, values: JsonDict) -> JsonDict:
    return {
        "num_experts": draw(st.integers(1, 4)),
        "expert_capacity": draw(st.sampled_from([1, 2, 1 << 30])),
        "num_sparse_encoder_layers": draw(st.integers(0, values["num_hidden_layers"])),
        "num_sparse_decoder_layers": draw(st.integers(0, values["num_decoder_layers"])),
    }


@st.composite
def _st_moe_experts(draw: st.DrawFn, values: JsonDict) -> JsonDict:
    count = draw(st.integers(2, 4))
    layers = values["num_hidden_layers"], values["num_decoder_layers"]
    sparse = [draw(st.sets(st.integers(0, n - 1))) for n in layers]
    return {
        "num_experts": count,
        "experts_per_token": draw(st.integers(1, count)),
        "sparse_encoder_layers": tuple(sorted(sparse[0])),
        "sparse_decoder_layers": tuple(sorted(sparse[1])),
        "extra_ffn": draw(st.sampled_from(["none", "before", "after"])),
        "eval_capacity_factor": draw(st.sampled_from([0.0, 2.0])),
    }


@st.composite
def small_bert_configs(draw: st.DrawFn, most_layers: int = 3) -> BertConfig:
    """Draw a config of a bert."""
    heads = draw(st.integers(1, 3))
    return BertConfig(
        vocab_size=draw(st.integers(3, 12)),
        hidden_size=heads * draw(st.integers(1, 4)),
        intermediate_size=draw(st.integers(1, 4)) * 4,
        num_hidden_layers=draw(st.integers(1, most_layers)),
        num_attention_heads=heads,
        max_position_embeddings=draw(st.sampled_from([8, 16])),
        type_vocab_size=draw(st.integers(1, 2)),
        hidden_act=draw(st.sampled_from(["gelu", "relu"])),
        dtype="float32",
    )


# Checkpoints in memory, for tests of families and conversions: no file is written.


class MemoryCheckpoint(Closing):
    """A checkpoint whose tensors are arrays; see `moecc.formats.source.Checkpoint`.

    Attributes:
      reads: the names of the tensors that were read, in order.
    """

    format = "safetensors"
    states_tie = False
    branches: Mapping[str, Checkpoint] = MappingProxyType({})

    def __init__(self, config: Mapping[str, object], arrays: Mapping[str, Array]) -> None:
        self.path = Path("memory")
        self.config: dict[str, object] = dict(config)
        self.arrays = dict(arrays)
        self.reads: list[str] = []

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the arrays are, by name."""
        return {
            name: TensorInfo(name, _dtype(array), array.shape, array.nbytes, self.path, 0)
            for name, array in self.arrays.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor."""
        self.reads.append(name)
        array = self.arrays[name]
        return array[start:stop] if array.ndim else array

    def remarks(self) -> list[str]:
        """Return nothing to note."""
        return []

    def companions(self) -> dict[str, Path | bytes]:
        """Return no files."""
        return {}

    def files(self) -> list[Path]:
        """Return no files."""
        return []

    def close(self) -> None:
        """Do nothing."""


def _dtype(array: Array) -> DType:
    return next(d for d in DTYPES.values() if d.kind != "key" and d.numpy == array.dtype)


def random_checkpoint(
    config: ModelConfig, seed: int = 0, dtype: DType = F32, layout: str = "experts"
) -> MemoryCheckpoint:
    """Return a checkpoint of `config` with random weights.

    Matrices are normal and keep the variance of what goes through them; the scales of norms are
    around 1.

    Args:
      config: a config of any family.
      seed: of the numbers.
      dtype: the element type of all tensors.
      layout: how experts are stored, ``experts`` or ``fused``.
    """
    from moecc.families.building import build_model

    graph = build_model(config, lambda name: dtype, layout=layout)
    weights = [value.weight for value in graph.params.values() if value.weight is not None]
    shapes = {s.name: s.type.shape for weight in weights for s in sources(weight)}
    rng = np.random.default_rng(seed)
    arrays = {name: _draw(rng, name, shape, dtype) for name, shape in shapes.items()}
    return MemoryCheckpoint(config.to_json(), arrays)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: DType) -> Array:
    drawn = rng.standard_normal(shape)
    if "norm" in name:
        drawn = 1 + 0.1 * drawn
    elif len(shape) > 1:
        drawn /= np.sqrt(shape[-1])
    return drawn.astype(dtype.numpy)


def exported_checkpoint(
    config: Mapping[str, object], tensors: Iterable[tuple[str, Expr]], source: MemoryCheckpoint
) -> MemoryCheckpoint:
    """Return the checkpoint that an export from `source` would write."""
    from moecc.weights.evaluate import evaluate

    return MemoryCheckpoint(config, {name: evaluate(e, source.read) for name, e in tensors})


def run_checkpoint(graph: Graph, checkpoint: Any, inputs: Mapping[str, Array]) -> Array:
    """Return the first output that the reference computes of a graph on a checkpoint's weights."""
    from moecc.backend import get_backend
    from moecc.weights.evaluate import evaluate

    params = {n: evaluate(v.weight, checkpoint.read) for n, v in graph.params.items() if v.weight}
    outputs = get_backend("reference").compile(graph).run(params, inputs)
    return next(iter(outputs.values()))


def read_config(folder: Path) -> ModelConfig:
    """Return the config of the checkpoint in `folder`."""
    return parse_config(
        read_json_object(folder / "config.json", limit_bytes=1 << 24), str(folder / "config.json")
    )
