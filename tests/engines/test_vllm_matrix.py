"""What vLLM computes of each mixture, over positions, windows and heads, as the table says."""

import pytest

from .engine import ask, interpreter, needs
from .test_vllm import MODULE, PROBE, VARIABLE, off
from .verdict_matrix import check, examined, write_cases

pytestmark = [pytest.mark.parity, pytest.mark.slow, needs(VARIABLE, MODULE)]


@pytest.mark.parametrize(
    ("family", "usual", "passes", "target"), examined("vLLM"), ids=lambda value: str(value)[:20]
)
def test_every_verdict_is_what_the_engine_does(family, usual, passes, target, tmp_path):
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    cases = [*write_cases("vLLM", family, usual, passes, target, tmp_path)]
    check(cases, ask(python, PROBE, [case.job for case in cases]), off)
