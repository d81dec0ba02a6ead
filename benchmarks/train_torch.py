"""The side of torch in `benchmarks/train.py`: train a checkpoint, as many steps as asked.

python benchmarks/train_torch.py FOLDER IMPLEMENTATION < requests

A request is a line of JSON, ``{"tokens": [[[…]]]}`` with a batch for each step; the answer has the
cross entropy of each step and the processor time of all, and what was the most memory so far.
IMPLEMENTATION is how transformers runs experts: ``eager``, ``grouped_mm`` or ``batched_mm``.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

RATE, CLIP, BALANCE = 1e-3, 1.0, 0.01
"""As the recipe of the other side has them."""


class Training:
    """A model with an optimiser: AdamW, gradients clipped, and the balance loss of experts."""

    def __init__(self, folder: str, implementation: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.is_sparse = hasattr(self.model.config, "router_aux_loss_coef")
        if self.is_sparse:
            self.model.set_experts_implementation(implementation)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )

    def step(self, tokens: torch.Tensor) -> float:
        """Train on ``[batch, seq]`` and return the cross entropy, in nats a token."""
        options: dict[str, Any] = {"output_router_logits": True} if self.is_sparse else {}
        made = self.model(tokens, use_cache=False, **options)
        loss = torch.nn.functional.cross_entropy(
            made.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        total = loss + BALANCE * made.aux_loss if self.is_sparse else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    training = Training(*sys.argv[1:3])
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}),
          flush=True)  # fmt: skip
    for line in sys.stdin:
        batches = [torch.tensor(batch) for batch in json.loads(line)["tokens"]]
        begin = time.process_time()
        losses = [training.step(batch) for batch in batches]
        seconds = time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"losses": losses, "seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
