"""Write quantised matrices and what the libraries that made them say they are.

    python tests/checkpoint/make_quantised.py AUTOAWQ AUTO_GPTQ

With torch, transformers 5, bitsandbytes and compressed-tensors 0.20.  AUTOAWQ and AUTO_GPTQ are
the unpacked packages (autoawq 0.2.9, auto_gptq 0.7.1), of which one module each is loaded: both
import CUDA as a whole.
Each file of ``quantised/`` holds the stored parts of a matrix; beside it is the matrix.
"""

import importlib.util
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUT = Path(__file__).parent / "quantised"


def _module(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _save(name: str, expected: torch.Tensor, **tensors: torch.Tensor):
    # Keywords have no dots: the first two underscores of the matrix's own parts are one.
    parts = {k.replace("m__", "m.", 1): v.contiguous() for k, v in tensors.items()}
    save_file(parts, OUT / f"{name}.safetensors")
    (OUT / f"{name}.safetensors").chmod(0o644)
    np.save(OUT / f"{name}.npy", expected.contiguous().float().numpy())


def fp8(rows: int, columns: int, block: tuple[int, int], name: str):
    grid = rows // block[0], columns // block[1]
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(grid) + 0.1
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    _save(name, expected, m__weight=weight, m__weight_scale_inv=scale)


def mxfp4():
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 6, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    _save("mxfp4", expected, m_blocks=blocks, m_scales=scales)


def four_bit(kind: str, nested: bool, name: str):
    matrix = torch.randn(24, 56)
    packed, state = bnb.quantize_4bit(
        matrix, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    _save(name, bnb.dequantize_4bit(packed, state), m__weight=packed, **parts)


def int8():
    matrix = torch.randn(8, 12)
    scale = matrix.abs().amax(1)
    weight = (matrix * 127 / scale[:, None]).round().to(torch.int8)
    expected = bnb.int8_vectorwise_dequant(weight, scale)
    order = torch.tensor(0, dtype=torch.uint8)
    _save("int8", expected, m__weight=weight, m__SCB=scale, m__weight_format=order)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def awq(packing):
    weight, zeros, scales = words(32, 3), words(2, 3), torch.rand(2, 24).half() + 0.1
    expected = packing.dequantize_gemm(weight, zeros, scales, 4, 16).T
    _save("awq", expected, m__qweight=weight, m__qzeros=zeros, m__scales=scales)


def gptq(layers, bits: int, shuffled: bool, name: str):
    inputs, outputs, group = 64, 32, 16
    layer = layers.QuantLinear(bits, group, inputs, outputs, bias=False)
    order = torch.randperm(inputs) if shuffled else torch.arange(inputs)
    index = (torch.arange(inputs) // group)[order].to(torch.int32)
    scales = torch.rand(outputs, inputs // group).half() / 64 + 0.01
    zeros = torch.randint(1, 2**bits, (outputs, inputs // group)).float()
    integers = torch.randint(0, 2**bits, (outputs, inputs))
    linear = torch.nn.Linear(inputs, outputs, bias=False).half()
    linear.weight.data = (integers - zeros[:, index]).half() * scales[:, index]
    layer.pack(linear, scales, zeros.clone(), index)
    # A product with the identity is the matrix that it computes with, inputs first.
    expected = layer(torch.eye(inputs).half()).T.float()
    assert torch.equal(expected, linear.weight.data.float())
    parts = {f"m__{k}": getattr(layer, k) for k in ("qweight", "qzeros", "scales", "g_idx")}
    _save(name, expected, **parts)


def compressed():
    """Matrices of compressed-tensors, dequantised in float32."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    weight, outer = torch.randn(16, 64), torch.tensor([500.0])
    powers = torch.randint(120, 130, (16, 2), dtype=torch.uint8)
    scales, zeros = torch.rand(16, 4) / 8 + 0.1, torch.randint(-8, 8, (16, 4)).to(torch.int8)
    fp4, int4 = {"num_bits": 4, "type": "float"}, {"num_bits": 4, "strategy": "group"}
    for name, compressor, args, state in (
        ("nvfp4", NVFP4PackedCompressor, {**fp4, "strategy": "tensor_group", "group_size": 16},
         {"scale": (outer * scales).to(torch.float8_e4m3fn).float(), "global_scale": outer}),
        ("mxfp4_packed", MXFP4PackedCompressor, {**fp4, "strategy": "group", "group_size": 32},
         {"scale": 2.0 ** (powers.float() - 127)}),
        ("int4_packed", PackedQuantizationCompressor, {**int4, "group_size": 16},
         {"scale": scales}),
        ("int4_zeros", PackedQuantizationCompressor, {**int4, "group_size": 16, "symmetric": False},
         {"scale": scales, "zero_point": zeros}),
        ("int8_packed", PackedQuantizationCompressor, {"num_bits": 8, "strategy": "channel"},
         {"scale": scales[:, :1] / 8}),
        ("int8_rows", IntQuantizationCompressor, {"num_bits": 8, "strategy": "channel"},
         {"scale": scales[:, :1] / 8}),
    ):  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        parts = {"weight": weight, **{f"weight_{key}": value for key, value in state.items()}}
        stored = compressor.compress(parts, scheme)
        expected = compressor.decompress(stored, scheme)["weight"]
        if name.endswith("fp4") or name.startswith("mxfp4"):  # the library rounds it to bf16
            codes = unpack_fp4_from_uint8(stored["weight_packed"], 16, 64).float()
            exact = dequantize(codes, state["scale"], args=scheme.weights, dtype=torch.float32,
                               global_scale=state.get("global_scale"))  # fmt: skip
            assert torch.allclose(exact, expected.float(), rtol=2**-7)
            expected = exact
        _save(name, expected, **{f"m__{key}": value for key, value in stored.items()})


def main():
    """Write all files."""
    torch.manual_seed(7)
    OUT.mkdir(exist_ok=True)
    awq_package, gptq_package = map(Path, sys.argv[1:])
    fp8(48, 80, (16, 16), "fp8")
    mxfp4()
    four_bit("nf4", False, "nf4")
    four_bit("nf4", True, "nf4_nested")
    four_bit("fp4", True, "fp4_nested")
    int8()
    awq(_module(awq_package / "awq" / "utils" / "packing_utils.py"))
    layers = _module(gptq_package / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda.py")
    gptq(layers, 4, False, "gptq")
    gptq(layers, 4, True, "gptq_shuffled")
    gptq(layers, 8, False, "gptq_8")
    compressed()


if __name__ == "__main__":
    main()
