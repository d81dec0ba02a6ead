"""Forecasts: crossings of curves that are known, and the answers of the command."""

import re
import shlex
import shutil
from itertools import pairwise
from math import inf

import numpy as np
import pytest

from moecc.jobs.forecast import PILOT_STEPS, Pilot, crossing_of, refusals
from moecc.train.recipe_text import load_recipe

from .tiny import (
    GOLDEN,
    RECIPE,
    draw_weights,
    make_corpus,
    make_model,
    train,
    write_lines,
)

BEHIND, STEPS, WARMUP = 400, 300, 10
PIPELINE = "upcycle{experts=2 top-k=2 layers=every:2}"


def pilots(start, slope, fall=0.25, seeds=3):
    """Return curves whose gain is a line; the noise of batches is in both arms."""
    curves = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        at = np.arange(1.0, STEPS + 1)
        dense = 3 - fall * np.log(BEHIND + at) + rng.normal(0, 0.03, STEPS)
        curves.append(Pilot(dense, dense - start - slope * at + rng.normal(0, 0.01, STEPS)))
    return curves


def test_at_equal_tokens_the_arms_cross_where_the_gain_is_zero():
    crossing = crossing_of(pilots(-0.03, 1e-4), BEHIND, 1.0, WARMUP)
    assert crossing.steps == pytest.approx(300, rel=0.1)
    assert crossing.low < 300 < crossing.high
    assert crossing.slope == pytest.approx(1e-4, rel=0.15)


def test_at_equal_compute_the_dense_arm_is_allowed_more_steps():
    crossing = crossing_of(pilots(-0.03, 2e-4), BEHIND, 1.5, WARMUP)
    steps = crossing.steps
    worth = 0.25 * np.log((BEHIND + 1.5 * steps) / (BEHIND + steps))
    assert -0.03 + 2e-4 * steps == pytest.approx(worth, abs=8e-3)
    assert steps > crossing_of(pilots(-0.03, 2e-4), BEHIND, 1.0, WARMUP).steps


def test_what_is_made_up_at_once_is_no_slope():
    # As with a capacity factor of 1.25: most of 0.4 is made up in 50 steps, and little after it.
    drops = [
        Pilot(p.dense, p.sparse + 0.25 * np.exp(-np.arange(STEPS) / 20)) for p in pilots(-0.2, 2e-4)
    ]
    assert crossing_of(drops, BEHIND, 1.0, WARMUP).steps == pytest.approx(1000, rel=0.25)


def test_a_gain_that_does_not_grow_never_crosses():
    crossing = crossing_of(pilots(-0.03, -1e-5), BEHIND, 1.2, WARMUP)
    assert (crossing.steps, crossing.high) == (inf, inf)
    assert crossing.slope_low < 0


def test_a_dense_arm_that_diverges_is_no_reason_to_upcycle():
    crossing = crossing_of(pilots(-0.03, 2e-3, fall=-0.5), BEHIND, 1.2, WARMUP)
    reasons = list(refusals(crossing, STEPS, 3, inf, inf))
    assert [why for why, _ in reasons] == ["the loss of the pilot's dense arm does not fall"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Make both arms of two seeds; the second seed is the first one with other losses."""
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("arms")
    draw_weights(make_model(folder / "model"))
    make_corpus(folder / "tokens")
    recipe = folder / "r.toml"
    recipe.write_text(RECIPE.format(run="steps = 60", seq=32).replace('start = "random"', ""))
    for arm, settings in (("dense", ["model.pipeline=''"]), ("sparse", [])):
        run = train(recipe, folder / f"{arm}-0", *settings)
        copied = shutil.copytree(run, folder / f"{arm}-1") / "recipe.toml"
        before, section, after = copied.read_text().partition("[data]")
        copied.write_text(before + section + after.replace("seed = 0", "seed = 1", 1))
    return folder


def write_losses(folder, start, slope):
    """Write the losses of `pilots` into the journals, and return the runs as options."""
    options = []
    for seed, pilot in enumerate(pilots(start, slope, seeds=2)):
        for arm, losses in (("dense", pilot.dense), ("sparse", pilot.sparse)):
            run = folder / f"{arm}-{seed}"
            lines = (
                {"step": n, "tokens": 128 * n, "loss": x, "loss.cross_entropy": x}
                for n, x in enumerate(losses.tolist()[:60], 1)
            )
            write_lines(run / "metrics.jsonl", *lines)
            options += ["--pilot", run]
    return options


@pytest.mark.slow
def test_the_command_says_yes_or_why_not(arms, moecc):
    def answer(*options):
        done = moecc("forecast", arms / "model", "--tokens", 400 * 128, "-p", PIPELINE, *options,
                     "--format", "json")  # fmt: skip
        assert done.code == 0
        facts = done.json()
        return facts["worth_it"], facts, " ".join(x["reason"] for x in facts["reasons"])

    def check_refused(message, *options):
        done = moecc("forecast", arms / "model", "--tokens", 1, *options)
        assert done.code == 1
        assert message in done.err

    no, facts, why = answer()
    assert (no, facts["crossing"], why) == (False, None, "there is no pilot")
    runs = write_losses(arms, -0.06, 2e-3)
    is_worth, facts, why = answer(*runs, "--budget", "1e18")
    assert (is_worth, why) == (True, "")
    assert facts["crossing"]["tokens"] == pytest.approx(33 * 128, rel=0.2)
    text = facts["pilot"]["text_tokens"]
    later = write_losses(arms, -2e-3 * text / 128 * 3, 2e-3)
    assert "the text would be read" in answer(*later)[2]
    write_losses(arms, -0.06, 2e-3)
    assert "the budget is" in answer(*runs, "--budget", "1e6")[2]
    assert "one seed" in answer(*runs[:4])[2]
    assert "interval holds 0" in answer(*write_losses(arms, -0.01, 0.0))[2]
    check_refused("an arm of the pilot is alone", *runs[:2])
    check_refused("the pilot's sparse arm is another model", *runs)
    runs += ["-p", PIPELINE]
    check_refused("does not divide among the devices", *runs, "--machine", "gpu:h100:64")
    recipe = arms / "sparse-1" / "recipe.toml"
    text = recipe.read_text()
    for before, after, name in (
        ("rate = 0.003", "rate = 0.03", "optimizer.rate"),
        ("tokens/train", "tokens/heldout", "data.train"),
        ('/model"', '/another"', "model.source"),
        ('name = "adamw"', 'name = "adafactor"', "optimizer.name"),
        ("packing = true", "packing = false", "data.packing"),
    ):
        recipe.write_text(text.replace(before, after, 1))
        check_refused(f"the runs of the pilot differ in {name}", *runs)
    recipe.write_text(text.replace('"source"', '"random"', 1))
    check_refused("the pilot begins from random parameters", *runs)
    recipe.write_text(text)
    journal = arms / "sparse-1" / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    for changed, message in (
        (lines[:40], "50 steps: 0 of warm-up, which are left out, and 50 at a constant rate"),
        ([x.replace("loss.cross_entropy", "loss.other") for x in lines], "no loss.cross_entropy"),
        (lines[10:], "step 11 after step 0"),
        (lines[:20] + lines[31:], "step 32 after step 20"),
    ):
        journal.write_text("".join(changed))
        check_refused(message, *runs)
    runs = write_losses(arms, -0.06, 2e-3)
    pytest.importorskip("plotly")
    page = arms / "page.html"
    answer(*runs, "--html", page)
    assert "Both arms at equal compute" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "nan"), "--budget is no amount"),
        (("--budget", "-5h"), "--budget is no amount"),
        (("--budget", "much"), "--budget is no amount"),
        (("--budget", "5h"), "--budget in device-hours needs --machine"),
        (("--price", "2"), "--price has no device-hours to price"),
        (("-p", "dce"), "--pipeline adds no experts"),
    ],
)
def test_what_cannot_be_asked(options, message, moecc):
    done = moecc("forecast", "preset:smollm2-135m", "--tokens", "1e9", *options)
    assert (done.code, message in done.err) == (2, True), done.err


def test_mixtures_and_models_of_images_are_refused(moecc):
    words = ("forecast", "preset:mixtral-8x7b", "--tokens", "1e12")
    done = moecc(*words)
    assert (done.code, "the model has experts already" in done.err) == (1, True)
    assert moecc(*words, "-p", "grow{times=2 chosen=same}").code == 0
    done = moecc("forecast", GOLDEN / "vit_plain", "--tokens", "1e9")
    assert (done.code, "an input named tokens" in done.err) == (1, True)


def test_a_pilot_has_a_price(moecc):
    words = ("preset:smollm2-135m", "--machine", "gpu:h100:8")
    done = moecc("forecast", *words, "--tokens", "2e12", "--price", 1000)
    assert done.code == 0
    said = r"with ([\d,]+) tokens a step ([\d.]+) device-hours of gpu:h100:8, which cost ([\d.]+)"
    tokens, hours, cost = re.search(said, done.out).groups()
    assert float(cost) == pytest.approx(1000 * float(hours), rel=0.01)
    assert f"{moecc.plan(*words)['batch']['tokens']:,}" == tokens
    sets = (
        f"run.steps={PILOT_STEPS}", "optimizer.warmup=10", "optimizer.schedule=constant",
        "data.seq=4096", f"data.batch={int(tokens.replace(',', '')) // 4096}",
        "'model.pipeline=upcycle{experts=16", "model.source=FOLDER", "run.dtype=bf16",
    )  # fmt: skip
    assert [text for text in sets if f"--set {text}" not in done.out] == []
    lines = [line.split(None, 1)[1] for line in done.out.splitlines() if line.startswith("  pilot")]
    *trainings, last = map(shlex.split, lines)
    outs = [words[words.index("--out") + 1] for words in trainings]
    assert [word for before, word in pairwise(last) if before == "--pilot"] == outs
    assert [f"data.seed={n}" in words for n in (0, 1) for words in trainings] == [
        True, True, False, False, False, False, True, True,
    ]  # fmt: skip
    for training in trainings:
        sets = [word for before, word in pairwise(training) if before == "--set"]
        recipe = load_recipe(training[2], sets)
        assert recipe.optimizer.decay_steps == 0
        assert bool(recipe.model.pipeline) == (training[2] == "recipe:upcycle")
        assert recipe.data.train[0].tokens.endswith("TRAIN")
    # Recipes pack documents: attention takes their segments, which cuDNN's does not.
    facts = moecc("forecast", *words, "--tokens", "2e12", "--format", "json").json()
    for arm, passes in (
        ("dense", "pack-segments"),
        ("sparse", f"{facts['pipeline']},pack-segments"),
    ):
        packed = moecc.plan(*words, "-p", passes)["best"]["seconds"]
        assert facts[arm]["device_hours"] == pytest.approx(packed * 8 / 3600)


def test_a_model_with_a_short_context_has_sequences_of_its_length(moecc):
    """A pilot's sequences are those that it trained on."""
    done = moecc("forecast", GOLDEN / "llama_gqa", "--tokens", "1e9", "--format", "json")
    assert done.json()["sequence"] == 64
