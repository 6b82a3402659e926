# The main commands are `make book` and `make test`. The first command that needs .venv sets it up.

BIN   := .venv/bin
READY := .venv/.ready

# To run one chapter instead of all: make notebooks CHAPTER=chapters/01_nice.ipynb
CHAPTER ?= $(sort $(wildcard chapters/*.ipynb))

# How many processes the tests use, each on one thread.
JOBS ?= 2

# Options of the benchmark, for example: make bench BENCH=--compile
BENCH ?=

# The values of NFLOWS_SEED under which every check must hold.
SEEDS ?= 0 1 2 3 4 5 6 7 8 9

# nbval runs a chapter and compares every output; only a number after ≈ may differ (tests/sanitize.cfg).
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg

.PHONY: help book pdf test seeds notebooks colab ablations full-scale bench lab lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Outputs must not depend on the machine, so there is one thread and no progress bar.
test seeds notebooks: export OMP_NUM_THREADS := 1
test seeds notebooks: export NFLOWS_PROGRESS := 0
test seeds notebooks: export NFLOWS_DEVICE := cpu
test notebooks: export NFLOWS_SEED := 0
test seeds notebooks: export NFLOWS_PRESET := quick

book: $(READY)  ## build the book from the committed outputs, warnings as errors
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "The book is built. Open $(CURDIR)/_build/html/index.html"

pdf: book  ## the whole book as one PDF next to the site, which then offers it; needs Chromium or Chrome
	$(BIN)/python tools/pdf.py

# The chapters take longest, so they come first and the two workers end together; tests/conftest.py orders the rest.
test: $(READY)  ## lint, spelling, the house's plan, unit and property tests, every chapter compared with its stored outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(NBVAL) chapters tests nflows_lib

seeds: $(READY)  ## the chapters under ten seeds (NFLOWS_SEED 0 to 9): checks, texts, and how safely each check holds
	$(BIN)/python tests/seeds.py --jobs $(JOBS) --seeds $(SEEDS) -- $(CHAPTER)

notebooks: $(READY)  ## format and run the chapters in place, cut the clinic's pictures again
	$(BIN)/ruff check --fix --quiet $(CHAPTER)
	$(BIN)/ruff format --quiet $(CHAPTER)
	$(BIN)/python tests/notebooks.py $(CHAPTER)
	$(BIN)/python tools/thumbnails.py

colab: $(READY)  ## let the chapters install the course in Colab, from the address in _config.yml
	$(BIN)/python tools/publish.py

ablations: export OMP_NUM_THREADS := 1
ablations: export NFLOWS_PROGRESS := 0
ablations: $(READY)  ## run all ablations again and store their records
	$(BIN)/python -m nflows_lib.ablations --jobs $(JOBS)

full-scale: $(READY)  ## write the page on the long runs, and their tables, from the records
	$(BIN)/python tools/full_scale.py

# The other libraries are not part of the environment: the first `make bench` installs them.
bench: $(READY)  ## time the library against normflows and nflows, and against a model's size: benchmarks/*.json
	@$(BIN)/python -c "import nflows, normflows" 2>/dev/null || bash benchmarks/environment.sh
	$(BIN)/python -m benchmarks.run $(BENCH)
	$(BIN)/python -m benchmarks.scaling

lab: $(READY)  ## JupyterLab in the course's environment
	$(BIN)/jupyter lab chapters

# The markers in the file cover every Python and system that pyproject.toml allows. The benchmark's own file names only
# the other libraries, because all that they import is in the first file.
lock: $(READY)  ## resolve both requirements.lock again
	$(BIN)/uv pip compile pyproject.toml --extra data --extra book --extra dev --universal --python-version 3.11 \
	    --generate-hashes --no-header --no-annotate --upgrade --quiet --output-file requirements.lock
	awk -F '"' '/^bench = / { for (i = 2; i < NF; i += 2) print $$i }' pyproject.toml | \
	    $(BIN)/uv pip compile - --no-deps --universal --python-version 3.11 \
	    --generate-hashes --no-header --no-annotate --upgrade --quiet --output-file benchmarks/requirements.lock

clean:  ## remove what was built, keep .venv
	rm -rf _build .pytest_cache .ruff_cache figures
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml tools/environment.sh
	bash tools/environment.sh
