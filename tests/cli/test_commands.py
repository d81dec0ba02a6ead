"""Every command does its job on a small checkpoint, with the artefact alone on stdout."""

import json
import math
import sys

import click
import numpy as np
import pytest

from moecc.cli.commands import command_of, show
from moecc.ir.text import parse, print_graph
from moecc.jobs import COMMANDS
from moecc.jobs.command import Report
from moecc.model.open import open_model
from tests.train.tiny import piped

from .conftest import GOLDEN, LLAMA, UPCYCLE, read_json, run_process, run_shell


def test_inspect_counts_and_judges_targets(cli, dense):
    data = cli.json("inspect", dense)
    assert data["schema"] == "moecc.inspect/1"
    layers = read_json(dense / "config.json")["num_hidden_layers"]
    assert data["layers"] == layers
    assert data["ffn_blocks"] == {"found": layers, "convertible": layers, "refused": []}
    assert data["targets"]["mixtral"]["fits"]
    assert not data["targets"]["qwen3_moe"]["fits"]
    assert "norms of the queries" in data["targets"]["qwen3_moe"]["reasons"][0]
    groups = data["parameters"]["groups"]
    # Those of the paper overlap, and have capital letters.
    assert data["parameters"]["total"] == groups["All"]
    assert data["parameters"]["total"] == sum(n for name, n in groups.items() if name.islower())
    human = cli("inspect", dense)
    assert "can be upcycled" in human.out
    assert human.err == ""


def test_stdout_carries_the_graph_alone(cli, dense_graph):
    done = cli("opt", dense_graph, "-p", UPCYCLE, "--remarks", "--timing")
    parse(done.out)
    assert "remark: upcycle" in done.err


def test_opt_reports_what_each_pass_did_and_what_was_checked(cli, dense_graph):
    done = cli("opt", dense_graph, "-p", f"{UPCYCLE},cse,tie-head", "--check", "--format", "json")
    assert "note: cse, tie-head changed nothing (--remarks has why)\n" in done.err
    data = json.loads(done.out)
    assert [p["pass"] for p in data["passes"]] == ["upcycle{experts=4}", "cse", "tie-head"]
    assert [p["changed"] for p in data["passes"]] == [True, False, False]
    promises = [(c["promised"]["kind"], c["proved"]) for c in data["checked"]]
    assert promises == [("reassociation", True), ("exact", True), ("exact", True)]


def test_convert_verify_run_and_read_again(cli, dense, out):
    assert "preserves   reassociation" in cli.convert(dense, out).out
    cli("verify", out)
    verdict = cli.json("verify", out, "--against", dense)
    assert verdict["difference"]["max_relative"] <= 1e-6
    assert cli.json("inspect", out)["family"] == "mixtral"
    assert (out / "README.md").read_text().startswith("---\n")
    config = read_json(out / "config.json")
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert config["num_local_experts"] == config["num_experts"] == 4


def test_the_same_bytes_again(cli, dense, tmp_path):
    weights = []
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        cli.convert(dense, tmp_path / name, "--seed", seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_dry_run_writes_nothing(cli, dense, tmp_path, out):
    data = cli.dry_run(dense, out)
    assert data["dry_run"]
    assert data["parameters"]["active"] < data["parameters"]["total"]
    assert list(tmp_path.iterdir()) == [dense]


def test_shards_and_types(cli, dense, out):
    cli.convert(dense, out, "--dtype", "bf16", "--max-shard-bytes", "20kB")
    index = read_json(out / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] > 0
    assert read_json(out / "config.json")["torch_dtype"] == "bfloat16"
    verdict = cli.json("verify", out, "--against", dense)
    assert verdict["passed"]
    assert verdict["rounding"]["max_relative"] > verdict["difference"]["max_relative"]


@pytest.mark.parametrize(
    ("source", "pipeline", "more", "target"),
    [
        ("llama_gqa", "", (), "gguf:llama"),
        ("llama_gqa", UPCYCLE, ("--dtype", "f16"), "gguf:llama"),
        ("qwen2_moe_plain", "", (), "gguf:qwen2moe"),
        ("gemma4_inputs", "", (), "gguf:gemma4"),
    ],
)
def test_auto_is_an_architecture_where_the_output_is_a_gguf_file(
    cli, tmp_path, source, pipeline, more, target
):
    file = tmp_path / "m.gguf"
    more = (*more, "--format", "json")
    done = cli.convert(GOLDEN / source, file, *more, pipeline=pipeline, to="auto")
    assert done.json()["family_to"] == target
    assert cli.json("inspect", file)["layers"] > 0


@pytest.mark.parametrize(
    ("source", "to", "remark"),
    [
        ("mixtral_gqa", "mixtral", "its own, 0.001 times balance; router_z, load are left out"),
        ("mixtral_gqa", "gguf:llama", "of routers: balance, router_z, load are left out"),
        ("switch_drops", "switch_transformers", "0.001 times balance and 0.001 times router_z; lo"),
        ("llama4_square", "llama4_text", "of routers: balance, router_z, load are left out"),
        ("mixtral_gqa", "st_moe", None),
    ],
)
def test_losses_that_the_target_does_not_hold(cli, out, source, to, remark):
    data = cli.dry_run(GOLDEN / source, out, pipeline="add-losses{load-coef=0.1}", to=to)
    of_losses = [text for text in data["remarks"] if "holds no losses" in text]
    assert len(of_losses) == (remark is not None)
    assert remark is None or remark in of_losses[0]


def test_another_output_is_found_by_verify(cli, dense, out):
    cli.convert(dense, out, pipeline="upcycle{experts=4 init=noise noise-std=0.5}")
    cli("verify", out, "--against", dense, code=3, says="differ by more than the tolerance")


def test_numbers_that_are_not_finite_are_null(capsys):
    report = Report("some", {"low": -math.inf, "losses": (math.nan, 1.5)}, str)
    assert show(report, "json") == 0
    values = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert values == {"schema": "moecc.some/1", "low": None, "losses": [None, 1.5]}


def test_a_closed_pipe_is_quiet(dense):
    done = run_shell(f"moecc import {dense} | head -n 1")
    assert (done.stdout, done.stderr) == ("moecc 1\n", "")


def test_a_reader_that_is_gone_is_no_failure(dense, out):
    line = f"moecc convert {dense} {out} -p upcycle --to mixtral --quiet"
    assert run_shell(line + " | true; exit ${PIPESTATUS[0]}").stderr == ""


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--help"], {"numpy", "moecc.jobs.inspect"}),
        (["inspect", str(LLAMA)], {"jax", "moecc.families.graphs.encdec"}),
        (["opt", "GRAPH"], {"jax"}),
    ],
)
def test_nothing_heavy_is_imported_at_the_start(dense_graph, command, heavy):
    args = [str(dense_graph) if word == "GRAPH" else word for word in command]
    code = (
        f"import sys; from moecc.cli.main import main; code = main({args!r}); "
        f"print('\\nheavy' if {heavy!r} & sys.modules.keys() else '\\nclean'); sys.exit(code)"
    )
    assert run_process(sys.executable, "-c", code).stdout.endswith("\nclean\n")


def test_no_help_names_a_bound_that_is_none():
    for name in COMMANDS:
        with click.Context(command_of(name), info_name=name) as context:
            assert "None" not in context.get_help(), name


def test_help_has_a_whole_line_for_each_command_and_the_exit_codes(cli):
    done = cli("--help")
    listed = done.out[done.out.index("Commands:\n") : done.out.index("  Exit codes")]
    lines = [f"  {name:10}  {summary}" for name, summary in COMMANDS.items()]
    assert listed.splitlines() == ["Commands:", *lines, ""]
    assert "130 interrupted" in done.out


def test_a_router_computes_in_float32_or_in_the_type_of_the_run(cli, tmp_path):
    logits = []
    for more in ((), ("--router-dtype", "bf16")):
        out = tmp_path / f"{len(logits)}.npy"
        cli("run", GOLDEN / "mixtral_gqa", "--outputs", out, "--dtype", "bf16", *more)
        logits.append(np.load(out))
    wide, narrow = logits
    assert 0 < np.abs(narrow - wide).max() < 0.2 * np.abs(wide).max()


def test_an_npz_file_has_each_output_by_name(cli, tmp_path):
    graph, reference = tmp_path / "m.moe", ("--backend", "reference")
    with open_model(str(GOLDEN / "bert_square")) as model:
        graph.write_text(print_graph(piped(model.graph, "tie-head")))
    said = cli.json("run", graph, "--outputs", tmp_path / "all.npz", *reference)
    arrays = dict(np.load(tmp_path / "all.npz"))
    assert {name: list(array.shape) for name, array in arrays.items()} == said["outputs"]
    cli("run", graph, "--outputs", tmp_path / "first.npy", *reference)
    np.testing.assert_array_equal(np.load(tmp_path / "first.npy"), arrays["hidden"])
    cli("run", graph, "--outputs", tmp_path / "one.npz", "--output", "logits", *reference)
    assert list(np.load(tmp_path / "one.npz")) == ["logits"]
