"""The methods of conversion as laws of a seed, against plain NumPy (``docs/exactness.md``)."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from family_configs import MemoryCheckpoint
from moecc_passes import resize as resizing
from moecc_passes.upcycle import upcycle
from safetensors.numpy import save_file

from moecc.formats import adapter
from moecc.formats.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moecc.ir.structure import clone
from moecc.model.initialise import BlockSums, ExpertSums
from moecc.rewrite.passes import Context, Statistics
from moecc.types import F64
from moecc.weights.arithmetic import STATISTICS, name_in
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source
from tests.passes.dense_blocks import Dense, relative, run, tokens
from tests.support.tiers import examples

EXACT = 1e-12
BLOCK = Dense(embed=6, mlp=8)
LOC, PREFIX = "layers.0.ffn", "layers.0"
ROUTER = "layers.0.ffn.router.weight"


# --- models and what passes make of them


def drawn(graph, seed, *prefixes):
    """Return normal tensors for the parameters of a graph, of every model named."""
    tensors = {}
    for prefix in prefixes or ("",):
        for name, param in graph.params.items():
            rng = np.random.default_rng([seed, *f"{prefix}{name}".encode()])
            tensors[f"{prefix}{name}"] = rng.normal(0, 0.6, [a.size for a in param.type])
    return tensors


def made(graph, arrays):
    """Return the parameters as their expressions make them of tensors."""

    def read(name, start=0, stop=None):
        return arrays[name][start:stop] if arrays[name].ndim else arrays[name]

    return {n: evaluate(p.weight or Source(n, p.type), read, F64) for n, p in graph.params.items()}


def output(graph, arrays, x):
    return run(graph, made(graph, arrays), {"x": x})["y"]


def after(item, graph, **context):
    assert item.validate() == []
    changed = clone(graph)
    item.apply(changed, Context(**context))
    return changed


def mixture(gates, experts=4, top_k=2):
    """Return a mixture whose experts have tensors of their own."""
    item = upcycle.UpcyclePass(experts=experts, top_k=top_k, gates=gates)
    graph = after(item, BLOCK.graph())
    for name, param in graph.params.items():
        param.weight = Source(name, param.type)
    return graph


def inputs(seed):
    return tokens(BLOCK, seed=seed)["x"]


# --- the same in NumPy


def hidden(x, gate, up):
    """Return ``[batch, seq, mlp]``."""
    inner = x @ gate.T
    return np.asarray(inner / (1 + np.exp(-inner)) * (x @ up.T))


def dense(x, arrays, prefix=""):
    gate, up, down = (arrays[f"{prefix}{PREFIX}.{n}"] for n in ("gate", "up", "down"))
    return hidden(x, gate, up) @ down.T


def results(x, arrays):
    """Return what every expert makes of every token, ``[batch, seq, expert, embed]``."""
    parts = zip(*(arrays[f"{PREFIX}.{n}"] for n in ("gate", "up", "down")), strict=True)
    return np.stack([hidden(x, g, u) @ d.T for g, u, d in parts], 2)


def weights(logits, gates, top_k):
    """Return the gate of every expert, ``[batch, seq, expert]``; 0 where it was not chosen."""
    order = np.argsort(np.argsort(-logits, axis=-1, kind="stable"), axis=-1, kind="stable")
    size = np.exp(logits) if gates == "renormalised" else 1 / (1 + np.exp(-logits))
    chosen = np.where(order < top_k, size, 0)
    return chosen / chosen.sum(-1, keepdims=True) if gates == "renormalised" else chosen


def mixed(x, arrays, gates, top_k):
    shares = weights(x @ arrays[ROUTER].T, gates, top_k)
    return np.einsum("bse,bsed->bsd", shares, results(x, arrays))


def close(actual, expected):
    assert relative(actual, expected) <= EXACT


def gates_of(seed):
    return ("renormalised", "sigmoid")[seed % 2]


# --- laws


def copies(seed, **options):
    """The dense block comes back, whatever the router (L1, L2, L6, padding)."""
    block = replace(BLOCK, mlp=(8, 7)[seed % 2] if options.get("pad") else 8)
    graph, x = block.graph(), inputs(seed)
    item = upcycle.UpcyclePass(experts=4, top_k=2, router_std=1.0, **options)
    arrays = drawn(graph, seed)
    close(output(after(item, graph, seed=seed), arrays, x), dense(x, arrays))


def shared(seed):
    copies(seed, shared=0.5)


def virtual_groups(seed):
    copies(seed, granularity=2)


def padding(seed):
    copies(2 * seed + 1, granularity=2, pad=3)


def split(seed, how="random", **context):
    """A token gets the parts that its router chooses, each neuron from one of them (L5)."""
    graph, x = BLOCK.graph(), inputs(seed)
    arrays = {**drawn(graph, seed), **context.pop("arrays", {})}
    item = upcycle.UpcyclePass(
        experts=4, top_k=2, gates="ones", router_std=1.0, split=how, **context.pop("options", {}),
    )  # fmt: skip
    split_graph = after(item, graph, seed=seed, **context)
    params = made(split_graph, arrays)
    parts = results(x, params)
    close(parts.sum(2), dense(x, arrays))
    chosen = np.argsort(-(x @ params[ROUTER].T), axis=-1, kind="stable")[..., :2]
    expected = np.take_along_axis(parts, chosen[..., None], 2).sum(2)
    close(output(split_graph, arrays, x), expected)


def index_split(seed):
    split(seed, "index")


def together(seed):
    """Return statistics in which neurons are active in pairs, in an order by the seed."""
    rng = np.random.default_rng(seed)
    sums = BlockSums(1, BLOCK.embed, BLOCK.mlp, 0.25)
    order = rng.permutation(BLOCK.mlp)
    for pair in range(4):
        size = np.zeros((40, BLOCK.mlp))
        size[:, order[2 * pair : 2 * pair + 2]] = 1 + rng.random((len(size), 2))
        sums.add(0, rng.normal(pair, 1, (len(size), BLOCK.embed)), size)
    statistics = {name_in(STATISTICS, f"{LOC}.{n}"): a for n, a in sums.statistics().items()}
    return {**statistics, "order": order}, Statistics(("text",))


def activation_split(seed):
    """Neurons that are active together are in one expert, and the split is one."""
    arrays, statistics = together(seed)
    options = {"router_init": "ridge"}
    split(seed, "activation", arrays=arrays, statistics=statistics, options=options)
    item = upcycle.UpcyclePass(experts=4, top_k=2, gates="ones", split="activation")
    graph = after(item, BLOCK.graph(), statistics=statistics)
    numbers = np.arange(8.0)[:, None] * np.ones(BLOCK.embed)
    held = made(graph, {**arrays, **drawn(BLOCK.graph(), seed), f"{PREFIX}.up": numbers})
    pairs = {frozenset(map(int, rows[:, 0])) for rows in held[f"{PREFIX}.up"]}
    assert pairs == {frozenset(map(int, p)) for p in arrays["order"].reshape(4, 2)}


def fitted_router(seed, kind="ridge"):
    """Rows are the ridge regression of the targets, or their centroids, but for a common part."""
    rng = np.random.default_rng(seed)
    sums, parts = BlockSums(2, BLOCK.embed, BLOCK.mlp, 0.25), []
    spread = rng.normal(size=(BLOCK.embed, BLOCK.embed))
    for text in range(2):
        x = rng.normal(size=(90, BLOCK.embed)) @ spread + rng.normal(size=BLOCK.embed)
        sums.add(text, x, rng.random((90, BLOCK.mlp)))
        parts.append(x)
    arrays = {name_in(STATISTICS, f"{LOC}.{n}"): a for n, a in sums.statistics().items()}
    item = upcycle.UpcyclePass(experts=2, top_k=2, router_init=kind, router_std=0.5)
    graph = after(item, BLOCK.graph(), statistics=Statistics(("a", "b")))
    rows = made(graph, {**drawn(BLOCK.graph(), seed), **arrays})[ROUTER]
    x = np.concatenate(parts)
    centred, target = x - x.mean(0), np.repeat(np.eye(2), 90, 0) - 0.5
    covariance = centred.T @ centred / len(x)
    expected = centred.T @ target / len(x)
    if kind == "ridge":
        unit = 0.01 * np.trace(covariance) / BLOCK.embed
        expected = np.linalg.solve(covariance + unit * np.eye(BLOCK.embed), expected)
    direction, mean = rows[0] - rows[1], x.mean(0)
    wanted = expected[:, 0] - expected[:, 1]
    wanted -= mean * (wanted @ mean) / (mean @ mean)
    assert direction @ wanted / np.linalg.norm(direction) / np.linalg.norm(wanted) > 0.9999


def centroids(seed):
    fitted_router(seed, "centroids")


def several_models(seed):
    """Expert e is model e's, the rest the mean of the models (L7)."""
    block = replace(BLOCK, residual=True)
    graph, x = block.graph(), inputs(seed)
    arrays = {**drawn(graph, seed), **drawn(graph, seed, name_in("a", ""))}
    item = upcycle.UpcyclePass(
        experts=4, top_k=2, sources="base,a,a,base", rest="mean", router_std=1.0
    )
    mixed_graph = after(item, graph, seed=seed, models=("a",))
    params = made(mixed_graph, arrays)
    norm = f"{PREFIX}.norm"
    scale = (arrays[norm] + arrays[name_in("a", norm)]) / 2
    rows = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    both = [dense(rows, arrays, prefix) for prefix in ("", name_in("a", ""))]
    gates = weights(rows @ params[ROUTER].T, "renormalised", 2)
    expected = x + sum(
        gates[..., e, None] * both[model] for e, model in enumerate((0, 1, 1, 0))
    )  # fmt: skip
    assert relative(output(mixed_graph, arrays, x), expected) <= 1e-5  # the norm's epsilon


def lora(seed):
    """An adapter is the model W + α/r · B A (L7)."""
    rng, rank = np.random.default_rng(seed), 1 + seed % 3
    weight, first, second = (
        rng.normal(size=size).astype("f") for size in ((5, 4), (rank, 4), (5, rank))
    )
    with TemporaryDirectory() as folder:
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6}
        (Path(folder) / ADAPTER_CONFIG).write_text(json.dumps(settings))
        pair = {"m.lora_A.weight": first, "m.lora_B.weight": second}
        save_file(pair, Path(folder) / ADAPTER_WEIGHTS)
        base = MemoryCheckpoint({}, {"m.weight": weight})
        with adapter.AdaptedCheckpoint(base, Path(folder)) as merged:
            matrix = merged.read("m.weight")
    assert relative(matrix, weight + 6 / rank * second @ first) <= 1e-6


def growth(seed):
    """m copies each, and m·k chosen (L9)."""
    kept(resizing.GrowPass(times=2 + seed % 2), seed)


def growth_by_bias(seed):
    """m copies each, and k chosen (L9)."""
    kept(resizing.GrowPass(times=2 + seed % 2, chosen="same"), seed)


def zeros(seed):
    """Experts that add nothing are not chosen; and add nothing where they are (L9)."""
    kept(resizing.ZeroExpertsPass(count=1 + seed % 3), seed)
    graph, x = mixture("sigmoid"), inputs(seed)
    arrays = drawn(graph, seed)
    added = after(resizing.ZeroExpertsPass(count=1), graph)
    params = made(added, arrays)
    bias = next(n for n in params if n.endswith("bias"))
    params[bias][-1] = 2
    expected = mixed(x, arrays, "sigmoid", 1)
    close(run(added, params, {"x": x})["y"], expected)


def kept(item, seed):
    graph, x = mixture(gates_of(seed)), inputs(seed)
    arrays = drawn(graph, seed)
    close(output(after(item, graph), arrays, x), mixed(x, arrays, gates_of(seed), 2))


def merging(seed):
    """Neighbours become their mean, their rows too (L9)."""
    graph, x = mixture("renormalised"), inputs(seed)
    arrays = drawn(graph, seed)
    means = {n: a.reshape(2, 2, *a.shape[1:]).mean(1) for n, a in arrays.items()}
    close(output(after(resizing.MergePass(), graph), arrays, x), mixed(x, means, "renormalised", 1))


def merging_by_results(seed):
    """Those whose mean results are near each other become one (L9)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(4)
    targets = np.zeros((4, BLOCK.embed))
    levels = np.array([[1], [1.1], [-1], [-1.1]])
    targets[order] = levels + rng.normal(0, 0.01, (4, BLOCK.embed))
    graph, x = mixture("renormalised"), inputs(seed)
    arrays = drawn(graph, seed)
    item = resizing.MergePass(by="result")
    reduced = after(item, graph, statistics=Statistics(("t",)), read=lambda _expr: targets)
    groups = sorted((tuple(sorted(order[:2])), tuple(sorted(order[2:]))))
    means = {n: np.stack([a[list(g)].mean(0) for g in groups]) for n, a in arrays.items()}
    close(output(reduced, arrays, x), mixed(x, means, "renormalised", 1))


def pruning(seed):
    """The most salient experts stay, with their rows (L10, REAP)."""
    graph, x = mixture("renormalised"), inputs(seed)
    arrays = drawn(graph, seed)
    gates, made_of = weights(x @ arrays[ROUTER].T, "renormalised", 2), results(x, arrays)
    sums = ExpertSums(4, BLOCK.embed)
    order = np.argsort(-gates, axis=-1)[..., :2]
    for choice in range(2):
        expert = order[..., choice].ravel()
        gate = np.take_along_axis(gates, order, -1)[..., choice].ravel()
        rows = np.take_along_axis(made_of, order[..., None], 2)[:, :, choice]
        sums.add(expert, gate, rows.reshape(-1, BLOCK.embed))
    statistics = sums.statistics()
    norms = gates * np.linalg.norm(made_of, axis=-1)
    saliency = norms.sum((0, 1)) / np.maximum((gates > 0).sum((0, 1)), 1)
    stay = np.sort(np.argsort(-saliency)[:3])

    def read(expr):
        assert isinstance(expr, Source)
        return statistics[expr.name.partition(f"{LOC}.")[2]]

    item = resizing.PrunePass(keep=3, by="saliency")
    reduced = after(item, graph, statistics=Statistics(("t",)), read=read)
    some = {name: array[stay] for name, array in arrays.items()}
    close(output(reduced, arrays, x), mixed(x, some, "renormalised", 2))


def one_dense_block(seed):
    """One expert, the mean, or the neurons of several side by side (L11)."""
    graph, x = mixture("renormalised"), inputs(seed)
    arrays = drawn(graph, seed)
    experts = {n: arrays[f"{PREFIX}.{n}"] for n in ("gate", "up", "down")}
    first, mean, both = (
        output(after(resizing.ToDensePass(how=how, experts=which), graph), arrays, x)
        for how, which in (("first", "2"), ("mean", ""), ("concat", "0,3"))
    )
    made_of = results(x, arrays)
    close(first, made_of[:, :, 2])
    gate, up, down = (a.mean(0) for a in experts.values())
    close(mean, hidden(x, gate, up) @ down.T)
    close(both, (made_of[:, :, 0] + made_of[:, :, 3]) / 2)


def dropping(seed):
    """One set of neurons is drawn again in all matrices of an expert (L8)."""
    graph = BLOCK.graph()
    arrays = drawn(graph, seed)
    item = upcycle.UpcyclePass(experts=4, top_k=2, init="drop", drop_ratio=0.5)
    params = made(after(item, graph, seed=seed), arrays)
    same = [params[f"{PREFIX}.{n}"] == arrays[f"{PREFIX}.{n}"] for n in ("gate", "up")]
    same.append((params[f"{PREFIX}.down"] == arrays[f"{PREFIX}.down"]).transpose(0, 2, 1))
    for mask in same:
        assert (mask.all(-1).sum(-1) == 4).all()
        assert (mask == same[0]).all()


LAWS = (
    shared, virtual_groups, padding, split, index_split, activation_split, fitted_router, centroids,
    several_models, lora, growth, growth_by_bias, zeros, merging, merging_by_results, pruning,
    one_dense_block, dropping,
)  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_the_law_of_a_method_holds(law):
    for seed in range(examples(4, 50)):
        law(seed)
