"""A conversion: new parameters, functions of them, and its folder.

The folder has the arrays by their names, the graph, a manifest and a receipt.  The graph reads the
arrays beside it, so that ``moecc inspect`` and ``moecc verify`` take the folder like any other;
``config.json`` has what functions of the parameters need to know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moecc.api.arguments import flag, folder_text, whole
from moecc.errors import (
    InputError,
    MachineError,
    Problem,
    UsageError,
    describe_error,
    raise_problems,
)
from moecc.formats.files import json_content, write_durable
from moecc.formats.folder import CONFIG_NAME, open_folder
from moecc.formats.manifest import (
    MANIFEST_NAME,
)
from moecc.formats.output import output_folder
from moecc.formats.run import GRAPH as GRAPH_NAME
from moecc.formats.writer import OutputTensor, write_checkpoint
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import print_graph, read_graph
from moecc.jobs.receipt import RECEIPT_NAME, Receipt
from moecc.model.open import MAX_READ_ELEMENTS, MODEL_TYPE
from moecc.rewrite.passes import Context, Pass
from moecc.rewrite.pipeline import Pipeline
from moecc.support.untyped import Json
from moecc.types import DTYPES, Array, Axis, TensorType
from moecc.version import __version__
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Stack
from moecc.weights.text import parse_expr
from moecc_backends.jaxpr.graph import (
    BlocksConversion,
    RewrittenBlocks,
    cut_graph,
    graph_of_function,
    parsed_pipeline,
    problems_of,
    rewrite_blocks,
)
from moecc_backends.jaxpr.run import (
    BESIDE,
    TREE,
    ConversionState,
    ConvertedParams,
    Execution,
    call_converted,
)
from moecc_backends.jaxpr.scopes import ParamTree, TracedFunction, leaves_of, trace_function
from moecc_backends.jaxpr.storage import (
    LeafEvaluator,
    ParamSlot,
    ParamStorage,
    StoredParam,
    new_array,
    plan_storage,
    rows_of,
)
from moecc_backends.jaxpr.survey import (
    BlockInstance,
    Survey,
    VariableLabels,
    equations_of,
    leaf_uses,
    refuse_ambiguous,
    refuse_mixing,
    refuse_shared_weights,
    survey_blocks,
    token_labels,
)
from moecc_backends.jaxpr.views import AnyArray, AnyArrays, TreeLeaf, function_line, shape_of
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.trace.context import AUTO, Options
from moecc_backends.xla.trace.values import Function, PyTree

SCHEMA = "moecc.function/1"


@dataclass(frozen=True, repr=False)
class FunctionConversion(BlocksConversion):
    """Converted parameters, and every function of them.

    Attributes:
      params: ``{"params": …, "moe": …}``, the tree with experts in place, and routers by name.
      state: what functions of the parameters need to know.
    """

    params: PyTree
    state: ConversionState

    def __call__(
        self,
        function: Function,
        *,
        losses: bool = False,
        mesh: object = None,
        dispatch: str = AUTO,
    ) -> Function:
        """Return `function` on the new parameters, traced and rewritten anew at each trace.

        Args:
          function: takes the dense parameters first.
          losses: whether losses and metrics are returned, too: then the result is a pair of it
            and a dictionary; a scalar, or the first of a tuple if it is one, is the model's loss
            and has ``loss.auxiliary`` added to it.
          mesh: the devices that experts are sharded over: the mesh of the graph, where a pass put
            it on one; else of XLA's partitioner, which has hints where tokens and experts go.
          dispatch: one of `moecc.ir.conventions.DISPATCHES`, or ``auto``.

        Returns:
          A function that takes new parameters first, and further inputs of the graph, such as the
          random key of ``specialize{mode=train}``, as ``moe_inputs={"key": key}``.

        Raises:
          UsageError: it is no function, or there is no such lowering.
          InputError: a routing of the graph does not fit it.
        """
        if not callable(function):
            raise UsageError("not a function", expected="a function", found=type(function).__name__)
        devices: jax.sharding.Mesh | None = None
        if isinstance(mesh, jax.sharding.Mesh):
            # The axes of `jax.make_mesh` are explicit by default; here XLA's partitioner places
            # values over them.
            devices = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
        elif mesh is not None:
            expected, actual = "a jax.sharding.Mesh", type(mesh).__name__
            raise UsageError("not a mesh of devices", expected=expected, found=actual)
        options = Options(dispatch)
        check_dispatch(self.graph, options)
        execution = Execution(options, devices)

        @wraps(function)
        def converted(
            params: PyTree,
            *args: PyTree,
            moe_inputs: AnyArrays | None = None,
            **kwargs: PyTree,
        ) -> AnyArray:
            arguments, extra = (args, kwargs), moe_inputs or {}
            return call_converted(
                self.state, function, execution, params, arguments, extra, losses=losses
            )

        return converted

    def save(self, folder: str | Path, params: PyTree = None, *, force: bool = False) -> Path:
        """Write parameters to a folder, from which `load` makes this conversion again.

        Args:
          folder: the folder, new or empty.
          params: parameters of the same tree, trained for example; those of the conversion if None.
          force: whether an existing folder is replaced.

        Raises:
          UsageError: `folder` is no path, or `force` not True or False.
          InputError: the folder cannot be used, the parameters do not fit, or an array cannot be
            stored.
          MachineError: the disk is too small, or a write failed.
        """
        path, force = Path(folder_text(folder)), flag("force", force)
        tree = self.state.tree
        new_params = self.params if params is None else params
        converted = ConvertedParams.of(tree, self.state.storage, new_params)
        arrays = {n: a for n, a in converted.leaves.items() if a is not None}
        arrays |= {_beside_name(n, tree.names): a for n, a in converted.beside.items()}
        present = {n: a for n, a in arrays.items() if not isinstance(a, jax.ShapeDtypeStruct)}
        leaves = {n: leaf for n, leaf in leaves_of(present).items() if leaf.dtype.safetensors}
        problems = [
            Problem(
                "an array cannot be stored",
                f"params {name}",
                found=f"{type(array).__name__} of {array.dtype}",
                hint="convert arrays and not shapes, and keep random keys elsewhere",
            )
            for name, array in arrays.items()
            if name not in leaves
        ]
        raise_problems(problems)
        tensors = [OutputTensor(n, leaf.source, leaf.dtype) for n, leaf in leaves.items()]
        needed = sum(int(a.nbytes) for a in arrays.values())
        with output_folder(path, force=force, needed_bytes=needed) as temporary:
            written = write_checkpoint(
                temporary,
                tensors,
                lambda name, start=0, stop=None: rows_of(arrays[name], start, stop),
                metadata={"moecc": __version__, "pipeline": self.pipeline.in_full()},
            )
            receipt = Receipt(MODEL_TYPE, self.preserves, self.contracts, None, None, ())
            files = {
                GRAPH_NAME: print_graph(_saved_graph(self, leaves)).encode(),
                CONFIG_NAME: json_content(_config(self)),
                RECEIPT_NAME: receipt.content(),
            }
            for name, content in files.items():
                write_durable(temporary / name, content)
            manifest = self.manifest(
                temporary,
                MODEL_TYPE,
                written.tensors,
                self.report.function,
                notes=tuple(f"not finite: {tensor}" for tensor in written.nonfinite),
            )
            write_durable(temporary / MANIFEST_NAME, manifest)
        return path


def _beside_name(name: str, leaves: Collection[str]) -> str:
    """Return the name under which an array beside a tree of `leaves` is stored."""
    return f"{BESIDE}.{name}" if name in leaves else name


def _saved_graph(conversion: FunctionConversion, leaves: Mapping[str, TreeLeaf]) -> Graph:
    """Return the graph with its parameters read from the arrays as they are stored."""
    graph, state = clone(conversion.graph), conversion.state
    arrays = {(s.key, s.in_tree): s.weight for s in state.storage.arrays}
    for name, param in graph.params.items():
        slot = state.storage.slots.get(name)
        if slot is None:
            continue
        key = slot.key if slot.in_tree else _beside_name(slot.key, state.tree.names)
        leaf, weight = leaves[key], arrays[slot.key, slot.in_tree]
        sizes = zip(weight.type.names, leaf.shape, strict=True)
        type = TensorType(leaf.dtype, tuple(Axis(n, size) for n, size in sizes))
        read: Expr = Source(leaf.name, type)
        if slot.row is not None:
            assert isinstance(weight, Stack), "rows are those of stacks"
            read = Index(read, weight.axis, slot.row)
        param.weight = read
    graph.attrs["checkpoint"] = "."
    return graph


def _config(conversion: FunctionConversion) -> dict[str, object]:
    """Return what functions of the parameters need to know, as JSON values."""
    state = conversion.state
    tree, storage = state.tree, state.storage
    numbers = {i: leaf for i, leaf in tree.fixed.items() if isinstance(leaf, int | float | str)}
    return {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        **conversion.facts(),
        "tree": _tree_to_json(tree.treedef),
        "names": list(tree.names),
        "numbers": sorted(numbers.items()),
        "fixed": sorted(tree.fixed.keys() - numbers),
        "leaves": {n: [leaf.dtype.name, list(leaf.shape)] for n, leaf in state.leaves.items()},
        "blocks": [
            {"loc": i.loc, "text": text, **vars(i), "weights": list(map(str, i.weights))}
            for (text, _), i in state.instances.items()
        ],
        "converted": sorted(state.converted),
        "slots": {n: list(astuple(slot)) for n, slot in storage.slots.items()},
        "arrays": [[s.key, s.in_tree, str(s.weight), s.like] for s in storage.arrays],
        "gone": sorted(storage.gone),
    }  # fmt: skip


def load(folder: str | Path, like: PyTree = None) -> FunctionConversion:
    """Return the conversion that `save` wrote to a folder, with its parameters.

    Args:
      folder: the folder.
      like: dense parameters, or their shapes, of the same tree; needed where that consists of
        more than dictionaries, lists and tuples.

    Raises:
      UsageError: `folder` is no path.
      InputError: the folder has no such conversion, or `like` is another tree.
    """
    path = Path(folder_text(folder))
    with open_folder(path) as checkpoint:
        config: Json = checkpoint.config
        if config.get("model_type") != MODEL_TYPE or config.get("schema") != SCHEMA:
            raise InputError(
                "the folder does not hold a converted function",
                where=str(path),
                expected=f"{MODEL_TYPE} {SCHEMA}",
                found=f"{config.get('model_type')} {config.get('schema')}",
                hint="`save` of a conversion writes one",
            )
        arrays = {name: jnp.asarray(checkpoint.read(name)) for name in checkpoint.tensors}
    try:
        return _loaded_conversion(config, str(path / GRAPH_NAME), arrays, like)
    except (InputError, MachineError):
        raise
    # A stranger's config may be wrong in any of its values, which name and count one another.
    except Exception as error:
        raise InputError(
            "the values do not belong to a converted function",
            where=str(path / CONFIG_NAME),
            found=describe_error(error),
            hint="moecc verify tells whether the folder was changed after it was written",
        ) from error


def _loaded_conversion(
    config: Json, graph: str, arrays: Mapping[str, jax.Array], like: PyTree
) -> FunctionConversion:
    instances = {}
    for block in config["blocks"]:
        weights = tuple(parse_expr(text)[0] for text in block["weights"])
        words = (block[n] for n in ("summary", "line", "identity"))
        instance = BlockInstance(block["loc"], tuple(block["params"]), weights, *words)
        instances[block["text"], weights] = instance
    stored = [
        StoredParam(key, in_tree, parse_expr(weight)[0], leaf)
        for key, in_tree, weight, leaf in config["arrays"]
    ]
    slots = {n: ParamSlot(*fields) for n, fields in config["slots"].items()}
    tree = _loaded_tree(config, like)
    state = ConversionState(
        tree,
        {n: TreeLeaf(n, tuple(shape), DTYPES[d]) for n, (d, shape) in config["leaves"].items()},
        cut_graph(read_graph(graph), [i.loc for i in instances.values()]),
        instances,
        frozenset(config["converted"]),
        ParamStorage(slots, stored, set(config["gone"])),
    )
    leaves = {n: arrays[n] for n in tree.array_names if n in arrays}
    beside = {s.key: arrays[_beside_name(s.key, tree.names)] for s in stored if not s.in_tree}
    return FunctionConversion(
        graph=state.parts.graph,
        **BlocksConversion.stated(config),
        params={TREE: tree.unflatten(leaves), BESIDE: beside},
        state=state,
    )


def _loaded_tree(config: Json, like: PyTree) -> ParamTree:
    names, numbers = tuple(config["names"]), dict(config["numbers"])
    if like is not None:
        tree, _ = ParamTree.of(like)
        if tree.names != names:
            raise InputError(
                "the parameters are another tree than the one that was saved",
                expected=", ".join(names[:5]),
                found=", ".join(tree.names[:5]),
            )
        return replace(tree, fixed={**tree.fixed, **numbers})
    if config["tree"] is None or config["fixed"]:
        raise InputError(
            "the tree of parameters has containers that a file cannot hold",
            hint="load(folder, like=params), with dense parameters or their shapes",
        )
    treedef = jax.tree_util.tree_structure(_read_tree(config["tree"]["tree"]))
    return ParamTree(treedef, names, numbers)


# Trees of parameters as JSON: ``{"dict": …}``, ``{"list": …}``, ``{"tuple": …}``, None, or the
# number of a leaf; every other container is not.


def _tree_to_json(treedef: PyTree) -> Json | None:
    """Return the structure of a tree as JSON values, or None where it has other containers."""

    def write(node: Any) -> Any:
        kind = type(node)
        if node is None or kind is int:
            return node
        if kind is dict and all(type(key) is str for key in node):
            return {"dict": {key: write(value) for key, value in node.items()}}
        if kind in (list, tuple):
            return {kind.__name__: [write(value) for value in node]}
        raise TypeError(kind.__name__)

    numbers = range(treedef.num_leaves)
    try:
        return {"tree": write(jax.tree_util.tree_unflatten(treedef, numbers))}
    except TypeError:
        return None


def _read_tree(node: Any) -> Any:
    """Return the tree that `_tree_to_json` wrote."""
    if not isinstance(node, dict):
        return node
    ((kind, inner),) = node.items()
    if kind == "dict":
        return {key: _read_tree(value) for key, value in inner.items()}
    values = [_read_tree(value) for value in inner]
    return tuple(values) if kind == "tuple" else values


# Convert a function: find its blocks, rewrite them by a pipeline, make the new parameters.


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
      seed: the seed of the random numbers.
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
    passes, seed = parsed_pipeline(pipeline), whole("seed", seed)
    for name, value in (("causal", causal), ("allow_unmatched", allow_unmatched), ("check", check)):
        flag(name, value)
    tree, arrays = ParamTree.of(params)
    _, survey, labels = _survey_function(function, tree, arrays, (args, kwargs), tokens or {})
    # What reads small parameters on which promises depend.
    are_shapes = any(isinstance(a, jax.ShapeDtypeStruct) for a in arrays.values())

    def read(weight: Expr) -> Array | None:
        if are_shapes or prod(weight.type.shape) > MAX_READ_ELEMENTS:
            return None
        return LeafEvaluator(arrays).evaluate(weight)

    context = Context(seed=seed, allow_unmatched=allow_unmatched, read=read)
    rewritten = rewrite_blocks(
        survey,
        labels,
        passes,
        context,
        name=getattr(function, "__name__", "function"),
        causal=causal,
        check=check,
    )
    state = _new_state(tree, arrays, survey, rewritten)
    new = {(s.key, s.in_tree): new_array(s, state.leaves, arrays) for s in state.storage.arrays}
    in_place = {n: a for n, a in arrays.items() if n not in state.storage.gone}
    in_place |= {key: array for (key, in_tree), array in new.items() if in_tree}
    new_params = {
        TREE: tree.unflatten(in_place),
        BESIDE: {key: array for (key, in_tree), array in new.items() if not in_tree},
    }
    report = rewritten.report(
        survey,
        function_line(function),
        _count_elements(arrays),
        _count_elements(new_params),
    )
    preserves, contracts = rewritten.run.preserves, rewritten.contracts
    return FunctionConversion(
        rewritten.graph, report, passes, seed, preserves, contracts, new_params, state
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
    name = getattr(function, "__name__", "function")
    return graph_of_function(traced, survey, name=name, is_causal=causal, labels=labels)


def _survey_function(
    function: Function,
    tree: ParamTree,
    arrays: AnyArrays,
    arguments: tuple[Sequence[AnyArray], AnyArrays],
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
    if labels:
        refuse_mixing(survey, labels)
    else:
        refuse_ambiguous(survey, traced)
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
    raise InputError([problem, *problems_of(survey.misses)])


def _new_state(
    tree: ParamTree,
    arrays: AnyArrays,
    survey: Survey,
    rewritten: RewrittenBlocks,
) -> ConversionState:
    """Return which blocks a pipeline converted, and where their parameters lie.

    Args:
      tree: the dense parameters.
      arrays: their arrays.
      survey: the blocks.
      rewritten: the converted blocks.

    Raises:
      InputError: the blocks of a loop differ now.
    """
    parts, instances, converted = rewritten.parts, survey.instances(), rewritten.converted
    groups = [(site, [instances[key] for key in site.keys]) for site in survey.sites]
    problems = []
    for _, blocks in groups:
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
    raise_problems(problems)
    replaced = [(site, blocks) for site, blocks in groups if blocks[0].loc in converted]
    uses = leaf_uses(survey.scope, equations_of(site for site, _ in replaced))
    leaves = leaves_of(arrays)
    storage = plan_storage(
        rewritten.graph,
        leaves,
        [(bool(site.loops), blocks) for site, blocks in replaced],
        {use.view.leaf.name for use in uses},
        {loc: [p.name for p in parts.blocks[loc].params] for loc in converted},
    )
    return ConversionState(tree, leaves, parts, instances, converted, storage)


def _count_elements(params: PyTree) -> int:
    leaves = jax.tree_util.tree_leaves(params)
    return sum(prod(x.shape) for x in leaves if hasattr(x, "shape"))
