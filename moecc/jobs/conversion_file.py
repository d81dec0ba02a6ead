"""Conversions in files: the options of ``moecc convert`` as TOML, and the YAML of mergekit-moe."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from moecc.errors import InputError, MachineError, Problem, raise_problems
from moecc.formats.files import read_utf8
from moecc.formats.open import cached, is_model_id
from moecc.formats.store import absolute_place
from moecc.support.documents import KeyPath
from moecc.support.extras import install_hint
from moecc.support.record import Check, Positive, RecordReader, line_of, toml_reader

LARGEST_FILE_BYTES = 1 << 20
MAX_DEPTH = 16

Names = Annotated[
    Mapping[str, str], Check(lambda models: "base" not in models, "names other than base")
]


@dataclass(frozen=True)
class ConversionFile:
    """What a file says of a conversion: arguments of `moecc.jobs.convert.convert`.

    Attributes:
      source: the model to convert.
      experts: further models by name.
      prompts: texts by the name of their expert, of which ``moecc capture`` takes statistics.
    """

    source: str
    pipeline: str = ""
    to: str = "auto"
    emit: str | None = None
    dtype: str | None = None
    seed: int = 0
    experts: Names = field(default_factory=dict)
    capture: str | None = None
    padding_mask: bool = False
    base_model: tuple[str, ...] = ()
    max_shard_bytes: str = "5000000000"
    prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_conversion_file(name: str) -> ConversionFile:
    """Return the conversion that a TOML or YAML file describes.

    Relative paths in a TOML file are relative to its folder; mergekit's are to the working folder.

    Raises:
      InputError: the file is unreadable, or has wrong keys or values; all of them at once.
      MachineError: the package that reads YAML is missing.
    """
    text = read_utf8(Path(name), LARGEST_FILE_BYTES, "a conversion")
    if not name.lower().endswith(".toml"):
        return _mergekit(text, name)
    table, reader = toml_reader(text, name)
    stated = reader.section(ConversionFile, table)
    reader.raise_if_any()
    folder = Path(name).parent
    return replace(
        stated,
        source=absolute_place(stated.source, folder),
        experts={key: absolute_place(model, folder) for key, model in stated.experts.items()},
        capture=None if stated.capture is None else absolute_place(stated.capture, folder),
    )


# The YAML of mergekit-moe, by its names alone.

_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_ROUTERS = {
    "hidden": ("router-init=centroids router-std=1.0",),
    "random": (),
    "uniform_random": ("router-init=uniform",),
}
_TARGETS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}


@dataclass(frozen=True)
class _Expert:
    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float | None = None
    noise_scale: float | None = None


@dataclass(frozen=True)
class _MergekitFile:
    base_model: str
    experts: Annotated[tuple[_Expert, ...], Check(bool, "at least one expert")]
    gate_mode: Literal["hidden", "cheap_embed", "random", "uniform_random"] = "hidden"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    experts_per_token: Positive = 2
    shared_experts: tuple[_Expert, ...] = ()
    architecture: Literal["mixtral", "qwen", "qwen3"] | None = None


def _mergekit(text: str, name: str) -> ConversionFile:
    """Return the conversion that a file of mergekit-moe asks for. Raises InputError."""
    document, lines = _parse_yaml(text, name)
    reader = RecordReader(lambda path: line_of(path, lines, name))
    merge = reader.section(_MergekitFile, document)
    if not reader.problems:
        _note_unsupported(merge, reader)
    reader.raise_if_any()
    named = {f"expert{number}": expert for number, expert in enumerate(merge.experts)}
    is_of_base = all(expert.source_model == merge.base_model for expert in merge.experts)
    options = [
        f"experts={len(named)} top-k={merge.experts_per_token}",
        *([] if is_of_base else [f"sources={','.join(named)}"]),
        *_ROUTERS[merge.gate_mode],
    ]
    is_hidden = merge.gate_mode == "hidden"
    return ConversionFile(
        _local_or_hub(merge.base_model),
        f"upcycle{{{' '.join(options)}}}",
        to=_TARGETS[merge.architecture] if merge.architecture else "auto",
        dtype=_DTYPES[merge.dtype] if merge.dtype else None,
        experts={} if is_of_base else {k: _local_or_hub(e.source_model) for k, e in named.items()},
        prompts={k: e.positive_prompts for k, e in named.items()} if is_hidden else {},
    )


def _note_unsupported(merge: _MergekitFile, reader: RecordReader) -> None:
    """Note values that moecc has no equal of, each with the way out."""
    if merge.gate_mode == "cheap_embed":
        reader.add(("gate_mode",), Problem(
            "routers are not made of embeddings", found="cheap_embed",
            hint="gate_mode: hidden takes what each router reads"))  # fmt: skip
    if merge.shared_experts:
        hint = "a TOML file with pipeline = 'upcycle{… shared=0.25}'"
        reader.add(("shared_experts",), Problem("shared experts are parts of the base", hint=hint))
    if merge.experts_per_token > len(merge.experts):
        reader.reject(("experts_per_token",), "more experts of a token than there are",
                      f"at most {len(merge.experts)}", merge.experts_per_token)  # fmt: skip
    for number, expert in enumerate(merge.experts):
        path = ("experts", number)
        if expert.negative_prompts:
            hint = "moecc capture, and router-init=ridge, which tells the experts' texts apart"
            problem = Problem("routers are not made of what texts are not", hint=hint)
            reader.add((*path, "negative_prompts"), problem)
        if expert.residual_scale not in (None, 1.0):
            reader.reject((*path, "residual_scale"), "an expert's result is not scaled", "1",
                          expert.residual_scale, "leave it out: gates that add up to 1 keep "
                          "the function")  # fmt: skip
        if expert.noise_scale:
            hint = "a TOML file with pipeline = 'upcycle{… init=noise noise-std=…}'"
            reader.reject((*path, "noise_scale"), "noise is for all experts", "0",
                          expert.noise_scale, hint)  # fmt: skip
        if merge.gate_mode == "hidden" and not any(map(str.strip, expert.positive_prompts)):
            reader.add((*path, "positive_prompts"), Problem(
                "an expert has no prompts", expected="texts for it, with gate_mode: hidden",
                hint="gate_mode: random needs none"))  # fmt: skip


def _local_or_hub(model: str) -> str:
    """Return a model as `moecc.open` takes it: mergekit reads ORG/NAME of the hub."""
    is_local = os.path.exists(model) or not is_model_id(model) or cached(model) is not None
    return model if is_local else f"hf://{model}"


def _parse_yaml(text: str, name: str) -> tuple[object, dict[KeyPath, int]]:
    """Return the value of a YAML text, and the line of each of its keys and elements.

    Anchors, tags and repeated keys are rejected: they mean more than they show.

    Raises:
      InputError: all of these, or the text is no YAML.
      MachineError: the package is missing.
    """
    try:
        import yaml
        from yaml.constructor import SafeConstructor as Constructor
    except ModuleNotFoundError:
        hint = install_hint("yaml")
        raise MachineError("reading YAML needs PyYAML", where=name, hint=hint) from None
    read_scalar = {
        "str": Constructor.construct_yaml_str, "int": Constructor.construct_yaml_int,
        "float": Constructor.construct_yaml_float, "bool": Constructor.construct_yaml_bool,
        "null": Constructor.construct_yaml_null,
    }  # fmt: skip
    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []

    def reject(node: yaml.Node, message: str) -> None:
        problems.append(Problem(message, f"{name}:{node.start_mark.line + 1}"))

    def value_of(node: yaml.Node, path: KeyPath) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [value_of(each, (*path, n)) for n, each in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                return read_scalar[node.tag.rpartition(":")[2]](loader, node)
            except (yaml.YAMLError, ValueError, LookupError):
                return reject(node, f"not a value: {str(node.value)[:40]!r}")
        table: dict[Hashable, Any] = {}
        for key_node, item in node.value:
            key = str(key_node.value)
            if key in table:
                reject(key_node, f"the key {key!r} appears twice")
            lines[*path, key] = key_node.start_mark.line + 1
            table[key] = value_of(item, (*path, key))
        return table

    try:
        depth = 0
        # Event by event, since the time of a whole text is quadratic in its depth.
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                where = f"{name}:{event.start_mark.line + 1}"
                raise InputError(f"nested more than {MAX_DEPTH} levels deep", where=where)
            if isinstance(event, yaml.AliasEvent):
                raise InputError("anchors and aliases are not read", where=name,
                                 hint="write the value out where it is used")  # fmt: skip
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = name if mark is None else f"{name}:{mark.line + 1}"
        message = f"not YAML: {getattr(error, 'problem', None) or error}"
        raise InputError(message, where=where) from None
    document = None if node is None else value_of(node, ())
    raise_problems(problems, InputError)
    return document, lines
