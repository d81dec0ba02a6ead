"""Sweeps: every point is the plan of that model, and the frontier is what nothing beats."""

from math import inf
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.plan.sweeps import DROPLESS, mark_frontier, parse_sweep
from tests.support.tiers import examples

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE, MIXTURE, SWITCH = (str(GOLDEN / n) for n in ("llama_gqa", "mixtral_gqa", "switch_half"))
WHERE = ("--machine", "cpu:4", "--sequence", "16", "--batch-tokens", "128")
MESH = ("--mesh", "fsdp=4", "--remat", "full")


def test_a_point_is_the_plan_of_its_model(moecc):
    up = "upcycle{{experts={} top-k={}}}"
    given = (DENSE, *WHERE, *MESH)
    found = moecc.plan(
        *given, "-p", up.format(4, 2), "--sweep", "experts=2,8 top-k=1",
        "--sweep", "capacity-factor=1.5",
    )  # fmt: skip
    assert [p["experts"] for p in found["points"]] == [2, 8]
    for point in found["points"]:
        passes = f"{up.format(point['experts'], 1)},specialize{{mode=train capacity-factor=1.5}}"
        alone = moecc.plan(*given, "-p", passes)
        assert point["capacity_factor"] == 1.5
        assert point["parameters"] == alone["parameters"]
        assert point["model_flops"] == alone["model_flops"]
        for key, value in point["best"].items():
            assert alone["best"][key] == value


@settings(max_examples=examples(50, 500))
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([1.0, DROPLESS]),
                          st.integers(1, 4)), min_size=1, max_size=12))  # fmt: skip
def test_nothing_on_the_frontier_is_beaten_and_the_rest_is(rows):
    names = ("experts", "top_k", "capacity_factor")
    points = [dict(zip(names, row, strict=False)) | {"best": {"seconds": row[-1]}} for row in rows]
    mark_frontier(points)
    marks = [point["frontier"] for point in points]
    merits = [
        (*map(float, row[:2]), inf if row[2] == DROPLESS else row[2], -row[3]) for row in rows
    ]
    assert any(marks)
    kept = [merit for merit, mark in zip(merits, marks, strict=True) if mark]

    def beats(a, b):
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    for merit, mark in zip(merits, marks, strict=True):
        assert mark != any(beats(other, merit) for other in merits)
        assert mark or any(beats(other, merit) for other in kept)


BAD = {
    "an axis misspelt": ("experts=4 topk=1", 2, "did you mean 'top-k'"),
    "no number": ("experts=4,x", 2, "found: 'x'"),
    "no value": ("experts=", 2, "found: ''"),
    "half an expert": ("experts=1.5", 2, "whole numbers"),
    "a value twice": ("experts=4,4", 2, "a value stands twice"),
    "an axis twice": ("experts=4 experts=8", 2, "experts stands twice"),
    "nothing": ("", 2, "nothing is swept"),
    "no capacity": ("capacity-factor=0,nan,-1,inf", 2, "found: -1.0"),
    "more than there are": ("experts=2 top-k=4", 2, "top-k does not suit the experts"),
    "too many": (f"experts={','.join(map(str, range(1, 200)))}", 2, "too many models"),
}


@pytest.mark.parametrize(("sweep", "code", "says"), BAD.values(), ids=BAD)
def test_bad_values(moecc, sweep, code, says):
    up = ("-p", "upcycle{experts=2}")
    found, out, err = moecc("plan", DENSE, *WHERE, *up, "--sweep", sweep)
    assert (found, out) == (code, "")
    assert says in err


def test_every_text_of_a_sweep_is_read_back():
    found = parse_sweep(["experts=8,16", "top-k=1 capacity-factor=1.25,dropless"])
    assert (found.experts, found.top_k, found.capacity_factor) == ((8, 16), (1,), (1.25, DROPLESS))
    assert len(list(found.points())) == 4
