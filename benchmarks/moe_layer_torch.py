"""transformers' mixtral layer in torch, and balanced `torch.bmm`, timed on request.

    python benchmarks/moe_layer_torch.py TOKENS D F EXPERTS K

`moe_layer.py` runs this in an interpreter that has torch and transformers, and asks for one run
after the other: a line ``["NAME", GRADIENTS]`` is answered by seconds by the clock and of
processors.  It needs no moecc.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter, process_time

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


def main() -> None:
    """Say what can be run, and run what is asked for."""
    tokens, d, f, experts, k = map(int, sys.argv[1:])
    torch.set_num_threads(os.cpu_count() or 1)
    blocks = {name: layer(d, f, experts, k, name) for name in IMPLEMENTATIONS}
    x = torch.randn(1, tokens, d)
    rows = x[0].repeat(k, 1).reshape(experts, -1, d)
    modules = {"torch balanced": (Balanced(blocks["eager"]), rows)}
    modules |= {f"transformers {name}": (block, x) for name, block in blocks.items()}
    ready = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(ready | {"programs": list(modules)}), flush=True)
    for line in sys.stdin:
        name, gradients = json.loads(line)
        call = step(*modules[name], gradients)
        wall, cpu = perf_counter(), process_time()
        call()
        print(json.dumps([perf_counter() - wall, process_time() - cpu]), flush=True)


if __name__ == "__main__":
    main()
