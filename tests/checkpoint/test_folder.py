import errno
import json
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moecc.checkpoint.open import open_checkpoint
from moecc.errors import InputError, MachineError
from moecc.types.dtypes import BY_SAFETENSORS

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def problems(folder):
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return [str(problem) for problem in caught.value.problems]


def index_of(weight_map, total=None):
    return {"metadata": {} if total is None else {"total_size": total}, "weight_map": weight_map}


def test_a_single_file_is_read_by_rows(make_folder):
    folder = make_folder({"model.safetensors": {"a": 6, "b": 0}}, config={"model_type": "qwen2"})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.path == folder
        assert checkpoint.config == {"model_type": "qwen2"}
        assert list(checkpoint.tensors) == ["a", "b"]
        np.testing.assert_array_equal(checkpoint.read("a"), np.arange(6, dtype=np.float32))
        np.testing.assert_array_equal(checkpoint.read("a", 2, 5), [2, 3, 4])
        np.testing.assert_array_equal(checkpoint.read("a", 4), [4, 5])
        assert checkpoint.read("a", 3, 3).shape == (0,)
        assert checkpoint.read("b").shape == (0,)
        assert checkpoint.read("a").flags.writeable
        assert checkpoint.files() == [folder / "model.safetensors", folder / "config.json"]


def test_rows_beyond_a_tensor_are_a_mistake_of_the_caller(make_folder):
    with open_checkpoint(make_folder({"model.safetensors": {"a": 6}})) as checkpoint:
        for rows in ((-1, 2), (4, 3), (0, 7)):
            with pytest.raises(ValueError, match="which has 6"):
                checkpoint.read("a", *rows)


def test_an_unknown_tensor_is_answered_with_the_nearest_name(make_folder):
    folder = make_folder({"model.safetensors": {"model.norm.weight": 6}})
    with open_checkpoint(folder) as checkpoint, pytest.raises(InputError, match="did you mean"):
        checkpoint.read("model.nrom.weight")


def test_a_closed_checkpoint_reads_no_more(make_folder):
    with open_checkpoint(make_folder({"model.safetensors": {"a": 6}})) as checkpoint:
        checkpoint.read("a")
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("a")


@pytest.mark.parametrize("dtype", BY_SAFETENSORS.values(), ids=str)
def test_every_element_type_is_read_bit_by_bit(tmp_path, dtype):
    limit = 2 if dtype.kind == "bool" else 256
    data = np.random.default_rng(0).integers(0, limit, (5, 3 * dtype.itemsize_bytes), np.uint8)
    array = data.view(dtype.numpy)
    scalar = array[2, 1:2].reshape(())
    save_file({"x": array, "scalar": scalar}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["x"].dtype == dtype
        read = checkpoint.read("x", 1, 4)
        assert (read.dtype, read.shape) == (dtype.numpy, (3, 3))
        assert read.tobytes() == array[1:4].tobytes()
        assert checkpoint.read("scalar").shape == ()
        assert checkpoint.read("scalar").tobytes() == scalar.tobytes()
        with pytest.raises(ValueError, match="no axes"):
            checkpoint.read("scalar", 0, 1)


def test_bfloat16_and_float8_have_their_values(tmp_path):
    values = np.array([1.0, -2.5, 0.15625, 448.0])
    arrays = {
        name: values.astype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    }
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        for name in ("bfloat16", "float8_e4m3fn"):
            np.testing.assert_array_equal(checkpoint.read(name).astype(np.float64), values)
        np.testing.assert_array_equal(
            checkpoint.read("float8_e5m2").astype(np.float64), [1.0, -2.5, 0.15625, 448.0]
        )


def test_a_boolean_is_nought_or_one(tmp_path, write_raw):
    header = {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    write_raw(tmp_path / "model.safetensors", header, b"\0\1\2")
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a", 0, 2), [False, True])
        with pytest.raises(InputError, match=r"tensor 'a': .*other than 0 and 1\n  found: 0x02"):
            checkpoint.read("a")


def test_shards_are_read_together(make_folder):
    folder = make_folder({ONE: {"a": 3, "b": 2}, TWO: {"c": 4}})
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        assert checkpoint.tensors["c"].file == folder / TWO
        np.testing.assert_array_equal(checkpoint.read("c"), [0, 1, 2, 3])
        assert [file.name for file in checkpoint.files()] == [ONE, TWO, INDEX, "config.json"]


@pytest.mark.parametrize("total", [None, 36, 36.0])
def test_the_total_size_may_be_absent_or_a_whole_float(make_folder, total):
    index = index_of({"a": ONE, "b": ONE, "c": TWO}, total)
    folder = make_folder({ONE: {"a": 3, "b": 2}, TWO: {"c": 4}}, index=index)
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]


def test_an_index_may_lack_its_metadata(make_folder):
    folder = make_folder({ONE: {"a": 3}}, index={"weight_map": {"a": ONE}})
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_more_shards_than_descriptors(make_folder):
    shards = {f"model-{i:05}-of-00040.safetensors": {f"t{i}": i + 1} for i in range(1, 41)}
    folder = make_folder(shards)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with open_checkpoint(folder) as checkpoint:
        for _ in range(2):
            for i in range(1, 41):
                assert len(checkpoint.read(f"t{i}")) == i + 1
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) <= before + 16
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_at_the_same_time(make_folder):
    shards = {f"model-{i:05}-of-00040.safetensors": {f"t{i}": 100 + i} for i in range(1, 41)}
    wrong = []

    def work(checkpoint, offset):
        for step in range(200):
            i = (offset + step * 7) % 40 + 1
            if not np.array_equal(checkpoint.read(f"t{i}", 5), np.arange(5, 100 + i)):
                wrong.append(i)

    with open_checkpoint(make_folder(shards)) as checkpoint:
        threads = [threading.Thread(target=work, args=(checkpoint, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# What changes under a reader


def test_a_file_cut_after_opening_is_an_input_error(make_folder):
    folder = make_folder({"model.safetensors": {"a": 1000}})
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 2000)
        with pytest.raises(InputError, match="changed while it was being read"):
            checkpoint.read("a")


def test_a_file_replaced_after_opening_is_an_input_error(make_folder, write_tensors):
    folder = make_folder({"model.safetensors": {"a": 1000}})
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("a")
        write_tensors(folder / "new", {"a": 1000})
        os.replace(folder / "new", folder / "model.safetensors")
        with pytest.raises(InputError, match=r"model\.safetensors: the file changed"):
            checkpoint.read("a")


def test_a_file_rewritten_in_place_is_an_input_error(make_folder):
    folder = make_folder({"model.safetensors": {"a": 1000}})
    with open_checkpoint(folder) as checkpoint:
        file = folder / "model.safetensors"
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        with pytest.raises(InputError, match="changed while it was being read"):
            checkpoint.read("a")


def test_a_file_deleted_after_opening_is_an_input_error(make_folder):
    folder = make_folder({"model.safetensors": {"a": 1000}})
    with open_checkpoint(folder) as checkpoint:
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match="No such file"):
            checkpoint.read("a")


# The index


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("../model.safetensors", "climbs out"),
        ("a/../model.safetensors", "climbs out"),
        ("/etc/model.safetensors", "absolute path"),
        ("C:\\model.safetensors", "absolute path"),
        ("C:model.safetensors", "absolute path"),
        ("\\\\server\\share\\model.safetensors", "absolute path"),
        ("\\model.safetensors", "absolute path"),
        ("sub/model.safetensors", "folders in it"),
        ("./model.safetensors", "folders in it"),
        ("sub\\model.safetensors", "folders in it"),
        ("model.safetensors\0", "control"),
        ("model\n.safetensors", "control"),
        ("\ud800.safetensors", "control"),
        ("", "empty"),
        (".safetensors", "does not end in"),
        ("..", "climbs out"),
        ("model.bin", "does not end in .safetensors"),
        ("model.SafeTensors", "does not end in .safetensors"),
        (None, "not a string"),
        (3, "not a string"),
        (["model.safetensors"], "not a string"),
    ],
)
def test_an_index_can_name_only_files_of_its_folder(make_folder, file, what):
    folder = make_folder({ONE: {"a": 3}}, index=index_of({"a": ONE, "x.weight": file, "y": file}))
    [problem] = problems(folder)
    assert f"the file of the tensor 'x.weight' and 1 more {what}"[:40] in problem
    assert what in problem
    assert problem.startswith(str(folder / INDEX))


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
    [problem] = problems(folder)
    assert what in problem


def test_a_huge_index_is_not_read(make_folder):
    folder = make_folder({ONE: {"a": 3}})
    os.truncate(folder / INDEX, 10 << 30)  # sparse: takes no disk
    [problem] = problems(folder)
    assert "too large for its kind" in problem


def test_index_and_shards_are_compared_and_all_is_reported(make_folder):
    folder = make_folder(
        {ONE: {"a": 3, "both": 1, "stray": 1}, TWO: {"b": 2, "both": 1}},
        index=index_of(
            {"a": TWO, "both": ONE, "b": TWO, "ghost": ONE, "lost": "model-3.safetensors"}, 1
        ),
    )
    (folder / "config.json").write_text("{")
    found = problems(folder)
    kinds = [
        "config.json:1:2: not JSON",
        "the shard 'model-3.safetensors' is missing",
        f"the tensor 'both' is in two shards\n  found: {ONE} and {TWO}",
        "the index puts the tensor 'a' into a shard that lacks it\n"
        f"  expected: it in '{TWO}'\n  found: it is in {ONE}",
        "the index puts the tensor 'ghost' into a shard that lacks it",
        f"the tensor 'stray' of {ONE} is not in the index",
    ]
    assert [kind for kind in kinds if not any(kind in problem for problem in found)] == []
    assert len(found) == len(kinds)


def test_a_faulty_shard_is_reported_beside_the_rest(make_folder):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 2}})
    os.truncate(folder / ONE, (folder / ONE).stat().st_size - 1)
    (folder / TWO).write_bytes(b"\x80\x02" + bytes(50))
    (folder / "config.json").unlink()
    text = "\n".join(problems(folder))
    assert all(word in text for word in ("no config.json", "cut short", "a Python pickle"))


# Which files are the weights


def test_both_a_single_file_and_shards_is_a_question(make_folder):
    folder = make_folder({"model.safetensors": {"a": 3}, ONE: {"b": 3}}, index=index_of({"b": ONE}))
    [problem] = problems(folder)
    assert "more than one set of weights" in problem
    assert "move the set" in problem


def test_a_single_file_beside_shards_without_index_is_a_question(make_folder):
    folder = make_folder({"model.safetensors": {"a": 3}, ONE: {"b": 3}})
    (folder / INDEX).unlink()
    assert "more than one set of weights" in problems(folder)[0]


def test_leftover_shards_are_a_question(make_folder):
    other = "model-00001-of-00003.safetensors"
    folder = make_folder({ONE: {"a": 3}, other: {"a": 3}}, index=index_of({"a": ONE}))
    [problem] = problems(folder)
    assert "shards that the index does not name" in problem
    assert f"found: '{other}'" in problem


def test_shards_without_an_index_are_refused(make_folder):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 3}})
    (folder / INDEX).unlink()
    [problem] = problems(folder)
    assert f"shards but no {INDEX}" in problem


def test_other_layouts_and_variants_beside_the_weights_are_left_alone(make_folder):
    beside = {name: {"x": 1} for name in ("consolidated.safetensors", "model.fp16.safetensors")}
    folder = make_folder({ONE: {"a": 3}, **beside}, index=index_of({"a": ONE}))
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("pytorch_model.bin", "only as pickles", "unpickling runs code"),
        ("pytorch_model-00001-of-00002.bin", "only as pickles", "convert it in a sandbox"),
        ("tf_model.h5", "only as pickles", "sandbox"),
        ("adapter_model.safetensors", "an adapter, not a model", "merge it"),
        ("consolidated.safetensors", "Mistral's own layout", "convert them"),
        ("consolidated.00.pth", "only as pickles", "sandbox"),
        ("model.fp16.safetensors", "only variants of the weights", "rename"),
        ("smol.Q4_1.gguf", "holds GGUF files", "smol.Q4_1.gguf"),
        ("training_args.bin", "has no weights", ""),
        ("snapshots", "has no weights", "whose name is the revision"),
    ],
)
def test_a_folder_without_usable_weights_says_what_it_holds(make_folder, name, what, hint):
    folder = make_folder({"model.safetensors": {"a": 1}})
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"")
    [problem] = problems(folder)
    assert what in problem
    assert hint in problem


def test_an_empty_folder_is_refused(tmp_path):
    assert [p.split(": ", 1)[1].split("\n")[0] for p in problems(tmp_path)] == [
        "the folder has no config.json",
        "the folder is empty",
    ]


# Files that are not files


def test_a_fifo_never_blocks(make_folder):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 3}})
    (folder / ONE).unlink()
    os.mkfifo(folder / ONE)
    [problem] = problems(folder)
    assert "not a regular file" in problem
    assert "found: a FIFO" in problem


@pytest.mark.parametrize("name", ["config.json", INDEX, TWO, "tokenizer.json"])
def test_a_fifo_in_any_place_never_blocks(make_folder, name):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 3}})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: this is not a regular file" in problems(folder)[0]


def test_a_device_or_folder_is_no_shard(make_folder):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 3}})
    (folder / ONE).unlink()
    (folder / ONE).symlink_to("/dev/zero")
    (folder / TWO).unlink()
    (folder / TWO).mkdir()
    text = "\n".join(problems(folder))
    assert "found: a device" in text
    assert "found: a folder" in text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(make_folder, tmp_path, name):
    folder = make_folder({"model.safetensors": {"a": 3}})
    (folder / "tokenizer.json").write_text("{}")
    os.rename(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    [problem] = problems(folder)
    assert "a symbolic link that leaves its folder" in problem


def test_a_link_to_nothing_and_a_cycle_are_refused(make_folder):
    folder = make_folder({ONE: {"a": 3}, TWO: {"b": 3}})
    for name, target in ((ONE, "nothing"), (TWO, TWO)):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    assert len(problems(folder)) == 2


def test_a_link_inside_the_folder_is_fine(make_folder):
    folder = make_folder({"model.safetensors": {"a": 3}})
    os.rename(folder / "model.safetensors", folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.read("a")) == 3


def in_cache(make_folder, tmp_path, target):
    """A snapshot whose weights are a link to `target`, which is moved there."""
    made = make_folder({"model.safetensors": {"a": 3}})
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    os.rename(made, snapshot)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(snapshot / "model.safetensors", target)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(target, snapshot))
    return snapshot


def test_a_snapshot_of_the_hub_cache_links_to_its_own_blobs(make_folder, tmp_path):
    blob = tmp_path / "models--me--tiny" / "blobs" / "53aa"
    snapshot = in_cache(make_folder, tmp_path, blob)
    with open_checkpoint(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), [0, 1, 2])
    alias = tmp_path / "alias"
    alias.symlink_to(snapshot)
    with open_checkpoint(alias) as checkpoint:
        assert len(checkpoint.read("a")) == 3


@pytest.mark.parametrize("place", ["models--you--other/blobs", "blobs", "models--me--tiny/refs"])
def test_a_snapshot_may_not_link_elsewhere(make_folder, tmp_path, place):
    snapshot = in_cache(make_folder, tmp_path, tmp_path / place / "53aa")
    [problem] = problems(snapshot)
    assert "leaves its folder" in problem


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "preadv", "stat", "listdir"])
def test_what_the_system_refuses_is_the_machines_fault(make_folder, monkeypatch, call, code):
    folder = make_folder({"model.safetensors": {"a": 3}})

    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(MachineError) as caught:
            open_checkpoint(folder)
    assert os.strerror(code) in str(caught.value)
    assert str(folder) in str(caught.value)


# What an export copies


def test_companions_are_tokenizer_and_licence_never_code_or_pickles(make_folder):
    folder = make_folder({"model.safetensors": {"a": 3}})
    copied = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    left = [
        "LICENSE.py",
        "README.md",
        "additional_chat_templates/run.py",
        "generation_config.json.bak",
        "modeling_evil.py",
        "pytorch_model.bin",
        "tokenizer.pkl",
        "training_args.bin",
    ]
    (folder / "additional_chat_templates").mkdir()
    for name in copied + left:
        (folder / name).write_text(f"content of {name}")
    (folder / "LICENSES").mkdir()
    with open_checkpoint(folder) as checkpoint:
        companions = checkpoint.companions()
    assert sorted(companions) == copied
    assert companions["LICENSE"] == folder / "LICENSE"


def test_a_pickle_that_calls_itself_a_tokenizer_is_refused(make_folder):
    folder = make_folder({"model.safetensors": {"a": 3}})
    (folder / "tokenizer.model").write_bytes(b"\x80\x04\x95" + bytes(20))
    [problem] = problems(folder)
    assert "tokenizer.model" in problem
    assert "found: a Python pickle" in problem


def test_the_message_stays_short_when_everything_is_wrong(make_folder):
    index = index_of({f"t{i}": ONE for i in range(5000)})
    found = problems(make_folder({ONE: {"a": 3}}, index=index))
    assert len(found) == 201
    assert found[-1] == "and 4,801 more problems like these"


def test_the_config_may_be_any_strict_json_object(make_folder):
    config = {"model_type": "x", "rope_theta": 1e5, "nested": {"a": [1, None, True]}}
    with open_checkpoint(make_folder({"model.safetensors": {"a": 3}}, config=config)) as checkpoint:
        assert json.dumps(checkpoint.config) == json.dumps(config)
