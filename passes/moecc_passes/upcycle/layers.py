"""The selection of layers: the option ``layers`` of ``upcycle``.

``all``; ``every:4`` is layers 3, 7, 11 … as Hugging Face's ``decoder_sparse_step`` counts;
``first:half``, ``last:half``, ``first:6``, ``last:6``, ``middle:6``; a list ``3,7,11``; a glob over
locations, ``layers.1*.ffn``; or ``nowhere``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from moecc.analysis.ffn import FFNBlock, FFNSearch
from moecc.errors import InputError, Problem
from moecc_passes.inputs import is_decoder

FORMS = (
    "all, nowhere, every:N, first:N, first:half, last:N, last:half, middle:N, a list 3,7,11, "
    "or a glob layers.1*.ffn"
)

_COUNT = re.compile(r"(every|first|last|middle):([0-9]{1,9}|half)\Z")
_LIST = re.compile(r"[0-9]{1,9}(?:,[0-9]{1,9})*\Z")


def check_layers(spec: str, option: str = "layers") -> Problem | None:
    """Return the problem of `spec` alone, or None; `option` is the name of the option."""
    if spec in ("all", "nowhere") or _LIST.match(spec):
        return None
    match = _COUNT.match(spec)
    if match is None:
        if any(c in spec for c in "*?[.") and ":" not in spec:
            return None
        return Problem("not a selection of layers", option, expected=FORMS, found=spec)
    word, count = match.groups()
    if word in ("every", "middle") and count == "half":
        return Problem(f"{word}:half cannot be read", option, expected=FORMS, found=spec)
    if count.strip("0") == "":
        return Problem(f"{word}:0 selects no layer", option, expected=FORMS, found=spec)
    return None


def choose(search: FFNSearch, spec: str, decoder_spec: str | None) -> list[FFNBlock]:
    """Return the blocks that the options ``layers`` and ``decoder-layers`` name.

    Args:
      search: the blocks of a graph, and the rejected candidates.
      spec: which layers; with `decoder_spec`, of all but the decoder of an encoder-decoder.
      decoder_spec: the layers of that decoder; None if `spec` is for both stacks.

    Raises:
      InputError: a listed layer does not exist or has no block, or there is no such decoder.
    """
    if decoder_spec is None:
        return select(search.blocks, spec, _total(search))
    stacks = [_stack(search, decoder) for decoder in (False, True)]
    if decoder_spec != "nowhere" and not _total(stacks[1]):
        raise InputError(
            "decoder-layers is about the decoder of an encoder-decoder",
            expected="layers located under decoder.layers",
            found=f"decoder-layers={decoder_spec}, and no such layer",
            hint="use layers for a model with one stack",
        )
    specs = zip(stacks, (spec, decoder_spec), strict=True)
    return [b for stack, one in specs for b in select(stack.blocks, one, _total(stack))]


def _stack(search: FFNSearch, decoder: bool) -> FFNSearch:
    return FFNSearch(
        [b for b in search.blocks if is_decoder(b.loc) == decoder],
        [r for r in search.refusals if is_decoder(r.loc) == decoder],
    )


def _total(search: FFNSearch) -> int:
    """Return the number of layers, from the highest number in a location."""
    layers = [*(b.layer for b in search.blocks), *(r.layer for r in search.refusals)]
    return max((n for n in layers if n is not None), default=len(search.blocks) - 1) + 1


def select(blocks: Sequence[FFNBlock], spec: str, total: int) -> list[FFNBlock]:
    """Return the blocks that `spec` selects.

    Args:
      blocks: the blocks found, in order.
      spec: one of the forms above.
      total: the number of layers of the model, sparse and odd ones included.

    Raises:
      InputError: a listed layer does not exist, or has no block.
    """
    numbered = [(_number(block, i), block) for i, block in enumerate(blocks)]
    if _LIST.match(spec):
        return _listed(numbered, spec)
    if spec in ("all", "nowhere"):
        return list(blocks) if spec == "all" else []
    match = _COUNT.match(spec)
    if match is None:
        return [b for b in blocks if fnmatchcase(b.loc, spec)]
    word, text = match.groups()
    count = total // 2 if text == "half" else int(text)
    if word == "every":
        return [b for n, b in numbered if n % count == count - 1]
    if word == "first":
        return [b for n, b in numbered if n < count]
    if word == "middle":
        # As in flaxformer: with 4 of 12 these are layers 4 to 7.
        return [b for n, b in numbered if total - count <= 2 * n < total + count]
    return [b for n, b in numbered if n >= total - count]


def _listed(numbered: Sequence[tuple[int, FFNBlock]], spec: str) -> list[FFNBlock]:
    wanted = {int(part) for part in spec.split(",")}
    there = {n for n, _ in numbered}
    if not wanted <= there:
        raise InputError(
            f"no feed-forward block to convert in layer {_ranges(sorted(wanted - there))}",
            expected=f"layers with a dense block: {_ranges(sorted(there))}",
            found=f"layers={spec}",
        )
    return [block for n, block in numbered if n in wanted]


def _number(block: FFNBlock, position: int) -> int:
    return position if block.layer is None else block.layer


def _ranges(numbers: Sequence[int]) -> str:
    """Return `numbers`, sorted, with runs shortened: 0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"
