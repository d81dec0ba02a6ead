"""Recipes as text: TOML with strict keys in, every default written out, a digest.

Relative paths in a file are relative to its folder, those of ``--set`` to the working folder.  What
begins with a scheme, ``hf:`` or ``preset:``, is no path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from importlib.resources import files
from pathlib import Path as FilePath
from typing import Any, get_type_hints

from moecc.errors import (
    InputError,
    MoeccError,
    Problem,
    UsageError,
    printable,
    raise_problems,
    unknown_name,
)
from moecc.formats.files import read_utf8
from moecc.formats.open import cached, is_model_id, missing_place
from moecc.formats.run import RECIPE, is_run, split_reference
from moecc.formats.store import Address, absolute_place, is_address, is_place, mirror
from moecc.support.documents import KeyPath, parse_toml, toml_lines
from moecc.support.record import RecordReader, dotted, line_of
from moecc.support.untyped import JsonDict
from moecc.train.recipe import (
    Corpus,
    Fault,
    OptimizerSection,
    Recipe,
    faults,
    update_faults,
    without_unread,
)

PREFIX = "recipe:"
SHIPPED = files("moecc.presets") / "recipes"
LARGEST_FILE_BYTES = 1 << 20

_INDEX_DIGITS = 10
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*\Z", re.ASCII)


def load_recipe(source: str, sets: Sequence[str] = (), *, check_paths: bool = False) -> Recipe:
    """Return the recipe in a file, or a shipped one by name, with values that options replace.

    Args:
      source: a path, an address in a store, or ``recipe:NAME``.
      sets: texts ``section.key=value`` with TOML values; a word without quotes is a text.
      check_paths: whether the local paths of model and tokens must exist.

    Raises:
      InputError: the file is missing, is not TOML, or has wrong keys, values or paths; all at once.
      UsageError: there is no such shipped recipe, or only the options are wrong.
    """
    text, name, folder = _read(source)
    return parse_recipe(text, name, folder=folder, sets=sets, check_paths=check_paths)


def parse_recipe(
    text: str,
    name: str,
    *,
    folder: FilePath | None = None,
    sets: Sequence[str] = (),
    check_paths: bool = False,
) -> Recipe:
    """Return the recipe in a text; see `load_recipe`.

    Args:
      text: the TOML.
      name: of its file, in messages.
      folder: what relative paths are relative to; the working folder by default.
      sets: as of `load_recipe`.
      check_paths: as of `load_recipe`.

    Raises:
      InputError: as `load_recipe`.
      UsageError: only the options are wrong.
    """
    table = parse_toml(text, name)
    options = _options(sets, table)
    places = toml_lines(text)

    def where(path: KeyPath) -> str:
        return _place(path, places, name, options)

    reader = RecordReader(where)
    recipe = reader.section(Recipe, table, ())
    recipe = without_unread(recipe, {option.path for option in options})
    unread = [(path, _with_section(path, problem)) for path, problem in reader.problems]
    recipe = _resolved(recipe, folder or FilePath(), options)
    problems = [*unread, *_faulty(faults(recipe), reader, options)]
    missing = list(_missing_paths(recipe, where)) if check_paths else []
    if problems or missing:
        wrong = [*(problem for _, problem in problems), *missing]
        of_file = any(not _set_by(path, options) for path, _ in problems)
        raise InputError(wrong) if of_file or missing else UsageError(wrong)
    return recipe


def parse_update(optimizer: str, sets: Sequence[str]) -> OptimizerSection:
    """Return the section ``[optimizer]`` of options alone, for a step that is no part of a run.

    Args:
      optimizer: its name.
      sets: texts ``optimizer.key=value``, as of `load_recipe`.

    Raises:
      UsageError: an option is wrong.
    """
    section = "optimizer"
    table: JsonDict = {section: {}}
    options = _options((f"{section}.name={optimizer}", *sets), table)
    reader = RecordReader(lambda path: _place(path, {}, "the options", options))
    update = reader.section(OptimizerSection, table[section], (section,))
    problems = [*reader.problems, *_faulty(update_faults(update), reader, options)]
    if problems:
        raise UsageError(problem for _, problem in problems)
    return update


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that moecc ships."""
    names = (f.name for f in SHIPPED.iterdir() if f.name.endswith(".toml"))
    return sorted(name.removesuffix(".toml") for name in names)


def shipped_text(name: str) -> str:
    """Return the text of a shipped recipe, with its comments.

    Raises:
      UsageError: there is none of this name.
    """
    name = name.removeprefix(PREFIX)
    if name not in shipped_recipes():
        raise UsageError([unknown_name("recipe", name, shipped_recipes())])
    return (SHIPPED / f"{name}.toml").read_text("utf-8")


def write_recipe(recipe: Recipe) -> str:
    """Return the TOML of `recipe` with its defaults; `parse_recipe` reads the same recipe."""
    return "\n".join(_table(recipe, "")).strip() + "\n"


def recipe_digest(recipe: Recipe) -> str:
    """Return ``sha256:…`` of what decides the function that is trained.

    Where things are is left out, the mesh and the paths of models and tokens: another mesh or
    another disk is the same recipe.  What the folders contain has digests of its own.
    """
    text = json.dumps(_decisive(recipe), sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def recipe_differences(before: Recipe, after: Recipe) -> list[str]:
    """Return what differs in the digests of two recipes: ``run.steps: 100 → 200``."""
    first, second = _decisive(before), _decisive(after)
    return [
        f"{key}: {first.get(key, 'none')} → {second.get(key, 'none')}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def recipe_file(path: FilePath) -> str:
    """Return the text of a file with a recipe. Raises InputError, MachineError."""
    return read_utf8(path, LARGEST_FILE_BYTES, "a recipe")


def _read(source: str) -> tuple[str, str, FilePath]:
    """Return the text of a recipe, its name in messages, and its folder."""
    if source.startswith(PREFIX):
        return shipped_text(source), source, FilePath()
    if is_address(source):
        address = Address.parse(source)
        return recipe_file(mirror(str(address.parent)) / address.name), source, FilePath()
    path = FilePath(source)
    try:
        return recipe_file(path), source, path.parent
    except InputError as error:
        raise _with_hint(error, source) from None


def _with_section(path: KeyPath, problem: Problem) -> Problem:
    """Return the problem of a key that is none of its section with the sections that have it."""
    sections = get_type_hints(Recipe).items()
    owners = [f"'{name}.{path[-1]}'" for name, cls in sections if path[-1] in cls.__annotations__]
    if problem.message != "no such key" or len(path) > 2 or not owners:
        return problem
    return replace(problem, hint=f"did you mean {' or '.join(owners)}?")


def _with_hint(error: InputError, source: str) -> MoeccError:
    """Return `error` with the recipe of the run at `source`, or the shipped one of its name."""
    name = FilePath(source).stem
    if is_run(source):
        hint = f"{FilePath(source) / RECIPE} is the run's recipe; --resume continues the run"
    elif name in shipped_recipes():
        hint = f"moecc has a recipe of this name: {PREFIX}{name}"
    else:
        return error
    return InputError(replace(problem, hint=hint) for problem in error.problems)


@dataclass(frozen=True)
class _Option:
    """One ``--set``."""

    text: str
    path: KeyPath
    value: object


def _options(sets: Sequence[str], table: JsonDict) -> list[_Option]:
    """Put the values of the options into `table`, and return them. Raises UsageError."""
    options: list[_Option] = []
    problems: list[Problem] = []
    for text in sets:
        try:
            options.append(_option(text))
            option = options[-1]
            at: Any = table
            for number, part in enumerate(option.path):
                is_last = number == len(option.path) - 1
                if isinstance(at, dict) and isinstance(part, str):
                    if not is_last:
                        at = at.setdefault(part, {})
                        continue
                    at[part] = option.value
                elif isinstance(at, list) and isinstance(part, int) and part < len(at):
                    if not is_last:
                        at = at[part]
                        continue
                    at[part] = option.value
                else:
                    raise UsageError(
                        "the recipe has no such table",
                        where=f"--set {printable(option.text)}",
                        expected=f"{dotted(option.path[:number])}=[…], with all of the list"
                        if isinstance(at, list)
                        else None,
                        found=dotted(option.path[: number + 1]),
                    )
        except UsageError as error:
            problems.extend(error.problems)
    raise_problems(problems, UsageError)
    return options


def _option(text: str) -> _Option:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not _KEY.match(key):
        raise UsageError(
            "not a value of a recipe",
            where=f"--set {printable(text)}",
            expected="section.key=value",
        )
    # A place in a list has few digits; Python reads no integer of more than 4,300.
    path = tuple(
        int(part) if part.isdecimal() and len(part) < _INDEX_DIGITS else part
        for part in key.split(".")
    )
    return _Option(text, path, _value(value.strip()))


def _value(text: str) -> object:
    """Return the TOML value that `text` spells, or `text` itself where it spells none."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not TOML, more digits than Python reads, or too deep
        return text
    return table["value"] if len(table) == 1 else text


def _set_by(path: KeyPath, options: Sequence[_Option]) -> _Option | None:
    """Return the last option that gave the value at `path`."""
    options_above = (o for o in reversed(options) if path[: len(o.path)] == o.path)
    return next(options_above, None)


def _place(
    path: KeyPath, places: Mapping[KeyPath, int], name: str, options: Sequence[_Option]
) -> str:
    option = _set_by(path, options)
    if option is not None:
        return f"--set {printable(option.text)}"
    return line_of(path, places, name)


def _faulty(
    found_faults: Iterable[Fault], reader: RecordReader, options: Sequence[_Option]
) -> Iterator[tuple[KeyPath, Problem]]:
    """Yield the problems of values that were read, but for those that concern unread ones.

    Each with the path of the value that is to blame: the first that an option gave, or the file.
    """
    bad, where = [path for path, _ in reader.problems], reader.where
    for fault in found_faults:
        paths = fault.paths
        about = (path[: len(b)] == b or b[: len(path)] == path for path in paths for b in bad)
        if any(about):
            continue
        set_paths = [path for path in paths if _set_by(path, options)]
        blamed = next((p for p in set_paths or paths if where(p) != where(())), paths[0])
        location = f"{where(blamed)}: {dotted(paths[0])}"
        value = None if fault.value is None else str(fault.value)
        yield blamed, Problem(fault.message, location, fault.expected, value, fault.hint)


def _resolved(recipe: Recipe, folder: FilePath, options: Sequence[_Option]) -> Recipe:
    """Return `recipe` with absolute paths."""

    def absolute(text: str, path: KeyPath) -> str:
        return absolute_place(text, FilePath() if _set_by(path, options) else folder)

    def corpora(key: str, relative: tuple[Corpus, ...]) -> tuple[Corpus, ...]:
        return tuple(
            replace(c, tokens=absolute(c.tokens, ("data", key, n, "tokens")))
            for n, c in enumerate(relative)
        )

    source = absolute(recipe.model.source, ("model", "source"))
    if is_model_id(recipe.model.source) and not FilePath(source).parent.exists():
        source = recipe.model.source  # ORG/NAME, which is looked up in the cache of the hub
    model = replace(recipe.model, source=source)
    data = replace(
        recipe.data,
        train=corpora("train", recipe.data.train),
        evaluate=corpora("evaluate", recipe.data.evaluate),
    )
    return replace(recipe, model=model, data=data)


def _missing_paths(recipe: Recipe, where: Callable[[KeyPath], str]) -> Iterator[Problem]:
    """Yield the local paths of a resolved recipe at which nothing is."""
    writer = "moecc tokens TEXT --tokenizer MODEL --out DIR writes a token folder"
    paths: dict[KeyPath, str] = {("model", "source"): recipe.model.source}
    for use, corpora in (("train", recipe.data.train), ("evaluate", recipe.data.evaluate)):
        paths |= {("data", use, n, "tokens"): each.tokens for n, each in enumerate(corpora)}
    for key, path in paths.items():
        if not is_place(path) or os.path.exists(path) or split_reference(path) or cached(path):
            continue
        (problem,) = missing_place(FilePath(path)).problems
        is_near = problem.hint is not None and FilePath(path).parent.is_dir()
        hint = problem.hint if is_near or key[0] == "model" else writer
        yield replace(problem, where=f"{where(key)}: {dotted(key)}", found=path, hint=hint)


def _table(section: Any, name: str) -> Iterator[str]:
    """Yield the lines of a section: its values, and then the tables in it.

    TOML has no value for None, which is what a key that is left out reads as.
    """
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    values = {name: value for name, value in values.items() if value is not None}
    if name:
        yield f"[{name}]"
    for key, value in values.items():
        if not is_dataclass(value) and not _has_tables(value):
            yield f"{key} = {_text(value)}"
    for key, value in values.items():
        inner = f"{name}.{key}" if name else key
        if is_dataclass(value):
            yield ""
            yield from _table(value, inner)
        for each in value if _has_tables(value) else ():
            yield ""
            yield from (
                f"[{line}]" if line == f"[{inner}]" else line for line in _table(each, inner)
            )


def _has_tables(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and is_dataclass(value[0])


def _text(value: object) -> str:
    """Return a value as TOML spells it."""
    if isinstance(value, Enum):
        return _text(value.value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML escapes as JSON does, and a delete as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _decisive(recipe: Recipe) -> dict[str, str]:
    """Return what the digest is of: the text of each value by its key."""
    values: dict[str, str] = {}
    for section in fields(recipe):
        if section.name != "mesh":
            values.update(_flat(getattr(recipe, section.name), section.name))
    return values


_WHERE = re.compile(r"model\.source|data\.(train|evaluate)\.\d+\.tokens")


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if is_dataclass(value):
        for member in fields(value):
            yield from _flat(getattr(value, member.name), f"{path}.{member.name}")
    elif _has_tables(value):
        for number, each in enumerate(value):
            yield from _flat(each, f"{path}.{number}")
    elif value is not None and not (_WHERE.fullmatch(path) and is_place(value)):
        yield path, _text(value)
