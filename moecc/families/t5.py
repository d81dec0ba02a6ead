"""t5: version 1.0 (ReLU, tied) and 1.1 (gated GELU, an output matrix), mt5, umt5 and switch."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Self

from moecc.families.config import ACTIVATIONS, config_class, flag, number, size
from moecc.families.encdec import ENCDEC_DEFAULTS, STACKS, T5_ACTIVATIONS, EncDecConfig, Experts
from moecc.families.mixture import TRANSFORMERS
from moecc.families.reader import COUNT, LAYERS, LENGTH, KeyProblem, Reader, key_problem, one_of
from moecc.support.untyped import JsonDict

GATED = "gated-"


@config_class
class T5Config(EncDecConfig):
    """A t5.

    transformers infers version 1.1 from ``tie_word_embeddings: false``; its outputs are
    not scaled.  Version 5 then writes ``scale_decoder_outputs`` for it, and true for the tie
    whether or not there is an output matrix, so an importer looks for that tensor.
    """

    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    aliases: ClassVar[tuple[str, ...]] = ("T5WithLMHeadModel",)
    keys = {"hidden_act": "", "gated": ""}
    synonyms = {**EncDecConfig.synonyms, "head_dim": "d_kv"}
    idle: ClassVar[tuple[str, ...]] = ("is_decoder",)
    defaults: ClassVar[Mapping[str, object]] = {
        **ENCDEC_DEFAULTS,
        "feed_forward_proj": "relu",
        "scale_decoder_outputs": None,
    }

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.scale_outputs and not self.tie_word_embeddings:
            family = self.model_type
            fault = f"{family} scales its outputs only where the output matrix is the embedding"
            keys = ("scale_decoder_outputs", "tie_word_embeddings")
            yield key_problem(fault, "false", "true", *keys)
        stating = ("feed_forward_proj", "dense_act_fn", "is_gated_act")
        if self.gated and self.hidden_act == "gelu":
            fault = f"{self.model_type} gates with the tanh approximation of GELU"
            yield key_problem(fault, "gelu_pytorch_tanh", "gelu", *stating)
        yield from _unknown_activation(self, *stating)

    def fitted(self, tensors: Container[str]) -> Self:
        """Return the config with the embedding tie that transformers 5 applies.

        It ties unless outputs are not scaled and the file has an output matrix.
        """
        if self.scale_outputs or self.names.head not in tensors:
            return self
        return replace(self, tie_word_embeddings=False)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values, stated = super()._read(reader), reader.value("feed_forward_proj")
        gated = isinstance(stated, str) and stated.startswith(GATED)
        name = stated.removeprefix(GATED) if isinstance(stated, str) else ""
        if name not in ACTIVATIONS:
            expected = f"{one_of(ACTIVATIONS)}, or gated- before it"
            reader.refuse("feed_forward_proj", "not supported", expected=expected)
            name, gated = "relu", False
        # In transformers gated-gelu is the tanh approximation, and plain gelu the error function.
        act = "gelu_pytorch_tanh" if gated and name == "gelu" else ACTIVATIONS[name]
        # transformers derives these two from the projection, and takes those that are stated.
        if reader.has("dense_act_fn"):
            act = ACTIVATIONS[reader.choice("dense_act_fn", ACTIVATIONS)]
        if reader.has("is_gated_act"):
            gated = reader.flag("is_gated_act")
        return {**values, "hidden_act": act, "gated": gated}

    def _write(self) -> JsonDict:
        act = T5_ACTIVATIONS[self.hidden_act]
        projection = f"{GATED}{act.replace('gelu_new', 'gelu')}" if self.gated else act
        return {**super()._write(), "feed_forward_proj": projection}


def _unknown_activation(config: EncDecConfig, *stating: str) -> Iterator[KeyProblem]:
    if config.hidden_act not in T5_ACTIVATIONS:
        expected = one_of(T5_ACTIVATIONS)
        yield key_problem("unknown activation", expected, config.hidden_act, *stating)


_MANY_LANGUAGES: Mapping[str, object] = {
    **T5Config.defaults,
    "vocab_size": 250_112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}


@config_class
class MT5Config(T5Config):
    """An mt5: a t5 of version 1.1, of many languages, whose outputs are never scaled.

    Version 4 scales those of a config that says that the matrices are tied, which no published
    checkpoint does; version 5 writes so for every model, and scales none.
    """

    model_type = "mt5"
    architecture = "MT5ForConditionalGeneration"
    aliases = ()
    defaults = {**_MANY_LANGUAGES, "tie_word_embeddings": False}

    scale_outputs: bool = flag(null=lambda values: False, default=False)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.scale_outputs:
            yield key_problem("mt5 scales no outputs", "false", "true", "scale_decoder_outputs")


@config_class
class UMT5Config(T5Config):
    """A umt5: a t5 of many languages, with biases by distance of its own in every layer."""

    model_type = "umt5"
    architecture = "UMT5ForConditionalGeneration"
    aliases = ()
    # The second key is of the training code; transformers does not read it.
    idle = ("is_decoder", "scalable_attention")
    defaults = _MANY_LANGUAGES
    biases_of_layers = True


# switch_transformers: a T5 with sparse layers in which each token goes to one expert.

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
    model_type = "switch_transformers"
    architecture = "SwitchTransformersForConditionalGeneration"
    keys = {"gated": "", "scale_outputs": ""}
    only = {"router_bias": (False, "a router with a bias is not supported")}
    idle = ("add_cross_attention", "is_decoder")
    always = {"router_bias": False, "router_dtype": "float32"}
    names = replace(EncDecConfig.names, dense="mlp.")
    engines = TRANSFORMERS
    defaults = {
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

    num_experts: int = size(COUNT)
    expert_capacity: int = size(LENGTH, default=UNBOUNDED)
    num_sparse_encoder_layers: int = size(LAYERS, least=0, default=3)
    num_sparse_decoder_layers: int = size(LAYERS, least=0, default=3)
    router_jitter_noise: float = number(least=0, default=0.0)
    router_aux_loss_coef: float = number(least=0, default=0.001)

    @property
    def experts(self) -> Experts:
        """The experts of the sparse layers."""
        bound = self.expert_capacity if self.expert_capacity < UNBOUNDED else 0
        return Experts(count=self.num_experts, sequence_capacity=bound)

    @property
    def expert_blocks(self) -> int:
        """The number of the experts of all layers."""
        return self.num_experts * sum(sum(self.sparse_layers(stack)) for stack in STACKS)

    def sparse_layers(self, stack: str) -> tuple[bool, ...]:
        """Return for each layer of a stack whether it has experts, see `spread_layers`."""
        return spread_layers(self.layers(stack), getattr(self, f"num_sparse_{stack}_layers"))

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from _unknown_activation(self, "dense_act_fn")
        if self.gated:
            yield key_problem("switch_transformers has no gated blocks", "false", "true", "gated")
        if self.scale_outputs != self.tie_word_embeddings:
            fault = (
                "switch_transformers scales its outputs if the embeddings are tied, and only then"
            )
            shown = [f"{v}".lower() for v in (self.tie_word_embeddings, self.scale_outputs)]
            yield key_problem(fault, *shown, "tie_word_embeddings")
        for stack in STACKS:
            key, layers = f"num_sparse_{stack}_layers", self.layers(stack)
            sparse = getattr(self, key)
            if sparse > layers:
                yield key_problem("not a number of layers", f"0 to {layers}", f"{sparse}", key)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        for stack, depth in zip(STACKS, ("num_hidden_layers", "num_decoder_layers"), strict=True):
            key, step = f"num_sparse_{stack}_layers", f"{stack}_sparse_step"
            expected = _step(values[depth], values[key])
            if reader.value(step) not in (None, expected) and key not in reader.bad:
                fault = f"contradicts {key} and {cls.key(depth)}"
                reader.refuse(step, fault, expected=f"{expected}, or nothing")
        return {**values, "scale_outputs": values["tie_word_embeddings"]}

    def _write(self) -> JsonDict:
        return {**super()._write(), "dense_act_fn": T5_ACTIVATIONS[self.hidden_act]}


def spread_layers(layers: int, sparse: int) -> tuple[bool, ...]:
    """Return for each of so many layers whether transformers makes it sparse.

    With n layers of which s are to be sparse, layer i is, counted from 0, if i is 1 modulo
    n // s; all are if that quotient is 1.  With s = 0 the quotient counts as n, so that the
    second layer is sparse after all.
    """
    step = _step(layers, sparse)
    return tuple(step == 1 or layer % step == 1 for layer in range(layers))


def _step(layers: int, sparse: int) -> int:
    return layers // sparse if sparse else layers
