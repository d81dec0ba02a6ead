"""The programs of the documentation: whole files beside ``docs/emit.md``, and classes in it.

``python -m moecc_backends.torch_source.docs docs/emit.md`` writes both.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from moecc.backend import emit_program
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.generated_docs import GeneratedPart
from moecc.support.untyped import JsonDict

LLAMA: JsonDict | str = "preset:smollm2-135m"
T5: JsonDict = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, JsonDict | str, str]] = {
    "llama.py": ("SmolLM2: Llama, 30 layers", LLAMA, ""),
    "t5_st_moe.py": ("T5 with ST-MoE: capacity, losses", T5, "st-moe{experts=8 layers=every:2}"),
    "vit.py": ("ViT", {"model_type": "vit"}, ""),
}  # fmt: skip
"""The whole files: of what, its source, and its passes."""

SPARSE_CLASSES = ("ExpertRows", "Router", "Experts", "Layer")


def program(source: JsonDict | str, pipeline: str) -> str:
    """Return the file of a preset or of a config."""
    if isinstance(source, str):
        with open_model(source) as model:
            graph = model.graph
    else:
        graph = build(parse_config(source), padding=source["model_type"] != "vit")
    run_pipeline(graph, Pipeline.parse(pipeline))
    (text,) = emit_program(graph, "torch").files.values()
    return text


def programs() -> dict[str, str]:
    """Return the whole files by their names."""
    return {name: program(source, pipeline) for name, (_, source, pipeline) in MODELS.items()}


def render() -> str:
    """Return a table of the whole files, and the classes of a mixture of experts, as Markdown."""
    sparse = program(LLAMA, "upcycle{experts=8 top-k=2}")
    lines = sparse.splitlines()
    classes = [
        "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(sparse).body
        if isinstance(node, ast.ClassDef) and node.name in SPARSE_CLASSES
    ]
    rows = [
        f"| [programs/{name}](programs/{name}) | {MODELS[name][0]} | {text.count(chr(10))} |"
        for name, text in programs().items()
    ]
    table = "\n".join(["| file | model | lines |", "|---|---|---:|", *rows])
    title = "What 8 experts in each layer, top-2, change in `llama.py`:"
    return f"{table}\n\n{title}\n\n```python file\n" + "\n\n\n".join(classes) + "\n```"


PROGRAMS = GeneratedPart("programs", "moecc_backends.torch_source.docs", render)


def main() -> int:
    """Write the files beside the page, and the part of the page."""
    folder = Path(sys.argv[1]).parent / "programs"
    folder.mkdir(exist_ok=True)
    for name, text in programs().items():
        (folder / name).write_text(text, "utf-8")
    return PROGRAMS.main()


if __name__ == "__main__":
    sys.exit(main())
