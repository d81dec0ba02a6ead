"""Hints as they are met: a command that is answered with the hint, and what the hint says to do."""

from __future__ import annotations

from dataclasses import dataclass

from .stands import DATA, FEW, SMALL

SCENE = "python -m tests.docs.scenes"
TO_MIXTRAL = "-p 'upcycle{experts=2 top-k=2}' --to mixtral"
SPLIT = "-p 'upcycle{experts=6 top-k=2 shared=0.25 split=activation}' --to st_moe"
OF_TWO = "-p 'upcycle{experts=2 top-k=1 sources=base,a}' --to mixtral --experts a=tuned"
TRIPLED = "-p 'upcycle{experts=6 top-k=3 granularity=3}' --to mixtral --dtype bf16"
COMPILE = "moecc compile MODEL --machine cpu --step forward --batch-tokens 16 --sequence 16"
ON_TWO = (
    "moecc compile sparse --machine cpu:2 --mesh expert=2 --step forward --dtype f32"
    " --batch-tokens 32 --sequence 16"
)
KILLED = f"{SCENE} killed convert MODEL out {TO_MIXTRAL} --no-check --max-shard-bytes 3000"
AGAIN = f"moecc convert MODEL out {TO_MIXTRAL} --no-check --max-shard-bytes 3000"
REPLACED = f"moecc convert MODEL out {TO_MIXTRAL} && mv out .out.moecc-old"
CAPTURE = "moecc capture MODEL --text text.txt --out captured --sequence 32 --batches 2"
RUN = "moecc run sparse --inputs tokens.npy --outputs logits.npy"
DEEP = "moecc convert MODEL -p 'upcycle{experts=2 top-k=2}' deep/in/out"
PLAN_TWO = "moecc plan smollm2-8x --machine cpu:8 --batch-tokens 4096 --sequence 64"
LIES = "MODEL -p liar --load liar.py"
ENCODER = "tests/golden/bert_gelu --machine cpu --batch-tokens 16"
TOKENS = "moecc tokens corpus.jsonl --tokenizer bytes --out ids"


@dataclass(frozen=True)
class TriedHint:
    """A hint and two shell lines.

    Attributes:
      hint: a part of the hint, which no other one has.
      fails: ends with the hint, and not with 0.
      works: what the hint says to do then.
    """

    hint: str
    fails: str
    works: str


TRIED_HINTS = (
    TriedHint(
        "rounds factors, too: moecc convert --verify tells a change from that",
        f"moecc convert MODEL out {TRIPLED} && moecc verify out --against MODEL --dtype f64",
        f"moecc convert MODEL verified {TRIPLED} --verify",
    ),
    TriedHint(
        "-p tie-head makes logits by the embedding",
        f"moecc compile {ENCODER} --sequence 16",
        f"moecc compile {ENCODER} --sequence 16 -p tie-head",
    ),
    TriedHint(
        "--step forward compiles the forward pass",
        "moecc compile tests/golden/vit_plain --machine cpu --batch-tokens 16",
        "moecc compile tests/golden/vit_plain --machine cpu --batch-tokens 16 --step forward",
    ),
    TriedHint(
        "without --quick the report shows what overlaps",
        f"{COMPILE} --quick --overlap",
        f"{COMPILE} --overlap",
    ),
    TriedHint(
        "--time-limit allows more", f"{COMPILE} --time-limit 0.01", f"{COMPILE} --time-limit 600"
    ),
    TriedHint(
        "has every way",
        f"{ON_TWO} --partition gspmd --via ring",
        f"{ON_TWO} --partition explicit --via ring",
    ),
    TriedHint(
        "--allow-other-base merges it",
        f"{SCENE} adapter MODEL tuned some/SmolLM2-360M && moecc convert MODEL out {OF_TWO}",
        f"moecc convert MODEL out {OF_TWO} --allow-other-base",
    ),
    TriedHint(
        "moecc capture MODEL --text FILE --out DIR writes one",
        f"moecc convert MODEL out --capture notes {SPLIT}",
        f"{CAPTURE} && moecc convert MODEL out --capture captured {SPLIT}",
    ),
    TriedHint(
        "moecc capture takes them anew",
        f"{CAPTURE} && {SCENE} edited captured/capture.json schema 1 &&"
        f" moecc convert MODEL out --capture captured {SPLIT}",
        f"{CAPTURE} --force && moecc convert MODEL out --capture captured {SPLIT}",
    ),
    TriedHint(
        "moecc capture takes them of this one",
        f"{CAPTURE} && {SCENE} weights MODEL other 0.5"
        f" && moecc convert other out --capture captured {SPLIT}",
        "moecc capture other --text text.txt --out captured --sequence 32 --batches 2 --force"
        f" && moecc convert other out --capture captured {SPLIT}",
    ),
    TriedHint(
        "convert --capture DIR reads them",
        f"moecc convert MODEL out {SPLIT}",
        f"{CAPTURE} && moecc convert MODEL out --capture captured {SPLIT}",
    ),
    TriedHint(
        "moecc capture --at takes those that its pattern fits",
        f"{CAPTURE} --at layers.0.ffn && moecc convert MODEL out --capture captured {SPLIT}",
        f"{CAPTURE} --at 'layers.*' --force && moecc convert MODEL out --capture captured {SPLIT}",
    ),
    TriedHint(
        "the locations are those of moecc import",
        f"{CAPTURE} --at ffn.0",
        f"moecc import MODEL | grep -q @layers.3.ffn && {CAPTURE} --at layers.3.ffn",
    ),
    TriedHint(
        "or --dtype q8_0, which moecc makes itself",
        "moecc convert MODEL out.gguf -p '' --to gguf:llama --dtype q4_k",
        "moecc convert MODEL out.gguf -p '' --to gguf:llama --dtype q8_0",
    ),
    TriedHint(
        "name the parts as llama-gguf-split does",
        f"{SCENE} split SmolLM2-135M-Instruct.Q4_1.gguf first.gguf && moecc inspect first.gguf",
        "for p in parts-*-of-*.gguf; do n=${p##*-of-}; done;"
        " mv first.gguf parts-00001-of-$n && moecc inspect parts-00001-of-$n",
    ),
    TriedHint(
        "--force without --resume begins anew",
        f"{KILLED}; moecc convert MODEL out {TO_MIXTRAL} --no-check --resume",
        f"moecc convert MODEL out {TO_MIXTRAL} --no-check --force",
    ),
    TriedHint(
        "--force without --resume begins anew",
        f"{KILLED}; moecc convert MODEL out {TO_MIXTRAL} --no-check --resume",
        f"{AGAIN} --resume",
    ),
    TriedHint("--resume continues it", f"{KILLED}; {AGAIN}", f"{AGAIN} --resume"),
    TriedHint("--force removes it, and so does", f"{KILLED}; {AGAIN}", f"{AGAIN} --force"),
    TriedHint("and so does moecc clean", f"{KILLED}; {AGAIN}", f"moecc clean out && {AGAIN}"),
    TriedHint("--force removes it once the new", f"{REPLACED}; {AGAIN}", f"{AGAIN} --force"),
    TriedHint("brings it back", f"{REPLACED}; {AGAIN}", "moecc clean out && moecc verify out"),
    TriedHint(
        "--allow-nonfinite converts it all the same",
        f"{SCENE} weights tests/golden/llama_gqa bad nan && moecc convert bad out {TO_MIXTRAL}",
        f"moecc convert bad out {TO_MIXTRAL} --allow-nonfinite",
    ),
    TriedHint("give another folder", f"moecc convert MODEL notes {TO_MIXTRAL}", AGAIN),
    TriedHint(
        "--force to replace it once the new one is complete",
        f"moecc convert MODEL notes {TO_MIXTRAL}",
        f"mv notes mine && mkdir notes && touch notes/a && {AGAIN} --force",
    ),
    TriedHint(
        "moecc train --resume goes on",
        f"{SCENE} begun RUN mine && moecc inspect mine",
        "moecc train --resume mine && moecc inspect mine",
    ),
    TriedHint(
        "leave --out out",
        "cp -rL RUN mine && moecc train --resume mine --out other",
        "moecc train --resume mine",
    ),
    TriedHint(
        "leave --fork out, or --resume",
        "cp -rL RUN mine && moecc train --resume mine --fork RUN@2",
        "moecc train --resume mine",
    ),
    TriedHint(
        "--against SOURCE",
        "moecc verify tiny.moe",
        "moecc verify tiny.moe --against tiny.moe",
    ),
    TriedHint(
        "moecc convert writes one",
        "moecc convert MODEL out.gguf -p '' --to gguf:llama"
        f" && {SCENE} unreceipted out.gguf"
        " && moecc verify out.gguf --html page.html",
        "moecc convert MODEL out.gguf -p '' --to gguf:llama --force"
        " && moecc verify out.gguf --html page.html",
    ),
    TriedHint(
        "--dtype f64 tells a change from rounding",
        "moecc verify sparse --against MODEL --tolerance 1e-9",
        "moecc verify sparse --against MODEL --tolerance 1e-9 --dtype f64",
    ),
    TriedHint(
        "--force replaces it",
        "moecc import MODEL -o mine.moe && moecc import MODEL -o mine.moe",
        "moecc import MODEL -o mine.moe --force",
    ),
    TriedHint("--help", "moecc convert --nonsense", "moecc convert --help"),
    TriedHint(
        "moecc run takes the inputs of any model",
        "moecc generate tests/golden/vit_plain --prompt a",
        "moecc run tests/golden/vit_plain --inputs tests/golden/vit_plain/pixels.npy"
        " --outputs out.npy",
    ),
    TriedHint(
        "writes one",
        "moecc convert MODEL out -p '' --to auto --dtype q8_0",
        "moecc convert MODEL out.gguf -p 'upcycle{experts=2 top-k=2}' --to gguf:llama --dtype q8_0",
    ),
    TriedHint(
        "moecc launch local sets all of them",
        f"MOECC_PROCESS=0 {RUN}",
        f"moecc launch local -n 2 -- {RUN.removeprefix('moecc ')}",
    ),
    TriedHint(
        "several processes run --backend xla",
        f"moecc launch local -n 2 -- {RUN.removeprefix('moecc ')} --backend reference",
        f"moecc launch local -n 2 -- {RUN.removeprefix('moecc ')} --backend xla",
    ),
    TriedHint(
        "verify, generate and lower also take --weights FOLDER",
        "grep -v 'attr checkpoint' dense.moe > alone.moe"
        "; moecc run alone.moe --inputs tokens.npy --outputs out.npy",
        "moecc run alone.moe --weights MODEL --inputs tokens.npy --outputs out.npy",
    ),
    TriedHint("moecc import prints its graph", "moecc opt MODEL -p cse", "moecc import MODEL"),
    TriedHint(
        "moecc opt runs a pipeline over any graph",
        "moecc replay dense.moe",
        "moecc opt dense.moe -p cse",
    ),
    TriedHint(
        "opt and convert also go on without it by --allow-unmatched",
        "moecc import sparse -o own.moe && moecc opt own.moe -p 'upcycle{experts=4}'",
        "moecc opt own.moe -p 'upcycle{experts=4}' --allow-unmatched",
    ),
    TriedHint(
        "is a sequence a device",
        "moecc plan MODEL --machine cpu:8 --batch-tokens 64 --sequence 64",
        "moecc plan MODEL --machine cpu:8 --batch-tokens 512 --sequence 64",
    ),
    TriedHint(
        "moecc plan … --save FILE writes one",
        "echo '{}' > other.json; moecc compile MODEL --plan other.json",
        "moecc plan MODEL --machine cpu --batch-tokens 64 --sequence 64 --save plan.json"
        " && moecc compile MODEL --plan plan.json",
    ),
    TriedHint(
        "-p unroll-layers undoes it",
        "moecc opt dense.moe -p roll-layers -o rolled.moe && moecc plan rolled.moe --machine cpu",
        "moecc plan rolled.moe --machine cpu -p unroll-layers",
    ),
    TriedHint(
        "-p strip-sharding",
        "moecc opt dense.moe -p 'annotate-sharding{mesh=data:2 rules=st-moe}' -o on.moe"
        " && moecc plan on.moe --machine cpu:2",
        "moecc plan on.moe --machine cpu:2 -p strip-sharding",
    ),
    TriedHint(
        "give a shorter prompt, or a smaller --tokens",
        f"{SCENE} lettered tests/golden/gpt2_plain mine"
        " && moecc generate mine --prompt a --tokens 30",
        "moecc generate mine --prompt a --tokens 4",
    ),
    TriedHint(
        "moecc run takes token ids instead of text",
        "moecc generate tests/golden/llama_gqa --prompt a",
        "moecc run tests/golden/llama_gqa --inputs tokens.npy --outputs out.npy",
    ),
    TriedHint(
        "--compare run or --compare weights looks at more",
        "moecc reduce dense.moe -p cse",
        f"{SCENE} wrong_lowering wrong.py"
        " && moecc reduce dense.moe -p cse --load wrong.py --compare run",
    ),
    TriedHint(
        "check the graph as `moecc import` writes it",
        "moecc opt dense.moe -p 'upcycle{experts=4096 top-k=2}' -o big.moe"
        " && moecc opt big.moe -p cse --check",
        "moecc import MODEL | moecc opt - -p cse --check",
    ),
    TriedHint(
        "gives it some, with routers that learnt nothing",
        "moecc specialise MODEL --data text/heldout --sequence 32",
        "moecc specialise MODEL --data text/heldout --sequence 32 -p 'upcycle{experts=8}'",
    ),
    TriedHint(
        "goes on with another recipe",
        "cp -rL RUN mine && moecc train --resume mine --set optimizer.rate=1e-4",
        f"moecc train recipe:upcycle --fork mine --out other {DATA}{FEW}{SMALL}"
        " --set run.steps=4 --set optimizer.rate=1e-4",
    ),
    TriedHint(
        "look at its weights, or give other --inputs",
        f"{SCENE} weights MODEL zero 0 && moecc verify zero --against zero",
        "moecc verify MODEL --against MODEL --inputs tokens.npy",
    ),
    TriedHint(
        "moecc bisect finds the pass",
        f"{SCENE} liar liar.py && moecc convert {LIES} out --to st_moe --no-check --verify",
        "moecc bisect dense.moe -p liar --load liar.py",
    ),
    TriedHint(
        "--split paragraph, line or form-feed makes documents",
        "yes 'a line of a text that has many of them' | head -c 70000000 > long.txt;"
        " moecc tokens long.txt --tokenizer bytes --out ids",
        "moecc tokens long.txt --tokenizer bytes --split line --out ids",
    ),
    TriedHint(
        "--field names another key",
        "moecc tokens rte.jsonl --tokenizer bytes --out ids",
        "moecc tokens rte.jsonl --tokenizer bytes --field premise --out ids",
    ),
    TriedHint(
        "--prompt '{KEY}' names another key",
        "moecc tokens rte.jsonl --kind labelled --completion '{label}' --tokenizer bytes --out ids",
        "moecc tokens rte.jsonl --kind labelled --completion '{label}' --prompt '{hypothesis}'"
        " --tokenizer bytes --out ids",
    ),
    TriedHint(
        "--completion '{KEY}' names another key",
        "moecc tokens rte.jsonl --kind labelled --prompt '{hypothesis}' --tokenizer bytes"
        " --out ids",
        "moecc tokens rte.jsonl --kind labelled --prompt '{hypothesis}' --completion '{label}'"
        " --tokenizer bytes --out ids",
    ),
    TriedHint(
        "or the word bytes",
        "moecc tokens corpus.jsonl --tokenizer notes --out ids",
        TOKENS,
    ),
    TriedHint(
        "--tokenizer takes the folder of a checkpoint",
        "moecc tokens corpus.jsonl --tokenizer notes --out ids",
        "moecc tokens corpus.jsonl --tokenizer MODEL --out ids",
    ),
    TriedHint(
        "moecc tokens writes them anew",
        "cp -rL text ids && python -m tests.docs.scenes edited ids/train/tokens.json schema 1"
        " && moecc evaluate MODEL --data ids/train --sequence 32",
        "moecc tokens corpus.jsonl --tokenizer MODEL --hold-out 0.1 --out ids --force"
        " && moecc evaluate MODEL --data ids/train --sequence 32",
    ),
    TriedHint(
        "another share, or --split paragraph for more documents",
        "moecc tokens text.txt --tokenizer bytes --hold-out 0.1 --out ids",
        "moecc tokens text.txt --tokenizer bytes --hold-out 0.1 --split paragraph --out ids",
    ),
    TriedHint(
        "--kind examples has completions that differ",
        """seq 1100 | sed 's/.*/{"a": "b", "c": "&"}/' > many.jsonl;"""
        " moecc tokens many.jsonl --kind labelled --prompt '{a}' --completion '{c}'"
        " --tokenizer bytes --out ids",
        "moecc tokens many.jsonl --kind examples --prompt '{a}' --completion '{c}'"
        " --tokenizer bytes --out ids",
    ),
    TriedHint(
        "moecc run takes the whole text at once",
        f"{SCENE} mixing mixing && moecc opt mixing.moe -p decode",
        "python -c 'import numpy as n; n.save(\"small.npy\", n.ones((1, 4), n.int32))'"
        " && moecc run mixing.moe --weights mixing --inputs small.npy --outputs out.npy",
    ),
    TriedHint(
        "makes a CPU many",
        "moecc opt dense.moe -p 'annotate-sharding{mesh=data:2 rules=st-moe}' -o on.moe"
        f" && {SCENE} mesh on.moe",
        f"XLA_FLAGS=--xla_force_host_platform_device_count=2 {SCENE} mesh on.moe",
    ),
    TriedHint(
        "moecc launch local starts processes on one machine",
        f"MOECC_DISTRIBUTED=cluster {RUN}",
        f"moecc launch local -n 2 -- {RUN.removeprefix('moecc ')}",
    ),
    TriedHint(
        "--emit stablehlo shows what XLA is given",
        "moecc lower dense.moe --emit hlo --platform tpu",
        "moecc lower dense.moe --emit stablehlo --platform tpu",
    ),
    TriedHint(
        "JAX_PLATFORMS=cpu computes on the processor",
        f"JAX_PLATFORMS=nonsense {RUN} --backend xla",
        f"JAX_PLATFORMS=cpu {RUN} --backend xla",
    ),
    TriedHint(
        "NAME=FILE gives one a name",
        "moecc capture MODEL --text text.txt --text text.txt --out captured --batches 1",
        "moecc capture MODEL --text a=text.txt --text b=text.txt --out captured --batches 1",
    ),
    TriedHint(
        "make it first: mkdir -p",
        f"{DEEP} --to mixtral",
        f"mkdir -p deep/in && {DEEP} --to mixtral",
    ),
    TriedHint(
        "make it first: mkdir -p",
        f"{DEEP}.gguf --to gguf:llama",
        f"mkdir -p deep/in && {DEEP}.gguf --to gguf:llama",
    ),
    TriedHint(
        "-p 'upcycle{experts=8 top-k=2}' makes some",
        "moecc plan MODEL --machine cpu:2 --sweep capacity-factor=1.25",
        "moecc plan MODEL --machine cpu:2 --sweep capacity-factor=1.25"
        " -p 'upcycle{experts=8 top-k=2}'",
    ),
    TriedHint(
        "sparse first: upcycle{experts=8 top-k=2} in the pipeline",
        "moecc convert MODEL out -p '' --to mixtral",
        "moecc convert MODEL out -p 'upcycle{experts=8 top-k=2}' --to mixtral",
    ),
    TriedHint(
        "sparse first: upcycle{experts=8 top-k=1 gates=switch} in the pipeline",
        "moecc convert tests/golden/t5_relu_tied out -p '' --to switch_transformers",
        "moecc convert tests/golden/t5_relu_tied out"
        " -p 'upcycle{experts=8 top-k=1 gates=switch}' --to switch_transformers",
    ),
    TriedHint(
        "--rules expert-hierarchical",
        f"{PLAN_TWO} --via hierarchical",
        f"{PLAN_TWO} --via hierarchical --rules expert-hierarchical",
    ),
    TriedHint(
        "plan the model that you choose, without --sweep",
        f"{PLAN_TWO} --sweep top-k=1,2 --save plan.json",
        f"{PLAN_TWO} --save plan.json",
    ),
    TriedHint(
        "fewer devices, or other --rules",
        f"{PLAN_TWO.replace('smollm2-8x', 'sparse')} --rules expert-hierarchical",
        f"{PLAN_TWO.replace('smollm2-8x', 'sparse')} --rules fsdp",
    ),
    TriedHint(
        "moecc tokens TEXT --tokenizer FOLDER --out DIR makes one",
        "moecc evaluate MODEL --data notes",
        "moecc tokens text.txt --tokenizer MODEL --out ids"
        " && moecc evaluate MODEL --data ids --sequence 32",
    ),
    TriedHint(
        "moecc tokens writes the folder anew",
        f"{TOKENS} && truncate -s 100 ids/tokens.bin && moecc evaluate MODEL --data ids",
        "moecc tokens corpus.jsonl --tokenizer MODEL --out ids --force"
        " && moecc evaluate MODEL --data ids --sequence 32",
    ),
    TriedHint(
        "writes a folder",
        "moecc convert MODEL out.gguf -p 'upcycle{experts=2 top-k=2}' --to gguf:st_moe",
        "moecc convert MODEL out -p 'upcycle{experts=2 top-k=2}' --to st_moe",
    ),
    TriedHint(
        "moecc evaluate measures a model as it is",
        f"moecc train recipe:upcycle --out run {DATA}{FEW}{SMALL}"
        " --set 'optimizer.groups=[{match = \"*\", freeze = true}]'",
        "moecc evaluate MODEL --data text/heldout --sequence 32",
    ),
)
