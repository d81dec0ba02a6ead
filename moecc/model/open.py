"""Open a SOURCE or MODEL of the command line: a folder, a GGUF file, a preset, a graph.

A model is a graph and a way to evaluate its parameters.  Parameters are evaluated one at a time,
on demand, from the weight expressions and the checkpoint that they read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.checkpoint.run.layout import GRAPH, split_reference
from moecc.errors import InputError, Problem, UnknownName, UsageError, nearest
from moecc.ir.graph import Graph
from moecc.model.checkpoint_names import names_from_file
from moecc.model.function_folder import function_name, is_function_folder
from moecc.presets import PREFIX, preset_config
from moecc.support.closing import Closing
from moecc.support.shown import brief, facts_table
from moecc.support.text import count_text
from moecc.types.arrays import Array
from moecc.types.dtypes import F32, DType

if TYPE_CHECKING:
    from moecc.checkpoint.source import Checkpoint

SHOWN_PARAMS = 50
"""How many parameters a notebook's table names."""


@dataclass
class Model(Closing):
    """A graph with the checkpoint that its weights read.

    Attributes:
      graph: the graph.
      name: its name in messages.
      checkpoint: the checkpoint of its weights; None for a preset or a graph without one.
    """

    graph: Graph
    name: str
    checkpoint: Checkpoint | None = None

    def close(self) -> None:
        """Close the checkpoint, if there is one."""
        if self.checkpoint is not None:
            self.checkpoint.close()

    def remarks(self) -> list[str]:
        """Return what a reader of the model should know: of its files, and what was left out."""
        if self.checkpoint is None:
            return []
        return [*self.checkpoint.remarks(), *self.warnings(), *self.left_out()]

    def left_out(self) -> list[str]:
        """Return which tensors of the checkpoint the graph does not read, heads for instance."""
        if self.checkpoint is None:
            return []
        from moecc.families.importing import unread_tensors

        unread = unread_tensors(self.graph, self.checkpoint)
        if not unread:
            return []
        shown = ", ".join(unread[:4]) + (f" and {len(unread) - 4} more" if len(unread) > 4 else "")
        if function_name(self.graph) is not None:
            return [f"outside of the blocks: {shown}"]
        return [f"no part of the graph, and not converted: {shown}"]

    def warnings(self) -> list[str]:
        """Return what is wrong with the files of the model and stops no conversion."""
        if self.checkpoint is None:
            return []
        from moecc.checkpoint.lint import findings

        sizes = [v.type["vocab"].size for v in self.graph.params.values() if "vocab" in v.type]
        rows = next((size for size in sizes if isinstance(size, int)), None)
        return findings(self.checkpoint, rows)

    def params(self, *, dtype: DType = F32, rounded: DType | None = None) -> Params:
        """Return the parameters by name, made on demand.

        Args:
          dtype: the type that they are returned in.
          rounded: a type to round them to first, as writing them would.

        Raises:
          InputError: weights are to be read, and there is no checkpoint.
        """
        if self.checkpoint is None and _reads(self.graph):
            raise InputError(
                f"{self.name} has no weights",
                hint='a line attr checkpoint = "FOLDER" in it names them; '
                "moecc run, verify, generate and lower also take --weights FOLDER"
                if self.name.endswith(".moe") else "give the folder of a checkpoint",
            )  # fmt: skip
        return Params(self.graph, self.checkpoint, dtype, rounded)

    @cached_property
    def dtype(self) -> DType:
        """The type that most elements of the checkpoint are stored in; float32 without one."""
        if self.checkpoint is None:
            return F32
        from moecc.types.dtypes import DTYPES
        from moecc.weights.branches import is_statistic

        counts: dict[str, int] = {}
        for name, info in self.checkpoint.tensors.items():
            if not is_statistic(name):
                counts[info.dtype.name] = counts.get(info.dtype.name, 0) + info.nbytes
        return DTYPES[max(counts, key=lambda n: counts[n])] if counts else F32


class Params(Mapping[str, Array]):
    """The parameters of a graph, each made from its weight expression when it is looked up."""

    def __init__(
        self, graph: Graph, checkpoint: Checkpoint | None, dtype: DType, rounded: DType | None
    ) -> None:
        self._graph = graph
        self._read = no_tensors if checkpoint is None else checkpoint.read
        self._dtype = dtype
        self._rounded = rounded

    def __getitem__(self, name: str) -> Array:
        from moecc.weights.evaluate import evaluate

        if not isinstance(name, str) or name not in self._graph.params:
            hint = nearest(str(name), self._graph.params)
            raise UnknownName(f"the model has no parameter {name!r}", hint=hint)
        weight = self._graph.params[name].weight
        if weight is None:
            raise InputError(f"the parameter %{name} has no weight expression")
        if self._rounded is None or self._rounded == self._dtype:
            return evaluate(weight, self._read, self._dtype)
        narrow = evaluate(weight, self._read, self._rounded)
        return narrow.astype(self._dtype.numpy)

    def __repr__(self) -> str:
        elements = sum(prod(value.type.shape) for value in self._graph.params.values())
        count = f"{len(self):,}, {count_text(elements)} elements"
        return brief("moecc.Params", [("", count), ("", self._dtype.name)])

    def _repr_html_(self) -> str:
        shown = list(self._graph.params.items())[:SHOWN_PARAMS]
        rows = [(name, str(value.type)) for name, value in shown]
        more = len(self) - len(rows)
        return facts_table([*rows, ("and more", f"{more:,}" if more else "")])

    def __contains__(self, name: object) -> bool:
        # The mapping's own answer would make the parameter.
        return name in self._graph.params

    def __iter__(self) -> Iterator[str]:
        return iter(self._graph.params)

    def __len__(self) -> int:
        return len(self._graph.params)


def _reads(graph: Graph) -> bool:
    """Whether a parameter of `graph` is made from a checkpoint, or from nothing at all."""
    from moecc.weights.expr import sources

    weights = [value.weight for value in graph.params.values()]
    return any(weight is None or sources(weight) for weight in weights)


def no_tensors(name: str, start: int = 0, stop: int | None = None) -> Array:
    """Stand for the reader of a checkpoint where the weights are all drawn."""
    raise InputError("there is no checkpoint to read", where=name)


def open_model(
    source: str, *, weights: str | None = None, padding: bool = False, config_alone: bool = False
) -> Model:
    """Open a model.

    Args:
      source: a Hugging Face folder, a ``.gguf`` file, a ``.moe`` file, ``preset:NAME``, or the
        run of a training: ``RUN``, ``RUN@best``, ``RUN@1200``.
      weights: for a ``.moe`` file, the checkpoint to read instead of the one that it names.
      padding: whether the graph of an encoder that is imported has an input ``mask``.
      config_alone: whether a folder with a config and without weights is a model, too.

    Raises:
      InputError: it is none of these, or is faulty.
      UsageError: there is no such preset, or `weights` is given for something else than a graph.
    """
    if source.endswith(".moe"):
        return _open_graph(source, weights)
    if split_reference(source) is not None:
        return _open_run(source, weights)
    if weights is not None:
        raise UsageError("--weights goes with a .moe file", found=source)
    if is_function_folder(source):
        return _open_graph(os.path.join(source, GRAPH), None)
    if source.startswith(PREFIX):
        from moecc.families import build
        from moecc.families.configs import parse_config

        return Model(build(parse_config(preset_config(source)), padding=padding), source)
    if config_alone and _has_config_alone(Path(source)):
        return _open_config(source, padding)
    from moecc.checkpoint.open import open_checkpoint
    from moecc.families import import_checkpoint

    checkpoint = open_checkpoint(source)
    try:
        return Model(import_checkpoint(checkpoint, padding=padding), source, checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _has_config_alone(folder: Path) -> bool:
    from moecc.checkpoint.folder import CONFIG_NAME
    from moecc.checkpoint.layout import lacks_weights

    return os.path.isfile(folder / CONFIG_NAME) and lacks_weights(set(os.listdir(folder)))


def _open_config(source: str, padding: bool) -> Model:
    """Open a folder that has a config alone, as if it were a preset."""
    from moecc.checkpoint.folder import CONFIG_NAME, open_folder
    from moecc.families import build
    from moecc.families.configs import parse_config

    with open_folder(Path(source), with_weights=False) as folder:
        # How weights are quantised does not matter where there are none.
        config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    parsed = parse_config(config, str(Path(source) / CONFIG_NAME))
    return Model(build(parsed, padding=padding), source)


def _open_run(source: str, weights: str | None) -> Model:
    from moecc.checkpoint.run.checkpoint import open_run

    if weights is not None:
        raise UsageError("--weights goes with a .moe file", found=source)
    checkpoint = open_run(source)
    graph = read_graph(str(checkpoint.run / GRAPH))
    problems = list(_missing(graph, checkpoint))
    if problems:
        raise InputError(problems)
    return Model(graph, source, checkpoint)


def read_graph(path: str) -> Graph:
    """Return the graph in a ``.moe`` file, or on standard input for ``-``.

    The checkpoint that it names is taken from the folder of the file.

    Raises:
      ParseError: the text is not a graph.
      InputError: the file cannot be read as text.
    """
    import sys

    from moecc.ir.parser import parse

    if path == "-":
        data, name = sys.stdin.buffer.read(), "<stdin>"
    else:
        if os.path.isdir(path):
            raise InputError(
                "is a folder, not a graph", where=path, hint="moecc import prints its graph"
            )
        if not os.path.isfile(path):
            raise InputError("no such file", where=path)
        data, name = Path(path).read_bytes(), path
    try:
        graph = parse(data.decode(), name)
    except UnicodeDecodeError as error:
        raise InputError(
            "not text: a .moe file is UTF-8", where=f"{name}: byte {error.start}"
        ) from None
    if path != "-":
        names_from_file(graph, path)
    return graph


def _open_graph(source: str, weights: str | None) -> Model:
    from moecc.checkpoint.open import open_checkpoint
    from moecc.families.configs import load_installed

    # It may be written as a family of an installed package.
    load_installed()
    graph = read_graph(source)
    place = weights or graph.attrs.get("checkpoint")
    if not isinstance(place, str) or not place:
        return Model(graph, source)
    # The graph itself is the architecture.
    checkpoint = open_checkpoint(place, needs_config=False)
    problems = list(_missing(graph, checkpoint))
    if problems:
        checkpoint.close()
        raise InputError(problems)
    return Model(graph, source, checkpoint)


def _missing(graph: Graph, checkpoint: Checkpoint) -> Iterator[Problem]:
    """Yield a problem for each source of `graph` that `checkpoint` lacks or has otherwise."""
    from moecc.weights.expr import sources

    seen: set[str] = set()
    for param in graph.params.values():
        for source in sources(param.weight) if param.weight is not None else ():
            if source.name in seen:
                continue
            seen.add(source.name)
            info = checkpoint.tensors.get(source.name)
            where = f"{checkpoint.path}: {source.name}"
            if info is None:
                yield Problem(
                    "the graph reads a tensor that the checkpoint lacks", where,
                    hint=nearest(source.name, checkpoint.tensors),
                )  # fmt: skip
            elif info.shape != source.type.shape:
                yield Problem(
                    "the tensor has another shape than the graph says", where,
                    str(source.type), str(info.shape),
                )  # fmt: skip
