"""Parts of Transformers with layer norms and biases: BERT, GPT-2, ViT, Whisper and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moecc.families.config import BlockNames
from moecc.families.graphs.decoder import activated
from moecc.families.graphs.parameters import KV_SEQ, Parameters, as_keys
from moecc.families.heads import ModelHead
from moecc.ir.builder import Builder
from moecc.ir.graph import Value

Bias = Value | Callable[[Value, Value], Value]
"""What is added to scores, or a function of queries and keys by head."""


@dataclass(frozen=True)
class Blocks:
    """Emits linear layers, norms, attention and feed-forward blocks.

    Attributes:
      params: the parameters of the model, whose graph the operations are appended to.
      config: the config of the model.
    """

    params: Parameters
    config: Any

    @cached_property
    def builder(self) -> Builder:
        """Appends to the graph of the parameters."""
        return Builder(self.params.graph)

    @property
    def names(self) -> BlockNames:
        """The names of a model with layer norms."""
        names = self.params.names
        assert isinstance(names, BlockNames), "the names of a model with layer norms"
        return names

    def linear(
        self, x: Value, name: str, to: tuple[str, int], over: str, *, has_bias: bool = True
    ) -> Value:
        """Emit a product with the matrix of `name` over the axis `over`, and its bias.

        Args:
          x: what is multiplied.
          name: the prefix of ``weight`` and ``bias``.
          to: the axis that the product makes, and its size.
          over: the axis that is summed over.
          has_bias: whether there is a bias.
        """
        size, (axis, width), loc = x.type[over].size, to, self.builder.loc
        assert isinstance(size, int), "the width of a model is known"
        weight = self.params.plain(f"{name}.weight", loc, **self.stored({axis: width, over: size}))
        bias = self.params.plain(f"{name}.bias", loc, **{axis: width}) if has_bias else None
        y = self.builder.contract(x, weight, over=over)
        return y if bias is None else self.builder.add(y, bias)

    def stored(self, axes: dict[str, int]) -> dict[str, int]:
        """Return the axes of a matrix in their order on disk."""
        return dict(reversed(axes.items())) if self.params.names.inputs_first else axes

    def norm(
        self, x: Value, name: str, *, has_bias: bool = True, eps: float | None = None
    ) -> Value:
        """Emit the norm over the last axis, the width, with the parameters of `name`.

        Without a name `x` stays as it is; `eps` is that of the config unless it is stated.
        """
        if not name:
            return x
        axis, width = x.type.axes[-1].name, x.type.axes[-1].size
        assert isinstance(width, int), "the width of a model is known"
        scale = self.params.plain(f"{name}.weight", self.builder.loc, **{axis: width})
        eps = self.config.layer_norm_eps if eps is None else eps
        if not has_bias:
            x = self.builder.sub(x, self.builder.mean(x, axes=axis))
            return self.builder.rms_norm(x, scale, axis=axis, eps=eps, name="norm")
        bias = self.params.plain(f"{name}.bias", self.builder.loc, **{axis: width})
        return self.builder.layer_norm(x, scale, bias, axis=axis, eps=eps, name="norm")

    def as_keys(self, x: Value) -> Value:
        """Return `x` with its sequence axis renamed for keys and values."""
        return as_keys(self.builder, x)

    def heads(
        self, x: Value, name: str, heads: tuple[int, int], axis: str, *, has_bias: bool = True
    ) -> Value:
        """Emit a projection to heads, ``[…, head, head_dim]``.

        Args:
          x: what is projected.
          name: the prefix of ``weight`` and ``bias``.
          heads: the number of heads and their width.
          axis: the name of all heads together: ``q``, or ``kv`` for keys and values.
          has_bias: whether there is a bias.
        """
        count, width = heads
        y = self.linear(x, name, (axis, count * width), "embed", has_bias=has_bias)
        return self.split(y, axis, heads)

    def split(self, y: Value, axis: str, heads: tuple[int, int]) -> Value:
        """Return `y` with the axis of all heads together cut into heads."""
        into = (("head", heads[0]), ("head_dim", heads[1]))
        return self.builder.split(y, axis=axis, into=into)

    def attend(
        self,
        query: Value,
        key: Value,
        value: Value,
        scale: float | None,
        *,
        bias: Value | None = None,
        penalty: Value | None = None,
        masks: Sequence[Value] = (),
    ) -> Value:
        """Emit the attention of heads, ``[batch, seq, q]``.

        Args:
          query: by head, ``[batch, seq, head, head_dim]``.
          key: by head, along ``kv_seq``.
          value: by head, along ``kv_seq``.
          scale: the factor on the scores, if any.
          bias: what is added to them.
          penalty: what is added to them, too, with other axes than those of `bias`.
          masks: which of them count.
        """
        builder = self.builder
        scores = builder.contract(query, key, over="head_dim", name="scores")
        if scale is not None:
            scores = builder.scale(scores, by=scale)
        if bias is not None:
            scores = builder.add(scores, bias)
        if penalty is not None:
            scores = builder.add(scores, penalty)
        for mask in masks:
            scores = builder.mask(scores, mask)
        weights = builder.softmax(scores, axis=KV_SEQ, name="weights")
        mixed = builder.contract(weights, value, over=KV_SEQ, name="mixed")
        return builder.merge(mixed, axes=("head", "head_dim"), into="q")

    def attention(
        self,
        x: Value,
        memory: Value | None,
        names: Sequence[str],
        heads: tuple[int, int],
        *,
        bias: Bias | None = None,
        penalty: Value | None = None,
        scale: float | None = None,
        masks: Sequence[Value] = (),
        unbiased: str = "",
        rotate: Callable[[Value], Value] | None = None,
    ) -> Value:
        """Emit attention with its projections, ``[batch, seq, embed]``.

        Args:
          x: what attends.
          memory: what it attends to, along ``kv_seq``; None: `x` itself.
          names: the prefixes of the projections to queries, keys and values, and of the last one.
          heads: the number of heads and their width.
          bias: what is added to the scores, or a function of queries and keys that makes it.
          penalty: what is added to them, too, with other axes than those of `bias`.
          scale: the factor on the scores; by default 1 / √width.
          masks: which of them count.
          unbiased: the letters of the projections without a bias, of ``qkvo``.
          rotate: rotates heads of queries and keys, along ``seq``.
        """
        embed = x.type["embed"].size
        assert isinstance(embed, int), "the width of a model is known"
        query = self.heads(x, names[0], heads, "q", has_bias="q" not in unbiased)
        has_key_bias = "k" not in unbiased
        if rotate is not None:
            query = rotate(query)
            keys = rotate(self.heads(x, names[1], heads, "kv", has_bias=has_key_bias))
        memory = self.as_keys(x) if memory is None else memory
        if rotate is None:
            key = self.heads(memory, names[1], heads, "kv", has_bias=has_key_bias)
        else:
            key = self.as_keys(keys)
        value = self.heads(memory, names[2], heads, "kv", has_bias="v" not in unbiased)
        if callable(bias):
            bias = bias(query, key)
        scale = heads[1] ** -0.5 if scale is None else scale
        mixed = self.attend(query, key, value, scale, bias=bias, penalty=penalty, masks=masks)
        return self.linear(mixed, names[3], ("embed", embed), "q", has_bias="o" not in unbiased)

    def add_head(self, hidden: Value, head: ModelHead | None, mask: Value | None = None) -> None:
        """Emit a head on ``[batch, seq, embed]``, and its output; without one nothing.

        Args:
          hidden: the hidden states.
          head: the head.
          mask: which tokens a mean is over; None: all.
        """
        if head is None:
            return
        with self.builder.at("head"):
            x = hidden
            for step in head.steps:
                if step == "mean" and mask is not None:
                    x = self._mean(x, mask)
                else:
                    x = self._head_step(x, *step.split(), head=head)
        self.params.graph.set_output(head.output, x)
        self.params.graph.attrs["head"] = head.task

    def _head_step(self, x: Value, op: str, *modules: str, head: ModelHead) -> Value:
        builder, seq = self.builder, x.type["seq"].size if "seq" in x.type else None
        match op:
            case "first":
                return self._first(x)
            case "mean":
                return builder.mean(x, axes="seq")
            case "first-and-mean":
                assert isinstance(seq, int), "an image has a number of patches"
                others = builder.slice(x, axis="seq", start=1, stop=seq)
                parts = self._first(x), builder.mean(others, axes="seq")
                names = (builder.rename(part, axis="embed", to="feature") for part in parts)
                return builder.join(*names, axis="feature")
            case "norm" | "norm-unbiased":
                return self.norm(x, modules[0], has_bias=op == "norm")
            case "linear" | "linear-unbiased":
                width = head.widths[modules[0]]
                return self._dense(x, modules[0], width, has_bias=op == "linear")
            case "labels":
                over = x.type.axes[-1].name
                width = head.widths[modules[0]]
                return self.linear(x, modules[0], ("label", width), over)
            case "tokens":
                return self._tokens(x, *modules, is_tied=head.is_tied)
        if op == "activation":
            return activated(builder, x, self.config.hidden_act)
        return builder.node(op, x).result

    def _first(self, x: Value) -> Value:
        first = self.builder.constant(value=0.0, dtype="i32")
        return self.builder.embedding(x, first, axis="seq", name="first")

    def _mean(self, x: Value, mask: Value) -> Value:
        """Emit the mean over the tokens of a mask."""
        builder = self.builder
        total = builder.sum(builder.mask(x, mask, fill=0.0), axes="seq")
        count = builder.sum(builder.cast(mask, dtype="f32"), axes="seq")
        return builder.div(total, count)

    def _dense(self, x: Value, module: str, width: int, *, has_bias: bool = True) -> Value:
        y = self.linear(x, module, ("out", width), "embed", has_bias=has_bias)
        return self.builder.rename(y, axis="out", to="embed")

    def _tokens(self, x: Value, module: str, bias: str, *, is_tied: bool) -> Value:
        loc, vocab = self.builder.loc, self.config.vocab_size
        name = self.params.names.embedding if is_tied else f"{module}.weight"
        embed = x.type["embed"].size
        assert isinstance(embed, int), "the width of a model is known"
        table = self.params.plain(name, loc, vocab=vocab, embed=embed)
        shift = self.params.plain(bias, loc, vocab=vocab)
        over = table.type.axes[1].name
        if over != "embed":
            x = self.builder.rename(x, axis="embed", to=over)
        return self.builder.add(self.builder.contract(x, table, over=over), shift)

    def feed_forward(self, x: Value, prefix: str, *, has_bias: bool = True) -> Value:
        """Emit the block of two layers that the family's names have behind `prefix`."""
        up, down = f"{prefix}{self.names.fc_in}", f"{prefix}{self.names.fc_out}"
        config = self.config
        return self.two_layers(
            x, up, down, config.hidden_act, config.intermediate_size, has_bias=has_bias
        )

    def gated(self, x: Value, prefix: str, act: str, *, has_bias: bool = True) -> Value:
        """Emit a gated block; gate and up may be one matrix, the gate first."""
        names, embed = self.names, x.type["embed"].size
        assert isinstance(embed, int), "the width of a model is known"
        width, both = self.config.intermediate_size, f"{prefix}{names.gate_up}"

        def inner(word: str, half: int) -> Value:
            if not names.gate_up:
                return self.linear(x, f"{prefix}{word}", ("mlp", width), "embed", has_bias=has_bias)
            return self.part(x, both, word, half, ("mlp", width), 2, has_bias=has_bias)

        gate = activated(self.builder, inner(names.gate, 0), act)
        hidden = self.builder.mul(gate, inner(names.up, 1))
        down = f"{prefix}{names.gated_out}"
        return self.linear(hidden, down, ("embed", embed), "mlp", has_bias=has_bias)

    def part(
        self,
        x: Value,
        name: str,
        word: str,
        number: int,
        to: tuple[str, int],
        parts: int,
        *,
        has_bias: bool = True,
    ) -> Value:
        """Emit a product with a part of the matrix of `name`, and with that of its bias.

        Args:
          x: what is multiplied.
          name: the prefix of ``weight`` and ``bias``.
          word: what the part is called.
          number: which part it is.
          to: the axis that the product makes, and its size.
          parts: the number of parts, which are of one size.
          has_bias: whether there is a bias.
        """
        embed, params, (axis, width) = x.type["embed"].size, self.params, to
        along = "qkv" if parts == 3 else axis
        assert isinstance(embed, int), "the width of a model is known"
        loc, at, fused = self.builder.loc, number * width, (along, parts * width)
        axes = {axis: width, "embed": embed}
        weight = params.part(f"{name}.{word}.weight", f"{name}.weight", loc, at, fused, axes)
        y = self.builder.contract(x, weight, over="embed")
        if not has_bias:
            return y
        bias = params.part(f"{name}.{word}.bias", f"{name}.bias", loc, at, fused, {axis: width})
        return self.builder.add(y, bias)

    def two_layers(
        self, x: Value, up: str, down: str, act: str, width: int, *, has_bias: bool = True
    ) -> Value:
        """Emit ``down(act(up(x)))`` ; `width` is that of the inner axis."""
        embed = x.type["embed"].size
        assert isinstance(embed, int), "the width of a model is known"
        inner = self.linear(x, up, ("mlp", width), "embed", has_bias=has_bias)
        inner = activated(self.builder, inner, act)
        return self.linear(inner, down, ("embed", embed), "mlp", has_bias=has_bias)
