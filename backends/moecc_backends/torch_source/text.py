"""Text in Python: expressions, literals, folded lines, and the classes that equal blocks share.

A block is written once with markers in place of its numbers.  Blocks with the same text are
instances of one class; numbers in which they differ are arguments of its constructor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moecc.errors import InputError
from moecc_backends.torch_source.blocks import ModuleBlock

WIDTH = 100
ATOM, PRODUCT, SUM, COMPARISON = 3, 2, 1, 0
"""How tightly the outermost operator of an expression binds."""

MARKER = re.compile(r"\x01(\d+)\x02")


@dataclass(frozen=True)
class PythonExpr:
    """An expression.

    Attributes:
      text: its text.
      axes: the names of the axes of its value, in order; ``a+b`` stands for two as one.
      level: how tightly it binds.
    """

    text: str
    axes: tuple[str, ...] = ()
    level: int = ATOM

    def at(self, level: int) -> str:
        """Return its text as an operand of an operator of `level`."""
        return self.text if self.level >= level else f"({self.text})"

    @property
    def atom(self) -> str:
        """Its text, in parentheses if something may not follow it directly."""
        return self.at(ATOM)


@dataclass(eq=False)
class ClassDef:
    """A class of the emitted text.

    Attributes:
      name: its name.
      arguments: the arguments of its constructor besides ``config``.
      constructor: the lines of ``__init__``.
      signature: the parameters of ``forward``.
      forward: its lines.
      doc: its docstring.
      optional: the parameters that some calls leave out.
      experts: the number of all experts, of which a device may have a part.
    """

    name: str
    arguments: list[str]
    constructor: list[str]
    signature: list[str]
    forward: list[str]
    doc: str = ""
    base: str = "nn.Module"
    optional: frozenset[str] = frozenset()
    experts: str = ""

    def parameters(self) -> list[str]:
        """Return the parameters of ``forward``; None is the default of the optional last ones."""
        texts: list[str] = []
        is_optional = True
        for name in reversed(self.signature):
            is_optional = is_optional and (name in self.optional or name.startswith("**"))
            texts.append(f"{name}=None" if is_optional and name[0] != "*" else name)
        return texts[::-1]

    def lines(self) -> list[str]:
        """Return the text of the class."""
        arguments = ", ".join(["self", "config", *self.arguments])
        return [
            f"class {self.name}({self.base}):",
            *([f'    """{self.doc}"""', ""] if self.doc else []),
            f"    def __init__({arguments}):",
            "        super().__init__()",
            *(line for text in self.constructor for line in folded(f"        {text}")),
            "",
            *(LOCAL_EXPERTS.format(self.experts).splitlines() if self.experts else []),
            *folded(f"    def forward({', '.join(['self', *self.parameters()])}):"),
            *(line for text in self.forward for line in folded(f"        {text}")),
        ]


LOCAL_EXPERTS = '''    @property
    def num_experts(self):
        """The number of experts of this device."""
        distributed = getattr(self.config, "distributed_config", None)
        return {} // (getattr(distributed, "ep_size", None) or 1)

'''


class WrittenBlock(Protocol):
    """The text of a block, as its writer has it."""

    literals: list[tuple[str, object]]
    helpers: set[str]
    lines: list[str]
    constructor: list[str]
    signature: list[str]
    optional: set[str]
    experts: str

    def argument_names(self) -> set[str]:
        """Return the names that an argument of the constructor must not have."""

    def signature_lines(self) -> tuple[list[str], list[str]]:
        """Return the parameters and lines of forward."""


@dataclass
class Instance:
    """A block as an instance of a class, with the values of the constructor's arguments."""

    definition: ClassDef
    values: list[object]
    inputs: list[str]


MODEL_PREFIX = "StMoe"
"""With what the names of the models' classes begin."""


@dataclass
class Classes:
    """The classes of a text, and the instance that each block is.

    Attributes:
      reserved: names that the text defines or imports besides.
    """

    reserved: frozenset[str] = frozenset()
    definitions: list[ClassDef] = field(default_factory=list)
    instances: dict[ModuleBlock, Instance] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)

    def unique(self, title: str, stack: str) -> str:
        """Return a name that nothing has, with that of its stack if that makes it so."""
        names = self.reserved | {d.name for d in self.definitions}
        if title.startswith(MODEL_PREFIX):
            title = f"Layer{title}"
        if title in names and stack and f"{stack}{title}" not in names:
            return f"{stack}{title}"
        number, name = 2, title
        while name in names:
            name, number = f"{title}{number}", number + 1
        return name

    def add(
        self, blocks: Sequence[ModuleBlock], write: Callable[[ModuleBlock], WrittenBlock]
    ) -> None:
        """Write blocks of one depth, and make a class of each different text."""
        groups: dict[tuple[object, ...], list[tuple[ModuleBlock, WrittenBlock]]] = {}
        for block in blocks:
            writer = write(block)
            self.helpers |= writer.helpers
            key: tuple[object, ...] = (
                block.base,
                block.layer is not None,
                tuple(writer.constructor),
                *map(tuple, writer.signature_lines()),
            )
            groups.setdefault(key, []).append((block, writer))
        for group in groups.values():
            self._define(min((block.title for block, _ in group), key=len), group)

    def _define(self, title: str, group: list[tuple[ModuleBlock, WrittenBlock]]) -> None:
        _, first = group[0]
        arguments: dict[str, list[object]] = {}
        inits: dict[str, str] = {}
        forwards: dict[str, str] = {}
        for number, (hint, _) in enumerate(first.literals):
            values = [writer.literals[number][1] for _, writer in group]
            marker = f"\x01{number}\x02"
            is_number = hint == "layer_idx" and any(v is not None for v in values)
            if not is_number and all(repr(v) == repr(values[0]) for v in values):
                inits[marker] = forwards[marker] = literal(values[0])
                continue
            same = next((n for n, v in arguments.items() if v == values and n.startswith(hint)), "")
            name = same or unused(hint, {*arguments, *first.argument_names()})
            arguments[name] = values
            inits[marker], forwards[marker] = name, f"self.{name}"
        constructor = [with_texts(line, inits) for line in first.constructor]
        used = {
            n
            for m, n in forwards.items()
            if any(m in line for line in (*first.lines, first.experts))
        }
        stored = [f"self.{n} = {n}" for n in arguments if f"self.{n}" in used]
        definition = ClassDef(
            self.unique(title, group[0][0].stack),
            list(arguments),
            [*stored, *constructor],
            list(first.signature),
            [with_texts(line, forwards) for line in first.lines],
            base=group[0][0].base
            or ("GradientCheckpointingLayer" if group[0][0].layer else "nn.Module"),
            experts=with_texts(first.experts, forwards),
            optional=frozenset[str]().union(*(writer.optional for _, writer in group)),
        )
        self.definitions.append(definition)
        for at, (block, writer) in enumerate(group):
            values = [v[at] for v in arguments.values()]
            self.instances[block] = Instance(definition, values, writer.signature)


def join_layers(classes: Classes) -> None:
    """Make one class of layers that begin alike, with arguments for their kinds.

    These are the dense and the sparse layers of a stack, and the layers of an encoder and of a
    decoder that has all their statements.
    """
    stacks: dict[str, dict[ClassDef, ModuleBlock]] = {}
    for block, instance in classes.instances.items():
        if block.layer is not None:
            stacks.setdefault(block.layer[0], {}).setdefault(instance.definition, block)
    for kinds in stacks.values():
        by_kind = {"Sparse" in block.title: definition for definition, block in kinds.items()}
        if len(kinds) != 2 or len(by_kind) != 2:
            continue
        _replace(
            classes, by_kind[False], by_kind[True], _with_experts(by_kind[False], by_kind[True])
        )
    layers = {i.definition: b for b, i in classes.instances.items() if b.layer is not None}
    by_stack = {block.stack: definition for definition, block in layers.items()}
    if len(layers) == 2 and by_stack.keys() == {"Encoder", "Decoder"}:
        first, second = by_stack["Encoder"], by_stack["Decoder"]
        _replace(classes, first, second, _with_decoder(first, second))


def _replace(classes: Classes, first: ClassDef, second: ClassDef, joined: ClassDef | None) -> None:
    if joined is None:
        return
    classes.definitions[classes.definitions.index(second)] = joined
    classes.definitions.remove(first)
    for instance in classes.instances.values():
        if instance.definition in (first, second):
            values = [*instance.values, instance.definition is second]
            instance.definition, instance.values = joined, values


KIND, STACK = "is_sparse", "is_decoder"


def _with_decoder(encoder: ClassDef, decoder: ClassDef) -> ClassDef | None:
    """Return the class of the layers of both stacks; None if a decoder lacks a statement."""
    names = [n for n in encoder.signature if n[0] != "*"]
    if decoder.signature[: len(names)] != names or decoder.arguments != encoder.arguments:
        return None
    pairs = zip(encoder.forward, decoder.forward, strict=False)
    start = next((n for n, (a, b) in enumerate(pairs) if a != b), len(encoder.forward))
    stop = start + len(decoder.forward) - len(encoder.forward)
    if encoder.forward[start:] != decoder.forward[stop:]:
        return None
    inserted = [f"    {line}" for line in decoder.forward[start:stop]]
    forward = [*decoder.forward[:start], f"if self.{STACK}:", *inserted, *decoder.forward[stop:]]
    constructor = [f"self.{STACK} = {STACK}"]
    remaining = list(encoder.constructor)
    for line in decoder.constructor:
        target = line.partition(" = ")[0]
        before = next((x for x in remaining if x.partition(" = ")[0] == target), None)
        text = line if line == before else _with_part(before or "", line)
        if text is None or before is None:
            return None
        remaining.remove(before)
        constructor.append(text)
    if remaining:
        return None
    optional = encoder.optional | set(decoder.signature[len(names) :])
    return ClassDef(
        decoder.name.removeprefix("Decoder"), [*decoder.arguments, STACK], constructor,
        decoder.signature, forward, base=decoder.base, optional=optional,
    )  # fmt: skip


def _with_part(encoder: str, decoder: str) -> str | None:
    """Return a list whose middle only decoders have."""
    start, end = decoder.find("(["), decoder.rfind("])")
    if start < 0 or encoder[: start + 2] != decoder[: start + 2]:
        return None
    parts = split_outside(decoder[start + 2 : end])
    short = split_outside(encoder[start + 2 : encoder.rfind("])")])
    extra = len(parts) - len(short)
    for at in range(len(short)):
        if extra > 0 and parts[:at] + parts[at + extra :] == short:
            middle = f"*([{', '.join(parts[at : at + extra])}] if {STACK} else [])"
            texts = ", ".join([*parts[:at], middle, *parts[at + extra :]])
            return f"{decoder[: start + 2]}{texts}{decoder[end:]}"
    return None


def _with_experts(dense: ClassDef, sparse: ClassDef) -> ClassDef | None:
    """Return the class of both kinds of layers; None if they have too little in common."""
    pairs = zip(dense.forward, sparse.forward, strict=False)
    count = next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
    if not count or dense.arguments != sparse.arguments or dense.signature != sparse.signature:
        return None
    targets = {line.partition(" = ")[0]: line for line in dense.constructor}
    common, only_sparse = [f"self.{KIND} = {KIND}"], []
    for line in sparse.constructor:
        target = line.partition(" = ")[0]
        if target not in targets:
            only_sparse.append(f"    {line}")
            continue
        dense_line = targets.pop(target)
        text = line if line == dense_line else _with_both_names(dense_line, line)
        if text is None:
            return None
        common.append(text)
    if targets:
        return None
    forward = [
        *dense.forward[:count],
        f"if not self.{KIND}:",
        *(f"    {line}" for line in dense.forward[count:]),
        *sparse.forward[count:],
    ]
    constructor = [*common, *([f"if {KIND}:", *only_sparse] if only_sparse else [])]
    name = sparse.name.replace("Sparse", "", 1)
    arguments = [*sparse.arguments, KIND]
    return ClassDef(
        name, arguments, constructor, sparse.signature, forward, base=sparse.base,
        optional=dense.optional | sparse.optional,
    )  # fmt: skip


def _with_both_names(dense: str, sparse: str) -> str | None:
    """Return a line that calls the class of either kind, if the lines differ in a name alone."""
    parts = [re.split(r"(\w+)", line) for line in (dense, sparse)]
    if len(parts[0]) != len(parts[1]):
        return None
    differing = [n for n, (a, b) in enumerate(zip(*parts, strict=True)) if a != b]
    if len(differing) != 1 or not parts[1][differing[0] + 1].startswith("("):
        return None
    (at,) = differing
    choice = f"({parts[1][at]} if {KIND} else {parts[0][at]})"
    return "".join([*parts[1][:at], choice, *parts[1][at + 1 :]])


def shown(axes: Sequence[str]) -> list[str]:
    """Return axes as a comment has them, those of heads as one."""
    return ["head" if "+" in axis or axis == "kv_head" else axis for axis in axes]


def unify_signatures(classes: Classes, layers: Sequence[ModuleBlock]) -> None:
    """Let all layers of a stack take the same arguments, which some of them do not read."""
    instances = [classes.instances[layer] for layer in layers]
    count = max(len(layer.outputs) for layer in layers)
    for layer, instance in zip(layers, instances, strict=True):
        lines = instance.definition.forward
        missing = count - len(layer.outputs) - lines[-1].count(", None")
        lines[-1] += ", None" * missing  # a dense layer has no losses
    longest = max(instances, key=lambda i: len(i.inputs)).inputs
    names = list(dict.fromkeys([*longest, *(n for i in instances for n in i.inputs)]))
    names.sort(key=lambda name: name.startswith("**"))
    for instance in instances:
        instance.definition.signature = names


def unused(hint: str, names: Container[str]) -> str:
    """Return `hint`, with a number if it is among the names."""
    number, name = 2, hint
    while name in names:
        name, number = f"{hint}_{number}", number + 1
    return name


def literal(value: object) -> str:
    """Return a number, a text or a tuple of them as Python has it."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return f'float("{value}")'
    if isinstance(value, tuple):
        inner = ", ".join(map(literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str) and value.isprintable() and not set(value) & set('"\\'):
        return f'"{value}"'
    if isinstance(value, str | int | float | bool) or value is None:
        return repr(value)
    raise InputError(f"{value!r} is not a number or a text")


def with_texts(line: str, texts: dict[str, str]) -> str:
    """Return a line with texts in place of its markers."""
    return MARKER.sub(lambda match: texts[match[0]], line)


def folded(line: str) -> list[str]:
    """Return a line in several if it is too long, broken within its outermost brackets."""
    code, comment = line, ""
    if "  # " in line:
        code, _, comment = line.rpartition("  # ")
    if len(line) <= WIDTH:
        return [line]
    indent = " " * (len(code) - len(code.lstrip()))
    # Tokens of the hidden size are what most values are: that needs no line of its own.
    is_told = bool(comment) and not comment.endswith("embed]")
    if is_told and len(code) > WIDTH - 20:
        return [f"{indent}# {comment}", *folded(code)]
    if len(code) <= WIDTH:
        return [f"{indent}# {comment}", code] if is_told else [code]
    spans = _brackets(code)
    if not spans:
        return [code]
    start, end = max(spans, key=lambda s: (s[1] - s[0], -s[0]))
    parts = split_outside(code[start + 1 : end])
    if len(parts) == 1 and (inner := _only_bracket(parts[0])) is not None:
        start, end = start + 1 + inner, end - 1  # ``f([`` and ``])`` in a line each
        parts = split_outside(code[start + 1 : end])
    head, tail = code[: start + 1], code[end:]
    body = [f"{indent}    {part}," for part in parts]
    is_group = code[start] == "(" and not code[:start].rstrip().endswith(_CALLS)
    if len(parts) == 1 and (is_group or code[start] == "["):
        head_part, loop = _comprehension(parts[0])
        body = [f"{indent}    {head_part}", *([f"{indent}    {loop}"] if loop else [])]
    joined = f"{indent}    {', '.join(parts)}"
    if len(joined) <= WIDTH:
        body = [joined]
    return [head, *(x for line in body for x in folded(line)), *folded(f"{indent}{tail}")]


def _only_bracket(part: str) -> int | None:
    """Return where the bracket begins that a call or list is but for its name, if it is one."""
    spans = _brackets(part)
    if len(spans) != 1 or spans[0][1] != len(part) - 1:
        return None
    head = part[: spans[0][0]]
    return spans[0][0] if re.fullmatch(r"(\w+=)?[\w.]*", head) else None


def _comprehension(text: str) -> tuple[str, str]:
    """Return a comprehension as its expression and its loop; other texts have no loop."""
    spans = _brackets(text)
    outside = [m.start() for m in re.finditer(r" for ", text)]
    at = next((n for n in outside if not any(a < n < b for a, b in spans)), len(text))
    return text[:at], text[at + 1 :]


_CALLS = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789")


def _brackets(code: str) -> list[tuple[int, int]]:
    """Return the outermost pairs of brackets."""
    spans, depth, start, quote = [], 0, 0, ""
    for i, c in enumerate(code):
        if quote:
            quote = "" if c == quote and code[i - 1] != "\\" else quote
        elif c in "\"'":
            quote = c
        elif c in "([{":
            if depth == 0:
                start = i
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                spans.append((start, i))
    return [s for s in spans if s[1] - s[0] > 1]


def split_outside(text: str) -> list[str]:
    """Return the parts between the outermost commas; a comprehension is one part."""
    parts, depth, last, quote = [], 0, 0, ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "\"'":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(" for ", i):
            return [text]
        elif c == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    parts.append(text[last:].strip())
    return [p for p in parts if p]


def repeated(values: Sequence[object]) -> str:
    """Return a list of values; one that repeats itself as a product."""
    return repeated_texts(list(map(literal, values)))


def repeated_texts(texts: Sequence[str]) -> str:
    """Return a list of expressions; one that repeats itself as a product."""
    count, head = len(texts), list(texts)
    for period in range(1, count // 2 + 1):
        times, remaining = divmod(count, period)
        if head[:period] * times + head[:remaining] == head:
            tail = f" + [{', '.join(head[:remaining])}]" if remaining else ""
            return f"[{', '.join(head[:period])}] * {times}{tail}"
    return f"[{', '.join(head)}]"
