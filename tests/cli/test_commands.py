"""Every command does its job on a small checkpoint, with the artefact alone on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moecc.ir.text import parse
from moecc.jobs import COMMANDS

UPCYCLE = "upcycle{experts=4 top-k=2}"


def convert(moecc: Callable, source: Path, out: Path, *more: str):
    return moecc("convert", source, out, "-p", UPCYCLE, "--to", "mixtral", *more)


def test_help_has_a_whole_line_for_each_command_and_the_exit_codes(moecc: Callable) -> None:
    done = moecc("--help")
    assert done.code == 0
    listed = done.out[done.out.index("Commands:\n") : done.out.index("  Exit codes")]
    lines = [f"  {name:10}  {summary}" for name, summary in COMMANDS.items()]
    assert listed.splitlines() == ["Commands:", *lines, ""]
    assert "130 interrupted" in done.out


@pytest.mark.parametrize(
    ("words", "help_of"),
    [
        (["--nope"], "moecc"),
        (["nope"], "moecc"),
        (["plan"], "moecc plan"),
        (["plan", "--nope"], "moecc plan"),
        (["plan", "x", "--sweep"], "moecc plan"),
    ],
)
def test_wrong_words_name_the_help_of_their_command(
    moecc: Callable, words: list[str], help_of: str
) -> None:
    done = moecc(*words)
    assert done.code == 2
    assert done.err.endswith(f"hint: {help_of} --help\n")


def test_equal_remarks_of_a_stack_are_one_line(moecc: Callable) -> None:
    source = Path(__file__).parents[1] / "golden" / "t5_relu_tied"
    options = ("-p", "upcycle{experts=4}", "--to", "st_moe", "--dry-run")
    done = moecc("convert", source, "sparse", *options)
    remarks = [line for line in done.out.splitlines() if line.startswith("  remark")]
    assert remarks == [
        f"  remark      {stack}.layers.0.ffn … {stack}.layers.{last}.ffn ({last + 1}): "
        "became 4 experts, top-2"
        for stack, last in (("encoder", 1), ("decoder", 2))
    ]


def test_version(moecc: Callable) -> None:
    from moecc import __version__

    assert moecc("--version").out == f"moecc {__version__}\n"


def test_inspect_counts_and_judges_targets(moecc: Callable, dense: Path) -> None:
    data = moecc("inspect", dense, "--format", "json").json()
    assert data["schema"] == "moecc.inspect/1"
    config = json.loads((dense / "config.json").read_text())
    assert data["layers"] == config["num_hidden_layers"]
    assert data["ffn_blocks"] == {
        "found": data["layers"],
        "convertible": data["layers"],
        "refused": [],
    }
    assert data["targets"]["mixtral"]["fits"]
    assert not data["targets"]["qwen3_moe"]["fits"]
    assert "norms of the queries" in data["targets"]["qwen3_moe"]["reasons"][0]
    groups = data["parameters"]["groups"]
    # Those of the paper overlap, and have capital letters.
    assert data["parameters"]["total"] == groups["All"]
    assert data["parameters"]["total"] == sum(n for name, n in groups.items() if name.islower())
    human = moecc("inspect", dense)
    assert "can be upcycled" in human.out
    assert human.err == ""


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("st-moe-l", 4_105_444_352),
        ("t5-xxl", 11_135_332_352),
        ("mixtral-8x7b", 46_702_792_704),
        pytest.param("switch-c", 1_571_327_875_360, marks=pytest.mark.slow),
    ],
)
def test_a_preset_needs_no_weights(moecc: Callable, name: str, parameters: int) -> None:
    data = moecc("inspect", f"preset:{name}", "--format", "json").json()
    assert data["parameters"]["total"] == parameters


def test_import_opt_and_back(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    graph, sparse = tmp_path / "a.moe", tmp_path / "b.moe"
    assert moecc("import", dense, "-o", graph).code == 0
    done = moecc(
        "opt", graph, "-p", f"{UPCYCLE},canonicalize,dce,cse", "-o", sparse,
        "--diff", "--stats", "--timing", "--remarks", "--print-after", "upcycle", "--check",
        "--dump-dir", tmp_path / "dump",
    )  # fmt: skip
    assert done.code == 0
    assert done.out == ""
    assert "+  %router = contract" in done.err
    assert "checked: 1 upcycle" in done.err
    dumped = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert dumped == [
        "000_input.moe", "001_upcycle.moe", "002_canonicalize.moe", "003_dce.moe", "004_cse.moe",
    ]  # fmt: skip
    assert parse(sparse.read_text()).attrs["checkpoint"] == str(dense)


def test_stdout_carries_the_graph_alone(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    graph = tmp_path / "a.moe"
    moecc("import", dense, "-o", graph)
    done = moecc("opt", graph, "-p", UPCYCLE, "--remarks", "--timing")
    parse(done.out)
    assert "remark: upcycle" in done.err


def test_convert_verify_run_and_read_again(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    done = convert(moecc, dense, out)
    assert done.code == 0, done.err
    assert "preserves   reassociation" in done.out
    assert moecc("verify", out).code == 0
    verdict = moecc("verify", out, "--against", dense, "--format", "json")
    assert verdict.code == 0
    assert verdict.json()["difference"]["max_relative"] <= 1e-6
    assert moecc("inspect", out, "--format", "json").json()["family"] == "mixtral"
    assert (out / "README.md").read_text().startswith("---\n")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert config["num_local_experts"] == config["num_experts"] == 4


def test_a_graph_file_runs_with_its_checkpoint(
    moecc: Callable, dense: Path, tmp_path: Path
) -> None:
    graph, logits = tmp_path / "sparse.moe", tmp_path / "logits.npy"
    moecc("import", dense, "-o", tmp_path / "a.moe")
    moecc("opt", tmp_path / "a.moe", "-p", UPCYCLE, "-o", graph)
    for backend in ("xla", "reference"):
        done = moecc(
            "run", graph, "--inputs", dense / "tokens.npy", "--outputs", logits,
            "--backend", backend, "--force",
        )  # fmt: skip
        assert done.code == 0, done.err
        golden = np.load(dense / "logits.npy")
        assert np.abs(np.load(logits) - golden).max() <= 1e-5 * np.abs(golden).max()


def test_the_same_bytes_again(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert convert(moecc, dense, tmp_path / name, "--seed", "3").code == 0
    assert convert(moecc, dense, tmp_path / "other", "--seed", "4").code == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "other")]
    assert files[0] == files[1] != files[2]


def test_dry_run_writes_nothing(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    done = convert(moecc, dense, tmp_path / "out", "--dry-run", "--format", "json")
    data = done.json()
    assert data["dry_run"]
    assert data["parameters"]["active"] < data["parameters"]["total"]
    assert list(tmp_path.iterdir()) == [dense]


def test_shards_and_types(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = convert(moecc, dense, out, "--dtype", "bf16", "--max-shard-bytes", "20kB")
    assert done.code == 0, done.err
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert index["metadata"]["total_size"] > 0
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    verdict = moecc("verify", out, "--against", dense, "--format", "json").json()
    assert verdict["passed"]
    assert verdict["rounding"]["max_relative"] > verdict["difference"]["max_relative"]


def test_passes_are_listed_and_shown(moecc: Callable) -> None:
    assert "upcycle" in moecc("passes").out
    shown = moecc("passes", "upcycle")
    assert "top-k=" in shown.out
    assert "Before::" in shown.out
    data = moecc("passes", "upcycle", "--format", "json").json()
    assert {"name": "top-k", "default": 2}.items() <= next(
        o for o in data["options"] if o["name"] == "top-k"
    ).items()


def test_another_output_is_found_by_verify(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    noisy = "upcycle{experts=4 init=noise noise-std=0.5}"
    assert moecc("convert", dense, out, "-p", noisy, "--to", "mixtral").code == 0
    done = moecc("verify", out, "--against", dense)
    assert done.code == 3
    assert "differ by more than the tolerance" in done.err


def test_one_flipped_bit_is_found(moecc: Callable, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(moecc, dense, out)
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)
    done = moecc("verify", out)
    assert done.code == 3
    assert "model.safetensors" in done.err


def test_a_closed_pipe_is_quiet(dense: Path) -> None:
    command = f"{sys.executable} -m moecc import {dense} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "moecc 1\n"
    assert done.stderr == ""


def test_a_shell_completes_every_command() -> None:
    asked = {"_MOECC_COMPLETE": "bash_complete", "COMP_WORDS": "moecc pa", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "moecc"]
    done = subprocess.run(
        command, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["plain,passes"]


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--help"], "numpy"),
        (["--help"], "moecc.jobs.inspect"),
        (["inspect", "DENSE"], "jax"),
        (["inspect", "DENSE"], "moecc.families.graphs.encdec"),
        (["opt", "GRAPH"], "jax"),
    ],
)
def test_nothing_heavy_is_imported_at_the_start(
    moecc: Callable, dense: Path, tmp_path: Path, command: list[str], heavy: str
) -> None:
    graph = tmp_path / "a.moe"
    moecc("import", dense, "-o", graph)
    args = [{"DENSE": str(dense), "GRAPH": str(graph)}.get(a, a) for a in command]
    code = (
        f"import sys; from moecc.cli.main import main; code = main({args!r}); "
        f"print('\\nheavy' if {heavy!r} in sys.modules else '\\nclean'); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nclean\n")
