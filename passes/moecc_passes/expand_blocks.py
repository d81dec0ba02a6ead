"""The pass ``expand-blocks``: a deeper model, whose new layers add nothing at first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from moecc.errors import InputError, Problem, raise_problems
from moecc.families.registry import parse_config
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import weight_of
from moecc.ir.traits import Role
from moecc.rewrite.driver import may_rewrite
from moecc.rewrite.passes import Bounds, Context, Pass, PassResult, Preserves, Remark
from moecc.rewrite.pattern import NearMiss
from moecc.weights.expr import Full
from moecc_passes.roll_layers import (
    NO_LAYERS,
    LayerNodes,
    data_dependent,
    hoist,
    stacks_of,
)

DEPTHS = {
    "layers": ("num_hidden_layers",),
    "encoder.layers": ("encoder_layers", "num_hidden_layers"),
    "decoder.layers": ("decoder_layers", "num_decoder_layers"),
}
"""Fields of a config that may hold the depth of a stack."""

OF_EACH_LAYER = ("sliding_windows", "rope_layers")
"""Fields of a config with an entry for each layer."""


@dataclass(frozen=True)
class ResidualLayer:
    """A layer that adds to the residual stream.

    Attributes:
      layer: its nodes.
      source: the stream before it.
      result: the stream after it.
      zeroing: numbers for parameters with which it adds nothing.
    """

    layer: LayerNodes
    source: Value
    result: Value
    zeroing: dict[Value, float]


def residual_layer(layer: LayerNodes, dependent: set[Value]) -> ResidualLayer | Problem:
    """Return a layer's part of the residual stream, or why the layer cannot be copied.

    Args:
      layer: the layer.
      dependent: the values that depend on data.
    """
    inside = set(layer.nodes)
    if any(v.type.dtype.kind == "key" for node in layer.nodes for v in node.operands):
        hint = "run this pass before specialize"
        return Problem("the layer draws random numbers", layer.name, hint=hint)
    results = [v for n in layer.nodes for v in n.results if not v.users.keys() <= inside]
    results = [v for v in results if v in dependent]
    if len(results) != 1:
        names = ", ".join(f"%{v.name}" for v in results) or "nothing"
        message, hint = "a layer returns more than its stream", "run this pass before add-losses"
        return Problem(message, layer.name, "one value", names, hint)
    terms = list(_terms(results[0], inside))
    sources = [v for v in terms if v.node not in inside and not v.is_param]
    if len(terms) < 2 or len(sources) != 1:
        message = "the layer does not end with a sum of its input and of what it adds"
        hint = "a norm after the sum, as BERT has it, changes what goes through it"
        return Problem(message, layer.name, found=f"%{results[0].name}", hint=hint)
    zeroing: dict[Value, float] = {}
    for term in terms:
        numbers = {} if term is sources[0] else _zeroing(term, inside)
        if numbers is None:
            message = "no parameter makes a part of the layer zero"
            return Problem(message, layer.name, found=f"%{term.name}")
        zeroing |= numbers
    return ResidualLayer(layer, sources[0], results[0], zeroing)


def _terms(value: Value, inside: set[Node]) -> Iterator[Value]:
    """Yield the values of the layer's nodes and of its input that add up to `value`."""
    if value.node in inside and value.node is not None and value.node.op.is_sum:
        for operand in value.node.operands:
            yield from _terms(operand, inside)
    else:
        yield value


def _zeroing(value: Value, inside: set[Node]) -> dict[Value, float] | None:
    """Return numbers for parameters that make `value` zero; None if none do."""
    node = value.node
    if value.is_param:
        return {value: 0.0}
    if node is None or node not in inside:
        return None
    if node.op.is_norm:
        # Zeros before a norm would have a gradient of 1/√eps, and leave at the first step.
        by_role = dict(zip(node.op.roles[1:], node.operands[1:], strict=False))
        bias = by_role.get(Role.BIAS)
        parts = [_gain_of_zero(by_role[Role.GAIN]), *([] if bias is None else [{bias: 0.0}])]
    elif node.op.jointly:
        parts = [_zeroing(node.operands[at], inside) for at in node.op.linear]
    else:
        operands = sorted(
            (node.operands[at] for at in node.op.linear), key=lambda v: not v.is_param
        )
        factors = (_zeroing(operand, inside) for operand in operands)
        return next((factor for factor in factors if factor is not None), None)
    if any(part is None for part in parts):
        return None
    return {param: number for part in parts if part for param, number in part.items()}


def _gain_of_zero(gain: Value) -> dict[Value, float] | None:
    """Return the number that makes a norm's gain zero: a parameter, or a constant and one."""
    if gain.is_param:
        return {gain: 0.0}
    terms = gain.node.operands if gain.node is not None and gain.node.op.is_sum else []
    params = [term for term in terms if term.is_param]
    constants = [v.node.attrs.get("value") for v in terms if v.node is not None]
    if len(params) == 1 and len(constants) == 1 and isinstance(constants[0], float):
        return {params[0]: -constants[0]}
    return None


@dataclass(frozen=True)
class ExpandBlocksPass(Pass):
    """Insert a copy of every N-th layer after it, which adds nothing.

    Its last matrices are zero, or where a norm follows them the norm's gain, so that the residual
    stream stays as it is until they are trained (LLaMA Pro, arXiv 2401.02415).  Its other
    parameters are copies.  Layers after it are numbered anew.

    Before::

        %a = contract %x, %layers.0.w {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
        %b = contract %a, %layers.0.o {over=mlp} : f32[batch=B, embed=4] @layers.0.ffn
        %y = add %x, %b : f32[batch=B, embed=4] @layers.0.ffn

    After ``expand-blocks{every=1}``::

        %y = add %x, %b : f32[batch=B, embed=4] @layers.0.ffn
        %c = contract %y, %layers.1.w {over=embed} : f32[batch=B, mlp=8] @layers.1.ffn
        %d = contract %c, %layers.1.o {over=mlp} : f32[batch=B, embed=4] @layers.1.ffn    # zeros
        %z = add %y, %d : f32[batch=B, embed=4] @layers.1.ffn
    """

    name = "expand-blocks"
    summary = "insert layers that add nothing at first"
    must_match = True
    preserves = Preserves("exact")

    every: Annotated[int, "layers of the source between two new ones", Bounds(1)] = 4

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Insert the layers.

        Raises:
          InputError: a layer cannot be copied, or the family has no config of the deeper model.
        """
        stacks, dependent = stacks_of(graph), data_dependent(graph)
        for layers in stacks:
            hoist(layers, dependent)
        chosen = {
            layer.name: residual_layer(layer, dependent)
            for layers in stacks
            for layer in layers[self.every - 1 :: self.every]
            if may_rewrite(self.name, layer.name)
        }
        problems = [part for part in chosen.values() if isinstance(part, Problem)]
        raise_problems(problems)
        copied = {name: part for name, part in chosen.items() if isinstance(part, ResidualLayer)}
        origins = {layers[0].stack: _origins(layers, copied) for layers in stacks}
        config = _deeper_config(graph, origins) if copied else None
        for layers in stacks:
            _expand(graph, layers, copied)
        if config is not None:
            graph.attrs["config"] = config
        for name in copied:
            ctx.remark(Remark(name, "a layer that adds nothing follows it"))
        result = PassResult(bool(copied), len(copied), {"layers inserted": len(copied)})
        few = f"no stack has {self.every} layers"
        result.near_misses = [] if copied else [NearMiss(self.name, NO_LAYERS.where, few)]
        return result


def _origins(layers: Sequence[LayerNodes], copied: Mapping[str, ResidualLayer]) -> list[int]:
    """Return the old number of each layer of the deeper stack."""
    numbers = [int(layer.name.rpartition(".")[2]) for layer in layers]
    if numbers != list(range(len(numbers))):
        raise InputError(
            "the layers of a stack are not numbered in order",
            where=layers[0].stack,
            expected=f"0 to {len(numbers) - 1}, each once",
            found=", ".join(map(str, numbers[:8])),
        )
    return [at for at, layer in enumerate(layers) for _ in range(1 + (layer.name in copied))]


def _deeper_config(graph: Graph, origins: Mapping[str, Sequence[int]]) -> dict[str, object] | None:
    """Return the config of the deeper model; None where the graph has none.

    Raises:
      InputError: the family has no such config.
    """
    if "config" not in graph.attrs:
        return None
    config = parse_config(graph.attrs["config"], "attr config")
    changes: dict[str, Any] = {}
    for stack, numbers in origins.items():
        fields = (name for name in DEPTHS.get(stack, ()) if hasattr(config, name))
        changes[next(fields, "num_hidden_layers")] = len(numbers)
        for name in OF_EACH_LAYER:
            values = getattr(config, name, None)
            if values:
                changes[name] = tuple(values[number] for number in numbers)
        sparse = getattr(config, "sparse_layers", ())
        if getattr(config, "mlp_only_layers", None) is not None and not all(sparse):
            dense = (at for at, number in enumerate(numbers) if not sparse[number])
            changes |= {"mlp_only_layers": tuple(dense), "decoder_sparse_step": 1}
    try:
        data = replace(config, **changes).to_json()
        parse_config(data, "attr config")
    except InputError as error:
        family = graph.attrs.get("family")
        hint = "another number of layers between two new ones"
        problem = error.problems[0]
        message = f"{family} has no config of the deeper model: {problem.message}"
        raise InputError(message, where="attr config", found=problem.found, hint=hint) from None
    return data


def _expand(
    graph: Graph, layers: Sequence[LayerNodes], copied: Mapping[str, ResidualLayer]
) -> None:
    """Number the layers anew, and insert the copies, in a stack."""
    order = {param: [param] for param in graph.params.values()}
    number = sum(layer.name in copied for layer in layers) + len(layers)
    # From the last layer on, so that no name is taken when a layer moves to it.
    for layer in reversed(layers):
        part = copied.get(layer.name)
        number -= 1 if part is None else 2
        params = [p for p in graph.params.values() if _is_in(p.loc, layer.name)]
        if part is not None:
            copies = _insert_copy(graph, part, params, number + 1)
            if params:
                order[params[-1]] += copies
        for param in params:
            if param.weight is None:
                param.weight = weight_of(param)
            graph.rename(param, _renumbered(param.name, layer, number))
            param.loc = _moved(param.loc, layer, number)
        for node in layer.nodes:
            node.loc = _moved(node.loc, layer, number)
    graph.order_params(value for values in order.values() for value in values)


def _is_in(loc: str, name: str) -> bool:
    return f"{loc}.".startswith(f"{name}.")


def _moved(loc: str, layer: LayerNodes, number: int) -> str:
    """Return a location in a layer with another number of the layer."""
    return f"{layer.stack}.{number}{loc.removeprefix(layer.name)}"


def _renumbered(name: str, layer: LayerNodes, number: int) -> str:
    """Return the name of a parameter with another number of its layer."""
    old = layer.name.rpartition(".")[2]
    return re.sub(rf"(?<=\.){old}(?=\.|$)", str(number), name, count=1)


def _insert_copy(
    graph: Graph, part: ResidualLayer, params: Sequence[Value], number: int
) -> list[Value]:
    """Emit a layer again after it, with numbers with which it adds nothing; return the copies."""
    layer, inside = part.layer, set(part.layer.nodes)
    readers = [(n, i) for n in part.result.users for i, v in enumerate(n.operands)
               if n not in inside and v is part.result]  # fmt: skip
    image = {part.source: part.result}
    used = dict.fromkeys(v for node in layer.nodes for v in node.operands if v.is_param)
    copies = []
    for param in [*params, *(v for v in used if v not in params)]:
        weight = weight_of(param)
        if param in part.zeroing:
            weight = Full(part.zeroing[param], weight.type)
        name = graph.fresh(_renumbered(param.name, layer, number))
        loc = _moved(param.loc, layer, number) if _is_in(param.loc, layer.name) else param.loc
        image[param] = graph.param(name, param.type, weight, loc=loc)
        copies.append(image[param])
    behind = layer.nodes[-1]._next
    for node in layer.nodes:
        loc = _moved(node.loc, layer, number)
        graph.copy(node, image, loc=loc, origin="expand-blocks", before=behind)
    for node, index in readers:
        node.set_operand(index, image[part.result])
    return copies
