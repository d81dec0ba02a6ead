"""What a decoder may have beyond the plain one, and how a family that lacks it says so.

The plain decoder has norms before each block, scores divided by the root of the head's width, and
rotary positions in every layer.  Each feature is a field of `DecoderConfig` with a neutral value; a
family fixes it (`fixed`), leaves it open (`options`), or has it at the neutral value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from moecc.families.config import ACTIVATIONS, ModelConfig, activation_problem, config_class
from moecc.families.reader import (
    EXTRA_DEFAULTS,
    LARGEST_SIZES,
    KeyProblem,
    Reader,
    key_problem,
    refuse_attention_to_later_tokens,
)
from moecc.families.rope import SCALING_TYPES, RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature.

    Attributes:
      neutral: the value without the feature.
      words: what it is, in a message: "llama has no …".
    """

    neutral: object
    words: str


FEATURES: Mapping[str, Feature] = {
    "norm_placement": Feature("before", "norms elsewhere than before each block"),
    "norm_offset": Feature(False, "norms whose scale is stored less one"),
    "qk_norm_across": Feature(False, "norms over all heads of the queries together"),
    "layer_norm": Feature(False, "norms with a mean and a bias"),
    "head_bias": Feature(False, "bias of the output matrix"),
    "scale_embedding": Feature(False, "factor √hidden_size on the embedding"),
    "embedding_multiplier": Feature(1.0, "factor on the embedding"),
    "residual_multiplier": Feature(1.0, "factor on what a block adds"),
    "attention_scale": Feature(None, "scale of its own on the attention scores"),
    "attention_softcap": Feature(None, "soft cap on the attention scores"),
    "logits_divisor": Feature(1.0, "divisor of the logits"),
    "logit_softcap": Feature(None, "soft cap on the logits"),
    "rotary_dim": Feature(None, "rotation of only part of each head"),
    "rope_layers": Feature(None, "layers without rotary positions"),
    "local_rope": Feature(None, "rotary positions of their own in layers with a window"),
}
"""The features by the name of their field."""

PLACEMENTS = ("before", "after", "around")
"""Norms before a block, after it (on what it adds), or both."""


def feature_problems(
    config: object, family: str, fixed: Mapping[str, object], options: frozenset[str]
) -> Iterator[KeyProblem]:
    """Yield the features of `config` that differ from what its family has."""
    for name, feature in FEATURES.items():
        value, expected = getattr(config, name), fixed.get(name, feature.neutral)
        if name in options or value == expected:
            continue
        article = "has no" if expected == feature.neutral else "always has its own"
        what = f"{family} {article} {feature.words}"
        yield key_problem(what, _shown(expected), _shown(value), name)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return f"{value}".lower()
    return "none" if value is None else f"{value}"


# Sliding windows: the tokens that each layer sees, in every family's spelling.

Windows = tuple[int | None, ...]
"""One entry a layer: the number of keys that a query sees, itself included, or None for all."""

LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def read_no_windows(reader: Reader, layers: int) -> Windows:
    """Read the windows of a family that has none."""
    _check_layer_types(reader, (None,) * layers)
    return (None,) * layers


def read_uniform_windows(reader: Reader, layers: int) -> Windows:
    """Read `sliding_window`, the same for every layer (mistral, mixtral)."""
    windows = (reader.optional_size("sliding_window"),) * layers
    _check_layer_types(reader, windows)
    return windows


def read_switched_windows(reader: Reader, layers: int) -> Windows:
    """Read `sliding_window`, used in every layer if `use_sliding_window` (qwen3_moe)."""
    windows = (_switched_window(reader),) * layers
    _check_layer_types(reader, windows)
    return windows


def read_top_windows(reader: Reader, layers: int) -> Windows:
    """Read the windows of qwen2 and qwen3: `layer_types`, else from `max_window_layers` upwards."""
    window = _switched_window(reader)
    first = reader.size("max_window_layers", smallest=0)
    types = _layer_types(reader, layers)
    if types is None:
        return tuple(window if layer >= first else None for layer in range(layers))
    if window is None and any(types):
        hint = "state sliding_window and use_sliding_window, or make every layer full_attention"
        reader.refuse("layer_types", "sliding layers without a window", hint=hint)
    return tuple(window if sliding else None for sliding in types)


def read_agreed_windows(reader: Reader, layers: int) -> Windows:
    """Read the windows of qwen2_moe if transformers 4 and 5 agree about them.

    Version 4 gives the window to every layer and knows no `layer_types`; version 5 gives it to
    every second layer unless `layer_types` says otherwise.
    """
    window = _switched_window(reader)
    types = _layer_types(reader, layers)
    reader.value("max_window_layers")
    if window is None:
        if types is not None and any(types):
            reader.refuse("layer_types", "sliding layers without a window")
        return (None,) * layers
    if types is None or not all(types):
        what = "transformers 4 puts the window on every layer, 5 on the layers of layer_types"
        hint = "set use_sliding_window to false, or layer_types to sliding_attention throughout"
        reader.refuse("use_sliding_window", what, hint=hint)
    return (window,) * layers


def read_typed_windows(reader: Reader, layers: int) -> Windows:
    """Read `sliding_window` and `layer_types`, without which every layer has the window."""
    return typed_windows(reader, (True,) * layers)


def typed_windows(reader: Reader, usual: tuple[bool, ...]) -> Windows:
    """Return the windows of `layer_types`, or where it is absent of the layers that `usual` marks.

    Raises nothing: a list of the wrong length, or one without a window, is recorded.
    """
    window = reader.optional_size("sliding_window")
    types = _layer_types(reader, len(usual))
    if window is None and types is not None and any(types):
        reader.refuse("layer_types", "sliding layers without a window")
    return tuple(window if sliding else None for sliding in types or usual)


def write_windows(windows: Windows, style: str) -> dict[str, object]:
    """Return the keys for `windows` in a family's `style`."""
    window = next((window for window in windows if window is not None), None)
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


def _switched_window(reader: Reader) -> int | None:
    if reader.flag("use_sliding_window"):
        return reader.optional_size("sliding_window")
    # Version 5 writes 0 here for qwen2_moe without a window, so the number is ignored.
    reader.value("sliding_window")
    return None


def _layer_types(reader: Reader, layers: int) -> tuple[bool, ...] | None:
    if reader.value("layer_types") is None:
        return None
    found = reader.items("layer_types")
    if "layer_types" in reader.bad:
        return None
    if not all(isinstance(name, str) and name in LAYER_TYPES for name in found):
        expected = "full_attention or sliding_attention for each layer"
        reader.refuse("layer_types", "unknown kind of layer", expected=expected)
        return None
    if len(found) != layers:
        what = f"{len(found)} entries for {layers} layers"
        if "num_hidden_layers" not in reader.bad:
            reader.refuse("layer_types", what, expected=f"{layers} entries")
        return None
    return tuple(LAYER_TYPES[str(name)] for name in found)


def _check_layer_types(reader: Reader, windows: Windows) -> None:
    """Reject `layer_types` that contradict the family's own key.

    transformers ignores the list for these families; other runtimes do not.
    """
    types = _layer_types(reader, len(windows))
    if types is None or types == tuple(window is not None for window in windows):
        return
    what = "this family has the same attention in every layer, but the list states otherwise"
    reader.refuse("layer_types", what, hint="remove the key if the model ran with transformers")


# The base config of decoder-only families: fields, defaults, reading, writing, checks.
#
# A config is a frozen dataclass whose fields mean the same in every family, whatever their names
# on disk.  What a family cannot express is rejected when the config is created, with the reason,
# so
# that an exporter may simply try.

WINDOW_READERS = {
    "none": read_no_windows,
    "uniform": read_uniform_windows,
    "switched": read_switched_windows,
    "top": read_top_windows,
    "agreed": read_agreed_windows,
    "typed": read_typed_windows,
}

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


@config_class
class DecoderConfig(ModelConfig):
    """A decoder-only model.

    `sliding_windows` has one entry a layer, and so has `rope_layers` (None: rotary positions in
    all).  `attention_scale` None is 1 / √head_dim, `rotary_dim` None the whole head, `local_rope`
    None the same positions in layers with a window as in the others.
    """

    kind: ClassVar[str] = "a decoder alone"
    mask_hint: ClassVar[str | None] = (
        "padding after a text changes nothing: no earlier token attends to it"
    )
    defaults: ClassVar[Mapping[str, object]] = DEFAULTS
    # What the family fixes: of biases and norms of queries and keys the others are options.
    fixed: ClassVar[Mapping[str, object]] = {}
    # Which of `FEATURES` the family leaves open.
    options: ClassVar[frozenset[str]] = frozenset()
    bias_key: ClassVar[str | None] = None
    act_key: ClassVar[str] = "hidden_act"
    window_style: ClassVar[str] = "none"
    rope_types: ClassVar[tuple[str, ...]] = SCALING_TYPES
    # Whether null means as many key-value heads as query heads.
    groups_may_be_null: ClassVar[bool] = True

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...]
    norm_placement: str = "before"
    norm_offset: bool = False
    qk_norm_across: bool = False
    layer_norm: bool = False
    head_bias: bool = False
    scale_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_divisor: float = 1.0
    logit_softcap: float | None = None
    rotary_dim: int | None = None
    rope_layers: tuple[bool, ...] | None = None
    local_rope: RopeConfig | None = None

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return DecoderConfig

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from self._size_checks()
        yield from self._family_checks()
        yield from self.rope.checks(self.rotated_dim, self.rope_types)
        yield from activation_problem(self.hidden_act)
        yield from super().checks()

    @property
    def rotated_dim(self) -> int:
        """The entries of each head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        refuse_attention_to_later_tokens(reader)
        layers = reader.size("num_hidden_layers")
        heads = reader.size("num_attention_heads")
        hidden = reader.size("hidden_size")
        head_dim = _read_head_dim(reader, hidden, heads)
        act = reader.choice(cls.act_key, ACTIVATIONS)
        return {
            **super()._read(reader),
            "hidden_size": hidden,
            "intermediate_size": reader.size("intermediate_size"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": cls._read_groups(reader, heads),
            "head_dim": head_dim,
            "max_position_embeddings": reader.size("max_position_embeddings"),
            "rms_norm_eps": reader.number("rms_norm_eps", least=0),
            "hidden_act": ACTIVATIONS[act],
            "tie_word_embeddings": reader.flag("tie_word_embeddings"),
            "sliding_windows": cls._read_windows(reader, layers),
            **cls._read_rope(reader, head_dim),
            **cls._read_features(reader),
        }

    @classmethod
    def _read_windows(cls, reader: Reader, layers: int) -> Windows:
        return WINDOW_READERS[cls.window_style](reader, layers)

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        length = reader.size("max_position_embeddings")
        return {"rope": read_rope(reader, length, types=cls.rope_types)}

    @classmethod
    def _read_groups(cls, reader: Reader, heads: int) -> int:
        if not cls.groups_may_be_null:
            return reader.size("num_key_value_heads")
        return reader.optional_size("num_key_value_heads") or heads

    @classmethod
    def _read_features(cls, reader: Reader) -> dict[str, object]:
        features = dict(cls.fixed)
        if cls.bias_key is not None:
            bias = reader.flag(cls.bias_key)
            features = {"qkv_bias": bias, "output_bias": bias, **features}
        if "mlp_bias" not in features:
            features["mlp_bias"] = reader.flag("mlp_bias")
        return features

    def _write(self) -> dict[str, object]:
        keys: dict[str, object] = {
            **self._write_rope(),
            **write_windows(self.sliding_windows, self.window_style),
        }
        for name in (*PLAIN_KEYS, "head_dim"):
            keys[name] = getattr(self, name)
        keys[self.act_key] = self.hidden_act
        if self.bias_key is not None:
            keys[self.bias_key] = self.qkv_bias
        if "mlp_bias" not in self.fixed:
            keys["mlp_bias"] = self.mlp_bias
        return keys

    def _write_rope(self) -> dict[str, object]:
        return self.rope.to_json()

    def _size_checks(self) -> Iterator[KeyProblem]:
        for name in SIZE_FIELDS:
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[name]:
                expected = f"1 to {LARGEST_SIZES[name]:,}"
                yield key_problem("not a usable size", expected, f"{value}", name)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups > 0 and heads % groups:
            what = "the query heads are not a multiple of the key-value heads"
            expected = f"a divisor of {heads}"
            between = ("num_key_value_heads", "num_attention_heads")
            yield key_problem(what, expected, f"{groups}", *between)
        if self.rotated_dim % 2 or not 0 < self.rotated_dim <= self.head_dim:
            what = "the rotary embedding needs an even number of entries of a head"
            keys = ("head_dim", "hidden_size", "num_attention_heads", "partial_rotary_factor")
            yield key_problem(what, "an even number", f"{self.rotated_dim}", *keys)
        if self.norm_placement not in PLACEMENTS:
            what = "norms are before, after or around a block"
            yield key_problem(what, "one of these", self.norm_placement, "norm_placement")
        if self.rope_layers is not None and len(self.rope_layers) != self.num_hidden_layers:
            what = "not one entry for each layer"
            found = f"{len(self.rope_layers)}"
            yield key_problem(what, f"{self.num_hidden_layers}", found, "no_rope_layers")
        if len(self.sliding_windows) != self.num_hidden_layers:
            what = "not one window (or None) for each layer"
            found = f"{len(self.sliding_windows)}"
            yield key_problem(what, f"{self.num_hidden_layers}", found, "sliding_windows")

    def _family_checks(self) -> Iterator[KeyProblem]:
        for name, words in SWITCHES.items():
            value = self.fixed.get(name, getattr(self, name))
            if getattr(self, name) != value:
                word = "always has" if value else "has no"
                what = f"{self.model_type} {word} {words}"
                yield key_problem(what, f"{value}".lower(), f"{not value}".lower(), name)
        yield from feature_problems(self, self.model_type, self.fixed, self.options)
        paired = "output_bias" not in self.fixed
        if paired and self.qkv_bias != self.output_bias:
            what = f"{self.model_type} has attention biases on all four projections or on none"
            found = f"qkv_bias {self.qkv_bias}, output_bias {self.output_bias}"
            yield key_problem(what, "both or neither", found, "attention_bias")
        yield from self._window_checks()

    def _window_checks(self) -> Iterator[KeyProblem]:
        sizes = {size for size in self.sliding_windows if size is not None}
        if sizes and min(sizes) < 1:
            yield key_problem("empty window", "at least 1", f"{min(sizes)}", "sliding_window")
        found = f"{sorted(size or 0 for size in set(self.sliding_windows))} (0: none)"
        if self.window_style == "none" and sizes:
            what = f"{self.model_type} has no sliding window"
            yield key_problem(what, "None for each layer", found, "sliding_window")
        elif self.window_style not in ("top", "typed") and len(set(self.sliding_windows)) > 1:
            what = f"{self.model_type} has the same sliding window in every layer"
            yield key_problem(what, "one window", found, "sliding_window")
        elif len(sizes) > 1:
            what = f"{self.model_type} has one size of sliding window"
            yield key_problem(what, "one size, or None", found, "sliding_window")


SIZE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
PLAIN_KEYS = (
    *SIZE_FIELDS[:-2],
    SIZE_FIELDS[-1],
    "rms_norm_eps",
    "tie_word_embeddings",
)
SWITCHES = {
    "qkv_bias": "biases on the query, key and value projections",
    "output_bias": "bias on the attention's output projection",
    "mlp_bias": "biases in the feed-forward block",
    "qk_norm": "norms of the queries and keys",
}


def _read_head_dim(reader: Reader, hidden: int, heads: int) -> int:
    if reader.value("head_dim") is not None or reader.defaults["head_dim"] is not None:
        return reader.size("head_dim")
    if hidden % heads and not reader.bad.intersection(("hidden_size", "num_attention_heads")):
        what = f"hidden_size {hidden} is not a multiple of {heads} heads"
        reader.refuse("head_dim", what, expected="head_dim, or sizes that divide")
    return max(hidden // heads, 1)
