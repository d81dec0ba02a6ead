"""Equal layers within a body, which become a loop of their own.

One layer in four is sparse, so a body that repeats is a block of four layers, of which three are
alike.  Those that are alike and follow one another need to be lowered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from moecc.ir.graph import Graph, Value
from moecc.ir.table.slots import is_slots
from moecc_backends.xla.lower.segments import Segment, layer_of, segments

Each = tuple[Value, ...]
"""A value of every layer, in order."""


@dataclass
class LayerLoop:
    """Layers that are alike, and what flows from one to the next.

    Attributes:
      layers: the layers, in order, two at least.
      carries: what the layer before made, by the number of the output; of the first, from outside.
      stacked: values from outside, another one for each layer.
      captured: values from outside that all of them use.
      collected: the outputs, by number, that something outside uses of other layers than the last.
    """

    layers: list[Segment]
    carries: dict[Each, int] = field(default_factory=dict)
    stacked: list[Each] = field(default_factory=list)
    captured: list[Each] = field(default_factory=list)
    collected: list[int] = field(default_factory=list)

    @property
    def first(self) -> Segment:
        """The layer that stands for all of them."""
        return self.layers[0]

    def output(self, number: int) -> Each:
        """Return an output of every layer."""
        return tuple(layer.outputs[number] for layer in self.layers)


def pieces_of(body: Graph) -> Iterator[Segment | LayerLoop]:
    """Yield `body` piece by piece, in order; layers that are alike as one loop."""
    for (is_layer, *_), group in groupby(segments(body), key=_kind):
        layers = list(group)
        loop = _loop(layers) if is_layer and len(layers) > 1 else None
        if loop is None:
            yield from layers
        else:
            yield loop


def _kind(segment: Segment) -> tuple[object, ...]:
    # Where operands come from, which stands first in a key, is looked at in `_loop`.
    return (layer_of(segment.nodes[0]) is not None, *segment.key[1:])


def _is_alike(each: tuple[Value, ...]) -> bool:
    """Whether the values of all layers have one type, of a size that no routing decides."""
    one = each[0]
    return all(v.type == one.type for v in each) and not (one.type.extents or is_slots(one))


def _loop(layers: list[Segment]) -> LayerLoop | None:
    """Return the loop over `layers`; None where they hang together in another way than a chain."""
    loop = LayerLoop(layers)
    made = {v for layer in layers for v in layer.outputs}
    given = [tuple(each) for each in zip(*(layer.inputs for layer in layers), strict=True)]
    outputs = [loop.output(n) for n in range(len(loop.first.outputs))]
    if not all(map(_is_alike, (*given, *outputs))):
        return None
    for each in given:
        number = next((n for n, some in enumerate(outputs) if each[1:] == some[:-1]), None)
        if number is not None and each[0].type == outputs[number][0].type:
            loop.carries[each] = number
        elif made.intersection(each):
            return None
        elif len(set(each)) == 1:
            loop.captured.append(each)
        else:
            loop.stacked.append(each)
    inside = {node for layer in layers for node in layer.nodes}
    for number, each in enumerate(outputs):
        used = [v for v in each if not v.users.keys() <= inside]
        if used and (used != [each[-1]] or number not in loop.carries.values()):
            loop.collected.append(number)
    return loop
