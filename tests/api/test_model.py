"""`moecc.open` and its model: a conversion in a few lines, and every wrong argument by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moecc
from moecc.errors import MoeccError, UnknownName
from moecc.ir import print_graph
from moecc.pipeline.registry import installed
from moecc.types.dtypes import BF16

GOLDEN = Path(__file__).parents[1] / "golden"
DENSE = GOLDEN / "llama_gqa"


@pytest.fixture
def dense() -> moecc.Model:
    return moecc.open(DENSE)


def test_a_model_is_upcycled_saved_and_verified(dense: moecc.Model, tmp_path: Path) -> None:
    sparse = dense.upcycle(experts=4, top_k=2)
    saved = sparse.save(tmp_path / "sparse", to="mixtral")
    assert saved.facts.family == "mixtral"
    assert saved.verify(against=DENSE).passed
    assert sparse.verify(against=dense).passed
    assert saved.params().keys() == moecc.open(str(tmp_path / "sparse")).params().keys()


def test_nothing_is_rewritten_in_place(dense: moecc.Model) -> None:
    before = print_graph(dense.graph)
    first, second = (dense.upcycle(experts=4, top_k=2) for _ in range(2))
    assert print_graph(first.graph) == print_graph(second.graph) != before
    assert print_graph(dense.graph) == before
    prepared = [first.prepare("mixtral", check=False).size_bytes for _ in range(2)]
    assert prepared[0] == prepared[1]
    assert print_graph(dense.graph) == before


def test_pipelines_are_text_or_passes_or_several(dense: moecc.Model) -> None:
    text = dense.apply("upcycle{experts=4 top-k=2},canonicalize")
    made = installed().get("upcycle")(experts=4, top_k=2)
    mixed = dense.apply([made, "canonicalize"])
    steps = dense.upcycle(experts=4, top_k=2).apply("canonicalize")
    assert print_graph(text.graph) == print_graph(mixed.graph) == print_graph(steps.graph)
    assert str(text.pipeline) == str(steps.pipeline)
    assert text.preserves.kind == steps.preserves.kind == "reassociation"
    assert len(steps.remarks) == 3


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", BF16, BF16.numpy])
def test_element_types_have_several_names(dense: moecc.Model, dtype: object) -> None:
    name = next(iter(dense.graph.params))
    assert dense.params(dtype=dtype)[name].dtype == BF16.numpy


def test_a_function_is_what_a_run_computes(dense: moecc.Model) -> None:
    pytest.importorskip("jax")
    sparse = dense.upcycle(experts=4, top_k=2)
    tokens = {"tokens": np.arange(6, dtype=np.int32).reshape(1, 6)}
    found = sparse.function()(dict(sparse.params()), tokens)["logits"]
    expected = sparse.run(tokens)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_plan_is_text_and_a_picture() -> None:
    model = moecc.open("preset:smollm2-135m").upcycle(experts=8, top_k=2)
    plan = model.plan("gpu:h100:8", mesh="fsdp=4,expert=2", batch_tokens=32768)
    assert plan.best["mesh"] == {"fsdp": 4, "expert": 2}
    assert "preset:smollm2-135m on gpu:h100:8" in repr(plan)
    assert plan._repr_html_().startswith("<svg")


def test_a_notebook_shows_a_model(dense: moecc.Model) -> None:
    sparse = dense.upcycle(experts=4, top_k=2)
    assert "family llama" in repr(dense)
    assert "4 experts, top-2" in repr(sparse)
    assert "<th>pipeline</th><td>upcycle{experts=4}</td>" in sparse._repr_html_()
    assert "<script" not in moecc.open(_named("<script>"))._repr_html_()


def _named(name: str) -> moecc.Model:
    model = moecc.open(DENSE)
    model.opened.name = name
    return model


WRONG: dict[str, tuple[Callable[[moecc.Model], object], str]] = {
    "a number to open": (lambda m: moecc.open(3), "the source cannot be used"),  # type: ignore[arg-type]
    "bytes to open": (lambda m: moecc.open(b"x"), "the source cannot be used"),  # type: ignore[arg-type]
    "no text to open": (lambda m: moecc.open(""), "the source cannot be used"),
    "a folder that is missing": (lambda m: moecc.open("nowhere"), "no such file or folder"),
    "a preset that is missing": (lambda m: moecc.open("preset:smolm"), "unknown preset"),
    "weights of a folder": (lambda m: moecc.open(DENSE, weights=DENSE), "goes with a .moe file"),
    "a negative seed": (lambda m: moecc.open(DENSE, seed=-1), "the seed is no whole number"),
    "experts that are no mapping": (
        lambda m: moecc.open(DENSE, experts=["a"]), "the experts cannot be used",  # type: ignore[arg-type]
    ),
    "experts of a reserved name": (
        lambda m: moecc.open(DENSE, experts={"base": DENSE}), "the name of SOURCE itself",
    ),
    "experts of another family": (
        lambda m: moecc.open(DENSE, experts={"a": GOLDEN / "qwen2_square"}), "different families",
    ),
    "statistics that are missing": (
        lambda m: moecc.open(DENSE, capture="nowhere"), "not a folder of statistics",
    ),
    "statistics that are needed": (
        lambda m: m.upcycle(experts=4, split="activation"), "needs statistics of the model",
    ),
    "an option that is misspelt": (lambda m: m.upcycle(expert=4), "did you mean 'experts'"),
    "an option of another type": (lambda m: m.upcycle(experts="x"), "a value of another type"),
    "an object as option": (lambda m: m.upcycle(experts=object()), "option experts cannot be used"),
    "options that contradict": (lambda m: m.upcycle(experts=4, top_k=5), "top-k does not suit"),
    "a number as pipeline": (lambda m: m.apply(4), "the pipeline cannot be used"),
    "a dictionary as pipeline": (lambda m: m.apply({"a": 1}), "the pipeline cannot be used"),
    "parentheses": (lambda m: m.apply("upcycle(experts=8)"), "options are in braces"),
    "commas": (lambda m: m.apply("upcycle{experts=8,top-k=2}"), "separated by blanks"),
    "commas and blanks": (lambda m: m.apply("upcycle{experts=8, top-k=2}"), "separated by blanks"),
    "a pass that is missing": (lambda m: m.apply("upcicle{experts=8}"), "did you mean 'upcycle'"),
    "sparse already": (lambda m: m.upcycle(experts=4).upcycle(experts=4), "it is sparse already"),
    "a type that is missing": (lambda m: m.params(dtype="f31"), "did you mean 'f32'"),
    "a type of integers": (lambda m: m.params(dtype=int), "unknown element type"),
    "a parameter that is missing": (lambda m: m.params()["lm_heat"], "no parameter 'lm_heat'"),
    "parameters of a preset": (
        lambda m: moecc.open("preset:smollm2-135m").params(), "has no weights",
    ),
    "inputs that are no mapping": (lambda m: m.run(3), "inputs are arrays by name"),  # type: ignore[arg-type]
    "an input that is missing": (lambda m: m.run({"token": np.zeros((1, 2))}), "did you mean"),
    "a backend that is missing": (lambda m: m.run(backend="tpu"), "unknown backend"),
    "a machine that is missing": (lambda m: m.plan("gpu:h1000:8"), "did you mean 'h100'"),
    "a number as machine": (lambda m: m.plan(8), "a machine is text"),  # type: ignore[arg-type]
    "an option of plan misspelt": (lambda m: m.plan("gpu:h100:8", meshh="a=8"), "mean 'mesh'"),
    "an option of plan of another type": (
        lambda m: m.plan("gpu:h100:8", batch_tokens="many"), "batch_tokens has another type",
    ),
    "a remat that is missing": (lambda m: m.plan("gpu:h100:8", remat="all"), "unknown remat"),
    "a target that is missing": (lambda m: m.prepare("mixtrall"), "unknown target"),
    "a number as target": (lambda m: m.prepare(3), "a family is text"),  # type: ignore[arg-type]
    "a target that cannot hold it": (
        lambda m: m.upcycle(experts=4, layers="every:2").prepare("mixtral", check=False),
        "mixtral has an expert layer at every depth",
    ),
    "a number to save to": (lambda m: m.save(3), "the source cannot be used"),  # type: ignore[arg-type]
    "a preset to save": (
        lambda m: moecc.open("preset:smollm2-135m").save("x"), "has no weights to convert",
    ),
    "a folder that is there": (lambda m: m.save(DENSE), "not empty"),
    "a tolerance of nothing": (lambda m: m.verify(DENSE, tolerance=0), "no number above 0"),
    "another vocabulary": (lambda m: m.verify(GOLDEN / "qwen2_square"), "different"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_moeccs_own_error(dense: moecc.Model, case: str) -> None:
    call, words = WRONG[case]
    with pytest.raises(MoeccError) as caught:
        call(dense)
    assert words in str(caught.value)


def test_a_missing_parameter_is_a_key_error_too(dense: moecc.Model) -> None:
    with pytest.raises(UnknownName):
        dense.params()["lm_heat"]
    assert dense.params().get("lm_heat") is None
