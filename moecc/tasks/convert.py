"""Convert a checkpoint: everything is planned from headers, then streamed to disk.

`plan` reads only configs and headers, and rejects invalid conversions.  `write` evaluates the
plan's weight expressions tensor by tensor into a temporary folder, which is renamed when complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.tasks.conversion import Plan as Plan
from moecc.tasks.conversion import plan as plan
from moecc.tasks.convert_gguf import is_file, write_gguf, write_gguf_file
from moecc.tasks.convert_records import card, manifest
from moecc.version import __version__

if TYPE_CHECKING:
    from moecc.checkpoint.writer import WriteReport

MAX_SHARD_BYTES = 5 * 10**9
"""The default limit of a shard; a larger tensor gets a shard of its own."""

Progress = Callable[[int, int], None]


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
    progress: Progress | None = None,
) -> Conversion:
    """Write a planned conversion to `out`, atomically.

    `out` is a folder; for a plan of a GGUF file it may also be that file, with its manifest beside
    it.

    Raises:
      InputError: the output cannot be used; a weight is not finite; the source changed meanwhile.
      MachineError: the disk is too small, or a write failed.
    """
    from moecc.checkpoint.outdir import output_folder
    from moecc.checkpoint.outfile import output_file
    from moecc.families.export_gguf import GgufExport

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    place = Path(out)
    one_file = is_file(planned, place)
    options = _Options(max_shard_bytes, allow_nonfinite, progress)
    with (output_file if one_file else output_folder)(
        place, inputs=[checkpoint.path], force=force, needed_bytes=planned.size_bytes
    ) as temporary:
        if isinstance(planned.export, GgufExport):
            fill = write_gguf_file if one_file else write_gguf
            written = fill(temporary, planned, place.name, options.allow_nonfinite, progress)
        else:
            written = _write_folder(temporary, planned, place.name, options)
        # After all of it was read and hashed: the digests are those of what was converted.
        checkpoint.require_unchanged()
    return Conversion(place, planned, written)


def check_place(planned: Plan, out: str | Path, *, force: bool = False) -> None:
    """Check whether `write` could write to `out`, before anything is; nothing is created.

    Raises: as `write`.
    """
    from moecc.checkpoint.outdir import check_output
    from moecc.checkpoint.outfile import check_output_file

    inputs = [planned.model.checkpoint.path] if planned.model.checkpoint else []
    check = check_output_file if is_file(planned, Path(out)) else check_output
    check(Path(out), inputs=inputs, force=force, needed_bytes=planned.size_bytes)


@dataclass(frozen=True)
class _Options:
    max_shard_bytes: int
    allow_nonfinite: bool
    progress: Progress | None

    @property
    def words(self) -> list[str]:
        """What of them decides the files that are written, as options of the command."""
        shards = self.max_shard_bytes != MAX_SHARD_BYTES
        nonfinite = ["--allow-nonfinite"] if self.allow_nonfinite else []
        return [f"--max-shard-bytes {self.max_shard_bytes}"] * shards + nonfinite


def _write_folder(folder: Path, planned: Plan, title: str, options: _Options) -> WriteReport:
    from moecc.checkpoint.durable import write_durable
    from moecc.checkpoint.records import MANIFEST_NAME
    from moecc.checkpoint.writer import write_checkpoint

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
    )
    _write_companions(folder, planned, title, options.words)
    write_durable(folder / MANIFEST_NAME, manifest(folder, planned, written))
    return written


def _provenance(planned: Plan) -> dict[str, str]:
    return {"moecc": __version__, "pipeline": planned.pipeline.in_full()}


def _write_companions(folder: Path, planned: Plan, title: str, words: list[str]) -> None:
    """Copy tokenizer and licence files byte for byte, and write config.json and the card."""
    from moecc.checkpoint.durable import write_durable
    from moecc.checkpoint.files import read_whole

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    for name, content in checkpoint.companions().items():
        data = read_whole(content) if isinstance(content, Path) else content
        place = folder / name
        place.parent.mkdir(exist_ok=True)  # chat templates are in a subfolder
        write_durable(place, data)
    config = dict(planned.export.config_json)
    if planned.dtype is not None:
        config["torch_dtype"] = config["dtype"] = planned.dtype.torch
    write_durable(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_durable(folder / "README.md", card(planned, title, words).encode())
