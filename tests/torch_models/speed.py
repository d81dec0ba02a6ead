"""The time of a converted model beside the same mixtures written by hand: seconds of the processor.

python -m tests.torch_models.speed docs/proofs/torch-speed.json
"""

from __future__ import annotations

import json
import sys
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import nn

from moecc import torch as mt

EXPERTS, TOP_K, RUNS = 8, 2, 15
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1000,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


class HandWritten(nn.Module):
    """A mixture as transformers wrote Mixtral: a loop over the experts that tokens chose."""

    def __init__(self, mixture):
        super().__init__()
        experts = mixture.experts
        self.router = mixture.router.weight
        self.gate, self.up = experts.gate_proj.weight, experts.up_proj.weight
        self.down = experts.down_proj.weight

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        best, index = nn.functional.linear(rows, self.router).topk(TOP_K, dim=-1)
        gates, result = best.softmax(-1), torch.zeros_like(rows)
        for expert in range(EXPERTS):
            row, slot = torch.where(index == expert)
            tokens = rows[row]
            hidden = nn.functional.silu(tokens @ self.gate[expert].T) * (tokens @ self.up[expert].T)
            weighted = (hidden @ self.down[expert].T) * gates[row, slot, None]
            result.index_add_(0, row, weighted)
        return result.reshape(x.shape)


def seconds(model, ids, *, trains: bool) -> float:
    """Return the time of the processor that a forward pass or a training step takes."""
    start = time.process_time()
    with torch.set_grad_enabled(trains):
        loss = model(input_ids=ids, labels=ids).loss
        if trains:
            loss.backward()
            model.zero_grad(set_to_none=True)
    return time.process_time() - start


def main():
    """Time both models in turn, and write the medians and their ratio."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    ids = torch.randint(3, 1000, (4, 128))
    pipeline = f"upcycle{{experts={EXPERTS} top-k={TOP_K} router-std=1}}"
    converted = mt.convert(dense, {"input_ids": ids}, pipeline)
    by_hand = deepcopy(converted)
    for layer in by_hand.model.layers:
        layer.mlp = HandWritten(layer.mlp)
    torch.testing.assert_close(converted(ids).logits, by_hand(ids).logits)
    document = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": 1,
        "experts": EXPERTS, "top_k": TOP_K, "tokens": ids.numel(), **SIZES,
    }  # fmt: skip
    for name, trains in (("forward", False), ("step", True)):
        times = []
        for _ in range(RUNS + 2):  # the first two warm up
            times.append((seconds(converted, ids, trains=trains),
                          seconds(by_hand, ids, trains=trains)))  # fmt: skip
        a, b = (median(column) for column in zip(*times[2:], strict=True))
        document[name] = {"converted_s": a, "by_hand_s": b, "ratio": a / b}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
