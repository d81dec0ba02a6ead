"""The batch that a step takes: how many sequences, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecc.errors import InputError
from moecc.ir.graph import Graph
from moecc.ir.structure import length_bounds

TOKENS_PER_DEVICE = 4096
"""Where no batch is given: so many tokens a device, made whole sequences."""

DECODER_LENGTH = 4096
ENCDEC_LENGTHS = (512, 114)
"""Where no length is given; of an encoder-decoder those of ST-MoE's pre-training (§6)."""


@dataclass(frozen=True)
class Batch:
    """A batch of sequences.

    Attributes:
      sequences: how many.
      lengths: the tokens of one by the variable of the graph, of the encoder before the decoder.
      caches: the variables that are lengths of caches, whose tokens are not those of a step.
    """

    sequences: int
    lengths: tuple[tuple[str, int], ...]
    caches: frozenset[str] = frozenset()

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one sequence, of encoder and decoder together; where sizes are fixed, one."""
        return sum(length for name, length in self.lengths if name not in self.caches) or 1

    @property
    def tokens(self) -> int:
        """Tokens of the batch; where all sizes are fixed, its inputs."""
        return self.sequences * self.sequence_tokens

    def size(self, variable: str) -> int:
        """Return the size that a variable of the graph stands for."""
        return dict(self.lengths).get(variable, self.sequences)


def length_variables(graph: Graph) -> tuple[str, ...]:
    """Return the variables that stand for lengths in `graph`, the encoder's first."""
    found: dict[str, None] = {}
    for value in graph.inputs.values():
        for axis in value.type:
            if axis.name != "batch" and isinstance(axis.size, str):
                found[axis.size] = None
    return tuple(found)


def make_batch(
    graph: Graph,
    devices: int,
    tokens: int | None = None,
    lengths: tuple[int, ...] | None = None,
    micro_batches: int = 1,
) -> Batch:
    """Return a micro-batch of the batch of `tokens` tokens, in sequences of `lengths`.

    Args:
      graph: has the lengths.
      devices: for the default: at least so many sequences, and 4,096 tokens a device, with those
        that caches hold.
      tokens: of the batch, encoder and decoder together.
      lengths: of one sequence, by stack.
      micro_batches: parts of the batch.

    Raises:
      InputError: the graph has another number of lengths, or fewer positions, its caches are too
        short, or the batch is not whole sequences, or not as many in each micro-batch.
    """
    one = _sequence(graph, lengths)
    each = one.sequence_tokens
    if tokens is None:
        held = sum(length for _, length in one.lengths) or 1
        tokens = devices * each * max(1, TOKENS_PER_DEVICE // held)
    if tokens % each or tokens < each:
        near = max(1, round(tokens / each)) * each
        raise InputError(
            "the batch is not whole sequences",
            expected=f"a multiple of {each} tokens", found=str(tokens), hint=f"{near} would be",
        )  # fmt: skip
    sequences, odd = divmod(tokens // each, micro_batches)
    if odd:
        raise InputError(
            "the batch is not whole micro-batches",
            expected=f"a multiple of {micro_batches} sequences", found=str(tokens // each),
            hint=f"{max(1, sequences) * micro_batches * each} would be",
        )  # fmt: skip
    return replace(one, sequences=sequences)


def _sequence(graph: Graph, lengths: tuple[int, ...] | None) -> Batch:
    """Return a batch of one sequence, whose lengths the graph can have."""
    names, most, caches = length_variables(graph), length_bounds(graph), _cache_lengths(graph)
    if lengths is None:
        usual = _usual_lengths(names, caches)
        lengths = tuple(min(n, most.get(v, n)) for v, n in zip(names, usual, strict=True))
    if len(lengths) != len(names):
        expected = f"{len(names)}, of {' and '.join(names)}" if names else "none"
        raise InputError(
            "another number of sequence lengths", expected=expected, found=str(len(lengths))
        )
    one = Batch(1, tuple(zip(names, lengths, strict=True)), caches)
    found = ",".join(map(str, lengths))
    if longer := [name for name, size in one.lengths if size > most.get(name, size)]:
        expected = " and ".join(f"{name} at most {most[name]}" for name in longer)
        what = "sequences are longer than the model has positions"
        raise InputError(what, expected=expected, found=found)
    if short := [name for name in caches if one.size(name) < one.sequence_tokens]:
        expected = f"{short[0]} at least {one.sequence_tokens}"
        raise InputError("caches are shorter than what is put in", expected=expected, found=found)
    return one


def _cache_lengths(graph: Graph) -> frozenset[str]:
    """Return the variables that are lengths of caches: of inputs that are outputs, too."""
    kept = (value for name, value in graph.inputs.items() if name in graph.outputs)
    axes = (axis for value in kept for axis in value.type if axis.name != "batch")
    return frozenset(axis.size for axis in axes if isinstance(axis.size, str))


def _usual_lengths(names: tuple[str, ...], caches: frozenset[str]) -> tuple[int, ...]:
    """Return lengths where none are given; of a graph with caches, one token behind a text."""
    if caches:
        return tuple(DECODER_LENGTH if name in caches else 1 for name in names)
    return ENCDEC_LENGTHS if len(names) == 2 else (DECODER_LENGTH,) * len(names)
