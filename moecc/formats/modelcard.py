"""Write the model card (README.md) of an export.

Nothing is invented: if the source's card states no licence, the new card has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from moecc.errors import InputError, printable
from moecc.formats.files import file_fault, read_bounded
from moecc.formats.gguf.storage import FILE_NAME as GGUF_NAME
from moecc.support.text import both

# What is kept of a source's model card: licence, language, data sets, the model it came from.
#
# A card begins with metadata in YAML, of which only plain scalars and lists of them are read.

CARD_NAME = "README.md"
CardEntries = dict[str, tuple[str, ...]]
"""The values of the front matter of a card, by key; of keys of `GATE` the lines of YAML."""
TASK = "pipeline_tag"
LICENSE, SCALARS = "license", ("license_name", "license_link")
LISTS = ("language", "datasets")
GATE = "extra_gated_"
"""The beginning of keys with the terms that a reader of the Hub accepts, kept as they are."""
_MAX_CARD_BYTES = 4 << 20


def read_card(folder: Path) -> CardEntries:
    """Return what is kept of the card of a folder; empty without one."""
    card = folder / CARD_NAME
    if not card.is_file() or file_fault(card, folder):
        return {}
    try:
        text = read_bounded(card, _MAX_CARD_BYTES).decode("utf-8")
    except (InputError, UnicodeDecodeError):
        return {}  # a card is for people: a broken one does not stop a conversion
    return front_matter(text)


def front_matter(text: str) -> CardEntries:
    """Return what is kept of the front matter of a card."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), len(lines))
    card: CardEntries = {}
    for at, line in enumerate(lines[1:end], 1):
        key, colon, value = line.partition(":")
        if colon and key.startswith(GATE) and key.removeprefix(GATE).isidentifier():
            gate = (value, *takewhile(lambda x: not x or x[0] in " -", lines[at + 1 : end]))
            card[key] = gate if all(line.isprintable() for line in gate) else ()
        elif colon and key in (TASK, LICENSE, *SCALARS, *LISTS):
            value = value.strip()
            if value.startswith("[") and value.endswith("]"):
                texts = value[1:-1].split(",")
            elif value:
                texts = [value]
            else:  # a list that begins on the next line
                below = (line.strip() for line in lines[at + 1 : end])
                texts = [text[2:] for text in takewhile(lambda text: text.startswith("- "), below)]
            items = [item for text in texts if (item := _unquoted(text.strip()))]
            card[key] = tuple(items[:1] if key in SCALARS else items)
    return {key: values for key, values in card.items() if values}


def _unquoted(item: str) -> str:
    if len(item) >= 2 and item[0] == item[-1] and item[0] in "'\"":
        return item[1:-1]
    return item.split(" #")[0].strip()


GENERATION, SIMILARITY = "text-generation", "sentence-similarity"
"""The Hub's task of a decoder-only model, and of an encoder that was trained to compare texts."""


_TEXT_TASKS = (GENERATION, "text2text-generation", "text-classification", "token-classification",
               "fill-mask", "feature-extraction", SIMILARITY)  # fmt: skip
"""The tasks whose models read a text."""

_PLAIN_SCALAR = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    Attributes:
      title: the name of the output.
      source: the name of the source.
      family_from: the family of the source.
      family_to: the family that was written.
      command: the command that made it, with every option that decides the result.
      receipt: what was promised, what was measured, what runs it; a line each.
      dtype: the element type that was written.
      parameters: the number of parameters.
      active_parameters: the number of parameters used per token.
      moecc_version: the version that wrote it.
      task: the Hub's pipeline tag, if there is one.
      code: the file with the program of the model; empty if a library has it.
      inputs: the name, sizes and element type of each input of that program.
      auto_class: the transformers class that loads it; None if only moecc does.
      has_tokenizer: whether a tokenizer is beside the output.
      is_sparse: whether the output has experts.
      is_upcycled: whether they were made of dense blocks.
      base_models: the models on the Hub that it is made from, as far as they are known.
      relation: what the output is of it, in the Hub's words.
      source_card: the values that are copied from the card of the source.
      engines: a row for each engine: name and version, whether it runs the model, why not.
      serving: what else to know about serving it.
      training: how to train it on.
      file: the GGUF file in the folder, if it is one.
      notes: remarks for readers, e.g. that the source was quantised.
      story: how the source came about, a sentence a stage.
      proof: the files of the proof beside it, its log first; empty without one.
      is_trained: whether the source was trained by moecc, or by a loop beside it.
    """

    title: str
    source: str
    family_from: str
    family_to: str
    command: str
    receipt: tuple[str, ...]
    dtype: str
    parameters: int
    active_parameters: int
    moecc_version: str
    task: str | None = GENERATION
    code: str = ""
    inputs: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    auto_class: str | None = "AutoModelForCausalLM"
    has_tokenizer: bool = True
    is_sparse: bool = True
    is_upcycled: bool = True
    base_models: tuple[str, ...] = ()
    relation: str = "finetune"
    source_card: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    engines: tuple[tuple[str, bool, str], ...] = ()
    serving: str = ""
    training: str = ""
    file: str = ""
    notes: tuple[str, ...] = ()
    story: tuple[str, ...] = ()
    is_trained: bool = False
    proof: tuple[str, ...] = ()


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [
        _front_matter(facts),
        f"# {_escape(facts.title)}",
        _summary(facts),
        "\n".join(f"- {_escape(note)}" for note in facts.notes),
        "## Load it",
        _snippet(facts),
        _code_remark(facts),
        *_engines(facts),
        *(["## Train it on", facts.training] if facts.training else []),
        "## How it was made",
        "\n".join(f"{n}. {_escape(line)}" for n, line in enumerate(facts.story, 1)),
        f"```\n{_code(facts.command)}\n```",
        "`moecc verify` compares every tensor with `moecc_manifest.json`.",
        f"`moecc-check {' '.join(map(_code, facts.proof))}` checks the proof."
        if facts.proof
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merged_cards(cards: Sequence[CardEntries]) -> CardEntries:
    """Return what is kept of the cards of models that become one: all values, the first gate."""
    merged: CardEntries = {}
    for card in cards:
        for key, values in card.items():
            others = () if key.startswith(GATE) and key in merged else values
            merged[key] = tuple(dict.fromkeys((*merged.get(key, ()), *others)))
    return merged


def source_name(path: Path) -> str:
    """Return the name of a model for readers: on the Hub, else of its folder or file."""
    if (repository := hub_repository(path)) is not None:
        return repository.rpartition("/")[2]
    return path.parent.name if path.name == GGUF_NAME else path.name


def hub_repository(path: Path) -> str | None:
    """Return the ``owner/name`` of a folder in the Hugging Face cache, or None elsewhere."""
    for above in path.absolute().parents:
        owner_and_name = above.name.removeprefix("models--").split("--")
        if above.name.startswith("models--") and len(owner_and_name) <= 2:
            return "/".join(owner_and_name)
    return None


def _scalar(value: str) -> str:
    """Print a YAML scalar, quoted unless it is plainly a word (JSON strings are YAML)."""
    plain = _PLAIN_SCALAR.fullmatch(value) and value.lower() not in ("true", "false", "null", "no")
    return value if plain else json.dumps(value)


def _front_matter(facts: CardFacts) -> str:
    lines = ["---"]
    for key in (key for key in (LICENSE, *SCALARS, *LISTS) if key in facts.source_card):
        values = facts.source_card[key]
        if key in SCALARS or (key == LICENSE and len(values) == 1):
            lines.append(f"{key}: {_scalar(', '.join(values))}")
        else:
            lines += [f"{key}:", *(f"- {_scalar(value)}" for value in values)]
    for key in (key for key in facts.source_card if key.startswith(GATE)):
        value, *below = facts.source_card[key]
        lines += [f"{key}:{value}", *below]
    if facts.base_models:
        lines += ["base_model:", *(f"- {_scalar(name)}" for name in facts.base_models)]
        lines += [f"base_model_relation: {facts.relation}"]
    library = "gguf" if facts.file else "transformers" if facts.auto_class else "moecc"
    lines += [f"library_name: {library}"]
    lines += [f"pipeline_tag: {facts.task}"] if facts.task else []
    tags = [*["moe"] * facts.is_sparse, *["upcycled"] * facts.is_upcycled, "moecc"]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _summary(facts: CardFacts) -> str:
    base = both([f"`{_code(name)}`" for name in facts.base_models or (facts.source,)])
    kind = "A sparse mixture of experts" if facts.is_sparse else "A dense model"
    after = (
        "It was trained, and then converted: its history is below."
        if facts.is_trained
        else "It was converted, not trained further."
    )
    return (
        f"{kind} in the `{facts.family_to}` layout, made from {base} "
        f"(`{facts.family_from}`) with moecc {facts.moecc_version}. {after}\n\n"
        f"- Parameters: {facts.parameters:,}, of which a token meets "
        f"{facts.active_parameters:,}\n"
        f"- Element type: {facts.dtype}\n"
        + "\n".join(f"- {_escape(line)}" for line in facts.receipt)
    )


def _engines(facts: CardFacts) -> list[str]:
    """Return the section on engines: a table, and what else is to be known."""
    if not facts.engines and not facts.serving:
        return []
    rows = [
        f"| {_escape(name)} | {'yes' if runs else 'no'} | {_escape(why)} |"
        for name, runs, why in facts.engines
    ]
    head = ["| engine | runs it | how, or what it does not do |", "|---|---|---|"]
    table = ["\n".join([*head, *rows])] if rows else []
    return ["## Serve it", *table, *([_escape(facts.serving)] if facts.serving else [])]


_WHERE = "  # where these files are, or "
_LOADED = re.compile(rf'^folder = ".*"{_WHERE}(hf://)?ORG/NAME of the Hub$'.encode(), re.MULTILINE)


def published_card(card: bytes, repository: str) -> bytes:
    """Return a card whose code loads the model from a repository of the Hub, ``owner/name``."""
    return _LOADED.sub(rb'folder = "\g<1>%b"' % repository.encode(), card)


def _snippet(facts: CardFacts) -> str:
    if facts.file and not facts.has_tokenizer:
        return (
            "The file has no tokenizer: programs that give token ids themselves run it.\n\n"
            f"```\nmoecc run {facts.file} --outputs logits.npy\n```"
        )
    if facts.file:
        return f'```\nllama-cli -m {facts.file} -p "Once upon a time" -n 20\n```'
    name = "ORG/NAME" if facts.auto_class is not None else "hf://ORG/NAME"
    folder = f"folder = {json.dumps(facts.title)}{_WHERE}{name} of the Hub"
    is_generator = facts.task == GENERATION and facts.has_tokenizer
    if facts.auto_class is not None:
        trust = ", trust_remote_code=True" if facts.code else ""
        lines = [
            f"from transformers import {facts.auto_class}{', AutoTokenizer' * facts.has_tokenizer}",
            "",
            folder,
            *[f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"] * facts.has_tokenizer,
            f'model = {facts.auto_class}.from_pretrained(folder, dtype="auto"{trust})',
        ]
        if facts.has_tokenizer and facts.task in _TEXT_TASKS:
            lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
            lines.append(
                "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
                if facts.task.endswith("generation")
                else "outputs = model(**inputs)"
            )
    elif facts.code:
        module = facts.code.removesuffix(".py")
        lines = [
            "import jax.numpy as jnp",
            "",
            f"import {module}  # the file beside this card",
            "",
            f"params = {module}.load({json.dumps(facts.title)})  # where these files are",
            *(f"{n} = jnp.ones({sizes}, {json.dumps(type)})" for n, sizes, type in facts.inputs),
            f"outputs = {module}.apply(params, {', '.join(f'{n}={n}' for n, *_ in facts.inputs)})",
        ]
    elif is_generator:
        lines = [
            "import moecc",
            "",
            folder,
            "with moecc.open(folder) as model:",
            '    print(model.generate("Once upon a time", 20))',
        ]
    else:
        lines = [
            "from moecc.backend import get_backend",
            "from moecc.model.inputs import default_inputs",
            "from moecc.model.open import open_model",
            "",
            folder,
            "with open_model(folder) as model:",
            '    program = get_backend("xla").compile(model.graph)',
            "    inputs = default_inputs(model.graph)  # random ones",
            "    outputs = program.run(model.params(), inputs)",
            "print({name: array.shape for name, array in outputs.items()})",
        ]
    return "\n".join(["```python", *lines, "```"])


def _code_remark(facts: CardFacts) -> str:
    """Return the remark on the code that loading the model runs."""
    if not facts.code:
        return ""
    code = f"`{_code(facts.code)}`"
    program = (
        f"`trust_remote_code=True` runs {code}, the classes of this model, which "
        "imports torch and transformers alone and opens neither a file nor a connection."
        if facts.auto_class is not None
        else f"{code} imports jax and numpy alone, and opens no file but the tensors."
    )
    return (
        f"{program} It is "
        "yours to read and to edit. As written it is a function of the graph in `config.json`: "
        "`moecc verify` writes it again and compares. moecc itself reads the graph, and never "
        "runs the file."
    )


def _escape(text: str) -> str:
    """Escape untrusted text for Markdown: one line, no markup, no control characters."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(text, 1000))


def _code(text: str) -> str:
    """Escape untrusted text for use between backticks."""
    return printable(text, 1000).replace("`", "'").replace("|", "\\|")
