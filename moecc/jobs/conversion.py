"""Plan a conversion: only configs and headers are read, and invalid ones are rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import InputError, UsageError, describe_error
from moecc.families.config import FAMILY, ModelConfig
from moecc.families.describe import Description, describe
from moecc.formats.gguf.storage import SUFFIX, Storage
from moecc.formats.open import wrapped_in
from moecc.formats.run import base_models
from moecc.formats.source import Checkpoint
from moecc.formats.writer import OutputTensor
from moecc.ir.conventions import AUXILIARY, LOSS
from moecc.ir.graph import Graph
from moecc.ir.unroll import unroll
from moecc.jobs.checks import NOT_CHECKED, Contracts, PassProofs, check_contracts, gap
from moecc.model.open import OpenedModel, function_name, reads_small
from moecc.prove.conversion import ConversionProof, prove_conversion
from moecc.rewrite.passes import Context, Preserves, Statistics, weakest
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline, temporary_folder
from moecc.support.process import gc_paused
from moecc.support.text import amount, brief, count_text, facts_table, size_text
from moecc.support.untyped import JsonDict
from moecc.translate.engines import (
    EngineVerdict,
    summary,
    verdicts,
    verdicts_on_gguf,
    verdicts_on_program,
)
from moecc.translate.export import (
    EmittedExport,
    Export,
    WrappedExport,
    export_emitted,
    export_graph,
)
from moecc.translate.propose import check_target
from moecc.types import DType, is_lossless
from moecc.weights.arithmetic import branch_and_name, is_statistic
from moecc.weights.expr import source_types, sources

if TYPE_CHECKING:
    from moecc.backend import EmittedProgram
    from moecc.translate.gguf import GgufExport


AUTO = "auto"
"""The target that stands for the family that `moecc.jobs.targets.choose` takes."""

GGUF = "gguf:"
"""The prefix of the targets that are GGUF files."""


def target_for(target: str, out: str | Path) -> str:
    """Return the target of an output: ``auto`` is ``gguf:auto`` where it is a GGUF file."""
    return GGUF + AUTO if target == AUTO and Path(out).suffix == SUFFIX else target


@dataclass(frozen=True)
class Plan:
    """A validated conversion.

    Attributes:
      model: the opened source.
      graph: the rewritten graph.
      pipeline: the passes applied to it.
      preserves: their combined promise.
      target: the output family, or ``gguf:ARCH``.
      export: its config and tensors.
      dtype: the requested element type; None keeps that of the source.
      storage: the blocks that a GGUF file's matrices are quantised to, if any.
      options: further options of the command that decide the result.
      seed: of the random numbers.
      remarks: the remarks of the passes.
      contracts: the evidence that each pass keeps its promise.
      proof: the proof that the result is the function of the source; None where the passes promise
        less, the target is a GGUF file, or nothing was checked.
      base_models: the models on the Hub that the source and those beside it are made from.
      notes: what a reader of the result should know of its source.
      left_out: the tensors of the source that are no part of the graph.
    """

    model: OpenedModel
    graph: Graph
    pipeline: Pipeline
    preserves: Preserves
    target: str
    export: Export | GgufExport
    dtype: DType | None
    seed: int
    remarks: tuple[str, ...]
    storage: Storage | None
    options: tuple[str, ...]
    contracts: Contracts
    proof: ConversionProof | None
    base_models: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights of the source."""
        return self.model.weights

    @property
    def architecture(self) -> str:
        """The architecture of a GGUF file; empty for a folder."""
        return self.target.removeprefix(GGUF) if self.target.startswith(GGUF) else ""

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """The models beside the source that no weight is read from."""
        return unread_models(self.graph, tuple(self.checkpoint.branches))

    @property
    def program(self) -> EmittedProgram | None:
        """The program that is written beside the tensors, if there is one."""
        return self.export.program if isinstance(self.export, EmittedExport) else None

    @property
    def wrapped(self) -> WrappedExport | None:
        """The export inside the model that held the source, if it is put back."""
        return self.export if isinstance(self.export, WrappedExport) else None

    @cached_property
    def engines(self) -> tuple[EngineVerdict, ...]:
        """Whether each engine runs the model that will be written."""
        if self.architecture:
            return verdicts_on_gguf(self.architecture)
        return _verdicts(self.export)

    def without_log(self) -> Plan:
        """Return the plan without the log of its proof, which holds all terms."""
        if self.proof is None:
            return self
        verdict = replace(self.proof.verdict, make_log=dict)
        return replace(self, proof=replace(self.proof, verdict=verdict))

    @property
    def proved(self) -> str:
        """The part of the conversion that is proved, in words; empty for nothing."""
        if self.proof is not None and self.proof.verdict:
            return function_of_source(self.left_out)
        passes = self.contracts.passes
        count = sum(receipt.measured is None for receipt in passes)
        return f"{count} of {len(passes)} passes" if count else ""

    @property
    def measured(self) -> str:
        """The evidence for equalities that are not proved, in words; empty where none is."""
        contracts, proof = self.contracts, self.proof
        if proof is not None and proof.verdict:
            return ""
        gaps = [checked.gap for checked in contracts.passes if checked.gap]
        if gaps:
            text = f"{amount(len(gaps), 'pass')}, at small sizes only, not proved: {gaps[0]}"
        elif contracts.unchecked and contracts is not NOT_CHECKED:
            text = f"nothing, passes are not checked: {contracts.unchecked}"
        elif proof is not None:
            text = f"nothing, the result is not proved: {gap(proof.verdict)}"
        else:
            return ""
        return f"{text} (--verify compares the logits)"

    @cached_property
    def tensors(self) -> list[OutputTensor]:
        """The tensors to write, by their names on disk."""
        outputs = []
        wrapped = self.wrapped
        for name, weight in self.export.tensors if wrapped is None else wrapped.stored:
            read = [source for source in sources(weight) if not is_statistic(source.name)]
            # Drawn tensors have no type on disk and take that of most of the model.
            element_type = self.dtype or (read[0].type.dtype if read else self.model.dtype)
            if wrapped is not None and name in wrapped.untouched:
                element_type = read[0].type.dtype
            if self.architecture:
                from moecc.translate.gguf import stored_as

                outputs.append(stored_as(name, weight, element_type, self.storage))
            else:
                outputs.append(OutputTensor(name, weight, element_type))
        return outputs

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors to write."""
        return sum(t.entry.nbytes for t in self.tensors)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The element types and blocks that are written, that of most bytes first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.type_name] += tensor.entry.nbytes
        return tuple(name for name, _ in sizes.most_common())

    @cached_property
    def rounded(self) -> tuple[str, ...]:
        """The element types and blocks that weights are rounded to."""
        names = (t.type_name for t in self.tensors
                 if t.storage or not is_lossless(t.expr.type.dtype, t.dtype))  # fmt: skip
        return tuple(dict.fromkeys(names))

    @property
    def dtype_name(self) -> str:
        """The requested element type or blocks, or ``as stored``."""
        if self.storage is not None:
            return self.storage.name.lower()
        return self.dtype.name if self.dtype else "as stored"

    @property
    def parameters(self) -> int:
        """The number of parameters to write."""
        return sum(prod(t.expr.type.shape) for t in self.tensors)

    @cached_property
    def facts(self) -> Description:
        """The description of the model that will be written."""
        return describe(self.graph)

    def __repr__(self) -> str:
        return brief("moecc.ConversionPlan", self._rows())

    def _repr_html_(self) -> str:
        remarks = (("remark", remark) for remark in dict.fromkeys(self.remarks))
        return facts_table([*self._rows(), *remarks])

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("", f"{self.model.name} as {self.target}"), ("pipeline", str(self.pipeline)),
            ("preserves", str(self.preserves)), ("parameters", count_text(self.parameters)),
            ("on disk", f"{size_text(self.size_bytes)} in {amount(len(self.tensors), 'tensor')}, "
             f"{self.dtype_name}"),
            ("runs in", summary(self.engines) if self.engines else ""),
        ]  # fmt: skip

    def to_json(self) -> JsonDict:
        """Return the plan as JSON values."""
        facts = self.facts
        return {
            "source": self.model.name,
            "family_from": self.graph.attrs.get("family"),
            "family_to": self.target,
            "pipeline": str(self.pipeline),
            "preserves": asdict(self.preserves),
            "proof": None if self.proof is None else self.proof.to_json(),
            "seed": self.seed,
            "dtype": self.dtype_name,
            "tensors": len(self.tensors),
            "parameters": {"total": self.parameters, "active": facts.parameters.active},
            "flops_per_token": facts.sequence.per_token,
            "size_bytes": self.size_bytes,
            "engines": [verdict.to_json() for verdict in self.engines],
            "remarks": list(self.remarks),
        }


@gc_paused()
def plan(
    model: OpenedModel,
    pipeline: Pipeline,
    target: str,
    *,
    dtype: DType | Storage | None = None,
    seed: int = 0,
    allow_unmatched: bool = False,
    loaded: Sequence[str] = (),
    check: bool = True,
    statistics: Statistics | None = None,
    emit: str | None = None,
    named_bases: Sequence[str] = (),
) -> Plan:
    """Return the plan of a conversion.

    Only headers are read, and the vectors of norms where an error is predicted by them.

    Args:
      model: the source; its graph is rewritten in place.
      pipeline: the passes.
      target: the output family, ``gguf:ARCH`` for a file of llama.cpp, ``auto`` or ``gguf:auto``.
      dtype: the element type to write, or a GGUF file's blocks; None keeps that of the source.
      seed: of the random numbers.
      allow_unmatched: whether a pass that must match may match nothing.
      loaded: the files that passes of one's own are from, for the command on the card.
      check: whether each pass is held to its promise, on the model at small sizes.
      statistics: what was captured of the model's values; see `moecc.model.initialise`.
      emit: the language of a program to write beside the tensors, for the target ``st_moe``.
      named_bases: the models on the Hub that the source is made from, where it does not tell.

    Raises:
      UsageError: there is no such target, or no such type or program in it.
      InputError: a pass cannot be applied to this model, or the target cannot express the result.
      CheckError: a pass broke its promise.
    """
    if emit is not None and target not in (AUTO, FAMILY):
        raise UsageError(
            f"a program is written for {FAMILY}, not for {target}",
            hint=f"--to {FAMILY} --emit {emit}",
        )
    target = target if emit is None else FAMILY
    architecture = None
    if target.startswith(GGUF) or isinstance(dtype, Storage):
        from moecc.translate.gguf import architecture_of, check_type

        architecture = architecture_of(target)
        check_type(dtype, architecture)
    if architecture is None and target != AUTO:
        check_target(target)
    checkpoint = model.weights
    if (function := function_name(model.graph)) is not None:
        raise InputError(
            "these are the blocks of a program, not a whole model", where=model.name,
            expected="a checkpoint or a graph of a whole model", found=f"`{function}`",
            hint="moecc.jax.load or moecc.torch.load returns the parameters for your program",
        )  # fmt: skip
    branches = checkpoint.branches
    # The passes may drop further tensors, which is their purpose.
    remarks, notes, left_out = model.left_out(), model.remarks(), tuple(model.unread())
    proofs = PassProofs() if check else None
    read = reads_small(checkpoint)
    context = Context(
        seed=seed, allow_unmatched=allow_unmatched, remark=lambda r: remarks.append(str(r)),
        read=read if proofs is None else proofs.watched(read), models=tuple(branches),
        statistics=statistics,
    )  # fmt: skip
    done = run_pipeline(model.graph, pipeline, context=context,
                        instruments=[] if proofs is None else [proofs],
                        crash_folder=temporary_folder)  # fmt: skip
    contracts = NOT_CHECKED
    if proofs is not None:
        contracts = check_contracts(proofs.source, pipeline, context, proofs.proofs)
    unread = unread_models(model.graph, context.models)
    remarks += [f"{name}: no pass reads this model" for name in unread]
    if unroll(model.graph):
        remarks.append("repeated layers were unrolled: a checkpoint stores each layer")
    exported = None
    if target == AUTO:
        from moecc.jobs.targets import choose

        choice = choose(model.graph, wrapped_in(checkpoint))
        target, remarks = choice.target, [*remarks, choice.reason]
        exported = choice.export
    storage = dtype if isinstance(dtype, Storage) else None
    if emit is not None:
        export: Export | GgufExport = export_emitted(model.graph, emit)
    elif architecture is None:
        export = _put_back(exported or export_graph(model.graph, target), checkpoint)
    else:
        from moecc.translate.gguf import choose_architecture, export_gguf, quantising_remarks

        if architecture == AUTO:
            export = choose_architecture(model.graph)
            architecture, target = export.architecture, GGUF + export.architecture
            remarks.append(f"auto chose {target} for a GGUF file")
        else:
            export = export_gguf(model.graph, architecture)
        export, said = _with_tokenizer(export, checkpoint)
        said += quantising_remarks(export, storage)
        remarks += said
        notes += said
    if architecture is None:
        remarks += _misreadings(export)
    if target != FAMILY:
        remarks += _lost_losses(model.graph, target, export.config)
    if (wrapped := wrapped_in(checkpoint)) is not None and wrapped.others:
        wrapper, written = wrapped.base.config["model_type"], architecture or target
        note = f"the text model alone is written: a {wrapper} holds no {written}"
        if architecture is not None:
            note = "the text model alone is written: a GGUF file has nothing beside it"
        elif isinstance(export, WrappedExport):
            note = f"all of the {wrapper} but its text model is kept as it is"
        remarks.append(note)
        notes.append(note)
    proof = None
    preserves = done.preserves
    if export.up_to:
        preserves = weakest((preserves, Preserves("reassociation", up_to=export.up_to)))
    if proofs is not None and preserves.is_equality and storage is not None:
        remarks.append("the file is not proved: its weights are quantised, which rounds them")
    elif proofs is not None and preserves.is_equality:
        try:
            proof = prove_conversion(proofs.source, export, proofs.real)
            if isinstance(dtype, DType):
                floats = [e.type.dtype for _, e in export.tensors if e.type.dtype.is_float]
                proof = proof.before_rounding((old, dtype) for old in floats)
        except MemoryError:
            raise
        except Exception as error:  # The passes have been checked; the result is not proved.
            remarks.append(f"the prover failed, which is a bug in moecc: {describe_error(error)}")
    return Plan(
        model, model.graph, pipeline, preserves, target, export,
        None if isinstance(dtype, Storage) else dtype, seed, tuple(remarks), storage,
        (*(f"--experts {name}={name.upper()}" for name in context.models if name not in unread),
         *(["--allow-other-base"] if any(b.other_base() for b in branches.values()) else []),
         *(["--capture STATISTICS"] if statistics is not None else []),
         *(f"--load {Path(file).name}" for file in loaded),
         *(["--allow-unmatched"] if allow_unmatched else []),
         *([f"--emit {emit}"] if emit is not None else []),
         *(f"--base-model {name}" for name in named_bases)),
        contracts, proof, tuple(named_bases) or base_models(checkpoint),
        tuple(notes), left_out,
    )  # fmt: skip


def function_of_source(left_out: Sequence[object]) -> str:
    """Return what a result is proved to be, in words.

    Args:
      left_out: the tensors of the source that are not converted.
    """
    same = "the same function as the source"
    if not left_out:
        return same
    verb = "is" if len(left_out) == 1 else "are"
    return f"{same} without {amount(len(left_out), 'tensor')} that {verb} not converted"


def unread_models(graph: Graph, models: Iterable[str]) -> tuple[str, ...]:
    """Return the models beside the base that no weight is read from."""
    read = {branch_and_name(name)[0] for name in source_types(graph.weights.values())}
    return tuple(name for name in models if name not in read)


def _verdicts(export: Export | GgufExport) -> tuple[EngineVerdict, ...]:
    if isinstance(export, EmittedExport):
        return verdicts_on_program(export.program) if export.program.auto_map else ()
    wrapper = export.source.wrapper if isinstance(export, WrappedExport) else None
    return verdicts(export.config, wrapper)


def _misreadings(export: Export | GgufExport) -> list[str]:
    """Return a remark for each engine that computes another function without an error."""
    return [
        f"{v.release} would load this and compute something else, because it does not "
        f"read {' and '.join(v.reasons)}"
        for v in _verdicts(export)
        if v.silent
    ]


def router_losses(config: ModelConfig) -> dict[str, float]:
    """Return the losses of routers that transformers computes of a model, with their weights.

    It does so with ``output_router_logits=True`` alone.
    """
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient is None or not config.key("router_aux_loss_coef"):
        return {}
    # config.json has no weight of the z-loss of switch_transformers: transformers takes 0.001.
    z_loss = {"router_z": 0.001} if config.model_type == "switch_transformers" else {}
    return {"balance": coefficient, **z_loss}


def _lost_losses(graph: Graph, target: str, config: ModelConfig) -> list[str]:
    """Return a remark on losses of the graph, which no family but st_moe holds."""
    losses = [n.removeprefix(LOSS) for n in graph.outputs if n.startswith(LOSS) and n != AUXILIARY]
    if not losses:
        return []
    computed = {} if target.startswith(GGUF) else router_losses(config)
    terms = " and ".join(f"{factor:g} times {name}" for name, factor in computed.items())
    parts = (
        [f"with output_router_logits=True transformers adds its own, {terms}"] if computed else []
    )
    if lost := [name for name in losses if name not in computed]:
        parts.append(f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} left out")
    text = "; ".join(parts)
    return [f"{target} holds no losses of routers: {text}; --to {FAMILY} keeps them"]


def _put_back(export: Export, checkpoint: Checkpoint) -> Export:
    """Return the export inside the wrapper of its source, where that can hold its family."""
    wrapped = wrapped_in(checkpoint)
    if wrapped is None or wrapped.holder_of(export.config.model_type) is None:
        return export
    return WrappedExport(export.config, export.tensors, wrapped, up_to=export.up_to)


def _with_tokenizer(export: GgufExport, checkpoint: Checkpoint) -> tuple[GgufExport, list[str]]:
    """Return the export with the tokenizer of the source, and a remark if it has none."""
    from moecc.formats.gguf.reader import GgufFile
    from moecc.formats.gguf.tokenizer import NO_TOKENIZER, tokenizer_keys

    if not isinstance(checkpoint, GgufFile):
        keys, reason = tokenizer_keys(checkpoint, export.config.vocab_size)
    elif keys := checkpoint.stored_keys("tokenizer."):
        reason = None
    else:
        keys, reason = NO_TOKENIZER, "the source has none"
    remarks = [] if reason is None else [f"the file has no tokenizer: {reason}"]
    return replace(export, tokenizer=keys), remarks
