"""The census of steps that are compiled for other machines: what the layout says, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")

from moecc_backends.xla.aot.compiler import missing

from moecc.ahead.request import Request
from moecc.jobs.compile import compile_in_subprocess
from moecc.plan.machines import parse_machine
from moecc.plan.step import StepConfig
from moecc.sharding.vias import PARTITIONS

MODEL = str(Path(__file__).parents[2] / "golden" / "mixtral_gqa")
LAYERS = 2

pytestmark = pytest.mark.slow


def compiled(machine: str, **options: Any) -> dict[str, Any]:
    why = missing(parse_machine(machine).kind)
    if why is not None:
        pytest.skip(why)
    config = StepConfig(batch_tokens=8 * 64, sequence="64", optimizer="adafactor", **options)
    request = Request(MODEL, machine, config)
    return compile_in_subprocess(request).data


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("machine", ["cpu:8", "gpu:h100:8", "tpu:v5p:2x2x2", "tpu:v6e:2x4"])
@pytest.mark.parametrize(
    ("step", "remat", "exchanges"),
    [("forward", "none", 2), ("train", "none", 4 + 2), ("train", "full", 5 + 3)],
)
def test_two_exchanges_a_layer_and_as_many_back_and_one_again(
    machine: str, step: str, remat: str, exchanges: int, partition: str
) -> None:
    """Rows are exchanged so often, and in training the gates that weight them at their experts."""
    found = compiled(machine, step=step, remat=remat, mesh="data=2,expert=4", partition=partition)
    moved = found["collectives"]["all-to-all"]
    assert moved["runs"] == exchanges * LAYERS
    foretold = found["predicted"]["collectives"]["all-to-all"]["bytes"]
    # A CPU moves bfloat16 as float32.
    assert moved["bytes"] == pytest.approx(foretold * (2 if machine == "cpu:8" else 1), rel=0.05)
    assert found["flops"] == pytest.approx(found["predicted"]["flops"], rel=0.02)
    assert found["fits"]
