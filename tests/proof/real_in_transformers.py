"""The side of transformers in `real.py`: what it computes of a checkpoint, for inputs it draws.

    python -m tests.proof.real_in_transformers FOLDER OUT.npz

Run by an interpreter with torch and transformers.  Writes the inputs by moecc's names, and
``float32`` and ``float64``, the output in either type; prints a JSON object.  It imports nothing of
moecc.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.parity.logits_of import DoublePrecision, widen_rotary

NAMES = {
    "tokens": "input_ids",
    "decoder_tokens": "decoder_input_ids",
    "features": "input_features",
    "pixels": "pixel_values",
}

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def inputs(config) -> dict[str, np.ndarray]:
    """Draw inputs of a model, by moecc's names."""
    rng = np.random.default_rng(0)
    if hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        features = rng.normal(0, 0.5, (1, config.num_mel_bins, frames)).astype(np.float32)
        tokens = rng.integers(0, config.vocab_size, (1, 32))
        return {"features": features, "decoder_tokens": tokens}
    if hasattr(config, "image_size"):
        sizes = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixels": rng.normal(0, 1, sizes).astype(np.float32)}
    tokens = rng.integers(4, config.vocab_size, (2, 128))
    if config.is_encoder_decoder:
        return {"tokens": tokens, "decoder_tokens": rng.integers(4, config.vocab_size, (2, 32))}
    return {"tokens": tokens}


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model in float32, and what loading it reported."""
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["AutoModel"])[0]
    bare = name.endswith("Model") and not name.endswith("LMHeadModel")
    headless = (bare or name.endswith("ForMaskedLM")) and not hasattr(config, "num_mel_bins")
    auto = transformers.AutoModel if headless else getattr(transformers, name)
    # Grouped products have no float64; families without experts do not know the option.
    plain = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model, report = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **plain
    )
    return model.eval(), report


def output(model, given: dict[str, torch.Tensor]) -> np.ndarray:
    """Return logits, or hidden states where the model has no head."""
    with torch.no_grad():
        made = model(**given)
    return (made.logits if hasattr(made, "logits") else made.last_hidden_state).numpy()


def main():
    """Compute, and write what was computed and what was given."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder, out = map(Path, sys.argv[1:])
    model, report = loaded(folder)
    drawn = inputs(model.config)
    given = {NAMES[name]: torch.from_numpy(values) for name, values in drawn.items()}
    single = output(model, given)
    model = model.double()
    torch.set_default_dtype(torch.float64)
    with DoublePrecision():
        widen_rotary(model)
        wide = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
        double = output(model, wide)
    narrow = {n: v.astype(np.int32) if v.dtype == np.int64 else v for n, v in drawn.items()}
    np.savez(out, float32=single, float64=double, **narrow)
    left = {key: [n for n in report[key] if "pooler" not in n] for key in KEYS}
    print(json.dumps({"version": transformers.__version__, "class": type(model).__name__, **left}))


if __name__ == "__main__":
    main()
