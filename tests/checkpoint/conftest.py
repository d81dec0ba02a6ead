"""Checkpoints built by hand, byte by byte, so that each can be wrong in one place."""

import json
import struct

import pytest


def header_bytes(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.fixture(scope="session")
def write_raw():
    """Write a safetensors file from a header (JSON value or bytes) and a buffer."""

    def write(path, header, data=b""):
        path.write_bytes(header_bytes(header) + data)
        return path

    return write


@pytest.fixture(scope="session")
def write_tensors(write_raw):
    """Write f32 vectors of given lengths; element i of a tensor is i."""

    def write(path, lengths):
        header, data = {}, b""
        for name, length in lengths.items():
            begin = len(data)
            data += struct.pack(f"<{length}f", *range(length))
            header[name] = {"dtype": "F32", "shape": [length], "data_offsets": [begin, len(data)]}
        return write_raw(path, header, data)

    return write


@pytest.fixture
def make_folder(tmp_path, write_tensors):
    """Make a folder with config, shards and an index that fits them unless one is given."""

    def make(shards, *, index=None, config=None, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
        for file, lengths in shards.items():
            write_tensors(folder / file, lengths)
        if index is None and list(shards) != ["model.safetensors"]:
            total = 4 * sum(n for lengths in shards.values() for n in lengths.values())
            weight_map = {t: file for file, lengths in shards.items() for t in lengths}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if index:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make
