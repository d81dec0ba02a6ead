"""Writes the typed faces of the operation table: methods that build, and views of attributes.

    python -m moecc.ir.generate

writes ``operations.py``, ``elementwise_operations.py`` and ``attributes.py`` beside this file; a
test holds that they are current.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path
from textwrap import indent, wrap

import moecc.ir.ops as _filled
from moecc.ir.operation import OPS, REQUIRED, Attr, OpDef, mixes_none

WIDTH = 100
NO_BREAK = "\u00a0"

_READ = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "axis": "str",
    "axes": "tuple[str, ...]",
    "words": "tuple[str, ...]",
    "sizes": "Sizes",
    "numbers": "tuple[float, ...]",
    "region": "Graph",
}
"""What an attribute of each kind is to those who read it."""

_GIVEN = {**_READ, "axes": "Names", "words": "Names"}
"""What a builder takes for it: a single name stands for a tuple of one."""

COMMON: dict[str, tuple[str, Callable[[OpDef], bool]]] = {
    "SlotAttrs": ("assigns slots", lambda entry: entry.assigns_slots),
    "NormAttrs": ("is a norm with parameters", lambda entry: entry.is_norm),
    "ReductionAttrs": (
        "reduces axes away",
        lambda entry: "axes" in entry.attrs and entry.mixes is not mixes_none,
    ),
    "ProductAttrs": ("is a product of matrices", lambda entry: entry.is_product),
    "ChoosingAttrs": ("chooses experts by scores", lambda entry: entry.chooses),
    "CollectiveAttrs": (
        "moves data between devices",
        lambda entry: entry.collective is not None and "mesh" in entry.attrs,
    ),
}
"""Views of what several operations have in common: of those with a trait."""


def render_operations() -> str:
    """Return the module with a method for each operation that is not elementwise."""
    return _operations(_OPERATIONS_HEAD, lambda entry: not entry.elementwise)


def render_elementwise_operations() -> str:
    """Return the module with a method for each elementwise operation, and what methods share."""
    return _operations(_ELEMENTWISE_HEAD, lambda entry: entry.elementwise)


def _operations(head: str, has: Callable[[OpDef], bool]) -> str:
    methods = [_method(entry) for entry in OPS.values() if has(entry)]
    used = [n for n in _choices() if any(f": {n}" in method for method in methods)]
    imported = ",\n        ".join(sorted(used))
    return "\n\n".join([head.format(imported=imported), *methods])


def render_attributes() -> str:
    """Return the module with a view for each operation that has attributes."""
    own = [
        _view(class_name(entry.name), f"``{entry.name}``", [entry])
        for entry in OPS.values()
        if entry.attrs
    ]
    common = [
        _view(name, f"what {what}: those that all of them have", list(filter(has, OPS.values())))
        for name, (what, has) in COMMON.items()
    ]
    aliases = [_alias(name, words) for name, words in sorted(_choices().items())]
    return "\n".join([_ATTRIBUTES_HEAD, *aliases, *own, *common])


def class_name(operation: str) -> str:
    """Return the name of the view of the attributes of an operation: ``AllGatherAttrs``."""
    return "".join(word.capitalize() for word in operation.split("_")) + "Attrs"


def _choices() -> dict[str, tuple[str, ...]]:
    """Return words to choose from by the name of their type: that of the attribute.

    Where operations differ in the choices of an attribute, the longest list has the name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for entry in OPS.values():
        for name, spec in entry.attrs.items():
            title = _title(name)
            if len(spec.choices) > max(1, len(found.get(title, ()))):
                found[title] = spec.choices
    return found


def _title(attribute: str) -> str:
    return "".join(word.capitalize() for word in attribute.split("_"))


def _word(name: str, spec: Attr) -> str:
    """Return the type of one word of an attribute with choices."""
    title = _title(name)
    return title if _choices().get(title) == spec.choices else _literal(spec.choices)


def _literal(words: Iterable[str]) -> str:
    return f"Literal[{', '.join(map(_quoted, words))}]"


def _quoted(word: str) -> str:
    return f'"{word}"'


def _alias(name: str, words: tuple[str, ...]) -> str:
    return f"{name} = {_literal(words)}"


def _read(name: str, spec: Attr) -> str:
    if not spec.choices:
        return _READ[spec.kind]
    word = _word(name, spec)
    return f"tuple[{word}, ...]" if spec.kind == "words" else word


def _given(name: str, spec: Attr) -> str:
    if not spec.choices:
        return _GIVEN[spec.kind]
    word = _word(name, spec)
    return f"{word} | tuple[{word}, ...]" if spec.kind == "words" else word


def _view(name: str, of: str, entries: list[OpDef]) -> str:
    types: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        for attribute, spec in entry.attrs.items():
            types[attribute].append(_read(attribute, spec))
    common = {n: t for n, t in types.items() if len(t) == len(entries)}
    operations = _call("operations = frozenset", [_set(entries)], "", 4)
    fields = [f"{n}: {t}" for n, given in common.items() if (t := _widest(given))]
    lines = [f'"""Attributes of {of}."""', operations, *fields]
    return f"\nclass {name}(View):\n" + indent("\n".join(lines), "    ")


def _set(entries: list[OpDef]) -> str:
    return f"{{{', '.join(_quoted(entry.name) for entry in entries)}}}"


def _widest(types: list[str]) -> str | None:
    """Return the type of an attribute that operations have in common, the named one of choices."""
    different = list(dict.fromkeys(types))
    named = [t for t in different if "Literal" not in t]
    return different[0] if len(different) == 1 else named[0] if len(named) == 1 else None


def _method(entry: OpDef) -> str:
    results = _results(entry)
    operands = [_operand(entry, name) for name in entry.operands]
    head = _call(f"def {entry.name}", _parameters(entry, operands), f" -> {results}:", 4)
    body = "\n".join([_docstring(entry), *_body(entry, operands, results)])
    return indent(f"{head}\n{indent(body, '    ')}", "    ")


def _results(entry: OpDef) -> str:
    if any(spec.kind == "region" for spec in entry.attrs.values()):
        # How many there are is what its body says.
        return "tuple[Value, ...]"
    count = len(entry.results)
    return "Value" if count == 1 else f"tuple[{', '.join(['Value'] * count)}]"


def _operand(entry: OpDef, name: str) -> str:
    """Return the parameter for an operand; an attribute may have the same name."""
    return f"{name}_value" if name in entry.attrs else name


def _parameters(entry: OpDef, operands: list[str]) -> list[str]:
    taken = ["self", *(f"{name}: Value" for name in operands), "/"]
    rest = "*more: Value" if entry.variadic else "*"
    attributes = [_parameter(name, spec) for name, spec in entry.attrs.items()]
    return [*taken, rest, *attributes, "name: str | None = None"]


def _parameter(name: str, spec: Attr) -> str:
    type = _given(name, spec)
    return f"{name}: {type}" if spec.default is REQUIRED else f"{name}: {type} = {_default(spec)}"


def _default(spec: Attr) -> str:
    if spec.kind == "float":
        value = float(str(spec.default))
        return repr(value) if isfinite(value) else f'float("{value}")'
    return _quoted(spec.default) if isinstance(spec.default, str) else repr(spec.default)


def _docstring(entry: OpDef) -> str:
    first = " ".join(entry.doc.split("\n")[0].split())
    return f'"""{first}"""'


def _body(entry: OpDef, operands: list[str], results: str) -> Iterator[str]:
    more = ["*more"] if entry.variadic else []
    attributes = [f"{n}={n}" for n in entry.attrs]
    given = [_quoted(entry.name), *operands, *more, "name=name", *attributes]
    if results in ("Value", "tuple[Value, ...]"):
        method = "value" if results == "Value" else "values"
        yield _call(f"return self.{method}", given, "", 8)
        return
    named = ", ".join(_NUMBERS[: len(entry.results)])
    yield _call(f"{named} = self.values", given, "", 8)
    yield f"return {named}"


def _call(before: str, items: Iterable[str], after: str, column: int) -> str:
    """Return `items` in parentheses, over several lines where they are too long for one."""
    # A space that is no place to break keeps an item in one piece.
    listed = ", ".join(item.replace(" ", NO_BREAK) for item in items)
    line = f"{before}({listed}){after}"
    if len(line) > WIDTH - column:
        inner = wrap(listed, WIDTH - column - 4, break_long_words=False, break_on_hyphens=False)
        line = "\n".join([f"{before}(", *(f"    {part}" for part in inner), f"){after}"])
    return line.replace(NO_BREAK, " ")


_NUMBERS = ("first", "second", "third")

_OPERATIONS_HEAD = '''"""A method for each operation of the table that is not elementwise.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moecc.ir.elementwise_operations import ElementwiseOperations
from moecc.ir.operation import Names, Sizes

if TYPE_CHECKING:
    from moecc.ir.attributes import (
        {imported},
    )
    from moecc.ir.graph import Graph, Value

# fmt: off


class Operations(ElementwiseOperations):
    """What a builder makes.

    Operands are given by position, attributes and the name of the result by keyword.
    """'''

_ELEMENTWISE_HEAD = '''"""A method for each elementwise operation of the table.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.ir.attributes import (
        {imported},
    )
    from moecc.ir.graph import Value

# fmt: off


class ElementwiseOperations(ABC):
    """The elementwise part of what a builder makes."""

    @abstractmethod
    def value(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> Value:
        """Make the only result of the operation `op`."""

    @abstractmethod
    def values(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> tuple[Value, ...]:
        """Make the results of the operation `op`, of which the first may be named."""'''

_ATTRIBUTES_HEAD = '''"""The attributes of each operation, typed.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moecc.ir.operation import Sizes, View

if TYPE_CHECKING:
    from moecc.ir.graph import Graph

# fmt: off
'''

assert _filled.__all__, "importing the table fills it"

GENERATED = {
    "operations.py": render_operations,
    "elementwise_operations.py": render_elementwise_operations,
    "attributes.py": render_attributes,
}
"""The files beside this one, and what writes them."""


def main() -> None:
    """Write the generated modules anew."""
    for name, render in GENERATED.items():
        Path(__file__).with_name(name).write_text(render() + "\n", "utf-8")


if __name__ == "__main__":
    main()
