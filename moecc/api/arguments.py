"""What callers may write for a source, a pipeline, an element type: parsed, or rejected."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from reprlib import Repr
from typing import get_type_hints

from moecc.decoding import Sampling
from moecc.errors import Problem, UsageError, nearest, raise_problems
from moecc.jobs.generate import Continuing
from moecc.model.open import parse_branches
from moecc.plan.step import StepConfig
from moecc.rewrite.passes import Pass
from moecc.rewrite.pipeline import Pipeline, format_pass
from moecc.support.lazy import np
from moecc.support.untyped import JsonDict
from moecc.types import F32, Array, DType, float_type

_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80
# What a message says of a value: short, and also where the value's own text raises.


def source_text(source: object) -> str:
    """Return a source as the text that the command line takes.

    Raises:
      UsageError: it is neither text nor a path.
    """
    return _path(source, "source", "a folder, a file, preset:NAME or a run, as text or Path")


def folder_text(folder: object) -> str:
    """Return the place of an output as text.

    Raises:
      UsageError: it is neither text nor a path.
    """
    return _path(folder, "folder", "a folder, or a .gguf file, as text or Path")


def _path(path: object, noun: str, expected: str) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise _wrong(noun, expected, path)
    try:
        text = os.fspath(path)
    except TypeError:
        raise _wrong(noun, expected, path) from None
    if not isinstance(text, str) or not text or "\0" in text:
        raise _wrong(noun, expected, path)
    return text


def whole(noun: str, value: object, low: int = 0) -> int:
    """Return a whole number, Python's or NumPy's.

    Raises:
      UsageError: it is none, or below `low`.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= low:
        return int(value)
    raise UsageError(f"the {noun} is no whole number from {low} on", found=_SHOWN.repr(value))


def positive(noun: str, value: object) -> None:
    """Raise UsageError unless `value` is a number above 0."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return
    raise UsageError(f"the {noun} is no number above 0", found=_SHOWN.repr(value))


def flag(noun: str, value: object) -> bool:
    """Return whether something is asked for; a text such as "no" would count as true.

    Raises:
      UsageError: it is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong(f"option {noun}", "True or False", value)
    return bool(value)


def family_text(to: object) -> str:
    """Return the name of a family; None stands for one that engines read.

    Raises:
      UsageError: it is no text.
    """
    if to is None:
        return "auto"
    if not isinstance(to, str):
        raise UsageError("a family is text, mixtral", found=_SHOWN.repr(to))
    return to


def arrays_of(inputs: object) -> dict[str, Array]:
    """Return inputs as arrays by name; lists of numbers become arrays.

    Raises:
      UsageError: they are no mapping of names to arrays.
    """
    if not isinstance(inputs, Mapping):
        raise UsageError("inputs are arrays by name", found=type(inputs).__name__)
    arrays: dict[str, Array] = {}
    for name, value in inputs.items():
        if not isinstance(name, str):
            raise _wrong("name of an input", "text", name)
        try:
            arrays[name] = value if hasattr(value, "ndim") else np.asarray(value)
        except ValueError:
            raise _wrong(f"input {name}", "an array, or lists of equal lengths", value) from None
    return arrays


def named_places(models: object) -> dict[str, str]:
    """Return the places of models by name, as ``convert --experts`` takes them.

    Raises:
      UsageError: they are no mapping from names to folders, or a name is reserved.
    """
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise _wrong("experts", "folders of models by name, {'a': 'tuned'}", models)
    if any(not isinstance(name, str) or "=" in name for name in models):
        raise _wrong("names of the experts", "text without =", list(models))
    return parse_branches([f"{name}={source_text(folder)}" for name, folder in models.items()])


def pipeline_of(passes: object) -> Pipeline:
    """Return a pipeline from its text, a pass, or several of either.

    Raises:
      UsageError: it is none of these, or its text is wrong.
    """
    if isinstance(passes, Pipeline):
        return passes
    if isinstance(passes, Pass):
        return Pipeline((_checked(passes),))
    if isinstance(passes, str):
        return Pipeline.parse(passes)
    if isinstance(passes, Iterable) and not isinstance(passes, (bytes, Mapping)):
        return Pipeline(tuple(item for part in passes for item in pipeline_of(part)))
    raise _wrong("pipeline", "text such as 'upcycle{experts=8}', a pass, or several", passes)


def _checked(item: Pass) -> Pass:
    """Return a pass whose options have their types, NumPy's scalars as Python's.

    Raises:
      UsageError: one has another type.
    """
    options = {f.name: getattr(item, f.name) for f in fields(item)}
    scalars = {name: value for name, value in options.items() if isinstance(value, np.generic)}
    item = replace(item, **_plain(**scalars)) if scalars else item
    try:
        format_pass(item)
    except ValueError as error:
        raise UsageError(f"an option of {item.name} has another type", found=str(error)) from None
    return item


def pass_text(name: str, options: Mapping[str, object]) -> str:
    """Return the text of a pass with options as Python names and values.

    Raises:
      UsageError: a value cannot be written as text.
    """
    return f"{name}{{{' '.join(_option_text(n, v) for n, v in options.items())}}}"


def _option_text(name: str, value: object) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, (int, float)):
        text = repr(value)
    elif isinstance(value, str):
        text = value if value and not set(value) & set(' \t\n{}"') else f'"{_quoted(value)}"'
    elif isinstance(value, (list, tuple)):
        text = ",".join(map(str, value))
    else:
        raise _wrong(f"option {name}", "a number, text, True or False, or a list", value)
    return f"{name.replace('_', '-')}={text}"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def dtype_of(dtype: object) -> DType | None:
    """Return an element type by moecc's, PyTorch's or NumPy's name of it; None stays None.

    Raises:
      UsageError: there is no such floating-point type.
    """
    if dtype is None or isinstance(dtype, DType):
        return dtype
    if isinstance(dtype, str):
        return float_type(dtype)
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or _SHOWN.repr(dtype)
    return float_type(str(name).removeprefix("torch."))


def texts_of(noun: str, texts: object) -> list[str]:
    """Return one text, or several, as a list.

    Raises:
      UsageError: it is neither.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise _wrong(noun, "a text, or a list of texts", texts)


def continuing(
    tokens: object, temperature: object, top_k: object, top_p: object, seed: object, dtype: object
) -> Continuing:
    """Return how texts are continued.

    Raises:
      UsageError: a value has another type, or is out of its range.
    """
    wholes = _plain(tokens=tokens, top_k=top_k, seed=seed)
    numbers = _plain(temperature=temperature, top_p=top_p)
    problems = [
        Problem(f"{name} has another type", expected="a whole number", found=_SHOWN.repr(value))
        for name, value in wholes.items()
        if not isinstance(value, int) or isinstance(value, bool)
    ] + [
        Problem(f"{name} has another type", expected="a number", found=_SHOWN.repr(value))
        for name, value in numbers.items()
        if not isinstance(value, (int, float)) or isinstance(value, bool)
    ]
    raise_problems(problems, UsageError)
    settings: JsonDict = {**wholes, **numbers}
    count = settings.pop("tokens")
    how = Continuing(count, Sampling(**settings), dtype=dtype_of(dtype) or F32)
    how.check()
    return how


def _plain(**values: object) -> JsonDict:
    """Return values by name, NumPy's scalars as Python's."""
    return {n: v.item() if isinstance(v, np.generic) else v for n, v in values.items()}


def machine_text(machine: object) -> str:
    """Return the name of a machine. Raises UsageError for what is no text."""
    if not isinstance(machine, str):
        raise UsageError("a machine is text, tpu:v5p:4x4x4", found=type(machine).__name__)
    return machine


def swept_values(values: object) -> tuple[object, ...]:
    """Return the values of an axis of a sweep, of which there may be one or several."""
    several = values if isinstance(values, (list, tuple, range, np.ndarray)) else (values,)
    return tuple(v.item() if isinstance(v, np.generic) else v for v in several)


def step_request(options: Mapping[str, object]) -> StepConfig:
    """Return the options of a plan, which has those of ``moecc plan``, with underscores.

    Raises:
      UsageError: there is no such option, or a value has another type.
    """
    hints = get_type_hints(StepConfig)
    problems = []
    checked = _plain(**options)
    length = checked.get("sequence")
    if isinstance(length, int) and not isinstance(length, bool):
        checked["sequence"] = str(length)
    for name, value in checked.items():
        if name not in hints:
            hint = nearest(name, hints) or f"options: {', '.join(hints)}"
            problems.append(Problem(f"plan has no option {name!r}", hint=hint))
        elif not isinstance(value, hints[name]) or isinstance(value, bool):
            problems.append(Problem(f"{name} has another type", expected=_expected(hints[name]),
                                    found=_SHOWN.repr(value)))  # fmt: skip
    raise_problems(problems, UsageError)
    return StepConfig(**checked)


def _expected(hint: object) -> str:
    return "a whole number" if "int" in str(hint) else "text"


def _wrong(noun: str, expected: str, value: object) -> UsageError:
    return UsageError(
        f"the {noun} cannot be used",
        expected=expected,
        found=f"{type(value).__name__} {_SHOWN.repr(value)}",
    )
