"""``moecc capture``: statistics of the values of a model over texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from moecc.errors import ALIASES, InputError, UsageError
from moecc.formats.output import check_output, output_folder
from moecc.ir.conventions import VALUES
from moecc.ir.graph import Graph
from moecc.jobs.command import (
    Amount,
    BatchSize,
    Force,
    Load,
    PipelineText,
    Report,
    SequenceLength,
    Spelling,
    is_conversion_file,
)
from moecc.jobs.conversion_file import read_conversion_file
from moecc.jobs.evaluate import EvaluationSpec, Tracing, count_experts, is_token, traced
from moecc.model.initialise import BlockSums, CaptureFacts, ExpertSums, fingerprint, write_capture
from moecc.model.open import OpenedModel, load_files, open_model
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.support.console import Bar
from moecc.support.lazy import np
from moecc.support.process import signals_raised
from moecc.support.text import amount
from moecc.train.rows import facts_of
from moecc.train.tokens.encoders import BYTES, BYTES_DIGEST
from moecc.train.tokens.folder import FACTS as TOKEN_FACTS
from moecc.train.tokens.folder import TokenFolder, open_tokens
from moecc.train.tokens.make import Making, make_tokens
from moecc.types import Array, Arrays

# Take statistics of the values of a model over texts: `moecc capture`.

Progress = Callable[[int, int], None]


@dataclass
class _Layer:
    """The sums of one location."""

    block: BlockSums | None = None
    experts: ExpertSums | None = None

    def statistics(self) -> dict[str, Array]:
        parts = (self.block, self.experts)
        return {k: v for part in parts if part is not None for k, v in part.statistics().items()}


@dataclass
class _Sums:
    """The sums of all locations."""

    graph: Graph
    texts: int
    active: float
    layers: dict[str, _Layer] = field(default_factory=dict)

    def add(self, text: int, outputs: Arrays, batch: Arrays) -> int:
        """Add the outputs of a batch; return the number of its tokens."""
        by_location: dict[str, dict[str, Array]] = {}
        count = 0
        for name, array in outputs.items():
            match = re.fullmatch(
                rf"{re.escape(VALUES)}(.*)\.(input|hidden|experts|gates|result\.\d+)", name
            )
            assert match is not None, "the pass names its outputs so"
            loc, quantity = match[1], match[2]
            is_real = is_token(self.graph.outputs[name], batch)[1]
            count = max(count, int(is_real.sum()))
            by_location.setdefault(loc, {})[quantity] = array.reshape(-1, array.shape[-1])[is_real]
        for loc, values in by_location.items():
            layer = self.layers.setdefault(loc, _Layer())
            if "hidden" in values:
                x, hidden = values["input"], values["hidden"]
                if layer.block is None:
                    layer.block = BlockSums(self.texts, x.shape[1], hidden.shape[1], self.active)
                layer.block.add(text, x, hidden)
            if "experts" in values:
                chosen, gates = values["experts"], values["gates"]
                results = [values[f"result.{c}"] for c in range(chosen.shape[1])]
                if layer.experts is None:
                    number = count_experts(self.graph.outputs[f"{VALUES}{loc}.experts"])
                    layer.experts = ExpertSums(number, results[0].shape[1])
                for choice, result in enumerate(results):
                    layer.experts.add(chosen[:, choice], gates[:, choice], result)
        return count


def parse_texts(words: Sequence[str]) -> dict[str, str]:
    """Return the paths of texts by name. Raises UsageError: two have one name."""
    paths: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        named = (name, path) if equals else (Path(word).stem, word)
        if named[0] in paths:
            raise UsageError("two texts have the same name", where="--text", found=word,
                             hint="NAME=FILE gives one a name")  # fmt: skip
        paths[named[0]] = named[1]
    return paths


def prompt_files(prompts: Mapping[str, Sequence[str]], folder: str) -> dict[str, str]:
    """Write prompts to `folder`, each a document; return the paths of their files by name."""
    paths = {name: f"{folder}/{name}.jsonl" for name in prompts}
    for name, path in paths.items():
        lines = [json.dumps({"text": prompt}) + "\n" for prompt in prompts[name]]
        Path(path).write_text("".join(lines), "utf-8")
    return paths


def _tokens(model: OpenedModel, name: str, path: str, stack: ExitStack) -> TokenFolder:
    """Return the token folder of a text, which is made if the text is none."""
    if (Path(path) / TOKEN_FACTS).is_file():
        return open_tokens(path)
    folder = Path(stack.enter_context(TemporaryDirectory()), "tokens")
    tokenizer = _tokenizer(model)
    ALIASES[str(folder)] = f"text {name!r}" + ", as bytes" * (tokenizer == BYTES)
    stack.callback(ALIASES.pop, str(folder))
    make_tokens(Making((path,), tokenizer), folder)
    return open_tokens(str(folder))


def _tokenizer(model: OpenedModel) -> str:
    """Return the tokenizer of a model, as `open_encoder` takes it; bytes where it has none."""
    if model.checkpoint is None or facts_of(model).tokenizer_digest in (None, BYTES_DIGEST):
        return BYTES
    tokenizer = model.tokenizer
    return str(tokenizer if isinstance(tokenizer, Path) else model.checkpoint.path)


def _traced(model: OpenedModel, pipeline: str, at: str) -> Graph:
    run_pipeline(model.graph, Pipeline.parse(pipeline), context=Context())
    graph = traced(model.graph, f"trace-values{{at={at}}}")
    if graph is None:
        raise InputError(
            "no feed-forward block or layer of experts is there", where="--at", found=at,
            hint="the locations are those of moecc import: layers.3.ffn, encoder.layers.*",
        )  # fmt: skip
    return graph


def _run(
    model: OpenedModel,
    graph: Graph,
    folders: Sequence[TokenFolder],
    seen: EvaluationSpec,
    active: float,
    progress: Progress | None,
) -> tuple[_Sums, int]:
    sums = _Sums(graph, len(folders), active)
    tokens = 0
    for number, folder in enumerate(folders):
        tracing = Tracing.of(model, graph, folder, seen)
        for outputs, batch, bare in tracing.run(model, lambda name: name.startswith(VALUES)):
            sums.graph = bare
            tokens += sums.add(number, outputs, batch)
        if progress is not None:
            progress(number + 1, len(folders))
    return sums, tokens


def _statistics(sums: _Sums) -> Iterator[tuple[str, Array]]:
    for loc, layer in sums.layers.items():
        for name, array in layer.statistics().items():
            yield f"{loc}.{name}", np.ascontiguousarray(array)


def capture(
    source: Annotated[str, Spelling(complete="models")],
    *,
    out: Annotated[str, Spelling("DIR")],
    text: Annotated[Sequence[str], Spelling("[NAME=]PATH")] = (),
    at: Annotated[str, Spelling("GLOB")] = "*",
    pipeline: PipelineText = "",
    sequence: SequenceLength = 512,
    batch: BatchSize = 2,
    batches: Amount = 64,
    active: Annotated[float, Spelling("SHARE")] = 0.1,
    load: Load = (),
    force: Force = False,
) -> Report:
    """Take statistics of a model's values over texts.

    They are of its feed-forward blocks and experts. Methods read them: convert --capture DIR with
    upcycle{split=activation}, upcycle{router-init=ridge}, prune{by=saliency} or merge{by=result}.

    Args:
      source: Model with weights; or the .yaml of mergekit-moe, whose prompts are texts.
      text: File of text, or token folder; may be repeated, each a text of its own.
      out: Folder to write.
      at: Pattern of the locations to capture, for example layers.3.*.
      batches: Maximal number of batches of a text.
      active: Share of a token's neurons that count as active.

    Example:
      moecc capture SmolLM2-135M --text README.md --out captured
    """
    load_files(load)
    if not 0 < active < 1:
        raise UsageError("not a share of neurons", where="--active", expected="above 0, below 1",
                         found=f"{active:g}")  # fmt: skip
    named, prompts = parse_texts(text), dict[str, tuple[str, ...]]()
    if is_conversion_file(source):
        stated = read_conversion_file(source)
        source, prompts = stated.source, dict(stated.prompts)
    if not named and not prompts:
        raise UsageError("there is no text", where="--text", expected="a file or a token folder")
    inputs = [Path(path) for path in named.values()]
    check_output(Path(out), inputs=inputs, force=force)
    with signals_raised(), Bar("capturing", unit_bytes=False) as bar, \
            open_model(source) as model, ExitStack() as stack:  # fmt: skip
        weights = model.weights
        if prompts:
            named = prompt_files(prompts, stack.enter_context(TemporaryDirectory())) | named
        folders = {n: _tokens(model, n, path, stack) for n, path in named.items()}
        graph = _traced(model, pipeline, at)
        seen = EvaluationSpec(sequence, batch, batches)
        sums, tokens = _run(model, graph, list(folders.values()), seen, active, bar)
        facts = CaptureFacts(
            model=fingerprint(weights),
            texts={n: f.facts.digest for n, f in folders.items()},
            tokens=tokens,
            sequence=sequence,
            active=active,
        )
        with output_folder(Path(out), inputs=inputs, force=force) as folder:
            facts = write_capture(folder, facts, dict(_statistics(sums)))
    summary = f"{out}: statistics of {amount(facts.tokens, 'token')} of {', '.join(facts.texts)}"
    return Report("capture", {"folder": out, **asdict(facts)}, lambda: summary)
