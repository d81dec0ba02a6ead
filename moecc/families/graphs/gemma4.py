"""The graph of a gemma4_text; its parts serve gemma3n_text, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt

from moecc.families.gemma4 import Gemma4TextConfig, LayerInputsConfig
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import (
    Activation,
    Rotation,
    activated,
    emit_rms_norm,
    ffn_axes,
    gated,
    rope_tables,
    soft_capped,
)
from moecc.families.graphs.parameters import KV_SEQ, GraphRequest, Parameters
from moecc.families.rope import RopeConfig
from moecc.ir.graph import Graph, Value
from moecc.ir.moe import emit_chosen


def build(config: Gemma4TextConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``tokens : i32[batch, seq]`` to ``logits : f32[batch, seq, vocab]``."""
    model = _Gemma4(Parameters.of(config, request), config)
    graph, builder = model.params.graph, model.builder
    tokens = request.tokens(graph)
    with builder.at("embed"):
        hidden = model.embed(tokens)
        inputs = model.inputs(tokens, hidden)
        tables = model.tables(tokens)
    for layer in range(config.num_hidden_layers):
        hidden = model.layer(hidden, layer, inputs, tables)
    model.finish(hidden)
    return graph


@dataclass(frozen=True)
class LayerTables:
    """Rotary tables of layers, and causal masks, by whether a layer has a window."""

    rotations: Mapping[bool, Rotation | None]
    masks: Mapping[bool, Value]


@dataclass(frozen=True)
class LayerInputsBlocks(Blocks):
    """The parts of a decoder whose layers read embeddings of their own.

    `keys` are the keys and values of the last layer of each kind that has some.
    """

    config: LayerInputsConfig
    keys: dict[bool, tuple[Value, Value]] = field(default_factory=dict)

    def rms(self, x: Value, name: str = "", axis: str = "embed") -> Value:
        """Emit the norm of `x` along `axis`, with a scale if it has a name."""
        width, scale = x.type[axis].size, None
        assert isinstance(width, int), "the width of a model is known"
        if name:
            scale = self.params.plain(f"{name}.weight", self.builder.loc, **{axis: width})
        return emit_rms_norm(self.builder, x, scale, axis, self.config.rms_norm_eps)

    def matrix(self, x: Value, name: str, axis: str, size: int, over: str = "embed") -> Value:
        """Emit a product with the matrix `name`, without a bias."""
        return self.linear(x, name, (axis, size), over, has_bias=False)

    def prefix(self, layer: int) -> str:
        """Return the prefix of a layer's tensors."""
        return self.params.names.layer.format(layer=layer)

    def embed(self, tokens: Value) -> Value:
        """Emit the embedded tokens times √hidden_size, ``[batch, seq, embed]``."""
        hidden = self.builder.embedding(self._vocabulary(), tokens, axis="vocab", name="hidden")
        return self.builder.scale(hidden, by=sqrt(self.config.hidden_size))

    def inputs(self, tokens: Value, hidden: Value) -> Value | None:
        """Emit what layers read of the tokens, one after another, ``[batch, seq, inputs]``.

        It is the sum of an embedding of each token and of a projection of the hidden states, which
        is normalised for each layer by itself.
        """
        config, builder = self.config, self.builder
        if not config.input_width:
            return None
        width = config.num_hidden_layers * config.input_width
        axes = {"input_vocab": config.input_vocab, "inputs": width}
        table = self.params.plain("model.embed_tokens_per_layer.weight", builder.loc, **axes)
        embedded = builder.embedding(table, tokens, axis="input_vocab", name="inputs")
        embedded = builder.scale(embedded, by=sqrt(config.input_width))
        projected = self.matrix(hidden, "model.per_layer_model_projection", "inputs", width)
        projected = builder.scale(projected, by=config.hidden_size**-0.5)
        into = (("layer", config.num_hidden_layers), ("input", config.input_width))
        projected = builder.split(projected, axis="inputs", into=into)
        projected = self.rms(projected, "model.per_layer_projection_norm", "input")
        projected = builder.merge(projected, axes=("layer", "input"), into="inputs")
        return builder.scale(builder.add(projected, embedded), by=sqrt(0.5))

    def gated_input(self, x: Value, layer: int, inputs: Value) -> Value:
        """Emit what a layer adds of the embeddings that it reads, gated by `x`."""
        builder, config, prefix = self.builder, self.config, self.prefix(layer)
        embed, width = config.hidden_size, config.input_width
        start = layer * width
        read = builder.slice(inputs, axis="inputs", start=start, stop=start + width)
        gate = self.matrix(x, f"{prefix}per_layer_input_gate", "input", width)
        gate = activated(builder, gate, config.hidden_act)
        y = builder.mul(gate, builder.rename(read, axis="inputs", to="input"))
        y = self.matrix(y, f"{prefix}per_layer_projection", "embed", embed, over="input")
        return self.rms(y, f"{prefix}post_per_layer_input_norm")

    def tables(self, tokens: Value) -> LayerTables:
        """Emit the rotary tables and masks of each kind of layer."""
        config, builder = self.config, self.builder
        positions = builder.positions(tokens, axis="seq", name="positions")
        keys, rotations, masks = self.as_keys(positions), {}, {}
        for window in dict.fromkeys(config.sliding_windows):
            layer = config.sliding_windows.index(window)
            is_local, rope, (_, width) = (
                *(window is not None, config.rope_of(layer)),
                config.heads_of(layer),
            )
            size = 2 * rope.pairs(width)
            # The frequencies of so many pairs among those of a whole head.
            theta = rope.theta if size == width else rope.theta ** (size / width)
            plain = RopeConfig(theta=theta)
            if rope.factor != 1:
                plain = RopeConfig(theta=theta, type="linear", factor=rope.factor)
            longest = config.max_position_embeddings
            rotations[is_local] = (
                rope_tables(builder, positions, plain, size, longest) if size else None
            )
            masks[is_local] = builder.causal(positions, keys, window=window or 0, name="causal")
        return LayerTables(rotations, masks)

    def rotated(self, x: Value, rotation: Rotation | None) -> Value:
        """Emit queries or keys with the first pairs of each head rotated, as many as tables have.

        An entry of the first half of a head is paired with one of the second half.
        """
        builder, width = self.builder, x.type["head_dim"].size
        if rotation is None:
            return x
        cos, sin = rotation
        size = cos.type["head_dim"].size
        assert isinstance(width, int), "the width of a head is known"
        assert isinstance(size, int), "the width of a head is known"
        if size == width:
            return builder.rotate(x, cos, sin, axis="head_dim")

        def halves(y: Value, of: int) -> Value:
            return builder.split(y, axis="head_dim", into=(("half", 2), ("pair", of // 2)))

        pairs = halves(x, width)
        turned = builder.slice(pairs, axis="pair", start=0, stop=size // 2)
        fixed = builder.slice(pairs, axis="pair", start=size // 2, stop=width // 2)
        turned = builder.merge(turned, axes=("half", "pair"), into="head_dim")
        turned = halves(builder.rotate(turned, cos, sin, axis="head_dim"), size)
        pairs = builder.join(turned, fixed, axis="pair")
        return builder.merge(pairs, axes=("half", "pair"), into="head_dim")

    def values_of(self, x: Value, key: Value, layer: int) -> Value:
        """Emit the values of a layer by head, given `x` and its keys before their norm."""
        return self.projected(x, layer, "v")

    def projected(self, x: Value, layer: int, letter: str) -> Value:
        """Emit the queries, keys or values of a layer by head."""
        count, width = self.config.heads_of(layer)
        heads = self.config.num_attention_heads if letter == "q" else count
        into = {"kv_head": count, "query_group": heads // count, "head_dim": width}
        if letter != "q":
            del into["query_group"]
        name, axis = (
            f"{self.prefix(layer)}self_attn.{letter}_proj",
            letter if letter == "q" else "kv",
        )
        to, has_bias = (axis, heads * width), self.config.attention_bias
        y = self.linear(x, name, to, "embed", has_bias=has_bias)
        return self.builder.split(y, axis=axis, into=tuple(into.items()))

    def own_attention(self, x: Value, layer: int, tables: LayerTables) -> Value:
        """Emit the attention of a layer on the normalised `x`, ``[batch, seq, embed]``."""
        builder, config = self.builder, self.config
        prefix, is_local = f"{self.prefix(layer)}self_attn.", config.has_window(layer)
        rotation = tables.rotations[is_local]
        query = self.rms(self.projected(x, layer, "q"), f"{prefix}q_norm", "head_dim")
        query = self.rotated(query, rotation)
        if layer < config.first_shared:
            key = self.projected(x, layer, "k")
            value = self.rms(self.values_of(x, key, layer), axis="head_dim")
            key = self.rotated(self.rms(key, f"{prefix}k_norm", "head_dim"), rotation)
            self.keys[is_local] = self.as_keys(key), self.as_keys(value)
        key, value = self.keys[is_local]
        scores = builder.contract(query, key, over="head_dim", name="scores")
        scores = builder.mask(scores, tables.masks[is_local])
        weights = builder.softmax(scores, axis=KV_SEQ, name="weights")
        mixed = builder.contract(weights, value, over=KV_SEQ, name="mixed")
        merged = builder.merge(mixed, axes=("kv_head", "query_group", "head_dim"), into="q")
        to, has_bias = ("embed", config.hidden_size), config.attention_bias
        return self.linear(merged, f"{prefix}o_proj", to, "q", has_bias=has_bias)

    def dense(self, x: Value, layer: int, act: str | Activation) -> Value:
        """Emit the feed-forward block of a layer on the normalised `x`."""
        prefix, loc = f"{self.prefix(layer)}mlp.", self.builder.loc
        axes = ffn_axes(self.config.hidden_size, self.config.block_width(layer))

        def matrix(name: str) -> Value:
            return self.params.plain(f"{prefix}{name}_proj.weight", loc, **axes[name])

        return gated(self.builder, x, act, matrix, lambda name: None)

    def finish(self, hidden: Value) -> None:
        """Emit the last norm and the logits, the output."""
        config, builder = self.config, self.builder
        with builder.at("norm"):
            hidden = self.rms(hidden, "model.norm")
        with builder.at("head"):
            head = self._vocabulary()
            if not config.tie_word_embeddings:
                axes = {"vocab": config.vocab_size, "embed": config.hidden_size}
                head = self.params.plain(self.params.names.head, builder.loc, **axes)
            logits = builder.contract(hidden, head, over="embed", name="logits")
            logits = soft_capped(builder, logits, config.logit_softcap)
        self.params.graph.set_output("logits", logits)

    def _vocabulary(self) -> Value:
        axes = {"vocab": self.config.vocab_size, "embed": self.config.hidden_size}
        return self.params.plain(self.params.names.embedding, "embed", **axes)


@dataclass(frozen=True)
class _Gemma4(LayerInputsBlocks):
    """The parts of a gemma4_text."""

    config: Gemma4TextConfig

    def layer(self, hidden: Value, layer: int, inputs: Value | None, tables: LayerTables) -> Value:
        """Emit one layer: attention, feed-forward block, its own embeddings, and its factor."""
        builder, prefix = self.builder, self.prefix(layer)
        with builder.at(f"layers.{layer}.attention"):
            block = self.own_attention(self.rms(hidden, f"{prefix}input_layernorm"), layer, tables)
            block = self.rms(block, f"{prefix}post_attention_layernorm")
            hidden = builder.add(hidden, block, name="hidden")
        with builder.at(f"layers.{layer}.ffn"):
            x = self.rms(hidden, f"{prefix}pre_feedforward_layernorm")
            block = self.dense(x, layer, self.config.hidden_act)
        if self.config.num_experts:
            with builder.at(f"layers.{layer}.experts"):
                block = self.rms(block, f"{prefix}post_feedforward_layernorm_1")
                block = builder.add(block, self.experts(hidden, prefix))
        with builder.at(f"layers.{layer}.ffn"):
            block = self.rms(block, f"{prefix}post_feedforward_layernorm")
            hidden = builder.add(hidden, block, name="hidden")
        with builder.at(f"layers.{layer}.inputs"):
            if inputs is not None:
                gated = self.gated_input(hidden, layer, inputs)
                hidden = builder.add(hidden, gated, name="hidden")
            scale = self.params.without_axis(f"{prefix}layer_scalar", builder.loc, "one")
            return builder.mul(hidden, scale, name="hidden")

    def values_of(self, x: Value, key: Value, layer: int) -> Value:
        """Emit the values of a layer by head, which may be its keys before their norm."""
        is_key = self.config.values_are_keys and not self.config.has_window(layer)
        return key if is_key else super().values_of(x, key, layer)

    def experts(self, hidden: Value, prefix: str) -> Value:
        """Emit the mixture on the hidden states that the block beside it reads, normalised.

        The router has a norm of its own; the gates are multiplied by a factor of each expert.
        """
        builder, config, params = self.builder, self.config, self.params
        embed, count, loc = config.hidden_size, config.num_experts, builder.loc
        scale = params.plain(f"{prefix}router.scale", loc, embed=embed)
        x = builder.scale(builder.mul(self.rms(hidden), scale), by=embed**-0.5)
        router = params.router(prefix, loc, expert=count, embed=embed)
        logits = builder.contract(x, router, over="embed", precision="f32", name="router")
        chosen, gates = builder.route(logits, top_k=config.experts_per_token, gates="renormalised")
        factors = params.plain(f"{prefix}router.per_expert_scale", loc, expert=count)
        gates = builder.mul(gates, builder.embedding(factors, chosen, axis="expert"))
        x = self.rms(hidden, f"{prefix}pre_feedforward_layernorm_2")
        rows, combine = emit_chosen(builder, x, chosen, gates, experts=count)
        axes = ffn_axes(embed, config.expert_intermediate_size)

        def matrix(name: str) -> Value:
            return params.expert(prefix, name, loc, axes[name], count)

        rows = gated(builder, rows, config.hidden_act, matrix, lambda name: None)
        return self.rms(combine(rows), f"{prefix}post_feedforward_layernorm_2")
