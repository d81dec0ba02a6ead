"""Reading weights: every storage type, any rows, and the rotary order of Hugging Face."""

import sys

import numpy as np
import pytest

from moecc.errors import InputError, MachineError
from moecc.formats.gguf.reader import open_gguf
from moecc.formats.gguf.storage import BY_NAME, STORAGES
from tests.checkpoint.folders import needs_gguf

QUANTISED = [storage for storage in STORAGES.values() if storage.is_quantised]
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


def random_bytes(storage):
    """Return a maker of tensors: random blocks with small finite scales, different for each."""
    random = np.random.default_rng(storage.code)

    def make(name, shape):
        elements = int(np.prod(shape))
        if len(shape) == 1 or storage.name == "F32":
            return random.standard_normal(elements).astype("<f4").tobytes()
        if not storage.is_quantised:
            return random.standard_normal(elements).astype(storage.dtype.numpy).tobytes()
        return random_blocks(storage, elements, random).tobytes()

    return make


# Where the half-precision scales stand in a block, as ggml-common.h declares it.
SCALES = {
    "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2),
    "Q2_K": (80, 82), "Q3_K": (108,), "TQ1_0": (52,), "TQ2_0": (64,),
    "MXFP4": (), "NVFP4": (), "IQ1_M": (),
}  # fmt: skip


def random_blocks(storage, elements, random):
    blocks = random.integers(
        0, 256, (elements // storage.block, storage.block_bytes), dtype=np.uint8
    )
    for place in SCALES.get(storage.name, (0,)):
        scales = random.uniform(0.01, 0.1, len(blocks)).astype("<f2")
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def model(small_model, path, storage, **options):
    """Write a model in one storage type, with rows of whole blocks, and open it."""
    width = max(storage.block, 32)
    sizes = {"hidden": width, "mlp": 2 * width, "head_dim": width // 4, **options}
    builder = small_model(kind=storage.name, make=random_bytes(storage), **sizes)
    return open_gguf(builder.write(path / "x.gguf"))


@needs_gguf
@pytest.mark.parametrize("storage", QUANTISED, ids=lambda storage: storage.name)
def test_quantised_rows(storage, small_model, tmp_path):
    from gguf import GGMLQuantizationType, quants

    checkpoint = model(small_model, tmp_path, storage)
    info = checkpoint.tensors[UP_PROJ]
    assert (info.storage, info.dtype.name) == (storage.name, "f32")
    raw = np.fromfile(checkpoint.path, np.uint8, info.nbytes, offset=info.offset)
    kind = GGMLQuantizationType(storage.code)
    with np.errstate(all="ignore"):  # random scales may overflow
        expected = quants.dequantize(raw.reshape(info.shape[0], -1), kind)
    whole = checkpoint.read(UP_PROJ)
    assert whole.dtype == np.float32
    assert whole.shape == info.shape
    np.testing.assert_array_equal(whole, expected)
    assert len(np.unique(whole)) > 100
    for start, stop in ((0, 1), (3, 17), (info.shape[0] - 1, None), (5, 5)):
        np.testing.assert_array_equal(checkpoint.read(UP_PROJ, start, stop), whole[start:stop])


@needs_gguf
def test_pieces_do_not_show(small_model, tmp_path):
    from gguf import GGMLQuantizationType, quants

    checkpoint = model(small_model, tmp_path, BY_NAME["Q5_0"], vocab=5000)
    name = "model.embed_tokens.weight"
    info = checkpoint.tensors[name]
    raw = np.fromfile(checkpoint.path, np.uint8, info.nbytes, offset=info.offset)
    expected = quants.dequantize(raw, GGMLQuantizationType.Q5_0).reshape(info.shape)
    assert expected.size > 2 << 16
    np.testing.assert_array_equal(checkpoint.read(name), expected)


@pytest.fixture
def opened(small_model, tmp_path):
    return model(small_model, tmp_path, BY_NAME["Q4_1"])


def test_a_file_that_changed(opened):
    with opened.path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="changed while it was being read"):
        opened.read(UP_PROJ)


def test_without_the_package(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MachineError, match="pip install 'gguf>="):
        opened.read(UP_PROJ)
    assert opened.read("model.norm.weight").dtype == np.float32
