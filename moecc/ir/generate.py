"""Writes the methods of a builder for type checkers: ``operations.pyi``, from the operation table.

    python -m moecc.ir.generate

A test holds that the file is current.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path

from moecc.ir import ops
from moecc.ir.operation import OPS, REQUIRED, Attr, OpDef

assert ops.__all__, "importing the package fills the table"

STUB = Path(__file__).with_name("operations.pyi")

_TYPES = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "axis": "str",
    "axes": "str | tuple[str, ...]",
    "words": "str | tuple[str, ...]",
    "sizes": "tuple[tuple[str, Size], ...]",
    "numbers": "tuple[float, ...]",
    "region": "Graph",
}
"""What a builder takes for an attribute of each kind: a name stands for a tuple of one."""

_HEAD = '''"""The methods of a builder, for type checkers.

Written by ``python -m moecc.ir.generate``.
"""

from abc import ABC, abstractmethod
from typing import Literal

from moecc.ir.graph import Graph, Value
from moecc.types import Size

class Operations(ABC):
    @abstractmethod
    def values(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> tuple[Value, ...]: ...
'''


def render() -> str:
    """Return the stub: a method for each operation of the table."""
    return "".join([_HEAD, *(_method(OPS[name]) for name in sorted(OPS))])


def _method(entry: OpDef) -> str:
    # An attribute may have the name of an operand.
    operands = (f"{n}_value" if n in entry.attrs else n for n in entry.operands)
    parameters = ["self", *(f"{name}: Value" for name in operands), "/"]
    parameters.append("*more: Value" if entry.variadic else "*")
    parameters += [_parameter(name, spec) for name, spec in entry.attrs.items()]
    values = ", ".join(["Value"] * len(entry.results))
    results = f"tuple[{values}]" if len(entry.results) > 1 else "Value"
    results = "tuple[Value, ...]" if entry.has_body else results
    listed = "".join(f"        {p},\n" for p in [*parameters, "name: str | None = None"])
    return f"    def {entry.name}(\n{listed}    ) -> {results}: ...\n"


def _parameter(name: str, spec: Attr[object]) -> str:
    type = _TYPES[spec.kind]
    if spec.choices:
        words = f"Literal[{', '.join(map(_quoted, spec.choices))}]"
        type = f"{words} | tuple[{words}, ...]" if spec.kind == "words" else words
    if spec.default is REQUIRED:
        return f"{name}: {type}"
    default = _quoted(spec.default) if isinstance(spec.default, str) else repr(spec.default)
    if isinstance(spec.default, float) and not isfinite(spec.default):
        default = "..."
    return f"{name}: {type} = {default}"


def _quoted(word: str) -> str:
    return f'"{word}"'


if __name__ == "__main__":
    STUB.write_text(render(), "utf-8")
