# make demo   set up, run the whole DAG on the built-in data set, print the results
# make explore RUN=demo   try the models of a finished run in the browser, on this machine alone
# make test   set up, run all tests
# make bench  all benchmarks, results to benchmarks/results/ (QUICK=--quick: under a minute each)
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed
CORES ?= all
QUICK ?=
RUN ?=

.PHONY: demo explore test bench lint format schema lock unused clean

demo: $(SETUP)
	$(BIN)/snakemake --cores $(CORES)
	@$(BIN)/python -m clipgraft.runs show demo

explore: $(SETUP)
	$(BIN)/python -m clipgraft.explore $(RUN)

test: $(SETUP)
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

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

# What in results/ no run uses any more; deletes nothing.
unused: $(SETUP)
	$(BIN)/python -m clipgraft.runs unused

lock:
	cd envs && for name in bootstrap cpu dev s3; do ../$(BIN)/uv pip compile -q --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header $$name.in -o $$name.txt; done

$(BIN)/uv: envs/bootstrap.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "clipgraft needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version). Hint: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up .venv: some 6 GB of packages, torch with CUDA among them"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r envs/bootstrap.txt
	@touch $@

$(SETUP): $(BIN)/uv envs/dev.txt envs/s3.txt pyproject.toml
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r envs/dev.txt
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --target .venv/s3 --require-hashes -r envs/s3.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf results logs .snakemake
