"""``python -m tests.emit.snapshot`` writes digests of the layers of every source as PyTorch."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

from tests.emit.cells import METHODS, MIXTURES, SAMPLE, SOURCES, program_text

FILE = Path(__file__).with_suffix(".json")
BRANCHES = "sources=base,a,base,a "
BASES = ("nn.Module", "GradientCheckpointingLayer")


def digests() -> dict[str, str]:
    """Return a digest of the classes of layers, for each cell of the sample and every other source.

    The remaining text is common to all sources.
    """
    sources = [s for s in (*SOURCES, *MIXTURES) if s not in dict(SAMPLE)]
    return {
        f"{source} {method}": digest(program_text(source, METHODS[method].replace(BRANCHES, "")))
        for source, method in (*SAMPLE, *((source, "dense") for source in sources))
    }


def digest(program: str) -> str:
    """Return a short hash of the classes of layers of a program."""
    layers = [
        ast.get_source_segment(program, node) or ""
        for node in ast.parse(program).body
        if isinstance(node, ast.ClassDef)
        and node.name != "Scope"
        and [ast.unparse(base) in BASES for base in node.bases] == [True]
    ]
    return hashlib.sha256("\n".join(layers).encode()).hexdigest()[:16]


if __name__ == "__main__":
    FILE.write_text(json.dumps(digests(), indent=1) + "\n")
