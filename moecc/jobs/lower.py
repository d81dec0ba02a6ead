"""``moecc lower``: print a model's program at a level of lowering."""

from __future__ import annotations

from typing import Literal

from moecc.jobs.command import (
    Amount,
    AnyModelName,
    ComputeType,
    Force,
    Load,
    Output,
    Report,
    Weights,
    artefact,
    check_writable,
)
from moecc.support.console import say


def lower(
    model: AnyModelName,
    *,
    emit: Literal["jaxpr", "stablehlo", "hlo"] = "stablehlo",
    dispatch: str = "auto",
    platform: Literal["cpu", "gpu", "tpu"] | None = None,
    batch: Amount = 2,
    seq: Amount = 128,
    dtype: ComputeType = "f32",
    output: Output = None,
    force: Force = False,
    weights: Weights = None,
    load: Load = (),
) -> Report:
    """Print a model as jax or XLA sees it.

    No weights are read, and nothing is run.

    Args:
      emit: Language of the program; hlo is the one that is compiled on this machine.
      dispatch: Implementation of expert layers: auto, or one for all of gather,
        grouped, blocks, ragged_dot, gathered, used.
      platform: Platform to lower for (default: that of this machine).
      batch: Number of sequences.
      seq: Number of tokens in a sequence.

    Example:
      moecc lower layer.moe --emit stablehlo --dispatch grouped
    """
    from moecc.backend import LoweringBackend, backend_with
    from moecc.ir.mesh import mesh_of
    from moecc.model.inputs import default_inputs
    from moecc.model.open import load_files, open_model
    from moecc.types import float_type

    check_writable(output, force=force)
    load_files(load)
    type, backend = float_type(dtype), backend_with(LoweringBackend)
    options = {"dispatch": dispatch, "platform": platform}
    with open_model(model, weights=weights) as opened:
        mesh = mesh_of(opened.graph)
        if mesh is not None and mesh.devices > 1:
            say(f"note: the program is that of one device, without the mesh {mesh}; "
                "moecc compile lowers a training step for a mesh")  # fmt: skip
        inputs = default_inputs(opened.graph, batch=batch, seq=seq)
        text = backend.lower(opened.graph, inputs, emit=emit, dtype=type, options=options)
    text = text if text.endswith("\n") else f"{text}\n"
    return artefact("lower", text, output, force=force, emit=emit)
