"""The base config of decoder-only families: fields, defaults, reading, writing, checks.

A config is a frozen dataclass whose fields mean the same in every family, whatever their names
on disk.  What a family cannot express is rejected when the config is created, with the reason, so
that an exporter may simply try.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from . import windows as window_keys
from .extras import EXTRA_DEFAULTS
from .model import ACTIVATIONS, ModelConfig, activation_problem
from .reader import LARGEST_SIZES, KeyProblem, Reader, key_problem
from .rope import RopeConfig, read_rope

WINDOW_READERS = {
    "none": window_keys.read_no_windows,
    "uniform": window_keys.read_uniform_windows,
    "switched": window_keys.read_switched_windows,
    "top": window_keys.read_top_windows,
    "agreed": window_keys.read_agreed_windows,
}

FEATURES = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm")

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


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """A decoder-only model; `sliding_windows` has one entry a layer."""

    defaults: ClassVar[Mapping[str, object]] = DEFAULTS
    # Features that the family fixes; the others are options.
    fixed: ClassVar[Mapping[str, bool]] = {}
    bias_key: ClassVar[str | None] = None
    window_style: ClassVar[str] = "none"
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

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return DecoderConfig

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from self._size_checks()
        yield from self._family_checks()
        yield from self.rope.checks(self.head_dim)
        yield from activation_problem(self.hidden_act)
        yield from super().checks()

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        layers = reader.size("num_hidden_layers")
        heads = reader.size("num_attention_heads")
        hidden = reader.size("hidden_size")
        length = reader.size("max_position_embeddings")
        return {
            **super()._read(reader),
            "hidden_size": hidden,
            "intermediate_size": reader.size("intermediate_size"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": cls._read_groups(reader, heads),
            "head_dim": _read_head_dim(reader, hidden, heads),
            "max_position_embeddings": length,
            "rope": read_rope(reader, length),
            "rms_norm_eps": reader.number("rms_norm_eps", least=0),
            "hidden_act": ACTIVATIONS[reader.choice("hidden_act", ACTIVATIONS)],
            "tie_word_embeddings": reader.flag("tie_word_embeddings"),
            "sliding_windows": WINDOW_READERS[cls.window_style](reader, layers),
            **cls._read_features(reader),
        }

    @classmethod
    def _read_groups(cls, reader: Reader, heads: int) -> int:
        if not cls.groups_may_be_null:
            return reader.size("num_key_value_heads")
        return reader.optional_size("num_key_value_heads") or heads

    @classmethod
    def _read_features(cls, reader: Reader) -> dict[str, bool]:
        features = dict(cls.fixed)
        if cls.bias_key is not None:
            bias = reader.flag(cls.bias_key)
            features = {"qkv_bias": bias, "output_bias": bias, **features}
        if "mlp_bias" not in features:
            features["mlp_bias"] = reader.flag("mlp_bias")
        return features

    def _write(self) -> dict[str, object]:
        keys: dict[str, object] = {
            **self.rope.to_json(),
            **window_keys.write_windows(self.sliding_windows, self.window_style),
        }
        for name in (*PLAIN_KEYS, "head_dim"):
            keys[name] = getattr(self, name)
        if self.bias_key is not None:
            keys[self.bias_key] = self.qkv_bias
        if "mlp_bias" not in self.fixed:
            keys["mlp_bias"] = self.mlp_bias
        return keys

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
        if self.head_dim % 2:
            what = "the rotary embedding needs heads of even width"
            keys = ("head_dim", "hidden_size", "num_attention_heads")
            yield key_problem(what, "an even number", f"{self.head_dim}", *keys)
        if len(self.sliding_windows) != self.num_hidden_layers:
            what = "not one window (or None) for each layer"
            found = f"{len(self.sliding_windows)}"
            yield key_problem(what, f"{self.num_hidden_layers}", found, "sliding_windows")

    def _family_checks(self) -> Iterator[KeyProblem]:
        for name, value in self.fixed.items():
            if getattr(self, name) != value:
                word = "always has" if value else "has no"
                what = f"{self.model_type} {word} {FEATURE_NAMES[name]}"
                yield key_problem(what, f"{value}".lower(), f"{not value}".lower(), name)
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
        elif self.window_style != "top" and len(set(self.sliding_windows)) > 1:
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
    "hidden_act",
    "tie_word_embeddings",
)
FEATURE_NAMES = {
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
