"""Inputs of routing losses and metrics: one routed layer, and means over its tokens.

If ``assign_slots`` has a mask, padding is excluded everywhere.  A *unit* is the set of tokens that
a balancing loss is computed over before averaging: a token group, a sequence, or the batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

from moecc.ir.attributes import SlotAttrs
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.table.slots import assigner, operands_by_word
from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType

UNITS = ("group", "sequence", "global")


@dataclass(frozen=True)
class Scores:
    """A router's scores of the experts.

    Attributes:
      logits: including noise if there is any, ``[*tokens, expert]``; prototypes add an axis.
      chosen: the chosen experts, best first, ``[*tokens, choice]``; with prototypes
        numbered within each, ``[*tokens, choice, first]``.  None where experts choose tokens.
      clean: the logits without noise, if noise was added.
      noise_std: the standard deviation of that noise; 0 without noise.
    """

    logits: Value
    chosen: Value | None = None
    clean: Value | None = None
    noise_std: float = 0.0

    @property
    def count(self) -> int:
        """The number of experts that the logits score: those of one prototype."""
        size = self.logits.type["expert"].size
        assert isinstance(size, int), "the number of experts is known"
        return size

    @property
    def picks(self) -> Value:
        """The experts that the tokens chose, where tokens choose."""
        assert self.chosen is not None, "tokens choose"
        return self.chosen

    @property
    def choice(self) -> str:
        """The axis of the choices, best first."""
        (name,) = (n for n in self.picks.type.names if n not in self.logits.type)
        return name

    @property
    def top_k(self) -> int:
        """The number of experts chosen per token."""
        size = self.picks.type[self.choice].size
        assert isinstance(size, int), "the number of choices is known"
        return size


@dataclass(frozen=True)
class Routed:
    """One layer's routing.

    Attributes:
      experts: the experts of each choice, ``[*tokens, choice]``.
      gates: the weights of the experts' results.
      slots: the slots, the result of ``assign_slots`` or ``expert_choice``.
      scores: the router's scores; None without a router.
    """

    experts: Value
    gates: Value
    slots: Value
    scores: Scores | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token axes, outermost first."""
        return SlotAttrs.of_node(assigner(self.slots)).tokens

    @property
    def choice(self) -> str:
        """The axis of the choices."""
        (name,) = (n for n in self.slots.type.names if n not in self.tokens)
        return name

    @property
    def count(self) -> int:
        """The number of experts."""
        return SlotAttrs.of_node(assigner(self.slots)).experts

    @property
    def given(self) -> dict[str, Value]:
        """The operands of the slot assignment besides the experts, by word."""
        node = assigner(self.slots)
        return operands_by_word(node.operands, node.attrs)


TOTALS = "totals"
"""The graph attribute that says what its inputs of totals are, by name."""


@dataclass(frozen=True)
class Total:
    """A number of the whole batch that the graph of a part takes as an input.

    Attributes:
      unit: what is counted: ``token``, or ``group`` or ``sequence`` with a token at least.
      mask: the input that is true for tokens, or the output where that is computed.
      groups: of a group: the token groups of a part.
      group_size: of a group: its tokens, in place of their number; 0 for none.
    """

    unit: str
    mask: str
    groups: int = 0
    group_size: int = 0

    @property
    def name(self) -> str:
        """The name of the input."""
        size = f"-of-{self.group_size}" if self.group_size else ""
        many = f"-{self.groups}" if self.groups and not self.group_size else ""
        return f"total.{self.mask}.{self.unit}{many}{size}"

    def input_of(self, graph: Graph) -> Value:
        """Return the input of `graph`, a float32, which is added where it is missing."""
        if self.name in graph.inputs:
            return graph.inputs[self.name]
        graph.attrs.setdefault(TOTALS, {})[self.name] = asdict(self)
        return graph.input(self.name, TensorType(F32))


MASK = "mask."
"""The prefix of outputs that are true for tokens, where a graph computes that of its inputs."""


def _mask_name(graph: Graph, mask: Value) -> str:
    """Return the input that is `mask`, or the output, which is added where it is missing."""
    if mask.name in graph.inputs:
        return mask.name
    name = f"{MASK}{mask.name}"
    if name not in graph.output_names:
        graph.set_output(name, mask)
    return name


@dataclass(frozen=True)
class Means:
    """Builds means over the tokens of a layer.

    Attributes:
      builder: where operations are appended.
      routed: the routing.
      unit: ``group``, ``sequence`` or ``global``.
      parts: the graph sees one of so many equal parts of a batch, and its means add up to that of
        the batch: where there is padding, they divide by totals of the batch, which are inputs.
    """

    builder: Builder
    routed: Routed
    unit: str = "group"
    parts: int = 1

    @cached_property
    def named(self) -> Value:
        """1 for each choice that names an expert; of a type in which counts are exact."""
        b = self.builder
        hot = b.one_hot(self.routed.experts, into=(("expert", self.routed.count),))
        return b.sum(hot, axes="expert")

    def over_tokens(self, x: Value) -> Value:
        """Return the mean over all tokens, padding excluded."""
        b, tokens = self.builder, self.routed.tokens
        if "mask" not in self.routed.given:
            return self.share(b.mean(x, axes=tokens))
        counted = self._counted(x)
        total = b.sum(b.mul(x, counted), axes=tokens)
        return b.div(total, self._number("token", b.sum(counted, axes=tokens)))

    def over_units(self, x: Value) -> Value:
        """Return the mean of ``[*tokens, expert]`` over the tokens of each unit.

        A unit that is all padding has zeros.
        """
        b = self.builder
        if "mask" not in self.routed.given and self.unit != "group":
            return b.mean(x, axes=self._inside_unit)
        counted = self._counted(x)
        total, number = self._unit_sum(b.mul(x, counted)), self._unit_sum(counted)
        return b.div(total, self.at_least_one(number))

    def across_units(self, x: Value) -> Value:
        """Return the mean of ``[*unit, …]`` over the units with tokens, and over the other axes.

        Units of padding would dilute the mean; without any token it is 0.
        """
        b, filled = self.builder, self._filled
        if filled is None or not filled.type.names:
            return self.share(self.all(x))
        units, counted = filled.type.names, self.cast(filled, x)
        total = b.sum(b.mul(x, counted), axes=units)
        return self.all(b.div(total, self._number(self.unit, b.sum(counted, axes=units))))

    def divisor(self, x: Value) -> Value:
        """Return ``[*unit, …]`` with 1 for the units without tokens, to avoid 0 / 0."""
        b, filled = self.builder, self._filled
        if filled is None:
            return x
        return b.mask(x, b.less(self.constant(0.0, filled), filled), fill=1.0)

    def all(self, x: Value) -> Value:
        """Return the mean over all remaining axes, prototypes for example."""
        return self.builder.mean(x, axes=x.type.names) if x.type.names else x

    def share(self, x: Value) -> Value:
        """Return what the mean `x` of a part adds to that of the batch, without padding."""
        return x if self.parts == 1 else self.builder.scale(x, by=1 / self.parts)

    def constant(self, number: float, like: Value) -> Value:
        """Return `number` with the element type of `like`."""
        return self.builder.constant(value=number, dtype=like.type.dtype.name)

    def cast(self, x: Value, like: Value) -> Value:
        """Return `x` with the element type of `like`."""
        kind = like.type.dtype
        return x if x.type.dtype == kind else self.builder.cast(x, dtype=kind.name)

    def at_least_one(self, x: Value) -> Value:
        """Return max(`x`, 1), for a count used as a divisor."""
        return self.builder.maximum(x, self.constant(1.0, x))

    def _number(self, unit: str, own: Value) -> Value:
        """Return how many units a mean is over: those that the part has, or those of the batch."""
        if self.parts == 1:
            return self.at_least_one(own)
        graph, groups, size = self.builder.graph, 0, 0
        mask = _mask_name(graph, self.routed.given["mask"])
        if unit == "group":
            attrs = SlotAttrs.of_node(assigner(self.routed.slots))
            groups, size = attrs.groups, attrs.group_size
        total = Total(unit, mask, groups, size).input_of(graph)
        return self.at_least_one(self.cast(total, own))

    @cached_property
    def _filled(self) -> Value | None:
        """1 for the units that have tokens and 0 for the others; None without padding."""
        if "mask" not in self.routed.given:
            return None
        number = self._unit_sum(self._counted(self.named))
        return self.builder.minimum(number, self.constant(1.0, number))

    def _counted(self, like: Value) -> Value:
        """Return 1 for tokens and 0 for padding, ``[*tokens]``."""
        b = self.builder
        ones = self.cast(b.max(self.named, axes=self.routed.choice), like)
        mask = self.routed.given.get("mask")
        return ones if mask is None else b.mask(ones, mask, fill=0.0)

    def _unit_sum(self, x: Value) -> Value:
        if self.unit == "group":
            return self.builder.group_sum(x, self.routed.slots)
        return self.builder.sum(x, axes=self._inside_unit)

    @property
    def _inside_unit(self) -> tuple[str, ...]:
        tokens = self.routed.tokens
        return tokens if self.unit == "global" else tokens[1:]
