"""``moecc compile --set``: the constants of the update, and what is no constant of a step."""

import re
from dataclasses import replace

import pytest

from moecc.ahead.request import Request, update_of
from moecc.ahead.worker import prepare
from moecc.errors import UsageError
from moecc.plan.step import ProgramConfig

from .conftest import LLAMA

TINY = ProgramConfig(batch_tokens=64, sequence="16")


def test_constants_are_those_of_a_recipe():
    update = update_of("adafactor", ["optimizer.decay=0", "optimizer.clip = 0.5"])
    assert (update.name, update.decay, update.clip) == ("adafactor", 0.0, 0.5)
    request = Request(str(LLAMA), "cpu", TINY, sets=("optimizer.b2=0.99",))
    assert Request.from_json(request.to_json()) == request
    assert prepare(request).job.update.b2 == 0.99
    forward = replace(request, config=replace(TINY, step="forward"), sets=())
    assert prepare(forward).job.update is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimizer.rate=0.1", "the rate is an argument of the step"),
        ("optimizer.warmup=5", "the rate is an argument of the step"),
        ("optimizer.name=muon", "--optimizer names it"),
        ("optimizer.groups.0.decay=1", "moecc train"),
        ("run.steps=5", "optimizer.clip, optimizer.update_clip"),
        ("optimizer.rates=1", "rates"),
        ("optimizer.decay=much", "--set optimizer.decay=much"),
        ("optimizer.b1=2", "--set optimizer.b1=2"),
        ("decay", "--set decay"),
    ],
)
def test_what_is_no_constant_of_a_step_is_rejected(text, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        update_of("adamw", [text])
