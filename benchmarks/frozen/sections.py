"""The jobs of each section."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .inputs import golden_names, has_experts
from .work import Job, Step

DATA = Path(__file__).parent

# Passes that take a dense model; the others run on mixtures.  The last five begin with an upcycle.
DENSE_PIPELINES = (
    "upcycle{experts=4}",
    "upcycle{experts=4 top-k=1 gates=switch slots=capacity}",
    "upcycle{experts=4 top-k=4 granularity=2 router-std=1}",
    "upcycle{experts=4 top-k=2 split=random router-std=1}",
    "upcycle{experts=4 shared=0.5 router-std=1}",
    "upcycle{experts=4 init=noise noise-std=0.1 layers=every:2}",
    "st-moe{experts=4 layers=all}",
    "upcycle{experts=4 routing=hash}",
    "upcycle{experts=4 routing=expert-choice}",
    "upcycle{experts=4 routing=soft}",
    "upcycle{experts=4 gates=sparsemixer}",
    "upcycle{experts=4 gates=sigmoid-renormalised balance-bias=true}",
    "upcycle{experts=4 init=drop router-init=logit-std},add-losses{balance-coef=0.01}",
    "upcycle{experts=4},grow{times=2 chosen=same}",
    "upcycle{experts=4 gates=sigmoid-renormalised balance-bias=true},zero-experts{count=2}",
    "upcycle{experts=8 top-k=2},prune{keep=4},merge{size=2}",
)
MIXTURE_PIPELINES = (
    "prune{keep=3}",
    "merge{size=2}",
    "grow{times=2}",
    "to-dense{how=mean}",
    "to-dense{how=concat}",
    "zero-experts{count=2}",
)
COMMON_PIPELINES = ("", "canonicalize,add-losses")
PIPELINES = COMMON_PIPELINES + DENSE_PIPELINES + MIXTURE_PIPELINES

GGUF: tuple[str, ...] = (
    "llama",
    "qwen2",
    "qwen3",
    "granite",
    "smollm3",
    "olmo2",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
)
GGUF += ("qwen2moe", "qwen3moe", "olmoe", "granitemoe", "glm4moe", "ernie4_5-moe")
GGUF_OF = {
    "mixtral": ("llama",),
    "mistral": ("llama",),
    "qwen2": ("qwen2", "qwen2moe"),
    "qwen3": ("qwen3", "qwen3moe"),
    "qwen2_moe": ("qwen2moe",),
    "qwen3_moe": ("qwen3moe",),
    "gemma3_text": ("gemma3",),
    "granite": ("granite", "granitemoe"),
    "glm4_moe": ("glm4moe",),
    "ernie4_5_moe": ("ernie4_5-moe",),
    "llama": ("llama", "qwen2moe"),
}


@dataclass(frozen=True)
class Choice:
    """How much of each section is run: everything, or samples drawn with `seed`."""

    inputs: Path
    sample: int | None = None
    everything: bool = False
    seed: int = 0
    tpu: bool = False

    def count(self, default: int) -> int | None:
        """Return how many jobs are drawn, or None for all."""
        return None if self.everything else self.sample or default


def section_jobs(name: str, choice: Choice) -> list[Job]:
    """Return the jobs of the section `name`."""
    return list(SECTIONS[name](choice))


def step(*argv: str, record: str = "exit") -> Step:
    """Return a step that runs `argv`."""
    return Step(argv, record)


# --- conversions and graphs


def pairs(choice: Choice) -> list[tuple[str, str]]:
    """Return golden names and pipelines, those first whose pass is meant for the model."""
    names = golden_names(choice.inputs)
    sparse = {n for n in names if has_experts(choice.inputs, n)}
    meant: list[tuple[str, str]] = []
    rejected: list[tuple[str, str]] = []
    for pipeline in PIPELINES:
        for name in names:
            fits = pipeline in COMMON_PIPELINES or (pipeline in MIXTURE_PIPELINES) == (
                name in sparse
            )
            (meant if fits else rejected).append((name, pipeline))
    shuffled = random.Random(choice.seed)
    shuffled.shuffle(meant)
    shuffled.shuffle(rejected)
    # A twelfth of a sample are models that a pass rejects.
    step = 11
    for position, pair in enumerate(rejected[: len(meant) // step]):
        meant.insert((position + 1) * (step + 1) - 1, pair)
    return meant + rejected[len(meant) // step :]


def golden(choice: Choice) -> Iterator[Job]:
    """Convert each golden checkpoint by each pipeline to each target."""
    jobs = []
    for name, pipeline in pairs(choice):
        model_type = json.loads(
            (choice.inputs / "golden" / name / "config.json").read_text("utf-8")
        )
        family = model_type.get("model_type", "")
        architectures = GGUF_OF.get(family, (family,) if family in GGUF else ())
        targets = ["auto", "st_moe", *(f"gguf:{a}" for a in architectures)]
        if not choice.everything:
            targets = [random.Random(f"{name} {pipeline}").choice(["auto", *targets])]
        for target in targets:
            out = "out.gguf" if target.startswith("gguf:") else "out"
            words = ["convert", f"$GOLDEN/{name}", out, "--to", target]
            if pipeline:
                words += ["-p", pipeline]
            title = f"{name} | {pipeline or 'no passes'} | {target}"
            jobs.append(Job("golden", title, (step(*words),), ("out", "out.gguf")))
    yield from jobs[: choice.count(120)]


def graphs(choice: Choice) -> Iterator[Job]:
    """Print the graph of each golden checkpoint after each pipeline, and rolled."""
    for name, pipeline in pairs(choice)[: choice.count(60)]:
        words = ("-p", pipeline) if pipeline else ("-p", "canonicalize")
        rolled = (words[0], f"{words[1]},roll-layers")
        steps = (
            step("import", f"$GOLDEN/{name}", "-o", "model.moe"),
            step("opt", "model.moe", *words, record="text"),
            step("opt", "model.moe", *rolled, record="text"),
        )
        yield Job("graphs", f"{name} | {pipeline or 'canonicalize'}", steps)


# --- JSON of the commands

INSPECTED = "llama_gqa mixtral_square qwen2_moe_plain gpt_oss_limits t5_relu_tied switch_drops"
INSPECTED += " bert_gelu vit_plain whisper_plain gemma3_local phi3_long_v4 glm4_moe_plain_v4"
PASSES = "add-losses annotate-sharding canonicalize cse dce decode expert-parallel force-balance"
PASSES += " freeze fuse-attention fuse-gate-up grow lower-collectives merge pack-segments prune"
PASSES += (
    " record-modes roll-layers specialize st-moe strip-sharding tie-head to-dense trace-routing"
)
PASSES += " trace-values unroll-layers upcycle weight-rows zero-experts nothing"
BYTES = "$INPUTS/bytes-llama_gqa"
TOKENS = ("tokens", "$INPUTS/text.txt", "--tokenizer", BYTES, "--out", "tokens", "--split", "line")
SPARSE = ("convert", BYTES, "sparse", "-p", "upcycle{experts=4 router-std=1}")
API = """
import moecc
dense = moecc.open("$GOLDEN/llama_gqa")
sparse = dense.apply("upcycle{experts=4},add-losses")
print(sparse.graph)
print(sparse.pipeline, sparse.preserves)
saved = dense.upcycle(experts=4, top_k=2).save("saved", to="mixtral", force=True)
print(saved.verify(against=dense).passed)
plan = moecc.open("preset:smollm2-135m").upcycle(experts=8, top_k=2).plan("gpu:h100:8")
print(plan.best["mesh"], plan.best["total_bytes"])
"""


def json_of_commands(choice: Choice) -> Iterator[Job]:
    """Print the JSON of every command on small inputs."""

    def job(name: str, *commands: Sequence[str], outputs: Sequence[str] = ()) -> Job:
        *before, last = commands
        steps = [step(*c) for c in before]
        steps.append(step(*last, "--format", "json", record="json"))
        return Job("json", name, tuple(steps), tuple(outputs))

    for name in INSPECTED.split():
        yield job(f"inspect {name}", ("inspect", f"$GOLDEN/{name}"))
    for name in [
        "llama-3.1-8b",
        "mixtral-8x7b",
        "smollm2-135m",
        "st-moe-32b",
        "switch-c",
        "t5-xxl",
        "dense-l",
    ]:
        yield job(f"inspect preset {name}", ("inspect", f"preset:{name}"))
    for name in PASSES.split():
        yield job(f"passes {name}", ("passes", name))
    yield job("passes", ("passes",))
    llama, mixtral = "$GOLDEN/llama_gqa", "$GOLDEN/mixtral_square"
    graph = ("import", llama, "-o", "model.moe")
    upcycle = ("-p", "upcycle{experts=4}")
    yield job("import", graph, outputs=["model.moe"])
    yield job("inspect graph", graph, ("inspect", "model.moe"))
    yield job("opt", graph, ("opt", "model.moe", *upcycle, "-o", "out.moe"), outputs=["out.moe"])
    yield job(
        "opt with all remarks",
        graph,
        ("opt", "model.moe", *upcycle, "--remarks", "--stats", "--check", "-o", "out.moe"),
    )
    yield job("reduce", graph, ("reduce", "model.moe", *upcycle, "-o", "small.moe"))
    yield job("bisect", graph, ("bisect", "model.moe", *upcycle))
    convert = ("convert", llama, "out", *upcycle)
    yield job("convert dry", (*convert, "--dry-run"))
    yield job("convert", convert, outputs=["out"])
    yield job("convert, verified", (*convert, "--verify"), outputs=["out"])
    yield job(
        "convert bf16", (*convert, "--dtype", "bf16", "--max-shard-bytes", "20000"), outputs=["out"]
    )
    for dtype in ("q8_0", "f16"):
        words = ("convert", llama, "out.gguf", *upcycle, "--to", "gguf:llama", "--dtype", dtype)
        yield job(f"convert gguf {dtype}", words, outputs=["out.gguf"])
        yield job(f"inspect gguf {dtype}", words, ("inspect", "out.gguf"))
        yield job(
            f"convert from gguf {dtype}", words, ("convert", "out.gguf", "out"), outputs=["out"]
        )
    yield job("clean", convert, ("clean", "out"))
    yield job("verify", convert, ("verify", "out"))
    yield job("verify against", convert, ("verify", "out", "--against", llama))
    yield job(
        "verify against another", convert, ("verify", "out", "--against", "$GOLDEN/llama_linear")
    )
    for name in [
        "llama_gqa",
        "mixtral_square",
        "t5_relu_tied",
        "bert_gelu",
        "vit_plain",
        "switch_drops",
    ]:
        run = ("run", f"$GOLDEN/{name}", "--outputs", "out.npy")
        yield job(f"run {name}", run, outputs=["out.npy"])
    yield job(
        "run by the reference",
        ("run", mixtral, "--outputs", "out.npy", "--backend", "reference"),
        outputs=["out.npy"],
    )
    for emit in ("jaxpr", "stablehlo"):
        yield job(f"lower {emit}", ("lower", mixtral, "--emit", emit))
    yield job(
        "generate", ("generate", BYTES, "--prompt", "The 7th", "--prompt", "A", "--tokens", "6")
    )
    yield job("tokens", TOKENS, outputs=["tokens"])
    for kind in ("examples", "documents"):
        source = "$INPUTS/pairs.jsonl" if kind == "examples" else "$INPUTS/lines.jsonl"
        command = ("tokens", source, "--tokenizer", "bytes", "--out", "tokens", "--kind", kind)
        yield job(f"tokens of {kind}", (*command, "--hold-out", "0.1"), outputs=["tokens"])
    small = ("--sequence", "32", "--batch", "2", "--batches", "2")
    yield job("evaluate", TOKENS, SPARSE, ("evaluate", BYTES, "sparse", "--data", "tokens", *small))
    yield job("specialise", TOKENS, SPARSE, ("specialise", "sparse", "--data", "tokens", *small))
    capture = ("capture", BYTES, "--text", "$INPUTS/text.txt", "--out", "captured", *small)
    yield job("capture", capture)
    yield job(
        "convert by captured values",
        capture,
        ("convert", BYTES, "out", "-p", "upcycle{experts=4 split=activation router-init=ridge}",
         "--capture", "captured"),
    )  # fmt: skip
    for name, target in (
        ("model", mixtral),
        ("pipeline", "upcycle{experts=512 gates=softmax}"),
        ("preset", "preset:switch-c"),
    ):
        yield job(f"lint {name}", ("lint", target))
    yield job("plan", ("plan", mixtral, "--machine", "h100x8"))
    yield job(
        "compile",
        ("compile", llama, "--machine", "cpu:2", "--step", "forward", "--batch-tokens", "64",
         "--sequence", "16"),
    )  # fmt: skip
    yield Job("json", "public API", (Step(record="text", code=API),), ("saved",))
    template = ("launch", "template", "slurm", "--", "run", "model", "--outputs", "logits.npy")
    yield Job("json", "launch template", (step(*template, record="text"),))


# --- plans

PLANNED: tuple[tuple[str, ...], ...] = (
    ("preset:mixtral-8x7b",),
    ("preset:st-moe-base",),
    ("preset:llama-3.1-8b", "-p", "upcycle{experts=8}"),
    ("preset:smollm2-135m", "-p", "upcycle{experts=8}"),
    ("preset:st-moe-32b",),
    ("preset:switch-c",),
)
MACHINES = ("tpu:v5p:4x4x4", "gpu:h100:64", "v5e-256", "gpu:b200:64")
SETTINGS: tuple[tuple[str, ...], ...] = (
    ("--step", "forward"),
    ("--optimizer", "adafactor", "--micro-batches", "2"),
    ("--remat", "none"),
    ("--dense-weights", "split"),
    ("--via", "ragged"),
    ("--via", "hierarchical"),
    ("--via", "ring"),
    ("--via", "replicated"),
    ("--rules", "fsdp"),
    ("--rules", "tensor-parallel"),
    ("--mesh", "data=8,expert=8"),
    ("--batch-tokens", "1048576", "--sequence", "2048"),
)


def plans(choice: Choice) -> Iterator[Job]:
    """Plan models on machines: all strategies, settings and sweeps."""
    for i, model in enumerate(PLANNED):
        for k, machine in enumerate(MACHINES):
            if choice.everything or (i + k) % 2 == 0:
                words = ("plan", *model, "--machine", machine, "--explore", "--format", "json")
                name = f"{' '.join(model)} on {machine}, all strategies"
                yield Job("plans", name, (step(*words, record="json"),))
        if choice.everything or i < 2:
            sweep = ("--sweep", "capacity-factor=1.25,dropless")
            words = ("plan", *model, "--machine", "gpu:b200:64", *sweep, "--format", "json")
            yield Job("plans", f"{' '.join(model)}, swept", (step(*words, record="json"),))
    for number, settings in enumerate(SETTINGS):
        models = PLANNED if choice.everything else (PLANNED[number % 2],)
        for model in models:
            words = ("plan", *model, "--machine", "gpu:b200:64", *settings, "--format", "json")
            name = f"{' '.join(model)} {' '.join(settings)}"
            yield Job("plans", name, (step(*words, record="json"),))


# --- programs

COMPILED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("mixtral_gqa", "data=2,expert=4", ()),
    ("mixtral_gqa", "data=2,expert=4", ("--via", "ragged", "--step", "forward")),
    ("llama_gqa", "fsdp=8", ("--rules", "fsdp")),
    ("mixtral_gqa", "data=2,expert=4", ("--partition", "gspmd")),
    ("mixtral_gqa", "data=2,expert=4", ("--via", "ring")),
    ("mixtral_gqa", "data=2,expert=4", ("--via", "replicated")),
    ("mixtral_gqa", "data=4,expert=2", ("--chunks", "2")),
    ("mixtral_gqa", "data=2,expert=4", ("--micro-batches", "2", "--optimizer", "adafactor")),
    ("llama_gqa", "data=4,model=2", ("--rules", "tensor-parallel")),
    ("switch_square_v4", "data=2,expert=4", ()),
    ("qwen3_moe_plain", "data=2,expert=4", ("--dense-weights", "split")),
)


def census(choice: Choice) -> Iterator[Job]:
    """Compile steps for eight devices and count the collectives of the programs."""
    pairs = COMPILED if choice.everything else COMPILED[:3]
    machines = [("cpu:8", pairs)]
    if choice.tpu:
        machines.append(("v5e-8", COMPILED[:4]))
    for machine, programs in machines:
        for name, mesh, settings in programs:
            words = ("compile", f"$GOLDEN/{name}", "--machine", machine, "--mesh", mesh, *settings)
            words += ("--batch-tokens", "512", "--sequence", "16", "--format", "json")
            title = f"{name} on {machine} as {mesh} {' '.join(settings)}".strip()
            yield Job("census", title, (step(*words, record="json"),), seconds=900.0)


# --- exit codes


def exits(choice: Choice) -> Iterator[Job]:
    """Run command lines that are wrong in one way each, over damaged files where needed."""
    rows = json.loads(lzma.decompress((DATA / "exits.json.xz").read_bytes()))
    count = choice.count(250)
    if count is not None and count < len(rows):
        drawn = sorted(random.Random(choice.seed).sample(range(len(rows)), count))
        rows = [rows[i] for i in drawn]
    for row in rows:
        yield Job("exits", row["name"], (step(*row["argv"]),), inputs=row["files"], seconds=120.0)


# --- trainings


def losses(choice: Choice) -> Iterator[Job]:
    """Train the shipped recipes for ten steps on small data."""
    small = {
        "run.steps": "10",
        "run.evaluate_steps": "5",
        "data.batch": "4",
        "data.seq": "32",
        "data.train.0.tokens": "tokens/train",
        "data.evaluate.0.tokens": "tokens/heldout",
        "optimizer.warmup": "3",
    }
    text = (
        "tokens",
        "$INPUTS/text.txt",
        "--tokenizer",
        BYTES,
        "--out",
        "tokens",
        "--split",
        "line",
    )
    examples = ("tokens", "$INPUTS/pairs.jsonl", *text[2:6], "--kind", "examples")
    recipes: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
        "upcycle": (text, BYTES, {"optimizer.decay_steps": "4"}),
        "continue-dense": (text, BYTES, {"optimizer.decay_steps": "4"}),
        "st-moe-finetune": (examples, "$INPUTS/bytes-mixtral_gqa", {}),
        # A corpus of spans needs sentinels, which the tokenizer `bytes` has.
        "from-scratch": (
            tuple("bytes" if w == BYTES else w for w in text),
            "$INPUTS/bytes-t5_relu_tied",
            {"data.decoder_seq": "16"},
        ),
    }
    for recipe, (tokens, model, more) in recipes.items():
        words = ["train", f"recipe:{recipe}", "--out", "run", "--format", "json"]
        for key, value in {**small, "model.source": model, **more}.items():
            words += ["--set", f"{key}={value}"]
        steps = (step(*tokens, "--hold-out", "0.1"), step(*words))
        yield Job("losses", recipe, steps, ("run/metrics.jsonl",), seconds=900.0)


SECTIONS: dict[str, Callable[[Choice], Iterator[Job]]] = {
    "golden": golden,
    "graphs": graphs,
    "json": json_of_commands,
    "plans": plans,
    "census": census,
    "exits": exits,
    "losses": losses,
}
