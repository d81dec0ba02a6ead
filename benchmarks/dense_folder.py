"""Write a checkpoint as a dense Hugging Face folder: the source that the benchmarks convert.

python benchmarks/dense_folder.py SmolLM2-135M-Instruct.Q4_1.gguf FOLDER [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.numpy import save_file

from moecc.formats.open import open_checkpoint
from moecc.formats.source import Checkpoint
from moecc.types import BY_TORCH


def write_dense_folder(checkpoint: Checkpoint, folder: Path, dtype: str = "bfloat16") -> None:
    """Write config, tokenizer and one safetensors file; the whole model is held in memory."""
    folder.mkdir(parents=True)
    config = {**checkpoint.config, "torch_dtype": dtype, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, content in checkpoint.companions().items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    wanted = BY_TORCH[dtype].numpy
    tensors = {name: checkpoint.read(name).astype(wanted) for name in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=BY_TORCH)
    arguments = parser.parse_args()
    with open_checkpoint(arguments.source) as checkpoint:
        write_dense_folder(checkpoint, arguments.folder, arguments.dtype)


if __name__ == "__main__":
    main()
