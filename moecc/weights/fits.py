"""The expression of a router that is fitted to data."""

from __future__ import annotations

from math import isfinite

from moecc.types.dtypes import F32
from moecc.types.tensor import TensorType
from moecc.weights.expr import Expr, computed, node


@node
class Fitted(Expr):
    """The rows of a router, from covariances of its input.

    ``fitted(covariance, mean, cross, ridge=0.01, std=0.02)``.  With Σ the covariance of the input,
    and c the covariance of the input with what each expert is to score, the rows are those of
    ridge regression, (Σ + λ tr(Σ)/d · I)⁻¹ c; without ``ridge`` they are c itself, which for the
    tokens of several texts is the direction of each text's centroid.  Then what all rows share is
    subtracted, which no softmax sees; so is the part along the mean of the input, so that no
    expert is preferred on average; and they are scaled so that the logits have a standard deviation
    of ``std`` over tokens and experts.  They are rounded to bf16, so that they do not depend on the
    last bits of a library's linear algebra.

    Attributes:
      covariance: of the input, ``[embed, other]``, symmetric.
      mean: of the input, ``[embed]``.
      cross: the covariances with the targets, ``[expert, embed]``.
      ridge: λ, in units of the mean variance of the input; 0 for centroids.
      std: the standard deviation of the logits.
    """

    op = "fitted"
    covariance: Expr
    mean: Expr
    cross: Expr
    ridge: float
    std: float

    def _normalise(self) -> None:
        self._set("ridge", float(self.ridge))
        self._set("std", float(self.std))

    def _infer(self) -> TensorType:
        computed(self, *self.operands)
        embed = self.mean.type.axes
        if self.mean.type.rank != 1 or self.cross.type.axes[1:] != embed:
            raise self.error(
                "the covariances are of the input", expected=f"[expert, {embed[0]}]",
                found=str(self.cross.type),
            )  # fmt: skip
        if self.covariance.type.shape != (embed[0].size, embed[0].size):
            raise self.error(
                "a covariance is a square of the input's axis", expected=f"[{embed[0]}, …]",
                found=str(self.covariance.type),
            )  # fmt: skip
        for name, value in (("ridge", self.ridge), ("std", self.std)):
            if not (isfinite(value) and value >= 0):
                raise self.error(f"{name} is not a size", expected="0 or more", found=str(value))
        return self.cross.type.with_dtype(F32)

    def __str__(self) -> str:
        parts = ", ".join(map(str, self.operands))
        return f"fitted({parts}, ridge={self.ridge!r}, std={self.std!r})"
