"""What must have happened for some hints: ``python -m tests.docs.scenes NAME ARGUMENT…``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def killed(*arguments: str) -> None:
    """Run a command of moecc that dies once it has recorded a few tensors."""
    from moecc.cli.main import main
    from moecc.formats.disk import Disk, injected

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


def weights(source: str, out: str, value: str) -> None:
    """Copy a model, with `value` as the first number of each matrix, or ``0`` as every number."""
    shutil.copytree(source, out)
    file = Path(out) / "model.safetensors"
    arrays = load_file(file)
    for array in arrays.values():
        if value == "0":
            array[...] = 0
        elif array.ndim == 2:
            array[0, 0] = float(value)
    save_file(arrays, file, {"format": "pt"})


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


def liar(out: str) -> None:
    """Write a pass that promises to change nothing, and scales the logits."""
    from tests.cli.test_receipt import LIAR

    Path(out).write_text(LIAR)


def wrong_lowering(out: str) -> None:
    """Write a file that makes XLA's silu a little wrong, beside a pass, which a file must have."""
    from tests.cli.test_receipt import LIAR

    Path(out).write_text(
        """
from dataclasses import replace
from moecc_backends.xla.lower import function
from moecc_backends.xla.trace.context import LOWERINGS

right = LOWERINGS["silu"]

def wrong(ctx, node, x):
    made = right.function(ctx, node, x)
    return replace(made, array=made.array * (1 + 1e-6))

LOWERINGS["silu"] = replace(right, function=wrong)
"""
        + LIAR
    )


def lettered(source: str, out: str) -> None:
    """Copy a model, and give it a tokenizer with a letter for each of its tokens."""
    from tokenizers import Tokenizer, decoders, models

    shutil.copytree(source, out)
    letters = json.loads((Path(out) / "config.json").read_text())["vocab_size"]
    made = Tokenizer(models.BPE({chr(97 + n): n for n in range(letters)}, []))
    made.decoder = decoders.Fuse()
    made.save(str(Path(out) / "tokenizer.json"))


def split(source: str, out: str) -> None:
    """Write a GGUF file in parts, the first under the name `out`, which is none of a part."""
    from tests.checkpoint.gguf.test_gguf_parts import split as in_parts

    parts = in_parts(Path(source), Path("parts.gguf"))
    parts[0].rename(out)


def begun(source: str, out: str) -> None:
    """Copy a run as it is before its first checkpoint."""
    shutil.copytree(source, out)
    for step in (Path(out) / "steps").iterdir():
        shutil.rmtree(step)


def unreceipted(file: str) -> None:
    """Write the manifest of a GGUF file again, without what was measured."""
    from dataclasses import replace

    from moecc.formats.manifest import dump, load

    made = replace(load(Path(file)), receipt=None)
    Path(f"{file}.moecc.json").write_bytes(dump(made))


def mesh(file: str) -> None:
    """Lay the devices of this process as the mesh of a graph says."""
    from moecc_backends.xla.lower.function import device_mesh

    from moecc.errors import MoeccError
    from moecc.ir import parse

    try:
        device_mesh(parse(Path(file).read_text()))
    except MoeccError as error:
        sys.exit(str(error))


def edited(file: str, key: str, value: str) -> None:
    """Set a key of a JSON object."""
    path = Path(file)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: json.loads(value)}))


def mixing(out: str) -> None:
    """Write a model in which tokens meet in a mean, too, with its weights beside it."""
    from tests.passes.test_decode import ATTENTION, MEAN, PARTS

    after = f"{MEAN}  %b = broadcast %c, %a : f32[batch=B, seq=S, embed=4]"
    graph = ATTENTION.format(**{**PARTS, "after": after})
    Path(f"{out}.moe").write_text(graph)
    Path(out).mkdir()
    table = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    save_file({"table": table}, Path(out) / "model.safetensors")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
