"""What kernels of Pallas multiply."""

from __future__ import annotations

from math import prod

from moecc_backends.xla.aot.hlo import Computation, Instruction
from moecc_backends.xla.kernels.score_pairs import score_pairs_of

_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products of the size of the scores of a kernel, by the beginning of its name: scores and values;
in a gradient scores and their gradient, and with these the gradient of queries or of keys, and with
the scores that of values."""

_FLOATS = ("bf16", "f32")
"""The types that these kernels compute in, as HLO spells them."""


def pallas_flops(where: Computation, made: Instruction) -> int | None:
    """Return the FLOPs of a kernel of attention; None of any other kernel.

    Two for each pair of a query and a key, entry of a head, and product.
    """
    products = next((n for name, n in _PRODUCTS.items() if name in made.source), None)
    pairs = score_pairs_of(made.source)
    if products is None or pairs is None:
        return None
    operands = (where.operand(made, i).shapes[0] for i in range(len(made.operands)))
    # Queries are the first numbers; the integers before say which blocks are skipped.  A batch of
    # one sequence has no axis.
    queries = next(shape.sizes for shape in operands if shape.dtype in _FLOATS)
    return 2 * products * pairs * prod(queries[:-2]) * queries[-1]
