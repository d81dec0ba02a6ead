"""Open a SOURCE or MODEL of the command line: a folder, a GGUF file, a preset, a graph.

A model is a graph and a way to evaluate its parameters.  Parameters are evaluated one at a time,
on demand, from the weight expressions and the checkpoint that they read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import (
    InputError,
    MoeccError,
    Problem,
    UnknownName,
    UsageError,
    nearest,
    raise_problems,
)
from moecc.families import build
from moecc.families.config import ModelConfig
from moecc.families.registry import add_families, load_installed, parse_config
from moecc.formats.files import read_json_object, read_whole
from moecc.formats.folder import CONFIG_NAME, MAX_CONFIG_BYTES, findings, open_folder
from moecc.formats.run import GRAPH as GRAPH_NAME
from moecc.formats.run import open_run, split_reference
from moecc.formats.safetensors import lacks_weights
from moecc.formats.source import Checkpoint, nearest_tensor
from moecc.ir.graph import Graph
from moecc.ir.text import read_graph
from moecc.presets import PREFIX, preset_config
from moecc.rewrite.pipeline import Registry, installed
from moecc.support.process import Closing
from moecc.support.text import brief, count_text, facts_table, listed
from moecc.types import DTYPES, F32, Array, DType
from moecc.weights.arithmetic import BASE, STATISTICS, is_statistic
from moecc.weights.expr import source_types, sources

if TYPE_CHECKING:
    from moecc.rewrite.passes import ReadWeight
    from moecc.weights.expr import Expr

# The folder of a converted function of JAX: its graph reads the arrays beside it.

MODEL_TYPE = "jax_function"
"""What its ``config.json`` calls it."""

MODULE_TYPE, MODULE_SCHEMA = "torch_module", "moecc.module/1"
"""What the ``config.json`` of a module of PyTorch calls it, where transformers knows no type of
its own, and the schema of what it says of its mixtures."""

GRAPH = "jax"
"""The name of the graph of its blocks."""


def function_name(graph: Graph) -> str | None:
    """Return the function whose blocks a graph has, or None where it is of a family."""
    name = graph.attrs.get("function")
    return str(name) if graph.name == GRAPH and name is not None else None


def program_type(graph: Graph) -> str:
    """Return what the config of a converted program calls it: a function of JAX, or a module."""
    return MODULE_TYPE if graph.attrs.get("language") == "torch" else MODEL_TYPE


def is_function_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a converted function of JAX, or a converted module."""
    folder = Path(path)
    if not os.path.isfile(folder / GRAPH_NAME) or not os.path.isfile(folder / CONFIG_NAME):
        return False
    try:
        config = read_json_object(folder / CONFIG_NAME, limit_bytes=MAX_CONFIG_BYTES)
    except MoeccError:
        return False
    mixtures = config.get("moecc")
    is_module = isinstance(mixtures, dict) and mixtures.get("schema") == MODULE_SCHEMA
    return is_module or config.get("model_type") == MODEL_TYPE


SHOWN_PARAMS = 50
"""How many parameters a notebook's table names."""


@dataclass
class OpenedModel(Closing):
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

    @property
    def weights(self) -> Checkpoint:
        """The checkpoint of its weights.

        Raises:
          InputError: there is none.
        """
        if self.checkpoint is None:
            raise InputError(f"{self.name} has no weights", hint="give a checkpoint")
        return self.checkpoint

    @property
    def tokenizer(self) -> Path | bytes | None:
        """The ``tokenizer.json`` beside the weights, or None."""
        return None if self.checkpoint is None else self.checkpoint.companions().get(TOKENIZER)

    def remarks(self) -> list[str]:
        """Return what a reader of the model should know: of its files, and what was left out."""
        if self.checkpoint is None:
            return []
        return [*self.checkpoint.remarks(), *self.warnings, *self.left_out()]

    def unread(self) -> list[str]:
        """Return the tensors of the checkpoint that the graph does not read, heads for instance."""
        if self.checkpoint is None:
            return []
        from moecc.translate.importing import unread_tensors

        return unread_tensors(self.graph, self.checkpoint)

    def left_out(self) -> list[str]:
        """Return remarks on the tensors that the graph does not read, and on what reads them."""
        unread = self.unread()
        if not unread or self.checkpoint is None:
            return []
        if function_name(self.graph) is not None:
            return [f"outside of the blocks: {listed(unread)}"]
        from moecc.translate.importing import readable_head

        task, head = readable_head(self.checkpoint)
        of_head, remaining = [n for n in unread if n in head], [n for n in unread if n not in head]
        remarks = []
        if of_head:
            keeping = "--to st_moe and --to auto keep" if task else "--to st_moe keeps"
            remarks.append(f"no part of the graph: {listed(of_head)}; {keeping} them")
        if remaining:
            remark = f"no part of the graph, and not converted: {listed(remaining)}"
            is_folder = self.checkpoint.format == "safetensors"
            hint = "; moecc convert --via torch keeps them" if is_folder else ""
            remarks.append(remark + hint)
        return remarks

    @cached_property
    def warnings(self) -> list[str]:
        """What is wrong with the files of the model and stops no conversion."""
        if self.checkpoint is None:
            return []

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
    weights = [value.weight for value in graph.params.values()]
    return any(weight is None or sources(weight) for weight in weights)


def no_tensors(name: str, start: int = 0, stop: int | None = None) -> Array:
    """Stand for the reader of a checkpoint where the weights are all drawn."""
    raise InputError("there is no checkpoint to read", where=name)


def open_model(
    source: str,
    *,
    weights: str | None = None,
    padding: bool | None = False,
    config_alone: bool = False,
    heads: bool | None = False,
) -> OpenedModel:
    """Open a model.

    Args:
      source: a Hugging Face folder, a ``.gguf`` file, a ``.moe`` file, ``preset:NAME``, or the
        run of a training: ``RUN``, ``RUN@best``, ``RUN@1200``.
      weights: for a ``.moe`` file, the checkpoint to read instead of the one that it names.
      padding: whether the graph of an encoder that is imported has an input ``mask``; None where
        its family has one.
      config_alone: whether a folder with a config and without weights is a model, too.
      heads: whether the graph of an encoder that is imported has the head of its checkpoint; None
        for the head of a task alone.

    Raises:
      InputError: it is none of these, or is faulty.
      UsageError: there is no such preset, or `weights` is given for something else than a graph.
    """
    if source.endswith(".moe"):
        return _open_graph(source, weights)
    if weights is not None:
        raise UsageError("--weights goes with a .moe file", found=source)
    if split_reference(source) is not None:
        run = open_run(source)
        return _reading(read_graph(str(run.run / GRAPH_NAME)), source, run)
    if is_function_folder(source):
        return _open_graph(os.path.join(source, GRAPH_NAME), None)
    config = stated_config(source) if config_alone or source.startswith(PREFIX) else None
    if config is not None:
        return OpenedModel(build(config, padding=bool(padding)), source)
    from moecc.formats.open import open_checkpoint
    from moecc.translate.importing import import_checkpoint

    checkpoint = open_checkpoint(source)
    try:
        graph = import_checkpoint(checkpoint, padding=padding, heads=heads)
        return OpenedModel(graph, source, checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def stated_config(source: str) -> ModelConfig | None:
    """Return the config of a preset, or of a folder that has a config and no weights."""
    if source.startswith(PREFIX):
        return parse_config(preset_config(source))

    path = Path(source) / CONFIG_NAME
    if not os.path.isfile(path) or not lacks_weights(set(os.listdir(source))):
        return None
    with open_folder(Path(source), with_weights=False) as folder:
        # How weights are quantised does not matter where there are none.
        config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    return parse_config(config, str(path))


def _reading(graph: Graph, source: str, checkpoint: Checkpoint) -> OpenedModel:
    """Return a model of `graph`, whose weights a checkpoint has; a wrong checkpoint is closed.

    Raises:
      InputError: the checkpoint lacks a tensor, or has one of another shape.
    """
    try:
        raise_problems(_missing(graph, checkpoint))
    except InputError:
        checkpoint.close()
        raise
    return OpenedModel(graph, source, checkpoint)


def _open_graph(source: str, weights: str | None) -> OpenedModel:
    from moecc.formats.open import open_checkpoint

    # It may be written as a family of an installed package.
    load_installed()
    graph = read_graph(source)
    checkpoint_name = weights or graph.attrs.get("checkpoint")
    if not isinstance(checkpoint_name, str) or not checkpoint_name:
        return OpenedModel(graph, source)
    # The graph itself is the architecture.
    try:
        checkpoint = open_checkpoint(checkpoint_name, needs_config=False)
    except InputError as error:
        if weights:
            raise
        way = f"{source} names it in `attr checkpoint`"
        hints = [f"{p.hint}; {way}" if p.hint else way for p in error.problems]
        raise InputError(
            [replace(p, hint=h) for p, h in zip(error.problems, hints, strict=True)]
        ) from error
    return _reading(graph, source, checkpoint)


def _missing(graph: Graph, checkpoint: Checkpoint) -> Iterator[Problem]:
    """Yield a problem for each source of `graph` that `checkpoint` lacks or has otherwise."""
    for name, type in source_types(graph.weights.values()).items():
        info, where = checkpoint.tensors.get(name), f"{checkpoint.path}: {name}"
        if info is None:
            fault = "the graph reads a tensor that the checkpoint lacks"
            yield Problem(fault, where, hint=nearest_tensor(checkpoint.tensors, name))
        elif info.shape != type.shape:
            fault = "the tensor has another shape than the graph says"
            yield Problem(fault, where, str(type), str(info.shape))


# Further models beside the one that is opened, of the same architecture and tokenizer.

TOKENIZER = "tokenizer.json"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_FREE = {"dtype", "extra", "max_position_embeddings", "router_aux_loss_coef",
         "router_jitter_noise", "output_router_logits"}  # fmt: skip
"""The fields of a config that models of one architecture may differ in."""

_TAKEN = {BASE: "SOURCE itself", STATISTICS: "the statistics of --capture"}

_SHOWN = 8
"""So many differing tensors of a branch are reported."""


def parse_branches(words: Sequence[str]) -> dict[str, str]:
    """Return the folders of branches by name, from ``name=DIR``.

    Raises:
      UsageError: a word has another form, or a name is used twice or reserved.
    """
    branches: dict[str, str] = {}
    problems = []
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder or not _NAME.fullmatch(name):
            problems.append(Problem("not a model with a name", "--experts", "NAME=DIR", word))
        elif name in _TAKEN:
            problem = f"{name} is the name of {_TAKEN[name]}"
            problems.append(Problem(problem, "--experts", "another name", word))
        elif name in branches:
            problems.append(Problem("two models have the same name", "--experts", found=word))
        else:
            branches[name] = folder
    raise_problems(problems, UsageError)
    return branches


def add_branches(
    model: OpenedModel, places: Mapping[str, str], *, allow_other_base: bool = False
) -> None:
    """Open further models, whose weights then are read beside those of `model`.

    Args:
      model: the base; its checkpoint becomes one of them all.
      places: by name, what `open_model` takes, or the folder of a LoRA adapter.
      allow_other_base: whether an adapter may name another model as its own.

    Raises:
      InputError: a model cannot be opened, or differs in architecture or tokenizer; all problems
        of all models at once.
    """
    if not places:
        return
    from moecc.formats.adapter import SeveralCheckpoints

    base = model.weights
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for name, folder in places.items():
        try:
            opened[name] = _open(model.graph, base, folder, allow_other_base=allow_other_base)
        except InputError as error:
            problems += error.problems
    if problems:
        for checkpoint in opened.values():
            checkpoint.close()
        raise InputError(problems)
    model.checkpoint = SeveralCheckpoints(base, opened)


def _open(graph: Graph, base: Checkpoint, folder: str, *, allow_other_base: bool) -> Checkpoint:
    from moecc.formats.adapter import AdaptedCheckpoint, is_adapter

    if is_adapter(Path(folder)):
        return AdaptedCheckpoint(base, Path(folder), allow_other_base=allow_other_base)
    branch = open_model(folder)
    weights = branch.weights
    problems = [*_differences(graph, base, branch), *_tokenizer_problems(base, weights)]
    if problems:
        weights.close()
        raise InputError(problems)
    return weights


def _differences(graph: Graph, base: Checkpoint, branch: OpenedModel) -> Iterator[Problem]:
    """Yield how another model's config and tensors differ from those of the base."""
    checkpoint = branch.weights
    problems = [*_config_problems(base, checkpoint)]
    yield from problems
    if problems:
        return  # the tensors differ in consequence
    wanted, there = _shapes(graph), _shapes(branch.graph)
    wrong = [name for name in wanted if there.get(name) != wanted[name]]
    for name in wrong[:_SHOWN]:
        yield Problem(
            "the models differ in a tensor", f"{checkpoint.path}: {name}",
            f"{wanted[name]}, as in {base.path}", str(there.get(name, "no such tensor")),
        )  # fmt: skip
    if len(wrong) > _SHOWN:
        yield Problem(f"and {len(wrong) - _SHOWN:,} more tensors", str(checkpoint.path))


def _shapes(graph: Graph) -> dict[str, tuple[int | None, ...]]:
    return {name: type.shape for name, type in source_types(graph.weights.values()).items()}


def _config_problems(base: Checkpoint, branch: Checkpoint) -> Iterator[Problem]:
    ours, theirs = (parse_config(c.config, str(c.path)) for c in (base, branch))
    if type(ours) is not type(theirs):
        yield Problem(
            "the models are of different families", str(branch.path),
            f"{ours.model_type}, as {base.path}", theirs.model_type,
        )  # fmt: skip
        return
    for key in _compared(ours):
        expected, actual = getattr(ours, key), getattr(theirs, key)
        if expected != actual:
            yield Problem(
                "the models differ in their architecture", f"{branch.path}: {key}",
                f"{expected}, as in {base.path}", str(actual),
            )  # fmt: skip


def _compared(config: ModelConfig) -> list[str]:
    """Return the fields in which models of one architecture agree."""
    names = [field.name for field in fields(config)]
    return [name for name in names if name not in _FREE]


def _tokenizer_problems(base: Checkpoint, branch: Checkpoint) -> Iterator[Problem]:
    """Yield a problem if both have a tokenizer, and a token has another number in the other."""
    ours, theirs = (_tokens(checkpoint) for checkpoint in (base, branch))
    if ours is None or theirs is None or ours == theirs:
        return
    token = next(t for t in (*ours, *theirs) if ours.get(t) != theirs.get(t))
    many = sum(ours.get(t) != theirs.get(t) for t in {*ours, *theirs})
    yield Problem(
        f"the tokenizers differ, in {many:,} tokens", f"{branch.path}: {TOKENIZER}",
        f"{token!r} is {ours.get(token, 'no token')}, as in {base.path}",
        f"{theirs.get(token, 'no token')}", "experts must mean the same by a token",
    )  # fmt: skip


def _tokens(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return the tokens of a checkpoint's tokenizer with their numbers, None without one."""
    content = checkpoint.companions().get(TOKENIZER)
    if content is None:
        return None
    try:
        data = json.loads(read_whole(content) if isinstance(content, Path) else content)
        vocab = data["model"]["vocab"]
        pairs = (
            vocab.items() if isinstance(vocab, dict) else ((v[0], n) for n, v in enumerate(vocab))
        )
        added = ((entry["content"], entry["id"]) for entry in data.get("added_tokens") or ())
        return dict((*pairs, *added))
    except (ValueError, KeyError, TypeError, IndexError, OSError):
        return None


# Read the small weights on which promises of passes depend, such as the scales of norms.

MAX_READ_ELEMENTS = 1 << 20
"""The largest parameter that is read while a conversion is planned: the vector of a norm."""


def reads_small(checkpoint: Checkpoint) -> ReadWeight:
    """Return what reads small parameters of `checkpoint`; for large ones it returns None."""
    from moecc.weights.evaluate import evaluate

    def read(weight: Expr) -> Array | None:
        small = prod(weight.type.shape) <= MAX_READ_ELEMENTS
        return evaluate(weight, checkpoint.read) if small else None

    return read


# Passes and families of a user's own files, beside those that are installed.


def registry_with(files: Sequence[str]) -> Registry:
    """Return the installed passes and those defined by `files`, and add the files' families.

    Raises:
      UsageError: a file cannot be run or defines nothing, or a name is taken.
    """
    registry = installed()
    for file in files:
        registry = registry.with_file(Path(file), required=not add_families(file))
    return registry


def load_files(files: Sequence[str] | None) -> None:
    """Add the families and operations of files, for a command without a pipeline.

    Raises:
      UsageError: a file cannot be run or defines nothing, or a name is taken.
    """
    if files:
        registry_with(files)
