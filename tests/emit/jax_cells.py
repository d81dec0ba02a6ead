"""Cells as programs in JAX: ``python -m tests.emit.jax_cells --out FILE`` judges them.

A cell of FILE whose text is as it was, and was right, is not judged again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from moecc.errors import MoeccError
from tests.emit.cells import METHODS, SOURCES, EmittedCell, relative, write_reference
from tests.emit.prove import BOUNDS, digest, is_right

METHODS_IN_JAX = ("dense", "upcycled", "st-moe", "st-moe in training")
FILE = "jax_st_moe.py"


def program_of(folder: Path) -> ModuleType:
    """Return the emitted file as a module."""
    spec = importlib.util.spec_from_file_location("jax_st_moe", folder / FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judge(
    folder: Path, *, gradients: bool, kinds: Iterable[str] = tuple(BOUNDS)
) -> dict[str, float]:
    """Return the relative errors of outputs, losses and gradients of a written cell, by type."""
    write_reference(folder, folder / "reference.npz", gradients=gradients)
    program, reference = program_of(folder), np.load(folder / "reference.npz")
    is_train = 'attr mode = "train"' in "\n".join(
        json.loads((folder / "config.json").read_text())["graph"]
    )
    main = "logits" if "out.logits" in reference else "hidden"
    expected = {n.partition(".")[2]: reference[n] for n in reference if n.startswith("grad.")}
    errors = {}
    for kind in kinds:
        with jax.enable_x64(kind == "float64"):
            # The types of JAX in this mode: of whole numbers, and of all others.
            types = {"i": np.int32, "b": bool, "f": np.dtype(kind)}
            params = jax.tree.map(lambda x, t=types: x.astype(t["f"]), program.load(folder))
            inputs = {
                n.removeprefix("in."): reference[n].astype(types[reference[n].dtype.kind])
                for n in reference
                if n.startswith("in.")
            }
            cotangent = reference["cotangent"].astype(types["f"])

            def loss(params, inputs=inputs, cotangent=cotangent):
                training = program.TrainingKeys() if is_train else None
                outputs = program.apply(params, **inputs, training=training)
                value = (outputs[main] * cotangent).sum() + outputs.get("aux_loss", 0.0)
                return value, outputs

            slopes = {}
            if expected:
                (_, outputs), tree = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
                slopes = flat(tree)
                assert slopes.keys() == expected.keys()
            else:
                _, outputs = jax.jit(loss)(params)
        wanted, output = reference[f"out.{main}"], np.asarray(outputs[main], np.float64)
        if main == "hidden" and "in.mask" in reference:
            wanted, output = (x * reference["in.mask"][..., None] for x in (wanted, output))
        errors[f"{kind}.output"] = relative(output, wanted)
        if "out.loss.auxiliary" in reference:
            aux = np.asarray(outputs["aux_loss"], np.float64)
            errors[f"{kind}.aux_loss"] = relative(aux, reference["out.loss.auxiliary"])
        if expected:
            errors[f"{kind}.gradient"] = max(relative(slopes[n], x) for n, x in expected.items())
    return errors


def flat(tree: object) -> dict[str, object]:
    """Return parameters by their names in the checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path): x
        for path, x in leaves
    }


def main():
    """Judge all sources by the methods, or those that are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="*", default=SOURCES)
    parser.add_argument("--methods", nargs="*", default=METHODS_IN_JAX, choices=METHODS)
    parser.add_argument("--gradients", nargs="*", default=("llama_gqa", "bert_square"))
    options = parser.parse_args()
    earlier = json.loads(options.out.read_text())["cells"] if options.out.exists() else []
    rows = {(row["source"], row["method"]): row for row in earlier}
    for cell in (EmittedCell(s, m) for s in options.sources for m in options.methods):
        row = {"source": cell.source, "method": cell.method}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "cell"
            try:
                cell.write(folder, "jax")
                row["text"] = digest((folder / FILE).read_bytes())
                before = rows.get((cell.source, cell.method), {})
                if before.get("text") == row["text"] and before["right"]:
                    continue
                errors = judge(folder, gradients=cell.source in options.gradients)
                row |= {**errors, "right": is_right(errors)}
            except MoeccError as error:
                row["refused"] = " ".join(str(error).split())[:300]
        rows[cell.source, cell.method] = row
        print(row, flush=True)
        report = {
            "date": datetime.date.today().isoformat(), "jax": jax.__version__, "bounds": BOUNDS,
            "right": sum(r.get("right") is True for r in rows.values()),
            "judged": sum("refused" not in r for r in rows.values()), "cells": [*rows.values()],
        }  # fmt: skip
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
