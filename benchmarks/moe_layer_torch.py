"""Speed of transformers' mixtral layer in torch, beside balanced `torch.bmm`; JSON on stdout.

    python benchmarks/moe_layer_torch.py TOKENS D F EXPERTS K PAIRS

`moe_layer.py` runs this in an interpreter that has torch and transformers.  It needs no moecc.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

IMPLEMENTATIONS = ("eager", "grouped_mm")


def layer(d: int, f: int, experts: int, k: int, implementation: str) -> torch.nn.Module:
    """Return a mixtral layer with random weights, the same for every implementation."""
    config = transformers.MixtralConfig(
        hidden_size=d, intermediate_size=f, num_local_experts=experts, num_experts_per_tok=k
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block


class Balanced(torch.nn.Module):
    """The same experts on equal shares of rows that lie ready."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = block.experts.gate_up_proj, block.experts.down_proj

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Run ``[experts, rows, embed]``."""
        gate, up = torch.bmm(rows, self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(gate) * up, self.down.transpose(1, 2))


def step(module: torch.nn.Module, x: torch.Tensor, gradients: bool) -> Callable[[], None]:
    """Return what is timed: the forward pass, or the forward and backward pass."""

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def both() -> None:
        module.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        result = module(leaf)
        result = result[0] if isinstance(result, tuple) else result
        result.backward(result.detach())

    return both if gradients else forward


def measure(steps: dict[str, Callable[[], None]], pairs: int) -> dict[str, dict[str, Any]]:
    """Run all in turns; percent is of the balanced rows, the first of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, pairs):
        for name, call in steps.items():
            wall, cpu = perf_counter(), process_time()
            call()
            if turn >= 0:
                seconds[name].append(perf_counter() - wall)
                processor[name].append(process_time() - cpu)
    first = next(iter(steps))
    return {
        name: {
            "seconds": median(seconds[name]),
            "percent": _percent(seconds[first], seconds[name]),
            "percent_by_processor_time": _percent(processor[first], processor[name]),
            "pairs": pairs,
        }
        for name in steps
    }


def _percent(yardstick: list[float], times: list[float]) -> float:
    return 100 * median(y / t for y, t in zip(yardstick, times, strict=True))


def main() -> None:
    """Run the benchmark."""
    tokens, d, f, experts, k, pairs = map(int, sys.argv[1:])
    torch.set_num_threads(os.cpu_count() or 1)
    blocks = {name: layer(d, f, experts, k, name) for name in IMPLEMENTATIONS}
    x = torch.randn(1, tokens, d)
    rows = x[0].repeat(k, 1).reshape(experts, -1, d)
    modules = {"balanced": (Balanced(blocks["eager"]), rows)}
    modules |= {f"transformers {name}": (block, x) for name, block in blocks.items()}
    modes = {
        mode: measure({name: step(*parts, gradients) for name, parts in modules.items()}, pairs)
        for mode, gradients in (("forward", False), ("forward + backward", True))
    }
    report = {"torch": torch.__version__, "transformers": transformers.__version__, "modes": modes}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
