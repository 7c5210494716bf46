# Set-up happens by itself, once: every target below makes what it needs in .venv, resumes half-done work,
# and starts anew when constraints.txt, pyproject.toml or this folder's place changes.
PYTHON ?= python3
WORKERS ?= 2
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
HASH   := $(shell (cat constraints.txt pyproject.toml; pwd) | cksum | cut -d' ' -f1)
CORE   := $(VENV)/.core-$(HASH)
DEV    := $(VENV)/.dev-$(HASH)
TORCH  := $(shell grep '^torch==' constraints.txt)
SETUPTOOLS := $(shell grep '^setuptools==' constraints.txt)

.PHONY: help demo demo-clean test lint bench bench-train bench-generate bench-loss bench-miniseries \
        bench-stability bench-gpu bench-demo bench-lens bench-sae bench-dictionaries bench-probes \
        bench-attribution bench-circuits bench-grown-circuits zoo zoo-quick parity clean
.DELETE_ON_ERROR:

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(CORE) ## grow a small model with a hidden backdoor, catch and repair it, write the report
	@echo "demo: growing a model under glass (minutes on two cores; Ctrl-C and 'make demo' again resumes)"
	@$(VENV)/bin/glasshouse demo

demo-clean: $(CORE) ## the same run without the backdoor: nothing may be raised
	@echo "demo-clean: growing the same model without a backdoor"
	@$(VENV)/bin/glasshouse demo --clean

test: $(DEV) ## run the tests in two processes (ARGS="-k ledger" passes options to pytest, WORKERS=0: in one)
	@echo "test: running pytest"
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(DEV) ## check format, ruff rules and types
	@echo "lint 1/3: format"
	@$(VENV)/bin/ruff format --check --quiet .
	@echo "lint 2/3: ruff rules"
	@$(VENV)/bin/ruff check --quiet .
	@echo "lint 3/3: types"
	@$(VENV)/bin/python -m mypy --no-error-summary src

bench: $(DEV) ## measure what the gates cost in the demo's run (make demo first)
	@echo "bench: the gates' share of the demo's time"
	@$(VENV)/bin/python benchmarks/bench_gate.py

# The peers are not shipped: NANOGPT and LLMC name folders with their source; what is not named is left out.
PEERS := $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(LLMC),--llmc $(LLMC))

bench-train: $(DEV) ## training speed beside NANOGPT=folder, LLMC=folder and Hugging Face (ten minutes)
	@$(VENV)/bin/python benchmarks/bench_train.py $(PEERS)

bench-generate: $(DEV) ## generation speed beside Hugging Face (TEXT=file: what 8-bit weights cost)
	@$(VENV)/bin/python benchmarks/bench_generate.py $(if $(TEXT),--text $(TEXT))

bench-lens: $(DEV) ## what reading activations costs, beside Hugging Face (three minutes)
	@$(VENV)/bin/python benchmarks/bench_lens.py

# The peers' packages live in environments of their own: SPARSIFY, SAELENS and DICTIONARY_LEARNING name interpreters.
LENSES := $(if $(SPARSIFY),--sparsify $(SPARSIFY)) $(if $(SAELENS),--saelens $(SAELENS)) \
          $(if $(DICTIONARY_LEARNING),--dictionary-learning $(DICTIONARY_LEARNING))

bench-sae: $(DEV) ## training dictionaries beside SPARSIFY=python, SAELENS=, DICTIONARY_LEARNING= (PARTS=speed)
	@$(VENV)/bin/python benchmarks/bench_sae.py $(LENSES) $(if $(PARTS),--parts $(PARTS))

bench-dictionaries: $(DEV) ## the quality of dictionaries on a model grown for it (a quarter of an hour)
	@$(VENV)/bin/python benchmarks/bench_dictionary_quality.py

bench-probes: $(DEV) ## probes beside scikit-learn, and whether models compose (an hour)
	@$(VENV)/bin/python benchmarks/bench_probes.py

bench-attribution: $(DEV) ## what attribution costs, and its agreement with exact patching
	@$(VENV)/bin/python benchmarks/bench_attribution.py

bench-circuits: $(DEV) ## every method beside exact patching and chance (CIRCUITS=folder of compiled programs)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/bench_circuits.py $(if $(CIRCUITS),--circuits $(CIRCUITS)) \
	  $(if $(CACHE),--cache $(CACHE))

bench-grown-circuits: $(DEV) ## circuits of induction and of harm in small models of five seeds (15 minutes; CACHE=folder resumes)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/bench_grown_circuits.py $(if $(CACHE),--cache $(CACHE))

bench-loss: $(DEV) ## time to nanoGPT's final loss (NANOGPT=folder DATA=folder; half an hour)
	@$(VENV)/bin/python benchmarks/bench_loss.py --nanogpt $(NANOGPT) --data $(DATA)

bench-miniseries: $(DEV) ## depths 2 to 8 by the one dial (DATA=folder)
	@$(VENV)/bin/python benchmarks/bench_miniseries.py --data $(DATA)

bench-stability: $(DEV) ## what injected faults and the monitors cost
	@$(VENV)/bin/python benchmarks/bench_stability.py

bench-gpu: $(DEV) ## check and time the GPU path (NANOGPT=folder)
	@$(VENV)/bin/python benchmarks/bench_gpu.py $(if $(NANOGPT),--nanogpt $(NANOGPT))

zoo: $(CORE) ## grow and examine the whole zoo of organisms, then its table (ARGS="--hours 2"; the same command goes on)
	@OMP_NUM_THREADS=1 $(VENV)/bin/glasshouse zoo run $(ARGS) && $(VENV)/bin/glasshouse zoo score --markdown

zoo-quick: $(CORE) ## three families of organisms on two seeds, with twins (minutes)
	@OMP_NUM_THREADS=1 $(VENV)/bin/glasshouse zoo run --quick $(ARGS) && $(VENV)/bin/glasshouse zoo score --quick

bench-demo: $(DEV) ## run the demo and its clean twin for five seeds and score them (an hour)
	@$(VENV)/bin/python benchmarks/demo_seeds.py

parity: $(DEV) ## formats beside the real packages (ENVS=, EAP_IG=, NEURONPEDIA= folders, ONLY=name, KEEP=1)
	@PYTHONPATH=tests $(VENV)/bin/python -m parity.run_peers $(if $(ENVS),--envs $(ENVS)) \
	  $(if $(EAP_IG),--eap-ig $(EAP_IG)) $(if $(NEURONPEDIA),--neuronpedia $(NEURONPEDIA)) $(if $(KEEP),--keep) $(ONLY)

clean: ## remove .venv and caches; runs/ stays
	@echo "clean: removing .venv and caches"
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# python -m pip, not the pip script, because a script breaks when its folder is moved.
$(CORE):
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Glasshouse needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1)." >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	  echo "set-up 1/3: making a virtual environment in $(VENV)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "Could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	else echo "set-up 1/3: using the virtual environment in $(VENV)"; fi
	@echo "set-up 2/3: installing $(TORCH) (the largest download, once)"
	@$(PIP) $(SETUPTOOLS) $(TORCH)
	@echo "set-up 3/3: installing Glasshouse and its libraries, at the versions in constraints.txt"
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(DEV): $(CORE)
	@echo "set-up: installing the tools for tests and lint"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
