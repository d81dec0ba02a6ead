"""``moecc prove``: prove that two graphs, models or folders are the same function."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from moecc.backend import program_language
from moecc.errors import (
    CheckError,
    InputError,
    MoeccError,
    Problem,
    UsageError,
    printable,
    raise_problems,
)
from moecc.families.heads import has_head
from moecc.formats.folder import CONFIG_NAME
from moecc.formats.manifest import HASH_THREADS, Manifest, conversion_of
from moecc.ir.graph import Graph
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
from moecc.model.open import OpenedModel, is_function_folder, load_files, open_model
from moecc.prove import Prover, Verdict
from moecc.prove.conversion import ConversionProof, compared, over_source, prove_conversion
from moecc.prove.log import proof_paths
from moecc.support.console import warn
from moecc.support.lazy import np
from moecc.support.text import amount
from moecc.support.untyped import JsonDict
from moecc.translate.export import Export, WrappedExport
from moecc.types import DTYPES
from moecc.weights.evaluate import blocks
from moecc.weights.expr import Expr, Source, source_types

if TYPE_CHECKING:
    from moecc.translate.gguf import GgufExport


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

    The proof holds for all inputs and all batch and sequence sizes, in real arithmetic. Weights are
    compared by their expressions. Where moecc converted B from A, which the digests of all files
    show, its tensors stand for what the conversion wrote to them; otherwise tensors with the same
    values are the same, and without weights those of the same name are.

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
    load_files(load)
    comparison = _comparison(a, b, Prover(exact=exact), load)
    if proof is not None and comparison.verdict:
        comparison.write(Path(proof))
    data = {"a": a, "b": b, "proof": comparison.to_json(), "node": comparison.verdict.node}
    data["terms"] = list(comparison.verdict.terms)
    data["unmatched"] = list(comparison.unmatched)
    has_weights = all(graph.attrs.get("checkpoint") for graph in comparison.graphs)
    old, new = (graph.inputs.keys() for graph in comparison.graphs)
    problem = verdict_problem(
        comparison.verdict, a, b, comparison.unmatched,
        exact=exact, load=load, can_run=has_weights and old == new,
    )  # fmt: skip
    error = None if problem is None else _error(comparison.verdict, problem)
    return Report("prove", data, lambda: proof_text(comparison, a, b), error=error)


def _comparison(a: str, b: str, prover: Prover, load: Load) -> ConversionProof:
    from moecc.jobs.comparison import check_programs

    if is_function_folder(b) and not is_function_folder(a) and Path(a, CONFIG_NAME).is_file():
        from moecc import torch as mt

        module_proof: ConversionProof = mt.prove_folder(a, b, prover)
        return module_proof
    with (
        open_model(b, config_alone=True, heads=True) as result,
        open_model(
            a, config_alone=True, padding="mask" in result.graph.inputs,
            heads=has_head(result.graph),
        ) as source,
    ):  # fmt: skip
        for model in (source, result):
            for text in model.remarks():
                warn(f"{model.name}: {text}")
            if model.checkpoint is not None:
                check_programs(model.checkpoint.path)  # it runs, and the graph is what is read
        proof = _proof_of(source, result, prover, load)
        for model in (source, result):
            if left_out := model.unread():
                count = amount(len(left_out), "tensor")
                proof = proof.assuming(f"{count} of {model.name} left out: no part of the function")
        return proof


def _proof_of(
    source: OpenedModel, result: OpenedModel, prover: Prover, load: Load
) -> ConversionProof:
    manifest = _conversion_of(source, result)
    if manifest is None:
        return _compared(source, result, prover)
    try:
        proof = replay(source, result, manifest, prover, load)
    except NotPlannedError as error:
        warn(f"the conversion was not planned again: {error.problems[0].message}")
        return _compared(source, result, prover)
    if proof.verdict.status == "unknown":
        # What holds of these weights may not hold of all: experts may be copies.
        by_content = _compared(source, result, prover)
        proof = by_content if by_content.verdict else proof
    return proof


def _compared(source: OpenedModel, result: OpenedModel, prover: Prover) -> ConversionProof:
    """Compare two models of which moecc did not write the second from the first."""
    old, new = source.checkpoint, result.checkpoint
    if old is None or new is None:
        proof = compared(source.graph, result.graph, prover)
        return proof.assuming("weights of the same name are the same")
    if old.files() == new.files():
        return compared(source.graph, result.graph, prover)
    old_digests = _digests(source)
    firsts = {digest: part for part, digest in reversed([*old_digests.items()])}
    tensors = _by_content(old_digests, firsts, result)
    unmatched = tuple(name for name, part in tensors.items() if part.name not in old.tensors)
    # Data drawn for weights are not those of the files: they tell of two graphs of the same ones.
    refute = {n: part.name for n, part in tensors.items()} == {p.name: p.name for p in old_digests}
    proof = compared(source.graph, over_source(result.graph, tensors), prover, refute=refute)
    if proof.verdict.status == "unknown" and len(firsts) < len(old_digests):
        # Tensors that the source itself has under several names may be what makes them equal.
        merged = {part.name: firsts[digest] for part, digest in old_digests.items()}
        ours = over_source(source.graph, merged)
        theirs = over_source(result.graph, {n: merged.get(p.name, p) for n, p in tensors.items()})
        again = compared(ours, theirs, prover, refute=False)
        proof = again if again.verdict else proof
    return replace(proof, unmatched=unmatched).assuming("tensors of the same values are the same")


def _by_content(
    old: Mapping[Source, str], firsts: Mapping[str, Source], result: OpenedModel
) -> dict[str, Source]:
    """Return, by the name of each tensor of a result, the source's tensor with the same values.

    The tensor of the same name comes first. One that the source does not have gets a name that no
    tensor of the source has.

    Args:
      old: the digests of the source's tensors.
      firsts: the first of the source's tensors with a digest.
      result: the result.
    """
    names = {part.name: (part, digest) for part, digest in old.items()}
    tensors = {}
    for part, digest in _digests(result).items():
        same, of_same_name = names.get(part.name, (part, ""))
        name = f"{part.name} of {result.name}"
        while name in names:  # a tensor may have any name
            name += "'"
        unmatched = Source(name, part.type)
        tensors[part.name] = same if of_same_name == digest else firsts.get(digest, unmatched)
    return tensors


def _digests(model: OpenedModel) -> dict[Source, str]:
    """Return the SHA-256 of type, sizes and values of each tensor that a graph reads."""
    read, parts = model.weights.read, _tensors(model.graph)

    def digest(part: Source) -> str:
        hashed = sha256(f"{part.type.dtype}{part.type.shape}".encode())
        for rows in blocks(part, read):
            hashed.update(rows.tobytes())
        return hashed.hexdigest()

    with ThreadPoolExecutor(HASH_THREADS) as threads:
        return dict(zip(parts, threads.map(digest, parts), strict=True))


def _tensors(graph: Graph) -> list[Source]:
    """Return the tensors that the weights of a graph are made from, each name once."""
    return [Source(name, type) for name, type in source_types(graph.weights.values()).items()]


def check_proof_files(file: str | None, *, force: bool) -> None:
    """Raise InputError if a file of a proof cannot be written, or is there and not replaced."""
    for path in () if file is None else proof_paths(Path(file)):
        check_writable(str(path), force=force)


def _error(verdict: Verdict, problem: Problem) -> MoeccError:
    return CheckError([problem]) if verdict.status == "refuted" else InputError([problem])


def verdict_problem(
    verdict: Verdict,
    a: str,
    b: str,
    unmatched: Sequence[str] = (),
    *,
    exact: bool = False,
    load: Load = (),
    can_run: bool = True,
) -> Problem | None:
    """Return what keeps two models from being proved equal; None if they are.

    Args:
      verdict: the verdict on both.
      a: the name of the first.
      b: the name of the second.
      unmatched: the tensors of the second of which the first has none with the same values.
      exact: whether bits were compared, not real numbers.
      load: the files of passes and families of one's own.
      can_run: whether both models have weights and take the same inputs, so that data decide.
    """
    if verdict.status == "proved":
        return None
    before, after = verdict.terms
    example = verdict.counterexample
    if example is None:
        hints = []
        if unmatched:
            values = f"{amount(len(unmatched), 'tensor')} of {b}, for example {unmatched[0]}"
            hints.append(f"{values}: no tensor of {a} has these values, as after training")
        if exact:
            hints.append(f"real numbers may be the same: {_command(['prove', a, b], load)}")
        elif can_run:
            hints.append(f"sampling may decide: {_sampling(a, b, load)}")
        return Problem("not proved", verdict.node, before, after, "; ".join(hints) or None)
    same = "bits" if exact else "function"
    return Problem(f"not the same {same}: {example}", verdict.node, before, after)


def _sampling(a: str, b: str, load: Load) -> str:
    return _command(["verify", b, "--against", a], load)


def _command(words: Sequence[str], load: Load) -> str:
    return shlex.join(["moecc", *words, *(word for file in load for word in ("--load", file))])


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


def replayed(source: OpenedModel, result: OpenedModel, load: Load) -> ConversionProof | None:
    """Prove again what the receipt of a converted folder says is proved.

    None stands for a receipt that says nothing, and for a conversion that cannot be planned again
    from its source alone, which is reported: one with further models, statistics, passes that no
    file of `load` has, or a program.

    Raises:
      CheckError: it is not proved, or is the proof of other graphs.
    """
    manifest = _conversion_of(source, result)
    if manifest is None:
        return None
    stated = _stated_proof(result)
    if stated.get("verdict") != "proved":
        return None
    try:
        proof = replay(source, result, manifest, Prover(), load)
    except (InputError, UsageError) as error:
        warn(f"the proof of the receipt was not repeated: {error.problems[0].message}")
        return None
    graphs = {"source": proof.source, "result": proof.result}
    if (problem := verdict_problem(proof.verdict, source.name, result.name, load=load)) is not None:
        raise CheckError([problem])
    if graphs != {name: stated.get(name) for name in graphs}:
        raise CheckError("the receipt has the proof of other graphs", where=result.name,
                         expected=str(graphs), found=str(stated))  # fmt: skip
    return proof


def _conversion_of(source: OpenedModel, result: OpenedModel) -> Manifest | None:
    """Return the manifest of a result that was converted from the files of `source`.

    Raises:
      CheckError: the result was changed since.
    """
    if source.checkpoint is None or result.checkpoint is None:
        return None
    return conversion_of(result.checkpoint.path, source.checkpoint.named_files())


class NotPlannedError(InputError):
    """A conversion cannot be planned again from its source alone."""


def replay(
    source: OpenedModel, result: OpenedModel, manifest: Manifest, prover: Prover, load: Load = ()
) -> ConversionProof:
    """Plan again the conversion that a manifest states, and prove it.

    The rounding of weights to the element type that was asked for is no part of the function, which
    the proof lists as an assumption.

    Raises:
      NotPlannedError: the conversion read further models or statistics, had other passes, or writes
        other values today.
      InputError: its plan differs now.
    """
    from moecc.jobs.conversion import plan

    try:
        passes = read_pipeline(manifest.pipeline, load)
    except UsageError as error:
        reason = error.problems[0].message.splitlines()[0]
        raise NotPlannedError(f"{reason}, which --load FILE.py may add") from None
    copied = replace(source, graph=clone(source.graph))
    try:
        export = plan(
            copied, passes, manifest.family_to, seed=manifest.seed, check=False,
            emit=program_language(result.weights.path) or None,
        ).export  # fmt: skip
    except (InputError, UsageError) as error:
        raise NotPlannedError(error.problems) from None
    raise_problems(_differences(export, source, result, manifest, load))
    # What is proved has to be what is there: a pass may have been changed since, and whoever wrote
    # the manifest may have written the tensors.
    raise_problems(_other_values(export, source, manifest), NotPlannedError)
    proof = prove_conversion(source.graph, export, prover)
    return proof.before_rounding(
        (expr.type.dtype, DTYPES[manifest.tensors[name].dtype])
        for name, expr in _stored(export)
        if expr.type.dtype.is_float
    )


def _stated_proof(result: OpenedModel) -> JsonDict:
    """Return what the receipt of a result says of its proof; nothing without one."""
    from moecc.jobs.receipt import load_receipt, object_of

    return object_of(object_of(load_receipt(result.weights.path)).get("proof"))


def _other_values(
    export: Export | GgufExport, source: OpenedModel, manifest: Manifest
) -> Iterator[Problem]:
    """Yield the first tensor of which the conversion would write other values today."""
    for name, expr in _stored(export):
        record, digest = manifest.tensors[name], sha256()
        for rows in blocks(expr, source.weights.read, DTYPES[record.dtype]):
            digest.update(rows.tobytes())
        if digest.hexdigest() != record.sha256:
            yield Problem("the conversion would write other values today", name)
            return


def _stored(export: Export | GgufExport) -> list[tuple[str, Expr]]:
    return export.stored if isinstance(export, Export) else export.tensors


_TYPES = ("dtype", "torch_dtype")


def _rounded(value: object) -> object:
    """Return a value of a config with its numbers in 32 bits, as a GGUF file holds them."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value


def _differences(
    export: Export | GgufExport,
    source: OpenedModel,
    result: OpenedModel,
    manifest: Manifest,
    load: Load,
) -> Iterator[Problem]:
    """Yield what the conversion would write otherwise today, and weights that are rounded."""
    config = result.weights.config
    keys = {**export.config_json, **config}.keys() - set(_TYPES)
    is_folder = isinstance(export, Export)
    if not is_folder:
        # A GGUF file states what llama.cpp needs, and without a tokenizer not its tokens.
        stated = {k for k, value in config.items() if value is not None}
        keys &= export.config_json.keys() & stated
        rounded = [n for n, record in manifest.tensors.items() if record.dtype not in DTYPES]
        if rounded:
            yield Problem("the weights are rounded to blocks: nothing is proved", result.name,
                          found=f"{amount(len(rounded), 'tensor')} in blocks: {rounded[0]}",
                          hint=f"sampling decides: {_sampling(source.name, result.name, load)}",
                          )  # fmt: skip
    elif isinstance(export, WrappedExport):
        keys.discard("architectures")  # a wrapper's text model names its class or does not
    for key in sorted(keys):
        old, new = config.get(key), export.config_json.get(key)
        if (old != new) if is_folder else (_rounded(old) != _rounded(new)):
            yield Problem("the conversion would write another value today", f"config.json: {key}",
                          printable(str(old)), printable(str(new)))  # fmt: skip
    shapes = {name: tuple(record.shape) for name, record in manifest.tensors.items()}
    for name, expr in _stored(export):
        shape = shapes.pop(name, None)
        if shape != expr.type.shape:
            yield Problem("the conversion would write another tensor today", name,
                          "none" if shape is None else str(list(shape)),
                          str(list(expr.type.shape)))  # fmt: skip
    for name in shapes:
        yield Problem("the conversion would not write this tensor today", name)
