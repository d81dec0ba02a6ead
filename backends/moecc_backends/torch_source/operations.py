"""The text of the operations of a transformer: positions, attention, routing, rows, noise.

With those on tensors they are one table, OPERATIONS.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from moecc_backends.torch_source.program import KWARGS, ROW, Item, ProgramValue
from moecc_backends.torch_source.tensors import (
    HEADS,
    OPERATIONS,
    device_like,
    emission,
    refuse,
    route_of,
    with_last,
)
from moecc_backends.torch_source.text import COMPARISON, PRODUCT, PythonExpr, literal, shown
from moecc_backends.torch_source.writer import BlockWriter

__all__ = ["OPERATIONS"]

# Positions and attention.

ROPE_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_context"),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("original_context", "short_factors", "long_factors"),
}


@emission("rope")
def _rope(
    w: BlockWriter,
    item: Item,
    *,
    axis: str,
    size: int,
    theta: float,
    scaling: str,
    factor: float,
    original_context: int,
    low_freq_factor: float,
    high_freq_factor: float,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    attention_factor: float,
    short_factors: tuple[float, ...],
    long_factors: tuple[float, ...],
) -> None:
    options = {
        "factor": factor,
        "original_context": original_context,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": truncate,
        "short_factors": short_factors,
        "long_factors": long_factors,
    }
    positions = w.expr(item.operands[0])
    name = "rotary_tables" if scaling == "default" else f"{scaling}_rotary_tables"
    texts = [f"{n}={literal(options[n])}" for n in ROPE_OPTIONS[scaling]]
    if attention_factor != 1:
        texts.append(f"attention_factor={literal(attention_factor)}")
    like = device_like(w)
    arguments = ", ".join([positions.text, like, str(size), literal(theta), *texts])
    names = []
    for var in item.results:
        names.append(w.name(var.name.rstrip("0123456789")))
        w.values[var] = PythonExpr(names[-1], (*positions.axes, axis))
    w.helper(name)
    w.state(f"{', '.join(names)} = {name}({arguments})")


@emission("rotate")
def _rotate(w: BlockWriter, item: Item, *, axis: str) -> PythonExpr:
    x, cos, sin = (w.expr(v) for v in item.operands)
    x = with_last(w, x, axis)
    if len(x.text) > 24:
        x = w.assign(item.operands[0], x)
    cos, sin = (w.aligned(e, x.axes) for e in (cos, sin))
    w.helper("rotate")
    return PythonExpr(f"rotate({x.text}, {cos.text}, {sin.text})", x.axes)


@emission("relative_buckets")
def _relative_buckets(
    w: BlockWriter, item: Item, *, bidirectional: bool, buckets: int, max_distance: int
) -> PythonExpr:
    queries, keys = (w.expr(v) for v in item.operands)
    if queries.axes[:-1] != keys.axes[:-1]:
        raise refuse(item, "axes", ", ".join(keys.axes))
    w.helper("relative_buckets")
    options = f"{buckets}, {max_distance}, bidirectional={bidirectional}"
    text = f"relative_buckets({queries.text}, {keys.text}, {options})"
    return PythonExpr(text, (*queries.axes, keys.axes[-1]))


@emission("signed_buckets")
def _signed_buckets(w: BlockWriter, item: Item, *, buckets: int, max_distance: int) -> PythonExpr:
    queries, keys, axes = _crossed(w, item)
    w.helper("signed_buckets")
    text = f"signed_buckets({queries} - {keys}, {w.literal(buckets, 'buckets')}, {max_distance})"
    return PythonExpr(text, axes)


@emission("alibi")
def _alibi(w: BlockWriter, item: Item, *, axis: str, size: int) -> PythonExpr:
    queries, keys, axes = _crossed(w, item)
    w.helper("alibi")
    text = f"alibi({keys} - {queries}, {w.literal(size, axis)}, {device_like(w)})"
    return PythonExpr(text, (*axes, axis))


@emission("delta_rule")
def _delta_rule(w: BlockWriter, item: Item, *, over: str, along: str) -> PythonExpr:
    query, *written = (w.expanded(w.expr(v)) for v in item.operands)
    (seq, *more) = (a for a in query.axes if a not in (over, *item.operands[2].axes))
    if len(item.operands) != 5 or more or len(item.result.axes) < 2:
        raise refuse(item, "along", along)
    others = [a for a in item.result.axes if a != seq]
    axes = (others[0], seq, *others[1:], over)
    texts = [w.aligned(query, axes).text]
    for x in written:
        keys = PythonExpr(x.text, tuple(seq if a == along else a for a in x.axes))
        texts.append(w.aligned(keys, axes).text)
    w.helper("delta_rule")
    return PythonExpr(f"delta_rule({', '.join(texts)})", axes[:-1])


@emission("causal")
def _causal(w: BlockWriter, item: Item, *, window: int) -> PythonExpr:
    queries, keys, axes = _crossed(w, item)
    if not window:
        return PythonExpr(f"{queries} >= {keys}", axes, COMPARISON)
    width = w.literal(window, "window")
    text = f"({queries} >= {keys}) & ({queries} - {keys} < {width})"
    return PythonExpr(text, axes, COMPARISON)


def _crossed(w: BlockWriter, item: Item) -> tuple[str, str, tuple[str, ...]]:
    """Return the numbers of queries and of keys, and the axes of every pair of them."""
    queries, keys = (w.expr(v) for v in item.operands)
    axes = (*queries.axes, *(a for a in keys.axes if a not in queries.axes))
    trailing = len(axes) - len(queries.axes)
    first = f"{queries.atom}[{', '.join(['...'] + ['None'] * trailing)}]"
    return first, w.aligned(keys, axes).atom, axes


@emission("same_segment")
def _same_segment(w: BlockWriter, item: Item) -> PythonExpr:
    raise refuse(item, "segments", "packed")


@emission("attention")
def _attention(
    w: BlockWriter,
    item: Item,
    *,
    over: str,
    along: str,
    scale: float,
    cap: float,
    causal: tuple[str, ...],
    window: int,
    given: tuple[str, ...],
    is_shared: bool = False,
) -> PythonExpr:
    return _attend(w, item, over, along, scale, cap, causal, window, given, is_shared=is_shared)


@emission("cached_attention")
def _cached_attention(w: BlockWriter, item: Item, **attrs: Any) -> PythonExpr:
    return _attend(w, item, **attrs)


@emission("none")
def _none(w: BlockWriter, item: Item) -> PythonExpr:
    return PythonExpr("None")


@emission("module")
def _module(w: BlockWriter, item: Item, *, module: str) -> PythonExpr:
    return PythonExpr(w.tree.access(module))


@emission("scores_mask")
def _scores_mask(
    w: BlockWriter, item: Item, *, given: tuple[str, ...], causal: bool, axes: tuple[str, ...]
) -> PythonExpr:
    parts = dict(zip(given, item.operands, strict=True))
    return PythonExpr(_mask_text(w, parts, axes, causal=causal))


def _mask_text(
    w: BlockWriter, parts: dict[str, ProgramValue], axes: tuple[str, ...], *, causal: bool
) -> str:
    """Return masks and biases of the scores as one expression."""
    batch, heads, seq, along = axes
    names = batch, heads.split("+"), seq, along
    mask = "None"
    if "mask" in parts:
        mask = w.expr(parts["mask"]).text
    if "keep" in parts:
        keep = _scores_axes(w, w.expr(parts["keep"]), *names)
        mask = keep if mask == "None" else f"{w.helper('narrowed')}({mask}, {keep})"
    if "bias" in parts:
        w.helper("biased")
        bias = _scores_axes(w, w.expr(parts["bias"]), *names)
        return f"biased({bias}, {mask}{'' if causal else ', is_causal=False'})"
    return mask


def _attend(
    w: BlockWriter,
    item: Item,
    over: str,
    along: str,
    scale: float,
    cap: float,
    causal: tuple[str, ...],
    window: int,
    given: tuple[str, ...],
    layer_idx: int | None = 0,
    *,
    is_shared: bool = False,
    is_complete: bool = False,
    can_be_causal: bool = False,
) -> PythonExpr:
    del window  # it is part of the mask
    query, key, value = (w.expr(v) for v in item.operands[:3])
    further = dict(zip(given, item.operands[3:], strict=True))
    (seq,) = causal or (_query_axis(w, item, over, along),)
    batch = [a for a in item.operands[0].axes if a in item.operands[1].axes][:1]
    if not batch or item.operands[1].axes[0] != batch[0]:
        raise refuse(item, "axes", query.axes)
    query, heads = _heads_first(w, query, batch[0], seq, over)
    key, kv_heads = _heads_first(w, key, batch[0], along, over)
    inner = [a for a in value.axes if a not in (batch[0], along) and a not in kv_heads]
    if len(inner) != 1:
        value = w.expanded(value)
        inner = [a for a in value.axes if a not in (batch[0], along) and a not in kv_heads]
    value, _ = _heads_first(w, value, batch[0], along, inner[0])
    names = [w.name("query"), "key", "value"]
    w.state(f"{names[0]} = {query.text}  # [{', '.join(shown(query.axes))}]")
    w.state(f"key = {key.text}")
    w.state(f"value = {value.text}")
    if "cache" in further:
        cache = w.expr(further["cache"]).text
        number = w.literal(layer_idx, "layer_idx")
        w.state(f"if {cache} is not None:")
        w.helper("extend_cache")
        w.state(f"    key, value = extend_cache({cache}, key, value, {number})")
    arguments = [*names]
    options = [f"scaling={w.literal(scale, 'scaling')}"]
    score_axes = batch[0], "+".join(heads), seq, along
    mask = _mask_text(w, further, score_axes, causal=bool(causal))
    if "bias" in further:
        w.state(f"{(name := w.name('mask'))} = {mask}")
        mask = name
    if mask != "None":
        arguments.append(mask)
    is_causal = bool(causal) and not is_shared and "bias" not in further
    if is_complete:
        # transformers 4 takes it of a single query, too, which then would see the first key alone.
        several = f" and {names[0]}.shape[2] > 1" if can_be_causal else ""
        options.append(f"is_causal={w.literal(is_causal, 'is_causal')}{several}")
    elif not is_causal:
        options.append("is_causal=False")
    function = "attend_by_scores" if cap or "sinks" in further else "attend"
    if cap:
        options.append(f"softcap={w.literal(cap, 'softcap')}")
    if "sinks" in further:
        options.append(f"sinks={w.expr(further['sinks']).atom}.flatten()")
    if is_complete and KWARGS not in further and w.block.layer is None:
        w.signature.append(f"**{KWARGS}")
        options.append(f"**{KWARGS}")
    if KWARGS in further:
        options.append(f"**{KWARGS}")
    if unknown := set(further) - {"mask", "keep", "bias", "sinks", "cache", KWARGS}:
        raise refuse(item, "given", ", ".join(unknown))
    groups = _count(w, heads) // max(_count(w, kv_heads), 1)
    line = f"self.num_key_value_groups = {w.literal(groups, 'groups')}"
    if not any(text.startswith("self.num_key_value_groups") for text in w.constructor):
        w.constructor += ["self.config = config", line]
    call = f"(self, {', '.join([*arguments, *options])})"
    if function == "attend" and "cache" in further and "is_causal" not in call:
        return _attend_by_kernel(w, names[0], call, (batch[0], seq, "+".join([*heads, inner[0]])))
    axes = (batch[0], seq, "+".join(heads), inner[0])
    return PythonExpr(f"{w.helper(function)}{call}", axes)


def _attend_by_kernel(w: BlockWriter, query: str, call: str, axes: tuple[str, ...]) -> PythonExpr:
    """Write the look-up and the one call that vLLM seeks in the source of a module."""
    function, output = w.name("attention"), w.name("output")
    name = f"{w.helper('kernel_name')}(self.config)"
    w.state(f"{function} = ALL_ATTENTION_FUNCTIONS[{name}]")
    w.state(f"{output} = {function}{call}[0]")
    # vLLM returns heads side by side, ``[seq, head * head_dim]``.
    return PythonExpr(f"{output}.reshape({query}.shape[0], {query}.shape[2], -1)", axes)


def _query_axis(w: BlockWriter, item: Item, over: str, along: str) -> str:
    """Return the axis of queries that keys do not share."""
    query, key = item.operands[0], item.operands[1]
    (axis,) = (a for a in query.axes if a not in key.axes and a not in (over, *HEADS, "head"))
    return axis


def _heads_first(
    w: BlockWriter, expr: PythonExpr, batch: str, seq: str, inner: str
) -> tuple[PythonExpr, list[str]]:
    """Return a value as ``[batch, head, seq, inner]``, and the names of its axes of heads."""
    heads = [a for a in expr.axes if a not in (batch, seq, inner)]
    expr = w.permuted(expr, [batch, seq, *heads, inner])
    if len(heads) > 1:
        merged = "+".join(heads)
        expr = PythonExpr(f"{expr.atom}.flatten(2, {1 + len(heads)})", (batch, seq, merged, inner))
    if not heads:
        return PythonExpr(f"{expr.atom}[:, None]", (batch, "head", seq, inner)), []
    joined = expr.axes[2]
    moved = PythonExpr(f"{expr.atom}.transpose(1, 2)", (batch, joined, seq, inner))
    return moved, joined.split("+")


def _scores_axes(
    w: BlockWriter, expr: PythonExpr, batch: str, heads: list[str], seq: str, along: str
) -> str:
    """Return a mask or bias so that it broadcasts against ``[batch, head, query, key]``."""
    names = [batch, *heads, seq, along]
    expr = w.permuted(expr, [a for a in names if a in expr.axes])
    index = [":" if a in expr.axes else "None" for a in names]
    while index and index[-1] == ":":
        index.pop()
    text = f"{expr.atom}[{', '.join(index)}]" if "None" in index else expr.text
    if len(heads) > 1:
        text = f"{expr.atom}[{', '.join(index)}]"
        missing = [a for a in heads if a not in expr.axes]
        if missing and len(missing) < len(heads):
            sizes = (w.literal(w.sizes[a], a) if a in missing else "-1" for a in names)
            text = f"{text}.expand({', '.join(map(str, sizes))})"
        text = f"{text}.flatten(1, {len(heads)})"
    return text


def _count(w: BlockWriter, axes: Sequence[str]) -> int:
    count = 1
    for axis in axes:
        count *= w.sizes.get(axis, 1)
    return count


@emission("causal_mask")
def _causal_mask(w: BlockWriter, item: Item, *, window: int) -> PythonExpr:
    hidden, positions = (w.expr(v).text for v in item.operands)
    padding = "attention_mask" if item.loc == "masks" else "decoder_attention_mask"
    arguments = ["self.config", hidden, padding, positions, "cache"]
    name = w.helper("windowed_mask" if window else "causal_mask")
    if window:
        arguments.insert(0, w.literal(window, "window"))
    return PythonExpr(f"{name}({', '.join(arguments)})")


# Routing.

GATES = {
    "renormalised": "{chosen}.softmax(-1)",
    "softmax": "{scores}.softmax(-1).gather(-1, {index})",
    "sigmoid": "{chosen}.sigmoid()",
}


@emission("route")
def _route(
    w: BlockWriter,
    item: Item,
    *,
    top_k: int,
    gates: str,
    scale: float,
    axis: str,
    choice: str,
    using: tuple[str, ...],
    precision: str,
) -> None:
    del precision  # the logits have been widened where they were computed
    scores = with_last(w, w.expr(item.operands[0]), axis)
    if not scores.text.isidentifier():
        scores = w.assign(item.operands[0], scores, "router_logits")
    w.helper("top_k_experts")
    k = w.literal(top_k, "top_k")
    ranked = scores.text
    if using:
        score = "softmax(-1)" if _score(gates) == "softmax" else "sigmoid()"
        ranked = f"{scores.text}.{score} + {with_last(w, w.expr(item.operands[1]), axis).text}"
    experts, weights = item.results
    is_dropped = any(user.op == "top_k_index" and user.attrs["drops"] for user in experts.users)
    index = w.name("choices" if is_dropped else "top_k_index")
    w.values[experts] = PythonExpr(index, (*scores.axes[:-1], choice))
    w.state(f"{index} = top_k_experts({ranked}, {k})  # best first")
    chosen = f"{scores.text}.gather(-1, {index})"
    name = w.name("top_k_weights")
    if gates in GATES:
        text = GATES[gates].format(chosen=chosen, scores=scores.text, index=index)
    elif gates == "sigmoid-renormalised":
        w.state(f"{name} = {chosen}.sigmoid()")
        text = f"{name} / {name}.sum(-1, keepdim=True)"
    elif gates == "sparsemixer":
        w.helper("sparsemixer_weights")
        text = f"sparsemixer_weights({scores.text}, {index})"
    elif gates == "ones":
        text = f"torch.ones_like({chosen})"
    else:
        raise refuse(item, "gates", gates)
    if scale != 1:
        text = f"{text} * {w.literal(scale, 'gate_scale')}"
    w.values[weights] = PythonExpr(name, (*scores.axes[:-1], choice))
    if w.remaining[weights]:
        w.state(f"{name} = {text}")


def _score(gates: str) -> str:
    return "sigmoid" if gates.startswith("sigmoid") else "softmax"


@emission("hash_experts")
def _hash_experts(
    w: BlockWriter, item: Item, *, experts: int, top_k: int, seed: int, hash: str, choice: str
) -> PythonExpr:
    ids = w.expr(item.operands[0])
    w.helper("hash_experts")
    count, k = w.literal(experts, "experts"), w.literal(top_k, "top_k")
    further = f", seed={w.literal(seed, 'seed')}" if hash == "murmur" else ", modulo=True"
    return PythonExpr(f"hash_experts({ids.text}, {count}, {k}{further})", (*ids.axes, choice))


@emission("keep_choices")
def _keep_choices(
    w: BlockWriter, item: Item, *, policy: str, threshold: float, choice: str
) -> PythonExpr:
    gates = with_last(w, w.expr(item.operands[0]), choice)
    w.helper(f"keep_{policy}")
    further = f", {w.literal(threshold, 'threshold')}" if policy in ("random", "threshold") else ""
    return PythonExpr(f"keep_{policy}({gates.text}{further})", gates.axes)


def _capacity(
    w: BlockWriter,
    capacity_factor: float,
    convention: str,
    rounding: str,
    minimum: int,
    multiple: int,
    cap: bool,
) -> list[str]:
    """Return the arguments of a bound on the rows of an expert."""
    exact = Fraction(repr(capacity_factor))
    ratio = w.literal((exact.numerator, exact.denominator), "capacity_factor")
    texts = [f"capacity_factor={ratio}"]
    if convention != "tokens":
        texts.append("per_choice=True")
    if rounding != "floor":
        texts.append(f"rounding={literal(rounding)}")
    if minimum != 4:
        texts.append(f"minimum={w.literal(minimum, 'minimum')}")
    if multiple != 1:
        texts.append(f"multiple={w.literal(multiple, 'multiple')}")
    if not cap:
        texts.append("cap=False")
    return texts


@emission("assign_slots")
def _assign_slots(
    w: BlockWriter,
    item: Item,
    *,
    tokens: tuple[str, ...],
    experts: int,
    groups: int,
    group_size: int,
    slots: str,
    capacity_factor: float,
    convention: str,
    rounding: str,
    minimum: int,
    multiple: int,
    cap: bool,
    order: str,
    using: tuple[str, ...],
    evaluation: dict[str, Any] | None = None,
    unbounded: bool = False,
) -> PythonExpr:
    if item.result not in w.block.outputs and all(x.op == "group_sum" for x in item.result.users):
        return PythonExpr("None", ())  # nothing is dropped, and sums read the groups alone
    attrs = {"slots": slots, "groups": groups, "group_size": group_size, "order": order}
    attrs |= {"capacity_factor": capacity_factor, "convention": convention, "cap": cap}
    attrs |= {"rounding": rounding, "minimum": minimum, "multiple": multiple}
    chosen = w.expr(item.operands[0])
    (choice,) = (a for a in chosen.axes if a not in tokens)
    axes = (*tokens, choice)
    chosen = w.permuted(chosen, axes)
    options = _slot_options(w, attrs)
    operands = item.operands[1:]
    for word, var in zip(using, operands, strict=False):
        names = axes if word == "keep" else tokens
        options[word] = w.permuted(w.expr(var), names).text
    if evaluation is not None:
        evaluated = _slot_options(w, evaluation)
        if "keep" in options:
            evaluated["keep"] = _evaluated_keep(w, evaluation, options["keep"])
        options |= {word: text for word, text in evaluated.items() if word not in options}
        for word, text in options.items():
            default = evaluated.get(word, SLOT_DEFAULTS.get(word, text))
            if w.filled(default) != w.filled(text):
                options[word] = f"{text} if self.training else {default}"
    is_routed = route_of(item.operands[0]) is not None
    is_simple = is_routed and options.keys() <= {"capacity_factor", "keep"}
    for word, text in options.items():
        if is_simple and " if self.training" in text:
            options[word] = w.name(word)
            w.state(f"{options[word]} = {text}")
    if unbounded and "capacity_factor" in options:
        flag = w.expr(operands[-1]).text
        text = options["capacity_factor"]
        options["capacity_factor"] = f"None if {flag} else {text}"
    name = w.helper("assign_slots" if is_simple else "assign_slots_by_rule")
    count = w.literal(experts, "experts")
    texts = [f"{word}={text}" for word, text in options.items()]
    return PythonExpr(f"{name}({', '.join([chosen.text, count, *texts])})", axes)


SLOT_DEFAULTS = {
    "capacity_factor": "None",
    "groups": "1",
    "group_size": "0",
    "order": '"choice"',
    "per_choice": "False",
    "rounding": '"floor"',
    "minimum": "4",
    "multiple": "1",
    "cap": "True",
    "keep": "None",
}
"""The options of assign_slots where an operation does not state them."""


def _slot_options(w: BlockWriter, attrs: dict[str, Any]) -> dict[str, str]:
    options = {}
    if attrs["groups"] != 1:
        options["groups"] = w.literal(attrs["groups"], "groups")
    if attrs["group_size"]:
        options["group_size"] = w.literal(attrs["group_size"], "group_size")
    if attrs["slots"] == "capacity":
        names = ("capacity_factor", "convention", "rounding", "minimum", "multiple", "cap")
        bounds = _capacity(w, *(attrs[name] for name in names))
        options |= {word: text for word, _, text in (b.partition("=") for b in bounds)}
    if attrs["order"] != "choice":
        options["order"] = '"token"'
    return options


def _evaluated_keep(w: BlockWriter, evaluation: dict[str, Any], text: str) -> str:
    """Return which choices are kept in evaluation: all, or those of a policy of its own."""
    policy, threshold = evaluation.get("keep_policy"), evaluation.get("keep_threshold")
    if policy is None:
        return "None"
    weights = text[text.index("(") + 1 :].partition(",")[0].rstrip(")")
    w.helper(f"keep_{policy}")
    further = f", {literal(threshold)}" if policy in ("random", "threshold") else ""
    return f"keep_{policy}({weights}{further})"


@emission("expert_choice")
def _expert_choice(
    w: BlockWriter,
    item: Item,
    *,
    tokens: tuple[str, ...],
    experts: int,
    groups: int,
    group_size: int,
    slots: str,
    capacity_factor: float,
    convention: str,
    rounding: str,
    minimum: int,
    multiple: int,
    cap: bool,
    using: tuple[str, ...],
    axis: str,
    choice: str,
) -> None:
    if slots != "capacity":
        raise refuse(item, "slots", slots)
    scores = w.permuted(w.expr(item.operands[0]), (*tokens, axis))
    options = _capacity(w, capacity_factor, convention, rounding, minimum, multiple, cap)
    if groups != 1:
        options.append(f"groups={w.literal(groups, 'groups')}")
    if group_size:
        options.append(f"group_size={w.literal(group_size, 'group_size')}")
    for word, var in zip(using, item.operands[1:], strict=True):
        options.append(f"{word}={w.permuted(w.expr(var), tokens).text}")
    w.helper("expert_choice")
    names = []
    for var, hint in zip(item.results, ("top_k_index", "top_k_weights", "slots"), strict=True):
        names.append(w.name(hint))
        w.values[var] = PythonExpr(names[-1], (*tokens, choice))
    count = w.literal(experts, "experts")
    arguments = ", ".join([scores.text, count, *options])
    w.state(f"{', '.join(names)} = expert_choice({arguments})")


@emission("top_k_index")
def _top_k_index(w: BlockWriter, item: Item, *, experts: int, drops: bool) -> PythonExpr:
    choices = w.expr(item.operands[0])
    if not drops:
        return choices
    slots = w.permuted(w.expr(item.operands[1]), choices.axes)
    count = w.literal(experts, "experts")
    name = w.name("top_k_index")
    w.state(f"{name} = {choices.atom}.masked_fill({slots.atom} < 0, {count})  # {count} if dropped")
    return PythonExpr(name, choices.axes)


@emission("group_sum")
def _group_sum(w: BlockWriter, item: Item) -> PythonExpr:
    x, slots = item.operands
    assign = slots.item
    assert assign is not None, "slots are assigned"
    tokens = assign.attrs["tokens"]
    assert isinstance(tokens, tuple), "names of axes"
    inner = [a for a in x.axes if a not in tokens]
    expr = w.permuted(w.expr(x), [*tokens, *inner])
    size, groups = assign.attrs["group_size"], assign.attrs["groups"]
    axes = ("group", *inner)
    flat = f"{expr.atom}.flatten(0, {len(tokens) - 1})"
    if groups == 1 and not size:
        dims = tuple(range(len(tokens)))
        return PythonExpr(f"{expr.atom}.sum({dims})[None]", axes)
    counts = w.literal(groups, "groups") + (f", {w.literal(size, 'group_size')}" if size else "")
    return PythonExpr(f"{w.helper('by_group')}({flat}, {counts}).sum(1)", axes)


# The rows of experts.


@emission("dispatch")
def _dispatch(w: BlockWriter, item: Item, *, experts: int = 0) -> PythonExpr:
    x, index = item.operands
    expr, chosen = w.expr(x), w.expr(index)
    tokens = chosen.axes[:-1]
    inner = tuple(a for a in x.axes if a not in tokens)
    expr = w.permuted(expr, [*tokens, *inner])
    _write_rows(w, chosen, experts)
    return PythonExpr(f"rows.gather({expr.text})", (ROW, *inner))


def _write_rows(w: BlockWriter, chosen: PythonExpr, experts: int) -> None:
    name, count = w.helper(w.rows_class), w.literal(experts, "experts")
    if w.block.is_local:
        if not w.experts:
            w.constructor.append("self.config = config")
        w.experts, count = count, "self.num_experts"
    line = f"rows = {name}({chosen.text}, {count})"
    if not any(text.startswith("rows = ") for text in w.lines):
        w.state(line)


@emission("dispatch_gates")
def _dispatch_gates(w: BlockWriter, item: Item, *, experts: int = 0) -> PythonExpr:
    gates, index = (w.expr(v) for v in item.operands)
    _write_rows(w, index, experts)
    return PythonExpr(f"rows.gather_weights({gates.text})", (ROW,))


@emission("weight_rows")
def _weight_rows(w: BlockWriter, item: Item, *, precision: str) -> PythonExpr:
    del precision  # of the product before rounding
    rows, gates = (w.expr(v) for v in item.operands)
    gates = w.aligned(gates, rows.axes)
    return PythonExpr(f"{rows.at(PRODUCT)} * {gates.at(PRODUCT)}", rows.axes, PRODUCT)


@emission("combine", "combine_weighted")
def _combine(w: BlockWriter, item: Item, *, experts: int = 0) -> PythonExpr:
    del experts
    rows = w.expr(item.operands[0])
    weights = "".join(f", {w.expr(v).text}" for v in item.operands[2:])
    index = w.expr(item.operands[1])
    return PythonExpr(f"rows.combine({rows.text}{weights})", (*index.axes[:-1], *rows.axes[1:]))


# Noise: in training alone.


@emission("dropout")
def _dropout(w: BlockWriter, item: Item, *, rate: float) -> PythonExpr:
    x = w.expr(item.operands[0])
    return PythonExpr(f"F.dropout({x.text}, {w.literal(rate, 'dropout')}, self.training)", x.axes)


@emission("jitter")
def _jitter(w: BlockWriter, item: Item, *, low: float, high: float) -> PythonExpr:
    x = w.expr(item.operands[0])
    w.helper("jitter")
    bounds = f"{w.literal(low, 'low')}, {w.literal(high, 'high')}"
    return PythonExpr(f"jitter({x.text}, {bounds}, self.training)", x.axes)


@emission("add_noise")
def _add_noise(w: BlockWriter, item: Item, *, std: float) -> PythonExpr:
    x = w.expr(item.operands[0])
    w.helper("add_noise")
    return PythonExpr(f"add_noise({x.text}, {w.literal(std, 'noise')}, self.training)", x.axes)
