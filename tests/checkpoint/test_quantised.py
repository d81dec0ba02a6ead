"""Quantised folders: what is read is what the libraries that wrote them compute with.

The files in ``quantised/`` are made by ``make_quantised.py``.
"""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moecc.errors import InputError
from moecc.formats.open import open_checkpoint

from .folders import WEIGHTS, problems, write_json, write_raw

FILES = Path(__file__).parent / "quantised"
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
COMPRESSED = {"quant_method": "compressed-tensors"}
CASES = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "mxfp4": {"quant_method": "mxfp4"},
    "nf4": BITSANDBYTES,
    "nf4_nested": BITSANDBYTES,
    "fp4_nested": BITSANDBYTES,
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True},
    "gptq_shuffled": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    "gptq_8": {"quant_method": "gptq", "bits": 8, "group_size": 16},
    "nvfp4": COMPRESSED,
    "mxfp4_packed": COMPRESSED,
    "int4_packed": COMPRESSED,
    "int4_zeros": COMPRESSED,
    "int8_packed": COMPRESSED,
    "int8_rows": COMPRESSED,
}
HALVES = {"awq", "gptq", "gptq_shuffled", "gptq_8"}
"""Libraries that round each element to float16; moecc has the exact product, in float32."""


def write(folder, source, options):
    """Write a checkpoint of the stored parts of a matrix, or of the file that has them."""
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": options})
    if isinstance(source, dict):
        save_file(source, folder / WEIGHTS)
    else:
        shutil.copy(source, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_matrix_is_what_the_library_says(case, tmp_path):
    expected = np.load(FILES / f"{case}.npy")
    folder = write(tmp_path, FILES / f"{case}.safetensors", CASES[case])
    with open_checkpoint(folder) as checkpoint:
        (name,) = checkpoint.tensors
        info = checkpoint.tensors[name]
        assert (name, info.shape, info.dtype.name) == (info.name, expected.shape, "f32")
        assert "quantization_config" not in checkpoint.config
        assert "quantised" in checkpoint.remarks()[0]
        found = checkpoint.read(name)
        rounded = found.astype(np.float16) if case in HALVES else found
        np.testing.assert_array_equal(rounded, expected)
        # Pieces that begin and end within blocks, groups and bytes.
        for start, stop in ((0, 1), (1, len(expected)), (len(expected) // 2, len(expected) - 1)):
            np.testing.assert_array_equal(checkpoint.read(name, start, stop), found[start:stop])
        with pytest.raises(ValueError, match="rows"):
            checkpoint.read(name, 0, len(expected) + 1)


def test_matrices_of_eight_bits_may_lie_along_several_axes(tmp_path):
    values = np.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8).astype(ml_dtypes.float8_e4m3fn)
    scales = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 2, 2)
    parts = {"e.weight": values, "e.weight_scale_inv": scales}
    options = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    with open_checkpoint(write(tmp_path, parts, options)) as checkpoint:
        expected = values.astype(np.float32) * scales.repeat(2, 2).repeat(4, 3)
        np.testing.assert_array_equal(checkpoint.read("e.weight"), expected)
        np.testing.assert_array_equal(checkpoint.read("e.weight", 1, 2), expected[1:])


def test_blocks_at_the_edge_may_be_smaller(tmp_path):
    weight = np.arange(35, dtype=np.uint8).reshape(5, 7).view(ml_dtypes.float8_e4m3fn)
    scale = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    parts = {"m.weight": weight, "m.weight_scale_inv": scale}
    options = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    expected = weight.astype(np.float32) * np.kron(scale, np.ones((2, 4), np.float32))[:5, :7]
    with open_checkpoint(write(tmp_path, parts, options)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("m.weight"), expected)
        np.testing.assert_array_equal(checkpoint.read("m.weight", 3, 5), expected[3:])


def test_modelopt_multiplies_by_the_scale_that_others_divide_by(tmp_path):
    options = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    write(tmp_path, FILES / "nvfp4.safetensors", options)
    data = (tmp_path / WEIGHTS).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = data[8:size].replace(b"weight_packed", b"weight")
    header = header.replace(b"weight_global_scale", b"weight_scale_2")
    write_raw(tmp_path / WEIGHTS, header, data[size:])
    with open_checkpoint(tmp_path) as checkpoint:
        expected = np.load(FILES / "nvfp4.npy") * np.float32(500) ** 2
        np.testing.assert_allclose(checkpoint.read("m.weight"), expected, rtol=3e-7)


WORDS = np.zeros((8, 16), np.int32)
SCALES = np.ones((4, 16), np.float16)
GPTQ = CASES["gptq"]


@pytest.mark.parametrize(
    ("parts", "options", "expected"),
    [
        ({"m.qweight": WORDS}, {"quant_method": "hqq"}, ["quant_method", "one of", "fp8", '"hqq"']),
        (
            {"m.qweight": WORDS},
            GPTQ,
            ["lacks its part 'm.qzeros'", "lacks its part 'm.scales'"],
        ),
        (
            {"m.qweight": WORDS, "m.scales": SCALES[:3], "m.qzeros": WORDS[:4, :1]},
            GPTQ,
            ["'m.scales'", "[4, 16] of f32 or f16", "[3, 16] of f16", "[4, 2] of i32"],
        ),
        (
            {
                "m.weight_packed": WORDS,
                "m.weight_scale": SCALES,
                "m.weight_shape": np.array([8, 9]),
            },
            COMPRESSED,
            ["integers of 4 or 8 bits for [8, 9]", "[8, 16] words, [4, 16] scales"],
        ),
        (
            {
                "m.weight": np.zeros((4, 4), np.int8),
                "m.weight_scale": SCALES[:, :1],
                "m.weight_zero_point": np.zeros((4, 1), np.int8),
            },
            COMPRESSED,
            ["'m.weight_zero_point'", "symmetrically"],
        ),
        ({"m.qweight": WORDS}, GPTQ | {"bits": 3}, ["quantization_config.bits", "2 | 4 | 8"]),
        (
            {"m.qweight": WORDS},
            CASES["awq"] | {"version": "gemv"},
            ["quantization_config.version", '"gemv"'],
        ),
        (
            {
                "m.weight": WORDS.astype(np.int8),
                "m.SCB": np.ones(8, np.float32),
                "m.weight_format": np.array(2, np.uint8),
            },
            BITSANDBYTES,
            ["not stored row by row", "newer bitsandbytes"],
        ),
        (
            {"m.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [0]}', np.uint8)},
            BITSANDBYTES,
            ["shape.0", "blocksize: a key is missing", "bitsandbytes__nf4"],
        ),
        (
            {"m": WORDS},
            COMPRESSED
            | {"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}}},
            ["the weights are said to be quantised, and no tensor is"],
        ),
    ],
)
def test_what_does_not_match_is_reported(parts, options, expected, tmp_path):
    text = "\n".join(problems(write(tmp_path, parts, options)))
    assert [part for part in expected if part not in text] == []


def test_a_group_that_does_not_exist(tmp_path):
    index = np.full(64, 4, np.int32)
    parts = {"m.qweight": WORDS, "m.qzeros": WORDS[:4, :2], "m.scales": SCALES, "m.g_idx": index}
    with (
        open_checkpoint(write(tmp_path, parts, GPTQ)) as checkpoint,
        pytest.raises(InputError, match="group that does not exist"),
    ):
        checkpoint.read("m.weight")
