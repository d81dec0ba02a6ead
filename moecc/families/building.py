"""Build the graph of any typed config, the general layout of st_moe included."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moecc.errors import InputError, Problem
from moecc.families.config import FAMILY, ModelConfig
from moecc.families.graphs.parameters import DtypeOf, GraphRequest, float32_of
from moecc.families.heads import LABEL_KEYS, LOGITS, ModelHead
from moecc.families.reader import TOKEN_KEYS
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.text import parse, print_graph
from moecc.ir.verify import verify
from moecc.support.process import gc_paused
from moecc.types import Size, TensorType
from moecc.weights.expr import Expr, Source

if TYPE_CHECKING:
    from moecc.families.st_moe import GraphConfig

# The general layout of st_moe: any graph as a checkpoint, its lines in config.json.
#
# The tensors are the graph's parameters, by name, with their axes in the order of the graph.


def storing_problems(graph: Graph) -> list[Problem]:
    """Return the reasons why `graph` cannot be stored; its text is not made."""
    if "logits" in graph.outputs or "hidden" in graph.outputs:
        return []
    outputs = ", ".join(graph.outputs)
    return [Problem("a model has an output logits or hidden", found=outputs)]


def graph_config(graph: Graph) -> GraphConfig | list[Problem]:
    """Return the config that stores `graph`, or the reasons why it cannot be stored."""
    if problems := storing_problems(graph):
        return problems
    from moecc.families.st_moe import GraphConfig

    bare = clone(graph)
    for value in bare.params.values():
        value.weight = None
    bare.attrs = {key: value for key, value in graph.attrs.items() if key != "checkpoint"}
    bare.attrs["family"] = FAMILY
    source = graph.stated_config
    dtype, vocabulary = source.get("dtype"), vocabulary_of(graph)
    keys = (*TOKEN_KEYS, "decoder_start_token_id") if vocabulary else ()
    if LOGITS in graph.outputs:
        keys = (*keys, *LABEL_KEYS)
    return GraphConfig(
        vocab_size=vocabulary,
        dtype=dtype if isinstance(dtype, str) else None,
        extra={key: source[key] for key in keys if key in source},
        lines=tuple(print_graph(bare).splitlines()),
    )


def graph_tensors(graph: Graph) -> dict[str, Expr]:
    """Return an expression for each parameter of `graph`, by name.

    Raises:
      InputError: one has no weight.
    """
    missing = [name for name, v in graph.params.items() if v.weight is None]
    if missing:
        fault = "the parameter has no weight, so it cannot be written"
        raise InputError(Problem(fault, f"%{name}") for name in missing)
    return graph.weights


def vocabulary_of(graph: Graph) -> int:
    """Return the number of token ids: the size of the axis ``vocab`` of some parameter.

    It is 0 of a graph that takes no integers.

    Raises:
      InputError: no parameter has one, and the graph takes integers.
    """
    for value in graph.params.values():
        if "vocab" in value.type and isinstance(value.type["vocab"].size, int):
            return int(value.type["vocab"].size)
    if not any(value.type.dtype.kind == "int" for value in graph.inputs.values()):
        return 0
    raise InputError("the graph has no parameter with an axis vocab, so it knows no tokens")


def build_stored(config: GraphConfig, request: GraphRequest) -> Graph:
    """Return the graph that a config stores, its parameters read from the tensors of their names.

    Raises:
      InputError: the lines are not a valid graph.
    """
    dtype_of = request.dtype_of or float32_of
    graph = parse(config.text, "config.json: graph")
    verify(graph)
    if stated := graph.weights:
        fault = "a stored graph reads each parameter from the tensor of its name"
        hint = "remove the weight expression, or convert the model that has it"
        raise InputError(Problem(fault, f"graph: %{name}", hint=hint) for name in stated)
    for name, value in graph.params.items():
        if not value.type.is_static:
            parameter = f"%{name} : {value.type}"
            raise InputError("a stored parameter has known sizes", where="graph", found=parameter)
        value.weight = Source(name, TensorType(dtype_of(name), value.type.axes))
    graph.attrs = {**graph.attrs, "family": config.model_type, "checkpoint": request.checkpoint}
    graph.attrs.setdefault("config", config.to_json())
    return graph


# Build the graph of any typed config, whatever the shape of the model.

_GRAPHS = "moecc.families.graphs"


def build_model(
    config: ModelConfig,
    dtype_of: DtypeOf | None = None,
    checkpoint: str = "",
    *,
    layout: str = "experts",
    padding: bool | None = False,
    batch: Size = "B",
    seq: Size = "S",
    decoder_seq: Size = "T",
    head: ModelHead | None = None,
) -> Graph:
    """Return the graph of `config`; the arguments are those of `GraphRequest`.

    Raises:
      InputError: `padding` is requested of a model without a mask, or a config's graph is invalid.
    """
    padding = config.takes_mask if padding is None else padding
    if padding and not config.takes_mask:
        raise InputError(
            f"{config.kind} takes no mask", where=config.model_type, hint=config.mask_hint
        )
    if config.stacks_experts:
        layout = "stacked"
    request = GraphRequest(dtype_of, checkpoint, layout, padding, batch, seq, decoder_seq, head)
    build: Any = type(config).builder
    if build is None:
        is_stored = config.graphs == "stored"
        build = build_stored if is_stored else import_module(f"{_GRAPHS}.{config.graphs}").build
    # The graph of a model with 2048 experts per layer has several hundred thousand objects.
    with gc_paused():
        graph: Graph = build(config, request)
    return graph
