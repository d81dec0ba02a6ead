"""The names of a family's tensors, and what other formats and engines make of the family.

Every record here stands in the class of a family's config.  Names of experts are those of one
expert each, the layout that every runtime reads; transformers 5 can also write the experts of a
layer in one tensor, and those names are the same in every family.
"""

from __future__ import annotations

from dataclasses import dataclass

FUSED_ROUTER = "mlp.gate.weight"
FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_DOWN = "mlp.experts.down_proj"
"""The in-memory names of transformers 5, which some tools write to disk unchanged."""


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
      inputs_first: whether those have their inputs first, and gate and up in turns.
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
    inputs_first: bool = False
    pairs_neighbours: bool = False

    def matrix(self, name: str, is_gated: bool = True) -> str:
        """Return the name of the matrix ``gate``, ``up`` or ``down`` of an expert."""
        if name == "up" and not is_gated:
            return self.single or self.up
        return {"gate": self.gate, "up": self.up, "down": self.down}[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames(TensorNames):
    """The names of a model with layer norms and biases: GPT-2, BERT, ViT and their kin.

    Attributes:
      norms: the norms of attention and feed-forward block.
      query, key, value, output: the projections of the attention.
      fc_in, fc_out: the matrices of the feed-forward block.
      positions: the learned positions; empty if there are none.
      narrow: the projections from and to narrower embeddings.
      by_head: whether queries, keys and values lie together for each head, not each by itself.
      gated_out: the second matrix of a gated block, whose first is `gate_up`.
      scales: the vectors that what a block adds is multiplied by; empty if there are none.
    """

    norms: tuple[str, str]
    output: str
    fc_in: str
    fc_out: str
    query: str = ""
    key: str = ""
    value: str = ""
    positions: str = ""
    narrow: tuple[str, str] = ("", "")
    by_head: bool = False
    gated_out: str = ""
    scales: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What llama.cpp computes of a family, and how its files state it beyond the config.

    Attributes:
      architecture: ``general.architecture``.
      pairs_neighbours: whether the rows of queries and keys are stored so that the rotary
        embedding rotates neighbours, where Hugging Face rotates halves of a head.
      output_bias: whether it reads a bias of the attention's output projection.
      mlp_bias: whether it reads biases of feed-forward blocks.
      norms: the norms of a layer with the names in Hugging Face, where others than usual.
      window_period: where layers have the window that a key states: all but every so many; 0 where
        none has.
      score_layers: where scores are divided by √`query_pre_attn_scalar`, which no key states: that
        is the width of a head, but in a model of so many layers the share of a head in the width.
      is_tied: whether the output matrix always is the embedding.
      no_rope_step: which layers have no rotary positions: every so many; 0 if none.
      keys: further keys of the architecture, with those of config.json that say the same.
      optional_keys: of these, those that a file need not state.
      local_theta: the base period of the rotary embedding in layers with a window, if no key states
        one; 0 where it is that of all layers.
      fixed: keys of the architecture with the one value that they have.
      has_groups: whether there may be fewer key-value heads than query heads.
      needs_head: whether it wants an output matrix even where it is the embedding.
      renormalises: whether it divides the chosen gates by their sum; None: a key says it.
      states: what config.json says of every such model, where files are read and not written.
    """

    architecture: str
    pairs_neighbours: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norms: tuple[tuple[str, str], ...] = ()
    window_period: int = 0
    score_layers: int = 0
    is_tied: bool = False
    no_rope_step: int = 0
    keys: tuple[tuple[str, str], ...] = ()
    optional_keys: tuple[tuple[str, str], ...] = ()
    local_theta: float = 0.0
    fixed: tuple[tuple[str, int | float], ...] = ()
    has_groups: bool = True
    needs_head: bool = False
    renormalises: bool | None = True
    states: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True)
class MaxTextFacts:
    """How MaxText stores a family.

    Attributes:
      folds_scale: whether queries are divided by the root of the width of a head.
      biases: whether the projections to queries, keys and values may have biases.
    """

    folds_scale: bool = False
    biases: bool = False


@dataclass(frozen=True, slots=True)
class EngineReading:
    """The conditions under which an engine reads a family, by the words of `CONDITIONS`.

    Attributes:
      needs: without these it refuses the checkpoint.
      silent: without these it loads it and computes another function.
      never: why it reads none of moecc's checkpoints of the family; empty if it may.
    """

    needs: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    never: str = ""
