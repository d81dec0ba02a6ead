"""The graph of a bart and its kin: an encoder and a decoder of text."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from moecc.families.bart import BartConfig, M2M100Config
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.graphs.whisper import StackBlocks
from moecc.ir.graph import Graph, Value

FIRST_ROW = 2
"""The row of a table of positions that belongs to the first token."""

LONGEST = 10_000.0
"""The wavelength of the slowest sine of fairseq over 2π, and the base of the others."""


def build(config: BartConfig, request: GraphRequest) -> Graph:
    """Return the graph from two token inputs to ``logits : f32[batch, seq, vocab]``.

    The inputs are ``tokens : i32[batch, seq]`` of the encoder and ``decoder_tokens``, whose length
    is another variable; with padding also ``mask : pred[batch, seq]``, true where the encoder's
    token is one; padding is behind the text.
    """
    params = Parameters.of(config, request)
    graph = params.graph
    tokens, decoder_tokens = request.tokens(graph), request.decoder_tokens(graph)
    mask = request.mask(graph)
    encoder, decoder = (
        _BartStack(params, config, stack, config.norms_first, "")
        for stack in ("encoder", "decoder")
    )
    builder, keep = encoder.builder, None
    with builder.at("encoder.embed"):
        if mask is not None:
            keep = encoder.as_keys(mask)
        hidden = encoder.embed(tokens)
    memory = encoder.normalised(encoder.run(hidden, None, keep))
    builder = decoder.builder
    with builder.at("decoder.embed"):
        hidden = decoder.embed(decoder_tokens)
        positions = builder.positions(decoder_tokens, axis="seq", name="positions")
        causal = builder.causal(positions, decoder.as_keys(positions), name="causal")
    with builder.at("encoder.memory"):
        memory = decoder.as_keys(memory)
    hidden = decoder.normalised(decoder.run(hidden, memory, causal, keep))
    with builder.at("head"):
        logits = builder.contract(hidden, decoder.words(), over="embed", name="logits")
        if config.has_logits_bias:
            axes = {"vocab": config.vocab_size}
            bias = params.without_axis("final_logits_bias", builder.loc, "one", **axes)
            logits = builder.add(logits, bias, name="logits")
        graph.set_output("logits", logits)
    return graph


@dataclass(frozen=True)
class _BartStack(StackBlocks):
    """The encoder or the decoder."""

    config: BartConfig

    def words(self) -> Value:
        """Return the table of tokens, which the stacks share, ``[vocab, embed]``."""
        axes = {"vocab": self.config.vocab_size, "embed": self.config.d_model}
        return self.params.plain(self.params.names.embedding, "embed", **axes)

    def embed(self, tokens: Value) -> Value:
        """Emit words + positions, normalised if the family does so."""
        builder, config = self.builder, self.config
        words = builder.embedding(self.words(), tokens, axis="vocab", name="words")
        if config.scale_embedding:
            words = builder.scale(words, by=sqrt(config.d_model))
        positions = builder.positions(tokens, axis="seq", name="positions")
        if config.positions == "learned":
            count = config.max_position_embeddings + FIRST_ROW
            table = self.plain("embed_positions.weight", position=count, embed=config.d_model)
            table = builder.slice(table, axis="position", start=FIRST_ROW, stop=count)
            places = builder.embedding(table, positions, axis="position")
        else:
            places = self._sines(positions)
        hidden = builder.add(words, places, name="hidden")
        name = config.around[0]
        return self.norm(hidden, name and f"{self.prefix}{name}")

    def _sines(self, positions: Value) -> Value:
        """Emit sines, and behind them cosines, of positions: the tables of rotary positions."""
        builder, width, theta = self.builder, self.config.d_model, LONGEST
        half = width // 2
        if isinstance(self.config, M2M100Config):
            first = builder.constant(value=float(self.config.position_offset), dtype="i32")
            positions = builder.add(positions, first)
            # The slowest sine has the base's frequency, which is next in rotary positions.
            theta = LONGEST ** (half / (half - 1))
        cos, sin = builder.rope(positions, axis="embed", size=width, theta=theta)
        parts = (builder.slice(table, axis="embed", start=0, stop=half) for table in (sin, cos))
        return builder.join(*parts, axis="embed")

    def normalised(self, hidden: Value) -> Value:
        """Emit the norm behind all layers, if there is one."""
        name = self.config.around[1]
        with self.builder.at(f"{self.stack}.norm"):
            return self.norm(hidden, name and f"{self.prefix}{name}")
