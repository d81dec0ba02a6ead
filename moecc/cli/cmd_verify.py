"""``moecc verify``: check a model against its manifest, or against its source model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    FormatOption,
    InputsOption,
    LoadFamiliesOption,
    ModelArgument,
    WeightsOption,
)
from moecc.support.text import amount

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moecc.tasks.verify import Verdict


@dataclass(frozen=True)
class VerifyRequest:
    """The arguments and options of ``moecc verify``."""

    model: ModelArgument
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="SOURCE", help="Compare logits with this model."),
    ] = None
    inputs: InputsOption = None
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Bound on max |Δlogit| / max |logit|.")
    ] = 1e-5
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="The type to compute in; f64 excludes rounding.",
            autocompletion=complete.float_types,
        ),
    ] = "f32"
    allow_edited_card: Annotated[
        bool, typer.Option("--allow-edited-card", help="The model card may have been edited.")
    ] = False
    weights: WeightsOption = None
    load: LoadFamiliesOption = None
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write a page of the receipt."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")] = False
    format: FormatOption = Format.human


def verify(request: VerifyRequest) -> None:
    """Check MODEL: every file against the manifest, or with --against its logits.

    A run of a training is checked against the digests of its step.

    Both models run in float32, or the type that --dtype says; the weights of SOURCE are first
    rounded to the type of MODEL's.
    Without --inputs, 2 x 128 seeded random tokens are used.  Exit code 3 above the tolerance.
    """
    from moecc.errors import UsageError
    from moecc.families.outside import load_families
    from moecc.formats.run import split_reference

    load_families(request.load)
    run = split_reference(request.model)
    if request.html is not None and (request.against is not None or run is not None):
        raise UsageError("--html is the page of a receipt, which a converted folder has")
    if request.against is None and run is not None:
        _against_digests(request.model, *run, request.format)
    elif request.against is None:
        _against_manifest(request)
    else:
        _against_source(request, request.against)


def _with_manifest(model: str) -> Path:
    """Return where a model is that may have a manifest. Raises InputError for others."""
    import os
    from pathlib import Path

    from moecc.errors import InputError
    from moecc.formats.gguf.storage import SUFFIX
    from moecc.formats.open import PREFIX as HUB
    from moecc.formats.open import missing_place
    from moecc.presets import PREFIX as PRESET

    place = Path(model)
    if not os.path.exists(model) and not model.startswith((HUB, PRESET)):
        raise missing_place(place)
    if not place.is_dir() and not (place.is_file() and place.suffix == SUFFIX):
        raise InputError(
            "only a folder or a GGUF file has a manifest", where=model,
            hint="or give --against SOURCE",
        )  # fmt: skip
    return place


def _against_manifest(request: VerifyRequest) -> None:
    from moecc.cli.console import report
    from moecc.formats.manifest import check_manifest, load
    from moecc.tasks.receipt import load_receipt, receipt_lines

    model, format, place = request.model, request.format, _with_manifest(request.model)
    check_manifest(place, allow_edited_card=request.allow_edited_card)
    manifest = load(place)
    receipt = load_receipt(place)
    data = {
        "model": model, "tensors": len(manifest.tensors), "passed": True, "receipt": receipt,
    }  # fmt: skip
    count = len(manifest.tensors)
    rows = [f"{amount(count, 'tensor')} {'matches' if count == 1 else 'match'} the manifest"]
    rows += [] if receipt is None else [f"  {line}" for line in receipt_lines(receipt)]
    if request.html is not None:
        _write_page(request.html, place, receipt, force=request.force)
    report("verify-manifest", data, lambda: "\n".join(rows), format)


def _write_page(
    file: str, place: Path, receipt: Mapping[str, object] | None, *, force: bool
) -> None:
    from moecc.cli.console import say
    from moecc.cli.files import check_writable, write_whole
    from moecc.errors import InputError
    from moecc.tasks.receipt_page import receipt_page

    check_writable(file, force=force)
    if receipt is None:
        raise InputError("there is no receipt", where=str(place), hint="moecc convert writes one")
    write_whole(file, receipt_page(place.name, receipt).encode(), force=force)
    say(f"the receipt is in {file}")


def _against_digests(model: str, run: str, which: str, format: Format) -> None:
    from pathlib import Path

    from moecc.cli.console import report
    from moecc.formats.run import check_step, choose_step

    step = choose_step(Path(run), which)
    check_step(Path(run), step)
    tensors = len(step.facts.tensors)
    data = {"model": model, "tensors": tensors, "passed": True}
    text = f"step {step.number}: {amount(tensors, 'tensor')} as they were saved"
    report("verify-manifest", data, lambda: text, format)


def _against_source(request: VerifyRequest, against: str) -> None:
    from moecc.cli.console import report
    from moecc.cli.files import say_weights
    from moecc.cli.input_files import read_inputs
    from moecc.errors import CheckError, UsageError
    from moecc.model.open import open_model
    from moecc.tasks.verify import compare
    from moecc.types import float_type

    if not request.tolerance >= 0:
        raise UsageError("a tolerance must not be negative", found=str(request.tolerance))
    type = float_type(request.dtype)
    with ExitStack() as opened:
        checked = opened.enter_context(open_model(request.model, weights=request.weights))
        say_weights(checked, request.model)
        # A model converted with a padding mask is compared with a source that has one.
        masked = "mask" in checked.graph.inputs
        source = opened.enter_context(open_model(against, padding=masked))
        say_weights(source, against)
        given = None if request.inputs is None else read_inputs(request.inputs, source.graph)
        verdict = compare(
            checked, source, inputs=given, tolerance=request.tolerance, compute_dtype=type
        )
    report("verify", verdict.to_json(), lambda: verdict_text(verdict), request.format)
    if not verdict.passed:
        raise CheckError(
            f"the {verdict.output} differ by more than the tolerance", where=request.model,
            expected=f"at most {request.tolerance:g}",
            found=f"{verdict.difference.max_relative:.2e}", hint=_way_out(verdict),
        )  # fmt: skip


def _way_out(verdict: Verdict) -> str | None:
    """Return how to tell a change from rounding, of the computation or of weights with factors."""
    if verdict.compute_dtype != "f64":
        return "--dtype f64 tells a change from rounding"
    rounding = verdict.rounding.max_relative if verdict.rounding else 0.0
    if verdict.difference.max_relative > rounding:
        return None
    return f"{verdict.dtype} rounds factors, too: moecc convert --verify tells a change from that"


_KINDS = {"decoder_tokens": "tokens of the decoder"}


def verdict_text(verdict: Verdict) -> str:
    """Return a human-readable verdict."""
    found = verdict.difference
    shapes = " and ".join(
        f"{' x '.join(map(str, shape))} {_KINDS.get(name, name)}"
        for name, shape in verdict.inputs.items()
    )
    name = {"logits": "logit"}.get(verdict.output, verdict.output)
    rows = [
        f"{verdict.model} against {verdict.source}",
        f"  {shapes} in {verdict.compute_dtype}, the source's weights rounded to {verdict.dtype}",
        f"  max |Δ{name}| / max |{name}|  {found.max_relative:.2e} (at most {verdict.tolerance:g})",
    ]
    if found.kl_nats is not None:
        rows.append(f"  KL divergence               {found.kl_nats:.2e} nats a token")
        rows.append(f"  top-1 agreement             {found.top1_agreement:.2%}")
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


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "verify",
        VerifyRequest,
        verify,
        "Examples: moecc verify smollm2-8x; moecc verify smollm2-8x --against smollm2",
    )
