"""gemma, gemma2 and gemma3_text: scales stored less one, a scaled embedding, GeGLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig, Windows, typed_windows
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.families.rope import RopeConfig, read_rope

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

    model_type: ClassVar[str] = "gemma"
    architecture: ClassVar[str] = "GemmaForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {
        "mlp_bias": False,
        "qk_norm": False,
        "norm_offset": True,
        "scale_embedding": True,
    }
    bias_key: ClassVar[str | None] = "attention_bias"
    groups_may_be_null: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, object]] = GEMMA_DEFAULTS

    hidden_act: str = "gelu_pytorch_tanh"
    norm_offset: bool = True
    scale_embedding: bool = True

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.act_key == "hidden_act" and self.hidden_act == "gelu":
            what = "transformers 5 takes gelu for its tanh approximation in this family"
            yield key_problem(what, "gelu_pytorch_tanh", "gelu", "hidden_act")

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        if reader.value("use_bidirectional_attention"):
            what = "a model whose tokens see later ones is not supported"
            reader.refuse("use_bidirectional_attention", what, expected="false or null")
        values = super()._read(reader)
        if cls.act_key == "hidden_act":
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


@config_class
class Gemma2Config(GemmaConfig):
    """A gemma2: norms around each block, soft caps, a window in every second layer."""

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    act_key: ClassVar[str] = "hidden_activation"
    fixed: ClassVar[Mapping[str, object]] = {**GemmaConfig.fixed, "norm_placement": "around"}
    options: ClassVar[frozenset[str]] = frozenset(
        {"attention_scale", "attention_softcap", "logit_softcap"}
    )
    window_style: ClassVar[str] = "typed"
    defaults: ClassVar[Mapping[str, object]] = GEMMA2_DEFAULTS
    # Every so many layers one without a window, if nothing else is stated.
    window_period: ClassVar[int] = 2

    norm_placement: str = "around"

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self._scalar() is None:
            what = f"{self.model_type} divides the scores by the root of a whole number"
            found = f"{self.attention_scale}"
            yield key_problem(what, "such a scale", found, "query_pre_attn_scalar")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            what = f"transformers 5 rejects such a {self.model_type}, whatever its head_dim"
            expected = f"a multiple of {self.num_attention_heads}"
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(what, expected, f"{self.hidden_size}", *keys)

    def _scalar(self) -> int | None:
        """Return n where the scale of the scores is 1 / √n, or None where there is no such n."""
        scale = self.score_scale
        found = round(scale**-2) if 0 < scale <= 1 else 0
        return found if found > 0 and found**-0.5 == scale else None

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        scalar = reader.number("query_pre_attn_scalar", above=0)
        return {
            **values,
            "attention_scale": None if scalar == values["head_dim"] else scalar**-0.5,
            **cls._read_caps(reader),
        }

    @classmethod
    def _read_caps(cls, reader: Reader) -> dict[str, object]:
        return {
            "attention_softcap": reader.optional_number("attn_logit_softcapping", above=0),
            "logit_softcap": reader.optional_number("final_logit_softcapping", above=0),
        }

    @classmethod
    def _read_windows(cls, reader: Reader, layers: int) -> Windows:
        period = cls._read_period(reader)
        return typed_windows(reader, tuple((n + 1) % period != 0 for n in range(layers)))

    @classmethod
    def _read_period(cls, reader: Reader) -> int:
        return cls.window_period

    def _write(self) -> dict[str, object]:
        keys = super()._write()
        if keys["sliding_window"] is None:
            # transformers makes the mask of a window whether a layer has one or not.
            keys["sliding_window"] = self.defaults["sliding_window"]
        return {
            **keys,
            "query_pre_attn_scalar": self._scalar(),
            "attn_logit_softcapping": self.attention_softcap,
            "final_logit_softcapping": self.logit_softcap,
        }


@config_class
class Gemma3TextConfig(Gemma2Config):
    """A gemma3_text: norms of queries and keys, rotary positions of their own in windows."""

    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    fixed: ClassVar[Mapping[str, object]] = {**Gemma2Config.fixed, "qk_norm": True}
    options: ClassVar[frozenset[str]] = frozenset(
        {"attention_scale", "logit_softcap", "local_rope"}
    )
    defaults: ClassVar[Mapping[str, object]] = {
        **GEMMA2_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    window_period: ClassVar[int] = 6

    qk_norm: bool = True

    @classmethod
    def _read_period(cls, reader: Reader) -> int:
        return reader.size("sliding_window_pattern")

    @classmethod
    def _read_caps(cls, reader: Reader) -> dict[str, object]:
        if reader.value("attn_logit_softcapping") is not None:
            what = "transformers ignores the key in this family"
            reader.refuse("attn_logit_softcapping", what, expected="null")
        return {"logit_softcap": reader.optional_number("final_logit_softcapping", above=0)}

    @classmethod
    def _read_rope(cls, reader: Reader, head_dim: int) -> dict[str, object]:
        length = reader.size("max_position_embeddings")
        local = _local_theta(reader)
        rope = read_rope(_by_layer_type(reader, "full_attention"), length)
        same = rope == RopeConfig(theta=local)
        return {"rope": rope, "local_rope": None if same else RopeConfig(theta=local)}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        local = self.local_rope
        if local is not None and local != RopeConfig(theta=local.theta):
            what = "transformers 4 has no scaling of the positions in layers with a window"
            yield key_problem(what, "rope type default", local.type, "rope_local_base_freq")
        if local is None and self.rope.type != "default":
            what = "gemma3_text scales no positions in layers with a window"
            yield key_problem(what, "positions of their own", "none", "rope_local_base_freq")

    def _write_rope(self) -> dict[str, object]:
        local = self.local_rope or self.rope
        keys, inner = self.rope.to_json(), local.to_json()["rope_parameters"]
        kinds = {"full_attention": keys["rope_parameters"], "sliding_attention": inner}
        return {**keys, "rope_local_base_freq": local.theta, "rope_parameters": kinds}


def _by_layer_type(reader: Reader, kind: str) -> Reader:
    """Return `reader` with the rope parameters of one kind of layer in place of those of all."""
    found = reader.mapping("rope_parameters")
    inner = None if found is None else found.get(kind)
    if found is not None and set(found) <= {"full_attention", "sliding_attention"}:
        data = {**reader.data, "rope_parameters": inner}
        if inner is None:
            del data["rope_parameters"]
        return reader.with_data(data)
    return reader


def _local_theta(reader: Reader) -> float:
    """Return the base period in layers with a window, by both spellings."""
    key = "rope_local_base_freq"
    found: dict[str, float] = {}
    if reader.has(key):
        found[key] = reader.number(key, above=0)
    parameters = reader.mapping("rope_parameters") or {}
    inner = parameters.get("sliding_attention")
    if isinstance(inner, Mapping):
        part = Reader(inner, {"rope_type": "default"}, f"{reader.where}: sliding_attention")
        if part.value("rope_type") != "default":
            part.refuse("rope_type", "transformers 4 has no such scaling", expected="default")
        if part.has("rope_theta"):
            found["rope_parameters"] = part.number("rope_theta", above=0)
        reader.problems.extend(part.problems)
        reader.bad.update({"rope_parameters"} if part.problems else ())
    if len(set(found.values())) > 1:
        reader.conflict(tuple(found), "the base period is stated twice and differs")
    return next(iter(found.values()), None) or reader.number(key, above=0)
