"""Losses with one thing wrong, each caught by a property of the tests beside this one.

Losses are outputs that a pass adds, so that no law of passes could tell a wrong one.  Here a method
is exchanged for a wrong one, and the property must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, is_hypothesis_test, settings
from moecc_passes import add_losses

import moecc.ir.ops.slots as assigner
from moecc.ir.graph import Value
from moecc.ir.routing_losses import LossBuilder, Means

from . import test_losses, test_numbers
from .layers import TOKENS

BALANCE = LossBuilder.balance


def count_all_choices(self: LossBuilder, choices: int = 1) -> Value:
    return BALANCE(self, self.scores.top_k)


def forget_the_number_of_experts(self: LossBuilder, choices: int = 1) -> Value:
    return self.means.builder.scale(BALANCE(self, choices), by=1 / self.scores.count)


def share_of_the_probabilities(self: LossBuilder, choices: int = 1) -> Value:
    """P times P: smooth, and not the loss."""
    b, means = self.means.builder, self.means
    mean = means.over_units(b.softmax(self.scores.logits, axis="expert"))
    total = b.sum(b.square(mean), axes="expert")
    return means.all(b.scale(total, by=float(self.scores.count)))


def do_not_square(self: LossBuilder) -> Value:
    b = self.means.builder
    return self.means.over_tokens(b.logsumexp(self.scores.logits, axes="expert"))


def square_of_the_largest_logit(self: LossBuilder) -> Value:
    b = self.means.builder
    return self.means.over_tokens(b.square(b.max(self.scores.logits, axes="expert")))


def count_padding(self: Means, x: Value) -> Value:
    return self.builder.mean(x, axes=TOKENS)


def take_the_batch_for_a_group(self: Means, x: Value) -> Value:
    return self.builder.mean(x, axes=TOKENS)


def count_units_of_padding(self: Means, x: Value) -> Value:
    return self.all(x)


def divide_by_the_mean_of_nothing(self: Means, x: Value) -> Value:
    return x


def variation_of_the_sum_of_squares(self: LossBuilder) -> Value:
    """E[x²] / E[x]², which is one more than it should be."""
    b, means = self.means.builder, self.means
    x = means.over_units(b.softmax(self.scores.logits, axis="expert"))
    squares = b.mean(b.square(x), axes="expert")
    return means.all(b.div(squares, b.square(b.mean(x, axes="expert"))))


def always_average(builder: Any, layers: Any, how: str) -> Any:
    return JOINED(builder, layers, "mean")


JOINED = add_losses.joined


def one_slot_more(attrs: Any, tokens: int, choices: int) -> int:
    return CAPACITY(attrs, tokens, choices) + 1


CAPACITY = assigner.capacity

MUTANTS: dict[str, tuple[object, str, Any, Callable[[], None]]] = {
    wrong.__name__: (place, name, wrong, law)
    for place, name, wrong, law in (
        (LossBuilder, "balance", count_all_choices, test_losses.test_balance_by_its_formula),
        (
            LossBuilder,
            "balance",
            forget_the_number_of_experts,
            test_losses.test_balance_is_1_if_either_share_is_uniform,
        ),
        (
            LossBuilder,
            "balance",
            share_of_the_probabilities,
            test_losses.test_balance_is_1_if_either_share_is_uniform,
        ),
        (LossBuilder, "router_z", do_not_square, test_losses.test_z_loss_of_shifted_logits),
        (
            LossBuilder,
            "router_z",
            square_of_the_largest_logit,
            test_losses.test_z_loss_of_shifted_logits,
        ),
        (Means, "over_tokens", count_padding, test_losses.test_padding_counts_nowhere),
        (
            Means,
            "over_units",
            take_the_batch_for_a_group,
            test_losses.test_balance_over_groups_sequences_and_the_batch,
        ),
        (
            Means,
            "across_units",
            count_units_of_padding,
            test_losses.test_a_unit_of_nothing_but_padding_counts_nowhere,
        ),
        (
            Means,
            "divisor",
            divide_by_the_mean_of_nothing,
            test_losses.test_a_unit_of_nothing_but_padding_counts_nowhere,
        ),
        (
            LossBuilder,
            "importance",
            variation_of_the_sum_of_squares,
            test_losses.test_importance_and_load_of_v_moe,
        ),
        (
            add_losses,
            "joined",
            always_average,
            test_losses.test_losses_of_layers_are_summed_or_averaged,
        ),
        (assigner, "capacity", one_slot_more, test_numbers.test_how_many_are_kept),
    )
}


FEW = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
"""Few examples, the same ones each time, none of them shrunk."""


@pytest.mark.parametrize("name", MUTANTS)
def test_each_wrong_loss_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, wrong, law = MUTANTS[name]
    monkeypatch.setattr(place, attribute, wrong)
    if is_hypothesis_test(law):
        # A property has its settings since it was defined; a profile would come too late.
        monkeypatch.setattr(law, "_hypothesis_internal_use_settings", FEW)
    with pytest.raises(AssertionError):
        law()
