"""The base config of mixture-of-experts decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import ClassVar

from moecc.families.config import config_class
from moecc.families.decoder import DEFAULTS, DecoderConfig
from moecc.families.reader import KeyProblem, Reader, key_problem
from moecc.ir.conventions import Gates

# Which layers of a decoder have experts, in every family's spelling.
#
# All become a step and a list of exceptions, as qwen2_moe states them: layer i has experts,
# counted
# from 0, if the step divides i + 1 and i is not listed.

INTERVAL_KEYS = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")


def read_pattern(reader: Reader, style: str, layers: int) -> dict[str, object]:
    """Read the fields `decoder_sparse_step` and `mlp_only_layers`.

    Args:
      reader: the config.
      style: ``all`` (every layer), ``step``, ``leading`` (the first ones are dense) or ``interval``
        (every n-th of a range).
      layers: the number of layers.
    """
    if style == "step":
        step, dense = reader.size("decoder_sparse_step"), _read_layers(reader, "mlp_only_layers")
        return {"decoder_sparse_step": step, "mlp_only_layers": dense}
    if style == "leading":
        first = reader.size("first_k_dense_replace", smallest=0)
        return {"mlp_only_layers": tuple(range(min(first, layers)))}
    if style == "interval":
        return _read_interval(reader, layers)
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
    if style == "leading":
        return {"first_k_dense_replace": len(sparse) - sum(sparse)}
    if style == "interval":
        found = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
        values = (_interval(sparse) or step, found[0], found[-1])
        return dict(zip(INTERVAL_KEYS, values, strict=True))
    return {}


def layer_checks(dense: tuple[int, ...], layers: int) -> Iterator[KeyProblem]:
    """Yield what is wrong with a list of dense layers."""
    outside = [i for i in dense if not 0 <= i < layers]
    if outside:
        keys = ("mlp_only_layers", "num_hidden_layers")
        yield key_problem("layers that do not exist", f"0 to {layers - 1}", f"{outside[:8]}", *keys)
    if tuple(sorted(set(dense))) != dense:
        what = "not in ascending order without repetition"
        yield key_problem(what, "ascending layers", f"{dense[:8]}", "mlp_only_layers")


def pattern_checks(family: str, style: str, sparse: Sequence[bool]) -> Iterator[KeyProblem]:
    """Yield why a family of a style cannot have experts in the layers that `sparse` says."""
    dense = [layer for layer, is_sparse in enumerate(sparse) if not is_sparse]
    keys = ("mlp_only_layers", "decoder_sparse_step")
    if style == "all" and dense:
        what = f"{family} has experts in every layer; {dense[:8]} would be dense"
        yield key_problem(what, "no dense layer", f"{len(dense)} of them", *keys)
    if style == "leading" and dense != list(range(len(dense))):
        what = f"{family} has dense layers only before the first layer with experts"
        expected = f"layers 0 to {len(dense) - 1}"
        yield key_problem(what, expected, f"{dense[:8]}", "first_k_dense_replace", *keys)
    if style == "interval" and _interval(sparse) is None:
        what = f"{family} has experts in every n-th layer of a range"
        found = f"dense layers {dense[:8]}"
        yield key_problem(what, "every n-th layer", found, *INTERVAL_KEYS, *keys)


def _read_interval(reader: Reader, layers: int) -> dict[str, object]:
    step = reader.size("moe_layer_interval")
    start = reader.size("moe_layer_start_index", smallest=0)
    # The default, -1, stands for the last layer.
    last = reader.value("moe_layer_end_index") in (None, -1)
    end = layers - 1 if last else reader.size("moe_layer_end_index", smallest=0)
    dense = (i for i in range(layers) if (i + 1) % step == 0 and not start <= i <= end)
    return {"decoder_sparse_step": step, "mlp_only_layers": tuple(dense)}


def _interval(sparse: Sequence[bool]) -> int | None:
    """Return n if every n-th layer from the first sparse one to the last is sparse, else None."""
    found = [layer for layer, is_sparse in enumerate(sparse) if is_sparse]
    if not found:
        return None
    start, end = found[0], found[-1]
    for step in range(1, len(sparse) + 1):
        if found == [i for i in range(start, end + 1) if (i + 1) % step == 0]:
            return step
    return None


def _read_layers(reader: Reader, key: str) -> tuple[int, ...]:
    found = reader.items(key)
    layers = [layer for layer in found if type(layer) is int]
    if len(layers) != len(found):
        reader.refuse(key, "not a list of layer numbers", expected="whole numbers")
    return tuple(sorted(set(layers)))


MOE_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

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
    part in the choice of experts.
    """

    defaults: ClassVar[Mapping[str, object]] = MOE_DEFAULTS
    # The keys of which one alone is read the same by transformers 4 and 5, or is natural to 5.
    experts_keys: ClassVar[tuple[str, ...]]
    top_k_key: ClassVar[str] = "num_experts_per_tok"
    # Which layers are sparse: a style of `moecc.families.mixture`.
    sparse_style: ClassVar[str] = "step"
    # Whether experts have a width of their own, or that of the config's only size.
    has_expert_width: ClassVar[bool] = True
    # What the router's logits become before experts are chosen: softmax or sigmoid.
    score: ClassVar[str] = "softmax"
    # Whether the family divides the chosen gates by their sum; None: an option.
    renormalises: ClassVar[bool | None] = None
    has_shared_expert: ClassVar[bool] = False
    shared_is_optional: ClassVar[bool] = False
    # The key that counts shared experts of the experts' width; else the key of a width is read.
    shared_count_key: ClassVar[str] = ""
    # Whether a sigmoid gates the shared expert.
    shared_gate: ClassVar[bool] = True
    has_gate_scale: ClassVar[bool] = False
    has_routing_bias: ClassVar[bool] = False
    # Whether a bias is added to the router's logits.
    has_logits_bias: ClassVar[bool] = False
    # Whether transformers has a balance loss for the family, and its keys.
    has_balance_loss: ClassVar[bool] = True
    # The options of `upcycle`, besides the number of experts, that lead from a dense model here.
    upcycle_options: ClassVar[str] = "top-k=2"

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    gate_scale: float = 1.0
    routing_bias: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    output_router_logits: bool = False

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Return for each layer whether it has experts.

        Layer i has, counted from 0, if `decoder_sparse_step` divides i + 1 and
        `mlp_only_layers` does not list i.
        """
        dense = set(self.mlp_only_layers)
        step = self.decoder_sparse_step
        return tuple(
            (layer + 1) % step == 0 and layer not in dense
            for layer in range(self.num_hidden_layers)
        )

    @property
    def gates(self) -> Gates:
        """The gate convention."""
        return GATES[self.score, self.norm_topk_prob]

    @classmethod
    def conventions(cls) -> tuple[Gates, ...]:
        """Return the gate conventions that the family can have."""
        choices = (True, False) if cls.renormalises is None else (cls.renormalises,)
        return tuple(GATES[cls.score, divided] for divided in choices)

    @classmethod
    def from_others(cls) -> dict[str, object]:
        """Return the fields, besides those of all, of a model that comes from another family."""
        return {}

    def own_fields(self) -> dict[str, object]:
        """Return the fields that only this family has."""
        others = {f.name for f in fields(MoeConfig)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self._expert_checks()
        yield from self._gate_checks()
        yield from self._shared_checks()
        yield from layer_checks(self.mlp_only_layers, self.num_hidden_layers)
        yield from pattern_checks(self.model_type, self.sparse_style, self.sparse_layers)

    def _expert_checks(self) -> Iterator[KeyProblem]:
        for name in ("num_experts", "expert_intermediate_size", "decoder_sparse_step"):
            if getattr(self, name) < 1:
                yield key_problem("too small", "at least 1", f"{getattr(self, name)}", name)
        if not 1 <= self.experts_per_token <= self.num_experts:
            what = "a token cannot choose that many experts"
            keys = (self.top_k_key, *self.experts_keys, "num_experts", "num_local_experts")
            found = f"{self.experts_per_token}"
            yield key_problem(what, f"1 to {self.num_experts}", found, *keys)
        if not self.has_expert_width and self.expert_intermediate_size != self.intermediate_size:
            what = f"{self.model_type} has one width, that of its experts"
            found = f"{self.expert_intermediate_size}"
            yield key_problem(what, f"{self.intermediate_size}", found, "intermediate_size")

    def _gate_checks(self) -> Iterator[KeyProblem]:
        if self.renormalises is not None and self.norm_topk_prob != self.renormalises:
            does = "always divides" if self.renormalises else "never divides"
            what = f"{self.model_type} {does} the chosen gates by their sum"
            expected, found = (f"{v}".lower() for v in (self.renormalises, self.norm_topk_prob))
            yield key_problem(what, expected, found, "norm_topk_prob")
        if not self.has_gate_scale and self.gate_scale != 1:
            what = f"{self.model_type} has no factor on the gates"
            yield key_problem(what, "1", f"{self.gate_scale:g}", "routed_scaling_factor")
        if self.routing_bias and not self.has_routing_bias:
            what = f"{self.model_type} has no bias in the choice of experts"
            yield key_problem(what, "none", "one", "routing_bias")

    def _shared_checks(self) -> Iterator[KeyProblem]:
        shared = self.shared_expert_intermediate_size
        if self.has_shared_expert != (shared is not None) and not self.shared_is_optional:
            word = "needs a" if self.has_shared_expert else "has no"
            expected = "a size" if self.has_shared_expert else "None"
            key = "shared_expert_intermediate_size"
            yield key_problem(f"{self.model_type} {word} shared expert", expected, f"{shared}", key)
        width = self.expert_intermediate_size
        if self.shared_count_key and shared is not None and width > 0 and shared % width:
            what = f"{self.model_type} has shared experts of the experts' own width"
            found = f"{shared} neurons"
            yield key_problem(what, f"a multiple of {width}", found, self.shared_count_key)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        values = {
            **super()._read(reader),
            "num_experts": cls._read_experts(reader),
            "experts_per_token": reader.size(cls.top_k_key),
            "norm_topk_prob": cls._read_norm(reader),
            "output_router_logits": reader.flag("output_router_logits"),
            "routing_bias": cls.has_routing_bias,
        }
        width = "moe_intermediate_size" if cls.has_expert_width else "intermediate_size"
        values["expert_intermediate_size"] = reader.size(width)
        if cls.has_balance_loss:
            values["router_aux_loss_coef"] = reader.number("router_aux_loss_coef", least=0)
        if cls.has_gate_scale:
            values["gate_scale"] = reader.number("routed_scaling_factor", above=0)
        layers = values["num_hidden_layers"]
        assert isinstance(layers, int), "a size"
        return {
            **values,
            **cls._read_shared(reader, values),
            **read_pattern(reader, cls.sparse_style, layers),
            **cls._read_layout(reader),
        }

    @classmethod
    def _read_shared(cls, reader: Reader, values: Mapping[str, object]) -> dict[str, object]:
        key = "shared_expert_intermediate_size"
        if not cls.shared_count_key:
            return {key: reader.size(key) if cls.has_shared_expert else None}
        width = values["expert_intermediate_size"]
        assert isinstance(width, int), "a size"
        least = 0 if cls.shared_is_optional else 1
        return {key: reader.size(cls.shared_count_key, smallest=least) * width or None}

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        """Read what else the family has."""
        return {}

    @classmethod
    def _read_norm(cls, reader: Reader) -> bool:
        if cls.renormalises is None or "norm_topk_prob" in cls.defaults:
            return reader.flag("norm_topk_prob")
        return cls.renormalises

    @classmethod
    def _read_experts(cls, reader: Reader) -> int:
        keys = tuple(dict.fromkeys((*cls.experts_keys, "num_experts", "num_local_experts")))
        stated = [key for key in keys if reader.has(key)]
        found = {key: reader.size(key) for key in stated}
        if len(set(found.values())) > 1 and not reader.bad.intersection(keys):
            hint = "transformers 4 and 5 would each take another one; count the tensors"
            reader.conflict(
                tuple(stated), "the number of experts is stated twice and differs", hint=hint
            )
        if stated and not set(stated).intersection(cls.experts_keys):
            what = f"transformers reads {cls.experts_keys[0]} here and would assume its default"
            hint = f"rename the key to {cls.experts_keys[0]}"
            reader.refuse(stated[0], what, expected=cls.experts_keys[0], hint=hint)
        return next(iter(found.values())) if stated else reader.size(cls.experts_keys[0])

    def _write(self) -> dict[str, object]:
        names = (*self.experts_keys, "num_experts", "num_local_experts")
        keys = {
            **super()._write(),
            **dict.fromkeys(names, self.num_experts),
            self.top_k_key: self.experts_per_token,
            "output_router_logits": self.output_router_logits,
            **write_pattern(
                self.sparse_style,
                self.sparse_layers,
                self.decoder_sparse_step,
                self.mlp_only_layers,
            ),
            **self._write_shared(),
            **self._write_layout(),
        }
        if self.has_expert_width:
            keys["moe_intermediate_size"] = self.expert_intermediate_size
        if self.renormalises is None:
            keys["norm_topk_prob"] = self.norm_topk_prob
        if self.has_balance_loss:
            keys["router_aux_loss_coef"] = self.router_aux_loss_coef
        if self.has_gate_scale:
            keys["routed_scaling_factor"] = self.gate_scale
        return keys

    def _write_shared(self) -> dict[str, object]:
        shared = self.shared_expert_intermediate_size
        if self.shared_count_key:
            return {self.shared_count_key: (shared or 0) // self.expert_intermediate_size}
        return {"shared_expert_intermediate_size": shared} if self.has_shared_expert else {}

    def _write_layout(self) -> dict[str, object]:
        """Return the keys of what else the family has."""
        return {}
