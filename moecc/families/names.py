"""What each family calls its tensors on disk.

One table a family, as transformers writes and reads it.  Names of experts are those of one expert
each, the layout that every runtime reads; transformers 5 can also write the experts of a layer in
one tensor, and those names are the same in every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a decoder's tensors; a layer's are relative to `layer`.

    Attributes:
      embedding: the token embedding, ``[vocab, embed]``.
      final_norm: the scale of the last norm.
      head: the output matrix, where it is not the embedding.
      layer: the prefix of a layer's tensors.
      dense: the prefix of a dense feed-forward block.
      sparse: the prefix of a mixture of experts.
      router: the router's matrix, after `sparse`.
      expert: the prefix of one expert, after `sparse`.
      stack: the prefix of the stacked experts as the graph calls them, after `sparse`.
      gate, up, down: the three matrices of an expert.
      shared: the prefix of a shared expert, after `sparse`.
      shared_gate: the shared expert's gate, ``[1, embed]``, after `sparse`.
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


FUSED_ROUTER = "mlp.gate.weight"
FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_DOWN = "mlp.experts.down_proj"
"""The names of transformers 5 in memory, which some tools write to disk as they are."""

DEFAULT = TensorNames()

NAMES: Mapping[str, TensorNames] = {
    "mixtral": TensorNames(sparse="block_sparse_moe.", gate="w1", up="w3", down="w2"),
}
"""The tables by model type; a family that is not listed has the default names."""


def names_of(family: str) -> TensorNames:
    """Return the table of a family."""
    return NAMES.get(family, DEFAULT)
