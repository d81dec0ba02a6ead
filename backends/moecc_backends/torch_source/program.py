"""A graph as a list of items: the form in which it is cut into classes and written as text.

Items are few and plain.  Common idioms of a graph are one item each: a linear layer with its
bias, a norm, a look-up, dropout, noise, the experts of a token with what was dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moecc.decoding import rewritten
from moecc.errors import InputError, Problem, raise_problems
from moecc.families.heads import LOGITS
from moecc.ir.conventions import DECODER_TOKENS, TOKENS
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.operand import Attrs
from moecc.ir.operation import OPS
from moecc.ir.ops.attention import LENGTH_SCALINGS
from moecc.ir.structure import clone, infer_again
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.types import I32, Axis, Extent, TensorType
from moecc_backends.torch_source.names import layer_of

ROW = "row"
"""The axis of the rows of experts: groups, experts and their slots in one."""

UNSUPPORTED = {
    "scan": "unroll it first",
    "update_slice": "a graph that decodes already has caches of its own",
    "within_buffer": "strip-sharding removes bounded buffers",
}


@dataclass(eq=False)
class ProgramValue:
    """A value: an input, a parameter, or the result of an item.

    Attributes:
      name: a hint for its name in the text.
      axes: the names of its axes, in order.
      sizes: their sizes; None where a size is not a number.
      kind: ``float``, ``int``, ``bool`` or ``key``.
      param: whether it is a parameter, whose name is then in the checkpoint.
      item: what computes it.
      users: the items that read it, one for each operand.
    """

    name: str
    axes: tuple[str, ...] = ()
    sizes: tuple[int | None, ...] = ()
    kind: str = "float"
    param: bool = False
    item: Item | None = None
    users: list[Item] = field(default_factory=list)

    def size(self, axis: str) -> int:
        """Return the size of an axis; raises InputError where it is not a number."""
        size = self.sizes[self.axes.index(axis)]
        if size is None:
            raise InputError(f"the size of the axis {axis!r} is not known", found=f"%{self.name}")
        return size


@dataclass(eq=False)
class Item:
    """An operation on values.

    Attributes:
      op: its name, that of an operation of the graph or of an idiom.
      operands: what it reads.
      attrs: its attributes.
      results: what it computes.
      loc: its location in the model.
    """

    op: str
    operands: list[ProgramValue]
    attrs: dict[str, object]
    results: tuple[ProgramValue, ...]
    loc: str = ""

    @property
    def result(self) -> ProgramValue:
        """The only result."""
        (var,) = self.results
        return var

    def __repr__(self) -> str:
        names = ", ".join(v.name for v in self.operands)
        return f"{', '.join(v.name for v in self.results)} = {self.op}({names}) @{self.loc}"


@dataclass
class TorchProgram:
    """The items of a model.

    Attributes:
      items: in an order in which they can be computed.
      inputs: the inputs by name.
      params: the parameters by name.
      outputs: the outputs by name.
      tokens: the input whose tokens are continued, if the model generates text.
    """

    items: list[Item] = field(default_factory=list)
    inputs: dict[str, ProgramValue] = field(default_factory=dict)
    params: dict[str, ProgramValue] = field(default_factory=dict)
    outputs: dict[str, ProgramValue] = field(default_factory=dict)
    tokens: str = ""

    def prune(self) -> None:
        """Drop the items of which no output depends, and count the users of all others."""
        needed: set[ProgramValue] = set(self.outputs.values())
        items: list[Item] = []
        for item in reversed(self.items):
            if needed.intersection(item.results):
                items.append(item)
                needed.update(item.operands)
        self.items = items[::-1]
        for item in self.items:
            for var in (*item.operands, *item.results):
                var.users = []
        for item in self.items:
            for var in item.operands:
                var.users.append(item)
        self.params = {name: var for name, var in self.params.items() if var in needed}
        self.inputs = {name: var for name, var in self.inputs.items() if var in needed}


def prepared(graph: Graph) -> Graph:
    """Return a copy of `graph` that is unrolled, on one device, with fused attention."""
    passes = ["unroll-layers"] if any(node.body for node in graph) else []
    passes += ["strip-sharding"] if "mesh" in graph.attrs else []
    return _without_metrics(clone(graph), [*passes, "fuse-attention"])


def in_mode(graph: Graph, mode: str) -> Graph:
    """Return a prepared graph specialised for training or evaluation."""
    return _without_metrics(rewritten(graph, f"specialize{{mode={mode}}}"))


def _without_metrics(graph: Graph, passes: Sequence[str] = ()) -> Graph:
    """Drop metrics and traces, run passes, and remove what no output needs; all in place."""
    for name in [n for n in graph.output_names if n.startswith(("metric.", "trace."))]:
        graph.drop_output(name)
    run_pipeline(graph, Pipeline.parse(",".join([*passes, "dce"])))
    return graph


def program_of(graph: Graph, tokens: Value | None) -> TorchProgram:
    """Return the program of a prepared graph.

    Args:
      graph: changed: positions of continued tokens become an input.
      tokens: the input whose tokens are continued.

    Raises:
      InputError: it has operations that no text is written for.
    """
    if tokens is not None:
        _take_positions(graph, tokens)
    problems = [
        Problem(f"{node.op.name} cannot be written as a program", where(node), hint=hint)
        for node in graph
        if (hint := UNSUPPORTED.get(node.op.name)) or node.op.opaque or node.op.collective
    ]
    raise_problems(problems)
    program = TorchProgram(tokens=tokens.name if tokens is not None else "")
    images: dict[Value, ProgramValue] = {}
    for table, values, is_param in (
        (program.inputs, graph.inputs, False),
        (program.params, graph.params, True),
    ):
        for name, value in values.items():
            images[value] = table[name] = _var(value, is_param=is_param)
    for node in graph:
        _append(program, node, images)
    program.outputs = {name: images[value] for name, value in graph.outputs.items()}
    program.prune()
    for idiom in IDIOMS:
        for item in program.items:
            idiom(item)
        program.prune()
    _add_top_k_indices(program)
    _merge_equal(program)
    program.prune()
    _name_outputs(program)
    return program


def _merge_equal(program: TorchProgram) -> None:
    """Let items of one location that compute the same be one; constants stay where they are."""
    images: dict[ProgramValue, ProgramValue] = {}
    first_items: dict[tuple[object, ...], Item] = {}
    for item in program.items:
        item.operands = [images.get(v, v) for v in item.operands]
        if item.loc == "encoder.memory":
            item.result.name = "memory"
        is_drawn = item.op in ("dropout", "jitter", "add_noise", "keep_choices")
        if not item.operands or is_drawn:
            continue
        key = (item.loc, item.op, repr(item.attrs), *map(id, item.operands))
        first = first_items.setdefault(key, item)
        images.update(zip(item.results, first.results, strict=True))
    program.outputs = {name: images.get(v, v) for name, v in program.outputs.items()}


def _name_outputs(program: TorchProgram) -> None:
    """Name logits and losses after outputs, losses of layers after the output of their sum."""
    for name in ("logits", LOGITS):
        if name in program.outputs:
            program.outputs[name].name = "logits"
    outputs = {var: loss_name(name) for name, var in program.outputs.items() if "loss." in name}
    for item in reversed(program.items):
        for var in item.results:
            name = outputs.get(var, "")
            names = [u.result.name for u in var.users if u.loc == "loss"]
            names = [n for n in names if n.endswith("_loss") and n != "aux_loss"]
            if name or (names and not var.axes):
                var.name = name or names[0]
            elif item.loc == "loss" and names:
                var.name = names[0]


def loss_name(output: str) -> str:
    """Return the name of an output, ``loss.router_z``, as transformers has losses."""
    name = output.removeprefix("loss.").replace(".", "_")
    return "aux_loss" if name == "auxiliary" else f"{name}_loss"


def add_evaluation(program: TorchProgram, evaluation: TorchProgram) -> None:
    """Let slots be assigned in training as `program` has it, and otherwise as `evaluation` has it.

    Raises:
      InputError: the two differ in more than noise, capacities and what is kept.
    """
    if _census(program) != _census(evaluation):
        raise InputError(
            "training and evaluation differ in more than capacity, policy and noise",
            hint="specialize{mode=eval} writes the graph of evaluation alone",
        )
    assignments = [item for item in evaluation.items if item.op == "assign_slots"]
    by_loc: dict[str, list[Item]] = {}
    for item in assignments:
        by_loc.setdefault(item.loc, []).append(item)
    for item in program.items:
        if item.op != "assign_slots":
            continue
        candidates = by_loc.get(item.loc)
        if not candidates:  # nothing drops a choice, so slots are not counted
            defaults = {name: spec.default for name, spec in OPS["assign_slots"].attrs.items()}
            item.attrs = {**item.attrs, "evaluation": defaults}
            continue
        assignment = candidates.pop(0)
        attrs = dict(assignment.attrs)
        keep = next((v.item for v in assignment.operands[1:] if v.item is not None), None)
        if keep is not None and keep.op == "keep_choices":
            attrs["keep_policy"] = keep.attrs["policy"]
            attrs["keep_threshold"] = keep.attrs["threshold"]
        item.attrs = {**item.attrs, "evaluation": attrs}


def _census(program: TorchProgram) -> Counter[tuple[str, str]]:
    ignored = ("dropout", "jitter", "add_noise", "keep_choices", "assign_slots", "top_k_index")
    return Counter((i.loc, i.op) for i in program.items if i.op not in ignored)


def _var(value: Value, *, is_param: bool = False) -> ProgramValue:
    axes, sizes = _row_axes(value.type)
    return ProgramValue(value.name, axes, sizes, value.type.dtype.kind, is_param)


def _row_axes(type: TensorType) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Return axes and sizes, those of the rows of experts as one."""
    axes = list(type.axes)
    if any(isinstance(a.size, Extent) and a.name == "slot" for a in axes):
        axes = [Axis(ROW, "R"), *(a for a in axes if a.name not in ("group", "expert", "slot"))]
    sizes = tuple(a.size if isinstance(a.size, int) else None for a in axes)
    return tuple(a.name for a in axes), sizes


def _append(program: TorchProgram, node: Node, images: dict[Value, ProgramValue]) -> None:
    operands = [images[v] for v in node.operands]
    results = tuple(_var(v) for v in node.results)
    item = Item(node.op.name, operands, dict(node.attrs), results, node.loc)
    for value, var in zip(node.results, results, strict=True):
        images[value] = var
        var.item = item
    program.items.append(item)


POSITION_IDS, KEY_POSITIONS = "position_ids", "key_position_ids"


def _take_positions(graph: Graph, tokens: Value) -> None:
    """Read the positions of tokens from inputs: those of queries, ``[batch, seq]``, and of keys."""
    batch, seq = tokens.type.axes
    touched: list[Node] = []
    for node in list(graph):
        if node.op.name != "positions" or node.attrs["axis"] != seq.name:
            continue
        if seq not in node.operands[0].type.axes:
            continue
        if POSITION_IDS not in graph.inputs:
            graph.input(POSITION_IDS, TensorType(I32, (batch, seq)))
        for user in list(node.result.users):
            if user.op.name == "rename":
                to = user.attrs["to"]
                name = KEY_POSITIONS if to == "kv_seq" else f"{KEY_POSITIONS}_{to}"
                if name not in graph.inputs:
                    axes = (batch, Axis(str(to), seq.size))
                    graph.input(name, TensorType(I32, axes))
                touched += user.result.users
                user.replace_by(graph.inputs[name])
        touched += node.result.users
        node.replace_by(graph.inputs[POSITION_IDS])
    infer_again(graph, touched)


# Idioms: each looks at one item and makes it another, if what it reads has the form.


def _one_user(var: ProgramValue) -> bool:
    return len(var.users) == 1


def _from(var: ProgramValue, op: str) -> Item | None:
    """Return the item that computes `var` for one user alone, if it is an `op`."""
    item = var.item
    return item if item is not None and item.op == op and _one_user(var) else None


def _number(var: ProgramValue) -> float | None:
    """Return the value of a constant."""
    item = var.item
    if item is None or item.op != "constant":
        return None
    value = item.attrs["value"]
    return value if isinstance(value, float) else None


def _fuse_dropout(item: Item) -> None:
    """Make dropout of ``select(uniform < p, 0, x / (1 − p))``."""
    if item.op != "select" or len(item.operands) != 3:
        return
    condition, zero, scaled = item.operands
    less, scale = _from(condition, "less"), _from(scaled, "scale")
    if less is None or scale is None or _number(zero) != 0:
        return
    uniform, rate = _from(less.operands[0], "random_uniform"), _number(less.operands[1])
    if uniform is None or rate is None or uniform.attrs != {"low": 0.0, "high": 1.0}:
        return
    by = scale.attrs["by"]
    if isinstance(by, float) and abs(by * (1 - rate) - 1) < 1e-9:
        item.op, item.operands, item.attrs = "dropout", scale.operands, {"rate": rate}


def _fuse_noise(item: Item) -> None:
    """Make noise of ``x · uniform`` and ``x + normal``."""
    draws = {"mul": "random_uniform", "add": "random_normal"}
    if item.op not in draws:
        return
    for x, drawn in (item.operands, item.operands[::-1]):
        draw = _from(drawn, draws[item.op])
        if draw is not None and set(drawn.axes) == set(x.axes):
            item.op = "jitter" if item.op == "mul" else "add_noise"
            item.operands, item.attrs = [x], dict(draw.attrs)
            return


def _fuse_keep(item: Item) -> None:
    """Let keep_choices draw its own numbers, in training."""
    if item.op == "keep_choices" and len(item.operands) == 2:
        if _from(item.operands[1], "random_uniform") is None:
            raise InputError("keep_choices reads numbers that it cannot draw", where=item.loc)
        item.operands = item.operands[:1]


def _leaf(var: ProgramValue, name: str) -> str:
    """Return the module of a parameter whose last name is `name`; empty if it is not so."""
    module, _, last = var.name.rpartition(".")
    return module if var.param and last == name and module else ""


def _fuse_linear(item: Item) -> None:
    """Make a linear layer of a product with a matrix, and of the bias that is added to it."""
    if item.op == "contract" and item.attrs["precision"] == "default":
        x, w = item.operands
        over = item.attrs["over"]
        is_matrix = isinstance(over, tuple) and len(w.axes) == 2 and over == w.axes[1:]
        if _leaf(w, "weight") and is_matrix and w.axes[0] not in x.axes and ROW not in x.axes:
            attrs: dict[str, object] = {"module": _leaf(w, "weight"), "bias": False}
            item.op, item.attrs = "linear", attrs
    if item.op == "add":
        for product, bias in (item.operands, item.operands[::-1]):
            linear = _from(product, "linear")
            if linear is None or not bias.param or len(linear.operands) != 2:
                continue
            w = linear.operands[1]
            if _leaf(bias, "bias") == _leaf(w, "weight") and bias.axes == w.axes[:1]:
                item.op, item.attrs = "linear", {"module": _leaf(w, "weight"), "bias": True}
                item.operands = [linear.operands[0], w, bias]
                return


def _fuse_module(item: Item) -> None:
    """Make a module of a norm or look-up whose parameters are those of one name."""
    if item.op in ("rms_norm", "layer_norm"):
        names = ("weight", "bias")[: len(item.operands) - 1]
        modules = {_leaf(v, n) for v, n in zip(item.operands[1:], names, strict=True)}
        if len(modules) == 1 and (module := modules.pop()):
            item.attrs = {**item.attrs, "module": module}
            item.op = "rms_norm_module" if item.op == "rms_norm" else "layer_norm_module"
    if item.op == "embedding":
        table, module = item.operands[0], _leaf(item.operands[0], "weight")
        if module and table.axes[0] == item.attrs["axis"] and len(table.axes) == 2:
            item.op, item.attrs = "embedding_module", {**item.attrs, "module": module}


PRODUCTS = ("contract", "convolve", "linear", "embedding", "embedding_module")


def initial_kind(param: ProgramValue) -> str:
    """Return what a parameter is before training: ``normal`` numbers, ``ones`` or ``zeros``.

    Factors of values and scales of norms are ones, vectors that are added are zeros; those of
    experts are vectors, too.
    """
    uses = {(item.op, item.operands.index(param)) for item in param.users}
    if any(op in PRODUCTS for op, _ in uses):
        return "normal"
    if any(op == "mul" or ("_norm" in op and at == 1) for op, at in uses):
        return "ones"
    return "zeros" if len([axis for axis in param.axes if axis != "expert"]) < 2 else "normal"


def _is_one(var: ProgramValue) -> bool:
    """Whether a value is 1 everywhere, as the number of experts that a choice names is."""
    item = var.item
    if item is not None and item.op == "sum" and (hot := item.operands[0].item) is not None:
        into, axes = hot.attrs.get("into"), item.attrs["axes"]
        chosen = hot.operands[0].item if hot.op == "one_hot" else None
        is_whole = isinstance(into, tuple) and axes == tuple(name for name, _ in into)
        return is_whole and chosen is not None and chosen.op == "route"
    return item is not None and item.op == "max" and _is_one(item.operands[0])


def _drop_ones(item: Item) -> None:
    """Make a product with ones its other factor."""
    if item.op == "mul":
        for x, ones in (item.operands, item.operands[::-1]):
            if set(ones.axes) <= set(x.axes) and _is_one(ones):
                axis = item.result.axes[0]
                item.op, item.operands, item.attrs = "rename", [x], {"axis": axis, "to": axis}
                return


def _read_as_it_goes(item: Item) -> None:
    """Leave out the mask of a delta rule whose queries see the keys up to their own."""
    seen = item.operands[-1].item if item.op == "delta_rule" else None
    if seen is None or seen.op != "causal" or seen.attrs["window"]:
        return
    queries, keys = seen.operands
    counted = [v.item.op for v in seen.operands if v.item is not None]
    is_own = keys.item is not None and keys.item.operands == [queries]
    are_inputs = [queries.name, keys.name] == [POSITION_IDS, KEY_POSITIONS]
    if (counted == ["positions", "rename"] and is_own) or (are_inputs and not counted):
        item.operands = item.operands[:-1]


IDIOMS: tuple[Callable[[Item], None], ...] = (
    _read_as_it_goes,
    _fuse_dropout,
    _fuse_noise,
    _fuse_keep,
    _drop_ones,
    _fuse_linear,
    _fuse_module,
)


def _add_top_k_indices(program: TorchProgram) -> None:
    """Let rows be moved by one index a choice: that of its expert, or N where it is dropped."""
    indices: dict[ProgramValue, ProgramValue] = {}
    items: list[Item] = []
    for item in program.items:
        if item.op in ("dispatch", "dispatch_gates", "combine", "combine_weighted"):
            x, experts, slots, *gates = item.operands
            if item.op == "dispatch_gates":
                x, experts, slots = item.operands
            for weights in [x] if item.op == "dispatch_gates" else gates:
                weights.name = weights.name if weights.param else "top_k_weights"
            assign = slots.item
            assert assign is not None, "slots are assigned"
            if slots not in indices:
                index = ProgramValue("top_k_index", experts.axes, experts.sizes, "int")
                attrs: dict[str, object] = {
                    "experts": assign.attrs["experts"],
                    "drops": drops(assign),
                }
                operands = [experts, slots] if attrs["drops"] else [experts]
                index.item = Item("top_k_index", operands, attrs, (index,), assign.loc)
                items.append(index.item)
                indices[slots] = index
            item.attrs = {**item.attrs, "experts": assign.attrs["experts"]}
            item.operands = [x, indices[slots], *gates]
        items.append(item)
    program.items = items


def drops(assign: Item) -> bool:
    """Whether an item that assigns slots leaves choices without one."""
    if assign.op == "expert_choice" or assign.attrs["slots"] == "capacity":
        return True
    using = assign.attrs["using"]
    return isinstance(using, tuple) and bool({"keep", "mask"} & set(using))


def continued_tokens(graph: Graph) -> Value | None:
    """Return the input whose tokens a decoder continues, or would with a head, if there is one."""
    name = DECODER_TOKENS if DECODER_TOKENS in graph.inputs else TOKENS
    tokens = graph.inputs.get(name)
    is_decoder = "logits" in graph.outputs or any(
        node.op.name == "attention" and node.attrs["causal"] for node in graph
    )
    return tokens if tokens is not None and len(tokens.type) == 2 and is_decoder else None


def can_continue(graph: Graph) -> bool:
    """Whether a token depends on itself and those before it alone, as the pass `decode` finds.

    Rotary positions that scale with the length of the text change the keys of earlier tokens.
    `decode` allows them because its sessions end where the scaling begins; a cache of transformers
    has no such bound.
    """
    if "logits" not in graph.outputs:
        return False
    if graph.attrs.get("mode") == "train":
        graph = rewritten(graph, "specialize{mode=eval}")
    if any(node.body for node in graph):
        graph = rewritten(graph, "unroll-layers")
    if any(n.op.name == "rope" and n.attrs["scaling"] in LENGTH_SCALINGS for n in graph):
        return False
    try:
        rewritten(graph, "decode")
    except InputError:
        return False
    return True


def walk_operands(items: list[Item]) -> Iterator[ProgramValue]:
    """Yield what the items read from outside, in the order of reading."""
    computed = {v for item in items for v in item.results}
    read: set[ProgramValue] = set()
    for item in items:
        for var in item.operands:
            if var not in computed and var not in read:
                read.add(var)
                yield var


def attribute(attrs: Attrs, name: str) -> str:
    """Return an attribute that is a text."""
    return str(attrs[name])


CONTINUES = "continues"
"""Whether a text is continued: no capacity then drops a token, as in moecc generate."""

CACHE, MASK, KWARGS = "cache", "mask", "kwargs"


def add_caches(program: TorchProgram, *, cached: bool = True) -> None:
    """Give causal attention a mask, and a cache of keys and values.

    Args:
      program: changed.
      cached: whether a token depends on those before it alone, so that keys and values are kept.
    """
    tokens = program.inputs[program.tokens]
    hidden = next(
        i.result for i in program.items if tokens in i.operands and i.result.kind == "float"
    )
    # What else than attention meets earlier tokens, as turns at an expert do, has no cache.
    cached = cached and not any(item.op in ("causal", "delta_rule") for item in program.items)
    cache, continues = ProgramValue(CACHE, kind="cache"), ProgramValue(CONTINUES, kind="cache")
    kwargs = ProgramValue(KWARGS, kind=KWARGS)
    decoded = {tokens}
    positions = program.inputs.get(POSITION_IDS) or ProgramValue(
        POSITION_IDS, ("batch", "seq"), (), "int"
    )
    module = "masks" if program.tokens == TOKENS else "decoder.masks"
    masks: dict[object, ProgramValue] = {}
    mask_items: list[Item] = []
    number = 0
    for item in program.items:
        if decoded & set(item.operands):
            decoded.update(item.results)
        if cached and item.op == "assign_slots" and decoded & set(item.results):
            evaluation = item.attrs.get("evaluation")  # a text is continued in evaluation alone
            if (evaluation if isinstance(evaluation, dict) else item.attrs)["slots"] == "capacity":
                item.attrs = {**item.attrs, "unbounded": True}
                item.operands = [*item.operands, continues]
                program.inputs[CONTINUES] = continues
        if item.op != "attention" or item.attrs["causal"] != ("seq",):
            continue
        window = item.attrs["window"]
        if window not in masks:
            masks[window] = ProgramValue("window_mask" if window else MASK, kind="mask")
            operands = [hidden, positions]
            mask = Item("causal_mask", operands, {"window": window}, (masks[window],), module)
            masks[window].item = mask
            mask_items.append(mask)
        words = (*_further(item), "mask")
        if not cached:
            item.attrs = {**item.attrs, "given": words}
            item.operands = [*item.operands, masks[window]]
            continue
        item.op = "cached_attention"
        item.attrs = {**item.attrs, "given": (*words, "cache", KWARGS), "layer_idx": number}
        item.operands = [*item.operands, masks[window], cache, kwargs]
        number += 1
    if mask_items:
        program.inputs[POSITION_IDS] = positions
        if cached:
            program.inputs |= {CACHE: cache, KWARGS: kwargs}
    at = program.items.index(hidden.item) + 1 if hidden.item is not None else 0
    program.items[at:at] = mask_items
    program.prune()


def share_masks(program: TorchProgram) -> None:
    """Let layers read one mask, which is made once, for masks and biases of the scores.

    In an encoder-decoder every attention then has one form: it takes a mask and a cache, which
    may be None, and options.
    """
    layers = {item for item in program.items if layer_of(item.loc) is not None}
    masks: dict[tuple[object, ...], Item] = {}
    absent: dict[tuple[str, str], Item] = {}
    items: list[Item] = []
    for item in program.items:
        if item.op in ("attention", "cached_attention"):
            mask = _shared_mask(item, layers)
            if mask is not None:
                identity = (*mask.attrs.values(), *map(id, mask.operands))
                if identity not in masks:
                    masks[identity] = mask
                    items.append(mask)
                _read_mask(item, masks[identity])
            if DECODER_TOKENS in program.inputs:
                items += _complete(item, absent)
        items.append(item)
    complete = [item for item in items if item.attrs.get("is_complete")]
    if any(i.attrs["causal"] and not i.attrs.get("is_shared") for i in complete):
        for item in complete:
            item.attrs = {**item.attrs, "can_be_causal": True}
    program.items = items
    program.prune()


def _further(item: Item) -> dict[str, ProgramValue]:
    """Return what an attention reads besides queries, keys and values, by word."""
    words = item.attrs["given"]
    assert isinstance(words, tuple), "the words of further operands"
    return dict(zip(words, item.operands[3:], strict=True))


def _shared_mask(item: Item, layers: set[Item]) -> Item | None:
    """Return the mask that an attention reads if all of it is made outside of the layers."""
    parts = {w: v for w, v in _further(item).items() if w in ("mask", "keep", "bias")}
    if not parts.keys() & {"keep", "bias"} or any(v.item in layers for v in parts.values()):
        return None
    query, key = item.operands[:2]
    batch, along = key.axes[0], str(item.attrs["along"])
    heads = [a for a in query.axes if a in ("head", "kv_head", "query_group")]
    (seq,) = (a for a in query.axes if a not in (batch, *heads, item.attrs["over"]))
    attrs: dict[str, object] = {"given": tuple(parts), "causal": bool(item.attrs["causal"])}
    attrs["axes"] = (batch, "+".join(heads), seq, along)
    stack = (layer_of(item.loc) or ("",))[0].rpartition(".")[0]
    is_crossed = bool(stack) and item.op == "attention" and not stack.startswith("encoder")
    value = ProgramValue("memory_mask" if is_crossed else "mask", kind="mask")
    loc = f"{stack}.masks" if stack else "masks"
    value.item = Item("scores_mask", list(parts.values()), attrs, (value,), loc)
    return value.item


def _read_mask(item: Item, mask: Item) -> None:
    further = {w: v for w, v in _further(item).items() if w not in ("mask", "keep", "bias")}
    item.operands = [*item.operands[:3], mask.result, *further.values()]
    item.attrs = {**item.attrs, "given": ("mask", *further), "is_shared": True}


def _complete(item: Item, absent: dict[tuple[str, str], Item]) -> list[Item]:
    """Let an attention take a mask and a cache, and return the new items that are None for them.

    The layers of an encoder read them as those of a decoder do: `absent` has them by location.
    """
    further, new = _further(item), []
    stack, number = layer_of(item.loc) or ("", None)
    is_encoder = stack.startswith("encoder")
    for word in ("mask", CACHE, *([KWARGS] * is_encoder)):
        if word not in further and not (word == "mask" and "keep" in further):
            loc = f"{stack.rpartition('.')[0]}.masks" if is_encoder else item.loc
            if (word, loc) not in absent:
                value = ProgramValue(word, kind=KWARGS if word == KWARGS else "none")
                value.item = absent[word, loc] = Item("none", [], {}, (value,), loc)
                new.append(value.item)
            further[word] = absent[word, loc].result
    last = ("mask", CACHE, KWARGS)
    words = [w for w in further if w not in last] + [w for w in last if w in further]
    item.op = "cached_attention"
    item.operands = [*item.operands[:3], *(further[w] for w in words)]
    number = number if is_encoder else None
    item.attrs = {"layer_idx": number, **item.attrs, "given": tuple(words), "is_complete": True}
    return new
