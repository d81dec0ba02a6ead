"""Routing metrics, built of graph operations; no gradient flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.routed import Means, Routed, Scores

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
        made, given = self.means.named, self._routed.given
        if "mask" in given:
            made = self._builder.mask(made, given["mask"], fill=0.0)
        return self._by_expert(made)

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
        zero, one = (self.means.constant(v, loads) for v in (0.0, 1.0))
        idle = b.mask(b.broadcast(one, loads), b.equal(loads, zero), fill=0.0)
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
        made, given = self.means.named, self._routed.given
        for word in ("keep", "mask"):
            if word in given:
                made = self._builder.mask(made, given[word], fill=0.0)
        return made

    @cached_property
    def _placed(self) -> Value:
        """1 for each choice that has a slot, ``[*tokens, choice]``."""
        b = self._builder
        none = b.constant(value=-1.0, dtype="i32")
        has_slot = b.less(none, self._routed.slots)
        return b.mask(self.means.named, has_slot, fill=0.0)
