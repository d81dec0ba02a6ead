"""The steps that append one operation, or the few that it needs to be defined everywhere."""

from __future__ import annotations

from moecc.testing.arithmetic import binary as binary
from moecc.testing.arithmetic import cast as cast
from moecc.testing.arithmetic import compare as compare
from moecc.testing.arithmetic import contract as contract
from moecc.testing.arithmetic import contract_pair as contract_pair
from moecc.testing.arithmetic import guarded as guarded
from moecc.testing.arithmetic import norm as norm
from moecc.testing.arithmetic import reduce as reduce
from moecc.testing.arithmetic import unary as unary
from moecc.testing.arithmetic import windows as windows
from moecc.testing.axes import broadcast as broadcast
from moecc.testing.axes import merge as merge
from moecc.testing.axes import rename as rename
from moecc.testing.axes import slice_ as slice_
from moecc.testing.axes import split as split
from moecc.testing.growth import Step
from moecc.testing.places import buckets as buckets
from moecc.testing.places import count as count
from moecc.testing.places import lookup as lookup
from moecc.testing.places import numbers as numbers
from moecc.testing.places import rotary as rotary

SIMPLE: tuple[Step, ...] = (
    unary,
    binary,
    contract,
    norm,
    reduce,
    rename,
    split,
    merge,
    slice_,
    broadcast,
    compare,
    lookup,
    count,
    guarded,
    contract_pair,
    cast,
    rotary,
    numbers,
    buckets,
    windows,
    # There are many functions of one and two numbers, and each should be drawn now and then.
    unary,
    unary,
    binary,
)
"""The steps, from simple to complex."""
