"""Compare two models: differences of outputs, and the effect of rounding alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

from moecc.backend import Arrays, get_backend
from moecc.errors import CheckError, InputError
from moecc.families.heads import LOGITS, POOLED, has_head
from moecc.ir.graph import Graph
from moecc.jobs.conversion import Plan
from moecc.model.inputs import default_inputs, first_layers, layer_count
from moecc.model.open import OpenedModel, open_model
from moecc.support.lazy import np
from moecc.support.text import brief, facts_table, listed
from moecc.support.untyped import JsonDict
from moecc.types import F32, F64, Array, DType, Shape

TOLERANCE = 1e-5
"""The default bound on the largest difference of logits, relative to the largest logit."""


@dataclass(frozen=True)
class LogitDifference:
    """The difference of two outputs, logits ``[batch, seq, vocab]`` or hidden states.

    Attributes:
      max_relative: max |Δ| / max |reference|.
      kl_nats: for logits, the mean over tokens of KL(reference ‖ other), in nats; else None.
      top1_agreement: for logits, the share of tokens with the same most likely next token.
    """

    max_relative: float
    kl_nats: float | None
    top1_agreement: float | None


def difference(reference: Array, result: Array, output: str = "logits") -> LogitDifference:
    """Return the difference of `result` from `reference`; both are the output `output`.

    Raises:
      InputError: the shapes differ, or a logit is not finite.
      CheckError: all logits of the reference are 0.
    """
    if reference.shape != result.shape:
        raise InputError(
            f"the two models give {output} of different shapes",
            expected=str(reference.shape), found=str(result.shape),
            hint="compare models with the same vocabulary" if output == "logits" else None,
        )  # fmt: skip
    for name, array in (("reference", reference), ("model", result)):
        if not np.isfinite(array).all():
            raise InputError(f"the {output} of the {name} are not all finite")
    scale = float(np.abs(reference).max())
    if scale == 0:
        raise CheckError(
            f"the {output} of the reference are all 0, so comparing them says nothing",
            hint="look at its weights, or give other --inputs",
        )
    # Token by token, so that two float64 copies of all logits are never held.
    kl, same, worst = 0.0, 0, 0.0
    rows = reference.reshape(-1, reference.shape[-1]), result.reshape(-1, result.shape[-1])
    for a, b in zip(*rows, strict=True):
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        worst = max(worst, float(np.abs(a64 - b64).max()))
        if output != "logits":
            continue
        log_p, log_q = _log_softmax(a64), _log_softmax(b64)
        kl += float(np.sum(np.exp(log_p) * (log_p - log_q)))
        same += int(a64.argmax() == b64.argmax())
    if output != "logits":
        return LogitDifference(worst / scale, None, None)
    count = len(rows[0])
    return LogitDifference(worst / scale, max(kl / count, 0.0), same / count)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


@dataclass(frozen=True)
class ComparisonVerdict:
    """The result of `compare`.

    Attributes:
      model: the name of the model that was checked.
      source: the name of the model that it was checked against.
      output: the first output, ``logits`` or ``hidden``, or of several the first that differs by
        more than the tolerance.
      inputs: the shapes of the inputs, by name.
      dtype: the type of the model's weights, to which the source's were rounded first.
      compute_dtype: the type that both were computed in.
      difference: model against source, the source's weights rounded.
      rounding: the rounded source against the source; None if nothing was rounded.
      tolerance: the bound on `difference.max_relative`.
      outputs: the largest relative difference of each output that was compared.
    """

    model: str
    source: str
    output: str
    inputs: dict[str, Shape]
    dtype: str
    compute_dtype: str
    difference: LogitDifference
    rounding: LogitDifference | None
    tolerance: float
    outputs: dict[str, float]

    @property
    def tokens(self) -> Shape:
        """The shape of the first input, ``(batch, seq)``."""
        return next(iter(self.inputs.values()))

    @property
    def passed(self) -> bool:
        """Whether the model is the source's function within the tolerance."""
        return self.difference.max_relative <= self.tolerance

    def __repr__(self) -> str:
        return brief("moecc.Verdict", self._rows())

    def _repr_html_(self) -> str:
        return facts_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        difference = self.difference
        kl = "" if difference.kl_nats is None else f"{difference.kl_nats:.2e} nats a token"
        same = "" if difference.top1_agreement is None else f"{difference.top1_agreement:.2%}"
        return [
            ("", f"{self.model} against {self.source}"),
            ("", "passed" if self.passed else "failed"),
            (f"max relative difference of the {self.output}",
             f"{difference.max_relative:.2e} (at most {self.tolerance:g})"),
            ("KL divergence", kl), ("top-1 agreement", same),
        ]  # fmt: skip

    def to_json(self) -> JsonDict:
        """Return the verdict as JSON values."""
        shapes = {name: list(shape) for name, shape in self.inputs.items()}
        tokens = list(self.tokens)
        return {**asdict(self), "inputs": shapes, "tokens": tokens, "passed": self.passed}


def drop_other_heads(checked: OpenedModel, source: OpenedModel) -> list[str]:
    """Drop the head of `source` that `checked` has not; return what is compared of neither."""
    graphs = checked.graph, source.graph
    heads = [({LOGITS, POOLED} & graph.outputs.keys(), graph.attrs.get("head")) for graph in graphs]
    uncompared = [f"{listed(m.unread())} of {m.name}" for m in (checked, source) if m.unread()]
    if heads[0] == heads[1]:
        return uncompared
    for name in heads[1][0]:
        source.graph.drop_output(name)
    for model, (names, _) in zip((checked, source), heads, strict=True):
        uncompared += [f"{name} of {model.name}" for name in sorted(names)]
    return uncompared


def compare(
    model: OpenedModel,
    source: OpenedModel,
    *,
    inputs: Arrays | None = None,
    tolerance: float = TOLERANCE,
    compute_dtype: DType = F32,
) -> ComparisonVerdict:
    """Run `model` and `source` on the same inputs and compare the outputs of the source.

    In float32 a difference may be amplified rounding; float64 distinguishes the two.
    All weights are first rounded to the type that most of the model's have, so that the comparison
    sees the effect of the conversion; the effect of that rounding alone is reported separately.
    Vectors and routers may be stored in a wider type, which the source's then are not. Losses and
    metrics of routers, which two models may have of other routers, are not compared.

    Raises:
      InputError: a model has no weights, or inputs or outputs of the two differ.
    """
    names = source.graph.output_names
    outputs = [names[0], *(n for n in names[1:] if not n.startswith(("loss.", "metric.")))]
    if missing := [name for name in outputs if name not in model.graph.output_names]:
        raise InputError(
            "the two models have different outputs", expected=missing[0],
            found=", ".join(model.graph.output_names), where=model.name,
        )  # fmt: skip
    arrays = default_inputs(source.graph, model.graph) if inputs is None else inputs
    dtype = model.dtype

    def run(which: OpenedModel, rounded: DType | None = None) -> Arrays:
        program = get_backend("xla").compile(which.graph, dtype=compute_dtype)
        params = which.params(dtype=compute_dtype, rounded=rounded)
        return program.run(params, arrays)

    rounded = run(source, dtype)
    result = run(model, dtype)
    plain = rounded if source.dtype == dtype else run(source)
    differences = {name: difference(rounded[name], result[name], name) for name in outputs}
    wrong = [name for name, d in differences.items() if not d.max_relative <= tolerance]
    output = wrong[0] if wrong else outputs[0]
    return ComparisonVerdict(
        model=model.name,
        source=source.name,
        output=output,
        inputs={name: array.shape for name, array in arrays.items()},
        dtype=dtype.name,
        compute_dtype=compute_dtype.name,
        difference=differences[output],
        rounding=None if plain is rounded else difference(plain[output], rounded[output], output),
        tolerance=tolerance,
        outputs={name: d.max_relative for name, d in differences.items()},
    )


# Compare what a conversion has written with its source, before it is put in place.

MAX_VERIFIED_PARAMETERS = 4 * 10**9
"""Of a larger output only the first layers are compared, as many as have so many parameters."""


@dataclass(frozen=True)
class Verified:
    """The comparison of what was written with its source.

    Attributes:
      verdict: of the result against the source.
      layers: how many layers were compared, the first ones; 0 for all.
      is_exact: whether the function was promised, and not a difference.
    """

    verdict: ComparisonVerdict
    layers: int
    is_exact: bool

    def to_json(self) -> JsonDict:
        """Return it as JSON values."""
        stated = self.verdict.to_json() | {"layers": self.layers or None}
        if not self.is_exact:
            stated["tolerance"] = None
        return {name: stated[name] for name in _VERIFIED}


_VERIFIED = (
    "output", "inputs", "dtype", "compute_dtype", "layers", "difference", "rounding", "tolerance",
)  # fmt: skip
"""The keys of a comparison in a receipt."""


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
        heads = has_head(planned.graph)
        source = opened.enter_context(open_model(planned.model.name, padding=padding, heads=heads))
        result = opened.enter_context(open_model(str(written), padding=padding))
        rewritten = replace(planned.model, graph=planned.graph)
        layers = _budget(result.graph)
        if layers:
            source, rewritten, result = (
                replace(model, graph=first_layers(model.graph, layers))
                for model in (source, rewritten, result)
            )
        exact = planned.preserves.kind != "approximate" and planned.storage is None
        verdict = compare(result, source, compute_dtype=F32)
        if exact and not verdict.passed:
            verdict = _without_rounding(source, rewritten, result)
    if exact and not verdict.passed:
        raise CheckError(
            f"the {verdict.output} differ from those of the source",
            where=planned.model.name,
            expected=f"{planned.preserves}: at most {TOLERANCE:g} of the largest",
            found=f"{verdict.difference.max_relative:.2e} in float64",
            hint="moecc bisect finds the pass",
        )
    return Verified(verdict, layers, exact)


def _without_rounding(
    source: OpenedModel, rewritten: OpenedModel, result: OpenedModel
) -> ComparisonVerdict:
    """Return the verdict in float64, in which only weights are rounded.

    A factor that is no power of two is rounded with the weight: 3 W is no multiple of a rounded W.
    So where it fails, it is of the larger difference of two steps: of what the passes made, before
    it is rounded, from the source, and of the result from that, rounded.
    """
    verdict = compare(result, source, compute_dtype=F64)
    if verdict.passed or result.dtype == source.dtype:
        return verdict
    steps = (
        compare(rewritten, source, compute_dtype=F64),
        compare(result, rewritten, compute_dtype=F64),
    )
    larger = max(
        (step.difference for step in steps), key=lambda difference: difference.max_relative
    )
    return replace(verdict, difference=larger)


def _budget(graph: Graph) -> int:
    """Return how many layers of the result are compared; 0 for all."""
    sizes = [prod(s for s in v.type.sizes if isinstance(s, int)) for v in graph.params.values()]
    total, layers = sum(sizes), layer_count(graph)
    if total <= MAX_VERIFIED_PARAMETERS or not layers:
        return 0
    return max(1, layers * MAX_VERIFIED_PARAMETERS // total)


def check_programs(folder: Path) -> list[str]:
    """Write the program of a folder's graph again, and return the names of its files.

    There are none beside a graph without a program.

    Raises:
      CheckError: the program is not that of the graph, or another file of code is beside it.
    """
    from moecc.backend import PROGRAM_FILES, emit_program, program_language
    from moecc.formats.files import read_json_object, read_whole
    from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES

    language = program_language(folder)
    if not language:
        return []
    name = PROGRAM_FILES[language]
    with open_model(str(folder), config_alone=True) as opened:
        program = emit_program(opened.graph, language)
    (text,) = program.files.values()
    if read_whole(folder / name).decode() != text:
        raise CheckError(
            "the program is not that of the graph in config.json",
            where=folder / name,
            hint=f"moecc emit {language} writes it again; moecc reads the graph alone",
        )
    config = read_json_object(folder / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
    mapped = config.get("auto_map", {})
    if mapped != program.auto_map:
        raise CheckError(
            "auto_map names other classes than those of the program",
            where=folder / CONFIG_NAME,
            expected=str(program.auto_map),
            found=str(mapped),
        )
    if others := sorted(path.name for path in folder.glob("*.py") if path.name != name):
        raise CheckError(
            f"a file of code is no part of the program: {others[0]}",
            where=folder,
            hint="trust_remote_code may run it, for a tokenizer say; move it out of the folder",
        )
    return [name]
