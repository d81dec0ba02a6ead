"""Whether two graphs compute the same: the reference interpreter as the oracle.

Beside the values it looks at gradients (`moecc.testing.oracle`), at weights as they are stored
(`moecc.testing.oracle`), and, on a mesh, at every device (`moecc.testing.oracle`).
``moecc opt --check`` asks the same oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.interpreter import ReferenceProgram
from moecc.ir.mesh import mesh_of, spelled
from moecc.ir.structure import clone, copied
from moecc.ir.traits import CollectiveKind
from moecc.ir.unroll import unrolled
from moecc.support.lazy import np
from moecc.support.untyped import Json, JsonDict
from moecc.testing.data import Sizes, inputs_for, params_for, sizes_for
from moecc.testing.weights import generator, stored_weight
from moecc.types import Array, Arrays, Extent

# Running a graph in the reference interpreter, and how far apart arrays may be.
#
# In float64 a correct rewrite of a small graph differs by about 1e-14 times the magnitude of what
# is summed, and a wrong one by 1e-7 or more, so the tolerance of 1e-12 separates them.

TOLERANCE = 1e-12
"""The difference allowed between equal outputs, times their magnitude (at least 1)."""

PERTURBATION = 1e-13
"""The relative change of the data that shows how far errors are amplified."""

ROUNDING = 4e-15
"""The relative error of each operation that does so: as of sums of a few dozen terms."""

EDGE = 1e-6
"""The share of an output's magnitude that such errors move only where they tip a choice.

They are amplified ten million times there: two experts, or two tokens, had equal scores.
"""

DRAWS, DRAWS_ON_EDGE = 3, 12
"""How often errors are drawn, and how often where they tip choices."""


def run_reference(
    graph: Graph,
    *,
    seed: int = 0,
    params: Arrays | None = None,
    inputs: Arrays | None = None,
) -> dict[str, Array]:
    """Return the outputs of `graph` in the reference interpreter, on random data.

    Args:
      graph: the graph.
      seed: chooses the parameters and inputs that are not given.
      params: the parameters by name.
      inputs: the inputs by name.

    Raises:
      InputError: the arrays do not fit the graph.
    """
    from moecc.backend import get_backend

    params = params_for(graph, seed) if params is None else params
    inputs = inputs_for(graph, seed) if inputs is None else inputs
    return get_backend("reference").compile(graph).run(params, inputs)


Run = Callable[[int], Mapping[str, Array]]
"""Returns the outputs under small errors, which a number draws."""


@dataclass(frozen=True)
class Trial:
    """Two graphs, the data on which they are compared, and how far their outputs may differ.

    Attributes:
      before: the graph that is right.
      after: the graph to compare.
      seed: chooses the data.
      sizes: the sizes of the variables.
      exact: whether the outputs must be equal bit for bit.
      tolerance: the difference allowed otherwise, times the magnitude of the output.
    """

    before: Graph
    after: Graph
    seed: int
    sizes: Sizes
    exact: bool = False
    tolerance: float = TOLERANCE

    def gaps(
        self,
        expected: Mapping[str, Array],
        actual: Mapping[str, Array],
        rerun: Run,
        *,
        exact: bool = False,
        edge: float = EDGE,
        draws: int = 1,
    ) -> list[str]:
        """Return a line for each output in which `actual` is not as expected.

        Where an output differs by more than the tolerance, the right graph runs again under small
        errors: as far as they move the output, rounding may have.

        Args:
          expected: the outputs of the right graph, by name.
          actual: the outputs to compare, by name.
          rerun: runs the right graph under errors.
          exact: whether the outputs must be equal bit for bit.
          edge: the share of an output's magnitude beyond which an error has tipped a choice.
          draws: how many errors may add up.
        """
        if exact:
            return list(unequal(expected, actual, self.seed))
        bounds: JsonDict = {n: self.tolerance * magnitude(a) for n, a in expected.items()}
        if not any(beyond(expected, actual, bounds, self.seed)):
            return []
        moved = amplified(rerun, expected, edge)
        bounds = {n: bounds[n] + draws * moved[n] for n in expected}
        return list(beyond(expected, actual, bounds, self.seed))

    def data(self, graph: Graph, step: float = 0.0) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the parameters of `graph`, and the inputs, which are the same for both graphs."""
        params = params_for(graph, self.seed, self.sizes, step)
        return params, inputs_for(self.before, self.seed, self.sizes, step)


def rerun_of(graph: Graph, params: Arrays, inputs: Arrays) -> Run:
    """Return what runs `graph` with small errors in the data and in every result."""

    def run(draw: int) -> Mapping[str, Array]:
        near = [
            {n: _nudged(a, PERTURBATION, draw, "nudge", n) for n, a in arrays.items()}
            for arrays in (params, inputs)
        ]
        return with_errors(graph, draw).run(*near)

    return run


def magnitude(data: Array) -> float:
    """Return the largest finite number of `data`, at least 1; 0 for what is no float."""
    if data.dtype.kind != "f":
        return 0.0
    finite = np.abs(data[np.isfinite(data)])
    return max(1.0, float(finite.max(initial=0.0)))


def amplified(run: Run, expected: Mapping[str, Array], edge: float) -> dict[str, Array]:
    """Return how far small errors may move each output; ∞ where they may tip a choice.

    Args:
      run: returns the outputs under errors of a draw.
      expected: the outputs without errors.
      edge: the share of an output's magnitude beyond which a choice was tipped.
    """
    moved: dict[str, Array] = {n: np.zeros(a.shape) for n, a in expected.items()}
    limits = {n: edge * magnitude(a) for n, a in expected.items()}
    for draw in range(DRAWS_ON_EDGE):
        if draw == DRAWS and not any((m > limits[n]).any() for n, m in moved.items()):
            break
        for name, data in run(draw).items():
            right = expected[name]
            # A choice that tips may change how many rows an expert has.
            gap = distance(right, data) if right.shape == data.shape else np.inf
            moved[name] = np.maximum(moved[name], gap)
    return {n: np.where(_with_neighbours(m > limits[n]), np.inf, m) for n, m in moved.items()}


def _with_neighbours(tipped: Array) -> Array:
    """Return `tipped` with all elements that are in line with one, along whichever axis.

    What is chosen is a row, and in a rectified one most elements are 0, as in the one before.
    """
    return np.asarray(
        sum((tipped.any(axis=i, keepdims=True) for i in range(tipped.ndim)), tipped), dtype=bool
    )


def with_errors(
    graph: Graph, draw: int, relative: float = ROUNDING, exact_ops: Container[str] = ()
) -> ReferenceProgram:
    """Return the interpreter of `graph`, each float result of which is off by a few units.

    Args:
      graph: the graph.
      draw: chooses the errors; a program draws others whenever it runs.
      relative: the largest relative error of an element.
      exact_ops: the names of operations whose results have none.
    """
    random = generator(draw, "errors")

    def disturb(node: Node, data: Array) -> Array:
        if node.op.name in exact_ops:
            return data
        # Each element by itself: equal ones must not stay equal.
        return np.asarray(data * random.uniform(1 - relative, 1 + relative, data.shape))

    return ReferenceProgram(graph, disturb)


def _nudged(data: Array, relative: float, draw: int, *words: str) -> Array:
    if data.dtype.kind not in "fV":
        return data
    noise = generator(draw, *words).uniform(-1, 1, data.shape)
    return np.asarray(data.astype(np.float64) * (1 + relative * noise))


def distance(expected: Array, actual: Array) -> Array:
    """Return how far the arrays are apart: 0 where undefined, ∞ where only one is infinite."""
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    with np.errstate(all="ignore"):
        apart = np.where(a == b, 0.0, np.abs(a - b))
    # What is not a number before may be anything after; the reverse is a difference.
    return np.where(np.isnan(a), 0.0, np.where(np.isnan(apart), np.inf, apart))


def unequal(expected: Mapping[str, Array], actual: Mapping[str, Array], seed: int) -> Iterator[str]:
    """Yield a line for each output that is not equal bit for bit."""
    for name, a in expected.items():
        if not np.array_equal(a, actual[name], equal_nan=a.dtype.kind == "f"):
            yield from beyond({name: a}, actual, {name: 0.0}, seed)
            yield f"output {name}: not equal bit for bit (seed {seed})"


def beyond(
    expected: Mapping[str, Array], actual: Mapping[str, Array], allowed: Json, seed: int
) -> Iterator[str]:
    """Yield a line for each output that differs by more than `allowed`: the worst element."""
    for name, a in expected.items():
        b = actual[name]
        if a.shape != b.shape:
            yield f"output {name}: shape {a.shape} became {b.shape} (seed {seed})"
            continue
        apart, bounds = distance(a, b), np.broadcast_to(allowed[name], a.shape)
        if not (apart > bounds).any():
            continue
        worst = int(np.argmax(np.where(apart > bounds, apart, -1.0)))
        at = tuple(int(i) for i in np.unravel_index(worst, a.shape))
        bound = float(bounds[at])
        yield (
            f"output {name}{list(at)}: expected {a[at].item()!r}, found {b[at].item()!r}, "
            f"allowed difference {bound:.3g} (seed {seed})"
        )


# Whether devices of a mesh together compute what a graph means, and values are sharded as before.
#
# Collectives are the identity on global values, so the interpreter does not see them.  Where the
# graph to compare is on a mesh, it runs once more, device by device.

MAX_DEVICES = 16
"""Larger meshes are not run device by device: it would take too long."""

_PREFIX = "devices compute something else: "


def divisible(sizes: Sizes, *graphs: Graph) -> dict[str, int]:
    """Return `sizes`, multiplied so that the mesh of each graph divides what it splits."""
    factors: dict[str, int] = {}
    for graph in graphs:
        for name, parts in _split_sizes(graph):
            factors[name] = lcm(factors.get(name, 1), parts)
    return {n: s * factors.get(n, 1) for n, s in sizes.items()}


def _split_sizes(graph: Graph) -> Iterator[tuple[str, int]]:
    """Yield the variables that are the size of a split axis, each with the number of parts."""
    mesh = mesh_of(graph)
    if mesh is None or mesh.devices > MAX_DEVICES:
        return
    for value in _values(graph):
        for axis in value.type.axes:
            if axis.mesh and isinstance(axis.size, str):
                yield axis.size, mesh.size(axis.mesh)


def _values(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs.values()
    yield from graph.params.values()
    for node in graph.every_node():
        yield from node.results


def moved_values(before: Graph, after: Graph) -> Iterator[tuple[str, str, str]]:
    """Yield what is sharded otherwise than before, of two graphs on meshes: its name, how, and how.

    The mesh, the inputs and the outputs are part of a graph's interface.  A
    pass that lays a graph on a mesh, or takes it off, has nothing to keep.
    """
    meshes = mesh_of(before), mesh_of(after)
    if None in meshes:
        return
    if meshes[0] != meshes[1]:
        yield "the mesh", str(meshes[0]), str(meshes[1])
    for kind, old, new in (
        ("input", before.inputs, after.inputs),
        ("output", before.outputs, after.outputs),
    ):
        for name, value in old.items():
            expected, actual = (_placement(v) for v in (value, new[name]))
            if expected != actual:
                yield f"{kind} {name}", expected, actual


def _placement(value: Value) -> str:
    text = f"[{', '.join(map(spelled, value.type.axes))}]"
    left = ", ".join(sorted(value.type.unreduced))
    return f"{text} unreduced({left})" if left else text


def device_gaps(trial: Trial) -> list[str]:
    """Return a line for each output that the devices of the mesh of `after` compute otherwise."""
    before, after = trial.before, trial.after
    mesh = mesh_of(after)
    # It must be decided which collectives reshard a value.
    is_open = any(n.op.collective is CollectiveKind.ANY for n in after.every_node())
    if mesh is None or mesh.devices > MAX_DEVICES or is_open:
        return []
    params, inputs = trial.data(before)
    from moecc.backend import MeshBackend, backend_with

    backend = backend_with(MeshBackend, "reference")
    try:
        actual = backend.run_on_mesh(after, trial.data(after)[0], inputs)
    except (InputError, AssertionError, ValueError) as error:  # NumPy: shards do not fit together
        return [f"{_PREFIX}{error} (seed {trial.seed})"]
    expected = run_reference(before, params=params, inputs=inputs)
    lines = trial.gaps(expected, actual, rerun_of(before, params, inputs))
    return [_PREFIX + line for line in lines]


# Whether gradients flow where they did: ``stop_gradient`` is the identity, so values hide it.
#
# What a gradient sees of a graph is the function of its inputs and source tensors in which every
# result of a ``stop_gradient`` is a constant.  So both graphs run once where the data are, then a
# small step away with those results held at what they were.  Rewrites that keep the values and let
# gradients flow where they did keep this function, too; a ``stop_gradient`` removed or put in
# changes it by the step times the gradient that was lost or gained.
#
# Held values are further inputs.  Rows in slots cannot be an input, because their sizes belong to a
# value of the graph; where a graph stops their gradient, it runs beside a copy of itself whose data
# have moved, and which reads the held values, and the choices that rows follow, of the first.

STEP = 1e-6
"""How far the data move: few choices and kinks are so near, and 1e-12 still shows a gradient."""


MAKES_INFINITE = ("mask", "constant")
"""Operations that may well make infinite numbers of finite ones."""


def keeps_finite(graph: Graph, params: Arrays, inputs: Arrays) -> bool:
    """Return whether no operation makes an infinite number, or none at all, of finite ones.

    Values that a mask makes infinite are allowed: a prover must not calculate with them.
    """
    finite: dict[Value, bool] = {}
    for value, array in ReferenceProgram(graph).trace(params, inputs):
        data, node = array.data, value.node
        is_padded = value.type.ragged is not None
        finite[value] = data.dtype.kind != "f" or bool(
            np.isfinite(data[~np.isnan(data)] if is_padded else data).all()
        )
        if finite[value] or node is None or node.op.name in MAKES_INFINITE:
            continue
        if all(finite.get(v, True) for v in node.operands):
            return False
    return True


def gradient_gaps(trial: Trial) -> list[str]:
    """Return a line for each output whose gradient flows elsewhere after than before."""
    graphs = [unrolled(g) for g in (trial.before, trial.after)]
    stops = [_stops(g) for g in graphs]
    if not any(stops):
        return []
    in_slots = any(n.result.type.extents for s in stops for n in s)
    run = _run_beside_moved if in_slots else _held_run
    (held, data, expected), (_, _, actual) = (run(g, trial) for g in graphs)
    return [
        f"the gradient differs: with the results of stop_gradient held, a step away, {line}"
        for line in trial.gaps(expected, actual, rerun_of(held, *data))
    ]


def _stops(graph: Graph) -> list[Node]:
    return [n for n in graph if n.op.blocks_gradient and n.result.type.dtype.is_float]


_HeldRun = tuple[Graph, tuple[Arrays, Arrays], dict[str, Array]]
"""A graph whose stopped values are inputs, its parameters and inputs, and its outputs."""


def _held_run(graph: Graph, trial: Trial) -> _HeldRun:
    """Run `graph` a step away from the data, its stopped values held at what they are there."""
    graph = clone(graph)
    held = {graph.fresh(f"held_{at}_{n.result.name}"): n for at, n in enumerate(_stops(graph))}
    constants = _values_of(graph, held, trial)
    for name, node in held.items():
        node.replace_by(graph.input(name, node.result.type))
    # Drawn for one graph: what indexes something in it must not be drawn anew where that is gone.
    params, inputs = trial.data(graph, STEP)
    inputs |= constants
    return graph, (params, inputs), run_reference(graph, params=params, inputs=inputs)


def _values_of(graph: Graph, held: dict[str, Node], trial: Trial) -> dict[str, Array]:
    """Return, by name, what the nodes `held` result in where the data are."""
    shown = clone(graph)
    for name, node in held.items():
        shown.set_output(name, shown.value(node.result.name))
    params, inputs = trial.data(graph)
    outputs = run_reference(shown, params=params, inputs=inputs)
    return {name: outputs[name] for name in held}


_MOVED = "moved"
"""What the names of data that have moved begin with."""


def _run_beside_moved(graph: Graph, trial: Trial) -> _HeldRun:
    """Run `graph` as `_held_run`, its held values computed by itself where the data are."""
    beside = clone(graph)
    moved = _append_moved(beside)
    params, inputs = trial.data(graph)
    for data, further in zip((params, inputs), trial.data(graph, STEP), strict=True):
        data |= {moved[n]: a for n, a in further.items() if n in moved}
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


# Whether weights keep their element types: an oracle that computes in float64 rounds nothing.
#
# So where a pass has given parameters other weight expressions, both graphs run once more with
# parameters as a checkpoint would hold them: sources in their element types, every cast and every
# product rounded.  ``exact`` means bit for bit there, too.  Real arithmetic allows what rounding to
# float32 explains, and no more: weights rounded to bfloat16 are three decimal orders beyond that.

SINGLE = 2.0**-20
"""The relative error of a weight that float32 explains: of eight roundings."""

SINGLE_EDGE = 1e4 * SINGLE
"""The share of an output's magnitude that such errors move only where they tip a choice."""


def weight_gaps(trial: Trial) -> list[str]:
    """Return a line for each output that weights, as they are stored, change."""
    graphs = (trial.before, trial.after)
    if _expressions(trial.after) <= _expressions(trial.before):
        return []
    inputs = inputs_for(trial.before, trial.seed, trial.sizes)
    params = [_stored(g, trial) for g in graphs]
    expected, actual = (
        run_reference(g, params=p, inputs=inputs) for g, p in zip(graphs, params, strict=True)
    )

    def rerun(draw: int) -> Mapping[str, Array]:
        near = {n: _nudged(a, SINGLE, draw, "rounded", n) for n, a in params[0].items()}
        return run_reference(trial.before, params=near, inputs=inputs)

    # A sum of three draws, as it were: weights are few, and three may all round one way.
    lines = trial.gaps(expected, actual, rerun, exact=trial.exact, edge=SINGLE_EDGE, draws=3)
    return [f"with weights as they are stored, {line}" for line in lines]


def _expressions(graph: Graph) -> set[object]:
    # Expressions are interned, so equal ones are one object.
    return set(graph.weights.values())


def _stored(graph: Graph, trial: Trial) -> dict[str, Array]:
    stored = {n: stored_weight(weight, trial.seed) for n, weight in graph.weights.items()}
    return params_for(graph, trial.seed, trial.sizes) | stored


def assert_same(
    before: Graph,
    after: Graph,
    *,
    seeds: Sequence[int] = (0,),
    exact: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Check that two graphs have the same inputs and compute the same outputs; see `differences`.

    Args:
      before: the graph that is right.
      after: the graph to compare.
      seeds: one run on random data for each.
      exact: whether the outputs must be equal bit for bit.
      tolerance: the difference allowed otherwise, times the magnitude of the output.

    Raises:
      AssertionError: with each output that differs, where and how far.
    """
    lines = [d for s in seeds for d in differences(before, after, s, exact, tolerance)]
    if lines:
        raise AssertionError("the graphs do not compute the same\n" + "\n".join(lines))


def differences(
    before: Graph,
    after: Graph,
    seed: int = 0,
    exact: bool = False,
    tolerance: float = TOLERANCE,
    sizes: Sizes | None = None,
) -> list[str]:
    """Return what differs between two graphs on random data, a line for each output.

    Compared are the signatures, the values, and what the values do not show: gradients, weights as
    they are stored, and what the devices of a mesh compute.  The first of these that differs is
    returned.

    Args:
      before: the graph that is right.
      after: the graph to compare.
      seed: chooses the data.
      exact: whether the outputs must be equal bit for bit.
      tolerance: the difference allowed otherwise, times the magnitude of the output.
      sizes: the sizes of the variables; missing, they are drawn.
    """
    changed = list(_signature_changes(before, after))
    if changed:
        return changed
    sizes = _common_sizes(before, after, seed) if sizes is None else sizes
    for law in (_value_gaps, gradient_gaps, weight_gaps, device_gaps):
        lines = law(Trial(before, after, seed, sizes, exact, tolerance))
        if lines:
            return lines
    return []


def _value_gaps(trial: Trial) -> list[str]:
    params, inputs = trial.data(trial.before)
    expected = run_reference(trial.before, params=params, inputs=inputs)
    actual = run_reference(trial.after, params=trial.data(trial.after)[0], inputs=inputs)
    return trial.gaps(expected, actual, rerun_of(trial.before, params, inputs), exact=trial.exact)


def _signature_changes(before: Graph, after: Graph) -> Iterator[str]:
    for kind, old, new in (
        ("inputs", before.inputs, after.inputs),
        ("outputs", before.outputs, after.outputs),
    ):
        expected, actual = (", ".join(map(_signature, vs.items())) for vs in (old, new))
        if expected != actual:
            yield f"the {kind} differ\n  expected: {expected}\n  found: {actual}"
    for name, expected, actual in moved_values(before, after):
        change = f"{name} is sharded in another way"
        yield f"{change}\n  expected: {expected}\n  found: {actual}"


def _signature(item: tuple[str, Value]) -> str:
    name, value = item
    # An extent is named after a value, whose name does not matter.
    axes = (f"{a.name}={a.size.kind if isinstance(a.size, Extent) else a.size}" for a in value.type)
    return f"{name} : {value.type.dtype}[{', '.join(axes)}]"


def _common_sizes(before: Graph, after: Graph, seed: int) -> dict[str, int]:
    """Return sizes that suit both graphs: groups of tokens divide them in each."""
    old, new = sizes_for(before, seed), sizes_for(after, seed)
    sizes = {n: lcm(old.get(n, 1), new.get(n, 1)) for n in old | new}
    return divisible(sizes, before, after)


def measure(before: Graph, after: Graph, seed: int = 0) -> float:
    """Return the difference of the outputs of `after` from those of `before` on random data.

    This is the root mean square of the difference over that of the output; the maximum over
    floating-point outputs.
    """
    sizes = _common_sizes(before, after, seed)
    # A pass may add an input, such as a random key.
    inputs = inputs_for(after, seed, sizes) | inputs_for(before, seed, sizes)
    arrays = {n: inputs[n] for n in before.inputs}
    expected = run_reference(before, params=params_for(before, seed, sizes), inputs=arrays)
    actual = run_reference(
        after, params=params_for(after, seed, sizes), inputs={n: inputs[n] for n in after.inputs}
    )
    return max(_relative_errors(expected, actual), default=0.0)


def _relative_errors(expected: Arrays, actual: Arrays) -> Iterator[float]:
    for name, a in expected.items():
        b = actual.get(name)
        if b is None or a.dtype.kind != "f" or a.shape != b.shape or not a.size:
            continue
        finite = np.isfinite(a) & np.isfinite(b)
        apart, size = np.where(finite, a - b, 0.0), np.where(finite, a, 0.0)
        scale = float(np.sqrt(np.mean(size**2)))
        error = float(np.sqrt(np.mean(apart**2)))
        yield error / scale if scale else error
