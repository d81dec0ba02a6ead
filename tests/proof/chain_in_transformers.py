"""The side of transformers in `chain.py`: the loss of a token folder, and a continued text.

Run by an interpreter with torch and transformers, with a JSON object as its argument; it imports
nothing of moecc.  It reads the token folder as docs/recipes.md describes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def documents(folder: Path) -> list[np.ndarray]:
    """Return the ids of each document, without special tokens."""
    facts = json.loads((folder / "tokens.json").read_text("utf-8"))
    ids = np.fromfile(folder / "tokens.bin", np.dtype(facts["dtype"]).newbyteorder("<"))
    starts = np.fromfile(folder / "starts.bin", "<i8")
    return [ids[a:b].astype(np.int64) for a, b in pairwise(starts)]


def pieces(texts: list[np.ndarray], end: int, seq: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and the next ones: documents in a row, each with its end, cut into rows."""
    filled = 0
    for text in texts:
        ids, start = np.append(text, end), 0
        while start < len(ids):
            stop = min(len(ids), start + seq - filled)
            following = ids[start + 1 : stop + 1]
            yield ids[start : start + len(following)], following
            filled, start = (filled + stop - start) % seq, stop


def loss_of(model, folder: Path, end: int, seq: int) -> tuple[float, int]:
    """Return the mean loss of a token in nats, and how many there are."""
    total, count = 0.0, 0
    for tokens, following in pieces(documents(folder), end, seq):
        if len(tokens):
            logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits.double(), torch.from_numpy(following), reduction="sum"
            )
            total, count = total + float(losses), count + len(tokens)
    return total / count, count


def main():
    asked = json.loads(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    # Threads that wait for one another cost more than they bring, where other work is done.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    model, report = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    folder = Path(asked["tokens"])
    otherwise = [
        number
        for number, ids in enumerate(documents(folder))
        if tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids != ids.tolist()
    ]
    with torch.no_grad():
        loss, count = loss_of(model, folder, tokenizer.eos_token_id, asked["seq"])
        prompt = tokenizer(asked["prompt"], return_tensors="pt").input_ids
        made = model.generate(prompt, max_new_tokens=asked["continued"], do_sample=False)
    print(json.dumps({
        "version": transformers.__version__, "torch": torch.__version__,
        "class": type(model).__name__, "loss": loss, "tokens": count,
        "report": {key: sorted(map(str, found)) for key, found in report.items() if found},
        "encoded_otherwise": otherwise,
        "text": tokenizer.decode(made[0], skip_special_tokens=True),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
