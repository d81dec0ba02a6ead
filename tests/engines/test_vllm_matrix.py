"""What vLLM computes of each mixture, over rotary positions, windows, heads, as the table says.

Slow: vLLM takes some seconds for each folder, and a sixth of an hour for the largest family.
"""

import pytest

from .engine import ask, interpreter, needs
from .test_vllm import MODULE, PROBE, VARIABLE, off
from .verdict_matrix import examined, write_cases

BOUND = 1e-5

pytestmark = [pytest.mark.parity, pytest.mark.slow, needs(VARIABLE, MODULE)]


@pytest.mark.parametrize(
    ("family", "usual", "passes", "target"), examined("vLLM"), ids=lambda value: str(value)[:20]
)
def test_every_verdict_is_what_the_engine_does(family, usual, passes, target, tmp_path):
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    cases = [*write_cases("vLLM", family, usual, passes, target, tmp_path)]
    reports = ask(python, PROBE, [case.job for case in cases])
    complaints = (
        case.complaint(report, off, BOUND) for case, report in zip(cases, reports, strict=True)
    )
    wrong = [complaint for complaint in complaints if complaint]
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong)
