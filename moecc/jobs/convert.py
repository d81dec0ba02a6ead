"""``moecc convert``: convert a checkpoint through a pipeline to another family."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

from moecc.errors import CheckError, Problem, UsageError, raise_problems
from moecc.families.config import FAMILY
from moecc.formats.files import (
    json_content,
    make_folder,
    require_removed,
    write_durable,
)
from moecc.formats.folder import companion_content
from moecc.formats.gguf.storage import FILE_NAME, SUFFIX, Storage
from moecc.formats.manifest import MANIFEST_NAME, hashed_beside
from moecc.formats.modelcard import CARD_NAME
from moecc.formats.open import is_model_id
from moecc.formats.output import check_output, output_folder, part_folder, parts_of
from moecc.formats.safetensors import INDEX_NAME, Shard, shards_of
from moecc.formats.store import is_address
from moecc.formats.writer import (
    DEFAULTS,
    MAX_SHARD_BYTES,
    Done,
    OutputJournal,
    WriteOptions,
    WriteReport,
    read_journal,
    write_checkpoint,
    write_files,
)
from moecc.jobs.command import (
    AllowUnmatched,
    Force,
    Inputs,
    Load,
    OutputFile,
    PaddingMask,
    PipelineText,
    Report,
    Seed,
    ShardBytes,
    SourceName,
    Spelling,
    is_conversion_file,
    read_pipeline,
    say_weights,
)
from moecc.jobs.conversion import AUTO, Plan, target_for
from moecc.jobs.conversion import plan as plan
from moecc.jobs.receipt import (
    RECEIPT_NAME,
    card,
    manifest,
    receipt_of,
)
from moecc.jobs.receipt import conversion_facts as conversion_facts
from moecc.model.open import MODULE_TYPE, add_branches, open_model, parse_branches
from moecc.prove.conversion import ConversionProof
from moecc.rewrite.pipeline import Pipeline
from moecc.support.console import Bar, say, warn
from moecc.support.process import available_cores, signals_raised
from moecc.support.text import amount, brief, count_text, merge_remarks, size_text, with_article
from moecc.translate.engines import LLAMA_CPP, summary
from moecc.translate.export import EmittedExport
from moecc.types import DType, count_bytes, float_type
from moecc.version import __version__
from moecc.weights.expr import source_types

if TYPE_CHECKING:
    from moecc.formats.gguf.header import Key

# Write a planned GGUF file: keys, tokenizer, tensors, and what stands beside it.

_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k": 14, "bf16": 32}
"""llama.cpp's numbers for what most of a file is stored in."""


def is_file(planned: Plan, out: Path) -> bool:
    """Whether the output is the GGUF file itself, and not a folder with one."""
    return bool(planned.architecture) and out.suffix == SUFFIX


def gguf_keys(planned: Plan) -> list[Key]:
    """Return all keys of the file: of the model, its origin and its tokenizer."""
    from moecc.formats.gguf.header import Key
    from moecc.formats.gguf.reader import CARD_KEYS
    from moecc.translate.gguf import GgufExport

    export, card = planned.export, planned.checkpoint.card()
    assert isinstance(export, GgufExport), "a plan of a GGUF file"
    return [
        Key("general.architecture", export.architecture),
        Key("general.type", "model"),
        *(
            Key(f"general.{name}", card[key] if name.endswith("s") else ", ".join(card[key]))
            for key, name in CARD_KEYS.items()
            if key in card
        ),
        Key("general.file_type", _FILE_TYPES[planned.types[0]]),
        Key("general.quantization_version", 2),
        Key("moecc.version", __version__),
        Key("moecc.pipeline", planned.pipeline.in_full()),
        *export.keys,
        *export.tokenizer,
    ]


# Convert a checkpoint: everything is planned from headers, then streamed to disk.
#
# `plan` reads only configs and headers, and rejects invalid conversions.  `write` evaluates the
# plan's weight expressions tensor by tensor into a temporary folder, which is renamed when
# complete.


@dataclass(frozen=True, repr=False)
class Conversion:
    """A completed conversion.

    Attributes:
      folder: the output folder, or file.
      plan: the plan.
      written: the writer's report: sizes, digests, values that are not finite.
    """

    folder: Path
    plan: Plan
    written: WriteReport

    def __repr__(self) -> str:
        tensors = amount(len(self.written.tensors), "tensor")
        size = size_text(self.written.total_bytes)
        return brief("moecc.Conversion", [("", str(self.folder)), ("", f"{size} in {tensors}")])


def write(
    planned: Plan,
    out: str | Path,
    options: WriteOptions = DEFAULTS,
    *,
    force: bool = False,
    resume: bool = False,
) -> Conversion:
    """Write a planned conversion to `out`, atomically.

    `out` is a folder; for a plan of a GGUF file it may also be that file, with its manifest beside
    it.

    Args:
      planned: the conversion.
      out: the output.
      options: of writing; a part is written beside `out`, and parts that are joined are removed
        once `out` is complete.
      force: whether an existing output is replaced.
      resume: whether to continue what a killed run of the same conversion has written.

    Raises:
      CheckError: the result is not the function that was promised.
      InputError: the output cannot be used; a weight is not finite; the source changed meanwhile;
        a part is missing, or of another conversion.
      MachineError: the disk is too small, or a write failed.
    """
    checkpoint = planned.checkpoint
    path = Path(out) if options.part is None else part_folder(Path(out), options.part)
    one_file = is_file(planned, path)
    facts = conversion_facts(planned, options)
    if options.part is not None:
        make_folder(path.parent)
    parts = None
    if options.is_join:
        from moecc.formats.parts import read_parts

        parts = read_parts(path, facts, planned_shards(planned, options))
    completed: Mapping[str, Done] = {} if parts is None else parts.completed

    def can_resume(folder: Path) -> bool:
        nonlocal completed
        if parts is None:
            completed = read_journal(folder, facts)
        return parts is None and bool(completed)

    with output_folder(
        path, inputs=checkpoint.places(), force=force,
        needed_bytes=_needed_bytes(planned, options),
        can_resume=can_resume if resume else None, is_file=one_file,
    ) as temporary, hashed_beside(_hashed(planned, options)) as source_files:  # fmt: skip
        if parts is not None:
            parts.link_into(temporary)
            source_files = partial(dict, parts.source_files)
        with OutputJournal(temporary, facts, completed) as journal:
            options = replace(options, journal=journal, source_files=source_files)
            written = _fill(temporary, planned, options, one_file)
            # After all of it was hashed and read: the digests are those of what was converted.
            checkpoint.require_unchanged()
            if one_file or options.part is not None:
                journal.synchronise()
            else:
                journal.remove()
    if options.is_join:
        require_removed(parts_of(path), "the output is complete, but its parts are still there")
    return Conversion(path, planned, written)


def _hashed(planned: Plan, options: WriteOptions) -> dict[str, Path]:
    """Return the files of the source whose digests are computed, by name."""
    files = planned.checkpoint.named_files()
    if options.is_join:
        return {}
    if options.part is None:
        return files
    return {name: files[name] for name in options.part.share(sorted(files))}


def _needed_bytes(planned: Plan, options: WriteOptions) -> int:
    """Return the bytes that a run writes."""
    if options.part is not None:
        return sum(shard.size_bytes for shard in planned_shards(planned, options))
    return 0 if options.is_join else planned.size_bytes


def _header_metadata(planned: Plan) -> dict[str, str]:
    return {"moecc": __version__, "pipeline": planned.pipeline.in_full()}


def planned_shards(planned: Plan, options: WriteOptions) -> Sequence[Shard]:
    """Return the shards that a run writes. Raises as `shards_of`."""
    entries = [tensor.entry for tensor in planned.tensors]
    limit, metadata = options.max_shard_bytes, _header_metadata(planned)
    return shards_of(entries, limit, metadata, options.part)


def _fill(folder: Path, planned: Plan, options: WriteOptions, one_file: bool) -> WriteReport:
    """Write the weights, and beside them all files but the journal.

    A GGUF file that stands alone has its receipt in the manifest, and nothing else beside it.
    """
    from moecc.formats.gguf.header import plan_file

    checkpoint, tensors = planned.checkpoint, planned.tensors
    is_gguf, words = bool(planned.architecture), options.words
    if is_gguf:
        words = replace(options, max_shard_bytes=MAX_SHARD_BYTES).words  # there are no shards
        file = plan_file(FILE_NAME, [t.entry for t in tensors], gguf_keys(planned))
        written = write_files(folder, tensors, [file], checkpoint.read, options)
    else:
        written = write_checkpoint(
            folder, tensors, checkpoint.read, options, metadata=_header_metadata(planned)
        )
    if options.part is not None:
        from moecc.formats.parts import write_record

        write_record(folder, options.source_files())
        return written
    if not one_file:
        companions = checkpoint.companions()
        if is_gguf:  # which has the tokenizer itself
            companions = {n: c for n, c in companions.items() if n.startswith(_LICENCES)}
        write_companions(folder, companions | {path.name: path for path in options.proof})
    if not is_gguf:
        wrapped = planned.wrapped
        config = dict(planned.export.config_json if wrapped is None else wrapped.stored_config)
        if planned.dtype is not None:
            config["torch_dtype"] = config["dtype"] = planned.dtype.torch
        write_durable(folder / "config.json", json_content(config))
    if isinstance(planned.export, EmittedExport):
        for name, text in planned.export.program.files.items():
            write_durable(folder / name, text.encode())
    receipt = receipt_of(planned, folder / FILE_NAME if is_gguf else folder, options)
    proof = [path.name for path in options.proof]
    if not one_file:
        write_durable(folder / RECEIPT_NAME, receipt.content())
        write_durable(folder / CARD_NAME, card(planned, receipt, words, proof).encode())
    embedded = receipt.to_json() if one_file else None
    document = manifest(folder, planned, written, options.source_files(), embedded)
    write_durable(folder / MANIFEST_NAME, document)
    return written


def write_companions(folder: Path, companions: Mapping[str, Path | bytes]) -> None:
    """Write the files of a source beside its weights, by their names. Raises MachineError."""
    for name, content in companions.items():
        make_folder((folder / name).parent)  # chat templates are in a subfolder
        write_durable(folder / name, companion_content(name, content))


def check_place(
    planned: Plan,
    out: str | Path,
    options: WriteOptions = DEFAULTS,
    *,
    force: bool,
    resume: bool = False,
) -> None:
    """Check whether `write` could write to `out`, before anything is; nothing is created.

    Raises: as `write`.
    """
    one_file = is_file(planned, Path(out))
    if planned.architecture and (options.is_join or options.part is not None):
        option = "--join" if options.is_join else "--part"
        raise UsageError(
            "a GGUF file is written by one process", where=option,
            expected="a folder of shards", found=planned.target,
        )  # fmt: skip
    if Path(out).suffix == SUFFIX and not one_file:
        facts = getattr(getattr(planned.export, "config", None), "gguf", None)
        fits = not any(v.reasons for v in planned.engines if v.engine == LLAMA_CPP)
        architecture = facts.architecture if facts is not None and fits else "ARCH"
        raise UsageError(
            "a .gguf file is written for an architecture of llama.cpp", where=out,
            expected=f"--to gguf:{architecture}",
            found=f"a folder, of {with_article(planned.target)}",
            hint="or a folder, whose name does not end in .gguf",
        )  # fmt: skip
    check_output(
        Path(out), inputs=planned.checkpoint.places(), force=force,
        needed_bytes=_needed_bytes(planned, options),
        # What a killed run left of the output stands in the way of no part.
        resume=resume or options.part is not None, is_file=one_file,
    )  # fmt: skip


_SHOWN = 10


@dataclass(frozen=True)
class Work:
    """The work of one run of a conversion.

    Attributes:
      shards: the number of shards that it writes, or checks.
      written_bytes: the size of their tensors; 0 where parts wrote them.
      read_bytes: the size of the tensors that it reads: those of the source, or of the parts.
    """

    shards: int
    written_bytes: int
    read_bytes: int

    def __str__(self) -> str:
        return (
            f"reads {size_text(self.read_bytes)}, writes {size_text(self.written_bytes)} in "
            f"{amount(self.shards, 'shard')}"
        )


def work_of(planned: Plan, options: WriteOptions) -> Work:
    """Return the work of a conversion, or of a part of one. Raises as `shards_of`."""
    shards = planned_shards(planned, options)
    names = {name for shard in shards for name in shard.offsets}
    tensors = [tensor for tensor in planned.tensors if tensor.name in names]
    size_bytes = sum(tensor.entry.nbytes for tensor in tensors)
    if options.is_join:
        return Work(len(shards), 0, size_bytes)
    read = source_types(tensor.expr for tensor in tensors)
    read_bytes = sum(prod(type.shape) * type.dtype.itemsize_bytes for type in read.values())
    return Work(len(shards), size_bytes, read_bytes)


def plan_text(
    planned: Plan, out: str, dry_run: bool, work: Work | None = None, end: str = ""
) -> str:
    """Return the human-readable plan, written unless `dry_run`.

    Args:
      planned: the conversion.
      out: the name of what was written.
      dry_run: whether nothing was.
      work: of this run.
      end: what is said of an output that is written, in place of its name.
    """
    facts, family = planned.facts, planned.graph.family or "no family"
    rows = [
        f"{planned.model.name} ({family}) -> {out} ({planned.target})",
        f"  pipeline    {planned.pipeline or 'none'}",
        f"  preserves   {planned.preserves}",
        *([f"  proved      {planned.proved}"] if planned.proved else []),
        *([f"  measured    {planned.measured}"] if planned.measured else []),
        f"  parameters  {count_text(planned.parameters)}, "
        f"{count_text(facts.parameters.active)} active per token",
        f"  FLOPs       {facts.sequence}",
        f"  on disk     {size_text(planned.size_bytes)} in "
        f"{amount(len(planned.tensors), 'tensor')}, {planned.dtype_name}",
        *([] if work is None else [f"  this run    {work}"]),
        *([f"  runs in     {summary(planned.engines)}"] if planned.engines else []),
        *(f"  remark      {r}" for r in merge_remarks(planned.remarks)),
        "nothing was written (--dry-run)" if dry_run else end or f"written to {out}",
    ]
    return "\n".join(rows)


def _output_type(name: str) -> DType | Storage:
    """Return the element type or the blocks that ``--dtype`` names. Raises UsageError."""
    from moecc.translate.gguf import QUANTISED

    return QUANTISED.get(name.lower()) or float_type(name, QUANTISED)


def convert(
    source: SourceName,
    out: str,
    *,
    pipeline: PipelineText = "",
    to: Annotated[str, Spelling("FAMILY", complete="targets")] = "auto",
    emit: Annotated[str | None, Spelling("LANGUAGE")] = None,
    via: Annotated[Literal["torch"] | None, Spelling()] = None,
    inputs: Inputs = None,
    trust_remote_code: bool = False,
    dtype: Annotated[str | None, Spelling("TYPE")] = None,
    seed: Seed = 0,
    experts: Annotated[Sequence[str], Spelling("NAME=DIR")] = (),
    capture: Annotated[str | None, Spelling("DIR")] = None,
    padding_mask: PaddingMask = False,
    base_model: Annotated[Sequence[str], Spelling("ORG/NAME")] = (),
    max_shard_bytes: ShardBytes = "5000000000",
    part: Annotated[str | None, Spelling("K/N")] = None,
    join: bool = False,
    threads: Annotated[int | None, Spelling("N", low=1, high=1024)] = None,
    dry_run: bool = False,
    load: Load = (),
    allow_nonfinite: bool = False,
    allow_unmatched: AllowUnmatched = False,
    allow_other_base: bool = False,
    no_check: bool = False,
    proof: OutputFile = None,
    verify: bool = False,
    resume: bool = False,
    force: Force = False,
) -> Report:
    """Convert a model and write it to a folder or .gguf.

    Everything is checked from headers and configs before the first weight is read, and each pass is
    held to its promise on the model at small sizes; exit code 3 if one breaks it.

    Args:
      source: Hugging Face folder, .gguf file, hf://…, s3://…, gs://… or preset:NAME; or a
        .toml file of source and options, or the .yaml of mergekit-moe.
      out: Folder to write, also s3://… or gs://…, or file that ends in .gguf.
      to: Family to write, gguf:ARCH with llama.cpp's name of an architecture, or auto, which is
        an architecture for a .gguf file.
      emit: Language of a program to write beside the tensors of st_moe: torch or jax.
      via: Read a folder whose family moecc does not know as its class of PyTorch, with
        torch.export; attention and all else stay the code of that class.
      trust_remote_code: Run the Python code of the folder, which --via torch needs where
        transformers has no class of the model.
      dtype: Element type to write: f32, bf16, f16 or f64, in a GGUF file also q8_0 and q4_k
        (default: as stored).
      experts: Model like SOURCE, or LoRA adapter of it, by the name that the option sources of
        upcycle has for it; may be repeated.
      capture: Folder of statistics of SOURCE that moecc capture wrote.
      base_model: Name on the Hub of SOURCE, for the model card, where its folder does not tell;
        may be repeated for the models of --experts.
      part: Share of the shards to write, for example 3/8, by one of several processes that are
        started with the same options.
      join: Check the parts that --part wrote, and complete OUT with them.
      threads: Number of tensors converted at once (default: the cores).
      dry_run: Plan from headers, report, and write nothing.
      allow_nonfinite: Write NaN and infinity, and note them in the manifest.
      allow_other_base: Accept an adapter that names another model than SOURCE as its base.
      no_check: Do not hold passes to their promises.
      proof: File for the log of the proof that the result is the function of SOURCE, which
        moecc-check accepts; the graphs are written beside it. OUT/proof.json is published with OUT.
      verify: Run source and result on the same tokens before the result is put in place, and
        compare their logits.
      resume: Continue the same conversion after it was killed.
      force: Replace an existing output, once the new one is complete.

    Example:
      moecc convert SmolLM2-135M smollm2-8x -p 'upcycle{experts=8 top-k=2}' --to mixtral
    """
    if is_conversion_file(source):
        from moecc.jobs.conversion_file import read_conversion_file

        stated = read_conversion_file(source)
        if stated.prompts and capture is None:
            hint = f"moecc capture {source} --out captured, then --capture captured"
            raise UsageError("routers are made of statistics of the prompts", where=source,
                             expected="--capture DIR", hint=hint)  # fmt: skip
        source, pipeline = stated.source, pipeline or stated.pipeline
        to, emit = (to if to != "auto" else stated.to), emit or stated.emit
        dtype, seed = dtype or stated.dtype, seed or stated.seed
        experts = experts or [f"{name}={model}" for name, model in stated.experts.items()]
        capture, padding_mask = capture or stated.capture, padding_mask or stated.padding_mask
        base_model = base_model or stated.base_model
        if max_shard_bytes == str(MAX_SHARD_BYTES):
            max_shard_bytes = stated.max_shard_bytes
    to = to if via is not None or emit is not None else target_for(to, out)
    type = None if dtype is None else _output_type(dtype)
    share = None
    if part is not None:
        from moecc.formats.parts import parse_part

        share = parse_part(part)
    branches = parse_branches(experts)
    raise_problems(
        (Problem("not the name of a model on the Hub", "--base-model", "ORG/NAME", name)
         for name in base_model if not is_model_id(name)),
        UsageError,
    )  # fmt: skip
    options = WriteOptions(
        count_bytes(max_shard_bytes), allow_nonfinite, verify,
        threads=threads or available_cores(), part=share, is_join=join,
    )  # fmt: skip
    _check_modes(options)
    is_proof_inside = proof is not None and _is_inside(proof, out)
    if proof is not None:
        from moecc.jobs.prove import check_proof_files

        if not is_proof_inside:
            check_proof_files(proof, force=force)
        elif share is not None or via is not None:
            raise UsageError("the proof is not written into OUT by --part and --via torch",
                             where="--proof", found=proof,
                             hint="--join writes it there; or another folder")  # fmt: skip
        if no_check:
            raise UsageError("nothing is proved with --no-check", where="--proof",
                             hint="leave out one of the two")  # fmt: skip
    passes = read_pipeline(pipeline, load)
    if via is not None:
        rejected = {"to": to != "auto", "emit": emit, "experts": experts, "capture": capture,
                    "padding-mask": padding_mask, "verify": verify, "resume": resume, "part": part,
                    "join": join, "base-model": base_model,
                    "dtype": isinstance(type, Storage)}  # fmt: skip
        raise_problems(
            (Problem(f"--{name} does not go with --via torch: {_NOT_VIA_TORCH[name][0]}",
                     hint=_NOT_VIA_TORCH[name][1]) for name, value in rejected.items() if value),
            UsageError,
        )  # fmt: skip
        return _convert_via_torch(
            source, out, passes, inputs, proof,
            trust_remote_code=trust_remote_code, seed=seed, allow_unmatched=allow_unmatched,
            check=not no_check, dry_run=dry_run, force=force, options=options,
            dtype=type if isinstance(type, DType) else None,
        )  # fmt: skip
    if inputs is not None or trust_remote_code:
        raise UsageError("--inputs and --trust-remote-code go with --via torch")
    with (
        signals_raised(),
        TemporaryDirectory(prefix="moecc-") as temporary,
        open_model(
            source,
            padding=padding_mask or (None if emit is not None else False),
            heads=emit is not None or to == FAMILY or (None if to == AUTO else False),
        ) as model,
    ):
        add_branches(model, branches, allow_other_base=allow_other_base)
        say_weights(model, source)
        for text in model.warnings:
            warn(text)
        statistics = None
        if capture is not None:
            from moecc.model.initialise import add_statistics

            statistics = add_statistics(model, capture)
        planned = plan(
            model, passes, to, dtype=type, seed=seed, allow_unmatched=allow_unmatched, loaded=load,
            check=not no_check, statistics=statistics, emit=emit, named_bases=base_model,
        )  # fmt: skip
        if planned.unread:
            raise UsageError(
                Problem("no pass reads this model", f"--experts {name}",
                        hint=f"upcycle{{experts=4 sources=base,{name},base,{name}}}, say: "
                        "the model of each copy")
                for name in planned.unread
            )  # fmt: skip
        if proof is not None:
            promised = "quantised weights" if planned.storage else str(planned.preserves)
            if is_proof_inside:
                file = _beside(planned, Path(proof).name, Path(temporary))
                paths = _write_proof(planned.proof, file, source, promised)
                options = replace(options, proof=paths)
            else:
                _write_proof(planned.proof, Path(proof), source, promised)
        # Its terms would stay in memory, and the collector walk them, while weights are written.
        planned = planned.without_log()
        work = None if planned.architecture else work_of(planned, options)
        with _local_output(out, planned, options, force, resume, dry_run) as local:
            if local is not None:
                check_place(planned, local, options, force=force, resume=resume)
            if local and not dry_run and (force or not _has_part(planned, out, options)):
                with Bar("checking" if join else "writing") as bar:
                    shown = replace(options, progress=bar)
                    written = write(planned, local, shown, force=force, resume=resume).written
                _say_weights_written(written, resume and not join)
    data = planned.to_json() | {"out": out, "dry_run": dry_run, "part": part}
    data["work"] = None if work is None else asdict(work)
    name, end = out, ""
    if options.part is not None:
        name, folder = f"part {part} of {out}", part_folder(Path(out), options.part)
        end = f"part {part} is in {folder}; after all parts, --join writes {out}"
    return Report("convert", data, lambda: plan_text(planned, name, dry_run, work, end))


def _is_inside(proof: str, out: str) -> bool:
    """Whether a proof is to be one of the files of an output folder."""
    is_folder = not is_address(out) and Path(out).suffix != SUFFIX
    return is_folder and Path(proof).absolute().parent == Path(out).absolute()


def _beside(planned: Plan, name: str, folder: Path) -> Path:
    """Return the path in `folder` of a proof that is copied into the output. Raises UsageError."""
    others = {"config.json", INDEX_NAME, MANIFEST_NAME, RECEIPT_NAME, CARD_NAME}
    if name in others | planned.checkpoint.companions().keys():
        raise UsageError("the result has another file of that name", where="--proof", found=name,
                         hint="--proof OUT/proof.json")  # fmt: skip
    return folder / name


def _write_proof(
    proof: ConversionProof | None, file: Path, source: str, promised: str
) -> tuple[Path, ...]:
    """Write the log of a proof, and return its files. Raises CheckError where there is none."""
    if proof is None:
        raise CheckError("there is no proof to write", where=source,
                         expected="a promise of equality, and no quantised weights",
                         found=promised)  # fmt: skip
    return proof.write(file)


def _check_modes(options: WriteOptions) -> None:
    """Reject options that exclude one another. Raises UsageError."""
    if options.part is not None and options.is_join:
        raise UsageError("--part writes shards and --join completes them", hint="give one of them")
    if options.part is not None and options.verify:
        raise UsageError("--verify runs all of the result", hint="give it with --join")


def _has_part(planned: Plan, out: str, options: WriteOptions) -> bool:
    """Return whether an earlier run completed the part, which is then left as it is.

    Raises: as `read_part`.
    """
    if options.part is None or not (folder := part_folder(Path(out), options.part)).is_dir():
        return False
    from moecc.formats.parts import read_part

    facts, shards = conversion_facts(planned, options), planned_shards(planned, options)
    read_part(folder, options.part, facts, shards)
    say(f"part {options.part} was complete")
    return True


_NOT_VIA_TORCH = {
    "to": ("the result is of the class of the source",
           "leave --to out, or --via torch if moecc reads the family of the source"),
    "emit": ("the result has its mixtures as PyTorch already", "leave --emit out"),
    "experts": ("every expert is made of one model", "convert models of a family that moecc reads"),
    "capture": ("statistics are of graphs of families",
                "leave out passes that read statistics, and --capture"),
    "padding-mask": ("the class of the model has a mask of its own", "leave --padding-mask out"),
    "verify": ("both models would have to be in memory", "moecc prove SOURCE OUT, afterwards"),
    "resume": ("transformers loads the dense model anew", "give --force to start again"),
    "part": ("one process writes all shards", "leave --part out"),
    "join": ("there are no parts", "leave --join out"),
    "base-model": ("no model card is written", "leave --base-model out"),
    "dtype": ("a folder has elements of floating point", "--dtype f32, bf16, f16 or f64"),
}  # fmt: skip
"""Options of `convert` that a class of PyTorch has no use for: why, and the way out."""


def _convert_via_torch(
    source: str, out: str, passes: Pipeline, inputs: str | None, proof_file: str | None,
    *, dry_run: bool, options: WriteOptions, **more: Any,
) -> Report:  # fmt: skip
    """Convert a folder by what torch.export shows of its class, and return the report."""
    from moecc import torch as mt
    from moecc.model.inputs import read_named_arrays

    for name in filter(is_address, (source, out)):
        hint = "copy the model to this machine; moecc push uploads the result"
        raise UsageError("--via torch reads and writes local folders", found=name, hint=hint)
    if not len(passes):
        raise UsageError(
            "--via torch needs passes: without them all of the model stays PyTorch",
            hint="-p 'upcycle{experts=8 top-k=2}'",
        )
    arrays = None if inputs is None else read_named_arrays(inputs)
    with signals_raised(), Bar("writing") as bar:
        done = mt.convert_folder(
            source, out, passes, inputs=arrays, dry_run=dry_run,
            options=replace(options, progress=bar), **more,
        )  # fmt: skip
    conversion, proof = done.conversion, done.conversion.proof
    if proof_file is not None:
        _write_proof(proof, Path(proof_file), source, str(conversion.preserves))
    if done.written is not None:
        _say_weights_written(done.written, resume=False)
    data = {
        "source": source, "family_from": MODULE_TYPE, "family_to": MODULE_TYPE,
        "pipeline": str(conversion.pipeline), "preserves": asdict(conversion.preserves),
        "proof": None if proof is None else proof.to_json(), "seed": conversion.seed,
        "tensors": done.tensors, "size_bytes": done.size_bytes,
        "report": conversion.report.to_json(), "out": out, "dry_run": dry_run,
    }  # fmt: skip
    rows = [
        f"{source} -> {out} ({conversion.dense.sparse})",
        str(conversion.report),
        *([f"{proof.verdict.status}: blocks of the dense model"] if proof is not None else []),
        f"on disk: {size_text(done.size_bytes)} in {amount(done.tensors, 'tensor')}",
        "nothing was written (--dry-run)" if dry_run else f"written to {out}",
    ]
    return Report("convert", data, lambda: "\n".join(rows))


@contextmanager
def _local_output(
    out: str, planned: Plan, options: WriteOptions, force: bool, resume: bool, dry_run: bool
) -> Iterator[Path | None]:
    """Yield the path to write for `out`, and upload it at the end if that is in a store.

    The path is None where a conversion that is resumed is complete, but for its upload.
    """
    if not is_address(out):
        yield Path(out)
        return
    from moecc.formats.upload import StoreOutput

    if options.part is not None or options.is_join:
        hint = "convert the parts into a folder that all of them see, join them, and moecc push it"
        raise UsageError("parts are not written to a store", where=out, hint=hint)
    with closing(StoreOutput(out, force=force, resume=resume)) as output:
        facts = json.dumps(conversion_facts(planned, options), sort_keys=True)
        content = hashlib.sha256(facts.encode()).hexdigest()
        if resume and not (force or dry_run) and output.is_staged(content):
            say(f"continued: the upload of the converted model in {output.stage}")
            yield None
            output.put_stage(content)
            return
        output.check_stage()
        output.check(content)
        for folder in reversed(output.stage.parents):
            make_folder(folder)
        if dry_run:
            yield output.stage
            return
        with output.claimed(content):
            yield output.stage
        output.put_stage(content)


def _say_weights_written(written: WriteReport, resume: bool) -> None:
    if resume and written.resumed_bytes:
        complete, total = written.resumed_bytes, written.total_bytes
        say(f"continued: {complete:,} of {total:,} bytes of weights were complete")
    for text in written.spread:
        warn(f"not finite: {text}")
    for name in written.zeros[:_SHOWN]:
        warn(f"all zero: {name}")
    if len(written.zeros) > _SHOWN:
        warn(f"all zero: {len(written.zeros) - _SHOWN:,} more, in the manifest")
