"""Laws that every graph and every pass obeys, as checks for property tests.

    @given(graphs())
    def test_my_pass(graph):
        laws.check_pass(MyPass(), graph)

A check raises AssertionError, with the text of the graph, where the law does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from moecc.ir.graph import Graph
from moecc.ir.parser import parse
from moecc.ir.printer import print_graph
from moecc.ir.structure import clone, equal, fingerprint
from moecc.ir.verify import VerifyError, verify
from moecc.pipeline.passes import Context, Pass, PassResult
from moecc.testing.hits import LEAST, tally
from moecc.testing.oracle import assert_same

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


def applied(item: Pass, graph: Graph, seed: int = 0) -> tuple[Graph, PassResult]:
    """Return a copy of `graph` after the pass, which must be valid, and what the pass returns.

    A pass that must match may match nothing here.
    """
    after = clone(graph)
    try:
        result = item.apply(after, Context(seed=seed, allow_unmatched=True))
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
    of `assert_same`.  An ``approximate`` pass promises nothing that random data could refute.
    """
    after, result = applied(item, graph)
    promise = result.preserves or item.preserves
    if promise.kind == "approximate":
        return
    try:
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
      graph: a graph on a mesh of at most `moecc.testing.devices.MAX_DEVICES` devices.
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


def _fail(what: str, graph: Graph, after: Graph | None = None) -> NoReturn:
    text = f"{what}\n\n{print_graph(graph)}"
    raise AssertionError(text if after is None else f"{text}\nafter:\n\n{print_graph(after)}")
