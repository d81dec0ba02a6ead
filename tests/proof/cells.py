"""Every source, as every target, by every method: exact, announced, or rejected with its reason.

A cell converts a golden checkpoint in memory, reads the result back, and compares outputs in
float64: with those of the source where the passes promise the same function, else with those of
the graph that was exported.  Weights are stored as float32, so that equal means to 1e-6.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from family_configs import MemoryCheckpoint, exported_checkpoint
from safetensors.numpy import save_file

from moecc.analysis import find_ffn_blocks
from moecc.backend import get_backend
from moecc.errors import MoeccError
from moecc.families.registry import CONFIGS
from moecc.formats.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdaptedCheckpoint,
    SeveralCheckpoints,
)
from moecc.formats.open import open_checkpoint
from moecc.formats.source import Checkpoint
from moecc.ir.graph import Graph
from moecc.model.initialise import BlockSums
from moecc.rewrite.passes import Context, Statistics
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.translate.export import export_graph
from moecc.translate.importing import import_checkpoint
from moecc.types import F64, Array
from moecc.weights.arithmetic import STATISTICS
from moecc.weights.evaluate import evaluate

GOLDEN = Path(__file__).parents[1] / "golden"
BOUND = 1e-6

DENSE = (
    "llama_gqa", "mistral_full_head_dim", "qwen2_square", "qwen3_square", "olmo2_gqa",
    "granite_square_tied", "phi3_square", "smollm3_square_tied", "gemma_square", "gemma2_square",
    "gemma3_square_v4", "gemma3n_square", "gemma4_inputs", "olmo3_square", "glm4_square",
    "nemotron_square", "phi_square", "cohere_square", "gptj_square", "lfm2_biases",
    "qwen3_5_text_delta", "gpt2_square", "gpt_neox_square", "opt_after_narrow", "t5_square",
    "mt5_square_v4", "umt5_square_untied", "bert_square", "roberta_square", "xlm_roberta_gelu",
    "camembert_gelu", "distilbert_square", "mpnet_square", "electra_narrow", "albert_shared",
    "modernbert_windows", "clip_text", "bart_scaled", "mbart_plain", "marian_swish",
    "m2m_100_scaled",
    "vit_square", "dinov2_plain", "dinov3_plain", "clip_vision", "siglip_vision", "swin_windows",
    "whisper_square", "wav2vec2_group",
)  # fmt: skip
MIXTURES = (
    "mixtral_gqa", "qwen2_moe_plain", "qwen3_moe_plain", "olmoe_norm", "flex_olmo_norm",
    "granitemoe_square_v4", "glm4_moe_square", "ernie4_5_moe_range", "gpt_oss_square_v4",
    "phimoe_window", "lfm2_moe_bias", "llama4_square", "deepseek_v2_square",
    "deepseek_v3_square_v4", "qwen3_next_delta", "qwen3_5_moe_text_square",
)  # fmt: skip
TARGETS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "glm4_moe",
    "ernie4_5_moe", "gpt_oss", "phimoe", "lfm2_moe", "qwen3_next", "qwen3_5_moe_text",
    "switch_transformers", "st_moe",
)  # fmt: skip

METHODS = {
    "copy": "upcycle{experts=4 router-std=1 OPTIONS}",
    "noise": "upcycle{experts=4 router-std=1 init=noise noise-std=0.5 OPTIONS}",
    "drop": "upcycle{experts=4 router-std=1 init=drop OPTIONS}",
    "virtual groups": "upcycle{experts=4 router-std=1 granularity=2 OPTIONS}",
    "all slices": "upcycle{experts=4 granularity=4 router-std=1 ALL}",
    "index split": "upcycle{experts=4 router-std=1 split=index OPTIONS}",
    "random split": "upcycle{experts=4 router-std=1 split=random OPTIONS}",
    "activation split": "upcycle{experts=4 split=activation router-init=ridge OPTIONS}",
    "shared": "upcycle{experts=4 router-std=1 SHARED}",
    "BTX": "upcycle{experts=4 router-std=1 sources=base,a,base,a rest=mean OPTIONS}",
    "LoRA": "upcycle{experts=4 router-std=1 sources=base,a,a,base OPTIONS}",
    "grow": "upcycle{experts=4 router-std=1 OPTIONS},grow",
    "grow by bias": "upcycle{experts=4 router-std=1 OPTIONS},grow{chosen=same}",
    "zero experts": "upcycle{experts=4 router-std=1 OPTIONS},zero-experts{count=2}",
    "padded": "upcycle{experts=4 router-std=1 granularity=2 pad=7 OPTIONS}",
    "merge": "upcycle{experts=4 router-std=1 OPTIONS},grow,merge",
}
"""Pipelines on dense sources; OPTIONS are those that lead to a family, ALL choose all experts."""

OVER_MIXTURES = {
    "prune": "prune{keep=3}",
    "merge": "merge",
    "grow": "grow",
    "grow by bias": "grow{chosen=same}",
    "zero experts": "zero-experts{count=2}",
    "to-dense, first": "to-dense",
    "to-dense, mean": "to-dense{how=mean}",
    "to-dense, concat": "to-dense{how=concat}",
}
"""Pipelines on mixtures, whose targets are the sources."""

DENSE_OF = {
    "mixtral": "llama", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "flex_olmo": "olmo2",
    "granitemoe": "granite", "ernie4_5_moe": "llama",
}  # fmt: skip


def family_of(source: str) -> str:
    """Return the family of a golden checkpoint."""
    return str(opened(source).config["model_type"])


@dataclass(frozen=True)
class Cell:
    """A source, a target, and how one becomes the other."""

    source: str
    target: str
    method: str
    passes: str

    @property
    def family(self) -> str:
        """The family of the source."""
        return family_of(self.source)


@dataclass(frozen=True)
class Result:
    """What came of a cell.

    Attributes:
      kind: ``=`` the same function, ``≈`` another one, as announced, ``—`` rejected.
      reason: why it was rejected, or what was announced.
      error: max |Δ| / max |output|, of what the kind says is equal.
    """

    kind: str
    reason: str = ""
    error: float = 0.0


@cache
def opened(source: str) -> Checkpoint:
    return open_checkpoint(str(GOLDEN / source))


def with_branch(source: str, method: str) -> Checkpoint:
    """Return a source with the model ``a`` that a method takes experts of, or with statistics."""
    if method == "activation split":
        return SeveralCheckpoints(opened(source), {}, {STATISTICS: made_statistics(source)})
    beside = {"BTX": other_model, "LoRA": adapted_model}.get(method)
    base = opened(source)
    return SeveralCheckpoints(base, {"a": beside(source)}) if beside else base


@cache
def other_model(source: str) -> Checkpoint:
    """Return a model of the same architecture all of whose weights differ."""
    base, rng = opened(source), np.random.default_rng(7)
    arrays = {n: np.asarray(base.read(n)) for n in base.tensors}
    other = {
        n: (a * (1 + 0.3 * rng.standard_normal(a.shape))).astype(a.dtype) for n, a in arrays.items()
    }
    return MemoryCheckpoint(base.config, other)


@cache
def made_statistics(source: str) -> MemoryCheckpoint:
    """Return the statistics of values that are drawn: what they are of changes no equality."""
    found, rng = {}, np.random.default_rng(13)
    for block in find_ffn_blocks(import_checkpoint(opened(source))).blocks:
        sums = BlockSums(1, block.embed, block.width, 0.25)
        sums.add(0, rng.normal(1, 1, (99, block.embed)), rng.normal(size=(99, block.width)))
        found |= {f"{block.loc}.{name}": array for name, array in sums.statistics().items()}
    return MemoryCheckpoint({}, found)


@cache
def adapted_model(source: str) -> Checkpoint:
    """Return the model with an adapter of rank 2 on every matrix, from a folder of PEFT."""
    base, rng = opened(source), np.random.default_rng(11)
    pairs = {}
    for name, info in base.tensors.items():
        if len(info.shape) == 2 and name.endswith(".weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            # GPT-2 stores inputs first, and PEFT's factors do not.
            outputs, inputs = info.shape[::-1] if ".c_" in name else info.shape
            for letter, shape in (("A", (2, inputs)), ("B", (outputs, 2))):
                drawn = 0.2 * rng.standard_normal(shape)
                pairs[f"{module}.lora_{letter}.weight"] = drawn.astype("f")
    with TemporaryDirectory() as made:
        folder = Path(made)
        save_file(pairs, folder / ADAPTER_WEIGHTS)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings))
        with AdaptedCheckpoint(base, folder) as merged:
            arrays = {name: np.asarray(merged.read(name)) for name in merged.tensors}
    return MemoryCheckpoint(base.config, arrays)


def cells() -> list[Cell]:
    """Return all cells."""
    found = [
        Cell(source, target, method, passes_for(text, target))
        for source in DENSE
        for target in TARGETS
        for method, text in METHODS.items()
    ]
    for source in MIXTURES:
        own = str(opened(source).config["model_type"])
        for method, text in OVER_MIXTURES.items():
            target = DENSE_OF.get(own, "st_moe") if method.startswith("to-dense") else own
            found.append(Cell(source, target, method, text))
    return found


def passes_for(text: str, target: str) -> str:
    """Return the pipeline of a method with the options that lead to a family."""
    options = str(getattr(CONFIGS[target], "upcycle_options", "top-k=2"))
    shared = options if "shared" in options else f"{options} shared=0.5"
    every = f"{re.sub(r'top-k=[0-9]+', '', options)} top-k=4"
    return text.replace("OPTIONS", options).replace("SHARED", shared).replace("ALL", every)


def run(cell: Cell) -> Result:
    """Convert, read back, compare.

    Raises:
      AssertionError: the result is not what was promised, or not what was exported.
    """
    checkpoint = with_branch(cell.source, cell.method)
    graph = import_checkpoint(opened(cell.source))
    try:
        shapes = {n.partition(":")[2]: info.shape for n, info in checkpoint.tensors.items()}
        statistics = Statistics(("text",), shapes) if "activation" in cell.passes else None
        context = Context(models=tuple(checkpoint.branches), statistics=statistics)
        promise = run_pipeline(graph, Pipeline.parse(cell.passes), context=context).preserves
        made = export_graph(graph, cell.target)
    except MoeccError as error:
        return Result("—", error.problems[0].message.splitlines()[0])
    written = exported_checkpoint(made.config_json, made.tensors, checkpoint)
    found = outputs(import_checkpoint(written), written, cell.source)
    is_same = promise.kind != "approximate"
    expected = dense_outputs(cell.source) if is_same else outputs(graph, checkpoint, cell.source)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert error <= BOUND, f"{cell}: {promise}, off by {error:.2g}"
    return Result("=" if is_same else "≈", promise.reason if not is_same else "", error)


@cache
def dense_outputs(source: str) -> Array:
    return outputs(import_checkpoint(opened(source)), opened(source), source)


def outputs(graph: Graph, checkpoint: Checkpoint, source: str) -> Array:
    """Return the one output of a model in float64, on the inputs of its golden files."""
    params = {}
    for name, param in graph.params.items():
        assert param.weight is not None
        params[name] = evaluate(param.weight, checkpoint.read, F64)
    inputs = {name: np.load(GOLDEN / source / f"{name}.npy") for name in graph.inputs}
    made = get_backend("reference").compile(graph).run(params, inputs)
    return next(iter(made.values()))
