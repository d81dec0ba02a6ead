"""Convert a checkpoint: everything is planned from headers, then streamed to disk.

`plan` reads only configs and headers, and rejects invalid conversions.  `write` evaluates the
plan's weight expressions tensor by tensor into a temporary folder, which is renamed when complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import UsageError
from moecc.support.text import with_article
from moecc.tasks.conversion import Plan as Plan
from moecc.tasks.conversion import plan as plan
from moecc.tasks.convert_gguf import is_file, write_gguf, write_gguf_file
from moecc.tasks.convert_records import MAX_SHARD_BYTES, Progress, WriteOptions, card, manifest
from moecc.tasks.convert_records import conversion_facts as conversion_facts
from moecc.tasks.convert_records import receipt_of as receipt_of
from moecc.version import __version__

if TYPE_CHECKING:
    from moecc.formats.writer import Done, Facts, Journal, WriteReport


@dataclass(frozen=True)
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


def write(
    planned: Plan,
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a planned conversion to `out`, atomically.

    `out` is a folder; for a plan of a GGUF file it may also be that file, with its manifest beside
    it.

    Args:
      planned: the conversion.
      out: the output.
      max_shard_bytes: the limit of a shard.
      force: whether an existing output is replaced.
      allow_nonfinite: whether sources may hold NaN and infinity.
      verify: whether source and result are run and compared before the result is in place.
      resume: whether to continue what a killed run of the same conversion has written.
      progress: receives the bytes written so far, and all.

    Raises:
      CheckError: the result is not the function that was promised.
      InputError: the output cannot be used; a weight is not finite; the source changed meanwhile.
      MachineError: the disk is too small, or a write failed.
    """
    from moecc.formats.adapter import files_of
    from moecc.formats.manifest import hashed_beside
    from moecc.formats.output import output_folder
    from moecc.formats.run import inputs_of
    from moecc.translate.gguf import GgufExport

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    place = Path(out)
    one_file = is_file(planned, place)
    options = WriteOptions(max_shard_bytes, allow_nonfinite, verify, progress)
    earlier = _Earlier(conversion_facts(planned, options))
    with output_folder(
        place, inputs=inputs_of(checkpoint), force=force, needed_bytes=planned.size_bytes,
        can_resume=earlier.can_resume if resume else None, is_file=one_file,
    ) as temporary, earlier.journal(temporary) as journal, \
            hashed_beside(files_of(checkpoint)) as source_files:  # fmt: skip
        options = replace(options, journal=journal, source_files=source_files)
        if isinstance(planned.export, GgufExport):
            fill = write_gguf_file if one_file else write_gguf
            written = fill(temporary, planned, options)
        else:
            written = _write_folder(temporary, planned, options)
        # After all of it was hashed and read: the digests are those of what was converted.
        checkpoint.require_unchanged()
        if one_file:
            journal.synchronise()
        else:
            journal.remove()
    return Conversion(place, planned, written)


class _Earlier:
    """What a killed run of the same conversion completed."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[str, Done] = {}

    def can_resume(self, folder: Path) -> bool:
        """Read its journal; return whether it is of use. Raises InputError if it is of another."""
        from moecc.formats.writer import read_journal

        self._known = read_journal(folder, self._facts)
        return bool(self._known)

    @contextmanager
    def journal(self, folder: Path) -> Iterator[Journal]:
        """Yield the journal of this run, which begins with it."""
        from moecc.formats.writer import Journal

        journal = Journal(folder, self._facts, self._known)
        try:
            yield journal
        finally:
            journal.close()


def check_place(
    planned: Plan, out: str | Path, *, force: bool = False, resume: bool = False
) -> None:
    """Check whether `write` could write to `out`, before anything is; nothing is created.

    Raises: as `write`.
    """
    from moecc.formats.output import check_output
    from moecc.formats.run import inputs_of

    _check_suffix(planned, Path(out))
    inputs = inputs_of(planned.model.checkpoint)
    check_output(
        Path(out), inputs=inputs, force=force, needed_bytes=planned.size_bytes, resume=resume,
        is_file=is_file(planned, Path(out)),
    )  # fmt: skip


def _check_suffix(planned: Plan, out: Path) -> None:
    """Raise UsageError for a folder that would be taken for a GGUF file."""
    from moecc.formats.gguf.storage import SUFFIX

    if out.suffix == SUFFIX and not is_file(planned, out):
        raise UsageError(
            "a .gguf file is written for an architecture of llama.cpp", where=str(out),
            expected="--to gguf:ARCH, for example gguf:llama",
            found=f"a folder, of {with_article(planned.target)}",
            hint="or a folder, whose name does not end in .gguf",
        )  # fmt: skip


def _write_folder(folder: Path, planned: Plan, options: WriteOptions) -> WriteReport:
    from moecc.formats.disk import write_durable
    from moecc.formats.manifest import MANIFEST_NAME
    from moecc.formats.modelcard import CARD_NAME
    from moecc.formats.writer import write_checkpoint
    from moecc.tasks.receipt import RECEIPT_NAME

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    written = write_checkpoint(
        folder,
        planned.tensors,
        checkpoint.read,
        max_shard_bytes=options.max_shard_bytes,
        metadata=_provenance(planned),
        progress=options.progress,
        allow_nonfinite=options.allow_nonfinite,
        journal=options.journal,
    )
    _write_companions(folder, planned)
    receipt = receipt_of(planned, folder, options)
    write_durable(folder / RECEIPT_NAME, receipt.content())
    write_durable(folder / CARD_NAME, card(planned, receipt, options.words).encode())
    write_durable(
        folder / MANIFEST_NAME, manifest(folder, planned, written, options.source_files())
    )
    return written


def _provenance(planned: Plan) -> dict[str, str]:
    return {"moecc": __version__, "pipeline": planned.pipeline.in_full()}


def _write_companions(folder: Path, planned: Plan) -> None:
    """Copy tokenizer and licence files byte for byte, and write config.json."""
    from moecc.formats.disk import make_folder, write_durable
    from moecc.formats.files import read_whole

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    for name, content in checkpoint.companions().items():
        data = read_whole(content) if isinstance(content, Path) else content
        place = folder / name
        make_folder(place.parent)  # chat templates are in a subfolder
        write_durable(place, data)
    config = dict(planned.export.config_json)
    if planned.dtype is not None:
        config["torch_dtype"] = config["dtype"] = planned.dtype.torch
    write_durable(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
