"""The checkpoints of a run, and its tensors on devices: written on the way, read at the start."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moecc.errors import MachineError, MoeccError
from moecc.formats.run import (
    PARAMS,
    array_key,
    best_step,
    check_inside,
    require_state,
    saved_steps,
    state_reader,
)
from moecc.ir.graph import Graph
from moecc.support.extras import install_hint
from moecc.train.events import RunStore, Saved
from moecc.train.run import (
    Position,
    begin_step,
    finish_step,
    keep_steps,
    record_loss,
    write_part,
)
from moecc.train.state import Weights, initial, moment, stored
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import Evaluator, TensorReader
from moecc.weights.expr import Expr, Full, Source, transform
from moecc.weights.movement import Index, Merge, Permute, Rename, Slice, Split
from moecc.weights.simplify import simplify
from moecc_backends.xla.lower.function import sharded_array
from moecc_backends.xla.program import is_first, meet_processes
from moecc_backends.xla.trace.values import PyTree, dtype_of

_SYSTEM = re.compile(r"\[os_error_code='(\d{1,4})'\]")
"""The number of the system's error, at the end of what tensorstore says."""

_LONGEST_SAVE_SECONDS = 24 * 3600
"""How long a save waits for other processes, which the watchdog ends before."""

_PIECE_BYTES = 32 << 20
"""Pieces of about this size are encoded and written at the same time, two of them."""


class Saver:
    """Writes checkpoints of a run, one at a time; on accelerators while training goes on.

    On CPUs training waits: what writes is what computes, and a copy of the state beside all that a
    step needs would be the most memory that the process ever has.

    Args:
      run: the folder of the run.
      keep: how many steps are kept, besides the best.
      beside: whether `save` returns before all is written; None: on accelerators.
      store: receives each step; its processes share no folder.

    Raises:
      MachineError: Orbax is missing.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        beside: bool | None = None,
        store: RunStore | None = None,
    ) -> None:
        try:
            import orbax.checkpoint as orbax
        except ImportError:
            raise MachineError(
                "saving a run needs orbax-checkpoint", hint=install_hint("train")
            ) from None
        # What fails is raised, and reported once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        sys.unraisablehook = _show_unless_late
        self._arguments = orbax.args.PyTreeSave
        self._run, self._keep, self._store = run, keep, store
        self._processes, self._saves = jax.process_count(), count()
        self._shares_folder = store is None or self._processes == 1
        self._beside = jax.default_backend() != "cpu" if beside is None else beside
        self._checkpointer: PyTree = None
        self._writer = ThreadPoolExecutor(1)
        self._pending: tuple[Path, Future[Saved]] | None = None

    def save(self, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> list[Saved]:
        """Begin to write a step, once an earlier one is complete; return the completed steps.

        Args:
          step: steps done.
          tensors: the state; they may be deleted when this returns.
          facts: what ``step.json`` says.

        Raises:
          MachineError: the disk is full, or cannot be written, this time or the last.
        """
        done = self.wait()
        started = time.monotonic()
        if is_first() or not self._shares_folder:
            begin_step(self._run, step)
        meet_processes(f"moecc begins step {step}")
        folder = self._run / "steps" / str(step)
        if self._checkpointer is None:
            self._checkpointer = _checkpointer(tensors, self._shares_folder)
        try:
            state = (folder / "state").absolute()
            self._checkpointer.save(state, args=self._arguments(tensors))
        except Exception as error:
            raise _failed(error, folder / "state") from None
        future = self._writer.submit(self._complete, step, folder, dict(facts), started)
        self._pending = folder, future
        return done if self._beside else [*done, *self.wait()]

    def finished(self) -> list[Saved]:
        """Return the step that was completed since, if any. Raises as `save`."""
        return self.wait() if self._pending and self._pending[1].done() else []

    def wait(self) -> list[Saved]:
        """Wait until nothing is being written, and return the step that was. Raises as `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        try:
            return [pending[1].result()]
        except Exception as error:
            raise _failed(error, pending[0]) from None

    def close(self) -> None:
        """Wait, and let Orbax go; what fails now was not asked for any more."""
        self._writer.shutdown()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _complete(self, step: int, folder: Path, facts: Mapping[str, Any], started: float) -> Saved:
        self._checkpointer.wait_until_finished()
        if self._processes > 1:
            self._report_parts(step)
        is_best = False
        if is_first():
            folder = finish_step(self._run, step, facts).folder
            best = best_step(saved_steps(self._run))
            keep_steps(self._run, self._keep)
            if self._store is not None:
                self._store.put_run()
            is_best = best is not None and best.number == step
        return Saved(step, folder, is_best, time.monotonic() - started)

    def _report_parts(self, step: int) -> None:
        """Let each process hash what it wrote, and upload it where they share no folder."""
        from orbax.checkpoint import multihost

        process = jax.process_index()
        if process:
            write_part(self._run, step, process)
            if self._store is not None:
                self._store.put_part(step)
        # A barrier of the coordinator: a collective would meet those of the steps that go on.
        multihost.sync_global_processes(
            f"moecc wrote step {step}, save {next(self._saves)}",
            timeout=_LONGEST_SAVE_SECONDS,
            processes=set(range(self._processes)),
        )
        if self._store is not None and not process:
            self._store.get_parts(step, self._processes)


def _checkpointer(tensors: Tensors, shares_folder: bool) -> PyTree:
    """Return what writes arrays like `tensors`, a bounded number of bytes at a time.

    Without a bound Orbax encodes all of them at once, which is another copy of the state.
    Processes that share no folder write a file a chunk: those of all together are the arrays, where
    databases of each would have to be merged by one process that has all.
    """
    import orbax.checkpoint as orbax

    pieces = (
        prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in tensors.values()
    )
    # Without a primary process, each makes its folder and says in it what arrays there are.
    first = 0 if shares_folder else None
    processes = orbax.options.MultiprocessingOptions(primary_host=first)
    handler = orbax.BasePyTreeCheckpointHandler(
        save_concurrent_bytes=2 * max(_PIECE_BYTES, *pieces) + 1,
        use_ocdbt=shares_folder,
        use_zarr3=True,
        multiprocessing_options=processes,
    )
    tree_handler = orbax.PyTreeCheckpointHandler(
        use_ocdbt=shares_folder,
        use_zarr3=True,
        handler_impl=handler,
        multiprocessing_options=processes,
    )
    return orbax.AsyncCheckpointer(tree_handler, multiprocessing_options=processes)


def _show_unless_late(unraisable: sys.UnraisableHookArgs) -> None:
    """Print an exception, unless it is of a write that ends after another has failed.

    Orbax closes its event loop at the first failure, and tensorstore (0.1.86) then has a traceback
    printed for each array whose result finds no loop.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _failed(error: BaseException, folder: Path) -> MoeccError:
    if isinstance(error, MoeccError):
        return error
    text = " ".join(str(error).split())
    match = _SYSTEM.search(text)
    return MachineError(
        "a checkpoint cannot be written",
        where=str(folder),
        found=os.strerror(int(match[1])) if match else text[:200],
        hint="free some space; moecc train --resume goes on from the last complete checkpoint",
    )


# The checkpoints of a run: saved under the names of the model, begun from whatever is there.


@dataclass
class RunCheckpoints:
    """The checkpoints of one run.

    Attributes:
      run: the folder.
      graph: the program's; the weights of its parameters are over tensors of the state.
      abstract: the program's state after so many steps, as shapes, types and shardings.
      start: makes the state before the first step, where nothing is saved yet.
      saver: writes.
      recipe: the digest of the recipe.
      store: has the steps, where processes share no folder; else None.
    """

    run: Path
    graph: Graph
    abstract: Callable[[int], PyTree]
    start: Callable[[], tuple[PyTree, Position]]
    saver: Saver
    recipe: str
    store: RunStore | None = None

    _last: tuple[PyTree, Callable[[PyTree], Tensors]] | None = field(init=False, default=None)

    def _slots(self, step: int) -> list[StateLeaf]:
        return slots_of(self.graph, self.abstract(step))

    def _tensors(self, state: PyTree, step: int) -> Tensors:
        kind = jax.tree.structure(state)
        if self._last is None or self._last[0] != kind:
            self._last = (kind, to_tensors(self._slots(step)))
        return self._last[1](state)

    def begin(self) -> tuple[PyTree, Position, float | None, bool]:
        """Return the last checkpoint, or the start.

        Returns:
          State, position, the best held-out loss so far, and whether an evaluation is outstanding.

        Raises:
          InputError: the checkpoint is not as it was saved, or not of this model.
        """
        if self.store is not None:
            meet_processes("moecc uploaded the last step")
            self.store.fetch()
        steps = saved_steps(self.run)
        if not steps:
            return (*self.start(), None, False)
        last, best = steps[-1], best_step(steps)
        check_inside(self.run, last)
        require_state(last)
        slots, abstract = self._slots(last.number), self.abstract(last.number)
        state = restore(slots, state_reader(last.state).read, abstract)
        at = Position(last.facts.step, last.facts.tokens, last.facts.left_out)
        return state, at, None if best is None else best.loss, last.facts.is_unevaluated

    def record_loss(self, step: int, loss: float | None) -> None:
        """Record the evaluation of the last checkpoint, which lacked it. Raises MachineError."""
        if is_first():
            record_loss(saved_steps(self.run)[-1], loss)
            if self.store is not None:
                self.store.put_record(step)

    def save(
        self, state: PyTree, at: Position, loss: float | None, is_unevaluated: bool
    ) -> list[Saved]:
        """Begin to save; return the steps completed since. Raises MachineError."""
        done = self.wait()  # before tensors are made: of one save there is one copy
        tensors = self._tensors(state, at.step)
        prefix = array_key(PARAMS, "")
        params = {
            key.removeprefix(prefix): {"dtype": dtype_of(array).name, "shape": list(array.shape)}
            for key, array in sorted(tensors.items())
            if key.startswith(prefix)
        }
        facts = {
            "recipe": self.recipe, "tokens": at.tokens, "left_out": list(at.left_out),
            "loss": loss, "is_unevaluated": is_unevaluated, "tensors": params,
        }  # fmt: skip
        return [*done, *self.saver.save(at.step, tensors, facts)]

    def finished(self) -> list[Saved]:
        """Return the steps completed since. Raises MachineError."""
        return self.saver.finished()

    def wait(self) -> list[Saved]:
        """Wait until nothing is being saved; return the steps completed. Raises MachineError."""
        return self.saver.wait()


# The state of a step as tensors under the names of the model, and back, slice by slice.
#
# `moecc.train.state` has the expressions; here they become slices of arrays on devices, and arrays
# on devices become what their expressions say, each process reading what its devices hold.

_COUNT = "moments.count"
"""The number of updates in a state."""


_GROUPS = 8
"""Tensors to be saved are made in about so many groups."""

Tensors = dict[str, Array]


@dataclass(frozen=True)
class StateLeaf:
    """A leaf of the state.

    Attributes:
      key: its name where no parameter is in its path: ``step``, ``moments.count``.
      expr: over tensors of the saved state, where a parameter is; else None.
      is_empty: whether it belongs to a parameter and holds nothing of it.
      abstract: its shape, type and sharding.
    """

    key: str
    expr: Expr | None
    is_empty: bool
    abstract: jax.ShapeDtypeStruct

    @property
    def tensors(self) -> list[tuple[str, Expr | None, Sharding]]:
        """Its tensors: names, expressions over its array (None for all of it), and shardings."""
        where = self.abstract.sharding
        assert where is not None, "a state says where it lies"
        if self.is_empty:
            return []
        if self.expr is None:
            return [(self.key, None, where)]
        parts = stored("array", self.expr)
        return [(key, expr, _sharding(expr, where)) for key, expr in parts]

    def restored(self, evaluator: Evaluator, reader: TensorReader) -> Array:
        """Return the array, made from saved tensors."""
        shape, dtype, where = self.abstract.shape, self.abstract.dtype, self.abstract.sharding
        if self.expr is not None:
            return _evaluated(self.expr, evaluator, self.abstract)
        array = np.zeros(shape, dtype) if self.is_empty else reader(self.key).astype(dtype)
        return sharded_array(shape, where, lambda box: array[tuple(slice(*b) for b in box)])


def slots_of(graph: Graph, state: PyTree) -> list[StateLeaf]:
    """Return the leaves of a state, in the order of its tree.

    Args:
      graph: the program; the weights of its parameters are over tensors of a canonical graph.
      state: a tree of shapes, types and shardings, with parameters' names in its paths.
    """
    slots = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        name = next((w for w in words if w in graph.params), None)
        # A balance bias is a parameter of the model that the optimiser does not know.
        key = ".".join("params" if w == "bias" else w for w in words if w != name)
        weight = None if name is None else graph.params[name].weight
        expr = None if weight is None else moment(weight, key, tuple(leaf.shape))
        slots.append(StateLeaf(key, expr, name is not None and expr is None, leaf))
    return slots


def to_tensors(slots: list[StateLeaf]) -> Callable[[PyTree], Tensors]:
    """Return a function from a state to its tensors, by the names that are saved.

    A tensor that is a whole array of the state is that array itself, which must not be donated
    while it is read.  Of an accelerator the tensors are in the memory of its host, and were made
    there a group at a time, so that a device has room for a group of them beside the state at most.
    """

    def compiled(group: list[int]) -> Callable[[list[Array]], Tensors]:
        parts = [slots[at].tensors for at in group]

        def tensors_of(arrays: list[Array]) -> Tensors:
            pairs = zip(arrays, parts, strict=True)
            return {
                key: array if expr is None else _moved(expr, array)
                for array, part in pairs
                for key, expr, _ in part
            }

        places = {key: _on_host(where) for part in parts for key, _, where in part}
        return jax.jit(tensors_of, out_shardings=places)

    groups = [(group, compiled(group)) for group in _groups(slots)]

    def tensors(state: PyTree) -> Tensors:
        leaves, named = jax.tree.leaves(state), {}
        for group, run in groups:
            named.update(run([leaves[at] for at in group]))
        return named

    return tensors


def _groups(slots: list[StateLeaf]) -> Iterator[list[int]]:
    """Yield the leaves of a state in groups of a part of its bytes, or of one large leaf."""
    sizes = [prod(slot.abstract.shape) * slot.abstract.dtype.itemsize for slot in slots]
    group: list[int] = []
    for at, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > sum(sizes) / _GROUPS:
            yield group
            group = []
        group.append(at)
    yield group


def _on_host(where: Sharding) -> Sharding:
    """Return `where` in the memory of the host, if that is not the memory of the device."""
    if jax.default_backend() == "cpu":
        return where
    return where.with_memory_kind("pinned_host")


def _moved(expr: Expr, array: Array) -> Array:
    """Return what `expr` is of `array`."""
    if isinstance(expr, Source):
        return array
    x = _moved(expr.operands[0], array)
    names = expr.operands[0].type.names
    match expr:
        case Index():
            return lax.index_in_dim(x, expr.at, names.index(expr.axis), keepdims=False)
        case Slice():
            return lax.slice_in_dim(x, expr.start, expr.stop, axis=names.index(expr.axis))
        case Permute():
            return jnp.transpose(x, [names.index(n) for n in expr.type.names])
        case Rename():
            return x
        case Split() | Merge():
            return jnp.reshape(x, expr.type.shape)
    raise TypeError(f"{expr} does not move data")


def _sharding(expr: Expr, where: Sharding) -> Sharding:
    """Return where the tensor `expr` of an array on `where` lies: as the axes that it keeps."""
    if not isinstance(where, NamedSharding):
        return where
    chain = [expr]
    while chain[-1].operands:
        chain.append(chain[-1].operands[0])
    by_axis = dict(zip(chain[-1].type.names, where.spec, strict=False))
    if any(isinstance(x, Slice | Rename | Split | Merge) for x in chain):
        by_axis = {}
    return NamedSharding(where.mesh, PartitionSpec(*map(by_axis.get, expr.type.names)))


def restore(slots: list[StateLeaf], reader: TensorReader, tree: PyTree) -> PyTree:
    """Return a state whose leaves are made from saved tensors.

    Args:
      slots: its leaves.
      reader: reads the tensors, by the names that were saved.
      tree: a tree of the same structure.

    Raises:
      InputError: a tensor is missing, or of another shape.
    """
    evaluator = Evaluator(reader)
    leaves = [slot.restored(evaluator, reader) for slot in slots]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def with_moments(
    state: PyTree, slots: list[StateLeaf], moments: Weights, reader: TensorReader
) -> PyTree:
    """Return a state whose moments are made from the moments of another state.

    Args:
      state: the state, with zeros in place of its moments.
      slots: its leaves.
      moments: expressions by name, ``moments.m.NAME``; what is not among them stays zero.
      reader: reads what they are made of, and the number of updates.
    """
    evaluator = Evaluator(reader)

    def carried(x: Expr) -> Expr:
        if not isinstance(x, Source):
            return x
        expr = moments.get(x.name)
        return Full(0.0, x.type) if expr is None else Cast(expr, x.type.dtype)

    leaves, tree = jax.tree.flatten(state)
    for at, slot in enumerate(slots):
        if slot.key == _COUNT:
            leaves[at] = slot.restored(evaluator, reader)
        elif slot.expr is not None and slot.key.startswith("moments."):
            leaves[at] = _evaluated(transform(slot.expr, carried), evaluator, slot.abstract)
    return jax.tree.unflatten(tree, leaves)


def load(
    graph: Graph,
    weights: Weights,
    reader: TensorReader,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> Tensors:
    """Return the parameters of a program before the first step.

    Args:
      graph: the program.
      weights: how the tensors of the canonical graph are made.
      reader: reads the source.
      abstract: shape, type and sharding of each parameter.

    Raises:
      InputError: a tensor of the source is missing or of another type.
    """
    evaluator, params = Evaluator(reader), {}
    for name, leaf in abstract.items():
        weight = graph.params[name].weight
        assert weight is not None, "parameters of a program have expressions"
        params[name] = _evaluated(initial(weight, weights), evaluator, leaf)
    return params


def _evaluated(expr: Expr, evaluator: Evaluator, leaf: jax.ShapeDtypeStruct) -> Array:
    """Return the value of `expr` in the type of `leaf` and on its devices, part by part."""
    dtype = dtype_of(leaf)
    wanted = simplify(Cast(expr, dtype) if dtype.is_float else expr)
    return sharded_array(
        expr.type.shape,
        leaf.sharding,
        lambda box: np.array(evaluator.block(wanted, box), order="C"),
    )
