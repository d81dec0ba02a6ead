"""Whether two graphs compute the same: the reference interpreter as the oracle.

Beside the values it looks at gradients (`moecc.testing.gradients`), at weights as they are stored
(`moecc.testing.precision`), and, on a mesh, at every device (`moecc.testing.devices`).
``moecc opt --check`` asks the same oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm

from moecc.ir.graph import Graph, Value
from moecc.testing.comparing import TOLERANCE, Trial
from moecc.testing.comparing import run_reference as run_reference
from moecc.testing.data import Sizes, inputs_for, params_for, sizes_for
from moecc.testing.devices import device_gaps, divisible, moved_values
from moecc.testing.gradients import gradient_gaps
from moecc.testing.precision import weight_gaps
from moecc.types.tensor import Extent


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
    found = [d for s in seeds for d in differences(before, after, s, exact, tolerance)]
    if found:
        raise AssertionError("the graphs do not compute the same\n" + "\n".join(found))


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
        found = law(Trial(before, after, seed, sizes, exact, tolerance))
        if found:
            return found
    return []


def _value_gaps(trial: Trial) -> list[str]:
    inputs = inputs_for(trial.before, trial.seed, trial.sizes)
    params = [params_for(g, trial.seed, trial.sizes) for g in (trial.before, trial.after)]
    found = run_reference(trial.after, params=params[1], inputs=inputs)
    return trial.gaps(trial.before, (params[0], inputs), found)


def _signature_changes(before: Graph, after: Graph) -> Iterator[str]:
    for what, old, new in (
        ("inputs", before.inputs, after.inputs),
        ("outputs", before.outputs, after.outputs),
    ):
        expected, found = (", ".join(map(_signature, vs.items())) for vs in (old, new))
        if expected != found:
            yield f"the {what} differ\n  expected: {expected}\n  found: {found}"
    yield from moved_values(before, after)


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
