"""Differences of arms, their intervals, and the correction for many claims."""

import importlib
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))


def worth(name):
    """Return a module of the experiment; its libraries would slow down the collection of tests."""
    return importlib.import_module(f"worth_{name}")


def lines(rng, effect, spread=0.004):
    """Return lines of two arms, on two texts and three seeds, whose documents differ."""
    table = {}
    for text in ("a", "b"):
        tokens = rng.integers(500, 2000, 40)
        level = rng.normal(2, 0.3, 40)
        gain = effect + rng.normal(0, 0.05, 40)
        for seed in range(3):
            of_seed = rng.normal(0, spread)
            losses = {"dense": level * tokens, "sparse": (level + gain + of_seed) * tokens}
            table[text, seed] = {
                (arm, 150): {"document_losses": x, "document_tokens": tokens}
                for arm, x in losses.items()
            }
    return table


def test_the_interval_holds_the_effect_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        effect = worth("page").difference(lines(rng, -0.02), ("sparse", 150), ("dense", 150))
        hits += abs(effect.mean + 0.02) <= effect.reach(1)
    assert 0.92 <= hits / 300 <= 0.99
    assert effect.settings == 6
    assert effect.reach(6) > effect.reach(1)


def test_holm_by_hand():
    assert worth("page").holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert worth("page").holm([0.9, 0.2]) == pytest.approx([0.9, 0.4])


def test_arms_on_other_held_out_documents_are_not_compared(tmp_path):
    def difference(of_sparse):
        path = tmp_path / "worth.jsonl"
        arms = (("dense", [900, 700]), ("sparse", of_sparse))
        facts = {"decoder": "decoder_worth", "base_steps": 400, "text": "debian", "steps": 150}
        path.write_text(
            "".join(
                json.dumps({**facts, "seed": seed, "arm": arm, "document_tokens": tokens,
                            "document_losses": [len(arm) * (seed + 1.0), 3.0]}) + "\n"
                for seed in (0, 1) for arm, tokens in arms
            )
        )  # fmt: skip
        lines = worth("page").read_lines(path)
        return worth("page").difference(lines, ("sparse", 150), ("dense", 150))

    assert difference([900, 700]).settings == 2
    assert difference([900, 701]) is None


def test_a_paragraph_counts_once():
    seen = set()
    assert worth("texts")._unseen("a  licence\n\nmine", seen) == "a  licence\n\nmine"
    assert worth("texts")._unseen("a licence\n\nyours\n\nyours", seen) == "yours"


@cache
def pairs(arm, *ratios):
    """Return the readings of an arm at some ratios of compute, or at all."""
    rows = worth("forecasts").pairs(arm, *([ratios] if ratios else []))
    return [pair for row in rows for pair in row]


def test_forecasts_from_the_first_steps_are_near_the_crossings_of_whole_curves():
    crossing = [pair for pair in pairs("sparse", 1.02, 1.2, 1.4, 1.75) if pair.crossing < np.inf]
    assert len(crossing) == 4 * 19
    assert all(pair.no is None for pair in crossing if pair.ratio <= 1.2)
    # One of 38 is forecast 1.31 times too early, from a base of 150 steps of Debian's text.
    assert sum(pair.is_right for pair in crossing if pair.ratio <= 1.2) == 37
    assert sum(pair.is_right for pair in crossing if pair.ratio == 1.4) >= 17
    # Twice beyond the pilot its dense line is unsure, and the interval says so.
    assert sum(pair.is_inside for pair in crossing if pair.ratio == 1.75) >= 18


@pytest.mark.parametrize(
    ("arm", "mistaken"),
    # Of the recipe one, from a base of 1,200 steps of Debian's text, at four times the compute:
    # not crossed where its curves end, after 862 steps.
    [("sparse", 1), ("experts frozen", 0), ("capacity of 1.25", 0)],
)
def test_forecasts_say_no_where_whole_curves_never_cross(arm, mistaken):
    never = [pair for pair in pairs(arm, 1.02, 1.2, 3.0, 4.0) if pair.crossing == np.inf]
    assert len(never) >= 6
    assert sum(not pair.is_right for pair in never) == mistaken
