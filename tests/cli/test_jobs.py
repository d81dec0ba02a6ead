"""A command is a plain function, from which the command line is derived."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moecc as package
from moecc.cli.commands import make_command
from moecc.errors import CheckError
from moecc.jobs.command import Report, Spelling
from moecc.jobs.compile import CompileOutcome, _work
from moecc.plan.step import ProgramConfig
from tests.train.tiny import masked_model


def test_a_checkpoint_is_converted_and_verified_without_a_command_line(dense, tmp_path):
    out = str(tmp_path / "sparse")
    done = package.convert(str(dense), out, pipeline="upcycle{experts=4 top-k=2}", to="mixtral")
    assert "written to" in str(done)
    assert done.data["family_to"] == "mixtral"
    assert "match the manifest" in str(package.verify(out))
    verdict = package.verify(out, against=str(dense), tolerance=0.0)
    assert isinstance(verdict.error, CheckError)
    assert verdict.data["passed"] is False


@pytest.mark.parametrize("fits", [True, False])
def test_an_exit_code_becomes_that_of_the_process(fits, cli, monkeypatch):
    asked: list[Any] = []

    def compile_in_subprocess(request: Any, seconds: float) -> CompileOutcome:
        asked.append((request, seconds))
        return CompileOutcome({"remarks": [], "fits": fits}, program="module")

    monkeypatch.setattr("moecc.jobs.compile.compile_in_subprocess", compile_in_subprocess)
    code = 0 if fits else 1
    by_function = package.compile(
        "preset:st-moe-base", machine="cpu:8", emit="hlo", config=ProgramConfig(via="ring")
    )
    assert by_function.exit_code == code
    words = ("--emit", "hlo", "--via", "ring", "--time-limit", "5")
    done = cli("compile", "preset:st-moe-base", "--machine", "cpu:8", *words, code=code)
    assert done.out == "module\n"
    (request, limit), (by_words, seconds) = asked
    assert request == by_words
    assert (by_words.emit, by_words.config.via, by_words.config.remat) == ("hlo", "ring", None)
    assert (limit, seconds) == (3600.0, 5.0)


def count(
    what: Annotated[str, Spelling("WHAT|-")],
    places: Sequence[str] = (),
    *,
    least: Annotated[int, Spelling("N", "n", low=1)] = 3,
    kind: Literal["sheep", "goats"] | None = None,
    tags: Annotated[Sequence[str], Spelling(help="Tag; may be repeated.")] = (),
    share: float = 0.5,
    is_loud: bool = False,
) -> Report:
    """Count animals.

    The long description.

    Args:
      what: Animals, or `-`
        for all.
      least: Least ``number``.

    Example:
      moecc count sheep
    """
    data = {"what": what, "places": list(places), "least": least, "kind": kind,
            "tags": list(tags), "share": share, "is_loud": is_loud}  # fmt: skip
    return Report("count", data, lambda: f"{least} {what}\x1b", exit_code=least - 3)


def test_a_signature_becomes_arguments_and_options(capsys):
    command = make_command("count", count)
    assert command.main(["x"], standalone_mode=False) in (None, 0)
    assert capsys.readouterr().out == "3 x\\x1b\n"
    words = "x here there -n 7 --kind goats --tags a --tags b --share 1 --is-loud --format json"
    assert command.main(words.split(), standalone_mode=False) == 4
    report = count("x", ("here", "there"), least=7, kind="goats", tags=("a", "b"), share=1.0,
                   is_loud=True)  # fmt: skip
    assert json.loads(capsys.readouterr().out) == report.to_json()
    assert report.to_json()["schema"] == "moecc.count/1"
    for wrong in (["x", "-n", "0"], ["x", "--kind", "cows"], []):
        with pytest.raises(Exception, match=r"not in the range|is not one of|Missing parameter"):
            command.main(wrong, standalone_mode=False)


@pytest.mark.parametrize(
    ("model", "opaque", "told"),
    [
        (50, {}, "50% of what is computed"),
        (169, {}, "more than is computed: attention skips blocks of masked scores"),
        (169, {"kernel": 2}, "more than the program shows"),
    ],
)
def test_the_share_of_the_model_is_no_more_than_all(model, opaque, told):
    data = {"memory": {}, "flops": 100, "model_flops": model, "predicted": {"flops": 100},
            "opaque": opaque, "unknown_loops": 0}  # fmt: skip
    text = "\n".join(_work(data))
    assert f"of the model alone {model}, {told}\n" in f"{text}\n"


def test_heads_are_compared_where_both_models_have_them(tmp_path):
    whole, other = masked_model(tmp_path / "whole"), masked_model(tmp_path / "other")
    arrays = load_file(whole / "model.safetensors")

    def verdict(model, against, **replaced):
        kept = arrays if replaced else {n: a for n, a in arrays.items() if n.startswith("bert.")}
        save_file(kept | replaced, other / "model.safetensors", metadata={"format": "pt"})
        return package.verify(str(model), against=str(against))

    same = verdict(other, whole, **arrays)
    assert same.data["outputs"] == {"hidden": 0.0, "head.logits": 0.0}
    assert "max |Δhead.logits| / max |head.logits|  0.00e+00" in str(same)
    wrong = verdict(other, whole, **{"cls.predictions.bias": np.full(384, 2, np.float32)})
    assert "the head.logits differ" in str(wrong.error)
    assert "not compared: cls.predictions.bias, " in str(verdict(other, whole))
    assert f"not compared: head.logits of {whole}" in str(verdict(whole, other))
