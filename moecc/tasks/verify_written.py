"""Compare what a conversion has written with its source, before it is put in place."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

from moecc.errors import CheckError
from moecc.ir.graph import Graph
from moecc.model.inputs import first_layers, layer_count
from moecc.model.open import Model, open_model
from moecc.tasks.conversion import Plan
from moecc.tasks.verify import TOLERANCE, Difference, Verdict, compare
from moecc.types import F32, F64

MAX_VERIFIED_PARAMETERS = 4 * 10**9
"""Of a larger output only the first layers are compared, as many as have so many parameters."""


@dataclass(frozen=True)
class Verified:
    """What was found at the logits.

    Attributes:
      output: what was compared, ``logits`` or ``hidden``.
      inputs: the shapes of the inputs, by name.
      dtype: the type of the weights that were written.
      compute_dtype: the type that was computed in.
      layers: how many layers were compared, the first ones; 0 for all.
      difference: of the result from the source, whose weights were rounded to `dtype` first.
      rounding: what that rounding alone changes; None if nothing was rounded.
      tolerance: the bound on `difference.max_relative`; None where a difference was announced.
    """

    output: str
    inputs: dict[str, tuple[int, ...]]
    dtype: str
    compute_dtype: str
    layers: int
    difference: Difference
    rounding: Difference | None
    tolerance: float | None

    def to_json(self) -> dict[str, object]:
        """Return it as JSON values."""
        shapes = {name: list(shape) for name, shape in self.inputs.items()}
        return {**asdict(self), "inputs": shapes, "layers": self.layers or None}


def verify_written(planned: Plan, written: Path) -> Verified:
    """Run source and result on the same tokens, and compare the logits.

    Where the passes promise the same function, a difference above the tolerance is computed again
    in float64, in which rounding explains nothing.

    Args:
      planned: the conversion.
      written: the folder or the GGUF file that it wrote.

    Raises:
      CheckError: the result is not the function that was promised.
    """
    with ExitStack() as opened:
        padding = "mask" in planned.graph.inputs
        source = opened.enter_context(open_model(planned.model.name, padding=padding))
        result = opened.enter_context(open_model(str(written), padding=padding))
        made = replace(planned.model, graph=planned.graph)
        layers = _budget(result.graph)
        if layers:
            source, made, result = (_cut(model, layers) for model in (source, made, result))
        exact = planned.preserves.kind != "approximate" and planned.storage is None
        verdict = compare(result, source, compute_dtype=F32)
        if exact and not verdict.passed:
            verdict = _without_rounding(source, made, result)
    if exact and not verdict.passed:
        raise CheckError(
            f"the {verdict.output} differ from those of the source",
            where=planned.model.name,
            expected=f"{planned.preserves}: at most {TOLERANCE:g} of the largest",
            found=f"{verdict.difference.max_relative:.2e} in float64",
            hint="moecc bisect finds the pass",
        )
    return _verified(verdict, layers, exact)


def _without_rounding(source: Model, made: Model, result: Model) -> Verdict:
    """Return the verdict in float64, in which only weights are rounded.

    A factor that is no power of two is rounded with the weight: 3 W is no multiple of a rounded W.
    So where it fails, it is of the larger difference of two steps: of what the passes made, before
    it is rounded, from the source, and of the result from that, rounded.
    """
    verdict = compare(result, source, compute_dtype=F64)
    if verdict.passed or result.dtype == source.dtype:
        return verdict
    steps = (
        compare(made, source, compute_dtype=F64),
        compare(result, made, compute_dtype=F64),
    )
    larger = max((step.difference for step in steps), key=lambda one: one.max_relative)
    return replace(verdict, difference=larger)


def _verified(verdict: Verdict, layers: int, exact: bool) -> Verified:
    return Verified(
        verdict.output, verdict.inputs, verdict.dtype, verdict.compute_dtype, layers,
        verdict.difference, verdict.rounding, verdict.tolerance if exact else None,
    )  # fmt: skip


def _budget(graph: Graph) -> int:
    """Return how many layers of the result are compared; 0 for all."""
    sizes = [prod(s for s in v.type.sizes if isinstance(s, int)) for v in graph.params.values()]
    total, layers = sum(sizes), layer_count(graph)
    if total <= MAX_VERIFIED_PARAMETERS or not layers:
        return 0
    return max(1, layers * MAX_VERIFIED_PARAMETERS // total)


def _cut(model: Model, layers: int) -> Model:
    return replace(model, graph=first_layers(model.graph, layers))
