"""Further models beside the one that is opened, of the same architecture and tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from moecc.checkpoint.adapter import AdaptedCheckpoint, is_adapter
from moecc.checkpoint.several import SeveralCheckpoints
from moecc.checkpoint.source import Checkpoint
from moecc.errors import InputError, Problem, UsageError
from moecc.families.configs import ModelConfig, parse_config
from moecc.ir.graph import Graph
from moecc.model.open import Model, open_model
from moecc.weights.branches import BASE, STATISTICS
from moecc.weights.expr import sources

TOKENIZER = "tokenizer.json"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_FREE = {"dtype", "extra", "max_position_embeddings", "router_aux_loss_coef",
         "router_jitter_noise", "output_router_logits"}  # fmt: skip
"""The fields of a config that models of one architecture may differ in."""

_TAKEN = {BASE: "SOURCE itself", STATISTICS: "the statistics of --capture"}

_SHOWN = 8
"""So many differing tensors of a branch are reported."""


def parse_branches(words: Sequence[str]) -> dict[str, str]:
    """Return the folders of branches by name, from ``name=DIR``.

    Raises:
      UsageError: a word has another form, or a name is used twice or reserved.
    """
    found: dict[str, str] = {}
    problems = []
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or not place or not _NAME.fullmatch(name):
            problems.append(Problem("not a model with a name", "--experts", "NAME=DIR", word))
        elif name in _TAKEN:
            what = f"{name} is the name of {_TAKEN[name]}"
            problems.append(Problem(what, "--experts", "another name", word))
        elif name in found:
            problems.append(Problem("two models have the same name", "--experts", found=word))
        else:
            found[name] = place
    if problems:
        raise UsageError(problems)
    return found


def add_branches(
    model: Model, places: Mapping[str, str], *, allow_other_base: bool = False
) -> None:
    """Open further models, whose weights then are read beside those of `model`.

    Args:
      model: the base; its checkpoint becomes one of them all.
      places: by name, what `open_model` takes, or the folder of a LoRA adapter.
      allow_other_base: whether an adapter may name another model as its own.

    Raises:
      InputError: a model cannot be opened, or differs in architecture or tokenizer; all problems
        of all models at once.
    """
    if not places:
        return
    base = model.checkpoint
    if base is None:
        raise InputError(f"{model.name} has no weights", hint="give a checkpoint")
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for name, place in places.items():
        try:
            opened[name] = _open(model.graph, base, place, allow_other_base=allow_other_base)
        except InputError as error:
            problems += error.problems
    if problems:
        for checkpoint in opened.values():
            checkpoint.close()
        raise InputError(problems)
    model.checkpoint = SeveralCheckpoints(base, opened)


def _open(graph: Graph, base: Checkpoint, place: str, *, allow_other_base: bool) -> Checkpoint:
    if is_adapter(Path(place)):
        return AdaptedCheckpoint(base, Path(place), allow_other_base=allow_other_base)
    other = open_model(place)
    if other.checkpoint is None:
        raise InputError(f"{place} has no weights", hint="give a checkpoint")
    problems = [*_differences(graph, base, other), *_tokenizer_problems(base, other.checkpoint)]
    if problems:
        other.checkpoint.close()
        raise InputError(problems)
    return other.checkpoint


def _differences(graph: Graph, base: Checkpoint, other: Model) -> Iterator[Problem]:
    """Yield how another model's config and tensors differ from those of the base."""
    checkpoint = other.checkpoint
    assert checkpoint is not None, "it was opened with weights"
    problems = [*_config_problems(base, checkpoint)]
    yield from problems
    if problems:
        return  # the tensors differ in consequence
    wanted, there = _shapes(graph), _shapes(other.graph)
    wrong = [name for name in wanted if there.get(name) != wanted[name]]
    for name in wrong[:_SHOWN]:
        yield Problem(
            "the models differ in a tensor", f"{checkpoint.path}: {name}",
            f"{wanted[name]}, as in {base.path}", str(there.get(name, "no such tensor")),
        )  # fmt: skip
    if len(wrong) > _SHOWN:
        yield Problem(f"and {len(wrong) - _SHOWN:,} more tensors", str(checkpoint.path))


def _shapes(graph: Graph) -> dict[str, tuple[int | None, ...]]:
    weights = (value.weight for value in graph.params.values() if value.weight is not None)
    return {source.name: source.type.shape for weight in weights for source in sources(weight)}


def _config_problems(base: Checkpoint, other: Checkpoint) -> Iterator[Problem]:
    ours, theirs = (parse_config(c.config, str(c.path)) for c in (base, other))
    if type(ours) is not type(theirs):
        yield Problem(
            "the models are of different families", str(other.path),
            f"{ours.model_type}, as {base.path}", theirs.model_type,
        )  # fmt: skip
        return
    for key in _compared(ours):
        expected, found = getattr(ours, key), getattr(theirs, key)
        if expected != found:
            yield Problem(
                "the models differ in their architecture", f"{other.path}: {key}",
                f"{expected}, as in {base.path}", str(found),
            )  # fmt: skip


def _compared(config: ModelConfig) -> list[str]:
    """Return the fields in which models of one architecture agree."""
    names = [field.name for field in fields(config)]
    return [name for name in names if name not in _FREE]


def _tokenizer_problems(base: Checkpoint, other: Checkpoint) -> Iterator[Problem]:
    """Yield a problem if both have a tokenizer, and a token has another number in the other."""
    ours, theirs = (_tokens(checkpoint) for checkpoint in (base, other))
    if ours is None or theirs is None or ours == theirs:
        return
    token = next(t for t in (*ours, *theirs) if ours.get(t) != theirs.get(t))
    many = sum(ours.get(t) != theirs.get(t) for t in {*ours, *theirs})
    yield Problem(
        f"the tokenizers differ, in {many:,} tokens", f"{other.path}: {TOKENIZER}",
        f"{token!r} is {ours.get(token, 'no token')}, as in {base.path}",
        f"{theirs.get(token, 'no token')}", "experts must mean the same by a token",
    )  # fmt: skip


def _tokens(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return the tokens of a checkpoint's tokenizer with their numbers, None without one."""
    content = checkpoint.companions().get(TOKENIZER)
    if content is None:
        return None
    try:
        data = json.loads(content.read_bytes() if isinstance(content, Path) else content)
        vocab = data["model"]["vocab"]
        pairs = (
            vocab.items() if isinstance(vocab, dict) else ((v[0], n) for n, v in enumerate(vocab))
        )
        added = ((entry["content"], entry["id"]) for entry in data.get("added_tokens") or ())
        return dict((*pairs, *added))
    except (ValueError, KeyError, TypeError, IndexError, OSError):
        return None
