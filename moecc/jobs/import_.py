"""``moecc import``: print the graph of a checkpoint as text."""

from __future__ import annotations

from moecc.jobs.command import (
    Force,
    Load,
    Output,
    PaddingMask,
    Report,
    SourceName,
    artefact,
    graph_text,
)


def import_(
    source: SourceName,
    *,
    output: Output = None,
    padding_mask: PaddingMask = False,
    load: Load = (),
    force: Force = False,
) -> Report:
    """Print the graph of a model; no weights are read.

    Args:
      source: Hugging Face folder, .gguf file, or preset:NAME.

    Example:
      moecc import SmolLM2-135M -o smollm2.moe
    """
    from moecc.model.open import load_files, open_model

    load_files(load)
    with open_model(source, padding=padding_mask) as model:
        text = graph_text(model.graph, output)
    return artefact("import", text, output, force=force)
