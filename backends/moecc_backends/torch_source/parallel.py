"""The parameters that devices share, in tensor and expert parallelism, by their axes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moecc.ir.conventions import TOKENS
from moecc_backends.torch_source.blocks import ModuleBlock
from moecc_backends.torch_source.program import Item, TorchProgram
from moecc_backends.torch_source.text import WIDTH

SPLIT_AXES = ("q", "kv", "mlp")
"""The axes that are split: heads and neurons."""

STYLES = {
    ("out", "embed"): "colwise",
    ("embed", "out"): "rowwise",
    ("out",): "colwise",  # the bias of a module
    ("expert", "out", "embed"): "colwise",
    ("expert", "embed", "out"): "rowwise",
    ("head_dim",): "replicated_with_grad_allreduce",
}
"""The styles of transformers by the axes of a parameter, where ``out`` is one that is split."""


def tensor_parallel_plan(
    program: TorchProgram, steps: Sequence[Item | ModuleBlock], base: str
) -> list[str]:
    """Return the lines of a plan, by paths of the base model.

    There are none if a parameter of heads or neurons has no style, or without a base model.
    """
    if not base:
        return []
    styles: dict[str, str] = {}
    tokens = program.inputs.get(program.tokens or TOKENS)
    for item in program.items:
        # A head that reads the table of tokens, too, needs all of it; transformers would split it.
        is_table = item.op == "embedding_module" and tokens in item.operands
        if is_table and any(user is not item for user in item.operands[0].users):
            styles[str(item.attrs["module"])] = "replicate"
    for block in [s for s in steps if isinstance(s, ModuleBlock)]:
        experts = {v: b.path for b in block.blocks if b.title == "Experts" for v in b.params}
        for var in block.params:
            if not set(var.axes) & {*SPLIT_AXES, "head_dim"}:
                continue
            module, _, last = var.name.rpartition(".")
            kinds = {item.op for item in var.users}
            style = STYLES.get(tuple("out" if a in SPLIT_AXES else a for a in var.axes), "")
            if experts.get(var) and "expert" in var.axes:
                module, kinds = var.name, {"linear"}
                styles[experts[var]] = "moe_tp_experts"
            expected = "rms_norm_module" if var.axes == ("head_dim",) else "linear"
            if not style or kinds != {expected}:
                return []
            if last == "weight":
                styles[module] = style
    return _plan_lines(styles, base)


def expert_parallel_plan(steps: Sequence[Item | ModuleBlock], base: str) -> list[str]:
    """Return the lines of a plan by which devices share experts, by paths of the base model."""
    layers = [s for s in steps if isinstance(s, ModuleBlock)]
    blocks = [b for layer in layers for b in layer.blocks if b.is_local and base]
    styles = {v.name: "grouped_gemm" for block in blocks for v in block.params}
    styles |= {block.path: "ep_dispatch_experts" for block in blocks}
    return _plan_lines(styles, base)


def _plan_lines(styles: Mapping[str, str], base: str) -> list[str]:
    start = len(base) + 1
    plan = {re.sub(r"\.\d+(?=\.|$)", ".*", name[start:]): s for name, s in styles.items()}
    return _packed([f'"{name}": "{style}",' for name, style in plan.items()])


def _packed(entries: Sequence[str]) -> list[str]:
    """Return entries of a dictionary, as many in a line as it holds."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + len(entry) < WIDTH - 4:
            lines[-1] += f" {entry}"
        else:
            lines.append(f"    {entry}")
    return lines
