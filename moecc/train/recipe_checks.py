"""What the values of a recipe must satisfy, alone and together, whatever the model is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from moecc.errors import MoeccError, nearest
from moecc.ir.mesh import parse_mesh
from moecc.plan.strategy import REMATS
from moecc.sharding.partitions import PARTITIONS
from moecc.sharding.vias import VIAS
from moecc.support.parse_units import float_type
from moecc.toml.places import Path
from moecc.train.recipe import (
    Corpus,
    DataSection,
    MeshSection,
    ModelSection,
    Moments,
    Objective,
    OptimizerSection,
    ParameterGroup,
    Recipe,
    RoutingSection,
    RunSection,
    Schedule,
    Start,
)

OPTIMIZERS = ("adamw", "adafactor", "muon")
"""The optimisers, by their names in optax."""

ENDING = (Schedule.COSINE, Schedule.WSD)
"""Schedules that depend on the last step, so that a run that goes on is another run."""


@dataclass(frozen=True)
class Fault:
    """What is wrong about values, without the place where they stand.

    Attributes:
      keys: the values that it is about, the one to change first.
    """

    keys: tuple[Path, ...]
    what: str
    expected: str | None = None
    found: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class _Bound:
    holds: Callable[[Any], bool]
    expected: str


_POSITIVE = _Bound(lambda x: x > 0, "more than 0")
_ONE = _Bound(lambda x: x >= 1, "1 or more")
_TWO = _Bound(lambda x: x >= 2, "2 or more")
_ZERO = _Bound(lambda x: x >= 0, "0 or more")
_DECAY = _Bound(lambda x: 0 <= x < 1, "at least 0 and less than 1")
_SHARE = _Bound(lambda x: 0 < x < 1, "more than 0 and less than 1")
_PART = _Bound(lambda x: 0 <= x <= 1, "from 0 to 1")
_WORDS = _Bound(lambda x: bool(x.strip()), "a text that is not empty")

BOUNDS: dict[str, _Bound] = {
    "model.source": _WORDS,
    "model.seed": _ZERO,
    "data.batch": _ONE,
    "data.seq": _TWO,
    "data.decoder_seq": _ZERO,
    "data.seed": _ZERO,
    "data.noise_density": _SHARE,
    "data.mean_span": _ONE,
    "data.evaluate_batches": _ONE,
    "routing.groups": _ZERO,
    "routing.capacity_factor": _ZERO,
    "routing.eval_capacity_factor": _ZERO,
    "routing.bias_rate": _ZERO,
    "routing.jitter": _DECAY,
    "routing.dropout": _DECAY,
    "routing.expert_dropout": _DECAY,
    "optimizer.rate": _POSITIVE,
    "optimizer.warmup": _ZERO,
    "optimizer.decay_steps": _ZERO,
    "optimizer.end_factor": _PART,
    "optimizer.clip": _ZERO,
    "optimizer.update_clip": _POSITIVE,
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _POSITIVE,
    "optimizer.decay": _ZERO,
    "run.steps": _ONE,
    "run.micro_batches": _ONE,
    "run.seed": _ZERO,
    "run.save_steps": _ZERO,
    "run.save_minutes": _ZERO,
    "run.keep": _ONE,
    "run.evaluate_steps": _ZERO,
    "run.log_steps": _ONE,
    "run.export_steps": _ZERO,
    "run.guard.sigma": _ZERO,
    "run.guard.window": _TWO,
    "run.guard.skips": _ONE,
}
"""What each value must satisfy by itself."""


def faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what is wrong about the values of `recipe`."""
    yield from _bounds(recipe)
    yield from _update(recipe.optimizer)
    yield from _model(recipe.model)
    yield from _data(recipe.data)
    yield from _groups(recipe.data, recipe.routing, recipe.run)
    yield from _router_dtype(recipe.routing, recipe.run)
    yield from _schedule(recipe.optimizer, recipe.run)
    yield from _parameter_groups(recipe.optimizer.groups, recipe.run.steps)
    yield from _run(recipe.run, recipe.data)
    yield from _mesh(recipe.mesh)


def update_faults(optimizer: OptimizerSection) -> Iterator[Fault]:
    """Yield what is wrong about the values of an update that is no part of a run."""
    yield from _bounds(optimizer, "optimizer.")
    yield from _update(optimizer)


def _bounds(section: object, prefix: str = "") -> Iterator[Fault]:
    for name, bound in BOUNDS.items():
        if not name.startswith(prefix):
            continue
        path = tuple(name.split("."))
        value: Any = section
        for part in name.removeprefix(prefix).split("."):
            value = getattr(value, part)
        if not bound.holds(value):
            yield Fault((path,), "out of bounds", bound.expected, str(value))


def _model(model: ModelSection) -> Iterator[Fault]:
    if model.start is Start.RANDOM and model.moments is Moments.CARRY:
        yield Fault(
            (("model", "moments"), ("model", "start")),
            "random parameters have no moments to carry", "moments = \"reset\"",
        )  # fmt: skip


def _data(data: DataSection) -> Iterator[Fault]:
    if not data.train:
        yield Fault((("data", "train"),), "the mixture is empty", "a token folder or more")
    yield from _corpora(data.train, "train")
    yield from _corpora(data.evaluate, "evaluate")
    if data.decoder_seq and data.objective in (Objective.CAUSAL, Objective.MASKED):
        yield Fault(
            (("data", "decoder_seq"), ("data", "objective")),
            f"the objective {data.objective.value} has one sequence",
            "decoder_seq = 0", str(data.decoder_seq),
        )  # fmt: skip


def _corpora(corpora: tuple[Corpus, ...], key: str) -> Iterator[Fault]:
    counts = Counter(corpus_name(each) for each in corpora)
    for number, corpus in enumerate(corpora):
        place: Path = ("data", key, number)
        if not corpus.tokens.strip():
            yield Fault(((*place, "tokens"),), "out of bounds", _WORDS.expected, "")
        if corpus.weight <= 0:
            bad, hint = str(corpus.weight), "leave the corpus out"
            yield Fault(((*place, "weight"),), "out of bounds", _POSITIVE.expected, bad, hint)
        if counts[name := corpus_name(corpus)] > 1:
            counts[name] = 0
            yield Fault(
                ((*place, "name"),), f"more than one corpus is called {name!r}",
                hint="give each a name of its own",
            )  # fmt: skip


def corpus_name(corpus: Corpus) -> str:
    """Return the name of a corpus in metrics."""
    return corpus.name or corpus.tokens.rstrip("/").rpartition("/")[2]


def _groups(data: DataSection, routing: RoutingSection, run: RunSection) -> Iterator[Fault]:
    batch, micro, groups = data.batch, run.micro_batches, routing.groups
    if micro < 1 or batch < 1 or groups < 0:
        return
    micro_key, batch_key, groups_key = (
        ("run", "micro_batches"), ("data", "batch"), ("routing", "groups"),
    )  # fmt: skip
    if batch % micro:
        yield Fault(
            (micro_key, batch_key), "the micro-batches do not divide the batch",
            f"a divisor of batch = {batch}", str(micro),
        )  # fmt: skip
    if groups and groups % micro:
        yield Fault(
            (groups_key, micro_key), "a micro-batch would have parts of token groups",
            f"a multiple of micro_batches = {micro}", str(groups),
        )  # fmt: skip
    if groups and batch % groups and groups % batch:
        yield Fault(
            (groups_key, batch_key), "the token groups do not divide the batch",
            f"a divisor or a multiple of batch = {batch}", str(groups),
        )  # fmt: skip
    elif groups > batch and data.seq % (groups // batch):
        yield Fault(
            (groups_key, batch_key, ("data", "seq")),
            "the token groups do not divide the sequences",
            f"parts of a sequence that divide seq = {data.seq}", str(groups),
        )  # fmt: skip


def _router_dtype(routing: RoutingSection, run: RunSection) -> Iterator[Fault]:
    keys: tuple[Path, ...] = (("routing", "router_dtype"), ("run", "dtype"))
    if routing.router_dtype not in ("f32", run.dtype):
        allowed = " | ".join(dict.fromkeys(("f32", run.dtype)))
        yield Fault(keys, "routers compute in float32 or in the type of the run", allowed,
                    routing.router_dtype)  # fmt: skip


def _update(optimizer: OptimizerSection) -> Iterator[Fault]:
    name: Path = ("optimizer", "name")
    if optimizer.name not in OPTIMIZERS:
        hint = nearest(optimizer.name, OPTIMIZERS)
        yield Fault((name,), "no such optimiser", " | ".join(OPTIMIZERS),
                    optimizer.name, hint)  # fmt: skip
    if optimizer.update_clip != 1.0 and optimizer.name != "adafactor":
        clip: Path = ("optimizer", "update_clip")
        yield Fault((clip, name), "only adafactor clips the update of a matrix", "1.0",
                    str(optimizer.update_clip), "clip bounds the gradients of all")  # fmt: skip


def _schedule(optimizer: OptimizerSection, run: RunSection) -> Iterator[Fault]:
    keys: dict[str, Path] = {k: ("optimizer", k) for k in ("warmup", "decay_steps")}
    steps: Path = ("run", "steps")
    if optimizer.warmup > run.steps > 0:
        yield Fault((keys["warmup"], steps), "the warm-up is longer than the run",
                    f"at most steps = {run.steps}", str(optimizer.warmup))  # fmt: skip
    is_wsd = optimizer.schedule is Schedule.WSD
    schedule: Path = ("optimizer", "schedule")
    if is_wsd and optimizer.decay_steps == 0:
        yield Fault((keys["decay_steps"], schedule), "wsd decays over its last steps",
                    "1 or more", "0")  # fmt: skip
    if not is_wsd and optimizer.decay_steps > 0:
        yield Fault((keys["decay_steps"], schedule), "only the schedule wsd has decay_steps",
                    "0", str(optimizer.decay_steps))  # fmt: skip
    together = optimizer.warmup + optimizer.decay_steps
    if is_wsd and optimizer.warmup <= run.steps < together:
        yield Fault((keys["decay_steps"], keys["warmup"], steps),
                    "warm-up and decay together are longer than the run",
                    f"at most steps = {run.steps}", str(together))  # fmt: skip


def _parameter_groups(groups: tuple[ParameterGroup, ...], steps: int) -> Iterator[Fault]:
    seen: set[str] = set()
    for number, group in enumerate(groups):
        place: Path = ("optimizer", "groups", number)
        if not group.match.strip():
            yield Fault(((*place, "match"),), "out of bounds", _WORDS.expected, "")
        elif group.match in seen:
            yield Fault(((*place, "match"),), "an earlier group matches the same parameters",
                        found=group.match)  # fmt: skip
        seen.add(group.match)
        if not 0 <= group.from_step < max(steps, 1):
            yield Fault(((*place, "from_step"),), "out of bounds", f"0 to {steps - 1}",
                        str(group.from_step), "freeze = true never trains them")  # fmt: skip
        if group.freeze and (group.rate != 1.0 or group.decay >= 0 or group.from_step):
            keys = ("freeze", "rate", "decay", "from_step")
            yield Fault(tuple((*place, key) for key in keys),
                        "frozen parameters have neither rate nor decay nor a first step",
                        "freeze alone")  # fmt: skip
        elif group.rate <= 0:
            yield Fault(((*place, "rate"),), "out of bounds", _POSITIVE.expected,
                        str(group.rate), "freeze = true trains none of them")  # fmt: skip


def _run(run: RunSection, data: DataSection) -> Iterator[Fault]:
    for key in ("dtype", "weight_dtype", "reduce_dtype"):
        name = getattr(run, key)
        if name or key != "reduce_dtype":
            yield from _raised(("run", key), partial(float_type, name))
    if run.remat not in REMATS:
        yield Fault((("run", "remat"),), "no such rematerialisation", " | ".join(REMATS),
                    run.remat, nearest(run.remat, REMATS))  # fmt: skip
    if run.evaluate_steps > 0 and not data.evaluate:
        yield Fault((("run", "evaluate_steps"), ("data", "evaluate")),
                    "there is nothing to evaluate on", "token folders in data.evaluate",
                    hint="evaluate_steps = 0 does without")  # fmt: skip
    if run.export_steps > 0 and not run.export_to:
        yield Fault((("run", "export_to"), ("run", "export_steps")),
                    "exports need a family", "auto, or what moecc convert --to takes")  # fmt: skip


def _mesh(mesh: MeshSection) -> Iterator[Fault]:
    if mesh.mesh:
        yield from _raised(("mesh", "mesh"), partial(parse_mesh, mesh.mesh))
    if mesh.rules and not mesh.mesh:
        yield Fault((("mesh", "mesh"), ("mesh", "rules")), "rules need a mesh", "data:8, say")
    if mesh.via and mesh.via not in VIAS:
        yield Fault((("mesh", "via"),), "no such way to the experts", " | ".join(VIAS), mesh.via,
                    nearest(mesh.via, VIAS))  # fmt: skip
    if mesh.partition not in PARTITIONS:
        yield Fault((("mesh", "partition"),), "no such partition", " | ".join(PARTITIONS),
                    mesh.partition, nearest(mesh.partition, PARTITIONS))  # fmt: skip


def _raised(path: Path, read: Callable[[], object]) -> Iterator[Fault]:
    """Yield the problems that reading a value raises."""
    try:
        read()
    except MoeccError as error:
        for found in error.problems:
            yield Fault((path,), found.what, found.expected, found.found, found.hint)
