"""The receipt of a conversion: what was promised, what was measured, and what will load the result.

``moecc_receipt.json`` holds nothing but what decides the result and what was found of it: no path
of the output, no time, no host.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from moecc.errors import InputError, Problem
from moecc.families.config import FAMILY
from moecc.families.heads import LOGITS, hub_task
from moecc.formats.files import identify, json_content, read_bounded
from moecc.formats.folder import TOKENIZERS
from moecc.formats.gguf.storage import FILE_NAME
from moecc.formats.manifest import (
    FileRecord,
    Manifest,
    dump,
    file_digest,
    folder_records,
    library_versions,
    load,
)
from moecc.formats.modelcard import SIMILARITY, TASK, CardFacts, model_card, source_name
from moecc.formats.run import is_trained, stages_of, story
from moecc.formats.source import Checkpoint, GivenParams
from moecc.formats.writer import JOURNAL_NAME, WriteOptions, WriteReport
from moecc.ir.conventions import DECODER_TOKENS, LOSS
from moecc.ir.graph import Value
from moecc.jobs.checks import Contracts
from moecc.jobs.conversion import Plan, function_of_source, router_losses
from moecc.model.open import MODEL_TYPE, MODULE_TYPE
from moecc.prove.conversion import ConversionProof
from moecc.rewrite.passes import Preserves
from moecc.rewrite.runner import loaded_files
from moecc.support.documents import parse_json
from moecc.support.text import both, either
from moecc.support.untyped import Json, JsonDict
from moecc.translate.engines import CODE_READ, EngineVerdict, release_of
from moecc.version import __version__

if TYPE_CHECKING:
    from moecc.jobs.comparison import Verified


RECEIPT_NAME = "moecc_receipt.json"
SCHEMA = "moecc.receipt/1"
MAX_RECEIPT_BYTES = 4 << 20
_NOTES = {CODE_READ: "its code was read, it was not run"}
_TOLD = (CODE_READ, "as gguf:")
"""The beginnings of notes on engines that a list of them tells, too."""
_OUTPUTS = {"hidden": "hidden states"}
"""The words for outputs whose names are not words."""


@dataclass(frozen=True)
class Receipt:
    """The evidence for a conversion.

    Attributes:
      target: the family of the result.
      promised: the combined promise of the passes.
      contracts: the evidence that each pass keeps its promise.
      proof: the proof that the result is the function of the source, if one was tried.
      verified: what was found at the logits; None if nobody looked.
      engines: whether each engine runs the result.
      rounded: the element types and blocks that weights were rounded to.
      left_out: the tensors of the source that were not converted.
    """

    target: str
    promised: Preserves
    contracts: Contracts
    proof: ConversionProof | None
    verified: Verified | None
    engines: Sequence[EngineVerdict]
    rounded: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_json(self) -> JsonDict:
        """Return the receipt as JSON values."""
        return {
            "schema": SCHEMA,
            "versions": library_versions(),
            "target": self.target,
            "promised": asdict(self.promised),
            "rounded": list(self.rounded),
            "left_out": list(self.left_out),
            "proof": None if self.proof is None else self.proof.to_json(),
            "checked": [checked.to_json() for checked in self.contracts.passes],
            "unchecked": self.contracts.unchecked or None,
            "verified": None if self.verified is None else self.verified.to_json(),
            "engines": [verdict.to_json() for verdict in self.engines],
        }

    def content(self) -> bytes:
        """Return the content of ``moecc_receipt.json``."""
        return json_content(self.to_json())


def receipt_lines(stated: Json) -> list[str]:
    """Return a receipt in four lines: what was promised, proved and measured, and what runs it."""
    promised = object_of(stated.get("promised"))
    text, error = _kind_text(promised), promised.get("predicted_error")
    if promised.get("kind") == "reassociation":
        text += ", equal in real numbers, with sums perhaps in another order"
    if up_to := promised.get("up_to"):
        text += f", up to {up_to}"
    if error is not None:
        text += f" (predicted relative error {number_text(error, '.2g')})"
    if rounded := _rounded(stated):
        text += f", {rounded}"
    return [
        f"Promised: {text}",
        f"Proved: {_proved(stated)}",
        f"Measured: {_measured(stated)}; {_at_the_logits(stated)}",
        f"Runs in: {_engines(stated)}",
    ]


def _kind_text(promise: Json) -> str:
    reason = promise.get("reason")
    return f"{promise.get('kind')}" + (f": {reason}" if reason else "")


def _rounded(stated: Json) -> str:
    """Return which rounding of weights is no part of what is promised and proved, if any is."""
    types = stated.get("rounded")
    names = [str(name) for name in types] if isinstance(types, list) else []
    return f"but for weights that are rounded to {both(names)}" if names else ""


def _proved(stated: Json) -> str:
    verdict = object_of(stated.get("proof")).get("verdict")
    checked = objects_of(stated.get("checked"))
    if verdict == "proved":
        left_out = stated.get("left_out")
        function = function_of_source(left_out if isinstance(left_out, list) else ())
        same = f"the result is {function}, for all inputs, weights and lengths"
        return ", ".join(text for text in (same, _rounded(stated)) if text)
    proved = sum(bool(check.get("proved")) for check in checked)
    return f"{proved} of {len(checked)} passes" if proved else "nothing"


def _measured(stated: Json) -> str:
    errors = [check.get("measured_error") for check in objects_of(stated.get("checked"))]
    numbers = [e for e in errors if isinstance(e, int | float)]
    if stated.get("unchecked"):
        return f"passes not checked ({stated['unchecked']})"
    if not numbers:
        return "nothing, since each pass is proved" if errors else "no pass to check"
    count = f"each of {len(numbers)} passes" if len(numbers) > 1 else "the pass"
    largest = max(numbers)
    error = f"relative error {number_text(largest, '.2g')}" if largest else "no more than rounding"
    return f"{count} on the model at small sizes with random weights, {error}"


def _at_the_logits(stated: Json) -> str:
    comparison = object_of(stated.get("verified"))
    if not comparison:
        # A function of JAX or a module of PyTorch is not run by `convert`.
        is_program = stated.get("target") in (MODEL_TYPE, MODULE_TYPE)
        return "not at the logits" + ("" if is_program else ", which moecc convert --verify does")
    difference, layers = object_of(comparison.get("difference")), comparison.get("layers")
    part = f" of the first {layers} layers" if layers else ""
    output = str(comparison.get("output"))
    return (
        f"the {_OUTPUTS.get(output, output)}{part} in {comparison.get('compute_dtype')}, "
        f"{number_text(difference.get('max_relative'), '.2e')} of the largest"
    )


def number_text(value: object, form: str) -> str:
    """Format a number that a file states, which may be anything."""
    try:
        return format(float(value), form) if isinstance(value, int | float) else "unknown"
    except OverflowError:
        return "unknown"


def _engines(stated: Json) -> str:
    rows = objects_of(stated.get("engines"))
    runs = [
        release_of(str(e.get("engine")), str(e.get("version")))
        + (f" ({note})" if (note := str(e.get("note") or "")).startswith(_TOLD) else "")
        for e in rows
        if e.get("runs")
    ]
    others = [str(e.get("engine")) for e in rows if not e.get("runs")]
    if not rows:
        target = stated.get("target")
        if target == MODULE_TYPE:
            return "PyTorch, by the program in the folder"
        if target in (None, FAMILY, MODEL_TYPE):
            return "moecc"
        return f"what runs a dense {target}; mixtures alone were looked at"
    text = ", ".join(runs) if runs else "moecc alone"
    return f"{text}; not in {', '.join(others)}" if others else text


def objects_of(value: object) -> list[JsonDict]:
    """Return a list of objects that a file states, which may be anything."""
    return [object_of(entry) for entry in value] if isinstance(value, list) else []


def object_of(value: object) -> JsonDict:
    """Return an object that a file states, which may be anything."""
    return value if isinstance(value, dict) else {}


def load_receipt(output: Path) -> JsonDict | None:
    """Return the receipt of an output, a folder or one file; None if it has none.

    Raises:
      InputError: it is no receipt.
    """
    if not output.is_dir():
        embedded = load(output).receipt
        return None if embedded is None else dict(embedded)
    path = output / RECEIPT_NAME
    if not path.is_file():
        return None
    document = parse_json(read_bounded(path, MAX_RECEIPT_BYTES), str(path))
    if object_of(document).get("schema") != SCHEMA:
        found_schema = str(object_of(document).get("schema"))
        raise InputError(
            "not a receipt", where=path, expected=f'"schema": "{SCHEMA}"', found=found_schema
        )
    return object_of(document)


# The receipt of a conversion as a page: what was promised, what was found, what runs it.


def receipt_page(name: str, stated: Json, problems: Sequence[Problem] = ()) -> str:
    """Return the page of a receipt.

    Args:
      name: of the checkpoint.
      stated: what `load_receipt` returned.
      problems: what of the checkpoint is not as the manifest says.
    """
    from moecc.support.page import render_page

    lines = (line.replace("`", "").split(": ", 1) for line in receipt_lines(stated))
    return render_page(
        "receipt.html", f"receipt of {name}",
        facts=[("Files", _files_text(problems)), *((title, text) for title, text in lines)],
        passes=[
            (str(check.get("pass")), _kind_text(object_of(check.get("promised"))),
             "proved" if check.get("proved") else number_text(check.get("measured_error"), ".2g"))
            for check in objects_of(stated.get("checked"))
        ],
        unchecked=stated.get("unchecked") or "there is none",
        logits=_logits(object_of(stated.get("verified"))),
        engines=[
            (str(engine.get("engine")), str(engine.get("version")),
             "yes" if engine.get("runs") else "no", _reasons(engine))
            for engine in objects_of(stated.get("engines"))
        ],
        versions=object_of(stated.get("versions")).items(),
    )  # fmt: skip


def _files_text(problems: Sequence[Problem]) -> str:
    if not problems:
        return "as the manifest says"
    more = f"; {len(problems) - 1:,} more" if len(problems) > 1 else ""
    return f"NOT as the manifest says: {problems[0]}{more}"


def _logits(comparison: Json) -> list[tuple[str, str]]:
    if not comparison:
        return []
    difference = object_of(comparison.get("difference"))
    return [
        (
            "max |Δlogit| / max |logit|",
            number_text(difference.get("max_relative"), ".2e"),
        ),
        ("KL divergence, nats a token", number_text(difference.get("kl_nats"), ".2e")),
        ("top-1 agreement", number_text(difference.get("top1_agreement"), ".2%")),
        ("tolerance", number_text(comparison.get("tolerance"), ".2e")),
        ("computed in", str(comparison.get("compute_dtype"))),
    ]


def _reasons(engine: Json) -> str:
    reasons = engine.get("reasons")
    texts = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    note = engine.get("note")
    return "; ".join([*texts, *([str(note)] if note else [])])


# What is written beside converted weights: the model card and the manifest.


def conversion_facts(planned: Plan, options: WriteOptions) -> JsonDict:
    """Return what decides the bytes of a conversion, for its journal.

    Whether source and result are run and compared is not among it: nothing is kept of that.
    """
    checkpoint = planned.checkpoint
    return {
        "versions": library_versions(),
        "source": _states(checkpoint),
        "pipeline": planned.pipeline.in_full(),
        "own passes": {
            Path(file).name: file_digest(Path(file))
            for file in loaded_files(planned.pipeline, {n.op for n in planned.graph.every_node()})
        },
        "target": planned.target,
        "dtype": planned.dtype_name,
        "seed": planned.seed,
        "padding mask": "mask" in planned.graph.inputs,
        "options": [*planned.options, *options.words],
        "max shard bytes": options.max_shard_bytes,
    }


def _states(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the state of each file of a source; arrays that someone handed over have none."""
    if isinstance(checkpoint, GivenParams):
        return {"arrays": os.urandom(16).hex()}
    files = checkpoint.named_files()
    files |= {n: p for n, p in checkpoint.companions().items() if isinstance(p, Path)}
    return {name: _state(path) for name, path in sorted(files.items())}


def _state(path: Path) -> str:
    identity = identify(path)
    # Not the inode: a network file system may number anew what it mounts again.
    times = f"modified {identity.modified_ns}, changed {identity.changed_ns}"
    return f"{identity.size_bytes:,} bytes, {times}"


def receipt_of(planned: Plan, written: Path, options: WriteOptions) -> Receipt:
    """Return the receipt of a conversion, after running source and result if that is wanted.

    Args:
      planned: the conversion.
      written: the folder or the GGUF file that it wrote.
      options: how.

    Raises:
      CheckError: the result is not the function that was promised.
    """
    verified = None
    if options.verify:
        from moecc.jobs.comparison import verify_written

        verified = verify_written(planned, written)
    return Receipt(
        planned.target, planned.preserves, planned.contracts, planned.proof, verified,
        planned.engines, planned.rounded, planned.left_out,
    )  # fmt: skip


def card(
    planned: Plan, receipt: Receipt, options: Sequence[str] = (), proof: Sequence[str] = ()
) -> str:
    """Return the model card of a conversion.

    Args:
      planned: the conversion.
      receipt: its receipt.
      options: further options of the command that decide what is written.
      proof: the files of the proof beside it, its log first.
    """
    checkpoint = planned.checkpoint
    stages, name = stages_of(checkpoint), source_name(checkpoint.path)
    facts = planned.facts
    pipelines = [planned.pipeline.in_full(), *(str(stage.get("pipeline")) for stage in stages)]
    kinds = Counter(str(layer) for layer in facts.expert_layers)
    task, auto_class = _loaded_as(planned)
    relation = "finetune" if planned.storage is None else "quantized"
    if checkpoint.branches:
        relation = "merge"
    layers = (
        f"{count} of {facts.layers} layers {'has' if count == 1 else 'have'} {kind}"
        for kind, count in kinds.items()
    )
    return model_card(
        CardFacts(
            title=f"{name}-{planned.target.replace(':', '-')}",
            source=name,
            family_from=planned.graph.family,
            family_to=planned.target,
            command=command(planned, options),
            receipt=tuple(receipt_lines(receipt.to_json())),
            dtype=both(planned.types),
            parameters=planned.parameters,
            active_parameters=facts.parameters.active,
            moecc_version=__version__,
            task=task,
            code=next(iter(planned.program.files)) if planned.program else "",
            inputs=tuple(_example(value) for value in planned.graph.inputs.values()),
            auto_class=auto_class,
            has_tokenizer=_has_tokenizer(planned),
            is_sparse=bool(kinds),
            is_upcycled=bool(kinds) and any("upcycle" in text for text in pipelines),
            base_models=planned.base_models,
            story=tuple(story(stages)),
            is_trained=is_trained(stages),
            relation=relation,
            source_card=checkpoint.card(),
            engines=tuple((f"{v.engine} ({v.version})", v.runs, _why(v)) for v in planned.engines),
            serving=_serving(planned),
            training=_training(planned) if kinds else "",
            file=FILE_NAME if planned.architecture else "",
            notes=(*layers, *planned.notes),
            proof=tuple(proof),
        )
    )


def _example(value: Value) -> tuple[str, tuple[int, ...], str]:
    """Return the name, sizes and element type of an example of an input."""
    sizes = (s if isinstance(s, int) else 8 if n else 1 for n, s in enumerate(value.type.sizes))
    return value.name, tuple(sizes), str(value.type.dtype.numpy)


def _has_tokenizer(planned: Plan) -> bool:
    if planned.architecture:
        from moecc.formats.gguf.tokenizer import NO_TOKENIZER
        from moecc.translate.gguf import GgufExport

        assert isinstance(planned.export, GgufExport), "a plan of a GGUF file"
        return planned.export.tokenizer != NO_TOKENIZER
    names = planned.checkpoint.companions()
    return any(fnmatchcase(name, pattern) for name in names for pattern in TOKENIZERS)


def command(planned: Plan, options: Sequence[str] = ()) -> str:
    """Return the command of a conversion, with every option that decides the result."""
    words = ["moecc convert SOURCE OUT", f"-p {shlex.quote(planned.pipeline.in_full())}"]
    words += [f"--to {planned.target}", f"--seed {planned.seed}"]
    if planned.dtype is not None or planned.storage is not None:
        words.append(f"--dtype {planned.dtype_name}")
    if "mask" in planned.graph.inputs:
        words.append("--padding-mask")
    return " ".join([*words, *planned.options, *options])


def _why(verdict: EngineVerdict) -> str:
    if verdict.silent:
        return f"silently computes something else: {'; '.join(verdict.reasons)}"
    if verdict.note.startswith("as gguf:"):
        return f"as a file of its own, which moecc convert --to {verdict.note[3:]} writes"
    return "; ".join(verdict.reasons) or _NOTES.get(verdict.note, verdict.note)


def _serving(planned: Plan) -> str:
    """Return that no engine serves st_moe by itself, and which change would let one."""
    if planned.target != FAMILY or planned.program is not None:
        return ""
    from moecc.jobs.targets import nearest_family

    near = nearest_family(planned.graph)
    change = (
        f" The nearest family that engines read is {near.target}; to be one, this would have to "
        f"change: {'; '.join(reason.message for reason in near.reasons)}."
        if near
        else ""
    )
    return f"No engine serves this layout; moecc alone runs it.{change}"


def _training(planned: Plan) -> str:
    """Return how to train the model on: transformers leaves the router's losses off."""
    advice = "`moecc train` adds the losses that its recipe names."
    if planned.architecture:
        return f"A GGUF file is not trained: train the source or a folder. {advice}"
    if planned.program is not None and not planned.program.auto_map:
        return f"`jax.grad` of a loss of the outputs trains it. {advice}"
    if planned.program is not None:
        has_losses = any(name.startswith(LOSS) for name in planned.graph.output_names)
        aux = "`aux_loss`, of the routers, is part of it. " if has_losses else ""
        new = [f"`{name}`" for name in planned.program.auto_map if "ModelFor" in name]
        if _loaded_as(planned)[1] == "AutoModel" and new:
            new_head = f"{either(new)} loads it with a new head. With `labels` that"
        else:
            new_head = "With `labels` the model"
        return f"{new_head} returns `loss`, as Trainer expects it. {aux}{advice}"
    if planned.target == FAMILY:
        return f"Only moecc trains this layout. {advice}"
    losses = router_losses(planned.export.config)
    if not losses:
        return f"transformers computes no loss that balances the experts of this family. {advice}"
    verb = "load" if "output_router_logits" in planned.export.config_json else "call"
    return (
        f"transformers leaves the router's balance loss off: {verb} the model with "
        f"`output_router_logits=True`, and it is added with the weight "
        f"{losses['balance']} (`router_aux_loss_coef`). Without it a few "
        f"experts may end up with all tokens. {advice}"
    )


def _loaded_as(planned: Plan) -> tuple[str, str | None]:
    """Return the Hub task of the output, and the transformers class that loads it."""
    graph, task = planned.graph, hub_task(planned.graph)
    stated = planned.checkpoint.card().get(TASK, ())
    if task == "feature-extraction" and SIMILARITY in stated:
        task = SIMILARITY
    auto_class: str | None = "AutoModelForCausalLM"
    if planned.wrapped is not None:
        task, auto_class = "image-text-to-text", "AutoModelForImageTextToText"
    elif LOGITS in graph.outputs:
        auto_class = f"AutoModelFor{graph.attrs.get('head')}"
    elif "logits" not in graph.outputs:
        auto_class = "AutoModel"
    elif DECODER_TOKENS in graph.inputs:
        is_speech = "features" in graph.inputs
        auto_class = "AutoModelForSpeechSeq2Seq" if is_speech else "AutoModelForSeq2SeqLM"
    if planned.target == FAMILY and (planned.program is None or not planned.program.auto_map):
        auto_class = None
    return task, auto_class


def manifest(
    folder: Path,
    planned: Plan,
    written: WriteReport,
    source_files: Mapping[str, FileRecord],
    receipt: Json | None = None,
) -> bytes:
    """Return the content of the manifest of what was written into `folder`."""
    checkpoint = planned.checkpoint
    tensors = written.tensors
    weights, files = folder_records(folder, tensors, unlisted=(JOURNAL_NAME,))
    nonfinite = (
        *(f"not finite: {nonfinite_value}" for nonfinite_value in written.nonfinite),
        *(f"written and not finite: {text}" for text in written.spread),
        *(f"all zero: {name}" for name in written.zeros),
    )
    document = Manifest(
        pipeline=planned.pipeline.in_full(),
        seed=planned.seed,
        source=source_name(checkpoint.path),
        base_model=planned.base_models,
        source_files=source_files,
        family_from=planned.graph.family,
        family_to=planned.target,
        dtype=planned.dtype_name,
        preserves=str(planned.preserves),
        weights=weights,
        files=files,
        tensors=tensors,
        notes=(*planned.notes, *nonfinite),
        receipt=receipt,
        lineage=tuple(stages_of(checkpoint)),
    )
    return dump(document)
