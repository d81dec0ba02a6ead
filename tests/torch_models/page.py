"""The table of ``docs/any-torch-model.md``, of the architectures that were judged."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parents[2] / "docs" / "proofs" / "torch-models.json"
STAGES = {
    "no block": "have no block that can be converted, many of them mixtures already",
    "export": "are not read by `torch.export`",
    "build": "were not built small",
    "inputs": "were built, and no inputs that ran were known",
    "error": "were not judged: out of time, or saved by transformers with a config it rejects",
    "not judged": "cannot be judged: rounding decides the dense model's results, or no step helps",
    "wrong": "computed something else, or have a block that is neither found nor reported",
}

DIFFERENCES = ("logits", "experts", "gradients")


def render() -> str:
    """Return the counts, and the architectures that are right, as Markdown."""
    document = json.loads(RECORD.read_text("utf-8"))
    rows, versions = document["rows"], document["versions"]
    named = {stage: [] for stage in (*STAGES, "right")}
    for row in rows:
        named[row["stage"]].append(row["type"])
    others = [
        f"* {len(named[stage])} {words}{': ' * bool(named[stage])}{', '.join(named[stage])}"
        for stage, words in STAGES.items()
    ]
    right = [row for row in rows if row["stage"] == "right"]
    spread = ", ".join(row["type"] for row in right if "spread" in row)
    forms = {}
    for row in right:
        forms.setdefault(row["operations"][0], []).append(row)
    lines = [
        f"| {form} | {', '.join(row['type'] for row in rows)} | "
        + " | ".join(f"{max(row[key] for row in rows):.0e}" for key in DIFFERENCES)
        + " |"
        for form, rows in forms.items()
    ]
    return "\n".join(
        [
            f"{document['date']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}: {len(rows)} of {document['architectures']} architectures "
            f"were tried so far, and {len(right)} are right, with "
            f"{sum(row['converted'] for row in right)} blocks; with noise on the weights: "
            f"{spread or 'none'}. Of the others, whose reasons are in "
            "[the record](proofs/torch-models.json),",
            "",
            *others,
            "",
            f"| a block | architectures | {' | '.join(DIFFERENCES)} |",
            "|---|---|---:|---:|---:|",
            *lines,
        ]
    )
