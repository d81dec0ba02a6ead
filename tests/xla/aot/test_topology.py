"""What has to be there, and set, to compile for a machine."""

from importlib.util import find_spec

import jax
import pytest
from moecc_backends.xla import ahead
from moecc_backends.xla.ahead import CompilerFailed, DoesNotFit, compile_lowered, refusal, require

from moecc.errors import MachineError
from moecc.plan.machines import parse_machine


@pytest.mark.parametrize(
    ("machine", "package"), [("tpu:v5p:2x2x1", "libtpu"), ("gpu:h100:8", "jax_plugins")]
)
def test_a_missing_extra_is_named_in_one_line(machine, package, monkeypatch):
    monkeypatch.setattr(
        ahead, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(MachineError, match=r"python -m pip install 'jax\[") as caught:
        require(parse_machine(machine))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (65.21G) exceeds available HBM (15.25G).",
            65.21, 15.25,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.40G of 15.25G hbm. "
            "Exceeded hbm capacity by 4.15G.",
            19.4, 15.25,
        ),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_a_program_too_large(message, needed, available):
    error = refusal(RuntimeError(message))
    assert isinstance(error, DoesNotFit)
    assert error.needed_bytes == int(needed * 2**30)
    assert error.available_bytes == int(available * 2**30)


def test_what_the_compiler_says_otherwise():
    error = refusal(RuntimeError("INTERNAL: something else"))
    assert isinstance(error, CompilerFailed)
    assert error.problems[0].found == "INTERNAL: something else"


def test_a_product_without_tiles_is_compiled_by_cublas():
    """As XLA for GPUs rejects the step of ST-MoE-Base over 16 B200 by its defaults."""
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    asked = []

    class Rejecting:
        """A program that XLA's own kernels cannot be cut for."""

        def compile(self, compiler_options):
            asked.append(compiler_options)
            if ahead.WITHOUT_TRITON.items() <= (compiler_options or {}).items():
                return lowered.compile()
            raise RuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.1")

    compiled = compile_lowered(Rejecting(), parse_machine("gpu:h100:1"), {"effort": 1.0})
    assert asked == [{"effort": 1.0}, {"effort": 1.0, "xla_gpu_enable_triton_gemm": False}]
    assert "cuBLAS" in compiled.remarks[0]
    assert compile_lowered(lowered, parse_machine("cpu")).remarks == ()
