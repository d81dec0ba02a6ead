"""Convert a checkpoint: everything is planned from headers, then streamed to disk.

`plan` reads only configs and headers, and rejects invalid conversions.  `write` evaluates the
plan's weight expressions tensor by tensor into a temporary folder, which is renamed when complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.unroll import unroll
from moecc.model.open import Model
from moecc.model.small_weights import reads_small
from moecc.pipeline.passes import Preserves
from moecc.types.dtypes import DType
from moecc.version import __version__

if TYPE_CHECKING:
    from moecc.checkpoint.writer import OutputTensor, WriteReport
    from moecc.families.describe import Description
    from moecc.families.export import Export
    from moecc.pipeline.text import Pipeline

MAX_SHARD_BYTES = 5 * 10**9
"""The default limit of a shard; a larger tensor gets a shard of its own."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """A validated conversion.

    Attributes:
      model: the opened source.
      graph: the rewritten graph.
      pipeline: the passes applied to it.
      preserves: their combined promise.
      target: the output family.
      export: its config and tensors.
      dtype: the requested element type; None keeps that of the source.
      seed: of the random numbers.
      remarks: the remarks of the passes.
    """

    model: Model
    graph: Graph
    pipeline: Pipeline
    preserves: Preserves
    target: str
    export: Export
    dtype: DType | None
    seed: int
    remarks: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> list[OutputTensor]:
        """The tensors to write, by their names on disk."""
        from moecc.checkpoint.writer import OutputTensor
        from moecc.weights.expr import sources

        made = []
        for name, weight in self.export.tensors:
            read = sources(weight)
            # Drawn tensors have no type on disk and take that of most of the model.
            kept = read[0].type.dtype if read else self.model.dtype
            made.append(OutputTensor(name, weight, self.dtype or kept))
        return made

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors to write."""
        return sum(prod(t.expr.type.shape) * t.dtype.itemsize_bytes for t in self.tensors)

    @property
    def parameters(self) -> int:
        """The number of parameters to write."""
        return sum(prod(t.expr.type.shape) for t in self.tensors)

    @cached_property
    def facts(self) -> Description:
        """What is said of the model that will be written."""
        from moecc.families.describe import describe

        return describe(self.graph)

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        facts = self.facts
        return {
            "source": self.model.name,
            "family_from": self.graph.attrs.get("family"),
            "family_to": self.target,
            "pipeline": str(self.pipeline),
            "preserves": {
                "kind": self.preserves.kind,
                "reason": self.preserves.reason,
                "predicted_error": self.preserves.predicted_error,
            },
            "seed": self.seed,
            "dtype": self.dtype.name if self.dtype else "as stored",
            "tensors": len(self.tensors),
            "parameters": {"total": self.parameters, "active": facts.parameters.active},
            "flops_per_token": facts.flops_per_token,
            "size_bytes": self.size_bytes,
            "remarks": list(self.remarks),
        }


def plan(
    model: Model,
    pipeline: Pipeline,
    target: str,
    *,
    dtype: DType | None = None,
    seed: int = 0,
    allow_unmatched: bool = False,
) -> Plan:
    """Return the plan of a conversion.

    Only headers are read, and the vectors of norms where an error is predicted by them.

    Args:
      model: the source; its graph is rewritten in place.
      pipeline: the passes.
      target: the output family.
      dtype: the element type to write; None keeps that of the source.
      seed: of the random numbers.
      allow_unmatched: whether a pass that must match may match nothing.

    Raises:
      UsageError: there is no such target.
      InputError: a pass cannot be applied to this model, or the target cannot express the result.
    """
    from moecc.families.export import export_graph
    from moecc.families.propose import check_target
    from moecc.pipeline.passes import Context
    from moecc.pipeline.reproducer import temporary_folder
    from moecc.pipeline.runner import run_pipeline

    check_target(target)
    if model.checkpoint is None:
        raise InputError(f"{model.name} has no weights to convert", hint="give a checkpoint")
    remarks: list[str] = []
    context = Context(
        seed=seed, allow_unmatched=allow_unmatched, remark=lambda r: remarks.append(str(r)),
        read=reads_small(model.checkpoint),
    )  # fmt: skip
    done = run_pipeline(model.graph, pipeline, context=context, crash_folder=temporary_folder)
    if unroll(model.graph):
        remarks.append("repeated layers were unrolled: a checkpoint stores each layer")
    export = export_graph(model.graph, target)
    return Plan(
        model, model.graph, pipeline, done.preserves, target, export, dtype, seed, tuple(remarks)
    )


@dataclass(frozen=True)
class Conversion:
    """A completed conversion.

    Attributes:
      folder: the output folder.
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
    """Write a planned conversion to the folder `out`, atomically.

    Raises:
      InputError: the folder cannot be used; a weight is not finite; the source changed meanwhile.
      MachineError: the disk is too small, or a write failed.
    """
    from moecc.checkpoint.outdir import output_folder
    from moecc.checkpoint.writer import write_checkpoint

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    folder = Path(out)
    with output_folder(
        folder, inputs=[checkpoint.path], force=force, needed_bytes=planned.size_bytes
    ) as temporary:
        written = write_checkpoint(
            temporary,
            planned.tensors,
            checkpoint.read,
            max_shard_bytes=max_shard_bytes,
            metadata=_provenance(planned),
            progress=progress,
            allow_nonfinite=allow_nonfinite,
        )
        _write_companions(temporary, planned, folder.name)
        _write_manifest(temporary, planned, written)
        # After all of it was read and hashed: the digests are those of what was converted.
        checkpoint.require_unchanged()
    return Conversion(folder, planned, written)


def _provenance(planned: Plan) -> dict[str, str]:
    return {"moecc": __version__, "pipeline": planned.pipeline.in_full()}


def _write_companions(folder: Path, planned: Plan, title: str) -> None:
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
    write_durable(folder / "README.md", _card(planned, title).encode())


def _card(planned: Plan, title: str) -> str:
    from moecc.checkpoint.modelcard import CardFacts, hub_repository, model_card

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    path, facts = checkpoint.path, planned.facts
    kinds = Counter(str(layer) for layer in facts.expert_layers)
    task, auto_class = _loaded_as(planned)
    made = (f"{count} of {facts.layers} layers have {kind}" for kind, count in kinds.items())
    return model_card(
        CardFacts(
            title=title,
            family_from=str(planned.graph.attrs.get("family", "")),
            family_to=planned.target,
            pipeline=str(planned.pipeline),
            preserves=str(planned.preserves),
            dtype=planned.dtype.name if planned.dtype else "as stored",
            seed=planned.seed,
            parameters=planned.parameters,
            active_parameters=facts.parameters.active,
            moecc_version=__version__,
            task=task,
            auto_class=auto_class,
            base_model=hub_repository(path),
            licence=checkpoint.licence(),
            notes=(*made, *_notes(planned)),
        )
    )


def _loaded_as(planned: Plan) -> tuple[str, str | None]:
    """Return the Hub task of the output, and the transformers class that loads it."""
    from moecc.families.graph_layout import FAMILY

    if "logits" not in planned.graph.outputs:
        task, auto_class = "feature-extraction", "AutoModel"
    elif "decoder_tokens" in planned.graph.inputs:
        task, auto_class = "text2text-generation", "AutoModelForSeq2SeqLM"
    else:
        task, auto_class = "text-generation", "AutoModelForCausalLM"
    return task, None if planned.target == FAMILY else auto_class


def _notes(planned: Plan) -> tuple[str, ...]:
    return tuple(planned.model.remarks())


def _write_manifest(folder: Path, planned: Plan, written: WriteReport) -> None:
    from moecc.checkpoint.durable import write_durable
    from moecc.checkpoint.manifest import file_records, weight_file_record
    from moecc.checkpoint.records import MANIFEST_NAME, Manifest, TensorRecord, dump

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    tensors: Mapping[str, TensorRecord] = {
        t.name: TensorRecord(t.sha256, t.dtype.name, t.shape, t.file) for t in written.tensors
    }
    weights = sorted({t.file for t in written.tensors})
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    others = [name for name in names if name not in weights]
    nonfinite = tuple(f"not finite: {found}" for found in written.nonfinite)
    manifest = Manifest(
        pipeline=planned.pipeline.in_full(),
        seed=planned.seed,
        source=checkpoint.path.name,
        source_files=file_records(checkpoint.files()),
        family_from=str(planned.graph.attrs.get("family", "")),
        family_to=planned.target,
        dtype=planned.dtype.name if planned.dtype else "as stored",
        preserves=str(planned.preserves),
        weights={name: weight_file_record(folder / name) for name in weights},
        files=file_records({name: folder / name for name in others}),
        tensors=tensors,
        notes=(*_notes(planned), *nonfinite),
    )
    write_durable(folder / MANIFEST_NAME, dump(manifest))
