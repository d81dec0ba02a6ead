"""Run the experiments that `experiments.toml` declares, and write the page of their results.

    python experiments/run.py [a b …] [--seeds 0,1,2] [--minutes 60] [--tasks FOLDER]
    make proof-learning

Every arm of every seed is a run of `moecc train`.  What is done is not done again: a line of
``results/`` is written as an arm ends, and a run that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from declared import HERE, RESULTS, SEEDS, Experiment, add_result, declared, read_results
from results_page import write_page
from tasks import write_task
from verdicts import Verdict, effect_of

from moecc.cli.main import main as moecc
from moecc.formats.run import SPEED, is_run, saved_steps
from moecc.version import __version__

ROOT = HERE.parent
WORK = ROOT / "demo-output" / "experiments"
DECODER = ROOT / "examples" / "train_on_docs" / "decoder"
PROOF = ("e", "a capacity of 1.25 is better than one of 0.75")
"""The claim that `make proof-learning` shows again: of those that stand, the largest effect."""


SPARSE = "top-2"
"""The arm of (a) that is fine-tuned."""


LIKELIER = "the likelier label"
"""The arm of a task that learns nothing."""


EXPLAINED = ("explained", "by_chance", "untrained")
"""What `moecc specialise` says of the share of a choice that the token alone explains."""


class CommandError(Exception):
    """A command failed; it said why."""


@dataclass(frozen=True)
class Lab:
    """Where experiments are run.

    Attributes:
      work: tokens and runs.
      results: the lines.
      few: values that every recipe gets; for tests.
      tasks: the folder of the data sets for fine-tuning, each in a folder of its name.
    """

    work: Path = WORK
    results: Path = RESULTS
    few: tuple[str, ...] = ()
    tasks: Path | None = None

    def tokens(self) -> Path:
        """Return the token folders of the documentation, which are made once."""
        out = self.work / "tokens"
        if not (out / "train" / "tokens.json").is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            texts = (ROOT / "README.md", ROOT / "docs", "--include", "*.md", "--split", "paragraph")
            call("tokens", *texts, "--tokenizer", "bytes", "--hold-out", "0.1", "--out", out)
        return out

    def task(self, name: str) -> Path:
        """Return the token folders of a task, which are made once."""
        out = self.work / f"task-{name}"
        if not (out / "train" / "tokens.json").is_file():
            if self.tasks is None:
                raise CommandError(f"--tasks FOLDER says where the data set {name} is")
            file = write_task(name, self.tasks / name, self.work / f"{name}.jsonl")
            call("tokens", file, "--kind", "labelled", "--prompt", "{text} ", "--completion",
                 "{label}", "--tokenizer", "bytes", "--hold-out", "0.1", "--out", out)  # fmt: skip
        return out

    def trained(self, name: str, recipe: str, *sets: str, tokens: Path | None = None) -> Path:
        """Return a run that is at its end, having begun it or gone on with it."""
        out, tokens = self.work / name, self.tokens() if tokens is None else tokens
        if is_run(out):
            call("train", "--resume", out)
            return out
        shutil.rmtree(out, ignore_errors=True)
        places = (
            f"data.train.0.tokens={tokens / 'train'}",
            f"data.evaluate.0.tokens={tokens / 'heldout'}",
        )
        words = [word for one in (*places, *sets, *self.few) for word in ("--set", one)]
        call("train", HERE / recipe, "--out", out, *words)
        return out

    def dense(self, seed: int, decoder: str = "") -> Path:
        """Return the dense model of a seed; `decoder` is the folder of another config."""
        seeds = (f"model.seed={seed}", f"data.seed={seed}")
        source = f"model.source={HERE / decoder if decoder else DECODER}"
        name = "-".join(["dense", *filter(None, [decoder]), str(seed)])
        return self.trained(name, "base.toml", source, *seeds)

    def arm(self, experiment: Experiment, arm: str, seed: int) -> dict[str, Any]:
        """Return the result of an arm."""
        if experiment.stacks:
            return self.stack(experiment, arm, seed)
        if arm == LIKELIER:
            return self.likelier(experiment, seed)
        source, tokens = self.source(experiment, seed)
        began = time.monotonic()
        recipe = "finetune.toml" if experiment.task else "continue.toml"
        run = self.trained(
            f"{experiment.key}-{slug(arm)}-{seed}", recipe, f"model.source={source}",
            f"model.seed={seed}", f"data.seed={100 + seed}", *experiment.arms[arm], tokens=tokens,
        )  # fmt: skip
        facts = saved_steps(run)[-1].facts
        rows = ("64", "32") if experiment.task else ("128", "16")
        held = self.held_out(run, tokens, "--sequence", rows[0], "--batch", rows[1])
        if experiment.task:
            held["loss"] = 1 - held["accuracy"]
        return {
            "experiment": experiment.key, "arm": arm, "seed": seed, "loss": held["loss"],
            "held_out_tokens": held["tokens"], "steps": facts.step, "tokens": facts.tokens,
            "processor_seconds": round(facts.step * step_seconds(run), 1),
            "seconds": round(time.monotonic() - began, 1), "data": data_digest(run),
            "recipe": facts.recipe, "moecc": __version__,
            **({"curve": curve(run, experiment.curves)} if experiment.curves else {}),
        }  # fmt: skip

    def likelier(self, experiment: Experiment, seed: int) -> dict[str, Any]:
        """Return the result of the label that most held-out records have, beside the first arm."""
        run = self.work / f"{experiment.key}-{slug(next(iter(experiment.arms)))}-{seed}"
        path = self.task(experiment.task) / "heldout" / "tokens.json"
        counts = [label["count"] for label in json.loads(path.read_text("utf-8"))["labels"]]
        return {
            "experiment": experiment.key, "arm": LIKELIER, "seed": seed,
            "loss": 1 - max(counts) / sum(counts), "held_out_tokens": sum(counts), "steps": 0,
            "tokens": 0, "processor_seconds": 0.0, "seconds": 0.0, "data": data_digest(run),
            "moecc": __version__,
        }  # fmt: skip

    def stack(self, experiment: Experiment, name: str, seed: int) -> dict[str, Any]:
        """Return where the routers of a stack send sentinels, the mean over its layers."""
        began = time.monotonic()
        run, tokens = self.spans(seed), self.tokens()
        text = said("specialise", run, "--data", tokens / "heldout", "--sequence", "128",
                    "--batch", "16", "--format", "json")  # fmt: skip
        layers = [x for x in json.loads(text)["layers"] if x["layer"].startswith(name)]
        facts = saved_steps(run)[-1].facts
        return {
            "experiment": experiment.key, "arm": name, "seed": seed,
            "loss": mean(x["sentinel_entropy"] / x["even_entropy"] for x in layers),
            "other": mean(x["other_entropy"] / x["even_entropy"] for x in layers),
            **{key: mean(x[key] for x in layers) for key in EXPLAINED},
            "held_out_tokens": layers[0]["tokens"], "steps": facts.step,
            "tokens": facts.tokens,
            "processor_seconds": round(facts.step * step_seconds(run), 1),
            "seconds": round(time.monotonic() - began, 1), "data": data_digest(run),
            "recipe": facts.recipe, "moecc": __version__,
        }  # fmt: skip

    def spans(self, seed: int) -> Path:
        """Return the encoder-decoder of a seed."""
        seeds = (f"model.seed={seed}", f"data.seed={seed}")
        source = f"model.source={HERE / 'encoder_decoder'}"
        return self.trained(f"spans-{seed}", "spans.toml", source, *seeds)

    def source(self, experiment: Experiment, seed: int) -> tuple[Path, Path]:
        """Return the model that arms go on from, and the tokens."""
        if not experiment.task:
            return self.dense(seed, experiment.decoder), self.tokens()
        arm = SPARSE
        sparse = self.trained(
            f"a-{slug(arm)}-{seed}", "continue.toml", f"model.source={self.dense(seed)}",
            f"model.seed={seed}", f"data.seed={100 + seed}", *declared()["a"].arms[arm],
        )  # fmt: skip
        return sparse, self.task(experiment.task)

    def held_out(self, run: Path, tokens: Path, *more: str) -> dict[str, Any]:
        """Return what a run makes of all of the held-out text."""
        text = said("evaluate", run, "--data", tokens / "heldout", "--format", "json", *more)
        found: dict[str, Any] = json.loads(text)["models"][0]["sets"]["heldout"]
        return found


def data_digest(run: Path) -> str:
    """Return the digest of the training data of a run."""
    stages = json.loads((run / "lineage.json").read_text("utf-8"))["stages"]
    return str(stages[-1]["data"]["train/train"])


def step_seconds(run: Path) -> float:
    """Return the mean processor time of the steps of a run in which nothing is compiled."""
    lines = map(json.loads, (run / SPEED).read_text("utf-8").splitlines())
    return mean(x["processor_seconds"] for x in lines if "seconds" in x and "compiles" not in x)


def slug(text: str) -> str:
    """Return `text` as part of the name of a folder."""
    return re.sub(r"\W+", "-", text)


def curve(run: Path, steps: int) -> list[float]:
    """Return the training loss of the first steps."""
    lines = (json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [round(line["loss"], 4) for line in lines if "loss" in line][:steps]


def call(*words: object) -> None:
    """Run a command. Raises CommandError if it fails."""
    command = [str(word) for word in words]
    if moecc(command) != 0:
        raise CommandError(" ".join(command))


def said(*words: object) -> str:
    """Return what a command writes on stdout. Raises CommandError if it fails."""
    with redirect_stdout(io.StringIO()) as out:
        call(*words)
    return out.getvalue()


def missing(
    lab: Lab, experiments: Sequence[Experiment], seeds: Sequence[int]
) -> Iterator[tuple[Experiment, str, int]]:
    """Yield what has no result yet: all arms of a seed before the next seed."""
    done = {(r["experiment"], r["arm"], r["seed"]) for r in read_results(lab.results)}
    for experiment in experiments:
        for seed in seeds:
            for arm in experiment.arms:
                if (experiment.key, arm, seed) not in done:
                    yield experiment, arm, seed


def run_all(
    lab: Lab, experiments: Sequence[Experiment], seeds: Sequence[int], minutes: float
) -> None:
    """Run what is missing, one after another, until the time is over."""
    began = time.monotonic()
    for experiment, arm, seed in missing(lab, experiments, seeds):
        if time.monotonic() - began > 60 * minutes:
            return
        add_result(lab.arm(experiment, arm, seed), lab.results)


def prove(lab: Lab) -> int:
    """Run one claim again, with results of its own, and return 3 if it does not show."""
    key, claim = PROOF
    part = declared()[key].only(claim)
    run_all(lab, [part], SEEDS, float("inf"))
    found = effect_of(read_results(lab.results), part, claim)
    print(f"{claim}: {found.mean:+.4f} ± {found.half_width:.4f} nats a byte: {found.verdict.value}")
    return 0 if found.verdict is Verdict.SHOWN else 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and return the exit code."""
    known = declared()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("keys", nargs="*", choices=[*known, []], metavar="LETTER")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--claim", help="only the arms of this claim of one experiment")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm later")
    parser.add_argument("--tasks", type=Path, help="the data sets for fine-tuning, by name")
    parser.add_argument("--proof", action="store_true", help="one claim again, from nothing")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    asked = parser.parse_args(argv)
    if asked.proof:
        work = WORK / "proof"
        shutil.rmtree(work, ignore_errors=True)
        return prove(Lab(work, work / "results"))
    if not asked.page:
        chosen = [known[key] for key in asked.keys or known]
        if asked.claim is not None:
            chosen = [one.only(asked.claim) for one in chosen if asked.claim in one.claims]
        run_all(
            Lab(tasks=asked.tasks), chosen, [int(s) for s in asked.seeds.split(",")], asked.minutes
        )
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
