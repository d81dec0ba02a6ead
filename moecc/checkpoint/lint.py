"""Findings about a checkpoint that stop no conversion, and that no reader should have to find.

Token ids that the model has no row for, a tokenizer with more tokens than the embedding has rows,
and 8-bit weights whose scales are missing all load without complaint elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from moecc.checkpoint.files import read_bounded
from moecc.checkpoint.jsonfile import parse_json
from moecc.checkpoint.source import Checkpoint
from moecc.errors import InputError, printable
from moecc.support.untyped import Json

MAX_TOKENIZER_BYTES = 64 << 20
_MAX_SETTINGS_BYTES = 1 << 20
_MAX_VALUES = 1 << 23
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
_EIGHT_BITS = ("f8e4m3fn", "f8e5m2")


def findings(checkpoint: Checkpoint, vocabulary: int | None) -> list[str]:
    """Return a line for each finding.

    Args:
      checkpoint: the opened checkpoint; of its weights only the headers are looked at.
      vocabulary: the rows of the embedding, if they are known.
    """
    if vocabulary is None:
        return list(_unscaled(checkpoint))
    return [
        *_wrong_ids("config.json", checkpoint.config, vocabulary),
        *_companion_findings(checkpoint.companions(), vocabulary),
        *_unscaled(checkpoint),
    ]


def _companion_findings(files: Mapping[str, Path | bytes], vocabulary: int) -> Iterator[str]:
    settings = _json(files.get("generation_config.json"), _MAX_SETTINGS_BYTES)
    yield from _wrong_ids("generation_config.json", settings, vocabulary)
    largest = _largest_token(_json(files.get("tokenizer.json"), MAX_TOKENIZER_BYTES))
    if largest >= vocabulary:
        yield (
            f"tokenizer.json: the token {largest} has no row in the embedding of {vocabulary:,} "
            "rows; a text with it cannot be run"
        )


def _wrong_ids(name: str, settings: Json, vocabulary: int) -> Iterator[str]:
    for key in _IDS:
        stated = settings.get(key)
        for number in stated if isinstance(stated, list) else [stated]:
            if type(number) is int and not 0 <= number < vocabulary:
                shown = printable(str(number), 40)
                yield f"{name}: {key} {shown} is no token of a vocabulary of {vocabulary:,}"


def _largest_token(tokenizer: Json) -> int:
    """Return the largest id of a tokenizer, or −1 if it has none that can be read."""
    model = tokenizer.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens")
    found = [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    if isinstance(pieces, dict):
        found += pieces.values()
    elif isinstance(pieces, list):  # Unigram: pairs in the order of their ids
        found.append(len(pieces) - 1)
    return max((number for number in found if type(number) is int), default=-1)


def _json(content: Path | bytes | None, limit_bytes: int) -> Json:
    """Return a JSON object; an empty one for a file that is only copied and cannot be read."""
    if content is None:
        return {}
    try:
        data = read_bounded(content, limit_bytes) if isinstance(content, Path) else content
        parse_json(data, "", max_values=_MAX_VALUES)
        made = json.loads(data)
    except (InputError, ValueError, RecursionError):
        return {}
    return made if isinstance(made, dict) else {}


def _unscaled(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the 8-bit weights that lack scales: their values are only right up to a factor."""
    narrow = [n for n, info in checkpoint.tensors.items() if info.dtype.name in _EIGHT_BITS]
    scales = {n.rpartition(".")[0] for n in checkpoint.tensors if "scale" in n.rpartition(".")[2]}
    bare = [name for name in narrow if name.rpartition(".")[0] not in scales]
    if bare:
        first = printable(bare[0])
        more = f" and {len(bare) - 1:,} more" if len(bare) > 1 else ""
        yield f"8-bit weights without scales, read as they are: {first}{more}"
