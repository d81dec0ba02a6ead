"""Jaxprs as the versions of jax have them: their parts, and the evaluation of some equations.

What jax calls an equation, a variable and a jaxpr has no public type, so they are `Any` here; this
module alone knows how versions differ, and calls what has no annotations (pyproject.toml).
"""

from __future__ import annotations

import re
import traceback as tracebacks
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from inspect import unwrap
from itertools import takewhile
from pathlib import Path
from sysconfig import get_paths
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Jaxpr = Any
Equation = Any
Atom = Any
Aval = Any
Tracer = Any
AnyArray = Any
"""An array, of jax or NumPy, or the tracer of one."""

CALLS = frozenset(("jit", "pjit", "closed_call", "core_call"))
"""Primitives whose jaxpr stands for itself, called."""


def trace(function: Callable[..., Any], avals: Sequence[Aval]) -> tuple[Jaxpr, Any]:
    """Return the jaxpr of `function`, whose arguments are arrays, and the shapes of its result."""
    return jax.make_jaxpr(function, return_shape=True)(*avals)


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """Return a jaxpr with variables for its constants, and these."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, list(getattr(jaxpr, "consts", ()))


def shape_of(shape: Sequence[int], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Return an array without its elements."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def is_literal(atom: Atom) -> bool:
    """Return whether `atom` is a value written into its equation."""
    return isinstance(atom, core.Literal)


def float_bits(dtype: Any) -> tuple[int, int]:
    """Return the bits of the fraction and of the exponent of a floating-point type."""
    found = jnp.finfo(dtype)
    return int(found.nmant), int(found.nexp)


def callee(equation: Equation) -> Jaxpr | None:
    """Return the jaxpr of a plain call; None for every other equation."""
    if equation.primitive.name not in CALLS:
        return None
    return equation.params.get("jaxpr") or equation.params.get("call_jaxpr")


def inner_jaxprs(equation: Equation) -> list[Jaxpr]:
    """Return the jaxprs among the parameters of an equation."""
    found = []
    for value in equation.params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        found += [part for part in parts if hasattr(part, "eqns") or hasattr(part, "jaxpr")]
    return found


def contains(jaxpr: Jaxpr, primitive: str, seen: dict[int, bool] | None = None) -> bool:
    """Return whether an equation of `primitive` is in a jaxpr, at any depth."""
    memo = {} if seen is None else seen
    inner, _ = opened(jaxpr)
    key = id(inner)
    if key not in memo:
        memo[key] = any(
            e.primitive.name == primitive
            or any(contains(sub, primitive, memo) for sub in inner_jaxprs(e))
            for e in inner.eqns
        )
    return memo[key]


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a ``scan`` are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carried, _ = params["ft_in"].unpack()
    return len(consts), len(carried)


def evaluate(
    equations: Sequence[Equation],
    given: Mapping[Any, Tracer],
    wanted: Sequence[Any],
    like: Jaxpr,
) -> list[Tracer]:
    """Evaluate `equations` of the jaxpr `like` as they are; return what is `wanted` of them.

    Args:
      equations: in order.
      given: values of the variables that they use and do not define, by variable.
      wanted: variables that they define.
      like: the jaxpr that they are of.
    """
    effects = frozenset().union(*(e.effects for e in equations))
    part = like.replace(
        constvars=[],
        invars=list(given),
        outvars=list(wanted),
        eqns=list(equations),
        effects=effects,
        debug_info=like.debug_info.with_unknown_names(),
    )
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*given.values()))


# Where an equation comes from in the user's program.

_SELF = str(Path(__file__).parent)


@cache
def _is_library(file: str) -> bool:
    folders = (get_paths()["purelib"], get_paths()["platlib"], get_paths()["stdlib"])
    return file.startswith((*folders, _SELF, "<"))


def user_line(equation: Equation) -> str:
    """Return ``file.py:12 in block`` for the innermost line outside of libraries, or nothing."""
    traceback = equation.source_info.traceback
    frames = [] if traceback is None else list(traceback.frames)
    found = next((f for f in frames if not _is_library(f.file_name)), None)
    if found is None:
        return ""
    return f"{Path(found.file_name).name}:{found.line_num} in {found.function_name}"


def function_line(function: Callable[..., object]) -> str:
    """Return ``file.py:12 in block`` for a function, or its name where it has no file."""
    inner: object = unwrap(function)
    while isinstance(inner, partial):
        inner = inner.func
    name = str(getattr(inner, "__qualname__", "function"))
    code = getattr(inner, "__code__", None)
    if code is None:
        return name
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} in {name}"


def line_of(traceback: TracebackType | None) -> str | None:
    """Return the innermost line of an exception outside of libraries, or None."""
    frames = [] if traceback is None else tracebacks.extract_tb(traceback)
    found = [f for f in frames if not _is_library(f.filename)]
    if not found:
        return None
    last = found[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"


# Names: of leaves from their paths, of parameters of one layer of a stack, of blocks.

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-]+")
_STACK = re.compile(r"(?:layers?|blocks?|stack|h|encoder|decoder|groups?)\Z")
_NUMBER = re.compile(r"\d+")


def path_name(path: Sequence[Any]) -> str:
    """Return ``layers.0.mlp.up`` for a path of jax's; characters beyond names become ``_``."""
    parts = (_NOT_IN_NAMES.sub("_", _key(entry)).strip("_") for entry in path)
    return ".".join(part or "_" for part in parts) or "params"


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def unique(names: Iterable[str]) -> list[str]:
    """Return `names`, those that are taken already with a number."""
    taken: set[str] = set()
    made = []
    for name in names:
        number, one = 2, name
        while one in taken:
            one, number = f"{name}_{number}", number + 1
        taken.add(one)
        made.append(one)
    return made


def indexed(name: str, at: int) -> str:
    """Return the name of part `at` of a stacked leaf: ``layers.mlp.up`` to ``layers.3.mlp.up``."""
    parts = name.split(".")
    stacks = [i for i, part in enumerate(parts[:-1]) if _STACK.search(part)]
    # A name that a number follows is of a list, or of a stack that is cut already.
    whole = [i for i in stacks if not parts[i + 1].isdigit()]
    where = (whole or stacks or [0 if len(parts) > 1 else -1])[-1] + 1
    while 0 < where < len(parts) and parts[where].isdigit():
        where += 1
    return ".".join([*parts[:where], str(at), *parts[where:]])


def location(names: Sequence[str]) -> str:
    """Return the location of a block from the names of its parameters: what they share."""
    shared = _shared([n.split(".")[:-1] for n in names])
    if shared:
        return ".".join(shared)
    rest = "".join(_shared(names))
    return rest.rstrip("._-") if rest.endswith(("_", "-")) else "ffn"


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """Return the first parts that all `names` have."""
    columns = takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return [parts[0] for parts in columns]


def ranged(names: Sequence[str]) -> str:
    """Return one name for names that differ in one number: ``layers.{0..5}.mlp.up``."""
    pieces = [_NUMBER.split(n) for n in names]
    numbers = [[int(k) for k in _NUMBER.findall(n)] for n in names]
    first = numbers[0]
    differing = [i for i in range(len(first)) if any(n[i : i + 1] != [first[i]] for n in numbers)]
    alike = all(p == pieces[0] for p in pieces) and len(differing) == 1
    if not alike:
        return names[0]
    (at,) = differing
    counts = [n[at] for n in numbers]
    if counts != list(range(counts[0], counts[0] + len(counts))):
        return names[0]
    texts = [str(n) for n in first]
    texts[at] = f"{{{counts[0]}..{counts[-1]}}}"
    made = pieces[0][0]
    for text, piece in zip(texts, pieces[0][1:], strict=True):
        made += text + piece
    return made
