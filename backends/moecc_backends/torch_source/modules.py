"""The blocks of a graph as modules, and the model that they are put into, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.translate.export import rename_params
from moecc_backends.torch_source.blocks import ModuleBlock, close, inner_steps
from moecc_backends.torch_source.names import is_of_experts, module_path, unused_path
from moecc_backends.torch_source.operations import OPERATIONS
from moecc_backends.torch_source.program import Item, ProgramValue, TorchProgram, prepared
from moecc_backends.torch_source.source import file_text, programmed, reserved_names
from moecc_backends.torch_source.text import Classes, folded, literal, split_outside
from moecc_backends.torch_source.writer import BlockWriter

CLASS = "SparseFeedForward"


@dataclass(frozen=True)
class BlockPlace:
    """Where a block stands in a model.

    Attributes:
      loc: its location in the graph.
      path: the module that it is, or its first product.
      last: its last product, where no module is just the block.
      widths: the widths of the products of its input by their modules, the first one's by nothing.
      dropout: the rate of the dropout before its last product.
      downs: the weights of its last products.
    """

    loc: str
    path: str
    last: str = ""
    widths: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    downs: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """The path of the mixture in the model."""
        return f"{self.path}.mixture" if self.last else self.path


@dataclass(frozen=True)
class DenseClass:
    """The class of a dense model.

    Attributes:
      module: the module of Python that has it.
      name: its name.
      config_module: the module that has the class of its config; empty for models of no library.
      config: the name of that class.
      model_type: what transformers calls it.
    """

    module: str
    name: str
    config_module: str = ""
    config: str = ""
    model_type: str = ""

    @property
    def sparse(self) -> str:
        """The name of the class of a converted model."""
        return f"Moe{self.name}"

    @property
    def sparse_config(self) -> str:
        """The name of the class of its config."""
        return f"Moe{self.config}"

    @property
    def sparse_type(self) -> str:
        """The name of its type: loaded as what it was, it would be dense without a word."""
        return f"moe_{self.model_type}"


@dataclass(frozen=True)
class EmittedModules:
    """Mixtures as text.

    Attributes:
      text: the file.
      names: the name of each parameter in the model, by its name in the graph.
      imports: the lines that import the classes of the dense model and its config.
    """

    text: str
    names: Mapping[str, str]
    imports: str


def emit_modules(graph: Graph, places: Sequence[BlockPlace], dense: DenseClass) -> EmittedModules:
    """Return the blocks of a graph as modules, and the model that they stand in.

    Args:
      graph: it has an input and an output for each block.
      places: where they stand.
      dense: the class of the dense model.

    Raises:
      InputError: the graph has something that cannot be written as PyTorch.
    """
    locations = [position.loc for position in places]
    graph = clone(graph)
    _keep_blocks(graph, locations)
    graph = prepared(graph)
    names = _module_names(graph, locations)
    rename_params(graph, names)
    program = programmed(graph, continues=False)
    steps, epilogue = _parts(program, locations)
    outputs = {name: var for name, var in program.outputs.items() if name.startswith("loss.")}
    for position in places:
        if position.dropout:
            _add_dropout(steps[position.loc], names, position)
    blocks = {}
    for position in places:
        block = ModuleBlock(
            CLASS, position.loc, inner_steps(steps[position.loc], position.loc), base="MixtureBlock"
        )
        close(block, program)
        y = program.outputs[f"y.{position.loc}"]
        block.outputs = [y, *(v for v in block.outputs if v is not y)]
        blocks[position.loc] = block
    classes = Classes(reserved_names())
    classes.helpers |= {"MixtureBlock", "SparseModel", "place"}

    def write(block: ModuleBlock) -> BlockWriter:
        writer = BlockWriter(block, classes, OPERATIONS).write()
        if block.base and len(block.outputs) > 1:
            returned = writer.lines[-1].removeprefix("return ")
            star = "*" if len(split_outside(returned)) == 1 else ""
            writer.lines[-1] = f"return self.record({star}{returned})"
        return writer

    classes.add([inner for block in blocks.values() for inner in block.blocks], write)
    classes.add(list(blocks.values()), write)
    texts = []
    if outputs:
        classes.helpers |= {"with_losses"}
        texts.append(_losses_text(classes, blocks, places, epilogue, outputs))
    texts.append(_placing_text(classes, blocks, places, names))
    texts.append(_model_text(dense, has_losses=bool(outputs)))
    stored = {
        old: f"{position.prefix}.{new.removeprefix(f'{position.loc}.')}"
        for old, new in names.items()
        for position in places
        if graph.params[new].loc == position.loc
    }
    imports = f"from {dense.module} import {dense.name}\n"
    if dense.config:
        imports += f"from {dense.config_module} import {dense.config}\n"
    text = file_text(classes, texts, TITLE, imports)
    return EmittedModules(text, stored, imports)


TITLE = "Mixtures of experts that moecc has put into a model, to be edited."


def _keep_blocks(graph: Graph, locations: Iterable[str]) -> None:
    """Drop the outputs of other blocks: those stay as they are in the model."""
    outputs = {f"y.{loc}" for loc in locations}
    for name in [n for n in graph.output_names if n.startswith("y.") and n not in outputs]:
        graph.drop_output(name)


def _module_names(graph: Graph, locations: Iterable[str]) -> dict[str, str]:
    """Return where each parameter of a block is, under the location of the block."""
    names: dict[str, str] = {}
    for loc in locations:
        used: set[str] = set()
        for name, value in graph.params.items():
            if value.loc != loc:
                continue
            relative = name.removeprefix(f"{loc}.")
            if relative == name:
                relative = ".".join(name.split(".")[-2:])
            # The parts of a sequence are no sequence in the mixture.
            parts = [f"part_{p}" if p.isdigit() else p for p in relative.split(".")]
            path = module_path(".".join(["experts"] * is_of_experts(value) + parts))
            names[name] = f"{loc}.{unused_path(path, used)}"
    return names


def _parts(
    program: TorchProgram, locations: Iterable[str]
) -> tuple[dict[str, list[Item]], list[Item]]:
    """Return the items of each block, and those that read several blocks."""
    owner: dict[ProgramValue, str] = {program.inputs[f"x.{loc}"]: loc for loc in locations}
    items_of: dict[str, list[Item]] = {loc: [] for loc in locations}
    epilogue: list[Item] = []
    for item in program.items:
        locs = {owner[v] for v in item.operands if v in owner} or {item.loc}
        loc = locs.pop() if len(locs) == 1 else ""
        if loc in items_of:
            items_of[loc].append(item)
        else:
            loc = ""
            epilogue.append(item)
        owner.update(dict.fromkeys(item.results, loc))
    return items_of, epilogue


def _add_dropout(items: list[Item], names: Mapping[str, str], position: BlockPlace) -> None:
    """Drop hidden values before the last products of a block, as it did."""
    downs = {names[down] for down in position.downs}
    dropped: dict[ProgramValue, ProgramValue] = {}
    for item in list(items):
        if item.op not in ("contract", "linear") or item.operands[1].name not in downs:
            continue
        hidden = item.operands[0]
        if hidden not in dropped:
            image = ProgramValue("dropped", hidden.axes, hidden.sizes, users=[])
            drop = Item("dropout", [hidden], {"rate": position.dropout}, (image,), item.loc)
            image.item = drop
            items.insert(items.index(item), drop)
            hidden.users = [u for u in hidden.users if u.operands[0] is not hidden or u is drop]
            hidden.users.append(drop)
            dropped[hidden] = image
        item.operands[0] = dropped[hidden]
        dropped[hidden].users.append(item)


def _constructed(classes: Classes, block: ModuleBlock) -> str:
    instance = classes.instances[block]
    return f"{instance.definition.name}({', '.join(['None', *map(literal, instance.values)])})"


def _placing_text(
    classes: Classes,
    blocks: Mapping[str, ModuleBlock],
    places: Sequence[BlockPlace],
    names: Mapping[str, str],
) -> list[str]:
    lines = [
        "def place_mixtures(model):",
        '    """Put the mixtures where the blocks of a dense model were."""',
    ]
    for position in places:
        arguments = ["model", _constructed(classes, blocks[position.loc]), literal(position.path)]
        if position.last:
            pairs = ", ".join(f"{literal(n)}: {width}" for n, width in position.widths.items())
            arguments += [literal(position.last), f"{{{pairs}}}"]
            if len(position.downs) == 1:
                arguments.append(literal(names[position.downs[0]].removeprefix(f"{position.loc}.")))
        lines += folded(f"    place({', '.join(arguments)})")
    return lines


def _model_text(dense: DenseClass, *, has_losses: bool) -> list[str]:
    config = [
        f"class {dense.sparse_config}({dense.config}):",
        '    """The config of the dense model, under a type of its own."""',
        "",
        f"    model_type = {literal(dense.sparse_type)}",
        "",
        "",
    ]
    return [
        *(config if dense.config else []),
        f"class {dense.sparse}(SparseModel, {dense.name}):",
        '    """The model with its mixtures."""',
        "",
        *([f"    config_class = {dense.sparse_config}", ""] if dense.config else []),
        "    def __init__(self, *args, **kwargs):",
        "        super().__init__(*args, **kwargs)",
        "        place_mixtures(self)",
        *(
            ["", f"    forward = with_losses({dense.name}.forward, sum_losses)"]
            if has_losses
            else []
        ),
    ]


def _losses_text(
    classes: Classes,
    blocks: Mapping[str, ModuleBlock],
    places: Sequence[BlockPlace],
    epilogue: list[Item],
    outputs: Mapping[str, ProgramValue],
) -> list[str]:
    """Return the function that computes the losses of a model from those of its mixtures."""
    total = ModuleBlock("Losses", "", list(epilogue))
    total.close(outputs.values())
    total.outputs = list(dict.fromkeys(v for v in outputs.values() if v in total.outputs))
    recorded = {
        var: f"losses[{literal(position.path)}][{i}]"
        for position in places
        for i, var in enumerate(blocks[position.loc].outputs[1:])
    }
    writer = BlockWriter(total, classes, OPERATIONS)
    lines, texts = [], dict(recorded)
    if total.outputs:
        writer.write()
        lines = [
            f"{name} = {recorded[var]}"
            for name, var in zip(writer.signature, total.inputs, strict=True)
        ]
        *steps, returned = writer.filled_lines(writer.lines)
        lines += steps
        results = split_outside(returned.removeprefix("return "))
        texts |= dict(zip(total.outputs, results, strict=True))
        classes.helpers |= writer.helpers
    items = [f"{literal(name)}: {texts[var]}" for name, var in outputs.items()]
    return [
        "def sum_losses(losses):",
        '    """Return the losses of the model from those of its mixtures, by their paths."""',
        *(x for line in lines for x in folded(f"    {line}")),
        *folded(f"    return {{{', '.join(items)}}}"),
    ]
