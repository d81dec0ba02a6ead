"""A catalogue of bad inputs: each with its exit code and words of its message.

Malformed containers, indices and configs stand with the tests of their formats, and wrong words of
a command with those of the API.
"""

import json
import os
import re
import resource
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moecc.errors import MoeccError
from moecc.formats.manifest import check_manifest

from .place import (
    DOWN,
    INDEX,
    ONE,
    SHARDS,
    UPCYCLE,
    Allowed,
    Spoilt,
    advised,
    converting,
    failing,
    framed,
    gguf,
    make_model,
    names,
    opening,
    patched,
    reader,
    recipe,
    tensors,
)


def sparse_index(place):
    """An index of ten gigabytes, of which nothing is on disk."""
    place.shard()
    (place.model / INDEX).write_text("{}")
    os.truncate(place.model / INDEX, 10**10)


def index_without_total(place):
    index = place.shard()
    del index["metadata"]
    (place.model / INDEX).write_text(json.dumps(index))


def emptied(place):
    shutil.rmtree(place.model)
    place.model.mkdir()


def large_recipe(place):
    from moecc.train.recipe_text import load_recipe

    (place.root / "r.toml").write_text("")
    os.truncate(place.root / "r.toml", 10**8)
    load_recipe(str(place.root / "r.toml"))


def of_every_type(place):
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


def by_template(kind):
    """Store one matrix in another type of one byte: read it, or say what is found of it."""

    def act(place):
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


def read_back(place):
    """Carry over the licence of a card, and a file of it."""
    card = "---\nlicense: other\nlicense_name: my-own\n---\n"
    (place.model / "README.md").write_text(card)
    (place.model / "LICENSE").write_text("not for sale")
    out = place.convert()
    assert (out / "LICENSE").read_text() == "not for sale"
    raise Allowed((out / "README.md").read_text())


def in_odd_places(place):
    """Keep the type of each tensor of a model that mixes them."""
    tensors = place.tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    place.save(tensors)
    place.convert()
    from safetensors.numpy import load_file

    found = load_file(place.root / "out" / ONE)
    assert found["model.norm.weight"].dtype == np.float16
    assert found["model.embed_tokens.weight"].dtype == np.float32


def fewer_descriptors(place):
    """Write and verify many shards with few descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, before[1]))
    try:
        check_manifest(place.convert("upcycle{experts=16 top-k=2}", max_shard_bytes=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(list((place.root / "out").glob("*.safetensors"))) > 50


def with_umask(place):
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


def convert_unchecked(place):
    out = place.root / "out"
    place.main("convert", place.model, out, "-p", UPCYCLE, "--to", "mixtral", "--no-check")


FAULTS = {
    # the container: headers, tensors, files
    "element types that are read, bit by bit": (0, "", of_every_type),
    "a boolean that is 2": (1, "bytes other than 0 and 1", by_template("BOOL")),
    "a file that is cut while it is read": (
        1, "changed while", reader(lambda p: os.truncate(p.model / ONE, 100)),
    ),
    "a file that is exchanged while it is read": (
        1, "changed while",
        reader(lambda p: os.replace(shutil.copy(p.model / ONE, p.root / "x"), p.model / ONE)),
    ),
    "one part of a split GGUF file": (
        1, r"one of 3 parts[^~]*--merge", gguf(lambda b: b.key("split.count", "u16", 3)),
    ),
    "a file of msgpack": (1, r"flax_model\.msgpack", names("flax_model.msgpack")),
    # the index and the folder
    "an index without a total": (0, "", opening(index_without_total)),
    "an index of ten gigabytes": (1, "too large", opening(sparse_index)),
    "more than one set of weights": (
        1, "more than one set", opening(lambda p: (p.model / SHARDS[0]).write_text("")),
    ),
    "an empty folder": (1, "is empty", opening(emptied)),
    "a folder that is mistyped": (1, "did you mean 'model'", lambda p: p.open(p.root / "modle")),
    "a name on the hub": (1, "on the hub", lambda p: p.open(Path("HuggingFaceTB/SmolLM2-135M"))),
    # the config, and what is asked of the model
    "a head that is not tied and not there": (
        1, "there is no output matrix", tensors(lambda t: t.pop("lm_head.weight")),
    ),
    "a misspelt key of a recipe": (1, "did you mean 'source'", recipe('[model]\nsorce = "x"\n')),
    "a key twice in a recipe": (1, "Cannot overwrite", recipe("a = 1\na = 2\n")),
    "a text for a number": (1, "another type", recipe('[optimizer]\nrate = "1e-3"\n')),
    "a recipe that is not UTF-8": (1, "UTF-8", recipe(b"a = '\xff'")),
    "a recipe of a hundred megabytes": (1, "too large", large_recipe),
    "virtual groups that are not whole": (
        2, "whole virtual groups", lambda p: p.convert("upcycle{experts=4 granularity=5}"),
    ),
    "one choice of an expert": (0, "router gets no gradient", advised("upcycle{top-k=1}")),
    "six experts": (0, "power of two", advised("upcycle{experts=6}")),
    "logits of zero": (0, "always chosen", advised("upcycle{router-init=zero}")),
    "a loss of no weight": (0, "no loss", advised("add-losses{balance-coef=0.0}")),
    "a licence of the source": (0, r"license: other\n[^~]*my-own|LICENSE", read_back),
    # the weights
    "weights that are zero": (0, "", converting(lambda t: t[DOWN].fill(0.0))),
    "weights that are tiny": (0, "", converting(lambda t: t[DOWN].fill(1e-40))),
    "several types in one model": (0, "", in_odd_places),
    "8-bit weights without scales": (0, "8-bit weights without scales", by_template("F8_E4M3")),
    # disk, memory, outputs
    "a disk that is full before": (
        4, "disk is too small",
        patched("shutil.disk_usage", lambda p: shutil._ntuple_diskusage(9, 8, 1), Spoilt.convert),
    ),
    "a disk that is full in the middle": (
        4, "No space left",
        patched("os.pwrite", failing(OSError(28, "No space left on device")), Spoilt.convert),
    ),
    "an output on a disk that is read": (
        4, "Read-only",
        patched("os.mkdir", failing(OSError(30, "Read-only file system")), Spoilt.convert),
    ),
    "an output without a right to it": (
        4, "no right to write", patched("os.access", lambda *a: False, Spoilt.convert),
    ),
    "a name that is too long": (1, "too long", lambda p: p.convert(out=p.root / ("a" * 300))),
    "too little memory": (
        4, "not enough memory",
        patched(
            "moecc.weights.evaluate.Evaluator.block", failing(MemoryError()), convert_unchecked
        ),
    ),
    "fewer descriptors than shards": (0, "", fewer_descriptors),
    "an output that is the input": (
        1, "the output is the input|not empty", lambda p: p.convert(out=p.model, force=True),
    ),
    "an output in the input": (
        1, "the output is inside the input", lambda p: p.convert(out=p.model / "inside"),
    ),
    "files follow the umask": (0, "0o6[04]0", with_umask),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = tmp_path_factory.mktemp("whole") / "model"
    make_model(made)
    return made


def ended(act, place, capsys):
    """Return exit code and message of a case, as the command line has them."""
    try:
        act(place)
    except MoeccError as error:
        return error.exit_code, str(error)
    except Allowed as said:
        return 0, str(said)
    except SystemExit as error:
        return int(error.code or 0), capsys.readouterr().err
    return 0, ""


@pytest.mark.parametrize(("code", "words", "act"), FAULTS.values(), ids=FAULTS)
def test_faults(code, words, act, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "model")
    found, text = ended(act, Spoilt(tmp_path), capsys)
    assert (found, bool(re.search(words, text))) == (code, True), text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    left = {p.name for p in tmp_path.iterdir() if "moecc" in p.name or p.name == "out"}
    assert not left or code == 0
