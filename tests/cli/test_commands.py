"""Every command does its job on a small checkpoint, with the artefact alone on stdout."""

import json
import math
import subprocess
import sys

import click
import numpy as np
import pytest

from moecc.cli.commands import command_of, show
from moecc.ir.text import parse
from moecc.jobs import COMMANDS
from moecc.jobs.command import Report

from .conftest import GOLDEN

UPCYCLE = "upcycle{experts=4 top-k=2}"


def convert(moecc, source, out, *more):
    return moecc("convert", source, out, "-p", UPCYCLE, "--to", "mixtral", *more)


def test_inspect_counts_and_judges_targets(moecc, dense):
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


def test_stdout_carries_the_graph_alone(moecc, dense, tmp_path):
    graph = tmp_path / "a.moe"
    moecc("import", dense, "-o", graph)
    done = moecc("opt", graph, "-p", UPCYCLE, "--remarks", "--timing")
    parse(done.out)
    assert "remark: upcycle" in done.err


def test_convert_verify_run_and_read_again(moecc, dense, tmp_path):
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


def test_the_same_bytes_again(moecc, dense, tmp_path):
    for name in ("one", "two"):
        assert convert(moecc, dense, tmp_path / name, "--seed", "3").code == 0
    assert convert(moecc, dense, tmp_path / "other", "--seed", "4").code == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "other")]
    assert files[0] == files[1] != files[2]


def test_dry_run_writes_nothing(moecc, dense, tmp_path):
    done = convert(moecc, dense, tmp_path / "out", "--dry-run", "--format", "json")
    data = done.json()
    assert data["dry_run"]
    assert data["parameters"]["active"] < data["parameters"]["total"]
    assert list(tmp_path.iterdir()) == [dense]


def test_shards_and_types(moecc, dense, tmp_path):
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


def test_another_output_is_found_by_verify(moecc, dense, tmp_path):
    out = tmp_path / "out"
    noisy = "upcycle{experts=4 init=noise noise-std=0.5}"
    assert moecc("convert", dense, out, "-p", noisy, "--to", "mixtral").code == 0
    done = moecc("verify", out, "--against", dense)
    assert done.code == 3
    assert "differ by more than the tolerance" in done.err


def test_numbers_that_are_not_finite_are_null(capsys):
    report = Report("some", {"low": -math.inf, "losses": (math.nan, 1.5)}, str)
    assert show(report, "json") == 0
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert values == {"schema": "moecc.some/1", "low": None, "losses": [None, 1.5]}


def test_a_closed_pipe_is_quiet(dense):
    command = f"{sys.executable} -m moecc import {dense} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "moecc 1\n"
    assert done.stderr == ""


def test_a_reader_that_is_gone_is_no_failure(dense, tmp_path):
    words = f"convert {dense} {tmp_path / 'out'} -p upcycle --to mixtral --quiet"
    command = f"{sys.executable} -m moecc {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--help"], {"numpy", "moecc.jobs.inspect"}),
        (["inspect", "DENSE"], {"jax", "moecc.families.graphs.encdec"}),
        (["opt", "GRAPH"], {"jax"}),
    ],
)
def test_nothing_heavy_is_imported_at_the_start(moecc, dense, tmp_path, command, heavy):
    graph = tmp_path / "a.moe"
    moecc("import", dense, "-o", graph)
    args = [{"DENSE": str(dense), "GRAPH": str(graph)}.get(a, a) for a in command]
    code = (
        f"import sys; from moecc.cli.main import main; code = main({args!r}); "
        f"print('\\nheavy' if {heavy!r} & sys.modules.keys() else '\\nclean'); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nclean\n")


def test_no_help_names_a_bound_that_is_none():
    for name in COMMANDS:
        with click.Context(command_of(name), info_name=name) as context:
            assert "None" not in context.get_help(), name


def test_help_has_a_whole_line_for_each_command_and_the_exit_codes(moecc):
    done = moecc("--help")
    assert done.code == 0
    listed = done.out[done.out.index("Commands:\n") : done.out.index("  Exit codes")]
    lines = [f"  {name:10}  {summary}" for name, summary in COMMANDS.items()]
    assert listed.splitlines() == ["Commands:", *lines, ""]
    assert "130 interrupted" in done.out


def test_a_router_computes_in_float32_or_in_the_type_of_the_run(moecc, tmp_path):
    logits = []
    for more in ((), ("--router-dtype", "bf16")):
        out = tmp_path / f"{len(logits)}.npy"
        done = moecc("run", GOLDEN / "mixtral_gqa", "--outputs", out, "--dtype", "bf16", *more)
        assert done.code == 0, done.err
        logits.append(np.load(out))
    wide, narrow = logits
    assert 0 < np.abs(narrow - wide).max() < 0.2 * np.abs(wide).max()
