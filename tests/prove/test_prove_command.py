"""`moecc prove`: a folder against its source, a graph against a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Moecc

GOLDEN = Path(__file__).parents[1] / "golden"

DENSE = GOLDEN / "llama_gqa"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moecc.cli.main import main

    folder = tmp_path_factory.mktemp("prove") / "sparse"
    words = ["-p", "cse,upcycle{experts=4}", "--to", "mixtral", "--quiet"]
    assert main(["convert", str(DENSE), str(folder), *words]) == 0
    return folder


def graph_of(moecc: Moecc, tmp_path: Path, name: str, *words: str) -> Path:
    path = tmp_path / f"{name}.moe"
    assert moecc("import", DENSE, "-o", path).code == 0
    if words:
        assert moecc("opt", path, "-p", *words, "-o", path, "--force").code == 0
    return path


def test_a_converted_folder_is_proved(moecc: Moecc, sparse: Path) -> None:
    done = moecc("prove", DENSE, sparse, "--format", "json")
    assert done.code == 0, done.err
    proof = done.json()["proof"]
    assert proof["verdict"] == "proved"
    assert proof["lemmas"]["shares add up"] == 3
    assert done.json()["node"] == ""


def test_exact_is_more_than_equal(moecc: Moecc, sparse: Path) -> None:
    assert moecc("prove", DENSE, DENSE, "--exact").code == 0
    assert moecc("prove", DENSE, sparse, "--exact").code != 0


def test_a_wrong_constant_is_refuted(moecc: Moecc, tmp_path: Path) -> None:
    right, wrong = (graph_of(moecc, tmp_path, name) for name in ("right", "wrong"))
    wrong.write_text(wrong.read_text().replace("eps=1e-05", "eps=0.1", 1))
    done = moecc("prove", right, wrong)
    assert done.code == 3
    assert "rms_norm @layers.0" in done.err
    assert "logits differs by" in done.err


def test_a_pass_that_is_exact_is_proved_so(moecc: Moecc, tmp_path: Path) -> None:
    before, after = graph_of(moecc, tmp_path, "before"), graph_of(moecc, tmp_path, "after", "cse")
    assert moecc("prove", before, after, "--exact").code == 0


def test_verifying_against_the_source_proves_again(
    moecc: Moecc,
    sparse: Path,
    tmp_path: Path,
) -> None:
    done = moecc("verify", sparse, "--against", DENSE)
    assert done.code == 0, done.err
    assert "proved again" in done.out
    folder = tmp_path / "edited"
    shutil.copytree(sparse, folder)
    receipt = folder / "moecc_receipt.json"
    stated = json.loads(receipt.read_text())
    stated["proof"]["result"] = stated["proof"]["source"]
    receipt.write_text(json.dumps(stated))
    done = moecc("verify", folder, "--against", DENSE)
    assert done.code == 3
    assert "the proof of other graphs" in done.err


def test_a_conversion_that_cannot_be_planned_again_is_verified_all_the_same(
    moecc: Moecc,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "program"
    words = ["-p", "upcycle{experts=4}", "--to", "st_moe", "--emit", "torch"]
    assert moecc("convert", DENSE, folder, *words).code == 0
    done = moecc("verify", folder, "--against", DENSE)
    assert done.code == 0, done.err
    assert "the proof of the receipt was not repeated" in done.err


def test_a_proof_replaces_no_file_unasked(moecc: Moecc, tmp_path: Path) -> None:
    file = tmp_path / "proof.json"
    assert moecc("prove", DENSE, DENSE, "--proof", file).code == 0
    done = moecc("prove", DENSE, DENSE, "--proof", file)
    assert done.code == 1
    assert "the file exists" in done.err
    assert moecc("prove", DENSE, DENSE, "--proof", file, "--force").code == 0
