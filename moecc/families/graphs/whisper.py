"""The graph of a whisper: convolutions over a spectrogram, an encoder, and a decoder of text."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.families.graphs.blocks import Blocks
from moecc.families.graphs.decoder import ACTIVATION_OPS
from moecc.families.graphs.parameters import GraphRequest, Parameters
from moecc.families.whisper import WhisperConfig
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.types import F32, I32, tensor


def build(config: WhisperConfig, request: GraphRequest) -> Graph:
    """Return the graph from ``features`` and ``decoder_tokens`` to ``logits``.

    The inputs are ``features : f32[batch, mel, frame]``, the log-mel spectrogram of as many frames
    as the config says, and ``decoder_tokens : i32[batch, seq]``, up to the number of positions; the
    output is ``logits : f32[batch, seq, vocab]``.
    """
    params = Parameters.of(config, request)
    graph, batch = params.graph, request.batch
    blocks = Blocks(Builder(graph), params, config.layer_norm_eps)
    frames = 2 * config.max_source_positions
    sizes = {"mel": config.num_mel_bins, "frame": frames}
    features = graph.input("features", tensor(F32, batch=batch, **sizes))
    tokens = graph.input("decoder_tokens", tensor(I32, batch=batch, seq=request.decoder_seq))
    memory = _WhisperStack(blocks, config, "encoder").encode(features)
    graph.set_output("logits", _WhisperStack(blocks, config, "decoder").decode(tokens, memory))
    return graph


@dataclass
class _WhisperStack:
    """The encoder or the decoder."""

    blocks: Blocks
    config: WhisperConfig
    stack: str

    @property
    def builder(self) -> Builder:
        return self.blocks.builder

    @property
    def prefix(self) -> str:
        return f"model.{self.stack}."

    def encode(self, features: Value) -> Value:
        """Emit the encoder: ``[batch, mel, frame]`` to ``[batch, seq, embed]``."""
        builder, config = self.builder, self.config
        with builder.at("encoder.embed"):
            hidden = self._convolved(features, "conv1", "mel", stride=1)
            hidden = builder.rename(hidden, axis="embed", to="channel")
            hidden = self._convolved(hidden, "conv2", "channel", stride=2)
            hidden = builder.rename(hidden, axis="frame", to="seq")
            positions = {"seq": config.max_source_positions, "embed": config.d_model}
            table = self._plain("embed_positions.weight", **positions)
            hidden = builder.add(hidden, table, name="hidden")
        for layer in range(config.encoder_layers):
            hidden = self._attention(hidden, layer, None)
            hidden = self._ffn(hidden, layer)
        with builder.at("encoder.norm"):
            return self.blocks.norm(hidden, f"{self.prefix}layer_norm")

    def decode(self, tokens: Value, memory: Value) -> Value:
        """Emit the decoder: ``[batch, seq]`` to ``[batch, seq, vocab]``."""
        builder, config = self.builder, self.config
        with builder.at("decoder.embed"):
            words = self._plain(
                "embed_tokens.weight", vocab=config.vocab_size, embed=config.d_model
            )
            hidden = builder.embedding(words, tokens, axis="vocab", name="words")
            axes = {"position": config.max_target_positions, "embed": config.d_model}
            table = self._plain("embed_positions.weight", **axes)
            positions = builder.positions(tokens, axis="seq", name="positions")
            learned = builder.embedding(table, positions, axis="position")
            hidden = builder.add(hidden, learned, name="hidden")
            causal = builder.causal(positions, self.blocks.as_keys(positions), name="causal")
        with builder.at("encoder.memory"):
            memory = self.blocks.as_keys(memory)
        for layer in range(config.decoder_layers):
            hidden = self._attention(hidden, layer, causal)
            hidden = self._cross_attention(hidden, layer, memory)
            hidden = self._ffn(hidden, layer)
        with builder.at("decoder.norm"):
            hidden = self.blocks.norm(hidden, f"{self.prefix}layer_norm")
        with builder.at("head"):
            return builder.contract(hidden, words, over="embed", name="logits")

    def _convolved(self, x: Value, name: str, over: str, *, stride: int) -> Value:
        size, embed = x.type[over].size, self.config.d_model
        assert isinstance(size, int), "the width of a model is known"
        weight = self._plain(f"{name}.weight", **{"embed": embed, over: size, "tap": 3})
        bias = self._plain(f"{name}.bias", embed=embed)
        y = self.builder.convolve(
            x, weight, over=over, along="frame", taps="tap", stride=stride, padding=1
        )
        # Whatever the activation of the blocks is, that of the convolutions is GELU.
        return self.builder.node(ACTIVATION_OPS["gelu"], self.builder.add(y, bias)).result

    def _attention(self, hidden: Value, layer: int, causal: Value | None) -> Value:
        prefix = f"{self.prefix}layers.{layer}.self_attn"
        with self.builder.at(f"{self.stack}.layers.{layer}.attention"):
            x = self.blocks.norm(hidden, f"{prefix}_layer_norm")
            mixed = self._attend(x, self.blocks.as_keys(x), prefix, causal)
            return self.builder.add(hidden, mixed, name="hidden")

    def _cross_attention(self, hidden: Value, layer: int, memory: Value) -> Value:
        prefix = f"{self.prefix}layers.{layer}.encoder_attn"
        with self.builder.at(f"{self.stack}.layers.{layer}.cross_attention"):
            x = self.blocks.norm(hidden, f"{prefix}_layer_norm")
            mixed = self._attend(x, memory, prefix, None)
            return self.builder.add(hidden, mixed, name="hidden")

    def _attend(self, x: Value, memory: Value, prefix: str, causal: Value | None) -> Value:
        blocks, heads = self.blocks, self.config.heads(self.stack)
        query = blocks.heads(x, f"{prefix}.q_proj", heads, "q")
        key = blocks.heads(memory, f"{prefix}.k_proj", heads, "kv", has_bias=False)
        value = blocks.heads(memory, f"{prefix}.v_proj", heads, "kv")
        masks = () if causal is None else (causal,)
        mixed = blocks.attend(query, key, value, heads[1] ** -0.5, masks=masks)
        return blocks.linear(mixed, f"{prefix}.out_proj", ("embed", self.config.d_model), "q")

    def _ffn(self, hidden: Value, layer: int) -> Value:
        prefix, config = f"{self.prefix}layers.{layer}.", self.config
        with self.builder.at(f"{self.stack}.layers.{layer}.ffn"):
            x = self.blocks.norm(hidden, f"{prefix}final_layer_norm")
            up, down, width = f"{prefix}fc1", f"{prefix}fc2", config.width(self.stack)
            mixed = self.blocks.two_layers(x, up, down, config.hidden_act, width)
            return self.builder.add(hidden, mixed, name="hidden")

    def _plain(self, name: str, **axes: int) -> Value:
        return self.blocks.params.plain(f"{self.prefix}{name}", self.builder.loc, **axes)
