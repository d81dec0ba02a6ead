"""A module of PyTorch exported: what `torch.export` reads of it, and why it cannot.

The module is in evaluation meanwhile, and models of transformers keep no cache.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from inspect import signature
from io import StringIO
from typing import Any

import torch

from moecc.errors import InputError
from moecc_backends.jaxpr.views import line_of, shape_of
from moecc_backends.torch_export.lowering import (
    ExportedModule,
    jax_dtype,
    module_calls,
    node_line,
    node_values,
    operation_name,
)


def exported_module(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    training: Collection[Any] = (),
) -> ExportedModule:
    """Return a module of torch as a function of JAX; the module is in evaluation while it is read.

    Args:
      model: the module.
      args: its arguments by position.
      kwargs: its arguments by name.
      training: the modules in it that are in training meanwhile; where there are any, gradients
        are on, and a dropout in training is traced as one in evaluation.

    Raises:
      InputError: torch cannot export it.
    """
    _bind(model, args, kwargs)
    is_training = {module: module.training for module in model.modules()}
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if hasattr(config, "use_cache")}
    uses_cache = [(config, config.use_cache) for config in configs.values()]
    model.eval()
    try:
        for module in training:
            module.training = True
        for config, _ in uses_cache:  # models of transformers, whose caches torch cannot return
            config.use_cache = False
        with torch.set_grad_enabled(bool(training)), _quiet_failure():
            program = torch.export.export(model, args, dict(kwargs), strict=False)
    except Exception as error:
        depends_on_values = "data-dependent" in str(error)
        raise InputError(
            "torch.export cannot read the model",
            where=line_of(error.__traceback__) or type(model).__name__,
            found=error_text(error),
            hint=_DEPENDS_ON_VALUES if depends_on_values else _AS_CALLED,
        ) from error
    finally:
        for module, mode in is_training.items():
            module.training = mode
        for config, use_cache in uses_cache:
            config.use_cache = use_cache
    _inline_gradient_modes(program.graph_module)
    for node in program.graph.nodes:
        if training and operation_name(node) == "aten.dropout":
            node.args = (*node.args[:2], False)
        shapes = [getattr(value, "shape", ()) for value in node_values(node)]
        if any(not isinstance(size, int) for shape in shapes for size in shape):
            raise InputError(
                "torch.export shows no sizes of a value, which depend on other values",
                where=node_line(node) or type(model).__name__,
                found=operation_name(node),
                hint="select by a mask, or by topk, whose results have a size that is known before",
            )
    return replace(_read_program(model, program), call=(args, kwargs))


_DEPENDS_ON_VALUES = "no `if` or loop in Python on the values of tensors; torch.where or torch.cond"
_AS_CALLED = "the model must run with these inputs, and with tensors that have shapes and no values"


def _bind(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise InputError where the model does not take such arguments."""
    parameters = signature(model.forward)
    try:
        parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            "the inputs are not those of the model",
            where=f"{type(model).__name__}.forward",
            expected=str(parameters),
            found=str(error),
            hint='a tuple in order, or a dictionary by name: {"input_ids": ids}',
        ) from None


@contextmanager
def _quiet_failure() -> Iterator[None]:
    """Leave out the logs of torch, and the graph that it prints where it fails."""
    disabled, stderr = logging.root.manager.disable, StringIO()
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(stderr):
            yield
        sys.stderr.write(stderr.getvalue())
    finally:
        logging.disable(disabled)


GRADIENT_MODE = "moecc_gradient_mode"
"""In the ``meta`` of a node under `torch.no_grad` or `torch.enable_grad`: whether gradients are on,
and the calls of modules that the change of it is in."""


def _inline_gradient_modes(module: Any) -> None:
    """Put the nodes under a change of the gradient mode, which are a graph of their own, in place.

    The mode becomes a mark on each of them.
    """
    for node in list(module.graph.nodes):
        if str(node.target) != "wrap_with_set_grad_enabled":
            continue
        is_on, inner, *operands = node.args
        body = getattr(module, inner.target)
        _inline_gradient_modes(body)
        parameters = [n for n in body.graph.nodes if n.op == "placeholder"]
        copies = dict(zip(parameters, operands, strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(body.graph, copies)
        for copy in (copies[n] for n in body.graph.nodes if n.op == "call_function"):
            copy.meta.setdefault(GRADIENT_MODE, (is_on, module_calls(node)))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def error_text(error: Exception) -> str:
    """Return the type of an exception of another library, and the first line of its words."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _read_program(model: Any, program: Any) -> ExportedModule:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    inputs = program.graph_signature.input_specs
    specs = {spec.arg.name: spec for spec in inputs if hasattr(spec.arg, "name")}
    exported = ExportedModule(program.graph, {}, dict(model.named_parameters()))
    for node in program.graph.nodes:
        spec = specs.get(node.name)
        meta = node.meta.get("val")
        if node.op != "placeholder" or spec is None or not hasattr(meta, "dtype"):
            continue
        kind, target = spec.kind.name, spec.target
        if kind == "PARAMETER":
            exported.sources[node] = ("parameter", names[id(tensors[target])])
            continue
        constant = program.constants.get(target) if kind == "CONSTANT_TENSOR" else None
        if constant is not None and constant.numel() == 1 and str(constant.device) != "meta":
            exported.constants[target] = constant
            exported.sources[node] = ("constant", target)
            continue
        exported.sources[node] = ("argument", node.name)
        if kind == "BUFFER":
            exported.buffers[node] = target
        exported.arguments[node.name] = shape_of(meta.shape, jax_dtype(meta.dtype))
    _fold_constants(exported)
    return exported


def _fold_constants(exported: ExportedModule) -> None:
    """Compute the nodes that read nothing but constants, as of a quantile of a distribution."""
    from torch.fx.node import map_arg

    sources, constants = exported.sources, exported.constants
    values = {n: constants[name].clone() for n, (kind, name) in sources.items()
              if kind == "constant"}  # fmt: skip
    for node in exported.graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not values.keys() >= set(inputs):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = value = node.target(*args, **kwargs)
        if hasattr(value, "dim") and value.dim() == 0:
            constants[node.name], sources[node] = value.clone(), ("constant", node.name)
