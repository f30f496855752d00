# make setup  set up .venv, no more; then: source .venv/bin/activate
# make demo   set up, run the whole DAG on the built-in data set, print the results
# make explore RUN=demo   try the models of a finished run in the browser, on this machine alone
# make test   set up, run all tests (LONG=1: also those that take minutes each, the demo on a SLURM of two nodes most of all)
# make slurm  have snakemake submit to SLURM: workflow/docs/slurm.md
# make bench  all benchmarks: hours (faults.py alone kills the demo 200 times); overwrites benchmarks/results/
#             (QUICK=--quick: about a minute each)
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
CORES ?= all
QUICK ?=
RUN ?=
LONG ?=
# One more than cores: tests on a SLURM of two nodes mostly wait.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')

.PHONY: setup demo explore test slurm bench lint format schema lock unused clean

setup: $(SETUP)

demo: $(SETUP)
	$(BIN)/snakemake --cores $(CORES)
	@$(BIN)/python -m clipgraft.runs show demo

explore: $(SETUP)
	$(BIN)/python -m clipgraft.explore $(RUN)

test: $(SETUP)
	CLIPGRAFT_LONG_TESTS=$(LONG) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The plugin, from its own folder of .venv: installed for all, it adds a second to every start of snakemake.
slurm: $(SETUP)
	@$(BIN)/python -c 'import sys, sysconfig, pathlib; \
	  (pathlib.Path(sysconfig.get_path("purelib")) / "slurm.pth").write_text(f"{sys.prefix}/slurm\n")'
	@echo "now: snakemake --workflow-profile workflow/profiles/slurm   (workflow/docs/slurm.md; undone by rm .venv/lib/*/site-packages/slurm.pth)"

bench: $(SETUP)
	@mkdir -p benchmarks/results
	@for script in benchmarks/[a-z]*.py; do name=$$(basename $$script .py); \
	  $(BIN)/python $$script $(QUICK) > benchmarks/results/$$name.log || { cat benchmarks/results/$$name.log; exit 1; }; \
	  cat benchmarks/results/$$name.log; tail -n 1 benchmarks/results/$$name.log > benchmarks/results/$$name.json; \
	  rm benchmarks/results/$$name.log; done

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check workflow rules
	$(BIN)/mypy
	$(BIN)/codespell

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt workflow rules

schema: $(SETUP)
	$(BIN)/python -m clipgraft.config > workflow/schemas/config.schema.json

# What in results/ no finished run uses, nor those of config.yaml; deletes nothing.
unused: $(SETUP)
	$(BIN)/python -m clipgraft.runs unused

lock:
	cd envs && for name in bootstrap dev; do ../$(BIN)/uv pip compile -q --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header $$name.in -o $$name.txt; done
	cd envs && for name in cpu s3; do ../$(BIN)/uv pip compile -q --universal --python-version 3.11 -c dev.txt \
	  --generate-hashes --no-emit-index-url --no-header $$name.in -o $$name.txt; done
	cd envs && ../$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-deps \
	  --generate-hashes --no-emit-index-url --no-header slurm.in -o slurm.txt

$(BIN)/uv: envs/bootstrap.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "clipgraft needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version). Hint: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up .venv: some 6 GB of packages, torch with CUDA among them"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r envs/bootstrap.txt
	@touch $@

$(SETUP): $(BIN)/uv envs/dev.txt envs/s3.txt envs/slurm.txt pyproject.toml
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r envs/dev.txt
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --target .venv/s3 --require-hashes -r envs/s3.txt
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --target .venv/slurm --no-deps --require-hashes -r envs/slurm.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf results logs .snakemake
