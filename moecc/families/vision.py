"""vit and dinov2: encoders of images, cut into patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ModelConfig, activation_problem, config_class
from moecc.families.encdec import read_activation
from moecc.families.reader import LARGEST_SIZES, KeyProblem, Reader, key_problem

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels")

VISION_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "num_channels": 3,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_cache": True,
    "initializer_range": 0.02,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}

MOST_MLP_RATIO = 1_000_000
"""More is no model: the width of a block would overflow a float."""


@config_class
class VisionConfig(ModelConfig):
    """An encoder of images of one size; its output is the hidden states of the last layer.

    `image_size` is height and width in pixels, which the side of a patch divides.
    """

    kind: ClassVar[str] = "an encoder of images"
    has_vocabulary: ClassVar[bool] = False
    with_heads: ClassVar[bool] = True
    kept_numbers: ClassVar[tuple[str, ...]] = (
        "initializer_range",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
    )

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: tuple[int, int]
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    qkv_bias: bool = True

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return cls

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        for name in (*SIZES, "intermediate_size"):
            value = getattr(self, name)
            if not 1 <= value <= LARGEST_SIZES[name]:
                expected = f"1 to {LARGEST_SIZES[name]:,}"
                yield key_problem("not a usable size", expected, f"{value}", name)
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            what = "the heads do not divide the width"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(what, expected, f"{self.hidden_size}", *keys)
        if self.patch_size > 0 and any(n < 1 or n % self.patch_size for n in self.image_size):
            what = "the image is not cut into whole patches"
            expected = f"multiples of {self.patch_size}"
            yield key_problem(what, expected, f"{self.image_size}", "image_size", "patch_size")
        yield from activation_problem(self.hidden_act)
        yield from super().checks()

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        patch = _pair(reader, "patch_size")
        if patch[0] != patch[1]:
            reader.refuse("patch_size", "only square patches are supported", expected="one size")
        sizes = {name: reader.size(name) for name in SIZES if name != "patch_size"}
        return {
            **super()._read(reader),
            **sizes,
            "patch_size": patch[0],
            "image_size": _pair(reader, "image_size"),
            "layer_norm_eps": reader.number("layer_norm_eps", least=0),
            "hidden_act": read_activation(reader, "hidden_act"),
            "qkv_bias": reader.flag("qkv_bias"),
        }

    def _write(self) -> dict[str, object]:
        names = (*SIZES, "layer_norm_eps", "hidden_act", "qkv_bias")
        height, width = self.image_size
        square = height if height == width else [height, width]
        return {**{name: getattr(self, name) for name in names}, "image_size": square}


@config_class
class ViTConfig(VisionConfig):
    """A vit: one norm before each block, and one at the end."""

    model_type: ClassVar[str] = "vit"
    architecture: ClassVar[str] = "ViTModel"
    head_prefix: ClassVar[str] = "vit."
    has_pooler: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **VISION_DEFAULTS,
        "intermediate_size": 3072,
        "patch_size": 16,
        "layer_norm_eps": 1e-12,
    }

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        return {**super()._read(reader), "intermediate_size": reader.size("intermediate_size")}

    def _write(self) -> dict[str, object]:
        return {**super()._write(), "intermediate_size": self.intermediate_size}


@config_class
class Dinov2Config(VisionConfig):
    """A dinov2: what a block adds is scaled by a vector; the block may be gated.

    `mlp_ratio` is the width of the block over that of the model; a gated one has two thirds of it,
    rounded up to a multiple of 8.
    """

    model_type: ClassVar[str] = "dinov2"
    architecture: ClassVar[str] = "Dinov2Model"
    head_prefix: ClassVar[str] = "dinov2."
    defaults: ClassVar[Mapping[str, object]] = {
        **VISION_DEFAULTS,
        "mlp_ratio": 4,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }

    intermediate_size: int = 0
    mlp_ratio: float = 4
    gated: bool = False
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        # transformers states no width, and so it follows from the ratio.
        width = int(self.hidden_size * self.mlp_ratio)
        gated = (int(width * 2 / 3) + 7) // 8 * 8
        object.__setattr__(self, "intermediate_size", gated if self.gated else width)
        super().__post_init__()

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.image_size[0] != self.image_size[1]:
            what = "dinov2 resamples its positions for an image that is not square"
            yield key_problem(what, "a square", f"{self.image_size}", "image_size")

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        # The token of masked patches is no part of the graph.
        reader.value("use_mask_token")
        ratio = reader.number("mlp_ratio", above=0)
        if ratio > MOST_MLP_RATIO:
            reader.refuse("mlp_ratio", "not usable", expected=f"at most {MOST_MLP_RATIO:,}")
            ratio = 4.0
        return {
            **super()._read(reader),
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "gated": reader.flag("use_swiglu_ffn"),
        }

    def _write(self) -> dict[str, object]:
        return {
            **super()._write(),
            "mlp_ratio": self.mlp_ratio,
            "use_swiglu_ffn": self.gated,
            "use_mask_token": False,
        }


def _pair(reader: Reader, key: str) -> tuple[int, int]:
    """Return a size or two as height and width."""
    value = reader.value(key)
    if not isinstance(value, list | tuple):
        size = reader.size(key)
        return size, size
    sizes = [v for v in value if type(v) is int and 1 <= v <= LARGEST_SIZES[key]]
    if len(sizes) != 2 or len(value) != 2:
        reader.refuse(key, "not a usable size", expected="a whole number, or height and width")
        sizes = [1, 1]
    return sizes[0], sizes[1]
