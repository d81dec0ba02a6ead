"""What a conversion did: blocks, near misses with reasons, what stayed JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from moecc_backends.islands.jaxprs import AnyArray


@dataclass(frozen=True)
class BlockReport:
    """A block of a function.

    Attributes:
      loc: its location.
      line: where it is in the user's program.
      operations: what it computes, the names of operations in order.
      is_converted: whether the pipeline changed it.
    """

    loc: str
    line: str
    operations: str
    is_converted: bool

    def __str__(self) -> str:
        state = "converted" if self.is_converted else "left as it is"
        place = f" ({self.line})" if self.line else ""
        return f"{self.loc}: {state}, {self.operations}{place}"


@dataclass(frozen=True)
class Report:
    """A conversion.

    Attributes:
      function: the name of the function.
      pipeline: the passes.
      preserves: what they promise.
      blocks: the blocks, in order.
      misses: what is nearly a block, and why it is none.
      unused: the parameters that the function does not use.
      remarks: the notes of the passes.
      equations: how many equations the function has, those of blocks apart.
      elements_before: the elements of the parameters before.
      elements_after: and afterwards.
      line: where the function is in the user's program.
    """

    function: str
    pipeline: str
    preserves: str
    blocks: tuple[BlockReport, ...] = ()
    misses: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    equations: int = 0
    elements_before: int = 0
    elements_after: int = 0
    line: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, AnyArray]) -> Report:
        """Return the report that `to_json` wrote."""
        blocks = tuple(BlockReport(**block) for block in found["blocks"])
        lists = {n: tuple(found[n]) for n in ("misses", "unused", "remarks")}
        return cls(**{**found, **lists, "blocks": blocks})

    def __str__(self) -> str:
        count = sum(b.is_converted for b in self.blocks)
        lines = [
            f"{self.function}: {count} of {len(self.blocks)} blocks converted by {self.pipeline}",
            f"preserves {self.preserves}",
            f"parameters: {self.elements_before:,} → {self.elements_after:,}",
            f"stayed JAX: {self.equations:,} equations",
            *(f"  {block}" for block in self.blocks),
        ]
        if self.misses:
            lines += ["not converted:", *(f"  {miss}" for miss in self.misses)]
        if self.unused:
            by = f" by {self.line}" if self.line else ""
            lines.append(f"not used{by}: {', '.join(self.unused)}")
        if self.remarks:
            lines += ["remarks:", *(f"  {r}" for r in self.remarks)]
        return "\n".join(lines)
