"""``moecc prove``: prove that two graphs, models or folders are the same function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from moecc.errors import CheckError, InputError, MoeccError, Problem, UsageError, raise_problems
from moecc.formats.manifest import MANIFEST_NAME, Manifest, file_digest, load
from moecc.ir.structure import clone
from moecc.jobs.command import (
    Force,
    Load,
    OutputFile,
    Report,
    Spelling,
    check_writable,
    read_pipeline,
)
from moecc.model.open import CONFIG_NAME, OpenedModel, is_function_folder, open_model
from moecc.prove import Prover, Verdict
from moecc.prove.conversion import ConversionProof, compared, prove_conversion
from moecc.prove.log import proof_paths
from moecc.support.console import warn
from moecc.support.text import amount
from moecc.translate.export import Export, WrappedExport


def prove(
    a: Annotated[str, Spelling("A", complete="models")],
    b: Annotated[str, Spelling("B", complete="models")],
    *,
    exact: bool = False,
    proof: OutputFile = None,
    load: Load = (),
    force: Force = False,
) -> Report:
    """Prove that two models are the same function.

    The proof holds for all inputs, all weights, and all batch and sequence sizes, in real
    arithmetic. Parameters are compared by their weight expressions; no weight is read. Where B is
    a folder that moecc converted from A, its tensors stand for what the conversion wrote to them.

    The exit code is 0 for a proof, 3 where data were drawn on which the models differ, and 1 where
    neither was found.

    Args:
      a: Hugging Face folder, .gguf file, .moe graph, or preset:NAME.
      b: Model to compare with A.
      exact: Prove that the reference computes the same bits, not the same real numbers.
      proof: File for the log of the proof, which moecc-check accepts; the graphs are written
        beside it.

    Example:
      moecc prove smollm2 smollm2-8x
    """
    check_proof_files(proof, force=force)
    comparison = _comparison(a, b, Prover(exact=exact), load)
    if proof is not None and comparison.verdict:
        comparison.write(Path(proof))
    data = {"a": a, "b": b, "proof": comparison.to_json(), "node": comparison.verdict.node}
    data["terms"] = list(comparison.verdict.terms)
    problem = verdict_problem(comparison.verdict)
    error = None if problem is None else _error(comparison.verdict, problem)
    return Report("prove", data, lambda: proof_text(comparison, a, b), error=error)


def _comparison(a: str, b: str, prover: Prover, load: Load) -> ConversionProof:
    if is_function_folder(b) and not is_function_folder(a) and Path(a, CONFIG_NAME).is_file():
        from moecc import torch as mt

        read_pipeline("", load)
        module_proof: ConversionProof = mt.prove_folder(a, b, prover)
        return module_proof
    with open_model(a, config_alone=True) as source, open_model(b, config_alone=True) as result:
        manifest = _conversion_of(source, result)
        if manifest is None:
            return compared(source.graph, result.graph, prover)
        return replay(source, result, manifest, prover, load)


def check_proof_files(file: str | None, *, force: bool) -> None:
    """Raise InputError if a file of a proof cannot be written, or is there and not replaced."""
    for path in () if file is None else proof_paths(Path(file)):
        check_writable(str(path), force=force)


def _error(verdict: Verdict, problem: Problem) -> MoeccError:
    return CheckError([problem]) if verdict.status == "refuted" else InputError([problem])


def verdict_problem(verdict: Verdict) -> Problem | None:
    """Return what keeps two graphs from being proved equal; None if they are."""
    if verdict.status == "proved":
        return None
    before, after = verdict.terms
    example = verdict.counterexample
    if example is None:
        return Problem("not proved", verdict.node, before, after,
                       "sampling may decide: moecc verify B --against A")  # fmt: skip
    sizes = ", ".join(f"{name} = {size}" for name, size in example.sizes.items())
    where = f"seed {example.seed}" + (f" at {sizes}" if sizes else "")
    by = "" if example.difference is None else f" by {example.difference:.2g}"
    text = f"not the same function: {example.output} differs{by}, {where}"
    return Problem(text, verdict.node, before, after)


def proof_text(proof: ConversionProof, a: str, b: str) -> str:
    """Return a proof as people read it."""
    verdict = proof.verdict
    rows = [f"{a} and {b}: {verdict.status}"]
    rows += [
        f"  lemma       {name}: {amount(count, 'use')}" for name, count in verdict.lemmas.items()
    ]
    if verdict.status == "proved":
        rows += [f"  assuming    {assumption}" for assumption in verdict.assumptions]
    return "\n".join(rows)


def replayed(source: OpenedModel, result: OpenedModel) -> ConversionProof | None:
    """Prove again what the receipt of a converted folder says is proved.

    None stands for a receipt that says nothing, and for a conversion that cannot be planned again
    from its source alone, which is reported: one with further models, statistics, passes of its
    own, or a program.

    Raises:
      CheckError: it is not proved, or is the proof of other graphs.
    """
    from moecc.jobs.receipt import load_receipt, object_of

    manifest = _conversion_of(source, result)
    if manifest is None or result.checkpoint is None:
        return None
    stated = object_of(object_of(load_receipt(result.checkpoint.path)).get("proof"))
    if stated.get("verdict") != "proved":
        return None
    try:
        proof = replay(source, result, manifest, Prover())
    except (InputError, UsageError) as error:
        warn(f"the proof of the receipt was not repeated: {error.problems[0].what}")
        return None
    graphs = {"source": proof.source, "result": proof.result}
    if (problem := verdict_problem(proof.verdict)) is not None:
        raise CheckError([problem])
    if graphs != {name: stated.get(name) for name in graphs}:
        raise CheckError("the receipt has the proof of other graphs", where=result.name,
                         expected=str(graphs), found=str(stated))  # fmt: skip
    return proof


def _conversion_of(source: OpenedModel, result: OpenedModel) -> Manifest | None:
    """Return the manifest of a result that was converted from the files of `source`."""
    if source.checkpoint is None or result.checkpoint is None:
        return None
    path = result.checkpoint.path
    if not (path / MANIFEST_NAME).is_file():
        return None
    manifest = load(path)
    config = manifest.source_files.get(CONFIG_NAME)
    source_config = source.checkpoint.path / CONFIG_NAME
    if config is None or not source_config.is_file():
        return None
    return manifest if file_digest(source_config) == config.sha256 else None


def replay(
    source: OpenedModel, result: OpenedModel, manifest: Manifest, prover: Prover, load: Load = ()
) -> ConversionProof:
    """Plan again the conversion that a manifest states, and prove it.

    The rounding of weights to the element type that was asked for is no part of the function.

    Raises:
      InputError: the conversion read further models or statistics, or its plan differs now.
    """
    from moecc.jobs.conversion import plan

    passes = read_pipeline(manifest.pipeline, load)
    copied = replace(source, graph=clone(source.graph))
    export = plan(copied, passes, manifest.family_to, seed=manifest.seed, check=False).export
    if not isinstance(export, Export):
        raise InputError("a folder is of a family", where=result.name, found=manifest.family_to)
    raise_problems(_differences(export, result, manifest))
    return prove_conversion(source.graph, export, prover)


_TYPES = ("dtype", "torch_dtype")


def _differences(export: Export, result: OpenedModel, manifest: Manifest) -> Iterator[Problem]:
    """Yield what the conversion would write otherwise today."""
    assert result.checkpoint is not None, "a converted folder has weights"
    keys = {**export.config_json, **result.checkpoint.config}.keys() - set(_TYPES)
    if isinstance(export, WrappedExport):
        keys.discard("architectures")  # a wrapper's text model names its class or does not
    for key in sorted(keys):
        old, new = result.checkpoint.config.get(key), export.config_json.get(key)
        if old != new:
            yield Problem("the conversion would write another value today", f"config.json: {key}",
                          str(old), str(new))  # fmt: skip
    shapes = {name: tuple(record.shape) for name, record in manifest.tensors.items()}
    for name, expr in export.stored:
        shape = shapes.pop(name, None)
        if shape != expr.type.shape:
            yield Problem("the conversion would write another tensor today", name,
                          "none" if shape is None else str(list(shape)),
                          str(list(expr.type.shape)))  # fmt: skip
    for name in shapes:
        yield Problem("the conversion would not write this tensor today", name)
