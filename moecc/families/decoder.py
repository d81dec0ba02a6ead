"""The base config of decoder-only families: fields, features, windows, checks.

A config is a frozen dataclass whose fields mean the same in every family, whatever their names
on disk.  What a family cannot express is rejected when the config is created, with the reason, so
that an exporter may simply try.

The plain decoder has RMS norms before each block, no biases, scores divided by the root of the
head's width, and rotary positions in every layer.  Each deviation is a field with a neutral value
and words for it: a family fixes it (`fixed`), leaves it open (`options`), or lacks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from moecc.families.config import (
    CAUSAL,
    KeyRule,
    ModelConfig,
    Only,
    activation,
    config_class,
    feature,
    flag,
    number,
    size,
)
from moecc.families.reader import (
    COUNT,
    EXTRA_DEFAULTS,
    LAYERS,
    LENGTH,
    NEURONS,
    WIDTH,
    KeyProblem,
    Reader,
    key_problem,
    one_of,
)
from moecc.families.rope import (
    SCALING_TYPES,
    RopeConfig,
    partial_rotary_factor,
    read_partial_rotary,
    read_rope,
)
from moecc.families.shrinking import (
    SMALL_HEAD_DIM,
    SMALL_HEADS,
    SMALL_MLP,
    SMALL_WINDOW,
    shrink_rotated,
    shrink_size,
)
from moecc.support.untyped import JsonDict

# Sliding windows: the tokens that each layer sees, in every family's spelling.

Windows = tuple[int | None, ...]
"""One entry a layer: the number of keys that a query sees, itself included, or None for all."""

LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def read_windows(reader: Reader, style: str, usual: tuple[bool, ...]) -> Windows:
    """Read the windows of all layers; what is wrong is recorded.

    Args:
      reader: of config.json.
      style: ``none``; ``uniform`` (`sliding_window` in every layer: mistral); ``switched`` (the
        same if `use_sliding_window`: qwen3_moe); ``agreed`` (the same, where both versions of
        transformers agree: qwen2_moe); ``top`` (`layer_types`, else from `max_window_layers`
        upwards: qwen2); ``typed`` (`layer_types`, else the layers that `usual` marks).
      usual: for each layer whether it has the window if nothing is stated.
    """
    window, layers = None, len(usual)
    if style in ("uniform", "typed") or (style != "none" and reader.flag("use_sliding_window")):
        window = reader.optional_size("sliding_window", LENGTH)
    elif style != "none":
        # Version 5 writes 0 here for qwen2_moe without a window, so the number is ignored.
        reader.value("sliding_window")
    types = reader.layer_kinds("layer_types", LAYER_TYPES, layers)
    if style in ("none", "uniform", "switched"):
        # transformers ignores the list for these families; other runtimes do not.
        if types is not None and types != (window is not None,) * layers:
            fault = "this family has the same attention in every layer, but the list says otherwise"
            hint = "remove the key if the model ran with transformers"
            reader.refuse("layer_types", fault, hint=hint)
        return (window,) * layers
    if window is None and types is not None and any(types):
        hint = "state a sliding_window, or make every layer full_attention"
        reader.refuse("layer_types", "sliding layers without a window", hint=hint)
    if style == "agreed":
        reader.value("max_window_layers")
        if window is not None and (types is None or not all(types)):
            fault = "transformers 4 puts the window on every layer, 5 on the layers of layer_types"
            hint = "set use_sliding_window to false, or layer_types to sliding_attention throughout"
            reader.refuse("use_sliding_window", fault, hint=hint)
        return (window,) * layers
    if style == "top":
        first = reader.size("max_window_layers", LENGTH, smallest=0)
        usual = tuple(layer >= first for layer in range(layers))
    return tuple(window if sliding else None for sliding in types or usual)


def read_rope_layers(reader: Reader, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it has rotary positions, as ``no_rope_layers`` says it."""
    interval = reader.size("no_rope_layer_interval", LAYERS)
    usual = tuple((layer + 1) % interval != 0 for layer in range(layers))
    if reader.value("no_rope_layers") is None:
        return usual
    flags = reader.items("no_rope_layers")
    if len(flags) < layers or not all(flag in (0, 1) for flag in flags):
        expected = f"{layers} of them"
        reader.refuse("no_rope_layers", "not 0 or 1 for each layer", expected=expected)
        return usual
    return tuple(bool(flag) for flag in flags[:layers])


def write_windows(windows: Windows, style: str, usual: object = None) -> dict[str, object]:
    """Return the keys for `windows` in a family's `style`.

    Where layers are typed, `usual` is stated if none has a window: transformers makes the mask.
    """
    default = usual if style == "typed" else None
    window = next((window for window in windows if window is not None), default)
    if style == "none":
        return {}
    if style == "uniform":
        return {"sliding_window": window}
    names = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if style == "typed":
        return {"sliding_window": window, "layer_types": names}
    keys: dict[str, object] = {"use_sliding_window": window is not None, "sliding_window": window}
    if style == "switched":
        return keys
    full = [layer for layer, window in enumerate(windows) if window is None]
    keys["max_window_layers"] = full[-1] + 1 if full else 0
    return {**keys, "layer_types": names}


DEFAULTS: Mapping[str, object] = {
    **EXTRA_DEFAULTS,
    "vocab_size": 151_936,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "attention_bias": False,
    "mlp_bias": False,
}
"""The defaults of most classes of transformers 4.57 and 5.24; families override them."""

NORMS = {
    "before": ("input_layernorm", "", "post_attention_layernorm", ""),
    "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""By placement the norms before and after the attention, and before and after the feed-forward.

They stand before a block, after it (on what it adds), or around it.
"""

XIELU = "xielu"
"""The activation with parameters of its own in each block."""

NORM_KINDS = ("rms", "layer", "layer without bias", "layer without parameters")
"""RMS norms, and layer norms with a scale and a bias, with a scale alone, or with neither."""


@dataclass(frozen=True, slots=True)
class DeltaLayers:
    """Layers with a gated delta rule in place of attention (Yang et al. 2412.06464).

    Attributes:
      layers: for each layer whether it has one.
      key_heads: the heads of queries and keys.
      value_heads: the heads of values, a multiple of these.
      key_dim: the width of a head of queries and keys.
      value_dim: that of a head of values.
      taps: those of the short convolution of queries, keys and values.
    """

    layers: tuple[bool, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int


LATENT_EPS = 1e-6
"""Of the norms of latent vectors: the default of their class, whatever the config states."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The vectors that attention makes its heads of (MLA, DeepSeek-V2, arXiv 2405.04434, 2.1).

    Attributes:
      query_rank: the width of the vector that queries are products of; None: the layer's input.
      key_rank: the width of the vector that keys and values are products of.
      value_dim: the width of a head of values.
      interleaved: whether neighbours are rotated together, not an entry and that half a head on.
    """

    query_rank: int | None
    key_rank: int
    value_dim: int
    interleaved: bool = True

    def __str__(self) -> str:
        return f"{self.key_rank} entries for keys and values"

    def shrunk(self) -> LatentAttention:
        """Return small sizes."""
        rank = self.query_rank and shrink_size(self.query_rank, SMALL_MLP // 8)
        width = shrink_size(self.value_dim, SMALL_HEAD_DIM)
        return replace(
            self, query_rank=rank, key_rank=shrink_size(self.key_rank, SMALL_MLP // 8),
            value_dim=width,
        )  # fmt: skip


FLAG = KeyRule("flag")
FACTOR = KeyRule("number", above=0)
CAP = KeyRule("number", above=0, null=lambda values: None)
PARTIAL = "partial_rotary_factor"
HEAD_KEYS = ("head_dim", "hidden_size", "num_attention_heads")


@config_class
class DecoderConfig(ModelConfig):
    """A decoder-only model.

    `sliding_windows` has one entry a layer, and so has `rope_layers` (None: rotary positions in
    all).  `conv_taps` has the taps of the short convolution that a layer has in place of attention,
    0 for a layer with attention (None: all).  `attention_chunks` has the length of the chunks
    within which the tokens of a layer attend, None for the whole sequence.  With `growing_queries`
    (f, s) queries of layers without rotary positions are multiplied by
    1 + s · log(1 + ⌊(position + 1) / f⌋).  `qk_norm_plain` norms are in layers with rotary
    positions alone.  `attention_scale` None is 1 / √head_dim, `rotary_dim` None the whole head,
    `local_rope` None the same positions in layers with a window as in the others.
    """

    graphs = "decoder"
    kind = "a decoder alone"
    mask_hint = "padding after a text changes nothing: no earlier token attends to it"
    defaults = DEFAULTS
    only: ClassVar[Only] = CAUSAL
    keys = {
        "qkv_bias": "attention_bias",
        "output_bias": "attention_bias",
        "head_bias": "lm_head_bias",
        "attention_softcap": "attn_logit_softcapping",
        "logits_divisor": "logits_scaling",
        "logit_softcap": "final_logit_softcapping",
        "qkv_clip": "clip_qkv",
    }
    window_style: ClassVar[str] = "none"
    rope_types: ClassVar[tuple[str, ...]] = SCALING_TYPES
    # Whether the length that longrope starts from is a key outside the rope parameters.
    length_outside: ClassVar[bool] = False
    # Why transformers or engines take no other head_dim than hidden_size / heads; empty if they do.
    plain_heads: ClassVar[str] = ""
    # Whether query heads may share keys and values.
    shares_keys: ClassVar[bool] = True

    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(NEURONS)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(COUNT)
    num_key_value_heads: int = size(COUNT, null=lambda values: values["num_attention_heads"])
    head_dim: int = size(
        COUNT, null=lambda values: max(values["hidden_size"] // values["num_attention_heads"], 1)
    )
    max_position_embeddings: int = size(LENGTH)
    rope: RopeConfig
    rms_norm_eps: float = number(least=0, default=1e-6)
    hidden_act: str = activation(default="silu")
    tie_word_embeddings: bool = flag(default=False)
    qkv_bias: bool = feature("biases on the query, key and value projections", FLAG, default=False)
    output_bias: bool = feature("bias on the attention's output projection", FLAG, default=False)
    mlp_bias: bool = feature("biases in the feed-forward block", FLAG, default=False)
    qk_norm: bool = feature("norms of the queries and keys", FLAG, default=False)
    sliding_windows: tuple[int | None, ...]
    norm_placement: str = feature("norms elsewhere than before each block", default="before")
    norm_offset: bool = feature("norms whose scale is stored less one", default=False)
    qk_norm_across: bool = feature("norms over all heads of the queries together", default=False)
    qk_norm_each: bool = feature("norms with a scale for each head of the queries", default=False)
    qk_norm_last: bool = feature("norms of the rotated queries and keys", default=False)
    qk_norm_plain: bool = feature("norms of queries and keys without a scale", default=False)
    qkv_clip: float | None = feature("bounds of queries, keys and values", CAP, default=None)
    norm_kind: str = feature("norms other than RMS norms", default="rms")
    parallel: bool = feature("attention and feed-forward block side by side", FLAG, default=False)
    norms_apart: bool = feature("a norm for each of two blocks side by side", default=False)
    gated_mlp: bool = feature("a feed-forward block without a gate", default=True)
    head_bias: bool = feature("bias of the output matrix", FLAG, default=False)
    scale_embedding: bool = feature("factor √hidden_size on the embedding", default=False)
    embedding_multiplier: float = feature("factor on the embedding", FACTOR, default=1.0)
    residual_multiplier: float = feature("factor on what a block adds", FACTOR, default=1.0)
    attention_scale: float | None = feature("own scale of the attention scores", default=None)
    attention_softcap: float | None = feature("soft cap on the attention scores", CAP, default=None)
    logits_divisor: float = feature("divisor of the logits", FACTOR, default=1.0)
    logit_softcap: float | None = feature("soft cap on the logits", CAP, default=None)
    rotary_dim: int | None = feature("rotation of only part of each head", default=None)
    rope_layers: tuple[bool, ...] | None = feature("layers without rotary positions", default=None)
    conv_taps: tuple[int, ...] | None = feature("short convolutions", default=None)
    conv_bias: bool = feature("biases of short convolutions", FLAG, default=False)
    attention_chunks: tuple[int | None, ...] | None = feature(
        "attention within chunks of the sequence", default=None
    )
    growing_queries: tuple[float, float] | None = feature(
        "queries that grow with the position", default=None
    )
    attention_gate: bool = feature("gates of the attention's output", default=False)
    delta: DeltaLayers | None = feature("layers with a gated delta rule", default=None)
    latent: LatentAttention | None = feature("latent attention (MLA)", default=None)
    local_rope: RopeConfig | None = feature(
        "rotary positions of their own in layers with a window", default=None
    )

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return DecoderConfig

    @property
    def rotated_dim(self) -> int:
        """The entries of each head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms of a layer: before and after the attention, and the feed-forward block."""
        return self.names.layer_norms or NORMS[self.norm_placement]

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary positions of a layer, or None if it has none."""
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        has_window = self.sliding_windows[layer] is not None
        return self.local_rope if has_window and self.local_rope is not None else self.rope

    @property
    def has_sinks(self) -> bool:
        """Whether each head's softmax has one more score, its sink."""
        return False

    def taps_of(self, layer: int) -> int:
        """Return the taps of the short convolution of a layer, 0 if it has none."""
        if self.has_delta_rule(layer):
            assert self.delta is not None, "the layer has one"
            return self.delta.taps
        return self.conv_taps[layer] if self.conv_taps is not None else 0

    def has_delta_rule(self, layer: int) -> bool:
        """Whether a layer has a gated delta rule in place of attention."""
        return self.delta is not None and self.delta.layers[layer]

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        if (
            reader.value("head_dim") is None
            and hidden % heads
            and not reader.bad.intersection(("hidden_size", "num_attention_heads", "head_dim"))
        ):
            fault = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            reader.refuse("head_dim", fault, expected="head_dim, or sizes that divide")
        usual = cls._usual_windows(reader, values["num_hidden_layers"])
        values["sliding_windows"] = read_windows(reader, cls.window_style, usual)
        return {**values, **cls._read_rope(reader, values)}

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        """Return for each layer whether it has the window where `layer_types` is absent."""
        return (True,) * layers

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        """Return the fields of the rotary positions, given those that rules have read."""
        partial, length = "rotary_dim" in cls.options, values["max_position_embeddings"]
        rope = read_rope(
            reader, length, types=cls.rope_types, partial=partial, outside=cls.length_outside
        )
        if not partial:
            return {"rope": rope}
        default = cls.defaults[PARTIAL]
        assert isinstance(default, float), "a share"
        rotated = read_partial_rotary(reader, values["head_dim"], PARTIAL, default)
        return {"rope": rope, "rotary_dim": rotated}

    def _write(self) -> JsonDict:
        usual = self.defaults.get("sliding_window")
        windows = write_windows(self.sliding_windows, self.window_style, usual)
        return {**super()._write(), **self._write_rope(), **windows}

    def _write_rope(self) -> JsonDict:
        keys: JsonDict = self.rope.to_json()
        if "rotary_dim" in self.options:
            share = partial_rotary_factor(self.rotated_dim, self.head_dim)
            keys["rope_parameters"] = {**keys["rope_parameters"], PARTIAL: share}
            keys[PARTIAL] = share
        return keys

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        groups = self.num_attention_heads // self.num_key_value_heads
        kv_heads = shrink_size(self.num_key_value_heads, SMALL_HEADS)
        heads = kv_heads * shrink_size(groups, SMALL_HEADS)
        head_dim = rotated = shrink_size(self.head_dim, SMALL_HEAD_DIM)
        width = self.num_attention_heads * self.head_dim
        if self.rotary_dim is not None:
            rotated = shrink_rotated(self.rotary_dim, self.head_dim, head_dim)
        rope = self.rope
        if rope.type == "longrope":  # as many divisors as pairs of rotated entries
            short, long = rope.short_factor[: rotated // 2], rope.long_factor[: rotated // 2]
            rope = replace(rope, short_factor=short, long_factor=long)
        return {
            **self.small_vocabulary(),
            # Whether the heads together have the model's width depends on the family.
            "hidden_size": heads * head_dim * (1 if width == self.hidden_size else 2),
            "intermediate_size": shrink_size(self.intermediate_size, SMALL_MLP),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "sliding_windows": tuple(w and min(w, SMALL_WINDOW) for w in self.sliding_windows),
            "rope": rope,
            "rotary_dim": None if rotated == head_dim else rotated,
            "latent": self.latent and self.latent.shrunk(),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups > 0 and heads % groups:
            fault = "the query heads are not a multiple of the key-value heads"
            between = ("num_key_value_heads", "num_attention_heads")
            yield key_problem(fault, f"a divisor of {heads}", f"{groups}", *between)
        if groups != heads and not self.shares_keys:
            fault = f"{self.model_type} has keys and values for each head"
            between = ("num_key_value_heads", self.key("num_attention_heads"))
            yield key_problem(fault, f"{heads}", f"{groups}", *between)
        if self.rotated_dim % 2 or not 0 < self.rotated_dim <= self.head_dim:
            fault = "the rotary embedding needs an even number of entries of a head"
            stating = (*HEAD_KEYS, PARTIAL, "rope_parameters")
            yield key_problem(fault, "an even number", f"{self.rotated_dim}", *stating)
        if self.plain_heads and self.head_dim * heads != self.hidden_size:
            expected = f"heads x head_dim = {self.hidden_size}"
            yield key_problem(self.plain_heads, expected, f"{self.head_dim * heads}", *HEAD_KEYS)
        if self.norm_kind not in NORM_KINDS:
            yield key_problem(
                "unknown kind of norm", one_of(NORM_KINDS), self.norm_kind, "norm_kind"
            )
        if self.norm_placement not in NORMS:
            fault = "norms are before, after or around a block"
            yield key_problem(fault, "one of these", self.norm_placement, "norm_placement")
        kinds = None if self.delta is None else self.delta.layers
        for entries, key, fault in (
            (self.rope_layers, "no_rope_layers", "not one entry for each layer"),
            (self.sliding_windows, "sliding_windows", "not one window (or None) for each layer"),
            (self.conv_taps, "layer_types", "not one number of taps for each layer"),
            (self.attention_chunks, "layer_types", "not one chunk (or None) for each layer"),
            (kinds, "layer_types", "not one kind for each layer"),
        ):
            if entries is not None and len(entries) != self.num_hidden_layers:
                yield key_problem(fault, f"{self.num_hidden_layers}", f"{len(entries)}", key)
        yield from self._feature_checks()
        yield from self._window_checks()
        yield from self.rope.checks(self.rotated_dim, self.rope_types)

    def _feature_checks(self) -> Iterator[KeyProblem]:
        for name, (neutral, words) in FEATURES.items():
            value, expected = getattr(self, name), self.fixed.get(name, neutral)
            if name not in self.options and value != expected:
                has = "has no" if expected == neutral else "always has"
                fault = f"{self.model_type} {has} {words}"
                yield key_problem(fault, f"{expected}".lower(), f"{value}".lower(), name)
        biases = sorted(BIASES & self.options)
        for key in dict.fromkeys(map(self.key, biases)):
            values = {name: getattr(self, name) for name in biases if self.key(name) == key}
            if len(set(values.values())) > 1:
                four = values.keys() <= ATTENTION_BIASES
                which = "attention biases on all four" if four else "biases on all"
                fault = f"{self.model_type} has {which} projections or on none"
                shown = ", ".join(f"{name} {value}" for name, value in values.items())
                yield key_problem(fault, "all of them, or none", shown, key)

    def _window_checks(self) -> Iterator[KeyProblem]:
        sizes = {size for size in self.sliding_windows if size is not None}
        if sizes and min(sizes) < 1:
            yield key_problem("empty window", "at least 1", f"{min(sizes)}", "sliding_window")
        shown = f"{sorted(size or 0 for size in set(self.sliding_windows))} (0: none)"
        if self.window_style == "none" and sizes:
            fault = f"{self.model_type} has no sliding window"
            yield key_problem(fault, "None for each layer", shown, "sliding_window")
        elif self.window_style not in ("top", "typed") and len(set(self.sliding_windows)) > 1:
            fault = f"{self.model_type} has the same sliding window in every layer"
            yield key_problem(fault, "one window", shown, "sliding_window")
        elif len(sizes) > 1:
            fault = f"{self.model_type} has one size of sliding window"
            yield key_problem(fault, "one size, or None", shown, "sliding_window")


FEATURES: Mapping[str, tuple[object, str]] = {
    f.name: (f.default, f.metadata["feature"])
    for f in fields(DecoderConfig)
    if f.metadata.get("feature")
}
"""The features of a decoder by the name of their field: their neutral value, and words for them."""

ATTENTION_BIASES = frozenset({"qkv_bias", "output_bias"})
BIASES = ATTENTION_BIASES | {"mlp_bias"}
