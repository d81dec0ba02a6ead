"""Graphs of golden models and presets, pipelines on them, and their conversions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import Graph
from moecc.jobs.conversion import Plan, plan
from moecc.model.open import OpenedModel, add_branches, open_model
from moecc.presets import preset_config
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import PipelineReport, run_pipeline
from moecc.testing import run_reference
from moecc.types import F64, Array

GOLDEN = Path(__file__).parents[1] / "golden"

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 32,
}  # fmt: skip
"""Keys that make the preset of a decoder small."""


def apply_passes(graph: Graph, passes: str, **context: Any) -> PipelineReport:
    """Run the pipeline text `passes` on `graph`, in place."""
    return run_pipeline(graph, Pipeline.parse(passes), context=Context(**context))


def imported(name: str | Path, passes: str = "") -> Graph:
    """Return the graph of a golden model, or of that in a folder, after `passes`."""
    with open_model(str(GOLDEN / name)) as model:
        apply_passes(model.graph, passes)
        return model.graph


def preset_graph(name: str, **keys: Any) -> Graph:
    """Return the graph of a preset, some keys of its config replaced."""
    return build(parse_config({**preset_config(name), **keys}))


def logits(model: OpenedModel, name: str) -> Array:
    """Return the logits of a model in float64, for the inputs of the golden model `name`."""
    inputs = {n: np.load(GOLDEN / name / f"{n}.npy") for n in model.graph.inputs}
    return run_reference(model.graph, params=model.params(dtype=F64), inputs=inputs)["logits"]


def tensors(folder: Path) -> dict[str, Array]:
    """Return the tensors of the safetensors files of a folder."""
    return {n: a for file in folder.glob("*.safetensors") for n, a in load_file(file).items()}


def planned(
    source: str | Path,
    passes: str,
    target: str,
    *,
    branches: Mapping[str, object] | None = None,
    **options: Any,
) -> Plan:
    """Plan the conversion of a model, whose checkpoint stays open.

    Args:
      source: a golden model, or the folder of another.
      passes: the pipeline.
      target: the family of the result.
      branches: further models, by name.
      options: those of `plan`.
    """
    model = open_model(str(GOLDEN / source))
    add_branches(model, {name: str(folder) for name, folder in (branches or {}).items()})
    return plan(model, Pipeline.parse(passes), target, **options)
