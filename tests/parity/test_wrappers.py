"""transformers computes of a wrapper whose text model was converted what it did before."""

import pytest

import moecc
from moecc.families.wrappers import WRAPPERS

from .interpreters import ask, in_each_interpreter

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@in_each_interpreter
def test_wrappers_with_a_converted_text_model(python, tmp_path):
    sources = tmp_path / "sources"
    version = ask(python, "wrappers.py", {"make": str(sources)})["version"]
    folders = {}
    for name in (name for name in WRAPPERS if (sources / name).is_dir()):
        model = moecc.open(sources / name)
        model.save(tmp_path / f"{name}-same")
        folders[f"{name}-same"] = str(tmp_path / f"{name}-same")
        # transformers 4 hands image_sizes, or logits_to_keep, to a text model that takes neither.
        refused = version.startswith("4.") and bool(WRAPPERS[name].uncalled)
        if (WRAPPERS[name].holds_any or WRAPPERS[name].twins) and not refused:
            model.upcycle(experts=4).save(tmp_path / f"{name}-sparse")
            folders[f"{name}-sparse"] = str(tmp_path / f"{name}-sparse")
    verdicts = ask(python, "wrappers.py", {"judge": folders, "sources": str(sources)})
    assert {name: v["gap"] for name, v in verdicts.items() if v["gap"] > 1e-6} == {}
    assert {name: v["reported"] for name, v in verdicts.items() if v["reported"]} == {}
    assert verdicts["llava-sparse"]["text"] == "mixtral"
    if "qwen3_5" in folders:
        assert verdicts["qwen3_5-sparse"]["text"] == "qwen3_5_moe_text"
