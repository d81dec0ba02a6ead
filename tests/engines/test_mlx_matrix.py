"""What mlx-lm computes of each mixture, over rotary positions, windows, heads, as the table says.

Each mixture is drawn with each kind of rotary positions, of windows and of heads, two of the three
at a time, and with further keys of its family. Each verdict is measured: "runs" is equality,
"silent" another function, and anything else an error of the engine.
"""

import json

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.families.registry import mixtures, parse_config
from moecc.jobs.convert import plan, write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline

from .engine import ask, interpreter, needs
from .sources import WIDE, write_source
from .test_llama_cpp_matrix import FAMILIES, MIXTURE, ROPES, SIZES, configs
from .test_mlx import COPIES, MODULE, PROBE, VARIABLE

BOUND = 1e-5

pytestmark = [pytest.mark.parity, needs(VARIABLE, MODULE)]

LONG = {
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 8,
            "short_factor": [1 + n / 8 for n in range(8)], "long_factor": [2 + n for n in range(8)],
        },
    },
}  # fmt: skip
EVERY_FOURTH = {"num_hidden_layers": 4, "full_attention_interval": 4}
FURTHER = {
    "one choice": {"num_experts_per_tok": 1, "moe_k": 1},
    "renormalised": {"norm_topk_prob": True},
    "not renormalised": {"norm_topk_prob": False},
    "no dense layers": {"first_k_dense_replace": 0, "num_dense_layers": 0},
    "groups": {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "groups by two": {"n_group": 4, "topk_group": 2},
    "halves": {"rope_interleave": False},
    "no query rank": {"q_lora_rank": None},
    "no routing bias": {"use_expert_bias": False},
    "gelu": {"hidden_act": "gelu"},
    "three layers": {"num_hidden_layers": 3},
    "every second layer": {"full_attention_interval": 2},
    "factor": {"routed_scaling_factor": 1.0},
}
NEVER = ("ernie4_5_moe", "gpt_oss", "llama4_text", "qwen3_5_moe_text")
USUAL = {
    "phimoe": MIXTURE | {"attention_bias": True, "lm_head_bias": True},
    "qwen3_next": FAMILIES["qwen3_next"][0] | EVERY_FOURTH,
}


def examined():
    """Return the mixtures that mlx-lm may read: family and keys of a source, passes, target."""
    names = [name for name, kind in mixtures().items() if "mlx-lm" in kind.engines]
    usual = {name: keys for name, (keys, _) in FAMILIES.items()} | USUAL
    # An ernie4_5_moe has biases of the choice, which a llama's copies have not.
    return [*((n, usual[n], "", n) for n in names), ("llama", {}, COPIES, "ernie4_5_moe")]


@pytest.mark.parametrize(
    ("family", "usual", "passes", "target"), examined(), ids=lambda value: str(value)[:20]
)
def test_every_verdict_is_what_the_engine_does(family, usual, passes, target, tmp_path):
    python = interpreter(VARIABLE, MODULE)
    assert python is not None
    cases, jobs, drawn = [], [], set()
    further = ((name, SIZES | usual | keys) for name, keys in FURTHER.items())
    for name, keys in (*configs(usual, ROPES | LONG), *further):
        try:
            config = parse_config({"model_type": family, **WIDE, **keys})
        except InputError:
            continue
        if (text := json.dumps(config.to_json())) in drawn:
            continue
        drawn.add(text)
        source, folder = tmp_path / f"source-{len(drawn)}", tmp_path / f"{len(drawn)}"
        # Only biased scores below 0 tell an expert that is left out from one whose score is 0.
        write_source(source, family, routing_bias=-1.0 if "groups" in name else 0.0, **keys)
        with open_model(str(source)) as model:
            try:
                planned = plan(model, Pipeline.parse(passes), target, seed=1, check=False)
            except InputError:
                continue
            write(planned, folder)
        verdict = next(v for v in planned.engines if v.engine == "mlx-lm")
        cases.append((name, verdict, source, folder))
        jobs.append({"folder": str(folder), "tokens": str(source / "tokens.npy")})
    wrong = []
    for (name, verdict, source, folder), report in zip(
        cases, ask(python, PROBE, jobs), strict=True
    ):
        measured = report.get("refused") or off(source, folder)
        is_right = measured <= BOUND if isinstance(measured, float) else False
        is_silent = measured > BOUND if isinstance(measured, float) else False
        if (is_right, is_silent) != (verdict.runs, verdict.silent):
            wrong.append(f"{name}: {verdict}, but {measured}")
    assert any(verdict.runs for _, verdict, _, _ in cases) == (family not in NEVER)
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong)


def off(source, folder):
    """Return max |Δ logit| / max |logit| of the engine against the reference in float64."""
    by_mlx, logits = np.load(folder / "mlx.npy"), np.load(source / "logits.npy")
    return float(np.abs(by_mlx - logits).max() / np.abs(logits).max())
