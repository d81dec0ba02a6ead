"""Losses and metrics of routing, built of graph operations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Value
from moecc.ir.ops.slots import SlotsOp, assigner, operands_by_word
from moecc.types import F32, TensorType


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
        return self.logits.type["expert"].fixed_size

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
        return self.picks.type[self.choice].fixed_size


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
    scores: Scores | None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token axes, outermost first."""
        return SlotsOp.of_node(assigner(self.slots)).tokens

    @property
    def choice(self) -> str:
        """The axis of the choices."""
        (name,) = (n for n in self.slots.type.names if n not in self.tokens)
        return name

    @property
    def count(self) -> int:
        """The number of experts."""
        return SlotsOp.of_node(assigner(self.slots)).experts

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
    unit: str
    parts: int

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

    def over_units(self, x: Value, name: str | None = None) -> Value:
        """Return the mean of ``[*tokens, expert]`` over the tokens of each unit.

        A unit that is all padding has zeros.

        Args:
          x: the numbers.
          name: the name of the result.
        """
        b = self.builder
        if "mask" not in self.routed.given and self.unit != "group":
            return b.mean(x, axes=self._inside_unit, name=name)
        counted = self._counted(x)
        total, number = self._unit_sum(b.mul(x, counted)), self._unit_sum(counted, "token_count")
        return b.div(total, self.at_least_one(number), name=name)

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

    def _number(self, unit: str, count: Value) -> Value:
        """Return how many units a mean is over: those that the part has, or those of the batch."""
        if self.parts == 1:
            return self.at_least_one(count)
        graph, groups, size = self.builder.graph, 0, 0
        mask = _mask_name(graph, self.routed.given["mask"])
        if unit == "group":
            attrs = SlotsOp.of_node(assigner(self.routed.slots))
            groups, size = attrs.groups, attrs.group_size
        total = Total(unit, mask, groups, size).input_of(graph)
        return self.at_least_one(self.cast(total, count))

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
        ones = self.cast(b.max(self.named, axes=self.routed.choice, name="counted"), like)
        mask = self.routed.given.get("mask")
        return ones if mask is None else b.mask(ones, mask, fill=0.0)

    def _unit_sum(self, x: Value, name: str | None = None) -> Value:
        if self.unit == "group":
            return self.builder.group_sum(x, self.routed.slots, name=name)
        return self.builder.sum(x, axes=self._inside_unit, name=name)

    @property
    def _inside_unit(self) -> tuple[str, ...]:
        tokens = self.routed.tokens
        return tokens if self.unit == "global" else tokens[1:]


# Auxiliary losses of routing, built of graph operations; float32 wherever the router is.


@dataclass(frozen=True)
class LossBuilder:
    """Builds the losses of one layer.

    With prototypes, each of which is a router of its own, a loss is the mean over the prototypes.
    Means over groups or sequences count only those that contain tokens, not
    those that are all padding.

    Attributes:
      means: means over the tokens of the layer.
      scores: the router's logits and choices.
    """

    means: Means
    scores: Scores

    def balance(self, choices: int = 1) -> Value:
        """Return N · Σ f·P (ST-MoE, eq. 7 to 9; Switch; flaxformer with all choices).

        f is the share of tokens whose first `choices` choices contain an expert, before any drop,
        and P the mean probability.  With f or P uniform the value is `choices`.
        """
        b, means, n = self._builder, self.means, self.scores.count
        share = means.over_units(self._hot(0, choices), "share_of_tokens")
        mean = means.over_units(self._probabilities(), "mean_probability")
        balance = b.sum(b.mul(share, mean), axes="expert", name="balance")
        return means.across_units(b.scale(balance, by=float(n)))

    def router_z(self) -> Value:
        """Return the mean over tokens of (log Σ exp x)² (ST-MoE, eq. 5)."""
        b = self._builder
        total = b.logsumexp(self.scores.logits, axes="expert")
        return self.means.all(self.means.over_tokens(b.square(total)))

    def importance(self) -> Value:
        """Return (std / mean)² over experts of the summed probabilities (V-MoE; Shazeer 2017)."""
        summed = self.means.over_units(self._probabilities())
        return self.means.across_units(self._squared_variation(summed))

    def load(self, std: float) -> Value:
        """Return (std / mean)² over experts of the chance to be chosen under noise (V-MoE).

        The chance is Φ((x − t) / σ), with t the noisy logit of the last choice.

        Args:
          std: σ, the standard deviation of the noise.
        """
        b, scores = self._builder, self.scores
        last = self._hot(scores.top_k - 1, scores.top_k)
        is_last = b.equal(last, self.means.constant(1.0, last))
        noisy = b.sum(b.mask(scores.logits, is_last, fill=0.0), axes="expert")
        clean = scores.logits if scores.clean is None else scores.clean
        chance = b.normal_cdf(b.scale(b.sub(clean, noisy), by=1 / std))
        variation = self._squared_variation(self.means.over_units(chance))
        return self.means.across_units(variation)

    @property
    def _builder(self) -> Builder:
        return self.means.builder

    def _probabilities(self) -> Value:
        return self._builder.softmax(self.scores.logits, axis="expert")

    def _hot(self, start: int, stop: int) -> Value:
        """Return 1 at the experts of the choices from `start` to `stop`, with the logits' axes."""
        b, scores = self._builder, self.scores
        part = b.slice(scores.picks, axis=scores.choice, start=start, stop=stop)
        hot = b.one_hot(part, into=(("expert", scores.count),))
        return self.means.cast(b.sum(hot, axes=scores.choice, name="chosen"), scores.logits)

    def _squared_variation(self, x: Value) -> Value:
        """Return (std / mean)² over ``expert``; 0 for a unit without tokens."""
        b = self._builder
        mean = b.mean(x, axes="expert")
        variance = b.mean(b.square(b.sub(x, mean)), axes="expert")
        return b.div(variance, self.means.divisor(b.square(mean)))


def emit_z(builder: Builder, logits: Value, axis: str) -> Value:
    """Return the mean of (log Σ exp x)² over all but `axis`: the z-loss of a softmax along it."""
    squared = builder.square(builder.logsumexp(logits, axes=axis))
    return builder.mean(squared, axes=squared.type.names)


# Routing metrics, built of graph operations; no gradient flows through them.

CHOSEN = "chosen"
"""The metric of a layer that a balance bias is updated by: how many choices name each expert."""

BALANCE_BIASES = "balance_biases"
"""The graph attribute with the output that counts so, by the name of the bias."""


@dataclass(frozen=True)
class MetricBuilder:
    """Builds the metrics of one layer.

    Attributes:
      means: means over the tokens of the layer.
    """

    means: Means

    # --- of slot assignment

    def chosen(self) -> Value:
        """Return how many choices name each expert, padding excluded, ``[expert]``."""
        metric, operands = self.means.named, self._routed.given
        if "mask" in operands:
            metric = self._builder.mask(metric, operands["mask"], fill=0.0)
        return self._by_expert(metric)

    def rows(self) -> Value:
        """Return how many rows with a slot each expert has, ``[expert]``."""
        return self._by_expert(self._placed)

    def asked(self) -> Value:
        """Return how many choices requested a slot."""
        wanted = self._wanted()
        return self._builder.sum(wanted, axes=wanted.type.names)

    def dropped(self) -> Value:
        """Return the share of the choices that requested a slot and got none."""
        b = self._builder
        axes = self._routed.slots.type.names
        asked, got = (b.sum(v, axes=axes) for v in (self._wanted(), self._placed))
        return b.div(b.sub(asked, got), self.means.at_least_one(asked))

    def left_behind(self) -> Value:
        """Return the share of the tokens none of whose choices got a slot (flaxformer)."""
        b = self._builder
        placed = b.max(self._placed, axes=self._routed.choice)
        return self.means.over_tokens(b.sub(self.means.constant(1.0, placed), placed))

    def loads(self) -> Value:
        """Return each expert's share of the rows with a slot, ``[expert]``."""
        b, rows = self._builder, self.rows()
        return b.div(rows, self.means.at_least_one(b.sum(rows, axes="expert")))

    def max_violation(self, loads: Value) -> Value:
        """Return the largest load over the mean load, less 1 (Wang et al. 2024)."""
        b = self._builder
        largest = b.scale(b.max(loads, axes="expert"), by=float(self._routed.count))
        return b.sub(largest, self.means.constant(1.0, largest))

    def dead_experts(self, loads: Value) -> Value:
        """Return the number of experts without a row."""
        b = self._builder
        zero, unit = (self.means.constant(v, loads) for v in (0.0, 1.0))
        idle = b.mask(b.broadcast(unit, loads), b.equal(loads, zero), fill=0.0)
        return b.sum(idle, axes="expert")

    def utilisation(self) -> Value:
        """Return the share of the slots that are filled; requires a capacity."""
        b, routed = self._builder, self._routed
        ones = b.max(self.means.named, axes=routed.choice)
        rows = b.dispatch(ones, routed.experts, routed.slots)
        return self.means.share(b.mean(rows, axes=("group", "expert", "slot")))

    def gate_mean(self) -> Value:
        """Return the mean gate of each choice, ``[choice]``."""
        return self.means.over_tokens(self._builder.stop_gradient(self._routed.gates))

    # --- of a router's logits

    def entropy(self, scores: Scores) -> Value:
        """Return the mean entropy of the router's probabilities, in nats."""
        b = self._builder
        logits = b.stop_gradient(scores.logits)
        # Where a logit is −∞ its probability is 0; the product 0 · ∞ must not make the sum NaN.
        finite = b.maximum(logits, self.means.constant(-1e30, logits))
        shared = b.sum(b.mul(b.softmax(logits, axis="expert"), finite), axes="expert")
        entropy = b.sub(b.logsumexp(logits, axes="expert"), shared)
        return self.means.all(self.means.over_tokens(entropy))

    def margin(self, scores: Scores) -> Value:
        """Return the mean difference of the two largest probabilities."""
        b = self._builder
        logits = b.stop_gradient(scores.logits)
        _, best = b.route(logits, top_k=2, gates="softmax", choice="best")
        first, second = (
            b.sum(b.slice(best, axis="best", start=i, stop=i + 1), axes="best") for i in (0, 1)
        )
        return self.means.all(self.means.over_tokens(b.sub(first, second)))

    def logit_square(self, scores: Scores) -> Value:
        """Return the mean square of the logits."""
        b = self._builder
        square = b.square(b.stop_gradient(scores.logits))
        return self.means.all(self.means.over_tokens(b.mean(square, axes="expert")))

    # --- shared helpers

    @property
    def _builder(self) -> Builder:
        return self.means.builder

    @property
    def _routed(self) -> Routed:
        return self.means.routed

    def _by_expert(self, choices: Value) -> Value:
        """Return a number of each choice summed by expert, ``[expert]``."""
        b = self._builder
        hot = b.one_hot(self._routed.experts, into=(("expert", self._routed.count),))
        return b.sum(b.mul(hot, choices), axes=self._routed.slots.type.names)

    def _wanted(self) -> Value:
        """Return 1 for each choice that requests a slot, ``[*tokens, choice]``."""
        requested, operands = self.means.named, self._routed.given
        for word in ("keep", "mask"):
            if word in operands:
                requested = self._builder.mask(requested, operands[word], fill=0.0)
        return requested

    @cached_property
    def _placed(self) -> Value:
        """1 for each choice that has a slot, ``[*tokens, choice]``."""
        b = self._builder
        none = b.constant(value=-1.0, dtype="i32")
        has_slot = b.less(none, self._routed.slots)
        return b.mask(self.means.named, has_slot, fill=0.0)
