import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from moecc.errors import InputError
from moecc.formats.safetensors import read_header
from moecc.types import BY_SAFETENSORS

from .folders import problems, write_raw

SHARED_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@st.composite
def files(draw):
    """Tensors as name → (dtype, shape, bytes), with metadata."""
    tensors = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(sorted(BY_SAFETENSORS)))
        shape = draw(SHAPES)
        size = int(np.prod(shape)) * BY_SAFETENSORS[dtype].itemsize_bytes
        tensors[name] = (dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return tensors, draw(st.dictionaries(NAMES, st.text(max_size=5), max_size=2))


@SHARED_PATH
@given(content=files())
def test_what_the_safetensors_package_writes_is_read_the_same(tmp_path, content):
    tensors, metadata = content
    arrays = {
        name: np.frombuffer(data, BY_SAFETENSORS[dtype].numpy).reshape(shape)
        for name, (dtype, shape, data) in tensors.items()
    }
    file = tmp_path / "x.safetensors"
    file.write_bytes(save(arrays, metadata or None))
    header = read_header(file)
    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    whole = file.read_bytes()
    for name, (dtype, shape, data) in tensors.items():
        info = header.tensors[name]
        assert (info.name, info.file, info.storage) == (name, file, "")
        assert (info.dtype, info.shape) == (BY_SAFETENSORS[dtype], tuple(shape))
        assert whole[info.offset : info.offset + info.nbytes] == data


@settings(SHARED_PATH, max_examples=150)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_still_covers_its_bytes(tmp_path, data):
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", (2, 2), (0, 16)),
        "b.weight": entry("BF16", (3,), (16, 22)),
        "c": entry("BOOL", (), (22, 23)),
        "d": entry("I64", (0, 7), (23, 23)),
    }
    file = write_raw(tmp_path / "x.safetensors", header, bytes(23))
    mutated = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(mutated) - 1))
        mutated[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0-9"{}[],:.eN\\'))
    del mutated[data.draw(st.integers(len(mutated) - 30, len(mutated))) :]
    file.write_bytes(mutated)
    started = time.process_time()
    try:
        tensors = read_header(file).tensors.values()
    except InputError:
        tensors = None
    assert time.process_time() - started < 1
    if tensors is not None:
        spans = sorted((info.offset, info.offset + info.nbytes) for info in tensors)
        ends = [8 + struct.unpack("<Q", mutated[:8])[0], *(end for _, end in spans)]
        assert [begin for begin, _ in spans] == ends[:-1]
        assert ends[-1] == len(mutated)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"1234567", "too small to have a header"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header is too long"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header is too long"),
        (struct.pack("<Q", 3) + b"{}", "longer than the file"),
        (struct.pack("<Q", 0) + b"{}", "too short"),
        (struct.pack("<Q", 3) + b" {}", "byte 0x20"),
        (struct.pack("<Q", 5) + b"\xef\xbb\xbf{}", "byte 0xef"),
        (struct.pack("<Q", 4) + b"{}{}", ":1:3: not JSON"),
        (struct.pack("<Q", 4) + b"[{}]", "not a JSON object"),
        (struct.pack("<Q", 4) + b'{"\xff}', "not UTF-8"),
        (struct.pack("<Q", 2) + b"{}x", "1 bytes after the header belong to no tensor"),
        (b"\x80\x04\x95" + bytes(60), "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_a_wrong_start_is_named(tmp_path, content, what):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    [problem] = problems(file, read_header)
    assert what in problem
    assert problem.startswith(str(file))


def refusal(folder, header, size):
    """Return what is wrong with a header: short, and nothing in it moves a terminal's cursor."""
    text = "\n".join(problems(write_raw(folder / "x", header, bytes(size)), read_header))
    assert len(text) < 3000
    assert text.replace("\n", "").isprintable()
    return text


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (entry(offsets=(8, 0)), "offsets are not usable"),
        (entry(offsets=(-8, 0)), "offsets are not usable\n  expected: two whole"),
        (entry(offsets=(0, 8.0)), "found: 8.0"),
        (entry(offsets=(0, 8, 8)), "found: a list of 3 values"),
        (entry(offsets=(0, 1 << 63)), "found: 9223372036854775808"),
        (entry(shape=(3,)),
         "contradict each other\n  expected: 12 bytes for F32 [3]\n  found: 8 bytes"),
        (entry(shape=(-2,)), "shape is not usable"),
        (entry(shape=(True, 2)), "shape is not usable"),
        (entry(shape=[1] * 65), "shape is not usable"),
        (entry(shape=(1 << 32, 1 << 32)), "too many elements"),
        ({**entry(), "strides": [1]}, "an extra 'strides'"),
    ],
)  # fmt: skip
def test_a_hostile_tensor_of_eight_bytes_is_refused(tmp_path, tensor, expected):
    assert expected in refusal(tmp_path, {"a": tensor}, 8)


@pytest.mark.parametrize(
    ("header", "size", "expected"),
    [
        # offsets
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, ["'a' and 'b' overlap"]),
        ({"a": entry(shape=(6,), offsets=(0, 24)), "b": entry(offsets=(8, 16)),
          "c": entry(offsets=(16, 24))}, 24, ["'a' and 'b' overlap", "'a' and 'c' overlap"]),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20,
         ["a hole between the end of 'a' and the data of 'b'\n  found: bytes 8-12"]),
        ({"a": entry(offsets=(4, 12))}, 12, ["hole between the end of the header and"]),
        ({"a": entry()}, 9, ["1 bytes after the last tensor 'a' belong to no tensor"]),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, 15,
         ["cut short: the data of 1 tensor, the first of them 'b'"]),
        # shapes and element types
        ({"a": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))}, 0, ["too many elements"]),
        ({"a": entry("f32")}, 8, ["unknown", "did you mean 'F32'?"]),
        ({"a": entry("F4", (4,), (0, 2))}, 2, ["pack several elements into a byte"]),
        ({"a": entry("F8_E8M0", (2,), (0, 2))}, 2, ["does not compute with this element type"]),
        ({"a": entry(3)}, 8, ["unknown", "found: 3"]),
        # fields and names
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, ["wrong fields", "no data_offsets"]),
        ({"a": [1]}, 0, ["entry of the tensor is not an object"]),
        ({"": entry()}, 8, ["the name is empty"]),
        ({"a\u202eb": entry()}, 8, ["'a\\u202eb': the name has control"]),
        ({"\ud800": entry()}, 8, ["'\\ud800': the name has control"]),
        ({"n" * 65536: entry()}, 8, ["longer than 1,024 characters"]),
        ({"__metadata__": entry()}, 0, ["the metadata 'shape' is not a string",
                                        "the metadata 'data_offsets' is not a string"]),
        ({"__metadata__": []}, 0, ["the metadata is not an object"]),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused_and_the_place_named(tmp_path, header, size, expected):
    text = refusal(tmp_path, header, size)
    assert [part for part in expected if part not in text] == []


def test_all_problems_of_a_file_are_reported_at_once(tmp_path):
    header = {
        "a": entry("F31"),
        "b": entry(shape=(5,), offsets=(8, 16)),
        "c": entry(offsets=(12, 20)),
        "d": entry(offsets=(24, 32)),
        "e\x00": entry(offsets=(32, 40)),
        "__metadata__": {"format": 1},
    }
    reported = problems(write_raw(tmp_path / "x", header, bytes(39)), read_header)
    kinds = ["unknown", "contradict", "overlap", "hole", "control", "cut short", "not a string"]
    assert [kind for kind in kinds if not any(kind in text for text in reported)] == []
    assert len(reported) == len(kinds)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
        (lambda: b'{"a":"' + b"x" * (17 << 20) + b'"}', "far too long for its number"),
        (lambda: b'{"a":[' + b"{}," * (4 << 20) + b"{}]}", "too many JSON values"),
        (
            lambda: b"{" + b",".join([b'"a":{"data_offsets":[0,8]}'] * 200_000) + b"}",
            "'a' appears twice",
        ),
        (lambda: b'{"' + b"\\u202e" * (2 << 20) + b'":1}', "not an object"),
    ],
    ids=["deep", "long", "values", "same", "long-name"],
)  # fmt: skip
def test_headers_made_to_cost_time_are_refused_quickly(tmp_path, make, what):
    file = write_raw(tmp_path / "x.safetensors", make(), bytes(8))
    started = time.process_time()
    text = "".join(problems(file, read_header))
    assert time.process_time() - started < 2
    assert what in text
    assert len(text) < 3000
