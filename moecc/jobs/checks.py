"""``--check``: verify that the passes of a pipeline keep their promises, on a reduced graph.

Each pass runs on the reduced graph, and the reference interpreter compares before and after on
random data: bit for bit where ``exact`` is promised, to 1e-12 of the magnitude for
``reassociation``; the error of an ``approximate`` pass is measured and shown beside the predicted
one.  The oracle is that of `moecc.testing`, which compares gradients, weights as they are stored
and the devices of small meshes, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import gcd, prod
from types import MappingProxyType

from moecc.errors import (
    CheckError,
    InputError,
    MoeccError,
    OwnOperationError,
    Problem,
    describe_error,
    raise_problems,
)
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.operand import Attrs
from moecc.ir.structure import clone, lost_precision, without_opaque
from moecc.ir.traits import Cut, Domain, Product
from moecc.prove import Prover, Verdict
from moecc.prove.prover import FINITE
from moecc.rewrite.passes import ERROR_MARGIN, Context, Pass, Preserves, ReadWeight
from moecc.rewrite.pipeline import Pipeline, format_pass
from moecc.rewrite.runner import Instrument, PassRun, run_pass
from moecc.support.console import warn
from moecc.support.untyped import JsonDict
from moecc.types import Array, Axis, TensorType
from moecc.weights.expr import Expr, Source

# A graph at reduced sizes, on which the reference interpreter can check promises of passes.
#
# A graph as imported is built again from a smaller config.  Any other graph is shrunk by its size
# constraints: equal numbers stay equal, the parts of a split or merge still make up the whole,
# slices still cut at the same fractions, and experts and top-k stay.  Its parameters become source
# tensors, which are drawn at random; parameters themselves cannot be drawn, since those that a pass
# copies from each other would then differ.

KEPT = 8
"""Sizes up to this are not reduced."""

MAX_SIZE = 24
"""The largest value of an unconstrained size."""

MAX_ELEMENTS = 4_000_000
"""The limit on the elements of all parameters together, for the interpreter."""

Form = tuple[int, tuple[int, ...]]
"""A size as a product: a fixed factor, and other sizes to be reduced."""


def reduced(graph: Graph) -> Graph:
    """Return `graph` at reduced sizes, its parameters made from sources.

    Raises:
      InputError: the graph is not reducible, with the reason.
    """
    graph = without_opaque(graph)
    again = _from_config(graph)
    if again is not None:
        return again
    sizes = reduce_sizes(graph)
    try:
        small = resized(graph, sizes)
    except InputError as error:
        raise not_reducible(error.problems[0].message, error.problems[0].where) from None
    count = sum(prod(s for s in v.type.sizes if isinstance(s, int)) for v in small.params.values())
    if count > MAX_ELEMENTS:
        largest = max((s for v in small.params.values() for s in v.type.sizes), key=_number)
        raise not_reducible(f"{count:,} elements are left, and the size {largest} cannot shrink")
    return small


def small_if_possible(graph: Graph) -> Graph:
    """Return `graph` at reduced sizes, or as it is if it cannot be reduced."""
    try:
        return reduced(graph)
    except InputError:
        return graph


def not_reducible(why: str, where: str | None = None) -> InputError:
    """Return the error for a graph that cannot be reduced."""
    return InputError(
        f"the graph is not reducible, so it cannot be checked: {why}",
        where=where,
        hint="check the graph as `moecc import` writes it, before other passes",
    )


def _number(size: object) -> int:
    return size if isinstance(size, int) else 0


def _from_config(graph: Graph) -> Graph | None:
    """Return the graph built from a reduced config, or None if the graph was changed since."""
    if not {"family", "config"} <= set(graph.attrs):
        return None
    from moecc.families import rebuild

    try:
        rebuilt = rebuild(graph.attrs, shrink=False)
        small = rebuild(graph.attrs, shrink=True)
    except InputError:
        return None
    # A rewritten graph keeps its config, but differs from what the config builds.
    return small if _skeleton(rebuilt) == _skeleton(graph) else None


def _skeleton(graph: Graph) -> list[tuple[str, str, int]]:
    return [(n.op.name, n.loc, len(n.operands)) for n in graph]


def _source(value: Value) -> Expr | None:
    if not value.type.is_static or not value.type.dtype.is_float:
        return None
    plain = TensorType(value.type.dtype, tuple(Axis(a.name, a.size) for a in value.type))
    return Source(value.name, plain)


def reduce_sizes(graph: Graph) -> dict[int, int]:
    """Return a reduced size for each fixed size of `graph`.

    Sizes for which the constraints leave no other value are not reduced.
    """
    pinned, forms = _constraints(graph)
    numbers = {s for v in _values(graph) for s in v.type.sizes if isinstance(s, int)}
    numbers |= {part for some in forms.values() for _, parts in some for part in parts}
    while True:
        sizes = _settle(sorted(numbers | set(forms)), pinned, forms)
        if isinstance(sizes, dict):
            return sizes
        # Two products disagree: the size and its parts are kept.
        pinned.add(sizes)
        pinned.update(part for _, parts in forms[sizes] for part in parts)


def _settle(
    numbers: Iterable[int], pinned: set[int], forms: Mapping[int, set[Form]]
) -> dict[int, int] | int:
    """Return reduced sizes, or the first number with two contradicting sizes."""
    from moecc.families.shrinking import shrink_size

    sizes: dict[int, int] = {}
    # The parts of a number are smaller, so they are settled before it.
    for number in numbers:
        candidates = {
            factor * prod(sizes[p] for p in parts) for factor, parts in forms.get(number, ())
        }
        if number in pinned or number <= KEPT:
            candidates.add(number)
        if len(candidates) > 1:
            return number
        sizes[number] = candidates.pop() if candidates else shrink_size(number, MAX_SIZE)
    return sizes


def _values(graph: Graph) -> Iterable[Value]:
    yield from graph.inputs.values()
    yield from graph.params.values()
    for node in graph.every_node():
        yield from node.results
        if node.body is not None:
            yield from node.body.inputs.values()


def _constraints(graph: Graph) -> tuple[set[int], dict[int, set[Form]]]:
    """Return the sizes to keep, and the products that sizes must equal."""
    pinned: set[int] = set()
    forms: dict[int, set[Form]] = {}
    cuts: dict[int, int] = {}
    for node in graph.every_node():
        rule = None if node.op.sizes is None else node.op.sizes(node)
        if isinstance(rule, Product):
            # A part of size 1 makes the whole equal to another part, which then is the same number.
            parts = tuple(p for p in map(_number, rule.parts) if p > 1)
            if len(parts) > 1:
                forms.setdefault(_number(rule.size), set()).add((1, parts))
        elif isinstance(rule, Cut):
            size = _number(rule.size)
            cuts[size] = gcd(cuts.get(size, size), *rule.ends)
        pinned.update(_pinned(node))
    for size, unit in cuts.items():
        for count in range(1, size // unit + 1):
            forms.setdefault(count * unit, set()).add((count, (unit,)))
        forms[unit].discard((1, (unit,)))
    return pinned, {n: some for n, some in forms.items() if some}


def _pinned(node: Node) -> Iterator[int]:
    """Yield the sizes kept because of `node`: layers, experts, and how many are chosen."""
    attrs: Attrs = node.attrs
    for name, spec in node.op.attrs.items():
        if not spec.pins:
            continue
        value = attrs[name]
        if spec.kind == "axis":
            yield _number(node.operands[0].type[value].size)
        elif spec.kind == "sizes":
            yield from (_number(size) for _, size in value)
        else:
            yield value


def resized(graph: Graph, sizes: Mapping[int, int]) -> Graph:
    """Return `graph` with other sizes, its parameters made from sources.

    Raises:
      InputError: the sizes do not fit together.
    """
    small = Graph(graph.name, graph.attrs)
    image: dict[Value, Value] = {}
    for name, value in graph.inputs.items():
        image[value] = small.input(name, _map_type(value.type, sizes))
    for name, value in graph.params.items():
        image[value] = small.param(name, _map_type(value.type, sizes), loc=value.loc)
        image[value].weight = _source(image[value])
    for node in graph:
        small.copy(node, image, _map_attrs(node, sizes))
    for name, value in graph.outputs.items():
        small.set_output(name, image[value])
    return small


def _map_type(type: TensorType, sizes: Mapping[int, int]) -> TensorType:
    return type.with_axes(
        Axis(a.name, sizes[a.size], a.mesh) if isinstance(a.size, int) else a for a in type.axes
    )


def _map_attrs(node: Node, sizes: Mapping[int, int]) -> JsonDict:
    attrs: JsonDict = dict(node.attrs)
    if node.body is not None:
        return {**attrs, "body": resized(node.body, sizes)}
    for name, spec in node.op.attrs.items():
        if spec.kind == "sizes":
            attrs[name] = tuple((n, sizes.get(s, s)) for n, s in attrs[name])
        elif spec.shrinks and attrs[name]:
            attrs[name] = sizes.get(attrs[name], attrs[name])
    return attrs


SEEDS = (0, 1)
"""The seeds of the random data on which each pass is compared."""


@dataclass(frozen=True)
class PassProof:
    """What the prover says of a pass, on the graph that the pass changed and the one it made.

    Attributes:
      run: the pass.
      verdict: on the promise; None for a fault of the prover.
      equality: the verdict in real arithmetic, which an exact promise implies; None also where
        parameters without a weight expression keep it from being compared with that of a small one.
      is_for_all_weights: whether the pass promised an equality, and read no weights for it.
      is_guard: whether it took away what hides numbers that may not be finite.
      problems: the violations of its promise.
    """

    run: PassRun
    verdict: Verdict | None
    equality: Verdict | None
    is_for_all_weights: bool
    is_guard: bool
    problems: tuple[Problem, ...] = ()

    @property
    def is_proved(self) -> bool:
        """Whether the promise is proved, and kept in what no proof is about."""
        return bool(self.verdict) and not self.problems

    @property
    def is_unequal(self) -> bool:
        """Whether the terms of both graphs were compared, and are not equal in real arithmetic."""
        return self.equality is not None and self.equality.node not in ("", "the graphs", "devices")

    @property
    def gap(self) -> str:
        """Why there is no proof, in words; empty where there is one."""
        if self.is_proved:
            return ""
        bits = "equal in real arithmetic, but for bits " if self.equality else ""
        return bits + ("the prover failed" if self.verdict is None else gap(self.verdict))


def gap(verdict: Verdict) -> str:
    """Return why two graphs are not proved equal, in words."""
    place, (reason, _) = verdict.node, verdict.terms
    return reason if place == "the graphs" else f"the graphs part at {place}"


NO_PROOFS: Mapping[int, PassProof] = MappingProxyType({})


@dataclass(frozen=True)
class Checked:
    """The result of checking a pass.

    Attributes:
      number: its position, from 1.
      item: the pass.
      promise: its promise for the reduced graph.
      measured: the root mean square of the change of outputs, relative to the outputs; None where
        the promise is proved.
      problems: the violations of its promise.
      assumptions: those of the proof.
      gap: why an equality is measured and not proved, where a proof was tried.
    """

    number: int
    item: Pass
    promise: Preserves
    measured: float | None
    problems: tuple[Problem, ...] = ()
    assumptions: tuple[str, ...] = ()
    gap: str = ""

    def __str__(self) -> str:
        evidence = "proved, if every value is finite" if FINITE in self.assumptions else "proved"
        if self.measured is not None:
            evidence = f"measured relative error {self.measured:.2g}"
            if self.gap:
                evidence += f" at small sizes only, not proved: {self.gap}"
        return f"{self.number} {format_pass(self.item)}: promised {self.promise}; {evidence}"

    def to_json(self) -> JsonDict:
        """Return the result as JSON values."""
        return {
            "pass": format_pass(self.item),
            "promised": asdict(self.promise),
            "proved": self.measured is None,
            "assumptions": list(self.assumptions),
            "measured_error": self.measured,
            "gap": self.gap or None,
        }


def check_pipeline(
    graph: Graph,
    pipeline: Pipeline,
    *,
    context: Context | None = None,
    seeds: Sequence[int] = SEEDS,
    proofs: Mapping[int, PassProof] = NO_PROOFS,
) -> list[Checked]:
    """Check each pass of `pipeline` on `graph` at reduced sizes; `graph` is not changed.

    Args:
      graph: before the first pass.
      pipeline: the passes.
      context: of the passes.
      seeds: of the random data.
      proofs: what was found at the graph's own sizes, by the numbers of the passes; what is proved
        is not sampled, but for guards of numbers that may not be finite.

    Raises:
      CheckError: a pass broke its promise; all such passes are named.
      InputError: the graph cannot be reduced, or a pass cannot be applied to the reduced graph.
    """
    raise_problems([p for proof in proofs.values() for p in proof.problems], CheckError)
    proved = [_proved(n, proof) for n, proof in sorted(proofs.items()) if proof.is_proved]
    is_proved = len(proved) == len(pipeline)
    if is_proved and not any(proof.is_guard for proof in proofs.values()):
        return proved
    context = Context() if context is None else context
    try:
        done = [*_checked_small(reduced(graph), pipeline, context, seeds, proofs)]
    except InputError:
        if is_proved:
            return proved
        raise
    raise_problems([p for result in done for p in result.problems], CheckError)
    return done


def _checked_small(
    small: Graph,
    pipeline: Pipeline,
    context: Context,
    seeds: Sequence[int],
    proofs: Mapping[int, PassProof],
) -> Iterator[Checked]:
    """Run the passes on a graph of reduced sizes, and yield what is found of each."""
    for number, item in enumerate(pipeline, 1):
        before = clone(small)
        try:
            run = run_pass(small, item, context, number)
        except InputError as error:
            raise InputError(_on_reduced(p, number, item) for p in error.problems) from None
        proof = proofs.get(number)
        if proof is not None and proof.is_proved and not proof.is_guard:
            yield _proved(number, proof)
            continue
        checked = _checked(number, item, run.preserves, before, small, seeds, proof)
        if proof is not None and proof.is_proved and not checked.problems:
            checked = _proved(number, proof)
        yield checked


def _proved(number: int, proof: PassProof) -> Checked:
    assert proof.verdict is not None, "a proof"
    run, assumptions = proof.run, proof.verdict.assumptions
    return Checked(number, run.item, run.preserves, None, assumptions=assumptions)


def _on_reduced(problem: Problem, number: int, item: Pass) -> Problem:
    where = f"--check, pass {number}, {item.name}, on the reduced graph"
    return replace(problem, where=f"{where}, {problem.where}" if problem.where else where)


def _checked(
    number: int,
    item: Pass,
    promise: Preserves,
    before: Graph,
    after: Graph,
    seeds: Sequence[int],
    proof: PassProof | None,
) -> Checked:
    same = _with_outputs_of(before, after)
    from moecc.testing.oracle import TOLERANCE

    differences = broken_promise(promise, before, same, seeds)
    problems = tuple(
        Problem("the pass broke its promise", f"pass {number}, {item.name}", str(promise), text)
        for text in differences
    )
    measured = 0.0 if differences else max(_measured(item, before, same, after, s) for s in seeds)
    if not promise.allows_error(measured, TOLERANCE):
        problems += (
            Problem(
                "the pass broke its promise",
                f"pass {number}, {item.name}",
                f"a relative error of at most {ERROR_MARGIN:g} times {promise.predicted_error:.2g}",
                f"a measured relative error of {measured:.2g} on random data",
                "predict the error of this pass, or leave predicted_error out",
            ),
        )
    if not problems and proof is not None and proof.is_unequal:
        # What is proved at small sizes alone depends on them, or on how often the pass ran.
        is_same = proof.is_for_all_weights and promise.is_equality
        if is_same and promise_verdict(Prover(), before, same):
            assert proof.equality is not None, "terms were compared"
            problems += (
                Problem(
                    "the promise is proved at small sizes, not at those of the graph",
                    f"pass {number}, {item.name}, {proof.equality.node}",
                    *proof.equality.terms,
                    "the pass depends on sizes, or on how often it ran; what it makes without "
                    "this check can be compared: moecc prove, moecc verify --against",
                ),
            )
    return Checked(
        number, item, promise, measured, problems, gap="" if proof is None else proof.gap
    )


def _measured(item: Pass, before: Graph, same: Graph, after: Graph, seed: int) -> float:
    from moecc.testing.oracle import measure

    error = item.measure(before, after, seed)
    return measure(before, same, seed) if error is None else error


def _with_outputs_of(before: Graph, after: Graph) -> Graph:
    """Return `after` without the outputs that a pass added: a loss, say; the others must stay."""
    same = clone(after)
    for name in [n for n in same.output_names if n not in before.output_names]:
        same.drop_output(name)
    return same


def broken_promise(
    promise: Preserves, before: Graph, after: Graph, seeds: Sequence[int] = SEEDS
) -> list[str]:
    """Return what differs between two graphs although it was promised not to, a line each.

    An ``approximate`` pass promises nothing that random data could refute.
    """
    from moecc.testing.oracle import differences

    if promise.kind == "approximate":
        return []
    same, is_exact = _with_outputs_of(before, after), promise.kind == "exact"
    samples = (differences(before, same, seed, is_exact) for seed in seeds)
    problems = next(filter(None, samples), [])
    verdict = promise_verdict(Prover(exact=is_exact), before, same) if problems else None
    if verdict is not None and verdict.node:
        problems = [f"{text}; the graphs part at {verdict.node}" for text in problems]
    return problems + lost_precision(before, after)


def promise_verdict(
    prover: Prover, before: Graph, after: Graph, *, refute: bool = False
) -> Verdict | None:
    """Return what the prover finds of two graphs, in the outputs of the first.

    None stands for a fault of the prover, which is reported.
    """
    try:
        return prover.prove(before, after, outputs=before.outputs.keys(), refute=refute)
    except (MemoryError, OwnOperationError):
        raise
    except Exception as error:  # Sampling decides then, as where no proof is found.
        warn(f"the prover failed, which is a bug in moecc: {describe_error(error)}")
        return None


# Check the promises of the passes of a conversion, before anything is written.

CONTRACT_SEEDS = (0,)
"""The seed of the random data on which a conversion checks each pass; ``--check`` takes two."""


@dataclass(frozen=True)
class Contracts:
    """The promises that the passes of a conversion kept, on the model at reduced sizes.

    Attributes:
      passes: those that were checked.
      unchecked: why they were not; empty if they were.
    """

    passes: tuple[Checked, ...] = ()
    unchecked: str = ""


class PassProofs(Instrument):
    """Proves of each pass that it keeps its promise, on the graph at its own sizes, or refutes it.

    Attributes:
      source: the graph before the first pass.
      real: the prover of real arithmetic, for promises of reassociation.
      proofs: what was found of the passes that are not approximate, by their numbers.
    """

    def __init__(self) -> None:
        self.real, self._bits = Prover(), Prover(exact=True)
        self.proofs: dict[int, PassProof] = {}
        self.source = self._last = Graph("")
        self._has_read = False

    def watched(self, read: ReadWeight) -> ReadWeight:
        """Return a reader of weights that shows which passes use it."""

        def read_watched(weight: Expr) -> Array | None:
            self._has_read = True
            return read(weight)

        return read_watched

    def start(self, graph: Graph, pipeline: Pipeline) -> None:
        """Copy the graph, which passes change in place.

        Raises:
          OwnOperationError: as the further methods, of an operation of the user's own.
        """
        from moecc.testing.traits import check_traits

        check_traits(graph)
        self.source = self._last = clone(graph)

    def before(self, number: int, item: Pass, graph: Graph) -> None:
        """Forget what earlier passes have read."""
        self._has_read = False

    def after(self, run: PassRun, graph: Graph) -> None:
        """Try to prove that the pass kept its promise, or to refute it."""
        from moecc.testing.traits import check_traits

        check_traits(graph)
        before, self._last = self._last, clone(graph)
        promise = run.preserves
        if promise.kind == "approximate":
            return
        prover = self._bits if promise.kind == "exact" else self.real
        # Of weights that were read, drawn ones tell nothing.
        is_for_all = promise.is_equality and not self._has_read
        verdict = equality = promise_verdict(prover, before, self._last, refute=is_for_all)
        if not verdict and prover is self._bits:
            equality = promise_verdict(self.real, before, self._last)
        if any(v.weight is None for v in before.params.values()):
            equality = None  # in place of such parameters a reduced graph has tensors
        broken = lost_precision(before, self._last)
        if verdict is not None and verdict.counterexample is not None:
            broken = [f"{verdict.counterexample}; the graphs part at {verdict.node}", *broken]
        problems = (
            Problem("the pass broke its promise", f"pass {run.number}, {run.item.name}",
                    str(promise), text)
            for text in broken
        )  # fmt: skip
        is_real = promise.kind != "exact"  # bits are those of all numbers, finite or not
        is_guard = is_real and bool(_guards(before) - _guards(self._last))
        proof = PassProof(run, verdict, equality, is_for_all, is_guard, tuple(problems))
        self.proofs[run.number] = proof


def _guards(graph: Graph) -> Counter[tuple[str, str]]:
    """Return what makes numbers that are not finite, and hides them, by place; empty without both.

    Real arithmetic has no such numbers: a proof does not see one that is no longer hidden.
    """
    makers = [n for n in graph.every_node() if n.op.domain is Domain.POSITIVE]
    outputs = {*graph.outputs.values()}
    hiders = (
        n
        for n in graph.every_node()
        if n.op.name in ("select", "mask") and (n.result.users or n.result in outputs)
    )
    return Counter((n.loc, n.op.name) for n in (*makers, *hiders)) if makers else Counter()


def check_contracts(
    graph: Graph,
    pipeline: Pipeline,
    context: Context,
    proofs: Mapping[int, PassProof],
) -> Contracts:
    """Hold each pass of a conversion to its promise: one without a proof at reduced sizes.

    Raises:
      CheckError: a pass broke its promise, or left an invalid graph.
    """
    # Neither weights nor statistics are read: they have the sizes of the real model.
    seed, models = context.seed, context.models
    statistics = None if context.statistics is None else replace(context.statistics, shapes=None)
    plain = Context(seed=seed, allow_unmatched=context.allow_unmatched, models=models,
                    statistics=statistics)  # fmt: skip
    try:
        checked = check_pipeline(graph, pipeline, context=plain, seeds=CONTRACT_SEEDS,
                                 proofs=proofs)  # fmt: skip
    except CheckError:
        raise
    except MoeccError as error:
        return Contracts(unchecked=error.problems[0].message)
    except Exception as error:  # a crash has its reproducer when the real model is converted
        return Contracts(unchecked=describe_error(error))
    return Contracts(tuple(replace(c, measured=_rounded(c.measured)) for c in checked))


def _rounded(error: float | None) -> float | None:
    """Return an error of two digits; 0 for one that rounding explains, which machines differ in."""
    from moecc.testing.oracle import TOLERANCE

    if error is None:
        return None
    return float(f"{error:.1e}") if error > TOLERANCE else 0.0


NOT_CHECKED = Contracts(unchecked="--no-check")
"""The contracts of a conversion whose passes are not checked."""
