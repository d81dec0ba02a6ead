"""gemma3n_text: several streams of hidden states, of which one goes through each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.config import config_class, size
from moecc.families.gemma import stated_theta
from moecc.families.gemma4 import FULL, ROPE, SLIDING, LayerInputsConfig, PairedRope
from moecc.families.reader import (
    COUNT,
    NEURONS,
    WIDTH,
    KeyProblem,
    Reader,
    as_number,
    key_problem,
)
from moecc.families.shrinking import SMALL_MLP, shrink_size
from moecc.support.untyped import JsonDict

NEURON_KEY, SPARSITY = "intermediate_size", "activation_sparsity_pattern"
THETA, LOCAL_THETA = "rope_theta", "rope_local_base_freq"
SPARSE_LAYERS, USUAL_SPARSITY = 10, 0.95
"""The first layers whose neurons are sparse where nothing is stated, in models with more."""

GEMMA3N_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 262_400,
    "hidden_size": 2048,
    NEURON_KEY: 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
    THETA: 1e6,
    LOCAL_THETA: 1e4,
}


@config_class
class Gemma3nTextConfig(LayerInputsConfig):
    """A gemma3n_text.

    `widths` has the neurons of each layer, and `sparsities` the share of them that is cut off at a
    quantile of their normal distribution, 0 for none.
    """

    model_type = "gemma3n_text"
    architecture = "Gemma3nForCausalLM"
    graphs = "gemma3n"
    window_period = 5
    keys = {
        "streams": "altup_num_inputs",
        "active_stream": "altup_active_idx",
    }
    only = {
        "rope_scaling": (None, "scaled rotary positions of this family are not supported"),
        "altup_correct_scale": (True, "corrections without a scale are not supported"),
    }
    always = {"altup_correct_scale": True}
    # The first is a bound in training, the second a scale that the family does not apply.
    idle = ("altup_coef_clip", "query_pre_attn_scalar")
    defaults = GEMMA3N_DEFAULTS

    streams: int = size(COUNT)
    active_stream: int = size(COUNT, least=0, default=0)
    laurel_rank: int = size(WIDTH)
    widths: tuple[int, ...]
    sparsities: tuple[float, ...]

    def block_width(self, layer: int) -> int:
        """Return the neurons of a layer's feed-forward block."""
        return self.widths[layer]

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        layers = values["num_hidden_layers"]
        if isinstance(reader.value(NEURON_KEY), list | tuple):
            widths = reader.items(NEURON_KEY)
            if not all(type(width) is int and 0 < width <= NEURONS for width in widths):
                reader.refuse(NEURON_KEY, "not a usable size", expected="a size for each layer")
        else:
            widths = (reader.size(NEURON_KEY),) * layers
        sparsities = reader.items(SPARSITY)
        if reader.value(SPARSITY) is None:
            count = SPARSE_LAYERS if layers > SPARSE_LAYERS else 0
            sparsities = (USUAL_SPARSITY,) * count + (0.0,) * (layers - count)
        shares = [as_number(share) for share in sparsities]
        if not all(share is not None and 0 <= share < 1 for share in shares):
            expected = "a number from 0 on, below 1, for each layer"
            reader.refuse(SPARSITY, "not a share of the neurons", expected=expected)
        for key in set(reader.mapping(ROPE) or {}) - {FULL, SLIDING}:
            reader.refuse(ROPE, f"unknown key {key!r}", expected=f"{FULL} and {SLIDING}")
        return {
            **values,
            "widths": widths,
            "sparsities": tuple(share or 0.0 for share in shares),
            "rope": PairedRope(stated_theta(reader, THETA, FULL)),
            "local_rope": PairedRope(stated_theta(reader, LOCAL_THETA, SLIDING)),
        }

    def _write(self) -> JsonDict:
        return {
            **super()._write(),
            NEURON_KEY: list(self.widths),
            SPARSITY: list(self.sparsities),
            THETA: self.rope.theta,
            LOCAL_THETA: self.local_rope.theta,
            ROPE: {FULL: self.rope.to_json(), SLIDING: self.local_rope.to_json()},
        }

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        widths = tuple(shrink_size(width, SMALL_MLP) for width in self.widths)
        return {**super().small_sizes(), "widths": widths}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        for entries, key in ((self.widths, NEURON_KEY), (self.sparsities, SPARSITY)):
            if len(entries) != self.num_hidden_layers:
                fault = "not one entry for each layer"
                yield key_problem(fault, f"{self.num_hidden_layers}", f"{len(entries)}", key)
        if self.active_stream >= self.streams:
            fault, keys = "no such stream", ("altup_active_idx", "altup_num_inputs")
            yield key_problem(fault, f"below {self.streams}", f"{self.active_stream}", *keys)
        if not self.input_width:
            fault = "the layers of this family read embeddings of their own"
            yield key_problem(fault, "at least 1", "0", self.key("input_width"))
        yield from self.head_checks("hidden_size", "num_attention_heads")
