"""Export a graph as a checkpoint of a family: its config, and an expression for each tensor."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moecc.errors import InputError, Problem
from moecc.families.building import build_model, graph_tensors
from moecc.families.config import FAMILY, ModelConfig
from moecc.formats.open import WrappedText
from moecc.ir.conventions import LOSS, METRIC, TRACE
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import clone
from moecc.ir.text import format_node
from moecc.ir.unroll import unrolled
from moecc.support.text import capped, with_article
from moecc.translate.propose import check_target as check_target
from moecc.translate.propose import propose as propose
from moecc.translate.propose import targets as targets
from moecc.types import Extent, Size, TensorType
from moecc.weights.expr import Expr, Source
from moecc.weights.movement import Concat, Index, Merge, Permute, Rename, Slice, Split, Stack, Tile
from moecc.weights.simplify import simplify

if TYPE_CHECKING:
    from moecc.backend import EmittedProgram

# Invert a family's weight expressions: from a parameter to the tensors it is read from.
#
# A family reads a parameter by moving data only: it stacks, cuts, renames or permutes tensors. Each
# of these can be inverted, so an expression for the parameter yields one for every tensor.  A
# tensor of which several parameters read a part each is put together when all parts are there.

Pair = tuple[Expr, Expr]


def tensors_of(pairs: Iterable[Pair]) -> list[tuple[str, Expr]]:
    """Return the tensors that all parameters of a model are read from, and an expression for each.

    Args:
      pairs: for each parameter how it is read, and what it is.

    Raises:
      ValueError: a parameter is read otherwise than by invertible movements, or a part of a tensor
        is read by none.
    """
    tensors: list[tuple[str, Expr]] = []
    parts = _Parts()
    for pair in pairs:
        stack: list[Pair] = [pair]
        while stack:
            pattern, value = stack.pop()
            if isinstance(pattern, Source):
                tensors.append((pattern.name, simplify(value)))
            elif isinstance(pattern, Slice) or (
                isinstance(pattern, Index) and pattern.x.type[pattern.axis].size != 1
            ):
                stack.extend(parts.add(pattern, value))
            else:
                stack.extend(reversed(_undone(pattern, value)))
    parts.require_complete()
    return tensors


@dataclass
class _Parts:
    """Parts of expressions, each given by another parameter, until all of one are there."""

    pending: dict[tuple[Expr, str], dict[int, Pair]] = field(default_factory=dict)

    def add(self, pattern: Expr, value: Expr) -> list[Pair]:
        """Take what a slice or an entry of an expression is; return the whole once it is known."""
        assert isinstance(pattern, Slice | Index), "the patterns of parts"
        at = pattern.start if isinstance(pattern, Slice) else pattern.at
        key = (pattern.x, pattern.axis)
        parts = self.pending.setdefault(key, {})
        parts[at] = (pattern, value)
        expr = _joined(pattern, [parts[at] for at in sorted(parts)])
        if expr is None:
            return []
        del self.pending[key]
        return [(pattern.x, expr)]

    def require_complete(self) -> None:
        """Raise ValueError if a part was never given."""
        for parts in self.pending.values():
            pattern, _ = next(iter(parts.values()))
            raise ValueError(f"{pattern} cannot be inverted: the rest of it is read by nothing")


def _joined(pattern: Slice | Index, parts: list[Pair]) -> Expr | None:
    """Return the whole of which `parts` are the parts, in order, or None if one is missing."""
    size = pattern.x.type[pattern.axis].fixed_size
    values = tuple(value for _, value in parts)
    if isinstance(pattern, Index):
        position = pattern.x.type.names.index(pattern.axis)
        return Stack(values, pattern.axis, position) if len(parts) == size else None
    slices = [part for part, _ in parts if isinstance(part, Slice)]
    ends = [0, *(part.stop for part in slices)]
    if len(slices) < len(parts) or ends[-1] != size:
        return None
    is_complete = all(part.start == end for part, end in zip(slices, ends, strict=False))
    return Concat(values, pattern.axis) if is_complete else None


def _undone(pattern: Expr, value: Expr) -> list[Pair]:
    """Return each operand of `pattern` with what it must be if `pattern` is `value`."""
    match pattern:
        case Stack():
            return [(x, _at(value, pattern.axis, i)) for i, x in enumerate(pattern.xs)]
        case Concat():
            return _cut(pattern, value)
        case Index() if pattern.x.type[pattern.axis].size == 1:
            return [(pattern.x, _with_axis(pattern, value))]
        case Permute():
            return [(pattern.x, Permute(value, pattern.x.type.names))]
        case Rename():
            return [(pattern.x, Rename(value, pattern.new, pattern.old))]
        case Split():
            names = tuple(name for name, _ in pattern.into)
            return [(pattern.x, Merge(value, names, pattern.axis))]
        case Merge():
            into = tuple((name, pattern.x.type[name].fixed_size) for name in pattern.axes)
            return [(pattern.x, Split(value, pattern.into, into))]
    raise ValueError(f"{pattern} cannot be inverted")


def _at(value: Expr, axis: str, position: int) -> Expr:
    """Return one position of an axis; common cases directly, others are simplified later."""
    if isinstance(value, Stack) and value.axis == axis:
        return value.xs[position]
    if isinstance(value, Tile) and value.axis == axis:
        return value.x
    return Index(value, axis, position)


def _with_axis(pattern: Index, value: Expr) -> Expr:
    """Return `value` with the size-1 axis that `pattern` removes."""
    if isinstance(value, Index) and value.axis == pattern.axis:
        type = value.x.type
        if type.names == pattern.x.type.names and type.shape == pattern.x.type.shape:
            return value.x
    return Stack((value,), pattern.axis, pattern.x.type.names.index(pattern.axis))


def _cut(pattern: Concat, value: Expr) -> list[Pair]:
    pairs: list[Pair] = []
    start = 0
    for x in pattern.xs:
        size = x.type[pattern.axis].fixed_size
        pairs.append((x, Slice(value, pattern.axis, start, start + size)))
        start += size
    return pairs


# Mapping one graph onto another, from the outputs, in lock step, without recursion.
#
# Two graphs compute the same if the same operations connect the same outputs and the same
# inputs, up to names, locations, and the order of commutative operands.  The result maps the
# parameters of one to those of the other.

MOST_DIFFERENCES = 5

UNWRITTEN = (LOSS, METRIC, TRACE)
"""How the names begin of outputs for training or monitoring; no family writes them."""


def _structure_keys(*graphs: Graph) -> dict[Value, int]:
    """Return for each value a number that values share iff they are computed alike.

    Parameters are alike if their axes are.  Structures are numbered, not hashed, so two
    different ones never get the same number.
    """
    numbers: dict[Hashable, int] = {}
    keys: dict[Value, int] = {}
    for graph in graphs:
        for value in (*graph.inputs.values(), *graph.params.values()):
            keys[value] = numbers.setdefault(_leaf(value), len(numbers))
        for node in graph:
            operands = [keys[v] for v in node.operands]
            if node.op.commutative:
                operands.sort()
            structure = (*_local(node), tuple(operands))
            for value in node.results:
                keys[value] = numbers.setdefault((structure, value.index), len(numbers))
    return keys


def _leaf(value: Value) -> Hashable:
    return ("param" if value.is_param else value.name, _axes(value.type))


def _local(node: Node) -> tuple[Hashable, ...]:
    return (node.op.name, *node.attrs.items())


def _axes(type: TensorType) -> frozenset[tuple[str, Hashable]]:
    """Return the axes of `type` as a set; extents are compared elsewhere."""
    return frozenset(
        (a.name, a.size.kind if isinstance(a.size, Extent) else a.size) for a in type.axes
    )


@dataclass
class _Matcher:
    target: Graph
    graph: Graph
    keys: dict[Value, int]
    weights: dict[Value, Expr] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def run(self) -> None:
        theirs = self.target.outputs
        ours = {n: v for n, v in self.graph.outputs.items() if not n.startswith(UNWRITTEN)}
        if theirs.keys() != ours.keys():
            expected, outputs = ", ".join(theirs), ", ".join(ours)
            hint = "a family's model has no other outputs"
            self.problems.append(
                Problem("the graph has other outputs", None, expected, outputs, hint)
            )
            return
        stack = [(value, ours[name]) for name, value in theirs.items()]
        seen = set(stack)
        while stack:
            pair = stack.pop()
            following = [p for p in self._step(*pair) if p not in seen]
            seen.update(following)
            stack.extend(reversed(following))

    def _step(self, a: Value, b: Value) -> Iterator[tuple[Value, Value]]:
        """Compare a value of the target with one of ours; yield the pairs to compare next."""
        if a.is_param and b.is_param:
            self._bind(a, b)
        elif a.node is not None and b.node is not None and _same_operation(a, b):
            if _local(a.node) != _local(b.node):
                self._part(a, b)
            yield from zip(a.node.operands, self._ordered(a.node, b.node), strict=True)
        elif not (_is_input(a) and _is_input(b) and _leaf(a) == _leaf(b)):
            self._part(a, b)

    def _ordered(self, a: Node, b: Node) -> list[Value]:
        """Return the operands of `b` in the order of the matching operands of `a`."""
        if not a.op.commutative:
            return b.operands
        swapped = b.operands[::-1]
        return swapped if self._alike(a, swapped) > self._alike(a, b.operands) else b.operands

    def _alike(self, a: Node, operands: list[Value]) -> int:
        """Count the operands that agree; those of the same operation count a little."""
        score = 0
        for mine, operand in zip(a.operands, operands, strict=True):
            if self.keys[mine] == self.keys[operand]:
                score += 4
            elif _kind(mine) == _kind(operand):
                score += 1
        return score

    def _bind(self, a: Value, b: Value) -> None:
        if _axes(a.type) != _axes(b.type):
            self._part(a, b)
            return
        if b.weight is None:
            fault = "the parameter has no weight, so it cannot be written"
            self.problems.append(Problem(fault, f"%{b.name}"))
            return
        weight = b.weight
        if b.type.names != a.type.names:
            weight = Permute(weight, a.type.names)
        before = self.weights.setdefault(a, weight)
        if before is not weight and simplify(before) is not simplify(weight):
            fault = f"{self.target.name} has one tensor where the graph has two different ones"
            self.problems.append(Problem(fault, f"%{b.name}", f"the weight of %{a.name}"))

    def _part(self, a: Value, b: Value) -> None:
        loc = b.node.loc if b.node is not None else b.loc
        self.problems.append(
            Problem(
                f"the graph is not {with_article(self.target.name)}: first difference",
                loc or None,
                _line(a),
                _line(b),
            )
        )


def _same_operation(a: Value, b: Value) -> bool:
    """Whether two results come of the same operation, whatever its attributes and operands are."""
    assert a.node is not None
    assert b.node is not None
    same = a.node.op is b.node.op and a.index == b.index
    return same and len(a.node.operands) == len(b.node.operands)


def _is_input(value: Value) -> bool:
    return value.node is None and not value.is_param


def _kind(value: Value) -> str:
    return value.node.op.name if value.node is not None else str(value.is_param)


def _line(value: Value) -> str:
    if value.node is not None:
        return format_node(value.node)
    return f"{'param' if value.is_param else 'input'} %{value.name} : {value.type}"


READ = ("tokens", "pixels", "features", "audio")
"""The inputs that models read: text, images, speech."""


@dataclass(frozen=True)
class Export:
    """The content of a checkpoint of a target family.

    Attributes:
      config: the typed config.
      tensors: the tensors by their names on disk, in the order of the model, with the expressions
        of their values; each name once.
      up_to: how far the family is from holding the graph, as of a promise; empty if it holds it.
    """

    config: ModelConfig
    tensors: list[tuple[str, Expr]]
    up_to: str = field(default="", kw_only=True)

    @property
    def config_json(self) -> dict[str, object]:
        """config.json, with the keys of transformers 4 and 5 side by side."""
        return self.config.to_json()

    @property
    def stored(self) -> list[tuple[str, Expr]]:
        """The tensors as they are written, those of a wrapper among them."""
        return self.tensors


@dataclass(frozen=True)
class WrappedExport(Export):
    """A text model that is put back into the model that holds it.

    Attributes:
      source: the text model that was read, with the other tensors.
    """

    source: WrappedText

    @property
    def stored_config(self) -> dict[str, object]:
        """config.json of the wrapper, with the text model's as a part."""
        return self.source.config_with(self.config_json)

    @property
    def stored(self) -> list[tuple[str, Expr]]:
        """The text model's tensors under their names in the wrapper, and the others."""
        text = [(self.source.stored_name(name), expr) for name, expr in self.tensors]
        return [*text, *self.source.other_tensors()]

    @property
    def untouched(self) -> Container[str]:
        """The tensors that are not the text model's."""
        return self.source.others


@dataclass(frozen=True)
class EmittedExport(Export):
    """A graph in the general layout, with the program that computes it beside its tensors.

    Attributes:
      program: the program.
    """

    program: EmittedProgram

    @property
    def config_json(self) -> dict[str, object]:
        """config.json: the graph, and what transformers reads of it."""
        return {**self.config.to_json(), **self.program.config}


def export_emitted(graph: Graph, language: str) -> EmittedExport:
    """Return `graph` as a checkpoint with a program in `language`; no weight is read.

    Raises:
      UsageError: there is no such language.
      InputError: the graph cannot be written in it.
    """
    flat = unrolled(graph)
    flat = clone(flat) if flat is graph else flat
    from moecc.backend import emit_program

    program = emit_program(flat, language)
    rename_params(flat, program.params)
    config = propose(flat, FAMILY)
    if isinstance(config, list):
        raise InputError(config)
    return EmittedExport(config, list(graph_tensors(flat).items()), program)


def rename_params(graph: Graph, names: Mapping[str, str]) -> None:
    """Rename the parameters of `graph`, which keep their order."""
    params = list(graph.params.values())
    wanted = [names.get(value.name, value.name) for value in params]
    for value, name in zip(params, wanted, strict=True):
        if value.name != name:  # the name may still be that of another
            graph.rename(value, graph.fresh(f"renamed.{name}"))
    for value, name in zip(params, wanted, strict=True):
        graph.rename(value, name)
    graph.order_params(params)


def export_graph(
    graph: Graph, target: str, *, layout: str = "experts", source: ModelConfig | None = None
) -> Export:
    """Return `graph` as a checkpoint of the family `target`; no weight is read.

    The target builds its own graph for the proposed config, and that graph is mapped onto `graph`,
    its repeated layers unrolled, from the outputs: the target computes the exported model.
    `layout` is one of `moecc.families.graphs.parameters.LAYOUTS`;
    `source` is the config of the source, if it has been read.

    Raises:
      UsageError: there is no such family.
      InputError: the family cannot express the graph; all reasons, or the first differences.
    """
    graph = unrolled(graph)
    config = propose(graph, target, source)
    if not isinstance(config, ModelConfig):
        raise InputError(config)
    if target == FAMILY:
        return Export(config, list(graph_tensors(graph).items()))
    batch, seq, decoder_seq = _token_sizes(graph)
    wanted = build_model(
        config,
        layout=layout,
        padding="mask" in graph.inputs,
        batch=batch,
        seq=seq,
        decoder_seq=decoder_seq,
    )
    matcher = _Matcher(wanted, graph, _structure_keys(wanted, graph))
    matcher.run()
    if matcher.problems:
        problems = capped(matcher.problems, "difference", "differences", MOST_DIFFERENCES)
        raise InputError(problems)
    weights = matcher.weights
    pairs = [(v.weight, weights[v]) for v in wanted.params.values() if v.weight is not None]
    tensors = dict(tensors_of(pairs))
    names = config.names
    if config.model_type == "switch_transformers" and not config.is_tied:
        # Without a tie transformers 5 expects an embedding in either stack.
        tensors.update(dict.fromkeys(names.copies, tensors[names.embedding]))
    if graph.family == target and config.is_complete:
        return Export(config, list(tensors.items()))
    config, added = config.completed()
    return Export(config, [*tensors.items(), *added.items()], up_to=config.others_up_to)


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
