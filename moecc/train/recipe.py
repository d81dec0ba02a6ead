"""A recipe of training: the sections and keys of its TOML, with their defaults.

A recipe decides the function that is trained; its mesh only decides where that runs.  So token
groups, capacities and micro-batches are the recipe's, and everything but `Recipe.mesh` is hashed
into a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


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
      source: a model, as every command takes it; a run is one.
      pipeline: passes over its graph, before training; empty for none.
      seed: of what the pipeline draws, and of random parameters.
      start: from the parameters of the source, or drawn at random.
      moments: carried over from a source that is a run, by formula, or reset.
    """

    source: str
    pipeline: str = ""
    seed: int = 0
    start: Start = Start.SOURCE
    moments: Moments = Moments.RESET


@dataclass(frozen=True)
class Corpus:
    """Token files of one folder, as `moecc tokens` writes them.

    Attributes:
      tokens: the folder.
      weight: its share of the mixture, before the weights are normalised.
      name: in metrics; the folder's by default.
    """

    tokens: str
    weight: float = 1.0
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
      seed: of order, spans and masks.
      noise_density: the share of tokens that spans or masks hide.
      mean_span: the mean length of a hidden span, in tokens.
      evaluate_batches: batches of an evaluation, the same ones each time.
    """

    train: tuple[Corpus, ...]
    evaluate: tuple[Corpus, ...] = ()
    objective: Objective = Objective.CAUSAL
    batch: int = 8
    seq: int = 512
    decoder_seq: int = 0
    packing: bool = True
    seed: int = 0
    noise_density: float = 0.15
    mean_span: float = 3.0
    evaluate_batches: int = 16


@dataclass(frozen=True)
class RoutingSection:
    """How tokens are routed while training and while evaluating.

    Attributes:
      groups: token groups of a step, within which a capacity is counted; 0 for one a sequence.
      capacity_factor: of training; 0 for what the graph says.
      eval_capacity_factor: of evaluation; 0 for what the graph says.
      balance: coefficient of the load-balance loss; negative for the paper's 0.01.
      z_loss: coefficient of the router z-loss; negative for the paper's 0.001.
      bias_rate: step of the loss-free balance bias; 0 without one.
      jitter: training multiplies the router's input by 1 ± this.
      dropout: of training, on what sublayers add and on the hidden values of dense ones.
      expert_dropout: of training, on the hidden values of experts, which needs a capacity.
      router_dtype: the type that routers compute in: ``f32``, or that of the run, which ST-MoE
        found unstable in bf16 (§3.3).
      force_balance: route evenly, whatever the router says: for timing alone.
    """

    groups: int = 0
    capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0
    balance: float = -1.0
    z_loss: float = -1.0
    bias_rate: float = 0.0
    jitter: float = 0.0
    dropout: float = 0.0
    expert_dropout: float = 0.0
    router_dtype: str = "f32"
    force_balance: bool = False


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with settings of their own; the first group that matches holds.

    Attributes:
      match: a glob over parameter names, or a group of the pass `freeze`, ``moe`` say.
      rate: a factor on the learning rate.
      decay: the weight decay; negative for that of the optimiser.
      freeze: no gradient, no moments, no update.
      from_step: trained after so many steps; until then as under `freeze`.
    """

    match: str
    rate: float = 1.0
    decay: float = -1.0
    freeze: bool = False
    from_step: int = 0


@dataclass(frozen=True)
class OptimizerSection:
    """The update.

    Attributes:
      name: ``adamw``, ``adafactor`` or ``muon``, of optax.
      rate: the highest learning rate.
      schedule: what follows the warm-up.
      warmup: steps of linear warm-up.
      decay_steps: the last steps, in which ``wsd`` decays; left out where ``--set`` replaces
        ``wsd`` by another schedule.
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
    rate: float = 1e-3
    schedule: Schedule = Schedule.CONSTANT
    warmup: int = 0
    decay_steps: int = 0
    end_factor: float = 0.1
    clip: float = 1.0
    update_clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    groups: tuple[ParameterGroup, ...] = ()


@dataclass(frozen=True)
class GuardSection:
    """Which steps are skipped, and when training gives up.

    Attributes:
      sigma: a loss this many standard deviations above the mean of the last `window` is skipped; 0
        skips only what is not finite.
      window: steps.
      skips: this many skipped steps in a row return to the last checkpoint, leaving their batches
        out; the second time, training stops.
    """

    sigma: float = 6.0
    window: int = 128
    skips: int = 4


@dataclass(frozen=True)
class RunSection:
    """The run.

    Attributes:
      steps: updates.
      micro_batches: parts of a batch whose gradients are added; each holds whole token groups.
      dtype: the type of the computation.
      weight_dtype: the type of the master weights.
      reduce_dtype: the type in which gradients are added and reduced; empty for the computation's.
      remat: what the backward pass computes again, as `compile --remat`.
      output_z: coefficient of the z-loss of the output's softmax; 0 for what the graph says.
      attention_z: coefficient of the z-loss of attention; 0 for what the graph says.
      rolled: whether equal layers are a scan.
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

    steps: int
    micro_batches: int = 1
    dtype: str = "f32"
    weight_dtype: str = "f32"
    reduce_dtype: str = ""
    remat: str = "none"
    output_z: float = 0.0
    attention_z: float = 0.0
    rolled: bool = True
    seed: int = 0
    save_steps: int = 0
    save_minutes: float = 10.0
    keep: int = 2
    evaluate_steps: int = 0
    log_steps: int = 1
    export_steps: int = 0
    export_to: str = ""
    guard: GuardSection = field(default_factory=GuardSection)


@dataclass(frozen=True)
class MeshSection:
    """Where the run takes place; it does not change what is computed.

    Attributes:
      mesh: axes and sizes; empty for one device.
      rules: layouts by name or file.
      via: how tokens reach experts, of `moecc.sharding.vias`; empty for the default.
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
    mesh: MeshSection = field(default_factory=MeshSection)
