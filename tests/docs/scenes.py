"""What must have happened before commands of pages: ``python -m tests.docs.scenes NAME …``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def killed(*arguments: str) -> None:
    """Run a command of moecc that dies once it has recorded a few tensors."""
    from moecc.cli.main import main
    from moecc.formats.files import Disk, injected

    class Dying(Disk):
        left = 4

        def append(self, descriptor: int, data: bytes) -> None:
            super().append(descriptor, data)
            self.left -= 1
            if not self.left:
                os._exit(0)

    with injected(Dying()):
        main(list(arguments))
    raise AssertionError("it ended by itself")


def adapter(source: str, out: str, name: str) -> None:
    """Write a LoRA adapter of a model, which says that its base is called `name`."""
    stored = load_file(Path(source) / "model.safetensors")
    made = {}
    for tensor, array in stored.items():
        if tensor.endswith("mlp.up_proj.weight"):
            module = f"base_model.model.{tensor.removesuffix('.weight')}"
            made[f"{module}.lora_A.weight"] = np.full((1, array.shape[1]), 0.1, np.float32)
            made[f"{module}.lora_B.weight"] = np.full((array.shape[0], 1), 0.1, np.float32)
    Path(out).mkdir()
    save_file(made, Path(out) / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": name}
    (Path(out) / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
