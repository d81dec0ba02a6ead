"""A method for each operation of the table that is not elementwise.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moecc.ir.elementwise_operations import ElementwiseOperations
from moecc.ir.operation import Names, Sizes

if TYPE_CHECKING:
    from moecc.ir.attributes import (
        Convention,
        Gates,
        Given,
        Hash,
        Order,
        Policy,
        Precision,
        Remat,
        Rounding,
        Scaling,
        Slots,
        Using,
    )
    from moecc.ir.graph import Graph, Value

# fmt: off


class Operations(ElementwiseOperations):
    """What a builder makes.

    Operands are given by position, attributes and the name of the result by keyword.
    """

    def contract(
        self, x: Value, w: Value, /, *, over: Names, precision: Precision = "default",
        name: str | None = None
    ) -> Value:
        """The sum over the named axes of x · w; other axes that both have are batch axes."""
        return self.value("contract", x, w, name=name, over=over, precision=precision)

    def convolve(
        self, x: Value, w: Value, /, *, over: Names, along: Names, taps: Names, stride: int = 1,
        padding: int = 0, name: str | None = None
    ) -> Value:
        """The sum over the named axes, and over windows along others, of x · w."""
        return self.value(
            "convolve", x, w, name=name, over=over, along=along, taps=taps, stride=stride,
            padding=padding
        )

    def sum(self, x: Value, /, *, axes: Names, name: str | None = None) -> Value:
        """The sum over the named axes."""
        return self.value("sum", x, name=name, axes=axes)

    def mean(self, x: Value, /, *, axes: Names, name: str | None = None) -> Value:
        """The mean over the named axes."""
        return self.value("mean", x, name=name, axes=axes)

    def max(self, x: Value, /, *, axes: Names, name: str | None = None) -> Value:
        """The maximum over the named axes."""
        return self.value("max", x, name=name, axes=axes)

    def logsumexp(self, x: Value, /, *, axes: Names, name: str | None = None) -> Value:
        """log Σ exp(x) over the named axes, without overflow."""
        return self.value("logsumexp", x, name=name, axes=axes)

    def softmax(self, x: Value, /, *, axis: str, name: str | None = None) -> Value:
        """exp(x) over its sum along an axis; zeros where all of it is −∞, and nothing is seen."""
        return self.value("softmax", x, name=name, axis=axis)

    def rms_norm(
        self, x: Value, scale: Value, /, *, axis: str, eps: float = 1e-06, name: str | None = None
    ) -> Value:
        """x / √(mean(x²) + eps) · scale (Zhang and Sennrich 2019)."""
        return self.value("rms_norm", x, scale, name=name, axis=axis, eps=eps)

    def layer_norm(
        self, x: Value, scale: Value, bias: Value, /, *, axis: str, eps: float = 1e-06,
        name: str | None = None
    ) -> Value:
        """(x − mean) / √(variance + eps) · scale + bias (Ba et al. 2016)."""
        return self.value("layer_norm", x, scale, bias, name=name, axis=axis, eps=eps)

    def rope(
        self, positions: Value, /, *, axis: str, size: int, theta: float = 10000.0,
        scaling: Scaling = "default", factor: float = 1.0, original_context: int = 0,
        low_freq_factor: float = 1.0, high_freq_factor: float = 4.0, beta_fast: float = 32.0,
        beta_slow: float = 1.0, truncate: bool = True, attention_factor: float = 1.0,
        short_factors: tuple[float, ...] = (), long_factors: tuple[float, ...] = (),
        name: str | None = None
    ) -> tuple[Value, Value]:
        """Tables of cosines and sines for rotary positions, both halves alike (Su et al. 2021)."""
        first, second = self.values(
            "rope", positions, name=name, axis=axis, size=size, theta=theta, scaling=scaling,
            factor=factor, original_context=original_context, low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor, beta_fast=beta_fast, beta_slow=beta_slow,
            truncate=truncate, attention_factor=attention_factor, short_factors=short_factors,
            long_factors=long_factors
        )
        return first, second

    def rotate(
        self, x: Value, cos: Value, sin: Value, /, *, axis: str, name: str | None = None
    ) -> Value:
        """x · cos + rotate_half(x) · sin along an axis; the halves are paired, as in GPT-NeoX."""
        return self.value("rotate", x, cos, sin, name=name, axis=axis)

    def causal(
        self, query: Value, key: Value, /, *, window: int = 0, name: str | None = None
    ) -> Value:
        """Whether a query may see a key: key ≤ query, and query − key < window if there is one."""
        return self.value("causal", query, key, name=name, window=window)

    def same_segment(self, query: Value, key: Value, /, *, name: str | None = None) -> Value:
        """Whether a query may see a key: both are of one segment, or the query is padding."""
        return self.value("same_segment", query, key, name=name)

    def relative_buckets(
        self, query: Value, key: Value, /, *, bidirectional: bool, buckets: int = 32,
        max_distance: int = 128, name: str | None = None
    ) -> Value:
        """The bucket of each distance from query to key, nearby ones exact, far ones geometric."""
        return self.value(
            "relative_buckets", query, key, name=name, bidirectional=bidirectional, buckets=buckets,
            max_distance=max_distance
        )

    def attention(
        self, query: Value, key: Value, value: Value, /, *more: Value, over: str, along: str,
        scale: float = 1.0, cap: float = 0.0, causal: Names = (), window: int = 0,
        given: Given | tuple[Given, ...] = (), name: str | None = None
    ) -> Value:
        """Values averaged by the softmax of query · key, without scores in memory."""
        return self.value(
            "attention", query, key, value, *more, name=name, over=over, along=along, scale=scale,
            cap=cap, causal=causal, window=window, given=given
        )

    def rename(self, x: Value, /, *, axis: str, to: str, name: str | None = None) -> Value:
        """x with one axis under another name."""
        return self.value("rename", x, name=name, axis=axis, to=to)

    def split(self, x: Value, /, *, axis: str, into: Sizes, name: str | None = None) -> Value:
        """x with one axis cut into several, the first outermost."""
        return self.value("split", x, name=name, axis=axis, into=into)

    def merge(self, x: Value, /, *, axes: Names, into: str, name: str | None = None) -> Value:
        """x with several axes made one, the first outermost."""
        return self.value("merge", x, name=name, axes=axes, into=into)

    def broadcast(self, x: Value, like: Value, /, *, name: str | None = None) -> Value:
        """x repeated along every axis that the second operand has."""
        return self.value("broadcast", x, like, name=name)

    def slice(
        self, x: Value, /, *, axis: str, start: int, stop: int, name: str | None = None
    ) -> Value:
        """A range of x along one axis."""
        return self.value("slice", x, name=name, axis=axis, start=start, stop=stop)

    def positions(self, like: Value, /, *, axis: str, name: str | None = None) -> Value:
        """0, 1, 2 … along an axis of the operand."""
        return self.value("positions", like, name=name, axis=axis)

    def embedding(
        self, table: Value, ids: Value, /, *, axis: str, name: str | None = None
    ) -> Value:
        """Rows of a table, picked by index."""
        return self.value("embedding", table, ids, name=name, axis=axis)

    def one_hot(self, ids: Value, /, *, into: Sizes, name: str | None = None) -> Value:
        """1 at the index, 0 elsewhere, along a new axis."""
        return self.value("one_hot", ids, name=name, into=into)

    def chunk(
        self, x: Value, /, *, axis: str, at: int, of: int, parts: int = 1, name: str | None = None
    ) -> Value:
        """One of `of` chunks of x along an axis: a piece of each of `parts` equal runs."""
        return self.value("chunk", x, name=name, axis=axis, at=at, of=of, parts=parts)

    def join(
        self, x: Value, /, *more: Value, axis: str, parts: int = 1, name: str | None = None
    ) -> Value:
        """The value whose chunks, in their order, the operands are."""
        return self.value("join", x, *more, name=name, axis=axis, parts=parts)

    def reshard(self, x: Value, /, *, to: str = "", name: str | None = None) -> Value:
        """x, lying elsewhere, however it gets there."""
        return self.value("reshard", x, name=name, to=to)

    def shard(self, x: Value, /, *, axis: str, mesh: Names, name: str | None = None) -> Value:
        """x, of which every device keeps its part along an axis; nothing is sent."""
        return self.value("shard", x, name=name, axis=axis, mesh=mesh)

    def all_gather(self, x: Value, /, *, axis: str, mesh: Names, name: str | None = None) -> Value:
        """x, of which every device gets the parts of the others along an axis."""
        return self.value("all_gather", x, name=name, axis=axis, mesh=mesh)

    def all_reduce(self, x: Value, /, *, mesh: Names, name: str | None = None) -> Value:
        """x, a sum that is carried out over mesh axes; every device gets all of it."""
        return self.value("all_reduce", x, name=name, mesh=mesh)

    def reduce_scatter(
        self, x: Value, /, *, axis: str, mesh: Names, name: str | None = None
    ) -> Value:
        """x, a sum that is carried out over mesh axes; every device gets its part along an axis."""
        return self.value("reduce_scatter", x, name=name, axis=axis, mesh=mesh)

    def all_to_all(
        self, x: Value, /, *, mesh: Names, split: str, gather: str, name: str | None = None
    ) -> Value:
        """x, of which every device gives parts along one axis for parts along another."""
        return self.value("all_to_all", x, name=name, mesh=mesh, split=split, gather=gather)

    def ragged_all_to_all(
        self, x: Value, /, *, mesh: Names, split: str, gather: str, name: str | None = None
    ) -> Value:
        """Ragged rows, exchanged between their groups and their experts; only rows that are there."""
        return self.value("ragged_all_to_all", x, name=name, mesh=mesh, split=split, gather=gather)

    def constant(self, /, *, value: float, dtype: str = "f32", name: str | None = None) -> Value:
        """A scalar constant."""
        return self.value("constant", name=name, value=value, dtype=dtype)

    def fold_key(self, key: Value, /, *, by: int, name: str | None = None) -> Value:
        """Another key, made of a key and a number; keys of different numbers are independent."""
        return self.value("fold_key", key, name=name, by=by)

    def random_uniform(
        self, key: Value, like: Value, /, *, low: float = 0.0, high: float = 1.0,
        name: str | None = None
    ) -> Value:
        """Independent numbers, uniform on [low, high), with the axes of the second operand."""
        return self.value("random_uniform", key, like, name=name, low=low, high=high)

    def random_normal(
        self, key: Value, like: Value, /, *, std: float = 1.0, name: str | None = None
    ) -> Value:
        """Independent normal numbers around zero, with the axes of the second operand."""
        return self.value("random_normal", key, like, name=name, std=std)

    def update_slice(
        self, x: Value, update: Value, start: Value, /, *, axis: str, name: str | None = None
    ) -> Value:
        """x with a range along one axis replaced by the update, from `start` on."""
        return self.value("update_slice", x, update, start, name=name, axis=axis)

    def jax(
        self, x: Value, /, *more: Value, into: Sizes, dtype: str = "f32", equations: int = 0,
        lines: str = "", name: str | None = None
    ) -> Value:
        """A part of a function of JAX, which only the function itself can compute."""
        return self.value(
            "jax", x, *more, name=name, into=into, dtype=dtype, equations=equations, lines=lines
        )

    def stack(self, x: Value, /, *more: Value, axis: str, name: str | None = None) -> Value:
        """The operands, one after the other along a new axis, which is the first."""
        return self.value("stack", x, *more, name=name, axis=axis)

    def index(self, x: Value, /, *, axis: str, at: int, name: str | None = None) -> Value:
        """x at one position of an axis, which is gone then."""
        return self.value("index", x, name=name, axis=axis, at=at)

    def scan(
        self, x: Value, /, *more: Value, over: Sizes, carries: int = 0, stacked: int = 0,
        remat: Remat = "none", save: Names = (), body: Graph, name: str | None = None
    ) -> tuple[Value, ...]:
        """The body, run once for each position of an axis, one after the other."""
        return self.values(
            "scan", x, *more, name=name, over=over, carries=carries, stacked=stacked, remat=remat,
            save=save, body=body
        )

    def assign_slots(
        self, experts_value: Value, /, *more: Value, tokens: Names, experts: int, groups: int = 1,
        group_size: int = 0, slots: Slots = "ragged", capacity_factor: float = 0.0,
        convention: Convention = "tokens", rounding: Rounding = "floor", minimum: int = 4,
        multiple: int = 1, cap: bool = True, order: Order = "choice",
        using: Using | tuple[Using, ...] = (), name: str | None = None
    ) -> Value:
        """The slot of each choice at its expert, or −1 where it is dropped."""
        return self.value(
            "assign_slots", experts_value, *more, name=name, tokens=tokens, experts=experts,
            groups=groups, group_size=group_size, slots=slots, capacity_factor=capacity_factor,
            convention=convention, rounding=rounding, minimum=minimum, multiple=multiple, cap=cap,
            order=order, using=using
        )

    def expert_choice(
        self, scores: Value, /, *more: Value, tokens: Names, experts: int, groups: int = 1,
        group_size: int = 0, slots: Literal["capacity"] = "capacity", capacity_factor: float,
        convention: Literal["tokens"] = "tokens", rounding: Rounding = "floor", minimum: int = 4,
        multiple: int = 1, cap: bool = True, axis: str = "expert", choice: str = "choice",
        using: Literal["mask"] | tuple[Literal["mask"], ...] = (), name: str | None = None
    ) -> tuple[Value, Value, Value]:
        """Each expert takes the C tokens of a group that score highest with it (Zhou et al. 2022)."""
        first, second, third = self.values(
            "expert_choice", scores, *more, name=name, tokens=tokens, experts=experts,
            groups=groups, group_size=group_size, slots=slots, capacity_factor=capacity_factor,
            convention=convention, rounding=rounding, minimum=minimum, multiple=multiple, cap=cap,
            axis=axis, choice=choice, using=using
        )
        return first, second, third

    def dispatch(
        self, x: Value, experts: Value, slots: Value, /, *, name: str | None = None
    ) -> Value:
        """The tokens, each in the slots that its choices were given; an empty slot holds zeros."""
        return self.value("dispatch", x, experts, slots, name=name)

    def group_sum(self, x: Value, slots: Value, /, *, name: str | None = None) -> Value:
        """The sum over the tokens of each group that an ``assign_slots`` counts in."""
        return self.value("group_sum", x, slots, name=name)

    def route(
        self, logits: Value, /, *more: Value, top_k: int, gates: Gates = "renormalised",
        scale: float = 1.0, axis: str = "expert", choice: str = "choice",
        using: Literal["bias"] | tuple[Literal["bias"], ...] = (), precision: Precision = "f32",
        name: str | None = None
    ) -> tuple[Value, Value]:
        """The k experts with the largest logits, best first, and their gates."""
        first, second = self.values(
            "route", logits, *more, name=name, top_k=top_k, gates=gates, scale=scale, axis=axis,
            choice=choice, using=using, precision=precision
        )
        return first, second

    def keep_choices(
        self, gates: Value, /, *more: Value, policy: Policy = "random", threshold: float = 0.2,
        choice: str = "choice", name: str | None = None
    ) -> Value:
        """Which choices a policy keeps; the first always (ST-MoE, Appendix G)."""
        return self.value(
            "keep_choices", gates, *more, name=name, policy=policy, threshold=threshold,
            choice=choice
        )

    def hash_experts(
        self, ids: Value, /, *, experts: int, top_k: int = 1, seed: int = 0, hash: Hash = "murmur",
        choice: str = "choice", name: str | None = None
    ) -> Value:
        """The experts of each token by a hash of its id (Roller et al. 2021); no router at all."""
        return self.value(
            "hash_experts", ids, name=name, experts=experts, top_k=top_k, seed=seed, hash=hash,
            choice=choice
        )

    def combine(
        self, rows: Value, experts: Value, slots: Value, gates: Value, /, *, name: str | None = None
    ) -> Value:
        """For each token the sum over its choices of gate times row; a dropped one adds nothing."""
        return self.value("combine", rows, experts, slots, gates, name=name)

    def dispatch_gates(
        self, gates: Value, experts: Value, slots: Value, /, *, name: str | None = None
    ) -> Value:
        """The gate of the choice that has each slot; an empty slot holds zero."""
        return self.value("dispatch_gates", gates, experts, slots, name=name)

    def combine_weighted(
        self, rows: Value, experts: Value, slots: Value, /, *, name: str | None = None
    ) -> Value:
        """For each token the sum over its choices of their rows; a dropped one adds nothing."""
        return self.value("combine_weighted", rows, experts, slots, name=name)

    def within_buffer(
        self, experts: Value, slots: Value, counts: Value, /, *, tokens: Names, parts: int,
        blocks: int = 1, factor: float, name: str | None = None
    ) -> Value:
        """Which choices have a slot and room in the buffer of the device that has their expert."""
        return self.value(
            "within_buffer", experts, slots, counts, name=name, tokens=tokens, parts=parts,
            blocks=blocks, factor=factor
        )
