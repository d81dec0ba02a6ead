"""PyTorch's words in JAX: one table of functions and methods, applied to the syntax tree.

The operations of a graph, and most helpers, have one text, which is PyTorch's.  A word that the
table does not have is an error, never left as it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from moecc.errors import InputError

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
    ".flatten": "merge_axes({0})",
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
    ".amax": "{0}.max({1})",
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
        "arange", "einsum", "exp", "full", "full_like", "log", "maximum", "minimum", "ones_like",
        "square", "stack", "tanh", "where", "zeros_like",
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
