"""Operations as methods; ``operations.pyi`` beside this file declares them for type checkers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from moecc.ir.operation import op as find_op

if TYPE_CHECKING:
    from moecc.ir.graph import Value


class Operations(ABC):
    """The methods of a builder: one for each operation of the table.

    Operands are given by position, attributes and the name of the result by keyword.  A method
    returns the result, or a tuple where there are several.
    """

    @abstractmethod
    def values(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> tuple[Value, ...]:
        """Make the results of the operation `op`, of which the first may be named."""

    def __getattr__(self, name: str) -> Callable[..., Value | tuple[Value, ...]]:
        if name.startswith("_"):
            raise AttributeError(name)
        entry = find_op(name)

        def emit(*operands: Value, name: str | None = None, **attrs: object) -> object:
            results = self.values(entry.name, *operands, name=name, **attrs)
            return results if entry.has_body or len(entry.results) > 1 else results[0]

        return emit  # type: ignore[return-value]
