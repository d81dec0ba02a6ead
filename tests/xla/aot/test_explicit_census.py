"""The collectives of a sparse layer in programs whose exchanges stand in the graph.

The same model under XLA's partitioner is counted in `test_steps`.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")

from moecc_backends.xla.aot.topology import missing

from moecc.plan.machines import parse_machine

from .explicit_probe import BATCH, EMBED, EXPERTS, LAYERS, MLP, SEQ

CASES = (
    "capacity forward none", "capacity train none", "capacity train full",
    "ring forward none", "ring train none", "ring train full",
)  # fmt: skip
QUICK = ("cpu:8", "capacity train full")
MACHINES = ("cpu:8", "tpu:v5p:2x2x2", "tpu:v6e:2x4", "gpu:h100:8")
EVERY = [
    pytest.param(machine, case, marks=[] if (machine, case) == QUICK else pytest.mark.slow)
    for machine in MACHINES
    for case in CASES
]

TOKENS = BATCH * SEQ * EMBED
"""Elements of all tokens, which a ring gathers, and to whose sums it adds."""

ROWS = EXPERTS * 10 * EMBED
"""Elements of the rows of a device's group: 10 for each expert, 1.25 times its share of 64."""


@functools.cache
def probed(machine: str, *cases: str) -> dict[str, Any]:
    why = missing(parse_machine(machine).kind)
    if why is not None:
        pytest.skip(why)
    script = Path(__file__).parent / "explicit_probe.py"
    command = [sys.executable, str(script), machine, *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def program(machine: str, case: str) -> dict[str, Any]:
    """Return what was found in a program; those of a machine are compiled in one process."""
    cases = (case,) if (machine, case) == QUICK else CASES
    found: dict[str, Any] = probed(machine, *cases)[case]
    assert found["unknown_loops"] == 0
    return found


def per_layer(found: dict[str, Any], kind: str, elements: int) -> float:
    """Return how many tensors of `elements` a collective `kind` moves in a layer.

    XLA makes one instruction of several, so bytes count; a CPU moves bfloat16 as float32, so
    elements do.  What is smaller, or no multiple, is something else.
    """
    moved = (size * n for k, size, n in found["runs"] if k == kind and size % elements == 0)
    return sum(moved) / elements / LAYERS


@pytest.mark.parametrize(("machine", "case"), [c for c in EVERY if "capacity" in c.values[1]])
def test_slots_are_exchanged_twice_forward_twice_back_and_twice_again(
    machine: str, case: str
) -> None:
    found = program(machine, case)
    wanted = {"forward none": 2, "train none": 4, "train full": 6}[case.partition(" ")[2]]
    assert per_layer(found, "all-to-all", ROWS) == wanted
    kinds = {k: n for k, _, n in found["runs"] if k not in ("all-reduce", "all-to-all")}
    assert kinds == {}, "nothing is gathered, and gradients of what lies whole are summed"


@pytest.mark.parametrize(("machine", "case"), [c for c in EVERY if "ring" in c.values[1]])
def test_tokens_go_round_a_ring_and_experts_stay(machine: str, case: str) -> None:
    found = program(machine, case)
    gathers, scatters = {
        "forward none": (1, 1), "train none": (2, 2), "train full": (3, 2),
    }[case.partition(" ")[2]]  # fmt: skip
    assert per_layer(found, "all-gather", TOKENS) == gathers
    # On a v5p, libtpu sums tokens everywhere and keeps a slice.
    kind = "all-reduce" if "v5p" in machine else "reduce-scatter"
    assert per_layer(found, kind, TOKENS) == scatters
    kinds = {k for k, *_ in found["runs"]}
    assert kinds <= {"all-gather", "reduce-scatter", "all-reduce"}
    gathered = [size for kind, size, _ in found["runs"] if kind == "all-gather"]
    assert all(size % TOKENS == 0 for size in gathered), "nothing but tokens is gathered"
    assert not any(MLP in sizes for sizes in found["gathered"])
