"""st_moe: moecc's own family, for models that no family of Hugging Face can express.

A checkpoint has one of two layouts.  The typed one is an ST-MoE: an encoder-decoder of T5's
shape with experts in chosen layers.  The general one holds the graph itself, line by line, and its
tensors are named after the graph's parameters; any rewritten graph can be stored that way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from moecc.families.config import FAMILY, ModelConfig, choice, config_class, number, size
from moecc.families.encdec import ENCDEC_DEFAULTS, STACKS, EncDecConfig, Experts
from moecc.families.reader import COUNT, TOKEN_KEYS, VOCABULARY, KeyProblem, Reader, key_problem
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.ir.conventions import Gates


@config_class
class StMoeConfig(EncDecConfig):
    """An ST-MoE (Zoph et al. 2022): top-k experts in chosen layers of encoder and decoder.

    `train_capacity_factor` and `eval_capacity_factor` are those of the paper, slots of an expert
    over tokens per expert; the graph is built with the second.  0 means no bound.
    """

    model_type = FAMILY
    architecture = "StMoeForConditionalGeneration"
    stacks_experts = True
    keys = {"experts_per_token": "num_experts_per_tok"}
    names = replace(EncDecConfig.names, dense="mlp.")
    defaults = {
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

    num_experts: int = size(COUNT)
    experts_per_token: int = size(COUNT, default=2)
    gates: Gates = choice(("renormalised", "softmax"), default="renormalised")
    sparse_encoder_layers: tuple[int, ...] = ()
    sparse_decoder_layers: tuple[int, ...] = ()
    extra_ffn: str = choice(("none", "before", "after"), default="none")
    train_capacity_factor: float = number(least=0, default=0.0)
    eval_capacity_factor: float = number(least=0, default=0.0)

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
        sparse = set(getattr(self, f"sparse_{stack}_layers"))
        return tuple(layer in sparse for layer in range(self.layers(stack)))

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values."""
        yield from super().checks()
        if not 1 <= self.experts_per_token <= self.num_experts:
            fault, chosen = "a token cannot choose that many experts", f"{self.experts_per_token}"
            keys = ("num_experts_per_tok", "num_experts")
            yield key_problem(fault, f"1 to {self.num_experts}", chosen, *keys)
        for stack in STACKS:
            key = f"sparse_{stack}_layers"
            layers, last = getattr(self, key), self.layers(stack) - 1
            outside = [n for n in layers if not 0 <= n <= last]
            if outside or tuple(sorted(set(layers))) != layers:
                fault = "not ascending layers of the stack"
                yield key_problem(fault, f"0 to {last}", f"{layers[:8]}", key)

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        keys = [f"sparse_{stack}_layers" for stack in STACKS]
        return super()._read(reader) | {key: reader.whole_numbers(key) for key in keys}

    def _write(self) -> JsonDict:
        sparse = {f"sparse_{s}_layers": list(getattr(self, f"sparse_{s}_layers")) for s in STACKS}
        return {**super()._write(), **sparse}


LAYOUT = 1
"""The version of the general layout."""


PROGRAM_CLASSES = (
    "StMoeModel",
    "StMoeForCausalLM",
    "StMoeForConditionalGeneration",
    "StMoeForSequenceClassification",
    "StMoeForTokenClassification",
    "StMoeForImageClassification",
    "StMoeForMaskedLM",
    "StMoeForAudioClassification",
    "StMoeForCTC",
)
"""The classes of the programs that are written beside a graph."""


@config_class
class GraphConfig(ModelConfig):
    """The general layout of st_moe: the lines of a graph whose parameters are the tensors."""

    model_type = FAMILY
    architecture = "StMoeGraph"
    graphs = "stored"
    own_code = True  # the file that `emit` writes; the graph is read, and never the file
    aliases = PROGRAM_CLASSES
    takes_mask = True
    head_prefix = "model."
    only = {"moecc_layout": (LAYOUT, "written by another version of moecc")}
    always = {"moecc_layout": LAYOUT}
    kept_numbers = ()
    defaults = dict.fromkeys(TOKEN_KEYS) | {"use_cache": True, "moecc_layout": LAYOUT}

    # A graph may take no tokens.
    vocab_size: int = size(VOCABULARY, least=0, default=0)
    lines: tuple[str, ...]

    @classmethod
    def shape(cls) -> type[ModelConfig]:
        """Return the class whose fields all families of this shape of model share."""
        return GraphConfig

    @property
    def first_tensor(self) -> str:
        """The name of the first parameter of the graph."""
        lines = (line.split() for line in self.lines)
        return next((words[1][1:] for words in lines if words[:1] == ["param"]), "")

    @property
    def text(self) -> str:
        """The graph."""
        return "\n".join(self.lines) + "\n"

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        items = reader.items("graph")
        lines = tuple(line for line in items if isinstance(line, str))
        if len(lines) != len(items) or not lines:
            reader.refuse("graph", "not the lines of a graph", expected="a list of texts")
        return {**super()._read(reader), "lines": lines}

    def _write(self) -> JsonDict:
        return {**super()._write(), "graph": list(self.lines)}
