"""The models of a file: what is around the layers, and what transformers calls.

A decoder is a base model and its head; an encoder is a base model; an encoder-decoder has an
encoder that generation runs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moecc.errors import InputError
from moecc.families.heads import LOGITS, POOLED
from moecc.ir.conventions import AUXILIARY, TOKENS
from moecc.support.untyped import JsonDict
from moecc_backends.torch_source.blocks import ModuleBlock, members
from moecc_backends.torch_source.heads import HEAD, LOSSES, head_parts, new_heads
from moecc_backends.torch_source.layers import ModelWriter
from moecc_backends.torch_source.names import common, is_under, layer_of
from moecc_backends.torch_source.operations import OPERATIONS
from moecc_backends.torch_source.parallel import expert_parallel_plan, tensor_parallel_plan
from moecc_backends.torch_source.program import (
    CACHE,
    CONTINUES,
    KEY_POSITIONS,
    KWARGS,
    POSITION_IDS,
    Item,
    ProgramValue,
    TorchProgram,
    loss_name,
    walk_operands,
)
from moecc_backends.torch_source.text import (
    Classes,
    PythonExpr,
    folded,
    literal,
)
from moecc_backends.torch_source.writer import STATE, BlockWriter

# The classes that transformers calls, around the layers.

BASE = '''
class StMoeConfig(PretrainedConfig):
    """The configuration of this model; the sizes of its layers are in the text below."""

    model_type = "st_moe"
    <plan>


class StMoePreTrainedModel(PreTrainedModel):
    """What all models of this file share."""

    config_class = StMoeConfig
    base_model_prefix = <prefix>
    <main_input>
    supports_gradient_checkpointing = True
    <embedding>
    _no_split_modules = [<layers>]
    _supports_sdpa = True
    <plain>
    _can_set_attn_implementation_cached_value = True
    _can_compile_fullgraph = True

    def __call__(self, *args, **kwargs):
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"{name} is not supported: register forward hooks of the layers")
        return super().__call__(*args, **kwargs)
'''

MODULES = """
    def __init__(self, config):
        super().__init__(config)
        <constructor>
        self.post_init()
"""

DEFAULT_EMBEDDING = "embed_tokens"
"""The module that transformers takes for the table of tokens if nothing says otherwise."""

ACCESSORS = '''
    def get_input_embeddings(self):
        """Return the table of tokens."""
        return <embedding>

    def set_input_embeddings(self, value):
        """Replace the table of tokens."""
        <embedding> = value
'''

DECODER_ARGUMENTS = """
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
"""

USE_CACHE = [
    "if use_cache is None:",
    '    use_cache = getattr(self.config, "use_cache", True) and not self.training',
    "if use_cache and cache is None:",
]

POSITIONS = """
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past
"""

DECODER_POSITIONS = """
        past = cache.get_seq_length() if cache is not None else 0
        length = inputs_embeds.shape[1]
        position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past
"""

KEYS = """
        is_static = cache is not None and cache.is_compileable
        keys = cache.layers[0].max_cache_len if is_static else past + length
        key_position_ids = torch.arange(keys, device=inputs_embeds.device)[None]
"""

DECODER = f'''
class StMoeModel(StMoePreTrainedModel):
    """The decoder without its head."""
{MODULES}<accessors>
    def forward(
        self,{DECODER_ARGUMENTS}        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        <cache>
        if inputs_embeds is None:
            inputs_embeds = <embedding>(input_ids)<positions>
        <statements>
        return with_cache(<output>, cache, <results>)
'''

CAUSAL_LM = f'''
class StMoeForCausalLM(<parent>, GenerationMixin):
    """The decoder with its head."""
{MODULES}
    def forward(
        self,{DECODER_ARGUMENTS}        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = <base>(
            input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds,
            use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        <statements>
        <losses>
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            <added>
        return with_cache(<output>, cache_of(outputs), loss=loss, logits=logits<aux>)
'''

ENCODER = f'''
class StMoeModel(StMoePreTrainedModel):
    """The encoder."""
{MODULES}<accessors>
    def forward(self, <arguments>, **kwargs):
        <statements>
        return <output>(<results>)
'''

SEQ2SEQ = f'''
class <name>(StMoePreTrainedModel, GenerationMixin):
    """The encoder, the decoder and its head."""

    accepts_loss_kwargs = False
{MODULES}<accessors>
    def get_encoder(self, *args, **kwargs):
        """Return the encoder, which generation runs once."""
        return <encoder_module>

    def encode(self, <arguments>, **kwargs):
        """Return the last hidden states of the encoder."""
        <encoder>
        return <encoder_output>(<encoder_results>)

    def forward(
        self, <arguments>, decoder_input_ids=None,
        decoder_attention_mask=None, encoder_outputs=None, past_key_values=None, cache=None,
        labels=None, use_cache=None, **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        <cache>
        both, cache = cache, cache.self_attention_cache if cache is not None else None
        if encoder_outputs is None:
            encoder_outputs = self.encode(<passed>)
        if decoder_input_ids is None and labels is not None:
            start = labels.new_full(labels[:, :1].shape, self.config.decoder_start_token_id)
            ids = torch.cat([start, labels[:, :-1]], dim=1)
            decoder_input_ids = ids.masked_fill(ids == -100, self.config.pad_token_id or 0)
        inputs_embeds = <embedding>(decoder_input_ids)<positions>
        memory = encoder_outputs[0]
        <statements>
        <losses>
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())<plus>
        return with_cache(<output>, both, loss=loss, logits=logits<aux>)
'''


def filled(template: str, parts: dict[str, str | list[str]]) -> list[str]:
    """Return the lines of a template; a part that is a list stands on a line of its own."""
    lines: list[str] = []
    for line in template.strip("\n").splitlines():
        name = line.strip().removeprefix("<").removesuffix(">")
        part = parts.get(name)
        if line.strip() == f"<{name}>" and isinstance(part, list):
            indent = " " * (len(line) - len(line.lstrip()))
            lines += [x for text in part for x in folded(indent + text)]
            continue
        texts = [line]
        for key, value in parts.items():
            if isinstance(value, str):
                texts = [x for t in texts for x in t.replace(f"<{key}>", value).split("\n")]
        lines += [x for text in texts for x in folded(text)]
    return lines


ENCODER_ARGUMENTS = {
    "tokens": "input_ids",
    "mask": "attention_mask",
    "pixels": "pixel_values",
    "features": "input_features",
    "audio": "input_values",
}
HEAD_LOCATIONS = ("head", "loss")


class Models:
    """The models of a file.

    Attributes:
      texts: their lines.
      classes: the classes of the layers, and the helpers that are used.
      auto_map: the classes that transformers' own are mapped onto.
      architecture: the class of the checkpoint.
      task: the task of the head of an encoder, ``MaskedLM``.
      base: the attribute of the base model; empty: there is none.
      embedding: the module that is the table of tokens, unless methods return it.
      vocabulary: the table of tokens; None where nothing reads tokens.
    """

    def __init__(
        self,
        program: TorchProgram,
        steps: list[Item | ModuleBlock],
        classes: Classes,
        task: str = "",
    ) -> None:
        self.program, self.steps, self.classes, self.task = program, steps, classes, task
        self.texts: list[list[str]] = []
        self.auto_map: dict[str, str] = {"AutoConfig": "modeling_st_moe.StMoeConfig"}
        self.architecture = ""
        self.base, self.embedding = "", DEFAULT_EMBEDDING
        items = self._embedding_items()
        self.vocabulary = items[0].operands[0] if items else None
        self.main_input = ENCODER_ARGUMENTS.get(next(iter(program.inputs), ""), "input_ids")

    def write(self) -> None:
        """Write the models."""
        if self.program.tokens == "tokens":
            self._write_decoder()
        elif self.program.tokens:
            self._write_seq2seq()
        else:
            self._write_encoder()

    def _writer(
        self,
        title: str,
        path: str,
        steps: Sequence[Item | ModuleBlock],
        outputs: Iterable[ProgramValue] = (),
    ) -> ModelWriter:
        block = ModuleBlock(title, path, list(steps))
        block.close([*self.program.outputs.values(), *outputs])
        writer = ModelWriter(block, self.classes, OPERATIONS, program=self.program)
        writer.vocabulary = self.vocabulary
        names = {
            **ENCODER_ARGUMENTS,
            "decoder_tokens": "decoder_input_ids",
            "decoder_mask": "token_mask",
            POSITION_IDS: POSITION_IDS,
            KEY_POSITIONS: KEY_POSITIONS,
            CACHE: CACHE,
            KWARGS: f"**{KWARGS}",
            CONTINUES: CONTINUES,
        }
        if self.program.tokens == TOKENS:  # the attention has the mask of transformers
            names["mask"] = "token_mask"
        for name, var in self.program.inputs.items():
            if var.kind != "key":
                writer.values[var] = PythonExpr(names.get(name, name), var.axes)
        # The names of arguments stay taken to the end.
        writer.remaining.update(self.program.inputs.values())
        return writer

    def _map(self, auto: str, name: str) -> None:
        self.auto_map[auto] = f"modeling_st_moe.{name}"

    def _losses(self) -> dict[str, ProgramValue]:
        return {n: v for n, v in self.program.outputs.items() if n.startswith("loss.")}

    def _embedding_items(self) -> list[Item]:
        """Return what reads the tokens: the first one is the table of tokens."""
        tokens = self.program.inputs.get(self.program.tokens or TOKENS)
        embeddings = [i for i in self.program.items if i.op == "embedding_module"]
        return [item for item in embeddings if tokens in item.operands]

    def _embedding_item(self) -> Item:
        if items := self._embedding_items():
            return items[0]
        name = self.program.tokens or TOKENS
        raise InputError(
            "no table of embeddings reads the tokens",
            expected=f"%e = embedding %embed.weight, %{name}, of a table [vocab, embed]",
            hint="the name of the table ends in .weight, as that of a module does",
        )

    def _accessors(self, writer: ModelWriter) -> str:
        """Return the methods by which transformers finds the table of tokens in a module."""
        embedding = writer.tree.access(str(self._embedding_item().attrs["module"]))
        *modules, name = embedding.removeprefix("self.").split(".")
        if not modules:
            self.embedding = name
            return ""
        return ACCESSORS.replace("<embedding>", embedding)

    def _positions(self) -> str:
        names = self.program.inputs
        if not {POSITION_IDS, KEY_POSITIONS, CACHE} & names.keys():
            return ""
        text = (POSITIONS if self.program.tokens == "tokens" else DECODER_POSITIONS).rstrip("\n")
        return text + (KEYS.rstrip("\n") if KEY_POSITIONS in names else "")

    def _cache(self, new: str) -> list[str]:
        """Return the lines that make a cache, or reject one."""
        if CACHE not in self.program.inputs:
            fault = "this model keeps no keys and values: generate with use_cache=False"
            lines = ["if cache is not None:", f'    raise ValueError("{fault}")']
            # Shifts by a number of tokens, and chunks of the sequence, count from the first token.
            counts_places = any(
                i.op == "causal" and layer_of(i.loc) is None for i in self.program.items
            )
            if counts_places or not any(i.op == "causal_mask" for i in self.program.items):
                name = (
                    "attention_mask" if self.program.tokens == TOKENS else "decoder_attention_mask"
                )
                lines += _padding_rejected("this model has no padding mask", name)
            return lines
        lines = [*USE_CACHE, f"    cache = {new}"]
        if CONTINUES in self.program.inputs:
            lines.insert(0, "continues = cache is not None  # no capacity then drops a token")
        return lines

    def _write_decoder(self) -> None:
        has_head = "logits" in self.program.outputs
        head = [
            s for s in self.steps if has_head and all(i.loc in HEAD_LOCATIONS for i in members(s))
        ]
        last = {v for s in head for i in members(s) if i.loc == "head" for v in i.results}
        losses = {v: n for n, v in self._losses().items()}
        routed: list[Item | ModuleBlock] = []  # losses of routers belong to the base model
        for step in head:
            operands = {v for i in members(step) for v in i.operands}
            if all(i.loc == "loss" for i in members(step)) and not operands & last:
                routed.append(step)
            else:
                last.update(v for i in members(step) for v in i.results)
        for step in reversed(routed):  # but for sums that the loss of the head is added to
            sums = {v for i in members(step) for v in i.results} - losses.keys()
            if any(sums & set(i.operands) for s in head if s not in routed for i in members(s)):
                routed.remove(step)
        head = [step for step in head if step not in routed]
        body = [s for s in self.steps if s not in head]
        inside = {v for s in body for i in members(s) for v in i.operands if v.param}
        paths = [v.name for v in inside]
        first = {path.partition(".")[0] for path in paths}
        # Without a path that all share, the model with its head extends the one without.
        self.base = first.pop() if has_head and len(first) == 1 and common(paths) else ""
        for step in list(head):  # a last projection may be part of the base model
            added = [v for i in members(step) for v in i.operands if v.param and v not in inside]
            if self.base and any(is_under(v.name, self.base) for v in added):
                head.remove(step)
                body.append(step)
        item = self._embedding_item()
        writer = self._writer("StMoeModel", self.base, body)
        writer.values[item.result] = PythonExpr("inputs_embeds", item.result.axes)
        writer.write_steps([s for s in body if s is not item])
        embedding = writer.tree.access(str(item.attrs["module"]))
        (hidden,) = (v for v in writer.block.outputs if v not in losses)
        results = {"last_hidden_state": writer.canonical(hidden)}
        results |= {loss_name(losses[v]): writer.canonical(v) for v in writer.block.outputs
                    if v in losses}  # fmt: skip
        parts: dict[str, str | list[str]] = {
            "constructor": writer.filled_lines(writer.tree.lines()),
            "accessors": self._accessors(writer),
            "embedding": embedding,
            "positions": self._positions(),
            "cache": self._cache("DynamicCache()"),
            "statements": [
                *self._token_mask("mask", "attention_mask"), *writer.filled_lines(writer.lines)
            ],
        }  # fmt: skip
        output = "StMoeOutput" if losses else "BaseModelOutputWithPast"
        parts |= {
            "output": output,
            "results": writer.filled(", ".join(f"{n}={t}" for n, t in results.items())),
        }
        if losses:
            self.texts.append(_output_class(list(results)[1:], "BaseModelOutputWithPast"))
        self.texts.append(filled(DECODER, parts))
        self.architecture = "StMoeModel"
        self._map("AutoModel", "StMoeModel")
        self.classes.helpers |= writer.helpers | {"with_cache"}
        if not has_head:
            return
        root = self._writer("StMoeForCausalLM", "", head)
        root.values[hidden] = PythonExpr(STATE, hidden.axes)
        for var, name in losses.items():
            root.values[var] = PythonExpr(f"outputs.{loss_name(name)}", var.axes)
        root.write_steps(head)
        base, constructor = f"self.{self.base}", [f"self.{self.base} = StMoeModel(config)"]
        present = {base}
        if not self.base:
            base, constructor = "super().forward", []
            present = {line.partition(" = ")[0] for line in writer.tree.lines()}
            head_names = {v.name for v in root.block.params} - {v.name for v in inside}
            if within := sorted(n for n in head_names if f"self.{n.partition('.')[0]}" in present):
                raise InputError(
                    "a parameter of the head is named within the model without its head",
                    expected="a name such as head.weight", found=within[0],
                    hint="rename the parameter in the graph; the tensor keeps its name in source()",
                )  # fmt: skip
        module_lines = [
            line for line in root.tree.lines() if line.partition(" = ")[0] not in present
        ]
        self.texts.append(
            filled(
                CAUSAL_LM,
                {
                    "parent": "StMoePreTrainedModel" if self.base else "StMoeModel",
                    "constructor": [*constructor, *root.filled_lines(module_lines)],
                    "base": base,
                    "statements": self._lines_to_logits(root),
                    **self._loss_parts(root, "MoeCausalLMOutputWithPast"),
                },
            )
        )
        self.architecture = "StMoeForCausalLM"
        self._map("AutoModelForCausalLM", "StMoeForCausalLM")
        self.classes.helpers |= root.helpers | {"cache_of", "batch_share"}

    def _lines_to_logits(self, writer: BlockWriter) -> list[str]:
        """Return the statements of a head, of which the last names the logits."""
        outputs = self.program.outputs
        logits = writer.canonical(outputs.get(LOGITS) or outputs["logits"])
        named = [] if logits == "logits" else [f"logits = {logits}"]
        return writer.filled_lines([*writer.lines, *named])

    def _loss_parts(self, root: BlockWriter, output: str) -> dict[str, str | list[str]]:
        """Return the parts of a template that say what is done with auxiliary losses."""
        loss = self._losses().get(AUXILIARY)
        if loss is None:
            return {"losses": [], "plus": "", "added": [], "aux": "", "output": output}
        text = root.filled(root.canonical(loss))
        lines = [f"aux_loss = {text}"] if text != "aux_loss" else []
        return {
            "losses": lines,
            "plus": " + aux_loss",
            "added": ["loss = loss + aux_loss * batch_share(labels, **kwargs)"],
            "aux": ", aux_loss=aux_loss",
            "output": output,
        }

    def _arguments(self) -> list[str]:
        names = [n for n in ENCODER_ARGUMENTS if n in self.program.inputs]
        arguments = [ENCODER_ARGUMENTS[n] for n in names]
        if self.main_input == "input_ids" and "attention_mask" not in arguments:
            arguments.append("attention_mask")
        return arguments

    def _mask_lines(self) -> list[str]:
        if self.main_input != "input_ids":
            return []
        if "mask" not in self.program.inputs:
            return _padding_rejected(
                "the graph of this model has no padding mask: convert it with --padding-mask"
            )
        main = self.main_input
        return [
            "if attention_mask is None:",
            f"    attention_mask = torch.ones_like({main})",
            "attention_mask = attention_mask.bool()",
        ]

    def _write_encoder(self) -> None:
        outputs, losses = self.program.outputs, self._losses()
        head = [s for s in self.steps if all(i.loc == "head" for i in members(s))]
        body = [s for s in self.steps if s not in head] if LOGITS in outputs else self.steps
        self.base = "model" if LOGITS in outputs else ""
        writer = self._writer("StMoeModel", self.base, body)
        writer.write_steps(body)
        output = "hidden" if "hidden" in outputs else "logits"
        results = [f"last_hidden_state={writer.canonical(outputs[output])}"]
        if POOLED in outputs:
            results.append(f"pooler_output={writer.canonical(outputs[POOLED])}")
        plain = "BaseModelOutputWithPooling" if POOLED in outputs else "BaseModelOutput"
        results += [f"{loss_name(n)}={writer.canonical(v)}" for n, v in losses.items()]
        if losses:
            self.texts.append(_output_class(list(map(loss_name, losses)), plain))
        self.texts.append(
            filled(
                ENCODER,
                {
                    "constructor": writer.filled_lines(writer.tree.lines()),
                    "accessors": self._accessors(writer) if TOKENS in self.program.inputs else "",
                    "arguments": ", ".join(f"{a}=None" for a in self._arguments()),
                    "statements": [*self._mask_lines(), *writer.filled_lines(writer.lines)],
                    "output": "StMoeOutput" if losses else plain,
                    "results": writer.filled(", ".join(results)),
                },
            )
        )
        self.classes.helpers |= writer.helpers
        self.architecture = "StMoeModel"
        self._map("AutoModel", "StMoeModel")
        if output == "hidden":
            self._write_heads(head, outputs[output], has_loss=AUXILIARY in losses)

    def _write_heads(
        self, head: Sequence[Item | ModuleBlock], hidden: ProgramValue, *, has_loss: bool
    ) -> None:
        """Write the model with the head of the checkpoint, and models with new heads."""
        width, arguments = hidden.size("embed"), self._arguments()
        tasks = new_heads(self.main_input, arguments, width, has_loss=has_loss)
        if LOGITS in self.program.outputs:
            if self.task not in LOSSES:
                raise InputError("a head of an unknown task", where="attr head", found=self.task)
            root = self._writer("Head", "", head)
            root.values[hidden] = PythonExpr(STATE, hidden.axes)
            root.write_steps(head)
            modules = [line for line in root.tree.lines() if not line.startswith("self.model")]
            modules, lines = root.filled_lines(modules), self._lines_to_logits(root)
            parts = head_parts(self.task, arguments, modules, lines, has_loss=has_loss)
            tasks = {self.task: parts} | {t: p for t, p in tasks.items() if t != self.task}
            self.architecture = f"StMoeFor{self.task}"
            self.classes.helpers |= root.helpers | {"ctc_loss"}
        if tasks and has_loss:
            names = ("SequenceClassifierOutput", "StMoeClassifierOutput")
            self.texts.append(_output_class(["aux_loss"], *names))
        for task, parts in tasks.items():
            self.texts.append(filled(HEAD, parts))
            self._map(f"AutoModelFor{task}", f"StMoeFor{task}")

    def _write_seq2seq(self) -> None:
        decoded = {self.program.inputs[self.program.tokens]}
        for item in self.program.items:
            if decoded & set(item.operands) or POSITION_IDS in {v.name for v in item.operands}:
                decoded.update(item.results)
        after = [
            s
            for s in self.steps
            if any(v in decoded or i.loc == "decoder.masks" for i in members(s) for v in i.results)
            or not all(i.loc.startswith("encoder.") for i in members(s))
        ]
        masks: list[Item | ModuleBlock] = [
            s for s in self.steps if isinstance(s, Item) and s.results[0].kind in ("bool", "mask")
            and s not in after and all(v.kind != "float" for v in s.operands)
        ]  # fmt: skip
        before = [s for s in self.steps if s not in after]
        read = [v for v in walk_operands([i for s in after for i in members(s)]) if not v.param]
        computed = {v for s in before if s not in masks for i in members(s) for v in i.results}
        memories = [v for v in read if v in computed and v.item is not None]
        encoder = self._writer("Encoder", "", before, memories)
        encoder.write_steps(before)
        states = [v for v in memories if "embed" in v.axes]
        if len(states) != 1:
            raise InputError("the decoder reads more than one value of the encoder")
        (memory,) = states
        results = [f"last_hidden_state={encoder.canonical(memory)}"]
        parts = {v: encoder.expr(v).text for v in memories if v is not memory}
        lists = list(dict.fromkeys(text.partition("[")[0] for text in parts.values()))
        if any(not name.endswith("_losses") for name in lists):
            raise InputError("the decoder reads more than one value of the encoder")
        results += [f"{name}={name}" for name in lists]
        if lists:
            self.texts.append(_output_class(lists, "BaseModelOutput", "StMoeEncoderOutput"))
        if self._losses():
            self.texts.append(_output_class(["aux_loss"], "Seq2SeqLMOutput", "StMoeSeq2SeqOutput"))
        item = self._embedding_item()
        decoder = self._writer("Decoder", "", [*masks, *after])
        decoder.values[memory] = PythonExpr("memory", memory.axes)
        for var, text in parts.items():
            decoder.values[var] = PythonExpr(f"encoder_outputs.{text}", var.axes)
        decoder.remaining[memory] += 1
        decoder.values[item.result] = PythonExpr("inputs_embeds", item.result.axes)
        decoder.write_steps([s for s in [*masks, *after] if s is not item])
        root = self._writer("whole", "", self.steps)
        stack = next((s.path for s in before if isinstance(s, ModuleBlock)), "").rpartition(".")[0]
        module = root.tree.access(stack.rpartition(".")[0])
        arguments = self._arguments()
        is_speech = self.main_input == "input_features"
        name = "StMoeForConditionalGeneration"
        self.texts.append(
            filled(
                SEQ2SEQ,
                {
                    "name": name,
                    "constructor": [
                        *root.filled_lines(root.tree.lines()),
                        f"{module}.forward = self.encode",
                        f"{module}.main_input_name = self.main_input_name",
                    ],
                    "accessors": self._accessors(root),
                    "encoder_module": module,
                    "arguments": ", ".join(f"{a}=None" for a in arguments),
                    "passed": ", ".join(arguments),
                    "encoder": [*self._mask_lines(), *encoder.filled_lines(encoder.lines)],
                    "encoder_output": "StMoeEncoderOutput" if lists else "BaseModelOutput",
                    "encoder_results": encoder.filled(", ".join(results)),
                    "embedding": root.tree.access(str(item.attrs["module"])),
                    "positions": self._positions(),
                    "cache": self._cache("EncoderDecoderCache(DynamicCache(), DynamicCache())"),
                    "statements": [
                        *self._decoder_mask(),
                        *self._token_mask("decoder_mask", "decoder_attention_mask"),
                        *self._lines_to_logits(decoder),
                    ],
                    **self._loss_parts(decoder, "StMoeSeq2SeqOutput"
                                       if self._losses() else "Seq2SeqLMOutput"),
                },
            )
        )  # fmt: skip
        self.architecture = name
        auto = "AutoModelForSpeechSeq2Seq" if is_speech else "AutoModelForSeq2SeqLM"
        self._map(auto, name)
        self._map("AutoModel", name)
        self.classes.helpers |= encoder.helpers | decoder.helpers | root.helpers | {"with_cache"}

    def _token_mask(self, name: str, argument: str) -> list[str]:
        """Return the line by which routers of a decoder tell its tokens from padding."""
        if name not in self.program.inputs:
            return []
        self.classes.helpers.add("mask_of_tokens")
        return [f"token_mask = mask_of_tokens(inputs_embeds, {argument})"]

    def _decoder_mask(self) -> list[str]:
        """Return the lines that read the encoder's mask."""
        if "mask" not in self.program.inputs:
            return []
        return [
            "if attention_mask is None:",
            "    attention_mask = memory.new_ones(memory.shape[:2])",
            "attention_mask = attention_mask.bool()",
        ]

    def _is_tied(self) -> bool:
        """Whether the table of tokens makes logits; engines with a head of their own ask."""
        users = self.vocabulary.users if self.vocabulary is not None else ()
        return any(item.op != "embedding_module" for item in users)

    def config(self) -> JsonDict:
        """Return what programs read from a configuration."""
        layers = [s for s in self.steps if isinstance(s, ModuleBlock)]
        config: JsonDict = {
            "architectures": [self.architecture],
            "auto_map": self.auto_map,
            "tie_word_embeddings": self._is_tied(),
            "num_hidden_layers": len(layers),
        }
        if self.vocabulary is not None:
            config["vocab_size"] = self.vocabulary.size(self.vocabulary.axes[0])
        logits = self.program.outputs.get("logits")
        if logits is not None and logits.item is not None and logits.item.op == "scale":
            config["logit_scale"] = logits.item.attrs["by"]  # vLLM has a head of its own
        if "decoder_tokens" in self.program.inputs:
            config["is_encoder_decoder"] = True
            config["num_hidden_layers"] = sum(b.title.startswith("Decoder") for b in layers)
        for item in self.program.items:
            if item.op in ("attention", "cached_attention"):
                config |= _attention_sizes(item)
                break
        sizes = {
            size
            for item in self.program.items
            for var in item.results
            for axis, size in zip(var.axes, var.sizes, strict=True)
            if axis == "embed" and size is not None
        }
        if len(sizes) == 1:
            config["hidden_size"] = sizes.pop()
        return config

    def base_text(self) -> list[str]:
        """Return the configuration and the class that the models share."""
        layers = [d.name for d in self.classes.definitions if d.base != "nn.Module"]
        plan = tensor_parallel_plan(self.program, self.steps, self.base)
        experts = expert_parallel_plan(self.steps, self.base)
        has_base = len(self.texts) > 1 and self.architecture != "StMoeForCausalLM"
        parts: dict[str, str | list[str]] = {
            "plan": [
                *(["base_model_tp_plan = {", *plan, "}"] if plan else []),
                *(["base_model_ep_plan = {", *experts, "}"] if experts else []),
            ],
            "prefix": literal(self.base or ("model" if has_base else "")),
            "main_input": []
            if self.main_input == "input_ids"
            else [f"main_input_name = {literal(self.main_input)}"],
            "layers": ", ".join(f'"{name}"' for name in layers),
            "embedding": [f'_input_embed_layer = "{self.embedding}"']
            if self.embedding != DEFAULT_EMBEDDING
            else [],
            "plain": ["_supports_flash_attn = True", "_supports_attention_backend = True"]
            if all(map(_is_plain, self.program.items))
            else [],
        }
        return filled(BASE, parts)


def _padding_rejected(fault: str, mask: str = "attention_mask") -> list[str]:
    """Return the lines that reject a mask of padding."""
    return [f"if {mask} is not None and not {mask}.all():", f'    raise ValueError("{fault}")']


def _is_plain(item: Item) -> bool:
    """Whether attention has no bias, window or mask that a kernel is not told of."""
    if item.op not in ("attention", "cached_attention"):
        return True
    words = item.attrs["given"]
    assert isinstance(words, tuple), "words"
    further = set(words) - {"mask", "cache", KWARGS}
    shared = item.attrs.get("is_shared")
    return not further and not shared and not item.attrs["window"] and not item.attrs["cap"]


def _attention_sizes(item: Item) -> JsonDict:
    query, key = item.operands[:2]
    count = 1
    for name in ("kv_head", "query_group", "head"):
        count *= query.size(name) if name in query.axes else 1
    heads = next((n for n in ("kv_head", "head") if n in key.axes), None)
    return {
        "num_attention_heads": count,
        "num_key_value_heads": key.size(heads) if heads else 1,
        "head_dim": query.size(str(item.attrs["over"])),
    }


def _output_class(names: Sequence[str], base: str, name: str = "StMoeOutput") -> list[str]:
    return [
        "@dataclass",
        f"class {name}({base}):",
        *(f"    {field}: torch.Tensor | None = None" for field in names),
    ]
