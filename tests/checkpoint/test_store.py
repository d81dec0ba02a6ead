"""Checkpoints in stores: a server of S3 and one with the hub's routes, both on this machine."""

import json
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from stores import GOLDEN, SECRETS, UPCYCLE, hub, said, store

from moecc.errors import InputError
from moecc.formats import store as store_module
from moecc.formats.open import open_checkpoint

from .folders import INDEX, WEIGHTS, index_of, read_json, write_json, write_raw

__all__ = ["hub", "store"]  # fixtures


@pytest.mark.parametrize("address", ["s3://bucket/tiny", "hf://org/tiny"])
def test_a_conversion_of_a_store_has_the_bytes_of_one_of_a_folder(
    address, store, hub, tmp_path, capsys
):
    near, far = tmp_path / "near", tmp_path / "far"
    assert said(capsys, "convert", str(GOLDEN / "llama_gqa"), near, *UPCYCLE)[0] == 0
    assert said(capsys, "convert", address, far, *UPCYCLE)[0] == 0
    assert (near / WEIGHTS).read_bytes() == (far / WEIGHTS).read_bytes()
    ours, theirs = (read_json(folder / "moecc_manifest.json") for folder in (near, far))
    assert ours["source_files"] == theirs["source_files"]
    for path in far.iterdir():
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values())


def test_a_revision_of_the_hub_is_read(hub, capsys):
    assert ": gemma2, " in said(capsys, "inspect", "hf://org/tiny@v2")[1]
    assert ": llama, " in said(capsys, "inspect", "hf:org/tiny")[1]
    for address in ("hf:org/tiny@v3", "hf://org/none"):
        code, text = said(capsys, "inspect", address)
        assert code == 1
        assert "the store has no such folder or file" in text
        assert "HF_TOKEN" in text


def sparse_model(folder, shards, shard_bytes):
    """Write a llama of `shards` files of zeros that take no room on the disk."""
    folder.mkdir(parents=True)
    hidden, inner, vocabulary = 8192, 28672, 32000
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,),
    }  # fmt: skip
    layers = round(shards * shard_bytes / (2 * sum(map(np.prod, layer.values()))))
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    files = [[] for _ in range(shards)]
    for n, name in enumerate(shapes):
        files[n * shards // len(shapes)].append(name)
    weight_map = {}
    for n, names in enumerate(files, 1):
        file, header, end = f"model-{n:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in names:
            start, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            weight_map[name] = file
        path = write_raw(folder / file, header)
        os.truncate(path, path.stat().st_size + end)
    write_json(folder / INDEX, index_of(weight_map))
    config = read_json(GOLDEN / "llama_gqa" / "config.json") | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": vocabulary, "tie_word_embeddings": True,
    }  # fmt: skip
    write_json(folder / "config.json", config)


def test_inspection_moves_headers_alone(hub, capsys):
    sparse_model(hub.root / "org" / "large" / "main", 7, 30_000_000_000 // 7)
    sizes = [path.stat().st_size for path in (hub.root / "org" / "large" / "main").iterdir()]
    assert sum(sizes) > 29_000_000_000
    for command in (["inspect"], ["lint"], ["plan", "--machine", "gpu:h100:16"]):
        hub.sent_bytes = 0
        code, text = said(capsys, command[0], "hf://org/large", *command[1:])
        assert code == 0, text
        assert hub.sent_bytes < 20_000_000


def test_a_gated_model_is_denied(hub, capsys):
    hub.gated.add("org/tiny")
    code, text = said(capsys, "inspect", "hf://org/tiny")
    assert code == 4
    assert text.count("the store denies access") == 1
    assert "hf auth login" in text


def test_a_cut_connection_leaves_nothing(
    hub, tmp_path, capsys,
    monkeypatch,
):  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's own attempts
    hub.cut_after = 2000
    code, text = said(capsys, "convert", "hf://org/tiny", tmp_path / "out", *UPCYCLE)
    assert code == 4
    assert text.count("error:") == 1
    assert "hf://org/tiny@" in text
    assert "/model.safetensors: cannot read it" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_source_that_changes_is_rejected(store, monkeypatch):
    store.put(str(GOLDEN / "llama_gqa"), "bucket/changing", recursive=True)
    with open_checkpoint("s3://bucket/changing") as checkpoint:
        checkpoint.require_unchanged()
        store.pipe("bucket/changing/config.json", b"{}")
        with pytest.raises(InputError, match=r"s3://bucket/changing/config\.json: the file ch"):
            checkpoint.require_unchanged()
        store.rm("bucket/changing/model.safetensors")
        with pytest.raises(InputError, match=r"model\.safetensors"):
            checkpoint.require_unchanged()


@pytest.mark.parametrize(("step", "is_database"), [("", True), ("1000/items/", False)])
def test_a_tree_of_a_jax_program_is_that_of_a_folder(
    step, is_database, store, tmp_path, monkeypatch,
    capsys,
):  # fmt: skip
    pytest.importorskip("orbax.checkpoint")
    from .trees.test_orbax import write

    folder, address = tmp_path / "tree", f"s3://bucket/tree-{is_database}"
    write("llama_llama3", folder / step, database=is_database)
    (folder / "config.json").write_bytes((GOLDEN / "llama_llama3/config.json").read_bytes())
    store.put(str(folder), address, recursive=True)
    store.pipe(f"{address}/900/items/_METADATA", b"an earlier step is not read")
    moved = []
    get_file = store_module.get_file
    monkeypatch.setattr(
        store_module, "get_file", lambda *words: [moved.append(str(words[1])), get_file(*words)]
    )
    with open_checkpoint(folder) as near, open_checkpoint(address) as far:
        assert {n: i.shape for n, i in far.tensors.items()} == {
            n: i.shape for n, i in near.tensors.items()
        }
        for name in near.tensors:
            np.testing.assert_array_equal(far.read(name), near.read(name))
    assert moved
    # A database holds the moments, too; arrays in folders of their own are moved as they are read.
    assert is_database or not any("opt_state" in file for file in moved)
    code, text = said(capsys, "convert", address, tmp_path / "out", *UPCYCLE)
    assert code == 0, text


def test_a_recipe_of_a_store_is_read_as_messages_name_it(store, tmp_path):
    from moecc.train.recipe_text import load_recipe, write_recipe

    recipe = load_recipe("recipe:upcycle", ["model.source=s3://bucket/tiny"])
    store.pipe_file("bucket/run/recipe.toml", write_recipe(recipe).encode())
    assert load_recipe("s3://bucket/run/recipe.toml") == recipe
    with pytest.raises(InputError, match=r"s3://bucket/run/recipes\.toml"):
        load_recipe("s3://bucket/run/recipes.toml")


def test_a_plan_of_a_store_is_read(store, tmp_path, capsys):
    from moecc.plan.step import read_plan

    plan = tmp_path / "plan.json"
    code, text = said(capsys, "plan", GOLDEN / "llama_gqa", "--machine", "cpu:2", "--save", plan)
    assert code == 0, text
    store.pipe_file("bucket/plans/plan.json", plan.read_bytes())
    assert read_plan("s3://bucket/plans/plan.json") == read_plan(str(plan))
    with pytest.raises(InputError, match=r"s3://bucket/plans/other\.json"):
        read_plan("s3://bucket/plans/other.json")


def test_a_gguf_file(store, tmp_path, capsys):
    file = tmp_path / "m.gguf"
    made = said(capsys, "convert", str(GOLDEN / "llama_gqa"), file, "--to", "gguf:llama")
    assert made[0] == 0, made[1]
    store.put(str(file), "bucket/files/m.gguf")
    assert (
        "s3://bucket/files/m.gguf: llama" in said(capsys, "inspect", "s3://bucket/files/m.gguf")[1]
    )


def test_a_store_that_denies_or_does_not_answer(store, capsys, monkeypatch):
    import fsspec

    fs = fsspec.get_filesystem_class("s3")
    fs.clear_instance_cache()
    for error, code, words in (
        (PermissionError(f"denied to {SECRETS['AWS_SECRET_ACCESS_KEY']}"), 4, "denies access"),
        (TimeoutError("http://u:pw@h/x?X-Amz-Signature=hf_sig"), 4, "is the store reachable"),
        (FileNotFoundError("bucket/tiny"), 1, "no such folder"),
    ):
        monkeypatch.setattr(fs, "ls", Mock(side_effect=error))
        actual, text = said(capsys, "inspect", "s3://bucket/tiny")
        assert actual == code
        assert words in text
        assert "hf_sig" not in text
        assert "u:pw" not in text
        assert text.count("error:") == 1


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3://key:password@b/x",
        "s3://bucket/x?versionId=1",
        "gs://b/../x",
        "s3://b/./x",
        "hf://x",
        "hf:x/y/../z",
    ],
)
def test_a_wrong_address_is_one_message(address, capsys):
    code, text = said(capsys, "inspect", address)
    assert code == 2
    assert "not an address in a store" in text
    assert "password" not in text


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")):
        monkeypatch.setattr("moecc.support.extras.find_spec", lambda name: None)
        monkeypatch.setattr("moecc.support.extras._is_missing", lambda name: True)
        code, text = said(capsys, "inspect", f"{scheme}://bucket/name")
        assert code == 4
        assert f"an address of {scheme}:// needs {package}" in text
        assert re.search(rf"pip install '({package.replace('_', '[-_]')}>=|moecc\[)", text)


def test_the_endpoint_of_the_hub_is_that_of_the_environment(hub, tmp_path):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "moecc", "inspect", "hf://org/tiny", "--format", "json"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=True)
    assert json.loads(done.stdout)["family"] == "llama"
