"""``python -m tests.emit.snapshot`` writes digests of every source as PyTorch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from moecc.errors import MoeccError
from tests.emit.cells import METHODS, MIXTURES, SAMPLE, SOURCES, program_text

FILE = Path(__file__).with_suffix(".json")
BRANCHES = "sources=base,a,base,a "


def digests() -> dict[str, str]:
    """Return a digest of the text, for each cell of the sample and every other source."""
    sources = [s for s in (*SOURCES, *MIXTURES) if s not in dict(SAMPLE)]
    return {
        f"{source} {method}": digest(source, METHODS[method].replace(BRANCHES, ""))
        for source, method in (*SAMPLE, *((source, "dense") for source in sources))
    }


def digest(source: str, pipeline: str) -> str:
    """Return a short hash of a program, or why it is rejected."""
    try:
        text = program_text(source, pipeline)
    except MoeccError as error:
        return f"rejected: {error.problems[0].message}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    FILE.write_text(json.dumps(digests(), indent=1) + "\n")
