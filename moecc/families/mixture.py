"""The base config of mixture-of-experts decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, ClassVar

from moecc.families.config import EngineReading, ModelConfig, config_class, flag, number, size
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.reader import COUNT, LAYERS, NEURONS, KeyProblem, Reader, key_problem
from moecc.families.shrinking import (
    SMALL_EXPERT,
    SMALL_MLP,
    SMALL_NEURONS,
    SMALL_SHARED,
    shrink_size,
)
from moecc.support.untyped import JsonDict

if TYPE_CHECKING:
    from moecc.ir.conventions import Gates
    from moecc.weights.expr import Expr

# Which layers of a decoder have experts, in every family's spelling.
#
# All become a step and a list of exceptions, as qwen2_moe states them: layer i has experts, counted
# from 0, if the step divides i + 1 and i is not listed.

LEADING_KEYS: Mapping[str, str] = {
    "leading": "first_k_dense_replace",
    "counted": "num_dense_layers",
}
"""The key that counts the first, dense layers, by style."""

LIST_KEY, STEP_KEY = "moe_layers", "interleave_moe_layer_step"

INTERVAL_KEYS = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")


def read_pattern(reader: Reader, style: str, layers: int) -> JsonDict:
    """Read the fields `decoder_sparse_step` and `mlp_only_layers`.

    Args:
      reader: the config.
      style: ``all`` (every layer), ``step``, one of `LEADING_KEYS` (the first ones are dense),
        ``interval`` (every n-th of a range) or ``listed`` (those of a list, else every n-th).
      layers: the number of layers.
    """
    if style == "step":
        dense = tuple(sorted(set(reader.whole_numbers("mlp_only_layers"))))
        step = reader.size("decoder_sparse_step", LAYERS)
        return {"decoder_sparse_step": step, "mlp_only_layers": dense}
    if style in LEADING_KEYS:
        first = reader.size(LEADING_KEYS[style], LAYERS, smallest=0)
        return {"mlp_only_layers": tuple(range(min(first, layers)))}
    if style == "interval":
        interval, start, end = INTERVAL_KEYS
        every, first = reader.size(interval, LAYERS), reader.size(start, LAYERS, smallest=0)
        # The default, -1, stands for the last layer.
        is_open = reader.value(end) in (None, -1)
        last = layers - 1 if is_open else reader.size(end, LAYERS, smallest=0)
        dense = tuple(i for i in range(layers) if (i + 1) % every == 0 and not first <= i <= last)
        return {"decoder_sparse_step": every, "mlp_only_layers": dense}
    if style == "listed":
        step = reader.size(STEP_KEY, LAYERS)
        if reader.value(LIST_KEY) is None:
            return {"decoder_sparse_step": step}
        sparse = reader.whole_numbers(LIST_KEY)
        if not all(0 <= layer < layers for layer in sparse):
            reader.refuse(LIST_KEY, "layers that do not exist", expected=f"0 to {layers - 1}")
        if [layer in sparse for layer in range(layers)] == _every(step, layers):
            return {"decoder_sparse_step": step}
        return {"mlp_only_layers": tuple(i for i in range(layers) if i not in sparse)}
    return {}


def write_pattern(
    style: str, sparse: Sequence[bool], step: int, dense: Sequence[int]
) -> dict[str, object]:
    """Return the keys for layers that `pattern_checks` does not object to.

    Args:
      style: as for `read_pattern`.
      sparse: for each layer whether it has experts.
      step: the step.
      dense: the layers that are excepted.
    """
    if style == "step":
        return {"decoder_sparse_step": step, "mlp_only_layers": list(dense)}
    if style in LEADING_KEYS:
        return {LEADING_KEYS[style]: len(sparse) - sum(sparse)}
    if style == "interval":
        layers = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
        values = (_interval(sparse) or step, layers[0], layers[-1])
        return dict(zip(INTERVAL_KEYS, values, strict=True))
    if style == "listed":
        count = len(sparse)
        is_regular = list(sparse) == _every(step, count)
        listed = [i for i in range(count) if sparse[i]]
        return {LIST_KEY: listed, STEP_KEY: step if is_regular else 1}
    return {}


def _every(step: int, count: int) -> list[bool]:
    return [(layer + 1) % step == 0 for layer in range(count)]


def pattern_checks(
    family: str, style: str, sparse: Sequence[bool], excepted: tuple[int, ...]
) -> Iterator[KeyProblem]:
    """Yield why a family of a style cannot have experts in the layers that `sparse` says.

    `excepted` are the layers that the config lists as dense.
    """
    keys, last = ("mlp_only_layers", "decoder_sparse_step"), len(sparse) - 1
    outside = [i for i in excepted if not 0 <= i <= last]
    if outside:
        between = ("mlp_only_layers", "num_hidden_layers")
        yield key_problem("layers that do not exist", f"0 to {last}", f"{outside[:8]}", *between)
    if tuple(sorted(set(excepted))) != excepted:
        fault = "not in ascending order without repetition"
        yield key_problem(fault, "ascending layers", f"{excepted[:8]}", "mlp_only_layers")
    dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]
    if style == "all" and dense:
        fault = f"{family} has experts in every layer; {dense[:8]} would be dense"
        yield key_problem(fault, "no dense layer", f"{len(dense)} of them", *keys)
    if style in LEADING_KEYS and dense != list(range(len(dense))):
        fault = f"{family} has dense layers only before the first layer with experts"
        expected = f"layers 0 to {len(dense) - 1}"
        yield key_problem(fault, expected, f"{dense[:8]}", LEADING_KEYS[style], *keys)
    if style == "interval" and _interval(sparse) is None:
        interval = " to ".join(INTERVAL_KEYS[1:])
        fault = f"{family} has experts in every n-th layer, from {interval}"
        shown = f"dense layers {dense[:8]}"
        yield key_problem(fault, "every n-th layer", shown, *INTERVAL_KEYS, *keys)


def _interval(sparse: Sequence[bool]) -> int | None:
    """Return n if every n-th layer from the first sparse one to the last is sparse, else None."""
    layers = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
    inside = range(layers[0], layers[-1] + 1) if layers else range(0)
    steps = range(1, len(sparse) + 1) if layers else range(0)
    return next((n for n in steps if layers == [i for i in inside if (i + 1) % n == 0]), None)


MOE_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
FIXED_GATES_DEFAULTS = {k: v for k, v in MOE_DEFAULTS.items() if k != "norm_topk_prob"}
"""The defaults of families whose config does not say whether gates are divided by their sum."""

ONE_WIDTH = {"expert_intermediate_size": "intermediate_size"}
"""The keys of families whose experts have the config's only width."""

SHARED = "shared_expert_intermediate_size"
MOST_SHARED = 1 << 10
"""The largest number of shared experts."""

TRANSFORMERS = {"transformers 5": EngineReading(), "transformers 4": EngineReading()}
"""How the two versions read a family without further conditions."""

UNEXAMINED = dict.fromkeys(
    ("vLLM", "SGLang", "llama.cpp", "mlx-lm"), EngineReading(never="not examined with this family")
)
"""How moecc takes the other engines to read a family that was not tried in them."""

GATES: Mapping[tuple[str, bool], Gates] = {
    ("softmax", True): "renormalised",
    ("softmax", False): "softmax",
    ("sigmoid", True): "sigmoid-renormalised",
    ("sigmoid", False): "sigmoid",
}
"""The gate conventions, by the score of an expert and by whether the chosen ones are divided."""


@config_class
class MoeConfig(DecoderConfig):
    """A decoder with expert layers.

    `intermediate_size` is the width of the dense feed-forward blocks, if any, and
    `expert_intermediate_size` that of one expert.  With `norm_topk_prob` the chosen gates are
    divided by their sum, and then multiplied by `gate_scale`.  With `routing_bias` a bias takes
    part in the choice of experts.  A token chooses among experts in `open_groups` of
    `expert_groups` equal groups.
    """

    defaults = MOE_DEFAULTS
    engines = TRANSFORMERS
    keys = {
        "experts_per_token": "num_experts_per_tok",
        "expert_intermediate_size": "moe_intermediate_size",
        "gate_scale": "",
        "router_jitter_noise": "",
    }
    # The keys of which one alone is read the same by transformers 4 and 5, or is natural to 5.
    experts_keys: ClassVar[tuple[str, ...]]
    # Which layers are sparse, see `read_pattern`.
    sparse_style: ClassVar[str] = "step"
    # What the router's logits become before experts are chosen: softmax or sigmoid.
    score: ClassVar[str] = "softmax"
    has_shared_expert: ClassVar[bool] = False
    shared_is_optional: ClassVar[bool] = False
    # The key that counts shared experts of the experts' width; else the key of a width is read.
    shared_count_key: ClassVar[str] = ""
    # Whether a sigmoid gates the shared expert.
    shared_gate: ClassVar[bool] = True
    has_routing_bias: ClassVar[bool] = False
    # Whether a bias is added to the router's logits.
    has_logits_bias: ClassVar[bool] = False
    # Whether a token may be restricted to some groups of experts.
    limits_groups: ClassVar[bool] = False
    # What the family adds to the sum that the chosen gates are divided by.
    gate_floor: ClassVar[float] = 0.0
    # Whether gates multiply what experts read, in place of what they return.
    weighs_inputs: ClassVar[bool] = False
    # The options of `upcycle`, besides the number of experts, that lead from a dense model here.
    upcycle_options: ClassVar[str] = "top-k=2"

    num_experts: int
    experts_per_token: int = size(COUNT)
    expert_intermediate_size: int = size(NEURONS)
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    gate_scale: float = number(above=0, default=1.0)
    routing_bias: bool = False
    expert_groups: int = 1
    open_groups: int = 1
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = number(least=0, default=0.001)
    router_jitter_noise: float = number(least=0, default=0.0)
    output_router_logits: bool = flag(default=False)

    @classmethod
    def renormalises(cls) -> bool | None:
        """Whether the family divides the chosen gates by their sum; None: an option."""
        return None if "norm_topk_prob" not in cls.fixed else bool(cls.fixed["norm_topk_prob"])

    @classmethod
    def has_expert_width(cls) -> bool:
        """Whether experts have a width of their own, or that of the config's only size."""
        return cls.key("expert_intermediate_size") != cls.key("intermediate_size")

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Return for each layer whether it has experts.

        Layer i has, counted from 0, if `decoder_sparse_step` divides i + 1 and
        `mlp_only_layers` does not list i.
        """
        dense, step = set(self.mlp_only_layers), self.decoder_sparse_step
        return tuple(
            (layer + 1) % step == 0 and layer not in dense
            for layer in range(self.num_hidden_layers)
        )

    @property
    def expert_blocks(self) -> int:
        """The number of the experts of all layers."""
        return self.num_experts * sum(self.sparse_layers)

    @property
    def gates(self) -> Gates:
        """The gate convention."""
        return GATES[self.score, self.norm_topk_prob]

    @property
    def clamp(self) -> tuple[float, float] | None:
        """Steepness and limit of a clamped activation of experts with biases; None without one."""
        return None

    @property
    def sum_floor(self) -> float:
        """What is added to the sum that the chosen gates are divided by."""
        return self.gate_floor if self.norm_topk_prob else 0.0

    @classmethod
    def conventions(cls) -> tuple[Gates, ...]:
        """Return the gate conventions that the family can have."""
        always = cls.renormalises()
        choices = (True, False) if always is None else (always,)
        return tuple(GATES[cls.score, divided] for divided in choices)

    @classmethod
    def from_others(cls) -> dict[str, object]:
        """Return the fields, besides those of all, of a model that comes from another family."""
        return {}

    def own_fields(self) -> dict[str, object]:
        """Return the fields that only this family has."""
        common = {f.name for f in fields(MoeConfig)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}

    def completed(self) -> tuple[ModelConfig, dict[str, Expr]]:
        """Return the config, and zeros for the routing biases of a family that has them."""
        if not self.has_routing_bias or self.routing_bias:
            return self, {}
        # Weights import NumPy, which takes longer than everything that reads a config.
        from moecc.types import F32, tensor
        from moecc.weights.expr import Full

        names = self.names
        axes = {**({"row": 1} if names.routing_bias_rows else {}), "expert": self.num_experts}
        zeros = Full(0.0, tensor(F32, **axes))
        prefixes = [
            names.layer.format(layer=layer)
            for layer, sparse in enumerate(self.sparse_layers)
            if sparse
        ]
        return self, {f"{p}{names.sparse}{names.routing_bias}": zeros for p in prefixes}

    def small_sizes(self) -> JsonDict:
        """Return the fields that are other in a small model of the same structure."""
        most = max(min(SMALL_EXPERT, SMALL_NEURONS // self.num_experts), 6)
        width = shrink_size(self.expert_intermediate_size, most)
        shared = self.shared_expert_intermediate_size
        sizes: JsonDict = {"expert_intermediate_size": width}
        if shared is not None:
            counted = min(shared // self.expert_intermediate_size, SMALL_SHARED) * width
            free = shrink_size(shared, SMALL_MLP)
            sizes["shared_expert_intermediate_size"] = counted if self.shared_count_key else free
        if self.expert_intermediate_size == self.intermediate_size:
            # In mixtral both are the same number.
            sizes["intermediate_size"] = width
        return {**super().small_sizes(), **sizes}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        family = self.model_type
        for name in ("num_experts", "decoder_sparse_step"):
            if getattr(self, name) < 1:
                yield key_problem("too small", "at least 1", f"{getattr(self, name)}", name)
        if not 1 <= self.experts_per_token <= self.num_experts:
            keys = (self.key("experts_per_token"), *self._count_keys())
            fault = "a token cannot choose that many experts"
            chosen = f"{self.experts_per_token}"
            yield key_problem(fault, f"1 to {self.num_experts}", chosen, *keys)
        width = self.expert_intermediate_size
        if not self.has_expert_width() and width != self.intermediate_size:
            fault = f"{family} has one width, that of its experts"
            yield key_problem(fault, f"{self.intermediate_size}", f"{width}", "intermediate_size")
        always = self.renormalises()
        if always is not None and self.norm_topk_prob != always:
            fault = (
                f"{family} {'always' if always else 'never'} divides the chosen gates by their sum"
            )
            shown = [f"{v}".lower() for v in (always, self.norm_topk_prob)]
            yield key_problem(fault, *shown, "norm_topk_prob")
        if not self.key("gate_scale") and self.gate_scale != 1:
            fault = f"{family} has no factor on the gates"
            yield key_problem(fault, "1", f"{self.gate_scale:g}", "routed_scaling_factor")
        if self.routing_bias and not self.has_routing_bias:
            fault = f"{family} has no bias in the choice of experts"
            yield key_problem(fault, "none", "one", "routing_bias")
        yield from self._group_checks()
        shared = self.shared_expert_intermediate_size
        if self.has_shared_expert != (shared is not None) and not self.shared_is_optional:
            word = "needs a" if self.has_shared_expert else "has no"
            expected = "a size" if self.has_shared_expert else "None"
            yield key_problem(f"{family} {word} shared expert", expected, f"{shared}", SHARED)
        if self.shared_count_key and shared is not None and width > 0 and shared % width:
            fault = f"{family} has shared experts of the experts' own width"
            chosen = f"{shared} neurons"
            yield key_problem(fault, f"a multiple of {width}", chosen, self.shared_count_key)
        if self.decoder_sparse_step > 0:
            yield from pattern_checks(
                family, self.sparse_style, self.sparse_layers, self.mlp_only_layers
            )

    def _group_checks(self) -> Iterator[KeyProblem]:
        groups, open_groups, experts = self.expert_groups, self.open_groups, self.num_experts
        keys = ("n_group", "n_routed_experts")
        if groups < 1 or experts % groups:
            fault = "the groups do not divide the experts"
            yield key_problem(fault, f"a divisor of {experts}", f"{groups}", *keys)
        elif not 1 <= open_groups <= groups:
            fault = "a token cannot choose among that many groups"
            yield key_problem(fault, f"1 to {groups}", f"{open_groups}", "topk_group", *keys)
        elif (most := experts // groups * open_groups) < self.experts_per_token <= experts:
            fault = "the groups of a token have fewer experts than it chooses"
            chosen, key = f"{self.experts_per_token}", self.key("experts_per_token")
            yield key_problem(fault, f"at most {most}", chosen, key, "topk_group", *keys)

    @classmethod
    def _count_keys(cls) -> tuple[str, ...]:
        """Return the keys that may state the number of experts, the family's own first."""
        return tuple(dict.fromkeys((*cls.experts_keys, "num_experts", "num_local_experts")))

    @classmethod
    def _read(cls, reader: Reader) -> JsonDict:
        values = super()._read(reader)
        values["num_experts"] = cls._read_experts(reader)
        values["routing_bias"] = cls.has_routing_bias
        if "norm_topk_prob" in cls.defaults:
            values["norm_topk_prob"] = reader.flag("norm_topk_prob")
        if cls.shared_count_key:
            least = 0 if cls.shared_is_optional else 1
            count = reader.size(cls.shared_count_key, MOST_SHARED, smallest=least)
            values[SHARED] = count * values["expert_intermediate_size"] or None
        elif cls.has_shared_expert:
            values[SHARED] = reader.size(cls.key(SHARED))
        return values | read_pattern(reader, cls.sparse_style, values["num_hidden_layers"])

    @classmethod
    def _read_experts(cls, reader: Reader) -> int:
        stated = [key for key in cls._count_keys() if reader.has(key)]
        counts = {key: reader.size(key, COUNT) for key in stated}
        if len(set(counts.values())) > 1 and not reader.bad.intersection(counts):
            hint = "transformers 4 and 5 would each take another one; count the tensors"
            fault = "the number of experts is stated twice and differs"
            reader.conflict(tuple(stated), fault, hint=hint)
        if stated and not set(stated).intersection(cls.experts_keys):
            fault = f"transformers reads {cls.experts_keys[0]} here and would assume its default"
            hint = f"rename the key to {cls.experts_keys[0]}"
            reader.refuse(stated[0], fault, expected=cls.experts_keys[0], hint=hint)
        return next(iter(counts.values())) if stated else reader.size(cls.experts_keys[0], COUNT)

    def _write(self) -> JsonDict:
        shared = self.shared_expert_intermediate_size
        keys = {
            **super()._write(),
            **dict.fromkeys(self._count_keys(), self.num_experts),
            **write_pattern(
                self.sparse_style,
                self.sparse_layers,
                self.decoder_sparse_step,
                self.mlp_only_layers,
            ),
        }
        if self.shared_count_key:
            keys[self.shared_count_key] = (shared or 0) // self.expert_intermediate_size
        elif self.has_shared_expert:
            keys[self.key(SHARED)] = shared
        if self.renormalises() is None:
            keys["norm_topk_prob"] = self.norm_topk_prob
        return keys
