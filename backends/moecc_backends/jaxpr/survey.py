"""The blocks of a function: where they run, who else uses their weights, which axes are of tokens.

A block in the body of a scan is one for each iteration.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, product
from math import prod

from moecc.errors import InputError, Problem, UsageError, nearest
from moecc.types import is_name
from moecc.weights.expr import Box, Expr, Source, walk
from moecc.weights.movement import Index, Slice
from moecc.weights.simplify import simplify
from moecc_backends.jaxpr.blocks import (
    INNER,
    OPAQUE,
    OUTER,
    BlockMiss,
    BlockSlice,
    JaxprBlock,
    block_of,
    find_blocks,
    identity,
)
from moecc_backends.jaxpr.scopes import (
    CHECKPOINTS,
    LOOPS,
    UNKNOWN,
    Equation,
    JaxprScope,
    TracedFunction,
    Variable,
    rearranged,
)
from moecc_backends.jaxpr.symbols import function_of
from moecc_backends.jaxpr.views import (
    Iteration,
    LeafView,
    NotABlock,
    block_location,
    callee,
    has_inside,
    indexed_name,
    unique,
)

BlockKey = tuple[str, tuple[Expr, ...]]
"""The identity of a block: its text, and its parameters as expressions over leaves."""


@dataclass(frozen=True)
class BlockSite:
    """A block where it runs.

    Attributes:
      slice: its equations.
      block: its operations; its parameters as the iterations of loops see them.
    """

    slice: BlockSlice
    block: JaxprBlock

    @cached_property
    def loops(self) -> tuple[Equation, ...]:
        """The loops that pick a part of a parameter, outermost first."""
        used = {loop for p in self.block.params for loop in p.view.loops}
        return tuple(e for e in self.slice.scope.owners if e in used)

    @cached_property
    def identity(self) -> str:
        """What it computes in any element type."""
        return identity(self.slice)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How often each of the loops runs."""
        return tuple(int(loop.params["length"]) for loop in self.loops)

    @cached_property
    def iterations(self) -> list[Iteration]:
        """The numbers of the loops' iterations, the last loop fastest."""
        numbers = product(*map(range, self.lengths))
        return [dict(zip(self.loops, each, strict=True)) for each in numbers]

    @cached_property
    def keys(self) -> list[BlockKey]:
        """The blocks that it is, one for each iteration."""
        return [
            (self.block.text, tuple(simplify(p.expression(each)) for p in self.block.params))
            for each in self.iterations
        ]


@dataclass(frozen=True)
class BlockInstance:
    """A block of the model.

    Attributes:
      loc: its location, ``layers.0.mlp``.
      params: the names of its parameters.
      weights: what they are of the leaves.
      summary: the names of its operations.
      line: where it is in the user's program.
      identity: what it computes in any element type.
    """

    loc: str
    params: tuple[str, ...]
    weights: tuple[Expr, ...]
    summary: str
    line: str
    identity: str


@dataclass
class Survey:
    """The blocks of a function: where they run, and why others are none.

    Attributes:
      scope: the function.
      sites: where blocks run, in order.
      misses: what is nearly a block.
    """

    scope: JaxprScope
    sites: list[BlockSite] = field(default_factory=list)
    misses: list[BlockMiss] = field(default_factory=list)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the leaves that weights are read from, in order."""
        return tuple(v.view.leaf.name for v in self.scope.inputs if v.view is not None)

    @property
    def unused(self) -> tuple[str, ...]:
        """The names of the leaves that the function does not use."""
        idle = (v.view for v in self.scope.inputs if not v.users and not v.is_returned)
        return tuple(view.leaf.name for view in idle if view is not None)

    @property
    def first_sites(self) -> dict[BlockKey, tuple[BlockSite, Iteration]]:
        """Where each block runs first, and in which iteration, in order."""
        sites: dict[BlockKey, tuple[BlockSite, Iteration]] = {}
        for site in self.sites:
            for key, iteration in zip(site.keys, site.iterations, strict=True):
                sites.setdefault(key, (site, iteration))
        return sites

    def refuse(self, site: BlockSite, reason: str) -> None:
        """Note that `site` is no block after all, and why."""
        leaves = tuple(sorted({p.view.leaf.name for p in site.block.params}))
        self.sites = [s for s in self.sites if s is not site]
        self.misses.append(BlockMiss(leaves, reason, site.slice.line))

    def instances(self) -> dict[BlockKey, BlockInstance]:
        """Return the blocks of the model, each once, in order."""
        sites = self.first_sites
        weights = list(dict.fromkeys(weight for _, weights in sites for weight in weights))
        joined = {part for _, weights in sites for part in _joined_parts(weights)}
        weight_names = unique(_weight_name(weight, joined) for weight in weights)
        name_of = dict(zip(weights, weight_names, strict=True))
        params = [tuple(name_of[weight] for weight in weights) for _, weights in sites]
        locations = unique(map(block_location, params))
        return {
            key: BlockInstance(
                loc, names, key[1], site.block.summary, site.slice.line, site.identity
            )
            for (key, (site, _)), names, loc in zip(sites.items(), params, locations, strict=True)
        }


def _joined_parts(weights: Sequence[Expr]) -> set[Expr]:
    """Return the parts of leaves of which a block reads several positions, as gate and up may be.

    Such a leaf is no stack of layers, of which a block has one.
    """
    parts = {part for weight in weights for part in walk(weight) if isinstance(part, Index)}
    counts = Counter(part.operands[0] for part in parts)
    return {part for part in parts if counts[part.operands[0]] > 1}


def _weight_name(weight: Expr, joined: Collection[Expr]) -> str:
    """Return a name for a part of a leaf; the number of one that is `joined` comes last."""
    if isinstance(weight, Source):
        return weight.name
    name = _weight_name(weight.operands[0], joined)
    if isinstance(weight, Index):
        return f"{name}.{weight.at}" if weight in joined else indexed_name(name, weight.at)
    return f"{name}.{weight.start}_{weight.stop}" if isinstance(weight, Slice) else name


def survey_blocks(scope: JaxprScope) -> Survey:
    """Return the blocks of a traced function."""
    slices, misses = find_blocks(scope)
    survey = Survey(scope, misses=misses)
    for block in slices:
        try:
            survey.sites.append(BlockSite(block, block_of(block)))
        except NotABlock as reason:
            survey.misses.append(BlockMiss(block.leaves, str(reason), block.line))
    # Products with weights besides those that blocks are made of.
    computed: dict[Variable, Reason] = {}
    for equation in scope.every_equation():
        _note_computed(equation, computed)
        hidden = _why_hidden(equation, computed)
        if hidden is not None:
            survey.misses.append(BlockMiss(tuple(sorted(hidden[1])), hidden[0], equation.line))
    return survey


def equations_of(sites: Iterable[BlockSite]) -> set[Equation]:
    """Return the equations of blocks."""
    return {equation for site in sites for equation in site.slice.equations}


# Products with weights that the search cannot see, and why.

Reason = tuple[str, frozenset[str]]
"""Why the products of weights cannot be seen, and which weights."""

_NO_PRODUCTS = ("pallas_call", "pure_callback", "io_callback", "ffi_call", "custom_call")
"""Work whose products no jaxpr shows."""


def _why_hidden(equation: Equation, computed: Mapping[Variable, Reason]) -> Reason | None:
    """Return why products of an equation cannot be seen, if it may have some, and their weights."""
    name, inputs = equation.name, equation.inputs
    has_products = has_inside(equation.eqn, "dot_general")
    if name in OPAQUE:
        matrices = frozenset(v.view.leaf.name for v in inputs if v.view and len(v.shape) > 1)
        if len(matrices) > 1 and (has_products or name in _NO_PRODUCTS):
            words = f"its products are inside {OPAQUE[name]}: write the block itself in jax.numpy"
            return words, matrices
    if name == "dot_general" and not any(v.view for v in inputs):
        return next((computed[v] for v in inputs if v in computed), None)
    if name in LOOPS and not equation.bodies and has_products:
        matrix = (computed[v] for v in inputs if v in computed and len(v.shape) > 1)
        return next(matrix, None)
    if name == "conv_general_dilated" and inputs[1].view is not None:
        window = equation.params["dimension_numbers"].rhs_spec[2:]
        is_pointwise = all(inputs[1].shape[i] == 1 for i in window)
        if is_pointwise and equation.params["feature_group_count"] == 1:
            words = "its product is a convolution over one place: write it as a product"
            return f"{words}, `x @ kernel[0]`", frozenset((inputs[1].view.leaf.name,))
    return None


def _note_computed(equation: Equation, computed: dict[Variable, Reason]) -> None:
    """Note the results of an equation that are made of weights alone, and how."""
    inputs = equation.inputs
    reasons = [computed[v] for v in inputs if v in computed]
    weights = frozenset(v.view.leaf.name for v in inputs if v.view is not None)
    weights = weights.union(*(names for _, names in reasons))
    if not weights:
        return
    stack = inputs[0].shape
    # One matrix of a stack is picked; rows of a table are no weights of products.
    is_pick = (
        equation.name in ("dynamic_slice", "gather")
        and inputs[0].view is not None
        and len(stack) > 2
        and prod(equation.outputs[0].shape) * stack[0] == prod(stack)
    )
    if is_pick:
        reason = "its weight is picked by an index that is only known when it runs: use a scan"
    elif all(v in computed or v.view is not None or v.const is not UNKNOWN for v in inputs):
        reason = next((words for words, _ in reasons), "") or (
            f"its weight is computed by `{equation.name}`: a block has leaves as they are, cast, "
            "sliced, transposed or reshaped; compute it once, before, and pass the result"
        )
    else:
        return
    for variable in equation.outputs:
        if variable.view is None and variable.shape:
            computed[variable] = (reason, weights)


# Who uses the leaves of the parameters, and which part of them.


@dataclass(frozen=True)
class LeafUse:
    """A use of a leaf other than a view of it.

    Attributes:
      view: the part of the leaf.
      equation: what uses it; None for the function that returns it.
    """

    view: LeafView
    equation: Equation | None

    def __str__(self) -> str:
        if self.equation is None:
            return "the function returns it"
        line = self.equation.line
        return f"`{self.equation.name}`" + (f" at {line}" if line else "")


def leaf_uses(scope: JaxprScope, besides: Collection[Equation]) -> Iterator[LeafUse]:
    """Yield the uses of leaves in a scope and its bodies by other equations than `besides`."""
    for equation in scope.equations:
        if equation in besides:
            continue
        if equation.bodies:
            is_passed = list(map(_are_views, equation.bound()))
        else:
            is_passed = [_are_views(equation.outputs) for _ in equation.inputs]
        for variable, is_view in zip(equation.inputs, is_passed, strict=True):
            if variable.view is not None and not is_view:
                yield LeafUse(variable.view, equation)
        for body in equation.bodies:
            yield from leaf_uses(body, besides)
    for variable in scope.outputs:
        if variable.view is not None:
            yield LeafUse(variable.view, scope.owner)


def _are_views(variables: list[Variable]) -> bool:
    return bool(variables) and all(v.view is not None for v in variables)


def skipped_equations(scope: JaxprScope, inside: Collection[Equation]) -> set[Equation]:
    """Return the equations of a scope and its bodies that nothing needs if `inside` are replaced.

    These are the equations of `inside`, and views of weights for them alone.
    """
    gone = set(inside)
    holders = {owner for equation in inside for owner in equation.scope.owners}

    def is_needed(variable: Variable) -> bool:
        """A loop that holds nothing that is replaced runs as it stands: it needs what it takes."""
        if variable.is_returned:
            return True
        for user in variable.users:
            if user in gone:
                continue
            if user not in holders:
                return True
            inner = [vs for vs, v in zip(user.bound(), user.inputs, strict=True) if v is variable]
            if any(not vs or any(map(is_needed, vs)) for vs in inner):
                return True
        return False

    def skip(scope: JaxprScope) -> None:
        for equation in reversed(scope.equations):
            if equation in holders:
                for body in equation.bodies:
                    skip(body)
            is_view = not equation.bodies and _are_views(equation.outputs)
            if equation not in gone and is_view and not any(map(is_needed, equation.outputs)):
                gone.add(equation)

    skip(scope)
    return gone


# Blocks that cannot be converted because something else uses their weights.

_SEPARATE = "give each use a leaf of its own, and leave weight decay to the optimiser"


def refuse_shared_weights(survey: Survey) -> None:
    """Turn blocks of `survey` whose weights something else uses into near misses."""
    while _refuse_used(survey) or _refuse_shared(survey):
        pass


def _refuse_used(survey: Survey) -> bool:
    """Refuse blocks whose weights are used outside of blocks; return whether there were any."""
    uses: dict[str, list[LeafUse]] = defaultdict(list)
    for use in leaf_uses(survey.scope, equations_of(survey.sites)):
        uses[use.view.leaf.name].append(use)
    before = len(survey.sites)
    for site in list(survey.sites):
        views = [p.view for p in site.block.params]
        overlapping = (u for v in views for u in uses[v.leaf.name] if _meet(v.box(), u.view.box()))
        for use in islice(overlapping, 1):
            name = use.view.leaf.name
            survey.refuse(site, f"`{name}` is also used by {use}: {_SEPARATE}")
    return len(survey.sites) < before


def _refuse_shared(survey: Survey) -> bool:
    """Refuse blocks that share a weight and differ otherwise; return whether there were any."""
    parts: dict[str, list[tuple[Box, BlockKey]]] = defaultdict(list)
    for key, (site, iteration) in survey.first_sites.items():
        for view in (p.view for p in site.block.params):
            parts[view.leaf.name].append((view.box(iteration), key))
    shared: dict[BlockKey, str] = {}
    for name, boxes in parts.items():
        boxes.sort(key=lambda part: part[0])
        for i, (box, key) in enumerate(boxes):
            for another, user in islice(boxes, i + 1, None):
                # Sorted by where they start: none behind this one starts within the box.
                if box and another[0][0] >= box[0][1]:
                    break
                if key != user and _meet(box, another):
                    shared = {key: name, user: name} | shared
    sites = [site for site in survey.sites if not shared.keys().isdisjoint(site.keys)]
    for site in sites:
        name = next(shared[key] for key in site.keys if key in shared)
        words = f"another block uses `{name}`, too, with other weights or functions"
        survey.refuse(site, f"{words}: give each its own, or make the blocks alike")
    return bool(sites)


def _meet(a: Box, b: Box) -> bool:
    return all(p < s and r < q for (p, q), (r, s) in zip(a, b, strict=True))


# Which dimensions of values are axes of tokens, as the caller of the function names them.
#
# A label goes with a dimension through the program: forward only, and lost where nothing is known.
# It names the axes of a block's tokens, and shows a product that sums over tokens.

Label = tuple[tuple[str, int], ...]
"""Names and sizes of the axes of tokens that a dimension runs over, outermost first."""

Labels = tuple[Label, ...]
"""The label of each dimension; empty where it is no axis of tokens."""

VariableLabels = Mapping[Variable, Labels]
"""Which dimensions of values are which axes of tokens, as far as that is known."""

RESERVED = (OUTER, INNER, "group", "expert", "slot", "choice")
"""Names that blocks and routings give to axes."""

_BY_PLACE = frozenset(
    ("slice", "dynamic_slice", "dynamic_update_slice", "pad", "concatenate", "rev", "split")
) | {"convert_element_type", "copy", "cumsum", "sort", "reduce_precision"}  # fmt: skip
"""Equations whose results have the dimensions of operands of their rank."""


def token_labels(
    traced: TracedFunction, tokens: Mapping[str, Sequence[str]], where: str
) -> dict[Variable, Labels]:
    """Return which dimensions of the values of a function are axes of tokens.

    Args:
      traced: the function.
      tokens: names of the axes by argument; fewer names than dimensions name the first ones.
      where: the line of the function.

    Raises:
      UsageError: `tokens` is no mapping.
      InputError: there is no such argument, or it has fewer dimensions than names.
    """
    if not isinstance(tokens, Mapping):
        raise UsageError(
            "`tokens` is no mapping of arguments to names of axes",
            expected='{"batch.tokens": ("batch", "seq")}',
            found=repr(tokens),
        )
    problems = [_misfit(name, axes, traced.arguments) for name, axes in tokens.items()]
    if any(problems):
        raise InputError(replace(p, where=f"{where}, {p.where}") for p in problems if p)
    labels: dict[Variable, Labels] = {}
    for name, axes in tokens.items():
        variable = traced.arguments[name]
        named: list[Label] = [((axis, n),) for axis, n in zip(axes, variable.shape, strict=False)]
        labels[variable] = (*named, *((),) * (len(variable.shape) - len(named)))
    _run(traced.scope, [_label(v, labels) for v in traced.scope.inputs], labels)
    return labels


def _misfit(name: str, axes: Sequence[str], arguments: Mapping[str, Variable]) -> Problem | None:
    where = f"tokens[{name!r}]"
    if name not in arguments:
        hint = nearest(str(name), arguments) or f"arrays: {', '.join(arguments) or 'none'}"
        return Problem("the function has no such argument", where, hint=hint)
    shape = arguments[name].shape
    if isinstance(axes, str):
        return Problem("the names of axes are one word", where, f"a tuple, ({axes!r},)", axes)
    if not isinstance(axes, Sequence) or not all(isinstance(a, str) for a in axes):
        return Problem("not names of axes", where, 'words, ("batch", "seq")', repr(axes))
    if len(axes) > len(shape):
        words = "the argument has fewer dimensions than axes are named"
        return Problem(words, where, ", ".join(axes), str(list(shape)))
    if not all(is_name(a) and a not in RESERVED for a in axes) or len(set(axes)) < len(axes):
        expected = f"different words, none of {', '.join(RESERVED)}"
        return Problem("not names of axes of tokens", where, expected, ", ".join(axes))
    return None


def refuse_ambiguous(survey: Survey, traced: TracedFunction) -> None:
    """Turn blocks into near misses that sum over a dimension which others have as rows.

    Where nobody names the axes of tokens, one of the two mixes tokens.
    """
    labels: dict[Variable, Labels] = {}
    for name, variable in traced.arguments.items():
        labels[variable] = tuple(
            ((f"dimension {i} of {name}", size),) for i, size in enumerate(variable.shape)
        )
    _run(traced.scope, [_label(v, labels) for v in traced.scope.inputs], labels)
    inputs = [(s, _label(s.slice.x, labels)) for s in survey.sites]
    rows = {d for s, x in inputs for i, d in enumerate(x) if d and i != s.slice.outer}
    for site, x in inputs:
        summed = x[site.slice.outer]
        if summed in rows:
            axis = " and ".join(name for name, _ in summed)
            words = f"its products sum over {axis}, along which other blocks have rows"
            survey.refuse(site, f"{words}: name the axes of tokens in `tokens`")


def refuse_mixing(survey: Survey, labels: Mapping[Variable, Labels]) -> None:
    """Turn blocks that sum over tokens, or have none, into near misses."""
    for site in list(survey.sites):
        x_labels = labels.get(site.slice.x, ())
        summed = x_labels[site.slice.outer] if x_labels else ()
        if summed:
            axis = " and ".join(name for name, _ in summed)
            words = f"its products sum over {axis}, an axis of tokens: it mixes them"
            survey.refuse(site, f"{words}, and routes none")
        elif not any(x_labels):
            survey.refuse(site, "its input has no axis of tokens: name it in `tokens`")


def _label(variable: Variable, labels: Mapping[Variable, Labels]) -> Labels:
    return labels.get(variable, ((),) * len(variable.shape))


def _run(
    scope: JaxprScope, inputs: Sequence[Labels], labels: dict[Variable, Labels]
) -> list[Labels]:
    """Label all values of a scope, given the labels of its inputs; return those of its results."""
    labels.update(zip(scope.inputs, inputs, strict=True))
    for equation in scope.equations:
        operands = [_label(v, labels) for v in equation.inputs]
        shapes = [v.shape for v in equation.outputs]
        try:
            results = _results(equation, operands, labels)
        except (IndexError, KeyError, TypeError, ValueError, NotABlock):
            # A form of the primitive that is not known here: its labels are lost, not wrong.
            results = []
        if list(map(len, results)) == list(map(len, shapes)):
            labels.update(zip(equation.outputs, results, strict=True))
    return [_label(v, labels) for v in scope.outputs]


def _results(
    equation: Equation, operands: list[Labels], labels: dict[Variable, Labels]
) -> Sequence[Labels]:
    """Return the labels of the results of an equation, given the labels of its operands."""
    name, params, outputs = equation.name, equation.params, equation.outputs
    if function_of(equation.eqn) is not None or name in _BY_PLACE:
        ranks = [len(v.shape) for v in outputs]
        return [_joined([d for d in operands if len(d) == rank], rank) for rank in ranks]
    if name in ("transpose", "squeeze", "broadcast_in_dim", "reshape"):
        ((_, axes),) = rearranged(_LabelMoves, None, operands[0], equation)
        return [tuple(axis or () for axis in axes)]
    if name == "dot_general":
        (summed, batch) = params["dimension_numbers"]
        dims = [operands[0][i] or operands[1][j] for i, j in zip(*batch, strict=True)]
        for operand, over, shared in zip(operands, summed, batch, strict=True):
            dims += [d for i, d in enumerate(operand) if i not in over and i not in shared]
        return [tuple(dims)]
    if name == "gather":
        numbers = params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        window = iter([d for i, d in enumerate(operands[0]) if i not in gone])
        places = iter(operands[1][:-1])
        rank = range(len(outputs[0].shape))
        return [tuple(next(window if i in numbers.offset_dims else places) for i in rank)]
    if name == "conv_general_dilated":
        spec = params["dimension_numbers"]
        order = [spec.lhs_spec[spec.out_spec.index(i)] for i in range(len(spec.out_spec))]
        return [tuple(operands[0][i] if i != spec.lhs_spec[1] else () for i in order)]
    if name in ("scan", "while", "cond"):
        return _looped(equation, operands, labels)
    if callee(equation.eqn) is not None or name in (*CHECKPOINTS, *_CUSTOM):
        return _run(equation.inner(), operands, labels)
    if name.startswith(("reduce_", "arg")):
        remaining = tuple(d for i, d in enumerate(operands[0]) if i not in params["axes"])
        return [remaining for _ in outputs]
    if name in ("iota", "random_bits"):
        return []
    pairs = list(zip(equation.inputs, operands, strict=True))
    shapes = [v.shape for v in outputs]
    return [_joined([d for v, d in pairs if v.shape == shape], len(shape)) for shape in shapes]


_CUSTOM = ("custom_jvp_call", "custom_vjp_call")


def _looped(
    equation: Equation, operands: list[Labels], labels: dict[Variable, Labels]
) -> Sequence[Labels]:
    """Return the labels of the results of a loop or a branch, after labelling its bodies."""
    current, bodies = list(operands), equation.body_operands()
    carried = [at for at, role in bodies[-1] if role == "carried"]
    # What a scan carries may gain labels in its first iteration.
    for _ in range(2 if equation.name == "scan" else 1):
        results = [
            _run(
                equation.inner(i),
                [current[at][1:] if role == "stacked" else current[at] for at, role in roles],
                labels,
            )
            for i, roles in enumerate(bodies)
        ]
        for at, result in zip(carried, results[-1], strict=False):
            current[at] = _joined((current[at], result), len(result))
    if equation.name == "scan":
        count = len(carried)
        return [*results[0][:count], *(((), *result) for result in results[0][count:])]
    if equation.name == "while":
        return results[1]
    return [_joined(branches, len(branches[0])) for branches in zip(*results, strict=True)]


def _joined(labels: Sequence[Labels], rank: int) -> Labels:
    return tuple(next((d[i] for d in labels if d[i]), ()) for i in range(rank))


class _LabelMoves:
    """How labels change with the axes of an array, see `rearranged`."""

    @staticmethod
    def sliced(array: None, axis: Label, start: int, stop: int) -> tuple[None, Label]:
        return None, axis

    @staticmethod
    def indexed(array: None, axis: Label, index: int) -> None:
        return None

    @staticmethod
    def regrouped(
        array: None, axes: Sequence[Label | None], parts: Sequence[int]
    ) -> tuple[None, list[Label | None]]:
        """Cut the axes of tokens of all dimensions again, where they make up the new sizes."""
        if not all(axes):
            return None, [None for _ in parts]
        tokens = [token for axis in axes if axis for token in axis]
        labels: list[Label | None] = []
        for size in parts:
            product, label = 1, list[tuple[str, int]]()
            while tokens and product < size:
                label.append(tokens.pop(0))
                product *= label[-1][1]
            labels.append(tuple(label) if product == size else None)
        return None, labels
