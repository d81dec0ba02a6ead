"""What `docs/exactness.md` says of copies, virtual groups, shared experts and scales, in float64.

Whether a conversion is exact is decided here apart from the pass, from the lemmas alone.
"""

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moecc.errors import InputError

from .dense_blocks import EXACT, Dense, error, tokens, upcycled

VISIBLE = 1e-4
"""What is said to be inexact is off by more than this, unless a block is too small."""

ANY_ROUTER = ("renormalised", "sigmoid-renormalised", "ones")
ZERO_ROUTER = ("softmax", "sigmoid", "switch", "sparsemixer")
HOMOGENEOUS = ("relu", "relu2")
STDS = (0.0, 0.02, 1.0)


def sum_of_gates(options):
    """Return Σ w for a zero router, from the table of the lemmas."""
    n, k = options["experts"], options["top_k"]
    of_zero = {
        "renormalised": 1.0,
        "sigmoid-renormalised": 1.0,
        "ones": float(k),
        "softmax": k / n,
        "switch": 1 / n,
        "sigmoid": k / 2,
        "sparsemixer": 1 / n + (1 / (n - 1) if k == 2 else 0.0),
    }
    return of_zero[options["gates"]] * options.get("gate_scale", 1.0)


def is_exact(dense, options):
    """Return whether the lemmas call the conversion exact; None where it must be refused."""
    scale = options.get("granularity", 1) / sum_of_gates(options)
    placement = options.get("scale_placement", "down")
    if abs(scale - 1) > 1e-12:
        if placement == "up-down" and not dense.gated and dense.act != "relu":
            return None
        if placement == "cube-root" and dense.act not in HOMOGENEOUS:
            return False
    keeps_all = options["gates"] == "softmax" and options["top_k"] == options["experts"]
    return options["gates"] in ANY_ROUTER or keeps_all or options.get("router_std") == 0


def check(dense, options, count=12, visible=VISIBLE):
    """Check a conversion against the lemmas and what the pass says.

    What is said to be inexact is off by at least `visible`.
    """
    graph, expected = dense.graph(), is_exact(dense, options)
    if expected is None:
        with pytest.raises(InputError, match="linear in none"):
            upcycled(graph, **options)
        return
    after, result = upcycled(graph, **options)
    off = error(graph, after, tokens(dense, count))
    if result.preserves.kind == "approximate":
        assert result.preserves.reason
    else:
        assert result.preserves.kind == "reassociation"
        assert off <= EXACT, (dense, options)
    assert off <= EXACT if expected else off >= visible, (dense, options)


SHAPES = [  # (experts, top_k, granularity)
    (4, 1, 1),
    (4, 2, 1),
    (8, 2, 2),
    (6, 4, 2),
    (3, 3, 3),  # no choice is left, so softmax gates add up to 1
]


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("gates", ANY_ROUTER + ZERO_ROUTER)
def test_every_convention_is_exact_where_the_lemmas_say_so(gates, std):
    for (n, k, g), shared in product(SHAPES, (0.0, 0.5)):
        if (gates == "switch" and k != 1) or (gates == "sparsemixer" and (k > 2 or g > 1)):
            continue
        options = {"experts": n, "top_k": k, "granularity": g, "shared": shared}
        check(Dense(), {**options, "gates": gates, "router_std": std})


@st.composite
def conversions(draw):
    """Draw a block and a plan that suits it; square shapes are frequent."""
    groups = draw(st.integers(1, 3))
    slices = draw(st.sampled_from([1, 1, 2, 3]))
    copies = draw(st.integers(groups, groups + 3))
    gates = draw(st.sampled_from(ANY_ROUTER + ZERO_ROUTER))
    neurons = slices * draw(st.integers(1, 4))
    shared = draw(st.integers(0, 3))
    mlp = neurons + shared
    embed = draw(st.sampled_from([mlp, 2 * mlp, max(1, mlp // 2)]) | st.integers(1, 8))
    assume(gates != "sparsemixer" or (groups <= 2 and slices == 1))
    assume(gates != "switch" or groups * slices == 1)
    assume(copies * slices > 1)
    dense = Dense(
        embed=embed,
        mlp=mlp,
        gated=draw(st.booleans()),
        act=draw(st.sampled_from(["silu", "gelu", "relu", "relu2"])),
        bias_in=draw(st.booleans()),
        bias_out=draw(st.booleans()),
        transposed=draw(st.booleans()),
        layers=draw(st.integers(1, 2)),
        residual=draw(st.booleans()),
    )
    options = {
        "experts": copies * slices,
        "top_k": groups * slices,
        "granularity": slices,
        "shared": shared / mlp,
        "gates": gates,
        "gate_scale": draw(st.sampled_from([1.0, 2.5])),
        "router_std": draw(st.sampled_from(STDS)),
        "router_init": draw(st.sampled_from(["normal", "uniform", "truncated-normal"])),
        "scale_placement": draw(st.sampled_from(["down", "up-down", "cube-root"])),
    }
    return dense, options


@given(conversions())
def test_what_is_exact_is_exact_at_every_size(drawn):
    check(*drawn, count=4, visible=0.0)
