.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null)
STAMP := $(VENV)/.installed

.PHONY: help install demo demo-train smoke-train test test-all check lint format types proof-chain proof-checker proof-costs proof-emit proof-emit-jax proof-engines proof-equal proof-exposed proof-fuzz proof-jax-models proof-jobs proof-kills proof-learning proof-mutants proof-owned proof-plans proof-recipes proof-schedulers proof-slurm proof-splits proof-step proof-stores proof-table proof-worth proof-z3 docs site bench wheel clean fuzz fuzz-proof

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with moecc and everything for development

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moecc needs Python 3.11 or newer: make PYTHON=python3.12 install"; exit 1; }
ifneq ($(UV),)
	test -x $(BIN)/python || $(UV) venv --quiet --seed --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
endif
	@touch $(STAMP)

demo: $(STAMP) ## upcycle SmolLM2-135M to a mixture of 8 experts, and prove that it is the same function
	$(BIN)/python examples/upcycle_smollm2.py

demo-train: $(STAMP) ## train a small decoder on this documentation, upcycle it, train on, compare, export
	$(BIN)/python examples/train_on_docs.py

smoke-train: $(STAMP) ## every command of demo-train, with a few steps and nothing to look at
	$(BIN)/python examples/train_on_docs.py --smoke --out demo-output/smoke-train

test: $(STAMP) ## the tests, in parallel, without the slow ones
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

test-all: $(STAMP) ## every test, the slow ones included
	MOECC_TIER=all $(BIN)/python -m pytest -q -n auto --dist worksteal

check: lint types test ## what CI runs, without the wheel

fuzz: $(STAMP) ## hostile inputs for MINUTES minutes (1), every grammar in turn; counts on stdout
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),1)

fuzz-proof: $(STAMP) ## compare prover and reference on PAIRS pairs of graphs (100000), with sound and wrong edits; goes on after a stop, and ends after SECONDS; writes docs/proofs/fuzz-proof.json
	mkdir -p docs/proofs
	PYTHONPATH=tests/support $(BIN)/python -m tests.oracle --pairs $(or $(PAIRS),100000) --seconds $(or $(SECONDS),inf) --out docs/proofs/fuzz-proof.json

lint: $(STAMP) ## ruff, over everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy over the three packages and the examples, strict by pyproject.toml
	$(BIN)/mypy

proof-chain: $(STAMP) ## SmolLM2 upcycled, trained on, exported, judged by transformers, which MOECC_PARITY_PYTHON has; writes docs/proofs/chain.json
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.chain --out docs/proofs/chain.json > /dev/null

proof-emit: $(STAMP) ## every source by every method as PyTorch, outputs, gradients and tokens judged by torch in the interpreters of MOECC_PARITY_PYTHON; continues docs/proofs/emit.jsonl, whose table docs/emit.md has
	PYTHONPATH=tests/support $(BIN)/python -m tests.emit.prove
	PYTHONPATH=tests/support $(BIN)/python -m tests.docs.generate docs/emit.md

proof-emit-jax: $(STAMP) ## every source as functions in JAX, dense, upcycled and ST-MoE in training; writes docs/proofs/emit-jax.json
	PYTHONPATH=tests/support $(BIN)/python -m tests.emit.jax_cells --out docs/proofs/emit-jax.json

proof-engines: $(STAMP) ## engines compute what the sources do; MOECC_LLAMA_CPP_PYTHON, MOECC_MLX_PYTHON and MOECC_VLLM_PYTHON name interpreters
	$(BIN)/python -m pytest -q -rs tests/engines

proof-step: $(STAMP) ## the training step beside a loop in torch written by hand in float64, of MOECC_PARITY_PYTHON; writes docs/proofs/step.json
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.step --out docs/proofs/step.json > /dev/null

proof-slurm: $(STAMP) ## a training and a conversion on a cluster of Slurm on this machine, killed, requeued, told to stop; Debian's slurm-wlm, as root; writes docs/proofs/slurm.json
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.slurm --out docs/proofs/slurm.json > /dev/null

proof-stores: $(STAMP) ## spoil requests to an S3 server, for every command that reads or writes one; writes docs/proofs/stores.json (an hour)
	mkdir -p docs/proofs
	PYTHONPATH=tests/support $(BIN)/python -m tests.proof.stores --out docs/proofs/stores.json > /dev/null

proof-schedulers: $(STAMP) ## printed templates by the parsers of Kubernetes, JobSet, SkyPilot and xpk; MOECC_KUBERNETES_PYTHON, MOECC_SKYPILOT_PYTHON, MOECC_XPK_PYTHON and MOECC_JOBSET_CRD name them
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.schedulers --out docs/proofs/schedulers.json > /dev/null

proof-splits: $(STAMP) ## SmolLM2 split by activation beside index and random, pruned by saliency beside draws; writes docs/proofs/splits.json
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.splits --out docs/proofs/splits.json > /dev/null

proof-owned: $(STAMP) ## real models as programs, in MOECC_OWNED_PYTHON with transformers and sentence-transformers; MODELS="smollm2=FILE minilm=DIR gemma3=FILE whisper=DIR"
	$(BIN)/python -m tests.emit.prove_owned --judge $(MOECC_OWNED_PYTHON) --work owned --text docs/decisions.md --out docs/proofs/owned.json $(MODELS)

proof-recipes: $(STAMP) ## steps of the shipped recipes compiled for v5p and H100, which libtpu and the CUDA plug-in know; docs/proofs/recipes.jsonl
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.recipes --out docs/proofs/recipes.jsonl > /dev/null

proof-table: $(STAMP) ## every source as every target by every method, written to docs/proof-table.md
	PYTHONPATH=tests/support $(BIN)/python -m tests.proof.make_table

proof-jax-models: ## models of Levanter, keras-hub, tunix and others converted, compared and trained a step by MOECC_JAX_PYTHON, which has moecc and what it can have of them; goes on where it was interrupted
	mkdir -p docs/proofs
	$(MOECC_JAX_PYTHON) -P -W ignore tests/jaxpr/sweep.py --out docs/proofs/jax-models.json

proof-torch-models: ## architectures of transformers converted and judged by MOECC_TORCH_PYTHON, which has moecc, torch and transformers; goes on where it was interrupted
	mkdir -p docs/proofs
	$(MOECC_TORCH_PYTHON) -W ignore -m tests.torch_models.sweep --out docs/proofs/torch-models.json
	PYTHONPATH=tests/support $(BIN)/python -m tests.docs.generate docs/any-torch-model.md

proof-jobs: $(STAMP) ## the five jobs of docs/jobs.md from a fresh clone; writes docs/proofs/jobs.json (ten minutes)
	mkdir -p docs/proofs
	$(BIN)/python -m tests.proof.jobs --out docs/proofs/jobs.json > /dev/null

proof-exposed: $(STAMP) ## exposed collectives, predicted and compiled, for TPUs (libtpu) and H100 (CUDA plug-in); goes on after a stop; writes docs/proofs/exposed.json (an hour)
	$(BIN)/python -m tests.proof.exposed --predict > /dev/null
	$(BIN)/python -m tests.proof.exposed

proof-plans: $(STAMP) ## compile the ten best plans of six models on four machines, the best of each first; goes on after a stop; writes docs/proofs/best-plans.json
	$(BIN)/python -m tests.proof.best_plans > /dev/null

proof-costs: $(STAMP) ## what metrics, beats, saves and a store cost; writes docs/proofs/costs.json (ten minutes)
	$(BIN)/python benchmarks/run_costs.py --out docs/proofs/costs.json > /dev/null

proof-equal: $(STAMP) ## prove golden checkpoints by 66 pipelines, and the table's equal cells; writes docs/proofs/equal.json
	PYTHONPATH=tests/support $(BIN)/python -m tests.oracle.matrix --out docs/proofs/equal.json > /dev/null

proof-mutants: $(STAMP) ## wrong passes, graphs, tables, weights and exports: none is proved; writes docs/proofs/mutants.json
	PYTHONPATH=tests/support $(BIN)/python -m tests.oracle.mutations --seconds $(or $(SECONDS),inf) --out docs/proofs/mutants.json > /dev/null

proof-z3: $(STAMP) ## lemmas of choices, ties, slots and indices by z3, installed in build/z3; writes docs/proofs/z3.json
	test -x build/z3/bin/python || $(BIN)/python -m venv build/z3
	build/z3/bin/python -m pip install --quiet --disable-pip-version-check z3-solver
	build/z3/bin/python tests/oracle/z3_lemmas.py --out docs/proofs/z3.json > /dev/null

proof-checker: $(STAMP) ## accept the proofs of the matrix by the independent checker, and reject faults and its mutants; goes on after a stop, and ends after SECONDS; writes docs/proofs/checker.json
	mkdir -p docs/proofs
	PYTHONPATH=tests/support $(BIN)/python -m tests.checker.record --seconds $(or $(SECONDS),inf)

proof-kills: $(STAMP) ## end conversions at every call that changes the disk, and trainings at 100, and at 100 of an S3 server; writes docs/proofs/kills.json and kills-train.json (20 minutes)
	mkdir -p docs/proofs
	$(BIN)/python -m tests.kill.prove --out docs/proofs/kills.json > /dev/null
	PYTHONPATH=tests/support $(BIN)/python -m tests.kill.trainings --out docs/proofs/kills-train.json > /dev/null

proof-fuzz: $(STAMP) ## a million hostile inputs and 5,000 commands; writes docs/proofs/fuzz.json (half an hour; goes on after a stop)
	mkdir -p docs/proofs
	$(BIN)/python -m tests.fuzz.prove --work build/fuzz --out docs/proofs/fuzz.json > /dev/null

proof-learning: $(STAMP) ## dropping tokens in training costs: one experiment again, from nothing, on three seeds
	$(BIN)/python experiments/run.py --proof

proof-worth: $(STAMP) ## upcycling is worth it: both arms at equal compute, two texts, three seeds
	$(BIN)/python experiments/worth.py --proof

site: $(STAMP) ## the documentation as a site in build/site, which loads nothing; links are checked
ifneq ($(UV),)
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
endif
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs: $(STAMP) ## write the pages and modules that are generated
	PYTHONPATH=tests/support $(BIN)/python -m tests.docs.generate
	$(BIN)/python experiments/run.py --page

bench: $(STAMP) ## the benchmarks, one after the other
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/passes.py
	$(BIN)/python benchmarks/moe_layer.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/compile_time.py

wheel: $(STAMP) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
