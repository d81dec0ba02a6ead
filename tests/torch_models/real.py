"""Real checkpoints converted as modules of PyTorch, and by their family where moecc reads it.

python -m tests.torch_models.real --out docs/proofs/torch-real.json FOLDER FOLDER=mixtral
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from moecc_backends.torch_export.folders import ModelFolder, example_inputs
from safetensors.torch import load_file

from moecc import torch as mt
from moecc.cli.main import main as moecc

PIPELINE = "upcycle{experts=4 top-k=2}"
PRODUCTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def first_output(model, inputs: dict[str, Any]):
    """Return the logits, or the hidden states."""
    with torch.no_grad():
        return model(**inputs)[0].float()


def difference(a, b) -> float:
    """Return the largest difference beside the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def judge(source: str, family: str, work: Path) -> dict[str, Any]:
    """Convert a folder, and return what the results have in common."""
    sparse, by_family = work / "sparse", work / "family"
    words = ["-p", PIPELINE, "--force"]
    row = {
        "name": Path(source).name,
        "convert": moecc(["convert", source, str(sparse), "--via", "torch", *words]),
        "prove": moecc(["prove", source, str(sparse)]),
        "verify": moecc(["verify", str(sparse)]),
    }
    config = json.loads(Path(source, "config.json").read_text("utf-8"))
    dense = ModelFolder.of(Path(source), config, trust_remote_code=False).loaded().float()
    moe = mt.load(sparse).float().eval()
    inputs = next(example_inputs(dense))
    draws = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(x.shape, generator=draws) if x.is_floating_point()
        else torch.randint(5, 1000, x.shape, generator=draws)
        for name, x in inputs.items()
    }  # fmt: skip
    outputs = first_output(moe, inputs)
    row["class"], row["blocks"] = type(dense).__name__, len(moe.conversion.places)
    row["difference"] = difference(outputs, first_output(dense, inputs))
    if family == "mixtral":
        row["family"] = moecc(["convert", source, str(by_family), "--to", family, *words])
        ours, theirs = (
            load_file(sparse / "model.safetensors"),
            load_file(by_family / "model.safetensors"),
        )
        same = {name: name in ours and torch.equal(x, ours[name]) for name, x in theirs.items()
                if "block_sparse_moe" not in name}  # fmt: skip
        for name, x in theirs.items():
            layer, _, part = name.partition(".block_sparse_moe.experts.")
            if part:
                expert, product, _ = part.split(".")
                stack = ours[f"{layer}.mlp.experts.{PRODUCTS[product]}.weight"]
                same[name] = torch.equal(x, stack[int(expert)])
        row["tensors_of_the_family"], row["tensors_alike"] = len(same), sum(same.values())
        other = transformers.AutoModelForCausalLM.from_pretrained(by_family, dtype=torch.float32)
        row["difference_of_the_family"] = difference(outputs, first_output(other.eval(), inputs))
    return row


def main():
    """Judge the folders that are named, each with a family to compare with or none."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("folders", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text("utf-8"))["rows"] if options.out.exists() else []
    for text in options.folders:
        source, _, family = text.partition("=")
        with tempfile.TemporaryDirectory() as work:
            row = judge(source, family, Path(work))
        rows = [*(r for r in rows if r["name"] != row["name"]), row]
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        document = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "pipeline": PIPELINE,
                    "rows": rows}  # fmt: skip
        options.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
