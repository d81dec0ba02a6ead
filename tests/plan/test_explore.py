"""What one would try beside the best plan: prices worked out by hand, and why the rest is none."""

from functools import cache, partial
from pathlib import Path

import pytest

import moecc
from moecc.errors import InputError
from moecc.model.open import open_model
from moecc.plan.explore import (
    in_context,
    part_of_machine,
    split_batch,
    stage_work,
    staged,
    whole_keys,
)
from moecc.plan.machines import efficiency, parse_machine
from moecc.plan.networks import HOP_SECONDS, Switch
from moecc.plan.step import StepConfig, Strategy, plan_mesh
from moecc.plan.workload import Batch, planned_graph, workload
from moecc.sharding.layout import Layout

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = parse_machine("cpu:8")


@cache
def work_of(name, batch):
    return workload(planned_graph(open_model(str(GOLDEN / name)).graph, True), batch)


mixtral = partial(work_of, "mixtral_gqa")
MIXTRAL = Batch(32, (("S", 64),))


def strategy(work, mesh, remat="none"):
    return Strategy(Layout(plan_mesh(mesh), work.experts), "local", "grouped", remat)


def total(work):
    return sum(p.count * s.flops for p in work.parts for s in p.steps)


# --- pipeline stages -----------------------------------------------------------------------


def test_the_stages_together_do_the_work_and_have_the_parameters():
    work = mixtral(MIXTRAL)
    first, last = (stage_work(work, 2, last=last) for last in (False, True))
    assert total(first) + total(last) == pytest.approx(total(work))
    assert first.parameters + last.parameters == work.parameters
    assert not first.logits
    assert last.logits == work.logits
    # A head that is tied has its own copy of the embedding.
    tied = work_of("llama_square_tied", MIXTRAL)
    ends = [stage_work(tied, 2, last=last).parameters for last in (False, True)]
    layers = sum(p.count * w.elements for p in tied.parts if p.in_layer for w in p.weights)
    table = next(w.elements for p in tied.parts if not p.in_layer for w in p.weights)
    assert min(ends) == layers // 2 + table


@pytest.mark.parametrize("parts", [2, 8])
def test_a_step_in_stages_is_its_turns_its_sends_and_one_update(parts):
    config = StepConfig(micro_batches=parts)
    work = mixtral(Batch(64 // parts, MIXTRAL.lengths))
    one = staged(work, CPU, config, strategy(work, "fsdp=8"), 2)
    assert one.turns == parts + 1
    assert one.bubble == 1 / (parts + 1)
    update = next(p.seconds for p in one.slowest.parts if p.name == "optimizer")
    turn = (one.slowest.seconds - update) / parts
    # 64 tokens a sequence of width 16, shared by four devices, in two bytes, over one link.
    sent = work.batch.tokens / 4 * 16 * 2
    assert isinstance(CPU.network, Switch)
    link = CPU.network.link_bytes_per_second
    assert one.send_seconds == pytest.approx(sent / link)
    assert one.seconds == pytest.approx((parts + 1) * (turn + 2 * sent / link) + update)


def test_a_stage_on_a_mesh_without_model_slices_no_rows():
    work = mixtral(Batch(32, MIXTRAL.lengths))
    layout = Layout(plan_mesh("expert=4,model=2"), work.experts)
    like = Strategy(layout, "ragged", "grouped", "none", sliced=True)
    step = staged(work, CPU, StepConfig(micro_batches=2), like, 2)
    chosen = step.slowest.strategy
    assert chosen.sliced == ("model" in chosen.layout.sizes)


# --- context parallelism -------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_sequences_do_the_same_products_and_gather_keys(parts):
    whole = mixtral(MIXTRAL)
    work = whole_keys(mixtral(split_batch(MIXTRAL, parts)), parts)
    assert total(work) == pytest.approx(total(whole))
    config = StepConfig()
    one = in_context(work, CPU, config, strategy(work, "data=8"), parts)
    # Eight devices share 32 sequences; two heads of keys and of values of four numbers, two bytes.
    gathered = parts * (32 * 64 / 8) * 2 * 4 * 2
    assert gathered == parts * 4096
    assert one.gathered_bytes == pytest.approx(2 * gathered)
    assert isinstance(CPU.network, Switch)
    link = CPU.network.link_bytes_per_second
    each = (gathered * (parts - 1) / parts / link + HOP_SECONDS) / efficiency("network")
    # Two layers; keys and values; forward and backward.
    assert one.gather_seconds == pytest.approx(2 * 2 * 2 * each)
    assert one.seconds == one.estimate.seconds + one.gather_seconds


# --- chunks --------------------------------------------------------------------------------


# --- the report ----------------------------------------------------------------------------

STEP = {"batch_tokens": 2048, "sequence": "32", "dtype": "f32"}


def test_ideas_are_ranked_and_the_lowered_ones_are_plans():
    model = moecc.open(str(GOLDEN / "mixtral_gqa")).apply("specialize{capacity-factor=1.25}")
    plan = model.plan("cpu:8", explore=True, **STEP)
    ideas = plan.report["explored"]
    times = [idea["seconds"] for idea in ideas if idea["seconds"] is not None]
    assert times == sorted(times)
    assert all(idea["why"] for idea in ideas)
    assert all(idea["seconds"] is None for idea in ideas[len(times) :])
    names = {idea["name"] for idea in ideas}
    assert names == {
        "accumulation", "sequence parallelism", "context parallelism", "chunked exchanges",
        "expert replication", "pipeline stages",
    }  # fmt: skip
    assert {i["name"] for i in ideas if not i["lowered"]} == {
        "context parallelism",
        "pipeline stages",
    }
    asked = 0
    for idea in (i for i in ideas if i["options"].startswith("--") and i["seconds"] is not None):
        words = idea["options"].split()
        given = dict(zip((w[2:].replace("-", "_") for w in words[::2]), words[1::2], strict=True))
        if "micro_batches" in given:
            given["micro_batches"] = int(given["micro_batches"])
            given["mesh"] = ",".join(f"{n}={s}" for n, s in plan.best["mesh"].items())
        again = model.plan("cpu:8", **STEP, **given).best
        assert again["seconds"] <= idea["seconds"] * (1 + 1e-9)
        asked += 1
    assert asked >= 3
    assert "what one would try" in str(plan)
    assert "not lowered: every device runs all layers" in " ".join(str(plan).split())
    assert "explored" in plan.report
    assert not model.plan("cpu:8", **STEP).report["explored"]


def test_what_has_no_stages_says_why():
    work = mixtral(MIXTRAL)
    with pytest.raises(InputError, match="2 equal layers are not 4 equal stages"):
        stage_work(work, 4, last=False)
    with pytest.raises(InputError, match="8 devices are not 3 machines"):
        part_of_machine(CPU, 3)
    with pytest.raises(InputError, match="1 device is not 2 machines"):
        part_of_machine(parse_machine("cpu:1"), 2)
    assert part_of_machine(parse_machine("tpu:v5p:4x4x4"), 2).devices == 32
    assert part_of_machine(parse_machine("h100x16"), 4).name == "gpu:h100:4"
    both = work_of("t5_square", Batch(8, (("S", 16), ("T", 16))))
    with pytest.raises(InputError, match="one stack of layers, not 2"):
        stage_work(both, 2, last=False)
    with pytest.raises(InputError, match="no mesh of a stage divides a micro-batch"):
        staged(mixtral(Batch(1, MIXTRAL.lengths)), CPU, StepConfig(), strategy(work, "fsdp=8"), 2)
