"""A model emitted as PyTorch: its text, and what transformers computes with it."""

import ast
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import moecc
from moecc.backend import emit_program
from moecc.jobs.convert import convert
from moecc.jobs.emit import emit

GOLDEN = "tests/golden/llama_gqa"
UPCYCLE = "upcycle{experts=8 top-k=2}"


def program_text(pipeline: str, source: str = GOLDEN) -> str:
    model = moecc.open(source).apply(pipeline)
    (text,) = emit_program(model.graph, "torch").files.values()
    return text


def test_text_has_two_imports_and_the_named_classes():
    tree = ast.parse(program_text(UPCYCLE))
    packages = {
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).partition(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    assert packages - set(sys.stdlib_module_names) == {"torch", "transformers"}
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    assert {"Attention", "Router", "Experts", "Layer", "StMoeForCausalLM"} <= classes.keys()
    forward = next(
        n for n in classes["Experts"].body if isinstance(n, ast.FunctionDef) and n.name == "forward"
    )
    names = [argument.arg for argument in forward.args.args]
    assert names == ["self", "hidden_states", "top_k_index", "top_k_weights"]


def test_text_is_a_function_of_the_graph():
    assert program_text(UPCYCLE) == program_text(UPCYCLE)


def test_emitted_folder_is_a_source(tmp_path):
    folder, again = tmp_path / "a", tmp_path / "b"
    convert(GOLDEN, str(folder), pipeline=UPCYCLE, to="st_moe", emit="torch")
    emit("torch", str(folder), output=str(again))
    name = "modeling_st_moe.py"
    assert (folder / name).read_bytes() == (again / name).read_bytes()
    expected = moecc.open(GOLDEN).apply(UPCYCLE).run()["logits"]
    assert np.array_equal(moecc.open(folder).run()["logits"], expected)


@pytest.mark.parity
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_logits_are_those_of_the_reference(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    convert(GOLDEN, str(tmp_path / "a"), pipeline=UPCYCLE, to="st_moe", emit="torch")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 3
    expected = moecc.open(tmp_path / "a").run({"tokens": tokens})["logits"]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "a", trust_remote_code=True, dtype=dtype
        )
        with torch.no_grad():
            logits = model(torch.tensor(tokens, dtype=torch.long)).logits.double().numpy()
        assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
