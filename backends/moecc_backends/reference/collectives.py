"""The meaning of collectives on the global value: the identity.

Their effect on each device is in `moecc_backends.reference.devices`.
"""

from __future__ import annotations

from moecc.ir.table.collectives import COLLECTIVES
from moecc_backends.reference.arrays import Array, meaning


def _identity(x: Array, **attrs: object) -> Array:
    return x


for _name in COLLECTIVES:
    meaning(_name)(_identity)
