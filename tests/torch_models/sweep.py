"""Every architecture of transformers that can be built small, converted and judged.

Each is judged in a process of its own; a sweep goes on from its result, and one that was
interrupted from the lines beside it.  Mixtures written by hand are the operations that torch.export
shows of a dense block, run node by node with the weights of each expert: they know nothing of
graphs or emitted modules.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from moecc_backends.jaxpr.storage import LeafEvaluator
from moecc_backends.torch_export import conversion as conversions
from moecc_backends.torch_export.exporting import exported_module
from moecc_backends.torch_export.placing import BlockRegion
from moecc_backends.torch_export.surveying import survey_model

from moecc.errors import MoeccError
from moecc.weights.expr import sources

from . import tiny
from .expected import expected_blocks

PIPELINE = "upcycle{experts=4 top-k=2},add-losses{metrics=false}"
PROCESSOR_SECONDS = 20
"""The limit of an architecture, which other work on the machine does not use up."""


TOLERANCE = 1e-12
"""The largest difference of logits from those of the dense model, beside the largest logit."""

ROUNDING = 1e-15
"""Relative size of the changes of weights that stand for other orders of the same sums."""

SPREAD = 0.02
"""Standard deviation of what is added to weights where scores are as good as equal."""

RATES = (1e-4, 1e-6, 1e-8, 1e-10)
"""Learning rates, of which the first that lowers the loss of the dense model is taken."""


class Wrong(Exception):
    """A converted model computes something else than it should."""


class Different(Wrong):
    """Numbers differ, which the dense model's own may do where rounding decides them."""


class Undecided(Exception):
    """The dense model itself does not do what the converted one would be held to."""


def outputs(model, inputs: Mapping[str, Any]) -> list[Any]:
    """Return the tensors of floating point that a model returns."""
    torch.manual_seed(0)  # some draw what they mask
    result = model(**inputs)
    values = result.values() if hasattr(result, "values") else result
    flat = []
    stack = list(values)
    while stack:
        value = stack.pop(0)
        if isinstance(value, tuple | list):
            stack = [*value, *stack]
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            flat.append(value)
    return flat


def compare(
    a: list[Any], b: list[Any], tolerance: float, what: str, *, together: bool = False
) -> float:
    """Return the largest difference beside the largest value. Raises Wrong above a tolerance.

    Gradients are held to the largest of all: some are zero but for rounding.
    """
    largest = max((x.abs().max().item() for x in a if x.numel()), default=1.0) if together else 0.0
    if [x.shape for x in a] != [x.shape for x in b] or not a:
        raise Wrong(f"{what}: other shapes")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            raise Wrong(f"{what}: other elements are finite")
        mask = torch.isfinite(x)
        if mask.any():
            scale = largest or x[mask].abs().max().item() or 1.0
            worst = max(worst, (x[mask] - y[mask]).abs().max().item() / scale)
    if worst > tolerance:
        raise Different(f"{what}: differ by {worst:.1e}")
    return worst


def judge(kind: str, name: str) -> dict[str, object]:
    """Return what was found of an architecture."""
    row = {"type": kind, "class": name}
    started = time.process_time()
    torch.set_default_dtype(torch.float64)  # tables of positions, too
    errors = []
    found = None
    try:
        for model in tiny.builds(kind, name):
            for inputs in tiny.inputs(model):
                try:
                    with torch.no_grad():
                        results = outputs(model, inputs)
                    if not torch.isfinite(results[0]).any():
                        raise ValueError("no number that it returns is finite")
                    found = model, inputs, results
                    break
                except Exception as error:
                    errors.append(said(error))
            if found is not None:
                break
    except Exception as error:
        return {**row, "stage": "build", "reason": said(error)}
    if found is None:
        return {**row, "stage": "inputs", "reason": errors[0] if errors else "none is known"}
    model, inputs, before = found
    row["inputs"] = sorted(inputs)
    verdict = judge_conversion(model, inputs, before)
    if verdict["stage"] == "different" and (drift := sensitivity(model, inputs)) > TOLERANCE:
        # Rounding decides what the dense model returns: judge it with weights further apart.
        model = perturbed(model, SPREAD, 0, relative=False)
        row["spread"] = f"weights {ROUNDING:.0e} apart change the dense model by {drift:.0e}"
        with torch.no_grad():
            before = outputs(model, inputs)
        verdict = judge_conversion(model, inputs, before)
        if verdict["stage"] == "different" and (drift := sensitivity(model, inputs)) > TOLERANCE:
            reason = f"{row['spread']}, and by {drift:.0e} where they are spread by {SPREAD}"
            verdict = {"stage": "not judged", "reason": reason}
    if verdict["stage"] == "different":
        verdict["stage"] = "wrong"
    return row | verdict | {"seconds": round(time.process_time() - started, 1)}


def perturbed(model, size: float, seed: int, *, relative: bool):
    """Return a copy of a model with normal noise of a size on its parameters."""
    model, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = size * torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param += noise * param if relative else noise
    return model


def sensitivity(model, inputs: dict[str, Any]) -> float:
    """Return how far weights that differ by rounding change a dense model, in four draws."""
    with torch.no_grad():
        before = outputs(model, inputs)
        copies = (perturbed(model, ROUNDING, seed, relative=True) for seed in range(4))
        return max(compare(before, outputs(c, inputs), math.inf, "perturbed") for c in copies)


def judge_conversion(model, inputs: dict[str, Any], before: list[Any]) -> dict[str, object]:
    """Return what was found of a model, whose results are known."""
    row = {}
    try:
        exported = exported_module(model, (), inputs)
        surveyed = survey_model(model, exported)
        moe = conversions.convert_surveyed(surveyed, PIPELINE, causal=False)
    except MoeccError as error:
        problems = [str(p) for p in error.problems]
        stage = "export" if "torch.export" in problems[0] else "no block"
        if stage == "no block":
            try:
                row["expected"] = counted(model, exported, {}, " ".join(problems))
            except Wrong as wrong:
                return {**row, "stage": "wrong", "reason": str(wrong), "misses": problems[1:]}
        return {
            **row,
            "stage": stage,
            "reason": problems[0].replace("\n", " "),
            "misses": problems[1:],
        }
    report = moe.conversion.report
    row |= {
        "blocks": len(report.blocks),
        "converted": sum(b.is_converted for b in report.blocks),
        "operations": sorted({b.operations for b in report.blocks}),
        "places": [p.path for p in moe.conversion.places],
        "misses": list(report.misses),
    }
    downs = {surveyed.places[p.loc].downs[0]: p.path for p in moe.conversion.places}
    try:
        row["expected"] = counted(model, exported, downs, " ".join(report.misses))
        row |= checks(surveyed, moe, inputs, before)
        row["stage"] = "right"
    except Wrong as error:
        stage = "different" if isinstance(error, Different) else "wrong"
        row |= {"stage": stage, "reason": str(error)}
    except Undecided as error:
        row |= {"stage": "not judged", "reason": str(error)}
    return row


def counted(model, exported, downs: Mapping[str, str], misses: str) -> int:
    """Return how many blocks a model runs, by the names of its layers.

    Raises Wrong where one is neither converted nor a near miss, or another was converted.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    sources = exported.sources.items()
    used = {name for node, (kind, name) in sources if kind == "parameter" and node.users}
    expected = {}
    for path, names in expected_blocks(model).items():
        weights = [canonical[id(model.get_submodule(n).weight)] for n in (*names, path)]
        if used.issuperset(weights):
            expected[weights[-1]] = path
    missed = [path for weight, path in expected.items() if weight not in downs]
    missed = [path for path in missed if f"{path}." not in misses]
    strange = [path for weight, path in downs.items() if weight not in expected]
    if missed or strange:
        raise Wrong(f"blocks: not found {missed}, not expected {strange}")
    return len(expected)


def checks(surveyed, moe, inputs: dict[str, Any], before: list[Any]) -> dict[str, object]:
    """Hold a converted model to the dense one, and to mixtures written by hand."""
    with torch.no_grad():
        row = {"logits": compare(before, outputs(moe, inputs), TOLERANCE, "logits")}
    row |= against_hand(surveyed, moe, inputs)
    with tempfile.TemporaryDirectory() as folder:
        moe.save_pretrained(folder)
        loaded = conversions.load(folder)
        # Tables of positions and the like are computed again, in another type.
        buffers = dict(moe.named_buffers())
        for name, buffer in loaded.named_buffers():
            buffer.copy_(buffers[name])
        stored = dict(loaded.named_parameters())
        # transformers keeps parts of some models in float32, whatever the type of the others.
        is_alike = all(p.dtype == stored[n].dtype for n, p in moe.named_parameters())
        pairs = ((p, stored[n]) for n, p in moe.named_parameters())
        if not all(torch.equal(a.to(b.dtype), b) for a, b in pairs):
            raise Wrong("loaded: other parameters")
        loaded = loaded.double().eval()
        for module in loaded.modules():  # products of groups are of other types than float64
            if hasattr(module, "config"):
                module.config._experts_implementation = "batched_mm"
        with torch.no_grad():
            tolerance = 1e-14 if is_alike else 1e-5
            compare(outputs(moe, inputs), outputs(loaded, inputs), tolerance, "loaded")
    row["rate"] = rate = learning_rate(surveyed.model, inputs)
    values, losses = trained(deepcopy(moe), inputs, rate)
    if not values[-1] < values[0]:
        raise Wrong(f"training: the loss went from {values[0]:.3g} to {values[-1]:.3g}")
    row["losses"] = sorted(losses)
    return row


def against_hand(surveyed, moe, inputs: dict[str, Any]) -> dict[str, object]:
    """Perturb the experts, and compare results and gradients with a mixture written by hand."""
    exported, survey = surveyed.exported, surveyed.survey
    instances = survey.instances()
    regions = {}
    for site in survey.sites:
        region = BlockRegion.of(site.slice, exported.nodes), site.slice
        regions.setdefault(instances[site.keys[0]].loc, []).append(region)
    changed, by_hand = deepcopy(moe), deepcopy(moe)
    graph, names = moe.conversion.graph, moe.conversion.emitted.names
    generator = np.random.default_rng(0)
    every = []
    for mixture in mixtures(by_hand):
        loc = next(p.loc for p in moe.conversion.places if p.path == mixture.path)
        params = [p for p in graph.params.values() if p.loc == loc]
        leaves = {s.name for p in params for s in sources(p.weight)}
        experts = [
            {n: exported.parameters[n].detach().numpy()
             + 0.1 * generator.standard_normal(exported.parameters[n].shape) for n in leaves}
            for _ in range(4)
        ]  # fmt: skip
        router = None
        for param in params:
            target = changed.get_parameter(names[param.name])
            if sources(param.weight):
                rows = [LeafEvaluator(e).evaluate(param.weight)[i] for i, e in enumerate(experts)]
                target.data = torch.from_numpy(np.stack(rows))
            else:
                target.data *= 20
                router = by_hand.get_parameter(names[param.name])
                router.data *= 20
                every.append((f"{loc} router", target, router))
        runs = [
            _by_hand(exported, region, block, experts, router) for region, block in regions[loc]
        ]
        mixture.forward = lambda x, runs=dict(runs): runs[x.numel()](x)
    a, b = outputs(changed, inputs), outputs(by_hand, inputs)
    row = {"experts": compare(a, b, 1e-9, "experts")}
    draws = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=draws, dtype=x.dtype) for x in a]
    for results in (a, b):
        total = sum((x * w)[torch.isfinite(x)].sum() for x, w in zip(results, weights, strict=True))
        total.backward()
    grads = [(x.grad, y.grad) for _, x, y in every if x.grad is not None]
    shared = dict(by_hand.named_parameters())
    for name, param in changed.named_parameters():
        if name not in names.values() and param.grad is not None:
            grads.append((param.grad, shared[name].grad))
    row["gradients"] = compare(
        [x for x, _ in grads], [y for _, y in grads], 1e-8, "gradients", together=True
    )
    return row


def mixtures(model) -> list[Any]:
    """Return the mixtures of a model."""
    return [m for m in model.modules() if type(m).__mro__[1].__name__ == "MixtureBlock"]


def _by_hand(exported, region: BlockRegion, block, experts, router) -> tuple[int, Any]:
    """Return a mixture of the nodes of a block, after the number of elements that it takes."""
    nodes = list(exported.graph.nodes)
    named = exported.nodes
    last = named[str(block.equations[-1].eqn.source_info.name_stack).partition("\x1f")[0]]
    inside = [n for n in nodes if n in region.nodes or exported_weight(exported, n)]
    holders = {n: name for n, (kind, name) in exported.sources.items() if kind == "parameter"}
    constants = {
        n: exported.constants[name] for n, (kind, name) in exported.sources.items()
        if kind == "constant"
    }  # fmt: skip
    tensors = [
        {**constants,
         **{n: torch.from_numpy(e[name]) for n, name in holders.items() if name in e}}
        for e in experts
    ]  # fmt: skip
    inputs = {n for up in region.ups for n in up.all_input_nodes if n not in region.nodes}
    same = [n for n in inputs if not exported.traced[n].is_weight]

    def forward(x):
        logits = x @ router.T
        best, index = (x[..., :2] for x in logits.sort(dim=-1, descending=True, stable=True))
        gates = best.softmax(-1)
        results = []
        for tensor in tensors:
            values = {**tensor, **{n: x.reshape(n.meta["val"].shape) for n in same}}
            order = [
                n
                for n in inside
                if n in region.nodes or set(n.all_input_nodes) <= values.keys() | set(inside)
            ]
            results.append(run_nodes(_runnable(order, values), values, last).reshape(x.shape))
        stacked = torch.stack(results, -2)
        chosen = stacked.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))
        return (chosen * gates[..., None]).sum(-2)

    return same[0].meta["val"].numel(), forward


def _runnable(nodes: list[Any], values: Mapping[Any, Any]) -> list[Any]:
    """Return the nodes that can be computed from values, in order."""
    known, order = set(values), []
    for node in nodes:
        if node.op == "call_function" and set(node.all_input_nodes) <= known:
            known.add(node)
            order.append(node)
    return order


def run_nodes(nodes: Sequence[Any], values: dict[Any, Any], result):
    """Run nodes of torch.fx on values of the nodes that they read."""
    for node in nodes:
        if node not in values:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values[result]


def exported_weight(exported, node) -> bool:
    """Whether a node is a view of a parameter."""
    value = exported.traced.get(node)
    return bool(getattr(value, "is_weight", False)) and node.op == "call_function"


def learning_rate(model, inputs: dict[str, Any]) -> float:
    """Return a rate at which the loss of a dense model falls. Raises Undecided for none."""
    for rate in RATES:
        values, _ = trained(deepcopy(model), inputs, rate)
        if values[-1] < values[0]:
            return rate
    raise Undecided(f"training: no rate of {RATES} lowers the loss of the dense model")


def trained(model, inputs: dict[str, Any], rate: float) -> tuple[list[float], dict[str, float]]:
    """Train five steps. Returns the loss before each and at the end, and those of mixtures."""
    torch.manual_seed(0)
    target = torch.randn_like(outputs(model, inputs)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    read_losses = getattr(model, "losses", dict)
    values = []
    for _ in range(6):
        result = outputs(model, inputs)[0]
        loss = ((result - target)[torch.isfinite(result)] ** 2).mean()
        auxiliary = read_losses().get("loss.auxiliary")
        values.append(loss.item())
        optimizer.zero_grad()
        (loss if auxiliary is None else loss + 0 * auxiliary).backward()
        optimizer.step()
    return values, {name: float(x) for name, x in read_losses().items()}


def said(error: BaseException) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {str(error)[:160]}".replace("\n", " ")


def in_child(kind: str, name: str) -> dict[str, object]:
    """Return the row of an architecture, judged in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
        try:
            row = judge(kind, name)
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(frame.filename).name}:{frame.lineno}"
            row = {"type": kind, "class": name, "stage": "error", "reason": f"{said(error)} ({at})"}
        with os.fdopen(write, "w") as stream:
            json.dump(row, stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    reason = (
        f"not done in {PROCESSOR_SECONDS} s of the processor" if status else "the process ended"
    )
    return {"type": kind, "class": name, "stage": "error", "reason": reason}


def main() -> int:
    """Judge all architectures, or those that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--again", nargs="*", default=[], help="stages that are judged anew")
    parser.add_argument("types", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    lines = options.out.with_suffix(".jsonl")
    earlier = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if lines.exists():
        earlier += map(json.loads, lines.read_text().splitlines())
    rows = {row["type"]: row for row in earlier}
    again = {kind for kind, row in rows.items() if row["stage"] in options.again}
    chosen = tiny.architectures()
    # What all of them import is imported once, before processes part.
    inputs = {"input_ids": torch.zeros(1, 2).long()}
    transformers.utils.logging.disable_progress_bar()
    model = next(tiny.builds("llama", "LlamaForCausalLM"))
    moe = conversions.convert(model, inputs, PIPELINE)
    trained(deepcopy(moe), inputs, RATES[0])
    with tempfile.TemporaryDirectory() as folder:
        moe.save_pretrained(folder)
        conversions.load(folder)
    at, parts = map(int, options.part.split("/"))
    new_first = sorted(chosen.items(), key=lambda item: item[0] in rows)
    for number, (kind, name) in enumerate(new_first):
        if options.types and kind not in options.types:
            continue
        is_judged = kind in rows and kind not in again and not options.types
        if is_judged or number % parts != at:
            continue
        rows[kind] = in_child(kind, name)
        with lines.open("a") as stream:
            stream.write(json.dumps(rows[kind]) + "\n")
        if options.types:
            print(json.dumps(rows[kind])[:1500], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "architectures": len(chosen),
        "rows": [rows[k] for k in sorted(rows)],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
