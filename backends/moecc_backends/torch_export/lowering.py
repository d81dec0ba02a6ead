"""A module of PyTorch as a function of JAX: the form in which its blocks are found.

`torch.export` shows what a module computes, operation by operation.  Those that a block can
consist of become what JAX calls them; every other one is a primitive of its own, which only says
the shapes of its results.  So the function can be traced, and never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from moecc_backends.jaxpr.views import LINE_MARK, AnyArray, shape_of
from moecc_backends.xla.lower.elementwise import ELEMENTWISE

FxNode = Any
"""A node of torch.fx."""

Tensor = Any
"""A tensor of torch."""

ModuleArguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments of a module, by position and by name."""


def jax_dtype(dtype: Any) -> Any:
    """Return the type in which values of a type of torch are traced.

    Every type of floating point is traced as the widest, so that numbers in the program keep all
    their digits: torch rounds none to the type of the tensors that they meet.
    """
    traced = jnp.dtype(str(dtype).removeprefix("torch."))
    return jnp.dtype("float64") if jnp.issubdtype(traced, jnp.floating) else traced


# What the nodes of a graph say of themselves.


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module.

    Attributes:
      path: its name in the model.
      number: which of its calls it is.
    """

    path: str
    number: str


def module_calls(node: FxNode) -> list[ModuleCall]:
    """Return the calls of modules that a node is in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [ModuleCall(str(path), key.partition("@")[2]) for key, (path, _) in stack.items()]


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def node_line(node: FxNode) -> str:
    """Return ``file.py:12 in forward`` for the innermost line outside of torch, or nothing."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "/torch/" not in frame[0]]
    return next((f"{Path(f).name}:{n} in {name}" for f, n, name in reversed(outside)), "")


def operation_name(node: FxNode) -> str:
    """Return ``aten.silu`` for a node."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(packet) if node.op == "call_function" else str(node.op)


# Values.


@dataclass(frozen=True, eq=False)
class TracedTensor:
    """A tensor of the module while it is traced.

    Attributes:
      array: its elements; the axes before the last may be grouped in another way than `shape` says,
        since products and functions of elements treat all rows alike.
      shape: its shape.
      feature: the dimension along which a token has its features, where that is known.
      is_weight: whether it is made of parameters alone.
    """

    array: AnyArray
    shape: tuple[int, ...]
    feature: int | None = None
    is_weight: bool = False

    @property
    def whole(self) -> AnyArray:
        """Its elements in its own shape."""
        is_same = tuple(self.array.shape) == self.shape
        return self.array if is_same else jnp.reshape(self.array, self.shape)


Operand = Any
"""A traced tensor, a list of them, or a number."""


@cache
def _opaque(name: str) -> Primitive:
    """Return the primitive of an operation that no block consists of."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(
        lambda *_, results, reduces: [
            jax.core.ShapedArray(shape, dtype) for shape, dtype in results
        ]
    )
    return primitive


class Tracer:
    """Runs the nodes of a graph on arrays of JAX.

    Attributes:
      values: what each node returned.
    """

    def __init__(self) -> None:
        self.values: dict[FxNode, Operand] = {}

    def run(self, node: FxNode) -> None:
        """Compute the value of a node."""
        with jax.named_scope(f"{node.name}{LINE_MARK}{node_line(node)}"):
            self.values[node] = self._computed(node)
        name = operation_name(node)
        if name.endswith("_") and not name.endswith("__"):
            self._change_views(node, name)

    def _change_views(self, node: FxNode, name: str) -> None:
        """Let nodes that follow read what an operation in place has left in its memory.

        A view of other elements than its operand becomes a value of which nothing is known.
        """
        memory, region = _memory_of(node), _place_of(node)
        for viewer, value in self.values.items():
            if not memory & _memory_of(viewer):
                continue
            if _place_of(viewer) == region:
                self.values[viewer] = self.values[node]
                continue
            operands = [*_tensors(value), *_tensors(self.values[node])]
            self.values[viewer] = self._opaque_results(name, operands, viewer.meta["val"])

    def _computed(self, node: FxNode) -> Operand:
        args, kwargs = _mapped(node.args, self.values), _mapped(node.kwargs, self.values)
        name = operation_name(node)
        if "getitem" in name:
            return args[0][args[1]]
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        meta = node.meta.get("val")
        if meta is None:  # it only asserts something
            return None
        if rule is not None:
            try:
                return _checked(rule(*args, **kwargs), meta)
            except (TypeError, ValueError, KeyError, IndexError, AttributeError, Unlike):
                # A form of the operation that has no rule: a primitive of its own.
                pass
        return self._opaque_results(name, [*_tensors(args), *_tensors(kwargs)], meta)

    def _opaque_results(self, name: str, operands: list[TracedTensor], meta: Any) -> Operand:
        """Return the results of an operation by their shapes alone."""
        flat = meta if isinstance(meta, tuple | list) else [meta]
        tensors = [value for value in flat if hasattr(value, "dtype")]
        results = tuple((tuple(map(int, v.shape)), jax_dtype(v.dtype)) for v in tensors)
        arrays = _opaque(name).bind(
            *(v.whole for v in operands), results=results, reduces=name in _REDUCTIONS
        )
        is_weight = bool(operands) and all(v.is_weight for v in operands)
        traced = iter(
            TracedTensor(array, shape, _feature_of(name, shape, operands), is_weight)
            for array, (shape, _) in zip(arrays, results, strict=True)
        )
        values = [next(traced) if hasattr(v, "dtype") else v for v in flat]
        return values if isinstance(meta, tuple | list) else values[0]


def node_values(node: FxNode) -> list[Any]:
    """Return what a node computes, tensors without elements among it."""
    meta = node.meta.get("val")
    return list(meta) if isinstance(meta, tuple | list) else [meta]


def _memory_of(node: FxNode) -> set[int]:
    """Return the memory that the tensors of a node lie in."""
    memory = set[int]()
    for tensor in node_values(node):
        with suppress(NotImplementedError):  # a tensor under vmap shows no memory
            if hasattr(tensor, "untyped_storage"):
                memory.add(tensor.untyped_storage()._cdata)
    return memory


def _place_of(node: FxNode) -> object:
    """Return where the elements of a tensor lie in its memory."""
    meta = node.meta["val"]
    is_tensor = hasattr(meta, "untyped_storage")
    return is_tensor and (meta.shape, meta.stride(), meta.storage_offset(), meta.dtype)


class Unlike(Exception):
    """A rule returned another shape than the operation has."""


def _checked(result: Operand, meta: Any) -> Operand:
    if isinstance(result, list):
        return [_checked(r, m) for r, m in zip(result, meta, strict=True)]
    if result.shape != tuple(meta.shape):
        raise Unlike
    dtype = jax_dtype(meta.dtype)
    return (
        result if result.array.dtype == dtype else replace(result, array=result.array.astype(dtype))
    )


def _mapped(tree: Any, values: Mapping[FxNode, Operand]) -> Any:
    if isinstance(tree, tuple | list):
        return [_mapped(x, values) for x in tree]
    if isinstance(tree, dict):
        return {name: _mapped(x, values) for name, x in tree.items()}
    return values[tree] if hasattr(tree, "users") else tree


def _tensors(tree: Any) -> list[TracedTensor]:
    if isinstance(tree, TracedTensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for x in inner for tensor in _tensors(x)]


_REDUCTIONS = frozenset(
    f"aten.{n}" for n in ("mean", "sum", "var", "std", "amax", "amin", "norm", "linalg_vector_norm")
)
"""Operations that mix the elements of a value."""

_CONVOLUTIONS = ("aten.conv", "aten.batch_norm", "aten.group_norm", "aten.instance_norm")


def _feature_of(name: str, shape: tuple[int, ...], operands: Sequence[TracedTensor]) -> int | None:
    """Return the dimension of the features of an opaque result."""
    if name.startswith(_CONVOLUTIONS) and len(shape) > 1:
        return 1
    if name in ("aten.embedding", "aten.layer_norm", "aten.rms_norm"):
        return len(shape) - 1
    features = {v.feature for v in operands if v.shape == shape and v.feature is not None}
    return features.pop() if len(features) == 1 else None


# The rules: what an operation is in JAX.

Rule = Callable[..., Operand]
RULES: dict[str, Rule] = {}


def _elements(function: Callable[..., AnyArray]) -> Rule:
    """Return the rule of a function of elements of tensors and numbers."""

    def rule(*operands: Operand, **options: Any) -> TracedTensor:
        tensors = [x for x in operands if isinstance(x, TracedTensor)]
        wide = [t for t in tensors if prod(t.shape) > 1 and len(t.shape) > 1]
        is_alike = len({(tuple(t.array.shape), t.shape) for t in wide}) == 1
        arrays = [
            (x.array if is_alike and x in wide else x.whole) if isinstance(x, TracedTensor) else x
            for x in operands
        ]
        array = function(*arrays, **options)
        features = {len(t.shape) - t.feature for t in tensors if t.feature is not None}
        shape = (
            wide[0].shape
            if is_alike and len(array.shape) == len(wide[0].array.shape)
            else (tuple(array.shape))
        )
        feature = len(shape) - features.pop() if len(features) == 1 else None
        is_weight = bool(tensors) and all(t.is_weight for t in tensors)
        return TracedTensor(array, shape, feature, is_weight)

    return rule


def _scaled(function: Callable[..., AnyArray]) -> Callable[..., AnyArray]:
    """Return a sum or difference, of which torch may scale the second operand."""
    return lambda x, y, alpha=1: function(x, y if alpha == 1 else y * alpha)


def _gelu(x: AnyArray, approximate: str = "none") -> AnyArray:
    return ELEMENTWISE["gelu_tanh" if approximate == "tanh" else "gelu"](x)


def _softplus(x: AnyArray, beta: float = 1, threshold: float = 20) -> AnyArray:
    scaled = x if beta == 1 else x * beta
    log = jnp.log1p(jnp.exp(scaled))
    return jnp.where(scaled > threshold, x, log if beta == 1 else log / beta)


def _elu(x: AnyArray, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> AnyArray:
    return jnp.where(x > 0, x * scale, jnp.expm1(x * input_scale) * alpha * scale)


def _clamp(x: AnyArray, low: float | None = None, high: float | None = None) -> AnyArray:
    lifted = x if low is None else jnp.maximum(x, low)
    return lifted if high is None else jnp.minimum(lifted, high)


def _hard_sigmoid(x: AnyArray) -> AnyArray:
    return _clamp(x + 3, 0, 6) / 6


def _pow(x: AnyArray, exponent: Any) -> AnyArray:
    if exponent == 2:
        return jnp.square(x)
    is_whole = isinstance(exponent, int | float) and float(exponent).is_integer()
    return lax.integer_pow(x, int(exponent)) if is_whole else jnp.power(x, exponent)


def _div(x: AnyArray, y: AnyArray, rounding_mode: None = None) -> AnyArray:
    if rounding_mode is not None:
        raise Unlike
    return jnp.divide(x, y)


_FUNCTIONS: dict[str, Callable[..., AnyArray]] = {
    **{name: ELEMENTWISE[name] for name in ("silu", "sigmoid", "tanh", "exp", "log", "square",
                                            "rsqrt", "relu", "neg")},
    **{name: getattr(jnp, name) for name in ("sqrt", "abs", "sin", "cos", "log1p", "expm1", "sign",
                                             "floor", "ceil", "exp2", "reciprocal", "maximum",
                                             "minimum", "where", "atan", "sinh", "cosh", "round")
       if hasattr(jnp, name)},
    "erf": lax.erf,
    "gelu": _gelu,
    "add": _scaled(jnp.add),
    "sub": _scaled(jnp.subtract),
    "rsub": lambda x, y, alpha=1: y - (x if alpha == 1 else x * alpha),
    "mul": jnp.multiply,
    "div": _div,
    "pow": _pow,
    "softplus": _softplus,
    "mish": lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
    "elu": _elu,
    "celu": lambda x, alpha=1.0: jnp.where(x > 0, x, jnp.expm1(x / alpha) * alpha),
    "leaky_relu": lambda x, slope=0.01: jnp.where(x > 0, x, x * slope),
    "relu6": lambda x: _clamp(x, 0, 6),
    "clamp": _clamp,
    "clamp_min": lambda x, low: jnp.maximum(x, low),
    "clamp_max": lambda x, high: jnp.minimum(x, high),
    "hardtanh": lambda x, low=-1, high=1: _clamp(x, low, high),
    "hardsigmoid": _hard_sigmoid,
    "hardswish": lambda x: x * _hard_sigmoid(x),
    "log_sigmoid": lambda x: -_softplus(-x),
    "reciprocal": lambda x: 1 / x,
    "gt": jnp.greater, "ge": jnp.greater_equal, "lt": jnp.less, "le": jnp.less_equal,
    "eq": jnp.equal, "ne": jnp.not_equal,
}  # fmt: skip
RULES |= {f"aten.{name}": _elements(function) for name, function in _FUNCTIONS.items()}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys((f"aten.{name}" for name in names), rule))
        return rule

    return register


# Products.


def _product(x: TracedTensor, weight: AnyArray, over: int, shape: tuple[int, ...]) -> TracedTensor:
    numbers = (((x.array.ndim - 1,), (over,)), ((), ()))
    return TracedTensor(lax.dot_general(x.array, weight, numbers), shape, len(shape) - 1)


@_rule("linear")
def _linear(
    x: TracedTensor, weight: TracedTensor, bias: TracedTensor | None = None
) -> TracedTensor:
    if not weight.is_weight:
        raise Unlike
    result = _product(x, weight.array, 1, (*x.shape[:-1], weight.shape[0]))
    return result if bias is None else replace(result, array=result.array + bias.whole)


@_rule("matmul", "mm")
def _matmul(x: TracedTensor, weight: TracedTensor) -> TracedTensor:
    if not weight.is_weight or x.is_weight or len(weight.shape) != 2:
        raise Unlike
    return _product(x, weight.array, 0, (*x.shape[:-1], weight.shape[1]))


@_rule("addmm")
def _addmm(
    bias: TracedTensor, x: TracedTensor, weight: TracedTensor, beta: int = 1, alpha: int = 1
) -> TracedTensor:
    if (beta, alpha) != (1, 1):
        raise Unlike
    result = _matmul(x, weight)
    return replace(result, array=result.array + bias.whole)


@_rule("einsum")
def _einsum(equation: str, operands: list[TracedTensor], path: Any = None) -> TracedTensor:
    if sum(x.is_weight for x in operands) != 1:
        raise Unlike
    array = jnp.einsum(equation, *(x.whole for x in operands))
    return TracedTensor(array, tuple(array.shape))


# What changes no elements.


@_rule("alias", "contiguous", "clone", "lift_fresh_copy", "detach_")
def _same(x: TracedTensor, **_: Any) -> TracedTensor:
    return x


@_rule("dropout", "feature_dropout", "alpha_dropout")
def _dropout(x: TracedTensor, rate: float, train: bool) -> TracedTensor:
    if train and rate > 0:
        raise Unlike
    return x


@_rule("to", "_to_copy", "type_as")
def _to(x: TracedTensor, *_: Any, **__: Any) -> TracedTensor:
    return x  # the element type of a result is what the graph says: `_checked`


def _moved(x: TracedTensor, array: AnyArray, feature: int | None = None) -> TracedTensor:
    return TracedTensor(array, tuple(array.shape), feature, x.is_weight)


@_rule("view", "reshape", "_unsafe_view")
def _view(x: TracedTensor, sizes: list[int]) -> TracedTensor:
    product = prod(n for n in sizes if n != -1)
    shape = tuple(prod(x.shape) // max(product, 1) if n == -1 else n for n in sizes)
    keeps_rows = not x.is_weight and x.shape and shape and shape[-1] == x.shape[-1]
    is_last = x.feature is not None and x.feature == len(x.shape) - 1
    if keeps_rows:
        return replace(x, shape=shape, feature=len(shape) - 1 if is_last else None)
    return _moved(x, jnp.reshape(x.whole, shape))


@_rule("flatten")
def _flatten(x: TracedTensor, start: int = 0, end: int = -1) -> TracedTensor:
    rank = len(x.shape)
    start, end = start % rank, end % rank
    shape = [*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :]]
    result = _view(x, shape)
    if x.feature is None or start <= x.feature <= end:
        return result
    return replace(result, feature=x.feature - (end - start if x.feature > end else 0))


@_rule("permute")
def _permute(x: TracedTensor, dims: list[int]) -> TracedTensor:
    order = [d % len(x.shape) for d in dims]
    feature = None if x.feature is None else order.index(x.feature)
    return _moved(x, jnp.transpose(x.whole, order), feature)


@_rule("transpose")
def _transpose(x: TracedTensor, first: int, second: int) -> TracedTensor:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return _permute(x, order)


@_rule("t", "numpy_T", "mT", "adjoint")
def _t(x: TracedTensor) -> TracedTensor:
    return _transpose(x, -2, -1) if len(x.shape) > 1 else x


@_rule("unsqueeze")
def _unsqueeze(x: TracedTensor, dim: int) -> TracedTensor:
    at = dim % (len(x.shape) + 1)
    feature = None if x.feature is None else x.feature + (at <= x.feature)
    return _moved(x, jnp.expand_dims(x.whole, at), feature)


@_rule("squeeze")
def _squeeze(x: TracedTensor, dim: int | list[int]) -> TracedTensor:
    dims = [d % len(x.shape) for d in (dim if isinstance(dim, list) else [dim])]
    dims = [d for d in dims if x.shape[d] == 1]
    feature = None if x.feature is None else x.feature - sum(d < x.feature for d in dims)
    return _moved(x, jnp.squeeze(x.whole, tuple(dims)), feature)


@_rule("slice")
def _slice(
    x: TracedTensor, dim: int = 0, start: int | None = 0, stop: int | None = None, step: int = 1
) -> TracedTensor:
    dim %= len(x.shape)
    first, last, _ = slice(start, stop).indices(x.shape[dim])
    array = x.whole
    if (first, last, step) != (0, x.shape[dim], 1):
        array = lax.slice_in_dim(array, first, max(first, last), step, dim)
    return _moved(x, array, x.feature)


@_rule("select")
def _select(x: TracedTensor, dim: int, index: int) -> TracedTensor:
    dim %= len(x.shape)
    at = index % x.shape[dim]
    array = lax.squeeze(lax.slice_in_dim(x.whole, at, at + 1, 1, dim), (dim,))
    feature = None if x.feature in (None, dim) else x.feature - (dim < (x.feature or 0))
    return _moved(x, array, feature)


@_rule("split_with_sizes")
def _split_with_sizes(x: TracedTensor, sizes: list[int], dim: int = 0) -> list[TracedTensor]:
    dim %= len(x.shape)
    array = x.array if dim == len(x.shape) - 1 and not x.is_weight else x.whole
    parts = lax.split(array, sizes, array.ndim - 1 if array is x.array else dim)
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    return [replace(x, array=p, shape=s) for p, s in zip(parts, shapes, strict=True)]


@_rule("split")
def _split(x: TracedTensor, size: int | list[int], dim: int = 0) -> list[TracedTensor]:
    if isinstance(size, list):
        return _split_with_sizes(x, size, dim)
    count, last = divmod(x.shape[dim], size)
    return _split_with_sizes(x, [size] * count + [last] * bool(last), dim)


@_rule("chunk")
def _chunk(x: TracedTensor, chunks: int, dim: int = 0) -> list[TracedTensor]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


@_rule("narrow")
def _narrow(x: TracedTensor, dim: int, start: int, length: int) -> TracedTensor:
    return _slice(x, dim, start, start + length)


@_rule("unbind")
def _unbind(x: TracedTensor, dim: int = 0) -> list[TracedTensor]:
    return [_select(x, dim, i) for i in range(x.shape[dim])]


@_rule("expand")
def _expand(x: TracedTensor, sizes: list[int], implicit: bool = False) -> TracedTensor:
    added = len(sizes) - len(x.shape)
    before = [1] * added + list(x.shape)
    shape = tuple(old if new == -1 else new for old, new in zip(before, sizes, strict=True))
    feature = None if x.feature is None else x.feature + added
    return _moved(x, jnp.broadcast_to(x.whole, shape), feature)


# The module as a function.


@dataclass
class ExportedModule:
    """A module as a function of JAX.

    Attributes:
      params: its parameters by name, as a tree of shapes.
      arguments: what else it reads, by name: its inputs and buffers, as shapes.
      graph: its nodes.
      sources: what a placeholder stands for: a parameter, a constant or an argument, by name; and
        the nodes that are computed of constants alone.
      constants: the numbers that are tensors of the program, or computed of such.
      buffers: the names of the buffers that placeholders stand for.
      parameters: the tensors of the parameters, by name.
      traced: the value of each node, once traced.
      flattened: nodes whose results are traced in their own shape, though rows could stay grouped.
      call: the arguments that the module was exported with.
    """

    graph: Any
    sources: dict[FxNode, tuple[str, str]]
    parameters: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    traced: dict[FxNode, Operand] = field(default_factory=dict)
    flattened: set[FxNode] = field(default_factory=set)
    buffers: dict[FxNode, str] = field(default_factory=dict)
    call: ModuleArguments = ((), {})

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as a tree of shapes, whose paths are their names."""
        tree: dict[str, Any] = {}
        for name, tensor in self.parameters.items():
            *parts, last = name.split(".")
            node = tree
            for part in parts:
                node = node.setdefault(part, {})
            node[last] = shape_of(tensor.shape, jax_dtype(tensor.dtype))
        return tree

    @property
    def nodes(self) -> dict[str, FxNode]:
        """Its nodes by name, in order."""
        return {node.name: node for node in self.graph.nodes}

    def __call__(self, params: Mapping[str, Any], **arguments: AnyArray) -> list[AnyArray]:
        """Trace the module: return its results."""
        tracer = Tracer()
        outputs: list[AnyArray] = []
        for node in self.graph.nodes:
            if node.op == "placeholder" or node in self.sources:
                tracer.values[node] = self._source(node, params, arguments)
            elif node.op == "output":
                outputs = [x.whole for x in _tensors(_mapped(node.args, tracer.values))]
            elif node.op == "get_attr":
                tracer.values[node] = None
            else:
                tracer.run(node)
            if node in self.flattened:
                value = tracer.values[node]
                tracer.values[node] = replace(value, array=value.whole)
        self.traced = tracer.values
        return outputs

    def _source(
        self, node: FxNode, params: Mapping[str, Any], arguments: Mapping[str, AnyArray]
    ) -> Operand:
        kind, name = self.sources.get(node, ("number", ""))
        if kind == "parameter":
            value: Any = params
            for part in name.split("."):
                value = value[part]
            return TracedTensor(value, tuple(value.shape), is_weight=True)
        if kind == "constant":
            number = self.constants[name].item()
            array = jnp.asarray(number, jax_dtype(self.constants[name].dtype))
            return TracedTensor(array, ())
        if kind == "argument":
            return TracedTensor(arguments[name], tuple(arguments[name].shape))
        return node.meta.get("val")
