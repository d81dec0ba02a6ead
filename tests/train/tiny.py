"""A tiny model, tiny tokens, and a recipe for them: seconds from the first line to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from moecc.cli.main import main
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.formats.run import METRICS, saved_steps, state_reader
from moecc.ir import Graph
from moecc.model.initialise import initialise
from moecc.model.open import OpenedModel, open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.train.tokens.documents import DocumentFormat
from moecc.train.tokens.folder import TokenFacts
from moecc.train.tokens.make import Making, make_tokens
from moecc.weights.expr import sources

GOLDEN = Path(__file__).parent.parent / "golden"
DOCS = Path(__file__).parent.parent.parent / "docs"

RECIPE = """
[model]
source = "model"
pipeline = "upcycle{{experts=2 top-k=2 layers=every:2}}"
start = "random"

[data]
batch = 4
seq = {seq}
train = [{{ tokens = "tokens/train" }}]
evaluate = [{{ tokens = "tokens/heldout" }}]
evaluate_batches = 1

[optimizer]
rate = 3e-3

[run]
{run}
"""


def piped(graph: Graph, passes: str) -> Graph:
    """Run passes on a graph, in place, and return it."""
    run_pipeline(graph, Pipeline.parse(passes))
    return graph


def golden_graph(name: str, passes: str = "") -> Graph:
    """Return the graph of a golden model after passes."""
    with open_model(str(GOLDEN / name)) as model:
        return piped(model.graph, passes)


def write_lines(path: Path, *records: object) -> Path:
    """Write records as lines of JSON."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[Any]:
    """Return the values of lines of JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokenize(
    out: Path, *texts: Path, tokenizer: str = "bytes", **options: Any
) -> dict[str, TokenFacts]:
    """Write token folders of files and folders of text, and return their facts."""
    return make_tokens(Making(tuple(map(str, texts)), tokenizer, **options), out)


def tokens_of(text: str, out: Path, **options: Any) -> Path:
    """Write a text beside `out`, and its token folder as `out`."""
    source = out.with_suffix(".txt")
    source.write_text(text)
    tokenize(out, source, **options)
    return out


def make_model(folder: Path, golden: str = "llama_gqa", **changes: object) -> Path:
    """Write the config of a small model over bytes; its weights are to be drawn."""
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    layers = "num_layers" if "num_layers" in config else "num_hidden_layers"
    config |= {"vocab_size": 384, layers: 2, "max_position_embeddings": 512, **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw_weights(folder: Path) -> Path:
    """Write weights for the config in `folder`, drawn at random."""
    graph = build(parse_config(json.loads((folder / "config.json").read_text())))
    names = {n: sources(p.weight)[0].name for n, p in graph.params.items() if p.weight}
    initialise(graph)
    params = OpenedModel(graph, "drawn").params()
    arrays = {names[n]: np.ascontiguousarray(a) for n, a in params.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def masked_model(folder: Path) -> Path:
    """Write a small BERT with the head of a masked language model, and return its folder."""
    draw_weights(make_model(folder, "bert_square", architectures=["BertForMaskedLM"]))
    path, name = folder / "model.safetensors", "cls.predictions.transform"
    arrays = load_file(path)
    wide = arrays["embeddings.LayerNorm.weight"].shape * 2
    head = {f"{name}.dense.weight": wide, "cls.predictions.bias": (384,)}
    head |= {f"{name}.{n}": wide[:1] for n in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")}
    arrays = {f"bert.{n}": array for n, array in arrays.items()}
    arrays |= {n: np.ones(shape, np.float32) for n, shape in head.items()}
    save_file(arrays, path, metadata={"format": "pt"})
    return folder


def make_corpus(out: Path) -> Path:
    """Write token folders ``train`` and ``heldout`` of the documentation, as bytes."""
    form = DocumentFormat(split="paragraph")
    tokenize(out, DOCS / "tour.md", DOCS / "routing.md", format=form, hold_out=0.2)
    return out


def make_recipe(folder: Path, run: str, seq: int = 8) -> Path:
    """Write model, tokens and a recipe into `folder`, and return the recipe."""
    make_model(folder / "model")
    make_corpus(folder / "tokens")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(run=run, seq=seq))
    return path


def set_options(*settings: str) -> list[str]:
    """Return the options that replace values of a recipe."""
    return [word for setting in settings for word in ("--set", setting)]


def train(recipe: Path, out: Path, *settings: str) -> Path:
    """Train a run to its end, with some values of the recipe replaced."""
    assert main(["train", str(recipe), "--out", str(out), *set_options(*settings)]) == 0
    return out


def resume(run: Path, *settings: str) -> None:
    """Train a run from where it stopped to its end."""
    assert main(["train", "--resume", str(run), *set_options(*settings)]) == 0


def forget(run: Path, step: int) -> Path:
    """Make the checkpoints after `step` incomplete, as a kill would."""
    for saved in saved_steps(run):
        if saved.number > step:
            (saved.folder / "step.json").unlink()
    return run


def journal(run: Path) -> list[Any]:
    """Return the lines of the journal of a run."""
    return read_lines(run / METRICS)


def same_runs(run: Path, whole: Path) -> bool:
    """Return whether two runs have the same journal, and the same last state, bit for bit."""
    ours, theirs = saved_steps(run)[-1], saved_steps(whole)[-1]
    if (run / METRICS).read_bytes() != (whole / METRICS).read_bytes():
        return False
    kinds = ("params", "moments.m", "moments.v")
    keys = [f"{kind}.{name}" for name in ours.facts.tensors for kind in kinds]
    first, second = state_reader(ours.state), state_reader(theirs.state)
    return ours.number == theirs.number and all(
        np.array_equal(first.read(key), second.read(key)) for key in keys
    )


def restored(
    encoder: np.ndarray, decoder: np.ndarray, sentinels: tuple[int, ...], end: int | None
) -> np.ndarray:
    """Return the sequence that spans were hidden of: the inverse of `Spans.apply`."""
    spans = {}
    current = []
    for token in decoder.tolist():
        if token in sentinels:
            current = spans.setdefault(token, [])
        elif token != end:
            current.append(token)
    ids = []
    for token in encoder.tolist():
        if token != end:
            ids += spans.get(token, [token] if token not in sentinels else [])
    return np.asarray(ids, np.int32)
