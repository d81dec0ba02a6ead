"""The methods of a builder, for type checkers; written by ``make docs``."""

from abc import ABC, abstractmethod
from typing import Literal

from moecc.ir.graph import Graph, Value
from moecc.types import Size

class Operations(ABC):
    @abstractmethod
    def values(
        self, op: str, /, *operands: Value, name: str | None = None, **attrs: object
    ) -> tuple[Value, ...]: ...
    def add(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def alibi(
        self,
        query: Value,
        key: Value,
        /,
        *,
        axis: str,
        size: int,
        name: str | None = None,
    ) -> Value: ...
    def all_gather(
        self,
        x: Value,
        /,
        *,
        axis: str,
        mesh: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def all_reduce(
        self,
        x: Value,
        /,
        *,
        mesh: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def all_to_all(
        self,
        x: Value,
        /,
        *,
        mesh: str | tuple[str, ...],
        split: str,
        gather: str,
        name: str | None = None,
    ) -> Value: ...
    def assign_slots(
        self,
        experts_value: Value,
        /,
        *more: Value,
        tokens: str | tuple[str, ...],
        experts: int,
        groups: int = 1,
        group_size: int = 0,
        slots: Literal["ragged", "capacity"] = "ragged",
        capacity_factor: float = 0.0,
        convention: Literal["tokens", "assignments"] = "tokens",
        rounding: Literal["floor", "round", "ceil"] = "floor",
        minimum: int = 4,
        multiple: int = 1,
        cap: bool = True,
        order: Literal["choice", "token"] = "choice",
        using: Literal["keep", "priority", "mask"] | tuple[Literal["keep", "priority", "mask"], ...] = (),
        name: str | None = None,
    ) -> Value: ...
    def attention(
        self,
        query: Value,
        key: Value,
        value: Value,
        /,
        *more: Value,
        over: str,
        along: str,
        scale: float = 1.0,
        cap: float = 0.0,
        causal: str | tuple[str, ...] = (),
        window: int = 0,
        given: Literal["bias", "sinks", "keep", "query_segments", "key_segments"] | tuple[Literal["bias", "sinks", "keep", "query_segments", "key_segments"], ...] = (),
        name: str | None = None,
    ) -> Value: ...
    def broadcast(
        self,
        x: Value,
        like: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def cast(
        self,
        x: Value,
        /,
        *,
        dtype: str,
        name: str | None = None,
    ) -> Value: ...
    def causal(
        self,
        query: Value,
        key: Value,
        /,
        *,
        window: int = 0,
        name: str | None = None,
    ) -> Value: ...
    def chunk(
        self,
        x: Value,
        /,
        *,
        axis: str,
        at: int,
        of: int,
        parts: int = 1,
        name: str | None = None,
    ) -> Value: ...
    def combine(
        self,
        rows: Value,
        experts: Value,
        slots: Value,
        gates: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def combine_weighted(
        self,
        rows: Value,
        experts: Value,
        slots: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def constant(
        self,
        /,
        *,
        value: float,
        dtype: str = "f32",
        name: str | None = None,
    ) -> Value: ...
    def contract(
        self,
        x: Value,
        w: Value,
        /,
        *,
        over: str | tuple[str, ...],
        precision: Literal["default", "f32"] = "default",
        name: str | None = None,
    ) -> Value: ...
    def convolve(
        self,
        x: Value,
        w: Value,
        /,
        *,
        over: str | tuple[str, ...],
        along: str | tuple[str, ...],
        taps: str | tuple[str, ...],
        stride: int = 1,
        padding: int = 0,
        name: str | None = None,
    ) -> Value: ...
    def delta_rule(
        self,
        query: Value,
        key: Value,
        value: Value,
        decay: Value,
        rate: Value,
        seen: Value,
        /,
        *,
        over: str,
        along: str,
        name: str | None = None,
    ) -> Value: ...
    def dispatch(
        self,
        x: Value,
        experts: Value,
        slots: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def dispatch_gates(
        self,
        gates: Value,
        experts: Value,
        slots: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def div(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def embedding(
        self,
        table: Value,
        ids: Value,
        /,
        *,
        axis: str,
        name: str | None = None,
    ) -> Value: ...
    def equal(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def exp(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def expert_choice(
        self,
        scores: Value,
        /,
        *more: Value,
        tokens: str | tuple[str, ...],
        experts: int,
        groups: int = 1,
        group_size: int = 0,
        slots: Literal["capacity"] = "capacity",
        capacity_factor: float,
        convention: Literal["tokens"] = "tokens",
        rounding: Literal["floor", "round", "ceil"] = "floor",
        minimum: int = 4,
        multiple: int = 1,
        cap: bool = True,
        axis: str = "expert",
        choice: str = "choice",
        using: Literal["mask"] | tuple[Literal["mask"], ...] = (),
        name: str | None = None,
    ) -> tuple[Value, Value, Value]: ...
    def fold_key(
        self,
        key: Value,
        /,
        *,
        by: int,
        name: str | None = None,
    ) -> Value: ...
    def gelu(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def gelu_tanh(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def group_sum(
        self,
        x: Value,
        slots: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def hash_experts(
        self,
        ids: Value,
        /,
        *,
        experts: int,
        top_k: int = 1,
        seed: int = 0,
        hash: Literal["murmur", "modulo"] = "murmur",
        choice: str = "choice",
        name: str | None = None,
    ) -> Value: ...
    def index(
        self,
        x: Value,
        /,
        *,
        axis: str,
        at: int,
        name: str | None = None,
    ) -> Value: ...
    def jax(
        self,
        x: Value,
        /,
        *more: Value,
        into: tuple[tuple[str, Size], ...],
        dtype: str = "f32",
        equations: int = 0,
        lines: str = "",
        name: str | None = None,
    ) -> Value: ...
    def join(
        self,
        x: Value,
        /,
        *more: Value,
        axis: str,
        parts: int = 1,
        name: str | None = None,
    ) -> Value: ...
    def keep_choices(
        self,
        gates: Value,
        /,
        *more: Value,
        policy: Literal["all", "none", "threshold", "random"] = "random",
        threshold: float = 0.2,
        choice: str = "choice",
        name: str | None = None,
    ) -> Value: ...
    def layer_norm(
        self,
        x: Value,
        scale: Value,
        bias: Value,
        /,
        *,
        axis: str,
        eps: float = 1e-06,
        name: str | None = None,
    ) -> Value: ...
    def less(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def log(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def logsumexp(
        self,
        x: Value,
        /,
        *,
        axes: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def mask(
        self,
        x: Value,
        keep: Value,
        /,
        *,
        fill: float = ...,
        name: str | None = None,
    ) -> Value: ...
    def max(
        self,
        x: Value,
        /,
        *,
        axes: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def maximum(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def mean(
        self,
        x: Value,
        /,
        *,
        axes: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def merge(
        self,
        x: Value,
        /,
        *,
        axes: str | tuple[str, ...],
        into: str,
        name: str | None = None,
    ) -> Value: ...
    def minimum(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def mul(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def neg(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def normal_cdf(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def one_hot(
        self,
        ids: Value,
        /,
        *,
        into: tuple[tuple[str, Size], ...],
        name: str | None = None,
    ) -> Value: ...
    def pointwise(
        self,
        x: Value,
        /,
        *,
        function: str,
        name: str | None = None,
    ) -> Value: ...
    def positions(
        self,
        like: Value,
        /,
        *,
        axis: str,
        name: str | None = None,
    ) -> Value: ...
    def ragged_all_to_all(
        self,
        x: Value,
        /,
        *,
        mesh: str | tuple[str, ...],
        split: str,
        gather: str,
        name: str | None = None,
    ) -> Value: ...
    def random_normal(
        self,
        key: Value,
        like: Value,
        /,
        *,
        std: float = 1.0,
        name: str | None = None,
    ) -> Value: ...
    def random_uniform(
        self,
        key: Value,
        like: Value,
        /,
        *,
        low: float = 0.0,
        high: float = 1.0,
        name: str | None = None,
    ) -> Value: ...
    def reduce_scatter(
        self,
        x: Value,
        /,
        *,
        axis: str,
        mesh: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def relative_buckets(
        self,
        query: Value,
        key: Value,
        /,
        *,
        bidirectional: bool,
        buckets: int = 32,
        max_distance: int = 128,
        name: str | None = None,
    ) -> Value: ...
    def relu(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def rename(
        self,
        x: Value,
        /,
        *,
        axis: str,
        to: str,
        name: str | None = None,
    ) -> Value: ...
    def reshard(
        self,
        x: Value,
        /,
        *,
        to: str = "",
        name: str | None = None,
    ) -> Value: ...
    def rms_norm(
        self,
        x: Value,
        scale: Value,
        /,
        *,
        axis: str,
        eps: float = 1e-06,
        name: str | None = None,
    ) -> Value: ...
    def rope(
        self,
        positions: Value,
        /,
        *,
        axis: str,
        size: int,
        theta: float = 10000.0,
        scaling: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default",
        factor: float = 1.0,
        original_context: int = 0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        truncate: bool = True,
        attention_factor: float = 1.0,
        short_factors: tuple[float, ...] = (),
        long_factors: tuple[float, ...] = (),
        name: str | None = None,
    ) -> tuple[Value, Value]: ...
    def rotate(
        self,
        x: Value,
        cos: Value,
        sin: Value,
        /,
        *,
        axis: str,
        name: str | None = None,
    ) -> Value: ...
    def route(
        self,
        logits: Value,
        /,
        *more: Value,
        top_k: int,
        gates: Literal["renormalised", "softmax", "sigmoid-renormalised", "sigmoid", "sparsemixer", "ones"] = "renormalised",
        scale: float = 1.0,
        axis: str = "expert",
        choice: str = "choice",
        using: Literal["bias"] | tuple[Literal["bias"], ...] = (),
        precision: Literal["default", "f32"] = "f32",
        name: str | None = None,
    ) -> tuple[Value, Value]: ...
    def rsqrt(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def same_segment(
        self,
        query: Value,
        key: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def scale(
        self,
        x: Value,
        /,
        *,
        by: float,
        name: str | None = None,
    ) -> Value: ...
    def scan(
        self,
        x: Value,
        /,
        *more: Value,
        over: tuple[tuple[str, Size], ...],
        carries: int = 0,
        stacked: int = 0,
        remat: Literal["none", "block", "full", "save"] = "none",
        save: str | tuple[str, ...] = (),
        body: Graph,
        name: str | None = None,
    ) -> tuple[Value, ...]: ...
    def select(
        self,
        condition: Value,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def shard(
        self,
        x: Value,
        /,
        *,
        axis: str,
        mesh: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def sigmoid(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def signed_buckets(
        self,
        query: Value,
        key: Value,
        /,
        *,
        buckets: int,
        max_distance: int = 0,
        name: str | None = None,
    ) -> Value: ...
    def silu(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def slice(
        self,
        x: Value,
        /,
        *,
        axis: str,
        start: int,
        stop: int,
        name: str | None = None,
    ) -> Value: ...
    def softmax(
        self,
        x: Value,
        /,
        *,
        axis: str,
        name: str | None = None,
    ) -> Value: ...
    def split(
        self,
        x: Value,
        /,
        *,
        axis: str,
        into: tuple[tuple[str, Size], ...],
        name: str | None = None,
    ) -> Value: ...
    def square(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def stack(
        self,
        x: Value,
        /,
        *more: Value,
        axis: str,
        name: str | None = None,
    ) -> Value: ...
    def stop_gradient(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def sub(
        self,
        a: Value,
        b: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def sum(
        self,
        x: Value,
        /,
        *,
        axes: str | tuple[str, ...],
        name: str | None = None,
    ) -> Value: ...
    def tanh(
        self,
        x: Value,
        /,
        *,
        name: str | None = None,
    ) -> Value: ...
    def update_slice(
        self,
        x: Value,
        update: Value,
        start: Value,
        /,
        *,
        axis: str,
        name: str | None = None,
    ) -> Value: ...
    def weight_rows(
        self,
        rows: Value,
        row_gates: Value,
        /,
        *,
        precision: Literal["default", "f32"] = "f32",
        name: str | None = None,
    ) -> Value: ...
    def within_buffer(
        self,
        experts: Value,
        slots: Value,
        counts: Value,
        /,
        *,
        tokens: str | tuple[str, ...],
        parts: int,
        blocks: int = 1,
        factor: float,
        name: str | None = None,
    ) -> Value: ...
