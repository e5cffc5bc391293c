# Every target makes its own environment in .venv; nothing but Python 3.11 or newer, pip and make is needed.
# To use an environment that is already there: make test PY=python STAMP=

PYTHON ?= python3.11
VENV   := .venv
PY     ?= $(VENV)/bin/python
STAMP  ?= $(VENV)/.installed
ARGS   ?=

.PHONY: help test test-all fuzz sweep versions findings lint format typecheck lines demo bench docs docs-serve wheel clean

help:
	@echo "make test       fast tests                 make test-all   slow ones as well"
	@echo "make fuzz       10,000 drawn cases         make versions   tests with the oldest and newest packages"
	@echo "make sweep      every causal type of transformers, built small, and the table of them"
	@echo "make findings   surprises in the libraries underneath: do they still hold?"
	@echo "make demo       semantic search, dense and pruned"
	@echo "make docs       the documentation, into build/site (make docs-serve while writing)"
	@echo "make bench      one benchmark: make bench ARGS='latency --help'; ARGS=tables makes docs/figures anew"
	@echo "make lint       ruff                       make typecheck  mypy --strict"
	@echo "make lines      lines of code by room, and the difference to main"
	@echo "make wheel      build the wheel            make clean      remove what was built (keeps .venv)"
	@echo "Further options go through ARGS, for instance: make test ARGS='-x -k select'"

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# A worker that a runtime ends is not replaced: pytest-xdist would wait for ever for the rest of the file that it had.
PYTEST := -m pytest -n auto --dist loadfile --max-worker-restart=0

test: $(STAMP)
	$(PY) $(PYTEST) $(ARGS)

test-all: $(STAMP)
	TORCH_FAKE_TENSOR_DISPATCH_CACHE=1 $(PY) $(PYTEST) -m 'not gpu' $(ARGS)

fuzz: $(STAMP)
	PYTHONPATH=tests $(PY) -m fuzz $(ARGS)

sweep: $(STAMP)
	PYTHONPATH=tests $(PY) -m sweep --table docs/reliability/architectures.md $(ARGS)

versions:
	.ci/versions $(ARGS)

findings:
	@failed=; for script in findings/*.sh; do echo "== $$script"; bash $$script || failed="$$failed $$script"; done; \
	test -z "$$failed" || { echo "No longer as described, or not run:$$failed"; exit 1; }

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Type checkers know nothing of package-dir, so they are shown the tree as it is installed.
typecheck: $(STAMP)
	@rm -rf build/types && mkdir -p build/types
	@cp -R prunepass build/types/prunepass && cp -R backends build/types/prunepass/backends
	MYPYPATH=build/types $(PY) -m mypy --config-file pyproject.toml -p prunepass

lines:
	@$(PYTHON) .ci/lines $(ARGS)

demo: $(STAMP)
	$(PY) examples/demo.py $(ARGS)

bench: $(STAMP)
	$(PY) -m benchmarks $(or $(ARGS),--help)

# A broken link or a public name without documentation fails the build.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PY) -m mkdocs build --strict $(ARGS)
	@echo "build/site/index.html"

docs-serve: $(STAMP)
	PYTHONPATH=. $(PY) -m mkdocs serve $(ARGS)

wheel: $(STAMP)
	rm -rf build/lib build/bdist.*
	$(PY) -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out *.egg-info
