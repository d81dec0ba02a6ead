"""The log of a proof, as ``docs/proof-log.md`` defines it: a table of terms, and steps."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from fractions import Fraction
from math import isinf
from pathlib import Path
from typing import Any

from moecc.errors import CheckError, Problem
from moecc.ir.graph import Graph
from moecc.ir.text import print_graph
from moecc.prove import lemmas, shards
from moecc.prove.decoding import CACHE
from moecc.prove.mesh import Devices
from moecc.prove.rules import Step
from moecc.prove.stopped import frozen_parameters
from moecc.support.untyped import JsonDict
from moecc.terms.term import (
    Abstraction,
    Algebra,
    Application,
    Monomial,
    OpenMonomial,
    Polynomial,
    Var,
)

SCHEMA = "moecc.proof/1"

_TAGGED = re.compile(r"(slots|groups) (\d+)")
"""A size that an assignment of slots sets: in terms its serial number, in logs its row."""


def log_of(
    before: Graph,
    after: Graph,
    steps: Iterable[Step],
    algebra: Algebra,
    *,
    outputs: Collection[str],
    exact: bool = False,
    rolled: bool = False,
    fractions: bool = False,
    devices: Devices | None = None,
    batch: Graph | None = None,
) -> JsonDict:
    """Return the log of a proof as a JSON object.

    Args:
      before: the first graph.
      after: the second graph.
      steps: of the proof, in their order.
      algebra: that built its terms.
      outputs: the names of those that are equal.
      exact: whether it is a proof of equal bits.
      rolled: whether repetition is read as a function of its body.
      fractions: whether constants are the simplest numbers that their floats are to 15 digits.
      devices: the proof that devices compute them, of graphs on a mesh.
      batch: the first graph on devices that have a part each, if the second computes one.
    """
    believed = {} if exact else _believed(before, after)
    of_devices = {} if devices is None else _replay(devices.lemmas.steps, devices.algebra)
    return {
        "schema": SCHEMA,
        "exact": exact,
        "rolled": rolled,
        "outputs": sorted(outputs),
        "fractions": fractions,
        "before": digest(before),
        "after": digest(after),
        **_replay(steps, algebra),
        **({"devices": of_devices} if of_devices else {}),
        **believed,
        **({} if batch is None else {"parts": [print_graph(batch)]}),
    }


def _believed(*graphs: Graph) -> dict[str, list[str]]:
    """Return the traits of the user's own operations that a proof believes, with their names."""
    nodes = (n for graph in graphs for n in graph.every_node())
    operations = sorted({n.op for n in nodes if n.op.source is not None}, key=str)
    traits = {
        "elementwise": [op.name for op in operations if op.elementwise],
        "commutative": [op.name for op in operations if op.commutative and not op.elementwise],
    }
    return {trait: names for trait, names in traits.items() if names}


def step_log(before: Graph, after: Graph) -> JsonDict:
    """Return the log of a proof that a step of generation computes rows of the graph of texts.

    It has no lemmas. Of graphs with repeated layers there is none, which a checker does not write
    out.

    Args:
      before: the graph of texts.
      after: the graph of a step.
    """
    if any(node.body is not None for graph in (before, after) for node in graph):
        return {}
    outputs = [name for name in after.outputs if not name.startswith(CACHE)]
    log = log_of(before, after, (), Algebra(), outputs=outputs)
    return {**log, "step": True}


def frozen_log(log: JsonDict, before: Graph, after: Graph) -> JsonDict:
    """Return the log of a proof of two graphs with frozen parameters.

    Args:
      log: of the proof of both with the gradients of frozen parameters stopped.
      before: the first graph, as it is.
      after: the second graph, as it is.
    """
    frozen = [[f"%{name}" for name in frozen_parameters(graph)] for graph in (before, after)]
    return {**log, "before": digest(before), "after": digest(after), "frozen": frozen}


def _replay(steps: Iterable[Step], algebra: Algebra) -> JsonDict:
    """Return steps, the table of their terms, and how many there are of each lemma."""
    table = _Table(algebra)
    rows = [[s.lemma, table.row(s.term), table.parameters(s)] for s in steps]
    return {"terms": table.rows, "steps": rows, "lemmas": _counts(rows)}


def pruned(log: JsonDict, needed: Sequence[Collection[int]]) -> JsonDict:
    """Return a log with some of its steps alone, and the terms that they refer to.

    Args:
      log: of a proof.
      needed: the numbers of the steps, and of those about devices.
    """
    result = _pruned(log, needed[0])
    if "devices" in log:
        result["devices"] = _pruned(log["devices"], needed[1])
    return result


def _pruned(log: JsonDict, needed: Collection[int]) -> JsonDict:
    steps = [log["steps"][i] for i in sorted(needed)]
    numbers: dict[int, int] = {}
    rows: list[object] = []

    def moved(number: int) -> int:
        if number not in numbers:
            row = _renumbered(log["terms"][number], moved)
            numbers[number] = len(rows)
            rows.append(row)
        return numbers[number]

    def parameter(value: Any) -> object:
        return {"term": moved(value["term"])} if isinstance(value, dict) else value

    rows_of_steps = [[name, moved(row), [parameter(p) for p in more]] for name, row, more in steps]
    return {**log, "terms": rows, "steps": rows_of_steps, "lemmas": _counts(rows_of_steps)}


def _counts(steps: Iterable[Any]) -> dict[str, int]:
    return dict(sorted(Counter(name for name, _, _ in steps).items()))


def _renumbered(row: Any, moved: Callable[[int], int]) -> list[object]:
    """Return a row that refers to other numbers."""

    def attribute(value: Any) -> Any:
        if isinstance(value, list):
            return [attribute(v) for v in value]
        match = _TAGGED.fullmatch(value) if isinstance(value, str) else None
        return f"{match[1]} {moved(int(match[2]))}" if match else value

    match row:
        case ["variable", name, size]:
            return ["variable", name, attribute(size)]
        case ["sum", pairs]:
            return ["sum", [[c, moved(m)] for c, m in pairs]]
        case ["apply", head, attrs, *parts]:
            return ["apply", head, attribute(attrs), *([moved(i) for i in p] for p in parts)]
        case ["product", *parts]:
            return ["product", *([moved(i) for i in p] for p in parts)]
        case ["function", variables, body]:
            return ["function", [moved(i) for i in variables], moved(body)]
    raise TypeError(f"{row!r} is no row")


def proof_paths(file: Path) -> tuple[Path, Path, Path]:
    """Return the files of a proof: its log, and the texts of both graphs beside it."""
    return file, file.with_suffix(".before.moe"), file.with_suffix(".after.moe")


def write_proof(verdict_log: JsonDict, before: Graph, after: Graph, file: Path) -> tuple[Path, ...]:
    """Write a log with the steps that ``moecc-check`` needs, and the texts of both graphs.

    Args:
      verdict_log: of a proof.
      before: the first graph.
      after: the second graph.
      file: of the log; the texts are beside it, ``.before.moe`` and ``.after.moe``.

    Raises:
      CheckError: the checker does not accept the proof.
    """
    # Only here: the checker stands alone, and nothing else in the package may need it.
    import moecc_check

    texts = (print_graph(before), print_graph(after))
    log = json.loads(json.dumps(verdict_log))
    try:
        needed = moecc_check.accepted(log, *texts)
    except moecc_check.Rejected as error:
        problem = Problem("moecc-check does not accept the proof", found=str(error))
        raise CheckError([problem]) from None
    paths = proof_paths(file)
    for path, text in zip(paths, (json.dumps(pruned(log, needed)), *texts), strict=True):
        path.write_text(text, "utf-8")
    return paths


def digest(graph: Graph) -> str:
    """Return the SHA-256 of a graph's text."""
    return hashlib.sha256(print_graph(graph).encode()).hexdigest()


class _Table:
    """Terms as rows of JSON, each after those that it refers to by their numbers."""

    def __init__(self, algebra: Algebra) -> None:
        self.rows: list[object] = []
        self._algebra = algebra
        self._assignments = algebra.sums_by_serial()
        self._numbers: dict[object, int] = {}

    def row(self, term: object) -> int:
        """Return the number of the row of a term, which is added if there is none."""
        if term not in self._numbers:
            self._numbers[term] = self._append(self._row(term))
        return self._numbers[term]

    def _append(self, row: list[object]) -> int:
        self.rows.append(row)
        return len(self.rows) - 1

    def parameters(self, step: Step) -> list[object]:
        """Return the parameters of a step: numbers, words, and rows of terms."""
        match step.lemma, step.term:
            case "common factor", Application() as application:
                content = lemmas.content_of(self._algebra, application.arguments[0])
                return [self._reference(value) for value in content or ()]
            case "place in a shard", Application() as application:
                parts = shards.parts_of_place(self._algebra, application)
                return [self._reference(value) for value in parts]
            case "join sums", Polynomial() as total:
                return self._joined_sums(total, *step.parameters)
            case "join ranges", Polynomial() as total:
                return self._joined_ranges(total, *step.parameters)
        return [self._reference(value) for value in step.parameters]

    def _reference(self, value: object) -> object:
        return value if isinstance(value, int | str) else {"term": self.row(value)}

    def _function(self, bound: Iterable[Var], body: int) -> dict[str, int]:
        return {"term": self._append(["function", [self.row(v) for v in bound], body])}

    def _summand(self, coefficient: object, product: OpenMonomial) -> int:
        return self._append(["sum", [[str(coefficient), self.row(product)]]])

    def _joined_sums(self, total: Polynomial, *parameters: Any) -> list[object]:
        """Return the summand as a function of the variable of its sum, and the further length."""
        first, at, second, then = parameters
        bound, factors = self._algebra.opened(first)
        inner = OpenMonomial(1, (*bound[:at], *bound[at + 1 :]), factors)
        summand = self._summand(dict(total.terms)[first], inner)
        length = 0 if then < 0 else second.bound[then].size
        return [self._function([bound[at]], summand), length]

    def _joined_ranges(self, total: Polynomial, *parameters: Any) -> list[object]:
        """Return what stands beside the range, and its index, as functions; and the three ends."""
        first, at, second, then = parameters
        bound, factors = self._algebra.opened(first)
        beside = OpenMonomial(1, (), (*factors[:at], *factors[at + 1 :]))
        summand = self._function(bound, self._summand(dict(total.terms)[first], beside))
        index = self._function(bound, self.row(factors[at].arguments[0]))
        return [summand, index, *factors[at].head.attrs, second.factors[then].head.attrs[1]]

    def _row(self, term: object) -> list[object]:
        match term:
            case Var():
                name = f"{term.name}.{term.level}" if term.level else term.name
                return ["variable", name, self._attribute(term.size)]
            case Application():
                attrs = [self._attribute(a) for a in term.head.attrs]
                functions = [self.row(a) for a in term.abstractions]
                arguments = [self.row(p) for p in term.arguments]
                return ["apply", term.head.name, attrs, functions, arguments]
            case Abstraction():
                return ["function", [self.row(v) for v in term.variables], self.row(term.body)]
            case Monomial() | OpenMonomial():
                bound = [self.row(v) for v in term.bound]
                return ["product", bound, [self.row(f) for f in term.factors]]
            case Polynomial():
                pairs = [(Fraction(c), self.row(m)) for m, c in term.terms]
                return ["sum", [[str(c), m] for c, m in pairs]]
        raise TypeError(f"{term!r} is no term")

    def _attribute(self, value: Hashable) -> object:
        """Return an attribute of a head in JSON: tuples as lists, infinities as words."""
        if isinstance(value, tuple):
            return [self._attribute(v) for v in value]
        if isinstance(value, float) and isinf(value):
            return "inf" if value > 0 else "-inf"
        match = _TAGGED.fullmatch(value) if isinstance(value, str) else None
        if match and (slots := self._assignments.get(int(match[2]))) is not None:
            return f"{match[1]} {self.row(slots)}"
        return value if isinstance(value, int | float | str | None) else str(value)
