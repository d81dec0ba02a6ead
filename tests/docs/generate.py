"""All that is generated in the documentation, and the declarations of operations.

    python -m tests.docs.generate [FILE …]

writes the files that are wholly generated and the parts of pages between two markers; without
FILE, all of them.  A test checks that each is current.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache, partial
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import click
import sharding_cases

import moecc.ir.ops as _filled
from moecc.backend import emit_program
from moecc.cli.commands import Argument, Docstring, command_of, job_function
from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir.operation import OPS, REQUIRED, Attr, OpDef, format_attr, mixes_none
from moecc.jobs import COMMANDS
from moecc.model.open import open_model
from moecc.prove import prover
from moecc.prove.rules import APPLICATIONS, MONOMIALS, SUMS, Lemma
from moecc.rewrite.passes import Pass, describe, options, write
from moecc.rewrite.pipeline import Pipeline, installed
from moecc.rewrite.runner import run_pipeline
from moecc.train.recipe import Recipe
from tests.emit import prove as emitted
from tests.torch_models import page as torch_models

from .pages import ROOT

DOCS = ROOT / "docs"

assert _filled.__all__, "importing the package fills the table of operations"
assert prover.__name__, "importing the prover registers all lemmas"

# The commands: docs/cli.md.

WIDTH, USAGE = 100, 86
"""The columns of a line of text, and of a usage, which is shown without scrolling."""

COMMON = ("quiet", "format", "load", "force")
"""Options of most commands, which the page describes once."""


_COMMAND = re.compile(r"(?m)^(## moecc (\w+).*\n)(?:(?!## ).*\n)*?(?:    .*\n)+")
"""A heading and all up to the end of the first usage, which follows from the command."""


def render_commands() -> str:
    """Return docs/cli.md with the description, usage and examples of each command as they are."""
    text = (DOCS / "cli.md").read_text("utf-8")
    assert {match[2] for match in _COMMAND.finditer(text)} == set(COMMANDS), "a heading a command"
    return _COMMAND.sub(lambda match: f"{match[1]}{render_command(match[2])}\n", text)


def render_command(name: str) -> str:
    """Return the description of a command, its usage and its examples as Markdown."""
    doc = Docstring.of(job_function(name))
    lines, line = list[str](), f"    moecc {name}"
    for word in _words(name):
        if len(line) + len(word) > USAGE:
            lines.append(line)
            line = "       "
        line += f" {word}"
    examples = [f"    $ {example}" for example in doc.example]
    text = textwrap.fill(" ".join(doc.text.split()), WIDTH, break_on_hyphens=False)
    return "\n".join([text, "", *lines, line, *examples])


def _words(name: str) -> Iterator[str]:
    """Yield the arguments and options of a command as its usage has them, common ones aside."""
    context = click.Context(click.Command(name))
    command = ""  # that another command runs: it stands last
    for parameter in command_of(name).params:
        if isinstance(parameter, Argument):
            words, dashes, command = str(parameter.metavar).partition("-- ")
            yield words.strip()
            command = dashes + command
        elif parameter.name not in COMMON:
            assert isinstance(parameter, click.Option), "the other parameters are options"
            word, value = min(parameter.opts, key=len), parameter.make_metavar(context)
            if isinstance(parameter.type, click.Choice):
                value = "|".join(parameter.type.choices)
            usage = word if parameter.is_flag else f"{word} {value}"
            yield usage if parameter.required else f"[{usage}]"
    if command:
        yield command


# The operations: docs/ir.md.

GROUPS = (
    ("Arithmetic, selection, constants", "elementwise"),
    ("Products, reductions and norms", "contraction"),
    ("Axes, chunks and caches", "axes"),
    ("Positions, masks and attention", "attention"),
    ("States along a sequence", "recurrence"),
    ("Routing", "routing"),
    ("Slots and rows", "slots"),
    ("Random numbers", "random"),
    ("Collectives", "collectives"),
    ("Repetition, and regions of JAX", "repetition"),
)
"""Titles, and the module of `moecc.ir.ops` whose operations are listed under each."""

COLUMNS = ("operation", "computes", "mixes", "linear in")


def render_operations() -> str:
    """Return the operations as Markdown, in the order of the table."""
    rows = []
    for title, module in GROUPS:
        rows.append((f"**{title}**", "", "", ""))
        rows += [_operation(entry) for entry in OPS.values() if _module(entry) == module]
    return f"{_heading()}\n\n{_table(COLUMNS, rows)}"


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


# The passes: docs/passes.md.

HEAD = """# Passes

A pipeline names passes in the order in which they run:
`canonicalize,upcycle{experts=8 top-k=2},cse,dce`. A pass with an asterisk fails where it finds
nothing to do, unless `--allow-unmatched` is given. What a pass preserves is stated for its default
options. `moecc passes NAME` has the details of a pass, and the text of a graph before and after it.
How to write one: [writing-a-pass.md](writing-a-pass.md). `make docs` writes this page.
"""


def render_passes() -> str:
    """Return the reference of all passes as Markdown."""
    columns = "pass", "what it does, what it preserves, and its options with their defaults"
    registry = installed()
    rows = (_pass(registry.get(name)) for name in registry.names())
    return f"{HEAD}\n{_table(columns, rows)}\n"


def _pass(cls: type[Pass]) -> tuple[str, str]:
    defaults = options(cls).values()
    preserves = "" if any(option.required for option in defaults) else str(cls().preserves)
    text = [_summary(cls), f"*Preserves*: {preserves}." if preserves else ""]
    for option in defaults:
        default = "" if option.required else f"={write(option.type, option.default)}"
        bounds = "" if option.bounds is None else f", {option.bounds}"
        text.append(f"`{option.name}{default}` ({describe(option.type)}{bounds}): {option.doc}")
    name = f"`{cls.name}`{' *' if cls.must_match else ''}"
    return name, _cell("<br>".join(filter(None, text)))


def _summary(cls: type[Pass]) -> str:
    """Return the first paragraph of the docstring, on one line."""
    # A dataclass without a docstring gets its signature as one.
    text = inspect.cleandoc(cls.__doc__ or "")
    paragraph = text.partition("\n\n")[0]
    if not paragraph or text.startswith(f"{cls.__name__}("):
        paragraph = f"{cls.summary[0].upper()}{cls.summary[1:]}."
    return " ".join(paragraph.replace("``", "`").split())


# The methods of a builder, for type checkers: moecc/ir/operations.pyi.

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

STUB_HEAD = '''"""The methods of a builder, for type checkers; written by ``make docs``."""

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


def render_stub() -> str:
    """Return the stub: a method for each operation of the table."""
    return "".join([STUB_HEAD, *(_method(OPS[name]) for name in sorted(OPS))])


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


# The lemmas: docs/exactness.md.


def render_lemmas() -> str:
    """Return what each lemma states, as Markdown."""
    groups = {
        "a function": chain.from_iterable(APPLICATIONS.values()),
        "a product": MONOMIALS,
        "a sum": SUMS,
    }
    rows = [
        (title, "<br>".join(_lemma(name, lemma) for name, lemma in sorted(named.items())))
        for title, lemmas in groups.items()
        if (named := {lemma.name: lemma for lemma in lemmas})
    ]
    return _table(("used on", "lemmas"), rows)


def _lemma(name: str, lemma: Lemma) -> str:
    statement = inspect.getdoc(lemma.apply)
    return f"*{name}*: {_cell(' '.join(statement.partition(chr(10) * 2)[0].split()))}"


# The programs of docs/emit.md, beside it.

LLAMA = "preset:smollm2-135m"
T5 = '{"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false}'
MODELS = {
    "llama.py": ("SmolLM2: Llama, 30 layers", LLAMA, ""),
    "t5_st_moe.py": ("T5 with ST-MoE: capacity, losses", T5, "st-moe{experts=8 layers=every:2}"),
    "vit.py": ("ViT", '{"model_type": "vit"}', ""),
}
"""The whole files: of what, its source, and its passes."""


@cache
def program(source: str, pipeline: str) -> str:
    """Return the file of a preset, or of a config as JSON."""
    if source.startswith("preset:"):
        with open_model(source) as model:
            graph = model.graph
    else:
        graph = build(parse_config(json.loads(source)), padding="vit" not in source)
    run_pipeline(graph, Pipeline.parse(pipeline))
    (text,) = emit_program(graph, "torch").files.values()
    return text


def _program(name: str) -> str:
    return program(*MODELS[name][1:])


def render_programs() -> str:
    """Return a table of the whole files as Markdown."""
    rows = (
        (f"[programs/{name}](programs/{name})", title, str(_program(name).count("\n")))
        for name, (title, *_) in MODELS.items()
    )
    return _table(("file", "model", "lines"), rows)


# The keys of a recipe: docs/recipes.md.


def render_keys() -> str:
    """Return the keys of a recipe with their defaults, by section, as Markdown."""
    names = dict[type, list[str]]()
    for name, section in _sections(Recipe):
        names.setdefault(section, []).append(f"`[{name}]`")
    rows = ((", ".join(titles), "<br>".join(_keys(s))) for s, titles in names.items())
    return _table(("section", "keys and defaults"), rows)


def _sections(owner: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Yield the tables of a record and of those in it, with their names in TOML."""
    for name, hint in get_type_hints(owner).items():
        is_list = get_origin(hint) is tuple
        section = get_args(hint)[0] if is_list else hint
        if is_dataclass(section):
            title = f"{path}{name}"
            yield f"[{title}]" if is_list else title, section
            yield from _sections(section, f"{title}.")


def _keys(section: type) -> Iterator[str]:
    docs = Docstring.of(section).args
    for field in fields(section):
        if is_dataclass(field.default_factory):
            continue  # a table of its own
        default, others = field.default, ""
        if isinstance(default, Enum):
            choices = type(default)
            others = "".join(f", or `{json.dumps(c.value)}`" for c in choices if c is not default)
            default = default.value
        shown = {MISSING: "required", None: "unset"}.get(default) or f"`{json.dumps(default)}`"
        text = docs[field.name].replace("``", "`").rstrip(".")
        yield f"`{field.name}` ({shown}{others}): {_cell(text)}"


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "ir.md": {"operations": render_operations},
    "exactness.md": {"lemmas": render_lemmas},
    "sharding.md": {"legal": sharding_cases.render},
    "recipes.md": {"keys": render_keys},
    "emit.md": {"cells": emitted.render, "programs": render_programs},
    "any-torch-model.md": {"torch-models": torch_models.render},
}
"""By page the parts between markers."""

WHOLE: dict[Path, Callable[[], str]] = {
    DOCS / "cli.md": render_commands,
    DOCS / "passes.md": render_passes,
    ROOT / "moecc/ir/operations.pyi": render_stub,
    **{DOCS / "programs" / name: partial(_program, name) for name in MODELS},
}
"""The files that are wholly generated."""


def render_page(page: Path) -> str:
    """Return a page with its parts as they are now."""
    text = page.read_text("utf-8")
    for name, render in PARTS[page.name].items():
        begin, end = f"<!-- begin {name}: written by make docs -->\n", f"\n<!-- end {name} -->"
        before, _, after = text.partition(begin)
        _, marker, after = after.partition(end)
        assert marker, f"{page} needs {begin}…{end}"
        text = f"{before}{begin}{render()}{end}{after}"
    return text


FILES = WHOLE | {DOCS / name: partial(render_page, DOCS / name) for name in PARTS}

if __name__ == "__main__":
    for file in map(Path.resolve, map(Path, sys.argv[1:])) if sys.argv[1:] else FILES:
        file.write_text(FILES[file](), "utf-8")
