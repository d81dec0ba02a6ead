"""The proof of a conversion: the graph of the source against the graph of the written result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import CheckError, InputError
from moecc.formats.source import Checkpoint, TensorInfo
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.prove.log import digest, write_proof
from moecc.prove.prover import Prover, Verdict
from moecc.support.lazy import np
from moecc.translate.export import Export
from moecc.translate.importing import import_checkpoint
from moecc.types import Array, DType, is_lossless
from moecc.version import __version__
from moecc.weights.arithmetic import Cast
from moecc.weights.expr import Expr, Source, transform
from moecc.weights.movement import Rename

if TYPE_CHECKING:
    from moecc.translate.gguf import GgufExport


@dataclass(frozen=True)
class ConversionProof:
    """The verdict on a conversion, as its receipt states it.

    Attributes:
      verdict: of the source against the result.
      source: the SHA-256 of the text of the source's graph.
      result: the SHA-256 of the result's graph, over the expressions written to its tensors.
      graphs: both graphs.
      unmatched: the tensors of the result of which the source has none with the same values.
    """

    verdict: Verdict
    source: str
    result: str
    graphs: tuple[Graph, Graph]
    unmatched: tuple[str, ...] = ()

    def assuming(self, assumption: str) -> ConversionProof:
        """Return the same proof with a further assumption."""
        verdict = replace(self.verdict, assumptions=(*self.verdict.assumptions, assumption))
        return replace(self, verdict=verdict)

    def before_rounding(self, pairs: Iterable[tuple[DType, DType]]) -> ConversionProof:
        """Return the proof as one of weights before they are rounded.

        Args:
          pairs: the element type of each tensor as it is computed, and as it is written.
        """
        types = {new.name for old, new in pairs if not is_lossless(old, new)}
        if not types:
            return self
        return self.assuming(
            f"weights are as before they were rounded to {', '.join(sorted(types))}"
        )

    def write(self, file: Path) -> tuple[Path, ...]:
        """Write the log of the proof and the texts of both graphs, and return their paths.

        The digests in the log are those of the receipt: the texts name no checkpoint.

        Raises:
          CheckError: there is no proof, or ``moecc-check`` does not accept it.
          InputError: the proof, of a step of generation with repeated layers, has no log.
        """
        if self.verdict.status != "proved":
            hint = "without --proof the result is written unproved; --verify compares the logits"
            raise CheckError("no proof to write", where=self.verdict.node,
                             expected=self.verdict.terms[0], found=self.verdict.terms[1],
                             hint=hint)  # fmt: skip
        if not self.verdict.log:
            raise InputError(
                "a proof of a step of generation has no log where layers are repeated",
                hint="prove graphs without roll-layers, or leave out --proof",
            )
        log = {**self.verdict.log, "before": self.source, "after": self.result}
        before, after = map(_without_checkpoint, self.graphs)
        return write_proof(log, before, after, file)

    def to_json(self) -> dict[str, object]:
        """Return the entry ``proof`` of a receipt."""
        return {
            "verdict": self.verdict.status,
            "version": __version__,
            "source": self.source,
            "result": self.result,
            "lemmas": dict(self.verdict.lemmas),
            "assumptions": list(self.verdict.assumptions),
        }


def prove_conversion(source: Graph, export: Export | GgufExport, prover: Prover) -> ConversionProof:
    """Prove that a checkpoint, read back, is the function of the graph it was made from.

    Args:
      source: the graph before the passes.
      export: the checkpoint to write, its tensors as expressions over those of the source.
      prover: of real arithmetic, which may have evaluated the source.
    """
    proof = compared(source, written_graph(export), prover, refute=False)
    if isinstance(export, Export):
        return proof
    return proof.assuming("constants are those of the source, which a GGUF file rounds to f32")


def compared(
    source: Graph, result: Graph, prover: Prover, *, refute: bool = True
) -> ConversionProof:
    """Prove that two graphs are the same function in the outputs that both have.

    Args:
      source: a graph.
      result: the graph to compare with it.
      prover: of real arithmetic, or of equal bits.
      refute: whether a counterexample is searched where there is no proof.
    """
    outputs = source.outputs.keys() & result.outputs.keys()
    verdict = prover.prove(source, result, outputs=outputs, refute=refute)
    before, after = (digest(_without_checkpoint(graph)) for graph in (source, result))
    proof = ConversionProof(verdict, before, after, (source, result))
    if source.outputs.keys() == result.outputs.keys():
        return proof
    return proof.assuming(f"outputs of both are compared alone: {', '.join(sorted(outputs))}")


def _without_checkpoint(graph: Graph) -> Graph:
    """Return a graph that names no checkpoint, whose place is no part of its function."""
    plain = clone(graph)
    plain.attrs = {n: v for n, v in plain.attrs.items() if n != "checkpoint"}
    return plain


def written_graph(export: Export | GgufExport) -> Graph:
    """Return the graph that a checkpoint is read back as, over the tensors of its source.

    The config is parsed from its JSON and the names are those on disk, as for any checkpoint; of a
    GGUF file the tensors are read back, and the keys of its header are taken to be the config.
    """
    if isinstance(export, Export):
        tensors = dict(export.tensors)
    else:
        from moecc.translate.gguf import as_read

        tensors = as_read(export)
    return over_source(
        import_checkpoint(_UnwrittenCheckpoint(export.config_json, tensors)), tensors
    )


def over_source(graph: Graph, tensors: Mapping[str, Expr]) -> Graph:
    """Return `graph` with each source tensor replaced by the expression written to it."""
    graph = clone(graph)

    def written_to(part: Expr) -> Expr:
        return _as(tensors[part.name], part) if isinstance(part, Source) else part

    for parameter in graph.params.values():
        if parameter.weight is not None:
            parameter.weight = transform(parameter.weight, written_to)
    return graph


def _as(written: Expr, source: Source) -> Expr:
    """Return the expression written to a tensor, with the axis names and the type of `source`."""
    # Two steps: a new name may be an old name of another axis.
    between = [f"axis{number}_" for number in range(len(source.type.names))]
    for names in (between, source.type.names):
        for old, new in zip(written.type.names, names, strict=True):
            written = Rename(written, old, new)
    return written if written.type == source.type else Cast(written, source.type.dtype)


class _UnwrittenCheckpoint(Checkpoint):
    """A checkpoint without data: names, types and shapes alone."""

    format = "safetensors"

    def __init__(self, config: Mapping[str, object], tensors: Mapping[str, Expr]) -> None:
        self.path, self.config = Path("the result"), dict(config)
        self.expressions = tensors
        self.tensors = {
            name: TensorInfo(name, expr.type.dtype, expr.type.shape, 0, self.path, 0)
            for name, expr in tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows that are equal where the expressions are.

        A reader compares tensors that must be copies of one another, and nothing else.
        """
        info = self.tensors[name]
        rows = len(range(info.shape[0])[start:stop])
        return np.full((rows,), hash(self.expressions[name]) % (1 << 31))

    def files(self) -> list[Path]:
        return []
