"""``moecc verify``: check a model against its manifest, or against its source model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from moecc.errors import CheckError, InputError, MoeccError, UsageError, raise_problems
from moecc.jobs.command import (
    ComputeType,
    Force,
    Inputs,
    Load,
    ModelName,
    OutputFile,
    Report,
    Spelling,
    Weights,
    check_writable,
    say_weights,
    write_whole,
)
from moecc.support.console import say
from moecc.support.text import amount
from moecc.types import DTYPES

if TYPE_CHECKING:
    from moecc.jobs.comparison import ComparisonVerdict


def _announced(model: str) -> str | None:
    """Return the difference that the receipt of a conversion announces, and how to accept it."""
    from moecc.jobs.receipt import load_receipt, object_of

    try:
        stated = object_of(load_receipt(Path(model)))
    except MoeccError:
        return None
    promised, rounded = object_of(stated.get("promised")), stated.get("rounded")
    types = [str(name) for name in rounded] if isinstance(rounded, list) else []
    causes = [str(promised.get("reason"))] if promised.get("kind") == "approximate" else []
    causes += [f"weights rounded to {name}" for name in types if name not in DTYPES]
    return f"its receipt announces it: {'; '.join(causes)}; --tolerance E" if causes else None


def _way_out(verdict: ComparisonVerdict) -> str | None:
    """Return how to tell a change from rounding, of the computation or of weights with factors."""
    if announced := _announced(verdict.model):
        return announced
    if verdict.compute_dtype != "f64":
        return "--dtype f64 tells a change from rounding"
    rounding = verdict.rounding.max_relative if verdict.rounding else 0.0
    if verdict.difference.max_relative > rounding:
        return None
    return f"{verdict.dtype} rounds factors, too: moecc convert --verify tells a change from that"


_KINDS = {"decoder_tokens": "tokens of the decoder"}


def verdict_text(verdict: ComparisonVerdict) -> str:
    """Return a human-readable verdict."""
    difference = verdict.difference
    shapes = " and ".join(
        f"{' x '.join(map(str, shape))} {_KINDS.get(name, name)}"
        for name, shape in verdict.inputs.items()
    )
    name = {"logits": "logit"}.get(verdict.output, verdict.output)
    rows = [
        f"{verdict.model} against {verdict.source}",
        f"  {shapes} in {verdict.compute_dtype}, the source's weights rounded to {verdict.dtype}",
        f"  max |Δ{name}| / max |{name}|  {difference.max_relative:.2e} "
        f"(at most {verdict.tolerance:g})",
    ]
    others = {n: worst for n, worst in verdict.outputs.items() if n != verdict.output}
    rows += [f"  max |Δ{n}| / max |{n}|  {worst:.2e}" for n, worst in others.items()]
    if difference.kl_nats is not None:
        rows.append(f"  KL divergence               {difference.kl_nats:.2e} nats a token")
        rows.append(f"  top-1 agreement             {difference.top1_agreement:.2%}")
    if verdict.rounding is not None:
        rounding = verdict.rounding
        rows.append(
            f"  rounding the source to {verdict.dtype} alone changes {rounding.max_relative:.2e}"
            + (
                ""
                if rounding.kl_nats is None
                else f", KL {rounding.kl_nats:.2e}, top-1 {rounding.top1_agreement:.2%}"
            )
        )
    return "\n".join(rows)


def verify(
    model: ModelName,
    *,
    against: Annotated[str | None, Spelling("SOURCE")] = None,
    inputs: Inputs = None,
    tolerance: Annotated[float, Spelling("E", low=0)] = 1e-5,
    dtype: ComputeType = "f32",
    allow_edited_card: bool = False,
    weights: Weights = None,
    load: Load = (),
    html: OutputFile = None,
    force: Force = False,
) -> Report:
    """Check the files of a model, or its logits.

    Every file is compared with the manifest, or with --against the logits with those of another
    model; where MODEL was converted from it with a proof, it is proved again. A run of a training
    is checked against the digests of its step.

    Both models run in float32, or the type of --dtype; the weights of SOURCE are first rounded to
    the type of MODEL's. Without --inputs, 2 x 128 seeded random tokens are used. The exit code is 3
    above the tolerance.

    Args:
      against: Model to compare the logits with.
      tolerance: Bound on max |Δlogit| / max |logit|.
      dtype: Element type of the computation; f64 tells a change from rounding.
      allow_edited_card: Accept a model card that was edited after the conversion.
      html: File to write a page of the receipt to, and of what differs.

    Example:
      moecc verify smollm2-8x
      moecc verify smollm2-8x --against smollm2
    """
    from moecc.formats.run import check_step, choose_step, split_reference
    from moecc.model.open import load_files

    load_files(load)
    run = split_reference(model)
    if html is not None and (against is not None or run is not None):
        raise UsageError("--html is the page of a receipt, which a converted folder has")
    if against is not None:
        return _verify_logits(model, against, inputs, tolerance, dtype, weights, load)
    if run is None:
        return verify_files(model, allow_edited_card, html, force)
    step = choose_step(Path(run[0]), run[1])
    check_step(Path(run[0]), step)
    tensors = len(step.facts.tensors)
    text = f"step {step.number}: {amount(tensors, 'tensor')} as they were saved"
    data = {"model": model, "tensors": tensors, "passed": True}
    return Report("verify-manifest", data, lambda: text)


def verify_files(model: str, allow_edited_card: bool, html: str | None, force: bool) -> Report:
    """Compare the files of a model with its manifest."""
    from moecc.formats.gguf.storage import SUFFIX
    from moecc.formats.manifest import MANIFEST_NAME, verify_manifest
    from moecc.formats.manifest import load as load_manifest
    from moecc.formats.open import missing_place
    from moecc.formats.store import is_address, mirror
    from moecc.jobs.receipt import load_receipt, receipt_lines, receipt_page
    from moecc.presets import PREFIX as PRESET

    path = mirror(model) if is_address(model) else Path(model)
    if not path.exists() and not model.startswith(PRESET):
        raise missing_place(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == SUFFIX):
        raise InputError(
            "only a folder or a GGUF file has a manifest", where=model,
            hint="--against SOURCE compares its logits",
        )  # fmt: skip
    from moecc.jobs.comparison import check_programs

    programs = check_programs(path) if path.is_dir() else []
    if programs and not (path / MANIFEST_NAME).exists() and html is None:
        # As transformers saves what was trained: there are no digests to compare with.
        data = {"model": model, "programs": programs, "passed": True}
        text = (
            f"{programs[0]} is the program of the graph in config.json, whose tensors are there\n"
            f"  not checked: their values, which no {MANIFEST_NAME} states, as after training\n"
            f"  moecc verify {quote(model)} --against SOURCE compares the logits"
        )
        return Report("verify-manifest", data, lambda: text)
    if html is not None:
        check_writable(html, force=force)
    problems = verify_manifest(path, allow_edited_card=allow_edited_card)
    if problems and html is None:
        raise CheckError(problems)
    try:
        receipt = load_receipt(path)
    except MoeccError:
        if not problems:
            raise
        receipt = None  # which is among the problems
    if html is not None and receipt is not None:
        write_whole(html, receipt_page(path.name, receipt, problems).encode(), force=force)
        say(f"the receipt is in {html}")
    raise_problems(problems, CheckError)
    if html is not None and receipt is None:
        raise InputError("there is no receipt", where=model, hint="moecc convert writes one")
    count = len(load_manifest(path).tensors)
    rows = [f"{amount(count, 'tensor')} {'matches' if count == 1 else 'match'} the manifest"]
    rows += [] if receipt is None else [f"  {line}" for line in receipt_lines(receipt)]
    data = {"model": model, "tensors": count, "passed": True, "receipt": receipt}
    return Report("verify-manifest", data, lambda: "\n".join(rows))


def _verify_logits(
    model: str, against: str, inputs: str | None, tolerance: float, dtype: str,
    weights: str | None, load: Load,
) -> Report:  # fmt: skip
    """Compare the logits of two models."""
    from moecc.families.heads import has_head
    from moecc.jobs.comparison import compare, drop_other_heads
    from moecc.jobs.conversion import function_of_source
    from moecc.jobs.prove import replayed
    from moecc.model.inputs import read_inputs
    from moecc.model.open import open_model
    from moecc.types import float_type

    type = float_type(dtype)
    with ExitStack() as opened:
        checked = opened.enter_context(open_model(model, weights=weights, heads=True))
        say_weights(checked, model)
        # A model converted with a padding mask is compared with a source that has one.
        masked = "mask" in checked.graph.inputs
        heads = has_head(checked.graph)
        source = opened.enter_context(open_model(against, padding=masked, heads=heads))
        say_weights(source, against)
        uncompared = drop_other_heads(checked, source)
        arrays = None if inputs is None else read_inputs(inputs, source.graph)
        verdict = compare(checked, source, inputs=arrays, tolerance=tolerance, compute_dtype=type)
        left_out = source.unread()
        proof = replayed(source, checked, load) if verdict.passed else None
    error = None
    if not verdict.passed:
        error = CheckError(
            f"the {verdict.output} differ by more than the tolerance", where=model,
            expected=f"at most {tolerance:g}",
            found=f"{verdict.difference.max_relative:.2e}", hint=_way_out(verdict),
        )  # fmt: skip
    text = "\n".join([verdict_text(verdict), *(f"  not compared: {n}" for n in uncompared)])
    if proof is not None:
        text += f"\n  {function_of_source(left_out)}: proved again"
    data = verdict.to_json() | {"proof": None if proof is None else proof.to_json()}
    return Report("verify", data, lambda: text, error=error)
