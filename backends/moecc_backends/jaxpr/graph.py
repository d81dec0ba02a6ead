"""The blocks of a function as one graph, rewritten by a pipeline, and the graph in parts again.

Each block has an input and an output of the graph.  `graph_of_function` has regions of JAX between
the blocks instead, to look at.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax import Array

from moecc.api.arguments import pipeline_of
from moecc.errors import InputError, Problem, UnmatchedError, UsageError
from moecc.formats.manifest import FileRecord, Manifest, TensorRecord, dump, folder_records
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.structure import type_key
from moecc.jobs.checks import Contracts, PassProofs, check_contracts
from moecc.model.open import GRAPH
from moecc.rewrite.passes import NO_STATISTICS, Context, Pass, Preserves
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import PipelineReport, run_pipeline
from moecc.support.text import brief
from moecc.support.untyped import Json, JsonDict
from moecc.types import F32, Axis, DType, TensorType, dtype_from_numpy, is_name
from moecc_backends.jaxpr.blocks import OUTER, BlockMiss
from moecc_backends.jaxpr.scopes import Equation, JaxprScope, TracedFunction, Variable
from moecc_backends.jaxpr.survey import BlockSite, Survey, VariableLabels, equations_of
from moecc_backends.jaxpr.views import path_name, unique
from moecc_backends.xla.lower.function import finalize_output, lower_values
from moecc_backends.xla.lower.scan import computation_key

TOKEN_AXES = {1: ("token",), 2: ("batch", "seq")}
"""What the axes of tokens are called, by their number."""


def input_name(loc: str) -> str:
    """Return the name of the input of the block at `loc`."""
    return f"x.{loc}"


def output_name(loc: str) -> str:
    """Return the name of the output of the block at `loc`."""
    return f"y.{loc}"


def graph_of_blocks(survey: Survey, *, name: str, is_causal: bool, labels: VariableLabels) -> Graph:
    """Return the blocks as one graph, each with an input and an output.

    Parameters are named after leaves, and their weights are read from them.

    Args:
      survey: the blocks.
      name: the name of the function.
      is_causal: whether no token may depend on later ones.
      labels: the axes of tokens.
    """
    graph = Graph(GRAPH, {"function": name})
    blocks = _Blocks(survey, labels)
    inputs = {loc: graph.input(input_name(loc), type) for loc, type in blocks.types.items()}
    for loc, x in inputs.items():
        graph.set_output(output_name(loc), blocks.emit(graph, loc, x))
    return _finished(graph, is_causal)


def graph_of_function(
    traced: TracedFunction, survey: Survey, *, name: str, is_causal: bool, labels: VariableLabels
) -> Graph:
    """Return a function as a graph: its blocks as operations, all else as regions of JAX.

    Args:
      traced: the function.
      survey: its blocks.
      name: the name of the function.
      is_causal: whether no token may depend on later ones.
      labels: the axes of tokens.
    """
    graph = Graph(GRAPH, {"function": name})
    walk = _RegionWalk(survey)
    arguments = {v: n for n, v in traced.arguments.items()}
    results = walk.run(traced.scope, arguments)
    blocks = _Blocks(survey, labels, order=list(walk.regions))
    types = {n: _type(v, labels) for v, n in arguments.items()}
    values = {n: graph.input(n, type) for n, type in types.items() if type is not None}

    def add(region: JaxRegion, name: str, type: TensorType, loc: str = "") -> Value:
        operands = [value for source, value in values.items() if source in region.takes]
        if not operands:
            return graph.input(name, type)
        attrs = {
            "into": tuple((a.name, a.size) for a in type.axes),
            "dtype": type.dtype.name,
            "equations": region.equations,
            "lines": region.lines,
        }
        return graph.append("jax", operands, attrs, names=(name,), loc=loc).result

    for loc, region in walk.regions.items():
        x = add(region, input_name(loc), blocks.types[loc], loc)
        values[loc] = blocks.emit(graph, loc, x)
    numbers = range(traced.treedef.num_leaves)
    tree = jax.tree_util.tree_unflatten(traced.treedef, numbers)
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    names = unique(f"result.{path_name(path)}" if path else "result" for path in paths)
    for name, variable, region in zip(names, traced.scope.outputs, results, strict=True):
        result_type = _type(variable, labels)
        if region.takes & walk.regions.keys() and result_type is not None:
            graph.set_output(name, add(region, name, result_type))
    return _finished(graph, is_causal)


def _finished(graph: Graph, is_causal: bool) -> Graph:
    if is_causal:
        graph.attrs["causal_inputs"] = list(graph.inputs)
    return graph


def _type(variable: Variable, labels: VariableLabels) -> TensorType | None:
    """Return the type of a value that is of no block; None where the IR has no such elements."""
    dtype = dtype_from_numpy(variable.aval.dtype)
    if dtype is None:
        return None
    dims = labels.get(variable, ((),) * len(variable.shape))
    joined = ["_".join(name for name, _ in label) for label in dims]
    names = unique(n if is_name(n) else f"axis{i}" for i, n in enumerate(joined))
    return TensorType(dtype, tuple(map(Axis, names, variable.shape)))


class _Blocks:
    """The blocks of a survey by location, and the types of their inputs."""

    def __init__(
        self, survey: Survey, labels: VariableLabels, order: Sequence[str] | None = None
    ) -> None:
        sites = survey.first_sites
        blocks = {i.loc: (i, sites[key][0]) for key, i in survey.instances().items()}
        self._blocks = {loc: blocks[loc] for loc in order or blocks}
        self._variables: dict[tuple[str, int], str] = {}
        self.types = {
            loc: self._input_type(site, labels) for loc, (_, site) in self._blocks.items()
        }

    def _input_type(self, site: BlockSite, labels: VariableLabels) -> TensorType:
        """Return the type of a block's input: axes of tokens, of variable sizes, and embed."""
        x, outer = site.slice.x, site.slice.outer
        sizes = [n for i, n in enumerate(x.shape) if i != outer]
        names = TOKEN_AXES.get(len(sizes)) or tuple(f"axis{i}" for i in range(len(sizes)))
        if x in labels:
            tokens = [label for i, label in enumerate(labels[x]) if i != outer]
            joined = ["_".join(name for name, _ in label) for label in tokens]
            names = tuple(unique(n or f"axis{i}" for i, n in enumerate(joined)))
        for axis in zip(names, sizes, strict=True):
            # Another size of an axis has another variable.
            letter = axis[0][0].upper()
            count = len([v for v in self._variables.values() if v[0] == letter])
            self._variables.setdefault(axis, f"{letter}{count + 1}" if count else letter)
        axes = [Axis(n, self._variables[n, size]) for n, size in zip(names, sizes, strict=True)]
        return TensorType(F32, (*axes, Axis(OUTER, x.shape[outer])))

    def emit(self, graph: Graph, loc: str, x: Value) -> Value:
        """Add the operations of a block to a graph; return its output."""
        instance, site = self._blocks[loc]
        builder = Builder(graph, loc=loc)
        values = {"x": x}
        for i, (name, weight) in enumerate(zip(instance.params, instance.weights, strict=True)):
            if name not in graph.params:
                graph.param(name, weight.type.with_dtype(F32), weight, loc=loc)
            values[f"p{i}"] = graph.params[name]
        for i, operation in enumerate(site.block.operations):
            operands = (values[o] for o in operation.operands)
            attrs: dict[str, Any] = dict(operation.attrs)
            x = values[f"v{i}"] = builder.node(operation.name, *operands, **attrs).result
        return x


# What lies between blocks: where each takes its input from, and how much of the program is there.


@dataclass(frozen=True)
class JaxRegion:
    """A part of a function before a block, or before a result.

    Attributes:
      takes: the arguments and the blocks that it depends on, not through other blocks.
      equations: how many equations are between it and the block before.
      lines: the first and the last of them in the user's program.
    """

    takes: frozenset[str]
    equations: int
    lines: str


class _RegionWalk:
    """Follows a function with the names of what its values depend on: its arguments, and blocks.

    Loops that pick the weights of blocks are followed iteration by iteration, as the blocks are.
    """

    def __init__(self, survey: Survey) -> None:
        self.regions: dict[str, JaxRegion] = {}
        self._instances = survey.instances()
        self._ends = {site.slice.equations[-1]: site for site in survey.sites}
        self._inside = equations_of(survey.sites)
        self._holders = {e for site in survey.sites for e in site.slice.scope.owners}
        self._picking = {loop for site in survey.sites for loop in site.loops}
        self._passed: list[Equation] = []

    def run(self, scope: JaxprScope, arguments: Mapping[Variable, str]) -> list[JaxRegion]:
        """Find the regions before blocks, in `regions`; return those before the results."""
        inputs = [frozenset((arguments[v],) if v in arguments else ()) for v in scope.inputs]
        takes = self._scope(scope, inputs, {})
        last = self._region(frozenset())
        return [JaxRegion(sources, last.equations, last.lines) for sources in takes]

    def _region(self, takes: frozenset[str]) -> JaxRegion:
        """Return the region since the last one."""
        lines = [line for equation in self._passed if (line := equation.line)]
        ends = dict.fromkeys((lines[0], lines[-1])) if lines else {}
        region = JaxRegion(takes, len(self._passed), " to ".join(ends))
        self._passed = []
        return region

    def _scope(
        self, scope: JaxprScope, inputs: Sequence[frozenset[str]], iteration: Mapping[Hashable, int]
    ) -> list[frozenset[str]]:
        sources = dict(zip(scope.inputs, inputs, strict=True))
        for equation in scope.equations:
            if equation in self._ends:
                site = self._ends[equation]
                takes = sources.get(site.slice.x, frozenset())
                number = 0
                for loop, length in zip(site.loops, site.lengths, strict=True):
                    number = number * length + iteration[loop]
                loc = self._instances[site.keys[number]].loc
                # A block that runs again takes more than what its first run shows.
                if loc not in self.regions:
                    self.regions[loc] = self._region(takes)
                sources[site.slice.output] = frozenset((loc,))
            elif equation not in self._inside:
                operands = [sources.get(v, frozenset()) for v in equation.inputs]
                results = self._equation(equation, operands, iteration)
                sources.update(zip(equation.outputs, results, strict=True))
        return [sources.get(v, frozenset()) for v in scope.outputs]

    def _equation(
        self, equation: Equation, operands: list[frozenset[str]], iteration: Mapping[Hashable, int]
    ) -> Sequence[frozenset[str]]:
        if equation not in self._holders:
            self._passed.append(equation)
            return [frozenset().union(*operands)] * len(equation.outputs)
        bodies = equation.body_operands()
        if equation.name == "cond":
            branches = [
                self._scope(body, [operands[at] for at, _ in roles], iteration)
                for body, roles in zip(equation.bodies, bodies, strict=True)
            ]
            return [operands[0].union(*each) for each in zip(*branches, strict=True)]
        body, roles = equation.bodies[-1], bodies[-1]
        if equation.name != "scan":
            return self._scope(body, [operands[at] for at, _ in roles], iteration)
        carried = [at for at, role in roles if role == "carried"]
        stacked = [frozenset[str]() for _ in equation.outputs[len(carried) :]]
        turns = range(int(equation.params["length"]) if equation in self._picking else 1)
        for turn in reversed(turns) if equation.params["reverse"] else turns:
            results = self._scope(body, operands, {**iteration, equation: turn})
            for at, sources in zip(carried, results, strict=False):
                operands[at] = sources
            stacked = [a | b for a, b in zip(stacked, results[len(carried) :], strict=True)]
        return [*(operands[at] for at in carried), *stacked]


# A graph of all blocks cut into parts: what depends on the input of one block alone.  What depends
# on several blocks, the losses of all of them, is an epilogue on values that parts return besides
# their output.


@dataclass(frozen=True)
class BlockPart:
    """What a graph computes of one block.

    Attributes:
      x: the block's input.
      y: its output.
      nodes: what the output needs, in order.
      side_nodes: what the other values need as well, in order.
      side: values that are outputs of the graph, or that the epilogue reads.
    """

    x: Value
    y: Value
    nodes: tuple[Node, ...]
    side_nodes: tuple[Node, ...]
    side: tuple[Value, ...]

    @property
    def params(self) -> tuple[Value, ...]:
        """The parameters, in the order of use."""
        return tuple(v for v in self._sources if v.is_param)

    @property
    def extra(self) -> tuple[Value, ...]:
        """The other inputs of the graph that it takes: a random key, a padding mask."""
        return tuple(v for v in self._sources if not v.is_param and v is not self.x)

    @property
    def _sources(self) -> dict[Value, None]:
        used = (v for n in self.side_nodes for v in n.operands)
        return dict.fromkeys(v for v in used if v.node is None)

    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for parts with the same computation: one lowering serves them.

        They have the same operations on corresponding operands.
        """
        operands = list(dict.fromkeys((self.x, *self._sources)))
        numbers = {v: number for number, v in enumerate(operands)}
        types = (type_key(v.type, numbers) for v in operands)
        return (*types, computation_key(operands, self.side_nodes, (self.y, *self.side)))


@dataclass(frozen=True)
class BlockParts:
    """A graph in parts.

    Attributes:
      graph: the graph.
      blocks: the part of each block, by its location.
      epilogue: what depends on several blocks, in order.
    """

    graph: Graph
    blocks: Mapping[str, BlockPart]
    epilogue: tuple[Node, ...]

    def finish(self, values: Mapping[Value, Array], dtype: DType) -> dict[str, Array]:
        """Return the outputs besides those of the blocks from the values that parts returned."""
        results = lower_values(list(self.epilogue), values, dtype)
        of_blocks = set(map(output_name, self.blocks))
        return {
            name: finalize_output(results[v], v)
            for name, v in self.graph.outputs.items()
            if name not in of_blocks and v in results
        }


def cut_graph(graph: Graph, locations: Iterable[str]) -> BlockParts:
    """Return the parts of a graph that has an input and an output for each location."""
    depends: dict[Value, frozenset[str]] = {}
    values: dict[str, list[Value]] = {}
    for loc in locations:
        values[loc] = []
        depends[graph.inputs[input_name(loc)]] = frozenset((loc,))
    order = {node: i for i, node in enumerate(graph)}
    late: set[Node] = set()
    for node in graph:
        locs = frozenset[str]().union(*(depends.get(v, ()) for v in node.operands))
        depends.update(dict.fromkeys(node.results, locs))
        if len(locs) == 1:
            values[next(iter(locs))] += node.results
        elif locs:
            late.add(node)
    # Constants are computed again wherever they are used.
    for node in reversed(order):
        is_constant = not depends[node.results[0]]
        if is_constant and any(u in late for v in node.results for u in v.users):
            late.add(node)

    def needed(results: Iterable[Value]) -> tuple[Node, ...]:
        """Return the nodes that `results` are computed by, in order."""
        nodes: set[Node] = set()
        stack = [v.node for v in results]
        while stack:
            node = stack.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                stack += [v.node for v in node.operands]
                # What sets the extents of its types is needed, too.
                extents = (e for v in (*node.operands, *node.results) for e in v.type.extents)
                stack += [setter_of(e).node for e in extents]
        return tuple(sorted(nodes, key=order.__getitem__))

    outputs = {n: v for n, v in graph.outputs.items() if n not in set(map(output_name, values))}
    wanted = set(outputs.values())
    blocks = {}
    for loc, computed in values.items():
        y = graph.outputs[output_name(loc)]
        side = tuple(v for v in computed if v in wanted or any(u in late for u in v.users))
        nodes = needed((y,)), needed((y, *side))
        blocks[loc] = BlockPart(graph.inputs[input_name(loc)], y, *nodes, side)
    return BlockParts(graph, blocks, tuple(sorted(late, key=order.__getitem__)))


# The blocks of a program, rewritten by a pipeline, and the report of what became of them.


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
      remarks: the notes of the passes, and the warnings of their options.
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

    @property
    def summary(self) -> str:
        """How many blocks were converted, and by what."""
        count = sum(b.is_converted for b in self.blocks)
        return f"{self.function}: {count} of {len(self.blocks)} blocks converted by {self.pipeline}"

    def __str__(self) -> str:
        lines = [
            self.summary,
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


@dataclass(frozen=True, repr=False)
class BlocksConversion:
    """How the blocks of a program were converted.

    Attributes:
      graph: all blocks as one graph, rewritten.
      report: what was done.
      pipeline: the passes.
      seed: of the random numbers.
      preserves: what the passes promise.
      contracts: what they were found to keep, at reduced sizes.
    """

    graph: Graph
    report: FunctionReport
    pipeline: Pipeline
    seed: int
    preserves: Preserves
    contracts: Contracts

    def __repr__(self) -> str:
        return brief(f"moecc.{type(self).__name__}", [("", self.report.summary)])

    def facts(self) -> JsonDict:
        """Return all but graph and contracts as JSON values."""
        return {
            "pipeline": self.pipeline.in_full(),
            "seed": self.seed,
            "preserves": asdict(self.preserves),
            "report": self.report.to_json(),
        }

    @staticmethod
    def stated(facts: Json) -> JsonDict:
        """Return the fields but the graph of a conversion whose `facts` a folder states."""
        return {
            "report": FunctionReport.from_json(facts["report"]),
            "pipeline": Pipeline.parse(facts["pipeline"]),
            "seed": int(facts["seed"]),
            "preserves": Preserves(**facts["preserves"]),
            "contracts": Contracts(unchecked="read from a folder"),
        }

    def manifest(
        self,
        folder: Path,
        kind: str,
        tensors: Mapping[str, TensorRecord],
        source: str,
        *,
        source_files: Mapping[str, FileRecord] = MappingProxyType({}),
        notes: tuple[str, ...] = (),
        is_flat: bool = False,
    ) -> bytes:
        """Return the content of the manifest of a folder.

        Args:
          folder: the folder.
          kind: its ``model_type`` to moecc.
          tensors: the tensors that were written.
          source: the name of the program, or of its folder.
          source_files: the files of the source, by name.
          notes: remarks on the tensors.
          is_flat: whether folders in it are another's.
        """
        weights, files = folder_records(folder, tensors, is_flat=is_flat)
        document = Manifest(
            pipeline=self.pipeline.in_full(),
            seed=self.seed,
            source=source,
            source_files=source_files,
            family_from=kind,
            family_to=kind,
            dtype="as stored",
            preserves=str(self.preserves),
            notes=notes,
            weights=weights,
            files=files,
            tensors=tensors,
        )
        return dump(document)


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
        remarks = (str(remark) for run in self.run.runs for remark in run.remarks)
        return FunctionReport(
            function=self.name,
            line=line,
            pipeline=str(self.pipeline),
            preserves=str(self.run.preserves),
            blocks=tuple(
                BlockReport(i.loc, i.line, i.summary, i.loc in self.converted)
                for i in survey.instances().values()
            ),
            misses=tuple(dict.fromkeys(map(str, survey.misses))),
            unused=survey.unused,
            remarks=tuple(dict.fromkeys((*self.pipeline.remarks(), *remarks))),
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
      check: whether each pass is proved, or else held to its promise at reduced sizes.

    Raises:
      InputError: a pass does not fit.
      CheckError: a pass broke its promise.
    """
    graph = graph_of_blocks(survey, name=name, is_causal=causal, labels=labels)
    locations = [i.loc for i in survey.instances().values()]
    keys = {loc: part.key() for loc, part in cut_graph(graph, locations).blocks.items()}
    contracts = Contracts(unchecked="convert(…, check=True) does")
    proofs = PassProofs() if check else None
    if proofs is not None:
        context = replace(context, read=proofs.watched(context.read))
    try:
        run = run_pipeline(graph, passes, context=context, instruments=[proofs] if proofs else [])
    except UnmatchedError as error:
        raise InputError([*error.problems, *problems_of(survey.misses)]) from None
    except InputError as error:
        raise InputError(_NO_CAPTURE if p == NO_STATISTICS else p for p in error.problems) from None
    if proofs is not None:
        contracts = check_contracts(proofs.source, passes, context, proofs.proofs)
    return RewrittenBlocks(name, graph, passes, run, contracts, keys)


_NO_CAPTURE = Problem(
    "this needs statistics of the model, which moecc captures of its own families alone",
    hint="options that need none: router-init=logit-std, split=random",
)


def problems_of(misses: Iterable[BlockMiss]) -> list[Problem]:
    """Return near misses as problems."""
    return [
        Problem(f"not a block: {miss.reason}", where=": ".join(filter(None, (miss.line, weights))))
        for miss in dict.fromkeys(misses)
        for weights in [", ".join(miss.weights)]
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
