"""The collectives of a sparse layer in the steps that `moecc compile` makes, way by way.

Every layer is sparse, and layers are rolled.  Sizes differ, so that a shape tells what it is of.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.aot.census import ITEMSIZE_BYTES, census, parse_hlo
from moecc_backends.xla.aot.compiler import missing

from moecc.ahead.request import Request
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir.text import print_graph
from moecc.jobs.compile import compile_in_subprocess
from moecc.plan.machines import parse_machine
from moecc.plan.step import StepConfig
from moecc.presets import preset_config
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.vias import EXPLICIT, PARTITIONS

LAYERS, EXPERTS, EMBED, MLP, DEVICES, SEQ = 3, 8, 128, 400, 8, 64
CONFIG = {
    "hidden_size": EMBED, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640,
}  # fmt: skip

TOKENS = DEVICES * SEQ * EMBED
"""Elements of all tokens, which a ring gathers, and to whose sums it adds."""

ROWS = EXPERTS * (SEQ * 2 * 5 // 4 // EXPERTS) * EMBED
"""Elements of the rows of a device: 1.25 times an expert's share of two choices a token."""

GATES = ROWS // EMBED
"""The gates of these rows, which training sends with them."""

MACHINES = ("cpu:8", "tpu:v5p:2x2x2", "tpu:v6e:2x4", "gpu:h100:8")
STEPS = (("forward", "none"), ("train", "none"), ("train", "full"))
QUICK = ("cpu:8", "train", "full")
EVERY = [
    pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow)
    for case in ((machine, *step) for machine in MACHINES for step in STEPS)
]


@dataclass(frozen=True)
class Found:
    """What a program of one device has: runs of collectives by kind and elements, and gathers."""

    runs: Counter[tuple[str, int]]
    gathered: set[tuple[int, ...]]

    def per_layer(self, kind: str, elements: int) -> float:
        """Return how many tensors of `elements` a collective `kind` moves in a layer.

        XLA makes one instruction of several, so sizes count, and a CPU moves bfloat16 as float32,
        so elements do.  What is no multiple is something else.
        """
        moved = (size * n for (k, size), n in self.runs.items() if k == kind)
        return sum(total for total in moved if total % elements == 0) / elements / LAYERS

    def sizes(self, kind: str) -> set[int]:
        return {size for k, size in self.runs if k == kind}


@functools.cache
def model(passes: str) -> str:
    """Return a model whose layers are all sparse; with `passes`, of what they make.

    Those start from six dense layers.
    """
    sparse = {**preset_config("mixtral-8x7b"), **CONFIG, "num_local_experts": EXPERTS}
    dense = {**preset_config("smollm2-135m"), **CONFIG, "num_hidden_layers": 6}
    graph = build(parse_config(dense if passes else sparse))
    if passes:
        run_pipeline(graph, Pipeline.parse(passes, installed()))
    return print_graph(graph)


@functools.cache
def compiled(
    machine: str,
    step: str,
    remat: str,
    via: str,
    partition: str = EXPLICIT,
    passes: str = "",
    mesh: str = "data=8",
    dense_weights: str = "whole",
) -> Found:
    why = missing(parse_machine(machine).kind)
    if why is not None:
        pytest.skip(why)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.moe"
        file.write_text(model(passes), "utf-8")
        request = Request(
            str(file), machine, StepConfig(
                step, DEVICES * SEQ, str(SEQ), mesh, via, remat, dense_weights,
                optimizer="adafactor", partition=partition,
            ), emit="hlo",
        )  # fmt: skip
        program = compile_in_subprocess(request).program
    found, runs = census(program), Counter[tuple[str, int]]()
    # A ring keeps every row, whose blocks are as many as the routing makes them.
    assert found.unknown_loops == 0 or via == "ring"
    for moved in found.collectives:
        runs[moved.kind, moved.size_bytes // ITEMSIZE_BYTES[moved.dtype]] += moved.times
    made = [i for where in parse_hlo(program).computations.values() for i in where]
    gathers = [i for i in made if i.opcode in ("all-gather", "all-gather-start")]
    return Found(runs, {s.sizes for i in gathers for s in i.shapes})


@pytest.mark.parametrize(("machine", "step", "remat"), EVERY)
def test_slots_are_exchanged_twice_forward_twice_back_and_once_again(
    machine: str, step: str, remat: str
) -> None:
    found = compiled(machine, step, remat, "capacity")
    wanted = {"forward none": 2, "train none": 4, "train full": 5}[f"{step} {remat}"]
    gates = {"forward none": 0, "train none": 2, "train full": 3}[f"{step} {remat}"]
    assert found.per_layer("all-to-all", ROWS) == wanted
    assert found.runs["all-to-all", GATES] == gates * LAYERS
    assert found.sizes("all-to-all") <= {ROWS, GATES}
    kinds = {kind for kind, _ in found.runs} - {"all-reduce"}
    assert kinds == {"all-to-all"}, "nothing is gathered, and gradients of what lies whole summed"


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "step", "remat"), EVERY)
def test_tokens_go_round_a_ring_and_experts_stay(machine: str, step: str, remat: str) -> None:
    found = compiled(machine, step, remat, "ring")
    gathers, scatters = {
        "forward none": (1, 1), "train none": (2, 2), "train full": (3, 2),
    }[f"{step} {remat}"]  # fmt: skip
    assert found.per_layer("all-gather", TOKENS) == gathers
    # On a v5p, libtpu sums tokens everywhere and keeps a slice.
    scattered = "all-reduce" if "v5p" in machine else "reduce-scatter"
    assert found.per_layer(scattered, TOKENS) == scatters
    assert {kind for kind, _ in found.runs} <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert all(size % TOKENS == 0 for size in found.sizes("all-gather")), "tokens, nothing else"
    assert not any(MLP in sizes for sizes in found.gathered)


@pytest.mark.slow
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_partition_gathers_the_weights_of_experts(machine: str, partition: str) -> None:
    found = compiled(machine, "train", "full", "capacity", partition)
    assert found.per_layer("all-to-all", ROWS) == 5
    assert not any(MLP in sizes for sizes in found.gathered)
    weights = EXPERTS * EMBED * MLP
    assert max(found.sizes("all-gather"), default=0) < weights // DEVICES


@pytest.mark.slow
def test_a_table_is_looked_up_where_its_columns_are_stored() -> None:
    found = compiled(
        "cpu:8", "train", "full", "capacity", mesh="fsdp=2,expert=4", dense_weights="split"
    )
    assert found.runs["all-to-all", SEQ * EMBED] == 2, "what is looked up, and its gradient"
    assert found.runs["all-gather", DEVICES * SEQ] == 1, "ids"
    head = CONFIG["vocab_size"] * EMBED
    assert found.runs["all-gather", head] == found.runs["reduce-scatter", head] == 1
