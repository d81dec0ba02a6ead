"""A folder of safetensors is read as one checkpoint; what an export copies from it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from moecc.errors import InputError
from moecc.formats.open import open_checkpoint
from moecc.jobs.convert import write_companions
from moecc.types import BY_SAFETENSORS

from .folders import ONE, TWO, WEIGHTS, problem, write_json, write_tensors


@pytest.mark.parametrize("dtype", BY_SAFETENSORS.values(), ids=str)
def test_every_element_type_is_read_bit_by_bit(tmp_path, dtype):
    limit = 2 if dtype.kind == "bool" else 256
    data = np.random.default_rng(0).integers(0, limit, (5, 3 * dtype.itemsize_bytes), np.uint8)
    array = data.view(dtype.numpy)
    scalar = array[2, 1:2].reshape(())
    save_file({"x": array, "scalar": scalar}, tmp_path / WEIGHTS)
    write_json(tmp_path / "config.json", {})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["x"].dtype == dtype
        read = checkpoint.read("x", 1, 4)
        assert (read.dtype, read.shape) == (dtype.numpy, (3, 3))
        assert read.tobytes() == array[1:4].tobytes()
        assert checkpoint.read("scalar").shape == ()
        assert checkpoint.read("scalar").tobytes() == scalar.tobytes()
        with pytest.raises(ValueError, match="no axes"):
            checkpoint.read("scalar", 0, 1)


def test_threads_read_at_the_same_time(make_folder):
    shards = {f"model-{i:05}-of-00040.safetensors": {f"t{i}": 100 + i} for i in range(1, 41)}

    def read_all(offset):
        for step in range(200):
            i = (offset + step * 7) % 40 + 1
            np.testing.assert_array_equal(checkpoint.read(f"t{i}", 5), np.arange(5, 100 + i))

    with open_checkpoint(make_folder(shards)) as checkpoint, ThreadPoolExecutor(8) as threads:
        list(threads.map(read_all, range(8)))


# What changes under a reader


def test_a_file_replaced_after_opening_is_an_input_error(make_folder):
    folder = make_folder({WEIGHTS: {"a": 1000}})
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("a")
        write_tensors(folder / "new", {"a": 1000})
        os.replace(folder / "new", folder / WEIGHTS)
        with pytest.raises(InputError, match=r"model\.safetensors: the file changed"):
            checkpoint.read("a")


# What an export copies


def test_companions_are_tokenizer_and_licence_never_code_or_pickles(make_folder):
    folder = make_folder({WEIGHTS: {"a": 3}})
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


INPUTS = ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        (
            {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"},
            {"backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast",
             "model_input_names": INPUTS},
        ),
        (
            {"tokenizer_class": "TokenizersBackend", "model_input_names": [*INPUTS, "types"]},
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": [*INPUTS, "types"]},
        ),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["<a>"]},
            {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<a>"]},
        ),
        ({"tokenizer_class": "A", "extra_special_tokens": {"image_token": "<a>"}}, None),
        ([], None),
    ],
)  # fmt: skip
def test_settings_of_transformers_5_become_what_version_4_reads(
    make_folder, tmp_path, settings, written
):
    """Others are copied as they are, byte for byte."""
    folder = make_folder({WEIGHTS: {"a": 3}})
    file = folder / "tokenizer_config.json"
    write_json(file, settings)
    with open_checkpoint(folder) as checkpoint:
        write_companions(tmp_path / "out", checkpoint.companions())
    content = (tmp_path / "out" / file.name).read_bytes()
    if written is None:
        assert content == file.read_bytes()
    else:
        assert json.loads(content) == written


def test_a_pickle_that_calls_itself_a_tokenizer_is_refused(make_folder):
    folder = make_folder({WEIGHTS: {"a": 3}})
    (folder / "tokenizer.model").write_bytes(b"\x80\x04\x95" + bytes(20))
    text = problem(folder)
    assert "tokenizer.model" in text
    assert "found: a Python pickle" in text


@pytest.mark.parametrize("shards", [{WEIGHTS: {"a": 6}}, {ONE: {"a": 6}, TWO: {"b": 6}}])
def test_an_adapter_beside_the_weights_is_not_left_out_silently(make_folder, shards):
    folder = make_folder(shards)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    text = problem(folder)
    assert "a model and an adapter" in text
    assert "move adapter_config.json out" in text
