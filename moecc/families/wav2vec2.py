"""wav2vec2 and hubert: encoders of raw audio, which convolutions cut into frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import ClassVar

from moecc.families.config import (
    BlockNames,
    EqualHeadsConfig,
    ModelConfig,
    activation,
    choice,
    config_class,
    flag,
    number,
    size,
)
from moecc.families.heads import CLASSIFIER
from moecc.families.reader import COUNT, NEURONS, WIDTH, KeyProblem, Reader, key_problem
from moecc.families.shrinking import SMALL_HEAD_DIM, shrink_size
from moecc.support.untyped import JsonDict

FRAMES = 49
"""The frames of the audio that a graph takes: a second of speech in the published models."""

MOST_TAPS = 1 << 12
MOST_CONVOLUTIONS = 64

AUDIO_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": (512,) * 7,
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "use_weighted_layer_sum": False,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONVOLUTIONS = ("conv_dim", "conv_kernel", "conv_stride")


@config_class
class AudioConfig(EqualHeadsConfig):
    """An encoder of audio; its output is the hidden states of the last layer.

    `conv_dim`, `conv_kernel` and `conv_stride` have an entry for each convolution over the samples.
    With `projection_norm` frames are normalised before they get the width of the model.
    """

    kind = "an encoder of audio"
    graphs = "wav2vec2"
    with_heads = True
    kept_numbers = ("initializer_range",)
    keys = {
        "vocab_size": "",
        "projection_norm": "",
        "feature_act": "feat_extract_activation",
        "feature_norm": "feat_extract_norm",
        "position_taps": "num_conv_pos_embeddings",
        "position_groups": "num_conv_pos_embedding_groups",
        "norms_first": "do_stable_layer_norm",
    }
    only = {
        "use_weighted_layer_sum": (False, "a head that reads all layers is not supported"),
    }
    # What is learned in the place of masked frames, and the codebook of the pre-training.
    unread = r"(\w+\.)?masked_spec_embed|(quantizer|project_q|project_hid)\..*"
    names = BlockNames(
        layer="encoder.layers.{layer}.",
        norms=("layer_norm", "final_layer_norm"),
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.out_proj",
        fc_in="feed_forward.intermediate_dense",
        fc_out="feed_forward.output_dense",
        positions="encoder.pos_conv_embed.conv",
        around=("encoder.layer_norm", "encoder.layer_norm"),
    )
    head_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "CTC": ("labels lm_head",),
        "SequenceClassification": ("linear projector", "mean", CLASSIFIER),
    }
    defaults = AUDIO_DEFAULTS

    hidden_act: str = activation(default="gelu")
    layer_norm_eps: float = number(least=0, default=1e-5)
    conv_dim: tuple[int, ...]
    conv_kernel: tuple[int, ...]
    conv_stride: tuple[int, ...]
    conv_bias: bool = flag(default=False)
    feature_act: str = activation(default="gelu")
    feature_norm: str = choice(("group", "layer"), default="group")
    position_taps: int = size(MOST_TAPS, default=128)
    position_groups: int = size(COUNT, default=16)
    norms_first: bool = flag(default=False)
    projection_norm: bool = flag(default=True)

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return AudioConfig

    @property
    def samples(self) -> int:
        """The samples of the audio that a graph takes: as few as make `FRAMES` frames."""
        count = FRAMES
        for taps, stride in zip(self.conv_kernel[::-1], self.conv_stride[::-1], strict=True):
            count = (count - 1) * stride + taps
        return count

    @property
    def first_tensor(self) -> str:
        """A tensor that every checkpoint of the family has."""
        return "feature_extractor.conv_layers.0.conv.weight"

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        return {
            **sizes,
            "conv_dim": tuple(shrink_size(n, SMALL_HEAD_DIM) for n in self.conv_dim),
            "conv_kernel": tuple(min(n, 3) for n in self.conv_kernel),
            "conv_stride": tuple(min(n, 2) for n in self.conv_stride),
            "position_taps": min(self.position_taps, 4 + self.position_taps % 2),
            "position_groups": sizes["num_attention_heads"] if self.position_groups > 1 else 1,
        }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self.head_checks("hidden_size", "position_groups")
        if len({len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)}) > 1:
            fault = "not one entry for each convolution"
            counts = f"{len(self.conv_dim)}, {len(self.conv_kernel)}, {len(self.conv_stride)}"
            yield key_problem(fault, "as many in each", counts, *CONVOLUTIONS)
        for key, most in zip(CONVOLUTIONS, (WIDTH, MOST_TAPS, MOST_TAPS), strict=True):
            entries = getattr(self, key)
            usable = 1 <= len(entries) <= MOST_CONVOLUTIONS and all(1 <= n <= most for n in entries)
            if not usable:
                expected = f"1 to {MOST_CONVOLUTIONS} sizes, 1 to {most:,}"
                yield key_problem("not usable sizes", expected, f"{entries[:8]}", key)
        if prod(self.conv_stride) > NEURONS:
            fault = "a frame is of more samples than any audio has"
            yield key_problem(fault, f"{NEURONS:,}", f"{prod(self.conv_stride):,}", "conv_stride")

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        values |= {key: reader.whole_numbers(key) for key in CONVOLUTIONS}
        stated = reader.value("num_feat_extract_layers")
        if stated is not None and stated != len(values["conv_dim"]):
            fault = "the convolutions are counted by conv_dim, and differ"
            expected = f"{len(values['conv_dim'])}"
            reader.refuse("num_feat_extract_layers", fault, expected=expected)
        return values

    def _write(self) -> JsonDict:
        lists = {key: list(getattr(self, key)) for key in CONVOLUTIONS}
        return {**super()._write(), **lists}


@config_class
class Wav2Vec2Config(AudioConfig):
    """A wav2vec2 without a head."""

    model_type = "wav2vec2"
    architecture = "Wav2Vec2Model"
    head_prefix = "wav2vec2."
    only = {
        "add_adapter": (False, "an adapter behind the encoder is not supported"),
        "adapter_attn_dim": (None, "adapters in the layers are not supported"),
    }
    # Of heads and of training.
    idle = ("output_hidden_size",)
    defaults = {**AUDIO_DEFAULTS, "add_adapter": False, "adapter_attn_dim": None}


@config_class
class HubertConfig(AudioConfig):
    """A hubert without a head: a wav2vec2 whose frames need not be normalised."""

    model_type = "hubert"
    architecture = "HubertModel"
    head_prefix = "hubert."
    keys = {"projection_norm": "feat_proj_layer_norm"}
    only = {"conv_pos_batch_norm": (False, "batch norms before the positions are not supported")}
    defaults = {**AUDIO_DEFAULTS, "feat_proj_layer_norm": True, "conv_pos_batch_norm": False}
