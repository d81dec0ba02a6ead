"""The text of a block: its statements, and the modules that its constructor makes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moecc.errors import InputError
from moecc_backends.torch_source.blocks import ModuleBlock
from moecc_backends.torch_source.names import identifier, is_under, variable
from moecc_backends.torch_source.program import KWARGS, Item, ProgramValue, initial_kind
from moecc_backends.torch_source.text import (
    MARKER,
    Classes,
    PythonExpr,
    literal,
    repeated,
    repeated_texts,
    shown,
    unused,
    with_texts,
)

WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")

STATE = "hidden_states"

LONGEST_NAME = 28
"""The most characters of the name of a value; a graph may have any."""


@dataclass(eq=False)
class BlockWriter:
    """Writes the items of a block.

    Attributes:
      block: the block.
      classes: of the blocks within.
      operations: the function that writes each operation.
      hints: names of the results of modules within.
      vocabulary: the table of tokens, whose number is ``config.vocab_size``.
      longest_operands: the most characters of all operands of an operation.
      longest_call: the most characters of the call of a module within.
      longest_value: the most characters of an expression that stands where its value is read.
      rows_class: the helper that sorts choices by expert.
    """

    block: ModuleBlock
    classes: Classes
    operations: dict[str, Callable[..., PythonExpr | None]]
    literals: list[tuple[str, object]] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)
    constructor: list[str] = field(default_factory=list)
    signature: list[str] = field(default_factory=list)
    values: dict[ProgramValue, PythonExpr] = field(default_factory=dict)
    remaining: Counter[ProgramValue] = field(default_factory=Counter)
    names: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    hints: dict[ProgramValue, str] = field(default_factory=dict)
    experts: str = ""
    vocabulary: ProgramValue | None = None
    tree: ModuleTree = field(init=False)
    longest_operands: ClassVar[int] = 66
    longest_call: ClassVar[int] = 76
    longest_value: ClassVar[int] = 64
    rows_class: ClassVar[str] = "ExpertRows"

    def __post_init__(self) -> None:
        self.tree = ModuleTree(self)
        for step in self.block.steps:
            operands = step.inputs if isinstance(step, ModuleBlock) else step.operands
            self.remaining.update(operands)
        self.remaining.update(self.block.outputs)

    # What operations use.

    def literal(self, value: object, hint: str) -> str:
        """Return a marker for a number, which may be an argument of the class."""
        literal(value)
        self.literals.append((variable(hint), value))
        return f"\x01{len(self.literals) - 1}\x02"

    def argument_names(self) -> set[str]:
        """Return the names that an argument of the constructor must not have."""
        return set()

    def filled(self, line: str) -> str:
        """Return a line with its numbers."""
        return with_texts(
            line, {f"\x01{i}\x02": literal(v) for i, (_, v) in enumerate(self.literals)}
        )

    def filled_lines(self, lines: Iterable[str]) -> list[str]:
        """Return lines with their numbers."""
        return [self.filled(line) for line in lines]

    def helper(self, name: str) -> str:
        """Return the name of a helper, whose text is then part of the file."""
        self.helpers.add(name)
        return name

    def expr(self, var: ProgramValue) -> PythonExpr:
        """Return the expression of a value."""
        if var.param:
            return PythonExpr(self.tree.access(var.name), var.axes)
        return self.values[var]

    def aligned(self, expr: PythonExpr, axes: Sequence[str]) -> PythonExpr:
        """Return `expr` so that it broadcasts against a value with `axes`."""
        names = [a for a in axes if a in expr.axes]
        if len(names) != len(expr.axes):
            expr = self.expanded(expr)
            axes = [name for axis in axes for name in axis.split("+")]
            names = [a for a in axes if a in expr.axes]
        if len(names) != len(expr.axes):
            raise InputError("axes do not align", expected=", ".join(axes), found=expr.text)
        expr = self.permuted(expr, names)
        if not names:
            return expr
        index = [":" if a in names else "None" for a in axes[list(axes).index(names[0]) :]]
        while index and index[-1] == ":":
            index.pop()
        if not index:
            return expr
        return PythonExpr(f"{expr.atom}[{', '.join(index)}]", tuple(axes))

    def permuted(self, expr: PythonExpr, names: Sequence[str]) -> PythonExpr:
        """Return `expr` with its axes in another order."""
        if list(expr.axes) == list(names):
            return expr
        if set(expr.axes) != set(names):
            expr = self.expanded(expr)
        if list(expr.axes) == list(names):
            return expr
        order = [expr.axes.index(a) for a in names]
        moved = [i for i, at in enumerate(order) if i != at]
        if len(moved) == 2:
            first, second = moved
            return PythonExpr(f"{expr.atom}.transpose({first}, {second})", tuple(names))
        return PythonExpr(f"{expr.atom}.permute({', '.join(map(str, order))})", tuple(names))

    def expanded(self, expr: PythonExpr) -> PythonExpr:
        """Return `expr` with each of its axes alone."""
        for at, axis in enumerate(expr.axes):
            if "+" in axis:
                names = axis.split("+")
                sizes = [self.sizes[name] for name in names]
                text = ", ".join(self.literal(s, n) for s, n in zip(sizes, names, strict=True))
                axes = (*expr.axes[:at], *names, *expr.axes[at + 1 :])
                return self.expanded(PythonExpr(f"{expr.atom}.unflatten({at}, ({text}))", axes))
        return expr

    def with_axes(self, value: ProgramValue, *axes: str) -> PythonExpr:
        """Return the expression of a value, in which each of `axes` is alone."""
        expr = self.expr(value)
        return expr if set(axes) <= set(expr.axes) else self.expanded(expr)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all axes that have one."""
        return {
            axis: size
            for item in self.block.items
            for var in (*item.results, *item.operands)
            for axis, size in zip(var.axes, var.sizes, strict=True)
            if size is not None
        }

    def canonical(self, var: ProgramValue) -> str:
        """Return a value with its axes in the order that others expect."""
        expr = self.expr(var)
        if not var.axes or var.kind in ("cache", "mask", KWARGS):
            return expr.text
        return self.permuted(expr, var.axes).text

    def state(self, text: str) -> None:
        """Write a statement."""
        self.lines.append(text)

    def name(self, hint: str) -> str:
        """Return a name for a value: `hint`, if no value that is still needed has it."""
        hint = variable(hint[:LONGEST_NAME])
        hint = f"{hint}_value" if hint in self.classes.reserved else hint
        alive = set()
        for var, expr in self.values.items():
            if self.remaining[var] > 0:
                alive |= set(WORD.findall(expr.text))
        name = unused(hint, alive)
        self.names.add(name)
        return name

    def assign(self, var: ProgramValue, expr: PythonExpr, hint: str = "") -> PythonExpr:
        """Write a statement that gives a value a name."""
        name = self.name(hint or self.hints.get(var) or var_hint(var))
        axes = expr.axes or ()
        comment = f"  # [{', '.join(shown(axes))}]" if self.says_axes(var, axes) else ""
        self.state(f"{name} = {expr.text}{comment}")
        self.values[var] = PythonExpr(name, expr.axes)
        return self.values[var]

    def says_axes(self, var: ProgramValue, axes: Sequence[str]) -> bool:
        """Whether the axes of a value are worth a comment: no operand has the same."""
        operands = var.item.operands if var.item is not None else []
        is_index = var.item is not None and var.item.op.endswith("_buckets")
        return (
            len(axes) > 1 and not is_index and all(set(v.axes) != set(var.axes) for v in operands)
        )

    def settle(self, values: Iterable[ProgramValue], longest: int) -> None:
        """Give names to long expressions of `values`, until all have at most so many characters."""
        while True:
            texts = {
                v: len(MARKER.sub("00", e.text))
                for v in values
                if (e := self.values.get(v)) is not None and not is_losses(e.text)
            }
            # A name, however long, is no expression.
            candidates = [v for v in texts if not self.values[v].text.isidentifier()]
            var = max(candidates, key=lambda v: texts[v], default=None)
            if var is None or sum(texts.values()) <= longest or texts[var] < 24:
                return
            self.assign(var, self.values[var])

    # The block as a whole.

    def write(self) -> BlockWriter:
        """Write constructor and forward."""
        self.take_inputs()
        self.write_steps(self.block.steps)
        self.finish()
        return self

    def take_inputs(self) -> None:
        """Name what is read from outside; the first of the hidden size is the state."""
        for var in self.block.inputs:
            if var.kind == KWARGS:
                self.values[var] = PythonExpr(f"**{KWARGS}")
                self.signature.append(f"**{KWARGS}")
                continue
            is_layer = self.block.layer is not None
            hint = "mask" if var.kind == "mask" and not is_layer else var_hint(var)
            if {"embed", "kv_seq"} <= set(var.axes):
                hint = "memory" if is_layer else "key_value_states"
            if var.kind == "module":
                self.remaining[var] += 1  # parameters are read of it to the end
            if "embed" in var.axes and not any(e.text == STATE for e in self.values.values()):
                hint = STATE
            name = self.name(hint)
            self.values[var] = PythonExpr(name, var.axes)
            self.signature.append(name)
            if var.kind == "none":
                self.optional.add(name)

    def write_steps(self, steps: Sequence[Item | ModuleBlock]) -> None:
        """Write items and calls of the blocks within, in order."""
        for step in steps:
            if isinstance(step, ModuleBlock):
                self.call(step)
            else:
                self.run(step)

    def run(self, item: Item) -> None:
        """Write one item."""
        function = self.operations.get(item.op)
        if function is None:
            raise InputError(
                f"{item.op} cannot be written as a program",
                where=item.loc,
                hint="no text is written for it; moecc run and lower take what has a lowering",
            )
        if item.op not in LISTED:
            self.settle(item.operands, self.longest_operands)
        expr = function(self, item, **item.attrs)
        self.remaining.subtract(item.operands)
        if expr is None:
            return
        var = item.result
        if self.keeps(var, expr) or expr.text.isidentifier():
            self.values[var] = expr
        else:
            self.assign(var, expr)

    def keeps(self, var: ProgramValue, expr: PythonExpr) -> bool:
        """Whether an expression is short enough to stand where its value is read."""
        simple = re.fullmatch(r"[\w.\x01\x02\-]+", expr.text) is not None
        if simple and var not in self.block.outputs:
            return True
        # Queries, keys and values have a line each, where they are brought into order.
        is_attended = any(user.op in ATTENTION for user in var.users)
        is_stack = var.item is not None and var.item.op == "stack"
        longest = self.longest_value + (20 if is_stack else 4 if is_attended else 0)
        return (
            self.remaining[var] == 1
            and var not in self.block.outputs
            and (len(MARKER.sub("00", expr.text)) <= longest)
        )

    def call(self, block: ModuleBlock) -> None:
        """Write the call of a module within."""
        target = self.tree.access(block.path) if block.path else block.attribute
        commas = 2 * len(block.inputs)
        self.settle(block.inputs, self.longest_call - len(target) - commas)
        arguments = [self.canonical(v) for v in block.inputs]
        while arguments and arguments[-1] == "None":
            arguments.pop()
        text = self.call_text(block, arguments)
        self.remaining.subtract(block.inputs)
        expr = PythonExpr(text, block.outputs[0].axes if block.outputs else ())
        self.hints.update({var: result_hint(block, var) for var in block.outputs})
        if len(block.outputs) == 1:
            (var,) = block.outputs
            if self.keeps(var, expr):
                self.values[var] = expr
            else:
                self.assign(var, expr)
            return
        names = []
        for var in block.outputs:
            name = self.name(self.hints[var])
            self.values[var] = PythonExpr(name, var.axes)
            names.append(name)
        self.state(f"{', '.join(names)} = {expr.text}")

    def call_text(self, block: ModuleBlock, arguments: list[str]) -> str:
        """Return the call of a module within."""
        target = self.tree.access(block.path) if block.path else f"self.{block.attribute}"
        return f"{target}({', '.join(arguments)})"

    def finish(self) -> None:
        """Write what is returned, and the constructor."""
        results = [self.canonical(v) for v in self.block.outputs]
        returned = ", ".join(results)
        if self.lines and self.lines[-1].startswith(f"{returned} = "):
            self.lines[-1] = f"return {self.lines[-1].removeprefix(f'{returned} = ')}"
        else:
            self.state(f"return {returned}")
        self.constructor.extend(self.tree.lines())

    def signature_lines(self) -> tuple[list[str], list[str]]:
        """Return the parameters and lines of forward."""
        return self.signature, self.lines


ATTENTION = ("attention", "cached_attention")
LISTED = (*ATTENTION, "stack")
"""The operations whose operands have lines of their own, or are in lists."""

NAMES = {
    "gates": "top_k_weights",
    "experts": "top_k_index",
    "router": "router_logits",
    "rows": "inputs",
    "mixed": "attended",
    "jitter": "noisy",
}
"""Names of values in a graph, and what they are called in PyTorch."""

HINTS = {
    **dict.fromkeys(("silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"), "activated"),
    "sum": "total",
    "mean": "average",
    "group_sum": "sums",
    "div": "share",
    "add": "summed",
    "scale": "scaled",
    "contract": "projected",
    "convolve": "convolved",
    "relative_buckets": "buckets",
    "signed_buckets": "buckets",
    "alibi": "bias",
    "delta_rule": "read",
    "rotate": "rotated",
    "merge": "merged",
    "mul": "product",
    "max": "largest",
    "split": "parts",
    "dispatch": "inputs",
    "linear": "projected",
    "attention": "attended",
    "embedding_module": "embeddings",
    "rms_norm_module": "normed",
    "layer_norm_module": "normed",
    "rms_norm": "normed",
    "layer_norm": "normed",
    "softmax": "probabilities",
    "combine": STATE,
    "linear_rows": "rows",
}


def is_losses(text: str) -> bool:
    """Whether a text is of the losses of those layers that have one."""
    return text.startswith("filter(torch.is_tensor, ")


def var_hint(var: ProgramValue) -> str:
    """Return a name for a value: its own without a number, or one by what computes it."""
    name = var.name.rpartition(".")[2] if var.param else var.name
    base = name.rstrip("0123456789").rstrip("_.")
    if base == "norm":
        return "normed"
    if base == "hidden":
        return STATE
    if base in NAMES:
        return NAMES[base]
    if base not in ("", "v"):
        return identifier(base)
    item = var.item
    if item is None:
        return "value"
    if item.op in ("rename", "split", "slice", "cast", "stop_gradient"):
        return var_hint(item.operands[0])
    module = item.attrs.get("module")
    if isinstance(module, str) and "_norm" not in item.op:
        return identifier(module.rpartition(".")[2])
    if item.op == "add" and "embed" in var.axes:
        return STATE
    return HINTS.get(item.op, item.op)


RESULTS = {
    "FeedForward": "ffn_output",
    "ExtraFeedForward": "ffn_output",
    "Experts": "expert_output",
    "SharedExpert": "shared_output",
}
"""What the result of a module is called where it is called, by the name of its class."""


def result_hint(block: ModuleBlock, var: ProgramValue) -> str:
    """Return a name for a result of a module within."""
    if "embed" not in var.axes:
        return var_hint(var)
    if block.layer is not None:
        return STATE
    is_attention = block.title.endswith("Attention")
    return "attention_output" if is_attention else RESULTS.get(block.title, var_hint(var))


# The modules of a block, as its constructor makes them.


@dataclass(eq=False)
class ModuleTree:
    """The parameters and modules of a block by their paths."""

    writer: BlockWriter
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def block(self) -> ModuleBlock:
        """The block."""
        return self.writer.block

    def access(self, path: str) -> str:
        """Return the expression of a parameter or module of this block."""
        text, at = "self", self.block.path
        if not is_under(path, at):
            shared, module = self.block.shared, self.block.shared_path
            if shared is None or not is_under(path, module):
                raise InputError(
                    "a module reads a parameter that is not named within it", where=at,
                    expected=f"a name that begins with it, as {at}.{path}", found=path,
                    hint="rename the parameter in the graph; the tensor keeps its name in source()",
                )  # fmt: skip
            text, at = self.writer.values[shared].text, module
        for part in path[len(at) + 1 if at else 0 :].split("."):
            if not part.isdigit():
                text += f".{part}"
            else:
                text += f"[{self.index(at, int(part))}]" if self.is_list(at) else f'["{part}"]'
            at = f"{at}.{part}" if at else part
        return text

    def index(self, path: str, number: int) -> int:
        """Return the index of a module in a list; the last block of a layer is that for all."""
        is_last = self.block.layer is not None and f"{number + 1}" not in self.numbers(path)
        return -1 if is_last and number else number

    def numbers(self, path: str) -> set[str]:
        """Return the names directly under a path."""
        start = len(path) + 1
        names = [v.name for v in self.block.params if is_under(v.name, path)]
        return {name[start:].partition(".")[0] for name in names}

    def is_list(self, path: str) -> bool:
        """Whether the modules under a path are numbered from 0 on."""
        numbers = self.numbers(path)
        return numbers == {str(i) for i in range(len(numbers))}

    def lines(self) -> list[str]:
        """Return the statements that make the modules."""
        tree: dict[str, object] = {}
        shared: dict[str, ModuleBlock] = {}  # modules within what layers share
        for layer in self.block.blocks:
            if layer.shared is not None:
                shared |= {b.path: b for b in layer.blocks if not is_under(b.path, layer.path)}
        inner = {
            v.name for block in self.block.blocks for v in block.params
            if block.shared is None or is_under(v.name, block.path)
        }  # fmt: skip
        inner |= {v.name for block in shared.values() for v in block.params}
        lines: list[str] = []
        stacks: dict[str, list[ModuleBlock]] = {}
        for block in self.block.blocks:
            if block.layer is not None:
                stack = stacks.setdefault(block.path.rpartition(".")[0], [])
                # Layers that share their parameters are one.
                stack += [block] if all(block.path != b.path for b in stack) else []
            elif block.path:
                shared[block.path] = block
            else:
                lines.append(f"self.{block.attribute} = {self.construct(block)}")
        for path, layers in stacks.items():
            self._put(tree, path, stack_lines(self.writer.classes, layers))
        for path, block in shared.items():
            if is_under(path, self.block.path):
                self._put(tree, path, self.construct(block))
        params = [v for v in self.block.params if is_under(v.name, self.block.path)]
        direct = [v for v in params if v.name not in inner]
        late: list[str] = []
        for module in dict.fromkeys(v.name.rpartition(".")[0] for v in direct):
            members = [v for v in direct if v.name.rpartition(".")[0] == module]
            text = self.leaf(module, direct) if module not in ("", self.block.path) else ""
            parts = {module: text} if text else {v.name: self.parameter(v) for v in members}
            for path, part in parts.items():
                # A layer may hold what is read outside of it, as T5's first one does.
                if any(b.path and is_under(path, b.path) for b in self.block.blocks):
                    late.append(f"{self.access(path)} = {part}")
                else:
                    self._put(tree, path, part)
        start = len(self.block.path) + 1 if self.block.path else 0
        order = [v.name[start:].partition(".")[0] for v in params]
        names = sorted(tree, key=order.index)
        lines += [f"self.{name} = {self._text(tree[name])}" for name in names]
        return [*lines, *late]

    def construct(self, block: ModuleBlock) -> str:
        """Return the call that makes the module of a block within."""
        instance = self.writer.classes.instances[block]
        names = instance.definition.arguments
        values = [self.writer.literal(v, n) for n, v in zip(names, instance.values, strict=True)]
        return f"{instance.definition.name}({', '.join(['config', *values])})"

    def parameter(self, var: ProgramValue) -> str:
        """Return the text of a parameter."""
        sizes = [self.writer.literal(var.size(a), a) for a in var.axes]
        shape, kind = ", ".join(sizes) if sizes else "()", initial_kind(var)
        if kind == "normal":
            return f"{self.writer.helper('drawn')}({shape})"
        return f"nn.Parameter(torch.{kind}({shape}))"

    def leaf(self, module: str, params: list[ProgramValue]) -> str:
        """Return the text of a module of torch, if all uses of its parameters are its."""
        items = [i for v in params if v.name.rpartition(".")[0] == module for i in v.users]
        calls = [i for i in items if i.attrs.get("module") == module]
        kinds = {i.op for i in calls}
        at = self.writer.literal
        if "embedding_module" in kinds:
            table = next(i for i in calls if i.op == "embedding_module").operands[0]
            count, width = (at(table.size(a), a) for a in table.axes)
            if table is self.writer.vocabulary:
                count = "config.vocab_size"
            return f"nn.Embedding({count}, {width})"
        if kinds == {"linear"}:
            w = calls[0].operands[1]
            biased = {bool(i.attrs["bias"]) for i in calls}
            if len(biased) == 1:
                width, size = at(w.size(w.axes[1]), w.axes[1]), at(w.size(w.axes[0]), w.axes[0])
                size = "config.vocab_size" if self.has_rows_of_tokens(w) else size
                bias = "" if biased == {True} else ", bias=False"
                return f"nn.Linear({width}, {size}{bias})"
        if len(kinds) == 1 and kinds & {"rms_norm_module", "layer_norm_module"}:
            call = calls[0]
            if len({repr(i.attrs["eps"]) for i in calls}) == 1:
                name = "RMSNorm" if call.op == "rms_norm_module" else "LayerNorm"
                w = call.operands[1]
                size, eps = at(w.size(w.axes[0]), w.axes[0]), at(call.attrs["eps"], "eps")
                return f"nn.{name}({size}, eps={eps})"
        return ""

    def has_rows_of_tokens(self, matrix: ProgramValue) -> bool:
        """Whether the rows of a matrix are the tokens, whose number transformers may change."""
        table = self.writer.vocabulary
        rows = matrix.axes[0]
        return table is not None and table.axes[0] == rows and table.size(rows) == matrix.size(rows)

    def is_module(self, item: Item) -> bool:
        """Whether an item is the call of a module, and not the function on its parameters."""
        module = item.attrs.get("module")
        var = item.operands[0] if item.op == "embedding_module" else item.operands[1]
        users = [i for i in var.users if i.attrs.get("module") == module]
        kinds = {i.op for i in users}
        if "embedding_module" in kinds:
            return item.op == "embedding_module"
        if item.op == "linear":
            return len({bool(i.attrs["bias"]) for i in users}) == 1 and kinds == {"linear"}
        return len(kinds) == 1 and len({repr(i.attrs["eps"]) for i in users}) == 1

    def _put(self, tree: dict[str, object], path: str, text: str) -> None:
        relative = path[len(self.block.path) + 1 :] if self.block.path else path
        *parts, last = relative.split(".")
        for part in parts:
            node = tree.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(f"{path} lies within another module")
            tree = node
        tree[last] = text

    def _text(self, node: object) -> str:
        if not isinstance(node, dict):
            return str(node)
        texts = {name: self._text(inner) for name, inner in node.items()}
        if all(name.isdigit() for name in texts):
            if sorted(map(int, texts)) == list(range(len(texts))):
                inner = ", ".join(texts[str(i)] for i in range(len(texts)))
                return f"nn.ModuleList([{inner}])"
            pairs = ", ".join(f'"{name}": {text}' for name, text in texts.items())
            return f"nn.ModuleDict({{{pairs}}})"
        self.writer.helper("Scope")
        return f"Scope({', '.join(f'{name}={text}' for name, text in texts.items())})"


def stack_lines(classes: Classes, layers: list[ModuleBlock]) -> str:
    """Return the text of a list of layers."""
    instances = [classes.instances[layer] for layer in layers]
    definitions = list(dict.fromkeys(i.definition for i in instances))
    count = len(layers)
    if len(definitions) == 1:
        (definition,) = definitions
        columns = [
            (n, [i.values[at] for i in instances]) for at, n in enumerate(definition.arguments)
        ]
        # False and True equal 0 and 1, but are no numbers of layers.
        index = [n for n, values in columns if repr(values) == repr([*range(count)])]
        same = {n: v[0] for n, v in columns if n not in index and len(set(map(repr, v))) == 1}
        varying = [(n, v) for n, v in columns if n not in index and n not in same]
        words = {n: f"{n}=" if isinstance(v, bool) else "" for n, v in same.items()}
        texts = (f"{words[n]}{literal(same[n])}" if n in same else n for n in definition.arguments)
        arguments = ", ".join(["config", *texts])
        if not varying:
            call = f"{definition.name}({arguments})"
            return f"nn.ModuleList([{call} for {index[0] if index else '_'} in range({count})])"
        lists = [repeated(v) for _, v in varying]
        loop = ", ".join(n for n, _ in varying)
        source = lists[0] if len(lists) == 1 else f"zip({', '.join(lists)})"
        if index:
            loop = f"{index[0]}, {loop}" if len(varying) == 1 else f"{index[0]}, ({loop})"
            source = f"enumerate({source})"
        return f"nn.ModuleList([{definition.name}({arguments}) for {loop} in {source}])"
    rows = [i.values for i in instances]
    is_index = rows == [[at] for at in range(count)]
    if is_index or not any(rows):
        names = repeated_texts([i.definition.name for i in instances])
        source = f"layer_idx, layer in enumerate({names})" if is_index else f"layer in {names}"
        return f"nn.ModuleList([layer(config{', layer_idx' * is_index}) for {source}])"
    calls = [
        f"{i.definition.name}({', '.join(['config', *map(literal, i.values)])})" for i in instances
    ]
    return f"nn.ModuleList([{', '.join(calls)}])"
