"""Logs and graphs with one fault each, which a checker must not accept."""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from fractions import Fraction
from hashlib import sha256
from typing import Any

Proof = tuple[dict[str, Any], str, str]
"""A log, and the texts of two graphs."""


def proof_of(kind: str, *words: str) -> Proof | None:
    """Return the proof of a run or a cell of the matrix as it is written; None if there is none.

    A ``part`` is a micro-batch of half of a batch of a checkpoint after a pipeline, a ``step`` one
    of generation.
    """
    import moecc_check

    from moecc.errors import MoeccError
    from moecc.ir.text import print_graph
    from moecc.prove import prove
    from moecc.prove.log import pruned

    from ..oracle import matrix  # noqa: TID252
    from ..prove.test_decoding import steps_of  # noqa: TID252
    from ..prove.test_parts import with_losses  # noqa: TID252

    if kind == "part":
        before, after = (with_losses(*words, 4 // n, f"parts={n}") for n in (1, 2))
    elif kind == "step":
        try:
            before, after = steps_of(*words)
        except MoeccError:  # of a model that generates nothing
            return None
    else:
        graphs = (
            matrix.transformed(*words)
            if kind == "run"
            else matrix.composed(matrix.cell_named(*words))
        )
        if isinstance(graphs, matrix.Row):
            return None
        before, after, _ = graphs
    verdict = prove(before, after)
    if verdict.status != "proved":
        return None
    log, texts = json.loads(json.dumps(verdict.log)), (print_graph(before), print_graph(after))
    return pruned(log, moecc_check.accepted(log, *texts)), *texts


def is_accepted(checker: Any, proof: Proof, *, is_pruned: bool = True) -> bool:
    """Return whether a checker accepts a proof, as its command does if it has no idle step."""
    try:
        used = checker.accepted(*copy.deepcopy(proof))
    except checker.Rejected:
        return False
    parts = (proof[0], proof[0].get("devices", {"steps": []}))
    return not is_pruned or [*map(len, used)] == [len(p["steps"]) for p in parts]


def corrupted(proof: Proof, chance: random.Random) -> tuple[str, Proof]:
    """Return a kind of fault and the proof with it."""
    while True:
        kind = chance.choice(sorted(FAULTS))
        log, before, after = copy.deepcopy(proof)
        is_of_devices = "devices" in log and kind not in OF_TEXTS and chance.random() < 0.5
        part = log["devices"] if is_of_devices else log
        changed = FAULTS[kind](part, before, after, chance)
        if changed is None:
            continue
        log = log if is_of_devices else changed[0]
        if (log, *changed[1:]) != proof:
            return kind, (log, *changed[1:])


def _recounted(log: dict[str, Any]) -> dict[str, Any]:
    log["lemmas"] = dict(sorted(Counter(name for name, _, _ in log["steps"]).items()))
    return log


def _other_term(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Exchange the term of a step with that of another step of the same lemma, or any."""
    rows = {s[1] for s in log["steps"]}
    if len(rows) < 2:
        return None
    step = chance.choice(log["steps"])
    rows.remove(step[1])
    step[1] = chance.choice(sorted(rows))
    return log, before, after


def _other_lemma(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Name another lemma of the log in a step."""
    names = {s[0] for s in log["steps"]}
    if len(names) < 2:
        return None
    step = chance.choice(log["steps"])
    names.remove(step[0])
    step[0] = chance.choice(sorted(names))
    return _recounted(log), before, after


def _other_count(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Change how often a lemma was used."""
    if not log["lemmas"]:
        return None
    name = chance.choice(sorted(log["lemmas"]))
    log["lemmas"][name] += chance.choice((-1, 1))
    return log, before, after


def _other_number(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Change a number among the parameters of a step."""
    places = [(s, i) for s in log["steps"] for i, p in enumerate(s[2]) if isinstance(p, int)]
    if not places:
        return None
    step, at = chance.choice(places)
    step[2][at] += chance.choice((-2, -1, 1, 2))
    if step[0] == "split a sum":
        # A sum splits by every divisor of its length, and both graphs may have it: no fault.
        length, by = log["terms"][step[2][0]["term"]][2], step[2][at]
        if isinstance(length, int) and by > 0 and length % by == 0:
            return None
    return log, before, after


def _other_operand(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Replace a term among the parameters of a step by another row of its kind."""
    places = [(s, i) for s in log["steps"] for i, p in enumerate(s[2]) if isinstance(p, dict)]
    if not places:
        return None
    step, at = chance.choice(places)
    number = step[2][at]["term"]
    kind, row = log["terms"][number][0], log["terms"]
    rows = [i for i, r in enumerate(row) if r[0] == kind and r != row[number]]
    if not rows:
        return None
    step[2][at] = {"term": chance.choice(rows)}
    return log, before, after


def _dropped(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Drop a step."""
    if not log["steps"]:
        return None
    del log["steps"][chance.randrange(len(log["steps"]))]
    return log, before, after


def _other_coefficient(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Change a coefficient of a term."""
    rows = [r for r in log["terms"] if r[0] == "sum" and r[1]]
    if not rows:
        return None
    pair = chance.choice(chance.choice(rows)[1])
    pair[0] = str(Fraction(pair[0]) + chance.choice((1, 2, Fraction(1, 2))))
    return log, before, after


def _terms_of_steps(log: dict[str, Any]) -> list[Any]:
    """Return the terms that steps say something of.

    A term that only names how many slots an axis has is none: an equation holds at each index,
    whatever their number, and the checker takes all such names for one.
    """
    numbers = {s[1] for s in log["steps"]}
    numbers |= {p["term"] for s in log["steps"] for p in s[2] if isinstance(p, dict)}
    for number in range(len(log["terms"]) - 1, -1, -1):
        if number in numbers:
            match log["terms"][number]:
                case ["sum", pairs]:
                    numbers |= {m for _, m in pairs}
                case ["function", variables, body]:
                    numbers |= {*variables, body}
                case ["apply", _, _, *parts] | ["product", *parts]:
                    numbers |= {i for part in parts for i in part}
    return [log["terms"][number] for number in sorted(numbers)]


def _other_attribute(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Change a number among the attributes of an application."""
    rows = [
        (r[2], i)
        for r in _terms_of_steps(log)
        if r[0] == "apply"
        for i, v in enumerate(r[2])
        if isinstance(v, int | float) and not isinstance(v, bool)
    ]
    if not rows:
        return None
    attrs, at = chance.choice(rows)
    attrs[at] += chance.choice((1, 2))
    return log, before, after


def _other_text(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Change a graph under the proof: the second, and its digest, or that of the devices."""
    edits = [
        (r"eps=[0-9.e-]+", "eps=0.125"),
        (r"\{by=[0-9.]+\}", "{by=0.375}"),
        (r"= add (%\S+), (%\S+) :", r"= mul \1, \2 :"),
        (r"= silu ", "= gelu "),
        (r"top_k=2", "top_k=1"),
        (r'source\("(?=[^"]*(?:norm|proj|embed|dense|weight))', 'source("x'),
        (r"theta=[0-9.]+", "theta=123.0"),
        (r"= (all_reduce|all_gather|shard|all_to_all) (.*)mesh=\w+", r"= \1 \2mesh=model"),
        (r"( unreduced\(\w+\))", ""),
        (r"= update_slice (.*), %start", r"= update_slice \1, %tokens"),
        (r"= (\w+ .*\{.*)\bkv_seq\b", r"= \1seq"),
        (r"(\w+)@\w+=", r"\1="),
    ]
    pattern, text = chance.choice(edits)
    of_devices = "parts" in log and chance.random() < 0.5
    graph = log["parts"][0] if of_devices else after
    matches = list(re.finditer(pattern, graph))
    if not matches:
        return None
    match = chance.choice(matches)
    graph = graph[: match.start()] + match.expand(text) + graph[match.end() :]
    if of_devices:
        return {**log, "parts": [graph]}, before, after
    return {**log, "after": sha256(graph.encode()).hexdigest()}, before, graph


def _other_digest(log: dict[str, Any], before: str, after: str, chance: random.Random) -> Any:
    """Change a graph alone."""
    return log, before.replace("%", "%a", 1), after


FAULTS = {
    "another term": _other_term,
    "another lemma": _other_lemma,
    "another count": _other_count,
    "another number": _other_number,
    "another operand": _other_operand,
    "a step dropped": _dropped,
    "another coefficient": _other_coefficient,
    "another attribute": _other_attribute,
    "another graph": _other_text,
    "another text": _other_digest,
}
"""Functions of a log, or of its part about devices, two texts and a random generator."""
OF_TEXTS = ("another graph", "another text")
