"""The base config of mixture-of-experts decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .base import DEFAULTS, DecoderConfig
from .reader import KeyProblem, Reader, key_problem

MOE_DEFAULTS: Mapping[str, object] = {
    **DEFAULTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


@dataclass(frozen=True, kw_only=True)
class MoeConfig(DecoderConfig):
    """A decoder with expert layers.

    `intermediate_size` is the width of the dense feed-forward blocks, if any, and
    `expert_intermediate_size` that of one expert.  With `norm_topk_prob` the chosen gates are
    divided by their sum.
    """

    defaults: ClassVar[Mapping[str, object]] = MOE_DEFAULTS
    # The keys of which one alone is read the same by transformers 4 and 5, or is natural to 5.
    experts_keys: ClassVar[tuple[str, ...]]
    has_shared_expert: ClassVar[bool] = False
    # The options of `upcycle`, besides the number of experts, that lead from a dense model here.
    upcycle_options: ClassVar[str] = "top-k=2"

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = False
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

    def checks(self) -> Iterator[KeyProblem]:
        """Yield inconsistent values, and those that this family cannot express."""
        yield from super().checks()
        yield from self._expert_checks()
        shared = self.shared_expert_intermediate_size
        if self.has_shared_expert != (shared is not None):
            word = "needs a" if self.has_shared_expert else "has no"
            expected = "a size" if self.has_shared_expert else "None"
            key = "shared_expert_intermediate_size"
            yield key_problem(f"{self.model_type} {word} shared expert", expected, f"{shared}", key)
        outside = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            expected = f"0 to {self.num_hidden_layers - 1}"
            keys = ("mlp_only_layers", "num_hidden_layers")
            yield key_problem("layers that do not exist", expected, f"{outside[:8]}", *keys)
        if tuple(sorted(set(self.mlp_only_layers))) != self.mlp_only_layers:
            what = "not in ascending order without repetition"
            found = f"{self.mlp_only_layers[:8]}"
            yield key_problem(what, "ascending layers", found, "mlp_only_layers")

    def _expert_checks(self) -> Iterator[KeyProblem]:
        for name in ("num_experts", "expert_intermediate_size", "decoder_sparse_step"):
            if getattr(self, name) < 1:
                yield key_problem("too small", "at least 1", f"{getattr(self, name)}", name)
        if not 1 <= self.experts_per_token <= self.num_experts:
            what = "a token cannot choose that many experts"
            keys = ("num_experts_per_tok", "num_experts", "num_local_experts")
            found = f"{self.experts_per_token}"
            yield key_problem(what, f"1 to {self.num_experts}", found, *keys)

    @classmethod
    def _read(cls, reader: Reader) -> dict[str, object]:
        shared = "shared_expert_intermediate_size"
        return {
            **super()._read(reader),
            "num_experts": cls._read_experts(reader),
            "experts_per_token": reader.size("num_experts_per_tok"),
            "router_aux_loss_coef": reader.number("router_aux_loss_coef", least=0),
            "output_router_logits": reader.flag("output_router_logits"),
            shared: reader.size(shared) if cls.has_shared_expert else None,
            **cls._read_layout(reader),
        }

    @classmethod
    def _read_layout(cls, reader: Reader) -> dict[str, object]:
        return {
            "expert_intermediate_size": reader.size("moe_intermediate_size"),
            "norm_topk_prob": reader.flag("norm_topk_prob"),
            "decoder_sparse_step": reader.size("decoder_sparse_step"),
            "mlp_only_layers": _read_layers(reader, "mlp_only_layers"),
        }

    @classmethod
    def _read_experts(cls, reader: Reader) -> int:
        keys = ("num_experts", "num_local_experts")
        stated = [key for key in keys if reader.has(key)]
        found = {key: reader.size(key) for key in stated}
        if len(set(found.values())) > 1 and not reader.bad.intersection(keys):
            hint = "transformers 4 and 5 would each take another one; count the tensors"
            reader.conflict(keys, "the number of experts is stated twice and differs", hint=hint)
        if stated and not set(stated).intersection(cls.experts_keys):
            what = f"transformers reads {cls.experts_keys[0]} here and would assume its default"
            hint = f"rename the key to {cls.experts_keys[0]}"
            reader.refuse(stated[0], what, expected=cls.experts_keys[0], hint=hint)
        return next(iter(found.values())) if stated else reader.size(cls.experts_keys[0])

    def _write(self) -> dict[str, object]:
        keys = {
            **super()._write(),
            "num_experts": self.num_experts,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "output_router_logits": self.output_router_logits,
            **self._write_layout(),
        }
        if self.has_shared_expert:
            keys["shared_expert_intermediate_size"] = self.shared_expert_intermediate_size
        return keys

    def _write_layout(self) -> dict[str, object]:
        return {
            "moe_intermediate_size": self.expert_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": self.decoder_sparse_step,
            "mlp_only_layers": list(self.mlp_only_layers),
        }


def _read_layers(reader: Reader, key: str) -> tuple[int, ...]:
    found = reader.items(key)
    layers = [layer for layer in found if type(layer) is int]
    if len(layers) != len(found):
        reader.refuse(key, "not a list of layer numbers", expected="whole numbers")
    return tuple(sorted(set(layers)))
