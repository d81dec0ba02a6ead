"""The programs that ``docs/emit.md`` prints."""

from __future__ import annotations

import ast
import sys

from moecc.backend import emit_program
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.generated_docs import GeneratedPart

SOURCE = "preset:smollm2-135m"
SPARSE_CLASSES = ("ExpertRows", "Router", "Experts", "Layer")


def _program(pipeline: str = "") -> str:
    with open_model(SOURCE) as model:
        run_pipeline(model.graph, Pipeline.parse(pipeline))
        (text,) = emit_program(model.graph, "torch").files.values()
    return text


def render() -> str:
    """Return the file of a Llama, and the classes of its mixture of experts, as Markdown."""
    dense, sparse = _program(), _program("upcycle{experts=8 top-k=2}")
    lines = sparse.splitlines()
    classes = [
        "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(sparse).body
        if isinstance(node, ast.ClassDef) and node.name in SPARSE_CLASSES
    ]
    size = len(dense.splitlines())
    return "\n\n".join(
        [
            f"### A Llama: SmolLM2, 30 layers in {size} lines",
            f"```python file\n{dense}```",
            "### The same with 8 experts in each layer, top-2: what differs",
            "```python file\n" + "\n\n\n".join(classes) + "\n```",
        ]
    )


PROGRAMS = GeneratedPart("programs", "moecc_backends.torch_source.docs", render)

if __name__ == "__main__":
    sys.exit(PROGRAMS.main())
