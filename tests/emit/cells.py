"""Cells of sources and methods: emitted folders, and what the reference computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import moecc
from moecc.backend import emit_program, get_backend
from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.jobs.generate import Continuer, Continuing
from moecc.model.open import OpenedModel
from moecc.rewrite.passes import Context, Statistics
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.translate.export import export_emitted
from moecc.translate.importing import import_checkpoint
from moecc.types import F64, Array, TensorType
from moecc.weights.evaluate import evaluate
from tests.proof import cells as proof

DENSE = (
    "llama_gqa", "mistral_window", "qwen2_square", "qwen3_square", "olmo2_gqa",
    "granite_square_tied", "phi3_square", "smollm3_square_tied", "gemma_square", "gemma2_caps",
    "gemma3_local", "gemma4_inputs", "gpt2_square", "gpt_neox_parallel", "opt_after_narrow",
    "t5_gated_untied",
    "mt5_square_v4", "umt5_square_untied", "bert_square", "roberta_square", "xlm_roberta_gelu",
    "camembert_gelu", "distilbert_square", "mpnet_square", "electra_narrow", "albert_shared",
    "modernbert_windows", "deberta_v3",
    "vit_square", "dinov2_plain", "dinov3_plain", "clip_vision", "siglip_vision",
    "whisper_square",
)  # fmt: skip

MIXED = (
    "mixtral_gqa", "qwen2_moe_plain", "qwen3_moe_plain", "olmoe_norm", "flex_olmo_norm",
    "granitemoe_square_v4", "glm4_moe_square", "ernie4_5_moe_range", "gpt_oss_square_v4",
    "phimoe_window", "gemma4_experts", "switch_drops",
)  # fmt: skip


def _of_every_family(chosen: Sequence[str], *, is_mixture: bool) -> tuple[str, ...]:
    """Return the chosen golden checkpoints, and the first one of every other family."""
    configs = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(proof.GOLDEN.glob("*/config.json"))
    }
    families = {configs[name]["model_type"] for name in (*DENSE, *MIXED)}
    further = []
    for name, config in configs.items():
        has_experts = any("expert" in key for key in config)
        if config["model_type"] not in families and has_experts == is_mixture:
            families.add(config["model_type"])
            further.append(name)
    return (*chosen, *further)


SOURCES = _of_every_family(DENSE, is_mixture=False)
"""Dense sources, of every family that has golden checkpoints."""

MIXTURES = _of_every_family(MIXED, is_mixture=True)
"""Sources with experts of their own, which are emitted as they are."""

ROUTER = "router-std=1"
MODES = "record-modes{train-policy=threshold eval-capacity-factor=0.6}"
TRAIN = "specialize{mode=train capacity-factor=1.0 policy=threshold threshold=0.4 groups=2}"
METHODS = {
    "dense": "",
    "upcycled": f"upcycle{{experts=4 {ROUTER}}}",
    "st-moe": "st-moe{experts=4 layers=every:2}",
    "st-moe in training": f"upcycle{{experts=4 {ROUTER}}},add-losses,{TRAIN}",
    "capacity of evaluation": f"upcycle{{experts=4 {ROUTER}}},{MODES},add-losses,"
    "specialize{mode=eval}",
    "virtual groups": f"upcycle{{experts=8 top-k=4 granularity=2 {ROUTER}}}",
    "shared": f"upcycle{{experts=4 shared=0.5 {ROUTER}}}",
    "split": f"upcycle{{experts=4 split=index {ROUTER}}}",
    "BTX": f"upcycle{{experts=4 sources=base,a,base,a {ROUTER}}}",
    "hash": "upcycle{experts=4 routing=hash}",
    "expert choice": "upcycle{experts=4 routing=expert-choice}",
    "soft": "upcycle{experts=4 routing=soft}",
    "sparsemixer": f"upcycle{{experts=4 gates=sparsemixer {ROUTER}}}",
    "bias-balanced": f"upcycle{{experts=4 balance-bias=true {ROUTER}}}",
    "prototypes": f"upcycle{{experts=4 routing=prototypes {ROUTER}}}",
    "capacity": f"upcycle{{experts=4 slots=capacity capacity-factor=1.0 groups=2 {ROUTER}}}",
}


SAMPLE = [
    ("llama_gqa", "upcycled"), ("llama_gqa", "st-moe in training"), ("gemma3_local", "shared"),
    ("gpt2_square", "split"), ("opt_after_narrow", "hash"), ("t5_gated_untied", "st-moe"),
    ("umt5_square_untied", "capacity"), ("bert_square", "soft"), ("mpnet_square", "expert choice"),
    ("vit_square", "virtual groups"), ("albert_shared", "upcycled"), ("whisper_square", "upcycled"),
    ("qwen3_square", "sparsemixer"), ("phi3_square", "bias-balanced"), ("olmo2_gqa", "prototypes"),
    ("gpt_neox_parallel", "BTX"), ("smollm3_square_tied", "dense"), ("gemma2_caps", "dense"),
    ("distilbert_square", "capacity"), ("clip_text", "upcycled"),
    ("gemma4_inputs", "st-moe in training"), ("modernbert_windows", "upcycled"),
]  # fmt: skip
"""Cells that are judged in every run of the tests: sources and methods."""


@dataclass(frozen=True)
class EmittedCell:
    """A source and a method.

    Attributes:
      source: a golden checkpoint.
      method: a key of METHODS, or of the methods of the proof table.
      passes: the pipeline of the proof table; None for one of METHODS.
    """

    source: str
    method: str
    passes: str | None = None

    @property
    def pipeline(self) -> str:
        """The passes; a decoder beside an encoder stays dense where routing is not causal."""
        if self.passes is not None:
            return self.passes
        passes, inputs = METHODS[self.method], graph_of(self.source).inputs
        if self.method in ("expert choice", "soft") and "decoder_tokens" in inputs:
            return passes.replace("}", " decoder-layers=nowhere}")
        return passes

    def write(self, folder: Path, language: str = "torch"):
        """Write the emitted folder; but for the proof table, no two experts have equal weights.

        Raises:
          InputError: the method does not apply to the source.
        """
        checkpoint = proof.with_branch(self.source, self.method)
        graph = graph_of(self.source)
        shapes = {n.partition(":")[2]: info.shape for n, info in checkpoint.tensors.items()}
        statistics = Statistics(("text",), shapes) if "activation" in self.pipeline else None
        context = Context(models=tuple(checkpoint.branches), statistics=statistics)
        run_pipeline(graph, Pipeline.parse(self.pipeline), context=context)
        export = export_emitted(graph, language)
        folder.mkdir()
        rng = np.random.default_rng(1)
        tensors = {}
        for name, expression in export.tensors:
            tensor = np.asarray(evaluate(expression, checkpoint.read, F64))
            if self.passes is None:  # between equal experts the gradient of a router is zero
                scale = 0.5 if "router" in name else 0.1
                tensor = tensor + rng.standard_normal(tensor.shape) * scale
            tensors[name] = np.asarray(tensor, np.float32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(export.config_json))
        for name, text in export.program.files.items():
            (folder / name).write_text(text)


def program_text(source: str, pipeline: str = "", language: str = "torch") -> str:
    """Return the program of a golden checkpoint after some passes."""
    graph = moecc.open(proof.GOLDEN / source).apply(pipeline).graph
    (text,) = emit_program(graph, language).files.values()
    return text


def graph_of(source: str) -> Graph:
    """Return the graph of a golden checkpoint, with an input for the padding mask of an encoder."""
    return import_checkpoint(proof.opened(source), padding=None)


def cells() -> Iterator[EmittedCell]:
    """Yield every dense source by every method, and mixtures as they are."""
    for source in SOURCES:
        yield from (EmittedCell(source, method) for method in METHODS)
    yield from (EmittedCell(source, "dense") for source in MIXTURES)


def pairs() -> Iterator[EmittedCell]:
    """Yield every source by every method of the proof table, with their widest options."""
    for cell in proof.cells():
        if cell.target == "st_moe" or cell.source in proof.MIXTURES:
            yield EmittedCell(cell.source, cell.method, cell.passes)


SIZES = {"B": 2, "S": 12, "T": 8}
DRAWS, WELL_CONDITIONED = 1024, 2e-6
"""How many inputs are drawn at most, and the condition below which no other are."""

PROBES = 4
"""How many directions a condition is the worst of: the best draw by one is its luckiest."""


def write_reference(folder: Path, file: Path, *, gradients: bool):
    """Write an npz file: inputs, outputs in float64, and gradients of all parameters by XLA.

    The loss is Σ cotangent · output, and the auxiliary loss.  Inputs are drawn until the gradients
    are well conditioned, or the best are taken: near a tie of experts, or of a saturated softmax,
    gradients in float32 are rounding alone.
    """
    model = moecc.open(folder)
    graph = model.graph
    main = "logits" if "logits" in graph.outputs else "hidden"
    params = {name: np.asarray(array, np.float64) for name, array in model.params().items()}
    shape = _shape(graph.outputs[main].type)
    differentiate = _gradient_program(graph, main) if gradients else None
    condition = np.inf
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        drawn = _drawn_inputs(graph, rng)
        # A mean over tokens: beside a sum, float32 would round the slopes of a router's loss away.
        factors = np.asarray(rng.standard_normal(shape)) / np.prod(shape[:-1])
        if "mask" in drawn and main == "hidden":
            factors *= drawn["mask"][..., None]
        drawn_slopes, worst = {}, 0.0
        if differentiate is not None:
            drawn_slopes = differentiate(params, drawn, factors)
            for pair in _neighbours(params, drawn):
                moved = [differentiate(*near, factors) for near in pair]
                worst = max(
                    worst,
                    *(_condition(x, *(m[n] for m in moved)) for n, x in drawn_slopes.items()),
                )
                if worst >= condition:
                    break
        if worst < condition:
            condition, inputs, slopes, cotangent = worst, drawn, drawn_slopes, factors
        if condition < WELL_CONDITIONED:
            break
    outputs = get_backend("reference").compile(graph).run(params, inputs)
    outputs = {name: x for name, x in outputs.items() if "metric." not in name}
    arrays = {"cotangent": cotangent, "condition": condition}
    for prefix, values in {"in": inputs, "out": outputs, "grad": slopes}.items():
        arrays |= {f"{prefix}.{name}": np.asarray(value) for name, value in values.items()}
    if main == "logits" and graph.attrs.get("mode") != "train":
        arrays["generated"] = _generated(model.model, inputs)
    np.savez(file, **arrays)


STEP = 2.0**-34


def _neighbours(*arrays: dict[str, Array]) -> Iterator[list[tuple[dict[str, Array], ...]]]:
    """Yield parameters and inputs a relative step away on either side, in several directions."""
    for seed in range(PROBES):
        rng = np.random.default_rng(seed)
        steps = [
            {
                n: x * rng.choice([-STEP, STEP], x.shape)
                for n, x in each.items()
                if x.dtype.kind == "f"
            }
            for each in arrays
        ]
        yield [
            tuple(
                {**each, **{n: each[n] + sign * step for n, step in moves.items()}}
                for each, moves in zip(arrays, steps, strict=True)
            )
            for sign in (1, -1)
        ]


def _condition(slope: Array, above: Array, below: Array) -> float:
    """Return the relative error that a gradient is expected to have in float32.

    The first difference of its neighbours is what rounding the parameters does to it; the second
    is what rounding the results in between did in float64.
    """
    rounded_parameters = relative((above - below) / 2 + slope, slope) * 2.0**-24 / STEP
    rounded_results = relative((above + below) / 2, slope) * 2.0**29
    return max(rounded_parameters, rounded_results)


def _shape(type: TensorType) -> list[int]:
    return [a.size if isinstance(a.size, int) else SIZES[str(a.size)] for a in type.axes]


def _drawn_inputs(graph: Graph, rng: np.random.Generator) -> dict[str, Array]:
    tables = [v.type["vocab"].size for v in graph.params.values() if "vocab" in v.type]
    vocabulary = min([size for size in tables if isinstance(size, int)], default=0)
    inputs = {}
    for name, value in graph.inputs.items():
        sizes = _shape(value.type)
        kind = value.type.dtype.kind
        if kind == "int":
            inputs[name] = rng.integers(3, vocabulary, sizes).astype(np.int32)
        elif kind == "bool":
            inputs[name] = np.ones(sizes, bool)
            inputs[name][0, -5:] = False  # the last sees no real token through a window of 7
        elif kind == "float":
            inputs[name] = rng.standard_normal(sizes)
        else:
            raise InputError("the graph draws random numbers, which PyTorch draws otherwise")
    return inputs


def relative(x: Array, expected: Array) -> float:
    """Return the largest difference over the largest magnitude; zeros are compared to 1."""
    scale = float(np.abs(expected).max())
    difference = np.abs(np.asarray(x, np.float64) - expected).max()
    return float(difference / (scale if scale > 1e-12 else 1.0))


TOKENS, LENGTHS = 6, (6, 4)
"""How many tokens are generated, and of how many each prompt of a decoder has."""


def _generated(model: OpenedModel, inputs: dict[str, Array]) -> Array:
    """Return the tokens that ``moecc generate`` continues prompts with, ``[batch, token]``."""
    memory = {n: x for n, x in inputs.items() if n != "decoder_tokens"}
    prompts = [[0]] * len(next(iter(inputs.values())))
    if "decoder_tokens" not in inputs:
        prompts = [
            list(map(int, r[:n])) for r, n in zip(memory.pop("tokens"), LENGTHS, strict=True)
        ]
    continuer = Continuer(model, get_backend("reference"))
    columns = continuer.texts(prompts, Continuing(TOKENS, dtype=F64), memory or None)
    return np.array(list(columns)).T


def _gradient_program(graph: Graph, main: str) -> Callable[..., dict[str, Array]]:
    """Return the function of parameters, inputs and cotangent that returns gradients by name."""
    import jax
    from moecc_backends.xla.lower.function import function
    from moecc_backends.xla.trace.context import Options

    # Rows are gathered: compiling a loop over experts takes most of a minute.
    is_bounded = any("capacity" in node.attrs.values() for node in graph)
    options = Options(dispatch="gather" if is_bounded else "gathered")
    with jax.enable_x64(True):
        program = function(graph, dtype=F64, options=options)

    def loss(params, inputs, cotangent):
        outputs = program(params, inputs)
        return (outputs[main] * cotangent).sum() + outputs.get("loss.auxiliary", 0.0)

    compiled = jax.jit(jax.grad(loss))

    def gradients(params, inputs, cotangent):
        with jax.enable_x64(True):
            return {n: np.asarray(x) for n, x in compiled(params, inputs, cotangent).items()}

    return gradients
