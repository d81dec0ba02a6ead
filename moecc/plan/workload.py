"""The work of a step, read from the graph once: its layers, their products and residuals.

Equal layers are one `Part` with a count, so that a plan of a deep model costs no more than that of
a shallow one.  Sizes are global; a layout divides them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod

from moecc.analysis import ATTRIBUTE, trainable
from moecc.errors import InputError
from moecc.families.experts import choices_kept, rows_of, rows_per_token
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.mesh import mesh_of
from moecc.ir.ops.contraction import ProductOp
from moecc.ir.ops.routing import RouteOp
from moecc.ir.ops.slots import SlotsOp, assigner
from moecc.ir.structure import clone, length_bounds, worked_on
from moecc.ir.traits import RowMove
from moecc.plan.parts import (
    LAYER,
    GlobalShape,
    Part,
    PlannedHead,
    PlannedLayer,
    Shapes,
    StepParts,
    Unit,
    Weight,
    attention_of,
    head_of,
    layer_of,
    residuals,
    root_of,
    stack_of,
    times_again,
    units_of,
)
from moecc.plan.step import REMATS
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.assign import ROWS, Assigner, Site, cuts_of, sites_of
from moecc.sharding.collectives import (
    GradientFlow,
    Gradients,
    dependence,
    gradients,
    sent,
    steps,
)
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import Alike, Propagation, propagate
from moecc.types import F32, Axis, TensorType

TOKENS_PER_DEVICE = 4096
"""The default tokens of a device, made whole sequences."""

DECODER_LENGTH = 4096
ENCDEC_LENGTHS = (512, 114)
"""The default lengths; of an encoder-decoder those of ST-MoE's pre-training (§6)."""


@dataclass(frozen=True)
class Batch:
    """A batch of sequences.

    Attributes:
      sequences: how many.
      lengths: the tokens of one by the variable of the graph, of the encoder before the decoder.
      caches: the variables that are lengths of caches, whose tokens are not those of a step.
    """

    sequences: int
    lengths: tuple[tuple[str, int], ...]
    caches: frozenset[str] = frozenset()

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one sequence, of encoder and decoder together; where sizes are fixed, one."""
        return sum(length for name, length in self.lengths if name not in self.caches) or 1

    @property
    def tokens(self) -> int:
        """Tokens of the batch; where all sizes are fixed, its inputs."""
        return self.sequences * self.sequence_tokens

    def size(self, variable: str) -> int:
        """Return the size that a variable of the graph stands for."""
        return dict(self.lengths).get(variable, self.sequences)


def length_variables(graph: Graph) -> tuple[str, ...]:
    """Return the variables that stand for lengths in `graph`, the encoder's first."""
    variables: dict[str, None] = {}
    for value in graph.inputs.values():
        for axis in value.type:
            if axis.name != "batch" and isinstance(axis.size, str):
                variables[axis.size] = None
    return tuple(variables)


def make_batch(
    graph: Graph,
    devices: int,
    tokens: int | None = None,
    lengths: tuple[int, ...] | None = None,
    micro_batches: int = 1,
) -> Batch:
    """Return a micro-batch of the batch of `tokens` tokens, in sequences of `lengths`.

    Args:
      graph: has the lengths.
      devices: for the default: at least so many sequences, and 4,096 tokens a device, with those
        that caches hold.
      tokens: of the batch, encoder and decoder together.
      lengths: of one sequence, by stack.
      micro_batches: parts of the batch.

    Raises:
      InputError: the graph has another number of lengths, or fewer positions, its caches are too
        short, or the batch is not whole sequences, or not as many in each micro-batch.
    """
    single = _sequence(graph, lengths)
    each = single.sequence_tokens
    if tokens is None:
        held = sum(length for _, length in single.lengths) or 1
        tokens = devices * each * max(1, TOKENS_PER_DEVICE // held)
    if tokens % each or tokens < each:
        near = max(1, (tokens + each // 2) // each) * each
        raise InputError(
            "the batch is not whole sequences",
            expected=f"a multiple of {each} tokens", found=str(tokens), hint=f"{near} would be",
        )  # fmt: skip
    sequences, odd = divmod(tokens // each, micro_batches)
    if odd:
        raise InputError(
            "the batch is not whole micro-batches",
            expected=f"a multiple of {micro_batches} sequences", found=str(tokens // each),
            hint=f"{max(1, sequences) * micro_batches * each} would be",
        )  # fmt: skip
    return replace(single, sequences=sequences)


def _sequence(graph: Graph, lengths: tuple[int, ...] | None) -> Batch:
    """Return a batch of one sequence, whose lengths the graph can have."""
    names, most, caches = length_variables(graph), length_bounds(graph), _cache_lengths(graph)
    if lengths is None:
        usual = _usual_lengths(names, caches)
        lengths = tuple(min(n, most.get(v, n)) for v, n in zip(names, usual, strict=True))
    if len(lengths) != len(names):
        expected = f"{len(names)}, of {' and '.join(names)}" if names else "none"
        raise InputError(
            "another number of sequence lengths", expected=expected, found=str(len(lengths))
        )
    batch = Batch(1, tuple(zip(names, lengths, strict=True)), caches)
    stated = ",".join(map(str, lengths))
    if longer := [name for name, size in batch.lengths if size > most.get(name, size)]:
        expected = " and ".join(f"{name} at most {most[name]}" for name in longer)
        reason = "sequences are longer than the model has positions"
        raise InputError(reason, expected=expected, found=stated)
    if short := [name for name in caches if batch.size(name) < batch.sequence_tokens]:
        expected = f"{short[0]} at least {batch.sequence_tokens}"
        raise InputError("caches are shorter than what is put in", expected=expected, found=stated)
    return batch


def _cache_lengths(graph: Graph) -> frozenset[str]:
    """Return the variables that are lengths of caches: of inputs that are outputs, too."""
    caches = (value for name, value in graph.inputs.items() if name in graph.outputs)
    axes = (axis for value in caches for axis in value.type if axis.name != "batch")
    return frozenset(axis.size for axis in axes if isinstance(axis.size, str))


def _usual_lengths(names: tuple[str, ...], caches: frozenset[str]) -> tuple[int, ...]:
    """Return lengths where none are given; of a graph with caches, one token behind a text."""
    if caches:
        return tuple(DECODER_LENGTH if name in caches else 1 for name in names)
    return ENCDEC_LENGTHS if len(names) == 2 else (DECODER_LENGTH,) * len(names)


# One layer of each kind: the nodes whose sharding determines that of the whole model.

SentStep = tuple[str, tuple[str, ...], TensorType]
"""An operation, its mesh axes and the larger type, see `moecc.sharding.collectives.sent`."""

Found = tuple[Propagation, Gradients]
"""The shardings of values, and the sums of the backward pass."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One layer of each kind, and what propagation reads of it.

    Attributes:
      graph: the layers, a graph of their own: passes may change the model meanwhile.
    """

    graph: Graph
    _found: Alike[Found] = field(default_factory=Alike)
    _alone: dict[GlobalShape, tuple[TensorType, Sequence[Axis]]] = field(default_factory=dict)
    _sent: dict[tuple[TensorType, TensorType], tuple[SentStep, ...]] = field(default_factory=dict)

    @cached_property
    def sites(self) -> Mapping[Node, Site]:
        """The nodes as propagation sees them, in order."""
        return {site.node: site for site in sites_of(self.graph)}

    @cached_property
    def _cuts(self) -> Mapping[str, set[int]]:
        return cuts_of(self.sites.values())

    @cached_property
    def _depends(self) -> GradientFlow:
        return dependence(self.sites.values(), self.graph.inputs.values())

    def shard(self, layout: Layout) -> Found:
        """Return how the values are sharded under a layout, and what the backward pass sums.

        Raises:
          InputError: an operation cannot take its operands.
        """
        return self._found.under(layout, None, self._shard)

    def alone(self, shape: GlobalShape, layout: Layout) -> TensorType:
        """Return how a value of `shape` is sharded that is looked at by itself.

        The groups of rows, which a shape counts as slots, are an axis of their own.
        """
        if shape not in self._alone:
            self._alone[shape] = _alone(shape)
        return layout.assigner.lone(*self._alone[shape])

    def resharded(self, source: TensorType, target: TensorType) -> tuple[SentStep, ...]:
        """Return the collectives that bring a value of type `source` to where `target` is."""
        key = (source, target)
        if key not in self._sent:
            self._sent[key] = tuple(sent(source, steps(source, target)))
        return self._sent[key]

    def _shard(self, assigner: Assigner) -> Found:
        sites, graph = tuple(self.sites.values()), self.graph
        inputs, params = graph.inputs.values(), graph.params.values()
        propagation = propagate(sites, inputs, params, assigner, self._cuts)
        return propagation, gradients(sites, propagation, self._depends)


def sample_of(
    graph: Graph, chosen: Collection[Node], same: Mapping[Value, Value]
) -> tuple[Sample, dict[Node, Node]]:
    """Return the sample of `graph` that has the nodes `chosen`, and its node for each of them.

    Args:
      graph: the model.
      chosen: the nodes of one layer of each kind.
      same: by the value of a node that is left out, that of the node that stands for it.
    """
    copy, nodes = Graph(graph.name), dict[Node, Node]()
    values = {value: copy.input(name, value.type) for name, value in graph.inputs.items()}
    operands_of_all = {v for node in chosen for v in node.operands}
    for name, value in graph.params.items():
        # What nothing takes is stored all the same.
        if value in operands_of_all or not value.users:
            values[value] = copy.param(name, value.type)
    for node in graph:
        if node not in chosen:
            continue
        values.update((v, values[same[v]]) for v in node.operands if v in same)
        nodes[node] = copy.copy(node, values)
    return Sample(copy), nodes


def _alone(shape: GlobalShape) -> tuple[TensorType, Sequence[Axis]]:
    """Return a type of `shape`, and the axes that run beside it where it is used."""
    if shape.has_slots:
        axes = [Axis("group", "group"), *(Axis(name, name) for name in shape.names)]
        return TensorType(F32, tuple(axes)), ()
    axes = [Axis(name, int(size) if size == int(size) else name) for name, size in shape]
    # An axis of this name meets rows; that of a router's choices has another.
    return TensorType(F32, tuple(axes)), ROWS if "expert" in shape.names else ()


HEADS = ("head", "kv_head")


@dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
      batch: the batch.
      parts: the sublayers and what stands before and after them.
      layers: the layers.
      weights: all parameters; of equal ones the first, with their number.
      experts: how many experts a layer has at most, 0 in a dense model.
      dropless: whether the experts take every token.
      tensor_sizes: the axes that ``model`` has to divide: heads and neurons.
      sample: one part of each kind, as a graph of its own.
      params: the parameters of the sample, by name.
      params_by_kind: one of each shape, of experts or not.
      head: what makes logits; None where there are none to train.
      features: the shapes of inputs that are no tokens: pixels of images, spectra of sounds.
    """

    batch: Batch
    parts: tuple[Part, ...]
    layers: tuple[PlannedLayer, ...]
    weights: tuple[tuple[Weight, int], ...]
    experts: int
    dropless: bool
    tensor_sizes: dict[str, int]
    sample: Sample = field(compare=False)
    params: dict[str, Value] = field(compare=False)
    params_by_kind: dict[tuple[GlobalShape, bool], Value] = field(compare=False)
    head: PlannedHead | None = field(compare=False)
    features: Shapes

    def __repr__(self) -> str:
        return f"Workload({self.parameters} parameters, {self.batch})"

    @cached_property
    def logits(self) -> Shapes:
        """The shapes of values over the vocabulary."""
        shapes = (s for p in self.parts for step in p.steps for s in step.results)
        return tuple(dict.fromkeys(s for s in shapes if "vocab" in s.names))

    @cached_property
    def remats(self) -> tuple[str, ...]:
        """The rematerialisation policies that differ in their cost.

        Without loops within a block ``block`` is ``full``.
        """
        has_loops = any(part.onward for part in self.parts)
        return tuple(r for r in REMATS if has_loops or r != "block")

    @property
    def model_flops(self) -> float:
        """FLOPs of the forward pass that the model asks for: without the padding of a capacity.

        Of choices those that have a slot where experts are evenly chosen.
        """
        return sum(p.count * s.flops * s.exact_rows for p in self.parts for s in p.steps)

    @property
    def frozen_flops(self) -> float:
        """FLOPs by which a backward pass is less than twice the forward pass: of frozen gradients.

        What comes before the first parameter that is trained counts nevertheless.
        """
        less = ((p.count * (2 - s.backward), s) for p in self.parts for s in p.steps)
        return sum(count * s.flops * s.exact_rows for count, s in less if count)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(count * weight.elements for weight, count in self.weights)


def planned_graph(graph: Graph, train: bool) -> Graph:
    """Return `graph`, which stays as it is, with what every step fuses: as a plan takes it.

    Rolled layers are left to the plan, which rejects them.

    Args:
      graph: the model's.
      train: whether the step is one of training, which weights rows at their experts.
    """
    if any(node.body is not None for node in graph):
        return graph
    fused = clone(graph)
    text = "fuse-attention,weight-rows" if train else "fuse-attention"
    context = Context(allow_unmatched=True)
    run_pipeline(fused, Pipeline.parse(text, installed()), context=context)
    return fused


def workload(graph: Graph, batch: Batch) -> Workload:
    """Read from `graph` what a step of `batch` computes.

    Raises:
      InputError: its layers are rolled, or it is on a mesh.
    """
    if any(node.body is not None for node in graph):
        raise InputError(
            "rolled layers cannot be planned", where=graph.name, hint="-p unroll-layers undoes it"
        )
    if mesh_of(graph) is not None:
        raise InputError(
            "the graph is on a mesh already", where=graph.name, hint="-p strip-sharding"
        )
    slots = _slots(graph)
    reader = _Reader(graph, batch)
    sample, parts = reader.sampled()
    return Workload(
        batch=batch,
        parts=parts,
        layers=tuple(reader.layers()),
        weights=tuple(reader.weights()),
        experts=max((attrs.experts for attrs in slots), default=0),
        dropless=all(attrs.slots == "ragged" for attrs in slots),
        tensor_sizes=_tensor_sizes(graph),
        sample=sample,
        params=sample.graph.params,
        params_by_kind=reader.kinds(sample.graph.params.values()),
        head=head_of(graph, reader.shape, reader.weight),
        features=tuple(
            reader.shape(v) for v in graph.inputs.values() if v.type.dtype.kind == "float"
        ),
    )


def _slots(graph: Graph) -> list[SlotsOp]:
    """Return how slots are assigned to the rows of each expert layer, whoever chooses."""
    sent = (node for node in graph if node.op.moves is RowMove.TO_SLOTS)
    return [SlotsOp.of_node(assigner(node.operands[2])) for node in sent]


def _tensor_sizes(graph: Graph) -> dict[str, int]:
    """Return for heads and neurons the size that the ``model`` axis has to divide."""
    sizes: dict[str, int] = {}
    for value in (v for node in graph for v in node.results):
        for axis in value.type:
            if axis.name in (*HEADS, "mlp") and isinstance(axis.size, int):
                sizes[axis.name] = min(axis.size, sizes.get(axis.name, axis.size))
    return sizes


class _Reader:
    """Reads shapes and groups nodes; holds what the graph's values look like."""

    def __init__(self, graph: Graph, batch: Batch) -> None:
        self.graph = graph
        self.batch = batch
        self.seen: set[Value] = set()
        self.same: dict[Value, Value] = {}
        self.shares: dict[Value, float] = {}
        self.shapes: dict[tuple[TensorType, bool], GlobalShape] = {}
        self.shape_of = cache(GlobalShape)
        self.trained = trainable(graph) if ATTRIBUTE in graph.attrs else {}
        self.nodes: dict[str, list[Node]] = {}
        self.units = units_of(graph, self.shape)
        for node in graph:
            self.nodes.setdefault(layer_of(node.loc), []).append(node)
        self.residuals = {at: residuals(nodes, self.shape) for at, nodes in self.nodes.items()}

    def _at(self, loc: str) -> tuple[int, Unit]:
        """Return the number of a layer in its unit, and the unit."""
        match = LAYER.match(loc)
        if match is None:
            return 0, Unit((False,))
        unit = self.units[match[1]]
        return int(match[2]) % unit.size, unit

    def shape(self, value: Value) -> GlobalShape:
        """Return the global shape of a value."""
        type = value.type
        of_experts = "slot" in type or self.of_experts(value)
        if type.extents:
            return self.shape_of(tuple(self._axes(value, of_experts)))
        if (type, of_experts) not in self.shapes:
            self.shapes[type, of_experts] = self.shape_of(tuple(self._axes(value, of_experts)))
        return self.shapes[type, of_experts]

    def _axes(self, value: Value, of_experts: bool) -> Iterator[tuple[str, float]]:
        for axis in value.type:
            if axis.name == "group":
                continue
            if axis.name == "slot" and not isinstance(axis.size, int):
                yield "slot", self._slots(value)
            elif axis.name == "expert" and not of_experts:
                yield "choices", self._size(axis.size)
            else:
                yield axis.name, self._size(axis.size)

    def _size(self, size: object) -> float:
        return float(size) if isinstance(size, int) else float(self.batch.size(str(size)))

    def _slots(self, value: Value) -> float:
        """Return the mean rows of an expert, all groups together."""
        slots = setter_of(value.type.extents[0])
        node = assigner(slots)
        tokens = prod(self._size(slots.type[n].size) for n in SlotsOp.of_node(node).tokens)
        return tokens * rows_per_token(value) / self._size(value.type["expert"].size)

    def of_experts(self, value: Value) -> bool:
        """Whether a parameter has a part for each expert, which meets rows."""
        return (
            value.is_param
            and "expert" in value.type
            and any("slot" in v.type for node in value.users for v in node.operands)
        )

    def weight(self, value: Value) -> Weight:
        """Return the parameter `value`."""
        trained = self.trained.get(value.name, True)
        return Weight(value.name, self.shape(value), self.of_experts(value), trained)

    def weights(self) -> Iterator[tuple[Weight, int]]:
        """Yield the parameters, equal ones as one with their number."""
        counts: dict[object, list[Weight]] = {}
        for value in self.graph.params.values():
            weight = self.weight(value)
            counts.setdefault(replace(weight, name=""), []).append(weight)
        yield from ((equal[0], len(equal)) for equal in counts.values())

    def layers(self) -> Iterator[PlannedLayer]:
        """Yield the layers, equal ones as one."""
        layers: dict[object, PlannedLayer] = {}
        for loc, nodes in self.nodes.items():
            match = LAYER.match(loc)
            if match is None:
                continue
            saved = self.residuals[loc]
            name, inputs = match[1].rstrip("."), tuple(self._inputs(nodes))
            at, unit = self._at(loc)
            first, beside = at == 0, self._beside(loc, unit)
            in_blocks = self._beside(loc, unit.as_whole)
            layer = PlannedLayer(name, 1, saved, inputs, first, beside, in_blocks)
            key = (name, saved.key, inputs, first, beside, in_blocks)
            old = layers.get(key)
            layers[key] = layer if old is None else replace(old, count=old.count + 1)
        yield from layers.values()

    def _beside(self, loc: str, unit: Unit) -> tuple[Shapes, Shapes]:
        """Return what there is of the layers before `loc` in `unit`."""
        (at, _), name = self._at(loc), loc.rstrip("0123456789")
        number = int(loc.removeprefix(name))
        plain: list[GlobalShape] = []
        fused: list[GlobalShape] = []
        for back in range(1, at + 1):
            earlier = f"{name}{number - back}"
            saved = self.residuals[earlier]
            inputs = tuple(self._inputs(self.nodes[earlier]))
            looped = unit.looped[at - back]
            plain += inputs if looped else saved.plain.alive
            fused += inputs if looped else saved.fused.alive
        return tuple(plain), tuple(fused)

    def _inputs(self, nodes: list[Node]) -> Iterator[GlobalShape]:
        """Yield what a layer takes from others, once: floating-point values of tokens."""
        results = {v for node in nodes for v in node.results}
        seen: set[Value] = set()
        for value in (v for node in nodes for v in node.operands):
            if value in results or value in seen or value.is_param:
                continue
            seen.add(value)
            # A memory that all layers of a decoder attend to is kept once, behind its encoder.
            loc = value.node.loc if value.node is not None else ""
            carried = "layers." in loc or loc.rpartition(".")[2] == "embed"
            if value.type.dtype.is_float and "batch" in value.type and carried:
                yield self.shape(value)

    def parts(self) -> Iterator[Part]:
        """Yield the parts, equal ones as one."""
        parts: dict[object, Part] = {}
        sublayers: dict[str, list[Node]] = {}
        for node in self.graph:
            sublayers.setdefault(node.loc, []).append(node)
        for loc, nodes in sublayers.items():
            part = self._part(loc, nodes)
            anonymous = tuple(replace(w, name="") for w in part.weights)
            steps = tuple(
                replace(s, weights=tuple(w and replace(w, name="") for w in s.weights))
                for s in part.steps
            )
            key = (part.name, steps, anonymous)
            old = parts.get(key)
            parts[key] = part if old is None else replace(old, count=old.count + 1)
            for node, like in zip(nodes, parts[key].nodes, strict=True):
                self.same.update(zip(node.results, like.results, strict=True))
        yield from parts.values()

    def sampled(self) -> tuple[Sample, tuple[Part, ...]]:
        """Return one part of each kind as a graph, and the parts with its nodes."""
        parts = tuple(self.parts())
        chosen = {node for part in parts for node in part.nodes}
        sample, nodes = sample_of(self.graph, chosen, self.same)
        return sample, tuple(replace(p, nodes=tuple(nodes[n] for n in p.nodes)) for p in parts)

    def kinds(self, params: Iterable[Value]) -> dict[tuple[GlobalShape, bool], Value]:
        """Return one of `params` for each shape, of experts or not."""
        kinds: dict[tuple[GlobalShape, bool], Value] = {}
        for value in params:
            weight = self.weight(value)
            kinds.setdefault((weight.shape, weight.of_experts), value)
        return kinds

    def _part(self, loc: str, nodes: list[Node]) -> Part:
        match = LAYER.match(loc)
        name = f"{match[1]}{match[3] or ''}".rstrip(".") if match else loc or "model"
        number, unit = self._at(loc)
        roots: dict[Value, int] = {}
        weights = tuple(self._new(v for n in nodes for v in n.operands if v.is_param))
        steps = tuple(self._step(node, roots, number, unit) for node in nodes)
        top_k = max((RouteOp.of_node(n).top_k for n in nodes if n.op.routes), default=0)
        in_layer, onward = match is not None, unit.looped[number]
        return Part(name, 1, steps, weights, top_k, in_layer, onward, tuple(nodes))

    def _new(self, params: Iterable[Value]) -> Iterator[Weight]:
        """Yield the parameters that are met for the first time."""
        for value in params:
            if value not in self.seen:
                self.seen.add(value)
                yield self.weight(value)

    def _share_of_user(self, value: Value) -> float:
        """Return the part of `value` that each layer with a user of it stands for.

        Every layer uses the rotary tables, so that their users are counted once.
        """
        if value not in self.shares:
            self.shares[value] = 1 / len({layer_of(n.loc) for n in value.users})
        return self.shares[value]

    def _step(self, node: Node, roots: dict[Value, int], number: int, unit: Unit) -> StepParts:
        saved = self.residuals[layer_of(node.loc)]
        root = root_of(node.operands[0]) if node.operands else None
        outside = root is not None and stack_of(root) != stack_of(node)
        rows = rows_of((*node.operands, *node.results))
        exact = 1.0
        if rows is not None:
            # Choices beyond a capacity are dropped, and ask for nothing.
            exact = choices_kept(rows) / rows_per_token(rows)
        operands = tuple(map(self.shape, node.operands))
        results = tuple(map(self.shape, node.results))
        axes = {name: size for v in worked_on(node) for name, size in self.shape(v)}
        of_own = node in saved.again, node in saved.onward
        return StepParts(
            cost=node.op.cost,
            moves=node.op.moves,
            operands=operands,
            results=results,
            over=ProductOp.of_node(node).over if node.op.is_product else (),
            weights=tuple(self.weight(v) if v.is_param else None for v in node.operands),
            again=times_again(number, unit, *of_own),
            block_again=times_again(number, unit.as_whole, *of_own),
            saved_again=times_again(
                number, unit, node in saved.saved_again, node in saved.saved_onward
            ),
            source=-1 if root is None else roots.setdefault(root, len(roots)),
            source_share=1 / unit.size if outside else 1.0,
            shares=tuple(map(self._share_of_user, node.operands)),
            exact_rows=exact,
            axes=self.shape_of(tuple(axes.items())),
            attention=attention_of(node, self._size, self.shape_of),
        )
