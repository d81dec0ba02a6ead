"""gemma3n_text and gemma4_text: embeddings of each layer, keys and values of earlier layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from moecc.families.config import (
    CAUSAL,
    GgufFacts,
    ModelConfig,
    Only,
    TensorNames,
    activation,
    config_class,
    flag,
    number,
    size,
)
from moecc.families.decoder import read_windows, write_windows
from moecc.families.gemma import stated_theta
from moecc.families.reader import (
    COUNT,
    LAYERS,
    LENGTH,
    NEURONS,
    VOCABULARY,
    WIDTH,
    KeyProblem,
    Reader,
    as_number,
    key_problem,
)
from moecc.families.shrinking import (
    SMALL_EXPERT,
    SMALL_HEAD_DIM,
    SMALL_HEADS,
    SMALL_MLP,
    SMALL_WINDOW,
    shrink_size,
)
from moecc.support.untyped import JsonDict

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE, SHARE = "rope_parameters", "partial_rotary_factor"
OVERRIDES = "per_layer_config"
HEADS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
"""The keys of heads in layers with a window, and in the layers without one."""
EXPERT_KEYS = ("num_experts", "top_k_experts", "moe_intermediate_size")
PLAIN_ROPE = "the family reads rope_parameters, by kind of layer, and ignores this key"

GEMMA4_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}


@dataclass(frozen=True, slots=True)
class PairedRope:
    """Rotary positions of the first pairs of a head; the other pairs stay as they are.

    Attributes:
      theta: the base period, of frequencies ``theta ** (-2 i / head_dim) / factor``.
      share: the share of the pairs that are rotated.
      factor: what frequencies are divided by.
    """

    theta: float
    share: float = 1.0
    factor: float = 1.0

    def pairs(self, head_dim: int) -> int:
        """Return how many pairs of a head are rotated."""
        return int(self.share * head_dim // 2)

    def to_json(self) -> JsonDict:
        """Return the parameters as transformers reads them."""
        if (self.share, self.factor) == (1, 1):
            return {"rope_type": "default", "rope_theta": self.theta}
        scaling: JsonDict = {} if self.factor == 1 else {"factor": self.factor}
        parameters = {"rope_type": "proportional", "rope_theta": self.theta, SHARE: self.share}
        return {**parameters, **scaling}


@config_class
class LayerInputsConfig(ModelConfig):
    """A gemma whose layers read embeddings of their own, and whose last ones share keys.

    `input_width` is the width of these embeddings, 0 without them.  The last `shared_layers` layers
    attend to the keys and values of the last layer of their kind before them.
    """

    kind = "a decoder with embeddings for each layer"
    mask_hint = "padding after a text changes nothing: no earlier token attends to it"
    only: ClassVar[Only] = CAUSAL
    keys = {
        "hidden_act": "hidden_activation",
        "logit_softcap": "final_logit_softcapping",
        "input_width": "hidden_size_per_layer_input",
        "input_vocab": "vocab_size_per_layer_input",
        "shared_layers": "num_kv_shared_layers",
    }
    strict: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim")
    # Files may hold keys and values of layers that share those of others.
    unread = r"model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.(weight|bias)"
    # Every so many layers one without a window, if nothing else is stated.
    window_period: ClassVar[int]

    hidden_size: int = size(WIDTH)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(COUNT)
    num_key_value_heads: int = size(COUNT)
    head_dim: int = size(COUNT)
    max_position_embeddings: int = size(LENGTH)
    rms_norm_eps: float = number(least=0, default=1e-6)
    hidden_act: str = activation(default="gelu_pytorch_tanh")
    tie_word_embeddings: bool = flag(default=True)
    attention_bias: bool = flag(default=False)
    logit_softcap: float | None = number(above=0, null=lambda values: None, default=None)
    input_width: int = size(WIDTH, least=0, default=0)
    input_vocab: int = size(VOCABULARY, default=1)
    shared_layers: int = size(LAYERS, least=0, default=0)
    sliding_windows: tuple[int | None, ...]
    rope: PairedRope
    local_rope: PairedRope

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    @property
    def first_shared(self) -> int:
        """The first layer that attends to keys and values of an earlier one."""
        return self.num_hidden_layers - self.shared_layers

    def has_window(self, layer: int) -> bool:
        """Whether a layer has a window."""
        return self.sliding_windows[layer] is not None

    def rope_of(self, layer: int) -> PairedRope:
        """Return the rotary positions of a layer."""
        return self.local_rope if self.has_window(layer) else self.rope

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Return the number of a layer's key-value heads, and the width of its heads."""
        return self.num_key_value_heads, self.head_dim

    def block_width(self, layer: int) -> int:
        """Return the neurons of a layer's feed-forward block."""
        raise NotImplementedError

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        if reader.value("sliding_window") is None:
            reader.refuse("sliding_window", "transformers rejects null here", expected="a size")
        layers = values["num_hidden_layers"]
        windows = read_windows(reader, "typed", cls._usual_windows(layers))
        return {**values, "sliding_windows": windows}

    @classmethod
    def _usual_windows(cls, layers: int) -> tuple[bool, ...]:
        return tuple((layer + 1) % cls.window_period != 0 for layer in range(layers))

    def _write(self) -> JsonDict:
        windows = write_windows(self.sliding_windows, "typed", self.defaults["sliding_window"])
        return {**super()._write(), **windows}

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        kv_heads = shrink_size(self.num_key_value_heads, SMALL_HEADS)
        groups = shrink_size(self.num_attention_heads // self.num_key_value_heads, SMALL_HEADS)
        head_dim = shrink_size(self.head_dim, SMALL_HEAD_DIM)
        vocabulary = self.small_vocabulary()
        return {
            **vocabulary,
            "hidden_size": kv_heads * groups * head_dim,
            "num_attention_heads": kv_heads * groups,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "input_width": shrink_size(self.input_width, SMALL_HEAD_DIM) if self.input_width else 0,
            "input_vocab": vocabulary["vocab_size"],
            "sliding_windows": tuple(w and min(w, SMALL_WINDOW) for w in self.sliding_windows),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        layers = self.num_hidden_layers
        if len(self.sliding_windows) != layers:
            fault = "not one window (or None) for each layer"
            yield key_problem(fault, f"{layers}", f"{len(self.sliding_windows)}", "layer_types")
            return
        for layer in (self.sliding_windows.index(w) for w in set(self.sliding_windows)):
            count, width = self.heads_of(layer)
            if count > 0 and self.num_attention_heads % count:
                fault = "the query heads are not a multiple of the key-value heads"
                expected, keys = f"a divisor of {self.num_attention_heads}", tuple(HEADS)
                yield key_problem(fault, expected, f"{count}", keys[1], "num_attention_heads")
            if width % 2:
                fault = "the rotary embedding needs an even number of entries of a head"
                yield key_problem(fault, "an even number", f"{width}", "head_dim", *HEADS.values())
        if len({w for w in self.sliding_windows if w is not None}) > 1:
            fault = f"{self.model_type} has one size of sliding window"
            yield key_problem(fault, "one size", "several", "sliding_window")
        writers = {self.has_window(layer) for layer in range(max(self.first_shared, 0))}
        if writers != {self.has_window(layer) for layer in range(layers)}:
            fault = "layers share keys of an earlier layer of their kind, and there is none"
            expected = "at least one layer of each kind before those that share"
            shown = f"{self.shared_layers} of {layers} layers"
            yield key_problem(fault, expected, shown, "num_kv_shared_layers", "layer_types")


@config_class
class Gemma4TextConfig(LayerInputsConfig):
    """A gemma4_text, dense, or with experts beside the feed-forward block of every layer.

    Layers without a window have heads of their own size, and their values may be their keys.
    `num_experts` is 0 without experts.
    """

    model_type = "gemma4_text"
    architecture = "Gemma4ForCausalLM"
    graphs = "gemma4"
    gguf = GgufFacts("gemma4")
    window_period = 6
    keys = {
        "values_are_keys": "attention_k_eq_v",
        "wide_shared": "use_double_wide_mlp",
        **dict.fromkeys(("num_experts", "experts_per_token", "expert_intermediate_size"), ""),
    }
    only = {"rope_theta": (None, PLAIN_ROPE), "rope_scaling": (None, PLAIN_ROPE)}
    strict = (*LayerInputsConfig.strict, "global_head_dim")
    names = TensorNames(
        sparse="",
        router="router.proj.weight",
        expert_gate_up="experts.gate_up_proj",
        expert_down="experts.down_proj",
    )
    defaults = GEMMA4_DEFAULTS

    intermediate_size: int = size(NEURONS)
    global_head_dim: int = size(COUNT)
    num_global_key_value_heads: int = size(COUNT, null=lambda values: values["num_key_value_heads"])
    values_are_keys: bool = flag(default=False)
    wide_shared: bool = flag(default=False)
    num_experts: int = size(COUNT, least=0, default=0)
    experts_per_token: int = size(COUNT, default=1)
    expert_intermediate_size: int = size(NEURONS, default=1)

    @property
    def expert_blocks(self) -> int:
        """The number of the experts of all layers."""
        return self.num_experts * self.num_hidden_layers

    def heads_of(self, layer: int) -> tuple[int, int]:
        """Return the number of a layer's key-value heads, and the width of its heads."""
        if self.has_window(layer):
            return super().heads_of(layer)
        return self.num_global_key_value_heads, self.global_head_dim

    def block_width(self, layer: int) -> int:
        """Return the neurons of a layer's feed-forward block."""
        is_wide = self.wide_shared and layer >= self.first_shared
        return self.intermediate_size * (2 if is_wide else 1)

    @classmethod
    def _usual_windows(cls, layers: int) -> tuple[bool, ...]:
        return (*super()._usual_windows(layers)[:-1], False)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        if reader.value("use_bidirectional_attention") not in (None, "vision"):
            fault = "a model whose tokens see later ones is not supported"
            key = "use_bidirectional_attention"
            reader.refuse(key, fault, expected='null, or "vision", which concerns images alone')
        if reader.has(OVERRIDES):
            reader = reader.with_data({**reader.data, **cls._read_overrides(reader)})
        values = super()._read(reader)
        if not values["values_are_keys"]:
            # transformers ignores the key then.
            values["num_global_key_value_heads"] = values["num_key_value_heads"]
        if values["sliding_windows"] and values["sliding_windows"][-1] is not None:
            fault = "transformers lets the last layer see all tokens, whatever the list says"
            reader.refuse("layer_types", fault, expected=f"{FULL} for the last layer")
        stated = reader.mapping(ROPE) or {}
        for key in set(stated) - {FULL, SLIDING}:
            reader.refuse(ROPE, f"unknown key {key!r}", expected=f"{FULL} and {SLIDING}")
        has_parameters = reader.value(ROPE) is not None
        values["rope"] = _read_rope(reader, FULL, has_parameters)
        values["local_rope"] = _read_rope(reader, SLIDING, has_parameters)
        if not any(values["sliding_windows"]):
            values["local_rope"] = values["rope"]
        if reader.flag("enable_moe_block"):
            counts = [reader.size(key, NEURONS) for key in EXPERT_KEYS]
            fields = ("num_experts", "experts_per_token", "expert_intermediate_size")
            values |= dict(zip(fields, counts, strict=True))
        for key in EXPERT_KEYS:
            reader.value(key)
        return values

    @classmethod
    def _read_overrides(cls, reader: Reader) -> JsonDict:
        """Return the heads of layers without a window, where settings of single layers say them."""
        layers = reader.size("num_hidden_layers", LAYERS)
        windows = read_windows(reader, "typed", cls._usual_windows(layers))
        usual = {key: reader.value(key) for key in HEADS}
        by_layer: dict[int, Mapping[str, object]] = {}
        for name, settings in (reader.mapping(OVERRIDES) or {}).items():
            if not (name.isdecimal() and isinstance(settings, Mapping)) or set(settings) - {*HEADS}:
                expected = f"for numbers of layers an object with {' and '.join(HEADS)}"
                reader.refuse(OVERRIDES, "settings that are not supported", expected=expected)
                return {}
            by_layer[int(name)] = settings
        kinds: dict[bool, list[JsonDict]] = {True: [usual], False: []}
        for layer, window in enumerate(windows):
            heads = {**usual, **by_layer.get(layer, {})}
            if heads not in (of_kind := kinds[window is not None]):
                of_kind.append(heads)
        if max(map(len, kinds.values())) > 1:
            fault = "other heads than those of all layers with, or of all layers without a window"
            reader.refuse(OVERRIDES, fault, expected="the same in each layer of a kind")
        heads = kinds[False][0] if kinds[False] else usual
        count = "num_key_value_heads"
        if heads[count] != usual[count] and reader.value("attention_k_eq_v") is not True:
            fault = f"{count} of their own need attention_k_eq_v"
            reader.refuse(OVERRIDES, fault, expected=f"{usual[count]} key-value heads")
        stated = {HEADS[key]: value for key, value in heads.items()}
        if any(reader.data.get(key, value) not in (value, None) for key, value in stated.items()):
            keys = (OVERRIDES, *HEADS.values())
            reader.conflict(keys, "the heads are stated twice and differ")
        return stated

    def _write(self) -> JsonDict:
        has_experts = self.num_experts > 0
        counts = (self.num_experts, self.experts_per_token, self.expert_intermediate_size)
        return {
            **super()._write(),
            ROPE: {FULL: self.rope.to_json(), SLIDING: self.local_rope.to_json()},
            "enable_moe_block": has_experts,
            **dict(zip(EXPERT_KEYS, counts if has_experts else (None,) * 3, strict=True)),
        }

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        groups = self.num_attention_heads // self.num_global_key_value_heads
        global_heads = max(sizes["num_attention_heads"] // groups, 1)
        if sizes["num_attention_heads"] % global_heads:
            global_heads = 1
        return {
            **sizes,
            "intermediate_size": shrink_size(self.intermediate_size, SMALL_MLP),
            "global_head_dim": shrink_size(self.global_head_dim, 2 * SMALL_HEAD_DIM),
            "num_global_key_value_heads": global_heads
            if self.values_are_keys
            else sizes["num_key_value_heads"],
            "expert_intermediate_size": shrink_size(self.expert_intermediate_size, SMALL_EXPERT),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.input_width and self.input_vocab < self.vocab_size:
            fault = "tokens without an embedding for each layer, which transformers fails on"
            key = self.key("input_vocab")
            yield key_problem(fault, f"at least {self.vocab_size}", f"{self.input_vocab}", key)
        if self.shared_layers and not self.input_width:
            fault = "transformers shares keys only where layers have embeddings of their own"
            keys = (self.key("shared_layers"), self.key("input_width"))
            yield key_problem(fault, "0", f"{self.shared_layers}", *keys)
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            fault = "a token cannot choose that many experts"
            expected, keys = f"1 to {self.num_experts}", ("top_k_experts", "num_experts")
            yield key_problem(fault, expected, f"{self.experts_per_token}", *keys)


def _read_rope(reader: Reader, kind: str, has_parameters: bool) -> PairedRope:
    """Return the rotary positions of a kind of layer."""
    if not has_parameters:
        return PairedRope(1e6, 0.25) if kind == FULL else PairedRope(1e4)
    parameters = (reader.mapping(ROPE) or {}).get(kind)
    if not isinstance(parameters, Mapping):
        reader.refuse(
            ROPE, f"no parameters for {kind}", expected="an object for each kind of layer"
        )
        return PairedRope(1e4)
    part = Reader(parameters, {SHARE: 1.0, "factor": 1.0}, f"{reader.where}: {ROPE}: {kind}")
    style = part.choice("rope_type", ("default", "proportional"))
    theta = part.number("rope_theta", above=0)
    share, factor = part.number(SHARE, above=0, most=1), part.number("factor", above=0)
    if style == "default" and (share, factor) != (1, 1):
        part.refuse("rope_type", "this one ignores a share and a factor", expected="proportional")
    for key in set(parameters) - part.used:
        part.refuse(key, "unknown key", expected=f"rope_type, rope_theta, {SHARE} and factor")
    reader.problems.extend(part.problems)
    reader.bad.update({ROPE} if part.problems else ())
    return PairedRope(theta, share, factor)


NEURON_KEY, SPARSITY = "intermediate_size", "activation_sparsity_pattern"
THETA, LOCAL_THETA = "rope_theta", "rope_local_base_freq"
SPARSE_LAYERS, USUAL_SPARSITY = 10, 0.95
"""The first layers whose neurons are sparse where nothing is stated, in models with more."""

GEMMA3N_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 262_400,
    "hidden_size": 2048,
    NEURON_KEY: 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
    THETA: 1e6,
    LOCAL_THETA: 1e4,
}


@config_class
class Gemma3nTextConfig(LayerInputsConfig):
    """A gemma3n_text.

    `widths` has the neurons of each layer, and `sparsities` the share of them that is cut off at a
    quantile of their normal distribution, 0 for none.
    """

    model_type = "gemma3n_text"
    architecture = "Gemma3nForCausalLM"
    graphs = "gemma3n"
    gguf = GgufFacts("gemma3n")
    window_period = 5
    keys = {
        "streams": "altup_num_inputs",
        "active_stream": "altup_active_idx",
    }
    only = {
        "rope_scaling": (None, "scaled rotary positions of this family are not supported"),
        "altup_correct_scale": (True, "corrections without a scale are not supported"),
    }
    always = {"altup_correct_scale": True}
    # The first is a bound in training, the second a scale that the family does not apply.
    idle = ("altup_coef_clip", "query_pre_attn_scalar")
    defaults = GEMMA3N_DEFAULTS

    streams: int = size(COUNT)
    active_stream: int = size(COUNT, least=0, default=0)
    laurel_rank: int = size(WIDTH)
    widths: tuple[int, ...]
    sparsities: tuple[float, ...]

    def block_width(self, layer: int) -> int:
        """Return the neurons of a layer's feed-forward block."""
        return self.widths[layer]

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        layers = values["num_hidden_layers"]
        if isinstance(reader.value(NEURON_KEY), list | tuple):
            widths = reader.items(NEURON_KEY)
            if not all(type(width) is int and 0 < width <= NEURONS for width in widths):
                reader.refuse(NEURON_KEY, "not a usable size", expected="a size for each layer")
        else:
            widths = (reader.size(NEURON_KEY),) * layers
        sparsities = reader.items(SPARSITY)
        if reader.value(SPARSITY) is None:
            count = SPARSE_LAYERS if layers > SPARSE_LAYERS else 0
            sparsities = (USUAL_SPARSITY,) * count + (0.0,) * (layers - count)
        shares = [as_number(share) for share in sparsities]
        if not all(share is not None and 0 <= share < 1 for share in shares):
            expected = "a number from 0 on, below 1, for each layer"
            reader.refuse(SPARSITY, "not a share of the neurons", expected=expected)
        for key in set(reader.mapping(ROPE) or {}) - {FULL, SLIDING}:
            reader.refuse(ROPE, f"unknown key {key!r}", expected=f"{FULL} and {SLIDING}")
        return {
            **values,
            "widths": widths,
            "sparsities": tuple(share or 0.0 for share in shares),
            "rope": PairedRope(stated_theta(reader, THETA, FULL)),
            "local_rope": PairedRope(stated_theta(reader, LOCAL_THETA, SLIDING)),
        }

    def _write(self) -> JsonDict:
        return {
            **super()._write(),
            NEURON_KEY: list(self.widths),
            SPARSITY: list(self.sparsities),
            THETA: self.rope.theta,
            LOCAL_THETA: self.local_rope.theta,
            ROPE: {FULL: self.rope.to_json(), SLIDING: self.local_rope.to_json()},
        }

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        widths = tuple(shrink_size(width, SMALL_MLP) for width in self.widths)
        return {**super().small_sizes(), "widths": widths}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        for entries, key in ((self.widths, NEURON_KEY), (self.sparsities, SPARSITY)):
            if len(entries) != self.num_hidden_layers:
                fault = "not one entry for each layer"
                yield key_problem(fault, f"{self.num_hidden_layers}", f"{len(entries)}", key)
        if self.active_stream >= self.streams:
            fault, keys = "no such stream", ("altup_active_idx", "altup_num_inputs")
            yield key_problem(fault, f"below {self.streams}", f"{self.active_stream}", *keys)
        if not self.input_width:
            fault = "the layers of this family read embeddings of their own"
            yield key_problem(fault, "at least 1", "0", self.key("input_width"))
        yield from self.head_checks("hidden_size", "num_attention_heads")
