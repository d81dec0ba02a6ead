"""What a conversion did: blocks, near misses with reasons, what stayed JAX."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.api.arguments import flag, folder_text
from moecc.errors import InputError, Problem, UsageError
from moecc.formats.disk import write_durable
from moecc.formats.folder import open_folder
from moecc.formats.manifest import (
    MANIFEST_NAME,
    Manifest,
    TensorRecord,
    dump,
    file_records,
    library_versions,
    weight_file_record,
)
from moecc.formats.output import output_folder
from moecc.formats.writer import OutputTensor, WriteReport, write_checkpoint
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import print_graph
from moecc.model.open import CONFIG_NAME, GRAPH_NAME, MODEL_TYPE, read_graph
from moecc.pipeline.passes import Preserves
from moecc.pipeline.text import Pipeline, installed
from moecc.support.untyped import Json, JsonDict
from moecc.tasks.contracts import Contracts
from moecc.tasks.receipt import RECEIPT_NAME, Receipt
from moecc.types import DTYPES, Axis, TensorType
from moecc.version import __version__
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Stack
from moecc.weights.text import parse_expr
from moecc_backends.jaxpr.call import BESIDE, TREE, Call, Given, State
from moecc_backends.jaxpr.graph import cut
from moecc_backends.jaxpr.jaxprs import AnyArray
from moecc_backends.jaxpr.run import Execution
from moecc_backends.jaxpr.scopes import ParamTree, leaf_of
from moecc_backends.jaxpr.storage import Slot, Storage, Stored
from moecc_backends.jaxpr.survey import Instance, Key
from moecc_backends.jaxpr.views import Leaf
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.trace.context import AUTO, Options
from moecc_backends.xla.trace.typed_jax import Function, PyTree


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
        place = f" ({self.line})" if self.line else ""
        return f"{self.loc}: {state}, {self.operations}{place}"


@dataclass(frozen=True)
class Report:
    """A conversion.

    Attributes:
      function: the name of the function.
      pipeline: the passes.
      preserves: what they promise.
      blocks: the blocks, in order.
      misses: what is nearly a block, and why it is none.
      unused: the parameters that the function does not use.
      remarks: the notes of the passes.
      equations: how many equations the function has, those of blocks apart.
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
    equations: int = 0
    elements_before: int = 0
    elements_after: int = 0
    line: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, AnyArray]) -> Report:
        """Return the report that `to_json` wrote."""
        blocks = tuple(BlockReport(**block) for block in found["blocks"])
        lists = {n: tuple(found[n]) for n in ("misses", "unused", "remarks")}
        return cls(**{**found, **lists, "blocks": blocks})

    def __str__(self) -> str:
        count = sum(b.is_converted for b in self.blocks)
        lines = [
            f"{self.function}: {count} of {len(self.blocks)} blocks converted by {self.pipeline}",
            f"preserves {self.preserves}",
            f"parameters: {self.elements_before:,} → {self.elements_after:,}",
            f"stayed JAX: {self.equations:,} equations",
            *(f"  {block}" for block in self.blocks),
        ]
        if self.misses:
            lines += ["not converted:", *(f"  {miss}" for miss in self.misses)]
        if self.unused:
            by = f" by {self.line}" if self.line else ""
            lines.append(f"not used{by}: {', '.join(self.unused)}")
        if self.remarks:
            lines += ["remarks:", *(f"  {r}" for r in self.remarks)]
        return "\n".join(lines)


# What a conversion consists of.


@dataclass(frozen=True)
class Record:
    """New parameters, the graph that they are of, and how they were made.

    Attributes:
      params: ``{"params": …, "moe": …}``, the tree with experts in place, and routers by name.
      graph: all blocks as one graph, rewritten.
      report: what was done.
      preserves: what the passes promise.
      pipeline: the passes.
      seed: of the random numbers.
      contracts: what the passes were found to keep, at reduced sizes.
      state: what functions of the parameters need to know.
    """

    params: PyTree
    graph: Graph
    report: Report
    preserves: Preserves
    pipeline: Pipeline
    seed: int
    contracts: Contracts
    state: State


# Trees of parameters as JSON: dictionaries, lists and tuples; every other container is not.

JsonTree = Any
"""``{"dict": …}``, ``{"list": …}``, ``{"tuple": …}``, None, or the number of a leaf."""


def to_json(treedef: Any) -> JsonTree:
    """Return the structure of a tree as JSON values, or None where it has other containers."""
    count = treedef.num_leaves
    numbered = jax.tree_util.tree_unflatten(treedef, list(range(count)))
    try:
        return {"tree": _written(numbered)}
    except TypeError:
        return None


def from_json(tree: JsonTree) -> Any:
    """Return the structure that `to_json` wrote."""
    return jax.tree_util.tree_structure(_read(tree["tree"]))


def _written(node: Any) -> JsonTree:
    kind = type(node)
    if node is None or kind is int:
        return node
    if kind is dict and all(type(key) is str for key in node):
        return {"dict": {key: _written(value) for key, value in node.items()}}
    if kind in (list, tuple):
        return {kind.__name__: [_written(value) for value in node]}
    raise TypeError(kind.__name__)


def _read(node: JsonTree) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, inner),) = node.items()
    if kind == "dict":
        return {key: _read(value) for key, value in inner.items()}
    made = [_read(value) for value in inner]
    return tuple(made) if kind == "tuple" else made


# Save a conversion as a folder: arrays by their names, the graph, manifest and receipt.
#
# The graph reads the arrays beside it, so that ``moecc inspect`` and ``moecc verify`` take the
# folder like any other; ``config.json`` has what functions of the parameters need to know.

SCHEMA = "moecc.function/1"


def write_folder(
    record: Record, folder: Path, params: PyTree = None, *, force: bool = False
) -> Path:
    """Write parameters to a folder, atomically; return the folder.

    Args:
      record: the record.
      folder: the folder, new or empty.
      params: parameters of the same tree, trained for example; those of the conversion if None.
      force: whether an existing folder is replaced.

    Raises:
      InputError: the folder cannot be used, the parameters do not fit, or an array cannot be
        stored.
      MachineError: the disk is too small, or a write failed.
    """
    arrays = named_arrays(record.state, record.params if params is None else params)
    leaves = _leaves(arrays)
    tensors = [OutputTensor(n, leaf.source, leaf.dtype) for n, leaf in leaves.items()]
    needed = sum(int(a.nbytes) for a in arrays.values())
    with output_folder(folder, force=force, needed_bytes=needed) as temporary:
        written = write_checkpoint(
            temporary,
            tensors,
            lambda name, start=0, stop=None: _rows(arrays[name], start, stop),
            metadata={"moecc": __version__, "pipeline": record.pipeline.in_full()},
        )
        graph = print_graph(_saved_graph(record, leaves))
        write_durable(temporary / GRAPH_NAME, graph.encode())
        write_durable(temporary / CONFIG_NAME, _text(_config(record)))
        write_durable(temporary / RECEIPT_NAME, _receipt(record).content())
        write_durable(temporary / MANIFEST_NAME, _manifest(temporary, record, written))
    return folder


def _text(document: object) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _rows(array: AnyArray, start: int, stop: int | None) -> AnyArray:
    whole = np.asarray(array)
    return whole[start:stop] if whole.ndim else whole


def named_arrays(state: State, params: PyTree) -> dict[str, AnyArray]:
    """Return the arrays of new parameters by the names under which they are stored.

    Raises:
      InputError: they are not those of the record.
    """
    given = Given.of(state.tree, params)
    given.check(state.storage)
    found = {n: a for n, a in given.leaves.items() if a is not None}
    return found | {beside_name(n, state.tree.names): a for n, a in given.beside.items()}


def beside_name(name: str, leaves: Collection[str]) -> str:
    """Return the name under which an array beside a tree of `leaves` is stored."""
    return f"{BESIDE}.{name}" if name in leaves else name


def _leaves(arrays: Mapping[str, AnyArray]) -> dict[str, Leaf]:
    """Return the arrays as leaves. Raises InputError for types that are not stored."""
    problems = []
    leaves: dict[str, Leaf] = {}
    for name, array in arrays.items():
        leaf = None if isinstance(array, jax.ShapeDtypeStruct) else leaf_of(name, array)
        if leaf is None or leaf.dtype.safetensors is None:
            what = "an array cannot be stored"
            found = f"{type(array).__name__} of {array.dtype}"
            hint = "convert arrays and not shapes, and keep random keys elsewhere"
            problems.append(Problem(what, f"params {name}", found=found, hint=hint))
        else:
            leaves[name] = leaf
    if problems:
        raise InputError(problems)
    return leaves


def _saved_graph(record: Record, leaves: Mapping[str, Leaf]) -> Graph:
    """Return the graph with its parameters read from the arrays as they are stored."""
    graph, state = clone(record.graph), record.state
    stored = {(s.key, s.in_tree): s for s in state.storage.arrays}
    for name, param in graph.params.items():
        slot = state.storage.slots.get(name)
        if slot is not None:
            one = stored[slot.key, slot.in_tree]
            key = slot.key if slot.in_tree else beside_name(slot.key, state.tree.names)
            param.weight = _saving_read(leaves[key], one, slot.row)
    graph.attrs["checkpoint"] = "."
    return graph


def _saving_read(leaf: Leaf, stored: Stored, row: int | None) -> Expr:
    """Return a parameter as it is read from a stored array: all of it, or a part of a stack."""
    type = TensorType(
        leaf.dtype,
        tuple(Axis(a.name, n) for a, n in zip(stored.weight.type.axes, leaf.shape, strict=True)),
    )
    whole = Source(leaf.name, type)
    if row is None:
        return whole
    assert isinstance(stored.weight, Stack), "rows are those of stacks"
    return Index(whole, stored.weight.axis, row)


def _numbers(tree: ParamTree) -> dict[int, object]:
    """Return the leaves of a tree, by position, that are Python's numbers or texts."""
    return {at: leaf for at, leaf in tree.fixed.items() if isinstance(leaf, (int, float, str))}


def _config(record: Record) -> dict[str, object]:
    """Return what functions of the parameters need to know, as JSON values."""
    state = record.state
    storage = state.storage
    return {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        "pipeline": record.pipeline.in_full(),
        "seed": record.seed,
        "preserves": asdict(record.preserves),
        "report": record.report.to_json(),
        "tree": to_json(state.tree.treedef),
        "names": list(state.tree.names),
        "numbers": sorted(_numbers(state.tree).items()),
        "fixed": sorted(state.tree.fixed.keys() - _numbers(state.tree).keys()),
        "leaves": {n: [leaf.dtype.name, list(leaf.shape)] for n, leaf in state.leaves.items()},
        "blocks": [
            {"loc": one.loc, "text": key[0], "params": list(one.params),
             "weights": list(map(str, one.weights)), "summary": one.summary, "line": one.line,
             "identity": one.identity}
            for key, one in state.instances.items()
        ],
        "converted": sorted(state.converted),
        "slots": {n: [s.key, s.in_tree, s.row] for n, s in storage.slots.items()},
        "arrays": [[s.key, s.in_tree, str(s.weight), s.like] for s in storage.arrays],
        "gone": sorted(storage.gone),
    }  # fmt: skip


def _receipt(record: Record) -> Receipt:
    return Receipt(MODEL_TYPE, record.preserves, record.contracts, None, (), library_versions())


def _manifest(folder: Path, record: Record, written: WriteReport) -> bytes:
    tensors = {t.name: TensorRecord(t.sha256, t.dtype, t.shape, t.file) for t in written.tensors}
    weights = sorted({t.file for t in written.tensors})
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    others = {name: folder / name for name in names if name not in weights}
    manifest = Manifest(
        pipeline=record.pipeline.in_full(),
        seed=record.seed,
        source=record.report.function,
        source_files={},
        family_from=MODEL_TYPE,
        family_to=MODEL_TYPE,
        dtype="as stored",
        preserves=str(record.preserves),
        weights={name: weight_file_record(folder / name) for name in weights},
        files=file_records(others),
        tensors=tensors,
        notes=tuple(f"not finite: {found}" for found in written.nonfinite),
    )
    return dump(manifest)


# A conversion: new parameters, and functions of them.


@dataclass(frozen=True)
class Conversion(Record):
    """Converted parameters, and every function of them; see `Record` for the attributes."""

    def __call__(
        self,
        function: Function,
        *,
        losses: bool = False,
        mesh: jax.sharding.Mesh | None = None,
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
        options = Options(dispatch)
        check_dispatch(self.graph, options)
        execution = Execution(options, _partitioned(mesh))

        @wraps(function)
        def converted(
            params: PyTree,
            *args: PyTree,
            moe_inputs: Mapping[str, AnyArray] | None = None,
            **kwargs: PyTree,
        ) -> AnyArray:
            call = Call(self.state, function, losses, execution)
            return call.run(params, args, kwargs, moe_inputs or {})

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
        return write_folder(self, Path(folder_text(folder)), params, force=flag("force", force))


def _partitioned(mesh: object) -> jax.sharding.Mesh | None:
    """Return a mesh over whose axes XLA's partitioner places values.

    The axes of `jax.make_mesh` are explicit by default: it must not.

    Raises:
      UsageError: it is no mesh of devices.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, jax.sharding.Mesh):
        expected, found = "a jax.sharding.Mesh", type(mesh).__name__
        raise UsageError("not a mesh of devices", expected=expected, found=found)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names)


# Load a conversion that was saved: its parameters, and what functions of them need to know.


def load(folder: str | Path, like: PyTree = None) -> Conversion:
    """Return the conversion that `save` wrote to a folder, with its parameters.

    Args:
      folder: the folder.
      like: dense parameters, or their shapes, of the same tree; needed where that consists of
        more than dictionaries, lists and tuples.

    Raises:
      UsageError: `folder` is no path.
      InputError: the folder has no such conversion, or `like` is another tree.
    """
    place = Path(folder_text(folder))
    with open_folder(place) as checkpoint:
        config = checkpoint.config
        if config.get("model_type") != MODEL_TYPE or config.get("schema") != SCHEMA:
            raise InputError(
                "the folder does not hold a converted function",
                where=str(place),
                expected=f"{MODEL_TYPE} {SCHEMA}",
                found=f"{config.get('model_type')} {config.get('schema')}",
                hint="`save` of a conversion writes one",
            )
        state = _state(config, str(place / GRAPH_NAME), like)
        arrays = {name: jnp.asarray(checkpoint.read(name)) for name in checkpoint.tensors}
    leaves = {n: arrays[n] for n in state.tree.array_names if n in arrays}
    beside = {s.key: arrays[beside_name(s.key, state.tree.names)]
              for s in state.storage.arrays if not s.in_tree}  # fmt: skip
    report = Report.from_json(_object(config["report"]))
    promise = _object(config["preserves"])
    return Conversion(
        params={TREE: state.tree.unflatten(leaves), BESIDE: beside},
        graph=state.parts.graph,
        report=report,
        preserves=Preserves(**promise),
        pipeline=Pipeline.parse(str(config["pipeline"]), installed()),
        seed=_number(config["seed"]),
        contracts=Contracts(unchecked="read from a folder"),
        state=state,
    )


def _object(value: object) -> JsonDict:
    assert isinstance(value, dict), "the schema says so"
    return value


def _number(value: object) -> int:
    assert isinstance(value, int), "the schema says so"
    return value


def _state(config: Json, graph: str, like: PyTree) -> State:
    leaves = {n: Leaf(n, tuple(shape), DTYPES[dtype])
              for n, (dtype, shape) in config["leaves"].items()}  # fmt: skip
    instances = dict(map(_instance, config["blocks"]))
    storage = Storage(
        {n: Slot(*one) for n, one in config["slots"].items()},
        [Stored(key, in_tree, parse_expr(weight)[0], of)
         for key, in_tree, weight, of in config["arrays"]],
        set(config["gone"]),
    )  # fmt: skip
    parts = cut(read_graph(graph), [one.loc for one in instances.values()])
    return State(
        _tree(config, like), leaves, parts, instances, frozenset(config["converted"]), storage
    )


def _instance(block: Json) -> tuple[Key, Instance]:
    weights = tuple(parse_expr(text)[0] for text in block["weights"])
    params = tuple(block["params"])
    said = (str(block[n]) for n in ("summary", "line", "identity"))
    made = Instance(block["loc"], params, weights, *said)
    return (block["text"], weights), made


def _tree(config: Json, like: PyTree) -> ParamTree:
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
    return ParamTree(from_json(config["tree"]), names, numbers)
