"""Auxiliary losses of routing and metrics of it, as operations of a graph.

Losses are in float32 wherever the router is.  Where ``place`` was given a mask, padding counts
nowhere.  A *unit* is what the mean of a balancing loss is taken in before it is averaged: a token
group, a sequence, or the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.table.placing import given_to, placing

UNITS = ("group", "sequence", "global")


@dataclass(frozen=True)
class Routed:
    """What a loss looks at: one layer's routing.

    Attributes:
      logits: the router's logits, noise included, ``[*tokens, expert]``.
      experts: the chosen experts, best first, ``[*tokens, choice]``.
      gates: their gates.
      place: their slots, the result of ``place``.
      clean: the logits without noise, where noise was added.
      noise_std: the standard deviation of that noise; 0 where there is none.
    """

    logits: Value
    experts: Value
    gates: Value
    place: Value
    clean: Value | None = None
    noise_std: float = 0.0

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token axes, outermost first."""
        tokens: tuple[str, ...] = placing(self.place).attrs["tokens"]
        return tokens

    @property
    def count(self) -> int:
        """The number of experts."""
        experts: int = placing(self.place).attrs["experts"]
        return experts

    @property
    def given(self) -> dict[str, Value]:
        """What ``place`` was given beside the experts."""
        node = placing(self.place)
        return given_to(node.operands, node.attrs)


@dataclass(frozen=True)
class LossBuilder:
    """Builds the losses and metrics of one layer.

    Attributes:
      builder: where the operations go.
      routed: the routing.
      unit: ``group``, ``sequence`` or ``global``.
    """

    builder: Builder
    routed: Routed
    unit: str = "group"

    def balance(self, choices: int = 1) -> Value:
        """Return N · Σ f·P (ST-MoE, eq. 7 to 9; Switch; flaxformer with all choices).

        f is the share of tokens whose first `choices` choices contain an expert, before any drop,
        and P the mean probability.  With f or P uniform the value is `choices`.
        """
        b, n = self.builder, self.routed.count
        share = self._unit_mean(self._hot(choices))
        mean = self._unit_mean(self._probabilities())
        return self._over_units(b.scale(b.sum(b.mul(share, mean), axes="expert"), by=float(n)))

    def router_z(self) -> Value:
        """Return the mean over tokens of (log Σ exp x)² (ST-MoE, eq. 5)."""
        return self._token_mean(self.builder.square(self._log_total()))

    def importance(self) -> Value:
        """Return (std / mean)² over experts of the summed probabilities (V-MoE; Shazeer 2017)."""
        return self._over_units(self._squared_variation(self._unit_mean(self._probabilities())))

    def load(self, std: float) -> Value:
        """Return (std / mean)² over experts of the chance to be chosen under noise (V-MoE).

        The chance is Φ((x − t) / σ), with t the noisy logit of the last choice.

        Args:
          std: σ, the standard deviation of the noise.
        """
        b, routed = self.builder, self.routed
        last = self._hot_at(self._top_k - 1)
        is_last = b.equal(last, self._constant(1.0, last))
        noisy = b.sum(b.mask(routed.logits, is_last, fill=0.0), axes="expert")
        clean = routed.logits if routed.clean is None else routed.clean
        chance = b.normal_cdf(b.scale(b.sub(clean, noisy), by=1 / std))
        return self._over_units(self._squared_variation(self._unit_mean(chance)))

    # --- metrics, through which no gradient flows

    def dropped(self) -> Value:
        """Return the share of the choices that asked for a slot and got none."""
        b, routed = self.builder, self.routed
        wanted, placed = self._wanted(), self._placed()
        axes = routed.place.type.names
        asked, got = (b.sum(v, axes=axes) for v in (wanted, placed))
        return _value(b.div(b.sub(asked, got), self._at_least_one(asked)))

    def entropy(self) -> Value:
        """Return the mean entropy of the router's probabilities, in nats."""
        b = self.builder
        logits = b.stop_gradient(self.routed.logits)
        # Where a logit is −∞ its probability is 0, and 0 · ∞ must not spoil the sum.
        finite = b.maximum(logits, self._constant(-1e30, logits))
        shared = b.sum(b.mul(b.softmax(logits, axis="expert"), finite), axes="expert")
        return self._token_mean(b.sub(b.logsumexp(logits, axes="expert"), shared))

    def margin(self) -> Value:
        """Return the mean difference of the two largest probabilities."""
        b = self.builder
        logits = b.stop_gradient(self.routed.logits)
        _, best = b.route(logits, top_k=2, gates="softmax", choice="best")
        first, second = (
            b.sum(b.slice(best, axis="best", start=i, stop=i + 1), axes="best") for i in (0, 1)
        )
        return self._token_mean(b.sub(first, second))

    def gate_mean(self) -> Value:
        """Return the mean gate of each choice, ``[choice]``."""
        return self._token_mean(self.builder.stop_gradient(self.routed.gates))

    def loads(self) -> Value:
        """Return the share of the placed rows that each expert has, ``[expert]``."""
        b = self.builder
        hot = b.one_hot(self.routed.experts, into=(("expert", self.routed.count),))
        placed = self._placed()
        rows = b.sum(b.mul(hot, placed), axes=self.routed.place.type.names)
        total = self._at_least_one(b.sum(rows, axes="expert"))
        return _value(b.div(rows, total))

    def max_violation(self, loads: Value) -> Value:
        """Return the largest load over the mean load, less 1 (Wang et al. 2024)."""
        b = self.builder
        largest = b.scale(b.max(loads, axes="expert"), by=float(self.routed.count))
        return _value(b.sub(largest, self._constant(1.0, largest)))

    def dead_experts(self, loads: Value) -> Value:
        """Return how many experts got no row."""
        b = self.builder
        zero, one = (self._constant(v, loads) for v in (0.0, 1.0))
        idle = b.broadcast(one, loads)
        return _value(b.sum(b.mask(idle, b.equal(loads, zero), fill=0.0), axes="expert"))

    def utilisation(self) -> Value:
        """Return the share of the slots that are filled; only under a capacity."""
        b, routed = self.builder, self.routed
        ones = b.broadcast(self._constant(1.0, routed.gates), self._log_total())
        rows = b.dispatch(ones, routed.experts, routed.place)
        return _value(b.mean(rows, axes=("group", "expert", "slot")))

    # --- what they share

    def _constant(self, value: float, like: Value) -> Value:
        made: Value = self.builder.constant(value=value, dtype=like.type.dtype.name)
        return made

    def _probabilities(self) -> Value:
        made: Value = self.builder.softmax(self.routed.logits, axis="expert")
        return made

    def _log_total(self) -> Value:
        made: Value = self.builder.logsumexp(self.routed.logits, axes="expert")
        return made

    def _hot(self, choices: int) -> Value:
        """Return 1 at the first `choices` experts of each token, ``[*tokens, expert]``."""
        b, routed = self.builder, self.routed
        first = b.slice(routed.experts, axis=self._choice, start=0, stop=choices)
        return self._summed_hot(first)

    def _hot_at(self, choice: int) -> Value:
        b = self.builder
        part = b.slice(self.routed.experts, axis=self._choice, start=choice, stop=choice + 1)
        return self._summed_hot(part)

    def _summed_hot(self, experts: Value) -> Value:
        b = self.builder
        hot = b.sum(b.one_hot(experts, into=(("expert", self.routed.count),)), axes=self._choice)
        kind = self.routed.logits.type.dtype
        made: Value = hot if hot.type.dtype == kind else b.cast(hot, dtype=kind.name)
        return made

    @property
    def _choice(self) -> str:
        (choice,) = (n for n in self.routed.experts.type.names if n not in self.routed.tokens)
        return choice

    @property
    def _top_k(self) -> int:
        size = self.routed.experts.type[self._choice].size
        assert isinstance(size, int), "the choices are counted"
        return size

    def _counted(self, like: Value) -> Value:
        """Return 1 for tokens and 0 for padding, ``[*tokens]``."""
        b = self.builder
        ones = b.broadcast(self._constant(1.0, like), self._log_total())
        mask = self.routed.given.get("mask")
        made: Value = ones if mask is None else b.mask(ones, mask, fill=0.0)
        return made

    def _token_mean(self, x: Value) -> Value:
        """Return the mean over all tokens, padding left out."""
        b, tokens = self.builder, self.routed.tokens
        if "mask" not in self.routed.given:
            return _value(b.mean(x, axes=tokens))
        counted = self._counted(x)
        total = b.sum(b.mul(x, counted), axes=tokens)
        return _value(b.div(total, self._at_least_one(b.sum(counted, axes=tokens))))

    def _unit_mean(self, x: Value) -> Value:
        """Return the mean of ``[*tokens, expert]`` over the tokens of each unit."""
        b = self.builder
        if "mask" not in self.routed.given and self.unit != "group":
            return _value(b.mean(x, axes=self._inside_unit))
        counted = self._counted(x)
        total, number = self._unit_sum(b.mul(x, counted)), self._unit_sum(counted)
        return _value(b.div(total, self._at_least_one(number)))

    def _unit_sum(self, x: Value) -> Value:
        if self.unit == "group":
            return _value(self.builder.group_sum(x, self.routed.place))
        return _value(self.builder.sum(x, axes=self._inside_unit))

    @property
    def _inside_unit(self) -> tuple[str, ...]:
        tokens = self.routed.tokens
        return tokens if self.unit == "global" else tokens[1:]

    def _over_units(self, x: Value) -> Value:
        return self.builder.mean(x, axes=x.type.names) if x.type.names else x

    def _squared_variation(self, x: Value) -> Value:
        """Return (std / mean)² over ``expert``."""
        b = self.builder
        mean = b.mean(x, axes="expert")
        variance = b.mean(b.square(b.sub(x, mean)), axes="expert")
        return _value(b.div(variance, b.square(mean)))

    def _wanted(self) -> Value:
        """Return 1 for each choice that asks for a slot, ``[*tokens, choice]``."""
        b, given = self.builder, self.routed.given
        made = self._named()
        for word in ("keep", "mask"):
            if word in given:
                made = b.mask(made, given[word], fill=0.0)
        return made

    def _placed(self) -> Value:
        """Return 1 for each choice that has a slot, ``[*tokens, choice]``."""
        b, place = self.builder, self.routed.place
        none = b.constant(value=-1.0, dtype="i32")
        return _value(b.mask(self._named(), b.less(none, place), fill=0.0))

    def _named(self) -> Value:
        """Return 1 for each choice that names an expert; of a type that counts are exact in."""
        b = self.builder
        hot = b.one_hot(self.routed.experts, into=(("expert", self.routed.count),))
        return _value(b.sum(hot, axes="expert"))

    def _at_least_one(self, x: Value) -> Value:
        made: Value = self.builder.maximum(x, self._constant(1.0, x))
        return made


def emit_output_z(builder: Builder, logits: Value, axis: str = "vocab") -> Value:
    """Return the mean of (log Σ exp x)² over all but `axis`: the z-loss of the output softmax."""
    squared = builder.square(builder.logsumexp(logits, axes=axis))
    loss: Value = builder.mean(squared, axes=squared.type.names)
    return loss


def _value(made: Value) -> Value:
    """Return `made`, whose type a builder does not tell."""
    return made
