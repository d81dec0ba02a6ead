"""The side of transformers in `benchmarks/generate.py`: continue a prompt, as often as asked.

python benchmarks/generate_torch.py FOLDER < requests

A request is a line of JSON, ``{"prompt": [[…]], "tokens": 48}``; the answer has the tokens and the
processor time of those after the first.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with torch.no_grad():
            print(json.dumps(continued(model, request["prompt"], request["tokens"])), flush=True)


def continued(model: torch.nn.Module, prompt: list[list[int]], count: int) -> dict[str, object]:
    """Return the likeliest tokens after a prompt, and the seconds that all but the first took."""
    made = model(torch.tensor(prompt), use_cache=True)
    chosen = [made.logits[:, -1].argmax(-1, keepdim=True)]
    begin = time.process_time()
    for _ in range(count):
        made = model(chosen[-1], past_key_values=made.past_key_values, use_cache=True)
        chosen.append(made.logits[:, -1].argmax(-1, keepdim=True))
    seconds = time.process_time() - begin
    return {"tokens": torch.cat(chosen, 1).tolist(), "seconds": seconds}


if __name__ == "__main__":
    main()
