"""Which collectives of a scheduled program have computation beside them.

In the text of a compiled program the order of instructions is the order in which a device begins
them.  A collective that is one instruction is waited for.  One that has a start and a done runs
while what stands between them does; and a TPU writes some as a chain of fusions, of which those in
the middle compute.  Only products and kernels count: what else stands there is soon done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from moecc_backends.xla.aot.hlo import Computation, Instruction


def overlapped(
    where: Computation, chains: Mapping[str, str], multiplying: Collection[str]
) -> frozenset[str]:
    """Return the names of instructions whose collectives run beside a product.

    Args:
      where: a computation, in the order of its schedule.
      chains: of instructions that are parts of a collective, what its parts have in common.
      multiplying: the names of instructions that multiply, loops and calls included.
    """
    order = list(where)
    at = {made.name: number for number, made in enumerate(order)}
    busy = [made.name in multiplying for made in order]
    found = {
        made.name
        for made in order
        if made.opcode.endswith("-start") and any(busy[at[made.name] + 1 : _end(order, at, made)])
    }
    for chain in set(chains.values()):
        parts = [name for name, of in chains.items() if of == chain]
        numbers = [at[name] for name in parts]
        if any(busy[min(numbers) : max(numbers) + 1]):
            found.update(parts)
    return frozenset(found)


def _end(order: list[Instruction], at: Mapping[str, int], start: Instruction) -> int:
    """Return the number of the instruction that waits for what `start` began.

    That is the end where nothing here does: another turn of a loop waits.
    """
    last, waits = start, True
    while waits:
        following = next(_waiting(order, at, last), None)
        if following is None:
            return len(order)
        last, waits = following, following.opcode.endswith("-update")
    return at[last.name]


def _waiting(
    order: list[Instruction], at: Mapping[str, int], begun: Instruction
) -> Iterator[Instruction]:
    for made in order[at[begun.name] + 1 :]:
        if made.opcode.endswith(("-done", "-update")) and begun.name in made.operands:
            yield made
