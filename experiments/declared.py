"""What `experiments.toml` declares, and the lines of results."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SEEDS = (0, 1, 2)

_OPTIONAL = ("curves", "task", "stacks", "unit", "measures", "decoder")

Line = Mapping[str, Any]
"""A result: experiment, arm, seed, and what was measured."""


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes:
      key: its letter.
      title: of its section.
      source: where its claims are from.
      arms: what each arm changes of ``continue.toml``.
      claims: what is said to hold: that the first arm has a lower held-out loss than the second.
      curves: how many steps of the training loss are kept; 0 for none.
      task: the task that arms are fine-tuned on, from the sparse model; empty for pre-training.
      stacks: whether arms are the stacks of one encoder-decoder, whose routers are looked at.
      unit: what a result is: nats a byte, or of a task the share of wrong answers.
      measures: the claim without which the others are not measurable, or none.
      decoder: the folder of the dense model's config, beside this file; the small one if empty.
    """

    key: str
    title: str
    source: str
    arms: Mapping[str, tuple[str, ...]]
    claims: Mapping[str, tuple[str, str]]
    curves: int = 0
    task: str = ""
    stacks: bool = False
    unit: str = "nats a byte"
    measures: str = ""
    decoder: str = ""

    def only(self, claim: str) -> Experiment:
        """Return the experiment with one of its claims, and the arms of that."""
        arms = {arm: sets for arm, sets in self.arms.items() if arm in self.claims[claim]}
        return replace(self, arms=arms, claims={claim: self.claims[claim]})


def declared(path: Path = HERE / "experiments.toml") -> dict[str, Experiment]:
    """Return the experiments by their letters, in the order in which they are run."""
    made = {}
    for key, table in tomllib.loads(path.read_text("utf-8")).items():
        arms = {name: tuple(sets) for name, sets in table["arms"].items()}
        claims = {text: (better, worse) for text, (better, worse) in table["claims"].items()}
        unknown = {arm for pair in claims.values() for arm in pair} - arms.keys()
        if unknown:
            raise ValueError(f"{path.name}: {key}: no arm is called {', '.join(sorted(unknown))}")
        more = {name: table[name] for name in _OPTIONAL if name in table}
        made[key] = Experiment(key, table["title"], table["source"], arms, claims, **more)
    return made


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return all lines of results, file by file."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]


def add_result(line: Line, folder: Path = RESULTS) -> None:
    """Append a line to the results of its experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{line['experiment']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
