"""The batch that a step takes: how many sequences, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.errors import InputError, UsageError
from moecc.ir.graph import Graph
from moecc.ir.indices import length_bounds

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
    """

    sequences: int
    lengths: tuple[tuple[str, int], ...]

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one sequence, of encoder and decoder together; where sizes are fixed, one."""
        return sum(length for _, length in self.lengths) or 1

    @property
    def tokens(self) -> int:
        """Tokens of the batch; where all sizes are fixed, its inputs."""
        return self.sequences * self.sequence_tokens

    def size(self, variable: str) -> int:
        """Return the size that a variable of the graph stands for."""
        return dict(self.lengths).get(variable, self.sequences)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse the lengths of ``--sequence``: ``4096``, or ``512,114``.

    Raises:
      UsageError: they are no numbers of tokens.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(p.isdecimal() and 0 < int(p) < 10**8 for p in parts):
        raise UsageError("not lengths of a sequence", expected="4096, or 512,114", found=text)
    return tuple(map(int, parts))


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
      devices: for the default: at least so many sequences, and 4,096 tokens a device.
      tokens: of the batch, encoder and decoder together.
      lengths: of one sequence, by stack.
      micro_batches: parts of the batch.

    Raises:
      InputError: the graph has another number of lengths, or fewer positions, or the batch is not
        whole sequences, or not as many in each micro-batch.
    """
    names, most = length_variables(graph), length_bounds(graph)
    if lengths is None:
        usual = ENCDEC_LENGTHS if len(names) == 2 else (DECODER_LENGTH,) * len(names)
        lengths = tuple(min(n, most.get(v, n)) for v, n in zip(names, usual, strict=True))
    if len(lengths) != len(names):
        expected = f"{len(names)}, of {' and '.join(names)}" if names else "none"
        raise InputError(
            "another number of sequence lengths", expected=expected, found=str(len(lengths))
        )
    longer = [v for v, n in zip(names, lengths, strict=True) if n > most.get(v, n)]
    if longer:
        raise InputError(
            "sequences are longer than the model has positions",
            expected=" and ".join(f"{v} at most {most[v]}" for v in longer),
            found=",".join(map(str, lengths)),
        )
    each = sum(lengths) or 1
    if tokens is None:
        tokens = devices * each * max(1, TOKENS_PER_DEVICE // each)
    if tokens % each or tokens < each:
        near = max(1, round(tokens / each)) * each
        raise InputError(
            "the batch is not whole sequences",
            expected=f"a multiple of {each} tokens", found=str(tokens),
            hint=f"{near} would be",
        )  # fmt: skip
    sequences, odd = divmod(tokens // each, micro_batches)
    if odd:
        raise InputError(
            "the batch is not whole micro-batches",
            expected=f"a multiple of {micro_batches} sequences", found=str(tokens // each),
            hint=f"{max(1, sequences) * micro_batches * each} would be",
        )  # fmt: skip
    return Batch(sequences, tuple(zip(names, lengths, strict=True)))
