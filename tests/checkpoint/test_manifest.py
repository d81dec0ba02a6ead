import dataclasses
import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moecc.errors import CheckError, InputError
from moecc.formats import manifest as manifests
from moecc.formats.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TensorRecord,
    WeightFileRecord,
    dump,
    file_digest,
    file_records,
    load,
    verify_manifest,
    weight_file_record,
)

from .folders import ONE, TWO, WEIGHTS, write_json

SHARDS = (ONE, TWO)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
WORDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
PLAIN = st.from_regex(r"[a-z][a-z0-9_.]{0,8}", fullmatch=True).filter(lambda n: ".." not in n)
FILES = st.dictionaries(PLAIN, st.builds(FileRecord, st.integers(0, 1 << 60), DIGESTS), max_size=3)


@st.composite
def any_manifest(draw):
    weights = draw(
        st.dictionaries(PLAIN, st.builds(WeightFileRecord, st.integers(0, 1 << 60), DIGESTS))
    )
    record = st.builds(
        TensorRecord,
        DIGESTS,
        st.sampled_from(["bf16", "f8e4m3fn", "pred"]),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.sampled_from(sorted(weights) or [""]),
    )
    return Manifest(
        pipeline=draw(st.text()),
        seed=draw(st.integers()),
        source=draw(st.text()),
        source_files=draw(FILES),
        family_from="llama",
        family_to="mixtral",
        dtype="bf16",
        preserves=draw(st.text()),
        weights=weights,
        files=draw(FILES),
        tensors=draw(st.dictionaries(WORDS, record, max_size=4)) if weights else {},
        notes=tuple(draw(st.lists(st.text(), max_size=2))),
    )


@pytest.fixture
def written(tmp_path):
    """A small export with two shards and its manifest."""
    random_numbers = np.random.default_rng(0)
    tensors = {}
    for number, name in enumerate(SHARDS):
        arrays = {
            f"layers.{number}.{part}": random_numbers.standard_normal((3, 4)).astype(np.float16)
            for part in ("up", "down")
        }
        save_file(arrays, tmp_path / name, {"format": "pt"})
        for tensor, array in arrays.items():
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            tensors[tensor] = TensorRecord(digest, "f16", (3, 4), name)
    write_json(tmp_path / "config.json", {"model_type": "mixtral"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    names = ("config.json", "additional_chat_templates/tool.jinja")
    made = Manifest(
        pipeline="upcycle{experts=8 top-k=2}",
        seed=7,
        source="tiny",
        source_files={"model.safetensors": FileRecord(3, "0" * 64)},
        family_from="llama",
        family_to="mixtral",
        dtype="f16",
        preserves="reassociation",
        weights={name: weight_file_record(tmp_path / name) for name in SHARDS},
        files=file_records({name: tmp_path / name for name in names}),
        tensors=tensors,
    )
    (tmp_path / MANIFEST_NAME).write_bytes(dump(made))
    return tmp_path


def found(folder):
    return [str(problem) for problem in verify_manifest(folder)]


def test_digests_are_those_of_hashlib(tmp_path):
    data = random.Random(0).randbytes(9_000_001)  # more than two chunks
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    assert file_digest(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    records = file_records([tmp_path / "a", tmp_path / "b"])
    assert records["a"] == FileRecord(9_000_001, hashlib.sha256(data).hexdigest())
    assert records["b"] == FileRecord(0, hashlib.sha256(b"").hexdigest())


@given(made=any_manifest())
def test_a_manifest_is_read_back_as_written(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("manifest")
    (folder / MANIFEST_NAME).write_bytes(dump(made))
    assert load(folder) == made
    assert dump(load(folder)) == dump(made)


def test_the_card_of_an_earlier_manifest_is_not_compared(written):
    (written / "README.md").write_text("mine")
    assert "'README.md' is not in the manifest" in found(written)[0]
    (written / MANIFEST_NAME).write_bytes(dump(dataclasses.replace(load(written), schema=1)))
    assert found(written) == []


def test_every_bit_of_a_manifest_is_sealed(written):
    data = (written / MANIFEST_NAME).read_bytes()
    tail = range(8 * (len(data) - 80), 8 * len(data))
    for bit in [*range(0, 8 * len(data), 73), *tail[::9]]:  # each bit of a byte has its turn
        (written / MANIFEST_NAME).write_bytes(_flipped(data, bit))
        with pytest.raises(CheckError, match="its seal does not match"):
            load(written)


def _flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def test_another_type_of_the_same_size_is_named(written):
    arrays = {f"layers.1.{part}": np.zeros((3, 4), np.int16) for part in ("up", "down")}
    save_file(arrays, written / SHARDS[1], {"format": "pt"})
    assert "expected: f16 [3, 4]\n  found: i16 [3, 4]" in "\n".join(found(written))


def test_a_folder_without_a_manifest_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=f"no {MANIFEST_NAME}"):
        verify_manifest(tmp_path)


def test_tensors_that_were_trained_are_counted_with_a_way_out(tmp_path):
    weights = {f"w{n}": np.full(2, n, np.float32) for n in range(9)}
    save_file(weights, tmp_path / ONE)
    digest = {n: hashlib.sha256(x.tobytes()).hexdigest() for n, x in weights.items()}
    records = {n: TensorRecord(d, "f32", (2,), ONE) for n, d in digest.items()}
    files, others = manifests.folder_records(tmp_path, records)
    whole = Manifest(
        pipeline="", seed=0, source="a", source_files={}, family_from="llama", family_to="llama",
        dtype="f32", preserves="exact", weights=files, files=others, tensors=records,
    )  # fmt: skip
    (tmp_path / MANIFEST_NAME).write_bytes(dump(whole))
    assert verify_manifest(tmp_path) == []
    save_file({**weights, "w0": weights["w1"]}, tmp_path / ONE)
    (problem,) = verify_manifest(tmp_path)
    assert problem.hint is None
    save_file({n: x + 1 for n, x in weights.items()}, tmp_path / ONE)
    first, *_, last = verify_manifest(tmp_path)
    assert f"moecc verify {tmp_path} --against" in first.hint
    assert last.message == "6 more tensors differ so"


def test_a_manifest_of_another_schema_is_an_input_error(written):
    made = dataclasses.replace(load(written), schema=3)
    (written / MANIFEST_NAME).write_bytes(dump(made))
    with pytest.raises(InputError, match=r'expected: "schema": 1 or 2\n  found: 3'):
        verify_manifest(written)


def resealed(folder, change):
    """Change the document of a manifest, and seal it again as a forger would."""
    document = json.loads((folder / MANIFEST_NAME).read_bytes())
    del document["seal"]
    change(document)
    (folder / MANIFEST_NAME).write_bytes(manifests.seal(json.dumps(document)[:-1].encode()))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d.pop("pipeline"), "pipeline: a key is missing"),
        (lambda d: d.update(seed=True), "seed: "),
        (lambda d: d.update(surprise=1), "surprise: no such key"),
        (lambda d: d.update(notes=[1]), "notes.0: "),
        (lambda d: d["tensors"].update(x=1), "tensors.x: not a table"),
        (lambda d: d["tensors"]["layers.0.up"].update(dtype="key2"), "an element type of moecc"),
        (lambda d: d["tensors"]["layers.0.up"].update(shape="3"), "shape: not a list"),
        (lambda d: d["tensors"]["layers.0.up"].update(shape=[-3]), "shape.0: "),
        (lambda d: d["tensors"]["layers.0.up"].update(sha256="0" * 63), "64 hexadecimal digits"),
        (lambda d: d["tensors"]["layers.0.up"].update(sha256="G" * 64), "64 hexadecimal digits"),
        (lambda d: d["tensors"]["layers.0.up"].update(file="../x.safetensors"), "no weight file"),
        (lambda d: d["files"].update({"../x": d["files"]["config.json"]}), "file in the folder"),
        (lambda d: d["files"].update({"/etc/x": d["files"]["config.json"]}), "file in the folder"),
        (lambda d: d["weights"].update({"a\\b": d["weights"][SHARDS[0]]}), "file in the folder"),
        (lambda d: d["weights"][SHARDS[0]].update(size_bytes="1"), "a whole number"),
    ],
)
def test_a_forged_manifest_is_still_read_strictly(written, change, what):
    resealed(written, change)
    with pytest.raises(InputError) as caught:
        load(written)
    assert what in str(caught.value)


def test_a_link_out_of_the_folder_is_not_followed(written, tmp_path_factory):
    config = written / "config.json"
    config.symlink_to(config.rename(tmp_path_factory.mktemp("outside") / "config.json"))
    [problem] = found(written)
    assert "leaves its folder" in problem


def test_missing_and_extra_files_are_named(written):
    (written / SHARDS[0]).unlink()
    (written / "config.json").unlink()
    (written / WEIGHTS).write_bytes(b"")
    problems = found(written)
    assert len(problems) == 3  # of the tensors of a missing file there is none
    text = "\n".join(problems)
    assert f"the file '{SHARDS[0]}' is missing, with 2 tensors" in text
    assert "the file 'config.json' is missing" in text
    assert "the weight file 'model.safetensors' is not in the manifest" in text
