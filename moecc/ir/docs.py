"""Generate the operation tables in ``docs/ir.md`` from the operation table itself.

    python -m moecc.ir.docs docs/ir.md

replaces the text between two markers; a test checks that the file is current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import moecc.ir.ops as _filled
from moecc.ir.operation import OPS, REQUIRED, OpDef, format_attr, mixes_none
from moecc.support.generated_docs import GeneratedPart

GROUPS = (
    ("Arithmetic, selection, constants", "elementwise"),
    ("Products, reductions and norms", "contraction"),
    ("Axes, chunks and caches", "axes"),
    ("Positions, masks and attention", "attention"),
    ("Routing", "routing"),
    ("Slots and rows", "slots"),
    ("Random numbers", "random"),
    ("Collectives", "collectives"),
    ("Repetition, and regions of JAX", "repetition"),
)
"""Headings, and the module of `moecc.ir.ops` whose operations are listed under each."""

COLUMNS = ("operation", "computes", "mixes", "linear in")


def render_operations() -> str:
    """Return the operations as Markdown, in the order of the table."""
    parts = [_heading()]
    for title, module in GROUPS:
        rows = [entry for entry in OPS.values() if _module(entry) == module]
        parts.append(f"### {title}\n{_table(COLUMNS, map(_operation, rows))}")
    return "\n\n".join(parts)


def _heading() -> str:
    return f"""There are {len(OPS)}. Along the axes that an operation *mixes*, an element of the
result needs other elements of the operands; where it mixes none, one of each. *Linear in* names
operands, each with the others held fixed, or, where it says *together*, only all at once, as a sum
is. `⇄` marks operands that may be exchanged. Below its meaning an operation has its attributes,
each with its kind or choices, and its default unless it is required."""


def _module(entry: OpDef) -> str:
    # Elementwise operations without attributes have no class of their own.
    module = entry.declared.__module__ if entry.declared is not None else "elementwise"
    return module.rpartition(".")[2]


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _operation(entry: OpDef) -> tuple[str, ...]:
    linear = ", ".join(f"`{entry.operands[i]}`" for i in entry.linear)
    linear += " together" if entry.jointly else ""
    exchange = " ⇄" if entry.commutative else ""
    computes = "<br>".join([_meaning(entry), *_attributes(entry)])
    return (f"`{_signature(entry)}`{exchange}", computes, _mixes(entry), linear)


def _signature(entry: OpDef) -> str:
    """Return the operation's signature in the text format, with ``{…}`` if it has attributes."""
    results = ", ".join(f"%{name}" for name in entry.results)
    operands = [f"%{name}" for name in entry.operands] + ["…"] * entry.variadic
    prefix = f"{results} = " if entry.results != OpDef.results else ""
    attrs = " {…}" if entry.attrs else ""
    return f"{prefix}{' '.join([entry.name, ', '.join(operands)]).strip()}{attrs}"


def _meaning(entry: OpDef) -> str:
    """Return the documentation of an entry on one line, its paragraphs apart."""
    paragraphs = entry.doc.replace("``", "`").split("\n\n")
    return "<br>".join(_cell(" ".join(text.split())) for text in paragraphs if text.strip())


def _mixes(entry: OpDef) -> str:
    """Return in words which axes `entry` mixes; empty if none."""
    if entry.mixes is mixes_none:
        return ""
    if entry.name in MIXED_BY_OPERANDS:
        return MIXED_BY_OPERANDS[entry.name]
    # Give each axis attribute its own name as the value, so that `mixes` returns attribute names.
    axes = {name: (name,) for name, spec in entry.attrs.items() if spec.kind == "axes"}
    axis = {name: name for name, spec in entry.attrs.items() if spec.kind == "axis"}
    mixed = entry.mixes((), {**axes, **axis})
    return ", ".join(f"those of `{m}`" if m in axes or m in axis else f"`{m}`" for m in mixed)


MIXED_BY_OPERANDS = {
    "dispatch": "the `tokens` of its `assign_slots`",
    "group_sum": "the `tokens` of its `assign_slots`",
    "combine": "`group`, `expert`, `slot`, the `tokens` of its `assign_slots`",
    "combine_weighted": "`group`, `expert`, `slot`, the `tokens` of its `assign_slots`",
    "dispatch_gates": "those of the gates",
    "assign_slots": "all",
    "rope": "those of the positions, if dynamic",
    "random_uniform": "all",
    "random_normal": "all",
    "scan": "all",
}
"""Operations whose mixed axes depend on their operands, not on attributes alone."""


def _attributes(entry: OpDef) -> Iterator[str]:
    for name, spec in entry.attrs.items():
        choices = ", ".join(f"`{c}`" for c in spec.choices)
        kind = f"one of {choices}" if choices else spec.kind
        is_required = spec.default is REQUIRED
        default = "" if is_required else f"; default `{format_attr(spec, spec.default)}`"
        yield f"`{name}` ({kind}{default}): {_cell(spec.doc)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


assert _filled.__all__, "importing the table fills it"

OPERATIONS = GeneratedPart("operations", "moecc.ir.docs", render_operations)

if __name__ == "__main__":
    sys.exit(OPERATIONS.main())
