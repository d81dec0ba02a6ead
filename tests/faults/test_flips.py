"""Every flipped bit of an output is found, in every file, and every added or removed file."""

import random
import shutil

import pytest

from moecc.formats.manifest import verify_manifest

from .place import Spoilt, make_model

QUICK, WHOLE = 40, 200


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An output of several shards with companions, card, receipt and manifest."""
    place = Spoilt(tmp_path_factory.mktemp("flips"))
    make_model(place.model)
    (place.model / "LICENSE").write_text("mine")
    (place.model / "tokenizer.json").write_text("{}")
    return place.convert(max_shard_bytes=16_000)


@pytest.mark.parametrize("flips", [QUICK, pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_flipped_bits_are_found(written, flips):
    """The files are taken in turn, so that small ones, the card included, have their share."""
    rng = random.Random(0)
    files = sorted(p for p in written.rglob("*") if p.is_file())
    assert {"README.md", "moecc_receipt.json", "moecc_manifest.json"} <= {p.name for p in files}
    assert len(files) >= 8
    found = 0
    for number in range(flips):
        file = files[number % len(files)]
        before = file.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            found += bool(verify_manifest(written))
        finally:
            file.write_bytes(before)
    assert found == flips
    assert verify_manifest(written) == []


def test_added_and_removed_files_are_found(written, tmp_path):
    files = sorted(p for p in written.rglob("*") if p.is_file())
    for file in files:
        if file.name == "moecc_manifest.json":
            continue
        file.rename(tmp_path / "aside")
        assert any(file.name in str(p) for p in verify_manifest(written)), file
        (tmp_path / "aside").rename(file)
    for name in ("x.json", "model-00009-of-00009.safetensors", "sub/x", ".hidden"):
        added = written / name
        added.parent.mkdir(exist_ok=True)
        added.write_bytes(b"")
        assert any(name in str(p) for p in verify_manifest(written)), name
        added.unlink()
    shutil.rmtree(written / "sub")
    assert verify_manifest(written) == []
