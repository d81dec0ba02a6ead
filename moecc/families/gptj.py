"""gptj: blocks side by side behind one norm, part of each head rotated by neighbours."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.families.config import TensorNames, config_class, size
from moecc.families.decoder import DecoderConfig
from moecc.families.gpt import SYNONYMS
from moecc.families.reader import (
    COUNT,
    EXTRA_DEFAULTS,
    NEURONS,
    KeyProblem,
    Reader,
    key_problem,
)
from moecc.families.rope import RopeConfig
from moecc.support.untyped import JsonDict

ROPE = RopeConfig(theta=10_000.0)
"""The rotary positions, of which the config states nothing."""


@config_class
class GptJConfig(DecoderConfig):
    """A gptj: keys of its own for each head, no biases in the attention, one of the logits."""

    model_type = "gptj"
    architecture = "GPTJForCausalLM"
    aliases = ("GPTJModel",)
    base_prefix = "transformer."
    synonyms = SYNONYMS
    fixed = {
        "norm_kind": "layer",
        "parallel": True,
        "gated_mlp": False,
        "mlp_bias": True,
        "head_bias": True,
    }
    options = frozenset({"rotary_dim"})
    keys = {
        **SYNONYMS,
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    rope_types = ("default",)
    shares_keys = False
    plain_heads = "gptj has heads of n_embd / n_head"
    names = TensorNames(
        embedding="transformer.wte.weight",
        final_norm="transformer.ln_f.weight",
        layer="transformer.h.{layer}.",
        attention="attn.",
        attention_output="out_proj",
        dense_up="fc_in",
        dense_down="fc_out",
        layer_norms=("ln_1", "", "", ""),
        pairs_neighbours=True,
    )
    defaults = {
        **EXTRA_DEFAULTS,
        "vocab_size": 50_400,
        "n_embd": 4096,
        "n_inner": None,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.rope != ROPE:
            yield key_problem("gptj has one base period", f"{ROPE}", f"{self.rope}", "rotary_dim")

    @classmethod
    def _read_rope(cls, reader: Reader, values: JsonDict) -> JsonDict:
        size = reader.size("rotary_dim", COUNT)
        return {"rope": ROPE, "rotary_dim": None if size == values["head_dim"] else size}

    def _write_rope(self) -> JsonDict:
        return {"rotary_dim": self.rotated_dim}

    intermediate_size: int = size(NEURONS, null=lambda values: 4 * values["hidden_size"])
