"""What mlx-lm computes of each mixture, over positions, windows and heads, as the table says."""

import numpy as np
import pytest

from .engine import ask, interpreter, needs
from .test_llama_cpp_matrix import SIZES
from .test_mlx import MODULE, PROBE, VARIABLE
from .verdict_matrix import check, examined, write_cases

NEVER = ("ernie4_5_moe", "gpt_oss", "llama4_text", "qwen3_5_moe_text")

pytestmark = [pytest.mark.parity, needs(VARIABLE, MODULE)]


@pytest.mark.parametrize(
    ("family", "usual", "passes", "target"), examined("mlx-lm"), ids=lambda value: str(value)[:20]
)
def test_every_verdict_is_what_the_engine_does(family, usual, passes, target, tmp_path):
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    cases = [*write_cases("mlx-lm", family, SIZES | usual, passes, target, tmp_path)]
    assert any(case.verdict.runs for case in cases) == (family not in NEVER)
    check(cases, ask(python, PROBE, [case.job for case in cases]), off)


def off(folder, source):
    """Return max |Δ logit| / max |logit| of the engine against the reference in float64."""
    by_mlx, logits = np.load(folder / "mlx.npy"), np.load(source / "logits.npy")
    return float(np.abs(by_mlx - logits).max() / np.abs(logits).max())
