"""The tensor names of each family on disk.

One table per family, as transformers writes and reads it.  Names of experts are those of one expert
each, the layout that every runtime reads; transformers 5 can also write the experts of a layer in
one tensor, and those names are the same in every family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a model's tensors; a layer's are relative to `layer`.

    Attributes:
      embedding: the token embedding, ``[vocab, embed]``; of images, the token of the whole.
      final_norm: the scale of the last norm.
      head: the output matrix, if it is not the embedding.
      layer: the prefix of a layer's tensors.
      dense: the prefix of a dense feed-forward block.
      sparse: the prefix of a mixture of experts.
      router: the router's matrix, after `sparse`.
      expert: the prefix of one expert, after `sparse`.
      stack: the prefix of the stacked experts as the graph calls them, after `sparse`.
      gate, up, down: the three matrices of an expert.
      single: the first matrix if there is no gate; empty if it has the name of `up`.
      qkv: the one matrix of queries, keys and values, in this order; empty if there are three.
      gate_up: the one matrix of gate and up, in this order; empty if there are two.
      copies: further names of the embedding, which some files contain and transformers may expect.
      shared: the prefix of a shared expert, after `sparse`.
      shared_gate: the shared expert's gate, ``[1, embed]``, after `sparse`.
      routing_bias: the bias in the choice of experts, ``[expert]``, after `sparse`.
      routing_bias_rows: whether that has a first axis of size 1 on disk.
      expert_gate_up, expert_down: tensors of all experts of a layer, gate and up in one, after
        `sparse`; empty if every expert has its own.
      pairs_neighbours: whether rows of queries and keys are ordered on disk so that the rotary
        embedding rotates neighbours.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    dense: str = "mlp."
    sparse: str = "mlp."
    router: str = "gate.weight"
    expert: str = "experts.{expert}."
    stack: str = "experts."
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert."
    shared_gate: str = "shared_expert_gate.weight"
    single: str = ""
    qkv: str = ""
    gate_up: str = ""
    copies: tuple[str, ...] = ()
    routing_bias: str = "gate.e_score_correction_bias"
    routing_bias_rows: bool = False
    expert_gate_up: str = ""
    expert_down: str = ""
    pairs_neighbours: bool = False

    def matrix(self, name: str, is_gated: bool = True) -> str:
        """Return the name of the matrix ``gate``, ``up`` or ``down`` of an expert."""
        if name == "up" and not is_gated:
            return self.single or self.up
        found: str = getattr(self, name)
        return found


FUSED_ROUTER = "mlp.gate.weight"
FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_DOWN = "mlp.experts.down_proj"
"""The in-memory names of transformers 5, which some tools write to disk unchanged."""

DEFAULT = TensorNames()

_T5 = TensorNames(
    embedding="shared.weight",
    dense="DenseReluDense.",
    sparse="mlp.",
    router="router.classifier.weight",
    expert="experts.expert_{expert}.",
    gate="wi_0",
    up="wi_1",
    single="wi",
    down="wo",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)

_BERT = TensorNames(embedding="embeddings.word_embeddings.weight")

NAMES: dict[str, TensorNames] = {
    "mixtral": TensorNames(sparse="block_sparse_moe.", gate="w1", up="w3", down="w2"),
    "granitemoe": TensorNames(
        sparse="block_sparse_moe.",
        router="router.layer.weight",
        expert_gate_up="input_linear.weight",
        expert_down="output_linear.weight",
    ),
    "glm4_moe": TensorNames(shared="shared_experts."),
    "gpt_oss": TensorNames(
        router="router.weight",
        expert_gate_up="experts.gate_up_proj",
        expert_down="experts.down_proj",
    ),
    "phimoe": TensorNames(sparse="block_sparse_moe.", gate="w1", up="w3", down="w2"),
    "ernie4_5_moe": TensorNames(
        shared="shared_experts.",
        routing_bias="moe_statics.e_score_correction_bias",
        routing_bias_rows=True,
        pairs_neighbours=True,
    ),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "switch_transformers": replace(_T5, dense="mlp."),
    "st_moe": replace(_T5, dense="mlp."),
    "phi3": TensorNames(qkv="qkv_proj", gate_up="gate_up_proj"),
    "gpt2": TensorNames(embedding="transformer.wte.weight"),
    "opt": TensorNames(embedding="model.decoder.embed_tokens.weight"),
    "gpt_neox": TensorNames(embedding="gpt_neox.embed_in.weight", head="embed_out.weight"),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "mpnet": _BERT,
    "distilbert": _BERT,
    "vit": TensorNames(embedding="embeddings.cls_token"),
    "dinov2": TensorNames(embedding="embeddings.cls_token"),
    "whisper": TensorNames(embedding="model.decoder.embed_tokens.weight", head="proj_out.weight"),
}
"""The tables by model type; a family not listed has the default names."""


def names_of(family: str) -> TensorNames:
    """Return the table of a family."""
    return NAMES.get(family, DEFAULT)
