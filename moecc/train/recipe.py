"""A recipe of training: the sections and keys of its TOML, with their defaults.

A recipe decides the function that is trained; its mesh only decides where that runs.  So token
groups, capacities and micro-batches are the recipe's, and everything but `Recipe.mesh` is hashed
into a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar

from moecc.errors import MoeccError, Problem, nearest
from moecc.ir.mesh import parse_mesh
from moecc.plan.step import StepConfig, choice_problems
from moecc.support.documents import KeyPath
from moecc.support.record import Check, Count
from moecc.support.untyped import Json
from moecc.types import float_type

S = TypeVar("S")

Words = Annotated[str, Check(str.strip, "a text that is not empty")]
AtLeastOne = Annotated[int, Check(lambda n: n >= 1, "1 or more")]
AtLeastTwo = Annotated[int, Check(lambda n: n >= 2, "2 or more")]
Window = Annotated[int, Check(lambda n: 2 <= n <= 1_000_000, "2 to 1,000,000")]
OneOrMore = Annotated[float, Check(lambda x: x >= 1, "1 or more")]
Positive = Annotated[float, Check(lambda x: x > 0, "more than 0")]
NonNegative = Annotated[float, Check(lambda x: x >= 0, "0 or more")]
Fraction = Annotated[float, Check(lambda x: 0 <= x < 1, "at least 0 and less than 1")]
OpenShare = Annotated[float, Check(lambda x: 0 < x < 1, "more than 0 and less than 1")]
Share = Annotated[float, Check(lambda x: 0 <= x <= 1, "from 0 to 1")]


class Start(Enum):
    """Where parameters come from."""

    SOURCE = "source"
    RANDOM = "random"


class Moments(Enum):
    """What becomes of the optimiser's state of the source, where the source is a run."""

    CARRY = "carry"
    RESET = "reset"


class Objective(Enum):
    """What the model learns to predict."""

    CAUSAL = "causal"
    SPANS = "spans"
    MASKED = "masked"
    COMPLETION = "completion"
    CLASSIFY = "classify"


class Schedule(Enum):
    """How the learning rate changes over the steps, after its linear warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    WSD = "wsd"
    RSQRT = "rsqrt"


@dataclass(frozen=True)
class ModelSection:
    """The model that is trained.

    Attributes:
      source: a model: a folder, a .gguf, ``preset:NAME``, or the folder of a run.
      pipeline: passes over its graph, before training; empty for none.
      seed: of what the pipeline draws, and of random parameters.
      start: from the parameters of the source, or drawn at random.
      moments: carried over from a source that is a run, by formula, or reset.
    """

    source: Words
    pipeline: str = ""
    seed: Count = 0
    start: Start = Start.SOURCE
    moments: Moments = Moments.RESET


@dataclass(frozen=True)
class Corpus:
    """Token files of one folder, as `moecc tokens` writes them.

    Attributes:
      tokens: a folder that `moecc tokens` wrote.
      weight: its share of the mixture, before the weights are normalised.
      name: in metrics; by default the folder's, or its parent's where folders are called alike.
    """

    tokens: Words
    weight: Positive = 1.0
    name: str = ""


@dataclass(frozen=True)
class DataSection:
    """The batches.

    Attributes:
      train: the mixture.
      evaluate: held-out token folders; each has a loss of its own.
      objective: what is predicted.
      batch: sequences of a step.
      seq: tokens of a sequence; of the encoder, where there are two.
      decoder_seq: tokens of a decoder's sequence; 0 for as many as the objective needs.
      packing: several documents in a sequence, which attention, positions and losses keep apart.
      seed: of the order of rows, and of spans and masks.
      noise_density: the share of tokens that spans or masks hide.
      mean_span: the mean length of a hidden span, in tokens.
      evaluate_batches: batches of an evaluation, the same ones each time.
    """

    train: tuple[Corpus, ...]
    evaluate: tuple[Corpus, ...] = ()
    objective: Objective = Objective.CAUSAL
    batch: AtLeastOne = 8
    seq: AtLeastTwo = 512
    decoder_seq: Count = 0
    packing: bool = True
    seed: Count = 0
    noise_density: OpenShare = 0.15
    mean_span: OneOrMore = 3.0
    evaluate_batches: AtLeastOne = 16


@dataclass(frozen=True)
class RoutingSection:
    """How tokens are routed while training and while evaluating.

    Attributes:
      groups: token groups of a step, within which a capacity is counted; 0 for one a sequence.
      capacity_factor: of training; 0 for what the graph says.
      eval_capacity_factor: of evaluation; 0 for what the graph says.
      balance: coefficient of the load-balance loss; the paper's 0.01 where unset.
      z_loss: coefficient of the router z-loss; the paper's 0.001 where unset.
      bias_rate: step of the loss-free balance bias; 0 without one.
      jitter: training multiplies the router's input by 1 ± this.
      dropout: of training, on what sublayers add and on the hidden values of dense ones.
      expert_dropout: of training, on the hidden values of experts, which needs a capacity.
      router_dtype: the type that routers compute in: ``f32``, or that of the run, which ST-MoE
        found unstable in bf16 (§3.3).
      force_balance: route evenly, whatever the router says: for timing alone.
    """

    groups: Count = 0
    capacity_factor: NonNegative = 0.0
    eval_capacity_factor: NonNegative = 0.0
    balance: NonNegative | None = None
    z_loss: NonNegative | None = None
    bias_rate: NonNegative = 0.0
    jitter: Fraction = 0.0
    dropout: Fraction = 0.0
    expert_dropout: Fraction = 0.0
    router_dtype: str = "f32"
    force_balance: bool = False


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with settings of their own; the first group that matches holds.

    Attributes:
      match: a glob over parameter names, or a group of the pass `freeze`, ``moe`` say.
      rate_factor: the rate of the parameters over that of the schedule.
      decay: the weight decay; the optimiser's where unset.
      freeze: no gradient, no moments, no update.
      from_step: trained after so many steps; until then as under `freeze`.
    """

    match: Words
    rate_factor: Positive = 1.0
    decay: NonNegative | None = None
    freeze: bool = False
    from_step: Count = 0


@dataclass(frozen=True)
class OptimizerSection:
    """The update.

    Attributes:
      name: ``adamw``, ``adafactor`` or ``muon``, of optax.
      rate: the highest learning rate.
      schedule: what follows the warm-up.
      warmup: steps of linear warm-up.
      decay_steps: the last steps, in which ``wsd`` decays.
      end_factor: the rate at the end of ``cosine`` and ``wsd``, over the highest.
      clip: the largest norm of all gradients together; 0 for none.
      update_clip: the largest root mean square of an update of Adafactor, of a matrix by itself
        (Shazeer and Stern 2018, §6; 0.1 in ST-MoE's study of stability, table 4).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      decay: weight decay, of matrices alone unless a group says otherwise.
      groups: parameters with settings of their own.
    """

    name: str = "adamw"
    rate: Positive = 1e-3
    schedule: Schedule = Schedule.CONSTANT
    warmup: Count = 0
    decay_steps: Count = 0
    end_factor: Share = 0.1
    clip: NonNegative = 1.0
    update_clip: Positive = 1.0
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Positive = 1e-8
    decay: NonNegative = 0.1
    groups: tuple[ParameterGroup, ...] = ()


@dataclass(frozen=True)
class GuardSection:
    """Which steps are skipped, and when training gives up.

    Attributes:
      sigma: a loss this many standard deviations above the mean of the last `window` is skipped; 0
        skips only what is not finite.
      window: the steps whose losses `sigma` is measured over.
      skips: this many skipped steps in a row return to the last checkpoint, leaving out their
        batches and that of the last step before them; the second time, training stops.
    """

    sigma: NonNegative = 6.0
    window: Window = 128
    skips: AtLeastOne = 4


@dataclass(frozen=True)
class RunSection:
    """The run.

    Attributes:
      steps: updates of the whole run.
      micro_batches: parts of a batch whose gradients are added; each holds whole token groups.
      dtype: the type of the computation.
      weight_dtype: the type of the master weights.
      reduce_dtype: the type in which gradients are added and reduced; empty for the computation's.
      remat: what the backward pass computes again, as `compile --remat`.
      output_z: coefficient of the z-loss of the output's softmax; 0 for what the graph says.
      attention_z: coefficient of the z-loss of attention; 0 for what the graph says.
      rolled: equal layers are compiled once, as a scan.
      seed: of jitter and dropout.
      save_steps: a checkpoint every so many steps; 0 for none but the last.
      save_minutes: a checkpoint every so many minutes; 0 for none.
      keep: checkpoints that are kept, besides the best.
      evaluate_steps: an evaluation every so many steps; 0 for one at the end.
      log_steps: metrics every so many steps.
      export_steps: an export every so many steps; 0 for none.
      export_to: the family of the exports.
      guard: which steps are skipped.
    """

    steps: AtLeastOne
    micro_batches: AtLeastOne = 1
    dtype: str = "f32"
    weight_dtype: str = "f32"
    reduce_dtype: str = ""
    remat: str = "none"
    output_z: float = 0.0
    attention_z: float = 0.0
    rolled: bool = True
    seed: Count = 0
    save_steps: Count = 0
    save_minutes: NonNegative = 10.0
    keep: AtLeastOne = 2
    evaluate_steps: Count = 0
    log_steps: AtLeastOne = 1
    export_steps: Count = 0
    export_to: str = ""
    guard: GuardSection = field(default_factory=GuardSection)


@dataclass(frozen=True)
class LossSection:
    """What is added to the loss of the objective.

    Attributes:
      distill: coefficient of the divergence of the source's distribution of each token from the
        model's, KL(source ‖ model), at the first step.
      distill_steps: the steps in which the coefficient falls linearly to 0; 0 for all of the run.
    """

    distill: NonNegative = 0.0
    distill_steps: Count = 0

    def distill_at(self, step: int, steps: int) -> float:
        """Return the coefficient of the divergence in the step with number `step`, from 0."""
        return self.distill * max(1 - step / (self.distill_steps or steps), 0.0)


@dataclass(frozen=True)
class MeshSection:
    """Where the run takes place; it does not change what is computed.

    Attributes:
      mesh: axes and sizes; empty for one device.
      rules: layouts by name or file.
      via: how tokens reach experts, as `compile --via`; empty for the default.
      partition: ``explicit`` or ``gspmd``.
    """

    mesh: str = ""
    rules: tuple[str, ...] = ()
    via: str = ""
    partition: str = "explicit"


@dataclass(frozen=True)
class Recipe:
    """A recipe; its TOML has a table for each attribute."""

    model: ModelSection
    data: DataSection
    run: RunSection
    routing: RoutingSection = field(default_factory=RoutingSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    loss: LossSection = field(default_factory=LossSection)
    mesh: MeshSection = field(default_factory=MeshSection)

    @cached_property
    def step_config(self) -> StepConfig:
        """The settings of its step."""
        run, mesh = self.run, self.mesh
        return StepConfig(
            mesh=mesh.mesh or None,
            via=mesh.via or None,
            remat=run.remat,
            rules=",".join(mesh.rules) or None,
            optimizer=self.optimizer.name,
            dtype=run.dtype,
            weight_dtype=run.weight_dtype,
            micro_batches=run.micro_batches,
            reduce_dtype=run.reduce_dtype or None,
        )


# What the values of a recipe must satisfy, alone and together, whatever the model is.

OPTIMIZERS = ("adamw", "adafactor", "muon")
"""The optimisers, by their names in optax."""


@dataclass(frozen=True)
class Fault:
    """A fault of values, without the place where they stand.

    Attributes:
      keys: the values concerned, the one to change first: ``run.steps data.train.0.name``.
      message: the fault.
      expected: the values that are allowed.
      value: the value of the first key.
      hint: a way out.
    """

    keys: str
    message: str
    expected: str | None = None
    value: object = None
    hint: str | None = None

    @property
    def paths(self) -> list[KeyPath]:
        """The keys, each as its path; places in lists are numbers."""
        return [
            tuple(int(n) if n.isdecimal() else n for n in k.split(".")) for k in self.keys.split()
        ]


@dataclass(frozen=True)
class KeyCondition:
    """Keys that a section reads only under a condition; elsewhere they must have their defaults.

    Attributes:
      keys: of the section.
      decider: the key whose value decides.
      is_read: whether a section reads the keys.
    """

    keys: tuple[str, ...]
    decider: str
    is_read: Callable[[Any], object]


CONDITIONS: Mapping[type, tuple[KeyCondition, ...]] = {
    DataSection: (
        KeyCondition(
            ("decoder_seq",),
            "objective",
            lambda data: data.objective not in (Objective.CAUSAL, Objective.MASKED),
        ),
        KeyCondition(
            ("noise_density",),
            "objective",
            lambda data: data.objective in (Objective.SPANS, Objective.MASKED),
        ),
        KeyCondition(("mean_span",), "objective", lambda data: data.objective is Objective.SPANS),
        KeyCondition(("evaluate_batches",), "evaluate", lambda data: data.evaluate),
    ),
    OptimizerSection: (
        KeyCondition(("update_clip",), "name", lambda update: update.name == "adafactor"),
        KeyCondition(("b1", "b2", "eps"), "name", lambda update: update.name != "adafactor"),
        KeyCondition(("decay_steps",), "schedule", lambda update: update.schedule is Schedule.WSD),
        KeyCondition(
            ("end_factor",),
            "schedule",
            lambda update: update.schedule in (Schedule.COSINE, Schedule.WSD),
        ),
    ),
    GuardSection: (KeyCondition(("window",), "sigma", lambda guard: guard.sigma),),
    RunSection: (KeyCondition(("export_to",), "export_steps", lambda run: run.export_steps),),
    LossSection: (KeyCondition(("distill_steps",), "distill", lambda loss: loss.distill),),
    MeshSection: (KeyCondition(("rules", "via", "partition"), "mesh", lambda mesh: mesh.mesh),),
}
"""The conditions of each section."""


def without_unread(section: S, decided: Collection[KeyPath], path: KeyPath = ()) -> S:
    """Return `section` with the defaults of what it does not read, where options decided so.

    Args:
      section: a section, or a recipe.
      decided: the paths of the values that options replaced; they stay.
      path: of the section.
    """
    record: Any = section
    changed = {
        f.name: without_unread(value, decided, (*path, f.name))
        for f in fields(record)
        if is_dataclass(value := getattr(section, f.name))
    }
    for condition in CONDITIONS.get(type(section), ()):
        if (*path, condition.decider) in decided and not condition.is_read(section):
            unread = (key for key in condition.keys if (*path, key) not in decided)
            changed |= {key: getattr(type(section), key) for key in unread}
    replaced: S = replace(record, **changed)
    return replaced


def _unread(section: Any, path: str) -> Iterator[Fault]:
    """Yield the values of a section, and of those in it, that have no effect."""
    for field_ in fields(section):
        if is_dataclass(value := getattr(section, field_.name)):
            yield from _unread(value, f"{path}.{field_.name}".lstrip("."))
    for condition in CONDITIONS.get(type(section), ()):
        if condition.is_read(section):
            continue
        decider = getattr(section, condition.decider)
        decider = decider.value if isinstance(decider, Enum) else decider
        shown = "empty" if decider in ("", ()) else str(decider)
        for key in condition.keys:
            value, default = getattr(section, key), getattr(type(section), key)
            if value != default:
                yield Fault(
                    f"{path}.{key} {path}.{condition.decider}",
                    f"it has no effect where {path}.{condition.decider} is {shown}",
                    f"{default}" if default not in ("", ()) else "nothing",
                    value,
                )


def faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what is wrong about the values of `recipe`."""
    yield from _optimizer(recipe.optimizer)
    yield from _unread(recipe, "")
    if recipe.model.start is Start.RANDOM and recipe.model.moments is Moments.CARRY:
        yield Fault(
            "model.moments model.start",
            "random parameters have no moments to carry",
            'moments = "reset"',
        )
    data = recipe.data
    if not data.train:
        yield Fault("data.train", "the mixture is empty", "a token folder or more")
    yield from _corpora(data.train, "train")
    yield from _corpora(data.evaluate, "evaluate")
    yield from _groups(recipe.data, recipe.routing, recipe.run)
    if recipe.routing.router_dtype not in ("f32", recipe.run.dtype):
        allowed = " | ".join(dict.fromkeys(("f32", recipe.run.dtype)))
        yield Fault(
            "routing.router_dtype run.dtype",
            "routers compute in float32 or in the type of the run",
            allowed,
            recipe.routing.router_dtype,
        )
    yield from _schedule(recipe.optimizer, recipe.run)
    yield from _parameter_groups(recipe.optimizer.groups, recipe.run.steps)
    yield from _run(recipe.run, recipe.data)
    yield from _distillation(recipe)
    if recipe.mesh.mesh:
        yield from _raised("mesh.mesh", partial(parse_mesh, recipe.mesh.mesh))
    yield from _choices(
        "mesh", {"via": recipe.mesh.via or None, "partition": recipe.mesh.partition}
    )


def _distillation(recipe: Recipe) -> Iterator[Fault]:
    loss = recipe.loss
    if loss.distill and recipe.model.start is Start.RANDOM:
        message = "random parameters have no source to learn from"
        yield Fault("loss.distill model.start", message, "0", loss.distill, 'start = "source"')
    if loss.distill_steps > recipe.run.steps:
        yield Fault(
            "loss.distill_steps run.steps",
            "the coefficient would not fall to 0 in the run",
            f"at most steps = {recipe.run.steps}, or 0 for all of them",
            loss.distill_steps,
        )


def _corpora(corpora: tuple[Corpus, ...], key: str) -> Iterator[Fault]:
    names = corpus_names(corpora)
    for number, name in enumerate(names):
        if names.index(name) == number and names.count(name) > 1:
            yield Fault(
                f"data.{key}.{number}.name",
                f"more than one corpus is called {name!r}",
                hint="give each another name",
            )


def corpus_names(corpora: Iterable[Corpus]) -> list[str]:
    """Return the names of corpora in metrics: ``train``, or ``chat`` and ``code`` of two."""
    corpora = list(corpora)
    paths = [PurePosixPath(corpus.tokens) for corpus in corpora]
    names = [c.name or path.name or c.tokens for c, path in zip(corpora, paths, strict=True)]
    counts = Counter(names)
    return [
        name if corpus.name or counts[name] == 1 else path.parent.name or name
        for corpus, path, name in zip(corpora, paths, names, strict=True)
    ]


def _groups(data: DataSection, routing: RoutingSection, run: RunSection) -> Iterator[Fault]:
    batch, micro, groups = data.batch, run.micro_batches, routing.groups
    if batch % micro:
        yield Fault(
            "run.micro_batches data.batch",
            "the micro-batches do not divide the batch",
            f"a divisor of batch = {batch}",
            micro,
        )
    if groups and groups % micro:
        yield Fault(
            "routing.groups run.micro_batches",
            "a micro-batch would have parts of token groups",
            f"a multiple of micro_batches = {micro}",
            groups,
        )
    if groups and batch % groups and groups % batch:
        yield Fault(
            "routing.groups data.batch",
            "the token groups do not divide the batch",
            f"a divisor or a multiple of batch = {batch}",
            groups,
        )
    elif groups > batch and data.seq % (groups // batch):
        yield Fault(
            "routing.groups data.batch data.seq",
            "the token groups do not divide the sequences",
            f"parts of a sequence that divide seq = {data.seq}",
            groups,
        )


def update_faults(optimizer: OptimizerSection) -> Iterator[Fault]:
    """Yield the faults of an update, which may be no part of a run."""
    yield from _optimizer(optimizer)
    yield from _unread(optimizer, "optimizer")


def _optimizer(optimizer: OptimizerSection) -> Iterator[Fault]:
    if optimizer.name not in OPTIMIZERS:
        yield Fault(
            "optimizer.name",
            "no such optimiser",
            " | ".join(OPTIMIZERS),
            optimizer.name,
            nearest(optimizer.name, OPTIMIZERS),
        )


def _schedule(optimizer: OptimizerSection, run: RunSection) -> Iterator[Fault]:
    is_wsd = optimizer.schedule is Schedule.WSD
    if optimizer.warmup > run.steps and not is_wsd:
        yield Fault(
            "optimizer.warmup run.steps",
            "the warm-up is longer than the run",
            f"at most steps = {run.steps}",
            optimizer.warmup,
        )
    if is_wsd and optimizer.decay_steps == 0:
        yield Fault(
            "optimizer.decay_steps optimizer.schedule",
            "wsd decays over its last steps",
            "1 or more",
            0,
        )
    together = optimizer.warmup + optimizer.decay_steps
    if is_wsd and run.steps < together:
        yield Fault(
            "optimizer.decay_steps optimizer.warmup run.steps",
            "warm-up and decay together are longer than the run",
            f"at most steps = {run.steps}",
            f"{optimizer.warmup} + {optimizer.decay_steps}",
        )


def _parameter_groups(groups: tuple[ParameterGroup, ...], steps: int) -> Iterator[Fault]:
    seen: set[str] = set()
    for number, group in enumerate(groups):
        path = f"optimizer.groups.{number}"
        if group.match in seen:
            yield Fault(
                f"{path}.match", "an earlier group matches the same parameters", value=group.match
            )
        seen.add(group.match)
        if group.from_step >= max(steps, 1):
            yield Fault(
                f"{path}.from_step",
                "out of bounds",
                f"0 to {steps - 1}",
                group.from_step,
                "freeze = true never trains them",
            )
        if group.freeze and (
            group.rate_factor != 1.0 or group.decay is not None or group.from_step
        ):
            keys = ("freeze", "rate_factor", "decay", "from_step")
            yield Fault(
                " ".join(f"{path}.{key}" for key in keys),
                "frozen parameters have neither rate nor decay nor a first step",
                "freeze alone",
            )


def _run(run: RunSection, data: DataSection) -> Iterator[Fault]:
    for key in ("dtype", "weight_dtype", "reduce_dtype"):
        name = getattr(run, key)
        if name or key != "reduce_dtype":
            yield from _raised(f"run.{key}", partial(float_type, name))
    yield from _choices("run", {"remat": run.remat})
    if run.evaluate_steps > 0 and not data.evaluate:
        yield Fault(
            "run.evaluate_steps data.evaluate",
            "there is nothing to evaluate on",
            "token folders in data.evaluate",
            hint="evaluate_steps = 0 does without",
        )
    if run.export_steps > 0 and not run.export_to:
        yield Fault(
            "run.export_to run.export_steps",
            "exports need a family",
            "auto, or what moecc convert --to takes",
        )


def _choices(section: str, values: Json) -> Iterator[Fault]:
    """Yield the settings of a step in a section that are not one of their choices."""
    for name, value in values.items():
        for problem in choice_problems({name: value}):
            yield _fault(f"{section}.{name}", problem)


def _raised(key: str, read: Callable[[], object]) -> Iterator[Fault]:
    """Yield the problems that reading a value raises."""
    try:
        read()
    except MoeccError as error:
        yield from (_fault(key, problem) for problem in error.problems)


def _fault(key: str, problem: Problem) -> Fault:
    return Fault(key, problem.message, problem.expected, problem.found, problem.hint)
