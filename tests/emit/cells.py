"""Cells of sources and methods: emitted folders, and what the reference computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import moecc
from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.jobs.convert import convert

GOLDEN = Path(__file__).parents[1] / "golden"

SOURCES = (
    "llama_gqa", "mistral_window", "qwen2_square", "qwen3_square", "olmo2_gqa",
    "granite_square_tied", "phi3_square", "smollm3_square_tied", "gemma_square", "gemma2_caps",
    "gemma3_local", "gpt2_square", "gpt_neox_parallel", "opt_after_narrow", "t5_gated_untied",
    "mt5_square_v4", "umt5_square_untied", "bert_square", "roberta_square", "xlm_roberta_gelu",
    "camembert_gelu", "distilbert_square", "mpnet_square", "vit_square", "dinov2_plain",
    "whisper_square",
)  # fmt: skip

MIXTURES = (
    "mixtral_gqa", "qwen2_moe_plain", "qwen3_moe_plain", "olmoe_norm", "flex_olmo_norm",
    "granitemoe_square_v4", "glm4_moe_square", "ernie4_5_moe_range", "gpt_oss_square_v4",
    "phimoe_window", "switch_drops",
)  # fmt: skip
"""Sources with experts of their own, which are emitted as they are."""

ROUTER = "router-std=1"
TRAIN = "specialize{mode=train capacity-factor=1.0 policy=threshold threshold=0.4 groups=2}"
METHODS = {
    "dense": "",
    "upcycled": f"upcycle{{experts=4 {ROUTER}}}",
    "st-moe": "st-moe{experts=4 layers=every:2}",
    "st-moe in training": f"upcycle{{experts=4 {ROUTER}}},add-losses,{TRAIN}",
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


@dataclass(frozen=True)
class EmittedCell:
    """A source and a method."""

    source: str
    method: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.source}-{self.method.replace(' ', '-')}"

    @property
    def pipeline(self) -> str:
        """The passes; a decoder beside an encoder stays dense where routing is not causal."""
        passes, outputs = METHODS[self.method], moecc.open(GOLDEN / self.source).graph.inputs
        if self.method in ("expert choice", "soft") and "decoder_tokens" in outputs:
            return passes.replace("}", " decoder-layers=nowhere}")
        return passes

    def write(self, folder: Path) -> None:
        """Write the emitted folder, its weights moved so that no two experts are equal.

        Raises:
          InputError: the method does not apply to the source.
        """
        experts = (f"a={GOLDEN / self.source}",) if self.method == "BTX" else ()
        convert(
            str(GOLDEN / self.source), str(folder), pipeline=self.pipeline, to="st_moe",
            emit="torch", no_check=True, experts=experts,
        )  # fmt: skip
        move_weights(folder)


def cells() -> Iterator[EmittedCell]:
    """Yield every dense source by every method, and mixtures as they are."""
    for method in METHODS:
        for source in (*SOURCES, *(MIXTURES if method == "dense" else ())):
            yield EmittedCell(source, method)


def move_weights(folder: Path) -> None:
    """Add noise to all weights: between equal experts the gradient of a router is zero."""
    rng = np.random.default_rng(1)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            scale = 0.5 if "router" in name else 0.1
            moved = tensor.astype(np.float64) + rng.standard_normal(tensor.shape) * scale
            tensors[name] = np.asarray(moved, np.float32)
        save_file(tensors, file, metadata={"format": "pt"})


SIZES = {"B": 2, "S": 12, "T": 8}


def write_reference(folder: Path, *, gradients: bool) -> None:
    """Write ``reference.npz``: inputs, outputs in float64, and gradients of all parameters.

    The gradients are those of Σ cotangent · output, and of the auxiliary loss, by XLA.
    """
    model = moecc.open(folder)
    graph, rng = model.graph, np.random.default_rng(0)
    tables = [v.type["vocab"].size for v in graph.params.values() if "vocab" in v.type]
    vocabulary = min([size for size in tables if isinstance(size, int)], default=0)
    inputs = {}
    for name, value in graph.inputs.items():
        sizes = [a.size if isinstance(a.size, int) else SIZES[str(a.size)] for a in value.type.axes]
        kind = value.type.dtype.kind
        if kind == "int":
            inputs[name] = rng.integers(3, vocabulary, sizes).astype(np.int32)
        elif kind == "bool":
            inputs[name] = np.ones(sizes, bool)
            inputs[name][0, -3:] = False
        elif kind == "float":
            inputs[name] = rng.standard_normal(sizes)
        else:
            raise InputError("the graph draws random numbers, which PyTorch draws otherwise")
    params = {name: np.asarray(array, np.float64) for name, array in model.params().items()}
    outputs = get_backend("reference").compile(graph).run(params, inputs)
    kept = {n: np.asarray(x) for n, x in outputs.items() if not n.startswith("metric.")}
    main = "logits" if "logits" in kept else "hidden"
    cotangent = rng.standard_normal(kept[main].shape)
    if "mask" in inputs and main == "hidden":
        cotangent *= inputs["mask"][..., None]
    arrays = {f"in.{n}": x for n, x in inputs.items()} | {f"out.{n}": x for n, x in kept.items()}
    if gradients:
        slopes = _gradients(graph, params, inputs, main, cotangent)
        arrays |= {f"grad.{n}": x for n, x in slopes.items()}
    np.savez(folder / "reference.npz", cotangent=cotangent, **arrays)


def _gradients(graph, params, inputs, main, cotangent):  # type: ignore[no-untyped-def]
    import jax

    from moecc.types import F64

    with jax.enable_x64(True):
        function = get_backend("xla").function(graph, dtype=F64)  # type: ignore[attr-defined]

        def loss(weights):  # type: ignore[no-untyped-def]
            outputs = function(weights, inputs)
            return (outputs[main] * cotangent).sum() + outputs.get("loss.auxiliary", 0.0)

        return {n: np.asarray(x) for n, x in jax.jit(jax.grad(loss))(params).items()}
