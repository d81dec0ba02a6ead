"""Where the blocks of a module stand: as a module, or between the first and the last product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from moecc_backends.jaxpr.blocks import BlockMiss, BlockSlice
from moecc_backends.jaxpr.survey import Survey
from moecc_backends.jaxpr.views import NotABlock, scope_of
from moecc_backends.torch_export.lowering import (
    ExportedModule,
    FxNode,
    ModuleCall,
    TracedTensor,
    module_calls,
    node_line,
    node_values,
    operation_name,
)
from moecc_backends.torch_source.modules import BlockPlace

_TRIVIAL = frozenset(
    f"aten.{name}"
    for name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "contiguous", "alias",
                 "clone", "to", "_to_copy", "type_as", "_assert_tensor_metadata")
)  # fmt: skip
"""Operations that change no element, apart from the number of its bits."""


@dataclass(frozen=True)
class BlockRegion:
    """The nodes of a block.

    Attributes:
      ups: its first products.
      down: its last product.
      nodes: all its nodes.
    """

    ups: tuple[FxNode, ...]
    down: FxNode
    nodes: frozenset[FxNode]

    @classmethod
    def of(cls, block: BlockSlice, nodes: Mapping[str, FxNode]) -> BlockRegion:
        """Return the nodes of a block of equations."""
        products = [nodes[scope_of(e.eqn)[0]] for e in block.equations if e.weight is not None]
        *ups, down = products
        named = {nodes[name] for e in block.equations if (name := scope_of(e.eqn)[0]) in nodes}
        after = _reached(ups, lambda node: node.users)
        before = _reached([down], lambda node: node.all_input_nodes)
        return cls(tuple(ups), down, frozenset((after & before) | named))


def _reached(starts: Iterable[FxNode], step: Any) -> set[FxNode]:
    nodes, stack = set(starts), list(starts)
    while stack:
        new = [n for n in step(stack.pop()) if n not in nodes]
        nodes.update(new)
        stack += new
    return nodes


def _values(node: FxNode) -> list[Any]:
    """Return the tensors that a node computes."""
    return [value for value in node_values(node) if hasattr(value, "is_floating_point")]


class Placer:
    """Finds where blocks stand in a module.

    Args:
      model: the module.
      exported: its graph.
    """

    def __init__(self, model: Any, exported: ExportedModule) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        paths: dict[int, list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            paths[id(module)].append(path)
        self._paths = paths
        self._exported = exported
        self._nodes = exported.nodes
        self._members: dict[ModuleCall, set[FxNode]] = defaultdict(set)
        for node in exported.graph.nodes:
            if node.op == "call_function":
                for call in module_calls(node):
                    self._members[call].add(node)

    def places(self, survey: Survey) -> dict[str, BlockPlace]:
        """Return where the blocks stand, by location; those that have no place are near misses."""
        keyed = {}
        for site in list(survey.sites):
            try:
                keyed[site.keys[0]] = self._place(site.slice)
            except NotABlock as reason:
                survey.refuse(site, str(reason))
        instances = survey.instances()
        return {
            instances[key].loc: BlockPlace(instances[key].loc, *position)
            for key, position in keyed.items()
            if key in instances
        }

    def _place(self, block: BlockSlice) -> tuple[str, str, dict[str, int], float, tuple[str, ...]]:
        region = BlockRegion.of(block, self._nodes)
        self._check_rows(block, region)
        rate, down = self._dropout(region), (self._weight_name(region.down),)
        path = self._whole_module(region)
        if path is not None:
            return path, "", {}, rate, down
        x = self._input(region.ups[0])
        is_outside = module_calls(x) != module_calls(region.ups[0])
        if is_outside and tuple(x.meta["val"].shape) != self._rows(region):
            self._exported.flattened.add(x)
        ups = [self._product_module(node, region) for node in region.ups]
        last, _ = self._product_module(region.down, region)
        paths = [*(name for name, _ in ups), last]
        if twice := [name for name in paths if paths.count(name) > 1]:
            raise NotABlock(f"the module {twice[0]} of a product runs twice in it: run it once")
        order = list(self._exported.graph.nodes).index
        first = min(region.ups, key=order)
        widths = {
            "" if node is first else name: width
            for node, (name, width) in zip(region.ups, ups, strict=True)
        }
        return ups[region.ups.index(first)][0], last, widths, rate, down

    def _check_rows(self, block: BlockSlice, region: BlockRegion) -> None:
        """Raise NotABlock unless products sum over the last axis, that of a token's features."""
        rank = len(block.x.shape)
        if block.outer != rank - 1 or block.order != tuple(range(rank)):
            raise NotABlock("its products do not sum over the last axis of its input")
        x_node = self._input(region.ups[0])
        bits = x_node.meta["val"].dtype.itemsize
        values = [value for node in region.nodes for value in _values(node)]
        for value in values:
            if value.is_floating_point() and value.dtype.itemsize < bits:
                raise NotABlock(f"a cast to {value.dtype} is inside, narrower than its input")
        x = self._traced(x_node)
        if x is not None and x.feature is not None and x.feature != len(x.shape) - 1:
            raise NotABlock(
                "its products sum over an axis of tokens: it mixes them, and routes none"
            )

    def _traced(self, node: FxNode) -> TracedTensor | None:
        value = self._exported.traced.get(node)
        return value if isinstance(value, TracedTensor) else None

    def _is_weight(self, node: FxNode) -> bool:
        value = self._traced(node)
        return value is not None and value.is_weight

    def _is_constant(self, node: FxNode) -> bool:
        return self._exported.sources.get(node, ("", ""))[0] == "constant"

    def _input(self, product: FxNode) -> FxNode:
        """Return the operand of a product that is no weight."""
        data = [n for n in product.all_input_nodes if not self._is_weight(n)]
        if len(data) != 1:
            raise NotABlock("a product inside it takes several values")
        return data[0]

    def _weight_name(self, product: FxNode) -> str:
        stack = list(product.all_input_nodes)
        names = []
        while stack:
            node = stack.pop()
            kind, name = self._exported.sources.get(node, ("", ""))
            if kind == "parameter" and len(node.meta["val"].shape) > 1:
                names.append(name)
            elif self._is_weight(node):
                stack += node.all_input_nodes
        return names[0]

    def _dropout(self, region: BlockRegion) -> float:
        """Return the rate of the dropout before the last product."""
        drops = {
            node: float(node.args[1])
            for node in region.nodes
            if operation_name(node) == "aten.dropout" and node.args[1] > 0
        }
        node = self._input(region.down)
        keep = 1.0
        while operation_name(node) in _TRIVIAL or operation_name(node) == "aten.dropout":
            keep *= 1 - drops.pop(node, 0.0)
            node = node.all_input_nodes[0]
        if drops:
            raise NotABlock("dropout inside it is not before its last product: move it there")
        return 1 - keep

    # Modules.

    def _whole_module(self, region: BlockRegion) -> str | None:
        """Return the module that computes just the block, where there is one."""
        paths = [module_calls(node) for node in region.nodes]
        shared = [calls[0] for calls in zip(*paths, strict=False) if len(set(calls)) == 1]
        if not shared or not shared[-1].path:
            return None
        call = shared[-1]
        members = self._members[call]
        strange = [n for n in members - region.nodes if not self._is_idle(n)]
        ends = self._ends(members)
        if strange or ends is None:
            return None
        before, after = (node.meta["val"].shape for node in ends)
        is_alike = tuple(before) == tuple(after) == self._rows(region)
        if not is_alike or not self._takes_one_value(call.path):
            return None
        return self._sole_path(call.path)

    def _takes_one_value(self, path: str) -> bool:
        parameters = signature(type(self._modules[path]).forward).parameters.values()
        return sum(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters) == 2

    def _is_idle(self, node: FxNode) -> bool:
        """Whether a node only prepares a weight, or changes no element."""
        is_off = operation_name(node) == "aten.dropout" and not node.args[1]
        return is_off or self._is_weight(node) or operation_name(node) in _TRIVIAL

    def _rows(self, region: BlockRegion) -> tuple[int, ...]:
        value = self._traced(self._input(region.ups[0]))
        return () if value is None else tuple(value.array.shape)

    def _sole_path(self, path: str) -> str:
        paths = self._paths[id(self._modules[path])]
        if len(paths) > 1:
            raise NotABlock(f"its module has several names, {' and '.join(paths)}: give it one")
        return path

    def _ends(self, members: set[FxNode]) -> tuple[FxNode, FxNode] | None:
        """Return what nodes read from outside, and what is used there, where it is one each."""
        inputs = {
            n for node in members for n in node.all_input_nodes
            if n not in members and not self._is_weight(n) and not self._is_constant(n)
        }  # fmt: skip
        outputs = {node for node in members if any(u not in members for u in node.users)}
        return (inputs.pop(), outputs.pop()) if len(inputs) == len(outputs) == 1 else None

    def _product_module(self, product: FxNode, region: BlockRegion) -> tuple[str, int]:
        """Return the module that computes just a product, and the width of its result.

        Raises:
          NotABlock: there is none.
        """
        call = module_calls(product)[-1]
        members = self._members[call]
        products = {n for n in members if n in region.ups or n is region.down}
        strange = [
            n for n in members
            if n not in region.nodes and not self._is_idle(n)
        ]  # fmt: skip
        ends = self._ends(members)
        is_input = ends is not None and (
            product is region.down or tuple(ends[0].meta["val"].shape) == self._rows(region)
        )
        if not call.path or strange or len(products) > 1 or ends is None or not is_input:
            name = self._weight_name(product)
            raise NotABlock(
                f"the product of {name} is no module of its own, and no module is just the block: "
                "write it as nn.Linear, or the block as a module"
            )
        if not self._takes_one_value(call.path):
            raise NotABlock(f"the module {call.path} of a product takes further arguments")
        return self._sole_path(call.path), int(ends[1].meta["val"].shape[-1])


# Products that no search of blocks sees.


def unseen_products(exported: ExportedModule) -> Iterator[BlockMiss]:
    """Yield operations with weights that are no parameters, or that torch.export does not show."""
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        name = operation_name(node)
        if name in ("aten.linear", "aten.addmm", "aten.matmul", "aten.mm"):
            buffers = _buffers_of(
                node.all_input_nodes[-1 if name != "aten.linear" else 1], exported
            )
            if buffers:
                reason = "its weight is made of buffers, as of a quantised layer: give parameters"
                yield BlockMiss(buffers, reason, node_line(node))
        elif getattr(node.target, "namespace", "aten") not in _NAMESPACES:
            sources = (exported.sources.get(n, ("", "")) for n in node.all_input_nodes)
            weights = tuple(leaf for kind, leaf in sources if kind == "parameter")
            if weights:
                reason = f"its products may be inside `{name}`, a kernel that shows none"
                yield BlockMiss(weights, reason, node_line(node))


_NAMESPACES = ("aten", "prims", "prim", "higher_order")


def _buffers_of(weight: FxNode, exported: ExportedModule) -> tuple[str, ...]:
    """Return the buffers that a weight is made of; nothing where it is made of other values."""
    leaves = [n for n in _reached([weight], lambda n: n.all_input_nodes) if n.op == "placeholder"]
    if not leaves or not all(leaf in exported.buffers for leaf in leaves):
        return ()
    return tuple(sorted(exported.buffers[leaf] for leaf in leaves))
