"""Compare the prover with the reference on pairs of graphs.

A pair agrees unless the prover says *proved* and the reference differs, or *refuted* and the
reference agrees on all data.  A pair that disagrees is made small and stored as two texts.
"""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moecc.errors import MoeccError
from moecc.ir import Graph, Node, clone, print_graph
from moecc.ir.verify import VerifyError, verify

from .judge import Difference, difference
from .pairs import Pair, parted, remove_dead_nodes
from .sources import pair_of

DISAGREEMENTS = Path(__file__).parent / "disagreements"
LIMIT_SECONDS = 30
FURTHER_DRAWS = 1000
"""How often more data are drawn before a refutation counts as wrong."""


class TooLongError(Exception):
    """A pair took longer than the limit."""


@contextmanager
def limited(seconds: int = LIMIT_SECONDS) -> Iterator[None]:
    """Raise TooLongError after some seconds of processor time, in the main thread."""

    def stop(*_: object) -> None:
        raise TooLongError

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


@dataclass
class Outcome:
    """The outcome of a pair.

    Attributes:
      kind: ``agreed``, ``unsound`` (proved, and the reference differs), ``unfounded`` (refuted, and
        it does not), ``crashed`` or ``slow``.
      status: the prover's verdict.
      differs: whether the reference differs; None where it was not asked.
      at_node: whether a refutation named an edited node; None without an edited node.
      in_layer: whether it named such a node, or a node of its layer.
      node: where the prover says that the graphs part.
      detail: the difference, or the trace.
      prover_seconds: the processor time of the prover.
    """

    kind: str
    status: str = ""
    differs: bool | None = None
    at_node: bool | None = None
    in_layer: bool | None = None
    node: str = ""
    detail: str = ""
    prover_seconds: float = 0.0


def compare(
    before: Graph,
    after: Graph,
    seed: int,
    *,
    exact: bool = False,
    is_sound: bool = False,
    ask: bool = True,
    right: Graph | None = None,
) -> Outcome:
    """Ask the prover and the reference about two graphs.

    Args:
      before: the graph that is right.
      after: the graph to compare.
      seed: chooses the data.
      exact: whether equality is that of bits.
      is_sound: whether the edits are right, so that little data will do.
      ask: whether the reference is asked where the prover finds neither.
      right: `after` without its mistake, which a refutation is to name.
    """
    from moecc.prove import prove

    started = time.process_time()
    try:
        verdict = prove(before, after, exact=exact)
    except TooLongError:
        raise
    except Exception:
        return Outcome("crashed", detail=traceback.format_exc())
    outcome = Outcome("agreed", verdict.status, node=verdict.node)
    outcome.prover_seconds = time.process_time() - started
    if verdict.status == "unknown" and not ask:
        return outcome
    is_proved = verdict.status == "proved"
    gap = difference(
        before,
        after,
        seed,
        exact=exact,
        thorough=not (is_sound and is_proved),
        coarse=not (is_proved or exact),
    )
    if verdict.status == "refuted" and gap is None:
        gap = difference(before, after, seed, exact=exact, thorough=True, more=FURTHER_DRAWS)
    outcome.differs = gap is not None
    if is_proved and gap is not None:
        outcome.kind = "unsound"
    if verdict.status == "refuted":
        if gap is None:
            outcome.kind = "unfounded"
        elif right is not None:
            outcome.at_node = is_named(verdict, parted(right, after))
            outcome.in_layer = outcome.at_node or is_located(verdict, right, after)
    outcome.detail = described(gap) if gap else f"{verdict.node} {verdict.terms}"[:500]
    return outcome


def is_named(verdict: Any, names: set[str]) -> bool:
    """Return whether a refutation names one of the values at which graphs part."""
    words = str(verdict.node or "").replace("%", " ").replace(",", " ").split()
    return any(word in names for word in words)


def is_located(verdict: Any, right: Graph, wrong: Graph) -> bool:
    """Return whether a refutation names the location of a value at which graphs part."""
    names = parted(right, wrong)
    places = {
        node.loc
        for graph in (right, wrong)
        for node in graph
        if node.loc and any(v.name in names for v in node.results)
    }
    words = str(verdict.node or "").replace("@", " ").split()
    return any(word in places for word in words)


def described(gap: Difference) -> str:
    """Return a difference in a line."""
    return f"{gap.law}: {gap.line} [{gap.kind}, {dict(gap.sizes)}]"


def compare_pair(pair: Pair, seed: int, *, exact: bool = False) -> Outcome:
    """Return the outcome of a pair."""
    return compare(
        pair.before,
        pair.after,
        seed,
        exact=exact,
        is_sound=pair.is_sound,
        ask=seed % 4 == 0,
        right=pair.right,
    )


# Making a disagreement small.

Question = Callable[[Graph, Graph], bool]


def minimised(before: Graph, after: Graph, disagrees: Question) -> tuple[Graph, Graph]:
    """Return smaller graphs that still disagree: outputs dropped, common values made inputs."""
    before, after = clone(before), clone(after)
    for name in list(before.output_names):
        if len(before.output_names) > 1:
            before, after = _if_it_disagrees(before, after, _without_output(name), disagrees)
    names = [v.name for n in before for v in n.results]
    for name in reversed(names):
        before, after = _if_it_disagrees(before, after, _cut_at(name), disagrees)
    return before, after


def _if_it_disagrees(
    before: Graph, after: Graph, change: Callable[[Graph], bool], disagrees: Question
) -> tuple[Graph, Graph]:
    small = clone(before), clone(after)
    try:
        if not all(change(g) for g in small):
            return before, after
        for graph in small:
            remove_dead_nodes(graph)
        unused = [n for n, v in small[0].inputs.items() if not v.users]
        for name in unused:
            if name in small[1].inputs and not small[1].inputs[name].users:
                small[0].erase_input(name)
                small[1].erase_input(name)
        for graph in small:
            verify(graph)
        return small if disagrees(*small) else (before, after)
    except (MoeccError, VerifyError, KeyError, ValueError, AssertionError):
        return before, after


def _without_output(name: str) -> Callable[[Graph], bool]:
    def change(graph: Graph) -> bool:
        if name not in graph.output_names or len(graph.output_names) < 2:
            return False
        graph.drop_output(name)
        return True

    return change


def _cut_at(name: str) -> Callable[[Graph], bool]:
    """Return a change that makes the value `name`, which both graphs have, an input."""

    def change(graph: Graph) -> bool:
        if name not in graph:
            return False
        value = graph.value(name)
        node: Node | None = value.node
        if node is None or value.type.extents or node.op.assigns_slots or f"{name}_in" in graph:
            return False
        value.replace_by(graph.input(f"{name}_in", value.type))
        return True

    return change


def save(
    pair: Pair, outcome: Outcome, source: str, exact: bool, folder: Path = DISAGREEMENTS
) -> Path:
    """Make a disagreement small and write it to a folder of its own."""

    def disagrees(before: Graph, after: Graph) -> bool:
        with limited():
            return compare(before, after, pair.seed, exact=exact).kind == outcome.kind

    before, after = pair.before, pair.after
    with suppress(TooLongError):
        before, after = minimised(before, after, disagrees)
    path = folder / f"{outcome.kind}-{source}-{pair.seed}{'-exact' if exact else ''}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "before.moe").write_text(print_graph(before), "utf-8")
    (path / "after.moe").write_text(print_graph(after), "utf-8")
    facts = {**asdict(outcome), "edits": pair.edits, "seed": pair.seed, "exact": exact}
    (path / "about.json").write_text(json.dumps(facts, indent=1), "utf-8")
    return path


def run_until(until: float, seeds: range, source: str) -> dict[str, Any] | None:
    """Return the counts of a range of seeds, or None after a time."""
    return run(seeds, source) if time.time() < until else None


def run(seeds: range, only: str = "") -> dict[str, Any]:
    """Compare the pairs of `seeds` and return counts."""
    counts: Counter[str] = Counter()
    edits: dict[str, Counter[str]] = {}
    failures: list[str] = []
    crashes: Counter[str] = Counter()
    started, processor, prover = time.monotonic(), time.process_time(), 0.0
    for seed in seeds:
        source, exact = "", False
        try:
            with limited():
                source, pair = pair_of(seed, only)
                if pair is None:
                    counts["no pair"] += 1
                    continue
                exact = seed % 5 == 4
                outcome = compare_pair(pair, seed, exact=exact)
        except TooLongError:
            counts["slow"] += 1
            failures.append(f"slow: {source} {seed}")
            continue
        label = "exact " if exact else ""
        label += "sound" if pair.is_sound else "wrong"
        counts["pairs"] += 1
        counts[f"{source} pairs"] += 1
        counts[f"{label}: {outcome.status or outcome.kind}"] += 1
        if outcome.differs is not None and outcome.status:
            says = "differs" if outcome.differs else "agrees"
            counts[f"{outcome.status}, reference {says}"] += 1
        if outcome.at_node is not None:
            counts["refuted at the node" if outcome.at_node else "refuted elsewhere"] += 1
            counts["refuted in the layer"] += bool(outcome.in_layer)
        for name in set(pair.edits[-1:] if not pair.is_sound else pair.edits):
            edits.setdefault(name, Counter())[outcome.status or outcome.kind] += 1
        prover += outcome.prover_seconds
        if outcome.kind != "agreed":
            counts[outcome.kind] += 1
            crashes[" ".join(outcome.detail.split()[-30:])] += outcome.kind == "crashed"
            if crashes[" ".join(outcome.detail.split()[-30:])] > 1:
                continue
            path = save(pair, outcome, source, exact)
            failures.append(f"{outcome.kind}: {path.name}: {outcome.detail[-300:]}")
    return {
        "seeds": [seeds.start, seeds.stop],
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "prover_seconds": round(prover, 1),
        "counts": dict(sorted(counts.items())),
        "edits": {n: dict(c) for n, c in sorted(edits.items())},
        "failures": failures,
    }
