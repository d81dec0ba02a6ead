"""vit and dinov2: encoders of images, cut into patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.config import (
    BlockNames,
    ModelConfig,
    activation,
    config_class,
    flag,
    number,
    size,
)
from moecc.families.heads import CLASSIFIER, POOLER
from moecc.families.reader import COUNT, LAYERS, NEURONS, WIDTH, KeyProblem, Reader, key_problem
from moecc.support.untyped import JsonDict

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

MOST_PATCH = 1 << 12


@config_class
class VisionConfig(ModelConfig):
    """An encoder of images of one size; its output is the hidden states of the last layer.

    `image_size` is height and width in pixels, which the side of a patch divides.
    """

    kind = "an encoder of images"
    keys = {"vocab_size": ""}
    with_heads = True
    kept_numbers = ("initializer_range", "attention_probs_dropout_prob", "hidden_dropout_prob")

    hidden_size: int = size(WIDTH)
    intermediate_size: int = size(NEURONS)
    num_hidden_layers: int = size(LAYERS)
    num_attention_heads: int = size(COUNT)
    image_size: tuple[int, int]
    patch_size: int
    num_channels: int = size(1 << 12, default=3)
    layer_norm_eps: float = number(least=0, default=1e-12)
    hidden_act: str = activation(default="gelu")
    qkv_bias: bool = flag(default=True)

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
        yield from super().checks()
        yield from self.head_checks("hidden_size", "num_attention_heads")
        if not 1 <= self.patch_size <= MOST_PATCH:
            shown = f"{self.patch_size}"
            yield key_problem("not a usable size", f"1 to {MOST_PATCH:,}", shown, "patch_size")
        if self.patch_size > 0 and any(n < 1 or n % self.patch_size for n in self.image_size):
            fault = "the image is not cut into whole patches"
            expected = f"multiples of {self.patch_size}"
            yield key_problem(fault, expected, f"{self.image_size}", "image_size", "patch_size")

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        patch = _pair(reader, "patch_size", MOST_PATCH)
        if patch[0] != patch[1]:
            reader.refuse("patch_size", "only square patches are supported", expected="one size")
        image = _pair(reader, "image_size", COUNT)
        return {**super()._read(reader), "patch_size": patch[0], "image_size": image}

    def _write(self) -> JsonDict:
        height, width = self.image_size
        square = height if height == width else [height, width]
        return {**super()._write(), "patch_size": self.patch_size, "image_size": square}


@config_class
class ViTConfig(VisionConfig):
    """A vit: one norm before each block, and one at the end."""

    model_type = "vit"
    architecture = "ViTModel"
    head_prefix = "vit."
    head_steps = {"": POOLER, "ImageClassification": ("first", CLASSIFIER)}
    has_pooler = True
    names = BlockNames(
        embedding="embeddings.cls_token",
        layer="encoder.layer.{layer}.",
        norms=("layernorm_before", "layernorm_after"),
        output="attention.output.dense",
        fc_in="intermediate.dense",
        fc_out="output.dense",
    )
    defaults = {
        **VISION_DEFAULTS,
        "intermediate_size": 3072,
        "patch_size": 16,
        "layer_norm_eps": 1e-12,
    }


@config_class
class Dinov2Config(VisionConfig):
    """A dinov2: what a block adds is scaled by a vector; the block may be gated.

    `mlp_ratio` is the width of the block over that of the model; a gated one has two thirds of it,
    rounded up to a multiple of 8.
    """

    model_type = "dinov2"
    architecture = "Dinov2Model"
    head_prefix = "dinov2."
    head_steps = {"ImageClassification": ("first-and-mean", CLASSIFIER)}
    keys = {"intermediate_size": "", "gated": "use_swiglu_ffn"}
    # The token of masked patches is no part of the graph.
    idle = ("use_mask_token",)
    always = {"use_mask_token": False}
    names = BlockNames(
        embedding="embeddings.cls_token",
        layer="encoder.layer.{layer}.",
        norms=("norm1", "norm2"),
        output="attention.output.dense",
        fc_in="mlp.fc1",
        fc_out="mlp.fc2",
        gate_up="mlp.weights_in",
        gated_out="mlp.weights_out",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    )
    defaults = {
        **VISION_DEFAULTS,
        "mlp_ratio": 4,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }

    intermediate_size: int = size(NEURONS, default=0)
    mlp_ratio: float = 4
    gated: bool = flag(default=False)
    layer_norm_eps: float = number(least=0, default=1e-6)

    def __post_init__(self) -> None:
        # transformers states no width, and so it follows from the ratio.
        width = int(self.hidden_size * self.mlp_ratio)
        gated = (int(width * 2 / 3) + 7) // 8 * 8
        object.__setattr__(self, "intermediate_size", gated if self.gated else width)
        super().__post_init__()

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if not 1 <= self.intermediate_size <= NEURONS:
            shown = f"{self.intermediate_size}"
            yield key_problem("not a usable size", f"1 to {NEURONS:,}", shown, "mlp_ratio")
        if self.image_size[0] != self.image_size[1]:
            fault = "dinov2 resamples its positions for an image that is not square"
            yield key_problem(fault, "a square", f"{self.image_size}", "image_size")

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        ratio = reader.number("mlp_ratio", above=0)
        if ratio > MOST_MLP_RATIO:
            reader.refuse("mlp_ratio", "not usable", expected=f"at most {MOST_MLP_RATIO:,}")
            ratio = 4.0
        return {**super()._read(reader), "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}

    def _write(self) -> JsonDict:
        return {**super()._write(), "mlp_ratio": self.mlp_ratio}


def _pair(reader: Reader, key: str, most: int) -> tuple[int, int]:
    """Return a size or two as height and width."""
    value = reader.value(key)
    if not isinstance(value, list | tuple):
        size = reader.size(key, most)
        return size, size
    sizes = [v for v in value if type(v) is int and 1 <= v <= most]
    if len(sizes) != 2 or len(value) != 2:
        reader.refuse(key, "not a usable size", expected="a whole number, or height and width")
        sizes = [1, 1]
    return sizes[0], sizes[1]
