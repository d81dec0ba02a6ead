"""Write the model card (README.md) of an export, and read the licence of the source's card.

Nothing is invented: if the source's card states no licence, the new card has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moecc.checkpoint.files import file_fault, read_bounded
from moecc.errors import InputError, printable
from moecc.types.dtypes import DTYPES

CARD_NAME = "README.md"
GENERATION = "text-generation"
"""The Hub's task of a decoder-only model."""

TAGS = ("moe", "upcycled", "moecc")
_MAX_CARD_BYTES = 4 << 20
_LICENCE_KEYS = ("license", "license_name", "license_link")
_PLAIN_SCALAR = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    Attributes:
      title: the name of the output.
      family_from: the family of the source.
      family_to: the family that was written.
      pipeline: the passes, as a pipeline string.
      preserves: the contract of the pipeline, in words.
      dtype: the element type that was written.
      seed: of the random numbers.
      parameters: the number of parameters.
      active_parameters: the number of parameters used per token.
      moecc_version: the version that wrote it.
      task: the Hub's pipeline tag, if there is one.
      auto_class: the transformers class that loads it; None if only moecc does.
      base_model: the source on the Hub, if known.
      licence: the licence keys of the source's card.
      digests: SHA-256 of the weight files or the source's, by name.
      notes: remarks for readers, e.g. that the source was quantised.
      story: where the source was trained, how it came about, a sentence a stage.
    """

    title: str
    family_from: str
    family_to: str
    pipeline: str
    preserves: str
    dtype: str
    seed: int
    parameters: int
    active_parameters: int
    moecc_version: str
    task: str | None = GENERATION
    auto_class: str | None = "AutoModelForCausalLM"
    base_model: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    story: tuple[str, ...] = ()


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [
        _front_matter(facts),
        f"# {_escape(facts.title)}",
        _summary(facts),
        _notes(facts),
        "## Load it",
        _snippet(facts),
        "## How it was made",
        "\n".join(f"{n}. {_escape(line)}" for n, line in enumerate(facts.story, 1)),
        _recipe(facts),
        _digests(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_licence(folder: Path) -> dict[str, str]:
    """Return the licence keys in the front matter of a folder's README.md; empty without any."""
    card = folder / CARD_NAME
    if not card.is_file() or file_fault(card, folder):
        return {}
    try:
        text = read_bounded(card, _MAX_CARD_BYTES).decode("utf-8")
    except (InputError, UnicodeDecodeError):
        return {}  # a card is for people: a broken one does not stop a conversion
    return licence_of_card(text)


def licence_of_card(text: str) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of a card's front matter."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line, following in zip(lines[1:], [*lines[2:], "---"], strict=True):
        if line.strip() == "---":
            break
        key, colon, value = line.partition(":")
        if colon and key in _LICENCE_KEYS:
            listed = following.strip() if following.strip().startswith("- ") else ""
            found[key] = _unquoted(value.strip() or listed.removeprefix("- ").strip())
    return {key: value for key, value in found.items() if value}


def hub_repository(path: Path) -> str | None:
    """Return the ``owner/name`` of a folder in the Hugging Face cache, or None elsewhere."""
    for above in path.absolute().parents:
        owner_and_name = above.name.removeprefix("models--").split("--")
        if above.name.startswith("models--") and len(owner_and_name) <= 2:
            return "/".join(owner_and_name)
    return None


def _unquoted(item: str) -> str:
    if len(item) >= 2 and item[0] == item[-1] and item[0] in "'\"":
        return item[1:-1]
    if item.startswith("[") and item.endswith("]"):
        return _unquoted(item[1:-1].split(",")[0].strip())
    return item.split(" #")[0].strip()


def _scalar(value: str) -> str:
    """Print a YAML scalar, quoted unless it is plainly a word (JSON strings are YAML)."""
    plain = _PLAIN_SCALAR.fullmatch(value) and value.lower() not in ("true", "false", "null", "no")
    return value if plain else json.dumps(value)


def _front_matter(facts: CardFacts) -> str:
    lines = ["---"]
    lines += [
        f"{key}: {_scalar(facts.licence[key])}" for key in _LICENCE_KEYS if key in facts.licence
    ]
    if facts.base_model:
        lines += ["base_model:", f"- {_scalar(facts.base_model)}"]
    lines += [f"library_name: {'transformers' if facts.auto_class else 'moecc'}"]
    lines += [f"pipeline_tag: {facts.task}"] if facts.task else []
    lines += ["tags:", *(f"- {tag}" for tag in TAGS), "---"]
    return "\n".join(lines)


def _summary(facts: CardFacts) -> str:
    base = f"`{_code(facts.base_model)}`" if facts.base_model else f"a {facts.family_from} model"
    kind = f"`{facts.family_from}`" if facts.story else f"dense, `{facts.family_from}`"
    after = (
        "It was trained, and then converted; how it came about is told below."
        if facts.story
        else "It was converted, not trained further."
    )
    return (
        f"A sparse mixture of experts in the `{facts.family_to}` layout, made from {base} "
        f"({kind}) with moecc {facts.moecc_version}. {after}\n\n"
        f"- Parameters: {facts.parameters:,}, of which a token meets "
        f"{facts.active_parameters:,}\n"
        f"- Element type: {facts.dtype}\n"
        f"- What the conversion preserves: {_escape(facts.preserves)}"
    )


def _notes(facts: CardFacts) -> str:
    return "\n".join(f"- {_escape(note)}" for note in facts.notes)


def _snippet(facts: CardFacts) -> str:
    if facts.auto_class is not None:
        lines = _with_transformers(facts)
    elif facts.task == GENERATION:
        lines = _generating(facts)
    else:
        lines = _running(facts)
    return "\n".join(["```python", *lines, "```"])


def _folder(facts: CardFacts) -> str:
    return f"folder = {json.dumps(facts.title)}  # where these files are"


def _with_transformers(facts: CardFacts) -> list[str]:
    lines = [
        f"from transformers import {facts.auto_class}, AutoTokenizer",
        "",
        _folder(facts),
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = {facts.auto_class}.from_pretrained(folder, dtype="auto")',
    ]
    if facts.task != GENERATION:
        return lines
    return [
        *lines,
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


def _generating(facts: CardFacts) -> list[str]:
    return [
        "from moecc.tasks.generate import generate",
        "from moecc.model.open import open_model",
        "",
        _folder(facts),
        "with open_model(folder) as model:",
        '    print(generate(model, "Once upon a time", 20))',
    ]


def _running(facts: CardFacts) -> list[str]:
    return [
        "from moecc.backend import get_backend",
        "from moecc.model.inputs import default_inputs",
        "from moecc.model.open import open_model",
        "",
        _folder(facts),
        "with open_model(folder) as model:",
        '    program = get_backend("xla").compile(model.graph)',
        "    inputs = default_inputs(model.graph)  # random ones",
        "    outputs = program.run(model.params(), inputs)",
        "print({name: array.shape for name, array in outputs.items()})",
    ]


def _recipe(facts: CardFacts) -> str:
    dtype = f" --dtype {facts.dtype}" if facts.dtype in DTYPES else ""
    return (
        f"```\nmoecc convert SOURCE OUT -p '{_code(facts.pipeline)}' "
        f"--to {facts.family_to} --seed {facts.seed}{dtype}\n```\n\n"
        "`moecc verify` compares every tensor with `moecc_manifest.json`."
    )


def _digests(facts: CardFacts) -> str:
    if not facts.digests:
        return ""
    rows = [f"| `{_code(name)}` | `{digest}` |" for name, digest in facts.digests.items()]
    return "\n".join(["| file | sha256 |", "|---|---|", *rows])


def _escape(text: str) -> str:
    """Escape untrusted text for Markdown: one line, no markup, no control characters."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(text, 1000))


def _code(text: str) -> str:
    """Escape untrusted text for use between backticks."""
    return printable(text, 1000).replace("`", "'").replace("|", "\\|")
