"""Hostile graphs: ``python -m tests.emit.fuzz COUNT`` emits graphs whose names and texts are code.

Whatever they are called, the emitted text calls, imports and quotes what that of the plain graph
does: a name of a graph is an identifier there, a location is a name or nothing.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import time

import numpy as np
from moecc_backends.torch_source import model as templates

import moecc
from moecc.backend import emit_program
from moecc.errors import MoeccError
from moecc.ir.text import parse, print_graph

CODE = (
    '"', "'", '"""', "'''", "\\", "#", ";", "(", ")", ":", "=", "{", "}", "%s", "{0}", "\x00",
    "__import__('os')", "eval", "exec", "self", "import", "os", "system", "class", "lambda",
    ".", "..", "-", "0", "é", "\u202e", "\u2028", "a" * 90, "layers.0", "print(1)", "ﬁ", "𝐚",
)  # fmt: skip
NAME_PARTS = ("a", "_", "-", "9", "class", "self", "forward", "eval", "__import__", ".", "0", "os")
WORDS = ("q_proj", "lm_head", "up_proj", "input_layernorm", "norm", "mlp", "embed_tokens")


def plain_text() -> str:
    """Return the graph that is changed: a small Llama with experts."""
    model = moecc.open("tests/golden/llama_gqa").apply("upcycle{experts=4 top-k=2}")
    return print_graph(model.graph)


def hostile_text(plain: str, rng: np.random.Generator) -> str:
    """Return the text of a graph with other names, locations and attributes."""
    text = plain
    for word in rng.choice(WORDS, 3, replace=False):
        name = "x" + "".join(rng.choice(NAME_PARTS, 4)).strip("-.")
        text = re.sub(rf"(?<=[%.]){word}\b(?=[.\s,])", name, text)
    for scope in ("ffn", "attention", "norm1", "head"):
        if rng.random() < 0.5:
            code = re.sub(r"\s", "", "".join(rng.choice(CODE, 3)))
            at = rng.choice([f".{code}", f".{scope}{code}", f".{scope}.{code}"])
            text = re.sub(rf"(@\S*)\.{scope}(?=\s)", lambda m, a=at: m[1] + a, text)
    quoted = "".join(rng.choice(CODE, 3)).replace("\\", "\\\\").replace('"', '\\"')
    return re.sub(r'attr family = "\w+"', lambda m: f'attr family = "{quoted}"', text)


def surface(text: str) -> dict[str, set[str]]:
    """Return what a text calls by name, imports and quotes."""
    nodes = list(ast.walk(ast.parse(text)))
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    calls = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
    imports = {ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)}
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {
        "calls": {c for c in calls if "self." not in c and c not in defined and "(" not in c},
        "imports": imports,
        "texts": texts,
    }


LAYERS = re.compile(r"Layer\d*")
HARMLESS = {"range", "enumerate", "zip", "Scope", "nn.ModuleList", "nn.ModuleDict", "nn.Linear",
            "nn.Parameter", "torch.empty", "F.linear", "nn.RMSNorm", "F.rms_norm",
            "nn.Embedding", "super", "ValueError"}  # fmt: skip
"""What other names may add: modules where a path is another, or none where it is no path."""

TEMPLATES = inspect.getsource(templates)
"""Texts of models that are written otherwise, such as one without layers, are from here."""


def strangers(text: str, expected: str) -> list[str]:
    """Return what `text` has and `expected` has not, but for the names of modules."""
    ours, theirs = surface(text), surface(expected)
    new = [f"calls {c}" for c in ours["calls"] - theirs["calls"] - HARMLESS
           if c.partition(".")[0] not in local_names(text)]  # fmt: skip
    new += [f"imports {line}" for line in ours["imports"] - theirs["imports"]]
    texts = ours["texts"] - theirs["texts"]
    harmless = {t for t in texts if f'"{t}"' in TEMPLATES or LAYERS.fullmatch(t) or t.isdecimal()}
    return new + [f"quotes {t!r}" for t in texts - harmless]


def local_names(text: str) -> set[str]:
    """Return the variables and arguments of a text."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names | {n.arg for n in nodes if isinstance(n, ast.arg)}


def run(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Return how many graphs were written, and the faults of their texts."""
    plain = plain_text()
    (expected,) = emit_program(parse(plain), "torch").files.values()
    written, faults = 0, []
    for number in range(count):
        text = hostile_text(plain, np.random.default_rng((seed, number)))
        try:
            (emitted,) = emit_program(parse(text), "torch").files.values()
        except MoeccError:
            continue
        written += 1
        try:
            faults += [f"{number}: {fault}" for fault in strangers(emitted, expected)]
        except SyntaxError as error:
            faults.append(f"{number}: {error}")
    return written, faults


if __name__ == "__main__":
    start = time.monotonic()
    written, faults = run(int(sys.argv[1]))
    print(f"{written} of {sys.argv[1]} graphs written in {time.monotonic() - start:.0f} s")
    print("\n".join(faults[:20]) or "no fault")
    sys.exit(bool(faults))
