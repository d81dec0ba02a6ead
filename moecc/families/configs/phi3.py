"""phi3: fused projections, a rotation of part of each head, and its own scaling, longrope."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from .base import DEFAULTS, DecoderConfig
from .model import config_class
from .reader import KeyProblem, Reader, key_problem
from .rope import partial_rotary_factor, read_partial_rotary, read_rope


@config_class
class Phi3Config(DecoderConfig):
    """A phi3 (3, 3.5, 4-mini): no biases, one sliding window in every layer or in none."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    }
    options: ClassVar[frozenset[str]] = frozenset({"rotary_dim"})
    window_style: ClassVar[str] = "uniform"
    rope_types: ClassVar[tuple[str, ...]] = ("default", "longrope")
    # The code that its first checkpoints bring is in transformers.
    own_code: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, object]] = {
        **DEFAULTS,
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
        "pad_token_id": 32_000,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        width = self.head_dim * self.num_attention_heads
        if width != self.hidden_size:
            what = "phi3 has heads of hidden_size / num_attention_heads"
            keys = ("head_dim", "hidden_size", "num_attention_heads")
            yield key_problem(what, f"heads x head_dim = {self.hidden_size}", f"{width}", *keys)
        if self.rope.type == "longrope" and self.rope.attention_factor is not None:
            what = "phi3 has no key for the factor on cosine and sine of longrope"
            found = f"{self.rope.attention_factor:g}"
            yield key_problem(what, "what follows from the lengths", found, "rope_scaling")

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        length = reader.size("max_position_embeddings")
        return {
            "rope": read_rope(reader, length, types=cls.rope_types, partial=True, outside=True),
            "rotary_dim": read_partial_rotary(reader, head_dim, "partial_rotary_factor", 1.0),
        }

    def _write_rope(self) -> dict[str, object]:
        share = partial_rotary_factor(self.rotated_dim, self.head_dim)
        keys = super()._write_rope()
        if self.rope.type == "longrope":
            scaling = self.rope.scaling()
            scaling["type"] = scaling.pop("rope_type")
            keys["rope_scaling"] = scaling
        parameters = keys["rope_parameters"]
        assert isinstance(parameters, dict), "as the rope writes them"
        return {
            **keys,
            "rope_parameters": {**parameters, "partial_rotary_factor": share},
            "partial_rotary_factor": share,
            # The length that longrope starts from; transformers 5 has a key for it in any case.
            "original_max_position_embeddings": self.rope.original_max_position_embeddings
            or self.max_position_embeddings,
        }
