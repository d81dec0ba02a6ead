"""hunyuan_v1_dense: queries and keys are normalised when they are rotated."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.families.config import GgufFacts, TensorNames, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.reader import Reader
from moecc.families.rope import ROPE_KEYS, RopeConfig
from moecc.support.untyped import JsonDict

IDLE = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor")
"""What its checkpoints state beside `alpha`, and transformers does not read."""


@config_class
class HunYuanDenseV1Config(DecoderConfig):
    """A hunyuan_v1_dense: a llama with norms of each head, behind the rotation.

    A ``dynamic`` scaling with `alpha` is another base period, θ · alpha^(d / (d − 2)) for heads of
    width d; up to `max_position_embeddings` tokens that is what both releases compute.
    """

    model_type = "hunyuan_v1_dense"
    architecture = "HunYuanDenseV1ForCausalLM"
    fixed = {"qk_norm": True, "qk_norm_last": True}
    options = ATTENTION_BIASES
    # Its checkpoints state these, and transformers reads neither.
    only = {
        "num_experts": (1, "a hunyuan_v1_dense has no experts"),
        "use_qk_norm": (True, "transformers normalises queries and keys whatever this says"),
    }
    gguf = GgufFacts("hunyuan-dense")
    names = TensorNames(query_norm="query_layernorm", key_norm="key_layernorm")
    defaults = {
        **DEFAULTS,
        "vocab_size": 290_943,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        head_dim, data = values["head_dim"], dict(reader.data)
        alphas: dict[str, float] = {}
        for key in ROPE_KEYS[1:]:
            part = data.get(key)
            if not isinstance(part, Mapping) or "alpha" not in part:
                continue
            inner = Reader(part, {}, f"{reader.where}: {key}")
            alphas[key] = inner.number("alpha", above=0)
            reader.problems.extend(inner.problems)
            kinds = [part[name] for name in ("type", "rope_type") if name in part]
            if not kinds or any(kind != "dynamic" for kind in kinds) or head_dim <= 2:
                reader.refuse(key, "alpha belongs to the type dynamic, and heads wider than 2")
            data[key] = {"rope_type": "default", **_remaining(part)}
        if len(set(alphas.values())) > 1:
            reader.conflict(tuple(alphas), "alpha is stated twice and differs")
        rope = super()._read_rope(reader.with_data(data), values)["rope"]
        if alphas and head_dim > 2:
            growth = next(iter(alphas.values())) ** (head_dim / (head_dim - 2))
            rope = RopeConfig(theta=rope.theta * growth)
        return {"rope": rope}


def _remaining(part: Mapping[str, object]) -> JsonDict:
    skipped = ("alpha", "type", "rope_type", *IDLE)
    return {name: value for name, value in part.items() if name not in skipped}
