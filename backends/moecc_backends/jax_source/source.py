"""A graph as functions of a dictionary of parameters: the classes of PyTorch without objects."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

from moecc.backend import PROGRAM_FILES, EmittedProgram
from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc_backends.torch_source import source as torch_source
from moecc_backends.torch_source.blocks import ModuleBlock
from moecc_backends.torch_source.layers import ModelWriter
from moecc_backends.torch_source.names import identifier, is_under, variable
from moecc_backends.torch_source.operations import OPERATIONS
from moecc_backends.torch_source.program import Item, TorchProgram, initial_kind, loss_name
from moecc_backends.torch_source.source import (
    Segments,
    definitions,
    helper_texts,
    imports,
    without_idle_methods,
)
from moecc_backends.torch_source.text import (
    ClassDef,
    Classes,
    PythonExpr,
    folded,
    literal,
    repeated_texts,
)
from moecc_backends.torch_source.writer import ModuleTree

FILE_NAME = PROGRAM_FILES["jax"]

PREAMBLE = '''"""A model that moecc has written: its graph as functions in JAX.

Comments name the axes of values.
"""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
'''

HELD = ("TrainingKeys", "load", "save", "init")
"""The helpers that every file has."""


def emit_jax(graph: Graph) -> EmittedProgram:
    """Return `graph` as functions in JAX, a function of the graph alone.

    Raises:
      InputError: the graph has something that cannot be written.
    """
    segments = torch_source.segments_of(graph, continues=False)
    program, classes = segments.program, Classes(RESERVED.union(_helpers()))
    paths = frozenset(program.params)

    def writer(block: ModuleBlock) -> JaxWriter:
        return JaxWriter(block, classes, JAX_OPERATIONS, program=program, paths=paths)

    segments.write(classes, lambda block: writer(block).write())
    model_block = ModuleBlock("", "", list(segments.steps))
    model_block.close(program.outputs.values())
    model = writer(model_block)
    lines = _apply_lines(model, program)
    functions = ["\n".join(_function_lines(d)) for d in classes.definitions]
    functions.append("\n".join(lines))
    used = {n.id for n in ast.walk(ast.parse("\n".join(functions))) if isinstance(n, ast.Name)}
    helpers = {**_helpers(), "PARAMETERS": "\n".join(_parameter_lines(segments))}
    held = helper_texts(HELD, helpers)
    read = helper_texts(used & helpers.keys(), helpers)
    read = [text for text in read if text not in held]
    parts = [*without_idle_methods(read, [*functions, *held]), *functions, *held]
    body = "\n".join(x for line in "\n\n\n".join(parts).splitlines() for x in folded(line)) + "\n"
    return EmittedProgram({FILE_NAME: f"{imports(PREAMBLE, body)}\n\n{body}"}, segments.names, {})


@cache
def _helpers() -> dict[str, str]:
    """Return the helpers: those that are written for JAX, and those of PyTorch in its words."""
    path = files("moecc_backends.jax_source") / "helpers" / "model.py"
    texts = definitions(path.read_text(encoding="utf-8"))
    for name, text in torch_source.helpers(("attention.py", "experts.py")).items():
        if name not in {*texts, *TORCH_ALONE}:
            texts[name] = translated_helper(text)
    return texts


TORCH_ALONE = (
    "attend_by_scores", "causal_mask", "windowed_mask", "extend_cache", "kernel_name", "Scope",
    "drawn", "ExpertRows",
)  # fmt: skip
"""The helpers of PyTorch that serve its modules and the caches of transformers."""


def _attention(w: Any, item: Item, *, window: int, **attrs: Any) -> PythonExpr:
    """Write attention, whose window is no part of a mask here."""
    expr = OPERATIONS["attention"](w, item, window=0, **attrs)
    assert expr is not None, "attention has a value"
    w.helpers.discard("attend_by_scores")
    w.helper("attend")
    text = expr.text.replace("attend_by_scores(", "attend(", 1)
    if window:
        text = f"{text[:-1]}, window={w.literal(window, 'window')})"
    return PythonExpr(text, expr.axes)


JAX_OPERATIONS = {**OPERATIONS, "attention": _attention}


@dataclass(eq=False)
class ParameterTree(ModuleTree):
    """The parameters of a block, as entries of the dictionary ``params``.

    Attributes:
      paths: the names of all parameters.
    """

    paths: frozenset[str] = frozenset()

    def access(self, path: str) -> str:
        """Return the expression of a parameter or dictionary of this block."""
        words = re.match(r"(\w+)((?:\.\w+|\[[^\]]+\])*)\Z", super().access(path))
        assert words is not None, "a path of names and numbers"
        entries = re.sub(r"\.(\w+)", r'["\1"]', words[2])
        return ("params" if words[1] == "self" else words[1]) + entries

    def is_list(self, path: str) -> bool:
        """Whether the entries under a path are numbered from 0 on."""
        names = [name for name in self.paths if is_under(name, path)]
        numbers = {name[len(path) + 1 :].partition(".")[0] for name in names}
        return numbers == {str(i) for i in range(len(numbers))}

    def lines(self) -> list[str]:
        """Return nothing: there are no modules to make."""
        return []

    def is_module(self, item: Item) -> bool:
        """Return false: functions read parameters, and there are no modules to call."""
        return False


@dataclass(eq=False)
class JaxWriter(ModelWriter):
    """Writes blocks as functions.

    Attributes:
      paths: the names of all parameters.
    """

    paths: frozenset[str] = frozenset()
    rows_class: ClassVar[str] = "RaggedRows"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tree = ParameterTree(self, paths=self.paths)

    def argument_names(self) -> set[str]:
        """Return the words of the function: its variables are no attributes of an object."""
        return set(re.findall(r"\w+", " ".join([*self.signature, *self.lines])))

    def call_text(self, block: ModuleBlock, arguments: list[str]) -> str:
        """Return the call of a function."""
        definition, values = self._arguments(block)
        params = [self.tree.access(block.path)] if block.path else []
        options = [f"{name}={self.literal(v, name)}" for name, v in values.items()]
        return _call(definition, [*params, *arguments], options)

    def _arguments(self, block: ModuleBlock) -> tuple[ClassDef, dict[str, object]]:
        """Return the function of a block, and the numbers that it takes."""
        instance = self.classes.instances[block]
        definition = instance.definition
        text = "\n".join(definition.forward)
        names = zip(definition.arguments, instance.values, strict=True)
        return definition, {n: v for n, v in names if re.search(rf"self\.{n}\b", text)}

    def layer_modules(self, layers: list[ModuleBlock], stack: str) -> str:
        """Return the parameters of the layers; some may have none of their own."""
        has_own = [any(is_under(v.name, b.path) for v in b.params) for b in layers]
        if all(has_own):
            return super().layer_modules(layers, stack)
        pairs = zip(layers, has_own, strict=True)
        return repeated_texts([self.tree.access(b.path) if has else "{}" for b, has in pairs])

    def layer_call(
        self, layers: list[ModuleBlock], arguments: list[str], zipped: list[tuple[str, str]]
    ) -> str:
        """Return the call of a function on the parameters of a layer."""
        parts = [self._arguments(layer) for layer in layers]
        definitions = list(dict.fromkeys(definition for definition, _ in parts))
        arguments = ["layer", *arguments]
        if len(definitions) == 1:
            names = list(parts[0][1])
            zipped += [(n, repeated_texts([literal(v[n]) for _, v in parts])) for n in names]
            return _call(definitions[0], arguments, [f"{n}={n}" for n in names])
        if any(map(_is_noisy, definitions)):
            for definition in definitions:
                definition.signature = list(dict.fromkeys([*definition.signature, "training"]))
        zipped += [("function", repeated_texts([_partial(d, v) for d, v in parts]))]
        call = _call(definitions[0], arguments, [])
        return f"function{call[call.index('(') :]}"


RESERVED = frozenset(("params", "training", "jax", "jnp", "np", "function", "partial", "apply"))
"""Names that a variable must not have in JAX."""


def _function_name(definition: ClassDef) -> str:
    return "apply" + re.sub(r"([A-Z])", r"_\1", definition.name).lower()


def _is_noisy(definition: ClassDef) -> bool:
    """Whether a function reads the mode, or draws in it."""
    words = " ".join(definition.forward)
    return (
        "training" in definition.signature
        or re.search(r"self\.training|keep_random\(", words) is not None
    )


def _call(definition: ClassDef, arguments: Sequence[str], options: Sequence[str]) -> str:
    training = ["self.training"] if _is_noisy(definition) else []
    return f"{_function_name(definition)}({', '.join([*arguments, *training, *options])})"


def _partial(definition: ClassDef, values: dict[str, object]) -> str:
    """Return a function with the numbers of a layer."""
    options = "".join(f", {name}={literal(value)}" for name, value in values.items())
    name = _function_name(definition)
    return f"partial({name}{options})" if options else name


def _function_lines(definition: ClassDef) -> list[str]:
    """Return the function of a class."""
    body = [translated_line(line) for line in definition.forward]
    text = "\n".join(body)
    signature = list(definition.signature)
    if definition.base != "nn.Module" or "params" in re.findall(r"\w+", text):
        signature = ["params", *signature]
    if _is_noisy(definition) and "training" not in signature:
        signature.append("training")
    numbers = [n for n in definition.arguments if re.search(rf"\b{n}\b", text)]
    head = f"def {_function_name(definition)}({', '.join([*signature, *numbers])}):"
    return [head, *(f"    {line}" for line in body)]


def _parameter_lines(segments: Segments) -> list[str]:
    """Return the table of parameters: those of equal layers in one line."""
    program = segments.program
    tables: dict[tuple[str, str, str], list[int]] = {}
    for name, var in program.params.items():
        pattern, number = name, 0
        for (_, index), path in segments.layers.items():
            if is_under(name, path):
                pattern = f"{path[: -len(str(index))]}{{}}{name[len(path) :]}"
                number = index
        shape = literal(tuple(var.size(axis) for axis in var.axes))
        tables.setdefault((pattern, shape, initial_kind(var)), []).append(number)
    lines = [
        "# The name of each parameter, its layers, its shape, and what it is at first.",
        "PARAMETERS = [",
    ]
    for (name, shape, kind), layers in tables.items():
        lines.append(f'    ("{name}", {_numbers(layers)}, {shape}, "{kind}"),')
    return [*lines, "]"]


def _numbers(numbers: list[int]) -> str:
    """Return numbers as a range, if they are one."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if numbers != list(range(numbers[0], numbers[-1] + 1, step)):
        return str(numbers)
    words = [*([numbers[0]] if numbers[0] or step != 1 else []), numbers[-1] + 1]
    return f"range({', '.join(map(str, [*words, *([step] if step != 1 else [])]))})"


def _apply_lines(model: JaxWriter, program: TorchProgram) -> list[str]:
    """Return the function that computes the outputs."""
    names = {var: variable(name) for name, var in program.inputs.items() if var.kind != "key"}
    model.values.update({var: PythonExpr(name, var.axes) for var, name in names.items()})
    # The names of arguments stay taken to the end.
    model.remaining.update(list(names))
    model.write_steps(model.block.steps)
    results = {
        loss_name(name) if name.startswith("loss.") else identifier(name): model.canonical(var)
        for name, var in program.outputs.items()
    }
    main = next(iter(names.values()))
    optional = [name for name in names.values() if name == "mask" and name != main]
    required = [name for name in names.values() if name not in optional]
    signature = ["params", *required, *(f"{name}=None" for name in optional), "training=None"]
    body = [
        line
        for name in optional
        for line in (f"if {name} is None:", f"    {name} = jnp.ones({main}.shape, bool)")
    ]
    body += [translated_line(line) for line in model.filled_lines(model.lines)]
    outputs = ", ".join(f'"{n}": {translated(text)}' for n, text in results.items())
    return [
        f"def apply({', '.join(signature)}):",
        '    """Return the outputs by name; `training` is `TrainingKeys`, None to evaluate."""',
        *(f"    {line}" for line in body),
        f"    return {{{outputs}}}",
    ]


# PyTorch's words in JAX: one table of functions and methods, applied to the syntax tree.  A word
# that the table does not have is an error, never left as it is.

Template = str | Callable[[list[str], dict[str, str]], str]
"""The text of a call; of a method, operand 0 is its object.  Further operands are appended."""

NAMES = {
    "torch.float32": "jnp.float32",
    "torch.float64": "float",
    "torch.bfloat16": "jnp.bfloat16",
    "torch.float16": "jnp.float16",
    "torch.long": "int",
    "torch.bool": "bool",
    "torch.is_tensor": "is_array",
    "torch.cos": "jnp.cos",
    "torch.sin": "jnp.sin",
}

KEYWORDS = {"dim": "axis", "keepdim": "keepdims", "device": "", "stable": ""}
"""The arguments that have another name in jax.numpy; empty: it has none."""


def _joined(texts: list[str], words: dict[str, str]) -> str:
    return ", ".join([*texts, *(f"{word}={text}" for word, text in words.items())])


def _convolved(texts: list[str], words: dict[str, str]) -> str:
    x, weight = texts
    pad = words.get("padding", "0")
    options = f"[{words.get('stride', '1')}] * ({x}.ndim - 2), [({pad}, {pad})] * ({x}.ndim - 2)"
    return f"jax.lax.conv_general_dilated({x}, {weight}, {options})"


def _broadcast(texts: list[str], words: dict[str, str]) -> str:
    x, *sizes = texts
    shape = sizes[0] if len(sizes) == 1 else f"({', '.join(sizes)})"
    return f"jnp.broadcast_to({x}, {shape})"


def _flattened(texts: list[str], words: dict[str, str]) -> str:
    return f"merge_axes({', '.join(texts)})" if len(texts) > 1 else f"{texts[0]}.reshape(-1)"


TEMPLATES: dict[str, Template] = {
    "F.silu": "jax.nn.silu({0})",
    "F.gelu": lambda texts, words: f"jax.nn.gelu({texts[0]}, approximate={bool(words)})",
    "F.relu": "jax.nn.relu({0})",
    "F.linear": lambda texts, words: f"{texts[0]} @ {' + '.join([f'{texts[1]}.T', *texts[2:]])}",
    "F.dropout": "dropout({0})",
    "F.one_hot": "jax.nn.one_hot({0}, {1}, dtype=int)",
    "F.rms_norm": "rms_norm({0}, {2}, eps={eps})",
    "F.layer_norm": lambda texts, words: f"layer_norm({_joined([texts[0], *texts[2:]], words)})",
    **dict.fromkeys(("F.conv1d", "F.conv2d", "F.conv3d"), _convolved),
    "torch.sigmoid": "jax.nn.sigmoid({0})",
    "torch.rsqrt": "jax.lax.rsqrt({0})",
    "torch.special.ndtr": "jax.scipy.special.ndtr({0})",
    "torch.cat": "jnp.concatenate({0}, axis={axis})",
    "torch.tensor": "jnp.array({0})",
    "torch.get_default_dtype": "jnp.float32",
    "torch.bucketize": 'jnp.searchsorted({1}, {0}, side="right")',
    ".flatten": _flattened,
    ".unflatten": "split_axis({0})",
    ".transpose": "{0}.swapaxes({1}, {2})",
    ".permute": lambda texts, words: f"{texts[0]}.transpose({', '.join(texts[1:])})",
    ".view": lambda texts, words: f"{texts[0]}.reshape({', '.join(texts[1:])})",
    ".expand": _broadcast,
    ".expand_as": "jnp.broadcast_to({0}, {1}.shape)",
    ".masked_fill": "jnp.where({1}, {2}, {0})",
    ".clamp": lambda texts, words: f"jnp.clip({_joined(texts, words)})",
    ".argsort": lambda texts, words: f"jnp.argsort({_joined(texts, words)})",
    ".softmax": "jax.nn.softmax({0}, axis={1})",
    ".sigmoid": "jax.nn.sigmoid({0})",
    ".logsumexp": "jax.nn.logsumexp({0}, axis={1})",
    ".amax": lambda texts, words: f"{texts[0]}.max({_joined(texts[1:], words)})",
    ".detach": "jax.lax.stop_gradient({0})",
    ".gather": "jnp.take_along_axis({0}, {2}, axis={1})",
    ".scatter": "jnp.put_along_axis({0}, {2}, {3}, axis={1}, inplace=False)",
    ".chunk": "jnp.split({0}, {1}, axis={axis})",
    ".unbind": "jnp.moveaxis({0}, {1}, 0)",
    ".double": "{0}.astype(float)",
    ".float": "{0}.astype(jnp.float32)",
    ".long": "{0}.astype(int)",
    ".to": "{0}.astype({1})",
    ".abs": "jnp.abs({0})",
    ".numel": "{0}.size",
    ".is_floating_point": "jnp.issubdtype({0}.dtype, jnp.floating)",
}

FUNCTIONS = frozenset(
    (
        "arange", "einsum", "exp", "expm1", "full", "full_like", "log", "logaddexp", "maximum",
        "minimum", "ones_like", "sqrt", "square", "stack", "tanh", "where", "zeros_like",
    )
)  # fmt: skip
"""The functions of torch that jax.numpy has by the same name."""

METHODS = frozenset(("append", "cumsum", "max", "mean", "reshape", "squeeze", "sum"))
"""The methods that arrays of JAX have, too, and those of Python's lists."""


class _Translator(ast.NodeTransformer):
    """Writes a tree with JAX's words."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        text = NAMES.get(ast.unparse(node))
        if text is not None:
            return _expression(text)
        node.value = self.visit(node.value)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return ast.Name(node.attr)  # an argument of the constructor is one of the function
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node.keywords = [
            ast.keyword(word, self.visit(k.value))
            for k in node.keywords
            if (word := KEYWORDS.get(k.arg or "", k.arg or ""))
        ]
        node.args = [self.visit(x) for x in node.args if ast.unparse(x) != "self"]
        if isinstance(node.func, ast.Name):
            if node.func.id == "keep_random":
                node.args.append(ast.Name("training"))
            return node
        assert isinstance(node.func, ast.Attribute), "a function of a module, or a method"
        name, word = ast.unparse(node.func), node.func.attr
        if name in TEMPLATES:
            return _filled(TEMPLATES[name], node.args, node)
        if name == f"torch.{word}" and word in FUNCTIONS:
            node.func = _expression(f"jnp.{word}")
            return node
        if name.startswith(("rows.", "math.")):
            return node
        node.func.value = self.visit(node.func.value)
        if f".{word}" in TEMPLATES:
            return _filled(TEMPLATES[f".{word}"], [node.func.value, *node.args], node)
        if word in METHODS:
            return node
        raise InputError(f"{name} cannot be written in JAX")


def _filled(template: Template, operands: list[ast.expr], node: ast.Call) -> ast.expr:
    words = {k.arg or "": ast.unparse(k.value) for k in node.keywords}
    texts = [
        ast.unparse(x) if isinstance(x, ast.Starred) else f"({ast.unparse(x)})" for x in operands
    ]
    if not isinstance(template, str):
        return _expression(template(texts, words))
    filled = template.format(*texts, **{"axis": "0", **words})
    count = len(set(re.findall(r"\{(\d)", template)))
    if len(texts) > count and template.endswith("({0})"):
        filled = f"{filled[:-1]}, {', '.join(texts[count:])})"
    return _expression(filled)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def translated(text: str) -> str:
    """Return a statement in JAX.

    Raises:
      InputError: a word is not in the table.
    """
    tree = ast.fix_missing_locations(_Translator().visit(ast.parse(text)))
    line = ast.unparse(tree)
    value = getattr(tree.body[0], "value", None)
    if isinstance(value, ast.Tuple) and len(value.elts) > 1:
        line = line.removesuffix(ast.unparse(value)) + ast.unparse(value)[1:-1]
    return re.sub(r"'([^'\"\\\n]*)'", r'"\1"', line)


def translated_line(line: str) -> str:
    """Return a line of a function in JAX; its comment and indentation stay."""
    code, mark, comment = line.strip().partition("  # ")
    indent = line[: len(line) - len(line.lstrip())]
    body = (
        translated(f"{code} pass").removesuffix("\n    pass")
        if code[-1] == ":"
        else (translated(code))
    )
    return f"{indent}{body}{mark}{comment}"


def translated_helper(text: str) -> str:
    """Return a function in JAX; its signature, docstring and outer comments stay."""
    lines = text.splitlines()
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef), "classes are written for JAX"
    start = function.body[1 if ast.get_docstring(function) else 0].lineno - 1
    parts = lines[:start]
    for statement, following in zip(function.body, [*function.body[1:], None], strict=True):
        if statement.lineno > start:
            source = lines[statement.lineno - 1 : statement.end_lineno]
            text = translated(ast.unparse(statement))
            is_same = text == ast.unparse(statement).replace("'", '"')
            parts += source if is_same else [f"    {line}" for line in text.splitlines()]
        if following is not None and following.lineno > start:
            between = lines[statement.end_lineno or 0 : following.lineno - 1]
            parts += [line for line in between if line.strip().startswith("#")]
    return "\n".join(parts)
