"""Save a conversion as a folder: arrays by their names, the graph, manifest and receipt.

The graph reads the arrays beside it, so that ``moecc inspect`` and ``moecc verify`` take the
folder like any other; ``config.json`` has what functions of the parameters need to know.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from moecc.errors import InputError, Problem
from moecc.formats.disk import write_durable
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
from moecc.model.open import CONFIG_NAME, GRAPH_NAME, MODEL_TYPE
from moecc.tasks.receipt import RECEIPT_NAME, Receipt
from moecc.types import Axis, TensorType
from moecc.version import __version__
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Index, Stack
from moecc_backends.islands.call import BESIDE, Given, State
from moecc_backends.islands.functions import ParamTree, leaf_of
from moecc_backends.islands.jaxprs import AnyArray
from moecc_backends.islands.record import Record
from moecc_backends.islands.storage import Stored
from moecc_backends.islands.treejson import to_json
from moecc_backends.islands.views import Leaf
from moecc_backends.xla.trace.typed_jax import PyTree

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
            param.weight = _read(leaves[key], one, slot.row)
    graph.attrs["checkpoint"] = "."
    return graph


def _read(leaf: Leaf, stored: Stored, row: int | None) -> Expr:
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
