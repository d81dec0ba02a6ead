"""Convert a function: find its blocks, rewrite them by a pipeline, make the new parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import jax

from moecc.api.arguments import flag, pipeline_of, whole
from moecc.errors import InputError, Problem, UsageError
from moecc.ir.graph import Graph
from moecc.jobs.checks import Contracts, check_contracts
from moecc.rewrite.passes import Context, Pass, ReadWeight
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.types import Array
from moecc.weights.expr import Expr
from moecc_backends.jaxpr.blocks import BlockMiss
from moecc_backends.jaxpr.conversion import BlockReport, FunctionConversion, FunctionReport
from moecc_backends.jaxpr.graph import (
    BlockParts,
    VariableLabels,
    cut_graph,
    graph_of_blocks,
    graph_of_function,
)
from moecc_backends.jaxpr.jaxprs import AnyArray, function_line, shape_of
from moecc_backends.jaxpr.labels import refuse_mixing, token_labels
from moecc_backends.jaxpr.run import BESIDE, TREE, ConversionState
from moecc_backends.jaxpr.scopes import (
    ParamTree,
    TracedFunction,
    leaves_of,
    trace_function,
)
from moecc_backends.jaxpr.storage import LeafEvaluator, new_array, plan_storage
from moecc_backends.jaxpr.survey import (
    BlockInstance,
    Survey,
    equations_of,
    leaf_uses,
    refuse_shared_weights,
    survey_blocks,
)
from moecc_backends.xla.trace.typed_jax import Function, PyTree

MAX_READ_ELEMENTS = 1 << 20
"""The largest parameter that a promise may depend on."""


def convert(
    function: Function,
    params: PyTree,
    *args: PyTree,
    pipeline: str | Pass | Pipeline | Sequence[str | Pass] | None = None,
    tokens: Mapping[str, Sequence[str]] | None = None,
    causal: bool = True,
    seed: int = 0,
    allow_unmatched: bool = False,
    check: bool = False,
    **kwargs: PyTree,
) -> FunctionConversion:
    """Upcycle a function of parameters: ``convert(loss, params, batch, "upcycle{experts=8}")``.

    Args:
      function: takes the parameters first, ``function(params, *args, **kwargs)``.
      params: a tree of arrays or shapes.
      args: its other arguments, arrays or shapes; the last may be the pipeline.
      pipeline: the passes, as text, a pass, several of either, or parsed.
      tokens: the names of the axes of arguments that number tokens, ``{"batch.tokens": ("batch",
        "seq")}``: with them, a product that sums over tokens is no block.
      causal: whether no token may depend on later ones; routings that look ahead are rejected.
      seed: of the random numbers.
      allow_unmatched: whether a pass that must match may match nothing.
      check: whether each pass is held to its promise, on the graph at reduced sizes.
      kwargs: further arguments of the function.

    Raises:
      UsageError: the pipeline is none, or an option has another type.
      InputError: the function cannot be traced, has no such block, or a pass does not fit it.
      CheckError: a pass broke its promise.
    """
    if not callable(function):
        raise UsageError("not a function", expected="a function", found=type(function).__name__)
    if pipeline is None:
        *args_before, pipeline = args or (None,)
        args = tuple(args_before)
    passes, seed = _parsed(pipeline), whole("seed", seed)
    for name, value in (("causal", causal), ("allow_unmatched", allow_unmatched), ("check", check)):
        flag(name, value)
    tree, arrays = ParamTree.of(params)
    _, survey, labels = _survey_function(function, tree, arrays, (args, kwargs), tokens or {})
    graph = graph_of_blocks(survey, name=_name(function), is_causal=causal, labels=labels)
    locations = [i.loc for i in survey.instances().values()]
    keys = {loc: part.key() for loc, part in cut_graph(graph, locations).blocks.items()}
    context = Context(seed=seed, allow_unmatched=allow_unmatched, read=_reader(arrays))
    contracts = Contracts(unchecked="convert(…, check=True) does")
    if check:
        contracts = check_contracts(graph, passes, context)
    try:
        run = run_pipeline(graph, passes, context=context)
    except InputError as error:
        # Where a pass matches nothing, the near misses say why.
        raise InputError([*error.problems, *_problems(survey.misses)]) from None
    state = _new_state(tree, arrays, survey, graph, keys)
    new = {(s.key, s.in_tree): new_array(s, state.leaves, arrays) for s in state.storage.arrays}
    in_place = {n: a for n, a in arrays.items() if n not in state.storage.gone}
    in_place |= {key: array for (key, in_tree), array in new.items() if in_tree}
    new_params = {
        TREE: tree.unflatten(in_place),
        BESIDE: {key: array for (key, in_tree), array in new.items() if not in_tree},
    }
    report = FunctionReport(
        function=_name(function),
        line=function_line(function),
        pipeline=str(passes),
        preserves=str(run.preserves),
        blocks=tuple(
            BlockReport(i.loc, i.line, i.summary, i.loc in state.converted)
            for i in state.instances.values()
        ),
        misses=tuple(map(str, survey.misses)),
        unused=survey.unused,
        remarks=tuple(dict.fromkeys(str(r) for each in run.runs for r in each.remarks)),
        equations=len([*survey.scope.every_equation()]) - len(equations_of(survey.sites)),
        elements_before=_count_elements(arrays),
        elements_after=_count_elements(new_params),
    )
    return FunctionConversion(
        new_params, graph, report, run.preserves, passes, seed, contracts, state
    )


def graph(
    function: Function,
    params: PyTree,
    *args: PyTree,
    tokens: Mapping[str, Sequence[str]] | None = None,
    causal: bool = True,
    **kwargs: PyTree,
) -> Graph:
    """Return a function as a graph: its blocks, and all else as regions of JAX.

    It is for looking at, and for passes and plans of the blocks: only the function itself can run.
    Arguments are those of `convert`.

    Raises:
      InputError: the function cannot be traced, or has no such block.
    """
    tree, arrays = ParamTree.of(params)
    traced, survey, labels = _survey_function(function, tree, arrays, (args, kwargs), tokens or {})
    return graph_of_function(traced, survey, name=_name(function), is_causal=causal, labels=labels)


def _name(function: Function) -> str:
    return str(getattr(function, "__name__", "function"))


def _survey_function(
    function: Function,
    tree: ParamTree,
    arrays: Mapping[str, AnyArray],
    arguments: tuple[Sequence[AnyArray], Mapping[str, AnyArray]],
    tokens: Mapping[str, Sequence[str]],
) -> tuple[TracedFunction, Survey, VariableLabels]:
    """Return a function traced, its blocks, and the labels of its values.

    Raises:
      InputError: the function cannot be traced, or has no such block.
    """
    shapes = {n: shape_of(a.shape, a.dtype) for n, a in arrays.items()}
    traced = trace_function(function, tree, shapes, leaves_of(arrays), arguments)
    survey, line = survey_blocks(traced.scope), function_line(function)
    labels = token_labels(traced, tokens, line) if tokens else {}
    refuse_mixing(survey, labels)
    refuse_shared_weights(survey)
    if survey.sites:
        return traced, survey, labels
    words = "the function has no feed-forward block of its parameters"
    if not survey.leaves:
        words = "the parameters have none of the element types that a block can have"
    elif len(survey.unused) == len(survey.leaves):
        words = "the function uses none of its parameters"
    problem = Problem(
        words,
        where=line,
        expected="a product with a weight, functions of elements, a product with a weight",
        hint="the parameters are the first argument; weights that are closed over are constants",
    )
    raise InputError([problem, *_problems(survey.misses)])


def _problems(misses: Iterable[BlockMiss]) -> list[Problem]:
    return [
        Problem(f"not a block: {miss.reason}", where=miss.line or ", ".join(miss.weights))
        for miss in misses
    ]


def _parsed(pipeline: object) -> Pipeline:
    parts = pipeline if isinstance(pipeline, (list, tuple)) and pipeline else (pipeline,)
    if all(isinstance(part, (str, Pass, Pipeline)) for part in parts):
        return pipeline_of(pipeline)
    raise UsageError(
        "no pipeline was given",
        expected='convert(function, params, batch, "upcycle{experts=8}")',
        found=type(pipeline).__name__,
    )


def _reader(arrays: Mapping[str, AnyArray]) -> ReadWeight:
    """Return what reads small parameters on which promises depend."""
    are_shapes = any(isinstance(a, jax.ShapeDtypeStruct) for a in arrays.values())

    def read(weight: Expr) -> Array | None:
        if are_shapes or prod(weight.type.shape) > MAX_READ_ELEMENTS:
            return None
        return LeafEvaluator(arrays).evaluate(weight)

    return read


def _new_state(
    tree: ParamTree,
    arrays: Mapping[str, AnyArray],
    survey: Survey,
    graph: Graph,
    keys: Mapping[str, object],
) -> ConversionState:
    """Return which blocks a pipeline converted, and where their parameters lie.

    Args:
      tree: the dense parameters.
      arrays: their arrays.
      survey: the blocks.
      graph: the converted graph.
      keys: the computation of each block before, by location.

    Raises:
      InputError: the blocks of a loop differ now.
    """
    parts, instances = cut_graph(graph, keys), survey.instances()
    converted = frozenset(loc for loc, part in parts.blocks.items() if part.key() != keys[loc])
    groups = [(site, [instances[key] for key in site.keys]) for site in survey.sites]
    _check_loops((blocks for _, blocks in groups), parts, converted)
    replaced = [(site, blocks) for site, blocks in groups if blocks[0].loc in converted]
    uses = leaf_uses(survey.scope, equations_of(site for site, _ in replaced))
    leaves = leaves_of(arrays)
    storage = plan_storage(
        graph,
        leaves,
        [(bool(site.loops), blocks) for site, blocks in replaced],
        {use.view.leaf.name for use in uses},
        {loc: [p.name for p in parts.blocks[loc].params] for loc in converted},
    )
    return ConversionState(tree, leaves, parts, instances, converted, storage)


def _check_loops(
    groups: Iterable[Sequence[BlockInstance]], parts: BlockParts, converted: frozenset[str]
) -> None:
    """Raise InputError unless the blocks of each loop became alike."""
    problems = []
    for blocks in groups:
        count = sum(i.loc in converted for i in blocks)
        kinds = {parts.blocks[i.loc].key() for i in blocks}
        if len(kinds) > 1 or count not in (0, len(blocks)):
            problem = Problem(
                "blocks of one scan would differ",
                where=blocks[0].line or blocks[0].loc,
                expected=f"all {len(blocks)} alike: {blocks[0].loc} to {blocks[-1].loc}",
                found=f"{count} converted",
                hint="layers=all; or split the scan into two, each with alike layers",
            )
            problems.append(problem)
    if problems:
        raise InputError(problems)


def _count_elements(params: PyTree) -> int:
    leaves = jax.tree_util.tree_leaves(params)
    return sum(prod(x.shape) for x in leaves if hasattr(x, "shape"))
