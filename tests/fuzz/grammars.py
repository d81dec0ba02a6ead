"""What is fuzzed: each grammar has seeds, a mutator, and a function that executes one input.

An execution may raise moecc's own errors, and nothing else; where an input is accepted, it checks
what holds of every valid one: what is printed parses back to the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

from moecc.errors import InputError

from . import seeds
from .mutate import Mutator, Rng, mutate_bytes, mutate_json, mutate_text


@dataclass(frozen=True)
class Grammar:
    """A grammar.

    Attributes:
      name: of it.
      seeds: returns valid inputs.
      mutate: makes an input of another.
      run: executes one input.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutator
    run: Callable[[bytes], None]


class Broken(AssertionError):
    """An input was accepted, and what holds of every valid one does not hold of it."""


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("not UTF-8") from None


def _seldom(data: bytes, share: int) -> bool:
    """Whether this input is one of every `share`, for what takes long."""
    return crc32(data) % share == 0


@cache
def _folder() -> Path:
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = tempfile.TemporaryDirectory(prefix="moecc-fuzz-", dir=root)
    _kept.append(made)
    return Path(made.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, data: bytes) -> Path:
    path = _folder() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


# --- texts


def run_graph(data: bytes):
    """Parse a graph, verify it, and print it."""
    from moecc.ir.text import parse, print_graph
    from moecc.ir.verify import verify

    graph = parse(_text(data))
    verify(graph)
    printed = print_graph(graph)
    if print_graph(parse(printed)) != printed:
        raise Broken("the printed graph is another one")


def run_pipeline(data: bytes):
    """Parse a pipeline, print it; now and then run it on a tiny model."""
    from moecc.rewrite.pipeline import Pipeline

    text = _text(data)
    found = Pipeline.parse(text)
    found.warnings()
    if Pipeline.parse(str(found)) != found or Pipeline.parse(found.in_full()) != found:
        raise Broken("the printed pipeline is another one")
    if _seldom(data, 40) and len(found) < 6:
        _apply(found)


def _apply(pipeline):
    from moecc.ir.structure import clone
    from moecc.rewrite.passes import Context
    from moecc.rewrite.runner import run_pipeline

    run_pipeline(clone(_tiny()), pipeline, context=Context(allow_unmatched=True))


@cache
def _tiny():
    from moecc.families import build
    from moecc.families.registry import parse_config

    config = json.loads((seeds.GOLDEN / "llama_gqa" / "config.json").read_text())
    return build(parse_config({**config, **seeds.TINY, "num_hidden_layers": 2}))


def run_weight(data: bytes):
    """Parse a weight expression, print, simplify and, if it is small, evaluate it."""
    from moecc.testing.weights import stored_sources
    from moecc.weights.evaluate import evaluate
    from moecc.weights.expr import walk
    from moecc.weights.simplify import simplify
    from moecc.weights.text import parse_expr

    text = _text(data)
    expr, _ = parse_expr(text)
    printed = str(expr)
    if str(parse_expr(printed)[0]) != printed:
        raise Broken("the printed expression is another one")
    simple = simplify(expr)
    nodes = [node.type.shape for node in walk(expr)]
    if len(nodes) > 200 or any(prod(shape) > 4096 or len(shape) > 8 for shape in nodes):
        return
    read = stored_sources((expr,), 0)
    one, other = evaluate(expr, read), evaluate(simple, read)
    if one.tobytes() != other.tobytes():
        raise Broken(f"simplified to {simple}, which has other bytes")


def run_rules(data: bytes):
    """Parse the rules of a layout, and print them; now and then plan with them."""
    from moecc.ir.mesh import parse_mesh
    from moecc.sharding.layout import Layout
    from moecc.sharding.rules import parse_layout

    found = parse_layout(_text(data), "my.rules")
    again = parse_layout(f"rules = [{','.join(rule.toml for rule in found)}]", "my.rules")
    if list(map(str, again)) != list(map(str, found)):
        raise Broken("the printed rules are others")
    if _seldom(data, 20) and len(found) < 50:
        path = _file("my.rules", data)
        layout = Layout.ruled(parse_mesh("data=2,model=2"), 4, (str(path),))
        _ = layout.shards, layout.used


def run_machine(data: bytes):
    """Parse a machine and a mesh."""
    from moecc.plan.machines import parse_machine
    from moecc.plan.step import plan_mesh

    text = _text(data)
    if ":" not in text or "=" in text or text.startswith("data"):
        mesh = plan_mesh(text)
        if plan_mesh(str(mesh)) != mesh:
            raise Broken("the printed mesh is another one")
        return
    made = parse_machine(text)
    if made.devices < 1 or made.usable_bytes < 1:
        raise Broken("a machine without devices")


def run_recipe(data: bytes):
    """Parse a recipe, and write it."""
    from moecc.train.recipe_text import parse_recipe, write_recipe

    found = parse_recipe(_text(data), "recipe.toml", folder=Path("/r"))
    if parse_recipe(write_recipe(found), "again.toml", folder=Path("/r")) != found:
        raise Broken("the recipe that is written is another one")


def run_card(data: bytes):
    """Read the front matter of a model card."""
    from moecc.formats.modelcard import front_matter

    front_matter(_text(data))


# --- files


def run_safetensors(data: bytes):
    """Read the header of a safetensors file, and its small tensors."""
    from moecc.formats.folder import SafetensorsFolder
    from moecc.formats.safetensors import read_header

    path = _file("model.safetensors", data)
    header = read_header(path)
    with SafetensorsFolder(path.parent, {}, {path: header}, {}) as folder:
        for name, info in list(folder.tensors.items())[:4]:
            if folder.read(name).nbytes != info.nbytes:
                raise Broken("a tensor of another size")


def run_index(data: bytes):
    """Read the index of a sharded checkpoint."""
    from moecc.errors import Problems
    from moecc.formats.safetensors import read_index

    problems = Problems()
    read_index(_file("model.safetensors.index.json", data), problems)
    problems.raise_if_any()


def run_gguf(data: bytes):
    """Open a GGUF file, translate its tokenizer, and read its small tensors."""
    from moecc.formats.gguf.reader import open_gguf

    with open_gguf(_file("model.gguf", data)) as opened:
        opened.companions()
        opened.remarks()
        opened.card()
        for name, info in list(opened.tensors.items())[:3]:
            if info.nbytes < 1 << 16:
                opened.read(name)


def run_config(data: bytes):
    """Read a config, write it; now and then build the graph of a shallow one."""
    from moecc.families.registry import parse_config
    from moecc.support.documents import parse_json

    document = parse_json(data, "config.json")
    if not isinstance(document, Mapping):
        raise InputError("not an object")
    config = parse_config(document)
    written = config.to_json()
    if parse_config(written).to_json() != written:
        raise Broken("the config that is written is another one")
    if _seldom(data, 30):
        _build(config)


def _build(config):
    from moecc.families import build

    facts = config.to_json()
    layers = [v for k, v in facts.items() if k in _DEPTHS and isinstance(v, int)]
    if max(layers, default=0) <= 6:
        build(config)


_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")


def run_manifest(data: bytes):
    """Read a manifest, sealed unless the input has another seal."""
    from moecc.formats.manifest import MANIFEST_NAME, dump, load, seal

    sealed = data if b'"seal"' in data else seal(data.rstrip().removesuffix(b"}"))
    folder = _folder() / f"{os.getpid()}-written"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_NAME).write_bytes(sealed)
    found = load(folder)
    (folder / MANIFEST_NAME).write_bytes(dump(found))
    if load(folder) != found:
        raise Broken("the manifest that is written is another one")


def run_receipt(data: bytes):
    """Read a receipt, and say it in lines."""
    from moecc.jobs.receipt import RECEIPT_NAME, load_receipt, receipt_lines

    folder = _folder() / f"{os.getpid()}-received"
    folder.mkdir(exist_ok=True)
    (folder / RECEIPT_NAME).write_bytes(data)
    found = load_receipt(folder)
    if found is not None:
        receipt_lines(found)


def run_adapter(data: bytes):
    """Merge an adapter into a tiny model: its config is the metadata of its weights."""
    from moecc.formats.adapter import ADAPTER_WEIGHTS, AdaptedCheckpoint
    from moecc.formats.open import open_checkpoint
    from moecc.formats.safetensors import ADAPTER_CONFIG, read_header

    folder = _folder() / f"{os.getpid()}-adapter"
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER_WEIGHTS).write_bytes(data)
    read_header(folder / ADAPTER_WEIGHTS)
    metadata = json.loads(seeds.unpack(data)[0]).get("__metadata__") or {}
    config = str(metadata.get("adapter", "")).encode("utf-8", "surrogatepass")
    (folder / ADAPTER_CONFIG).write_bytes(config)
    with open_checkpoint(seeds.GOLDEN / "llama_gqa") as base:
        merged = AdaptedCheckpoint(base, folder)
        try:
            for name in list(merged.tensors)[:20]:
                if (
                    "layers.0.self_attn" in name
                    and merged.read(name).shape != base.read(name).shape
                ):
                    raise Broken("a merged matrix of another shape")
        finally:
            merged.close()


def run_run(data: bytes):
    """Read the records of a run folder: a step, the lineage, and the journals."""
    from moecc.formats.manifest import seal
    from moecc.formats.run import GRAPH, LINEAGE, METRICS, SPEED, STEP, STEPS
    from moecc.support.documents import parse_json
    from moecc.train.run import read_run

    parts = parse_json(data, "run.json")
    if not isinstance(parts, Mapping):
        raise InputError("not an object")
    folder = _folder() / f"{os.getpid()}-run"
    step = folder / STEPS / "3"
    step.mkdir(parents=True, exist_ok=True)
    (folder / GRAPH).touch()
    content = json.dumps(parts.get("step")).encode()
    (step / STEP).write_bytes(seal(content.removesuffix(b"}")))
    (folder / LINEAGE).write_text(json.dumps(parts.get("lineage")))
    for file, key in ((METRICS, "metrics"), (SPEED, "speed")):
        lines = parts.get(key)
        texts = map(json.dumps, lines) if isinstance(lines, list) else [str(lines)]
        path = folder / file
        path.write_text("".join(f"{text}\n" for text in texts), "utf-8", "surrogatepass")
    series = read_run(folder)
    for layer in series.layers:
        series.spread(layer)
    _ = series.held_out, list(series.alarms()), series.scalar("loss"), repr(series)


def run_journal(data: bytes):
    """Read the journal of a conversion that was killed."""
    from moecc.formats.writer import JOURNAL_NAME, read_journal

    folder = _folder() / f"{os.getpid()}-partial"
    folder.mkdir(exist_ok=True)
    (folder / JOURNAL_NAME).write_bytes(data)
    read_journal(folder, {"source": {"files": {"a": 1}}, "pipeline": "x", "seed": 0})


def run_plan(data: bytes):
    """Read a saved plan, and make the values of a recipe of it."""
    from moecc.plan.step import read_plan

    saved = read_plan(str(_file("plan.json", data)))
    saved.recipe_values()
    _ = saved.config.device_mesh


def run_proof(data: bytes):
    """Give a log and its two graphs, which a stranger wrote together, to the checker."""
    import moecc_check

    from moecc.support.documents import parse_json

    document = parse_json(data, "proof.json")
    if not isinstance(document, Mapping):
        raise InputError("not an object")
    log, texts = document.get("log"), [document.get("before"), document.get("after")]
    if not all(isinstance(text, str) for text in texts):
        raise InputError("not texts")
    if isinstance(log, dict):
        for key, text in zip(("before", "after"), texts, strict=True):
            encoded = text.encode("utf-8", "surrogatepass")
            log = {**log, key: sha256(encoded).hexdigest()} if key in log else log
    try:
        moecc_check.accepted(log, *texts)
    except moecc_check.Rejected as error:
        raise InputError(str(error)) from None


@dataclass(frozen=True)
class Companions:
    """A checkpoint of which nothing but its companions is looked at."""

    files_of: Mapping[str, bytes]
    config: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 6})
    path: Path = Path("model")
    format: str = "safetensors"
    tensors: Mapping[str, Any] = field(default_factory=dict)

    def companions(self) -> dict[str, bytes]:
        """Return the files."""
        return dict(self.files_of)


def run_tokenizer(data: bytes):
    """Look at a tokenizer and translate it to the keys of a GGUF file."""
    from moecc.formats.folder import findings
    from moecc.formats.gguf.header import plan_file
    from moecc.formats.gguf.tokenizer import tokenizer_keys

    files = {"tokenizer.json": data}
    try:
        parts = json.loads(data)
    except (ValueError, RecursionError):
        parts = None
    if isinstance(parts, dict):
        names = {"tokenizer": "tokenizer.json", "settings": "tokenizer_config.json",
                 "generation": "generation_config.json"}  # fmt: skip
        files = {names[k]: json.dumps(v).encode() for k, v in parts.items() if k in names}
    checkpoint = Companions(files)
    for line in findings(checkpoint, 6):
        if not line:
            raise Broken("a finding without words")
    keys, why = tokenizer_keys(checkpoint, 6)
    plan_file("model.gguf", [], keys)
    if why is not None:
        raise InputError(why)


def run_arrays(data: bytes):
    """Read inputs from a .npy or .npz file."""
    from moecc.model.inputs import read_inputs

    ending = "npz" if data[:2] == b"PK" else "npy"
    read_inputs(str(_file(f"tokens.{ending}", data)), _tiny())


# --- mutators that know the frame


def mutate_safetensors(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the header as JSON, its length, or any byte of the file."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data, others)
    header, body = seeds.unpack(data)
    header = mutate_json(rng, header, [seeds.unpack(o)[0] for o in (rng.choice(others),)])
    if rng.random() < 0.2:
        body = rng.choice((body[:-1], body + b"\1", b"", body * 2))
    length = rng.choice((0, 1, 2**63, 2**64 - 1, 10**8 + 1)) if rng.random() < 0.03 else None
    return seeds.pack(header, body, length)


def mutate_gguf(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change bytes, mostly of the header, where the keys and the tensors are."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, data, others)
    cut = min(len(data), rng.choice((24, 200, 1500)))
    return mutate_bytes(rng, data[:cut], others) + data[cut:]


def _graph_mutator(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change tokens of a few lines; at times take lines from another graph."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                lines.insert(at, rng.choice(rng.choice(others).split(b"\n")))
            case 1:
                del lines[at]
                lines = lines or [b""]
            case 2:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case _:
                lines[at] = mutate_text(rng, lines[at], others)
    return b"\n".join(lines)


def mutate_proof(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the log as JSON, or one of the graphs as a text."""
    try:
        document = json.loads(data)
        key = rng.choice(("log", "log", "before", "after"))
        if key == "log":
            changed = json.loads(mutate_json(rng, json.dumps(document[key]).encode(), [data]))
        else:
            text = document[key].encode("utf-8", "surrogatepass")
            changed = _graph_mutator(rng, text, [text]).decode("utf-8", "replace")
        return json.dumps({**document, key: changed}).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return mutate_text(rng, data, others)


def _texts(*texts: str) -> Callable[[], Sequence[bytes]]:
    return lambda: seeds.encoded(texts)


def run_program(data: bytes):
    """Emit a graph whose names and texts are code, drawn by these bytes."""
    import numpy as np

    from tests.emit.fuzz import fault

    if difference := fault(np.random.default_rng(list(data))):
        raise Broken(difference)


GRAMMARS: dict[str, Grammar] = {
    g.name: g
    for g in (
        Grammar("moe", seeds.graphs, _graph_mutator, run_graph),
        Grammar("pipelines", seeds.pipelines, mutate_text, run_pipeline),
        Grammar("weights", _texts(*seeds.WEIGHTS), mutate_text, run_weight),
        Grammar("safetensors", seeds.safetensors, mutate_safetensors, run_safetensors),
        Grammar("gguf", seeds.gguf_files, mutate_gguf, run_gguf),
        Grammar("configs", seeds.configs, mutate_json, run_config),
        Grammar("manifests", seeds.manifests, mutate_json, run_manifest),
        Grammar("tokenizers", seeds.tokenizers, mutate_json, run_tokenizer),
        Grammar("rules", _texts(*seeds.RULES), mutate_text, run_rules),
        Grammar("machines", _texts(*seeds.MACHINES), mutate_text, run_machine),
        Grammar("indices", seeds.indices, mutate_json, run_index),
        Grammar("recipes", seeds.recipes, mutate_text, run_recipe),
        Grammar("receipts", seeds.receipts, mutate_json, run_receipt),
        Grammar("cards", lambda: [seeds.CARD], mutate_text, run_card),
        Grammar("arrays", seeds.arrays, mutate_bytes, run_arrays),
        Grammar("adapters", seeds.adapters, mutate_safetensors, run_adapter),
        Grammar("runs", seeds.runs, mutate_json, run_run),
        Grammar("journals", seeds.journals, mutate_text, run_journal),
        Grammar("plans", seeds.plans, mutate_json, run_plan),
        Grammar("proofs", seeds.proofs, mutate_proof, run_proof),
        Grammar("programs", _texts("a", "bc"), mutate_bytes, run_program),
    )
}
"""The grammars by name."""
