"""``moecc convert``: convert a checkpoint through a pipeline to another family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.heartbeat import Progress
from moecc.cli.options import (
    FormatOption,
    LoadOption,
    PaddingMaskOption,
    PipelineOption,
    SourceArgument,
)

if TYPE_CHECKING:
    from moecc.formats.gguf.storage import Storage
    from moecc.model.open import Model
    from moecc.tasks.convert import Plan
    from moecc.types import DType


_SHOWN = 10


@dataclass(frozen=True)
class ConvertRequest:
    """The arguments and options of ``moecc convert``."""

    source: SourceArgument
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder or .gguf file to write.")]
    pipeline: PipelineOption = ""
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FAMILY",
            help="The family, gguf:ARCH, or auto.",
            autocompletion=complete.targets,
        ),
    ] = "auto"
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="The type to write, in GGUF q8_0, q4_k too; else as stored."),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Of all random numbers.")] = 0
    experts: Annotated[
        list[str] | None,
        typer.Option(
            "--experts",
            metavar="NAME=DIR",
            help="A model like SOURCE, or a LoRA adapter of it, for upcycle's sources.",
        ),
    ] = None
    capture: Annotated[
        str | None,
        typer.Option("--capture", metavar="DIR", help="Statistics of SOURCE, by moecc capture."),
    ] = None
    padding_mask: PaddingMaskOption = False
    max_shard_bytes: Annotated[
        str, typer.Option("--max-shard-bytes", metavar="N", help="The limit of a shard.")
    ] = "5000000000"
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan from headers, write nothing.")
    ] = False
    load: LoadOption = None
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Record NaN and Inf, do not refuse.")
    ] = False
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="A pass may find nothing to do.")
    ] = False
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="An adapter may name another model.")
    ] = False
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not hold passes to their promises.")
    ] = False
    verify: Annotated[
        bool, typer.Option("--verify", help="Run source and result, and compare their logits.")
    ] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a conversion that was killed.")
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False
    format: FormatOption = Format.human


def convert(request: ConvertRequest) -> None:
    """Convert SOURCE and write it to the folder OUT, or to the file OUT.gguf.

    Everything is checked from headers and configs before the first weight is read, and each pass is
    held to its promise on the model at small sizes; exit code 3 if one breaks it.
    """
    from moecc.cli.console import report
    from moecc.cli.pipelines import read_pipeline
    from moecc.model.initialise import add_statistics
    from moecc.model.open import add_branches, open_model, parse_branches
    from moecc.support.process import signals_raised
    from moecc.tasks.convert import check_place, plan
    from moecc.types import count_bytes

    type = None if request.dtype is None else _written_type(request.dtype)
    limit, out = count_bytes(request.max_shard_bytes), request.out
    branches = parse_branches(request.experts or [])
    passes = read_pipeline(request.pipeline, request.load or [])
    with signals_raised(), open_model(request.source, padding=request.padding_mask) as model:
        add_branches(model, branches, allow_other_base=request.allow_other_base)
        _say_of(model, request.source)
        planned = plan(
            model, passes, request.to, dtype=type, seed=request.seed,
            allow_unmatched=request.allow_unmatched, loaded=request.load or [],
            check=not request.no_check, statistics=add_statistics(model, request.capture),
        )  # fmt: skip
        _check_all_read(planned.unread)
        check_place(planned, out, force=request.force, resume=request.resume)
        if not request.dry_run:
            _write(planned, request, limit)
    data = planned.to_json() | {"out": out, "dry_run": request.dry_run}
    report("convert", data, lambda: plan_text(planned, out, request.dry_run), request.format)


def _check_all_read(unread: Iterable[str]) -> None:
    """Raise UsageError for models that were given and have no part in the result."""
    from moecc.errors import Problem, UsageError

    problems = [
        Problem("no pass reads this model", f"--experts {n}", hint=f"upcycle{{sources=base,{n}}}")
        for n in unread
    ]
    if problems:
        raise UsageError(problems)


def _say_of(model: Model, source: str) -> None:
    from moecc.cli.console import warn
    from moecc.cli.files import say_weights

    say_weights(model, source)
    for text in model.warnings():
        warn(text)


def _written_type(name: str) -> DType | Storage:
    """Return the element type called `name`, or the blocks of a GGUF file."""
    from moecc.translate.gguf import QUANTISED
    from moecc.types import float_type

    return QUANTISED.get(name.lower()) or float_type(name)


def _write(planned: Plan, request: ConvertRequest, max_shard_bytes: int) -> None:
    from moecc.cli.console import Bar, say, warn
    from moecc.tasks.convert import write

    with Bar("writing") as bar:
        done = write(
            planned, request.out, max_shard_bytes=max_shard_bytes, force=request.force,
            allow_nonfinite=request.allow_nonfinite, verify=request.verify,
            resume=request.resume, progress=bar,
        )  # fmt: skip
    kept, total = done.written.resumed_bytes, done.written.total_bytes
    if request.resume and kept:
        say(f"continued: {kept:,} of {total:,} bytes of weights were complete")
    for text in done.written.spread:
        warn(f"not finite: {text}")
    zeros = done.written.zeros
    for name in zeros[:_SHOWN]:
        warn(f"all zero: {name}")
    if len(zeros) > _SHOWN:
        warn(f"all zero: {len(zeros) - _SHOWN:,} more, in the manifest")


def plan_text(planned: Plan, out: str, dry_run: bool) -> str:
    """Return the human-readable plan, written unless `dry_run`."""
    from moecc.support.text import amount, count_text, size_text
    from moecc.translate.engines import summary

    facts, family = planned.facts, planned.graph.attrs.get("family") or "no family"
    rows = [
        f"{planned.model.name} ({family}) -> {out} ({planned.target})",
        f"  pipeline    {planned.pipeline}",
        f"  preserves   {planned.preserves}",
        f"  parameters  {count_text(planned.parameters)}, "
        f"{count_text(facts.parameters.active)} active per token",
        f"  FLOPs       {count_text(facts.flops_per_token)} per {facts.unit}",
        f"  on disk     {size_text(planned.size_bytes)} in "
        f"{amount(len(planned.tensors), 'tensor')}, {planned.dtype_name}",
        *([f"  runs in     {summary(planned.engines)}"] if planned.engines else []),
        *(f"  remark      {r}" for r in _shortened(planned.remarks)),
        "nothing was written (--dry-run)" if dry_run else f"written to {out}",
    ]
    return "\n".join(rows)


def _shortened(remarks: Iterable[str]) -> list[str]:
    """Return the remarks, with equal texts at several layers of a stack merged into one line."""
    places: dict[tuple[str, str], list[str]] = {}
    for remark in remarks:
        where, _, text = remark.partition(": ")
        stack = re.match(r"((?:\w+\.)?layers)\.\d", where)
        key, place = ((stack[1], text), where) if stack else (("", remark), "")
        places.setdefault(key, []).append(place)
    return [
        text if not where[0]
        else f"{where[0]}: {text}" if len(where) == 1
        else f"{where[0]} … {where[-1]} ({len(where)}): {text}"
        for (_, text), where in places.items()
    ]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "convert",
        ConvertRequest,
        convert,
        "Example: moecc convert SmolLM2-135M smollm2-8x -p 'upcycle{experts=8 top-k=2}' "
        "--to mixtral --dtype bf16",
        progress=Progress.BAR,
    )
