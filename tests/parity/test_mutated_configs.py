"""What moecc reads of a mutated config is transformers' function, or a mutated key is rejected.

`MOECC_MUTATIONS` is the number of mutations (default: two of each golden checkpoint), and
`MOECC_MUTATIONS_SEED` chooses them.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.errors import MoeccError
from moecc.model.open import open_model
from moecc.types import F64

from .interpreters import ask, in_each_interpreter, major_of

pytestmark = [pytest.mark.parity, pytest.mark.slow]

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
SOURCES = sorted(GOLDEN / name for name in MANIFEST)
DRAWS = int(os.environ.get("MOECC_MUTATIONS", 2 * len(SOURCES)))
SEED = int(os.environ.get("MOECC_MUTATIONS_SEED", 1))
AT_ONCE = 250
BOUND = 1e-6
READ_BY_VERSION_5 = {
    *((family, "scale_decoder_outputs") for family in ("t5", "umt5")),
    *((family, "tie_word_embeddings") for family in ("mt5", "switch_transformers")),
}
"""Keys that moecc reads as version 5 does: 4 does not know the first, scales an mt5 that is tied,
and makes up the token tables of a switch_transformers that is not."""

ABSENT = "(absent)"
"""What `mutated_models.py` says of a key that it left out, which no message has to name."""


@in_each_interpreter
def test_a_mutated_config_is_read_as_transformers_does_or_rejected(python, tmp_path):
    sources = sources_of(major_of(python))
    kinds = ("equal", "rejected", "not in transformers", "read by version 5")
    wrong, counts = [], dict.fromkeys(kinds, 0)
    for start in range(0, DRAWS, AT_ONCE):
        number = min(AT_ONCE, DRAWS - start)
        turn = start % len(sources)
        turned = [*map(str, sources[turn:]), *map(str, sources[:turn])]
        question = {"sources": turned, "draws": number, "seed": SEED + start, "out": str(tmp_path)}
        for case in ask(python, "mutated_models.py", question):
            if major_of(python) == 4 and is_of_version_5(case):
                counts["read by version 5"] += 1
                continue
            verdict = outcome(case)
            if verdict in counts:
                counts[verdict] += 1
            else:
                wrong.append(f"{case['source']}: {case['keys']}: {verdict}")
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    print(counts)
    assert not wrong, f"{len(wrong)} of {DRAWS}, {counts}:\n" + "\n".join(wrong)


def sources_of(major):
    """Return the checkpoints whose config a version reads as the one that wrote it did."""
    key = "float64, config.json as it is"
    sources = []
    for source in SOURCES:
        stated = json.loads((source / "config.json").read_text())
        if major == 4 and "rope_parameters" in stated and "rope_theta" not in stated:
            continue  # version 4 ignores them, though small heads may hide it
        differences = MANIFEST[source.name]["differences"]
        offs = [d[key] for v, d in differences.items() if v.startswith(f"transformers {major}.")]
        if offs and offs[0] != "does not load" and float(offs[0]) <= BOUND:
            sources.append(source)
    return sources


def is_of_version_5(case):
    """Return whether a mutated key is one that moecc reads as version 5 does, unlike version 4."""
    config = json.loads((GOLDEN / case["source"] / "config.json").read_text())
    return any((config["model_type"], key) in READ_BY_VERSION_5 for key in case["keys"])


def outcome(case):
    """Return which of the outcomes a mutation has, or how far moecc is off."""
    if case["refused"]:
        return "not in transformers"
    folder = Path(case["folder"])
    try:
        with open_model(str(folder)) as model:
            inputs = {name: np.load(folder / f"{name}.npy") for name in model.graph.inputs}
            program = get_backend("reference").compile(model.graph)
            (output,) = program.run(model.params(dtype=F64), inputs).values()
    except MoeccError as error:
        # Version 5 saves no head of a T5 of version 4, whatever its config says of ties.
        keys = {**case["keys"], "tie_word_embeddings": False}
        is_named = any(value == ABSENT or key in str(error) for key, value in keys.items())
        is_named &= error.exit_code == 1
        return "rejected" if is_named else f"{type(error).__name__}: {error}"
    except Exception as error:  # a mistake of the reader, one of thousands of verdicts
        return f"{type(error).__name__}: {error}"
    expected = np.load(folder / "output.npy")
    if output.shape != expected.shape:
        return f"a shape of {output.shape} for {expected.shape}"
    off = np.abs(output - expected).max() / np.abs(expected).max()
    if np.isnan(expected).any():
        return "equal" if np.isnan(output).any() else "numbers for NaN"
    return "equal" if off <= BOUND else f"off by {off:.1e}"
