"""A method for each elementwise operation of the table.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.ir.graph import Node, Value

# fmt: off


def names_of(name: str | None) -> tuple[str, ...]:
    """Return the names of results of which the first may be named."""
    return () if name is None else (name,)


class ElementwiseOperations(ABC):
    """The elementwise part of what a builder makes."""

    @abstractmethod
    def node(
        self, op: str, /, *operands: Value, names: tuple[str, ...] = (), **attrs: object
    ) -> Node:
        """Make a node of the operation `op`."""

    def silu(self, x: Value, /, *, name: str | None = None) -> Value:
        """x · sigmoid(x)."""
        return self.node("silu", x, names=names_of(name)).result

    def gelu(self, x: Value, /, *, name: str | None = None) -> Value:
        """x · Φ(x), with the error function."""
        return self.node("gelu", x, names=names_of(name)).result

    def gelu_tanh(self, x: Value, /, *, name: str | None = None) -> Value:
        """GELU by its tanh approximation (Hendrycks and Gimpel 2016)."""
        return self.node("gelu_tanh", x, names=names_of(name)).result

    def relu(self, x: Value, /, *, name: str | None = None) -> Value:
        """max(x, 0)."""
        return self.node("relu", x, names=names_of(name)).result

    def sigmoid(self, x: Value, /, *, name: str | None = None) -> Value:
        """1 / (1 + exp(−x))."""
        return self.node("sigmoid", x, names=names_of(name)).result

    def tanh(self, x: Value, /, *, name: str | None = None) -> Value:
        """The hyperbolic tangent."""
        return self.node("tanh", x, names=names_of(name)).result

    def exp(self, x: Value, /, *, name: str | None = None) -> Value:
        """The exponential."""
        return self.node("exp", x, names=names_of(name)).result

    def log(self, x: Value, /, *, name: str | None = None) -> Value:
        """The natural logarithm."""
        return self.node("log", x, names=names_of(name)).result

    def square(self, x: Value, /, *, name: str | None = None) -> Value:
        """x²."""
        return self.node("square", x, names=names_of(name)).result

    def rsqrt(self, x: Value, /, *, name: str | None = None) -> Value:
        """1 / √x."""
        return self.node("rsqrt", x, names=names_of(name)).result

    def normal_cdf(self, x: Value, /, *, name: str | None = None) -> Value:
        """Φ(x), the distribution function of a standard normal variable."""
        return self.node("normal_cdf", x, names=names_of(name)).result

    def pointwise(self, x: Value, /, *, function: str, name: str | None = None) -> Value:
        """A function of each element that has no operation of its own, as a formula of a."""
        return self.node("pointwise", x, names=names_of(name), function=function).result

    def neg(self, x: Value, /, *, name: str | None = None) -> Value:
        """−x."""
        return self.node("neg", x, names=names_of(name)).result

    def scale(self, x: Value, /, *, by: float, name: str | None = None) -> Value:
        """x times a constant."""
        return self.node("scale", x, names=names_of(name), by=by).result

    def stop_gradient(self, x: Value, /, *, name: str | None = None) -> Value:
        """x, through which no gradient flows."""
        return self.node("stop_gradient", x, names=names_of(name)).result

    def add(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a + b."""
        return self.node("add", a, b, names=names_of(name)).result

    def sub(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a − b."""
        return self.node("sub", a, b, names=names_of(name)).result

    def mul(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a · b."""
        return self.node("mul", a, b, names=names_of(name)).result

    def div(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a / b."""
        return self.node("div", a, b, names=names_of(name)).result

    def maximum(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """The larger of a and b."""
        return self.node("maximum", a, b, names=names_of(name)).result

    def minimum(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """The smaller of a and b."""
        return self.node("minimum", a, b, names=names_of(name)).result

    def cast(self, x: Value, /, *, dtype: str, name: str | None = None) -> Value:
        """x in another element type, to nearest even; from a float to an integer, towards zero."""
        return self.node("cast", x, names=names_of(name), dtype=dtype).result

    def select(self, condition: Value, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """a where the condition holds, b elsewhere."""
        return self.node("select", condition, a, b, names=names_of(name)).result

    def mask(
        self, x: Value, keep: Value, /, *, fill: float = float("-inf"), name: str | None = None
    ) -> Value:
        """x where the mask keeps it, a constant elsewhere."""
        return self.node("mask", x, keep, names=names_of(name), fill=fill).result

    def less(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """Whether a < b."""
        return self.node("less", a, b, names=names_of(name)).result

    def equal(self, a: Value, b: Value, /, *, name: str | None = None) -> Value:
        """Whether a = b."""
        return self.node("equal", a, b, names=names_of(name)).result
