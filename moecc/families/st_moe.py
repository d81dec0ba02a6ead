"""st_moe: moecc's own family, for models that no family of Hugging Face can express.

A checkpoint has one of two layouts.  The typed one is an ST-MoE: an encoder-decoder of T5's
shape with experts in chosen layers.  The general one holds the graph itself, line by line, and its
tensors are named after the graph's parameters; any rewritten graph can be stored that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from moecc.families.config import ModelConfig, config_class
from moecc.families.encdec import ENCDEC_DEFAULTS, STACKS, EncDecConfig, Experts, read_activation
from moecc.families.reader import TOKEN_KEYS, KeyProblem, Reader, key_problem, one_of
from moecc.ir.conventions import Gates

FAMILY = "st_moe"
EXTRA_FFN = ("none", "before", "after")
GATES = ("renormalised", "softmax")


@config_class
class StMoeConfig(EncDecConfig):
    """An ST-MoE (Zoph et al. 2022): top-k experts in chosen layers of encoder and decoder.

    `train_capacity_factor` and `eval_capacity_factor` are those of the paper, slots of an expert
    over tokens per expert; the graph is built with the second.  0 means no bound.
    """

    model_type: ClassVar[str] = FAMILY
    architecture: ClassVar[str] = "StMoeForConditionalGeneration"
    defaults: ClassVar[Mapping[str, object]] = {
        **ENCDEC_DEFAULTS,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "scale_decoder_outputs": None,
        "num_experts": 32,
        "num_experts_per_tok": 2,
        "gates": "renormalised",
        "sparse_encoder_layers": (),
        "sparse_decoder_layers": (),
        "extra_ffn": "none",
        "train_capacity_factor": 0.0,
        "eval_capacity_factor": 0.0,
    }

    num_experts: int
    experts_per_token: int = 2
    gates: Gates = "renormalised"
    sparse_encoder_layers: tuple[int, ...] = ()
    sparse_decoder_layers: tuple[int, ...] = ()
    extra_ffn: str = "none"
    train_capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0

    @property
    def experts(self) -> Experts:
        """The experts of the sparse layers."""
        return Experts(
            count=self.num_experts,
            top_k=self.experts_per_token,
            gates=self.gates,
            capacity_factor=self.eval_capacity_factor,
            extra_ffn=self.extra_ffn,
        )

    def sparse_layers(self, stack: str) -> tuple[bool, ...]:
        """Return for each layer of a stack whether it has experts."""
        chosen = set(getattr(self, f"sparse_{stack}_layers"))
        return tuple(layer in chosen for layer in range(self.layers(stack)))

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values."""
        yield from super().checks()
        if not 1 <= self.experts_per_token <= self.num_experts:
            what, found = "a token cannot choose that many experts", f"{self.experts_per_token}"
            keys = ("num_experts_per_tok", "num_experts")
            yield key_problem(what, f"1 to {self.num_experts}", found, *keys)
        for key, choices in (("extra_ffn", EXTRA_FFN), ("gates", GATES)):
            if getattr(self, key) not in choices:
                yield key_problem("not supported", one_of(choices), f"{getattr(self, key)}", key)
        for stack in STACKS:
            key = f"sparse_{stack}_layers"
            layers, last = getattr(self, key), self.layers(stack) - 1
            wrong = [n for n in layers if not 0 <= n <= last]
            if wrong or tuple(sorted(set(layers))) != layers:
                what = "not ascending layers of the stack"
                yield key_problem(what, f"0 to {last}", f"{layers[:8]}", key)
        for key in ("train_capacity_factor", "eval_capacity_factor"):
            if getattr(self, key) < 0:
                yield key_problem("negative", "at least 0", f"{getattr(self, key)}", key)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = super()._read(reader)
        stated = reader.value("scale_decoder_outputs") is not None
        tied = values["tie_word_embeddings"]
        return {
            **values,
            "hidden_act": read_activation(reader, "dense_act_fn"),
            "gated": reader.flag("is_gated_act"),
            "scale_outputs": reader.flag("scale_decoder_outputs") if stated else tied,
            "num_experts": reader.size("num_experts"),
            "experts_per_token": reader.size("num_experts_per_tok"),
            "gates": reader.choice("gates", GATES),
            "extra_ffn": reader.choice("extra_ffn", EXTRA_FFN),
            "sparse_encoder_layers": _layers(reader, "sparse_encoder_layers"),
            "sparse_decoder_layers": _layers(reader, "sparse_decoder_layers"),
            "train_capacity_factor": reader.number("train_capacity_factor", least=0),
            "eval_capacity_factor": reader.number("eval_capacity_factor", least=0),
        }

    def _write(self) -> dict[str, object]:
        return {
            **super()._write(),
            "dense_act_fn": self.hidden_act,
            "is_gated_act": self.gated,
            "scale_decoder_outputs": self.scale_outputs,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "gates": self.gates,
            "extra_ffn": self.extra_ffn,
            "sparse_encoder_layers": list(self.sparse_encoder_layers),
            "sparse_decoder_layers": list(self.sparse_decoder_layers),
            "train_capacity_factor": self.train_capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
        }


def _layers(reader: Reader, key: str) -> tuple[int, ...]:
    found = reader.items(key)
    layers = tuple(layer for layer in found if type(layer) is int)
    if len(layers) != len(found):
        reader.refuse(key, "not a list of layer numbers", expected="whole numbers")
    return layers


LAYOUT = 1
"""The version of the general layout."""


@config_class
class GraphConfig(ModelConfig):
    """The general layout of st_moe: the lines of a graph whose parameters are the tensors."""

    model_type: ClassVar[str] = FAMILY
    takes_mask: ClassVar[bool] = True
    # A graph may take no tokens.
    least_vocabulary: ClassVar[int] = 0
    architecture: ClassVar[str] = "StMoeGraph"
    kept_numbers: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, object]] = dict.fromkeys(TOKEN_KEYS) | {
        "use_cache": True,
        "moecc_layout": LAYOUT,
    }

    lines: tuple[str, ...]

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return GraphConfig

    @property
    def text(self) -> str:
        """The graph."""
        return "\n".join(self.lines) + "\n"

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        if reader.value("moecc_layout") != LAYOUT:
            what = "written by another version of moecc"
            reader.refuse("moecc_layout", what, expected=str(LAYOUT))
        found = reader.items("graph")
        lines = tuple(line for line in found if isinstance(line, str))
        if len(lines) != len(found) or not lines:
            reader.refuse("graph", "not the lines of a graph", expected="a list of texts")
        return {**super()._read(reader), "lines": lines}

    def _write(self) -> dict[str, object]:
        return {"moecc_layout": LAYOUT, "graph": list(self.lines)}
