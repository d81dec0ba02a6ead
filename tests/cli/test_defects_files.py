"""Files: manifests, values, names and what a folder holds."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moecc.formats.manifest import load

from .conftest import LLAMA, edit_json, edited_tensors, read_json

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def written(cli, dense, out):
    """A converted folder."""
    (dense / "LICENSE").write_text("mine")
    cli.convert(dense, out)
    return out


def create(folder, *names):
    """Make empty files, and the folders that they are in."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_every_added_file_is_found(cli, written):
    create(written, ".gitattributes", ".git/HEAD", ".cache/x")
    cli("verify", written)
    for name in ("modeling.py", "sub/.gitignore", "empty.json"):
        create(written, name)
        cli("verify", written, code=3, says=f"the file '{name}' is not in the manifest")
        (written / name).unlink()
    os.symlink("/etc", written / "link")
    cli("verify", written, code=3, says="the file 'link' is not in the manifest")


def test_an_edited_card_is_found_unless_it_is_allowed(cli, written):
    with (written / "README.md").open("a") as card:
        card.write("mine\n")
    cli("verify", written, code=3)
    cli("verify", written, "--allow-edited-card")


def test_noise_that_one_infinity_turns_to_nan_is_recorded(cli, dense, out):
    with edited_tensors(dense) as tensors:
        tensors[UP][0, 0] = np.inf
    pipeline = "upcycle{experts=4 top-k=2 init=noise}"
    done = cli.convert(dense, out, "--allow-nonfinite", pipeline=pipeline)
    arrays = load_file(out / "model.safetensors").items()
    nonfinite = {name: array for name, array in arrays if not np.isfinite(array).all()}
    assert any(np.isnan(array).all() for array in nonfinite.values())
    notes = "\n".join(load(out).notes)
    assert all(f"written and not finite: {name}:" in notes for name in nonfinite)
    assert done.err.count("warning: not finite:") == len(nonfinite)


def test_logits_that_are_all_zero_are_no_agreement(cli, dense):
    with edited_tensors(dense) as tensors:
        tensors["lm_head.weight"][:] = 0
    says = "are all 0, so comparing them says nothing"
    cli("verify", dense, "--against", dense, code=3, says=says)


def test_matrices_that_are_all_zero_are_named(cli, dense, out):
    with edited_tensors(dense) as tensors:
        tensors[UP][:] = 0
    done = cli.convert(dense, out, says=f"warning: all zero: {UP}\n")
    assert done.err.count("all zero") == 1


def test_a_stored_graph_with_weight_expressions_is_not_read_without_them(cli, dense, out):
    cli.convert(dense, out, pipeline="", to="st_moe")
    config = read_json(out / "config.json")
    (key,) = (k for k, v in config.items() if isinstance(v, list) and "moecc 1" in v)
    lines = config[key]
    at = next(i for i, line in enumerate(lines) if "param %model.norm.weight" in line)
    text = 'scale(source("model.norm.weight" : f32[embed=16]), 3.0) @'
    lines[at] = lines[at].replace(" @", f" = {text}")
    (out / "config.json").write_text(json.dumps(config))
    says = ("%model.norm.weight", "reads each parameter from the tensor of its name")
    cli("inspect", out, code=1, says=says)


def test_token_ids_out_of_range_are_reported(cli, dense, out):
    edit_json(dense / "config.json", bos_token_id=37)
    generation = {"eos_token_id": [2, 99999], "pad_token_id": -1}
    (dense / "generation_config.json").write_text(json.dumps(generation))
    words = {"a": 0, "b": 40}
    (dense / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    for text in (cli("inspect", dense).out, cli.convert(dense, out).err):
        assert "config.json: bos_token_id 37 is no token of a vocabulary of 37" in text
        assert "generation_config.json: eos_token_id 99999" in text
        assert "generation_config.json: pad_token_id -1" in text
        assert "tokenizer.json: the token 40 has no row in the embedding of 37 rows" in text
    assert any("bos_token_id" in note for note in load(out).notes)


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
def test_checkpoints_of_other_frameworks_are_named(cli, tmp_path, names, words):
    create(tmp_path / "model", *names)
    cli("inspect", tmp_path / "model", code=1, says=words)


def test_relative_names_are_taken_from_the_folder_of_the_file(cli, dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("graphs", "elsewhere", "other"):
        (tmp_path / folder).mkdir()
    attribute = 'attr checkpoint = "../dense"'
    graph, moved = "../graphs/a.moe", "../elsewhere/b.moe"
    cli("import", "dense", "-o", "graphs/a.moe")
    assert attribute in Path("graphs/a.moe").read_text()
    # Another checkpoint stands where the working folder would have it.
    shutil.copytree(LLAMA, tmp_path / "elsewhere" / "dense")
    monkeypatch.chdir(tmp_path / "other")
    note = f"note: {graph} reads the weights of ../dense"
    cli("run", graph, "--outputs", "o.npy", says=note)
    assert attribute in cli("opt", graph, "-p", "canonicalize").out
    cli("opt", graph, "-o", moved)
    assert attribute in Path(moved).read_text()
    cli("verify", moved, "--against", "../dense")
