"""Whether the sparse model is worth it: `recipe:upcycle` beside the dense model, at equal compute.

    python experiments/worth.py [--arms a,b] [--texts python,debian] [--seeds 0,1,2]
    make proof-worth

Every model is trained by `moecc train`.  An arm is one run at a constant rate, its trunk, of which
forks go on to each number of steps while the rate falls.  What has a line in the results is not
done again.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import argparse
import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from declared import HERE
from worth_texts import TEXTS, write_text

from moecc.cli.main import main as moecc
from moecc.families.describe import sequence_flops
from moecc.formats.run import GRAPH, SPEED, is_run, saved_steps
from moecc.ir.text import read_graph
from moecc.ir.unroll import unrolled
from moecc.jobs.evaluate import EvaluationSpec, score_of
from moecc.model.open import open_model
from moecc.plan.workload import length_variables
from moecc.train.tokens.folder import open_tokens
from moecc.version import __version__

WORK = HERE.parent / "demo-output" / "worth"
RESULTS = HERE / "worth.jsonl"
STEPS = (150, 450, 1000, 2000)
BASE_STEPS = 400
DECAY_STEPS = 50
SEQ, BATCH = 128, 8
SEEDS = (0, 1, 2)
RATES = {"decoder_worth": 1.0, "decoder_worth_wide": 1.0, "decoder_5m": 0.3}
"""By which the rates of `base.toml` and `continue.toml` are multiplied for a decoder: at 5e-3, the
loss of the one of 4.8 million parameters jumps, and after 250 steps is 0.2 above that at 2e-3."""
LONGER = 1.75
"""The processor time of a sparse step over that of a dense one: of the 5 % of steps that were the
quickest, 1.54 to 1.90 in six settings, 1.71 in the median, on two cores that others used, too."""
DENSE, SPARSE = "dense", "sparse"
_UPCYCLE = "model.pipeline='upcycle{{experts={} top-k=2 granularity={} router-init={}}}'"
_ROUTER = "logit-std router-std=1"
ARMS = {
    SPARSE: (_UPCYCLE.format(16, 2, _ROUTER),),
    "logits of 0.11": (_UPCYCLE.format(16, 2, "normal router-std=0.02"),),
    "logits of 2.4": (_UPCYCLE.format(16, 2, "logit-std router-std=2.4"),),
    "moments carried": (_UPCYCLE.format(16, 2, _ROUTER), "model.moments=carry"),
    "no warm-up": (_UPCYCLE.format(16, 2, _ROUTER), "optimizer.warmup=0"),
    "half redrawn": (_UPCYCLE.format(16, 2, f"{_ROUTER} init=drop drop-ratio=0.5"),),
    "noise on copies": (_UPCYCLE.format(16, 2, f"{_ROUTER} init=noise noise-std=0.02"),),
    "no balance loss": (_UPCYCLE.format(16, 2, _ROUTER), "routing.balance=0.0"),
    "no z-loss": (_UPCYCLE.format(16, 2, _ROUTER), "routing.z_loss=0.0"),
    "capacity of 1.25": (_UPCYCLE.format(16, 2, _ROUTER), "routing.capacity_factor=1.25"),
    "experts in the last layer alone": (_UPCYCLE.format(16, 2, f"{_ROUTER} layers=last:1"),),
    "distilled": (_UPCYCLE.format(16, 2, _ROUTER), "loss.distill=0.5"),
    "whole experts": (_UPCYCLE.format(8, 1, _ROUTER),),
    "experts frozen": (
        _UPCYCLE.format(16, 2, _ROUTER),
        "optimizer.groups=[{match='moe', freeze=true}]",
    ),
}
"""What each sparse arm changes of `continue.toml`; the shipped recipe, and one part changed."""


@dataclass(frozen=True)
class Setting:
    """Where arms begin.

    Attributes:
      text: of `TEXTS`.
      seed: of parameters and batches.
      decoder: the folder of the dense model's config, beside this file.
      base_steps: of the dense model before the switch.
    """

    text: str
    seed: int
    decoder: str = "decoder_worth"
    base_steps: int = BASE_STEPS

    @property
    def name(self) -> str:
        """The folder of its runs."""
        return f"{self.decoder}-{self.base_steps}-{self.text}-{self.seed}"


@dataclass(frozen=True)
class Lab:
    """Where settings are run.

    Attributes:
      work: texts, tokens and runs.
      results: the lines.
    """

    work: Path = WORK
    results: Path = RESULTS

    def tokens(self, text: str) -> Path:
        """Return the token folders of a text, which are made once."""
        out = self.work / "texts" / text
        if not (out / "heldout" / "tokens.json").is_file():
            for path in write_text(text, out):
                call("tokens", path, "--tokenizer", "bytes", "--out", out / path.stem, "--force")
        return out

    def train(self, setting: Setting, name: str, recipe: str, *words: object) -> Path:
        """Return a run that is at its end, having begun it or gone on with it."""
        out, tokens = self.work / setting.name / name, self.tokens(setting.text)
        if is_run(out) and saved_steps(out):
            call("train", "--resume", out)
            return out
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = tomllib.loads((HERE / recipe).read_text("utf-8"))
        sets = (
            f"optimizer.rate={settings['optimizer']['rate'] * RATES[setting.decoder]:g}",
            f"data.train.0.tokens={tokens / 'train'}", "data.evaluate=[]", f"data.batch={BATCH}",
            f"data.seq={SEQ}", "run.evaluate_steps=0", "run.save_steps=100",
            "run.save_minutes=0", "run.keep=1",
        )  # fmt: skip
        changed = [word for one in sets for word in ("--set", one)]
        call("train", HERE / recipe, *words, "--out", out, *changed)
        return out

    def base(self, setting: Setting) -> Path:
        """Return the dense model before the switch; its rate is not decayed."""
        seeds = (f"model.seed={setting.seed}", f"data.seed={setting.seed}")
        sets = (f"model.source={HERE / setting.decoder}", f"run.steps={setting.base_steps}", *seeds)
        words = [w for one in sets for w in ("--set", one)]
        return self.train(setting, "base", "base.toml", *words)

    def measure(
        self, setting: Setting, arm: str, sets: Sequence[str], steps: Sequence[int]
    ) -> None:
        """Add the lines of an arm that are missing."""
        done = {r["steps"] for r in self.lines(setting) if r["arm"] == arm}
        steps = [count for count in steps if count not in done]
        if not steps:
            return
        base = self.base(setting)
        trunk: Path | None = None
        words = ["--set", f"model.source={base}", "--set", f"model.seed={setting.seed}",
                 "--set", f"data.seed={100 + setting.seed}"]  # fmt: skip
        words += [w for one in sets for w in ("--set", one)]
        for count in steps:
            last = count - DECAY_STEPS
            more = [*words, "--set", "optimizer.schedule=constant", "--set", f"run.steps={last}"]
            fork = [] if trunk is None else ["--fork", trunk]
            trunk = self.train(setting, f"{arm}-{last}", "continue.toml", *fork, *more)
            more = [*words, "--set", f"optimizer.decay_steps={DECAY_STEPS}",
                    "--set", f"run.steps={count}"]  # fmt: skip
            run = self.train(setting, f"{arm}-{count}", "continue.toml", "--fork", trunk, *more)
            self.add(setting, arm, run)

    def add(self, setting: Setting, arm: str, run: Path) -> None:
        """Add the line of a run."""
        facts, folder = (
            saved_steps(run)[-1].facts,
            open_tokens(str(self.tokens(setting.text) / "heldout")),
        )
        with open_model(str(run)) as model:
            scores = score_of(model, folder, EvaluationSpec(SEQ, BATCH, 10_000)).scores
        line = {
            **vars(setting), "arm": arm, "steps": facts.step, "tokens": facts.tokens,
            "flops_per_token": flops_per_token(run), "step_seconds": step_seconds(run),
            "loss": round(scores.loss, 6), "document_tokens": scores.tokens.tolist(),
            "document_losses": [round(float(x), 2) for x in scores.losses],
            "moecc": __version__, "recipe": facts.recipe, "date": date.today().isoformat(),
        }  # fmt: skip
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)

    def lines(self, setting: Setting) -> list[dict[str, Any]]:
        """Return the lines of a setting that are of its text as this machine has it.

        What Debian documents is another text once a package is installed.
        """
        if not self.results.is_file():
            return []
        text = open_tokens(str(self.tokens(setting.text) / "heldout")).facts
        wanted = {**vars(setting), "documents": text.documents, "tokens": text.tokens}
        lines = map(json.loads, self.results.read_text("utf-8").splitlines())
        return [
            line
            for line in lines
            if {
                **{name: line[name] for name in vars(setting)},
                "documents": len(line["document_tokens"]),
                "tokens": sum(line["document_tokens"]),
            }
            == wanted
        ]


def call(*words: object) -> None:
    """Run a command. Raises SystemExit if it fails."""
    command = [str(word) for word in words]
    if code := moecc(command):
        raise SystemExit(f"{' '.join(command)}: {code}")


def flops_per_token(run: Path) -> float:
    """Return the executed FLOPs of a token, forward."""
    graph = unrolled(read_graph(str(run / GRAPH)))
    flops = sequence_flops(graph, dict.fromkeys(length_variables(graph), SEQ))
    return (flops.weights + flops.attention) / SEQ


def step_seconds(run: Path) -> float:
    """Return the processor time that 5 % of the steps stay below; none of them compiles."""
    lines = map(json.loads, (run / SPEED).read_text("utf-8").splitlines())
    steps = (x for x in lines if "processor_seconds" in x and "compiles" not in x)
    seconds = sorted(step["processor_seconds"] for step in steps)
    return seconds[len(seconds) // 20]


def run_setting(lab: Lab, setting: Setting, arms: Sequence[str]) -> None:
    """Measure the arms of a setting that are missing, those last that others are held against."""
    for arm in arms:
        lab.measure(setting, arm, ARMS[arm], STEPS if arm == SPARSE else STEPS[:3])
    sparse = {x["steps"]: x for x in lab.lines(setting) if x["arm"] == SPARSE}
    if not sparse:
        return
    # Beside an arm that executes more, the recipe takes more steps.
    flops = sparse[STEPS[0]]["flops_per_token"]
    others = [x for x in lab.lines(setting) if x["arm"] not in (SPARSE, DENSE)]
    steps = {ceil(x["steps"] * x["flops_per_token"] / flops) for x in others}
    lab.measure(setting, SPARSE, ARMS[SPARSE], sorted(steps - set(STEPS)))
    more = sparse[STEPS[-1]]["flops_per_token"] / flops_per_token(lab.base(setting))
    steps = {*(ceil(n * more) for n in STEPS), *(round(n * LONGER) for n in STEPS)}
    lab.measure(setting, DENSE, ("model.pipeline=''",), sorted(steps))


def prove(lab: Lab) -> int:
    """Run every setting from nothing; return 3 if the sparse model is not below at equal FLOPs."""
    from worth_page import claims, read_lines, table

    shutil.rmtree(lab.work, ignore_errors=True)
    settings = [Setting(text, seed) for seed in SEEDS for text in TEXTS]
    for text in TEXTS:
        lab.tokens(text)
    # A step keeps one core busy, so two settings run side by side.  A fork compiles nothing that
    # an earlier run of its setting has compiled, and a line of results is written at once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(lab.work / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        list(pool.map(partial(run_setting, lab, arms=(SPARSE,)), settings))
    rows = claims(read_lines(lab.results))
    print(*table("sparse less dense", rows), sep="\n")
    is_below = [effect.mean + effect.reach(len(rows)) < 0 for _, effect in rows]
    return 0 if is_below[len(STEPS) - 1] else 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", default=SPARSE)
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--decoder", default="decoder_worth", choices=RATES)
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--proof", action="store_true", help="all from nothing, and a verdict")
    asked = parser.parse_args(argv)
    if asked.proof:
        return prove(Lab(WORK / "proof", WORK / "proof" / "worth.jsonl"))
    for seed in map(int, asked.seeds.split(",")):
        for text in asked.texts.split(","):
            setting = Setting(text, seed, asked.decoder, asked.base_steps)
            run_setting(Lab(), setting, asked.arms.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())
