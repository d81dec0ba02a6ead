"""The checkpoint writer: what others read, the same bytes always, nothing bad unnoticed."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moecc.errors import InputError, MachineError
from moecc.formats import writer
from moecc.formats.safetensors import Entry, natural, plan_shards, read_header
from moecc.formats.writer import OutputTensor, WriteOptions, write_checkpoint
from moecc.types import BF16, DTYPES, F16, F32, I64, PRED, tensor
from moecc.weights.arithmetic import Add, Scale
from moecc.weights.draws import Normal
from moecc.weights.expr import Source
from moecc.weights.movement import Index, Permute, Slice, Tile
from tests.support.commands import files_of

W = Source("w", tensor(BF16, mlp=48, embed=40))
V = Source("v", tensor(F32, mlp=48, embed=40))
TABLE = Source("t", tensor(I64, token=7))
MASK = Source("m", tensor(PRED, token=7))
SCALAR = Source("s", tensor(F32))
EMPTY = Source("e", tensor(F32, token=0, embed=4))


class Reader:
    """Holds arrays, and counts how often each row is read."""

    def __init__(self, **more):
        rng = np.random.default_rng(0)
        self.arrays: dict[str, np.ndarray[Any, Any]] = {
            "w": rng.standard_normal((48, 40)).astype(np.float32).astype(BF16.numpy),
            "v": rng.standard_normal((48, 40)).astype(np.float32),
            "t": np.arange(7),
            "m": np.arange(7) % 2 == 0,
            "s": np.array(2.5, np.float32),
            "e": np.empty((0, 4), np.float32),
            **more,
        }
        self.rows: dict[str, int] = {}
        self.lock = threading.Lock()

    def __call__(self, name, start=0, stop=None):
        values = self.arrays[name]
        got = values[start:stop] if values.ndim else values
        with self.lock:
            self.rows[name] = self.rows.get(name, 0) + (len(got) if got.ndim else 1)
        return got


def experts(source, count=8):
    """Return copies, one tensor each, as an export asks for them."""
    tiled = Tile(source, "expert", count)
    return [
        OutputTensor(f"experts.{i}.{source.name}", Index(tiled, "expert", i), source.type.dtype)
        for i in range(count)
    ]


def everything():
    fused = Permute(Tile(V, "expert", 3, 1), ("expert", "embed", "mlp"))
    return [
        *experts(W),
        OutputTensor("layers.10.fused", fused, BF16),
        OutputTensor("layers.2.noise", Add(W, Normal(W.type.with_dtype(F32), 0.1, 7)), F16),
        OutputTensor("router", Normal(tensor(F32, expert=8, embed=40), 0.02, 5), F32),
        OutputTensor("table", TABLE, I64),
        OutputTensor("mask", MASK, PRED),
        OutputTensor("scalar", Scale(SCALAR, 2.0), F32),
        OutputTensor("empty", EMPTY, F32),
        OutputTensor("half", Slice(V, "mlp", 0, 24), DTYPES["f8e5m2"]),
    ]


def written(folder, tensors, **more):
    folder.mkdir()
    reader, metadata = more.pop("reader", Reader()), more.pop("metadata", None)
    return write_checkpoint(folder, tensors, reader, WriteOptions(**more), metadata=metadata)


def tensor_bytes(folder, report):
    """Return the bytes of each tensor, as our own strict header reader finds them."""
    found = {}
    for name in {t.file for t in report.tensors.values()}:
        data = (folder / name).read_bytes()
        for info in read_header(folder / name).tensors.values():
            found[info.name] = data[info.offset : info.offset + info.nbytes]
    return found


def test_the_safetensors_package_reads_what_was_written(tmp_path):
    reader = Reader()
    written(tmp_path / "out", everything(), metadata={"moecc": "0.1"}, reader=reader)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "moecc": "0.1"}
        assert set(file.keys()) == {t.name for t in everything()}
        assert file.get_tensor("experts.3.w").tobytes() == reader.arrays["w"].tobytes()
        turned = np.broadcast_to(reader.arrays["v"].T.astype(BF16.numpy), (3, 40, 48))
        assert file.get_tensor("layers.10.fused").tobytes() == turned.tobytes()
        assert file.get_tensor("table").tolist() == list(range(7))
        assert file.get_tensor("mask").tolist() == [True, False] * 3 + [True]
        assert file.get_tensor("scalar").shape == ()
        assert float(file.get_tensor("scalar")) == 5.0
        assert file.get_tensor("empty").shape == (0, 4)
        assert file.get_tensor("layers.2.noise").dtype == np.float16


def test_shards_have_an_index_and_keep_to_the_limit(tmp_path):
    report = written(tmp_path / "out", everything(), max_shard_bytes=9_000)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    count = len(names) - 1
    assert names[:-1] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.total_bytes
    assert index["weight_map"] == {name: t.file for name, t in report.tensors.items()}
    assert list(index["weight_map"]) == sorted(index["weight_map"], key=natural)
    for name in names[:-1]:
        with safe_open(tmp_path / "out" / name, "np") as file:
            held = list(file.keys())
        assert (tmp_path / "out" / name).stat().st_size <= 9_000 or len(held) == 1
    fused = report.tensors["layers.10.fused"]
    assert sum(t.file == fused.file for t in report.tensors.values()) == 1


@pytest.mark.parametrize("limit", [7_000, 10**9])
def test_threads_blocks_and_order_change_no_byte(tmp_path, limit, monkeypatch):
    seen = []
    for i, (threads, block, turn) in enumerate(
        ((1, 4 << 20, 1), (2, 4 << 20, -1), (4, 999, 1), (2, 64, -1))
    ):
        monkeypatch.setattr(writer, "BLOCK_BYTES", block)
        out = tmp_path / str(i)
        report = written(out, everything()[::turn], threads=threads, max_shard_bytes=limit)
        seen.append((files_of(out), report))
    assert all(other == seen[0] for other in seen[1:])


def broken():
    w = Reader().arrays["w"].copy()
    w[30, 7] = np.nan
    w[30, 8] = np.inf
    v = Reader().arrays["v"].copy()
    v[2, 1] = -np.inf
    return Reader(w=w, v=v, s=np.array(np.inf, np.float32))


@pytest.mark.parametrize("block", [1000, 4 << 20])
def test_values_that_are_not_finite_are_all_named(tmp_path, block, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", block)
    with pytest.raises(InputError) as caught:
        written(tmp_path / "out", everything(), reader=broken())
    found = [(p.where, p.found) for p in caught.value.problems]
    assert found == [
        ("tensor 's'", "inf at []"),
        ("tensor 'v'", "-inf at [2, 1]"),
        ("tensor 'w'", "nan at [30, 7]"),
    ]
    assert all("--allow-nonfinite" in str(p.hint) for p in caught.value.problems)


def test_values_that_are_not_finite_may_be_allowed(tmp_path):
    reader = broken()
    report = written(tmp_path / "out", everything(), reader=reader, allow_nonfinite=True)
    assert list(map(str, report.nonfinite)) == [
        "s: inf at []",
        "v: -inf at [2, 1]",
        "w: nan at [30, 7]",
    ]
    found = tensor_bytes(tmp_path / "out", report)
    assert found["experts.3.w"] == reader.arrays["w"].tobytes()


def test_overflows_are_all_named_with_the_rest(tmp_path):
    v = Reader().arrays["v"].copy()
    v[47, 39] = 1e5
    reader = Reader(v=v, s=np.array(np.nan, np.float32))
    tensors = [
        *(OutputTensor(f"copy.{i}", V, F16) for i in range(3)),
        OutputTensor("scaled", Scale(V, 1e35), F32),
        OutputTensor("fine", V, F32),
        OutputTensor("scalar", SCALAR, F32),
    ]
    with pytest.raises(InputError) as caught:
        written(tmp_path / "out", tensors, reader=reader)
    found = {(p.where, p.message) for p in caught.value.problems}
    assert found == {
        ("output tensor 'copy.0' and 2 more", "values overflow f16"),
        ("output tensor 'scaled'", "values overflow f32"),
        ("tensor 's'", "a weight is not finite"),
    }


@pytest.mark.parametrize(
    ("tensors", "messages"),
    [
        ([OutputTensor("a", W, BF16), OutputTensor("a", V, F32)], ["two tensors of one name"]),
        ([OutputTensor("", W, BF16), OutputTensor("a\x1b", W, BF16)], ["empty", "control"]),
        ([OutputTensor("__metadata__", W, BF16)], ["belongs to the format"]),
        ([OutputTensor("a", TABLE, F32), OutputTensor("b", MASK, F32)], ["floats", "floats"]),
    ],
)
def test_what_cannot_be_written_is_refused_before_reading(tmp_path, tensors, messages):
    reader = Reader()
    with pytest.raises(InputError) as caught:
        written(tmp_path / "out", tensors, reader=reader)
    assert len(caught.value.problems) == len(messages)
    assert all(m in p.message for m, p in zip(messages, caught.value.problems, strict=True))
    assert not reader.rows
    assert not files_of(tmp_path / "out")


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(MachineError, match="File exists"):
        write_checkpoint(tmp_path / "out", experts(W), Reader())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = written(tmp_path / "whole", everything())

    def pwrite(descriptor, data, at, real=os.pwrite):
        return int(real(descriptor, data[:777], at))

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert written(tmp_path / "short", everything()) == whole
    assert files_of(tmp_path / "short") == files_of(tmp_path / "whole")


_DTYPES = st.sampled_from([d for d in DTYPES.values() if d.safetensors])


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text("ab.019é", min_size=1, max_size=6),
        st.tuples(_DTYPES, st.lists(st.integers(0, 30), max_size=3)),
        max_size=12,
    ),
    st.integers(1, 5000),
)
def test_plans_of_shards(tensors, limit):
    entries = [Entry(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    shards = plan_shards(entries, limit, {"format": "pt"})
    assert shards == plan_shards(entries[::-1], limit, {"format": "pt"})
    assert sorted(n for s in shards for n in s.offsets) == sorted(tensors)
    by_name = {e.name: e for e in entries}
    for shard in shards:
        assert shard.size_bytes <= limit or len(shard.offsets) <= 1
        at = len(shard.header)
        assert at % 8 == 0
        for name, offset in shard.offsets.items():
            assert offset == at
            assert offset % by_name[name].dtype.itemsize_bytes == 0
            at += by_name[name].nbytes
        assert at == shard.size_bytes
