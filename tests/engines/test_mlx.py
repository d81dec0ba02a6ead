"""mlx-lm computes of a folder what the source computes, or refuses it, as the table says.

``make proof-engines`` runs this where ``MOECC_MLX_PYTHON`` names an interpreter that has mlx-lm
(tried with 0.32.2, and ``mlx[cpu]`` 0.32.4 on Linux).
"""

from pathlib import Path

import numpy as np
import pytest

from moecc.jobs.convert import plan, write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline

from .engine import ask, interpreter, needs
from .verdict_matrix import COPIES

VARIABLE, MODULE, PROBE = "MOECC_MLX_PYTHON", "mlx_lm", "logits_of_mlx.py"
GOLDEN = Path(__file__).parents[1] / "golden"
SINGLE = 1e-6

SHARED = "upcycle{experts=4 shared=0.5 gates=softmax router-init=zero}"
SIGMOID = "upcycle{experts=4 gates=sigmoid-renormalised shared=0.5 shared-gate=none router-std=1}"
CASES = [
    ("llama_square_tied", "mixtral", COPIES),
    ("llama_linear", "mixtral", COPIES),
    ("mixtral_window_tied", "mixtral", ""),
    ("qwen2_square", "qwen2_moe", "upcycle{experts=4 shared=0.5 router-std=1}"),
    ("qwen2_gqa_tied", "qwen2_moe", SHARED),
    ("llama_gqa", "qwen2_moe", SHARED),
    ("qwen2_moe_step", "qwen2_moe", ""),
    ("qwen3_head_dim_tied", "qwen3_moe", "upcycle{experts=4 layers=last:1}"),
    ("qwen3_moe_window", "qwen3_moe", ""),
    ("qwen3_moe_step", "qwen3_moe", ""),
    ("llama_gqa", "glm4_moe", SIGMOID),
    ("qwen3_square", "glm4_moe", SIGMOID),
    ("llama_gqa", "glm4_moe", SIGMOID.replace("experts=4", "experts=4 top-k=1")),
    ("glm4_moe_dense_first", "glm4_moe", ""),
    ("mistral_full_head_dim", "granitemoe", COPIES),
    ("granitemoe_multipliers", "granitemoe", ""),
    ("llama_gqa", "ernie4_5_moe", COPIES),
    *(
        (source, "ernie4_5_moe", COPIES)
        for source in ("llama_linear", "llama_llama3", "llama_yarn", "llama_dynamic")
    ),
    ("ernie4_5_moe_range", "ernie4_5_moe", ""),
    ("olmoe_norm", "olmoe", ""),
    ("olmoe_square_v4", "olmoe", ""),
]
"""Golden checkpoints, the family to write, and what is done first."""

pytestmark = [pytest.mark.parity, needs(VARIABLE, MODULE)]


def test_what_the_table_says_is_what_the_engine_does(tmp_path):
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    jobs, said = [], []
    for number, (source, target, passes) in enumerate(CASES):
        folder = tmp_path / str(number)
        with open_model(str(GOLDEN / source)) as model:
            planned = plan(model, Pipeline.parse(passes), target, seed=1)
            write(planned, folder)
        said.append(next(v for v in planned.engines if v.engine == "mlx-lm"))
        jobs.append({"folder": str(folder), "tokens": str(GOLDEN / source / "tokens.npy")})
    wrong = []
    for case, job, verdict, report in zip(CASES, jobs, said, ask(python, PROBE, jobs), strict=True):
        found = report.get("refused") or off(Path(job["folder"]), case[0])
        right = isinstance(found, float) and found <= SINGLE
        silent = isinstance(found, float) and found > 1e-3
        if (right, silent) != (verdict.runs, verdict.silent):
            wrong.append(f"{case}: {verdict}, but {found}")
    assert not wrong, "\n".join(wrong)


def off(folder, source):
    """Return max |Δ logit| / max |logit| of the engine against the golden logits."""
    found = np.load(folder / "mlx.npy").astype(np.float64)
    golden = np.load(GOLDEN / source / "logits.npy").astype(np.float64)
    return float(np.abs(found - golden).max() / np.abs(golden).max())
