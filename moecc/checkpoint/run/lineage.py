"""The stages from a first source to a checkpoint: conversions and trainings, and their story."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moecc.checkpoint.given import GivenParams
from moecc.checkpoint.records import MANIFEST_NAME, load
from moecc.checkpoint.run.checkpoint import RunCheckpoint
from moecc.checkpoint.run.layout import run_stages
from moecc.checkpoint.source import Checkpoint
from moecc.errors import MoeccError
from moecc.support.untyped import Json

CONVERTED, TRAINED = "convert", "train"
"""The kinds of stages."""

Stage = Json

_DIGITS = 19
"""So much of a digest is shown: ``sha256:`` and twelve digits."""


def stages_of(checkpoint: Checkpoint) -> list[Stage]:
    """Return the stages that led to a checkpoint, as far as it tells: a run, or a conversion."""
    if isinstance(checkpoint, RunCheckpoint):
        *earlier, last = run_stages(checkpoint.run)
        step = checkpoint.step
        return [*earlier, {**last, "steps": step.number, "tokens": step.facts.get("tokens", 0)}]
    if isinstance(checkpoint, GivenParams):
        own = {"kind": TRAINED, "source": checkpoint.path.name, "outside": True}
        return [*stages_of(checkpoint.source), own]
    return _converted(checkpoint.path)


def _converted(folder: Path) -> list[Stage]:
    """Return the stages of a conversion, of its manifest; none where there is no sound one."""
    if not (folder / MANIFEST_NAME).is_file():
        return []
    try:
        manifest = load(folder)
    except MoeccError:
        return []  # a conversion does not rely on it
    own = {
        "kind": CONVERTED, "source": manifest.source, "pipeline": manifest.pipeline,
        "preserves": manifest.preserves, "seed": manifest.seed,
    }  # fmt: skip
    return [*manifest.lineage, own]


def is_trained(stages: Sequence[Stage]) -> bool:
    """Return whether a training is among `stages`."""
    return any(stage.get("kind") == TRAINED for stage in stages)


def story(stages: Sequence[Stage]) -> list[str]:
    """Return a sentence for each stage, in order."""
    return [_sentence(stage) for stage in stages]


def _sentence(stage: Stage) -> str:
    source, pipeline = stage.get("source", "a model"), stage.get("pipeline") or ""
    made = f" through {pipeline} ({stage.get('preserves')})" if pipeline else ""
    if stage.get("kind") != TRAINED:
        return f"{source} was converted{made}."
    if stage.get("outside"):
        return f"{source} was trained by a loop outside of moecc."
    if "from_step" in stage:
        start = f"{source} was trained on from its step {stage['from_step']:,}"
    elif stage.get("start") == "random":
        start = f"The architecture of {source}{made} was trained from scratch"
    else:
        start = f"{source}{made} was trained"
    texts = [n for n in stage.get("data", {}) if n != "order" and not n.startswith("evaluate/")]
    on = f" of {', '.join(texts)}" if texts else ""
    recipe = str(stage.get("recipe", ""))[:_DIGITS]
    return (
        f"{start}, up to step {stage.get('steps', 0):,}: {stage.get('tokens', 0):,} tokens{on}, "
        f"by the recipe {recipe}."
    )
