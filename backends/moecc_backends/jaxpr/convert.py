"""Convert a function: find its blocks, rewrite them by a pipeline, make the new parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import jax

from moecc.api.arguments import flag, pipeline_of, whole
from moecc.errors import InputError, Problem, UsageError
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Pass, ReadWeight
from moecc.pipeline.runner import Report as PipelineReport
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.tasks.contracts import Contracts, check_contracts
from moecc.types import Array
from moecc.weights.expr import Expr
from moecc_backends.jaxpr.blocks import Miss
from moecc_backends.jaxpr.call import BESIDE, TREE, State
from moecc_backends.jaxpr.conversion import BlockReport, Conversion, Report
from moecc_backends.jaxpr.graph import Parts, build_graph, cut, part_key, surroundings
from moecc_backends.jaxpr.jaxprs import AnyArray, function_line, shape_of
from moecc_backends.jaxpr.labels import Dims, refuse_mixing, token_labels
from moecc_backends.jaxpr.scopes import ParamTree, Traced, Val, leaves_of, trace_function
from moecc_backends.jaxpr.storage import LeafEvaluator, Storage, make_array, plan_storage
from moecc_backends.jaxpr.survey import Instance, Key, Survey, settle, steps_of, survey, uses
from moecc_backends.jaxpr.views import Leaf
from moecc_backends.xla.trace.typed_jax import Function, PyTree

MAX_READ_ELEMENTS = 1 << 20
"""The largest parameter that a promise may depend on."""

NOT_CHECKED = Contracts(unchecked="convert(…, check=True) does")
"""What is said where passes are not held to their promises, which is the default here."""


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
) -> Conversion:
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
        *given, pipeline = args or (None,)
        args = tuple(given)
    passes, seed = _parsed(pipeline), whole("seed", seed)
    for what, value in (("causal", causal), ("allow_unmatched", allow_unmatched), ("check", check)):
        flag(what, value)
    tree, arrays = ParamTree.of(params)
    _, found, labels = _surveyed(function, (tree, arrays), (args, kwargs), tokens or {})
    name, instances = _name(function), found.instances()
    graph = build_graph(found, name=name, is_causal=causal, labels=labels)
    locations = [i.loc for i in instances.values()]
    before = {loc: part_key(part) for loc, part in cut(graph, locations).blocks.items()}
    context = Context(seed=seed, allow_unmatched=allow_unmatched, read=_reader(arrays))
    contracts = check_contracts(graph, passes, context) if check else NOT_CHECKED
    done = _run(graph, passes, context, found.misses)
    parts = cut(graph, locations)
    converted = frozenset(n for n, part in parts.blocks.items() if part_key(part) != before[n])
    _check_loops(found, instances, parts, converted)
    leaves = leaves_of(arrays)
    storage = _storage(found, instances, graph, parts, converted, leaves)
    state = State(tree, leaves, parts, instances, converted, storage)
    made = _new_params(state, arrays)
    report = _report((name, function_line(function)), passes, done, found, state, (arrays, made))
    return Conversion(made, graph, report, done.preserves, passes, seed, contracts, state)


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
    traced, found, labels = _surveyed(function, ParamTree.of(params), (args, kwargs), tokens or {})
    around = surroundings(traced, found, labels)
    return build_graph(found, name=_name(function), is_causal=causal, labels=labels, around=around)


def _name(function: Function) -> str:
    return str(getattr(function, "__name__", "function"))


def _surveyed(
    function: Function,
    params: tuple[ParamTree, Mapping[str, AnyArray]],
    arguments: tuple[Sequence[AnyArray], Mapping[str, AnyArray]],
    tokens: Mapping[str, Sequence[str]],
) -> tuple[Traced, Survey, dict[Val, Dims]]:
    """Return a function traced, its blocks, and the labels of its values.

    Raises:
      InputError: the function cannot be traced, or has no such block.
    """
    tree, arrays = params
    shapes = {n: shape_of(a.shape, a.dtype) for n, a in arrays.items()}
    traced, _ = trace_function(function, tree, shapes, leaves_of(arrays), arguments)
    found = survey(traced.scope)
    labels = token_labels(traced, tokens, function_line(function)) if tokens else {}
    refuse_mixing(found, labels)
    settle(found)
    if not found.sites:
        raise InputError([_no_block(function, found), *map(_near, found.misses)])
    return traced, found, labels


def _parsed(pipeline: object) -> Pipeline:
    parts = pipeline if isinstance(pipeline, (list, tuple)) and pipeline else (pipeline,)
    if all(isinstance(part, (str, Pass, Pipeline)) for part in parts):
        return pipeline_of(pipeline)
    raise UsageError(
        "no pipeline was given",
        expected='convert(function, params, batch, "upcycle{experts=8}")',
        found=type(pipeline).__name__,
    )


def _run(
    graph: Graph, pipeline: Pipeline, context: Context, misses: Sequence[Miss]
) -> PipelineReport:
    """Run the pipeline; where a pass matches nothing, say what is nearly a block."""
    try:
        return run_pipeline(graph, pipeline, context=context)
    except InputError as error:
        raise InputError([*error.problems, *map(_near, misses)]) from None


def _near(miss: Miss) -> Problem:
    return Problem(f"not a block: {miss.reason}", where=miss.line or ", ".join(miss.weights))


def _no_block(function: Function, found: Survey) -> Problem:
    what = "the function has no feed-forward block of its parameters"
    if not found.leaves:
        what = "the parameters have none of the element types that a block can have"
    elif len(found.unused) == len(found.leaves):
        what = "the function uses none of its parameters"
    return Problem(
        what,
        where=function_line(function),
        expected="a product with a weight, functions of elements, a product with a weight",
        hint="the parameters are the first argument; weights that are closed over are constants",
    )


def _reader(arrays: Mapping[str, AnyArray]) -> ReadWeight:
    """Return what reads small parameters on which promises depend."""
    are_shapes = any(isinstance(a, jax.ShapeDtypeStruct) for a in arrays.values())

    def read(weight: Expr) -> Array | None:
        if are_shapes or prod(weight.type.shape) > MAX_READ_ELEMENTS:
            return None
        box = tuple((0, n) for n in weight.type.shape)
        return LeafEvaluator(arrays).block(weight, box)

    return read


def _check_loops(
    found: Survey, instances: Mapping[Key, Instance], parts: Parts, converted: frozenset[str]
) -> None:
    """Raise InputError unless the blocks of one loop became alike."""
    problems = []
    for site in found.sites:
        locs = [instances[key].loc for key in site.keys]
        kinds = {part_key(parts.blocks[loc]) for loc in locs}
        count = sum(loc in converted for loc in locs)
        if len(kinds) > 1 or count not in (0, len(locs)):
            what = f"all {len(locs)} alike: {locs[0]} to {locs[-1]}"
            hint = "layers=all; or split the scan into two, each with alike layers"
            where = site.island.line or locs[0]
            problems.append(
                Problem("blocks of one scan would differ", where, what, f"{count} converted", hint)
            )
    if problems:
        raise InputError(problems)


def _storage(
    found: Survey,
    instances: Mapping[Key, Instance],
    graph: Graph,
    parts: Parts,
    converted: frozenset[str],
    leaves: Mapping[str, Leaf],
) -> Storage:
    sites = [s for s in found.sites if instances[s.keys[0]].loc in converted]
    still_used = {u.view.leaf.name for u in uses(found.scope, steps_of(sites))}
    return plan_storage(
        graph,
        leaves,
        [i for i in instances.values() if i.loc in converted],
        sites,
        instances,
        still_used,
        {loc: [p.name for p in parts.blocks[loc].params] for loc in converted},
    )


def _new_params(state: State, arrays: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Return the new parameters: the tree with experts in place, and the rest by name."""
    made: dict[bool, dict[str, AnyArray]] = {True: {}, False: {}}
    for one in state.storage.arrays:
        made[one.in_tree][one.key] = make_array(one, state.leaves, arrays)
    kept = {n: a for n, a in arrays.items() if n not in state.storage.gone}
    return {TREE: state.tree.unflatten(kept | made[True]), BESIDE: made[False]}


def _report(
    function: tuple[str, str],
    pipeline: Pipeline,
    done: PipelineReport,
    found: Survey,
    state: State,
    params: tuple[AnyArray, AnyArray],
) -> Report:
    name, line = function
    before, after = (
        sum(prod(x.shape) for x in jax.tree_util.tree_leaves(p) if hasattr(x, "shape"))
        for p in params
    )
    return Report(
        function=name,
        line=line,
        pipeline=str(pipeline),
        preserves=str(done.preserves),
        blocks=tuple(
            BlockReport(i.loc, i.line, i.summary, i.loc in state.converted)
            for i in state.instances.values()
        ),
        misses=tuple(map(str, found.misses)),
        unused=found.unused,
        remarks=tuple(dict.fromkeys(str(r) for run in done.runs for r in run.remarks)),
        equations=sum(1 for _ in found.scope.every_step()) - len(steps_of(found.sites)),
        elements_before=before,
        elements_after=after,
    )
