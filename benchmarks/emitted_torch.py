"""An emitted model beside transformers' own of the same weights: forward, generation, training.

    python benchmarks/emitted_torch.py OWN EMITTED

The folders are of one model, say `convert SOURCE OWN --to mixtral` and `moecc emit torch OWN -o
EMITTED`. Runs alternate; printed is the ratio of processor times, the median of all pairs, as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)


def generation(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    model.generate(tokens[:, :16], attention_mask=torch.ones_like(tokens[:, :16]), **options)


def training(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()


def seconds(step: Callable[..., None], model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the processor time of a step."""
    start = time.process_time()
    step(model, tokens)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("own")
    parser.add_argument("emitted")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", nargs="*", default=["forward", "generation", "training"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = AutoModelForCausalLM.from_pretrained
    models = [
        load(folder, dtype=torch.float32, trust_remote_code=True).eval()
        for folder in (options.own, options.emitted)
    ]
    # Experts are stacked in new memory, or stay pages of the file, which are read more slowly.
    for parameter in (p for model in models for p in model.parameters()):
        parameter.data = parameter.data.clone()
    vocabulary = models[0].config.vocab_size
    tokens = torch.randint(vocabulary, (1, options.seq), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, emitted = (model(input_ids=tokens).logits for model in models)
    ratios: dict[str, object] = {"difference": float((own - emitted).abs().max() / own.abs().max())}
    for name in options.steps:
        step = {"forward": forward, "generation": generation, "training": training}[name]
        for model in models:
            model.train(name == "training")
            step(model, tokens)
        pairs = []
        for number in range(options.pairs):
            # The second of two runs finds other things in the caches: each is second in turn.
            order = (0, 1) if number % 2 else (1, 0)
            times = {at: seconds(step, models[at], tokens) for at in order}
            pairs.append(times[1] / times[0])
        ratios[name] = {"ratio": statistics.median(pairs), "pairs": sorted(pairs)}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
