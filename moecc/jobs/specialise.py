"""``moecc specialise``: which tokens go to which expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import log
from typing import TYPE_CHECKING, Annotated

from moecc.analysis import parameter_groups
from moecc.errors import InputError
from moecc.ir.conventions import TRACE
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.jobs.command import (
    Amount,
    BatchSize,
    Load,
    ModelName,
    PipelineText,
    Report,
    Seed,
    SequenceLength,
    Spelling,
)
from moecc.jobs.evaluate import EvaluationSpec, Tracing, count_experts, is_token, traced
from moecc.jobs.generate import load_tokenizer
from moecc.model.open import OpenedModel, load_files, open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.lazy import np
from moecc.support.untyped import JsonDict
from moecc.train.scoring import RoutedTokens
from moecc.train.tokens.folder import Special, TokenFolder, open_tokens
from moecc.types import F32, Array, TensorType
from moecc.weights.draws import Normal, derive_key

if TYPE_CHECKING:
    from moecc.tokenizer import Tokenizer


# Trace the routers of a model over a token folder, beside routers that learnt nothing.

EXPERTS = ".experts"


def specialisation(
    name: str, data: str, spec: EvaluationSpec, *, pipeline: str = "", seed: int = 0
) -> list[JsonDict]:
    """Return, for each routed layer, as JSON values, which tokens of a folder went to which expert.

    Args:
      name: the model.
      data: a token folder.
      spec: how much of it is read.
      pipeline: passes that are run first, as to give a dense model experts.
      seed: of what they draw, and of routers that learnt nothing.

    Raises:
      InputError: no layer of the model has tokens that choose experts; the folder does not suit it.
    """
    folder = open_tokens(data)
    with open_model(name) as model, _tokenizer(model) as tokenizer:
        run_pipeline(model.graph, Pipeline.parse(pipeline), context=Context(seed=seed))
        graph = traced(model.graph, "trace-routing")
        if graph is None:
            raise InputError(
                "no layer of the model has tokens that choose experts", where=name,
                hint="-p 'upcycle{experts=8}' gives it some, with routers that learnt nothing",
            )  # fmt: skip
        tracing = Tracing.of(model, graph, folder, spec)
        pairs = _trace(model, tracing)
        untrained = _trace(model, tracing, _with_drawn_routers(tracing.graph, seed))
        special = folder.facts.special
        return [
            _layer_facts(trained, drawn, special.sentinels, _names(trained, tokenizer, folder))
            for trained, drawn in zip(pairs, untrained, strict=True)
        ]


def _layer_facts(
    routed: RoutedTokens, untrained: RoutedTokens, sentinels: Iterable[int], names: dict[int, str]
) -> JsonDict:
    of_sentinels, of_others = routed.entropies(frozenset(sentinels))
    experts = [
        {
            "share": float(share),
            "tokens": [
                {"token": names.get(i, str(i)), "part": part} for i, part in routed.typical(expert)
            ],
        }
        for expert, share in enumerate(routed.shares)
    ]
    return {
        "layer": routed.layer,
        "tokens": len(routed.tokens),
        "explained": routed.explained,
        "by_chance": routed.by_chance,
        "untrained": untrained.explained,
        "sentinel_entropy": of_sentinels,
        "other_entropy": of_others,
        "even_entropy": log(routed.experts),
        "experts": experts,
    }


def _trace(model: OpenedModel, tracing: Tracing, graph: Graph | None = None) -> list[RoutedTokens]:
    """Return where the tokens of all batches went, by layer."""
    layers: dict[str, list[tuple[Array, Array]]] = {}
    for outputs, batch, bare in tracing.run(model, _is_choice, graph):
        for name, chosen in outputs.items():
            value = bare.outputs[name]
            tokens, is_real = is_token(value, batch)
            first = np.take(chosen, 0, axis=value.type.names.index("choice")).reshape(-1)
            layers.setdefault(name, []).append((tokens[is_real], first[is_real]))
    return [_routed(tracing.graph, name, parts) for name, parts in layers.items()]


def _is_choice(name: str) -> bool:
    return name.startswith(TRACE) and name.endswith(EXPERTS)


def _routed(graph: Graph, name: str, parts: list[tuple[Array, Array]]) -> RoutedTokens:
    layer = name.removeprefix(TRACE).removesuffix(EXPERTS)
    size = count_experts(graph.outputs[name])
    tokens, first = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return RoutedTokens(layer, size, tokens, first)


def _with_drawn_routers(graph: Graph, seed: int) -> Graph:
    """Return a copy of `graph` whose routers are random; the scale decides no choice."""
    drawn = clone(graph)
    for name, groups in parameter_groups(drawn).items():
        param = drawn.params[name]
        if "router" in groups and param.type.rank > 1:
            type = TensorType(F32, param.type.bare.axes)
            param.weight = Normal(type, 1.0, derive_key(seed, f"untrained {name}"))
    return drawn


@contextmanager
def _tokenizer(model: OpenedModel) -> Iterator[Tokenizer | None]:
    """Yield the tokenizer beside a model, or None without one."""
    has_one = model.tokenizer is not None
    with load_tokenizer(model) if has_one else nullcontext() as tokenizer:
        yield tokenizer


def _names(
    routed: RoutedTokens, tokenizer: Tokenizer | None, folder: TokenFolder
) -> dict[int, str]:
    """Return the ids that are shown, as the vocabulary writes them."""
    shown = {i for expert in range(routed.experts) for i, _ in routed.typical(expert)}
    if tokenizer is not None:
        return {i: str(tokenizer.token(i)).replace("\n", "↵") for i in sorted(shown)}
    return {i: _byte_name(i, folder.facts.special) for i in sorted(shown)}


def _byte_name(i: int, special: Special) -> str:
    if i < 256:
        return repr(chr(i)) if i < 128 else f"0x{i:02x}"
    return "eos" if i == special.eos else f"<{i}>"


def specialisation_text(layers: Sequence[JsonDict]) -> str:
    """Return the human-readable report."""
    lines = []
    for layer in layers:
        lines.append(
            f"{layer['layer']}: the token alone explains {layer['explained']:.0%} of the choice "
            f"(untrained routers {layer['untrained']:.0%}, by chance {layer['by_chance']:.0%})"
        )
        if layer["sentinel_entropy"] is not None:
            lines.append(
                f"  entropy over experts: sentinels {layer['sentinel_entropy']:.2f}, other tokens "
                f"{layer['other_entropy']:.2f}, even {layer['even_entropy']:.2f} nats"
            )
        lines.append("  expert  share  tokens that tell it from others, and how many went there")
        for expert, facts in enumerate(layer["experts"]):
            shown = "   ".join(f"{t['token']} {t['part']:.0%}" for t in facts["tokens"])
            lines.append(f"  {expert:6}  {facts['share']:5.0%}  {shown}")
    return "\n".join(lines)


def specialise(
    model: ModelName,
    *,
    data: Annotated[str, Spelling("DIR")],
    pipeline: PipelineText = "",
    sequence: SequenceLength = 512,
    batch: BatchSize = 8,
    batches: Amount = 8,
    seed: Seed = 0,
    load: Load = (),
) -> Report:
    """Show which tokens tell each expert from others.

    The routers are traced over a text. Beside it stands what routers explain that learnt nothing:
    they also send like tokens to like experts.

    Args:
      data: Token folder to trace the routers over.
      batches: Maximal number of batches to read.
      seed: Seed for the passes, and for routers that learnt nothing.

    Example:
      moecc specialise run@best --data tokens/heldout
    """
    load_files(load)
    spec = EvaluationSpec(sequence, batch, batches)
    layers = specialisation(model, data, spec, pipeline=pipeline, seed=seed)
    facts = {"model": model, "data": data, "layers": layers}
    return Report("specialise", facts, lambda: specialisation_text(layers))
