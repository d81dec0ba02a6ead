"""Loads exported encoders and encoder-decoders with transformers, and compares with saved outputs.

Reads a JSON list of folders from standard input and prints one JSON object.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModel, AutoModelForSeq2SeqLM

transformers.logging.set_verbosity_error()
found = {}
for folder in map(Path, json.load(sys.stdin)):
    is_encoder = json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    auto = AutoModel if is_encoder else AutoModelForSeq2SeqLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # T5 does not scale attention, so that random weights amplify the rounding of float32.
    model.double().eval()
    saved = {path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.npy")}
    given = {"input_ids": saved["tokens"], "attention_mask": saved["mask"].long()}
    if not is_encoder:
        given["decoder_input_ids"] = saved["decoder_tokens"]
    with torch.no_grad():
        result = model(**given)
    here = result.last_hidden_state if is_encoder else result.logits
    # What stands at the place of padding is nobody's business.
    kept = saved["mask"] if is_encoder else torch.ones(here.shape[:2], dtype=torch.bool)
    expected = saved["output"]
    found[folder.name] = {
        "class": type(model).__name__,
        "missing": sorted(n for n in info["missing_keys"] if not n.startswith("pooler.")),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "difference": float((here - expected)[kept].abs().max() / expected[kept].abs().max()),
    }
print(json.dumps({"version": transformers.__version__, "models": found}))
