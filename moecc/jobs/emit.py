"""``moecc emit``: write a model as a program that its owner reads, trains and edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from moecc.jobs.command import (
    Force,
    Load,
    ModelName,
    Report,
    ShardBytes,
    Spelling,
    Weights,
)

if TYPE_CHECKING:
    from moecc.model.open import OpenedModel
    from moecc.types import DType


def emit(
    language: Annotated[Literal["torch", "jax", "maxtext"], Spelling("LANGUAGE")],
    model: ModelName,
    *,
    output: Annotated[str, Spelling("DIR", short="o")],
    dtype: Annotated[str | None, Spelling("TYPE")] = None,
    max_shard_bytes: ShardBytes = "5000000000",
    weights: Weights = None,
    load: Load = (),
    force: Force = False,
) -> Report:
    """Write a model as a program, or for MaxText.

    The folder has the weights and one readable file.  In PyTorch it is modeling_st_moe.py, which
    transformers loads with trust_remote_code=True; in JAX it is jax_st_moe.py, with the functions
    init, load and apply.  moecc reads the folder, too, by the graph in its config, and never runs
    the file.  For maxtext it has a checkpoint whose parameters MaxText loads, and the settings of
    its model.

    Args:
      language: Language of the program: torch or jax; or maxtext.
      output: Folder to write.
      dtype: Element type to write: f32, bf16, f16 or f64 (default: as stored).

    Example:
      moecc emit torch smollm2-8x -o smollm2-8x-torch
    """
    from moecc.families.config import FAMILY
    from moecc.formats.writer import WriteOptions
    from moecc.jobs.convert import check_place, plan, plan_text, write
    from moecc.model.open import load_files, open_model
    from moecc.rewrite.pipeline import Pipeline
    from moecc.support.console import Bar
    from moecc.support.process import signals_raised
    from moecc.types import count_bytes, float_type

    load_files(load)
    type = None if dtype is None else float_type(dtype)
    options = WriteOptions(count_bytes(max_shard_bytes))
    with signals_raised(), open_model(model, weights=weights, padding=None, heads=True) as opened:
        if language == "maxtext":
            return _emit_maxtext(opened, output, type, force=force)
        planned = plan(opened, Pipeline(()), FAMILY, dtype=type, emit=language)
        check_place(planned, output, options, force=force)
        with Bar("writing") as bar:
            write(planned, output, replace(options, progress=bar), force=force)
    data = planned.to_json() | {"out": output, "language": language}
    return Report("emit", data, lambda: plan_text(planned, output, dry_run=False))


def _emit_maxtext(opened: OpenedModel, output: str, type: DType | None, *, force: bool) -> Report:
    """Write a model of a family of MaxText's as the checkpoint that MaxText loads."""
    from moecc.families.registry import parse_config
    from moecc.formats.files import json_content
    from moecc.formats.maxtext import ITEM, SETTINGS, STEP, maxtext_arrays, write_maxtext
    from moecc.formats.output import output_folder
    from moecc.jobs.convert import plan, write_companions
    from moecc.rewrite.pipeline import Pipeline
    from moecc.support.extras import require
    from moecc.translate.export import Export
    from moecc.weights.evaluate import evaluate

    require("MaxText's checkpoints", ["train"])
    checkpoint = opened.weights
    family = str(opened.graph.attrs.get("family"))
    planned = plan(opened, Pipeline(()), family, dtype=type, check=False)
    assert isinstance(planned.export, Export), "a folder was planned"
    config = parse_config(planned.export.config_json)
    exprs = {tensor.name: tensor.expr for tensor in planned.tensors}
    arrays = maxtext_arrays(config, {name: expr.type for name, expr in exprs.items()})
    size_bytes = sum(tensor.entry.nbytes for tensor in planned.tensors)
    with output_folder(
        Path(output), inputs=checkpoint.places(), force=force, needed_bytes=2 * size_bytes
    ) as folder:
        write_maxtext(folder, config, arrays, lambda name: evaluate(exprs[name], checkpoint.read))
        config_json = json_content(dict(planned.export.config_json))
        write_companions(folder, {**checkpoint.companions(), "config.json": config_json})
        checkpoint.require_unchanged()
    data = {"out": output, "language": "maxtext", "arrays": len(arrays), "size_bytes": size_bytes}
    text = (
        f"{opened.name} -> {output} ({family} of MaxText)\n"
        f"  load_parameters_path={output}/{STEP}/{ITEM}\n"
        f"  the settings of its model are in {output}/{SETTINGS}"
    )
    return Report("emit", data, lambda: text)
