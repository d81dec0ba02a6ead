"""The architectures of GGUF that moecc reads and writes, derived from the families of configs.

`moecc.families.config.GgufFacts` of a family says what llama.cpp computes whatever a file says;
`tests/engines/` holds the facts to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from moecc.families.config import ACTIVATIONS, GgufFacts, ModelConfig
from moecc.families.decoder import NORMS, DecoderConfig
from moecc.families.gemma4 import Gemma3nTextConfig, Gemma4TextConfig, LayerInputsConfig
from moecc.families.mixture import MoeConfig
from moecc.families.registry import CONFIGS, decoders, mixtures

LLAMA3_FACTORS = ((1.0, 4.0), (1.0, 1.0))
"""The factors of low and high frequencies in Llama 3's scaling and 4's, which GGUF lacks."""

_BIASED = frozenset(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
"""The stems of matrices that may have a bias."""

_LATENT = {
    "attn_q": "q_proj",
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_layernorm",
    "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj_with_mqa",
    "attn_kv_a_norm": "kv_a_layernorm",
    "attn_output": "o_proj",
}
"""The matrices and norms of latent attention, but for that which is stored in two parts."""

_DELTA_VECTORS = {"ssm_a": "A_log", "ssm_dt.bias": "dt_bias"}
_DELTA_OUT = {"ssm_conv1d": "conv1d", "ssm_out": "out_proj"}
_DELTA_BY_KIND = {
    "attn_qkv.weight": "in_proj_qkv.weight",
    "attn_gate.weight": "in_proj_z.weight",
    "ssm_beta.weight": "in_proj_b.weight",
    "ssm_alpha.weight": "in_proj_a.weight",
}
"""The tensors of a gated delta rule."""

_CONVOLUTION = ("conv", "in_proj", "out_proj")
"""The matrices of a short convolution, by the same names in GGUF."""


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A decoder in GGUF: a family of Hugging Face, and what llama.cpp makes of it."""

    config: type[DecoderConfig]
    facts: GgufFacts

    @property
    def mixture(self) -> type[MoeConfig] | None:
        """The family, if it has experts."""
        return self.config if issubclass(self.config, MoeConfig) else None

    @property
    def activation(self) -> object:
        """The activation that llama.cpp computes: the family's usual one."""
        usual = str(self.config.defaults.get(self.config.key("hidden_act"), "silu"))
        return ACTIVATIONS.get(usual, usual)

    @property
    def leading_dense(self) -> bool:
        """Whether the first layers of a mixture may be dense."""
        return "leading_dense_block_count" in dict(self.facts.keys)

    def has(self, feature: str) -> bool:
        """Whether models of the family may have a feature of `DecoderConfig`."""
        return feature in self.config.options or bool(self.config.fixed.get(feature))

    def flags(self) -> dict[str, str]:
        """Return keys of config.json that are true where a layer has a tensor, and that tensor."""
        tensors = {"qkv_bias": "attn_q.bias", "qk_norm": "attn_q_norm.weight"}
        if self.facts.mlp_bias:
            tensors["mlp_bias"] = "ffn_down.bias"
        options, key = self.config.options, self.config.key
        flags = {key(name): end for name, end in tensors.items() if name in options}
        if key("routing_bias") in self.config.defaults:
            flags[key("routing_bias")] = "exp_probs_b.bias"
        return flags

    def stems(self) -> dict[str, str]:
        """Return the names of a layer's matrices and gains in GGUF with those in Hugging Face."""
        names, mixture, fixed = self.config.names, self.mixture, self.config.fixed
        projections = {f"attn_{letter}": f"{letter}_proj" for letter in "qkv"}
        modules = {"attn_qkv": names.qkv} if names.qkv else projections
        modules["attn_output"] = names.attention_output
        has_scales = not self.config.fixed.get("qk_norm_plain")
        if (
            self.has("qk_norm")
            and has_scales
            and (self.config.key("qk_norm"), False) not in self.facts.states
        ):
            modules |= {"attn_q_norm": names.query_norm, "attn_k_norm": names.key_norm}
        if self.has("latent"):
            modules = dict(_LATENT)
        stems = {stem: names.attention + module for stem, module in modules.items()}
        if self.has("delta"):
            stems["ssm_norm"] = f"{names.delta}norm"
            if names.delta_by_group:
                by_group = {"ssm_ba": "in_proj_ba", **_DELTA_OUT}
                stems |= {stem: names.delta + module for stem, module in by_group.items()}
        if self.has("conv_taps"):
            stems |= {f"shortconv.{part}": names.convolution + part for part in _CONVOLUTION}
        has_steps = "interleave_moe_layer_step" in dict(self.facts.keys)
        if mixture is None or self.leading_dense or has_steps:
            if not names.gate_up and fixed.get("gated_mlp", True):
                stems["ffn_gate"] = names.dense + names.dense_gate
            stems["ffn_up"] = names.dense + (names.gate_up or names.dense_up)
            stems["ffn_down"] = names.dense + names.dense_down
        stems |= self.norms()
        if mixture is None:
            return stems
        stems["ffn_gate_inp"] = names.sparse + names.router.removesuffix(".weight")
        for word in ("gate", "up", "down"):
            if not names.inputs_first:
                stems[f"ffn_{word}_exps"] = f"{names.sparse}experts.{names.matrix(word)}"
            if mixture.has_shared_expert:
                stems[f"ffn_{word}_shexp"] = f"{names.sparse}{names.shared}{word}_proj"
        if mixture.has_shared_expert and mixture.shared_gate:
            gate = names.shared_gate.removesuffix(".weight")
            stems["ffn_gate_inp_shexp"] = names.sparse + gate
        return stems

    def norms(self) -> dict[str, str]:
        """Return the names of a layer's norms in GGUF with those in Hugging Face."""
        placement = str(self.config.fixed.get("norm_placement", "before"))
        if self.norm_kind == "layer without parameters":
            return {}
        names = self.config.names.layer_norms or NORMS[placement]
        stems = ("attn_norm", "post_attention_norm", self.facts.ffn_norm, "post_ffw_norm")
        placed = dict(zip(stems, names, strict=True))
        if self.config.fixed.get("parallel"):  # one norm before both blocks
            del placed[self.facts.ffn_norm]
        return {stem: name for stem, name in placed.items() if name}

    @property
    def norm_kind(self) -> str:
        """The kind of norms, one of `moecc.families.decoder.NORM_KINDS`."""
        return str(self.config.fixed.get("norm_kind", "rms"))

    @property
    def epsilon_key(self) -> str:
        """The key of what norms add."""
        return f"attention.layer_norm_{'rms_' if self.norm_kind == 'rms' else ''}epsilon"

    def tensors(self) -> dict[str, str]:
        """Return the names of a layer's tensors in GGUF with those in Hugging Face."""
        stems, mixture = self.stems(), self.mixture
        tensors = {
            **{f"{old}.weight": f"{new}.weight" for old, new in stems.items()},
            **{f"{old}.bias": f"{new}.bias" for old, new in stems.items() if old in _BIASED},
        }
        if self.norm_kind == "layer":
            tensors |= {f"{old}.bias": f"{new}.bias" for old, new in self.norms().items()}
        names = self.config.names
        if names.delta_by_group and self.has("delta"):
            tensors |= {old: names.delta + new for old, new in _DELTA_VECTORS.items()}
            # The first files have the matrix as it is.
            tensors["ssm_in.weight"] = f"{names.delta}in_proj_qkvz.weight"
        if mixture is not None and mixture.has_logits_bias:
            experts = names.sparse + names.expert_down
            tensors |= {
                "attn_sinks.weight": f"{names.attention}sinks",
                "ffn_gate_inp.bias": f"{names.sparse}{names.router.removesuffix('weight')}bias",
                "ffn_down_exps.bias": f"{experts}_bias",
            }
        if mixture is not None and mixture.has_routing_bias:
            tensors["exp_probs_b.bias"] = names.sparse + names.routing_bias
        return tensors

    def rearranged(self) -> dict[str, tuple[str, ...]]:
        """Return the tensors of a layer that a file holds in other parts or orders, with these.

        `moecc.formats.gguf.rearranged` has the expressions.
        """
        names = self.config.names
        if names.inputs_first:
            gate_up = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
            wholes = {
                names.sparse + names.expert_gate_up: gate_up,
                names.sparse + names.expert_down: ("ffn_down_exps.weight",),
            }
            if self.mixture is not None and self.mixture.has_logits_bias:
                biases = ("ffn_gate_exps.bias", "ffn_up_exps.bias")
                wholes[f"{names.sparse}{names.expert_gate_up}_bias"] = biases
            return wholes
        if self.has("latent"):
            return {f"{names.attention}kv_b_proj.weight": ("attn_k_b.weight", "attn_v_b.weight")}
        if not self.has("delta"):
            return {}
        if names.delta_by_group:
            parts = ("attn_qkv.weight", "attn_gate.weight")
            return {f"{names.delta}in_proj_qkvz.weight": parts}
        ends = {
            **_DELTA_BY_KIND,
            **_DELTA_VECTORS,
            **{f"{k}.weight": f"{v}.weight" for k, v in _DELTA_OUT.items()},
        }
        return {f"{names.delta}{new}": (old,) for old, new in ends.items()}

    def model_tensors(self) -> dict[str, str]:
        """Return the names of the tensors outside of layers in GGUF with those in Hugging Face."""
        names, final_norm = self.config.names, f"{self.facts.final_norm}.weight"
        tensors = {EMBEDDING: names.embedding, final_norm: names.final_norm, HEAD: names.head}
        if self.norm_kind == "layer without parameters":
            del tensors[final_norm]
        if self.norm_kind == "layer":
            tensors["output_norm.bias"] = f"{names.final_norm.removesuffix('weight')}bias"
        if self.config.fixed.get("head_bias"):
            tensors["output.bias"] = f"{names.head.removesuffix('weight')}bias"
        return tensors

    def whole_of(self, name: str) -> tuple[str, str]:
        """Return the prefix and the end of the name of a rearranged tensor; empty for others."""
        match = _LAYER.fullmatch(name)
        is_whole = match is not None and match[2] in self.rearranged()
        return (f"blk.{match[1]}.", match[2]) if match is not None and is_whole else ("", "")

    def unit_axis(self, name: str) -> int | None:
        """Return where a tensor has an axis of size 1 in Hugging Face that files lack, or None."""
        names, mixture = self.config.names, self.mixture
        convolutions = (f".{names.convolution}conv.weight", f".{names.delta}conv1d.weight")
        if name.endswith(convolutions):
            return 1
        ends = []
        if mixture is not None and mixture.has_shared_expert and mixture.shared_gate:
            ends.append(f".{names.sparse}{names.shared_gate}")
        if mixture is not None and names.routing_bias_rows:
            ends.append(f".{names.sparse}{names.routing_bias}")
        return 0 if name.endswith(tuple(ends)) else None


@cache
def dense_architectures() -> Mapping[str, GgufFamily]:
    """Return the families by ``general.architecture``, the first of each.

    Mistral and SmolLM are published as ``llama``.
    """
    return _architectures(sparse=False)


@cache
def mixture_architectures() -> Mapping[str, GgufFamily]:
    """Return those with experts by ``general.architecture``; Mixtral is a ``llama``, too."""
    return _architectures(sparse=True)


def families_of(architecture: str, *, sparse: bool) -> tuple[GgufFamily, ...]:
    """Return the families whose models an architecture holds; files of `llama` are of several."""
    return tuple(
        GgufFamily(config, config.gguf)
        for config in (mixtures() if sparse else decoders()).values()
        if config.gguf is not None
        and config.gguf.architecture == architecture
        and issubclass(config, MoeConfig) == sparse
    )


def _architectures(*, sparse: bool) -> dict[str, GgufFamily]:
    table: dict[str, GgufFamily] = {}
    for config in (mixtures() if sparse else decoders()).values():
        if config.gguf is not None and issubclass(config, MoeConfig) == sparse:
            table.setdefault(config.gguf.architecture, GgufFamily(config, config.gguf))
    return table


@cache
def read_architectures() -> Mapping[str, type[ModelConfig]]:
    """Return those that are no decoders of Llama's line, and are read only.

    RoBERTa is named ``bert``, too.
    """
    return {
        config.gguf.architecture: config
        for config in CONFIGS.values()
        if config.gguf is not None and not issubclass(config, DecoderConfig | LayerInputsConfig)
    }


@cache
def layer_input_architectures() -> Mapping[str, type[LayerInputsConfig]]:
    """Return those whose layers read embeddings of their own, dense and sparse."""
    return {
        config.gguf.architecture: config
        for config in (Gemma3nTextConfig, Gemma4TextConfig)
        if config.gguf is not None
    }


# The names of a decoder's tensors in GGUF and in Hugging Face, dense or sparse.

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([\w.]+)\.(weight|bias)", re.ASCII)
"""Layer, stem and part of the name of a layer's tensor."""

STORED_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([\w.]+)", re.ASCII)
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)", re.ASCII)
# Merged experts, their routers, and the per-expert names of the first Mixtral files.
_EXPERT = re.compile(r"blk\.\d+\.(ffn_\w+_(exps|shexp|chexps)|ffn_gate_inp\w*|ffn_\w+\.\d+)\.")


def hugging_face_name(name: str, family: GgufFamily) -> str | None:
    """Translate a tensor name, or return None if the family has no such tensor."""
    if (model_name := family.model_tensors().get(name)) is not None:
        return model_name
    match = STORED_LAYER.fullmatch(name)
    if match is None:
        return None
    layer, end = match.groups()
    wholes = {part: joined for joined, parts in family.rearranged().items() for part in parts}
    new = wholes.get(end) or family.tensors().get(end)
    return new and f"model.layers.{layer}.{new}"


def gguf_name(name: str, family: GgufFamily) -> str:
    """Return the name in GGUF of a tensor of Hugging Face; experts are one tensor a matrix.

    Raises:
      KeyError: the family has no such tensor.
    """
    stored = {new: old for old, new in family.model_tensors().items()}
    if name in stored:
        return stored[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    layer, stem = match.groups()
    return f"blk.{layer}.{ {new: old for old, new in family.tensors().items()}[stem] }"


def known_names(family: GgufFamily) -> list[str]:
    """Return the names that a file of this family may have, with layer 0 for every layer."""
    parts = (part for parts in family.rearranged().values() for part in parts)
    ends = [end for end in (*family.tensors(), *parts) if not end.endswith(".bias")]
    return [*family.model_tensors(), ROPE_FACTORS, *(f"blk.0.{end}" for end in ends)]


def turned_projection(name: str) -> str | None:
    """Return ``q`` or ``k`` if a Hugging Face name is a projection that is rotated."""
    match = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
    return match.group(1) if match else None


def is_norm(name: str) -> bool:
    """Whether a Hugging Face name is that of a norm whose scale may be stored less one."""
    return name.endswith("norm.weight") and not name.endswith(".linear_attn.norm.weight")


def first_expert(names: Iterable[str]) -> str | None:
    """Return the name of a tensor that belongs to a mixture of experts, if any."""
    return next((name for name in names if _EXPERT.match(name)), None)
