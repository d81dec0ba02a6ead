"""The graph of an encoder-decoder of T5's shape, dense or sparse, of any such family."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.encdec import EncDecConfig, Experts
from moecc.families.experts import emit_sequence_capacity
from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import ffn_axes, two_or_three
from moecc.families.graphs.parameters import KV_SEQ, GraphRequest, Parameters
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.moe import SlotOptions, emit_routing
from moecc.ir.ops.slots import Using

# The feed-forward sublayers of an encoder-decoder: dense, sparse, and an extra dense one.


@dataclass(frozen=True)
class Sublayer:
    """A feed-forward sublayer with its own norm and residual.

    Attributes:
      part: the last part of its location, ``ffn`` or ``extra_ffn``.
      prefix: the prefix of its tensors' names, the norm included.
      sparse: its experts, or None.
    """

    part: str = "ffn"
    prefix: str = ""
    sparse: Experts | None = None

    def emit(
        self, builder: Builder, x: Value, prefix: str, config: EncDecConfig, params: Parameters
    ) -> Value:
        """Emit the block on the normalised `x`, ``[batch, seq, embed]``."""
        if self.sparse is None:
            axes = ffn_axes(config.hidden_size, config.intermediate_size)

            def matrix(name: str) -> Value:
                word = params.names.matrix(name, config.gated)
                full = f"{prefix}{params.names.dense}{word}.weight"
                return params.plain(full, builder.loc, **axes[name])

            return two_or_three(builder, x, config.hidden_act, matrix, config.gated)
        return _sparse(builder, x, prefix, self.sparse, config, params)


EXTRA = Sublayer("extra_ffn", "extra_")


def ffn_sublayers(config: EncDecConfig, stack: str, layer: int) -> list[Sublayer]:
    """Return the feed-forward sublayers of a layer, in order."""
    experts = config.experts
    if experts is None or not config.sparse_layers(stack)[layer]:
        return [Sublayer()]
    sparse = [Sublayer(sparse=experts)]
    return {"none": sparse, "before": [EXTRA, *sparse], "after": [*sparse, EXTRA]}[
        experts.extra_ffn
    ]


def _sparse(
    builder: Builder,
    x: Value,
    prefix: str,
    experts: Experts,
    config: EncDecConfig,
    params: Parameters,
) -> Value:
    assignment: SlotOptions = {}
    if experts.capacity_factor:
        assignment = {"slots": "capacity", "capacity_factor": experts.capacity_factor}

    def keep(_logits: Value, chosen: Value, _gates: Value) -> dict[Using, Value]:
        return {"keep": emit_sequence_capacity(builder, experts, chosen)}

    rows, finish = emit_routing(
        builder,
        x,
        params.router(prefix, builder.loc, expert=experts.count, embed=config.hidden_size),
        experts=experts.count,
        top_k=experts.top_k,
        gates=experts.gates,
        operands=keep if experts.sequence_capacity else None,
        **assignment,
    )
    axes = ffn_axes(config.hidden_size, config.intermediate_size)

    def matrix(name: str) -> Value:
        return params.expert(
            prefix, name, builder.loc, axes[name], experts.count, is_gated=config.gated
        )

    return finish(two_or_three(builder, rows, config.hidden_act, matrix, config.gated))


def build(config: EncDecConfig, request: GraphRequest) -> Graph:
    """Return the graph from two token inputs to ``logits : f32[batch, seq, vocab]``.

    The inputs are ``tokens : i32[batch, seq]`` of the encoder and ``decoder_tokens``, whose length
    is another variable; with padding also ``mask : pred[batch, seq]``, true where the encoder's
    token is one.
    """
    params = Parameters.of(config, request)
    graph = params.graph
    tokens, decoder_tokens = request.tokens(graph), request.decoder_tokens(graph)
    mask = request.mask(graph)
    builder = Builder(graph)
    keep = None
    if mask is not None:
        with builder.at("encoder.embed"):
            keep = builder.rename(mask, axis="seq", to=KV_SEQ)
    memory = _T5Stack(params, config, "encoder", tokens, keep).emit(None)
    hidden = _T5Stack(params, config, "decoder", decoder_tokens, keep).emit(memory)
    with builder.at("head"):
        if config.scale_outputs:
            hidden = builder.scale(hidden, by=config.hidden_size**-0.5, name="scaled")
        axes = {"vocab": config.vocab_size, "embed": config.hidden_size}
        head = (
            embedding_of(config, params)
            if config.tie_word_embeddings
            else params.plain(params.names.head, "head", **axes)
        )
        graph.set_output("logits", builder.contract(hidden, head, over="embed", name="logits"))
    return graph


def embedding_of(config: EncDecConfig, params: Parameters) -> Value:
    """Return the token embedding, ``[vocab, embed]``."""
    axes = {"vocab": config.vocab_size, "embed": config.hidden_size}
    return params.plain(params.names.embedding, "embed", **axes)


@dataclass(frozen=True)
class _T5Stack(Blocks):
    """The encoder or the decoder.

    Attributes:
      tokens: its token ids, ``[batch, seq]``.
      keep: which tokens of the encoder may be attended to, ``[batch, kv_seq]``, or None.
    """

    config: EncDecConfig
    stack: str
    tokens: Value
    keep: Value | None

    @property
    def is_encoder(self) -> bool:
        return self.stack == "encoder"

    def emit(self, memory: Value | None) -> Value:
        """Emit all layers; `memory` is the encoder's output, for the decoder."""
        builder = self.builder
        with builder.at(f"{self.stack}.embed"):
            table = embedding_of(self.config, self.params)
            hidden = builder.embedding(table, self.tokens, axis="vocab", name="hidden")
        with builder.at(f"{self.stack}.positions"):
            buckets, causal = self._positions()
            bias = self._bias(buckets, 0)
        masks = [m for m in (causal, self.keep if self.is_encoder else None) if m is not None]
        cross_masks = [] if self.keep is None else [self.keep]
        if memory is not None:
            with builder.at("encoder.memory"):
                memory = self.as_keys(memory)
        for layer in range(self.config.layers(self.stack)):
            if layer and self.config.biases_of_layers:
                with builder.at(f"{self.stack}.layers.{layer}.attention"):
                    bias = self._bias(buckets, layer)
            hidden = self._attention(hidden, layer, None, bias, masks)
            if memory is not None:
                hidden = self._attention(hidden, layer, memory, None, cross_masks)
            for sublayer in ffn_sublayers(self.config, self.stack, layer):
                hidden = self._ffn(hidden, layer, sublayer)
        with builder.at(f"{self.stack}.norm"):
            return self._norm(hidden, f"{self.stack}.final_layer_norm.weight")

    def _attend(
        self, x: Value, memory: Value, prefix: str, bias: Value | None, masks: list[Value]
    ) -> Value:
        """Emit attention of ``[batch, seq, embed]`` to ``[batch, kv_seq, embed]``, not scaled."""
        builder, config, params = self.builder, self.config, self.params
        embed, heads = config.hidden_size, (config.num_attention_heads, config.head_dim)
        loc, width = builder.loc, heads[0] * heads[1]

        def project(x: Value, letter: str) -> Value:
            axis = "q" if letter == "q" else "kv"
            axes = {axis: width, "embed": embed}
            weight = params.plain(f"{prefix}{letter}.weight", loc, **axes)
            y = builder.contract(x, weight, over="embed", name=letter)
            return self.split(y, axis, heads)

        query, key, value = project(x, "q"), project(memory, "k"), project(memory, "v")
        mixed = self.attend(query, key, value, None, bias=bias, masks=masks)
        weight = params.plain(f"{prefix}o.weight", loc, embed=embed, q=width)
        return builder.contract(mixed, weight, over="q")

    def _positions(self) -> tuple[Value, Value | None]:
        """Emit the buckets of distances ``[seq, kv_seq]`` and the decoder's causal mask."""
        builder, config = self.builder, self.config
        query = builder.positions(self.tokens, axis="seq", name="positions")
        key = self.as_keys(query)
        buckets = builder.relative_buckets(
            query,
            key,
            bidirectional=self.is_encoder,
            buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        return buckets, None if self.is_encoder else builder.causal(query, key, name="causal")

    def _bias(self, buckets: Value, layer: int) -> Value:
        """Emit the attention bias ``[seq, kv_seq, head]`` by the table of a layer."""
        builder, config = self.builder, self.config
        count, heads = config.relative_attention_num_buckets, config.num_attention_heads
        name = f"{self._prefix(layer)}layer.0.SelfAttention.relative_attention_bias.weight"
        table = self.params.plain(name, builder.loc, bucket=count, head=heads)
        return builder.embedding(table, buckets, axis="bucket", name="bias")

    def _prefix(self, layer: int) -> str:
        return f"{self.stack}.block.{layer}."

    def _attention(
        self,
        hidden: Value,
        layer: int,
        memory: Value | None,
        bias: Value | None,
        masks: list[Value],
    ) -> Value:
        """Emit attention to `memory`, or of a stack to itself, added to what it reads."""
        number, word, part = (
            (0, "SelfAttention", "attention")
            if memory is None
            else (1, "EncDecAttention", "cross_attention")
        )
        prefix = f"{self._prefix(layer)}layer.{number}."
        with self.builder.at(f"{self.stack}.layers.{layer}.{part}"):
            x = self._norm(hidden, f"{prefix}layer_norm.weight")
            memory = self.as_keys(x) if memory is None else memory
            mixed = self._attend(x, memory, f"{prefix}{word}.", bias, masks)
            return self.builder.add(hidden, mixed, name="hidden")

    def _ffn(self, hidden: Value, layer: int, sublayer: Sublayer) -> Value:
        prefix = f"{self._prefix(layer)}layer.{1 if self.is_encoder else 2}."
        prefix = f"{prefix}{sublayer.prefix}"
        with self.builder.at(f"{self.stack}.layers.{layer}.{sublayer.part}"):
            x = self._norm(hidden, f"{prefix}layer_norm.weight")
            mixed = sublayer.emit(self.builder, x, prefix, self.config, self.params)
            return self.builder.add(hidden, mixed, name="hidden")

    def _norm(self, x: Value, name: str) -> Value:
        scale = self.params.plain(name, self.builder.loc, embed=self.config.hidden_size)
        eps = self.config.rms_norm_eps
        return self.builder.rms_norm(x, scale, axis="embed", eps=eps, name="norm")
