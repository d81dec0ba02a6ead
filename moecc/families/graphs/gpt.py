"""The graph of a decoder of the GPT line: layer norms, biases, a block of two matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.families.gpt import GptConfig
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import Rotation, rope_tables, rotated
from moecc.families.graphs.parameters import DtypeOf, Parameters, float32_of
from moecc.families.names import names_of
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import I32, Size, tensor


@dataclass(frozen=True)
class GptNames:
    """The names of a family's tensors; a layer's are relative to its prefix.

    Attributes:
      layer: the prefix of a layer's tensors.
      norms: the norms before attention and feed-forward block.
      final_norm: the last norm.
      qkv, output: the projections of the attention.
      up, down: the matrices of the feed-forward block.
      apart: the projections to queries, keys and values, if each has a matrix of its own.
      narrow: the projections from and to narrower embeddings.
      positions: the learned positions; empty if there are none.
      inputs_first: whether matrices are stored with their inputs first.
      by_head: whether queries, keys and values lie together for each head, not each by itself.
    """

    layer: str
    norms: tuple[str, str]
    final_norm: str
    output: str
    up: str
    down: str
    qkv: str = ""
    apart: tuple[str, ...] = ()
    narrow: tuple[str, str] = ("", "")
    positions: str = ""
    inputs_first: bool = False
    by_head: bool = False


GPT_NAMES: Mapping[str, GptNames] = {
    "gpt2": GptNames(
        layer="transformer.h.{layer}.",
        norms=("ln_1", "ln_2"),
        final_norm="transformer.ln_f",
        qkv="attn.c_attn",
        output="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        positions="transformer.wpe.weight",
        inputs_first=True,
    ),
    "gpt_neox": GptNames(
        layer="gpt_neox.layers.{layer}.",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="gpt_neox.final_layer_norm",
        qkv="attention.query_key_value",
        output="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        by_head=True,
    ),
    "opt": GptNames(
        layer="model.decoder.layers.{layer}.",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        final_norm="model.decoder.final_layer_norm",
        apart=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.out_proj",
        up="fc1",
        down="fc2",
        narrow=("model.decoder.project_in", "model.decoder.project_out"),
        positions="model.decoder.embed_positions.weight",
    ),
}
"""The names of each family, as transformers writes them."""

_PARTS = ("query", "key", "value")


def build_gpt(
    config: GptConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    batch: Size = "B",
    seq: Size = "S",
) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``.

    Args:
      config: the config.
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights, for the graph's attributes.
      batch: the size of the batch axis.
      seq: the size of the sequence axis; with learned positions up to their number.
    """
    attrs = {"family": config.model_type, "config": config.to_json(), "checkpoint": checkpoint}
    graph = Graph(config.model_type, attrs)
    params = Parameters(graph, names_of(config.model_type), dtype_of or float32_of)
    names = GPT_NAMES[config.model_type]
    blocks = Blocks(Builder(graph), params, config.layer_norm_eps, inputs_first=names.inputs_first)
    decoder = _Gpt(blocks, config, names)
    tokens = graph.input("tokens", tensor(I32, batch=batch, seq=seq))
    with decoder.builder.at("embed"):
        positions = decoder.builder.positions(tokens, axis="seq", name="positions")
        hidden = decoder.embed(tokens, positions)
        rotation = decoder.rotation(positions)
        seen = blocks.builder.causal(positions, blocks.as_keys(positions), name="causal")
    for layer in range(config.num_hidden_layers):
        hidden = decoder.layer(hidden, layer, rotation, seen)
    if config.norms_first:
        with decoder.builder.at("norm"):
            hidden = blocks.norm(hidden, names.final_norm)
    with decoder.builder.at("head"):
        graph.set_output("logits", decoder.logits(hidden))
    return graph


@dataclass
class _Gpt:
    """The parts of the decoder."""

    blocks: Blocks
    config: GptConfig
    names: GptNames

    @property
    def builder(self) -> Builder:
        return self.blocks.builder

    @property
    def params(self) -> Parameters:
        return self.blocks.params

    def embed(self, tokens: Value, positions: Value) -> Value:
        """Emit the embedded tokens, ``[batch, seq, embed]``, with learned positions added."""
        builder, config = self.builder, self.config
        hidden = builder.embedding(self._embedding(), tokens, axis="vocab", name="hidden")
        if self._is_narrow:
            to, name = ("embed", config.hidden_size), self.names.narrow[0]
            hidden = self.blocks.linear(hidden, name, to, "word", has_bias=False)
        if not self.names.positions:
            return hidden
        first = config.position_offset
        count = config.max_position_embeddings + first
        axes = {"position": count, "embed": config.hidden_size}
        table = self.params.plain(self.names.positions, builder.loc, **axes)
        if first:
            table = builder.slice(table, axis="position", start=first, stop=count)
        return builder.add(hidden, builder.embedding(table, positions, axis="position"))

    def rotation(self, positions: Value) -> Rotation | None:
        """Emit the rotary tables, if the family has them."""
        if self.config.rotary is None:
            return None
        rope, size = self.config.rotary
        length = self.config.max_position_embeddings
        return rope_tables(self.builder, positions, rope, size, length)

    def layer(self, hidden: Value, layer: int, rotation: Rotation | None, seen: Value) -> Value:
        """Emit one layer; attention and feed-forward block may read the same value."""
        builder, blocks, names = self.builder, self.blocks, self.names
        prefix, config = names.layer.format(layer=layer), self.config
        first, second = (f"{prefix}{name}" for name in names.norms)
        before, width = config.norms_first, config.intermediate_size
        with builder.at(f"layers.{layer}.attention"):
            x = blocks.norm(hidden, first) if before else hidden
            found = self._attention(x, prefix, layer, rotation, seen)
            after = builder.add(hidden, found, name="hidden")
            after = after if before else blocks.norm(after, first)
        with builder.at(f"layers.{layer}.ffn"):
            x = hidden if config.parallel_residual else after
            x = blocks.norm(x, second) if before else x
            up, down = f"{prefix}{names.up}", f"{prefix}{names.down}"
            made = blocks.two_layers(x, up, down, config.hidden_act, width)
            hidden = builder.add(after, made, name="hidden")
            return hidden if before else blocks.norm(hidden, second)

    def logits(self, hidden: Value) -> Value:
        """Emit the logits of the normalised `hidden`."""
        if self._is_narrow:
            to, name = (self._word, self.config.embedding_width), self.names.narrow[1]
            hidden = self.blocks.linear(hidden, name, to, "embed", has_bias=False)
        return self.builder.contract(hidden, self._head(), over=self._word, name="logits")

    @property
    def _is_narrow(self) -> bool:
        return self.config.embedding_width != self.config.hidden_size

    @property
    def _word(self) -> str:
        """The axis of embeddings: that of the model, unless they are narrower."""
        return "word" if self._is_narrow else "embed"

    def _head(self) -> Value:
        if self.config.tie_word_embeddings:
            return self._embedding()
        axes = {"vocab": self.config.vocab_size, self._word: self.config.embedding_width}
        return self.params.plain(self.params.names.head, "head", **axes)

    def _embedding(self) -> Value:
        axes = {"vocab": self.config.vocab_size, self._word: self.config.embedding_width}
        return self.params.plain(self.params.names.embedding, "embed", **axes)

    def _attention(
        self, x: Value, prefix: str, layer: int, rotation: Rotation | None, seen: Value
    ) -> Value:
        builder, blocks, config = self.builder, self.blocks, self.config
        query, key, value = (self._heads(x, prefix, n) for n in range(3))
        query = rotated(builder, query, rotation, config.head_dim)
        key = blocks.as_keys(rotated(builder, key, rotation, config.head_dim))
        scale, value = config.score_scale(layer), blocks.as_keys(value)
        mixed = blocks.attend(query, key, value, scale, masks=(seen,))
        name, to = f"{prefix}{self.names.output}", ("embed", config.hidden_size)
        return blocks.linear(mixed, name, to, "q", has_bias=config.attention_bias)

    def _heads(self, x: Value, prefix: str, part: int) -> Value:
        """Emit queries, keys or values by head, from their matrix or part of the fused one."""
        config, builder, names = self.config, self.builder, self.names
        axis, width = ("q" if part == 0 else "kv"), config.hidden_size
        if names.apart:
            heads = (config.num_attention_heads, config.head_dim)
            return self.blocks.heads(x, f"{prefix}{names.apart[part]}", heads, axis)
        name = f"{prefix}{names.qkv}"
        axes = self.blocks.stored({axis: width, "embed": width})
        y = builder.contract(x, self._part(name, "weight", part, axes), over="embed")
        if config.attention_bias:
            y = builder.add(y, self._part(name, "bias", part, {axis: width}))
        return self.blocks.split(y, axis, (config.num_attention_heads, config.head_dim))

    def _part(self, name: str, kind: str, part: int, axes: dict[str, int]) -> Value:
        own = f"{name}.{_PARTS[part]}.{kind}"
        loc, cut = self.builder.loc, "q" if part == 0 else "kv"
        if self.names.by_head:
            heads = (self.config.num_attention_heads, self.config.head_dim)
            return self.params.head_part(own, f"{name}.{kind}", loc, (part, 3), heads, axes, cut)
        width = self.config.hidden_size
        whole = ("qkv", 3 * width)
        return self.params.part(own, f"{name}.{kind}", loc, part * width, whole, axes, cut)
