"""The blocks of a program, rewritten by a pipeline, and the report of what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from moecc.api.arguments import pipeline_of
from moecc.errors import InputError, Problem, UsageError
from moecc.ir.graph import Graph
from moecc.jobs.checks import Contracts, check_contracts
from moecc.rewrite.passes import Context, Pass
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import PipelineReport, run_pipeline
from moecc_backends.jaxpr.blocks import BlockMiss
from moecc_backends.jaxpr.graph import (
    BlockParts,
    cut_graph,
    graph_of_blocks,
)
from moecc_backends.jaxpr.survey import (
    Survey,
    VariableLabels,
    equations_of,
)

MAX_READ_ELEMENTS = 1 << 20
"""The largest parameter that a promise may depend on."""


@dataclass(frozen=True)
class BlockReport:
    """A block of a function.

    Attributes:
      loc: its location.
      line: where it is in the user's program.
      operations: what it computes, the names of operations in order.
      is_converted: whether the pipeline changed it.
    """

    loc: str
    line: str
    operations: str
    is_converted: bool

    def __str__(self) -> str:
        state = "converted" if self.is_converted else "left as it is"
        line = f" ({self.line})" if self.line else ""
        return f"{self.loc}: {state}, {self.operations}{line}"


@dataclass(frozen=True)
class FunctionReport:
    """What a conversion did: blocks, near misses with reasons, what stayed JAX.

    Attributes:
      function: the name of the function.
      pipeline: the passes.
      preserves: what they promise.
      blocks: the blocks, in order.
      misses: what is nearly a block, and why it is none.
      unused: the parameters that the function does not use.
      remarks: the notes of the passes.
      stayed: what stayed as it was.
      elements_before: the elements of the parameters before.
      elements_after: and afterwards.
      line: where the function is in the user's program.
    """

    function: str
    pipeline: str
    preserves: str
    blocks: tuple[BlockReport, ...] = ()
    misses: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    stayed: str = ""
    elements_before: int = 0
    elements_after: int = 0
    line: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> FunctionReport:
        """Return the report that `to_json` wrote."""
        blocks = tuple(BlockReport(**block) for block in document["blocks"])
        lists = {n: tuple(v) for n, v in document.items() if isinstance(v, list)}
        return cls(**{**document, **lists, "blocks": blocks})

    def __str__(self) -> str:
        count = sum(b.is_converted for b in self.blocks)
        lines = [
            f"{self.function}: {count} of {len(self.blocks)} blocks converted by {self.pipeline}",
            f"preserves {self.preserves}",
            f"parameters: {self.elements_before:,} → {self.elements_after:,}",
            self.stayed,
            *(f"  {block}" for block in self.blocks),
        ]
        if self.misses:
            lines += ["not converted:", *(f"  {miss}" for miss in self.misses)]
        if self.unused:
            by = f" by {self.line}" if self.line else ""
            lines.append(f"not used{by}: {', '.join(self.unused)}")
        if self.remarks:
            lines += ["remarks:", *(f"  {remark}" for remark in self.remarks)]
        return "\n".join(lines)


@dataclass(frozen=True)
class RewrittenBlocks:
    """The blocks of a program, rewritten.

    Attributes:
      name: the name of the program.
      graph: the blocks as one graph.
      pipeline: the passes.
      run: what they did.
      contracts: what they were found to keep, at reduced sizes.
      keys: the computation of each block before, by location.
    """

    name: str
    graph: Graph
    pipeline: Pipeline
    run: PipelineReport
    contracts: Contracts
    keys: Mapping[str, object]

    @cached_property
    def parts(self) -> BlockParts:
        """The graph in parts."""
        return cut_graph(self.graph, self.keys)

    @property
    def converted(self) -> frozenset[str]:
        """The locations of the blocks that the pipeline changed."""
        parts = self.parts.blocks
        return frozenset(loc for loc, part in parts.items() if part.key() != self.keys[loc])

    def report(
        self,
        survey: Survey,
        line: str,
        before: int,
        after: int,
        stayed: str = "",
    ) -> FunctionReport:
        """Return what was done.

        Args:
          survey: the blocks.
          line: where the program is.
          before: the elements of its parameters before.
          after: and afterwards.
          stayed: what stayed as it was; by default equations of JAX.
        """
        equations = len([*survey.scope.every_equation()]) - len(equations_of(survey.sites))
        return FunctionReport(
            function=self.name,
            line=line,
            pipeline=str(self.pipeline),
            preserves=str(self.run.preserves),
            blocks=tuple(
                BlockReport(i.loc, i.line, i.summary, i.loc in self.converted)
                for i in survey.instances().values()
            ),
            misses=tuple(map(str, survey.misses)),
            unused=survey.unused,
            remarks=tuple(dict.fromkeys(str(r) for each in self.run.runs for r in each.remarks)),
            stayed=stayed or f"stayed JAX: {equations:,} equations",
            elements_before=before,
            elements_after=after,
        )


def rewrite_blocks(
    survey: Survey,
    labels: VariableLabels,
    passes: Pipeline,
    context: Context,
    *,
    name: str,
    causal: bool,
    check: bool,
) -> RewrittenBlocks:
    """Run passes on the blocks of a program.

    Args:
      survey: the blocks.
      labels: the axes of tokens.
      passes: the passes.
      context: what they may use.
      name: the name of the program.
      causal: whether no token may depend on later ones.
      check: whether each pass is held to its promise, on the graph at reduced sizes.

    Raises:
      InputError: a pass does not fit.
      CheckError: a pass broke its promise.
    """
    graph = graph_of_blocks(survey, name=name, is_causal=causal, labels=labels)
    locations = [i.loc for i in survey.instances().values()]
    keys = {loc: part.key() for loc, part in cut_graph(graph, locations).blocks.items()}
    contracts = Contracts(unchecked="convert(…, check=True) does")
    if check:
        contracts = check_contracts(graph, passes, context)
    try:
        run = run_pipeline(graph, passes, context=context)
    except InputError as error:
        # Where a pass matches nothing, the near misses say why.
        raise InputError([*error.problems, *problems_of(survey.misses)]) from None
    return RewrittenBlocks(name, graph, passes, run, contracts, keys)


def problems_of(misses: Iterable[BlockMiss]) -> list[Problem]:
    """Return near misses as problems."""
    return [
        Problem(f"not a block: {miss.reason}", where=miss.line or ", ".join(miss.weights))
        for miss in misses
    ]


def parsed_pipeline(pipeline: object) -> Pipeline:
    """Return a pipeline. Raises UsageError where it is none."""
    parts = pipeline if isinstance(pipeline, (list, tuple)) and pipeline else (pipeline,)
    if all(isinstance(part, (str, Pass, Pipeline)) for part in parts):
        return pipeline_of(pipeline)
    raise UsageError(
        "no pipeline was given",
        expected='convert(function, params, batch, "upcycle{experts=8}")',
        found=type(pipeline).__name__,
    )
