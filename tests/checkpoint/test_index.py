"""The index names the shards; whatever disagrees with it, or stands in for it, is reported."""

import json

import pytest

from .folders import INDEX, ONE, TWO, WEIGHTS, index_of, problem, problems


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("../model.safetensors", "climbs out"),
        ("a/../model.safetensors", "climbs out"),
        ("/etc/model.safetensors", "absolute path"),
        ("C:\\model.safetensors", "absolute path"),
        ("\\\\server\\share\\model.safetensors", "absolute path"),
        ("sub/model.safetensors", "folders in it"),
        ("sub\\model.safetensors", "folders in it"),
        ("model.safetensors\0", "control"),
        ("\ud800.safetensors", "control"),
        ("", "empty"),
        ("..", "climbs out"),
        ("model.SafeTensors", "does not end in .safetensors"),
        (None, "not a string"),
    ],
)
def test_an_index_can_name_only_files_of_its_folder(make_folder, file, what):
    folder = make_folder({ONE: {"a": 3}}, index_of({"a": ONE, "x.weight": file, "y": file}))
    text = problem(folder)
    assert "the file of the tensor 'x.weight' and 1 " in text
    assert what in text
    assert text.startswith(str(folder / INDEX))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "SHARD", "a": "SHARD"}}', "'a' appears twice"),
        ('{"weight_map": {"a": "SHARD", "b\\n": "SHARD"}}', "control"),
    ],
)
def test_a_broken_index_is_refused(make_folder, text, what):
    folder = make_folder({ONE: {"a": 3}})
    (folder / INDEX).write_text(text.replace("SHARD", ONE))
    assert what in problems(folder)[0]


@pytest.mark.parametrize(
    ("total", "what"),
    [
        ('"9"', "is not a size"),
        ("12.5", "is not a size"),
        ("-12", "is not a size"),
        ("true", "is not a size"),
        ("NaN", "NaN is not a JSON number"),
        ("13", "than the tensors have\n  expected: 12 bytes\n  found: 13 bytes"),
    ],
)
def test_a_wrong_total_size_is_refused(make_folder, total, what):
    folder = make_folder({ONE: {"a": 3}})
    text = json.dumps(index_of({"a": ONE}, "TOTAL")).replace('"TOTAL"', total)
    (folder / INDEX).write_text(text)
    assert what in problem(folder)


def test_index_and_shards_are_compared_and_all_is_reported(make_folder):
    weight_map = {"a": TWO, "both": ONE, "b": TWO, "ghost": ONE, "lost": "model-3.safetensors"}
    shards = {ONE: {"a": 3, "both": 1, "stray": 1}, TWO: {"b": 2, "both": 1}}
    folder = make_folder(shards, index_of(weight_map, 1))
    (folder / "config.json").write_text("{")
    reported = problems(folder)
    kinds = [
        "config.json:1:2: not JSON",
        "the shard 'model-3.safetensors' is missing",
        f"the tensor 'both' is in two shards\n  found: {ONE} and {TWO}",
        "the index puts the tensor 'a' into a shard that lacks it\n"
        f"  expected: it in '{TWO}'\n  found: it is in {ONE}",
        "the index puts the tensor 'ghost' into a shard that lacks it",
        f"the tensor 'stray' of {ONE} is not in the index",
    ]
    assert [kind for kind in kinds if not any(kind in text for text in reported)] == []
    assert len(reported) == len(kinds)


# Which files are the weights


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("pytorch_model-00001-of-00002.bin", "only as pickles", "convert it in a sandbox"),
        ("tf_model.h5", "only as pickles", "sandbox"),
        ("adapter_model.safetensors", "an adapter, not a model", "merge-adapter"),
        ("consolidated.safetensors", "Mistral's own layout", "convert them"),
        ("model.fp16.safetensors", "only variants of the weights", "rename"),
        ("smol.Q4_1.gguf", "holds GGUF files", "smol.Q4_1.gguf"),
        ("training_args.bin", "has no weights", ""),
        ("snapshots", "has no weights", "whose name is the revision"),
    ],
)
def test_a_folder_without_usable_weights_says_what_it_holds(make_folder, name, what, hint):
    folder = make_folder({WEIGHTS: {"a": 1}})
    (folder / WEIGHTS).rename(folder / name).write_bytes(b"")
    text = problem(folder)
    assert what in text
    assert hint in text


def test_an_adapter_alone_is_one_problem(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    assert "an adapter, not a model" in problem(tmp_path)


def test_leftover_shards_are_a_question(make_folder):
    other = "model-00001-of-00003.safetensors"
    folder = make_folder({ONE: {"a": 3}, other: {"a": 3}}, index_of({"a": ONE}))
    text = problem(folder)
    assert "shards that the index does not name" in text
    assert f"found: '{other}'" in text
