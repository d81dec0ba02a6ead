"""A step of a model: the settings that users state, the strategy that a plan chooses, saved plans.

Every setting is a text or number as options, recipes and saved plans spell it; properties give
its parsed value.  ``plan``, ``compile`` and ``train`` all read a `StepConfig`, from whose fields
and docstring the options of the first two follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

from moecc.errors import InputError, Problem, UsageError, describe, nearest, raise_problems
from moecc.families.reader import as_number
from moecc.formats.files import read_json_object
from moecc.formats.store import Address, is_address, mirror
from moecc.ir.mesh import Mesh, parse_mesh
from moecc.sharding.layout import DENSE_WEIGHTS, Layout
from moecc.sharding.rules import mesh_axes
from moecc.sharding.vias import BY_NAME, EXPLICIT, LOCAL, PARTITIONS, VIAS
from moecc.support.console import Spelling
from moecc.support.record import RecordReader
from moecc.support.text import json_text
from moecc.support.untyped import Json, JsonDict
from moecc.types import DType, float_type

STEPS = ("train", "forward")
OPTIMIZERS = ("adamw", "adafactor")
TRAIN_PASSES = 3
"""FLOPs of a training step over those of its forward pass: backward, there are twice as many."""
REMATS = ("none", "save", "block", "full")
"""What the backward pass recomputes: nothing; all but the results of attention and combine;
everything but the input of each block of layers; everything but the input of each layer, so that
equal layers of a block, which are a loop, are recomputed twice."""

AXES = ("data", "fsdp", "expert", "model")
"""The mesh axes of layouts, outermost first.

``data`` shards the batch; ``fsdp`` shards it and the parameters with it; ``expert`` shards it and
the experts; ``model`` shards heads, neurons and the vocabulary.
"""


_FLOAT_TYPE = Spelling("TYPE", complete="float_types")


@dataclass(frozen=True)
class StepConfig:
    """The settings of a step, and the options of ``moecc plan``; None leaves a choice to the plan.

    Attributes:
      step: Step: a training step, or the forward pass.
      batch_tokens: Tokens of a step on all devices (default: 4096 a device).
      sequence: Tokens of a sequence: 4096, or 512,114 for encoder and decoder.
      mesh: Mesh of the devices (default: the best one).
      via: Exchange by which tokens reach experts on other devices.
      remat: Rematerialisation policy: which activations the backward pass recomputes.
      dense_weights: Sharding of the parameters outside experts along the experts' axis.
      rules: Sharding layouts: built-in names or files of rules.
      optimizer: Optimizer of a training step; Adafactor is factored, without momentum.
      dtype: Element type of the computation.
      weight_dtype: Element type of the parameters (default: f32 for training, else that of
        --dtype).
      micro_batches: Number of parts of a batch whose gradients are added up.
      reduce_dtype: Element type in which gradients are added and reduced (default: that of
        --dtype).
      overlap: Let the compiler for v5p schedule gathers and reductions beside products.
    """

    step: Annotated[str, Spelling(choices=STEPS)] = "train"
    batch_tokens: Annotated[int | None, Spelling("N", is_count=True)] = None
    sequence: Annotated[str | None, Spelling("N[,N]")] = None
    mesh: Annotated[str | None, Spelling("AXIS=N,…")] = None
    via: Annotated[str | None, Spelling(choices=VIAS)] = None
    remat: Annotated[str | None, Spelling(choices=REMATS)] = None
    dense_weights: Annotated[str | None, Spelling(choices=DENSE_WEIGHTS)] = None
    rules: Annotated[str | None, Spelling("LAYOUT,…")] = None
    optimizer: Annotated[str, Spelling(choices=OPTIMIZERS)] = "adamw"
    dtype: Annotated[str, _FLOAT_TYPE] = "bf16"
    weight_dtype: Annotated[str | None, _FLOAT_TYPE] = None
    micro_batches: Annotated[int, Spelling("N", low=1)] = 1
    reduce_dtype: Annotated[str | None, _FLOAT_TYPE] = None
    overlap: bool = False

    @property
    def train(self) -> bool:
        """Whether it is a training step."""
        return self.step == "train"

    @cached_property
    def layout_names(self) -> tuple[str, ...] | None:
        """The names of the layouts in `rules`."""
        return None if self.rules is None else tuple(self.rules.split(","))

    @cached_property
    def device_mesh(self) -> Mesh | None:
        """The mesh that `mesh` spells. Raises UsageError."""
        return None if self.mesh is None else plan_mesh(self.mesh, self.layout_names)

    @cached_property
    def lengths(self) -> tuple[int, ...] | None:
        """The lengths of a sequence, by stack. Raises UsageError."""
        return None if self.sequence is None else parse_lengths(self.sequence)

    @cached_property
    def compute_type(self) -> DType:
        """The element type of the computation. Raises UsageError."""
        return float_type(self.dtype)

    @cached_property
    def weight_type(self) -> DType:
        """The element type of the parameters. Raises UsageError."""
        return float_type(self.weight_dtype or ("f32" if self.train else self.dtype))

    @cached_property
    def reduce_type(self) -> DType:
        """The element type in which gradients are added and reduced. Raises UsageError."""
        return float_type(self.reduce_dtype or self.dtype)

    def check(self) -> None:
        """Check all texts.

        Raises:
          UsageError: a value is not one of its choices, or cannot be parsed.
        """
        stated = asdict(self)
        problems = choice_problems({name: stated[name] for name in CHOICES if name in stated})
        problems = [*problems, *micro_batch_problems(self.train, self.micro_batches)]
        raise_problems(problems, UsageError)
        for name in ("device_mesh", "lengths", "compute_type", "weight_type", "reduce_type"):
            getattr(self, name)


@dataclass(frozen=True)
class ProgramConfig(StepConfig):
    """The settings of the program of a step: those that ``moecc compile`` takes besides.

    Attributes:
      partition: Origin of the collectives: the graph's own, or XLA's partitioner.
      sliced: Send a part of each row from every device along the mesh axis model.
      chunks: Number of parts in which rows are exchanged, each beside the experts' work on others.
      capacity_factor: Bound on the rows of an expert (default: that of the model).
    """

    partition: Annotated[str, Spelling(choices=PARTITIONS)] = EXPLICIT
    sliced: Annotated[bool, Spelling(option="slice")] = False
    chunks: Annotated[int, Spelling("N", low=1)] = 1
    capacity_factor: Annotated[float | None, Spelling("C")] = None


_SPELLINGS: Mapping[str, Spelling] = {
    name: spelling
    for name, hint in get_type_hints(ProgramConfig, include_extras=True).items()
    for spelling in getattr(hint, "__metadata__", ())
}
CHOICES = {name: spelling.choices for name, spelling in _SPELLINGS.items() if spelling.choices}
"""The values of the settings that are one of several words."""


def choice_problems(values: Json) -> list[Problem]:
    """Return a problem for each value, by the name of its setting, that is not one of `CHOICES`."""
    return [
        Problem(
            f"unknown {name.replace('_', ' ')}",
            expected=" | ".join(CHOICES[name]),
            found=repr(value),
            hint=nearest(str(value), CHOICES[name]),
        )
        for name, value in values.items()
        if value is not None and value not in CHOICES[name]
    ]


def micro_batch_problems(train: bool, count: int) -> Iterator[Problem]:
    """Yield a problem for a count of micro-batches; a forward pass has no gradients to add."""
    if count < 1 or (count > 1 and not train):
        expected = "1 or more" if train else "1, of a forward pass"
        yield Problem("not a number of micro-batches", expected=expected, found=str(count))


def plan_mesh(text: str, rules: Sequence[str] | None = None) -> Mesh:
    """Return the mesh that `text` spells: ``data=8,expert=8``.

    Args:
      text: the axes with their sizes.
      rules: the layouts whose axes it may have; None: `AXES`.

    Raises:
      UsageError: it cannot be read, an axis is unknown, or stands twice.
    """
    try:
        mesh = parse_mesh(text)
    except InputError as error:
        raise UsageError(error.problems) from None
    axes = AXES if rules is None else mesh_axes(rules)
    for name in mesh.names:
        if name not in axes:
            hint = nearest(name, axes) or f"axes: {', '.join(axes)}"
            raise UsageError(f"unknown mesh axis {name!r}", found=text, hint=hint)
    return mesh


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Return a mesh as `plan_mesh` reads it; empty for one without axes."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse the lengths of ``--sequence``: ``4096``, or ``512,114``.

    Raises:
      UsageError: they are no numbers of tokens.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(p.isdecimal() and 0 < int(p) < 10**8 for p in parts):
        raise UsageError("not lengths of a sequence", expected="4096, or 512,114", found=text)
    return tuple(map(int, parts))


@dataclass(frozen=True)
class Strategy:
    """The choices of a plan.

    Attributes:
      layout: the mesh, and what is sharded over it.
      via: how tokens reach experts.
      dispatch: the class of the dispatch strategy, as `moecc.ir.conventions` has it.
      remat: one of `REMATS`.
      sliced: see `ProgramConfig`.
      chunks: see `ProgramConfig`.
    """

    layout: Layout
    via: str
    dispatch: str
    remat: str
    sliced: bool = False
    chunks: int = 1

    @property
    def in_rounds(self) -> bool:
        """Whether rows go to their experts in rounds, each repeated for its gradient.

        They do not where devices that split neurons add up their results for the same rows.
        """
        if self.via == LOCAL or not BY_NAME[self.via].in_rounds:
            return False
        return self.sliced or not self.layout.split(self.layout.tensor_axes)

    @property
    def stream_axis(self) -> str | None:
        """The mesh axis along which activations between layers are kept in parts, or None.

        Devices that split neurons all have them; under rematerialisation they are most of what is
        kept.  Where devices split the sequence between products, they are in parts already.
        """
        sequence = self.layout.sequence_axes
        tensor = [a for a in self.layout.split(self.layout.tensor_axes) if a not in sequence]
        return tensor[0] if tensor and self.remat != "none" else None

    @property
    def settings(self) -> JsonDict:
        """The settings of `ProgramConfig` that fix it."""
        layout = self.layout
        return {
            "rules": ",".join(layout.stated) or None,
            "mesh": mesh_text(layout.sizes),
            "dense_weights": None if layout.stated else layout.dense_weights,
            "via": None if self.via == LOCAL else self.via,
            "remat": self.remat,
            "sliced": self.sliced,
            "chunks": self.chunks,
        }

    @property
    def options(self) -> str:
        """The options of ``moecc compile`` that ask for it."""
        default = {**asdict(ProgramConfig()), "dense_weights": "whole"}
        asked = {n: v for n, v in self.settings.items() if v and v != default[n]}
        return " ".join(as_option(name, value) for name, value in asked.items())

    def __str__(self) -> str:
        mesh = mesh_text(self.layout.sizes) or "one device"
        dense = ", dense weights split" if self.layout.dense_weights == "split" else ""
        dense += f", rules {','.join(self.layout.stated)}" if self.layout.stated else ""
        via = f", via {self.via}" if self.via != LOCAL else ""
        via += " in slices" if self.sliced else ""
        via += f" in {self.chunks} chunks" if self.chunks > 1 else ""
        rows = f", {self.dispatch}" if self.layout.experts else ""
        return f"{mesh}{dense}{via}{rows}, remat {self.remat}"


def option_name(setting: str) -> str:
    """Return the option of ``moecc plan`` and ``moecc compile`` for a setting."""
    spelling = _SPELLINGS.get(setting, Spelling())
    return f"--{spelling.option or setting.replace('_', '-')}"


def as_option(setting: str, value: object) -> str:
    """Return a setting and its value as ``moecc plan`` and ``moecc compile`` take them."""
    return option_name(setting) if value is True else f"{option_name(setting)} {value}"


# A plan in a file: `moecc plan --save` writes it, and `compile` and `train` read it.

SCHEMA = "moecc.plan/1"
MAX_PLAN_BYTES = 64 << 20


@dataclass(frozen=True)
class SavedPlan:
    """The facts of a plan that decide a program.

    Attributes:
      model: as the plan was asked.
      machine: the machine.
      pipeline: the passes before the step's.
      config: the settings of the step, those that the plan chose included.
      parameters: of the model, with its passes; None where a plan does not say it.
      tokens_per_second: predicted, of all devices; None where a plan does not say it.
      memory_fraction: the share of a GPU's memory that it needs; None elsewhere.
      sequences: of a step; None where a plan does not say it.
      lengths: of a sequence, by stack.
      experts: the most experts of a layer; None where a plan does not say it.
    """

    model: str
    machine: str
    pipeline: str
    config: ProgramConfig
    parameters: int | None
    tokens_per_second: float | None
    memory_fraction: float | None = None
    sequences: int | None = None
    lengths: tuple[int, ...] = ()
    experts: int | None = None

    def recipe_values(self, *, is_new: bool = True) -> list[str]:
        """Return the values of a recipe that the plan decides, as ``--set`` takes them.

        Args:
          is_new: whether the run begins; a run that is resumed keeps the values that are hashed.
        """
        config = self.config
        values = [f"mesh.mesh={config.mesh}"] if config.mesh else []
        if config.mesh and config.layout_names:
            values.append(f"mesh.rules={json_text(list(config.layout_names))}")
        if config.mesh and config.via:
            values.append(f"mesh.via={config.via}")
        if not is_new:
            return values
        if config.micro_batches != 1:
            values.append(f"run.micro_batches={config.micro_batches}")
        for name in ("dtype", "weight_dtype", "reduce_dtype"):
            if (dtype := getattr(config, name)) is not None:
                values.append(f"run.{name}={dtype}")
        return [*values, f"run.remat={config.remat}"]


_HINTS = get_type_hints(StepConfig)
_REQUEST = {
    "model": str, "machine": str, "pipeline": str, "micro_batches": int | None,
    "overlap": bool | None,
} | {
    name: _HINTS[name]
    for name in (
        "step", "batch_tokens", "sequence", "optimizer", "dtype", "weight_dtype", "reduce_dtype"
    )
}  # fmt: skip
_BEST = {
    "mesh": Mapping[str, int],
    "rules": tuple[str, ...],
    "dense_weights": str,
    "via": str,
    "remat": str,
    "sliced": bool,
    "memory_fraction": float | None,
}


def saved_text(report: Json, request: Json) -> str:
    """Return the text of a saved plan: the report, and the options that asked for it."""
    return json_text({"schema": SCHEMA, "request": dict(request), **report}, indent=2) + "\n"


def read_plan(path: str) -> SavedPlan:
    """Read a saved plan.

    Raises:
      InputError: it is missing or no plan, or its values have other types; all at once.
    """
    if is_address(path):
        address = Address.parse(path)
        file = mirror(str(address.parent)) / address.name
    else:
        file = Path(path)
    data = read_json_object(file, limit_bytes=MAX_PLAN_BYTES)
    if data.get("schema") != SCHEMA:
        raise InputError(
            "not a plan that this version reads",
            where=path,
            expected=SCHEMA,
            found=describe(data.get("schema")),
            hint="moecc plan … --save FILE writes one",
        )
    reader = RecordReader(lambda keys: path)
    request, best = (
        {key: reader.value(hint, table.get(key), (name, key)) for key, hint in hints.items()}
        for name, hints in (("request", _REQUEST), ("best", _BEST))
        for table in [reader.value(Mapping[str, Any], data.get(name), (name,)) or {}]
    )
    reader.raise_if_any()
    mesh, rules, fraction = (best.pop(name) for name in ("mesh", "rules", "memory_fraction"))
    model, machine, pipeline = (request.pop(name) for name in ("model", "machine", "pipeline"))
    best["via"] = None if best["via"] == LOCAL else best["via"]
    request["micro_batches"] = request["micro_batches"] or 1
    request["overlap"] = bool(request["overlap"])
    joined = {"mesh": mesh_text(mesh) or None, "rules": ",".join(rules) or None}
    settings = {**request, **best, **joined}
    if wrong := choice_problems({n: v for n, v in settings.items() if n in CHOICES}):
        raise InputError(replace(problem, where=path) for problem in wrong)
    config = ProgramConfig(**settings)
    try:
        _ = config.device_mesh
    except UsageError as error:
        raise InputError(replace(problem, where=path) for problem in error.problems) from None
    count, batch, experts = data.get("parameters"), data.get("batch"), data.get("experts")
    seconds = as_number(cast(JsonDict, data["best"]).get("seconds")) or 0.0
    batch = batch if isinstance(batch, dict) else {}
    tokens, sequences, lengths = (batch.get(n) for n in ("tokens", "sequences", "lengths"))
    tokens = as_number(tokens)
    lengths = list(lengths.values()) if isinstance(lengths, dict) else []
    speed = tokens / seconds if tokens and seconds else 0.0
    return SavedPlan(
        model, machine, pipeline, config,
        count if isinstance(count, int) else None, speed if 0 < speed < math.inf else None,
        fraction, sequences if isinstance(sequences, int) else None,
        tuple(length for length in lengths if isinstance(length, int)),
        experts if isinstance(experts, int) else None,
    )  # fmt: skip
