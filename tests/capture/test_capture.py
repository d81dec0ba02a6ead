"""`moecc capture`, and conversions that read its statistics, on a tiny model."""

import json
import shutil

import numpy as np
import pytest
from moecc_passes.resized_layer import alike, shared_out
from safetensors.numpy import load_file, save_file
from tiers import few

from moecc.backend import get_backend
from moecc.cli.main import main
from moecc.jobs.evaluate import EvaluationSpec, Tracing
from moecc.model.initialise import BlockSums, open_capture
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.tokens.folder import open_tokens
from tests.train.tiny import DOCS, draw_weights, make_model, make_recipe

from .rounding import UNIT, assert_within, bounds_of_block

TEXTS = {"tour": DOCS / "tour.md", "routing": DOCS / "routing.md"}
SMALL = ("--sequence", "24", "--batch", "4", "--batches", "2")
UP = "model.layers.1.mlp.up_proj.weight"
SPLIT = "upcycle{split=activation experts=4}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return draw_weights(make_model(tmp_path_factory.mktemp("model") / "model"))


def captured(model, out, *more):
    texts = [word for name, path in TEXTS.items() for word in ("--text", f"{name}={path}")]
    assert main(["capture", str(model), *texts, "--out", str(out), *SMALL, *more]) == 0
    return out


@pytest.fixture(scope="module")
def statistics(model, tmp_path_factory):
    return captured(model, tmp_path_factory.mktemp("statistics") / "captured")


@pytest.mark.slow
def test_a_run_over_bytes_encodes_texts_as_bytes(tmp_path):
    recipe, run, ids = make_recipe(tmp_path, "steps = 1"), tmp_path / "run", tmp_path / "ids"
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    captured(run, tmp_path / "captured")
    text = str(TEXTS["tour"])
    assert main(["tokens", text, "--tokenizer", str(run), "--out", str(ids)]) == 0
    whole = open_tokens(str(ids))
    assert whole.ids(0, whole.facts.tokens).tolist() == list(TEXTS["tour"].read_bytes())


def convert(model, out, passes, statistics=None, *more, code=0):
    """Convert a model, by statistics if there are any; return where it is written."""
    command = ["convert", str(model), str(out), "-p", passes, "--to", "st_moe", *more]
    capture = ["--capture", str(statistics)] if statistics else []
    assert main([*command, *capture]) == code
    return out


def tensors(folder):
    return load_file(folder / "model.safetensors")


def read_receipt(folder):
    return json.loads((folder / "moecc_receipt.json").read_text())


def of_experts(folder, name, layer=1):
    """Return a statistic of the experts of a layer."""
    return open_capture(folder)[0].read(f"layers.{layer}.ffn.experts.{name}").astype(float)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_text_that_does_not_suit_a_model_without_a_tokenizer_is_named(tmp_path, capsys):
    words = ["--text", str(TEXTS["tour"]), "--out", str(tmp_path / "x")]
    assert main(["capture", "tests/golden/llama_gqa", *words]) == 1
    assert capsys.readouterr().err.startswith("error: text 'tour', as bytes: there are ids beyond")


def test_the_statistics_are_those_of_the_values(model, tmp_path, out):
    """The values of the reference interpreter on the same tokens, put through the same sums."""
    tokens, text = tmp_path / "tokens", tmp_path / "text.txt"
    text.write_text(TEXTS["tour"].read_text()[:150])
    assert main(["tokens", str(text), "--tokenizer", "bytes", "--out", str(tokens)]) == 0
    how = ["--text", str(tokens), "--sequence", "180", "--batch", "1", "--active", "0.2"]
    assert main(["capture", str(model), *how, "--out", str(out), "--at", "layers.1.*"]) == 0
    found, facts = open_capture(out)
    assert {name.split(".ffn")[0] for name in found.tensors} == {"layers.1"}
    x, hidden = values(model, open_tokens(str(tokens)))
    assert facts.tokens == len(x) >= 150
    sums = BlockSums(1, x.shape[1], hidden.shape[1], 0.2)
    sums.add(0, x, hidden)
    # A value came through two layers, each of seven products, two norms and two additions.
    bounds = bounds_of_block(x, hidden, roundings=22)
    for name, expected in sums.statistics().items():
        measured = found.read(f"layers.1.ffn.{name}")
        if name == "hidden.pairs":
            # Values that are as large as the border in float64 need not be in float32.
            assert np.abs(measured - expected).sum() <= 0.01 * expected.sum()
        else:
            assert_within(measured, expected, bounds[name])


def values(model, folder):
    """Return the input and the hidden value of the last block, ``[tokens, …]``."""
    with open_model(str(model)) as opened:
        spec = EvaluationSpec(seq=180, batch=1)
        batch = Tracing.of(opened, opened.graph, folder, spec).held_out.batch(0)
        ids = batch["tokens"][batch["segments"] > 0]
        run_pipeline(opened.graph, Pipeline.parse("trace-values"))
        program = get_backend("reference").compile(opened.graph)
        outputs = program.run(opened.params(), {"tokens": ids[None]})
        x, hidden = (outputs[f"values.layers.1.ffn.{n}"][0] for n in ("input", "hidden"))
    return x, hidden


THIRD = "0.3333333333333333"


@pytest.mark.parametrize(
    ("split", "init", "shared"),
    [("index", "normal", "0"), ("random", "centroids", THIRD), ("activation", "ridge", THIRD)],
)
def test_all_parts_of_a_split_are_the_block(model, out, statistics, split, init, shared):
    """With every part and gates of one, nothing is lost: the conversion verifies itself."""
    passes = f"upcycle{{experts=4 top-k=4 shared={shared} gates=ones "
    passes += f"split={split} router-init={init}}}"
    convert(model, out, passes, statistics, "--verify")
    assert read_receipt(out)["promised"]["kind"] == "reassociation"
    assert main(["verify", str(out)]) == 0


def test_a_split_stores_each_neuron_once(model, out, statistics):
    """The rows of the experts are those of the dense block, in one order for all three."""
    passes = "upcycle{experts=4 top-k=2 gates=ones split=activation}"
    dense, sparse = tensors(model), tensors(convert(model, out, passes, statistics))
    orders = []
    for word in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.{word}_proj.weight"
        old, new = dense[name], sparse[name]
        if word == "down":
            old, new = old.T, new.transpose(0, 2, 1)
        rows = new.reshape(-1, new.shape[-1])
        orders.append([int(np.flatnonzero((old == row).all(1))[0]) for row in rows])
    assert sorted(orders[0]) == list(range(len(orders[0])))
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != sorted(orders[0])


def test_the_same_bytes_again_and_killed(model, tmp_path, statistics):
    passes = "upcycle{experts=4 top-k=2 split=activation router-init=ridge}"
    first, second = (convert(model, tmp_path / name, passes, statistics) for name in ("a", "b"))
    for file in ("model.safetensors", "config.json", "moecc_receipt.json", "README.md"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert "--capture STATISTICS" in (first / "README.md").read_text()
    assert "capture/model.safetensors" in (first / "moecc_manifest.json").read_text()


@pytest.fixture(scope="module")
def mixture(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixture") / "mixture"
    return convert(model, out, "upcycle{experts=4 top-k=2 init=noise noise-std=0.5 router-std=1.0}")


@pytest.fixture(scope="module")
def seen(mixture, tmp_path_factory):
    return captured(mixture, tmp_path_factory.mktemp("mixture") / "seen")


def largest(values, count):
    """Return the positions of the largest values, in order."""
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())


@pytest.mark.parametrize("by", few(["saliency", "share"]))
def test_the_most_important_experts_stay(mixture, seen, out, by):
    pruned = tensors(convert(mixture, out, f"prune{{keep=2 by={by}}}", seen))
    kept = largest(of_experts(seen, by), 2)
    assert np.array_equal(pruned[UP], tensors(mixture)[UP][kept])


def test_a_budget_of_the_model_is_shared_out(mixture, seen, out):
    pruned = tensors(convert(mixture, out, "prune{keep=3 by=share budget=model}", seen))
    shares = [of_experts(seen, "share", layer) for layer in (0, 1)]
    counts = shared_out(shares, [2, 2], 6)
    for layer, (share, count) in enumerate(zip(shares, counts, strict=True)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert np.array_equal(pruned[name], tensors(mixture)[name][largest(share, count)])


def test_the_most_useful_experts_are_copied(mixture, seen, out):
    convert(mixture, out, "append-expert{count=5 by=share}", seen)
    share = of_experts(seen, "share")
    new, old = tensors(out)[UP][4:], tensors(mixture)[UP]
    numbers = [next(n for n in range(4) if np.array_equal(row, old[n])) for row in new]
    counts = np.bincount(numbers, minlength=4)
    # No copy is worth more at an expert that was not copied again.
    assert (share / (counts + 1)).max() <= (share / np.maximum(counts, 1))[counts > 0].min()
    assert read_receipt(out)["proof"]["verdict"] == "proved"


def test_experts_of_like_results_become_one(mixture, seen, out):
    merged = tensors(convert(mixture, out, "merge{size=2 by=result}", seen))
    groups = alike(of_experts(seen, "result"), 2)
    means = np.stack([tensors(mixture)[UP][list(group)].mean(0) for group in groups])
    # The mean of two: the sum is rounded, and halving it is exact.
    np.testing.assert_allclose(merged[UP], means, rtol=UNIT)


def test_groups_of_like_results():
    results = np.array([[0.0], [9.0], [0.1], [9.2], [4.0], [4.3]])
    assert alike(results, 2) == [(0, 2), (1, 3), (4, 5)]
    # The nearest two, 0 and 2, are joined by the nearest that is left.
    assert alike(results, 3) == [(0, 2, 4), (1, 3, 5)]


# --- bad input


@pytest.fixture
def refused(out, capsys):
    """Return what is said of a conversion that is refused."""

    def run(model, statistics, passes=SPLIT):
        convert(model, out, passes, statistics, code=1)
        assert not out.exists()
        return capsys.readouterr().err

    return run


def test_changed_and_missing_statistics(model, tmp_path, statistics, refused):
    own = shutil.copytree(statistics, tmp_path / "own")
    data = bytearray((own / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (own / "model.safetensors").write_bytes(data)
    assert "changed after they were written" in refused(model, own)
    facts = own / "capture.json"
    recorded = json.loads(facts.read_text())
    facts.write_text("{}")
    assert "moecc.capture/1" in refused(model, own)
    facts.unlink()
    assert "not a folder of statistics" in refused(model, own)
    for key in ("texts", "tokens", "active"):
        facts.write_text(json.dumps(recorded | {key: "x"}))
        assert f"capture.json: {key}" in refused(model, own)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--at", "nowhere.*"], 1, "no feed-forward block or layer of experts is there"),
        (["--active", "1.5"], 2, "not a share of neurons"),
        (["--text", "tour=again.md"], 2, "two texts have the same name"),
        (["--text", "absent.md"], 1, "absent.md"),
        (["-p", "upcycel"], 2, "upcycel"),
    ],
)
def test_bad_input(model, out, more, code, words, capsys):
    command = ["capture", str(model), "--text", f"tour={TEXTS['tour']}", "--out", str(out)]
    assert main([*command, *SMALL, *more]) == code
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_statistics_of_other_layers_and_texts(model, tmp_path, statistics, refused):
    first = captured(model, tmp_path / "first", "--at", "layers.0.*")
    missing = "layers.1.ffn: the statistics have no hidden.pairs of this location"
    assert missing in refused(model, first)
    said = refused(model, statistics, "upcycle{router-init=ridge experts=4}")
    assert "each copy has a text" in said
    assert "tour, routing" in said


def test_statistics_of_another_model(model, tmp_path, statistics, refused):
    other = shutil.copytree(model, tmp_path / "other")
    changed = tensors(other)
    changed[UP] += np.float32(1)
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    assert "of another model" in refused(other, statistics)
