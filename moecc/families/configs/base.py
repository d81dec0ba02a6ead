"""What every decoder-only family has in common: fields, defaults, reading, writing, checks.

A config is a frozen dataclass whose fields mean the same in every family, whatever the family calls
them on disk.  What a family cannot say is refused when the config is made, with the reason, so that
an exporter may simply try.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from moecc.errors import InputError

from . import windows as window_keys
from .extras import EXTRA_DEFAULTS, read_extra, refuse_what_needs_other_code
from .reader import LARGEST_SIZES, KeyProblem, Reader, key_problem, one_of
from .rope import RopeConfig, read_rope

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "relu": "relu",
}
"""Names that a config may use, and the one name per function that moecc uses."""

DTYPES = ("float32", "float16", "bfloat16", "float64")

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
"""The defaults that most classes of transformers 4.57 and 5.24 share; families override them."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only model; sizes count elements, `sliding_windows` has one entry a layer.

    Raises InputError on construction when the values do not fit together or when the family
    has no way to say them.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    defaults: ClassVar[Mapping[str, object]] = DEFAULTS
    # Features that the family fixes; the others are options.
    fixed: ClassVar[Mapping[str, bool]] = {}
    bias_key: ClassVar[str | None] = None
    window_style: ClassVar[str] = "none"
    # Whether null stands for as many key-value heads as query heads.
    groups_may_be_null: ClassVar[bool] = True

    vocab_size: int
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
    dtype: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        problems = list(self.checks())
        if problems:
            name = type(self).__name__
            raise InputError(
                replace(problem, where=f"{name}: {problem.where}") for problem in problems
            )

    @classmethod
    def from_json(cls, data: Mapping[str, object], where: str = "config.json") -> Self:
        """Read a config.json of this family, in the spelling of transformers 4, 5 or both.

        Raises InputError with every problem; a key that is absent has transformers' default.
        """
        reader = Reader(data, cls.defaults, where)
        refuse_what_needs_other_code(reader, cls.architecture)
        values = cls._read(reader)
        values["extra"] = read_extra(reader)
        config = _construct(cls, values, reader)
        if config is None or reader.problems:
            raise InputError(reader.problems)
        return config

    def to_json(self) -> dict[str, object]:
        """Return config.json with the keys of transformers 4 and 5 side by side, sorted."""
        keys = {**self.extra, **self._write()}
        return {key: copy.deepcopy(keys[key]) for key in sorted(keys)}

    def common(self) -> dict[str, Any]:
        """Return the fields that every family has, to make a config of another family from."""
        return {f.name: getattr(self, f.name) for f in fields(DecoderConfig)}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield what does not fit together, or what this family cannot say."""
        yield from self._size_checks()
        yield from self._family_checks()
        yield from self.rope.checks(self.head_dim)
        if self.hidden_act not in ACTIVATIONS.values():
            expected = one_of(set(ACTIVATIONS.values()))
            yield key_problem("unknown activation", expected, self.hidden_act, "hidden_act")
        if self.dtype is not None and self.dtype not in DTYPES:
            yield key_problem("unknown dtype", one_of(DTYPES), self.dtype, "dtype")

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, Any]:
        layers = reader.size("num_hidden_layers")
        heads = reader.size("num_attention_heads")
        hidden = reader.size("hidden_size")
        length = reader.size("max_position_embeddings")
        return {
            "vocab_size": reader.size("vocab_size"),
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
            "dtype": _read_dtype(reader),
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
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
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
        padding = self.extra.get("pad_token_id")
        if isinstance(padding, int) and not -self.vocab_size <= padding < self.vocab_size:
            what = "the padding token lies outside the vocabulary, which transformers refuses"
            expected = f"below {self.vocab_size}, or null"
            yield key_problem(what, expected, f"{padding}", "pad_token_id", "vocab_size")

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


Config = TypeVar("Config", bound=DecoderConfig)

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


def _construct(cls: type[Config], values: dict[str, Any], reader: Reader) -> Config | None:
    try:
        return cls(**values)
    except InputError as error:
        for problem in error.problems:
            reader.accept(problem)
        return None


def _read_head_dim(reader: Reader, hidden: int, heads: int) -> int:
    if reader.value("head_dim") is not None or reader.defaults["head_dim"] is not None:
        return reader.size("head_dim")
    if hidden % heads and not reader.bad.intersection(("hidden_size", "num_attention_heads")):
        what = f"hidden_size {hidden} is not a multiple of {heads} heads"
        reader.refuse("head_dim", what, expected="head_dim, or sizes that divide")
    return max(hidden // heads, 1)


def _read_dtype(reader: Reader) -> str | None:
    """Read the type of the stored weights, `torch_dtype` in version 4 and `dtype` in 5."""
    stated = [key for key in ("dtype", "torch_dtype") if reader.value(key) is not None]
    found = {key: reader.choice(key, DTYPES) for key in stated}
    if len(set(found.values())) > 1:
        reader.conflict(("dtype", "torch_dtype"), "the dtype is stated twice and differs")
    return next(iter(found.values()), None)
