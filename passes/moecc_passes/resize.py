"""The passes on the experts of routed layers: how many there are, and single ones of them."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Literal

from moecc.errors import InputError, Problem
from moecc.ir.conventions import convention
from moecc.ir.graph import Graph, Value
from moecc.ir.ops.contraction import ProductOp
from moecc.rewrite.driver import may_rewrite
from moecc.rewrite.passes import Bounds, Context, Pass, PassResult, Preserves, Remark, weakest
from moecc.support.lazy import np
from moecc.support.text import amount
from moecc.weights.arithmetic import BASE, Add, read_from, scaled
from moecc.weights.draws import derive_key
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat
from moecc_passes.resized_layer import (
    BIAS_DOC,
    Anatomy,
    BiasChoice,
    Dormant,
    alike,
    anatomies,
    bias_kind,
    dormant_up_to,
    expert_numbers,
    largest,
    make_dense,
    mean,
    members,
    not_dormant,
    resize,
    shared_out,
    statistic,
    unread,
    with_bias,
)
from moecc_passes.routed import NOTHING_ROUTED
from moecc_passes.upcycle.options import unknown_models


@dataclass(frozen=True)
class ResizePass(Pass):
    """Base of the passes that build every routed layer anew."""

    must_match = True

    @abstractmethod
    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot be changed."""

    @abstractmethod
    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Build a layer anew, and return a remark."""

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """Return the promise for a layer, before it is changed."""
        return self.preserves

    def for_layers(self, layers: list[Anatomy], ctx: Context) -> list[ResizePass]:
        """Return the pass of each layer, where layers have options of their own."""
        return [self] * len(layers)

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Change every routed layer.

        Raises:
          InputError: a layer does not allow it; all problems at once.
        """
        layers = anatomies(graph)
        each = list(zip(layers, self.for_layers(layers, ctx), strict=True))
        problems = [problem for layer, item in each for problem in item.problems(layer, ctx)]
        if problems:
            raise InputError(list(dict.fromkeys(problems)))
        promises = [self.promise(layer, ctx) for layer in layers]
        for layer, item in each:
            if not may_rewrite(self.name, layer.name):
                break
            ctx.remark(Remark(layer.name, item.build(graph, layer, ctx)))
        result = PassResult(bool(layers), len(layers), {"layers": len(layers)})
        result.near_misses = [] if layers else [NOTHING_ROUTED]
        result.preserves = weakest(dict.fromkeys(promises)) if promises else None
        return result


def missing_experts(layer: Anatomy, numbers: tuple[int, ...]) -> Iterator[Problem]:
    """Yield the problem that a layer has not all experts that are listed."""
    beyond = [number for number in numbers if number >= layer.experts]
    if beyond:
        expected, text = f"0 to {layer.experts - 1}", ", ".join(map(str, beyond))
        yield Problem("there are no such experts", layer.name, expected, text)


def _listed(text: str) -> tuple[int, ...]:
    numbers = expert_numbers(text)
    assert not isinstance(numbers, Problem), "validated"
    return numbers


def promise_of_dormant(
    layer: Anatomy, ctx: Context, bias: BiasChoice, count: int, *, are_copies: bool = True
) -> Preserves:
    """Return the promise of `count` more experts that a bias keeps from being chosen.

    Args:
      layer: the layer.
      ctx: reads a bias that is there.
      bias: the bias that keeps them.
      count: their number.
      are_copies: whether their rows of the router are copies of rows that are there.
    """
    weighs = layer.bias_of_choice is not None and bias_kind(layer, bias) == "choice"
    is_softmax = convention(layer.attrs.gates).score == "softmax"
    if weighs and is_softmax and count % layer.experts:
        return Preserves("approximate", "probabilities that a bias is added to shrink")
    return Preserves("reassociation", up_to=dormant_up_to(layer, ctx, bias, count, are_copies))


@dataclass(frozen=True)
class GrowPass(ResizePass):
    """Store every expert `times` times, and let a token go to `times` as many.

    Copies have equal rows in the router, so that the chosen ones are all copies of those that were
    chosen before, ties included, because copies are neighbours.

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``grow{times=2}``::

        %e, %g = route %l {top_k=4} : i32[…, choice=4], f32[…, choice=4]    # of 16 experts

    After ``grow{times=2 chosen=same}``, where a bias keeps every second copy from being chosen::

        %e, %g = route %l, %b {top_k=2 using=(bias)} : i32[…, choice=2], f32[…, choice=2]
    """

    name = "grow"
    summary = "copy every expert, and choose as many more"

    times: Annotated[int, "number of copies of every expert", Bounds(2)] = 2
    chosen: Annotated[
        Literal["all", "same"],
        "how many a token goes to: as many more; or the same, and a bias keeps the copies from "
        "being chosen until training raises it",
    ] = "all"
    bias: Annotated[BiasChoice, f"chosen=same: {BIAS_DOC}"] = "auto"

    preserves = Preserves("reassociation")  # `promise` refines it

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        problems = super().validate()
        if self.bias != "auto" and self.chosen == "all":
            message = "no bias is needed where all copies are chosen"
            problems.append(Problem(message, "bias", "auto", self.bias, "chosen=same"))
        return problems

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot grow."""
        if self.chosen == "same":
            yield from not_dormant(layer, self.bias)
            return
        row, slots = convention(layer.attrs.gates), layer.layer.assignment.slots
        if row.max_top_k is not None or not row.equal_for_equal_logits:
            yield Problem(f"{row.name} gates do not divide among copies", layer.name)
        if layer.drops:
            yield Problem(
                "copies drop other choices than one expert did",
                layer.name,
                "slots=ragged, and every choice kept",
                f"slots={slots}" if slots != "ragged" else "a mask of kept choices",
                "specialize{dropless=true} removes the capacity",
            )

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """A bias keeps copies from being chosen for most scores, not for all."""
        if self.chosen == "all":
            return self.preserves
        count = layer.experts * (self.times - 1)
        return replace(self.preserves, up_to=dormant_up_to(layer, ctx, self.bias, count))

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Store every expert several times."""
        top_k, factor, dormant = layer.attrs.top_k, 1.0, None
        if self.chosen == "all":
            # Copies share a probability, and have a sigmoid each.
            row = convention(layer.attrs.gates)
            top_k *= self.times
            factor = 1.0 if row.renormalised or row.score == "softmax" else 1 / self.times
        else:
            layer, param, value = with_bias(graph, layer, ctx, self.bias)
            copies = [n for n in range(layer.experts * self.times) if n % self.times]
            dormant = Dormant(copies, param, value, zero=False)
        resize(
            graph,
            layer,
            lambda parts: [part for part in parts for _ in range(self.times)],
            top_k,
            factor,
            layer.bias_factor(self.times),
            dormant,
        )
        return f"{layer.experts} experts became {layer.experts * self.times}"


@dataclass(frozen=True)
class ZeroExpertsPass(ResizePass):
    """Add experts whose last matrix is zero, and a bias that keeps them from being chosen.

    Their other matrices and their rows of the router are copies, so that they learn once they are
    chosen.  A token that goes to one then costs as much, and gets nothing (LongCat, arXiv
    2509.01322, has such experts without matrices).

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``zero-experts{count=4}``::

        %e, %g = route %l, %b {top_k=2 using=(bias)} : …    # of 12 experts, %b is -2 of the last 4
    """

    name = "zero-experts"
    summary = "add zero experts, which a bias keeps from being chosen"

    count: Annotated[int, "experts added to each layer", Bounds(1)] = 1
    bias: Annotated[BiasChoice, BIAS_DOC] = "auto"

    preserves = Preserves("reassociation")  # `promise` refines it

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot have experts that are never chosen."""
        yield from not_dormant(layer, self.bias)

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """A bias is added to probabilities, which more experts make smaller: alike, or unlike."""
        return promise_of_dormant(layer, ctx, self.bias, self.count)

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Add the experts."""
        layer, param, value = with_bias(graph, layer, ctx, self.bias)
        total = layer.experts + self.count
        numbers = range(layer.experts, total)
        resize(
            graph,
            layer,
            lambda parts: parts + [parts[number % len(parts)] for number in numbers],
            layer.attrs.top_k,
            bias_factor=layer.bias_factor(total / layer.experts),
            dormant=Dormant(numbers, param, value, zero=True),
        )
        return f"{self.count} of {total} experts {'adds' if self.count == 1 else 'add'} nothing"


@dataclass(frozen=True)
class MergePass(ResizePass):
    """Replace every `size` experts by the mean of their weights and router rows.

    With neighbours this undoes ``grow``: where they are copies with equal rows, and tokens go to
    whole groups, the function stays, and the tensors are bit for bit those before ``grow``.

    Before::

        %e, %g = route %l {top_k=4} : i32[…, choice=4], f32[…, choice=4]    # of 16 experts

    After ``merge{size=2}``::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts
    """

    name = "merge"
    summary = "merge groups of experts into their mean"

    size: Annotated[int, "number of experts merged into one", Bounds(2)] = 2
    by: Annotated[
        Literal["number", "result"],
        "grouping: neighbouring experts; or, from convert --capture, experts with "
        "similar mean outputs",
    ] = "number"

    @property
    def preserves(self) -> Preserves:
        """The promise for experts that differ; `promise` refines it where they are copies."""
        return Preserves("approximate", f"means of {self.size} experts")

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why the experts do not divide into groups."""
        if self.by == "result":
            yield from unread(layer, "experts.result", ctx)
        if layer.experts % self.size:
            expected = f"a divisor of {layer.experts}"
            message = "the experts do not divide into groups"
            yield Problem(message, layer.name, expected, f"size={self.size}")
        elif layer.experts == self.size:
            yield Problem("one expert is no mixture", layer.name, hint="to-dense{how=mean}")

    def groups(self, layer: Anatomy, ctx: Context) -> list[tuple[int, ...]]:
        """Return the experts that become one, by their numbers."""
        results = statistic(layer, "experts.result", ctx) if self.by == "result" else None
        if results is not None:
            return alike(results, self.size)
        numbers = range(layer.experts)
        return [tuple(numbers[at : at + self.size]) for at in numbers[:: self.size]]

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """Return ``reassociation`` where the merged experts are copies, chosen together."""
        row = convention(layer.attrs.gates)
        are_equal = all(
            len({weights[number] for number in group}) == 1
            for weights in map(members, layer.params)
            for group in self.groups(layer, ctx)
        )
        divides = layer.attrs.top_k % self.size == 0 and not layer.drops
        if are_equal and divides and row.equal_for_equal_logits and row.max_top_k is None:
            return Preserves("reassociation")
        return self.preserves

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Merge the experts of each group."""
        row, groups = convention(layer.attrs.gates), self.groups(layer, ctx)
        top_k = max(layer.attrs.top_k // self.size, 1)
        resize(
            graph,
            layer,
            lambda parts: [mean([parts[number] for number in group]) for group in groups],
            top_k,
            1.0 if row.renormalised or row.score == "softmax" else float(self.size),
            layer.bias_factor(1 / self.size),
        )
        return f"{layer.experts} experts became {layer.experts // self.size}, top-{top_k}"


@dataclass(frozen=True)
class PrunePass(ResizePass):
    """Keep some experts of every routed layer, with their rows of the router.

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``prune{keep=6}``::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 6 experts

    A token that chose none of the others has the result that it had, under renormalised gates.
    """

    name = "prune"
    summary = "remove some of the experts"

    keep: Annotated[
        int | tuple[int, ...],
        "experts kept in each layer: one number for all, or one for each routed layer, 6,4,3",
    ] = 4
    budget: Annotated[
        Literal["layer", "model"],
        "layer: `keep` experts of each; model: as many in all, shared out among layers by the "
        "experts' part in their layer's sum of `by`, with at least top-k in each",
    ] = "layer"
    experts: Annotated[
        str,
        "numbers of the kept experts, 0,2,5, in all layers; empty: chosen for each "
        "layer as `by` says",
    ] = ""
    by: Annotated[
        Literal["draw", "saliency", "share"],
        "which stay: drawn by the seed; or, from convert --capture, those of the largest mean of "
        "gate times norm of the result (REAP), or that most choices went to",
    ] = "draw"

    preserves = Preserves("approximate", "tokens that chose an expert that is gone choose others")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        problems = super().validate()
        numbers = expert_numbers(self.experts)
        if isinstance(numbers, Problem):
            return [*problems, numbers]
        if numbers and self.by != "draw":
            problems.append(Problem("the experts are listed", "by", "the default", self.by))
        few = [count for count in self._counts if count < 2]
        if few or not self._counts:
            text = ",".join(map(str, self._counts)) or "none"
            problems.append(Problem("too few experts", "keep", "at least 2", text, "to-dense"))
        elif numbers and {len(numbers)} != set(self._counts):
            message, expected = "another number of experts is listed", f"{self.keep} numbers"
            problems.append(Problem(message, "experts", expected, f"{len(numbers)}"))
        if self.budget == "model" and (self.by == "draw" or len(self._counts) > 1):
            expected = "one number of keep, and by=saliency or by=share"
            options = f"keep={','.join(map(str, self._counts))} by={self.by}"
            message = "the budget of a model is shared out by statistics"
            problems.append(Problem(message, "budget", expected, options, "budget=layer"))
        return problems

    @property
    def _counts(self) -> tuple[int, ...]:
        return (self.keep,) if isinstance(self.keep, int) else self.keep

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot keep these experts."""
        if self.by != "draw":
            yield from unread(layer, f"experts.{self.by}", ctx)
        top_k = layer.attrs.top_k
        bad = [count for count in self._counts if not top_k <= count <= layer.experts]
        if bad:
            message, expected = "a layer cannot keep that many experts", f"top-k {top_k} to"
            expected = f"{expected} {layer.experts}"
            yield Problem(message, layer.name, expected, f"keep={bad[0]}")
        yield from missing_experts(layer, _listed(self.experts))

    def for_layers(self, layers: list[Anatomy], ctx: Context) -> list[ResizePass]:
        """Return the pass with the number of experts of each layer.

        Raises:
          InputError: another number of layers is listed.
        """
        counts = self._counts * len(layers) if len(self._counts) == 1 else self._counts
        if len(counts) != len(layers):
            message, expected = "another number of layers is listed", f"{len(layers)} numbers"
            names = ", ".join(layer.name for layer in layers)
            raise InputError(
                message, where="keep", expected=f"{expected}: {names}", found=f"{len(counts)}"
            )
        name = f"experts.{self.by}"
        if self.budget == "model" and not any(any(unread(layer, name, ctx)) for layer in layers):
            statistics = [statistic(layer, name, ctx) for layer in layers]
            values = [v for v in statistics if v is not None]
            least = [layer.attrs.top_k for layer in layers]
            # There are no values on reduced sizes.
            if len(values) == len(layers) and min(counts, default=0) >= max(least, default=0):
                counts = shared_out(values, least, sum(counts))
        return [replace(self, keep=count, budget="layer") for count in counts]

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Remove the experts that are not kept."""
        numbers, (count,) = _listed(self.experts), self._counts
        if not numbers:
            values = None if self.by == "draw" else statistic(layer, f"experts.{self.by}", ctx)
            if values is not None:
                numbers = largest(values, count)
            else:
                key = derive_key(ctx.seed, f"{layer.name}/prune")
                order = np.random.default_rng(key).permutation(layer.experts)
                numbers = tuple(sorted(order[:count].tolist()))
        resize(graph, layer, lambda parts: [parts[n] for n in numbers], layer.attrs.top_k)
        return f"kept experts {', '.join(map(str, numbers))}"


@dataclass(frozen=True)
class ToDensePass(ResizePass):
    """Replace every routed layer by one dense block, made of some of its experts.

    Before::

        %e, %g = route %l {top_k=2} : …
        %y = combine %o, %e, %s, %g : f32[batch=B, seq=S, embed=576]        # of 8 experts

    After ``to-dense{how=mean}``::

        %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=576]

    With ``concat`` the block has the neurons of all, which share the gates' sum; those of a virtual
    group are the dense block that they were cut from.
    """

    name = "to-dense"
    summary = "replace the experts of a layer by one dense block"

    how: Annotated[
        Literal["first", "mean", "concat"],
        "first: one expert; mean: of the weights; concat: a block with the neurons of all",
    ] = "first"
    experts: Annotated[
        str, "numbers of the experts, 0,2,5; empty: all, or with how=first number 0"
    ] = ""

    @property
    def preserves(self) -> Preserves:
        """The promise for experts that differ; `promise` refines it where they are copies."""
        return Preserves("approximate", f"one dense block in place of experts (how={self.how})")

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        numbers = expert_numbers(self.experts)
        if isinstance(numbers, Problem):
            return [numbers]
        if self.how == "first" and len(numbers) > 1:
            return [Problem("one expert is kept", "experts", "one number", self.experts)]
        return []

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield the problem that a layer does not have the experts, or that they cannot be one."""
        yield from missing_experts(layer, self.chosen(layer))
        if layer.layer.gate_dispatch is not None:
            message = "gates multiply rows at the experts, and a dense block has none"
            yield Problem(message, layer.name, hint="run this pass before weight-rows")
        for param in layer.params if self.how == "concat" else ():
            in_body = not param.users.keys().isdisjoint(layer.body)
            if in_body and param.type.names == ("expert",):
                message = "the experts' activations have parameters, which one block has but once"
                yield Problem(message, layer.name, found=f"%{param.name}", hint="how=mean")

    def chosen(self, layer: Anatomy) -> tuple[int, ...]:
        """Return the numbers of the experts that the block is made of."""
        default = (0,) if self.how == "first" else tuple(range(layer.experts))
        return _listed(self.experts) or default

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """Return ``reassociation`` where the block is what every choice adds up to."""
        row, attrs, chosen = convention(layer.attrs.gates), layer.attrs, self.chosen(layer)
        rows = members(layer.router)
        is_zero = all(isinstance(row, Full) and row.value == 0 for row in rows)
        is_constant = row.sum_is_constant(layer.experts, attrs.top_k) or is_zero
        if not is_constant or layer.drops:
            return self.preserves
        params = [p for p in layer.params if not p.users.keys().isdisjoint(layer.body)]
        weights = [members(param) for param in params]

        def is_group(size: int) -> bool:
            """Return whether all experts are copies of the first `size`, chosen together."""
            if any(
                part is not parts[n % size] for parts in weights for n, part in enumerate(parts)
            ):
                return False
            if size == 1:
                return True
            groups = [rows[at : at + size] for at in range(0, len(rows), size)]
            are_alike = attrs.top_k % size == 0 and all(len(set(group)) == 1 for group in groups)
            every = attrs.top_k == layer.experts and is_zero
            # The block has each member as often as every other.
            numbers = Counter(number % size for number in chosen)
            is_whole = len(numbers) == size and len(set(numbers.values())) == 1
            return row.equal_for_equal_logits and is_whole and (are_alike or every)

        sizes = range(1, len(chosen) + 1) if self.how == "concat" else (1,)
        if any(layer.experts % size == 0 and is_group(size) for size in sizes):
            return Preserves("reassociation")
        return self.preserves

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Replace the experts by the dense block."""
        attrs, chosen = layer.attrs, self.chosen(layer)
        # Where the sum of a token's gates is not constant, that of a zero router.
        row = convention(attrs.gates)
        total = row.zero_router_sum(layer.experts, attrs.top_k) * attrs.scale

        def weight_of(param: Value, is_last: bool) -> Expr:
            weights = members(param)
            parts = [weights[number] for number in chosen]
            if self.how != "concat":
                return scaled(mean(parts), total if is_last else 1.0)
            share, inner = total / len(parts), _inner_axis(param, is_last)
            if inner is not None:
                return scaled(Concat(tuple(parts), inner), share if is_last else 1.0)
            return scaled(reduce(Add, parts), share)

        make_dense(graph, layer, weight_of)
        return f"{layer.experts} experts became one dense block"


def _inner_axis(param: Value, is_last: bool) -> str | None:
    """Return the axis of a parameter that numbers neurons; None for a bias after the block."""
    products = [node for node in param.users if node.op.is_product]
    if not products:
        return None if is_last else param.type.names[-1]
    over = ProductOp.of_node(products[0]).over
    names = [name for name in param.type.names if name != "expert"]
    summed = [name for name in names if name in over]
    return summed[0] if is_last else next(name for name in names if name not in summed)


_SOURCE_DOC = "model that the expert is read from: base, the source itself, or one of --experts"


@dataclass(frozen=True)
class AppendExpertPass(ResizePass):
    """Append experts of this or another model, which a bias keeps from being chosen at first.

    Their rows of the router come with them.  Training, or an edit of the bias, lets tokens choose
    them.  With ``by=saliency``, the most useful experts of each layer are copied, and not all alike
    (after Expert Upcycling, 2604.19835): each copy is of the expert with the most for each of its
    copies.

    Before::

        %e, %g = route %l {top_k=2} : i32[…, choice=2], f32[…, choice=2]    # of 8 experts

    After ``append-expert{source=a source-expert=3}``::

        %e, %g = route %l, %b {top_k=2 using=(bias)} : …    # of 9 experts, %b is -2 of the last

    A copy with halved gates would not be exact: a token that chose the expert would choose both
    copies, and lose its last choice.
    """

    name = "append-expert"
    summary = "append experts, which a bias keeps from being chosen"

    count: Annotated[int, "number of experts that are appended", Bounds(1)] = 1
    source: Annotated[str, _SOURCE_DOC] = BASE
    source_expert: Annotated[int, "number of the expert in its model", Bounds(0)] = 0
    by: Annotated[
        Literal["number", "saliency", "share"],
        "which are appended: that of source-expert; or, from convert --capture, those with the "
        "most saliency (mean of gate times norm of the result), or share of the choices",
    ] = "number"
    bias: Annotated[BiasChoice, BIAS_DOC] = "auto"

    preserves = Preserves("reassociation")  # `promise` refines it

    def validate(self) -> list[Problem]:
        """Return the problems of the options."""
        problems = super().validate()
        if self.by != "number" and (self.source, self.source_expert) != (BASE, 0):
            message = "the experts are chosen among those of the model itself"
            options = f"source={self.source} source-expert={self.source_expert}"
            problems.append(Problem(message, "by", "by=number", options))
        return problems

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot have experts that are never chosen, or these ones."""
        yield from unknown_models([self.source], ctx.models, "source")
        if self.by == "number":
            yield from missing_experts(layer, (self.source_expert,))
        else:
            yield from unread(layer, f"experts.{self.by}", ctx)
        yield from not_dormant(layer, self.bias)

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """A bias is added to probabilities, which more experts make smaller."""
        is_copy = self.source == BASE
        return promise_of_dormant(layer, ctx, self.bias, self.count, are_copies=is_copy)

    def _numbers(self, layer: Anatomy, ctx: Context) -> list[int]:
        """Return the numbers of the experts to append, in order."""
        if self.by == "number":
            return [self.source_expert] * self.count
        values = statistic(layer, f"experts.{self.by}", ctx)
        if values is None:  # on reduced sizes, where any experts do
            values = np.ones(layer.experts)
        copies, numbers = np.ones(layer.experts), []
        for _ in range(self.count):
            numbers.append(int(np.argmax(values / copies)))
            copies[numbers[-1]] += 1
        return numbers

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Append the experts."""
        numbers, old = self._numbers(layer, ctx), layer.experts
        layer, param, value = with_bias(graph, layer, ctx, self.bias)
        total = old + self.count
        resize(
            graph,
            layer,
            lambda parts: [*parts, *(read_from(parts[n], self.source) for n in numbers)],
            layer.attrs.top_k,
            bias_factor=layer.bias_factor(total / old),
            dormant=Dormant(range(old, total), param, value, zero=False),
        )
        text = ", ".join(map(str, numbers))
        return f"{amount(self.count, 'expert')} appended: {text} of {self.source}"


@dataclass(frozen=True)
class ExchangeExpertPass(ResizePass):
    """Replace one expert by an expert of this or another model.

    Its row of the router comes with it.  All other tensors stay as they are, bit for bit, so that
    exchanging it back gives the very model.  A layer's result changes for tokens that chose the
    old expert, or choose the new one.

    Before::

        param %w : f32[expert=2, mlp=4, embed=4] = stack(source("0.w" : …), source("1.w" : …), …)

    After ``exchange-expert{expert=1 source=a}``::

        param %w : f32[expert=2, mlp=4, embed=4] = stack(source("0.w" : …), source("a:1.w" : …), …)
    """

    name = "exchange-expert"
    summary = "replace one expert by an expert of this or another model"

    expert: Annotated[int, "number of the expert that is replaced", Bounds(0)] = 0
    source: Annotated[str, _SOURCE_DOC] = BASE
    source_expert: Annotated[
        int | None, "number of the expert in its model; none: the same number", Bounds(0)
    ] = None

    preserves = Preserves("approximate", "tokens that choose the expert get the result of another")

    def problems(self, layer: Anatomy, ctx: Context) -> Iterator[Problem]:
        """Yield why a layer cannot have this expert."""
        yield from unknown_models([self.source], ctx.models, "source")
        yield from missing_experts(layer, tuple(dict.fromkeys((self.expert, self._number))))

    @property
    def _number(self) -> int:
        return self.expert if self.source_expert is None else self.source_expert

    def _exchanged(self, parts: list[Expr]) -> list[Expr]:
        """Return the weights of the experts with the new expert among them."""
        parts = list(parts)
        parts[self.expert] = read_from(parts[self._number], self.source)
        return parts

    def promise(self, layer: Anatomy, ctx: Context) -> Preserves:
        """Return ``exact`` where the new expert has the very weights of the old one."""
        weights = map(members, layer.params)
        is_same = all(self._exchanged(parts) == parts for parts in weights)
        return Preserves("exact") if is_same else self.preserves

    def build(self, graph: Graph, layer: Anatomy, ctx: Context) -> str:
        """Replace the expert."""
        resize(graph, layer, self._exchanged, layer.attrs.top_k)
        return f"expert {self.expert} is expert {self._number} of {self.source}"
