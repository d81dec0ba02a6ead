"""Faults of the weights themselves."""

from __future__ import annotations

import numpy as np

from moecc.types import F16

from .place import DOWN, mixture, tensors, tensors_converted
from .rows import row
from .spoil import bare_names, by_template, in_odd_places, next_number

KPROJ = "model.layers.0.self_attn.k_proj.weight"

ROWS = [
    row(
        39,
        "a weight that is not finite",
        1,
        rf"{DOWN}[^~]*(nan|inf) at \[1, 2\]",
        *(
            tensors_converted(lambda t, v=v: t[DOWN].__setitem__((1, 2), v))
            for v in (np.nan, np.inf)
        ),
    ),
    row(
        40,
        "a value that the type to write has not",
        1,
        r"values overflow f16[^~]*bf16 or f32",
        tensors_converted(lambda t: t[DOWN].__setitem__((1, 2), 1e30), dtype=F16),
    ),
    row(
        40,
        "weights that are zero, equal or tiny",
        0,
        "",
        tensors_converted(lambda t: t[DOWN].fill(0.0)),
        tensors_converted(lambda t: t[DOWN].fill(1e-40)),
    ),
    row(
        41,
        "tensors that are missing, strange and misnamed",
        1,
        r"is missing[^~]*no such tensor|names lack 'model.'|no tensor of the layers 0",
        tensors(lambda t: (t.pop(KPROJ), t.update(extra=np.zeros(3, "f")))),
        tensors(bare_names),
        tensors(lambda t: bare_names(t, "model.language_model.")),
    ),
    row(42, "several types in one model", 0, "", in_odd_places),
    row(
        44,
        "8-bit weights without scales",
        0,
        "8-bit weights without scales",
        by_template("F8_E4M3"),
    ),
    row(
        45,
        "experts that are not all there",
        1,
        r"experts\.\d\.w\d\.weight: this tensor is missing",
        mixture(lambda t, c: t.pop("model.layers.0.block_sparse_moe.experts.3.w3.weight")),
        mixture(lambda t, c: c.update(num_local_experts=5)),
        mixture(next_number),
    ),
]
