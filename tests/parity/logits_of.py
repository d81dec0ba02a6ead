"""The logits that transformers gives for checkpoints: run by an interpreter that has it.

Reads a JSON list of {"folder": …, "tokens": …} from standard input.  Writes logits in float32 and
in float64 into each folder, and to standard output what loading each reported.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

MAJOR = int(transformers.__version__.split(".")[0])


class DoublePrecision(TorchFunctionMode):
    """Gives float64 to code that asks for float32 by name, as norms and routers do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.view:  # Bytes of a file (safetensors 0.8) keep their type.
            return func(*args, **(kwargs or {}))
        named = {key: _widen(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **named)


def _widen(value):
    return torch.float64 if value is torch.float32 else value


def load(folder: Path) -> tuple[Any, dict[str, list[str]]]:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if MAJOR > 4:
        model.set_experts_implementation("eager")
    return model.eval(), {key: sorted(map(str, found)) for key, found in report.items() if found}


def widen_rotary(model):
    """Make the rotary tables again, which were made in float32."""
    for module in list(model.modules()):
        if getattr(module, "rotary_emb", None) is not None:
            module.rotary_emb = type(module.rotary_emb)(config=model.config)
        if hasattr(module, "rotary_emb_local"):
            # Gemma 3 in version 4: its class takes the period from where the global one lies.
            local = copy.deepcopy(model.config)
            local.rope_theta = local.rope_local_base_freq
            local.rope_scaling = {"rope_type": "default"}
            module.rotary_emb_local = type(module.rotary_emb_local)(config=local)


def run(folder: Path, tokens: torch.Tensor) -> dict[str, list[str]]:
    model, report = load(folder)
    with torch.no_grad():
        single = model(input_ids=tokens, use_cache=False).logits
    model = model.double()
    torch.set_default_dtype(torch.float64)
    with torch.no_grad(), DoublePrecision():
        widen_rotary(model)
        double = model(input_ids=tokens, use_cache=False).logits
    torch.set_default_dtype(torch.float32)
    np.save(folder / "float32.npy", single.numpy())
    np.save(folder / "float64.npy", double.numpy())
    return report


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    jobs = json.load(sys.stdin)
    reports = [run(Path(j["folder"]), torch.from_numpy(np.load(j["tokens"]))) for j in jobs]
    json.dump({"version": transformers.__version__, "reports": reports}, sys.stdout)


if __name__ == "__main__":
    main()
