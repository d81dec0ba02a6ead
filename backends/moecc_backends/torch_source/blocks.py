"""Items cut into blocks: what becomes one module each, and in the end one class.

A layer is what has its location.  Within it a router, the experts, an attention or another
module is a block if its items lie together: no path leads out of them and back.
"""

from __future__ import annotations

import heapq
import keyword
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from moecc_backends.torch_source.names import (
    common,
    identifier,
    is_under,
    layer_of,
    numbered_module,
    scope_of,
)
from moecc_backends.torch_source.program import (
    KWARGS,
    ROW,
    Item,
    ProgramValue,
    TorchProgram,
    walk_operands,
)

MOVES = ("dispatch", "dispatch_gates", "combine", "combine_weighted")
ROUTING = ("route", "hash_experts", "expert_choice", "keep_choices", "assign_slots", "top_k_index")
NOISE = ("jitter", "add_noise", "dropout")
CLASS_NAMES = {"ffn": "FeedForward", "extra_ffn": "ExtraFeedForward"}


@dataclass(eq=False)
class ModuleBlock:
    """Items and blocks that are one module.

    Attributes:
      title: the name that its class should have.
      path: the path of its parameters in the checkpoint; empty: it has none.
      steps: its items and blocks, in an order in which they can be computed.
      layer: the stack and number of the layer that it is; None for other blocks.
      attribute: the name of the module in the block around it, where no path names it.
      stack: the name of the stack that it is in: Encoder, Decoder, or empty.
      base: the class that its own extends; by default that of layers, or of modules.
      is_local: whether a device may have a part of its experts.
      shared: the module that it shares with other layers, if there is one.
    """

    title: str
    path: str
    steps: list[Item | ModuleBlock] = field(default_factory=list)
    layer: tuple[str, int] | None = None
    attribute: str = ""
    stack: str = ""
    base: str = ""
    is_local: bool = False
    shared: ProgramValue | None = None
    inputs: list[ProgramValue] = field(default_factory=list)
    outputs: list[ProgramValue] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All its items, those of blocks within included."""
        return [item for step in self.steps for item in members(step)]

    @property
    def blocks(self) -> Iterator[ModuleBlock]:
        """The blocks directly within."""
        return (step for step in self.steps if isinstance(step, ModuleBlock))

    @property
    def shared_path(self) -> str:
        """The path of the module that it shares; empty: it shares none."""
        item = self.shared.item if self.shared is not None else None
        return str(item.attrs["module"]) if item is not None else ""

    @property
    def params(self) -> list[ProgramValue]:
        """The parameters that its items read."""
        return params_of(self.items)

    def close(self, outputs: Iterable[ProgramValue]) -> None:
        """Find what is read from outside, and what is used there; `outputs` are the program's."""
        items = self.items
        inside = set(items)
        used = set(outputs)
        self.inputs = [v for v in walk_operands(items) if not v.param]
        self.inputs.sort(key=lambda v: v.kind == KWARGS)
        if self.shared is not None:
            self.inputs.insert(1, self.shared)
        self.outputs = [
            v
            for item in items
            for v in item.results
            if v in used or any(user not in inside for user in v.users)
        ]
        # The index of a choice before its weight, and losses last.
        self.outputs.sort(key=lambda v: 0 if v.kind == "int" else 1 if v.axes else 2)


def params_of(items: list[Item]) -> list[ProgramValue]:
    """Return the parameters that items read."""
    return [v for v in walk_operands(items) if v.param]


def members(step: Item | ModuleBlock) -> list[Item]:
    """Return the items of a step."""
    return step.items if isinstance(step, ModuleBlock) else [step]


def blocks_of(
    program: TorchProgram, prefixes: dict[tuple[str, int], str]
) -> list[Item | ModuleBlock]:
    """Return the steps of a program: its layers as blocks, and what is around them."""
    layers: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in program.items:
        layer = layer_of(item.loc)
        if layer is not None:
            layers[layer].append(item)
    groups: list[ModuleBlock] = []
    modules: dict[str, Item] = {}
    for layer, items in layers.items():
        stack = layer[0].rpartition(".")[0]
        title = f"{_camel(stack)}Layer"
        path = prefixes.get(layer, f"{layer[0]}.{layer[1]}")
        first = prefixes.get((layer[0], 0), "")
        is_same = first and all(is_under(v.name, first) for v in params_of(items))
        if layer not in prefixes and is_same:
            path = first  # the same layer, again
        block = ModuleBlock(title, path, [], layer)
        paths = [path]
        strangers = [v.name for v in params_of(items) if not is_under(v.name, path)]
        if strangers and (shared := numbered_module(strangers[0])):
            block.shared = modules.setdefault(shared, _module_item(shared)).result
            paths.append(shared)
        block.steps = inner_steps(items, *paths)
        groups.append(block)
    _dissolve_nested(groups)
    for group, (stack, _) in zip(groups, layers, strict=True):
        for part in (group, *group.blocks):
            part.stack = _camel(stack.rpartition(".")[0])
    sparse = [any(b.title == "Experts" for b in group.blocks) for group in groups]
    if any(sparse) and not all(sparse):
        for group, is_sparse in zip(groups, sparse, strict=True):
            kind = "SparseLayer" if is_sparse else "DenseLayer"
            group.title = group.title.removesuffix("Layer") + kind
    steps = ordered([*modules.values(), *program.items], groups)
    for step in steps:
        close(step, program)
    return steps


def _dissolve_nested(groups: list[ModuleBlock]) -> None:
    """Let no module of shared parameters be one in a layer and lie within another in the next."""
    sharing = [group for group in groups if group.shared is not None]
    inner = {block.path for group in sharing for block in group.blocks}
    outer = {path for path in inner if path and any(is_under(p, path) for p in inner)}
    for group in sharing:
        if any(block.path in outer for block in group.blocks):
            paths = group.path, group.shared_path
            group.steps = inner_steps(group.items, *paths, without=outer)


def _module_item(path: str) -> Item:
    """Return the item that looks up a module, which layers then read."""
    value = ProgramValue("shared", kind="module")
    value.item = Item("module", [], {"module": path}, (value,))
    return value.item


def let_experts_be_shared(steps: Iterable[Item | ModuleBlock]) -> None:
    """Let devices share the experts of each block that has parameters of experts alone."""
    layers = [step for step in steps if isinstance(step, ModuleBlock)]
    for block in (b for layer in layers for b in layer.blocks if b.title == "Experts"):
        block.is_local = bool(block.params) and all("expert" in v.axes[:1] for v in block.params)


def close(step: Item | ModuleBlock, program: TorchProgram) -> None:
    """Find what a block and those within read, and what is used of them."""
    if isinstance(step, ModuleBlock):
        step.close(program.outputs.values())
        for inner in step.blocks:
            close(inner, program)


def _camel(text: str) -> str:
    name = "".join(part.capitalize() for part in identifier(text).split("_")) if text else ""
    return f"Module{name}" if name[:1].isdigit() or keyword.iskeyword(name) else name


def ordered(items: list[Item], blocks: list[ModuleBlock]) -> list[Item | ModuleBlock]:
    """Return items and blocks in an order in which they can be computed, items first."""
    step_of: dict[Item, Item | ModuleBlock] = {item: item for item in items}
    for block in blocks:
        step_of.update(dict.fromkeys(block.items, block))
    position = {item: i for i, item in enumerate(items)}
    steps = list(dict.fromkeys(step_of[item] for item in items))
    waits: dict[Item | ModuleBlock, set[Item | ModuleBlock]] = {step: set() for step in steps}
    users: dict[Item | ModuleBlock, set[Item | ModuleBlock]] = {step: set() for step in steps}
    for item in items:
        for var in item.operands:
            if var.item in step_of:
                before, after = step_of[var.item], step_of[item]
                if before is not after:
                    waits[after].add(before)
                    users[before].add(after)

    def rank(step: Item | ModuleBlock) -> tuple[int, int]:
        # What all layers read comes before them, and losses after them, so that they are a loop.
        is_layer = isinstance(step, ModuleBlock) and step.layer is not None
        is_loss = isinstance(step, Item) and step.loc == "loss"
        return 2 if is_loss else 1 if is_layer else 0, position[members(step)[0]]

    ready = [(rank(step), step) for step in steps if not waits[step]]
    heapq.heapify(ready)
    result: list[Item | ModuleBlock] = []
    while ready:
        _, step = heapq.heappop(ready)
        result.append(step)
        for user in users[step]:
            waits[user].discard(step)
            if not waits[user]:
                heapq.heappush(ready, (rank(user), user))
    if len(result) != len(steps):
        raise ValueError("blocks depend on one another in a circle")
    return result


# The modules within a layer.


def inner_steps(
    items: list[Item], *paths: str, without: Collection[str] = ()
) -> list[Item | ModuleBlock]:
    """Return the steps of a layer, with a block for each module that lies together.

    Args:
      items: those of the layer.
      paths: where its parameters are: its own, and those that it shares.
      without: paths that no block may have.
    """
    inside = set(items)
    groups: list[ModuleBlock] = []
    free = set(items)
    kinds = (_expert_blocks, _router_blocks, _module_blocks)
    for block in (b for blocks in kinds for path in paths for b in blocks(items, path, inside)):
        wanted = set(block.items)
        if not wanted <= free or len(wanted) < 2:
            continue
        if block.path in without or any(block.path == g.path and g.path for g in groups):
            continue
        try:
            ordered(items, [*groups, block])
        except ValueError:
            continue
        free -= wanted
        groups.append(block)
    for group in list(groups):
        strangers = [
            v
            for item in items
            if item not in group.items
            for v in item.operands
            if v.param and group.path and is_under(v.name, group.path)
        ]
        if strangers:
            groups.remove(group)
    return ordered(items, groups)


def _between(items: list[Item], seeds: set[Item]) -> set[Item]:
    """Return the items on the paths between `seeds`, which are themselves included."""
    after, before = set(seeds), set(seeds)
    for item in items:
        if any(v.item in after for v in item.operands):
            after.add(item)
    for item in reversed(items):
        if any(user in before for v in item.results for user in v.users):
            before.add(item)
    return after & before


def _with_constants(items: list[Item], members: set[Item]) -> set[Item]:
    """Return `members` with the constants that they alone read."""
    users = {item: {user for v in item.results for user in v.users} for item in items}
    none = {i for i in items if i.op == "none"}
    return members | {
        i for i in items if not i.operands and users[i] and users[i] <= members and i not in none
    }


def _take(title: str, path: str, items: list[Item], members: set[Item]) -> ModuleBlock:
    return ModuleBlock(title, path, [item for item in items if item in members])


def _expert_blocks(items: list[Item], path: str, inside: set[Item]) -> Iterator[ModuleBlock]:
    """Yield the experts: what is between the rows' dispatch and their combination."""
    for combine in (i for i in items if i.op in ("combine", "combine_weighted")):
        index = combine.operands[1]
        seeds = {i for i in items if i.op in MOVES and index in i.operands}
        members = _between(items, seeds) | seeds
        block = _take("Experts", "", items, members)
        block.path = common(v.name for v in block.params)
        if block.path == path or not is_under(block.path, path):
            block.path = ""
        block.attribute = "experts"
        if not block.params or block.path:
            yield block


def _router_blocks(items: list[Item], path: str, inside: set[Item]) -> Iterator[ModuleBlock]:
    """Yield the router: from its logits to the index and weight of each choice."""
    routing = {i for i in items if i.op in ROUTING and i.op != "top_k_index"}
    moves = {i for i in items if i.op in MOVES}
    if not moves:
        return
    wanted = {v.item for i in moves for v in i.operands[1:] if v.item in inside}
    seeds = {i for i in wanted - moves if i is not None} | routing
    seeds |= {i for i in items if _reads_router(i)}
    # Noise on the router's input belongs to the router.
    noise = {v.item for i in seeds for v in i.operands if v.item and v.item.op in NOISE}
    members = _between(items, seeds | (noise & inside)) | seeds
    members = _with_constants(items, members)
    members = _with_constants(items, members | _beyond(items, members, moves))
    block = _take("Router", "", items, members)
    names = [v.name for v in block.params]
    block.path, block.attribute = common(names) if names else "", "router"
    if block.path == path or (names and not is_under(block.path, path)):
        return
    yield block


def _reads_router(item: Item) -> bool:
    """Whether an item reads a weight of a router: one with experts that meets no rows."""
    rows = any(ROW in v.axes for v in (*item.operands, *item.results))
    return not rows and any(v.param and "expert" in v.axes for v in item.operands)


def _beyond(items: list[Item], members: set[Item], moves: set[Item]) -> set[Item]:
    """Return the items that are computed of `members` and reach no row: losses of a router."""
    mixed: set[Item] = set(moves)
    for item in items:
        if any(v.item in mixed for v in item.operands):
            mixed.add(item)
    blocked: set[Item] = set(mixed)
    for item in reversed(items):
        if any(user in blocked for v in item.results for user in v.users):
            blocked.add(item)
    reached: set[Item] = set()
    for item in items:
        sources = {v.item for v in item.operands if v.item is not None}
        if item not in blocked and sources & (members | reached):
            reached.add(item)
    return reached


def _module_block(items: list[Item], module: str, seeds: set[Item]) -> ModuleBlock | None:
    """Return the items of a module, or None if they do not lie together or are few."""
    members = _with_constants(items, _between(items, seeds))
    block = _take("", module, items, members)
    strange = [v for v in block.params if not is_under(v.name, module)]
    results = [
        v for i in members for v in i.results if any(user not in members for user in v.users)
    ]
    return None if strange or len(results) != 1 or len(members) < 3 else block


def _is_norm_around(block: ModuleBlock, blocks: Iterable[str]) -> bool:
    """Whether a module is just another one and a norm before it, as a layer of T5 is."""
    inner = [path for path in blocks if is_under(path, block.path)]
    if not inner:
        return False
    shared = common(f"{path}.x" for path in inner)
    outside = [v for v in block.params if not is_under(v.name, shared)]
    readers = {item.op for v in outside for item in v.users}
    return shared in inner and readers <= {"rms_norm_module", "layer_norm_module"}


def _module_blocks(items: list[Item], path: str, inside: set[Item]) -> Iterator[ModuleBlock]:
    """Yield the modules by the paths of their parameters, the outermost first."""
    paths: dict[str, set[Item]] = defaultdict(set)
    for item in items:
        for var in item.operands:
            if var.param and is_under(var.name, path):
                parts = var.name.removeprefix(f"{path}.").split(".")[:-1]
                for size in range(1, len(parts)):
                    paths[".".join([path, *parts[:size]])].add(item)
    candidates = {
        module: block
        for module, seeds in paths.items()
        if (block := _module_block(items, module, seeds)) is not None
    }
    for module, block in sorted(candidates.items(), key=lambda entry: entry[0].count(".")):
        if _is_norm_around(block, candidates):
            continue
        scope = scope_of(block.items[0].loc)
        is_attention = any(i.op == "attention" for i in block.items)
        last = module.rpartition(".")[2]
        title = scope if is_attention or not scope else last if last in scope else scope
        block.title = CLASS_NAMES.get(title, _camel(title))
        if scope == "ffn" and last in ("shared_expert", "extra_ffn"):
            block.title = _camel(last)
        yield block
