"""``moecc plan`` through the command line: the plan, its picture, and what bad input gets."""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.layouts import layout_text

GOLDEN = Path(__file__).parents[1] / "golden"
MIXTRAL = ("preset:mixtral-8x7b", "--machine", "tpu:v5p:4x4x4")


def test_the_paper_s_model_fits_with_its_dense_weights_split_and_not_whole_with_moments(
    moecc,
):
    given = (
        "preset:st-moe-32b", "--machine", "tpu:v4:8x8x8", "--batch-tokens", "1282048",
        "--mesh", "data=64,model=16", "--remat", "full",
    )  # fmt: skip
    small = ("--optimizer", "adafactor")
    best = moecc.plan(*given, *small, "--dense-weights", "split")["best"]
    assert best["fits"]
    assert best["via"] == "capacity"
    code, out, err = moecc("plan", *given, "--dense-weights", "whole")
    assert (code, out) == (1, "")
    assert "does not fit" in err
    assert "16.37 GB a device" in err


def test_the_best_is_the_fastest_and_its_seconds_and_bytes_add_up(moecc):
    report = moecc.plan(*MIXTRAL)
    best = report["best"]
    assert sum(best["seconds_by_kind"].values()) == pytest.approx(best["seconds"])
    assert sum(p["seconds"]["total"] for p in best["parts"]) == pytest.approx(best["seconds"])
    memory = best["memory_bytes"]
    assert sum(memory.values()) == pytest.approx(best["total_bytes"])
    assert best["arguments_bytes"] + best["temporary_bytes"] == pytest.approx(best["total_bytes"])
    sent = [t["times"] * t["sent_bytes"] for p in best["parts"] for t in p["transfers"]]
    assert sum(sent) == pytest.approx(sum(c["sent_bytes"] for c in best["collectives"].values()))
    times = [best["seconds"], *(o["seconds"] for o in report["others"])]
    assert times == sorted(times)
    assert all(o["why_slower"] for o in report["others"])
    for other in report["others"][:2]:
        mesh = ",".join(f"{n}={s}" for n, s in other["mesh"].items())
        fixed = ["--mesh", mesh, "--remat", other["remat"]]
        fixed += ["--dense-weights", other["dense_weights"], "--via", other["via"]]
        again = moecc.plan(*MIXTRAL, *fixed)["best"]
        assert again["seconds"] == pytest.approx(other["seconds"])


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--machine", "tpu:v5q:4x4x4"), 2, ["unknown machine", "tpu:v4|v5e|v5p|v6e|tpu7x"]),
        (("--mesh", "fsdp=64,experts=1"), 2, ["unknown mesh axis", "did you mean 'expert'"]),
        (("--mesh", "fsdp=8"), 1, ["64 devices of tpu:v5p:4x4x4", "fsdp=64 would"]),
        (("--mesh", "expert=8"), 1, ["fsdp=8,expert=8 would"]),
        (("--mesh", "fsdp=4,expert=16"), 1, ["more devices for experts than experts", "8 would"]),
        (("--mesh", "fsdp=4,model=16"), 1, ["does not divide the axis kv_head", "8 would"]),
        (("--batch-tokens", "5000"), 1, ["a multiple of 4096 tokens", "4096 would be"]),
        (("--batch-tokens", "4096", "--mesh", "fsdp=64"), 1, ["does not divide the batch"]),
        (("--sequence", "512,114"), 1, ["another number of sequence lengths"]),
        (("--sequence", "-1"), 2, ["not lengths of a sequence"]),
        (("--optimizer", "sgd"), 2, ["adafactor"]),
        (
            ("--mesh", "fsdp=64", "--via", "ring"),
            1,
            ["1 device cannot be reached via ring", "no --via"],
        ),
    ],
)
def test_bad_input_gets_one_message(moecc, args, code, says):
    given = args if "--machine" in args else ("--machine", "tpu:v5p:4x4x4", *args)
    found, out, err = moecc("plan", "preset:mixtral-8x7b", *given)
    assert (found, out) == (code, "")
    for words in says:
        assert words in err


def test_a_run_has_days_and_a_price(moecc, tmp_path):
    small = (str(GOLDEN / "mixtral_gqa"), "--machine", "cpu:2", "--batch-tokens", "64",
             "--sequence", "16")  # fmt: skip
    report = moecc.plan(*small, "--tokens", "1000", "--price", "2")
    seconds = report["best"]["seconds"]
    hours = 2 * 16 * seconds / 3600
    assert report["run"] == {
        "tokens": 1000, "steps": 16, "days": pytest.approx(16 * seconds / 86400),
        "device_hours": pytest.approx(hours), "price": 2, "cost": pytest.approx(2 * hours),
    }  # fmt: skip
    assert moecc.plan(*small, "--tokens", "0.001M", "--price", "2")["run"] == report["run"]
    counted = ("--batch-tokens", "0.064k", "--tokens", "1e3", "--price", "2")
    assert moecc.plan(*small, *counted)["run"] == report["run"]
    text = moecc("plan", *small, "--tokens", "1000", "--price", "2")[1]
    assert f"1.0 K tokens: 16 steps, {16e3 * seconds:.1f} ms, {hours:.3g} device hours" in text
    assert f", {2 * hours:.3g} at 2 an hour" in " ".join(text.split())
    page = tmp_path / "plan.html"
    run = ("--tokens", "1000", "--price", "2", "--explore", "--html", page)
    assert moecc("plan", *small, *run).code == 0
    for words in ("16 steps", "at 2 an hour", "What one would try", "expert replication"):
        assert words in page.read_text()
    parts = moecc.plan(*small, "--micro-batches", "2")["batch"]
    assert parts == report["batch"] | {"micro_batches": 2}


def test_a_run_is_told_what_packed_documents_cost(moecc):
    """Attention takes their segments, which cuDNN's does not."""
    words = ("plan", "preset:smollm2-135m", "--machine", "gpu:h100:8", "--tokens", "1B")
    note = r"note: with packed documents.* a step takes ([\d.]+ ms): -p '…,pack-segments"
    seconds = re.search(note, moecc(*words).err)[1]
    packed = moecc(*words, "-p", "pack-segments{documents=several}")
    assert f"  step        {seconds}," in packed.out
    for others in (packed, moecc(*words[:-2]), moecc(*words, "--step", "forward")):
        assert (others.code, "packed documents" in others.err) == (0, False), others.err


def test_ideas_are_commands_that_say_what_they_lose(moecc):
    passes = "upcycle{experts=8 top-k=2}"
    words = ("preset:llama-3.1-8b", "-p", passes, "--machine", "gpu:h100:64")
    given = ("--batch-tokens", "524288", "--optimizer", "adafactor", "--via", "ragged")
    ideas = moecc.plan(*words, "--explore")["explored"]
    (chunks,) = (x for x in ideas if x["name"] == "chunked exchanges" and x["seconds"])
    assert "via capacity" in chunks["how"]
    assert chunks["why"].endswith("; rows beyond 1.25 times the mean may be lost")
    (copies,) = (x for x in ideas if x["name"] == "expert replication")
    assert (copies["why"], copies["command"]) == ("the best plan itself", "")
    text = moecc("plan", *words, *given, "--explore").out
    commands = [line.strip() for line in text.splitlines() if " moecc plan " in line]
    assert commands
    for command in commands:
        called = shlex.split(command)[2:]
        assert called[:5] == ["preset:llama-3.1-8b", "--machine", "gpu:h100:64", "-p", passes]
        assert all(called.count(word) == 1 for word in given[::2])
        assert moecc("plan", *called).code == 0


def test_rules_without_groups_get_a_note_and_misspelt_ones_a_message(moecc, tmp_path):
    small = (GOLDEN / "mixtral_gqa", "--machine", "cpu:4", "--batch-tokens", "64",
             "--sequence", "16", "--mesh", "data=4")  # fmt: skip
    rules, group = ["batch = data", "expert with slot = data"], "group = data"
    file = tmp_path / "my.rules"
    for lines, noted in ((rules, True), ([*rules, group], False)):
        file.write_text(layout_text(*lines))
        code, _, err = moecc("plan", *small, "--rules", file)
        assert (code, "not its token groups" in err) == (0, noted), err
    file.write_text(layout_text(*rules, group, "param embde = data"))
    code, _, err = moecc("plan", *small, "--rules", file)
    assert (code, "did you mean 'embed'?" in err) == (1, True), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--price", "2"), "--price has no run to price"),
        (("--tokens", "nan"), "'nan' is not a number: 4096, 4M or 2e12"),
        (("--tokens", "inf"), "'inf' is not a number"),
        (("--tokens", "1e999"), "the number is more than 1e+30"),
        (("--batch-tokens", "9e99T"), "the number is more than 1e+30"),
        (("--tokens", "1_"), "'1_' is not a number"),
        (("--tokens", "0.5"), "0.5 is less than 1"),
        (("--batch-tokens", "0.5"), "'0.5' is not a whole number"),
        (("--batch-tokens", "4Q"), "'4Q' is not a whole number"),
        (("--price", "2", "--sweep", "experts=1"), "--price is about one plan"),
        (("--tokens", "10", "--sweep", "experts=1"), "--tokens is about one plan"),
    ],
)
def test_runs_that_cannot_be_priced(options, message, moecc):
    code, _, err = moecc("plan", str(GOLDEN / "mixtral_gqa"), "--machine", "cpu:2", *options)
    assert (code, message in err) == (2, True), err
