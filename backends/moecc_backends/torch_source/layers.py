"""Calls of layers: all layers of a stack are one loop, whose arguments differ by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moecc_backends.torch_source.blocks import ModuleBlock
from moecc_backends.torch_source.program import Item, ProgramValue, TorchProgram
from moecc_backends.torch_source.text import PythonExpr, repeated_texts, unused
from moecc_backends.torch_source.writer import STATE, WORD, BlockWriter, var_hint

Role = ProgramValue | list[ProgramValue | None] | None
"""An argument of the layers of a loop: the same for all, one for each, or carried (None)."""


def apart(layers: list[ModuleBlock]) -> Iterator[tuple[list[ModuleBlock], bool]]:
    """Yield the layers of loops, and each layer whose keys later layers read by itself.

    With each part comes whether it is such a layer.
    """
    read = {v for layer in layers for v in layer.inputs if "embed" not in v.axes}
    part: list[ModuleBlock] = []
    for layer in layers:
        if read.isdisjoint(layer.outputs):
            part.append(layer)
            continue
        if part:
            yield part, False
        yield [layer], True
        part = []
    if part:
        yield part, False


@dataclass(eq=False)
class ModelWriter(BlockWriter):
    """Writes what is around the layers: calls of all layers of a stack are a loop.

    Attributes:
      program: the whole model.
      collected: for each list that loops append to, its length so far.
    """

    program: TorchProgram = field(default_factory=TorchProgram)
    results: list[tuple[ProgramValue, str]] = field(default_factory=list)
    collected: dict[str, int] = field(default_factory=dict)

    def write_steps(self, steps: Sequence[Item | ModuleBlock]) -> None:
        """Write items, calls and loops over layers."""
        at = 0
        while at < len(steps):
            step = steps[at]
            run = [step]
            if isinstance(step, ModuleBlock) and step.layer is not None:
                while at + len(run) < len(steps):
                    following = steps[at + len(run)]
                    if not isinstance(following, ModuleBlock) or following.layer is None:
                        break
                    if following.layer != (step.layer[0], step.layer[1] + len(run)):
                        break
                    if following.path.rpartition(".")[0] != step.path.rpartition(".")[0]:
                        break  # it stands in another list of modules
                    run.append(following)
            layers = [s for s in run if isinstance(s, ModuleBlock)]
            if isinstance(step, ModuleBlock) and step.layer is not None:
                for part, is_read in apart(layers):
                    if is_read:
                        self.call(part[0])
                    else:
                        self.loop(part)
            elif isinstance(step, ModuleBlock):
                self.call(step)
            else:
                self.run(step)
            at += len(run)

    def loop(self, layers: list[ModuleBlock]) -> None:
        """Write the calls of consecutive layers as a loop."""
        names = self._roles(layers)
        carried = next((n for n, role in names.items() if role is None), STATE)
        first = layers[0]
        source = next((v for v in first.inputs if self._input_name(first, v) == carried), None)
        for var, expr in [*self.values.items()]:
            if expr.text == STATE and self.remaining[var] > (var is source):
                self.assign(var, expr, "memory")  # the loop makes another state
        if source is not None:
            expr = self.expr(source)
            if expr.text != STATE:
                self.remaining[source] = 0
                self.state(f"{STATE} = {self.canonical(source)}")
        stack = first.path.rpartition(".")[0]
        needed = self._needed_after(layers)
        arguments: list[str] = []
        zipped: list[tuple[str, str]] = []
        for name, role in names.items():
            if role is None:
                arguments.append(STATE)
            elif isinstance(role, ProgramValue):
                arguments.append(self.canonical(role))
            elif not role:
                arguments.append("None")
            else:
                texts = [self.canonical(v) if v is not None else "None" for v in role]
                zipped.append((unused(name, needed), repeated_texts(texts)))
                arguments.append(zipped[-1][0])
        outputs = self._outputs(layers)
        stacks = {b.layer[0] for b in self.block.blocks if b.layer is not None}
        is_first = len(stacks) > 1 and layers[0].title.startswith("Encoder")
        prefix = "encoder_" if is_first else ""
        results = [STATE if kind == "carry" else unused(name, needed) for name, kind in outputs]
        collected = [name for name, kind in outputs if kind == "collect"]
        # Layers of several stages are several loops, which share their lists.
        new = [n for n in collected if f"{prefix}{n}" not in self.collected]
        if new:
            names_of_lists = ", ".join(f"{prefix}{name}es" for name in new)
            self.state(f"{names_of_lists} = {', '.join(['[]'] * len(new))}")
        call = self.layer_call(layers, arguments, zipped)
        loops = ", ".join(["layer", *(name for name, _ in zipped)])
        lists = ", ".join([self.layer_modules(layers, stack), *(text for _, text in zipped)])
        self.state(f"for {loops} in {f'zip({lists})' if zipped else lists}:")
        self.state(f"    {', '.join(results)} = {call}")
        for name in collected:
            self.state(f"    {prefix}{name}es.append({unused(name, needed)})")
        for layer in layers:
            self.remaining.subtract(layer.inputs)
        self._bind(layers, [(prefix + n, kind) for n, kind in outputs])

    def _needed_after(self, layers: list[ModuleBlock]) -> set[str]:
        """Return the names that are read after a loop, which it must not give to others."""
        reads = Counter(v for layer in layers for v in layer.inputs)
        later = [expr.text for v, expr in self.values.items() if self.remaining[v] > reads[v]]
        return {word for text in later for word in WORD.findall(text)}

    def layer_modules(self, layers: list[ModuleBlock], stack: str) -> str:
        """Return the text of the layers of a loop, which are under the path `stack`."""
        modules = self.tree.access(stack)
        if len(layers) > 1 and all(layer.path == layers[0].path for layer in layers):
            return f"{len(layers)} * list({modules})"  # one module
        paths = [p for p in self._paths(layers[0]) if p.rpartition(".")[0] == stack]
        if len(layers) < len(paths):
            first = paths.index(layers[0].path)
            return f"{modules}[{first}:{first + len(layers)}]"
        return modules

    def layer_call(
        self, layers: list[ModuleBlock], arguments: list[str], zipped: list[tuple[str, str]]
    ) -> str:
        """Return the call of a layer in a loop.

        Args:
          layers: all layers of the loop.
          arguments: those of a call.
          zipped: the names of those that vary, each with the list of its values; may be extended.
        """
        return f"layer({', '.join(arguments)})"

    def _paths(self, layer: ModuleBlock) -> list[str]:
        """Return the paths of all layers of the stack of one."""
        stack = layer.layer and layer.layer[0]
        return [b.path for b in self.block.blocks if b.layer is not None and b.layer[0] == stack]

    def _input_name(self, layer: ModuleBlock, var: ProgramValue) -> str:
        return self.classes.instances[layer].inputs[layer.inputs.index(var)]

    def _roles(self, layers: list[ModuleBlock]) -> dict[str, Role]:
        """Return for each argument of the layers whether it is carried, the same, or varies."""
        names = list(dict.fromkeys(n for layer in layers for n in self._signature(layer)))
        roles: dict[str, Role] = {}
        for name in names:
            values = [
                next((v for v in layer.inputs if self._input_name(layer, v) == name), None)
                for layer in layers
            ]
            present = [v for v in values if v is not None]
            if all(v.item is not None and v.item.op == "none" for v in present):
                roles[name] = []
                continue
            is_carried = len(layers) > 1 and all(
                v is not None and v in before.outputs
                for v, before in zip(values[1:], layers, strict=False)
            )
            if is_carried or (name == STATE and len(layers) == 1):
                roles[name] = None
            elif present and all(v is present[0] for v in present):
                roles[name] = present[0]
            else:
                roles[name] = values
        is_whole = len(layers) == len(self._paths(layers[0]))
        while is_whole and roles and roles[next(reversed(roles))] == []:
            roles.popitem()  # None by default
        return roles

    def _signature(self, layer: ModuleBlock) -> list[str]:
        return self.classes.instances[layer].definition.signature

    def _outputs(self, layers: list[ModuleBlock]) -> list[tuple[str, str]]:
        """Return a name for each output of the layers, and whether it is carried or collected."""
        first = max(layers, key=lambda layer: len(layer.outputs))
        return [
            (var_hint(var), "carry" if "embed" in var.axes else "collect") for var in first.outputs
        ]

    def _bind(self, layers: list[ModuleBlock], outputs: list[tuple[str, str]]) -> None:
        for index, layer in enumerate(layers):
            for var in layer.outputs:
                if "embed" in var.axes:
                    self.values[var] = PythonExpr(STATE, var.axes)
            losses = [v for v in layer.outputs if "embed" not in v.axes]
            names = [n for n, role in outputs if role == "collect"]
            for name, var in zip(names, losses, strict=False):
                at = self.collected.get(name, 0) + index
                self.values[var] = PythonExpr(f"{name}es[{at}]", var.axes)
        for name in (n for n, role in outputs if role == "collect"):
            self.collected[name] = self.collected.get(name, 0) + len(layers)
