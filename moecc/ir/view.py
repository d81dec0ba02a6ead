"""Typed views of the attributes of a node; `moecc.ir.attributes` has one for each operation.

    ContractAttrs.of_node(node).over

is a tuple of names to mypy, where ``node.attrs["over"]`` could be anything.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn, Self, dataclass_transform

from moecc.ir.operand import Attrs, Definition
from moecc.types import Size

Names = str | tuple[str, ...]
"""Names of axes, or words; a single one needs no parentheses."""

Sizes = tuple[tuple[str, Size], ...]
"""Axes with their sizes."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class View:
    """The attributes of a node as they were when it was looked at; a base class.

    A checker reads the annotations of a subclass as the fields of a frozen dataclass.  Making sixty
    real ones would cost each start of the command line some 20 ms.

    Attributes:
      operations: the names of the operations that have these attributes.
    """

    operations: ClassVar[frozenset[str]]

    @classmethod
    def of_node(cls, node: Definition) -> Self:
        """Return the attributes of `node`.

        Raises:
          TypeError: it is another operation.
        """
        if node.op.name not in cls.operations:
            names = ", ".join(sorted(cls.operations))
            raise TypeError(f"{cls.__name__} views {names}, not {node.op.name}")
        return cls.of_attrs(node.attrs)

    @classmethod
    def of_attrs(cls, attrs: Attrs) -> Self:
        """Return `attrs`, the complete ones of such a node."""
        view = cls.__new__(cls)
        view.__dict__.update(attrs)
        return view

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a view is for reading; attributes are set in node.attrs")
