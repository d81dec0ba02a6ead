"""Load a conversion that was saved: its parameters, and what functions of them need to know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from moecc.api.arguments import folder_text
from moecc.errors import InputError
from moecc.formats.folder import open_folder
from moecc.model.open import GRAPH_NAME, MODEL_TYPE, read_graph
from moecc.pipeline.passes import Preserves
from moecc.pipeline.text import Pipeline, installed
from moecc.support.untyped import Json, JsonDict
from moecc.tasks.contracts import Contracts
from moecc.types import DTYPES
from moecc.weights.text import parse_expr
from moecc_backends.islands.call import BESIDE, TREE, State
from moecc_backends.islands.conversion import Conversion
from moecc_backends.islands.functions import ParamTree
from moecc_backends.islands.parts import cut
from moecc_backends.islands.report import Report
from moecc_backends.islands.saving import SCHEMA, beside_name
from moecc_backends.islands.sites import Instance, Key
from moecc_backends.islands.storage import Slot, Storage, Stored
from moecc_backends.islands.treejson import from_json
from moecc_backends.islands.views import Leaf
from moecc_backends.xla.trace.typed_jax import PyTree


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
