"""Export a graph as a checkpoint of a family: its config, and an expression for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.families.building import build_model
from moecc.families.configs import GraphConfig, ModelConfig
from moecc.families.facts import is_tied
from moecc.families.graph_layout import graph_tensors
from moecc.families.inverting import Pair, tensors_of_all
from moecc.families.matching import match_parameters
from moecc.families.names import names_of
from moecc.families.neutral import completed
from moecc.families.propose import check_target as check_target
from moecc.families.propose import propose as propose
from moecc.families.propose import targets as targets
from moecc.ir.graph import Graph, Value
from moecc.ir.unroll import unrolled
from moecc.types.tensor import Size
from moecc.weights.expr import Expr

READ = ("tokens", "pixels", "features")
"""The inputs that models read: text, images, speech."""


@dataclass(frozen=True)
class Export:
    """The content of a checkpoint of a target family.

    Attributes:
      config: the typed config.
      tensors: the tensors by their names on disk, in the order of the model, with the expressions
        of their values; each name once.
    """

    config: ModelConfig
    tensors: list[tuple[str, Expr]]

    @property
    def config_json(self) -> dict[str, object]:
        """config.json, with the keys of transformers 4 and 5 side by side."""
        return self.config.to_json()


def export_graph(
    graph: Graph, target: str, *, layout: str = "experts", source: ModelConfig | None = None
) -> Export:
    """Return `graph` as a checkpoint of the family `target`; no weight is read.

    The target builds its own graph for the proposed config, and that graph is mapped onto `graph`,
    its repeated layers unrolled, from the outputs: the target computes the exported model.
    `layout` says how the experts of a layer are stored, see `moecc.families.parameters.LAYOUTS`;
    `source` is the config of the source, if it has been read.

    Raises:
      UsageError: there is no such family.
      InputError: the family cannot express the graph; all reasons, or the first differences.
    """
    graph = unrolled(graph)
    config = propose(graph, target, source)
    if not isinstance(config, ModelConfig):
        raise InputError(config)
    if isinstance(config, GraphConfig):
        return Export(config, list(graph_tensors(graph).items()))
    wanted = _built_like(graph, config, layout)
    weights = match_parameters(wanted, graph)
    tensors = dict(tensors_of_all(_read_as(value, weights) for value in wanted.params.values()))
    names = names_of(config.model_type)
    if config.model_type == "switch_transformers" and not is_tied(config):
        # Without a tie transformers 5 expects an embedding in either stack.
        tensors.update(dict.fromkeys(names.copies, tensors[names.embedding]))
    if graph.attrs.get("family") == target:
        return Export(config, list(tensors.items()))
    config, added = completed(config)
    return Export(config, [*tensors.items(), *added.items()])


def _built_like(graph: Graph, config: ModelConfig, layout: str) -> Graph:
    """Return the model of `config`, with the sizes and the padding mask of `graph`."""
    batch, seq, decoder_seq = _token_sizes(graph)
    padding = "mask" in graph.inputs
    return build_model(
        config, layout=layout, padding=padding, batch=batch, seq=seq, decoder_seq=decoder_seq
    )


def _read_as(value: Value, weights: Mapping[Value, Expr]) -> Pair:
    assert value.weight is not None, "a family builds no parameter without a weight"
    return value.weight, weights[value]


def _token_sizes(graph: Graph) -> tuple[Size, Size, Size]:
    """Return the names of the token sizes in `graph`, or their fixed values."""
    tokens = next((v for n in READ if (v := graph.inputs.get(n)) is not None), None)
    is_text = tokens is not None and tokens.name == "tokens"
    if tokens is None or (is_text and set(tokens.type.names) != {"batch", "seq"}):
        raise InputError(
            "a language model takes tokens, and the graph does not",
            expected="input %tokens : i32[batch=B, seq=S]",
            found=", ".join(map(repr, graph.inputs.values())) or "no input",
        )
    decoder = graph.inputs.get("decoder_tokens")
    length = decoder.type["seq"].size if decoder is not None and "seq" in decoder.type else "T"
    seq = tokens.type["seq"].size if "seq" in tokens.type else "S"
    return tokens.type["batch"].size if "batch" in tokens.type else "B", seq, length
