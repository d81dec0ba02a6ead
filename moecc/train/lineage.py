"""What a run keeps of its source: its files, and how it came about."""

from __future__ import annotations

from pathlib import Path

from moecc.checkpoint.manifest import MANIFEST_NAME, file_records
from moecc.checkpoint.modelcard import hub_repository
from moecc.checkpoint.run.layout import LINEAGE_SCHEMA, SOURCE
from moecc.checkpoint.run.lineage import stages_of
from moecc.model.open import Model
from moecc.support.untyped import Json, JsonDict
from moecc.version import __version__


def lineage(model: Model, stage: Json) -> JsonDict:
    """Return what ``lineage.json`` says of a run that begins from `model`.

    Args:
      model: the source.
      stage: what the run itself adds: pipeline, recipe, data.
    """
    checkpoint = model.checkpoint
    found: JsonDict = {"schema": LINEAGE_SCHEMA, "moecc": __version__}
    if checkpoint is None:
        return {**found, "card": {}, "stages": [{"source": model.name, **stage}]}
    records = file_records(checkpoint.files())
    source = {
        "source": checkpoint.path.name,
        "base_model": hub_repository(checkpoint.path),
        "source_files": {n: r.sha256 for n, r in sorted(records.items())},
    }
    stages = [*stages_of(checkpoint), {**source, **stage}]
    return {**found, "card": checkpoint.card(), "stages": stages}


def source_files(model: Model, config: bytes) -> dict[str, Path | bytes]:
    """Return the files of a source that a run keeps: config, companions, and its manifest."""
    files: dict[str, Path | bytes] = {"config.json": config}
    if model.checkpoint is None:
        return files
    files |= model.checkpoint.companions()
    folder = model.checkpoint.path
    places = (folder / MANIFEST_NAME, folder / SOURCE / MANIFEST_NAME)
    manifest = next((place for place in places if place.is_file()), None)
    return files if manifest is None else {**files, MANIFEST_NAME: manifest}
