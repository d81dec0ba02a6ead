"""The declarations of operations: methods that build them, and typed attributes."""

from moecc.ir import I32, OPS, Builder, Graph, tensor
from moecc.ir.ops.slots import SlotsOp


def test_a_common_class_reads_every_operation_with_the_trait():
    classes = {entry.name: entry.declared for entry in OPS.values()}
    assigning = {n for n, c in classes.items() if c is not None and issubclass(c, SlotsOp)}
    assert assigning == {entry.name for entry in OPS.values() if entry.assigns_slots}
    graph = Graph()
    chosen = graph.input("chosen", tensor(I32, seq=4, choice=2))
    slots = Builder(graph).node("assign_slots", chosen, tokens="seq", experts=4)
    assert SlotsOp.of_node(slots).tokens == ("seq",)
    assert SlotsOp.of_node(slots).groups == 1
