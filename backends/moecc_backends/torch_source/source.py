"""A graph as the text of a file: classes, models, and the helpers that they use."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

from moecc.backend import PROGRAM_FILES, EmittedProgram
from moecc.families.heads import LABEL_KEYS, LOGITS
from moecc.ir.conventions import TOKENS
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.support.untyped import JsonDict
from moecc.translate.export import rename_params
from moecc_backends.torch_source.blocks import ModuleBlock, blocks_of, let_experts_be_shared
from moecc_backends.torch_source.layers import apart
from moecc_backends.torch_source.model import Models
from moecc_backends.torch_source.names import is_under, layer_prefixes, renamed_params
from moecc_backends.torch_source.operations import OPERATIONS
from moecc_backends.torch_source.program import (
    Item,
    TorchProgram,
    add_caches,
    add_evaluation,
    can_continue,
    continued_tokens,
    in_mode,
    prepared,
    program_of,
    share_masks,
)
from moecc_backends.torch_source.text import Classes, join_layers, unify_signatures
from moecc_backends.torch_source.writer import BlockWriter

FILE_NAME = PROGRAM_FILES["torch"]


@dataclass(frozen=True)
class Segments:
    """A graph cut into layers and what is around them.

    Attributes:
      program: its items, under the names of the checkpoint.
      steps: its layers as blocks, and the items around them.
      layers: the path of the parameters of each layer.
      names: for each parameter of the unrolled graph its name in the checkpoint.
    """

    program: TorchProgram
    steps: list[Item | ModuleBlock]
    layers: dict[tuple[str, int], str]
    names: dict[str, str]

    def write(self, classes: Classes, write: Callable[[ModuleBlock], BlockWriter]) -> None:
        """Write all blocks, those within others first."""
        layers = [s for s in self.steps if isinstance(s, ModuleBlock)]
        classes.add([block for layer in layers for block in layer.blocks], write)
        classes.add(layers, write)
        stacks: dict[str, list[ModuleBlock]] = {}
        for layer in layers:
            stacks.setdefault(layer.layer[0] if layer.layer else "", []).append(layer)
        for stack in stacks.values():
            looped = [layer for part, is_read in apart(stack) if not is_read for layer in part]
            if looped:
                unify_signatures(classes, looped)


def segments_of(graph: Graph, *, continues: bool) -> Segments:
    """Return the layers of a graph, in training and evaluation.

    Args:
      graph: the graph.
      continues: whether a model that generates text has a cache, and positions as an input.

    Raises:
      InputError: the graph has something that cannot be written.
    """
    ready = prepared(graph)
    names = renamed_params(ready)
    if LOGITS in ready.outputs:  # the encoder is the base model of one with a head
        locs = {name: value.loc for name, value in ready.params.items()}
        names = {
            name: path if locs[name] == "head" or is_under(path, "model") else f"model.{path}"
            for name, path in names.items()
        }
    rename_params(ready, names)
    program = programmed(ready, continues=continues)
    if program.tokens:
        add_caches(program, cached=can_continue(graph))
    if continues:
        share_masks(program)
    layers = layer_prefixes(ready)
    steps = blocks_of(program, layers)
    if continues and program.tokens == TOKENS:
        let_experts_be_shared(steps)
    return Segments(program, steps, layers, names)


def programmed(ready: Graph, *, continues: bool) -> TorchProgram:
    """Return the program of a prepared graph, in training and evaluation where they differ."""
    is_train = ready.attrs.get("mode") == "train"
    has_modes = "routing" in ready.attrs or is_train
    training = in_mode(ready, "train") if has_modes and not is_train else ready

    def program_in(mode: Graph) -> TorchProgram:
        return program_of(mode, continued_tokens(mode) if continues else None)

    program = program_in(training)
    if has_modes:
        add_evaluation(program, program_in(in_mode(ready, "eval") if is_train else clone(ready)))
    return program


def emit_torch(graph: Graph) -> EmittedProgram:
    """Return `graph` as a readable PyTorch model, a function of the graph alone.

    Raises:
      InputError: the graph has something that cannot be written as PyTorch.
    """
    segments = segments_of(graph, continues=True)
    classes = Classes(reserved_names())
    segments.write(classes, lambda block: BlockWriter(block, classes, OPERATIONS).write())
    join_layers(classes)
    models = Models(segments.program, segments.steps, classes, str(graph.attrs.get("head", "")))
    models.write()
    text = file_text(classes, [models.base_text(), *models.texts])
    config = models.config() | labels_of(graph)
    longest = graph.stated_config.get("max_position_embeddings")
    if isinstance(longest, int):  # by which servers bound a text
        config["max_position_embeddings"] = longest
    return EmittedProgram({FILE_NAME: text}, segments.names, config)


def labels_of(graph: Graph) -> JsonDict:
    """Return the keys of a config about the labels of a head."""
    config = graph.stated_config
    value = graph.outputs.get(LOGITS)
    if value is None or "label" not in value.type:
        return {}
    stated = {key: config[key] for key in LABEL_KEYS if config.get(key) is not None}
    if graph.attrs.get("head") == "CTC":
        stated |= {key: config.get(read, usual) for key, (read, usual) in CTC_KEYS.items()}
    count = value.type["label"].size
    assert isinstance(count, int), "a head has a number of labels"
    return {"id2label": {str(n): f"LABEL_{n}" for n in range(count)}} | stated


CTC_KEYS = {
    "ctc_blank": ("pad_token_id", 0),
    "ctc_loss_reduction": ("ctc_loss_reduction", "sum"),
    "ctc_zero_infinity": ("ctc_zero_infinity", False),
}
"""What the loss of transcripts reads, from which keys, and transformers' values without them.

A model of audio has no vocabulary that the token of padding could be in.
"""


def file_text(
    classes: Classes, texts: Iterable[Sequence[str]], title: str = "", more_imports: str = ""
) -> str:
    """Return a file: the helpers and classes that are used, and the lines of further parts.

    Args:
      classes: the classes.
      texts: the further parts.
      title: the docstring of the file; by default that of a model.
      more_imports: further imports.
    """
    parts = ["\n".join(d.lines()) for d in classes.definitions]
    parts += ["\n".join(lines) for lines in texts]
    used = classes.helpers & frozenset[str]().union(*map(_names, parts))
    parts[:0] = without_idle_methods(helper_texts(used, helpers()), parts)
    body = "\n\n\n".join(parts) + "\n"
    preamble = PREAMBLE.replace(TITLE, title or TITLE)
    return f"{imports(preamble, body)}{more_imports}\n\n{body}"


TITLE = "A model that moecc has written, to be edited; comments name axes of values."

PREAMBLE = f'''"""{TITLE}"""

import functools
import inspect
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_outputs import Seq2SeqLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
'''


@cache
def reserved_names() -> frozenset[str]:
    """Return what a text may import, and the helpers that it may define."""
    imports = [n for n in ast.parse(PREAMBLE).body if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    return frozenset({*imported, *helpers()})


@lru_cache(maxsize=256)
def _names(text: str) -> frozenset[str]:
    """Return the names that a text reads; most texts are those of helpers."""
    return frozenset(n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name))


def imports(preamble: str, body: str) -> str:
    """Return the preamble with the imports that the body needs."""
    words = frozenset[str]().union(*map(_names, body.split("\n\n\n")))
    lines: list[str] = []
    for line in preamble.rstrip().splitlines():
        if line.startswith("from ") and " import " in line:
            source, _, names = line.partition(" import ")
            used = [n for n in names.split(", ") if n in words]
            before = lines[-1] if lines[-1].startswith(f"{source} import ") else ""
            joined = f"{before}, {', '.join(used)}"
            if before and used and len(joined) <= 100:
                lines[-1] = joined
            elif used:
                lines.append(f"{source} import {', '.join(used)}")
        elif line.startswith("import ") and line.split()[-1].rpartition(".")[2] not in words:
            continue
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


# The helpers: real functions, whose text is copied.

HELPER_FILES = ("attention.py", "experts.py", "models.py", "placing.py")


@cache
def helpers(names: Sequence[str] = HELPER_FILES) -> dict[str, str]:
    """Return the text of every function and class of helper files, in order."""
    folder = files("moecc_backends.torch_source") / "helpers"
    sources = [(folder / name).read_text(encoding="utf-8") for name in names]
    return {name: text for source in sources for name, text in definitions(source).items()}


def definitions(source: str) -> dict[str, str]:
    """Return the text of every function, class and constant of a file, in order."""
    texts: dict[str, str] = {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            texts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            texts[ast.unparse(node.targets[0])] = "\n".join(
                lines[node.lineno - 1 : node.end_lineno]
            )
    return texts


def helper_texts(names: Iterable[str], texts: dict[str, str]) -> list[str]:
    """Return the text of helpers, and of those that they use, in the order of `texts`."""
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in needed:
            continue
        needed.add(name)
        pending += _names(texts[name]) & texts.keys()
    return [text.replace("  # fmt: skip", "") for name, text in texts.items() if name in needed]


def without_idle_methods(texts: Sequence[str], parts: Iterable[str]) -> list[str]:
    """Return the text of helpers without the methods of classes that no part or helper calls."""
    calls = "\n".join([*texts, *parts])
    results = []
    for text in texts:
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            for method in reversed(node.body) if isinstance(node, ast.ClassDef) else ():
                if not isinstance(method, ast.FunctionDef) or method.name[0] == "_":
                    continue
                if f".{method.name}(" not in calls:
                    del lines[method.lineno - 2 : method.end_lineno]  # and the empty line before
        results.append("\n".join(lines))
    return results
