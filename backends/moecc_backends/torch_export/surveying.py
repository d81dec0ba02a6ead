"""The blocks of a model that have a position in it, and compute the same however it is called.

A trace shows what Python did for the inputs of the trace.  So the model is traced again, with
batches and sequences of other lengths, with its blocks in training, and with gradients: a block of
the first trace that the second one does not have reads sizes or the mode, and is a near miss.  All
of it is one trace, which takes as long as the first; others follow only where it differs or fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils._pytree import tree_leaves, tree_map

from moecc.errors import InputError, Problem
from moecc_backends.jaxpr.graph import problems_of
from moecc_backends.jaxpr.scopes import ParamTree, leaves_of, trace_function
from moecc_backends.jaxpr.survey import BlockKey, Survey, refuse_shared_weights, survey_blocks
from moecc_backends.jaxpr.views import shape_of
from moecc_backends.torch_export.exporting import GRADIENT_MODE, exported_module
from moecc_backends.torch_export.lowering import ExportedModule, ModuleArguments, module_calls
from moecc_backends.torch_export.placing import BlockRegion, Placer, unseen_products
from moecc_backends.torch_source.modules import BlockPlace


@dataclass(frozen=True)
class SurveyedModel:
    """A model and its blocks.

    Attributes:
      model: the dense model.
      exported: what it computes.
      survey: its blocks.
      places: where they stand, by location.
      remarks: what the traces do not show.
    """

    model: Any
    exported: ExportedModule
    survey: Survey
    places: Mapping[str, BlockPlace]
    remarks: tuple[str, ...] = ()

    @property
    def places_by_key(self) -> dict[BlockKey, BlockPlace]:
        """Where the blocks stand, by what they compute."""
        return {key: self.places[i.loc] for key, i in self.survey.instances().items()}

    @property
    def regions(self) -> Iterator[tuple[BlockKey, BlockRegion]]:
        """The nodes of each run of a block, after what the block computes."""
        nodes = self.exported.nodes
        return ((s.keys[0], BlockRegion.of(s.slice, nodes)) for s in self.survey.sites)


def numpy_dtype(tensor: Any) -> Any:
    """Return the element type of a tensor as NumPy has it."""
    return jnp.dtype(str(tensor.dtype).removeprefix("torch."))


def survey_model(model: Any, exported: ExportedModule) -> SurveyedModel:
    """Return the blocks of a model that have a position in it.

    Raises:
      InputError: there is none.
    """
    surveyed = _survey(model, exported)
    if surveyed.survey.sites:
        surveyed = _checked_again(surveyed)
    survey = surveyed.survey
    survey.misses += unseen_products(exported)
    if survey.sites:
        return surveyed
    problem = Problem(
        "the model has no feed-forward block of its parameters",
        where=type(model).__name__,
        expected="a product with a weight, functions of elements, a product with a weight",
    )
    raise InputError([problem, *problems_of(survey.misses)])


def _survey(model: Any, exported: ExportedModule) -> SurveyedModel:
    """Return the blocks of a trace that have a position in the model."""
    dtypes = {n: shape_of(t.shape, numpy_dtype(t)) for n, t in exported.parameters.items()}
    with jax.enable_x64(True):
        tree, shapes = ParamTree.of(exported.params)
        count = -1
        while count < len(exported.flattened):  # again, where a module takes tokens of all rows
            count = len(exported.flattened)
            arguments = ((), exported.arguments)
            traced = trace_function(exported, tree, shapes, leaves_of(dtypes), arguments)
            survey = survey_blocks(traced.scope)
            refuse_shared_weights(survey)
            places = Placer(model, exported).places(survey)
        refuse_shared_weights(survey)
    return SurveyedModel(model, exported, survey, places)


# The second trace.

_SIZES = (
    "it computes something else for batches or sequences of another length: give each length the "
    "same operations, without sizes in them"
)
_TRAINING = (
    "it computes something else in training: let no operation depend on `self.training`, apart "
    "from a dropout before its last product"
)
_GRADIENTS = (
    "gradients are switched in it, as by `torch.no_grad`: switch them outside of it, or freeze its "
    "parameters by `requires_grad_(False)`"
)
_IN_EVALUATION = "torch.export reads the model in evaluation only: blocks may differ in training"
_AS_GIVEN = "torch.export reads the model for these inputs only: blocks may differ for others"


@dataclass(frozen=True)
class _OtherCall:
    """A call of a model with other sizes than it was exported with.

    Attributes:
      arguments: the arguments.
      remarks: the sizes that are the same as before.
    """

    arguments: ModuleArguments
    remarks: tuple[str, ...]


def _checked_again(surveyed: SurveyedModel) -> SurveyedModel:
    """Return the blocks that a second trace has, too; the others are near misses.

    The rate of a dropout is that of the second trace: some models have it in training only.
    """
    model, before = surveyed.model, surveyed.places_by_key
    calls = [*_other_calls(surveyed.exported.call)]
    remarks: tuple[str, ...] = ()
    trace = _first_readable(model, calls, _modules_to_train(surveyed))
    if trace is None:
        remarks, trace = (_IN_EVALUATION,), _first_readable(model, calls[:-1], ())
    if trace is None:
        return replace(surveyed, remarks=(_IN_EVALUATION, _AS_GIVEN))
    again, call = trace
    after = again.places_by_key
    reasons = dict.fromkeys(before.keys() & _switching_gradients(again), _GRADIENTS)
    changed = [key for key in before if key not in after or not _is_alike(before[key], after[key])]
    if changed:  # a third trace says which of the two it is
        in_evaluation = _first_readable(model, [call], ())
        evaluated = {} if in_evaluation is None else in_evaluation[0].places_by_key
        for key in changed:
            is_alike = key in evaluated and _is_alike(before[key], evaluated[key])
            reasons[key] = _TRAINING if is_alike else _SIZES
    for site in list(surveyed.survey.sites):
        changed_keys = [key for key in site.keys if key in reasons]
        if changed_keys:
            surveyed.survey.refuse(site, reasons[changed_keys[0]])
    instances = surveyed.survey.instances()
    places = {
        instances[key].loc: replace(block, loc=instances[key].loc, dropout=after[key].dropout)
        for key, block in before.items()
        if key in instances
    }
    return replace(surveyed, places=places, remarks=(*remarks, *call.remarks))


def _is_alike(first: BlockPlace, again: BlockPlace) -> bool:
    return (first.path, first.last, first.widths) == (again.path, again.last, again.widths)


def _first_readable(
    model: Any, calls: Iterable[_OtherCall], training: Collection[Any]
) -> tuple[SurveyedModel, _OtherCall] | None:
    """Return the blocks of the first of some calls that torch can read, and the call."""
    for call in calls:
        try:
            return _survey(model, exported_module(model, *call.arguments, training)), call
        except InputError:
            continue
    return None


def _other_calls(arguments: ModuleArguments) -> Iterator[_OtherCall]:
    """Yield calls with other sizes of batches and sequences, those with most other sizes first.

    The batch is the first axis of the first tensor; the sequence is the second axis of the first
    tensor of integers, or of features (batch, sequence, features).  All axes of these sizes change,
    so that masks fit; 2 n + 1 tokens are no multiple of n, and more than a whole second sequence.
    """
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.dim()]
    batch = next((t.shape[0] for t in tensors), 0)
    sequences = [t for t in tensors if t.dim() > 1 and not t.is_floating_point()]
    sequences += [t for t in tensors if t.dim() == 3 and t.is_floating_point()]
    length = next((t.shape[1] for t in sequences), 0)
    batches = f"batches of {batch}"
    lengths = f"inputs whose second axis is {length} long"
    sizes = [
        (batch + 1, 2 * length + 1, ()),
        (batch + 1, length, (lengths,)),
        (batch, length, (batches, lengths)),
    ]
    for new_batch, new_length, unread in sizes:
        if not length and unread == (lengths,):
            continue  # the same call as before
        remarks = tuple(
            f"torch.export reads the model for {text} only: blocks may differ for others"
            for text in unread
            if length or text is not lengths
        )
        resized = tree_map(
            partial(_resized, sizes=(batch, new_batch, length, new_length)), arguments
        )
        yield _OtherCall(resized, remarks)


def _resized(value: Any, sizes: tuple[int, int, int, int]) -> Any:
    """Return an argument with repeated elements along the batch, and along sequences."""
    batch, new_batch, length, new_length = sizes
    if not isinstance(value, torch.Tensor):
        return value
    has_features = value.is_floating_point() and value.dim() > 2
    for axis, size in enumerate(value.shape[: value.dim() - has_features]):
        new = size
        if axis and size == length:
            new = new_length
        elif not axis and size == batch:
            new = new_batch
        if new != size:
            value = value.index_select(axis, torch.arange(new, device=value.device) % size)
    return value


def _modules_to_train(surveyed: SurveyedModel) -> list[Any]:
    """Return the modules whose mode a block may read: those that hold one, and those in them."""
    modules = dict(surveyed.model.named_modules(remove_duplicate=False))
    places, paths = surveyed.places_by_key, set[str]()
    for key, region in surveyed.regions:
        calls = [module_calls(node) for node in region.nodes]
        shared = [group[0].path for group in zip(*calls, strict=False) if len(set(group)) == 1]
        paths.add(places[key].path if not places[key].last else shared[-1])
    return [module for path in sorted(paths) for module in modules[path].modules()]


def _switching_gradients(surveyed: SurveyedModel) -> set[BlockKey]:
    """Return the blocks in which the gradient mode changes."""
    places = surveyed.places_by_key
    order = {node: number for number, node in enumerate(surveyed.exported.graph.nodes)}
    switching = set[BlockKey]()
    for key, region in surveyed.regions:
        inner = (n for n in region.nodes if n.op == "call_function")
        modes = [
            n.meta.get(GRADIENT_MODE, (True, [])) for n in sorted(inner, key=order.__getitem__)
        ]
        is_entered_inside = places[key].path in {call.path for call in modes[0][1]}
        if is_entered_inside or len({is_on for is_on, _ in modes}) > 1:
            switching.add(key)
    return switching
