"""switch_transformers: a T5 with sparse layers in which each token goes to one expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.encdec import (
    ENCDEC_DEFAULTS,
    STACKS,
    T5_ACTIVATIONS,
    EncDecConfig,
    Experts,
    read_activation,
)
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.support.untyped import Json

UNBOUNDED = 1 << 30
"""A capacity that no sequence reaches: nothing is dropped."""


@config_class
class SwitchTransformersConfig(EncDecConfig):
    """A switch_transformers: ungated blocks, top-1 routing, the probability multiplies.

    An expert takes `expert_capacity` tokens of a sequence and drops the rest; from `UNBOUNDED`
    upwards it drops none.
    """

    # The options of `upcycle`, besides the number of experts, that lead from a dense model here.
    upcycle_options: ClassVar[str] = "top-k=1 gates=switch router-init=zero"
    model_type: ClassVar[str] = "switch_transformers"
    architecture: ClassVar[str] = "SwitchTransformersForConditionalGeneration"
    defaults: ClassVar[Mapping[str, object]] = {
        **ENCDEC_DEFAULTS,
        "d_model": 768,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_experts": 8,
        "expert_capacity": 64,
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": 0.01,
        "router_aux_loss_coef": 0.001,
        "dense_act_fn": "relu",
    }

    num_experts: int
    expert_capacity: int = UNBOUNDED
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    router_jitter_noise: float = 0.0
    router_aux_loss_coef: float = 0.001

    @property
    def experts(self) -> Experts:
        """The experts of the sparse layers."""
        bounded = self.expert_capacity < UNBOUNDED
        return Experts(
            count=self.num_experts, sequence_capacity=self.expert_capacity if bounded else 0
        )

    def sparse_layers(self, stack: str) -> tuple[bool, ...]:
        """Return for each layer of a stack whether it has experts, by the rule of transformers.

        With n layers of which s are to be sparse, layer i is, counted from 0, if i is 1 modulo
        n // s; all are if that quotient is 1.  With s = 0 the quotient counts as n, so that the
        second layer is sparse after all.
        """
        layers = self.layers(stack)
        sparse = getattr(self, f"num_sparse_{stack}_layers")
        step = _step(layers, sparse)
        return tuple(step == 1 or layer % step == 1 for layer in range(layers))

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.gated:
            yield key_problem("switch_transformers has no gated blocks", "false", "true", "gated")
        if self.scale_outputs != self.tie_word_embeddings:
            what = (
                "switch_transformers scales its outputs if the embeddings are tied, and only then"
            )
            tied = str(self.tie_word_embeddings).lower()
            found = str(self.scale_outputs).lower()
            yield key_problem(what, tied, found, "tie_word_embeddings")
        if self.num_experts < 1:
            yield key_problem("too small", "at least 1", f"{self.num_experts}", "num_experts")
        if self.expert_capacity < 1:
            yield key_problem(
                "too small", "at least 1", f"{self.expert_capacity}", "expert_capacity"
            )
        for stack in STACKS:
            yield from self._pattern_checks(stack)

    def _pattern_checks(self, stack: str) -> Iterator[KeyProblem]:
        key = f"num_sparse_{stack}_layers"
        sparse, layers = getattr(self, key), self.layers(stack)
        if not 0 <= sparse <= layers:
            yield key_problem("not a number of layers", f"0 to {layers}", f"{sparse}", key)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        for key in ("add_cross_attention", "is_decoder"):
            reader.value(key)
        if reader.flag("router_bias"):
            reader.refuse("router_bias", "a router with a bias is not supported", expected="false")
        return {
            **values,
            "num_experts": reader.size("num_experts"),
            "expert_capacity": reader.size("expert_capacity"),
            **_read_pattern(reader, values),
            "hidden_act": read_activation(reader, "dense_act_fn"),
            "scale_outputs": values["tie_word_embeddings"],
            "router_jitter_noise": reader.number("router_jitter_noise", least=0),
            "router_aux_loss_coef": reader.number("router_aux_loss_coef", least=0),
        }

    def _write(self) -> dict[str, object]:
        return {
            **super()._write(),
            "num_experts": self.num_experts,
            "expert_capacity": self.expert_capacity,
            "num_sparse_encoder_layers": self.num_sparse_encoder_layers,
            "num_sparse_decoder_layers": self.num_sparse_decoder_layers,
            "dense_act_fn": T5_ACTIVATIONS[self.hidden_act],
            "router_bias": False,
            "router_dtype": "float32",
            "router_jitter_noise": self.router_jitter_noise,
            "router_aux_loss_coef": self.router_aux_loss_coef,
        }


def _step(layers: int, sparse: int) -> int:
    return layers // sparse if sparse else layers


def _read_pattern(reader: Reader, values: Json) -> dict[str, int]:
    """Return the number of sparse layers of each stack; a step that is also stated must agree."""
    found: dict[str, int] = {}
    for stack, depth in (("encoder", "num_hidden_layers"), ("decoder", "num_decoder_layers")):
        key, step = f"num_sparse_{stack}_layers", f"{stack}_sparse_step"
        found[key] = reader.size(key, smallest=0)
        expected = _step(values[depth], found[key])
        if reader.value(step) not in (None, expected) and key not in reader.bad:
            reader.refuse(step, f"contradicts {key}", expected=f"{expected}, or nothing")
    return found
