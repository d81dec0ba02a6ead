"""Laws that every graph and every pass obeys, as checks for property tests.

    @given(graphs())
    def test_my_pass(graph):
        laws.check_pass(MyPass(), graph)

A check raises AssertionError, with the text of the graph, where the law does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NoReturn

from moecc.backend import get_backend
from moecc.decoding import NOWHERE, DecodeGraphs, PlainSession, empty_cache
from moecc.errors import InputError
from moecc.ir.builder import Builder
from moecc.ir.conventions import LOGITS
from moecc.ir.graph import Graph
from moecc.ir.structure import clone, equal, fingerprint, lost_precision
from moecc.ir.text import parse, print_graph
from moecc.ir.verify import VerifyError, verify
from moecc.rewrite.passes import Context, Pass, PassResult
from moecc.support.lazy import np
from moecc.testing.oracle import TOLERANCE, assert_same, measure
from moecc.testing.traits import false_traits
from moecc.types import F64, Array, Arrays, parse_type

# Counting on how many drawn graphs a pass found something to do, so that no law is empty.
#
# Hypothesis tells a test neither when it begins nor when it ends, so graphs are counted by the
# place in the code that has them checked, and by the pass.

LEAST = 0.01
"""The share of drawn graphs on which a pass must match, unless the test says otherwise."""

ENOUGH = 50
"""After so many graphs the share is looked at; sooner where a test draws fewer, never below 20."""

HINT = (
    "graphs(like=RULE) plants what a rule, a pattern or an example graph describes; least=0 is "
    "for a pass that need not match"
)


@dataclass
class Tally:
    """The graphs that one test has checked one pass on.

    Attributes:
      name: the pass.
      graphs: how many there were.
      matched: on how many of them the pass matched.
      complaint: what is wrong; it stays, since Hypothesis repeats a test that failed.
    """

    name: str
    graphs: int = 0
    matched: int = 0
    complaint: str = ""

    def count(self, matched: bool, least: float) -> str:
        """Count a graph, and return what is wrong if too few have matched by now."""
        if self.complaint:
            return self.complaint
        self.graphs += 1
        self.matched += matched
        if self.graphs >= enough() and self.matched < least * self.graphs:
            self.complaint = (
                f"the pass {self.name} matched on {self.matched} of {self.graphs} graphs, so its "
                f"laws were hardly tested\n  expected: at least {least:.0%}\n  hint: {HINT}"
            )
        return self.complaint


_TALLIES: dict[tuple[CodeType, type[Pass], str], Tally] = {}


def tally(item: Pass, depth: int = 2) -> Tally:
    """Return the tally of a pass in the test that calls.

    Args:
      item: the pass.
      depth: how many frames up the test is, seen from here.
    """
    key = sys._getframe(depth).f_code, type(item), repr(item)
    return _TALLIES.setdefault(key, Tally(item.name))


def enough() -> int:
    """Return after how many graphs the share is looked at: no more than the test draws."""
    hypothesis = sys.modules.get("hypothesis")
    if hypothesis is None or not hypothesis.currently_in_test_context():
        return ENOUGH
    drawn: int = hypothesis.settings.default.max_examples
    return max(20, min(ENOUGH, drawn))


Rewrite = Callable[[Graph], object]
"""Changes a graph in place; what it returns is ignored."""


def check_graph(graph: Graph) -> None:
    """Check that `graph` is valid, and equal to its copy and to its text read back."""
    check_valid(graph)
    check_round_trip(graph)
    check_clone(graph)


def check_valid(graph: Graph) -> None:
    """Check that the verifier accepts `graph`."""
    try:
        verify(graph)
    except VerifyError as error:
        _fail(f"the graph is not valid: {error}", graph)


def check_round_trip(graph: Graph) -> None:
    """Check that the text of `graph` parses back to an equal graph of the same text."""
    text = print_graph(graph)
    again = parse(text)
    if not equal(again, graph) or fingerprint(again) != fingerprint(graph):
        _fail("the text reads back as another graph", graph, again)
    if print_graph(again) != text:
        _fail("the text changes when it is read back and printed", graph, again)


def check_clone(graph: Graph) -> None:
    """Check that a copy of `graph` is equal to it, prints the same and shares no node."""
    copy = clone(graph)
    if not equal(copy, graph) or print_graph(copy) != print_graph(graph):
        _fail("the copy differs", graph, copy)
    if set(copy) & set(graph):
        _fail("the copy shares a node with the graph", graph)


def applied(item: Pass, graph: Graph) -> tuple[Graph, PassResult]:
    """Return a copy of `graph` after the pass, which must be valid, and what the pass returns.

    A pass that must match may match nothing here.
    """
    after = clone(graph)
    try:
        result = item.apply(after, Context(allow_unmatched=True))
        verify(after)
    except VerifyError as error:
        _fail(f"the pass leaves a graph that is not valid: {error}", graph, after)
    return after, result


def check_changed_flag(item: Pass, graph: Graph) -> tuple[Graph, PassResult]:
    """Check that the pass reports a change exactly when it changed the graph.

    Returns:
      what `applied` returns.
    """
    after, result = applied(item, graph)
    if result.changed == equal(graph, after):
        _fail(f"changed={result.changed}, which is not so", graph, after)
    return after, result


def check_idempotent(item: Pass, graph: Graph) -> None:
    """Check that the pass changes nothing the second time."""
    once, _ = applied(item, graph)
    twice, result = applied(item, once)
    if not equal(once, twice):
        _fail("the pass changes its own result", once, twice)
    if result.changed:
        _fail("the pass says that it changes its own result", once)


def check_preserves(item: Pass, graph: Graph, seeds: Sequence[int] = (0,)) -> None:
    """Check that the pass preserves the function as far as it promises.

    After ``exact`` the outputs are equal bit for bit, after ``reassociation`` within the tolerance
    of `assert_same`.  An ``approximate`` pass is held to the error that it predicts, if any.
    """
    after, result = applied(item, graph)
    promise = result.preserves or item.preserves
    if promise.kind == "approximate":
        if promise.predicted_error is not None:
            error = max(measure(graph, after, seed) for seed in seeds)
            if not promise.allows_error(error, TOLERANCE):
                _fail(f"the pass promises {promise}; measured {error:.2g}", graph, after)
        return
    try:
        for problem in lost_precision(graph, after):
            raise AssertionError(problem)
        assert_same(graph, after, seeds=seeds, exact=promise.kind == "exact")
    except AssertionError as error:
        _fail(f"the pass promises {promise}: {error}", graph, after)


def check_pass(
    item: Pass,
    graph: Graph,
    *,
    seeds: Sequence[int] = (0,),
    idempotent: bool = True,
    least: float = LEAST,
) -> None:
    """Check all laws of a pass on `graph`, and that graphs like it give the pass something to do.

    What is called again and again from one place, with one pass, is a test on drawn graphs.  Once
    there were enough of them and the pass has matched on fewer than the share `least`, the test
    fails, and reports on how many: a law of a pass that does nothing proves nothing.

    Args:
      item: the pass.
      graph: stays as it is.
      seeds: of the random data on which the function is compared.
      idempotent: whether the pass is expected to change nothing the second time.
      least: the share of the graphs on which the pass must match; 0 for one that need not.
    """
    hits = tally(item)
    _, result = check_changed_flag(item, graph)
    complaint = hits.count(bool(result.changed or result.matched), least)
    if complaint:
        raise AssertionError(complaint)
    check_preserves(item, graph, seeds)
    if idempotent:
        check_idempotent(item, graph)


def check_sharded(graph: Graph, seeds: Sequence[int] = (0,)) -> None:
    """Check that the devices of the mesh of `graph` together compute what it means.

    Args:
      graph: a graph on a mesh of at most `moecc.testing.oracle.MAX_DEVICES` devices.
      seeds: of the random data on which it runs.
    """
    check_valid(graph)
    try:
        assert_same(graph, graph, seeds=seeds)
    except AssertionError as error:
        _fail(str(error), graph)


def check_rewrite(
    rewrite: Rewrite, graph: Graph, *, seeds: Sequence[int] = (0,), exact: bool = False
) -> None:
    """Check that a function that rewrites a graph in place leaves it valid and the same.

    Args:
      rewrite: the function; it works on a copy.
      graph: stays as it is.
      seeds: of the random data on which the function is compared.
      exact: whether the outputs must be equal bit for bit.
    """
    after = clone(graph)
    rewrite(after)
    check_valid(after)
    try:
        assert_same(graph, after, seeds=seeds, exact=exact)
    except AssertionError as error:
        _fail(str(error), graph, after)


def check_operation(name: str, *operands: str, **attrs: Any) -> None:
    """Check that the meaning of an operation has the traits that its row declares.

        laws.check_operation("mish", "f32[batch=3, embed=8]")

    ``moecc prove`` and ``--check`` do so for every operation of the user's own that a graph has.

    Args:
      name: the operation.
      operands: the type of each of its operands.
      **attrs: its attributes.
    """
    graph = Graph(name)
    values = [
        graph.input(f"x{i}", parse_type(text, graph.value)) for i, text in enumerate(operands)
    ]
    try:
        node = Builder(graph).node(name, *values, **attrs)
        problems = false_traits(node, must=True)
    except InputError as error:
        problems = list(error.problems)
    if problems:
        raise AssertionError("\n".join(map(str, problems)))


def _fail(message: str, graph: Graph, after: Graph | None = None) -> NoReturn:
    text = f"{message}\n\n{print_graph(graph)}"
    raise AssertionError(text if after is None else f"{text}\nafter:\n\n{print_graph(after)}")


# The law of the pass ``decode``: in steps a graph has the logits that it has at once.


def run_in_steps(graph: Graph, params: Arrays, inputs: Arrays, parts: Iterable[int]) -> Array:
    """Return the logits of all tokens, of which `parts` are given to the decode graph at a time.

    Args:
      graph: the graph of a decoder, or of an encoder-decoder.
      params: its parameters by name.
      inputs: its inputs by name.
      parts: how many tokens each step takes; all steps together take them all.
    """
    graphs = DecodeGraphs.of(graph)
    tokens = inputs[graphs.tokens]
    texts, places = tokens.shape[0], tokens.shape[1] + 1
    session = PlainSession(get_backend("reference"), params, F64)
    for name, cache in graphs.caches.items():
        session.keep({name: empty_cache(cache, texts, places).astype(float)})
    if graphs.encode is not None:
        session.keep(session.run(graphs.encode, {n: inputs[n] for n in graphs.encode.inputs}))
    key_positions, logits, at = np.full((texts, places), NOWHERE), [], 0
    for count in parts:
        here = np.tile(np.arange(at, at + count), (texts, 1))
        key_positions[:, at : at + count] = here
        step_inputs: dict[str, Array] = {
            graphs.tokens: tokens[:, at : at + count],
            "positions": here,
            "key_positions": key_positions,
            "start": np.array(at),
        }
        present = {n: a for n, a in step_inputs.items() if n in graphs.step.inputs}
        outputs = session.run(graphs.step, present)
        logits.append(outputs[LOGITS])
        at += count
    return np.concatenate(logits, axis=1)


def step_error(graph: Graph, params: Arrays, inputs: Arrays, parts: Sequence[int]) -> float:
    """Return how far the logits of `graph` in steps are from those at once, of the largest."""
    expected = get_backend("reference").compile(graph, dtype=F64).run(params, inputs)[LOGITS]
    stepped = run_in_steps(graph, params, inputs, parts)
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(stepped - expected).max()) / scale


def check_decode(graph: Graph, params: Arrays, inputs: Arrays, parts: Sequence[int]) -> None:
    """Check that `graph` has the same logits in steps and at once, up to the order of sums."""
    error = step_error(graph, params, inputs, parts)
    if not error <= TOLERANCE:
        raise AssertionError(f"logits differ by {error:.2g} of the largest, in steps of {parts}")
