"""Arrays of NumPy's and jax's: whether they fit the types of a graph, and how they become another.

A random key is a key of jax's in a program, and the 64-bit number that has its bits outside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from moecc.backend import Arrays
from moecc.errors import Problem, nearest, raise_problems
from moecc.ir.graph import Graph, Value
from moecc.plan.machines import in_tiles
from moecc.types import Array as NumpyArray


def jax_inputs(graph: Graph, inputs: Arrays) -> dict[str, Any]:
    """Return `inputs` as the function of `graph` takes them: with keys of jax's.

    A key may be one already, or the 64-bit number that the reference takes: then both draw the
    same numbers.  Under ``jax.jit`` it is too late for that, as jax halves such a number.
    """
    is_key = {n: v.type.dtype.kind == "key" for n, v in graph.inputs.items()}
    return {n: _key(a) if is_key.get(n) else a for n, a in inputs.items()}


def to_device(array: Any, value: Value) -> jax.Array:
    """Return a parameter or an input as an array of jax's, on one device.

    Raises:
      InputError: it does not fit the type of `value`.
    """
    problems = misfits(value, array, {})
    raise_problems(problems)
    if value.type.dtype.kind == "key":
        return _key(array)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = np.asarray(array).astype(np.int32)
    # Weights stay where they were read to; what a caller gives may change behind a run.
    return jax.device_put(array) if value.is_param else jnp.asarray(array)


def to_numpy(array: jax.Array) -> NumpyArray:
    """Return an output as NumPy's; a key of jax's as the 64-bit number that has its bits."""
    if not _is_key(array):
        # NumPy reads the memory of an array: where it could not be allocated, jaxlib aborts there.
        jax.block_until_ready(array)
        return np.asarray(array)
    words = np.asarray(jax.random.key_data(array)).astype(np.uint64)
    return np.asarray((words[..., 0] << np.uint64(32)) | words[..., 1])


def _label(value: Value) -> str:
    return f"{'param' if value.is_param else 'input'} %{value.name}"


def missing(graph: Graph, params: Collection[str], inputs: Collection[str]) -> list[Problem]:
    """Return which inputs, and which parameters that something reads, are not given."""
    absent = [v for n, v in graph.inputs.items() if n not in inputs]
    absent += [v for n, v in graph.params.items() if v.users and n not in params]
    return [
        Problem(
            "no array is given",
            _label(v),
            str(v.type),
            hint=None if v.is_param else nearest(v.name, inputs),
        )
        for v in absent
    ]


def check_given(graph: Graph, params: Collection[str], inputs: Mapping[str, Any]) -> None:
    """Raise InputError where arrays are missing, or inputs are no arrays of the axes of theirs."""
    problems = missing(graph, params, inputs)
    for name, value in graph.inputs.items():
        array, message, actual = inputs.get(name), "", ""
        if array is None:
            continue
        if not hasattr(array, "dtype"):
            message, actual = "this is no array", type(array).__name__
        elif value.type.dtype.kind != "key" and array.ndim != value.type.rank:
            message, actual = "the array has another number of axes", str(list(array.shape))
        if message:
            problems.append(Problem(message, _label(value), str(value.type), actual))
    raise_problems(problems)


def check_keys(keys: Mapping[str, jax.Array]) -> None:
    """Raise InputError if one of the inputs that are to be random keys is not one of jax's."""
    problems = [
        Problem(
            "this is no key of jax's",
            f"input %{name}",
            expected="jax.random.key(0), for example",
            found=f"{element_kind(array.dtype)}{list(array.shape)}"
            if hasattr(array, "dtype")
            else type(array).__name__,
            hint="jax_inputs(graph, inputs) makes one of a number, wrap_key_data of two words",
        )
        for name, array in keys.items()
        if not hasattr(array, "dtype") or not _is_key(array) or array.ndim
    ]
    raise_problems(problems)


def misfits(value: Value, array: Any, sizes: dict[str, int]) -> list[Problem]:
    """Return the problems of the shape or the kind of an array for `value`.

    Args:
      value: an input or a parameter.
      array: what is given for it.
      sizes: what variables stand for, completed here.
    """
    wanted, shape = value.type.sizes, np.shape(array)
    fits = len(wanted) == len(shape) and all(
        (size == n) if isinstance(size, int) else sizes.setdefault(str(size), n) == n
        for size, n in zip(wanted, shape, strict=True)
    )
    kind, expected = element_kind(array.dtype), value.type.dtype.kind
    if fits and (kind == expected or (kind, expected) == ("int", "key")):
        return []
    actual = f"{kind}{list(shape)}"
    return [Problem("the array does not fit", _label(value), str(value.type), actual)]


def element_kind(dtype: np.dtype[np.generic]) -> str:
    """Return the kind of element as the types of the IR name it; `dtype` is NumPy's or jax's."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "key"
    if jnp.issubdtype(dtype, jnp.floating):
        return "float"
    return {"i": "int", "u": "int", "b": "bool"}.get(dtype.kind, str(dtype))


def _is_key(array: Any) -> bool:
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _key(array: Any) -> Any:
    """Return the key of jax's that has the bits of a 64-bit number; one of jax's as it is."""
    if _is_key(array):
        return array
    bits = np.asarray(array, np.uint64)
    words = np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=-1)
    data = jnp.asarray(words.astype(np.uint32))
    return jax.random.wrap_key_data(data, impl="threefry2x32")


# Parameters in a wider type than that of the computation, cast where they are used.
#
# A loop over layers that is given them cast would have a copy of all of them for as long as it
# runs. One that casts a layer a turn has none; but the gradient of a cast has the wider type, which
# would take as much. So the gradient leaves by an array of its own, in the narrower type, that
# nothing reads.


class Master(NamedTuple):
    """A parameter as it is stored.

    Attributes:
      stored: the parameter.
      slope: an array of its shape in the type of the computation; its gradient is the parameter's
        when it is cast, and its elements are never read.
    """

    stored: jax.Array
    slope: jax.Array

    def cast(self) -> jax.Array:
        """Return the parameter in the type of the computation."""
        return _cast(self.stored, self.slope)

    def as_stored(self, platform: str) -> Master:
        """Return it in the layout in which `platform` has it, whatever its readers would like.

        A compiler that gave a loop its parameters in another layout would copy those of all layers
        before the loop; so it changes the layout of one layer a turn.
        """
        order = stored_order(self.stored.shape, platform)
        return self._replace(stored=with_layout_constraint(self.stored, Layout(order)))


def stored_order(shape: tuple[int, ...], platform: str) -> tuple[int, ...]:
    """Return the dimensions of a parameter as they are in memory, the last one fastest.

    A TPU has arrays in tiles, and of the last two dimensions that one last which pads less.
    """
    order = tuple(range(len(shape)))
    if platform != "tpu" or len(shape) < 2 or 1 in shape[-2:]:
        return order
    *leading, outer, inner = order
    is_turned = in_tiles(shape[-1], shape[-2]) < in_tiles(shape[-2], shape[-1])
    return (*leading, inner, outer) if is_turned else order


def cast_all(arrays: Iterable[jax.Array | Master]) -> tuple[jax.Array, ...]:
    """Return `arrays` in the type of the computation."""
    return tuple(a.cast() if isinstance(a, Master) else a for a in arrays)


@jax.custom_vjp
def _cast(stored: jax.Array, slope: jax.Array) -> jax.Array:
    # Rounding to its own precision changes nothing, but keeps the TPU compiler from casting the
    # whole parameter before the loop: it narrows what is only read to be cast (its pass
    # bfloat16-propagation), across a barrier, too.
    kind = np.finfo(stored.dtype)
    rounded = jax.lax.reduce_precision(stored, kind.nexp, kind.nmant)
    return rounded.astype(slope.dtype)


_cast.defvjp(
    lambda stored, slope: (_cast(stored, slope), None), lambda _, gradient: (None, gradient)
)
