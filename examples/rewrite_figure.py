"""Draw one feed-forward block before and after ``upcycle``, as SVG: the picture of the README.

    python examples/rewrite_figure.py docs/rewrite.svg

Both graphs are those that moecc makes of a golden checkpoint; nothing in the picture is written by
hand but the colours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import networkx as nx

from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import clone
from moecc.model.open import open_model
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

PIPELINE = "upcycle{experts=4 top-k=2}"
BLOCK = "layers.0.ffn"
NEW, LIFTED, STREAM = "#F2B84B", "#8CCBF0", "#E4E4E4"
"""Orange and sky blue after Okabe and Ito, which the colour-blind tell apart, and grey."""

WIDTH, HEIGHT = 2.75, 0.66
"""Of a box, in units of the grid."""

ROW = 0.34
"""Between two rows."""

Positions = Mapping[Node, tuple[float, float]]


def block_nodes(graph: Graph) -> list[Node]:
    """Return the nodes of the block, first to last."""
    return [n for n in graph if n.loc == BLOCK]


def positions(nodes: list[Node]) -> dict[Node, tuple[float, float]]:
    """Return where nodes stand: the row is the longest path to it, the column that of its input."""
    flow = nx.DiGraph()
    flow.add_nodes_from(nodes)
    inside = set(nodes)
    flow.add_edges_from((v.node, n) for n in nodes for v in n.operands if v.node in inside)
    found: dict[Node, tuple[float, float]] = {}
    for row, generation in enumerate(nx.topological_generations(flow)):
        line = sorted(generation, key=nodes.index)
        for column, node in enumerate(line):
            alone = [found[n][0] for n in flow.predecessors(node)] if len(line) == 1 else []
            x = alone[0] if len(alone) == 1 else (column - (len(line) - 1) / 2) * (WIDTH + 0.25)
            found[node] = (x, -row * (HEIGHT + ROW))
    return found


def label(node: Node) -> str:
    """Return what stands in a box: the operation, and the axes of its result."""
    shown = (a for a in node.results[0].type.axes if a.size != 1)
    axes = ", ".join(f"{a.name}={a.size}" if isinstance(a.size, int) else a.name for a in shown)
    weights = [v for v in node.operands if v.is_param and len(v.type) > 1]
    experts = [v for v in weights if "expert" in v.type and "router" not in v.name]
    marked = f" · {experts[0].type['expert'].size} experts" if experts else ""
    return f"{'router' if is_router(node) else node.op.name}{marked}\n[{axes}]"


def colour(node: Node, before: Graph) -> str:
    """Return the colour of a box: what the pass made, what it lifted, and what it left alone."""
    if "expert" in node.results[0].type and node.op in {n.op for n in block_nodes(before)}:
        return NEW if is_router(node) else LIFTED
    left_alone = {(n.op, n.results[0].type) for n in block_nodes(before)}
    return STREAM if (node.op, node.results[0].type) in left_alone else NEW


def is_router(node: Node) -> bool:
    """Whether a product with the router's weight makes `node`."""
    return any(v.is_param and "router" in v.name for v in node.operands)


def edges(nodes: Iterable[Node]) -> Iterable[tuple[Node, Value]]:
    """Yield each use of a value that the block makes."""
    inside = set(nodes)
    for node in inside:
        yield from ((node, v) for v in node.operands if v.node in inside)


def draw(axes: matplotlib.axes.Axes, graph: Graph, title: str, before: Graph, depth: int) -> None:
    """Draw the block of `graph`, in as many rows as `depth`."""
    nodes = block_nodes(graph)
    at = positions(nodes)
    for node, value in edges(nodes):
        assert value.node is not None, "edges start at nodes of the block"
        (x0, y0), (x1, y1) = at[value.node], at[node]
        is_long = y0 - y1 > 1.5 * (HEIGHT + ROW)
        side = 1 if x0 > x1 else -1
        start = (x0 + side * WIDTH / 2 * (x0 == x1), y0 - HEIGHT / 2 * (x0 != x1))
        end = (x1 + side * WIDTH / 2, y1)
        bend = (0.62 if y0 - y1 > 5 else 0.42) if x0 == x1 else -0.35
        if not is_long:
            start, end = (x0, y0 - HEIGHT / 2), (x1, y1 + HEIGHT / 2)
        arrow = {"arrowstyle": "-|>", "color": "#777777", "lw": 0.9, "shrinkA": 0, "shrinkB": 0,
                 "connectionstyle": f"arc3,rad={bend if is_long else 0}"}  # fmt: skip
        axes.annotate("", end, start, arrowprops=arrow, zorder=1)
    for node, (x, y) in at.items():
        box = matplotlib.patches.FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.1",
            fc=colour(node, before), ec="#444444", lw=0.8, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(x, y, label(node), ha="center", va="center", fontsize=6.6, zorder=3)
    axes.set_xlim(-1.45 * WIDTH, 1.2 * WIDTH)
    axes.set_ylim(-depth * (HEIGHT + ROW) + ROW, 1.5 * HEIGHT)
    axes.text(0, HEIGHT * 0.8, title, ha="center", fontsize=9, family="monospace")
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a block before and after upcycle.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="tests/golden/llama_gqa")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open_model(arguments.source) as model:
        dense, sparse = clone(model.graph), clone(model.graph)
    run_pipeline(sparse, Pipeline.parse(PIPELINE))
    pyplot.rcParams["svg.hashsalt"] = "moecc"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 6.6), layout="constrained")
    depth = len({y for _, y in positions(block_nodes(sparse)).values()})
    draw(left, dense, BLOCK, dense, depth)
    draw(right, sparse, f"after {PIPELINE}", dense, depth)
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
