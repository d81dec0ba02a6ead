"""``moecc compile --set``: the constants of the update, and what is no constant of a step."""

from dataclasses import replace
from pathlib import Path

import pytest

from moecc.ahead.request import Request, update_of
from moecc.ahead.worker import prepare
from moecc.errors import UsageError
from moecc.plan.step import ProgramConfig

TINY = ProgramConfig(batch_tokens=64, sequence="16")
LLAMA = str(Path(__file__).parent.parent / "golden" / "llama_gqa")


def test_constants_are_those_of_a_recipe():
    made = update_of("adafactor", ["optimizer.decay=0", "optimizer.clip = 0.5"])
    assert (made.name, made.decay, made.clip) == ("adafactor", 0.0, 0.5)
    request = Request(LLAMA, "cpu", TINY, sets=("optimizer.b2=0.99",))
    assert Request.from_json(request.to_json()) == request
    update = prepare(request).job.update
    assert update.b2 == 0.99
    assert prepare(Request(LLAMA, "cpu", replace(TINY, step="forward"))).job.update is None


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
    with pytest.raises(UsageError) as caught:
        update_of("adamw", [text])
    assert says in str(caught.value)
