"""`moecc prove`: a folder against its source, a graph against a wrong one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from moecc.formats.manifest import MANIFEST_NAME, dump, file_records, load
from tests.support.commands import Moecc

from ..checkpoint.gguf.conftest import GgufBuilder, add_model  # noqa: TID252

GOLDEN = Path(__file__).parents[1] / "golden"

DENSE = GOLDEN / "llama_gqa"

IDLE_PASS = """
from dataclasses import dataclass
from typing import ClassVar

from moecc.rewrite.passes import Pass, PassResult, Preserves


@dataclass(frozen=True)
class IdlePass(Pass):
    name: ClassVar[str] = "idle"
    summary: ClassVar[str] = "leave the graph as it is"
    preserves = Preserves("exact")

    def apply(self, graph, ctx):
        return PassResult(changed=False)
"""


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


GATE_PASS = """
from dataclasses import dataclass
from typing import ClassVar

from moecc.rewrite import P, Rule, rewrite
from moecc.rewrite.passes import Pass, PassResult, Preserves

GATE = Rule("gate", P.silu(P.any("x")), lambda m, b: b.mul(m.value("x"), b.sigmoid(m.value("x"))))


@dataclass(frozen=True)
class GatePass(Pass):
    name: ClassVar[str] = "gate"
    summary: ClassVar[str] = "make silu of sigmoid"
    preserves = Preserves("reassociation")

    def apply(self, graph, ctx):
        return PassResult.of(rewrite(graph, [GATE], origin=self.name))
"""


def test_what_can_be_run_may_be_sampled(moecc: Moecc, tmp_path: Path) -> None:
    own, old, new = (tmp_path / name for name in ("gate.py", "old.moe", "new.moe"))
    own.write_text(GATE_PASS)
    moecc("import", DENSE, "-o", old)
    for has_weights in (True, False):
        if not has_weights:
            old.write_text(old.read_text().replace(str(DENSE), ""))
        moecc("opt", old, "--load", own, "-p", "gate", "-o", new, "--force")
        done = moecc("prove", old, new, "--load", own)
        assert (done.code, "not proved" in done.err) == (1, True), done.err
        hint = f"sampling may decide: moecc verify {new} --against {old} --load {own}"
        assert (hint in done.err) == ("sampling" in done.err) == has_weights


def test_a_step_has_other_inputs_and_is_not_sampled(moecc: Moecc, tmp_path: Path) -> None:
    old, new = tmp_path / "old.moe", tmp_path / "new.moe"
    moecc("import", GOLDEN / "llama_dynamic", "-o", old)
    moecc("opt", old, "-p", "decode", "-o", new)
    done = moecc("prove", old, new)
    assert (done.code, "not proved" in done.err, "sampling" in done.err) == (1, True, False)


def test_models_without_a_common_output_are_not_proved(moecc: Moecc, tmp_path: Path) -> None:
    done = moecc("prove", GOLDEN / "bert_gelu", DENSE)
    assert done.code == 1
    assert "outputs" in done.err
    graph = graph_of(moecc, tmp_path, "graph")
    more = tmp_path / "more.moe"
    more.write_text(graph.read_text().replace("  output ", "  output more = %norm\n  output ", 1))
    done = moecc("prove", graph, more)
    assert done.code == 0, done.err
    assert "outputs of both are compared alone: logits" in done.out


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


@pytest.mark.parametrize("options", [(), ("--exact",)])
@pytest.mark.parametrize(
    ("old", "new"),
    [("theta=500.0", "theta=600.0"), ('up_proj.weight" : f32', 'up_proj.weight" : bf16')],
)
def test_a_difference_shows_in_the_terms(
    moecc: Moecc, tmp_path: Path, old: str, new: str, options: tuple[str, ...]
) -> None:
    right, wrong = (graph_of(moecc, tmp_path, name) for name in ("right", "wrong"))
    wrong.write_text(wrong.read_text().replace(old, new, 1))
    done = moecc("prove", right, wrong, *options)
    assert f"not the same {'bits' if options else 'function'}: logits differs by" in done.err
    _, expected, found = done.err.splitlines()[-3:]
    assert (old.split()[-1] in expected, new.split()[-1] in found) == (True, True), done.err


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
    files = load(folder).files | file_records([receipt])
    (folder / MANIFEST_NAME).write_bytes(dump(replace(load(folder), files=files)))
    done = moecc("verify", folder, "--against", DENSE)
    assert done.code == 3
    assert "the proof of other graphs" in done.err


def test_heads_and_masks_of_encoders_are_compared(moecc: Moecc, tmp_path: Path) -> None:
    bert, sparse = GOLDEN / "bert_gelu", tmp_path / "sparse"
    words = ["-p", "upcycle{experts=4}", "--to", "st_moe", "--padding-mask"]
    assert moecc("convert", bert, sparse, *words).code == 0
    done = moecc("prove", bert, sparse)
    assert done.code == 0, done.err
    tuned = tmp_path / "tuned"
    shutil.copytree(bert, tuned)
    flip(tuned / "model.safetensors")  # its last tensor is of the pooler
    done = moecc("prove", bert, tuned, "--format", "json")
    assert done.json()["unmatched"] == ["pooler.dense.weight"]
    assert done.code == 1


def test_a_log_needs_a_proof(moecc: Moecc, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "proof.json"
    noise = ["-p", "upcycle{init=noise}", "--to", "mixtral", "--proof", log]
    done = moecc("convert", DENSE, out, *noise)
    assert (done.code, out.exists()) == (3, False)
    assert "relative noise" in done.err
    done = moecc("convert", DENSE, out, *noise, "--no-check")
    assert (done.code, out.exists()) == (2, False)


def test_a_program_is_proved(moecc: Moecc, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    words = ["-p", "upcycle{experts=4}", "--to", "st_moe", "--emit", "torch"]
    assert moecc("convert", DENSE, folder, *words).code == 0
    done = moecc("prove", DENSE, folder)
    assert done.code == 0, done.err
    (folder / MANIFEST_NAME).unlink()
    program = folder / "modeling_st_moe.py"
    program.write_text(program.read_text().replace("1e-05", "0.5"))
    done = moecc("prove", DENSE, folder)
    assert done.code == 3
    assert "the program is not that of the graph" in done.err


def test_a_conversion_that_cannot_be_planned_again_is_verified_all_the_same(
    moecc: Moecc,
    tmp_path: Path,
) -> None:
    folder, file = tmp_path / "sparse", tmp_path / "idle.py"
    file.write_text(IDLE_PASS)
    words = ["-p", "idle,upcycle{experts=4}", "--to", "mixtral", "--load", file]
    assert moecc("convert", DENSE, folder, *words).code == 0
    assert moecc("prove", DENSE, folder, "--load", file).code == 0
    done = moecc("verify", folder, "--against", DENSE)
    assert done.code == 0, done.err
    assert "not repeated: unknown pass 'idle', which --load FILE.py may add" in done.err
    assert "proved again" in moecc("verify", folder, "--against", DENSE, "--load", file).out
    done = moecc("prove", DENSE, folder)
    assert done.code == 0, done.err
    assert "not planned again: unknown pass 'idle', which --load FILE.py may add" in done.err


def test_a_pass_that_was_mended_proves_nothing_of_what_it_wrote(
    moecc: Moecc,
    tmp_path: Path,
) -> None:
    folder, file = tmp_path / "scaled", tmp_path / "idle.py"
    scale = """
        from moecc.weights.arithmetic import Scale
        for name, value in graph.params.items():
            if "down" in name:
                value.weight = Scale(value.weight, 2.0)
"""
    promise = IDLE_PASS.replace('"exact"', '"approximate", "it scales"')
    file.write_text(promise.replace(", ctx):\n", f", ctx):{scale}"))
    assert moecc("convert", DENSE, folder, "-p", "idle", "--load", file).code == 0
    file.write_text(IDLE_PASS)
    done = moecc("prove", DENSE, folder, "--load", file)
    assert done.code == 1
    assert "write other values today" in done.err


def test_a_proof_replaces_no_file_unasked(moecc: Moecc, tmp_path: Path) -> None:
    file = tmp_path / "proof.json"
    assert moecc("prove", DENSE, DENSE, "--proof", file).code == 0
    done = moecc("prove", DENSE, DENSE, "--proof", file)
    assert done.code == 1
    assert "the file exists" in done.err
    assert moecc("prove", DENSE, DENSE, "--proof", file, "--force").code == 0


def flip(file: Path) -> None:
    """Change one bit of the last values in a file of weights."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("made", ["copy", "sparse"])
def test_other_weights_under_the_same_names_are_not_proved(
    moecc: Moecc, sparse: Path, tmp_path: Path, made: str
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(DENSE, tuned)
    assert moecc("prove", DENSE, tuned).code == 0
    flip(tuned / "model.safetensors")
    done = moecc("prove", tuned, DENSE if made == "copy" else sparse, "--format", "json")
    assert done.code == 1
    assert done.json()["proof"]["verdict"] == "unknown"
    assert done.json()["unmatched"]
    assert f"no tensor of {tuned} has these values" in done.err


def test_an_edited_result_is_not_proved(moecc: Moecc, sparse: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(sparse, edited)
    flip(edited / "model.safetensors")
    for command in ("prove", DENSE, edited), ("verify", edited, "--against", DENSE):
        done = moecc(*command, *(["--tolerance", "9"] if command[0] == "verify" else []))
        assert done.code == 3
        assert "differ from what moecc wrote" in done.err


def test_a_result_that_was_forged_with_its_digests_is_not_proved(
    moecc: Moecc, sparse: Path, tmp_path: Path
) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(sparse, forged)
    file = forged / "model.safetensors"
    flip(file)
    manifest = load(forged)
    files = {**manifest.files, **file_records([file])}
    digests = {n: sha256(value.tobytes()).hexdigest() for n, value in load_file(file).items()}
    tensors = {n: replace(r, sha256=digests[n]) for n, r in manifest.tensors.items()}
    changed = replace(manifest, files=files, tensors=tensors)
    (forged / MANIFEST_NAME).write_bytes(dump(changed))
    assert moecc("verify", forged).code == 0
    done = moecc("prove", DENSE, forged)
    assert done.code == 1
    assert "write other values today" in done.err
    done = moecc("verify", forged, "--against", DENSE, "--tolerance", "9")
    assert "proved again" not in done.out


def test_a_mixture_that_another_program_made_is_proved_by_its_values(
    moecc: Moecc, sparse: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(sparse, foreign)
    (foreign / MANIFEST_NAME).unlink()
    # Each expert has the values of the dense layer; what its router says does not matter then.
    done = moecc("prove", DENSE, foreign)
    assert done.code == 0, done.err
    assert "tensors of the same values are the same" in done.out


def test_drawn_weights_refute_no_models_of_other_weights(
    moecc: Moecc, sparse: Path, tmp_path: Path
) -> None:
    same = tmp_path / "same.moe"
    assert moecc("import", DENSE, "-o", same).code == 0
    assert moecc("opt", same, "-p", "cse,upcycle{experts=4}", "-o", same, "--force").code == 0
    # One router is a tensor, and one is drawn; experts are copies, so that neither matters.
    assert moecc("prove", sparse, same).code == 0
    noisy = graph_of(moecc, tmp_path, "noisy", "upcycle{experts=4 init=noise}")
    assert moecc("prove", sparse, noisy).code == 1
    other = tmp_path / "other"
    shutil.copytree(DENSE, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert moecc("prove", DENSE, other).code == 3


def test_a_dense_model_of_copies_is_proved_by_their_values(
    moecc: Moecc, sparse: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    assert moecc("convert", sparse, dense, "-p", "to-dense", "--to", "llama").code == 0
    assert moecc("prove", sparse, dense).code == 0


def test_gguf_files_are_proved_both_ways(moecc: Moecc, tmp_path: Path) -> None:
    dense, sparse, folder = (tmp_path / name for name in ("dense.gguf", "sparse.gguf", "folder"))
    for source, out, words in (
        (DENSE, dense, ("-p", "", "--to", "gguf:llama")),
        (dense, sparse, ("-p", "upcycle{experts=4}", "--to", "gguf:llama")),
        (dense, folder, ("-p", "upcycle{experts=4}", "--to", "mixtral", "--dtype", "bf16")),
    ):
        assert moecc("convert", source, out, *words).code == 0
        done = moecc("prove", source, out)
        assert done.code == 0, done.err
        is_rounded = "weights are as before they were rounded to bf16" in done.out
        assert is_rounded == ("bf16" in words)
    done = moecc("verify", sparse, "--against", dense)
    assert "proved again" in done.out


def test_quantised_weights_are_not_proved(moecc: Moecc, tmp_path: Path) -> None:
    dense, blocks = tmp_path / "dense.gguf", tmp_path / "blocks.gguf"
    add_model(GgufBuilder(), hidden=32).write(dense)  # rows of a block of q8_0
    done = moecc("convert", dense, blocks, "-p", "", "--to", "gguf:llama", "--dtype", "q8_0")
    assert done.code == 0, done.err
    assert "the file is not proved: its weights are quantised" in done.out
    done = moecc("prove", dense, blocks)
    assert done.code == 1
    assert "the weights are rounded to blocks: nothing is proved" in done.err
    assert f"moecc verify {blocks} --against {dense}" in done.err
