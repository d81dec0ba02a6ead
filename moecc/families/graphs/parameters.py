"""Parameters of a graph: name, axes on disk, and the expression that reads them.

The name of a parameter is that of its tensor; experts, one tensor each on disk, are one stacked
parameter, with the name in the checkpoint without the number of the expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from moecc.errors import InputError
from moecc.families.config import FUSED_DOWN, FUSED_GATE_UP, FUSED_ROUTER, ModelConfig, TensorNames
from moecc.families.heads import ModelHead
from moecc.ir.builder import Builder
from moecc.ir.conventions import DECODER_TOKENS, TOKENS
from moecc.ir.graph import Graph, Value
from moecc.types import F32, I32, PRED, DType, Size, tensor
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
)

DtypeOf = Callable[[str], DType]
"""Maps the name of a tensor to its element type on disk."""

LAYOUTS = ("experts", "fused", "stacked")
"""One tensor an expert, the fused tensors of transformers 5, or one for all experts of a layer."""


KV_SEQ = "kv_seq"
"""The name of the sequence axis of keys and values."""


def as_keys(builder: Builder, x: Value) -> Value:
    """Return `x` with its sequence axis renamed for keys and values."""
    return builder.rename(x, axis="seq", to=KV_SEQ)


def float32_of(name: str) -> DType:
    """Return float32, whatever the tensor."""
    return F32


@dataclass(frozen=True, slots=True)
class GraphRequest:
    """What a graph is built with, beside its config.

    Attributes:
      dtype_of: the element type of each tensor on disk; float32 by default.
      checkpoint: the path of the weights.
      layout: how experts are stored on disk, one of `LAYOUTS`.
      padding: whether there is an input ``mask``.
      batch: the size of the batch axis.
      seq: the length of the sequences, in an encoder-decoder those of the encoder.
      decoder_seq: the length of the decoder's.
      head: the head of an encoder; None leaves its hidden states as they are.
    """

    dtype_of: DtypeOf | None = None
    checkpoint: str = ""
    layout: str = "experts"
    padding: bool = False
    batch: Size = "B"
    seq: Size = "S"
    decoder_seq: Size = "T"
    head: ModelHead | None = None

    def tokens(self, graph: Graph) -> Value:
        """Return a new input ``tokens : i32[batch, seq]``."""
        return graph.input(TOKENS, tensor(I32, batch=self.batch, seq=self.seq))

    def decoder_tokens(self, graph: Graph) -> Value:
        """Return a new input ``decoder_tokens : i32[batch, seq]``, of another length."""
        return graph.input(DECODER_TOKENS, tensor(I32, batch=self.batch, seq=self.decoder_seq))

    def mask(self, graph: Graph) -> Value | None:
        """Return a new input ``mask : pred[batch, seq]``; None if there is to be none."""
        if not self.padding:
            return None
        return graph.input("mask", tensor(PRED, batch=self.batch, seq=self.seq))


class Parameters:
    """Creates the parameters of one graph; each name is created once and then reused.

    Attributes:
      graph: the graph that they are added to.
      names: the family's names.
      dtype_of: the element type of each tensor on disk.
      layout: one of `LAYOUTS`.
    """

    def __init__(
        self,
        graph: Graph,
        names: TensorNames,
        dtype_of: DtypeOf = float32_of,
        layout: str = "experts",
    ) -> None:
        if layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r}", expected=" or ".join(LAYOUTS))
        self.graph = graph
        self.names = names
        self.dtype_of = dtype_of
        self.layout = layout

    @classmethod
    def of(cls, config: ModelConfig, request: GraphRequest) -> Parameters:
        """Return the parameters of a new graph of `config`, without any yet."""
        attrs = {
            "family": config.model_type,
            "config": config.to_json(),
            "checkpoint": request.checkpoint,
        }
        graph = Graph(config.model_type, attrs)
        return cls(graph, config.names, request.dtype_of or float32_of, request.layout)

    def plain(self, name: str, loc: str, **axes: int) -> Value:
        """Return the parameter that is the tensor `name`, with axes in their order on disk."""
        return self._param(name, loc, axes, self._source(name, **axes))

    def part(
        self,
        name: str,
        of: str,
        loc: str,
        at: int,
        extent: tuple[str, int],
        axes: dict[str, int],
        cut: str | None = None,
    ) -> Value:
        """Return the parameter `name`: a range of the tensor `of` along one axis.

        Args:
          name: the name of the parameter.
          of: the name of the tensor.
          loc: the location in the model.
          at: where the range begins.
          extent: the name and the size of the tensor's axis.
          axes: the axes of the parameter, in their order on disk.
          cut: which of them is the range; the first one by default.
        """
        cut, (along, size) = cut or next(iter(axes)), extent
        source = self._source(of, **_with_axis(axes, cut, along, size))
        read: Expr = Slice(source, along, at, at + axes[cut])
        return self._param(name, loc, axes, read if along == cut else Rename(read, along, cut))

    def without_axis(self, name: str, loc: str, *without: str, **axes: int) -> Value:
        """Return the tensor `name` without axes that have size 1 on disk.

        Those that `axes` do not have are the first ones.
        """
        first = {axis: 1 for axis in without if axis not in axes}
        read = self._source(name, **first, **axes)
        for axis in without:
            read = Index(read, axis, 0)
        return self._param(name, loc, {n: s for n, s in axes.items() if n not in without}, read)

    def with_axis(self, name: str, loc: str, axis: str, **axes: int) -> Value:
        """Return the tensor `name`, of one axis on disk, with a first axis of size 1."""
        into = ((axis, 1), *axes.items())
        read = Split(self._source(name, **axes), next(iter(axes)), into)
        return self._param(name, loc, dict(into), read)

    def head_part(
        self,
        name: str,
        of: str,
        loc: str,
        part: tuple[int, int],
        heads: tuple[int, int],
        axes: dict[str, int],
        cut: str,
    ) -> Value:
        """Return the parameter `name`: its part of each head of the tensor `of`.

        Args:
          name: the name of the parameter.
          of: the name of the tensor, whose axis has for each head all parts, one after another.
          loc: the location in the model.
          part: which part, and how many there are.
          heads: the number of heads, and their width.
          axes: the axes of the parameter, in their order on disk.
          cut: which of them are the heads.
        """
        number, count = part
        source = self._source(of, **_with_axis(axes, cut, "qkv", count * axes[cut]))
        parts = (("head", heads[0]), ("part", count), ("head_dim", heads[1]))
        by_head = Index(Split(source, "qkv", parts), "part", number)
        return self._param(name, loc, axes, Merge(by_head, ("head", "head_dim"), cut))

    def group_part(
        self,
        name: str,
        of: str,
        loc: str,
        part: tuple[int, int],
        heads: tuple[int, int, int],
        axes: dict[str, int],
    ) -> Value:
        """Return the parameter `name`: some heads of each group of the tensor `of`.

        Args:
          name: the name of the parameter.
          of: the name of the tensor, whose axis has for each group all heads, one after another.
          loc: the location in the model.
          part: the first head of a group, and the one after the last.
          heads: the number of groups, of heads in each, and the width of a head.
          axes: the axes of the parameter, that of the heads first.
        """
        names, cut = ("group", "head", "head_dim"), next(iter(axes))
        source = self._source(of, **_with_axis(axes, cut, "qkv", prod(heads)))
        split = Split(source, "qkv", tuple(zip(names, heads, strict=True)))
        return self._param(name, loc, axes, Merge(Slice(split, "head", *part), names, cut))

    def router(self, layer: str, loc: str, *, expert: int, embed: int) -> Value:
        """Return the router's matrix, ``[expert, embed]``."""
        name = f"{layer}{self.names.sparse}{self.names.router}"
        read = f"{layer}{FUSED_ROUTER}" if self.layout == "fused" else name
        axes = {"expert": expert, "embed": embed}
        return self._param(name, loc, axes, self._source(read, **axes))

    def shared_gate(self, layer: str, loc: str, *, embed: int) -> Value:
        """Return the gate of a shared expert, ``[embed]``; its first axis on disk has size 1."""
        name = f"{layer}{self.names.sparse}{self.names.shared_gate}"
        read = Index(self._source(name, shared=1, embed=embed), "shared", 0)
        return self._param(name, loc, {"embed": embed}, read)

    def routing_bias(self, layer: str, loc: str, *, expert: int) -> Value:
        """Return the bias in the choice of experts, ``[expert]``."""
        name = f"{layer}{self.names.sparse}{self.names.routing_bias}"
        if not self.names.routing_bias_rows:
            return self.plain(name, loc, expert=expert)
        read = Index(self._source(name, row=1, expert=expert), "row", 0)
        return self._param(name, loc, {"expert": expert}, read)

    def turned(
        self, name: str, loc: str, head_dim: int, rotary_dim: int, axes: dict[str, int]
    ) -> Value:
        """Return rows of heads in which the first half of what is rotated is so with the second.

        Args:
          name: the name of the tensor.
          loc: the location in the model.
          head_dim: the width of a head.
          rotary_dim: how many entries of it, the first ones, are rotated.
          axes: the axes of the parameter, that of the heads first.
        """
        read = self._source(name, **axes)
        if self.names.pairs_neighbours:
            rows, count = next(iter(axes.items()))
            parts = (("head", count // head_dim), ("entry", head_dim))
            turned = halves_of_neighbours(Split(read, rows, parts), "entry", rotary_dim)
            read = Merge(turned, ("head", "entry"), rows)
        return self._param(name, loc, axes, read)

    def rotated_first(
        self,
        name: str,
        of: str,
        loc: str,
        heads: tuple[int, int],
        start: int,
        axes: dict[str, int],
        *,
        pairs: bool,
        alone: bool = False,
    ) -> Value:
        """Return rows of heads whose last entries are rotated, these first; see `turned`.

        Args:
          name: the name of the parameter.
          of: the name of the tensor.
          loc: the location in the model.
          heads: the number of heads, and their width on disk.
          start: the first entry that is rotated.
          axes: the axes of the parameter, that of the heads first.
          pairs: whether neighbours are rotated together on disk.
          alone: whether the parameter has no other entries; there is one head then.
        """
        (count, width), rows = heads, next(iter(axes))
        source = self._source(of, **_with_axis(axes, rows, "heads", count * width))
        parts = (("head", count), ("entry", width))
        # The tensor of a single head is read by `part`, too, and both have to cut it alike.
        all_rows, axis = (source, "heads") if alone else (Split(source, "heads", parts), "entry")
        read: Expr = Slice(all_rows, axis, start, width)
        if pairs:
            read = halves_of_neighbours(read, axis, width - start)
        if alone:
            return self._param(name, loc, axes, Rename(read, axis, rows))
        read = Concat((read, Slice(all_rows, axis, 0, start)), axis)
        return self._param(name, loc, axes, Merge(read, ("head", "entry"), rows))

    def of_heads(self, name: str, loc: str, heads: int, head_dim: int) -> Value:
        """Return the scales of norms of heads, ``[head, head_dim]``; see `turned`."""
        axes = {"head": heads, "head_dim": head_dim}
        if "{head}" not in name:
            read = self._source(name, **axes)
        else:
            names = [name.format(head=head) for head in range(heads)]
            read = Stack(tuple(self._source(n, head_dim=head_dim) for n in names), "head")
        if self.names.pairs_neighbours:
            read = halves_of_neighbours(read, "head_dim", head_dim)
        return self._param(name.replace("{head}.", ""), loc, axes, read)

    def expert(
        self,
        layer: str,
        matrix: str,
        loc: str,
        axes: dict[str, int],
        experts: int,
        *,
        is_gated: bool = True,
    ) -> Value:
        """Return one matrix of all experts, stacked.

        Args:
          layer: the prefix of the layer's tensors.
          matrix: ``gate``, ``up`` or ``down``.
          loc: the location in the model.
          axes: the axes of one expert's matrix: outputs first, as on disk unless
            `TensorNames.inputs_first`.
          experts: the number of experts.
          is_gated: whether there is a gate.
        """
        names, word = self.names, self.names.matrix(matrix, is_gated)
        prefix, stacked = f"{layer}{names.sparse}", {"expert": experts, **axes}
        name = f"{prefix}{names.stack}{word}.weight"
        down, gate_up = prefix + names.expert_down, prefix + names.expert_gate_up
        if names.inputs_first:
            return self._param(name, loc, stacked, self._reversed(down, gate_up, matrix, stacked))
        if self.layout == "fused":
            down, gate_up = layer + FUSED_DOWN, layer + FUSED_GATE_UP
        elif self.layout == "stacked":
            return self.plain(name, loc, **stacked)
        elif not names.expert_gate_up:
            read = self._stacked(f"{prefix}{names.expert}{word}.weight", experts, axes)
            return self._param(name, loc, stacked, read)
        if matrix == "down":
            return self._param(name, loc, stacked, self._source(down, **stacked))
        return self._param(name, loc, stacked, self._half(gate_up, matrix, stacked))

    def expert_bias(
        self, layer: str, matrix: str, loc: str, axes: dict[str, int], experts: int
    ) -> Value:
        """Return a bias of all experts, gate and up in one tensor on disk; see `expert`."""
        prefix, names = f"{layer}{self.names.sparse}", self.names
        name = f"{prefix}{names.stack}{names.matrix(matrix)}.bias"
        out = next(iter(axes))
        stacked = {"expert": experts, out: axes[out]}
        down, gate_up = prefix + names.expert_down, prefix + names.expert_gate_up
        read = self._reversed(f"{down}_bias", f"{gate_up}_bias", matrix, stacked)
        return self._param(name, loc, stacked, read)

    def _reversed(self, down: str, gate_up: str, matrix: str, axes: dict[str, int]) -> Expr:
        """Return a tensor of all experts whose inputs are first on disk."""
        experts, *others = axes
        on_disk = {name: axes[name] for name in (experts, *reversed(others))}
        if matrix == "down":
            read: Expr = self._source(down, **on_disk)
        elif self.names.in_turns:
            both = self._source(gate_up, **_with_axis(on_disk, "mlp", "gate_up", 2 * axes["mlp"]))
            turns = Split(both, "gate_up", (("mlp", axes["mlp"]), ("turn", 2)))
            read = Index(turns, "turn", 0 if matrix == "gate" else 1)
        else:
            read = self._half(gate_up, matrix, on_disk)
        return read if len(others) == 1 else Permute(read, tuple(axes))

    def _half(self, gate_up: str, matrix: str, axes: dict[str, int]) -> Expr:
        """Return ``gate`` or ``up``, the first or the second half of a tensor of both."""
        width = axes["mlp"]
        start = 0 if matrix == "gate" else width
        both = self._source(gate_up, **{**axes, "mlp": 2 * width})
        return Slice(both, "mlp", start, start + width)

    def _stacked(self, name: str, experts: int, axes: dict[str, int]) -> Expr:
        names = [name.format(expert=e) for e in range(experts)]
        dtypes = [self.dtype_of(expert) for expert in names]
        types = {dtype: tensor(dtype, **axes) for dtype in set(dtypes)}
        parts = (Source(n, types[d]) for n, d in zip(names, dtypes, strict=True))
        return Stack(tuple(parts), "expert")

    def _source(self, name: str, **axes: int) -> Expr:
        return Source(name, tensor(self.dtype_of(name), **axes))

    def _param(self, name: str, loc: str, axes: dict[str, int], read: Expr) -> Value:
        if name in self.graph.params:  # layers share it
            return self.graph.params[name]
        return self.graph.param(name, tensor(F32, **axes), read, loc=loc)


def halves_of_neighbours(read: Expr, axis: str, count: int) -> Expr:
    """Return `read` with the first `count` entries of an axis in another order.

    The even ones come first, and then the odd ones.
    """
    size, at = read.type[axis].size, read.type.names.index(axis)
    assert isinstance(size, int), "a weight has fixed sizes"
    before, after = read.type.names[:at], read.type.names[at + 1 :]
    paired = read if count == size else Slice(read, axis, 0, count)
    split = Split(paired, axis, (("pair", count // 2), ("half", 2)))
    turned = Merge(Permute(split, (*before, "half", "pair", *after)), ("half", "pair"), axis)
    return turned if count == size else Concat((turned, Slice(read, axis, count, size)), axis)


def _with_axis(axes: dict[str, int], old: str, new: str, size: int) -> dict[str, int]:
    """Return `axes` in their order with `new` in the place of `old`."""
    return {(new if n == old else n): (size if n == old else s) for n, s in axes.items()}
