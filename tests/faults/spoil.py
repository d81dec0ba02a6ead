"""Cases that take more than a line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moecc.formats.manifest import check_manifest

from .place import DOWN, INDEX, ONE, Act, Allowed, Spoilt, framed


def twice(header: str, name: str) -> str:
    """Repeat a tensor with another type and the same offsets."""
    end = header.rstrip().removesuffix("}")
    return f'{end}, "{name}": {{"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}}}'


def aside_and_linked(folder: Path) -> None:
    shutil.move(folder / ONE, folder.parent / "elsewhere.safetensors")
    (folder / ONE).symlink_to(folder.parent / "elsewhere.safetensors")


def sparse_index(place: Spoilt) -> None:
    """Open an index of ten gigabytes, of which nothing is on disk."""
    place.shard()
    (place.model / INDEX).write_text("{}")
    os.truncate(place.model / INDEX, 10**10)
    place.open()


def large_recipe(place: Spoilt) -> None:
    from moecc.train.recipe_text import load_recipe

    (place.root / "r.toml").write_text("")
    os.truncate(place.root / "r.toml", 10**8)
    load_recipe(str(place.root / "r.toml"))


def of_every_type(place: Spoilt) -> None:
    """Write a tensor of each element type, and read its bytes back."""
    from moecc.formats.folder import SafetensorsFolder
    from moecc.formats.safetensors import read_header
    from moecc.types import BY_SAFETENSORS

    for name, dtype in BY_SAFETENSORS.items():
        data = bytes(range(2, 66)) if name != "BOOL" else bytes([0, 1] * 32)
        entry = {"dtype": name, "shape": [64 // dtype.itemsize_bytes], "data_offsets": [0, 64]}
        path = place.model / ONE
        path.write_bytes(framed(json.dumps({"x": entry}).encode(), data))
        with SafetensorsFolder(place.model, {}, {path: read_header(path)}, {}) as opened:
            assert opened.read("x").tobytes() == data, name


def by_template(kind: str) -> Act:
    """Store one matrix in another type of one byte: read it, or say what is found of it."""

    def act(place: Spoilt) -> None:
        from moecc.formats.folder import open_folder
        from moecc.model.open import open_model

        tensors = {n: t.tobytes() for n, t in place.tensors().items()}
        shapes = {n: t.shape for n, t in place.tensors().items()}
        values = place.tensors()[DOWN].astype(ml_dtypes.float8_e4m3fn)
        tensors[DOWN] = values.tobytes() if kind != "BOOL" else b"\2" * values.size
        at, entries = 0, {}
        for name, data in tensors.items():
            entries[name] = {
                "dtype": kind if name == DOWN else "F32", "shape": shapes[name],
                "data_offsets": [at, at := at + len(data)],
            }  # fmt: skip
        body = b"".join(tensors.values())
        (place.model / ONE).write_bytes(framed(json.dumps(entries).encode(), body))
        if kind == "BOOL":
            with open_folder(place.model) as opened:
                opened.read(DOWN)
        with open_model(str(place.model)) as model:
            raise Allowed("\n".join(model.warnings))

    return act


def flipped(place: Spoilt) -> None:
    out = place.convert()
    data = bytearray((out / ONE).read_bytes())
    data[-77] ^= 4
    (out / ONE).write_bytes(data)
    check_manifest(out)


def read_back(place: Spoilt) -> None:
    """Carry over the licence of a card, and a file of it."""
    card = "---\nlicense: other\nlicense_name: my-own\n---\n"
    (place.model / "README.md").write_text(card)
    (place.model / "LICENSE").write_text("not for sale")
    out = place.convert()
    assert (out / "LICENSE").read_text() == "not for sale"
    raise Allowed((out / "README.md").read_text())


def in_odd_places(place: Spoilt) -> None:
    """Keep the type of each tensor of a model that mixes them."""
    tensors = place.tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    place.save(tensors)
    place.convert()
    from safetensors.numpy import load_file

    found = load_file(place.root / "out" / ONE)
    assert found["model.norm.weight"].dtype == np.float16
    assert found["model.embed_tokens.weight"].dtype == np.float32


def fewer_descriptors(place: Spoilt) -> None:
    """Write and verify many shards with few descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, before[1]))
    try:
        check_manifest(place.convert("upcycle{experts=16 top-k=2}", max_shard_bytes=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list((place.root / "out").glob("*.safetensors"))) > 50


def locked_output(place: Spoilt) -> None:
    from moecc.formats.output import output_folder

    with output_folder(place.root / "out"):
        place.convert(force=True)


def into_itself(place: Spoilt) -> None:
    place.convert(out=place.model, force=True)


def into_input(place: Spoilt) -> None:
    place.convert(out=place.model / "inside")


def with_umask(place: Spoilt) -> None:
    """Write under two umasks, and say the modes of the files."""
    found = set()
    for mask in (0o077, 0o022, 0):
        before = os.umask(mask)
        try:
            out = place.convert(out=place.root / f"out{mask}")
        finally:
            os.umask(before)
        modes = {p.stat().st_mode & 0o777 for p in out.iterdir()}
        assert modes == {0o666 & ~mask}
        found |= modes
    raise Allowed(" ".join(map(oct, sorted(found))))


def missing_extra(place: Spoilt) -> None:
    """Read quantised blocks without the package that knows them."""
    from moecc.formats.gguf.storage import BY_NAME, dequantise

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.partition(".")[0] == "gguf"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "gguf", None)
        dequantise(np.zeros(144, np.uint8), BY_NAME["Q4_K"])
