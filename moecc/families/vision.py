"""vit, dinov2, dinov3_vit, and the towers of clip and siglip: encoders of images in patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from moecc.families.config import (
    FILLED,
    BlockNames,
    EqualHeadsConfig,
    activation,
    config_class,
    flag,
    number,
    size,
)
from moecc.families.heads import CLASSIFIER, POOLER
from moecc.families.reader import COUNT, NEURONS, KeyProblem, Reader, key_problem
from moecc.families.shrinking import (
    SMALL_PATCH,
    SMALL_PATCHES,
    shrink_size,
)
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
class VisionConfig(EqualHeadsConfig):
    """An encoder of images of one size; its output is the hidden states of the last layer.

    `image_size` is height and width in pixels, which the side of a patch divides.
    """

    graphs = "vision"
    kind = "an encoder of images"
    idle: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[BlockNames]
    keys = {"vocab_size": ""}
    with_heads = True
    kept_numbers: ClassVar[tuple[str, ...]] = (
        *("initializer_range", "attention_probs_dropout_prob", "hidden_dropout_prob"),
    )
    # The convolution that makes patches, and whether it has a bias.
    patches_name: ClassVar[str] = "embeddings.patch_embeddings.projection"
    patch_bias: ClassVar[bool] = True
    # Whether the token and the table of positions have no first axis of one.
    is_flat: ClassVar[bool] = False

    image_size: tuple[int, int]
    patch_size: int
    num_channels: int = size(1 << 12, default=3)
    layer_norm_eps: float = number(least=0, default=1e-12)
    hidden_act: str = activation(default="gelu")
    qkv_bias: bool = flag(default=True)

    @property
    def first_tensor(self) -> str:
        """A tensor that every checkpoint of the family has."""
        return f"{self.patches_name}.weight"

    @property
    def is_gated(self) -> bool:
        """Whether blocks are gated."""
        return False

    @property
    def unbiased(self) -> str:
        """The letters of the projections without a bias, of ``qkvo``."""
        return "" if self.qkv_bias else "qkv"

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        side = shrink_size(self.patch_size, SMALL_PATCH)
        patches = (shrink_size(n // self.patch_size, SMALL_PATCHES) for n in self.image_size)
        return {
            **super().small_sizes(),
            "patch_size": side,
            "image_size": tuple(side * n for n in patches),
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
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


def read_ratio(reader: Reader) -> float:
    """Return the width of a block over that of the model, an integer where it is one."""
    ratio = reader.number("mlp_ratio", above=0)
    if ratio > MOST_MLP_RATIO:
        reader.refuse("mlp_ratio", "not usable", expected=f"at most {MOST_MLP_RATIO:,}")
        ratio = 4.0
    return int(ratio) if ratio == int(ratio) else ratio


@config_class
class ViTConfig(VisionConfig):
    """A vit: one norm before each block, and one at the end."""

    model_type = "vit"
    architecture = "ViTModel"
    head_prefix = "vit."
    only = FILLED
    head_steps = {"": POOLER, "ImageClassification": ("first", CLASSIFIER)}
    names = BlockNames(
        embedding="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        around=("", "layernorm"),
        layer="encoder.layer.{layer}.",
        norms=("layernorm_before", "layernorm_after"),
        query="attention.attention.query",
        key="attention.attention.key",
        value="attention.attention.value",
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
    only = FILLED
    head_steps = {"ImageClassification": ("first-and-mean", CLASSIFIER)}
    keys = {"intermediate_size": "", "gated": "use_swiglu_ffn"}
    # The token of masked patches is no part of the graph.
    idle = ("use_mask_token",)
    always = {"use_mask_token": False}
    names = BlockNames(
        embedding="embeddings.cls_token",
        positions="embeddings.position_embeddings",
        around=("", "layernorm"),
        layer="encoder.layer.{layer}.",
        norms=("norm1", "norm2"),
        query="attention.attention.query",
        key="attention.attention.key",
        value="attention.attention.value",
        output="attention.output.dense",
        fc_in="mlp.fc1",
        fc_out="mlp.fc2",
        gate="gate",
        up="up",
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

    @property
    def is_gated(self) -> bool:
        """Whether blocks are gated, by SiLU whatever the activation of others is."""
        return self.gated

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
        # It resamples its positions for others.
        yield from _square(self)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        return {**super()._read(reader), "mlp_ratio": read_ratio(reader)}

    def _write(self) -> JsonDict:
        return {**super()._write(), "mlp_ratio": self.mlp_ratio}


TOWER_DEFAULTS: Mapping[str, object] = {
    **VISION_DEFAULTS,
    "intermediate_size": 3072,
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}


@config_class
class ClipVisionConfig(VisionConfig):
    """The tower of images of a clip; the norm behind it is part of the pooler."""

    model_type = "clip_vision_model"
    architecture = "CLIPVisionModel"
    base_prefix = "vision_model."
    tower_prefix = "vision_model."
    head_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "": ("first", "norm vision_model.post_layernorm")
    }
    keys = {"qkv_bias": ""}
    kept_numbers = ("initializer_range", "attention_dropout")
    # Of training, and of heads of the class of both towers.
    idle: ClassVar[tuple[str, ...]] = (
        "initializer_factor",
        "projection_dim",
        "dropout",
        "logit_scale_init_value",
    )
    names = BlockNames(
        embedding="vision_model.embeddings.class_embedding",
        positions="vision_model.embeddings.position_embedding.weight",
        around=("vision_model.pre_layrnorm", ""),
        layer="vision_model.encoder.layers.{layer}.",
        norms=("layer_norm1", "layer_norm2"),
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        fc_in="mlp.fc1",
        fc_out="mlp.fc2",
    )
    defaults = TOWER_DEFAULTS
    patches_name = "vision_model.embeddings.patch_embedding"
    patch_bias = False
    is_flat = True

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from _square(self)


@config_class
class SiglipVisionConfig(ClipVisionConfig):
    """The tower of images of a siglip or a siglip2 of one size: no token of the whole image.

    The head that pools by attention is not part of it.
    """

    model_type = "siglip_vision_model"
    architecture = "SiglipVisionModel"
    head_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    unread = r"head\..+"
    idle = (*ClipVisionConfig.idle, "vision_use_head")
    always = {"vision_use_head": False}
    names = replace(
        ClipVisionConfig.names, embedding="", around=("", "vision_model.post_layernorm")
    )
    defaults = {
        **TOWER_DEFAULTS,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    }
    patch_bias = True


@config_class
class Dinov3ViTConfig(VisionConfig):
    """A dinov3_vit: rotary positions of patches in two directions, and tokens without a place.

    `rope_theta` is the base of the frequencies; the coordinates of an image run from −1 to 1.
    """

    model_type = "dinov3_vit"
    architecture = "DINOv3ViTModel"
    keys = {"qkv_bias": "", "gated": "use_gated_mlp", "registers": "num_register_tokens"}
    kept_numbers = ("initializer_range", "attention_dropout", "layerscale_value", "drop_path_rate")
    # Of training; and of backbones.
    idle = (
        *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
        *("apply_layernorm", "reshape_hidden_states"),
    )
    names = BlockNames(
        embedding="embeddings.cls_token",
        around=("", "norm"),
        layer="layer.{layer}.",
        norms=("norm1", "norm2"),
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        fc_in="mlp.up_proj",
        fc_out="mlp.down_proj",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        gated_out="mlp.down_proj",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    )
    defaults = {
        **VISION_DEFAULTS,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "patch_size": 16,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_gated_mlp": False,
        "num_register_tokens": 0,
    }
    patches_name = "embeddings.patch_embeddings"
    unread = r"embeddings\.register_tokens"

    layer_norm_eps: float = number(least=0, default=1e-5)
    rope_theta: float = number(above=0, default=100.0)
    query_bias: bool = flag(default=True)
    key_bias: bool = flag(default=False)
    value_bias: bool = flag(default=True)
    proj_bias: bool = flag(default=True)
    mlp_bias: bool = flag(default=True)
    gated: bool = flag(default=False)
    registers: int = size(COUNT, least=0, default=0)

    @property
    def is_gated(self) -> bool:
        """Whether blocks are gated."""
        return self.gated

    @property
    def unbiased(self) -> str:
        """The letters of the projections without a bias, of ``qkvo``."""
        biases = (self.query_bias, self.key_bias, self.value_bias, self.proj_bias)
        return "".join(letter for letter, has in zip("qkvo", biases, strict=True) if not has)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from _square(self)
        if self.num_attention_heads > 0 and self.head_dim % 4:
            fault = "a head is rotated in halves for two directions"
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(fault, "heads of a multiple of 4", f"{self.head_dim}", *keys)


def _square(config: VisionConfig) -> Iterator[KeyProblem]:
    if config.image_size[0] != config.image_size[1]:
        fault = f"{config.model_type} takes images that are square"
        yield key_problem(fault, "a square", f"{config.image_size}", "image_size")


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
