"""Files: manifests, values, names and what a folder holds."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moecc.formats.manifest import load

from .conftest import GOLDEN

UPCYCLE = ("-p", "upcycle{experts=4 top-k=2}", "--to", "mixtral")


@pytest.fixture
def written(moecc, dense, tmp_path):
    """A converted folder."""
    (dense / "LICENSE").write_text("mine")
    done = moecc("convert", dense, tmp_path / "out", *UPCYCLE)
    assert done.code == 0, done.err
    return tmp_path / "out"


def test_every_added_file_is_found(moecc, written):
    (written / ".gitattributes").write_text("")
    (written / ".git").mkdir()
    (written / ".git" / "HEAD").write_text("")
    (written / ".cache").mkdir()
    (written / ".cache" / "x").write_text("")
    assert moecc("verify", written).code == 0
    for name in ("modeling.py", "sub/.gitignore", "empty.json"):
        place = written / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("")
        done = moecc("verify", written)
        assert done.code == 3
        assert f"the file '{name}' is not in the manifest" in done.err
        place.unlink()
    os.symlink("/etc", written / "link")
    done = moecc("verify", written)
    assert done.code == 3
    assert "the file 'link' is not in the manifest" in done.err


def test_an_edited_card_is_found_unless_it_is_allowed(moecc, written):
    with (written / "README.md").open("a") as card:
        card.write("mine\n")
    assert moecc("verify", written).code == 3
    assert moecc("verify", written, "--allow-edited-card").code == 0


def test_noise_that_one_infinity_turns_to_nan_is_recorded(moecc, dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = np.inf
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    pipeline = "upcycle{experts=4 top-k=2 init=noise}"
    done = moecc(
        "convert", dense, tmp_path / "out", "-p", pipeline, "--to", "mixtral", "--allow-nonfinite"
    )
    assert done.code == 0, done.err
    found = load_file(tmp_path / "out" / "model.safetensors")
    bad = {n for n, array in found.items() if not np.isfinite(array).all()}
    assert any(np.isnan(found[n]).all() for n in bad)
    notes = "\n".join(load(tmp_path / "out").notes)
    assert all(f"written and not finite: {n}:" in notes for n in bad)
    assert done.err.count("warning: not finite:") == len(bad)


def test_logits_that_are_all_zero_are_no_agreement(moecc, dense, edit_tensors):
    edit_tensors(lambda t: t.update({"lm_head.weight": np.zeros_like(t["lm_head.weight"])}))
    done = moecc("verify", dense, "--against", dense)
    assert done.code == 3
    assert "are all 0, so comparing them says nothing" in done.err


def test_matrices_that_are_all_zero_are_named(moecc, dense, tmp_path, edit_tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(lambda t: t.update({name: np.zeros_like(t[name])}))
    done = moecc("convert", dense, tmp_path / "out", "-p", "upcycle{experts=4}", "--to", "mixtral")
    assert done.code == 0, done.err
    assert f"warning: all zero: {name}\n" in done.err
    assert done.err.count("all zero") == 1


def test_a_stored_graph_with_weight_expressions_is_not_read_without_them(moecc, dense, tmp_path):
    out = tmp_path / "out"
    assert moecc("convert", dense, out, "-p", "", "--to", "st_moe").code == 0
    config = json.loads((out / "config.json").read_text())
    (key,) = (k for k, v in config.items() if isinstance(v, list) and "moecc 1" in v)
    lines = config[key]
    at = next(i for i, line in enumerate(lines) if "param %model.norm.weight" in line)
    text = 'scale(source("model.norm.weight" : f32[embed=16]), 3.0) @'
    lines[at] = lines[at].replace(" @", f" = {text}")
    (out / "config.json").write_text(json.dumps(config))
    done = moecc("inspect", out)
    assert done.code == 1
    assert "%model.norm.weight" in done.err
    assert "reads each parameter from the tensor of its name" in done.err


def test_token_ids_out_of_range_are_reported(moecc, dense, tmp_path, edit_config):
    edit_config(bos_token_id=37)
    generation = {"eos_token_id": [2, 99999], "pad_token_id": -1}
    (dense / "generation_config.json").write_text(json.dumps(generation))
    words = {"a": 0, "b": 40}
    (dense / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    inspected = moecc("inspect", dense)
    converted = moecc("convert", dense, tmp_path / "out", *UPCYCLE)
    assert (inspected.code, converted.code) == (0, 0)
    for text in (inspected.out, converted.err):
        assert "config.json: bos_token_id 37 is no token of a vocabulary of 37" in text
        assert "generation_config.json: eos_token_id 99999" in text
        assert "generation_config.json: pad_token_id -1" in text
        assert "tokenizer.json: the token 40 has no row in the embedding of 37 rows" in text
    assert any("bos_token_id" in note for note in load(tmp_path / "out").notes)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["_METADATA", "manifest.ocdbt", "d/x"], "_METADATA"),
        (["_CHECKPOINT_METADATA"], "this is an Orbax checkpoint"),
        (["1.orbax-checkpoint-tmp/x"], "an Orbax checkpoint that was never completed"),
        (["checkpoint", "target.encoder.layers_0.mlp.wi.kernel/.zarray"], "msgpack file of T5X"),
        (["checkpoint_100/checkpoint"], "msgpack file of T5X"),
        (["100/_METADATA", "200/_METADATA"], "200/_METADATA"),
        (["latest_checkpointed_iteration.txt", "iter_0000100/x.distcp"], "Megatron-Bridge"),
        (["__0_0.distcp", "common.pt", "metadata.json"], "a checkpoint of Megatron"),
        (["mp_rank_00/model_optim_rng.pt"], "a checkpoint of Megatron"),
    ],
)
def test_checkpoints_of_other_frameworks_are_named(moecc, tmp_path, names, words):
    for name in names:
        place = tmp_path / "model" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")
    done = moecc("inspect", tmp_path / "model")
    assert done.code == 1
    assert words in done.err


def test_relative_names_are_taken_from_the_folder_of_the_file(moecc, dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graphs").mkdir()
    assert moecc("import", "dense", "-o", "graphs/a.moe").code == 0
    assert 'attr checkpoint = "../dense"' in Path("graphs/a.moe").read_text()
    # Another checkpoint stands where the working folder would have it.
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(GOLDEN / "llama_gqa", tmp_path / "elsewhere" / "dense")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    done = moecc("run", "../graphs/a.moe", "--outputs", "o.npy")
    assert done.code == 0, done.err
    assert "note: ../graphs/a.moe reads the weights of ../dense" in done.err
    done = moecc("opt", "../graphs/a.moe", "-p", "canonicalize")
    assert 'attr checkpoint = "../dense"' in done.out
    assert moecc("opt", "../graphs/a.moe", "-o", "../elsewhere/b.moe").code == 0
    assert 'attr checkpoint = "../dense"' in Path("../elsewhere/b.moe").read_text()
    assert moecc("verify", "../elsewhere/b.moe", "--against", "../dense").code == 0
