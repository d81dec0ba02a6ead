"""``moecc run``: run a model on given tokens."""

from __future__ import annotations

import io
import zipfile
from fnmatch import fnmatchcase
from typing import Annotated

from moecc.errors import UsageError, nearest
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import clone
from moecc.jobs.command import (
    ComputeType,
    Force,
    Inputs,
    Load,
    ModelName,
    Report,
    Spelling,
    Weights,
    check_writable,
    say_weights,
    write_whole,
)
from moecc.support.console import say
from moecc.support.lazy import np
from moecc.types import Array, float_type

# Describe values inside a graph while it runs: shape, mean, spread and extremes, a line each.

PREFIX = "value."


def chosen_values(graph: Graph, pattern: str) -> list[Value]:
    """Return the values whose name or location matches a pattern of the shell, ``layers.3.*``.

    Raises:
      UsageError: there is none.
    """
    every = [*graph.inputs.values(), *graph.params.values(), *(v for n in graph for v in n.results)]
    matches = [v for v in every if _matches(v, pattern)]
    if not matches:
        hint = nearest(pattern, [v.name for v in every])
        raise UsageError(f"no value is called {pattern!r}", where="--print-values", hint=hint)
    return matches


def _matches(value: Value, pattern: str) -> bool:
    loc = value.loc if value.node is None else value.node.loc
    bare = pattern.removeprefix("%")
    return fnmatchcase(value.name, bare) or fnmatchcase(loc, bare)


def with_values(graph: Graph, values: list[Value]) -> Graph:
    """Return a copy of `graph` whose further outputs ``value.NAME`` are `values`.

    Rows of experts have no shape that could be returned, and are left out.
    """
    copy = clone(graph)
    for value in values:
        if not value.type.extents and value.type.dtype.kind != "key":
            copy.set_output(f"{PREFIX}{value.name}", copy.value(value.name))
    return copy


def _line(value: Value, array: Array | None) -> str:
    loc = value.loc if value.node is None else value.node.loc
    title = f"%{value.name} : {value.type}" + (f" @{loc}" if loc else "")
    if array is None:
        return f"{title}: rows of experts, or a random key, have no array to show"
    shown = f"{title}: {list(array.shape)}"
    if array.dtype.kind not in "fV":
        return f"{shown} {_numbers(np.unique(array)[:8])}"
    wide = array.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    if not finite.size:
        return f"{shown} no finite element"
    nonfinite = f", {wide.size - finite.size:,} not finite" if finite.size < wide.size else ""
    return (
        f"{shown} mean {finite.mean():.4g}, std {finite.std():.4g}, min {finite.min():.4g}, "
        f"max {finite.max():.4g}, first {_numbers(wide.reshape(-1)[:4])}{nonfinite}"
    )


def _numbers(array: Array) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in array.reshape(-1).tolist()) + "]"


def run(
    model: ModelName,
    *,
    outputs: Annotated[str, Spelling("FILE")],
    inputs: Inputs = None,
    backend: str = "xla",
    dtype: ComputeType = "f32",
    router_dtype: str = "f32",
    output: str = "",
    print_values: Annotated[str | None, Spelling("GLOB")] = None,
    weights: Weights = None,
    load: Load = (),
    force: Force = False,
) -> Report | None:
    """Run a model and write its logits or hidden states.

    Logits have the axes [batch, seq, vocab]. The inputs are token ids, the pixels of images or the
    features of speech, as the model has them. Without --inputs they are drawn at random, the same
    in every run.

    Args:
      outputs: File to write the output to: .npy, or .npz for all outputs by name.
      backend: Backend that runs the model: xla or reference.
      router_dtype: Element type of routers: f32, or that of --dtype.
      output: Output of the graph to write (default: the first; all, to a .npz file).
      print_values: Values to describe on standard error, by name or location.

    Example:
      moecc run smollm2-8x --inputs tokens.npy --outputs logits.npy
    """
    from moecc.backend import get_backend
    from moecc.launch.processes import check_alone
    from moecc.model.initialise import set_router_dtype
    from moecc.model.inputs import default_inputs, read_inputs
    from moecc.model.open import load_files, open_model

    check_writable(outputs, force=force)
    load_files(load)
    if backend != "xla":
        check_alone(backend)
    chosen, type = get_backend(backend), float_type(dtype)
    with open_model(model, weights=weights) as opened:
        say_weights(opened, model)
        graph = opened.graph
        set_router_dtype(graph, router_dtype, type)
        name = output or graph.output_names[0]
        if name not in graph.output_names:
            hint = nearest(name, graph.output_names) or f"outputs: {', '.join(graph.output_names)}"
            raise UsageError(f"the graph has no output {name!r}", hint=hint)
        arrays = default_inputs(graph) if inputs is None else read_inputs(inputs, graph)
        values = [] if print_values is None else chosen_values(graph, print_values)
        program = chosen.compile(with_values(graph, values) if values else graph, dtype=type)
        results = program.run(opened.params(dtype=type), arrays)
    if not program.writes:  # another process does
        return None
    for line in [_line(value, results.get(f"{PREFIX}{value.name}")) for value in values]:
        say(line)
    result, buffer, names = results[name], io.BytesIO(), [name]
    if outputs.endswith(".npz"):
        names = [name] if output else graph.output_names
        with zipfile.ZipFile(buffer, "w") as archive:
            for each in names:
                with archive.open(f"{each}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(results[each]))
    else:
        np.save(buffer, result)
    write_whole(outputs, buffer.getvalue(), force=force)
    shapes = {each: list(results[each].shape) for each in names}
    data = {
        "output": name, "shape": shapes[name], "dtype": result.dtype.name, "outputs": shapes,
        "file": outputs,
    }  # fmt: skip
    shown = ", ".join(f"{each} {shape}" for each, shape in shapes.items())
    return Report("run", data, lambda: f"{shown} written to {outputs}", is_aside=True)
