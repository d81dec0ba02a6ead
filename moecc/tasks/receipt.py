"""The receipt of a conversion: what was promised, what was measured, and what will load the result.

``moecc_receipt.json`` holds nothing but what decides the result and what was found of it: no path
of the output, no time, no host.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.families.st_moe import GraphConfig
from moecc.model.open import MODEL_TYPE
from moecc.pipeline.passes import Preserves
from moecc.tasks.contracts import Contracts
from moecc.translate.engines import release_of

if TYPE_CHECKING:
    from moecc.tasks.verify_written import Verified
    from moecc.translate.engines import Verdict

RECEIPT_NAME = "moecc_receipt.json"
SCHEMA = "moecc.receipt/1"
MAX_RECEIPT_BYTES = 4 << 20
_OUTPUTS = {"hidden": "hidden states"}
"""What outputs are called, where it is not their name."""


@dataclass(frozen=True)
class Receipt:
    """What is to be said for a conversion.

    Attributes:
      target: the family of the result.
      promised: the combined promise of the passes.
      contracts: what was found on the small model.
      verified: what was found at the logits; None if nobody looked.
      engines: whether each engine runs the result.
      versions: of what decides the bytes.
    """

    target: str
    promised: Preserves
    contracts: Contracts
    verified: Verified | None
    engines: Sequence[Verdict]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """Return the receipt as JSON values."""
        return {
            "schema": SCHEMA,
            "versions": dict(self.versions),
            "target": self.target,
            "promised": _promise(self.promised),
            "checked": [
                {"pass": p.text, "promised": _promise(p.promised), "measured_error": p.measured}
                for p in self.contracts.passes
            ],
            "unchecked": self.contracts.unchecked or None,
            "verified": None if self.verified is None else self.verified.to_json(),
            "engines": [verdict.to_json() for verdict in self.engines],
        }

    def content(self) -> bytes:
        """Return the content of ``moecc_receipt.json``."""
        return (json.dumps(self.to_json(), indent=2) + "\n").encode()


def _promise(promise: Preserves) -> dict[str, object]:
    return {
        "kind": promise.kind,
        "reason": promise.reason,
        "predicted_error": promise.predicted_error,
    }


def receipt_lines(stated: Mapping[str, object]) -> list[str]:
    """Return a receipt in three lines: what was promised, what was measured, what runs it."""
    promised = object_of(stated.get("promised"))
    reason, error = promised.get("reason"), promised.get("predicted_error")
    text = f"{promised.get('kind')}" + (f": {reason}" if reason else "")
    if error is not None:
        text += f" (predicted relative error {number_text(error, '.2g')})"
    return [
        f"Promised: {text}",
        f"Measured: {_measured(stated)}; {_at_the_logits(stated)}",
        f"Runs in: {_engines(stated)}",
    ]


def _measured(stated: Mapping[str, object]) -> str:
    errors = [one.get("measured_error") for one in objects_of(stated.get("checked"))]
    numbers = [e for e in errors if isinstance(e, int | float)]
    if stated.get("unchecked"):
        return f"passes not checked ({stated['unchecked']})"
    if not numbers:
        return "no pass to check"
    count = f"each of {len(numbers)} passes" if len(numbers) > 1 else "the pass"
    largest = max(numbers)
    error = f"relative error {number_text(largest, '.2g')}" if largest else "no more than rounding"
    return f"{count} on the model at small sizes, {error}"


def _at_the_logits(stated: Mapping[str, object]) -> str:
    found = object_of(stated.get("verified"))
    if not found:
        return "not at the logits, which `convert --verify` does"
    difference, layers = object_of(found.get("difference")), found.get("layers")
    part = f" of the first {layers} layers" if layers else ""
    output = str(found.get("output"))
    return (
        f"the {_OUTPUTS.get(output, output)}{part} in {found.get('compute_dtype')}, "
        f"{number_text(difference.get('max_relative'), '.2e')} of the largest"
    )


def number_text(value: object, form: str) -> str:
    """Format a number that a file states, which may be anything."""
    try:
        return format(float(value), form) if isinstance(value, int | float) else "unknown"
    except OverflowError:
        return "unknown"


def _engines(stated: Mapping[str, object]) -> str:
    rows = objects_of(stated.get("engines"))
    runs = [release_of(str(e.get("engine")), str(e.get("version"))) for e in rows if e.get("runs")]
    others = [str(e.get("engine")) for e in rows if not e.get("runs")]
    if not rows:
        target = stated.get("target")
        own = target in (None, GraphConfig.model_type, MODEL_TYPE)
        return "moecc" if own else f"what runs a dense {target}; mixtures alone were looked at"
    text = ", ".join(runs) if runs else "moecc alone"
    return f"{text}; not in {', '.join(others)}" if others else text


def objects_of(value: object) -> list[dict[str, object]]:
    """Return a list of objects that a file states, which may be anything."""
    return [object_of(one) for one in value] if isinstance(value, list) else []


def object_of(value: object) -> dict[str, object]:
    """Return an object that a file states, which may be anything."""
    return value if isinstance(value, dict) else {}


def load_receipt(place: Path) -> dict[str, object] | None:
    """Return the receipt of an output, a folder or one file; None if it has none.

    Raises:
      InputError: it is no receipt.
    """
    from moecc.formats.files import read_bounded
    from moecc.formats.manifest import load
    from moecc.support.documents import parse_json

    if not place.is_dir():
        found = load(place).receipt
        return None if found is None else dict(found)
    path = place / RECEIPT_NAME
    if not path.is_file():
        return None
    document = parse_json(read_bounded(path, MAX_RECEIPT_BYTES), str(path))
    if object_of(document).get("schema") != SCHEMA:
        found_schema = str(object_of(document).get("schema"))
        raise InputError(
            "not a receipt", where=str(path), expected=f'"schema": "{SCHEMA}"', found=found_schema
        )
    return object_of(document)
