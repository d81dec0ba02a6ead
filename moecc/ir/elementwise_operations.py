"""A method for each elementwise operation of the table.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.ir.attributes import (
        Precision,
    )
    from moecc.ir.graph import Value

# fmt: off


class ElementwiseOperations(ABC):
    """The elementwise part of what a builder makes."""

    @abstractmethod
    def value(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> Value:
        """Make the only result of the operation `op`."""

    @abstractmethod
    def values(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> tuple[Value, ...]:
        """Make the results of the operation `op`, of which the first may be named."""

    def silu(self, x: Value, /, *, name: str | None = None) -> Value:
        """x · sigmoid(x)."""
        return self.value("silu", x, name=name)

    def gelu(self, x: Value, /, *, name: str | None = None) -> Value:
        """x · Φ(x), with the error function."""
        return self.value("gelu", x, name=name)

    def gelu_tanh(self, x: Value, /, *, name: str | None = None) -> Value:
        """GELU by its tanh approximation (Hendrycks and Gimpel 2016)."""
        return self.value("gelu_tanh", x, name=name)

    def relu(self, x: Value, /, *, name: str | None = None) -> Value:
        """max(x, 0)."""
        return self.value("relu", x, name=name)

    def sigmoid(self, x: Value, /, *, name: str | None = None) -> Value:
        """1 / (1 + exp(−x))."""
        return self.value("sigmoid", x, name=name)

    def tanh(self, x: Value, /, *, name: str | None = None) -> Value:
        """The hyperbolic tangent."""
        return self.value("tanh", x, name=name)

    def exp(self, x: Value, /, *, name: str | None = None) -> Value:
        """The exponential."""
        return self.value("exp", x, name=name)

    def log(self, x: Value, /, *, name: str | None = None) -> Value:
        """The natural logarithm."""
        return self.value("log", x, name=name)

    def square(self, x: Value, /, *, name: str | None = None) -> Value:
        """x²."""
        return self.value("square", x, name=name)

    def rsqrt(self, x: Value, /, *, name: str | None = None) -> Value:
        """1 / √x."""
        return self.value("rsqrt", x, name=name)

    def normal_cdf(self, x: Value, /, *, name: str | None = None) -> Value:
        """Φ(x), the distribution function of a standard normal variable."""
        return self.value("normal_cdf", x, name=name)

    def pointwise(self, x: Value, /, *, function: str, name: str | None = None) -> Value:
        """A function of each element that has no operation of its own, as a formula of a."""
        return self.value("pointwise", x, name=name, function=function)

    def neg(self, x: Value, /, *, name: str | None = None) -> Value:
        """−x."""
        return self.value("neg", x, name=name)

    def scale(self, x: Value, /, *, by: float, name: str | None = None) -> Value:
        """x times a constant."""
        return self.value("scale", x, name=name, by=by)

    def stop_gradient(self, x: Value, /, *, name: str | None = None) -> Value:
        """x, through which no gradient flows."""
        return self.value("stop_gradient", x, name=name)

    def add(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a + b."""
        return self.value("add", a, b, name=name)

    def sub(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a − b."""
        return self.value("sub", a, b, name=name)

    def mul(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a · b."""
        return self.value("mul", a, b, name=name)

    def div(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a / b."""
        return self.value("div", a, b, name=name)

    def maximum(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """The larger of a and b."""
        return self.value("maximum", a, b, name=name)

    def minimum(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """The smaller of a and b."""
        return self.value("minimum", a, b, name=name)

    def cast(self, x: Value, /, *, dtype: str, name: str | None = None) -> Value:
        """x in another element type, to nearest even; from a float to an integer, towards zero."""
        return self.value("cast", x, name=name, dtype=dtype)

    def select(self, condition: Value, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a where the condition holds, b elsewhere."""
        return self.value("select", condition, a, b, name=name)

    def mask(
        self, x: Value, keep: Value, /, *, fill: float = float("-inf"), name: str | None = None
    ) -> Value:
        """x where the mask keeps it, a constant elsewhere."""
        return self.value("mask", x, keep, name=name, fill=fill)

    def less(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """Whether a < b."""
        return self.value("less", a, b, name=name)

    def equal(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """Whether a = b."""
        return self.value("equal", a, b, name=name)

    def weight_rows(
        self, rows: Value, row_gates: Value, /, *, precision: Precision = "f32",
        name: str | None = None
    ) -> Value:
        """Each row times its gate, in the type of the rows."""
        return self.value("weight_rows", rows, row_gates, name=name, precision=precision)
