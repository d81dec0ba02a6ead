"""Whether an operation has the traits that it declares: each is sampled against its meaning.

Passes and proofs rely on traits.  Those of moecc's own operations are evaluated by its tests; those
of an operation of the user's own are held to its meaning here, on random data at small sizes, where
`prove` and ``--check`` meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, product
from math import prod

from moecc.errors import InputError, OwnOperationError, Problem, raise_problems
from moecc.ir.graph import Graph, Node
from moecc.ir.interpreter import ReferenceProgram
from moecc.ir.operand import Attrs
from moecc.ir.operation import OpDef
from moecc.ir.text import format_attrs
from moecc.ir.traits import Domain
from moecc.support.lazy import np
from moecc.support.untyped import JsonDict
from moecc.testing.data import inputs_for
from moecc.types import Array, Axis, Extent, Size, TensorType

Key = tuple[OpDef, str, str]
"""An operation, the types of its operands and its attributes, as texts."""

SEEDS = (0, 1, 2)
"""The seeds of the random data on which each trait is sampled."""

MAGNITUDES = (1.0, 1e3, 1e-3)
"""The factors of the random data: a trait that holds near 1 alone is none."""

MANY = 130
"""The places of one axis at a time, the others having few: a block is hardly ever larger."""

TOLERANCE = 1e-9
"""The difference that rounding explains, relative to a value and to 1."""

CONSTANTS_TOLERANCE = 1e-4
"""The same where small constants count, as the epsilon of a norm does under a factor."""

MAX_ELEMENTS = 1_000_000
"""The limit on the elements of all operands together, if only the sizes of the node suit it."""

MAX_SAMPLED = 50_000
"""The limit on them at further sizes."""


def own_operations(*graphs: Graph) -> dict[Key, Node]:
    """Return a node of each operation of the user's own, for each of its types and attributes."""
    nodes: dict[Key, Node] = {}
    for node in (n for graph in graphs for n in graph.every_node() if n.op.source is not None):
        types = ", ".join(str(_static(v.type)) for v in node.operands)
        nodes.setdefault((node.op, types, format_attrs(node.op, node.attrs)), node)
    return nodes


_PROBLEMS: dict[Key, tuple[Problem, ...]] = {}


def check_traits(*graphs: Graph) -> None:
    """Check the operations of the user's own in graphs, each once in a process.

    An operation without a meaning, or none at small sizes, is not sampled.

    Raises:
      OwnOperationError: a trait that an operation declares is false, with a counterexample; or its
        meaning fails.
    """
    for key, node in own_operations(*graphs).items():
        if key not in _PROBLEMS:
            try:
                _PROBLEMS[key] = tuple(false_traits(node))
            except OwnOperationError as error:
                _PROBLEMS[key] = error.problems
        raise_problems(_PROBLEMS[key], OwnOperationError)


def false_traits(node: Node, *, must: bool = False) -> list[Problem]:
    """Return the traits that the operation of a node declares and its meaning does not have.

    Args:
      node: the node.
      must: whether it is an error that there is no meaning, or none without slots or shards.

    Raises:
      OwnOperationError: the meaning fails at small sizes, and at those of the node.
      InputError: as `must` says.
    """
    try:
        sample = _sample(node)
        problems = {problem.message: problem for problem in sample.problems()}
        for further in _further(node, sample):
            for problem in further.problems(SEEDS[:1], sample):
                problems.setdefault(problem.message, problem)
        return list(problems.values())
    except OwnOperationError:
        raise
    except InputError:
        if must:
            raise
        return []


def _sample(node: Node) -> _Sample:
    """Return the operation at the first sizes that suit it.

    Raises:
      InputError: there are none, or only too large ones.
    """
    sizes = _sizes_of(node)
    # Different sizes, so that no axis is taken for another; then those that halves are made of.
    for smaller in (dict(zip(sizes, count(3), strict=False)),
                    dict(zip(sizes, count(4, 2), strict=False))):  # fmt: skip
        try:
            return _Sample(node, smaller)
        except InputError:
            continue
    sizes_of_node = _own_sizes(node)
    if _elements(node, sizes_of_node) > MAX_ELEMENTS:
        raise InputError(f"{node.op} needs sizes too large to sample", where=node.op.source)
    return _Sample(node, sizes_of_node)


def _further(node: Node, sample: _Sample) -> Iterator[_Sample]:
    """Yield the operation at further sizes: many places of each axis, and the node's own."""
    many = [sample.sizes | {size: MANY} for size in sample.sizes]
    for sizes in (*many, _own_sizes(node)):
        if sizes == sample.sizes or _elements(node, sizes) > MAX_SAMPLED:
            continue
        try:
            yield _Sample(node, sizes)
        except OwnOperationError:
            raise
        except InputError:
            continue


def _sizes_of(node: Node) -> list[Size]:
    """Return the sizes of operands, and those that attributes state."""
    stated = {s for v in node.operands for s in _static(v.type).sizes}
    attrs: Attrs = node.attrs
    listed = [name for name, spec in node.op.attrs.items() if spec.kind == "sizes"]
    stated |= {size for name in listed for _, size in attrs[name]}
    return sorted(stated, key=str)


def _own_sizes(node: Node) -> dict[Size, int]:
    """Return the sizes of a node as they are, and open ones from 2 on."""
    return {s: s if isinstance(s, int) else at for at, s in enumerate(_sizes_of(node), 2)}


def _elements(node: Node, sizes: Mapping[Size, int]) -> int:
    """Return the elements of all operands of a node at other sizes."""
    types = (_static(v.type) for v in node.operands)
    return sum(prod(sizes[s] for s in t.sizes) for t in types)


def _static(type: TensorType) -> TensorType:
    """Return a type without sharding, an extent replaced by a size of its own."""
    return TensorType(type.dtype, tuple(
        Axis(a.name, f"{a.name} of {a.size.kind}" if isinstance(a.size, Extent) else a.size)
        for a in type.axes
    ))  # fmt: skip


@dataclass(frozen=True)
class _Claim:
    """What a trait says of random operands: two arrays that it makes equal.

    Attributes:
      trait: the trait, as a column of the table.
      law: what it says.
      expected: the one side of the law.
      actual: the other side.
      axes: the names of their axes.
      operands: what the operation was applied to.
      tolerance: of the comparison.
    """

    trait: str
    law: str
    expected: Array
    actual: Array
    axes: tuple[str, ...]
    operands: Sequence[Array]
    tolerance: float = TOLERANCE


class _Sample:
    """An operation on inputs of small sizes.

    Attributes:
      op: the operation.
      types: of its operands.
      node: its only node.
      floats: the positions of its floating-point operands.
      sizes: the size of each that the node states.
    """

    def __init__(self, node: Node, sizes: Mapping[Size, int]) -> None:
        self.op, self.sizes = node.op, dict(sizes)
        attrs: JsonDict = dict(node.attrs)
        for name, spec in node.op.attrs.items():
            if spec.kind == "sizes":
                attrs[name] = tuple((n, sizes[s]) for n, s in attrs[name])
            elif spec.shrinks and attrs[name]:
                attrs[name] = sizes.get(attrs[name], attrs[name])
        self.types = [
            TensorType(t.dtype, tuple(Axis(a.name, sizes[a.size]) for a in t.axes))
            for t in (_static(v.type) for v in node.operands)
        ]
        self.node = _alone(node.op, self.types, attrs)
        self.floats = [i for i, t in enumerate(self.types) if t.dtype.is_float]
        self.results(self.draw(SEEDS[0]))

    def draw(self, seed: int, magnitude: float = 1.0) -> list[Array]:
        """Return random operands within the domain, the floating-point ones times a factor."""
        arrays = list(inputs_for(self.node.graph, seed).values())
        for i in self.floats:
            arrays[i] = arrays[i].astype(np.float64)
            if self.op.domain is Domain.POSITIVE:
                arrays[i] = np.abs(arrays[i]) + 0.1
            arrays[i] *= magnitude
        return arrays

    def results(self, operands: Sequence[Array]) -> list[Array]:
        """Return the results for operands."""
        return _run(self.node, operands)[: len(self.node.results)]

    def problems(
        self, seeds: Sequence[int] = SEEDS, fewer: _Sample | None = None
    ) -> Iterator[Problem]:
        """Yield each trait that is false, with the first counterexample.

        Args:
          seeds: of the random data.
          fewer: the operation at sizes none of which is larger than here.
        """
        refuted = set[str]()
        for seed, magnitude in product(seeds, MAGNITUDES):
            claims = self.claims(seed, magnitude)
            if fewer is not None and magnitude == 1.0:
                claims = chain(self._of_sizes(fewer, seed), claims)
            for claim in claims:
                if claim.trait in refuted:
                    continue
                if (gap := self._gap(claim, seed, magnitude)) is not None:
                    refuted.add(claim.trait)
                    yield gap

    def _gap(self, claim: _Claim, seed: int, magnitude: float) -> Problem | None:
        expected, actual = (np.asarray(a, np.float64) for a in (claim.expected, claim.actual))
        if expected.shape == actual.shape:
            finite = np.isfinite(expected) & np.isfinite(actual)
            # Sums of large numbers that cancel are as exact as the numbers.
            unit = max(1.0, float(np.abs(expected).max(initial=0, where=finite)) * (magnitude > 1))
            apart = ~np.isclose(
                actual, expected, claim.tolerance, claim.tolerance * unit, equal_nan=True
            )
            if magnitude > 1:  # an honest meaning may overflow there
                apart &= finite
            if not apart.any():
                return None
            at = tuple(int(i) for i in np.unravel_index(int(np.argmax(apart)), apart.shape))
            element = dict(zip(claim.axes, at, strict=True))
            values = f"{expected[at]:.6g} and {actual[at]:.6g}"
            if element:
                values += f" at {', '.join(f'{n}={i}' for n, i in element.items())}"
            values += "".join(
                f", {name} = {data[tuple(element[n] for n in type.names)]:.6g}"
                for name, type, data in zip(
                    self.op.operands, self.types, claim.operands, strict=False
                )
                if set(type.names) == set(element) and data.shape == apart.shape
            )
        else:
            values = f"shapes {expected.shape} and {actual.shape}"
        message = f"{self.op.name} declares {claim.trait}, which its meaning refutes"
        hint = f"leave {claim.trait} out of the declaration, or mend the meaning"
        if claim.trait == MIXES:
            message = f"{self.op.name} mixes an axis that it does not declare"
            hint = "return the names of such axes from a method `mixes` of the class"
        elif claim.trait == FUNCTION:
            message = f"the meaning of {self.op.name} is no function of its operands"
            hint = "compute a new array from the operands, and from nothing else"
        drawn = f"seed {seed}" + (f", operands × {magnitude:g}" if magnitude != 1 else "")
        return Problem(message, self.op.source, claim.law, f"{values} ({drawn})", hint)

    def _of_sizes(self, fewer: _Sample, seed: int) -> Iterator[_Claim]:
        """Yield that an element is the same where an axis that is not mixed has fewer places."""
        op, node = self.op, self.node
        mixed = () if op.elementwise else op.mixes(node.operands, node.attrs)
        axes = [axis for s, t in zip(self.types, fewer.types, strict=True)
                for axis in zip(s.names, s.shape, t.shape, strict=True)]  # fmt: skip
        cut = {name: small for name, many, small in axes if many != small}
        if not cut or set(cut) & set(mixed) or any(many < small for _, many, small in axes):
            return
        operands = self.draw(seed)
        # Indices stay within the axes that have fewer places.
        for operand, part, type in zip(operands, fewer.draw(seed), fewer.types, strict=True):
            operand[tuple(slice(n) for n in type.shape)] = part
        parts = [a[tuple(slice(n) for n in t.shape)]
                 for a, t in zip(operands, fewer.types, strict=True)]  # fmt: skip
        trait = "elementwise" if op.elementwise else MIXES
        stated = ", ".join(f"{name} = {size}" for name, size in cut.items())
        law = f"the first places of an axis give the same elements without the others: {stated}"
        results = zip(node.results, self.results(operands), fewer.node.results,
                      fewer.results(parts), strict=True)  # fmt: skip
        for value, result, small, part in results:
            if not set(cut) <= set(value.type.names):
                continue
            places = tuple(slice(n) for n in small.type.shape)
            yield _Claim(trait, law, part, result[places], value.type.names, parts)

    def claims(self, seed: int, magnitude: float = 1.0) -> Iterator[_Claim]:
        """Yield what the declared traits say of random operands."""
        op, operands = self.op, self.draw(seed, magnitude)
        name, args = op.name, ", ".join(op.operands)
        runs = [_run(self.node, operands) for _ in range(2)]
        count = len(self.node.results)
        for number, value in enumerate(self.node.results):
            yield _Claim(FUNCTION, f"{name}({args}) is the same twice", runs[0][number],
                         runs[1][number], value.type.names, operands)  # fmt: skip
        for operand, left, type in zip(operands, runs[0][count:], self.types, strict=True):
            yield _Claim(FUNCTION, f"{name}({args}) leaves its operands as they are", operand, left,
                         type.names, operands)  # fmt: skip
        if op.commutative and len(self.types) > 1:
            yield self._exchanged(operands)
        further = self.draw(seed + 50, magnitude)
        for number in range(count):
            for claim in self._of_values(number, operands, further, runs[0][number]):
                # Near 0 small constants decide.
                if magnitude >= 1 or claim.tolerance == TOLERANCE:
                    yield claim
        yield from self._of_axes(operands, further, runs[0][:count])

    def _exchanged(self, operands: Sequence[Array]) -> _Claim:
        """Return that the first two operands may be exchanged."""
        order = [1, 0, *range(2, len(self.types))]
        law = f"{self.op}({', '.join(self.op.operands)}) is the same with exchanged operands"
        expected, axes = self.results(operands)[0], self.node.results[0].type.names
        claim = _Claim("commutative", law, expected, np.empty(0), axes, operands)
        try:
            node = _alone(self.op, [self.types[i] for i in order], dict(self.node.attrs))
            exchanged = _run(node, [operands[i] for i in order])[0]
        except InputError:  # it does not accept them
            return claim
        names = node.results[0].type.names
        if set(names) != set(axes):
            return claim
        return replace(claim, actual=exchanged.transpose([names.index(a) for a in axes]))

    def _of_values(
        self, number: int, operands: Sequence[Array], further: Sequence[Array], result: Array
    ) -> Iterator[_Claim]:
        """Yield what traits say of all elements of a result."""
        op, axes, f = self.op, self.node.results[number].type.names, self.op.name

        def at(changed: Callable[[Array, Array], Array], positions: Iterable[int]) -> Array:
            chosen = set(positions)
            pairs = enumerate(zip(operands, further, strict=True))
            return self.results([changed(a, b) if i in chosen else a for i, (a, b) in pairs])[
                number
            ]

        def claim(trait: str, law: str, expected: Array, actual: Array, **more: float) -> _Claim:
            return _Claim(trait, law, expected, actual, axes, operands, **more)

        groups = [("linear", g) for g in ([op.linear] if op.jointly else [(i,) for i in op.linear])]
        if op.alias and 0 not in op.linear:
            groups.append(("alias", (0,)))
        for trait, group in groups:
            names = ", ".join(op.operands[min(i, len(op.operands) - 1)] for i in group)
            law = f"{f}(2a + b/2) = 2 {f}(a) + {f}(b)/2 in {names}"
            expected = 2 * result + at(lambda a, b: b, group) / 2
            yield claim(trait, law, expected, at(lambda a, b: 2 * a + b / 2, group))
        if op.homogeneous is not None:
            degrees = op.homogeneous.degrees
            moved = [i for i, d in enumerate(degrees) if d is not None and i in self.floats]
            factors = [1.0] * len(operands)
            for nth, i in enumerate(moved):
                factors[i] = 3.0 if op.homogeneous.alike else 3.0 + nth
            factor = op.homogeneous.factor(factors)
            scaled = [a * c if c != 1.0 else a for a, c in zip(operands, factors, strict=True)]
            if factor is not None:
                stated = ", ".join(f"{c:g}" for c in factors)
                law = f"factors {stated} of the operands make one of {factor:g}"
                yield claim("homogeneous", law, factor * result, self.results(scaled)[number],
                            tolerance=CONSTANTS_TOLERANCE)  # fmt: skip
        if op.normalises:
            shifted = at(lambda a, b: a + 3, [0])
            scaled_rows = at(lambda a, b: a * 3, [0])
            is_shifted = np.allclose(shifted, result, CONSTANTS_TOLERANCE, CONSTANTS_TOLERANCE)
            law = "three times the first operand, or the operand plus 3, gives the same"
            yield claim("normalises", law, result, shifted if is_shifted else scaled_rows,
                        tolerance=CONSTANTS_TOLERANCE)  # fmt: skip
        if operands and (op.blocks_gradient or op.collective is not None):
            trait = "blocks_gradient" if op.blocks_gradient else "collective"
            yield claim(trait, "the result is the first operand", operands[0], result)
        if operands and op.alias and operands[0].size < MANY:
            yield claim("alias", "an element of the result is a number times one of the operand's",
                        np.ones(result.shape), self._dependencies(number, operands))  # fmt: skip
        if op.rearranges:
            elements = np.sort(np.concatenate([np.ravel(a) for a in operands]))
            above = np.searchsorted(elements, result).clip(0, elements.size - 1)
            pair = elements[(above - 1).clip(0)], elements[above]
            nearest = np.where(result - pair[0] < pair[1] - result, *pair)
            law = "the elements of the result are those of the operands"
            yield claim("rearranges", law, nearest, result)

    def _dependencies(self, number: int, operands: Sequence[Array]) -> Array:
        """Return how many elements of the first operand each element of the result is made of."""
        first, *others = operands
        count = np.zeros(self.results(operands)[number].shape)
        for place in np.ndindex(first.shape):
            unit = np.zeros_like(first)
            unit[place] = 1
            zero, one = (self.results([x, *others])[number] for x in (np.zeros_like(first), unit))
            count += ~np.isclose(zero, one, TOLERANCE, TOLERANCE)
        return count

    def _of_axes(
        self, operands: Sequence[Array], further: Sequence[Array], results: Sequence[Array]
    ) -> Iterator[_Claim]:
        """Yield that places of an axis do not count, nor meet, where it is not said to be mixed."""
        op, node = self.op, self.node
        trait = "elementwise" if op.elementwise else MIXES
        mixed = () if op.elementwise else op.mixes(node.operands, node.attrs)
        wide = max(self.types, key=len, default=node.results[0].type).names
        law = f"the result has the axes of the widest operand: {', '.join(wide)}"
        for value, result in zip(node.results, results, strict=True):
            if op.elementwise and set(value.type.names) != set(wide):
                yield _Claim(trait, law, np.empty(0), result, (), operands)
        if op.elementwise:
            yield from self._elsewhere(operands, results, wide)
        # Operands that are averaged or written into a state have the axes of the first.
        first = [0, 2] if op.attends or op.recurs else [0]
        firsts = {n for i in first if i < len(self.types) for n in self.types[i].names}
        for axis in dict.fromkeys(n for t in self.types for n in t.names if n not in mixed):
            if op.alias and any(axis not in v.type for v in node.results):
                continue  # it has another name there, or is a part of one
            for number, (value, result) in enumerate(zip(node.results, results, strict=True)):
                names = value.type.names
                if axis not in names and axis not in firsts:
                    continue
                if axis not in names:
                    law = f"an element reads one place of {axis}, which the result has not"
                    trios = zip(operands, further, self.types, strict=True)
                    places = [_first_of(b, a, t, axis) if axis in t else a for a, b, t in trios]
                    yield _Claim(trait, law, result, self.results(places)[number], names, operands)
                    continue
                law = f"operands in another order along {axis} give the result in that order"
                pairs = zip(operands, self.types, strict=True)
                turned = self.results([_turned(a, t, axis) for a, t in pairs])[number]
                yield _Claim(trait, law, _turned(result, value.type, axis), turned, names, operands)
                law = f"an element reads none at another place of {axis}"
                for i, type in enumerate(self.types):
                    if axis not in type:
                        continue
                    changed = list(operands)
                    changed[i] = _first_of(further[i], operands[i], type, axis)
                    others = _first_of(result, self.results(changed)[number], value.type, axis)
                    yield _Claim(trait, law, result, others, names, operands)

    def _elsewhere(
        self, operands: Sequence[Array], results: Sequence[Array], wide: Sequence[str]
    ) -> Iterator[_Claim]:
        """Yield that an element is the same under axes of other names, and one more of them.

        So is an expert axis added, and an operand broadcast along axes that it lacks.
        """
        sizes = {a.name: a for t in self.types for a in t.axes}
        lacking = [tuple(n for n in wide if n not in t) for t in self.types]
        for added, law in (
            ([()] * len(lacking), "axes of other names, and another one, give the same elements"),
            (lacking, "operands repeated along axes that they lack give the same elements"),
        ):
            if added is lacking and not any(lacking):
                continue
            names = [(*more, *t.names) for more, t in zip(added, self.types, strict=True)]
            types = [
                TensorType(t.dtype, (Axis("another", 2), *(
                    Axis(f"another_{n}", sizes[n].size) for n in row
                )))
                for t, row in zip(self.types, names, strict=True)
            ]  # fmt: skip
            data = [
                np.broadcast_to(x, t.shape).copy() for x, t in zip(operands, types, strict=True)
            ]
            try:
                node = _alone(self.op, types, dict(self.node.attrs))
                arrays = _run(node, data)[: len(results)]
            except InputError:  # it takes no such axes
                continue
            moved = zip(self.node.results, results, node.results, arrays, strict=True)
            for value, result, other, array in moved:
                order = [other.type.names.index(f"another_{n}") for n in value.type.names]
                at = other.type.names.index("another")
                actual = array.transpose([at, *order])[0]
                yield _Claim("elementwise", law, result, actual, value.type.names, operands)


FUNCTION, MIXES = "function", "mixes"
"""Stand for what every operation has to be, and for the axes that it leaves out of `mixes`."""


def _turned(data: Array, type: TensorType, axis: str) -> Array:
    """Return data with the places of an axis in another order."""
    return np.roll(data, 1, type.names.index(axis)) if axis in type else data


def _first_of(first: Array, others: Array, type: TensorType, axis: str) -> Array:
    """Return the first place of an axis of one array, and all further ones of another."""
    at, data = type.names.index(axis), others.copy()
    place = (slice(None),) * at + (0,)
    data[place] = first[place]
    return data


def _alone(op: OpDef, types: Sequence[TensorType], attrs: JsonDict) -> Node:
    """Return the node of an operation in a graph of its own, which outputs operands, too."""
    graph = Graph(op.name)
    operands = [graph.input(f"x{i}", type) for i, type in enumerate(types)]
    node = graph.append(op, operands, attrs)
    for i, value in enumerate((*node.results, *operands)):
        graph.set_output(f"y{i}", value)
    return node


def _run(node: Node, operands: Sequence[Array]) -> list[Array]:
    """Return the results, and then the operands as the meaning leaves them."""
    inputs = dict(zip(node.graph.inputs, operands, strict=True))
    with np.errstate(all="ignore"):  # of operands that are large
        return list(ReferenceProgram(node.graph).run({}, inputs).values())
