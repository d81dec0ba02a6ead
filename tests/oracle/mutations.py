"""Wrong passes, graphs, sharding tables, weights and exports: none is proved, most are located.

    python -m tests.oracle.mutations [--share S] [--jobs N] [--seconds S] [--out FILE]

Five kinds of wrong pairs: the mutants of ``tests/mutants`` on random graphs, slips in golden models
after upcycling, graphs laid on a mesh by a wrong row of a sharding table, golden models with a
wrong weight expression, and exports with exchanged names.  Those on which the reference differs
count.
Writes a dated JSON: how many are proved, which must be none, refuted, refuted where the graphs
part, and open.  A run that was stopped, or given a number of seconds, goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sharding_cases import SLOTS, WAYS, layer

from moecc.errors import MoeccError
from moecc.ir import OPS, Graph, clone
from moecc.ir.mesh import parse_mesh
from moecc.ir.structure import equal
from moecc.ir.verify import VerifyError, verify
from moecc.rewrite import P
from moecc.rewrite.passes import Context, Pass
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.testing.generate import random_graph, random_sharding
from moecc.testing.weights import Decisions
from moecc.translate.export import export_graph
from moecc.version import __version__

from ..mutants import (  # noqa: TID252
    axes,
    experts,
    feed_forward,
    gradients,
    inner,
    meshes,
    promises,
    routing,
    stored,
    upcycling,
)
from .fuzz import TooLongError, compare, limited
from .matrix import equal_cells, golden_names, has_experts, read_back, source_graph, with_outputs_of
from .pairs import apply_edit
from .sound_edits import pick
from .wrong_edits import WRONG

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "proofs" / "mutants.json"

ON_GRAPHS: dict[str, Pass] = {
    name: item
    for module in (feed_forward, axes, experts, routing, upcycling, gradients, stored, inner)
    for name, item in module.MUTANTS.items()
} | {n: promises.MUTANTS[n] for n in ("negate_twice", "reassociate_and_promise_exact")}
"""Mutants whose result is a graph; those that only lie about having changed something are none."""

LIKE: dict[str, Any] = {**inner.LIKE, **dict.fromkeys(gradients.MUTANTS, gradients.LIKE)}

GOLDEN = (
    "llama_gqa", "qwen2_square", "gemma2_square", "gpt2_square", "mixtral_gqa", "qwen3_moe_norm",
    "glm4_moe_square", "t5_relu_tied", "bert_square", "olmoe_norm", "granitemoe_square_v4",
)  # fmt: skip
"""Models that slips are put into."""


@dataclass(frozen=True)
class Wrong:
    """A pair of graphs, the second wrong.

    Attributes:
      kind: ``pass``, ``slip``, ``table``, ``weight`` or ``export``.
      name: the mutant.
      before: the graph that is right.
      after: the other.
      exact: whether bits are promised.
      right: the graph that `after` would be without the mistake; by default `before`.
    """

    kind: str
    name: str
    before: Graph
    after: Graph
    exact: bool = False
    right: Graph | None = None


def wrong_passes(each: int, seed: int) -> Iterator[Wrong]:
    """Yield random graphs with the results of wrong passes, `each` of every pass."""
    for name, item in sorted(ON_GRAPHS.items()):
        yield from _on_random_graphs("pass", name, item, each, seed, "")
    for name, item in sorted(meshes.MUTANTS.items()):
        yield from _on_random_graphs("pass", name, item, each, seed, "a:2,b:2")


def _on_random_graphs(
    kind: str, name: str, item: Pass, each: int, seed: int, mesh: str
) -> Iterator[Wrong]:
    count = 0
    for number in range(seed, seed + 400):
        graph = random_graph(number, max_steps=4, like=LIKE.get(name, ()))
        try:
            if mesh:
                graph = random_sharding(graph, Decisions(number), parse_mesh(mesh))
            after = clone(graph)
            result = item.apply(after, Context(seed=number, allow_unmatched=True))
            verify(after)
        except (MoeccError, VerifyError, AssertionError, ValueError, KeyError):
            continue
        if equal(graph, after):
            continue
        promise = result.preserves or item.preserves
        yield Wrong(kind, name, graph, after, promise.kind == "exact")
        count += 1
        if count >= 12 * each:
            return


LAID = {
    "data:2": "data-parallel",
    "data:4,model:2": "st-moe",
    "far:2,near:2": "expert-hierarchical",
    "data:2,expert:4": "expert-replicated",
}
"""Layouts on which a mixture is laid while a row is wrong."""


def wrong_tables(each: int, seed: int, only: str = "") -> Iterator[Wrong]:
    """Yield graphs laid on a mesh while a row of a sharding table, of `only` or any, is wrong."""
    for name in [only] if only else [*meshes.TABLES, *meshes.COLLECTIVES]:
        op = meshes.TABLES[name].op if name in meshes.TABLES else "contract"
        for number in range(seed, seed + 12 * each):
            with meshes.wrong_row(name):
                try:
                    before, after = (
                        _laid_mixture(number)
                        if OPS[op].moves or OPS[op].assigns_slots or number % 3 == 0
                        else _laid(op, number)
                    )
                    verify(after)
                except (MoeccError, VerifyError, AssertionError, ValueError, KeyError):
                    continue
            yield Wrong("table", name, before, after)


def _laid(op: str, number: int) -> tuple[Graph, Graph]:
    """Return a random graph with an operation, and the graph laid on a mesh."""
    graph = random_graph(number, max_steps=3, like=P.op(op, *(P.any() for _ in OPS[op].operands)))
    return graph, random_sharding(graph, Decisions(number), parse_mesh("a:2,b:2"))


def _laid_mixture(number: int) -> tuple[Graph, Graph]:
    """Return a mixture of experts, and the graph laid on a mesh."""
    layouts = [*LAID.items()]
    mesh, rules = layouts[number % len(layouts)]
    before = layer(SLOTS[number // len(layouts) % len(SLOTS)])
    after, way = clone(before), WAYS[number % len(WAYS)]
    laid = f"annotate-sharding{{mesh={mesh} rules={rules}}}"
    try:
        run_pipeline(after, Pipeline.parse(f"{laid},expert-parallel{{{way}}},lower-collectives"))
    except MoeccError:
        after = clone(before)
        run_pipeline(after, Pipeline.parse(f"{laid},lower-collectives"))
    return before, after


@cache
def upcycled(name: str, number: int) -> Graph | None:
    """Return a golden model after a pass, its slips' subject."""
    after = clone(source_graph(name))
    dense = (
        "upcycle{experts=4 router-std=1}",
        "upcycle{experts=4 granularity=2 top-k=4 router-std=1}",
        "upcycle{experts=3 shared=0.5 router-std=1}",
    )
    sparse = ("grow", "weight-rows", "fuse-gate-up")
    text = (sparse if has_experts(name) else dense)[number % 3]
    try:
        run_pipeline(after, Pipeline.parse(text), context=Context(allow_unmatched=True))
    except MoeccError:
        return None
    return after


def slips(count: int, seed: int) -> Iterator[Wrong]:
    """Yield golden models after a pass, with a slip anywhere."""
    rng = np.random.default_rng([seed, 1])
    yielded = 0
    for number in range(20 * count):
        name = GOLDEN[number % len(GOLDEN)]
        right = upcycled(name, number // len(GOLDEN))
        if right is None:
            continue
        edit = pick(rng, [e for e in WRONG.values() if e.name != "mistake_a_weight"])
        edited = apply_edit(right, edit, rng)
        if edited is None:
            continue
        yield Wrong("slip", f"{edit.name} in {name}", source_graph(name), edited[0], right=right)
        yielded += 1
        if yielded >= 2 * count:
            return


def wrong_weights(count: int, seed: int) -> Iterator[Wrong]:
    """Yield golden models after a pass, with a wrong weight expression."""
    rng = np.random.default_rng([seed, 2])
    yielded = 0
    for number in range(20 * count):
        name = GOLDEN[number % len(GOLDEN)]
        right = upcycled(name, number // len(GOLDEN))
        edited = right and apply_edit(right, WRONG["mistake_a_weight"], rng)
        if right is None or not edited:
            continue
        yield Wrong("weight", f"in {name}", source_graph(name), edited[0], right=right)
        yielded += 1
        if yielded >= 2 * count:
            return


def wrong_exports(count: int, seed: int) -> Iterator[Wrong]:
    """Yield sources, and exports read back in which two names are exchanged."""
    chance = random.Random(seed)
    for cell in chance.sample(equal_cells(), min(count, 60)):
        graph = clone(source_graph(cell.source))
        try:
            run_pipeline(graph, Pipeline.parse(cell.passes))
            export = export_graph(graph, cell.target)
        except MoeccError:
            continue
        tensors = dict(export.tensors)
        pairs = [
            (a, b) for a in tensors for b in tensors
            if a < b and tensors[a].type.shape == tensors[b].type.shape
            and tensors[a] is not tensors[b] and tensors[a].type.dtype is tensors[b].type.dtype
        ]  # fmt: skip
        for a, b in chance.sample(pairs, min(2, len(pairs))):
            wrong = {**tensors, a: tensors[b], b: tensors[a]}
            name = f"{a} for {b}, {cell.source} as {cell.target}"
            after = read_back(replace(export, tensors=list(wrong.items())))
            yield Wrong("export", name, source_graph(cell.source), after, right=read_back(export))


def judged(item: Wrong, seed: int) -> dict[str, Any] | None:
    """Return the verdict on a wrong pair as a row, or None where the reference agrees."""
    if item.kind == "table":
        # Such a graph is none where the table is right.
        with meshes.wrong_row(item.name):
            return _judged(item, seed)
    return _judged(item, seed)


def _judged(item: Wrong, seed: int) -> dict[str, Any] | None:
    try:
        after = with_outputs_of(item.before, item.after)
        with limited(120):
            outcome = compare(
                item.before,
                after,
                seed,
                exact=item.exact,
                right=item.right or item.before,
            )
    except TooLongError:
        return {"kind": item.kind, "name": item.name, "status": "slow", "at_node": None}
    # Of a wrong row, devices compute its operation wrongly, wherever the right row would reshard.
    ops = meshes.operations_of(item.name) if item.kind == "table" else set()
    at_row = outcome.status == "refuted" and any(f" = {op} " in f"{outcome.node} " for op in ops)
    if outcome.kind == "crashed" or outcome.differs:
        return {
            "kind": item.kind,
            "name": item.name,
            "status": outcome.status or "crashed",
            "at_node": outcome.at_node or at_row,
            "in_layer": outcome.in_layer or at_row,
            "node": outcome.node,
            "detail": outcome.detail[-300:],
        }
    return None


KINDS = {
    "weight": wrong_weights,
    "export": wrong_exports,
    "table": wrong_tables,
    "slip": slips,
    "pass": wrong_passes,
}
COUNTS = {"pass": 4, "slip": 260, "table": 8, "weight": 80, "export": 60}
"""How many are wanted: of each pass and table, of all others together."""


def run(kind: str, count: int, seed: int, log: Path, until: float) -> None:
    """Try pairs of a kind until so many differ, and add a line to `log` about each.

    Args:
      kind: of `KINDS`.
      count: how many are wanted that differ.
      seed: of all draws.
      log: has a line of every pair that was tried, too, by an earlier run.
      until: the time at which to stop.
    """
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    earlier = {r["number"]: r for r in map(json.loads, lines) if r["kind"] == kind}
    each: Counter[str] = Counter()
    is_each = kind in ("pass", "table")
    completed = 0
    for number, item in enumerate(KINDS[kind](count, seed)):
        if each[item.name] >= count if is_each else completed >= count:
            continue
        row = earlier.get(number)
        if row is None:
            if time.time() > until:
                return
            result = judged(item, seed + number)
            row = result or {"kind": kind, "name": item.name, "status": "agreed"}
            with log.open("a", encoding="utf-8") as file:
                print(json.dumps({**row, "number": number}), file=file)
        if row["status"] != "agreed":
            each[item.name] += 1
            completed += 1


def main() -> int:
    """Try all kinds and write the record; exit code 1 if a wrong pair is proved."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.mutations", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the counts wanted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--out", type=Path, default=RECORD)
    asked = parser.parse_args()
    asked.log.parent.mkdir(parents=True, exist_ok=True)
    until = time.time() + asked.seconds
    with ProcessPoolExecutor(asked.jobs) as pool:
        kinds = [asked.only] if asked.only else list(KINDS)
        counts = {kind: max(1, round(COUNTS[kind] * asked.share)) for kind in kinds}
        futures = [pool.submit(run, k, n, asked.seed, asked.log, until) for k, n in counts.items()]
        for future in futures:
            future.result()
    rows = [json.loads(x) for x in asked.log.read_text("utf-8").splitlines()]
    record = summary([r for r in rows if r["status"] != "agreed"])
    asked.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    shown = {k: v for k, v in record.items() if k not in ("open", "proved_wrongly")}
    print(json.dumps(shown, indent=1))
    return 1 if record["proved_wrongly"] else 0


def by_slip(results: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the number of verdicts of each slip, by name and status."""
    slips: dict[str, Counter[str]] = {}
    for row in results:
        if row["kind"] == "slip":
            slips.setdefault(row["name"].split(" in ")[0], Counter())[row["status"]] += 1
    return {name: dict(sorted(c.items())) for name, c in sorted(slips.items())}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the verdicts."""
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        of_kind = [r for r in results if r["kind"] == kind]
        statuses = Counter(r["status"] for r in of_kind)
        kinds[kind] = {
            "differ": len(of_kind),
            "mutants": len({r["name"] for r in of_kind}),
            **dict(sorted(statuses.items())),
            "refuted_where_they_part": sum(r["at_node"] is True for r in of_kind),
            "refuted_in_the_layer": sum(r.get("in_layer") is True for r in of_kind),
        }
    at_node = sum(k["refuted_where_they_part"] for k in kinds.values())
    in_layer = sum(k["refuted_in_the_layer"] for k in kinds.values())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "moecc": __version__,
        "checkpoints": len(golden_names()),
        "differ": len(results),
        "proved": sum(r["status"] == "proved" for r in results),
        "refuted": sum(r["status"] == "refuted" for r in results),
        "refuted_where_they_part": at_node,
        "share_refuted_where_they_part": round(at_node / len(results), 4) if results else None,
        "share_refuted_in_the_layer": round(in_layer / len(results), 4) if results else None,
        "kinds": kinds,
        "slips": by_slip(results),
        "proved_wrongly": [r for r in results if r["status"] == "proved"],
        "open": [r for r in results if r["status"] not in ("proved", "refuted")],
    }


if __name__ == "__main__":
    raise SystemExit(main())
