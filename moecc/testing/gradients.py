"""Whether gradients flow where they did: ``stop_gradient`` is the identity, so values hide it.

What a gradient sees of a graph is the function of its inputs and source tensors in which every
result of a ``stop_gradient`` is a constant.  So both graphs run once where the data are, then a
small step away with those results held at what they were.  Rewrites that keep the values and let
gradients flow where they did keep this function, too; a ``stop_gradient`` removed or put in
changes it by the step times the gradient that was lost or gained.

Held values are further inputs.  Rows in slots cannot be an input, because their sizes belong to a
value of the graph; where a graph stops their gradient, it runs beside a copy of itself whose data
have moved, and which reads the held values, and the choices that rows follow, of the first.
"""

from __future__ import annotations

from moecc.backend import Arrays
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import clone, copied
from moecc.ir.unroll import unrolled
from moecc.testing.comparing import Trial, gaps, run_reference
from moecc.testing.data import inputs_for, params_for
from moecc.types.arrays import Array

STEP = 1e-6
"""How far the data move: few choices and kinks are so near, and 1e-12 still shows a gradient."""

_PREFIX = "the gradient differs: with the results of stop_gradient held, a step away, "


def gradient_gaps(trial: Trial) -> list[str]:
    """Return a line for each output whose gradient flows elsewhere after than before."""
    graphs = [unrolled(g) for g in (trial.before, trial.after)]
    stops = [_stops(g) for g in graphs]
    if not any(stops):
        return []
    in_slots = any(n.result.type.extents for s in stops for n in s)
    run = _run_beside_moved if in_slots else _held_run
    held, found = (run(g, trial) for g in graphs)
    lines = gaps(held[0], held[1], found[2], seed=trial.seed, tolerance=trial.tolerance)
    return [_PREFIX + line for line in lines]


def _stops(graph: Graph) -> list[Node]:
    return [n for n in graph if n.op.blocks_gradient and n.result.type.dtype.is_float]


_HeldRun = tuple[Graph, tuple[Arrays, Arrays], dict[str, Array]]
"""A graph whose stopped values are inputs, its parameters and inputs, and its outputs."""


def _held_run(graph: Graph, trial: Trial) -> _HeldRun:
    """Run `graph` a step away from the data, its stopped values held at what they are there."""
    graph = clone(graph)
    kept = {graph.fresh(f"held_{at}_{n.result.name}"): n for at, n in enumerate(_stops(graph))}
    constants = _values_of(graph, kept, trial)
    for name, node in kept.items():
        node.replace_by(graph.input(name, node.result.type))
    # Drawn for one graph: what indexes something in it must not be drawn anew where that is gone.
    inputs = inputs_for(trial.before, trial.seed, trial.sizes, STEP) | constants
    params = params_for(graph, trial.seed, trial.sizes, STEP)
    return graph, (params, inputs), run_reference(graph, params=params, inputs=inputs)


def _values_of(graph: Graph, kept: dict[str, Node], trial: Trial) -> dict[str, Array]:
    """Return, by name, what the nodes `kept` result in where the data are."""
    shown = clone(graph)
    for name, node in kept.items():
        shown.set_output(name, shown.value(node.result.name))
    inputs = inputs_for(trial.before, trial.seed, trial.sizes)
    params = params_for(graph, trial.seed, trial.sizes)
    outputs = run_reference(shown, params=params, inputs=inputs)
    return {name: outputs[name] for name in kept}


_MOVED = "moved"
"""What the names of data that have moved begin with."""


def _run_beside_moved(graph: Graph, trial: Trial) -> _HeldRun:
    """Run `graph` as `_held_run`, its held values computed by itself where the data are."""
    beside = clone(graph)
    moved = _append_moved(beside)
    params = dict(params_for(graph, trial.seed, trial.sizes))
    inputs = dict(inputs_for(trial.before, trial.seed, trial.sizes))
    further_params = params_for(graph, trial.seed, trial.sizes, STEP)
    params |= {moved[n]: a for n, a in further_params.items() if n in moved}
    further_inputs = inputs_for(trial.before, trial.seed, trial.sizes, STEP)
    inputs |= {moved[n]: a for n, a in further_inputs.items() if n in moved}
    return beside, (params, inputs), run_reference(beside, params=params, inputs=inputs)


def _append_moved(graph: Graph) -> dict[str, str]:
    """Append a copy of `graph` to itself over floats that move, and return their names by name.

    The copy has the outputs.  Of the first it reads integers, which rows follow into slots, so that
    both have the same rows in them, and the results of every ``stop_gradient``.
    """
    nodes, inputs, params = list(graph), dict(graph.inputs), dict(graph.params)
    names: dict[str, str] = {}
    values: dict[Value, Value] = {}
    for data, add in ((inputs, graph.input), (params, graph.param)):
        for name, value in data.items():
            if value.type.dtype.is_float:
                names[name] = graph.fresh(f"{_MOVED}_{name}")
                values[value] = add(names[name], value.type)
    for node in nodes:
        operands = [values.get(v, v) for v in node.operands]
        if node.op.blocks_gradient or operands == list(node.operands):
            continue
        copy = graph.append(node.op, operands, copied(node.attrs), loc=node.loc)
        pairs = zip(node.results, copy.results, strict=True)
        values.update((v, m) for v, m in pairs if v.type.dtype.kind != "int")
    for name, value in list(graph.outputs.items()):
        graph.set_output(name, values.get(value, value))
    return names
