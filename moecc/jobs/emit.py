"""``moecc emit``: write a model as a program that its owner reads, trains and edits."""

from __future__ import annotations

from typing import Annotated

from moecc.jobs.command import (
    Force,
    Load,
    ModelName,
    Report,
    Spelling,
    Weights,
)


def emit(
    language: Annotated[str, Spelling("LANGUAGE")],
    model: ModelName,
    *,
    output: Annotated[str, Spelling("DIR", short="o")],
    dtype: Annotated[str | None, Spelling("TYPE")] = None,
    max_shard_bytes: Annotated[str, Spelling("SIZE")] = "5000000000",
    weights: Weights = None,
    load: Load = (),
    force: Force = False,
) -> Report:
    """Write a model as a program, with its weights.

    The folder has one readable file.  In PyTorch it is modeling_st_moe.py, which transformers
    loads with trust_remote_code=True; in JAX it is jax_st_moe.py, with the functions init, load
    and apply.  moecc reads the folder, too, by the graph in its config, and never runs the file.

    Args:
      language: Language of the program: torch or jax.
      output: Folder to write.
      dtype: Element type to write: f32, bf16, f16 or f64 (default: as stored).
      max_shard_bytes: Maximal size of a shard: 5000000000, 5GB, 500 MB.

    Example:
      moecc emit torch smollm2-8x -o smollm2-8x-torch
    """
    from moecc.families.outside import load_families
    from moecc.families.st_moe import GraphConfig
    from moecc.jobs.convert import check_place, plan, plan_text, write
    from moecc.model.open import open_model
    from moecc.rewrite.pipeline import Pipeline
    from moecc.support.console import Bar
    from moecc.support.process import signals_raised
    from moecc.types import count_bytes, float_type

    load_families(load)
    type, limit = None if dtype is None else float_type(dtype), count_bytes(max_shard_bytes)
    with signals_raised(), open_model(model, weights=weights, padding=None, heads=True) as opened:
        target = GraphConfig.model_type
        planned = plan(opened, Pipeline(()), target, dtype=type, check=False, emit=language)
        check_place(planned, output, force=force)
        with Bar("writing") as bar:
            write(planned, output, max_shard_bytes=limit, force=force, progress=bar)
    data = planned.to_json() | {"out": output, "language": language}
    return Report("emit", data, lambda: plan_text(planned, output, dry_run=False))
