"""Small graphs of attention in all its forms, written as the operations that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from moecc.ir import F32, I32, PRED, Builder, Graph, Value, tensor


@dataclass(frozen=True)
class Form:
    """What an attention has: grouped heads, scale, soft cap, bias, masks, sinks."""

    groups: int = 2
    seq: int = 11
    kv_seq: int = 11
    scale: float | None = 0.5
    cap: float = 0.0
    bias: str = ""
    causal: bool = False
    window: int = 0
    keep: str = ""
    segments: bool = False
    sinks: bool = False
    batch: bool = True

    def graph(self) -> Graph:
        """Return the graph of the attention, in parts."""
        g = Graph()
        b = Builder(g, loc="layers.0.attention")
        batch = {"batch": "B"} if self.batch else {}
        heads, group = {"kv_head": 2}, {"query_group": self.groups} if self.groups else {}
        seq, kv = {"seq": self.seq}, {"kv_seq": self.kv_seq}
        q = g.input("q", tensor(F32, **batch, **seq, **heads, **group, head_dim=4))
        k = g.input("k", tensor(F32, **batch, **kv, **heads, head_dim=4))
        v = g.input("v", tensor(F32, **batch, **kv, **heads, head_dim=6))
        sizes = {**batch, **seq, **heads, **group, **kv}
        scores = b.contract(q, k, over="head_dim", name="scores")
        scores = self._shaped(b, scores)
        if self.bias:
            bias = g.input("bias", tensor(F32, **{n: sizes[n] for n in self.bias.split()}))
            scores = b.add(scores, bias)
        for keep in self._masks(b, sizes):
            scores = b.mask(scores, keep)
        weights = b.softmax(scores, axis="kv_seq", name="weights")
        if self.sinks:
            sinks = g.input("sinks", tensor(F32, **heads, **group))
            seen = b.logsumexp(scores, axes="kv_seq")
            weights = b.mul(weights, b.sigmoid(b.sub(seen, sinks)))
        g.set_output("y", b.contract(weights, v, over="kv_seq", name="mixed"))
        return g

    def _shaped(self, b: Builder, scores: Value) -> Value:
        if self.scale is not None:
            scores = b.scale(scores, by=self.scale / (self.cap or 1))
        return b.scale(b.tanh(scores), by=self.cap) if self.cap else scores

    def _masks(self, b: Builder, sizes: dict[str, int | str]) -> list[Value]:
        g, masks = b.graph, []
        seq, kv = {"seq": self.seq}, {"kv_seq": self.kv_seq}
        if self.causal:
            query = b.positions(g.inputs["q"], axis="seq")
            key = b.positions(g.inputs["k"], axis="kv_seq")
            masks.append(b.causal(query, key, window=self.window))
        if self.keep:
            masks.append(g.input("keep", tensor(PRED, **{n: sizes[n] for n in self.keep.split()})))
        if self.segments:
            ids = g.input("ids", tensor(I32, batch="B", **seq))
            masks.append(b.same_segment(ids, g.input("key_ids", tensor(I32, batch="B", **kv))))
        return masks


FORMS: dict[str, Form] = {
    "plain": Form(),
    "no scale, one group": Form(groups=0, scale=None),
    "no batch": Form(batch=False),
    "causal": Form(causal=True),
    "window": Form(causal=True, window=3),
    "soft cap": Form(cap=2.0, causal=True),
    "soft cap alone": Form(cap=1.5, scale=None),
    "bias of a head": Form(bias="seq kv_seq kv_head query_group"),
    "bias of keys": Form(bias="batch kv_seq", causal=True),
    "bias of everything": Form(bias="batch seq kv_head query_group kv_seq", causal=True),
    "bias of groups": Form(bias="query_group"),
    "padding": Form(keep="batch kv_seq"),
    "a mask of one's own": Form(keep="seq kv_seq", causal=True),
    "segments": Form(segments=True, causal=True),
    "sinks": Form(sinks=True, causal=True, window=4),
    "all": Form(
        cap=2.0, bias="seq kv_seq kv_head", causal=True, window=5, keep="batch kv_seq",
        segments=True, sinks=True,
    ),
    "cross": Form(seq=5, kv_seq=13, keep="batch kv_seq"),
    "longer than its keys": Form(seq=13, kv_seq=5, causal=True, window=2),
    "one query": Form(seq=1, kv_seq=9, keep="batch kv_seq"),
}  # fmt: skip
"""By name; heads are grouped unless it says otherwise, and queries and keys of other widths than
values."""
