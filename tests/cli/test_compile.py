"""``moecc compile``: what it says of a small model on this machine, and what bad input gets."""

from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest

from moecc import load_step
from moecc.ahead.request import Request
from moecc.ahead.worker import ANSWER, REQUEST, prepare
from moecc.errors import InputError
from moecc.ir import equal, parse
from moecc.ir.mesh import mesh_of
from moecc.plan.step import ProgramConfig
from moecc.sharding.vias import PARTITIONS
from tests.support.layouts import layout_text

from .conftest import GOLDEN, read_json

pytest.importorskip("jax")

MIXTRAL, LLAMA = str(GOLDEN / "mixtral_gqa"), str(GOLDEN / "llama_gqa")
FORWARD = ProgramConfig("forward", 64, "16")
SMALL = ("--batch-tokens", "64", "--sequence", "16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh", "more"),
    [
        (LLAMA, "fsdp=4,model=2", ("--remat", "full")),
        (LLAMA, "fsdp=4,model=2", ("--remat", "save")),
        (MIXTRAL, "data=4,model=2", ("--remat", "full", "--slice")),
        (MIXTRAL, "data=4,model=2", ("--remat", "save", "--slice")),
        (MIXTRAL, "fsdp=2,expert=4", ("--remat", "none", "--dense-weights", "split")),
        (MIXTRAL, "data=2,expert=4", ("--micro-batches", "2", "--reduce-dtype", "f32")),
        (LLAMA, "data=4,model=2", ("--micro-batches", "4")),
        (LLAMA, "data=4,model=2", ("-p", "freeze{groups=attention}")),
        (LLAMA, "fsdp=4", ("-p", "freeze{groups=ffn}", "--micro-batches", "2")),
        (LLAMA, "data=2", ("-p", "freeze{groups=embedding}", "--remat", "none")),
        (MIXTRAL, "data=2,expert=4", ("-p", "freeze{only=moe}", "--remat", "none")),
    ],
)
def test_a_step_sends_what_the_plan_foretold(cli, model, mesh, more):
    """All collectives together: a compiler may make one of another, and sum several at once."""
    pytest.importorskip("optax")
    devices = prod(int(axis.split("=")[1]) for axis in mesh.split(","))
    program = cli.json(
        "compile", model, "--machine", f"cpu:{devices}", "--mesh", mesh, "--batch-tokens", "1024",
        "--sequence", "64", "--dtype", "f32", "--optimizer", "adafactor", *more,
    )  # fmt: skip
    plan = program["predicted"]
    sent, planned = (
        sum(row["bytes"] for row in report["collectives"].values()) for report in (program, plan)
    )
    assert sent == pytest.approx(planned, rel=0.01)
    assert program["flops"] == pytest.approx(plan["flops"], rel=0.001)
    arguments = program["memory"]["arguments_bytes"]
    assert arguments == pytest.approx(plan["arguments_bytes"], rel=0.05)


def test_rules_of_a_file_lay_what_is_compiled(tmp_path):
    file = tmp_path / "grid.rules"
    file.write_text(layout_text("batch = rows", "expert with slot = rows", "group = rows"))
    asked = Request(MIXTRAL, "cpu:4", replace(FORWARD, mesh="rows=4", rules=str(file)))
    prepared = prepare(Request.from_json(asked.to_json()))
    assert f"rules={file}" in prepared.pipeline
    assert str(mesh_of(prepared.graph)) == "rows:4"
    assert prepared.estimate.collectives["all_to_all"]["count"] == 4, "two layers, there and back"
    # Where groups stand first they take the mesh axis; then experts are everywhere.
    file.write_text(layout_text("batch = rows", "group = rows", "expert with slot = rows"))
    local = prepare(asked)
    assert "all_to_all" not in local.estimate.collectives
    assert "all_to_all" not in {node.op.name for node in local.graph.every_node()}


@pytest.mark.slow
@pytest.mark.parametrize("partition", PARTITIONS)
def test_an_exported_program_gives_what_the_graph_gives(cli, tmp_path, partition):
    pytest.importorskip("flatbuffers")
    from moecc_backends.xla.backend import function

    out = tmp_path / "llama.bin"
    command = ("compile", LLAMA, "--machine", "cpu", "--step", "forward", *SMALL,
               "--partition", partition, "--save", out)  # fmt: skip
    cli(*command, "--dtype", "f32")
    cli(*command, code=1, says="exists")

    request = Request(LLAMA, "cpu", replace(FORWARD, dtype="f32", partition="gspmd"))
    graph, rng = prepare(request).graph, np.random.default_rng(0)
    params = {
        n: rng.normal(size=p.type.shape).astype(np.float32)
        for n, p in graph.params.items()
        if p.users
    }
    inputs = {"tokens": rng.integers(0, 37, (4, 16)).astype(np.int32)}
    step = load_step(out)
    assert (step.platforms, step.devices) == (("cpu",), 1)
    assert step.arguments[0].keys() == params.keys()
    assert repr(step) == f"<moecc.LoadedStep cpu, 1 device, {len(params) + 1} arrays>"
    for wrong, says in (
        ((params,), r"other arguments \(1 differ\)"),
        ((params | {"lm_head.weight": "a"}, inputs), "lm_head.weight.*no array, but str"),
        ((params, {"tokens": inputs["tokens"].reshape(2, 32)}), r"int32\[4, 16\].*int32\[2, 32\]"),
    ):
        with pytest.raises(InputError, match=f"(?s){says}"):
            step(*wrong)
    logits = np.asarray(step(params, inputs)["logits"])
    expected = np.asarray(function(graph)(params, inputs)["logits"])
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--machine", "tpu:v9:2x2x2"), 2, "unknown machine 'tpu:v9:2x2x2'"),
        (("--machine", "tpu:v5p:3x5x7"), 2, "no topology '3x5x7'"),
        (("--machine", "cpu:2", "--mesh", "rows=2"), 2, "unknown mesh axis 'rows'"),
        (("--machine", "cpu:2", "--dtype", "f33"), 2, "unknown element type 'f33'"),
        (("--machine", "cpu:2", "--sequence", "many"), 2, "not lengths of a sequence"),
        (("--machine", "cpu:2", "--save", "nowhere/file"), 1, "does not exist"),
        (("--machine", "tpu:v5p:2x2x2", "--quick", "--overlap"), 2, "no collective beside"),
    ],
)
def test_what_is_wrong_by_itself_is_told_at_once(cli, options, code, says):
    done = cli("compile", LLAMA, *options, code=code, says=says)
    assert done.out == ""


def test_a_compilation_ends_when_its_time_is_up(cli):
    command = ("compile", LLAMA, "--machine", "cpu", *SMALL, "--time-limit", "0.05")
    cli(*command, code=4, says=("longer than 0.05 seconds", "--time-limit"))


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_one_line_says_what_to_install(cli):
    done = cli("compile", LLAMA, "--machine", "tpu:v5p:2x2x1", "--step", "forward", *SMALL, code=4)
    assert done.err.startswith("error: compiling for TPUs needs libtpu: python -m pip install 'jax")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--machine", "cpu", "--via", "ring"), 1, "nothing goes via ring"),
        (("--mesh", "data=4", "--via", "replicated"), 1, "cannot all have the same tokens"),
        (("--partition", "gspmd", "--slice"), 2, "--partition explicit has every way"),
    ],
)
def test_ways_to_the_experts_that_there_are_not(cli, options, code, says):
    cli("compile", MIXTRAL, "--machine", "cpu:4", *SMALL, *options, code=code, says=says)


@pytest.mark.parametrize(
    ("name", "way"),
    [("vit_plain", "neither compile nor train"), ("bert_gelu", "after -p tie-head")],
)
def test_a_training_step_without_logits_is_planned_with_a_remark(cli, name, way):
    options = (GOLDEN / name, "--machine", "cpu:2")
    cli("plan", *options, says=way)
    assert cli("plan", *options, "--step", "forward").err == ""
    cli("compile", *options, code=1, says="--step forward")
    if "tie-head" in way:
        assert cli("plan", *options, "-p", "tie-head").err == ""


@pytest.mark.parametrize(("name", "own"), [(MIXTRAL, ""), (LLAMA, "upcycle{experts=4},grow")])
def test_the_passes_of_the_report_make_the_graph(cli, tmp_path, name, own):
    config = replace(FORWARD, mesh="expert=2,model=2", sliced=True)
    prepared = prepare(Request(name, "cpu:4", config, pipeline=own))
    assert prepared.pipeline.startswith(own)
    assert "rules=expert-parallel,tensor-parallel" in prepared.pipeline
    assert "expert-parallel{via=capacity slice=model}" in prepared.pipeline
    model = tmp_path / "model.moe"
    model.write_text(cli("import", name).out)
    done = cli("opt", model, "-p", prepared.pipeline)
    # A graph that was read numbers the values that passes make by itself.
    assert equal(parse(done.out), prepared.graph)


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_that_the_graph_has_are_those_of_the_step(parts):
    own = "specialize{mode=train capacity-factor=1.25},add-losses{balance-coef=0.5 z-coef=0}"
    config = ProgramConfig("train", 64, "16", mesh="data=2", micro_batches=parts)
    graph = prepare(Request(MIXTRAL, "cpu:2", config, pipeline=own)).graph
    losses = [name for name in graph.output_names if name.startswith("loss.")]
    assert losses == ["loss.balance", "loss.auxiliary"]
    assert graph.attrs["losses"]["balance_coef"] == 0.5
    assert graph.attrs["losses"]["parts"] == (parts if parts > 1 else 0)


FATAL = (
    "F1201 09:24:59.511905   31385 fusion_emitter.cc:418] Check failed: base_bounds == megacores "
    "(2 vs. 16) \n*** Check failure stack trace: ***\n"
)


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        ((), "--mesh data=4 --via capacity --remat"),
        (("--rules", "data-parallel"), "--rules data-parallel --mesh data=4 --remat"),
    ],
)
def test_a_crash_of_the_compiler_is_its_own_words_and_the_nearest_plan_that_compiles(
    cli, monkeypatch, rules, options
):
    pytest.importorskip("optax")
    tried = []

    @contextmanager
    def compiler(folder, _machine, log):
        config = read_json(folder / REQUEST)["config"]
        tried.append(f"{config['rules']} {config['mesh']} {config['remat']}")
        crashes = config["remat"] == "none"
        if crashes:
            log.write(FATAL.encode())
        else:
            (folder / ANSWER).write_text('{"fits": true}')
        yield SimpleNamespace(wait=lambda _limit: None, returncode=-6 if crashes else 0)

    monkeypatch.setattr(import_module("moecc.jobs.compile"), "_worker", compiler)
    command = ("compile", MIXTRAL, "--machine", "cpu:4", "--mesh", "data=4", *rules, *SMALL)
    crash = "fusion_emitter.cc:418] Check failed: base_bounds == megacores (2 vs. 16)"
    way_out = "compiles; by the plan it takes"
    done = cli(*command, "--remat", "none", code=4,
               says=(crash, "the compiler crashed (SIGABRT)", way_out))  # fmt: skip
    layout = rules[1] if rules else None
    assert tried[0] == f"{layout} data=4 none"
    nearest, remat = tried[-1].rsplit(" ", 1)
    assert nearest == f"{layout} data=4"
    assert f"{options} {remat}" in done.err
