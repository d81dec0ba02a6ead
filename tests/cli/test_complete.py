"""Completion of values: what the functions return, and what bash makes of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moecc.cli import complete


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("upc", ["upcycle"]),
        ("@st", ["@st-moe"]),
        ("dce,upc", ["dce,upcycle"]),
        ("upcycle{experts=8},dc", ["upcycle{experts=8},dce"]),
        ("upcycle{exp", ["upcycle{experts=", "upcycle{expert-bias="]),
        ("upcycle{experts=8 exp", ["upcycle{experts=8 expert-bias="]),
        ("upcycle{extra-ffn=", ["upcycle{extra-ffn=" + v for v in ("none", "before", "after")]),
        ("st-moe{losses=", ["st-moe{losses=true", "st-moe{losses=false"]),
        ("specialize{dropless=n", ["specialize{dropless=none"]),
        ("dce,freeze{only=m", ["dce,freeze{only=moe"]),
        ("nosuch{exp", []),
        ("upcycle{nosuch=", []),
        ("upcycle}{", []),
    ],
)
def test_pipelines(typed, expected):
    assert sorted(complete.pipelines(typed)) == sorted(expected)


def test_all_passes_begin_a_pipeline():
    assert {"upcycle", "dce", "st-moe"} <= set(complete.pipelines(""))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "preset", ":", "smo"], ["smollm2-135m"]),
        (["plan", "x", "--machine", "gpu", ":", "h1"], ["h100:"]),
        (["opt", "x", "-p", "'upcycle{experts=8 router-i"], ["upcycle{experts=8 router-init="]),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_in_bash(words, expected):
    """The words as bash splits them, given to the function that bash calls."""
    moecc = Path(sys.executable).with_name("moecc")
    quoted = " ".join(f'"{word}"' for word in ("moecc", *words))
    script = f"""eval "$({moecc} --show-completion bash)"
COMP_WORDS=({quoted}) COMP_CWORD={len(words)}
_moecc_completion {moecc}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_other_values():
    assert complete.models("preset:smo") == ["preset:smollm2-135m"]
    assert complete.models("") == complete.models("folder") == []
    assert complete.machines("gpu:h1") == ["gpu:h100:"]
    assert "tpu:v5e:4x4" in complete.machines("tpu:v5e:4")
    assert complete.machines("gpu:a100:1") == ["gpu:a100:128", "gpu:a100:16"]
    assert complete.machines("v5litepod-1") == [f"v5litepod-{n}" for n in (1, 128, 16)]
    assert complete.machines("a1") == ["a100", *(f"a100x{n}" for n in (128, 16, 32, 64, 8))]
    assert complete.machines("npu:x:") == complete.machines("my.toml") == []
    assert complete.targets("gguf:qwen3m") == ["gguf:qwen3moe"]
    assert "mixtral" in complete.targets("m")
    assert complete.float_types("bf") == ["bf16"]
    assert complete.passes("dec") == ["decode"]
    assert complete.models_or_pipelines("dec") == ["decode"]
