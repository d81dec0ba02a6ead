"""modernbert: rotary positions, gated blocks, and windows in all but every few layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moecc.families.bert import BERT_DEFAULTS, BertConfig
from moecc.families.config import FILLED, BlockNames, choice, config_class, flag, number, size
from moecc.families.reader import COUNT, LAYERS, LENGTH, KeyProblem, Reader, as_number, key_problem
from moecc.support.untyped import JsonDict

KINDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
"""The kinds of layers, and the key of the base of their rotary positions in transformers 4."""

EVERY = "global_attn_every_n_layers"


@config_class
class ModernBertConfig(BertConfig):
    """A modernbert; a token of a layer with a window sees half of it on either side.

    Layer 0 and every `global_every`-th after it see all tokens.
    """

    model_type = "modernbert"
    architecture = "ModernBertModel"
    head_prefix = "model."
    kept_numbers = (
        *("initializer_range", "initializer_cutoff_factor", "attention_dropout"),
        *("embedding_dropout", "mlp_dropout", "classifier_dropout"),
    )
    keys = {
        "type_vocab_size": "",
        "layer_norm_eps": "norm_eps",
        "hidden_act": "hidden_activation",
        "window": "local_attention",
        "global_every": EVERY,
    }
    only = {
        **FILLED,
        "sliding_window": (None, "transformers 5 takes it for half of local_attention"),
        "rope_scaling": (None, "only plain rotary positions are supported"),
        "tie_word_embeddings": (True, "only a head that is the table of tokens is supported"),
    }
    # Of training, and the name of `norm_eps` elsewhere, which published files state beside it.
    idle = (
        *BertConfig.idle,
        "layer_norm_eps",
        *("sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn"),
        *("reference_compile", "repad_logits_with_grad"),
    )
    names = BlockNames(
        embedding="embeddings.tok_embeddings.weight",
        around=("embeddings.norm", "final_norm"),
        layer="layers.{layer}.",
        norms=("attn_norm", "mlp_norm"),
        qkv="attn.Wqkv",
        query="attn.Wqkv.q",
        key="attn.Wqkv.k",
        value="attn.Wqkv.v",
        output="attn.Wo",
        fc_in="",
        fc_out="",
        gate="gate",
        up="up",
        gate_up="mlp.Wi",
        gated_out="mlp.Wo",
    )
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "vocab_size": 50_368,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "initializer_cutoff_factor": 2.0,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "classifier_dropout": 0.0,
        EVERY: 3,
        "local_attention": 128,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "decoder_bias": True,
        "classifier_pooling": "cls",
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "tie_word_embeddings": True,
        "pad_token_id": 50_283,
        "bos_token_id": 50_281,
        "eos_token_id": 50_282,
        "cls_token_id": 50_281,
        "sep_token_id": 50_282,
    }
    norms_first = True

    type_vocab_size: int = size(COUNT, default=0)
    window: int = size(LENGTH, least=0, default=128)
    global_every: int = size(LAYERS, default=3)
    global_rope_theta: float = number(above=0, default=160_000.0)
    local_rope_theta: float = number(above=0, default=10_000.0)
    norm_bias: bool = flag(default=False)
    attention_bias: bool = flag(default=False)
    mlp_bias: bool = flag(default=False)
    # Of heads.
    decoder_bias: bool = flag(default=True)
    classifier_bias: bool = flag(default=False)
    classifier_pooling: str = choice(("cls", "mean"), default="cls")
    classifier_activation: str = choice(("gelu", "relu", "tanh"), default="gelu")

    def is_global(self, layer: int) -> bool:
        """Whether a token of a layer sees all others."""
        return layer % self.global_every == 0

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if self.num_attention_heads > 0 and self.head_dim % 2:
            keys = ("hidden_size", "num_attention_heads")
            yield key_problem(
                "a head is rotated in halves", "an even width", f"{self.head_dim}", *keys
            )

    def stated_heads(self) -> Mapping[str, tuple[str, ...]]:
        """Return the heads that files may hold, by their tasks."""
        norm = "norm head.norm" if self.norm_bias else "norm-unbiased head.norm"
        dense = "linear head.dense" if self.classifier_bias else "linear-unbiased head.dense"
        steps = (dense, self.classifier_activation, norm)
        pooled = "first" if self.classifier_pooling == "cls" else "mean"
        heads = {
            "SequenceClassification": (pooled, *steps, "labels classifier"),
            "TokenClassification": (*steps, "labels classifier"),
        }
        if self.decoder_bias:
            heads["MaskedLM"] = (*steps, "tokens decoder decoder.bias")
        return heads

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        for kind, key in KINDS.items():
            parameters = reader.mapping("rope_parameters") or {}
            stated = parameters.get(kind)
            if stated is None:
                continue
            keys = dict(stated) if isinstance(stated, Mapping) else {"": 0}
            theta = as_number(keys.pop("rope_theta", values[key]))
            plain = keys.pop("rope_type", "default") == "default" and not keys
            if not plain or theta is None or theta <= 0:
                fault = "only plain rotary positions are supported"
                reader.refuse(
                    "rope_parameters", fault, expected="a rope_theta of each kind of layer"
                )
            elif reader.has(key) and theta != values[key]:
                reader.conflict(("rope_parameters", key), "transformers 4 and 5 read another base")
            else:
                values[key] = theta
        values[EVERY_FIELD] = cls._every(reader, values)
        return values

    @classmethod
    def _every(cls, reader: Reader, values: JsonDict) -> int:
        """Return every how many layers there is no window, as either version reads it."""
        kinds = reader.items("layer_types")
        every: int = values[EVERY_FIELD]
        if not kinds:
            return every
        spans = [n for n, kind in enumerate(kinds) if kind == "full_attention"]
        step = spans[1] if len(spans) > 1 else len(kinds)
        if reader.has(EVERY):
            step = every
        expected = _kinds(values["num_hidden_layers"], step)
        if list(kinds) != expected:
            reader.refuse(
                "layer_types",
                "transformers 4 has layers that see all tokens every few layers, from the first on",
                expected=f"{expected}" if len(expected) < 9 else "such layers",
            )
        return step

    def _write(self) -> JsonDict:
        return {
            **super()._write(),
            "layer_types": _kinds(self.num_hidden_layers, self.global_every),
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": getattr(self, key)}
                for kind, key in KINDS.items()
            },
        }


EVERY_FIELD = "global_every"


def _kinds(layers: int, every: int) -> list[str]:
    full, local = KINDS
    return [local if layer % every else full for layer in range(layers)]
