"""Mixtures over rotary positions, windows and heads, and how a verdict on each is measured.

Each mixture is drawn with each kind of rotary positions, of windows and of heads, two of the three
at a time, and with further keys of its family.  "Runs" is equality, "silent" another function, and
anything else an error of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from moecc.errors import InputError
from moecc.families.registry import mixtures, parse_config
from moecc.jobs.convert import plan, write
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.translate.engines import EngineVerdict

from .sources import WIDE, write_source
from .test_llama_cpp_matrix import FAMILIES, MIXTURE, ROPES, configs

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
USUAL = {
    "phimoe": MIXTURE | {"attention_bias": True, "lm_head_bias": True},
    "qwen3_next": FAMILIES["qwen3_next"][0] | EVERY_FOURTH,
}
COPIES = "upcycle{experts=4 router-std=1}"
BOUND = 1e-5
"""Of the largest output; farther off is another function."""


Off: TypeAlias = Callable[[Path, Path], float]


@dataclass(frozen=True)
class Case:
    """A folder, and what moecc says of it.

    Attributes:
      name: the kinds of positions, windows and heads.
      verdict: of the engine.
      source: the checkpoint, with tokens and logits.
      folder: what was written of it.
    """

    name: str
    verdict: EngineVerdict
    source: Path
    folder: Path

    @property
    def job(self) -> dict[str, str]:
        """What a probe is asked."""
        return {"folder": str(self.folder), "tokens": str(self.source / "tokens.npy")}

    def is_true(self, measured: float | str) -> bool:
        """Whether the verdict is what the engine does: how far off it is, or why it refuses."""
        runs = isinstance(measured, float) and measured <= BOUND
        is_silent = isinstance(measured, float) and measured > BOUND
        return (runs, is_silent) == (self.verdict.runs, self.verdict.silent)


def examined(engine: str) -> list[tuple[str, dict[str, Any], str, str]]:
    """Return the mixtures that an engine may read: family and keys of a source, passes, target."""
    names = [name for name, kind in mixtures().items() if engine in kind.engines]
    usual = {name: keys for name, (keys, _) in FAMILIES.items()} | USUAL
    # An ernie4_5_moe has biases of the choice, which a llama's copies have not.
    return [*((n, usual[n], "", n) for n in names), ("llama", {}, COPIES, "ernie4_5_moe")]


def write_cases(
    engine: str, family: str, usual: dict[str, Any], passes: str, target: str, folder: Path
) -> Iterator[Case]:
    """Write what moecc does not reject of one mixture; `usual` has its sizes, too."""
    drawn = set[str]()
    further = ((name, usual | keys) for name, keys in FURTHER.items())
    for name, keys in (*configs(usual, ROPES | LONG), *further):
        try:
            config = parse_config({"model_type": family, **WIDE, **keys})
        except InputError:
            continue
        if (text := json.dumps(config.to_json())) in drawn:
            continue
        drawn.add(text)
        source, out = folder / f"source-{len(drawn)}", folder / f"{len(drawn)}"
        # Only biased scores below 0 tell an expert that is left out from one whose score is 0.
        write_source(source, family, routing_bias=-1.0 if "groups" in name else 0.0, **keys)
        with open_model(str(source)) as model:
            try:
                planned = plan(model, Pipeline.parse(passes), target, seed=1, check=False)
            except InputError:
                continue
            write(planned, out)
        verdict = next(v for v in planned.engines if v.engine == engine)
        yield Case(name, verdict, source, out)


def check(cases: Sequence[Case], reports: Sequence[Mapping[str, str]], off: Off) -> None:
    """Fail with every verdict that is not what the engine reports of its folder.

    Args:
      cases: what was asked.
      reports: why a folder was refused, if it was.
      off: how far what the engine made of a folder is from the logits of a source.
    """
    false = []
    for case, report in zip(cases, reports, strict=True):
        measured = report.get("refused") or off(case.folder, case.source)
        if not case.is_true(measured):
            false.append(f"{case.name}: {case.verdict}, but {measured}")
    assert not false, "\n".join([f"{len(false)} of {len(cases)}", *false])
