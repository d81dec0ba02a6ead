"""The models of a file: what is around the layers, and what transformers calls.

A decoder is a base model and its head; an encoder is a base model; an encoder-decoder has an
encoder that generation runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moecc_backends.torch_source.blocks import Block, members
from moecc_backends.torch_source.program import KEY_POSITIONS, POSITION_IDS, Item, Program, Var
from moecc_backends.torch_source.text import STATE, BlockWriter, Expr, folded, var_hint

INPUTS = {
    "tokens": "input_ids",
    "decoder_tokens": "decoder_input_ids",
    "mask": "attention_mask",
    "pixels": "pixel_values",
    "features": "input_features",
}


Role = Var | list[Var | None] | None
"""An argument of the layers of a loop: the same for all, one for each, or carried (None)."""


@dataclass(eq=False)
class ModelWriter(BlockWriter):
    """Writes what is around the layers: calls of all layers of a stack are a loop.

    Attributes:
      program: the whole model.
      loops: the number of loops so far.
    """

    program: Program = field(default_factory=Program)
    results: list[tuple[Var, str]] = field(default_factory=list)

    def write_steps(self, steps: Sequence[Item | Block]) -> None:
        """Write items, calls and loops over layers."""
        at = 0
        while at < len(steps):
            step = steps[at]
            run = [step]
            if isinstance(step, Block) and step.layer is not None:
                while at + len(run) < len(steps):
                    following = steps[at + len(run)]
                    if not isinstance(following, Block) or following.layer is None:
                        break
                    if following.layer != (step.layer[0], step.layer[1] + len(run)):
                        break
                    run.append(following)
            layers = [s for s in run if isinstance(s, Block)]
            if isinstance(step, Block) and step.layer is not None:
                self.loop(layers)
            elif isinstance(step, Block):
                self.call(step)
            else:
                self.run(step)
            at += len(run)

    def loop(self, layers: list[Block]) -> None:
        """Write the calls of consecutive layers as a loop."""
        names = self._roles(layers)
        carried = next((n for n, role in names.items() if role is None), STATE)
        first = layers[0]
        source = next((v for v in first.inputs if self._input_name(first, v) == carried), None)
        if source is not None:
            expr = self.expr(source)
            if expr.text != STATE:
                self.remaining[source] = 0
                self.state(f"{STATE} = {self.canonical(source)}")
        stack = first.path.rpartition(".")[0]
        arguments: list[str] = []
        zipped: list[tuple[str, str]] = []
        for name, role in names.items():
            if role is None:
                arguments.append(STATE)
            elif isinstance(role, Var):
                arguments.append(self.canonical(role))
            else:
                texts = [self.canonical(v) if v is not None else "None" for v in role]
                zipped.append((name, f"[{', '.join(texts)}]"))
                arguments.append(name)
        outputs = self._outputs(layers)
        results = [STATE if kind == "carry" else name for name, kind in outputs]
        collected = [name for name, kind in outputs if kind == "collect"]
        for name in collected:
            self.state(f"{name}s = []")
        target = self.tree.access(stack)
        head = f"for layer in {target}:"
        if zipped:
            loops = ", ".join(["layer", *(n for n, _ in zipped)])
            head = f"for {loops} in zip({', '.join([target, *(t for _, t in zipped)])}):"
        self.state(head)
        call = f"layer({', '.join(arguments)})"
        self.state(f"    {', '.join(results)} = {call}")
        for name in collected:
            self.state(f"    {name}s.append({name})")
        for layer in layers:
            self.remaining.subtract(layer.inputs)
        self._bind(layers, outputs)

    def _input_name(self, layer: Block, var: Var) -> str:
        signature = self.classes.instances[layer].definition.signature
        return signature[layer.inputs.index(var)]

    def _roles(self, layers: list[Block]) -> dict[str, Role]:
        """Return for each argument of the layers whether it is carried, the same, or varies."""
        names = list(dict.fromkeys(n for layer in layers for n in self._signature(layer)))
        roles: dict[str, Role] = {}
        for name in names:
            values = [
                next((v for v in layer.inputs if self._input_name(layer, v) == name), None)
                for layer in layers
            ]
            present = [v for v in values if v is not None]
            is_carried = len(layers) > 1 and all(
                v is not None and v in before.outputs
                for v, before in zip(values[1:], layers, strict=False)
            )
            if is_carried or (name == STATE and len(layers) == 1):
                roles[name] = None
            elif all(v is present[0] for v in present):
                roles[name] = present[0]
            else:
                roles[name] = values
        return roles

    def _signature(self, layer: Block) -> list[str]:
        return self.classes.instances[layer].definition.signature

    def _outputs(self, layers: list[Block]) -> list[tuple[str, str]]:
        """Return a name for each output of the layers, and whether it is carried or collected."""
        first = max(layers, key=lambda layer: len(layer.outputs))
        return [
            (var_hint(var), "carry" if "embed" in var.axes else "collect") for var in first.outputs
        ]

    def _bind(self, layers: list[Block], outputs: list[tuple[str, str]]) -> None:
        for index, layer in enumerate(layers):
            for var in layer.outputs:
                if "embed" in var.axes:
                    self.values[var] = Expr(STATE, var.axes)
            others = [v for v in layer.outputs if "embed" not in v.axes]
            names = [n for n, role in outputs if role == "collect"]
            for name, var in zip(names, others, strict=False):
                self.values[var] = Expr(f"{name}s[{index}]", var.axes)


def inner_lines(lines: Sequence[str], depth: int) -> list[str]:
    """Return lines with an indent, broken where they are too long."""
    return [x for line in lines for x in folded(" " * depth + line)]


def is_head(step: Item | Block) -> bool:
    """Whether a step belongs to the head of a language model."""
    return all(item.loc in ("head", "loss") for item in members(step))


__all__ = ["KEY_POSITIONS", "POSITION_IDS", "ModelWriter"]
