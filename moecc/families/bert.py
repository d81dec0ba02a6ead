"""bert, electra, albert, roberta and its namesakes, mpnet, distilbert, and clip's text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from moecc.families.config import (
    CAUSAL,
    BlockNames,
    EqualHeadsConfig,
    GgufFacts,
    PaddedPositionsConfig,
    activation,
    config_class,
    number,
    size,
)
from moecc.families.heads import CLASSIFIER, POOLER
from moecc.families.reader import (
    COUNT,
    EXTRA_DEFAULTS,
    LAYERS,
    LENGTH,
    WIDTH,
    KeyProblem,
    key_problem,
)
from moecc.families.shrinking import (
    SMALL_VOCAB,
    shrink_size,
)
from moecc.support.untyped import JsonDict

BERT_DEFAULTS: Mapping[str, object] = {
    **EXTRA_DEFAULTS,
    "vocab_size": 30_522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "pad_token_id": 0,
}


@config_class
class BertConfig(EqualHeadsConfig):
    """A bert without a head: its output is the hidden states of the last layer.

    `type_vocab_size` is 0 without token types; the first `position_offset` rows of the table of
    positions belong to no token.
    """

    graphs = "bert"
    model_type = "bert"
    architecture = "BertModel"
    with_heads = True
    takes_mask = True
    head_prefix = "bert."
    kept_numbers: ClassVar[tuple[str, ...]] = (
        *("initializer_range", "attention_probs_dropout_prob", "hidden_dropout_prob"),
    )
    only = {
        "is_decoder": (False, "an encoder that decodes is not supported"),
        "add_cross_attention": (False, "an encoder that decodes is not supported"),
        "position_embedding_type": ("absolute", "only learned absolute positions are supported"),
    }
    idle: ClassVar[tuple[str, ...]] = ("classifier_dropout", "gradient_checkpointing")
    always = {"position_embedding_type": "absolute"}
    names = BlockNames(
        embedding="embeddings.word_embeddings.weight",
        positions="embeddings.position_embeddings.weight",
        around=("embeddings.LayerNorm", ""),
        layer="encoder.layer.{layer}.",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        fc_in="intermediate.dense",
        fc_out="output.dense",
    )
    head_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "": POOLER,
        "MaskedLM": (
            "linear cls.predictions.transform.dense",
            "activation",
            "norm cls.predictions.transform.LayerNorm",
            "tokens cls.predictions.decoder cls.predictions.bias",
        ),
        "SequenceClassification": (*POOLER, CLASSIFIER),
        "TokenClassification": (CLASSIFIER,),
    }
    gguf: ClassVar[GgufFacts | None] = GgufFacts("bert", states=(("hidden_act", "gelu"),))
    defaults = BERT_DEFAULTS
    keys = {"word_width": ""}

    max_position_embeddings: int = size(LENGTH)
    type_vocab_size: int = size(COUNT, default=2)
    layer_norm_eps: float = number(least=0, default=1e-12)
    hidden_act: str = activation(default="gelu")
    position_offset: int = 0
    # The width of the tables of the embeddings; 0: that of the model.
    word_width: int = size(WIDTH, default=0)
    # Whether layers normalise what they read, not what they return; and see no later tokens.
    norms_first: ClassVar[bool] = False
    is_causal: ClassVar[bool] = False
    # The buckets of a table of biases by distance, 0 without one.
    relative_buckets: ClassVar[int] = 0

    @property
    def embedding_width(self) -> int:
        """The width of the tables of the embeddings."""
        return self.word_width or self.hidden_size

    @property
    def is_narrow(self) -> bool:
        """Whether a matrix leads from the embeddings to the width of the model."""
        return self.embedding_width != self.hidden_size

    def layer_name(self, layer: int) -> str:
        """Return the prefix of the tensors of a layer."""
        return self.names.layer.format(layer=layer)

    def is_global(self, layer: int) -> bool:
        """Whether a token of a layer sees all others."""
        return True

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of absolute positions."""
        return bool(self.names.positions)

    @property
    def has_types(self) -> bool:
        """Whether there is a table of token types."""
        return bool(self.key("type_vocab_size"))

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        sizes = super().small_sizes()
        positions = self.max_position_embeddings - self.position_offset
        is_narrow = self.embedding_width != self.hidden_size
        return {
            **self.small_vocabulary(),
            **sizes,
            # One more than the model's width, so that the two stay different.
            "word_width": sizes["hidden_size"] + 1 if is_narrow else 0,
            "max_position_embeddings": shrink_size(positions, SMALL_VOCAB) + self.position_offset,
        }

    @property
    def score_scale(self) -> float:
        """The factor on the attention scores."""
        return float(self.head_dim**-0.5)

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        if not 0 <= self.position_offset < self.max_position_embeddings:
            fault = "the table of positions has none for a token"
            expected = f"more than {self.position_offset}"
            keys = ("max_position_embeddings", "pad_token_id")
            yield key_problem(fault, expected, f"{self.max_position_embeddings}", *keys)


@config_class
class ElectraConfig(BertConfig):
    """An electra: a bert whose embeddings may be narrower, without a pooler."""

    model_type = "electra"
    architecture = "ElectraModel"
    head_prefix = "electra."
    head_steps = {
        "MaskedLM": (
            "linear generator_predictions.dense",
            "gelu",
            "norm generator_predictions.LayerNorm",
            "tokens generator_lm_head generator_lm_head.bias",
        ),
        "SequenceClassification": (
            "first",
            "linear classifier.dense",
            "gelu",
            "labels classifier.out_proj",
        ),
        "TokenClassification": (CLASSIFIER,),
    }
    keys = {"word_width": "embedding_size"}
    idle = (
        *BertConfig.idle,
        *("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"),
    )
    names = replace(BertConfig.names, narrow=("embeddings_project", ""))
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }

    def _write(self) -> JsonDict:
        return {**super()._write(), "embedding_size": self.embedding_width}


@config_class
class AlbertConfig(ElectraConfig):
    """An albert: the layers of a group are one layer, run again and again."""

    model_type = "albert"
    architecture = "AlbertModel"
    head_prefix = "albert."
    head_steps = {
        "": ("first", "linear pooler", "tanh"),
        "MaskedLM": (
            "linear predictions.dense",
            "activation",
            "norm predictions.LayerNorm",
            "tokens predictions.decoder predictions.bias",
        ),
        "SequenceClassification": ("first", "linear pooler", "tanh", CLASSIFIER),
        "TokenClassification": (CLASSIFIER,),
    }
    only = {"inner_group_num": (1, "groups of several different layers are not supported")}
    always = {"inner_group_num": 1}
    idle = (*BertConfig.idle, "classifier_dropout_prob")
    names = replace(
        BertConfig.names,
        layer="encoder.albert_layer_groups.{layer}.albert_layers.0.",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        norms=("attention.LayerNorm", "full_layer_layer_norm"),
        fc_in="ffn",
        fc_out="ffn_output",
        narrow=("encoder.embedding_hidden_mapping_in", ""),
    )
    defaults = {
        **BERT_DEFAULTS,
        "vocab_size": 30_000,
        "embedding_size": 128,
        "hidden_size": 4096,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
        "num_attention_heads": 64,
        "intermediate_size": 16_384,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }

    num_hidden_groups: int = size(LAYERS, default=1)
    is_narrow = True

    def layer_name(self, layer: int) -> str:
        """Return the prefix of the tensors of a layer, which are those of its group."""
        # As transformers rounds it.
        group = int(layer / (self.num_hidden_layers / self.num_hidden_groups))
        return self.names.layer.format(layer=group)


ROBERTA_HEADS: Mapping[str, tuple[str, ...]] = {
    "": POOLER,
    "MaskedLM": (
        "linear lm_head.dense",
        "gelu",
        "norm lm_head.layer_norm",
        "tokens lm_head.decoder lm_head.bias",
    ),
    "SequenceClassification": (
        "first",
        "linear classifier.dense",
        "tanh",
        "labels classifier.out_proj",
    ),
    "TokenClassification": (CLASSIFIER,),
}


@config_class
class RobertaConfig(PaddedPositionsConfig, BertConfig):
    """A roberta: positions count from behind that of the padding token."""

    model_type = "roberta"
    architecture = "RobertaModel"
    head_prefix = "roberta."
    head_steps = ROBERTA_HEADS
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "vocab_size": 50_265,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


@config_class
class XlmRobertaConfig(RobertaConfig):
    """An xlm-roberta: a roberta of many languages, under another name."""

    model_type = "xlm-roberta"
    architecture = "XLMRobertaModel"
    defaults = {**RobertaConfig.defaults, "vocab_size": 30_522}


@config_class
class XlmRobertaXlConfig(RobertaConfig):
    """An xlm-roberta-xl: layers normalise what they read, and the embeddings have no norm."""

    model_type = "xlm-roberta-xl"
    architecture = "XLMRobertaXLModel"
    names = replace(
        BertConfig.names,
        around=("", "encoder.LayerNorm"),
        norms=("attention.self_attn_layer_norm", "LayerNorm"),
    )
    defaults = {
        **RobertaConfig.defaults,
        "vocab_size": 250_880,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    norms_first = True


@config_class
class CamembertConfig(RobertaConfig):
    """A camembert: a roberta of French, under another name."""

    model_type = "camembert"
    architecture = "CamembertModel"
    defaults = {**RobertaConfig.defaults, "vocab_size": 30_522}


BUCKETS = "relative_attention_num_buckets"


@config_class
class MPNetConfig(BertConfig):
    """An mpnet: biases of the scores by distance, the same in all layers, and no token types."""

    model_type = "mpnet"
    architecture = "MPNetModel"
    head_prefix = "mpnet."
    head_steps = ROBERTA_HEADS
    keys = {"type_vocab_size": ""}
    only = {
        BUCKETS: (32, "transformers computes with 32 buckets whatever the config says"),
        "pad_token_id": (1, "transformers counts positions from token 1 whatever the config says"),
    }
    always = {BUCKETS: 32, "pad_token_id": 1}
    names = replace(
        BertConfig.names,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        output="attention.attn.o",
        norms=("attention.LayerNorm", "output.LayerNorm"),
    )
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "vocab_size": 30_527,
        BUCKETS: 32,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    relative_buckets = 32

    type_vocab_size: int = size(COUNT, default=0)
    position_offset: int = 2


@config_class
class DistilBertConfig(BertConfig):
    """A distilbert: a bert without token types and pooler, whose keys have names of their own."""

    model_type = "distilbert"
    architecture = "DistilBertModel"
    head_prefix = "distilbert."
    head_steps = {
        "MaskedLM": (
            "linear vocab_transform",
            "activation",
            "norm vocab_layer_norm",
            "tokens vocab_projector vocab_projector.bias",
        ),
        "SequenceClassification": ("first", "linear pre_classifier", "relu", CLASSIFIER),
        "TokenClassification": (CLASSIFIER,),
    }
    kept_numbers = ("initializer_range", "attention_dropout", "dropout")
    keys = {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "hidden_act": "activation",
        "type_vocab_size": "",
        "layer_norm_eps": "",
    }
    synonyms = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    only = {"layer_norm_eps": (1e-12, "transformers computes with 1e-12 whatever the config says")}
    # The table is stored, whatever it was made from, and heads are no part of the graph.
    idle = (
        *BertConfig.idle,
        "sinusoidal_pos_embds",
        "qa_dropout",
        "seq_classif_dropout",
        "tie_weights_",
    )
    names = replace(
        BertConfig.names,
        layer="transformer.layer.{layer}.",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        norms=("sa_layer_norm", "output_layer_norm"),
        fc_in="ffn.lin1",
        fc_out="ffn.lin2",
    )
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "activation": "gelu",
        "attention_dropout": 0.1,
        "dropout": 0.1,
    }

    type_vocab_size: int = size(COUNT, default=0)


@config_class
class ClipTextConfig(BertConfig):
    """The tower of text of a clip: a decoder without a head, whose layers normalise first."""

    model_type = "clip_text_model"
    architecture = "CLIPTextModel"
    base_prefix = "text_model."
    tower_prefix = "text_model."
    head_prefix = ""
    head_steps: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    kept_numbers = ("initializer_range", "attention_dropout")
    keys = {"type_vocab_size": ""}
    only = {**CAUSAL}
    # Of training, and of heads.
    idle = (*BertConfig.idle, "initializer_factor", "projection_dim", "dropout")
    names = BlockNames(
        embedding="text_model.embeddings.token_embedding.weight",
        positions="text_model.embeddings.position_embedding.weight",
        around=("", "text_model.final_layer_norm"),
        layer="text_model.encoder.layers.{layer}.",
        norms=("layer_norm1", "layer_norm2"),
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        fc_in="mlp.fc1",
        fc_out="mlp.fc2",
    )
    gguf = None
    defaults = {
        **BERT_DEFAULTS,
        "vocab_size": 49_408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 49_406,
        "eos_token_id": 49_407,
    }
    norms_first = True
    is_causal = True

    type_vocab_size: int = size(COUNT, default=0)
