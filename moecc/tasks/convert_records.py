"""What is written beside converted weights: the model card and the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.tasks.conversion import Plan
from moecc.version import __version__

if TYPE_CHECKING:
    from moecc.checkpoint.writer import WriteReport


def card(planned: Plan, title: str) -> str:
    """Return the model card of a conversion; `title` is the name of the output."""
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
            dtype=planned.dtype_name,
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


def manifest(folder: Path, planned: Plan, written: WriteReport) -> bytes:
    """Return the content of the manifest of what was written into `folder`."""
    from moecc.checkpoint.manifest import file_records, weight_file_record
    from moecc.checkpoint.records import Manifest, TensorRecord, dump

    checkpoint = planned.model.checkpoint
    assert checkpoint is not None, "a plan has weights"
    tensors: Mapping[str, TensorRecord] = {
        t.name: TensorRecord(t.sha256, t.dtype, t.shape, t.file) for t in written.tensors
    }
    weights = sorted({t.file for t in written.tensors})
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    others = [name for name in names if name not in weights]
    nonfinite = (
        *(f"not finite: {found}" for found in written.nonfinite),
        *(f"written and not finite: {text}" for text in written.spread),
    )
    made = Manifest(
        pipeline=planned.pipeline.in_full(),
        seed=planned.seed,
        source=checkpoint.path.name,
        source_files=file_records(checkpoint.files()),
        family_from=str(planned.graph.attrs.get("family", "")),
        family_to=planned.target,
        dtype=planned.dtype_name,
        preserves=str(planned.preserves),
        weights={name: weight_file_record(folder / name) for name in weights},
        files=file_records({name: folder / name for name in others}),
        tensors=tensors,
        notes=(*_notes(planned), *nonfinite),
    )
    return dump(made)
