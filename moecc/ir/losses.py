"""Auxiliary losses of routing, built of graph operations; float32 wherever the router is."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.routed import Means, Scores


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
        share = means.over_units(self._hot(0, choices))
        mean = means.over_units(self._probabilities())
        return means.across_units(b.scale(b.sum(b.mul(share, mean), axes="expert"), by=float(n)))

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
        return self.means.cast(b.sum(hot, axes=scores.choice), scores.logits)

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
