"""The graph of a whisper: convolutions over a spectrogram, an encoder, and a decoder of text."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import ACTIVATION_OPS
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.whisper import TwoStackConfig, WhisperConfig
from moecc.ir.graph import Graph, Value
from moecc.types import F32, tensor


def build(config: WhisperConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``features`` and ``decoder_tokens`` to ``logits``.

    The inputs are ``features : f32[batch, mel, frame]``, the log-mel spectrogram of as many frames
    as the config says, and ``decoder_tokens : i32[batch, seq]``, up to the number of positions; the
    output is ``logits : f32[batch, seq, vocab]``.  An encoder alone has an output ``hidden``.
    """
    params = Parameters.of(config, request)
    graph, batch = params.graph, request.batch
    frames = 2 * config.max_source_positions
    sizes = {"mel": config.num_mel_bins, "frame": frames}
    features = graph.input("features", tensor(F32, batch=batch, **sizes))
    encoder = _WhisperStack(params, config, "encoder")
    if config.encoder_alone:
        hidden = encoder.encode(features)
        graph.set_output("hidden", hidden)
        encoder.add_head(hidden, request.head)
        return graph
    tokens = request.decoder_tokens(graph)
    memory = encoder.encode(features)
    graph.set_output("logits", _WhisperStack(params, config, "decoder").decode(tokens, memory))
    return graph


@dataclass(frozen=True)
class StackBlocks(Blocks):
    """The layers of an encoder or a decoder.

    Attributes:
      stack: ``encoder`` or ``decoder``.
      norms_first: whether layers normalise what they read, not the sums that they return.
      unbiased: the letters of the projections of the attention without a bias.
    """

    config: TwoStackConfig
    stack: str
    norms_first: bool = True
    unbiased: str = "k"

    @property
    def prefix(self) -> str:
        """The prefix of the stack's tensors."""
        return f"model.{self.stack}."

    def run(self, hidden: Value, memory: Value | None, *masks: Value | None) -> Value:
        """Emit all layers.

        Args:
          hidden: what the first one reads, ``[batch, seq, embed]``.
          memory: the encoder's output along ``kv_seq``, for the decoder.
          masks: which keys count: in the stack itself, and in `memory`; None for all.
        """
        inside, across = [*masks, None, None][:2]
        for layer in range(self.config.layers(self.stack)):
            hidden = self._attend(hidden, layer, None, inside)
            if memory is not None:
                hidden = self._attend(hidden, layer, memory, across)
            hidden = self._ffn(hidden, layer)
        return hidden

    def _attend(
        self, hidden: Value, layer: int, memory: Value | None, mask: Value | None = None
    ) -> Value:
        """Emit attention to `memory`, or of a stack to itself, added to what it reads."""
        word, part = ("self_attn", "attention") if memory is None else (
            "encoder_attn", "cross_attention"
        )  # fmt: skip
        prefix = f"{self.prefix}layers.{layer}.{word}"
        with self.builder.at(f"{self.stack}.layers.{layer}.{part}"):
            x = self._before(hidden, f"{prefix}_layer_norm")
            names = [f"{prefix}.{n}_proj" for n in ("q", "k", "v", "out")]
            mixed = self.attention(
                x, self.as_keys(x) if memory is None else memory, names,
                self.config.heads(self.stack),
                masks=() if mask is None else (mask,), unbiased=self.unbiased,
            )  # fmt: skip
            return self._after(hidden, mixed, f"{prefix}_layer_norm")

    def _ffn(self, hidden: Value, layer: int) -> Value:
        prefix, config = f"{self.prefix}layers.{layer}.", self.config
        with self.builder.at(f"{self.stack}.layers.{layer}.ffn"):
            x = self._before(hidden, f"{prefix}final_layer_norm")
            up, down, width = f"{prefix}fc1", f"{prefix}fc2", config.width(self.stack)
            mixed = self.two_layers(x, up, down, config.hidden_act, width)
            return self._after(hidden, mixed, f"{prefix}final_layer_norm")

    def _before(self, hidden: Value, norm: str) -> Value:
        return self.norm(hidden, norm) if self.norms_first else hidden

    def _after(self, hidden: Value, mixed: Value, norm: str) -> Value:
        total = self.builder.add(hidden, mixed, name="hidden")
        return total if self.norms_first else self.norm(total, norm)

    def plain(self, name: str, **axes: int) -> Value:
        """Return a parameter of the stack."""
        return self.params.plain(f"{self.prefix}{name}", self.builder.loc, **axes)


@dataclass(frozen=True)
class _WhisperStack(StackBlocks):
    """The encoder or the decoder."""

    config: WhisperConfig

    def encode(self, features: Value) -> Value:
        """Emit the encoder: ``[batch, mel, frame]`` to ``[batch, seq, embed]``."""
        builder, config = self.builder, self.config
        with builder.at("encoder.embed"):
            hidden = self._convolved(features, "conv1", "mel", stride=1)
            hidden = builder.rename(hidden, axis="embed", to="channel")
            hidden = self._convolved(hidden, "conv2", "channel", stride=2)
            hidden = builder.rename(hidden, axis="frame", to="seq")
            positions = {"seq": config.max_source_positions, "embed": config.d_model}
            table = self.plain("embed_positions.weight", **positions)
            hidden = builder.add(hidden, table, name="hidden")
        hidden = self.run(hidden, None)
        with builder.at("encoder.norm"):
            return self.norm(hidden, f"{self.prefix}layer_norm")

    def decode(self, tokens: Value, memory: Value) -> Value:
        """Emit the decoder: ``[batch, seq]`` to ``[batch, seq, vocab]``."""
        builder, config = self.builder, self.config
        with builder.at("decoder.embed"):
            words = self.plain("embed_tokens.weight", vocab=config.vocab_size, embed=config.d_model)
            hidden = builder.embedding(words, tokens, axis="vocab", name="words")
            axes = {"position": config.max_target_positions, "embed": config.d_model}
            table = self.plain("embed_positions.weight", **axes)
            positions = builder.positions(tokens, axis="seq", name="positions")
            learned = builder.embedding(table, positions, axis="position")
            hidden = builder.add(hidden, learned, name="hidden")
            causal = builder.causal(positions, self.as_keys(positions), name="causal")
        with builder.at("encoder.memory"):
            memory = self.as_keys(memory)
        hidden = self.run(hidden, memory, causal)
        with builder.at("decoder.norm"):
            hidden = self.norm(hidden, f"{self.prefix}layer_norm")
        with builder.at("head"):
            return builder.contract(hidden, words, over="embed", name="logits")

    def _convolved(self, x: Value, name: str, over: str, *, stride: int) -> Value:
        size, embed = x.type[over].size, self.config.d_model
        assert isinstance(size, int), "the width of a model is known"
        weight = self.plain(f"{name}.weight", **{"embed": embed, over: size, "tap": 3})
        bias = self.plain(f"{name}.bias", embed=embed)
        y = self.builder.convolve(
            x, weight, over=over, along="frame", taps="tap", stride=stride, padding=1
        )
        # Whatever the activation of the blocks is, that of the convolutions is GELU.
        return self.builder.node(ACTIVATION_OPS["gelu"], self.builder.add(y, bias)).result
