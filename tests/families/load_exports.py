"""Loads exported folders with transformers and says how far its logits are from the saved ones.

python load_exports.py FOLDER...    prints one JSON object; run by test_export_parity.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
found = {}
for folder in map(Path, sys.argv[1:]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    tokens, logits = (np.load(folder / f"{name}.npy") for name in ("tokens", "logits"))
    with torch.no_grad():
        here = model(torch.from_numpy(tokens)).logits.numpy()
    found[folder.name] = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "difference": float(np.abs(here - logits).max() / np.abs(logits).max()),
    }
print(json.dumps({"version": transformers.__version__, "models": found}))
