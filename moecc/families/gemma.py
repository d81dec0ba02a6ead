"""gemma, gemma2 and gemma3_text: scales stored less one, a scaled embedding, GeGLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import GgufFacts, config_class
from moecc.families.decoder import ATTENTION_BIASES, DEFAULTS, DecoderConfig
from moecc.families.reader import LAYERS, KeyProblem, Reader, key_problem
from moecc.families.rope import RopeConfig, read_rope, refuse_former_name
from moecc.support.untyped import JsonDict

GEMMA_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@config_class
class GemmaConfig(DecoderConfig):
    """A gemma: every norm's scale is 1 + w, and the embedding is multiplied by √hidden_size."""

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    fixed = {
        "norm_offset": True,
        "scale_embedding": True,
    }
    options = ATTENTION_BIASES
    strict = ("num_key_value_heads", "head_dim")
    gguf = GgufFacts("gemma", is_tied=True)
    defaults = GEMMA_DEFAULTS

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.key("hidden_act") == "hidden_act" and self.hidden_act == "gelu":
            fault = "transformers 5 takes gelu for its tanh approximation in this family"
            yield key_problem(fault, "gelu_pytorch_tanh", "gelu", "hidden_act")

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        if reader.value("use_bidirectional_attention"):
            fault = "a model whose tokens see later ones is not supported"
            reader.refuse("use_bidirectional_attention", fault, expected="false or null")
        values = super()._read(reader)
        if cls.key("hidden_act") == "hidden_act":
            # Its first checkpoints have exact GELU in one key or the other, and mean tanh's.
            reader.value("hidden_activation")
            if values["hidden_act"] == "gelu":
                values["hidden_act"] = "gelu_pytorch_tanh"
        return values


GEMMA2_DEFAULTS: Mapping[str, object] = {
    **GEMMA_DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
WINDOW = ("attention.sliding_window", "sliding_window")
LOGIT_CAP = ("final_logit_softcapping", "final_logit_softcapping")
SCALAR = "query_pre_attn_scalar"


@config_class
class Gemma2Config(GemmaConfig):
    """A gemma2: norms around each block, soft caps, a window in every second layer."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    keys = {"hidden_act": "hidden_activation"}
    fixed = {**GemmaConfig.fixed, "norm_placement": "around"}
    options = ATTENTION_BIASES | {"attention_scale", "attention_softcap", "logit_softcap"}
    window_style = "typed"
    gguf = GgufFacts(
        "gemma2",
        is_tied=True,
        window_period=2,
        score_layers=46,
        keys=(WINDOW, ("attn_logit_softcapping", "attn_logit_softcapping"), LOGIT_CAP),
    )
    defaults = GEMMA2_DEFAULTS
    # Every so many layers one without a window, if nothing else is stated.
    window_period: ClassVar[int] = 2

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self._scalar() is None:
            fault = f"{self.model_type} divides the scores by the root of a whole number"
            yield key_problem(fault, "such a scale", f"{self.attention_scale}", SCALAR)
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            fault = f"transformers 5 rejects such a {self.model_type}, whatever its head_dim"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(fault, expected, f"{self.hidden_size}", *keys)

    def _scalar(self) -> int | None:
        """Return n where the scale of the scores is 1 / √n, or None where there is no such n."""
        scale = self.score_scale
        scalar = round(scale**-2) if 0 < scale <= 1 else 0
        return scalar if scalar > 0 and scalar**-0.5 == scale else None

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values, scalar = super()._read(reader), reader.number(SCALAR, above=0)
        scale = None if scalar == values["head_dim"] else scalar**-0.5
        return {**values, "attention_scale": scale}

    @classmethod
    def _usual_windows(cls, reader: Reader, layers: int) -> tuple[bool, ...]:
        period = cls.window_period
        if "sliding_window_pattern" in cls.defaults:
            period = reader.size("sliding_window_pattern", LAYERS)
        return tuple((n + 1) % period != 0 for n in range(layers))

    def _write(self) -> JsonDict:
        return {
            **super()._write(),
            SCALAR: self._scalar(),
            "attn_logit_softcapping": self.attention_softcap,
        }


@config_class
class Gemma3TextConfig(Gemma2Config):
    """A gemma3_text: norms of queries and keys, rotary positions of their own in windows."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    fixed = {**Gemma2Config.fixed, "qk_norm": True}
    options = ATTENTION_BIASES | {"attention_scale", "logit_softcap", "local_rope"}
    only = {"attn_logit_softcapping": (None, "transformers ignores the key in this family")}
    gguf = GgufFacts(
        "gemma3",
        is_tied=True,
        window_period=6,
        score_layers=62,
        keys=(WINDOW,),
        optional_keys=((*LOGIT_CAP, None),),
        local_theta=10_000.0,
    )
    defaults = {
        **GEMMA2_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        refuse_former_name(reader)
        local = RopeConfig(theta=stated_theta(reader))
        parameters = reader.mapping("rope_parameters")
        if parameters is not None:
            if not set(parameters) <= {"full_attention", "sliding_attention"}:
                fault = "transformers reads parameters of this family by kind of layer alone"
                expected = "full_attention and sliding_attention"
                reader.refuse("rope_parameters", fault, expected=expected)
            # The parameters of layers without a window stand for those of all.
            data = {**reader.data, "rope_parameters": parameters.get("full_attention")}
            if data["rope_parameters"] is None:
                del data["rope_parameters"]
            reader = reader.with_data(data)
        rope = read_rope(reader, values["max_position_embeddings"])
        return {"rope": rope, "local_rope": None if rope == local else local}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        local = self.local_rope
        if local is not None and local != RopeConfig(theta=local.theta):
            fault = "transformers 4 has no scaling of the positions in layers with a window"
            yield key_problem(fault, "rope type default", local.type, "rope_local_base_freq")
        if local is None and self.rope.type != "default":
            fault = "gemma3_text scales no positions in layers with a window"
            yield key_problem(fault, "positions of their own", "none", "rope_local_base_freq")
        if not self.rope.truncate:
            fault = "transformers 5 rounds the range of YaRN in this family whatever truncate says"
            yield key_problem(fault, "true", "false", "rope_scaling", "rope_parameters")

    def _write_rope(self) -> JsonDict:
        local = self.local_rope or self.rope
        keys, inner = self.rope.to_json(), local.to_json()["rope_parameters"]
        kinds = {"full_attention": keys["rope_parameters"], "sliding_attention": inner}
        return {**keys, "rope_local_base_freq": local.theta, "rope_parameters": kinds}


def stated_theta(
    reader: Reader, key: str = "rope_local_base_freq", kind: str = "sliding_attention"
) -> float:
    """Return the base period in layers of a kind, those with a window, by both spellings."""
    stated: dict[str, float] = {}
    if reader.has(key):
        stated[key] = reader.number(key, above=0)
    parameters = reader.mapping("rope_parameters") or {}
    inner = parameters.get(kind)
    if isinstance(inner, Mapping):
        part = Reader(inner, {}, f"{reader.where}: rope_parameters: {kind}")
        plain = {"rope_type": "default", "type": "default", "rope_theta": inner.get("rope_theta")}
        for name, value in inner.items():
            if value != plain.get(name, ...):
                fault = "transformers 4 has only plain rotary positions here"
                part.refuse(name, fault, expected="rope_type default, and rope_theta")
        if part.has("rope_theta"):
            stated["rope_parameters"] = part.number("rope_theta", above=0)
        reader.problems.extend(part.problems)
        reader.bad.update({"rope_parameters"} if part.problems else ())
    if len(set(stated.values())) > 1:
        reader.conflict(tuple(stated), "the base period is stated twice and differs")
    return next(iter(stated.values()), None) or reader.number(key, above=0)
