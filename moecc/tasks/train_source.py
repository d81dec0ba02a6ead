"""The model of a recipe: opened, its pipeline run, its parameters under their own names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moecc.errors import InputError
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.folder import CONFIG_NAME, open_folder
from moecc.formats.run import is_run
from moecc.model.initialise import initialise
from moecc.model.open import Model, open_model, registry_with
from moecc.pipeline.passes import Context
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.presets import PREFIX, preset_config
from moecc.train.recipe import ModelSection, Recipe, Start
from moecc.train.state import Canonical, canonical
from moecc.types import float_type


@dataclass(frozen=True)
class Source:
    """A model as a recipe takes it.

    Attributes:
      model: opened.
      made: its canonical graph, and how its parameters are made.
      preserves: what the pipeline does to the function.
      pipeline: in full.
      remarks: of its passes.
    """

    model: Model
    made: Canonical
    preserves: str
    pipeline: str
    remarks: tuple[str, ...]


@contextmanager
def open_source(recipe: Recipe, files: Sequence[str] = ()) -> Iterator[Source]:
    """Open the model of a recipe and run its pipeline.

    Args:
      recipe: the recipe.
      files: of the user, with passes and families.

    Raises:
      InputError: the source is faulty, or a pass does not suit it.
      UsageError: the pipeline is faulty.
    """
    section = recipe.model
    pipeline = Pipeline.parse(section.pipeline, registry_with(files))
    remarks: list[str] = []
    context = Context(seed=section.seed, remark=lambda r: remarks.append(str(r)))
    with _opened(section) as model:
        done = run_pipeline(model.graph, pipeline, context=context)
        if section.start is Start.RANDOM:
            initialise(model.graph, seed=section.seed)
        elif model.checkpoint is None:
            raise InputError(
                "the source has no weights", where=section.source,
                hint='model.start = "random" draws them',
            )  # fmt: skip
        made = canonical(model.graph, float_type(recipe.run.weight_dtype))
        made.graph.attrs.pop("checkpoint", None)
        yield Source(model, made, str(done.preserves), pipeline.in_full(), tuple(remarks))


def _opened(section: ModelSection) -> Model:
    """Open the source of a recipe; where weights are drawn, a folder with a config is enough."""
    folder = Path(section.source)
    if section.start is Start.RANDOM and folder.is_dir() and not is_run(folder):
        checkpoint = open_folder(folder, with_weights=False)
        config = parse_config(checkpoint.config, str(folder / CONFIG_NAME))
        return Model(build(config), section.source, checkpoint)
    return open_model(section.source)


def config_of(model: Model) -> bytes:
    """Return the config.json of a source."""
    found: object = model.graph.attrs.get("config", {})
    if model.checkpoint is not None:
        found = model.checkpoint.config
    elif model.name.startswith(PREFIX):
        found = preset_config(model.name)
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()
