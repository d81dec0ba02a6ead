"""What the bounded header reader takes, and what it refuses within a second and little memory."""

import re
import struct
import time
import tracemalloc

import numpy as np
import pytest

from moecc.errors import InputError
from moecc.formats.gguf.header import (
    MAX_KEYS,
    MAX_STRINGS,
    MAX_TENSORS,
    GgufArray,
    read_gguf_header,
)

HUGE = 1 << 63
SECONDS = 1.0
MEGABYTES = 64


def refused(path):
    """Return the message, having checked what it cost; CPU time, because the machine is shared."""
    begin = time.process_time()
    with pytest.raises(InputError) as caught:
        read_gguf_header(path)
    assert time.process_time() - begin < SECONDS
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()
    return str(caught.value)


def key(name, code, body):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", code) + body


def preamble(tensors, keys, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def one_key(code, body):
    return preamble(0, 1) + key(b"a", code, body)


def one_array(code, count, values=b""):
    return one_key(9, struct.pack("<IQ", code, count) + values)


def one_tensor(axes):
    return preamble(1, 0) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", axes) + bytes(64)


def test_reads_every_kind_of_value(builder, tmp_path):
    numbers = {
        "u8": 200,
        "i8": -3,
        "u16": 60_000,
        "i16": -30_000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 1 << 63,
        "i64": -(1 << 62),
        "f64": 0.1,
    }
    for kind, value in numbers.items():
        builder.key(f"key.{kind}", kind, value)
    builder.key("key.bool", "bool", 1).key("key.string", "string", "größer ▁ 東")
    builder.array("array.string", "string", ["", "a", "▁b"]).array("array.f32", "f32", [0.5, 2])
    builder.tensor("t", (2, 3, 4))
    header = read_gguf_header(builder.write(tmp_path / "x.gguf"))

    assert {kind: header.metadata[f"key.{kind}"] for kind in numbers} == numbers
    assert header.metadata["key.bool"] is True
    assert header.metadata["key.string"] == "größer ▁ 東"
    strings, floats = header.metadata["array.string"], header.metadata["array.f32"]
    assert isinstance(strings, GgufArray)
    assert isinstance(floats, GgufArray)
    assert strings.strings() == ["", "a", "▁b"]
    assert floats.numbers().tolist() == [0.5, 2.0]
    with pytest.raises(InputError, match="wrong kind"):
        strings.numbers()
    with pytest.raises(InputError, match="wrong kind"):
        floats.strings()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_finds_the_data(builder, tmp_path, version, alignment):
    builder.alignment = alignment
    builder.key("general.alignment", "u32", alignment)
    values = {"a": np.arange(5, dtype=np.float32), "b": np.arange(6, dtype=np.float32)}
    for name, value in values.items():
        builder.tensor(name, value.shape, "F32", value.tobytes())
    path = builder.write(tmp_path / "x.gguf", version=version)
    header = read_gguf_header(path)
    assert header.version == version
    data = path.read_bytes()
    for name, value in values.items():
        tensor = header.tensors[name]
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == value.tobytes()


HOSTILE = {
    "empty": (b"", "ends in the middle of the preamble"),
    "magic": (b"\x80\x04\x95" + bytes(40), "not a GGUF file"),
    "older format": (b"tjgg" + bytes(40), "ggjt"),
    "version 1": (preamble(1, 1, 1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian"),
    "too many keys": (preamble(0, MAX_KEYS + 1) + bytes(MAX_KEYS * 16), "too many metadata keys"),
    "too many tensors": (
        preamble(MAX_TENSORS + 1, 0) + bytes(MAX_TENSORS * 40),
        "too many tensors",
    ),
    "key of 2^63": (preamble(0, 1) + struct.pack("<Q", HUGE) + bytes(16), "9,223,372,036,854,775"),
    "array of 2^63": (
        # The 49 bytes at which the package's own reader hangs.
        one_array(0, HUGE),
        "metadata key 'a'",
    ),
    "array of 2^61 u64": (one_array(10, 1 << 61), "metadata key 'a'"),
    "too many strings": (
        one_array(8, MAX_STRINGS + 1, bytes(8 * MAX_STRINGS + 8)),
        "too many strings",
    ),
    "string in an array": (
        one_array(8, 2, struct.pack("<Q", HUGE) + bytes(16)),
        "metadata key 'a'",
    ),
    "nested arrays": (one_key(9, struct.pack("<IQ", 9, 1) * 2000), "arrays of arrays"),
    "type of a value": (one_key(13, bytes(16)), "unknown type of a value"),
    "type of an array": (one_array(77, 1, bytes(16)), "unknown type of an array"),
    "key not UTF-8": (preamble(0, 1) + key(b"\xff\xfe", 4, bytes(4)), "byte 0xff at 32"),
    "a million axes": (one_tensor(10**6), "wrong number of axes"),
    "no axes": (one_tensor(0), "wrong number of axes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_at_little_cost(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((0, 32), "F32", "the shape is not usable"),
        ((HUGE, 2), "F32", "the shape is not usable"),
        ((1 << 40, 1 << 40), "F32", "the shape is not usable"),
        ((2, 33), "Q4_1", "multiple of 32 elements, the block of Q4_1"),
        ((2, 128), "Q6_K", "multiple of 256 elements, the block of Q6_K"),
        ((64,), "Q8_0", "a vector is quantised"),
        ((2, 32), 77, "the unknown type 77"),
        ((1, 256), "Q8_K", "found: Q8_K (type 15)"),
        ((1 << 40, 32), "F32", "end beyond the end of the file"),
    ],
)
def test_refuses_a_tensor(shape, kind, message, builder, tmp_path):
    builder.tensor("good", (4, 32)).tensor("odd", shape, kind, b"")
    text = refused(builder.write(tmp_path / "x.gguf"))
    assert message in text
    assert "'odd'" in text


@pytest.mark.parametrize("value", [0, 3, 48, 1 << 17, 1 << 30])
def test_refuses_an_alignment(value, builder, tmp_path):
    builder.key("general.alignment", "u32", value).tensor("t", (1,))
    assert "power of two" in refused(builder.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("offset", [1, 33, HUGE])
def test_refuses_an_offset(offset, builder, tmp_path):
    builder.tensor("t", (8,), "F32", offset=offset)
    assert re.search("offset is not usable|beyond", refused(builder.write(tmp_path / "x")))


def test_every_truncation_is_refused(small_model, tmp_path):
    data = small_model(layers=1, hidden=8, head_dim=2, mlp=8, vocab=4).build()
    path = tmp_path / "x.gguf"
    for length in range(0, len(data), 11):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"in the middle of|beyond the end|too many"):
            read_gguf_header(path)


def test_tells_all_problems_at_once(builder, tmp_path):
    builder.key("twice", "u32", 1).key("twice", "u32", 2).key("flag", "bool", 7)
    builder.key("general.alignment", "u32", 3)
    builder.tensor("a", (2, 33), "Q4_0", b"").tensor("a", (4,)).tensor("\x1b[31m", (4,))
    builder.tensor("b", (4,), 99)
    text = refused(builder.write(tmp_path / "x.gguf"))
    for part in (
        "appears twice",
        "neither true nor false",
        "alignment",
        "whole blocks",
        "two tensors have this name",
        "invisible characters",
        "unknown type 99",
    ):
        assert part in text
    assert "\x1b" not in text
