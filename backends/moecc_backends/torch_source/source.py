"""A graph as the text of a file: classes, models, and the helpers that they use."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.support.untyped import JsonDict
from moecc.translate.export import rename_params
from moecc_backends.torch_source.blocks import Block, blocks_of
from moecc_backends.torch_source.model import INPUTS, ModelWriter, inner_lines, is_head
from moecc_backends.torch_source.names import common, layer_prefixes, renamed_params
from moecc_backends.torch_source.operations import OPERATIONS
from moecc_backends.torch_source.program import (
    CACHE,
    POSITION_IDS,
    Item,
    Program,
    Var,
    add_caches,
    continued_tokens,
    prepared,
    program_of,
)
from moecc_backends.torch_source.text import BlockWriter, ClassDef, Classes, Expr

FILE_NAME = "modeling_st_moe.py"


@dataclass(frozen=True)
class EmittedSource:
    """A model as Python text.

    Attributes:
      text: the file.
      names: for each parameter of the unrolled graph its name in the checkpoint.
      auto_map: the classes that transformers' own are mapped onto.
      architecture: the class of the checkpoint.
      numbers: what configurations of transformers call the sizes of a model.
    """

    text: str
    names: dict[str, str]
    auto_map: dict[str, str]
    architecture: str
    numbers: JsonDict


def emit_torch(graph: Graph) -> EmittedSource:
    """Return `graph` as a readable PyTorch model, a function of the graph alone.

    Raises:
      InputError: the graph has something that cannot be written as PyTorch.
    """
    ready = prepared(graph)
    names = renamed_params(ready)
    rename_params(ready, names)
    prefixes = layer_prefixes(ready)
    program = program_of(ready, continued_tokens(ready))
    if program.tokens == "tokens":
        add_caches(program, _first_hidden(program))
    steps = blocks_of(program, prefixes)
    classes = Classes()
    layers = [s for s in steps if isinstance(s, Block)]
    inner = [block for layer in layers for block in layer.blocks]

    def write(block: Block) -> BlockWriter:
        return BlockWriter(block, classes, OPERATIONS).write()

    classes.add(inner, write)
    classes.add(layers, write)
    file = _File(program, steps, classes)
    file.write()
    return EmittedSource(file.text(), names, file.auto_map, file.architecture, file.numbers())


def _first_hidden(program: Program) -> Var:
    for item in program.items:
        if item.op == "embedding_module" and program.inputs[program.tokens] in item.operands:
            return item.result
    raise InputError("no table of embeddings reads the tokens")


PREAMBLE = '''"""A model that moecc has written: its graph as PyTorch, to be read and edited.

Comments name the axes of values.  A dropped choice is that of expert number N, of N experts.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
'''

CONFIG = '''
class StMoeConfig(PretrainedConfig):
    """The configuration of this model; the sizes of its layers are in the text below."""

    model_type = "st_moe"


class StMoePreTrainedModel(PreTrainedModel):
    """What all models of this file share."""

    config_class = StMoeConfig
    base_model_prefix = {prefix}
    supports_gradient_checkpointing = True
    _no_split_modules = [{layers}]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
'''


class _File:
    """The models of a file."""

    def __init__(self, program: Program, steps: list[Item | Block], classes: Classes) -> None:
        self.program, self.steps, self.classes = program, steps, classes
        self.models: list[list[str]] = []
        self.auto_map: dict[str, str] = {"AutoConfig": "modeling_st_moe.StMoeConfig"}
        self.architecture = ""
        self.base = ""

    def write(self) -> None:
        """Write the models."""
        head = [s for s in self.steps if is_head(s)]
        body = [s for s in self.steps if not is_head(s)]
        base = self._base(body)
        model = Block("StMoeModel", base, body)
        model.close(self.program.outputs.values())
        self.base = base
        self._write_decoder(model, head)

    def _base(self, body: list[Item | Block]) -> str:
        """Return the path that all parameters but those of the head are under."""
        block = Block("", "", body)
        first = {v.name.partition(".")[0] for v in block.params}
        return common([v.name for v in block.params]) if len(first) == 1 else ""

    def _write_decoder(self, model: Block, head: list[Item | Block]) -> None:
        writer = ModelWriter(model, self.classes, OPERATIONS, program=self.program)
        _bind_inputs(writer, self.program)
        body = _body(writer)
        (hidden, *others) = model.outputs
        self.architecture = "StMoeForCausalLM"
        self.auto_map["AutoModel"] = "modeling_st_moe.StMoeModel"
        self.auto_map["AutoModelForCausalLM"] = "modeling_st_moe.StMoeForCausalLM"
        embed = writer.tree.access(self._embedding())
        self.models.append(
            [
                "class StMoeModel(StMoePreTrainedModel):",
                '    """The decoder without its head."""',
                "",
                "    def __init__(self, config):",
                "        super().__init__(config)",
                *inner_lines(writer.constructor, 8),
                "        self.post_init()",
                "",
                *_embedding_accessors(embed),
                *DECODER_SIGNATURE,
                "        if inputs_embeds is None:",
                f"            inputs_embeds = {embed}(input_ids)",
                *DECODER_PROLOGUE,
                *inner_lines(body, 8),
                f"        return with_cache(BaseModelOutputWithPast, cache, "
                f"last_hidden_state={writer.canonical(hidden)})",
            ]
        )
        del others
        top = Block("StMoeForCausalLM", "", [*head])
        top.close(self.program.outputs.values())
        root = ModelWriter(top, self.classes, OPERATIONS, program=self.program)
        root.values[hidden] = Expr("hidden_states", hidden.axes)
        root.write_steps(top.steps)
        logits = root.canonical(self.program.outputs["logits"])
        own = [line for line in root.tree.lines() if not line.startswith(f"self.{self.base} =")]
        self.classes.helpers |= root.helpers | writer.helpers | {"with_cache"}
        self.models.append(
            [
                "class StMoeForCausalLM(StMoePreTrainedModel, GenerationMixin):",
                '    """The decoder with its head."""',
                "",
                "    def __init__(self, config):",
                "        super().__init__(config)",
                f"        self.{self.base} = StMoeModel(config)",
                *inner_lines(_filled_lines(root, own), 8),
                "        self.post_init()",
                "",
                *_embedding_accessors(f"self.{self.base}.{embed.removeprefix('self.')}"),
                *HEAD_SIGNATURE,
                f"        outputs = self.{self.base}(",
                "            input_ids=input_ids,",
                "            attention_mask=attention_mask,",
                "            position_ids=position_ids,",
                "            cache=past_key_values if cache is None else cache,",
                "            inputs_embeds=inputs_embeds,",
                "            use_cache=use_cache,",
                "        )",
                "        kept = logits_to_keep",
                "        if isinstance(kept, int):",
                "            kept = slice(-kept, None)",
                "        hidden_states = outputs.last_hidden_state[:, kept]",
                *inner_lines(_filled_lines(root, root.lines), 8),
                *([] if logits == "logits" else [f"        logits = {root.filled(logits)}"]),
                "        loss = None",
                "        if labels is not None:",
                "            loss = self.loss_function(",
                "                logits=logits, labels=labels, vocab_size=self.config.vocab_size",
                "            )",
                "        cache = cache_of(outputs)",
                "        output = MoeCausalLMOutputWithPast",
                "        return with_cache(output, cache, loss=loss, logits=logits)",
            ]
        )
        self.classes.helpers |= {"cache_of"}

    def _embedding(self) -> str:
        var = _first_hidden(self.program)
        assert var.item is not None, "a look-up"
        return str(var.item.attrs["module"])

    def numbers(self) -> JsonDict:
        """Return the sizes that programs read from a configuration."""
        layers = [s for s in self.steps if isinstance(s, Block)]
        items = self.program.items
        hidden = _first_hidden(self.program) if self.program.tokens else None
        numbers: JsonDict = {"num_hidden_layers": len(layers)}
        if hidden is not None:
            numbers["hidden_size"] = hidden.size(hidden.axes[-1])
        for item in items:
            if item.op in ("attention", "cached_attention"):
                query, key = item.operands[:2]
                heads = [n for n in ("kv_head", "query_group", "head") if n in query.axes]
                count = 1
                for name in heads:
                    count *= query.size(name)
                numbers["num_attention_heads"] = count
                kv = [n for n in ("kv_head", "head") if n in key.axes]
                numbers["num_key_value_heads"] = key.size(kv[0]) if kv else 1
                over = item.attrs["over"]
                numbers["head_dim"] = query.size(str(over))
                break
        return numbers

    def text(self) -> str:
        """Return the file."""
        layers = [d.name for d in self.classes.definitions if d.base != "nn.Module"]
        names = ", ".join(f'"{name}"' for name in layers)
        helpers = helper_texts(self.classes.helpers)
        parts = [
            *helpers,
            *("\n".join(_class_lines(d)) for d in self.classes.definitions),
            CONFIG.format(prefix=repr(self.base), layers=names).strip(),
            *("\n".join(lines) for lines in self.models),
        ]
        body = "\n\n\n".join(parts) + "\n"
        return _imports(PREAMBLE, body) + "\n\n" + body


def _class_lines(definition: ClassDef) -> list[str]:
    return definition.lines()


def _imports(preamble: str, body: str) -> str:
    """Return the preamble with the imports that the body needs."""
    words = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    lines: list[str] = []
    for line in preamble.rstrip().splitlines():
        if line.startswith("from ") and " import " in line:
            source, _, names = line.partition(" import ")
            kept = [n for n in names.split(", ") if n in words]
            if kept:
                lines.append(f"{source} import {', '.join(kept)}")
        elif line.startswith("import ") and line.split()[-1].rpartition(".")[2] not in words:
            continue
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _bind_inputs(writer: ModelWriter, program: Program) -> None:
    names = {**INPUTS, POSITION_IDS: "position_ids", CACHE: "cache"}
    for name, var in program.inputs.items():
        writer.values[var] = Expr(names.get(name, name), var.axes)
    for var in writer.block.inputs:
        if var not in writer.values:
            writer.values[var] = Expr(names.get(var.name, var.name), var.axes)
    hidden = _first_hidden(program)
    writer.values[hidden] = Expr("inputs_embeds", hidden.axes)
    writer.remaining.update(v for v in program.inputs.values())


def _body(writer: ModelWriter) -> list[str]:
    hidden = _first_hidden(writer.program)
    writer.write_steps([s for s in writer.block.steps if s is not hidden.item])
    writer.constructor = _filled_lines(writer, [*writer.constructor, *writer.tree.lines()])
    return _filled_lines(writer, writer.lines)


def _filled_lines(writer: BlockWriter, lines: Iterable[str]) -> list[str]:
    return [writer.filled(line) for line in lines]


def _embedding_accessors(path: str) -> list[str]:
    return [
        "    def get_input_embeddings(self):",
        '        """Return the table of tokens."""',
        f"        return {path}",
        "",
        "    def set_input_embeddings(self, value):",
        '        """Replace the table of tokens."""',
        f"        {path} = value",
        "",
    ]


DECODER_SIGNATURE = [
    "    def forward(",
    "        self,",
    "        input_ids=None,",
    "        attention_mask=None,",
    "        position_ids=None,",
    "        past_key_values=None,",
    "        cache=None,",
    "        inputs_embeds=None,",
    "        use_cache=None,",
    "        **kwargs,",
    "    ):",
]

HEAD_SIGNATURE = [
    *DECODER_SIGNATURE[:-3],
    "        labels=None,",
    *DECODER_SIGNATURE[-3:-2],
    "        logits_to_keep=0,",
    *DECODER_SIGNATURE[-2:],
]

DECODER_PROLOGUE = [
    "        cache = past_key_values if cache is None else cache",
    "        if use_cache is None:",
    '            use_cache = getattr(self.config, "use_cache", True) and not self.training',
    "        if use_cache and cache is None:",
    "            cache = DynamicCache()",
    "        if position_ids is None:",
    "            past = cache.get_seq_length() if cache is not None else 0",
    "            length = inputs_embeds.shape[1]",
    "            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past",
]


# The helpers: real functions, whose text is copied.

HELPER_FILES = ("attention.py", "experts.py", "models.py")


@cache
def _helpers() -> dict[str, str]:
    """Return the text of every function and class of the helper files, in order."""
    texts: dict[str, str] = {}
    folder = files("moecc_backends.torch_source") / "helpers"
    for name in HELPER_FILES:
        source = (folder / name).read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                texts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return texts


def helper_texts(names: Iterable[str]) -> list[str]:
    """Return the text of helpers, and of those that they use, in the order of their files."""
    texts = _helpers()
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in needed:
            continue
        needed.add(name)
        used = {n.id for n in ast.walk(ast.parse(texts[name])) if isinstance(n, ast.Name)}
        pending += used & texts.keys()
    return [text.replace("  # fmt: skip", "") for name, text in texts.items() if name in needed]


Write = Callable[[Block], BlockWriter]
